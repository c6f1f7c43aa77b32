"""The dry run and the record: what they say, and that looking changes nothing."""

from __future__ import annotations

import inspect
import json
import logging
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import ardd
from ardd.backends.inductor import trace_with_inductor
from ardd.core.decisions import Reason

from .yardstick import EAGER, Net, check_exact, step

BLOCK = {"pattern": "block"}


class Normed(nn.Module):
    """Has buffers that every call in training mode writes to, and a weight made in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 32))
        self.norm = nn.BatchNorm1d(32)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(32, 8)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1  # another tensor each time
        return self.last(self.drop(self.norm(self.first(x))))  # type: ignore[no-any-return]


# ---- explain says ------------------------------------------------------------------------


def test_module() -> None:
    report = ardd.explain(Net(), torch.randn(4, 16), options=BLOCK)
    (graph,) = report.graphs
    assert [(d.module, d.taken, d.dim) for d in graph.decisions] == [
        ("drop", True, 1),
        ("again", True, 1),
    ]
    assert {d.shape for d in graph.decisions} == {(4, 32)}
    assert not graph.inference
    assert not graph.from_cache
    assert report.notes == ()
    assert "dropout_mask" in report.before
    assert "draw_blocks" not in report.before
    assert "draw_blocks" in report.after
    assert "draw_blocks" in report.forward
    assert "dropout_mask" not in report.after
    assert "mm" in report.backward
    assert "draw_blocks" not in report.backward


def test_function_and_arguments() -> None:
    weight = torch.randn(64, 8)

    def program(x: Tensor, *, scale: float) -> Tensor:
        return F.dropout(x * scale, 0.5) @ weight

    report = ardd.explain(program, torch.randn(4, 64), scale=2.0, options=BLOCK)
    (decision,) = report.decisions
    assert decision.reason is Reason.STRUCTURED
    assert report.graphs[0].inference  # nothing here wants a gradient


def test_flops_of_an_mlp() -> None:
    """Counted by hand: a product of a [b, m] and a [m, n] is 2bmn, and a layer has three of them.

    The first layer has no gradient of its input. Half of the 32 features are dropped twice, so
    that the first and the last layer are halved and the middle one is a quarter.
    """
    report = ardd.explain(Net(), torch.randn(10, 16), options=BLOCK)
    first, middle, last = 2 * 10 * 16 * 32, 2 * 10 * 32 * 32, 2 * 10 * 32 * 8
    assert report.flops_before == 2 * first + 3 * middle + 3 * last
    assert report.flops_after == (2 * first + 3 * last) // 2 + 3 * middle // 4
    drop, again = report.decisions
    assert drop.flops_before == 2 * first + 3 * middle
    assert again.flops_before == 3 * middle + 3 * last
    assert drop.flops_after == first + 3 * middle // 4
    assert again.flops_after == 3 * middle // 4 + 3 * last // 2


def test_flops_of_inference() -> None:
    with torch.no_grad():
        report = ardd.explain(Net(), torch.randn(10, 16), options=BLOCK)
    first, middle, last = 2 * 10 * 16 * 32, 2 * 10 * 32 * 32, 2 * 10 * 32 * 8
    assert report.flops_before == first + middle + last
    assert report.flops_after == (first + last) // 2 + middle // 4
    assert report.graphs[0].inference
    assert report.saved_bytes_after is None
    assert "saved for backward" not in str(report)


def test_saved_bytes() -> None:
    """Both are known, and dropped features are not kept."""
    report = ardd.explain(Net(width=256), torch.randn(64, 16), options=BLOCK)
    assert report.saved_bytes_before is not None
    assert report.saved_bytes_after is not None
    assert 0 < report.saved_bytes_after < report.saved_bytes_before
    assert "unknown" not in str(report)


@pytest.mark.parametrize("options", [{"pattern": "random"}, {"max_rewrites": 0, **BLOCK}])
def test_nothing_rewritten_saves_what_stock_does_but_for_masks(options: dict[str, object]) -> None:
    """Of a dropout that stays random a seed of 8 bytes, where stock saves its mask.

    Stock also saves the sign of the ReLU, which ours reads from what was dropped.
    """
    net, x = Net(), torch.randn(64, 16)
    without = ardd.explain(Net().eval(), x, options={"saves": "off"}).saved_bytes_before
    torch._dynamo.reset()
    report = ardd.explain(net, x, options=options | {"saves": "off"})
    masks = sum(math.prod(map(int, decision.shape)) for decision in report.decisions)
    assert without is not None
    sign = 64 * 32
    assert report.saved_bytes_before == without + masks + sign
    assert report.saved_bytes_after == without + 2 * 8
    assert report.flops_before == report.flops_after > 0
    assert len(report.decisions) == 2


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(16, 16), nn.Dropout(0.25), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Any:
        def dropped(y: Tensor) -> Any:
            return self.last(self.drop(self.first(y)))

        return torch.cond(x.sum() > 0, dropped, self.last, (x,))


@pytest.mark.filterwarnings("ignore:ardd. Pass:RuntimeWarning")
def test_dropout_in_a_branch_has_a_row() -> None:
    """Torch draws its mask again in backward: there is nothing to compare with, and a note."""
    report = ardd.explain(Branches(), torch.randn(4, 16))
    assert {d.reason for d in report.decisions} == {Reason.SUBGRAPH}
    assert report.graphs[0].saved_bytes_before is None
    assert any("is not known: RedrawError: The backward graph" in note for note in report.notes)


@pytest.mark.parametrize("error", [ValueError(), RuntimeError("one line.\nanother")])
def test_stock_torch_fails_where_ardd_does_not(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trace(gm: Any, inputs: Any, compilation: Any) -> Any:
        if compilation.options.saves == "off":
            raise error
        return trace_with_inductor(gm, inputs, compilation)

    monkeypatch.setattr("ardd.backends.explain.trace_with_inductor", trace)
    report = ardd.explain(Net(), torch.randn(4, 16), options=BLOCK)
    assert [d.taken for d in report.decisions] == [True, True]
    assert report.saved_bytes_before is None
    why = "RuntimeError: one line" if error.args else "ValueError: no message"
    assert report.notes == (f"What stock torch would save for backward is not known: {why}.",)


def test_stock_torch_leaves_no_guards() -> None:
    """Its search for attention adds guards on symbols that no input has, on which Dynamo fails."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out, self.drop = nn.Linear(64, 192), nn.Linear(64, 64), nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Any:
            split = self.qkv(x).chunk(3, -1)
            q, k, v = (t.view(4, 8, 4, 16).transpose(1, 2) for t in split)
            scores = self.drop((q @ k.transpose(-1, -2) / 4).softmax(-1))
            return self.out((scores @ v).transpose(1, 2).reshape(4, 8, 64))

    report = ardd.explain(Attention(), torch.randn(4, 8, 64))
    assert len(report.decisions) == 1
    assert report.notes == ()


