"""Does each kind of mask train as well as torch's Bernoulli dropout, where dropout helps?

Small models are trained on few data with masks of each pattern, and with blocks on each kind of
site alone, from the same weights on the same batches, seed by seed. A rate at which Bernoulli does
not beat no dropout by two standard errors says nothing about masks: the row says so, and only the
patterns run there. Every run is kept in the file of ``--resume``, from which an interrupted
comparison goes on.

    OMP_NUM_THREADS=1 python -m benchmarks.quality_kinds --mnist DIR --text FILE \\
        --words TRAIN VALID --resume FILE --out DIR
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks._measure import header, table, write
from benchmarks._small_tasks import small_tasks
from benchmarks._tasks import Task, mean_and_error
from benchmarks.quality import train
from torch import Tensor, nn

import ardd

Options = Mapping[str, Any]

STOCK = ("none", "Bernoulli")
PATTERNS: Mapping[str, Options] = {
    "ours": {"pattern": "random"},
    "auto": {},
    "block": {"pattern": "block"},
}
ALWAYS = ("ours", "auto")
"""Sides that run at uninformative rates too."""
ENOUGH = 2.0
"""Standard errors by which Bernoulli must beat none."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training of one side from one seed: a line of the file."""

    task: str
    p: float
    side: str
    seed: int
    value: float
    """Accuracy in percent or loss in nats on the validation set, after the last step."""
    seconds: float
    """Of all cores, so that other processes do not count."""
    roles: tuple[str, ...] = ()
    """Kinds of site that ardd structured; empty for stock torch."""
    used: str = ""
    """What ardd made of the dropouts."""

    @property
    def key(self) -> tuple[str, float, str, int]:
        return self.task, self.p, self.side, self.seed


