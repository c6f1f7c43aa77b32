"""One recurrent layer: against torch's own RNNs, whatever computes it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.codecache import CppCodeCache
from torch._inductor.exc import InvalidCxxCompiler

import ardd
from ardd.runtime import rnn_cudnn, rnn_layer, rnn_onednn, rnn_packed
from ardd.runtime.rnn_layer import choose_kernel

# Their operands come in lists
run_layer: Any = rnn_layer.run_layer
run_layer_backward: Any = rnn_layer.run_layer_backward

KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *args, **kwargs: nn.RNN(*args, nonlinearity="relu", **kwargs),
}
STEPS, SAMPLES, FEATURES, HIDDEN = 5, 3, 6, 4
# Rounding of a few hundred terms, relative to numbers of the size of 1 to 10. oneDNN's sigmoid and
# tanh are approximations of their own.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}


def compare(
    kind: str,
    kernel: str,
    dtype: torch.dtype = torch.float64,
    *,
    bias: bool = True,
    reverse: bool = False,
    sizes: tuple[int, int, int, int] = (STEPS, SAMPLES, FEATURES, HIDDEN),
    used: tuple[bool, bool, bool] = (True, True, True),
    device: str = "cpu",
    reference: torch.dtype | None = None,
) -> None:
    """Checks results and all gradients against a module of torch, in double precision."""
    steps, samples, features, hidden = sizes
    module = KINDS[kind](features, hidden, bias=bias, device=device, dtype=dtype)
    x = torch.randn(steps, samples, features, device=device, dtype=dtype)
    states = [torch.randn(samples, hidden, device=device, dtype=dtype) for _ in range(2)]
    states = states[: 2 if kind == "lstm" else 1]
    inputs = [t.detach().requires_grad_() for t in (x, *states, *module.parameters())]
    x, h0, *rest = inputs
    c0 = rest.pop(0) if kind == "lstm" else None
    weights = [*rest, *([] if bias else [None, None])]
    y, h, c, *_ = torch.ops.ardd.rnn_layer(x, h0, c0, *weights, kind, reverse, kernel, False)
    have = [y, h, *([c] if kind == "lstm" else [])]

    wide = torch.float64 if reference is None else reference
    module = KINDS[kind](features, hidden, bias=bias, device=device, dtype=wide)
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), rest, strict=True):
            parameter.copy_(value)
    x2, *states2 = (t.detach().to(wide).requires_grad_() for t in inputs[: 1 + len(states)])
    first = tuple(state[None] for state in states2)
    y2, last = module(x2.flip(0) if reverse else x2, first if kind == "lstm" else first[0])
    y2 = y2.flip(0) if reverse else y2
    want = [y2, *(state[0] for state in (last if kind == "lstm" else (last,)))]

    for a, b in zip(have, want, strict=True):
        close(a, b, dtype)
    seeds = [torch.randn_like(a) for a in have]

    def grads(results: list[Tensor], to: list[Tensor]) -> tuple[Tensor | None, ...]:
        loss = sum(
            (r * s.to(r.dtype)).sum() for r, s, u in zip(results, seeds, used, strict=False) if u
        )
        assert isinstance(loss, Tensor)
        return torch.autograd.grad(loss, to, allow_unused=True)

    expected = grads(want, [x2, *states2, *module.parameters()])
    for a, b in zip(grads(have, inputs), expected, strict=True):
        close(a, b, dtype)


def close(a: Tensor | None, b: Tensor | None, dtype: torch.dtype) -> None:
    assert a is not None
    b = torch.zeros_like(a) if b is None else b
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loop(kind: str, bias: bool, reverse: bool) -> None:
    compare(kind, "loop", bias=bias, reverse=reverse)


@pytest.mark.parametrize("kernel", ["onednn", "packed"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_lstm_on_a_cpu(bias: bool, reverse: bool, kernel: str) -> None:
    compare("lstm", kernel, torch.float32, bias=bias, reverse=reverse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_loop_in_other_types(kind: str, dtype: torch.dtype) -> None:
    compare(kind, "loop", dtype)


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="needs bfloat16 in oneDNN"
)
def test_onednn_in_bfloat16() -> None:
    """It rounds as nn.LSTM does, which runs it too."""
    compare("lstm", "onednn", torch.bfloat16, reference=torch.bfloat16)


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="needs bfloat16 in oneDNN"
)
def test_gradients_of_onednn_have_the_type_of_the_arguments() -> None:
    """OneDNN itself gives float32, which the next product of a compiled graph would refuse."""
    shapes = [(STEPS, SAMPLES, 16), (SAMPLES, 16), (SAMPLES, 16), (64, 16), (64, 16), (64,), (64,)]
    given = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    results = torch.ops.ardd.rnn_layer(*given, "lstm", False, "onednn", True)
    y, _, c, *kept = results
    call = ("lstm", False, "onednn", [True] * 7)
    grads = torch.ops.ardd.rnn_layer_backward(y, None, None, *given, y, c, *kept, *call)
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 7


USED = [used for used in itertools.product([False, True], repeat=3) if any(used)]


@pytest.mark.parametrize("used", USED[:-1])
@pytest.mark.parametrize("kernel", ["loop", "onednn", "packed"])
def test_results_that_nobody_uses(kernel: str, used: tuple[bool, bool, bool]) -> None:
    """Their gradients are missing, not zeros."""
    compare("lstm", kernel, torch.float32, used=used)
    compare("lstm", kernel, torch.float32, used=used, reverse=True)


@pytest.mark.parametrize("sizes", [(1, 3, 6, 4), (5, 1, 1, 1), (5, 3, 17, 33), (5, 3, 40, 4)])
@pytest.mark.parametrize(
    ("kind", "kernel"),
    [(kind, "loop") for kind in KINDS] + [("lstm", "onednn"), ("lstm", "packed")],
)
def test_sizes(kind: str, kernel: str, sizes: tuple[int, int, int, int]) -> None:
    compare(kind, kernel, torch.float32, sizes=sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_no_samples(kind: str) -> None:
    compare(kind, "loop", sizes=(5, 0, 6, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_no_steps(kind: str) -> None:
    """Torch refuses this; here the state stays what it was."""
    tensors = operands(kind, steps=0)
    y, h, *_ = torch.ops.ardd.rnn_layer(*tensors, kind, False, "loop", False)
    assert y.shape == (0, SAMPLES, HIDDEN)
    assert torch.equal(h, tensors[1])
    assert not torch.autograd.grad(h.sum(), tensors[4])[0].any()


@pytest.mark.cuda
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_cudnn(kind: str, dtype: torch.dtype, bias: bool, reverse: bool) -> None:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        compare(kind, "cudnn", dtype, bias=bias, reverse=reverse, device="cuda")
        compare(kind, "loop", dtype, bias=bias, reverse=reverse, device="cuda")


def operands(kind: str, dtype: torch.dtype = torch.float64, *, steps: int = STEPS) -> list[Any]:
    rows = {"lstm": 4, "gru": 3}.get(kind, 1) * HIDDEN
    shapes = [(steps, SAMPLES, FEATURES), (SAMPLES, HIDDEN), (SAMPLES, HIDDEN)]
    shapes += [(rows, FEATURES), (rows, HIDDEN), (rows,), (rows,)]
    tensors: list[Any] = [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]
    if kind != "lstm":
        tensors[2] = None
    return tensors


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_finite_differences(kind: str, reverse: bool) -> None:
    tensors = operands(kind, steps=3)
    given = [t for t in tensors if t is not None]

    def fn(*given: Tensor) -> tuple[Tensor, ...]:
        rest = iter(given)
        args = [None if t is None else next(rest) for t in tensors]
        y, h, c, *_ = torch.ops.ardd.rnn_layer(*args, kind, reverse, "loop", False)
        return (y, h, c) if kind == "lstm" else (y, h)

    assert torch.autograd.gradcheck(fn, given)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_wanted_has_a_gradient(kind: str) -> None:
    """A first layer on data costs no gradient of the data."""
    tensors = [t if t is None else t.detach() for t in operands(kind)]
    y, _, c, *reserved = run_layer(*tensors, kind, False, "loop", True)
    dy = torch.ones_like(y)
    for at, tensor in enumerate(tensors):
        wanted = [i == at for i in range(7)]
        grads = run_layer_backward(
            dy, None, None, *tensors, y, c, *reserved, kind, False, "loop", wanted
        )
        if tensor is not None:
            assert [g.numel() > 0 for g in grads] == wanted
            assert grads[at].shape == tensor.shape


def test_operands_in_any_order_of_memory() -> None:
    """Transposed, sliced and expanded, for every kernel."""
    base = operands("lstm", torch.float32)
    odd = list(base)
    odd[0] = base[0].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    odd[1] = base[1].detach().t().contiguous().t().requires_grad_()
    odd[3] = base[3].detach().t().contiguous().t().requires_grad_()
    odd[4] = torch.stack([base[4].detach()] * 2, 2)[..., 0].requires_grad_()
    for kernel in ("loop", "onednn"):
        results = []
        for tensors in (base, odd):
            y, h, c, *_ = torch.ops.ardd.rnn_layer(*tensors, "lstm", False, kernel, False)
            seed = torch.ones(1, 1, HIDDEN).expand_as(y)
            grads = torch.autograd.grad([y, h, c], tensors, [seed, seed[0], seed[1]])
            results.append([y, h, c, *grads])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_second_derivative_is_refused() -> None:
    tensors = operands("gru")
    y, *_ = torch.ops.ardd.rnn_layer(*tensors, "gru", False, "loop", False)
    (dx,) = torch.autograd.grad(y.sum(), tensors[0], create_graph=True)
    with pytest.raises(ardd.DerivativeError, match="has no second derivative"):
        dx.square().sum().backward()


def test_no_gradient_keeps_nothing() -> None:
    tensors = operands("lstm")
    with torch.no_grad():
        results = torch.ops.ardd.rnn_layer(*tensors, "lstm", False, "loop", False)
    assert results[3].numel() == 0
    assert not any(result.requires_grad for result in results)


def test_unknown_kernel() -> None:
    with pytest.raises(ValueError, match="Kernel 'fast' is not known"):
        run_layer(*operands("lstm"), "lstm", False, "fast", False)


def test_choice_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 3, 6)
    onednn = "onednn" if torch.backends.mkldnn.is_available() else "loop"
    assert choose_kernel("lstm", x, 4) == onednn
    assert choose_kernel("lstm", x.double(), 4) == "loop"
    assert choose_kernel("lstm", x.half(), 4) == "loop"
    assert choose_kernel("lstm", x[:, :0], 4) == "loop"
    assert choose_kernel("gru", x, 4) == "loop"
    # A state's weight of 16 MiB, and few samples that share a reading of it
    assert choose_kernel("lstm", x, 1024) == ("packed" if onednn == "onednn" else "loop")
    assert choose_kernel("lstm", x, 1023) == onednn
    assert choose_kernel("lstm", x.expand(5, 3, 6).repeat(1, 11, 1), 1024) == onednn
    assert choose_kernel("lstm", x.double(), 1024) == "loop"
    assert choose_kernel("gru", x, 1024) == "loop"
    assert choose_kernel("lstm", x, 4, projected=True) == (
        "packed" if onednn == "onednn" else "loop"
    )
    assert choose_kernel("gru", x, 4, projected=True) == "loop"
    monkeypatch.setattr(torch._C, "_get_mkldnn_enabled", lambda: False)
    assert choose_kernel("lstm", x, 4) == "loop"
    monkeypatch.setattr(rnn_cudnn, "supports", lambda x: True)
    assert choose_kernel("gru", x, 4) == "cudnn"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kind", "kernel"), [(k, "loop") for k in KINDS] + [("lstm", "packed")])
def test_an_input_that_is_projected_already(kind: str, kernel: str, bias: bool) -> None:
    """As with the weight, and x takes the gradient of the product."""
    dtype = torch.float64 if kernel == "loop" else torch.float32
    x, h0, c0, w_ih, w_hh, b_ih, b_hh = operands(kind, dtype)
    b_hh = b_hh if bias else None
    leaves = [t for t in (x, h0, c0, w_ih, w_hh, b_ih, b_hh) if t is not None]
    whole = results_and_grads(leaves, x, h0, c0, w_ih, w_hh, b_ih, b_hh, kind, True, kernel)
    projected = torch.nn.functional.linear(x, w_ih, b_ih)
    before = projected.detach().clone()
    apart = results_and_grads(leaves, projected, h0, c0, None, w_hh, None, b_hh, kind, True, kernel)
    assert torch.equal(projected, before)
    for a, b in zip(apart, whole, strict=True):
        torch.testing.assert_close(a, b)


def results_and_grads(leaves: list[Tensor], *args: Any) -> list[Tensor]:
    results = torch.ops.ardd.rnn_layer(*args, False)[:3]
    used = [result for result in results if result.requires_grad]
    loss = torch.stack([(r * torch.linspace(-1, 1, r.numel()).view(r.shape)).sum() for r in used])
    return [*results, *torch.autograd.grad(loss.sum(), leaves)]


# ---- the recurrence in C++ ---------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2, 9, 10, 11, 20, 21, 31])
@pytest.mark.parametrize("hidden", [1, 15, 16, 31, 32, 33, 70])
def test_edges_of_tiles_and_panels(samples: int, hidden: int) -> None:
    compare(
        "lstm", "packed", torch.float32, sizes=(4, samples, 5, hidden), reverse=samples % 2 == 1
    )


def test_more_units_than_a_panel_keeps_in_cache() -> None:
    """One product is summed up in several parts."""
    compare("lstm", "packed", torch.float32, sizes=(2, 3, 5, 1601))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_number_of_threads(threads: int) -> None:
    """With 7 there are threads without units."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare("lstm", "packed", torch.float32, sizes=(5, 4, 6, 70))
    finally:
        torch.set_num_threads(before)


