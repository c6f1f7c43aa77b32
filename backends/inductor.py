"""The Inductor target: C++ on CPU, Triton on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass, CustomPartitionerFn

from .compilation import Compilation


class JointPass(CustomGraphPass):
    """Runs first on the joint graph, and on inference graphs."""

    def __init__(self, compilation: Compilation) -> None:
        self._compilation = compilation

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrites the graph in place."""
        self._compilation.rewrite(graph)

    def uuid(self) -> str:
        """Returns what the rewrite depends on, for torch's cache keys."""
        return self._compilation.key


class Partitioner(CustomPartitionerFn):
    """Torch's min-cut, checked."""

    def __init__(self, compilation: Compilation) -> None:
        self._compilation = compilation

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Cuts the joint graph into forward and backward."""
        return self._compilation.partition(gm, joint_inputs, **kwargs)

    def uuid(self) -> str:
        """Returns what the cut depends on, for torch's cache keys."""
        return self._compilation.key


def inductor_patches(compilation: Compilation) -> dict[str, Any]:
    """Returns the configuration that hooks the passes into Inductor."""
    return {
        "joint_custom_pre_pass": _before(JointPass(compilation)),
        "custom_partitioner_fn": Partitioner(compilation),
    }


def compile_with_inductor(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    compilation: Compilation | None,
    patches: Mapping[str, Any],
) -> Callable[..., Any]:
    """Compiles a marked graph, or with ``compilation`` None any graph as stock Inductor does.

    Hooked for this compile alone: Inductor's global configuration stays as the user set it.
    """
    ours = {} if compilation is None else inductor_patches(compilation)
    # A backward that fails to compile has to fail here, where there still is a way back.
    with torch._functorch.config.patch(force_non_lazy_backward_lowering=compilation is not None):
        return compile_fx(gm, inputs, config_patches={**patches, **ours})  # type: ignore[no-any-return]


def _before(ours: JointPass) -> Any:
    """Returns our pass, followed by the user's own if there is one."""
    theirs = torch._inductor.config.joint_custom_pre_pass
    if theirs is None:
        return ours
    return [ours, *(theirs if isinstance(theirs, (list, tuple)) else [theirs])]
