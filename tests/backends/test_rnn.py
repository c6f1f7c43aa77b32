"""RNNs: split into layers, exact given the masks, and never without their dropout."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.replay import RTOL, check_exact
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ardd
from ardd.backends.find_suspects import find_suspects
from ardd.core.decisions import Reason
from ardd.passes.mark_dropout import MarkDropout
from ardd.passes.split_rnns import SplitRnns
from ardd.passes.structure_dropout import StructureDropout
from ardd.runtime import rnn_onednn

EAGER: dict[str, Any] = {"pattern": "block", "target": "eager", "strict": True}
KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *args, **kwargs: nn.RNN(*args, nonlinearity="relu", **kwargs),
}


class Tagger(nn.Module):
    """An RNN with dropout before it, in it and after it."""

    def __init__(self, rnn: nn.RNNBase, p: float = 0.5) -> None:
        super().__init__()
        self.before = nn.Dropout(p)
        self.rnn = rnn
        self.after = nn.Dropout(p)
        out = (rnn.proj_size or rnn.hidden_size) * (2 if rnn.bidirectional else 1)
        self.head = nn.Linear(out, 8)

    def forward(self, x: Tensor, *hx: Any) -> tuple[Tensor, ...]:
        given = hx if len(hx) == 2 else hx[0] if hx else None
        y, last = self.rnn(self.before(x), given)
        return (self.head(self.after(y)), *(last if isinstance(last, tuple) else (last,)))


class LanguageModel(nn.Module):
    """Of words: every kind of dropout that one has."""

    def __init__(self, vocabulary: int = 96, width: int = 32, p: float = 0.5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.drop = nn.Dropout(p)
        self.rnn = nn.LSTM(width, width, 2, dropout=p)
        self.decoder = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        y, (h, c) = self.rnn(self.drop(self.embedding(ids)), (h, c))
        return self.decoder(self.drop(y)), h, c


def f(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@contextlib.contextmanager
def allow_rnn() -> Iterator[None]:
    with torch._dynamo.config.patch(allow_rnn=True):
        yield


def check(module: nn.Module, *inputs: Any, **kwargs: Any) -> tuple[ardd.Decision, ...]:
    """Checks exactness of what ardd.compile makes of a module."""
    options = {**EAGER, **kwargs.pop("options", {})}
    compiled = ardd.compile(module, options=options, fullgraph=True)
    return check_exact(module, inputs, compiled=compiled, **kwargs)


# ---- exact given the masks ---------------------------------------------------------------

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "three layers": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "everything": {"num_layers": 3, "bidirectional": True, "batch_first": True},
}


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_exact(kind: str, name: str, state: bool) -> None:
    """Outputs, states, and gradients of every parameter, the input and the first states."""
    given = {"num_layers": 2, "dropout": 0.5, **CONFIGURATIONS[name]}
    module = Tagger(KINDS[kind](16, 32, **given)).double()
    inputs = [f(5, 3, 16).requires_grad_()]
    if state:
        rows = given["num_layers"] * (2 if given.get("bidirectional") else 1)
        samples = 5 if given.get("batch_first") else 3
        inputs += [f(rows, samples, 32).requires_grad_() for _ in range(1 + (kind == "lstm"))]
    decisions = check(module, *inputs)
    between = ["rnn"] * (given["num_layers"] - 1)
    assert [d.module for d in decisions] == ["before", *between, "after"]
    assert {d.kind for d in decisions if d.module == "rnn"} == {kind}
    assert {d.source.split(":")[0] for d in decisions} == {"test_rnn.py"}
    assert all(d.taken for d in decisions)


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_time_steps(kind: str, name: str) -> None:
    """Every group has a kept set of its own, of samples where they come first."""
    given = {"num_layers": 2, "dropout": 0.5, **CONFIGURATIONS[name]}
    module = Tagger(KINDS[kind](16, 32, **given)).double()
    inputs = [f(6, 4, 16).requires_grad_()]
    decisions = check(module, *inputs, options={"pattern": "grouped", "groups": 2})
    assert {d.pattern for d in decisions} == {"grouped"}
    assert {d.detail.rpartition("; ")[2] for d in decisions} == {"2 groups of rows"}


def test_groups_of_time_steps_that_do_not_divide_them() -> None:
    module = Tagger(nn.LSTM(16, 32, 2, dropout=0.5)).double()
    decisions = check(module, f(5, 3, 16), options={"pattern": "grouped", "groups": 2})
    assert [d.pattern for d in decisions] == ["block"] * 3


@pytest.mark.slow
def test_groups_of_time_steps_through_inductor() -> None:
    """In single precision, on the recurrence in C++."""
    module = Tagger(nn.LSTM(16, 32, 2, dropout=0.5))
    options = {"pattern": "grouped", "groups": 3, "target": "inductor"}
    with torch._inductor.config.patch(fallback_random=True):
        decisions = check(module, torch.randn(6, 3, 16).requires_grad_(), options=options)
    assert [d.pattern for d in decisions] == ["grouped"] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_one_sequence_without_a_batch(kind: str) -> None:
    assert all(
        d.taken for d in check(Tagger(KINDS[kind](16, 32, 2, dropout=0.5)).double(), f(5, 16))
    )


def test_random_masks() -> None:
    """What is refused is drawn as ordinary dropout, between the layers too."""
    module = Tagger(nn.LSTM(16, 32, 2, dropout=0.3, batch_first=True)).double()
    decisions = check(module, f(5, 3, 16).requires_grad_(), options={"pattern": "random"})
    assert [d.reason for d in decisions] == [Reason.PATTERN_RANDOM] * 3


@pytest.mark.parametrize("fuel", [0, 1, 2])
def test_some_of_the_dropouts(fuel: int) -> None:
    module = Tagger(nn.GRU(16, 32, 2, dropout=0.5)).double()
    decisions = check(module, f(5, 3, 16), options={"max_rewrites": fuel})
    assert sum(d.taken for d in decisions) == fuel


@pytest.mark.parametrize("p", [0.25, 1.0])
def test_rates(p: float) -> None:
    module = Tagger(nn.LSTM(16, 32, 2, dropout=p)).double()
    decisions = check(module, f(5, 3, 16).requires_grad_())
    assert decisions[1].p == p
    assert (decisions[1].reason is Reason.P_IS_ONE) == (p == 1)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen(kind: str) -> None:
    """Frozen weights, and an input that wants no gradient, or one alone."""
    for part in ("weight_ih", "weight_hh", ""):
        module = Tagger(KINDS[kind](16, 32, 2, dropout=0.5)).double()
        for name, parameter in module.rnn.named_parameters():
            parameter.requires_grad_(not name.startswith(part))
        check(module, f(5, 3, 16))
        check(module, f(5, 3, 16).requires_grad_())


@pytest.mark.parametrize("used", [0, 1, 2])
def test_results_that_are_not_used(used: int) -> None:
    class One(Tagger):
        def forward(self, x: Tensor, *hx: Any) -> tuple[Tensor, ...]:
            return (super().forward(x, *hx)[used],)

    check(One(nn.LSTM(16, 32, 2, dropout=0.5)).double(), f(5, 3, 16).requires_grad_())


def test_frozen_weights_and_an_input_that_is_not_zero() -> None:
    """Only the kept part of the gradient of x is wanted, but x is not zero outside of it."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 16)
            self.rnn = nn.LSTM(16, 32).requires_grad_(False)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            y: Tensor = self.rnn(F.dropout(self.a(x), 0.5) + z)[0]
            return y

    check(Sum().double(), f(5, 3, 16), f(5, 3, 16))
    with torch._inductor.config.patch(fallback_random=True):
        check(Sum(), torch.randn(5, 3, 16), torch.randn(5, 3, 16), options={"target": "inductor"})


