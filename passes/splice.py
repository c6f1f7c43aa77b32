"""Traces a function and puts its ops into a graph, so that the backend fuses them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from .emit import fake_mode_of


def splice(
    graph: fx.Graph,
    before: fx.Node,
    fn: Callable[..., Sequence[Tensor]],
    args: Sequence[fx.Node],
) -> list[fx.Node]:
    """Adds the ops of ``fn(*args)`` to an ATen graph.

    Args:
        graph: the graph, with fake values.
        before: where to add them.
        fn: takes and returns tensors.
        args: nodes of the graph.

    Returns:
        The nodes of the results.
    """
    from torch._inductor.decomposition import select_decomp_table  # loads Inductor

    values = [arg.meta["val"] for arg in args]
    with fake_mode_of(graph):
        traced = make_fx(fn, decomposition_table=select_decomp_table())(*values)
    copies: dict[fx.Node, Any] = {}
    inputs = iter(args)
    with graph.inserting_before(before):
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(inputs)
            elif node.op == "output":
                return [copies[result] for result in node.args[0]]
            else:
                assert node.op == "call_function", node.format_node()
                copies[node] = graph.node_copy(node, copies.__getitem__)
    raise AssertionError("the traced graph has no output")
