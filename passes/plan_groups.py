"""Decides how many groups of rows there are, and which dropouts have kept sets for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import StrictMinMaxConstraint, statically_known_true

from ..core.decisions import Reason
from .facts import KeptAxis
from .feature_dims import feature_axes
from .group_support import GroupSupport
from .plan_patterns import Verdict
from .relation import shape_of
from .row_groups import RowGroups, find_row_groups
from .support import Support

GROUPS = {"auto": 2, "grouped": 4}
"""Pattern to the groups it has where the options name no number.

With one kept set for a batch of 128, an MLP at p = 0.7 is 1.8 points below Bernoulli masks on
MNIST; with 2 it is at par, and from 4 to 16 nothing changes any more, while every group gathers
the weights once more (10 epochs of 4,000 images, 2 seeds). 2 cost that MLP, 2,048 wide, 10 %
more time at a batch of 128 and 5 % at 512; 4 cost 50 % and 24 %."""
HIGH_RATE = 0.5
"""Above it the pattern "auto" has groups. Up to it one kept set trains the MLP and the LSTM of
benchmarks/results/quality_cpu_202611.md as well as Bernoulli masks do, and groups do not help the
transformer, which it does not."""


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """Which dropouts can have groups."""

    support: Support
    """The facts of the graph, with groups on the kept axes of those."""
    rows: RowGroups | None
    """Where their rows are, None where none can."""
    refused: Mapping[fx.Node, str]
    """Why the other masks that could be structured have none."""

    def holds(self, verdicts: Mapping[fx.Node, Verdict]) -> bool:
        """Returns whether all dropouts that can have groups are structured with them."""
        return all(
            verdict.choice is not None or verdict.reason is Reason.OUT_OF_FUEL
            for mask, verdict in verdicts.items()
            if any(axis.groups > 1 for axis in self.support.masks[mask].values())
        )

    def explained(self, verdicts: Mapping[fx.Node, Verdict]) -> dict[fx.Node, Verdict]:
        """Returns the verdicts with what became of the groups in their details."""
        return {mask: self._explained(mask, verdict) for mask, verdict in verdicts.items()}

    def _explained(self, mask: fx.Node, verdict: Verdict) -> Verdict:
        if verdict.choice is None or (verdict.choice.axis.groups == 1 and mask not in self.refused):
            return verdict
        groups = verdict.choice.axis.groups
        said = f"{groups} groups of rows" if groups > 1 else f"one group: {self.refused[mask]}"
        return dataclasses.replace(verdict, detail=f"{verdict.detail}; {said}")


def plan_groups(
    graph: fx.Graph,
    support: Support,
    masks: Collection[fx.Node],
    parameters: Collection[fx.Node],
    groups: int,
) -> GroupPlan:
    """Finds the masks that can have groups, and the facts of the graph with them.

    Args:
        graph: the analysed graph.
        support: its facts without groups.
        masks: those that may be structured.
        parameters: the placeholders that are parameters.
        groups: how many are asked for. Fewer are taken where that many do not divide the rows.
    """
    refused = {mask: why for mask in masks if (why := _no_rows(mask)) is not None}
    able = [mask for mask in masks if mask not in refused]
    counts = {g: sum(_may_divide(g, mask) for mask in able) for g in range(2, groups + 1)}
    taken = max(counts, key=lambda g: (counts[g], g), default=1)
    for mask in able:
        if not counts:
            refused[mask] = "1 group was asked for"
        elif _of_one_row(taken, mask):
            refused[mask] = "a group of one row would fix the size of a dynamic batch"
        elif not counts[taken] or not _divides(taken, mask):
            refused[mask] = f"{taken} groups do not divide its rows"
    features = feature_axes(graph, support, parameters)
    while True:
        able = [mask for mask in masks if mask not in refused]
        if not able:
            return GroupPlan(support, None, refused)
        rows = find_row_groups(support.relations, able, taken)
        axes = {m: _axes(m, support, taken if m in able else 1) for m in support.masks}
        grouped = GroupSupport(graph, axes, rows)
        found = feature_axes(graph, grouped, parameters)
        lost = [m for m in able if found.isdisjoint(axes[m].values())]
        lost = [m for m in lost if not features.isdisjoint(support.masks[m].values())]
        if not lost:
            return GroupPlan(grouped, rows, refused)
        refused |= dict.fromkeys(lost, "no product around it can be computed group by group")


def _no_rows(mask: fx.Node) -> str | None:
    shape = shape_of(mask)
    if len(shape) < 2:
        return "it has no rows beside its features"
    return "it has one row, or one mask for all" if statically_known_true(shape[0] == 1) else None


def _may_divide(groups: int, mask: fx.Node) -> bool:
    """Returns whether the rows of the example are divided by so many groups."""
    rows = shape_of(mask)[0]
    if _of_one_row(groups, mask):
        return False
    if not isinstance(rows, int) and rows.node.has_hint():
        rows = int(rows.node.hint)
    return statically_known_true(rows % groups == 0) and statically_known_true(rows > 0)


def _of_one_row(groups: int, mask: fx.Node) -> bool:
    """Returns whether the example leaves one row of a dynamic batch to a group.

    Torch takes a size of 1 for fixed, and with it the batch.
    """
    rows = shape_of(mask)[0]
    return not isinstance(rows, int) and rows.node.has_hint() and int(rows.node.hint) == groups


def _divides(groups: int, mask: fx.Node) -> bool:
    """Returns whether so many groups divide the rows of every batch that the graph will run.

    Where the batch is dynamic and the groups divide the example, the graph is guarded to be run
    with such batches only; others compile a graph of their own. Not where the user has promised a
    range of batches to one graph.
    """
    rows = shape_of(mask)[0]
    if not _may_divide(groups, mask):
        return False
    if isinstance(rows, torch.SymInt) and not statically_known_true(rows % groups == 0):
        return not _is_promised(rows) and bool(rows % groups == 0)
    return True


def _is_promised(rows: torch.SymInt) -> bool:
    """Returns whether ``mark_dynamic(min=, max=)`` says what one graph has to run."""
    symbols = rows.node.expr.free_symbols
    for tracked in rows.node.shape_env.tracked_fakes or ():
        constraints = getattr(tracked.symbolic_context, "constraint_sizes", None) or ()
        for size, constraint in zip(getattr(tracked.fake, "shape", ()), constraints, strict=False):
            strict = isinstance(constraint, StrictMinMaxConstraint)
            if strict and isinstance(size, torch.SymInt) and size.node.expr.free_symbols & symbols:
                return True
    return False


def _axes(mask: fx.Node, support: Support, groups: int) -> dict[int, KeptAxis]:
    """Returns the kept axes of a mask; with groups none of its rows."""
    axes = support.masks[mask]
    if groups == 1:
        return dict(axes)
    return {d: dataclasses.replace(axis, groups=groups) for d, axis in axes.items() if d > 0}
