"""Measures on the example batch what the encodings of the saves lose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..core.saves import SavedTensor
from ..passes.save_layout import RowLayout
from ..runtime.codec import Codec
from ..runtime.token_rows import TokenRows
from .compilation import Compilation


class SaveMeter(fx.Interpreter):
    """Runs a forward graph op by op, and decodes at once what it encodes."""

    def __init__(self, forward: fx.GraphModule, compilation: Compilation) -> None:
        super().__init__(forward)
        self._compilation = compilation

    def run_node(self, n: fx.Node) -> Any:
        """Runs one op, and measures its result if that is saved with a loss."""
        result = super().run_node(n)
        saves = self._compilation.saves
        if saves is not None and n.name in saves.encodings and isinstance(result, Tensor):
            codec, layout = saves.encodings[n.name]
            if not codec.exact:
                self._compilation.save_errors[n.name] = _relative_error(result, codec, layout)
        return result


def measure_saves(
    traced: Callable[..., Any], args: Sequence[Any], compilation: Compilation
) -> tuple[SavedTensor, ...]:
    """Runs a traced program once, on copies, and returns its saves with their errors.

    Args:
        traced: the program, its forward run by a `SaveMeter`.
        args: the arguments of this call.
        compilation: the compile of it.
    """
    saves = compilation.saves
    if saves is None:
        return ()
    if any(not codec.exact for codec, _ in saves.encodings.values()):
        with torch.enable_grad():
            traced(*map(_copied, args))
    errors = compilation.save_errors
    return tuple(dataclasses.replace(s, error=errors.get(s.name, s.error)) for s in saves.saves)


def _copied(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.detach().clone().requires_grad_(x.requires_grad)


def _relative_error(x: Tensor, codec: Codec | TokenRows, layout: RowLayout) -> float:
    if isinstance(codec, TokenRows):
        rows, values = torch.ops.ardd.select_rows(x, codec.kept, codec.sampled)
        decoded = torch.zeros_like(x).index_add_(0, rows, values)
    else:
        rows = layout.to_rows(x)
        decoded = layout.from_rows(codec.decode(codec.encode(rows), layout.row, x.dtype))
    size = torch.linalg.vector_norm(x.double())
    error = torch.linalg.vector_norm((decoded - x).double())
    return float(error / size) if size > 0 else 0.0
