"""Defers dropout: the forward keeps everything, and what is saved for backward is dropped.

%mask = ardd.dropout_mask(%x, ...)
%y = mul(%x, %mask)                  =>   %x, marked with the rate
%z = mm(%y, %w)                           %z = mm(%x, %w)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from .classify_saves import same_values
from .emit import Emitter, fake_mode_of

aten = torch.ops.aten

_RATE = "ardd_deferred"


def defer_masks(graph: fx.Graph, masks: Iterable[fx.Node]) -> None:
    """Takes masks out of products, in place, and marks what they were to drop.

    `lower_random_masks` removes the masks, and makes constants of those that are read elsewhere.

    Park et al. 2021, "Deferred Dropout", https://doi.org/10.1109/ICCAD51958.2021.9643433. The
    values dropped are the smallest, and so no draw is needed.
    """
    emit = Emitter(graph, fake_mode_of(graph))
    for mask in masks:
        like, shared, p, mean, site = mask.args
        for user in list(mask.users):
            other: Any = next((x for x in user.all_input_nodes if x is not mask), None)
            if user.target is aten.mul.Tensor and other is not None and _alike(user, other):
                other.meta[_RATE] = p
                kept = other if mean == 1.0 else emit.op(user, aten.mul.Tensor, other, mean)
                user.replace_all_uses_with(kept)
                graph.erase_node(user)
        mask.args = (like, shared, 0.0, mean, site)  # where it stays, it drops nothing


def deferred_rate(node: fx.Node) -> float | None:
    """Returns the rate that the values of a tensor were marked with, None where they were not."""
    rates = (source.meta[_RATE] for source in same_values(node) if _RATE in source.meta)
    return next(rates, None)


def _alike(product: fx.Node, factor: fx.Node) -> bool:
    a, b = product.meta["val"], factor.meta["val"]
    return bool(a.dtype == b.dtype and a.shape == b.shape)
