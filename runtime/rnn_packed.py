"""One LSTM layer in float32 on a CPU: its own recurrence, and oneDNN's products.

The recurrence is C++ that Inductor's own compiler builds when the first layer is given to it, see
``rnn_packed.cpp``: each step reads the state's weight once, packed, for all samples. All that does
not depend on the state before is one product for all steps. Gates and cells are plain tensors, as
in `ardd.runtime.rnn_loop`.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import rnn_onednn
from .rnn_loop import sum_of

_FLAGS = ("-ffp-contract=fast",)
_POINTERS = {"lstm_forward": 6, "lstm_backward": 9}
"""Function of the C++ to the number of its arguments that are addresses."""
_SMALLEST_WEIGHT_BYTES = 16 << 20
_MOST_SAMPLES = 32


def supports(kind: str, x: Tensor, hidden: int) -> bool:
    """Returns whether a layer can run here; the first time, builds the C++."""
    on_onednn = x.dtype == torch.float32 and rnn_onednn.supports(kind, x, hidden)
    return on_onednn and _library() is not None


def pays(samples: Any, hidden: Any) -> bool:
    """Returns whether a layer is faster here than oneDNN's own.

    It is where the time goes into reading the weight again in each step. Forward and backward
    together took oneDNN's time divided by (35 steps, torch 2.13, 2 cores of AMD Zen 4 with 32 MB
    of L3): 1,500 units 2.0, 1.3, 1.0, 0.9 at 5, 20, 32, 64 samples; 1,024 units 1.8, 1.1, 1.0, 0.9
    at 8, 20, 32, 64; 650 units 0.9 at 20.
    """
    if not (isinstance(samples, int) and isinstance(hidden, int)):
        return False
    return samples <= _MOST_SAMPLES and 16 * hidden**2 >= _SMALLEST_WEIGHT_BYTES


def forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs a layer; see `ardd.runtime.rnn_loop.forward`.

    Args:
        x: ``[T, N, I]``, float32, as all tensors.
        h0: ``[N, H]``.
        c0: ``[N, H]``.
        w_ih: ``[4H, I]``; None where x ``[T, N, 4H]`` is the product with it already.
        w_hh: ``[4H, H]``.
        b_ih: ``[4H]``, or None.
        b_hh: ``[4H]``, or None.
        reverse: whether the last step comes first.

    Returns:
        y ``[T, N, H]``, h and c ``[N, H]``, and for backward the gates ``[T, N, 4H]`` and the cell
        states ``[T, N, H]``.

    Raises:
        MemoryError: there is none for a packed copy of ``w_hh``.
        ValueError: a state or ``w_hh`` has another shape.
    """
    (steps, samples, _), hidden = x.shape, h0.shape[1]
    expected = {"h0": (samples, hidden), "c0": (samples, hidden), "w_hh": (4 * hidden, hidden)}
    for (name, shape), tensor in zip(expected.items(), (h0, c0, w_hh), strict=True):
        if tensor.shape != shape:  # the C++ takes addresses alone
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}. Expected {shape}.")
    bias = sum_of(b_ih, b_hh)
    if w_ih is None:
        gates = torch.empty_like(x, memory_format=torch.contiguous_format)
        torch.add(x, 0 if bias is None else bias, out=gates)
    else:
        gates = _product(x, w_ih, bias)
    y, cells = x.new_empty(steps, samples, hidden), x.new_empty(steps, samples, hidden)
    _call("lstm_forward", *(w_hh, h0, c0, gates, cells, y), sizes=y.shape, reverse=reverse)
    last = 0 if reverse else -1
    return y, y[last].clone(), cells[last].clone(), gates, cells


def backward(
    dy: Tensor | None,
    dh: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    reverse: bool,
    wanted: list[bool],
) -> list[Tensor | None]:
    """Returns the exact gradients of `forward`, as `ardd.runtime.rnn_loop.backward` does.

    It takes what that takes, but gates and cells, which `forward` returned, in place of reserve.

    Raises:
        MemoryError: there is none for a packed copy of ``w_hh``.
    """
    # In them the C++ returns the gradients of the first state.
    d_h, d_c = (
        h0.new_zeros(h0.shape)
        if given is None
        else given.clone(memory_format=torch.contiguous_format)
        for given in (dh, dc)
    )
    d_gates = gates.new_empty(gates.shape)
    # The products for gradients of weights read it in this order, and would each make a copy.
    by_gate = gates.new_empty(gates.shape[2], y.shape[0] * y.shape[1])
    tensors = (w_hh, c0, gates, cells, dy, d_h, d_c, d_gates, by_gate)
    _call("lstm_backward", *tensors, sizes=y.shape, reverse=reverse)
    before = torch.cat([y[1:], h0[None]] if reverse else [h0[None], y[:-1]])
    d_bias = d_gates.sum((0, 1)) if wanted[5] or wanted[6] else None
    second = d_bias.clone() if d_bias is not None and wanted[5] and wanted[6] else d_bias
    dx = d_gates if w_ih is None or not wanted[0] else _product(d_gates, w_ih.t())
    return [
        dx if wanted[0] else None,
        d_h if wanted[1] else None,
        d_c if wanted[2] else None,
        _product(by_gate, x.flatten(0, 1).t()) if wanted[3] else None,
        _product(by_gate, before.flatten(0, 1).t()) if wanted[4] else None,
        d_bias,
        second,
    ]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns ``x @ weight.t() + bias`` by oneDNN.

    MKL, which torch itself takes, needed 1.2 to 1.5 times as long for the products of a layer of
    1,500 units (torch 2.13, AMD Zen 4), most of all for the gradients of weights.
    """
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


@functools.cache
def _library() -> Any:
    """Returns the compiled C++, or None where there is no compiler for it."""
    if sys.platform == "win32":  # its compiler has no vector types
        return None
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    source = Path(__file__).with_suffix(".cpp").read_text("utf-8")
    try:
        library = CppCodeCache.load(source, extra_flags=_FLAGS)
    except (CppCompileError, InvalidCxxCompiler):
        return None
    for name, pointers in _POINTERS.items():
        types = [ctypes.c_void_p] * pointers + [ctypes.c_long] * 3 + [ctypes.c_int] * 2
        getattr(library, name).argtypes = types
    return library


def _call(name: str, *tensors: Tensor | None, sizes: torch.Size, reverse: bool) -> None:
    library = _library()
    if library is None:
        raise RuntimeError(
            "The C++ of ardd's LSTM cannot be compiled here, but the program was compiled where it"
            " can. Make a C++ compiler available, or compile the model again."
        )
    # What is written to is contiguous already; copies of the rest live until the call is over.
    dense = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in dense]
    if not getattr(library, name)(*addresses, *sizes, reverse, torch.get_num_threads()):
        raise MemoryError("There is no memory for a packed copy of the weights of an LSTM's state.")
