"""Reductions: the dimensions that stay run together; a sum reads only what is not zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..relation import (
    Dims,
    Factor,
    Output,
    Relation,
    ZeroRule,
    any_of,
    never,
    shape_of,
    tensor_operands,
)

aten = torch.ops.aten


def sum_(node: fx.Node) -> Relation | None:
    """A sum contracts the dimensions it reduces."""
    return _reduce(node, any_of, contracts=True, outputs=1)


def keep_zero(node: fx.Node) -> Relation | None:
    """Reductions of zeros that give zero; what they reduce over has to be whole."""
    return _reduce(node, any_of, contracts=False, outputs=1)


def average(node: fx.Node) -> Relation | None:
    """Mean or variance: zero unless it divides by nothing."""
    return _reduce(node, any_of if _has_divisor(node) else never, contracts=False, outputs=1)


def var_mean(node: fx.Node) -> Relation | None:
    """Variance and mean, two outputs."""
    return _reduce(node, any_of if _has_divisor(node) else never, contracts=False, outputs=2)


def unknown(node: fx.Node) -> Relation | None:
    """Reductions of zeros that may give something else."""
    return _reduce(node, never, contracts=False, outputs=1)


def along(node: fx.Node) -> Relation | None:
    """Ops that mix positions along one dimension and keep the shape, such as cumsum, softmax."""
    rank = len(shape_of(tensor_operands(node)[0]))
    mixed = node.args[1] % rank if rank else 0  # type: ignore[operator]
    labels: Dims = tuple(() if dim == mixed else (Factor(dim),) for dim in range(rank))
    return Relation((labels,), (Output(labels, never),))


def _reduce(node: fx.Node, zero: ZeroRule, *, contracts: bool, outputs: int) -> Relation | None:
    rank = len(shape_of(tensor_operands(node)[0]))
    reduced = _reduced(node)
    if reduced is None:
        return None
    keepdim = _arguments(node).get("keepdim", False)
    operand = tuple((Factor(d),) if contracts or d not in reduced else () for d in range(rank))
    out = tuple(
        () if d in reduced else (Factor(d),) for d in range(rank) if keepdim or d not in reduced
    )
    return Relation((operand,), (Output(out, zero, (0,) if contracts else ()),) * outputs)


def _reduced(node: fx.Node) -> set[int] | None:
    """Returns the dimensions that are reduced, None where that cannot be told."""
    rank = len(shape_of(tensor_operands(node)[0]))
    dim = _arguments(node).get("dim")
    if isinstance(dim, int):
        dim = [dim]
    if dim is not None and not isinstance(dim, Sequence):
        return None
    if dim is None or (not dim and node.target not in _NONE_FOR_EMPTY):
        return set(range(rank))
    return {d % max(rank, 1) for d in dim}


# For all other ops no dimension means every one.
_NONE_FOR_EMPTY = (aten.any.dims, aten.all.dims)


def _has_divisor(node: fx.Node) -> bool:
    """Whether what a mean or variance divides by is known to be above 0."""
    shape = shape_of(tensor_operands(node)[0])
    reduced = _reduced(node)
    given = _arguments(node)
    correction = given.get("correction", int(given.get("unbiased", True)))
    if node.target.overloadpacket is aten.mean:  # type: ignore[union-attr]
        correction = 0
    count = math.prod(shape[d] for d in reduced or ())
    correction = 1 if correction is None else correction
    return statically_known_true(count > correction)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Returns the arguments given, by name."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=False)) | node.kwargs
