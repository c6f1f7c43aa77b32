"""Gives tensors the groups of their rows as a first dimension, so that each can be cut by itself.

    %m = dropout_mask(%x [R, k])              %m = dropout_mask(%x [g, R/g, k])
    %y = mul(%x, %m)                          %y = mul(%x, %m)
    %z = mm(%y, %w [k, n])             =>     %z = bmm(%y, expand(%w, [g, k, n]))
    %d = mm(%y^T [k, R], %dz [R, n])          %d = sum(bmm(%y^T [g, k, R/g], %dz), 0)

1. Only ops are rewritten that will be cut to kept sets with groups.
2. What they read and others give is viewed by groups; what others read of them is viewed as one.
3. Weights are expanded along the groups, which moves nothing until they are cut. What only
   regroups a weight is done after that.
4. What sums over rows gives a part for every group, and the parts are summed.

Nothing is dropped here: the graph computes what it did.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx

from ..runtime.dropout_mask import dropout_mask
from .emit import Emitter, fake_mode_of
from .facts import KeptAxis
from .group_ops import rewrite_of
from .group_support import GroupSupport, LeadingGroups
from .relation import shape_of
from .row_groups import RowGroups
from .settle_layouts import settled_layouts
from .support import Support

aten = torch.ops.aten


def split_rows(
    graph: fx.Graph, support: Support, rows: RowGroups, chosen: Collection[KeptAxis]
) -> GroupSupport:
    """Rewrites a graph in place.

    Args:
        graph: the analysed graph.
        support: its facts, with the kept axes of ``rows``.
        rows: where the rows are.
        chosen: the kept axes that will be cut; those with groups count here.

    Returns:
        The facts of the rewritten graph.
    """
    splitter = _Splitter(graph, support, rows, chosen)
    with settled_layouts(graph):
        masks = splitter.run()
    axes = {
        new: {d + (new is not old): axis for d, axis in support.masks[old].items()}
        for old, new in masks.items()
    }
    return GroupSupport(graph, axes, LeadingGroups(splitter.made))


class _Splitter:
    """Implements `Grouped` for one op at a time."""

    def __init__(
        self,
        graph: fx.Graph,
        support: Support,
        rows: RowGroups,
        chosen: Collection[KeptAxis],
    ) -> None:
        self._graph = graph
        self._support = support
        self._rows = rows
        self._chosen = {axis for axis in chosen if axis.groups > 1}
        self._emit = Emitter(graph, fake_mode_of(graph))
        self._node: fx.Node  # the op that is being rewritten
        self._split: dict[fx.Node, fx.Node] = {}
        self._viewed: dict[tuple[fx.Node, int], fx.Node] = {}
        self._whole: dict[fx.Node, fx.Node] = {}
        self.made: set[fx.Node] = set()
        """What has the groups as its first dimension."""

    def run(self) -> dict[fx.Node, fx.Node]:
        """Rewrites the graph, and returns the new masks."""
        nodes = list(self._graph.nodes)
        for node in nodes:
            self._node = node
            if node in self._support.masks:
                if self._splits(node):
                    self._split[node] = self._split_mask(node)
            elif self._is_cut(node):
                self._split_op(node)
        self._hand_over(nodes)
        return {mask: self._split.get(mask, mask) for mask in self._support.masks}

    def op(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Adds an op whose result has the groups."""
        return self._mark(self._emit.op(self._node, target, *args, **kwargs))

    def view(self, x: fx.Node, sizes: list[Any]) -> fx.Node:
        """Adds a view that keeps the groups, with a copy where strides need one."""
        result = self._emit.view(self._node, x, sizes)
        if result.args[0] is not x:
            self._mark(result.all_input_nodes[0])
        return self._mark(result)

    def operand(self, x: fx.Node, rank: int | None = None) -> fx.Node:
        """Returns ``[groups, ...]`` of an operand, with as many dimensions after it as ``rank``.

        Numbers, of no dimension, stay as they are.
        """
        own = len(shape_of(x))
        rank = max(own, rank or 0)
        if own == 0:
            return x
        if (x, rank) in self._viewed:
            return self._viewed[x, rank]
        if x in self._split:
            result = self._split[x]
        elif x in self._rows.dims:
            result = self._by_groups(x, self._rows.dims[x])
        else:
            source = self._whole.get(x, x)
            ones = [1] * (rank - own)
            sizes = [self._rows.groups, *ones, *self._emit.sizes(self._node, source)]
            result = self.op(aten.expand.default, source, sizes)
            own = len(sizes) - 1
        if rank > own:
            groups, *rest = self._emit.sizes(self._node, result)
            result = self.view(result, [groups, *[1] * (rank - own), *rest])
        self._viewed[x, rank] = result
        return result

    def sizes(self, sizes: Sequence[Any]) -> list[Any]:
        """Returns ``[groups, ...]`` of sizes of the result."""
        cut: list[Any] = [self._rows.groups, *sizes]
        dim = self._rows.dims.get(self._node)
        if dim is not None and isinstance(sizes[dim], fx.Node):
            args = (sizes[dim], self._rows.groups)
            cut[dim + 1] = self._emit.op(self._node, operator.floordiv, *args)
        elif dim is not None and sizes[dim] != -1:
            cut[dim + 1] = sizes[dim] // self._rows.groups
        return cut

    def _mark(self, node: fx.Node) -> fx.Node:
        self.made.add(node)
        return node

    def _is_cut(self, node: fx.Node) -> bool:
        every = self._support.labels(node).values()
        return any(axis.scaled(1) in self._chosen for facts in every for axis in facts)

    def _splits(self, mask: fx.Node) -> bool:
        """Returns whether a mask gets groups: one that is cut, or is as long as what has them.

        A mask that stays random would otherwise want that whole, though it reads no value of it.
        """
        if self._chosen & set(self._support.masks[mask].values()):
            return True
        like, rows = mask.args[0], self._rows.dims
        assert isinstance(like, fx.Node)
        return like in self._split and rows.get(mask) == 0 and rows.get(like) == 0

    def _split_mask(self, mask: fx.Node) -> fx.Node:
        like, shared, *rest = mask.args
        assert isinstance(like, fx.Node)
        has_rows = self._rows.dims.get(like) == 0
        like = self.operand(like) if has_rows else self._by_groups(like, 0)
        rank = len(shape_of(mask))
        shifted = [d % rank + 1 for d in shared]  # type: ignore[union-attr, operator]
        return self.op(dropout_mask, like, shifted, *rest)

    def _split_op(self, node: fx.Node) -> None:
        sums = self._rows.sums(node)
        rewrite = rewrite_of(node, self._rows.dims.get(node), sums)
        assert rewrite is not None, f"{node.format_node()} has no form for groups"
        result = rewrite(node, self)
        if sums:
            self._whole[node] = self._emit.op(node, aten.sum.dim_IntList, result, [0])
        else:
            self._split[node] = result

    def _by_groups(self, x: fx.Node, dim: int) -> fx.Node:
        """Views rows as groups of rows, and puts the groups first."""
        sizes = self._emit.sizes(self._node, x)
        rows = sizes[dim] // self._rows.groups if isinstance(sizes[dim], int) else -1
        split = [*sizes[:dim], self._rows.groups, rows, *sizes[dim + 1 :]]
        if dim == 0:
            return self.view(x, split)
        result = self._emit.view(self._node, x, split)
        order = [dim, *(d for d in range(len(split)) if d != dim)]
        return self.op(aten.permute.default, result, order)

    def _merged(self, node: fx.Node) -> fx.Node:
        """Undoes `_by_groups`."""
        result, dim = self._split[node], self._rows.dims[node]
        if dim > 0:
            order = [*range(1, dim + 1), 0, *range(dim + 1, len(shape_of(result)))]
            result = self._emit.op(self._node, aten.permute.default, result, order)
        sizes = self._emit.sizes(self._node, result)
        rows = sizes[dim] * sizes[dim + 1] if isinstance(sizes[dim + 1], int) else -1
        return self._emit.view(self._node, result, [*sizes[:dim], rows, *sizes[dim + 2 :]])

    def _hand_over(self, nodes: Sequence[fx.Node]) -> None:
        """Gives the new results to all that was not rewritten, and removes the old ops."""
        done = self._split.keys() | self._whole.keys()
        for node in nodes:
            self._node = node
            if node not in done or all(user in done for user in node.users):
                continue
            if node in self._whole:
                new = self._whole[node]
            elif node in self._rows.dims:
                new = self._merged(node)
            else:
                continue  # what is done to a weight stays as well, for others
            node.replace_all_uses_with(new, lambda user: user not in done)
        for node in reversed(nodes):
            if node in done and not node.users:
                self._graph.erase_node(node)
