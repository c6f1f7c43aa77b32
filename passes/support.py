"""Finds which parts of every tensor are zero, and which parts nobody reads.

Two facts per tensor dimension, each naming kept axes (`KeptAxis`):

- *zero*: the tensor is zero outside the kept set. Flows forward, from the masks.
- *need*: nobody reads the tensor outside the kept set. Flows backward, from the users.

They meet in products: where one operand is zero along the contracted dimension, only the kept
part of the other is needed. The graph is acyclic, so one sweep each way is the fixpoint. Every
candidate (dropout, dimension) is analysed at once: the facts of one do not depend on another's.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import fx

from .facts import EVERYTHING, NOTHING, Everything, Facts, KeptAxis
from .relation import Dims, Factor, Output, Relation, is_tensor, shape_of, tensor_operands
from .rules import relation_of

Form = tuple[KeptAxis | None, ...]
"""How a tensor is stored: for every dimension, the kept axis it is cut to."""

aten = torch.ops.aten


class Support:
    """The facts of one graph.

    Args:
        graph: an ATen graph, forward alone or forward and backward together.
        masks: the mask nodes, each with the kept axes of the dimensions that could be dropped.
    """

    def __init__(self, graph: fx.Graph, masks: Mapping[fx.Node, Mapping[int, KeptAxis]]) -> None:
        self.masks = masks
        self.relations: dict[fx.Node, Relation] = {}
        self._zero: dict[fx.Node, list[tuple[Facts, ...]]] = {}
        self._labels: dict[fx.Node, dict[int, Facts]] = {}
        self._need: dict[fx.Node, tuple[Facts, ...]] = {}
        nodes = list(graph.nodes)
        for node in nodes:
            self._find_zeros(node)
        for node in reversed(nodes):
            self._find_needs(node)

    def zero(self, node: fx.Node) -> tuple[Facts, ...]:
        """Returns, for every dimension, the kept axes outside of which the tensor is zero."""
        source, index = _producer(node)
        facts = self._zero.get(source)
        return (NOTHING,) * len(shape_of(node)) if facts is None else facts[index]

    def need(self, node: fx.Node) -> tuple[Facts, ...]:
        """Returns, for every dimension, the kept axes outside of which nobody reads the tensor."""
        return self._need[node]

    def labels(self, node: fx.Node) -> Mapping[int, Facts]:
        """Returns, for every label of the node's relation, the kept axes it can be cut to."""
        return self._labels.get(node, {})

    def every_facts(self) -> Iterator[Facts]:
        """Yields what holds, zero or need, for each dimension of each tensor and each label."""
        for node, need in self._need.items():
            for of_zero, of_need in zip(self.zero(node), need, strict=True):
                yield _finite(of_zero) | of_need
        for labels in self._labels.values():
            yield from labels.values()

    def form(self, node: fx.Node, chosen: Collection[KeptAxis]) -> Form:
        """Returns how the node's result is stored if the ``chosen`` dimensions are dropped.

        ``chosen`` has one axis for every dropout that is structured, with ``inner`` 1.
        """
        if node in self.masks:
            return tuple(_pick(facts, chosen) for facts in self.zero(node))
        source, index = _producer(node)
        relation = self.relations.get(source)
        output = relation.outputs[index] if relation else None
        if output is None:
            return (None,) * len(shape_of(node))
        return self.dims_form(source, output.dims, chosen)

    def operand_forms(self, node: fx.Node, chosen: Collection[KeptAxis]) -> list[Form]:
        """Returns how the node wants its tensor operands, in the order of `tensor_operands`."""
        relation = self.relations.get(node)
        if relation is None:
            return [(None,) * len(shape_of(x)) for x in tensor_operands(node)]
        return [self.dims_form(node, dims, chosen) for dims in relation.operands]

    def dims_form(self, node: fx.Node, dims: Dims, chosen: Collection[KeptAxis]) -> Form:
        """Returns the forms of dimensions labelled by the node's relation."""
        labels = self._labels[node]
        form: list[KeptAxis | None] = []
        for factors in dims:
            picked = None
            for factor in factors:
                axis = _pick(labels.get(factor.label, NOTHING), chosen)
                picked = picked or (axis and axis.scaled(axis.inner * factor.inner))
            form.append(picked)
        return tuple(form)

    def _find_zeros(self, node: fx.Node) -> None:
        if node in self.masks:
            axes = self.masks[node]
            rank = len(shape_of(node))
            self._zero[node] = [
                tuple(Facts([axes[d]]) if d in axes else NOTHING for d in range(rank))
            ]
            return
        if is_zero(node):
            self._zero[node] = [(EVERYTHING,) * len(shape_of(node))]
            return
        relation = relation_of(node)
        if relation is None:
            return
        self.relations[node] = relation
        values = node.meta["val"]
        values = [values] if isinstance(values, torch.Tensor) else values
        self._zero[node] = [
            (NOTHING,) * (0 if value is None else len(value.shape))
            if output is None
            else self._output_zeros(node, relation, output)
            for output, value in zip(relation.outputs, values, strict=True)
        ]

    def _output_zeros(self, node: fx.Node, relation: Relation, output: Output) -> tuple[Facts, ...]:
        by_label = {
            factor.label: output.zero(self._operand_zeros(node, relation, factor.label))
            for factors in output.dims
            for factor in factors
        }
        return tuple(_from_labels(factors, by_label) for factors in output.dims)

    def _operand_zeros(self, node: fx.Node, relation: Relation, label: int) -> list[Facts]:
        """Returns every operand's zero facts along one label."""
        return [
            EVERYTHING
            if is_zero(operand)
            else self._along(relation, node, dims, self.zero(operand), label)
            for operand, dims in zip(tensor_operands(node), relation.operands, strict=True)
        ]

    def _along(
        self, relation: Relation, node: fx.Node, dims: Dims, facts: tuple[Facts, ...], label: int
    ) -> Facts:
        for factors, of_dim in zip(dims, facts, strict=True):
            for factor in factors:
                if factor.label == label:
                    return _to_label(of_dim, factor, factors, _label_size(relation, node, label))
        return NOTHING

    def _find_needs(self, node: fx.Node) -> None:
        if is_tensor(node):
            self._need[node] = self._need_of(node)
        relation = self.relations.get(node)
        if relation is not None:
            self._labels[node] = {
                label: self._label_facts(node, relation, label) for label in _labels_of(relation)
            }

    def _need_of(self, node: fx.Node) -> tuple[Facts, ...]:
        need: list[Facts] = [EVERYTHING] * len(shape_of(node))
        for user in node.users:
            if user.target is aten.sym_size.int or user in self.masks:
                continue  # sizes are known without the values
            relation = self.relations.get(user)
            if relation is None:
                return (NOTHING,) * len(need)
            for operand, dims in zip(tensor_operands(user), relation.operands, strict=True):
                if operand is node:
                    need = [
                        have & _from_labels(factors, self._labels[user])
                        for have, factors in zip(need, dims, strict=True)
                    ]
        # What nobody reads will be removed; until then it is as good as dense.
        return tuple(NOTHING if isinstance(facts, Everything) else facts for facts in need)

    def _label_facts(self, node: fx.Node, relation: Relation, label: int) -> Facts:
        """Returns the kept axes that every live output lets the label be cut to."""
        result: Facts = EVERYTHING
        zeros = None
        for index, output in enumerate(relation.outputs):
            needs = self._output_needs(node, index)
            if output is None or needs is None:
                continue
            if any(factor.label == label for factors in output.dims for factor in factors):
                zero = self._along(relation, node, output.dims, self._zero[node][index], label)
                need = self._along(relation, node, output.dims, needs, label)
                result = result & (_finite(zero) | need)
            else:
                zeros = zeros or self._operand_zeros(node, relation, label)
                summed = [i for i in output.contracts if _has(relation.operands[i], label)]
                if summed:
                    either = NOTHING
                    for i in summed:
                        either = either | _finite(zeros[i])
                    result = result & either
        return _finite(result)

    def _output_needs(self, node: fx.Node, index: int) -> tuple[Facts, ...] | None:
        """Returns the need facts of one output, None where nothing uses it."""
        if is_tensor(node):
            return self._need[node]
        found: tuple[Facts, ...] | None = None
        for user in node.users:
            if user.target is not operator.getitem:
                return (NOTHING,) * len(node.meta["val"][index].shape)
            if user.args[1] == index and user.users:
                need = self._need[user]
                found = (
                    need
                    if found is None
                    else tuple(a & b for a, b in zip(found, need, strict=True))
                )
        return found


