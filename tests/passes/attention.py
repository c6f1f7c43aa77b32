"""What the tests of attention share: rewrite a function's graph, and run it with known masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ardd.passes.mark_dropout import MarkDropout, MarkResult
from ardd.passes.open_multi_head import OpenMultiHead
from ardd.passes.write_out_attention import WriteOutAttention

from .marking import give_masks, graphs_in, text


@dataclasses.dataclass
class Rewritten:
    """A Dynamo graph after all passes over Dynamo graphs, with masks that a run records."""

    gm: fx.GraphModule
    inputs: list[Any]
    result: MarkResult
    changed: bool
    """Whether a pass over attention changed it."""
    masks: list[Tensor]
    calls: list[str]
    """Names of what it calls."""

    def run(self) -> Any:
        self.masks.clear()
        return self.gm(*self.inputs)


def rewrite(f: Callable[..., Any], *args: Any, dynamic: bool = False) -> Rewritten:
    """Compiles ``f`` into one Dynamo graph and rewrites that."""
    seen: list[Rewritten] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        before = text(gm)
        changed = OpenMultiHead().apply(gm).modified
        changed |= WriteOutAttention().apply(gm).modified
        assert changed == (text(gm) != before)
        result = MarkDropout().apply(gm)
        for graph in graphs_in(gm):
            graph.lint()
        nodes = [n for graph in graphs_in(gm) for n in graph.nodes if n.op.startswith("call")]
        calls = [str(getattr(n.target, "__name__", n.target)) for n in nodes]
        seen.append(Rewritten(gm, list(inputs), result, changed, give_masks(gm), calls))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(f, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    (rewritten,) = seen
    return rewritten


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Returns a boolean mask as what is added to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)


def maths(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    p: float,
    causal: bool,
    kept: Tensor,
    **more: Any,
) -> Tensor:
    """Returns torch's own plain attention, with a given mask of the dropout."""
    added = additive(mask, q.dtype)
    math = torch.ops.aten._scaled_dot_product_attention_math
    y: Tensor = math(q, k, v, added, p, causal, kept != 0, **more)[0]
    return y
