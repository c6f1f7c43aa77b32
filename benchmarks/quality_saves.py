"""What a lossy save costs in quality: validation loss against saved bytes, for every family.

An MLP on MNIST and a small character transformer on a text, both without dropout, are trained from
the same weights on the same batches with every encoding; only what is saved for backward differs.

    python -m benchmarks.quality_saves --mnist DIR --text FILE --out benchmarks/results
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks._measure import header, table, write
from benchmarks._tasks import Task, characters, mean_and_error, mnist
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import ardd


def families(densities: Sequence[float]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name of a row and its options, the dense one first."""
    yield "dense", {"saves": "off"}
    yield "exact", {"saves": "exact"}
    for family in ("nm", "topk", "rows", "sampled_rows"):
        for density in densities:
            yield f"{family} {density}", {"saves": family, "save_density": density}
    yield "nm 0.5, 8 bits", {"saves": "nm", "save_density": 0.5, "save_bits": 8}
    yield "nm 0.25, 8 bits", {"saves": "nm", "save_density": 0.25, "save_bits": 8}
    yield "int8", {"saves": "int8"}
    yield "int4", {"saves": "int4"}
    yield "mixed", {"saves": "mixed"}
    yield "mixed, 4 bits", {"saves": "mixed", "save_bits": 4}
    yield "mixed, budget 0.1", {"saves": "mixed", "memory_budget": 0.1}


def train(
    task: Task, model: nn.Module, run: Callable[[Tensor], Tensor], seed: int, autocast: bool
) -> float:
    """Trains from new weights and returns the validation loss."""
    task.renew(model, 0.0, seed)
    optimizer = task.optimizer(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps)
    for batch in itertools.islice(task.batches(seed), task.steps):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = task.loss(run, batch)
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return task.scores(model)[1]


def saved_bytes(task: Task, options: dict[str, Any], autocast: bool) -> tuple[int, int]:
    """Returns the bytes that one batch saves for backward, by torch and with the options."""
    x, _ = next(task.batches(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        report = ardd.explain(task.build(0.0), x, options=options)
    assert report.saved_bytes_before is not None
    assert report.saved_bytes_after is not None
    return report.saved_bytes_before, report.saved_bytes_after


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, help="folder with MNIST's t10k files")
    parser.add_argument("--text", type=Path, help="a text file")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    parser.add_argument("--steps", type=int, default=1000, help="steps of the MLP")
    parser.add_argument("--text-steps", type=int, default=1000, help="steps of the transformer")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    parser.add_argument("--bfloat16", action="store_true", help="under autocast to bfloat16")
    parser.add_argument("--only", nargs="+", help="names of rows, beside the dense one")
    parser.add_argument("--out", type=Path, help="folder to write the table to")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error("--seeds must be at least 2: one value has no standard error")
    tasks = [mnist(args.mnist, args.steps, 0.05)] if args.mnist else []
    tasks += [characters(args.text, args.text_steps)] if args.text else []
    if not tasks:
        parser.error("give --mnist DIR, --text FILE or both")

    device = torch.device("cpu")
    theme = "quality_saves_bf16" if args.bfloat16 else "quality_saves"
    title = "Validation loss against saved bytes, for every family of encodings"
    text = [header("quality_saves", title, argv, device)]
    kinds = [k for k in families(args.densities) if not args.only or k[0] in ("dense", *args.only)]
    headings = ["saves", "saved KiB", "times less", "validation loss", "against dense %"]
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(tasks) * len(kinds) * args.seeds)
        for task in tasks:
            text += [f"\n## {task.name}, {task.steps} steps\n"]
            rows: list[list[str]] = []
            dense_loss = 0.0
            for name, options in kinds:
                progress.update(bar, description=f"{task.name}: {name}")
                torch.compiler.reset()
                dense_bytes, saved = saved_bytes(task, options, args.bfloat16)
                model = task.build(0.0)
                # Strict: the original program in its place would be a dense row of another name.
                run = torch.compile(model, backend="ardd", options={**options, "strict": True})
                losses = []
                for seed in range(args.seeds):
                    losses.append(train(task, model, run, seed, args.bfloat16))
                    progress.advance(bar)
                mean, error = mean_and_error(losses)
                if name == "dense":
                    dense_loss, dense_bytes = mean, saved
                change = 100 * (mean / dense_loss - 1)
                cells = [name, f"{saved / 1024:.1f}", f"{dense_bytes / saved:.2f}"]
                rows.append([*cells, f"{mean:.4f} ± {error:.4f}", f"{change:+.2f}"])
                if args.out:  # hours of training are not lost with the rest
                    write(args.out, theme, device, "\n".join([*text, table(headings, rows)]))
            text += [table(headings, rows)]
    text += [
        f"\n{args.seeds} seeds; mean ± standard error over them. Saved: what one batch keeps for"
    ]
    text += ["backward, inputs and parameters left out."]
    print("\n".join(text))
    if args.out:
        write(args.out, theme, device, "\n".join(text))


if __name__ == "__main__":
    main()
