"""Makes ATen graphs with marked dropouts, as the passes over the joint graph get them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from ardd.passes.emit import Emitter, fake_mode_of
from ardd.passes.settle_layouts import _can_run
from ardd.passes.sites import Site
from ardd.runtime.dropout_mask import dropout_mask


def mask(
    x: Tensor, p: float = 0.5, site: int = 0, *, mean: float = 1.0, shared: tuple[int, ...] = ()
) -> Tensor:
    """Marks a dropout."""
    return dropout_mask(x, list(shared), p, mean, site)  # type: ignore[no-any-return]


def trace(fn: Callable[..., Any], *inputs: Tensor, dynamic: bool = False) -> fx.GraphModule:
    """Traces a function to ATen ops with fake values."""
    return make_fx(fn, tracing_mode="symbolic" if dynamic else "fake")(*inputs)


def site(index: int = 0, p: float = 0.5, *, of_weight: bool = False) -> Site:
    return Site(index, "dropout", p, 1.0, "", "", of_weight)


def targets(graph: fx.Graph) -> list[str]:
    """Returns the names of the ops of a graph, in order."""
    return [
        str(n.target).replace("::", ".").removesuffix(".default")
        for n in graph.nodes
        if n.op == "call_function"
    ]


def check_values(graph: fx.Graph) -> None:
    """Checks that every fake value of a graph is what the node gives, strides included."""
    emit = Emitter(graph, fake_mode_of(graph))
    for node in graph.nodes:
        if node.target is operator.getitem:
            source, index = node.args
            value = source.meta["val"][index]
        elif _can_run(node):
            value = emit.value(node.target, node.args, node.kwargs)
        else:
            continue
        have = node.meta.get("val")  # an assertion has none
        if isinstance(have, torch.Tensor):
            assert (have.shape, have.stride()) == (value.shape, value.stride()), node.format_node()
