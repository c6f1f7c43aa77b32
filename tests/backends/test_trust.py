"""What a training loop relies on without thinking of it, under every switch that torch has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ardd

from .yardstick import (
    EAGER,
    Net,
    assert_same_step,
    check_exact,
    compiled_net,
    replayed,
    same_draws,
    step,
)

# ---- types ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parameters_of_every_type(dtype: torch.dtype) -> None:
    compiled, model = compiled_net()
    model.to(dtype)
    check_exact(compiled, model, torch.randn(6, 16, dtype=dtype, requires_grad=True))


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside: bool) -> None:
    """Entered in the compiled program or outside of it: products in bf16, gradients in fp32."""
    model = Net()

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)  # type: ignore[no-any-return]

    def compiled_inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return compiled(x)  # type: ignore[no-any-return]

    compiled = torch.compile(autocast if inside else model, backend="ardd", options=EAGER)
    x = torch.randn(6, 16, requires_grad=True)
    got = step(compiled if inside else compiled_inside, model, x)
    assert got.output.dtype == torch.bfloat16
    assert {grad.dtype for grad in got.grads.values()} == {torch.float32}
    with replayed(ardd.report().decisions, got.draws):
        assert_same_step(got, step(autocast, model, x), torch.bfloat16)


# ---- modes ------------------------------------------------------------------------------


def test_no_grad_drops_too() -> None:
    """Monte-Carlo dropout: in training mode masks are drawn without a gradient as well."""
    compiled, model = compiled_net()
    x = torch.randn(6, 16)
    with torch.no_grad(), ardd.record_masks() as draws:
        got = compiled(x)
    (graph,) = ardd.report().graphs
    assert graph.inference
    assert not got.requires_grad
    with torch.no_grad(), replayed(graph.decisions, draws):
        assert (got - model(x)).abs().max() < 1e-6


def test_inference_mode_and_frozen_parameters() -> None:
    compiled, model = compiled_net()
    x = torch.randn(6, 16)
    with torch.inference_mode():
        assert compiled(x).is_inference()
    model.requires_grad_(False)
    assert not compiled(x).requires_grad
    assert all(graph.inference for graph in ardd.report().graphs)


def test_eval_is_the_program_itself() -> None:
    compiled, model = compiled_net()
    model.eval()
    x = torch.randn(6, 16, requires_grad=True)
    got, expected = step(compiled, model, x), step(model, model, x)
    assert got.draws == []
    assert_same_step(got, expected)
    (graph,) = ardd.report().graphs
    assert graph.decisions == ()
    assert not graph.inference


def test_toggling_modes_compiles_each_once() -> None:
    compiled, model = compiled_net()
    x = torch.randn(6, 16)
    for _ in range(4):
        model.train()
        check_exact(compiled, model, x)
        model.eval()
        with torch.no_grad():
            compiled(x)
    assert len(ardd.report().graphs) == 2


def test_uneven_batches_compile_a_bounded_number_of_times() -> None:
    """Full batches, a last one that is smaller, over and over; then any size, 1 included."""
    compiled, model = compiled_net()
    for _ in range(2):
        for batch in (8, 8, 8, 5):
            check_exact(compiled, model, torch.randn(batch, 16))
    assert len(ardd.report().graphs) == 2
    for batch in (7, 3, 12, 1, 8, 2):
        check_exact(compiled, model, torch.randn(batch, 16))
    assert len(ardd.report().graphs) <= 3  # torch compiles size 1 for itself


def test_empty_batch() -> None:
    compiled, _ = compiled_net()
    assert compiled(torch.randn(0, 16)).shape == (0, 8)


# ---- training loops ---------------------------------------------------------------------


def test_gradients_accumulate() -> None:
    compiled, model = compiled_net()
    inputs = torch.randn(2, 6, 16)
    runs = [step(compiled, model, x) for x in inputs]
    model.zero_grad()
    decisions = ardd.report().decisions
    for x, run in zip(inputs, runs, strict=True):
        with replayed(decisions, run.draws):
            output = model(x)
        (output * torch.arange(1, 49).view(6, 8).cos()).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    for name, grad in expected.items():
        assert grad is not None
        total = runs[0].grads[name] + runs[1].grads[name]
        assert (grad - total).abs().max() <= 1e-4 * grad.abs().max()


def test_every_step_has_masks_of_its_own() -> None:
    compiled, model = compiled_net(width=64)
    x = torch.randn(6, 16)
    runs = [step(compiled, model, x) for _ in range(4)]
    kept = {tuple(draw.kept.tolist()) for run in runs for draw in run.draws}
    assert len(kept) >= 7  # eight draws of four of eight blocks


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    compiled, model = compiled_net(p=0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(64, 16)
    target = x[:, :8].argmax(1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(compiled(x), target)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert len(ardd.report().graphs) == 1


def test_the_seed_decides() -> None:
    """The same seed gives the same masks and gradients, another one others."""
    compiled, model = compiled_net(width=128)
    x = torch.randn(6, 16)
    step(compiled, model, x)  # compiling draws nothing either
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(step(compiled, model, x))
    assert same_draws(runs[0], runs[1])
    assert all(torch.equal(runs[0].grads[k], runs[1].grads[k]) for k in runs[0].grads)
    assert not same_draws(runs[0], runs[2])


def test_the_seed_decides_in_the_first_call_too() -> None:
    """What is run to compile must not move the generator."""
    x = torch.randn(6, 16)
    compiled, model = compiled_net(width=128)
    torch.manual_seed(1)
    first = step(compiled, model, x)
    torch.manual_seed(1)
    assert same_draws(first, step(compiled, model, x))


def test_generator_state_can_be_put_back() -> None:
    compiled, model = compiled_net(width=128)
    x = torch.randn(6, 16)
    state = torch.get_rng_state()
    first = step(compiled, model, x)
    assert not torch.equal(state, torch.get_rng_state())
    torch.set_rng_state(state)
    assert same_draws(first, step(compiled, model, x))


def test_backward_draws_nothing() -> None:
    compiled, _ = compiled_net()
    output = compiled(torch.randn(6, 16))
    state = torch.get_rng_state()
    with ardd.record_masks() as draws:
        output.sum().backward()
    assert draws == []
    assert torch.equal(state, torch.get_rng_state())


def test_masks_of_concurrent_graphs_are_kept_apart() -> None:
    """Two forwards before two backwards, in the order of a stack and not: each has its own."""
    compiled, model = compiled_net()
    inputs = torch.randn(2, 6, 16)
    outputs, draws = [], []
    for x in inputs:
        with ardd.record_masks() as drawn:
            outputs.append(compiled(x))
        draws.append(drawn)
    for i in (0, 1):
        model.zero_grad()
        outputs[i].sum().backward()
        got = [p.grad for p in model.parameters()]
        with replayed(ardd.report().decisions, draws[i]):
            expected = torch.autograd.grad(model(inputs[i]).sum(), list(model.parameters()))
        for a, b in zip(got, expected, strict=True):
            assert a is not None
            assert (a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-7


def test_retain_graph() -> None:
    compiled, model = compiled_net()
    output = compiled(torch.randn(6, 16)).sum()
    output.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    output.backward()
    for a, p in zip(first, model.parameters(), strict=True):
        assert p.grad is not None
        assert torch.equal(2 * a, p.grad)


def test_backward_twice_is_torchs_error() -> None:
    compiled, _ = compiled_net()
    output = compiled(torch.randn(6, 16)).sum()
    output.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.backward()


def test_double_backward_is_torchs_error() -> None:
    compiled, _ = compiled_net()
    x = torch.randn(6, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(compiled(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not currently support double backward"):
        grad.sum().backward()
