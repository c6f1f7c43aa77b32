"""Finds the dimensions that a dropout may drop: features, never samples or positions.

A dimension is a feature if a weight has it: a forward product contracts it with a weight, or a
weight produces it. The batch dimension runs through the same products, and dropping it would shrink
them just as well, but no weight has it. Nor are the heads of attention features of its
probabilities, although the projection after it contracts them: a product of every head by itself
(a batch dimension of ``bmm``) lies between.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from ..runtime.dropout_mask import dropout_mask
from .facts import KeptAxis
from .relation import Relation, tensor_operands
from .support import Support, axes_in

aten = torch.ops.aten


def feature_axes(
    graph: fx.Graph, support: Support, parameters: Collection[fx.Node]
) -> set[KeptAxis]:
    """Returns the kept axes, over all masks, that may be dropped.

    Args:
        graph: the analysed graph.
        support: its facts.
        parameters: the placeholders that are parameters. If there are none, as in a function of
            plain tensors, the second operand of a forward product is taken for its weight where it
            comes from the inputs alone.
    """
    forward = forward_nodes(graph)
    roots = set(parameters) or {node for node in forward if node.op == "placeholder"}
    weights = _derived_only_from(roots, forward)
    axes: set[KeptAxis] = set()
    batches: set[KeptAxis] = set()
    for node in forward:
        relation = support.relations.get(node)
        if relation is None or not is_product(relation):
            continue
        operands = tensor_operands(node)
        output = relation.outputs[0]
        assert output is not None
        positions = output.contracts if parameters else output.contracts[-1:]
        for label, facts in support.labels(node).items():
            holders = [i for i in output.contracts if _has(relation, i, label)]
            shared = len(holders) > 1 and any(
                factor.label == label for factors in output.dims for factor in factors
            )
            if shared:
                batches |= axes_in([facts])
            elif any(i in positions and operands[i] in weights for i in holders):
                axes |= axes_in([facts])
    return axes - batches


def is_product(relation: Relation) -> bool:
    """Returns whether the op is a matrix product or a convolution, forward or backward."""
    return not isinstance(relation.product_flops, int) or relation.product_flops > 0


def forward_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Returns the nodes that do not depend on a gradient, in order."""
    backward: set[fx.Node] = set()
    forward: list[fx.Node] = []
    for node in graph.nodes:
        is_tangent = node.op == "placeholder" and "tangents" in str(node.target)
        if is_tangent or any(x in backward for x in node.all_input_nodes):
            backward.add(node)
        elif node.op != "output":
            forward.append(node)
    return forward


def _derived_only_from(roots: Collection[fx.Node], forward: list[fx.Node]) -> set[fx.Node]:
    """Returns the roots and what is computed from them without a product."""
    derived = set(roots)
    for node in forward:
        if node.op != "call_function" or node.target in _PRODUCTS:
            continue
        inputs = [x for x in node.all_input_nodes if not _is_size(x)]
        if node.target is dropout_mask:
            inputs = inputs[:1]  # the seed is no data
        if inputs and all(x in derived for x in inputs):
            derived.add(node)
    return derived


_PRODUCTS = (
    *(aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default),
    aten.convolution.default,
)


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def _has(relation: Relation, operand: int, label: int) -> bool:
    return any(f.label == label for factors in relation.operands[operand] for f in factors)
