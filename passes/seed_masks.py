"""Draws one seed for every dropout of a graph, and emits the random bits that come of a seed.

    %seeds = ardd.draw_seeds(2, cpu)
    %seed = select(%seeds, 0, 1)
    %m = ardd.dropout_mask(%x, ..., 1)   =>   %m = ardd.dropout_mask(%x, ..., 1, %seed)

Backward reads the seeds that forward drew, 8 bytes a dropout; the bits are computed again wherever
they are needed.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils.checkpoint import CheckpointPolicy

from ..runtime.draw_seeds import draw_seeds
from ..runtime.random_bits import LANES, bits_in
from .emit import Emitter, fake_mode_of
from .relation import shape_of

aten = torch.ops.aten

_GIVEN: Final = ("placeholder", "get_attr")


def seed_masks(graph: fx.Graph, masks: Sequence[fx.Node], sites: Sequence[int]) -> None:
    """Gives every mask a seed as its last argument, in place.

    The i-th dropout has the i-th seed, whether or not a mask of it is left in this graph. A dropout
    with several masks, each a draw of its own, has more of them behind those of all dropouts.

    Args:
        graph: an ATen graph.
        masks: its mask nodes, in order.
        sites: the numbers of all marked dropouts, in program order.
    """
    slots: dict[int, int] = {number: slot for slot, number in enumerate(sites)}
    n_seeds = len(slots)
    places = []
    for mask in masks:
        number = mask.args[4]
        assert isinstance(number, int)
        place = slots.pop(number, None)
        if place is None:
            place, n_seeds = n_seeds, n_seeds + 1
        places.append(place)
    start = after_seeds(graph)
    device = masks[0].meta["val"].device
    emit = Emitter(graph, fake_mode_of(graph))
    with emit.marked(CheckpointPolicy.MUST_SAVE):  # checkpointing would draw them again
        seeds = emit.op(start, draw_seeds, n_seeds, device)
    for mask, place in zip(masks, places, strict=True):
        mask.args = (*mask.args[:5], emit.op(start, aten.select.int, seeds, 0, place))


def drop_unused_seeds(graph: fx.Graph) -> None:
    """Removes a draw that nothing reads, which else counts as an effect of the graph."""
    for node in reversed(graph.find_nodes(op="call_function", target=aten.select.int)):
        if not node.users and _is_draw(node.args[0]):
            graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=draw_seeds):
        if not node.users:
            graph.erase_node(node)


def after_seeds(graph: fx.Graph) -> fx.Node:
    """Returns the first node that is neither given to the graph nor draws its seeds."""
    nodes: Iterable[fx.Node] = graph.nodes
    return next(
        node
        for node in nodes
        if node.op not in _GIVEN
        and not _is_draw(node)
        and not (node.target is aten.select.int and _is_draw(node.args[0]))
    )


def _is_draw(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is draw_seeds


def bits_of_mask(emit: Emitter, mask: fx.Node, sizes: Sequence[Any]) -> fx.Node:
    """Emits the random bits of every element of a mask, before the mask.

    Args:
        emit: adds ops to the graph.
        mask: a mask with a seed.
        sizes: the mask's, as the emitter gives them.

    Returns:
        int32 of the mask's shape.
    """
    value = mask.meta["val"]
    shape = shape_of(mask)
    wide = not statically_known_true(value.numel() <= 2**31)
    last = shape[-1] if shape else 1
    return bits_in(  # type: ignore[no-any-return]
        functools.partial(emit.op, mask),
        mask.args[5],
        sizes,
        functools.partial(_product, emit, mask),
        value.device,
        # Where lanes are no part of what a loop runs over, they would cost divisions.
        by_lanes=isinstance(last, int) and last % LANES == 0 and value.is_contiguous(),
        wide=wide,
    )


def emit_bits(emit: Emitter, before: fx.Node, mask: fx.Node, sizes: list[int]) -> fx.Node:
    """Emits random bits of fixed sizes from the seed of a mask: int32 of shape ``sizes``."""
    op = functools.partial(emit.op, before)
    return bits_in(op, mask.args[5], sizes, math.prod, mask.meta["val"].device)  # type: ignore[no-any-return]


def _product(emit: Emitter, before: fx.Node, sizes: Sequence[Any]) -> Any:
    """Returns the product of sizes, as a node where one is symbolic."""
    symbolic = [size for size in sizes if isinstance(size, fx.Node)]
    product: Any = int(math.prod(size for size in sizes if not isinstance(size, fx.Node)))
    for size in symbolic:
        product = emit.op(before, operator.mul, size, product)
    return product
