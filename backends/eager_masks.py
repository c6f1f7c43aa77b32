"""Eager code that drops what the compiled model drops, to compare the two step by step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..runtime.draw_seeds import draw_seeds
from ..runtime.dropout_mask import scale_of
from ..runtime.random_bits import bits_like, threshold_of

# name -> the dimensions that share a draw, given the number of dimensions
_DROPOUTS: Final[Mapping[Any, Callable[[int], Sequence[int]]]] = {
    **dict.fromkeys((F.dropout, torch.dropout, torch.dropout_), lambda rank: ()),
    **dict.fromkeys((F.dropout2d, torch.feature_dropout), lambda rank: range(2, rank)),
    torch.feature_dropout_: lambda rank: range(2, rank),
    F.dropout1d: lambda rank: (rank - 1,),
    F.dropout3d: lambda rank: range(2 if rank == 5 else 1, rank),
}
_INPLACE: Final = (torch.dropout_, torch.feature_dropout_)
_RNNS: Final = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


@contextmanager
def eager_masks() -> Iterator[None]:
    """Lets eager code draw the masks that a model compiled with ardd draws.

    Within the context, on the thread that opened it, every dropout of torch takes its mask from one
    seed drawn by torch's default generator, as a compiled graph does: from the same state of the
    generator, eager and compiled code drop the same elements, step after step::

        torch.manual_seed(0)
        with ardd.eager_masks():
            loss = model(x).sum()
        torch.manual_seed(0)
        same = compiled(x).sum()

    This holds for a model whose dropouts stay random, as all do with ``{"pattern": "random"}``;
    where one is structured, its mask is another and those of the others are the same. Covered are
    ``F.dropout``, ``F.dropout1d`` to ``3d``, modules that call them, attention with ``dropout_p``
    on a CPU, and the dropout between the layers of ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``. Masks
    made by hand are drawn as the code says.
    """
    with _EagerMasks():
        yield


class _EagerMasks(TorchFunctionMode):
    """Replaces dropouts, and runs everything else as it is."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return _dropout(func, *args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            # Inside it the mode is off, and so what it calls is looked at instead.
            with (
                _patched(F, "dropout", _dropout_in),
                _patched(F, "scaled_dot_product_attention", _attention),
            ):
                return func(*args, **kwargs)
        if func in _RNNS:
            return _rnn(func, *args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def _patched(module: Any, name: str, ours: Callable[..., Any]) -> Iterator[None]:
    """Replaces a function of a module for calls from this thread."""
    theirs, thread = getattr(module, name), threading.get_ident()

    def function(*args: Any, **kwargs: Any) -> Any:
        return (ours if threading.get_ident() == thread else theirs)(*args, **kwargs)

    with mock.patch.object(module, name, function):
        yield


def _dropout_in(*args: Any, **kwargs: Any) -> Tensor:
    return _dropout(F.dropout, *args, **kwargs)


def _dropout(
    func: Any,
    input: Tensor,  # noqa: A002  # as torch names it
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    train: bool | None = None,
) -> Tensor:
    on = training if train is None else train
    if not on or not 0 < p < 1:
        return func(input, p, on, inplace) if func not in _TORCH else func(input, p, on)  # type: ignore[no-any-return]
    rank = input.dim()
    shared = _DROPOUTS[func](rank)
    sizes = [1 if dim in shared else size for dim, size in enumerate(input.shape)]
    keep, scale = _keep(sizes, p, input.device), scale_of(p, 1.0)
    if inplace or func in _INPLACE:
        return input.mul_(keep).mul_(scale)
    return input * keep * scale


_TORCH: Final = (torch.dropout, torch.dropout_, torch.feature_dropout, torch.feature_dropout_)


def _keep(sizes: Sequence[int], p: float, device: torch.device) -> Tensor:
    """Draws a seed and returns what it keeps: bool of shape ``sizes``."""
    return bits_like(draw_seeds(1, device)[0], sizes) >= threshold_of(p)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if query.device.type != "cpu" or not 0 < dropout_p < 1:  # a fused kernel drops by itself
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    _, probabilities = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, 0.0, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )
    if enable_gqa:
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    keep = _keep(probabilities.shape, dropout_p, query.device)
    dropped = probabilities * keep * scale_of(dropout_p, 1.0)
    return dropped @ value  # type: ignore[no-any-return]


def _rnn(func: Any, *args: Any) -> Any:
    """Runs an RNN layer by layer, with dropout in between."""
    packed = isinstance(args[3], (list, tuple))
    data, *sizes = args[:2] if packed else args[:1]
    hx, params, has_biases, layers, p, train, bidirectional, *order = args[len(sizes) + 1 :]
    if not train or not 0 < p < 1 or layers < 2:
        return func(*args)
    each, directions = len(params) // layers, 2 if bidirectional else 1
    is_lstm = func is torch.lstm
    states, lasts = (hx if is_lstm else [hx]), []
    for layer in range(layers):
        own = [s[layer * directions : (layer + 1) * directions] for s in states]
        weights = params[layer * each : (layer + 1) * each]
        data, *last = func(
            data,
            *sizes,
            tuple(own) if is_lstm else own[0],
            weights,
            *(has_biases, 1, 0.0, train, bidirectional, *order),
        )
        lasts.append(last)
        if layer < layers - 1:
            turned = bool(order and order[0])
            keep = data.transpose(0, 1) if turned else data
            keep = _keep(keep.shape, p, data.device)
            data = data * (keep.transpose(0, 1) if turned else keep) * scale_of(p, 1.0)
    return (data, *(torch.cat(of_layers) for of_layers in zip(*lasts, strict=True)))
