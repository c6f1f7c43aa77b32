"""Finds out what the backward uses a saved tensor for: that decides how it may be encoded."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator

import torch
from torch import fx

from .cut_graphs import LAYOUT_OPS, bytes_of, downstream
from .relation import shape_of
from .smooth_uses import ErrorGrowth

aten, prims = torch.ops.aten, torch.ops.prims

COMPARISONS = (
    *(aten.le.Scalar, aten.lt.Scalar, aten.ge.Scalar),
    *(aten.gt.Scalar, aten.eq.Scalar, aten.ne.Scalar),
)
_SAME_VALUES = {*LAYOUT_OPS, aten.clone.default, prims.convert_element_type.default}
_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
_SUMS = {
    *(aten.add.Tensor, aten.sum.dim_IntList, aten.where.self, aten.index.Tensor, aten.cat.default),
    *(aten.constant_pad_nd.default, aten.slice_scatter.default, aten.select_scatter.default),
}
_NEVER_NEGATIVE = {
    *(aten.relu.default, aten.sigmoid.default, aten.exp.default, aten.abs.default),
}
_KEEP_SIGN = {
    *(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar),
    *(aten.avg_pool2d.default, aten.mean.dim),
}

MASK, SIGN, INDEX = "mask", "sign", "index"
WEIGHT_GRADIENT, ATTENTION, SOFTMAX = "weight gradient", "attention", "softmax"
POINTWISE, STATISTIC = "pointwise", "statistic"


def uses_of(
    saved: fx.Node, parameter_grads: Collection[fx.Node], growth: ErrorGrowth
) -> tuple[str, ...]:
    """Returns what a backward graph uses an input of it for.

    Args:
        saved: the input.
        parameter_grads: the nodes that are gradients of parameters and of nothing else.
        growth: where in the backward an error grows.

    Returns:
        ``mask`` and ``index`` by type. Else, each once: ``sign`` where it is only compared with a
        number; ``weight gradient`` where it is an operand of a product that nothing but
        gradients of parameters depends on; ``attention`` for operands of other products and of
        fused attention; ``softmax`` for what is exponentiated relative to its maximum;
        ``pointwise``; ``statistic`` for what is broadcast over many elements there, and for the
        sums of attention; and the name of any other op, or of the first one further on that makes
        a large error of a small one.
    """
    dtype = saved.meta["val"].dtype
    if dtype == torch.bool:
        return (MASK,)
    if dtype.is_complex:
        return ("complex",)
    if not dtype.is_floating_point:
        return (INDEX,)
    uses = {use_of(value, user, parameter_grads) for value, user in readers(saved)}
    others = [(v, user) for v, user in readers(saved) if not is_comparison(user)]
    grows = (growth.between(value, user) for value, user in others)
    return tuple(sorted(uses | {name for name in grows if name is not None}))


def readers(saved: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yields who reads the values of a tensor, through views, copies and conversions.

    Yields:
        The node that is read and the node that reads it.
    """
    for user in saved.users:
        if user.target is aten.sym_size.int:
            continue
        if user.target in (aten.alias.default, aten.detach.default):
            yield from (
                (saved if value is user else value, reader) for value, reader in readers(user)
            )
        elif user.target in _SAME_VALUES or (
            user.target is operator.getitem and saved.target in LAYOUT_OPS
        ):
            yield from readers(user)
        else:
            yield saved, user


def same_values(node: fx.Node) -> Iterator[fx.Node]:
    """Yields a tensor and those it is a view, a copy or a conversion of, nearest first."""
    while True:
        yield node
        source = node.args[0] if node.args else None
        if node.target not in _SAME_VALUES or not isinstance(source, fx.Node):
            return
        node = source


