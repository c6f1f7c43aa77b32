"""Tests of the marking pass on torch's own dropouts, and on whole models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ardd.core.decisions import Reason
from ardd.passes.mark_dropout import MarkDropout, MarkResult
from ardd.passes.sites import clean_path

from .marking import data, give_masks, graphs_in, mark, random_calls, text

# torch warns of dropout2d and dropout3d on tensors of an unusual rank, tested all the same
pytestmark = pytest.mark.filterwarnings("ignore:dropout[23]d. Received a")


def dropout_inplace(x: Tensor) -> Tensor:
    y = x.clone()
    F.dropout(y, 0.3, True, inplace=True)
    return y


def channels_inplace(x: Tensor) -> Tensor:
    y = x.clone()
    torch.feature_dropout_(y, 0.3, True)
    return y


def module_inplace(x: Tensor) -> Tensor:
    return F.dropout2d(x.clone(), 0.3, inplace=True)


Call = Callable[[Tensor], Tensor]
# spelling -> function, shape of x, dimensions that share a draw
CALLS: dict[str, tuple[Call, tuple[int, ...], list[int]]] = {
    "dropout": (lambda x: F.dropout(x, 0.3), (4, 6), []),
    "dropout, positional": (lambda x: F.dropout(x, 0.3, True, False), (4, 6), []),
    "dropout, default p": (lambda x: F.dropout(x), (4, 6), []),
    "dropout of torch": (lambda x: torch.dropout(x, 0.3, True), (4, 6), []),
    "dropout, train=": (lambda x: torch.dropout(x, p=0.3, train=True), (4, 6), []),
    "dropout of aten": (lambda x: torch.ops.aten.dropout(x, 0.3, True), (4, 6), []),
    "dropout, overload": (lambda x: torch.ops.aten.dropout.default(x, 0.3, True), (4, 6), []),
    "dropout, module": (nn.Dropout(0.3), (4, 6), []),
    "dropout, inplace=": (dropout_inplace, (4, 6), []),
    "dropout, _": (lambda x: torch.dropout_(x.clone(), 0.3, True), (4, 6), []),
    "dropout, scalar": (lambda x: F.dropout(x, 0.3), (), []),
    "dropout1d": (lambda x: F.dropout1d(x, 0.3), (4, 6, 5), [2]),
    "dropout1d, no batch": (lambda x: F.dropout1d(x, 0.3), (6, 5), [1]),
    "dropout2d": (lambda x: F.dropout2d(x, 0.3), (4, 6, 2, 3), [2, 3]),
    "dropout2d, inplace=": (module_inplace, (4, 6, 2, 3), [2, 3]),
    "dropout2d, 3 dims": (lambda x: F.dropout2d(x, 0.3), (4, 6, 5), [2]),
    "dropout2d, 2 dims": (lambda x: F.dropout2d(x, 0.3), (4, 6), []),
    "dropout3d": (lambda x: F.dropout3d(x, 0.3), (2, 6, 2, 3, 2), [2, 3, 4]),
    "dropout3d, no batch": (lambda x: F.dropout3d(x, 0.3), (6, 2, 3, 2), [1, 2, 3]),
    "dropout3d, 3 dims": (lambda x: F.dropout3d(x, 0.3), (6, 2, 3), [1, 2]),
    "dropout3d, 6 dims": (lambda x: F.dropout3d(x, 0.3), (6, 2, 3, 2, 2, 2), [1, 2, 3, 4, 5]),
    "feature_dropout": (lambda x: torch.feature_dropout(x, 0.3, True), (4, 6, 5), [2]),
    "feature_dropout, _": (channels_inplace, (4, 6, 5), [2]),
}


@pytest.mark.parametrize("spelling", CALLS)
def test_marks_calls(spelling: str) -> None:
    f, shape, shared_dims = CALLS[spelling]
    x = data(*shape)
    marked = mark(f, x)
    p = 0.5 if "default" in spelling else 0.3
    assert (marked.site.kind, marked.site.p, marked.site.mean) == (
        spelling.split(",")[0].split()[0],
        p,
        1.0,
    )
    assert marked.result.decisions == ()
    assert not random_calls(marked.gm)
    (marker,) = marked.markers()
    assert marker.args[1:] == (shared_dims, p, 1.0, 0)
    masks = give_masks(marked.gm)
    y = marked.run()
    assert masks[0].shape == tuple(1 if d in shared_dims else n for d, n in enumerate(shape))
    torch.testing.assert_close(y, x * masks[0])


@pytest.mark.parametrize("spelling", CALLS)
def test_shared_dims_are_those_that_torch_shares(spelling: str) -> None:
    """Stock zeros are equal along the shared dimensions, and along no other."""
    f, shape, shared_dims = CALLS[spelling]
    zeros = [f(torch.ones(shape)) == 0 for _ in range(20)]
    for dim, size in enumerate(shape):
        if size > 1:
            shared = all(torch.equal(z.any(dim), z.all(dim)) for z in zeros)
            assert shared == (dim in shared_dims)


def alpha_inplace(x: Tensor) -> Tensor:
    y = x.clone()
    F.alpha_dropout(y, 0.3, True, inplace=True)
    return y


def alpha_channels_inplace(x: Tensor) -> Tensor:
    y = x.clone()
    torch.feature_alpha_dropout_(y, 0.3, True)
    return y


ALPHA: dict[str, tuple[Call, tuple[int, ...], list[int]]] = {
    "alpha_dropout": (lambda x: F.alpha_dropout(x, 0.3, True), (4, 6), []),
    "alpha_dropout, positional": (lambda x: F.alpha_dropout(x, 0.3, True, False), (4, 6), []),
    "alpha_dropout, default p": (lambda x: F.alpha_dropout(x, training=True), (4, 6), []),
    "alpha_dropout of torch": (lambda x: torch.alpha_dropout(x, 0.3, True), (4, 6), []),
    "alpha_dropout, train=": (lambda x: torch.alpha_dropout(x, p=0.3, train=True), (4, 6), []),
    "alpha_dropout, module": (nn.AlphaDropout(0.3), (4, 6), []),
    "alpha_dropout, inplace=": (alpha_inplace, (4, 6), []),
    "alpha_dropout, _": (lambda x: torch.alpha_dropout_(x.clone(), 0.3, True), (4, 6), []),
    "alpha_dropout, scalar": (lambda x: F.alpha_dropout(x, 0.3, True), (), []),
    "feature_alpha_dropout": (
        lambda x: F.feature_alpha_dropout(x, 0.3, training=True),
        (4, 6, 2, 3),
        [2, 3],
    ),
    "feature_alpha_dropout of torch": (
        lambda x: torch.feature_alpha_dropout(x, 0.3, True),
        (4, 6, 5),
        [2],
    ),
    "feature_alpha_dropout, module": (nn.FeatureAlphaDropout(0.3), (4, 6, 5), [2]),
    "feature_alpha_dropout, _": (alpha_channels_inplace, (4, 6, 5), [2]),
}
SATURATION = -1.7580993408473766  # of SELU


@pytest.mark.parametrize("spelling", ALPHA)
def test_marks_alpha_dropout(spelling: str) -> None:
    """A mask of zeros and ones; what is dropped saturates, and the rest is scaled and shifted."""
    f, shape, shared_dims = ALPHA[spelling]
    x = data(*shape)
    marked = mark(f, x)
    p = 0.5 if "default" in spelling else 0.3
    kind = spelling.split(",")[0].split()[0]
    assert (marked.site.kind, marked.site.p, marked.site.mean) == (kind, p, 1 - p)
    assert marked.result.decisions == ()
    assert not random_calls(marked.gm)
    (marker,) = marked.markers()
    assert marker.args[1:] == (shared_dims, p, 1 - p, 0)
    masks = give_masks(marked.gm)
    y = marked.run()
    assert masks[0].shape == tuple(1 if d in shared_dims else n for d, n in enumerate(shape))
    a = 1 / math.sqrt((1 - p) * (1 + p * SATURATION**2))
    expected = a * torch.where(masks[0] == 0, SATURATION, x) - a * p * SATURATION
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("spelling", ALPHA)
def test_alpha_values_are_those_of_torch(spelling: str) -> None:
    """Where torch keeps and where it drops, the numbers are ours."""
    f, shape, shared_dims = ALPHA[spelling]
    p = 0.5 if "default" in spelling else 0.3
    x = data(*shape)
    a = 1 / math.sqrt((1 - p) * (1 + p * SATURATION**2))
    kept, dropped = a * x - a * p * SATURATION, a * (1 - p) * SATURATION
    zeros = []
    for _ in range(20):
        y = f(x)
        zeros.append((y - dropped).abs() < 1e-5)
        torch.testing.assert_close(y, torch.where(zeros[-1], dropped, kept))
    for dim, size in enumerate(shape):
        if size > 1:
            shared = all(torch.equal(z.any(dim), z.all(dim)) for z in zeros)
            assert shared == (dim in shared_dims)


OFF: dict[str, Call] = {
    "training=False": lambda x: F.dropout(x, 0.5, False),
    "training= by name": lambda x: F.dropout1d(x, p=0.5, training=False),
    "train=False": lambda x: torch.dropout(x, 0.5, train=False),
    "eval": nn.Dropout(0.5).eval(),
    "p=0": lambda x: F.dropout(x, 0.0),
    "alpha, off": lambda x: F.alpha_dropout(x, 0.5),
    "alpha, p=0": lambda x: F.alpha_dropout(x, 0.0, True),
    "attention, p=0": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.0),
}


@pytest.mark.parametrize("spelling", OFF)
def test_a_dropout_that_is_off_leaves_no_trace(spelling: str) -> None:
    """Neither marked nor decided on."""
    assert mark(OFF[spelling], data(2, 4, 6)).result == MarkResult(modified=False)


SDPA = F.scaled_dot_product_attention
LEFT: dict[str, tuple[Call, Reason, float]] = {
    "dropout": (lambda x: F.dropout(x, 1.0), Reason.P_IS_ONE, 1),
    "dropout1d": (lambda x: F.dropout1d(x, 1), Reason.P_IS_ONE, 1),
    "alpha_dropout": (lambda x: F.alpha_dropout(x, 1.0, True), Reason.P_IS_ONE, 1),
    "scaled_dot_product_attention": (
        lambda x: SDPA(x, x, x, dropout_p=0.2),
        Reason.INSIDE_SDPA,
        0.2,
    ),
    "scaled_dot_product_attention, positional": (
        lambda x: SDPA(x, x, x, None, 0.2),
        Reason.INSIDE_SDPA,
        0.2,
    ),
}


@pytest.mark.parametrize("spelling", LEFT)
def test_leaves_alone_with_a_reason(spelling: str) -> None:
    """It drops, but nothing that could be skipped: untouched, and the report says why."""
    f, reason, p = LEFT[spelling]
    marked = mark(f, data(2, 4, 6))
    assert not marked.result.modified
    assert text(marked.gm) == marked.before
    decision = marked.decision
    assert (decision.kind, decision.p) == (spelling.split(",")[0].split()[0], p)
    assert (decision.reason, decision.taken) == (reason, False)
    assert decision.source.startswith("test_mark_dropout.py:")
    assert decision.shape == ((2, 4, 4) if reason is Reason.INSIDE_SDPA else (2, 4, 6))


NO_RATES = [-0.1, 1.5, math.nan, math.inf]
DROPS: dict[str, Callable[..., Tensor]] = {
    "F.dropout": F.dropout,
    "torch.dropout": lambda x, p: torch.dropout(x, p, True),
    "native_dropout": lambda x, p: torch.native_dropout(x, p, True)[0],
    "bernoulli": lambda x, p: x * torch.bernoulli(x, p),
    "bernoulli_": lambda x, p: x * torch.empty_like(x).bernoulli_(p),
    "bernoulli of a constant": lambda x, p: x * torch.bernoulli(torch.full_like(x, p)),
}


@pytest.mark.parametrize("p", NO_RATES)
@pytest.mark.parametrize("target", ["eager", "inductor"])
@pytest.mark.parametrize("name", DROPS)
def test_a_rate_that_is_no_probability_raises(name: str, target: str, p: float) -> None:
    """As in eager mode: compiled code would compare random numbers with it."""
    torch._dynamo.reset()
    compiled = torch.compile(DROPS[name], backend="ardd", options={"target": target})
    with pytest.raises((RuntimeError, ValueError)):
        DROPS[name](torch.rand(3, 8), p)
    with pytest.raises(RuntimeError, match="has to be between 0 and 1"):
        compiled(torch.rand(3, 8), p)


@pytest.mark.parametrize("p", NO_RATES)
def test_a_bad_rate_of_a_dropout_that_is_off(p: float) -> None:
    """Torch's compilers drop the call before they look at the rate."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(F.dropout, (x, p, False)))
    assert MarkDropout().apply(fx.GraphModule({}, graph)) == MarkResult(modified=False)


