"""Splitting rows into groups: what becomes of each op, and what is left as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.passes.tracing import check_values, mask, site, targets, trace
from torch import Tensor, fx

from ardd.core.options import Options
from ardd.passes.facts import KeptAxis
from ardd.passes.group_support import GroupSupport, LeadingGroups
from ardd.passes.row_groups import RowGroups, find_row_groups
from ardd.passes.split_rows import split_rows
from ardd.passes.structure_dropout import StructureDropout
from ardd.passes.support import Support
from ardd.runtime.dropout_mask import dropout_mask

X, W = torch.randn(6, 16), torch.randn(16, 32)
GROUPED = Options(pattern="grouped", groups=2, block_size=4)


def analysed(
    fn: Callable[..., Any], *inputs: Tensor, groups: int = 2, axes: tuple[int, ...] = (1,)
) -> tuple[fx.GraphModule, GroupSupport, RowGroups]:
    """Returns a graph with facts about groups of the rows of its masks."""
    gm = trace(fn, *inputs)
    masks = [node for node in gm.graph.nodes if node.target is dropout_mask]
    kept = {
        m: {d: KeptAxis(i, d, m.meta["val"].shape[d], 1, groups) for d in axes}
        for i, m in enumerate(masks)
    }
    rows = find_row_groups(Support(gm.graph, kept).relations, masks, groups)
    return gm, GroupSupport(gm.graph, kept, rows), rows


def split(fn: Callable[..., Any], *inputs: Tensor, **kwargs: Any) -> fx.GraphModule:
    """Splits the rows of all masks, and drops nothing yet."""
    gm, support, rows = analysed(fn, *inputs, **kwargs)
    chosen = {axis for axes in support.masks.values() for axis in axes.values()}
    result = split_rows(gm.graph, support, rows, chosen)
    assert isinstance(result, GroupSupport)
    gm.graph.lint()
    check_values(gm.graph)
    gm.recompile()
    return gm


def linear(x: Tensor, w: Tensor) -> Tensor:
    h = x @ w
    return h * mask(h)


def with_gradient(x: Tensor, w: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """A layer with a bias, dropout, a second layer, and their gradients."""
    h = (x @ w).relu()
    m = mask(h)
    y = h * m
    back = g @ v.t() * m
    back = back * (h > 0)
    return y @ v, y.t() @ g, x.t() @ back, back.sum(0)


INPUTS = (X, W, torch.randn(32, 4), torch.randn(6, 4))


def test_products_become_products_of_groups() -> None:
    """Five products, two of them of weight gradients, whose parts are summed as the bias's are."""
    before = Counter(targets(trace(with_gradient, *INPUTS).graph))
    after = Counter(targets(split(with_gradient, *INPUTS).graph))
    assert (before["aten.mm"], before["aten.bmm"]) == (5, 0)
    assert (after["aten.mm"], after["aten.bmm"]) == (0, 5)
    sums = "aten.sum.dim_IntList"
    assert after[sums] == before[sums] + 3


@pytest.mark.parametrize("groups", [2, 3, 6])
def test_splitting_alone_changes_no_number(groups: int) -> None:
    """Before anything is dropped the graph computes what it did."""

    def without_chance(gm: fx.GraphModule) -> fx.GraphModule:
        for node in gm.graph.find_nodes(op="call_function", target=dropout_mask):
            node.target, node.args = torch.ones_like, node.args[:1]
        gm.recompile()
        return gm

    inputs = tuple(x.double() for x in INPUTS)
    want = without_chance(trace(with_gradient, *inputs))(*inputs)
    have = without_chance(split(with_gradient, *inputs, groups=groups))(*inputs)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_that_is_cut_is_left_untouched() -> None:
    """Nothing is chosen: the graph stays as it was."""
    gm, support, rows = analysed(linear, X, W)
    before = str(gm.graph)
    split_rows(gm.graph, support, rows, ())
    assert str(gm.graph) == before


