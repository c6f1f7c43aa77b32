"""Splits RNNs of a Dynamo graph into single layers, joined by ordinary dropout."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Final

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ..core.decisions import PassResult
from ..runtime.rnn_layer import choose_kernel, rnn_layer
from ..runtime.rnn_onednn import supports
from .attention_calls import Autocast, attention_calls
from .dynamo_nodes import is_floating, op_name, tensor_of
from .match_dropout_calls import RNNS, WRITTEN_AS
from .sites import clean_path, source_name

_NAMES: Final = (
    *("input", "hx", "params", "has_biases", "num_layers"),
    *("dropout", "train", "bidirectional", "batch_first"),
)
_PACKED_NAMES: Final = ("data", "batch_sizes", *_NAMES[1:-1])


@dataclasses.dataclass(frozen=True)
class SplitRnns:
    """Splits every RNN into its layers, with the dropout in between written out.

    ::

        y, h, c = torch.lstm(x, (h0, c0), [w, u, b, d, w1, u1, b1, d1], True, 2, 0.5, True, ...)

        y0, h0_n, c0_n, *_ = torch.ops.ardd.rnn_layer(x, h0[0], c0[0], w, u, b, d, "lstm", ...)
        x1 = torch.nn.functional.dropout(y0, 0.5, True)
        y, h1_n, c1_n, *_ = torch.ops.ardd.rnn_layer(x1, h0[1], c0[1], w1, u1, b1, d1, "lstm", ...)
        h, c = torch.stack([h0_n, h1_n]), torch.stack([c0_n, c1_n])

    AOTAutograd would unroll an RNN over its time steps, which takes Inductor minutes, and lose the
    dropout between its layers: ``_rnn_helper`` in ``torch/_decomp/decompositions.py`` asks for
    ``num_layers < i - 1``, which is never so (torch 2.11 to 2.13).

    1. A layer becomes one op for each direction if all of its tensors have one floating type and
       one device, the sequences are not packed, and there are no projections. Under autocast to
       bf16 on a CPU an LSTM's tensors are converted first, as torch does before oneDNN's LSTM.
    2. Else, and under any other autocast, it becomes a call of the RNN for that layer alone, which
       is left to torch. Where there is no dropout in between, it is not touched at all.
    3. Without a dropout in between, as in eval mode, layers are split all the same.
    4. With ``project``, on a CPU, the product with the input is a ``linear`` before the op, in
       which groups of time steps can have kept sets of their own.
    """

    name: ClassVar[str] = "split-rnns"
    exact: ClassVar[bool] = True

    project: bool = False
    """Whether the products with the input stand beside the ops."""

    def apply(self, gm: fx.GraphModule) -> PassResult:
        """Rewrites ``gm``, and the graphs inside it, in place.

        Args:
            gm: A graph as Dynamo hands it to a backend; values are in ``meta["example_value"]``.
        """
        modified = False
        modules = [module for module in gm.modules() if isinstance(module, fx.GraphModule)]
        running_in = _autocast_of(gm, modules)
        for module in modules:
            changed = [_split(c, self.project, running_in(c)) for c in _calls_in(module)]
            if any(changed):
                module.graph.lint()
                module.recompile()
                modified = True
        return PassResult(modified)


def loses_dropout(gm: fx.GraphModule) -> bool:
    """Returns whether torch would lose a dropout between layers of an RNN in a graph."""
    modules = (module for module in gm.modules() if isinstance(module, fx.GraphModule))
    return any(call.drops for module in modules for call in _calls_in(module))


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of an RNN."""

    node: fx.Node
    kind: str
    packed: bool
    args: dict[str, Any]

    @property
    def x(self) -> fx.Node:
        """The input."""
        return self.args["data" if self.packed else "input"]  # type: ignore[no-any-return]

    @property
    def layers(self) -> int:
        """How many."""
        return int(self.args["num_layers"])

    @property
    def directions(self) -> int:
        """1 or 2."""
        return 2 if self.args["bidirectional"] else 1

    @property
    def states(self) -> list[fx.Node]:
        """The first h, and the first c of an LSTM: for every layer and direction."""
        hx = self.args["hx"]
        if self.kind != "lstm":
            return [hx]
        return [hx[0], hx[1]]

    @property
    def drops(self) -> bool:
        """Whether there is a dropout between its layers."""
        p, train = self.args["dropout"], self.args["train"]
        return self.layers > 1 and train is not False and not (isinstance(p, float) and p == 0)

    @property
    def projects(self) -> bool:
        """Whether the states are projected."""
        return len(self.weights[0]) > (4 if self.args["has_biases"] else 2)

    @property
    def weights(self) -> list[list[fx.Node]]:
        """Those of every layer and direction."""
        params = list(self.args["params"])
        each = len(params) // (self.layers * self.directions)
        return [params[at : at + each] for at in range(0, len(params), each)]


