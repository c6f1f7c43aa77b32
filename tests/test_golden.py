"""Graphs before and after, as files to be read in review: ``ARDD_ACCEPT=1`` writes them anew."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ardd

GOLDEN = Path(__file__).parent / "golden"
ACCEPT = os.environ.get("ARDD_ACCEPT") == "1"
OPTIONS: dict[str, object] = {"pattern": "block", "block_size": 4, "strict": True}

pytestmark = pytest.mark.skipif(
    not torch.__version__.startswith("2.13"), reason="other versions of torch decompose otherwise"
)


def mlp() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(12, 32), nn.ReLU(), nn.Dropout(0.5)]
    layers += [nn.Linear(32, 32), nn.GELU(), nn.Dropout(0.25), nn.Linear(32, 5)]
    return nn.Sequential(*layers), torch.randn(6, 12)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.project = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.drop_1, self.drop_2, self.drop_3 = nn.Dropout(0.25), nn.Dropout(0.5), nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        attended = (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v
        x = x + self.drop_1(self.project(attended))
        hidden = self.drop_2(F.gelu(self.up(self.norm_2(x))))
        return x + self.drop_3(self.down(hidden))  # type: ignore[no-any-return]


def transformer_block() -> tuple[nn.Module, Tensor]:
    return Block(), torch.randn(2, 6, 16)


def cnn() -> tuple[nn.Module, Tensor]:
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.5)]
    layers += [nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Dropout2d(0.5), nn.Flatten(), nn.Linear(72, 5)]
    return nn.Sequential(*layers), torch.randn(2, 3, 12, 12)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": mlp,
    "transformer_block": transformer_block,
    "cnn": cnn,
}
# What the rewrite adds (+) and removes (-); a product is never added nor removed.
_HASHED = {
    "aten.select": 3,  # a seed, and its halves
    "prims.iota": 1,
    "aten.bitwise_xor": 6,
    "aten.__rshift__": 4,
    "aten.bitwise_and": 4,
    "aten.mul": 3,
    "aten.view": 1,
}
"""What it takes to hash the seed of one dropout."""


def with_seeds(n_dropouts: int, changes: dict[str, int]) -> dict[str, int]:
    total = Counter({op: count * n_dropouts for op, count in _HASHED.items()})
    total.update(changes | {"ardd.draw_seeds": 1})
    return dict(total)


_FOR_TWO = {
    "ardd.dropout_mask": -2,
    "ardd.draw_blocks": 2,
    "aten.alias": -2,
    "aten.clamp_min": 2,
    "aten.ge": 2,
    "aten.index": 12,
    "aten.scalar_tensor": 6,
    "aten.view": 30,
    "aten.where": 6,
}
CHANGES: dict[str, dict[str, int]] = {
    "mlp": with_seeds(2, _FOR_TWO),
    # The biases of the convolutions are cut by elements, the rest by blocks.
    "cnn": with_seeds(
        2,
        _FOR_TWO
        | {"aten.view": 28, "aten.add": 2, "aten.mul": 2, "aten.unsqueeze": 2, "prims.iota": 2},
    ),
    "transformer_block": with_seeds(
        3,
        {
            "ardd.dropout_mask": -3,
            "ardd.draw_blocks": 3,
            "aten.clamp_min": 3,
            "aten.ge": 3,
            "aten.index": 20,
            "aten.scalar_tensor": 9,
            "aten.view": 49,
            "aten.where": 9,
        },
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_graphs_are_those_of_the_files(name: str) -> None:
    model, x = MODELS[name]()
    torch._dynamo.reset()  # a model seen before would have symbolic sizes
    report = ardd.explain(model, x, options=OPTIONS)
    assert all(decision.taken for decision in report.decisions)
    for side, code in (("before", report.before), ("after", report.after)):
        path = GOLDEN / f"{name}.{side}.txt"
        if ACCEPT:
            path.write_text(normalised(code))
        assert normalised(code) == path.read_text(), f"{path.name}; ARDD_ACCEPT=1 accepts it"


@pytest.mark.parametrize("name", MODELS)
def test_ops_added_and_removed(name: str) -> None:
    model, x = MODELS[name]()
    torch._dynamo.reset()  # a model seen before would have symbolic sizes
    report = ardd.explain(model, x, options=OPTIONS)
    before, after = ops(report.before), ops(report.after)
    changes = {op: after[op] - before[op] for op in before | after if after[op] != before[op]}
    assert changes == CHANGES[name]
    for product in ("aten.mm", "aten.addmm", "aten.bmm", "aten.convolution"):
        assert before[product] == after[product]


def ops(code: str) -> Counter[str]:
    return Counter(re.findall(r"torch\.ops\.(\w+\.\w+)", code))


def normalised(code: str) -> str:
    """Returns the statements alone, with names counted up in order: no comments, no clean-up."""
    lines = [line.split("#")[0].rstrip() for line in code.splitlines()]
    lines = [re.sub(r";  [\w =]+ = None$", "", line) for line in lines if line.strip()]
    names: dict[str, str] = {}
    text = "\n".join(lines)
    for match in re.finditer(r'^ +(\w+)(?:: "[^"]*")? = ', text, re.MULTILINE):
        names.setdefault(match[1], f"v{len(names)}")
    return re.sub(r"(?<![\w.])\w+\b", lambda m: names.get(m[0], m[0]), text) + "\n"
