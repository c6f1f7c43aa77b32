"""Draws small modules of all kinds, with dropouts in all kinds of places."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

Draw = Callable[[st.SearchStrategy[Any]], Any]
Shape = tuple[int, ...]
"""Sizes without the batch: ``(C,)``, ``(T, C)`` or ``(C, H, W)``."""

RATES = (0.25, 0.5, 0.75)
WIDTHS = (16, 32)


class Fn(nn.Module):
    """A function, printed by its name."""

    def __init__(self, name: str, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name = name
        self.fn = fn

    def extra_repr(self) -> str:
        return self.name

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x)


class Residual(nn.Module):
    """``x + f(x)``, with x used once more behind it all if ``thrice``."""

    def __init__(self, body: nn.Module, thrice: bool = False) -> None:
        super().__init__()
        self.body = body
        self.thrice = thrice

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.body(x)
        return y * x if self.thrice else y  # type: ignore[no-any-return]


class Two(nn.Module):
    """Two branches of one input, joined."""

    def __init__(self, left: nn.Module, right: nn.Module, how: str) -> None:
        super().__init__()
        self.left = left
        self.right = right
        self.how = how

    def extra_repr(self) -> str:
        return self.how

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.left(x), self.right(x)
        if self.how == "add":
            return a + b  # type: ignore[no-any-return]
        if self.how == "mul":
            return a * b  # type: ignore[no-any-return]
        if self.how == "sub":
            return b - 0.5 * a  # type: ignore[no-any-return]
        if self.how == "where":
            return torch.where(a > b, a, b)
        return a * torch.sigmoid(b)  # type: ignore[no-any-return]


class Tied(nn.Module):
    """``W' f(W x)``: both products have the same weight."""

    def __init__(self, width: int, hidden: int, inside: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(hidden, width) / math.sqrt(width))
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inside(F.linear(x, self.weight)), self.weight.t())


