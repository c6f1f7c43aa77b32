"""Which inputs of a graph are which of the program's, by the descriptions that torch gives them."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx
from torch._functorch._aot_autograd.descriptors import GradAOTOutput, PlainAOTInput


def inputs_in(graph: fx.Graph, indices: Collection[int]) -> list[fx.Node]:
    """Returns the inputs of a graph that are those of the program, such as its parameters."""
    inputs: list[fx.Node] = graph.find_nodes(op="placeholder")
    return [node for node in inputs if _index(node.meta.get("desc")) in indices]


def grads_of(joint: fx.Graph, indices: Collection[int], num_fwd_outputs: int) -> list[int]:
    """Returns which results of the backward are gradients of those inputs of the program.

    Args:
        joint: forward and backward together.
        indices: the inputs.
        num_fwd_outputs: results of the forward, which come first.
    """
    described = joint.output_node().meta.get("desc", ())[num_fwd_outputs:]
    return [
        place
        for place, result in enumerate(described)
        if isinstance(result, GradAOTOutput) and _index(result.grad_of) in indices
    ]


def results_only_at(graph: fx.Graph, places: Collection[int]) -> set[fx.Node]:
    """Returns the nodes that a graph returns at some places, and at no other one as well."""
    (results,) = graph.output_node().args
    assert isinstance(results, (tuple, list))
    nodes = [(i in places, node) for i, node in enumerate(results) if isinstance(node, fx.Node)]
    return {node for there, node in nodes if there} - {node for there, node in nodes if not there}


def _index(described: object) -> int | None:
    # Tokens that order side effects have an index too, of their own count.
    return described.idx if isinstance(described, PlainAOTInput) else None