class Runs:
    """The runs so far, in memory and, one JSON object a line, in a file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.found: dict[tuple[str, float, str, int], Run] = {}
        if path is None or not path.exists():
            return
        text = path.read_text("utf-8")
        for line in text.splitlines():
            try:
                fields = json.loads(line)
                run = Run(**{**fields, "roles": tuple(fields["roles"])})
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # cut off when it was written
            self.found[run.key] = run
        if text and not text.endswith("\n"):
            path.write_text(text + "\n", "utf-8")

    def add(self, run: Run) -> None:
        self.found[run.key] = run
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(run)) + "\n")

    def of(self, task: str, p: float, side: str, seeds: int) -> list[Run]:
        """Returns the runs of a side in the order of their seeds, those missing left out."""
        keys = ((task, 0.0 if side == "none" else p, side, seed) for seed in range(seeds))
        return [self.found[key] for key in keys if key in self.found]


def options_of(side: str) -> Options | None:
    """Returns the options of ardd, None for stock torch; ``block:input`` is one kind alone."""
    if side in STOCK:
        return None
    pattern, _, kind = side.partition(":")
    kinds = {"structure": (kind,)} if kind else {}
    return {**PATTERNS[pattern], **kinds, "strict": True, "target": "eager"}


def by_accuracy(task: Task) -> bool:
    """Whether a task is judged by its accuracy, else by its loss."""
    return task.metric == "accuracy %"


def run_side(task: Task, p: float, side: str, seeds: int, runs: Runs) -> None:
    """Trains what is missing of a side; compiles once."""
    rate = 0.0 if side == "none" else p
    missing = [s for s in range(seeds) if (task.name, rate, side, s) not in runs.found]
    if not missing:
        return
    torch.compiler.reset()
    model = task.build(rate)
    run: Callable[[Tensor], Tensor] = model
    options = options_of(side)
    if options is not None:
        run = ardd.compile(model, options=dict(options))
    task.loss(run, next(task.batches(0))).backward()  # compiles
    roles, used = ((), "") if options is None else seen(model)
    for seed in missing:
        start = time.process_time()
        (look,) = train(task, model, run, rate, seed, looks=1)
        value = look.metric if by_accuracy(task) else look.loss
        took = time.process_time() - start
        runs.add(Run(task.name, rate, side, seed, value, took, roles, used))
        print(
            f"{task.name}, p={rate}, {side}, seed {seed}: {value:.3f}, {took:.1f} s",
            file=sys.stderr,
        )


def seen(model: nn.Module) -> tuple[tuple[str, ...], str]:
    """Returns the kinds of site that were structured, and how many were."""
    decisions = ardd.report().decisions
    roles = {d.role.value for d in decisions if d.taken and d.role is not None}
    return tuple(sorted(roles)), f"{sum(d.taken for d in decisions)} of {len(decisions)}"


def difference(runs: Sequence[Run], base: Sequence[Run]) -> tuple[float, float]:
    """Returns the mean of ``runs - base`` within seeds, and its standard error."""
    values = {run.seed: run.value for run in base}
    return mean_and_error([run.value - values[run.seed] for run in runs])


def is_informative(task: Task, p: float, seeds: int, runs: Runs) -> bool:
    none, bernoulli = (runs.of(task.name, p, side, seeds) for side in STOCK)
    mean, error = difference(bernoulli, none)
    gain = mean if by_accuracy(task) else -mean
    return gain > 0 and gain >= ENOUGH * error


def run_rate(
    task: Task, p: float, seeds: int, runs: Runs, chosen: Sequence[str], *, everything: bool
) -> None:
    """Trains all sides of a task at one rate, those of the kinds that the model has at last."""
    for side in STOCK:
        run_side(task, p, side, seeds, runs)
    full = everything or is_informative(task, p, seeds, runs)
    for side in PATTERNS:
        if (full or side in ALWAYS) and is_chosen(side, chosen):
            run_side(task, p, side, seeds, runs)
    if full:
        block = runs.of(task.name, p, "block", seeds)
        for kind in block[0].roles if block else ():
            if is_chosen(f"block:{kind}", chosen):
                run_side(task, p, f"block:{kind}", seeds, runs)


def is_chosen(side: str, chosen: Sequence[str]) -> bool:
    """Whether a side runs. The kinds of a model are read from ``block``, which they imply."""
    kinds = side == "block" and any(name.startswith("block:") for name in chosen)
    return not chosen or side in chosen or kinds


def sides_of(task: str, p: float, runs: Runs) -> list[str]:
    """Returns all sides that ran, in the order in which they do."""
    ran = dict.fromkeys(run.side for run in runs.found.values() if (run.task, run.p) == (task, p))
    kinds = sorted(side for side in ran if ":" in side)
    return ["none", *(side for side in ("Bernoulli", *PATTERNS) if side in ran), *kinds]


def rows(task: Task, p: float, seeds: int, runs: Runs) -> Iterator[list[str]]:
    bernoulli = runs.of(task.name, p, "Bernoulli", seeds)
    verdict = "" if is_informative(task, p, seeds, runs) else "uninformative"
    for side in sides_of(task.name, p, runs):
        found = runs.of(task.name, p, side, seeds)
        if len(found) < seeds:
            continue
        mean, error = mean_and_error([run.value for run in found])
        seconds, _ = mean_and_error([run.seconds for run in found])
        cells = [str(p), side, found[0].used, f"{mean:.3f} ± {error:.3f}"]
        gap = ""
        if side != "Bernoulli":
            mean, error = difference(found, bernoulli)
            worse = -mean if by_accuracy(task) else mean
            gap = f"{mean:+.3f} ± {error:.3f}"
            gap = f"**{gap}**" if side != "none" and worse > ENOUGH * error else gap
        yield [*cells, gap, f"{seconds:.1f}", verdict]


def tables(tasks: Sequence[Task], rates: Sequence[float], seeds: int, runs: Runs) -> str:
    """Returns the tables of what has run."""
    text = []
    for task in tasks:
        unit = "accuracy, %" if by_accuracy(task) else "validation loss, nats"
        headings = ["p", "masks", "rewritten", unit, "- Bernoulli's", "CPU s a run", ""]
        cells: list[list[str]] = []
        for p in rates:
            if len(runs.of(task.name, p, "Bernoulli", seeds)) == seeds:
                cells += rows(task, p, seeds, runs)
        if cells:
            text += [f"\n## {task.name}, {task.steps} steps\n", table(headings, cells)]
    text += [f"\n{seeds} seeds; mean ± standard error over them, of the differences within seeds"]
    text += ["in the fifth column. Uninformative: Bernoulli does not beat none by two standard"]
    text += ["errors there. **Bold**: worse than Bernoulli by more than two."]
    return "\n".join(text)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, help="folder with MNIST's t10k files")
    parser.add_argument("--text", type=Path, help="a text file, for the character transformer")
    parser.add_argument("--words", type=Path, nargs=2, help="two text files: train, validation")
    parser.add_argument("--tasks", nargs="+", help="names of tasks; all that have data by default")
    parser.add_argument("--p", type=float, nargs="+", default=[0.1, 0.3, 0.5])
    parser.add_argument("--sides", nargs="+", default=[], help="such as auto or block:hidden")
    parser.add_argument("--seeds", type=int, default=5, help="at least 2")
    parser.add_argument("--all", action="store_true", help="all sides at uninformative rates too")
    parser.add_argument("--resume", type=Path, help="file that keeps every run, to go on from")
    parser.add_argument("--out", type=Path, help="folder to write the tables to")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error("--seeds must be at least 2: one value has no standard error")
    known = small_tasks(args.mnist, args.text, args.words)
    for name in args.tasks or ():
        if name not in known:
            parser.error(f"unknown task {name!r}, or no data for it; known: {', '.join(known)}")

    device = torch.device("cpu")
    top = header("quality_kinds", "Quality of each kind of mask", argv, device)
    runs = Runs(args.resume)
    tasks = [known[name]() for name in args.tasks or known]
    for task in tasks:
        for p in args.p:
            run_rate(task, p, args.seeds, runs, args.sides, everything=args.all)
            if args.out:  # hours of training are not lost with the rest
                text = top + tables(tasks, args.p, args.seeds, runs)
                write(args.out, "quality_kinds", device, text)
    print(top + tables(tasks, args.p, args.seeds, runs))


if __name__ == "__main__":
    main()