def test_a_rate_that_is_no_constant_is_left_alone() -> None:
    """A rate that is an input of the graph: no block count could be chosen for it."""
    graph = fx.Graph()
    x, p = graph.placeholder("x"), graph.placeholder("p")
    graph.output(graph.call_function(F.dropout, (x, p, True)))
    (decision,) = MarkDropout().apply(fx.GraphModule({}, graph)).decisions
    assert decision.detail == "the rate is not a constant"
    assert math.isnan(decision.p)


def test_a_tensor_without_a_known_value_is_left_alone() -> None:
    """Nothing says that it holds floating-point numbers in strides: nested, sparse, complex."""
    graph = fx.Graph()
    graph.output(graph.call_function(F.dropout2d, (graph.placeholder("x"), 0.5, True)))
    (decision,) = MarkDropout().apply(fx.GraphModule({}, graph)).decisions
    assert (decision.kind, decision.reason) == ("dropout2d", Reason.HAND_MASK)
    assert "not a plain tensor" in decision.detail


def test_symbolic_sizes() -> None:
    def f(x: Tensor) -> Tensor:
        x = F.dropout2d(x, 0.3) * (torch.rand(x.shape[0], 1, 1, 1) < 0.8)
        x = torch.where(torch.rand_like(x) < 0.5, x, 0)
        return F.alpha_dropout(x, 0.1, True)

    marked = mark(f, data(5, 6, 2, 2), dynamic=True)
    kinds = [site.kind for site in marked.result.sites]
    assert kinds == ["dropout2d", "rand", "rand_like", "alpha_dropout"]
    assert marked.result.decisions == ()


