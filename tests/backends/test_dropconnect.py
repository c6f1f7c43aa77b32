"""Dropout of weights, end to end: the compiled program is the one with the masks that it drew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tests.backends.yardstick import check_exact, step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import ardd
from ardd import Reason

TILES: dict[str, Any] = {
    "target": "eager",
    "pattern": "block",
    "block_size": 2,
    "strict": True,
    "rate_tolerance": 0.001,
}
INDUCTOR = TILES | {"target": "inductor"}
F64 = torch.float64


class DropConnect(nn.Linear):
    """A linear layer that drops its weight."""

    def __init__(self, inputs: int, outputs: int, p: float = 0.5, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.dropout(self.weight, self.p, self.training), self.bias)


class Drop(nn.Module):
    """A parametrization that drops what it is registered on."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class WeightDrop(nn.Module):
    """A recurrent cell of two steps with one dropped weight, as in AWD-LSTM."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight = F.dropout(self.raw, 0.5, self.training)
        h = torch.zeros_like(x[0])
        for x_t in x:
            h = torch.tanh(x_t + F.linear(h + x_t, weight))
        return h


def net(p: float = 0.5, bias: bool = True) -> nn.Sequential:
    """Two layers of rectangular weights."""
    layers = DropConnect(20, 40, p, bias), nn.Tanh(), DropConnect(40, 20, p, bias)
    return nn.Sequential(*layers).double()


def masks_of(draws: Sequence[ardd.Draw], *shapes: tuple[int, int]) -> list[Tensor]:
    """Returns the masks that were drawn for weights of some shapes."""
    tiles = [draw for draw in draws if isinstance(draw, ardd.TileDraw)]
    return [draw.mask(shape) for draw, shape in zip(tiles, shapes, strict=True)]


class Masked(nn.Module):
    """The layers of `net`, with given masks."""

    def __init__(self, model: nn.Sequential, masks: Sequence[Tensor]) -> None:
        super().__init__()
        self.layers = [layer for layer in model if isinstance(layer, DropConnect)]
        self.masks = masks

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layers
        one, two = (mask.to(first.weight.dtype) for mask in self.masks)
        h = F.linear(x, first.weight * one, first.bias).tanh()
        return F.linear(h, second.weight * two, second.bias)


def data(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64)


def compiled(model: nn.Module, options: Any = None, **kwargs: Any) -> Callable[..., Tensor]:
    run: Callable[..., Tensor]
    run = torch.compile(model, backend="ardd", options=options or TILES, **kwargs)
    return run


def all_tiles(n: int) -> None:
    """Checks that the last graph has so many dropouts, all of them by tiles."""
    decisions = ardd.report().graphs[-1].decisions
    assert [(d.pattern, d.reason) for d in decisions] == [("tile", Reason.STRUCTURED)] * n
    assert "draw_tiles" not in ardd.report().backward


@pytest.mark.parametrize("p", [0.3, 0.5, 0.7, 0.8])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 20), (2, 3, 20)])
def test_forward_and_all_gradients(p: float, bias: bool, shape: tuple[int, ...]) -> None:
    """Those of the input, of both weights and of the biases, in double precision."""
    model = net(p, bias)
    run = check_exact(compiled(model), model, data(*shape).requires_grad_())
    all_tiles(2)
    assert len(run.grads) == (5 if bias else 3)
    assert "aten.mm" not in ardd.report().after
    (decision, _) = ardd.report().graphs[-1].decisions
    assert decision.p_used == pytest.approx(p)
    assert decision.shape == (40, 20)


@pytest.mark.parametrize(("p", "size"), [(0.75, 16), (0.375, 16), (0.5, 12)])
def test_other_rates_and_a_square_weight(p: float, size: int) -> None:
    model = DropConnect(size, size, p).double()
    check_exact(compiled(model), model, data(5, size).requires_grad_())
    all_tiles(1)


@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
def test_what_needs_no_gradient(frozen: str) -> None:
    model = net()
    x = data(6, 20).requires_grad_(frozen != "input")
    if frozen != "input":
        for layer in (model[0], model[2]):
            getattr(layer, frozen).requires_grad_(False)
    run = check_exact(compiled(model), model, x)
    all_tiles(2)
    assert len(run.grads) == {"input": 4, "weight": 3, "bias": 3}[frozen]


def test_without_gradients_the_forward_alone_is_rewritten() -> None:
    model = net()
    x = data(6, 20)
    with torch.no_grad(), ardd.record_masks() as draws:
        y = compiled(model)(x)
    all_tiles(2)
    assert ardd.report().graphs[-1].inference
    masks = masks_of(draws, (40, 20), (20, 40))
    torch.testing.assert_close(y, Masked(model, masks)(x))


def test_a_batch_of_any_size() -> None:
    """One graph for all sizes, exact for each."""
    model = net()
    run = compiled(model, dynamic=True)
    for size in (4, 7, 3):
        check_exact(run, model, data(size, 20).requires_grad_())
        check_exact(run, model, data(size, 20).requires_grad_())
    assert len(ardd.report().graphs) == 1
    all_tiles(2)


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.5, 0.7])
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor(p: float, dynamic: bool) -> None:
    """One kept class of ten rows, and three of ten: windows that overlap."""
    model = net(p)
    run = compiled(model, INDUCTOR, dynamic=dynamic)
    check_exact(run, model, data(6, 20).requires_grad_())
    check_exact(run, model, data(9, 20).requires_grad_())
    all_tiles(2)


def test_single_precision_under_inductor() -> None:
    model = net().float()
    check_exact(compiled(model, INDUCTOR), model, data(6, 20).float().requires_grad_())
    all_tiles(2)


def test_a_weight_used_in_two_steps_has_one_mask() -> None:
    model = WeightDrop(8).double()
    run = check_exact(compiled(model), model, data(2, 3, 8).requires_grad_())
    all_tiles(1)
    assert len(run.draws) == 1
    after = ardd.report().after
    assert after.count("aten.where.self") == 1  # the gradients are summed before they are expanded
    assert "aten.mm" not in after


@pytest.mark.parametrize("options", [TILES, INDUCTOR])
def test_parametrized(options: dict[str, Any]) -> None:
    layer = nn.Linear(16, 8)
    parametrize.register_parametrization(layer, "weight", Drop())
    layer.double()
    check_exact(compiled(layer, options), layer, data(5, 16).requires_grad_())
    all_tiles(1)


def test_a_mask_made_by_hand() -> None:
    class ByHand(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            keep = (torch.rand_like(self.weight) < 0.5).to(x.dtype)
            return F.linear(x, self.weight * keep / 0.5, self.bias)

    model = ByHand(16, 8).double()
    x = data(5, 16).requires_grad_()
    run = step(compiled(model), model, x)
    all_tiles(1)
    (draw,) = run.draws
    assert isinstance(draw, ardd.TileDraw)
    mask = draw.mask((8, 16))
    expected = step(lambda x: F.linear(x, model.weight * mask, model.bias), model, x)
    torch.testing.assert_close(run.output, expected.output)
    for name, grad in expected.grads.items():
        torch.testing.assert_close(run.grads[name], grad, msg=name)


@pytest.mark.parametrize("p", [0.5, 0.7])
def test_autocast(p: float) -> None:
    """The masked weight is rounded to bf16 before the products."""
    model = net(p).float()
    run = compiled(model)

    def in_bf16(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def cast(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return fn(x)

        return cast

    x = data(6, 20).float().requires_grad_()
    got = step(in_bf16(run), model, x)
    all_tiles(2)
    masked = Masked(model, masks_of(got.draws, (40, 20), (20, 40)))
    expected = step(in_bf16(masked), model, x)
    assert got.output.dtype == expected.output.dtype == torch.bfloat16
    for name, grad in expected.grads.items():
        error = (got.grads[name] - grad).abs().max() / grad.abs().max()
        assert error < 3e-2, name


def test_checkpointing_does_not_draw_again() -> None:
    model = net()

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(self.inner, x, use_reentrant=False)
            return y

    outer = Checkpointed()
    run = step(compiled(outer), model, x := data(6, 20).requires_grad_())
    all_tiles(2)
    masked = Masked(model, masks_of(run.draws, (40, 20), (20, 40)))
    expected = step(masked, model, x)
    torch.testing.assert_close(run.output, expected.output)
    for name, grad in expected.grads.items():
        torch.testing.assert_close(run.grads[name], grad, msg=name)


def test_beside_dropout_of_activations() -> None:
    """A dropout of features is structured too, where another layer has a product for it."""
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), DropConnect(16, 8), nn.Linear(8, 4)
    ).double()
    check_exact(compiled(model), model, data(5, 8).requires_grad_())
    patterns = {d.kind: d.pattern for d in ardd.report().graphs[-1].decisions if d.dim is None}
    assert patterns == {"dropout": "tile"}
    assert all(d.taken for d in ardd.report().graphs[-1].decisions)


def test_every_step_draws_and_the_seed_repeats() -> None:
    model = net()
    run, x = compiled(model), data(6, 20)
    torch.manual_seed(4)
    first, second = run(x), run(x)
    torch.manual_seed(4)
    torch.testing.assert_close(run(x), first, rtol=0, atol=0)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("options", [TILES, INDUCTOR])
def test_eval_is_untouched(options: dict[str, Any]) -> None:
    model = net().eval()
    x = data(6, 20)
    with ardd.record_masks() as draws:
        y = compiled(model, options)(x)
    assert not draws
    assert not ardd.report().decisions
    torch.testing.assert_close(y, model(x))


def test_auto_takes_tiles_where_they_pay() -> None:
    """A wide layer does, a narrow one and one of ten classes do not."""
    wide = nn.Sequential(DropConnect(1024, 1024), nn.ReLU(), DropConnect(1024, 10))
    (taken, classes) = ardd.explain(wide, torch.randn(256, 1024)).decisions
    assert (taken.pattern, taken.block, taken.p_used) == ("tile", 32, 0.5)
    assert taken.flops_after * 2 == taken.flops_before
    assert "1 of 2 tiles of 32 x 32" in taken.detail
    assert classes.reason is Reason.SHAPE
    narrow = DropConnect(64, 64)
    (refused,) = ardd.explain(narrow, torch.randn(4, 64)).decisions
    assert refused.reason is Reason.NOT_WORTH_IT


@pytest.mark.parametrize("shape", [(4, 3, 3), (4, 3, 3, 3)])
def test_weights_of_convolutions_stay_random(shape: tuple[int, ...]) -> None:
    """The reason says so, and what runs is an ordinary dropout."""

    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(shape))

        def forward(self, x: Tensor) -> Tensor:
            weight = F.dropout(self.weight, 0.5)
            return F.conv1d(x, weight) if weight.dim() == 3 else F.conv2d(x, weight)

    run = compiled(Conv())
    y = run(torch.ones(1, *shape[1:]))
    (decision,) = ardd.report().decisions
    assert (decision.reason, decision.pattern) == (Reason.WEIGHT_DROPOUT, "random")
    assert not torch.equal(y, run(torch.ones(1, *shape[1:])))


def test_ten_thousand_steps_keep_every_output_unbiased() -> None:
    """The mean output of a layer is that without dropout, within five standard errors."""
    model = DropConnect(8, 4, 0.5, bias=False).double()
    run, x = compiled(model), torch.ones(1, 8, dtype=F64)
    with torch.no_grad():
        outputs = torch.cat([run(x) for _ in range(10_000)])
        error = (outputs.mean(0) - F.linear(x, model.weight)[0]).abs()
    assert (error < 5 * outputs.std(0) / 100).all()
