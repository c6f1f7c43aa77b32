"""Tests of nn.MultiheadAttention opened up: torch's own numbers, whatever the arguments."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from ardd.core.decisions import Reason
from ardd.passes import open_multi_head
from ardd.passes.mark_dropout import MarkDropout
from ardd.passes.open_multi_head import OpenMultiHead

from .attention import maths, rewrite
from .marking import graphs_in, random_calls

pytestmark = pytest.mark.filterwarnings("ignore:Dropout mask should only be used for testing")
NAME = "multi_head_attention_forward"
Q, K, BATCH = 5, 7, 3


@contextlib.contextmanager
def dropping(kept: Tensor) -> Iterator[None]:
    """Lets the functions that torch's own multi-head attention calls drop by a given mask."""

    def attention(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, causal: bool
    ) -> Tensor:
        return maths(q, k, v, mask, p, causal, kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "dropout", lambda x, p: x * kept)
        patch.setattr(F, "scaled_dot_product_attention", attention)
        yield


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def padding() -> Tensor:
    mask = torch.zeros(BATCH, K, dtype=torch.bool)
    mask[0, 4:] = True
    return mask


# name -> arguments of the module, of the call
CASES: Mapping[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "plain": ({}, dict),
    "no bias": ({"bias": False}, dict),
    "batch first": ({"batch_first": True}, dict),
    "bias_kv": ({"add_bias_kv": True}, dict),
    "zero attention": ({"add_zero_attn": True}, dict),
    "bias_kv, padding": ({"add_bias_kv": True}, lambda: {"key_padding_mask": padding()}),
    "both, masked": (
        {"add_bias_kv": True, "add_zero_attn": True},
        lambda: {"key_padding_mask": padding(), "attn_mask": torch.rand(Q, K) < 0.3},
    ),
    "other sizes": ({"kdim": 6, "vdim": 4}, dict),
    "other sizes, no bias": ({"kdim": 6, "vdim": 4, "bias": False}, dict),
    "padding": ({}, lambda: {"key_padding_mask": padding()}),
    "boolean mask": ({}, lambda: {"attn_mask": torch.ones(Q, K).triu(1).bool()}),
    "float mask": ({}, lambda: {"attn_mask": randn(Q, K)}),
    "a mask for every head": ({}, lambda: {"attn_mask": randn(BATCH * 2, Q, K)}),
    "both masks": (
        {},
        lambda: {"attn_mask": randn(Q, K), "key_padding_mask": padding().double() * -9},
    ),
    "causal": ({}, lambda: {"attn_mask": torch.ones(Q, K).triu(1).bool(), "is_causal": True}),
    "weights of every head": ({}, lambda: {"average_attn_weights": False}),
}


def inputs(module: nn.MultiheadAttention, *, batch: bool = True) -> list[Tensor]:
    sizes = [(Q, 8), (K, module.kdim), (K, module.vdim)]
    if not batch:
        return [randn(*size).requires_grad_() for size in sizes]
    shapes = [(BATCH, n, size) if module.batch_first else (n, BATCH, size) for n, size in sizes]
    return [randn(*shape).requires_grad_() for shape in shapes]


def check(
    module: nn.MultiheadAttention, given: list[Tensor], more: dict[str, Any], **how: Any
) -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return module(q, k, v, **more)

    rewritten = rewrite(f, *given, **how)
    assert rewritten.changed
    assert NAME not in rewritten.calls
    assert not random_calls(rewritten.gm)
    (site,) = rewritten.result.sites
    assert (site.kind, site.p, site.mean) == (NAME, 0.3, 1.0)
    assert not rewritten.result.decisions
    results = rewritten.run()
    (kept,) = rewritten.masks
    with dropping(kept):
        expected = [y for y in f(*given) if y is not None]
    torch.testing.assert_close(list(results), expected, rtol=1e-9, atol=1e-9)
    leaves = [*given, *(x for x in more.values() if torch.is_tensor(x) and x.requires_grad)]
    leaves += module.parameters()
    weights = [torch.randn_like(y) for y in expected]
    found = torch.autograd.grad(list(results), leaves, weights)
    wanted = torch.autograd.grad(expected, leaves, weights)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_torch(case: str, need_weights: bool) -> None:
    made, called = CASES[case]
    module = nn.MultiheadAttention(8, 2, dropout=0.3, dtype=torch.float64, **made)
    more = called() | {"need_weights": need_weights}
    for x in more.values():
        if torch.is_tensor(x) and x.is_floating_point():
            x.requires_grad_()  # a learned bias
    check(module, inputs(module), more)


@pytest.mark.parametrize("need_weights", [False, True])
def test_without_a_batch(need_weights: bool) -> None:
    module = nn.MultiheadAttention(8, 2, dropout=0.3, dtype=torch.float64)
    check(module, inputs(module, batch=False), {"need_weights": need_weights})


@pytest.mark.parametrize("need_weights", [False, True])
def test_self_attention(need_weights: bool) -> None:
    """One tensor for all three: one product projects it."""
    module = nn.MultiheadAttention(8, 2, dropout=0.3, dtype=torch.float64)
    x = randn(Q, BATCH, 8).requires_grad_()
    rewritten = rewrite(lambda x: module(x, x, x, need_weights=need_weights), x)
    assert rewritten.calls.count("linear.default") + rewritten.calls.count("aten.linear.default")
    results = rewritten.run()
    with dropping(rewritten.masks[0]):
        expected = module(x, x, x, need_weights=need_weights)
    torch.testing.assert_close(results[0], expected[0])


