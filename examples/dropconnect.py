"""Trains an MLP that drops its weights (DropConnect) under Inductor and ardd, side by side.

The layer is written as in any other script: ``F.linear(x, F.dropout(weight))``. Under Inductor the
mask has an entry for every weight and all is computed; ardd drops tiles of 32 x 32 weights and
computes with the rest. Both sides start from the same weights, see the same batches and take turns.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import rich
import torch
import torch.nn.functional as F
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import ardd

WIDTH, BATCH = 1024, 120
WARMUP_STEPS = 3  # these compile, and are left out of the medians


class DropConnect(nn.Linear):
    """A linear layer that drops weights: Wan et al. 2013, "Regularization of Neural Networks
    using DropConnect", https://proceedings.mlr.press/v28/wan13.html."""

    def __init__(self, inputs: int, outputs: int, p: float) -> None:
        super().__init__(inputs, outputs)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.dropout(self.weight, self.p, self.training), self.bias)


@dataclasses.dataclass
class Side:
    backend: str
    model: nn.Module
    run: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    seconds: list[float] = dataclasses.field(default_factory=list)

    def step(self, x: Tensor, y: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self.run(x), y).backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)

    def accuracy(self, x: Tensor, y: Tensor) -> float:
        self.model.eval()
        with torch.no_grad():
            logits: Tensor = self.model(x)
        self.model.train()
        return (logits.argmax(1) == y).float().mean().item()


def build_sides(p: float) -> list[Side]:
    model = nn.Sequential(
        DropConnect(64, WIDTH, p), nn.ReLU(),
        DropConnect(WIDTH, WIDTH, p), nn.ReLU(),
        nn.Linear(WIDTH, 10),
    )  # fmt: skip
    sides = []
    for backend in ("inductor", "ardd"):
        own = copy.deepcopy(model)
        optimizer = torch.optim.SGD(own.parameters(), 0.02, momentum=0.9)
        sides.append(Side(backend, own, torch.compile(own, backend=backend), optimizer))
    return sides


def compare(sides: Sequence[Side], x: Tensor, y: Tensor) -> Table:
    table = Table(title=f"digits, {len(y)} test images")
    for heading in ("", "test accuracy", "first step", "median step", "speed, Inductor = 1"):
        table.add_column(heading, justify="right")
    stock = sides[0].seconds[WARMUP_STEPS:]
    for side in sides:
        seconds = side.seconds[WARMUP_STEPS:]
        ratio = statistics.median(a / b for a, b in zip(stock, seconds, strict=True))
        table.add_row(
            side.backend,
            f"{100 * side.accuracy(x, y):.1f} %",
            f"{side.seconds[0]:.1f} s",
            f"{1e3 * statistics.median(seconds):.1f} ms",
            f"{ratio:.2f}x",
        )
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--p", type=float, default=0.5, help="drop rate (default 0.5)")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="1 epoch only")
    args = parser.parse_args(argv)
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError as error:
        raise SystemExit("pip install scikit-learn: this example trains on its digits") from error

    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels).float() / 16, torch.from_numpy(digits).long()
    train, test = torch.randperm(len(x)).split([1440, len(x) - 1440])
    sides = build_sides(args.p)
    for epoch in track(range(1 if args.quick else args.epochs), "epochs"):
        for number, rows in enumerate(train[torch.randperm(len(train))].split(BATCH)):
            turn = (epoch + number) % 2  # who goes first changes from step to step
            for side in (sides[turn], sides[1 - turn]):
                side.step(x[rows], y[rows])
    rich.print(compare(sides, x[test], y[test]))
    rich.print(ardd.report())


if __name__ == "__main__":
    main()
