"""Lets backward read a sign from an activation that is saved anyway, instead of one more save."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import fx

from ..core.decisions import PassResult
from .support import is_zero

aten, prims = torch.ops.aten, torch.ops.prims

_COMPARISONS = (aten.le.Scalar, aten.gt.Scalar, aten.lt.Scalar, aten.ge.Scalar)


@dataclasses.dataclass(frozen=True)
class ShareSaves:
    """Compares a dropped activation with zero in place of the activation.

        %r = relu(%a)                         %r = relu(%a)
        %y = mul(%r, %mask)            =>     %y = mul(%r, %mask)
        %m = le(%r, 0)                        %m = le(%y, 0)
        where(%m, 0, mul(%g, %mask))          where(%m, 0, mul(%g, %mask))

    The product needs y for its weight gradient, so the mask of the activation comes for free.

    1. They are floating-point numbers, and the mask is a constant of at least 1, or a random one
       whose elements are 0 or at least 1: the sign of what is kept survives, also of the smallest
       number.
    2. The comparison is with 0 and comes after the product.
    3. With a random mask, the comparison is read only where it chooses between 0 and a product with
       that mask, in which a dropped element is 0 whatever is chosen. As everywhere, what is dropped
       counts as 0 where its gradient is not finite.
    """

    name: ClassVar[str] = "share-saves"
    exact: ClassVar[bool] = True

    def apply(self, graph: fx.Graph) -> PassResult:
        """Rewrites an ATen graph in place."""
        modified = False
        products: dict[fx.Node, _Product] = {}
        for node in graph.nodes:
            if node.target is aten.mul.Tensor:
                product = _product_with_mask(node)
                if product is not None:
                    products.setdefault(_without_alias(product.of), product)
            elif node.target in _COMPARISONS and node.args[1] == 0:
                same_sign = products.get(_without_alias(node.args[0]))
                if same_sign is not None and _may_stand_for(same_sign, node):
                    node.args = (same_sign.result, *node.args[1:])
                    modified = True
        if modified:
            graph.eliminate_dead_code()
        return PassResult(modified)


@dataclasses.dataclass(frozen=True)
class _Product:
    """An activation times a mask, of the activation's shape and type."""

    of: fx.Node
    result: fx.Node
    mask: fx.Node | None
    """None for a constant."""


def _product_with_mask(node: fx.Node) -> _Product | None:
    for x, factor in (node.args, reversed(node.args)):
        if not isinstance(x, fx.Node):
            continue
        mask = factor if isinstance(factor, fx.Node) and _least_kept(factor) >= 1 else None
        if mask is None and _constant(factor) < 1:
            continue
        result = _rounded(node)
        before, after = x.meta["val"], result.meta["val"]
        same = before.dtype == after.dtype and before.shape == after.shape
        if same and before.dtype.is_floating_point:  # a product of integers may overflow
            return _Product(x, result, mask)
    return None


def _rounded(node: fx.Node) -> fx.Node:
    """Returns the product in the type that it is used in, where that is a narrower one."""
    users = list(node.users)
    if len(users) == 1 and users[0].target is prims.convert_element_type.default:
        return users[0]
    return node


def _may_stand_for(product: _Product, comparison: fx.Node) -> bool:
    if product.mask is None:
        return True
    return all(
        user.target is aten.where.self
        and user.args[0] is comparison
        and any(_is_dropped(user.args[i], product.mask) for i in (1, 2))
        and any(_is_nothing(user.args[i]) for i in (1, 2))
        for user in comparison.users
    )


def _is_dropped(node: object, mask: fx.Node) -> bool:
    """Returns whether a tensor is a product with the mask."""
    if isinstance(node, fx.Node) and node.target is prims.convert_element_type.default:
        (node,) = node.all_input_nodes
    return isinstance(node, fx.Node) and node.target is aten.mul.Tensor and mask in node.args


def _is_nothing(node: object) -> bool:
    return isinstance(node, fx.Node) and is_zero(node)


def _least_kept(node: fx.Node) -> float:
    """Returns the number that a random mask has where it is not 0, 0 for anything else."""
    if node.target is not aten.where.self:
        return 0.0
    _, kept, dropped = node.args
    if not isinstance(kept, fx.Node) or not _is_nothing(dropped):
        return 0.0
    if kept.target not in (aten.scalar_tensor.default, aten.full.default):
        return 0.0
    value = kept.args[0] if kept.target is aten.scalar_tensor.default else kept.args[1]
    return float(value) if isinstance(value, (int, float)) else 0.0


def _constant(value: object) -> float:
    """Returns the number that an argument stands for, 0 if it is none."""
    if isinstance(value, fx.Node) and value.target is aten.full.default:
        value = value.args[1]
    return float(value) if isinstance(value, (int, float)) else 0.0


def _without_alias(node: object) -> fx.Node:
    assert isinstance(node, fx.Node)
    while node.target in (aten.alias.default, aten.detach.default):
        (node,) = node.all_input_nodes
    return node
