"""What ardd did to the graphs of this process: rows, totals, rendering and JSON."""

from __future__ import annotations

import dataclasses
import io
import math
import reprlib
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .decisions import Decision, Reason

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

SCHEMA: Final = 1
"""Version of the JSON form. Files of another version are refused, not guessed at."""

_WIDTH: Final = 160
_NARROW: Final = 130
"""Consoles narrower than this get the cells of a row stacked."""

# A site with one of these reasons runs its own random mask. The others that were not taken
# are not touched at all.
_LEFT_RANDOM: Final = frozenset(
    {
        Reason.NOT_WORTH_IT,
        Reason.NO_PRODUCT,
        Reason.SHAPE,
        Reason.DYNAMIC_DIM,
        Reason.CONFLICT,
        Reason.P_ROUNDS_TO_ZERO,
        Reason.PATTERN_RANDOM,
        Reason.OUT_OF_FUEL,
        Reason.WEIGHT_DROPOUT,
    }
)


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

    def to_dict(self) -> dict[str, object]:
        """Returns plain JSON values that `from_dict` reads back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        decisions = [_decision_to_dict(decision) for decision in self.decisions]
        return {"schema": SCHEMA} | fields | {"decisions": decisions}

    @classmethod
    def from_dict(cls, data: object) -> GraphReport:
        """Reads what `to_dict` returned, and trusts none of it.

        Raises:
            ValueError: Another schema version, an unknown or missing field, or a value that
                the field cannot have.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"Bad report: expected an object, not {reprlib.repr(data)}.")
        schema = data.get("schema")
        if type(schema) is not int or schema != SCHEMA:
            raise ValueError(
                f"Bad report: schema version is {reprlib.repr(schema)}, expected {SCHEMA}."
            )
        fields = _checked({k: v for k, v in data.items() if k != "schema"}, _GRAPH_FIELDS, "graph")
        decisions = tuple(_decision_from_dict(entry) for entry in fields["decisions"])
        return cls(**(fields | {"decisions": decisions}))


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
    def flops_before(self) -> int:
        """FLOPs of all products as captured."""
        return sum(graph.flops_before for graph in self.graphs)

    @property
    def flops_after(self) -> int:
        """FLOPs of all products as rewritten."""
        return sum(graph.flops_after for graph in self.graphs)

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
        return self._joined([graph.before for graph in self.graphs])

    @property
    def after(self) -> str:
        """Readable code of the graphs as rewritten."""
        return self._joined([graph.after for graph in self.graphs])

    @property
    def forward(self) -> str:
        """Readable code of the forwards as handed to the backend."""
        return self._joined([graph.forward for graph in self.graphs])

    @property
    def backward(self) -> str:
        """Readable code of the backwards as handed to the backend."""
        return self._joined([graph.backward for graph in self.graphs])

    def to_dict(self) -> dict[str, object]:
        """Returns plain JSON values."""
        return {
            "schema": SCHEMA,
            "graphs": [graph.to_dict() for graph in self.graphs],
            "notes": list(self.notes),
            "totals": {
                "dropouts": len(self.decisions),
                "structured": _count_taken(self.decisions),
                "flops_before": self.flops_before,
                "flops_after": self.flops_after,
                "saved_bytes_before": self.saved_bytes_before,
                "saved_bytes_after": self.saved_bytes_after,
            },
        }

    def __repr__(self) -> str:
        graphs = _plural(len(self.graphs), "graph")
        return f"<ardd.Report of {graphs}: {self._totals()}; print it for the rows>"

    def __str__(self) -> str:
        """Renders as plain text, without colour, whatever the terminal and its settings."""
        from rich.console import Console

        out = io.StringIO()
        console = Console(
            file=out,
            width=_WIDTH,
            color_system=None,
            force_terminal=False,
            force_jupyter=False,
            legacy_windows=False,
        )
        console.print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def __rich__(self) -> RenderableType:
        """Renders as a rich table with the totals, notes and failures below."""
        from rich.console import Group
        from rich.text import Text

        # Module names, source lines and tracebacks are untrusted: they only ever enter as
        # Text, never as a str, in which rich would look for markup.
        parts: list[RenderableType] = []
        if len(self.graphs) != 1 or self.graphs[0].from_cache:
            parts.append(Text(self._headline()))
        if self.decisions:
            parts += [_Rows(self.graphs), Text()]
        if self.graphs:
            parts.append(Text(self._totals(), style="bold"))
        refused = {d.reason for d in self.decisions if d.reason is not Reason.STRUCTURED}
        for reason in Reason:  # in the order of the enumeration
            if reason in refused:
                parts.append(Text(f"  {reason.name}: {reason.value}"))
        parts.extend(Text(f"note: {_printable(n)}", overflow="fold") for n in self.notes)
        for index, graph in enumerate(self.graphs):
            if graph.failure is None:
                continue
            parts.append(Text(f"graph {index} failed; the original program runs:", style="bold"))
            lines = "\n".join(f"  {_printable(line)}" for line in graph.failure.splitlines())
            parts.append(Text(lines, overflow="fold"))
        return Group(*parts)

    def _headline(self) -> str:
        if not self.graphs:
            return "no graph has been compiled"
        names = [f"{i} ({_graph_kind(graph)})" for i, graph in enumerate(self.graphs)]
        return f"{_plural(len(names), 'graph')}: " + ", ".join(names)

    def _totals(self) -> str:
        parts = [_structured(self.decisions)]
        if self.flops_before or self.flops_after:
            flops = _arrow(_si(self.flops_before), _si(self.flops_after))
            percent = _percent(self.flops_before, self.flops_after)
            parts.append(f"product FLOPs {flops}" + (f" ({percent})" if percent else ""))
        if not all(graph.inference for graph in self.graphs):
            saved = _arrow(_size(self.saved_bytes_before), _size(self.saved_bytes_after))
            parts.append(f"saved for backward {saved}")
        return "; ".join(parts)

    def _joined(self, texts: list[str]) -> str:
        if len(texts) == 1:
            return texts[0]
        return "\n\n".join(
            f"# graph {index} ({_graph_kind(self.graphs[index])})\n{text}"
            for index, text in enumerate(texts)
            if text
        )


