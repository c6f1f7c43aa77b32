"""Patterns beside blocks: exact given the mask, with the keep rates that they promise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.replay import check_exact
from tests.test_exactness import DYNAMIC, MODELS
from tests.test_statistics import DRAWS, WIDTH, bound, masks
from torch.nn import functional as F

import ardd

NAMES = ("mlp", "block", "convolutions", "channels last", "language model", "mixer", "checkpoint")
PATTERNS = ("window",)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", NAMES)
def test_model(name: str, pattern: str) -> None:
    module, inputs = MODELS[name]()
    decisions = check_exact(module.double(), inputs, options={"pattern": pattern})
    taken = [decision for decision in decisions if decision.taken]
    assert taken
    assert {decision.pattern for decision in taken} == {pattern}


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["mlp", "block", "convolutions"])
def test_model_through_inductor(name: str, pattern: str) -> None:
    module, inputs = MODELS[name]()
    options = {"pattern": pattern, "target": "inductor"}
    with torch._inductor.config.patch(fallback_random=True):
        check_exact(module.double(), inputs, options=options)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["mlp", "block", "convolutions"])
def test_dynamic_shapes(name: str, pattern: str) -> None:
    """One graph serves every batch."""
    module = DYNAMIC[name](4)[0].double()
    options: dict[str, Any] = {"pattern": pattern, "target": "eager", "strict": True}
    compiled = torch.compile(module, backend="ardd", dynamic=True, options=options)
    for number, size in enumerate((4, 7, 3)):
        check_exact(module, DYNAMIC[name](size)[1], seed=number, compiled=compiled)
    assert len(ardd.report().graphs) == 1


@pytest.mark.parametrize("pattern", PATTERNS)
def test_without_gradients(pattern: str) -> None:
    module, inputs = MODELS["mlp"]()
    with torch.no_grad():
        decisions = check_exact(module.double(), inputs, options={"pattern": pattern})
    assert all(decision.taken for decision in decisions)


def test_window_rates_and_means() -> None:
    """Of 32 features 20 neighbours on the ring are kept: P(i) = 20/32 and E[mask] = 1."""
    seen = masks(lambda x: F.dropout(x, 0.375), pattern="window", block_size=1)
    (decision,) = ardd.report().decisions
    assert (decision.pattern, decision.p_used) == ("window", 0.375)
    kept = (seen > 0).double()
    assert (kept.sum(1) == 20).all()
    assert ((kept - kept.roll(1, 1)).abs().sum(1) == 2).all()
    assert (kept.mean(0) - 0.625).abs().max() < bound(0.625)
    assert (seen.mean(0) - 1).abs().max() < bound(0.625) / 0.625
    together = kept.T @ kept / DRAWS
    for distance in range(1, WIDTH // 2):
        wanted = max(0, 20 - distance) / 32 + max(0, distance - 12) / 32  # the way round as well
        pairs = torch.stack([together[i, (i + distance) % WIDTH] for i in range(WIDTH)])
        assert (pairs - wanted).abs().max() < 5 * math.sqrt(0.25 / DRAWS)
