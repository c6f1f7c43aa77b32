"""Tests of the op that draws kept blocks for groups of rows: contract, distribution, recorder."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ardd.runtime.draw_blocks import record_draws
from ardd.runtime.draw_groups import draw_groups
from ardd.runtime.draw_seeds import draw_seeds
from ardd.runtime.random_bits import bits_like

CPU = torch.device("cpu")
DRAWS = 10_000


def bits(*sizes: int, device: torch.device = CPU) -> Tensor:
    """Draws a seed and hashes it, so that the distributions below are those of the hash as well."""
    return bits_like(draw_seeds(1, device)[0], sizes)


def draw(g: int, n: int, k: int, site: int = 0) -> tuple[Tensor, Tensor]:
    kept, slot = draw_groups(bits(g, n), g, n, k, site)
    return kept, slot


def bound(p: float) -> float:
    """Five sigma of a count with probability p."""
    return 5 * math.sqrt(DRAWS * p * (1 - p))


@pytest.mark.parametrize(
    ("g", "n", "k"), [(3, 8, 3), (1, 1, 1), (2, 5, 5), (2, 4, 0), (4, 200, 77)]
)
def test_kept_is_sorted_and_slot_is_its_inverse(g: int, n: int, k: int) -> None:
    kept, slot = draw(g, n, k)
    assert (kept.dtype, slot.dtype) == (torch.int64, torch.int64)
    assert (kept.shape, slot.shape) == ((g, k), (g, n))
    for of_group, place in zip(kept, slot, strict=True):
        assert of_group.tolist() == sorted(set(of_group.tolist()))
        assert place[of_group].tolist() == list(range(k))
        assert (place == -1).sum() == n - k


@pytest.mark.parametrize(("g", "n", "k"), [(2, 4, 5), (2, 4, -1), (0, 4, 2)])
def test_refuses_what_cannot_be_drawn(g: int, n: int, k: int) -> None:
    message = rf"Cannot keep {k} of {n} blocks in each of {g} groups\."
    with pytest.raises(ValueError, match=message):
        draw(g, n, k)


def test_marginals_and_pairs_are_those_of_uniform_draws_without_replacement() -> None:
    """Keeping 5 of 12 in each of 3 groups: P(i) = 5/12, P(i and j) = 5*4 / (12*11)."""
    g, n, k = 3, 12, 5
    kept = torch.zeros(DRAWS, g, n, dtype=torch.float64)
    for row in kept:
        row.scatter_(1, draw(g, n, k)[0], 1)
    single, pair = k / n, k * (k - 1) / (n * (n - 1))
    for group in range(g):
        together = kept[:, group].T @ kept[:, group]
        assert (together.diagonal() - DRAWS * single).abs().max() < bound(single)
        for i, j in itertools.combinations(range(n), 2):
            assert abs(together[i, j] - DRAWS * pair) < bound(pair)


def test_groups_are_independent() -> None:
    """Block i in one group and block j in another: P = (5/12)^2, also for i = j."""
    g, n, k = 3, 12, 5
    kept = torch.zeros(DRAWS, g, n, dtype=torch.float64)
    for row in kept:
        row.scatter_(1, draw(g, n, k)[0], 1)
    both = (k / n) ** 2
    for a, b in itertools.combinations(range(g), 2):
        together = kept[:, a].T @ kept[:, b]
        assert (together - DRAWS * both).abs().max() < bound(both)


def test_every_set_is_as_likely_as_any_other() -> None:
    """All 20 sets of 3 of 6: chi squared with 19 degrees of freedom, 0.001 quantile 43.8."""
    draws = [tuple(kept.tolist()) for _ in range(DRAWS // 2) for kept in draw(2, 6, 3)[0]]
    expected = DRAWS / 20
    counts = [draws.count(kept) for kept in itertools.combinations(range(6), 3)]
    assert sum((count - expected) ** 2 / expected for count in counts) < 43.8


def test_the_default_generator_decides() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = draw(2, 64, 32)[0]
    second = draw(2, 64, 32)[0]
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(draw(2, 64, 32)[0], first)


def test_recorders_receive_copies() -> None:
    with record_draws() as draws:
        kept = draw(3, 8, 2, site=4)[0]
        expected = kept.clone()
        kept.zero_()
    ((site, n_blocks, recorded),) = draws
    assert (site, n_blocks) == (4, 8)
    assert torch.equal(recorded, expected)


def test_draws_of_a_compiled_graph_are_seen_and_not_merged() -> None:
    """Two draws of the same sizes are two: no pass merges the draws of their seeds."""

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled() -> tuple[Tensor, Tensor]:
        first, _ = draw_groups(bits(2, 64), 2, 64, 32, 1)
        second, _ = draw_groups(bits(2, 64), 2, 64, 32, 1)
        return first, second

    with record_draws() as draws:
        first, second = compiled()
    assert torch.equal(draws[0].kept, first)
    assert torch.equal(draws[1].kept, second)
    assert not torch.equal(first, second)


def test_opcheck() -> None:
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(draw_groups, (bits(2, 8), 2, 8, 3, 0), test_utils=utils)


def test_the_op_is_known_to_be_random() -> None:
    assert torch.Tag.nondeterministic_seeded in draw_groups.tags


@pytest.mark.cuda
def test_drawing_on_a_gpu_does_not_wait_for_it() -> None:
    device = torch.device("cuda")
    draw_groups(bits(4, 256, device=device), 4, 256, 100, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kept, slot = draw_groups(bits(4, 256, device=device), 4, 256, 100, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert kept.device.type == slot.device.type == "cuda"
    for of_group, place in zip(kept, slot, strict=True):
        assert place[of_group].tolist() == list(range(100))
