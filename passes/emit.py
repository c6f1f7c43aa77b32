"""Adds ops to an ATen graph together with the fake values that later passes read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy

from .relation import shape_of

aten = torch.ops.aten

# What says where a node comes from, and what the partitioner was told about it.
_PROVENANCE = (
    *("stack_trace", "nn_module_stack", "fwd_nn_module_stack", "source_fn_stack", "seq_nr"),
    *("fwd_source_fn_stack", "recompute", "ac_graph_id", "partitioner_tag", "custom", "from_node"),
)


class Emitter:
    """Emits ops before a node, in that node's name.

    Args:
        graph: the graph to add to.
        fake_mode: the mode of its fake tensors.
    """

    def __init__(self, graph: fx.Graph, fake_mode: FakeTensorMode) -> None:
        self._graph = graph
        self._fake_mode = fake_mode
        self._policy: CheckpointPolicy | None = None

    @contextlib.contextmanager
    def marked(self, policy: CheckpointPolicy) -> Iterator[None]:
        """Tells the partitioner, of all ops added meanwhile, to save or to recompute them."""
        self._policy = policy
        try:
            yield
        finally:
            self._policy = None

    def op(self, before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Adds one op and computes its fake value."""
        with self._graph.inserting_before(before):
            node = self._graph.call_function(target, args, kwargs)
        node.meta = {key: before.meta[key] for key in _PROVENANCE if key in before.meta}
        if self._policy is not None:
            node.meta["recompute"] = self._policy
            node.meta.setdefault("ac_graph_id", 0)
        node.meta["val"] = self.value(target, args, kwargs)
        return node

    def value(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Returns the fake value of a call."""
        fake_args, fake_kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self._fake_mode, enable_python_dispatcher():
            return target(*fake_args, **fake_kwargs)

    def sizes(self, before: fx.Node, tensor: fx.Node, like: fx.Node | None = None) -> list[Any]:
        """Returns the sizes of a tensor as arguments: numbers, and nodes where symbolic.

        Args:
            before: where to add the nodes.
            tensor: whose sizes.
            like: a tensor with the same symbolic sizes to read them from, where `tensor` itself
                is not there yet.
        """
        return [
            size
            if isinstance(size, int)
            else self.op(before, aten.sym_size.int, like or tensor, dim)
            for dim, size in enumerate(shape_of(tensor))
        ]

    def view(self, before: fx.Node, tensor: fx.Node, sizes: list[Any]) -> fx.Node:
        """Regroups sizes, through a contiguous copy where strides do not allow a view."""
        try:
            return self.op(before, aten.view.default, tensor, sizes)
        except (RuntimeError, ValueError):
            self._graph.erase_node(before.prev)
        contiguous = self.op(
            before, aten.clone.default, tensor, memory_format=torch.contiguous_format
        )
        return self.op(before, aten.view.default, contiguous, sizes)


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """Returns the mode that made the fake values of a graph."""
    for node in graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if isinstance(mode, FakeTensorMode):
            return mode
    raise AssertionError("the graph has no fake tensors")
