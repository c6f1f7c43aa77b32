"""Lists what looks like a dropout, for the report of a graph that could not be marked."""

from __future__ import annotations

import math

from torch import fx

from ..core.decisions import Decision, Reason
from ..passes.sites import module_path, source_line


def find_suspects(gm: fx.GraphModule) -> tuple[Decision, ...]:
    """Returns a decision on every call of a dropout in a Dynamo graph, by its name alone."""
    suspects = [
        (node, name)
        for module in gm.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
        if "dropout" in (name := _name(node))
    ]
    return tuple(
        Decision(
            site=index,
            kind=name,
            module=module_path(node),
            source=source_line(node),
            shape=(),
            p=math.nan,
            taken=False,
            reason=Reason.PASS_FAILED,
        )
        for index, (node, name) in enumerate(suspects)
    )


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""