def use_of(value: fx.Node, user: fx.Node, parameter_grads: Collection[fx.Node]) -> str:
    """Returns what one reader uses a tensor for, as `uses_of` tells it."""
    if user.target in COMPARISONS:
        return SIGN if is_comparison(user) else "a comparison"
    if user.target in _PRODUCTS:
        alone = _is_parameter_grad(user, parameter_grads)
        return WEIGHT_GRADIENT if alone and not _is_bias(value, user) else ATTENTION
    if user.target is aten.convolution_backward.default:
        # The input of a convolution is an operand of its weight gradient alone.
        alone = value is user.args[1] and value not in (user.args[0], user.args[2])
        weights = (u for u in user.users if u.target is operator.getitem and u.args[1] == 1)
        ends = all(_is_parameter_grad(weight, parameter_grads) for weight in weights)
        return WEIGHT_GRADIENT if alone and ends else "convolution_backward"
    if "scaled_dot_product" in str(user.target):
        arguments = _named_arguments(value, user)
        if "logsumexp" in arguments:
            return STATISTIC
        # A mask of 0 and minus infinity is no number to be rounded.
        return "attention mask" if arguments & {"attn_mask", "attn_bias"} else ATTENTION
    if user.target is aten.sub.Tensor and _is_shifted_for_exp(value, user):
        return SOFTMAX
    target = user.target
    if isinstance(target, torch._ops.OpOverload):
        # A conversion to float before the op that rounds back is as harmless as the op itself.
        if torch.Tag.pointwise in target.tags:
            return STATISTIC if bytes_of(value) < bytes_of(user) // 4 else POINTWISE
        return target._schema.name.split("::")[-1]
    return str(target)


def is_comparison(user: fx.Node) -> bool:
    """Returns whether an op compares with a number that the graph knows."""
    return user.target in COMPARISONS and isinstance(user.args[1], (int, float))


def _named_arguments(value: fx.Node, user: fx.Node) -> set[str]:
    """Returns the names of the arguments that a tensor is given as."""
    arguments = user.target._schema.arguments  # type: ignore[union-attr]
    given = {a.name: x for a, x in zip(arguments, user.args, strict=False)} | user.kwargs
    return {name for name, x in given.items() if x is value}


def _is_bias(value: fx.Node, product: fx.Node) -> bool:
    adds = product.target in (aten.addmm.default, aten.baddbmm.default)
    return adds and product.args[0] is value


def _is_parameter_grad(product: fx.Node, parameter_grads: Collection[fx.Node]) -> bool:
    """Returns whether a product is a gradient of parameters, up to a sum, a view or a factor.

    Any other op would hand the error of an operand on to what comes before in the program.
    """
    for node in (product, *downstream(product)):
        if node.op != "output" and node is not product and not _is_linear(node):
            return False
        if any(user.op == "output" for user in node.users) and node not in parameter_grads:
            return False
    return True


def _is_linear(node: fx.Node) -> bool:
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        return isinstance(node.args[1], (int, float))
    return node.target in _SAME_VALUES or node.target in _SUMS


def _is_shifted_for_exp(value: fx.Node, difference: fx.Node) -> bool:
    other = difference.args[1]
    if difference.args[0] is not value or not isinstance(other, fx.Node):
        return False
    reduced = shape_of(other) != shape_of(value)
    near = [difference, *difference.users]
    return reduced and any(aten.exp.default in {u.target for u in node.users} for node in near)


def never_negative(node: object) -> bool:
    """Returns whether a tensor or a number cannot be below 0, as far as its producers show."""
    if isinstance(node, (int, float)):
        return node >= 0
    if not isinstance(node, fx.Node):
        return False
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
        return True
    if node.target in _NEVER_NEGATIVE:
        return True
    if node.target is aten.full.default:
        return never_negative(node.args[1])
    if node.target is aten.constant_pad_nd.default:
        return all(never_negative(arg) for arg in (node.args[0], *node.args[2:]))
    if node.target in _SAME_VALUES or node.target is operator.getitem:
        return never_negative(node.args[0])
    if node.target in _KEEP_SIGN or "max_pool" in str(node.target):
        operands = [arg for arg in node.args[:2] if isinstance(arg, (fx.Node, int, float))]
        return all(never_negative(operand) for operand in operands)
    return False
