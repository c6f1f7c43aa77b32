"""A dropout that stays random costs 8 bytes of what is saved for backward: its seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ardd

SEED = 8  # bytes


def mlp(p: float) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(32, 64), nn.ReLU(), nn.Dropout(p), nn.Linear(64, 64)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Dropout(p), nn.Linear(64, 8))


def selu(p: float) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(32, 64), nn.SELU(), nn.AlphaDropout(p)]
    return nn.Sequential(*layers, nn.Linear(64, 8))


def at_the_input(p: float) -> nn.Module:
    return nn.Sequential(nn.Linear(32, 32), nn.Dropout(p), nn.Linear(32, 8), nn.Dropout(p))


def encoder(norm_first: bool, activation: Any) -> Callable[[float], nn.Module]:
    def build(p: float) -> nn.Module:
        layer = nn.TransformerEncoderLayer(
            *(32, 4, 64, p, activation), batch_first=True, norm_first=norm_first
        )
        layer.self_attn.dropout = 0.0
        return layer

    return build


class Model(nn.Module):
    """With the sum of the result, which saves nothing."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).sum()  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[float], nn.Module], int]] = {
    "mlp": (mlp, 2),
    "selu": (selu, 1),
    "at the input": (at_the_input, 2),
    **{
        f"{'pre' if norm_first else 'post'}-norm {name}": (encoder(norm_first, activation), 3)
        for norm_first in (True, False)
        for name, activation in (("relu", F.relu), ("gelu", F.gelu))
    },
}


def saved_bytes(model: nn.Module, x: Tensor, **options: Any) -> tuple[int, ardd.Report]:
    given: dict[str, Any] = {"pattern": "random", "strict": True, "target": "eager"} | options
    torch._dynamo.reset()  # a model seen before would have symbolic sizes
    report = ardd.explain(Model(model), x, options=given)
    (graph,) = report.graphs
    assert graph.failure is None
    assert graph.saved_bytes_after is not None
    return graph.saved_bytes_after, report


@pytest.mark.parametrize(
    ("name", "dtype", "saves"),
    [
        *((name, dtype, "off") for name in MODELS for dtype in (torch.float32, torch.bfloat16)),
        ("mlp", torch.float32, "exact"),
        ("pre-norm relu", torch.bfloat16, "exact"),
    ],
)
def test_saved_bytes(name: str, dtype: torch.dtype, saves: str) -> None:
    """No mask is saved, nor anything else that backward would not read without dropout."""
    build, n_sites = MODELS[name]
    x = torch.randn(8, 16, 32, dtype=dtype)
    without, _ = saved_bytes(build(0.0).to(dtype), x, saves=saves)
    dropped, report = saved_bytes(build(0.25).to(dtype), x, saves=saves)
    assert [decision.taken for decision in report.decisions] == [False] * n_sites
    assert dropped == without + n_sites * SEED


@pytest.mark.parametrize("name", ["mlp", "post-norm relu", "pre-norm gelu"])
def test_saved_bytes_of_dynamic_batches(name: str) -> None:
    """Nothing is kept only to read a size from; torch may cut a graph with dropout a bit better."""
    build, n_sites = MODELS[name]

    def of(p: float) -> int:
        torch._dynamo.reset()
        x = torch.randn(8, 16, 32)
        torch._dynamo.mark_dynamic(x, 0)
        options: dict[str, Any] = {"pattern": "random", "strict": True, "target": "eager"}
        (graph,) = ardd.explain(Model(build(p)), x, options=options).graphs
        assert graph.saved_bytes_after is not None
        return graph.saved_bytes_after

    without = of(0.0)
    assert 0.99 * without < of(0.25) <= without + n_sites * SEED


def test_what_autograd_keeps() -> None:
    """The same of what really runs, where autograd's own hooks see it."""

    def kept(p: float) -> list[Tensor]:
        torch._dynamo.reset()
        model = mlp(p)
        options: dict[str, Any] = {"pattern": "random", "strict": True, "target": "eager"}
        compiled = torch.compile(model, backend="ardd", fullgraph=True, options=options)
        x = torch.randn(128, 32)
        compiled(x).sum().backward()
        seen: list[Tensor] = []

        def pack(saved: Tensor) -> Tensor:
            seen.append(saved)
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            y = compiled(x)
        y.sum().backward()
        given = {x.data_ptr(), *(w.data_ptr() for w in model.parameters())}
        return [saved for saved in seen if saved.data_ptr() not in given]

    # Of the ReLUs, whose signs are those of what is dropped.
    assert sum(saved.nbytes for saved in kept(0.0)) == 2 * 128 * 64 * 4 + 2 * 128 * 64 // 8
    seeds, *dropped = sorted(kept(0.25), key=lambda saved: saved.nbytes)
    assert (seeds.dtype, seeds.shape) == (torch.int32, (2, 2))
    assert [(saved.dtype, saved.shape) for saved in dropped] == [(torch.float32, (128, 64))] * 2
