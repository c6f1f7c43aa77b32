"""Small networks for the tests of roles, each with its roles in program order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

B, T, D, WORDS = 3, 6, 16, 20


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, its inputs, and the roles expected."""

    make: Callable[[], nn.Module | Callable[..., Any]]
    inputs: Callable[[], tuple[Any, ...]]
    roles: str


class Network(nn.Module):
    """Modules by name, and a function of them and the inputs."""

    def __init__(
        self, f: Callable[..., Any], /, **parts: nn.Module | nn.Parameter | Tensor
    ) -> None:
        super().__init__()
        self.function = f
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def net(f: Callable[..., Any], /, **parts: Any) -> Callable[[], Network]:
    return lambda: Network(f, **parts)


def ids(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randint(1, WORDS, shape or (B, T)),)


def data(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.randn(shape) for shape in shapes)


X, SEQUENCE, IMAGE = data((B, D)), data((B, T, D)), data((B, 3, 8, 8))


def drop(x: Tensor, p: float = 0.25) -> Tensor:
    return F.dropout(x, p, True)


def lin(n_in: int = D, n_out: int = D, bias: bool = True) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias)


def par(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def attend(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, p: float = 0.0) -> Tensor:
    scores = (q(x) @ k(x).transpose(-1, -2)) / D**0.5
    probabilities = scores.softmax(-1)
    if p:
        probabilities = drop(probabilities, p)
    return probabilities @ v(x)  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self, heads: int = 2, p: float = 0.25, fused: bool = False) -> None:
        super().__init__()
        self.qkv, self.out = lin(D, 3 * D), lin()
        self.heads, self.p, self.fused = heads, p, fused

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = split.unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-1, -2)
            causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            y = drop(scores.masked_fill(~causal, -torch.inf).softmax(-1), self.p) @ v
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class RmsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Block(nn.Module):
    """A block of GPT: pre-norm, with or without gates."""

    def __init__(self, gate: bool = False, rms: bool = False, fused: bool = False) -> None:
        super().__init__()
        norm: Callable[[], nn.Module] = RmsNorm if rms else lambda: nn.LayerNorm(D)
        self.norm1, self.norm2 = norm(), norm()
        self.attention = Attention(fused=fused)
        self.up, self.down = lin(D, 2 * D), lin(2 * D, D)
        self.gate = lin(D, 2 * D) if gate else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + drop(self.attention(self.norm1(x)))
        z = self.norm2(x)
        h = F.gelu(self.up(z), approximate="tanh")
        h = h if self.gate is None else F.silu(self.gate(z)) * self.up(z)
        return x + drop(self.down(drop(h)))


def gpt(blocks: int, *, buffer: bool = False, checkpointed: bool = False, **how: bool) -> Network:
    def forward(m: Any, x: Tensor) -> Any:
        h = drop(m.words(x) + m.positions[:, : x.shape[1]])
        for block in m.blocks:
            h = checkpoint(block, h, use_reentrant=False) if checkpointed else block(h)
        return F.linear(m.norm(h), m.words.weight)

    positions = torch.randn(1, T, D)
    return Network(
        forward,
        words=nn.Embedding(WORDS, D),
        positions=positions if buffer else nn.Parameter(positions),
        blocks=nn.ModuleList(Block(**how) for _ in range(blocks)),
        norm=nn.LayerNorm(D),
    )


def encoder(norm_first: bool) -> Network:
    def forward(m: Any, x: Tensor) -> Any:
        positions = torch.arange(x.shape[1])
        h = drop(m.words(x) + m.positions(positions))
        return m.head(m.layers(h))

    layer = nn.TransformerEncoderLayer(D, 2, 2 * D, 0.25, batch_first=True, norm_first=norm_first)
    layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    words, positions = nn.Embedding(WORDS, D), nn.Embedding(T, D)
    return Network(forward, words=words, positions=positions, layers=layers, head=lin())


def mlp(m: Any, x: Tensor) -> Any:
    return m.c(drop(m.b(drop(m.a(drop(x)).relu())).relu()))