def test_symbolic_sizes_of_what_is_left_alone() -> None:
    marked = mark(lambda x: F.dropout(x, 1.0), data(5, 6, 2, 2), dynamic=True)
    assert not marked.result.modified
    assert all(isinstance(size, str) for size in marked.decision.shape)


def test_a_function_of_the_user_is_no_torch_function() -> None:
    """Called dropout, and not torch's: not ours to judge."""

    def dropout(x: Tensor, p: float) -> Tensor:
        return x + p

    graph = fx.Graph()
    graph.output(graph.call_function(dropout, (graph.placeholder("x"), 0.5)))
    assert MarkDropout().apply(fx.GraphModule({}, graph)) == MarkResult(modified=False)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_leaves_dropout_between_recurrent_layers_alone(name: str) -> None:
    """Between the layers of one fused call: left as it is, with its rate and its module."""

    class Model(nn.Module):
        def __init__(self, dropout: float) -> None:
            super().__init__()
            self.rnn = getattr(nn, name)(6, 5, num_layers=2, dropout=dropout)

        def forward(self, x: Tensor) -> Any:
            return self.rnn(x)[0]

    with torch._dynamo.config.patch(allow_rnn=True):
        marked = mark(Model(0.3), data(3, 2, 6))
        decision = marked.decision
        assert (decision.reason, decision.p) == (Reason.INSIDE_RNN, 0.3)
        assert (decision.module, decision.shape) == ("rnn", (3, 2, 5))
        assert not marked.result.modified
        torch._dynamo.reset()
        assert mark(Model(0.3).eval(), data(3, 2, 6)).result == MarkResult(modified=False)


