"""Kept sets for groups of rows: exact for the masks drawn, and blocks for all where that cannot be.

The models are those of `tests.test_exactness`, and some where the rows matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.passes.tracing import check_values
from tests.random_modules import programs
from tests.replay import check_exact
from tests.test_exactness import ANYTHING, MODELS, Block, f, mlp, works_in_eager
from torch import Tensor, fx, nn
from torch.nn import functional as F

import ardd
from ardd.passes import structure_dropout
from ardd.passes.structure_dropout import StructureDropout, StructureResult

aten = torch.ops.aten

PRODUCTS = (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default)
Case = tuple[nn.Module, list[Any]]
GROUPED: dict[str, Any] = {"pattern": "grouped", "groups": 2}
ALL_ROLES = tuple(role.value for role in ardd.Role)


def flops(graph: fx.Graph) -> int | None:
    """Counts what the products of a graph do, None if there are others, or sizes are symbolic."""
    total = 0
    for node in graph.nodes:
        if node.target in (aten.convolution.default, aten.convolution_backward.default):
            return None
        if node.target in PRODUCTS:
            a = node.args[-2].meta["val"]
            count = 2 * node.meta["val"].numel() * a.shape[-1]
            if not isinstance(count, int):
                return None
            total += count
    return total


@pytest.fixture(autouse=True)
def checked_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks every rewritten graph: its fake values are true, and it does what the report says."""
    apply = StructureDropout.apply

    def apply_and_check(self: StructureDropout, graph: fx.Graph) -> StructureResult:
        result = apply(self, graph)
        check_values(graph)
        assert flops(graph) in (None, result.flops_after)
        return result

    monkeypatch.setattr(StructureDropout, "apply", apply_and_check)


def patterns(module: nn.Module, inputs: list[Any], **options: Any) -> list[str]:
    """Checks a module, and returns the pattern of every dropout."""
    decisions = check_exact(module.double(), inputs, options={**GROUPED, **options})
    return [decision.pattern for decision in decisions]


def layers(*dropouts: float, act: type[nn.Module] = nn.ReLU, bias: bool = True) -> nn.Sequential:
    """An MLP with a dropout after each hidden layer."""
    modules: list[nn.Module] = []
    width = 12
    for p in dropouts:
        modules += [nn.Linear(width, 32, bias=bias), act(), nn.Dropout(p)]
        width = 32
    return nn.Sequential(*modules, nn.Linear(width, 5, bias=bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.Tanh])
@pytest.mark.parametrize("rates", [(0.5,), (0.5, 0.25), (0.25, 0.5, 0.75)])
def test_mlp(rates: tuple[float, ...], act: type[nn.Module], bias: bool) -> None:
    x = f(8, 12).requires_grad_()
    found = patterns(layers(*rates, act=act, bias=bias), [x], groups=4)
    assert found == ["grouped"] * len(rates)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("groups", [2, 3, 6, 12])
