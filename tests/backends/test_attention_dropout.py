"""Attention with a dropout inside, compiled: numbers, gradients, rates, types, caches, reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.passes.attention import maths
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import ardd
from ardd.core.decisions import Reason

pytestmark = pytest.mark.filterwarnings("ignore:Dropout mask should only be used for testing")
SDPA = F.scaled_dot_product_attention
NAME = "scaled_dot_product_attention"
MHA = "multi_head_attention_forward"
TARGETS = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]


def compiled(f: Callable[..., Any], target: str = "eager", **how: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    options: dict[str, Any] = {"target": target, "strict": True}
    return torch.compile(f, backend="ardd", options=options, fullgraph=True, **how)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def learned(*shape: int) -> Tensor:
    return randn(*shape).requires_grad_()


def causal_bias() -> Tensor:
    return torch.ones(6, 6, dtype=torch.bool).tril()


CASES: Mapping[str, Callable[[], tuple[Tensor | None, dict[str, Any]]]] = {
    "plain": lambda: (None, {}),
    "causal": lambda: (None, {"is_causal": True}),
    "boolean mask": lambda: (causal_bias(), {}),
    "learned bias": lambda: (learned(2, 1, 6, 6), {"scale": 1.0}),
    "negative scale": lambda: (None, {"scale": -0.4}),
    "grouped": lambda: (None, {"enable_gqa": True}),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_maths_of_torch_with_the_mask_drawn(case: str, target: str) -> None:
    """Identities for values let the dropped probabilities be seen: forward and backward agree."""
    mask, more = CASES[case]()
    heads = 2 if more.get("enable_gqa") else 4
    q, k = learned(2, 4, 6, 8), learned(2, heads, 6, 8)
    v = torch.eye(6, dtype=torch.float64).expand(2, heads, 6, 6).clone().requires_grad_()

    def f(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return SDPA(q, k, v, mask, 0.3, **more)

    y = compiled(f, target)(q, k, v, mask)
    (decision,) = ardd.report().decisions
    assert (decision.kind, decision.reason, decision.p) == (NAME, Reason.NO_PRODUCT, 0.3)
    more = dict(more)
    expected = maths(q, k, v, mask, 0.3, more.pop("is_causal", False), y, **more)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    leaves = [q, k, v] + ([mask] if mask is not None and mask.requires_grad else [])
    weight = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, leaves, weight),
        torch.autograd.grad(expected, leaves, weight),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("target", TARGETS)
def test_weights_of_multi_head_attention(target: str) -> None:
    """It returns what is left of them: from there the whole follows."""
    module = nn.MultiheadAttention(8, 2, dropout=0.3, dtype=torch.float64)
    x = learned(5, 3, 8)

    def f(x: Tensor) -> Any:
        return module(x, x, x, average_attn_weights=False)

    y, weights = compiled(f, target)(x)
    (decision,) = ardd.report().decisions
    assert (decision.kind, decision.reason) == (MHA, Reason.NO_PRODUCT)
    kept = (weights != 0).double().reshape(6, 5, 5) / 0.7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "dropout", lambda x, p: x * kept)
        both = f(x)
    torch.testing.assert_close((y, weights), both, rtol=1e-10, atol=1e-10)
    leaves, by = [x, *module.parameters()], [torch.randn_like(y), torch.randn_like(weights)]
    found = torch.autograd.grad([y, weights], leaves, by)
    torch.testing.assert_close(found, torch.autograd.grad(both, leaves, by), rtol=1e-9, atol=1e-9)


class Pair(nn.Module):
    """Attention by hand and by module."""

    def __init__(self, p: float, need_weights: bool = False) -> None:
        super().__init__()
        self.p, self.need_weights = p, need_weights
        self.qkv = nn.Linear(16, 48)
        self.attention = nn.MultiheadAttention(16, 2, dropout=p, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).unflatten(-1, (3, 2, 8)).movedim(-3, 0).transpose(2, 3)
        q, k, v = parts.unbind()
        y = SDPA(q, k, v, dropout_p=self.p, is_causal=True)
        x = x + y.transpose(1, 2).flatten(2)
        z: Tensor = self.attention(x, x, x, need_weights=self.need_weights)[0]
        return z


def encoder(p: float) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=p, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def gradients(run: Callable[..., Any], module: nn.Module, x: Tensor) -> list[Tensor]:
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("made", [Pair, encoder, lambda p: Pair(p, True)])
def test_a_rate_of_nearly_zero_equals_eager(
    made: Callable[[float], nn.Module], target: str
) -> None:
    """Whatever Inductor makes of attention without a dropout."""
    module, x = made(1e-30).double(), randn(3, 5, 16)
    found = gradients(compiled(module, target), module, x)
    torch.testing.assert_close(found, gradients(module, module, x), rtol=1e-9, atol=1e-9)
    assert all(d.reason is not Reason.INSIDE_SDPA for d in ardd.report().decisions)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("made", [Pair, encoder, lambda p: Pair(p, True)])
def test_gradients_are_those_of_the_loss(made: Callable[[float], nn.Module], target: str) -> None:
    """The slope of the loss for one seed: a mask drawn twice, or another in backward, is none."""
    module, x = made(0.3).double(), randn(3, 5, 16)
    run = compiled(module, target)
    with torch.no_grad():
        way, start = randn(*x.shape), x.clone()

    def loss(at: Tensor) -> Tensor:
        torch.manual_seed(7)
        y: Tensor = run(at).square().sum()
        return y

    x.requires_grad_()
    (grad,) = torch.autograd.grad(loss(x), x)
    step = 1e-5
    ahead = loss((start + step * way).requires_grad_()) - loss(
        (start - step * way).requires_grad_()
    )
    torch.testing.assert_close(
        (grad * way).sum(), ahead.detach() / (2 * step), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("target", TARGETS)
def test_rate(target: str) -> None:
    """Over a hundred thousand draws; every element on its own, another mask at each call."""
    q, v = torch.zeros(8, 4, 64, 8), torch.eye(64).expand(8, 4, 64, 64)
    run = compiled(lambda q, v: SDPA(q, q, v, dropout_p=0.3), target)
    first, second = run(q, v), run(q, v)
    assert not torch.equal(first, second)
    n = first.numel()
    for y in (first, second):
        kept = (y != 0).float()
        assert abs(kept.mean() - 0.7) < 4 * (0.21 / n) ** 0.5
        torch.testing.assert_close(y, kept / 64 / 0.7)
        for dims in ((1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):
            each = kept.mean(dims)
            assert (each - 0.7).abs().max() < 5 * (0.21 * each.numel() / n) ** 0.5


@pytest.mark.parametrize("target", TARGETS)
def test_training_step_of_an_encoder(target: str) -> None:
    """Two layers; the report has a row for every dropout, those in the attention with a module."""
    module, x = encoder(0.25).train(), torch.randn(4, 6, 16)
    found = gradients(compiled(module, target), module, x)
    assert all(grad.isfinite().all() for grad in found)
    rows = [(d.module, d.kind) for d in ardd.report().decisions]
    assert rows == [
        (f"layers.{i}.{name}", MHA if name == "self_attn" else "dropout")
        for i in range(2)
        for name in ("self_attn", "dropout1", "dropout", "dropout2")
    ]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_are_those_of_torch(dtype: torch.dtype, target: str) -> None:
    q = torch.randn(2, 3, 5, 8, dtype=dtype, requires_grad=True)

    def f(q: Tensor) -> Tensor:
        return SDPA(q, q, q, dropout_p=1e-30)

    y, wanted = compiled(f, target)(q), f(q)
    assert (y.dtype, y.stride()) == (wanted.dtype, wanted.stride())
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(y.float().sum(), q),
        torch.autograd.grad(wanted.float().sum(), q),
        atol=2e-2,
        rtol=2e-2,
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("where", ["around", "inside"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast(where: str, need_weights: bool, target: str) -> None:
    """The types of stock, numbers as near to it as bf16 allows, and autocast goes on after it."""
    module, x = Pair(1e-30, need_weights), torch.randn(3, 5, 16)

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        y = module(x)
        return y, y.float() @ y.float().mT

    def g(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return f(x)

    program = f if where == "around" else g
    run = compiled(program, target)
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
        found, wanted = run(x), program(x)
    assert [y.dtype for y in found] == [y.dtype for y in wanted] == [torch.bfloat16] * 2
    torch.testing.assert_close(found, wanted, rtol=0.1, atol=0.03)
    assert not torch.is_autocast_enabled("cpu")


def test_without_gradients() -> None:
    """Torch takes plain maths here as well, and so it is written out too."""
    q = torch.randn(2, 3, 5, 8)
    with torch.no_grad():
        assert torch._fused_sdp_choice(q, q, q, None, 0.3) == SDPBackend.MATH.value
        compiled(lambda q: SDPA(q, q, q, dropout_p=0.3))(q)
    (decision,) = ardd.report().decisions
    assert decision.reason is not Reason.INSIDE_SDPA


def test_new_sizes_take_no_other_compilation_than_in_stock() -> None:
    def f(q: Tensor, k: Tensor) -> Tensor:
        return SDPA(q, k, k, dropout_p=0.3, is_causal=True)

    def count(backend: str, **how: Any) -> int:
        torch._dynamo.reset()
        counters.clear()
        run = torch.compile(f, backend=backend, **how)
        for n, m, batch in ((5, 7, 2), (6, 9, 3), (11, 4, 4), (13, 13, 5)):
            run(torch.randn(batch, 2, n, 8), torch.randn(batch, 2, m, 8))
        return counters["stats"]["unique_graphs"]

    assert count("ardd", options={"target": "eager", "strict": True}) == count("aot_eager") == 2


@pytest.mark.filterwarnings("ignore:.*(attention|fused kernel):UserWarning")
def test_a_fused_kernel_that_the_user_wants_is_refused_by_torch() -> None:
    """No kernel of the CPU drops. Stock raises, and so does this."""
    q = torch.randn(2, 3, 5, 8)

    def f(q: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return SDPA(q, q, q, dropout_p=0.3)

    for backend in ("aot_eager", "ardd"):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"No (available kernel|viable backend)"):
            torch.compile(f, backend=backend)(q)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("made", [Pair, encoder, lambda p: Pair(p, True)])
def test_torch_caches_it(
    made: Callable[[float], nn.Module],
    autocast: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    module, x = made(0.3), torch.randn(3, 5, 16)
    values = []
    for turn in range(2):
        counters.clear()
        run = compiled(module, "inductor")
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = run(x)
        y.float().sum().backward()
        values.append(y)
        counted = {**counters["aot_autograd"], **counters["inductor"]}
        assert not [name for name, n in counted.items() if "bypass" in name and n]
        assert counted.get("autograd_cache_hit", 0) == turn
    torch.testing.assert_close(*values, rtol=0, atol=0)


class Handing(nn.Module):
    """Keeps an nn.Dropout and hands its rate on, like attention of Hugging Face."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return SDPA(x, x, x, dropout_p=self.drop.p if self.training else 0.0)


