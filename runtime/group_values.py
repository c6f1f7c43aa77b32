"""Keeps the N largest magnitudes of every M features: where they are, and their values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import PayloadError
from .codec import FLOATS, Codec, as_float32, pad_row, padded, selection_bound, suffix
from .plain_values import PLAIN


@dataclasses.dataclass(frozen=True)
class GroupValues:
    """The N largest magnitudes of every M features, such as 4 of 16.

    A row of n is M runs of n / M neighbours laid over each other, and a group is what lies at one
    place: features have no order that would make neighbours a better group, and so every step
    works on whole vectors. Selecting is N insertions by maximum and minimum, without a branch.
    What is compared is one integer: the magnitude, and in place of its last 5 bits the index and
    the sign. So of equal magnitudes the first is kept, a NaN counts as larger than infinity, and
    values keep 18 bits of their mantissa.

    Chen et al. 2023, "DropIT", https://arxiv.org/abs/2202.13808, keep the largest magnitudes of a
    whole tensor; groups cost less to select and to index.
    """

    kept: int
    """N, at least 1."""
    group: int
    """M, at most 16."""
    values: Codec = PLAIN
    """How the values are stored."""
    exact: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """``nm 4:16``, and how the values are stored."""
        return f"nm {self.kept}:{self.group}{suffix(self.values)}"

    def refusal(self, dtype: torch.dtype, row: int) -> str | None:
        """Returns why rows cannot be encoded."""
        if dtype not in FLOATS:
            return f"{dtype} has no magnitudes to select"
        if (why := self.values.refusal(dtype, self._count(row))) is not None:
            return why
        smaller = self.row_bytes(row, dtype) < row * dtype.itemsize
        return None if smaller else f"{self.name} of {row} is not smaller"

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Encodes ``[..., n]``.

        Returns:
            indices, uint8 ``[..., n / M * N / 2]``, 4 bits for each value; values
            ``[..., n / M * N]``, encoded.
        """
        groups = pad_row(as_float32(x), self.group).unflatten(-1, (self.group, -1))
        place = torch.arange(_LAST, _LAST - self.group, -1, dtype=torch.int32, device=x.device)
        bits = groups.view(torch.int32)
        sign = (bits >> 31) & 1  # what the arithmetic shift copies is masked away
        keys = (bits & _MAGNITUDE) | (place.unsqueeze(-1) << 1) | sign
        largest: list[Tensor] = []
        for m in range(self.group):
            new, inserted = keys.select(-2, m), []
            for old in largest:
                inserted.append(torch.maximum(old, new))
                new = torch.minimum(old, new)
            largest = [*inserted, new][: self.kept]
        indices = [_LAST - ((key >> 1) & _LAST) for key in largest]
        indices += [torch.zeros_like(indices[0])] * (self.kept % 2)
        pairs = [a | (b << 4) for a, b in zip(indices[::2], indices[1::2], strict=True)]
        packed = torch.cat(pairs, -1).to(torch.uint8)
        values = torch.cat([(key & _MAGNITUDE) | (key << 31) for key in largest], -1)
        return (packed, *self.values.encode(values.view(torch.float32).to(x.dtype)))

    def decode(self, payload: Sequence[Tensor], row: int, dtype: torch.dtype) -> Tensor:
        """Returns ``[..., row]``, zero where nothing was kept."""
        n = padded(row, self.group) // self.group
        wanted = (torch.uint8, (self.kept + 1) // 2 * n)
        (packed,) = PayloadError.checked(self.name, payload[:1], [wanted])
        values = self.values.decode(payload[1:], n * self.kept, dtype)
        PayloadError.check_alike(self.name, [packed, values])
        pairs = packed.to(torch.int32).unflatten(-1, (-1, n))
        values = values.unflatten(-1, (self.kept, -1))
        place = torch.arange(self.group, dtype=torch.int32, device=packed.device).unsqueeze(-1)
        x = torch.zeros((), dtype=dtype, device=packed.device)
        for i in range(self.kept):
            index = (pairs.select(-2, i // 2) >> (i % 2 * 4)) & _LAST
            x = torch.where(index.unsqueeze(-2) == place, values.select(-2, i).unsqueeze(-2), x)
        rows: Tensor = x.flatten(-2)[..., :row]
        return rows

    def row_bytes(self, row: int, dtype: torch.dtype) -> int:
        """Returns 4 bits and the bytes of a value for each that is kept."""
        n = padded(row, self.group) // self.group
        return n * ((self.kept + 1) // 2) + self.values.row_bytes(self._count(row), dtype)

    def error_bound(self, x: Tensor) -> Tensor:
        """Returns the smallest magnitude kept of the group, and the error of the values."""
        groups = pad_row(x, self.group).unflatten(-1, (self.group, -1))
        largest = groups.abs().double().topk(self.kept, -2).values.movedim(-2, 0)
        least = selection_bound(largest[[0, -1]], 2.0**-17).unsqueeze(-2)
        dropped = least.expand(groups.shape).flatten(-2)[..., : x.shape[-1]]
        _, values = dataclasses.replace(self, values=PLAIN).encode(x)
        return torch.maximum(dropped, self.values.error_bound(values).amax(-1, keepdim=True))

    def _count(self, row: int) -> int:
        return padded(row, self.group) // self.group * self.kept


_LAST = 15
_MAGNITUDE = 0x7FFFFFE0
