"""One row per op rule, each checked against the op itself.

A rule says how the dimensions of an op run together, and where its result is zero. Both are claims
about what the op computes, so the op is run to check them, for every label that the rule gives:

- *zero*: operands that are zero outside a kept set, as the claim supposes, give a result that is
  zero outside it;
- *cut*: the op run on operands cut to a kept set gives the dense result cut to it, where operands
  that the op sums over are zero outside of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from ardd.passes.facts import EVERYTHING, NOTHING, Facts, KeptAxis
from ardd.passes.find_exposed_zeros import EXPOSING
from ardd.passes.relation import Dims, Factor, Output, Relation
from ardd.passes.rules import relation_of, rule_table
from ardd.runtime.rnn_layer import rnn_layer, rnn_layer_backward

aten, prims = torch.ops.aten, torch.ops.prims
rule_table()  # some of the ops exist only once Inductor has registered them
S = Facts([KeptAxis(0, 0, 8)])
"""Some kept set; the zero rules never look inside."""


@dataclasses.dataclass(frozen=True)
class Row:
    """An op with sample inputs, and what its rule should say of them."""

    op: Any
    args: Callable[[], tuple[Any, ...]]
    labels: str
    """``mm`` is ``ab bc -> ac``: a letter is a label, a dot a dimension without one, parentheses
    hold a dimension made of several labels and ``?`` is an output that is not computed."""
    zero: str
    """The smallest sets of operands that make each output zero: ``0|1`` if either of two does,
    ``0&1`` if both have to, ``-`` if none does."""
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.op} {self.labels}".replace("::", ".")


def f(*shape: int) -> Tensor:
    """Numbers that no op under test is undefined or constant for."""
    return torch.rand(shape, dtype=torch.float64) + 0.5


def signed(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def i(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape)


def b(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.5


def unary(
    op: Any, *args: Any, zero: str = "0", x: Callable[..., Tensor] = signed, **kwargs: Any
) -> Row:
    return Row(op, lambda: (x(4, 6), *args), "ab -> ab", zero, kwargs)


def binary(op: Any, zero: str, x: Callable[..., Tensor] = signed) -> list[Row]:
    """The plain form, and one where the second operand broadcasts."""
    return [
        Row(op, lambda: (x(4, 6), x(4, 6)), "ab ab -> ab", zero),
        Row(op, lambda: (x(4, 6), x(6)), "ab b -> ab", zero),
        Row(op, lambda: (x(4, 6), x(4, 1)), "ab a. -> ab", zero),
    ]


def bits(*shape: int) -> Tensor:
    return torch.randint(1, 8, shape)


def layer(
    kind: str, bias: bool = True, dtype: torch.dtype = torch.float64
) -> tuple[Tensor | None, ...]:
    """Operands of a recurrent layer: 3 steps of 2 samples with 8 features, 4 hidden units."""
    rows = {"lstm": 16, "gru": 12}.get(kind, 4)
    shapes = [(3, 2, 8), (2, 4), (2, 4), (rows, 8), (rows, 4), (rows,), (rows,)]
    tensors: list[Tensor | None] = [signed(*shape).to(dtype) for shape in shapes]
    tensors[2] = tensors[2] if kind == "lstm" else None
    return (*tensors[:5], *(tensors[5:] if bias else (None, None)))


def layer_backward(kind: str, bias: bool, wanted: list[bool]) -> tuple[Any, ...]:
    tensors = layer(kind, bias)
    y, _, c, *reserved = rnn_layer(*tensors, kind, True, "loop", True)
    grads = (signed(3, 2, 4), None, signed(2, 4) if kind == "lstm" else None)
    return (*grads, *tensors, y, c, *reserved, kind, True, "loop", wanted)


KEEP_ZERO = (
    *(aten.abs, aten.neg, aten.relu, aten.square, aten.sign, aten.sgn, aten.tanh, aten.sin),
    *(aten.tan, aten.sinh, aten.atan, aten.asinh, aten.erf, aten.expm1, aten.floor, aten.ceil),
    *(aten.round, aten.trunc, aten.frac, aten.alias, aten.clone, aten._to_copy, aten.detach),
    *(aten.gelu, aten.silu, aten.elu, aten.leaky_relu, aten.mish, aten.hardswish),
    *(aten.lift_fresh_copy, aten.nan_to_num),
)
GRADIENTS = (
    *(aten.gelu_backward, aten.silu_backward, aten.tanh_backward, aten.sigmoid_backward),
    *(aten.hardswish_backward, aten.mish_backward),
)

ROWS: list[Row] = [
    *(unary(op.default) for op in KEEP_ZERO),
    *(unary(op.default, x=f) for op in (aten.sqrt, aten.log1p)),
    *(unary(op.default, x=lambda *s: f(*s) - 0.9) for op in (aten.asin,)),
    unary(prims.convert_element_type.default, torch.float32),
    unary(prims.device_put.default, torch.device("cpu")),
    unary(aten.bitwise_right_shift.Tensor_Scalar, 1, x=bits),
    *binary(aten.bitwise_right_shift.Tensor, "0", x=bits),
    Row(aten.bitwise_right_shift.Scalar_Tensor, lambda: (5, bits(4, 6)), "ab -> ab", "-"),
    *binary(aten.add.Tensor, "0&1"),
    *binary(aten.sub.Tensor, "0&1"),
    unary(aten.add.Tensor, 0.5, zero="-"),
    unary(aten.add.Tensor, 0),
    unary(aten.add.Scalar, 0.5, zero="-"),
    unary(aten.sub.Tensor, 2, zero="-", x=bits),
    unary(aten.add.Tensor, 1j, zero="-"),
    *(row for op in (aten.maximum, aten.minimum) for row in binary(op.default, "0&1")),
    *binary(aten.logical_or.default, "0&1", x=b),
    *binary(aten.bitwise_or.Tensor, "0&1", x=bits),
    unary(aten.bitwise_or.Scalar, 3, zero="-", x=bits),
    Row(aten.bitwise_or.Scalar_Tensor, lambda: (3, bits(4, 6)), "ab -> ab", "-"),
    *binary(aten.mul.Tensor, "0|1"),
    unary(aten.mul.Tensor, 2.5),
    *binary(aten.logical_and.default, "0|1", x=b),
    *binary(aten.bitwise_and.Tensor, "0|1", x=bits),
    *binary(aten.div.Tensor, "0", x=f),
    unary(aten.div.Tensor, 3.0),
    unary(aten.div.Tensor, math.inf, zero="-"),
    unary(aten.div.Tensor, 0, zero="-"),
    unary(aten.fmod.Scalar, 2),
    unary(aten.fmod.Scalar, 0, zero="-"),
    unary(aten.mul.Tensor, math.inf, zero="-"),
    unary(aten.mul.Tensor, -math.inf, zero="-"),
    unary(aten.mul.Tensor, math.nan, zero="-"),
    unary(aten.add.Tensor, 0, zero="-", alpha=math.inf),
    unary(aten.leaky_relu.default, math.inf, zero="-"),
    unary(aten.elu.default, math.inf, zero="-"),
    unary(aten.nan_to_num.default, 5.0),
    unary(aten.pow.Tensor_Scalar, math.nan, zero="-"),
    unary(aten.clamp.default, math.nan, 1.0, zero="-"),
    Row(aten.div.Tensor_mode, lambda: (f(4, 6), f(6)), "ab b -> ab", "0", {"rounding_mode": "floor"}),
    *binary(aten.fmod.Tensor, "0", x=f),
    *(Row(op.default, lambda: (signed(4, 6), signed(4, 6)), "ab ab -> ab", "0") for op in GRADIENTS),
    Row(aten.threshold_backward.default, lambda: (signed(4, 6), signed(4, 6), 0.0), "ab ab -> ab", "0"),
    Row(aten.elu_backward.default, lambda: (signed(4, 6), 1.0, 1.0, 1.0, False, signed(4, 6)), "ab ab -> ab", "0"),
    Row(aten.leaky_relu_backward.default, lambda: (signed(4, 6), signed(4, 6), 0.1, False), "ab ab -> ab", "0"),
    Row(aten.hardtanh_backward.default, lambda: (signed(4, 6), signed(4, 6), -1, 1), "ab ab -> ab", "0"),
    *(
        unary(getattr(aten, op).Scalar, number, zero=zero)
        for number, zeros in {
            -1.0: {"gt": "-", "lt": "0", "ne": "-", "ge": "-", "le": "0", "eq": "0"},
            0: {"gt": "0", "lt": "0", "ne": "0", "ge": "-", "le": "-", "eq": "-"},
            1.0: {"gt": "0", "lt": "-", "ne": "-", "ge": "0", "le": "-", "eq": "0"},
        }.items()
        for op, zero in zeros.items()
    ),
    *binary(aten.gt.Tensor, "-"),
    unary(aten.pow.Tensor_Scalar, 2),
    unary(aten.pow.Tensor_Scalar, 0.5, x=f),
    unary(aten.pow.Tensor_Scalar, 0, zero="-"),
    unary(aten.pow.Tensor_Scalar, -1, zero="-"),
    Row(aten.pow.Scalar, lambda: (2.0, signed(4, 6)), "ab -> ab", "-"),
    *binary(aten.pow.Tensor_Tensor, "-", x=f),
    unary(aten.clamp.default, -0.5, 0.5),
    unary(aten.clamp.default, 0.25, 0.5, zero="-"),
    unary(aten.clamp.default, zero="-", min=0.25),
    unary(aten.clamp.default, None, -0.5, zero="-"),
    Row(aten.clamp.Tensor, lambda: (signed(4, 6), f(6)), "ab b -> ab", "-"),
    unary(aten.clamp_min.default, 0),
    unary(aten.clamp_min.default, 0.5, zero="-"),
    unary(aten.clamp_max.default, 0.5),
    unary(aten.clamp_max.default, -0.5, zero="-"),
    unary(aten.hardtanh.default),
    unary(aten.hardtanh.default, 0.5, 1.0, zero="-"),
    unary(aten.hardtanh.default, zero="-", min_val=0.5, max_val=1.0),
    Row(aten.where.self, lambda: (b(4, 6), signed(4, 6), signed(4, 6)), "ab ab ab -> ab", "0&2|1&2"),
    Row(aten.where.self, lambda: (b(4, 1), signed(6), signed(4, 6)), "a. b ab -> ab", "0&2|1&2"),
    Row(aten.where.self, lambda: (b(4, 6), torch.tensor(0.0), f(4, 6)), "ab  ab -> ab", "0&2|1&2"),
    Row(aten.masked_fill.Scalar, lambda: (signed(4, 6), b(4, 6), 0), "ab ab -> ab", "0"),
    Row(aten.masked_fill.Scalar, lambda: (signed(4, 6), b(4, 6), -1e9), "ab ab -> ab", "-"),
    Row(aten.masked_fill.Tensor, lambda: (signed(4, 6), b(4, 6), torch.tensor(2.0)), "ab ab  -> ab", "-"),
    Row(aten.addcmul.default, lambda: (signed(4, 6), signed(4, 6), signed(6)), "ab ab b -> ab", "0&1|0&2"),
    Row(aten.addcdiv.default, lambda: (signed(4, 6), signed(4, 6), f(6)), "ab ab b -> ab", "0&1"),
    Row(aten.addcdiv.default, lambda: (signed(4, 6), signed(4, 6), f(6)), "ab ab b -> ab", "-", {"value": math.inf}),
    Row(aten.addcmul.default, lambda: (signed(4, 6), signed(4, 6), signed(6)), "ab ab b -> ab", "-", {"value": math.nan}),
    Row(prims.fma.default, lambda: (f(4, 6), f(4, 6), f(4, 6)), "ab ab ab -> ab", "0&2|1&2"),
    unary(aten.sigmoid.default, zero="-"),  # no row in the table: any other pointwise op
    # Products
    Row(aten.mm.default, lambda: (f(4, 6), f(6, 8)), "ab bc -> ac", "0|1"),
    Row(aten.bmm.default, lambda: (f(2, 4, 6), f(2, 6, 8)), "abc acd -> abd", "0|1"),
    Row(aten.addmm.default, lambda: (f(8), f(4, 6), f(6, 8)), "a bc ca -> ba", "0&1|0&2"),
    Row(aten.addmm.default, lambda: (f(4, 8), f(4, 6), f(6, 8)), "ab ac cb -> ab", "0&1|0&2"),
    Row(aten.addmm.default, lambda: (f(1, 8), f(4, 6), f(6, 8)), ".a bc ca -> ba", "0&1|0&2", {"beta": 2, "alpha": 3}),
    Row(aten.baddbmm.default, lambda: (f(4, 1), f(2, 4, 6), f(2, 6, 8)), "a. bac bcd -> bad", "0&1|0&2"),
    *(
        Row(
            aten.convolution.default,
            lambda n=n: (f(4, 6, *[5] * n), f(8, 6, *[3] * n), None, [2] * n, [1] * n, [1] * n, False, [0] * n, 1),  # type: ignore[misc]
            f"ab{'.' * n} cb{'.' * n} -> ac{'.' * n}",
            "0|1",
        )
        for n in (1, 2, 3)
    ),
    Row(
        aten.convolution.default,
        lambda: (f(4, 6, 5), f(8, 6, 3), f(8), [1], [0], [2], False, [0], 1),
        "ab. cb. c -> ac.",
        "0&2|1&2",
    ),
    *(
        Row(
            aten.convolution_backward.default,
            lambda n=n, mask=mask: (  # type: ignore[misc]
                f(4, 8, *[5] * n), f(4, 6, *[5] * n), f(8, 6, *[3] * n), [8] if mask[2] else None,
                [1] * n, [1] * n, [1] * n, False, [0] * n, 1, mask,
            ),
            f"ab{'.' * n} ac{'.' * n} bc{'.' * n} -> " + " ".join(
                dims if wanted else "?"
                for dims, wanted in zip((f"ac{'.' * n}", f"bc{'.' * n}", "b"), mask, strict=False)
            ),
            ", ".join(zero if wanted else "?" for zero, wanted in zip(("2", "0|1", "0"), mask, strict=False)),
        )
        for n in (1, 2, 3)
        for mask in ([True, True, True], [True, True, False], [False, True, False], [True, False, False])
    ),
    # Recurrent layers
    Row(rnn_layer, lambda: (*layer("lstm"), "lstm", False, "loop", True), "..a .. .. .a .. . . -> ... .. .. ? ? ?", "-, -, -, ?, ?, ?"),
    Row(rnn_layer, lambda: (*layer("lstm", False), "lstm", True, "loop", True), "..a .. .. .a .. -> ... .. .. ? ? ?", "-, -, -, ?, ?, ?"),
    *(
        Row(
            rnn_layer,
            lambda k=k: (*layer("lstm", True, torch.float32), "lstm", True, k, True),  # type: ignore[misc]
            "..a .. .. .a .. . . -> ... .. .. ? ? ?",
            "-, -, -, ?, ?, ?",
        )
        for k in ("onednn", "packed")
    ),
    *(
        Row(rnn_layer, lambda k=k: (*layer(k), k, False, "loop", False), "..a .. .a .. . . -> ... .. . ? ? ?", "-, -, -, ?, ?, ?")  # type: ignore[misc]
        for k in ("gru", "rnn_tanh", "rnn_relu")
    ),
    Row(
        rnn_layer_backward,
        lambda: layer_backward("lstm", True, [True] * 7),
        "... .. ..a .. .. .a .. . . ... .. ... . .. -> ..a .. .. .a .. . .",
        "5, -, -, 2, -, -, -",
    ),
    Row(
        rnn_layer_backward,
        lambda: layer_backward("gru", False, [False, True, False, True, True, False, False]),
        "... ..a .. .a .. ... . ... . .. -> ? .. ? .a .. ? ?",
        "?, -, ?, 1, -, ?, ?",
    ),
    # Layout
    Row(aten.permute.default, lambda: (f(2, 4, 6), [2, 0, 1]), "abc -> cab", "0"),
    Row(aten.permute.default, lambda: (f(2, 4, 6), [-1, 0, -2]), "abc -> cab", "0"),
    Row(aten.transpose.int, lambda: (f(2, 4, 6), 0, -1), "abc -> cba", "0"),
    Row(aten.t.default, lambda: (f(4, 6),), "ab -> ba", "0"),
    Row(aten.t.default, lambda: (f(4),), "a -> a", "0"),
    Row(aten.view.default, lambda: (f(2, 4, 6), [8, 6]), "abc -> (ab)c", "0"),
    Row(aten.view.default, lambda: (f(8, 6), [2, -1, 6]), "(ab)c -> abc", "0"),
    Row(aten.view.default, lambda: (f(2, 4, 6), [4, 2, 6]), "..a -> ..a", "0"),
    Row(aten.view.default, lambda: (f(2, 4, 1, 6), [2, 24]), "ab.c -> a(bc)", "0"),
    Row(aten.view.default, lambda: (f(2, 4, 6), [1, 2, 1, 24]), "abc -> .a.(bc)", "0"),
    Row(aten._unsafe_view.default, lambda: (f(2, 4, 6), [48]), "abc -> (abc)", "0"),
    Row(aten.reshape.default, lambda: (f(48), [2, 4, 6]), "(abc) -> abc", "0"),
    Row(aten.squeeze.dim, lambda: (f(4, 1, 6), 1), "a.b -> ab", "0"),
    Row(aten.squeeze.dims, lambda: (f(4, 1, 6, 1), [1, 3]), "a.b. -> ab", "0"),
    Row(aten.unsqueeze.default, lambda: (f(4, 6), 1), "ab -> a.b", "0"),
    Row(aten.expand.default, lambda: (f(4, 1), [2, 4, 6]), "a. -> bac", "0"),
    Row(aten.expand.default, lambda: (f(4, 1), [-1, 6]), "a. -> ab", "0"),
    Row(aten.cat.default, lambda: ([f(4, 2), f(4, 6)], 1), "a. a. -> a.", "0&1"),
    Row(aten.cat.default, lambda: ([f(4, 6), f(2, 6), f(0)],), ".a .a . -> .a", "-"),
    Row(aten.split.Tensor, lambda: (f(4, 6), 4, 1), "a. -> a. a.", "0, 0"),
    Row(aten.split.Tensor, lambda: (f(4, 6), 2), ".a -> .a .a", "0, 0"),
    Row(aten.split_with_sizes.default, lambda: (f(4, 6), [2, 4], -1), "a. -> a. a.", "0, 0"),
    Row(aten.unbind.int, lambda: (f(2, 4, 6), 1), "a.b -> ab ab ab ab", "0, 0, 0, 0"),
    Row(aten.slice.Tensor, lambda: (f(4, 6), 1, 0, 2), "a. -> a.", "0"),
    Row(aten.slice.Tensor, lambda: (f(4, 6), -1, 0, 2**63 - 1), "ab -> ab", "0"),
    Row(aten.slice.Tensor, lambda: (f(4, 6), 1, -6, 6), "ab -> ab", "0"),
    Row(aten.select.int, lambda: (f(2, 4, 6), 1, -1), "a.b -> ab", "0"),
    Row(aten.select_scatter.default, lambda: (f(2, 4, 6), f(2, 6), 1, 2), "a.b ab -> a.b", "0&1"),
    Row(aten.slice_scatter.default, lambda: (f(4, 6), f(4, 2), 1, 0, 2), "a. a. -> a.", "0&1"),
    Row(aten.flip.default, lambda: (f(2, 4, 6), [-1]), "ab. -> ab.", "0"),
    Row(aten.constant_pad_nd.default, lambda: (f(2, 4, 6), [1, 0, 0, 0]), "ab. -> ab.", "0"),
    Row(aten.constant_pad_nd.default, lambda: (f(2, 4, 6), [0, 0, -1, 2], 0.0), "a.b -> a.b", "0"),
    Row(aten.constant_pad_nd.default, lambda: (f(4, 6), [1, 1], 3.0), "a. -> a.", "-"),
    Row(aten.constant_pad_nd.default, lambda: (f(4, 6), [1, 1]), "a. -> a.", "-", {"value": 3.0}),
    # Reductions
    Row(aten.sum.default, lambda: (f(4, 6),), "ab -> ", "0"),
    Row(aten.sum.dim_IntList, lambda: (f(2, 4, 6), [0, -1]), "abc -> b", "0"),
    Row(aten.sum.dim_IntList, lambda: (f(2, 4, 6), [1], True), "abc -> a.c", "0"),
    Row(aten.sum.dim_IntList, lambda: (f(2, 4), []), "ab -> ", "0"),
    *(Row(op, lambda: (f(2, 4, 6), [1]), "a.b -> ab", "0") for op in (aten.mean.dim, aten.amax.default, aten.amin.default)),
    Row(aten.mean.default, lambda: (f(4, 6),), ".. -> ", "0"),
    Row(aten.var.correction, lambda: (f(2, 4, 6), [1]), "a.b -> a.b", "0", {"correction": 0, "keepdim": True}),
    Row(aten.any.dim, lambda: (b(4, 6), 1), "a. -> a", "0"),
    Row(aten.any.dims, lambda: (b(4, 6), []), "ab -> ab", "0"),
    Row(aten.any.dims, lambda: (b(4, 6), [], True), "ab -> ab", "0"),
    Row(aten.any.dims, lambda: (b(2, 4, 6), [0, -1]), ".a. -> a", "0"),
    Row(aten.any.dims, lambda: (b(4, 6), None), ".. -> ", "0"),
    Row(aten.all.dims, lambda: (b(4, 6), []), "ab -> ab", "-"),
    Row(aten.all.dims, lambda: (b(4, 6), [1]), "a. -> a", "-"),
    *(Row(op.default, lambda: (f(4, 6), []), ".. -> ", "0") for op in (aten.amax, aten.amin)),
    Row(aten.mean.dim, lambda: (f(4, 6), []), ".. -> ", "0"),
    Row(aten.mean.dim, lambda: (f(4, 0), [1]), "a. -> a", "-"),
    Row(aten.var.correction, lambda: (f(4, 6), []), ".. -> ", "0"),
    Row(aten.var.correction, lambda: (f(4, 1), [1]), "a. -> a", "-"),
    Row(aten.var.correction, lambda: (f(4, 6), [1]), "a. -> a", "-", {"correction": 6}),
    Row(aten.var_mean.correction, lambda: (f(4, 1), [1]), "a. -> a a", "-, -"),
    Row(aten.any.default, lambda: (b(4, 6),), ".. -> ", "0"),
    Row(aten.var_mean.correction, lambda: (f(2, 4, 6), [2]), "ab. -> ab ab", "0, 0", {"correction": 1}),
    *(Row(op, lambda: (f(4, 6), 1), "a. -> a", "-") for op in (aten.prod.dim_int, aten.argmax.default, aten.argmin.default)),
    Row(aten.argmax.default, lambda: (f(4, 6),), ".. -> ", "-"),
    Row(aten.amax.default, lambda: (f(), [-1], True), " -> ", "0"),
    Row(aten.all.dim, lambda: (b(4, 6), 0, True), ".a -> .a", "-"),
    Row(aten.cumsum.default, lambda: (f(4, 6), 1), "a. -> a.", "-"),
    *(Row(op.default, lambda: (f(2, 4, 6), -1, False), "ab. -> ab.", "-") for op in (aten._softmax, aten._log_softmax)),
    # Gathers and scatters
    Row(aten.embedding.default, lambda: (f(8, 6), i(8, 4, 2)), ".a bc -> bca", "0"),
    Row(aten.embedding_dense_backward.default, lambda: (f(4, 2, 6), i(8, 4, 2), 8, -1, False), "..a .. -> .a", "0"),
    Row(aten.index.Tensor, lambda: (f(4, 6), [i(4, 3)]), ".a . -> .a", "0"),
    Row(aten.index.Tensor, lambda: (f(4, 6, 8), [None, i(6, 3, 5)]), "a.b .. -> a..b", "0"),
    Row(aten.index.Tensor, lambda: (f(2, 4, 6, 8), [i(2, 3), None, i(6, 3)]), ".a.b . . -> .ab", "0"),
    Row(aten.index.Tensor, lambda: (f(2, 4, 6, 8), [None, i(4, 3, 1), i(6, 5)]), "a..b .. . -> a..b", "0"),
    Row(aten._unsafe_index.Tensor, lambda: (f(4, 6), [None, i(6, 3)]), "a. . -> a.", "0"),
    Row(aten.index_put.default, lambda: (f(4, 6), [i(4, 3)], f(3, 6), True), ".a . .a -> .a", "0&2"),
    Row(aten.index_put.default, lambda: (f(4, 6), [i(4, 3)], f(6)), ".a . a -> .a", "0&2"),
    Row(aten.index_put.default, lambda: (f(4, 6, 8), [None, torch.tensor([0, 3])], f(1, 2, 8)), "a.b . ..b -> a.b", "0&2"),
    Row(aten._unsafe_index_put.default, lambda: (f(4, 6), [i(4, 3)], f(3, 1), True), ".a . .. -> .a", "-"),
    Row(aten.gather.default, lambda: (f(4, 6), 1, i(6, 4, 3)), "a. a. -> a.", "0"),
    Row(aten.gather.default, lambda: (f(4, 6), 1, i(6, 2, 3)), ".. .. -> ..", "0"),
    Row(aten.scatter.src, lambda: (f(4, 6), 1, torch.arange(3).expand(4, 3), f(4, 3)), "a. a. a. -> a.", "0&2"),
    Row(aten.scatter_add.default, lambda: (f(4, 6), 0, i(4, 9, 6), f(9, 6)), ".a .a .a -> .a", "0&2"),
    # Pooling
    Row(aten.max_pool2d_with_indices.default, lambda: (f(4, 6, 5, 5), [2, 2], [1, 1]), "ab.. -> ab.. ab..", "0, -"),
    Row(aten.max_pool2d_with_indices.default, lambda: (f(6, 8, 8), [2, 2]), "a.. -> a.. a..", "0, -"),
    Row(aten.max_pool3d_with_indices.default, lambda: (f(4, 6, 4, 4, 4), [2, 2, 2]), "ab... -> ab... ab...", "0, -"),
    Row(
        aten.max_pool2d_with_indices_backward.default,
        lambda: (f(4, 6, 2, 2), f(4, 6, 4, 4), [2, 2], [2, 2], [0, 0], [1, 1], False, i(16, 4, 6, 2, 2)),
        "ab.. ab.. ab.. -> ab..",
        "0",
    ),
    Row(
        aten.max_pool3d_with_indices_backward.default,
        lambda: (f(4, 6, 2, 2, 2), f(4, 6, 4, 4, 4), [2] * 3, [2] * 3, [0] * 3, [1] * 3, False, i(64, 4, 6, 2, 2, 2)),
        "ab... ab... ab... -> ab...",
        "0",
    ),
    Row(aten.avg_pool2d.default, lambda: (f(4, 6, 5, 5), [2, 2], [1, 1], [1, 1]), "ab.. -> ab..", "0"),
    Row(aten.avg_pool2d.default, lambda: (f(6, 8, 8), [2, 2]), "a.. -> a..", "0"),
    Row(
        aten.avg_pool2d_backward.default,
        lambda: (f(4, 6, 2, 2), f(4, 6, 4, 4), [2, 2], [2, 2], [0, 0], False, True, None),
        "ab.. ab.. -> ab..",
        "0",
    ),
    Row(aten.avg_pool3d.default, lambda: (f(4, 6, 4, 4, 4), [2, 2, 2]), "ab... -> ab...", "0"),
    Row(aten.avg_pool3d.default, lambda: (f(6, 4, 4, 4), [2, 2, 2]), "a... -> a...", "0"),
    Row(
        aten.avg_pool3d_backward.default,
        lambda: (f(4, 6, 2, 2, 2), f(4, 6, 4, 4, 4), [2] * 3, [2] * 3, [0] * 3, False, True, None),
        "ab... ab... -> ab...",
        "0",
    ),
    Row(aten._adaptive_avg_pool2d.default, lambda: (f(4, 6, 5, 5), [2, 2]), "ab.. -> ab..", "0"),
    Row(aten._adaptive_avg_pool2d_backward.default, lambda: (f(4, 6, 2, 2), f(4, 6, 5, 5)), "ab.. ab.. -> ab..", "0"),
    Row(
        prims._low_memory_max_pool_with_offsets.default,
        lambda: (f(4, 6, 4, 4), [2, 2], [2, 2], [0, 0], [1, 1], False),
        "ab.. -> ab.. ab..",
        "0, -",
    ),
    Row(
        prims._low_memory_max_pool_offsets_to_indices.default,
        lambda: (torch.zeros(4, 6, 2, 2, dtype=torch.int8) + 2, [2, 2], [4, 4], [2, 2], [0, 0], [1, 1]),
        "ab.. -> ab..",
        "-",
    ),
]  # fmt: skip


def test_every_rule_has_a_row() -> None:
    assert set(rule_table()) <= {row.op.overloadpacket for row in ROWS}


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_rule_says_what_the_row_says(row: Row) -> None:
    node = node_for(row.op, row.args(), row.kwargs)
    relation = relation_of(node)
    assert relation is not None
    assert written(relation) == row.labels
    assert ", ".join(smallest_sets(relation, output) for output in relation.outputs) == row.zero


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_op_does_what_the_rule_says(row: Row) -> None:
    check_rule(row.op, row.args(), row.kwargs)


OPAQUE: list[tuple[Any, Callable[[], tuple[Any, ...]]]] = [
    (aten.convolution.default, lambda: (f(4, 6, 5), f(8, 3, 3), None, [1], [0], [1], False, [0], 2)),
    (aten.convolution.default, lambda: (f(4, 6, 5), f(6, 8, 3), None, [1], [0], [1], True, [0], 1)),
    (aten.index.Tensor, lambda: (f(4, 6), [b(4)])),
    (aten.scatter.value, lambda: (f(4, 6), 1, i(6, 4, 3), 2.0)),
    (aten.bernoulli.p, lambda: (f(4, 6), 0.5)),
    (aten.relu_.default, lambda: (f(4, 6),)),
    (aten.sort.default, lambda: (f(4, 6),)),
    (aten.frexp.Tensor, lambda: (f(4, 6),)),
    (aten.as_strided.default, lambda: (f(4, 6), [4, 6], [6, 1])),
    (aten.embedding.default, lambda: (f(10, 6), i(10, 4, 2))),
    (aten.embedding_dense_backward.default, lambda: (f(4, 2, 6), i(10, 4, 2), 10, -1, False)),
    (rnn_layer_backward, lambda: layer_backward("lstm", True, [True] + [False] * 6)),
]  # fmt: skip


@pytest.mark.parametrize(("op", "args"), OPAQUE, ids=[str(op) for op, _ in OPAQUE])
def test_what_is_opaque(op: Any, args: Callable[[], tuple[Any, ...]]) -> None:
    """Grouped and transposed convolutions, sizes that depend on values, draws, mutations."""
    assert relation_of(node_for(op, args(), {})) is None


# The harness: it knows nothing of the rules, and runs the op.


def node_for(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    """Returns a node that calls the op, with fake values as in a traced graph."""
    graph = fx.Graph()
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def placeholder(x: Tensor) -> fx.Node:
        node = graph.placeholder("x")
        node.meta["val"] = mode.from_tensor(x, static_shapes=True)
        return node

    fx_args, fx_kwargs = pytree.tree_map_only(Tensor, placeholder, (args, kwargs))
    node = graph.call_function(op, fx_args, fx_kwargs)
    fake_args, fake_kwargs = fx.map_arg((fx_args, fx_kwargs), lambda n: n.meta["val"])
    with mode:
        node.meta["val"] = op(*fake_args, **fake_kwargs)
    return node


def check_rule(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Checks the rule on one call, and returns how many labels it has."""
    node = node_for(op, args, kwargs)
    relation = relation_of(node)
    if relation is None:
        return 0
    call = Call(op, args, kwargs, relation)
    call.check_shapes()
    for label, size in call.sizes.items():
        if size > 1:
            for kept in kept_sets(size):
                call.check_zero(label, kept)
                call.check_cut({label: kept})
    for one, two in itertools.combinations([k for k, n in call.sizes.items() if n > 1], 2):
        if not call.share_a_dim(one, two):
            halves = {x: next(kept_sets(call.sizes[x])) for x in (one, two)}
            call.check_cut(halves)
    return len(call.sizes)


