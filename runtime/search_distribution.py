"""Distributions over periods: how often a row pattern keeps all, every second, every third unit.

A period i keeps one unit in i, so it drops at the rate (i - 1) / i; a distribution over the periods
1..N drops at the mean of these rates. Periods and probabilities have no unit, entropies are nats.

Song et al. 2018, "Approximate Random Dropout", https://arxiv.org/abs/1805.08939, search such a
distribution by gradient descent. Their first prototype (https://github.com/rudongyu, 2017) matched
how often two units are kept together as well. Both are here, beside the closed form of what the
first one converges to and the distribution whose rate varies least from step to step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..core.errors import DistributionError

_ETA: Final = 2.0**20
"""Beyond it all of the probability is on one period, to the last bit of a float64."""


@dataclasses.dataclass(frozen=True)
class PeriodDistribution:
    """Probabilities of the periods 1..N, for one drop rate."""

    rate: float
    """Drop rate asked for."""
    probabilities: tuple[float, ...]
    """That of period 1 first; they add up to 1."""

    @property
    def mean_rate(self) -> float:
        """Drop rate over many steps: the rate asked for, up to how far a search converged."""
        return math.fsum(p * rate_of(i) for i, p in self._periods())

    @property
    def entropy(self) -> float:
        """Entropy of the period, in nats."""
        return 0.0 - math.fsum(p * math.log(p) for p in self.probabilities if p > 0)

    @property
    def rate_variance(self) -> float:
        """Variance of the drop rate from step to step.

        That of Bernoulli masks of n units is p (1 - p) / n, next to nothing.
        """
        mean = self.mean_rate
        return math.fsum(p * (rate_of(i) - mean) ** 2 for i, p in self._periods())

    @property
    def no_dropout(self) -> float:
        """Probability of a step without any dropout."""
        return self.probabilities[0]

    def _periods(self) -> enumerate[float]:
        return enumerate(self.probabilities, 1)


def rate_of(period: int) -> float:
    """Returns the share of units that a period drops."""
    return (period - 1) / period


def search_distribution(
    rate: float, max_period: int, method: str = "maxent", *, entropy_weight: float = 1e-3
) -> PeriodDistribution:
    """Searches probabilities of the periods 1..``max_period`` whose mean drop rate is ``rate``.

    There are many; ``method`` says which one:

    - ``"maxent"``: the one of largest entropy, p_i ~ exp(eta (i - 1) / i); eta by bisection.
    - ``"sgd"``: a softmax whose squared rate error plus ``entropy_weight`` times its negative
      entropy is minimised by SGD, as Song et al. describe it. Tends to ``"maxent"`` as the
      weight falls. The loss, its weight and the stopping rule are ours: no code of theirs is
      public.
    - ``"pairwise"``: the one that keeps two units at distance a together, for a = 1..N-1, as often
      as independent draws would: the least sum over a of the distances of P(a) to (1 - rate)^2,
      as a linear program. The prototype of 2017 weighs this sum by 0.2 against 0.8 times the error
      of the rate, which is met exactly here, and searches whole counts by coordinates.
    - ``"narrow"``: at most two neighbouring periods around 1 / (1 - rate), so that the rate varies
      least from step to step. Not in the papers.

    The result depends on the arguments alone; no random numbers are drawn.

    Args:
        rate: mean drop rate, from 0 to (N - 1) / N.
        max_period: N, the largest period.
        method: which distribution.
        entropy_weight: weight of the entropy with ``"sgd"``, above 0.

    Returns:
        The distribution.

    Raises:
        DistributionError: no distribution over these periods has this rate, or an argument is not
            what it must be.
    """
    methods = _methods(entropy_weight)
    if method not in methods:
        raise DistributionError.unknown_method(method, methods)
    if type(max_period) is not int or max_period < 1:
        raise DistributionError.bad_value("max_period", max_period, "an int of at least 1")
    if type(rate) not in (int, float) or not 0 <= rate < 1:
        raise DistributionError.bad_value("rate", rate, "a number from 0 to below 1")
    if not 0 < entropy_weight < math.inf:
        raise DistributionError.bad_value("entropy_weight", entropy_weight, "a number above 0")
    if rate > rate_of(max_period):
        raise DistributionError.infeasible(rate, max_period)
    # A compiler asks while tensors have no values, and the user's default device may be another.
    with _disable_current_modes(), torch.device("cpu"):
        found = methods[method](float(rate), max_period).clamp(min=0.0)
        probabilities = (found / found.sum()).tolist()
    return PeriodDistribution(float(rate), tuple(probabilities))


def _methods(entropy_weight: float) -> Mapping[str, Callable[[float, int], Tensor]]:
    return {
        "maxent": _maxent,
        "sgd": functools.partial(_sgd, entropy_weight=entropy_weight),
        "pairwise": _pairwise,
        "narrow": _narrow,
    }


def _rates(n: int) -> Tensor:
    """Returns the drop rate of every period, float64 ``[n]``."""
    return torch.tensor([rate_of(i) for i in range(1, n + 1)], dtype=torch.float64)


def _maxent(rate: float, n: int) -> Tensor:
    """Bisects eta: the mean rate grows with it."""
    if rate in (0.0, rate_of(n)):  # at an infinite eta
        return _narrow(rate, n)
    rates = _rates(n)
    low, high = -_ETA, _ETA
    while low < (eta := (low + high) / 2) < high:
        if float(torch.softmax(eta * rates, 0) @ rates) < rate:
            low = eta
        else:
            high = eta
    return torch.softmax(high * rates, 0)


def _sgd(rate: float, n: int, *, entropy_weight: float) -> Tensor:
    """Minimises the squared rate error minus the weighted entropy, from the uniform distribution.

    The gradient is written out: autograd is slow on so few numbers. Momentum waits until the rate
    is about right: on the long way there it overshoots into a corner of the softmax, where
    gradients vanish.
    """
    rates = _rates(n)
    logits = torch.nn.Parameter(torch.zeros(n, dtype=torch.float64))
    optimizer = torch.optim.SGD([logits], lr=5.0)
    for step in range(20_000):
        if step == 1000:
            optimizer = torch.optim.SGD([logits], lr=10.0, momentum=0.9)
        log_p = torch.log_softmax(logits.detach(), 0)
        p = log_p.exp()
        slope = 2 * (p @ rates - rate) * rates + entropy_weight * log_p  # by p, up to a constant
        gradient = p * (slope - p @ slope)
        if float(gradient.abs().max()) < 1e-5 * entropy_weight:
            break
        logits.grad = gradient
        optimizer.step()
    return torch.softmax(logits.detach(), 0)


def _narrow(rate: float, n: int) -> Tensor:
    """Mixes the period below 1 / (1 - rate) with the one above."""
    found = torch.zeros(n, dtype=torch.float64)
    low = max(i for i in range(1, n + 1) if rate_of(i) <= rate)
    if low == n:
        found[n - 1] = 1.0
        return found
    share = (rate - rate_of(low)) / (rate_of(low + 1) - rate_of(low))
    found[low - 1], found[low] = 1 - share, share
    return found


def _pairwise(rate: float, n: int) -> Tensor:
    """Solves min sum_a |P(a) - keep^2| over distributions of the given rate, by the simplex method.

    Units at distance a are both kept by the periods that divide a: P(a) sums p_i / i over them.
    Each distance a has two slacks, for what P(a) is above and below. The two periods around
    1 / (1 - rate), with one slack a distance, are a vertex to begin at. Dantzig 1951, with the rule
    of Bland 1977, which cannot cycle.
    """
    keep = 1 - rate
    start = _narrow(rate, n)
    if n == 1:
        return start
    columns = torch.zeros(n + 1, n + 2 * (n - 1), dtype=torch.float64)
    for i in range(1, n + 1):
        columns[0, i - 1] = 1.0
        columns[1, i - 1] = rate_of(i)
        columns[1 + i :: i, i - 1] = 1 / i
    distances = torch.arange(n - 1)
    columns[2 + distances, n + distances] = -1.0
    columns[2 + distances, 2 * n - 1 + distances] = 1.0
    wanted = torch.tensor([1.0, rate] + [keep**2] * (n - 1), dtype=torch.float64)
    cost = torch.ones(columns.shape[1], dtype=torch.float64)
    cost[:n] = 0.0
    low = min(int(start.nonzero()[0]), n - 2)
    above = (columns[2:, :n] @ start > wanted[2:]).tolist()
    basis = [low, low + 1] + [n + j if up else 2 * n - 1 + j for j, up in enumerate(above)]
    basis = _simplex(columns, wanted, cost, basis)
    solution = torch.zeros_like(cost)
    solution[basis] = torch.linalg.solve(columns[:, basis], wanted)
    return solution[:n]


def _simplex(columns: Tensor, wanted: Tensor, cost: Tensor, basis: list[int]) -> list[int]:
    """Returns the columns of the best vertex of ``a x = b``, ``x >= 0``, from those of another."""
    basis = list(basis)
    while True:
        inverse = torch.linalg.inv(columns[:, basis])
        gain = cost - cost[basis] @ inverse @ columns
        entering = [j for j in (gain < -1e-9).nonzero().flatten().tolist() if j not in basis]
        if not entering:
            return basis
        step = inverse @ columns[:, entering[0]]
        limit = torch.where(step > 1e-9, (inverse @ wanted).clamp(min=0) / step, math.inf)
        ties = (limit <= limit.min() + 1e-12).nonzero().flatten().tolist()
        leaving = min(ties, key=lambda row: basis[row])
        basis[leaving] = entering[0]
