"""Proves on the partitioned graphs that no mask is drawn again in backward."""

from __future__ import annotations

import torch
from torch import fx

from ..core.errors import RedrawError
from ..runtime.draw_blocks import draw_blocks
from ..runtime.draw_groups import draw_groups
from ..runtime.dropout_mask import dropout_mask


def check_redraw(forward: fx.GraphModule, backward: fx.GraphModule) -> None:
    """Looks for random ops in a backward graph and in its submodules.

    Three kinds may stand there. Two give the forward's numbers again: ops that a
    ``run_with_rng_state`` runs from the state that the forward saved, and Inductor's
    ``inductor_random`` of a seed that the forward saved. The third is drawn in backward alone,
    such as the noise of a gradient hook: the cut copies nodes under their names, and the forward
    has none of that name.

    Raises:
        RedrawError: another one was found.
    """
    drawn_before = {node.name for node in forward.graph.nodes}
    for module in backward.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                again = module is not backward or node.name in drawn_before
                if node.op == "call_function" and _draws(node.target) and (again or _ours(node)):
                    raise RedrawError(node.format_node() or node.name)


def _ours(node: fx.Node) -> bool:
    return node.target in (draw_blocks, draw_groups, dropout_mask)


def _draws(target: object) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target is torch.ops.prims.inductor_random.default:
        return False
    return torch.Tag.nondeterministic_seeded in target.tags
