"""One recurrent layer as a loop over time steps: any dtype and device, and the reference.

The products with the input are hoisted out of the loop, forward and backward: one for all steps.
What is left in a step is the product with the state and a few vectorised ops, which write into
tensors that are there already.

Shapes: T steps, N samples, I input features, H hidden units, G rows of the weights (4H for an
LSTM, 3H for a GRU, H for a plain RNN).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

aten = torch.ops.aten

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""Kind of layer to G / H."""
RESERVED = {"lstm": 5, "gru": 4, "rnn_tanh": 0, "rnn_relu": 0}
"""Kind of layer to the values kept for backward, for each step, sample and hidden unit."""


def forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    kind: str,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs a layer. All tensors have one floating dtype.

    Args:
        x: ``[T, N, I]``.
        h0: ``[N, H]``, the first state.
        c0: ``[N, H]``, the first cell state of an LSTM.
        w_ih: ``[G, I]``; None where x ``[T, N, G]`` is the product with it already.
        w_hh: ``[G, H]``.
        b_ih: ``[G]``, or None.
        b_hh: ``[G]``, or None.
        kind: ``lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu``, as torch defines them.
        reverse: whether the last step comes first; step t of the result belongs to step t of x.

    Returns:
        y ``[T, N, H]``; the last h ``[N, H]``; the last c ``[N, H]``, ``[0]`` but for an LSTM; and
        what `backward` needs of the gates, ``[T, N, RESERVED * H]``.
    """
    steps, samples, hidden = len(x), h0.shape[0], h0.shape[1]
    y = x.new_empty(steps, samples, hidden)
    reserve = x.new_empty(steps, samples, RESERVED[kind] * hidden)
    order = range(steps)[::-1] if reverse else range(steps)
    if kind == "lstm":
        assert c0 is not None
        c = _lstm(x, h0, c0, w_ih, w_hh, b_ih, b_hh, y, reserve, order)
    else:
        c = x.new_empty(0)
        if kind == "gru":
            _gru(x, h0, w_ih, w_hh, b_ih, b_hh, y, reserve, order)
        else:
            _rnn(x, h0, w_ih, w_hh, b_ih, b_hh, y, order, kind)
    return y, (y[order[-1]] if steps else h0).clone(), c.clone(), reserve


def backward(
    dy: Tensor | None,
    dh: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor | None,
    w_hh: Tensor,
    y: Tensor,
    reserve: Tensor,
    kind: str,
    reverse: bool,
    wanted: list[bool],
) -> list[Tensor | None]:
    """Returns the exact gradients of `forward`.

    Args:
        dy: gradient of y, None for zero, as for the next two.
        dh: gradient of the last h.
        dc: gradient of the last c.
        x: as given to `forward`, as the next four.
        h0: see there.
        c0: see there.
        w_ih: see there.
        w_hh: see there.
        y: what `forward` returned, as the next.
        reserve: see there.
        kind: see there.
        reverse: see there.
        wanted: which of the gradients are computed.

    Returns:
        Gradients of x, h0, c0, w_ih, w_hh, b_ih and b_hh; None where not wanted.
    """
    steps, samples, hidden = y.shape
    order = range(steps)[::-1] if reverse else range(steps)
    dh = h0.new_zeros(samples, hidden) if dh is None else dh
    # Gradients of what the gates are made of: for x and for h. They are the same but for a GRU.
    d_in = x.new_empty(steps, samples, GATES[kind] * hidden)
    d_hid = d_in
    d_c: Tensor | None = None
    if kind == "lstm":
        assert c0 is not None
        dc = torch.zeros_like(c0) if dc is None else dc
        dh, d_c = _lstm_backward(dy, dh, dc, c0, w_hh, reserve, d_in, order)
    elif kind == "gru":
        d_hid = torch.empty_like(d_in)
        dh = _gru_backward(dy, dh, h0, w_hh, y, reserve, d_in, d_hid, order)
    else:
        dh = _rnn_backward(dy, dh, w_hh, y, d_in, order, kind)
    in_2d, hid_2d = d_in.flatten(0, 1), d_hid.flatten(0, 1)
    dx = d_in if w_ih is None or not wanted[0] else (in_2d @ w_ih).view(x.shape)
    return [
        dx if wanted[0] else None,
        dh if wanted[1] else None,
        d_c if wanted[2] else None,
        in_2d.t() @ x.reshape(-1, x.shape[2]) if wanted[3] else None,
        _grad_w_hh(d_hid, h0, y, reverse) if wanted[4] else None,
        in_2d.sum(0) if wanted[5] else None,
        hid_2d.sum(0) if wanted[6] else None,
    ]


def sum_of(b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor | None:
    """Returns the sum of the biases that there are."""
    if b_ih is None or b_hh is None:
        return b_hh if b_ih is None else b_ih
    return b_ih + b_hh


def _project(x: Tensor, w_ih: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    """Writes the products of all steps with the input into the first columns of ``out``."""
    rows = out.view(-1, out.shape[2])[:, : x.shape[2] if w_ih is None else len(w_ih)]
    x = x.reshape(-1, x.shape[2])
    if w_ih is None:
        torch.add(x, 0 if bias is None else bias, out=rows)
    elif bias is None:
        torch.mm(x, w_ih.t(), out=rows)
    else:
        torch.addmm(bias, x, w_ih.t(), out=rows)


def _lstm(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    y: Tensor,
    reserve: Tensor,
    order: Iterable[int],
) -> Tensor:
    hidden = h.shape[1]
    bias = sum_of(b_ih, b_hh)
    _project(x, w_ih, bias, reserve)
    for t in order:
        gates = reserve[t]
        gates[:, : 4 * hidden].addmm_(h, w_hh.t())
        gates[:, : 2 * hidden].sigmoid_()
        gates[:, 2 * hidden : 3 * hidden].tanh_()
        gates[:, 3 * hidden : 4 * hidden].sigmoid_()
        i, f, g, o, new_c = gates.split(hidden, 1)
        torch.mul(f, c, out=new_c)
        c = new_c.addcmul_(i, g)
        h = torch.tanh(c, out=y[t]).mul_(o)
    return c


def _lstm_backward(
    dy: Tensor | None,
    dh: Tensor,
    dc: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    reserve: Tensor,
    d_in: Tensor,
    order: range,
) -> tuple[Tensor, Tensor]:
    hidden = c0.shape[1]
    for place in reversed(range(len(order))):
        t = order[place]
        i, f, g, o, c = reserve[t].split(hidden, 1)
        before = reserve[order[place - 1]][:, 4 * hidden :] if place else c0
        dh = dh if dy is None else dh + dy[t]
        tanh_c = c.tanh()
        dc = dc + aten.tanh_backward(dh * o, tanh_c)
        d_i, d_f, d_g, d_o = d_in[t].split(hidden, 1)
        d_i.copy_(aten.sigmoid_backward(dc * g, i))
        d_f.copy_(aten.sigmoid_backward(dc * before, f))
        d_g.copy_(aten.tanh_backward(dc * i, g))
        d_o.copy_(aten.sigmoid_backward(dh * tanh_c, o))
        dc = dc * f
        dh = d_in[t] @ w_hh
    return dh, dc


def _gru(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    y: Tensor,
    reserve: Tensor,
    order: Iterable[int],
) -> None:
    hidden = h.shape[1]
    _project(x, w_ih, b_ih, reserve)
    for t in order:
        r, z, n, of_h = reserve[t].split(hidden, 1)
        product = h @ w_hh.t() if b_hh is None else torch.addmm(b_hh, h, w_hh.t())
        reserve[t][:, : 2 * hidden].add_(product[:, : 2 * hidden]).sigmoid_()
        of_h.copy_(product[:, 2 * hidden :])
        n.addcmul_(r, of_h).tanh_()
        h = torch.sub(h, n, out=y[t]).mul_(z).add_(n)


def _gru_backward(
    dy: Tensor | None,
    dh: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    y: Tensor,
    reserve: Tensor,
    d_in: Tensor,
    d_hid: Tensor,
    order: range,
) -> Tensor:
    hidden = h0.shape[1]
    for place in reversed(range(len(order))):
        t = order[place]
        r, z, n, of_h = reserve[t].split(hidden, 1)
        before = y[order[place - 1]] if place else h0
        dh = dh if dy is None else dh + dy[t]
        d_r, d_z, d_n = d_in[t].split(hidden, 1)
        d_n.copy_(aten.tanh_backward(dh * (1 - z), n))
        d_r.copy_(aten.sigmoid_backward(d_n * of_h, r))
        d_z.copy_(aten.sigmoid_backward(dh * (before - n), z))
        d_hid[t][:, : 2 * hidden] = d_in[t][:, : 2 * hidden]
        torch.mul(d_n, r, out=d_hid[t][:, 2 * hidden :])
        dh = torch.addmm(dh * z, d_hid[t], w_hh)
    return dh


def _rnn(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    y: Tensor,
    order: Iterable[int],
    kind: str,
) -> None:
    bias = sum_of(b_ih, b_hh)
    _project(x, w_ih, bias, y)
    for t in order:
        h = y[t].addmm_(h, w_hh.t())
        h = h.tanh_() if kind == "rnn_tanh" else h.relu_()


def _rnn_backward(
    dy: Tensor | None,
    dh: Tensor,
    w_hh: Tensor,
    y: Tensor,
    d_in: Tensor,
    order: range,
    kind: str,
) -> Tensor:
    for t in reversed(order):
        dh = dh if dy is None else dh + dy[t]
        if kind == "rnn_tanh":
            d_in[t] = aten.tanh_backward(dh, y[t])
        else:
            d_in[t] = aten.threshold_backward(dh, y[t], 0)
        dh = d_in[t] @ w_hh
    return dh


def _grad_w_hh(d_hid: Tensor, h0: Tensor, y: Tensor, reverse: bool) -> Tensor:
    """Returns the sum over the steps of the product with the state before each."""
    if len(y) == 0:
        return d_hid.new_zeros(d_hid.shape[2], h0.shape[1])
    first, later, before = (-1, d_hid[:-1], y[1:]) if reverse else (0, d_hid[1:], y[:-1])
    grad = d_hid[first].t() @ h0
    return grad.addmm_(later.flatten(0, 1).t(), before.flatten(0, 1))