@pytest.mark.parametrize(("layers", "p", "train"), [(2, 0.3, True), (1, 0.3, True), (2, 0.0, True)])
def test_reads_recurrent_calls_on_packed_sequences(layers: int, p: float, train: bool) -> None:
    """Dynamo does not trace them yet; the arguments come in another order."""
    graph = fx.Graph()
    x, sizes, hx, w = (graph.placeholder(name) for name in ("x", "sizes", "hx", "w"))
    args = (x, sizes, hx, [w, w], False, layers, p, train, False)
    graph.output(graph.call_function(torch.gru, args))
    decisions = MarkDropout().apply(fx.GraphModule({}, graph)).decisions
    assert [decision.p for decision in decisions] == ([p] if layers > 1 and p else [])


def test_leaves_opaque_attention_alone() -> None:
    """nn.MultiheadAttention is one call in the graph; its dropout is inside."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    marked = mark(layer, data(3, 5, 8))
    assert marked.decision.reason is Reason.INSIDE_SDPA
    assert marked.decision.shape == (3, 2, 5, 5)
    assert [site.module for site in marked.result.sites] == ["dropout1", "dropout", "dropout2"]


class Attention(nn.Module):
    """Self-attention written out, the way Hugging Face's eager attention is."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.drops = nn.ModuleList((nn.Dropout(0.1), nn.Dropout(0.2)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 2, 12).transpose(1, 2).chunk(3, dim=-1)
        scores = (q @ k.mT / 2).softmax(-1)
        y = (self.drops[0](scores) @ v).transpose(1, 2).flatten(2)
        y = x + self.drops[1](self.proj(y))
        return torch.as_tensor(y)


