"""A planted exception in every pass: the original program runs and says so, or strict raises."""

from __future__ import annotations

import json
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx
from torch._functorch import partitioners
from torch.nn import functional as F

import ardd
from ardd.backends import compilation, eager, inductor
from ardd.core.decisions import Reason
from ardd.passes import compact, mark_dropout, plan_patterns, price_plan, structure_dropout

from .yardstick import EAGER


class PlantedError(Exception):
    pass


def fails(*args: Any, **kwargs: Any) -> Any:
    raise PlantedError("planted\nwith a second line")


class Plant(NamedTuple):
    name: str
    module: Any
    function: str
    failing: str
    """Name of the pass that is to blame."""


PLANTS = [
    Plant("mark", mark_dropout.MarkDropout, "apply", "mark-dropout"),
    Plant("match", mark_dropout, "match_dropout_call", "mark-dropout"),
    Plant("support", structure_dropout, "Support", "structure-dropout"),
    Plant("feature_dims", structure_dropout, "feature_axes", "structure-dropout"),
    Plant("plan", structure_dropout, "plan_patterns", "structure-dropout"),
    Plant("price", price_plan, "price", "structure-dropout"),
    Plant("compact", structure_dropout, "compact", "structure-dropout"),
    Plant("half_compact", compact, "gather", "structure-dropout"),
    Plant("random", structure_dropout, "lower_random_masks", "structure-dropout"),
    Plant("check", compilation, "check_redraw", "check-redraw"),
    Plant("print", compilation, "_code", "compile"),
]

IDENTITY = torch.eye(64)


def program(x: Tensor) -> Tensor:
    """Gives its own mask away: the output is x times it, the gradient of the sum is it."""
    return F.dropout(x, 0.5) @ IDENTITY