def test_ops_away_from_the_dropout_stay() -> None:
    """A product that no group cuts keeps its form."""

    def beside(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return linear(x, w), (x @ v).relu()

    ops = targets(split(beside, X, W, torch.randn(16, 7)).graph)
    assert (ops.count("aten.mm"), ops.count("aten.bmm")) == (1, 1)


def rows_of(fn: Callable[..., Any], *inputs: Tensor, groups: int = 2) -> dict[str, Any]:
    """Returns, for each op by name, where its rows are and whether groups can compute it."""
    gm, _, rows = analysed(fn, *inputs, groups=groups)
    return {
        str(node.target).replace("::", ".").removesuffix(".default"): (
            rows.dims.get(node),
            node in rows.ops,
        )
        for node in gm.graph.nodes
        if node.op == "call_function"
    }


def test_rows_are_followed_through_layouts() -> None:
    """Merged with what lies inside of them, and moved elsewhere."""

    def moved(x: Tensor) -> Tensor:
        return (x * mask(x)).view(12, 5).t().unsqueeze(0)

    found = rows_of(moved, torch.randn(4, 3, 5))
    assert found["aten.view"] == (0, True)
    assert found["aten.t"] == (1, True)
    assert found["aten.unsqueeze"] == (2, True)


def test_rows_inside_of_another_dimension_are_no_rows() -> None:
    """[5, 4] -> [20] puts rows of four inside of the five: no group is a run of the twenty."""

    def merged(x: Tensor) -> Tensor:
        return (x * mask(x)).t().reshape(20)

    found = rows_of(merged, torch.randn(4, 5))
    assert found["aten.t"] == (1, True)
    assert not found["aten._unsafe_view"][1]


def test_groups_divide_the_rows_wherever_they_are_merged() -> None:
    """Of 12 tokens 4 groups can be made, but they are those of 3 samples."""

    def merged(x: Tensor) -> Tensor:
        return (x * mask(x)).view(12, 5)

    assert rows_of(merged, torch.randn(3, 4, 5), groups=3)["aten.view"] == (0, True)
    assert rows_of(merged, torch.randn(3, 4, 5), groups=2)["aten.view"] == (0, False)


@pytest.mark.parametrize(
    ("fn", "op"),
    [
        (lambda y, w: y.softmax(0), "aten._softmax"),
        (lambda y, w: y.mean(0), "aten.mean.dim"),
        (lambda y, w: y.cumsum(0), "aten.cumsum"),
        (lambda y, w: y.amax(0), "aten.amax"),
        (lambda y, w: y.flip(0), "aten.flip"),
        (lambda y, w: y[2:], "aten.slice.Tensor"),
        (lambda y, w: y @ y.t(), "aten.mm"),
        (lambda y, w: torch.addmm(w, y, w, beta=2), "aten.addmm"),
        (lambda y, w: torch.cat([y, w]), "aten.cat"),
        (lambda y, w: y[torch.tensor([1, 0, 1])], "aten.index.Tensor"),
    ],
)  # fmt: skip
def test_what_mixes_rows_is_left(fn: Callable[[Tensor, Tensor], Tensor], op: str) -> None:
    """Statistics over the rows, products that contract them with others, orders of them."""
    x = torch.randn(4, 4)
    assert not rows_of(lambda x, w: fn(x * mask(x), w), x, torch.randn(4, 4))[op][1]


def test_sums_over_rows_have_parts() -> None:
    """A sum, and a product that contracts rows: with a gradient, or with neighbours in a graph."""
    found = rows_of(lambda x: (x * mask(x)).sum(0), X)
    assert found["aten.sum.dim_IntList"] == (None, True)
    found = rows_of(lambda x, a: a @ (x * mask(x)), X, torch.randn(3, 6))
    assert found["aten.mm"] == (None, True)


def test_what_groups_sum_to_is_zero_nowhere() -> None:
    """Each part is zero outside its own kept set, their sum is not."""
    gm, support, _ = analysed(lambda x: (x * mask(x)).sum(0), X)
    (total,) = gm.graph.output_node().all_input_nodes
    (product,) = total.all_input_nodes
    assert support.zero(product)[1]
    assert not support.zero(total)[0]


def test_what_has_no_groups_is_not_cut() -> None:
    """Of a rewritten graph: of two operands with the same features one is not by groups."""

    def product(x: Tensor, y: Tensor) -> Tensor:
        return (x * mask(x)) * y.transpose(0, 1)

    gm = trace(product, torch.randn(2, 2, 8), torch.randn(2, 2, 8))
    (m,) = [node for node in gm.graph.nodes if node.target is dropout_mask]
    axes = {m: {2: KeptAxis(0, 1, 8, 1, 2)}}
    nodes = list(gm.graph.nodes)
    (outer,) = gm.graph.output_node().all_input_nodes
    inner, turned = outer.all_input_nodes
    in_step = GroupSupport(gm.graph, axes, LeadingGroups(nodes))
    assert in_step.labels(outer)[2]
    without = LeadingGroups([node for node in nodes if node is not turned])
    apart = GroupSupport(gm.graph, axes, without)
    assert not apart.labels(outer)[2]
    assert apart.labels(inner)[2]


def test_groups_out_of_step_are_not_cut() -> None:
    """``[g, k] @ [k, n]``: the first dimensions of the operands are not the same groups."""
    gm = trace(lambda x, w: (x * mask(x)) @ w, torch.randn(4, 8), torch.randn(8, 5))
    (m,) = [node for node in gm.graph.nodes if node.target is dropout_mask]
    (product,) = gm.graph.output_node().all_input_nodes
    for groups, cut in ((1, True), (4, False)):
        axes = {m: {1: KeptAxis(0, 1, 8, 1, groups)}}
        support = GroupSupport(gm.graph, axes, LeadingGroups(list(gm.graph.nodes)))
        assert bool(support.labels(product)[1]) is cut


def test_what_is_dropped_is_said() -> None:
    gm = trace(linear, X, W)
    (decision,) = StructureDropout(GROUPED, (site(0),)).apply(gm.graph).decisions
    assert (decision.pattern, decision.dim, decision.block) == ("grouped", 1, 4)
    assert (decision.shape, decision.p_used) == ((6, 32), 0.5)
    assert (decision.flops_before, decision.flops_after) == (2 * 6 * 16 * 32, 6 * 16 * 32)
    assert decision.detail.endswith("; 2 groups of rows")
    ops = targets(gm.graph)
    assert ops[0] == "ardd.draw_seeds"
    assert ops.index("ardd.draw_groups") < ops.index("aten.bmm")