def test_eval_mode() -> None:
    report = ardd.explain(Net().eval(), torch.randn(4, 16))
    (graph,) = report.graphs
    assert graph.decisions == ()
    assert not graph.inference
    assert graph.saved_bytes_before == graph.saved_bytes_after
    assert graph.saved_bytes_before
    assert graph.before == graph.after != ""
    (note,) = report.notes
    assert note == "drop, again: the model is in eval mode; call model.train()."


def test_attention_alone_has_a_row() -> None:
    """No dropout of this graph can be marked, and the one there is has a row all the same."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            q = self.project(x)
            with sdpa_kernel(SDPBackend.MATH):  # a choice of the user's, which is left alone
                return F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)

    model, x = Attention(), torch.randn(2, 5, 16)
    report = ardd.explain(model, x)
    (decision,) = report.decisions
    assert (decision.reason, decision.p, decision.taken) == (Reason.INSIDE_SDPA, 0.1, False)
    assert not report.graphs[0].inference
    assert report.saved_bytes_before == report.saved_bytes_after != 0
    step(torch.compile(model, backend="ardd", options=EAGER), model, x)
    assert ardd.report().decisions == report.decisions
    assert not ardd.report().graphs[0].inference


def test_unused_dropout_has_a_row() -> None:
    def program(x: Tensor) -> Tensor:
        F.dropout(x, 0.5)
        return x + 1

    reasons = [d.reason for d in ardd.explain(program, torch.randn(4, 8)).decisions]
    assert reasons in ([], [Reason.UNUSED])  # torch may have thrown it away before
    assert Reason.SUBGRAPH not in reasons


# Torch asks for the .grad of what crosses the break, and hides the warning, but not the error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_broken_graphs_are_all_there() -> None:
    class Broken(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.drop(self.first(x).relu())
            torch._dynamo.graph_break()
            return self.last(self.again(self.second(h)))  # type: ignore[no-any-return]

    report = ardd.explain(Broken(), torch.randn(4, 16), options=BLOCK)
    assert len(report.graphs) == 2
    assert [len(graph.decisions) for graph in report.graphs] == [1, 1]
    assert report.after.count("# graph ") == 2


def test_nothing_captured_is_explained() -> None:
    class Hidden(Net):
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    report = ardd.explain(Hidden(), torch.randn(4, 16))
    assert report.graphs == ()
    (note,) = report.notes
    assert note.startswith("drop, again: torch captured no graph")


def test_a_break_is_explained_the_second_time_too() -> None:
    """Torch counts reasons for the process; the one of this call may have been met before."""

    class Loud(Net):
        def forward(self, x: Tensor) -> Tensor:
            print(x.sum().item(), end="")
            return super().forward(x)

    for _ in range(2):
        model = Loud()
        model.drop = nn.Identity()  # type: ignore[assignment]
        model.hidden = nn.Dropout()
        (note,) = ardd.explain(model, torch.randn(4, 16)).notes
        assert note.startswith("hidden: torch ended a graph early (")


def test_options_are_checked_before_anything_runs() -> None:
    def program(x: Tensor) -> Tensor:
        raise AssertionError("was run")

    with pytest.raises(ardd.OptionsError, match="Did you mean 'pattern'"):
        ardd.explain(program, torch.randn(1), options={"patern": "block"})
    with pytest.raises(ardd.CostModelError, match="Unknown cost model 'x'"):
        ardd.explain(program, torch.randn(1), options={"cost_model": "x"})


def test_a_failing_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from ardd.passes import structure_dropout

    def fails(*args: Any) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(structure_dropout, "compact", fails)
    with pytest.warns(RuntimeWarning, match="ZeroDivisionError: planted"):
        report = ardd.explain(Net(), torch.randn(4, 16), options=BLOCK)
    (graph,) = report.graphs
    assert graph.failure is not None
    assert [d.reason for d in graph.decisions] == [Reason.PASS_FAILED] * 2
    assert report.saved_bytes_before == report.saved_bytes_after is not None
    assert not graph.inference
    with pytest.raises(ardd.PassError, match="ZeroDivisionError: planted"):
        ardd.explain(Net(), torch.randn(4, 16), options=BLOCK | {"strict": True})


# ---- explain leaves everything as it was -------------------------------------------------


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "buffers": [(k, id(b), b.clone()) for k, b in model.named_buffers()],
        "parameters": [(k, id(p), p.detach().clone()) for k, p in model.named_parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in ("modes", "python"):
        assert before[key] == after[key]
    assert torch.equal(before["torch"], after["torch"])
    for key in ("buffers", "parameters"):
        for (name, at, old), (_, now, new) in zip(before[key], after[key], strict=True):
            assert at == now, name
            assert torch.equal(old, new), name
    for old, new in zip(before["grads"], after["grads"], strict=True):
        assert (old is None) == (new is None)
        assert old is None or torch.equal(old, new)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: lambda x: m(x)], ids=["module", "closure"])
def test_nothing_is_changed(wrap: Callable[[nn.Module], Callable[..., Tensor]]) -> None:
    """Generators, running statistics, modes and gradients, a closed-over module's included."""
    model = Normed()
    model.drop.eval()
    model.last(torch.randn(2, 32)).sum().backward()
    before = state_of(model)
    for _ in range(2):
        ardd.explain(wrap(model), torch.randn(4, 16, generator=torch.Generator().manual_seed(1)))
    assert_same_state(before, state_of(model))


