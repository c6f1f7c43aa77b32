"""The report: its rows, totals and rendering, its JSON, and the record of the process."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import ardd
from ardd.core import report as module
from ardd.core.decisions import Decision, Reason, Role
from ardd.core.report import GraphReport, Report, summary_line

MIB = 2**20

TAKEN = Decision(
    site=0,
    kind="dropout",
    module="encoder.drop",
    source="model.py:12",
    shape=(128, 2048),
    p=0.1,
    taken=True,
    reason=Reason.STRUCTURED,
    role=Role.HIDDEN,
    detail="0.7 ms instead of 1.2 ms",
    pattern="block",
    p_used=0.125,
    dim=1,
    block=32,
    flops_before=10_000_000_000,
    flops_after=7_500_000_000,
)
REFUSED = Decision(
    site=1,
    kind="bernoulli",
    module="",
    source="model.py:20",
    shape=("s0", 64),
    p=0.25,
    taken=False,
    reason=Reason.NOT_WORTH_IT,
    p_used=0.25,
    flops_before=6_000_000_000,
    flops_after=6_000_000_000,
)
UNTOUCHED = Decision(
    site=2,
    kind="scaled_dot_product_attention",
    module="encoder.attention",
    source="model.py:30",
    shape=(8, 4, 16, 16),
    p=0.1,
    taken=False,
    reason=Reason.INSIDE_SDPA,
)


def graph(*decisions: Decision, **changes: Any) -> GraphReport:
    base = GraphReport(
        decisions=decisions or (TAKEN, REFUSED, UNTOUCHED),
        flops_before=16_000_000_000,
        flops_after=11_040_000_000,
        saved_bytes_before=412 * MIB,
        saved_bytes_after=233 * MIB,
        before="def before(): ...",
        after="def after(): ...",
        forward="def forward(): ...",
        backward="def backward(): ...",
        inference=False,
    )
    return dataclasses.replace(base, **changes)


def cells(report: Report, site: str) -> list[str]:
    """Returns the cells of the row that has this number; no cell of it may be folded."""
    (line,) = [line for line in str(report).splitlines() if line.startswith(f"{site} ")]
    return re.split(r"\s{2,}", line.strip())


def render(report: Report, width: int, **options: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=width, legacy_windows=False, **options).print(report)
    return out.getvalue()


# ---- rows and totals ---------------------------------------------------------------------


def test_row_of_a_structured_dropout() -> None:
    short = dataclasses.replace(TAKEN, detail="")
    assert cells(Report((graph(short),)), "0") == [
        *("0", "encoder.drop", "model.py:12", "dropout", "hidden", "[128, 2048]"),
        *("0.1 -> 0.125", "block", "32", "1", "structured", "STRUCTURED", "10 G -> 7.5 G"),
    ]


def test_row_of_a_refused_dropout() -> None:
    """What does not change is said once, and what does not exist is a dash."""
    assert cells(Report((graph(REFUSED),)), "1") == [
        *("1", "-", "model.py:20", "bernoulli", "-", "[s0, 64]", "0.25", "random", "-", "-"),
        *("left random", "NOT_WORTH_IT", "6 G"),
    ]


def test_row_of_an_untouched_dropout() -> None:
    row = cells(Report((graph(dataclasses.replace(UNTOUCHED, kind="sdpa")),)), "2")
    assert row[-3:] == ["left alone", "INSIDE_SDPA", "-"]


def test_header_names_every_column() -> None:
    header = str(Report((graph(),))).splitlines()[0]
    assert re.split(r"\s{2,}", header.strip()) == [
        *("#", "module", "source", "kind", "role", "shape", "p -> used", "pattern", "block", "dim"),
        *("decision", "reason", "FLOPs"),
    ]


def test_detail_follows_the_reason() -> None:
    text = " ".join(str(Report((graph(TAKEN),))).split())
    assert "STRUCTURED: 0.7 ms" in text


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_renders_with_its_sentence(reason: Reason) -> None:
    taken = reason is Reason.STRUCTURED
    text = str(Report((graph(dataclasses.replace(REFUSED, reason=reason, taken=taken)),)))
    assert reason.name in text
    assert (f"  {reason.name}: {reason.value}" in text.splitlines()) is not taken


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [
        (Reason.NO_PRODUCT, "left random"),
        (Reason.OUT_OF_FUEL, "left random"),
        (Reason.WEIGHT_DROPOUT, "left random"),
        (Reason.ALPHA_DROPOUT, "left random"),
        (Reason.QUALITY, "left random"),
        (Reason.NOT_CHOSEN, "left random"),
        (Reason.FALLBACK_RANDOM, "left random"),
        (Reason.P_IS_ONE, "left alone"),
        (Reason.PASS_FAILED, "left alone"),
    ],
)
def test_outcome_says_whether_ardd_draws_the_mask(reason: Reason, outcome: str) -> None:
    assert outcome in cells(Report((graph(dataclasses.replace(REFUSED, reason=reason)),)), "1")


def test_totals_line() -> None:
    assert (
        "1 of 3 dropouts structured; product FLOPs 16 G -> 11 G (-31 %); "
        "saved for backward 412 MiB -> 233 MiB"
    ) in str(Report((graph(),))).splitlines()


def test_totals_add_up_over_graphs() -> None:
    report = Report((graph(), graph(TAKEN, flops_before=4, flops_after=4)))
    assert report.decisions == (TAKEN, REFUSED, UNTOUCHED, TAKEN)
    assert report.flops_before == 16_000_000_004
    assert report.flops_after == 11_040_000_004
    assert report.saved_bytes_before == 824 * MIB
    assert report.saved_bytes_after == 466 * MIB
    assert "2 of 4 dropouts structured; " in str(report)


def test_unknown_saved_bytes_make_the_total_unknown() -> None:
    report = Report((graph(), graph(saved_bytes_before=5, saved_bytes_after=None)))
    assert report.saved_bytes_before == 412 * MIB + 5
    assert report.saved_bytes_after is None
    assert "saved for backward 412 MiB -> unknown" in str(report)


def test_inference_saves_nothing() -> None:
    """A graph without a backward does not make the bytes of the others unknown."""
    inference = graph(inference=True, saved_bytes_before=None, saved_bytes_after=None)
    assert Report((graph(), inference)).saved_bytes_after == 233 * MIB
    assert Report((inference,)).saved_bytes_after is None
    assert "saved for backward" not in str(Report((inference,)))


def test_rows_of_several_graphs_are_numbered_by_graph() -> None:
    report = Report((graph(REFUSED), graph(REFUSED, inference=True, from_cache=True)))
    assert str(report).startswith("2 graphs: 0 (training), 1 (inference, from cache)\n")
    assert cells(report, "0.1")[1:] == cells(report, "1.1")[1:]


def test_code_of_one_graph_is_as_it_is_and_of_several_has_headers() -> None:
    assert Report((graph(),)).forward == "def forward(): ..."
    report = Report((graph(), graph(after="", inference=True)))
    assert report.before == (
        "# graph 0 (training)\ndef before(): ...\n\n# graph 1 (inference)\ndef before(): ..."
    )
    assert report.after == "# graph 0 (training)\ndef after(): ..."
    assert report.backward.count("def backward(): ...") == 2


@pytest.mark.parametrize(
    ("flops", "text"),
    [
        ((0, 0), ""),
        ((10, 10), "product FLOPs 10 (0 %)"),
        ((999, 1000), "product FLOPs 999 -> 1 k (+0.1 %)"),
        ((999_499, 999_500), "product FLOPs 999 k -> 1 M"),
        ((123_456_789, 100_000_000), "product FLOPs 123 M -> 100 M (-19 %)"),
        ((10**22, 10**21), "product FLOPs 10000 E -> 1000 E (-90 %)"),
    ],
)
def test_human_units(flops: tuple[int, int], text: str) -> None:
    report = str(Report((graph(flops_before=flops[0], flops_after=flops[1]),)))
    assert (text or "dropouts structured; saved for backward") in report
    assert text or "FLOPs 0" not in report


# ---- rendering of what is odd ------------------------------------------------------------


def test_empty_report() -> None:
    report = Report()
    assert str(report) == "no graph has been compiled"
    assert report.decisions == ()
    assert report.before == report.backward == ""
    assert report.saved_bytes_before is None
    assert str(Report(notes=("call model.train()",))).endswith("note: call model.train()")


def test_graph_without_dropout_has_no_table() -> None:
    report = Report((dataclasses.replace(graph(), decisions=()),))
    assert str(report).startswith("0 of 0 dropouts structured; product FLOPs 16 G")


def test_failure_shows_its_traceback() -> None:
    failed = graph(
        dataclasses.replace(REFUSED, reason=Reason.PASS_FAILED),
        failure='Traceback:\n  File "x.py", line 3, in [bold]\nKeyError: mm[0]',
    )
    lines = str(Report((graph(), failed))).splitlines()
    assert lines[0] == "2 graphs: 0 (training), 1 (training, failed)"
    assert lines[-4:] == [
        "graph 1 failed; the original program runs:",
        "  Traceback:",
        '    File "x.py", line 3, in [bold]',
        "  KeyError: mm[0]",
    ]
    assert summary_line(failed) == "a pass failed, the original program runs; see ardd.report()"


@pytest.mark.parametrize("name", ["a[red]b[/red]", "[/]", "[link=x]y", "a:smile:", "\\[b]", "{x}"])
@pytest.mark.parametrize("width", [80, 160])
def test_brackets_are_not_markup(name: str, width: int) -> None:
    """Module names, source lines, details, notes and tracebacks are text of strangers."""
    decision = dataclasses.replace(REFUSED, module=name, source=name, kind=name, detail=name)
    report = Report((graph(decision, failure=name),), notes=(name,))
    assert render(report, width).count(name) == 6
    assert str(report).count(name) == 6


@pytest.mark.parametrize("text", ["\x1b[31mred", "a\nb", "\u202eabc", "\r", "\ud800", "\x9b1m"])
def test_text_cannot_steer_the_terminal(text: str) -> None:
    decision = dataclasses.replace(REFUSED, module=text, source=text, kind=text, detail=text)
    shown = str(Report((graph(decision, failure=text),), notes=(text,)))
    assert all(c.isprintable() or c == "\n" for c in shown)
    (row,) = [line for line in shown.splitlines() if line.startswith("1 ")]
    assert "left random" in row  # a line end in a name has not split the row
    shown.encode()


@pytest.mark.parametrize("width", [60, 80, 130, 160, 250])
def test_nothing_is_cut_off(width: int) -> None:
    """A narrow table folds its cells; it leaves no character out."""
    decision = dataclasses.replace(TAKEN, module="\u00e6" * 300, detail="\u00f8" * 300)
    shown = render(Report((graph(decision),)), width)
    assert shown.count("\u00e6") == shown.count("\u00f8") == 300


def test_narrow_console_stacks_the_cells() -> None:
    lines = [line.split() for line in render(Report((graph(REFUSED),)), 80).splitlines()]
    assert ["module", "shape", "pattern", "reason"] in lines
    assert ["role", "decision"] in lines
    assert ["1", "-", "bernoulli", "left", "random", "NOT_WORTH_IT"] in lines
    assert ["model.py:20", "-", "random", "6", "G"] in lines
    assert any(line[:2] == ["[s0,", "64]"] for line in lines)
    narrow = render(Report((graph(TAKEN),)), 80).split()
    assert "hidden" in narrow


def test_plain_text_ignores_terminal_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = str(Report((graph(),)))
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "CLICOLOR_FORCE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("COLUMNS", "40")
    assert str(Report((graph(),))) == plain
    assert plain.isascii()
    assert max(map(len, plain.splitlines())) <= 160
    assert not any(line.endswith(" ") for line in plain.splitlines())


def test_rich_console_gets_colour() -> None:
    assert "\x1b[" in render(Report((graph(),)), 160, color_system="standard", force_terminal=True)


def test_repr_is_one_line() -> None:
    text = repr(Report((graph(),)))
    assert text.startswith("<ardd.Report of 1 graph: 1 of 3 dropouts structured; ")
    assert "\n" not in text


def test_unknown_rate_is_a_question_mark() -> None:
    decision = dataclasses.replace(REFUSED, p=math.nan, p_used=None)
    assert cells(Report((graph(decision),)), "1")[6] == "?"


# ---- the line of the log -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "1 of 3 dropouts structured, product FLOPs -31 %, saved for backward 233 MiB"),
        ({"saved_bytes_after": None}, "1 of 3 dropouts structured, product FLOPs -31 %"),
        ({"flops_before": 0, "saved_bytes_after": 7}, "1 of 3 dropouts structured, saved for "),
        ({"decisions": (TAKEN,)}, "1 of 1 dropout structured, "),
        ({"decisions": ()}, "no dropout found; see ardd.report()"),
    ],
)
def test_summary_line(changes: dict[str, Any], line: str) -> None:
    text = summary_line(graph(**changes))
    assert text.startswith(line)
    assert text.endswith("; see ardd.report()")


# ---- JSON --------------------------------------------------------------------------------


def loaded(value: GraphReport) -> Any:
    """Returns what a process that reads the file sees, in strict JSON."""
    return json.loads(json.dumps(value.to_dict(), allow_nan=False))


@pytest.mark.parametrize(
    "original",
    [
        graph(),
        graph(inference=True, from_cache=True, saved_bytes_before=None, saved_bytes_after=None),
        graph(failure="Traceback\n[x]", before=""),
        dataclasses.replace(graph(), decisions=()),
        graph(dataclasses.replace(REFUSED, p=1)),
    ],
)
def test_json_round_trip(original: GraphReport) -> None:
    assert GraphReport.from_dict(loaded(original)) == original


@pytest.mark.parametrize("role", [None, *Role])
def test_role_in_its_column_and_in_json(role: Role | None) -> None:
    original = graph(dataclasses.replace(REFUSED, role=role))
    assert cells(Report((original,)), "1")[4] == ("-" if role is None else role.value)
    data = loaded(original)
    assert data["decisions"][0]["role"] == (None if role is None else role.value)
    assert GraphReport.from_dict(data) == original


@pytest.mark.parametrize("reason", list(Reason))
def test_json_round_trip_of_every_reason(reason: Reason) -> None:
    original = graph(dataclasses.replace(REFUSED, reason=reason))
    assert GraphReport.from_dict(loaded(original)) == original


def test_json_has_no_nan() -> None:
    original = graph(dataclasses.replace(REFUSED, p=math.nan))
    data = loaded(original)
    assert data["decisions"][0]["p"] is None
    assert math.isnan(GraphReport.from_dict(data).decisions[0].p)


def test_json_covers_every_field() -> None:
    """A field added to either class needs a rule by which its value is trusted."""
    data = loaded(graph())
    assert set(data) == {"schema"} | {f.name for f in dataclasses.fields(GraphReport)}
    assert set(data["decisions"][0]) == {f.name for f in dataclasses.fields(Decision)}
    for name in set(data) - {"schema"}:
        bad = data | {name: object()}
        with pytest.raises(ValueError, match=f"graph field '{name}' is"):
            GraphReport.from_dict(bad)
    for name in data["decisions"][0]:
        bad = data | {"decisions": [data["decisions"][0] | {name: object()}]}
        with pytest.raises(ValueError, match=f"decision field '{name}' is"):
            GraphReport.from_dict(bad)


def test_report_to_dict_is_json() -> None:
    data = json.loads(json.dumps(Report((graph(), graph(inference=True)), ("n",)).to_dict()))
    assert data["schema"] == 4
    assert data["notes"] == ["n"]
    assert [entry["inference"] for entry in data["graphs"]] == [False, True]
    assert data["graphs"][0]["decisions"][1]["reason"] == "NOT_WORTH_IT"
    assert data["graphs"][0]["decisions"][1]["shape"] == ["s0", 64]
    assert data["totals"] == {
        "dropouts": 6,
        "structured": 2,
        "flops_before": 32_000_000_000,
        "flops_after": 22_080_000_000,
        "flops_budget": None,
        "saved_bytes_before": 824 * MIB,
        "saved_bytes_after": 466 * MIB,
    }


def edit_decision(data: Any, **changes: Any) -> Any:
    return data | {"decisions": [data["decisions"][0] | changes]}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: [], r"expected an object, not \[\]"),
        (lambda d: None, "expected an object, not None"),
        (lambda d: "x" * 10_000, "expected an object, not 'xxx"),
        (lambda d: {}, "schema version is None, expected 4"),
        (lambda d: d | {"schema": 1}, "schema version is 1, expected 4"),
        (lambda d: d | {"schema": True}, "schema version is True"),
        (lambda d: d | {"code": ""}, "unknown graph field 'code'. Known fields: decisions, "),
        (lambda d: {k: v for k, v in d.items() if k != "after"}, "graph field 'after' is missing"),
        (lambda d: d | {"flops_after": -1}, "graph field 'flops_after' is -1, expected an integer"),
        (lambda d: d | {"flops_after": 1.5}, "graph field 'flops_after' is 1.5"),
        (lambda d: d | {"flops_after": True}, "graph field 'flops_after' is True"),
        (lambda d: d | {"flops_after": 10**400}, "graph field 'flops_after' is 1000"),
        (lambda d: d | {"saved_bytes_after": "1"}, "expected an integer .* or null"),
        (lambda d: d | {"inference": 0}, "graph field 'inference' is 0, expected true or false"),
        (lambda d: d | {"failure": 3}, "graph field 'failure' is 3, expected a string or null"),
        (lambda d: d | {"decisions": {}}, "graph field 'decisions' is {}, expected a list"),
        (lambda d: d | {"decisions": [3]}, "expected a decision object, not 3"),
        (lambda d: edit_decision(d, extra=1), "unknown decision field 'extra'"),
        (lambda d: edit_decision(d, reason="WHY"), "'WHY', expected the name of a Reason"),
        (lambda d: edit_decision(d, reason=["STRUCTURED"]), "expected the name of a Reason"),
        (lambda d: edit_decision(d, reason="__class__"), "expected the name of a Reason"),
        (
            lambda d: edit_decision(d, role="HIDDEN"),
            "'HIDDEN', expected the name of a role or null",
        ),
        (lambda d: edit_decision(d, role=["hidden"]), "expected the name of a role or null"),
        (lambda d: edit_decision(d, p=math.nan), "decision field 'p' is nan"),
        (lambda d: edit_decision(d, p_used=1.5), "decision field 'p_used' is 1.5"),
        (lambda d: edit_decision(d, p=False), "decision field 'p' is False"),
        (lambda d: edit_decision(d, shape=[1, -2]), "decision field 'shape' is"),
        (lambda d: edit_decision(d, shape="ab"), "decision field 'shape' is 'ab'"),
        (lambda d: edit_decision(d, block=0), "decision field 'block' is 0"),
        (lambda d: edit_decision(d, dim="1"), "decision field 'dim' is '1'"),
        (lambda d: edit_decision(d, taken="yes"), "decision field 'taken' is 'yes'"),
    ],
)
def test_json_trusts_nothing(edit: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        GraphReport.from_dict(edit(loaded(graph())))
    assert len(str(caught.value)) < 400  # a bad file does not flood the log


# ---- the record --------------------------------------------------------------------------


def test_record_keeps_the_order_and_forgets() -> None:
    module.clear()
    assert module.current() == Report()
    first, second = graph(), graph(inference=True)
    module.record(first)
    before = module.current()
    module.record(second)
    assert module.current().graphs == (first, second)
    assert before.graphs == (first,)  # a report is what was known when it was asked for
    module.clear()
    assert module.current().graphs == ()


def test_record_from_many_threads() -> None:
    module.clear()
    entries = [graph(flops_before=i) for i in range(400)]
    start = threading.Barrier(8)

    def work(part: list[GraphReport]) -> None:
        start.wait()
        for entry in part:
            module.record(entry)
            assert entry in module.current().graphs

    threads = [threading.Thread(target=work, args=(entries[i::8],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entry.flops_before for entry in module.current().graphs) == list(range(400))


def test_rich_is_loaded_only_to_print() -> None:
    assert ardd.__path__  # the package, wherever it is installed
    code = (
        "import sys; from ardd.core.report import Report, current, summary_line; "
        "repr(current()); assert 'rich' not in sys.modules; "
        "str(current()); assert 'rich' in sys.modules"
    )
    folder = str(Path(next(iter(ardd.__path__))).parent)
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": folder}, check=True)