def mlp_with_loss(m: Any, x: Tensor, y: Tensor) -> Any:
    return F.cross_entropy(m.b(drop(m.a(x).relu())), y)


def dense(m: Any, x: Tensor) -> Any:
    for conv in m.convs:
        x = torch.cat([x, drop(conv(x.relu()))], 1)
    return m.head(x.mean((2, 3)))


def lstm_lm(m: Any, x: Tensor) -> Any:
    return m.head(drop(m.rnn(drop(m.words(x)))[0]))


def vgg(m: Any, x: Tensor) -> Any:
    h = F.max_pool2d(m.conv(x).relu(), 2).flatten(1)
    return m.c(drop(m.b(drop(m.a(drop(h)).relu())).relu()))


class ResBlock(nn.Module):
    """A block of a wide residual network: a dropout in it."""

    def __init__(self, skip_drop: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.n, self.m = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.skip_drop = skip_drop

    def forward(self, x: Tensor) -> Tensor:
        h = self.m(self.b(drop(self.n(self.a(x)).relu())))
        return (x + (h if self.skip_drop is None else self.skip_drop(h))).relu()


def resnet(skip_drop: Callable[[Tensor], Tensor] | None = None, blocks: int = 2) -> Network:
    def forward(m: Any, x: Tensor) -> Any:
        return m.head(drop(m.blocks(m.stem(x)).mean((2, 3))))

    parts = nn.Sequential(*(ResBlock(skip_drop) for _ in range(blocks)))
    return Network(forward, stem=nn.Conv2d(3, 8, 3, padding=1), blocks=parts, head=lin(8, 4))


def drop_path(x: Tensor) -> Tensor:
    shape = (x.shape[0],) + (1,) * (x.dim() - 1)
    return x * (x.new_empty(shape).bernoulli_(0.75) / 0.75)


def gat(m: Any, x: Tensor, source: Tensor, target: Tensor) -> Any:
    h = m.w(drop(x)).view(-1, 2, D)
    e = (h * m.a).sum(-1)[source] + (h * m.b).sum(-1)[target]
    e = F.leaky_relu(e)
    e = (e - e.amax(0, keepdim=True)).exp()
    total = torch.zeros(x.shape[0], 2).index_add(0, target, e)
    alpha = drop(e / (total[target] + 1e-16))
    out = torch.zeros(x.shape[0], 2, D).index_add(0, target, h[source] * alpha.unsqueeze(-1))
    return m.head(drop(F.elu(out.flatten(1))))


def dense_gat(m: Any, x: Tensor, adjacency: Tensor) -> Any:
    h = m.w(drop(x))
    e = F.leaky_relu(h @ m.a + (h @ m.b).T)
    alpha = drop(e.masked_fill(adjacency == 0, -9e15).softmax(1))
    return F.elu(alpha @ h)


def graph(nodes: int = 7, edges: int = 12) -> tuple[Tensor, ...]:
    return torch.randn(nodes, D), *torch.randint(nodes, (2, edges)).unbind(0)


def gcn(m: Any, x: Tensor, adjacency: Tensor) -> Any:
    h = (adjacency @ m.a(drop(x))).relu()
    return adjacency @ m.b(drop(h))


def gcn_aggregate_first(m: Any, x: Tensor, adjacency: Tensor) -> Any:
    h = m.a(adjacency @ drop(x)).relu()
    return m.b(adjacency @ drop(h))


def lora(m: Any, x: Tensor) -> Any:
    return m.head((m.w(x) + m.b(m.a(drop(x)))).relu())


def recommend(m: Any, user: Tensor, item: Tensor, tags: Tensor, x: Tensor) -> Any:
    z = torch.cat([m.users(user), m.items(item), m.tags(tags), x], 1)
    return m.b(drop(m.a(drop(z)).relu()))


def recommend_parts(m: Any, user: Tensor, item: Tensor) -> Any:
    z = torch.cat([drop(m.users(user)), drop(m.items(item))], 1)
    return m.b(drop(m.a(z).relu()))


def two(n: int = 2) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.randint(1, WORDS, (B,)) for _ in range(n))


