"""ardd: dropout that pays. ``torch.compile(model, backend="ardd")``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from .backends.eager_masks import eager_masks
from .backends.set_rate import set_rate
from .core.decisions import Decision, Reason, Role
from .core.errors import (
    ArddError,
    BudgetError,
    CostModelError,
    DerivativeError,
    DistributionError,
    OptionsError,
    PassError,
    PayloadError,
    RateError,
    RedrawError,
)
from .core.options import Options
from .core.report import GraphReport, Report, current
from .core.saves import SavedTensor, SaveReason
from .core.version import VERSION
from .passes.cost_model import CostModel, OpCost, register_cost_model
from .runtime.draw_blocks import Draw
from .runtime.draw_blocks import record_draws as record_masks
from .runtime.draw_tiles import TileDraw
from .runtime.search_distribution import PeriodDistribution, search_distribution

__version__ = VERSION

__all__ = [
    "ArddError",
    "BudgetError",
    "CostModel",
    "CostModelError",
    "Decision",
    "DerivativeError",
    "DistributionError",
    "Draw",
    "GraphReport",
    "OpCost",
    "Options",
    "OptionsError",
    "PassError",
    "PayloadError",
    "PeriodDistribution",
    "RateError",
    "Reason",
    "RedrawError",
    "Report",
    "Role",
    "SaveReason",
    "SavedTensor",
    "TileDraw",
    "__version__",
    "compile",
    "eager_masks",
    "explain",
    "record_masks",
    "register_cost_model",
    "report",
    "search_distribution",
    "set_rate",
]


def compile(  # noqa: A001  # as torch.compile, in whose place it is called
    model: Callable[..., Any],
    *,
    options: Mapping[str, object] | None = None,
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="ardd", ...)`` that traces RNNs, where torch ends the graph.

    For models without ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` the two are the same.

    Args:
        model: a module or a function.
        options: see `ardd.Options`.
        mode: see `torch.compile`, as for the next two.
        dynamic: see there.
        fullgraph: see there.

    Returns:
        A module for a module, with its parameters, state and attributes, else a function.

    Raises:
        OptionsError: an option is unknown or has a value it cannot have.
        CostModelError: the cost model is unknown, or cannot be made.
    """
    from .backends import compile_rnns  # loads the compiler: only when asked to

    return compile_rnns.compile_with_rnns(
        model, options=options, mode=mode, dynamic=dynamic, fullgraph=fullgraph
    )


def report() -> Report:
    """Returns what was compiled so far in this process, and which RNNs torch did not capture."""
    from .backends.uncaptured import uncaptured_rnns

    so_far = current()
    return replace(so_far, notes=so_far.notes + uncaptured_rnns())


def explain(
    fn: Callable[..., Any],
    *args: Any,
    options: Mapping[str, object] | None = None,
    **kwargs: Any,
) -> Report:
    """Says what ``torch.compile(fn, backend="ardd", options=options)`` would do on a call.

    The call runs once, uncompiled; see `ardd.backends.explain.explain`.

    Args:
        fn: a module or a function.
        *args: arguments of the call.
        options: see `ardd.Options`.
        **kwargs: keyword arguments of the call.

    Returns:
        The report of this call alone.

    Raises:
        OptionsError: an option is unknown or has a value it cannot have.
        CostModelError: the cost model is unknown, or cannot be made.
        BudgetError: a graph does not fit the budget of memory or FLOPs.
        PassError: a pass failed, and the options say strict.
        RedrawError: backward would draw a mask again, and the options say strict.
    """
    from .backends import explain as dry_run  # loads the compiler: only when asked to

    return dry_run.explain(fn, *args, options=options, **kwargs)
