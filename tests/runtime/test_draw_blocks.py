"""Tests of the op that draws kept blocks: its contract, its distribution, its recorder."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ardd.runtime.draw_blocks import draw_blocks, record_draws
from ardd.runtime.draw_seeds import draw_seeds
from ardd.runtime.random_bits import bits_like

CPU = torch.device("cpu")
DRAWS = 10_000


def bits(*sizes: int, device: torch.device = CPU) -> Tensor:
    """Draws a seed and hashes it, so that the distributions below are those of the hash as well."""
    return bits_like(draw_seeds(1, device)[0], sizes)


def draw(n: int, k: int, site: int = 0) -> tuple[Tensor, Tensor]:
    kept, slot = draw_blocks(bits(n), n, k, site)
    return kept, slot


@pytest.mark.parametrize(("n", "k"), [(8, 3), (1, 1), (5, 5), (4, 0), (200, 77)])
def test_kept_is_sorted_and_slot_is_its_inverse(n: int, k: int) -> None:
    kept, slot = draw(n, k)
    assert (kept.dtype, slot.dtype) == (torch.int64, torch.int64)
    assert (kept.shape, slot.shape) == ((k,), (n,))
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert slot[kept].tolist() == list(range(k))
    assert (slot == -1).sum() == n - k


@pytest.mark.parametrize(("n", "k"), [(4, 5), (4, -1)])
def test_refuses_to_keep_more_than_there_is(n: int, k: int) -> None:
    message = rf"Cannot keep {k} of {n} blocks\. Expected 0 <= n_kept <= n_blocks\."
    with pytest.raises(ValueError, match=message):
        draw(n, k)


def test_marginals_and_pairs_are_those_of_uniform_draws_without_replacement() -> None:
    """Keeping 5 of 12: P(i) = 5/12, P(i and j) = 5*4 / (12*11); five sigma over all 78 of them."""
    n, k = 12, 5
    kept = torch.zeros(DRAWS, n, dtype=torch.float64)
    for row in kept:
        row[draw(n, k)[0]] = 1
    together = kept.T @ kept

    def bound(p: float) -> float:
        return 5 * math.sqrt(DRAWS * p * (1 - p))

    single, pair = k / n, k * (k - 1) / (n * (n - 1))
    assert (together.diagonal() - DRAWS * single).abs().max() < bound(single)
    for i, j in itertools.combinations(range(n), 2):
        assert abs(together[i, j] - DRAWS * pair) < bound(pair)


def test_every_set_is_as_likely_as_any_other() -> None:
    """All 20 sets of 3 of 6: chi squared with 19 degrees of freedom, 0.001 quantile 43.8."""
    draws = [tuple(draw(6, 3)[0].tolist()) for _ in range(DRAWS)]
    expected = DRAWS / 20
    counts = [draws.count(kept) for kept in itertools.combinations(range(6), 3)]
    assert sum((count - expected) ** 2 / expected for count in counts) < 43.8


def test_the_default_generator_decides() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = draw(64, 32)[0]
    second = draw(64, 32)[0]
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(draw(64, 32)[0], first)
    torch.manual_seed(3)
    assert torch.equal(draw(64, 32)[0], first)


def test_recorders_receive_draws_in_order() -> None:
    draw(9, 1)
    with record_draws() as outer:
        first = draw(8, 3, site=4)[0]
        with record_draws() as inner:
            second = draw(6, 2, site=5)[0]
            expected = second.clone()
            second.zero_()  # what is recorded is a copy
    draw(9, 1)
    assert [(site, n) for site, n, _ in outer] == [(4, 8), (5, 6)]
    assert [(site, n) for site, n, _ in inner] == [(5, 6)]
    assert torch.equal(outer[0].kept, first)
    assert torch.equal(inner[0].kept, expected)


def test_draws_of_a_compiled_graph_are_seen_and_not_merged() -> None:
    """Two draws of the same sizes are two: no pass merges the draws of their seeds."""

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled() -> tuple[Tensor, Tensor]:
        first, _ = draw_blocks(bits(64), 64, 32, 1)
        second, _ = draw_blocks(bits(64), 64, 32, 1)
        return first, second

    with record_draws() as draws:
        first, second = compiled()
    assert [site for site, *_ in draws] == [1, 1]
    assert torch.equal(draws[0].kept, first)
    assert torch.equal(draws[1].kept, second)
    assert not torch.equal(first, second)


def test_opcheck() -> None:
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(draw_blocks, (bits(8), 8, 3, 0), test_utils=utils)


def test_the_op_is_known_to_be_random() -> None:
    assert torch.Tag.nondeterministic_seeded in draw_blocks.tags


@pytest.mark.cuda
def test_drawing_on_a_gpu_does_not_wait_for_it() -> None:
    device = torch.device("cuda")
    draw_blocks(bits(256, device=device), 256, 100, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kept, slot = draw_blocks(bits(256, device=device), 256, 100, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert kept.device.type == slot.device.type == "cuda"
    assert slot[kept].tolist() == list(range(100))
