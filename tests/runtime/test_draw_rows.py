"""Tests of the op that draws rows: its contract, its distribution, its recorder."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ardd.runtime.draw_blocks import record_draws
from ardd.runtime.draw_rows import draw_rows, kept_in_all, kept_of
from ardd.runtime.draw_seeds import draw_seeds
from ardd.runtime.random_bits import bits_like

CPU = torch.device("cpu")
DRAWS = 10_000


def bits(*sizes: int, device: torch.device = CPU) -> Tensor:
    """Draws a seed and hashes it, so that the distributions below are those of the hash as well."""
    return bits_like(draw_seeds(1, device)[0], sizes)


def draw(n: int, counts: Sequence[int], site: int = 0) -> tuple[Tensor, Tensor]:
    kept, slot = draw_rows(bits(2, sum(counts)), n, list(counts), site)
    return kept, slot


def is_row(places: list[int], size: int, period: int) -> bool:
    """Whether places of a group, a ring, are one in ``period`` from some start."""
    steps = range(kept_of(size, period))
    rows = ({(start + i * period) % size for i in steps} for start in range(size))
    return any(set(places) == row for row in rows)


CASES: list[tuple[int, list[int]]] = [
    (12, [0, 1]),
    (12, [0, 0, 1]),
    (10, [0, 0, 0, 1]),
    (48, [1, 2, 0, 3]),
    (40, [2, 0, 3]),
    (7, [1]),
    (1, [1]),
]


@pytest.mark.parametrize(("n", "counts"), CASES)
def test_groups_keep_one_in_their_period(n: int, counts: list[int]) -> None:
    """From an own start, and the periods are those asked for; slot is the inverse of kept."""
    size = n // sum(counts)
    for _ in range(20):
        kept, slot = draw(n, counts)
        assert (kept.dtype, slot.dtype) == (torch.int64, torch.int64)
        assert kept.tolist() == sorted(set(kept.tolist()))
        assert slot[kept].tolist() == list(range(len(kept)))
        assert (slot == -1).sum() == n - len(kept)
        groups = [[j % size for j in kept.tolist() if j // size == g] for g in range(sum(counts))]
        for period, count in enumerate(counts, 1):  # no group is of two of the periods
            assert sum(is_row(places, size, period) for places in groups) == count or count == 0
    assert len(kept) == kept_in_all(n, counts)


def test_one_group_is_the_pattern_of_the_paper() -> None:
    """Kept is every j with (j - bias) mod period == 0, and each bias comes up."""
    seen = set()
    for _ in range(100):
        kept, _ = draw(24, [0, 0, 1])
        (bias,) = {j % 3 for j in kept.tolist()}
        assert kept.tolist() == [j for j in range(24) if (j - bias) % 3 == 0]
        seen.add(bias)
    assert seen == {0, 1, 2}


@pytest.mark.parametrize(("n", "counts"), [(12, [0, 0, 1]), (10, [0, 0, 0, 1]), (40, [2, 0, 3])])
def test_every_block_is_as_likely_as_any_other(n: int, counts: list[int]) -> None:
    """P(i) = k/n exactly, also where no period divides the size; E[mask] = 1; five sigma."""
    kept = torch.zeros(DRAWS, n, dtype=torch.float64)
    for row in kept:
        row[draw(n, counts)[0]] = 1
    share = kept_in_all(n, counts) / n
    assert (kept.sum(1) == share * n).all()
    bound = 5 * math.sqrt(share * (1 - share) / DRAWS)
    assert (kept.mean(0) - share).abs().max() < bound
    assert ((kept / share).mean(0) - 1).abs().max() < bound / share


@pytest.mark.parametrize(("n", "counts"), [(10, [0, 0, 3]), (4, []), (4, [0]), (4, [3, -1])])
def test_refuses_groups_that_do_not_fit(n: int, counts: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"Cannot cut {n} blocks into groups \["):
        draw(n, counts)


def test_the_default_generator_decides() -> None:
    torch.manual_seed(3)
    first, second = draw(64, [1, 5, 2])[0], draw(64, [1, 5, 2])[0]
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(draw(64, [1, 5, 2])[0], first)


def test_draws_of_a_compiled_graph_are_recorded_and_not_merged() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled() -> tuple[Tensor, Tensor]:
        first, _ = draw_rows(bits(2, 8), 64, [1, 6, 1], 1)
        second, _ = draw_rows(bits(2, 8), 64, [1, 6, 1], 1)
        return first, second

    with record_draws() as draws:
        first, second = compiled()
    assert [(site, n) for site, n, _ in draws] == [(1, 64), (1, 64)]
    assert torch.equal(draws[0].kept, first)
    assert torch.equal(draws[1].kept, second)
    assert not torch.equal(first, second)


def test_the_op_is_what_torch_is_told() -> None:
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(draw_rows, (bits(2, 6), 48, [1, 2, 0, 3], 0), test_utils=utils)
    assert torch.Tag.nondeterministic_seeded in draw_rows.tags


@pytest.mark.cuda
def test_drawing_on_a_gpu_does_not_wait_for_it() -> None:
    device = torch.device("cuda")
    draw_rows(bits(2, 32, device=device), 256, [4, 20, 8], 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kept, slot = draw_rows(bits(2, 32, device=device), 256, [4, 20, 8], 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert slot[kept].tolist() == list(range(len(kept)))
