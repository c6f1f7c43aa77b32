"""Gathers and scatters: the dimensions that are not indexed run together."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..cut_graphs import size_hint
from ..relation import Dims, Factor, Output, Relation, dims, never, shape_of, tensor_operands
from .pointwise import first


def embedding(node: fx.Node) -> Relation | None:
    """``weight[v, c]`` at ``indices`` -> ``[*indices, c]``.

    Opaque where there are more words than are looked up: to cut what was looked up moves less than
    to cut the weight, and to expand its gradient.
    """
    weight, indices = tensor_operands(node)
    if _elements(indices) < size_hint(shape_of(weight)[0]):
        return None
    rank = len(shape_of(indices))
    where: Dims = tuple((Factor(1 + d),) for d in range(rank))
    return Relation((dims(None, 0), where), (Output((*where, (Factor(0),)), first),))


def embedding_dense_backward(node: fx.Node) -> Relation | None:
    """``grad[*indices, c]`` -> ``[v, c]``, opaque where `embedding` is."""
    grad_, indices = tensor_operands(node)
    if _elements(indices) < size_hint(shape_of(node)[0]):
        return None
    rank = len(shape_of(grad_))
    grad: Dims = ((),) * (rank - 1) + ((Factor(0),),)
    return Relation((grad, ((),) * (rank - 1)), (Output(dims(None, 0), first),))


def index(node: fx.Node) -> Relation | None:
    """``x[indices]`` with a list of integer tensors or None, one for each leading dimension."""
    placed = _indexed(node)
    if placed is None:
        return None
    operands = tensor_operands(node)
    x, out = _index_dims(len(shape_of(operands[0])), len(shape_of(node)), placed)
    others: list[Dims] = [((),) * len(shape_of(i)) for i in operands[1:]]
    return Relation((x, *others), (Output(out, first),))


def index_put(node: fx.Node) -> Relation | None:
    """``x`` with ``values`` put, or added, at ``indices``."""
    placed = _indexed(node)
    if placed is None:
        return None
    x, *indices, values = tensor_operands(node)
    rank = len(shape_of(x))
    index_rank = max(len(shape_of(i)) for i in indices)
    whole, picked = _index_dims(rank, rank - len(placed) + index_rank, placed)
    value_shape = shape_of(values)
    if len(value_shape) > len(picked):
        return None
    aligned = list(picked[len(picked) - len(value_shape) :])
    for d, size in enumerate(value_shape):
        if aligned[d] and not statically_known_true(size == shape_of(x)[aligned[d][0].label]):
            aligned[d] = ()
    others: list[Dims] = [((),) * len(shape_of(i)) for i in indices]
    out = Output(whole, lambda facts: facts[0] & facts[-1])
    return Relation((whole, *others, tuple(aligned)), (out,))


def gather(node: fx.Node) -> Relation | None:
    """``gather(x, dim, index)``."""
    x, index_ = tensor_operands(node)
    labels = _along(node, x, index_)
    return None if labels is None else Relation((labels, labels), (Output(labels, first),))


def scatter(node: fx.Node) -> Relation | None:
    """``scatter(x, dim, index, source)``, ``scatter_add``; a number as source is not zero."""
    x, index_, *source = tensor_operands(node)
    if not source:
        return None
    labels = _along(node, x, index_, *source)
    if labels is None:
        return None
    return Relation((labels,) * 3, (Output(labels, lambda facts: facts[0] & facts[2]),))


def channelwise(node: fx.Node) -> Relation | None:
    """Pooling and its backward: every channel of every image by itself, or of the only image."""
    value = node.meta["val"]
    values = [value] if isinstance(value, torch.Tensor) else list(value)
    operands = tensor_operands(node)
    rank = len(shape_of(operands[0]))
    outer = rank - _spatial(node)
    if any(len(shape_of(x)) != rank for x in operands) or outer not in (1, 2):
        return None
    labels: Dims = tuple((Factor(d),) if d < outer else () for d in range(rank))
    for x in operands:
        for d in range(outer):
            if not statically_known_true(shape_of(x)[d] == shape_of(operands[0])[d]):
                return None
    # Positions of a maximum are numbers like any other: 0 does not mean nothing there.
    outputs = tuple(
        Output(labels, first if output.dtype.is_floating_point else never) for output in values
    )
    return Relation((labels,) * len(operands), outputs)


def _elements(node: fx.Node) -> int:
    """Returns the elements of a tensor, at the sizes of the example call."""
    return math.prod(map(size_hint, shape_of(node)))


def _spatial(node: fx.Node) -> int:
    """Returns over how many dimensions an op pools."""
    name: str = node.target._schema.name  # type: ignore[union-attr]
    if name.startswith("prims::_low_memory"):
        kernel: Any = node.args[1]
        return len(kernel)
    return 3 if "pool3d" in name else 2


def _indexed(node: fx.Node) -> list[int] | None:
    """Positions of the dimensions that are indexed; None where a mask makes sizes unknown."""
    indices: Any = node.args[1]
    placed = [d for d, i in enumerate(indices) if i is not None]
    masks = (torch.bool, torch.uint8)
    if not placed or any(indices[d].meta["val"].dtype in masks for d in placed):
        return None
    return placed


def _index_dims(rank: int, out_rank: int, placed: list[int]) -> tuple[Dims, Dims]:
    """Labels of x and of ``x[indices]``: a run of indices stays in place, else it comes first."""
    free = [d for d in range(rank) if d not in placed]
    index_rank = out_rank - len(free)
    adjacent = placed[-1] - placed[0] + 1 == len(placed)
    start = placed[0] if adjacent else 0
    out: list[tuple[Factor, ...]] = [(Factor(d),) for d in free]
    out[start:start] = [()] * index_rank
    whole = tuple(() if d in placed else (Factor(d),) for d in range(rank))
    return whole, tuple(out)


def _along(node: fx.Node, *tensors: fx.Node) -> Dims | None:
    rank = len(shape_of(tensors[0]))
    dim: Any = node.args[1]
    if rank == 0 or any(len(shape_of(x)) != rank for x in tensors):
        return None
    labels: list[tuple[Factor, ...]] = []
    for d in range(rank):
        same = all(
            statically_known_true(shape_of(x)[d] == shape_of(tensors[0])[d]) for x in tensors
        )
        labels.append((Factor(d),) if same and d != dim % rank else ())
    return tuple(labels)