def test_sites_know_where_they_come_from() -> None:
    marked = mark(Attention(), data(3, 5, 8))
    first, second = marked.result.sites
    assert (first.index, first.p, first.module) == (0, 0.1, "drops.0")
    assert (second.index, second.p, second.module) == (1, 0.2, "drops.1")
    line = Attention.forward.__code__.co_firstlineno
    assert first.source == f"test_mark_dropout.py:{line + 3}"
    assert second.source == f"test_mark_dropout.py:{line + 4}"


def test_new_nodes_keep_the_place_of_the_old() -> None:
    marked = mark(Attention(), data(3, 5, 8))
    for marker in marked.markers():
        (product,) = marker.users
        for node in (marker, product):
            modules = list(node.meta["nn_module_stack"].values())
            assert modules[-1][1] is nn.Dropout
            assert "in forward" in (node.stack_trace or "")
            assert node.meta["source_fn_stack"]
        value = marker.meta["example_value"]
        assert value.shape == product.meta["example_value"].shape
        assert not value.requires_grad


@pytest.mark.parametrize(
    ("path", "clean"),
    [
        ("L['self']._modules['enc'].layers[0]", "enc.layers.0"),
        ("L['self'].blocks.1", "blocks.1"),
        ("G['model']", ""),
        ("L['f'].__closure__[0].cell_contents.fc", "fc"),
        ("L['s']._modules['rnn']._parameters['weight_ih_l0']", "rnn.weight_ih_l0"),
    ],
)
def test_clean_path(path: str, clean: str) -> None:
    assert clean_path(path) == clean


