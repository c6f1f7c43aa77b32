"""Finds the dropped features whose zeros an op sees more of than that they are zeros.

The kept features are expanded with 0.0, where the masked dense program has ``x * 0``, which is
-0.0 for a negative x. And what is zero times anything is taken for zero, which 0 * (1 / 0) is not.
Neither matters but to a few ops: those that read a sign bit, and those without a finite value at
zero. What they read is followed back to the dropout, whose mask then stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import torch
from torch import fx

from .facts import Everything, Facts, KeptAxis
from .relation import is_tensor, tensor_operands
from .rules import rule_table
from .support import Support, axes_in

aten, prims = torch.ops.aten, torch.ops.prims

_ANY: Final = (0, 1, 2)
EXPOSING: Final[Mapping[object, tuple[int, ...]]] = {
    # Read the sign of a zero
    aten.atan2: _ANY,
    **dict.fromkeys((aten.signbit, prims.signbit), (0,)),
    aten.copysign: (1,),
    # Are infinite or undefined at zero
    **dict.fromkeys((aten.reciprocal, aten.rsqrt, aten.log, aten.log2, aten.log10), (0,)),
    **dict.fromkeys((aten.logit, aten.digamma, aten.lgamma, aten.pow), (0,)),
    **dict.fromkeys((aten.acosh, aten.mvlgamma, aten.special_ndtri), (0,)),
    **dict.fromkeys((aten.special_bessel_y0, aten.special_bessel_y1), (0,)),
    **dict.fromkeys((aten.special_modified_bessel_k0, aten.special_modified_bessel_k1), (0,)),
    aten.special_scaled_modified_bessel_k0: (0,),
    aten.special_scaled_modified_bessel_k1: (0,),
    **dict.fromkeys((prims.digamma, prims.log2, prims.reciprocal, prims.rsqrt), (0,)),
    **dict.fromkeys((aten.div, aten.fmod, aten.remainder, aten.floor_divide), (1,)),
    **dict.fromkeys((aten.igamma, aten.igammac, prims.igamma, prims.igammac), _ANY),
    aten.xlogy: _ANY,
    **dict.fromkeys((aten.special_zeta, aten.logit_backward, aten.polygamma), _ANY),
    aten.addcdiv: (2,),
}
"""Ops that see more of a zero, and which of their tensor operands they see it of."""

_CHOOSE: Final = (
    *(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.masked_fill.Scalar),
    *(aten.masked_fill.Tensor, aten.maximum.default, aten.minimum.default, aten.fmax.default),
    *(aten.fmin.default, aten.clamp.Tensor, aten.clamp_min.Tensor, aten.clamp_max.Tensor),
)
_MIXES: Final = (
    *(aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.convolution, aten.convolution_backward),
    *(aten.sum, aten.mean, aten.amax, aten.amin, aten.var, aten.var_mean, aten.prod),
    *(aten.any, aten.all, aten.argmax, aten.argmin, aten._softmax, aten._log_softmax),
)


def find_exposed_zeros(graph: fx.Graph, support: Support) -> set[KeptAxis]:
    """Returns the kept axes, as their dropouts see them, that may not be dropped.

    Args:
        graph: an ATen graph, forward alone or forward and backward together.
        support: what is known of its zeros.
    """
    zeros: dict[fx.Node, Facts] = {}
    exposed: set[KeptAxis] = set()
    for node in graph.nodes:
        exposed |= set(_exposed_by(node, zeros))
        zeros[node] = _zeros_in(node, support, zeros)
    return exposed


def _exposed_by(node: fx.Node, zeros: Mapping[fx.Node, Facts]) -> Iterator[KeptAxis]:
    packet = getattr(node.target, "overloadpacket", None)
    operands = tensor_operands(node)
    places = EXPOSING.get(packet, ())
    if node.target is aten.view.dtype:
        places = (0,)  # the bits
    elif packet is aten.pow and _is_above_zero(node.args[1]):
        places = ()
    elif packet is aten.pow and operands and operands[0] is not node.args[0]:
        places = ()  # a number to the power of zero
    elif operands and operands[0] is not node.args[0]:
        places = tuple(place - 1 for place in places if place)  # a number comes first
    seen = {axis for i in places if i < len(operands) for axis in zeros[operands[i]]}
    yield from seen
    sites = {axis.site for axis in seen}
    for operand in operands if seen else ():
        # What another dropout makes zero would count as zero where it is zero over zero.
        yield from (axis for axis in zeros[operand] if axis.site not in sites)


def _is_above_zero(exponent: object) -> bool:
    return isinstance(exponent, (int, float)) and exponent >= 0


def _zeros_in(node: fx.Node, support: Support, zeros: Mapping[fx.Node, Facts]) -> Facts:
    """Returns the axes whose zeros may stand somewhere in the result, proven there or not."""
    own = Facts(axes_in(support.zero(node))) if is_tensor(node) else Facts()
    packet = getattr(node.target, "overloadpacket", None)
    if packet in _MIXES:
        return own
    operands = [zeros[operand] for operand in node.all_input_nodes]
    tags = getattr(node.target, "tags", ())
    if torch.Tag.pointwise not in tags or node.target in _CHOOSE:
        for facts in operands:
            own = Facts(own | facts)
        return own
    relation = support.relations.get(node)
    output = relation.outputs[0] if relation and packet in rule_table() else None
    if output is None:
        return own
    kept = output.zero([zeros[x] for x in tensor_operands(node)])
    return own if isinstance(kept, Everything) else Facts(own | kept)
