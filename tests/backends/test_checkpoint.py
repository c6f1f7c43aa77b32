"""No mask is drawn again in backward, whatever torch is told to compute again there."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import ardd

from .yardstick import EAGER, Net, Run, assert_same_step, replayed, step


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


FREE_TO_RECOMPUTE = (
    "ban_recompute_used_far_apart",
    "ban_recompute_long_fusible_chains",
    "ban_recompute_materialized_backward",
    "ban_recompute_reductions",
)


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
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("activation_memory_budget", 0.0),
        ("activation_memory_budget", 0.5),
        ("aggressive_recomputation", True),
        ("ban_recompute_not_in_allowlist", False),
    ],
)
def test_saving_memory_at_the_price_of_masks_is_refused(
    target: str, pattern: str, setting: str, value: float
) -> None:
    """With these torch draws masks again in backward; with a warning, they have no effect."""
    options = EAGER | {"target": target, "pattern": pattern}

    def program(x: Tensor, weight: Tensor) -> Tensor:
        for _ in range(3):
            x = F.dropout(torch.sin(x), 0.5)
        return x @ weight

    compiled = torch.compile(program, backend="ardd", options=options)
    x, weight = torch.randn(16, 64, requires_grad=True), torch.eye(64)
    # All at once: what allows torch to recompute more makes it more likely to do it.
    free = dict.fromkeys(FREE_TO_RECOMPUTE, False)
    with torch._functorch.config.patch({**free, setting: value}):
        with pytest.warns(RuntimeWarning, match=f"ardd: {setting}={value} is ignored"):
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
