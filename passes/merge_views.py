"""Saves one tensor in place of several views of it."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from .cut_graphs import Cut, bytes_of, root_of
from .recompute_saves import chain_of, recompute


def merge_views(cut: Cut, kept: Collection[fx.Node]) -> list[fx.Node]:
    """Has backward take views apart, where forward saves several of one tensor.

    The memory is the same, but an encoding then has one tensor to encode, once.

    Args:
        cut: the two graphs.
        kept: tensors that the program returns, which are left alone.

    Returns:
        The views that are not saved any more.
    """
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node, _ in cut.saves():
        groups.setdefault(root_of(node), []).append(node)
    merged: list[fx.Node] = []
    for root, views in groups.items():
        whole = sum(map(bytes_of, views)) >= bytes_of(root)
        if len(views) < 2 or root.op == "placeholder" or root in kept or not whole:
            continue
        chains = [
            (view, chain_of(view, {root, *cut.sizes()})) for view in views if view is not root
        ]
        if any(chain is None for _, chain in chains):
            continue
        if root not in views:
            cut.replace(views[0], [root, views[0]])
        for view, chain in chains:
            assert chain is not None
            recompute(cut, view, chain)
            merged.append(view)
    return merged
