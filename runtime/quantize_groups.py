"""Quantises saved activations group by group to 8 or 4 bits, with stochastic rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import PayloadError
from .codec import FLOATS, as_float32, pad_row, padded

GROUP = 64
"""Neighbouring elements of a row that share a scale."""
_TINY, _LARGEST = torch.finfo(torch.bfloat16).tiny, torch.finfo(torch.bfloat16).max


@dataclasses.dataclass(frozen=True)
class QuantizeGroups:
    """Affine quantisation of groups of 64: ``x = low + code * scale``, unbiased on average.

    Chen et al. 2021, "ActNN", https://arxiv.org/abs/2104.14129, and Liu et al. 2022, "GACT",
    https://arxiv.org/abs/2206.11357, at 8 and 4 bits and with groups along the features. The
    dither is a hash of the position and of the largest value of the group: drawing a number for
    every element would cost more than all the rest, and from torch's generators it would change
    the masks that the program itself draws.

    A group with a NaN or an infinity decodes to NaN, so that an overflow stays visible; where the
    sign is kept, what is 0 stays 0.
    """

    bits: int
    """8 or 4."""
    sign: bool = False
    """For tensors that are never negative, such as a ReLU's: code 0 stands for 0 alone, so that
    ``decode(encode(x)) > 0`` wherever ``x > 0`` and nowhere else."""
    exact: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """``int8`` or ``int4``, and whether the sign is kept."""
        return f"int{self.bits}" + (" + sign" if self.sign else "")

    @property
    def _levels(self) -> int:
        codes: int = 2**self.bits
        return codes - (2 if self.sign else 1)

    def refusal(self, dtype: torch.dtype, row: int) -> str | None:
        """Returns why rows cannot be encoded."""
        if dtype not in FLOATS:
            return f"{dtype} is not quantised"
        smaller = self.row_bytes(row, dtype) < row * dtype.itemsize
        return None if smaller else f"rows of {row} are too short for groups of {GROUP}"

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Encodes ``[..., n]`` as codes and the low end and step of every group.

        Returns:
            codes, uint8 ``[..., groups * 64 * bits / 8]``; low and scale, bfloat16
            ``[..., groups]``, low left out where the sign is kept.
        """
        groups = pad_row(as_float32(x), GROUP).unflatten(-1, (-1, GROUP))
        # A NaN is not at most 0 either.
        positive = pad_row(~(x <= 0), GROUP).unflatten(-1, (-1, GROUP)) if self.sign else None
        top = groups.amax(-1, keepdim=True)
        if self.sign:
            low = torch.zeros_like(top)
        else:
            low = groups.amin(-1, keepdim=True)
            finite = low.clamp(-_LARGEST, _LARGEST).to(torch.bfloat16).to(torch.float32)
            low = torch.where(low.isfinite(), finite, low)
        # Rounded to bfloat16 the range must not become too small for the largest value.
        # Halves, so that the range of the largest numbers stays finite.
        step = (top * 0.5 - low * 0.5).clamp_min(0) * (2 * (1 + 2.0**-7) / self._levels)
        scale = step.to(torch.bfloat16)
        inverse = torch.where(scale < _TINY, 0.0, 2 / scale.to(torch.float32))
        dithered = (groups * 0.5 - low * 0.5) * inverse + _dither(groups, top)
        codes = dithered.floor().clamp(0, self._levels)
        if self.sign:
            codes = torch.where(codes >= 0, codes + 1, 1)  # of an infinity it is NaN
            codes = torch.where(positive, codes, 0)  # type: ignore[arg-type]
        packed = codes.to(torch.uint8)
        if self.bits == 4:
            halves = packed.unflatten(-1, (2, -1))
            packed = halves.select(-2, 0) | (halves.select(-2, 1) << 4)
        scale = scale.squeeze(-1)
        if self.sign:
            return packed.flatten(-2), scale
        return packed.flatten(-2), low.to(torch.bfloat16).squeeze(-1), scale

    def decode(self, payload: Sequence[Tensor], row: int, dtype: torch.dtype) -> Tensor:
        """Returns ``[..., row]``."""
        n = padded(row, GROUP)
        ends = [(torch.bfloat16, n // GROUP)] * (1 if self.sign else 2)
        wanted = [(torch.uint8, n * self.bits // 8), *ends]
        packed, *parts = PayloadError.checked(self.name, payload, wanted)
        # In int32: Inductor has no vector code for comparing and shifting bytes.
        codes = packed.to(torch.int32).unflatten(-1, (-1, GROUP * self.bits // 8))
        if self.bits == 4:
            codes = torch.cat([codes & 15, codes >> 4], -1)
        scale = parts[-1].to(torch.float32).unsqueeze(-1)
        values = codes.to(torch.float32)
        if self.sign:
            # The smallest positive value stays above 0, in the type it will have as well.
            tiny = max(torch.finfo(dtype).tiny, torch.finfo(torch.float32).tiny)
            x = torch.where(scale.isfinite(), ((values - 1) * scale).clamp_min(tiny), torch.nan)
            x = torch.where(codes > 0, x, 0.0)
        else:
            low = parts[0].to(torch.float32).unsqueeze(-1)
            x = (low * 0.25 + values * (scale * 0.25)) * 4  # no overflow on the way
        # Rounding up must not make an infinity of a large number; a NaN stays one.
        largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
        rows: Tensor = x.clamp(-largest, largest).flatten(-2)[..., :row]
        return rows.to(dtype)

    def row_bytes(self, row: int, dtype: torch.dtype) -> int:
        """Returns bits for every element, and 2 bytes for the ends of every group of 64."""
        n = padded(row, GROUP)
        return n * self.bits // 8 + n // GROUP * (2 if self.sign else 4)

    def error_bound(self, x: Tensor) -> Tensor:
        """Returns the step of the group, and the rounding of its ends and of the result."""
        row, eps = x.shape[-1], torch.finfo(x.dtype).eps
        groups = pad_row(x.double(), GROUP).unflatten(-1, (-1, GROUP))
        largest = groups.abs().amax(-1, keepdim=True)
        width = groups.amax(-1, keepdim=True) - (0 if self.sign else groups.amin(-1, keepdim=True))
        bound = width.clamp_min(0) * (1.03 / self._levels) + largest * (2.0**-7 + eps)
        bound = bound + _TINY * (self._levels + 2) + torch.finfo(x.dtype).tiny
        bound = torch.where(largest > torch.finfo(torch.float32).max, torch.inf, bound)
        rows: Tensor = bound.expand_as(groups).flatten(-2)[..., :row]
        return rows


def _dither(groups: Tensor, top: Tensor) -> Tensor:
    """Returns numbers in [0, 1) that look random: a hash of position and of a value per group.

    In 15-bit steps, so that no product leaves int32 whatever compiles it.
    """
    bits = top.view(torch.int32)
    seed = (bits ^ (bits >> 15)) & 0x7FFF
    place = _positions(groups)
    x = ((place & 0x7FFF) * 40503) ^ ((place >> 15) * 30011) ^ (seed * 52711)
    for multiplier in (44111, 60493, 35317):
        x = x ^ (x >> 13)
        x = (x & 0x7FFF) * multiplier
    return ((x >> 9) & 0x3FFF).to(torch.float32) * 2.0**-14


def _positions(groups: Tensor) -> Tensor:
    """Returns a number for every element, int32, the same along leading dimensions but mixed."""
    total: Tensor | None = None
    stride = 1
    for dim in reversed(range(groups.dim())):
        n = groups.shape[dim]
        index = torch.arange(n, dtype=torch.int32, device=groups.device)
        index = index.view(-1, *[1] * (groups.dim() - 1 - dim)) * (stride & 0x7FFF)
        total = index if total is None else total + index
        stride = stride * n if isinstance(n, int) else 8191
    assert total is not None
    return total & 0x3FFFFFFF
