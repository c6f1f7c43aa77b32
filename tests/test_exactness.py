"""For the masks that it drew, a rewritten program is the masked dense one, up to rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tests.passes.tracing import check_values
from tests.random_modules import Attention, Fn, MixTokens, Tied, programs
from tests.replay import check_exact, compare, run
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ardd
from ardd.passes import structure_dropout
from ardd.passes.facts import KeptAxis
from ardd.passes.structure_dropout import StructureDropout, StructureResult
from ardd.passes.support import Support

Case = tuple[nn.Module, list[Any]]

ANYTHING = list(HealthCheck)  # drawing builds modules, which is slow, and some are refused


@pytest.fixture(autouse=True)
def checked_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks every rewritten graph: the fake values, which all that follows believes, are true."""
    apply = StructureDropout.apply

    def apply_and_check(self: StructureDropout, graph: fx.Graph) -> StructureResult:
        result = apply(self, graph)
        check_values(graph)
        return result

    monkeypatch.setattr(StructureDropout, "apply", apply_and_check)


def works_in_eager(module: nn.Module, x: Tensor) -> bool:
    """Returns whether torch itself can run it: working in place can spoil a gradient."""
    try:
        y = copy.deepcopy(module)(x)
        if y.requires_grad:
            y.sum().backward()
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return False
    return True


@settings(max_examples=60, suppress_health_check=ANYTHING)
@given(programs())
def test_random_programs(case: tuple[nn.Module, Tensor]) -> None:
    module, x = case
    assume(works_in_eager(module, x))
    torch._dynamo.reset()
    check_exact(module, [x.detach().requires_grad_(x.requires_grad)])


@settings(max_examples=30, suppress_health_check=ANYTHING)
@given(programs(), st.randoms(use_true_random=False))
def test_random_programs_with_any_dimension_dropped(
    monkeypatch: pytest.MonkeyPatch, case: tuple[nn.Module, Tensor], random: Random
) -> None:
    """Samples, tokens and places as well as features: dropping them is no use, but as exact."""

    def any_axes(graph: fx.Graph, support: Support, parameters: Any) -> set[KeptAxis]:
        return {random.choice(list(axes.values())) for axes in support.masks.values() if axes}

    module, x = case
    assume(works_in_eager(module, x))
    torch._dynamo.reset()
    monkeypatch.setattr(structure_dropout, "feature_axes", any_axes)
    options = {"rate_tolerance": 0.5}
    check_exact(module, [x.detach().requires_grad_(x.requires_grad)], options=options)


@pytest.mark.slow
@settings(max_examples=10, suppress_health_check=ANYTHING)
@given(programs())
def test_random_programs_through_inductor(case: tuple[nn.Module, Tensor]) -> None:
    module, x = case
    assume(works_in_eager(module, x))
    torch._dynamo.reset()
    # What stays random is drawn as the replay draws it
    with torch._inductor.config.patch(fallback_random=True):
        check_exact(
            module, [x.detach().requires_grad_(x.requires_grad)], options={"target": "inductor"}
        )


# Programs that a drawn one may miss. Each was written for a way to be wrong.


