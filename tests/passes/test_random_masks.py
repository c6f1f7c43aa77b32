"""Masks that stay random become what Inductor's own decomposition of dropout gives."""

from __future__ import annotations

import pytest
import torch
from tests.passes.tracing import check_values, mask, targets, trace
from torch import Tensor, fx

from ardd.passes.random_masks import lower_random_masks

X = torch.randn(400, 50)


def lowered(gm: fx.GraphModule) -> list[str]:
    lower_random_masks(gm.graph)
    gm.graph.lint()
    gm.recompile()
    check_values(gm.graph)
    return targets(gm.graph)


def test_the_form_in_forward() -> None:
    """mul(mul(gt(rand, p), x), scale): the boolean first, as Inductor's patterns have it."""
    gm = trace(lambda x: x * mask(x, 0.25), X)
    assert lowered(gm) == ["aten.rand", "aten.gt.Scalar", "aten.mul.Tensor", "aten.mul.Tensor"]
    _, _, keep, kept, scaled, _ = gm.graph.nodes
    x = next(iter(gm.graph.nodes))
    assert (kept.args, scaled.args) == ((keep, x), (kept, 1 / 0.75))


def test_the_form_elsewhere() -> None:
    """A mask that is no factor of a plain product becomes a number first."""
    assert "prims.convert_element_type" in lowered(trace(lambda x: x + mask(x), X))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("mean", [1.0, None])
def test_values(p: float, mean: float | None) -> None:
    mean = 1 - p if mean is None else mean
    gm = trace(lambda x: x * mask(x, p, mean=mean), X)
    lowered(gm)
    y = gm(torch.ones_like(X))
    torch.testing.assert_close(y.unique(), torch.tensor([0, mean / (1 - p)]))
    assert abs(float((y > 0).float().mean()) - (1 - p)) < 5 * (p * (1 - p) / X.numel()) ** 0.5


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
    assert lowered(gm).count("aten.rand") == 1
    y, grad = gm(torch.ones_like(X), torch.ones_like(X))
    assert torch.equal(y, grad)


def test_a_rate_of_nearly_zero_draws_nothing() -> None:
    gm = trace(lambda x: x * mask(x, 1e-30), X)
    assert lowered(gm) == ["aten.full", "aten.mul.Tensor"]
    assert torch.equal(gm(X), X)


def test_a_factor_of_another_type() -> None:
    """bf16 times a float32 mask is float32, however the product is written."""
    gm = trace(lambda x: x.bfloat16() * mask(x, 0.9), X)
    lowered(gm)
    y = gm(torch.ones_like(X))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.unique(), torch.tensor([0, 1 / (1 - 0.9)]), rtol=0, atol=1e-5)


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
