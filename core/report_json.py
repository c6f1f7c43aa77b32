"""The JSON form of a report: what is written, and the checks of what is read."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .decisions import Decision, Reason, Role
from .saves import SavedTensor, SaveReason

if TYPE_CHECKING:
    from .report import GraphReport, Report

SCHEMA: Final = 4
"""Version of the JSON form. Files of another version are refused, not guessed at."""


def report_to_json(report: Report) -> dict[str, object]:
    """Returns plain JSON values."""
    return {
        "schema": SCHEMA,
        "graphs": [graph_to_json(graph) for graph in report.graphs],
        "notes": list(report.notes),
        "totals": {
            "dropouts": len(report.decisions),
            "structured": sum(decision.taken for decision in report.decisions),
            "flops_before": report.flops_before,
            "flops_after": report.flops_after,
            "flops_budget": report.flops_budget,
            "saved_bytes_before": report.saved_bytes_before,
            "saved_bytes_after": report.saved_bytes_after,
        },
    }


def graph_to_json(graph: GraphReport) -> dict[str, object]:
    """Returns plain JSON values that `graph_fields_from_json` reads back."""
    fields = {f.name: getattr(graph, f.name) for f in dataclasses.fields(graph)}
    decisions = [_decision_to_dict(decision) for decision in graph.decisions]
    saves = [saved.to_dict() for saved in graph.saves]
    return {"schema": SCHEMA} | fields | {"decisions": decisions, "saves": saves}


def graph_fields_from_json(data: object) -> dict[str, Any]:
    """Returns the fields of the `GraphReport` that `graph_to_json` wrote, and trusts none of it.

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
    saves = tuple(_saved_from_dict(entry) for entry in fields["saves"])
    return fields | {"decisions": decisions, "saves": saves}


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

_SHAPE: Final = _Field(
    lambda v: isinstance(v, list) and all(isinstance(n, str) or _is_count(n) for n in v),
    "a list of integers >= 0 and strings",
)

_GRAPH_FIELDS: Final[Mapping[str, _Field]] = {
    "decisions": _Field(lambda value: isinstance(value, list), "a list"),
    "saves": _Field(lambda value: isinstance(value, list), "a list"),
    "flops_before": _COUNT,
    "flops_after": _COUNT,
    "flops_budget": _MAYBE_COUNT,
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
    "shape": _SHAPE,
    "p": _MAYBE_RATE,
    "taken": _FLAG,
    "reason": _Field(
        lambda v: isinstance(v, str) and v in Reason.__members__, "the name of a Reason"
    ),
    "role": _Field(
        lambda v: v is None or v in [role.value for role in Role], "the name of a role or null"
    ),
    "detail": _TEXT,
    "pattern": _TEXT,
    "p_used": _MAYBE_RATE,
    "dim": _Field(lambda v: v is None or type(v) is int, "an integer or null"),
    "block": _Field(lambda v: v is None or (_is_count(v) and v > 0), "an integer >= 1 or null"),
    "flops_before": _COUNT,
    "flops_after": _COUNT,
}

_SAVED_FIELDS: Final[Mapping[str, _Field]] = {
    "name": _TEXT,
    "op": _TEXT,
    "module": _TEXT,
    "uses": _Field(
        lambda v: isinstance(v, list) and all(isinstance(use, str) for use in v),
        "a list of strings",
    ),
    "shape": _SHAPE,
    "dtype": _TEXT,
    "bytes_before": _COUNT,
    "bytes_after": _COUNT,
    "encoding": _TEXT,
    "exact": _FLAG,
    "reason": _Field(
        lambda v: isinstance(v, str) and v in SaveReason.__members__, "the name of a SaveReason"
    ),
    "error": _Field(
        lambda v: v is None or (type(v) in (int, float) and v >= 0), "a number >= 0 or null"
    ),
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
    fields["role"] = None if fields["role"] is None else Role(fields["role"])
    return Decision(**fields)


def _saved_from_dict(data: object) -> SavedTensor:
    fields = _checked(data, _SAVED_FIELDS, "saved tensor")
    fields["uses"], fields["shape"] = tuple(fields["uses"]), tuple(fields["shape"])
    fields["reason"] = SaveReason[fields["reason"]]
    return SavedTensor(**fields)
