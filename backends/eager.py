"""The eager target: the same graphs, run op by op, to debug."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch._inductor.lowering  # noqa: F401, which decompositions of pooling take for loaded
from functorch.compile import make_boxed_func
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from .compilation import Compilation


def compile_eagerly(
    gm: fx.GraphModule, inputs: Sequence[Any], compilation: Compilation | None
) -> Callable[..., Any]:
    """Compiles a marked graph, or with ``compilation`` None any graph, to itself.

    Inductor's decompositions are used, so that both targets see the same ops.
    """
    compiler = aot_autograd(
        fw_compiler=_run,
        bw_compiler=_run,
        inference_compiler=functools.partial(_rewrite_and_run, compilation),
        partition_fn=functools.partial(_rewrite_and_partition, compilation),
        decompositions=select_decomp_table(),
        keep_inference_input_mutations=True,
    )
    return compiler(gm, inputs)


def _run(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    return make_boxed_func(gm.forward)  # type: ignore[no-any-return]


def _rewrite_and_run(
    compilation: Compilation | None, gm: fx.GraphModule, inputs: Sequence[Any]
) -> Callable[..., Any]:
    if compilation is not None:
        compilation.rewrite(gm.graph)
        gm.recompile()
    return _run(gm, inputs)


def _rewrite_and_partition(
    compilation: Compilation | None, joint: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any
) -> tuple[fx.GraphModule, fx.GraphModule]:
    cut = min_cut_rematerialization_partition
    if compilation is None:
        return cut(joint, inputs, **kwargs)
    compilation.rewrite(joint.graph)
    joint.recompile()
    return compilation.partition(cut, joint, inputs, **kwargs)
