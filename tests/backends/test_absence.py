"""Why a dropout reached no graph: each cause on a real module, and torch's habits themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._dynamo.utils import counters

import ardd
from ardd.backends.absence import explain_absence
from ardd.core.decisions import Decision, Reason

ITEM = "Unsupported Tensor.item() call with capture_scalar_outputs=False\n  Explanation: ..."
RNN = "Attempted to wrap RNN, GRU, or LSTM\n  Explanation: Dynamo does not support RNN"
PRINT = "Failed to trace builtin operator\n  Explanation: ..."


def found(*modules: str, reason: Reason = Reason.STRUCTURED) -> list[Decision]:
    taken = reason is Reason.STRUCTURED
    return [
        Decision(i, "dropout", path, "m.py:1", (4, 8), 0.5, taken, reason)
        for i, path in enumerate(modules)
    ]


class Net(nn.Module):
    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.drop = nn.Dropout(p)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Dropout2d(p))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.fc(x)))  # type: ignore[no-any-return]


class Tagger(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.before = nn.Dropout()
        self.rnn = rnn
        self.after = nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.rnn(self.before(x))[0])  # type: ignore[no-any-return]


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


ENCODER_PATHS = [
    f"layers.{i}.{name}"
    for i in (0, 1)
    for name in ("self_attn", "dropout", "dropout1", "dropout2")
]


# ---- nothing is absent -------------------------------------------------------------------


def test_all_found() -> None:
    assert explain_absence(Net(), 1, found("drop", "head.1")) == ()


def test_refused_is_not_absent() -> None:
    """A dropout with a row is not explained twice."""
    assert explain_absence(Net(), 1, found("drop", "head.1", reason=Reason.NO_PRODUCT)) == ()


def test_shared_dropout_is_found_by_any_of_its_paths() -> None:
    model = Net()
    model.again = model.drop
    assert explain_absence(model, 1, found("again", "head.1")) == ()
    (note,) = explain_absence(model, 1, found("head.1"))
    assert note.startswith("drop: ")


def test_functional_dropout_carries_the_path_of_its_module() -> None:
    assert explain_absence(nn.Sequential(nn.Linear(8, 8)), 1, found("")) == ()


def test_model_that_is_a_dropout() -> None:
    assert explain_absence(nn.Dropout(), 1, found("")) == ()


# ---- eager drops nothing either ----------------------------------------------------------


def test_eval_mode() -> None:
    (note,) = explain_absence(Net().eval(), 1, [])
    assert note == "drop, head.1: the model is in eval mode; call model.train()."


def test_eval_mode_of_a_model_without_dropout_modules() -> None:
    """Its dropouts may be calls of F.dropout with training=self.training."""
    (note,) = explain_absence(nn.Linear(8, 8).eval(), 1, [])
    assert note == "The model is in eval mode; call model.train()."


def test_eval_mode_of_a_part() -> None:
    model = Net()
    model.head.eval()
    (note,) = explain_absence(model, 1, found("drop"))
    assert note == "head.1: in eval mode nothing is dropped; call .train() on it."


def test_zero_rate() -> None:
    model = Net(p=0.0)
    model.drop.p = 0.3
    (note,) = explain_absence(model, 1, found("drop"))
    assert note == "head.1: p=0 drops nothing; set p above 0 if it should."


def test_two_causes_are_two_notes() -> None:
    model = Net()
    model.drop.p = 0.0
    model.head.eval()
    notes = explain_absence(model, 1, [])
    assert [note.split(":")[0] for note in notes] == ["drop", "head.1"]


@pytest.mark.parametrize(
    "module",
    [
        nn.MultiheadAttention(8, 2),
        nn.LSTM(8, 8, 2),
        pytest.param(nn.LSTM(8, 8, 1), id="one layer: dropout is between layers, so there is none"),
    ],
)
def test_modules_without_a_rate_are_not_missed(module: nn.Module) -> None:
    (note,) = explain_absence(module, 1, [])
    assert note.startswith("No dropout with training=True and p above 0 was called; ")


# ---- torch keeps them out ----------------------------------------------------------------


def test_bare_module_compiled_in_place() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout())
    model.compile(backend="eager")
    (note,) = explain_absence(model, 0, [])
    assert note.startswith("1: nn.Sequential.compile() compiles nothing, ")
    assert note.endswith("; write model = torch.compile(model) instead.")


def test_bare_module_compiled_in_place_is_told_although_a_dry_run_finds_all() -> None:
    """A dry run by torch.compile(m) sees what m.compile() never will."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout())
    model.compile(backend="eager")
    (note,) = explain_absence(model, 1, found("1"))
    assert note.startswith("nn.Sequential.compile() compiles nothing, ")


