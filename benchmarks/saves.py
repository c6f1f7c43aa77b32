"""Bytes saved for backward, peak memory and step time of every encoding, against Inductor.

Besides stock Inductor, two ways to spend less memory without ardd: torch's own recomputation
(`activation_memory_budget`) held to the bytes of `mixed`, and 8-bit compression by
`saved_tensors_hooks` in eager PyTorch. No model here drops anything, so the budget is safe.

    python -m benchmarks.saves --out benchmarks/results
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks._measure import (
    Measured,
    alternate,
    clock,
    header,
    milliseconds,
    ratio,
    table,
    write,
)
from benchmarks._tasks import CharModel
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch._functorch import config as functorch_config

import ardd

OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {"saves": "exact"},
    "int8": {"saves": "int8"},
    "int4": {"saves": "int4"},
    "nm 4:16": {"saves": "nm", "save_density": 0.25},
    "top 25 %": {"saves": "topk", "save_density": 0.25},
    "rows 25 %": {"saves": "rows", "save_density": 0.25},
    "sampled rows 25 %": {"saves": "sampled_rows", "save_density": 0.25},
    "mixed": {"saves": "mixed"},
    "mixed, 4 bits": {"saves": "mixed", "save_bits": 4},
}
RECOMPUTED, HOOKS = "Inductor, recomputing", "eager, hooks"


class Bert(nn.Module):
    """A BERT-like encoder with random weights, from a `transformers` configuration."""

    def __init__(self, width: int = 512, layers: int = 2) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=1000,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, x_bt: Tensor) -> Tensor:
        states: Tensor = self.bert(x_bt).last_hidden_state
        return states


def models(names: Sequence[str], device: torch.device) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yields name, model and one batch."""
    for name in names:
        model: nn.Module
        if name == "mlp":
            model = nn.Sequential(
                nn.Linear(784, 2048), nn.ReLU(),
                nn.Linear(2048, 2048), nn.ReLU(),
                nn.Linear(2048, 10),
            )  # fmt: skip
            x = torch.randn(2048, 784)
        elif name == "bert":
            model, x = Bert(), torch.randint(1000, (8, 128))
        elif name == "gpt":
            model, x = CharModel(), torch.randint(128, (8, 128))
        else:
            model = nn.Sequential(
                nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
                nn.Flatten(), nn.Linear(64 * 64, 10),
            )  # fmt: skip
            x = torch.randn(64, 3, 32, 32)
        yield name, model.to(device), x.to(device)


def stepper(
    run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, context: Callable[[], Any]
) -> Callable[[], dict[str, float]]:
    """Returns what runs forward and backward once, and times them."""
    with torch.no_grad():
        grad = torch.randn_like(model(x))

    def step() -> dict[str, float]:
        start = clock(x.device)
        model.zero_grad(set_to_none=True)
        with context():
            run(x).backward(grad)
        return {"fw+bw": clock(x.device) - start}

    return step


def hooks() -> Any:
    """Returns what rounds every large saved tensor to 8 bits, with one scale for each row."""

    def pack(x: Tensor) -> Any:
        if not x.is_floating_point() or x.numel() < 4096 or isinstance(x, nn.Parameter):
            return x
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
        return (x / scale).round().to(torch.int8), scale

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        codes, scale = packed
        values: Tensor = codes * scale
        return values

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Returns the most bytes that one step had allocated at a time, beyond what was there."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda event: event[0]):
        now += change
        peak = max(peak, now)
    return peak


def measure(
    model: nn.Module, x: Tensor, names: Sequence[str], repeats: int
) -> tuple[Measured, dict[str, int], dict[str, int]]:
    """Returns the times, the saved bytes and the peaks of all sides."""
    steps, saved = {}, {}
    torch.compiler.reset()
    for name in ["Inductor", *names]:
        copied = copy.deepcopy(model)
        if name == "Inductor":
            run: Any = torch.compile(copied, backend="inductor")
        else:
            options = {**OPTIONS[name], "pattern": "random", "strict": True}
            report = ardd.explain(copied, x, options=options)
            assert report.saved_bytes_before is not None
            assert report.saved_bytes_after is not None
            saved["Inductor"], saved[name] = report.saved_bytes_before, report.saved_bytes_after
            run = torch.compile(copied, backend="ardd", options=options)
        steps[name] = stepper(run, copied, x, torch.enable_grad)
        steps[name]()
    if "mixed" in saved:
        copied = copy.deepcopy(model)
        budget = saved["mixed"] / saved["Inductor"]
        with functorch_config.patch(activation_memory_budget=budget):
            steps[RECOMPUTED] = stepper(torch.compile(copied), copied, x, torch.enable_grad)
            steps[RECOMPUTED]()
    copied = copy.deepcopy(model)
    steps[HOOKS] = stepper(copied, copied, x, hooks)
    peaks = {}
    for name, step in steps.items():
        step()
        peaks[name] = peak_bytes(step, x.device)
    return alternate(steps, repeats=repeats), saved, peaks


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    everything = ["mlp", "bert", "gpt", "cnn"]
    parser.add_argument("--models", nargs="+", choices=everything, default=everything)
    parser.add_argument("--encodings", nargs="+", choices=[*OPTIONS], default=[*OPTIONS])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="float32, bfloat16")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, help="folder to write the table to")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    title = "Saved bytes, peak memory and time of compressed saves, against Inductor"
    text = [header("saves", title, argv, args.device)]
    headings = ["saves", "saved MiB", "times less", "peak MiB", "ms", "Inductor / this"]
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(args.models) * len(args.dtypes))
        for dtype in args.dtypes:
            for name, model, x in models(args.models, args.device):
                progress.update(bar, description=f"{name} {dtype}")
                model.to(getattr(torch, dtype))
                x = x.to(getattr(torch, dtype)) if x.is_floating_point() else x
                # All sides are compiles of one function; torch would give up after a few.
                with torch._dynamo.config.patch(recompile_limit=64):
                    measured, saved, peaks = measure(model, x, args.encodings, args.repeats)
                base = measured.seconds["Inductor"]["fw+bw"]
                rows = []
                for side, times in measured.seconds.items():
                    took = times["fw+bw"]
                    kept = [f"{saved[side] / 2**20:.2f}"] if side in saved else ["", ""]
                    if side in saved:
                        kept.append(f"{saved['Inductor'] / saved[side]:.2f}")
                    cells = [f"{peaks[side] / 2**20:.1f}", milliseconds(took), ratio(base, took)]
                    rows.append([side, *kept, *cells])
                text += [f"\n## {name}, {dtype}, others' CPU {measured.others:.0%}\n"]
                text += [table(headings, rows)]
                progress.advance(bar)
                if args.out:
                    write(args.out, "saves", args.device, "\n".join(text))
    text += [
        f"\nForward and backward; medians of {args.repeats} repetitions in turns, the ratio is"
    ]
    text += ["the median (quartiles) of the ratios within each repetition. Peak: most bytes"]
    text += ["allocated at a time beyond the model and the batch."]
    print("\n".join(text))
    if args.out:
        write(args.out, "saves", args.device, "\n".join(text))


if __name__ == "__main__":
    main()
