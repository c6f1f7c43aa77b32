"""The op that draws which blocks of features every group of rows keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .draw_blocks import note_draw


def draw(
    bits: Tensor, n_groups: int, n_blocks: int, n_kept: int, site: int
) -> tuple[Tensor, Tensor]:
    """Draws ``n_kept`` of ``n_blocks`` blocks for every group, uniformly without replacement.

    One group is what ``draw_blocks`` draws; groups are independent. Kept blocks of its own for each
    part of the batch are the structure of Lo 2024, "Efficient Sparse Training with Structured
    Dropout", https://arxiv.org/abs/2411.01238. There a part is 128 rows, a tile of the kernel, and
    every block is dropped by itself; here it is any equal share of the rows, and the number kept is
    fixed. Never waits for the device.

    Args:
        bits: int32 ``[n_groups, n_blocks]``, random: the draw is a function of them.
        n_groups: Groups of rows, at least 1.
        n_blocks: Blocks there are.
        n_kept: Blocks that each group keeps, ``0 <= n_kept <= n_blocks``.
        site: Number of the dropout, for `record_draws`.

    Returns:
        ``kept``, int64 ``[n_groups, n_kept]``: the blocks that each group keeps, ascending.
        ``slot``, int64 ``[n_groups, n_blocks]``: the position of each block in its group's row of
        ``kept``, -1 for a dropped one.

    Raises:
        ValueError: If ``n_groups`` is less than 1, or ``n_kept`` negative or above ``n_blocks``.
    """
    _check(n_groups, n_blocks, n_kept)
    kept = bits.argsort(1)[:, :n_kept].sort(1).values
    slot = torch.full((n_groups, n_blocks), -1, dtype=torch.int64, device=bits.device)
    slot.scatter_(1, kept, torch.arange(n_kept, device=bits.device).expand(n_groups, n_kept))
    note_draw(site, n_blocks, kept)
    return kept, slot


def _check(n_groups: int, n_blocks: int, n_kept: int) -> None:
    if n_groups < 1 or not 0 <= n_kept <= n_blocks:
        raise ValueError(
            f"Cannot keep {n_kept} of {n_blocks} blocks in each of {n_groups} groups. Expected"
            " n_groups >= 1 and 0 <= n_kept <= n_blocks."
        )


def _fake(
    bits: Tensor, n_groups: int, n_blocks: int, n_kept: int, site: int
) -> tuple[Tensor, Tensor]:
    _check(n_groups, n_blocks, n_kept)
    kept = bits.new_empty(n_groups, n_kept, dtype=torch.int64)
    return kept, bits.new_empty(n_groups, n_blocks, dtype=torch.int64)


_library: Any = torch.library  # untyped
_LIB = _library.Library("ardd", "FRAGMENT")
_LIB.define(
    "draw_groups(Tensor bits, int n_groups, int n_blocks, int n_kept, int site)"
    " -> (Tensor kept, Tensor slot)",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)
_LIB.impl("draw_groups", draw, "CompositeExplicitAutograd")
_library.register_fake("ardd::draw_groups", _fake, lib=_LIB)

draw_groups = torch.ops.ardd.draw_groups.default
"""``draw_groups(bits, n_groups, n_blocks, n_kept, site) -> (kept, slot)``: `draw`."""