def summary_line(graph: GraphReport) -> str:
    """Returns the one line that is logged when a graph is compiled for the first time."""
    if graph.failure is not None:
        return "a pass failed, the original program runs; see ardd.report()"
    if not graph.decisions:
        return "no dropout found; see ardd.report()"
    parts = [_structured(graph.decisions)]
    percent = _percent(graph.flops_before, graph.flops_after)
    if percent:
        parts.append(f"product FLOPs {percent}")
    if graph.saved_bytes_after is not None:
        parts.append(f"saved for backward {_size(graph.saved_bytes_after)}")
    return ", ".join(parts) + "; see ardd.report()"


_lock = threading.Lock()
_recorded: list[GraphReport] = []


def record(graph: GraphReport) -> None:
    """Adds a graph to the record of this process. Any thread may."""
    with _lock:
        _recorded.append(graph)


def current() -> Report:
    """Returns what was recorded so far."""
    with _lock:
        return Report(graphs=tuple(_recorded))


def clear() -> None:
    """Forgets what was recorded."""
    with _lock:
        _recorded.clear()


# ---- JSON --------------------------------------------------------------------------------


class _Field(NamedTuple):
    """What a field of the JSON form may hold."""

    holds: Callable[[Any], bool]
    allowed: str


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63  # bool is an int to isinstance


