"""Puts the tiles of a weight in order by classes, so that products with it become one ``bmm``.

Kept are the tiles whose column is of one of ``n_kept`` classes that belong to the class of their
row (`ardd.runtime.draw_tiles`). With rows and columns ordered by classes, what is kept lies in
``period`` dense blocks along a diagonal:

    y = mm(x, w.t())    =>    y[:, a] = x[:, kept by a] @ w[a, kept by a].t() for a class a of rows

Shapes: p period, n samples, t tiles of a class, b features of a tile, w = t * b features of a
class, k = n_kept * w features that a class keeps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from fractions import Fraction

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ..runtime.draw_tiles import draw_tiles
from .emit import Emitter
from .find_weight_uses import Features, Gradient, Step, Use
from .seed_masks import emit_bits

aten, prims = torch.ops.aten, torch.ops.prims


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a weight is cut into tiles, and how many of them stay."""

    shape: tuple[int, int]
    """Sizes of the weight."""
    tile: tuple[int, int]
    """Sizes of a tile."""
    period: int
    """Classes of rows, and of columns."""
    n_kept: int
    """Classes of columns that a row keeps."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return self.shape[0] // self.tile[0], self.shape[1] // self.tile[1]

    @property
    def keep(self) -> Fraction:
        """Share of the weight that stays."""
        return Fraction(self.n_kept, self.period)

    @property
    def p_used(self) -> float:
        """Drop rate in effect."""
        return float(1 - self.keep)


@dataclasses.dataclass
class _Side:
    """The rows or the columns of the tiles."""

    order: fx.Node
    """int64 ``[(p + n_kept - 1) * t]``: the tiles by classes, some at one end once more."""
    slot: tuple[fx.Node, fx.Node]
    """int64 ``[p * t]`` each: the class of every tile, and its place in that."""
    block: int
    """Features of a tile, b."""
    count: int
    """Tiles of a class, t."""
    start: int
    """Classes that stand in ``order`` before the first one."""

    @property
    def width(self) -> int:
        """Features of a class, w."""
        return self.block * self.count


class TiledWeight:
    """One draw, and the products with what it keeps.

    Args:
        emit: emits.
        start: where to draw: before all that the forward computes.
        mask: the mask that is drawn.
        tiling: the tiles.
        mean: expectation of the mask.
    """

    def __init__(
        self,
        emit: Emitter,
        start: fx.Node,
        mask: fx.Node,
        tiling: Tiling,
        mean: float,
    ) -> None:
        self._emit = emit
        self._tiling = tiling
        self._scale = mean * tiling.period / tiling.n_kept
        self._ordered: dict[tuple[Features, bool], fx.Node] = {}
        self._weights: dict[tuple[fx.Node, tuple[Step, ...], bool], fx.Node] = {}
        sizes = (*tiling.grid, tiling.period, tiling.n_kept)
        bits = emit_bits(emit, start, mask, [sum(tiling.grid)])
        with emit.marked(CheckpointPolicy.MUST_SAVE):  # recomputed, they would be sorted again
            self.drawn = emit.op(start, draw_tiles, bits, *sizes, mask.args[4])
            rows, columns, row_slot, column_slot, self._place = (
                emit.op(start, operator.getitem, self.drawn, i) for i in range(5)
            )
        again = tiling.n_kept - 1
        self._rows = self._side(start, rows, row_slot, 0, again)
        self._columns = self._side(start, columns, column_slot, 1, 0)

    def _side(self, start: fx.Node, order: fx.Node, slot: fx.Node, dim: int, first: int) -> _Side:
        tiling = self._tiling
        pair = [self._emit.op(start, aten.select.int, slot, 0, i) for i in (0, 1)]
        count = tiling.grid[dim] // tiling.period
        return _Side(order, (pair[0], pair[1]), tiling.tile[dim], count, first)

    def product(self, use: Use) -> fx.Node:
        """Returns the product with the masked weight, in the sizes of the original."""
        emit, node = self._emit, use.node
        inner, outer = self._rows, self._columns
        if use.contracts_columns:
            inner, outer = outer, inner
        x_nk = self._in_order(node, use.input, inner)
        w_pkw = self._weight(node, use)
        y_pnw = emit.op(node, aten.bmm.default, self._windows(node, x_nk, inner), w_pkw)
        y = self._back(node, y_pnw, outer)
        if use.weight_first:
            y = emit.op(node, aten.permute.default, y, [1, 0])
        if node.target is aten.addmm.default:
            y = emit.op(node, aten.add.Tensor, y, node.args[0])
        return y

    def gradient(self, gradient: Gradient) -> fx.Node:
        """Returns the product under the mask: ``[p, w of rows, k of columns]``."""
        emit, node = self._emit, gradient.node
        dy_nr = self._in_order(node, gradient.operand(rows=True), self._rows)
        x_nk = self._in_order(node, gradient.operand(rows=False), self._columns)
        dy_pnw = self._classes(node, dy_nr, self._rows)
        dy_pwn = emit.op(node, aten.permute.default, dy_pnw, [0, 2, 1])
        return emit.op(node, aten.bmm.default, dy_pwn, self._windows(node, x_nk, self._columns))

    def expand(self, before: fx.Node, x: fx.Node) -> fx.Node:
        """Puts what `gradient` gives back in place, scaled, with zeros for what was dropped.

        By an inverse map, so that it is one fused kernel without a zero fill and without atomics.
        """
        emit = self._emit
        side, across = self._rows, self._columns
        sizes = [self._tiling.period, side.count, side.block, -1, across.block]
        x = emit.view(before, x, sizes)
        x = emit.op(before, aten.permute.default, x, [0, 1, 3, 2, 4])
        place = emit.op(before, aten.clamp_min.default, self._place, 0)
        slots = [emit.op(before, aten.unsqueeze.default, slot, 1) for slot in side.slot]
        x = emit.op(before, aten.index.Tensor, x, [*slots, place])
        x = emit.op(before, aten.mul.Tensor, x, self._scale)
        kept = emit.op(before, aten.ge.Scalar, self._place, 0)
        kept = emit.op(before, aten.view.default, kept, [*self._tiling.grid, 1, 1])
        zero = self._number(before, 0, x.meta["val"].dtype)
        x = emit.op(before, aten.where.self, kept, x, zero)
        x = emit.op(before, aten.permute.default, x, [0, 2, 1, 3])
        return emit.view(before, x, list(self._tiling.shape))

    def cut(self, before: fx.Node, x: fx.Node, columns: bool = True) -> fx.Node:
        """Picks what is kept of a tensor with the sizes of the weight.

        Args:
            before: where to add the ops.
            x: the tensor.
            columns: for every class of rows what it keeps, ``[p, w of rows, k of columns]``; else
                for every class of columns what keeps it, ``[p, k of rows, w of columns]``.
        """
        emit, tiling = self._emit, self._tiling
        (height, width), (rows, across) = tiling.tile, tiling.grid
        x = emit.view(before, x, [rows, height, across, width])
        x = emit.op(before, aten.permute.default, x, [0, 2, 1, 3])
        picked = [
            self._tiles(before, self._rows, not columns, 2),
            self._tiles(before, self._columns, columns, 1),
        ]
        x = emit.op(before, aten.index.Tensor, x, picked)
        x = emit.op(before, aten.permute.default, x, [0, 1, 3, 2, 4])
        p, r, _, k, _ = x.meta["val"].shape
        return emit.view(before, x, [p, r * height, k * width])

    def mask(self, before: fx.Node, dtype: torch.dtype) -> fx.Node:
        """Returns the whole mask, for what can use nothing less."""
        emit, tiling = self._emit, self._tiling
        scale, zero = (self._number(before, x, dtype) for x in (self._scale, 0))
        kept = emit.op(before, aten.ge.Scalar, self._place, 0)
        tiles = emit.op(before, aten.where.self, kept, scale, zero)
        (rows, columns), (height, width) = tiling.grid, tiling.tile
        tiles = emit.op(before, aten.view.default, tiles, [rows, 1, columns, 1])
        whole = emit.op(before, aten.expand.default, tiles, [rows, height, columns, width])
        return emit.view(before, whole, list(tiling.shape))

    def _weight(self, before: fx.Node, use: Use) -> fx.Node:
        """Returns what is kept of the masked weight, ``[p, k, w]``, cut once for all its users."""
        # With one class a row, what a class of rows keeps is what a class of columns keeps.
        by_rows = use.contracts_columns or self._tiling.n_kept == 1
        key = use.masked, use.steps, by_rows
        if key not in self._weights:
            # What is an input stays in memory anyway, and is cut again rather than saved.
            again = use.weight.op == "placeholder"
            policy = self._emit.marked(CheckpointPolicy.MUST_RECOMPUTE)
            with policy if again else contextlib.nullcontext():
                self._weights[key] = self._masked_weight(before, use, by_rows)
        cut = self._weights[key]
        if use.contracts_columns:
            cut = self._emit.op(before, aten.permute.default, cut, [0, 2, 1])
        return cut

    def _masked_weight(self, before: fx.Node, use: Use, by_rows: bool) -> fx.Node:
        emit = self._emit
        x = self.cut(before, use.weight, by_rows)
        dtype = use.masked.meta["val"].dtype
        if x.meta["val"].dtype != dtype:
            x = emit.op(before, prims.convert_element_type.default, x, dtype)
        x = emit.op(before, aten.mul.Tensor, x, self._scale)
        for target, rest in use.steps:
            x = emit.op(before, target, x, *rest)
        return x

    def _in_order(self, before: fx.Node, given: Features, side: _Side) -> fx.Node:
        """Returns ``[n, features]`` with the features in the order of their classes.

        Args:
            before: where to add the ops.
            given: a matrix.
            side: what the features are of the weight.
        """
        emit, (x, first) = self._emit, given
        key = given, side is self._rows
        if key in self._ordered:
            return self._ordered[key]
        ordered = emit.op(before, aten.permute.default, x, [1, 0]) if first else x
        n = emit.sizes(before, ordered)[0]
        ordered = emit.view(before, ordered, [n, self._tiling.period * side.count, side.block])
        ordered = emit.op(before, aten.index.Tensor, ordered, [None, side.order])
        if not ordered.meta["val"].is_contiguous():  # windows are read by their place in memory
            ordered = emit.op(
                before, aten.clone.default, ordered, memory_format=torch.contiguous_format
            )
        n_tiles = int(side.order.meta["val"].shape[0])
        self._ordered[key] = emit.view(before, ordered, [n, n_tiles * side.block])
        return self._ordered[key]

    def _classes(self, before: fx.Node, x: fx.Node, side: _Side) -> fx.Node:
        """Returns the features of every class, ``[p, n, w]``: a view."""
        return self._strided(before, x, side, side.width, side.start)

    def _windows(self, before: fx.Node, x: fx.Node, side: _Side) -> fx.Node:
        """Returns the features that every class of the other side keeps, ``[p, n, k]``: a view."""
        return self._strided(before, x, side, side.width * self._tiling.n_kept, 0)

    def _strided(self, before: fx.Node, x: fx.Node, side: _Side, size: int, start: int) -> fx.Node:
        emit, period = self._emit, self._tiling.period
        n = emit.sizes(before, x)[0]
        if self._tiling.n_kept == 1:
            x = emit.op(before, aten.view.default, x, [n, period, size])
            return emit.op(before, aten.permute.default, x, [1, 0, 2])
        # Windows overlap: the features that two classes keep are not copied twice.
        strides = [side.width, x.meta["val"].stride(0), 1]
        return emit.op(
            before, aten.as_strided.default, x, [period, n, size], strides, start * side.width
        )

    def _back(self, before: fx.Node, x: fx.Node, side: _Side) -> fx.Node:
        """Returns ``[n, features]`` in the original order of the features, of ``[p, n, w]``."""
        emit = self._emit
        n = emit.sizes(before, x)[1]
        x = emit.view(before, x, [self._tiling.period, n, side.count, side.block])
        x = emit.op(before, aten.permute.default, x, [1, 0, 2, 3])
        x = emit.op(before, aten.index.Tensor, x, [None, *side.slot])
        return emit.view(before, x, [n, self._tiling.period * side.width])

    def _tiles(self, before: fx.Node, side: _Side, window: bool, unit_dim: int) -> fx.Node:
        """Returns the tiles of every class, or of what every class keeps, to index with."""
        size = side.count * (self._tiling.n_kept if window else 1)
        start = 0 if window else side.start * side.count
        sizes = [self._tiling.period, size]
        tiles = self._emit.op(
            before, aten.as_strided.default, side.order, sizes, [side.count, 1], start
        )
        return self._emit.op(before, aten.unsqueeze.default, tiles, unit_dim)

    def _number(self, before: fx.Node, number: float, dtype: torch.dtype) -> fx.Node:
        device = self._place.meta["val"].device
        return self._emit.op(before, aten.scalar_tensor.default, number, dtype=dtype, device=device)
