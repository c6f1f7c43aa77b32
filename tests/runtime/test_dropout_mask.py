"""Tests of the marker op: it is a correct dropout mask by itself, and autograd leaves it alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func

from ardd.runtime.draw_seeds import draw_seeds
from ardd.runtime.dropout_mask import dropout_mask
from ardd.runtime.random_bits import bits_like, threshold_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(("p", "mean"), [(0.5, 1.0), (0.3, 1.0), (0.3, 0.7), (0.9, 0.1)])
def test_zeros_and_mean_are_as_asked(p: float, mean: float) -> None:
    n = 40_000
    mask = dropout_mask(torch.empty(n, dtype=torch.float64), [], p, mean, 0)
    sigma = math.sqrt(p * (1 - p) / n)
    assert abs((mask == 0).double().mean() - p) < 5 * sigma
    assert torch.allclose(mask[mask != 0], torch.tensor(mean / (1 - p), dtype=torch.float64))
    assert abs(mask.mean() - mean) < 5 * sigma * mean / (1 - p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtype_is_that_of_like(dtype: torch.dtype) -> None:
    assert dropout_mask(torch.empty(4, 4, dtype=dtype), [], 0.5, 1.0, 0).dtype == dtype


def test_shared_dims_have_size_one() -> None:
    like = torch.empty(2, 3, 4, 5)
    assert dropout_mask(like, [2, 3], 0.5, 1.0, 0).shape == (2, 3, 1, 1)
    assert dropout_mask(like, [-1], 0.5, 1.0, 0).shape == (2, 3, 4, 1)


def test_strides_of_like_are_kept() -> None:
    like = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert dropout_mask(like, [], 0.5, 1.0, 0).stride() == like.stride()


def test_a_tiny_rate_drops_nothing() -> None:
    assert torch.equal(dropout_mask(torch.empty(99), [], 1e-30, 1.0, 0), torch.ones(99))


def test_a_rate_near_one_drops_nearly_everything() -> None:
    """Of 40,000 at p = 0.9999, 4 stay on average; the scale is 10,000."""
    mask = dropout_mask(torch.empty(40_000), [], 0.9999, 1.0, 0)
    assert mask.count_nonzero() < 4 + 5 * math.sqrt(4)
    torch.testing.assert_close(mask.max(), torch.tensor(1 / (1 - 0.9999)))


@pytest.mark.parametrize("shared_dims", [[], [1]])
def test_a_seed_decides(shared_dims: list[int]) -> None:
    """Element i in row-major order is 0 where its bits are below the threshold of p."""
    like = torch.empty(40, 3, 50)
    first, second = draw_seeds(2, CPU)
    state = torch.get_rng_state()
    mask = dropout_mask(like, shared_dims, 0.3, 0.7, 0, first)
    assert torch.equal(torch.get_rng_state(), state)
    expected = (bits_like(first, mask.shape) >= threshold_of(0.3)).float()
    assert torch.equal(mask, expected)
    assert not torch.equal(dropout_mask(like, shared_dims, 0.3, 0.7, 0, second), mask)


def test_without_a_seed_it_draws_one() -> None:
    state = torch.get_rng_state()
    mask = dropout_mask(torch.empty(40, 50), [], 0.5, 1.0, 0)
    torch.set_rng_state(state)
    (seed,) = draw_seeds(1, CPU)
    assert torch.equal(dropout_mask(torch.empty(40, 50), [], 0.5, 1.0, 0, seed), mask)


def test_the_order_of_memory_changes_no_element() -> None:
    like = torch.empty(2, 3, 4, 5)
    (seed,) = draw_seeds(1, CPU)
    contiguous = dropout_mask(like, [], 0.5, 1.0, 0, seed)
    laid_out = like.to(memory_format=torch.channels_last)
    assert torch.equal(dropout_mask(laid_out, [], 0.5, 1.0, 0, seed), contiguous)
    moved = torch.empty(5, 4, 3, 2).permute(3, 2, 1, 0)
    assert torch.equal(dropout_mask(moved, [], 0.5, 1.0, 0, seed), contiguous)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("shared_dims", [[], [1]])
def test_opcheck(shared_dims: list[int], requires_grad: bool) -> None:
    like = torch.randn(3, 4, requires_grad=requires_grad)
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(dropout_mask, (like, shared_dims, 0.5, 1.0, 0), test_utils=utils)
    given = (like, shared_dims, 0.5, 1.0, 0, draw_seeds(1, CPU)[0])
    torch.library.opcheck(dropout_mask, given, test_utils=utils)


def test_the_mask_never_requires_grad() -> None:
    x = torch.randn(50, requires_grad=True)
    mask = dropout_mask(x, [], 0.5, 1.0, 0)
    assert not mask.requires_grad
    (x * mask).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, mask)


def test_the_joint_graph_draws_once_and_saves_the_mask() -> None:
    """The gradient of x * mask is mask, from the forward that drew it."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    @torch.compile(backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    def f(x: Tensor) -> Tensor:
        return x * torch.ops.ardd.dropout_mask(x, [], 0.5, 1.0, 7)  # type: ignore[no-any-return]

    x = torch.randn(50, requires_grad=True)
    y = f(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, x * grad)
    assert set(grad.tolist()) == {0.0, 2.0}
    draws = [len(gm.graph.find_nodes(op="call_function", target=dropout_mask)) for gm in graphs]
    assert draws == [1, 0]


