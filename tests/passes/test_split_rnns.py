"""RNNs of Dynamo graphs become layers, and what is no RNN stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from ardd.passes.match_dropout_calls import RNNS
from ardd.passes.sites import module_path, source_line
from ardd.passes.split_rnns import SplitRnns, loses_dropout
from ardd.runtime.rnn_layer import rnn_layer

from .marking import data, text


def split(f: Callable[..., Any], *args: Any, dynamic: bool = False) -> tuple[fx.GraphModule, bool]:
    """Returns the graph after the pass, which is run once, and whether it was changed."""
    seen: list[tuple[fx.GraphModule, bool]] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        before = text(gm)
        modified = SplitRnns().apply(gm).modified
        assert modified == (text(gm) != before)
        assert not loses_dropout(gm)
        seen.append((gm, modified))
        return gm

    with torch._dynamo.config.patch(allow_rnn=True):
        torch.compile(f, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    ((gm, modified),) = seen
    return gm, modified


def count(gm: fx.GraphModule, target: Any) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize(
    ("kind", "options", "layers", "dropouts"),
    [
        (nn.LSTM, {"num_layers": 3, "dropout": 0.5}, 3, 2),
        (nn.GRU, {"num_layers": 2, "dropout": 0.5, "bidirectional": True}, 4, 1),
        (nn.RNN, {"num_layers": 2, "batch_first": True}, 2, 0),
        (nn.LSTM, {}, 1, 0),
    ],
)
def test_one_op_for_every_layer_and_direction(
    kind: Callable[..., nn.RNNBase], options: dict[str, Any], layers: int, dropouts: int
) -> None:
    module = kind(6, 4, **options)
    gm, modified = split(module, data(3, 2, 6))
    assert modified
    assert count(gm, rnn_layer) == layers
    assert count(gm, nn.functional.dropout) == dropouts
    torch._dynamo.reset()
    gm, modified = split(module.eval(), data(3, 2, 6))
    assert modified
    assert count(gm, nn.functional.dropout) == 0
    for a, b in zip(gm(*inputs_of(gm, module)), flat(module(data_like())), strict=True):
        torch.testing.assert_close(a, b)


def data_like() -> Tensor:
    return torch.linspace(-1, 1, 36).view(3, 2, 6)


def inputs_of(gm: fx.GraphModule, module: nn.Module) -> list[Tensor]:
    """Returns what the graph was traced with, on other data."""
    parameters = dict(module.named_parameters())
    found = []
    for node in gm.graph.find_nodes(op="placeholder"):
        names = [name for name in parameters if node.name.endswith(f"_parameters_{name}_")]
        found.append(parameters[names[0]] if names else data_like())
    return found


def flat(results: Any) -> list[Tensor]:
    y, last = results
    return [y, *(last if isinstance(last, tuple) else (last,))]


def test_dropout_says_where_it_comes_from() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(6, 4, 2, dropout=0.5)

        def forward(self, x: Tensor) -> Any:
            return self.rnn(x)

    gm, _ = split(Model(), data(3, 2, 6))
    (node,) = gm.graph.find_nodes(op="call_function", target=nn.functional.dropout)
    assert module_path(node) == "rnn"
    assert source_line(node).startswith("test_split_rnns.py:")
    assert node.meta["example_value"].shape == (3, 2, 4)


def test_function_with_named_arguments() -> None:
    weights = [data(4, 6), data(4, 4), data(4, 4), data(4, 4)]

    def f(x: Tensor, h: Tensor) -> Any:
        names = ("params", "has_biases", "num_layers", "dropout", "train", "bidirectional")
        given: Any = dict(zip(names, (weights, False, 2, 0.5, True, False), strict=True))
        return torch.rnn_tanh(x, h, **given, batch_first=False)

    gm, _ = split(f, data(3, 2, 6), data(2, 2, 4))
    assert count(gm, rnn_layer) == 2


def test_no_rnn_is_left_alone() -> None:
    _, modified = split(nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5)), data(2, 6))
    assert not modified


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_projections_keep_the_call_for_each_layer() -> None:
    gm, _ = split(nn.LSTM(6, 4, 2, dropout=0.5, proj_size=2), data(3, 2, 6))
    assert count(gm, torch.lstm) == 2
    assert count(gm, nn.functional.dropout) == 1
    assert count(gm, rnn_layer) == 0


def test_mixed_types_are_left_to_torch() -> None:
    """Which refuses them; and integers."""
    graph = fx.Graph()
    x, h, w = (graph.placeholder(name) for name in "xhw")
    x.meta["example_value"] = torch.zeros(3, 2, 6, dtype=torch.int8)
    h.meta["example_value"] = w.meta["example_value"] = torch.zeros(1, 2, 4)
    args = (x, h, [w, w], False, 1, 0.0, True, False, False)
    graph.output(graph.call_function(torch.gru, args))
    gm = fx.GraphModule({}, graph)
    assert not SplitRnns().apply(gm).modified


@pytest.mark.parametrize(
    ("layers", "p", "train", "lost"),
    [(2, 0.5, True, True), (1, 0.5, True, False), (2, 0.0, True, False), (2, 0.5, False, False)],
)
def test_what_torch_would_lose(layers: int, p: float, train: bool, lost: bool) -> None:
    for kind in sorted(RNNS - {"lstm"}):
        graph = fx.Graph()
        x, h, w = (graph.placeholder(name) for name in "xhw")
        args = (x, h, [w] * 2 * layers, False, layers, p, train, False, False)
        graph.output(graph.call_function(getattr(torch, kind), args))
        assert loses_dropout(fx.GraphModule({}, graph)) == lost
