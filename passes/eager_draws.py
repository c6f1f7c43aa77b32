"""Draws the masks of eager mode, where Inductor is asked for them."""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from .cut_graphs import size_hint
from .emit import Emitter

aten = torch.ops.aten


def keeps_eager_masks() -> bool:
    """Returns whether Inductor is asked to draw what eager mode would, here as anywhere."""
    from torch._inductor import config

    return bool(config.fallback_random)


def eager_draw(emit: Emitter, mask: fx.Node, like: fx.Node, p: float) -> fx.Node:
    """Draws as torch's own dropout does in eager mode: 0 is dropped.

    That is in the order in which elements lie in memory, and a new tensor is contiguous here.
    """
    value = mask.meta["val"]
    strides = [size_hint(stride) for stride in value.stride()]
    order = sorted(range(value.dim()), key=lambda dim: -strides[dim])
    sizes = emit.sizes(mask, mask, like)
    options = {"dtype": value.dtype, "device": value.device}
    shape = emit.op(mask, aten.empty.memory_format, [sizes[dim] for dim in order], **options)
    with emit.marked(CheckpointPolicy.MUST_SAVE):
        drawn = _draw(emit, mask, shape, p)
    if order == sorted(order):
        return drawn
    return emit.op(mask, aten.permute.default, drawn, [order.index(d) for d in range(len(order))])


def _draw(emit: Emitter, mask: fx.Node, shape: fx.Node, p: float) -> fx.Node:
    on_cpu = mask.meta["val"].device.type == "cpu"
    if on_cpu or mask.args[1]:  # whole channels have no kernel of their own
        return emit.op(mask, aten.bernoulli.p, shape, 1.0 - p)
    pair = emit.op(mask, aten.native_dropout.default, shape, p, True)
    return emit.op(mask, operator.getitem, pair, 1)
