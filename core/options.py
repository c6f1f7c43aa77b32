"""What a user can set, checked when it is set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

from .decisions import Role
from .errors import OptionsError


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the backend, ``torch.compile(model, backend="ardd", options={...})``.

    Values are plain and comparable: equal options compile to the same graphs, and ``repr`` of one
    can be part of a cache key. There is no seed; torch's own generators draw every mask.

    Raises:
        OptionsError: A value has the wrong type or is out of range.
    """

    pattern: Literal["auto", "block", "grouped", "window", "row", "random", "deferred"] = "auto"
    """Structure of the masks.

    ``"auto"`` gives each dropout blocks where these pay, at rates above 0.5 with blocks of its own
    for each of ``groups`` parts of the batch, and leaves it random where none pay; ``"block"``
    gives blocks to every dropout that can have them, whatever the price; ``"grouped"`` does so with
    blocks of its own for each of ``groups`` parts of the batch, where that can be done, and with
    one set for all where not; ``"window"`` gives one window of neighbouring features, that wraps
    around, and ``"row"`` every i-th feature, in the same way; ``"random"`` leaves ordinary dropout
    everywhere. ``"deferred"`` drops nothing in the forward: of what it saves for weight gradients
    the smallest values are dropped, in the family that ``saves`` names, of every row where it names
    none.
    """
    structure: Literal["auto"] | tuple[str, ...] = "auto"
    """Roles of the dropouts that may be structured, such as ``("hidden", "rnn_input")``; all others
    stay random.

    With ``"auto"``, the pattern ``"auto"`` structures those whose masks were measured to train as
    well as ordinary ones, and every other pattern all. The names are the values of `ardd.Role`.
    """
    block_size: Literal["auto"] | int = "auto"
    """Neighbouring features that are kept or dropped together, or the side of a weight's tile;
    ``"auto"`` picks by price."""
    groups: Literal["auto"] | int = "auto"
    """Parts of the batch that have kept blocks of their own; fewer where so many do not divide it.

    For the pattern ``"grouped"``, and at rates above 0.5 for ``"auto"``. ``"auto"`` stands for 4
    with the former and for 2 with the latter.
    """
    rate_tolerance: float = 0.02
    """How far the rate used may be from the rate asked for, as an absolute difference.

    A whole number of blocks is dropped, so a rate is met only up to rounding: a dropout with no
    block size within this stays random.
    """
    plans: int = 1
    """With the pattern ``"row"``: compiled graphs among which each step draws one.

    Each has periods of its own for every dropout. More follow a distribution more closely where
    there are few groups, and take longer to compile.
    """
    row_groups: Literal["auto"] | int = "auto"
    """With the pattern ``"row"``: groups of features that have a period and a start of their own.

    1 is the pattern of the paper; ``"auto"`` takes about 8 blocks to a group, or what meets the
    rate.
    """
    search: Literal["narrow", "maxent", "sgd", "pairwise"] = "narrow"
    """With the pattern ``"row"``: how often each period is used, see `ardd.search_distribution`."""
    max_period: Literal["auto"] | int = "auto"
    """With the pattern ``"row"``: the largest period; ``"auto"`` is 8, or what the rate needs."""
    saves: Literal[
        "exact", "off", "nm", "topk", "rows", "sampled_rows", "int8", "int4", "mixed"
    ] = "exact"
    """How tensors that the forward saves for the backward may be encoded.

    ``"exact"`` encodes what loses nothing by it, such as masks in one bit; ``"off"`` saves as
    torch does. All others are lossy, and named for that: the forward stays as it is, gradients
    change. For operands of weight gradients alone: ``"nm"`` keeps the largest of every 16
    features, ``"topk"`` of every row, ``"rows"`` the largest rows of tokens, ``"sampled_rows"``
    an unbiased sample of rows, drawn by torch's generator as masks are. For every activation:
    ``"int8"``, ``"int4"``, and ``"mixed"``, which also computes cheap ones again and may mix.
    """
    save_density: float | None = None
    """Fraction of the values that ``"nm"``, ``"topk"`` and the rows keep; None stands for 0.25."""
    save_bits: Literal[4, 8, 16] | None = None
    """Bits of a value that ``"nm"`` and ``"topk"`` keep, and at most of those of ``"mixed"``, where
    None stands for 8; else None stands for the type that values have."""
    memory_budget: float | int | None = None
    """What may be saved for backward: a fraction of what torch would save, or a number of bytes.

    Of encodings and recomputation that ``saves`` allows, the cheapest that fit are taken:
    ``"exact"`` computes again, ``"mixed"`` does both.
    """
    flops_budget: float | int | None = None
    """What the products of a graph may cost, forward and backward: a fraction of their FLOPs
    without dropout, or a number of FLOPs.

    Structured dropouts are raised together above the rates asked for, each at most to
    ``max_rate``, until the budget is met. A budget that is met already changes nothing.
    """
    max_rate: float = 0.5
    """The highest rate to which ``flops_budget`` may raise a dropout; no other rate is changed."""
    target: Literal["auto", "inductor", "eager"] = "auto"
    """What runs the rewritten graphs; ``"eager"`` runs them op by op, to debug."""
    strict: bool = False
    """Whether a failing pass raises, instead of a warning and the original program."""
    max_rewrites: int | None = None
    """Rewrite only the first so many dropouts of each graph, to bisect a wrong result."""
    cost_model: str = "roofline"
    """Name of the cost model that prices the candidates."""

    def __post_init__(self) -> None:
        for key, (allowed, accepts) in _CHECKS.items():
            given = getattr(self, key)
            if not accepts(given):
                raise OptionsError.bad_value(key, given, allowed)
        if isinstance(self.structure, list):
            object.__setattr__(self, "structure", tuple(self.structure))
        if self.structure != "auto" and self.pattern in ("random", "deferred"):
            raise OptionsError.bad_value(
                "structure", self.structure, f"'auto' with pattern={self.pattern!r}"
            )
        # 0 and 0.0 are equal but print differently, and the text is part of cache keys.
        object.__setattr__(self, "rate_tolerance", float(self.rate_tolerance))
        object.__setattr__(self, "max_rate", float(self.max_rate))
        if self.save_density is not None:
            object.__setattr__(self, "save_density", float(self.save_density))
        if self.saves == "off" and self.pattern == "deferred":
            raise OptionsError.bad_value("saves", "off", "any other with pattern='deferred'")
        if self.flops_budget is not None and self.pattern in _FIXED_RATES:
            raise OptionsError.bad_value(
                "flops_budget", self.flops_budget, f"None with pattern={self.pattern!r}"
            )
        if self.saves == "off" and self.memory_budget is not None:
            raise OptionsError.bad_value(
                "memory_budget", self.memory_budget, "None with saves='off'"
            )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, object] | None) -> Options:
        """Returns the options that a user wrote as a dictionary; None stands for the defaults.

        Raises:
            OptionsError: A key is unknown, or a value has the wrong type or is out of range.
        """
        if mapping is None:
            return cls()
        if not isinstance(mapping, Mapping):
            raise OptionsError.bad_value("options", mapping, "a dictionary of options")
        known = tuple(field.name for field in dataclasses.fields(cls))
        for key, given in mapping.items():
            if key not in known:
                raise OptionsError.unknown_key(key, given, known)
        return cls(**cast("dict[str, Any]", dict(mapping)))


