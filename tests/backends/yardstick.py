"""The yardstick of the backends: the original program, run with the masks that were drawn."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import ardd

# Rounding only: the same sums in another order. Largest error relative to the largest value, of
# a few hundred terms each: some hundred times the unit of the type, 2**-53, 2**-24 and 2**-8.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}

EAGER: dict[str, Any] = {"target": "eager", "pattern": "block", "strict": True}
"""Options that structure every dropout that can be, without the time that Inductor takes."""


class Net(nn.Module):
    """Two dropouts between three layers."""

    def __init__(self, p: float = 0.5, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(16, width)
        self.drop = nn.Dropout(p)
        self.second = nn.Linear(width, width)
        self.again = nn.Dropout(p)
        self.last = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.first(x).relu())
        h = self.again(torch.nn.functional.gelu(self.second(h)))
        return self.last(h)  # type: ignore[no-any-return]


class Run(NamedTuple):
    """One step forward and backward."""

    output: Tensor
    grads: dict[str, Tensor]
    draws: list[ardd.Draw]


def step(fn: Callable[..., Tensor], model: nn.Module, *inputs: Tensor) -> Run:
    """Runs ``fn`` and the backward of a loss whose gradient differs at every output."""
    model.zero_grad()
    for x in inputs:
        x.grad = None
    with ardd.record_masks() as draws:
        output = fn(*inputs)
        weights = torch.arange(1, output.numel() + 1, device=output.device).view(output.shape).cos()
        torch.autograd.backward((output.float() * weights.float()).sum())
    named = [*model.named_parameters(), *((f"input {i}", x) for i, x in enumerate(inputs))]
    grads = {name: x.grad.clone() for name, x in named if x.grad is not None}
    return Run(output.detach(), grads, list(draws))


def compiled_net(**kwargs: Any) -> tuple[Callable[..., Tensor], Net]:
    model = Net(**kwargs)
    compiled: Callable[..., Tensor] = torch.compile(model, backend="ardd", options=EAGER)
    return compiled, model


def same_draws(first: Run, second: Run) -> bool:
    pairs = zip(first.draws, second.draws, strict=True)
    return all(torch.equal(a.kept, b.kept) for a, b in pairs)


def mask_of(decision: ardd.Decision, draw: ardd.Draw) -> Tensor:
    """Returns the dense mask that a draw stands for."""
    assert decision.taken
    if isinstance(draw, ardd.TileDraw):
        rows, columns = decision.shape
        assert isinstance(rows, int)
        assert isinstance(columns, int)
        return draw.mask((rows, columns))
    assert decision.dim is not None
    assert decision.block is not None
    kept = torch.zeros(draw.n_blocks, dtype=torch.float64)
    kept[draw.kept] = draw.n_blocks / len(draw.kept)
    shape = [1] * len(decision.shape)
    shape[decision.dim] = draw.n_blocks * decision.block
    return kept.repeat_interleave(decision.block).view(shape)


@contextlib.contextmanager
def replayed(decisions: Sequence[ardd.Decision], draws: Sequence[ardd.Draw]) -> Iterator[None]:
    """Gives the dropouts of the program, in its order, the masks that were drawn."""
    by_site = {draw.site: draw for draw in draws}
    masks = iter([mask_of(decision, by_site[decision.site]) for decision in decisions])

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return x * next(masks).to(x.dtype) if training and p > 0 else x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "dropout", dropout)
        yield
    assert next(masks, None) is None, "a mask was drawn that the program does not use"


def assert_close(
    got: Tensor, expected: Tensor, what: str, dtype: torch.dtype | None = None
) -> None:
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), what
    error = (got.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    assert error <= TOLERANCE[dtype or expected.dtype] * scale, f"{what}: {error} of {scale}"
    assert math.isfinite(scale), what


def assert_same_step(got: Run, expected: Run, dtype: torch.dtype | None = None) -> None:
    assert_close(got.output, expected.output, "output", dtype)
    assert got.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        assert_close(got.grads[name], grad, name, dtype)


def check_exact(
    fn: Callable[..., Tensor], model: nn.Module, *inputs: Tensor, dtype: torch.dtype | None = None
) -> Run:
    """Proves that a compiled ``fn`` of ``model`` is the masked program, forward and backward."""
    got = step(fn, model, *inputs)
    sites = {draw.site for draw in got.draws}
    every = (graph.decisions for graph in reversed(ardd.report().graphs))
    decisions = next(found for found in every if {d.site for d in found} == sites)
    with replayed(decisions, got.draws):
        expected = step(model.forward, model, *inputs)
    assert_same_step(got, expected, dtype)
    return got


def run_python(code: str, *args: str, env: Mapping[str, str] = os.environ) -> str:
    """Runs a program in a process of its own, warnings being errors, and returns what it prints."""
    flags = ["-W", "error", "-W", "ignore:`torch.jit:DeprecationWarning"]
    done = subprocess.run(
        [sys.executable, *flags, "-c", code, *args],
        env={**env, "TORCHINDUCTOR_COMPILE_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


PACKAGE = Path(ardd.__file__).parent