def test_the_op_is_known_to_be_random() -> None:
    assert torch.Tag.nondeterministic_seeded in dropout_mask.tags


# Under torch.vmap. `None` is an input without a batch dimension.

MEMBERS, INNER = 4, 5


def mask_of(x: Tensor) -> Tensor:
    return dropout_mask(x, [], 0.5, 1.0, 0)  # type: ignore[no-any-return]


def distinct(masks: Tensor) -> int:
    return len({tuple(mask.flatten().tolist()) for mask in masks})


@pytest.mark.parametrize("in_dim", [0, 1, -1, None])
@pytest.mark.parametrize(("randomness", "masks"), [("same", 1), ("different", MEMBERS)])
def test_members_share_a_mask_or_not(in_dim: int | None, randomness: str, masks: int) -> None:
    x = torch.ones(3, 50)
    if in_dim is not None:
        x = torch.ones(MEMBERS, 3, 50).movedim(0, in_dim)
    mapped = torch.vmap(lambda _, x: x * mask_of(x), in_dims=(0, in_dim), randomness=randomness)
    seen = mapped(torch.empty(MEMBERS), x)
    assert seen.shape == (MEMBERS, 3, 50)
    assert distinct(seen) == masks
    assert set(seen.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_members_share_along_the_dimensions_of_one(randomness: str) -> None:
    mapped = torch.vmap(
        lambda x: dropout_mask(x, [-1], 0.5, 1.0, 0), in_dims=1, randomness=randomness
    )
    assert mapped(torch.ones(30, MEMBERS, 50)).shape == (MEMBERS, 30, 1)


@pytest.mark.parametrize("batched", [True, False])
def test_a_dropout_in_error_mode_is_an_error(batched: bool) -> None:
    mapped = torch.vmap(lambda _, x: mask_of(x), in_dims=(0, 0 if batched else None))
    x = torch.ones(MEMBERS, 50) if batched else torch.ones(50)
    with pytest.raises(RuntimeError, match=r"a dropout was called in randomness error mode\."):
        mapped(torch.empty(MEMBERS), x)


@pytest.mark.parametrize("batched", [(0, 0), (0, None), (None, 0), (None, None)])
@pytest.mark.parametrize("outer", ["same", "different"])
@pytest.mark.parametrize("inner", ["same", "different"])
def test_nested_vmaps(batched: tuple[int | None, int | None], outer: str, inner: str) -> None:
    """As many masks as members of the maps that are "different"."""
    outer_dim, inner_dim = batched
    sizes = [
        *([MEMBERS] if outer_dim == 0 else []),
        *([INNER] if inner_dim == 0 else []),
        *(3, 50),
    ]

    def of_one(x: Tensor) -> Tensor:
        mapped = torch.vmap(lambda _, x: mask_of(x), in_dims=(0, inner_dim), randomness=inner)
        return mapped(torch.empty(INNER), x)

    of_all = torch.vmap(lambda _, x: of_one(x), in_dims=(0, outer_dim), randomness=outer)
    seen = of_all(torch.empty(MEMBERS), torch.ones(sizes))
    assert seen.shape == (MEMBERS, INNER, 3, 50)
    n_outer, n_inner = MEMBERS if outer == "different" else 1, INNER if inner == "different" else 1
    assert distinct(seen.flatten(0, 1)) == n_outer * n_inner
    assert distinct(seen[:, 0]) == n_outer
    assert distinct(seen[0]) == n_inner


@pytest.mark.parametrize("mode", ["same error", "error same"])
def test_error_mode_of_either_map_is_an_error(mode: str) -> None:
    outer, inner = mode.split()
    mapped = torch.vmap(torch.vmap(mask_of, randomness=inner), randomness=outer)
    with pytest.raises(RuntimeError, match=r"a dropout was called in randomness error mode\."):
        mapped(torch.ones(MEMBERS, INNER, 50))
