"""Puts markers into a Dynamo graph, in place of masks made by hand too."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from ..runtime.dropout_mask import dropout_mask
from .dynamo_nodes import is_inplace, tensor_of
from .match_hand_masks import HandMask
from .prove_mask_uses import MaskUses
from .sites import Site


def insert_marker(node: fx.Node, like: fx.Node, shared_dims: Sequence[int], site: Site) -> fx.Node:
    """Inserts the marker of ``site`` before ``node``, which lends it its place in the program."""
    with node.graph.inserting_before(node):
        args = (like, list(shared_dims), site.p, site.mean, site.index)
        marker = node.graph.call_function(dropout_mask, args)
    marker.meta = {key: value for key, value in node.meta.items() if key != "example_value"}
    value = tensor_of(like)
    if isinstance(value, FakeTensor):
        shape = [1 if dim in shared_dims else size for dim, size in enumerate(value.shape)]
        with value.fake_mode:
            marker.meta["example_value"] = torch.empty(
                shape, dtype=value.dtype, device=value.device
            )
    return marker


def rewrite_hand_mask(found: HandMask, uses: MaskUses, site: Site) -> None:
    """Replaces the mask by a marker and its uses by products with it.

    ::

        u = torch.rand_like(x)                 like = torch.empty_like(x)
        keep = u < 0.7                         mask = dropout_mask(like, [], 0.3, 0.7, 0)
        y = x * keep                           y = x * mask
        z = torch.where(keep, x, 0)            z = (x * mask).masked_fill(mask == 0, 0)

    A choice stays one: what it drops is 0 where x is infinite or undefined too, as a score of
    -inf is, and so is its gradient.
    """
    for node, mask, data in uses.choices:
        _choose_by_factor(node, mask, data, uses.dtype)
    for node, mask in uses.products:
        value = tensor_of(node)
        assert value is not None
        node.replace_input_with(mask, _converted(node, mask, uses.dtype, value.dtype))
    for node in uses.casts:
        mask, after = node.all_input_nodes[0], tensor_of(node)
        before = tensor_of(mask)
        assert before is not None
        assert after is not None
        if (after.dtype, after.device) == (uses.dtype, before.device):
            _bypass(node, mask)
    for node in uses.flips:
        _bypass(node, node.all_input_nodes[0])
    for node in uses.booleans:
        _retype(node, uses.dtype)
    value = tensor_of(found.like)
    assert value is not None
    like = _converted(found.mask, found.like, value.dtype, uses.dtype)
    marker = insert_marker(found.mask, like, (), site)
    readers = {user for user, _ in found.readers()}
    found.mask.replace_all_uses_with(marker)
    if found.overwritten is not None:
        found.overwritten.replace_all_uses_with(marker, lambda user: user in readers)
    _stop_drawing(found)


def _choose_by_factor(node: fx.Node, mask: fx.Node, data: fx.Node, dtype: torch.dtype) -> None:
    """Replaces the choice ``node`` between ``data`` and zero by a product, zero where it drops."""
    value = tensor_of(data)
    assert value is not None
    graph = node.graph
    factor = _converted(node, mask, dtype, value.dtype)
    with graph.inserting_before(node):
        dropped = graph.call_function(operator.eq, (factor, 0))
        if is_inplace(node):
            product = graph.call_method("mul_", (data, factor))
            chosen = graph.call_method("masked_fill_", (product, dropped, 0))
        else:
            product = graph.call_function(operator.mul, (data, factor))
            chosen = graph.call_method("masked_fill", (product, dropped, 0))
    for new in (dropped, product, chosen):
        new.meta = dict(node.meta)
    dropped.meta["example_value"] = factor.meta.get("example_value")
    _retype(dropped, torch.bool)
    node.replace_all_uses_with(chosen)
    graph.erase_node(node)


def _bypass(node: fx.Node, source: fx.Node) -> None:
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)


def _stop_drawing(found: HandMask) -> None:
    """Erases the old mask; what its draw wrote to, or made, becomes an empty tensor."""
    graph = found.draw.graph
    total = found.overwritten
    graph.erase_node(found.mask)
    if found.draw is found.mask:
        return
    if total is not None and total is not found.like:
        graph.erase_node(total)  # floor(q + rand)
    if found.kind == "uniform_":
        _bypass(found.draw, found.draw.all_input_nodes[0])
        return
    factory = torch.empty_like if found.kind == "rand_like" else torch.empty
    kwargs = {k: v for k, v in found.draw.kwargs.items() if k not in ("generator", "requires_grad")}
    with graph.inserting_before(found.draw):
        empty = graph.call_function(factory, found.draw.args, kwargs)
    empty.meta = dict(found.draw.meta)
    _bypass(found.draw, empty)


def _converted(before: fx.Node, node: fx.Node, given: torch.dtype, wanted: torch.dtype) -> fx.Node:
    """Returns ``node``, of dtype ``given``, as ``wanted``; converts it ahead of ``before``."""
    if given == wanted:
        return node
    with before.graph.inserting_before(before):
        cast = before.graph.call_method("to", (node, wanted))
    cast.meta = dict(before.meta)
    cast.meta["example_value"] = node.meta.get("example_value")
    _retype(cast, wanted)
    return cast


def _retype(node: fx.Node, dtype: torch.dtype) -> None:
    """Gives the traced value of ``node`` another dtype."""

    def convert(value: object) -> object:
        if not isinstance(value, FakeTensor):
            return value
        with value.fake_mode:
            return value.to(dtype)

    node.meta["example_value"] = pytree.tree_map(convert, node.meta.get("example_value"))
