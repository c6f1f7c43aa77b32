"""Speed of an MLP 784-2048-2048-10 with dropout after both hidden layers, against Inductor.

Sides, all in one run and in turns: ardd; stock Inductor with the same dropout; Inductor without
dropout; and the *floor*, the five large matrix products alone (two forward, two weight gradients,
one input gradient) at the rates that ardd used. The loss is eager on every side.

    python -m benchmarks.mlp --out benchmarks/results
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmarks._measure import alternate, clock, header, milliseconds, ratio, table, write
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import ardd

PIXELS, HIDDEN, CLASSES = 784, 2048, 10

Timed = Callable[[], dict[str, float]]


def build_model(p: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Dropout(p),
        nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Dropout(p),
        nn.Linear(HIDDEN, CLASSES),
    )  # fmt: skip


def training_step(model: nn.Module, backend: str, x: Tensor, y: Tensor) -> Timed:
    """Returns what times one step of a copy of `model`, the optimizer apart and included."""
    model = copy.deepcopy(model)
    run = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> dict[str, float]:
        start = clock(x.device)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(run(x), y).backward()
        backward_done = clock(x.device)
        optimizer.step()
        return {"fw+bw": backward_done - start, "step": clock(x.device) - start}

    return step


def products(x: Tensor, kept_1: int, kept_2: int) -> Timed:
    """Returns what times the five large products with `kept_1` and `kept_2` hidden features."""
    batch = len(x)

    def values(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=x.device)

    weight_1, weight_2 = values(kept_1, PIXELS), values(kept_2, kept_1)
    hidden_1, grad_1, grad_2 = values(batch, kept_1), values(batch, kept_1), values(batch, kept_2)

    def floor() -> dict[str, float]:
        start = clock(x.device)
        torch.mm(x, weight_1.t())
        torch.mm(hidden_1, weight_2.t())
        torch.mm(grad_2.t(), hidden_1)
        torch.mm(grad_2, weight_2)
        torch.mm(grad_1.t(), x)
        return {"fw+bw": clock(x.device) - start}

    return floor


def rates_used(model: nn.Module, x: Tensor) -> list[float]:
    """Returns the drop rate that ardd uses at each dropout; 0 where the mask stays random."""
    decisions = ardd.explain(model, x).decisions
    return [d.p_used if d.taken and d.p_used is not None else 0.0 for d in decisions]


def compare(p: float, batch: int, repeats: int, device: torch.device) -> tuple[list[str], ...]:
    """Returns the row of the forward+backward table, and the one of the full step."""
    torch.compiler.reset()
    model = build_model(p).to(device)
    x = torch.randn(batch, PIXELS, device=device)
    y = torch.randint(CLASSES, (batch,), device=device)
    used = rates_used(model, x)
    kept_1, kept_2 = (round((1 - rate) * HIDDEN) for rate in used)
    measured = alternate(
        {
            "ardd": training_step(model, "ardd", x, y),
            "inductor": training_step(model, "inductor", x, y),
            "no dropout": training_step(copy.deepcopy(model).eval(), "inductor", x, y),
            "floor": products(x, kept_1, kept_2),
        },
        repeats=repeats,
    )
    seconds = measured.seconds
    case = [str(batch), str(p), " / ".join(f"{rate:.3f}" for rate in used)]
    rows = []
    for what in ("fw+bw", "step"):
        ours = seconds["ardd"][what]
        others = [seconds[name][what] for name in ("inductor", "no dropout")]
        rows.append([*case, *(milliseconds(s) for s in (ours, *others))])
        rows[-1] += [ratio(other, ours) for other in others]
    floor = seconds["floor"]["fw+bw"]
    rows[0] += [milliseconds(floor), ratio(seconds["ardd"]["fw+bw"], floor)]
    rows[0] += [f"{measured.others:.0%}"]
    return tuple(rows)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--p", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, help="folder to write the tables to")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    text = [header("mlp", "Speed of an MLP with dropout, against Inductor", argv, args.device)]
    cases = list(itertools.product(args.batch, args.p))
    with Progress(console=Console(stderr=True)) as progress:
        pairs = [
            compare(p, batch, args.repeats, args.device)
            for batch, p in progress.track(cases, description="batch and p")
        ]
    headings = ["batch", "p", "p used", "ardd ms", "Inductor ms", "no dropout ms"]
    headings += ["Inductor / ardd", "no dropout / ardd"]
    floor_headings = ["floor ms", "ardd / floor", "others' CPU"]
    text += ["Forward and backward; the floor is the five large products at the rates used.\n"]
    text += [table([*headings, *floor_headings], [pair[0] for pair in pairs])]
    text += ["\nThe same with the SGD step.\n", table(headings, [pair[1] for pair in pairs])]
    text += [f"\nMedians of {args.repeats} repetitions in turns; ratios are medians (quartiles) of"]
    text += ["the ratios within each repetition. Compilation is left out. Others' CPU: the share"]
    text += ["of the CPU time that went to other processes meanwhile."]
    print("\n".join(text))
    if args.out:
        write(args.out, "mlp", args.device, "\n".join(text))


if __name__ == "__main__":
    main()
