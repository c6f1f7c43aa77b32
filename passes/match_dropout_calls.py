"""Finds calls of torch's own dropouts, and of fused ops with a dropout inside."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from torch import fx

from ..core.decisions import Reason
from ..core.errors import DropoutRateError
from .dynamo_nodes import argument, is_floating, op_name, tensor_of
from .sites import clean_path, module_path, source_name, static_shape


@dataclasses.dataclass(frozen=True)
class DropoutCall:
    """A call that equals ``x * mask``, or ``x.mul_(mask)``."""

    node: fx.Node
    """The call."""
    kind: str
    """Name of the function called."""
    x: fx.Node
    """What is dropped."""
    p: float
    """Probability of a zero, in (0, 1)."""
    shared_dims: tuple[int, ...]
    """Dimensions along which one draw is shared."""
    inplace: bool
    """Whether ``x`` itself is overwritten."""
    alpha: bool = False
    """Whether it keeps mean and variance: the result is ``a * (x * mask) + b(mask)``."""


@dataclasses.dataclass(frozen=True)
class LeftAlone:
    """A dropout that was found and stays as it is."""

    node: fx.Node
    """The node to name in the report."""
    kind: str
    """What the user wrote."""
    p: float
    """Probability of a zero; NaN where it is no constant."""
    shape: tuple[int | str, ...]
    """Shape of the mask."""
    reason: Reason
    """Why."""
    detail: str = ""
    """What the reason needs said about this one."""
    module: str = ""
    """Path of the module, where the node itself does not tell."""


# name -> whole channels or single elements
_DROPOUTS: Final = {
    **dict.fromkeys(("dropout", "dropout_"), False),
    **dict.fromkeys(("dropout1d", "dropout2d", "dropout3d"), True),
    **dict.fromkeys(("feature_dropout", "feature_dropout_"), True),
}
_ALPHA: Final = {
    **dict.fromkeys(("alpha_dropout", "alpha_dropout_"), False),
    **dict.fromkeys(("feature_alpha_dropout", "feature_alpha_dropout_"), True),
}
ALPHA_KINDS: Final = frozenset(name.rstrip("_") for name in _ALPHA)
"""What the report calls alpha dropouts."""
WRITTEN_AS: Final = "ardd_written_as"
"""Where a node says what the user wrote, if it is not the user's own call."""
ATTENTION: Final = frozenset(("scaled_dot_product_attention", "multi_head_attention_forward"))
RNNS: Final = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))
DRAWS: Final = frozenset((*_DROPOUTS, *_ALPHA))
"""Names of the functions matched here whose result is random."""


def match_dropout_call(node: fx.Node) -> DropoutCall | LeftAlone | None:
    """Returns what ``node`` does, None where it drops nothing.

    1. A dropout that is switched off (``training=False``, ``p=0``) is no dropout.
    2. A call on a tensor that torch refuses is left for torch to refuse.

    Raises:
        DropoutRateError: the rate is no probability. Compiled code draws by comparing, which takes
            any number.
    """
    name = op_name(node)
    if name == "native_dropout" and argument(node, 2, "train") is not False:
        _check_rate(argument(node, 1, "p"))
    if name in _DROPOUTS or name in _ALPHA:
        return _match_dropout(node, name)
    if name == "scaled_dot_product_attention":
        return _match_sdpa(node)
    if name == "multi_head_attention_forward":
        return _match_multi_head_attention(node)
    if name in RNNS:
        return _match_rnn(node, name)
    return None


def _match_dropout(node: fx.Node, name: str) -> DropoutCall | LeftAlone | None:
    kind = str(node.meta.get(WRITTEN_AS, name.rstrip("_")))
    x = argument(node, 0, "input")
    p = argument(node, 1, "p", 0.5)
    if not _is_on(node) or not isinstance(x, fx.Node):
        return None
    value = tensor_of(x)
    shape = static_shape(value)
    if isinstance(p, fx.Node):
        detail = "the rate is not a constant"
        return LeftAlone(node, kind, float("nan"), shape, Reason.HAND_MASK, detail)
    _check_rate(p)
    if p == 0:
        return None
    if p == 1:
        return LeftAlone(node, kind, 1.0, shape, Reason.P_IS_ONE)
    shared_dims = _shared_dims(name, None if value is None else value.dim())
    if not is_floating(x) or shared_dims is None:
        detail = "what is dropped is not a plain tensor of floating-point numbers"
        return LeftAlone(node, kind, float(p), shape, Reason.HAND_MASK, detail)
    inplace = name.endswith("_") or bool(argument(node, 3, "inplace", False))
    return DropoutCall(node, kind, x, float(p), shared_dims, inplace, name in _ALPHA)