def test_checkpoint() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Tagger(nn.LSTM(16, 32, 2, dropout=0.5))

        def forward(self, x: Tensor) -> Any:
            if not torch.compiler.is_compiling():
                return self.inner(x)
            return checkpoint(self.inner, x, use_reentrant=False)

    decisions = check(Checkpointed().double(), f(5, 3, 16).requires_grad_())
    assert [d.taken for d in decisions] == [True] * 3


class Chain(nn.Module):
    """RNNs that read the results of each other: the outputs, and the states of an LSTM."""

    def __init__(self, *kinds: str, twice: bool = False, p: float = 0.5, **kwargs: Any) -> None:
        super().__init__()
        width = 16 // (2 if kwargs else 1)
        made = [KINDS[kind](width, 16, 2, dropout=p, **kwargs) for kind in kinds]
        self.rnns = nn.ModuleList(made * 2 if twice else made)
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        states: dict[str, Any] = {}
        for rnn in self.rnns:
            kind = type(rnn).__name__  # a state is that of the last RNN of its kind
            x, states[kind] = rnn(x, states.get(kind))
        y: Tensor = self.head(x)
        return y


CHAINS: dict[str, Callable[[], Chain]] = {
    "two LSTMs": lambda: Chain("lstm", "lstm"),
    "three kinds": lambda: Chain("lstm", "gru", "rnn_tanh", "lstm"),
    "called twice": lambda: Chain("gru", twice=True),
    "with projections": lambda: Chain("lstm", "lstm", proj_size=8),
}


