"""The masks that a compiled program draws, over many steps: rates, mean, and independence."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ardd

STEPS = 10_000
FEATURES, BLOCK = 48, 4
OPTIONS: dict[str, str | int | bool | Callable[..., object]] = {
    "pattern": "block",
    "block_size": BLOCK,
    "target": "eager",
    "strict": True,
}
# A bound that one of 10,000 right programs would break at one of the 12 * 12 places checked.
SIGMAS = 5.5


def masks(p: float) -> tuple[Tensor, ardd.Decision]:
    """Returns the mask of every step, [STEPS, FEATURES]: what comes out where ones go in."""

    def program(x: Tensor, weight: Tensor) -> Tensor:
        return F.dropout(x, p) @ weight

    compiled = torch.compile(program, backend="ardd", options=OPTIONS)
    x, weight = torch.ones(1, FEATURES), torch.eye(FEATURES)
    with torch.no_grad():
        drawn = torch.cat([compiled(x, weight) for _ in range(STEPS)])
    (decision,) = ardd.report().decisions
    assert decision.taken
    return drawn, decision


@pytest.mark.parametrize("p", [0.25, 0.5, 0.75])
def test_rates_mean_and_pairs(p: float) -> None:
    drawn, decision = masks(p)
    assert decision.p_used == p
    by_block = drawn.view(STEPS, -1, BLOCK)
    assert (by_block == by_block[:, :, :1]).all(), "a block is kept or dropped as a whole"
    kept = (by_block[:, :, 0] != 0).double()
    n = kept.shape[1]
    keep = 1 - p

    rate = kept.mean(0)
    assert ((rate - keep).abs() <= SIGMAS * math.sqrt(keep * p / STEPS)).all()

    mean = drawn.double().mean(0)
    assert ((mean - 1).abs() <= SIGMAS * math.sqrt(p / keep / STEPS)).all()

    # Drawn without replacement: two blocks are both kept a little less often than keep ** 2.
    both = keep * (n * keep - 1) / (n - 1)
    pairs = kept.T @ kept / STEPS
    others = ~torch.eye(n, dtype=torch.bool)
    bound = SIGMAS * math.sqrt(both * (1 - both) / STEPS)
    assert ((pairs - both).abs()[others] <= bound).all()

    # And one step says nothing about the next.
    next_too = kept[:-1].T @ kept[1:] / (STEPS - 1)
    bound = SIGMAS * math.sqrt(keep**2 * (1 - keep**2) / STEPS)
    assert ((next_too - keep**2).abs() <= bound).all()


def test_two_dropouts_draw_apart() -> None:
    """Equal dropouts of one graph have masks of their own, also where their draws look alike."""

    def program(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return F.dropout(x, 0.5) @ weight, F.dropout(x, 0.5) @ weight

    compiled = torch.compile(program, backend="ardd", options=OPTIONS)
    x, weight = torch.ones(1, FEATURES), torch.eye(FEATURES)
    with torch.no_grad():
        a, b = (
            torch.cat(masks)
            for masks in zip(*(compiled(x, weight) for _ in range(2000)), strict=True)
        )
    blocks = FEATURES // BLOCK
    together = ((a != 0) & (b != 0)).double().mean(0)
    assert ((together - 0.25).abs() <= SIGMAS * math.sqrt(0.25 * 0.75 / 2000)).all()
    assert (a != b).any(1).double().mean() > 1 - 6 / math.comb(blocks, blocks // 2)
