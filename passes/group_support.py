"""The support analysis where every group of rows has a kept set of its own.

A kept axis with groups says: in group i, the dimension is cut to the i-th kept set. That means
something only where the groups can be told apart, so it holds

- before the graph is rewritten, at ops that can be computed group by group (`RowGroups`),
- afterwards, at labels whose tensors all have the groups as their first dimension.

Everything else about zero and need stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Protocol

from torch import fx

from .facts import Everything, Facts, KeptAxis
from .relation import Factor, Relation, tensor_operands
from .support import Support


class Rows(Protocol):
    """Tells where groups of rows run."""

    def run(self, node: fx.Node, relation: Relation, label: int) -> bool:
        """Returns whether a label of an op can be cut for each group by itself."""

    def sums(self, node: fx.Node) -> bool:
        """Returns whether a tensor is the sum of what the groups give."""


class GroupSupport(Support):
    """The facts of one graph.

    Args:
        graph: an ATen graph.
        masks: the mask nodes, each with the kept axes of the dimensions that could be dropped;
            those with groups count where `rows` lets them.
        rows: where groups run.
    """

    def __init__(
        self,
        graph: fx.Graph,
        masks: Mapping[fx.Node, Mapping[int, KeptAxis]],
        rows: Rows,
    ) -> None:
        self._rows = rows
        super().__init__(graph, masks)

    def zero(self, node: fx.Node) -> tuple[Facts, ...]:
        """Returns the facts of a tensor; outside the kept set of one group others are not zero."""
        facts = super().zero(node)
        return tuple(map(_whole, facts)) if self._rows.sums(node) else facts

    def _need_of(self, node: fx.Node) -> tuple[Facts, ...]:
        facts = super()._need_of(node)
        return tuple(map(_whole, facts)) if self._rows.sums(node) else facts

    def _operand_zeros(self, node: fx.Node, relation: Relation, label: int) -> list[Facts]:
        facts = super()._operand_zeros(node, relation, label)
        return facts if self._rows.run(node, relation, label) else list(map(_whole, facts))

    def _label_facts(self, node: fx.Node, relation: Relation, label: int) -> Facts:
        facts = super()._label_facts(node, relation, label)
        return facts if self._rows.run(node, relation, label) else _whole(facts)


@dataclasses.dataclass(frozen=True)
class LeadingGroups:
    """The groups of a rewritten graph: tensors that have them as their first dimension."""

    tensors: Collection[fx.Node]
    """All of them."""

    def run(self, node: fx.Node, relation: Relation, label: int) -> bool:
        """Returns whether all that has the label has the groups, and in step."""
        first: set[tuple[Factor, ...]] = set()
        sides = list(zip(tensor_operands(node), relation.operands, strict=True))
        sides += [(node, output.dims) for output in relation.outputs if output is not None]
        for tensor, dims in sides:
            if any(factor.label == label for factors in dims for factor in factors):
                if tensor not in self.tensors:
                    return False
                first.add(dims[0])
        (groups,) = first if len(first) == 1 else ((),)
        return len(groups) == 1 and groups[0].inner == 1 and groups[0].label != label

    def sums(self, node: fx.Node) -> bool:
        """Returns False: every tensor of a rewritten graph is whole."""
        return False


def _whole(facts: Facts) -> Facts:
    """Returns the facts that do not depend on a group."""
    if isinstance(facts, Everything):
        return facts
    return Facts(axis for axis in facts if axis.groups == 1)