def test_bare_module_with_no_graph() -> None:
    (note,) = explain_absence(nn.Linear(8, 8), 0, [])
    assert note.startswith("nn.Linear.compile() compiles nothing, ")


def test_bare_module_that_a_function_calls_is_not_blamed() -> None:
    layer = nn.Linear(8, 8)
    (note,) = explain_absence(lambda x: layer(x), 0, [])
    assert note.startswith("Torch captured no graph; ")


def test_own_forward_may_be_compiled_in_place() -> None:
    model = Net()
    model.compile(backend="eager")
    assert explain_absence(model, 1, found("drop", "head.1")) == ()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_rnn(kind: Callable[..., nn.Module]) -> None:
    model = Tagger(kind(8, 8, 2, dropout=0.5, batch_first=True))
    (note,) = explain_absence(model, 1, found("before"), [RNN])
    name = kind.__name__
    assert note.startswith(f"rnn, after: torch does not trace nn.{name} (rnn), ")
    assert "use ardd.compile(model)" in note
    assert explain_absence(model, 1, found("before")) == (note,)


def test_rnn_without_dropout_hides_what_follows_it() -> None:
    (note,) = explain_absence(Tagger(nn.GRU(8, 8)), 1, found("before"), [RNN])
    assert note.startswith("after: torch does not trace nn.GRU (rnn), ")
    assert note.endswith("use ardd.compile(model) in place of torch.compile, which traces it.")


def test_rnn_that_hides_no_dropout_is_named_all_the_same() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.GRU(8, 8))
    assert explain_absence(model, 1, found("0")) == ()
    (note,) = explain_absence(model, 1, found("0"), [RNN])
    assert note.startswith("Torch does not trace nn.GRU (1), ")


def test_rnn_of_a_packed_sequence() -> None:
    model = Tagger(nn.LSTM(8, 8, 2, dropout=0.5))
    breaks = ["Operator `aten._local_scalar_dense.default` has a non-Tensor output"]
    with torch._dynamo.config.patch(allow_rnn=True):
        (note,) = explain_absence(model, 2, found("before", "after"), breaks)
    assert note.startswith("rnn: torch does not trace RNNs of packed sequences")


def test_rnn_that_torch_was_told_to_trace() -> None:
    model = Tagger(nn.LSTM(8, 8, 2, dropout=0.5))
    with torch._dynamo.config.patch(allow_rnn=True):
        (note,) = explain_absence(model, 1, found("before", "after"))
        assert note == "rnn: not run in a captured graph; check that the call reaches it."
        assert explain_absence(model, 1, found("before", "rnn", "after")) == ()


def test_rnn_is_not_blamed_for_another_break() -> None:
    (note,) = explain_absence(Tagger(nn.GRU(8, 8)), 1, found("before"), [PRINT])
    assert "nn.GRU" not in note
    assert "Failed to trace builtin operator" in note


@pytest.mark.parametrize("breaks", [[], [ITEM]])
def test_transformer_encoder_with_a_mask(breaks: list[str]) -> None:
    (note,) = explain_absence(encoder(), 0, [], breaks)
    assert note.startswith("layers.0.self_attn, layers.0.dropout, layers.0.dropout1, ")
    assert "nn.TransformerEncoder called with mask= but without is_causal= " in note
    assert all(path in note for path in ENCODER_PATHS)


def test_transformer_encoder_inside_a_model() -> None:
    model = nn.ModuleDict({"drop": nn.Dropout(), "encoder": encoder()})
    (note,) = explain_absence(model, 2, found("drop"), [ITEM])
    assert note.startswith("encoder.layers.0.self_attn, ")
    assert "pass is_causal= too" in note