def test_a_program_that_raises_changes_nothing_either() -> None:
    class Raising(Normed):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            torch._dynamo.graph_break()
            raise KeyError("planted")

    model = Raising()
    before = state_of(model)
    with pytest.raises(KeyError, match="planted"):
        ardd.explain(model, torch.randn(4, 16, generator=torch.Generator().manual_seed(1)))
    assert_same_state(before, state_of(model))


def test_a_backward_that_is_due_still_runs() -> None:
    """Buffers that were saved for it may not be written to, not even with what they hold."""
    model = Normed()
    model.norm.eval()  # its statistics are saved for backward
    due = model.norm(model.first(torch.randn(4, 16))).sum()
    model.train(False)
    ardd.explain(model, torch.randn(4, 16))
    due.backward()


def test_the_record_is_left_alone() -> None:
    model = Net()
    check_exact(torch.compile(model, backend="ardd", options=EAGER), model, torch.randn(4, 16))
    before = ardd.report()
    ardd.explain(model, torch.randn(4, 16))
    assert ardd.report() == before


@pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters,
    reason="this torch cannot keep compiles of one function apart",
)
def test_compiled_graphs_are_left_alone() -> None:
    """A dry run does not use up the recompiles that torch allows, nor empty its cache."""
    model = Net()
    compiled = torch.compile(model, backend="ardd", options=EAGER)
    check_exact(compiled, model, torch.randn(4, 16))
    for _ in range(torch._dynamo.config.recompile_limit + 1):
        assert len(ardd.explain(model, torch.randn(4, 16)).graphs) == 1
    check_exact(compiled, model, torch.randn(4, 16))
    assert len(ardd.report().graphs) == 1
    check_exact(compiled, model, torch.randn(5, 16))
    assert len(ardd.report().graphs) == 2


