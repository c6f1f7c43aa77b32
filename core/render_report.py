"""The text of a report: a rich table with the totals below, plain text, and single lines."""

from __future__ import annotations

import dataclasses
import io
import math
from typing import TYPE_CHECKING, Final

from .decisions import Decision, Reason
from .saves import SavedTensor

if TYPE_CHECKING:
    from rich.box import Box
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from .report import GraphReport, Report

_WIDTH: Final = 160
_NARROW: Final = 130
"""Consoles narrower than this get the cells of a row stacked."""

# A site with one of these reasons runs its own random mask. The others that were not taken
# are not touched at all.
_LEFT_RANDOM: Final = frozenset(
    {
        Reason.QUALITY,
        Reason.COPIES,
        Reason.NOT_CHOSEN,
        Reason.NOT_WORTH_IT,
        Reason.NO_PRODUCT,
        Reason.SHAPE,
        Reason.DYNAMIC_DIM,
        Reason.CONFLICT,
        Reason.P_ROUNDS_TO_ZERO,
        Reason.PATTERN_RANDOM,
        Reason.FALLBACK_RANDOM,
        Reason.OUT_OF_FUEL,
        Reason.WEIGHT_DROPOUT,
        Reason.ALPHA_DROPOUT,
    }
)


def as_text(report: Report) -> str:
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
    console.print(report)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def as_rich(report: Report) -> RenderableType:
    """Renders as a rich table with the totals, notes and failures below."""
    from rich.console import Group
    from rich.text import Text

    # Module names, source lines and tracebacks are untrusted: they only ever enter as
    # Text, never as a str, in which rich would look for markup.
    parts: list[RenderableType] = []
    if len(report.graphs) != 1 or report.graphs[0].from_cache:
        parts.append(Text(_headline(report.graphs)))
    if report.decisions:
        parts += [_Rows(report.graphs), Text()]
    if any(saved.encoding != "as is" for saved in report.saves):
        parts += [_SavedRows(report.graphs), Text()]
    if report.graphs:
        parts.append(Text(totals(report), style="bold"))
    refused = {d.reason for d in report.decisions if d.reason is not Reason.STRUCTURED}
    for reason in Reason:  # in the order of the enumeration
        if reason in refused:
            parts.append(Text(f"  {reason.name}: {reason.value}"))
    parts.extend(Text(f"note: {_printable(n)}", overflow="fold") for n in report.notes)
    for index, graph in enumerate(report.graphs):
        if graph.failure is None:
            continue
        parts.append(Text(f"graph {index} failed; the original program runs:", style="bold"))
        lines = "\n".join(f"  {_printable(line)}" for line in graph.failure.splitlines())
        parts.append(Text(lines, overflow="fold"))
    return Group(*parts)


def totals(report: Report) -> str:
    """Returns what became of all dropouts together, in one line."""
    parts = [structured(report.decisions)]
    if report.flops_before or report.flops_after:
        flops = _arrow(_si(report.flops_before), _si(report.flops_after))
        percent = relative_change(report.flops_before, report.flops_after)
        allowed = "" if report.flops_budget is None else f", budget {_si(report.flops_budget)}"
        parts.append(f"product FLOPs {flops}" + (f" ({percent})" if percent else "") + allowed)
    if not all(graph.inference for graph in report.graphs):
        saved = _arrow(size(report.saved_bytes_before), size(report.saved_bytes_after))
        parts.append(f"saved for backward {saved}")
    return "; ".join(parts)


def join_code(graphs: tuple[GraphReport, ...], texts: list[str]) -> str:
    """Returns one text for each graph below the other, with headings where there are several."""
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(
        f"# graph {index} ({_graph_kind(graphs[index])})\n{text}"
        for index, text in enumerate(texts)
        if text
    )


