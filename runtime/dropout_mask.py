"""The op that marks a dropout: a random mask that carries its rate and its site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def draw_mask(like: Tensor, shared_dims: Sequence[int], p: float, mean: float, site: int) -> Tensor:
    """Draws the mask of one dropout, every element on its own: the definition of the op.

    ``y = dropout(x, 0.5)`` becomes ``y = x * ardd::dropout_mask(x, [], 0.5, 1.0, site)``. The
    passes replace every marker by what they decided on; run as it is, it gives the dropout that
    the user wrote.

    Args:
        like: ``[...]``, any floating dtype. Only its shape, dtype, device and layout are read.
        shared_dims: Dimensions along which one draw is shared; the mask has size 1 there.
        p: Probability of a zero, in ``[0, 1)``.
        mean: Expectation of every element: 1 for a dropout, ``1 - p`` for a mask of zeros and ones.
        site: Number of the dropout in its graph.

    Returns:
        The mask, shape and dtype of ``like`` but for ``shared_dims``: 0 with probability ``p``,
        else ``mean / (1 - p)``. It never requires grad.
    """
    return _empty_mask(like, shared_dims).bernoulli_(1.0 - p).mul_(mean / (1.0 - p))


def _empty_mask(like: Tensor, shared_dims: Sequence[int]) -> Tensor:
    if not shared_dims:
        return torch.empty_like(like, requires_grad=False)  # the strides of x * mask are x's
    shared = {dim % like.dim() for dim in shared_dims}
    shape = [1 if dim in shared else size for dim, size in enumerate(like.shape)]
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _fake(like: Tensor, shared_dims: Sequence[int], p: float, mean: float, site: int) -> Tensor:
    return _empty_mask(like, shared_dims)


_library: Any = torch.library  # untyped
_LIB = _library.Library("ardd", "FRAGMENT")
_LIB.define(
    "dropout_mask(Tensor like, int[] shared_dims, float p, float mean, int site) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)
_LIB.impl("dropout_mask", draw_mask, "CompositeExplicitAutograd")
# No formula is needed: the mask does not depend on the values of `like`. Falling through (rather
# than having no kernel at all) keeps autograd from warning about a missing one.
_LIB.impl("dropout_mask", _library.fallthrough_kernel, "Autograd")
_library.register_fake("ardd::dropout_mask", _fake, lib=_LIB)

dropout_mask = torch.ops.ardd.dropout_mask.default
"""``dropout_mask(like, shared_dims, p, mean, site) -> mask``, see ``draw_mask``."""
