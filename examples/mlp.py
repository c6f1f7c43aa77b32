"""The shortest use: a training script that names the backend, and asks for the report at the end.

Nothing else is different from any other script; `--backend inductor` is the same without ardd.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import rich
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import nn

import ardd  # for the report only: torch.compile finds the backend by its name


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="ardd")
    parser.add_argument("--quick", action="store_true", help="2 epochs instead of 30")
    args = parser.parse_args(argv)
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError as error:
        raise SystemExit("pip install scikit-learn: this example trains on its digits") from error

    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels).float() / 16, torch.from_numpy(digits).long()
    order = torch.randperm(len(x))
    train, test = order[:1440], order[1440:]

    model = nn.Sequential(
        nn.Linear(64, 1024), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(1024, 1024), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(1024, 10),
    )  # fmt: skip
    compiled = torch.compile(model, backend=args.backend)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    start = time.perf_counter()
    for _ in track(range(2 if args.quick else 30), "epochs"):
        for rows in train[torch.randperm(len(train))].split(96):
            optimizer.zero_grad()
            F.cross_entropy(compiled(x[rows]), y[rows]).backward()
            optimizer.step()
    seconds = time.perf_counter() - start

    model.eval()  # no dropout, and so nothing for ardd to do: the same module serves
    with torch.no_grad():
        accuracy = (compiled(x[test]).argmax(1) == y[test]).float().mean().item()
    rich.print(f"{args.backend}: test accuracy {accuracy:.3f}, {seconds:.1f} s with compilation")
    if args.backend == "ardd":
        rich.print(ardd.report())


if __name__ == "__main__":
    main()
