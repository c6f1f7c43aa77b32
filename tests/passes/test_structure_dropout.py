"""The pass over the joint graph: when it fires, when it does not, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.passes.tracing import check_values, mask, site, targets, trace
from torch import Tensor, fx
from torch._functorch._aot_autograd.descriptors import PlainAOTInput

import ardd
from ardd.core.decisions import Decision, Reason, Role
from ardd.core.options import Options
from ardd.passes.sites import Site
from ardd.passes.structure_dropout import StructureDropout, StructureResult

BLOCK = Options(pattern="block")
EVERY_ROLE = tuple(role.value for role in Role)
X, W, V = torch.randn(6, 16), torch.randn(16, 32), torch.randn(32, 5)


class Products:
    """Prices products alone, so that all structure pays."""

    name, version = "products", "1"

    def seconds(self, op: ardd.OpCost, device: torch.device) -> float:
        return op.hint(op.flops) if op.kind == "product" else 0.0


ardd.register_cost_model("products", Products)


def apply(gm: fx.GraphModule, *sites: Site, options: Options = BLOCK) -> StructureResult:
    result = StructureDropout(options, sites or (site(0), site(1))).apply(gm.graph)
    gm.graph.lint()
    check_values(gm.graph)
    assert not any("dropout_mask" in name for name in targets(gm.graph))
    return result


def run(
    fn: Callable[..., Any], *inputs: Tensor, options: Options = BLOCK, **kwargs: Any
) -> tuple[list[str], tuple[Decision, ...]]:
    """Returns the ops that the pass leaves, and its decisions."""
    gm = trace(fn, *inputs, **kwargs)
    decisions = apply(gm, options=options).decisions
    return targets(gm.graph), decisions


def refused(decision: Decision) -> Reason:
    assert not decision.taken
    assert (decision.pattern, decision.dim, decision.block) == ("random", None, None)
    return decision.reason


def linear(x: Tensor, w: Tensor) -> Tensor:
    h = x @ w
    return h * mask(h)


def hidden(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    h = x @ w
    return (h * mask(h)) @ v


def test_a_dropped_product_is_cut() -> None:
    ops, (decision,) = run(linear, X, W)
    assert decision.taken
    assert (decision.dim, decision.p_used, decision.shape) == (1, 0.5, (6, 32))
    assert (decision.flops_before, decision.flops_after) == (2 * 6 * 16 * 32, 6 * 16 * 32)
    assert ops.index("ardd.draw_blocks") < ops.index("aten.mm")
    assert "aten.bernoulli" not in ops


def test_a_graph_without_a_dropout_is_untouched() -> None:
    """No mask: not modified, and the text of the graph says the same."""
    gm = trace(lambda x, w: (x @ w).relu(), X, W)
    before = str(gm.graph)
    assert apply(gm) == StructureResult(modified=False)
    assert str(gm.graph) == before


def test_no_product() -> None:
    """A softmax reads every feature: nothing to leave out."""
    ops, (decision,) = run(lambda x: (x * mask(x)).softmax(-1), X)
    assert refused(decision) is Reason.NO_PRODUCT
    assert "aten.ge.Scalar" in ops
    assert "ardd.draw_blocks" not in ops


def test_no_product_with_a_weight() -> None:
    """Attention contracts tokens with values, which are no weight: tokens are no features."""

    def attend(x: Tensor, w: Tensor) -> Tensor:
        values = x @ w
        probabilities = (values @ values.t()).softmax(-1)
        return (probabilities * mask(probabilities)) @ values

    _, (decision,) = run(attend, X, W)
    assert refused(decision) is Reason.NO_PRODUCT


@pytest.mark.parametrize(
    "cut",
    [
        lambda w: w.chunk(2)[0],
        lambda w: w.split([32, 32])[1],
        lambda w: w.view(2, 32, 16).unbind()[1],
        lambda w: w[:32],
        lambda w: w * mask(w, 0.7, 1),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_a_weight_may_be_cut_from_a_parameter(cut: Callable[[Tensor], Tensor], known: bool) -> None:
    """However it is cut, it depends on the parameter alone."""
    gm = trace(lambda x, w: (x * mask(x)) @ cut(w).t(), X, torch.randn(64, 16))
    sites = (site(0), site(1, 0.7, of_weight=True))
    if known:
        for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
            node.meta["desc"] = PlainAOTInput(index)
    result = StructureDropout(BLOCK, sites, parameters=(1,)).apply(gm.graph)
    assert result.decisions[0].taken
    assert result.decisions[0].dim == 1


def test_shape() -> None:
    """Of 7 features none can be dropped at 0.5: 3/7 and 4/7 are both too far."""
    _, (decision,) = run(linear, X, torch.randn(16, 7))
    assert refused(decision) is Reason.SHAPE
    assert decision.detail == "size 7, p 0.5, block_size auto"


def test_shape_for_a_block_size() -> None:
    """32 features are not made of blocks of 5."""
    _, (decision,) = run(linear, X, W, options=Options(pattern="block", block_size=5))
    assert refused(decision) is Reason.SHAPE


def test_dynamic_dim() -> None:
    """Nothing of x has a fixed size."""
    _, (decision,) = run(linear, X, W, dynamic=True)
    assert refused(decision) is Reason.DYNAMIC_DIM


def test_shape_of_one_number() -> None:
    """A mask of one number is one draw: there are no blocks of it."""
    _, (decision,) = run(linear, torch.randn(1, 1), torch.randn(1, 7))
    assert refused(decision) is Reason.SHAPE


def test_conflict() -> None:
    """Two dropouts of the same features, which cannot be cut in two ways: one stays random."""

    def twice(x: Tensor, w: Tensor) -> Tensor:
        h = x @ w
        h = h * mask(h, site=0)
        return h * mask(h, site=1)

    _, decisions = run(twice, X, W)
    taken, left = sorted(decisions, key=lambda decision: not decision.taken)
    assert taken.taken
    assert refused(left) is Reason.CONFLICT
    assert left.detail == f"dropout {taken.site}"


def test_conflict_names_the_row_of_the_report() -> None:
    """Rows that are settled elsewhere leave no masks here, but count."""

    def twice(x: Tensor, w: Tensor) -> Tensor:
        h = x @ w
        h = h * mask(h, site=3)
        return h * mask(h, site=7)

    decisions = apply(trace(twice, X, W), site(3), site(7)).decisions
    taken, left = sorted(decisions, key=lambda decision: not decision.taken)
    assert refused(left) is Reason.CONFLICT
    assert {taken.site, left.site} == {3, 7}
    assert left.detail == f"dropout {taken.site}"


def heads(x: Tensor, w: Tensor, n_heads: int, features: int) -> Tensor:
    """Drops [batch, heads, tokens, features] before the projection of them all."""
    h = x.view(2, 3, n_heads, features).transpose(1, 2)
    h = h * mask(h)
    return h.transpose(1, 2).reshape(6, n_heads * features) @ w


@pytest.mark.parametrize("block_size", ["auto", 1])
@pytest.mark.parametrize("pattern", ["block", "auto"])
@pytest.mark.parametrize(("n_heads", "features", "dim"), [(12, 64, 3), (64, 12, 1), (15, 20, 3)])
def test_few_slices_are_not_dropped_whole(
    n_heads: int, features: int, dim: int, pattern: Any, block_size: Any
) -> None:
    """A head of 64 features is no feature: of 12 heads none is left out for the whole batch."""
    x, w = torch.randn(6, n_heads * features), torch.randn(n_heads * features, 2048)
    options = Options(
        pattern=pattern, block_size=block_size, cost_model="products", structure=EVERY_ROLE
    )
    _, (decision,) = run(lambda x, w: heads(x, w, n_heads, features), x, w, options=options)
    assert (decision.taken, decision.dim) == (True, dim)


@pytest.mark.parametrize("pattern", ["block", "window", "row", "auto"])
def test_too_few_slices(pattern: Any) -> None:
    """12 heads of 8 features: neither is enough to choose from."""
    x, w = torch.randn(6, 96), torch.randn(96, 2048)
    options = Options(pattern=pattern, cost_model="products", structure=EVERY_ROLE)
    _, (decision,) = run(lambda x, w: heads(x, w, 12, 8), x, w, options=options)
    assert refused(decision) is Reason.SHAPE
    assert "at least 16 slices" in decision.detail


@pytest.mark.parametrize(("size", "taken"), [(4, False), (6, False), (8, True)])
def test_auto_wants_as_many_units_as_blocks(size: int, taken: bool) -> None:
    """Single features too: of 4, half has 6 masks."""
    options = Options(cost_model="products", structure=EVERY_ROLE)
    _, (decision,) = run(linear, X, torch.randn(16, size), options=options)
    assert decision.taken == taken
    if not taken:
        assert refused(decision) is Reason.SHAPE
    assert run(linear, X, torch.randn(16, size))[1][0].taken


def test_p_rounds_to_zero() -> None:
    """1 - 1e-30 is 1 in float32: nothing is ever dropped, so nothing is drawn."""
    ops, (decision,) = run(lambda x, w: (x @ w) * mask(x @ w, 1e-30), X, W)
    assert refused(decision) is Reason.P_ROUNDS_TO_ZERO
    assert not any("rand" in op or "draw" in op for op in ops)


def test_pattern_random() -> None:
    """The user asks for ordinary masks."""
    ops, (decision,) = run(linear, X, W, options=Options(pattern="random"))
    assert refused(decision) is Reason.PATTERN_RANDOM
    assert "aten.ge.Scalar" in ops


def test_out_of_fuel() -> None:
    """One rewrite is allowed: the second dropout stays random."""

    def two(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        h = x @ w
        y = (h * mask(h, site=0)) @ v
        return y * mask(y, site=1)

    options = Options(pattern="block", max_rewrites=1)
    _, decisions = run(two, X, W, torch.randn(32, 16), options=options)
    assert [decision.taken for decision in decisions] == [True, False]
    assert refused(decisions[1]) is Reason.OUT_OF_FUEL


def test_weight_dropout() -> None:
    """What is dropped is a weight that no product reads as it is: left random."""
    gm = trace(lambda x, w: x @ (w * mask(w)).relu(), X, W)
    (decision,) = apply(gm, site(of_weight=True)).decisions
    assert refused(decision) is Reason.WEIGHT_DROPOUT


def test_unused() -> None:
    """Nothing reads the mask: it goes."""
    gm = trace(linear, X, W)
    (product,) = (node for node in gm.graph.nodes if str(node.target) == "aten.mul.Tensor")
    product.replace_all_uses_with(product.args[0])
    gm.graph.erase_node(product)
    (decision,) = apply(gm).decisions
    assert refused(decision) is Reason.UNUSED
    assert targets(gm.graph) == ["aten.mm"]


def test_not_worth_it() -> None:
    """A product this small costs less than the gather that would shrink it."""
    _, (decision,) = run(hidden, X, W, V, options=Options())
    assert decision.role is Role.HIDDEN
    assert refused(decision) is Reason.NOT_WORTH_IT
    assert decision.detail


def test_quality() -> None:
    """No product reads what is dropped: with a mask that samples share it trains worse."""
    ops, (decision,) = run(linear, X, W, options=Options())
    assert decision.role is Role.OUTPUT
    assert refused(decision) is Reason.QUALITY
    assert "ardd.draw_blocks" not in ops


def test_quality_is_asked_of_auto_alone() -> None:
    """Whoever names a pattern gets it, whatever the role."""
    _, (decision,) = run(linear, X, W)
    assert decision.role is Role.OUTPUT
    assert decision.reason is Reason.STRUCTURED


def test_not_chosen() -> None:
    """The user names roles, and this is none of them."""
    options = Options(pattern="block", structure=("hidden",))
    ops, (decision,) = run(linear, X, W, options=options)
    assert refused(decision) is Reason.NOT_CHOSEN
    assert "ardd.draw_blocks" not in ops
    _, (decision,) = run(hidden, X, W, V, options=options)
    assert decision.reason is Reason.STRUCTURED


def test_no_product_is_said_first() -> None:
    """What no product could be shrunk for is not a matter of quality or of choice."""
    for options in (Options(), Options(pattern="block", structure=("hidden",))):
        _, (decision,) = run(lambda x: (x * mask(x)).softmax(-1), X, options=options)
        assert refused(decision) is Reason.NO_PRODUCT


def test_fallback_random() -> None:
    """The masks are those of eager mode: auto structures nothing, a pattern still does."""
    with torch._inductor.config.patch(fallback_random=True):
        ops, (decision,) = run(hidden, X, W, V, options=Options())
        assert refused(decision) is Reason.FALLBACK_RANDOM
        assert "aten.bernoulli.p" in ops
        _, (decision,) = run(hidden, X, W, V)
        assert decision.reason is Reason.STRUCTURED


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_stay(dtype: torch.dtype) -> None:
    gm = trace(linear, X.to(dtype), W.to(dtype))
    apply(gm)
    (result,) = gm.graph.output_node().all_input_nodes
    assert result.meta["val"].dtype == dtype
