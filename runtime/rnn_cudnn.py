"""One recurrent layer by cuDNN, as ``nn.LSTM`` and its kind run on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten

_MODES = {"rnn_relu": 0, "rnn_tanh": 1, "lstm": 2, "gru": 3}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def supports(x: Tensor) -> bool:
    """Returns whether a layer with this input can run here."""
    cudnn = torch.backends.cudnn
    on = x.device.type == "cuda" and cudnn.enabled and cudnn.is_available()
    empty = any(isinstance(size, int) and size == 0 for size in x.shape)
    return on and x.dtype in _DTYPES and not empty


def forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    kind: str,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs a layer; see `ardd.runtime.rnn_loop.forward`.

    cuDNN knows no layer that only goes backwards in time: the input is turned round.

    Args:
        x: ``[T, N, I]``.
        h0: ``[N, H]``.
        c0: ``[N, H]`` for an LSTM.
        w_ih: ``[G, I]``.
        w_hh: ``[G, H]``.
        b_ih: ``[G]``, or None.
        b_hh: ``[G]``, or None.
        kind: of the layer.
        reverse: whether the last step comes first.
        save: whether `backward` will be called.

    Returns:
        y ``[T, N, H]``, h and c ``[N, H]``, what cuDNN reserves for `backward`, and the weights
        as it packed them.
    """
    weights = _weights(w_ih, w_hh, b_ih, b_hh)
    y, h, c, reserve, packed = aten._cudnn_rnn(
        _turned(x, reverse),
        weights,
        len(weights),
        None,
        h0.contiguous().unsqueeze(0),
        None if c0 is None else c0.contiguous().unsqueeze(0),
        *(_MODES[kind], h0.shape[1], 0, 1, False, 0.0, save, False, [], None),
    )
    c = c.squeeze(0) if kind == "lstm" else x.new_empty(0)
    return _turned(y, reverse), h.squeeze(0), c, reserve, packed


def backward(
    dy: Tensor | None,
    dh: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    y: Tensor,
    reserve: Tensor,
    packed: Tensor,
    kind: str,
    reverse: bool,
    wanted: list[bool],
) -> list[Tensor | None]:
    """Returns the gradients of x, h0, c0, w_ih, w_hh, b_ih and b_hh, None where not computed.

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
        reserve: see there. cuDNN writes to it, so that it is copied: backward may run twice.
        packed: see there.
        kind: as given to `forward`, as the next.
        reverse: see there.
        wanted: which of the gradients are wanted.
    """
    weights = _weights(w_ih, w_hh, b_ih, b_hh)
    dx, dh0, dc0, dw = aten._cudnn_rnn_backward(
        _turned(x, reverse),
        weights,
        len(weights),
        packed,
        h0.contiguous().unsqueeze(0),
        None if c0 is None else c0.contiguous().unsqueeze(0),
        _turned(y, reverse),
        torch.zeros_like(y) if dy is None else _turned(dy, reverse),
        None if dh is None else dh.contiguous().unsqueeze(0),
        None if dc is None else dc.contiguous().unsqueeze(0),
        *(_MODES[kind], h0.shape[1], 0, 1, False, 0.0, True, False, [], None),
        reserve.clone(),
        [wanted[0], wanted[1], wanted[2], any(wanted[3:])],
    )
    grads = [
        _turned(dx, reverse) if wanted[0] else None,
        dh0.view(h0.shape) if wanted[1] else None,
        dc0.view(h0.shape) if wanted[2] else None,
    ]
    of_weights = [*dw, None, None, None, None] if any(wanted[3:]) else [None] * 4
    return [*grads, *of_weights[:4]]


def _weights(w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> list[Tensor]:
    given = [w_ih, w_hh] if b_ih is None or b_hh is None else [w_ih, w_hh, b_ih, b_hh]
    return [weight.contiguous() for weight in given]


def _turned(x: Tensor, reverse: bool) -> Tensor:
    return x.flip(0) if reverse else x.contiguous()
