"""Keeps settings of torch away from graphs that drop something, if they make it draw masks again.

A mask drawn again in backward is another mask: every gradient is silently wrong (pytorch#190758).
Torch's partitioner does so, with ordinary dropout and any backend, where it is told to save memory
at any price: by its configuration, or by an annotation of the nodes of a region.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, Final

from torch import fx
from torch._functorch import config as functorch_config

_SAFE: Final = {
    "activation_memory_budget": 1.0,
    "aggressive_recomputation": False,
    "ban_recompute_not_in_allowlist": True,
}
_REGION: Final = "_region_activation_memory_budget"
"""Where ``torch.autograd.graph.region_activation_memory_budget`` annotates a node."""


@contextlib.contextmanager
def no_redraw(*graphs: fx.GraphModule) -> Iterator[None]:
    """Compiles graphs as if nothing of the kind had been set, and warns where it had been.

    Args:
        *graphs: copies of Dynamo's graph; the annotations of their nodes are removed.
    """
    given = {name: getattr(functorch_config, name) for name in _SAFE}
    budgets = [budget for gm in graphs for budget in _take_annotations(gm)]
    given["activation_memory_budget"] = min([*budgets, given["activation_memory_budget"]])
    unsafe = [f"{name}={value}" for name, value in given.items() if value != _SAFE[name]]
    if unsafe:
        warnings.warn(
            f"ardd: {' and '.join(unsafe)} is ignored: torch would draw dropout masks again in"
            " backward, which gives wrong gradients",
            RuntimeWarning,
            stacklevel=2,
        )
    with functorch_config.patch(_SAFE):
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
