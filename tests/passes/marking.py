"""What the tests of marking share: mark a function's graph, look into it, run it on given masks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ardd.core.decisions import Decision
from ardd.passes.mark_dropout import MarkDropout, MarkResult
from ardd.passes.sites import Site
from ardd.runtime.dropout_mask import dropout_mask


@dataclasses.dataclass
class Marked:
    """A Dynamo graph after the pass, and what the pass said."""

    gm: fx.GraphModule
    inputs: list[Any]
    before: str
    result: MarkResult

    @property
    def site(self) -> Site:
        (site,) = self.result.sites
        return site

    @property
    def decision(self) -> Decision:
        (decision,) = self.result.decisions
        return decision

    def markers(self) -> list[fx.Node]:
        return [n for g in graphs_in(self.gm) for n in g.nodes if n.target is dropout_mask]

    def run(self) -> Any:
        return self.gm(*self.inputs)[0]


def graphs_in(gm: fx.GraphModule) -> Iterator[fx.Graph]:
    return (module.graph for module in gm.modules() if isinstance(module, fx.GraphModule))


def text(gm: fx.GraphModule) -> str:
    return "\n".join(str(graph) for graph in graphs_in(gm))


def mark(f: Callable[..., Any], *args: Any, dynamic: bool = False) -> Marked:
    """Compiles ``f`` into one Dynamo graph, marks it, and runs the outcome once."""
    seen: list[Marked] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        before = text(gm)
        result = MarkDropout().apply(gm)
        assert result.modified == (text(gm) != before) == bool(result.sites)
        seen.append(Marked(gm, list(inputs), before, result))
        return gm

    torch.compile(f, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    (marked,) = seen
    numbers = [found.index for found in marked.result.sites]
    numbers += [found.site for found in marked.result.decisions]
    assert sorted(numbers) == list(range(len(numbers)))
    return marked


def random_calls(gm: fx.GraphModule) -> list[str]:
    """Returns the random ops called but for markers."""
    nodes = [n for g in graphs_in(gm) for n in g.nodes if n.target is not dropout_mask]
    called = [n for n in nodes if n.op in ("call_function", "call_method")]
    names = [getattr(n.target, "__name__", str(n.target)) for n in called]
    return [name for name in names if re.search("dropout|bernoulli|uniform|rand", name)]


def give_masks(gm: fx.GraphModule) -> list[Tensor]:
    """Lets markers return fixed zeros and ones; the list receives them when the graph runs."""
    masks: list[Tensor] = []

    def given(like: Tensor, shared: list[int], p: float, mean: float, site: int) -> Tensor:
        mask = dropout_mask(like, shared, p, mean, site)
        ones = (torch.arange(mask.numel()) * 7 + site) % 3 < 2
        masks.append(ones.view(mask.shape).to(mask.dtype) * (mean / (1 - p)))
        return masks[-1].clone()  # the graph may write to it

    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.find_nodes(op="call_function", target=dropout_mask):
                node.target = given
            module.recompile()
    return masks


def data(*shape: int) -> Tensor:
    return torch.rand(shape) + 0.5
