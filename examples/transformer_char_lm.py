"""Trains a small character GPT under Inductor and ardd in turns, then lets it write.

The text is that of Python's own help topics, or a file of yours; its last tenth validates.
"""

from __future__ import annotations

import argparse
import copy
import pydoc_data.topics
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import rich
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

import ardd

WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 128, 4, 2, 64, 32
WARMUP_STEPS = 3  # these compile, and are left out of the ratio


class Block(nn.Module):
    """Shapes: b batch, t characters, d width, h heads, e features of a head, v vocabulary."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.project_dropout = nn.Dropout(p)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Dropout(p),
            nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(p),
        )  # fmt: skip

    def attend(self, x_btd: Tensor) -> Tensor:
        batch, length, _ = x_btd.shape
        heads = self.qkv(x_btd).view(batch, length, 3 * HEADS, -1).transpose(1, 2)
        q_bhte, k_bhte, v_bhte = heads.chunk(3, dim=1)
        out_bhte = F.scaled_dot_product_attention(q_bhte, k_bhte, v_bhte, is_causal=True)
        added_btd: Tensor = self.project_dropout(self.project(out_bhte.transpose(1, 2).flatten(2)))
        return added_btd

    def forward(self, x_btd: Tensor) -> Tensor:
        x_btd = x_btd + self.attend(self.norm_1(x_btd))
        added_btd: Tensor = self.mlp(self.norm_2(x_btd))
        return x_btd + added_btd


class GPT(nn.Module):
    def __init__(self, vocabulary: int, p: float) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.dropout = nn.Dropout(p)
        self.blocks = nn.Sequential(*(Block(p) for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, ids_bt: Tensor) -> Tensor:
        positions = torch.arange(ids_bt.shape[1], device=ids_bt.device)
        x_btd = self.dropout(self.token(ids_bt) + self.position(positions))
        logits_btv: Tensor = self.head(self.norm(self.blocks(x_btd)))
        return logits_btv


def loss_of(logits_btv: Tensor, targets_bt: Tensor) -> Tensor:
    return F.cross_entropy(logits_btv.flatten(0, 1), targets_bt.flatten())


def sample_batch(ids: Tensor) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(ids) - CONTEXT, (BATCH, 1))
    window = ids[starts + torch.arange(CONTEXT + 1)]
    return window[:, :-1], window[:, 1:]


@torch.no_grad()
def validation_loss(model: nn.Module, ids: Tensor) -> float:
    model.eval()
    windows = ids[: len(ids) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)[:256]
    return loss_of(model(windows[:, :-1]), windows[:, 1:]).item()


@torch.no_grad()
def write(model: nn.Module, ids: Tensor, length: int) -> Tensor:
    """Continues `ids` by `length` characters."""
    model.eval()
    for _ in range(length):
        chances = model(ids[None, -CONTEXT:])[0, -1].softmax(0)
        ids = torch.cat([ids, torch.multinomial(chances, 1)])
    return ids[-length:]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a text file")
    parser.add_argument("--p", type=float, default=0.2, help="drop rate (default 0.2)")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each side")
    parser.add_argument("--quick", action="store_true", help="8 steps only")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    topics = pydoc_data.topics.topics
    text = args.data.read_text("utf-8") if args.data else "\n".join(topics.values())
    alphabet = sorted(set(text))
    number = {character: i for i, character in enumerate(alphabet)}
    ids = torch.tensor([number[character] for character in text])
    train_ids, valid_ids = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]

    names = ("inductor", "ardd")
    first = GPT(len(alphabet), args.p)
    models = {name: copy.deepcopy(first) for name in names}
    runs = {name: torch.compile(models[name], backend=name) for name in names}
    optimizers = {name: torch.optim.AdamW(models[name].parameters(), 3e-3) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}

    for _ in track(range(8 if args.quick else args.steps), "training both"):
        x, y = sample_batch(train_ids)
        names = names[::-1]  # the one that went first goes last
        for name in names:
            start = time.perf_counter()
            optimizers[name].zero_grad()
            loss_of(runs[name](x), y).backward()
            optimizers[name].step()
            seconds[name].append(time.perf_counter() - start)

    for name in runs:
        ms = 1e3 * statistics.median(seconds[name][WARMUP_STEPS:])
        loss = validation_loss(models[name], valid_ids)
        rich.print(f"{name:>9}: validation loss {loss:.3f} nats per character, {ms:.1f} ms/step")
    pairs = list(zip(seconds["inductor"], seconds["ardd"], strict=True))[WARMUP_STEPS:]
    rich.print(f"ardd steps at {statistics.median(a / b for a, b in pairs):.2f}x Inductor's speed")

    written = write(models["ardd"], valid_ids[:CONTEXT], 40 if args.quick else 300)
    print("".join(alphabet[i] for i in written.tolist()))
    rich.print(ardd.report())


if __name__ == "__main__":
    main()