def test_transformer_decoder_and_whole() -> None:
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 1)
    (note,) = explain_absence(decoder, 0, [], [ITEM])
    assert "tgt_mask= but without tgt_is_causal= " in note
    (note,) = explain_absence(nn.Transformer(8, 2, 1, 1, 16, batch_first=True), 0, [], [ITEM])
    assert "src_mask= or tgt_mask= but without src_is_causal= and tgt_is_causal= " in note


def test_transformer_encoder_is_not_blamed_for_another_break() -> None:
    (note,) = explain_absence(encoder(), 0, [], [PRINT])
    assert "is_causal" not in note
    assert "Failed to trace builtin operator" in note


def test_transformer_encoder_that_was_traced() -> None:
    paths = [path for path in ENCODER_PATHS if path != "layers.1.dropout1"]
    (note,) = explain_absence(encoder(), 1, found(*paths))
    assert note.startswith("layers.1.dropout1: not run in a captured graph")


def test_attention_module() -> None:
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2, dropout=0.3)})
    (note,) = explain_absence(model, 1, [])
    assert note.startswith("mha: the dropout of attention weights is inside scaled_dot_product_")
    assert "need_weights=False" in note
    assert explain_absence(model, 1, found("mha", reason=Reason.INSIDE_SDPA)) == ()


def test_dropout_module_whose_rate_went_into_the_kernel() -> None:
    """Hugging Face attention keeps an nn.Dropout and hands its p to the kernel."""
    model = nn.ModuleDict({"attention": nn.ModuleDict({"drop": nn.Dropout()})})
    (note,) = explain_absence(model, 1, found("attention", reason=Reason.INSIDE_SDPA))
    assert note.startswith("attention.drop: the dropout of attention weights is inside ")


def test_attention_written_out_is_not_structured_either() -> None:
    """So no note may advise it: positions of a sequence are no features."""

    def attend(q: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        q = q @ w
        return nn.functional.dropout((q @ q.mT).softmax(-1), 0.1) @ q

    q, w = torch.randn(4, 8, 64), torch.randn(64, 64, requires_grad=True)
    (decision,) = ardd.explain(attend, q, w, options={"pattern": "block"}).decisions
    assert decision.reason is Reason.NO_PRODUCT
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2, dropout=0.3)})
    (note,) = explain_absence(model, 1, [])
    assert note.endswith("it would not be structured written out either.")


def test_dropout_module_whose_rate_went_into_a_function() -> None:
    """Attention of Hugging Face holds an nn.Dropout, and calls F.dropout with its rate."""
    drop = nn.Dropout()
    model = nn.ModuleDict({"attention": nn.ModuleDict({"drop": drop})})
    assert explain_absence(model, 1, found("attention")) == (
        "attention.drop: not called itself; a dropout of its rate has a row with the path of the "
        "module around.",
    )
    drop.p = 0.25
    (note,) = explain_absence(model, 1, found("attention"))
    assert "not run in a captured graph" in note


def test_graph_breaks() -> None:
    (note,) = explain_absence(Net(), 1, found("drop"), [PRINT, PRINT, "a", "b", "c", "d"])
    assert note == (
        "head.1: torch ended a graph early (Failed to trace builtin operator; a; b; and 2 more); "
        "change the line that torch.compile(..., fullgraph=True) points at."
    )


def test_path_lost_at_a_graph_break() -> None:
    """Torch names a module on the stack by its place there: the row may be the one missed."""
    (note,) = explain_absence(Net(), 2, found("drop", ""), [PRINT])
    assert note.startswith("head.1: maybe among the dropouts without a known module, ")


def test_module_that_did_not_run() -> None:
    (note,) = explain_absence(Net(), 1, found("drop"))
    assert note == "head.1: not run in a captured graph; check that the call reaches it."


def test_no_graph() -> None:
    (note,) = explain_absence(Net(), 0, [])
    assert note.startswith("drop, head.1: torch captured no graph; call it outside ")
    (note,) = explain_absence(lambda x: x, 0, [], ["reason"])
    assert note.startswith("Torch captured no graph (reason); call it outside ")


