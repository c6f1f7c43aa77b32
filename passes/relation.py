"""How an op's dimensions correspond: the one thing the support analysis asks of an op.

A rule gives every dimension of every operand and output a label. Dimensions with the same label
run together, position by position, so they can be cut to the same kept set:

    mm(a, b):  a [m, k], b [k, n] -> [m, n], contracting k

From the labels alone follow the zero facts, the need facts and the compact form of the op.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import fx

from .facts import NOTHING, Facts


@dataclasses.dataclass(frozen=True)
class Factor:
    """A label's share of a dimension."""

    label: int
    inner: int = 1
    """Consecutive positions of the dimension that one position of the label covers."""


Dims = tuple[tuple[Factor, ...], ...]
"""One entry a dimension: the labels whose product it is, outermost first; empty for none."""

ZeroRule = Callable[[Sequence[Facts]], Facts]
"""From every operand's zero facts along one label to the output's."""


def any_of(facts: Sequence[Facts]) -> Facts:
    """Products: zero where any operand is."""
    result = NOTHING
    for fact in facts:
        result = result | fact
    return result


def all_of(facts: Sequence[Facts]) -> Facts:
    """Sums: zero where all operands are."""
    result = facts[0]
    for fact in facts[1:]:
        result = result & fact
    return result


def never(facts: Sequence[Facts]) -> Facts:
    """Functions with f(0) != 0."""
    return NOTHING


@dataclasses.dataclass(frozen=True)
class Output:
    """One output of an op."""

    dims: Dims
    zero: ZeroRule
    contracts: tuple[int, ...] = ()
    """Operands whose product it sums over the labels that it does not have itself."""


@dataclasses.dataclass(frozen=True)
class Relation:
    """The labels of one op."""

    operands: tuple[Dims, ...]
    """One for every tensor operand, in the order of `tensor_operands`."""
    outputs: tuple[Output | None, ...]
    """None for an output that is not computed."""
    sizes: tuple[int, Dims] | None = None
    """Position of an argument that lists sizes, and the labels of that list."""
    product_flops: int | torch.SymInt = 0
    """FLOPs of each point of the label space; 0 for everything but products."""
    fixed_flops: int | torch.SymInt = 0
    """FLOPs that no label shrinks, such as those of a recurrence."""


def dims(*labels: int | None) -> Dims:
    """Returns dimensions that have one label each, or none."""
    return tuple(() if label is None else (Factor(label),) for label in labels)


def tensor_operands(node: fx.Node) -> list[fx.Node]:
    """Returns the tensor operands, one entry for each place that one stands in."""
    return [arg for arg in _nodes_in((node.args, node.kwargs)) if is_tensor(arg)]


def is_tensor(node: fx.Node) -> bool:
    """Returns whether the node stands for one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def shape_of(node: fx.Node) -> tuple[int | torch.SymInt, ...]:
    """Returns the sizes of the tensor that the node stands for."""
    return tuple(node.meta["val"].shape)


def _nodes_in(value: object) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _nodes_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _nodes_in(item)
