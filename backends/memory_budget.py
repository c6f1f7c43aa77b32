"""Keeps torch's memory budget away from graphs that drop something.

Below 1 it lets torch's partitioner recompute everything in backward, random draws included, and a
mask drawn again is another mask: every gradient is silently wrong (pytorch#190758). It comes as a
global setting, and as an annotation of the nodes of a region.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, Final

from torch import fx
from torch._functorch import config as functorch_config

_REGION: Final = "_region_activation_memory_budget"
"""Where ``torch.autograd.graph.region_activation_memory_budget`` annotates a node."""


@contextlib.contextmanager
def no_memory_budget(*graphs: fx.GraphModule) -> Iterator[None]:
    """Compiles graphs as if no budget had been set, and warns where one had been.

    Args:
        *graphs: copies of Dynamo's graph; the annotations of their nodes are removed.
    """
    budgets = {budget for gm in graphs for budget in _take_annotations(gm)}
    budgets = (budgets | {float(functorch_config.activation_memory_budget)}) - {1.0}
    if budgets:
        warnings.warn(
            f"ardd: activation_memory_budget={min(budgets)} is ignored: torch would draw dropout"
            " masks again in backward, which gives wrong gradients",
            RuntimeWarning,
            stacklevel=2,
        )
    with functorch_config.patch(activation_memory_budget=1.0):
        yield


def _take_annotations(gm: fx.GraphModule) -> Iterator[float]:
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            custom: dict[str, Any] = node.meta.get("custom") or {}
            if _REGION in custom:
                yield float(custom[_REGION])
                node.meta["custom"] = {k: v for k, v in custom.items() if k != _REGION}
            if isinstance(node.meta.get("memory_budget"), float):
                yield node.meta.pop("memory_budget")
