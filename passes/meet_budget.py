"""Raises the rates of structured dropouts until the products of a graph fit a budget of FLOPs.

Rapp et al. 2022, "DISTREAL: Distributed Resource-Aware Learning in Heterogeneous Systems",
https://arxiv.org/abs/2112.08761, adapts the dropout of training to the resources of a device. It
searches a rate for every layer offline; here all rates rise together, and nothing is searched.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Iterable, Mapping
from fractions import Fraction

from torch import fx

from ..core.errors import BudgetError
from ..core.options import Options
from .facts import KeptAxis
from .plan_patterns import Verdict
from .price_plan import Choice, PlanPricer
from .support import Support

_ROUNDING = 1e-9  # 100 * (1 - 0.7) is a little more than 30


def allowed_flops(dense: int, options: Options) -> int | None:
    """Returns the FLOPs that the products of the graph may have, None where there is no budget.

    Args:
        dense: FLOPs without dropout.
        options: the budget.
    """
    budget = options.flops_budget
    return int(budget * dense) if isinstance(budget, float) else budget


def meet_budget(
    verdicts: Mapping[fx.Node, Verdict],
    support: Support,
    pricer: PlanPricer,
    dense: int,
    options: Options,
) -> dict[fx.Node, Verdict]:
    """Returns the verdicts with the rates that meet the budget.

    1. Which dropouts are structured, in which blocks, is settled before; only the number of blocks
       that stay becomes smaller, and with it grows the scale of what stays.
    2. All rates go the same share of their way to ``max_rate``, up to one block: the one that is
       least far on its way goes next. A rate that is there already stays.
    3. A smaller budget takes more steps of the same sequence, so that no rate is ever lower.

    Args:
        verdicts: what was decided for every mask at the rate asked for.
        support: the facts of the graph.
        pricer: counts the FLOPs.
        dense: FLOPs of the graph without dropout, weights in tiles whole.
        options: the budget and the bound.

    Raises:
        BudgetError: the highest rates are not enough.
    """
    budget = allowed_flops(dense, options)
    asked = {v.choice.axis: v.choice for v in verdicts.values() if v.choice}
    if budget is None:
        return dict(verdicts)
    steps = _steps(asked, options.max_rate)

    def flops(taken: int) -> int:
        return pricer.flops(support.relations, asked | _last(steps[:taken]))

    taken = bisect.bisect_left(range(len(steps)), -budget, key=lambda count: -flops(count))
    smallest = flops(taken)
    if smallest > budget:
        raise BudgetError.of_flops(budget, smallest, dense, options.max_rate, len(asked))
    raised = _last(steps[:taken])
    return {mask: _raised(verdict, raised) for mask, verdict in verdicts.items()}


def _steps(asked: Mapping[KeptAxis, Choice], max_rate: float) -> list[Choice]:
    """Returns the choices on the way to the highest rates, each with one block less than before."""
    steps: list[tuple[Fraction, KeptAxis, Choice]] = []
    for axis, choice in asked.items():
        least = max(1, math.ceil(choice.n_blocks * (1 - max_rate) - _ROUNDING))
        way = choice.n_kept - least
        for n_kept in range(choice.n_kept - 1, least - 1, -1):  # none where it is there already
            share = Fraction(choice.n_kept - n_kept, way)
            steps.append((share, axis, dataclasses.replace(choice, n_kept=n_kept)))
    steps.sort(key=lambda step: step[:2])
    return [choice for _, _, choice in steps]


def _last(steps: Iterable[Choice]) -> dict[KeptAxis, Choice]:
    """Returns the last choice of every dropout."""
    return {choice.axis: choice for choice in steps}


def _raised(verdict: Verdict, raised: Mapping[KeptAxis, Choice]) -> Verdict:
    before = verdict.choice
    if before is None or before.axis not in raised:
        return verdict
    detail = f"{verdict.detail}, raised from {before.p_used:.4g} to meet flops_budget"
    return dataclasses.replace(verdict, choice=raised[before.axis], detail=detail)