@pytest.mark.parametrize("name", CHAINS)
def test_one_reads_what_another_gives(name: str) -> None:
    """Outputs and states; each call is split as it stands after those before it."""
    module = CHAINS[name]().double()
    decisions = check(module, f(5, 3, module.head.in_features).requires_grad_())
    assert len(decisions) == len(module.rnns)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_two_modules_in_a_row_through_inductor(p: float) -> None:
    module = Chain("lstm", "lstm", p=p)
    x = torch.randn(3, 2, 16, requires_grad=True)
    compiled = ardd.compile(module, options={"strict": True}, fullgraph=True)
    compiled(x).sum().backward()
    assert [d.kind for d in ardd.report().decisions] == ["lstm"] * (2 if p else 0)
    module.eval()
    torch.testing.assert_close(compiled(x), module(x))


def test_without_gradients() -> None:
    with torch.no_grad():
        decisions = check(Tagger(nn.LSTM(16, 32, 2, dropout=0.5)).double(), f(5, 3, 16))
    assert all(d.taken for d in decisions)
    assert ardd.report().graphs[-1].inference


@pytest.mark.parametrize("kind", KINDS)
def test_dynamic_sizes(kind: str) -> None:
    """One graph for every number of samples, and one for each number of steps.

    Dynamo unrolls an RNN over its steps to learn the shape of the result, which fixes their number.
    """
    module = Tagger(KINDS[kind](16, 32, 2, dropout=0.5)).double()
    compiled = ardd.compile(module, options=EAGER, dynamic=True)
    for number, (steps, samples, graphs) in enumerate([(5, 3, 1), (5, 7, 1), (4, 6, 2)]):
        inputs = [f(steps, samples, 16).requires_grad_()]
        decisions = check_exact(module, inputs, compiled=compiled, seed=number)
        assert all(d.taken for d in decisions)
        assert len(ardd.report().graphs) == graphs


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("kind", ["lstm", pytest.param("gru", marks=pytest.mark.slow)])
def test_inductor(kind: str, dynamic: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In single precision, so on oneDNN, whose workspace comes through."""
    runs: list[int] = []
    forward = rnn_onednn.forward

    def counted(*args: Any) -> Any:
        runs.append(1)
        return forward(*args)

    monkeypatch.setattr(rnn_onednn, "forward", counted)
    module = Tagger(KINDS[kind](16, 32, 2, dropout=0.5))
    compiled = ardd.compile(module, options={"pattern": "block", "strict": True}, dynamic=dynamic)
    for samples in (3, 5) if dynamic else (3,):
        runs.clear()
        x = torch.randn(5, samples, 16, requires_grad=True)
        decisions = check_exact(module, [x], compiled=compiled, rtol=20 * RTOL[torch.float32])
        assert all(d.taken for d in decisions)
        assert len(runs) == (2 if kind == "lstm" else 0)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_cuda(kind: str) -> None:
    """On cuDNN, with dropouts that drop nothing, so that eager is the reference."""
    module = Tagger(KINDS[kind](16, 32, 2, dropout=1e-30, bidirectional=True), 1e-30).cuda()
    compiled = ardd.compile(module, options={"strict": True}, fullgraph=True)
    x = torch.randn(5, 3, 16, device="cuda", requires_grad=True)
    wanted = [x, *module.parameters()]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        have, want = compiled(x), module(x)
        grads = [torch.autograd.grad(sum(y.sum() for y in r), wanted) for r in (have, want)]
    for a, b in zip((*have, *grads[0]), (*want, *grads[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# ---- a language model --------------------------------------------------------------------


def test_every_dropout_of_a_language_model() -> None:
    module = LanguageModel().double()
    ids, h, c = torch.randint(96, (5, 3)), f(2, 3, 32), f(2, 3, 32)
    decisions = check(module, ids, h, c)
    assert [(d.module, d.kind, d.taken) for d in decisions] == [
        ("drop", "dropout", True),
        ("rnn", "lstm", True),
        ("drop", "dropout", True),
    ]
    after = ardd.report().graphs[-1].after
    assert after.count("ardd.rnn_layer.default(") == after.count("ardd.rnn_layer_backward.") == 2
    # The input gates of both layers see 16 of 32 features, and so does the decoder
    assert after.count('"f64[128, 16]"') >= 4
    # The rows that are looked up are cut, and not the columns of the whole embedding
    assert "f64[96, 16]" not in after.split("embedding.default")[0].split("primals")[-1]


def test_embedding_of_few_words_is_cut_before_it_is_looked_up() -> None:
    """With more tokens than words that is less to move."""
    module = nn.Sequential(nn.Embedding(8, 32), nn.Dropout(0.5), nn.Linear(32, 8)).double()
    check(module, torch.randint(8, (5, 3)))
    assert "embedding.default(view_default" in ardd.report().graphs[-1].after
    torch._dynamo.reset()
    module = nn.Sequential(nn.Embedding(64, 32), nn.Dropout(0.5), nn.Linear(32, 8)).double()
    check(module, torch.randint(64, (5, 3)))
    assert "embedding.default(primals" in ardd.report().graphs[-1].after


def test_state_carried_over_without_compiling_again() -> None:
    module = LanguageModel()
    compiled = ardd.compile(module, options=EAGER)
    h, c = torch.zeros(2, 3, 32), torch.zeros(2, 3, 32)
    for _ in range(4):
        logits, h, c = compiled(torch.randint(96, (5, 3)), h, c)
        (logits.square().mean() + h.square().mean()).backward()
        h, c = h.detach(), c.detach()
    assert len(ardd.report().graphs) == 1


def test_flops_of_the_recurrence_stay() -> None:
    module = nn.LSTM(16, 32, 2, dropout=0.5).double()
    report = ardd.explain(ardd.compile(module), f(5, 3, 16), options={"pattern": "block"})
    layer = 2 * 5 * 3 * 128  # FLOPs of one input feature or hidden unit
    # Forward, backward of weights, and of the input but for that of the first layer
    assert report.flops_before == layer * (2 * 16 + 3 * 32 + 6 * 32)
    assert report.flops_after == layer * (2 * 16 + 3 * 16 + 6 * 32)


# ---- the dropout is there ----------------------------------------------------------------


def fails(*_: Any) -> Any:
    raise NotImplementedError("on purpose")


def deep(p: float = 0.5) -> nn.LSTM:
    """The state of the last layer shows what the dropout before it did."""
    return nn.LSTM(16, 32, 2, dropout=p)


WAYS: dict[str, tuple[dict[str, object], list[tuple[Any, str]]]] = {
    "structured": ({"pattern": "block"}, []),
    "random": ({"pattern": "random"}, []),
    "nothing wanted": ({"pattern": "random", "saves": "off"}, []),
    "marking fails": ({}, [(MarkDropout, "apply")]),
    "structuring fails": ({"pattern": "block"}, [(StructureDropout, "apply")]),
}


@pytest.mark.filterwarnings("ignore:ardd. Pass:RuntimeWarning")
@pytest.mark.parametrize("target", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_dropout_between_the_layers_is_there(
    way: str, grad: bool, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two calls differ, the variance is that of eager, and evaluation is eager's."""
    options, broken = WAYS[way]
    for owner, name in broken:
        monkeypatch.setattr(owner, name, fails)
    module = deep()
    compiled = ardd.compile(module, options={"target": target, **options})
    x = torch.randn(3, 4, 16)
    with torch.set_grad_enabled(grad):
        have = torch.stack([compiled(x)[0].detach() for _ in range(60)])
        want = torch.stack([module(x)[0].detach() for _ in range(60)])
    assert not torch.equal(have[0], have[1])
    # One number for all: 60 draws of 32 features times 12 places. Blocks add a little.
    ratio = float(have.var(0).mean() / want.var(0).mean())
    assert 0.6 < ratio < 1.7
    difference = have.mean(0) - want.mean(0)
    assert float(difference.abs().mean()) < 3 * float((want.var(0) / 30).sqrt().mean())
    module.eval()
    torch.testing.assert_close(compiled(x)[0], module(x)[0])


def test_torch_alone_loses_it() -> None:
    """Or none of this would be needed."""
    with allow_rnn():
        compiled = torch.compile(deep(), backend="aot_eager")
        x = torch.randn(3, 4, 16, requires_grad=True)
        assert torch.equal(compiled(x)[0], compiled(x)[0])


def test_plain_compile_with_allow_rnn_has_it_too() -> None:
    with allow_rnn():
        compiled = torch.compile(deep(), backend="ardd", options=EAGER)
        x = torch.randn(3, 4, 16)
        assert not torch.equal(compiled(x)[0], compiled(x)[0])


def test_failing_split_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original program would run without the dropout."""
    monkeypatch.setattr("ardd.passes.split_rnns._split", fails)
    with pytest.raises(ardd.PassError, match="split-rnns"):
        ardd.compile(deep(), options={"target": "eager"})(torch.randn(3, 4, 16))


@pytest.mark.filterwarnings("ignore:ardd. Pass:RuntimeWarning")
def test_failing_split_with_nothing_to_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ardd.passes.split_rnns._split", fails)
    module = nn.GRU(16, 32, 2)
    x = torch.randn(3, 4, 16, requires_grad=True)
    compiled = ardd.compile(module, options={"target": "eager"})
    torch.testing.assert_close(compiled(x)[0], module(x)[0])
    assert "on purpose" in str(ardd.report().graphs[0].failure)


# ---- what is no op of its own ------------------------------------------------------------


def test_projections() -> None:
    """Left to torch layer by layer, with the dropout in between, which is structured as well."""
    module = Tagger(nn.LSTM(16, 32, 2, dropout=0.5, proj_size=16)).double()
    decisions = check(module, f(3, 2, 16).requires_grad_())
    assert [d.taken for d in decisions] == [True] * 3
    assert "rnn_layer" not in ardd.report().after


def test_bidirectional_projections_with_states() -> None:
    rnn = nn.LSTM(16, 32, 3, dropout=0.5, proj_size=8, bidirectional=True, batch_first=True)
    states = [f(6, 3, 8).requires_grad_(), f(6, 3, 32).requires_grad_()]
    check(Tagger(rnn).double(), f(3, 2, 16).requires_grad_(), *states)


class Cast(nn.Module):
    """An LSTM under autocast that is opened around it, around a checkpoint of it, or inside."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.before = nn.Linear(16, 16)
        self.rnns = nn.ModuleList(nn.LSTM(16, 16, 2, dropout=0.5) for _ in range(2))
        self.after = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Any:
        if self.way == "inside a checkpoint":
            return checkpoint(self.cast, x, use_reentrant=False)
        return self.cast(x)

    def cast(self, x: Tensor) -> Any:
        if self.way == "around the call":
            return self.body(x)
        with torch.autocast("cpu", torch.bfloat16):
            if self.way == "around a checkpoint":
                return checkpoint(self.body, x, use_reentrant=False)
            return self.body(x)

    def body(self, x: Tensor) -> Any:
        x = self.before(x) if self.way != "around the call" else x
        for rnn in self.rnns:
            x, _ = rnn(x)
        return self.after(x)


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 here"
)
@pytest.mark.parametrize("pattern", ["block", "random"])
@pytest.mark.parametrize(
    "way", ["around the call", "in the graph", "around a checkpoint", "inside a checkpoint"]
)
def test_autocast(way: str, pattern: str) -> None:
    """An LSTM computes in the type that it has in eager, and its dropout is there."""
    module, x = Cast(way), torch.randn(3, 4, 16, requires_grad=True)
    compiled = ardd.compile(module, options={**EAGER, "pattern": pattern})
    around = torch.autocast("cpu", torch.bfloat16, enabled=way == "around the call")
    with around:
        first, second = compiled(x), compiled(x)
    assert first.dtype == torch.bfloat16
    assert not torch.equal(first, second)
    assert [d.kind for d in ardd.report().decisions] == ["lstm", "lstm", "dropout"]
    module.eval()
    with around:
        have, want = compiled(x), module(x)
    torch.testing.assert_close(have, want)
    parameters = list(module.parameters())[2 if way == "around the call" else 0 :]
    grads = [torch.autograd.grad(y.float().square().sum(), parameters) for y in (have, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


def test_autocast_of_what_is_no_op_to_it() -> None:
    """Layer by layer, left to torch, and the dropout is there."""
    module = nn.GRU(16, 32, 2, dropout=0.5)
    compiled = ardd.compile(module, options=EAGER)
    x = torch.randn(3, 4, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        first, second = compiled(x)[0], compiled(x)[0]
        assert first.dtype == module(x)[0].dtype
    assert not torch.equal(first, second)
    (decision,) = ardd.report().graphs[0].decisions
    assert decision.module == ""
    assert "rnn_layer" not in ardd.report().after


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(16, 16)
        self.rnn = deep()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.before(x), lengths)
        y, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0])
        return y * 2


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch fails to trace pad_packed_sequence")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo looks at it
def test_packed_sequences() -> None:
    """Torch does not trace them: they run as in eager, and `ardd.explain` says so."""
    module, x, lengths = Packed(), torch.randn(5, 3, 16), torch.tensor([5, 4, 2])
    compiled = ardd.compile(module, options={"target": "eager"})
    assert not torch.equal(compiled(x, lengths), compiled(x, lengths))
    module.eval()
    torch.testing.assert_close(compiled(x, lengths), module(x, lengths))
    module.train()
    notes = ardd.explain(ardd.compile(module), x, lengths).notes
    assert any("RNNs of packed sequences" in note for note in notes)