class Attention(nn.Module):
    """Self-attention with a dropout on its probabilities and on its result."""

    def __init__(self, width: int, heads: int, p: float, p_attention: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.drop = nn.Dropout(p)
        self.drop_attention = nn.Dropout(p_attention)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = (
            part.view(n, t, self.heads, c // self.heads).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(c // self.heads)
        y = self.drop_attention(scores.softmax(dim=-1)) @ v
        return self.drop(self.out(y.transpose(1, 2).reshape(n, t, c)))  # type: ignore[no-any-return]


class MixTokens(nn.Module):
    """A body that sees ``[N, C, T]`` of ``[N, T, C]``."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]


class CatSelf(nn.Module):
    """``[x, f(x)]`` along the features, or ``[f(x), x]``."""

    def __init__(self, body: nn.Module, dim: int, last: bool) -> None:
        super().__init__()
        self.body = body
        self.dim = dim
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.body(x), x]
        return torch.cat(parts[::-1] if self.last else parts, dim=self.dim)


class Again(nn.Module):
    """The same body twice: shared weights, and two dropouts for each module."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.body(x))  # type: ignore[no-any-return]


def activation(draw: Draw) -> nn.Module:
    kinds: list[Callable[[], nn.Module]] = [
        *(nn.ReLU, lambda: nn.ReLU(inplace=True), nn.GELU, lambda: nn.GELU("tanh"), nn.SiLU),
        *(nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Hardtanh, nn.Softplus, nn.ReLU6, nn.Mish),
        lambda: Fn("square", lambda x: x.pow(2)),
        lambda: Fn("cos", torch.cos),
        lambda: Fn("clamp", lambda x: x.clamp(min=0.1)),
        lambda: Fn("abs", torch.abs),
    ]
    return draw(st.sampled_from(kinds))()  # type: ignore[no-any-return]


def dropout(draw: Draw) -> nn.Module:
    return nn.Dropout(draw(st.sampled_from(RATES)), inplace=draw(st.booleans()))


# Functions that keep the shape, whatever it is
ODDITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "roll": lambda x: x.roll(3, -1),
    "plus zeros": lambda x: x + torch.zeros(x.shape[-1], dtype=x.dtype),
    "times zeros": lambda x: x * torch.zeros(x.shape[-1], dtype=x.dtype),
    "zeros beside": lambda x: torch.cat([x, torch.zeros_like(x)], -1)[..., 3 : 3 + x.shape[-1]],
    "zeros stacked": lambda x: torch.stack([x, torch.zeros_like(x)], 1).sum(1),
    "flip": lambda x: x.flip(1),
    "index": lambda x: x[:, torch.arange(x.shape[1]).flip(0)],
    "gather": lambda x: x.gather(-1, torch.arange(x.shape[-1]).flip(0).expand(x.shape)),
    "index_add": lambda x: x.index_add(1, torch.tensor([0, 2]), x[:, :2]),
    "index_put": lambda x: x.index_put((torch.tensor([0, 1]),), x[:1] * 2, accumulate=True),
    "scatter": lambda x: x.scatter_add(-1, torch.zeros_like(x, dtype=torch.long), x),
    "masked_fill": lambda x: x.masked_fill(x > 1, 0.0),
    "fill": lambda x: x.masked_fill(x > 1, -1.0),
    "where": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "maximum": lambda x: torch.maximum(x, x.flip(-1)),
    "minus its mean": lambda x: x - x.mean(-1, keepdim=True),
    "over its sum": lambda x: x / (x.abs().sum(1, keepdim=True) + 1),
    "std": lambda x: x * x.std(-1, keepdim=True),
    "logsumexp": lambda x: x - x.logsumexp(1, keepdim=True),
    "log_softmax": lambda x: x.log_softmax(-1),
    "stack": lambda x: torch.stack([x, 2 * x], 1).sum(1),
    "stack max": lambda x: torch.stack([x, 0.5 * x], -1).amax(-1),
    "repeat": lambda x: x.repeat(2, *[1] * (x.dim() - 1))[x.shape[0] :],
    "interleave": lambda x: (
        x.repeat_interleave(2, 1).view(x.shape[0], x.shape[1], 2, -1)[:, :, 1].view(x.shape)
    ),
    "expand": lambda x: x.unsqueeze(1).expand(-1, 3, *x.shape[1:]).mean(1),
    "outer": lambda x: (x.unsqueeze(-1) * x.unsqueeze(-2)).sum(-1),
    "einsum": lambda x: torch.einsum("n...,m...->n...", x, x),
    "bmm": lambda x: (
        (x.flatten(1).unsqueeze(1) @ x.flatten(1).unsqueeze(2)).view(-1, *[1] * (x.dim() - 1)) * x
    ),
    "baddbmm": lambda x: torch.baddbmm(
        x.flatten(1).unsqueeze(1),
        torch.ones(x.shape[0], 1, 1, dtype=x.dtype),
        x.flatten(1).unsqueeze(1),
    ).view(x.shape),
    "prod": lambda x: x * torch.tanh(x).add(1).prod(-1, keepdim=True),
    "cumsum": lambda x: x.cumsum(-1),
    "cumprod": lambda x: torch.sigmoid(x).cumprod(1),
    "sort": lambda x: x.sort(-1).values,
    "topk": lambda x: x + x.topk(2, 1).values.sum(1, keepdim=True),
    "amax": lambda x: x - x.amax(1, keepdim=True),
    "unbind": lambda x: torch.stack(x.unbind(1)[::-1], 1),
    "unfold": lambda x: x.unfold(-1, 2, 2).flatten(-2),
    "tril": lambda x: x.tril() if x.dim() > 2 else x,
    "pad": lambda x: F.pad(x, (1, 1))[..., 1:-1],
    "lerp": lambda x: torch.lerp(x, x.flip(0), 0.3),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.5),
    "clone": lambda x: x.transpose(0, 1).clone().transpose(0, 1),
    "contiguous": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "strided": lambda x: (
        (x * 2).as_strided(x.shape, x.contiguous().stride()) if x.is_contiguous() else x
    ),
    "assigned": lambda x: _assigned(x),
    "exchange": lambda x: x.movedim(1, -1).reshape(x.shape[0], -1).view(x.shape),
    "over the batch": lambda x: x * x.flatten(1).T.sum(0).view(-1, *[1] * (x.dim() - 1)),
    "detach": lambda x: x * x.detach(),
    "half": lambda x: x.float().double(),
    "size": lambda x: x + x.shape[0],
    "pow": lambda x: x.abs() ** 1.5,
    "atan2": lambda x: torch.atan2(x, 1 + x * x),
    "pairs": lambda x: torch.cat([x[..., 1::2], x[..., ::2]], -1),
    "rotate": lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2),
    "split": lambda x: torch.cat(
        [p * i for i, p in enumerate(x.split([4, x.shape[-1] - 4], -1))], -1
    ),
}


def _assigned(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 0] = x[:, 1]
    y[..., ::2] += 1.0
    return y


