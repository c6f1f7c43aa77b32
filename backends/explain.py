"""A dry run: what ardd would do to a model, without training it."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.utils import counters

from ..core.errors import ArddError
from ..core.report import GraphReport, Report
from ..passes.attention_calls import keep_autocast
from ..passes.split_rnns import SplitRnns
from .absence import explain_absence, roots_of
from .compilation import Compilation
from .compile_rnns import in_own_frame, recipe_of
from .dynamo import compile_marked, copy_graph_module, parse_options, unwrapped
from .inductor import trace_with_inductor
from .keep_state import keep_state
from .measure_saves import measure_saves
from .uncaptured import forget_rnns, rnn_breaks

_BREAKS = ("graph_break", "unimplemented")


def explain(
    fn: Callable[..., Any],
    *args: Any,
    options: Mapping[str, object] | None = None,
    **kwargs: Any,
) -> Report:
    """Says what ``torch.compile(fn, backend="ardd", options=options)`` would do on a call.

    The call runs once, uncompiled, to find all graphs; random generators and the buffers of the
    modules are put back afterwards. No gradient is computed.

    Args:
        fn: a module or a function, compiled or not.
        *args: arguments of the call.
        options: see `ardd.Options`.
        **kwargs: keyword arguments of the call.

    Returns:
        The report of this call alone, with what stock Inductor would have saved for backward.

    Raises:
        OptionsError: an option is unknown or has a value it cannot have.
        CostModelError: the cost model is unknown, or cannot be made.
        BudgetError: a graph does not fit the budget of memory or FLOPs.
        PassError: a pass failed, and the options say strict.
        RedrawError: backward would draw a mask again, and the options say strict.
    """
    recipe = recipe_of(fn)
    if options is None and recipe is not None:
        options = recipe.options
    parsed = parse_options(options)
    as_torch = dataclasses.replace(parsed, saves="off", memory_budget=None)
    entries: list[GraphReport] = []
    beside: list[str] = []

    def dry_run(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compilation = Compilation(parsed)
        try:
            traced = compile_marked(gm, inputs, compilation, trace_with_inductor)
        except ArddError as error:
            raise unwrapped(error) from error.__cause__
        stock, failed = _trace_stock(gm, inputs, Compilation(as_torch))
        if failed:
            beside.append(f"What stock torch would save for backward is not known: {failed}.")
        entry, place = compilation.report(stock), len(entries)
        entries.append(entry)

        def run(*args: Any) -> Any:
            if compilation.failure is None:
                measured = measure_saves(traced, args, compilation)
                entries[place] = dataclasses.replace(entry, saves=measured)
            return gm.forward(*args)

        return run

    fn = _as_written(fn)
    modules = [root.module for root in roots_of(fn)]
    breaks, rnns = _breaks(), rnn_breaks()
    allow_rnn = recipe is not None or torch._dynamo.config.allow_rnn
    settings = {"recompile_limit": sys.maxsize, "allow_rnn": allow_rnn}
    with keep_state(modules), torch._dynamo.config.patch(settings):
        target = fn if recipe is None else in_own_frame(fn)
        torch.compile(target, backend=dry_run, **_ISOLATED)(*args, **kwargs)
        decisions = [decision for entry in entries for decision in entry.decisions]
        notes = explain_absence(fn, len(entries), decisions, [*(_breaks() - breaks)])
    forget_rnns(rnn_breaks() - rnns)  # said here, and not in the report of what was compiled
    return Report(tuple(entries), (*notes, *dict.fromkeys(beside)))


def _trace_stock(
    gm: fx.GraphModule, inputs: Sequence[Any], stock: Compilation
) -> tuple[Compilation | None, str]:
    """Traces a graph without ardd, to compare with.

    It is no part of what the user runs: its guards are not kept, and where it fails so does the
    comparison alone.

    Returns:
        The compile, None where it failed, and why it did.
    """
    context = torch._guards.TracingContext.try_get()
    shapes = context.fake_mode.shape_env if context and context.fake_mode else None
    try:
        stock_gm = copy_graph_module(gm)
        SplitRnns().apply(stock_gm)  # or torch would take minutes, to lose a dropout
        with shapes.suppress_guards() if shapes else contextlib.nullcontext(), keep_autocast():
            trace_with_inductor(stock_gm, inputs, stock)
    except Exception as cause:  # whatever torch, or a pass of the user's, may raise
        lines = str(cause).strip().splitlines()
        return None, f"{type(cause).__name__}: {lines[0].rstrip('.') if lines else 'no message'}"
    return stock, ""


# What a function was compiled for here must not count against the limit of its recompiles, at
# which torch runs it uncompiled from then on. Before 2.13 torch cannot keep that apart.
_ISOLATED: dict[str, Any] = (
    {"isolate_recompiles": True}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters
    else {}
)


def _as_written(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns what the user gave to torch.compile, which compiles nothing inside of itself."""
    if isinstance(fn, nn.Module):
        return getattr(fn, "_orig_mod", fn)
    return getattr(fn, "_torchdynamo_orig_callable", fn)


def _breaks() -> Counter[str]:
    """Returns how often each reason ended a graph so far."""
    return sum((Counter(counters[kind]) for kind in _BREAKS), Counter())