def kept_sets(size: int) -> Iterator[Tensor]:
    """Yields some kept positions, half of them where that is possible."""
    yield torch.randperm(size)[: max(size // 2, 1)].sort().values
    if size % 4 == 0:  # two blocks of a quarter, as blocks are kept
        yield torch.arange(size).view(4, -1)[torch.randperm(4)[:2].sort().values].flatten()


class Call:
    """One call of an op, with the labels that its rule gave."""

    def __init__(
        self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], relation: Relation
    ) -> None:
        self.op = op
        self.relation = relation
        flat, self._spec = pytree.tree_flatten((args, kwargs))
        self._flat = flat
        self._places = [place for place, x in enumerate(flat) if isinstance(x, Tensor)]
        self.operands: list[Tensor] = [flat[place] for place in self._places]
        self.results = self.run(self.operands)
        self.sizes: dict[int, int] = {}
        for dims, x in self._sides():
            for factors, size in zip(dims, x.shape, strict=True):
                if len(factors) == 1:
                    self.sizes[factors[0].label] = size

    def run(self, operands: Sequence[Tensor], sizes: Any = None) -> list[Tensor | None]:
        flat = list(self._flat)
        for place, x in zip(self._places, operands, strict=True):
            flat[place] = x
        args, kwargs = pytree.tree_unflatten(flat, self._spec)
        if sizes is not None:
            position, values = sizes
            args = (*args[:position], values, *args[position + 1 :])
        result = self.op(*args, **kwargs)
        return [result] if isinstance(result, Tensor) else list(result)

    def _sides(self) -> list[tuple[Dims, Tensor]]:
        outputs = zip(self.relation.outputs, self.results, strict=True)
        return [
            *zip(self.relation.operands, self.operands, strict=True),
            *((output.dims, x) for output, x in outputs if output is not None and x is not None),
        ]

    def check_shapes(self) -> None:
        """A dimension is as long as its labels together."""
        for dims, x in self._sides():
            assert len(dims) == x.dim()
            for factors, size in zip(dims, x.shape, strict=True):
                inner = 1
                for factor in reversed(factors):
                    assert factor.inner == inner
                    inner *= self.sizes[factor.label]
                assert not factors or inner == size

    def share_a_dim(self, one: int, two: int) -> bool:
        return any(
            {one, two} <= {factor.label for factor in factors}
            for dims, _ in self._sides()
            for factors in dims
        )

    def check_zero(self, label: int, kept: Tensor) -> None:
        """Whatever of the operands is zero outside the kept set, or altogether."""
        many = len(self.relation.operands) > 8  # of all operands, every subset would be tried
        choices = [
            [NOTHING, S, EVERYTHING]
            if label in labels_in(dims)
            else [NOTHING]
            if many
            else [NOTHING, EVERYTHING]
            for dims in self.relation.operands
        ]
        for facts in itertools.product(*choices):
            claims = [
                output is not None
                and label in labels_in(output.dims)
                and (output.zero(facts) >= S or output.zero(facts) is EVERYTHING)
                for output in self.relation.outputs
            ]
            if not any(claims):
                continue
            for special in (None, ZEROS, UNDEFINED):
                self._check_claims(facts, claims, label, kept, special)

    def _check_claims(
        self,
        facts: Sequence[Facts],
        claims: Sequence[bool],
        label: int,
        kept: Tensor,
        special: Tensor | None,
    ) -> None:
        """Runs the op on operands that are zero as ``facts`` say, of either sign."""
        operands = []
        places = zip(self.operands, self.relation.operands, facts, strict=True)
        for place, (operand, dims, fact) in enumerate(places):
            x = operand
            if special is not None and not self._divides_by(place):
                x = sprinkled(x, special)
            if fact is EVERYTHING:
                x = zeros(x)
            elif fact is not NOTHING:
                x = self.zeroed(x, dims, label, kept)
            operands.append(x)
        results = zip(self.relation.outputs, self.run(operands), claims, strict=True)
        for output, result, claimed in results:
            if claimed and output is not None and result is not None:
                outside = result.double()[~self.inside(result, output.dims, label, kept)]
                if special is UNDEFINED:
                    outside = outside[~outside.isnan()]  # 0 * inf, in the dense program alone
                assert not outside.count_nonzero(), f"{label} is not zero given {facts}"

    def _divides_by(self, place: int) -> bool:
        """A quotient counts as zero unless the divisor is zero by a dropout."""
        packet = getattr(self.op, "overloadpacket", None)
        return place in EXPOSING.get(packet, ()) and len(self.operands) > 1

    def check_cut(self, kept: dict[int, Tensor]) -> None:
        """Cuts operands and results to some positions of some labels."""
        for index, output in enumerate(self.relation.outputs):
            if output is None:
                continue
            summed = [
                [
                    (label, i)
                    for i in output.contracts
                    if label in labels_in(self.relation.operands[i])
                ]
                for label in kept
                if label not in labels_in(output.dims)
            ]
            # An output that does not sum over a label must not depend on who has it.
            for zeroed in itertools.product(*filter(None, summed)):
                operands = list(self.operands)
                for label, i in zeroed:
                    operands[i] = self.zeroed(
                        operands[i], self.relation.operands[i], label, kept[label]
                    )
                self._compare(index, output, operands, kept)

    def _compare(
        self, index: int, output: Output, operands: list[Tensor], kept: dict[int, Tensor]
    ) -> None:
        dense = self.run(operands)[index]
        cut = [
            self.cut(x, dims, kept)
            for x, dims in zip(operands, self.relation.operands, strict=True)
        ]
        compact = self.run(cut, self._cut_sizes(kept))[index]
        assert dense is not None
        assert compact is not None
        torch.testing.assert_close(
            compact, self.cut(dense, output.dims, kept), equal_nan=True, check_stride=False
        )

    def _cut_sizes(self, kept: dict[int, Tensor]) -> tuple[int, list[int]] | None:
        if self.relation.sizes is None:
            return None
        position, dims = self.relation.sizes
        args, _ = pytree.tree_unflatten(self._flat, self._spec)
        share = {label: len(positions) / self.sizes[label] for label, positions in kept.items()}
        return position, [
            size
            if size == -1
            else round(size * math.prod(share.get(factor.label, 1) for factor in factors))
            for size, factors in zip(args[position], dims, strict=True)
        ]

    def positions(self, factors: tuple[Factor, ...], label: int, kept: Tensor) -> Tensor | None:
        """Returns which positions of a dimension belong to kept positions of a label."""
        for factor in factors:
            if factor.label == label:
                size = math.prod(self.sizes[other.label] for other in factors)
                inside = torch.zeros(self.sizes[label], dtype=torch.bool)
                inside[kept] = True
                return inside[torch.arange(size) // factor.inner % self.sizes[label]]
        return None

    def inside(self, x: Tensor, dims: Dims, label: int, kept: Tensor) -> Tensor:
        """Returns which elements of x belong to kept positions."""
        mask = torch.ones_like(x, dtype=torch.bool)
        for dim, factors in enumerate(dims):
            inside = self.positions(factors, label, kept)
            if inside is not None:
                shape = [1] * x.dim()
                shape[dim] = -1
                mask &= inside.view(shape)
        return mask

    def zeroed(self, x: Tensor, dims: Dims, label: int, kept: Tensor) -> Tensor:
        """Returns x with zeros outside, of either sign."""
        return torch.where(self.inside(x, dims, label, kept), x, zeros(x))

    def cut(self, x: Tensor, dims: Dims, kept: dict[int, Tensor]) -> Tensor:
        """Returns x without what is outside."""
        for dim, factors in enumerate(dims):
            for label, positions in kept.items():
                inside = self.positions(factors, label, positions)
                if inside is not None:
                    x = x.index_select(dim, inside.nonzero().squeeze(1))
        return x


ZEROS = torch.tensor([0.0, -0.0, 1e4, -1e4], dtype=torch.float64)
UNDEFINED = torch.tensor([math.inf, -math.inf, math.nan], dtype=torch.float64)


def sprinkled(x: Tensor, values: Tensor) -> Tensor:
    """Returns x, if it has floating-point numbers, with half of them replaced by some of values."""
    if not x.dtype.is_floating_point:
        return x
    chosen = values[torch.randint(len(values), x.shape)].to(x.dtype)
    return torch.where(torch.rand(x.shape) < 0.5, chosen, x)


def zeros(x: Tensor) -> Tensor:
    """Returns zeros like x: of either sign, as ``x * 0`` has them."""
    if not x.dtype.is_floating_point:
        return torch.zeros_like(x)
    return torch.where(torch.rand(x.shape) < 0.5, 0.0, -0.0).to(x.dtype)


def labels_in(dims: Dims) -> set[int]:
    return {factor.label for factors in dims for factor in factors}


def written(relation: Relation) -> str:
    """Returns the labels as rows write them."""
    letters: dict[int, str] = {}

    def one(dims: Dims) -> str:
        text = ""
        for factors in dims:
            names = [
                letters.setdefault(x.label, string.ascii_letters[len(letters)]) for x in factors
            ]
            text += f"({''.join(names)})" if len(names) > 1 else "".join(names) or "."
        return text

    operands = " ".join(one(dims) for dims in relation.operands)
    return f"{operands} -> " + " ".join("?" if o is None else one(o.dims) for o in relation.outputs)


def smallest_sets(relation: Relation, output: Output | None) -> str:
    """Returns which operands have to be zero, as rows write them."""
    if output is None:
        return "?"
    labelled = [
        i
        for i, dims in enumerate(relation.operands)
        if len(dims) == 0 or labels_in(dims) & labels_in(output.dims) or not labels_in(output.dims)
    ]
    found: list[set[int]] = []
    for count in range(len(relation.operands) + 1):
        for chosen in itertools.combinations(labelled, count):
            facts = [S if i in chosen else NOTHING for i in range(len(relation.operands))]
            if output.zero(facts) >= S and not any(have <= set(chosen) for have in found):
                found.append(set(chosen))
    return "|".join("&".join(map(str, sorted(one))) for one in found) or "-"
