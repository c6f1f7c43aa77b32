"""Keeps the fake values of a graph true while it is rewritten.

A rewrite keeps every size, but what it puts in may lie in memory in another order: a gathered
weight is contiguous where the transposed one was not. All that follows inherits the order, and a
view that was legal no longer is::

    %x [8, 4] strides (1, 8)                  %x [8, 4] strides (4, 1)
    %v = view(transpose(%x), [32])     =>     %v = view(clone(transpose(%x)), [32])
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..runtime.dropout_mask import dropout_mask
from .emit import Emitter, fake_mode_of
from .relation import is_tensor, tensor_operands

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten._unsafe_view.default)
_READS_MEMORY = (aten.as_strided.default, aten.as_strided_scatter.default)


@contextlib.contextmanager
def settled_layouts(graph: fx.Graph) -> Iterator[None]:
    """Brings the fake values of a graph up to date with what the body did to it.

    1. A node is looked at if it is new or one of its operands lies in another order than before.
    2. A view that its operand's strides no longer allow gets a contiguous copy.
    3. The results of the graph, and what is read by its place in memory (``as_strided``), are put
       in the order that they had.
    """
    traced = {node: _layouts(node) for node in graph.nodes}
    yield
    settle = _Settler(graph)
    for node in list(graph.nodes):
        before = traced.get(node)
        if before is None or not _same(before, _layouts(node)):
            settle.node(node, before)


_Layout = tuple[tuple[Any, ...], tuple[Any, ...]]
"""Sizes and strides."""


class _Settler:
    def __init__(self, graph: fx.Graph) -> None:
        self._emit = Emitter(graph, fake_mode_of(graph))

    def node(self, node: fx.Node, before: list[_Layout] | None) -> None:
        if node.target is operator.getitem:
            source, index = node.args
            node.meta["val"] = source.meta["val"][index]  # type: ignore[union-attr]
        elif before is not None and (node.op == "output" or node.target in _READS_MEMORY):
            self._put_back(node, before)
        elif _can_run(node):
            self._update(node)

    def _update(self, node: fx.Node) -> None:
        try:
            value = self._emit.value(node.target, node.args, node.kwargs)
        except (RuntimeError, ValueError):
            if node.target not in _VIEWS:
                raise
            source = node.all_input_nodes[0]
            copied = self._emit.op(
                node, aten.clone.default, source, memory_format=torch.contiguous_format
            )
            node.replace_input_with(source, copied)
            value = self._emit.value(node.target, node.args, node.kwargs)
        have, now = _layout(node.meta["val"]), _layout(value)
        assert all(not _differ(a[0], b[0]) for a, b in zip(have, now, strict=True)), (
            f"{node.format_node()} had sizes {have}, has {now}"
        )
        if not _same(have, now):
            node.meta["val"] = value

    def _put_back(self, node: fx.Node, before: list[_Layout]) -> None:
        layouts = iter(before)
        node.args = fx.map_arg(
            node.args, lambda x: self._as_laid_out(x, next(layouts), node) if is_tensor(x) else x
        )

    def _as_laid_out(self, x: fx.Node, layout: _Layout, before: fx.Node) -> fx.Node:
        strides = layout[1]
        have = x.meta["val"].stride()
        if have == strides or not all(isinstance(s, int) for s in (*have, *strides)):
            return x
        order = sorted(range(len(strides)), key=lambda d: -strides[d])
        back = [order.index(d) for d in range(len(order))]
        x = self._emit.op(before, aten.permute.default, x, order)
        x = self._emit.op(before, aten.clone.default, x, memory_format=torch.contiguous_format)
        x = self._emit.op(before, aten.permute.default, x, back)
        if before.op != "output" and x.meta["val"].stride() != strides:
            raise NotImplementedError(f"{before} reads memory that is laid out anew")
        return x


def _can_run(node: fx.Node) -> bool:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    if target is dropout_mask:
        return False  # until it is lowered, it may have for its sizes a tensor that was cut
    if target is aten.index.Tensor:  # only a mask as an index makes its sizes unknown
        return all(x.meta["val"].dtype != torch.bool for x in node.all_input_nodes[1:])
    unknown = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)
    return not target._schema.is_mutable and not any(tag in target.tags for tag in unknown)


def _layouts(node: fx.Node) -> list[_Layout]:
    if node.target is operator.getitem:
        source: Any = node.args[0]
        return _layout(source.meta["val"])
    return [layout for x in tensor_operands(node) for layout in _layout(x.meta["val"])]


def _layout(value: object) -> list[_Layout]:
    if isinstance(value, torch.Tensor):
        strided = value.layout == torch.strided
        return [(tuple(value.shape), value.stride() if strided else ())]
    if isinstance(value, (tuple, list)):
        return [layout for item in value for layout in _layout(item)]
    return []


def _differ(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Returns whether sizes are known to be unlike."""
    known = all(isinstance(size, int) for size in (*a, *b))
    return len(a) != len(b) or (known and a != b)


def _same(a: list[_Layout], b: list[_Layout]) -> bool:
    return len(a) == len(b) and all(
        len(x) == len(y) and all(statically_known_true(m == n) for m, n in zip(x, y, strict=True))
        for one, other in zip(a, b, strict=True)
        for x, y in zip(one, other, strict=True)
    )
