"""Products: an operand that is zero along the contracted dimension shrinks the other as well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import fx

from ..facts import Facts
from ..relation import (
    Dims,
    Factor,
    Output,
    Relation,
    all_of,
    any_of,
    dims,
    shape_of,
    tensor_operands,
)

M, K, N, BATCH = range(4)


def mm(node: fx.Node) -> Relation:
    """``[m, k] @ [k, n]``."""
    return Relation((dims(M, K), dims(K, N)), (Output(dims(M, N), any_of, (0, 1)),), None, 2)


def bmm(node: fx.Node) -> Relation:
    """``[b, m, k] @ [b, k, n]``."""
    out = Output(dims(BATCH, M, N), any_of, (0, 1))
    return Relation((dims(BATCH, M, K), dims(BATCH, K, N)), (out,), None, 2)


def addmm(node: fx.Node) -> Relation:
    """``bias + [m, k] @ [k, n]``."""
    return _with_addend(node, mm(node))


def baddbmm(node: fx.Node) -> Relation:
    """``bias + [b, m, k] @ [b, k, n]``."""
    return _with_addend(node, bmm(node))


def convolution(node: fx.Node) -> Relation | None:
    """``[n, ci, *] * [co, ci, *] -> [n, co, *]``, not grouped and not transposed.

    The spatial dimensions mix neighbours, so they have no label.
    """
    transposed, groups = node.args[6], node.args[8]
    if transposed or groups != 1:
        return None
    image, weight, *bias = tensor_operands(node)
    spatial = len(shape_of(image)) - 2
    operands = (_image(BATCH, K, spatial), _image(N, K, spatial), *(dims(N) for _ in bias))
    out = Output(_image(BATCH, N, spatial), _product_plus_bias, (0, 1))
    return Relation(operands, (out,), None, _flops_per_point(shape_of(node), shape_of(weight)))


def convolution_backward(node: fx.Node) -> Relation | None:
    """Gradients of `convolution`: of the image, the weight and the bias."""
    transposed, groups, mask = node.args[7], node.args[9], cast("Sequence[bool]", node.args[10])
    if transposed or groups != 1:
        return None
    grad, image, weight = tensor_operands(node)
    spatial = len(shape_of(image)) - 2
    g, x, w = _image(BATCH, N, spatial), _image(BATCH, K, spatial), _image(N, K, spatial)
    outputs = (
        Output(x, lambda facts: facts[2], (0, 2)),
        Output(w, lambda facts: facts[0] | facts[1], (0, 1)),
        Output(dims(N), lambda facts: facts[0], (0,)),
    )
    flops = _flops_per_point(shape_of(grad), shape_of(weight)) * (mask[0] + mask[1])
    return Relation(
        (g, x, w),
        tuple(output if wanted else None for output, wanted in zip(outputs, mask, strict=True)),
        (3, dims(N)) if node.args[3] else None,
        flops,
    )


def _product_plus_bias(facts: Sequence[Facts]) -> Facts:
    product = facts[0] | facts[1]
    return all_of([product, *facts[2:]])


def _with_addend(node: fx.Node, product: Relation) -> Relation:
    """Puts ``bias``, which broadcasts to the output, before the operands of a product."""
    output = product.outputs[0]
    assert output is not None
    shape = shape_of(tensor_operands(node)[0])
    aligned = output.dims[len(output.dims) - len(shape) :]
    bias = tuple(() if size == 1 else factors for size, factors in zip(shape, aligned, strict=True))
    out = Output(output.dims, lambda facts: (facts[1] | facts[2]) & facts[0], (1, 2))
    return Relation((bias, *product.operands), (out,), None, product.product_flops)


def _image(outer: int, channel: int, spatial: int) -> Dims:
    return ((Factor(outer),), (Factor(channel),)) + ((),) * spatial


def _flops_per_point(
    out: Sequence[int | torch.SymInt], weight: Sequence[int | torch.SymInt]
) -> int | torch.SymInt:
    return 2 * math.prod(out[2:]) * math.prod(weight[2:])
