"""Reductions: the dimensions that stay run together; a sum reads only what is not zero."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

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
    """Reductions of zeros that give zero; what they reduce over has to be whole (a mean counts)."""
    return _reduce(node, any_of, contracts=False, outputs=1)


def var_mean(node: fx.Node) -> Relation | None:
    """Variance and mean, two outputs."""
    return _reduce(node, any_of, contracts=False, outputs=2)


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
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if isinstance(dim, int):
        dim = [dim]
    if dim is not None and not isinstance(dim, Sequence):
        return None
    reduced = {d % max(rank, 1) for d in dim} if dim else set(range(rank))  # type: ignore[operator]
    keepdim = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    operand = tuple((Factor(d),) if contracts or d not in reduced else () for d in range(rank))
    out = tuple(
        () if d in reduced else (Factor(d),) for d in range(rank) if keepdim or d not in reduced
    )
    return Relation((operand,), (Output(out, zero, (0,) if contracts else ()),) * outputs)
