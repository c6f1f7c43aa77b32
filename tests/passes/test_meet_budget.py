"""Rates rise until the products fit a budget: never further, never above the bound, and exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.passes.tracing import mask, site, trace
from tests.random_modules import programs
from tests.replay import check_exact
from torch import Tensor, nn

import ardd
from ardd.core.decisions import Decision, Reason
from ardd.core.options import Options
from ardd.core.report import GraphReport
from ardd.passes.structure_dropout import StructureDropout, StructureResult

BUDGETS = [1.0, 0.9, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4]


def f(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def two(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """Two dropouts, of 32 and of 64 features, both between products."""
    h = x @ w
    h = h * mask(h, 0.125, 0)
    y = h @ v
    return (y * mask(y, 0.25, 1)) @ v.t()


TWO = (torch.randn(8, 16), torch.randn(16, 32), torch.randn(32, 64))


def plan(
    fn: Callable[..., Any] = two, inputs: tuple[Tensor, ...] = TWO, **options: Any
) -> StructureResult:
    gm = trace(fn, *inputs)
    given: dict[str, Any] = {"pattern": "block", "block_size": 1} | options
    return StructureDropout(Options(**given), (site(0, 0.125), site(1, 0.25))).apply(gm.graph)


def rates(result: StructureResult) -> list[float]:
    return [decision.p_used or 0.0 for decision in result.decisions]


def smallest(**options: Any) -> int:
    with pytest.raises(ardd.BudgetError) as caught:
        plan(flops_budget=0, **options)
    return caught.value.smallest


def test_budgets_are_met_and_rates_are_monotone() -> None:
    """A smaller budget never lowers a rate, and each is met."""
    before = [0.0, 0.0]
    met = 0
    for budget in BUDGETS:
        result = plan(flops_budget=budget, max_rate=0.75)
        assert result.flops_budget == int(budget * result.flops_before)
        assert result.flops_after <= result.flops_budget
        after = rates(result)
        assert all(new >= old for old, new in zip(before, after, strict=True))
        met += after > before
        before = after
    assert met > 5


def test_no_step_too_many() -> None:
    """One block more in the dropout raised last, and the budget would not be met."""
    result = plan(flops_budget=0.6)
    tighter = plan(flops_budget=result.flops_after - 1)
    looser = plan(flops_budget=result.flops_after)
    assert rates(looser) == rates(result)
    assert sum(n * (b - a) for n, a, b in _pairs(result, tighter)) == 1
    assert tighter.flops_after < result.flops_after


def _pairs(one: StructureResult, other: StructureResult) -> list[tuple[int, float, float]]:
    sizes = [int(decision.shape[1]) for decision in one.decisions]
    return list(zip(sizes, rates(one), rates(other), strict=True))


def test_a_budget_that_is_met_changes_nothing() -> None:
    """Neither a rate nor a word of a decision nor the graph."""
    free = plan()
    graphs = []
    for options in ({}, {"flops_budget": 1.0}, {"flops_budget": free.flops_after}):
        gm = trace(two, *TWO)
        wanted = Options(pattern="block", block_size=1, **options)
        result = StructureDropout(wanted, (site(0, 0.125), site(1, 0.25))).apply(gm.graph)
        assert result.decisions == free.decisions
        graphs.append(str(gm.graph))
    assert len(set(graphs)) == 1


def test_all_go_the_same_share_of_their_way() -> None:
    """From 0.125 and 0.25 to 0.75, up to one block of either."""
    for budget in (0.7, 0.5, 0.35):
        first, second = rates(plan(flops_budget=budget, max_rate=0.75))
        shares = (first - 0.125) / 0.625, (second - 0.25) / 0.5
        assert min(shares) > 0
        assert abs(shares[0] - shares[1]) <= 1 / 20 + 1e-9  # 20 blocks are the way of the first


def test_the_bound_holds() -> None:
    """At the bound, not above it, where the bound is no whole number of blocks either."""
    for max_rate in (0.3, 0.5, 0.51, 0.7, 0.95):
        least = smallest(max_rate=max_rate)
        result = plan(flops_budget=least, max_rate=max_rate)
        assert result.flops_after == least
        for size, rate in zip((32, 64), rates(result), strict=True):
            assert rate == int(size * max_rate + 1e-9) / size


def test_a_rate_above_the_bound_stays() -> None:
    """0.25 was asked for: a bound of 0.2 does not lower it."""
    least = smallest(max_rate=0.2)
    assert rates(plan(flops_budget=least, max_rate=0.2)) == [6 / 32, 0.25]


def test_something_always_stays() -> None:
    """The last block is never dropped, however near to 1 the bound is."""
    for max_rate in (0.999, 1 - 1e-12):
        least = smallest(max_rate=max_rate)
        assert rates(plan(flops_budget=least, max_rate=max_rate)) == [31 / 32, 63 / 64]


def test_an_impossible_budget_names_the_smallest() -> None:
    """That one can be met, and one FLOP less cannot."""
    least = smallest()
    assert plan(flops_budget=least).flops_after == least
    with pytest.raises(ardd.BudgetError, match=f"reach {least} at best") as caught:
        plan(flops_budget=least - 1)
    assert (caught.value.budget, caught.value.smallest) == (least - 1, least)
    assert "max_rate=0.5" in str(caught.value)


def test_what_stays_random_cannot_be_raised() -> None:
    """A mask on a softmax is part of no product: the budget is refused, not forgotten."""

    def attend(x: Tensor) -> Tensor:
        p = (x @ x.t()).softmax(-1)
        return p * mask(p, 0.125, 0)

    assert not plan(attend, (torch.randn(8, 8),)).decisions[0].taken
    with pytest.raises(ardd.BudgetError, match="structured dropouts, 0, reach 1024 at best"):
        plan(attend, (torch.randn(8, 8),), flops_budget=0.9)


def dropped_weight(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """DropConnect in tiles, and a dropout of features after it."""
    h = x @ (w * mask(w, 0.5, 0))
    return (h * mask(h, 0.25, 1)) @ v


def test_a_budget_is_a_fraction_of_what_tiles_left_out_too() -> None:
    """Half of the first product is gone with the tiles, and counts as what a budget saves."""
    inputs = (torch.randn(8, 32), torch.randn(32, 32), torch.randn(32, 64))
    dense = 2 * 8 * (32 * 32 + 32 * 64)
    sites = (site(0, 0.5, of_weight=True), site(1, 0.25))
    for budget, rate in ((1.0, 0.25), (0.7, 0.25), (0.5, 0.5)):
        options = Options(pattern="block", block_size=4, flops_budget=budget)
        result = StructureDropout(options, sites).apply(trace(dropped_weight, *inputs).graph)
        features, weight = result.decisions
        assert (weight.pattern, features.p_used) == ("tile", rate)
        assert result.flops_before == dense
        assert result.flops_budget == int(budget * dense)
        assert result.flops_after <= budget * dense


def test_an_impossible_budget_of_tiles_names_the_whole() -> None:
    inputs = (torch.randn(8, 32), torch.randn(32, 32))
    options = Options(pattern="block", block_size=4, flops_budget=0.4)
    gm = trace(lambda x, w: x @ (w * mask(w)), *inputs)
    with pytest.raises(ardd.BudgetError, match="graph that has 16384 without dropout"):
        StructureDropout(options, (site(0, of_weight=True),)).apply(gm.graph)


def test_a_graph_without_dropout_has_no_budget() -> None:
    gm = trace(lambda x, w, v: x @ w @ v, *TWO)
    before = str(gm.graph)
    result = StructureDropout(Options(flops_budget=1)).apply(gm.graph)
    assert result == StructureResult(modified=False)
    assert str(gm.graph) == before


def test_fuel_keeps_the_rates_of_the_whole() -> None:
    """To bisect a wrong result, the first rewrite has to be the one that was wrong."""
    whole = plan(flops_budget=0.5)
    first = plan(flops_budget=0.5, max_rewrites=1)
    assert first.decisions[0].p_used == whole.decisions[0].p_used
    assert first.decisions[1].reason is Reason.OUT_OF_FUEL


def test_decisions_say_what_was_asked_and_what_was_raised() -> None:
    first, _ = plan(flops_budget=0.5).decisions
    assert first.p == 0.125
    assert first.p_used is not None
    assert first.p_used > 0.125
    assert first.detail.endswith(", raised from 0.125 to meet flops_budget")
    assert first.reason is Reason.STRUCTURED


# ---- the whole way -----------------------------------------------------------------------


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.drop = nn.Dropout2d(0.125)
        self.second = nn.Conv2d(16, 32, 3)
        self.head = nn.Linear(32 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.drop(self.first(x).relu())).relu()
        return self.head(h.flatten(1))  # type: ignore[no-any-return]


def mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.125)),
        *(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.25)),
        nn.Linear(64, 8),
    )


def encoder() -> nn.Module:
    """A transformer block; the dropout inside of its attention is not drawn as others are."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.25, batch_first=True)
    layer.self_attn.dropout = 0.0
    return layer


