"""What groups of rows cost: weights are gathered, and products read them, once for every group."""

from __future__ import annotations

import dataclasses

import torch
from tests.passes.test_split_rows import INPUTS, analysed, with_gradient

from ardd.passes.cost_model import OpCost
from ardd.passes.price_groups import GroupPricer
from ardd.passes.price_plan import Choice, PlanPricer


@dataclasses.dataclass
class Listed:
    """A cost model that remembers what it was asked."""

    name: str = "listed"
    version: str = "1"
    asked: list[OpCost] = dataclasses.field(default_factory=list)

    def seconds(self, op: OpCost, device: torch.device) -> float:
        self.asked.append(op)
        return 1.0


def priced(pricer: type[PlanPricer]) -> list[tuple[str, str, tuple[int, ...], int, int]]:
    """Returns the ops of the step: 6 rows, 16 -> 32 -> 4 features, half of the 32 kept."""
    _, support, rows = analysed(with_gradient, *INPUTS)
    ((axis,),) = [axes.values() for axes in support.masks.values()]
    model = Listed()
    made = (
        GroupPricer(support, model, torch.device("cpu"), rows)
        if pricer is GroupPricer
        else PlanPricer(support, model, torch.device("cpu"))
    )
    made.seconds(made.touched_by(axis), {axis: Choice(axis, 4, 8, 4)})
    return [
        (op.kind, op.name, tuple(map(int, op.sizes)), int(op.flops), int(op.bytes))
        for op in model.asked
    ]


def test_products_are_those_of_groups() -> None:
    """6 rows are 2 x 3, and each of the 2 reads its own half of the weight."""
    once = [op for op in priced(PlanPricer) if op[0] == "product"]
    twice = [op for op in priced(GroupPricer) if op[0] == "product"]
    assert [flops for *_, flops, _ in twice] == [flops for *_, flops, _ in once]
    assert {name for _, name, *_ in twice} == {"aten.bmm.default"}
    assert {name for _, name, *_ in once} == {"aten.mm.default"}
    first_once, first_twice = once[0], twice[0]
    assert (first_once[2], first_twice[2]) == ((6, 16, 16), (2, 3, 16, 16))
    assert first_twice[4] == first_once[4] + 16 * 16 * 4


def test_weights_and_their_gradients_are_converted_for_every_group() -> None:
    """Everything with rows is cut already: all that is converted has none."""
    once = [op for op in priced(PlanPricer) if op[0] in ("gather", "expand")]
    twice = [op for op in priced(GroupPricer) if op[0] in ("gather", "expand")]
    assert once
    for (kind, name, sizes, elements, moved), more in zip(once, twice, strict=True):
        assert more == (kind, name, (2, *sizes), 2 * elements, 2 * moved)
