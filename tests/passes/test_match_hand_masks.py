"""Tests of marking masks that users make by hand: one row per spelling and per refusal."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ardd.core.decisions import Reason
from ardd.passes.mark_dropout import MarkDropout, MarkResult

from .marking import data, give_masks, mark, random_calls, text


def hf_drop_path(x: Tensor) -> Tensor:
    keep = 0.8
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    random = keep + torch.rand(shape, dtype=x.dtype, device=x.device)
    random.floor_()
    return x.div(keep) * random


def timm_drop_path(x: Tensor) -> Tensor:
    random = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.8)
    random.div_(0.8)
    return x * random


def stochastic_depth(x: Tensor) -> Tensor:
    noise = torch.empty([x.shape[0]] + [1] * (x.ndim - 1), dtype=x.dtype, device=x.device)
    noise = noise.bernoulli_(0.8)
    noise.div_(0.8)
    return x * noise


def locked_dropout(x: Tensor) -> Tensor:
    mask = x.data.new(1, x.size(1), x.size(2)).bernoulli_(0.8) / 0.8
    return mask.expand_as(x) * x


def written_apart(x: Tensor) -> Tensor:
    noise = torch.zeros_like(x)
    noise.bernoulli_(0.8)
    return x * noise


def uniform_apart(x: Tensor) -> Tensor:
    noise = torch.empty_like(x)
    noise.uniform_()
    return x * (noise < 0.8)


def fill_by_index(x: Tensor) -> Tensor:
    y = x.clone()
    y[torch.rand_like(y) < 0.2] = 0
    return y


def times_inplace(x: Tensor) -> Tensor:
    y = x.clone()
    y *= torch.rand_like(x) < 0.8
    return y.mul_(2.0)


def two_readers(x: Tensor) -> Tensor:
    keep = torch.rand_like(x) < 0.8
    return x * keep + torch.where(keep, x * x, 0)


def scaled_inplace(x: Tensor) -> Tensor:
    mask = (torch.rand_like(x) < 0.8).float()
    mask.div_(0.8)
    return x * mask


def product_of_masks(x: Tensor) -> Tensor:
    padding = torch.arange(16) < 12
    mask = torch.bernoulli(torch.full_like(x, 0.8)) * padding.float()
    return mask * x


def chunks(x: Tensor) -> Tensor:
    keep = torch.rand(2 * x.shape[0], *x.shape[1:]) < 0.8
    first, _ = keep.chunk(2)
    return x * first.float()


def times_itself(x: Tensor) -> Tensor:
    mask = torch.bernoulli(torch.full_like(x, 0.8))
    return x * (mask * (mask / 2))


def shape_of_a_mask(x: Tensor) -> Tensor:
    mask = torch.bernoulli(x.new_full((x.shape[0], 1, 1), 0.8))
    return x * mask + x.expand_as(mask.expand(x.shape)) * 0 + torch.zeros_like(mask)


def bernoulli(q: Any, x: Tensor) -> Tensor:
    return torch.bernoulli(torch.full_like(x, q))


Bernoulli: Any = torch.distributions.Bernoulli  # untyped
Call = Callable[[Tensor], Tensor]
FLOATING: dict[str, Call] = {
    "full_like": lambda x: torch.bernoulli(torch.full_like(x, 0.8)) * x,
    "full": lambda x: torch.bernoulli(torch.full(x.shape, 0.8)) * x,
    "new_full, broadcast": lambda x: x * torch.bernoulli(x.new_full((1, *x.shape[1:]), 0.8)),
    "ones * q": lambda x: x * torch.bernoulli(torch.ones_like(x) * (1 - 0.2)),
    "1 - (zeros + p)": lambda x: x * torch.bernoulli(1 - (torch.zeros_like(x) + 0.2)),
    "rsub": lambda x: x * torch.bernoulli(torch.rsub(torch.full_like(x, 0.4) / 2, 1)),
    "fill_": lambda x: x * torch.empty_like(x).fill_(0.8).bernoulli(),
    "tensor.expand": lambda x: x * torch.bernoulli(torch.tensor(0.8).expand(x.shape)),
    "p=": lambda x: torch.bernoulli(x, p=0.8) * x,
    "x.bernoulli(p)": lambda x: x.bernoulli(0.8) * x,
    "distribution": lambda x: x * Bernoulli(0.8).sample(x.shape),
    "bernoulli_": lambda x: x * x.new_empty(x.shape).bernoulli_(0.8),
    "bernoulli_, converted": lambda x: x * torch.empty(x.shape).to(x.dtype).bernoulli_(0.8),
    "bernoulli_(tensor)": lambda x: x * torch.zeros_like(x).bernoulli_(torch.full_like(x, 0.8)),
    "1 - mask": lambda x: x * (1 - bernoulli(0.2, x)),
    "rsub(mask, 1)": lambda x: x * torch.rsub(bernoulli(0.2, x), 1),
    "written apart": written_apart,
    "product of masks": product_of_masks,
    "times ones": lambda x: x * (bernoulli(0.8, x) * torch.ones_like(x)),
    "shape of a mask": shape_of_a_mask,
    "bernoulli_, scaled in place": timm_drop_path,
    "bernoulli_, bound again": stochastic_depth,
    "bernoulli_, expanded": locked_dropout,
    "rounded in place": hf_drop_path,
    "rounded": lambda x: x * torch.floor(torch.rand_like(x) + 0.8),
}
BOOLEAN: dict[str, Call] = {
    "rand_like < q": lambda x: x * (torch.rand_like(x) < 0.8).float() / 0.8,
    "rand > p": lambda x: x * (torch.rand(x.shape) > 0.2),
    "q > rand": lambda x: torch.gt(torch.tensor(0.8), torch.rand(x.shape)) * x,
    "torch.ge": lambda x: torch.mul(x, torch.ge(torch.rand(x.shape, device=x.device), 0.2)),
    "rand <= tensor": lambda x: x * (torch.rand_like(x) <= torch.full_like(x, 0.8)),
    "rand.to": lambda x: x * (torch.rand(x.shape).to(x) < 0.8),
    "uniform_": lambda x: x * torch.empty_like(x).uniform_().gt(0.2).type_as(x),
    "uniform_(0, 2)": lambda x: x * (x.new_empty(x.shape).uniform_(0, 2) < 1.6),
    "uniform_ apart": uniform_apart,
    "bernoulli_ of bool": lambda x: x * torch.empty(x.shape, dtype=torch.bool).bernoulli_(0.8),
    "mask / q": lambda x: (torch.rand_like(x) < 0.8) / 0.8 * x,
    "1 - mask": lambda x: x * (1 - (torch.rand_like(x) < 0.2).to(x)),
    "~mask": lambda x: x * ~(torch.rand_like(x) < 0.2),
    "where": lambda x: torch.where(torch.rand_like(x) < 0.8, x, 0.0),
    "where, swapped": lambda x: torch.where(torch.rand_like(x) < 0.2, 0, x),
    "x.where": lambda x: x.where(torch.rand_like(x) < 0.8, torch.zeros_like(x)),
    "masked_fill": lambda x: x.masked_fill(torch.rand_like(x) < 0.2, 0),
    "masked_fill(not)": lambda x: x.masked_fill(torch.logical_not(torch.rand_like(x) < 0.8), 0),
    "masked_fill_": lambda x: x.clone().masked_fill_(torch.rand_like(x) < 0.2, 0.0),
    "x[mask] = 0": fill_by_index,
    "*=": times_inplace,
    "two readers": two_readers,
    "scaled in place": scaled_inplace,
    "rows": lambda x: x * (torch.rand(x.shape[0])[:, None, None] < 0.8),
    "views": lambda x: x * (torch.rand(len(x), 1) < 0.8).unsqueeze(-1).expand_as(x).float(),
    "chunks": chunks,
}
CHOICES = (
    *("where", "where, swapped", "x.where", "masked_fill", "masked_fill(not)", "masked_fill_"),
    *("x[mask] = 0", "two readers"),
)
EXPECTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product of masks": lambda x, m: x * m * (torch.arange(16) < 12),
    "bernoulli_, scaled in place": lambda x, m: x * m / 0.8,
    "bernoulli_, bound again": lambda x, m: x * m / 0.8,
    "bernoulli_, expanded": lambda x, m: x * m / 0.8,
    "rounded in place": lambda x, m: x * m / 0.8,
    "rand_like < q": lambda x, m: x * m / 0.8,
    "mask / q": lambda x, m: x * m / 0.8,
    "scaled in place": lambda x, m: x * m / 0.8,
    "*=": lambda x, m: x * m * 2,
    "two readers": lambda x, m: x * m + x * x * m,
    "views": lambda x, m: x * m.unsqueeze(-1),
    "chunks": lambda x, m: x * m[: len(x)],
}
MASKS = [*(("floating", name) for name in FLOATING), *(("boolean", name) for name in BOOLEAN)]


@pytest.mark.parametrize(("table", "spelling"), MASKS)
def test_marks_masks_made_by_hand(table: str, spelling: str) -> None:
    f = FLOATING[spelling] if table == "floating" else BOOLEAN[spelling]
    x = data(64, 8, 16)
    marked = mark(f, x)
    assert re.fullmatch("bernoulli_?|rand(_like)?|uniform_", marked.site.kind)
    assert (marked.site.p, marked.site.mean) == pytest.approx((0.2, 0.8))
    assert not marked.site.of_weight
    assert marked.result.decisions == ()
    assert not random_calls(marked.gm)
    (marker,) = marked.markers()
    assert marker.args[1] == []
    masks = give_masks(marked.gm)
    y = marked.run()
    expected: Callable[[Tensor, Tensor], Tensor] = EXPECTED.get(spelling, operator.mul)
    torch.testing.assert_close(y, expected(x, masks[0]))
    if spelling not in ("product of masks", "bernoulli_ of bool", *CHOICES):
        values = [node.meta.get("example_value") for node in marked.gm.graph.nodes]
        assert not any(isinstance(v, Tensor) and v.dtype == torch.bool for v in values)


@pytest.mark.parametrize(("table", "spelling"), MASKS)
def test_marked_masks_drop_as_often_as_the_original(table: str, spelling: str) -> None:
    """Share of zeros over ones, original against marked: 64 draws or more, five sigma."""
    f = FLOATING[spelling] if table == "floating" else BOOLEAN[spelling]
    x = torch.ones(64, 8, 16)
    marked = mark(f, x)
    original, mine = f(x), marked.run()
    sigma = math.sqrt(2 * 0.2 * 0.8 / 64)
    assert abs((original == 0).double().mean() - (mine == 0).double().mean()) < 5 * sigma
    assert set(original.flatten().tolist()) == set(mine.flatten().tolist())


@pytest.mark.parametrize("spelling", [name for name in CHOICES if name != "two readers"])
@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_a_choice_drops_what_is_not_finite(spelling: str, value: float) -> None:
    """Zero times infinity is undefined; what is not chosen is 0, and so is its gradient."""
    x = data(4, 8, 16)
    marked = mark(BOOLEAN[spelling], x)
    masks = give_masks(marked.gm)
    marked.run()
    kept = masks[0] != 0
    x = torch.where(kept, x, value).requires_grad_()
    (y,) = marked.gm(*(x if isinstance(i, Tensor) else i for i in marked.inputs))
    assert torch.equal(y != 0, kept)
    assert y.isfinite().all()
    (grad,) = torch.autograd.grad(y, x, torch.where(kept, 1.0, torch.nan))
    assert torch.equal(grad, kept.to(grad))


def test_a_choice_of_negative_zero_is_left_alone() -> None:
    marked = mark(lambda x: torch.where(torch.rand_like(x) < 0.8, x, -0.0), data(4, 8))
    assert marked.decision.reason is Reason.HAND_MASK


def test_every_use_gets_its_dtype() -> None:
    """bf16 and fp32 uses of one boolean mask: one fp32 marker, narrowed where bf16 was."""

    def f(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keep = torch.rand_like(y) < 0.8
        return x * keep, y * keep, torch.where(keep, x, 0)

    x, y = data(4, 6).bfloat16(), data(4, 6)
    marked = mark(f, x, y)
    masks = give_masks(marked.gm)
    results = marked.gm(*marked.inputs)
    (mask,) = masks
    assert mask.dtype == torch.float32
    assert [r.dtype for r in results] == [torch.bfloat16, torch.float32, torch.bfloat16]
    torch.testing.assert_close(list(results), [x * mask.bfloat16(), y * mask, x * mask.bfloat16()])


def test_a_product_of_two_masks_is_two_sites() -> None:
    def f(x: Tensor) -> Tensor:
        return x * (torch.bernoulli(torch.full_like(x, 0.8)) * (torch.rand_like(x) > 0.3))

    x = data(8, 6)
    marked = mark(f, x)
    assert [site.p for site in marked.result.sites] == pytest.approx([0.2, 0.3])
    masks = give_masks(marked.gm)
    torch.testing.assert_close(marked.run(), x * masks[0] * masks[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_marker_has_the_dtype_that_the_mask_had(dtype: torch.dtype) -> None:
    def f(x: Tensor) -> Tensor:
        return F.dropout(x, 0.5) * (torch.rand(x.shape) < 0.8).to(x.dtype)

    marked = mark(f, data(4, 6).to(dtype))
    masks = give_masks(marked.gm)
    assert marked.run().dtype == dtype
    assert [mask.dtype for mask in masks] == [dtype, dtype]


def overwrites_data(x: Tensor) -> Tensor:
    mask = x.clone()
    y = mask + 1
    return y * mask.bernoulli_(0.8)


def returned(x: Tensor) -> tuple[Tensor, Tensor]:
    mask = torch.bernoulli(torch.full_like(x, 0.8))
    return mask * x, mask


def keeps_and_drops(x: Tensor) -> Tensor:
    keep = torch.rand_like(x) < 0.8
    return torch.where(keep, x, 0) + x.masked_fill(keep, 0)


def mixes(x: Tensor) -> Tensor:
    mask = torch.bernoulli(torch.full_like(x, 0.8))
    return x * mask + x.flip(0) * (1 - mask)


def scaled_and_shared(x: Tensor) -> Tensor:
    keep = torch.rand_like(x) < 0.8
    mask = keep.float()
    mask.div_(0.8)
    return x * mask + x * keep


def rows_by_index(x: Tensor) -> Tensor:
    y = x.clone()
    y[torch.rand(x.shape[0]) < 0.2] = 0
    return y


def overwritten_constant(x: Tensor) -> Tensor:
    q = torch.full_like(x, 0.8)
    q[0] = 0.5
    return x * torch.bernoulli(q)


def complement_of_scaled(x: Tensor) -> Tensor:
    mask = torch.bernoulli(torch.full_like(x, 0.2))
    mask.div_(0.2)
    return x * (1 - mask)


def normalised(x: Tensor) -> Tensor:
    mask = (torch.rand_like(x) < 0.8).float()
    return x * mask / mask.mean()


def two_thresholds(x: Tensor) -> Tensor:
    u = torch.rand_like(x)
    return x * (u < 0.8) * (u > 0.1)


OFF: dict[str, Call] = {
    "bernoulli of one": lambda x: x * torch.bernoulli(torch.ones_like(x)),
    "rand < 1": lambda x: x * (torch.rand_like(x) < 1.0),
    "masked_fill(rand < 0)": lambda x: x.masked_fill(torch.rand_like(x) < 0, 0),
    "floor(rand + 1)": lambda x: x * torch.floor(torch.rand_like(x) + 1),
    "floor(rand + 2)": lambda x: x * torch.floor(torch.rand_like(x) + 2),
    "noise": lambda x: x + torch.rand_like(x) * 0.1,
    "uniform noise": lambda x: x + torch.empty_like(x).uniform_(-1, 1),
    "normal": lambda x: x * (torch.randn_like(x) > 0),
}


@pytest.mark.parametrize("spelling", OFF)
def test_random_numbers_that_drop_nothing_leave_no_trace(spelling: str) -> None:
    """Neither marked nor decided on."""
    assert mark(OFF[spelling], data(2, 4, 6)).result == MarkResult(modified=False)


UNKNOWN = "its probability is not a constant"
OTHER_USE = "it overwrites a tensor with another use"
BOTH = "it keeps in one place and drops in another"
# spelling -> function, P(zero) as far as it is known, what the decision says
LEFT: dict[str, tuple[Callable[[Tensor], Any], float, str]] = {
    "p=1": (lambda x: x * (torch.rand_like(x) < 0), 1, ""),
    "probability of data": (lambda x: x * torch.bernoulli(x - 0.5), math.nan, UNKNOWN),
    "threshold of data": (lambda x: x * (torch.rand_like(x) < x - 0.5), math.nan, UNKNOWN),
    "rounded data": (lambda x: x * torch.floor(torch.rand_like(x) + x), math.nan, UNKNOWN),
    "overwritten constant": (overwritten_constant, math.nan, UNKNOWN),
    "overwritten data": (overwrites_data, 0.2, OTHER_USE),
    "overwritten argument": (lambda x: x.bernoulli_(0.8) * 2, 0.2, OTHER_USE),
    "two thresholds": (two_thresholds, math.nan, "its random numbers have another reader"),
    "returned": (returned, 0.2, "the caller of the graph reads it"),
    "returned, scaled": (lambda x: bernoulli(0.8, x) * 2, 0.2, "the caller of the graph reads it"),
    "added": (lambda x: x + bernoulli(0.8, x), 0.2, "add reads it"),
    "contracted": (lambda x: x @ bernoulli(0.8, x.mT), 0.2, "matmul reads it"),
    "squared": (lambda x: x * bernoulli(0.8, x).pow(2), 0.2, "pow reads it"),
    "normalised": (normalised, 0.2, "mean reads it"),
    "in a divisor": (lambda x: x / bernoulli(0.8, x), 0.2, "truediv divides by it"),
    "times itself": (times_itself, 0.2, "mul reads it twice"),
    "and its complement": (mixes, 0.2, BOTH),
    "keeps and drops": (keeps_and_drops, 0.2, BOTH),
    "overwritten by data": (lambda x: bernoulli(0.8, x).mul_(x), 0.2, "mul_ overwrites it"),
    "scaled in place, shared": (
        scaled_and_shared,
        0.2,
        "it is overwritten and read elsewhere as well",
    ),
    "complement of scaled": (complement_of_scaled, 0.8, "it is overwritten, and subtracted from"),
    "to integers": (lambda x: x * (torch.rand_like(x) < 0.8).long(), 0.2, "long reads it"),
    "to integers by to": (
        lambda x: x * (torch.rand_like(x) < 0.8).to(torch.int32),
        0.2,
        "it is converted to integers",
    ),
    "of integers": (
        lambda x: (torch.rand_like(x) < 0.8) * torch.arange(6) + x,
        0.2,
        "mul does not make it a factor",
    ),
    "and": (lambda x: x * ((torch.rand_like(x) < 0.8) & (x > 1)), 0.2, "and_ reads it"),
    "fills with a one": (
        lambda x: x.masked_fill(torch.rand_like(x) < 0.2, 1.0),
        0.8,
        "masked_fill does not choose between data and zero",
    ),
    "where of data": (
        lambda x: torch.where(torch.rand_like(x) < 0.8, x, -x),
        0.2,
        "where does not choose between data and zero",
    ),
    "where of ones": (
        lambda x: x + torch.where(torch.rand_like(x) < 0.8, torch.ones_like(x), 0),
        0.2,
        "where does not multiply data",
    ),
    "indexes rows": (rows_by_index, 0.8, "setitem changes the shape"),
}


@pytest.mark.parametrize("spelling", LEFT)
def test_leaves_alone_with_a_reason(spelling: str) -> None:
    """Not provably a dropout: the graph stays as it was, and the report says why."""
    f, p, detail = LEFT[spelling]
    marked = mark(f, data(2, 4, 6))
    assert not marked.result.modified
    assert text(marked.gm) == marked.before
    decision = marked.decision
    assert decision.reason is (Reason.P_IS_ONE if p == 1 else Reason.HAND_MASK)
    assert decision.p == pytest.approx(p, nan_ok=True)
    assert detail in decision.detail
    assert decision.source.startswith("test_match_hand_masks.py:")
    assert decision.shape


def test_a_mask_that_nobody_reads_is_left_alone() -> None:
    """Nothing reads the result: there is nothing to rewrite."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(torch.bernoulli, (x, 0.5))
    graph.output(x)
    (decision,) = MarkDropout().apply(fx.GraphModule({}, graph)).decisions
    assert decision.reason is Reason.UNUSED


def test_a_generator_of_its_own_is_left_alone() -> None:
    """Drawn from the user's generator: another draw from torch's own would not advance it."""
    graph = fx.Graph()
    x, generator = graph.placeholder("x"), graph.placeholder("generator")
    mask = graph.call_function(torch.bernoulli, (x, 0.5), {"generator": generator})
    graph.output(graph.call_function(operator.mul, (x, mask)))
    (decision,) = MarkDropout().apply(fx.GraphModule({}, graph)).decisions
    assert "generator" in decision.detail
