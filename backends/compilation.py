"""What is shared by the passes of one compile, and noted for the report."""

from __future__ import annotations

import dataclasses
import traceback
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import fx

from ..core.decisions import Decision, Reason
from ..core.errors import BudgetError, PassError, RedrawError
from ..core.options import Options
from ..core.report import GraphReport
from ..core.version import source_hash
from ..passes.check_redraw import check_redraw
from ..passes.compress_saves import CompressSaves, SavesResult
from ..passes.cost_model import find_cost_model
from ..passes.cut_graphs import Cut
from ..passes.program_inputs import grads_of, inputs_in
from ..passes.share_saves import ShareSaves
from ..passes.sites import Site, decide
from ..passes.structure_dropout import StructureDropout, StructureResult

Partition = Callable[..., tuple[fx.GraphModule, fx.GraphModule]]


@dataclasses.dataclass
class Compilation:
    """The state of one compile of one Dynamo graph."""

    options: Options
    sites: Sequence[Site] = ()
    """The dropouts that have been marked."""
    found: Sequence[Decision] = ()
    """Those that have been found and left alone."""
    parameters: Collection[int] = ()
    """Which inputs are parameters."""
    hints: Sequence[int] = ()
    """Sizes in this call of what may differ in others: prices depend on them."""
    plan: int = 0
    """Which plan of a row pattern this compiles."""
    inference: bool = True
    """Whether there is no backward."""
    decisions: list[Decision] = dataclasses.field(default_factory=list)
    """What was decided about the sites."""
    result: StructureResult | None = None
    before: str = ""
    after: str = ""
    forward: str = ""
    backward: str = ""
    saves: SavesResult | None = None
    """What became of the tensors saved for backward."""
    save_errors: dict[str, float] = dataclasses.field(default_factory=dict)
    """Relative errors of saved tensors by name, where they were measured."""
    failure: str | None = None
    """Traceback of what failed; the original program runs then."""
    recalled: GraphReport | None = None
    """The entry of the compile that torch's cache has the result of."""

    @property
    def from_cache(self) -> bool:
        """Whether torch's cache had the compiled graph, so that no pass ran."""
        return not self.before and self.failure is None

    @property
    def key(self) -> str:
        """What the result depends on besides the graph, for torch's cache keys."""
        model = find_cost_model(self.options.cost_model)
        parts = (model.name, model.version, sorted(self.parameters), list(self.hints))
        return f"{source_hash()} {self.options!r} {parts!r} {self.plan}"

    @property
    def same_plans(self) -> Sequence[int]:
        """For each plan of a row pattern the first one whose graph is the same, as far as known.

        One alone where the graph has no plans.
        """
        if self.options.pattern != "row" or not self.sites or self.failure is not None:
            return (0,)
        if self.result is not None:
            return self.result.same_plans
        return range(self.options.plans)  # from a cache, which will have the others too

    def rewrite(self, graph: fx.Graph) -> None:
        """Structures the dropouts of an ATen graph, in place.

        Raises:
            BudgetError: no rates that the options allow meet the budget of FLOPs.
            PassError: it could not be done, and the graph may be half rewritten.
        """
        self.before += _code(graph)
        structure = StructureDropout(self.options, self.sites, self.parameters, self.plan)
        try:
            result = structure.apply(graph)
            if result.modified:
                ShareSaves().apply(graph)
        except BudgetError:
            raise
        except Exception as cause:
            # Out through torch, so that no half of this can end up in its caches.
            raise PassError(structure.name, cause) from cause
        if self.result is None or result.modified:
            self.result = result
        self.decisions.extend(result.decisions)
        self.after += _code(graph)

    def partition(
        self, cut: Partition, joint: fx.GraphModule, inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Cuts a joint graph in two, proves that no mask is drawn again, and encodes the saves.

        Args:
            cut: cuts it.
            joint: the joint graph.
            inputs: its inputs.
            **kwargs: what else torch gives to ``cut``.

        Returns:
            The forward and the backward graph.

        Raises:
            RedrawError: backward would draw a mask again.
            BudgetError: no plan of the saves fits the memory budget.
            PassError: the proof could not be made, or the saves could not be encoded.
        """
        forward, backward = cut(joint, inputs, **kwargs)
        try:
            check_redraw(forward, backward)
        except RedrawError:
            raise
        except Exception as cause:
            raise PassError("check-redraw", cause) from cause
        self.inference = False
        results = kwargs["num_fwd_outputs"]
        both = Cut(
            forward,
            backward,
            results,
            inputs_in(forward.graph, self.parameters),
            grads_of(joint.graph, self.parameters, results),
        )
        try:
            self.saves = CompressSaves(self.options).apply(both)
        except BudgetError:
            raise
        except Exception as cause:
            raise PassError(CompressSaves.name, cause) from cause
        self.forward, self.backward = _code(forward.graph), _code(backward.graph)
        return forward, backward

    def fail(self, error: PassError) -> None:
        """Notes that something failed and that the original program runs, and warns."""
        self.failure = "".join(traceback.format_exception(error.cause))
        warnings.warn(f"ardd: {error}", RuntimeWarning, stacklevel=2)

    def report(self, stock: Compilation | None = None) -> GraphReport:
        """Returns the entry of the report.

        Args:
            stock: the compile of the graph without ardd, where there was one.
        """
        if self.recalled is not None:
            return self._refreshed(self.recalled)
        # Where nothing is rewritten the original program runs.
        result = self.result if self.failure is None else None
        rewritten = result or (self.saves and self.failure is None)
        run = self if rewritten or stock is None else stock
        return GraphReport(
            decisions=self._every_decision(),
            flops_before=result.flops_before if result else 0,
            flops_after=result.flops_after if result else 0,
            flops_budget=result.flops_budget if result else None,
            saved_bytes_before=stock._saved_bytes if stock else self._stock_bytes(),
            saved_bytes_after=run._saved_bytes,
            before=self.before or run.before,
            after=run.after,
            forward=run.forward or run.after,
            backward=run.backward,
            inference=run.inference,
            failure=self.failure,
            saves=run.saves.saves if run.saves else (),
        )

    @property
    def _saved_bytes(self) -> int | None:
        return self.saves.bytes_after if self.saves else None

    def _stock_bytes(self) -> int | None:
        """Returns what torch alone saves: known where nothing but the saves was rewritten."""
        return self.saves.bytes_before if self.saves and not self.sites else None

    def _every_decision(self) -> tuple[Decision, ...]:
        if self.failure is not None:
            settled = [decide(site, Reason.PASS_FAILED, taken=False) for site in self.sites]
        else:
            met = {decision.site for decision in self.decisions}
            gone = [
                decide(site, Reason.UNUSED, taken=False)
                for site in self.sites
                if site.index not in met
            ]
            settled = self.decisions + gone
        return tuple(sorted([*self.found, *settled], key=lambda decision: decision.site))

    def _refreshed(self, entry: GraphReport) -> GraphReport:
        """Returns a recalled entry with the names of today, on which torch's caches do not look."""
        today = {x.site: x for x in self.found} | {s.index: s for s in self.sites}
        decisions = (
            dataclasses.replace(d, module=today[d.site].module, source=today[d.site].source)
            if d.site in today
            else d
            for d in entry.decisions
        )
        return dataclasses.replace(entry, decisions=tuple(decisions), from_cache=True)


def _code(graph: fx.Graph) -> str:
    return graph.python_code("self", verbose=True).src
