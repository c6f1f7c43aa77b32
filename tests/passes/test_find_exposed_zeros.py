"""Ops that see more of a dropped zero than that it is one: the dropout stays as it is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.replay import check_exact
from torch import Tensor, nn
from torch.nn import functional as F

from ardd.core.decisions import Reason
from ardd.passes.find_exposed_zeros import EXPOSING
from ardd.passes.rules import rule_table

aten, prims = torch.ops.aten, torch.ops.prims
rule_table()  # some of the ops exist only once Inductor has registered them


class Between(nn.Module):
    """Any function between a dropout and a product."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16).double(), nn.Linear(16, 4).double()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.fn(F.dropout(self.a(x), 0.5)))  # type: ignore[no-any-return]


def finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=3.0, posinf=5.0, neginf=-5.0)


def joined(h: Tensor) -> Tensor:
    """What is dropped is followed where its zeros are not known any more."""
    return torch.cat([h[:, :8], h.detach()[:, 8:].abs() + 1], 1)


SEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "atan2": lambda h: torch.atan2(h, h).detach(),
    "copysign": lambda h: torch.copysign(torch.ones_like(h), h),
    "signbit": lambda h: h.signbit().double(),
    "bits": lambda h: (h.detach().view(torch.int64) < 0).double(),
    "sign after layout": lambda h: (2 * h).t().contiguous().t().signbit().double(),
    "sign after cat": lambda h: joined(h).signbit().double(),
    "sign after where": lambda h: (-torch.where(h > 1, 2.0, h)).signbit().double(),
    "sign after maximum": lambda h: torch.maximum(h, h.detach() - 1).signbit().double(),
    "sign after max": lambda h: h.clamp(max=-0.0).signbit().double(),
    "h / h": lambda h: finite(h.detach() / h.detach()),
    "1 / h": lambda h: finite(h.detach().reciprocal()).atan(),
    "1 / joined": lambda h: finite(1 / joined(h.detach())),
    "h * log h": lambda h: finite(h.detach() * h.detach().abs().log()),
    "h // h": lambda h: finite(torch.div(h.detach(), h.detach(), rounding_mode="floor")),
    "fmod": lambda h: finite(torch.fmod(h.detach(), h.detach())),
    "remainder": lambda h: finite(torch.remainder(h.detach(), h.detach())),
    "addcdiv": lambda h: finite(torch.addcdiv(h, h.detach(), h.detach())).detach(),
    "h ** -1": lambda h: finite(h.detach() * h.detach() ** -1),
    "h ** h": lambda h: finite(h.detach() * h.detach().abs() ** (h.detach() - 1)),
    "polygamma": lambda h: finite(h.detach() * torch.polygamma(1, h.detach().abs())),
    "xlogy": lambda h: finite(h.detach() * torch.xlogy(torch.ones_like(h), h.detach().abs())),
}


@pytest.mark.parametrize("how", SEEN)
def test_what_is_seen_stays(how: str) -> None:
    torch._dynamo.reset()
    (decision,) = check_exact(Between(SEEN[how]), [torch.randn(6, 8, dtype=torch.float64)])
    assert (decision.taken, decision.reason) == (False, Reason.ZEROS_SEEN)


NOT_SEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "h / constant": lambda h: h / 3,
    "h / (|h| + 1)": lambda h: h / (h.abs() + 1),
    "h / norm": lambda h: h / (h.norm(dim=-1, keepdim=True)),
    "normalize": lambda h: F.normalize(h, dim=-1) + h,
    "norm of at least": lambda h: h / torch.clamp(h.detach().norm(dim=0, keepdim=True), min=1e-6),
    "SiLU by hand": lambda h: h / (1 + torch.exp(-h)),
    "h ** 2": lambda h: h**2,
    "quantised": lambda h: h / h.detach().abs().amax(-1, keepdim=True),
    "shift": lambda h: ((h.abs() * 8).long() >> 1).double(),
    "shifted": lambda h: (5 >> h.abs().long()).double() + h,
    "nan_to_num": lambda h: torch.nan_to_num(h, nan=4.0),
}


@pytest.mark.parametrize("how", NOT_SEEN)
def test_what_is_not_seen_is_structured(how: str) -> None:
    torch._dynamo.reset()
    (decision,) = check_exact(Between(NOT_SEEN[how]), [torch.randn(6, 8, dtype=torch.float64)])
    assert decision.taken


def test_a_zero_over_another_zero() -> None:
    """Two dropouts, one of which divides by the other: both stay."""

    class Quotient(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16).double(), nn.Linear(16, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).detach()
            y = finite(F.dropout(h, 0.5) / F.dropout(h + 1, 0.5))
            return self.b(y)  # type: ignore[no-any-return]

    decisions = check_exact(Quotient(), [torch.randn(6, 8, dtype=torch.float64)])
    assert [decision.reason for decision in decisions] == [Reason.ZEROS_SEEN] * 2


def test_every_pointwise_op_that_sees_more_of_a_zero_is_known() -> None:
    """Runs all of them on zeros of either sign, next to zeros and to other numbers."""
    seeing = list(_seeing())
    assert len(seeing) > 200
    for packet, seen in seeing:
        assert seen <= set(EXPOSING.get(packet, ())), packet


def _seeing() -> Iterator[tuple[Any, set[int]]]:
    for qualified in torch._C._dispatch_get_all_op_names():
        space, _, full_name = qualified.partition("::")
        name, _, overload = full_name.partition(".")
        if space not in ("aten", "prims"):
            continue
        try:
            packet = getattr(getattr(torch.ops, space), name)
            op = getattr(packet, overload or "default")
        except (AttributeError, RuntimeError):
            continue  # of TorchScript alone
        is_composite = torch._C._dispatch_has_kernel_for_dispatch_key(
            op.name(), "CompositeImplicitAutograd"
        )
        if torch.Tag.pointwise in op.tags and not is_composite and not op._schema.is_mutable:
            yield packet, _places_of(op)


def _places_of(op: Any) -> set[int]:
    """Returns the tensor operands whose zeros the op tells apart, or has no finite value at."""
    count = sum(str(argument.type) == "Tensor" for argument in op._schema.arguments)
    first = int(str(op._schema.arguments[0].type) == "number")  # counts as an operand
    found = set()
    for place in range(count):
        for others in itertools.product((1.5, -2.0, 0.25), repeat=count - 1):
            results = []
            for zero in (0.0, -0.0):
                values = [*others[:place], zero, *others[place:]]
                try:
                    results.append(_call(op, values))
                except (RuntimeError, TypeError, ValueError, KeyError):
                    break  # not for floating-point numbers, or not with arguments like these
            if len(results) == 2 and isinstance(results[0], Tensor):
                plus, minus = results
                undefined = plus.is_floating_point() and not plus.isfinite().all()
                if undefined or not torch.equal(plus, minus):
                    found.add(first + place)
    return found


def _call(op: Any, values: list[float]) -> Any:
    given = {"number": 0.7, "float": 0.7, "int": 1, "bool": False}
    tensors = iter(values)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in op._schema.arguments:
        kind = str(argument.type)
        if argument.has_default_value():
            continue
        value = (
            torch.tensor([next(tensors)], dtype=torch.float64) if kind == "Tensor" else given[kind]
        )
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return op(*args, **kwargs)
