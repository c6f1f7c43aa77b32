"""What is known of every saved tensor: who made it, what it is used for, how it may be encoded."""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx

from ..core.options import Options
from ..core.saves import SavedTensor, SaveReason
from ..runtime.codec import Codec
from ..runtime.pack_bits import PackBits
from ..runtime.quantize_groups import QuantizeGroups
from ..runtime.token_rows import TokenRows
from .classify_saves import (
    INDEX,
    MASK,
    SIGN,
    SOFTMAX,
    is_comparison,
    never_negative,
    readers,
    uses_of,
)
from .cut_graphs import Cut, bytes_of, root_of
from .defer_dropout import deferred_rate
from .encode_saves import contractions
from .plan_saves import BY_FEATURE, ROUNDING, SaveFacts, exact_codec, lossy_codecs
from .program_inputs import results_only_at
from .relation import shape_of
from .save_layout import RowLayout, row_layout
from .sites import module_path, static_shape
from .smooth_uses import ErrorGrowth, may_hold_huge_values

aten = torch.ops.aten

SMALLEST_BYTES = 256
"""Smaller tensors are saved as they are."""


_BITS = (1024, 128)
"""Rows of bits: they are packed in eight runs, that have to be whole vectors."""


@dataclasses.dataclass(frozen=True)
class Pin:
    """A comparison with a number, of what backward computes again."""

    comparison: fx.Node
    """In the backward."""
    operand: fx.Node
    """What it compares, in the forward."""
    layout: RowLayout
    """The rows of that."""

    @property
    def bytes(self) -> int:
        """Bytes of its results, one bit for each."""
        return _bytes_of_bits(self.operand, self.layout.row)


@dataclasses.dataclass
class Save:
    """One saved tensor while its fate is decided."""

    node: fx.Node
    """In the forward."""
    given: fx.Node
    """In the backward."""
    uses: tuple[str, ...]
    """What backward uses it for."""
    bytes: int
    """Bytes that stay allocated for it: those of the tensor that it is a view of."""
    reason: SaveReason = SaveReason.EXACT_ONLY
    """Why it stays as it is, if it does."""
    layout: RowLayout | None = None
    """Its rows; None, as what follows, where it cannot be encoded at all."""
    facts: SaveFacts | None = None
    """What an encoding has to know."""
    exact: Codec | None = None
    """The encoding that loses nothing."""
    ladder: list[Codec | TokenRows] = dataclasses.field(default_factory=list)
    """The encodings that lose something, by rising error."""
    chosen: Codec | TokenRows | None = None
    """The encoding that it gets."""
    pins: list[Pin] = dataclasses.field(default_factory=list)
    """Comparisons that depend on it, and have to be saved apart if it is encoded with a loss."""

    def bytes_with(self, codec: Codec | TokenRows | None) -> int:
        """Returns the bytes of an encoding, with the signs that it does not hold."""
        if codec is None:
            return self.bytes
        assert self.facts is not None
        row, dtype = self.facts.row, self.facts.dtype
        if isinstance(codec, TokenRows):
            total = codec.payload_bytes(row, dtype)
        else:
            total = bytes_of(self.node) // (row * dtype.itemsize) * codec.row_bytes(row, dtype)
        if not codec.exact:
            total += sum(pin.bytes for pin in self.pins)
        return total + (self.sign_bytes if SIGN in self.uses and not keeps_sign(codec) else 0)

    @property
    def exact_bytes(self) -> int:
        """Bytes without any loss."""
        return self.sign_bytes if self.only_signs else self.bytes_with(self.exact)

    @property
    def only_signs(self) -> bool:
        """Whether nothing but its comparisons is wanted, and they can be saved instead."""
        alone = self.facts is not None and self.facts.uses == (SIGN,)
        return alone and self.sign_bytes < self.bytes

    @property
    def sign_bytes(self) -> int:
        """Bytes of the comparisons, one bit for each."""
        assert self.facts is not None
        compared = {(u.target, u.args[1]) for _, u in comparisons(self.given)}
        return len(compared) * _bytes_of_bits(self.node, self.facts.row)

    def row(self, encoding: str, after: int, reason: SaveReason, *, exact: bool) -> SavedTensor:
        """Returns the row of the report."""
        return saved_row(self.node, self.uses, self.bytes, after, encoding, reason, exact=exact)


