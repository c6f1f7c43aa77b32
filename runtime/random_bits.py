"""Random bits by counter: a hash of a seed and the index of an element, in plain int32 ops.

    bits[i] = triple32(i; key0, key1),   seed = (key0, key1)

``triple32`` is the three-round 32-bit finaliser of Wellons, "hash-prospector", Unlicense,
https://github.com/skeeto/hash-prospector: of its family the one with the least avalanche bias,
0.0209 on its author's scale. It is unkeyed; here one half of the seed enters before the first round
and the other after it, as in the iterated construction of Even and Mansour 1997, "A construction of
a cipher from a single pseudorandom permutation", https://doi.org/10.1007/s001459900025. So the
masks of two drawn seeds are no windows of one sequence, as they would be if a seed merely shifted
the index. Seeds have to be random, since those with an equal half are related: with equal second
halves one mask is the other with its index xor-ed, and one flipped bit of the second half leaves
correlations of up to 2.4 %. Among drawn seeds a pair is so with a probability of 2**-31.

Counters instead of a state are the idea of Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3", https://doi.org/10.1145/2063384.2063405; their Philox costs three times as much in 32-bit
vector code as all of this.

Shift, xor and product of int32 mean the same on every backend: a product wraps, a right shift is
arithmetic, and the sign bits that it brings in are masked off. For a given seed the hash is a
permutation of the 32-bit integers, so ``bits >= threshold`` keeps a share that is exact to 2**-32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Final

import torch
from torch import Tensor

aten, prims = torch.ops.aten, torch.ops.prims

Op = Callable[..., Any]
"""``op(target, *args, **kwargs)``: runs an op, or adds it to a graph."""

LANES: Final = 64
"""Elements of a row that share all but the low bits of their index."""


def _int32(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


# (shift, multiplier) of the rounds, and the last shift.
_ROUNDS: Final = (
    (17, _int32(0xED5AD4BB)),
    (11, _int32(0xAC4C1B51)),
    (15, _int32(0x31848BAB)),
)
_LAST_SHIFT: Final = 14
_HIGH_WORD: Final = _int32(0x9E3779B9)  # 2**32 over the golden ratio: odd, bits well spread


def run(target: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs an op: the `Op` of eager code, where prims are Python and 20 times slower than ATen."""
    if target is prims.iota.default:
        end, step = int(args[0]) * kwargs["step"], kwargs["step"]
        return torch.arange(0, end, step, dtype=kwargs["dtype"], device=kwargs["device"])
    if target is prims.convert_element_type.default:
        return args[0].to(args[1])
    return target(*args, **kwargs)


def threshold_of(p: float) -> int:
    """Returns the least int32 that stays, of bits that are dropped with probability p.

    Args:
        p: Probability of a zero, in ``[0, 1]``; rounded to a multiple of 2**-32.
    """
    return min(round(p * 2**32), 2**32 - 1) - 2**31


def bits_at(op: Op, index: Any, seed: Any, high: Any = None) -> Any:
    """Hashes indices.

    Args:
        op: Runs an op, or adds it to a graph.
        index: int32, any shape: the low words of the indices.
        seed: int32 ``[2]``.
        high: int32, broadcast against ``index``: the high words, None where all are 0.

    Returns:
        int32, the shape of ``index``: uniform over all 32-bit integers.
    """
    keys = [op(aten.select.int, seed, 0, half) for half in (0, 1)]
    if high is not None:
        keys[1] = op(aten.bitwise_xor.Tensor, op(aten.mul.Tensor, high, _HIGH_WORD), keys[1])
    x = op(aten.bitwise_xor.Tensor, index, keys[0])
    for number, (shift, multiplier) in enumerate(_ROUNDS):
        if number == 1:
            x = op(aten.bitwise_xor.Tensor, x, keys[1])
        x = op(aten.mul.Tensor, _xor_shift(op, x, shift), multiplier)
    # Without this C++ may take the sign of the last product for that of its factor at p = 0.5,
    # since products of signed integers are assumed not to overflow.
    return _xor_shift(op, x, _LAST_SHIFT)


def _xor_shift(op: Op, x: Any, shift: int) -> Any:
    high = op(aten.__rshift__.Scalar, x, shift)
    return op(aten.bitwise_xor.Tensor, x, op(aten.bitwise_and.Scalar, high, 2 ** (32 - shift) - 1))


def bits_in(
    op: Op,
    seed: Any,
    sizes: Sequence[Any],
    count: Callable[[Sequence[Any]], Any],
    device: torch.device,
    *,
    by_lanes: bool = False,
    wide: bool = False,
) -> Any:
    """Hashes the place of every element in row-major order, whatever the order of memory.

    The low word of an index is that of the element. The high word is that of the row's start, a row
    being the last dimension, so that it costs nothing by element; where there is only one dimension
    it is the element's own. All ways to count give the same bits. They differ in what a vector unit
    has to do: by lanes, a vector of indices is a number and a constant; else it is built lane by
    lane.

    Args:
        op: Runs an op, or adds it to a graph.
        seed: int32 ``[2]``.
        sizes: Shape of the result: numbers, or what ``op`` takes for one.
        count: Returns the product of sizes.
        device: Where the result lives.
        by_lanes: Count by lanes. `LANES` has to divide the number of elements, and the last size
            where ``wide``.
        wide: Whether there may be more than 2**31 elements.

    Returns:
        int32 of shape ``sizes``.
    """

    def iota(length: Any, step: int = 1, dtype: torch.dtype = torch.int32) -> Any:
        options = {"dtype": dtype, "device": device, "requires_grad": False}
        return op(prims.iota.default, length, start=0, step=step, **options)

    def words(index: Any) -> tuple[Any, Any]:
        high = op(aten.__rshift__.Scalar, index, 32)
        convert = prims.convert_element_type.default
        return op(convert, index, torch.int32), op(convert, high, torch.int32)

    high = None
    if not wide and not by_lanes:
        low = iota(count(sizes))
    elif not wide:
        rows = iota(count([*sizes, Fraction(1, LANES)]), LANES)
        low = op(aten.bitwise_xor.Tensor, op(aten.unsqueeze.default, rows, 1), iota(LANES))
    elif len(sizes) < 2:
        low, high = words(iota(count(sizes), dtype=torch.int64))
    else:
        starts = op(aten.mul.Tensor, iota(count(sizes[:-1]), dtype=torch.int64), sizes[-1])
        low, high = words(op(aten.unsqueeze.default, starts, 1))
        if by_lanes:
            low, high = (op(aten.unsqueeze.default, word, 2) for word in (low, high))
            columns = op(aten.unsqueeze.default, iota(sizes[-1] // LANES, LANES), 1)
            low = op(aten.bitwise_xor.Tensor, op(aten.add.Tensor, low, columns), iota(LANES))
        else:
            low = op(aten.add.Tensor, low, iota(sizes[-1]))
    return op(aten.view.default, bits_at(op, low, seed, high), sizes)


def bits_like(seed: Tensor, sizes: Sequence[int]) -> Tensor:
    """Returns the bits of a tensor: int32 of shape ``sizes``, on the device of ``seed``."""
    wide = math.prod(sizes) > 2**31
    return bits_in(run, seed, sizes, math.prod, seed.device, wide=wide)  # type: ignore[no-any-return]


def below(bits: Tensor, n: int) -> Tensor:
    """Returns integers uniform over ``range(n)``, int64, up to a bias of n * 2**-32."""
    return ((bits.long() & 2**32 - 1) * n) >> 32
