"""What ardd did to the graphs of this process: rows, totals, and the record of them."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

from . import render_report, report_json
from .decisions import Decision
from .saves import SavedTensor

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclasses.dataclass(frozen=True)
class GraphReport:
    """What became of one captured graph."""

    decisions: tuple[Decision, ...]
    """One for every dropout found, in program order."""
    flops_before: int
    """FLOPs of all products of the graph, one forward and backward."""
    flops_after: int
    """The same as rewritten."""
    saved_bytes_before: int | None
    """Bytes that the forward keeps for the backward; None where not known."""
    saved_bytes_after: int | None
    """The same as rewritten."""
    before: str
    """Readable code of the graph as captured; any of these texts may be empty."""
    after: str
    """Readable code of the graph as rewritten."""
    forward: str
    """Readable code of the forward as handed to the backend."""
    backward: str
    """Readable code of the backward as handed to the backend."""
    inference: bool
    """Whether the graph was compiled without a backward."""
    from_cache: bool = False
    """Whether torch's cache had the compiled graph, of this process or an earlier one."""
    failure: str | None = None
    """Traceback of the pass that failed; the original program runs then."""
    saves: tuple[SavedTensor, ...] = ()
    """One for every tensor that the forward saves, as torch cut the rewritten graph."""
    flops_budget: int | None = None
    """FLOPs that the options allow for the products, None where there is no budget."""

    def to_dict(self) -> dict[str, object]:
        """Returns plain JSON values that `from_dict` reads back."""
        return report_json.graph_to_json(self)

    @classmethod
    def from_dict(cls, data: object) -> GraphReport:
        """Reads what `to_dict` returned, and trusts none of it.

        Raises:
            ValueError: Another schema version, an unknown or missing field, or a value that
                the field cannot have.
        """
        return cls(**report_json.graph_fields_from_json(data))


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What became of all graphs so far, or of those of one dry run.

    `print` it for a table; rich consoles render it in colour.
    """

    graphs: tuple[GraphReport, ...] = ()
    """One entry per captured graph, in the order of compilation."""
    notes: tuple[str, ...] = ()
    """What no graph can tell, such as why a dropout reached none."""

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """The decisions of all graphs."""
        return tuple(decision for graph in self.graphs for decision in graph.decisions)

    @property
    def saves(self) -> tuple[SavedTensor, ...]:
        """The saved tensors of all graphs."""
        return tuple(saved for graph in self.graphs for saved in graph.saves)

    @property
    def flops_before(self) -> int:
        """FLOPs of all products as captured."""
        return sum(graph.flops_before for graph in self.graphs)

    @property
    def flops_after(self) -> int:
        """FLOPs of all products as rewritten."""
        return sum(graph.flops_after for graph in self.graphs)

    @property
    def flops_budget(self) -> int | None:
        """FLOPs that the options allow for all products, None where a graph has no budget."""
        budgets = [graph.flops_budget for graph in self.graphs if graph.flops_before]
        known = [budget for budget in budgets if budget is not None]
        return sum(known) if known and len(known) == len(budgets) else None

    @property
    def saved_bytes_before(self) -> int | None:
        """Bytes kept for the backward as captured, None where a graph does not know."""
        return _total_saved((g.saved_bytes_before, g.inference) for g in self.graphs)

    @property
    def saved_bytes_after(self) -> int | None:
        """Bytes kept for the backward as rewritten, None where a graph does not know."""
        return _total_saved((g.saved_bytes_after, g.inference) for g in self.graphs)

    @property
    def before(self) -> str:
        """Readable code of the graphs as captured."""
        return render_report.join_code(self.graphs, [graph.before for graph in self.graphs])

    @property
    def after(self) -> str:
        """Readable code of the graphs as rewritten."""
        return render_report.join_code(self.graphs, [graph.after for graph in self.graphs])

    @property
    def forward(self) -> str:
        """Readable code of the forwards as handed to the backend."""
        return render_report.join_code(self.graphs, [graph.forward for graph in self.graphs])

    @property
    def backward(self) -> str:
        """Readable code of the backwards as handed to the backend."""
        return render_report.join_code(self.graphs, [graph.backward for graph in self.graphs])

    def to_dict(self) -> dict[str, object]:
        """Returns plain JSON values."""
        return report_json.report_to_json(self)

    def __repr__(self) -> str:
        graphs = render_report.plural(len(self.graphs), "graph")
        return f"<ardd.Report of {graphs}: {render_report.totals(self)}; print it for the rows>"

    def __str__(self) -> str:
        """Renders as plain text, without colour, whatever the terminal and its settings."""
        return render_report.as_text(self)

    def __rich__(self) -> RenderableType:
        """Renders as a rich table with the totals, notes and failures below."""
        return render_report.as_rich(self)


def summary_line(graph: GraphReport) -> str:
    """Returns the one line that is logged when a graph is compiled for the first time."""
    if graph.failure is not None:
        return "a pass failed, the original program runs; see ardd.report()"
    if not graph.decisions:
        return "no dropout found; see ardd.report()"
    parts = [render_report.structured(graph.decisions)]
    percent = render_report.relative_change(graph.flops_before, graph.flops_after)
    if percent:
        parts.append(f"product FLOPs {percent}")
    if graph.saved_bytes_after is not None:
        parts.append(f"saved for backward {render_report.size(graph.saved_bytes_after)}")
    return ", ".join(parts) + "; see ardd.report()"


_lock = threading.Lock()
_recorded: list[GraphReport] = []
_notes: list[str] = []


def record(graph: GraphReport) -> None:
    """Adds a graph to the record of this process. Any thread may."""
    with _lock:
        _recorded.append(graph)


def note(text: str) -> None:
    """Adds what no graph can tell to the record of this process. Any thread may."""
    with _lock:
        _notes.append(text)


def current() -> Report:
    """Returns what was recorded so far."""
    with _lock:
        return Report(graphs=tuple(_recorded), notes=tuple(_notes))


def clear() -> None:
    """Forgets what was recorded."""
    with _lock:
        _recorded.clear()
        _notes.clear()


def _total_saved(graphs: Iterable[tuple[int | None, bool]]) -> int | None:
    """Adds up bytes; a graph for inference saves nothing, known or not."""
    counts = [count for count, inference in graphs if count is not None or not inference]
    known = [count for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else None
