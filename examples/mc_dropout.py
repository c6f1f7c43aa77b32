"""Monte-Carlo dropout: how sure is a classifier? Dropout stays on while it predicts.

Gal and Ghahramani, "Dropout as a Bayesian Approximation", 2016, https://arxiv.org/abs/1506.02142:
the mean of many predictions with dropout estimates the class, their entropy the uncertainty. The
passes run under `torch.no_grad`, and ardd leaves the dropped features out of them too.

A structured mask is shared by the batch: the rows of one pass see the same thinned network. Each
row still averages over as many networks as there are passes.
"""

from __future__ import annotations

import argparse
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


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    run = torch.compile(model, backend="ardd")
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in track(range(steps), "training"):
        rows = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        F.cross_entropy(run(x[rows]), y[rows]).backward()
        optimizer.step()


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy of each row in nats, [rows, classes] to [rows]."""
    terms: Tensor = torch.special.entr(probabilities)
    return terms.sum(1)


@torch.no_grad()
def timed_pass(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, float]:
    start = time.perf_counter()
    probabilities = run(x).softmax(1)
    return probabilities, time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps and passes")
    args = parser.parse_args(argv)
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError as error:
        raise SystemExit("pip install scikit-learn: this example uses its digits") from error

    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels).float() / 16, torch.from_numpy(digits).long()
    order = torch.randperm(len(x))
    train_rows, test_rows = order[:1285], order[1285:]
    x_test, y_test = x[test_rows], y[test_rows]
    strange = x_test[:, torch.randperm(x.shape[1])]  # the same pixels, shuffled: no digits at all
    inputs = torch.cat([x_test, strange])

    model = nn.Sequential(
        nn.Linear(64, 2048), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(2048, 2048), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(2048, 10),
    )  # fmt: skip
    train(model, x[train_rows], y[train_rows], 30 if args.quick else 300)

    # The model stays in training mode. The two take turns, so that their times compare.
    names = ("inductor", "ardd")
    runs = {name: torch.compile(model, backend=name) for name in names}
    for run in runs.values():
        timed_pass(run, inputs)  # compiles
    draws: dict[str, list[Tensor]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in track(range(5 if args.quick else 50), "predicting"):
        names = names[::-1]  # the one that went first goes last
        for name in names:
            probabilities, took = timed_pass(runs[name], inputs)
            draws[name].append(probabilities)
            seconds[name].append(took)

    table = Table(title=f"{len(draws['ardd'])} passes over {len(inputs)} inputs")
    for heading in ("", "test accuracy", "right", "wrong", "no digit", "median pass"):
        table.add_column(heading, justify="right")
    for name in runs:
        mean = torch.stack(draws[name]).mean(0)
        unsure, unsure_strange = entropy(mean).split([len(x_test), len(strange)])
        right = mean[: len(x_test)].argmax(1) == y_test
        table.add_row(
            name,
            f"{right.float().mean().item():.3f}",
            f"{unsure[right].mean().item():.2f}",
            f"{unsure[~right].mean().item():.2f}",
            f"{unsure_strange.mean().item():.2f}",
            f"{1e3 * statistics.median(seconds[name]):.1f} ms",
        )
    table.caption = "right, wrong, no digit: mean entropy in nats"
    rich.print(table)
    pairs = zip(seconds["inductor"], seconds["ardd"], strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    rich.print(f"ardd passes run at {ratio:.2f}x Inductor's speed")
    rich.print(ardd.report())


if __name__ == "__main__":
    main()
