"""Saves encoded tensors in place of others, and decodes them in backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..runtime.codec import Codec
from ..runtime.pack_bits import PackBits
from ..runtime.token_rows import TokenRows
from .classify_saves import is_comparison, readers
from .cut_graphs import Cut
from .save_layout import RowLayout
from .splice import splice

aten = torch.ops.aten


def encode(cut: Cut, saved: fx.Node, given: fx.Node, codec: Codec, layout: RowLayout) -> None:
    """Encodes a tensor at the end of the forward and decodes it at its first use.

    Args:
        cut: the two graphs.
        saved: the tensor, a node of the forward.
        given: the input of the backward for it.
        codec: the encoding.
        layout: its rows.
    """
    value = saved.meta["val"]

    def encoded(x: Tensor) -> Sequence[Tensor]:
        return codec.encode(layout.to_rows(x))

    def decoded(*parts: Tensor) -> Sequence[Tensor]:
        return (layout.from_rows(codec.decode(parts, layout.row, value.dtype)),)

    parts = splice(cut.forward.graph, cut.forward.graph.output_node(), encoded, [saved])
    inputs = cut.replace(saved, parts)
    first = next(node for node in cut.backward.graph.nodes if node in given.users)
    (result,) = splice(cut.backward.graph, first, decoded, inputs)
    given.replace_all_uses_with(result)


def split_signs(cut: Cut, saved: fx.Node, given: fx.Node, layout: RowLayout) -> None:
    """Saves one bit for every comparison of a tensor, exactly; backward compares no more."""
    graph = cut.backward.graph
    places = {node: place for place, node in enumerate(graph.nodes)}
    compared = [user for value, user in readers(given) if is_comparison(user)]
    masks: dict[tuple[Any, Any], fx.Node] = {}
    for user in sorted(compared, key=places.__getitem__):
        target: Any = user.target
        number: Any = user.args[1]
        if (target, number) not in masks:
            pack, unpack = _bits_of(target, number, layout)
            (bits,) = splice(cut.forward.graph, cut.forward.graph.output_node(), pack, [saved])
            (_, given_bits) = cut.replace(saved, [saved, bits])
            (masks[target, number],) = splice(graph, user, unpack, [given_bits])
        user.replace_all_uses_with(masks[target, number])
        graph.erase_node(user)


def keep_comparison(cut: Cut, comparison: fx.Node, operand: fx.Node, layout: RowLayout) -> None:
    """Saves one bit for every result of a comparison that backward would make again.

    Args:
        cut: the two graphs.
        comparison: with a number, a node of the backward.
        operand: what it compares, in the forward.
        layout: the rows of the operand.
    """
    target: Any = comparison.target
    number: Any = comparison.args[1]
    pack, unpack = _bits_of(target, number, layout)
    (bits,) = splice(cut.forward.graph, cut.forward.graph.output_node(), pack, [operand])
    anchor, _ = cut.saves()[0]
    (_, given_bits) = cut.replace(anchor, [anchor, bits])
    (mask,) = splice(cut.backward.graph, comparison, unpack, [given_bits])
    comparison.replace_all_uses_with(mask)
    cut.backward.graph.erase_node(comparison)


def _bits_of(
    compare: Callable[..., Tensor], number: float, layout: RowLayout
) -> tuple[Callable[..., Sequence[Tensor]], Callable[..., Sequence[Tensor]]]:
    def pack(x: Tensor) -> Sequence[Tensor]:
        return PackBits().encode(layout.to_rows(compare(x, number)))

    def unpack(*parts: Tensor) -> Sequence[Tensor]:
        return (layout.from_rows(PackBits().decode(parts, layout.row, torch.bool)),)

    return pack, unpack


def keep_rows(cut: Cut, saved: fx.Node, given: fx.Node, codec: TokenRows) -> None:
    """Saves some rows of a matrix, and cuts every product that contracts its rows to them.

    Args:
        cut: the two graphs.
        saved: the matrix, a node of the forward.
        given: the input of the backward for it, of which `contractions` found all uses.
        codec: how many rows, and which.
    """

    def select(x: Tensor) -> Sequence[Tensor]:
        rows, values = torch.ops.ardd.select_rows(x, codec.kept, codec.sampled)
        return rows, values

    def left(g: Tensor, rows: Tensor, values: Tensor) -> Sequence[Tensor]:
        return (g.t()[rows].t() @ values,)

    def right(g: Tensor, rows: Tensor, values: Tensor) -> Sequence[Tensor]:
        return (values.t() @ g[rows],)

    uses = contractions(given)
    assert uses is not None
    parts = splice(cut.forward.graph, cut.forward.graph.output_node(), select, [saved])
    inputs = cut.replace(saved, parts)
    for product, other, is_left in uses:
        graph = cut.backward.graph
        (new,) = splice(graph, product, left if is_left else right, [other, *inputs])
        product.replace_all_uses_with(new)
        graph.erase_node(product)


def contractions(given: fx.Node) -> list[tuple[fx.Node, fx.Node, bool]] | None:
    """Returns the products that contract the rows of a matrix, None if it has another use.

    Returns:
        For each the node, the other operand, and whether that one stands on the left.
    """
    found: list[tuple[fx.Node, fx.Node, bool]] = []
    for user in given.users:
        further: list[tuple[fx.Node, fx.Node, bool]] | None = []
        if is_comparison(user):
            pass  # their signs are saved apart
        elif user.target in (aten.alias.default, aten.detach.default):
            further = contractions(user)
        elif user.target is aten.mm.default:
            left, right = user.all_input_nodes[0], user.args[1]
            further = [(user, left, True)] if right is given and left is not given else None
        elif user.target in (aten.permute.default, aten.t.default):
            further = _contractions_transposed(user)
        else:
            further = None
        if further is None:
            return None
        found += further
    products = [product for product, _, _ in found]
    return found if len(set(products)) == len(products) else None  # not of a matrix with itself


def _contractions_transposed(given: fx.Node) -> list[tuple[fx.Node, fx.Node, bool]] | None:
    found = []
    for product in given.users:
        other = product.args[-1]
        if product.target is not aten.mm.default or product.args[0] is not given:
            return None
        assert isinstance(other, fx.Node)
        found.append((product, other, False))
    return found
