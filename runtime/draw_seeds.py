"""The op that draws the seeds of a graph: the only thing that torch's generator is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def draw(n_seeds: int, device: torch.device) -> Tensor:
    """Draws a seed for every dropout, from torch's default generator of ``device``.

    Dropout number i gets the i-th seed whatever becomes of it, and everything that is random about
    it is a function of that seed. So a graph with and one without gradients, another plan, and
    eager code that draws seed by seed (`ardd.eager_masks`) all drop the same from the same state of
    the generator. Never waits for the device.

    Args:
        n_seeds: Seeds to draw.
        device: Where to draw and where the result lives.

    Returns:
        int32 ``[n_seeds, 2]``: 64 random bits each.
    """
    least, most = -(2**63), 2**63 - 1
    if device.type == "cpu":  # one call advances the generator as so many calls do
        seeds = torch.randint(least, most, (n_seeds,), dtype=torch.int64)
    else:
        seeds = torch.empty(n_seeds, dtype=torch.int64, device=device)
        for number in range(n_seeds):
            seeds[number : number + 1].random_(least, most)
    return seeds.view(torch.int32).view(n_seeds, 2)


def _fake(n_seeds: int, device: torch.device) -> Tensor:
    return torch.empty(n_seeds, 2, dtype=torch.int32, device=device)


_library: Any = torch.library  # untyped
_LIB = _library.Library("ardd", "FRAGMENT")
_LIB.define(
    "draw_seeds(int n_seeds, Device device) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)
# No argument is a tensor, so that no backend key is set and only this alias key is looked up.
_LIB.impl("draw_seeds", draw, "CompositeExplicitAutograd")
_library.register_fake("ardd::draw_seeds", _fake, lib=_LIB)

draw_seeds = torch.ops.ardd.draw_seeds.default
"""``draw_seeds(n_seeds, device) -> seeds``, see ``draw``."""