MODELS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (6, 16)),
    "conv": (Conv, (2, 3, 6, 6)),
    "encoder": (encoder, (2, 5, 16)),
}


@pytest.mark.parametrize("name", MODELS)
def test_exact_at_raised_rates(name: str) -> None:
    """Forward and backward are those of the masked dense program, at the scale of the rate used."""
    make, shape = MODELS[name]
    model = make().double()
    x = f(*shape).requires_grad_()
    options: dict[str, Any] = {"pattern": "block", "max_rate": 0.75, "block_size": 1}
    free = ardd.explain(model, x, options=options)
    with pytest.raises(ardd.BudgetError) as caught:
        ardd.explain(model, x, options=options | {"flops_budget": 1})
    budget = (free.flops_after + caught.value.smallest) // 2
    decisions = check_exact(model, [x], options=options | {"flops_budget": budget})
    raised = [d for d in decisions if d.taken]
    assert raised
    assert all((d.p_used or 0) > d.p and "raised from" in d.detail for d in raised)
    (graph,) = ardd.report().graphs
    assert graph.flops_budget == budget
    assert graph.flops_after <= budget < free.flops_after


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(programs(), st.sampled_from([0.9, 0.7, 0.5]))
def test_random_programs_meet_their_budget_or_say_so(
    case: tuple[nn.Module, Tensor], budget: float
) -> None:
    """And those that meet it are exact."""
    module, x = case
    torch._dynamo.reset()
    options: dict[str, Any] = {"flops_budget": budget, "max_rate": 0.75}
    try:
        check_exact(module, [x.detach().requires_grad_(x.requires_grad)], options=options)
    except ardd.BudgetError as error:
        assert error.smallest > error.budget  # noqa: PT017
        return
    for graph in ardd.report().graphs:
        assert graph.flops_budget is None or graph.flops_after <= graph.flops_budget


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("target", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_an_impossible_budget_is_an_error(target: str, strict: bool) -> None:
    """Of its own type, not wrapped in one of torch: nothing runs above the budget."""
    options: dict[str, Any] = {
        "pattern": "block",
        "flops_budget": 1,
        "target": target,
        "strict": strict,
    }
    with pytest.raises(ardd.BudgetError, match="flops_budget allows 1 FLOPs") as caught:
        torch.compile(mlp(), backend="ardd", options=options)(torch.randn(6, 16))
    assert type(caught.value).__name__ == "BudgetError"
    assert ardd.report().graphs == ()
    with pytest.raises(ardd.BudgetError):
        ardd.explain(mlp(), torch.randn(6, 16), options=options)


def test_evaluation_has_no_budget() -> None:
    model = mlp().eval()
    options: dict[str, Any] = {"flops_budget": 1, "target": "eager"}
    with torch.no_grad():
        x = torch.randn(6, 16)
        torch.testing.assert_close(
            torch.compile(model, backend="ardd", options=options)(x), model(x)
        )
    assert ardd.report().flops_budget is None


def test_masks_without_a_backward_have_one() -> None:
    """Monte-Carlo dropout: the products of the forward alone count."""
    model = mlp()
    options: dict[str, Any] = {
        "pattern": "block",
        "block_size": 1,
        "flops_budget": 0.7,
        "target": "eager",
    }
    with torch.no_grad():
        torch.compile(model, backend="ardd", options=options)(torch.randn(6, 16))
    (graph,) = ardd.report().graphs
    assert graph.inference
    assert graph.flops_before == 2 * 6 * (16 * 32 + 32 * 64 + 64 * 8)
    assert graph.flops_after <= 0.7 * graph.flops_before


def test_the_report_shows_the_budget() -> None:
    options: dict[str, Any] = {"pattern": "block", "flops_budget": 0.6}
    report = ardd.explain(mlp(), torch.randn(6, 16), options=options)
    (graph,) = report.graphs
    assert report.flops_budget == graph.flops_budget == int(0.6 * graph.flops_before)
    assert ", budget " in str(report)
    assert report.to_dict()["totals"]["flops_budget"] == graph.flops_budget  # type: ignore[index]
    assert GraphReport.from_dict(graph.to_dict()) == graph
    assert ", budget " not in str(ardd.explain(mlp(), torch.randn(6, 16)))


def test_the_same_plan_every_time() -> None:
    """On every rank of a distributed run, and in every process, for the caches."""
    options: dict[str, Any] = {"pattern": "block", "flops_budget": 0.6}
    decisions: list[tuple[Decision, ...]] = [
        ardd.explain(mlp(), torch.randn(6, 16), options=options).decisions for _ in range(2)
    ]
    assert [d.p_used for d in decisions[0]] == [d.p_used for d in decisions[1]]
