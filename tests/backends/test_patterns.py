"""Patterns beside blocks: exact given the mask, with the keep rates that they promise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.replay import check_exact
from tests.test_exactness import DYNAMIC, MODELS
from tests.test_statistics import DRAWS, WIDTH, bound, masks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

import ardd
from ardd.backends.compilation import Compilation
from ardd.passes.structure_dropout import StructureDropout, StructureResult

# One group, as in the paper: plans differ in their shapes, and some keep everything.
PLANS: dict[str, Any] = {"pattern": "row", "plans": 4, "row_groups": 1, "search": "maxent"}
NAMES = ("mlp", "block", "convolutions", "channels last", "mixer", "checkpoint")
PATTERNS = ("window", "row")


CASES = [(name, pattern) for name in NAMES for pattern in PATTERNS]


@pytest.mark.parametrize(("name", "pattern"), [*CASES, ("language model", "window")])
def test_model(name: str, pattern: str) -> None:
    module, inputs = MODELS[name]()
    options = {"pattern": pattern, "rate_tolerance": 0.1}
    decisions = check_exact(module.double(), inputs, options=options)
    taken = [decision for decision in decisions if decision.taken]
    assert taken
    assert {decision.pattern for decision in taken} == {pattern}


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["mlp", "block", "convolutions"])
def test_model_through_inductor(name: str, pattern: str) -> None:
    module, inputs = MODELS[name]()
    options = {"pattern": pattern, "target": "inductor"}
    with torch._inductor.config.patch(fallback_random=True):
        check_exact(module.double(), inputs, options=options)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "name",
    ["mlp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("block", "convolutions"))],
)
def test_dynamic_shapes(name: str, pattern: str) -> None:
    """One graph serves every batch."""
    module = DYNAMIC[name](4)[0].double()
    options: dict[str, Any] = {"pattern": pattern, "target": "eager", "strict": True}
    compiled = torch.compile(module, backend="ardd", dynamic=True, options=options)
    for number, size in enumerate((4, 7, 3)):
        check_exact(module, DYNAMIC[name](size)[1], seed=number, compiled=compiled)
    assert len(ardd.report().graphs) == 1


@pytest.mark.parametrize("pattern", PATTERNS)
def test_without_gradients(pattern: str) -> None:
    module, inputs = MODELS["mlp"]()
    with torch.no_grad():
        decisions = check_exact(module.double(), inputs, options={"pattern": pattern})
    assert all(decision.taken for decision in decisions)


def test_window_rates_and_means() -> None:
    """Of 32 features 20 neighbours on the ring are kept: P(i) = 20/32 and E[mask] = 1."""
    seen = masks(lambda x: F.dropout(x, 0.375), pattern="window", block_size=1)
    (decision,) = ardd.report().decisions
    assert (decision.pattern, decision.p_used) == ("window", 0.375)
    kept = (seen > 0).double()
    assert (kept.sum(1) == 20).all()
    assert ((kept - kept.roll(1, 1)).abs().sum(1) == 2).all()
    assert (kept.mean(0) - 0.625).abs().max() < bound(0.625)
    assert (seen.mean(0) - 1).abs().max() < bound(0.625) / 0.625
    together = kept.T @ kept / DRAWS
    for distance in range(1, WIDTH // 2):
        wanted = max(0, 20 - distance) / 32 + max(0, distance - 12) / 32  # the way round as well
        pairs = torch.stack([together[i, (i + distance) % WIDTH] for i in range(WIDTH)])
        assert (pairs - wanted).abs().max() < 5 * math.sqrt(0.25 / DRAWS)


# ---- plans of rows -----------------------------------------------------------------------


def wide(p: float = 0.3) -> nn.Sequential:
    """An MLP of two dropouts whose plans keep 24, 12, 8 or 6 of 24 features."""
    return nn.Sequential(
        nn.Linear(16, 24), nn.GELU(), nn.Dropout(p), nn.Linear(24, 24), nn.ReLU(), nn.Dropout(p),
        nn.Linear(24, 8),
    ).double()  # fmt: skip


def compiled_wide(**options: object) -> tuple[nn.Sequential, Callable[..., Any]]:
    module = wide()
    given: dict[str, Any] = PLANS | {"target": "eager", "strict": True, "rate_tolerance": 0.2}
    return module, torch.compile(module, backend="ardd", options=given | options)


def plan_of(draws: list[ardd.Draw]) -> tuple[int, ...]:
    """Returns how many features of either dropout stay: what tells plans apart."""
    kept = {draw.site: len(draw.kept) for draw in draws}
    return tuple(kept.get(site, 24) for site in (0, 1))


@pytest.fixture
def compiled_plans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The plan of every graph that was rewritten, in order; all know the same parameters."""
    seen: list[int] = []
    rewrite = Compilation.rewrite
    parameters: list[list[int]] = []

    def note(self: Compilation, graph: torch.fx.Graph) -> None:
        seen.append(self.plan)
        parameters.append(sorted(self.parameters))
        assert parameters[-1] == parameters[0]
        rewrite(self, graph)

    monkeypatch.setattr(Compilation, "rewrite", note)
    return seen


