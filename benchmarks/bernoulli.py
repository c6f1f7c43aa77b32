"""What ordinary dropout costs: a mask by itself, and in a step of training.

The first table times `F.dropout` alone, compiled, next to Inductor's own and to a product with a
number, which reads and writes the same bytes. The second times two encoder layers (768 wide, 12
heads, batch 4 x 256) forward and backward, over the same layers without dropout under Inductor.

    python -m benchmarks.bernoulli --out benchmarks/results
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks._measure import alternate, clock, header, milliseconds, ratio, table, write
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

WIDTH, HEADS = 768, 12
SIZES = ((1024, 768), (1024, 3072), (1024, 4096), (4096, 4096))
DTYPES = (torch.float32, torch.bfloat16)

Step = Callable[[], dict[str, float]]


def timed(run: Callable[[Tensor], Tensor], x: Tensor, backward: bool) -> Step:
    """Returns what times one call, and its backward."""
    x = x.clone().requires_grad_(backward)
    grad = torch.randn_like(x)

    def step() -> dict[str, float]:
        x.grad = None
        start = clock(x.device)
        y = run(x)
        if backward:
            y.backward(grad)
        return {"": clock(x.device) - start}

    return step


def mask_sides(p: float, x: Tensor, backward: bool) -> dict[str, Step]:
    """Returns dropout by ardd and by Inductor, and a copy with a factor."""

    def drop(x: Tensor) -> Tensor:
        return F.dropout(x, p)

    def scale(x: Tensor) -> Tensor:
        return x * 1.5

    torch.compiler.reset()
    ardd = torch.compile(drop, backend="ardd", options={"strict": True}, dynamic=False)
    stock = torch.compile(drop, backend="inductor", dynamic=False)
    copied = torch.compile(scale, backend="inductor", dynamic=False)
    runs = {"ardd": ardd, "Inductor": stock, "copy": copied}
    return {name: timed(run, x, backward) for name, run in runs.items()}


def mask_rows(rates: Sequence[float], repeats: int, device: torch.device) -> Iterator[list[str]]:
    for size, dtype, p in itertools.product(SIZES, DTYPES, rates):
        x = torch.randn(size, device=device).to(dtype)
        cells = [f"{size[0]} x {size[1]}", str(dtype).removeprefix("torch."), str(p)]
        for backward in (False, True):
            seconds = alternate(mask_sides(p, x, backward), repeats=repeats).seconds
            ours, theirs, copied = (seconds[s][""] for s in ("ardd", "Inductor", "copy"))
            cells += [milliseconds(ours), ratio(theirs, ours), ratio(ours, copied)]
        yield cells


def encoder(p: float, attention: bool) -> nn.Module:
    """Returns two layers; `attention` switches the dropout of probabilities on."""
    layers = [
        nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, p, "gelu", batch_first=True, norm_first=True
        )
        for _ in range(2)
    ]
    for layer in layers:
        layer.self_attn.dropout = p if attention else 0.0
    return nn.Sequential(*layers)


def step_sides(p: float, attention: bool, x: Tensor) -> dict[str, Step]:
    torch.compiler.reset()
    torch.manual_seed(0)
    dropped = encoder(p, attention).to(x.device)
    without = encoder(0.0, False).to(x.device)
    without.load_state_dict(dropped.state_dict())
    sides = {"none": timed_module(without, x, "inductor", None)}
    sides["Inductor"] = timed_module(dropped, x, "inductor", None)
    for pattern in ("random", "auto"):
        sides[pattern] = timed_module(dropped, x, "ardd", {"pattern": pattern, "strict": True})
    return sides


def timed_module(
    module: nn.Module, x: Tensor, backend: str, options: dict[str, Any] | None
) -> Step:
    module = copy.deepcopy(module)
    run = torch.compile(module, backend=backend, options=options, dynamic=False)
    step = timed(run, x, backward=True)

    def fresh() -> dict[str, float]:
        module.zero_grad(set_to_none=True)
        return step()

    return fresh


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--p", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--repeats", type=int, default=30, help="of a mask by itself")
    parser.add_argument("--steps", type=int, default=12, help="of the encoder")
    parser.add_argument("--only", choices=("mask", "step"), help="one table alone")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, help="folder to write the tables to")
    args = parser.parse_args(argv)

    text = [header("bernoulli", "What ordinary dropout costs", argv, args.device)]
    with Progress(console=Console(stderr=True)) as progress:
        if args.only != "step":
            count = len(SIZES) * len(DTYPES) * len(args.p)
            found = mask_rows(args.p, args.repeats, args.device)
            rows = list(progress.track(found, total=count, description="masks"))
            headings = ["size", "type", "p", "fw ms", "Inductor / ardd", "ardd / copy"]
            headings += ["fw+bw ms", "Inductor / ardd", "ardd / copy"]
            text += ["\n## A mask by itself\n", table(headings, rows)]
        if args.only != "mask":
            x = torch.randn(4, 256, WIDTH, device=args.device)
            rows = []
            cases = list(itertools.product((False, True), args.p))
            for attention, p in progress.track(cases, description="encoder"):
                measured = alternate(step_sides(p, attention, x), repeats=args.steps)
                none, *rest = (measured.seconds[name][""] for name in measured.seconds)
                cells = ["on" if attention else "off", str(p), milliseconds(none)]
                rows.append([*cells, *(ratio(r, none) for r in rest), f"{measured.others:.0%}"])
            headings = ["attention dropout", "p", "none ms", "Inductor", "random", "auto"]
            text += ["\n## Two encoder layers, time over the same without dropout\n"]
            text += [table([*headings, "others' CPU"], rows)]
    text += [
        "\nMedians of repetitions in turns; ratios are medians (quartiles) of those within each"
    ]
    text += ["repetition. A copy is `x * 1.5`. Others' CPU: the share of the CPU time that went to"]
    text += ["other processes meanwhile."]
    print("\n".join(text))
    if args.out:
        write(args.out, "bernoulli", args.device, "\n".join(text))


if __name__ == "__main__":
    main()