def test_packed_call_in_a_graph() -> None:
    """Should Dynamo trace one some day: the dropout between its layers is there."""
    rnn = deep().double()
    packed = nn.utils.rnn.pack_padded_sequence(f(5, 3, 16), torch.tensor([5, 4, 2]))
    hx = (torch.zeros(2, 3, 32).double(), torch.zeros(2, 3, 32).double())
    graph = torch.fx.Graph()
    x, sizes, h, c = (graph.placeholder(name) for name in "xshc")
    weights = [graph.get_attr(name) for name, _ in rnn.named_parameters()]
    args = (x, sizes, (h, c), weights, True, 2, 0.5, True, False)
    graph.output(graph.call_function(torch.lstm, args))
    gm = torch.fx.GraphModule(rnn, graph)
    assert SplitRnns().apply(gm).modified
    assert len(find_suspects(gm)) == 1
    inputs = (packed.data, packed.batch_sizes, *hx)
    torch.manual_seed(0)
    have = gm(*inputs)
    torch.manual_seed(0)
    want = torch.lstm(*inputs[:2], hx, list(rnn.parameters()), True, 2, 0.5, True, False)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b)


def test_lossy_saves_leave_what_a_layer_keeps_alone() -> None:
    module = LanguageModel(width=64)
    options = {"pattern": "block", "saves": "int4", "target": "eager", "strict": True}
    compiled = ardd.compile(module, options=options)
    state = torch.zeros(2, 8, 64)
    compiled(torch.randint(96, (16, 8)), state, state)[0].sum().backward()
    saves = ardd.report().saves
    of_layers = [s for s in saves if any("rnn_layer" in use for use in s.uses)]
    assert of_layers
    assert {s.encoding for s in of_layers} <= {"as is"}


