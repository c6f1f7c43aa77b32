"""What is shared by the passes of one compile, and noted for the report."""

from __future__ import annotations

import dataclasses
import math
import traceback
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx

from ..core.decisions import Decision, Reason
from ..core.errors import PassError, RedrawError
from ..core.options import Options
from ..core.report import GraphReport
from ..core.version import source_hash
from ..passes.check_redraw import check_redraw
from ..passes.cost_model import find_cost_model
from ..passes.share_saves import ShareSaves
from ..passes.sites import Site
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
    inference: bool = True
    """Whether there is no backward."""
    decisions: list[Decision] = dataclasses.field(default_factory=list)
    """What was decided about the sites."""
    result: StructureResult | None = None
    before: str = ""
    after: str = ""
    forward: str = ""
    backward: str = ""
    saved_bytes: int | None = None
    failure: str | None = None
    """Traceback of what failed; the original program runs then."""
    recalled: GraphReport | None = None
    """The entry of the compile that torch's cache has the result of."""

    @property
    def from_cache(self) -> bool:
        """Whether torch's cache had the compiled graph, so that no pass ran."""
        return bool(self.sites) and not self.before and self.failure is None

    @property
    def key(self) -> str:
        """What the result depends on besides the graph, for torch's cache keys."""
        model = find_cost_model(self.options.cost_model)
        parts = (model.name, model.version, sorted(self.parameters), list(self.hints))
        return f"{source_hash()} {self.options!r} {parts!r}"

    def rewrite(self, graph: fx.Graph) -> None:
        """Structures the dropouts of an ATen graph, in place.

        Raises:
            PassError: it could not be done, and the graph may be half rewritten.
        """
        self.before += _code(graph)
        structure = StructureDropout(self.options, self.sites, self.parameters)
        try:
            result = structure.apply(graph)
            if result.modified:
                ShareSaves().apply(graph)
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
        """Cuts a joint graph in two, and proves that no mask is drawn again.

        Args:
            cut: cuts it.
            joint: the joint graph.
            inputs: its inputs.
            **kwargs: what else torch gives to ``cut``.

        Returns:
            The forward and the backward graph.

        Raises:
            RedrawError: backward would draw a mask again.
            PassError: the proof could not be made.
        """
        forward, backward = cut(joint, inputs, **kwargs)
        try:
            check_redraw(forward, backward)
        except RedrawError:
            raise
        except Exception as cause:
            raise PassError("check-redraw", cause) from cause
        self.inference = False
        self.forward, self.backward = _code(forward.graph), _code(backward.graph)
        self.saved_bytes = saved_bytes(forward, kwargs["num_fwd_outputs"])
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
        run = self if result or stock is None else stock
        return GraphReport(
            decisions=self._every_decision(),
            flops_before=result.flops_before if result else 0,
            flops_after=result.flops_after if result else 0,
            saved_bytes_before=stock.saved_bytes if stock else None,
            saved_bytes_after=run.saved_bytes,
            before=self.before or run.before,
            after=run.after,
            forward=run.forward or run.after,
            backward=run.backward,
            inference=run.inference,
            failure=self.failure,
        )

    def _every_decision(self) -> tuple[Decision, ...]:
        if self.failure is not None:
            settled = [_left(site, Reason.PASS_FAILED) for site in self.sites]
        else:
            met = {decision.site for decision in self.decisions}
            gone = [_left(site, Reason.UNUSED) for site in self.sites if site.index not in met]
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


def _left(site: Site, reason: Reason) -> Decision:
    return Decision(
        site=site.index,
        kind=site.kind,
        module=site.module,
        source=site.source,
        shape=(),
        p=site.p,
        taken=False,
        reason=reason,
    )


def _code(graph: fx.Graph) -> str:
    return graph.python_code("self", verbose=True).src


def saved_bytes(forward: fx.GraphModule, num_fwd_outputs: int) -> int:
    """Returns the bytes kept for backward that the forward made: inputs and parameters are free."""
    (outputs,) = forward.graph.output_node().args
    assert isinstance(outputs, (tuple, list))
    saved = {
        node
        for node in outputs[num_fwd_outputs:]
        if isinstance(node, fx.Node) and node.op != "placeholder"
    }
    return sum(_bytes(node.meta.get("val")) for node in saved)


def _bytes(value: object) -> int:
    if not isinstance(value, torch.Tensor):
        return 0
    return math.prod(map(size_hint, value.shape)) * value.element_size()


def size_hint(size: int | torch.SymInt) -> int:
    """Returns a size in this call, 1 for one that only the running program knows."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 1
