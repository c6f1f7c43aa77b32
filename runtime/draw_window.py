"""The op that draws a window of neighbouring blocks that a dropout keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .draw_blocks import check_counts, fake_draw, note_draw
from .random_bits import below


def draw(bits: Tensor, n_blocks: int, n_kept: int, site: int) -> tuple[Tensor, Tensor]:
    """Draws ``n_kept`` neighbours of ``n_blocks`` blocks on a ring, from a uniform start.

        kept = {(start + i) mod n_blocks : 0 <= i < n_kept}

    The window wraps around, so that every block is kept with probability ``n_kept / n_blocks``
    exactly. Close blocks are mostly kept together. Never waits for the device. After Notin et al.
    2020, "SliceOut", https://arxiv.org/abs/2007.10909, who keep contiguous slices; that it wraps
    around is ours.

    Args:
        bits: int32 ``[1]``, random: the draw is a function of them.
        n_blocks: Blocks there are.
        n_kept: Blocks to keep, ``0 <= n_kept <= n_blocks``.
        site: Number of the dropout, for `record_draws`.

    Returns:
        ``kept``, int64 ``[n_kept]``: the blocks kept, ascending. ``slot``, int64 ``[n_blocks]``:
        the position of each block in ``kept``, -1 for a dropped one.

    Raises:
        ValueError: If ``n_kept`` is negative or larger than ``n_blocks``.
    """
    check_counts(n_blocks, n_kept)
    start = below(bits, n_blocks)
    places = torch.arange(n_kept, device=bits.device)
    kept = ((start + places) % n_blocks).sort().values
    slot = torch.full((n_blocks,), -1, dtype=torch.int64, device=bits.device)
    slot.scatter_(0, kept, places)
    note_draw(site, n_blocks, kept)
    return kept, slot


_library: Any = torch.library  # untyped
_LIB = _library.Library("ardd", "FRAGMENT")
_LIB.define(
    "draw_window(Tensor bits, int n_blocks, int n_kept, int site) -> (Tensor kept, Tensor slot)",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)
_LIB.impl("draw_window", draw, "CompositeExplicitAutograd")
_library.register_fake("ardd::draw_window", fake_draw, lib=_LIB)

draw_window = torch.ops.ardd.draw_window.default
"""``draw_window(bits, n_blocks, n_kept, site) -> (kept, slot)``, see ``draw``."""
