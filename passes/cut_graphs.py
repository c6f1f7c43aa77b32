"""Forward and backward as a partitioner cut them, and what is saved in between."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx

from .relation import is_tensor

aten = torch.ops.aten

LAYOUT_OPS = {
    *(aten.view.default, aten.permute.default, aten.t.default, aten.transpose.int),
    *(aten.expand.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
    *(aten.unsqueeze.default, aten.slice.Tensor, aten.select.int, aten.alias.default),
    *(aten.detach.default, aten.diagonal.default, aten.unfold.default, aten._unsafe_view.default),
    *(aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.reshape.default),
}
"""Ops whose result shares the memory of the first argument."""


@dataclasses.dataclass
class Cut:
    """The two graphs of a cut, and how their ends belong together."""

    forward: fx.GraphModule
    backward: fx.GraphModule
    num_fwd_outputs: int
    """Outputs of the forward before what is saved."""
    parameters: Collection[fx.Node] = ()
    """Inputs of the forward that are parameters."""
    parameter_grads: Collection[int] = ()
    """Outputs of the backward that are gradients of parameters."""
    twins: dict[fx.Node, fx.Node] = dataclasses.field(init=False)
    """Nodes of the backward that compute again what a node of the forward does."""

    def __post_init__(self) -> None:
        # As torch cut them: both are copies of one node, with its name.
        given = {n.name: n for n in self.forward.graph.nodes if n.op == "call_function"}
        again = (n for n in self.backward.graph.nodes if n.op == "call_function")
        named = ((node, given.get(node.name)) for node in again)
        self.twins = {node: twin for node, twin in named if twin and twin.target is node.target}

    @property
    def outputs(self) -> list[Any]:
        """What the program itself returns."""
        return list(_results(self.forward)[: self.num_fwd_outputs])

    @property
    def returned(self) -> set[fx.Node]:
        """The tensors whose memory the program returns: they are kept anyway."""
        return {root_of(node) for node in self.outputs if isinstance(node, fx.Node)}

    def saves(self) -> list[tuple[fx.Node, fx.Node]]:
        """Returns the saved tensors: the node of the forward, and the input of the backward.

        Both have one name. States of random generators have not, and are left alone.
        """
        inputs = {node.name: node for node in self.backward.graph.find_nodes(op="placeholder")}
        return [(node, inputs[node.name]) for node in self._saved() if node.name in inputs]

    def sizes(self) -> list[fx.Node]:
        """Returns the symbolic sizes, nodes of the forward, that the backward has as well."""
        known = {node.name for node in self.backward.graph.find_nodes(op="placeholder")}
        nodes = self.forward.graph.nodes
        return [n for n in nodes if n.name in known and isinstance(n.meta.get("val"), torch.SymInt)]

    def _saved(self) -> list[fx.Node]:
        results = dict.fromkeys(_results(self.forward)[self.num_fwd_outputs :])
        return [node for node in results if isinstance(node, fx.Node) and is_tensor(node)]

    def replace(self, node: fx.Node, parts: list[fx.Node]) -> list[fx.Node]:
        """Saves other tensors in place of one.

        Args:
            node: what the forward saves.
            parts: what it saves instead, nodes of the forward, which may be that one and more; none
                where backward needs nothing.

        Returns:
            The inputs of the backward for them. The old one stays until `tidy`.
        """
        at = _results(self.forward).index(node, self.num_fwd_outputs)
        self._put(slice(at, at + 1), parts)
        graph = self.backward.graph
        old = next(n for n in graph.find_nodes(op="placeholder") if n.name == node.name)
        inputs: list[fx.Node] = []
        last = old.prev  # the inputs of the backward have the order of the saves
        for part in parts:
            if part is node:
                inputs.append(old)
                last = old
                continue
            if "saved_tensor_with_no_vc_check" in node.meta:  # torch sorts the saves by it
                part.meta["saved_tensor_with_no_vc_check"] = True
            # Both ends have one name, that neither graph may have given away.
            if part.op != "placeholder":
                part._rename(f"saved_{part.name}_of_{node.name}")
            with graph.inserting_after(last):
                last = new = graph.placeholder(part.name)
            assert new.name == part.name
            new.meta = {"val": part.meta["val"]}
            inputs.append(new)
        return inputs

    def add_input(self, node: fx.Node) -> fx.Node:
        """Saves an input of the program as well, and returns the input of the backward for it."""
        inputs: list[fx.Node] = self.backward.graph.find_nodes(op="placeholder")
        for placeholder in inputs:
            if placeholder.name == node.name:
                return placeholder
        first, _ = self.saves()[0]
        self._put(slice(self.num_fwd_outputs, self.num_fwd_outputs), [node])
        graph = self.backward.graph
        before = next(n for n in inputs if n.name == first.name)
        with graph.inserting_before(before):
            new = graph.placeholder(node.name)
        new.meta = {"val": node.meta["val"]}
        return new

    def _put(self, place: slice, nodes: list[fx.Node]) -> None:
        """Puts other nodes in a place among what the forward returns."""
        output, results = self.forward.graph.output_node(), _results(self.forward)
        results[place] = nodes
        output.args = (tuple(results),)
        if "desc" in output.meta:  # torch's descriptions of the outputs, one each
            descriptions = list(output.meta["desc"])
            descriptions[place] = [descriptions[place.start]] * len(nodes)
            output.meta["desc"] = descriptions

    def tidy(self) -> None:
        """Removes what nothing reads any more, and makes both modules runnable."""
        saved = {node.name for node in _results(self.forward)[self.num_fwd_outputs :] if node}
        given = {node.name for node in self.forward.graph.nodes}
        self.backward.graph.eliminate_dead_code()
        for node in self.backward.graph.find_nodes(op="placeholder"):
            if node.name in given and node.name not in saved and not node.users:
                self.backward.graph.erase_node(node)
        left = {node.name for node in self.backward.graph.find_nodes(op="placeholder")} & given
        assert left <= saved, f"backward reads {sorted(left - saved)}, which forward does not save"
        self.forward.graph.eliminate_dead_code()
        for module in (self.forward, self.backward):
            module.graph.lint()
            module.recompile()

    def saved_bytes(self) -> int:
        """Returns the bytes kept for backward alone.

        Inputs, parameters and what the program returns are kept anyway, as are views of them, and
        two views of a tensor count once.
        """
        roots = {root_of(node) for node in self._saved()} - self.returned
        return sum(bytes_of(root) for root in roots if root.op != "placeholder")


def _results(module: fx.GraphModule) -> list[Any]:
    (results,) = module.graph.output_node().args
    assert isinstance(results, (tuple, list))
    return list(results)


def root_of(node: fx.Node) -> fx.Node:
    """Returns the tensor whose memory a tensor shares."""
    while True:
        source: Any = node.args[0] if node.args else None
        if node.target in LAYOUT_OPS:
            node = source
        elif node.target is operator.getitem and source.target in LAYOUT_OPS:
            node = source.args[0]
        else:
            return node


def bytes_of(node: fx.Node) -> int:
    """Returns the bytes of a tensor, with the symbolic sizes of this call."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    return math.prod(map(size_hint, value.shape)) * value.element_size()


def size_hint(size: int | torch.SymInt) -> int:
    """Returns a size in this call, 1 for one that only the running program knows.

    The ragged size of a nested tensor is none: it stands for a tensor of them, without a number.
    """
    if isinstance(size, int):
        return size
    if size.node.is_nested_int():
        return 1
    return int(size.node.hint) if size.node.has_hint() else 1


def downstream(node: fx.Node) -> Iterator[fx.Node]:
    """Yields everything that depends on a node, each once."""
    seen = {node}
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if user not in seen:
                seen.add(user)
                stack.append(user)
                yield user
