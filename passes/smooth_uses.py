"""Says where an error in a saved tensor would not stay a small error in what depends on it.

Rounding a tensor to 8 or 4 bits is harmless to a function that is smooth where it is evaluated.
It is not to a comparison (``amax`` compares the tensor with its maximum, which it then never
equals), to a choice of indices, or to a divisor that may be near 0.
"""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
from torch import fx

from .relation import shape_of

aten = torch.ops.aten

_SMOOTH = {
    *("abs", "add", "addcmul", "atan", "cat", "clamp", "clamp_max", "clamp_min", "clone", "copy"),
    *("constant_pad_nd", "convert_element_type", "cos", "cosh", "elu", "erf", "exp", "expm1"),
    *("fma", "gelu", "gelu_backward", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "lerp"),
    *("masked_fill", "maximum", "minimum", "mish", "mish_backward", "mul", "neg", "relu", "rsub"),
    *("sigmoid", "sigmoid_backward", "silu", "silu_backward", "sin", "sinh", "softplus", "square"),
    *("sub", "tanh", "tanh_backward", "where"),
}
"""Pointwise ops that make no large error out of a small one."""
_BOUNDED_ARGUMENTS = {"div": 1, "addcdiv": 2}
"""Pointwise ops that are so in all but one argument."""
_STEEP_AT_0 = {"log", "log1p", "reciprocal", "rsqrt", "sqrt"}
"""Pointwise ops that are so away from 0."""
_HUGE = 1e4
"""Numbers that stand for minus infinity in masks of attention are no smaller."""
_FILLS = {"where", "masked_fill", "add", "sub", "mul", "constant_pad_nd", "scatter"}
_MOVES = (
    *("cat", "clone", "convert_element_type", "copy", "expand", "index", "permute", "scatter"),
    *("select", "slice", "squeeze", "t", "transpose", "unsqueeze", "view"),
)


class ErrorGrowth:
    """Where in a backward graph an error of a tensor grows.

    Args:
        exact: comparisons whose results are saved apart, so that they see no error.
    """

    def __init__(self, exact: Collection[fx.Node]) -> None:
        self._exact = exact
        self._known: dict[fx.Node, str | None] = dict.fromkeys(exact)

    def between(self, value: fx.Node, user: fx.Node) -> str | None:
        """Returns the name of the op that makes a large error of one of ``value``.

        It is ``user``, a reader of it, or an op further downstream; None where there is none.
        """
        if user in self._exact:
            return None
        return grows_at(value, user) or self._after(user)

    def _after(self, node: fx.Node) -> str | None:
        for late in reversed(self._unknown_from(node)):
            found = (self.between(late, user) for user in late.users)
            self._known[late] = next((name for name in found if name is not None), None)
        return self._known[node]

    def _unknown_from(self, node: fx.Node) -> list[fx.Node]:
        """Returns what depends on a node and has no answer yet, every node before its users."""
        order: list[fx.Node] = []
        stack: list[tuple[fx.Node, bool]] = [(node, False)]
        while stack:
            at, done = stack.pop()
            if done:
                order.append(at)
            elif at not in self._known:
                self._known[at] = None
                stack.append((at, True))
                stack.extend((user, False) for user in at.users)
        order.reverse()
        return order


def grows_at(value: fx.Node, user: fx.Node) -> str | None:
    """Returns the name of an op if an error of its operand becomes a large one of its result."""
    target = user.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = _name(target)
    if not _floating(user) or user.kwargs.get("rounding_mode"):
        return name  # what depends on it is chosen by it
    if torch.Tag.pointwise not in target.tags:
        return None
    if name == "sign":
        return "sgn"  # a use of that name is a comparison, which is saved apart
    if name in _BOUNDED_ARGUMENTS:
        steep = value in user.args[_BOUNDED_ARGUMENTS[name] :] and not _is_away_from_0(value)
        return name if steep else None
    if name in _STEEP_AT_0 and (_is_away_from_0(value) or (name == "log1p" and _positive(value))):
        return None
    if name == "mul":
        others = [x for x in user.all_input_nodes if x is not value]
        return "div" if any(_is_quotient(x, value) for x in others) else None
    if name == "pow":
        base, exponent = user.args[:2]
        polynomial = isinstance(exponent, (int, float)) and exponent >= 1
        return None if base is value and polynomial else name
    return None if name in _SMOOTH else name


def _is_away_from_0(value: fx.Node) -> bool:
    """Returns whether a tensor is at least 1 everywhere, as the denominator of a sigmoid is."""
    if value.target is not aten.add.Tensor or len(value.args) != 2:
        return False
    return any(
        isinstance(one, (int, float)) and one >= 1 and _positive(other)
        for one, other in (value.args, reversed(value.args))
    )


def _positive(node: object) -> bool:
    kinds = (aten.exp.default, aten.abs.default, aten.relu.default, aten.sigmoid.default)
    if not isinstance(node, fx.Node):
        return False
    return node.target in kinds or (node.target is aten.mul.Tensor and node.args[0] is node.args[1])


def _is_quotient(node: fx.Node, value: fx.Node) -> bool:
    """Returns whether a factor was divided by numbers of its own for every element of a value.

    ``h / sqrt(h * h + tiny)`` is 1 where both are small, but not with another h.
    """
    while node.target is aten.mul.Tensor and isinstance(node.args[1], (int, float)):
        node = node.all_input_nodes[0]
    if node.target is not aten.div.Tensor or not isinstance(node.args[1], fx.Node):
        return False
    same = shape_of(node.args[1]) == shape_of(value)
    return same and not _is_away_from_0(node.args[1])


def may_hold_huge_values(node: fx.Node, *, from_inputs: bool) -> bool:
    """Returns whether numbers as large as those of attention masks may be in a tensor.

    Args:
        node: of the forward.
        from_inputs: whether inputs of the program may hold such numbers.
    """
    stack, seen = [node], {node}
    while stack:
        at = stack.pop()
        if at.op == "placeholder" and from_inputs:
            return True
        for number in _numbers_in(at):
            if abs(number) >= _HUGE:
                return True
        target = at.target
        name = _name(target) if isinstance(target, torch._ops.OpOverload) else ""
        if name in _FILLS or name.startswith(_MOVES) or target is operator.getitem:
            new = [source for source in at.all_input_nodes if source not in seen]
            seen.update(new)
            stack.extend(new)
    return False


def _numbers_in(node: fx.Node) -> list[float]:
    """Returns the constants that a node puts into its result."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    args = node.args
    if node.target is aten.full.default:
        args = args[1:2]
    elif node.target is aten.constant_pad_nd.default:
        args = args[2:]
    elif node.target is not aten.scalar_tensor.default and _name(node.target) not in _FILLS:
        return []
    return [float(arg) for arg in args if isinstance(arg, (int, float))]


def _name(target: torch._ops.OpOverload) -> str:
    name: str = target._schema.name
    return name.split("::")[-1].removesuffix("_")


def _floating(node: fx.Node) -> bool:
    values = node.meta.get("val")
    tensors = values if isinstance(values, (tuple, list)) else [values]
    return all(
        x.is_floating_point() or x.is_complex() for x in tensors if isinstance(x, torch.Tensor)
    )
