"""Chooses, for every dropout, the dimension to drop and its blocks, or to leave it random."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from fractions import Fraction

from torch import fx

from ..core.decisions import Reason
from ..core.options import Options
from .facts import KeptAxis
from .price_plan import Choice, PlanPricer
from .row_plans import plan_rows
from .support import Support

# More blocks would not make the gathers of any device cheaper, fewer make masks poor in variety.
MAX_BLOCK = 128
MIN_BLOCKS = 8
MIN_SLICES = 16
"""Blocks that a dimension beside other features, such as heads, has at least: each is a whole slice
of features, and of 12 heads one would be gone for the batch at any rate."""
_ROUNDING = 1e-12  # 1 - 12 / 25 - 0.5 is a little more than 0.02


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was decided for one mask."""

    choice: Choice | None
    """None: it stays random."""
    reason: Reason
    detail: str = ""


def plan_patterns(
    support: Support,
    rates: Mapping[fx.Node, float],
    features: set[KeptAxis],
    pricer: PlanPricer,
    options: Options,
) -> dict[fx.Node, Verdict]:
    """Returns the verdict on every mask.

    Every candidate is priced alone first. Then the masks are taken up by falling saving, each
    priced given those already taken: a product between two dropouts shrinks on both sides.

    Args:
        support: the facts of the graph.
        rates: drop rate of every mask that may be structured.
        features: the dimensions that may be dropped.
        pricer: prices choices.
        options: pattern, block size, tolerance and fuel.
    """
    verdicts: dict[fx.Node, Verdict] = {}
    best: dict[fx.Node, tuple[float, Choice]] = {}
    for mask, p in rates.items():
        axes = [axis for axis in support.masks[mask].values() if axis in features]
        if not axes:
            verdicts[mask] = Verdict(None, Reason.NO_PRODUCT)
            continue
        least = MIN_SLICES if len(axes) > 1 else 1
        choices = [c for a in axes for c in block_choices(a, p, options) if c.n_blocks >= least]
        if not choices:
            verdicts[mask] = Verdict(None, Reason.SHAPE, _shape_detail(axes, p, options))
            continue
        # On a tie the smaller block comes first: its masks have more variety.
        best[mask] = max(
            ((_saving(pricer, _at_rate(choice, p), {}), choice) for choice in choices),
            key=lambda pair: (pair[0], -pair[1].block),
        )
    chosen: dict[KeptAxis, Choice] = {}
    rows = {axis: mask.args[4] for mask, axes in support.masks.items() for axis in axes.values()}
    conflicts = _conflicts(support)
    waiting = sorted(best, key=lambda mask: -best[mask][0])
    for _ in range(2):  # again, since a neighbour taken later can make a refused one pay
        for mask in waiting:
            _, choice = best[mask]
            if choice.axis in chosen:
                continue
            rivals = conflicts.get(choice.axis, set()) & chosen.keys()
            if choice.axis in conflicts.get(choice.axis, set()):
                rivals.add(choice.axis)
            if rivals:
                detail = ", ".join(f"dropout {rows[axis]}" for axis in sorted(rivals))
                verdicts[mask] = Verdict(None, Reason.CONFLICT, detail)
                continue
            saving = _saving(pricer, choice, chosen)
            detail = f"{saving * 1e6:+.0f} us a step predicted"
            if choice.rows is not None:
                detail = f"{choice.rows.describe()}; {detail}"
            if saving > 0 or options.pattern != "auto":
                chosen[choice.axis] = choice
                verdicts[mask] = Verdict(choice, Reason.STRUCTURED, detail)
            else:
                verdicts[mask] = Verdict(None, Reason.NOT_WORTH_IT, detail)
    return {mask: verdicts[mask] for mask in rates}


def block_choices(axis: KeptAxis, p: float, options: Options) -> Iterator[Choice]:
    """Yields the block sizes whose rate is close enough to p, smallest first."""
    sizes = range(1, MAX_BLOCK + 1) if options.block_size == "auto" else [options.block_size]
    for block in sizes:
        n_blocks = axis.size // block
        wants_variety = options.block_size == "auto" and (block > 1 or options.pattern == "auto")
        if axis.size % block or (wants_variety and n_blocks < MIN_BLOCKS):
            continue
        if options.pattern == "row":
            rows = plan_rows(n_blocks, p, options, axis.site)
            if rows and rows.rate > 0 and abs(rows.rate - p) <= options.rate_tolerance + _ROUNDING:
                # Priced at the mean of the plans, so that all plans structure the same dropouts.
                n_kept = round(n_blocks * (1 - rows.rate))
                yield Choice(axis, block, n_blocks, n_kept, "row", rows)
            continue
        n_kept = round(n_blocks * (1 - p))
        error = abs(1 - n_kept / n_blocks - p)
        if 0 < n_kept < n_blocks and error <= options.rate_tolerance + _ROUNDING:
            pattern = "window" if options.pattern == "window" else "block"
            if axis.groups > 1:
                pattern = "grouped"
            yield Choice(axis, block, n_blocks, n_kept, pattern)


def _at_rate(choice: Choice, p: float) -> Choice:
    """Returns the choice as if its blocks met the rate: rounding up the rate is no merit."""
    exact = Fraction(1 - p).limit_denominator(1000)
    return dataclasses.replace(choice, n_blocks=exact.denominator, n_kept=exact.numerator)


def _saving(pricer: PlanPricer, choice: Choice, chosen: dict[KeptAxis, Choice]) -> float:
    nodes = pricer.touched_by(choice.axis)
    return pricer.seconds(nodes, chosen) - pricer.seconds(nodes, chosen | {choice.axis: choice})


def _conflicts(support: Support) -> dict[KeptAxis, set[KeptAxis]]:
    """Returns the axes that would cut one dimension of one tensor in two ways."""
    pairs: dict[KeptAxis, set[KeptAxis]] = {}
    for facts in support.every_facts():
        for a, b in itertools.combinations(sorted(facts), 2):
            first, second = a.scaled(1), b.scaled(1)
            pairs.setdefault(first, set()).add(second)
            pairs.setdefault(second, set()).add(first)
    return pairs


def _shape_detail(axes: list[KeptAxis], p: float, options: Options) -> str:
    sizes = ", ".join(str(axis.size) for axis in axes)
    detail = f"size {sizes}, p {p:g}, block_size {options.block_size}"
    if len(axes) > 1:
        detail += f", at least {MIN_SLICES} slices"
    if options.pattern == "row":
        detail += f", plans {options.plans}, row_groups {options.row_groups}"
    return detail
