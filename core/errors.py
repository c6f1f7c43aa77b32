"""Every error that ardd raises: what was wrong, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ArddError(Exception):
    """Base of all errors of ardd."""


class OptionsError(ArddError, ValueError):
    """An option has an unknown name or a value that it cannot have."""

    @classmethod
    def unknown_key(cls, key: object, given: object, known: Iterable[str]) -> OptionsError:
        """Says that there is no option ``key``, and which one was probably meant."""
        return cls(f"Unknown option {key!r} (given {given!r}). {_known_and_nearest(key, known)}")

    @classmethod
    def bad_value(cls, key: str, given: object, allowed: str) -> OptionsError:
        """Says that ``given`` is not one of the values ``allowed`` for the option ``key``."""
        return cls(f"Option {key!r} is {given!r}. Allowed: {allowed}.")


class CostModelError(ArddError):
    """A cost model is not known by the name asked for, or cannot be registered."""

    @classmethod
    def unknown_name(cls, name: str, known: Iterable[str]) -> CostModelError:
        """Says that no cost model is called ``name``, and which one was probably meant."""
        return cls(f"Unknown cost model {name!r}. {_known_and_nearest(name, known)}")

    @classmethod
    def name_taken(cls, name: str) -> CostModelError:
        """Says that another cost model is called ``name`` already."""
        return cls(f"A cost model named {name!r} exists already. Register yours by another name.")

    @classmethod
    def not_made(cls, name: str, cause: BaseException) -> CostModelError:
        """Says that the factory registered as ``name`` raised ``cause``."""
        return cls(f"The cost model {name!r} cannot be made: {_in_a_line(cause)}.")


class PassError(ArddError):
    """A pass failed; ``cause`` is what it raised.

    Args:
        name: Name of the pass.
        cause: The exception that ended it.
    """

    def __init__(self, name: str, cause: BaseException) -> None:
        super().__init__(name, cause)  # the arguments themselves, so that the error pickles
        self.name = name
        self.cause = cause

    def __str__(self) -> str:
        return (
            f"Pass {self.name!r} failed with {_in_a_line(self.cause)}. "
            "Without strict=True the original program runs instead."
        )


class RedrawError(ArddError):
    """A random draw stands in the backward graph.

    Drawn again there, a mask would differ from the one that the forward used and every gradient
    would silently be wrong.

    Args:
        draw: The node that draws, as text.
    """

    def __init__(self, draw: str) -> None:
        super().__init__(draw)
        self.draw = draw

    def __str__(self) -> str:
        return (
            f"The backward graph draws random numbers again: {self.draw}. A mask must be drawn "
            "once, in the forward, and saved."
        )


class BudgetError(ArddError, ValueError):
    """No plan of encodings and recomputation fits the memory budget.

    Args:
        budget: Bytes allowed.
        smallest: Bytes of the smallest plan.
        saves: The option ``saves``.
    """

    def __init__(self, budget: int, smallest: int, saves: str) -> None:
        super().__init__(budget, smallest, saves)
        self.budget, self.smallest, self.saves = budget, smallest, saves

    def __str__(self) -> str:
        more = "" if self.saves == "mixed" else ' or set saves="mixed", which may change numbers'
        return (
            f"memory_budget allows {self.budget} bytes to be saved for backward, and the smallest"
            f" plan with saves={self.saves!r} needs {self.smallest}. Raise the budget{more}."
        )


class DerivativeError(ArddError, NotImplementedError):
    """A derivative was asked for that an op does not have.

    Args:
        op: What has no such derivative.
    """

    def __init__(self, op: str) -> None:
        super().__init__(op)
        self.op = op

    def __str__(self) -> str:
        return (
            f"{self.op} has no second derivative. Expected first derivatives alone; for others, "
            "as with create_graph=True, run the model uncompiled."
        )


class PayloadError(ArddError, ValueError):
    """An encoded tensor does not have the parts that its encoding gives."""

    @classmethod
    def checked(
        cls, name: str, payload: Sequence[Tensor], wanted: Sequence[tuple[torch.dtype, int]]
    ) -> Sequence[Tensor]:
        """Returns a payload that has the wanted types and last sizes.

        Raises:
            PayloadError: it has not.
        """
        given = [(part.dtype, part.shape[-1] if part.dim() else 0) for part in payload]
        if given != list(wanted):
            raise cls(
                f"Cannot decode {name}: its parts are {given}. Expected {list(wanted)}, as encode"
                " gives them."
            )
        cls.check_alike(name, payload)
        return payload

    @classmethod
    def check_alike(cls, name: str, parts: Sequence[Tensor]) -> None:
        """Checks that parts have the same leading sizes.

        Raises:
            PayloadError: they have not.
        """
        if any(part.shape[:-1] != parts[0].shape[:-1] for part in parts):
            shapes = [tuple(part.shape) for part in parts]
            raise cls(f"Cannot decode {name}: leading sizes of {shapes} differ.")


def _in_a_line(error: BaseException) -> str:
    """Returns the type and the first line; torch's own messages can be whole graphs."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def _known_and_nearest(key: object, known: Iterable[str]) -> str:
    names = sorted(known)
    nearest = difflib.get_close_matches(str(key), names, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"Known: {', '.join(names)}.{hint}"
