"""What a training loop relies on without thinking of it, under every switch that torch has."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import ardd
from ardd.backends import inductor
from ardd.core.decisions import Reason

from .yardstick import EAGER, Net, Run, assert_same_step, check_exact, mask_of, replayed, step

older_torch_is_wrong = pytest.mark.skipif(
    torch.__version__ < "2.13", reason="this torch lacks a guard, whatever the backend"
)


def compiled_net(**kwargs: Any) -> tuple[Callable[..., Tensor], Net]:
    model = Net(**kwargs)
    return torch.compile(model, backend="ardd", options=EAGER), model


def same_draws(first: Run, second: Run) -> bool:
    pairs = zip(first.draws, second.draws, strict=True)
    return all(torch.equal(a.kept, b.kept) for a, b in pairs)


# ---- types -------------------------------------------------------------------------------


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


# ---- modes -------------------------------------------------------------------------------


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


# ---- training loops ----------------------------------------------------------------------


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


# ---- models ------------------------------------------------------------------------------


def test_state_dict_is_untouched() -> None:
    compiled, model = compiled_net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    step(compiled, model, torch.randn(6, 16))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_deepcopy() -> None:
    compiled, model = compiled_net()
    x = torch.randn(6, 16)
    step(compiled, model, x)
    twin = copy.deepcopy(compiled)
    inner = twin._orig_mod  # type: ignore[attr-defined]
    with torch.no_grad():
        inner.last.weight.zero_()
        inner.last.bias.fill_(3)
    assert torch.equal(twin(x), torch.full((6, 8), 3.0))
    check_exact(compiled, model, x)


@pytest.mark.parametrize("frozen", ["first", "second", "last"])
def test_frozen_layer(frozen: str) -> None:
    compiled, model = compiled_net()
    model.get_submodule(frozen).requires_grad_(False)
    run = check_exact(compiled, model, torch.randn(6, 16, requires_grad=True))
    assert not any(name.startswith(frozen) for name in run.grads)
    assert "input 0" in run.grads


@older_torch_is_wrong
def test_unfreezing_compiles_anew() -> None:
    compiled, model = compiled_net()
    x = torch.randn(6, 16)
    model.first.requires_grad_(False)
    check_exact(compiled, model, x)
    model.first.requires_grad_(True)
    assert "first.weight" in check_exact(compiled, model, x).grads


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 32)
            self.drop = nn.Dropout(0.5)
            self.middle = nn.Linear(32, 32)
            self.head = nn.Linear(32, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            h = self.drop(self.embed(tokens))
            return self.head(self.drop(torch.tanh(self.middle(h))))  # type: ignore[no-any-return]

    model = Tied()
    compiled = torch.compile(model, backend="ardd", options=EAGER)
    run = check_exact(compiled, model, torch.randint(20, (3, 5)))
    assert len(run.draws) == 2
    assert set(run.grads) == {"embed.weight", "middle.weight", "middle.bias"}


def test_one_layer_used_twice() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.drop(torch.tanh(self.layer(x)))
            return self.layer(x)  # type: ignore[no-any-return]

    model = Loop()
    compiled = torch.compile(model, backend="ardd", options=EAGER)
    assert len(check_exact(compiled, model, torch.randn(6, 16)).draws) == 3


@older_torch_is_wrong
@pytest.mark.parametrize("starts", [(0, 4), (4, 0), (0, 2), (2, 0)])
def test_inputs_that_overlap_are_not_inputs_that_do_not(starts: tuple[int, int]) -> None:
    """A graph that writes to one input has to know whether it writes to the other: a guard."""
    weight = torch.randn(32, 32)

    def program(a: Tensor, b: Tensor) -> Tensor:
        a.mul_(2.0)
        return F.dropout(a + b, 0.5) @ weight

    options = EAGER | {"pattern": "random"}
    compiled = torch.compile(program, backend="ardd", options=options)
    for start in starts:
        mine, theirs = torch.randn(8, 32), torch.empty(8, 32)
        theirs.copy_(mine)
        torch.manual_seed(0)
        got = compiled(mine[:4], mine[start : start + 4])
        torch.manual_seed(0)
        stock = torch.compile(program, backend="aot_eager_decomp_partition", dynamic=False)
        expected = stock(theirs[:4], theirs[start : start + 4])
        assert torch.equal(mine, theirs)
        assert torch.equal(got, expected)


def test_torch_knows_which_inputs_are_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs copy every other input at every step."""
    static: list[list[int]] = []
    stock = inductor._compile_nothing

    def note(gm: Any, inputs: Any, **kwargs: Any) -> Any:
        static.append(list(kwargs.get("static_input_idxs", ())))
        return stock(gm, inputs, **kwargs)

    monkeypatch.setattr(inductor, "_compile_nothing", note)
    model = Net()
    torch.compile(model, backend=lambda gm, inputs: compile_fx(gm, inputs, inner_compile=note))(
        torch.randn(6, 16)
    )
    expected = static[0]
    assert len(expected) == 6
    static.clear()
    ardd.explain(model, torch.randn(6, 16))
    assert static[0] == expected


