"""What the quality benchmarks train: an MLP on MNIST, a transformer and an LSTM on text."""

from __future__ import annotations

import collections
import dataclasses
import gzip
import itertools
import math
import statistics
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Task:
    """A model, its batches and what it is judged by."""

    name: str
    metric: str
    """``accuracy %`` or ``perplexity``."""
    build: Callable[[float], nn.Module]
    """Takes the dropout rate."""
    batches: Callable[[int], Iterator[Batch]]
    """Takes the seed; has no end."""
    validation: Batch
    steps: int
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    largest_gradient: float = math.inf
    """Norm that the gradients of all parameters are clipped to."""

    def loss(self, run: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
        """Returns the cross entropy of one batch, in nats."""
        logits = run(batch[0])
        return F.cross_entropy(logits.flatten(0, -2).float(), batch[1].flatten())

    def scores(self, model: nn.Module) -> tuple[float, float]:
        """Returns the metric and the loss on the validation set."""
        model.eval()
        with torch.no_grad():
            logits = model(self.validation[0]).flatten(0, -2).float()
        model.train()
        labels = self.validation[1].flatten()
        loss = F.cross_entropy(logits, labels).item()
        if self.metric == "accuracy %":
            return 100 * (logits.argmax(1) == labels).double().mean().item(), loss
        return math.exp(min(loss, 50)), loss

    def renew(self, model: nn.Module, p: float, seed: int) -> None:
        """Gives the model the first weights of a seed, in place: a compiled one stays compiled."""
        torch.manual_seed(seed)
        model.load_state_dict(self.build(p).state_dict())
        model.train()


# ---- models ------------------------------------------------------------------------------


def mlp(p: float, width: int = 1024) -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, width), nn.ReLU(), nn.Dropout(p),
        nn.Linear(width, width), nn.ReLU(), nn.Dropout(p),
        nn.Linear(width, 10),
    )  # fmt: skip


class CharModel(nn.Module):
    """A small GPT. Shapes: b batch, t tokens, d width."""

    def __init__(
        self, width: int = 256, layers: int = 2, heads: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 128)

    def forward(self, x_bt: Tensor) -> Tensor:
        future = nn.Transformer.generate_square_subsequent_mask(x_bt.shape[1], x_bt.device)
        h_btd: Tensor = self.embed(x_bt)
        for block in self.blocks:
            h_btd = block(h_btd, src_mask=future, is_causal=True)
        logits: Tensor = self.head(self.norm(h_btd))
        return logits


class WordModel(nn.Module):
    """Zaremba et al. 2014, https://arxiv.org/abs/1409.2329. Shapes: t tokens, b batch, d units."""

    def __init__(self, words: int, units: int, layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, units)
        self.drop = nn.Dropout(dropout)
        self.lstm = nn.LSTM(units, units, layers, dropout=dropout)
        self.head = nn.Linear(units, words)
        for weight in self.parameters():
            nn.init.uniform_(weight, -0.05, 0.05)

    def forward(self, x_tb: Tensor) -> Tensor:
        h_tbd, _ = self.lstm(self.drop(self.embed(x_tb)))
        logits: Tensor = self.head(self.drop(h_tbd))
        return logits


# ---- data --------------------------------------------------------------------------------


def read_idx(path: Path) -> Tensor:
    """Reads one gzipped idx file of bytes: magic 0 0 8 ndim, big-endian sizes, values."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    sizes = struct.unpack_from(f">{raw[3]}i", raw, 4)
    return torch.frombuffer(raw, dtype=torch.uint8, offset=4 + 4 * raw[3]).view(sizes)


def mnist(folder: Path, steps: int, learning_rate: float = 0.02) -> Task:
    """The 10,000 t10k images, split 8,000 / 2,000 by a fixed permutation; batches of 128.

    With momentum 0.9, masks that a whole batch shares diverge at a learning rate of 0.05 and
    p = 0.7, under eager PyTorch too; Bernoulli masks do not. At 0.02 every kind of mask trains.
    """
    x, y = mnist_images(folder)
    train, validation = (x[:8000], y[:8000]), (x[8000:], y[8000:])

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), learning_rate, momentum=0.9, fused=True)

    batches = shuffled(train, 128)
    return Task("MLP on MNIST", "accuracy %", mlp, batches, validation, steps, optimizer)


def mnist_images(folder: Path) -> Batch:
    """Returns the 10,000 t10k images, float32 ``[10000, 784]`` of 0 to 1, in a fixed order."""
    x = read_idx(folder / "t10k-images-idx3-ubyte.gz").flatten(1).float() / 255
    y = read_idx(folder / "t10k-labels-idx1-ubyte.gz").long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def shuffled(data: Batch, size: int) -> Callable[[int], Iterator[Batch]]:
    """Returns what yields batches of one size, in a new order each epoch, from a seed."""
    x, y = data

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(x), generator=generator)
            for rows in order[: len(x) // size * size].split(size):
                yield x[rows], y[rows]

    return batches


def characters(
    path: Path,
    steps: int,
    limit: int | None = None,
    *,
    width: int = 128,
    length: int = 64,
    batch: int = 32,
) -> Task:
    """The first nine tenths of a text in windows of some characters; 128 of the rest.

    With a limit only so many characters are trained on: dropout is for a model that has seen its
    data many times.
    """
    text = path.read_text("utf-8")
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([number[character] for character in text])
    cut = len(ids) * 9 // 10
    train = ids[:cut][:limit]

    def build(p: float) -> nn.Module:
        return CharModel(width=width, layers=2, heads=4, dropout=p)

    validation = _stacked(ids[cut:], length, 128)
    batches = _windows(train, length, batch)
    name = "character transformer"
    return Task(name, "perplexity", build, batches, validation, steps, _adamw, 1.0)


def words(
    train: Path,
    valid: Path,
    steps: int,
    limit: int = 50_000,
    *,
    known: int = 2_000,
    units: int = 200,
) -> Task:
    """So many words of a text, some told apart, in windows of 35; the other text validates."""
    text, other = train.read_text("utf-8").split()[:limit], valid.read_text("utf-8").split()
    frequent = [word for word, _ in collections.Counter(text).most_common(known - 1)]
    number = {word: i for i, word in enumerate(frequent)}
    rare = len(frequent)
    ids, valid_ids = (torch.tensor([number.get(w, rare) for w in part]) for part in (text, other))

    def build(p: float) -> nn.Module:
        return WordModel(rare + 1, units, dropout=p)

    def time_first(batches: Iterator[Batch]) -> Iterator[Batch]:
        return ((x.t(), y.t()) for x, y in batches)

    def batches(seed: int) -> Iterator[Batch]:
        return time_first(_windows(ids, 35, 20)(seed))

    (validation,) = time_first(iter([_stacked(valid_ids, 35, 128)]))
    return Task("LSTM on words", "perplexity", build, batches, validation, steps, _adamw, 5.0)


def _windows(ids: Tensor, length: int, batch: int) -> Callable[[int], Iterator[Batch]]:
    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for _ in itertools.count():
            starts = torch.randint(len(ids) - length, (batch, 1), generator=generator)
            window = ids[starts + torch.arange(length + 1)]
            yield window[:, :-1], window[:, 1:]

    return batches


def _stacked(ids: Tensor, length: int, rows: int) -> Batch:
    windows = ids[: rows * (length + 1)].view(rows, length + 1)
    return windows[:, :-1], windows[:, 1:]


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-3, fused=True)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and its standard error; NaN where a run diverged."""
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
