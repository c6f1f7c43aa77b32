"""Prices graphs whose rows are in groups with a kept set each."""

from __future__ import annotations

import dataclasses
import math

import sympy
import torch
from torch import fx

from .cost_model import CostModel, OpCost
from .price_plan import Chosen, PlanPricer
from .relation import tensor_operands
from .row_groups import RowGroups
from .support import Form, Support


class GroupPricer(PlanPricer):
    """Counts what has no rows once for every group: gathered weights, parts of their gradients.

    Args:
        support: the facts of the graph, before its rows are split.
        model: prices single ops.
        device: runs the graph.
        rows: where the rows are.
    """

    def __init__(
        self, support: Support, model: CostModel, device: torch.device, rows: RowGroups
    ) -> None:
        super().__init__(support, model, device)
        self._rows = rows

    def _product(self, node: fx.Node, chosen: Chosen) -> OpCost:
        """Returns the cost of ``bmm`` where groups are cut; the FLOPs are the same."""
        op = super()._product(node, chosen)
        label = self._rows.ops.get(node)
        if label is None:
            return op
        forms, form = self._support.operand_forms(node, chosen), self._support.form(node, chosen)
        if not any(map(_has_groups, [*forms, form])):
            return op
        groups = self._rows.groups
        once = [*zip(tensor_operands(node), forms, strict=True), (node, form)]
        more = sum(
            math.prod(self._sizes(x, cut, chosen)) * x.meta["val"].element_size()
            for x, cut in once
            if x not in self._rows.dims
        )
        sizes = [size / groups if i == label else size for i, size in enumerate(op.sizes)]
        return dataclasses.replace(
            op,
            name="aten.bmm.default",
            sizes=(sympy.Integer(groups), *sizes),
            bytes=op.bytes + more * (groups - 1),
        )

    def _conversion(self, tensor: fx.Node, have: Form, want: Form, chosen: Chosen) -> OpCost:
        op = super()._conversion(tensor, have, want, chosen)
        if tensor in self._rows.dims or not (_has_groups(have) or _has_groups(want)):
            return op
        groups = self._rows.groups
        sizes = (sympy.Integer(groups), *op.sizes)
        return dataclasses.replace(
            op, sizes=sizes, flops=op.flops * groups, bytes=op.bytes * groups
        )


def _has_groups(form: Form) -> bool:
    return any(axis is not None and axis.groups > 1 for axis in form)