def after(draw: Draw, *modules: nn.Module) -> nn.Module:
    """Puts an activation and a dropout behind some modules, or not, in either order."""
    tail = []
    if draw(st.booleans()):
        tail.append(activation(draw))
    if draw(st.booleans()):
        tail.append(dropout(draw))
    if draw(st.booleans()):
        tail.reverse()
    return nn.Sequential(*modules, *tail)


def same_shape(draw: Draw, shape: Shape, depth: int) -> nn.Module:
    """Draws a module whose result has the shape of its input."""
    if len(shape) == 3:
        return image_step(draw, shape, depth, same=True)[0]
    return feature_step(draw, shape, depth, same=True)[0]


def oddity(draw: Draw) -> nn.Module:
    name = draw(st.sampled_from(sorted(ODDITIES)))
    return Fn(name, ODDITIES[name])


FEATURE_STEPS = (
    *("linear", "linear", "mlp", "dropout", "dropout", "norm", "softmax", "residual", "two"),
    *("tied", "again", "views", "cat", "glu", "chunks", "slice", "constant", "gram"),
    *("oddity", "oddity", "oddity"),
)
SEQUENCE_STEPS = ("attention", "mix", "dropout1d", "pool", "flatten", "conv1d", "cumsum", "merge")


def feature_step(
    draw: Draw, shape: Shape, depth: int, *, same: bool = False
) -> tuple[nn.Module, Shape]:
    """Draws a module on ``[N, C]`` or ``[N, T, C]``, and says what shape it makes."""
    *tokens, c = shape
    kinds = FEATURE_STEPS + (SEQUENCE_STEPS if tokens else ())
    kind = draw(st.sampled_from(kinds))
    out = c if same else draw(st.sampled_from(WIDTHS))
    hidden = draw(st.sampled_from(WIDTHS))
    if depth > 0 and kind in ("residual", "two", "again", "cat", "mix"):
        if kind == "residual":
            return Residual(same_shape(draw, shape, depth - 1), draw(st.booleans())), shape
        if kind == "two":
            left, right = (same_shape(draw, shape, depth - 1) for _ in range(2))
            how = draw(st.sampled_from(("add", "mul", "sub", "where", "gate")))
            return Two(left, right, how), shape
        if kind == "again":
            return Again(same_shape(draw, shape, depth - 1)), shape
        if kind == "mix" and tokens:
            return MixTokens(same_shape(draw, (c, *tokens), depth - 1)), shape
        body = CatSelf(same_shape(draw, shape, depth - 1), -1, draw(st.booleans()))
        return nn.Sequential(body, after(draw, nn.Linear(2 * c, out))), (*tokens, out)
    if kind == "oddity":
        return oddity(draw), shape
    if kind == "mlp":
        return nn.Sequential(
            after(draw, nn.Linear(c, hidden)), after(draw, nn.Linear(hidden, out))
        ), (*tokens, out)
    if kind == "dropout":
        return dropout(draw), shape
    if kind == "norm":
        if tokens or draw(st.booleans()):
            return nn.LayerNorm(c, elementwise_affine=draw(st.booleans())), shape
        return nn.BatchNorm1d(c), shape
    if kind == "softmax":
        return nn.Softmax(dim=draw(st.sampled_from([-1, *range(1, len(shape))]))), shape
    if kind == "tied":
        return Tied(c, hidden, after(draw)), shape
    if kind == "views":
        permuted = Fn(
            "heads", lambda x: x.view(*x.shape[:-1], 4, c // 4).transpose(-2, -1).flatten(-2)
        )
        return nn.Sequential(permuted, dropout(draw)), shape
    if kind == "glu":
        return nn.Sequential(nn.Linear(c, 2 * out), nn.GLU(), dropout(draw)), (*tokens, out)
    if kind == "chunks":
        return nn.Sequential(
            dropout(draw), Fn("chunks", lambda x: torch.cat(x.chunk(2, -1)[::-1], -1))
        ), shape
    if kind == "slice":
        half = nn.Sequential(dropout(draw), Fn("half", lambda x: x[..., : c // 2]))
        return nn.Sequential(half, after(draw, nn.Linear(c // 2, out))), (*tokens, out)
    if kind == "constant":
        return Fn("+ 1", lambda x: 1 + x * 2), shape
    if kind == "gram":
        return nn.Sequential(
            dropout(draw),
            Fn("x x' x", lambda x: x @ x.mT @ x / c if x.dim() > 2 else x * x.mean(0)),
        ), shape
    if kind == "attention" and tokens:
        p, p_attention = (draw(st.sampled_from(RATES)) for _ in range(2))
        return Attention(c, draw(st.sampled_from((1, 2, 4))), p, p_attention), shape
    if kind == "dropout1d" and tokens:
        return nn.Dropout1d(draw(st.sampled_from(RATES))), shape
    if kind == "pool" and tokens and not same:
        fn = draw(st.sampled_from(("mean", "amax", "sum")))
        return Fn(fn, lambda x: getattr(x, fn)(1)), (c,)
    if kind == "flatten" and tokens and not same:
        return nn.Sequential(nn.Flatten(), after(draw, nn.Linear(c * tokens[0], out))), (out,)
    if kind == "conv1d" and tokens:
        conv = after(draw, nn.Conv1d(c, out, 3, padding=1))
        if draw(st.booleans()):
            conv = nn.Sequential(nn.Dropout1d(0.5), conv)
        return MixTokens(conv), (*tokens, out)
    if kind == "cumsum" and tokens:
        return Fn("cumsum", lambda x: x.cumsum(1)), shape
    if kind == "merge" and tokens:
        return Fn("merge", lambda x: x.reshape(-1, c).view(x.shape)), shape
    return after(draw, nn.Linear(c, out, bias=draw(st.booleans()))), (*tokens, out)


IMAGE_STEPS = (
    *("conv", "conv", "conv", "dropout2d", "dropout2d", "dropout", "batch_norm", "group_norm"),
    *("residual", "two", "cat", "max_pool", "avg_pool", "pad", "pointwise", "shuffle", "adaptive"),
    *("flatten", "squeeze", "tokens", "softmax", "grouped", "transposed", "oddity", "oddity"),
    *("strided", "upsample", "instance_norm", "channels_last", "unshuffle"),
)


def image_step(
    draw: Draw, shape: Shape, depth: int, *, same: bool = False
) -> tuple[nn.Module, Shape]:
    """Draws a module on ``[N, C, H, W]``, and says what shape it makes."""
    c, h, w = shape
    kind = draw(st.sampled_from(IMAGE_STEPS))
    out = c if same else draw(st.sampled_from(WIDTHS))
    p = draw(st.sampled_from(RATES))
    if depth > 0 and kind in ("residual", "two", "cat"):
        if kind == "residual":
            return Residual(same_shape(draw, shape, depth - 1), draw(st.booleans())), shape
        if kind == "two":
            left, right = (same_shape(draw, shape, depth - 1) for _ in range(2))
            return Two(left, right, draw(st.sampled_from(("add", "mul", "gate")))), shape
        body = CatSelf(same_shape(draw, shape, depth - 1), 1, draw(st.booleans()))
        return nn.Sequential(body, after(draw, nn.Conv2d(2 * c, out, 1))), (out, h, w)
    if kind == "oddity":
        return oddity(draw), shape
    if kind == "strided" and not same and h > 2:
        conv = nn.Conv2d(c, out, 3, stride=2, padding=2, dilation=2)
        return after(draw, conv), (out, (h - 1) // 2 + 1, (w - 1) // 2 + 1)
    if kind == "upsample" and not same and h < 8:
        mode = draw(st.sampled_from(("nearest", "bilinear")))
        return nn.Upsample(scale_factor=2, mode=mode), (c, 2 * h, 2 * w)
    if kind == "instance_norm" and h > 1:
        return nn.InstanceNorm2d(c, affine=True), shape
    if kind == "channels_last":
        return Fn("channels last", lambda x: x.contiguous(memory_format=torch.channels_last)), shape
    if kind == "unshuffle" and not same and h % 2 == 0 and w % 2 == 0 and c < 64:
        return nn.Sequential(nn.Dropout2d(p), nn.PixelUnshuffle(2)), (4 * c, h // 2, w // 2)
    if kind == "dropout2d":
        return nn.Dropout2d(p, inplace=draw(st.booleans())), shape
    if kind == "dropout":
        return dropout(draw), shape
    if kind == "batch_norm":
        return nn.BatchNorm2d(c), shape
    if kind == "group_norm":
        return nn.GroupNorm(draw(st.sampled_from((1, 4))), c), shape
    if kind == "max_pool" and not same and min(h, w) > 1:
        return nn.MaxPool2d(2), (c, h // 2, w // 2)
    if kind == "avg_pool":
        return nn.AvgPool2d(3, stride=1, padding=1), shape
    if kind == "pad" and not same:
        return nn.ZeroPad2d((1, 0, 0, 1)), (c, h + 1, w + 1)
    if kind == "pointwise":
        return nn.Sequential(nn.Dropout2d(p), after(draw, nn.Conv2d(c, out, 1))), (out, h, w)
    if kind == "shuffle":
        mixed = Fn(
            "shuffle", lambda x: x.view(-1, 4, c // 4, h, w).transpose(1, 2).reshape(-1, c, h, w)
        )
        return nn.Sequential(nn.Dropout2d(p), mixed), shape
    if kind == "adaptive" and not same:
        pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), dropout(draw))
        return nn.Sequential(pooled, after(draw, nn.Linear(c, out))), (out,)
    if kind == "squeeze" and not same:
        pooled = nn.Sequential(Fn("mean", lambda x: x.mean((2, 3), keepdim=True)), nn.Dropout2d(p))
        return nn.Sequential(pooled, Fn("squeeze", lambda x: x.squeeze((2, 3)))), (c,)
    if kind == "flatten" and not same:
        flat = nn.Sequential(draw(st.sampled_from((nn.Dropout2d(p), nn.Dropout(p)))), nn.Flatten())
        return nn.Sequential(flat, after(draw, nn.Linear(c * h * w, out))), (out,)
    if kind == "tokens" and not same:
        return Fn("tokens", lambda x: x.flatten(2).transpose(1, 2)), (h * w, c)
    if kind == "softmax":
        return nn.Softmax(dim=1), shape
    if kind == "grouped":
        return after(draw, nn.Conv2d(c, c, 3, padding=1, groups=4)), shape
    if kind == "transposed":
        return after(draw, nn.ConvTranspose2d(c, out, 3, padding=1)), (out, h, w)
    return after(draw, nn.Conv2d(c, out, 3, padding=1)), (out, h, w)


def dropouts_in(module: nn.Module) -> int:
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d)
    return sum(isinstance(child, kinds) for child in module.modules())


class Program(nn.Module):
    """What was drawn; an embedding looks up its input if that is integers."""

    def __init__(self, steps: Sequence[nn.Module], embedding: nn.Module | None, tied: bool) -> None:
        super().__init__()
        self.embedding = embedding
        self.steps = nn.ModuleList(steps)
        self.tied = tied

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        for step in self.steps:
            # A step that works in place must not overwrite what its caller owns, or a parameter
            x = step(x * 1 if step is self.steps[0] else x)
        if self.tied and isinstance(self.embedding, nn.Embedding):
            return x @ self.embedding.weight.t()
        return x


@st.composite
def programs(draw: Draw) -> tuple[nn.Module, Tensor]:
    """Draws a module with at least one dropout, and an input, in fp64."""
    torch.manual_seed(draw(st.integers(0, 9)))
    kind = draw(st.sampled_from(("features", "sequence", "image", "ids")))
    n, t, c = draw(st.sampled_from((2, 3, 8))), draw(st.sampled_from((4, 8))), 16
    embedding: nn.Module | None = None
    x: Tensor
    if kind == "features":
        shape: Shape = (c,)
        x = torch.randn(n, c, dtype=torch.float64)
    elif kind == "image":
        shape = (c, 4, 4)
        x = torch.randn(n, *shape, dtype=torch.float64)
    elif kind == "sequence":
        shape = (t, c)
        x = torch.randn(n, t, c, dtype=torch.float64)
    else:
        shape = (t, c)
        embedding = nn.Embedding(12, c)
        x = torch.randint(12, (n, t))
    steps: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 5))):
        step = image_step if len(shape) == 3 else feature_step
        module, shape = step(draw, shape, 2)
        steps.append(module)
    tied = embedding is not None and shape[-1] == c and draw(st.booleans())
    program = Program(steps, embedding, tied).double()
    if not dropouts_in(program):
        if len(shape) == 3:
            program.steps.append(nn.Dropout2d(0.5).double())
            program.steps.append(
                nn.Conv2d(shape[0], 4, 3).double() if shape[1] > 2 else nn.Flatten()
            )
        else:
            program.steps.append(nn.Dropout(0.5))
            program.steps.append(nn.Linear(shape[-1], 16).double())
    if x.is_floating_point():
        x.requires_grad_(draw(st.booleans()))
        if draw(st.booleans()):  # the same numbers in another order of memory
            with torch.no_grad():
                other = x.transpose(0, -1).contiguous().transpose(0, -1)
            x = other.requires_grad_(x.requires_grad)
    return program, x
