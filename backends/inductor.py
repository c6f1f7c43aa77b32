"""The Inductor target: C++ on CPU, Triton on CUDA."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from functorch.compile import make_boxed_func
from torch import fx
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import compile_fx as torch_compile_fx
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass, CustomPartitionerFn

from .compilation import Compilation
from .loop_split import optional_loop_split
from .measure_saves import SaveMeter
from .report_cache import load_report, report_key, save_report

_compile_fx: Callable[..., Callable[..., Any]] = cast("Any", torch_compile_fx.compile_fx)


class JointPass(CustomGraphPass):
    """Runs first on the joint graph, and on inference graphs; then the user's own passes do."""

    def __init__(self, compilation: Compilation) -> None:
        theirs = inductor_config.joint_custom_pre_pass
        self._compilation = compilation
        self._theirs = _as_tuple(theirs)

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrites the graph in place."""
        self._compilation.rewrite(graph)
        for their_pass in self._theirs:
            their_pass(graph)

    def uuid(self) -> Any:
        """Returns what the rewrite depends on, for torch's cache keys; None forbids to cache."""
        return _joint_uuid(self._compilation, self._theirs)

    def __deepcopy__(self, memo: object) -> JointPass:
        """Returns itself: torch copies its whole configuration to make a cache key."""
        return self


class Partitioner(CustomPartitionerFn):
    """Torch's min-cut or the user's own cut, checked."""

    def __init__(self, compilation: Compilation) -> None:
        self._compilation = compilation
        self._theirs = inductor_config.custom_partitioner_fn

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Cuts the joint graph into forward and backward."""
        cut = self._theirs or min_cut_rematerialization_partition
        return self._compilation.partition(cut, gm, joint_inputs, **kwargs)

    def uuid(self) -> Any:
        """Returns what the cut depends on, for torch's cache keys."""
        return _joint_uuid(self._compilation, _as_tuple(self._theirs))

    def __getstate__(self) -> dict[str, Any]:
        """Returns what counts: torch's cache keys hold this object pickled, beside its uuid."""
        return {"key": self._compilation.key, "theirs": self._theirs}

    def __deepcopy__(self, memo: object) -> Partitioner:
        """Returns itself: torch copies its whole configuration to make a cache key."""
        return self


def compile_with_inductor(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    compilation: Compilation | None,
    patches: Mapping[str, Any],
) -> Callable[..., Any]:
    """Compiles a marked graph, or with ``compilation`` None any graph as stock Inductor does.

    Hooked for this compile alone: Inductor's global configuration stays as the user set it.
    """
    if compilation is None:
        return _compile_fx(gm, inputs, config_patches=dict(patches))
    key = report_key(gm, inputs, compilation.key)
    patches = {**patches, **_hooks(compilation)}
    # A backward that fails to compile has to fail here, where there still is a way back.
    with functorch_config.patch(force_non_lazy_backward_lowering=True), optional_loop_split():
        compiled = _compile_fx(gm, inputs, config_patches=patches)
    if not compilation.from_cache:
        save_report(key, compilation.report())
        return compiled
    compilation.recalled = load_report(key)
    if compilation.recalled is None:  # torch's cache may come from elsewhere, and ours be lost
        again = dataclasses.replace(compilation, decisions=[])
        trace_with_inductor(gm, inputs, again)
        compilation.recalled = again.report()
        save_report(key, compilation.recalled)
    return compiled


def trace_with_inductor(
    gm: fx.GraphModule, inputs: Sequence[Any], compilation: Compilation | None
) -> Callable[..., Any]:
    """Runs Inductor's own pipeline up to the point where code would be generated."""
    patches = {} if compilation is None else _hooks(compilation)
    with functorch_config.patch(enable_autograd_cache=False):
        inner = functools.partial(_compile_nothing, compilation)
        return _compile_fx(gm, inputs, inner_compile=inner, config_patches=patches)


def _hooks(compilation: Compilation) -> dict[str, Any]:
    hooks: dict[str, Any] = {
        "joint_custom_pre_pass": JointPass(compilation),
        "custom_partitioner_fn": Partitioner(compilation),
    }
    if hasattr(inductor_config, "use_joint_graph_passes"):
        hooks["use_joint_graph_passes"] = True  # the mode "lite" would leave ours out too
    return hooks


def _as_tuple(passes: Any) -> tuple[Any, ...]:
    if passes is None:
        return ()
    return tuple(passes) if isinstance(passes, (list, tuple)) else (passes,)


def _joint_uuid(compilation: Compilation, theirs: tuple[Any, ...]) -> str | None:
    uuids = [their_pass.uuid() if hasattr(their_pass, "uuid") else None for their_pass in theirs]
    return None if None in uuids else f"{compilation.key} {uuids!r}"


def _compile_nothing(
    compilation: Compilation | None, gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any
) -> Callable[..., Any]:
    if compilation is None or compilation.saves is None or kwargs.get("is_backward"):
        return make_boxed_func(gm.forward)  # type: ignore[no-any-return]
    return make_boxed_func(SaveMeter(gm, compilation).run)  # type: ignore[no-any-return]