def test_no_dropout_at_all() -> None:
    (note,) = explain_absence(nn.ReLU(), 1, [])
    assert note.startswith("No dropout with training=True and p above 0 was called; ")
    (note,) = explain_absence(nn.ReLU(), 1, [], [PRINT])
    assert note.startswith("Torch ended a graph early (Failed to trace builtin operator); ")


def test_many_paths_are_counted() -> None:
    model = nn.Sequential(*(nn.Dropout(0.0) for _ in range(50)))
    (note,) = explain_absence(model, 1, [])
    assert note.startswith("0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 38 more: p=0 ")


# ---- what was compiled -------------------------------------------------------------------


class Trainer:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def step(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)  # type: ignore[no-any-return]


GLOBAL = Net()


def callables() -> Iterator[Any]:
    model = Net()

    def closure(x: torch.Tensor) -> torch.Tensor:
        return model(x)  # type: ignore[no-any-return]

    def uses_global(x: torch.Tensor) -> torch.Tensor:
        return GLOBAL(x)  # type: ignore[no-any-return]

    yield pytest.param(torch.compile(Net(), backend="eager"), "", "", id="compiled module")
    yield pytest.param(Net().forward, "", "", id="bound forward")
    yield pytest.param(functools.partial(Net()), "", "", id="partial")
    yield pytest.param(closure, "model.", "", id="closure")
    yield pytest.param(torch.compile(closure, backend="eager"), "model.", "", id="compiled closure")
    yield pytest.param(uses_global, "GLOBAL.", "", id="global")
    yield pytest.param(Trainer(Net()).step, "model.", "model.", id="attribute of self")


@pytest.mark.parametrize(("target", "shown", "path"), list(callables()))
def test_modules_are_found_in(target: Callable[..., object], shown: str, path: str) -> None:
    (note,) = explain_absence(target, 1, found(f"{path}drop"))
    assert note.startswith(f"{shown}head.1: not run in a captured graph")
    assert explain_absence(target, 1, found(f"{path}drop", f"{path}head.1")) == ()


def test_function_without_modules() -> None:
    assert explain_absence(len, 1, found("")) == ()


# ---- torch still does what the notes say -------------------------------------------------


def capture(model: Callable[..., object], *args: Any, **kwargs: Any) -> tuple[int, Sequence[str]]:
    """Runs a compiled model and returns the number of dropouts captured and the breaks."""
    names: list[str] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        del inputs
        names.extend(str(node.target) for node in gm.graph.nodes)
        return gm.forward

    torch._dynamo.reset()
    counters.clear()
    if kwargs.pop("in_place", False):
        model.compile(backend=backend)  # type: ignore[attr-defined]
        model(*args, **kwargs)
    else:
        torch.compile(model, backend=backend)(*args, **kwargs)
    breaks = [*counters["graph_break"], *counters["unimplemented"]]
    return sum("dropout" in name for name in names), breaks


def test_torch_compiles_no_bare_module_in_place() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout())
    x = torch.randn(4, 8)
    assert capture(model, x) == (1, [])
    assert capture(model, x, in_place=True) == (0, [])


def test_torch_looks_at_masks_on_the_host() -> None:
    x, mask = torch.randn(2, 5, 8), nn.Transformer.generate_square_subsequent_mask(5)
    count, breaks = capture(encoder(), x, mask=mask)
    assert count == 0
    assert any("item()" in reason for reason in breaks)
    assert capture(encoder(), x, mask=mask, is_causal=True) == (6, [])


def test_torch_does_not_trace_rnns() -> None:
    model = Tagger(nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True))
    x = torch.randn(2, 5, 8)
    count, breaks = capture(model, x)
    assert count < 2
    assert any("RNN" in reason for reason in breaks)
    with torch._dynamo.config.patch(allow_rnn=True):
        assert capture(model, x) == (2, [])


def test_torch_loses_the_dropout_between_layers() -> None:
    """Traced ahead of time, a stacked RNN in training is that RNN in eval mode."""
    model = Tagger(nn.GRU(8, 8, 2, dropout=0.9, batch_first=True))
    model.before.p = model.after.p = 0.0
    x = torch.randn(2, 5, 8, requires_grad=True)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(model, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, model.eval()(x))