def describe_saves(cut: Cut, options: Options) -> list[Save]:
    """Returns what is known of everything that a cut saves."""
    kept = cut.returned
    shared = Counter(root_of(node) for node, _ in cut.saves())
    grads, seen = results_only_at(cut.backward.graph, cut.parameter_grads), set()
    pins = _pins(cut) if options.saves in ROUNDING else {}
    growth = ErrorGrowth(pins)
    saves = []
    for node, given in cut.saves():
        root = root_of(node)
        save = Save(
            node, given, uses_of(given, grads, growth), 0 if root in seen else bytes_of(root)
        )
        seen.add(root)
        saves.append(save)
        if root.op == "placeholder":
            save.bytes, save.reason = 0, SaveReason.NO_BYTES
        elif root in kept:
            save.bytes, save.reason = 0, SaveReason.USER_OUTPUT
        elif shared[root] > 1:
            save.reason = SaveReason.SAME_STORAGE  # encoding one would free nothing
        elif save.bytes < SMALLEST_BYTES:
            save.reason = SaveReason.SMALL
        else:
            save.pins = _pins_after(given, pins)
            _add_facts(save, options, cut.parameters)
    return saves


def _add_facts(save: Save, options: Options, parameters: Collection[fx.Node]) -> None:
    value = save.node.meta["val"]
    shortest, multiple = _BITS if set(save.uses) <= {MASK, SIGN} else (64, 64)
    deferred = deferred_rate(save.node)
    if options.saves in BY_FEATURE or deferred is not None:
        shortest, multiple = 1, 1  # these choose among the features of each token
    save.layout = row_layout(value, shortest, multiple)
    if save.layout is None:
        shared = any(isinstance(s, int) and s == 0 for s in value.stride())
        save.reason = SaveReason.OVERLAPPING if shared else SaveReason.DYNAMIC
        return
    if any(user.target is aten.as_strided.default for user in save.given.users):
        save.layout, save.reason = None, SaveReason.USE  # it reads memory, not elements
        return
    compared = comparisons(save.given)
    direct = all(read is save.given for read, _ in compared)
    tokens = shape_of(save.node)[0]
    matrix = len(shape_of(save.node)) == 2 and save.layout.order == (0, 1)
    rows = matrix and isinstance(tokens, int) and contractions(save.given) is not None
    with_zero = bool(compared) and all(_with_zero(user) for _, user in compared)
    save.facts = SaveFacts(
        uses=save.uses if direct or SIGN not in save.uses else ("a comparison",),
        dtype=value.dtype,
        row=save.layout.row,
        tokens=tokens if rows and isinstance(tokens, int) else None,
        largest=_largest_index(root_of(save.node)) if save.uses == (INDEX,) else None,
        deferred=deferred,
        sign=direct and with_zero and never_negative(save.node),
    )
    exact = exact_codec(save.facts)
    save.exact = exact if exact and save.bytes_with(exact) < save.bytes else None
    allowed = lossy_codecs(save.facts, options)
    save.ladder = [
        codec
        for codec in allowed
        if codec.refusal(value.dtype, save.layout.row) is None
        and save.bytes_with(codec) < save.bytes
    ]
    if options.saves != "exact":
        refused = SaveReason.UNSUPPORTED if allowed else SaveReason.USE
        save.reason = SaveReason.BUDGET if save.ladder else refused
    # An error in those depends on the values, not on what they are used for.
    softmax = SOFTMAX in save.uses  # where the user's own mask may be added
    if save.ladder and may_hold_huge_values(save.node, from_inputs=softmax):
        save.ladder, save.reason = [], SaveReason.HUGE_VALUES
    elif save.ladder and _made_of(save.node, parameters):
        save.ladder, save.reason = [], SaveReason.PARAMETERS