def is_zero(node: fx.Node) -> bool:
    """Returns whether the node is a constant that is zero everywhere."""
    if node.target in (aten.full.default, aten.scalar_tensor.default):
        value = node.args[1] if node.target is aten.full.default else node.args[0]
        return isinstance(value, (int, float)) and value == 0
    return False


def axes_in(facts: Iterable[Facts]) -> set[KeptAxis]:
    """Returns all kept axes, as their dropout sees them."""
    return {axis.scaled(1) for of_dim in facts for axis in of_dim}


def _producer(node: fx.Node) -> tuple[fx.Node, int]:
    """Returns the op that computes the tensor, and which of its outputs it is."""
    if node.target is operator.getitem:
        source, index = node.args
        assert isinstance(source, fx.Node)
        assert isinstance(index, int)
        return source, index
    return node, 0


def _pick(facts: Facts, chosen: Collection[KeptAxis]) -> KeptAxis | None:
    return min((axis for axis in facts if axis.scaled(1) in chosen), default=None)


def _finite(facts: Facts) -> Facts:
    return NOTHING if isinstance(facts, Everything) else facts


def _has(dims: Dims, label: int) -> bool:
    return any(factor.label == label for factors in dims for factor in factors)


def _labels_of(relation: Relation) -> set[int]:
    every = [*relation.operands, *(output.dims for output in relation.outputs if output)]
    return {factor.label for dims in every for factors in dims for factor in factors}


