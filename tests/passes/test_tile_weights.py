"""Tiles of weights: which products are found, what becomes of them, and what is refused why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.passes.tracing import check_values, mask, site, targets, trace
from torch import Tensor, fx
from torch.nn import functional as F

from ardd.core.decisions import Decision, Reason
from ardd.core.options import Options
from ardd.passes.find_weight_uses import WeightUses, find_weight_uses
from ardd.passes.random_masks import masks_in
from ardd.passes.structure_dropout import StructureDropout
from ardd.passes.tile_weights import tilings
from ardd.runtime.draw_blocks import record_draws
from ardd.runtime.draw_tiles import TileDraw

TILES = Options(pattern="block", block_size=2)
F64 = torch.float64


def data(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64)


def as_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    converted: Tensor = torch.ops.prims.convert_element_type.default(x, dtype)
    return converted


def tile(
    gm: fx.GraphModule, p: float = 0.5, options: Options = TILES, sites: int = 1
) -> tuple[Decision, ...]:
    every = [site(index, p, of_weight=True) for index in range(sites)]
    decisions = StructureDropout(options, every).apply(gm.graph).decisions
    gm.graph.lint()
    check_values(gm.graph)
    gm.recompile()
    return decisions


def check(
    fn: Callable[..., Any], *inputs: Tensor, p: float = 0.5, options: Options = TILES
) -> tuple[list[str], Decision]:
    """Checks that what is rewritten gives what the mask gives that was drawn.

    Args:
        fn: takes a function from the weight to its mask, and the inputs.
        *inputs: its other arguments.
        p: drop rate.
        options: for the pass.

    Returns:
        The ops that are left, and the decision.
    """
    gm = trace(lambda *x: fn(lambda w: mask(w, p), *x), *inputs)
    (decision,) = tile(gm, p, options)
    with record_draws() as draws:
        have = gm(*inputs)
    (draw,) = draws
    assert isinstance(draw, TileDraw)
    want = fn(lambda w: draw.mask(w.shape).to(w.dtype), *inputs)
    assert 0 < len(draw.kept) < draw.n_blocks
    for got, expected in zip(have, want, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert decision.taken
    assert decision.pattern == "tile"
    return targets(gm.graph), decision


def joint(mask_of: Callable[[Tensor], Tensor], x: Tensor, w: Tensor, g: Tensor) -> Any:
    """A linear layer with its two gradients, as AOTAutograd gives it."""
    m = mask_of(w)
    wm = w * m
    return x @ wm.t(), g @ wm, (g.t() @ x) * m


@pytest.mark.parametrize(
    ("p", "period"), [(0.5, 2), (0.75, 4), (0.25, 4), (0.3, 10), (0.7, 10), (0.375, 8)]
)
@pytest.mark.parametrize("swap", [False, True])
def test_a_linear_layer_is_three_products_of_blocks(p: float, period: int, swap: bool) -> None:
    """Forward one ``bmm``, backward two, all of the kept share, for a weight that is no square."""
    rows, columns = (2 * period, 4 * period) if swap else (6 * period, 2 * period)
    options = Options(pattern="block", block_size=2, rate_tolerance=0.001)
    ops, decision = check(
        joint, data(5, columns), data(rows, columns), data(5, rows), p=p, options=options
    )
    assert decision.p_used == pytest.approx(p)
    assert ops.count("aten.bmm") == 3
    assert "aten.mm" not in ops
    assert decision.flops_before == 3 * 2 * 5 * rows * columns
    assert decision.flops_after == round(decision.flops_before * (1 - p))
    # x, dy and the results are put in order once; with one kept class so is the weight.
    one_class = round((1 - p) * period) == 1
    assert ops.count("aten.index.Tensor") == 2 + 2 + (1 if one_class else 2) + 1


@pytest.mark.parametrize("p", [0.5, 0.25])
@pytest.mark.parametrize(
    "fn",
    [
        lambda m, x, w: (x @ (w * m(w)),),
        lambda m, x, w: (x @ (m(w) * w),),
        lambda m, x, w: ((w * m(w)) @ x.t()[: w.shape[1]].contiguous(),),
        lambda m, x, w: ((w * m(w)).t() @ x.t(),),
        lambda m, x, w: (torch.addmm(x[:, :1], x, w * m(w)),),
        lambda m, x, w: (torch.addmm(w[0], x, w * m(w)),),
        lambda m, x, w: (torch.addmm(w[:, :1], w * m(w), x.t()[: w.shape[1]]),),
        lambda m, x, w: ((x.t().contiguous().t() @ (w * m(w))),),
    ],
)
def test_the_weight_may_be_either_operand_and_transposed(fn: Callable[..., Any], p: float) -> None:
    ops, _ = check(fn, data(3, 16), data(16, 8), p=p)
    assert ops.count("aten.bmm") == 1
    assert "aten.mm" not in ops
    assert "aten.addmm" not in ops


def test_a_mask_of_zeros_and_ones_is_not_scaled() -> None:
    """A mask made by hand has mean 1 - p; the kept tiles of it are ones."""
    x, w = data(3, 8), torch.ones(8, 8, dtype=F64)
    gm = trace(lambda x, w: x @ (w * mask(w, 0.5, mean=0.5)), x, w)
    tile(gm)
    with record_draws() as draws:
        y = gm(x, w)
    (draw,) = draws
    assert isinstance(draw, TileDraw)
    torch.testing.assert_close(y, x @ (draw.mask((8, 8)) / 2))


def test_two_uses_share_the_mask_and_the_gradient_is_summed_by_tiles() -> None:
    """A weight dropped once and used in two steps: one cut weight, four products, one expand."""

    def steps(mask_of: Any, x: Tensor, z: Tensor, w: Tensor, g: Tensor) -> Any:
        m = mask_of(w)
        wm = w * m
        dw = (g.t() @ x).t().t() + (z.t() @ g).t()
        return x @ wm.t() + z @ wm.t(), dw * m

    ops, _ = check(steps, data(3, 8), data(3, 8), data(4, 8), data(3, 4))
    assert ops.count("aten.bmm") == 4
    assert "aten.mm" not in ops
    assert ops.count("aten.where.self") == 1


def test_conversions_are_kept_between_mask_and_product() -> None:
    """As under autocast: the masked weight is rounded to bf16, the gradient comes back from it."""

    def amp(mask_of: Any, x: Tensor, w: Tensor, g: Tensor) -> Any:
        m = mask_of(w)
        wm = as_type(w * m, torch.bfloat16)
        return x @ wm.t(), g @ wm, as_type(g.t() @ x, torch.float32) * m

    x, w, g = (torch.randint(-3, 4, s).bfloat16() for s in ((3, 8), (4, 8), (3, 4)))
    ops, _ = check(amp, x, w.float(), g)  # small integers: bf16 is exact
    assert ops.count("aten.bmm") == 3
    assert "aten.mm" not in ops


def test_factors_are_kept_between_mask_and_product() -> None:
    """As a mask made by hand is scaled: w * mask / 0.5, or by the sign."""

    def scaled(mask_of: Any, x: Tensor, w: Tensor, g: Tensor) -> Any:
        m = mask_of(w)
        wm = -(w * m / 0.5 * 3)
        return x @ wm.t(), g @ wm, -(g.t() @ x * 3 / 0.5) * m

    ops, _ = check(scaled, data(3, 8), data(4, 8), data(3, 4))
    assert ops.count("aten.bmm") == 3
    assert "aten.mm" not in ops


def test_a_gradient_that_something_else_adds_to_keeps_both() -> None:
    """A penalty on the masked weight in the same graph: its gradient is cut and added."""

    def penalty(mask_of: Any, x: Tensor, w: Tensor, g: Tensor) -> Any:
        m = mask_of(w)
        wm = w * m
        return x @ wm.t(), (wm * wm).sum(), (g.t() @ x + 2 * wm) * m

    ops, _ = check(penalty, data(3, 8), data(4, 8), data(3, 4))
    assert ops.count("aten.bmm") == 2


def test_a_gradient_that_something_else_reads_stays_whole() -> None:
    """Its norm is wanted too: the product is dense, only the mask of tiles is put on it."""

    def norm(mask_of: Any, x: Tensor, w: Tensor, g: Tensor) -> Any:
        m = mask_of(w)
        dw = g.t() @ x
        return x @ (w * m).t(), dw.norm(), dw * m

    ops, decision = check(norm, data(3, 8), data(4, 8), data(3, 4))
    assert ops.count("aten.bmm") == 1
    assert ops.count("aten.mm") == 1
    assert decision.flops_before == 2 * 3 * 8 * 4


@pytest.mark.parametrize("p", [0.5, 0.75])
def test_what_needs_the_whole_mask_gets_it(p: float) -> None:
    """The masked weight is a result, an embedding and an operand; the mask is a result too."""

    def tied(mask_of: Any, x: Tensor, w: Tensor) -> Any:
        m = mask_of(w)
        wm = w * m
        return x @ wm.t(), wm, F.embedding(torch.tensor([2, 0]), wm), m * 3

    ops, _ = check(tied, data(3, 8), data(16, 8), p=p)
    assert ops.count("aten.bmm") == 1


def test_a_product_of_the_weight_with_itself_is_left() -> None:
    """Both operands are masked: neither can be cut alone."""

    def gram(mask_of: Any, x: Tensor, w: Tensor) -> Any:
        wm = w * mask_of(w)
        return x @ wm.t(), wm @ wm.t()

    ops, _ = check(gram, data(3, 8), data(4, 8))
    assert ops.count("aten.bmm") == 1
    assert ops.count("aten.mm") == 1


def test_draws_stand_first_and_in_the_order_of_the_dropouts() -> None:
    x, w, v = data(3, 8), data(8, 8), data(4, 8)

    def two(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        h = (x @ (w * mask(w, site=0)).t()).relu()
        return h @ (v * mask(v, site=1)).t()

    gm = trace(two, x, w, v)
    assert all(decision.taken for decision in tile(gm, sites=2))
    with record_draws() as draws:
        y = gm(x, w, v)
    assert [draw.site for draw in draws] == [0, 1]
    first, second = (draw.mask(shape) for draw, shape in zip(draws, [(8, 8), (4, 8)], strict=True))  # type: ignore[attr-defined]
    torch.testing.assert_close(y, (x @ (w * first).t()).relu() @ (v * second).t())
    ops = targets(gm.graph)
    assert max(i for i, op in enumerate(ops) if "draw" in op) < ops.index("aten.bmm")


def test_dynamic_dim() -> None:
    """Nothing of the weight has a fixed size."""
    gm = trace(lambda x, w: x @ (w * mask(w)), data(3, 8), data(8, 4), dynamic=True)
    (decision,) = tile(gm)
    assert decision.reason is Reason.DYNAMIC_DIM


def found(fn: Callable[..., Any], *inputs: Tensor) -> WeightUses:
    (node,) = masks_in(trace(fn, *inputs).graph)
    return find_weight_uses(node)


def test_tiles_fit_the_weight_and_the_rate() -> None:
    """Sizes from 32 to 128 that leave every class a tile; rates within the tolerance."""
    every = list(tilings((2048, 784), 0.5, Options()))
    assert {t.tile[0] for t in every} == {32, 64, 128}
    assert {t.tile[1] for t in every} == {49, 56, 98}
    for t in every:
        assert t.shape[0] % (t.tile[0] * t.period) == t.shape[1] % (t.tile[1] * t.period) == 0
        assert abs(t.p_used - 0.5) <= 0.02
    assert {(t.n_kept, t.period) for t in every} == {(1, 2)}
    assert not list(tilings((2048, 31), 0.5, Options()))
    loose = tilings((2048, 2048), 0.7, Options(rate_tolerance=0.05))
    assert {(t.n_kept, t.period) for t in loose} == {(1, 4), (5, 16)}


def refusal(
    fn: Callable[..., Any], *inputs: Tensor, p: float = 0.5, options: Options = TILES
) -> Decision:
    """Checks that the dropout stays random, and returns what is said of it."""
    gm = trace(lambda *x: fn(lambda w: mask(w, p), *x), *inputs)
    (decision,) = tile(gm, p, options)
    assert not decision.taken
    assert (decision.pattern, decision.block, decision.dim) == ("random", None, None)
    assert not any("draw_tiles" in op for op in targets(gm.graph))
    return decision


def linear(mask_of: Any, x: Tensor, w: Tensor) -> Tensor:
    y: Tensor = x @ (w * mask_of(w)).t()
    return y


def test_pattern_random() -> None:
    decision = refusal(linear, data(3, 8), data(4, 8), options=Options(pattern="random"))
    assert decision.reason is Reason.PATTERN_RANDOM


def test_p_rounds_to_zero() -> None:
    assert refusal(linear, data(3, 8), data(4, 8), p=1e-30).reason is Reason.P_ROUNDS_TO_ZERO


def test_not_worth_it() -> None:
    """A product this small costs less than what would shrink it."""
    options = Options(block_size=2)
    decision = refusal(linear, data(3, 8), data(4, 8), options=options)
    assert decision.reason is Reason.NOT_WORTH_IT
    assert "us a step predicted" in decision.detail


def test_shape() -> None:
    """A weight of 10 rows has no two classes of tiles of 32."""
    decision = refusal(linear, data(3, 64), data(10, 64), options=Options(pattern="block"))
    assert decision.reason is Reason.SHAPE
    assert decision.detail == "size 10 x 64, p 0.5, block_size auto"


def test_unused() -> None:
    def nothing(mask_of: Any, x: Tensor, w: Tensor) -> Tensor:
        mask_of(w)
        return x @ w.t()

    assert refusal(nothing, data(3, 8), data(4, 8)).reason is Reason.UNUSED


@pytest.mark.parametrize(
    ("fn", "shape", "detail"),
    [
        (lambda m, x, w: F.conv1d(x[None], w * m(w)), (4, 3, 3), "3 dimensions"),
        (lambda m, x, w: x * (w * m(w))[0], (4, 8), "no product reads it"),
        (lambda m, x, w: F.embedding(torch.tensor([1]), w * m(w)), (4, 8), "no product reads it"),
        (lambda m, x, w: x @ F.normalize(w * m(w)).t(), (4, 8), "no product reads it"),
        (lambda m, x, w: x[:, :2] @ (w * m(w))[:, :2].t(), (4, 8), "no product reads it"),
        (lambda m, x, w: x @ (w * m(w[:1])).t(), (4, 8), "no product reads it"),
        (lambda m, x, w: torch.addmm(w * m(w), x, x.t() @ w), (3, 8), "no product reads it"),
    ],
)
def test_weight_dropout(fn: Callable[..., Any], shape: tuple[int, ...], detail: str) -> None:
    """No matrix product has the masked weight itself for an operand: left random."""
    decision = refusal(fn, data(3, 8), data(*shape))
    assert decision.reason is Reason.WEIGHT_DROPOUT
    assert detail in decision.detail


def test_out_of_fuel_counts_weights_first() -> None:
    """One rewrite is allowed: the second weight stays random, and so does the activation."""

    def three(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        h = x @ (w * mask(w, site=0)).t()
        h = h * mask(h, site=1)
        return h @ (v * mask(v, site=2)).t()

    gm = trace(three, data(3, 8), data(8, 8), data(4, 8))
    sites = [site(0, of_weight=True), site(1), site(2, of_weight=True)]
    options = Options(pattern="block", block_size=2, max_rewrites=1)
    decisions = StructureDropout(options, sites).apply(gm.graph).decisions
    reasons = {decision.site: decision.reason for decision in decisions}
    assert reasons[0] is Reason.STRUCTURED
    assert reasons[2] is Reason.OUT_OF_FUEL
    assert reasons[1] in (Reason.OUT_OF_FUEL, Reason.NO_PRODUCT)
    assert not any("draw_blocks" in op for op in targets(gm.graph))


def test_nested_conversions_and_transpositions_are_followed() -> None:
    x, w = data(3, 8).half(), data(8, 4).float()

    def fn(x: Tensor, w: Tensor) -> Tensor:
        wm = as_type((w * mask(w)).t(), torch.bfloat16)
        return x @ as_type(wm, torch.float16).t()

    uses = found(fn, x, w)
    (use,) = uses.uses
    assert [rest for _, rest in use.steps] == [(torch.bfloat16,), (torch.float16,)]
    assert not use.flipped
    assert not use.contracts_columns
