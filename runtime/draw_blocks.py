"""The op that draws which blocks of features a dropout keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Draw(NamedTuple):
    """One draw, as ``record_draws`` saw it."""

    site: int
    """Number of the dropout within its graph, as in the report."""
    n_blocks: int
    """Blocks there were."""
    kept: Tensor
    """int64 ``[n_kept]``, ascending, a copy; ``[n_groups, n_kept]`` where rows are grouped."""


_recorders: list[list[Draw]] = []


@contextlib.contextmanager
def record_draws() -> Iterator[list[Draw]]:
    """Yields a list that receives every draw made while the context is open, in order.

    Draws are seen when the op runs: a replayed CUDA graph runs no Python and records nothing.
    Contexts may be nested; each receives all draws. All threads are seen.
    """
    draws: list[Draw] = []
    _recorders.append(draws)
    try:
        yield draws
    finally:
        # By identity: two empty lists are equal, and contexts may be closed out of order.
        _recorders[:] = [recorder for recorder in _recorders if recorder is not draws]


def note_draw(site: int, n_blocks: int, kept: Tensor) -> None:
    """Gives a draw to every open recorder, each a copy of its own."""
    for recorder in _recorders:
        recorder.append(Draw(site, n_blocks, kept.clone()))


def draw(bits: Tensor, n_blocks: int, n_kept: int, site: int) -> tuple[Tensor, Tensor]:
    """Draws ``n_kept`` of ``n_blocks`` blocks, uniformly and without replacement.

    Every block is kept with probability ``n_kept / n_blocks`` exactly, every pair with the
    hypergeometric probability. Never waits for the device.

    Args:
        bits: int32 ``[n_blocks]``, random: the draw is a function of them.
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
    kept = bits.argsort()[:n_kept].sort().values
    slot = torch.full((n_blocks,), -1, dtype=torch.int64, device=bits.device)
    slot.scatter_(0, kept, torch.arange(n_kept, device=bits.device))
    note_draw(site, n_blocks, kept)
    return kept, slot


def check_counts(n_blocks: int, n_kept: int) -> None:
    """Checks that so many blocks can be kept.

    Raises:
        ValueError: If ``n_kept`` is negative or larger than ``n_blocks``.
    """
    if not 0 <= n_kept <= n_blocks:
        raise ValueError(
            f"Cannot keep {n_kept} of {n_blocks} blocks. Expected 0 <= n_kept <= n_blocks."
        )


def fake_draw(bits: Tensor, n_blocks: int, n_kept: int, site: int) -> tuple[Tensor, Tensor]:
    """Returns a draw without its values."""
    check_counts(n_blocks, n_kept)
    kept = bits.new_empty(n_kept, dtype=torch.int64)
    return kept, bits.new_empty(n_blocks, dtype=torch.int64)


_library: Any = torch.library  # untyped
_LIB = _library.Library("ardd", "FRAGMENT")
_LIB.define(
    "draw_blocks(Tensor bits, int n_blocks, int n_kept, int site) -> (Tensor kept, Tensor slot)",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)
_LIB.impl("draw_blocks", draw, "CompositeExplicitAutograd")
_library.register_fake("ardd::draw_blocks", fake_draw, lib=_LIB)

draw_blocks = torch.ops.ardd.draw_blocks.default
"""``draw_blocks(bits, n_blocks, n_kept, site) -> (kept, slot)``, see ``draw``."""