def test_layers_that_share_a_workspace() -> None:
    """It grows, and a smaller layer after that does not see what a larger one left."""
    for hidden in (33, 100, 10, 64):
        compare("lstm", "packed", torch.float32, sizes=(3, 2, 6, hidden))


def single_step(gates: Tensor) -> list[Tensor]:
    """Returns y, and the gradient of what the input adds to the gates, of one unit each sample."""
    x, zeros = gates.requires_grad_(), torch.zeros(len(gates[0]), 1)
    weights = torch.eye(4), torch.zeros(4, 1)
    given = (x, zeros, zeros + 0.5, *weights, None, None, "lstm", False, "packed", True)
    y = torch.ops.ardd.rnn_layer(*given)[0]
    return [y, *torch.autograd.grad(y.sum(), x)]


def test_sigmoid_and_tanh() -> None:
    """Against double precision, from where they are linear to where they no longer move."""
    sizes = torch.cat(
        [torch.logspace(-30, 2.5, 200), torch.tensor([0.6249, 0.625, 0.6251, 88, 89])]
    )
    values = torch.cat([-sizes, torch.zeros(1), sizes])
    for place in range(4):
        gates = torch.full((1, len(values), 4), 0.3)
        gates[..., place] = values
        y, grad = single_step(gates.clone())
        exact = gates.double().requires_grad_()
        i, f, g, o = exact.unbind(-1)
        want = o.sigmoid() * (f.sigmoid() * 0.5 + i.sigmoid() * g.tanh()).tanh()
        (want_grad,) = torch.autograd.grad(want.sum(), exact)
        torch.testing.assert_close(y[..., 0].double(), want, rtol=2e-6, atol=1e-38)
        # A derivative is a difference from 1: what is left of it near 1 is rounding
        torch.testing.assert_close(grad.double(), want_grad, rtol=2e-5, atol=1e-7)


