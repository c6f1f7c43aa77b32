"""The op of one recurrent layer in one direction, with its exact backward.

Both are single nodes of a joint graph, in which the contraction over input features can be cut.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.errors import DerivativeError
from . import rnn_cudnn, rnn_loop, rnn_onednn, rnn_packed

# The schemas name what the rules of the support analysis look up.
_WEIGHTS = "Tensor x, Tensor h0, Tensor? c0, Tensor? w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh"
_RESULTS = "Tensor y, Tensor h, Tensor c, Tensor reserve, Tensor extra, Tensor width"


def choose_kernel(kind: str, x: Tensor, hidden: int, *, projected: bool = False) -> str:
    """Returns what runs a layer best: ``packed``, ``onednn``, ``cudnn`` or ``loop``.

    Args:
        kind: ``lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu``.
        x: ``[T, N, I]``, as the layer will get it; may be fake, with symbolic sizes.
        hidden: H.
        projected: whether it will get the product of x with the weight in place of x: ``packed``
            and ``loop`` alone can take that.
    """
    if projected:
        return "packed" if rnn_packed.supports(kind, x, hidden) else "loop"
    if rnn_packed.pays(x.shape[1], hidden) and rnn_packed.supports(kind, x, hidden):
        return "packed"
    if rnn_onednn.supports(kind, x, hidden):
        return "onednn"
    return "cudnn" if rnn_cudnn.supports(x) else "loop"


def run_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    kind: str,
    reverse: bool,
    kernel: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs one layer in one direction: the definition of the op.

    Args:
        x: ``[T, N, I]``, T steps of N samples with I features, any floating dtype.
        h0: ``[N, H]``, the first state.
        c0: ``[N, H]``, the first cell state of an LSTM.
        w_ih: ``[G, I]``, where G is 4H for an LSTM, 3H for a GRU, and else H. None where x is
            ``[T, N, G]``, the product with it already: for ``packed`` and ``loop``.
        w_hh: ``[G, H]``.
        b_ih: ``[G]``, or None as the next.
        b_hh: ``[G]``.
        kind: ``lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu``, as torch defines them.
        reverse: whether the last step comes first; step t of y belongs to step t of x.
        kernel: what computes it, see `choose_kernel`.
        save: whether there will be a backward. Autograd sets it where there is one.

    Returns:
        y: ``[T, N, H]``.
        h: ``[N, H]``, the last state.
        c: ``[N, H]``, the last cell state of an LSTM, else ``[0]``.
        reserve: what backward needs. For ``loop`` and ``packed`` ``[T, N, R]`` with the gates. The
            other two know the size of theirs only when they run: it is a view, of a size that the
            graph can know, of memory that is larger.
        extra: for ``packed`` the cell states ``[T, N, H]``; for ``cudnn`` such a view of the
            weights as it packed them; for ``onednn`` int64 ``[2]``, how large that memory is and
            where, which tells a copy from it; else ``[0]``.
        width: ``[I, 0]``, no memory at all, but backward learns from it what I was in the forward.

    Raises:
        ValueError: the kernel is none of the four.
    """
    extra = x.new_empty(0)
    if kernel == "loop":
        y, h, c, reserve = rnn_loop.forward(x, h0, c0, w_ih, w_hh, b_ih, b_hh, kind, reverse)
    elif kernel == "packed":
        assert c0 is not None
        y, h, c, reserve, extra = rnn_packed.forward(x, h0, c0, w_ih, w_hh, b_ih, b_hh, reverse)
    elif kernel == "onednn":
        assert c0 is not None
        assert w_ih is not None
        y, h, c, reserve = rnn_onednn.forward(x, h0, c0, w_ih, w_hh, b_ih, b_hh, reverse, save)
    elif kernel == "cudnn":
        assert w_ih is not None
        y, h, c, reserve, extra = rnn_cudnn.forward(
            x, h0, c0, w_ih, w_hh, b_ih, b_hh, kind, reverse, save
        )
    else:
        known = "'packed', 'onednn', 'cudnn' or 'loop'"
        raise ValueError(f"Kernel {kernel!r} is not known. Expected {known}.")
    if not save:
        reserve, extra = x.new_empty(0), x.new_empty(0)
    elif kernel == "onednn":
        reserve = _shown(reserve, rnn_onednn.workspace_bytes(x, h0.shape[1]))
        extra = torch.tensor(_place(reserve))
    elif kernel == "cudnn":
        reserve, extra = _shown(reserve, 1), _shown(extra, 1)
    return y, h, c, reserve, extra, x.new_empty(x.shape[2], 0)


