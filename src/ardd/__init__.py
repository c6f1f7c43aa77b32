"""ardd: dropout that pays. ``torch.compile(model, backend="ardd")``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .backends.set_rate import set_rate
from .core.decisions import Decision, Reason
from .core.errors import (
    ArddError,
    BudgetError,
    CostModelError,
    DistributionError,
    OptionsError,
    PassError,
    PayloadError,
    RateError,
    RedrawError,
)
from .core.options import Options
from .core.report import GraphReport, Report
from .core.report import current as report
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
    "SaveReason",
    "SavedTensor",
    "TileDraw",
    "__version__",
    "explain",
    "record_masks",
    "register_cost_model",
    "report",
    "search_distribution",
    "set_rate",
]


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
