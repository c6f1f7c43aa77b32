"""The op that marks a dropout: a random mask that carries its rate and its site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_current_functorch_interpreter

from .draw_seeds import draw_seeds
from .random_bits import bits_like, threshold_of


def scale_of(p: float, mean: float) -> float:
    """Returns the number that a mask has where it is not 0: ``mean / (1 - p)``.

    Args:
        p: Probability of a zero, in ``[0, 1)``.
        mean: Expectation of the mask.
    """
    # A mask of zeros and ones has ones, though 1 / 3 and 1 - 2 / 3 are not equal and rates are
    # rounded to 12 digits. A dropout, whose mean is 1, has the scale that its rate gives.
    if mean != 1.0 and abs(mean - (1.0 - p)) < 1e-12:
        return 1.0
    return mean / (1.0 - p)


def draw_mask(
    like: Tensor,
    shared_dims: Sequence[int],
    p: float,
    mean: float,
    site: int,
    seed: Tensor | None = None,
) -> Tensor:
    """Draws the mask of one dropout, every element on its own: the definition of the op.

    ``y = dropout(x, 0.5)`` becomes ``y = x * ardd::dropout_mask(x, [], 0.5, 1.0, site)``. The
    passes replace every marker by what they decided on; run as it is, it gives the dropout that
    the user wrote. Element i, in row-major order, is 0 where ``bits(seed, i)`` is below the
    threshold of p (``random_bits.py``).

    Args:
        like: ``[...]``, any floating dtype. Only its shape, dtype, device and layout are read.
        shared_dims: Dimensions along which one draw is shared; the mask has size 1 there.
        p: Probability of a zero, in ``[0, 1)``; rounded to a multiple of 2**-32.
        mean: Expectation of every element: 1 for a dropout, ``1 - p`` for a mask of zeros and ones.
        site: Number of the dropout in its graph.
        seed: int32 ``[2]``; None draws one from torch's default generator of the device.

    Returns:
        The mask, shape and dtype of ``like`` but for ``shared_dims``: 0 with probability ``p``,
        else ``mean / (1 - p)``. It never requires grad.
    """
    mask = _empty_mask(like, shared_dims)
    if seed is None:
        seed = draw_seeds(1, mask.device)[0]
    keep = bits_like(seed, list(mask.shape)) >= threshold_of(p)
    scale = scale_of(p, mean)
    return mask.copy_(keep) if scale == 1.0 else mask.copy_(keep).mul_(scale)


def _empty_mask(like: Tensor, shared_dims: Sequence[int]) -> Tensor:
    if not shared_dims:
        return torch.empty_like(like, requires_grad=False)  # the strides of x * mask are x's
    shared = {dim % like.dim() for dim in shared_dims}
    shape = [1 if dim in shared else size for dim, size in enumerate(like.shape)]
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _fake(
    like: Tensor,
    shared_dims: Sequence[int],
    p: float,
    mean: float,
    site: int,
    seed: Tensor | None = None,
) -> Tensor:
    return _empty_mask(like, shared_dims)


def _batched(
    info: Any, in_dims: Sequence[int | None], like: Tensor, shared_dims: Sequence[int], *rest: Any
) -> tuple[Tensor, int | None]:
    """Draws under ``torch.vmap``, once for all members or for each, as its ``randomness`` says."""
    at = in_dims[0]
    assert at is not None  # see `_under_vmap`
    shared = [dim % (like.dim() - 1) for dim in shared_dims]
    if info.randomness == "same":
        return dropout_mask(like.select(at, 0), shared, *rest), None
    return dropout_mask(like.movedim(at, 0), [dim + 1 for dim in shared], *rest), 0


def _under_vmap(like: Tensor, *rest: Any) -> Tensor:
    """Sees that members get masks of their own where what they drop is the same for all of them.

    Without a batch dimension to see, functorch would not ask `_batched`.
    """
    vmap = retrieve_current_functorch_interpreter()
    assert isinstance(vmap, VmapInterpreter)
    randomness = vmap.randomness()
    if randomness == "error":
        raise RuntimeError(
            "vmap: a dropout was called in randomness error mode. Expected randomness='same' or"
            " randomness='different' in the call of vmap."
        )
    own = _functorch.is_batchedtensor(like) and _functorch.maybe_get_level(like) == vmap.level()
    if randomness == "different" and not own:
        each = like.unsqueeze(0).expand(vmap.batch_size(), *like.shape)
        like = _functorch._add_batch_dim(each, 0, vmap.level())
    mode = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchVmapMode)
    with torch._C._ExcludeDispatchKeyGuard(mode):
        return dropout_mask(like, *rest)  # type: ignore[no-any-return]


_library: Any = torch.library  # untyped
_LIB = _library.Library("ardd", "FRAGMENT")
_LIB.define(
    "dropout_mask(Tensor like, int[] shared_dims, float p, float mean, int site,"
    " Tensor? seed=None) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)
_LIB.impl("dropout_mask", draw_mask, "CompositeExplicitAutograd")
# No formula is needed: the mask does not depend on the values of `like`. Falling through (rather
# than having no kernel at all) keeps autograd from warning about a missing one.
_LIB.impl("dropout_mask", _library.fallthrough_kernel, "Autograd")
_library.register_fake("ardd::dropout_mask", _fake, lib=_LIB)
_LIB.impl("dropout_mask", _under_vmap, "FuncTorchVmapMode")
_library.register_vmap("ardd::dropout_mask", _batched, lib=_LIB)

dropout_mask = torch.ops.ardd.dropout_mask.default
"""``dropout_mask(like, shared_dims, p, mean, site, seed=None) -> mask``, see ``draw_mask``."""
