"""Finds the matrix products that a dropout of a weight shrinks, forward and backward.

%w = mul(%weight, %mask)                          %w: the masked weight [r, c]
%y = mm(%x, permute(%w))                          contracts columns of the weight
%dx = mm(%dy, %w)                                 contracts its rows
%dw = mul(mm(permute(%dy), %x), %mask)            is wanted under the mask alone
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from .relation import is_tensor

aten, prims = torch.ops.aten, torch.ops.prims

_FACTORS = (aten.mul.Tensor, aten.div.Tensor, aten.neg.default)
_SAME = (aten.alias.default, aten.clone.default, aten.detach.default)


Step = tuple[Any, tuple[Any, ...]]
"""An op on every element by itself that keeps zeros, and what it takes beside the tensor."""

Path = tuple[tuple[Step, ...], bool]
"""Steps in their order, and whether the result is transposed."""


class Features(NamedTuple):
    """A matrix ``[n, features]``."""

    x: fx.Node
    """The matrix, or its transpose; itself never the result of a transposition."""
    first: bool
    """Whether it is the transpose: features are its first dimension."""


@dataclasses.dataclass(frozen=True)
class Use:
    """A product that has the masked weight as an operand."""

    node: fx.Node
    """``mm(x, w)``, ``mm(w, x)``, or ``addmm`` of the same."""
    weight: fx.Node
    """What the mask is multiplied with."""
    masked: fx.Node
    """``mul(weight, mask)``."""
    steps: tuple[Step, ...]
    """Conversions and factors between the two, in their order."""
    weight_first: bool
    """Whether the weight is the left operand of the product."""
    flipped: bool
    """Whether the operand is the weight transposed."""

    @property
    def input(self) -> Features:
        """The other operand."""
        other = factors(self.node)[1 if self.weight_first else 0]
        return _features(other, self.weight_first)

    @property
    def contracts_columns(self) -> bool:
        """Whether the product sums over the columns of the weight, else over its rows."""
        return self.flipped != self.weight_first


@dataclasses.dataclass(frozen=True)
class Gradient:
    """A product whose result is read under the mask alone."""

    node: fx.Node
    """``mm(permute(dy), x)``."""
    flipped: bool
    """Whether the result is the gradient transposed."""

    def operand(self, rows: bool) -> Features:
        """Returns the operand that has the rows of the weight, or its columns."""
        first = rows != self.flipped
        return _features(factors(self.node)[0 if first else 1], first)


@dataclasses.dataclass
class WeightUses:
    """All that is done with one mask of a weight."""

    uses: list[Use]
    gradients: list[Gradient]
    wanted: dict[fx.Node, fx.Node]
    """``mul(gradient, mask)`` to the gradient, for those made of some of ``gradients``."""
    between: set[fx.Node]
    """The nodes between the two, which make a gradient of products and perhaps other tensors."""


def find_weight_uses(mask: fx.Node) -> WeightUses:
    """Returns the products around a mask of two dimensions of a fixed size.

    1. The mask is multiplied with something of its own sizes: that is the masked weight.
    2. A product reads it, through transpositions, conversions and factors, as one of its matrices.
    3. Or what the mask is multiplied with is made of products that nothing else reads, by sums
       and the like: these are needed under the mask alone.

    What else reads the mask or the masked weight can have it in full.
    """
    masked = {user: x for user in mask.users if (x := _multiplied(user, mask)) is not None}
    found = WeightUses([], [], {}, set())
    for node in masked:
        family: dict[fx.Node, Path] = {node: ((), False)}
        family.update(_same_values(node, (), False))
        for relative, (steps, flipped) in family.items():
            for user in relative.users:
                pair = factors(user)
                if relative in pair and not all(x in family for x in pair):
                    first = pair[0] is relative
                    found.uses.append(Use(user, masked[node], node, steps, first, flipped))
    reading = {use.node for use in found.uses}
    for node, x in masked.items():
        if any(use.masked is node for use in found.uses):
            continue
        if _find_gradients(found, x, node, False, reading):
            found.wanted[node] = x
    return found


def factors(node: fx.Node) -> tuple[fx.Node, ...]:
    """Returns the two matrices of a product, nothing for other ops."""
    if node.target is aten.mm.default:
        pair = node.args[:2]
    elif node.target is aten.addmm.default and not node.kwargs:
        pair = node.args[1:3]
    else:
        return ()
    return tuple(x for x in pair if isinstance(x, fx.Node))


def _features(x: fx.Node, first: bool) -> Features:
    while transposes(x):
        x, first = x.all_input_nodes[0], not first
    return Features(x, first)


def transposes(node: fx.Node) -> bool:
    """Returns whether the node swaps the dimensions of a matrix."""
    if node.target is aten.permute.default and len(node.meta["val"].shape) == 2:
        first = node.args[1][0]  # type: ignore[index]
        return first in (1, -1)
    return node.target is aten.t.default


def step_of(node: fx.Node) -> Step | None:
    """Returns the step that a node is: a conversion to another floating type, or a factor."""
    rest = node.args[1:]
    if node.kwargs or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.target is prims.convert_element_type.default:
        floating = node.meta["val"].dtype.is_floating_point
    else:
        floating = node.target in _FACTORS and all(isinstance(x, (int, float)) for x in rest)
    return (node.target, rest) if floating else None


def keeps(node: fx.Node) -> bool:
    """Returns whether the node gives the same numbers."""
    return node.target in _SAME


def adds(node: fx.Node) -> bool:
    """Returns whether the node is a plain sum of two tensors of its own sizes and type."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return False
    mine = node.meta["val"]
    return all(
        isinstance(x, fx.Node)
        and is_tensor(x)
        and x.meta["val"].shape == mine.shape
        and x.meta["val"].dtype == mine.dtype
        for x in node.args
    )


def _multiplied(node: fx.Node, mask: fx.Node) -> fx.Node | None:
    """Returns what is multiplied by the mask, element by element, None for another use of it."""
    if node.target is not aten.mul.Tensor:
        return None
    others = [x for x in node.args if x is not mask]
    if len(others) != 1 or not isinstance(others[0], fx.Node) or not is_tensor(others[0]):
        return None
    x = others[0].meta["val"]
    same = tuple(x.shape) == tuple(mask.meta["val"].shape)
    return others[0] if same and x.dtype.is_floating_point else None


def _same_values(
    node: fx.Node, steps: tuple[Step, ...], flipped: bool
) -> Iterator[tuple[fx.Node, Path]]:
    """Yields what is made of the masked weight with nothing but steps and transpositions."""
    for user in node.users:
        step = step_of(user)
        if step is not None:
            path: Path = ((*steps, step), flipped)
        elif transposes(user) or keeps(user):
            path = steps, flipped ^ transposes(user)
        else:
            continue
        yield user, path
        yield from _same_values(user, *path)


def _find_gradients(
    found: WeightUses, node: fx.Node, reader: fx.Node, flipped: bool, taken: Collection[fx.Node]
) -> bool:
    """Adds the products that a gradient is made of, and returns whether there are any."""
    if len(node.users) != 1 or reader not in node.users:
        return False
    if node.target is aten.mm.default and node not in taken:
        found.gradients.append(Gradient(node, flipped))
        return True
    if not (transposes(node) or step_of(node) or keeps(node) or adds(node)):
        return False
    flipped ^= transposes(node)
    inside = [_find_gradients(found, x, node, flipped, taken) for x in node.all_input_nodes]
    if any(inside):
        found.between.add(node)
    return any(inside)
