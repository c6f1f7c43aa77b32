"""Marks every dropout of a Dynamo graph: the first pass of all."""

from __future__ import annotations

import dataclasses
import operator
from typing import ClassVar, Final

import torch
from torch import fx
from torch.nn import Parameter

from ..core.decisions import Decision, PassResult, Reason
from .attention_calls import INLINED
from .dynamo_nodes import FACTORIES, op_name, tensor_of
from .eager_draws import keeps_eager_masks
from .match_dropout_calls import DRAWS as CALLS
from .match_dropout_calls import DropoutCall, LeftAlone, match_dropout_call
from .match_hand_masks import DRAWS as HAND_DRAWS
from .match_hand_masks import HandMask, match_hand_mask, refuse
from .prove_mask_uses import prove_mask_uses
from .rewrite_hand_mask import insert_marker, rewrite_hand_mask
from .sites import Site, module_path, source_line, source_name, static_shape


@dataclasses.dataclass(frozen=True)
class MarkResult(PassResult):
    """What the pass did; the decisions are on what it found and left alone."""

    sites: tuple[Site, ...] = ()
    """The dropouts marked, in program order."""


@dataclasses.dataclass(frozen=True)
class MarkDropout:
    """Turns every spelling of dropout into a product with a marked mask.

    ::

        y = torch.nn.functional.dropout(x, 0.5, True)

        mask = torch.ops.ardd.dropout_mask(x, [], 0.5, 1.0, 0)
        y = x * mask

    1. The graph is Dynamo's: before autograd, where rates and ``training`` are still arguments.
       Bodies of higher-order ops that are inlined later, such as checkpointing, are included.
    2. torch's own dropouts are marked wherever they are on (``match_dropout_calls.py``).
    3. Masks made by hand are marked if all they do is drop (``match_hand_masks.py``,
       ``prove_mask_uses.py``); boolean ones become factors. What chooses zero chooses it still,
       so that it is zero for an infinite or undefined input too.
    4. Everything else that drops gets a decision and stays as it is.
    """

    name: ClassVar[str] = "mark-dropout"
    exact: ClassVar[bool] = True

    def apply(self, gm: fx.GraphModule) -> MarkResult:
        """Marks ``gm`` in place.

        Args:
            gm: A graph as Dynamo hands it to a backend; values are in ``meta["example_value"]``.

        Returns:
            The sites marked and the decisions on what was left alone. Their numbers share one
            count, in program order.
        """
        marking = _Marking()
        marking.mark(gm, frozenset(), inlined=True)
        sites = tuple(marking.sites)
        return MarkResult(bool(sites), tuple(marking.decisions), sites)