def f(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def mlp(*, p: float = 0.5, width: int = 32, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(16, width, bias=bias),
        nn.GELU(),
        nn.Dropout(p),
        nn.Linear(width, width, bias=bias),
        nn.Hardswish(inplace=True),
        nn.Dropout(p, inplace=True),
        nn.Linear(width, 8, bias=bias),
    )


class Block(nn.Module):
    """A transformer block."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, 0.25, 0.0)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Dropout(0.5),
            nn.Linear(2 * width, width),
            nn.Dropout(0.25),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)  # type: ignore[no-any-return]


class LanguageModel(nn.Module):
    """A small GPT whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(24, 32)
        self.position = nn.Embedding(8, 32)
        self.drop = nn.Dropout(0.25)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(32)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1])
        x = self.drop(self.embedding(ids) + self.position(positions))
        logits = self.norm(self.blocks(x)) @ self.embedding.weight.t()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Mixer(nn.Module):
    """An MLP-Mixer block: the first dropout's features are the second one's tokens."""

    def __init__(self, tokens: int = 16, width: int = 32) -> None:
        super().__init__()
        self.tokens = MixTokens(
            nn.Sequential(
                nn.Linear(tokens, 32),
                nn.GELU(),
                nn.Dropout(0.5),
                nn.Linear(32, tokens),
                nn.Dropout(0.25),
            )
        )
        self.channels = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 64),
            nn.GELU(),
            nn.Dropout(0.5),
            nn.Linear(64, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(x)
        return x + self.channels(x)  # type: ignore[no-any-return]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.Dropout2d(0.5),
            nn.Conv2d(16, 32, 3, stride=2),
            nn.ReLU(),
            nn.Dropout2d(0.25),
            nn.MaxPool2d(2),
            nn.GroupNorm(4, 32),
            nn.Conv2d(32, 32, 1),
            nn.Dropout2d(0.5),
        )
        self.classify = nn.Sequential(
            nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 10)
        )

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.classify(self.features(x))
        return F.cross_entropy(logits, y), logits


class SharedInput(nn.Module):
    """One x, dropped twice in two ways, used once more as it is, and returned as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(x)
        one, two = F.dropout(h, 0.5), F.dropout(h, 0.25)
        return self.b(one) + self.c(two) * self.b(h), one


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return self.inner(x)  # type: ignore[no-any-return]  # it would run twice
        return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]


class LastKept(nn.Module):
    """One of two channels stays: a dimension that is cut to size 1 is no dimension to squeeze."""

    def __init__(self, squeeze: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)
        self.squeeze = squeeze
        self.out = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.squeeze(self.conv(x).mean((2, 3), keepdim=True))
        return self.out(F.dropout(h, 0.5))  # type: ignore[no-any-return]


class SizeAdded(nn.Module):
    """A sum with a size is not zero where the tensor is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(self.a(x), 0.5) + x.shape[0]) * (x.shape[0] + 1)  # type: ignore[no-any-return]