@pytest.mark.parametrize("pattern", ["auto", "block", "grouped", "row", "window", "deferred"])
def test_keys_are_never_dropped_for_all_queries(pattern: str) -> None:
    """Not even where the values are an input, like a weight; nor is a budget met by it."""
    q, v = torch.randn(2, 4, 64, 64, requires_grad=True), torch.randn(2, 4, 64, 64)
    options: dict[str, Any] = {"target": "eager", "pattern": pattern, "rate_tolerance": 0.5}
    y = torch.compile(lambda q, v: SDPA(q, v, v, dropout_p=0.5), backend="ardd", options=options)
    y(q, v).sum().backward()
    (decision,) = ardd.report().decisions
    expected = Reason.NOT_DEFERRABLE if pattern == "deferred" else Reason.NO_PRODUCT
    assert (decision.taken, decision.reason) == (False, expected)


def test_explain() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Handing()
            self.outer = nn.MultiheadAttention(16, 2, dropout=0.1)

        def forward(self, x: Tensor) -> Any:
            x = self.inner(x)
            return self.outer(x, x, x, need_weights=False)[0]

    report = ardd.explain(Net(), torch.randn(4, 6, 16))
    rows = [(d.module, d.kind, d.reason, d.shape) for d in report.decisions]
    assert rows == [
        ("inner", NAME, Reason.NO_PRODUCT, (4, 6, 6)),
        ("outer", MHA, Reason.NO_PRODUCT, (6, 2, 4, 4)),
    ]
    (note,) = report.notes
    assert note.startswith(f"inner.drop: its rate is an argument of {NAME}")
    assert "STRUCTURED" not in str(report)