def check_is_original(compiled: Callable[[Tensor], Tensor]) -> None:
    """Runs ordinary dropout, with the gradient of the mask that the forward had."""
    x = (torch.randn(32, 64).abs() + 1).requires_grad_()
    with ardd.record_masks() as draws:
        y = compiled(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
    assert draws == []
    assert torch.allclose(y, grad * x)
    assert set(grad.unique().tolist()) == {0.0, 2.0}
    assert grad.any(0).all(), "whole features are dropped"


def warned(run: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if w.category is RuntimeWarning]


@pytest.fixture(params=PLANTS, ids=lambda plant: plant.name)
def plant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Plant:
    planted: Plant = request.param
    monkeypatch.setattr(planted.module, planted.function, fails)
    return planted


def compiled_program(**options: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(program, backend="ardd", options=EAGER | options)


# ---- passes ------------------------------------------------------------------------------


def test_original_runs(plant: Plant) -> None:
    messages = warned(lambda: check_is_original(compiled_program(strict=False)))
    assert len(messages) == 1
    assert f"Pass '{plant.failing}' failed with PlantedError: planted." in messages[0]
    (graph,) = ardd.report().graphs
    assert graph.failure is not None
    assert "PlantedError: planted\nwith a second line" in graph.failure
    assert "Traceback" in graph.failure
    (decision,) = graph.decisions
    assert (decision.reason, decision.taken) == (Reason.PASS_FAILED, False)
    assert decision.kind == "dropout"
    assert decision.source.startswith("test_failures.py:")
    assert (graph.flops_before, graph.flops_after) == (0, 0)
    assert not graph.inference
    text = str(ardd.report())
    assert "PASS_FAILED" in text
    assert "graph 0 failed; the original program runs" in text
    json.dumps(ardd.report().to_dict(), allow_nan=False)


def test_strict_raises(plant: Plant) -> None:
    with pytest.raises(ardd.PassError) as caught:
        compiled_program(strict=True)(torch.randn(32, 64, requires_grad=True))
    assert caught.value.name == plant.failing
    assert isinstance(caught.value.cause, PlantedError)
    assert type(caught.value).__name__ == "PassError"
    assert traceback.extract_tb(caught.tb)[-1].name == "fails", "the failing line is not shown"
    assert ardd.report().graphs == ()


def test_inference_too(plant: Plant) -> None:
    with torch.no_grad():
        messages = warned(lambda: compiled_program(strict=False)(torch.randn(32, 64)))
    (graph,) = ardd.report().graphs
    assert graph.inference
    fails_here = plant.name != "check"  # there is no backward to check
    assert len(messages) == fails_here
    expected = Reason.PASS_FAILED if fails_here else Reason.STRUCTURED
    assert [d.reason for d in graph.decisions] == [expected]


def test_repaired_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure is of one compile: nothing of it is left in the next."""
    with monkeypatch.context() as patch:
        patch.setattr(structure_dropout, "compact", fails)
        warned(lambda: compiled_program(strict=False)(torch.randn(32, 64)))
    torch._dynamo.reset()
    with ardd.record_masks() as draws:
        compiled_program()(torch.randn(32, 64))
    assert len(draws) == 1
    assert ardd.report().graphs[-1].failure is None


def test_one_failing_graph_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the graph that failed runs as it was."""
    calls: list[int] = []
    stock = plan_patterns.plan_patterns

    def fail_once(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return fails() if len(calls) == 1 else stock(*args, **kwargs)

    monkeypatch.setattr(structure_dropout, "plan_patterns", fail_once)

    def two(x: Tensor) -> Tensor:
        x = program(x)
        torch._dynamo.graph_break()
        return program(x)

    compiled = torch.compile(two, backend="ardd", options=EAGER | {"strict": False})
    with ardd.record_masks() as draws:
        assert len(warned(lambda: compiled(torch.randn(32, 64)))) == 1
    assert len(draws) == 1
    reasons = [decision.reason for decision in ardd.report().decisions]
    assert reasons == [Reason.PASS_FAILED, Reason.STRUCTURED]


# ---- cost models -------------------------------------------------------------------------


class Prices:
    """A cost model that says what it is told to say."""

    name = "planted"
    version = "1"

    def __init__(self, answer: Callable[[], Any]) -> None:
        self.answer = answer

    def seconds(self, op: ardd.OpCost, device: torch.device) -> float:
        return self.answer()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        ("raises", fails, "PlantedError: planted"),
        ("nan", lambda: float("nan"), "CostModelError: .* at nan; expected finite seconds"),
        ("negative", lambda: -1.0, "CostModelError: .* at -1.0; expected finite seconds"),
        ("none", lambda: None, "CostModelError: .* at None; expected finite seconds"),
    ],
)
def test_bad_prices(name: str, answer: Callable[[], Any], message: str) -> None:
    ardd.register_cost_model(f"failures-{name}", lambda: Prices(answer))
    options = {"cost_model": f"failures-{name}"}
    with pytest.warns(RuntimeWarning, match=f"Pass 'structure-dropout' failed with {message}"):
        check_is_original(compiled_program(strict=False, **options))
    assert [d.reason for d in ardd.report().decisions] == [Reason.PASS_FAILED]
    torch._dynamo.reset()
    with pytest.raises(ardd.PassError, match=message):
        compiled_program(**options)(torch.randn(32, 64))


# ---- cutting, redraws --------------------------------------------------------------------


def test_partitioner_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    stock = partitioners.min_cut_rematerialization_partition

    def fail_once(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return fails() if len(calls) == 1 else stock(*args, **kwargs)

    monkeypatch.setattr(eager, "min_cut_rematerialization_partition", fail_once)
    messages = warned(lambda: check_is_original(compiled_program(strict=False)))
    assert len(messages) == 1
    assert "PlantedError" in str(ardd.report().graphs[0].failure)


def plant_redraw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the first partitioned backward draw a kept set again."""
    stock = partitioners.min_cut_rematerialization_partition
    calls: list[int] = []

    def redraw(*args: Any, **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        forward, backward = stock(*args, **kwargs)
        calls.append(1)
        if len(calls) == 1:
            (first, *_) = (n for n in backward.graph.nodes if n.op == "call_function")
            with backward.graph.inserting_before(first):
                draw = torch.ops.ardd.draw_blocks.default
                args = (8, 4, torch.device("cpu"), 0, 0)
                backward.graph.call_function(draw, args)
        return forward, backward

    monkeypatch.setattr(eager, "min_cut_rematerialization_partition", redraw)


def test_noise_of_a_gradient_hook_is_no_redraw() -> None:
    """A hook of the user draws in backward, what no forward drew: nothing is wrong with that."""

    def noisy(x: Tensor) -> Tensor:
        h = F.dropout(x @ x.t(), 0.5)
        h.register_hook(lambda grad: grad + torch.rand_like(grad))
        return (h @ x).sum()

    x = torch.randn(16, 16, requires_grad=True)
    torch.compile(noisy, backend="ardd", options=EAGER | {"strict": True})(x).backward()
    (graph,) = ardd.report().graphs
    assert graph.failure is None
    assert "rand" in graph.backward


def test_redraw_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_redraw(monkeypatch)
    messages = warned(lambda: check_is_original(compiled_program(strict=False)))
    assert len(messages) == 1
    assert "Pass 'check-redraw' failed with RedrawError" in messages[0]
    assert [d.reason for d in ardd.report().decisions] == [Reason.PASS_FAILED]


def test_redraw_raises_in_strict_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_redraw(monkeypatch)
    with pytest.raises(ardd.RedrawError, match="draw_blocks"):
        compiled_program(strict=True)(torch.randn(32, 64, requires_grad=True))


# ---- Inductor ----------------------------------------------------------------------------


def fail_in_inductor(monkeypatch: pytest.MonkeyPatch, backward: bool) -> None:
    """Lets the first graph of a kind fail to compile."""
    from torch._inductor import compile_fx

    stock = compile_fx.compile_fx_inner
    calls: list[int] = []

    def fail_once(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("is_backward", False) == backward:
            calls.append(1)
            if len(calls) == 1:
                fails()
        return stock(*args, **kwargs)

    def with_failure(*args: Any, **kwargs: Any) -> Any:
        kwargs["inner_compile"] = fail_once
        return compile_fx.compile_fx(*args, **kwargs)

    monkeypatch.setattr(inductor, "_compile_fx", with_failure)


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True])
def test_code_that_does_not_compile(monkeypatch: pytest.MonkeyPatch, backward: bool) -> None:
    """The backward fails while there still is a way back, not in the user's `backward()`."""
    fail_in_inductor(monkeypatch, backward)
    compiled = compiled_program(target="inductor", strict=False)
    messages = warned(lambda: check_is_original(compiled))
    assert len(messages) == 1
    assert "PlantedError" in messages[0]
    (graph,) = ardd.report().graphs
    assert "PlantedError" in str(graph.failure)
    assert [d.reason for d in graph.decisions] == [Reason.PASS_FAILED]


@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_code_that_does_not_compile_strict(monkeypatch: pytest.MonkeyPatch, backward: bool) -> None:
    fail_in_inductor(monkeypatch, backward)
    with pytest.raises(ardd.PassError, match="PlantedError"):
        compiled_program(target="inductor")(torch.randn(32, 64, requires_grad=True))


@pytest.mark.slow
def test_failing_pass_under_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed must not be in torch's cache under the name of what should have been."""
    with monkeypatch.context() as patch:
        patch.setattr(compact, "expand", fails)
        compiled = compiled_program(target="inductor", strict=False)
        assert len(warned(lambda: check_is_original(compiled))) == 1
    torch._dynamo.reset()
    compiled = compiled_program(target="inductor")
    with ardd.record_masks() as draws:
        compiled(torch.randn(32, 64, requires_grad=True))
    assert len(draws) == 1
    (graph,) = ardd.report().graphs
    assert not graph.from_cache
    assert [d.reason for d in graph.decisions] == [Reason.STRUCTURED]


def test_a_program_that_cannot_be_compiled_is_not_our_failure() -> None:
    """No warning blames a pass where the original program fails to compile as well."""

    def compile_fx(*args: Any, **kwargs: Any) -> Any:
        return fails()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inductor, "_compile_fx", compile_fx)
        compiled = compiled_program(target="inductor", strict=False)
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="PlantedError"):
            compiled(torch.randn(32, 64))  # a warning would be an error of its own
    assert ardd.report().graphs == ()


