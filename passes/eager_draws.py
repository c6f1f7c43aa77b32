"""Draws the masks of eager mode, where Inductor is asked for them."""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from .emit import Emitter

aten = torch.ops.aten


def keeps_eager_masks() -> bool:
    """Returns whether Inductor is asked to draw what eager mode would, here as anywhere."""
    from torch._inductor import config

    return bool(config.fallback_random)


def eager_draw(emit: Emitter, mask: fx.Node, like: fx.Node, p: float) -> fx.Node:
    """Draws as torch's own dropout does in eager mode: 0 is dropped."""
    value = mask.meta["val"]
    sizes = emit.sizes(mask, mask, like)
    options = {"dtype": value.dtype, "device": value.device}
    shape = emit.op(mask, aten.empty.memory_format, sizes, **options)
    with emit.marked(CheckpointPolicy.MUST_SAVE):
        if value.device.type == "cpu" or mask.args[1]:  # whole channels have no kernel of their own
            return emit.op(mask, aten.bernoulli.p, shape, 1.0 - p)
        pair = emit.op(mask, aten.native_dropout.default, shape, p, True)
        return emit.op(mask, operator.getitem, pair, 1)
