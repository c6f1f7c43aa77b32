"""From one state of the generator every target drops the same: eager code, Inductor, Triton."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ardd
from ardd.passes.kept_sets import DRAWS, bits_needed
from ardd.runtime.draw_seeds import draw_seeds
from ardd.runtime.dropout_mask import draw_mask
from ardd.runtime.random_bits import bits_at, bits_like, run, threshold_of

aten = torch.ops.aten
CPU = torch.device("cpu")

TARGETS = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]


def compiled(fn: Callable[..., Any], target: str, **options: object) -> Callable[..., Any]:
    given: dict[str, Any] = {"target": target, "strict": True, **options}
    return torch.compile(fn, backend="ardd", options=given)


# name -> what drops, and the dimensions of [N, C, H, W] that share a draw
DROPOUTS: dict[str, tuple[Callable[..., Tensor], list[int]]] = {
    "dropout": (F.dropout, []),
    "dropout1d": (F.dropout1d, [2]),
    "dropout2d": (F.dropout2d, [2, 3]),
}
SIZES: dict[str, list[tuple[int, ...]]] = {
    "dropout": [(4, 64), (5, 13), (3, 4, 5, 6)],
    "dropout1d": [(6, 40, 3)],
    "dropout2d": [(3, 40, 2, 3)],
}
CASES = [(name, sizes) for name, several in SIZES.items() for sizes in several]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "sizes"), CASES)
@pytest.mark.parametrize("p", [0.5, 0.3])
def test_a_mask_is_that_of_the_plain_op(
    name: str, sizes: tuple[int, ...], p: float, target: str, seed: int
) -> None:
    """Of the dropout and of its gradient, with and without autograd."""
    drop, shared = DROPOUTS[name]
    fn = compiled(lambda x: drop(x, p), target, pattern="random")
    torch.manual_seed(seed)
    x = torch.ones(sizes)
    expected = draw_mask(x, shared, p, 1.0, 0).expand(sizes)
    assert 0 < expected.count_nonzero() < expected.numel()
    torch.manual_seed(seed)
    with torch.no_grad():
        assert torch.equal(fn(x), expected)
    torch.manual_seed(seed)
    x.requires_grad_()
    y = fn(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, expected)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_zeros_are_those_of_every_other_type(dtype: torch.dtype, target: str, seed: int) -> None:
    fn = compiled(lambda x: F.dropout(x, 0.3), target, pattern="random")
    torch.manual_seed(seed)
    expected = draw_mask(torch.ones(5, 77), [], 0.3, 1.0, 0) != 0
    torch.manual_seed(seed)
    y = fn(torch.ones(5, 77, dtype=dtype))
    assert y.dtype == dtype
    assert torch.equal(y != 0, expected)


@pytest.mark.parametrize("target", TARGETS)
def test_the_order_of_memory_and_unknown_sizes_change_nothing(target: str, seed: int) -> None:
    fn = compiled(lambda x: F.dropout(x, 0.5), target, pattern="random")
    for sizes in ((2, 3, 4, 5), (3, 4, 5, 6), (2, 64, 3, 3)):  # from the second on, dynamic
        torch.manual_seed(seed)
        expected = draw_mask(torch.ones(sizes), [], 0.5, 1.0, 0)
        for x in (torch.ones(sizes), torch.ones(sizes).to(memory_format=torch.channels_last)):
            torch.manual_seed(seed)
            assert torch.equal(fn(x), expected)


@pytest.mark.parametrize("target", TARGETS)
def test_dropout_number_i_has_the_i_th_seed(target: str, seed: int) -> None:
    """And the generator is left where drawing seed by seed leaves it."""

    def thrice(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(F.dropout(x, p) for p in (0.2, 0.5, 0.8))

    x = torch.ones(9, 50)
    torch.manual_seed(seed)
    expected = [draw_mask(x, [], p, 1.0, 0) for p in (0.2, 0.5, 0.8)]
    after = torch.rand(2)
    torch.manual_seed(seed)
    seen = compiled(thrice, target, pattern="random")(x)
    assert all(torch.equal(y, mask) for y, mask in zip(seen, expected, strict=True))
    assert torch.equal(torch.rand(2), after)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 96), nn.Linear(96, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.first(x), 0.5))  # type: ignore[no-any-return]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("pattern", ["block", "window"])
def test_a_kept_set_is_that_of_the_plain_op(pattern: str, target: str, seed: int) -> None:
    """What a graph keeps is what the op gives in eager code, of the bits of the first seed."""
    fn = compiled(Net(), target, pattern=pattern, block_size=4)
    torch.manual_seed(seed)
    with ardd.record_masks() as draws:
        fn(torch.randn(6, 8, generator=torch.Generator())).sum().backward()
    ((site, n_blocks, kept),) = draws
    assert (n_blocks, len(kept)) == (24, 12)
    torch.manual_seed(seed)
    bits = bits_like(draw_seeds(1, CPU)[0], bits_needed(pattern, (n_blocks, len(kept))))
    assert torch.equal(DRAWS[pattern](bits, n_blocks, len(kept), site)[0], kept)


# Triton, by its interpreter: `pip install triton` is all it takes, NumPy is in the extra `dev`. The
# body of the kernel is what `bits_at` asks its `op` for, as text.

KERNEL = """
import sys
import torch, triton
import triton.language as tl

@triton.jit
def kernel(seed, out, start, n, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index = place.to(tl.int64) + start
    low, high = index.to(tl.int32), (index >> 32).to(tl.int32)
{body}
    tl.store(out + place, {result}, mask=place < n)

given = torch.load(sys.argv[1])
results = []
for start in given["starts"]:
    out = torch.empty(given["n"], dtype=torch.int32)
    kernel[(triton.cdiv(given["n"], 64),)](given["seed"], out, start, given["n"], BLOCK=64)
    results.append(out)
torch.save(results, sys.argv[1])
"""


class TritonText:
    """The `Op` that writes a line for every op."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, target: Any, *args: Any) -> str:
        forms: dict[Any, str] = {
            aten.select.int: "tl.load({0} + {2})",
            aten.bitwise_xor.Tensor: "{0} ^ {1}",
            aten.mul.Tensor: "{0} * {1}",
            aten.__rshift__.Scalar: "{0} >> {1}",
            aten.bitwise_and.Scalar: "{0} & {1}",
        }
        name = f"t{len(self.lines)}"
        self.lines.append(f"    {name} = {forms[target].format(*args)}")
        return name


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton 3.6 or later")
def test_triton_computes_the_same_words(tmp_path: Path) -> None:
    """At the first indices, and across 2**31 and 2**32."""
    (seed,) = draw_seeds(1, CPU)
    starts = [0, 2**31 - 500, 2**32 - 500, 5 * 2**32 + 7]
    given = {"seed": seed, "n": 1000, "starts": starts}
    op = TritonText()
    result = bits_at(op, "low", "seed", "high")
    script, file = tmp_path / "kernel.py", tmp_path / "words.pt"
    script.write_text(KERNEL.format(body="\n".join(op.lines), result=result), "utf-8")
    torch.save(given, file)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(file)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, *others = torch.load(file)
    assert torch.equal(first, bits_like(seed, (1000,)))
    for start, words in zip(starts[1:], others, strict=True):
        place = torch.arange(1000) + start
        high = (place >> 32).to(torch.int32)
        assert torch.equal(words, bits_at(run, place.to(torch.int32), seed, high))
    mask = draw_mask(torch.empty(1000), [], 0.3, 1.0, 0, seed)
    assert torch.equal(first >= threshold_of(0.3), mask != 0)
