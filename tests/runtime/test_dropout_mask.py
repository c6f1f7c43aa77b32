"""Tests of the marker op: it is a correct dropout mask by itself, and autograd leaves it alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func

from ardd.runtime.dropout_mask import dropout_mask


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


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("shared_dims", [[], [1]])
def test_opcheck(shared_dims: list[int], requires_grad: bool) -> None:
    like = torch.randn(3, 4, requires_grad=requires_grad)
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(dropout_mask, (like, shared_dims, 0.5, 1.0, 0), test_utils=utils)


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
