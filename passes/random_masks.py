"""Turns masks that stay random into a comparison of counter-based bits, which fuses into its users.

    %y = mul(%x, %mask)   =>   %y = mul(%x, where(ge(bits(%seed), threshold), 1 / (1 - p), 0))

The bits are a function of the seed and of the place of the element (`ardd.runtime.random_bits`), so
backward computes them again from the seed, and no mask is stored.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ..runtime.dropout_mask import dropout_mask, scale_of
from ..runtime.random_bits import threshold_of
from .eager_draws import eager_draw, keeps_eager_masks
from .emit import Emitter, fake_mode_of
from .seed_masks import bits_of_mask, drop_unused_seeds, seed_masks
from .settle_layouts import settled_layouts

aten, prims = torch.ops.aten, torch.ops.prims

SMALLEST_RATE: Final = 2.0**-33
"""Rates up to this round to 0 and drop nothing."""

_NARROW: Final = (torch.bfloat16, torch.float16)


def masks_in(graph: fx.Graph) -> list[fx.Node]:
    """Returns the mask nodes of a graph, in order."""
    return [node for node in graph.nodes if node.target is dropout_mask]


def lower_random_masks(graph: fx.Graph) -> None:
    """Replaces every mask that is left in the graph, in place."""
    masks = masks_in(graph)
    for mask in masks:
        if not mask.users:
            graph.erase_node(mask)
    masks = masks_in(graph)
    if masks:
        with settled_layouts(graph):
            unseeded = [mask for mask in masks if len(mask.args) < 6]
            if unseeded:
                seed_masks(graph, unseeded, ())
            _lower_all(graph, masks)
    drop_unused_seeds(graph)


def _lower_all(graph: fx.Graph, masks: list[fx.Node]) -> None:
    emit = Emitter(graph, fake_mode_of(graph))
    for mask in masks:
        like, _, p, mean, *_ = mask.args
        assert isinstance(like, fx.Node)
        assert isinstance(p, float)
        assert isinstance(mean, float)
        scale = scale_of(p, mean)
        value = mask.meta["val"]
        if p <= SMALLEST_RATE:
            sizes = emit.sizes(mask, mask, like)
            whole = emit.op(
                mask, aten.full.default, sizes, scale, dtype=value.dtype, device=value.device
            )
            mask.replace_all_uses_with(whole)
        else:
            _lower(emit, mask, like, p, scale)
        graph.erase_node(mask)
    graph.eliminate_dead_code()


def _lower(emit: Emitter, mask: fx.Node, like: fx.Node, p: float, scale: float) -> None:
    value = mask.meta["val"]

    def chosen(dtype: torch.dtype) -> fx.Node:
        numbers = (
            emit.op(mask, aten.scalar_tensor.default, x, dtype=dtype, device=value.device)
            for x in (scale, 0.0)
        )
        return emit.op(mask, aten.where.self, keep, *numbers)

    drawn = eager_draw(emit, mask, like, p) if keeps_eager_masks() else None
    # Read in backward, a size would keep the tensor that it is read from.
    sizes = emit.sizes(mask, mask, like) if drawn is None else []
    with emit.marked(CheckpointPolicy.MUST_RECOMPUTE):
        if drawn is not None:
            keep = emit.op(mask, aten.ne.Scalar, drawn, 0)
        else:
            keep = emit.op(mask, aten.ge.Scalar, bits_of_mask(emit, mask, sizes), threshold_of(p))
        narrow = value.dtype in _NARROW
        factor = chosen(torch.float32 if narrow else value.dtype)
        number = chosen(value.dtype) if narrow else factor
    for user in list(mask.users):
        other: Any = next((x for x in user.all_input_nodes if x is not mask), None)
        plain = user.target is aten.mul.Tensor and other is not None
        if narrow and plain and other.meta["val"].dtype == value.dtype:
            # 1 / (1 - p) rounded to bfloat16 would be off by up to 0.4 %, in every element.
            product = emit.op(user, aten.mul.Tensor, other, factor)
            result = emit.op(user, prims.convert_element_type.default, product, value.dtype)
            user.replace_all_uses_with(result)
            user.graph.erase_node(user)
        else:
            user.replace_input_with(mask, number)
