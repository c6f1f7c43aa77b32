"""Trains a word language model on an LSTM with dropout, eager and under ardd in turns.

The shapes are those of Zaremba et al. 2014, https://arxiv.org/abs/1409.2329: "medium" has 650 units
and drops half, "large" has 1500 and drops 65 %. By default they are scaled down, to take about a
minute. The text is that of Python's own help topics, or a file of yours, such as WikiText-2's
`wiki.train.tokens`; its last tenth validates.

    python examples/lstm_lm.py --shape medium --scale 1 --data wiki.train.tokens
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import pydoc_data.topics
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import rich
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor, nn

import ardd

BATCH, STEPS = 20, 35  # sequences side by side, and words of each in a training step
WARMUP_STEPS = 3  # these compile, and are left out of the ratio
SHAPES = {"medium": (650, 0.5, 0.05), "large": (1500, 0.65, 0.04)}  # units, p, largest weight

State = tuple[Tensor, Tensor]


class LanguageModel(nn.Module):
    def __init__(self, words: int, units: int, p: float, largest: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, units)
        self.drop = nn.Dropout(p)
        self.lstm = nn.LSTM(units, units, 2, dropout=p)
        self.decoder = nn.Linear(units, words)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -largest, largest)

    def forward(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.lstm(self.drop(self.embedding(ids)), state)
        return self.decoder(self.drop(y)), state

    def first_state(self) -> State:
        shape = (2, BATCH, self.lstm.hidden_size)
        return torch.zeros(shape), torch.zeros(shape)


@dataclasses.dataclass
class Side:
    name: str
    model: LanguageModel
    run: Callable[..., Any]  # the model as this side runs it
    optimizer: torch.optim.Optimizer
    state: State
    seconds: list[float] = dataclasses.field(default_factory=list)
    note: str = ""

    def step(self, ids: Tensor, targets: Tensor) -> float:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        logits, state = self.run(ids, self.state)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimizer.step()
        self.state = (state[0].detach(), state[1].detach())  # where the next words go on
        self.seconds.append(time.perf_counter() - start)
        return loss.item()

    @torch.no_grad()
    def perplexity(self, text: Tensor) -> float:
        self.model.eval()
        losses, state = [], self.model.first_state()
        for ids, targets in sequences(text):
            logits, state = self.model(ids, state)
            losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item())
        self.model.train()
        return math.exp(statistics.fmean(losses))


def read_words(path: Path | None, vocabulary: int) -> tuple[Tensor, int]:
    """Returns the words of a text as numbers, and how many there are; rare ones are all one."""
    text = path.read_text("utf-8") if path else "\n".join(pydoc_data.topics.topics.values())
    words = text.replace("\n", " <eos> ").split()
    common = [word for word, _ in Counter(words).most_common(vocabulary - 1)]
    number = {word: i for i, word in enumerate(common)}
    return torch.tensor([number.get(word, len(common)) for word in words]), len(common) + 1


def sequences(words: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields words and those that follow them, [steps, batch], in the order of the text."""
    columns = words[: len(words) // BATCH * BATCH].view(BATCH, -1).t().contiguous()
    for start in range(0, len(columns) - STEPS, STEPS):
        yield columns[start : start + STEPS], columns[start + 1 : start + STEPS + 1]


def train(sides: Sequence[Side], text: Tensor, valid: Tensor, steps: int) -> None:
    columns = (
        TextColumn("{task.description:>6}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns) as progress:
        bars = [progress.add_task(s.name, total=steps, note="compiling ...") for s in sides]
        batches, pause = sequences(text[:0]), max(1, steps // 10)
        for done in range(1, steps + 1):
            batch = next(batches, None)
            if batch is None:  # the text begins anew
                batches = sequences(text)
                batch = next(batches)
                for side in sides:
                    side.state = side.model.first_state()
            for side in sides[:: 1 if done % 2 else -1]:  # the one that went first goes last
                loss = side.step(*batch)
                if done % pause == 0:
                    ms = 1e3 * statistics.median(side.seconds[WARMUP_STEPS:] or side.seconds)
                    side.note = f"perplexity {math.exp(loss):.1f}  {ms:.1f} ms/step"
            for bar, side in zip(bars, sides, strict=True):
                progress.update(bar, completed=done, note=side.note)
    for side in sides:
        ms = 1e3 * statistics.median(side.seconds[WARMUP_STEPS:])
        perplexity = side.perplexity(valid)
        rich.print(f"{side.name:>6}: validation perplexity {perplexity:.1f}, {ms:.1f} ms/step")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a text file")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="medium")
    parser.add_argument("--scale", type=float, default=0.3, help="of units and words (default 0.3)")
    parser.add_argument("--p", type=float, help="drop rate, if not that of the shape")
    parser.add_argument("--steps", type=int, default=150, help="training steps of each side")
    parser.add_argument("--quick", action="store_true", help="8 steps of a tenth of the size")
    args = parser.parse_args(argv)
    if args.quick:
        args.scale, args.steps = 0.1, 8

    torch.manual_seed(0)
    units, p, largest = SHAPES[args.shape]
    units, p = 8 * round(units * args.scale / 8), p if args.p is None else args.p
    text, words = read_words(args.data, int(10_000 * args.scale))
    train_text, valid_text = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    first = LanguageModel(words, units, p, largest)
    sides = []
    for name in ("eager", "ardd"):
        model = copy.deepcopy(first)
        run: Callable[..., Any] = model if name == "eager" else ardd.compile(model)
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        sides.append(Side(name, model, run, optimizer, model.first_state()))
    rich.print(
        f"{len(text):,} words, {words:,} of them different; 2 layers of {units} units, p {p}"
    )
    train(sides, train_text, valid_text, args.steps)
    eager, ours = (side.seconds[WARMUP_STEPS:] for side in sides)
    faster = statistics.median(a / b for a, b in zip(eager, ours, strict=True))
    rich.print(f"ardd steps at {faster:.2f}x eager's speed")
    rich.print(ardd.report())


if __name__ == "__main__":
    main()
