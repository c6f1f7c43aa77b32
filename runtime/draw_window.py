"""The op that draws a window of neighbouring blocks that a dropout keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .draw_blocks import check_counts, fake_draw, note_draw


def draw(
    n_blocks: int, n_kept: int, device: torch.device, site: int, instance: int
) -> tuple[Tensor, Tensor]:
    """Draws ``n_kept`` neighbours of ``n_blocks`` blocks on a ring, from a uniform start.

        kept = {(start + i) mod n_blocks : 0 <= i < n_kept}

    The window wraps around, so that every block is kept with probability ``n_kept / n_blocks``
    exactly. Close blocks are mostly kept together. Uses torch's default generator of ``device``;
    never waits for it. After Notin et al. 2020, "SliceOut", https://arxiv.org/abs/2007.10909, who
    keep contiguous slices; that it wraps around is ours.

    Args:
        n_blocks: Blocks there are.
        n_kept: Blocks to keep, ``0 <= n_kept <= n_blocks``.
        device: Where to draw and where the results live.
        site: Number of the dropout, for `record_draws`.
        instance: Differs between the draws of a graph, so that no two are merged into one.

    Returns:
        ``kept``, int64 ``[n_kept]``: the blocks kept, ascending. ``slot``, int64 ``[n_blocks]``:
        the position of each block in ``kept``, -1 for a dropped one.

    Raises:
        ValueError: If ``n_kept`` is negative or larger than ``n_blocks``.
    """
    check_counts(n_blocks, n_kept)
    start = torch.randint(n_blocks, (1,), device=device)
    places = torch.arange(n_kept, device=device)
    kept = ((start + places) % n_blocks).sort().values
    slot = torch.full((n_blocks,), -1, dtype=torch.int64, device=device)
    slot.scatter_(0, kept, places)
    note_draw(site, n_blocks, kept)
    return kept, slot


_library: Any = torch.library  # untyped
_LIB = _library.Library("ardd", "FRAGMENT")
_LIB.define(
    "draw_window(int n_blocks, int n_kept, Device device, int site, int instance)"
    " -> (Tensor kept, Tensor slot)",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)
_LIB.impl("draw_window", draw, "CompositeExplicitAutograd")  # as no argument is a tensor
_library.register_fake("ardd::draw_window", fake_draw, lib=_LIB)

draw_window = torch.ops.ardd.draw_window.default
"""``draw_window(n_blocks, n_kept, device, site, instance) -> (kept, slot)``, see ``draw``."""