class TransposedView(nn.Module):
    """A view that is legal for the strides of the dense result only."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Tied(16, 32, nn.Dropout(0.25))
        self.drop = nn.Dropout1d(0.75)
        self.b = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.a(x).transpose(1, 2)).transpose(1, 2)
        return self.b(x.view(-1, 4, 4).transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]


class ReadsMemory(nn.Module):
    """What a product makes, read by its place in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.a(x).t(), 0.5).t()
        return self.b(h) + h.as_strided((4, 8), (8, 1))  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], Case]] = {
    "mlp": lambda: (mlp(), [f(8, 16)]),
    "no bias": lambda: (mlp(bias=False), [f(8, 16)]),
    "one sample": lambda: (mlp(), [f(1, 16)]),
    "no sample": lambda: (mlp(), [f(0, 16)]),
    "vector": lambda: (mlp(), [f(16)]),
    "many leading dimensions": lambda: (mlp(), [f(2, 1, 3, 2, 16)]),
    "input wants a gradient": lambda: (mlp(), [f(8, 16).requires_grad_()]),
    "input is a slice": lambda: (mlp(), [f(16, 32)[::2, ::2].requires_grad_()]),
    "input is transposed": lambda: (mlp(), [f(16, 8).t()]),
    "input is expanded": lambda: (mlp(), [f(1, 16).expand(8, 16)]),
    "block": lambda: (Block(), [f(2, 8, 32).requires_grad_()]),
    "language model": lambda: (LanguageModel(), [torch.randint(24, (3, 8))]),
    "mixer": lambda: (Mixer(), [f(2, 16, 32)]),
    "convolutions": lambda: (Convolutions(), [f(4, 3, 10, 10).requires_grad_(), torch.randint(10, (4,))]),
    "channels last": lambda: (
        Convolutions(),
        [f(4, 3, 10, 10).contiguous(memory_format=torch.channels_last), torch.randint(10, (4,))],
    ),
    "one dimension": lambda: (
        nn.Sequential(nn.Conv1d(4, 16, 3), nn.Dropout1d(0.5), nn.Conv1d(16, 8, 3)),
        [f(2, 4, 9)],
    ),
    "three dimensions": lambda: (
        nn.Sequential(nn.Conv3d(2, 16, 2), nn.Dropout3d(0.5), nn.MaxPool3d(2), nn.Conv3d(16, 4, 1)),
        [f(2, 2, 5, 5, 5)],
    ),
    "channels of a volume without a batch": lambda: (
        nn.Sequential(nn.Conv3d(2, 16, 2), nn.Dropout3d(0.5), nn.Conv3d(16, 4, 1)),
        [f(2, 4, 4, 4)],
    ),
    "shared input": lambda: (SharedInput(), [f(8, 16).requires_grad_()]),
    "tied weight": lambda: (Tied(16, 32, nn.Sequential(nn.ReLU(), nn.Dropout(0.5))), [f(8, 16)]),
    "checkpoint": lambda: (Checkpointed(), [f(8, 16).requires_grad_()]),
    "squeeze": lambda: (LastKept(lambda h: h.squeeze()), [f(4, 3, 5, 5)]),
    "squeeze one": lambda: (LastKept(lambda h: h.squeeze(1).squeeze(-1).squeeze(-1)), [f(4, 3, 5, 5)]),
    "squeeze some": lambda: (LastKept(lambda h: h.squeeze((1, 2, 3))), [f(4, 3, 5, 5)]),
    "size added": lambda: (SizeAdded(), [f(4, 16)]),
    "transposed view": lambda: (TransposedView(), [f(2, 4, 16)]),
    "reads memory": lambda: (ReadsMemory(), [f(4, 16)]),
    "dropped twice": lambda: (
        nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.5), nn.Dropout(0.5), nn.Linear(32, 4)),
        [f(8, 16)],
    ),
    "everything is dropped": lambda: (
        nn.Sequential(nn.Linear(16, 32), nn.Dropout(1.0), nn.Linear(32, 16), nn.Dropout(0.5), nn.Linear(16, 4)),
        [f(8, 16)],
    ),
    "dropped input": lambda: (nn.Sequential(nn.Dropout(0.25), nn.Linear(16, 4)), [f(8, 16).requires_grad_()]),
    "dropped result": lambda: (nn.Sequential(nn.Linear(16, 4), nn.Dropout(0.25)), [f(8, 16)]),
    "pooling of matrices": lambda: (
        nn.Sequential(Fn("drop", lambda x: F.dropout(x, 0.5)), nn.AvgPool2d(2), nn.Linear(8, 4)),
        [f(4, 16, 16)],
    ),
    "frozen": lambda: (frozen(mlp()), [f(8, 16)]),
    "unused result": lambda: (Fn("unused", unused), [f(8, 16).requires_grad_()]),
}  # fmt: skip


def frozen(module: nn.Sequential) -> nn.Module:
    for layer in (module[0], module[3]):
        layer.requires_grad_(False)
    return module


def unused(x: Tensor) -> Tensor:
    F.dropout(x, 0.5)
    return x * F.dropout(x @ x.mT, 0.5).mean()


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    module, inputs = MODELS[name]()
    check_exact(module.double(), inputs)


@pytest.mark.parametrize("name", ["block", "mixer", "convolutions"])
def test_every_dropout_of_the_model_is_structured(name: str) -> None:
    """Or the tests above would prove little."""
    module, inputs = MODELS[name]()
    assert all(decision.taken for decision in check_exact(module.double(), inputs))


