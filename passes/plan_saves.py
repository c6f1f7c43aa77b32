"""Chooses an encoding for every saved tensor: what is allowed for all its uses, and pays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

import torch

from ..core.options import Options
from ..runtime.codec import Codec
from ..runtime.group_values import GroupValues
from ..runtime.narrow_integers import NarrowIntegers
from ..runtime.pack_bits import PackBits
from ..runtime.plain_values import PLAIN
from ..runtime.quantize_groups import QuantizeGroups
from ..runtime.round_values import RoundValues
from ..runtime.token_rows import TokenRows
from ..runtime.top_values import TopValues
from .classify_saves import ATTENTION, INDEX, MASK, POINTWISE, SIGN, SOFTMAX, WEIGHT_GRADIENT

BY_FEATURE: Final = ("nm", "topk", "rows", "sampled_rows")
"""Families that choose among the features of a token, or among tokens."""
ROUNDING: Final = ("int8", "int4", "mixed")
"""Families that round every activation."""
_SENSITIVE: Final = {SOFTMAX}
QUANTISED: Final = {WEIGHT_GRADIENT, ATTENTION, POINTWISE, SOFTMAX, SIGN}
"""Uses that bear an error everywhere; signs are kept apart."""


@dataclasses.dataclass(frozen=True)
class SaveFacts:
    """What is known of a saved tensor."""

    uses: tuple[str, ...]
    """As `uses_of` tells them."""
    dtype: torch.dtype
    """Its type."""
    row: int
    """Elements of a row."""
    tokens: int | None
    """Rows of a matrix, None for tensors of other shapes or where the number is not fixed."""
    largest: int | None = None
    """Largest value of an index, None where it is not known."""
    sign: bool = False
    """Whether it is never negative and only compared with 0."""
    deferred: float | None = None
    """The rate at which a deferred dropout drops it, None where there is none."""


def exact_codec(facts: SaveFacts) -> Codec | None:
    """Returns the encoding that loses nothing, None where there is none."""
    if facts.uses == (MASK,):
        return PackBits()
    if facts.uses == (INDEX,) and facts.largest is not None:
        codec = NarrowIntegers(facts.largest)
        return codec if codec.refusal(facts.dtype, facts.row) is None else None
    return None


def lossy_codecs(facts: SaveFacts, options: Options) -> list[Codec | TokenRows]:
    """Returns the encodings that the options and all uses allow, by rising error.

    The signs that a tensor is compared for besides are kept apart, exactly.
    """
    if facts.deferred is not None:
        sparse = options.saves in ("nm", "rows", "sampled_rows")
        family = options.saves if sparse else "topk"
        options = dataclasses.replace(options, saves=family, save_density=1 - facts.deferred)
    if options.saves in ("off", "exact") or not set(facts.uses) <= QUANTISED:
        return []
    # A row contracted over tokens alone may lose features; anything else must keep them all.
    weight_gradient = set(facts.uses) - {SIGN} == {WEIGHT_GRADIENT}
    sensitive = bool(_SENSITIVE & set(facts.uses))
    found: Sequence[Codec | TokenRows]
    if options.saves in ROUNDING:
        found = _quantised(facts, options, weight_gradient, sensitive)
    elif not weight_gradient:
        found = []
    elif options.saves in ("nm", "topk"):
        values = _values(options.save_bits, facts.dtype)
        density = _density(options)
        if options.saves == "nm":
            found = [GroupValues(max(1, round(16 * density)), 16, values)]
        else:
            found = [TopValues(max(1, round(facts.row * density)), values)]
    elif facts.tokens is not None:
        kept = max(1, round(facts.tokens * _density(options)))
        found = [TokenRows(kept, facts.tokens, options.saves == "sampled_rows")]
    else:
        found = []
    return list(found)


def _quantised(
    facts: SaveFacts, options: Options, weight_gradient: bool, sensitive: bool
) -> list[Codec]:
    int8, int4 = (QuantizeGroups(bits, sign=facts.sign) for bits in (8, 4))
    if options.saves == "int8" or sensitive:
        return [int8]
    if options.saves == "int4":
        return [int4]
    codecs: list[Codec] = [int8, int4]
    if weight_gradient:
        # Below 4 bits an element: measured, the next on the frontier of bytes against error.
        codecs += [GroupValues(4, 16, QuantizeGroups(8)), GroupValues(4, 16, QuantizeGroups(4))]
    return codecs


def _density(options: Options) -> float:
    return 0.25 if options.save_density is None else options.save_density


def _values(bits: int | None, dtype: torch.dtype) -> Codec:
    if bits is None or (bits == 16 and dtype.itemsize == 2):
        return PLAIN
    return RoundValues() if bits == 16 else QuantizeGroups(bits)
