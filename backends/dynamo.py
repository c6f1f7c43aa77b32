"""The entry point: what ``torch.compile(model, backend="ardd")`` calls with every Dynamo graph."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import fx
from torch._dynamo.exc import (
    RestartAnalysis,
    ShortenTraceback,
    SkipFrame,
    exceptions_allowed_to_be_fallback,
)

from ..core import report
from ..core.errors import (
    ArddError,
    BudgetError,
    CostModelError,
    DropoutRateError,
    OptionsError,
    PassError,
    RedrawError,
)
from ..core.options import Options
from ..passes.attention_calls import keep_autocast
from ..passes.cost_model import find_cost_model
from ..passes.cut_graphs import size_hint
from ..passes.eager_draws import keeps_eager_masks
from ..passes.mark_dropout import MarkDropout
from ..passes.open_multi_head import OpenMultiHead
from ..passes.split_rnns import SplitRnns, loses_dropout
from ..passes.write_out_attention import WriteOutAttention
from .compilation import Compilation
from .find_suspects import find_suspects
from .no_redraw import no_redraw
from .plan_switch import switch_plans
from .uncaptured import forget_rnns
from .watch_rates import forget_rates, watch_rates

logger: Final = logging.getLogger("ardd")

Target = Callable[[fx.GraphModule, Sequence[Any], Compilation | None], Callable[..., Any]]
"""Compiles a marked graph with the passes, or with None for a compilation any graph as it is."""


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
        CostModelError: the cost model is unknown, or cannot be made.
        BudgetError: a graph does not fit the budget of memory or FLOPs.
        PassError: a pass failed, and the options say strict.
        RedrawError: backward would draw a mask again, and the options say strict.
    """
    try:
        parsed = parse_options(options)
        target = _target(parsed, _mode_patches(mode))
        compilation = Compilation(parsed)
        compiled = compile_marked(gm, example_inputs, compilation, target)
        same = compilation.same_plans
        if len(same) > 1:
            source = copy_graph_module(gm)
            compile_plan = functools.partial(_compile_plan, source, parsed, target)
            compiled = switch_plans(same, compiled, example_inputs, compile_plan)
    except ArddError as error:
        raise unwrapped(error) from error.__cause__
    entry = compilation.report()
    report.record(entry)
    if entry.decisions:
        logger.info("%s", report.summary_line(entry))
    watch_rates(entry)
    return compiled


def _compile_plan(
    gm: fx.GraphModule, options: Options, target: Target, inputs: Sequence[Any], plan: int
) -> Callable[..., Any]:
    """Compiles another plan of a graph. Only a failure has an entry: the first speaks for all."""
    compilation = Compilation(options, plan=plan)
    compiled = compile_marked(gm, inputs, compilation, target)
    if compilation.failure is not None:
        report.record(compilation.report())
    return compiled


def _reset() -> None:
    """Forgets the report; `torch._dynamo.reset` calls it."""
    report.clear()
    forget_rates()
    forget_rnns()
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None and torch.cuda.is_available():
        trees.reset_cudagraph_trees()  # as the wrapper of stock Inductor does


compile_graph.reset = _reset  # type: ignore[attr-defined]


def parse_options(options: Mapping[str, object] | None) -> Options:
    """Returns the options that a user wrote, with a cost model that exists.

    Raises:
        OptionsError: an option is unknown or has a value it cannot have.
        CostModelError: the cost model is unknown, or cannot be made.
    """
    parsed = Options.from_mapping(options)
    try:
        find_cost_model(parsed.cost_model)
    except CostModelError:
        raise
    except Exception as cause:
        raise CostModelError.not_made(parsed.cost_model, cause) from cause
    return parsed


def compile_marked(
    gm: fx.GraphModule, inputs: Sequence[Any], compilation: Compilation, target: Target
) -> Callable[..., Any]:
    """Marks the dropouts and hands the graph to the target; the original program on any failure.

    Raises:
        BudgetError: a graph does not fit the budget of memory or FLOPs.
        PassError: a pass failed, and the options say strict.
        RedrawError: backward would draw a mask again, and the options say strict.
    """
    original = copy_graph_module(gm)
    try:
        SplitRnns(project=compilation.options.pattern == "grouped").apply(original)
    except Exception as cause:
        original, failure = copy_graph_module(gm), PassError(SplitRnns.name, cause)
        if loses_dropout(original):  # torch's own decomposition would drop nothing
            raise failure from cause
        return _run_original(original, inputs, compilation, target, failure)
    marked = copy_graph_module(original)
    running = OpenMultiHead.name
    try:
        if not keeps_eager_masks():  # torch's own maths draw the masks of eager mode
            OpenMultiHead().apply(marked)
            running = WriteOutAttention.name
            WriteOutAttention().apply(marked)
        running = MarkDropout.name
        result = MarkDropout().apply(marked)
    except DropoutRateError:
        raise  # torch refuses the rate, the code compiled from the original would not
    except Exception as cause:
        compilation.found = find_suspects(original)
        with no_redraw(original):
            failure = PassError(running, cause)
            return _run_original(original, inputs, compilation, target, failure)
    compilation.found = result.decisions
    compilation.sites = result.sites
    draws = bool(compilation.found or compilation.sites)
    with no_redraw(original, marked) if draws else contextlib.nullcontext():
        compresses = compilation.options.saves != "off" and _wants_grad(inputs)
        if not compilation.sites and not compresses:
            return _as_it_is(original, inputs, compilation, target)
        indices = range(len(inputs))
        compilation.parameters = [i for i in indices if isinstance(inputs[i], torch.nn.Parameter)]
        try:
            compilation.hints = [size_hint(x) for x in inputs if isinstance(x, torch.SymInt)]
            with keep_autocast():
                return target(marked, inputs, compilation)
        except BudgetError:
            raise
        except (RestartAnalysis, SkipFrame, *exceptions_allowed_to_be_fallback):
            raise  # how Dynamo is told to trace anew, to break the graph, or not to trace at all
        except Exception as cause:
            return _run_original(original, inputs, compilation, target, _named(cause))


