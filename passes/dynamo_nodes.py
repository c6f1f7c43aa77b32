"""Reading the nodes of a Dynamo graph, where one op has many spellings."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import fx
from torch.nn import functional as F

_NAMESPACES: Final = (torch, F, operator, torch.Tensor, torch._VF, torch._C._nn)

CASTS: Final = frozenset(
    ("to", "type", "type_as", "float", "half", "bfloat16", "double", "cuda", "cpu", "bool")
)
"""Ops that change the dtype or the device of their first argument and nothing else."""

LAYOUTS: Final = frozenset(
    (
        *("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel"),
        *("unsqueeze", "squeeze", "permute", "transpose", "swapaxes", "swapdims", "movedim"),
        *("moveaxis", "t", "contiguous", "clone", "detach", "detach_", "alias"),
    )
)
"""Ops whose result has the elements of their first argument, each once."""

SELECTIONS: Final = frozenset(
    (
        *("expand", "expand_as", "broadcast_to", "repeat", "repeat_interleave", "tile"),
        *("getitem", "select", "narrow", "chunk", "split", "unbind", "tensor_split"),
    )
)
"""Ops whose result has elements of their first argument, some of them more than once or not."""

FACTORIES: Final = frozenset(
    (
        *("empty", "zeros", "ones", "full", "empty_like", "zeros_like", "ones_like", "full_like"),
        *("new_empty", "new_zeros", "new_ones", "new_full", "empty_strided", "new", "tensor"),
        *("rand", "rand_like", "randn", "randn_like"),
    )
)
"""Ops that make a tensor out of shapes and numbers; a tensor argument only gives its shape."""

_FILLED: Final = {
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), 0.0),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), 1.0),
}
_ARITHMETIC: Final[dict[str, Callable[[float, float], float]]] = {
    **dict.fromkeys(("mul", "multiply"), operator.mul),
    **dict.fromkeys(("div", "divide", "true_divide", "truediv"), operator.truediv),
    "add": operator.add,
    **dict.fromkeys(("sub", "subtract"), operator.sub),
    "rsub": lambda a, b: b - a,
}


def op_name(node: fx.Node) -> str:
    """Returns the plain name of the torch op that ``node`` calls, ``""`` where it calls none.

    ``torch.lt(a, b)``, ``a.lt(b)`` and ``a < b`` are all ``lt``. Their arguments agree in order
    (but for ``where``). A user's own function is no torch op, whatever it is called.
    """
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        namespace, _, name = str(node.target).partition(".")  # "aten.dropout.default"
        return name.partition(".")[0] if namespace == "aten" else ""
    name = getattr(node.target, "__name__", "")
    known = any(getattr(space, name, None) == node.target for space in _NAMESPACES)
    return name if known and isinstance(name, str) else ""


def argument(node: fx.Node, index: int, name: str, default: object = None) -> Any:
    """Returns the argument of ``node`` at ``index`` or called ``name``."""
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def tensor_of(node: object) -> torch.Tensor | None:
    """Returns the fake tensor that ``node`` was traced with, None where it is no tensor."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def is_floating(node: object) -> bool:
    """Tells whether ``node`` is an ordinary tensor of real floating-point numbers."""
    value = tensor_of(node)
    if value is None or not value.dtype.is_floating_point:
        return False
    return value.layout == torch.strided and not value.is_nested


def is_inplace(node: fx.Node) -> bool:
    """Tells whether ``node`` writes to one of its arguments."""
    name = op_name(node)
    if name in ("imul", "itruediv", "iadd", "isub", "setitem"):
        return True
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace"):
        return True
    if "dropout" in name and argument(node, 3, "inplace"):
        return True
    return name.endswith("_") and not name.endswith("__")


def number(arg: object) -> float | None:
    """Returns the number that every element of ``arg`` is, None where that is not known.

    Follows tensors filled with a constant through arithmetic with constants:
    ``torch.ones_like(x) * 0.7`` is 0.7.
    """
    if isinstance(arg, (int, float)):
        return float(arg)
    if not isinstance(arg, fx.Node) or _is_overwritten(arg):
        return None
    name = op_name(arg)
    if name in _FILLED:
        return _FILLED[name]
    if name in ("full", "full_like", "new_full"):
        return number(argument(arg, 2 if name == "new_full" else 1, "fill_value"))
    if name == "tensor":
        return number(argument(arg, 0, "data"))
    if name == "fill_" and is_fresh(arg.args[0]) and len(arg.all_input_nodes[0].users) == 1:
        return number(argument(arg, 1, "value"))
    if name in CASTS and not is_floating(arg):
        return None  # a cast to integers rounds
    if name in CASTS | LAYOUTS | SELECTIONS or (name == "broadcast_tensors" and len(arg.args) == 1):
        return number(arg.args[0])
    if name in _ARITHMETIC and len(arg.args) == 2 and not arg.kwargs:
        left, right = number(arg.args[0]), number(arg.args[1])
        if left is None or right is None or (_ARITHMETIC[name] is operator.truediv and not right):
            return None
        return _ARITHMETIC[name](left, right)
    return None


def _is_overwritten(node: fx.Node) -> bool:
    """Tells whether somebody may write to ``node``, also through a view of it."""
    for user in node.users:
        if is_inplace(user) and (node in user.args[:1] or node in user.kwargs.values()):
            return True
        if op_name(user) in CASTS | LAYOUTS | SELECTIONS and _is_overwritten(user):
            return True
    return False


def is_fresh(node: object) -> bool:
    """Tells whether ``node`` is a new tensor, seen by nobody but the readers of ``node``."""
    if not isinstance(node, fx.Node):
        return False
    name = op_name(node)
    if name in FACTORIES or name == "clone":
        return True
    if name not in CASTS | {"contiguous", "detach"} or len(node.all_input_nodes) != 1:
        return False
    source = node.all_input_nodes[0]
    return len(source.users) == 1 and is_fresh(source)
