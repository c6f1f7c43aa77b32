"""Gives the groups of a row pattern their periods, so that shapes are static and rates are met.

Song et al. 2018 draw the period of every step from a distribution. A compiled graph has static
shapes, so the number of groups of each period has to be fixed: a *plan* fixes it for every dropout,
and one of M plans is drawn a step, each as likely as any other. Over the groups of all plans the
periods are as frequent as the searched distribution says, as far as whole numbers allow.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Sequence
from typing import Final

from ..core.errors import DistributionError
from ..core.options import Options
from ..runtime.draw_rows import kept_of
from ..runtime.search_distribution import PeriodDistribution, search_distribution

GROUP: Final = 8
"""Blocks that share a period and a start, about, where the options do not say."""
MIN_PERIODS: Final = 8
"""Periods to search among at least, where the options do not say."""

_distribution = functools.cache(search_distribution)


@dataclasses.dataclass(frozen=True)
class RowPlans:
    """The periods of the groups of one dropout, in every plan."""

    counts: tuple[tuple[int, ...], ...]
    """For each plan, the groups of the periods 1, 2, 3, ..."""
    rate: float
    """Share of the blocks that is dropped, over all plans: the probability of each to be."""
    distance: float
    """Total variation between the periods of all groups and the searched distribution, 0 to 1."""
    method: str
    """Which search."""

    @property
    def totals(self) -> tuple[int, ...]:
        """For each period, its groups in all plans."""
        return tuple(map(sum, zip(*self.counts, strict=True)))

    def describe(self) -> str:
        """Returns what the report says of the plans."""
        used = ", ".join(f"{i}: {n}" for i, n in enumerate(self.totals, 1) if n)
        plans = f" in {len(self.counts)} plans, of which 0 is shown" if len(self.counts) > 1 else ""
        return f"groups of period {used}{plans}; {self.distance:.3f} from {self.method}"


def plan_rows(n_blocks: int, p: float, options: Options, site: int) -> RowPlans | None:
    """Returns the plans whose rate is closest to p, None where no distribution has the rate.

    Args:
        n_blocks: blocks of the dropout.
        p: its rate.
        options: the search, its largest period, the number of plans and of groups.
        site: number of the dropout: dropouts get the periods of a step in orders of their own.
    """
    most = options.max_period
    if most == "auto":
        most = max(MIN_PERIODS, math.ceil(1 / (1 - p) - 1e-9))
    try:
        wanted = _distribution(p, most, options.search)
    except DistributionError:
        return None
    used = max(i for i, share in enumerate(wanted.probabilities, 1) if share > 1e-9)
    best: RowPlans | None = None
    for groups in _group_numbers(n_blocks, used, options):
        found = _plans(n_blocks // groups, groups, wanted, options, site)
        if best is None or _error(found, p) < _error(best, p) - 1e-12:
            best = found
        if _error(best, p) <= options.rate_tolerance / 4:
            break
    return best


def _error(plans: RowPlans, p: float) -> float:
    return abs(plans.rate - p)


def _group_numbers(n_blocks: int, longest: int, options: Options) -> list[int]:
    """Returns the numbers of groups to try, best first: the longest period fits in each group."""
    feasible = [
        groups
        for groups in range(1, n_blocks // longest + 1)
        if n_blocks % groups == 0 and options.row_groups in ("auto", groups)
    ]
    size = max(GROUP, longest)
    return sorted(feasible, key=lambda groups: abs(math.log(n_blocks / groups / size)))


def _plans(
    size: int, groups: int, wanted: PeriodDistribution, options: Options, site: int
) -> RowPlans:
    slots = groups * options.plans
    totals = _closest_counts(wanted, size, slots, options.rate_tolerance / 4)
    drops = [1 - kept_of(size, i) / size for i in range(1, len(totals) + 1)]
    return RowPlans(
        counts=_deal(totals, groups, options.plans, site),
        rate=math.fsum(n * d for n, d in zip(totals, drops, strict=True)) / slots,
        distance=_variation(totals, wanted.probabilities, slots),
        method=options.search,
    )


def _variation(counts: Sequence[int], wanted: Sequence[float], slots: int) -> float:
    return math.fsum(abs(n / slots - w) for n, w in zip(counts, wanted, strict=True)) / 2


def _closest_counts(
    wanted: PeriodDistribution, size: int, slots: int, tolerance: float
) -> list[int]:
    """Returns how often each period is used: the mean rate first, then the distribution.

    The largest remainders are rounded up, which is closest to the distribution. Then single slots
    change their period, while the mean is off by more than the tolerance and that brings it closer,
    and no count gets two or more away from what the distribution asks for.
    """
    ideal = [share * slots for share in wanted.probabilities]
    counts = [math.floor(x + 1e-9) for x in ideal]
    by_remainder = sorted(range(len(ideal)), key=lambda i: (counts[i] - ideal[i], i))
    for i in by_remainder[: slots - sum(counts)]:
        counts[i] += 1
    drops = [1 - kept_of(size, i) / size for i in range(1, len(ideal) + 1)]
    periods = [i for i, share in enumerate(wanted.probabilities) if share > 1e-9]
    for _ in range(slots):
        error = math.fsum(n * d for n, d in zip(counts, drops, strict=True)) / slots - wanted.rate
        if abs(error) <= tolerance:
            break
        best = (abs(error) - 1e-9, 0.0, -1, -1)
        for source in periods:
            for target in periods:
                near = counts[source] - 1 > ideal[source] - 2
                near = near and counts[target] + 1 < ideal[target] + 2
                if source == target or counts[source] == 0 or not near:
                    continue
                counts[source], counts[target] = counts[source] - 1, counts[target] + 1
                moved = abs(error + (drops[target] - drops[source]) / slots)
                away = _variation(counts, wanted.probabilities, slots)
                counts[source], counts[target] = counts[source] + 1, counts[target] - 1
                best = min(best, (moved, away, source, target))
        _, _, source, target = best
        if source < 0:
            break
        counts[source], counts[target] = counts[source] - 1, counts[target] + 1
    return counts


def _deal(totals: Sequence[int], groups: int, plans: int, site: int) -> tuple[tuple[int, ...], ...]:
    """Shares the periods out among the plans: evenly, and what is left over in an order of its own.

    The order depends on the number of the dropout alone, so that every compile has the same one.
    """
    dealt = [[n // plans for n in totals] for _ in range(plans)]
    left = [i for i, n in enumerate(totals) for _ in range(n % plans)]
    random.Random(f"plans of dropout {site}").shuffle(left)
    each = groups - sum(dealt[0])
    for number, counts in enumerate(dealt):
        for i in left[number * each : (number + 1) * each]:
            counts[i] += 1
    return tuple(map(tuple, dealt))
