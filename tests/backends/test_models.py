"""What a model relies on: its state, its layout, and the tools of torch around it."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx
from torch.nn import functional as F

import ardd
from ardd.backends import inductor
from ardd.core.decisions import Reason

from .yardstick import (
    EAGER,
    Net,
    Run,
    assert_same_step,
    check_exact,
    compiled_net,
    mask_of,
    replayed,
    same_draws,
    step,
)

older_torch_is_wrong = pytest.mark.skipif(
    torch.__version__ < "2.13", reason="this torch lacks a guard, whatever the backend"
)


# ---- models -----------------------------------------------------------------------------


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

    def plain(a: Tensor, b: Tensor) -> Tensor:
        a.mul_(2.0)
        return a + b

    def program(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a.mul_(2.0)
        dropped = F.dropout(a + b, 0.5)
        return dropped, dropped @ weight

    options = EAGER | {"pattern": "random"}
    compiled = torch.compile(program, backend="ardd", options=options)
    for start in starts:
        mine, theirs = torch.randn(8, 32), torch.empty(8, 32)
        theirs.copy_(mine)
        dropped, product = compiled(mine[:4], mine[start : start + 4])
        stock = torch.compile(plain, backend="aot_eager_decomp_partition", dynamic=False)
        expected = stock(theirs[:4], theirs[start : start + 4])
        assert torch.equal(mine, theirs)
        kept = dropped != 0
        assert 32 < kept.sum() < 96
        assert torch.equal(dropped, torch.where(kept, expected * 2, 0.0))
        assert torch.equal(product, dropped @ weight)


def test_torch_knows_which_inputs_are_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs copy every other input at every step."""
    static: list[list[int]] = []
    stock = inductor._compile_nothing

    def note(compilation: Any, gm: Any, inputs: Any, **kwargs: Any) -> Any:
        static.append(list(kwargs.get("static_input_idxs", ())))
        return stock(compilation, gm, inputs, **kwargs)

    monkeypatch.setattr(inductor, "_compile_nothing", note)
    inner = functools.partial(note, None)
    model = Net()
    torch.compile(model, backend=lambda gm, inputs: compile_fx(gm, inputs, inner_compile=inner))(
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


# ---- through Inductor -------------------------------------------------------------------


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


# ---- other transformations --------------------------------------------------------------


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


# ---- several processes ------------------------------------------------------------------

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
