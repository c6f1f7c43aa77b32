"""Every error that ardd raises: what was wrong, what was expected, what to do."""

from __future__ import annotations

import difflib
import math
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
    """A graph does not fit its budget, whatever the options allow.

    Args:
        budget: What is allowed: bytes or FLOPs.
        smallest: The least that can be reached, in the same unit.
        text: What is wrong and what to do.
        saves: The option ``saves`` where the budget is one of memory.
    """

    def __init__(self, budget: int, smallest: int, text: str, saves: str | None = None) -> None:
        super().__init__(budget, smallest, text, saves)
        self.budget, self.smallest, self.text, self.saves = budget, smallest, text, saves

    def __str__(self) -> str:
        return self.text

    @classmethod
    def of_saves(cls, budget: int, smallest: int, saves: str) -> BudgetError:
        """Says that no plan of encodings and recomputation fits the memory budget, in bytes."""
        more = "" if saves == "mixed" else ' or set saves="mixed", which may change numbers'
        return cls(
            budget,
            smallest,
            f"memory_budget allows {budget} bytes to be saved for backward, and the smallest"
            f" plan with saves={saves!r} needs {smallest}. Raise the budget{more}.",
            saves,
        )

    @classmethod
    def of_flops(
        cls, budget: int, smallest: int, dense: int, max_rate: float, structured: int
    ) -> BudgetError:
        """Says that no rates up to ``max_rate`` fit the budget of FLOPs of a graph.

        Args:
            budget: FLOPs allowed.
            smallest: FLOPs at the highest rates.
            dense: FLOPs without dropout.
            max_rate: The option.
            structured: How many dropouts are structured.
        """
        return cls(
            budget,
            smallest,
            f"flops_budget allows {budget} FLOPs for the products of a graph that has {dense}"
            f" without dropout; with max_rate={max_rate:g} its structured dropouts, {structured},"
            f" reach {smallest} at best. Raise flops_budget or max_rate, or set pattern='block',"
            " which structures every dropout that it can; ardd.explain without a budget says which"
            " it cannot.",
        )


class RateError(ArddError, ValueError):
    """`ardd.set_rate` was given something that it cannot set."""

    @classmethod
    def bad_rate(cls, p: object) -> RateError:
        """Says that ``p`` is no drop rate."""
        return cls(f"The rate is {p!r}. Expected a number from 0 to below 1.")

    @classmethod
    def bad_levels(cls, levels: object) -> RateError:
        """Says that ``levels`` are no levels."""
        return cls(
            f"levels is {levels!r}. Expected an int of at least 2, or a sequence of rates from 0"
            " to below 1."
        )

    @classmethod
    def too_many_levels(cls, levels: int, needed: int, limit: int, most: int) -> RateError:
        """Says that torch would stop compiling before every level has its graphs.

        Args:
            levels: How many rates there would be.
            needed: How many graphs they may need.
            limit: How often torch compiles one function.
            most: How many levels that is enough for.
        """
        fewer = f"Or give at most {most} levels. " if most >= 2 else ""
        return cls(
            f"{levels} rates may need {needed} graphs: one each for training and for evaluation,"
            f" and some for other batch sizes. Torch compiles one function {limit} times, and runs"
            " it uncompiled from then on. Compile the model with"
            f" torch.compile(model, ..., recompile_limit={needed}) and give the compiled model to"
            f" set_rate. {fewer}Where torch has no such argument, or what is compiled is a function"
            " around the model, run both under"
            f" torch._dynamo.config.patch(recompile_limit={needed})."
        )

    @classmethod
    def no_dropout(cls, modules: str) -> RateError:
        """Says that there is no rate to set.

        Args:
            modules: What was asked for, in words.
        """
        return cls(
            f"No dropout was found in {modules}. Expected a module of torch.nn that drops, or an"
            " attribute with 'dropout' in its name that is a float."
        )

    @classmethod
    def unknown_module(cls, name: str, known: Iterable[str]) -> RateError:
        """Says that the model has no module ``name``, and which one was probably meant."""
        nearest = difflib.get_close_matches(name, list(known), n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        return cls(
            f"The model has no module {name!r}. Expected names as model.named_modules() gives"
            f" them.{hint}"
        )


class DropoutRateError(ArddError, RuntimeError):
    """The program drops at a rate that is no probability; PyTorch raises a RuntimeError too."""

    @classmethod
    def no_probability(cls, p: float) -> DropoutRateError:
        """Says which rate was given, in the words of PyTorch."""
        return cls(f"dropout probability has to be between 0 and 1, but got {p}")


class DistributionError(ArddError, ValueError):
    """There is no distribution over periods such as was asked for."""

    @classmethod
    def unknown_method(cls, method: object, known: Iterable[str]) -> DistributionError:
        """Says that no search is called ``method``, and which one was probably meant."""
        return cls(f"Unknown method {method!r}. {_known_and_nearest(method, known)}")

    @classmethod
    def bad_value(cls, name: str, given: object, allowed: str) -> DistributionError:
        """Says that ``given`` is not what the argument ``name`` may be."""
        return cls(f"Argument {name!r} is {given!r}. Allowed: {allowed}.")

    @classmethod
    def infeasible(cls, rate: float, max_period: int) -> DistributionError:
        """Says that periods up to ``max_period`` cannot drop as much as ``rate``."""
        least = math.ceil(1 / (1 - rate) - 1e-9)
        return cls(
            f"No distribution over the periods 1..{max_period} drops {rate:g}: the largest drops"
            f" {(max_period - 1) / max_period:g}. Set max_period to {least} or more."
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
