"""Tests of the op that draws a window: its contract, its distribution, its recorder."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ardd.runtime.draw_blocks import record_draws
from ardd.runtime.draw_seeds import draw_seeds
from ardd.runtime.draw_window import draw_window
from ardd.runtime.random_bits import bits_like

CPU = torch.device("cpu")
DRAWS = 10_000


def bits(*sizes: int, device: torch.device = CPU) -> Tensor:
    """Draws a seed and hashes it, so that the distributions below are those of the hash as well."""
    return bits_like(draw_seeds(1, device)[0], sizes)


def draw(n: int, k: int, site: int = 0) -> tuple[Tensor, Tensor]:
    kept, slot = draw_window(bits(1), n, k, site)
    return kept, slot


@pytest.mark.parametrize(("n", "k"), [(8, 3), (1, 1), (5, 5), (4, 0), (200, 77)])
def test_kept_is_a_window_and_slot_is_its_inverse(n: int, k: int) -> None:
    for _ in range(20):
        kept, slot = draw(n, k)
        assert (kept.dtype, slot.dtype) == (torch.int64, torch.int64)
        assert (kept.shape, slot.shape) == ((k,), (n,))
        assert kept.tolist() == sorted(set(kept.tolist()))
        assert slot[kept].tolist() == list(range(k))
        assert (slot == -1).sum() == n - k
        inside = (slot >= 0).long()
        assert (inside.roll(-1) - inside).abs().sum() == (2 if 0 < k < n else 0)  # two ends


@pytest.mark.parametrize(("n", "k"), [(4, 5), (4, -1)])
def test_refuses_to_keep_more_than_there_is(n: int, k: int) -> None:
    with pytest.raises(ValueError, match=rf"Cannot keep {k} of {n} blocks\."):
        draw(n, k)


def test_every_start_is_as_likely_as_any_other() -> None:
    """Each block is kept at the rate k/n, and E[mask] = 1; five sigma."""
    n, k = 12, 5
    kept = torch.zeros(DRAWS, n, dtype=torch.float64)
    for row in kept:
        row[draw(n, k)[0]] = 1
    share = k / n
    bound = 5 * math.sqrt(share * (1 - share) / DRAWS)
    assert (kept.mean(0) - share).abs().max() < bound
    mask = kept * n / k
    assert (mask.mean(0) - 1).abs().max() < bound / share
    starts = torch.stack([(row - row.roll(1)).argmax() for row in kept]).bincount(minlength=n)
    chi_squared = (starts - DRAWS / n).square().sum() / (DRAWS / n)
    assert chi_squared < 31.3  # the 0.001 quantile at 11 degrees of freedom


def test_the_default_generator_decides() -> None:
    torch.manual_seed(3)
    first, second = draw(64, 32)[0], draw(64, 32)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(draw(64, 32)[0], first)


def test_draws_of_a_compiled_graph_are_recorded_and_not_merged() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled() -> tuple[Tensor, Tensor]:
        return draw_window(bits(1), 64, 32, 1)[0], draw_window(bits(1), 64, 32, 1)[0]

    with record_draws() as draws:
        first, second = compiled()
    assert [(site, n) for site, n, _ in draws] == [(1, 64), (1, 64)]
    assert torch.equal(draws[0].kept, first)
    assert torch.equal(draws[1].kept, second)
    assert not torch.equal(first, second)


def test_the_op_is_what_torch_is_told() -> None:
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(draw_window, (bits(1), 8, 3, 0), test_utils=utils)
    assert torch.Tag.nondeterministic_seeded in draw_window.tags


@pytest.mark.cuda
def test_drawing_on_a_gpu_does_not_wait_for_it() -> None:
    device = torch.device("cuda")
    draw_window(bits(1, device=device), 256, 100, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kept, slot = draw_window(bits(1, device=device), 256, 100, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert slot[kept].tolist() == list(range(100))