def test_output_is_laid_out_as_in_eager() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 32)
            self.last = nn.Linear(32, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            h = F.dropout(self.first(x), 0.5)
            y = self.last(h)
            return h, h.t(), y, y.t(), y[1:], x

    model = Transposed()
    compiled = torch.compile(model, backend="ardd", options=EAGER)
    x = torch.randn(6, 16)
    with ardd.record_masks() as draws:
        got = compiled(x)
    with replayed(ardd.report().decisions, draws):
        expected = model(x)
    assert [y.stride() for y in got] == [y.stride() for y in expected]
    assert got[5] is x
    bases = [y.untyped_storage().data_ptr() for y in got]
    assert bases[0] == bases[1] != bases[2]
    assert bases[2] == bases[3] == bases[4]
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("grad", [True, False])
def test_dropout_in_place_writes_to_the_input(grad: bool) -> None:
    weight = torch.eye(32).requires_grad_(grad)

    def program(x: Tensor) -> Tensor:
        F.dropout(x, 0.5, inplace=True)
        return x @ weight

    x = torch.ones(4, 32)
    y = torch.compile(program, backend="ardd", options=EAGER)(x)
    assert torch.equal(x, y)
    assert set(x.unique().tolist()) == {0.0, 2.0}
    assert ardd.report().decisions[0].taken


def test_inputs_are_not_changed() -> None:
    compiled, model = compiled_net()
    x = torch.randn(6, 16, requires_grad=True)
    before, version = x.detach().clone(), x._version
    step(compiled, model, x)
    assert torch.equal(x.detach(), before)
    assert x._version == version


def test_running_statistics_are_updated_as_in_eager() -> None:
    """Dropped features count in the batch statistics as zeros."""
    model = nn.Sequential(
        nn.Linear(16, 32), nn.Dropout(0.5), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)
    )
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="ardd", options=EAGER)
    x = torch.randn(6, 16)
    with ardd.record_masks() as draws:
        compiled(x)
    with replayed(ardd.report().decisions, draws):
        twin(x)
    for got, expected in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.allclose(got, expected, atol=1e-6)


# ---- checkpointing -----------------------------------------------------------------------


