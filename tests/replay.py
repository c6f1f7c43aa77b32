"""Runs a program with the masks that a compiled run of it drew: the reference for exactness.

The rewritten program is right if it equals the dense program with the same masks. The structured
masks are recorded when they are drawn; the ordinary ones that the eager target left are drawn again
here from the same state of the generator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import ardd
from ardd.passes.kept_sets import DRAWS, bits_needed
from ardd.runtime.draw_groups import draw_groups
from ardd.runtime.draw_seeds import draw_seeds
from ardd.runtime.random_bits import bits_like, threshold_of

# name -> the dimensions that share a draw, given the number of dimensions
DROPOUTS: Mapping[Any, Callable[[int], Sequence[int]]] = {
    torch.dropout: lambda rank: (),
    torch.feature_dropout: lambda rank: range(2, rank),
    F.dropout: lambda rank: (),
    F.dropout1d: lambda rank: [rank - 1],
    F.dropout2d: lambda rank: range(2, rank),
    F.dropout3d: lambda rank: range(2, rank),
}

RNNS = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)

_NOT_MARKED = (ardd.Reason.P_IS_ONE, ardd.Reason.HAND_MASK, ardd.Reason.INSIDE_SDPA)

# How far a result may be from the reference, relative to the largest number in it. The same sums
# are taken in another order, over up to a few thousand terms: some 1e-13 and 1e-4 was seen.
RTOL = {torch.float64: 1e-9, torch.float32: 2e-4}
# The gradient of a bias before a normalisation is zero but for rounding: numbers this much smaller
# than the largest gradient of all are as good as zero.
NOISE = 1e-3


class Replay(TorchFunctionMode):
    """Gives every dropout the mask of the compiled run; program order is the order of the sites.

    Args:
        decisions: those on the one graph that was compiled.
        draws: what the run drew, from `ardd.record_masks`; random masks come of the seed.
        seed: the seed before the run.
    """

    def __init__(
        self, decisions: Sequence[ardd.Decision], draws: Sequence[ardd.Draw], seed: int
    ) -> None:
        super().__init__()
        self._decisions = {decision.site: decision for decision in decisions}
        self._kept = {draw.site: draw for draw in draws}
        self.count = 0
        """Dropouts seen so far."""
        torch.manual_seed(seed)
        marked = [d.site for d in decisions if d.reason not in _NOT_MARKED]
        seeds = draw_seeds(len(marked), torch.device("cpu")) if marked else []
        self._seeds = dict(zip(marked, seeds, strict=True))
        for draw in draws:
            pattern = self._decisions[draw.site].pattern
            if pattern == "row":
                continue  # how many groups have each period is not recorded
            *groups, n_kept = draw.kept.shape
            op = draw_groups if groups else DRAWS[pattern]
            sizes = (*groups, draw.n_blocks, n_kept)
            bits = bits_like(self._seeds[draw.site], bits_needed(pattern, sizes))
            kept, _ = op(bits, *sizes, draw.site)
            assert torch.equal(kept, draw.kept)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replaces dropouts, and runs everything else as it is."""
        kwargs = kwargs or {}
        if func in RNNS:
            return self._rnn(func, *args, **kwargs)
        if func is F.scaled_dot_product_attention and kwargs.get("dropout_p"):
            return self._attention(*args, **kwargs)
        if func not in DROPOUTS:
            return func(*args, **kwargs)
        x, p, training, inplace = _arguments(*args, **kwargs)
        if not training or p == 0:
            return x
        mask = self._next_mask(x, DROPOUTS[func](x.dim()))
        return x.mul_(mask) if inplace else x * mask

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Runs attention by torch's own plain maths, with what it dropped."""
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(
                ~attn_mask, -torch.inf
            )
        maths = torch.ops.aten._scaled_dot_product_attention_math
        how = {"scale": scale, "enable_gqa": enable_gqa}
        _, probs = maths(q, k, v, attn_mask, 0.0, is_causal, None, **how)
        kept = self._next_mask(probs, ()) != 0
        y: Tensor = maths(q, k, v, attn_mask, dropout_p, is_causal, kept, **how)[0]
        return y

    def _rnn(
        self,
        func: Any,
        x: Tensor,
        hx: Any,
        params: Sequence[Tensor],
        has_biases: bool,
        layers: int,
        p: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        """Runs an RNN by torch's own layers, one by one, with the masks in between."""
        each, directions = len(params) // layers, 2 if bidirectional else 1
        states = hx if func == torch.lstm else [hx]
        lasts = []
        for layer in range(layers):
            first = tuple(s[layer * directions : (layer + 1) * directions] for s in states)
            x, *last = func(
                x,
                first if func == torch.lstm else first[0],
                params[layer * each : (layer + 1) * each],
                *(has_biases, 1, 0.0, train, bidirectional, batch_first),
            )
            lasts.append(last)
            if train and p and layer < layers - 1:
                steps_first = x.transpose(0, 1) if batch_first else x
                mask = self._next_mask(steps_first, ())
                x = x * (mask.transpose(0, 1) if batch_first else mask)
        return (x, *(torch.cat(of_layers) for of_layers in zip(*lasts, strict=True)))

    def _next_mask(self, x: Tensor, shared: Sequence[int]) -> Tensor:
        site = self.count
        self.count += 1
        return self._mask(x, self._decisions[site], shared)

    def _mask(self, x: Tensor, decision: ardd.Decision, shared: Sequence[int]) -> Tensor:
        sizes = [1 if dim in shared else size for dim, size in enumerate(x.shape)]
        if decision.reason is ardd.Reason.P_IS_ONE:
            return torch.zeros_like(x)
        if not decision.taken:
            bits = bits_like(self._seeds[decision.site], sizes)
            return (bits >= threshold_of(decision.p)).to(x.dtype) / (1 - decision.p)
        if decision.pattern == "row" and decision.site not in self._kept:
            return torch.ones_like(x)  # the plan that was drawn keeps everything
        draw = self._kept[decision.site]
        assert decision.dim is not None
        assert decision.block is not None
        *groups, n_kept = draw.kept.shape
        blocks = torch.zeros(*groups, draw.n_blocks, dtype=x.dtype)
        blocks.scatter_(-1, draw.kept, draw.n_blocks / n_kept)
        features = blocks.repeat_interleave(decision.block, -1)
        view = [-1 if dim == decision.dim else 1 for dim in range(x.dim())]
        if groups:
            features = features.repeat_interleave(len(x) // groups[0], 0)
            view[0] = len(x)
        return features.view(view).expand(sizes)


def _arguments(
    input: Tensor,  # noqa: A002  # as torch names it
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    train: bool | None = None,
) -> tuple[Tensor, float, bool, bool]:
    return input, p, training if train is None else train, inplace


@dataclasses.dataclass
class Run:
    """What a program computed."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]

    def __iter__(self) -> Iterator[tuple[str, Tensor | None]]:
        """Yields every result with a name."""
        yield from ((f"output {number}", x) for number, x in enumerate(self.outputs))
        yield from self.gradients.items()


def run(fn: Callable[..., Any], module: nn.Module, inputs: Sequence[Any]) -> Run:
    """Runs forward, and backward if there is something to differentiate.

    Args:
        fn: what to call: the module or what it was compiled to.
        module: has the parameters.
        inputs: arguments; those that require grad get a gradient.
    """
    wanted: dict[str, Tensor] = {
        name: p for name, p in module.named_parameters() if p.requires_grad
    }
    wanted |= {
        f"input {number}": x
        for number, x in enumerate(inputs)
        if isinstance(x, Tensor) and x.requires_grad
    }
    results = fn(*inputs)
    outputs: list[Tensor] = [results] if isinstance(results, Tensor) else list(results)
    gradients: dict[str, Tensor | None] = {}
    if wanted and torch.is_grad_enabled():
        # Some weights of the sum, the same in every run and unlike each other.
        loss = sum(
            (x * torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).cos().view(x.shape)).sum()
            for x in outputs
            if x.requires_grad
        )
        assert isinstance(loss, Tensor)
        found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        gradients = dict(zip(wanted, found, strict=True))
    return Run([x.detach() for x in outputs], gradients)


def check_exact(
    module: nn.Module,
    inputs: Sequence[Any],
    *,
    seed: int = 0,
    options: Mapping[str, object] | None = None,
    compiled: Callable[..., Any] | None = None,
    rtol: float | None = None,
    **kwargs: Any,
) -> tuple[ardd.Decision, ...]:
    """Checks that a compiled module computes the dense program with the masks that it drew.

    Args:
        module: compiled here unless ``compiled`` is given.
        inputs: its arguments.
        seed: for the run.
        options: added to ``pattern="block", target="eager", strict=True``.
        compiled: what the module was compiled to, as the last thing that was compiled.
        rtol: how far from the reference a result may be, in place of `RTOL`.
        **kwargs: for `torch.compile`.

    Returns:
        The decisions on its dropouts.
    """
    given: dict[str, Any] = {
        "pattern": "block",
        "target": "eager",
        "strict": True,
        **(options or {}),
    }
    if compiled is None:
        compiled = torch.compile(module, backend="ardd", options=given, **kwargs)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    torch.manual_seed(seed)
    with ardd.record_masks() as draws:
        have = run(compiled, module, inputs)
    graphs = ardd.report().graphs
    decisions = graphs[-1].decisions if graphs else ()
    buffers_after = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
    replay = Replay(decisions, draws, seed)
    with replay:
        want = run(module, module, inputs)
    assert replay.count == len(decisions)
    compare(have, want, rtol)
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(buffers_after[name], buffer, msg=name)
    return decisions


def compare(have: Run, want: Run, rtol: float | None = None) -> None:
    """Checks that two runs agree, up to rounding."""
    largest = max(
        (float(g.abs().max()) for g in want.gradients.values() if g is not None and g.numel()),
        default=0.0,
    )
    for (name, a), (_, b) in zip(have, want, strict=True):
        assert (a is None) == (b is None), f"{name}: {a} instead of {b}"
        if a is None or b is None or b.numel() == 0:
            continue
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        error = float((a - b).abs().max())
        scale = max(float(b.abs().max()), largest * NOISE)
        bound = rtol if rtol is not None else RTOL[b.dtype]
        assert error <= bound * scale, f"{name}: off by {error:g} of {scale:g}"
