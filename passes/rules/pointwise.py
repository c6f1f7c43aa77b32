"""Pointwise ops: operands and output run together, broadcasting by aligned dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..facts import EVERYTHING, NOTHING, Facts
from ..relation import (
    Dims,
    Factor,
    Output,
    Relation,
    ZeroRule,
    all_of,
    any_of,
    is_tensor,
    never,
    shape_of,
    tensor_operands,
)

aten, prims = torch.ops.aten, torch.ops.prims


def pointwise(zero: ZeroRule, node: fx.Node) -> Relation | None:
    """Labels every dimension of a pointwise op.

    A dimension that an operand broadcasts along has no label on that operand. A dimension whose
    sizes cannot be compared (symbolic and different) has none at all.
    """
    operands = tensor_operands(node)
    out_shape = shape_of(node)
    rank = len(out_shape)
    labelled = [True] * rank
    aligned: list[list[bool]] = []
    for operand in operands:
        shape = shape_of(operand)
        runs = [False] * (rank - len(shape)) + [False] * len(shape)
        for dim, size in enumerate(shape, start=rank - len(shape)):
            runs[dim] = statically_known_true(size == out_shape[dim])
            if not runs[dim] and not statically_known_true(size == 1):
                labelled[dim] = False
        aligned.append(runs)

    def dims_of(runs: Sequence[bool], start: int) -> Dims:
        return tuple(
            (Factor(dim),) if runs[dim] and labelled[dim] else () for dim in range(start, rank)
        )

    return Relation(
        operands=tuple(
            dims_of(runs, rank - len(shape_of(operand)))
            for operand, runs in zip(operands, aligned, strict=True)
        ),
        outputs=(Output(dims_of([True] * rank, 0), zero),),
    )


def first(facts: Sequence[Facts]) -> Facts:
    """Zero where the first operand is: f(0, anything) = 0."""
    return facts[0]


def second(facts: Sequence[Facts]) -> Facts:
    """Zero where the second operand is."""
    return facts[1]


def where_zero(facts: Sequence[Facts]) -> Facts:
    """``where(c, a, b)``: b must be zero, and a too unless c is false there."""
    condition, taken, other = facts
    return (condition | taken) & other


def fma_zero(facts: Sequence[Facts]) -> Facts:
    """``fma(a, b, c) = a * b + c``."""
    return (facts[0] | facts[1]) & facts[2]


def addc_zero(facts: Sequence[Facts]) -> Facts:
    """``addcmul(a, b, c) = a + b * c``."""
    return facts[0] & (facts[1] | facts[2])


def quotient_zero(facts: Sequence[Facts]) -> Facts:
    """``a / b`` is zero where a is, unless b may be as well: 0 / 0 is undefined."""
    return NOTHING if facts[1] or facts[1] is EVERYTHING else facts[0]


def addc_quotient_zero(facts: Sequence[Facts]) -> Facts:
    """``addcdiv(a, b, c) = a + b / c``."""
    return facts[0] & quotient_zero(facts[1:])


# f(0) = 0 for these; a bool is zero when it is False.
KEEP_ZERO = (
    *(aten.abs, aten.neg, aten.relu, aten.sqrt, aten.square, aten.sign, aten.sgn, aten.tanh),
    *(aten.sin, aten.tan, aten.sinh, aten.asin, aten.atan, aten.asinh, aten.erf, aten.expm1),
    *(aten.log1p, aten.floor, aten.ceil, aten.round, aten.trunc, aten.frac, aten.alias),
    *(aten.clone, aten._to_copy, aten.detach, aten.gelu, aten.silu, aten.elu, aten.leaky_relu),
    *(aten.mish, aten.hardswish, aten.lift_fresh_copy, aten.nan_to_num),
    *(prims.convert_element_type, prims.device_put),
)
ADD = (aten.add, aten.sub, aten.maximum, aten.minimum, aten.logical_or, aten.bitwise_or)
MULTIPLY = (aten.mul, aten.logical_and, aten.bitwise_and)
DIVIDE = (aten.div, aten.fmod)
# g * f'(x) and shifts: zero where g is.
FIRST = (
    *(aten.bitwise_right_shift, aten.threshold_backward, aten.gelu_backward, aten.silu_backward),
    *(aten.tanh_backward, aten.sigmoid_backward, aten.elu_backward, aten.leaky_relu_backward),
    *(aten.hardswish_backward, aten.hardtanh_backward, aten.mish_backward),
)
# What remains of the tag: comparisons with a number are settled one by one.
COMPARE = (aten.gt, aten.lt, aten.ne, aten.ge, aten.le, aten.eq)


def add_like(node: fx.Node) -> Relation | None:
    """A sum with a number in it is zero nowhere, unless the number is."""
    # A size is a number whose value is not known, and is not equal to 0 either.
    numbers = [arg for arg in node.args if not _is_tensor(arg)]
    keeps = _is_finite(node) and all(number == 0 for number in numbers)
    return pointwise(all_of if keeps else never, node)


def multiply(node: fx.Node) -> Relation | None:
    """A product, of tensors or with a finite number."""
    return pointwise(any_of if _is_finite(node) else never, node)


def divide(node: fx.Node) -> Relation | None:
    """``a / b`` and the remainder: by a tensor that is not zero there too, or by a number."""
    dividend, divisor = node.args[:2]
    if not _is_tensor(dividend):
        return pointwise(never, node)
    if _is_tensor(divisor):
        return pointwise(quotient_zero, node)
    value: Any = divisor.meta["val"] if isinstance(divisor, fx.Node) else divisor
    keeps = _is_finite(node) and statically_known_true(value != 0)
    return pointwise(first if keeps else never, node)


def keep_first(node: fx.Node) -> Relation | None:
    """Zero where the first operand is, which has to be a tensor."""
    keeps = _is_tensor(node.args[0]) and _is_finite(node)
    return pointwise(first if keeps else never, node)


def power(node: fx.Node) -> Relation | None:
    """``x ** e`` with a number e > 0 keeps zeros."""
    exponent = node.args[1] if len(node.args) > 1 else None
    keeps = isinstance(exponent, (int, float)) and exponent > 0
    return pointwise(first if keeps else never, node)


def compare(node: fx.Node) -> Relation | None:
    """``x < c`` is False, that is zero, where x is zero and ``0 < c`` does not hold."""
    number = node.args[1]
    if not isinstance(number, (int, float)):
        return pointwise(never, node)
    false_at_zero = {
        "gt": number >= 0,
        "lt": number <= 0,
        "ne": number == 0,
        "ge": number > 0,
        "le": number < 0,
        "eq": number != 0,
    }[node.target._schema.name.removeprefix("aten::")]  # type: ignore[union-attr]
    return pointwise(first if false_at_zero else never, node)


def keep_zero(node: fx.Node) -> Relation | None:
    """A function with f(0) = 0."""
    return pointwise(first if _is_finite(node) else never, node)


def where(node: fx.Node) -> Relation | None:
    """``where`` of three tensors."""
    return pointwise(where_zero if len(tensor_operands(node)) == 3 else never, node)


def clamp(node: fx.Node) -> Relation | None:
    """``clamp(x, lo, hi)`` with numbers lo <= 0 <= hi keeps zeros, ``hardtanh`` by default too."""
    low, high, *_ = (*node.args[1:3], None, None)
    low = node.kwargs.get("min", node.kwargs.get("min_val", low))
    high = node.kwargs.get("max", node.kwargs.get("max_val", high))
    keeps = (low is None or (isinstance(low, (int, float)) and low <= 0)) and (
        high is None or (isinstance(high, (int, float)) and high >= 0)
    )
    return pointwise(first if keeps else never, node)


def clamp_max(node: fx.Node) -> Relation | None:
    """``clamp_max(x, hi)`` with a number hi >= 0 keeps zeros."""
    high = node.args[1]
    return pointwise(first if isinstance(high, (int, float)) and high >= 0 else never, node)


def masked_fill(node: fx.Node) -> Relation | None:
    """``masked_fill(x, mask, 0)`` keeps the zeros of x."""
    value = node.args[2]
    return pointwise(first if isinstance(value, (int, float)) and value == 0 else never, node)


def fused_multiply_add(node: fx.Node) -> Relation | None:
    """``prims.fma``."""
    return pointwise(fma_zero if len(tensor_operands(node)) == 3 else never, node)


def add_product(node: fx.Node) -> Relation | None:
    """``addcmul``."""
    keeps = len(tensor_operands(node)) == 3 and _is_finite(node)
    return pointwise(addc_zero if keeps else never, node)


def add_quotient(node: fx.Node) -> Relation | None:
    """``addcdiv``."""
    keeps = len(tensor_operands(node)) == 3 and _is_finite(node)
    return pointwise(addc_quotient_zero if keeps else never, node)


def unknown(node: fx.Node) -> Relation | None:
    """Any other pointwise op: dimensions run together, zeros are not kept."""
    return pointwise(never, node) if is_tensor(node) else None


def _is_tensor(arg: object) -> bool:
    return isinstance(arg, fx.Node) and is_tensor(arg)


def _is_finite(node: fx.Node) -> bool:
    """Whether all numbers among the arguments are finite: 0 times infinity is undefined."""
    numbers = [arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, float)]
    return all(math.isfinite(number) for number in numbers)
