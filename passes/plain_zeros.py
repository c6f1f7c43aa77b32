"""Makes ordinary tensors of the zeros that forward-mode AD leaves in an ATen graph."""

from __future__ import annotations

import torch
from torch import fx

from .emit import Emitter, fake_mode_of

aten = torch.ops.aten


def plain_zeros(graph: fx.Graph) -> None:
    """Writes tensors that are known to be zero out, in place.

    Most ops on a fake tensor of that kind give one on the device ``meta``, here as in Inductor.

    Args:
        graph: an ATen graph with fake values.
    """
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not value._is_zerotensor():
            continue
        of = {"dtype": value.dtype, "device": value.device}
        with fake_mode_of(graph):
            plain = torch.empty_strided(value.shape, value.stride(), **of)  # type: ignore[arg-type]
        node.meta["val"] = plain
        if node.target is aten._efficientzerotensor.default:
            emit = Emitter(graph, fake_mode_of(graph))
            full = emit.op(node, aten.full.default, node.args[0], 0, **of)
            node.replace_all_uses_with(full)
            graph.erase_node(node)
