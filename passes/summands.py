"""The ops whose result holds the values of several operands, none of them a mere factor."""

from __future__ import annotations

from typing import Final

import torch
from torch import fx

from .relation import tensor_operands


def summands_of(node: fx.Node) -> list[list[fx.Node]]:
    """Returns the operands that an op adds or merges, those together that it multiplies.

    Returns:
        Lists of operands, none at all for an op that merges nothing.
    """
    name = _name(node)
    if name not in _MERGES:
        return []
    operands = tensor_operands(node)
    if name in ("aten::addcmul", "aten::addcdiv"):
        return [operands[:1], operands[1:]]
    if name == "prims::fma":
        return [operands[:2], operands[2:]]
    return [[x] for x in operands]


def joins(node: fx.Node) -> bool:
    """Returns whether an op puts its operands side by side, and adds nothing."""
    return _name(node) in ("aten::cat", "aten::stack")


def _name(node: fx.Node) -> str:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return ""
    return str(target.overloadpacket._qualified_op_name)


# By name: `prims::fma` exists only once Inductor is loaded.
_MERGES: Final = frozenset(
    (
        *("aten::add", "aten::sub", "aten::rsub", "aten::add_", "aten::sub_"),
        *("aten::maximum", "aten::minimum", "aten::fmax", "aten::fmin", "aten::logaddexp"),
        *("aten::where", "aten::lerp", "aten::addcmul", "aten::addcdiv", "prims::fma"),
        *("aten::cat", "aten::stack", "aten::index_add", "aten::scatter_add", "aten::scatter"),
        *("aten::index_put", "aten::_unsafe_index_put", "aten::scatter_reduce"),
        *("aten::slice_scatter", "aten::select_scatter", "aten::masked_scatter"),
        "aten::index_copy",
    )
)
