"""Recurrent layers: the product with the input contracts its features, all else is dense."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import cast

import torch
from torch import fx

from ..facts import Facts
from ..relation import Dims, Output, Relation, dims, never, shape_of

FEATURES = 0


def rnn_layer(node: fx.Node) -> Relation:
    """``x [t, n, i]`` and ``w_ih [g, i]`` -> y, h and c, and what backward alone reads back.

    Without ``w_ih`` the product is not in the op, and nothing can be cut.
    """
    operands, places = _operands(node)
    contracted = (places["x"], places["w_ih"]) if "w_ih" in places else ()
    values = node.meta["val"]
    results = tuple(Output(((),) * len(v.shape), never, contracted) for v in values[:3])
    per_feature, recurrent = _flops(node)
    flops = (per_feature, recurrent) if contracted else (recurrent, 0)
    return Relation(operands, (*results, None, None, None), None, *flops)


def rnn_layer_backward(node: fx.Node) -> Relation | None:
    """Gradients of `rnn_layer`.

    It is cut where the forward is, which kept what belongs to the features that it saw. That shows
    in its zeros: so nothing that is computed depends on the input, and yet claims to contract it.
    """
    operands, places = _operands(node)
    wanted = cast("Sequence[bool]", node.args[-1])
    none: Dims = ((),)
    per_feature, recurrent = _flops(node)
    if "w_ih" not in places:
        dense = (Output(none * len(v.shape), never) for v in node.meta["val"])
        given = tuple(output if want else None for output, want in zip(dense, wanted, strict=True))
        return Relation(operands, given, None, recurrent * (1 + wanted[_W_HH]))
    x, w_ih = places["x"], places["w_ih"]
    claims = any(i not in (0, _W_IH) and wanted[i] for i in _read(node))
    if not claims and wanted[0]:
        return None

    def zero_of_w(facts: Sequence[Facts]) -> Facts:
        return facts[w_ih]

    def zero_of_x(facts: Sequence[Facts]) -> Facts:
        return facts[x]

    outputs = [Output(none * len(value.shape), never, (x, w_ih)) for value in node.meta["val"]]
    outputs[0] = Output(dims(None, None, FEATURES), zero_of_w)
    outputs[_W_IH] = Output(dims(None, FEATURES), zero_of_x)
    return Relation(
        operands,
        tuple(output if want else None for output, want in zip(outputs, wanted, strict=True)),
        None,
        per_feature * (wanted[0] + wanted[_W_IH]),
        recurrent * (1 + wanted[_W_HH]),
    )


_W_IH, _W_HH = 3, 4


def _operands(node: fx.Node) -> tuple[tuple[Dims, ...], dict[str, int]]:
    """Returns the labels of the tensor operands, and where each stands among them by its name."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    names = [argument.name for argument in target._schema.arguments]
    projects = node.args[names.index("w_ih")] is not None
    operands: list[Dims] = []
    places: dict[str, int] = {}
    for argument, given in zip(target._schema.arguments, node.args, strict=True):
        if not isinstance(given, fx.Node):
            continue
        places[argument.name] = len(operands)
        rank = len(shape_of(given))
        has_features = argument.name in ("x", "w_ih") and projects
        operands.append(((),) * (rank - 1) + dims(FEATURES) if has_features else ((),) * rank)
    return tuple(operands), places


def _flops(node: fx.Node) -> tuple[int | torch.SymInt, int | torch.SymInt]:
    """Returns the FLOPs of the forward for each input feature, and those of the recurrence."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    names = [argument.name for argument in target._schema.arguments]
    steps, samples, _ = shape_of(cast("fx.Node", node.args[names.index("x")]))
    rows, hidden = shape_of(cast("fx.Node", node.args[names.index("w_hh")]))
    per_feature = 2 * steps * samples * rows
    return per_feature, per_feature * hidden


def _read(node: fx.Node) -> set[int]:
    """Returns which results of the node something reads: all, where nobody takes them apart."""
    if not node.users:
        return set(range(len(node.meta["val"])))
    return {
        cast("int", user.args[1])
        for user in node.users
        if user.target is operator.getitem and user.users
    }
