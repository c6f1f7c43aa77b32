"""Adds up what the products with one weight cost, dense and by tiles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction

import sympy
from torch import fx

from .cost_model import CostModel, Kind, OpCost, price
from .cut_graphs import size_hint
from .find_weight_uses import WeightUses, factors
from .relation import shape_of
from .tile_products import Tiling


class TilePricer:
    """Prices tilings of one weight, at the sizes of the example batch.

    Args:
        mask: the mask of the weight.
        found: the products that it shrinks.
        model: prices single ops.
    """

    def __init__(self, mask: fx.Node, found: WeightUses, model: CostModel) -> None:
        self._mask = mask
        self._found = found
        self._model = model
        self._elements = _count(mask)

    def saving(self, tiling: Tiling, p: float) -> float:
        """Returns the seconds of a step that a tiling saves.

        The products are priced as if the tiles met the rate: rounding it up is no merit. The
        multiplications with the mask are not priced, nor what takes their place: gradients are
        expanded where they were multiplied, which reads less and writes as much.
        """
        exact = Fraction(1 - p).limit_denominator(1000)
        dense = [self._op("random", self._mask, self._elements), *self._products(Fraction(1))]
        tiled = [self._op("draw", self._mask, 0), *self._products(exact), *self._copies(tiling)]
        return self._seconds(dense) - self._seconds(tiled)

    def flops(self, keep: Fraction) -> int:
        """Returns the FLOPs of the products with a share of the weight."""
        return sum(round(float(op.flops)) for op in self._products(keep))

    def _products(self, keep: Fraction) -> Iterator[OpCost]:
        share = sympy.Rational(keep.numerator, keep.denominator)
        nodes = [use.node for use in self._found.uses]
        nodes += [gradient.node for gradient in self._found.gradients]
        for node in nodes:
            a, b = factors(node)
            m, k, n = (size_hint(size) for size in (*shape_of(a), shape_of(b)[1]))
            moved = m * k + k * n + m * n - self._elements * (1 - share)
            value = a.meta["val"]
            yield OpCost(
                "product",
                str(node.target),
                (sympy.Integer(m), sympy.Integer(k), sympy.Integer(n)),
                2 * m * k * n * share,
                moved * value.element_size(),
                0,
                value.dtype,
            )

    def _copies(self, tiling: Tiling) -> Iterator[OpCost]:
        """Yields what puts inputs, weights and results in order, each once."""
        again = sympy.Rational(tiling.period + tiling.n_kept - 1, tiling.period)
        ordered, weights = {}, {}
        for use in self._found.uses:
            inner = int(use.contracts_columns)
            ordered[use.input, inner] = use.input.x
            weights[use.masked, use.steps, inner] = use.weight
            run = tiling.tile[1 - inner]
            yield self._op("gather", use.node, _count(use.node), run)
        for gradient in self._found.gradients:
            for side in (0, 1):
                given = gradient.operand(rows=side == 0)
                ordered[given, side] = given.x
        for (_, side), x in ordered.items():
            yield self._op("gather", x, _count(x) * again, tiling.tile[side])
        for weight in weights.values():
            share = sympy.Rational(tiling.n_kept, tiling.period)
            yield self._op("gather", weight, self._elements * share, tiling.tile[1])

    def _op(self, kind: Kind, node: fx.Node, elements: sympy.Expr | int, run: int = 0) -> OpCost:
        value = node.meta["val"]
        moved = 2 * sympy.sympify(elements) * value.element_size()
        return OpCost(
            kind,
            str(node.target),
            (sympy.sympify(elements),),
            sympy.sympify(elements),
            moved,
            run * value.element_size(),
            value.dtype,
        )

    def _seconds(self, ops: Iterable[OpCost]) -> float:
        device = self._mask.meta["val"].device
        return sum(price(self._model, op, device) for op in ops)


def _count(x: fx.Node) -> int:
    return size_hint(x.meta["val"].numel())
