"""``torch._inductor.config.fallback_random`` promises the masks of eager mode; ardd keeps it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ardd

TARGETS = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def fallback_random() -> Iterator[None]:
    with torch._inductor.config.patch(fallback_random=True):
        yield


def check(
    fn: Callable[..., Any], *inputs: Tensor, steps: int = 2, bits: bool = False, **options: Any
) -> tuple[ardd.Decision, ...]:
    """Compares steps from one state of the generator, gradients included.

    Args:
        fn: a function or a module.
        *inputs: what it is called with.
        steps: how many steps there are.
        bits: whether results have to be equal bit by bit.
        **options: of ardd.
    """
    given: dict[str, Any] = {"pattern": "random", "strict": True, "target": "eager"} | options
    compiled = torch.compile(fn, backend="ardd", fullgraph=True, options=given)
    leaves = [x for x in inputs if x.requires_grad]
    leaves += list(fn.parameters()) if isinstance(fn, nn.Module) else []

    def run(fn: Callable[..., Any]) -> list[Tensor]:
        torch.manual_seed(7)
        results = []
        for _ in range(steps):
            y = fn(*inputs)
            results.append(y.detach())
            results += torch.autograd.grad(y.square().sum(), leaves) if leaves else []
        return [*results, torch.get_rng_state()]

    run(compiled)
    tolerance = 0.0 if bits else 1e-4
    for ours, stock in zip(run(compiled), run(fn), strict=True):
        torch.testing.assert_close(ours, stock, rtol=tolerance, atol=tolerance)
    (graph,) = ardd.report().graphs
    assert graph.failure is None
    return graph.decisions


DROPOUTS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "dropout": (lambda x: F.dropout(x, 0.5), (64, 128)),
    "a rate without an exact complement": (lambda x: F.dropout(x, 0.1), (64, 128)),
    "module": (nn.Dropout(0.3), (64, 128)),
    "dropout1d": (lambda x: F.dropout1d(x, 0.5), (8, 32, 6)),
    "dropout2d": (lambda x: F.dropout2d(x, 0.5), (8, 32, 6, 5)),
    "dropout2d, module": (nn.Dropout2d(0.25), (8, 32, 6, 5)),
    "dropout3d": (lambda x: F.dropout3d(x, 0.5), (8, 32, 3, 2, 2)),
    "inplace": (lambda x: F.dropout(x * 1, 0.5, inplace=True), (64, 128)),
    "turned": (lambda x: F.dropout(x.transpose(0, 1), 0.5), (64, 128)),
    "permuted": (lambda x: F.dropout(x.permute(2, 0, 1), 0.5), (4, 16, 24)),
    "turned channels": (lambda x: F.dropout2d(x.transpose(0, 1), 0.5), (32, 8, 6, 5)),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", DROPOUTS)
def test_dropouts(name: str, target: str) -> None:
    """The masks are eager's, bit by bit, and so is the state that the generator is left in."""
    fn, shape = DROPOUTS[name]
    (decision,) = check(fn, torch.ones(shape), target=target, bits=True)
    assert decision.reason is ardd.Reason.PATTERN_RANDOM


@pytest.mark.parametrize("target", TARGETS)
def test_channels_last(target: str) -> None:
    """Eager mode fills a mask in the order of memory."""
    x = torch.ones(2, 6, 5, 4).to(memory_format=torch.channels_last)
    check(lambda x: F.dropout(x, 0.5), x, target=target, bits=True)


@pytest.mark.parametrize("name", DROPOUTS)
def test_gradients(name: str) -> None:
    """Backward has the masks of the forward, though nothing can compute them again."""
    fn, shape = DROPOUTS[name]
    check(lambda x: fn(x.sin()), torch.randn(shape).requires_grad_())


def convolutions() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Dropout2d(0.5), nn.Conv2d(16, 8, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(0.25), nn.Flatten(), nn.Linear(128, 5))


def mlp() -> nn.Module:
    layers = [nn.Dropout(0.2), nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 8))


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True)


SITES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (mlp, (32, 16), 3),
    "convolutions": (convolutions, (4, 3, 8, 8), 2),
    "encoder": (encoder, (4, 6, 16), 3),
}


def outside_attention(decisions: tuple[ardd.Decision, ...]) -> list[ardd.Reason]:
    """Returns the reasons of all but the dropout inside attention, which torch's own maths draw."""
    reasons = [decision.reason for decision in decisions]
    return [reason for reason in reasons if reason is not ardd.Reason.INSIDE_SDPA]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SITES)
def test_several_sites(name: str, target: str) -> None:
    """They draw in the order of the program, forward and backward, step after step."""
    build, shape, n_sites = SITES[name]
    decisions = check(build(), torch.randn(shape), target=target)
    assert outside_attention(decisions) == [ardd.Reason.PATTERN_RANDOM] * n_sites


@pytest.mark.parametrize("name", SITES)
def test_auto_structures_nothing(name: str) -> None:
    build, shape, n_sites = SITES[name]
    decisions = check(build(), torch.randn(shape), pattern="auto")
    assert outside_attention(decisions) == [ardd.Reason.FALLBACK_RANDOM] * n_sites


def test_a_pattern_that_is_named_structures_all_the_same() -> None:
    """Of the other dropouts the masks are eager's."""
    model, x = mlp(), torch.randn(32, 16)
    options: dict[str, Any] = {"pattern": "block", "structure": ("hidden",), "target": "eager"}
    report = ardd.explain(model, x, options=options | {"strict": True})
    reasons = [decision.reason for decision in report.decisions]
    assert reasons == [ardd.Reason.NOT_CHOSEN, ardd.Reason.STRUCTURED, ardd.Reason.STRUCTURED]
    assert report.after.count("aten.bernoulli") == 1


@pytest.mark.parametrize("target", TARGETS)
def test_hand_made_masks_are_left_alone(target: str) -> None:
    """They are drawn as the program says, in turn with the others."""

    def fn(x: Tensor) -> Tensor:
        x = F.dropout(x, 0.5)
        x = x * (torch.rand_like(x) < 0.7) / 0.7
        return F.dropout(x, 0.25)

    by_kind = {d.kind: d for d in check(fn, torch.randn(32, 64).requires_grad_(), target=target)}
    assert by_kind["rand_like"].reason is ardd.Reason.HAND_MASK
    assert "fallback_random" in by_kind["rand_like"].detail
    assert by_kind["dropout"].reason is ardd.Reason.PATTERN_RANDOM


def test_it_is_read_anew() -> None:
    """Without it the masks are ours, which are not eager's."""
    x = torch.ones(64, 128)
    options: dict[str, Any] = {"pattern": "random", "target": "eager"}
    compiled = torch.compile(lambda x: F.dropout(x, 0.5), backend="ardd", options=options)
    torch.manual_seed(0)
    with torch._inductor.config.patch(fallback_random=False):
        ours = compiled(x)
    torch.manual_seed(0)
    assert not torch.equal(ours, F.dropout(x, 0.5))
