"""Speed of an MLP that drops its weights (DropConnect), against Inductor's masked dense products.

A hidden layer computes ``F.linear(x, F.dropout(weight, p), bias)``; the last one, of ten classes,
drops nothing. Sides, all in one run and in turns: ardd; stock Inductor with the same dropout;
Inductor without dropout; and the *floor*, the five large products alone (two forward, two weight
gradients, one input gradient) as batched products of the share of the weights that ardd kept. The
loss is eager on every side.

    python -m benchmarks.dropconnect --out benchmarks/results
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks._measure import alternate, clock, header, milliseconds, ratio, table, write
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import ardd

CLASSES = 10
STRICT: dict[str, Any] = {"strict": True}  # a pass that fails must not be timed as ardd

Timed = Callable[[], dict[str, float]]


class DropConnect(nn.Linear):
    def __init__(self, inputs: int, outputs: int, p: float) -> None:
        super().__init__(inputs, outputs)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.dropout(self.weight, self.p, self.training), self.bias)


def build_model(p: float, inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        DropConnect(inputs, width, p), nn.ReLU(),
        DropConnect(width, width, p), nn.ReLU(),
        nn.Linear(width, CLASSES),
    )  # fmt: skip


def training_step(model: nn.Module, backend: str, x: Tensor, y: Tensor) -> Timed:
    """Returns what times forward and backward of a copy of `model`."""
    model = copy.deepcopy(model)
    run = torch.compile(model, backend=backend, options=STRICT if backend == "ardd" else None)

    def step() -> dict[str, float]:
        start = clock(x.device)
        model.zero_grad(set_to_none=True)
        F.cross_entropy(run(x), y).backward()
        return {"fw+bw": clock(x.device) - start}

    return step


def products(model: nn.Sequential, x: Tensor, kept: Sequence[tuple[int, int]]) -> Timed:
    """Returns what times the five large products with a share of the weights.

    Args:
        model: the two layers.
        x: a batch.
        kept: for each, classes of rows, and how many classes of columns one keeps.
    """
    calls: list[tuple[Tensor, Tensor]] = []
    layers = [layer for layer in model if isinstance(layer, DropConnect)]
    for layer, (period, n_kept) in zip(layers, kept, strict=True):
        rows, columns = (size // period for size in layer.weight.shape)
        inputs = torch.randn(period, len(x), n_kept * columns, device=x.device)
        grads = torch.randn(period, len(x), rows, device=x.device)
        weight = torch.randn(period, rows, n_kept * columns, device=x.device)
        calls += [(inputs, weight.mT), (grads.mT, inputs)]
        if layer is not layers[0]:
            calls.append((grads, weight))

    def floor() -> dict[str, float]:
        start = clock(x.device)
        for a, b in calls:
            torch.bmm(a, b)
        return {"fw+bw": clock(x.device) - start}

    return floor


def periods(p: float) -> tuple[int, int]:
    """Returns the smallest period with a number of kept classes that gives the rate."""
    return next((n, k) for n in range(1, 33) if abs((k := round((1 - p) * n)) / n - 1 + p) < 1e-9)


def compare(p: float, batch: int, args: argparse.Namespace) -> list[str]:
    """Returns one row of the table."""
    torch.compiler.reset()
    device = args.device
    model = build_model(p, args.inputs, args.width).to(device)
    x = torch.randn(batch, args.inputs, device=device)
    y = torch.randint(CLASSES, (batch,), device=device)
    measured = alternate(
        {
            "ardd": training_step(model, "ardd", x, y),
            "inductor": training_step(model, "inductor", x, y),
            "no dropout": training_step(copy.deepcopy(model).eval(), "inductor", x, y),
            "floor": products(model, x, [periods(p)] * 2),
        },
        repeats=args.repeats,
    )
    patterns = " / ".join(decision.pattern for decision in ardd.report().decisions)
    seconds = {name: times["fw+bw"] for name, times in measured.seconds.items()}
    ours = seconds["ardd"]
    row = [str(batch), str(p), str(periods(p)[0]), patterns]
    row += [milliseconds(seconds[name]) for name in seconds]
    row += [ratio(seconds[name], ours) for name in ("inductor", "no dropout")]
    return [*row, ratio(ours, seconds["floor"]), f"{measured.others:.0%}"]


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--p", type=float, nargs="+", default=[0.5, 0.75])
    parser.add_argument("--inputs", type=int, default=784)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, help="folder to write the table to")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    title = "Speed of an MLP with DropConnect, against Inductor"
    text = [header("dropconnect", title, argv, args.device)]
    cases = list(itertools.product(args.batch, args.p))
    with Progress(console=Console(stderr=True)) as progress:
        rows = [
            compare(p, batch, args) for batch, p in progress.track(cases, description="batch and p")
        ]
    headings = ["batch", "p", "period", "patterns", "ardd ms", "Inductor ms", "no dropout ms"]
    headings += ["floor ms", "Inductor / ardd", "no dropout / ardd", "ardd / floor", "others' CPU"]
    layers = f"{args.inputs}-{args.width}-{args.width}-{CLASSES}"
    text += [f"MLP {layers}, forward and backward. The floor is the five large products alone.\n"]
    text += [table(headings, rows)]
    text += [f"\nMedians of {args.repeats} repetitions in turns; ratios are medians (quartiles) of"]
    text += ["the ratios within each repetition. Compilation is left out. Others' CPU: the share"]
    text += ["of the CPU time that went to other processes meanwhile."]
    print("\n".join(text))
    if args.out:
        write(args.out, "dropconnect", args.device, "\n".join(text))


if __name__ == "__main__":
    main()