def classify(m: Any, x: Tensor) -> Any:
    """BERT's pooler and classifier, behind a post-norm block."""
    h = m.norm0(m.words(x) + m.segments(x % 2) + m.positions(torch.arange(T)))
    h = drop(h)
    h = m.norm1(h + drop(m.attention(h)))
    h = m.norm2(h + drop(m.down(F.gelu(m.up(h)))))
    return m.head(drop(m.pooler(h[:, 0]).tanh()))


def classify_parts() -> dict[str, Any]:
    embeddings = {name: nn.Embedding(WORDS, D) for name in ("words", "segments", "positions")}
    norms = {name: nn.LayerNorm(D) for name in ("norm0", "norm1", "norm2")}
    linears = {"up": lin(D, 2 * D), "down": lin(2 * D, D), "pooler": lin(), "head": lin()}
    return {**embeddings, **norms, **linears, "attention": Attention()}


def drop_connect(m: Any, x: Tensor) -> Any:
    return F.linear(drop(F.linear(x, drop(m.w)).relu()), m.v)


def highway(m: Any, x: Tensor) -> Any:
    gate = m.gate(x).sigmoid()
    return m.head(gate * drop(m.f(x).relu()) + (1 - gate) * x)


def conformer_conv(m: Any, x: Tensor) -> Any:
    h = F.glu(m.a(m.norm(x).transpose(1, 2)), 1)
    x = x + drop(m.c(F.silu(m.b(h)))).transpose(1, 2)
    return m.f(x)


def squeeze_excite(m: Any, x: Tensor) -> Any:
    h = m.a(x).relu()
    scale = m.up(drop(m.down(h.mean((2, 3))).relu())).sigmoid()
    return m.b(drop(h * scale[:, :, None, None]))


def inception(m: Any, x: Tensor) -> Any:
    return m.c(torch.cat([drop(m.a(x).relu()), m.b(x).relu()], 1))


def unet(m: Any, x: Tensor) -> Any:
    a = drop(m.a(x).relu())
    b = drop(m.b(F.max_pool2d(a, 2)).relu())
    return m.c(torch.cat([a, F.interpolate(b, scale_factor=2)], 1))


def tagger(m: Any, x: Tensor) -> Any:
    h = m.words(x)
    h = h + drop(m.down(drop(m.up(h).relu())))
    return m.head(drop(m.rnn(h)[0]))


def residual_lstm(m: Any, x: Tensor) -> Any:
    x = x + drop(m.a(x)[0])
    return m.head(x + drop(m.b(x)[0]))


def regression(m: Any, x: Tensor, y: Tensor) -> Any:
    return F.mse_loss(drop(m.b(drop(m.a(x).relu()))), y)


def spatial_text(m: Any, x: Tensor) -> Any:
    h = F.dropout1d(m.words(x).transpose(1, 2), 0.25, True)
    return m.head(drop(m.conv(h).relu().amax(-1)))


def locked(x: Tensor, dim: int) -> Tensor:
    """One mask for all time steps, as Gal and Ghahramani have it."""
    shape = list(x.shape)
    shape[dim] = 1
    return x * (x.new_empty(shape).bernoulli_(0.75) / 0.75)


def locked_lm(m: Any, x: Tensor) -> Any:
    h = locked(m.words(x), 1)
    return m.head(locked(m.rnn(h)[0], 1))


def masked(m: Any, x: Tensor, keep: Tensor) -> Any:
    """Padding is masked, and means are taken over what is left."""
    h = drop(m.a(m.words(x)).relu()) * keep[..., None]
    h = h.sum(1) / keep.sum(1, keepdim=True)
    return m.b(drop(h))


def batch_norm(m: Any, x: Tensor) -> Any:
    return m.b(m.norm(drop(m.a(x))).relu())


