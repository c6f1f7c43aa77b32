"""Samples that a batch holds more than once: their dropouts stay random, all others do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ardd

COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "repeat": lambda x: x.repeat(2, 1),
    "tile": lambda x: x.tile(2, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 0),
    "expand": lambda x: x.unsqueeze(0).expand(3, -1, -1),
    "expand behind the batch": lambda x: x.unsqueeze(1).expand(-1, 3, -1),
    "expand and flatten": lambda x: x.unsqueeze(0).expand(3, -1, -1).reshape(-1, 32),
    "cat": lambda x: torch.cat([x, x]),
    "cat with another": lambda x: torch.cat([x, x.cos(), x]),
    "stack": lambda x: torch.stack([x, x]),
    "normalised and added to": lambda x: F.layer_norm(x.repeat(2, 1), [32]) + 1.0,
}
SINGLE: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "cat of two": lambda x: torch.cat([x, x.cos()]),
    "features twice": lambda x: torch.cat([x[:, :16], x[:, :16]], 1),
    "with random noise": lambda x: x.repeat(2, 1) + torch.randn(16, 32),
    "with noise": lambda x: x.repeat(2, 1) + torch.arange(16.0).unsqueeze(1),
    "one mean for all": lambda x: x - x.mean(0, keepdim=True).expand(8, -1),
}


class Net(nn.Module):
    """Two dropouts; ``copy`` is called before the first."""

    def __init__(self, copy: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.copy = copy
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 64)
        self.last = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.first(self.copy(x)).relu(), 0.5)
        h = F.dropout(self.second(h).relu(), 0.5)
        return self.last(h)  # type: ignore[no-any-return]


def found(module: nn.Module, pattern: str = "block") -> list[tuple[bool, str]]:
    report = ardd.explain(module, torch.randn(8, 32), options={"pattern": pattern})
    return [(decision.taken, decision.reason.name) for decision in report.decisions]


@pytest.mark.parametrize("name", COPIES)
def test_copies_stay_random(name: str) -> None:
    """The second dropout too: the first must not be all that tells copies apart."""
    assert found(Net(COPIES[name])) == [(False, "COPIES")] * 2


@pytest.mark.parametrize("pattern", ["grouped", "window", "row"])
def test_whatever_the_pattern(pattern: str) -> None:
    assert found(Net(COPIES["repeat"]), pattern) == [(False, "COPIES")] * 2


@pytest.mark.parametrize("name", SINGLE)
def test_others_are_structured(name: str) -> None:
    """No two positions are copies, or what is twice are features."""
    assert found(Net(SINGLE[name])) == [(True, "STRUCTURED")] * 2


def test_a_dropout_before_the_copies() -> None:
    """Samples there are single."""

    class Late(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = F.dropout(self.first(x).relu(), 0.5)
            h = F.dropout(self.second(h.repeat(2, 1)).relu(), 0.5)
            return self.last(h)  # type: ignore[no-any-return]

    assert found(Late(COPIES["cat"])) == [(True, "STRUCTURED"), (False, "COPIES")]


def test_learned_queries_are_no_samples() -> None:
    """Parameters are the same for every sample by nature."""

    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(torch.randn(1, 4, 32))
            self.first, self.last = nn.Linear(32, 64), nn.Linear(64, 8)

        def forward(self, x: Tensor) -> Tensor:
            q = self.queries.expand(x.shape[0], -1, -1) + x.unsqueeze(1)
            return self.last(F.dropout(self.first(q).relu(), 0.5))  # type: ignore[no-any-return]

    assert found(Queries()) == [(True, "STRUCTURED")]


def test_the_report_says_that_masks_are_drawn() -> None:
    assert "left random" in str(ardd.explain(Net(COPIES["cat"]), torch.randn(8, 32)))


def test_two_views_differ() -> None:
    net = Net(COPIES["repeat_interleave"])
    compiled = torch.compile(net, backend="ardd", options={"target": "eager"})
    views = compiled(torch.randn(8, 32)).view(8, 2, 8)
    assert not torch.equal(views[:, 0], views[:, 1])
