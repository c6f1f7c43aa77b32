"""Layout ops: a dimension that survives whole keeps its label, merged and split ones theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..relation import (
    Dims,
    Factor,
    Output,
    Relation,
    all_of,
    any_of,
    never,
    shape_of,
    tensor_operands,
)

aten = torch.ops.aten

Size = int | torch.SymInt


def permute(node: fx.Node) -> Relation:
    """``permute(x, order)``."""
    rank = len(shape_of(node))
    order: Any = node.args[1]
    return _relabel(tuple((Factor(d),) for d in range(rank)), [(Factor(d % rank),) for d in order])


def transpose(node: fx.Node) -> Relation:
    """``transpose(x, a, b)``, and ``t(x)`` with its implied dimensions."""
    rank = len(shape_of(node))
    order = list(range(rank))
    a, b = node.args[1:3] if len(node.args) > 1 else (0, 1)
    if rank > 1:
        order[a], order[b] = order[b], order[a]  # type: ignore[index]
    return _relabel(tuple((Factor(d),) for d in range(rank)), [(Factor(d),) for d in order])


def view(node: fx.Node) -> Relation:
    """``view``, ``reshape`` and all others that only regroup sizes, such as (un)squeeze.

    ``[N, C, H, W] -> [N * C, H * W]`` gives the first output dimension the labels of N and C.
    """
    source, target = shape_of(tensor_operands(node)[0]), shape_of(node)
    operand: list[tuple[Factor, ...]] = [()] * len(source)
    out: list[tuple[Factor, ...]] = [()] * len(target)
    label = 0
    for sources, targets in _groups(source, target):
        if len(sources) == len(targets) == 1:
            operand[sources[0]] = out[targets[0]] = (Factor(label),)
            label += 1
        elif len(targets) == 1:
            label = _merge(source, sources, operand, out, targets[0], label)
        elif len(sources) == 1:
            label = _merge(target, targets, out, operand, sources[0], label)
    dims_out = tuple(out)
    lists_sizes = len(node.args) > 1 and isinstance(node.args[1], (list, tuple))
    lists_sizes = lists_sizes and len(node.args[1]) == len(target) and node.target not in SQUEEZES  # type: ignore[arg-type]
    return Relation(
        (tuple(operand),),
        (Output(dims_out, any_of),),
        (1, dims_out) if lists_sizes else None,
    )


SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)


def squeezed_dims(node: fx.Node) -> list[int]:
    """Returns the dimensions that a squeeze removes."""
    shape = shape_of(tensor_operands(node)[0])
    dims: Any = node.args[1] if len(node.args) > 1 else range(len(shape))
    asked = {d % len(shape) for d in ([dims] if isinstance(dims, int) else dims) if shape}
    return [d for d in sorted(asked) if statically_known_true(shape[d] == 1)]


def expand(node: fx.Node) -> Relation:
    """``expand``: a dimension that is made longer has a label of its own."""
    source, target = shape_of(tensor_operands(node)[0]), shape_of(node)
    offset = len(target) - len(source)
    out: Dims = tuple((Factor(d),) for d in range(len(target)))
    operand: list[tuple[Factor, ...]] = []
    for d, size in enumerate(source, start=offset):
        if statically_known_true(size == target[d]):
            operand.append((Factor(d),))
        elif statically_known_true(size == 1):
            operand.append(())
        else:
            operand.append(())
            out = (*out[:d], (), *out[d + 1 :])
    return Relation((tuple(operand),), (Output(out, any_of),), (1, out))


def cat(node: fx.Node) -> Relation:
    """``cat``: the other dimensions run together."""
    operands = tensor_operands(node)
    rank = len(shape_of(node))
    labels = _all_but(rank, _int(node, 1, "dim", 0))
    legacy_empty: Dims = ((),)
    return Relation(
        tuple(labels if len(shape_of(x)) == rank else legacy_empty for x in operands),
        (Output(labels, all_of),),
    )


def split(node: fx.Node) -> Relation:
    """``split``, ``split_with_sizes``: many outputs, the other dimensions run together."""
    rank = len(shape_of(tensor_operands(node)[0]))
    labels = _all_but(rank, _int(node, 2, "dim", 0))
    return Relation((labels,), (Output(labels, any_of),) * len(node.meta["val"]))


def unbind(node: fx.Node) -> Relation:
    """``unbind``: many outputs without the dimension."""
    rank = len(shape_of(tensor_operands(node)[0]))
    dim = _int(node, 1, "dim", 0) % rank
    labels = _all_but(rank, dim)
    out = Output(labels[:dim] + labels[dim + 1 :], any_of)
    return Relation((labels,), (out,) * len(node.meta["val"]))


def slice_(node: fx.Node) -> Relation:
    """``slice``: the other dimensions run together, and the sliced one if all of it is taken."""
    source, target = shape_of(tensor_operands(node)[0]), shape_of(node)
    dim = _int(node, 1, "dim", 0)
    whole = statically_known_true(source[dim] == target[dim])
    # A slice that takes everything by an explicit end would cut nothing from a compact one.
    labels = _all_but(len(source), None if whole else dim)
    return Relation((labels,), (Output(labels, any_of),))


def select(node: fx.Node) -> Relation:
    """``select(x, dim, index)``."""
    rank = len(shape_of(tensor_operands(node)[0]))
    dim = _int(node, 1, "dim", 0) % rank
    labels = _all_but(rank, dim)
    return Relation((labels,), (Output(labels[:dim] + labels[dim + 1 :], any_of),))


def select_scatter(node: fx.Node) -> Relation:
    """``select_scatter(x, source, dim, index)``."""
    rank = len(shape_of(node))
    dim = _int(node, 2, "dim", 0) % rank
    labels = _all_but(rank, dim)
    return Relation((labels, labels[:dim] + labels[dim + 1 :]), (Output(labels, all_of),))


def slice_scatter(node: fx.Node) -> Relation:
    """``slice_scatter(x, source, dim, start, end)``."""
    labels = _all_but(len(shape_of(node)), _int(node, 2, "dim", 0))
    return Relation((labels, labels), (Output(labels, all_of),))


def flip(node: fx.Node) -> Relation:
    """``flip(x, dims)``."""
    rank = len(shape_of(node))
    flipped: Any = node.args[1]
    mixed = {d % rank for d in flipped}
    labels: Dims = tuple(() if d in mixed else (Factor(d),) for d in range(rank))
    return Relation((labels,), (Output(labels, any_of),))


def pad(node: fx.Node) -> Relation:
    """``constant_pad_nd(x, pad, value)``: dimensions that are not padded run together."""
    rank = len(shape_of(node))
    amounts: Any = node.args[1]
    value = node.args[2] if len(node.args) > 2 else node.kwargs.get("value", 0)
    labels: list[tuple[Factor, ...]] = [(Factor(d),) for d in range(rank)]
    for pair in range(len(amounts) // 2):
        before, after = amounts[2 * pair : 2 * pair + 2]
        if not (isinstance(before, int) and isinstance(after, int) and before == after == 0):
            labels[rank - 1 - pair] = ()
    return Relation((tuple(labels),), (Output(tuple(labels), never if value else any_of),))


def _relabel(operand: Dims, out: Sequence[tuple[Factor, ...]]) -> Relation:
    return Relation((operand,), (Output(tuple(out), any_of),))


def _all_but(rank: int, dim: int | None) -> Dims:
    excluded = None if dim is None or rank == 0 else dim % rank
    return tuple(() if d == excluded else (Factor(d),) for d in range(rank))


def _int(node: fx.Node, position: int, name: str, default: int) -> int:
    value = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
    assert isinstance(value, int)
    return value


def _merge(
    parts: Sequence[Size],
    positions: Sequence[int],
    part_dims: list[tuple[Factor, ...]],
    whole_dims: list[tuple[Factor, ...]],
    whole: int,
    label: int,
) -> int:
    """Labels several dimensions on one side and their product on the other.

    What lies inside a symbolic size covers an unknown number of positions and gets no label.
    """
    factors: list[Factor] = []
    inner = 1
    for position in reversed(positions):
        part_dims[position] = (Factor(label),)
        factors.append(Factor(label, inner))
        label += 1
        size = parts[position]
        if not isinstance(size, int) or size == 0:
            break
        inner *= size
    whole_dims[whole] = tuple(reversed(factors))
    return label


def _groups(source: Sequence[Size], target: Sequence[Size]) -> list[tuple[list[int], list[int]]]:
    """Pairs the shortest runs of dimensions on both sides that have the same product."""
    at_source, source = _longer_than_one(source)
    at_target, target = _longer_than_one(target)
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(source) and j < len(target):
        sources, targets = [i], [j]
        left, right = _expr(source[i]), _expr(target[j])
        while left != right:
            if _divides(left, right) and sources[-1] + 1 < len(source):
                sources.append(sources[-1] + 1)
                left = left * _expr(source[sources[-1]])
            elif _divides(right, left) and targets[-1] + 1 < len(target):
                targets.append(targets[-1] + 1)
                right = right * _expr(target[targets[-1]])
            elif (
                left.is_number
                and right.is_number
                and left < right
                and sources[-1] + 1 < len(source)
            ):
                sources.append(sources[-1] + 1)
                left = left * _expr(source[sources[-1]])
            elif (
                left.is_number
                and right.is_number
                and right < left
                and targets[-1] + 1 < len(target)
            ):
                targets.append(targets[-1] + 1)
                right = right * _expr(target[targets[-1]])
            else:
                return groups
        groups.append(([at_source[k] for k in sources], [at_target[k] for k in targets]))
        i, j = sources[-1] + 1, targets[-1] + 1
    return groups


def _longer_than_one(sizes: Sequence[Size]) -> tuple[list[int], list[Size]]:
    """Returns the dimensions that are not known to have size 1, and their sizes."""
    dims = [d for d, size in enumerate(sizes) if not statically_known_true(size == 1)]
    return dims, [sizes[d] for d in dims]


def _expr(size: Size) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _divides(part: Any, whole: Any) -> bool:
    return bool(part != 0 and (whole / part).as_numer_denom()[1] == 1)
