"""Do tiles of weights regularise as well as DropConnect's elementwise masks? An MLP on MNIST says.

As `benchmarks.quality`, with the weights of both hidden layers of the MLP dropped instead of their
features. *Regular* tiles are those of Song et al. 2018, https://arxiv.org/abs/1805.08939: tile
(i, j) is kept where i + j - bias is a multiple of the period, and the bias is drawn. ardd deals
rows and columns of tiles into classes at random instead. Both scale what is kept by the period.

    python -m benchmarks.quality_dropconnect --data DIR --out benchmarks/results
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmarks._measure import header, table, write
from benchmarks._tasks import mnist
from benchmarks.quality import Mask, Scores, rows, train, what_ardd_uses
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

PIXELS, HIDDEN, CLASSES = 784, 1024, 10
REGULAR = "regular tiles"
TILE = 32  # the pixels of an image are no multiple of it: there a tile is 49 wide


class DropConnect(nn.Linear):
    """A linear layer that drops its weight, by elements or by regular tiles."""

    def __init__(self, inputs: int, outputs: int, p: float, regular: bool) -> None:
        super().__init__(inputs, outputs)
        self.p, self.regular = p, regular

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.regular:
            return F.linear(x, self.weight * self.regular_mask(), self.bias)
        return F.linear(x, F.dropout(self.weight, self.p, self.training), self.bias)

    def regular_mask(self) -> Tensor:
        period = round(1 / (1 - self.p))
        outputs, inputs = self.weight.shape
        width = TILE if inputs % TILE == 0 else 49
        tiles = torch.arange(outputs) // TILE + (torch.arange(inputs) // width).unsqueeze(1)
        kept = (tiles.t() - torch.randint(period, ())) % period == 0
        return kept * float(period)


def build_model(p: float, regular: bool) -> nn.Sequential:
    return nn.Sequential(
        DropConnect(PIXELS, HIDDEN, p, regular), nn.ReLU(),
        DropConnect(HIDDEN, HIDDEN, p, regular), nn.ReLU(),
        nn.Linear(HIDDEN, CLASSES),
    )  # fmt: skip


def masks(rates: Sequence[float]) -> Iterator[Mask]:
    yield Mask("none", 0.0)
    for p in rates:
        yield Mask("Bernoulli", p)
        yield Mask(REGULAR, p)
        yield Mask("ardd's default", p, options={"strict": True})


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST's t10k files")
    parser.add_argument("--p", type=float, nargs="+", default=[0.5, 0.75])
    parser.add_argument("--steps", type=int, default=1240)
    parser.add_argument("--lr", type=float, default=0.02, help="of SGD, momentum 0.9, cosine")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    parser.add_argument("--out", type=Path, help="folder to write the table to")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error("--seeds must be at least 2: one value has no standard error")

    device = torch.device("cpu")
    title = "Quality of tiles of weights against elementwise masks, MLP on MNIST"
    text = [header("quality_dropconnect", title, argv, device)]
    scores = []
    kinds = list(masks(args.p))
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(kinds) * args.seeds)
        for mask in kinds:
            progress.update(bar, description=f"p={mask.p} {mask.name}")
            torch.compiler.reset()
            build = functools.partial(build_model, regular=mask.name == REGULAR)
            task = dataclasses.replace(mnist(args.data, args.steps, args.lr), build=build)
            model, ours = build(mask.p), mask.options is not None
            backend = "ardd" if ours else "inductor"
            run = torch.compile(model, backend=backend, options=mask.options)
            runs = []
            for seed in range(args.seeds):
                runs.append(train(task, model, run, mask.p, seed))
                progress.advance(bar)
            scores.append(Scores(mask, what_ardd_uses(mask), runs))
    headings = ["p", "mask", "ardd used", "accuracy %", "loss"]
    headings += ["accuracy - Bernoulli's", "loss - Bernoulli's", "time"]
    text += [table(headings, list(rows(task, scores)))]
    text += [
        f"\n{args.seeds} seeds, {args.steps} steps, {len(task.validation[1])} test images; mean"
    ]
    text += [
        "± standard error over the seeds. **Bold**: worse than Bernoulli by more than a standard"
    ]
    text += ["error of the difference, which chance alone does to every sixth row."]
    print("\n".join(text))
    if args.out:
        write(args.out, "quality_dropconnect", device, "\n".join(text))


if __name__ == "__main__":
    main()
