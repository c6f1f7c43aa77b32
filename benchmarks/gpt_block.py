"""Speed of one GPT-2-small transformer block in training, against Inductor.

Width 768, 12 heads, and dropout where GPT-2 has it: on the attention weights, and on what the
attention and the MLP add to the residual stream. The attention is written out (`eager`), or one
call of `scaled_dot_product_attention` (`sdpa`), whose dropout no backend sees.

    python -m benchmarks.gpt_block --out benchmarks/results
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmarks._measure import alternate, clock, header, milliseconds, ratio, table, write
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import ardd

WIDTH, HEADS = 768, 12


class Block(nn.Module):
    """Shapes: b batch, t tokens, d width, h heads, e features of a head."""

    def __init__(self, p: float, attention: str) -> None:
        super().__init__()
        self.p = p
        self.attention = self.eager if attention == "eager" else self.sdpa
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.weights_dropout, self.attention_dropout = nn.Dropout(p), nn.Dropout(p)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU("tanh"), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(p)
        )

    def eager(self, q_bhte: Tensor, k_bhte: Tensor, v_bhte: Tensor) -> Tensor:
        length = q_bhte.shape[-2]
        future_tt = torch.ones(length, length, dtype=torch.bool, device=q_bhte.device).triu(1)
        scores_bhtt = q_bhte @ k_bhte.transpose(-1, -2) / q_bhte.shape[-1] ** 0.5
        weights_bhtt = scores_bhtt.masked_fill(future_tt, float("-inf")).softmax(-1)
        dropped_bhtt: Tensor = self.weights_dropout(weights_bhtt)
        return dropped_bhtt @ v_bhte

    def sdpa(self, q_bhte: Tensor, k_bhte: Tensor, v_bhte: Tensor) -> Tensor:
        p = self.p if self.training else 0.0
        return F.scaled_dot_product_attention(q_bhte, k_bhte, v_bhte, dropout_p=p, is_causal=True)

    def forward(self, x_btd: Tensor) -> Tensor:
        batch, length, _ = x_btd.shape
        heads = self.qkv(self.norm_1(x_btd)).view(batch, length, 3 * HEADS, -1).transpose(1, 2)
        attended_bhte = self.attention(*heads.chunk(3, dim=1))
        projected_btd = self.project(attended_bhte.transpose(1, 2).flatten(2))
        x_btd = x_btd + self.attention_dropout(projected_btd)
        added_btd: Tensor = self.mlp(self.norm_2(x_btd))
        return x_btd + added_btd


def forward_backward(block: Block, backend: str, x: Tensor) -> Callable[[], dict[str, float]]:
    """Returns what times a copy of `block`, gradients of the input included."""
    block = copy.deepcopy(block)
    run = torch.compile(block, backend=backend)
    x, grad = x.clone().requires_grad_(), torch.randn_like(x)

    def step() -> dict[str, float]:
        start = clock(x.device)
        block.zero_grad(set_to_none=True)
        x.grad = None
        run(x).backward(grad)
        return {"fw+bw": clock(x.device) - start}

    return step


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--attention", choices=("eager", "sdpa"), nargs="+", default=["eager", "sdpa"]
    )
    parser.add_argument("--p", type=float, nargs="+", default=[0.1])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, help="folder to write the table to")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    title = "Speed of a GPT-2-small block in training, against Inductor"
    text = [header("gpt_block", title, argv, args.device)]
    x = torch.randn(args.batch, args.tokens, WIDTH, device=args.device)
    rows = []
    with Progress(console=Console(stderr=True)) as progress:
        cases = [(attention, p) for attention in args.attention for p in args.p]
        for attention, p in progress.track(cases, description="attention and p"):
            torch.compiler.reset()
            block = Block(p, attention).to(args.device)
            decisions = ardd.explain(block, x).decisions
            structured = f"{sum(d.taken for d in decisions)} of {len(decisions)}"
            sides = {name: forward_backward(block, name, x) for name in ("ardd", "inductor")}
            measured = alternate(sides, repeats=args.repeats)
            ours, theirs = (measured.seconds[name]["fw+bw"] for name in ("ardd", "inductor"))
            row = [attention, str(p), structured, milliseconds(ours), milliseconds(theirs)]
            rows.append([*row, ratio(theirs, ours), f"{measured.others:.0%}"])
    text += [f"Forward and backward, batch {args.batch}, {args.tokens} tokens.\n"]
    headings = ["attention", "p", "structured", "ardd ms", "Inductor ms", "Inductor / ardd"]
    headings += ["others' CPU"]
    text += [table(headings, rows)]
    text += [f"\nMedians of {args.repeats} repetitions in turns; the ratio is the median"]
    text += ["(quartiles) of the ratios within each repetition. Compilation is left out. Others'"]
    text += ["CPU: the share of the CPU time that went to other processes meanwhile."]
    print("\n".join(text))
    if args.out:
        write(args.out, "gpt_block", args.device, "\n".join(text))


if __name__ == "__main__":
    main()