_FIXED_RATES = ("row", "random", "deferred")
"""Patterns whose rates no budget can raise."""


def _is_int(value: object, least: int) -> bool:
    """Whether ``value`` is an int, which True is not here, of at least ``least``."""
    return type(value) is int and value >= least


def _is_rate(value: object) -> bool:
    return type(value) in (int, float) and 0 <= cast("float", value) <= 1


def _choice(*names: str) -> tuple[str, Callable[[object], bool]]:
    allowed = ", ".join(repr(name) for name in names[:-1]) + f" or {names[-1]!r}"
    return allowed, lambda value: isinstance(value, str) and value in names


def _are_roles(value: object) -> bool:
    if not isinstance(value, (tuple, list)):
        return value == "auto"
    return bool(value) and all(name in _ROLES for name in value)


_ROLES = tuple(role.value for role in Role)


def _is_density(value: object) -> bool:
    return value is None or (type(value) in (int, float) and 0 < cast("float", value) <= 1)


def _is_bound(value: object) -> bool:
    return type(value) in (int, float) and 0 < cast("float", value) < 1


def _is_budget(value: object) -> bool:
    if value is None or _is_int(value, 0):
        return True
    return isinstance(value, float) and 0 < value <= 1


# For each field, what it may be in words, and whether a value is that.
_CHECKS: Mapping[str, tuple[str, Callable[[object], bool]]] = {
    "pattern": _choice("auto", "block", "grouped", "window", "row", "random", "deferred"),
    "structure": ("'auto' or a tuple of " + ", ".join(map(repr, _ROLES)), _are_roles),
    "block_size": ("'auto' or an int of at least 1", lambda v: v == "auto" or _is_int(v, 1)),
    "groups": ("'auto' or an int of at least 1", lambda v: v == "auto" or _is_int(v, 1)),
    "rate_tolerance": ("a number from 0 to 1", _is_rate),
    "plans": ("an int of at least 1", lambda v: _is_int(v, 1)),
    "row_groups": ("'auto' or an int of at least 1", lambda v: v == "auto" or _is_int(v, 1)),
    "search": _choice("narrow", "maxent", "sgd", "pairwise"),
    "max_period": ("'auto' or an int of at least 1", lambda v: v == "auto" or _is_int(v, 1)),
    "saves": _choice("exact", "off", "nm", "topk", "rows", "sampled_rows", "int8", "int4", "mixed"),
    "save_density": ("None or a number above 0 and at most 1", _is_density),
    "save_bits": ("None, 4, 8 or 16", lambda v: v is None or (_is_int(v, 4) and v in (4, 8, 16))),
    "memory_budget": (
        "None, a fraction above 0 and at most 1.0, or an int of bytes of at least 0",
        _is_budget,
    ),
    "flops_budget": (
        "None, a fraction above 0 and at most 1.0, or an int of FLOPs of at least 0",
        _is_budget,
    ),
    "max_rate": ("a number above 0 and below 1", _is_bound),
    "target": _choice("auto", "inductor", "eager"),
    "strict": ("True or False", lambda v: isinstance(v, bool)),
    "max_rewrites": ("None or an int of at least 0", lambda v: v is None or _is_int(v, 0)),
    "cost_model": ("the name of a cost model", lambda v: isinstance(v, str) and v != ""),
}