def run_layer_backward(
    dy: Tensor | None,
    dh: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    y: Tensor,
    c: Tensor,
    reserve: Tensor,
    extra: Tensor,
    width: Tensor,
    kind: str,
    reverse: bool,
    kernel: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the exact gradients of `run_layer`: the definition of the op.

    Args:
        dy: ``[T, N, H]``, gradient of y; None for zero, as the next two.
        dh: ``[N, H]``, gradient of h.
        dc: ``[N, H]``, gradient of c.
        x: as given to `run_layer`, as the next six.
        h0: see there.
        c0: see there.
        w_ih: see there.
        w_hh: see there.
        b_ih: see there.
        b_hh: see there.
        y: what it returned, as the next four.
        c: see there.
        reserve: see there.
        extra: see there.
        width: see there.
        kind: as given to it, as the next two.
        reverse: see there.
        kernel: see there.
        wanted: which of the seven gradients are wanted.

    Returns:
        Gradients of x, h0, c0, w_ih, w_hh, b_ih and b_hh, each of the shape of what it belongs
        to; ``[0]`` for those not wanted.
    """
    if kernel == "loop":
        args = (dy, dh, dc, x, h0, c0, w_ih, w_hh, y, reserve, kind, reverse, wanted)
        grads = rnn_loop.backward(*args)
    elif kernel == "packed":
        assert c0 is not None
        given = (dy, dh, dc, x, h0, c0, w_ih, w_hh, y, reserve, extra, reverse, wanted)
        grads = rnn_packed.backward(*given)
    else:
        assert w_ih is not None
        if _is_lost(reserve, extra, kernel) or len(width) < x.shape[2]:
            # A copy of a view has not what lies behind it. And of an input whose zeros the forward
            # left out, the kernel kept the rest alone. It is rare: run the forward again.
            again = (x, h0, c0, w_ih, w_hh, b_ih, b_hh, kind, reverse, kernel, True)
            y, _, c, reserve, extra, width = run_layer(*again)
        assert len(width) == x.shape[2], f"{len(width)} features forward, {x.shape[2]} backward"
        reserve = _whole(reserve)
        if kernel == "onednn":
            assert c0 is not None
            grads = list(
                rnn_onednn.backward(
                    *(dy, dh, dc, x, h0, c0, w_ih, w_hh, b_ih, b_hh, y, c, reserve, reverse)
                )
            )
        else:
            grads = rnn_cudnn.backward(
                *(dy, dh, dc, x, h0, c0, w_ih, w_hh, b_ih, b_hh, y, reserve),
                *(_whole(extra).view(x.dtype), kind, reverse, wanted),
            )
    dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh = (
        grad.contiguous() if grad is not None and want else x.new_empty(0)
        for grad, want in zip(grads, wanted, strict=True)
    )
    return dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh


def _shown(memory: Tensor, size: int) -> Tensor:
    """Returns a view of ``size`` bytes of what is always more."""
    memory = memory.view(torch.uint8).flatten()
    if memory.numel() <= size:
        larger = memory.new_empty(size + 1)
        larger[: memory.numel()] = memory
        memory = larger
    return memory[:size]


def _is_lost(reserve: Tensor, extra: Tensor, kernel: str) -> bool:
    """Returns whether only what can be seen of the memory is left.

    oneDNN takes an address alone and would read on behind a copy; cuDNN takes the size as well,
    and to ask for a number on the device would mean to wait for it.
    """
    if kernel == "onednn":
        return _place(reserve) != extra.tolist()
    return any(view.untyped_storage().nbytes() <= view.numel() for view in (reserve, extra))


def _place(view: Tensor) -> list[int]:
    return [view.untyped_storage().nbytes(), view.data_ptr()]


def _whole(view: Tensor) -> Tensor:
    storage = view.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=view.device).set_(storage)


def _fake_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor | None,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    kind: str,
    reverse: bool,
    kernel: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (steps, samples, features), hidden = x.shape, h0.shape[1]
    cell = x.new_empty(samples, hidden) if kind == "lstm" else x.new_empty(0)
    reserve, extra = x.new_empty(0), x.new_empty(0)
    if save and kernel == "loop":
        reserve = x.new_empty(steps, samples, rnn_loop.RESERVED[kind] * hidden)
    elif save and kernel == "packed":
        reserve, extra = (
            x.new_empty(steps, samples, 4 * hidden),
            x.new_empty(steps, samples, hidden),
        )
    elif save and kernel == "onednn":
        reserve = x.new_empty(rnn_onednn.workspace_bytes(x, hidden), dtype=torch.uint8)
        extra = x.new_empty(2, dtype=torch.int64)
    elif save:
        reserve, extra = (x.new_empty(1, dtype=torch.uint8) for _ in range(2))
    y, h = x.new_empty(steps, samples, hidden), x.new_empty(samples, hidden)
    return y, h, cell, reserve, extra, x.new_empty(features, 0)


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    given, wanted = args[3:10], args[-1]
    x: Tensor = given[0]
    return tuple(
        x.new_empty(tensor.shape) if want else x.new_empty(0)
        for tensor, want in zip(given, wanted, strict=True)
    )


class _RnnLayer(torch.autograd.Function):
    """Puts the two ops together, so that a joint graph has both as they are."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *tensors, kind, reverse, kernel, _ = args
        with torch._C._AutoDispatchBelowAutograd():
            results: tuple[Tensor, ...] = rnn_layer(*tensors, kind, reverse, kernel, True)
        y, _, c, *reserved = results
        ctx.save_for_backward(*tensors, y, c, *reserved)
        ctx.call = (kind, reverse, kernel)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*reserved, *([] if kind == "lstm" else [c]))
        return results

    @staticmethod
    def backward(ctx: Any, dy: Any, dh: Any, dc: Any, *_: Any) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[:7])
        grads = rnn_layer_backward(dy, dh, dc, *ctx.saved_tensors, *ctx.call, wanted)
        given = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
        return (*given, None, None, None, None)


