"""What a plan costs: the interface that every cost model implements, and where they are found."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
from collections.abc import Callable, Mapping
from typing import Literal, Protocol, runtime_checkable

import sympy
import torch

from ..core.errors import CostModelError
from .roofline import Roofline

Kind = Literal["product", "gather", "expand", "random", "draw"]


@dataclasses.dataclass(frozen=True)
class OpCost:
    """One op to be priced. Sizes are sympy expressions: a batch size may be a symbol."""

    kind: Kind
    """What is done: ``product`` (matrix product or convolution), ``gather`` (dense to compact),
    ``expand`` (compact to dense), ``random`` (a Bernoulli mask), ``draw`` (a kept set)."""
    name: str
    """Name of the op, such as ``mm``; for conversions the op that it is for."""
    sizes: tuple[sympy.Expr, ...]
    """Sizes of the labels of a product, such as (m, k, n), else the shape of the result."""
    flops: sympy.Expr
    """Floating point operations."""
    bytes: sympy.Expr
    """Bytes read and written."""
    run_bytes: int
    """Consecutive bytes that a gather or an expand moves at a time; 0 for other ops."""
    dtype: torch.dtype
    """Type of the elements."""
    hints: Mapping[sympy.Symbol, int] = dataclasses.field(default_factory=dict, hash=False)
    """The sizes of the example batch, for every symbol."""

    def hint(self, expression: sympy.Expr) -> float:
        """Returns the value of a size expression at the example batch."""
        return float(expression.subs(self.hints)) if expression.free_symbols else float(expression)


@runtime_checkable
class CostModel(Protocol):
    """Prices ops. The plan with the smallest sum is taken, so only ratios matter."""

    @property
    def name(self) -> str:
        """The name that ``options={"cost_model": name}`` gives."""

    @property
    def version(self) -> str:
        """Changes whenever prices do: a part of the key of compiled graphs."""

    def seconds(self, op: OpCost, device: torch.device) -> float:
        """Returns the predicted time of one op.

        Args:
            op: the op.
            device: the device that runs it.

        Returns:
            Seconds, finite and not negative. It has to be the same on every rank of a distributed
            run, which a measurement is not.
        """


Factory = Callable[[], CostModel]

_registered: dict[str, Factory] = {}


def register_cost_model(name: str, factory: Factory) -> None:
    """Makes a cost model known under a name, for this process.

    A package does the same for every process by an entry point of the group ``ardd.cost_models``.

    Args:
        name: what ``options={"cost_model": name}`` will say.
        factory: returns the model; called at most once.

    Raises:
        CostModelError: the name is taken by another factory.
    """
    if name == Roofline.name or _registered.get(name, factory) is not factory:
        raise CostModelError.name_taken(name)
    _registered[name] = factory
    find_cost_model.cache_clear()


@functools.cache
def find_cost_model(name: str) -> CostModel:
    """Returns the cost model of a name.

    Raises:
        CostModelError: nothing has the name, or what has it is no cost model.
    """
    if name == Roofline.name:
        return Roofline()
    plugins = importlib.metadata.entry_points(group="ardd.cost_models")
    factories: dict[str, Factory] = {
        **{p.name: _load(p) for p in plugins if p.name == name},
        **_registered,
    }
    if name not in factories:
        raise CostModelError.unknown_name(name, {Roofline.name, *_registered, *plugins.names})
    model = factories[name]()
    if not isinstance(model, CostModel):
        raise CostModelError(
            f"The cost model {name!r} is a {type(model).__name__} without name, version and"
            " seconds(op, device); see ardd.CostModel."
        )
    return model


def price(model: CostModel, op: OpCost, device: torch.device) -> float:
    """Returns what the model says, checked.

    Raises:
        CostModelError: the price is not a finite number that is at least 0.
    """
    seconds = model.seconds(op, device)
    if not isinstance(seconds, (int, float)) or not math.isfinite(seconds) or seconds < 0:
        raise CostModelError(
            f"The cost model {model.name!r} priced {op.kind} {op.name} at {seconds!r}; expected"
            " finite seconds that are at least 0."
        )
    return float(seconds)


def _load(entry_point: importlib.metadata.EntryPoint) -> Factory:
    return lambda: entry_point.load()()