@pytest.mark.parametrize("target", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_every_plan_is_exact(target: str, compiled_plans: list[int]) -> None:
    """Those that are compiled later too, and those that keep everything of a dropout."""
    module, compiled = compiled_wide(target=target)
    x = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)
    plans = set()
    for seed in range(12):
        check_exact(module, [x], seed=seed, compiled=compiled)
        with ardd.record_masks() as draws:
            compiled(x)
        plans.add(plan_of(draws))
    assert len(plans) >= 3
    assert any(24 in plan for plan in plans)
    assert len(compiled_plans) == len(set(compiled_plans)) == len(plans)
    assert len(ardd.report().graphs) == 1
    assert all("in 4 plans" in decision.detail for decision in ardd.report().decisions)


@pytest.mark.parametrize("name", ["block", "convolutions", "checkpoint"])
def test_every_plan_of_a_model_is_exact(name: str, compiled_plans: list[int]) -> None:
    """With buffers that change, inputs that are no floats, and regions that are computed again."""
    module, inputs = MODELS[name]()
    module = module.double()
    options = PLANS | {"target": "eager", "strict": True, "rate_tolerance": 0.2}
    compiled = torch.compile(module, backend="ardd", options=options)
    for seed in range(6):
        decisions = check_exact(module, inputs, seed=seed, compiled=compiled)
        assert {decision.pattern for decision in decisions} == {"row"}
    assert len(set(compiled_plans)) >= 3


def test_plans_are_compiled_when_they_are_drawn(compiled_plans: list[int]) -> None:
    _, compiled = compiled_wide(plans=8)
    x = torch.randn(6, 16, dtype=torch.float64)
    assert compiled_plans == []
    counts = []
    for _ in range(20):
        compiled(x)
        counts.append(len(compiled_plans))
    assert counts[0] <= 2  # plan 0, and the one that was drawn
    assert counts[-1] > 2
    assert compiled_plans[0] == 0
    assert len(set(compiled_plans)) == len(compiled_plans)


def test_symbolic_sizes_compile_all_plans_at_once(compiled_plans: list[int]) -> None:
    """Whatever one of them asks about the sizes is then guarded."""
    module = wide()
    options = PLANS | {"target": "eager", "strict": True, "rate_tolerance": 0.2}
    compiled = torch.compile(module, backend="ardd", dynamic=True, options=options)
    for number, size in enumerate((4, 7, 3, 16, 5)):
        x = torch.randn(size, 16, dtype=torch.float64, requires_grad=True)
        check_exact(module, [x], seed=number, compiled=compiled)
        if number == 0:
            assert len(compiled_plans) >= 3
            after_one = list(compiled_plans)
    assert compiled_plans == after_one
    assert len(ardd.report().graphs) == 1