def test_groups(groups: int, block: int) -> None:
    """Up to one kept set for every row."""
    with ardd.record_masks() as draws:
        assert patterns(mlp(), [f(12, 16)], groups=groups, block_size=block) == ["grouped"] * 2
    assert len(draws) == 4  # those of the run, and of the replay
    shapes = {(draw.n_blocks, *draw.kept.shape) for draw in draws}
    assert shapes == {(32 // block, groups, 16 // block)}
    assert all(len(draw.kept.unique(dim=0)) > 1 for draw in draws)


class Residual(nn.Module):
    """A normalisation over the features on either side, and a sum around."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(16), layers(0.5), nn.Linear(5, 16))
        self.before = nn.Linear(16, 12)
        self.inner[1] = nn.Sequential(self.before, layers(0.5))
        self.last = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + F.dropout(self.inner(x), 0.25))  # type: ignore[no-any-return]


class BatchNormed(nn.Module):
    """Statistics over all rows, which belong to no group, before and after the dropout."""

    def __init__(self, running: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(32, track_running_stats=running) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.norms[0](self.a(x)).relu(), 0.5)
        return self.c(F.dropout(self.norms[1](self.b(h)), 0.5).relu())  # type: ignore[no-any-return]


class Tied(nn.Module):
    """One weight and one bias, used before and after the dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(F.linear(x, self.weight, self.bias).relu(), 0.5)
        return F.linear(h, self.weight.t(), self.bias) + self.weight.sum()


class Transposed(nn.Module):
    """The rows are the last dimension of what the product gives."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(16, 12)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout((self.a @ x.t()).relu().t(), 0.5))  # type: ignore[no-any-return]


class Pooled(nn.Module):
    """Tokens are averaged, samples stay: the rows of the second dropout are those of the first."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool(F.dropout(self.a(x).relu(), 0.5))
        return self.c(F.dropout(self.b(h).relu(), 0.5))  # type: ignore[no-any-return]


class Scaled(nn.Module):
    """Operands of every kind of broadcasting, with and without rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 32), nn.Linear(32, 4)
        self.gain, self.place = nn.Parameter(torch.randn(32)), nn.Parameter(torch.randn(6, 32))
        self.number = nn.Parameter(torch.randn(()))
        self.one = nn.Parameter(torch.randn(1, 1, 32))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * self.gain + self.place + self.one * x.mean((1, 2), keepdim=True)
        h = torch.cat([h[:, :3] * self.number, h[:, 3:]], 1)
        return self.b(F.dropout(h, 0.5)).sum(1)  # type: ignore[no-any-return]


class Einsum(nn.Module):
    """A product that is a batch of one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(12, 32)), nn.Parameter(torch.randn(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(torch.einsum("btc,cd->btd", x, self.a).relu(), 0.5)
        return torch.einsum("btc,cd->btd", h, self.b)


class LowRank(nn.Module):
    """The weight is itself a product, of which every group reads other columns."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(32, 3)), nn.Parameter(torch.randn(3, 12))
        self.out = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.dropout(F.linear(x, self.u @ self.v).relu(), 0.5))  # type: ignore[no-any-return]


class Graph(nn.Module):
    """A product that mixes the rows: no group can be computed by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor, neighbours: Tensor) -> Tensor:
        return self.b(neighbours @ F.dropout(self.a(x), 0.5))  # type: ignore[no-any-return]


class WithItself(nn.Module):
    """Rows against rows: one dimension of the product is rows, and so is the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.a(x), 0.5)
        return h @ h.t()


def pooled(pool: Callable[[Tensor], Tensor]) -> Case:
    return Pooled(pool), [f(4, 3, 12)]


CASES: dict[str, Callable[[], Case]] = {
    "three dimensions": lambda: (layers(0.5, 0.25), [f(4, 3, 12).requires_grad_()]),
    "many leading dimensions": lambda: (layers(0.5), [f(2, 1, 3, 2, 12)]),
    "transformer block": lambda: (Block(), [f(4, 6, 32).requires_grad_()]),
    "residual": lambda: (Residual(), [f(4, 16).requires_grad_()]),
    "batch norm": lambda: (BatchNormed(running=True), [f(8, 12)]),
    "batch norm without statistics": lambda: (BatchNormed(running=False), [f(8, 12)]),
    "tied": lambda: (Tied(), [f(4, 16).requires_grad_()]),
    "transposed": lambda: (Transposed(), [f(4, 12).requires_grad_()]),
    "mean of tokens": lambda: pooled(lambda h: h.mean(1)),
    "maximum of tokens": lambda: pooled(lambda h: h.amax(1)),
    "first token": lambda: pooled(lambda h: h[:, 0]),
    "sum of tokens": lambda: pooled(lambda h: h.unsqueeze(1).squeeze(1).sum(1)),
    "broadcast": lambda: (Scaled(), [f(4, 6, 12).requires_grad_()]),
    "einsum": lambda: (Einsum(), [f(4, 3, 12)]),
    "low rank": lambda: (LowRank(), [f(4, 12)]),
    "mixes rows": lambda: (Graph(), [f(4, 12), f(4, 4)]),
    "rows with rows": lambda: (WithItself(), [f(4, 12)]),
    "mean of all": lambda: (nn.Sequential(layers(0.5), Mean()), [f(4, 12)]),
}


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean()


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    assert set(patterns(*CASES[name]())) == {"grouped"}


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    patterns(*MODELS[name]())


@settings(max_examples=30, suppress_health_check=ANYTHING)
@given(programs(), st.integers(2, 4))
def test_random_programs(case: tuple[nn.Module, Tensor], groups: int) -> None:
    module, x = case
    assume(works_in_eager(module, x))
    torch._dynamo.reset()
    patterns(module, [x.detach().requires_grad_(x.requires_grad)], groups=groups)


@pytest.mark.parametrize("name", ["mlp", "block", "mixer"])
def test_without_gradients(name: str) -> None:
    module, inputs = MODELS[name]()
    with torch.no_grad():
        assert set(patterns(module, inputs)) == {"grouped"}
    assert ardd.report().graphs[-1].inference


@pytest.mark.parametrize("fuel", [0, 1, 2])
def test_neighbours_that_stay_random(fuel: int) -> None:
    """A grouped dropout beside ordinary ones."""
    found = patterns(layers(0.5, 0.5), [f(8, 12)], max_rewrites=fuel)
    assert sorted(found) == ["grouped"] * fuel + ["random"] * (2 - fuel)


def test_a_random_mask_does_not_want_whole_what_it_is_as_long_as() -> None:
    """Of two dropouts in a row the first stays random; the product before both is cut."""
    twice = [nn.Linear(12, 16), nn.Dropout(0.25), nn.Dropout(0.75), nn.Linear(16, 4)]
    assert patterns(nn.Sequential(*twice), [f(4, 12)]) == ["random", "grouped"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, "mlp", "checkpoint", "mixer", "input is a slice"])
def test_through_inductor(name: str) -> None:
    module, inputs = CASES[name]() if name in CASES else MODELS[name]()
    with torch._inductor.config.patch(fallback_random=True):
        patterns(module, inputs, target="inductor")


def test_single_precision() -> None:
    module, x = layers(0.5, 0.25), torch.randn(8, 12)
    decisions = check_exact(module, [x], options=GROUPED)
    assert [decision.pattern for decision in decisions] == ["grouped"] * 2


def test_mixed_precision() -> None:
    """Under autocast the weights are converted first, and the groups read what was converted."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layers(0.5, 0.5)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x).float()  # type: ignore[no-any-return]

    decisions = check_exact(Cast(), [torch.randn(8, 12)], options=GROUPED, rtol=0.05)
    assert [decision.pattern for decision in decisions] == ["grouped"] * 2


class Tokens(nn.Module):
    """Four tokens for every sample, as rows of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = layers(0.5, 0.25)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(0, 1)).view(-1, 4, 5)  # type: ignore[no-any-return]


class Even(nn.Module):
    """A batch that is known to be even."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Pooled(lambda h: h.sum(1))

    def forward(self, x: Tensor) -> Tensor:
        torch._check(x.shape[0] % 2 == 0)
        return self.inner(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("target", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "batches"), [(Tokens, (3, 5, 8)), (Even, (4, 6, 10))])
def test_the_batch_is_dynamic_and_its_divisor_known(
    kind: type[nn.Module], batches: tuple[int, ...], target: str
) -> None:
    """One graph, in which two groups divide any batch."""
    module = kind().double()
    options = {"target": target, "strict": True, **GROUPED}
    compiled = torch.compile(module, backend="ardd", options=options)
    for seed, batch in enumerate(batches):
        x = f(batch, 4, 12).requires_grad_()
        torch._dynamo.mark_dynamic(x, 0)
        decisions = check_exact(module, [x], seed=seed, compiled=compiled)
        assert [decision.pattern for decision in decisions] == ["grouped"] * 2
    assert len(ardd.report().graphs) == 1


def one_group(module: nn.Module, *inputs: Tensor, **options: Any) -> str:
    """Checks that all rows have one kept set, and returns why."""
    (decision,) = check_exact(module.double(), list(inputs), options={**GROUPED, **options})
    assert (decision.taken, decision.pattern) == (True, "block")
    _, _, why = decision.detail.rpartition("; one group: ")
    return why


def test_a_batch_that_cannot_be_divided() -> None:
    """7 rows: one kept set for all."""
    assert one_group(layers(0.5), f(7, 12), groups=6) == "6 groups do not divide its rows"


def test_fewer_groups_where_so_many_do_not_divide() -> None:
    """Of 6 rows 4 groups cannot be made, but 3 can."""
    with ardd.record_masks() as draws:
        (decision,) = check_exact(layers(0.5).double(), [f(6, 12)], options={"pattern": "grouped"})
    assert len(draws[0].kept) == 3
    assert decision.detail.endswith("; 3 groups of rows")


@pytest.mark.parametrize("target", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_batch_that_is_dynamic(target: str) -> None:
    """One graph for all batches that two groups divide, and one for all others."""
    module = layers(0.5).double()
    options = {"target": target, "strict": True, **GROUPED}
    compiled = torch.compile(module, backend="ardd", dynamic=True, options=options)
    found = []
    for seed, batch in enumerate((8, 6, 12, 7, 9)):
        (decision,) = check_exact(module, [f(batch, 12)], seed=seed, compiled=compiled)
        found.append((decision.pattern, len(ardd.report().graphs)))
    assert found == [("grouped", 1)] * 3 + [("block", 2)] * 2
    assert decision.detail.endswith("; one group: 2 groups do not divide its rows")


@pytest.mark.parametrize(
    ("groups", "batch", "taken"), [(4, 8, 4), (4, 4, 2), (2, 2, 1), (3, 3, 1), (3, 6, 3)]
)
def test_a_dynamic_batch_of_as_many_rows_as_groups(groups: int, batch: int, taken: int) -> None:
    """A group of one row would fix the batch, which was promised to be dynamic."""
    options: dict[str, Any] = {
        "target": "eager",
        "pattern": "grouped",
        "groups": groups,
        "strict": True,
    }
    module = layers(0.5).double()
    compiled = torch.compile(module, backend="ardd", options=options)
    for seed, rows in enumerate((batch, 4 * batch)):
        x = f(rows, 12).requires_grad_()
        torch._dynamo.mark_dynamic(x, 0)
        (decision,) = check_exact(module, [x], seed=seed, compiled=compiled)
        assert decision.pattern == ("grouped" if taken > 1 else "block")
        if taken > 1:
            assert decision.detail.endswith(f"; {taken} groups of rows")
        else:
            assert decision.detail.endswith("one row would fix the size of a dynamic batch")
    assert len(ardd.report().graphs) == 1


def test_rows_of_two_dynamic_dimensions() -> None:
    """Rows of samples and tokens, both dynamic: a group of them is no group of either."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 32), nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.cat([x, x.cos()], 1)  # an even number of tokens
            h = F.dropout(self.a(h.flatten(0, 1)), 0.5)
            return self.b(h.view(x.shape[0], -1, 32).relu())  # type: ignore[no-any-return]

    module = Flat().double()
    options = {"target": "eager", "strict": True, **GROUPED}
    compiled = torch.compile(module, backend="ardd", dynamic=True, options=options)
    for seed, (batch, tokens) in enumerate(((3, 4), (5, 6), (4, 9))):
        (decision,) = check_exact(module, [f(batch, tokens, 12)], seed=seed, compiled=compiled)
        assert decision.pattern == "grouped"
    assert len(ardd.report().graphs) == 1


def test_one_row() -> None:
    assert one_group(layers(0.5), f(1, 12)) == "it has one row, or one mask for all"


def test_a_vector() -> None:
    assert one_group(layers(0.5), f(12)) == "it has no rows beside its features"


def test_a_convolution() -> None:
    """It has no form for groups."""
    module = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Dropout2d(0.5), nn.Conv2d(16, 4, 1))
    why = one_group(module, f(4, 3, 5, 5))
    assert why == "no product around it can be computed group by group"


def test_features_before_rows() -> None:
    """The first dimension of the mask is what is dropped: there are no rows to group."""

    class Left(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(f(8, 16))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight @ F.dropout(x, 0.5)

    why = one_group(Left(), f(16, 6))
    assert why == "no product around it can be computed group by group"


def test_one_group_is_a_block() -> None:
    assert one_group(layers(0.5), f(8, 12), groups=1) == "1 group was asked for"


def test_masks_repeat_with_the_seed_and_differ_between_calls() -> None:
    module = mlp().double()
    options = {"target": "eager", "strict": True, **GROUPED}
    compiled = torch.compile(module, backend="ardd", options=options)
    x = f(8, 16)
    torch.manual_seed(3)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(3)
    assert torch.equal(first, compiled(x))
    assert not torch.allclose(first, second)


# ---- the pattern "auto" ------------------------------------------------------------------


class Flops:
    """Prices products alone, those of groups times a factor."""

    name, version = "grouped-flops", "1"

    def __init__(self, batched: float) -> None:
        self.batched = batched

    def seconds(self, op: ardd.OpCost, device: torch.device) -> float:
        factor = self.batched if op.name == "aten.bmm.default" else 1.0
        return op.hint(op.flops) * factor if op.kind == "product" else 0.0


ardd.register_cost_model("grouped-flops", lambda: Flops(1.0))
ardd.register_cost_model("grouped-never", lambda: Flops(1e6))


def automatic(module: nn.Module, inputs: list[Any], **options: Any) -> list[ardd.Decision]:
    options = {"pattern": "auto", "cost_model": "grouped-flops", **options}
    return list(check_exact(module.double(), inputs, options=options))


def shown(decisions: list[ardd.Decision]) -> list[tuple[str, str]]:
    return [(d.pattern, d.detail.rpartition("; ")[2]) for d in decisions]


def test_auto_has_groups_above_a_rate_of_a_half() -> None:
    """Up to it one kept set is enough, for a dropout beside one with groups too."""
    found = automatic(layers(0.5, 0.75, 0.625), [f(8, 12).requires_grad_()])
    assert [d.pattern for d in found] == ["block", "grouped", "grouped"]
    assert [d.detail.endswith("; 2 groups of rows") for d in found] == [False, True, True]


@pytest.mark.parametrize(("groups", "pattern"), [(1, "block"), (4, "grouped")])
def test_auto_takes_the_groups_asked_for(groups: int, pattern: str) -> None:
    with ardd.record_masks() as draws:
        (decision,) = automatic(layers(0.75), [f(8, 12)], groups=groups)
    assert decision.pattern == pattern
    assert draws[0].kept.shape == ((4, 8) if groups == 4 else (8,))


def test_auto_without_rows_to_split() -> None:
    assert shown(automatic(layers(0.75), [f(7, 12)])) == [
        ("block", "one group: 2 groups do not divide its rows")
    ]


def test_auto_without_groups_where_they_do_not_pay() -> None:
    """One kept set for all still does."""
    found = automatic(layers(0.75, 0.25), [f(8, 12)], cost_model="grouped-never")
    assert [d.pattern for d in found] == ["block", "block"]
    why = "; one group: with groups not every dropout pays"
    assert [d.detail.endswith(why) for d in found] == [True, False]


def test_random_weights_leave_the_groups_to_others() -> None:
    """The rows of a weight's mask are features of what it makes, and no samples."""

    class DropBoth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(f(4, 32))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.dropout(x, 0.75), F.dropout(self.weight, 0.7))

    found = check_exact(DropBoth().double(), [f(8, 32)], options={"pattern": "grouped"})
    assert [(d.pattern, d.taken) for d in found] == [("grouped", True), ("random", False)]


def test_auto_in_a_budget_that_groups_do_not_meet() -> None:
    """The gathers of groups cost too much for one of the dropouts, and it would have to help."""
    wide = nn.Sequential(layers(0.75, 0.75)[:5], nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.75))
    options: dict[str, Any] = {"flops_budget": 0.5, "structure": ("hidden", "output")}
    whole = automatic(wide, [f(8, 12)], cost_model="grouped-never", **options)
    assert {d.pattern for d in whole} == {"block"}
    assert all("; one group: " in d.detail for d in whole)


@pytest.mark.parametrize("fuel", [0, 1, 2])
def test_auto_with_little_fuel(fuel: int) -> None:
    """What is rewritten is rewritten as with all fuel: a wrong result can be bisected."""
    found = automatic(layers(0.75, 0.75), [f(8, 12)], max_rewrites=fuel)
    assert sorted(d.pattern for d in found) == ["grouped"] * fuel + ["random"] * (2 - fuel)


def graphs_of(module: nn.Module, batches: tuple[int, ...], **marks: int) -> list[tuple[str, int]]:
    """Returns the first pattern and the graphs there are, after each batch."""
    options: dict[str, Any] = {"target": "eager", "strict": True, "cost_model": "grouped-flops"}
    compiled = torch.compile(module, backend="ardd", options=options)
    found = []
    for batch in batches:
        x = torch.randn(batch, 12)
        torch._dynamo.mark_dynamic(x, 0, **marks)
        compiled(x)
        report = ardd.report()
        found.append((report.decisions[-1].pattern, len(report.graphs)))
    return found


def test_auto_guards_the_batch_where_it_has_groups_alone() -> None:
    assert graphs_of(layers(0.75), (8, 6, 7, 9)) == [("grouped", 1)] * 2 + [("block", 2)] * 2
    torch.compiler.reset()
    assert graphs_of(layers(0.5), (8, 6, 7, 9)) == [("block", 1)] * 4


def test_a_range_of_batches_that_one_graph_is_promised_to_run() -> None:
    """A guard on what divides it would break the promise."""
    assert graphs_of(layers(0.75), (8, 7), min=2, max=64) == [("block", 1)] * 2


@pytest.mark.parametrize("name", CASES)
def test_auto_is_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure_dropout, "HIGH_RATE", 0.0)
    decisions = automatic(*CASES[name](), structure=ALL_ROLES)
    assert {decision.pattern for decision in decisions} == {"grouped"}