def test_not_a_number_and_overflow() -> None:
    gates = torch.zeros(1, 4, 4)
    gates[0, 0, 0] = gates[0, 1, 2] = torch.nan
    gates[0, 2] = 3e38
    gates[0, 3] = -3e38
    y, _ = single_step(gates)
    assert y[0, :2].isnan().all()
    torch.testing.assert_close(y[0, 2:, 0], torch.tensor([1.5, 0.0]).tanh())


def test_tensors_of_any_strides() -> None:
    tensors = operands("lstm", torch.float32)
    plain = [tensor.detach() for tensor in tensors]
    strided = [t.t().contiguous().t() if t.dim() == 2 else t for t in plain]
    strided[0] = plain[0].transpose(0, 2).contiguous().transpose(0, 2)
    for a, b in zip(both_ways(strided, kernel="packed"), both_ways(plain), strict=True):
        assert a.is_contiguous()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kernel", ["loop", "packed"])
def test_what_is_given_is_left_as_it_is(kernel: str) -> None:
    tensors = data()
    before = [tensor.clone() for tensor in tensors]
    results = run_layer(*tensors, "lstm", False, kernel, True)
    y, h, c, *reserved = results
    kept = [tensor.clone() for tensor in results]
    args = (y, h, c, *tensors, y, c, *reserved, "lstm", False, kernel, [True] * 7)
    run_layer_backward(*args)
    for a, b in zip([*tensors, *results], [*before, *kept], strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def load(source: str, **options: Any) -> Any:
        raise InvalidCxxCompiler

    monkeypatch.setattr(CppCodeCache, "load", load)
    rnn_packed._library.cache_clear()
    yield
    rnn_packed._library.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler() -> None:
    """oneDNN runs the layer; a program that was compiled elsewhere says what is missing."""
    assert choose_kernel("lstm", torch.randn(5, 3, 6), 1024) in ("onednn", "loop")
    with pytest.raises(RuntimeError, match="compiler available"):
        run_layer(*data(), "lstm", False, "packed", True)


@pytest.mark.parametrize(("place", "name"), [(1, "h0"), (2, "c0"), (4, "w_hh")])
def test_sizes_that_do_not_fit(place: int, name: str) -> None:
    """The C++ would read behind them."""
    tensors = data()
    tensors[place] = tensors[place][:1]
    with pytest.raises(ValueError, match=f"{name} has the shape \\(1, 4\\). Expected"):
        run_layer(*tensors, "lstm", False, "packed", True)


def test_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    no_memory = SimpleNamespace(lstm_forward=lambda *args: 0)
    monkeypatch.setattr(rnn_packed, "_library", lambda: no_memory)
    with pytest.raises(MemoryError, match="packed copy"):
        run_layer(*data(), "lstm", False, "packed", True)


# ---- the memory that oneDNN keeps, of which the graph sees a part -------------------------


def both_ways(
    tensors: list[Any],
    change: Callable[[list[Any]], None] = lambda r: None,
    kernel: str = "onednn",
) -> Any:
    """Returns the gradients of a layer, with what its forward saved changed before backward."""
    y, _, c, *reserved = run_layer(*tensors, "lstm", False, kernel, True)
    change(reserved)
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape)
    return run_layer_backward(
        dy, None, None, *tensors, y, c, *reserved, "lstm", False, kernel, [True] * 7
    )


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes for every forward on oneDNN how many features it had."""
    seen: list[int] = []
    forward = rnn_onednn.forward

    def counted(x: Tensor, *args: Any) -> Any:
        seen.append(x.shape[2])
        return forward(x, *args)

    monkeypatch.setattr(rnn_onednn, "forward", counted)
    return seen


def data() -> list[Any]:
    return [tensor.detach() for tensor in operands("lstm", torch.float32)]


def test_the_workspace_is_used_again(runs: list[int]) -> None:
    both_ways(data())
    assert runs == [FEATURES]


def test_a_copy_of_the_workspace_has_lost_it(runs: list[int]) -> None:
    """What oneDNN reads would lie outside of the copy: the forward runs again."""
    tensors = data()

    def copy(reserved: list[Any]) -> None:
        reserved[0] = reserved[0].clone()

    def copy_with_room(reserved: list[Any]) -> None:
        size = reserved[0].untyped_storage().nbytes()
        reserved[0] = torch.zeros(size, dtype=torch.uint8)[: len(reserved[0])].copy_(reserved[0])

    for change in (copy, copy_with_room):
        runs.clear()
        for a, b in zip(both_ways(tensors, change), both_ways(tensors), strict=True):
            torch.testing.assert_close(a, b)
        assert runs == [FEATURES] * 3


def test_features_that_only_the_backward_has(runs: list[int]) -> None:
    """The forward left zeros of the input out, the backward has them: the forward runs again."""
    tensors = data()
    tensors[0][..., 4:] = 0
    cut = [tensors[0][..., :4], *tensors[1:3], tensors[3][:, :4], *tensors[4:]]
    y, _, c, *reserved = run_layer(*cut, "lstm", False, "onednn", True)
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape)
    rest = (y, c, *reserved, "lstm", False, "onednn", [True] * 7)
    grads = run_layer_backward(dy, None, None, *tensors, *rest)
    for a, b in zip(grads, both_ways(tensors), strict=True):
        torch.testing.assert_close(a, b)
    assert runs == [4, FEATURES, FEATURES]


def test_features_that_only_the_forward_had() -> None:
    """The rules of the support analysis rule it out, and it would be wrong."""
    tensors = data()
    y, _, c, *reserved = run_layer(*tensors, "lstm", False, "onednn", True)
    cut = [tensors[0][..., :4], *tensors[1:3], tensors[3][:, :4], *tensors[4:]]
    rest = (y, c, *reserved, "lstm", False, "onednn", [True] * 7)
    with pytest.raises(AssertionError, match="6 features forward, 4 backward"):
        run_layer_backward(y, None, None, *cut, *rest)


def test_a_workspace_that_is_smaller_than_the_graph_thinks(
    runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = data()
    want = both_ways(tensors)
    monkeypatch.setattr(rnn_onednn, "workspace_bytes", lambda x, hidden: 1_000_000)
    for a, b in zip(both_ways(tensors), want, strict=True):
        torch.testing.assert_close(a, b)
    assert runs == [FEATURES] * 2


# ---- what torch asks of an op ------------------------------------------------------------


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize(
    ("kind", "kernel"),
    [("lstm", "loop"), ("gru", "loop"), ("lstm", "onednn"), ("lstm", "packed")],
)
def test_opcheck(kind: str, kernel: str, save: bool) -> None:
    dtype = torch.float64 if kernel == "loop" else torch.float32
    tensors = operands(kind, dtype)
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_static"]
    if kernel == "onednn" and save:
        checks.pop()  # it compares every byte of the workspace, some of which nobody wrote
    op = torch.ops.ardd.rnn_layer.default
    given = [t if t is None else t.detach() for t in tensors] if not save else tensors
    torch.library.opcheck(op, (*given, kind, False, kernel, save), test_utils=checks)
    detached = [t if t is None else t.detach() for t in tensors]
    y, _, c, *reserved = run_layer(*detached, kind, False, kernel, True)
    wanted = [t is not None for t in tensors]
    args = (y, None, None, *detached, y, c, *reserved, kind, False, kernel, wanted)
    backward = torch.ops.ardd.rnn_layer_backward.default
    torch.library.opcheck(backward, args, test_utils=("test_schema", "test_faketensor"))


def test_module_is_documented_op() -> None:
    assert rnn_layer.rnn_layer is torch.ops.ardd.rnn_layer.default
