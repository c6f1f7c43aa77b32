"""What the support analysis knows of one dimension of one tensor."""

from __future__ import annotations

import dataclasses
from typing import Final


@dataclasses.dataclass(frozen=True, order=True)
class KeptAxis:
    """A dimension seen as a kept set: which of its positions survive a dropout.

    Dropping ``dim`` of ``site``'s mask in blocks of B features keeps position j of a tensor's
    dimension iff block ``j // (B * inner) mod (size // B)`` is kept. The modulus lets a merged
    dimension keep its fact: ``[N, C] -> [N * C]`` repeats the kept set N times, and
    ``[C, H, W] -> [C * H * W]`` stretches every feature to ``inner = H * W`` positions.
    """

    site: int
    """Number of the dropout."""
    dim: int
    """Dimension of its mask that is dropped."""
    size: int
    """Size of that dimension."""
    inner: int = 1
    """Consecutive positions that one feature covers."""
    groups: int = 1
    """Groups of rows that have a kept set each. Above 1 a dimension is cut together with the groups
    only: the tensor has them as its first dimension."""

    def scaled(self, inner: int) -> KeptAxis:
        """Returns the same kept set with every feature covering ``inner`` positions."""
        if inner == self.inner:
            return self
        return KeptAxis(self.site, self.dim, self.size, inner, self.groups)


class Facts(frozenset[KeptAxis]):
    """The kept axes that hold for one dimension: a set, as every candidate is analysed at once."""

    def __and__(self, other: object) -> Facts:
        if isinstance(other, Everything):
            return self
        assert isinstance(other, Facts)
        return Facts(super().__and__(other))

    def __or__(self, other: object) -> Facts:
        if isinstance(other, Everything):
            return other
        assert isinstance(other, Facts)
        return Facts(super().__or__(other))


class Everything(Facts):
    """The facts of a constant zero: it is zero outside any kept set."""

    def __and__(self, other: object) -> Facts:
        assert isinstance(other, Facts)
        return other

    def __or__(self, other: object) -> Facts:
        return self


NOTHING: Final = Facts()
EVERYTHING: Final = Everything()
