"""Trains with compressed saves and shows what they cost: validation loss against saved bytes.

The forward is dense and drops nothing; only what is kept for the backward is dropped or rounded.
Two models, every way to save from the same weights and on the same batches:

    python examples/deferred_dropout.py                      # a table
    python examples/deferred_dropout.py --plot saves.png     # and a plot: pip install matplotlib
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import importlib
import pydoc_data.topics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rich
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor, nn

import ardd

WIDTH, HEADS, CONTEXT = 128, 4, 64
DENSE = "dense"
WAYS: dict[str, dict[str, Any]] = {
    DENSE: {"saves": "off"},
    "nm 0.5": {"saves": "nm", "save_density": 0.5},
    "nm 0.25": {"saves": "nm", "save_density": 0.25},
    "nm 0.1": {"saves": "nm", "save_density": 0.1},
    "int8": {"saves": "int8"},
    "int4": {"saves": "int4"},
    "mixed": {"saves": "mixed"},
}
QUICK = (DENSE, "nm 0.25", "int8")


class Block(nn.Module):
    """Shapes: b batch, t characters, d width, h heads, e features of a head, v vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x_btd: Tensor) -> Tensor:
        batch, length, _ = x_btd.shape
        heads = self.qkv(self.norm_1(x_btd)).view(batch, length, 3 * HEADS, -1).transpose(1, 2)
        q_bhte, k_bhte, v_bhte = heads.chunk(3, dim=1)
        out_bhte = F.scaled_dot_product_attention(q_bhte, k_bhte, v_bhte, is_causal=True)
        x_btd = x_btd + self.project(out_bhte.transpose(1, 2).flatten(2))
        added_btd: Tensor = self.mlp(self.norm_2(x_btd))
        return x_btd + added_btd


class CharModel(nn.Module):
    """A GPT of characters, without dropout."""

    def __init__(self, vocabulary: int, layers: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(layers)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary)

    def forward(self, ids_bt: Tensor) -> Tensor:
        positions = torch.arange(ids_bt.shape[1], device=ids_bt.device)
        x_btd = self.token(ids_bt) + self.position(positions)
        logits_btv: Tensor = self.head(self.norm(self.blocks(x_btd)))
        return logits_btv


@dataclasses.dataclass(frozen=True)
class Task:
    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    valid_x: Tensor
    valid_y: Tensor
    batch: int
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    way: str
    saved_bytes: int
    loss: float


