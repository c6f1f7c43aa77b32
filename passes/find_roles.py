"""Finds what every dropout does in its network, from the dataflow around it alone.

The origins of what is dropped (``trace_origins.py``) say what made it, a walk from the dropped
tensor (``walk_uses.py``) says what reads it; names of modules and parameters are not looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import fx
from torch._functorch._aot_autograd.descriptors import GradAOTOutput, InputMutationAOTOutput

from ..core.decisions import Role
from .feature_dims import forward_nodes
from .trace_channels import has_positions, is_map
from .trace_origins import Made, Origins
from .walk_uses import Dropped, Use, Uses, Walker, find_dropped

aten = torch.ops.aten


def find_roles(
    graph: fx.Graph, masks: Iterable[fx.Node], parameters: Collection[fx.Node]
) -> dict[fx.Node, Role]:
    """Returns the role of every mask.

    1. ``weight``: what is dropped depends on parameters alone.
    2. ``samples``: the mask has one element for each sample, or one alone.
    3. ``attention``: a softmax makes it, and it weighs other activations.
    4. ``rnn_*``: a recurrent layer makes it, or reads it before it is added to anything.
    5. ``channels*``: the map of a convolution, read by convolutions or dropped by whole channels.
    6. ``residual``: it is added to an activation that is not a pointwise function of itself.
    7. ``hidden``, ``input``: products with weights read it, and no product of activations does. If
       they alone made it, it is hidden. It may be returned besides.
    8. ``output``: no product reads it.

    Args:
        graph: joint or forward alone, before any change.
        masks: its mask nodes.
        parameters: the placeholders that are parameters. If there are none, as in a function of
            plain tensors, the last factor of a product is taken for its weight where it comes from
            the inputs alone.
    """
    states = _states(graph)
    forward = _live(graph, forward_nodes(graph))
    origins = Origins(forward, parameters, states)
    walker = Walker(forward, _results(graph), origins)
    return {mask: _role(mask, origins, walker) for mask in masks}


def _role(mask: fx.Node, origins: Origins, walker: Walker) -> Role:
    dropped = find_dropped(mask, walker, origins)
    if not dropped.products:
        return Role.OUTPUT
    of = [origins[x] for x in dropped.operands]
    made = Made.NOTHING
    for origin in of:
        made |= origin.made
    uses = walker.walk(dropped)
    if _of_weights(dropped, origins, uses):
        return Role.WEIGHT
    if dropped.by_sample:
        return Role.SAMPLES
    weighs = uses.uses & (Use.ACTIVATION | Use.GATE)
    if weighs and of and all(origin.made & Made.SOFTMAX for origin in of):
        return Role.ATTENTION
    recurrent = _recurrent_role(dropped, made, uses, walker)
    if recurrent is not None:
        return recurrent
    if _in_map(dropped, origins, uses):
        return Role.CHANNELS_SKIP if uses.merges else Role.CHANNELS
    if uses.merges:
        return Role.RESIDUAL
    read = uses.uses & ~Use.GATE
    if read and not read & ~(Use.WEIGHT | Use.CONVOLUTION):
        return Role.HIDDEN if made is Made.PRODUCT else Role.INPUT
    return Role.OTHER if read else Role.OUTPUT


def _of_weights(dropped: Dropped, origins: Origins, uses: Uses) -> bool:
    of = [origins[x] for x in dropped.operands]
    if any(origin.of_weights for origin in of) and not any(origin.of_data for origin in of):
        return True
    plain = not any(origin.is_activation for origin in of)
    return plain and uses.uses is Use.AS_WEIGHT


def _recurrent_role(dropped: Dropped, made: Made, uses: Uses, walker: Walker) -> Role | None:
    is_made = bool(made & Made.RECURRENCE)
    if made & Made.PRODUCT and made & Made.STREAM:
        is_made = False  # a stream that a recurrent layer is one of many to add to
    if is_made and uses.merges:
        uses = walker.walk(dropped, past_merges=True)
    if uses.uses & Use.RECURRENCE:
        return Role.RNN_BETWEEN if is_made else Role.RNN_INPUT
    return Role.RNN_OUTPUT if is_made else None


def _in_map(dropped: Dropped, origins: Origins, uses: Uses) -> bool:
    """Returns whether channels or elements of a feature map are dropped."""
    made_by_one = any(is_map(x, origins[x].channels) for x in dropped.operands)
    into_one = bool(uses.uses & Use.CONVOLUTION)
    if dropped.by_channel:
        return made_by_one or into_one
    if not made_by_one:
        return False
    if uses.merges:
        return all(is_map(node, origins[node].channels) for node in uses.merges)
    spatial = all(has_positions(x) for x in uses.convolved)
    return into_one and spatial and not uses.uses & Use.WEIGHT


def _results(graph: fx.Graph) -> set[fx.Node]:
    """Returns what the forward returns to the program: no gradients, no states."""
    (results,) = graph.output_node().args
    described = graph.output_node().meta.get("desc", ())
    results = list(results) if isinstance(results, (tuple, list)) else [results]
    described = [*described, *[None] * (len(results) - len(described))]
    forward = set(forward_nodes(graph))
    return {
        node
        for node, what in zip(results, described, strict=True)
        if isinstance(node, fx.Node)
        and node in forward
        and not isinstance(what, (GradAOTOutput, InputMutationAOTOutput))
    }


def _states(graph: fx.Graph) -> set[fx.Node]:
    """Returns the inputs that the graph writes new values to."""
    inputs = graph.find_nodes(op="placeholder")
    written = {
        node.args[0]
        for node in graph.find_nodes(op="call_function", target=aten.copy_.default)
        if isinstance(node.args[0], fx.Node)
    }
    described = graph.output_node().meta.get("desc", ())
    mutated = [what.mutated_input for what in described if isinstance(what, InputMutationAOTOutput)]
    return {x for x in inputs if x in written or x.meta.get("desc") in mutated}


def _live(graph: fx.Graph, forward: list[fx.Node]) -> list[fx.Node]:
    """Returns the nodes that what the forward returns depends on."""
    live = _results(graph)
    for node in reversed(forward):
        if node in live:
            live.update(node.all_input_nodes)
    return [node for node in forward if node in live]
