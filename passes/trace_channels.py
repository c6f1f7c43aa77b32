"""Follows the dimension of channels from a convolution through ops that keep it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import fx

from .relation import is_tensor, shape_of

aten = torch.ops.aten

Channels = tuple[int, "int | torch.SymInt"]
"""The dimension, and how many channels it has."""


def trace_channels(node: fx.Node, of: Mapping[fx.Node, Channels | None]) -> Channels | None:
    """Returns the channels of what an op without a product makes of its operands."""
    source = next((x for x, channels in of.items() if channels is not None), None)
    if source is None:
        return None
    channels = of[source]
    assert channels is not None
    if not is_tensor(node):
        return channels
    dim, size = channels
    shape = shape_of(node)
    if len(shape) < 2:
        return None
    if node.target in (aten.permute.default, aten.transpose.int):
        order = list(range(len(shape)))
        if node.target is aten.permute.default:
            dims = node.args[1]
            assert isinstance(dims, (list, tuple))
            order = [_index(d) % len(shape) for d in dims]
        else:
            a, b = (_index(d) % len(shape) for d in node.args[1:3])
            order[a], order[b] = order[b], order[a]
        return order.index(dim), size
    if node.target not in _VIEWS and dim < len(shape):
        return dim, shape[dim]  # some are left of a split, more come out of a concatenation
    # Views may take the channels apart and put them together again, as a norm of groups does.
    at = dim if dim < len(shape) and shape[dim] == size else 1
    return at, size


_VIEWS: Final = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default),
    *(aten.squeeze.dim, aten.squeeze.dims, aten.select.int),
)


def is_map(node: fx.Node, channels: Channels | None) -> bool:
    """Returns whether a tensor is a map ``[n, channels, *]`` of more than one position."""
    shape = shape_of(node)
    if channels is None or channels[0] != 1 or len(shape) < 3:
        return False
    return shape[1] == channels[1] and has_positions(node)


def has_positions(node: fx.Node) -> bool:
    """Returns whether a tensor has positions behind its samples and channels."""
    return any(not isinstance(size, int) or size != 1 for size in shape_of(node)[2:])


def _index(value: object) -> int:
    assert isinstance(value, int)
    return value
