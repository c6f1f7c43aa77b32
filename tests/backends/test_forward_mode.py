"""Forward-mode AD through a structured dropout: exact given the mask, as the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ardd
from ardd.core.decisions import Reason

FIRST = nn.Linear(16, 64).double()
LAST = nn.Linear(64, 2).double()

Program = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Any]


def jvp(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Any:
    return torch.func.jvp(f, (x,), (v,))


def hessian_vector(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Any:
    def loss(x: Tensor) -> Tensor:
        return f(x).square().sum()

    return torch.func.jvp(torch.func.grad(loss), (x,), (v,))


def gradient_of_jvp(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Any:
    return torch.func.grad(lambda x: torch.func.jvp(f, (x,), (v,))[1].sum())(x)


def network(drop: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: LAST(drop(FIRST(x).tanh()))


def mask_of(draw: Any) -> Tensor:
    mask = torch.zeros(draw.n_blocks, dtype=torch.double)
    mask[draw.kept] = draw.n_blocks / len(draw.kept)
    return mask.repeat_interleave(64 // draw.n_blocks)


@pytest.mark.parametrize("target", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("program", [jvp, hessian_vector, gradient_of_jvp])
def test_exact(program: Program, target: str) -> None:
    dropped = network(nn.Dropout(0.5))
    options: dict[str, Any] = {"pattern": "block", "target": target, "strict": True}
    compiled = torch.compile(lambda x, v: program(dropped, x, v), backend="ardd", options=options)
    x, v = torch.randn(8, 16, dtype=torch.double), torch.randn(8, 16, dtype=torch.double)
    with ardd.record_masks() as draws:
        have = compiled(x, v)
    assert [d.reason for d in ardd.report().decisions] == [Reason.STRUCTURED]
    mask = mask_of(draws[0])
    torch.testing.assert_close(have, program(network(lambda h: h * mask), x, v))