def _headline(graphs: tuple[GraphReport, ...]) -> str:
    if not graphs:
        return "no graph has been compiled"
    names = [f"{i} ({_graph_kind(graph)})" for i, graph in enumerate(graphs)]
    return f"{plural(len(names), 'graph')}: " + ", ".join(names)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The table of all decisions, in the layout that the console has room for."""

    graphs: tuple[GraphReport, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        columns = _STACKED if options.max_width < _NARROW else _COLUMNS
        table = Table(box=_rule(), show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
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


@dataclasses.dataclass(frozen=True)
class _SavedRows:
    """The table of what is saved for backward."""

    graphs: tuple[GraphReport, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        narrow = options.max_width < _NARROW
        columns = _SAVED_STACKED if narrow else _SAVED_COLUMNS
        table = Table(box=_rule(), show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        for column in columns:
            table.add_column(Text("\n".join(column.split("/"))), overflow="fold")
        for graph in self.graphs:
            for saved in graph.saves:
                if saved.bytes_before == 0:
                    continue  # kept anyway
                cells = {name: _printable(cell) for name, cell in _saved_cells(saved).items()}
                texts = ["\n".join(cells[name] for name in c.split("/")) for c in columns]
                style = "" if saved.encoding == "as is" else "green" if saved.exact else "yellow"
                table.add_row(*(Text(text) for text in texts), style=style)
        yield table


_SAVED_COLUMNS: Final = (
    *("saved", "module", "op", "used for", "shape", "type", "bytes", "encoding", "error"),
    "reason",
)
_SAVED_STACKED: Final = ("saved/module", "used for/shape/type", "encoding/bytes/error", "reason")


def _saved_cells(saved: SavedTensor) -> dict[str, str]:
    return {
        "saved": saved.name,
        "module": saved.module or "-",
        "op": saved.op.removeprefix("aten."),
        "used for": ", ".join(saved.uses) or "-",
        "shape": f"[{', '.join(map(str, saved.shape))}]",
        "type": saved.dtype,
        "bytes": _arrow(size(saved.bytes_before), size(saved.bytes_after)),
        "encoding": saved.encoding,
        "error": "-" if saved.error is None else f"{saved.error:.2g}",
        "reason": saved.reason.name,
    }


def _rule() -> Box:
    """Returns a rule below the header and nothing else, in ASCII, to be pasted and piped."""
    from rich.box import Box

    return Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


_COLUMNS: Final = (
    *("#", "module", "source", "kind", "role", "shape", "p -> used", "pattern", "block", "dim"),
    *("decision", "reason", "FLOPs"),
)
_STACKED: Final = (
    *("#", "module/source", "kind/role/shape/p -> used", "decision/pattern/block and dim"),
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
        "role": "-" if decision.role is None else decision.role.value,
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
        return "deferred" if decision.reason is Reason.DEFERRED else "structured"
    return "left random" if decision.reason in _LEFT_RANDOM else "left alone"


def _graph_kind(graph: GraphReport) -> str:
    parts = ["inference" if graph.inference else "training"]
    if graph.from_cache:
        parts.append("from cache")
    if graph.failure is not None:
        parts.append("failed")
    return ", ".join(parts)


def structured(decisions: tuple[Decision, ...]) -> str:
    """Returns how many of the dropouts are structured."""
    reasons = [decision.reason for decision in decisions if decision.taken]
    deferred = reasons.count(Reason.DEFERRED)
    what = f"{deferred} of {plural(len(decisions), 'dropout')} deferred"
    taken = f"{len(reasons)} of {plural(len(decisions), 'dropout')} structured"
    return what if deferred else taken


def _printable(text: str) -> str:
    """Escapes what could steer a terminal: control and format characters, line ends."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def plural(count: int, noun: str) -> str:
    """Returns the count and the noun, with an s unless there is one."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _arrow(before: str, after: str) -> str:
    return before if before == after else f"{before} -> {after}"


def _rate(p: float) -> str:
    return "?" if math.isnan(p) else f"{p:.4g}"


def relative_change(before: int, after: int) -> str:
    """Returns the change in percent, empty where there is nothing to relate to."""
    if before == 0:
        return ""
    change = 100 * (after - before) / before
    if change == 0:
        return "0 %"
    return f"{change:+.2g} %" if abs(change) < 1 else f"{change:+.0f} %"


def _si(count: int) -> str:
    return _scaled(count, 1000, ("", " k", " M", " G", " T", " P", " E"))


def size(count_bytes: int | None) -> str:
    """Returns the bytes with three digits and a binary unit."""
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