def parallel(m: Any, x: Tensor) -> Any:
    """Attention and FFN side by side."""
    z = m.norm(x)
    return m.head(x + drop(m.attention(z)) + drop(m.down(drop(F.gelu(m.up(z))))))


def siamese(m: Any, a: Tensor, b: Tensor) -> Any:
    """A product of two dropped activations."""
    return drop(m.a(a)) @ drop(m.a(b)).T


def features(m: Any, x: Tensor) -> Any:
    h = drop(m.a(x).relu())
    return m.b(h), h


def group_norm(m: Any, x: Tensor) -> Any:
    return m.b(drop(F.silu(m.norm(m.a(x)))))


def film(m: Any, x: Tensor, c: Tensor) -> Any:
    """A diffusion network's block: the time goes in by scale and shift."""
    scale, shift = m.time(c)[:, :, None, None].chunk(2, 1)
    h = F.silu(m.norm(m.a(x)) * (1 + scale) + shift)
    return m.stem(x) + m.b(drop(h))


def experts(m: Any, x: Tensor) -> Any:
    weights = m.router(x).softmax(-1)
    h = drop(torch.einsum("bd,edf->bef", x, m.up).relu())
    return x + drop(torch.einsum("be,bef,efd->bd", weights, h, m.down))


def weight_norm(m: Any, x: Tensor) -> Any:
    w = m.g * m.v / m.v.norm(dim=1, keepdim=True)
    return m.b(drop(F.linear(drop(x), w).relu()))


def wav2vec(m: Any, x: Tensor) -> Any:
    h = drop(m.project(m.norm(m.extract(x).relu().transpose(1, 2))))
    h = h + F.gelu(m.positions(h.transpose(1, 2))).transpose(1, 2)
    return m.head(drop(m.norm2(h)))


def decoder(m: Any, x: Tensor, memory: Tensor) -> Any:
    return m.layer(x, memory)


def block_alone(m: Any, x: Tensor, stream: Tensor) -> Any:
    """BertSelfOutput, compiled by itself: the stream is an input of its own."""
    return m.norm(drop(m.a(x)) + stream)


def frozen(m: Any, x: Tensor) -> Any:
    """The last weight is a buffer."""
    return drop(m.a(x).relu()) @ m.w


def crnn(m: Any, x: Tensor) -> Any:
    h = drop(m.conv(x).relu().transpose(1, 2))
    return m.head(drop(m.rnn(h)[0][:, -1]))


def conv1d(m: Any, x: Tensor) -> Any:
    return m.c(drop(m.b(drop(m.a(drop(x)).relu())).relu()).mean(-1))


def text_cnn(m: Any, x: Tensor) -> Any:
    h = m.words(x).transpose(1, 2)
    h = torch.cat([conv(h).relu().amax(-1) for conv in m.convs], 1)
    return m.head(drop(h))


def mixer(m: Any, x: Tensor) -> Any:
    z = m.norm(x).transpose(1, 2)
    x = x + drop(m.d(drop(F.gelu(m.c(z))))).transpose(1, 2)
    return x + drop(m.b(drop(F.gelu(m.a(m.norm(x))))))


def sage(m: Any, x: Tensor, adjacency: Tensor) -> Any:
    x = drop((m.a(x) + m.b(adjacency @ x)).relu())
    return m.c(x) + m.d(adjacency @ x)


