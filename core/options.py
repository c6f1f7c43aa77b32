"""What a user can set, checked when it is set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

from .errors import OptionsError


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the backend, ``torch.compile(model, backend="ardd", options={...})``.

    Values are plain and comparable: equal options compile to the same graphs, and ``repr`` of one
    can be part of a cache key. There is no seed; torch's own generators draw every mask.

    Raises:
        OptionsError: A value has the wrong type or is out of range.
    """

    pattern: Literal["auto", "block", "random"] = "auto"
    """Structure of the masks.

    ``"auto"`` gives each dropout the structure that pays, or none where none does; ``"block"``
    gives blocks to every dropout that can have them, whatever the price; ``"random"`` leaves
    ordinary dropout everywhere.
    """
    block_size: Literal["auto"] | int = "auto"
    """Neighbouring features that are kept or dropped together; ``"auto"`` picks by price."""
    rate_tolerance: float = 0.02
    """How far the rate used may be from the rate asked for, as an absolute difference.

    A whole number of blocks is dropped, so a rate is met only up to rounding: a dropout with no
    block size within this stays random.
    """
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
        # 0 and 0.0 are equal but print differently, and the text is part of cache keys.
        object.__setattr__(self, "rate_tolerance", float(self.rate_tolerance))

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


def _is_int(value: object, least: int) -> bool:
    """Whether ``value`` is an int, which True is not here, of at least ``least``."""
    return type(value) is int and value >= least


def _is_rate(value: object) -> bool:
    return type(value) in (int, float) and 0 <= cast("float", value) <= 1


def _choice(*names: str) -> tuple[str, Callable[[object], bool]]:
    allowed = ", ".join(repr(name) for name in names[:-1]) + f" or {names[-1]!r}"
    return allowed, lambda value: isinstance(value, str) and value in names


# For each field, what it may be in words, and whether a value is that.
_CHECKS: Mapping[str, tuple[str, Callable[[object], bool]]] = {
    "pattern": _choice("auto", "block", "random"),
    "block_size": ("'auto' or an int of at least 1", lambda v: v == "auto" or _is_int(v, 1)),
    "rate_tolerance": ("a number from 0 to 1", _is_rate),
    "target": _choice("auto", "inductor", "eager"),
    "strict": ("True or False", lambda v: isinstance(v, bool)),
    "max_rewrites": ("None or an int of at least 0", lambda v: v is None or _is_int(v, 0)),
    "cost_model": ("the name of a cost model", lambda v: isinstance(v, str) and v != ""),
}
