"""Opens the one call that nn.MultiheadAttention is in a Dynamo graph, if it drops something."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import operator
from typing import Any, ClassVar, Final

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ..core.decisions import PassResult
from .attention_calls import AttentionCall, attention_calls, is_plain, takes_maths
from .dynamo_nodes import is_floating, op_name
from .match_dropout_calls import WRITTEN_AS

logger: Final = logging.getLogger("ardd")
_DROPS: Final = ("dropout", "scaled_dot_product_attention")


@dataclasses.dataclass(frozen=True)
class OpenMultiHead:
    """Replaces ``multi_head_attention_forward`` by the ATen ops that it consists of.

    ::

        both = torch.nn.functional.multi_head_attention_forward(q, k, v, 8, 2, w, b, ...)
        y = both[0]

        linear = torch.ops.aten.linear.default(q, w, b)
        ...
        attention = torch.ops.aten.scaled_dot_product_attention.default(q1, k1, v1, None, 0.1)
        y = torch.ops.aten.view.default(linear_1, ...)

    AOTAutograd would trace the call into the same ops, but only after the dropouts are marked.

    1. The call drops something, by a rate that is a constant.
    2. With ``need_weights=False`` the dropout is inside ``scaled_dot_product_attention``: the call
       is opened if that can be written out in turn (``write_out_attention.py``).
    3. A call that cannot be traced stays as it is.
    """

    name: ClassVar[str] = "open-multi-head"
    exact: ClassVar[bool] = True

    def apply(self, gm: fx.GraphModule) -> PassResult:
        """Rewrites ``gm``, and the graphs that are inlined into it, in place.

        Args:
            gm: A graph as Dynamo hands it to a backend; values are in ``meta["example_value"]``.
        """
        modules = []
        for call in attention_calls(gm, "multi_head_attention_forward"):
            if not _drops(gm, call.node):
                continue
            try:
                traced = _trace(call)
            except Exception as cause:  # whatever torch says to these arguments, it may say later
                logger.debug("%s is not opened: %s", call.node, cause)
                continue
            if not any(node.op == "get_attr" for node in traced.graph.nodes):
                _inline(call.node, traced)
                modules.append(call.gm)
        for module in modules:
            module.graph.lint()
            module.recompile()
        return PassResult(bool(modules))


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Returns all arguments of a call by name, nothing if it has the wrong ones."""
    try:
        bound = inspect.signature(F.multi_head_attention_forward).bind(*node.args, **node.kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    return dict(bound.arguments)


def _drops(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Returns whether a call drops something, in a way that can be written out."""
    given = _arguments(node)
    p = given.get("dropout_p")
    if not isinstance(p, (int, float)) or not 0 < p < 1 or given["training"] is not True:
        return False
    users = [(user.target, *user.args[1:]) for user in node.users]
    if any(user not in ((operator.getitem, 0), (operator.getitem, 1)) for user in users):
        return False
    tensors = [x for x in given.values() if isinstance(x, fx.Node)]
    if not all(is_plain(x) for x in tensors) or not is_floating(given["query"]):
        return False
    if given["need_weights"] is True:
        return True
    on_cpu = all(is_plain(x, "cpu") for x in tensors)
    return given["need_weights"] is False and on_cpu and takes_maths(gm)


def _trace(call: AttentionCall) -> fx.GraphModule:
    """Traces a call on its values, into ops that autograd and autocast have not seen yet."""
    given = _arguments(call.node)
    flat, spec = pytree.tree_flatten(given)
    at = [index for index, x in enumerate(flat) if isinstance(x, fx.Node)]
    values = [flat[index].meta["example_value"] for index in at]

    def run(*inputs: Any) -> Any:
        whole = list(flat)
        for index, x in zip(at, inputs, strict=True):
            whole[index] = x
        output, weights = F.multi_head_attention_forward(**pytree.tree_unflatten(whole, spec))
        return [output] if weights is None else [output, weights]

    mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    autocast = call.autocast
    with mode, torch.no_grad(), torch.autocast("cpu", autocast.dtype, enabled=autocast.enabled):
        return make_fx(run, pre_dispatch=True)(*values)


def _inline(call: fx.Node, traced: fx.GraphModule) -> None:
    """Replaces a call by the nodes it was traced into."""
    graph = call.graph
    meta = {k: v for k, v in call.meta.items() if k != "example_value"}
    inputs = [x for x in pytree.tree_leaves(_arguments(call)) if isinstance(x, fx.Node)]
    copies = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    for node in traced.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        with graph.inserting_before(call):
            copy = graph.node_copy(node, lambda x: copies[x])
        copy.meta = {**meta, "example_value": node.meta.get("val")}
        if op_name(copy) in _DROPS:
            copy.meta[WRITTEN_AS] = op_name(call)
        copies[node] = copy
    (results,) = traced.graph.output_node().args
    assert isinstance(results, (list, tuple))
    for user in list(call.users):
        result = copies[results[user.args[1]]]  # type: ignore[index]
        result.meta["example_value"] = user.meta.get("example_value")
        user.replace_all_uses_with(result)
        graph.erase_node(user)
    graph.erase_node(call)
