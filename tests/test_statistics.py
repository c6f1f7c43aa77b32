"""What masks are like over many draws, seen through compiled programs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ardd

DRAWS = 10_000
SIGMAS = 5
"""One in two million is further off. With the few hundred numbers that a test looks at, a right
program fails for one in ten thousand seeds; the seed is the test's own."""

WIDTH = 32


class Probe(nn.Module):
    """Gives a mask to see: a product with the identity produces what is dropped."""

    def __init__(self, drop: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(WIDTH))
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(F.linear(x, self.weight))


def masks(
    drop: Callable[[Tensor], Tensor], target: str = "eager", draws: int = DRAWS, **options: object
) -> Tensor:
    """Returns ``[draws, WIDTH]``, one mask a row."""
    given: dict[str, Any] = {"pattern": "block", "target": target, "strict": True, **options}
    fn = torch.compile(Probe(drop), backend="ardd", options=given)
    x = torch.ones(1, WIDTH)
    with torch.no_grad():
        return torch.cat([fn(x) for _ in range(draws)]).double()


def bound(p: float, draws: int = DRAWS) -> float:
    """How far a binomial share may be from p."""
    return SIGMAS * math.sqrt(p * (1 - p) / draws)


# asked, block -> used, of 32 features
RATES = [(0.25, 1, 0.25), (0.5, 2, 0.5), (0.75, 4, 0.75), (0.3, 1, 0.3125), (0.1, 2, 0.125)]


@pytest.mark.parametrize(("p", "block", "used"), RATES)
def test_rates_means_and_pairs(p: float, block: int, used: float) -> None:
    """Of n blocks k are kept: P(i) = k/n, P(i and j) = k (k-1) / (n (n-1)), E[mask] = 1."""
    seen = masks(lambda x: F.dropout(x, p), block_size=block, rate_tolerance=0.03)
    (decision,) = ardd.report().decisions
    assert (decision.taken, decision.p_used) == (True, used)
    keep = 1 - used
    n, k = WIDTH // block, round(keep * WIDTH) // block
    torch.testing.assert_close(seen.unique(), torch.tensor([0, 1 / keep]).double())
    blocks = seen.view(DRAWS, n, block)
    assert (blocks == blocks[..., :1]).all()
    kept = (blocks[..., 0] > 0).double()
    assert (kept.sum(1) == k).all()  # the rate is exact in every step
    assert (kept.mean(0) - keep).abs().max() < bound(keep)
    assert (seen.mean(0) - 1).abs().max() < bound(keep) / keep
    assert math.isclose(float(seen.mean()), 1, rel_tol=1e-6)  # and so is the mean
    pair = k * (k - 1) / (n * (n - 1))
    together = kept.T @ kept / DRAWS
    for i, j in itertools.combinations(range(n), 2):
        assert abs(together[i, j] - pair) < bound(pair)


def test_the_mean_is_the_dense_result() -> None:
    """E[output] and E[gradient] of something linear are those without a dropout."""
    torch.manual_seed(0)
    first, last = nn.Linear(8, WIDTH).double(), nn.Linear(WIDTH, 4).double()
    model = nn.Sequential(first, nn.Dropout(0.5), last)
    fn = torch.compile(
        model, backend="ardd", options={"pattern": "block", "target": "eager", "strict": True}
    )
    x = torch.randn(2, 8, dtype=torch.float64)
    runs = 2000
    outputs, gradients = [], []
    for _ in range(runs):
        y = fn(x)
        outputs.append(y.detach())
        gradients.append(torch.autograd.grad(y.sum(), first.weight)[0])
    dense = last(first(x))
    for seen, mean in (
        (torch.stack(outputs), dense),
        (torch.stack(gradients), torch.autograd.grad(dense.sum(), first.weight)[0]),
    ):
        error = (seen.mean(0) - mean).abs()
        assert (error <= SIGMAS * seen.std(0) / math.sqrt(runs) + 1e-12).all()
        assert seen.std(0).min() > 0


def test_masks_of_two_dropouts_and_of_two_calls_are_independent() -> None:
    def twice(x: Tensor) -> Tensor:
        return torch.stack([F.dropout(x, 0.5), F.dropout(x, 0.5)])

    torch.manual_seed(0)
    given: dict[str, Any] = {"pattern": "block", "target": "eager", "strict": True, "block_size": 1}
    fn = torch.compile(Probe(twice), backend="ardd", options=given)
    with torch.no_grad():
        seen = torch.stack([fn(torch.ones(1, WIDTH))[:, 0] for _ in range(DRAWS)])  # [draws, 2, n]
    kept = (seen > 0).double() - 0.5
    first, second = kept[:, 0], kept[:, 1]
    for a, b in ((first, second), (first[1:], first[:-1]), (first[1:], second[:-1])):
        correlation = 4 * (a.T @ b) / len(a)
        assert correlation.abs().max() < SIGMAS / math.sqrt(len(a))


def test_a_mask_without_its_scale_has_the_mean_of_its_rate() -> None:
    """Made by hand and left unscaled: E[mask] = 1 - p."""
    seen = masks(lambda x: x * torch.bernoulli(torch.full_like(x, 0.75)), block_size=2)
    assert ardd.report().decisions[0].taken
    torch.testing.assert_close(seen.unique(), torch.tensor([0.0, 1.0]).double())
    assert (seen.mean(0) - 0.75).abs().max() < bound(0.75)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_mask_that_stays_random(p: float) -> None:
    """Every element on its own, as without ardd."""
    seen = masks(lambda x: F.dropout(x, p), pattern="random")
    kept = (seen > 0).double()
    assert (kept.mean(0) - (1 - p)).abs().max() < bound(p)
    together = kept.T @ kept / DRAWS
    for i, j in itertools.combinations(range(WIDTH), 2):
        assert abs(together[i, j] - (1 - p) ** 2) < bound((1 - p) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["block", "random"])
def test_through_inductor(pattern: str) -> None:
    seen = masks(lambda x: F.dropout(x, 0.25), "inductor", pattern=pattern, block_size=2)
    kept = (seen[:, ::2] > 0).double()  # one feature of each block
    assert (kept.mean(0) - 0.75).abs().max() < bound(0.75)
    n, k = WIDTH // 2, WIDTH // 2 * 3 // 4
    pair = k * (k - 1) / (n * (n - 1)) if pattern == "block" else 0.75**2
    together = kept.T @ kept / DRAWS
    for i, j in itertools.combinations(range(n), 2):
        assert abs(together[i, j] - pair) < bound(pair)