def _label_size(relation: Relation, node: fx.Node, label: int) -> int | torch.SymInt | None:
    """Returns the size of a label: of a dimension that it has for itself."""
    sides = [
        (dims, shape_of(operand))
        for operand, dims in zip(tensor_operands(node), relation.operands, strict=True)
    ]
    values = node.meta["val"]
    values = [values] if isinstance(values, torch.Tensor) else values
    sides += [
        (output.dims, tuple(value.shape))
        for output, value in zip(relation.outputs, values, strict=True)
        if output and value is not None
    ]
    for dims, shape in sides:
        for factors, size in zip(dims, shape, strict=True):
            if factors == (Factor(label),):
                return size
    return None


def _to_label(
    facts: Facts, factor: Factor, factors: tuple[Factor, ...], size: int | torch.SymInt | None
) -> Facts:
    """Moves facts from a dimension to one of the labels it is made of."""
    if isinstance(facts, Everything) or factors == (Factor(factor.label),):
        return facts
    if not isinstance(size, int):
        return NOTHING
    return Facts(
        axis.scaled(axis.inner // factor.inner)
        for axis in facts
        if axis.inner % factor.inner == 0 and size % (axis.size * (axis.inner // factor.inner)) == 0
    )


def _from_labels(factors: tuple[Factor, ...], by_label: Mapping[int, Facts]) -> Facts:
    """Moves facts from labels to the dimension that they make up."""
    result = NOTHING
    for factor in factors:
        facts = by_label.get(factor.label, NOTHING)
        if isinstance(facts, Everything):
            return facts
        result = result | Facts(axis.scaled(axis.inner * factor.inner) for axis in facts)
    return result