def _calls_in(gm: fx.GraphModule) -> Iterator[_Call]:
    """Yields the calls, each as it stands once those before it were split: it may read them."""
    for node in list(gm.graph.nodes):
        kind = op_name(node)
        if kind not in RNNS:
            continue
        # (input, hx, params, has_biases, ...) or, packed, (data, batch_sizes, hx, params, ...)
        packed = "batch_sizes" in node.kwargs or isinstance(
            (*node.args, None, None, None, None)[3], (list, tuple)
        )
        names = _PACKED_NAMES if packed else _NAMES
        args = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        if set(args) == set(names):  # else torch itself will refuse the call
            yield _Call(node, kind, packed, args)


def _split(call: _Call, project: bool, autocast: Autocast | None) -> bool:
    """Replaces a call, and returns whether it did."""
    dtype = _op_dtype(call, autocast)
    # Torch 2.11 gives the last states of a layer with projections a dimension too many.
    if dtype is None and not call.drops and not call.projects:
        return False
    build = _Builder(call)
    results = build.calls() if dtype is None else build.ops(project, dtype)
    node = call.node
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            node.graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(build.add(_as_tuple, *results))
    node.graph.erase_node(node)
    return True


def _op_dtype(call: _Call, autocast: Autocast | None) -> torch.dtype | None:
    """Returns the type that a call computes in as ops, None if it has to stay a call.

    Args:
        call: The call.
        autocast: That which it runs under, None if that is not known.
    """
    tensors = [call.x, *call.states, *call.args["params"]]
    values = [tensor_of(tensor) for tensor in tensors]
    if call.packed or not all(is_floating(tensor) for tensor in tensors):
        return None
    if call.projects or autocast is None:
        return None
    first, hidden = values[0], values[1]
    assert first is not None
    assert hidden is not None
    if first.dim() != 3 or any(v is None or v.device != first.device for v in values):
        return None
    dtypes = {v.dtype for v in values if v is not None}
    if not autocast.enabled:
        return first.dtype if len(dtypes) == 1 else None
    # Of all RNNs only oneDNN's LSTM is one op to autocast: it converts all that goes into it.
    if autocast.dtype != torch.bfloat16 or not dtypes <= {torch.float32, torch.bfloat16}:
        return None
    converted = first.new_empty(first.shape, dtype=torch.bfloat16)
    return torch.bfloat16 if supports(call.kind, converted, hidden.shape[-1]) else None


def _autocast_of(
    gm: fx.GraphModule, modules: Sequence[fx.GraphModule]
) -> Callable[[_Call], Autocast | None]:
    """Returns what tells the autocast that a call runs under, None where that is not known."""
    known = {c.node: c.autocast for name in RNNS for c in attention_calls(gm, name)}
    off = Autocast(enabled=False, dtype=torch.get_autocast_dtype("cpu"))
    nodes = [node for module in modules for node in module.graph.nodes]
    switched = any("autocast" in str(node.target) for node in nodes)
    ambient = any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))

    def running_in(call: _Call) -> Autocast | None:
        if not switched and not ambient:
            return off
        value = tensor_of(call.x)
        on_cpu = value is not None and value.device.type == "cpu"
        return known.get(call.node) if on_cpu else None

    return running_in


