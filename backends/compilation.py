"""One compilation: the passes with their fallback, and what is noted for the report."""

from __future__ import annotations

import dataclasses
import logging
import math
import traceback
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition

from ..core.decisions import Decision, Reason
from ..core.errors import PassError
from ..core.options import Options
from ..core.report import GraphReport
from ..core.version import source_hash
from ..passes.check_redraw import check_redraw
from ..passes.cost_model import find_cost_model
from ..passes.random_masks import lower_random_masks
from ..passes.share_saves import ShareSaves
from ..passes.sites import Site
from ..passes.structure_dropout import StructureDropout, StructureResult

logger: Final = logging.getLogger("ardd")

Partition = Callable[..., tuple[fx.GraphModule, fx.GraphModule]]


@dataclasses.dataclass
class Compilation:
    """What is shared by the passes of one Dynamo graph.

    A graph with a failing pass is compiled as it was: `failure` says so in the report.
    """

    options: Options
    sites: Sequence[Site] = ()
    parameters: Collection[int] = ()
    decisions: list[Decision] = dataclasses.field(default_factory=list)
    result: StructureResult | None = None
    before: str = ""
    after: str = ""
    forward: str = ""
    backward: str = ""
    saved_bytes: int | None = None
    inference: bool = True
    failure: str | None = None
    report_key: str = ""

    @property
    def from_cache(self) -> bool:
        """Whether torch's cache had the compiled graph, so that no pass ran."""
        return bool(self.sites) and not self.before and self.failure is None

    @property
    def key(self) -> str:
        """What the result depends on besides the graph: the identity in torch's caches."""
        model = find_cost_model(self.options.cost_model)
        return f"{source_hash()} {self.options!r} {model.name} {model.version} {sorted(self.parameters)}"

    def rewrite(self, graph: fx.Graph) -> None:
        """Structures the dropouts of an ATen graph, in place; the original program on failure."""
        self.before += _code(graph)
        backup = _copy(graph)
        structure = StructureDropout(self.options, self.sites, self.parameters)
        try:
            result = structure.apply(graph)
            if result.modified:
                ShareSaves().apply(graph)
        except Exception as cause:
            self.fail(structure.name, cause)
            _restore(graph, backup)
            lower_random_masks(graph)
        else:
            if self.result is None or result.modified:
                self.result = result
            self.decisions.extend(result.decisions)
        self.after += _code(graph)

    def partition(
        self, joint: fx.GraphModule, inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Cuts a joint graph by torch's min-cut, and proves that no mask is drawn again.

        Raises:
            RedrawError: backward would draw a mask again.
        """
        with functorch_config.patch(activation_memory_budget=self._budget()):
            forward, backward = min_cut_rematerialization_partition(joint, inputs, **kwargs)
        check_redraw(backward)
        self.inference = False
        self.forward, self.backward = _code(forward.graph), _code(backward.graph)
        self.saved_bytes = saved_bytes(forward, kwargs["num_fwd_outputs"])
        return forward, backward

    def fail(self, name: str, cause: Exception) -> None:
        """Notes a failure, and warns; raises it in strict mode.

        Raises:
            PassError: the options say strict.
        """
        error = cause if isinstance(cause, PassError) else PassError(name, cause)
        if self.options.strict:
            raise error from cause
        self.failure = "".join(traceback.format_exception(cause))
        self.result = None
        warnings.warn(f"ardd: {error}", RuntimeWarning, stacklevel=2)

    def report(self, stock_saved_bytes: int | None = None) -> GraphReport:
        """Returns the entry of the report, with what stock would have saved where that is known."""
        settled = {d.site for d in self.decisions if d.reason is not Reason.PASS_FAILED}
        decisions = [d for d in self.decisions if self.failure is None or not d.taken]
        missing = [s for s in self.sites if self.failure is not None or s.index not in settled]
        reason = Reason.SUBGRAPH if self.failure is None else Reason.PASS_FAILED
        have = {d.site for d in decisions}
        decisions += [_left(s, reason) for s in missing if s.index not in have]
        result = self.result or StructureResult(modified=False)
        return GraphReport(
            decisions=tuple(sorted(decisions, key=lambda d: d.site)),
            flops_before=result.flops_before,
            flops_after=result.flops_after,
            saved_bytes_before=stock_saved_bytes,
            saved_bytes_after=self.saved_bytes,
            before=self.before,
            after=self.after,
            forward=self.forward or self.after,
            backward=self.backward,
            inference=self.inference,
            failure=self.failure,
        )

    def _budget(self) -> float:
        """Torch's memory budget re-draws masks in backward (pytorch#190758), so it stays at 1."""
        budget = float(functorch_config.activation_memory_budget)
        if budget < 1:
            warnings.warn(
                f"ardd: activation_memory_budget={budget} is ignored: torch would draw dropout"
                " masks again in backward, which gives wrong gradients",
                RuntimeWarning,
                stacklevel=2,
            )
        return 1.0


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


def _copy(graph: fx.Graph) -> fx.Graph:
    backup = fx.Graph()
    backup.output(backup.graph_copy(graph, {}))
    backup.output_node().meta = dict(graph.output_node().meta)
    return backup


def _restore(graph: fx.Graph, backup: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        graph.erase_node(node)
    graph.output(graph.graph_copy(backup, {}))
    graph.output_node().meta = dict(backup.output_node().meta)


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
    sizes = (s if isinstance(s, int) else s.node.hint or 1 for s in value.shape)
    return math.prod(sizes) * value.element_size()
