"""``eager_masks`` lets eager code drop what the compiled model drops."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ardd.backends import eager_masks as under_test
from ardd.backends.eager_masks import eager_masks

RANDOM: dict[str, Any] = {"pattern": "random", "strict": True}
TARGETS = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]


def run(fn: Callable[..., Any], *inputs: Tensor, steps: int) -> list[Tensor]:
    """Returns results and gradients of some steps, and the state of the generator after them."""
    leaves = [x for x in inputs if x.requires_grad]
    leaves += list(fn.parameters()) if isinstance(fn, nn.Module) else []
    leaves = [x for x in leaves if x.requires_grad]
    torch.manual_seed(11)
    results = []
    for _ in range(steps):
        y = fn(*inputs)
        results.append(y.detach().clone())
        results += torch.autograd.grad(y.square().sum(), leaves) if leaves else []
    return [*results, torch.get_rng_state()]


def check(
    fn: Callable[..., Any],
    *inputs: Tensor,
    target: str = "eager",
    steps: int = 3,
    bits: bool = False,
) -> list[Tensor]:
    """Compares eager with compiled code, and returns what the latter gave."""
    compiled = torch.compile(
        fn, backend="ardd", fullgraph=True, options=RANDOM | {"target": target}
    )
    run(compiled, *inputs, steps=1)
    got = run(compiled, *inputs, steps=steps)
    with eager_masks():
        expected = run(fn, *inputs, steps=steps)
    tolerance = 0.0 if bits else 2e-4
    for ours, eager in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, eager, rtol=tolerance, atol=tolerance)
    return got


def module_inplace(x: Tensor) -> Tensor:
    return nn.Dropout(0.5, inplace=True)(x * 1)  # type: ignore[no-any-return]


DROPOUTS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "dropout": (lambda x: F.dropout(x, 0.5), (33, 70)),
    "dropout, rare": (lambda x: F.dropout(x, 0.01), (64, 128)),
    "dropout, often": (lambda x: F.dropout(x, 0.9), (64, 128)),
    "dropout, one dimension": (lambda x: F.dropout(x, 0.3), (200,)),
    "dropout, turned": (lambda x: F.dropout(x.transpose(0, 1), 0.3), (33, 64)),
    "dropout of torch": (lambda x: torch.dropout(x, 0.3, True), (33, 64)),
    "dropout, train=": (lambda x: torch.dropout(x, p=0.3, train=True), (33, 64)),
    "dropout, module": (nn.Dropout(0.3), (33, 64)),
    "dropout, inplace": (lambda x: F.dropout(x * 1, 0.3, inplace=True), (33, 64)),
    "dropout, module inplace": (module_inplace, (33, 64)),
    "dropout, _": (lambda x: torch.dropout_(x * 1, 0.3, True), (33, 64)),
    "dropout1d": (lambda x: F.dropout1d(x, 0.5), (8, 33, 6)),
    "dropout1d, no batch": (lambda x: F.dropout1d(x, 0.5), (200, 6)),
    "dropout1d, module": (nn.Dropout1d(0.5), (8, 33, 6)),
    "dropout2d": (lambda x: F.dropout2d(x, 0.5), (8, 33, 6, 5)),
    "dropout2d, module": (nn.Dropout2d(0.5), (8, 33, 6, 5)),
    "dropout2d, inplace": (lambda x: F.dropout2d(x * 1, 0.5, inplace=True), (8, 33, 6, 5)),
    "dropout3d": (lambda x: F.dropout3d(x, 0.5), (8, 33, 3, 2, 2)),
    "dropout3d, no batch": (lambda x: F.dropout3d(x, 0.5), (200, 3, 2, 2)),
    "dropout3d, module": (nn.Dropout3d(0.5), (8, 33, 3, 2, 2)),
    "feature_dropout": (lambda x: torch.feature_dropout(x, 0.5, True), (8, 33, 6)),
    "feature_dropout, _": (lambda x: torch.feature_dropout_(x * 1, 0.5, True), (8, 33, 6)),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", DROPOUTS)
def test_masks(name: str, target: str) -> None:
    """The masks are the same bit by bit, step after step, and another in every step."""
    fn, shape = DROPOUTS[name]
    *ours, _ = check(fn, torch.ones(shape), target=target, bits=True)
    assert not torch.equal(ours[0], ours[1])
    assert (ours[0] == 0).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_masks_of_other_types(dtype: torch.dtype) -> None:
    check(lambda x: F.dropout(x, 0.3) != 0, torch.ones(33, 64, dtype=dtype), bits=True)


def test_masks_of_channels_last() -> None:
    """The order of memory changes nothing."""
    x = torch.ones(4, 64, 6, 5).to(memory_format=torch.channels_last)
    (plain, *_) = check(lambda x: F.dropout(x, 0.3), torch.ones(4, 64, 6, 5), bits=True)
    torch._dynamo.reset()
    (turned, *_) = check(lambda x: F.dropout(x, 0.3), x, bits=True)
    assert torch.equal(plain, turned)


@pytest.mark.parametrize("name", DROPOUTS)
def test_gradients(name: str) -> None:
    fn, shape = DROPOUTS[name]
    check(lambda x: fn(x.sin()), torch.randn(shape).requires_grad_())


def mlp() -> nn.Module:
    layers = [nn.Dropout(0.2), nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 8))


def convolutions() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Dropout2d(0.5), nn.Conv2d(16, 8, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Dropout(0.25), nn.Flatten(), nn.Linear(128, 5))


def encoder() -> nn.Module:
    """With dropout inside its attention, which ardd writes out on a CPU."""
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 2, 24).transpose(1, 2).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, is_causal=True)


class Odd(nn.Module):
    """Dropouts that are off, that drop everything, and whose result nobody reads."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.0)
        F.dropout(x, 0.3)
        x = F.dropout(x, 0.4, training=False) + F.dropout(x, 1.0)
        return F.dropout(F.dropout(x, 0.5), 0.25)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (32, 16)),
    "convolutions": (convolutions, (4, 3, 8, 8)),
    "encoder": (encoder, (4, 6, 16)),
    "attention": (Attention, (4, 6, 16)),
    "odd": (Odd, (33, 64)),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, target: str) -> None:
    build, shape = MODELS[name]
    check(build(), torch.randn(shape), target=target)