def test_compiled_modules_are_explained() -> None:
    """However the user compiled it, what is explained is what the user wrote."""
    x = torch.randn(4, 16)
    expected = ardd.explain(Net(), x).decisions
    compiled = torch.compile(Net(), backend="ardd", options=EAGER)
    assert ardd.explain(compiled, x).decisions == expected
    model = Net()
    model.compile(backend="ardd", options=EAGER)
    inside = nn.Sequential(model)
    call = model._compiled_call_impl
    assert ardd.explain(model, x).decisions == expected
    assert len(ardd.explain(inside, x).decisions) == 2
    assert model._compiled_call_impl is call
    assert ardd.report().graphs == ()

    @torch.compile(backend="ardd", options=EAGER)
    def program(x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)

    assert len(ardd.explain(program, x).decisions) == 1


# ---- the record --------------------------------------------------------------------------


def test_report_after_training() -> None:
    model = Net()
    compiled = torch.compile(model, backend="ardd", options=EAGER)
    for _ in range(3):
        step(compiled, model, torch.randn(4, 16))
    (graph,) = ardd.report().graphs
    assert [d.taken for d in graph.decisions] == [True, True]
    assert graph.saved_bytes_after
    assert graph.forward
    assert graph.backward
    expected = ardd.explain(model, torch.randn(4, 16), options=EAGER)
    assert graph.decisions == expected.decisions
    assert (graph.flops_before, graph.flops_after) == (expected.flops_before, expected.flops_after)


def test_reset_empties_the_report() -> None:
    model = Net()
    step(torch.compile(model, backend="ardd", options=EAGER), model, torch.randn(4, 16))
    assert ardd.report().graphs
    torch._dynamo.reset()
    assert ardd.report().graphs == ()


def test_json() -> None:
    model = Net()
    step(torch.compile(model, backend="ardd", options=EAGER), model, torch.randn(4, 16))
    for report in (ardd.report(), ardd.explain(model, torch.randn(4, 16))):
        text = json.dumps(report.to_dict(), allow_nan=False)
        (graph,) = json.loads(text)["graphs"]
        assert ardd.GraphReport.from_dict(graph) == report.graphs[0]


def test_one_line_for_each_graph_with_dropout(caplog: pytest.LogCaptureFixture) -> None:
    """On the logger of the package, once however often the graph runs, and none for eval."""
    model = Net()
    compiled = torch.compile(model, backend="ardd", options=EAGER)
    with caplog.at_level(logging.INFO, logger="ardd"):
        for _ in range(2):
            step(compiled, model, torch.randn(4, 16))
        model.eval()
        compiled(torch.randn(4, 16))
    lines = [r for r in caplog.records if r.name.split(".")[0] == "ardd"]
    assert [(r.levelname, r.name) for r in lines] == [("INFO", "ardd")]
    assert lines[0].getMessage().startswith("2 of 2 dropouts structured, product FLOPs -")


def test_every_dropout_of_a_model_has_a_row() -> None:
    """Whatever becomes of it: one row each, in program order, numbered from 0."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 32)
            self.b = nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            h = F.dropout(self.a(x), 0.5)
            h = F.alpha_dropout(h, 0.25, training=True)
            h = F.dropout(h, 1e-30)
            h = self.b(h)
            q = h.unsqueeze(1)
            h = F.scaled_dot_product_attention(q, q, q, dropout_p=0.1).squeeze(1)
            h = F.linear(h, F.dropout(self.b.weight.t(), 0.5))
            return F.dropout(h, 1.0) + h

    report = ardd.explain(Mixed(), torch.randn(4, 16), options=BLOCK)
    assert [d.site for d in report.decisions] == list(range(6))
    assert [(d.p, d.reason) for d in report.decisions[1:]] == [
        (0.25, Reason.ALPHA_DROPOUT),
        (1e-30, Reason.P_ROUNDS_TO_ZERO),
        (0.1, Reason.NO_PRODUCT),
        (0.5, Reason.SHAPE),
        (1.0, Reason.P_IS_ONE),
    ]
    assert all(d.source.startswith("test_explain.py:") for d in report.decisions)
