"""The table of rules: from an op to its `Relation`.

An op without a rule is opaque: nothing is known of its result and all of its operands is needed,
so it runs dense, which is always right. A new rule is one function, one row here and one row of
``tests/passes/test_rules.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import fx

from ...runtime import rnn_layer
from ..relation import Relation, tensor_operands
from . import contraction, gather_scatter, layout, pointwise, recurrent, reduction

Rule = Callable[[fx.Node], Relation | None]

aten, prims = torch.ops.aten, torch.ops.prims


@functools.cache
def rule_table() -> dict[object, Rule]:
    """Returns the rule of every op that has one, by overload packet."""
    import torch._inductor.inductor_prims  # noqa: F401  # registers some of the ops below; loads no Triton

    return {
        **dict.fromkeys(pointwise.KEEP_ZERO, pointwise.keep_zero),
        **dict.fromkeys(pointwise.ADD, pointwise.add_like),
        **dict.fromkeys(pointwise.MULTIPLY, pointwise.multiply),
        **dict.fromkeys(pointwise.DIVIDE, pointwise.divide),
        **dict.fromkeys(pointwise.FIRST, pointwise.keep_first),
        **dict.fromkeys(pointwise.COMPARE, pointwise.compare),
        aten.pow: pointwise.power,
        aten.clamp: pointwise.clamp,
        aten.clamp_min: pointwise.clamp,
        aten.clamp_max: pointwise.clamp_max,
        aten.hardtanh: pointwise.clamp,
        aten.where: pointwise.where,
        aten.masked_fill: pointwise.masked_fill,
        aten.addcmul: pointwise.add_product,
        aten.addcdiv: pointwise.add_quotient,
        prims.fma: pointwise.fused_multiply_add,
        aten.mm: contraction.mm,
        aten.bmm: contraction.bmm,
        aten.addmm: contraction.addmm,
        aten.baddbmm: contraction.baddbmm,
        aten.convolution: contraction.convolution,
        aten.convolution_backward: contraction.convolution_backward,
        rnn_layer.rnn_layer.overloadpacket: recurrent.rnn_layer,
        rnn_layer.rnn_layer_backward.overloadpacket: recurrent.rnn_layer_backward,
        aten.permute: layout.permute,
        aten.transpose: layout.transpose,
        aten.t: layout.transpose,
        **dict.fromkeys(
            (aten.view, aten._unsafe_view, aten.reshape, aten.squeeze, aten.unsqueeze), layout.view
        ),
        aten.expand: layout.expand,
        aten.cat: layout.cat,
        aten.split: layout.split,
        aten.split_with_sizes: layout.split,
        aten.unbind: layout.unbind,
        aten.slice: layout.slice_,
        aten.select: layout.select,
        aten.select_scatter: layout.select_scatter,
        aten.slice_scatter: layout.slice_scatter,
        aten.flip: layout.flip,
        aten.constant_pad_nd: layout.pad,
        aten.sum: reduction.sum_,
        **dict.fromkeys((aten.amax, aten.amin, aten.any), reduction.keep_zero),
        **dict.fromkeys((aten.mean, aten.var), reduction.average),
        aten.var_mean: reduction.var_mean,
        **dict.fromkeys((aten.prod, aten.all, aten.argmax, aten.argmin), reduction.unknown),
        **dict.fromkeys((aten.cumsum, aten._softmax, aten._log_softmax), reduction.along),
        aten.embedding: gather_scatter.embedding,
        aten.embedding_dense_backward: gather_scatter.embedding_dense_backward,
        aten.index: gather_scatter.index,
        aten.index_put: gather_scatter.index_put,
        aten._unsafe_index: gather_scatter.index,
        aten._unsafe_index_put: gather_scatter.index_put,
        aten.gather: gather_scatter.gather,
        aten.scatter: gather_scatter.scatter,
        aten.scatter_add: gather_scatter.scatter,
        **dict.fromkeys(
            (
                aten.max_pool2d_with_indices,
                aten.max_pool3d_with_indices,
                aten.max_pool2d_with_indices_backward,
                aten.max_pool3d_with_indices_backward,
                aten.avg_pool2d,
                aten.avg_pool2d_backward,
                aten.avg_pool3d,
                aten.avg_pool3d_backward,
                aten._adaptive_avg_pool2d,
                aten._adaptive_avg_pool2d_backward,
                prims._low_memory_max_pool_with_offsets,
                prims._low_memory_max_pool_offsets_to_indices,
            ),
            gather_scatter.channelwise,
        ),
    }


def relation_of(node: fx.Node) -> Relation | None:
    """Returns the labels of the node, None where the op is opaque."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return None
    if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
        return None
    if not _has_values(node) or not _on_one_device(node):
        return None
    rule = rule_table().get(target.overloadpacket)
    if rule is None and torch.Tag.pointwise in target.tags:
        rule = pointwise.unknown
    return None if rule is None else rule(node)


def _has_values(node: fx.Node) -> bool:
    """Only strided tensors, or tuples of them, are analysed."""
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return any(isinstance(v, torch.Tensor) for v in values) and all(
        v is None or (isinstance(v, torch.Tensor) and v.layout == torch.strided) for v in values
    )


def _on_one_device(node: fx.Node) -> bool:
    """A kept set lives on the device of its mask; what moves a tensor to another is opaque."""
    value = node.meta["val"]
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    values += [operand.meta["val"] for operand in tensor_operands(node)]
    return len({v.device for v in values if v is not None and v.dim() > 0}) <= 1
