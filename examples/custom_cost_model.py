"""Plugs in two cost models of one's own, and shows how the decisions change with them.

A cost model prices one op of the graph in seconds. ardd adds up the prices of the program as it is
and of each structured candidate, and takes the cheapest. The built-in is a plain roofline;
`Measured` times this machine instead, and `ProductsOnly` shows what an opinion does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import rich
import torch
from rich.table import Table
from torch import nn

import ardd


def median_seconds(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


class Measured:
    """Prices every op by the rate that this CPU reaches now.

    For one process only: the ranks of a distributed run have to agree on every price, which
    measurements of their own do not.
    """

    name = "measured"

    def __init__(self) -> None:
        matrix, values = torch.randn(1024, 1024), torch.randn(1 << 22)
        self.flops_per_s = 2 * 1024**3 / median_seconds(lambda: matrix @ matrix)
        self.bytes_per_s = 2 * values.nbytes / median_seconds(values.clone)
        self.randoms_per_s = len(values) / median_seconds(lambda: torch.rand_like(values))
        # A part of the key of cached graphs, so it has to change when prices do.
        self.version = f"{self.flops_per_s:.0e} {self.bytes_per_s:.0e} {self.randoms_per_s:.0e}"

    def seconds(self, op: ardd.OpCost, device: torch.device) -> float:
        if op.kind == "random":
            return op.hint(op.flops) / self.randoms_per_s
        return max(op.hint(op.flops) / self.flops_per_s, op.hint(op.bytes) / self.bytes_per_s)


class ProductsOnly:
    """Thinks that only products cost anything, and so takes every structure there is."""

    name = "products-only"
    version = "1"

    def seconds(self, op: ardd.OpCost, device: torch.device) -> float:
        return op.hint(op.flops) * 1e-11 if op.kind == "product" else 0.0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two models instead of six")
    args = parser.parse_args(argv)
    ardd.register_cost_model("measured", Measured)
    ardd.register_cost_model("products-only", ProductsOnly)

    table = Table(title="MLP n-n-n-n, batch 64: what each cost model decides for its two dropouts")
    for heading in ("n", "p", "roofline", "measured", "products-only"):
        table.add_column(heading)
    cases = [(n, p) for n in (64, 256, 1024) for p in (0.1, 0.5)]
    for n, p in cases[::3] if args.quick else cases:
        model = nn.Sequential(
            nn.Linear(n, n), nn.ReLU(), nn.Dropout(p),
            nn.Linear(n, n), nn.ReLU(), nn.Dropout(p),
            nn.Linear(n, n),
        )  # fmt: skip
        row = []
        for cost_model in ("roofline", "measured", "products-only"):
            report = ardd.explain(model, torch.randn(64, n), options={"cost_model": cost_model})
            row.append(
                "\n".join(
                    f"blocks of {d.block}" if d.taken else f"random: {d.reason.name}"
                    for d in report.decisions
                )
            )
        table.add_row(str(n), str(p), *row, end_section=True)
    rich.print(table)


if __name__ == "__main__":
    main()