def _is_on(node: fx.Node) -> bool:
    """Reads ``training``, which the functions of ``torch`` itself call ``train``."""
    default = "alpha" not in op_name(node)
    return argument(node, 2, "training", node.kwargs.get("train", default)) is not False


def _shared_dims(name: str, dims: int | None) -> tuple[int, ...] | None:
    """Returns the dimensions that share a draw, None where torch takes no such input.

    Args:
        name: Name of the function.
        dims: Number of dimensions of its input, None if unknown.
    """
    if not {**_DROPOUTS, **_ALPHA}[name]:
        return ()
    if dims is None:
        return None
    if name == "dropout1d":  # (N, C, L), or (C, L) without a batch
        return {2: (1,), 3: (2,)}.get(dims)
    if name == "dropout3d" and dims != 5:  # anything else is taken for (C, D, H, W)
        return tuple(range(1, dims)) if dims >= 1 else None
    # dropout2d takes (C, H, W) for (N, C, L): torch warns of it, and so it is kept here.
    return tuple(range(2, dims)) if dims >= 2 else None


def _match_sdpa(node: fx.Node) -> LeftAlone | None:
    p = argument(node, 4, "dropout_p", 0.0)
    query = static_shape(tensor_of(argument(node, 0, "query")))
    key = static_shape(tensor_of(argument(node, 1, "key")))
    kind = str(node.meta.get(WRITTEN_AS, op_name(node)))
    reason = Reason.P_IS_ONE if p == 1 else Reason.INSIDE_SDPA
    return _left_inside(node, kind, p, (*query[:-1], *key[-2:-1]), reason)


def _match_multi_head_attention(node: fx.Node) -> LeftAlone | None:
    if argument(node, 13, "training", True) is False:
        return None
    query = static_shape(tensor_of(argument(node, 0, "query")))  # [L, N, E] or [L, E]
    key = static_shape(tensor_of(argument(node, 1, "key")))
    batch = query[1:-1]
    shape = (*batch, argument(node, 4, "num_heads"), *query[:1], *key[:1])
    p = argument(node, 10, "dropout_p", 0.0)
    reason = Reason.P_IS_ONE if p == 1 else Reason.INSIDE_SDPA
    return _left_inside(node, op_name(node), p, shape, reason)


def _match_rnn(node: fx.Node, name: str) -> LeftAlone | None:
    # (input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first), or
    # with packed sequences (data, batch_sizes, hx, params, has_biases, num_layers, dropout, ...).
    if len(node.args) < 9:
        return None
    packed = isinstance(node.args[3], (list, tuple))
    layers, p, train = node.args[5:8] if packed else node.args[4:7]
    if train is False or (isinstance(layers, int) and layers < 2):
        return None
    values = node.meta.get("example_value") or (None,)
    weights = node.args[3] if packed else node.args[2]
    module = module_path(node) or _owner(weights)
    return _left_inside(node, name, p, static_shape(values[0]), Reason.INSIDE_RNN, module)


def _left_inside(
    node: fx.Node,
    kind: str,
    p: Any,
    shape: tuple[int | str, ...],
    reason: Reason,
    module: str = "",
) -> LeftAlone | None:
    if isinstance(p, fx.Node):
        return LeftAlone(node, kind, float("nan"), shape, reason, "the rate is not a constant")
    if not p > 0:
        return None  # as torch has it, for NaN as well
    _check_rate(p)
    return LeftAlone(node, kind, float(p), shape, reason, module=module)


def _check_rate(p: object) -> None:
    if isinstance(p, (int, float)) and not 0 <= p <= 1:
        raise DropoutRateError.no_probability(p)


def _owner(weights: object) -> str:
    """Returns the path of the module that holds ``weights``: Dynamo gives RNN calls no module."""
    first = weights[0] if isinstance(weights, (list, tuple)) and weights else None
    return clean_path(source_name(first)).rpartition(".")[0] if isinstance(first, fx.Node) else ""