@pytest.mark.parametrize("name", MODELS)
def test_models_without_gradients(name: str) -> None:
    build, shape = MODELS[name]
    model = build().requires_grad_(False)
    with torch.no_grad():
        check(model, torch.randn(shape))


class Recurrent(nn.Module):
    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(8, 12, num_layers=3, dropout=0.4, **options)

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.rnn(F.dropout(x, 0.25))
        states = state if isinstance(state, tuple) else (state,)
        return torch.cat([y.flatten(), *(s.flatten() for s in states)])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers(kind: str, bidirectional: bool, batch_first: bool) -> None:
    """Between the layers, whose elements are counted in steps of time first."""
    model = Recurrent(kind, batch_first=batch_first, bidirectional=bidirectional)
    with torch._dynamo.config.patch(allow_rnn=True):
        check(model, torch.randn(5, 4, 8))


def test_recurrent_layers_without_dropout() -> None:
    """What does not drop runs as it is."""
    x = torch.randn(5, 4, 8)
    for rnn in (nn.LSTM(8, 12, num_layers=1), nn.LSTM(8, 12, 2), nn.LSTM(8, 12, 2).eval()):
        expected, _ = rnn(x)
        with eager_masks():
            torch.testing.assert_close(rnn(x)[0], expected, rtol=0, atol=0)


def test_the_mask_is_a_dropout() -> None:
    """Half of it is dropped, the rest is doubled."""
    with eager_masks():
        y = F.dropout(torch.ones(200, 200), 0.5)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert abs((y == 0).float().mean() - 0.5) < 0.02


def stock(x: Tensor) -> Tensor:
    """Returns what torch itself drops after a certain seed."""
    torch.manual_seed(3)
    return F.dropout(x, 0.5)


def test_outside_nothing_changes() -> None:
    """Before, after, and after an error inside."""
    x = torch.ones(64, 64)
    names = ("dropout", "dropout2d", "scaled_dot_product_attention", "multi_head_attention_forward")
    functions = [getattr(F, name) for name in names]
    before = stock(x)
    with eager_masks():
        inside = stock(x)
        encoder()(torch.randn(2, 3, 16))
    assert not torch.equal(before, inside)
    assert torch.equal(before, stock(x))
    with pytest.raises(ZeroDivisionError), eager_masks():
        raise ZeroDivisionError
    assert torch.equal(before, stock(x))
    assert functions == [getattr(F, name) for name in names]


def test_what_does_not_drop_draws_nothing() -> None:
    x = torch.randn(8, 8)
    with eager_masks():
        state = torch.get_rng_state()
        for y in (F.dropout(x, 0.5, False), F.dropout(x, 0.0), nn.Dropout(0.5).eval()(x)):
            assert torch.equal(y, x)
        assert not F.dropout(x, 1.0).any()
        assert torch.equal(torch.get_rng_state(), state)
        with pytest.raises(ValueError, match="probability"):
            F.dropout(x, 1.5)


def in_a_thread(fn: Callable[[], Tensor]) -> Tensor:
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(fn()))
    thread.start()
    thread.join()
    (result,) = results
    return result


def test_other_threads_drop_as_ever() -> None:
    x = torch.ones(64, 64)
    expected = stock(x)
    with eager_masks():
        assert not torch.equal(stock(x), expected)
        assert torch.equal(in_a_thread(lambda: stock(x)), expected)


def test_other_threads_drop_as_ever_during_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a function of torch is replaced, it is for the thread that opened the context alone."""
    x = torch.ones(64, 64)
    expected, seen = stock(x), []
    theirs = under_test._attention

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(in_a_thread(lambda: stock(x)))
        return theirs(*args, **kwargs)

    monkeypatch.setattr(under_test, "_attention", attention)
    with eager_masks():
        encoder()(torch.randn(2, 3, 16))
    assert len(seen) == 1
    assert torch.equal(seen[0], expected)


def test_contexts_nest() -> None:
    x = torch.ones(64, 64)
    with eager_masks():
        once = stock(x)
        with eager_masks():
            assert torch.equal(stock(x), once)
        assert torch.equal(stock(x), once)