def test_dynamo_may_start_anew() -> None:
    """A float that varies makes torch trace twice: that is no failure of a pass."""

    def scaled(x: Tensor, scale: float) -> Tensor:
        return program(x) * int(scale)

    options = EAGER | {"target": "eager"}
    compiled = torch.compile(scaled, backend="ardd", dynamic=True, options=options)
    assert warned(lambda: [compiled(torch.randn(32, 64), s) for s in (2.0, 3.0)]) == []


@pytest.mark.parametrize("pattern", ["auto", "block"])
def test_data_dependent_ops_break_the_graph(pattern: str) -> None:
    """Dynamo turns such an error of a backend into a graph break, and both halves run."""
    options = {**EAGER, "pattern": pattern}

    def narrow(x: Tensor, w: Tensor, start: Tensor) -> Tensor:
        return torch.narrow(F.dropout(F.linear(x, w), 0.5), 0, start, 3) * 2

    x, w = torch.randn(6, 64), torch.randn(64, 64, requires_grad=True)
    result = torch.compile(narrow, backend="ardd", options=options)(x, w, torch.tensor(1))
    assert result.shape == (3, 64)
    assert not any(graph.failure for graph in ardd.report().graphs)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_jagged_tensors(p: float) -> None:
    """The ragged size of a batch of sequences is no number, and no failure."""
    layers = (torch.nn.Linear(16, 32), torch.nn.Dropout(p), torch.nn.Linear(32, 4))
    model = torch.nn.Sequential(*layers)
    parts = [torch.randn(rows, 16) for rows in (3, 7, 5)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    y = torch.compile(model, backend="ardd", options=EAGER)(x)
    y.values().sum().backward()
    assert y.values().shape == (15, 4)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert [d.reason for d in ardd.report().decisions] == [Reason.HAND_MASK] * (p > 0)
    if not p:
        torch.testing.assert_close(y.values(), model(torch.cat(parts)))
