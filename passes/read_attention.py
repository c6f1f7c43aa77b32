"""Reads the arguments of an attention call, where they are such that it can be written out."""

from __future__ import annotations

import dataclasses
from typing import Final

import torch
from torch import fx

from .attention_calls import AttentionCall, is_plain
from .dynamo_nodes import argument, is_floating, tensor_of

_HALVES: Final = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Attention:
    """The arguments of a call that can be written out."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    p: float
    is_causal: bool
    scale: float | None
    repeats: tuple[int, int]
    """How often each head of key and value is repeated."""
    dtype: torch.dtype
    """Of the arguments, after autocast, and of the result."""
    wide: torch.dtype
    """What is computed in."""
    cast: bool
    """Whether autocast converts the arguments."""


def read_attention(call: AttentionCall) -> Attention | None:
    """Returns the arguments, None where the call has to stay."""
    node = call.node
    query, key, value = (argument(node, i, n) for i, n in enumerate(("query", "key", "value")))
    mask = argument(node, 3, "attn_mask")
    p = argument(node, 4, "dropout_p", 0.0)
    is_causal = argument(node, 5, "is_causal", False)
    scale, gqa = node.kwargs.get("scale"), node.kwargs.get("enable_gqa", False)
    if not isinstance(p, (int, float)) or not 0 < p < 1 or not isinstance(is_causal, bool):
        return None
    if not (scale is None or isinstance(scale, (int, float))) or not isinstance(gqa, bool):
        return None
    if not all(is_plain(x, "cpu") and is_floating(x) for x in (query, key, value, node)):
        return None
    values = [x.meta["example_value"] for x in (query, key, value)]
    heads = _repeats(*(x.shape for x in values)) if gqa else (1, 1)
    if heads is None or min(x.dim() for x in values) < 2:
        return None
    dtypes = {_converted(x.dtype, call) for x in values}
    if len(dtypes) > 1:
        return None
    (dtype,) = dtypes
    reduced = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    wide = torch.float32 if dtype in _HALVES and not reduced else dtype
    if mask is not None and (is_causal or not _is_mask(mask, dtype, wide, call)):
        return None
    return Attention(
        query=query,
        key=key,
        value=value,
        mask=mask,
        p=float(p),
        is_causal=is_causal,
        scale=scale,
        repeats=heads,
        dtype=dtype,
        wide=wide,
        cast=call.autocast.enabled,
    )


def _converted(dtype: torch.dtype, call: AttentionCall) -> torch.dtype:
    """Returns what autocast makes of an argument."""
    casts = call.autocast.enabled and dtype.is_floating_point and dtype != torch.float64
    return call.autocast.dtype if casts else dtype


def _is_mask(mask: object, dtype: torch.dtype, wide: torch.dtype, call: AttentionCall) -> bool:
    """Tells whether torch takes a mask, without turning the scores into another dtype."""
    value = tensor_of(mask)
    if value is None or not is_plain(mask, "cpu"):
        return False
    given = _converted(value.dtype, call)
    if given not in (torch.bool, torch.float32, dtype):
        return False
    return given == torch.bool or torch.promote_types(given, wide) == wide


def _repeats(query: torch.Size, key: torch.Size, value: torch.Size) -> tuple[int, int] | None:
    """Returns how often the heads of key and value are repeated, None if that is not known."""
    if min(len(query), len(key), len(value)) < 3:
        return None
    heads, *fewer = query[-3], key[-3], value[-3]
    if any(type(n) is not int or n < 1 for n in (heads, *fewer)):
        return None
    if any(heads % n for n in fewer):
        return None
    return heads // fewer[0], heads // fewer[1]
