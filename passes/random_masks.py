"""Turns masks that stay random into what Inductor's own decomposition of dropout gives.

Forward:   mul(%x, %mask)  ->  mul(mul(gt(rand, p), %x), scale)
Backward:  mul(%g, %mask)  ->  mul(%g, mul(convert(gt), scale))

The very form, so that Inductor's low-memory seeds and attention fusion work as if ardd were not
there.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from ..runtime.dropout_mask import dropout_mask
from .emit import Emitter, fake_mode_of
from .feature_dims import forward_nodes
from .settle_layouts import settled_layouts

aten, prims = torch.ops.aten, torch.ops.prims

SMALLEST_RATE = 2.0**-25
"""Smaller rates drop nothing: a float32 ``1 - p`` is 1."""


def masks_in(graph: fx.Graph) -> list[fx.Node]:
    """Returns the mask nodes of a graph, in order."""
    return [node for node in graph.nodes if node.target is dropout_mask]


def lower_random_masks(graph: fx.Graph) -> None:
    """Replaces every mask that is left in the graph, in place."""
    masks = masks_in(graph)
    if not masks:
        return
    with settled_layouts(graph):
        _lower_all(graph, masks)


def _lower_all(graph: fx.Graph, masks: list[fx.Node]) -> None:
    emit = Emitter(graph, fake_mode_of(graph))
    forward = set(forward_nodes(graph))
    for mask in masks:
        if not mask.users:
            graph.erase_node(mask)
            continue
        like, _, p, mean, _ = mask.args
        assert isinstance(like, fx.Node)
        assert isinstance(p, float)
        assert isinstance(mean, float)
        scale = mean / (1.0 - p)
        value = mask.meta["val"]
        if p < SMALLEST_RATE:
            sizes = emit.sizes(mask, mask, like)
            whole = emit.op(
                mask, aten.full.default, sizes, scale, dtype=value.dtype, device=value.device
            )
            mask.replace_all_uses_with(whole)
        else:
            _lower(emit, mask, like, p, scale, forward)
        graph.erase_node(mask)
    graph.eliminate_dead_code()


def _lower(
    emit: Emitter,
    mask: fx.Node,
    like: fx.Node,
    p: float,
    scale: float,
    forward: Collection[fx.Node],
) -> None:
    value = mask.meta["val"]
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    random = emit.op(
        mask, aten.rand.default, emit.sizes(mask, mask, like), dtype=dtype, device=value.device
    )
    keep = emit.op(mask, aten.gt.Scalar, random, p)
    for user in list(mask.users):
        other: Any = next((x for x in user.all_input_nodes if x is not mask), None)
        plain = user.target is aten.mul.Tensor and other is not None
        if plain and user in forward and other.meta["val"].dtype == value.dtype:
            kept = emit.op(user, aten.mul.Tensor, keep, other)
            result = emit.op(user, aten.mul.Tensor, kept, scale) if scale != 1.0 else kept
            user.replace_all_uses_with(result)
            user.graph.erase_node(user)
        else:
            user.replace_input_with(mask, _as_number(emit, user, keep, scale, value.dtype))


def _as_number(
    emit: Emitter, before: fx.Node, keep: fx.Node, scale: float, dtype: torch.dtype
) -> fx.Node:
    number = emit.op(before, prims.convert_element_type.default, keep, dtype)
    return emit.op(before, aten.mul.Tensor, number, scale) if scale != 1.0 else number
