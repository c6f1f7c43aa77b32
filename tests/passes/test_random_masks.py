"""Masks that stay random become a comparison of bits that follow from a seed and a place."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tests.passes.tracing import check_values, mask, targets, trace
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx
from torch.nn import functional as F

from ardd.passes.random_masks import SMALLEST_RATE, lower_random_masks
from ardd.runtime.draw_seeds import draw_seeds
from ardd.runtime.dropout_mask import scale_of
from ardd.runtime.random_bits import bits_at, bits_like, run, threshold_of

CPU = torch.device("cpu")
X = torch.randn(400, 50)
NARROW = (torch.bfloat16, torch.float16)


def lowered(gm: fx.GraphModule) -> list[str]:
    lower_random_masks(gm.graph)
    gm.graph.lint()
    gm.recompile()
    check_values(gm.graph)
    return targets(gm.graph)


def inductor(gm: fx.GraphModule, *inputs: Tensor) -> Callable[..., Any]:
    """Compiles a lowered graph by Inductor; its results are in a list."""
    (output,) = gm.graph.find_nodes(op="output")
    if not isinstance(output.args[0], (tuple, list)):
        output.args = ([output.args[0]],)
        gm.recompile()
    with torch.no_grad():
        compiled: Any = compile_fx(gm, list(inputs))
    return compiled  # type: ignore[no-any-return]


def kept(sizes: tuple[int, ...], p: float) -> Tensor:
    """Draws a seed, as a graph with one mask does, and returns what it keeps: bool of ``sizes``."""
    return bits_like(draw_seeds(1, CPU)[0], sizes) >= threshold_of(p)


def from_one_state(*draws: Callable[[], Any]) -> list[Any]:
    """Calls each from the same state of the generator."""
    state = torch.get_rng_state()
    results = []
    for drawn in draws:
        torch.set_rng_state(state)
        results.append(drawn())
    return results


ROUND = ["__rshift__.Scalar", "bitwise_and.Scalar", "bitwise_xor.Tensor", "mul.Tensor"]
HASH = ["bitwise_xor.Tensor", *ROUND, "bitwise_xor.Tensor", *ROUND, *ROUND, *ROUND[:3]]
CHOICE = ["view", "ge.Scalar", "scalar_tensor", "scalar_tensor", "where.self"]


def test_the_form() -> None:
    """A seed, the indices, the hash, and a choice of two numbers: all but the seed fuses."""
    gm = trace(lambda x: x * mask(x, 0.25), X)
    keys = ["aten.select.int"] * 2
    of_hash = [f"aten.{name}" for name in [*HASH, *CHOICE, "mul.Tensor"]]
    assert lowered(gm) == ["ardd.draw_seeds", "aten.select.int", "prims.iota", *keys, *of_hash]
    *_, greater, scale, zero, chosen, product, _ = gm.graph.nodes
    x = next(iter(gm.graph.nodes))
    assert greater.args[1] == threshold_of(0.25) == -(2**30)
    assert (scale.args, zero.args) == ((1 / 0.75,), (0.0,))
    assert chosen.args == (greater, scale, zero)
    assert product.args == (x, chosen)


def test_the_form_by_lanes() -> None:
    """Rows of 64 elements are a number and a constant each: iota twice, and an xor more."""
    gm = trace(lambda x: x * mask(x), torch.randn(40, 64))
    names = lowered(gm)
    assert names.count("prims.iota") == 2
    assert names.count("aten.bitwise_xor.Tensor") == HASH.count("bitwise_xor.Tensor") + 1


def test_the_form_elsewhere() -> None:
    """A mask that is no factor of a plain product is the same numbers."""
    names = lowered(trace(lambda x: x + mask(x), X))
    assert names[-2:] == ["aten.where.self", "aten.add.Tensor"]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("mean", [1.0, None])
def test_values(p: float, mean: float | None) -> None:
    mean = 1 - p if mean is None else mean
    gm = trace(lambda x: x * mask(x, p, mean=mean), X)
    lowered(gm)
    y = gm(torch.ones_like(X))
    torch.testing.assert_close(y.unique(), torch.tensor([0, mean / (1 - p)]))
    assert abs(float((y > 0).float().mean()) - (1 - p)) < 5 * (p * (1 - p) / X.numel()) ** 0.5


@pytest.mark.parametrize("q", [1 / 3, 0.7, 0.1, 1e-6, 1e-9, 1 - 1e-9])
def test_ones_are_ones(q: float) -> None:
    """A mask of zeros and ones has no other number, however its rate was rounded."""
    assert scale_of(float(f"{1 - q:.12g}"), q) == 1.0
    assert scale_of(1 - q, q) == 1.0
    assert scale_of(1 - (1 - q), 1 - q) == 1.0


@pytest.mark.parametrize("p", [2e-10, 1e-6, 0.1, 1 / 3, 0.5, 1 - 1e-9])
def test_the_scale_is_exact(p: float) -> None:
    assert scale_of(p, 1.0) == 1.0 / (1.0 - p)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("shared", [(), (0,), (1,), (-1,), (0, 1)])
def test_the_mask_is_that_of_the_op(p: float, shared: tuple[int, ...]) -> None:
    """Run as it is, the marker draws what the lowered graph draws, from the same state."""

    def fn(x: Tensor) -> Tensor:
        return x * mask(x, p, shared=shared)

    gm = trace(fn, X)
    lowered(gm)
    y, reference, after_y, after = from_one_state(
        lambda: gm(X),
        lambda: fn(X),
        lambda: (gm(X), torch.rand(3))[1],
        lambda: (fn(X), torch.rand(3))[1],
    )
    assert torch.equal(y, reference)
    assert torch.equal(after_y, after)  # and it leaves the generator in the same state


SIZES = [(64,), (40, 64), (3, 5, 128), (4, 16), (32, 10), (400, 50), (7,), (1,), (3, 1, 5), (0, 4)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_all_forms_give_the_same_bits(sizes: tuple[int, ...], dynamic: bool) -> None:
    """By lanes where 64 divides the elements, one by one, and wide where sizes are unknown."""
    x = torch.ones(sizes)
    gm = trace(lambda x: x * mask(x), x, dynamic=dynamic)
    lowered(gm)
    y, reference = from_one_state(lambda: gm(x), lambda: kept(sizes, 0.5))
    assert torch.equal(y, reference * 2.0)


def test_a_dynamic_graph_draws_the_same_for_other_sizes() -> None:
    gm = trace(lambda x: x * mask(x), torch.ones(5, 7), dynamic=True)
    lowered(gm)
    for sizes in ((3, 4), (64, 64), (2, 1000), (1000, 2)):
        x = torch.ones(sizes)
        y, reference = from_one_state(partial(gm, x), partial(kept, sizes, 0.5))
        assert torch.equal(y, reference * 2.0)


def test_a_number_has_a_mask_too() -> None:
    gm = trace(lambda x: x * mask(x), torch.ones(()))
    lowered(gm)
    y, reference = from_one_state(lambda: gm(torch.ones(())), lambda: kept((), 0.5))
    assert torch.equal(y, reference * 2.0)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("sizes", [(2, 3, 4, 5), (2, 64, 8, 8)])
def test_the_order_of_memory_changes_no_element(sizes: tuple[int, ...], dynamic: bool) -> None:
    """Channels last and contiguous: elements count in row-major order in both."""
    plain = torch.ones(sizes)
    masks = []
    for x in (plain, plain.to(memory_format=torch.channels_last)):
        gm = trace(lambda x: x * mask(x), x, dynamic=dynamic)
        lowered(gm)
        masks.append(partial(gm, x))
    contiguous, last, reference = from_one_state(*masks, lambda: kept(sizes, 0.5))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(contiguous, last)
    assert torch.equal(contiguous, reference * 2.0)


def test_a_draw_is_shared_along_the_dimensions_that_share_it() -> None:
    gm = trace(lambda x: x * mask(x, shared=(1,)), X)
    lowered(gm)
    y = gm(torch.ones_like(X))
    assert (y == y[:, :1]).all()
    assert 0 < y[:, 0].mean() < 2


def test_forward_and_backward_share_the_draw() -> None:
    def both(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        drawn = mask(x)
        return x * drawn, g * drawn

    gm = trace(both, X, X)
    names = lowered(gm)
    assert names.count("ardd.draw_seeds") == names.count("prims.iota") == 1
    y, grad = gm(torch.ones_like(X), torch.ones_like(X))
    assert torch.equal(y, grad)


def test_masks_of_one_graph_have_seeds_of_their_own() -> None:
    """One draw for all of them, in their order; one that is not used takes none."""

    def thrice(x: Tensor) -> tuple[Tensor, Tensor]:
        first, _, last = x * mask(x, site=0), mask(x, site=1), x * mask(x, site=2)
        return first, last

    gm = trace(thrice, X)
    assert lowered(gm).count("ardd.draw_seeds") == 1
    seen, seeds = from_one_state(lambda: gm(torch.ones_like(X)), lambda: draw_seeds(2, CPU))
    for y, seed in zip(seen, seeds, strict=True):
        assert torch.equal(y, (bits_like(seed, X.shape) >= 0) * 2.0)


@pytest.mark.parametrize("p", [1e-30, SMALLEST_RATE])
def test_a_rate_of_nearly_zero_draws_nothing(p: float) -> None:
    gm = trace(lambda x: x * mask(x, p), X)
    assert lowered(gm) == ["aten.full", "aten.mul.Tensor"]
    assert torch.equal(gm(X), X)


def test_the_smallest_rate_that_draws() -> None:
    """It rounds to 2**-32, of all words drops the least, and its scale in float32 is 1."""
    gm = trace(lambda x: x * mask(x, SMALLEST_RATE * 1.01), X)
    assert "ardd.draw_seeds" in lowered(gm)
    (greater,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.ge.Scalar)
    assert greater.args[1] == 1 - 2**31
    assert torch.equal(gm(X), X)


def test_a_rate_close_to_one() -> None:
    """At p = 1 - 2**-12 five in 20,000 stay on average, times 4,096."""
    p = 1 - 2.0**-12
    gm = trace(lambda x: x * mask(x, p), X)
    lowered(gm)
    y, reference = from_one_state(lambda: gm(torch.ones_like(X)), lambda: kept((400, 50), p))
    assert torch.equal(y, reference * 4096.0)
    assert y.count_nonzero() < 5 + 5 * math.sqrt(5)


def test_a_factor_of_another_type() -> None:
    """bf16 times a float32 mask is float32, however the product is written."""
    gm = trace(lambda x: x.bfloat16() * mask(x, 0.9), X)
    lowered(gm)
    y = gm(torch.ones_like(X))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.unique(), torch.tensor([0, 1 / (1 - 0.9)]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_products_round_once(dtype: torch.dtype, p: float) -> None:
    """Narrow numbers are multiplied in float32 by a scale that is not rounded to their type."""
    x = X.to(dtype)
    gm = trace(lambda x: x * mask(x, p), x)
    lowered(gm)
    y, keep = from_one_state(lambda: gm(x), lambda: kept((400, 50), p))
    wide = x.float() if dtype in NARROW else x
    expected = wide * (keep.to(wide.dtype) * (1 / (1 - p)))
    assert y.dtype == dtype
    assert torch.equal(y, expected.to(dtype))


def test_under_autocast() -> None:
    """The product is bfloat16, and so is what is dropped of it."""
    weight = torch.randn(30, 50)

    def fn(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = F.linear(x, weight)
            return y, y * mask(y, 0.3)

    gm = trace(fn, X, weight)
    lowered(gm)
    (y, dropped), keep = from_one_state(lambda: gm(X, weight), lambda: kept((400, 30), 0.3))
    assert dropped.dtype == torch.bfloat16
    assert torch.equal(dropped, (y.float() * torch.where(keep, 1 / 0.7, 0.0)).bfloat16())


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_order_of_memory_is_kept(dynamic: bool) -> None:
    """The draw is contiguous and x is not: a view of their product stays legal."""
    gm = trace(lambda x: (x.t() * mask(x.t())).t().view(-1), X, dynamic=dynamic)
    lowered(gm)
    assert gm(torch.ones_like(X)).shape == (X.numel(),)


def test_a_graph_without_masks_is_untouched() -> None:
    gm = trace(lambda x: x.relu(), X)
    before = str(gm.graph)
    lower_random_masks(gm.graph)
    assert str(gm.graph) == before


# Through Inductor. Its C++ has vectors and, for what is left of a row, scalar code, in which the
# compiler may do with a signed product whatever is right where it does not overflow.


@pytest.mark.parametrize("p", [0.5, 0.3])
def test_inductor_at_every_size_up_to_200(p: float) -> None:
    gm = trace(lambda x: x * mask(x, p), torch.ones(100), dynamic=True)
    lowered(gm)
    compiled = torch.compile(gm, dynamic=True, fullgraph=True)
    compiled(torch.ones(100))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in range(2, 201):  # a size of 1 is compiled for itself, see below
            x = torch.ones(n)
            y, keep = from_one_state(partial(compiled, x), partial(kept, (n,), p))
            assert torch.equal(y != 0, keep), n


ODD = [(1,), (3,), (8,), (9,), (17,), (63,), (65,), (127,), (3, 7), (5, 17), (13, 65), (9, 100)]


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.5, 0.3])
def test_inductor_at_fixed_sizes(p: float) -> None:
    """Of no multiple of the length of a vector, and of those that are counted by lanes."""
    inputs = [torch.ones(sizes) for sizes in [*ODD, (64,), (3, 64), (2, 320), (32, 6)]]

    def fn(*inputs: Tensor) -> list[Tensor]:
        return [x * mask(x, p, site) for site, x in enumerate(inputs)]

    gm = trace(fn, *inputs)
    lowered(gm)
    compiled = inductor(gm, *inputs)
    seen, seeds = from_one_state(lambda: compiled(*inputs), lambda: draw_seeds(len(inputs), CPU))
    for y, seed in zip(seen, seeds, strict=True):
        assert torch.equal(y != 0, bits_like(seed, y.shape) >= threshold_of(p)), y.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_inductor_with_other_types(dtype: torch.dtype) -> None:
    """In channels last, too: a row of memory is no row of indices."""
    x = torch.ones(2, 3, 5, 7, dtype=dtype).to(memory_format=torch.channels_last)
    gm = trace(lambda x: x * mask(x, 0.3), x)
    lowered(gm)
    compiled = inductor(gm, x)
    (y,), keep = from_one_state(lambda: compiled(x), lambda: kept((2, 3, 5, 7), 0.3))
    assert torch.equal(y, keep.to(dtype) * (1 / 0.7))


@pytest.mark.slow
@pytest.mark.parametrize("columns", [2**15 + 1, 2**15 + 64])
def test_more_elements_than_a_word_counts(columns: int) -> None:
    """Of 4.3 billion, only some rows are computed: odd rows, and rows that are counted by lanes.

    The rows at 2**31 and 2**32 are those of the definition: the high word of an index is that of
    its row's start.
    """
    n_rows = 2**17 + 3
    assert n_rows * columns > 2**32
    at = [2**31 // columns, 2**32 // columns]
    rows = torch.tensor([0, n_rows - 1, *at, *(row + 1 for row in at), *(row - 1 for row in at)])

    def fn(one: Tensor, rows: Tensor) -> Tensor:
        x = one.expand(n_rows, columns)
        return (x * mask(x, 0.5))[rows]

    gm = trace(fn, torch.ones(1, 1), rows)
    lowered(gm)
    compiled = inductor(gm, torch.ones(1, 1), rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (seen,), (seed,) = from_one_state(
        lambda: compiled(torch.ones(1, 1), rows), lambda: draw_seeds(1, CPU)
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB: one in 16
    starts = rows.unsqueeze(1) * columns
    low = (starts + torch.arange(columns)).to(torch.int32)
    keep = bits_at(run, low, seed, (starts >> 32).to(torch.int32)) >= 0
    assert torch.equal(seen, keep * 2.0)
    high = (starts + torch.arange(columns)) >> 32
    assert sorted(high.unique().tolist()) == [0, 1]