CONVS = {"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(8, 8, 3), "c": nn.Conv2d(16, 8, 3)}
ADJACENCY = data((7, D), (7, 7))

_LAYER = "attention residual hidden residual "
"""Roles in torch's encoder layer, whose attention is written out on a CPU."""

CASES: dict[str, Case] = {
    "mlp": Case(net(mlp, a=lin(), b=lin(), c=lin()), X, "input hidden hidden"),
    "mlp of sequences": Case(net(mlp, a=lin(), b=lin(), c=lin()), SEQUENCE, "input hidden hidden"),
    "loss": Case(
        net(mlp_with_loss, a=lin(), b=lin()),
        lambda: (torch.randn(B, D), torch.randint(D, (B,))),
        "hidden",
    ),
    "post-norm": Case(lambda: encoder(False), ids(), "residual " + _LAYER * 2),
    "pre-norm": Case(lambda: encoder(True), ids(), "residual " + _LAYER * 2),
    "gpt": Case(lambda: gpt(2), ids(), "residual " + "attention residual hidden residual " * 2),
    "gpt, fused attention": Case(
        lambda: gpt(1, fused=True), ids(), "residual residual hidden residual"
    ),
    "gpt, positions in a buffer": Case(
        lambda: gpt(1, fused=True, buffer=True), ids(), "residual residual hidden residual"
    ),
    "gpt with gates": Case(
        lambda: gpt(1, gate=True), ids(), "residual attention residual hidden residual"
    ),
    "gpt with gates and rms norm": Case(
        lambda: gpt(2, gate=True, rms=True),
        ids(),
        "residual " + "attention residual hidden residual " * 2,
    ),
    "gpt, checkpointed": Case(
        lambda: gpt(2, checkpointed=True),
        ids(),
        "residual " + "attention residual hidden residual " * 2,
    ),
    "attention alone": Case(lambda: Attention(), SEQUENCE, "attention"),
    "block alone": Case(lambda: Block(), SEQUENCE, "attention residual hidden residual"),
    "bert": Case(
        lambda: Network(classify, **classify_parts()),
        ids(),
        "residual attention residual residual hidden",
    ),
    "decoder": Case(
        lambda: Network(decoder, layer=nn.TransformerDecoderLayer(D, 2, 2 * D, 0.25)),
        data((T, B, D), (T, B, D)),
        "attention residual attention residual hidden residual",
    ),
    "parallel block": Case(
        net(
            parallel, norm=nn.LayerNorm(D), attention=Attention(), up=lin(), down=lin(), head=lin()
        ),
        SEQUENCE,
        "attention residual hidden residual",
    ),
    "end of a block": Case(
        net(block_alone, a=lin(), norm=nn.LayerNorm(D)),
        data((B, T, D), (B, T, D)),
        "residual",
    ),
    "lora": Case(net(lora, w=lin(), a=lin(D, 2), b=lin(2, D), head=lin()), X, "input"),
    "recommender": Case(
        net(
            recommend,
            users=nn.Embedding(WORDS, D),
            items=nn.Embedding(WORDS, D),
            tags=nn.EmbeddingBag(WORDS, D),
            a=lin(4 * D),
            b=lin(),
        ),
        lambda: (*two()(), torch.randint(1, WORDS, (B, T)), torch.randn(B, D)),
        "input hidden",
    ),
    "recommender, parts": Case(
        net(
            recommend_parts,
            users=nn.Embedding(WORDS, D),
            items=nn.Embedding(WORDS, D),
            a=lin(2 * D),
            b=lin(),
        ),
        two(),
        "input input hidden",
    ),
    "lstm": Case(
        net(
            lstm_lm,
            words=nn.Embedding(WORDS, D),
            rnn=nn.LSTM(D, D, 2, dropout=0.25, batch_first=True),
            head=lin(),
        ),
        ids(),
        "rnn_input rnn_between rnn_output",
    ),
    "gru, both ways": Case(
        net(
            lstm_lm,
            words=nn.Embedding(WORDS, D),
            rnn=nn.GRU(D, D, 3, dropout=0.25, bidirectional=True),
            head=lin(2 * D),
        ),
        ids(),
        "rnn_input rnn_between rnn_between rnn_output",
    ),
    "lstm behind a residual block": Case(
        net(
            tagger,
            words=nn.Embedding(WORDS, D),
            up=lin(),
            down=lin(),
            rnn=nn.LSTM(D, D, batch_first=True),
            head=lin(),
        ),
        ids(),
        "hidden residual rnn_output",
    ),
    "residual lstm": Case(
        net(residual_lstm, a=nn.LSTM(D, D), b=nn.LSTM(D, D), head=lin()),
        SEQUENCE,
        "rnn_between rnn_output",
    ),
    "locked dropout": Case(
        net(
            locked_lm,
            words=nn.Embedding(WORDS, D),
            rnn=nn.LSTM(D, D, batch_first=True),
            head=lin(),
        ),
        ids(),
        "rnn_input rnn_output",
    ),
    "conv, lstm": Case(
        net(crnn, conv=nn.Conv1d(4, D, 3), rnn=nn.GRU(D, D, batch_first=True), head=lin()),
        data((B, 4, T)),
        "rnn_input rnn_output",
    ),
    "whole channels": Case(
        net(lambda m, x: m.b(m.d(m.a(x).relu())), **CONVS, d=nn.Dropout2d(0.25)),
        IMAGE,
        "channels",
    ),
    "channels, then a linear": Case(
        net(
            lambda m, x: m.head(F.max_pool2d(F.dropout2d(m.a(x), 0.25), 2).relu().flatten(1)),
            **CONVS,
            head=lin(8 * 9),
        ),
        IMAGE,
        "channels",
    ),
    "elements of a map": Case(
        net(lambda m, x: m.b(drop(m.a(x).relu())), **CONVS), IMAGE, "channels"
    ),
    "signals": Case(
        net(conv1d, a=nn.Conv1d(4, 8, 3), b=nn.Conv1d(8, 8, 3), c=lin(8)),
        data((B, 4, 9)),
        "input channels hidden",
    ),
    "wide resnet": Case(lambda: resnet(), IMAGE, "channels channels input"),
    "resnet, channels dropped": Case(
        lambda: resnet(lambda x: F.dropout2d(x, 0.25, True)),
        IMAGE,
        "channels channels_skip channels channels_skip input",
    ),
    "resnet, elements dropped": Case(
        lambda: resnet(drop), IMAGE, "channels channels_skip channels channels_skip input"
    ),
    "stochastic depth": Case(
        lambda: resnet(drop_path), IMAGE, "channels samples channels samples input"
    ),
    "densenet": Case(
        net(
            dense,
            convs=nn.ModuleList(nn.Conv2d(3 + 4 * i, 4, 3, padding=1) for i in range(3)),
            head=lin(15),
        ),
        IMAGE,
        "channels_skip channels_skip channels_skip",
    ),
    "inception": Case(
        net(inception, a=CONVS["a"], b=nn.Conv2d(3, 8, 3), c=CONVS["c"]), IMAGE, "channels"
    ),
    "u-net": Case(
        net(
            unet,
            a=nn.Conv2d(3, 8, 3, padding=1),
            b=nn.Conv2d(8, 8, 3, padding=1),
            c=nn.Conv2d(16, 3, 3, padding=1),
        ),
        IMAGE,
        "channels_skip channels_skip",
    ),
    "group norm": Case(net(group_norm, **CONVS, norm=nn.GroupNorm(2, 8)), IMAGE, "channels"),
    "diffusion": Case(
        net(
            film,
            a=nn.Conv2d(3, 8, 3, padding=1),
            b=nn.Conv2d(8, 8, 3, padding=1),
            stem=nn.Conv2d(3, 8, 1),
            norm=nn.GroupNorm(2, 8),
            time=lin(D, 16),
        ),
        lambda: (torch.randn(B, 3, 8, 8), torch.randn(B, D)),
        "channels",
    ),
    "squeeze and excite": Case(
        net(squeeze_excite, **CONVS, down=lin(8, 4), up=lin(4, 8)), IMAGE, "hidden channels"
    ),
    "vgg": Case(
        net(vgg, conv=nn.Conv2d(3, 8, 3, padding=1), a=lin(128), b=lin(), c=lin()),
        IMAGE,
        "hidden hidden hidden",
    ),
    "text cnn": Case(
        net(
            text_cnn,
            words=nn.Embedding(WORDS, D),
            convs=nn.ModuleList(nn.Conv1d(D, 8, size) for size in (2, 3)),
            head=lin(),
        ),
        ids(),
        "hidden",
    ),
    "spatial dropout of words": Case(
        net(spatial_text, words=nn.Embedding(WORDS, D), conv=nn.Conv1d(D, D, 3), head=lin()),
        ids(),
        "channels hidden",
    ),
    "conformer": Case(
        net(
            conformer_conv,
            norm=nn.LayerNorm(D),
            a=nn.Conv1d(D, 2 * D, 1),
            b=nn.Conv1d(D, D, 3, padding=1, groups=D),
            c=nn.Conv1d(D, D, 1),
            f=lin(),
        ),
        SEQUENCE,
        "residual",
    ),
    "wav2vec": Case(
        net(
            wav2vec,
            extract=nn.Conv1d(2, D, 3, padding=1),
            norm=nn.LayerNorm(D),
            project=lin(),
            positions=nn.Conv1d(D, D, 3, padding=1, groups=4),
            norm2=nn.LayerNorm(D),
            head=lin(),
        ),
        data((B, 2, T)),
        "residual input",
    ),
    "gcn": Case(net(gcn, a=lin(), b=lin()), ADJACENCY, "input hidden"),
    "gcn, neighbours first": Case(
        net(gcn_aggregate_first, a=lin(), b=lin()), ADJACENCY, "input hidden"
    ),
    "graph sage": Case(net(sage, a=lin(), b=lin(), c=lin(), d=lin()), ADJACENCY, "hidden"),
    "gat": Case(
        net(gat, w=lin(D, 2 * D), a=par(2, D), b=par(2, D), head=lin(2 * D)),
        graph,
        "input attention hidden",
    ),
    "gat, dense": Case(
        net(dense_gat, w=lin(), a=par(D, 1), b=par(D, 1)), ADJACENCY, "input attention"
    ),
    "drop connect": Case(net(drop_connect, w=par(D, D), v=par(D, D)), X, "weight hidden"),
    "words dropped whole": Case(
        net(lambda m, x: m.a(F.embedding(x, locked(m.w, 1)).mean(1)), w=par(WORDS, D), a=lin()),
        ids(),
        "weight",
    ),
    "weight norm": Case(net(weight_norm, v=par(D, D), g=par(D, 1), b=lin()), X, "input hidden"),
    "logits": Case(net(lambda m, x: drop(m.a(x)), a=lin()), X, "output"),
    "logits and their loss": Case(
        net(lambda m, x, y: F.cross_entropy(drop(m.a(x)), y), a=lin()),
        lambda: (torch.randn(B, D), torch.randint(D, (B,))),
        "output",
    ),
    "regression": Case(net(regression, a=lin(), b=lin()), data((B, D), (B, D)), "hidden output"),
    "residual to a number": Case(
        net(lambda m, x: (x + drop(m.a(x))).pow(2).mean(), a=lin()), X, "residual"
    ),
    "highway": Case(net(highway, gate=lin(), f=lin(), head=lin()), X, "residual"),
    "masked means": Case(
        net(masked, words=nn.Embedding(WORDS, D), a=lin(), b=lin()),
        lambda: (torch.randint(1, WORDS, (B, T)), torch.ones(B, T)),
        "hidden hidden",
    ),
    "batch norm": Case(net(batch_norm, a=lin(), b=lin(), norm=nn.BatchNorm1d(D)), X, "hidden"),
    "similarity": Case(net(siamese, a=lin()), data((B, D), (B, D)), "other other"),
    "features returned": Case(net(features, a=lin(), b=lin()), X, "hidden"),
    "experts": Case(
        net(experts, router=lin(D, 3), up=par(3, D, D), down=par(3, D, D)), X, "hidden residual"
    ),
    "frozen": Case(net(frozen, a=lin(), w=torch.randn(D, D)), X, "hidden"),
    "mixer": Case(
        net(mixer, norm=nn.LayerNorm(D), a=lin(), b=lin(), c=lin(T, 4), d=lin(4, T)),
        SEQUENCE,
        "hidden residual hidden residual",
    ),
}
