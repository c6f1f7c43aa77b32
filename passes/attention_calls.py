"""Finds the calls of attention in a Dynamo graph, and what they run under."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import fx
from torch._subclasses import FakeTensor

from .dynamo_nodes import op_name, tensor_of

# Higher-order ops whose bodies AOTAutograd inlines, and the position of the body. The bodies of
# all others stay graphs of their own, where the later passes do not look.
INLINED: Final = {
    "tag_activation_checkpoint": 0,
    "wrap": 0,
    "wrap_with_set_grad_enabled": 1,
    "wrap_with_autocast": 4,
}


@dataclasses.dataclass(frozen=True)
class Autocast:
    """The state of autocast on the CPU at one place of a program."""

    enabled: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        return str(self.dtype) if self.enabled else "off"


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """One call."""

    gm: fx.GraphModule
    """The graph, or body, that it is in."""
    node: fx.Node
    autocast: Autocast


def attention_calls(gm: fx.GraphModule, name: str) -> list[AttentionCall]:
    """Returns the calls of the function ``name``, in the graph and the bodies inlined into it.

    The calls stay valid while the nodes of others are replaced.
    """
    state = Autocast(torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
    return list(_calls_in(gm, name, state, set()))


def takes_maths(gm: fx.GraphModule) -> bool:
    """Returns whether torch chooses its plain attention for every call on a CPU that drops.

    1. No fused kernel of the CPU can drop, so there is no other choice, with or without autograd.
    2. Where the user switched the plain attention off, torch refuses the call: by a setting, or
       by ``sdpa_kernel`` somewhere in the graph, whatever it chooses.
    """
    if not torch.backends.cuda.math_sdp_enabled():  # the name is historical: it is every device's
        return False
    graphs = (module.graph for module in gm.modules() if isinstance(module, fx.GraphModule))
    names = (getattr(node.target, "__name__", "") for graph in graphs for node in graph.nodes)
    return not any("sdp" in name or "_backend_from_string" in name for name in names)


@contextlib.contextmanager
def keep_autocast() -> Iterator[None]:
    """Leaves autocast as it was, also where a graph is traced that ends in between its switches."""
    enabled = torch.is_autocast_enabled("cpu")
    try:
        yield
    finally:
        torch.set_autocast_enabled("cpu", enabled)


def is_plain(node: object, device: str = "") -> bool:
    """Tells whether ``node`` is an ordinary strided tensor, of no subclass.

    Args:
        node: Anything that may be an argument of a node.
        device: Type of the device that it has to be on, ``""`` for any.
    """
    value = tensor_of(node)
    if value is None or type(value) not in (torch.Tensor, torch.nn.Parameter, FakeTensor):
        return False
    if value.layout != torch.strided or value.is_nested:
        return False
    return not device or value.device.type == device


def _calls_in(
    gm: fx.GraphModule, name: str, state: Autocast, seen: set[fx.GraphModule]
) -> Iterator[AttentionCall]:
    if gm in seen:
        return
    seen.add(gm)
    before: dict[Any, Autocast] = {}
    for node in gm.graph.nodes:
        called = getattr(node.target, "__name__", "")
        if called == "_enter_autocast":
            before[node] = state
            state = _entered(state, *node.args)
        elif called == "_exit_autocast":
            state = before.get(node.args[0], state)
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            for body, inner in _bodies(gm, node, state):
                yield from _calls_in(body, name, inner, seen)
        elif op_name(node) == name:
            yield AttentionCall(gm, node, state)


def _bodies(
    gm: fx.GraphModule, node: fx.Node, state: Autocast
) -> Iterator[tuple[fx.GraphModule, Autocast]]:
    """Yields the body of a higher-order op if it is inlined, and called from here alone."""
    kind = str(getattr(node.target, "_name", ""))
    if kind not in INLINED:
        return
    at = INLINED[kind]
    arg = node.args[at] if at < len(node.args) else None
    if not isinstance(arg, fx.Node) or arg.op != "get_attr":
        return
    names = gm.graph.find_nodes(op="get_attr", target=arg.target)
    body = getattr(gm, str(arg.target), None)
    if isinstance(body, fx.GraphModule) and [u for n in names for u in n.users] == [node]:
        entered = _entered(state, *node.args[:at]) if kind == "wrap_with_autocast" else state
        yield body, entered


def _entered(state: Autocast, device: Any, dtype: Any, enabled: Any, *_: Any) -> Autocast:
    if device != "cpu":
        return state
    return Autocast(bool(enabled), dtype or state.dtype)
