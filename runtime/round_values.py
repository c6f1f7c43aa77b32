"""Saves floating point values in bfloat16."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import PayloadError


@dataclasses.dataclass(frozen=True)
class RoundValues:
    """Rounds to bfloat16, to nearest."""

    name: ClassVar[str] = "bf16"
    exact: ClassVar[bool] = False

    def refusal(self, dtype: torch.dtype, row: int) -> str | None:
        """Returns why rows cannot be encoded: they are no larger than bfloat16."""
        return None if dtype in (torch.float32, torch.float64) else f"{dtype} is not larger"

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Encodes ``[..., n]`` as the same in bfloat16."""
        return (x.to(torch.bfloat16),)

    def decode(self, payload: Sequence[Tensor], row: int, dtype: torch.dtype) -> Tensor:
        """Returns ``[..., row]``."""
        (rounded,) = PayloadError.checked(self.name, payload, [(torch.bfloat16, row)])
        return rounded.to(dtype)

    def row_bytes(self, row: int, dtype: torch.dtype) -> int:
        """Returns 2 bytes for each."""
        return 2 * row

    def error_bound(self, x: Tensor) -> Tensor:
        """Returns half a unit in the last place of bfloat16; larger ones overflow."""
        overflow = x.abs() > torch.finfo(torch.bfloat16).max
        bound = x.abs().double() * 2.0**-8 + torch.finfo(torch.bfloat16).tiny
        return torch.where(overflow, torch.inf, bound)
