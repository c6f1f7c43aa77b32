"""Speed of a word language model on a two-layer LSTM with dropout, against eager PyTorch.

The model is that of Zaremba et al. 2014, "Recurrent Neural Network Regularization",
https://arxiv.org/abs/1409.2329: embedding, dropout, LSTM with dropout between its layers, dropout,
decoder. Sides, all in one run and in turns: ardd; eager, whose LSTM is oneDNN's or cuDNN's; the
*floor*, the same model in eager with its input features already cut to those that ardd keeps, so
without draws, gathers and masks; and Inductor, where asked for with --inductor: it unrolls the LSTM
over its time steps and takes minutes to compile, and torch loses the dropout between the layers.

    python -m benchmarks.lstm --out benchmarks/results
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks._measure import alternate, clock, header, milliseconds, ratio, table, write
from benchmarks._tasks import WordModel
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import ardd

Timed = Callable[[], dict[str, float]]


class Floor(nn.Module):
    """What is left of it where only the first of the features are read."""

    def __init__(self, words: int, units: int, kept: Sequence[int]) -> None:
        super().__init__()
        self.kept = kept
        self.embedding = nn.Embedding(words, kept[0])
        self.first = nn.LSTM(kept[0], units)
        self.second = nn.LSTM(kept[1], units)
        self.decoder = nn.Linear(kept[2], words)

    def forward(self, ids: Tensor) -> Tensor:
        y, _ = self.first(self.embedding(ids))
        y, _ = self.second(y[..., : self.kept[1]])
        return self.decoder(y[..., : self.kept[2]])  # type: ignore[no-any-return]


def training_step(model: nn.Module, run: Callable[..., Any], ids: Tensor, to: Tensor) -> Timed:
    def step() -> dict[str, float]:
        model.zero_grad(set_to_none=True)
        start = clock(ids.device)
        F.cross_entropy(run(ids).flatten(0, 1), to.flatten()).backward()
        return {"fw+bw": clock(ids.device) - start}

    return step


def compare(units: int, p: float, args: argparse.Namespace) -> list[str]:
    """Returns the row of one size and one rate."""
    torch.compiler.reset()
    device = args.device
    model = WordModel(args.words, units, dropout=p).to(device)
    ids, to = (torch.randint(args.words, (args.steps, args.batch), device=device) for _ in range(2))
    decisions = ardd.explain(ardd.compile(model), ids).decisions
    used = [d.p_used if d.taken and d.p_used is not None else 0.0 for d in decisions]
    kept = [round((1 - rate) * units) for rate in used]
    models: dict[str, nn.Module] = {
        name: copy.deepcopy(model) for name in ("ardd", "eager", "inductor")
    }
    models["floor"] = Floor(args.words, units, kept).to(device)
    runs: dict[str, Callable[..., Any]] = {
        "ardd": ardd.compile(models["ardd"], options={"strict": True}, fullgraph=True),
        "eager": models["eager"],
        "floor": models["floor"],
    }
    if args.inductor:
        runs["inductor"] = torch.compile(models["inductor"], fullgraph=True)
    sides = {name: training_step(models[name], run, ids, to) for name, run in runs.items()}
    compile_s = {}
    with torch._dynamo.config.patch(allow_rnn=True):
        for name in ("ardd", "inductor"):
            if name in sides:
                start = time.perf_counter()
                sides[name]()
                compile_s[name] = time.perf_counter() - start
        measured = alternate(sides, repeats=args.repeats)
    seconds = {name: times["fw+bw"] for name, times in measured.seconds.items()}
    row = [str(units), str(p), " / ".join(f"{rate:.3f}" for rate in used)]
    row += [milliseconds(seconds[name]) for name in ("ardd", "eager", "floor")]
    row += [milliseconds(seconds["inductor"]) if args.inductor else "-"]
    row += [ratio(seconds["eager"], seconds["ardd"])]
    row += [ratio(seconds["inductor"], seconds["ardd"]) if args.inductor else "-"]
    row += [ratio(seconds["eager"], seconds["floor"]), ratio(seconds["ardd"], seconds["floor"])]
    row += [f"{compile_s[name]:.1f}" if name in compile_s else "-" for name in ("ardd", "inductor")]
    return [*row, f"{measured.others:.0%}"]


HEADINGS = (
    *("units", "p", "p used", "ardd ms", "eager ms", "floor ms", "Inductor ms", "eager / ardd"),
    *("Inductor / ardd", "eager / floor", "ardd / floor"),
    *("ardd compile s", "Inductor compile s", "others' CPU"),
)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, nargs="+", default=[650, 1500])
    parser.add_argument("--p", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--words", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--steps", type=int, default=35, help="time steps of a sequence")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--inductor", action="store_true", help="minutes to compile, for each row")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, help="folder to write the table to")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    title = "Speed of a word language model with dropout, against eager PyTorch"
    text = [header("lstm", title, argv, args.device)]
    cases = list(itertools.product(args.units, args.p))
    with Progress(console=Console(stderr=True)) as progress:
        rows = [
            compare(units, p, args) for units, p in progress.track(cases, description="units and p")
        ]
    text += [f"Two layers, {args.words:,} words, batch {args.batch}, {args.steps} steps; forward,"]
    text += ["loss and backward. The floor is eager with its features cut to those kept.\n"]
    text += [table(HEADINGS, rows)]
    text += [f"\nMedians of {args.repeats} repetitions in turns; ratios are medians (quartiles) of"]
    text += ["the ratios within each repetition. Compilation, with the first step, is left out."]
    text += ["Others' CPU: the share of the CPU time that went to other processes meanwhile."]
    print("\n".join(text))
    if args.out:
        write(args.out, "lstm", args.device, "\n".join(text))


if __name__ == "__main__":
    main()
