"""Does a structured mask regularise as well as a Bernoulli mask?

An MLP on 8,000 images of MNIST, a transformer on 50,000 characters and an LSTM on 50,000 words are
trained with every kind of mask from the same weights on the same batches, seed by seed: few data,
seen ten times and more, since that is what dropout is for. Structured masks are drawn by ardd
itself; none and Bernoulli run under stock Inductor, for the LSTM in eager PyTorch, which Inductor
leaves it to.

    python -m benchmarks.quality --mnist DIR --text FILE --words TRAIN VALID --out DIR
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks._measure import header, table, write
from benchmarks._tasks import Task, characters, mean_and_error, mnist, words
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import ardd

LOOKS = 20  # how often a run is validated


@dataclasses.dataclass(frozen=True)
class Mask:
    """One kind of mask: a row of the table."""

    name: str
    p: float
    options: dict[str, Any] | None = None
    """Of ardd; None for stock torch."""


@dataclasses.dataclass(frozen=True)
class Look:
    """One validation during one run."""

    seconds: float
    """Of training until then."""
    metric: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Scores:
    """What one kind of mask came to."""

    mask: Mask
    used: str
    runs: list[list[Look]]
    """One list for each seed."""

    @property
    def metric(self) -> list[float]:
        return [run[-1].metric for run in self.runs]

    @property
    def loss(self) -> list[float]:
        return [run[-1].loss for run in self.runs]

    def best_loss(self) -> float:
        """Returns the smallest mean loss that any look found."""
        return min(statistics.mean(x.loss for x in looks) for looks in self._looks())

    def seconds_to(self, loss: float) -> float | None:
        """Returns the mean seconds of training until the mean loss is reached, None if never."""
        for looks in self._looks():
            if statistics.mean(look.loss for look in looks) <= loss:
                return statistics.mean(look.seconds for look in looks)
        return None

    def _looks(self) -> Iterator[tuple[Look, ...]]:
        return zip(*self.runs, strict=True)


def masks(rates: Sequence[float], patterns: Sequence[str]) -> Iterator[Mask]:
    """Yields the rows of a task.

    ``block:16`` is the pattern with blocks of 16, and ``grouped:2`` that with 2 groups.
    """
    yield Mask("none", 0.0)
    for p in rates:
        yield Mask("Bernoulli", p)
        for pattern in patterns:
            name, _, number = pattern.partition(":")
            options: dict[str, Any] = {"pattern": name, "strict": True}
            if number:
                options["groups" if name == "grouped" else "block_size"] = int(number)
            yield Mask(pattern, p, options)


def compiled(mask: Mask, model: nn.Module) -> Callable[[Tensor], Tensor]:
    run: Callable[[Tensor], Tensor] = model
    has_rnn = any(isinstance(module, nn.RNNBase) for module in model.modules())
    if mask.options is not None:
        run = ardd.compile(model, options=mask.options)
    elif not has_rnn:
        run = torch.compile(model)
    return run


def what_ardd_uses(mask: Mask) -> str:
    if mask.options is None:
        return ""
    used = [
        f"{d.pattern} {d.block}, p={d.p_used:.3f}" if d.taken else d.reason.name
        for d in ardd.report().decisions
    ]
    return " / ".join(dict.fromkeys(used))  # the dropouts of a model mostly agree


def train(
    task: Task,
    model: nn.Module,
    run: Callable[[Tensor], Tensor],
    p: float,
    seed: int,
    looks: int = LOOKS,
) -> list[Look]:
    """Trains from new weights and validates so many times."""
    task.renew(model, p, seed)
    optimizer = task.optimizer(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps)
    seconds, found = 0.0, []
    every = max(1, task.steps // looks)
    start = time.perf_counter()
    for step, batch in enumerate(itertools.islice(task.batches(seed), task.steps), 1):
        optimizer.zero_grad(set_to_none=True)
        task.loss(run, batch).backward()
        if task.largest_gradient < math.inf:
            nn.utils.clip_grad_norm_(model.parameters(), task.largest_gradient)
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == task.steps:
            seconds += time.perf_counter() - start
            found.append(Look(seconds, *task.scores(model)))
            start = time.perf_counter()
    return found


def against(ours: Sequence[float], bernoulli: Sequence[float], *, lower_is_better: bool) -> str:
    """Returns the difference of the means, bold where it is worse by more than its error."""
    (mean, error), (mean_0, error_0) = mean_and_error(ours), mean_and_error(bernoulli)
    difference, its_error = mean - mean_0, (error**2 + error_0**2) ** 0.5
    if math.isnan(difference):
        return "**diverged**"
    worse = difference if lower_is_better else -difference
    text = f"{difference:+.3f} ± {its_error:.3f}"
    return f"**{text}**" if worse > its_error else text


def time_ratio(ours: Scores, bernoulli: Scores) -> str:
    """Returns the time that Bernoulli takes to its best loss over that until ours reaches it."""
    best = bernoulli.best_loss()
    needed, base = ours.seconds_to(best), bernoulli.seconds_to(best)
    return "never" if needed is None or base is None else f"{base / needed:.2f}"


def rows(task: Task, scores: Sequence[Scores]) -> Iterator[list[str]]:
    bernoulli = {s.mask.p: s for s in scores if s.mask.name == "Bernoulli"}
    for s in scores:
        cells = [str(s.mask.p), s.mask.name, s.used]
        for mean, error in (mean_and_error(s.metric), mean_and_error(s.loss)):
            cells.append("diverged" if math.isnan(mean) else f"{mean:.3f} ± {error:.3f}")
        base = bernoulli.get(s.mask.p)
        if base is None or base is s:
            yield [*cells, "", "", ""]
        else:
            lower = task.metric == "perplexity"
            metric = against(s.metric, base.metric, lower_is_better=lower)
            loss = against(s.loss, base.loss, lower_is_better=True)
            yield [*cells, metric, loss, time_ratio(s, base)]


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, help="folder with MNIST's t10k files")
    parser.add_argument("--text", type=Path, help="a text file, for the character transformer")
    parser.add_argument("--words", type=Path, nargs=2, help="two text files: train, validation")
    parser.add_argument("--p", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument(
        "--patterns", nargs="+", default=["auto", "block:32", "grouped", "window", "row"]
    )
    parser.add_argument("--steps", type=int, help="in place of each task's own number")
    parser.add_argument("--lr", type=float, default=0.02, help="of the MLP: SGD, momentum 0.9")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    parser.add_argument("--out", type=Path, help="folder to write the table to")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error("--seeds must be at least 2: one value has no standard error")
    tasks = [mnist(args.mnist, args.steps or 1240, args.lr)] if args.mnist else []
    tasks += [characters(args.text, args.steps or 600, limit=50_000)] if args.text else []
    if args.words:
        tasks.append(words(args.words[0], args.words[1], args.steps or 600))
    if not tasks:
        parser.error("give --mnist DIR, --text FILE, --words TRAIN VALID, or more than one")

    device = torch.device("cpu")
    text = [header("quality", "Quality of structured against Bernoulli masks", argv, device)]
    kinds = list(masks(args.p, args.patterns))
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(tasks) * len(kinds) * args.seeds)
        for task in tasks:
            text += [f"\n## {task.name}, {task.steps} steps\n"]
            headings = ["p", "mask", "ardd used", task.metric, "loss"]
            headings += [f"{task.metric} - Bernoulli's", "loss - Bernoulli's", "time"]
            scores: list[Scores] = []
            for mask in kinds:
                progress.update(bar, description=f"{task.name}: p={mask.p} {mask.name}")
                torch.compiler.reset()
                model = task.build(mask.p)
                run = compiled(mask, model)
                task.loss(run, next(task.batches(0))).backward()  # compiles
                runs = []
                for seed in range(args.seeds):
                    runs.append(train(task, model, run, mask.p, seed))
                    progress.advance(bar)
                scores.append(Scores(mask, what_ardd_uses(mask), runs))
                done = [*text, table(headings, list(rows(task, scores)))]
                if args.out:  # hours of training are not lost with the rest
                    write(args.out, "quality", device, "\n".join(done))
            text = done
    text += [f"\n{args.seeds} seeds; mean ± standard error over them. **Bold**: worse than"]
    text += ["Bernoulli by more than one standard error of the difference, which chance alone does"]
    text += ["to every sixth row. Time: training time of Bernoulli to its best validation loss,"]
    text += ["divided by that of this row until it has the same."]
    print("\n".join(text))
    if args.out:
        write(args.out, "quality", device, "\n".join(text))


if __name__ == "__main__":
    main()
