"""Keeps the largest magnitudes of every row: a bitmap of where they are, and their values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.errors import PayloadError
from .codec import FLOATS, Codec, padded, selection_bound, suffix
from .pack_bits import pack_bits, unpack_bits
from .plain_values import PLAIN


def select_top(x: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Selects the ``kept`` largest magnitudes of every row.

    A NaN counts as larger than infinity. Of equal magnitudes the first are kept, so that equal
    tensors give equal payloads.

    Args:
        x: ``[..., n]``, floating.
        kept: ``1 <= kept <= n``.

    Returns:
        bitmap, uint8 ``[..., ceil(n / 8)]``, as `pack_bits` packs it; values, of x's type
        ``[..., kept]``, by position.
    """
    magnitude = x.abs().to(torch.float32).nan_to_num(nan=torch.inf)
    least = magnitude.topk(kept, sorted=False).values.amin(-1, keepdim=True)
    mask, equal = magnitude > least, magnitude == least
    room = kept - mask.sum(-1, keepdim=True)
    if x.is_cuda or bool((equal.sum(-1, keepdim=True) != room).any()):
        equal &= equal.cumsum(-1) <= room
    mask |= equal
    return pack_bits(mask), x.contiguous().masked_select(mask).view(*x.shape[:-1], kept)


def place_values(bitmap: Tensor, values: Tensor, row: int) -> Tensor:
    """Returns ``[..., row]`` with the values where they were and zeros elsewhere."""
    mask = unpack_bits(bitmap, row)
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter_(
        mask, values
    )


def _fake_select(x: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    n, lead = x.shape[-1], x.shape[:-1]
    return x.new_empty(*lead, padded(n, 8) // 8, dtype=torch.uint8), x.new_empty(*lead, kept)


def _fake_place(bitmap: Tensor, values: Tensor, row: int) -> Tensor:
    return values.new_empty(*values.shape[:-1], row)


_library: Any = torch.library  # untyped
_LIB = _library.Library("ardd", "FRAGMENT")
_LIB.define(
    "select_top(Tensor x, int kept) -> (Tensor bitmap, Tensor values)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_contiguous_strides),
)
_LIB.define(
    "place_values(Tensor bitmap, Tensor values, int row) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_contiguous_strides),
)
_LIB.impl("select_top", select_top, "CompositeExplicitAutograd")
_LIB.impl("place_values", place_values, "CompositeExplicitAutograd")
_library.register_fake("ardd::select_top", _fake_select, lib=_LIB)
_library.register_fake("ardd::place_values", _fake_place, lib=_LIB)


@dataclasses.dataclass(frozen=True)
class TopValues:
    """The k largest magnitudes of every row.

    Jiang et al. 2022, "BackRazor", https://openreview.net/forum?id=oYDkPmPsS4x, with a bitmap as
    there, and a row of features in place of a whole sample.
    """

    kept: int
    """k, at least 1."""
    values: Codec = PLAIN
    """How the values are stored."""
    exact: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """``top 256``, and how the values are stored."""
        return f"top {self.kept}{suffix(self.values)}"

    def refusal(self, dtype: torch.dtype, row: int) -> str | None:
        """Returns why rows cannot be encoded."""
        if dtype not in FLOATS:
            return f"{dtype} has no magnitudes to select"
        if self.kept > row:
            return f"rows of {row} have no {self.kept} values"
        if (why := self.values.refusal(dtype, self.kept)) is not None:
            return why
        smaller = self.row_bytes(row, dtype) < row * dtype.itemsize
        return None if smaller else f"{self.name} of {row} is not smaller"

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Encodes ``[..., n]`` as a bitmap, uint8 ``[..., ceil(n / 8)]``, and the values."""
        bitmap, values = torch.ops.ardd.select_top(x, self.kept)
        return (bitmap, *self.values.encode(values))

    def decode(self, payload: Sequence[Tensor], row: int, dtype: torch.dtype) -> Tensor:
        """Returns ``[..., row]``, zero where nothing was kept."""
        PayloadError.checked(self.name, payload[:1], [(torch.uint8, padded(row, 8) // 8)])
        values = self.values.decode(payload[1:], self.kept, dtype)
        PayloadError.check_alike(self.name, [payload[0], values])
        decoded: Tensor = torch.ops.ardd.place_values(payload[0], values, row)
        return decoded

    def row_bytes(self, row: int, dtype: torch.dtype) -> int:
        """Returns the bytes of the bitmap and of the values."""
        return padded(row, 8) // 8 + self.values.row_bytes(self.kept, dtype)

    def error_bound(self, x: Tensor) -> Tensor:
        """Returns the smallest magnitude kept of the row, and the error of the values."""
        largest = x.abs().double().topk(self.kept).values.movedim(-1, 0)
        dropped = selection_bound(largest[[0, -1]], 2.0**-23).unsqueeze(-1)
        worst = self.values.error_bound(select_top(x, self.kept)[1]).amax(-1, keepdim=True)
        return torch.maximum(dropped, worst).expand(x.shape)