# ---- the face ----------------------------------------------------------------------------


def test_module_stays_a_module() -> None:
    module = Tagger(deep())
    compiled = ardd.compile(module, options=EAGER)
    assert isinstance(compiled, nn.Module)
    assert compiled.rnn is module.rnn
    assert dict(compiled.named_parameters()).keys() == {
        f"_orig_mod.{name}" for name, _ in module.named_parameters()
    }
    compiled.eval()
    assert not module.rnn.training
    x = torch.randn(3, 4, 16)
    torch.testing.assert_close(compiled(x), module(x))
    compiled.train()
    assert module.after.training


def test_function() -> None:
    module = deep()

    def double(x: Tensor) -> Tensor:
        """Doubles."""
        return module(x)[0] * 2  # type: ignore[no-any-return]

    compiled = ardd.compile(double, options=EAGER, fullgraph=True)
    assert (compiled.__name__, compiled.__doc__) == ("double", "Doubles.")
    assert not torch.equal(compiled(torch.randn(3, 4, 16)), compiled(torch.randn(3, 4, 16)))
    (decision,) = ardd.report().decisions
    assert (decision.kind, decision.taken) == ("lstm", True)


def test_setting_is_that_of_the_call_alone() -> None:
    config = torch._dynamo.config
    seen = []

    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            seen.append(config.allow_rnn)
            return x

    inner = ardd.compile(deep(), options=EAGER)

    def outer(x: Tensor) -> Tensor:
        looks(x)
        inner(x)
        return looks(x)  # type: ignore[no-any-return]

    looks = torch.compiler.disable(Looks())
    ardd.compile(outer, options=EAGER)(torch.randn(3, 4, 16))
    assert seen == [True, True]
    assert not config.allow_rnn
    with pytest.raises(RuntimeError, match="must be equal to input_size"):
        ardd.compile(deep(), options=EAGER)(torch.randn(3, 4, 15))
    assert not config.allow_rnn


