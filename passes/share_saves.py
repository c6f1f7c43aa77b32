"""Lets backward read a sign from an activation that is saved anyway, instead of one more save."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import fx

from ..core.decisions import PassResult

aten = torch.ops.aten

_COMPARISONS = (aten.le.Scalar, aten.gt.Scalar, aten.lt.Scalar, aten.ge.Scalar)


@dataclasses.dataclass(frozen=True)
class ShareSaves:
    """Compares a scaled activation with zero in place of the activation.

        %r = relu(%a)                         %r = relu(%a)
        %y = mul(%r, 2.0)              =>     %y = mul(%r, 2.0)
        %m = le(%r, 0)                        %m = le(%y, 0)

    The product needs y for its weight gradient, so the mask of the activation comes for free, and
    without a second result the activation is computed in place.

    1. The factor is a constant of at least 1: the sign survives, also of the smallest number.
    2. The comparison is with 0 and comes after the scaling.
    """

    name: ClassVar[str] = "share-saves"
    exact: ClassVar[bool] = True

    def apply(self, graph: fx.Graph) -> PassResult:
        """Rewrites an ATen graph in place."""
        modified = False
        scaled: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            if node.target is aten.mul.Tensor:
                source = _scaled_by_constant(node)
                if source is not None:
                    scaled.setdefault(_without_alias(source), node)
            elif node.target in _COMPARISONS and node.args[1] == 0:
                same_sign = scaled.get(_without_alias(node.args[0]))
                if same_sign is not None:
                    node.args = (same_sign, *node.args[1:])
                    modified = True
        if modified:
            graph.eliminate_dead_code()
        return PassResult(modified)


def _scaled_by_constant(node: fx.Node) -> fx.Node | None:
    """Returns what is multiplied by a constant of at least 1, keeping its shape and type."""
    for x, factor in (node.args, reversed(node.args)):
        if isinstance(x, fx.Node) and _constant(factor) >= 1:
            before, after = x.meta["val"], node.meta["val"]
            if before.dtype == after.dtype and before.shape == after.shape:
                return x
    return None


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
