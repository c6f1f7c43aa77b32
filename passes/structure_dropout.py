"""The pass over the joint graph: analyse, plan, compact, and lower what stays random."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from torch import fx

from ..core.decisions import Decision, PassResult, Reason, Role
from ..core.errors import BudgetError
from ..core.options import Options
from .compact import compact
from .cost_model import find_cost_model
from .defer_dropout import can_defer, defer_masks
from .eager_draws import keeps_eager_masks
from .facts import KeptAxis
from .feature_dims import feature_axes, forward_nodes
from .find_copies import find_copies
from .find_exposed_zeros import find_exposed_zeros
from .find_roles import find_roles
from .match_dropout_calls import ALPHA_KINDS, ATTENTION
from .meet_budget import allowed_flops, meet_budget
from .plain_zeros import plain_zeros
from .plan_groups import GROUPS, HIGH_RATE, GroupPlan, plan_groups
from .plan_patterns import Verdict, plan_patterns
from .price_groups import GroupPricer
from .price_plan import Choice, PlanPricer
from .program_inputs import grads_of, inputs_in, results_only_at
from .quality import left_random
from .random_masks import SMALLEST_RATE, lower_random_masks, masks_in
from .relation import shape_of
from .seed_masks import seed_masks
from .sites import Site, decide, static_shape
from .split_rows import split_rows
from .support import Support
from .tile_weights import TileVerdict, tile_weights


@dataclasses.dataclass(frozen=True)
class StructureResult(PassResult):
    """What became of one joint graph."""

    flops_before: int = 0
    """FLOPs of the products of the graph."""
    flops_after: int = 0
    """The same with the dropped features left out."""
    flops_budget: int | None = None
    """FLOPs that the options allow, None where they set no budget."""
    same_plans: Sequence[int] = (0,)
    """For each plan of a row pattern, the first one that is the same."""


@dataclasses.dataclass(frozen=True)
class _Planned:
    """What was decided for the masks, with groups of rows or without."""

    grouped: GroupPlan
    pricer: PlanPricer
    verdicts: dict[fx.Node, Verdict]


_NO_AXIS = (Reason.NO_PRODUCT, Reason.SHAPE, Reason.DYNAMIC_DIM)
"""What is said of a mask that has no dimension to drop."""


@dataclasses.dataclass(frozen=True)
class StructureDropout:
    """Draws masks by blocks and leaves the dropped features out of every product around them.

        %mask = ardd.dropout_mask(%x, ...)          %kept, %slot = ardd.draw_blocks(128, 64)
        %y = mul(%x, %mask)                    =>   %y = mul(%x_kept, 2.0)
        %z = mm(%y, %w)                             %z = mm(%y, index(%w, kept))

    Song et al. 2018, "Approximate Random Dropout", https://arxiv.org/abs/1805.08939, with the kept
    set drawn uniformly instead of periodically, as Graham et al. 2015, "Efficient batchwise dropout
    training using submatrices", https://arxiv.org/abs/1502.02478, do with blocks of 1. For the mask
    drawn, the graph computes what the masked dense one would.
    """

    name: ClassVar[str] = "structure-dropout"
    exact: ClassVar[bool] = True

    options: Options = dataclasses.field(default_factory=Options)
    """What the user asked for."""
    sites: Sequence[Site] = ()
    """The marked dropouts; the last argument of a mask is an index into it."""
    parameters: Collection[int] = ()
    """Which inputs of the Dynamo graph are parameters."""
    plan: int = 0
    """Which plan of a row pattern the graph is for."""

    def apply(self, graph: fx.Graph) -> StructureResult:
        """Rewrites an ATen graph in place.

        Args:
            graph: forward alone, or joint, with ``ardd::dropout_mask`` nodes.

        Raises:
            BudgetError: no rates that the options allow meet the budget of FLOPs.
        """
        masks = masks_in(graph)
        if not masks:
            return StructureResult(modified=False)
        plain_zeros(graph)
        parameters = inputs_in(graph, self.parameters)
        roles = {mask.args[4]: role for mask, role in find_roles(graph, masks, parameters).items()}
        copies = {mask.args[4] for mask in find_copies(graph, masks, parameters)}
        sites = [
            dataclasses.replace(site, role=roles.get(site.index), copies=site.index in copies)
            for site in self.sites
        ]
        seed_masks(graph, masks, [site.index for site in sites])
        return dataclasses.replace(self, sites=sites)._rewrite(graph, masks)

    def _rewrite(self, graph: fx.Graph, masks: list[fx.Node]) -> StructureResult:
        """Rewrites a graph whose masks have seeds, with sites whose roles are known."""
        if self.options.pattern == "deferred":
            return self._deferred(graph, masks)
        model = find_cost_model(self.options.cost_model)
        weights = [mask for mask in masks if self._site(mask).of_weight]
        tiles = {
            mask: TileVerdict(None, reason)
            for mask in weights
            if (reason := self._left_random(mask)) is not None
        }
        weights = [mask for mask in weights if mask not in tiles]
        tiles |= tile_weights(graph, weights, self.options, model)
        tiled = [verdict for verdict in tiles.values() if verdict.tiling]
        device = masks[0].meta["val"].device
        masks = masks_in(graph)
        candidates = {m: _axes(number, m) for number, m in enumerate(masks)}
        support = Support(graph, candidates)
        exposed = find_exposed_zeros(graph, support)
        seen = {mask for mask, axes in candidates.items() if not exposed.isdisjoint(axes.values())}
        if exposed:
            candidates = {
                mask: {dim: axis for dim, axis in axes.items() if axis not in exposed}
                for mask, axes in candidates.items()
            }
            support = Support(graph, candidates)
        ungrouped = GroupPlan(support, None, {})
        # Tiles are cut already, and yet a part of what the graph has without dropout.
        dense = PlanPricer(ungrouped.support, model, device).flops(ungrouped.support.relations, {})
        dense += sum(verdict.flops_before - verdict.flops_after for verdict in tiled)

        def planned(grouped: GroupPlan) -> _Planned:
            pricer = PlanPricer(grouped.support, model, device)
            if grouped.rows is not None:
                pricer = GroupPricer(grouped.support, model, device, grouped.rows)
            found = self._verdicts(graph, masks, grouped.support, pricer, len(tiled), dense, seen)
            return _Planned(grouped, pricer, grouped.explained(found))

        if self.options.pattern == "grouped":
            taken = planned(self._groups(graph, masks, ungrouped.support))
        else:
            taken = planned(ungrouped)
            if self.options.pattern == "auto" and any(
                _float(mask.args[2]) > HIGH_RATE and verdict.choice
                for mask, verdict in taken.verdicts.items()
            ):
                # Only now: groups guard a dynamic batch, for nothing where none pays.
                why = "flops_budget cannot be met with groups"
                with contextlib.suppress(BudgetError):
                    tried = planned(self._groups(graph, masks, ungrouped.support))
                    holds = tried.grouped.holds(tried.verdicts)
                    why = "" if holds else "with groups not every dropout pays"
                    taken = tried if holds else taken
                if why:
                    taken = _one_group(taken, why)
        grouped, support = taken.grouped, taken.grouped.support
        pricer, verdicts = taken.pricer, taken.verdicts
        plans = [
            {v.choice.axis: v.choice.in_plan(plan) for v in verdicts.values() if v.choice}
            for plan in range(self.options.plans if self.options.pattern == "row" else 1)
        ]
        decisions = [self._decision(m, verdicts[m], pricer, plans) for m in verdicts]
        decisions += [self._tile_decision(mask, tiles[mask]) for mask in tiles]
        result = StructureResult(
            modified=True,
            decisions=tuple(decisions),
            flops_before=dense,
            flops_after=_mean_flops(pricer, support.relations, plans),
            flops_budget=allowed_flops(dense, self.options),
            same_plans=tuple(plans.index(plan) for plan in plans),
        )
        chosen = plans[self.plan]
        for mask in masks:
            if any(_keeps_all(chosen.get(axis)) for axis in support.masks[mask].values()):
                mask.update_arg(2, 0.0)  # lowered to the constant that it is
        chosen = {axis: choice for axis, choice in chosen.items() if not _keeps_all(choice)}
        if grouped.rows is not None:
            support = split_rows(graph, support, grouped.rows, chosen)
        compact(graph, support, {m: _float(m.args[3]) for m in support.masks}, chosen)
        lower_random_masks(graph)
        graph.lint()
        return result

    def _deferred(self, graph: fx.Graph, masks: list[fx.Node]) -> StructureResult:
        """Takes the masks out of the graph that saves alone can be dropped for."""
        fuel = self.options.max_rewrites
        forward = set(forward_nodes(graph))
        grads = results_only_at(graph, grads_of(graph, self.parameters, 0))
        deferred: list[fx.Node] = []
        decisions = []
        for mask in masks:
            site, reason = self._site(mask), Reason.DEFERRED
            if site.of_weight:
                reason = Reason.WEIGHT_DROPOUT
            elif not can_defer(mask, forward, grads):
                reason = Reason.NOT_DEFERRABLE
            elif fuel is not None and len(deferred) >= fuel:
                reason = Reason.OUT_OF_FUEL
            else:
                deferred.append(mask)
            taken = reason is Reason.DEFERRED
            decisions.append(
                decide(
                    site,
                    reason,
                    taken=taken,
                    shape=static_shape(mask.meta["val"]),
                    pattern="deferred" if taken else "random",
                    p_used=site.p,
                )
            )
        defer_masks(graph, deferred)
        lower_random_masks(graph)
        graph.lint()
        return StructureResult(modified=True, decisions=tuple(decisions))

    def _groups(self, graph: fx.Graph, masks: list[fx.Node], support: Support) -> GroupPlan:
        lowest = HIGH_RATE if self.options.pattern == "auto" else 0.0
        able = [
            mask
            for mask in masks
            if not self._site(mask).of_weight
            and self._refused(mask, support) is None
            and self._left_random(mask) is None
            and _float(mask.args[2]) > lowest
        ]
        wanted = self.options.groups
        if wanted == "auto":
            wanted = GROUPS[self.options.pattern]
        parameters = inputs_in(graph, self.parameters)
        return plan_groups(graph, support, able, parameters, wanted)

    def _verdicts(
        self,
        graph: fx.Graph,
        masks: list[fx.Node],
        support: Support,
        pricer: PlanPricer,
        n_tiled: int,
        dense_flops: int,
        seen: Collection[fx.Node],
    ) -> dict[fx.Node, Verdict]:
        """Decides on every mask; of those in ``seen`` an op sees more zeros than their products."""
        masks = [mask for mask in masks if not self._site(mask).of_weight]
        refused = {m: reason for m in masks if (reason := self._refused(m, support)) is not None}
        rates = {m: _float(m.args[2]) for m in masks if m not in refused}
        features = (
            feature_axes(graph, support, set(inputs_in(graph, self.parameters))) if rates else set()
        )
        for mask in rates:
            reason = self._left_random(mask)
            if reason is not None and any(x in features for x in support.masks[mask].values()):
                refused[mask] = reason
        rates = {mask: p for mask, p in rates.items() if mask not in refused}
        planned = plan_patterns(support, rates, features, pricer, self.options)
        planned = meet_budget(planned, support, pricer, dense_flops, self.options)
        fuel = self.options.max_rewrites
        fuel = None if fuel is None else fuel - n_tiled
        verdicts: dict[fx.Node, Verdict] = {}
        for mask in masks:
            verdict = planned.get(mask) or Verdict(None, refused[mask])
            if mask in seen and verdict.reason in _NO_AXIS:
                verdict = Verdict(None, Reason.ZEROS_SEEN)
            if verdict.choice and fuel is not None and fuel <= 0:
                verdict = Verdict(None, Reason.OUT_OF_FUEL)
            elif verdict.choice and fuel is not None:
                fuel -= 1
            verdicts[mask] = verdict
        return verdicts

    def _left_random(self, mask: fx.Node) -> Reason | None:
        """Returns why a mask that could be structured is better left random, None if it is not."""
        site, of_tokens = self._site(mask), mask.meta["val"].dim() > 2
        if site.copies:
            return Reason.COPIES
        return left_random(site.role or Role.OTHER, site.p, of_tokens, self.options)

    def _refused(self, mask: fx.Node, support: Support) -> Reason | None:
        """Returns why a mask cannot be structured whatever it costs, None if it can."""
        if self.options.pattern == "random":
            return Reason.PATTERN_RANDOM
        if self.options.pattern == "auto" and keeps_eager_masks():
            return Reason.FALLBACK_RANDOM
        if _float(mask.args[2]) <= SMALLEST_RATE:
            return Reason.P_ROUNDS_TO_ZERO
        if not mask.users:
            return Reason.UNUSED
        if self._site(mask).kind in ALPHA_KINDS:
            return Reason.ALPHA_DROPOUT
        if self._site(mask).kind in ATTENTION:
            return Reason.NO_PRODUCT  # it is over pairs of positions, whatever is multiplied
        if not support.masks[mask]:
            fixed = all(isinstance(size, int) for size in shape_of(mask))
            return Reason.SHAPE if fixed else Reason.DYNAMIC_DIM
        return None

    def _decision(
        self,
        mask: fx.Node,
        verdict: Verdict,
        pricer: PlanPricer,
        plans: Sequence[Mapping[KeptAxis, Choice]],
    ) -> Decision:
        site, choice = self._site(mask), verdict.choice
        touched = pricer.touched_by(choice.axis) if choice else []
        return decide(
            site,
            verdict.reason,
            taken=choice is not None,
            shape=static_shape(mask.meta["val"]),
            detail=verdict.detail,
            pattern=choice.pattern if choice else "random",
            p_used=choice.p_used if choice else site.p,
            dim=choice.axis.dim if choice else None,
            block=choice.block if choice else None,
            flops_before=pricer.flops(touched, {}),
            flops_after=_mean_flops(pricer, touched, plans),
        )

    def _tile_decision(self, mask: fx.Node, verdict: TileVerdict) -> Decision:
        site, tiling = self._site(mask), verdict.tiling
        return decide(
            site,
            verdict.reason,
            taken=tiling is not None,
            shape=static_shape(mask.meta["val"]),
            detail=verdict.detail,
            pattern="tile" if tiling else "random",
            p_used=tiling.p_used if tiling else site.p,
            block=tiling.tile[0] if tiling else None,
            flops_before=verdict.flops_before,
            flops_after=verdict.flops_after,
        )

    def _site(self, mask: fx.Node) -> Site:
        index = mask.args[4]
        assert isinstance(index, int)
        return next(site for site in self.sites if site.index == index)


def _one_group(planned: _Planned, why: str) -> _Planned:
    """Returns the plan without groups, whose high rates say why they have none."""
    high = [mask for mask in planned.verdicts if _float(mask.args[2]) > HIGH_RATE]
    said = dataclasses.replace(planned.grouped, refused=dict.fromkeys(high, why))
    return dataclasses.replace(planned, verdicts=said.explained(planned.verdicts))


def _axes(number: int, mask: fx.Node) -> dict[int, KeptAxis]:
    """Returns the dimensions of a mask that could be dropped: those of a fixed size above 1."""
    sizes = enumerate(shape_of(mask))
    return {d: KeptAxis(number, d, s) for d, s in sizes if isinstance(s, int) and s > 1}


def _keeps_all(choice: Choice | None) -> bool:
    """Whether a plan drops nothing of a dropout that is structured."""
    return choice is not None and choice.n_kept == choice.n_blocks


def _mean_flops(
    pricer: PlanPricer, nodes: Collection[fx.Node], plans: Sequence[Mapping[KeptAxis, Choice]]
) -> int:
    """Returns the FLOPs of a step: each plan is as likely as any other."""
    return round(sum(pricer.flops(nodes, chosen) for chosen in plans) / len(plans))


def _float(value: Any) -> float:
    assert isinstance(value, float)
    return value
