"""Keeps whole rows of tokens, so that a weight gradient contracts the kept rows alone."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from .codec import FLOATS


def select_rows(x: Tensor, kept: int, sampled: bool) -> tuple[Tensor, Tensor]:
    """Selects rows by their norm: the largest, or a sample that leaves products unbiased.

    Sampling draws ``kept`` rows with replacement, row i with a probability q_i that grows with
    its norm, and divides each by ``kept * q_i``: ``g[rows].T @ values`` is ``g.T @ x`` on
    average. Adelman et al. 2021, "Faster Neural Network Training with Approximate Tensor
    Operations", https://arxiv.org/abs/1805.08079.

    Args:
        x: ``[n, features]``, floating.
        kept: ``1 <= kept <= n``.
        sampled: whether to sample; else the largest are kept, as they are.

    Returns:
        rows, int64 ``[kept]``, ascending; values, of x's type ``[kept, features]``.
    """
    norms = torch.linalg.vector_norm(x.to(torch.float32), dim=1)
    if not sampled:
        # NaN first, so that an overflow stays visible.
        rows = norms.nan_to_num(nan=torch.inf).topk(kept).indices.sort().values
        return rows, x[rows]
    # A floor keeps rows of small or zero norm possible, whose gradient may be large.
    norms = norms.nan_to_num(nan=torch.inf).clamp_max(torch.finfo(torch.float32).max)
    weights = norms / norms.max().clamp_min(torch.finfo(torch.float32).tiny)
    weights = weights + weights.mean() * 0.1 + torch.finfo(torch.float32).tiny
    chances = weights / weights.sum()
    rows = torch.multinomial(chances, kept, replacement=True).sort().values
    return rows, (x[rows] / (kept * chances[rows, None])).to(x.dtype)


def _fake(x: Tensor, kept: int, sampled: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(kept, dtype=torch.int64), x.new_empty(kept, x.shape[1])


_library: Any = torch.library  # untyped
_LIB = _library.Library("ardd", "FRAGMENT")
_LIB.define(
    "select_rows(Tensor x, int kept, bool sampled) -> (Tensor rows, Tensor values)",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)
_LIB.impl("select_rows", select_rows, "CompositeExplicitAutograd")
_library.register_fake("ardd::select_rows", _fake, lib=_LIB)


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """Whole rows of a matrix of tokens, for the operand of a weight gradient.

    The only encoding that is not decoded: backward multiplies the kept rows with the same rows of
    the gradient, which saves time as well as memory.
    """

    kept: int
    """Rows kept."""
    tokens: int
    """Rows there are."""
    sampled: bool = False
    """Whether they are a sample that leaves the gradient unbiased, or the largest."""
    exact: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """``rows 64:256`` or ``sampled rows 64:256``."""
        return f"{'sampled ' if self.sampled else ''}rows {self.kept}:{self.tokens}"

    def refusal(self, dtype: torch.dtype, row: int) -> str | None:
        """Returns why rows cannot be kept."""
        if dtype not in FLOATS:
            return f"{dtype} has no norm"
        smaller = self.payload_bytes(row, dtype) < self.tokens * row * dtype.itemsize
        return None if smaller else f"{self.name} is not smaller"

    def payload_bytes(self, row: int, dtype: torch.dtype) -> int:
        """Returns the bytes of the rows kept and of their numbers."""
        return self.kept * (row * dtype.itemsize + 8)
