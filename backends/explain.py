"""A dry run: what ardd would do to a model, without training it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import fx
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx

from ..core.options import Options
from ..core.report import GraphReport, Report
from .absence import explain_absence
from .compilation import Compilation, saved_bytes
from .dynamo import compile_marked, copy_graph_module
from .inductor import inductor_patches


def explain(
    fn: Callable[..., Any],
    *args: Any,
    options: Mapping[str, object] | None = None,
    **kwargs: Any,
) -> Report:
    """Says what ``torch.compile(fn, backend="ardd", options=options)`` would do on a call.

    The call runs once, uncompiled, to find all graphs; the state of torch's generators and the
    buffers of a module are put back afterwards. No gradient is computed.

    Args:
        fn: a module or a function.
        *args: arguments of the call.
        options: see `ardd.Options`.
        **kwargs: keyword arguments of the call.

    Returns:
        The report of this call alone, with what stock Inductor would have saved for backward.

    Raises:
        OptionsError: an option is unknown or has a value it cannot have.
    """
    parsed = Options.from_mapping(options)
    entries: list[GraphReport] = []
    breaks = {reason for kind in _BREAKS for reason in counters[kind]}
    compiled = torch.compile(fn, backend=functools.partial(_dry_run, parsed, entries))
    with _state_of(fn):
        compiled(*args, **kwargs)
    new_breaks = [r for kind in _BREAKS for r in counters[kind] if r not in breaks]
    decisions = [decision for entry in entries for decision in entry.decisions]
    notes = explain_absence(fn, len(entries), decisions, break_reasons=new_breaks)
    return Report(tuple(entries), tuple(notes))


_BREAKS = ("graph_break", "unimplemented")


def _dry_run(
    options: Options, entries: list[GraphReport], gm: fx.GraphModule, inputs: Sequence[Any]
) -> Callable[..., Any]:
    """A Dynamo backend that notes what would be done and runs the graph as it is."""
    compilation = Compilation(options)
    compile_marked(gm, inputs, compilation, _trace)
    stock = Compilation(options)
    _trace(gm, inputs, stock)
    entries.append(compilation.report(stock.saved_bytes))
    return gm.forward


def _trace(
    gm: fx.GraphModule, inputs: Sequence[Any], compilation: Compilation | None
) -> Callable[..., Any]:
    """Runs Inductor's own pipeline up to the point where code would be generated."""
    patches: dict[str, Any] = {}
    if compilation is not None:
        hooks = inductor_patches(compilation)
        patches = hooks if compilation.sites else {"custom_partitioner_fn": hooks["custom_partitioner_fn"]}
    with functorch_config.patch(enable_autograd_cache=False):
        return compile_fx(  # type: ignore[no-any-return]
            copy_graph_module(gm), inputs, inner_compile=_unused, config_patches=patches
        )


def _unused(gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    return make_boxed_func(gm.forward)  # type: ignore[no-any-return]


@contextlib.contextmanager
def _state_of(fn: Callable[..., Any]) -> Iterator[None]:
    """Puts generators and buffers back as they were."""
    buffers = list(fn.buffers()) if isinstance(fn, torch.nn.Module) else []
    before = [buffer.detach().clone() for buffer in buffers]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in zip(buffers, before, strict=True):
                    buffer.copy_(value)
