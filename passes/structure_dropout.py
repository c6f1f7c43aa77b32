"""The pass over the joint graph: analyse, plan, compact, and lower what stays random."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from torch import fx

from ..core.decisions import Decision, PassResult, Reason
from ..core.options import Options
from .compact import compact
from .cost_model import find_cost_model
from .defer_dropout import defer_masks
from .facts import KeptAxis
from .feature_dims import feature_axes
from .plan_groups import GroupPlan, plan_groups
from .plan_patterns import Verdict, plan_patterns
from .price_groups import GroupPricer
from .price_plan import Choice, PlanPricer
from .random_masks import SMALLEST_RATE, lower_random_masks, masks_in
from .relation import shape_of
from .sites import Site, static_shape
from .split_rows import split_rows
from .support import Support


@dataclasses.dataclass(frozen=True)
class StructureResult(PassResult):
    """What became of one joint graph."""

    flops_before: int = 0
    """FLOPs of the products of the graph."""
    flops_after: int = 0
    """The same with the dropped features left out."""


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

    def apply(self, graph: fx.Graph) -> StructureResult:
        """Rewrites an ATen graph in place.

        Args:
            graph: forward alone, or joint, with ``ardd::dropout_mask`` nodes.
        """
        masks = masks_in(graph)
        if not masks:
            return StructureResult(modified=False)
        if self.options.pattern == "deferred":
            return self._deferred(graph, masks)
        candidates = {m: _axes(number, m) for number, m in enumerate(masks)}
        support = Support(graph, candidates)
        device = masks[0].meta["val"].device
        model = find_cost_model(self.options.cost_model)
        grouped = self._groups(graph, masks, support)
        support = grouped.support
        pricer = PlanPricer(support, model, device)
        if grouped.rows is not None:
            pricer = GroupPricer(support, model, device, grouped.rows)
        verdicts = grouped.explained(self._verdicts(graph, masks, support, pricer))
        chosen = {v.choice.axis: v.choice for v in verdicts.values() if v.choice}
        decisions = tuple(self._decision(m, verdicts[m], pricer, chosen) for m in masks)
        result = StructureResult(
            modified=True,
            decisions=decisions,
            flops_before=pricer.flops(support.relations, {}),
            flops_after=pricer.flops(support.relations, chosen),
        )
        if grouped.rows is not None:
            support = split_rows(graph, support, grouped.rows, chosen)
        compact(graph, support, {m: _float(m.args[3]) for m in support.masks}, chosen)
        lower_random_masks(graph)
        graph.lint()
        return result

    def _deferred(self, graph: fx.Graph, masks: list[fx.Node]) -> StructureResult:
        """Takes all masks but those of weights out of the graph."""
        deferred = [mask for mask in masks if not self._site(mask).of_weight]
        decisions = []
        for mask in masks:
            site, taken = self._site(mask), mask in deferred
            decisions.append(
                Decision(
                    site=site.index,
                    kind=site.kind,
                    module=site.module,
                    source=site.source,
                    shape=static_shape(mask.meta["val"]),
                    p=site.p,
                    taken=taken,
                    reason=Reason.DEFERRED if taken else Reason.WEIGHT_DROPOUT,
                    pattern="deferred" if taken else "random",
                    p_used=site.p,
                )
            )
        defer_masks(graph, deferred)
        lower_random_masks(graph)
        graph.lint()
        return StructureResult(modified=True, decisions=tuple(decisions))

    def _groups(self, graph: fx.Graph, masks: list[fx.Node], support: Support) -> GroupPlan:
        if self.options.pattern != "grouped":
            return GroupPlan(support, None, {})
        able = [mask for mask in masks if self._refused(mask, support) is None]
        parameters = self._parameter_nodes(graph)
        return plan_groups(graph, support, able, parameters, self.options.groups)

    def _verdicts(
        self, graph: fx.Graph, masks: list[fx.Node], support: Support, pricer: PlanPricer
    ) -> dict[fx.Node, Verdict]:
        refused = {m: reason for m in masks if (reason := self._refused(m, support)) is not None}
        rates = {m: _float(m.args[2]) for m in masks if m not in refused}
        features = feature_axes(graph, support, self._parameter_nodes(graph)) if rates else set()
        planned = plan_patterns(support, rates, features, pricer, self.options)
        fuel = self.options.max_rewrites
        verdicts: dict[fx.Node, Verdict] = {}
        for mask in masks:
            verdict = planned.get(mask) or Verdict(None, refused[mask])
            if verdict.choice and fuel is not None and fuel <= 0:
                verdict = Verdict(None, Reason.OUT_OF_FUEL)
            elif verdict.choice and fuel is not None:
                fuel -= 1
            verdicts[mask] = verdict
        return verdicts

    def _refused(self, mask: fx.Node, support: Support) -> Reason | None:
        """Returns why a mask cannot be structured whatever it costs, None if it can."""
        if self._site(mask).of_weight:
            return Reason.WEIGHT_DROPOUT
        if self.options.pattern == "random":
            return Reason.PATTERN_RANDOM
        if _float(mask.args[2]) < SMALLEST_RATE:
            return Reason.P_ROUNDS_TO_ZERO
        if not mask.users:
            return Reason.UNUSED
        if not support.masks[mask]:
            fixed = all(isinstance(size, int) for size in shape_of(mask))
            return Reason.SHAPE if fixed else Reason.DYNAMIC_DIM
        return None

    def _decision(
        self,
        mask: fx.Node,
        verdict: Verdict,
        pricer: PlanPricer,
        chosen: Mapping[KeptAxis, Any],
    ) -> Decision:
        site, choice = self._site(mask), verdict.choice
        touched = pricer.touched_by(choice.axis) if choice else []
        return Decision(
            site=site.index,
            kind=site.kind,
            module=site.module,
            source=site.source,
            shape=static_shape(mask.meta["val"]),
            p=site.p,
            taken=choice is not None,
            reason=verdict.reason,
            detail=verdict.detail,
            pattern=_pattern(choice) if choice else "random",
            p_used=choice.p_used if choice else site.p,
            dim=choice.axis.dim if choice else None,
            block=choice.block if choice else None,
            flops_before=pricer.flops(touched, {}),
            flops_after=pricer.flops(touched, chosen),
        )

    def _site(self, mask: fx.Node) -> Site:
        index = mask.args[4]
        assert isinstance(index, int)
        return next(site for site in self.sites if site.index == index)

    def _parameter_nodes(self, graph: fx.Graph) -> list[fx.Node]:
        return [
            node
            for node in graph.nodes
            if node.op == "placeholder"
            and getattr(node.meta.get("desc"), "idx", None) in self.parameters
        ]


def _axes(number: int, mask: fx.Node) -> dict[int, KeptAxis]:
    """Returns the dimensions of a mask that could be dropped: those of a fixed size above 1."""
    sizes = enumerate(shape_of(mask))
    return {d: KeptAxis(number, d, s) for d, s in sizes if isinstance(s, int) and s > 1}


def _pattern(choice: Choice) -> str:
    return "grouped" if choice.axis.groups > 1 else "block"


def _float(value: Any) -> float:
    assert isinstance(value, float)
    return value
