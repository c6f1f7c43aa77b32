"""Finds random masks written by hand: ``bernoulli``, ``rand < q``, ``floor(q + rand)``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Final

from torch import fx

from ..core.decisions import Reason
from ..core.errors import DropoutRateError
from .dynamo_nodes import (
    CASTS,
    LAYOUTS,
    argument,
    is_floating,
    is_fresh,
    number,
    op_name,
    tensor_of,
)
from .match_dropout_calls import LeftAlone
from .sites import static_shape


@dataclasses.dataclass(frozen=True)
class HandMask:
    """A tensor of random zeros and ones, each drawn on its own."""

    draw: fx.Node
    """The call that draws."""
    kind: str
    """Name of the function that draws."""
    mask: fx.Node
    """The node whose value is the mask; ``draw`` itself, a comparison or a rounding."""
    overwritten: fx.Node | None
    """The tensor that ``mask`` was written into: whoever reads it later reads the mask."""
    like: fx.Node
    """A tensor of the mask's shape, once ``draw`` draws no more."""
    q: float
    """Probability of a one."""

    @property
    def p(self) -> float:
        """Probability of a zero."""
        return float(f"{1 - self.q:.12g}")  # 1 - 0.7 is 0.30000000000000004

    def readers(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Yields every node that reads the mask, with the name it reads it by."""
        yield from ((user, self.mask) for user in self.mask.users)
        if self.overwritten is not None:
            yield from ((u, self.overwritten) for u in self.overwritten.users if self.mask < u)


DRAWS: Final = frozenset(("bernoulli", "bernoulli_", "rand", "rand_like", "uniform_"))
"""Names of the functions that masks are made with."""

# name -> whether the mask is 1 where the random number is below the constant
_COMPARISONS: Final = {
    **dict.fromkeys(("lt", "le", "less", "less_equal"), True),
    **dict.fromkeys(("gt", "ge", "greater", "greater_equal"), False),
}


def match_hand_mask(node: fx.Node) -> HandMask | LeftAlone | None:
    """Returns the mask that ``node`` draws, None where it draws none.

    1. The probability is a constant.
    2. A random number that is compared has no other reader.
    3. What is overwritten in place is a new tensor that nobody has read before.
    4. Random numbers that are never compared are no mask.

    Raises:
        DropoutRateError: the probability is a constant that is none.
    """
    name = op_name(node)
    if name not in DRAWS:
        return None
    found = _match_bernoulli(node, name) if "bernoulli" in name else _match_rand(node, name)
    if not isinstance(found, HandMask):
        return found
    if node.kwargs.get("generator") is not None or "out" in node.kwargs:
        return refuse(found, "it is drawn from a generator, or into a tensor, of its own")
    return found


def refuse(found: HandMask, detail: str) -> LeftAlone:
    """Returns ``found`` as a dropout that stays as it is."""
    return _refuse(found.draw, found.kind, found.p, found.mask, detail)


def _refuse(draw: fx.Node, kind: str, p: float, mask: fx.Node, detail: str) -> LeftAlone:
    shape = static_shape(tensor_of(mask))
    return LeftAlone(draw, kind, p, shape, Reason.HAND_MASK, detail)


def _match_bernoulli(node: fx.Node, name: str) -> HandMask | LeftAlone | None:
    like = argument(node, 0, "input")
    default = 0.5 if name == "bernoulli_" else None
    given = argument(node, 1, "p", default)
    q = number(like if given is None else given)
    if q is None:
        return _refuse(node, name, math.nan, node, "its probability is not a constant")
    if not 0 <= q <= 1:
        raise DropoutRateError.no_probability(q)
    if name == "bernoulli":
        return HandMask(node, name, node, None, like, q)
    if not _is_unread(like, node):
        return _refuse(node, name, 1 - q, node, "it overwrites a tensor with another use")
    return HandMask(node, name, node, like, like, q)


def _is_unread(tensor: fx.Node, writer: fx.Node) -> bool:
    return is_fresh(tensor) and all(user is writer or writer < user for user in tensor.users)


def _match_rand(node: fx.Node, name: str) -> HandMask | LeftAlone | None:
    low, high = 0.0, 1.0
    names = {node}  # the nodes that stand for the random numbers
    if name == "uniform_":
        low, high = argument(node, 1, "from", 0.0), argument(node, 2, "to", 1.0)
        if not isinstance(low, (int, float)) or not isinstance(high, (int, float)) or low >= high:
            return None
        names |= {node.all_input_nodes[0]}
    readers = [user for random in names for user in random.users if node < user]
    while len(readers) == 1 and _repeats_nothing(readers[0]):
        names = {readers[0]}
        readers = list(readers[0].users)
    mask = next((user for user in readers if _is_threshold(user)), None)
    if mask is None:
        return None
    if len(readers) > 1:
        return _refuse(node, name, math.nan, mask, "its random numbers have another reader")
    if name == "uniform_" and not _is_unread(node.all_input_nodes[0], node):
        return _refuse(node, name, math.nan, mask, "it overwrites a tensor with another use")
    left, right = _operands(mask)
    random, bound = (left, right) if left in names else (right, left)
    if not is_floating(random):
        return _refuse(node, name, math.nan, mask, "its random numbers are not floating-point")
    c = number(bound)
    if c is None:
        return _refuse(node, name, math.nan, mask, "its probability is not a constant")
    if op_name(mask) == "add":
        return _match_rounding(node, random, mask, c) if (low, high) == (0.0, 1.0) else None
    share = min(max((c - low) / (high - low), 0.0), 1.0)
    below = _COMPARISONS[op_name(mask)] == (random is left)
    return HandMask(node, name, mask, None, random, share if below else 1 - share)


def _repeats_nothing(node: fx.Node) -> bool:
    """Tells whether ``node`` has elements of its first argument, each once at most."""
    if op_name(node) != "getitem":
        return op_name(node) in CASTS | LAYOUTS
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(at is None or at is ... or isinstance(at, (int, slice)) for at in index)


def _operands(node: fx.Node) -> tuple[Any, Any]:
    return argument(node, 0, "input"), argument(node, 1, "other")


def _is_threshold(user: fx.Node) -> bool:
    if op_name(user) in _COMPARISONS:
        return "out" not in user.kwargs
    if op_name(user) != "add" or user.kwargs:
        return False
    return any(op_name(reader) in ("floor", "floor_") for reader in user.users)


def _match_rounding(
    node: fx.Node, random: fx.Node, total: fx.Node, q: float
) -> HandMask | LeftAlone | None:
    """Matches ``floor(q + rand)``, which is 1 with probability q."""
    if not 0 <= q <= 1:
        return None  # more values than zero and one
    floor = next(reader for reader in total.users if op_name(reader) in ("floor", "floor_"))
    inplace = op_name(floor) == "floor_"
    if any(user < floor or not inplace for user in total.users if user is not floor):
        detail = "its random numbers have another reader"
        return _refuse(node, op_name(node), 1 - q, floor, detail)
    return HandMask(node, op_name(node), floor, total if inplace else None, random, q)