def _is_rate(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1  # NaN fails both comparisons


_COUNT: Final = _Field(_is_count, "an integer from 0 to 2**63 - 1")
_TEXT: Final = _Field(lambda value: isinstance(value, str), "a string")
_FLAG: Final = _Field(lambda value: isinstance(value, bool), "true or false")
_MAYBE_COUNT: Final = _Field(
    lambda v: v is None or _is_count(v), "an integer from 0 to 2**63 - 1 or null"
)
_MAYBE_RATE: Final = _Field(lambda v: v is None or _is_rate(v), "a number from 0 to 1 or null")

_GRAPH_FIELDS: Final[Mapping[str, _Field]] = {
    "decisions": _Field(lambda value: isinstance(value, list), "a list"),
    "flops_before": _COUNT,
    "flops_after": _COUNT,
    "saved_bytes_before": _MAYBE_COUNT,
    "saved_bytes_after": _MAYBE_COUNT,
    "before": _TEXT,
    "after": _TEXT,
    "forward": _TEXT,
    "backward": _TEXT,
    "inference": _FLAG,
    "from_cache": _FLAG,
    "failure": _Field(lambda v: v is None or isinstance(v, str), "a string or null"),
}

_DECISION_FIELDS: Final[Mapping[str, _Field]] = {
    "site": _COUNT,
    "kind": _TEXT,
    "module": _TEXT,
    "source": _TEXT,
    "shape": _Field(
        lambda v: isinstance(v, list) and all(isinstance(n, str) or _is_count(n) for n in v),
        "a list of integers >= 0 and strings",
    ),
    "p": _MAYBE_RATE,
    "taken": _FLAG,
    "reason": _Field(
        lambda v: isinstance(v, str) and v in Reason.__members__, "the name of a Reason"
    ),
    "detail": _TEXT,
    "pattern": _TEXT,
    "p_used": _MAYBE_RATE,
    "dim": _Field(lambda v: v is None or type(v) is int, "an integer or null"),
    "block": _Field(lambda v: v is None or (_is_count(v) and v > 0), "an integer >= 1 or null"),
    "flops_before": _COUNT,
    "flops_after": _COUNT,
}


def _checked(data: object, expected: Mapping[str, _Field], what: str) -> dict[str, Any]:
    """Returns data as a dict whose keys and values are those expected, or raises ValueError."""
    if not isinstance(data, Mapping):
        raise ValueError(f"Bad report: expected a {what} object, not {reprlib.repr(data)}.")
    for name in data:
        if name not in expected:
            raise ValueError(
                f"Bad report: unknown {what} field {reprlib.repr(name)}. "
                f"Known fields: {', '.join(expected)}."
            )
    for name, field in expected.items():
        if name not in data:
            raise ValueError(f"Bad report: {what} field '{name}' is missing.")
        if not field.holds(data[name]):
            raise ValueError(
                f"Bad report: {what} field '{name}' is {reprlib.repr(data[name])}, "
                f"expected {field.allowed}."
            )
    return dict(data)


def _decision_to_dict(decision: Decision) -> dict[str, object]:
    # JSON has no NaN, which stands for a rate that only the running program knows.
    return decision.to_dict() | {"p": None if math.isnan(decision.p) else decision.p}


def _decision_from_dict(data: object) -> Decision:
    fields = _checked(data, _DECISION_FIELDS, "decision")
    fields["p"] = math.nan if fields["p"] is None else fields["p"]
    fields["shape"] = tuple(fields["shape"])
    fields["reason"] = Reason[fields["reason"]]
    return Decision(**fields)


# ---- text --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The table of all decisions, in the layout that the console has room for."""

    graphs: tuple[GraphReport, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.box import Box
        from rich.table import Table
        from rich.text import Text

        columns = _STACKED if options.max_width < _NARROW else _COLUMNS
        # A rule below the header and nothing else, in ASCII, so that it can be pasted and piped.
        rule = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
        table = Table(box=rule, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        for column in columns:
            names = column.split("/")
            right = names[0] in ("block", "dim")
            table.add_column(
                Text("\n".join(names)),
                justify="right" if right else "left",
                overflow="fold",
                no_wrap=names[0] in _UNBROKEN,
            )
        for index, graph in enumerate(self.graphs):
            for decision in graph.decisions:
                number = str(decision.site) if len(self.graphs) == 1 else f"{index}.{decision.site}"
                cells = {"#": number} | _cells(decision)
                cells = {name: _printable(cell) for name, cell in cells.items()}
                texts = ["\n".join(cells[name] for name in c.split("/")) for c in columns]
                style = "green" if decision.taken else ""
                table.add_row(*(Text(text) for text in texts), style=style)
        yield table


_COLUMNS: Final = (
    *("#", "module", "source", "kind", "shape", "p -> used", "pattern", "block", "dim"),
    *("decision", "reason", "FLOPs"),
)
_STACKED: Final = (
    *("#", "module/source", "kind/shape/p -> used", "decision/pattern/block and dim"),
    "reason/FLOPs",
)
"""The same columns; those joined by / stand below each other."""
_UNBROKEN: Final = frozenset({"#", "p -> used", "pattern", "block", "dim", "decision"})
"""Columns of short words, which stay whole as long as anything does."""


def _cells(decision: Decision) -> dict[str, str]:
    """Returns the text of each column, but for the number."""
    reason = decision.reason.name
    used = decision.p_used
    block = "-" if decision.block is None else str(decision.block)
    dim = "-" if decision.dim is None else str(decision.dim)
    flops = _arrow(_si(decision.flops_before), _si(decision.flops_after))
    return {
        "module": decision.module or "-",
        "source": decision.source or "-",
        "kind": decision.kind,
        "shape": f"[{', '.join(map(str, decision.shape))}]",
        "p -> used": _rate(decision.p) if used is None else _arrow(_rate(decision.p), _rate(used)),
        "pattern": decision.pattern,
        "block": block,
        "dim": dim,
        "block and dim": f"block {block} dim {dim}",
        "decision": _outcome(decision),
        "reason": f"{reason}: {decision.detail}" if decision.detail else reason,
        "FLOPs": flops if decision.flops_before or decision.flops_after else "-",
    }


def _outcome(decision: Decision) -> str:
    if decision.taken:
        return "structured"
    return "left random" if decision.reason in _LEFT_RANDOM else "left alone"


def _graph_kind(graph: GraphReport) -> str:
    parts = ["inference" if graph.inference else "training"]
    if graph.from_cache:
        parts.append("from cache")
    if graph.failure is not None:
        parts.append("failed")
    return ", ".join(parts)


def _structured(decisions: tuple[Decision, ...]) -> str:
    return f"{_count_taken(decisions)} of {_plural(len(decisions), 'dropout')} structured"


def _count_taken(decisions: Iterable[Decision]) -> int:
    return sum(decision.taken for decision in decisions)


def _total_saved(graphs: Iterable[tuple[int | None, bool]]) -> int | None:
    """Adds up bytes; a graph for inference saves nothing, known or not."""
    counts = [count for count, inference in graphs if count is not None or not inference]
    known = [count for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else None


def _printable(text: str) -> str:
    """Escapes what could steer a terminal: control and format characters, line ends."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _arrow(before: str, after: str) -> str:
    return before if before == after else f"{before} -> {after}"


def _rate(p: float) -> str:
    return "?" if math.isnan(p) else f"{p:.4g}"


def _percent(before: int, after: int) -> str:
    """Returns the relative change, empty where there is nothing to relate to."""
    if before == 0:
        return ""
    change = 100 * (after - before) / before
    if change == 0:
        return "0 %"
    return f"{change:+.2g} %" if abs(change) < 1 else f"{change:+.0f} %"


def _si(count: int) -> str:
    return _scaled(count, 1000, ("", " k", " M", " G", " T", " P", " E"))


def _size(count_bytes: int | None) -> str:
    if count_bytes is None:
        return "unknown"
    return _scaled(count_bytes, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def _scaled(count: int, base: int, units: tuple[str, ...]) -> str:
    """Returns the count with three digits and the unit that leaves at most three before the dot."""
    value = float(count)
    for unit in units[:-1]:
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= base
    return f"{value:.3g}{units[-1]}" if abs(value) < 999.5 else f"{value:.0f}{units[-1]}"
