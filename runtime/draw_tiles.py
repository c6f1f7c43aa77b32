"""The op that draws which tiles of a weight a dropout keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .draw_blocks import Draw, _recorders


class TileDraw(Draw):
    """One draw of tiles, as ``record_draws`` saw it: a `Draw` whose blocks lie in a grid.

    ``n_blocks`` counts all tiles, ``kept`` numbers them row by row.
    """

    grid: tuple[int, int]
    """Rows and columns of tiles."""

    def __new__(cls, site: int, grid: tuple[int, int], kept: Tensor) -> TileDraw:
        """Makes the record.

        Args:
            site: Number of the dropout within its graph.
            grid: Rows and columns of tiles.
            kept: int64 ``[n_kept]``, ascending.
        """
        self = super().__new__(cls, site, grid[0] * grid[1], kept)
        self.grid = grid
        return self

    def __getnewargs__(self) -> Any:
        """Returns what a copy, or another process, makes the record from."""
        return self.site, self.grid, self.kept

    def _replace(self, **fields: Any) -> TileDraw:
        """Returns the record with other values for ``site``, ``grid`` or ``kept``.

        Raises:
            TypeError: A name is none of these; ``n_blocks`` follows from the grid.
        """
        given: dict[str, Any] = {"site": self.site, "grid": self.grid, "kept": self.kept}
        return TileDraw(**given | fields)

    __replace__ = _replace

    def mask(self, shape: tuple[int, int]) -> Tensor:
        """Returns the mask of a weight, of mean 1: float64, 0 or ``n_blocks / len(kept)``.

        Args:
            shape: Sizes of the weight.
        """
        tiles = torch.zeros(self.n_blocks, dtype=torch.float64, device=self.kept.device)
        tiles[self.kept] = self.n_blocks / len(self.kept)
        rows, columns = (size // n for size, n in zip(shape, self.grid, strict=True))
        return tiles.view(self.grid).repeat_interleave(rows, 0).repeat_interleave(columns, 1)


Tiles = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def draw(bits: Tensor, n_rows: int, n_columns: int, period: int, n_kept: int, site: int) -> Tiles:
    """Draws a permuted block diagonal: ``n_kept`` of every ``period`` tiles in each row and column.

    Rows and columns of tiles are dealt into ``period`` classes of equal size, each by a uniform
    permutation, and tile (i, j) is kept iff ``(class(j) - class(i)) mod period < n_kept``. Ordered
    by classes, what is kept of a weight with ``n_kept`` 1 is a block diagonal. Every tile is kept
    with probability ``n_kept / period`` exactly, and so are all in one row and one column.

    Song et al. 2018, "Approximate Random Dropout", https://arxiv.org/abs/1805.08939, keep tile
    (i, j) iff ``(i + j - bias) mod period == 0`` (TDP): there rows i and i + period are always
    dropped alike, and a step has only ``period`` masks to draw from. Dealing costs nothing more:
    the columns of an input are gathered either way. Waits for the device only where draws are
    recorded.

    Args:
        bits: int32 ``[n_rows + n_columns]``, random: the draw is a function of them.
        n_rows: Rows of tiles, a multiple of ``period``.
        n_columns: Columns of tiles, a multiple of ``period``.
        period: Classes there are.
        n_kept: Classes of columns that a row keeps, ``1 <= n_kept <= period``.
        site: Number of the dropout, for `record_draws`.

    Returns:
        ``rows``, int64 ``[(period + n_kept - 1) * n_rows / period]``: the rows by classes, with the
        last ``n_kept - 1`` classes once more in front: the ``n_kept`` classes that keep the columns
        of class c stand together, from position ``c * n_rows / period``.
        ``columns``, int64 ``[(period + n_kept - 1) * n_columns / period]``: the columns by classes,
        with the first ``n_kept - 1`` classes once more at the end: those that the rows of class c
        keep stand together, from position ``c * n_columns / period``.
        ``row_slot``, int64 ``[2, n_rows]``: the class of every row, and its place in that.
        ``column_slot``, int64 ``[2, n_columns]``: the same of the columns.
        ``place``, int64 ``[n_rows, n_columns]``: the place of the column of every tile among those
        that its row keeps, -1 for a dropped tile.

    Raises:
        ValueError: If the sizes do not fit.
    """
    _check(n_rows, n_columns, period, n_kept)
    tall, wide = n_rows // period, n_columns // period
    rows, columns = bits[:n_rows].argsort(), bits[n_rows:].argsort()
    row_at, column_at = rows.argsort(), columns.argsort()
    start = (row_at // tall * wide).unsqueeze(1)
    place = (column_at - start) % n_columns
    place.masked_fill_(place >= n_kept * wide, -1)
    if _recorders:
        kept = (place.view(-1) >= 0).nonzero().view(-1)
        for recorder in _recorders:
            recorder.append(TileDraw(site, (n_rows, n_columns), kept.clone()))
    again = n_kept - 1
    return (
        torch.cat([rows[n_rows - again * tall :], rows]),
        torch.cat([columns, columns[: again * wide]]),
        torch.stack([row_at // tall, row_at % tall]),
        torch.stack([column_at // wide, column_at % wide]),
        place,
    )


def _check(n_rows: int, n_columns: int, period: int, n_kept: int) -> None:
    if not 1 <= n_kept <= period or n_rows % period or n_columns % period or not n_rows * n_columns:
        raise ValueError(
            f"Cannot keep {n_kept} of every {period} tiles of {n_rows} x {n_columns}. Expected"
            " 1 <= n_kept <= period, and a period that divides both numbers of tiles."
        )


def _fake(bits: Tensor, n_rows: int, n_columns: int, period: int, n_kept: int, site: int) -> Tiles:
    _check(n_rows, n_columns, period, n_kept)
    classes = period + n_kept - 1

    def empty(*sizes: int) -> Tensor:
        return bits.new_empty(sizes, dtype=torch.int64)

    return (
        empty(classes * (n_rows // period)),
        empty(classes * (n_columns // period)),
        empty(2, n_rows),
        empty(2, n_columns),
        empty(n_rows, n_columns),
    )


_library: Any = torch.library  # untyped
_LIB = _library.Library("ardd", "FRAGMENT")
_LIB.define(
    "draw_tiles(Tensor bits, int n_rows, int n_columns, int period, int n_kept, int site)"
    " -> (Tensor rows, Tensor columns, Tensor row_slot, Tensor column_slot, Tensor place)",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)
_LIB.impl("draw_tiles", draw, "CompositeExplicitAutograd")
_library.register_fake("ardd::draw_tiles", _fake, lib=_LIB)

draw_tiles = torch.ops.ardd.draw_tiles.default
"""``draw_tiles(bits, n_rows, n_columns, period, n_kept, site) -> Tiles``, see ``draw``."""