def _named(cause: Exception) -> PassError:
    if isinstance(cause, PassError):
        return cause
    return PassError("check-redraw" if isinstance(cause, RedrawError) else "compile", cause)


def _run_original(
    original: fx.GraphModule,
    inputs: Sequence[Any],
    compilation: Compilation,
    target: Target,
    failure: PassError,
) -> Callable[..., Any]:
    """Compiles the original program, and only then blames a pass: it may not compile either."""
    if compilation.options.strict and isinstance(failure.cause, RedrawError):
        raise failure.cause
    if compilation.options.strict:
        raise failure from failure.cause
    compiled = _as_it_is(original, inputs, compilation, target)
    compilation.fail(failure)
    return compiled


def _as_it_is(
    original: fx.GraphModule, inputs: Sequence[Any], compilation: Compilation, target: Target
) -> Callable[..., Any]:
    compilation.inference = not _wants_grad(inputs)
    return target(original, inputs, None)


def _wants_grad(inputs: Sequence[Any]) -> bool:
    wants_grad = any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
    return wants_grad and torch.is_grad_enabled()


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """Returns a copy with graphs of its own, in the bodies of higher-order ops too.

    Tensors are shared. What Dynamo attaches outside of ``meta`` comes along: AOTAutograd reads
    from it which inputs are parameters, and what to guard on where inputs are the same tensor.
    """
    duplicate = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    duplicate.meta = dict(gm.meta)
    for name in _DYNAMO_ATTRIBUTES:
        if hasattr(gm, name):
            setattr(duplicate, name, getattr(gm, name))
    for old, new in zip(gm.graph.nodes, duplicate.graph.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(duplicate, name, copy_graph_module(child))
    return duplicate


_DYNAMO_ATTRIBUTES: Final = ("_param_name_to_source", "_backend_id", "compile_subgraph_reason")


def _target(options: Options, patches: Mapping[str, Any]) -> Target:
    """Returns what the options name. Imported here: Inductor takes seconds to load."""
    if options.target == "eager":
        from .eager import compile_eagerly

        return compile_eagerly
    from .inductor import compile_with_inductor

    return functools.partial(compile_with_inductor, patches=patches)


def _mode_patches(mode: str | None) -> dict[str, Any]:
    if mode is None:
        return {}
    known = torch._inductor.list_mode_options()
    if mode not in known and mode != "default":
        raise OptionsError.bad_value("mode", mode, ", ".join(dict.fromkeys(["default", *known])))
    return dict(known.get(mode, {}))


def unwrapped(error: ArddError) -> Any:
    """Returns the error in a form that Dynamo passes on as it is, not as BackendCompilerFailed.

    The frame that calls has to be the one that raises it.
    """
    kind = type(error)

    class Unwrapped(kind, ShortenTraceback):  # type: ignore[misc, valid-type]
        def remove_dynamo_frames(self) -> Any:
            # Dynamo drops __cause__ after this: the lines that failed are shown as our own.
            cause = getattr(self, "cause", None)
            if isinstance(cause, BaseException) and cause.__traceback__ is not None:
                return self.with_traceback(cause.__traceback__)
            return super().remove_dynamo_frames()

        def __reduce__(self) -> Any:  # pickled, it is what it was: this class has no name
            return _remade, (kind, self.args, error.__dict__)

    Unwrapped.__name__ = Unwrapped.__qualname__ = kind.__name__
    Unwrapped.__module__ = kind.__module__
    result = _remade(Unwrapped, error.args, error.__dict__)
    result.first_useful_frame = sys._getframe(1)  # the frame that raises it
    return result


def _remade(kind: type[Any], args: tuple[Any, ...], attributes: Mapping[str, Any]) -> Any:
    result = kind.__new__(kind, *args)
    result.args = args
    result.__dict__.update(attributes)
    return result
