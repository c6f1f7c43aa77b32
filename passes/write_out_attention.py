"""Writes out the attention calls with a dropout that torch would compute by plain maths anyway."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any, ClassVar, Final

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.nn import functional as F

from ..core.decisions import PassResult
from .attention_calls import AttentionCall, attention_calls, takes_maths
from .dynamo_nodes import op_name
from .match_dropout_calls import WRITTEN_AS
from .read_attention import Attention, read_attention

_sqrt: Final[Any] = torch._sym_sqrt  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class WriteOutAttention:
    """Replaces attention with a dropout inside by the ops that torch itself computes it with.

    ::

        y = scaled_dot_product_attention(q, k, v, mask, 0.1)

        scores = (q * s) @ (k.transpose(-2, -1) * s) + mask          # s * s is the scale
        probs = torch.ops.aten._safe_softmax.default(scores, -1)
        y = torch.nn.functional.dropout(probs, 0.1, True) @ v

    1. The device is a CPU, whose fused kernel cannot drop: torch takes this road as well, with a
       mask that is drawn by a slow generator. Other devices have fused kernels that drop.
    2. The numbers are those of ``_scaled_dot_product_attention_math`` with the same mask: fp16 and
       bf16 are computed in fp32, and autocast applies to the arguments but not in between.
    3. What torch would refuse, and tensors that are nested, of a subclass or not known, stay.
    4. Bodies that stay graphs of their own, such as those of ``torch.cond``, are not touched.
    """

    name: ClassVar[str] = "write-out-attention"
    exact: ClassVar[bool] = True

    def apply(self, gm: fx.GraphModule) -> PassResult:
        """Rewrites ``gm``, and the graphs that are inlined into it, in place.

        Args:
            gm: A graph as Dynamo hands it to a backend; values are in ``meta["example_value"]``.
        """
        calls = attention_calls(gm, "scaled_dot_product_attention")
        if not calls or not takes_maths(gm):
            return PassResult(False)
        modules = []
        for call in calls:
            attention = read_attention(call)
            if attention is not None:
                _Writer(call, attention).write()
                modules.append(call.gm)
        for module in modules:
            module.graph.lint()
            module.recompile()
        return PassResult(bool(modules))


class _Writer:
    """Adds what replaces a call, in the call's name."""

    def __init__(self, call: AttentionCall, attention: Attention) -> None:
        self.node = call.node
        self.given = attention
        self.meta = {k: v for k, v in call.node.meta.items() if k != "example_value"}

    def write(self) -> None:
        """Replaces the call."""
        given, node = self.given, self.node
        query, key, value = (self.wide(x) for x in (given.query, given.key, given.value))
        # Nothing in between is converted: torch sees to that by not looking at autocast inside.
        if given.cast:
            self.switch_autocast(False)
        key, value = (
            x if n == 1 else self.add(torch.repeat_interleave, x, n, dim=-3)
            for x, n in zip((key, value), given.repeats, strict=True)
        )
        root = self.root_of_scale()
        negative = given.scale is not None and given.scale < 0
        query = self.add(torch.mul, query, -root if negative else root)
        keys = self.add(torch.mul, self.add("transpose", key, -2, -1), root)
        scores = self.add(torch.matmul, query, keys)
        mask = self.mask(query, key)
        if mask is not None:
            scores = self.add(torch.add, scores, mask)
        probs = self.add(torch.ops.aten._safe_softmax.default, scores, -1)
        dropped = self.add(F.dropout, probs, given.p, True, False)
        dropped.meta[WRITTEN_AS] = node.meta.get(WRITTEN_AS, op_name(node))
        result = self.add(torch.matmul, dropped, value)
        if given.cast:
            self.switch_autocast(True)
        if given.wide != given.dtype:
            result = self.add("to", result, given.dtype)
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        node.graph.erase_node(node)

    def wide(self, x: fx.Node) -> fx.Node:
        """Adds the conversions of an argument: those of autocast, then to what is computed in."""
        x = self.narrow(x)
        return x if self.given.wide == self.given.dtype else self.add("to", x, self.given.wide)

    def narrow(self, x: fx.Node) -> fx.Node:
        """Adds the conversion of autocast."""
        if not self.given.cast or x.meta["example_value"].dtype in (self.given.dtype, torch.bool):
            return x
        return self.add("to", x, self.given.dtype)

    def switch_autocast(self, enabled: bool) -> None:
        """Adds a switch, as a builtin: AOTAutograd caches no graph with ``_enter_autocast``."""
        switch = fx.has_side_effect(torch.set_autocast_enabled)
        with self.node.graph.inserting_before(self.node):
            node = self.node.graph.call_function(switch, ("cpu", enabled))
        node.meta = dict(self.meta)

    def root_of_scale(self) -> Any:
        """Returns the square root of the scale: a number, or a node where it is not constant."""
        if self.given.scale is not None:
            return math.sqrt(abs(self.given.scale))
        size = self.size(self.given.query, -1)
        if not isinstance(size, fx.Node):
            return math.sqrt(1.0 / math.sqrt(size)) if size else math.inf
        whole = self.add(_sqrt, self.add(torch.sym_float, size))
        return self.add(_sqrt, self.add(operator.truediv, 1.0, whole))

    def mask(self, query: fx.Node, key: fx.Node) -> fx.Node | None:
        """Returns what is added to the scores, None if nothing is."""
        given = self.given
        if given.is_causal:
            sizes = (self.size(query, -2), self.size(key, -2))
            allowed = self.add("tril", self.add(torch.ones, sizes, dtype=torch.bool, device="cpu"))
            return self.additive(allowed, given.wide)
        if given.mask is None:
            return None
        if given.mask.meta["example_value"].dtype == torch.bool:
            return self.additive(given.mask, given.dtype)
        return self.narrow(given.mask)

    def additive(self, allowed: fx.Node, dtype: torch.dtype) -> fx.Node:
        """Turns a boolean mask, False where nothing is seen, into a term of the scores."""
        zero = self.add(torch.zeros, (), dtype=dtype, device="cpu")
        return self.add(torch.where, allowed, zero, -math.inf)

    def size(self, x: fx.Node, dim: int) -> Any:
        """Returns a size: a number, or a node where it is not constant."""
        size = x.meta["example_value"].shape[dim]
        return size if type(size) is int else self.add("size", x, dim)

    def add(self, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        """Adds a node, with the value that it would have been traced with."""
        with self.node.graph.inserting_before(self.node):
            if isinstance(target, str):
                node = self.node.graph.call_method(target, args, kwargs)
            else:
                node = self.node.graph.call_function(target, args, kwargs)
        node.meta = dict(self.meta)
        args, kwargs = fx.map_arg((args, kwargs), lambda x: x.meta["example_value"])
        query = self.given.query.meta["example_value"]
        mode = query.fake_mode if isinstance(query, FakeTensor) else contextlib.nullcontext()
        with mode, torch.no_grad(), torch.autocast("cpu", enabled=False):
            if isinstance(target, str):
                node.meta["example_value"] = getattr(args[0], target)(*args[1:], **kwargs)
            else:
                node.meta["example_value"] = target(*args, **kwargs)
        return node