class Weights(nn.Module):
    """Every way of dropping a weight, and one dropout of data."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(data(8, 8))
        self.embedding = nn.Embedding(20, 8)
        self.scale: Tensor
        self.register_buffer("scale", data(8, 1))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        plain = F.dropout(self.weight, 0.1)
        scaled = F.dropout((self.weight * self.scale).t(), 0.2)
        table = self.embedding.weight
        mask = table.new_empty(20, 1).bernoulli_(0.7).expand_as(table) / 0.7
        words = F.embedding(index, mask * table)
        return F.dropout((x + words) @ plain @ scaled, 0.4)


def test_knows_a_weight_from_data() -> None:
    marked = mark(Weights(), data(3, 8), torch.tensor([1, 5, 7]))
    found = [(site.p, site.of_weight) for site in marked.result.sites]
    assert found == [(0.1, True), (0.2, True), (0.3, True), (0.4, False)]


def test_a_dropped_weight_is_no_weight() -> None:
    """Learned queries pass through many dropouts; only the first drops nothing but parameters."""

    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(data(4, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(F.dropout(self.queries, 0.1).relu(), 0.2) + x

    marked = mark(Queries(), data(4, 8))
    assert [site.of_weight for site in marked.result.sites] == [True, False]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(data(8, 8))
        self.before, self.inside = nn.Dropout(0.1), nn.Dropout(0.2)

    def body(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(self.inside(x), F.dropout(weight, 0.3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        y: Tensor = checkpoint(self.body, x, self.weight, use_reentrant=False)
        return F.dropout(y, 0.4)


def test_marks_inside_checkpointed_bodies() -> None:
    marked = mark(Checkpointed(), data(3, 8))
    assert len(list(graphs_in(marked.gm))) == 2
    sites = marked.result.sites
    assert [site.index for site in sites] == [0, 1, 2, 3]
    assert [site.p for site in sites] == [0.1, 0.2, 0.3, 0.4]
    assert [site.of_weight for site in sites] == [False, False, True, False]
    assert not random_calls(marked.gm)


def test_a_mask_drawn_outside_and_used_inside_a_body_is_left_alone() -> None:
    """The body is a graph of its own, where the proof does not follow the mask."""

    def f(x: Tensor) -> Tensor:
        mask = torch.bernoulli(torch.full_like(x, 0.8))
        y: Tensor = checkpoint(lambda x: x * mask, x, use_reentrant=False)
        return y

    decision = mark(f, data(3, 8)).decision
    assert decision.detail == "tag_activation_checkpoint reads it"


def test_leaves_branches_alone() -> None:
    """The body of a conditional stays a graph of its own, which the later passes never see."""

    def f(x: Tensor) -> Tensor:
        def drops(x: Tensor) -> Tensor:
            return F.dropout(x, 0.3) * (torch.rand_like(x) < 0.8)

        def alpha(x: Tensor) -> Tensor:
            return F.alpha_dropout(x, 0.1, True)

        y: Tensor = torch.cond(x.sum() > 0, drops, alpha, (x,))
        return y

    marked = mark(f, data(3, 8))
    assert not marked.result.modified
    reasons = [(d.kind, d.reason) for d in marked.result.decisions]
    assert reasons == [
        ("dropout", Reason.SUBGRAPH),
        ("rand_like", Reason.SUBGRAPH),
        ("alpha_dropout", Reason.SUBGRAPH),
    ]


def test_gradients_are_those_of_the_masked_program() -> None:
    """Through AOTAutograd: y = x * m * (x > 1) and so on, with the masks that the run drew."""

    def f(x: Tensor) -> Tensor:
        y = F.dropout(x * 2, 0.5)
        keep = torch.rand_like(y) < 0.5
        return torch.where(keep, y * y, 0)

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        MarkDropout().apply(gm)
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    x = data(30, 30).requires_grad_()
    y = torch.compile(f, backend=backend, fullgraph=True)(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    kept = (y != 0).float()
    torch.testing.assert_close(y, kept * (4 * x) ** 2)
    torch.testing.assert_close(grad, kept * 32 * x)
    assert 0.15 < kept.mean() < 0.35


def test_numbers_run_through_sites_and_decisions() -> None:
    def f(x: Tensor) -> Tensor:
        x = F.dropout(x, 0.1)
        x = F.dropout(x, 1.0)
        x = F.dropout(x, 0.0)
        x = x * (torch.rand_like(x) < 0.7)
        x = F.alpha_dropout(x, 0.2, True)
        return F.alpha_dropout(x, 1.0, True)

    result = mark(f, data(3, 8)).result
    assert [(site.index, site.kind) for site in result.sites] == [
        (0, "dropout"),
        (2, "rand_like"),
        (3, "alpha_dropout"),
    ]
    assert [(d.site, d.kind) for d in result.decisions] == [(1, "dropout"), (4, "alpha_dropout")]


def test_marking_twice_changes_nothing() -> None:
    marked = mark(Attention(), data(3, 5, 8))
    assert MarkDropout().apply(marked.gm) == MarkResult(modified=False)
