"""Computes a saved tensor again from other saves, by pointwise ops alone."""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
from torch import fx

from .cut_graphs import LAYOUT_OPS, Cut
from .relation import tensor_operands

aten, prims = torch.ops.aten, torch.ops.prims

MOST_OPS = 48
"""Longer chains cost more than a pass over memory, and are no longer cheap."""


def chain_of(saved: fx.Node, sources: Collection[fx.Node]) -> list[fx.Node] | None:
    """Returns the ops that compute a saved tensor from other ones, in order.

    Args:
        saved: a node of the forward.
        sources: what backward can read: the other saves and the inputs of the program.

    Returns:
        None where an op of the chain is not pointwise, draws, or the chain is long.
    """
    chain: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()

    def visit(node: fx.Node) -> bool:
        if node in chain or (node in sources and node is not saved):
            return True
        seen.add(node)
        if len(seen) > MOST_OPS or not _cheap(node):
            return False
        if not all(visit(source) for source in node.all_input_nodes):
            return False
        chain[node] = None
        return True

    return list(chain) if visit(saved) else None


def recompute(cut: Cut, saved: fx.Node, chain: list[fx.Node]) -> None:
    """Has backward compute a tensor by a chain of `chain_of`, in place of reading it."""
    given = {node.name: node for node in cut.backward.graph.find_nodes(op="placeholder")}
    copies: dict[fx.Node, fx.Node] = {}
    inside = set(chain)
    for node in chain:
        for source in node.all_input_nodes:
            if source not in inside and source not in copies:
                known = given.get(source.name)
                copies[source] = known if known is not None else cut.add_input(source)
    old = given[saved.name]
    graph = cut.backward.graph
    first = next(node for node in graph.nodes if node in old.users)
    with graph.inserting_before(first):
        for node in chain:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            cut.twins[copies[node]] = node
    old.replace_all_uses_with(copies[saved])
    cut.replace(saved, [])


def _cheap(node: fx.Node) -> bool:
    target = node.target
    if target is operator.getitem:
        return node.all_input_nodes[0].target in LAYOUT_OPS  # a part of a split
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    drawn = torch.Tag.nondeterministic_seeded in target.tags
    if drawn or target.name().startswith("prims::inductor_"):  # its seeds and random numbers
        return False
    if not tensor_operands(node):
        return target in _FACTORIES
    pointwise = torch.Tag.pointwise in target.tags or target in LAYOUT_OPS
    return pointwise or target in (prims.convert_element_type.default, aten.__rshift__.Scalar)


_FACTORIES = (aten.full.default, aten.scalar_tensor.default, prims.iota.default)
