"""Computes single ops for all groups of rows at once, with the groups as a new first dimension.

    mm(a [R, k], b [k, n])                 ->  bmm(a [g, R/g, k], b [g, k, n])
    relu(x [R, n])                         ->  relu(x [g, R/g, n])
    view(x [b, t, n], [b * t, n])          ->  view(x [g, b/g, t, n], [g, b/g * t, n])

Every op here does for each group what it did for all rows. Products of images, with a batch of
matrices, and ops over the rows have no such form and stay whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import fx

from .relation import shape_of, tensor_operands
from .rules import pointwise, rule_table
from .rules.layout import squeezed_dims

aten = torch.ops.aten


class Grouped(Protocol):
    """What an op of groups is made with."""

    def op(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Adds one op."""

    def view(self, x: fx.Node, sizes: list[Any]) -> fx.Node:
        """Adds a view, with a copy where strides need one."""

    def operand(self, x: fx.Node, rank: int | None = None) -> fx.Node:
        """Returns ``[groups, ...]`` of an operand, with as many dimensions after it as ``rank``."""

    def sizes(self, sizes: Sequence[Any]) -> list[Any]:
        """Returns ``[groups, ...]`` of sizes of the result."""


Rewrite = Callable[[fx.Node, Grouped], fx.Node]


def rewrite_of(node: fx.Node, row_dim: int | None, sums_rows: bool) -> Rewrite | None:
    """Returns what computes an op group by group, None where nothing does.

    Args:
        node: the op.
        row_dim: where its result has rows.
        sums_rows: whether it sums over them.
    """
    target: Any = node.target
    if sums_rows and target not in (aten.mm.default, aten.bmm.default, aten.sum.dim_IntList):
        return None
    if target is aten.addmm.default and node.kwargs:  # alpha and beta
        return None
    if target is aten.bmm.default and shape_of(node)[0] != 1:
        return None
    if target is aten.slice.Tensor and _dim(node, 1) == row_dim:
        return None
    ranks = {len(shape_of(x)) for x in tensor_operands(node)}
    if target is aten.cat.default and len(ranks) > 1:  # it ignores empty vectors
        return None
    if node.kwargs.get("memory_format") in (torch.channels_last, torch.channels_last_3d):
        return None
    if target in _TABLE:
        return _TABLE[target]
    rule = rule_table().get(target.overloadpacket)
    by_tag = rule is None and torch.Tag.pointwise in target.tags
    return _pointwise if by_tag or getattr(rule, "__module__", "") == pointwise.__name__ else None


def _pointwise(node: fx.Node, g: Grouped) -> fx.Node:
    rank = len(shape_of(node))
    tensors = set(tensor_operands(node))
    args, kwargs = fx.map_arg(
        (node.args, node.kwargs), lambda x: g.operand(x, rank) if x in tensors else x
    )
    return g.op(node.target, *args, **kwargs)


def _mm(node: fx.Node, g: Grouped) -> fx.Node:
    a, b = tensor_operands(node)
    return g.op(aten.bmm.default, g.operand(a), g.operand(b))


def _addmm(node: fx.Node, g: Grouped) -> fx.Node:
    bias, a, b = tensor_operands(node)
    product = g.op(aten.bmm.default, g.operand(a), g.operand(b))
    return g.op(aten.add.Tensor, product, g.operand(bias, 2))


def _bmm(node: fx.Node, g: Grouped) -> fx.Node:
    """A batch of one matrix, as ``einsum`` makes it."""
    a, b = (g.op(aten.squeeze.dims, g.operand(x), [1]) for x in tensor_operands(node))
    return g.op(aten.unsqueeze.default, g.op(aten.bmm.default, a, b), 1)


def _view(node: fx.Node, g: Grouped) -> fx.Node:
    sizes: Any = node.args[1]
    return g.view(g.operand(tensor_operands(node)[0]), g.sizes(sizes))


def _permute(node: fx.Node, g: Grouped) -> fx.Node:
    order: Any = node.args[1]
    shifted = [d % len(order) + 1 for d in order]
    return g.op(aten.permute.default, g.operand(tensor_operands(node)[0]), [0, *shifted])


def _transpose(node: fx.Node, g: Grouped) -> fx.Node:
    x = g.operand(tensor_operands(node)[0])
    a, b = (_dim(node, 1), _dim(node, 2)) if len(node.args) > 1 else (0, 1)
    return g.op(aten.transpose.int, x, a + 1, b + 1)


def _unsqueeze(node: fx.Node, g: Grouped) -> fx.Node:
    x = g.operand(tensor_operands(node)[0])
    return g.op(aten.unsqueeze.default, x, _dim(node, 1, of=node) + 1)


def _squeeze(node: fx.Node, g: Grouped) -> fx.Node:
    x = g.operand(tensor_operands(node)[0])
    return g.op(aten.squeeze.dims, x, [d + 1 for d in squeezed_dims(node)])


def _expand(node: fx.Node, g: Grouped) -> fx.Node:
    sizes: Any = node.args[1]
    x = g.operand(tensor_operands(node)[0], len(shape_of(node)))
    return g.op(aten.expand.default, x, g.sizes(sizes))


def _reduce(node: fx.Node, g: Grouped) -> fx.Node:
    (x,) = tensor_operands(node)
    rank = len(shape_of(x))
    dims: Any = node.args[1] if len(node.args) > 1 else None
    shifted = [d % rank + 1 for d in dims] if dims else list(range(1, rank + 1))
    return g.op(node.target, g.operand(x), shifted, *node.args[2:], **node.kwargs)


def _slice(node: fx.Node, g: Grouped) -> fx.Node:
    x = g.operand(tensor_operands(node)[0])
    return g.op(node.target, x, _dim(node, 1) + 1, *node.args[2:])


def _cat(node: fx.Node, g: Grouped) -> fx.Node:
    rank = len(shape_of(node))
    dim = node.args[1] if len(node.args) > 1 else 0
    assert isinstance(dim, int)
    parts = [g.operand(x) for x in tensor_operands(node)]
    return g.op(aten.cat.default, parts, dim % rank + 1)


_TABLE: dict[object, Rewrite] = {
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.bmm.default: _bmm,
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default, aten.reshape.default), _view),
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose,
    aten.unsqueeze.default: _unsqueeze,
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), _squeeze),
    aten.expand.default: _expand,
    **dict.fromkeys(
        (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default), _reduce
    ),
    aten.slice.Tensor: _slice,
    aten.select.int: _slice,
    aten.cat.default: _cat,
}

LIFTED = (
    *(aten.view.default, aten._unsafe_view.default, aten.permute.default, aten.transpose.int),
    *(aten.t.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims),
)
"""Ops of a weight that are done after it is cut: they move nothing, so that once for every group
costs what once does."""


def _dim(node: fx.Node, position: int, of: fx.Node | None = None) -> int:
    """Returns a dimension that an argument names, counted from the front."""
    value = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
    assert isinstance(value, int)
    rank = len(shape_of(of or tensor_operands(node)[0]))
    return value % max(rank, 1)
