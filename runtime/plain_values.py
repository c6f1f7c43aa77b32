"""Saves values as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Final

import torch
from torch import Tensor

from ..core.errors import PayloadError


@dataclasses.dataclass(frozen=True)
class PlainValues:
    """Keeps the type: how codecs that choose among values store those that they keep."""

    name: ClassVar[str] = "plain"
    exact: ClassVar[bool] = True

    def refusal(self, dtype: torch.dtype, row: int) -> str | None:
        """Returns None: rows of any type and length can be kept."""
        return None

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Encodes ``[..., n]`` as itself."""
        return (x,)

    def decode(self, payload: Sequence[Tensor], row: int, dtype: torch.dtype) -> Tensor:
        """Returns ``[..., row]``."""
        (values,) = PayloadError.checked(self.name, payload, [(dtype, row)])
        return values

    def row_bytes(self, row: int, dtype: torch.dtype) -> int:
        """Returns the bytes of the row."""
        return row * dtype.itemsize

    def error_bound(self, x: Tensor) -> Tensor:
        """Returns 0."""
        return torch.zeros(x.shape, dtype=torch.float64, device=x.device)


PLAIN: Final = PlainValues()
