"""Trains one MLP under eager PyTorch, Inductor and ardd, side by side, and compares them.

The three start from the same weights and see the same batches. Their steps take turns, so that a
busy moment of the machine hits all of them alike.

    python examples/demo.py              # scikit-learn's digits
    python examples/demo.py --data DIR   # MNIST: DIR holds t10k-{images-idx3,labels-idx1}-ubyte.gz
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gzip
import statistics
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import rich
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor, nn

import ardd

HIDDEN = 2048
BATCH = 128
WARMUP_STEPS = 3  # these compile, and are left out of the medians


@dataclasses.dataclass(frozen=True)
class Data:
    name: str
    train_x: Tensor  # float32 [images, pixels]
    train_y: Tensor  # int64 [images]
    test_x: Tensor
    test_y: Tensor


@dataclasses.dataclass
class Side:
    name: str
    model: nn.Module
    run: Callable[[Tensor], Tensor]  # the model as this side runs it
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


def read_idx(path: Path) -> Tensor:
    """Reads one gzipped idx file of bytes: magic 0 0 8 ndim, big-endian sizes, values."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    sizes = struct.unpack_from(f">{raw[3]}i", raw, 4)
    return torch.frombuffer(raw, dtype=torch.uint8, offset=4 + 4 * raw[3]).view(sizes)


def load(folder: Path | None) -> Data:
    """Four fifths of the images to train on, the rest to test on, by a fixed permutation."""
    if folder is not None:
        name = "MNIST"
        x = read_idx(folder / "t10k-images-idx3-ubyte.gz").flatten(1).float() / 255
        y = read_idx(folder / "t10k-labels-idx1-ubyte.gz").long()
    else:
        try:
            from sklearn.datasets import load_digits  # type: ignore[import-untyped]
        except ImportError as error:
            raise SystemExit("pip install scikit-learn for its digits, or --data DIR") from error
        name = "digits"
        pixels, digits = load_digits(return_X_y=True)
        x, y = torch.from_numpy(pixels).float() / 16, torch.from_numpy(digits).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order.split([len(x) * 4 // 5, len(x) - len(x) * 4 // 5])
    return Data(name, x[train], y[train], x[test], y[test])


def batches(data: Data) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields shuffled full batches, without end."""
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(len(data.train_x), generator=generator)
        for rows in order.split(BATCH)[: len(order) // BATCH]:
            yield data.train_x[rows], data.train_y[rows]


def build_sides(pixels: int, p: float) -> list[Side]:
    model = nn.Sequential(
        nn.Linear(pixels, HIDDEN), nn.ReLU(), nn.Dropout(p),
        nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Dropout(p),
        nn.Linear(HIDDEN, 10),
    )  # fmt: skip
    sides = []
    for name in ("eager", "inductor", "ardd"):
        own = copy.deepcopy(model)
        run = own if name == "eager" else torch.compile(own, backend=name)
        sides.append(Side(name, own, run, torch.optim.SGD(own.parameters(), 0.02, momentum=0.9)))
    return sides


def train(sides: Sequence[Side], data: Data, steps: int) -> None:
    columns = (
        TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns) as progress:
        bars = [progress.add_task(s.name, total=steps, note="compiling ...") for s in sides]
        stream, pause = batches(data), max(1, steps // 20)
        for done in range(1, steps + 1):
            x, y = next(stream)
            turn = done % len(sides)  # who goes first changes from step to step
            for side in [*sides[turn:], *sides[:turn]]:
                side.step(x, y)
            for bar, side in zip(bars, sides, strict=True):
                progress.update(bar, completed=done)
                if done % pause == 0 and done > WARMUP_STEPS:
                    accuracy = side.accuracy(data.test_x, data.test_y)
                    ms = 1e3 * statistics.median(side.seconds[WARMUP_STEPS:])
                    progress.update(bar, note=f"accuracy {accuracy:.3f}  {ms:.1f} ms/step")


def compare(sides: Sequence[Side], data: Data) -> Table:
    inductor = next(s for s in sides if s.name == "inductor").seconds[WARMUP_STEPS:]
    table = Table(title=f"{data.name}, {len(data.test_y)} test images")
    for heading in ("", "test accuracy", "first step", "median step", "speed, Inductor = 1"):
        table.add_column(heading, justify="right")
    for side in sides:
        accuracy = side.accuracy(data.test_x, data.test_y)
        error = (accuracy * (1 - accuracy) / len(data.test_y)) ** 0.5
        seconds = side.seconds[WARMUP_STEPS:]
        ratio = statistics.median(a / b for a, b in zip(inductor, seconds, strict=True))
        table.add_row(
            side.name,
            f"{100 * accuracy:.1f} ± {100 * error:.1f} %",
            f"{side.seconds[0]:.1f} s",
            f"{1e3 * statistics.median(seconds):.1f} ms",
            f"{ratio:.2f}x",
        )
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with MNIST's t10k files")
    parser.add_argument("--p", type=float, default=0.5, help="drop rate (default 0.5)")
    parser.add_argument("--steps", type=int, default=400, help="training steps of each side")
    parser.add_argument("--quick", action="store_true", help="20 steps only")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    data = load(args.data)
    sides = build_sides(data.train_x.shape[1], args.p)
    train(sides, data, 20 if args.quick else args.steps)
    rich.print(compare(sides, data))
    rich.print(ardd.report())


if __name__ == "__main__":
    main()
