"""Defers dropout: the forward keeps everything, and what is saved for backward is dropped.

%mask = ardd.dropout_mask(%x, ...)
%y = mul(%x, %mask)                  =>   %x, marked with the rate
%z = mm(%y, %w)                           %z = mm(%x, %w)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import fx

from .classify_saves import WEIGHT_GRADIENT, is_comparison, readers, same_values, use_of

aten = torch.ops.aten

_RATE = "ardd_deferred"


def defer_masks(graph: fx.Graph, masks: Iterable[fx.Node]) -> None:
    """Takes masks that `can_defer` allows out of products, in place, and marks what they drop.

    `lower_random_masks` removes the masks, and makes constants of those that are read elsewhere.

    Park et al. 2021, "Deferred Dropout", https://doi.org/10.1109/ICCAD51958.2021.9643433. The
    values dropped are the smallest, and so no draw is needed.
    """
    for mask in masks:
        _, _, p, *_ = mask.args
        for user in list(mask.users):
            other: Any = next((x for x in user.all_input_nodes if x is not mask), None)
            if user.target is aten.mul.Tensor and other is not None and _alike(user, other):
                other.meta[_RATE] = p
                user.replace_all_uses_with(other)
                graph.erase_node(user)
        mask.update_arg(2, 0.0)  # where it stays, it drops nothing


def can_defer(mask: fx.Node, forward: Collection[fx.Node], grads: Collection[fx.Node]) -> bool:
    """Returns whether what a mask drops can be dropped from saves, and nothing else is.

    All that backward does with the product of tensor and mask has to be weight gradients, the
    tensor has to be read for that product alone, and to be no input, which nobody saves.

    Args:
        mask: a mask of the joint graph.
        forward: the nodes of the forward.
        grads: the nodes that are gradients of parameters and of nothing else.
    """
    mean = mask.args[3]
    products = [user for user in mask.users if user in forward]
    if mean != 1.0 or not products:
        return False
    for product in products:
        other: Any = next((x for x in product.all_input_nodes if x is not mask), None)
        if product.target is not aten.mul.Tensor or other is None or not _alike(product, other):
            return False
        source = list(same_values(other))[-1]
        others = {user for _, user in readers(source) if user in forward} - {product, mask}
        others = {user for user in others if not is_comparison(user)}  # signs are kept apart
        if source.op == "placeholder" or others:
            return False
        later = [(v, user) for v, user in readers(product) if user not in forward]
        if {use_of(v, user, grads) for v, user in later} != {WEIGHT_GRADIENT}:
            return False
    return True


def deferred_rate(node: fx.Node) -> float | None:
    """Returns the rate that the values of a tensor were marked with, None where they were not."""
    rates = (source.meta[_RATE] for source in same_values(node) if _RATE in source.meta)
    return next(rates, None)


def _alike(product: fx.Node, factor: fx.Node) -> bool:
    a, b = product.meta["val"], factor.meta["val"]
    return bool(a.dtype == b.dtype and a.shape == b.shape)