def test_equal_plans_are_one_graph(compiled_plans: list[int]) -> None:
    """At 1/2 the narrow distribution is period 2 alone: nothing to choose from."""
    module = wide(0.5)
    options: dict[str, Any] = {"pattern": "row", "plans": 4, "target": "eager", "strict": True}
    compiled = torch.compile(module, backend="ardd", options=options)
    x = torch.randn(6, 16, dtype=torch.float64)
    state = torch.get_rng_state()
    with ardd.record_masks() as draws:
        compiled(x)
    assert [len(draw.kept) * 2 == draw.n_blocks for draw in draws] == [True, True]
    assert compiled_plans == [0]
    assert not torch.equal(torch.get_rng_state(), state)


def test_marginals_of_plans() -> None:
    """Over 10,000 steps each period is as frequent as searched for, within the distance told."""

    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(24))

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(F.linear(x, self.weight), 0.5)

    options = PLANS | {"plans": 8, "target": "eager", "max_period": 4, "block_size": 1}
    compiled = torch.compile(Probe(), backend="ardd", options=options)
    x = torch.ones(1, 24)
    with torch.no_grad():
        seen = torch.cat([compiled(x) for _ in range(DRAWS)]).double()
    (decision,) = ardd.report().decisions
    told = float(decision.detail.split("; ")[1].split()[0])
    wanted = ardd.search_distribution(0.5, 4).probabilities
    kept = (seen > 0).sum(1)
    shares = [float((kept == 24 // period).double().mean()) for period in range(1, 5)]
    assert sum(shares) == pytest.approx(1)
    away = sum(abs(a - b) for a, b in zip(shares, wanted, strict=True)) / 2
    assert 0 < told < 0.2
    assert abs(away - told) < 4 * bound(0.25)
    keep = (seen > 0).double().mean(0)
    assert decision.p_used is not None
    # Units of one step go together: the bound is that of steps.
    assert (keep - (1 - decision.p_used)).abs().max() < bound(0.5)
    deviation = seen.std(0) / math.sqrt(DRAWS)
    assert ((seen.mean(0) - 1).abs() < 5 * deviation).all()


def test_a_resumed_run_repeats_its_plans_and_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever had to be compiled on the way, and whatever numbers that draws."""
    apply = StructureDropout.apply

    def drawing(self: StructureDropout, graph: torch.fx.Graph) -> StructureResult:
        with _disable_current_modes():
            torch.rand(3)
        return apply(self, graph)

    monkeypatch.setattr(StructureDropout, "apply", drawing)

    def steps(compiled: Callable[..., Any], count: int) -> list[Any]:
        found = []
        for _ in range(count):
            with ardd.record_masks() as draws:
                compiled(x)
            found.append([(draw.site, draw.kept.tolist()) for draw in draws])
        return found

    x = torch.randn(6, 16, dtype=torch.float64)
    _, compiled = compiled_wide()
    compiled(x)
    torch.manual_seed(5)
    first = steps(compiled, 4)
    state = torch.get_rng_state()
    rest = steps(compiled, 12)
    torch.set_rng_state(state)
    assert steps(compiled, 12) == rest
    torch._dynamo.reset()
    _, again = compiled_wide()
    torch.manual_seed(5)
    assert steps(again, 16) == first + rest


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_the_same_plan_again(reentrant: bool) -> None:
    module, compiled = compiled_wide()
    x = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)

    def again(x: Tensor) -> Tensor:
        y: Tensor = checkpoint(compiled, x, use_reentrant=reentrant)
        return y * torch.rand(())  # the generator goes on after forward

    plans = set()
    for seed in range(8):
        torch.manual_seed(seed)
        with ardd.record_masks() as draws:
            y = again(x)
            (y.sum()).backward()
        got = {name: p.grad for name, p in module.named_parameters()}
        got["x"], x.grad = x.grad, None
        module.zero_grad()
        half = len(draws) // 2
        assert plan_of(draws[:half]) == plan_of(draws[half:])
        plans.add(plan_of(draws[:half]))
        torch.manual_seed(seed)
        (compiled(x) * torch.rand(())).sum().backward()
        for name, parameter in [*module.named_parameters(), ("x", x)]:
            torch.testing.assert_close(got[name], parameter.grad)
        module.zero_grad()
        x.grad = None
    assert len(plans) >= 3


def fail_later(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = StructureDropout.apply

    def failing(self: StructureDropout, graph: torch.fx.Graph) -> StructureResult:
        if self.plan:
            raise RuntimeError("later")
        return apply(self, graph)

    monkeypatch.setattr(StructureDropout, "apply", failing)


def many_steps(compiled: Callable[..., Any], x: Tensor) -> None:
    """Runs so many steps that all of four plans are drawn, but for one run in a thousand."""
    for _ in range(30):
        compiled(x).sum().backward()


def test_a_plan_that_fails_later_runs_the_original_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once with a warning and an entry in the report; plan 0 goes on."""
    fail_later(monkeypatch)
    _, compiled = compiled_wide(strict=False)
    x = torch.randn(6, 16, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="structure-dropout.*RuntimeError: later") as caught:
        many_steps(compiled, x)
    failures = [graph for graph in ardd.report().graphs if graph.failure]
    assert 1 <= len(failures) == len(caught) <= 3
    assert len(ardd.report().graphs) == 1 + len(failures)
    assert ardd.report().graphs[0].failure is None


def test_a_plan_that_fails_later_raises_if_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_later(monkeypatch)
    _, compiled = compiled_wide()
    x = torch.randn(6, 16, dtype=torch.float64)
    with pytest.raises(ardd.PassError, match="RuntimeError: later"):
        many_steps(compiled, x)


def test_a_plan_compiled_later_is_for_the_state_of_the_first(compiled_plans: list[int]) -> None:
    """Without gradients, and under autocast, as Dynamo's guards promise."""
    module, compiled = compiled_wide()
    x = torch.randn(6, 16, dtype=torch.float64)
    with torch.no_grad():
        results = [compiled(x) for _ in range(12)]
    assert not any(y.requires_grad for y in results)
    assert len(compiled_plans) >= 3
    assert all(graph.inference for graph in ardd.report().graphs)
    module.float()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [compiled(x.float()) for _ in range(12)]
    assert {y.dtype for y in outputs} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("p", "options"),
    [
        (0.9, {"max_period": 8}),  # the largest period drops 7/8
        (0.3, {"row_groups": 1}),  # one plan of one group has one period: 0 or 1/2
        (0.5, {"row_groups": 5}),  # does not divide 24, 12, 8, ...
        (0.01, {"block_size": 1}),  # 1/2 of one of few groups is too much, and nothing too little
    ],
)
def test_a_rate_that_no_plan_has_stays_random(p: float, options: dict[str, object]) -> None:
    """And the report says what was asked for."""
    given: dict[str, Any] = {"pattern": "row", "target": "eager", "strict": True, **options}
    torch.compile(wide(p), backend="ardd", options=given)(torch.randn(6, 16, dtype=torch.float64))
    for decision in ardd.report().decisions:
        assert (decision.taken, decision.reason) == (False, ardd.Reason.SHAPE)
        assert f"plans 1, row_groups {options.get('row_groups', 'auto')}" in decision.detail


def test_evaluation_draws_no_plan() -> None:
    module, compiled = compiled_wide()
    module.eval()
    x = torch.randn(6, 16, dtype=torch.float64)
    state = torch.get_rng_state()
    torch.testing.assert_close(compiled(x), module(x))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_default_rows_have_one_plan() -> None:
    """Groups of either period in every step: the rate does not vary."""
    seen = masks(lambda x: F.dropout(x, 0.3), pattern="row", block_size=1, draws=2000)
    (decision,) = ardd.report().decisions
    assert (decision.pattern, decision.p_used) == ("row", 0.3125)
    kept = (seen > 0).double()
    assert (kept.sum(1) == 22).all()
    assert (kept.mean(0) - 0.6875).abs().max() < bound(0.6875, 2000)
