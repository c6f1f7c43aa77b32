"""Soundness of the random bits: the counts of `tests/runtime/test_random_bits.py`, of more words.

A random bit is an element of a mask, a word of 32 bits that is compared with a threshold. The
control is torch's own generator, counted by the same functions. A p-value is the probability of a
statistic at least as large for fair words, corrected for the number of counts within a test. Runs
in one thread.

    python -m benchmarks.random_bits --out benchmarks/results
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from benchmarks._measure import header, table, write
from rich.console import Console
from rich.progress import Progress
from tests.runtime.test_random_bits import BATTERY, COLUMNS, PAIRS, ROWS, SOURCES, chunk_of
from torch import Tensor

WORDS = ROWS * COLUMNS
"""Words of a dropout."""


def count(chunks: int, progress: Progress) -> dict[str, dict[str, tuple[str, float]]]:
    """Returns the statistic and its p-value, by the name of the source and of the test."""
    task = progress.add_task("chunks", total=chunks * len(SOURCES))
    results: dict[str, dict[str, tuple[str, float]]] = {}
    for name, source in SOURCES.items():
        counts: dict[str, Tensor] = {}
        trials = dict.fromkeys(BATTERY, 0)
        for _ in range(chunks):
            chunk = chunk_of(source)
            for test, of in BATTERY.items():
                part, n = of.of(chunk)
                counts[test] = counts[test] + part if test in counts else part
                trials[test] += n
            progress.advance(task)
        results[name] = {
            test: of.p_value(counts[test], trials[test]) for test, of in BATTERY.items()
        }
    return results


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, default=10**9, help="elements of masks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder to write the table to")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)  # as fast as two, for so many small steps
    torch.manual_seed(args.seed)
    device = torch.device("cpu")
    chunks = max(1, round(args.bits / WORDS))
    text = [header("random_bits", "Soundness of the random bits", argv, device)]
    start = time.perf_counter()
    with Progress(console=Console(stderr=True)) as progress:
        results = count(chunks, progress)
    took = time.perf_counter() - start
    rows = [
        [test, statistic, f"{p:.2g}", *(f(results["torch"][test]) for f in (_statistic, _p))]
        for test, (statistic, p) in results["hash"].items()
    ]
    text += [table(["test", "statistic", "p-value", "torch's statistic", "torch's p-value"], rows)]
    text += [f"\n{chunks * WORDS:,} words for each source, of {chunks:,} seeds, and as many of the"]
    text += [
        f"other dropout that they are compared with, in {took:.0f} s. For what one bit changes,"
    ]
    text += [
        f"{chunks * PAIRS:,} pairs of words for every bit, each of a random seed and index; seeds"
    ]
    text += ["this near come up by chance only, as torch's generator gives 64 bits for each."]
    print("\n".join(text))
    if args.out:
        write(args.out, "random_bits", device, "\n".join(text))


def _statistic(result: tuple[str, float]) -> str:
    return result[0]


def _p(result: tuple[str, float]) -> str:
    return f"{result[1]:.2g}"


if __name__ == "__main__":
    main()
