"""Tests of the op that draws kept tiles: its contract, its distribution, its recorder."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ardd.runtime.draw_blocks import record_draws
from ardd.runtime.draw_seeds import draw_seeds
from ardd.runtime.draw_tiles import TileDraw, draw_tiles
from ardd.runtime.random_bits import bits_like

CPU = torch.device("cpu")
DRAWS = 10_000
SHAPES = [(4, 4, 2, 1), (8, 4, 4, 1), (6, 12, 3, 2), (10, 10, 10, 7), (5, 5, 5, 5), (1, 2, 1, 1)]


def bits(*sizes: int, device: torch.device = CPU) -> Tensor:
    """Draws a seed and hashes it, so that the distributions below are those of the hash as well."""
    return bits_like(draw_seeds(1, device)[0], sizes)


def draw(
    rows: int, columns: int, period: int, kept: int, site: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    drawn: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    drawn = draw_tiles(bits(rows + columns), rows, columns, period, kept, site)
    return drawn


@pytest.mark.parametrize(("n_rows", "n_columns", "period", "n_kept"), SHAPES)
def test_the_parts_of_a_draw_agree(n_rows: int, n_columns: int, period: int, n_kept: int) -> None:
    """Orders hold every tile; slots are where it is; the windows are what ``place`` says."""
    rows, columns, row_slot, column_slot, place = draw(n_rows, n_columns, period, n_kept)
    tall, wide = n_rows // period, n_columns // period
    first = (n_kept - 1) * tall
    assert sorted(rows[first:].tolist()) == list(range(n_rows))
    assert sorted(columns[:n_columns].tolist()) == list(range(n_columns))
    assert torch.equal(rows[:first], rows[n_rows:])
    assert torch.equal(columns[n_columns:], columns[: (n_kept - 1) * wide])
    for slot, order, size in ((row_slot, rows[first:], tall), (column_slot, columns, wide)):
        assert order[slot[0] * size + slot[1]].tolist() == list(range(slot.shape[1]))
    for c in range(period):
        of_rows = columns[c * wide : (c + n_kept) * wide]
        of_columns = rows[c * tall : (c + n_kept) * tall]
        for row in range(n_rows):
            if row_slot[0, row] == c:
                assert place[row][of_rows].tolist() == list(range(n_kept * wide))
                assert (place[row] >= 0).sum() == n_kept * wide
        for column in range(n_columns):
            if column_slot[0, column] == c:
                kept = (place[:, column] >= 0).nonzero().view(-1)
                assert sorted(of_columns.tolist()) == kept.tolist()


@pytest.mark.parametrize(
    "sizes", [(4, 4, 2, 3), (4, 4, 2, 0), (4, 3, 2, 1), (3, 4, 2, 1), (0, 4, 2, 1)]
)
def test_refuses_sizes_that_do_not_fit(sizes: tuple[int, int, int, int]) -> None:
    rows, columns, period, kept = sizes
    message = rf"Cannot keep {kept} of every {period} tiles of {rows} x {columns}\. Expected"
    with pytest.raises(ValueError, match=message):
        draw(*sizes)


@pytest.mark.parametrize(("n_rows", "n_columns", "period", "n_kept"), [(4, 8, 4, 1), (3, 6, 3, 2)])
def test_every_tile_is_kept_at_the_rate(
    n_rows: int, n_columns: int, period: int, n_kept: int
) -> None:
    """10,000 draws: P(kept) = n_kept / period for each, within five sigma; the mean mask is 1."""
    with record_draws() as draws:
        for _ in range(DRAWS):
            draw(n_rows, n_columns, period, n_kept)
    total = torch.zeros(n_rows, n_columns, dtype=torch.float64)
    for one in draws:
        assert isinstance(one, TileDraw)
        total += one.mask((n_rows, n_columns))
    keep = n_kept / period
    sigma = math.sqrt((1 - keep) / keep / DRAWS)  # of the mean of a mask of 0 and 1 / keep
    assert (total / DRAWS - 1).abs().max() < 5 * sigma
    assert total.mean() / DRAWS == pytest.approx(1, abs=1e-12)  # exact in every single draw


def test_two_rows_or_columns_are_kept_alike_no_more_often_than_dealing_says() -> None:
    """Of 4 rows in 2 classes, two are in the same class with probability 1/3; so are columns."""
    alike = torch.zeros(2)
    for _ in range(DRAWS):
        kept = draw(4, 4, 2, 1)[4] >= 0
        alike += torch.tensor([torch.equal(x[0], x[2]) for x in (kept, kept.t())])
    assert (alike - DRAWS / 3).abs().max() < 5 * math.sqrt(DRAWS * 2 / 9)


def test_the_default_generator_decides() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = draw(32, 32, 4, 1)
    second = draw(32, 32, 4, 1)
    assert not torch.equal(first[4], second[4])
    torch.set_rng_state(state)
    assert all(torch.equal(a, b) for a, b in zip(draw(32, 32, 4, 1), first, strict=True))
    torch.manual_seed(3)
    assert torch.equal(draw(32, 32, 4, 1)[4], first[4])


def test_a_recorded_draw_gives_the_mask() -> None:
    with record_draws() as draws:
        place = draw(4, 6, 2, 1, site=7)[4]
        expected = place >= 0
        place.zero_()  # what is recorded is a copy
    (recorded,) = draws
    assert isinstance(recorded, TileDraw)
    assert (recorded.site, recorded.n_blocks, recorded.grid) == (7, 24, (4, 6))
    assert recorded.kept.tolist() == expected.view(-1).nonzero().view(-1).tolist()
    mask = recorded.mask((8, 18))
    assert mask.shape == (8, 18)
    assert torch.equal(mask[::2, ::3], expected * 2.0)
    assert torch.equal(mask[1::2, 2::3], expected * 2.0)


@pytest.mark.parametrize(
    "again",
    [copy.copy, copy.deepcopy, lambda draw: draw._replace(site=7)]
    + [lambda draw, n=n: pickle.loads(pickle.dumps(draw, n)) for n in range(6)],
)
def test_a_record_can_be_copied(again: Callable[[TileDraw], TileDraw]) -> None:
    """The grid comes along, and with it the mask."""
    draw = TileDraw(7, (2, 3), torch.tensor([0, 4, 5]))
    copied = again(draw)
    assert type(copied) is TileDraw
    assert (copied.site, copied.grid, copied.n_blocks) == (7, (2, 3), 6)
    assert torch.equal(copied.mask((4, 6)), draw.mask((4, 6)))


def test_a_record_with_another_grid() -> None:
    """The number of tiles follows from it, and is none to set."""
    draw = TileDraw(7, (2, 3), torch.tensor([0, 4, 5]))
    wide = draw._replace(grid=(4, 3))
    assert (wide.grid, wide.n_blocks) == ((4, 3), 12)
    with pytest.raises(TypeError, match="n_blocks"):
        draw._replace(n_blocks=6)


def test_draws_of_a_compiled_graph_are_not_merged() -> None:
    """Two draws of the same sizes are two: no pass merges the draws of their seeds."""

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled() -> tuple[Tensor, Tensor]:
        sizes = 16, 16, 4, 1
        return (
            draw_tiles(bits(32), *sizes, 1)[4],
            draw_tiles(bits(32), *sizes, 1)[4],
        )

    first, second = compiled()
    assert not torch.equal(first, second)


def test_opcheck() -> None:
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(draw_tiles, (bits(10), 4, 6, 2, 1, 0), test_utils=utils)
    torch.library.opcheck(draw_tiles, (bits(15), 6, 9, 3, 2, 0), test_utils=utils)


def test_the_op_is_known_to_be_random() -> None:
    assert torch.Tag.nondeterministic_seeded in draw_tiles.tags


@pytest.mark.cuda
def test_drawing_on_a_gpu_does_not_wait_for_it() -> None:
    device = torch.device("cuda")
    draw_tiles(bits(128, device=device), 64, 64, 4, 1, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = draw_tiles(bits(128, device=device), 64, 64, 4, 1, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {part.device.type for part in drawn} == {"cuda"}
