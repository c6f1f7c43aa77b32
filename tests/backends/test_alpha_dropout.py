"""Alpha dropout has a mask of ours: it keeps mean and variance, and saves its seed alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ardd

SATURATION = -1.7580993408473766  # of SELU
RATES = (0.1, 0.5, 0.8)
N = 400_000


def compiled(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    given: dict[str, Any] = {"pattern": "random", "target": "eager", "strict": True}
    return torch.compile(fn, backend="ardd", fullgraph=True, options=given | options)


def affine(p: float) -> tuple[float, float, float]:
    """Returns what is multiplied, what is added, and what a dropped element becomes."""
    a = 1 / math.sqrt((1 - p) * (1 + p * SATURATION**2))
    return a, -a * p * SATURATION, a * (1 - p) * SATURATION


def inplace(x: Tensor, p: float) -> Tensor:
    y = x * 1
    F.alpha_dropout(y, p, True, inplace=True)
    return y


SPELLINGS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "F": lambda x, p: F.alpha_dropout(x, p, True),
    "torch": lambda x, p: torch.alpha_dropout(x, p, True),
    "module": lambda x, p: nn.AlphaDropout(p)(x),
    "inplace": inplace,
    "_": lambda x, p: torch.alpha_dropout_(x * 1, p, True),
}


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_mean_variance_and_rate(spelling: str, p: float) -> None:
    """Of numbers with mean 0 and variance 1; torch itself is held to the same bounds."""
    fn, x = SPELLINGS[spelling], torch.randn(N // 1000, 1000, dtype=torch.float64)
    _, _, dropped = affine(p)
    for run in (compiled(lambda x: fn(x, p)), lambda x: fn(x, p)):
        y = run(x)
        bound = 5 / math.sqrt(N)
        assert abs(y.mean()) < bound
        # The fourth moment is less than 10 for each of the rates.
        assert abs(y.var() - 1) < 3 * bound
        rate = ((y - dropped).abs() < 1e-9).double().mean()
        assert abs(rate - p) < bound * math.sqrt(p * (1 - p))
    (decision,) = ardd.report().decisions
    assert (decision.kind, decision.p) == ("alpha_dropout", p)


@pytest.mark.parametrize("target", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_values_and_gradients(spelling: str, target: str) -> None:
    """An element is dropped to one number, or scaled and shifted; the gradient is the scale."""
    p, fn = 0.3, SPELLINGS[spelling]
    scale, shift, dropped = affine(p)
    x = torch.randn(64, 128, requires_grad=True)
    y = compiled(lambda x: fn(x, p), target=target)(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    gone = grad == 0
    assert 0.25 < gone.float().mean() < 0.35
    torch.testing.assert_close(y, torch.where(gone, dropped, scale * x + shift))
    torch.testing.assert_close(grad, torch.where(gone, 0.0, scale))


def test_channels() -> None:
    """The feature dropouts drop whole channels."""
    p, x = 0.3, torch.randn(32, 64, 5, 3)
    scale, shift, dropped = affine(p)
    for fn in (nn.FeatureAlphaDropout(p), lambda x: torch.feature_alpha_dropout(x, p, True)):
        torch._dynamo.reset()
        y = compiled(fn)(x)
        gone = (y - dropped).abs() < 1e-6
        assert torch.equal(gone.any((2, 3)), gone.all((2, 3)))
        assert 0.25 < gone.float().mean() < 0.35
        torch.testing.assert_close(y, torch.where(gone, dropped, scale * x + shift))


def test_inplace_overwrites_its_input() -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 1
        return F.alpha_dropout(y, 0.3, True, inplace=True), y

    returned, y = compiled(fn)(torch.randn(64, 64))
    assert torch.equal(returned, y)


def test_masks_differ_from_step_to_step_and_repeat_with_the_seed() -> None:
    run, x = compiled(lambda x: F.alpha_dropout(x, 0.3, True)), torch.randn(64, 64)
    torch.manual_seed(5)
    first, second = run(x), run(x)
    torch.manual_seed(5)
    assert torch.equal(run(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("auto", ardd.Reason.ALPHA_DROPOUT),
        ("block", ardd.Reason.ALPHA_DROPOUT),
        ("row", ardd.Reason.ALPHA_DROPOUT),
        ("random", ardd.Reason.PATTERN_RANDOM),
    ],
)
def test_report(pattern: str, reason: ardd.Reason) -> None:
    """Left random between products, where an ordinary dropout would be structured."""
    layers = [nn.Linear(64, 256), nn.SELU(), nn.AlphaDropout(0.5), nn.Linear(256, 64)]
    model, options = nn.Sequential(*layers), {"pattern": pattern, "target": "eager"}
    report = ardd.explain(model, torch.randn(32, 64), options=options)
    (decision,) = report.decisions
    assert (decision.taken, decision.reason) == (False, reason)
    assert (decision.kind, decision.shape, decision.p_used) == ("alpha_dropout", (32, 256), 0.5)
    assert "left random" in " ".join(str(report).split())
