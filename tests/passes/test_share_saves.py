"""Comparisons of an activation with zero read what is saved of it anyway."""

from __future__ import annotations

import pytest
import torch
from tests.passes.tracing import trace
from torch import Tensor

from ardd.passes.share_saves import ShareSaves


def tripled(x: Tensor) -> tuple[Tensor, Tensor]:
    return x * 3, x <= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_sign_is_read_from_a_product(dtype: torch.dtype) -> None:
    x = torch.randn(4, 6).to(dtype)
    gm = trace(tripled, x)
    assert ShareSaves().apply(gm.graph).modified
    gm.recompile()
    assert all(torch.equal(a, b) for a, b in zip(gm(x), tripled(x), strict=True))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_a_product_of_integers_may_overflow(dtype: torch.dtype) -> None:
    """Three times the largest number is negative: the sign stays where it is."""
    x = torch.full((4, 6), torch.iinfo(dtype).max // 2, dtype=dtype)
    gm = trace(tripled, x)
    assert not ShareSaves().apply(gm.graph).modified
    assert all(torch.equal(a, b) for a, b in zip(gm(x), tripled(x), strict=True))