THROUGH_INDUCTOR = (
    *("mlp", "input is a slice", "block", "language model", "mixer", "convolutions"),
    *("channels last", "one dimension", "shared input", "tied weight", "checkpoint"),
    *("squeeze", "transposed view", "reads memory", "pooling of matrices", "no sample"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", THROUGH_INDUCTOR)
def test_model_through_inductor(name: str) -> None:
    module, inputs = MODELS[name]()
    with torch._inductor.config.patch(fallback_random=True):
        check_exact(module.double(), inputs, options={"target": "inductor"})


@pytest.mark.parametrize("name", ["mlp", "block", "mixer", "convolutions", "shared input"])
def test_single_precision(name: str) -> None:
    module, inputs = MODELS[name]()
    inputs = [
        x.detach().float().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for x in inputs
    ]
    check_exact(module, inputs)


@pytest.mark.parametrize("block", [1, 2, 4, 8])
@pytest.mark.parametrize("p", [0.25, 0.5, 0.75])
def test_block_sizes_and_rates(p: float, block: int) -> None:
    decisions = check_exact(mlp(p=p).double(), [f(8, 16)], options={"block_size": block})
    assert [(d.taken, d.block, d.p_used) for d in decisions] == [(True, block, p)] * 2


@pytest.mark.parametrize("fuel", [0, 1, 2, 3])
def test_fuel(fuel: int) -> None:
    decisions = check_exact(Block().double(), [f(2, 8, 32)], options={"max_rewrites": fuel})
    assert sum(decision.taken for decision in decisions) == fuel


@pytest.mark.parametrize("name", ["mlp", "block", "language model", "convolutions", "mixer"])
def test_without_gradients(name: str) -> None:
    """Monte-Carlo dropout: the graph has no backward."""
    module, inputs = MODELS[name]()
    with torch.no_grad():
        decisions = check_exact(module.double(), inputs)
    assert ardd.report().graphs[-1].inference
    assert any(decision.taken for decision in decisions)


def test_evaluation_draws_nothing() -> None:
    module = mlp().double().eval()
    compiled = torch.compile(module, backend="ardd", options={"target": "eager"})
    x = f(8, 16)
    with ardd.record_masks() as draws:
        compare(run(compiled, module, [x]), run(module, module, [x]))
    assert draws == []


DYNAMIC: dict[str, Callable[[int], Case]] = {
    "mlp": lambda n: (mlp(), [f(n, 16).requires_grad_()]),
    "block": lambda n: (Block(), [f(n, 8, 32)]),
    "tokens": lambda n: (Block(), [f(2, n, 32)]),
    "language model": lambda n: (LanguageModel(), [torch.randint(24, (n, 8))]),
    "mixer": lambda n: (Mixer(), [f(n, 16, 32)]),
    "convolutions": lambda n: (Convolutions(), [f(n, 3, 10, 10), torch.randint(10, (n,))]),
    "size added": lambda n: (SizeAdded(), [f(n, 16)]),
    "shared input": lambda n: (SharedInput(), [f(n, 16)]),
    "images of many sizes": lambda n: (
        nn.Sequential(nn.Conv2d(3, 16, 3), nn.Dropout2d(0.5), nn.Conv2d(16, 4, 3), nn.Dropout2d(0.5)),
        [f(2, 3, n + 4, n + 5)],
    ),
    "random rows": lambda n: (nn.Sequential(nn.Dropout(0.5), Fn("softmax", lambda x: x.softmax(-1))), [f(n, 16)]),
    "squares": lambda n: (nn.Sequential(mlp(), Fn("x x'", lambda x: F.dropout(x @ x.mT, 0.5))), [f(n, 16)]),
}  # fmt: skip


@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_shapes(name: str) -> None:
    """One graph serves every batch, or number of tokens."""
    module = DYNAMIC[name](4)[0].double()
    options: dict[str, Any] = {"pattern": "block", "target": "eager", "strict": True}
    compiled = torch.compile(module, backend="ardd", dynamic=True, options=options)
    for number, size in enumerate((4, 7, 3, 16)):
        check_exact(module, DYNAMIC[name](size)[1], seed=number, compiled=compiled)
    assert len(ardd.report().graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "tokens", "convolutions", "size added", "squares"])
def test_dynamic_shapes_through_inductor(name: str) -> None:
    module = DYNAMIC[name](4)[0].double()
    options: dict[str, Any] = {"pattern": "block", "strict": True}
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(module, backend="ardd", dynamic=True, options=options)
        for number, size in enumerate((4, 7)):
            check_exact(module, DYNAMIC[name](size)[1], seed=number, compiled=compiled)


@pytest.mark.parametrize(("shape", "dims"), [((16, 6), [0]), ((6, 16, 5), [1]), ((16, 5, 6), [0])])
def test_features_need_not_come_last(shape: Sequence[int], dims: Sequence[int]) -> None:
    """The weight stands on the left: the dimension that it contracts is dropped."""

    class Left(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(f(8, 16))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.tensordot(self.weight, F.dropout(x, 0.5), ([1], dims))
            return y.relu()

    (decision,) = check_exact(Left(), [f(*shape).requires_grad_()])
    assert (decision.taken, decision.dim) == (True, dims[0])


def test_one_mask_for_many_steps() -> None:
    """Locked dropout of a recurrent net: one mask, made by hand, at every step."""

    class Locked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros_like(x[0])
            for step in x:
                h = torch.tanh(self.a(F.dropout(step, 0.5)) + self.b(F.dropout(h, 0.25)))
            return h

    check_exact(Locked().double(), [f(3, 4, 16)])


@pytest.mark.parametrize("target", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fast", [False, True])
def test_gradients_are_those_of_the_function(target: str, fast: bool) -> None:
    """Finite differences, at fixed masks; input and parameters, one by one or in one direction."""
    layers = [nn.Linear(16, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.25)]
    module = Block(16, 2).double() if fast else nn.Sequential(*layers, nn.Linear(8, 2)).double()
    names = [name for name, _ in module.named_parameters()]
    options: dict[str, Any] = {"pattern": "block", "target": target, "strict": True}
    compiled = torch.compile(
        lambda x, *parameters: torch.func.functional_call(
            module, dict(zip(names, parameters, strict=True)), (x,)
        ),
        backend="ardd",
        options=options,
    )

    def fn(*inputs: Tensor) -> Tensor:
        torch.manual_seed(0)
        return compiled(*inputs)  # type: ignore[no-any-return]

    x = f(2, 3, 16).requires_grad_()
    with torch._functorch.config.patch(donated_buffer=False):  # gradcheck runs backward twice
        assert torch.autograd.gradcheck(fn, (x, *module.parameters()), fast_mode=fast)
    assert all(decision.taken for decision in ardd.report().decisions)


def test_gradients_accumulate() -> None:
    module = mlp().double()
    options: dict[str, Any] = {"pattern": "block", "target": "eager", "strict": True}
    compiled = torch.compile(module, backend="ardd", options=options)
    batches = [f(4, 16) for _ in range(3)]
    single = []
    for number, x in enumerate(batches):
        torch.manual_seed(number)
        single.append(torch.autograd.grad(compiled(x).sum(), list(module.parameters())))
    for number, x in enumerate(batches):
        torch.manual_seed(number)
        compiled(x).sum().backward()
    for parameter, *gradients in zip(module.parameters(), *single, strict=True):
        torch.testing.assert_close(parameter.grad, sum(gradients))


def test_masks_differ_between_calls_and_repeat_with_the_seed() -> None:
    module = mlp().double()
    compiled = torch.compile(
        module, backend="ardd", options={"pattern": "block", "target": "eager", "strict": True}
    )
    x = f(8, 16)
    torch.manual_seed(3)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(3)
    again = compiled(x)
    assert torch.equal(first, again)
    assert not torch.allclose(first, second)
