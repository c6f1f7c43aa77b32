"""The op that draws which blocks a row pattern keeps: every i-th one, from a random start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .draw_blocks import note_draw
from .random_bits import below


def kept_of(size: int, period: int) -> int:
    """Returns how many blocks of a group stay: one in ``period``, at least one."""
    return max(1, round(size / period))


def draw(bits: Tensor, n_blocks: int, counts: Sequence[int], site: int) -> tuple[Tensor, Tensor]:
    """Draws groups of blocks that keep one block in ``period`` each, from starts of their own.

        group g of period i keeps { g size + (start_g + j i) mod size : 0 <= j < kept_of(size, i) }

    The dimension is cut into groups of equal size, which get the periods at random, ``counts[i-1]``
    of them the period i. Where i divides the size, the start is uniform over 0..i-1 and the kept
    blocks are those of Song et al. 2018, "Approximate Random Dropout",
    https://arxiv.org/abs/1805.08939, (j - start) mod i == 0; with one group the pattern is theirs.
    Elsewhere it is uniform over the group, which is then a ring: every block of a group is kept
    with probability ``kept_of(size, i) / size`` exactly. Never waits for the device.

    Args:
        bits: int32 ``[2, groups]``, random: the draw is a function of them.
        n_blocks: Blocks there are.
        counts: Groups of the periods 1, 2, 3, ...; their number divides ``n_blocks``.
        site: Number of the dropout, for `record_draws`.

    Returns:
        ``kept``, int64 ``[n_kept]``: the blocks kept, ascending. ``slot``, int64 ``[n_blocks]``:
        the position of each block in ``kept``, -1 for a dropped one.

    Raises:
        ValueError: If a count is negative, or the number of groups does not divide ``n_blocks``.
    """
    size = _group_size(n_blocks, counts)
    # A word for the place of every group, one for its start.
    order = bits[0].argsort() * size
    parts = []
    done = 0
    for period, count in enumerate(counts, 1):
        if count == 0:
            continue
        whole = period if size % period == 0 else size
        starts = below(bits[1, done : done + count, None], whole)
        steps = torch.arange(kept_of(size, period), device=bits.device) * period
        within = (starts + steps) % size
        parts.append((order[done : done + count, None] + within).flatten())
        done += count
    kept = torch.cat(parts).sort().values
    slot = torch.full((n_blocks,), -1, dtype=torch.int64, device=bits.device)
    slot.scatter_(0, kept, torch.arange(len(kept), device=bits.device))
    note_draw(site, n_blocks, kept)
    return kept, slot


def kept_in_all(n_blocks: int, counts: Sequence[int]) -> int:
    """Returns how many blocks stay.

    Raises:
        ValueError: If a count is negative, or the number of groups does not divide ``n_blocks``.
    """
    size = _group_size(n_blocks, counts)
    return sum(count * kept_of(size, period) for period, count in enumerate(counts, 1))


def _group_size(n_blocks: int, counts: Sequence[int]) -> int:
    groups = sum(counts)
    if groups < 1 or min(counts) < 0 or n_blocks < 1 or n_blocks % groups:
        raise ValueError(
            f"Cannot cut {n_blocks} blocks into groups {list(counts)}. Expected counts of at least"
            " 0 whose sum divides the number of blocks."
        )
    return n_blocks // groups


def _fake(bits: Tensor, n_blocks: int, counts: Sequence[int], site: int) -> tuple[Tensor, Tensor]:
    kept = bits.new_empty(kept_in_all(n_blocks, counts), dtype=torch.int64)
    return kept, bits.new_empty(n_blocks, dtype=torch.int64)


_library: Any = torch.library  # untyped
_LIB = _library.Library("ardd", "FRAGMENT")
_LIB.define(
    "draw_rows(Tensor bits, int n_blocks, int[] counts, int site) -> (Tensor kept, Tensor slot)",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)
_LIB.impl("draw_rows", draw, "CompositeExplicitAutograd")
_library.register_fake("ardd::draw_rows", _fake, lib=_LIB)

draw_rows = torch.ops.ardd.draw_rows.default
"""``draw_rows(bits, n_blocks, counts, site) -> (kept, slot)``, see ``draw``."""
