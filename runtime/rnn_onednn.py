"""One LSTM layer by oneDNN's fused kernels, as ``nn.LSTM`` runs them on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

_LSTM = 2  # ideep's number of the kind
_WORKSPACE_BYTES = {torch.float32: 60, torch.bfloat16: 40}
"""Size of the workspace for each step, sample and hidden unit: a little more was seen (torch 2.13,
AVX-512, 35 steps, 20 samples, 650 and 1500 units)."""


def supports(kind: str, x: Tensor, hidden: int) -> bool:
    """Returns whether a layer can run here, as nn.LSTM would with the same input."""
    on = torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()
    if not on or kind != "lstm" or x.device.type != "cpu" or x.dtype not in _WORKSPACE_BYTES:
        return False
    if any(isinstance(size, int) and size == 0 for size in (*x.shape, hidden)):
        return False
    return x.dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def workspace_bytes(x: Any, hidden: Any) -> Any:
    """Returns the size of the workspace as the graph sees it, which sizes may be symbols in.

    Only oneDNN knows the true one. What is returned as the workspace is a view of that size of
    the true one.
    """
    return x.shape[0] * x.shape[1] * hidden * _WORKSPACE_BYTES[x.dtype]


def forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs a layer; see `ardd.runtime.rnn_loop.forward`.

    Args:
        x: ``[T, N, I]``, float32 or bfloat16, as all tensors.
        h0: ``[N, H]``.
        c0: ``[N, H]``.
        w_ih: ``[4H, I]``.
        w_hh: ``[4H, H]``.
        b_ih: ``[4H]``, or None.
        b_hh: ``[4H]``, or None.
        reverse: whether the last step comes first.
        save: whether `backward` will be called.

    Returns:
        y ``[T, N, H]``, h and c ``[N, H]``, and the workspace, uint8.
    """
    zeros = x.new_zeros(len(w_ih)) if b_ih is None or b_hh is None else None
    # It has a workspace only in this mode, whatever the last argument says.
    with torch._C._AutoDispatchBelowAutograd(), torch.set_grad_enabled(save):
        y, h, c, workspace = aten.mkldnn_rnn_layer(
            x.contiguous(),
            w_ih.contiguous(),
            w_hh.contiguous(),
            b_ih if zeros is None else zeros,
            b_hh if zeros is None else zeros,
            h0.contiguous().unsqueeze(0),
            c0.contiguous().unsqueeze(0),
            *(reverse, [], _LSTM, h0.shape[1], 1, True, False, False, save),
        )
    return y, h.squeeze(0), c.squeeze(0), workspace if save else x.new_empty(0)


def backward(
    dy: Tensor | None,
    dh: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    y: Tensor,
    c: Tensor,
    workspace: Tensor,
    reverse: bool,
) -> list[Tensor]:
    """Returns the gradients of x, h0, c0, w_ih, w_hh, b_ih and b_hh: oneDNN computes them all.

    They have the type of x.

    Args:
        dy: gradient of y, None for zero, as for the next two.
        dh: gradient of the last h.
        dc: gradient of the last c.
        x: as given to `forward`, as the next six.
        h0: see there.
        c0: see there.
        w_ih: see there.
        w_hh: see there.
        b_ih: see there.
        b_hh: see there.
        y: what `forward` returned, as the next two.
        c: see there.
        workspace: all of it. oneDNN does not check its size.
        reverse: as given to `forward`.
    """
    zeros = x.new_zeros(len(w_ih)) if b_ih is None or b_hh is None else None
    h = y[0] if reverse else y[-1]
    dx, dw_ih, dw_hh, db_ih, db_hh, dh0, dc0 = aten.mkldnn_rnn_layer_backward(
        x.contiguous(),
        w_ih.contiguous(),
        w_hh.contiguous(),
        b_ih if zeros is None else zeros,
        b_hh if zeros is None else zeros,
        h0.contiguous().unsqueeze(0),
        c0.contiguous().unsqueeze(0),
        y.contiguous(),
        h.unsqueeze(0),
        c.contiguous().unsqueeze(0),
        None if dy is None else dy.contiguous(),
        None if dh is None else dh.contiguous().unsqueeze(0),
        None if dc is None else dc.contiguous().unsqueeze(0),
        *(reverse, _LSTM, h0.shape[1], 1, True, True, False, [], False),
        workspace,
    )
    grads = [dx, dh0.view(h0.shape), dc0.view(c0.shape), dw_ih, dw_hh, db_ih, db_hh]
    return [grad.to(x.dtype) for grad in grads]  # oneDNN gives float32 for bfloat16
