"""The ops that multiply: which of their operands are contracted, and which one is added."""

from __future__ import annotations

import dataclasses
import enum
import functools
from typing import Final

import torch
from torch import fx

from ..runtime.rnn_layer import rnn_layer
from .relation import is_tensor, shape_of, tensor_operands

aten = torch.ops.aten


class Kind(enum.Enum):
    """What sort of product an op is."""

    MATRIX = enum.auto()
    BATCHED = enum.auto()
    CONVOLUTION = enum.auto()
    ATTENTION = enum.auto()
    RECURRENT = enum.auto()


@dataclasses.dataclass(frozen=True)
class Product:
    """One product of a graph."""

    kind: Kind
    factors: tuple[fx.Node, ...]
    """The operands that are multiplied, a weight last where the op has a place for one."""
    addend: fx.Node | None = None
    """What is added to the product."""
    candidates: tuple[fx.Node, ...] = ()
    """If there are any, it is a product only if one of these, and no other factor, is a weight."""


def product_of(node: fx.Node) -> Product | None:
    """Returns the product that the node is, None where it is none."""
    target = node.target
    name = getattr(target, "__name__", str(target))
    if "scaled_dot_product" in name or "_attention_forward" in name or name == "flex_attention":
        return Product(Kind.ATTENTION, tuple(tensor_operands(node)[:3]))
    if not isinstance(target, torch._ops.OpOverload):
        return None
    packet = target.overloadpacket
    if packet is rnn_layer.overloadpacket or packet in _RECURRENT:
        return Product(Kind.RECURRENT, tuple(tensor_operands(node)))
    if packet is aten.sum:
        return _summed_product(node)
    row = _table().get(packet)
    if row is None:
        return _unknown(node) if target.namespace not in _KNOWN else None
    kind, places, addend = row
    factors = [node.args[place] for place in places]
    assert all(isinstance(factor, fx.Node) for factor in factors)
    added = None if addend is None else node.args[addend]
    return Product(
        kind,
        tuple(factor for factor in factors if isinstance(factor, fx.Node)),
        added if isinstance(added, fx.Node) else None,
    )


_KNOWN: Final = ("aten", "prims", "prim", "ardd", "inductor", "inductor_prims")

_RECURRENT: Final = (
    *(aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu),
    *(aten.mkldnn_rnn_layer, aten._cudnn_rnn, aten.miopen_rnn),
)


@functools.cache
def _table() -> dict[object, tuple[Kind, tuple[int, ...], int | None]]:
    """Returns the positions of the factors and of what is added, by overload packet."""
    matrix = (aten.mm, aten.mv, aten.dot, aten.matmul, aten.linear, aten._sparse_mm)
    images = (
        *(aten.convolution, aten._convolution, aten.conv1d, aten.conv2d, aten.conv3d),
        *(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d),
    )
    return {
        **dict.fromkeys((*matrix, aten._scaled_mm, aten._int_mm), (Kind.MATRIX, (0, 1), None)),
        **dict.fromkeys((aten.addmm, aten.addmv, aten._addmm_activation), (Kind.MATRIX, (1, 2), 0)),
        **dict.fromkeys((aten.bmm, aten._grouped_mm), (Kind.BATCHED, (0, 1), None)),
        **dict.fromkeys((aten.baddbmm, aten.addbmm), (Kind.BATCHED, (1, 2), 0)),
        **dict.fromkeys(images, (Kind.CONVOLUTION, (0, 1), None)),
        aten._trilinear: (Kind.BATCHED, (0, 1, 2), None),
        aten.bilinear: (Kind.BATCHED, (0, 1, 2), None),
    }


def _summed_product(node: fx.Node) -> Product | None:
    """``sum(mul(a, b), d)``: small products are written so, by Inductor too.

    Neither may be broadcast along ``d``, and the weight not behind it, as the weights of a mean
    over layers are.
    """
    source = node.args[0]
    dims = node.args[1] if len(node.args) > 1 else None
    if not isinstance(source, fx.Node) or source.target is not aten.mul.Tensor or not dims:
        return None
    factors = tensor_operands(source)
    if len(factors) != 2 or factors[0] is factors[1]:
        return None
    whole = shape_of(source)
    assert isinstance(dims, (list, tuple))
    summed = [_int(d) % len(whole) for d in dims]
    if any(isinstance(whole[d], int) and whole[d] == 1 for d in summed):
        return None
    shapes = {x: (1,) * (len(whole) - len(shape_of(x))) + shape_of(x) for x in factors}
    if any(shape[d] != whole[d] for shape in shapes.values() for d in summed):
        return None
    full = [x for x in factors if shapes[x][min(summed) :] == whole[min(summed) :]]
    return Product(Kind.BATCHED, tuple(factors), candidates=tuple(full)) if full else None


def _unknown(node: fx.Node) -> Product | None:
    """Takes a custom op for a product if two of its operands could be matrices."""
    operands = [x for x in tensor_operands(node) if len(shape_of(x)) > 1]
    if not is_tensor(node) or len(operands) < 2:
        return None
    return Product(Kind.MATRIX, tuple(operands[:2]), candidates=tuple(operands[:2]))


def _int(value: object) -> int:
    assert isinstance(value, int)
    return value
