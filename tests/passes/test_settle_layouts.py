"""After a rewrite the fake values of a graph are true again, and its views legal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.passes.tracing import check_values, targets, trace
from torch import Tensor, fx

from ardd.passes.settle_layouts import settled_layouts

aten = torch.ops.aten
X = torch.randn(4, 6)


def transposed(gm: fx.GraphModule) -> fx.GraphModule:
    """Replaces ``relu(x)`` by the same numbers in the order of memory of the transpose."""
    graph = gm.graph
    (relu,) = (node for node in graph.nodes if node.target is aten.relu.default)
    with settled_layouts(graph):
        with graph.inserting_after(relu):
            there = graph.call_function(aten.permute.default, (relu, [1, 0]))
        with graph.inserting_after(there):
            copy = graph.call_function(
                aten.clone.default, (there,), {"memory_format": torch.contiguous_format}
            )
        with graph.inserting_after(copy):
            back = graph.call_function(aten.permute.default, (copy, [1, 0]))
        relu.replace_all_uses_with(back)
        there.replace_input_with(back, relu)
        for node in (there, copy, back):
            node.meta["val"] = relu.meta["val"].t() if node is not back else relu.meta["val"]
    graph.lint()
    gm.recompile()
    return gm


PROGRAMS: dict[str, Callable[[Tensor], Any]] = {
    "a view": lambda x: x.relu().view(24),
    "a view behind a pointwise op": lambda x: (x.relu() * 2).exp().view(2, 12) + 1,
    "one of many results": lambda x: x.relu().split(2)[1].sin().view(12),
    "a view behind an index": lambda x: x.relu().view(4, 2, 3)[:, torch.arange(2)].view(24),
    "a result": lambda x: x.relu(),
    "a result behind a pointwise op": lambda x: (x.relu() + 1, x),
    "what memory holds": lambda x: (x.relu() + 1).as_strided((3, 2), (2, 1)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_values_and_results_stay_what_they_are(name: str) -> None:
    fn = PROGRAMS[name]
    gm = transposed(trace(fn, X))
    check_values(gm.graph)
    have, want = gm(X), fn(X)
    pairs = [(have, want)] if isinstance(have, Tensor) else zip(have, want, strict=True)
    for a, b in pairs:
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


def test_what_reads_memory_that_cannot_be_put_back_fails() -> None:
    """Half of the tensor is read by its place in memory: rather no rewrite than a wrong one."""
    gm = trace(lambda x: x.relu()[:, ::2].as_strided((2, 2), (2, 1)), X)
    with pytest.raises(NotImplementedError, match="reads memory that is laid out anew"):
        transposed(gm)


def test_what_did_not_change_is_not_touched() -> None:
    gm = trace(lambda x: x.relu().t().contiguous().view(24), X)
    before, values = str(gm.graph), [node.meta.get("val") for node in gm.graph.nodes]
    with settled_layouts(gm.graph):
        pass
    assert str(gm.graph) == before
    assert all(a is b.meta.get("val") for a, b in zip(values, gm.graph.nodes, strict=True))


def test_a_view_gets_a_copy_only_where_it_needs_one() -> None:
    gm = transposed(trace(lambda x: x.relu().view(4, 2, 3), X))
    assert targets(gm.graph).count("aten.clone") == 2  # that of the rewrite, and one for the view
    gm = transposed(trace(lambda x: x.relu().view(4, 6, 1) + 1, X))
    assert targets(gm.graph).count("aten.clone") == 2  # ... the result, put back in its order
