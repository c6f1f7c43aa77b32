"""Finds the dropouts of batches that hold one sample more than once.

Two views of a sample in one batch (contrastive learning by dropout, Gao et al. 2021, "SimCSE",
https://arxiv.org/abs/2104.08821; several passes of Monte Carlo dropout at once) differ in their
masks alone. A kept set that samples share would make them equal.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..runtime.dropout_mask import dropout_mask
from .feature_dims import forward_nodes
from .relation import Dims, Relation, is_tensor, shape_of, tensor_operands
from .rules import relation_of

aten = torch.ops.aten

Copied = frozenset[int]
"""Dimensions of a tensor along which some positions are copies of others."""


def find_copies(
    graph: fx.Graph, masks: Iterable[fx.Node], parameters: Collection[fx.Node]
) -> set[fx.Node]:
    """Returns the masks over tensors that hold copies of data.

    1. ``expand``, ``repeat`` and a ``cat`` with an operand twice copy along a dimension.
    2. A dimension stays copied through an op if it is that of every operand that has it: what
       differs from copy to copy, such as noise, makes samples of their own.
    3. A mask does not end it: one random mask would not make the next one less equal. Nor does an
       op without a rule, unless it is random.
    4. Copies of what parameters alone give, such as learned queries, are no samples.

    Copies that the caller made are not seen, nor those by an index.

    Args:
        graph: joint or forward alone.
        masks: its mask nodes.
        parameters: the placeholders that are parameters.
    """
    copied: dict[fx.Node, Copied] = {}
    data: set[fx.Node] = set()
    for node in forward_nodes(graph):
        if node.op == "placeholder":
            data |= {node} if is_tensor(node) and node not in parameters else set()
        elif not _is_size(node) and any(x in data for x in node.all_input_nodes):
            data.add(node)
            if is_tensor(node):
                copied[node] = _copied_in(node, copied)
    return {mask for mask in masks if copied.get(mask)}


def _copied_in(node: fx.Node, copied: Mapping[fx.Node, Copied]) -> Copied:
    if node.target is dropout_mask:
        return copied.get(tensor_operands(node)[0], frozenset())
    if node.target is aten.cat.default:
        return _of_cat(node, copied)
    if node.target is aten.repeat.default:
        return _of_repeat(node, copied)
    source, index = node, 0
    if node.target is operator.getitem:
        assert isinstance(node.args[0], fx.Node)
        assert isinstance(node.args[1], int)
        source, index = node.args[0], node.args[1]
    relation = relation_of(source)
    if relation is None:
        return _unknown(node, source, copied)
    output = relation.outputs[index]
    found = frozenset() if output is None else _by_labels(source, relation, output.dims, copied)
    return found | _expanded(node)


def _by_labels(
    node: fx.Node, relation: Relation, dims: Dims, copied: Mapping[fx.Node, Copied]
) -> Copied:
    """Returns the dimensions of a result that all operands which have them have copied."""
    ways: dict[int, list[bool]] = {}
    for operand, labelled in zip(tensor_operands(node), relation.operands, strict=True):
        if operand.target is dropout_mask:
            continue
        of = copied.get(operand, frozenset())
        for dim, factors in enumerate(labelled):
            for factor in factors:
                ways.setdefault(factor.label, []).append(dim in of)
    return frozenset(
        dim
        for dim, factors in enumerate(dims)
        if any(all(ways.get(factor.label, [False])) for factor in factors)
    )


def _unknown(node: fx.Node, source: fx.Node, copied: Mapping[fx.Node, Copied]) -> Copied:
    """Returns the dimensions of an op without a rule, such as a norm, that are as its first has."""
    if torch.Tag.nondeterministic_seeded in getattr(source.target, "tags", ()):
        return frozenset()
    first = tensor_operands(source)[0]
    before, after = shape_of(first), shape_of(node)
    if len(before) != len(after):
        return frozenset()
    same = (d for d in copied.get(first, ()) if statically_known_true(before[d] == after[d]))
    return frozenset(same)


def _expanded(node: fx.Node) -> Copied:
    """Returns the dimensions that ``expand`` makes of one position."""
    if node.target is not aten.expand.default:
        return frozenset()
    (source,) = tensor_operands(node)
    sizes, before = shape_of(node), shape_of(source)
    before = (1,) * (len(sizes) - len(before)) + tuple(before)
    return frozenset(d for d, size in enumerate(sizes) if _is_one(before[d]) and not _is_one(size))


def _of_repeat(node: fx.Node, copied: Mapping[fx.Node, Copied]) -> Copied:
    source, times = node.args
    assert isinstance(source, fx.Node)
    assert isinstance(times, (list, tuple))
    more = len(times) - len(shape_of(source))
    kept = frozenset(dim + more for dim in copied.get(source, ()))
    return kept | frozenset(dim for dim, count in enumerate(times) if not _is_one(count))


def _of_cat(node: fx.Node, copied: Mapping[fx.Node, Copied]) -> Copied:
    parts = tensor_operands(node)
    along = node.args[1] if len(node.args) > 1 else 0
    assert isinstance(along, int)
    along %= len(shape_of(node))
    of = [copied.get(part, frozenset()) for part in parts]
    twice = len(set(parts)) < len(parts) or any(along in dims for dims in of)
    everywhere = frozenset.intersection(*of) - {along}
    return everywhere | ({along} if twice else frozenset())


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def _is_one(size: object) -> bool:
    return isinstance(size, int) and size == 1
