"""Tests of the searched distributions: their rates, how they agree, what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

from ardd.core.errors import DistributionError
from ardd.runtime.search_distribution import PeriodDistribution, rate_of, search_distribution

METHODS = ("maxent", "sgd", "pairwise", "narrow")
RATES = (0.05, 0.3, 0.5, 0.7)


def distance(one: PeriodDistribution, other: PeriodDistribution) -> float:
    """Returns the total variation."""
    pairs = zip(one.probabilities, other.probabilities, strict=True)
    return sum(abs(a - b) for a, b in pairs) / 2


def pair_error(probabilities: list[float], rate: float) -> float:
    """The objective of the prototype of 2017 without the marginal, from its definition."""
    n = len(probabilities)
    return sum(
        abs(sum(p / i for i, p in enumerate(probabilities, 1) if a % i == 0) - (1 - rate) ** 2)
        for a in range(1, n)
    )


@pytest.mark.parametrize("n", [4, 16])
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("method", METHODS)
def test_the_mean_rate_is_the_one_asked_for(method: str, rate: float, n: int) -> None:
    """SGD trades some of it for entropy, all others meet it."""
    found = search_distribution(rate, n, method)
    assert len(found.probabilities) == n
    assert min(found.probabilities) >= 0
    assert math.isclose(sum(found.probabilities), 1, rel_tol=1e-12)
    assert found.rate == rate
    by_hand = sum(p * (1 - 1 / i) for i, p in enumerate(found.probabilities, 1))
    assert math.isclose(found.mean_rate, by_hand, rel_tol=1e-12)
    assert abs(found.mean_rate - rate) < (5e-3 if method == "sgd" else 1e-9)


@pytest.mark.parametrize("rate", RATES)
def test_sgd_tends_to_maximum_entropy(rate: float) -> None:
    """As the weight of the entropy falls: a tenth of the weight is about a tenth of the way."""
    target = search_distribution(rate, 8)
    errors = [
        distance(search_distribution(rate, 8, "sgd", entropy_weight=weight), target)
        for weight in (1e-1, 1e-2, 1e-3)
    ]
    assert errors[0] > 4 * errors[1] > 16 * errors[2]
    assert errors[2] < 6e-3


def test_sgd_draws_nothing_and_repeats() -> None:
    state = torch.get_rng_state()
    first = search_distribution(0.3, 6, "sgd")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    with torch.no_grad():
        assert search_distribution(0.3, 6, "sgd") == first


def rivals(rate: float, n: int, count: int = 200) -> list[PeriodDistribution]:
    """Random distributions of the same rate: those of two random ones that lie on either side."""
    found: list[PeriodDistribution] = []
    rates = torch.tensor([rate_of(i) for i in range(1, n + 1)], dtype=torch.float64)
    while len(found) < count:
        a, b = (torch.rand(2, n, dtype=torch.float64) ** 6).unbind()
        a, b = a / a.sum(), b / b.sum()
        low, high = float(a @ rates), float(b @ rates)
        if low < rate < high:
            share = (rate - low) / (high - low)
            mixed = (1 - share) * a + share * b
            found.append(PeriodDistribution(rate, tuple(mixed.tolist())))
    return found


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7])
def test_each_is_best_at_what_it_is_for(rate: float) -> None:
    """Of all distributions of its rate: the most entropy, the closest pairs, the steadiest rate."""
    maxent, pairwise, narrow = (
        search_distribution(rate, 8, method) for method in ("maxent", "pairwise", "narrow")
    )
    for rival in [*rivals(rate, 8), maxent, pairwise, narrow]:
        assert rival.entropy <= maxent.entropy + 1e-12
        assert rival.rate_variance >= narrow.rate_variance - 1e-12
        least = pair_error(list(pairwise.probabilities), rate)
        assert pair_error(list(rival.probabilities), rate) >= least - 1e-12


def test_values_worked_out_by_hand() -> None:
    """At 1/2 and N = 2 all steps halve. Of 1..3 at 1/2, entropy is largest at p1 = 0.2324."""
    for method in METHODS:
        assert search_distribution(0.5, 2, method).probabilities == pytest.approx((0, 1), abs=2e-2)
    maxent = search_distribution(0.5, 3).probabilities
    eta = math.log(maxent[1] / maxent[0]) * 2
    assert math.isclose(math.log(maxent[2] / maxent[0]), eta * 2 / 3, rel_tol=1e-9)
    assert maxent[0] / 2 == pytest.approx(maxent[2] / 6)  # above and below 1/2 weigh the same
    assert search_distribution(0.3, 9, "narrow").probabilities[:3] == pytest.approx((0.4, 0.6, 0))
    assert search_distribution(0.7, 9, "narrow").probabilities[2:4] == pytest.approx((0.6, 0.4))


def test_what_is_reported_is_what_is_drawn() -> None:
    found = search_distribution(0.5, 4)
    torch.manual_seed(0)
    weights = torch.tensor(found.probabilities)
    rates = 1 - 1 / (torch.multinomial(weights, 100_000, replacement=True) + 1.0)
    assert float(rates.mean()) == pytest.approx(0.5, abs=5e-3)
    assert float(rates.var()) == pytest.approx(found.rate_variance, abs=3e-3)
    assert float((rates == 0).float().mean()) == pytest.approx(found.no_dropout, abs=7e-3)
    assert search_distribution(0.5, 2).entropy == 0
    assert PeriodDistribution(0.0, (0.5, 0.5)).entropy == pytest.approx(math.log(2))


@pytest.mark.parametrize("method", METHODS)
def test_the_ends_of_what_is_feasible(method: str) -> None:
    none, most = search_distribution(0, 4, method), search_distribution(0.75, 4, method)
    tolerance = 0.2 if method == "sgd" else 1e-9  # entropy keeps it away from corners
    assert none.no_dropout == pytest.approx(1, abs=tolerance)
    assert most.probabilities[3] == pytest.approx(1, abs=tolerance)
    assert search_distribution(0.0, 1, method).probabilities == (1.0,)


@pytest.mark.parametrize("n", [3, 64])
@pytest.mark.parametrize("method", METHODS)
def test_every_size_and_rate(method: str, n: int) -> None:
    """Nothing cycles or diverges."""
    for rate in (0.123,) if method == "sgd" else (1e-6, 0.123, 0.49, rate_of(n) - 1e-6):
        if rate <= rate_of(n):
            found = search_distribution(rate, n, method)
            assert abs(found.mean_rate - rate) < (3e-2 if method == "sgd" else 1e-9)


REFUSED: list[tuple[object, object, object, str]] = [
    (0.9, 8, "maxent", r"periods 1\.\.8 drops 0\.9: .* drops 0\.875\. Set max_period to 10"),
    (0.5, 1, "maxent", r"drops 0\. Set max_period to 2 or more"),
    (-0.1, 8, "maxent", r"'rate' is -0\.1\. Allowed: a number from 0 to below 1"),
    (1.0, 8, "maxent", r"'rate' is 1\.0"),
    (math.nan, 8, "maxent", r"'rate' is nan"),
    ("0.5", 8, "maxent", r"'rate' is '0\.5'"),
    (0.5, 0, "maxent", r"'max_period' is 0\. Allowed: an int of at least 1"),
    (0.5, 2.0, "maxent", r"'max_period' is 2\.0"),
    (0.5, 8, "maxnet", r"Unknown method 'maxnet'\. Known: maxent, .* Did you mean 'maxent'\?"),
]


@pytest.mark.parametrize(("rate", "n", "method", "message"), REFUSED)
def test_refuses(rate: object, n: object, method: object, message: str) -> None:
    with pytest.raises(DistributionError, match=message):
        search_distribution(rate, n, method)  # type: ignore[arg-type]


def test_refuses_a_weight_that_is_none() -> None:
    with pytest.raises(DistributionError, match="'entropy_weight' is 0"):
        search_distribution(0.5, 8, "sgd", entropy_weight=0)
