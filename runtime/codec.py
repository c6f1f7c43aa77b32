"""What every encoding of a saved tensor is: how to encode, to decode, its bytes, its error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Codec(Protocol):
    """Encodes rows, ``[..., n]`` with a fixed n, and keeps the leading dimensions.

    ``encode`` and ``decode`` are traced into the graphs, so what they say in ATen is fused by the
    backend, and what calls a custom op stays one call. They work on contiguous tensors; whoever
    calls them puts the strides back.
    """

    @property
    def name(self) -> str:
        """What the report calls it, such as ``int8`` or ``nm 4:16``."""

    @property
    def exact(self) -> bool:
        """Whether decoding gives the very tensor."""

    def refusal(self, dtype: torch.dtype, row: int) -> str | None:
        """Returns why rows of this type and length cannot be encoded, None if they can."""

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Encodes ``x [..., n]``."""

    def decode(self, payload: Sequence[Tensor], row: int, dtype: torch.dtype) -> Tensor:
        """Returns ``[..., row]`` of a type.

        Raises:
            PayloadError: the payload is not one that ``encode`` gives for such rows.
        """

    def row_bytes(self, row: int, dtype: torch.dtype) -> int:
        """Returns the bytes that encode one row."""

    def error_bound(self, x: Tensor) -> Tensor:
        """Returns a bound of ``abs(decode(encode(x)) - x)``, of a shape that broadcasts to x."""


def suffix(values: Codec) -> str:
    """Returns what the name of a codec that chooses among values says of how it stores them."""
    return "" if values.name == "plain" else f", {values.name}"


def padded(n: int, multiple: int) -> int:
    """Returns the smallest multiple that is not below n."""
    return math.ceil(n / multiple) * multiple


def pad_row(x: Tensor, multiple: int) -> Tensor:
    """Appends zeros to every row until its length is a multiple."""
    missing = padded(x.shape[-1], multiple) - x.shape[-1]
    return torch.nn.functional.pad(x, (0, missing)) if missing else x


def as_float32(x: Tensor) -> Tensor:
    """Converts; what is too large for float32 becomes its largest number."""
    if x.dtype != torch.float64:
        return x.to(torch.float32)
    largest = torch.finfo(torch.float32).max
    return torch.where(x.isfinite(), x.clamp(-largest, largest), x).to(torch.float32)


def selection_bound(largest: Tensor, mantissa_error: float) -> Tensor:
    """Returns a bound of what selecting by magnitude drops.

    Args:
        largest: the largest magnitude and the smallest one kept, float64, ``[2, ...]``.
        mantissa_error: relative error of a magnitude where it is compared.
    """
    most, least = largest
    # Compared as float32: smaller numbers are 0 there, larger ones infinite.
    float32 = torch.finfo(torch.float32)
    bound = least + most * mantissa_error + float32.tiny
    return torch.where(most > float32.max, torch.inf, bound)