def test_threads() -> None:
    """The end of one call takes nothing from another one, and nothing is left set."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            compiled = ardd.compile(Tagger(deep()), options=EAGER, fullgraph=True)
            compiled(torch.randn(3, 4, 16))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert not torch._dynamo.config.allow_rnn


def test_other_models_are_not_compiled_again() -> None:
    """The setting is no part of any guard."""
    calls = []

    def count(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        calls.append(gm)
        return gm

    plain = torch.compile(nn.Sequential(nn.Linear(16, 16), nn.ReLU()), backend=count)
    compiled = ardd.compile(Tagger(deep()), options=EAGER)
    x = torch.randn(3, 4, 16)
    for _ in range(3):
        plain(x)
        compiled(x)
    assert len(calls) == len(ardd.report().graphs) == 1


def test_after_torch_compile_gave_up_on_the_same_code() -> None:
    """Dynamo notes with the code of ``forward`` that it is not to be looked at again."""
    module, x = Tagger(deep()), torch.randn(3, 4, 16)
    plain = torch.compile(module, backend="ardd", options=EAGER)
    compiled = ardd.compile(module, options=EAGER)
    for _ in range(2):
        plain(x)
        compiled(x)
    assert len(ardd.report().graphs) == 1
    assert [d.module for d in ardd.report().decisions] == ["before", "rnn", "after"]


def test_report_names_the_rnn_that_was_not_captured() -> None:
    torch._dynamo.reset()  # of another test
    module, x = Tagger(deep()), torch.randn(3, 4, 16)
    ardd.compile(module, options=EAGER)(x)
    assert ardd.report().notes == ()
    torch.compile(module, backend="ardd", options=EAGER)(x)
    (note,) = ardd.report().notes
    assert "did not capture LSTM(16, 32, num_layers=2, dropout=0.5)" in note
    assert "ardd.compile(model)" in note
    torch._dynamo.reset()
    assert ardd.report().notes == ()


def test_explain() -> None:
    module, x = Tagger(deep()), torch.randn(3, 4, 16)
    plain = ardd.explain(module, x)
    assert not any(d.module == "rnn" for d in plain.decisions)
    assert any("nn.LSTM (rnn)" in note and "ardd.compile" in note for note in plain.notes)
    ours = ardd.explain(ardd.compile(module, options={"pattern": "block"}), x)
    assert [(d.module, d.taken) for d in ours.decisions] == [
        ("before", True),
        ("rnn", True),
        ("after", True),
    ]
    assert ours.notes == ()
    assert ardd.report().notes == ()


def test_wrong_options_at_once() -> None:
    with pytest.raises(ardd.OptionsError, match="Unknown option 'patern'"):
        ardd.compile(deep(), options={"patern": "block"})


def test_first_layer_on_data_costs_no_gradient_of_the_data() -> None:
    check(Tagger(deep()).double(), f(5, 3, 16))
    backward = ardd.report().graphs[-1].backward
    assert "[False, False, False, True, True, True, True])" in backward
