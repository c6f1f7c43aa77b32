"""Packs masks into one bit for each element, exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import PayloadError
from .codec import pad_row, padded


def pack_bits(mask: Tensor) -> Tensor:
    """Packs ``bool [..., n]`` into ``uint8 [..., ceil(n / 8)]``.

    Bit k of byte j is element ``j + k * ceil(n / 8)``: eight runs of neighbours lie over each
    other, so that packing reads, and unpacking writes, whole vectors.
    """
    # In int32: Inductor has no vector code for shifts of bytes.
    planes = pad_row(mask, 8).unflatten(-1, (8, -1)).to(torch.int32)
    packed: Tensor = planes.select(-2, 0)
    for k in range(1, 8):
        packed = packed | (planes.select(-2, k) << k)
    return packed.to(torch.uint8)


def unpack_bits(packed: Tensor, row: int) -> Tensor:
    """Returns the ``bool [..., row]`` that `pack_bits` packed."""
    shifts = torch.arange(8, dtype=torch.int32, device=packed.device).unsqueeze(-1)
    bits = (packed.to(torch.int32).unsqueeze(-2) >> shifts) & 1
    rows: Tensor = bits.flatten(-2)[..., :row]
    return rows.to(torch.bool)


@dataclasses.dataclass(frozen=True)
class PackBits:
    """One bit for each element of a mask, as Gist saves the sign of a ReLU.

    Jain et al. 2018, "Gist: Efficient Data Encoding for Deep Neural Network Training",
    https://doi.org/10.1109/ISCA.2018.00070.
    """

    name: ClassVar[str] = "1 bit"
    exact: ClassVar[bool] = True

    def refusal(self, dtype: torch.dtype, row: int) -> str | None:
        """Returns why rows cannot be encoded: they hold no masks."""
        return None if dtype == torch.bool else f"{dtype} is no mask"

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Encodes ``bool [..., n]`` as ``uint8 [..., ceil(n / 8)]``."""
        return (pack_bits(x),)

    def decode(self, payload: Sequence[Tensor], row: int, dtype: torch.dtype) -> Tensor:
        """Returns ``bool [..., row]``."""
        (packed,) = PayloadError.checked(self.name, payload, [(torch.uint8, padded(row, 8) // 8)])
        return unpack_bits(packed, row)

    def row_bytes(self, row: int, dtype: torch.dtype) -> int:
        """Returns ``ceil(row / 8)``."""
        return padded(row, 8) // 8

    def error_bound(self, x: Tensor) -> Tensor:
        """Returns zeros."""
        return torch.zeros_like(x, dtype=torch.float32)