class _RnnLayerBackward(torch.autograd.Function):
    """Raises where a second derivative is taken, and not before."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return rnn_layer_backward(*args)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        raise DerivativeError("ardd::rnn_layer")


def _once_differentiable(*args: Any) -> tuple[Tensor, ...]:
    tensors = (arg for arg in args if isinstance(arg, Tensor))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _RnnLayerBackward.apply(*args)  # type: ignore[no-any-return,no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return rnn_layer_backward(*args)  # type: ignore[no-any-return]


def _differentiable(*args: Any) -> tuple[Tensor, ...]:
    tensors = (arg for arg in args if isinstance(arg, Tensor))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _RnnLayer.apply(*args)  # type: ignore[no-any-return,no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return rnn_layer(*args)  # type: ignore[no-any-return]


_library: Any = torch.library  # untyped
_LIB = _library.Library("ardd", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_contiguous_strides)
_LIB.define(
    f"rnn_layer({_WEIGHTS}, str kind, bool reverse, str kernel, bool save) -> ({_RESULTS})",
    tags=_TAGS,
)
_LIB.define(
    f"rnn_layer_backward(Tensor? dy, Tensor? dh, Tensor? dc, {_WEIGHTS}, Tensor y, Tensor c,"
    " Tensor reserve, Tensor extra, Tensor width, str kind, bool reverse, str kernel,"
    " bool[7] wanted) -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor dw_ih, Tensor dw_hh,"
    " Tensor db_ih, Tensor db_hh)",
    tags=_TAGS,
)
_LIB.impl("rnn_layer", run_layer, "CompositeExplicitAutograd")
_LIB.impl("rnn_layer_backward", run_layer_backward, "CompositeExplicitAutograd")
_LIB.impl("rnn_layer", _differentiable, "Autograd")
_LIB.impl("rnn_layer_backward", _once_differentiable, "Autograd")
_library.register_fake("ardd::rnn_layer", _fake_layer, lib=_LIB)
_library.register_fake("ardd::rnn_layer_backward", _fake_backward, lib=_LIB)

rnn_layer = torch.ops.ardd.rnn_layer.default
"""``rnn_layer(...) -> (y, h, c, reserve, extra, width)``, see ``run_layer``."""
rnn_layer_backward = torch.ops.ardd.rnn_layer_backward.default
"""``rnn_layer_backward(...) -> (dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh)``."""
