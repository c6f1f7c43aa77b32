"""Proves that a random mask of zeros and ones is used to drop: that in the end it multiplies."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Final

import torch
from torch import fx

from .dynamo_nodes import (
    CASTS,
    FACTORIES,
    LAYOUTS,
    SELECTIONS,
    argument,
    is_floating,
    is_inplace,
    number,
    op_name,
    tensor_of,
)
from .match_hand_masks import HandMask
from .sites import static_shape

_MULTIPLY: Final = frozenset(("mul", "multiply", "mul_", "multiply_", "imul"))
_DIVIDE: Final = frozenset(
    ("div", "divide", "true_divide", "truediv", "div_", "divide_", "true_divide_", "itruediv")
)
_NOT: Final = frozenset(("invert", "inv", "logical_not", "bitwise_not"))
_FILL: Final = frozenset(("masked_fill", "masked_fill_", "setitem"))
# A mask given to these only lends its shape, dtype or device.
_ASKS_SHAPE: Final = frozenset(
    ("size", "dim", "numel", "stride", "expand_as", "view_as", "reshape_as", "is_floating_point")
)
_ASKS_DTYPE: Final = frozenset(("type_as", "to", *(name for name in FACTORIES if "_" in name)))


@dataclasses.dataclass(frozen=True)
class MaskUses:
    """How a mask becomes a factor, every node in program order."""

    flipped: bool
    """Whether the factor is ``1 - mask``."""
    dtype: torch.dtype
    """Dtype of the factor: wide enough for every use."""
    flips: tuple[fx.Node, ...]
    """``~mask`` and ``1 - mask``: to be left out, as the factor is right already."""
    casts: tuple[fx.Node, ...]
    """Conversions of a boolean mask to floating-point numbers."""
    products: tuple[tuple[fx.Node, fx.Node], ...]
    """Products and quotients of a boolean mask, and the mask they read."""
    choices: tuple[tuple[fx.Node, fx.Node, fx.Node], ...]
    """``where``, ``masked_fill`` and the like, the mask they read, and what they choose from."""
    booleans: tuple[fx.Node, ...]
    """Views of a boolean mask, which become views of the factor."""
    factors: tuple[fx.Node, ...]
    """What is multiplied."""


class _NotProvenError(Exception):
    """The mask is used in a way that is not known to be a dropout."""


def prove_mask_uses(found: HandMask) -> MaskUses | str:
    """Follows ``found`` through the graph to the products that it becomes a factor of.

    A structured mask has the same zeros on average, but its ones are off by the factor that makes
    the average exact. Hence:

    1. Its values may be scaled, converted, viewed, expanded and selected from, then multiplied
       with data. The product is data: who reads it does not matter.
    2. A boolean mask may be negated, or choose between floating-point data and zero.
    3. All uses agree on whether a one keeps or drops.
    4. Nothing else reads it, the graph's caller included.

    Returns:
        The uses, or the first thing that stands against it.
    """
    proof = _Proof(found)
    try:
        return proof.run()
    except _NotProvenError as refusal:
        return str(refusal)


@dataclasses.dataclass(frozen=True)
class _Mask:
    """What is known of one tensor made from the mask."""

    boolean: bool
    flipped: bool = False
    scaled: bool = False


class _Proof:
    def __init__(self, found: HandMask) -> None:
        self.found = found
        self.masks: dict[fx.Node, _Mask] = {}
        self.parents: dict[fx.Node, fx.Node] = {}
        self.keeps: set[bool] = set()  # whether a factor is the mask (False) or 1 - mask (True)
        self.dtypes: list[torch.dtype] = []
        self.flips: list[fx.Node] = []
        self.casts: list[fx.Node] = []
        self.products: list[tuple[fx.Node, fx.Node]] = []
        self.choices: list[tuple[fx.Node, fx.Node, fx.Node]] = []
        self.booleans: list[fx.Node] = []
        self.factors: list[fx.Node] = []
        self.overwrites: list[fx.Node] = []
        self.negated = False  # whether 1 - mask was taken of floating-point numbers

    def run(self) -> MaskUses:
        value = tensor_of(self.found.mask)
        boolean = value is not None and value.dtype == torch.bool
        if not boolean and not is_floating(self.found.mask):
            raise _NotProvenError("the mask is neither boolean nor floating-point")
        root = self.masks[self.found.mask] = _Mask(boolean)
        if self.found.overwritten is not None:
            self.masks[self.found.overwritten] = root
        if not boolean:
            assert value is not None
            self.dtypes.append(value.dtype)
        queue = list(self.found.readers())
        while queue:
            queue.sort()  # in program order: whatever a node reads has been judged before it
            user, mask = queue.pop(0)
            if user not in self.masks and self._step(user, mask):
                queue += ((reader, user) for reader in user.users)
        self._conclude()
        dtype = self.dtypes[0]
        for other in self.dtypes:
            dtype = torch.promote_types(dtype, other)
        return MaskUses(
            flipped=self.keeps.pop(),
            dtype=dtype,
            flips=tuple(self.flips),
            casts=tuple(self.casts),
            products=tuple(self.products),
            choices=tuple(self.choices),
            booleans=tuple(self.booleans),
            factors=tuple(self.factors),
        )

    def _conclude(self) -> None:
        if not self.keeps:
            raise _NotProvenError("it is never multiplied with data")
        if len(self.keeps) > 1:
            raise _NotProvenError("it keeps in one place and drops in another")
        if self.overwrites and self.negated:
            raise _NotProvenError("it is overwritten, and subtracted from one")
        if not self.casts and not self.flips:
            return
        # A conversion or negation made a copy; the factor may be the very same tensor, so that
        # nobody else may read what is now scaled in place.
        for node in self.overwrites:
            source = self.parents[node]
            while source in self.parents:
                source = self.parents[source]
                if len(source.users) > 1:
                    raise _NotProvenError("it is overwritten and read elsewhere as well")

    def _step(self, user: fx.Node, node: fx.Node) -> bool:
        """Files the use of ``node`` by ``user``; tells whether ``user`` is a mask as well."""
        mask = self.masks[node]
        name = op_name(user)
        others = [arg for arg in user.all_input_nodes if arg is not node]
        first = bool(user.args) and user.args[0] is node
        if name in _ASKS_SHAPE and not (first and name.endswith("_as")):
            return False
        if name in _ASKS_DTYPE and (not first or name in FACTORIES):
            if mask.boolean:
                raise _NotProvenError(f"{name} takes its dtype")
            return False
        if any(arg in self.masks for arg in others):
            raise _NotProvenError(f"{_spelling(user)} reads it twice")
        if name in _MULTIPLY | _DIVIDE:
            return self._multiply(user, node, mask)
        if first and name in LAYOUTS | SELECTIONS:
            if mask.boolean:
                self.booleans.append(user)
            return self._follow(user, node, mask)
        if first and name in CASTS:
            return self._cast(user, node, mask)
        if self._negates(user, node, mask):
            self.flips.append(user)
            self.negated |= not mask.boolean
            return self._follow(user, node, dataclasses.replace(mask, flipped=not mask.flipped))
        if mask.boolean and (name == "where" or name in _FILL):
            self._choose(user, node, mask)
            return False
        raise _NotProvenError(f"{_spelling(user)} reads it")

    def _follow(self, user: fx.Node, node: fx.Node, mask: _Mask) -> bool:
        self.masks[user] = mask
        self.parents[user] = node
        return True

    def _cast(self, user: fx.Node, node: fx.Node, mask: _Mask) -> bool:
        value = tensor_of(user)
        if value is not None and mask.boolean and value.dtype == torch.bool:
            self.booleans.append(user)
            return self._follow(user, node, mask)
        if value is None or not value.dtype.is_floating_point:
            raise _NotProvenError("it is converted to integers or booleans")
        if mask.boolean:
            self.casts.append(user)
            self.dtypes.append(value.dtype)
        return self._follow(user, node, dataclasses.replace(mask, boolean=False))

    def _negates(self, user: fx.Node, node: fx.Node, mask: _Mask) -> bool:
        if mask.boolean:
            return op_name(user) in _NOT
        if mask.scaled or user.kwargs or len(user.args) != 2:
            return False
        if op_name(user) == "rsub":
            return user.args[0] is node and number(user.args[1]) == 1
        if op_name(user) not in ("sub", "subtract"):
            return False
        return user.args[1] is node and isinstance(user.args[0], (int, float)) and user.args[0] == 1

    def _multiply(self, user: fx.Node, node: fx.Node, mask: _Mask) -> bool:
        left, right = argument(user, 0, "input"), argument(user, 1, "other")
        other = right if left is node else left
        name = op_name(user)
        if name in _DIVIDE and (left is not node or user.kwargs.get("rounding_mode") is not None):
            raise _NotProvenError(f"{name} divides by it, or rounds")
        if not is_floating(user) or other is node:
            raise _NotProvenError(f"{name} does not make it a factor")
        is_scalar = tensor_of(other) is None or number(other) is not None
        if not is_scalar and not is_floating(other) and mask.boolean:
            raise _NotProvenError(f"{name} does not make it a factor of floating-point numbers")
        if is_inplace(user) and left is node:
            if mask.boolean or not is_scalar:
                raise _NotProvenError(f"{name} overwrites it")
            self.overwrites.append(user)
        if mask.boolean:
            value = tensor_of(user)
            assert value is not None
            self.products.append((user, node))
            self.dtypes.append(value.dtype)
        if is_scalar or not _is_data(other):
            return self._follow(user, node, _Mask(False, mask.flipped, scaled=True))
        self._end(mask.flipped, other)
        return False

    def _choose(self, user: fx.Node, node: fx.Node, mask: _Mask) -> None:
        """Files a choice between data and zero."""
        kept, dropped = _branches(user, node)
        flipped = mask.flipped
        if number(dropped) != 0:
            kept, dropped, flipped = dropped, kept, not flipped
        result = tensor_of(kept if op_name(user) == "setitem" else user)
        data = tensor_of(kept)
        zero = number(dropped)
        if (
            zero != 0
            or math.copysign(1, zero) < 0
            or not is_floating(kept)
            or data is None
            or result is None
        ):
            raise _NotProvenError(f"{op_name(user)} does not choose between data and zero")
        # Compared as text: comparing symbolic sizes would add guards to the user's graph.
        shapes = [static_shape(data), static_shape(tensor_of(node))]
        if op_name(user) == "setitem":
            fits = shapes[0] == shapes[1]  # else the mask indexes rows
        else:
            fits = static_shape(result) in shapes
        if not fits or result.dtype != data.dtype:
            raise _NotProvenError(f"{op_name(user)} changes the shape or the dtype of the data")
        if not _is_data(kept):
            raise _NotProvenError(f"{op_name(user)} does not multiply data")
        self.choices.append((user, node, kept))
        self.dtypes.append(data.dtype)
        self._end(flipped, kept)

    def _end(self, flipped: bool, factor: fx.Node) -> None:
        self.keeps.add(flipped)
        self.factors.append(factor)


def _branches(user: fx.Node, node: fx.Node) -> tuple[Any, Any]:
    """Returns what ``user`` gives where the mask ``node`` is true, and where it is false."""
    if op_name(user) in _FILL:  # x.masked_fill(mask, value), x[mask] = value
        x, mask, value = (argument(user, i, n) for i, n in enumerate(("input", "mask", "value")))
        branches = value, x
    elif user.op == "call_method" or user.target is torch.Tensor.where:  # x.where(mask, other)
        x, mask, other = (argument(user, i, n) for i, n in enumerate(("x", "condition", "other")))
        branches = x, other
    else:
        mask = argument(user, 0, "condition")
        branches = argument(user, 1, "input"), argument(user, 2, "other")
    if mask is not node:
        raise _NotProvenError(f"{op_name(user)} chooses it")
    return branches


def _spelling(user: fx.Node) -> str:
    if user.op == "output":
        return "the caller of the graph"
    return op_name(user) or str(getattr(user.target, "__name__", user.target))


def _is_data(node: fx.Node) -> bool:
    """Tells whether ``node`` is made from a floating-point input of the graph.

    A product of two masks, or of a mask and a padding mask, is a mask still.
    """
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        at = stack.pop()
        if at in seen or op_name(at) in FACTORIES:
            continue  # a tensor given to `zeros_like(x)` lends no data
        seen.add(at)
        if at.op in ("placeholder", "get_attr") and is_floating(at):
            return True
        stack += at.all_input_nodes
    return False
