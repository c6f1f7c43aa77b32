"""Finds the rows of every tensor, and which ops can be computed group of rows by group of rows.

Rows are the positions of the first dimension of a dropout's mask: samples or tokens. They run
through the graph by the labels of `Relation`, so a tensor may have them in any dimension, and as
the outer factor of one: ``[b, t, c] -> [b * t, c]`` keeps the rows of ``b``. A group is a run of
consecutive rows, the same number for each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .group_ops import LIFTED, rewrite_of
from .relation import Dims, Relation, is_tensor, shape_of, tensor_operands

Size = int | torch.SymInt


@dataclasses.dataclass(frozen=True)
class RowGroups:
    """Where the rows are, and what can be done with groups of them."""

    groups: int
    """How many groups, at least 2."""
    dims: Mapping[fx.Node, int]
    """The dimension of every tensor that has rows in it."""
    ops: Mapping[fx.Node, int | None]
    """The ops that can be computed group by group, and those of weights that come along: the label
    of their rows, None where they have none."""

    def run(self, node: fx.Node, relation: Relation, label: int) -> bool:
        """Returns whether a label of an op can be cut for each group by itself."""
        return node in self.ops and self.ops[node] != label

    def sums(self, node: fx.Node) -> bool:
        """Returns whether an op sums over the rows: every group has a part of the result."""
        return node not in self.dims and any(x in self.dims for x in tensor_operands(node))


def find_row_groups(
    relations: Mapping[fx.Node, Relation], masks: Collection[fx.Node], groups: int
) -> RowGroups:
    """Follows the rows of some masks through a graph.

    Args:
        relations: the labels of its ops.
        masks: dropout masks whose first dimension, of rows, ``groups`` divides.
        groups: how many groups, at least 2.
    """
    dims = _row_dims(relations, masks)
    ops = {
        node: _row_label(node, relation, dims)
        for node, relation in relations.items()
        if _by_groups(node, relation, dims, groups)
    }
    return RowGroups(groups, dims, ops)


def _row_dims(
    relations: Mapping[fx.Node, Relation], masks: Collection[fx.Node]
) -> dict[fx.Node, int]:
    """Returns the dimension with rows of every tensor that the masks' rows reach."""
    dims = dict.fromkeys(masks, 0)
    waiting = list(masks)
    while waiting:
        tensor = waiting.pop()
        for op in (tensor, *tensor.users):
            relation = relations.get(op)
            label = None if relation is None else _row_label(op, relation, dims)
            if relation is None or label is None:
                continue
            for other, labelled in _tensors(op, relation):
                places = _places(labelled, label)
                outermost = len(places) == 1 and labelled[places[0]][0].label == label
                if other not in dims and outermost:
                    dims[other] = places[0]
                    waiting.append(other)
    return dims


def _row_label(op: fx.Node, relation: Relation, dims: Mapping[fx.Node, int]) -> int | None:
    """Returns the label that all rows known so far have in an op."""
    labels: set[int | None] = set()
    for tensor, labelled in _tensors(op, relation):
        if tensor in dims:
            factors = labelled[dims[tensor]]
            labels.add(factors[0].label if factors else None)
    return labels.pop() if len(labels) == 1 else None


def _by_groups(op: fx.Node, relation: Relation, dims: Mapping[fx.Node, int], groups: int) -> bool:
    """Returns whether an op can be computed group by group.

    1. All its rows are one label, and whatever has the label has it as rows.
    2. The label is as long on all of them, and the groups divide it.
    3. The op has a form for groups. One that sums over the rows is a product or a sum.
    """
    tensors = list(_tensors(op, relation))
    if not is_tensor(op) or not tensors:
        return False
    if not any(tensor in dims for tensor, _ in tensors):
        return op.target in LIFTED
    label = _row_label(op, relation, dims)
    if label is None:
        return False
    sizes: list[Size] = []
    for tensor, labelled in tensors:
        places = _places(labelled, label)
        if places != ([dims[tensor]] if tensor in dims else []):
            return False
        if places:
            sizes.append(shape_of(tensor)[places[0]] // labelled[places[0]][0].inner)
    if not all(statically_known_true(size == sizes[0]) for size in sizes):
        return False
    if not statically_known_true(sizes[0] % groups == 0):
        return False
    return rewrite_of(op, dims.get(op), op not in dims) is not None


def _tensors(op: fx.Node, relation: Relation) -> Iterator[tuple[fx.Node, Dims]]:
    """Yields the operands of an op and its result, if it is one, with their labels."""
    if is_tensor(op):
        yield from zip(tensor_operands(op), relation.operands, strict=True)
        output = relation.outputs[0]
        assert output is not None
        yield op, output.dims


def _places(labelled: Dims, label: int) -> list[int]:
    """Returns the dimensions that have a label."""
    return [d for d, factors in enumerate(labelled) if any(f.label == label for f in factors)]
