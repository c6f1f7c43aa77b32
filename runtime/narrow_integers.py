"""Saves integers of a known bound in the smallest type that holds them, exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import PayloadError

_TYPES = (torch.uint8, torch.int16, torch.int32)


@dataclasses.dataclass(frozen=True)
class NarrowIntegers:
    """Indices from 0 to ``largest`` in 1, 2 or 4 bytes in place of 8."""

    largest: int
    """The largest value that can occur."""
    exact: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """The type that holds them."""
        return str(self._dtype).removeprefix("torch.")

    @property
    def _dtype(self) -> torch.dtype:
        fits = (dtype for dtype in _TYPES if self.largest <= torch.iinfo(dtype).max)
        return next(fits, torch.int64)

    def refusal(self, dtype: torch.dtype, row: int) -> str | None:
        """Returns why rows cannot be encoded: no smaller type holds them."""
        if dtype not in (torch.int16, torch.int32, torch.int64):
            return f"{dtype} holds no indices"
        return None if self._dtype.itemsize < dtype.itemsize else f"{dtype} is the smallest"

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Encodes ``[..., n]`` as the same in the smallest type."""
        return (x.to(self._dtype),)

    def decode(self, payload: Sequence[Tensor], row: int, dtype: torch.dtype) -> Tensor:
        """Returns ``[..., row]`` of the type it was."""
        (narrow,) = PayloadError.checked(self.name, payload, [(self._dtype, row)])
        return narrow.to(dtype)

    def row_bytes(self, row: int, dtype: torch.dtype) -> int:
        """Returns the bytes of the row in the smallest type."""
        return row * self._dtype.itemsize

    def error_bound(self, x: Tensor) -> Tensor:
        """Returns zeros."""
        return torch.zeros_like(x, dtype=torch.float32)