def _pins(cut: Cut) -> dict[fx.Node, Pin]:
    """Returns the comparisons with a number of what backward computes again."""
    pins = {}
    direct = {comparison for _, given in cut.saves() for _, comparison in comparisons(given)}
    for node in cut.backward.graph.nodes:
        if is_comparison(node) and node not in direct:
            compared = node.args[0]
            while compared.target in (aten.alias.default, aten.detach.default):
                compared = compared.args[0]
            operand = cut.twins.get(compared)
            layout = row_layout(operand.meta["val"], *_BITS) if operand else None
            if operand and layout:
                pins[node] = Pin(node, operand, layout)
    return pins


def _pins_after(given: fx.Node, pins: Mapping[fx.Node, Pin]) -> list[Pin]:
    """Returns the comparisons that depend on an input of the backward through no other one."""
    found, stack, seen = [], [given], {given}
    while stack:
        for user in stack.pop().users:
            if user in pins and user not in seen:
                found.append(pins[user])
            elif user not in seen:
                stack.append(user)
            seen.add(user)
    return found


def _made_of(node: fx.Node, parameters: Collection[fx.Node]) -> bool:
    """Returns whether no data is in a tensor: a weight in another type, or one made of others."""
    stack, seen = [node], {node}
    while stack:
        at = stack.pop()
        if at.op == "placeholder" and at not in parameters:
            return False
        new = [source for source in at.all_input_nodes if source not in seen]
        seen.update(new)
        stack.extend(new)
    return True


def _bytes_of_bits(node: fx.Node, row: int) -> int:
    """Returns the bytes of one bit for every element of a tensor, packed in rows."""
    elements = bytes_of(node) // node.meta["val"].element_size()
    return int(elements // row * PackBits().row_bytes(row, torch.bool))


def keeps_sign(codec: Codec | TokenRows) -> bool:
    """Returns whether what is decoded is above 0 exactly where the tensor was."""
    return isinstance(codec, QuantizeGroups) and codec.sign


def comparisons(given: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Returns what of an input of the backward is compared with a number, and the comparison."""
    return [(read, user) for read, user in readers(given) if is_comparison(user)]


def _with_zero(comparison: fx.Node) -> bool:
    number: object = comparison.args[1]
    return comparison.target in (aten.le.Scalar, aten.gt.Scalar) and bool(number == 0)


_INDICES_ALONG_SECOND = {
    *(aten.max.dim, aten.min.dim, aten.sort.default, aten.argmax.default, aten.median.dim),
    *(aten.nanmedian.dim, aten.mode.default, aten.cummax.default, aten.cummin.default),
}


def _largest_index(node: fx.Node) -> int | None:
    """Returns the largest index that a reduction can give, None where it is not known."""
    source: Any = node
    if node.target is operator.getitem:
        source = node.args[0]
        if node.args[1] != 1:
            return None
    args = source.args
    if source.target in _INDICES_ALONG_SECOND:
        bound = _size_along(args[0], args[1] if len(args) > 1 else -1)
    elif source.target in (aten.topk.default, aten.kthvalue.default):
        bound = _size_along(args[0], args[2] if len(args) > 2 else -1)
    else:
        return None
    return bound - 1 if isinstance(bound, int) else None


def _size_along(x: fx.Node, dim: int | None) -> int | torch.SymInt | None:
    return None if dim is None else shape_of(x)[dim]


def saved_row(
    node: fx.Node,
    uses: tuple[str, ...],
    before: int,
    after: int,
    encoding: str,
    reason: SaveReason,
    *,
    exact: bool,
) -> SavedTensor:
    """Returns the row of the report for a tensor."""
    value = node.meta["val"]
    return SavedTensor(
        name=node.name,
        op=str(root_of(node).target).replace("<built-in function getitem>", "getitem"),
        module=module_path(node),
        uses=uses,
        shape=static_shape(value),
        dtype=str(value.dtype).removeprefix("torch."),
        bytes_before=before,
        bytes_after=after,
        encoding=encoding,
        exact=exact,
        reason=reason,
    )
