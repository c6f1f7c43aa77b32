"""Cuts a tensor of any strides into rows, as encodings want them, and puts it together again."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """A permutation into the order of memory, and the trailing sizes that make up a row."""

    order: tuple[int, ...]
    """Dimensions by falling stride."""
    tail: tuple[int, ...]
    """Sizes of the dimensions that a row is made of, all fixed."""

    @property
    def row(self) -> int:
        """Elements in a row."""
        return math.prod(self.tail)

    def to_rows(self, x: Tensor) -> Tensor:
        """Returns ``[..., row]``, contiguous; a view where the strides allow one."""
        rows = x if self._in_order else x.permute(self.order)
        rows = rows.contiguous()
        return rows if len(self.tail) == 1 else rows.flatten(x.dim() - len(self.tail))

    def from_rows(self, rows: Tensor) -> Tensor:
        """Returns the tensor in the dimensions and the order of memory that it had."""
        x = rows.contiguous()
        if len(self.tail) > 1:
            x = x.unflatten(-1, self.tail)
        if self._in_order:
            return x
        back = [self.order.index(dim) for dim in range(len(self.order))]
        return x.permute(back)

    @property
    def _in_order(self) -> bool:
        return self.order == tuple(range(len(self.order)))


def row_layout(value: Tensor, shortest: int, multiple: int) -> RowLayout | None:
    """Returns rows of the last dimension in memory, or of several where it is short.

    Args:
        value: the tensor, a fake one.
        shortest: dimensions are taken in until a row has so many elements.
        multiple: and until their number is a multiple of this, if it becomes one.

    Returns:
        None where the last dimension in memory has no fixed size, or elements share memory.
    """
    if value.dim() == 0 or any(isinstance(s, int) and s == 0 for s in value.stride()):
        return None
    strides = [_size(stride) for stride in value.stride()]
    order = tuple(sorted(range(value.dim()), key=lambda d: (-strides[d], d)))
    sizes = [value.shape[d] for d in order]
    fixed = 0
    while fixed < len(sizes) and isinstance(sizes[-1 - fixed], int):
        fixed += 1
    if fixed == 0:
        return None
    taken = next((n for n in range(1, fixed + 1) if _long(sizes[-n:], shortest)), fixed)
    suited = (n for n in range(taken, fixed + 1) if math.prod(sizes[-n:]) % multiple == 0)
    taken = next(suited, taken)
    return RowLayout(order, tuple(int(size) for size in sizes[-taken:]))


def _long(sizes: list[int], shortest: int) -> bool:
    return math.prod(sizes) >= shortest


def _size(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 1 << 40
