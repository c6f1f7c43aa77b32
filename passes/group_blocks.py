"""Cuts tensors whose groups of rows have a kept set each, and puts them back."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .emit import Emitter
from .relation import shape_of

aten = torch.ops.aten


def by_blocks_of_groups(
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
    """Picks blocks along a dimension, others for every position of the first one.

        x [g, .., outer * n_from * unit, ..] -> [g, .., outer, n_from, unit, ..]
        gather(x, dim, index [g, 1.., n_to, 1..])  -> [g, .., outer * n_to * unit, ..]

    ``gather`` and not ``index``: the groups and the blocks are rarely neighbours, and ``index``
    would then move both to the front. Its index is a view without memory of its own.

    Args:
        emit: adds the ops.
        before: where to.
        x: the tensor, with the groups as its first dimension.
        dim: the dimension.
        n_from: blocks that it has, in each of its repetitions.
        n_to: blocks that it will have.
        unit: consecutive positions of a block.
        index: int64 ``[g, n_to]``: which block to put.
        inside: bool ``[g, n_to]``: 0 is put where it is False.
    """
    size = shape_of(x)[dim]
    sizes = emit.sizes(before, x)
    n_groups = sizes[0]
    outer: Any = size // (n_from * unit) if isinstance(size, int) else -1
    blocks = emit.view(before, x, [*sizes[:dim], outer, n_from, unit, *sizes[dim + 1 :]])
    place = dim + 1
    picked = emit.sizes(before, blocks)
    picked[place] = n_to
    aligned = [1] * len(picked)
    aligned[0], aligned[place] = n_groups, n_to
    where = emit.op(before, aten.view.default, index, aligned)
    where = emit.op(before, aten.expand.default, where, picked)
    y = emit.op(before, aten.gather.default, blocks, place, where)
    if inside is not None:
        condition = emit.op(before, aten.view.default, inside, aligned)
        value = y.meta["val"]
        zero = emit.op(
            before, aten.scalar_tensor.default, 0, dtype=value.dtype, device=value.device
        )
        y = emit.op(before, aten.where.self, condition, y, zero)
    merged = outer * n_to * unit if isinstance(size, int) else -1
    return emit.view(before, y, [*sizes[:dim], merged, *sizes[dim + 1 :]])
