"""The entry point: what ``torch.compile(model, backend="ardd")`` calls with every Dynamo graph."""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import ShortenTraceback

from ..core import report
from ..core.errors import ArddError, CostModelError, OptionsError, PassError
from ..core.options import Options
from ..core.report import GraphReport
from ..passes.cost_model import find_cost_model
from ..passes.mark_dropout import MarkDropout
from .compilation import Compilation, logger
from .report_cache import load_report, report_key, save_report


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, object] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compiles one Dynamo graph.

    Args:
        gm: the graph, torch IR before autograd. It is not changed.
        example_inputs: its inputs.
        options: see `ardd.Options`.
        mode: a mode of Inductor, such as ``"max-autotune"``.

    Returns:
        The compiled function.

    Raises:
        OptionsError: an option is unknown or has a value it cannot have.
        CostModelError: the cost model is unknown.
        PassError: a pass failed, and the options say strict.
    """
    try:
        parsed = Options.from_mapping(options)
        find_cost_model(parsed.cost_model)
        patches = _mode_patches(mode, parsed)
    except (OptionsError, CostModelError) as error:
        raise _unwrapped(error) from None
    compilation = Compilation(parsed)
    try:
        compiled = compile_marked(gm, example_inputs, compilation, _target(parsed, patches))
    except PassError as error:
        raise _unwrapped(error) from error.cause
    entry = _noted(compilation)
    report.record(entry)
    if entry.decisions:
        logger.info("%s", report.summary_line(entry))
    return compiled


def _noted(compilation: Compilation) -> GraphReport:
    """Returns the entry of the report; of an earlier process where torch's cache had the graph."""
    if compilation.from_cache:
        saved = load_report(compilation.report_key)
        return dataclasses.replace(saved, from_cache=True) if saved else compilation.report()
    entry = compilation.report()
    if compilation.report_key and entry.failure is None:
        save_report(compilation.report_key, entry)
    return entry


def _reset() -> None:
    """Forgets the report; `torch._dynamo.reset` calls it."""
    report.clear()


compile_graph.reset = _reset  # type: ignore[attr-defined]


Target = Callable[[fx.GraphModule, Sequence[Any], Compilation | None], Callable[..., Any]]
"""Compiles a marked graph with the passes, or with None for a compilation any graph as it is."""


def compile_marked(
    gm: fx.GraphModule, inputs: Sequence[Any], compilation: Compilation, target: Target
) -> Callable[..., Any]:
    """Marks the dropouts and hands the graph to the target; the original program on any failure.

    Raises:
        PassError: a pass failed, and the options say strict.
    """
    marked = copy_graph_module(gm)
    try:
        result = MarkDropout().apply(marked)
    except Exception as cause:
        compilation.fail(MarkDropout.name, cause)
        return target(copy_graph_module(gm), inputs, None)
    compilation.decisions.extend(result.decisions)
    compilation.sites = result.sites
    compilation.parameters = [i for i, x in enumerate(inputs) if isinstance(x, torch.nn.Parameter)]
    if not result.sites:
        return target(copy_graph_module(gm), inputs, None)
    compilation.report_key = report_key(marked, inputs, compilation.key)
    try:
        return target(marked, inputs, compilation)
    except PassError:
        raise
    except Exception as cause:
        compilation.fail("compile", cause)
    return target(copy_graph_module(gm), inputs, None)


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """Returns a copy with graphs of its own, in the bodies of higher-order ops too.

    Tensors are shared.
    """
    duplicate = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    duplicate.meta = dict(gm.meta)
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(duplicate, name, copy_graph_module(child))
    return duplicate


def _target(options: Options, patches: Mapping[str, Any]) -> Target:
    """Returns what the options name. Imported here: Inductor takes seconds to load."""
    if options.target == "eager":
        from .eager import compile_eagerly

        return compile_eagerly
    from .inductor import compile_with_inductor

    return functools.partial(compile_with_inductor, patches=patches)


def _mode_patches(mode: str | None, options: Options) -> dict[str, Any]:
    if mode is None or options.target == "eager":
        return {}
    known = torch._inductor.list_mode_options()
    if mode not in known and mode != "default":
        raise OptionsError.bad_value("mode", mode, ", ".join(["default", *known]))
    return dict(known.get(mode, {}))


def _unwrapped(error: ArddError) -> Exception:
    """Returns the error in a form that Dynamo passes on as it is, not as BackendCompilerFailed."""
    kind = type(error)

    class Unwrapped(kind, ShortenTraceback):  # type: ignore[misc, valid-type]
        pass

    Unwrapped.__name__ = Unwrapped.__qualname__ = kind.__name__
    Unwrapped.__module__ = kind.__module__
    result = Unwrapped.__new__(Unwrapped, *error.args)
    result.args = error.args
    result.__dict__.update(error.__dict__)
    result.first_useful_frame = sys._getframe(1)  # the frame that raises it
    return result
