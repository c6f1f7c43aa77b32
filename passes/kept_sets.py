"""Draws kept sets in the graph, and cuts tensors to them and back."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ..runtime.draw_blocks import draw_blocks
from ..runtime.draw_groups import draw_groups
from ..runtime.draw_rows import draw_rows
from ..runtime.draw_window import draw_window
from .emit import Emitter
from .facts import KeptAxis
from .group_blocks import by_blocks_of_groups
from .price_plan import Choice
from .relation import shape_of
from .seed_masks import emit_bits

aten = torch.ops.aten

DRAWS: Mapping[str, Any] = {
    "block": draw_blocks,
    "grouped": draw_groups,
    "row": draw_rows,
    "window": draw_window,
}
"""The op that draws the kept set, by pattern."""


def bits_needed(pattern: str, sizes: Sequence[Any]) -> list[int]:
    """Returns the shape of the bits that a draw of these sizes is a function of."""
    if pattern == "window":
        return [1]
    if pattern == "row":
        return [2, sum(sizes[1])]
    return list(sizes[:-1])


@dataclasses.dataclass
class KeptSet:
    """The nodes of one draw, all with ``[groups]`` in front where rows are grouped."""

    choice: Choice
    kept: fx.Node
    """int64 ``[n_kept]``: the blocks that stay."""
    slot: fx.Node
    """int64 ``[n_blocks]``: where a block is in ``kept``, -1 if it is dropped."""
    inside: fx.Node | None = None
    """bool ``[n_blocks]``: whether the block stays."""
    clamped: fx.Node | None = None
    """int64 ``[n_blocks]``: ``slot`` with 0 for dropped blocks."""


def draw(emit: Emitter, before: fx.Node, mask: fx.Node, choice: Choice) -> KeptSet:
    """Draws the kept set of a mask, once: backward reads what forward drew.

    Rows are gathered by index like all others. A strided view, [n / period, period][:, start] with
    the start on the device, is none for Inductor: a 0-dimensional index makes it wait for a number.
    """
    op = DRAWS[choice.pattern]
    n_kept = list(choice.counts) if choice.counts else choice.n_kept
    sizes: tuple[Any, ...] = (choice.n_blocks, n_kept)
    if choice.axis.groups > 1:
        sizes = (choice.axis.groups, *sizes)
    bits = emit_bits(emit, before, mask, bits_needed(choice.pattern, sizes))
    with emit.marked(CheckpointPolicy.MUST_SAVE):  # recomputed, they would be sorted again
        pair = emit.op(before, op, bits, *sizes, mask.args[4])
        kept = emit.op(before, operator.getitem, pair, 0)
        slot = emit.op(before, operator.getitem, pair, 1)
    return KeptSet(choice, kept, slot)


def gather(
    emit: Emitter, before: fx.Node, x: fx.Node, dim: int, axis: KeptAxis, kept: KeptSet
) -> fx.Node:
    """Cuts a dimension to the kept set.

    x [outer * n_blocks * unit] -> [outer, n_blocks, unit][:, kept] -> [outer * n_kept * unit]
    """
    unit = kept.choice.block * axis.inner
    if before.target is aten.convolution.default and len(shape_of(x)) == 1:
        return _bias_by_elements(emit, before, x, kept, unit)
    pick = by_blocks_of_groups if axis.groups > 1 else _by_blocks
    return pick(emit, before, x, dim, kept.choice.n_blocks, kept.choice.n_kept, unit, kept.kept)


def expand(
    emit: Emitter, before: fx.Node, x: fx.Node, dim: int, axis: KeptAxis, kept: KeptSet
) -> fx.Node:
    """Puts a cut dimension back, with zeros for what was dropped.

        where(slot >= 0, x [outer, n_kept, unit][:, max(slot, 0)], 0) -> [outer * n_blocks * unit]

    By an inverse map, so that it is one fused kernel without a zero fill and without atomics.
    """
    unit = kept.choice.block * axis.inner
    if kept.inside is None or kept.clamped is None:
        kept.inside = emit.op(before, aten.ge.Scalar, kept.slot, 0)
        kept.clamped = emit.op(before, aten.clamp_min.default, kept.slot, 0)
    pick = by_blocks_of_groups if axis.groups > 1 else _by_blocks
    return pick(
        emit,
        before,
        x,
        dim,
        kept.choice.n_kept,
        kept.choice.n_blocks,
        unit,
        kept.clamped,
        kept.inside,
    )


def _bias_by_elements(
    emit: Emitter, before: fx.Node, x: fx.Node, kept: KeptSet, unit: int
) -> fx.Node:
    """Cuts without a view: before torch 2.13 Inductor's convolution takes none as its bias."""
    device = x.meta["val"].device
    starts = emit.op(
        before, aten.mul.Tensor, emit.op(before, aten.unsqueeze.default, kept.kept, 1), unit
    )
    within = emit.op(
        before,
        torch.ops.prims.iota.default,
        unit,
        start=0,
        step=1,
        dtype=torch.int64,
        device=device,
        requires_grad=False,
    )
    index = emit.op(before, aten.add.Tensor, starts, within)
    index = emit.view(before, index, [kept.choice.n_kept * unit])
    return emit.op(before, aten.index.Tensor, x, [index])


def _by_blocks(
    emit: Emitter,
    before: fx.Node,
    x: fx.Node,
    dim: int,
    n_from: int,
    n_to: int,
    unit: int,
    index: fx.Node,
    inside: fx.Node | None = None,
) -> fx.Node:
    """Picks blocks ``index`` along a dimension, and puts 0 for those that are not ``inside``."""
    size = shape_of(x)[dim]
    sizes = emit.sizes(before, x)
    alone = isinstance(size, int) and size == n_from
    outer: list[Any] = []
    if not alone:
        whole = isinstance(size, int) and size == n_from * unit
        outer = [] if whole else [size // (n_from * unit) if isinstance(size, int) else -1]
        blocks = [*outer, n_from] + ([unit] if unit > 1 else [])
        x = emit.view(before, x, [*sizes[:dim], *blocks, *sizes[dim + 1 :]])
    place = dim + len(outer)
    y = emit.op(before, aten.index.Tensor, x, [*[None] * place, index])
    if inside is not None:
        trailing = len(shape_of(y)) - place - 1
        condition = emit.op(before, aten.view.default, inside, [n_to] + [1] * trailing)
        value = y.meta["val"]
        zero = emit.op(
            before, aten.scalar_tensor.default, 0, dtype=value.dtype, device=value.device
        )
        y = emit.op(before, aten.where.self, condition, y, zero)
    if alone:
        return y
    merged = (
        (outer[0] * n_to * unit if outer and isinstance(size, int) else -1)
        if outer
        else n_to * unit
    )
    return emit.view(before, y, [*sizes[:dim], merged, *sizes[dim + 1 :]])
