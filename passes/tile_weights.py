"""Drops tiles of weights (DropConnect) and computes the products with what is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import gcd

import torch
from torch import fx

from ..core.decisions import Reason
from ..core.options import Options
from .cost_model import CostModel
from .eager_draws import keeps_eager_masks
from .emit import Emitter, fake_mode_of
from .find_weight_uses import WeightUses, adds, find_weight_uses, step_of, transposes
from .price_tiles import TilePricer
from .random_masks import SMALLEST_RATE
from .relation import shape_of
from .seed_masks import after_seeds
from .settle_layouts import settled_layouts
from .tile_products import TiledWeight, Tiling

aten, prims = torch.ops.aten, torch.ops.prims

# Smaller tiles make products that no machine is good at; larger ones make masks poor in variety.
MIN_TILE, MAX_TILE = 32, 128
MAX_PERIOD = 16
_ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True)
class TileVerdict:
    """What was decided for the mask of one weight."""

    tiling: Tiling | None
    """None: it stays random."""
    reason: Reason
    detail: str = ""
    flops_before: int = 0
    """FLOPs of the products that it touches."""
    flops_after: int = 0
    """The same with the dropped tiles left out."""


def tile_weights(
    graph: fx.Graph, masks: Sequence[fx.Node], options: Options, model: CostModel
) -> dict[fx.Node, TileVerdict]:
    """Rewrites the products with masked weights, in place.

        %mask = ardd.dropout_mask(%w, ...)      %rows, %columns, ... = ardd.draw_tiles(64, 64, 2, 1)
        %m = mul(%w, %mask)                 =>  %m = mul(index(%w, [rows, columns]), 2.0)
        %y = mm(%x, permute(%m))                %y = index(bmm(index(%x, columns), %m), row slots)

    For the masks drawn, the graph computes what the masked dense one would. What cannot use tiles
    gets the mask in full; a mask that gains nothing is left in the graph.

    Args:
        graph: forward alone, or joint.
        masks: the ``ardd::dropout_mask`` nodes of weights, with seeds.
        options: what the user asked for.
        model: prices the ops.

    Returns:
        The verdict on every mask. Those taken are no longer in the graph.
    """
    fuel = options.max_rewrites
    verdicts = {}
    last_draw: fx.Node | None = None
    for mask in masks:
        found = find_weight_uses(mask)
        verdict = _plan(mask, found, options, model)
        if verdict.tiling is not None and fuel is not None:
            if fuel <= 0:
                verdict = TileVerdict(None, Reason.OUT_OF_FUEL)
            fuel -= 1
        if verdict.tiling is not None:
            with settled_layouts(graph):
                last_draw = _rewrite(graph, mask, found, verdict.tiling, last_draw)
        verdicts[mask] = verdict
    return verdicts


def tilings(shape: tuple[int, int], p: float, options: Options) -> Iterator[Tiling]:
    """Yields the tilings of a weight whose rate is close enough to ``p``."""
    for period in range(2, MAX_PERIOD + 1):
        for n_kept in range(1, period):
            error = abs(1 - n_kept / period - p)
            if gcd(n_kept, period) > 1 or error > options.rate_tolerance + _ROUNDING:
                continue
            for height in _tile_sizes(shape[0], period, options):
                for width in _tile_sizes(shape[1], period, options):
                    yield Tiling(shape, (height, width), period, n_kept)


def _tile_sizes(size: int, period: int, options: Options) -> list[int]:
    given = options.block_size
    sizes = range(MIN_TILE, MAX_TILE + 1) if given == "auto" else [given]
    return [tile for tile in sizes if size % (tile * period) == 0]


def _plan(mask: fx.Node, found: WeightUses, options: Options, model: CostModel) -> TileVerdict:
    p = mask.args[2]
    assert isinstance(p, float)
    if options.pattern == "random":
        return TileVerdict(None, Reason.PATTERN_RANDOM)
    if options.pattern == "auto" and keeps_eager_masks():
        return TileVerdict(None, Reason.FALLBACK_RANDOM)
    if p <= SMALLEST_RATE:
        return TileVerdict(None, Reason.P_ROUNDS_TO_ZERO)
    if not mask.users:
        return TileVerdict(None, Reason.UNUSED)
    sizes = shape_of(mask)
    if not found.uses and not found.gradients:
        what = f"{len(sizes)} dimensions" if len(sizes) != 2 else "no product reads it"
        return TileVerdict(None, Reason.WEIGHT_DROPOUT, what)
    rows, columns = sizes
    if not isinstance(rows, int) or not isinstance(columns, int):
        return TileVerdict(None, Reason.DYNAMIC_DIM)
    choices = list(tilings((rows, columns), p, options))
    if not choices:
        detail = f"size {rows} x {columns}, p {p:g}, block_size {options.block_size}"
        return TileVerdict(None, Reason.SHAPE, detail)
    pricer = TilePricer(mask, found, model)
    # On a tie the nearest rate comes first, then the smaller tile: its masks have more variety.
    saving, _, _, best = max(
        ((pricer.saving(t, p), -abs(t.p_used - p), -t.tile[0] * t.tile[1], t) for t in choices),
        key=lambda choice: choice[:3],
    )
    detail = f"{saving * 1e6:+.0f} us a step predicted"
    if saving <= 0 and options.pattern != "block":
        return TileVerdict(None, Reason.NOT_WORTH_IT, detail)
    kept = f"{best.n_kept} of {best.period} tiles of {best.tile[0]} x {best.tile[1]}"
    flops = pricer.flops(Fraction(1)), pricer.flops(best.keep)
    return TileVerdict(best, Reason.STRUCTURED, f"{kept}, {detail}", *flops)


def _rewrite(
    graph: fx.Graph,
    mask: fx.Node,
    found: WeightUses,
    tiling: Tiling,
    last_draw: fx.Node | None,
) -> fx.Node:
    """Draws one mask, after the last one, and returns the draw."""
    emit = Emitter(graph, fake_mode_of(graph))
    mean = mask.args[3]
    assert isinstance(mean, float)
    nodes = list(graph.nodes)
    # In the order of the dropouts, before all that the forward computes.
    start = last_draw.next if last_draw else after_seeds(graph)
    tiled = TiledWeight(emit, start, mask, tiling, mean)
    uses = {use.node: use for use in found.uses}
    gradients = {gradient.node: gradient for gradient in found.gradients}
    cut: dict[fx.Node, fx.Node] = {}

    def kept(node: fx.Node, before: fx.Node, flipped: bool) -> fx.Node:
        """Returns what is kept of a gradient."""
        if node in cut:
            return cut[node]
        if node not in found.between:
            if flipped:
                node = emit.op(before, aten.permute.default, node, [1, 0])
            return tiled.cut(before, node)
        if adds(node):
            terms = [kept(x, before, flipped) for x in node.args if isinstance(x, fx.Node)]
            return emit.op(before, aten.add.Tensor, *terms)
        x = kept(node.all_input_nodes[0], before, flipped ^ transposes(node))
        step = step_of(node)
        return emit.op(before, step[0], x, *step[1]) if step else x

    for node in nodes:  # in their order: what one puts in order serves those after it
        if node in uses:
            node.replace_all_uses_with(tiled.product(uses[node]))
        elif node in gradients:
            cut[node] = tiled.gradient(gradients[node])
        elif node in found.wanted:
            x = kept(found.wanted[node], node, False)
            dtype = node.meta["val"].dtype
            if x.meta["val"].dtype != dtype:
                x = emit.op(node, prims.convert_element_type.default, x, dtype)
            node.replace_all_uses_with(tiled.expand(node, x))
    for node in reversed(nodes):
        if node.op == "call_function" and not node.users and node is not mask:
            graph.erase_node(node)
    if mask.users:  # something needs it in full
        mask.replace_all_uses_with(tiled.mask(mask, mask.meta["val"].dtype))
    graph.erase_node(mask)
    graph.eliminate_dead_code()
    return tiled.drawn
