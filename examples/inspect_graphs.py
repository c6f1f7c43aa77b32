"""Prints what ardd makes of a small MLP: its joint graph before and after, then both halves.

Nothing is trained: `ardd.explain` compiles the function once and reports what it decided.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import rich
import torch
from rich.panel import Panel
from rich.syntax import Syntax
from torch import nn

import ardd


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--p", type=float, default=0.5, help="drop rate (default 0.5)")
    parser.add_argument("--block-size", type=int, default=16, help="features per block")
    parser.add_argument("--quick", action="store_true", help="only the graphs before and after")
    args = parser.parse_args(argv)

    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Dropout(args.p), nn.Linear(256, 10)
    )  # fmt: skip
    # "block" takes structure even where the cost model would find a model this small not worth it.
    options = {"pattern": "block", "block_size": args.block_size}
    report = ardd.explain(model, torch.randn(32, 64), options=options)

    graphs = {
        "before: forward and backward in one graph, dropout as a marked mask": report.before,
        "after: the products work on the kept features only": report.after,
    }
    if not args.quick:
        graphs["forward, as handed to the compiler"] = report.forward
        graphs["backward, as handed to the compiler"] = report.backward
    for title, code in graphs.items():
        rich.print(Panel(Syntax(code, "python", word_wrap=True), title=title))
    rich.print(report)


if __name__ == "__main__":
    main()
