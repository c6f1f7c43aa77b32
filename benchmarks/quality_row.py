"""Which row pattern regularises as well as a Bernoulli mask? An MLP on MNIST says.

The protocol of `benchmarks.quality`, with masks made in eager PyTorch: most of these kinds of mask
are no option of ardd. A mask is shared by the whole batch.

    OMP_NUM_THREADS=1 python -m benchmarks.quality_row --data DIR --out benchmarks/results
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from benchmarks._measure import header, table, write
from benchmarks._tasks import mean_and_error, mnist
from benchmarks.quality import Look, train
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import ardd
from ardd.passes.row_plans import plan_rows
from ardd.runtime.draw_rows import draw_rows

BATCH, HIDDEN = 128, 1024

Draw = Callable[[float, torch.Generator], Tensor]
"""Draws a mask at a rate, float32 ``[HIDDEN]`` or ``[BATCH, HIDDEN]``."""


def bernoulli(p: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(BATCH, HIDDEN, generator=generator) > p).float() / (1 - p)


@dataclasses.dataclass(frozen=True)
class OnePeriod:
    """Every unit has the same period in a step; groups may have starts of their own."""

    search: str
    max_period: int | None = None
    """None stands for the period above 1 / (1 - p)."""
    group: int = HIDDEN
    """Units that share a start."""
    fixed_scale: bool = False

    def __call__(self, p: float, generator: torch.Generator) -> Tensor:
        most = self.max_period or int(1 / (1 - p) + 1e-9) + 1
        found = ardd.search_distribution(p, most, self.search)
        weights = torch.tensor(found.probabilities, dtype=torch.float64)
        period = int(torch.multinomial(weights, 1, generator=generator)) + 1
        starts = period if self.group % period == 0 else self.group
        groups = HIDDEN // self.group
        start = torch.randint(starts, (groups,), generator=generator)
        steps = period * torch.arange(round(self.group / period))
        mask = torch.zeros(groups, self.group)
        mask.scatter_(1, (start[:, None] + steps) % self.group, 1.0)
        scale = 1 / (1 - p) if self.fixed_scale else HIDDEN / float(mask.sum())
        return mask.flatten() * scale


@dataclasses.dataclass(frozen=True)
class Mixed:
    """What ardd draws with groups of 8 blocks, each with a period and a start of its own."""

    block: int

    def __call__(self, p: float, generator: torch.Generator) -> Tensor:
        n_blocks = HIDDEN // self.block
        options = ardd.Options(pattern="row", row_groups=n_blocks // 8)
        plans = plan_rows(n_blocks, p, options, 0)
        assert plans is not None
        kept, _ = draw_rows(n_blocks, list(plans.counts[0]), torch.device("cpu"), 0, 0)
        mask = torch.zeros(n_blocks)
        mask[kept] = n_blocks / len(kept)
        return mask.repeat_interleave(self.block)


def kinds() -> dict[str, Draw]:
    """Returns what is compared, by name."""
    return {
        "Bernoulli": bernoulli,
        "maxent 1..8, fixed scale": OnePeriod("maxent", 8, fixed_scale=True),
        "maxent 1..8": OnePeriod("maxent", 8),
        "maxent 1..8, a start for each 32": OnePeriod("maxent", 8, 32),
        "maxent 1..4, a start for each 32": OnePeriod("maxent", 4, 32),
        "narrow": OnePeriod("narrow"),
        "narrow, fixed scale": OnePeriod("narrow", fixed_scale=True),
        "narrow, a start for each 32": OnePeriod("narrow", group=32),
        "narrow, mixed in groups of 8 units": Mixed(1),
        "narrow, mixed in groups of 8 blocks of 16": Mixed(16),
    }


def masked(model: nn.Module, draw: Callable[[], Tensor]) -> Callable[[Tensor], Tensor]:
    """Returns the model with masks in place of its dropouts."""

    first, second, last = (layer for layer in model.children() if isinstance(layer, nn.Linear))

    def run(x: Tensor) -> Tensor:
        x = first(x).relu() * draw()
        x = second(x).relu() * draw()
        return last(x)  # type: ignore[no-any-return]

    return run


def rows(scores: Sequence[tuple[float, str, list[Look]]]) -> Iterator[list[str]]:
    for p, name, found in scores:
        cells = [mean_and_error([x.metric for x in found]), mean_and_error([x.loss for x in found])]
        yield [str(p), name, *(f"{mean:.3f} ± {error:.3f}" for mean, error in cells)]


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST's t10k files")
    parser.add_argument("--p", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--kinds", nargs="+", choices=list(kinds()), default=list(kinds()))
    parser.add_argument("--steps", type=int, default=620)
    parser.add_argument("--lr", type=float, default=0.02, help="of SGD, momentum 0.9, cosine")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    parser.add_argument("--out", type=Path, help="folder to write the table to")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error("--seeds must be at least 2: one value has no standard error")

    device = torch.device("cpu")
    text = [header("quality_row", "Quality of row masks, MLP on MNIST", argv, device)]
    task = mnist(args.data, args.steps, args.lr)
    scores = []
    todo = [(p, name) for p in args.p for name in args.kinds]
    for p, name in track(todo, console=Console(stderr=True)):
        found: list[Look] = []
        for seed in range(args.seeds):
            model, generator = task.build(p), torch.Generator().manual_seed(1000 + seed)
            draw = kinds()[name]
            run = masked(model, lambda draw=draw, p=p, g=generator: draw(p, g))  # type: ignore[misc]
            found.append(train(task, model, run, p, seed)[-1])
        scores.append((p, name, found))
    text += [table(["p", "mask", "accuracy %", "loss"], list(rows(scores)))]
    text += [
        f"\n{args.seeds} seeds, {args.steps} steps, {len(task.validation[1])} test images; mean"
    ]
    text += ["± standard error over the seeds."]
    print("\n".join(text))
    if args.out:
        write(args.out, "quality_row", device, "\n".join(text))


if __name__ == "__main__":
    main()