class _Builder:
    """Adds what replaces a call, in the call's name."""

    def __init__(self, call: _Call) -> None:
        self.call = call
        self.graph = call.node.graph
        self.meta = {k: v for k, v in call.node.meta.items() if k != "example_value"}
        if not self.meta.get("nn_module_stack"):  # Dynamo of torch 2.11 gives RNNs no module
            owner = clean_path(source_name(call.weights[0][0])).rpartition(".")[0]
            self.meta["nn_module_stack"] = {"": (owner, torch.nn.RNNBase)} if owner else {}

    def add(self, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        """Adds a node, with the value that it would have been traced with if that is known."""
        with self.graph.inserting_before(self.call.node):
            if isinstance(target, str):
                node = self.graph.call_method(target, args, kwargs)
            else:
                node = self.graph.call_function(target, args, kwargs)
        node.meta = dict(self.meta)
        inputs = node.all_input_nodes
        values = [x.meta.get("example_value") for x in inputs]
        modes = [v.fake_mode for v in pytree.tree_leaves(values) if isinstance(v, FakeTensor)]
        if modes and all(value is not None for value in values) and op_name(node) not in RNNS:
            args, kwargs = fx.map_arg((args, kwargs), lambda x: x.meta["example_value"])
            with modes[0], torch.no_grad():
                if isinstance(target, str):
                    node.meta["example_value"] = getattr(args[0], target)(*args[1:], **kwargs)
                else:
                    node.meta["example_value"] = target(*args, **kwargs)
        return node

    def dropout(self, x: fx.Node) -> fx.Node:
        """Adds the dropout after a layer, as nn.Dropout would be traced."""
        p, train = self.call.args["dropout"], self.call.args["train"]
        node = self.add(F.dropout, x, p, train, False)
        node.meta[WRITTEN_AS] = self.call.kind
        return node

    def converted(self, tensor: fx.Node, dtype: torch.dtype) -> fx.Node:
        """Adds the conversion of an argument to a type, if it has another."""
        value = tensor_of(tensor)
        assert value is not None
        return tensor if value.dtype == dtype else self.add("to", tensor, dtype)

    def ops(self, project: bool, dtype: torch.dtype) -> list[fx.Node]:
        """Adds one op for every layer and direction, which computes in a type."""
        call, has_biases = self.call, self.call.args["has_biases"]
        batch_first = call.args["batch_first"]
        given_x, *states = (self.converted(tensor, dtype) for tensor in (call.x, *call.states))
        x = self.add("transpose", given_x, 0, 1) if batch_first else given_x
        last: list[list[fx.Node]] = [[] for _ in call.states]
        for layer in range(call.layers):
            results = []
            for direction in range(call.directions):
                place = layer * call.directions + direction
                first = [self.add(operator.getitem, state, place) for state in states]
                weights = [self.converted(weight, dtype) for weight in call.weights[place]]
                given = weights if has_biases else [*weights, None, None]
                value = tensor_of(x)
                hidden = tensor_of(first[0])
                assert value is not None
                assert hidden is not None
                projected = project and value.device.type == "cpu"
                kernel = choose_kernel(call.kind, value, hidden.shape[-1], projected=projected)
                gets = x
                if projected:
                    w_ih, w_hh, b_ih, b_hh = given
                    given = [None, w_hh, None, b_hh]
                    # Its rows come in the order of those of the dropout before it.
                    gets = self.add(F.linear, x if layer else given_x, w_ih, b_ih)
                    if batch_first and not layer:
                        gets = self.add("transpose", gets, 0, 1)
                op = self.add(
                    rnn_layer,
                    *(gets, first[0], first[1] if len(first) > 1 else None, *given),
                    *(call.kind, direction == 1, kernel, False),
                )
                results.append(self.add(operator.getitem, op, 0))
                for number, lasts in enumerate(last):
                    lasts.append(self.add(operator.getitem, op, 1 + number))
            x = results[0] if len(results) == 1 else self.add(torch.cat, results, -1)
            if call.drops and layer < call.layers - 1:
                x = self.dropout(x)
        if batch_first:
            x = self.add("transpose", x, 0, 1)
        return [x, *(self.add(torch.stack, lasts) for lasts in last)]

    def calls(self) -> list[fx.Node]:
        """Adds one call of the RNN for every layer."""
        call, x = self.call, self.call.x
        lasts: list[Sequence[fx.Node]] = []
        for layer in range(call.layers):
            places = slice(layer * call.directions, (layer + 1) * call.directions)
            first = [self.add(operator.getitem, state, places) for state in call.states]
            args = dict(call.args)
            args["data" if call.packed else "input"] = x
            args["hx"] = tuple(first) if call.kind == "lstm" else first[0]
            args["params"] = [weight for given in call.weights[places] for weight in given]
            args |= {"num_layers": 1, "dropout": 0.0}
            rnn = self.add(call.node.target, *args.values())
            self._value(rnn, call, first)
            results = [self.add(operator.getitem, rnn, i) for i in range(1 + len(first))]
            x, *last = results
            pairs = zip(last, first, strict=True)
            lasts.append([self.add("view_as", state, before) for state, before in pairs])
            if layer < call.layers - 1:
                x = self.dropout(x)
        return [x, *(self.add(torch.cat, states) for states in zip(*lasts, strict=True))]

    def _value(self, rnn: fx.Node, call: _Call, first: Sequence[fx.Node]) -> None:
        """Gives a call the values of its results: every layer's are like the last one's."""
        whole = call.node.meta.get("example_value")
        if isinstance(whole, (tuple, list)) and all("example_value" in s.meta for s in first):
            states = [state.meta["example_value"] for state in first]
            rnn.meta["example_value"] = (whole[0], *states)


def _as_tuple(*results: Any) -> tuple[Any, ...]:
    return results