class Checkpointed(Net):
    """The middle of the net is computed again in backward."""

    again_in_backward = True

    def middle(self, x: Tensor) -> Tensor:
        h = self.drop(self.first(x).relu())
        return self.again(F.gelu(self.second(h)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        if self.again_in_backward:
            h = checkpoint(self.middle, x, use_reentrant=False)
        else:
            h = self.middle(x)
        return self.last(h)  # type: ignore[no-any-return]


def check_checkpointed(target: str) -> Run:
    model = Checkpointed()
    options = EAGER | {"target": target}
    compiled = torch.compile(model, backend="ardd", options=options)
    x = torch.randn(6, 16, requires_grad=True)
    got = step(compiled, model, x)
    model.again_in_backward = False
    decisions = ardd.report().decisions
    assert [d.taken for d in decisions] == [True, True]
    with replayed(decisions, got.draws):
        assert_same_step(got, step(model.forward, model, x))
    return got


def test_checkpointed_masks_are_drawn_once() -> None:
    """In forward, though the products around them are computed again in backward."""
    assert len(check_checkpointed("eager").draws) == 2
    backward = ardd.report().backward
    assert "draw_blocks" not in backward
    assert backward.count("addmm") >= 1, "nothing was computed again"


@pytest.mark.slow
def test_checkpointed_masks_are_drawn_once_by_inductor() -> None:
    assert len(check_checkpointed("inductor").draws) == 2
    assert "draw_blocks" not in ardd.report().backward


def saves_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.filterwarnings("ignore:Detected that context_fn is passed")
@pytest.mark.parametrize("kind", ["nested", "selective"])
def test_other_checkpoints(kind: str) -> None:
    """One in another, and one that is told which ops to save."""
    contexts = functools.partial(create_selective_checkpoint_contexts, saves_products)

    class Regions(Net):
        plain = False

        def inner(self, x: Tensor) -> Tensor:
            return self.drop(self.first(x).relu())  # type: ignore[no-any-return]

        def outer(self, x: Tensor) -> Tensor:
            if self.plain or kind == "selective":
                h = self.inner(x)
            else:
                h = checkpoint(self.inner, x, use_reentrant=False)
            return self.again(F.gelu(self.second(h)))  # type: ignore[no-any-return]

        def forward(self, x: Tensor) -> Tensor:
            if self.plain:
                h = self.outer(x)
            elif kind == "selective":
                h = checkpoint(self.outer, x, use_reentrant=False, context_fn=contexts)
            else:
                h = checkpoint(self.outer, x, use_reentrant=False)
            return self.last(h)  # type: ignore[no-any-return]

    model = Regions()
    x = torch.randn(6, 16, requires_grad=True)
    got = step(torch.compile(model, backend="ardd", options=EAGER), model, x)
    assert "draw_blocks" not in ardd.report().backward
    model.plain = True
    with replayed(ardd.report().decisions, got.draws):
        assert_same_step(got, step(model.forward, model, x))


def test_checkpointed_random_masks() -> None:
    """A mask that stays random is the forward's one too: the gradient shows which it was."""

    class Scale(nn.Module):
        def scaled(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5) * 3

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.scaled, x, use_reentrant=False)  # type: ignore[no-any-return]

    compiled = torch.compile(Scale(), backend="ardd", options=EAGER)
    x = torch.ones(64, 64, requires_grad=True)
    y = compiled(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, grad)
    assert 0.3 < (y == 0).float().mean() < 0.7


@pytest.mark.parametrize("target", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("pattern", ["block", "random"])
@pytest.mark.parametrize("budget", [0.0, 0.5])
def test_memory_budget_is_refused(target: str, pattern: str, budget: float) -> None:
    """Below 1, torch draws masks again in backward; with a warning, the budget has no effect."""
    options = EAGER | {"target": target, "pattern": pattern}

    def program(x: Tensor, weight: Tensor) -> Tensor:
        for _ in range(3):
            x = F.dropout(torch.sin(x), 0.5)
        return x @ weight

    compiled = torch.compile(program, backend="ardd", options=options)
    x, weight = torch.randn(16, 64, requires_grad=True), torch.eye(64)
    with torch._functorch.config.patch(activation_memory_budget=budget):
        with pytest.warns(RuntimeWarning, match=f"activation_memory_budget={budget} is ignored"):
            y = compiled(x, weight)
        (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y == 0, grad == 0)
    assert 0.8 < (y == 0).float().mean() < 0.95


def test_memory_budget_of_a_region_is_refused() -> None:
    budget = getattr(torch.autograd.graph, "region_activation_memory_budget", None)
    if budget is None:
        pytest.skip("this torch has no budgets of regions")
    model = Net()

    def program(x: Tensor) -> Tensor:
        with budget(0.25):
            return model(x)  # type: ignore[no-any-return]

    compiled = torch.compile(program, backend="ardd", options=EAGER)
    x = torch.randn(6, 16)
    with pytest.warns(RuntimeWarning, match=r"activation_memory_budget=0\.25 is ignored"):
        got = step(compiled, model, x)
    with replayed(ardd.report().decisions, got.draws):
        assert_same_step(got, step(model.forward, model, x))


def test_no_warning_without_dropout() -> None:
    """The budget of a graph that drops nothing is none of our business."""
    model = Net().eval()
    compiled = torch.compile(model, backend="ardd", options=EAGER)
    with torch._functorch.config.patch(activation_memory_budget=0.5), warnings.catch_warnings():
        warnings.simplefilter("error")
        step(compiled, model, torch.randn(6, 16))


# ---- through Inductor --------------------------------------------------------------------


class Convolutional(nn.Module):
    """Channels dropped before a norm with running statistics, features dropped after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.hidden = nn.Linear(16, 32)
        self.last = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout2d(self.first(x).relu(), 0.5)
        h = self.norm(self.second(h)).relu().mean((2, 3))
        h = F.dropout(torch.tanh(self.hidden(h)), 0.25)
        return self.last(h)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inductor_on_convolutions(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Convolutional().to(dtype)
    twin = copy.deepcopy(model)
    options = EAGER | {"target": "inductor"}
    compiled = torch.compile(model, backend="ardd", options=options)
    x = torch.randn(4, 3, 8, 8, dtype=dtype, requires_grad=True)
    got = step(compiled, model, x)
    assert len(got.draws) == 2
    with replayed(ardd.report().decisions, got.draws):
        monkeypatch.setattr(F, "dropout2d", F.dropout)
        expected = step(twin.forward, twin, x)
    # The gradient of a bias before a norm is zero, but for rounding: nothing to compare.
    del got.grads["second.bias"], expected.grads["second.bias"]
    assert_same_step(got, expected)
    for mine, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-2 if dtype == torch.bfloat16 else 1e-9)


@pytest.mark.slow
def test_inductor_on_uneven_batches() -> None:
    model = Net()
    options = EAGER | {"target": "inductor"}
    compiled = torch.compile(model, backend="ardd", options=options)
    for batch in (8, 8, 5, 7, 12, 8):
        check_exact(compiled, model, torch.randn(batch, 16, requires_grad=True))
    assert len(ardd.report().graphs) == 2
    torch.manual_seed(1)
    first = step(compiled, model, torch.ones(8, 16))
    torch.manual_seed(1)
    assert same_draws(first, step(compiled, model, torch.ones(8, 16)))


@pytest.mark.slow
def test_inductor_does_not_freeze_masks() -> None:
    """With frozen weights constants are folded: a mask is none."""
    model = Net(width=64)
    compiled = torch.compile(model, backend="ardd", options=EAGER | {"target": "inductor"})
    x = torch.randn(4, 16)
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        assert not torch.equal(compiled(x), compiled(x))
    assert [d.taken for d in ardd.report().decisions] == [True, True]


# ---- other transformations ---------------------------------------------------------------


def test_functional_call_and_grad() -> None:
    """torch.func.grad inside of the compiled function, as stock torch.compile allows."""
    weight = torch.randn(32, 8)

    def loss(x: Tensor) -> Tensor:
        return (F.dropout(x, 0.5) @ weight).sum()

    def stock(x: Tensor) -> Tensor:
        return torch.func.grad(loss)(x)  # type: ignore[no-any-return]

    x = torch.randn(4, 32)
    torch.compile(stock, backend="aot_eager")(x)
    grad = torch.compile(stock, backend="ardd", options=EAGER | {"strict": False})(x)
    zero = (grad == 0).float().mean()
    assert 0.2 < zero < 0.8


def test_vmap() -> None:
    def program(x: Tensor) -> Tensor:
        return torch.func.vmap(lambda row: F.dropout(row, 0.5), randomness="different")(x)

    x = torch.ones(8, 64)
    torch.compile(program, backend="aot_eager")(x)
    y = torch.compile(program, backend="ardd", options=EAGER)(x)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(y[0], y[1])


def test_several_threads() -> None:
    """Compiled in one thread, run in another: the record is of the process."""
    compiled, model = compiled_net()
    x = torch.randn(6, 16)
    runs: list[Run] = []
    threads = [threading.Thread(target=lambda: runs.append(step(compiled, model, x)))]
    for thread in threads:
        thread.start()
        thread.join()
    with replayed(ardd.report().decisions, runs[0].draws):
        assert_same_step(runs[0], step(model.forward, model, x))


def test_rate_of_zero_and_one() -> None:
    """p=0 leaves no trace; p=1 gives zeros."""
    compiled, model = compiled_net(p=0.0)
    assert step(compiled, model, torch.randn(6, 16)).draws == []
    assert ardd.report().decisions == ()
    ones, model = compiled_net(p=1.0)
    got = step(ones, model, torch.randn(6, 16))
    assert torch.equal(got.output, model.last.bias.detach().expand(6, 8))
    assert not got.grads["first.weight"].any()
    assert {d.reason for d in ardd.report().decisions} == {Reason.P_IS_ONE}


def test_mask_of_a_decision_is_the_mask() -> None:
    """The yardstick itself: the output of a bare dropout is the mask."""
    weight = torch.eye(32)
    compiled = torch.compile(lambda x: F.dropout(x, 0.25) @ weight, backend="ardd", options=EAGER)
    with ardd.record_masks() as (draws):
        got = compiled(torch.ones(4, 32))
    (decision,) = ardd.report().decisions
    assert torch.allclose(got, mask_of(decision, draws[0]).float().expand(4, 32))


# ---- several processes -------------------------------------------------------------------

DISTRIBUTED = """
import os, sys, torch, torch.distributed as dist, torch.multiprocessing as mp
from torch import nn
import ardd

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(16, 640), nn.ReLU(), nn.Dropout(), nn.Linear(640, 640), nn.GELU(),
            nn.Dropout(), nn.Linear(640, 8),
        )
    def forward(self, x):
        return self.layers(x)

def work(rank, store):
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{store}")
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Net())
    options = {"target": "eager", "pattern": "block", "strict": True}
    compiled = torch.compile(model, backend="ardd", options=options)
    torch.manual_seed(rank)
    with ardd.record_masks() as draws:
        compiled(torch.randn(4, 16)).sum().backward()
    grad = torch.cat([p.grad.flatten() for p in model.parameters()])
    kept = draws[0].kept
    for mine, same in ((grad, True), (kept, False)):
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        assert torch.equal(*both) == same
    taken = [d.taken for d in ardd.report().decisions]
    assert taken == [True, True], taken
    torch._dynamo.reset()
    try:
        torch.compile(model, backend="ardd", options={"patern": 1})(torch.randn(4, 16))
    except ardd.OptionsError:
        print(f"rank {rank} done", flush=True)
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(work, args=(sys.argv[1],), nprocs=2)
"""


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path: Path) -> None:
    """Two ranks draw masks of their own and end with the same gradients, bucket by bucket."""
    script = tmp_path / "train.py"
    script.write_text(DISTRIBUTED)
    done = subprocess.run(
        [sys.executable, script, tmp_path / "store"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "rank 0 done", "rank 1 done"]
