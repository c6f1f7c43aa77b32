"""Does a structured mask regularise as well as a Bernoulli mask? An MLP on MNIST says.

The 10,000 t10k images are split 8,000 / 2,000 by a fixed permutation. Every kind of mask trains the
same 784-1024-1024-10 MLP from the same weights on the same batches, seed by seed. The block masks
are drawn by ardd itself; none and Bernoulli run under stock Inductor.

    python -m benchmarks.quality --data DIR --out benchmarks/results
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import math
import statistics
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmarks._measure import header, table, write
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import ardd

PIXELS, HIDDEN, CLASSES, BATCH = 784, 1024, 10, 128


@dataclasses.dataclass(frozen=True)
class Data:
    train_x: Tensor  # float32 [8000, 784], 0 to 1
    train_y: Tensor  # int64 [8000]
    test_x: Tensor
    test_y: Tensor


@dataclasses.dataclass(frozen=True)
class Mask:
    """One kind of mask: a row of the table."""

    name: str
    p: float
    backend: str = "ardd"
    options: dict[str, str | int | bool | Callable[..., object]] | None = None


@dataclasses.dataclass(frozen=True)
class Scores:
    """Test scores of one kind of mask, one value for each seed."""

    mask: Mask
    used: str
    accuracy: list[float]  # per cent
    loss: list[float]  # nats


def read_idx(path: Path) -> Tensor:
    """Reads one gzipped idx file of bytes: magic 0 0 8 ndim, big-endian sizes, values."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    sizes = struct.unpack_from(f">{raw[3]}i", raw, 4)
    return torch.frombuffer(raw, dtype=torch.uint8, offset=4 + 4 * raw[3]).view(sizes)


def load(folder: Path) -> Data:
    x = read_idx(folder / "t10k-images-idx3-ubyte.gz").flatten(1).float() / 255
    y = read_idx(folder / "t10k-labels-idx1-ubyte.gz").long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:8000], order[8000:]
    return Data(x[train], y[train], x[test], y[test])


def masks(rates: Sequence[float], blocks: Sequence[int]) -> Iterator[Mask]:
    yield Mask("none", 0.0, "inductor")
    for p in rates:
        yield Mask("Bernoulli", p, "inductor")
        for size in blocks:
            yield Mask(f"block {size}", p, options={"pattern": "block", "block_size": size})
        yield Mask("ardd's default", p)


def build_model(p: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Dropout(p),
        nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Dropout(p),
        nn.Linear(HIDDEN, CLASSES),
    )  # fmt: skip


def what_ardd_uses(mask: Mask, model: nn.Module, x: Tensor) -> str:
    if mask.backend != "ardd":
        return ""
    decisions = ardd.explain(model, x, options=mask.options).decisions
    used = [f"B={d.block}, p={d.p_used:.3f}" if d.taken else d.reason.name for d in decisions]
    return " / ".join(dict.fromkeys(used))  # the two dropouts mostly agree


def train(
    model: nn.Module,
    run: Callable[[Tensor], Tensor],
    data: Data,
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
) -> tuple[float, float]:
    """Trains `model` from new weights and returns its test accuracy in per cent and its loss."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    generator = torch.Generator().manual_seed(seed)  # the same batches whatever the masks draw
    steps = len(data.train_x) // BATCH
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(data.train_x), generator=generator).split(BATCH)[:steps]:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(run(data.train_x[rows]), data.train_y[rows]).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        logits = model(data.test_x)
        accuracy = 100 * (logits.argmax(1) == data.test_y).double().mean().item()
        return accuracy, F.cross_entropy(logits, data.test_y).item()


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and its standard error; NaN where a run diverged."""
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def against(ours: Sequence[float], bernoulli: Sequence[float]) -> str:
    """Returns the difference of the means, bold where it exceeds its standard error."""
    (mean, error), (mean_0, error_0) = mean_and_error(ours), mean_and_error(bernoulli)
    difference, its_error = mean - mean_0, (error**2 + error_0**2) ** 0.5
    if math.isnan(difference):
        return "**diverged**"
    text = f"{difference:+.3f} ± {its_error:.3f}"
    return text if abs(difference) <= its_error else f"**{text}**"


def rows(scores: Sequence[Scores]) -> Iterator[list[str]]:
    bernoulli = {s.mask.p: s for s in scores if s.mask.name == "Bernoulli"}
    for s in scores:
        cells = [str(s.mask.p), s.mask.name, s.used]
        for mean, error in (mean_and_error(s.accuracy), mean_and_error(s.loss)):
            cells.append("diverged" if math.isnan(mean) else f"{mean:.3f} ± {error:.3f}")
        base = bernoulli.get(s.mask.p)
        if base is None or base is s:
            yield [*cells, "", ""]
        else:
            yield [*cells, against(s.accuracy, base.accuracy), against(s.loss, base.loss)]


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST's t10k files")
    parser.add_argument("--p", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--epochs", type=int, default=20)
    # With momentum 0.9, masks that a whole batch shares diverge at 0.05 and p = 0.7, under eager
    # PyTorch too; Bernoulli masks do not. At 0.02 every kind of mask trains.
    parser.add_argument("--lr", type=float, default=0.02, help="of SGD, momentum 0.9, cosine")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    parser.add_argument("--out", type=Path, help="folder to write the table to")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error("--seeds must be at least 2: one value has no standard error")

    device = torch.device("cpu")
    title = "Quality of structured against Bernoulli masks, MLP on MNIST"
    text = [header("quality", title, argv, device)]
    data = load(args.data)
    scores = []
    kinds = list(masks(args.p, args.blocks))
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(kinds) * args.seeds)
        for mask in kinds:
            progress.update(bar, description=f"p={mask.p} {mask.name}")
            torch.compiler.reset()
            model = build_model(mask.p)
            used = what_ardd_uses(mask, model, data.train_x[:BATCH])
            run = torch.compile(model, backend=mask.backend, options=mask.options)
            accuracies, losses = [], []
            for seed in range(args.seeds):
                accuracy, loss = train(
                    model, run, data, epochs=args.epochs, learning_rate=args.lr, seed=seed
                )
                accuracies.append(accuracy)
                losses.append(loss)
                progress.advance(bar)
            scores.append(Scores(mask, used, accuracies, losses))
    headings = ["p", "mask", "ardd used", "accuracy %", "loss"]
    text += [table([*headings, "accuracy - Bernoulli's", "loss - Bernoulli's"], list(rows(scores)))]
    text += [f"\n{args.seeds} seeds, {args.epochs} epochs, {len(data.test_y)} test images; mean"]
    text += ["± standard error over the seeds. **Bold**: further from Bernoulli than one standard"]
    text += ["error of the difference, which chance alone does to about every third row."]
    print("\n".join(text))
    if args.out:
        write(args.out, "quality", device, "\n".join(text))


if __name__ == "__main__":
    main()