def text_task(layers: int) -> Task:
    """Predicts the next character of Python's help topics; the last tenth validates."""
    text = "\n".join(pydoc_data.topics.topics.values())
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([number[character] for character in text])
    windows = ids[: len(ids) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    train, valid = windows[: len(windows) * 9 // 10], windows[len(windows) * 9 // 10 :][:256]
    x, y, valid_x, valid_y = train[:, :-1], train[:, 1:], valid[:, :-1], valid[:, 1:]
    model = CharModel(len(number), layers)
    return Task("transformer", model, x, y, valid_x, valid_y, 32, 3e-3)


def digits_task() -> Task:
    """Classifies scikit-learn's digits; the last fifth of a fixed permutation validates."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError as error:
        raise SystemExit("pip install scikit-learn: this example trains on its digits") from error
    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels).float() / 16, torch.from_numpy(digits).long()
    order = torch.randperm(len(x))
    train, valid = order[:1440], order[1440:]
    model = nn.Sequential(
        nn.Linear(64, 512), nn.ReLU(),
        nn.Linear(512, 512), nn.ReLU(),
        nn.Linear(512, 10),
    )  # fmt: skip
    return Task("MLP", model, x[train], y[train], x[valid], y[valid], 96, 1e-3)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def train(
    task: Task, way: str, target: str, steps: int, advance: Callable[[], object]
) -> tuple[ardd.Report, float]:
    """Returns the report of this way, and the validation loss."""
    torch.compiler.reset()  # or torch stops compiling the model after a few ways
    torch.manual_seed(0)
    model = copy.deepcopy(task.model)
    options = {"target": target, "strict": True, **WAYS[way]}
    compiled = torch.compile(model, backend="ardd", options=options)
    optimizer = torch.optim.AdamW(model.parameters(), task.learning_rate)
    batches = torch.Generator().manual_seed(0)  # int8 and int4 draw from the other generator
    known = len(ardd.report().graphs)
    for _ in range(steps):
        rows = torch.randint(len(task.x), (task.batch,), generator=batches)
        optimizer.zero_grad()
        loss_of(compiled(task.x[rows]), task.y[rows]).backward()
        optimizer.step()
        advance()
    with torch.no_grad():
        loss = loss_of(model(task.valid_x), task.valid_y).item()
    return ardd.Report(ardd.report().graphs[known:]), loss


def train_every_way(
    task: Task, ways: Sequence[str], target: str, steps: int, progress: Progress
) -> list[Outcome]:
    runs = {}
    for way in ways:
        bar = progress.add_task(f"{task.name}, {way}", total=steps)
        runs[way] = train(task, way, target, steps, functools.partial(progress.advance, bar))
    outcomes = []
    for way, (report, loss) in runs.items():
        # Where nothing is encoded nothing is counted: any other report says what torch saves.
        dense = way == DENSE
        saved = runs["int8"][0].saved_bytes_before if dense else report.saved_bytes_after
        assert saved is not None
        outcomes.append(Outcome(way, saved, loss))
    return outcomes


def compare(task: Task, outcomes: Sequence[Outcome]) -> Table:
    table = Table(title=f"{task.name}, batch {task.batch}")
    for heading in ("saves", "saved for backward", "times less", "validation loss", "change"):
        table.add_column(heading, justify="right")
    dense = next(outcome for outcome in outcomes if outcome.way == DENSE)
    for outcome in outcomes:
        table.add_row(
            outcome.way,
            f"{outcome.saved_bytes / 1024:,.0f} KiB",
            f"{dense.saved_bytes / outcome.saved_bytes:.2f}",
            f"{outcome.loss:.4f}",
            f"{100 * (outcome.loss / dense.loss - 1):+.1f} %",
        )
    return table


def find_matplotlib() -> Any:
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise SystemExit("pip install matplotlib: --plot draws with it") from error


def plot(results: dict[str, list[Outcome]], path: Path) -> None:
    figure = find_matplotlib().Figure(figsize=(5 * len(results), 4), layout="constrained")
    for axes, (name, outcomes) in zip(
        figure.subplots(1, len(results)), results.items(), strict=True
    ):
        axes.set(title=name, xlabel="saved for backward, KiB", ylabel="validation loss")
        axes.set_xscale("log")
        for family in dict.fromkeys(outcome.way.split()[0] for outcome in outcomes):
            own = [o for o in outcomes if o.way.split()[0] == family]
            axes.plot([o.saved_bytes / 1024 for o in own], [o.loss for o in own], "o-")
        for o in outcomes:
            at = (o.saved_bytes / 1024, o.loss)
            axes.annotate(o.way, at, xytext=(4, 4), textcoords="offset points")
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="training steps of each way")
    parser.add_argument("--quick", action="store_true", help="2 steps of some ways, op by op")
    parser.add_argument("--plot", type=Path, help="write a plot there, such as saves.png")
    args = parser.parse_args(argv)
    if args.plot is not None:
        find_matplotlib()  # before the training, not after it

    torch.manual_seed(0)
    tasks = [digits_task(), text_task(layers=1 if args.quick else 2)]
    ways, target, steps = (QUICK, "eager", 2) if args.quick else ((*WAYS,), "auto", args.steps)
    results: dict[str, list[Outcome]] = {}
    columns = (TextColumn("{task.description:>20}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns) as progress:
        for task in tasks:
            results[task.name] = train_every_way(task, ways, target, steps, progress)

    for task in tasks:
        rich.print(compare(task, results[task.name]))
    if args.plot is not None:
        plot(results, args.plot)
        rich.print(f"wrote {args.plot}")


if __name__ == "__main__":
    main()
