"""Recognises a softmax: the op, or an exponential divided by sums of itself."""

from __future__ import annotations

from typing import Final

import torch
from torch import fx

from .relation import tensor_operands

aten, prims = torch.ops.aten, torch.ops.prims


def is_softmax(node: fx.Node) -> bool:
    """Returns whether the node is a softmax, over a dimension or over groups (edges of a graph)."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target.overloadpacket in (aten._softmax, aten.softmax, aten._safe_softmax):
        return True
    operands = tensor_operands(node)
    if target is not aten.div.Tensor or len(operands) != 2:
        return False
    top = _behind(operands[0])
    return top.target is aten.exp.default and _is_sum_of(operands[1], top)


def _behind(node: fx.Node) -> fx.Node:
    """Returns the exponential behind casts, masks and views, or the last node of that kind."""
    while node.target in _SAME and node.all_input_nodes:
        floats = [x for x in tensor_operands(node) if x.meta["val"].dtype.is_floating_point]
        exponentials = [x for x in floats if x.target is aten.exp.default]
        if not floats:
            break
        node = exponentials[0] if exponentials else floats[0]
    return node


def _is_sum_of(node: fx.Node, top: fx.Node) -> bool:
    """Returns whether a denominator is made of the numerator, in a few steps."""
    seen, waiting = {node}, [node]
    while waiting and len(seen) < _STEPS:
        for source in tensor_operands(waiting.pop(0)):
            if source is top:
                return True
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    return False


_STEPS: Final = 24
_SAME: Final = (
    *(prims.convert_element_type.default, aten._to_copy.default, aten.clone.default),
    *(aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim),
    *(aten.where.self, aten.masked_fill.Scalar, aten.mul.Tensor, aten.expand.default),
)