class _Marking:
    """One run of the pass over a graph and the graphs inside it."""

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self.decisions: list[Decision] = []
        self.seen: set[fx.GraphModule] = set()

    def mark(self, gm: fx.GraphModule, weights: frozenset[fx.Node], inlined: bool) -> None:
        """Marks ``gm``.

        Args:
            gm: The graph.
            weights: Its inputs that the caller passes weights to.
            inlined: Whether it becomes part of the joint graph; if not, it is only looked at.
        """
        if gm in self.seen:
            return  # Dynamo gives each call a body of its own; one shared is judged where first met
        self.seen.add(gm)
        sites_before = len(self.sites)
        weights = _weights(gm.graph, weights)
        for node in list(gm.graph.nodes):
            if node._erased:
                continue
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                self._mark_bodies(gm, node, weights, inlined)
                continue
            found = match_dropout_call(node) or match_hand_mask(node)
            if isinstance(found, DropoutCall):
                self._mark_call(found, inlined, found.x in weights)
            elif isinstance(found, HandMask):
                self._mark_hand_mask(found, inlined, weights)
            elif found is not None:
                self._leave(found)
        if len(self.sites) > sites_before:
            gm.graph.lint()
            gm.recompile()

    def _mark_bodies(
        self, gm: fx.GraphModule, node: fx.Node, weights: frozenset[fx.Node], inlined: bool
    ) -> None:
        at = INLINED.get(str(getattr(node.target, "_name", "")))
        for index, arg in enumerate(node.args):
            if not isinstance(arg, fx.Node) or arg.op != "get_attr":
                continue
            body = getattr(gm, str(arg.target), None)
            if not isinstance(body, fx.GraphModule):
                continue
            inputs = body.graph.find_nodes(op="placeholder")
            passed = zip(inputs, node.args[index + 1 :], strict=False)
            given = frozenset(inner for inner, outer in passed if outer in weights)
            names = gm.graph.find_nodes(op="get_attr", target=arg.target)
            once = [user for name in names for user in name.users] == [node]
            self.mark(body, given, inlined and index == at and once)

    def _mark_call(self, call: DropoutCall, inlined: bool, of_weight: bool) -> None:
        if not inlined:
            self._leave(_in_subgraph(call.node, call.kind, call.p, call.x))
            return
        site = self._add_site(call.node, call.kind, call.p, 1.0, of_weight)
        graph = call.node.graph
        if call.alpha:
            site = dataclasses.replace(site, mean=1.0 - call.p)
            self.sites[-1] = site
        mask = insert_marker(call.node, call.x, call.shared_dims, site)
        with graph.inserting_before(call.node):
            if call.alpha:
                product = _alpha_dropout(call, mask)
            elif call.inplace:
                product = graph.call_method("mul_", (call.x, mask))
            else:
                product = graph.call_function(operator.mul, (call.x, mask))
        product.meta = dict(call.node.meta)
        call.node.replace_all_uses_with(product)
        graph.erase_node(call.node)

    def _mark_hand_mask(self, found: HandMask, inlined: bool, weights: frozenset[fx.Node]) -> None:
        shape = static_shape(tensor_of(found.mask))
        if not any(found.readers()):
            self._leave(LeftAlone(found.draw, found.kind, found.p, shape, Reason.UNUSED))
            return
        uses = prove_mask_uses(found)
        if keeps_eager_masks():
            uses = "fallback_random keeps what the program draws"
        if isinstance(uses, str):
            self._leave(refuse(found, uses))
            return
        p, mean = (found.q, found.p) if uses.flipped else (found.p, found.q)
        if p == 0:
            return
        if p == 1:
            self._leave(LeftAlone(found.draw, found.kind, 1.0, shape, Reason.P_IS_ONE))
            return
        if not inlined:
            self._leave(_in_subgraph(found.draw, found.kind, p, found.mask))
            return
        of_weight = all(factor in weights for factor in uses.factors)
        site = self._add_site(found.draw, found.kind, p, mean, of_weight)
        rewrite_hand_mask(found, uses, site)

    def _add_site(self, node: fx.Node, kind: str, p: float, mean: float, of_weight: bool) -> Site:
        index = len(self.sites) + len(self.decisions)
        site = Site(index, kind, p, mean, module_path(node), source_line(node), of_weight)
        self.sites.append(site)
        return site

    def _leave(self, found: LeftAlone) -> None:
        self.decisions.append(
            Decision(
                site=len(self.sites) + len(self.decisions),
                kind=found.kind,
                module=found.module or module_path(found.node),
                source=source_line(found.node),
                shape=found.shape,
                p=found.p,
                taken=False,
                reason=found.reason,
                detail=found.detail,
            )
        )


def _alpha_dropout(call: DropoutCall, keep: fx.Node) -> fx.Node:
    """Adds what alpha dropout does with a mask of zeros and ones.

    What is dropped becomes the negative saturation value of SELU, and an affine map keeps mean and
    variance: Klambauer et al. 2017, "Self-normalizing neural networks",
    https://arxiv.org/abs/1706.02515.
    """
    graph, p = call.node.graph, call.p
    scale = ((_SATURATION**2 * p + 1) * (1 - p)) ** -0.5
    factor = graph.call_function(operator.mul, (keep, scale))
    dropped = graph.call_function(operator.mul, (keep, _SATURATION * scale))
    shift = graph.call_function(operator.sub, (dropped, _SATURATION * scale * (1 - p)))
    if call.inplace:
        return graph.call_method("add_", (graph.call_method("mul_", (call.x, factor)), shift))
    return graph.call_function(
        operator.add, (graph.call_function(operator.mul, (call.x, factor)), shift)
    )


_SATURATION: Final = 1.7580993408473766  # of SELU, with the sign turned: its lambda times its alpha


def _in_subgraph(node: fx.Node, kind: str, p: float, like: fx.Node) -> LeftAlone:
    return LeftAlone(node, kind, p, static_shape(tensor_of(like)), Reason.SUBGRAPH)


def _weights(graph: fx.Graph, given: frozenset[fx.Node]) -> frozenset[fx.Node]:
    """Returns the nodes made of parameters and buffers alone.

    Args:
        graph: The graph, before any change.
        given: Its inputs that are known to be weights.
    """
    weights = set(given)
    constants = set()
    for node in graph.nodes:
        name = op_name(node)
        inputs = node.all_input_nodes
        if node.op == "placeholder":
            is_weight = isinstance(tensor_of(node), Parameter) or "_buffers[" in source_name(node)
        elif node.op == "get_attr":
            is_weight = tensor_of(node) is not None
        elif name in FACTORIES:
            is_weight = False
            if not name.startswith("rand"):
                constants.add(node)
        else:
            # Dropped once, a weight counts as data: learned queries would be weights for ever.
            is_weight = any(arg in weights for arg in inputs) and name not in CALLS | HAND_DRAWS
            is_weight &= all(arg in weights or arg in constants for arg in inputs)
        if is_weight:
            weights.add(node)
    return frozenset(weights)