@pytest.mark.parametrize("need_weights", [False, True])
def test_sizes_that_are_not_constant(need_weights: bool) -> None:
    """The rate is one with torch.compile(dynamic=True) only, so sizes are marked one by one."""
    module = nn.MultiheadAttention(8, 2, dropout=0.3, dtype=torch.float64)
    given = inputs(module)
    for x in given:
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
    check(module, given, {"need_weights": need_weights}, dynamic=None)


def test_a_rate_that_is_not_constant_is_left() -> None:
    module = nn.MultiheadAttention(8, 2, dropout=0.3, dtype=torch.float64)
    rewritten = rewrite(lambda q, k, v: module(q, k, v)[0], *inputs(module), dynamic=True)
    assert not rewritten.changed
    (decision,) = rewritten.result.decisions
    assert (decision.kind, decision.reason) == (NAME, Reason.INSIDE_SDPA)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("ambient", [False, True])
def test_autocast(need_weights: bool, ambient: bool) -> None:
    module = nn.MultiheadAttention(8, 2, dropout=0.3, add_zero_attn=True)
    x = torch.randn(Q, BATCH, 8)

    def f(x: Tensor) -> Any:
        if ambient:
            return module(x, x, x, need_weights=need_weights)
        with torch.autocast("cpu", torch.bfloat16):
            return module(x, x, x, need_weights=need_weights)

    with torch.autocast("cpu", torch.bfloat16, enabled=ambient):
        rewritten = rewrite(f, x)
        results = rewritten.run()
        with dropping(rewritten.masks[0]):
            wanted = [y for y in f(x) if y is not None]
    assert NAME not in rewritten.calls
    assert [y.dtype for y in results] == [y.dtype for y in wanted]
    torch.testing.assert_close(list(results), wanted, rtol=0.05, atol=0.01)


def test_new_nodes_know_the_module() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.MultiheadAttention(8, 2, dropout=0.3)])

        def forward(self, x: Tensor) -> Any:
            return self.blocks[0](x, x, x)[0]

    rewritten = rewrite(Net(), torch.randn(Q, BATCH, 8))
    (site,) = rewritten.result.sites
    line = Net.forward.__code__.co_firstlineno + 1
    assert (site.module, site.source) == ("blocks.0", f"test_open_multi_head.py:{line}")
    for graph in graphs_in(rewritten.gm):
        for node in graph.nodes:
            if node.op.startswith("call"):
                assert node.meta["example_value"] is not None
                assert "test_open_multi_head.py" in (node.stack_trace or "")


def test_inside_a_checkpoint() -> None:
    module = nn.MultiheadAttention(8, 2, dropout=0.3, dtype=torch.float64)

    def f(x: Tensor) -> Any:
        y: Tensor = checkpoint(lambda x: module(x, x, x)[0], x, use_reentrant=False)
        return y

    rewritten = rewrite(f, randn(Q, BATCH, 8).requires_grad_())
    assert [site.kind for site in rewritten.result.sites] == [NAME]


@pytest.mark.parametrize(
    ("made", "training"), [({"dropout": 0.0}, True), ({"dropout": 0.3}, False), ({}, True)]
)
def test_no_dropout_no_change(made: dict[str, Any], training: bool) -> None:
    module = nn.MultiheadAttention(8, 2, **made).train(training)
    x = torch.randn(Q, BATCH, 8, requires_grad=True)
    rewritten = rewrite(lambda x: module(x, x, x)[0], x)
    assert not rewritten.changed
    assert not rewritten.result.decisions


def test_a_rate_of_one_is_left() -> None:
    module = nn.MultiheadAttention(8, 2, dropout=1.0)
    rewritten = rewrite(lambda x: module(x, x, x)[0], torch.randn(Q, BATCH, 8))
    assert not rewritten.changed
    assert [d.reason for d in rewritten.result.decisions] == [Reason.P_IS_ONE]


def test_a_choice_of_the_user_is_left() -> None:
    """Unless the weights are wanted: those torch itself computes without a kernel."""
    module = nn.MultiheadAttention(8, 2, dropout=0.3)

    def f(x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            y: Tensor = module(x, x, x, need_weights=False)[0]
        z: Tensor = y + module(x, x, x)[0]
        return z

    rewritten = rewrite(f, torch.randn(Q, BATCH, 8))
    assert [d.reason for d in rewritten.result.decisions] == [Reason.INSIDE_SDPA]
    assert [site.kind for site in rewritten.result.sites] == [NAME]


def test_what_cannot_be_traced_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("not today")

    monkeypatch.setattr(open_multi_head, "make_fx", fails)
    module = nn.MultiheadAttention(8, 2, dropout=0.3)
    rewritten = rewrite(lambda x: module(x, x, x)[0], torch.randn(Q, BATCH, 8))
    assert not rewritten.changed
    assert [d.reason for d in rewritten.result.decisions] == [Reason.INSIDE_SDPA]


@pytest.mark.parametrize("wrong", ["arguments", "user", "value", "type"])
def test_other_graphs_are_left(wrong: str) -> None:
    """A call that torch would refuse, one with an unusual reader, and one of unknown tensors."""
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    if wrong != "value":
        dtype = torch.complex64 if wrong == "type" else torch.float32
        x.meta["example_value"] = torch.randn(Q, BATCH, 8, dtype=dtype)
        w.meta["example_value"] = torch.randn(24, 8, dtype=dtype)
    args = (x, x, x, 8, 2, w, None, None, None, False, 0.3, w, None)
    call = graph.call_function(
        F.multi_head_attention_forward, args[:4] if wrong == "arguments" else args
    )
    graph.output(call if wrong == "user" else graph.call_function(operator.getitem, (call, 0)))
    gm = fx.GraphModule({}, graph)
    assert not OpenMultiHead().apply(gm).modified
    if wrong != "arguments":
        assert [d.reason for d in MarkDropout().apply(gm).decisions] == [Reason.INSIDE_SDPA]
