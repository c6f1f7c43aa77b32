"""Every encoding of a saved tensor keeps its bound, its bytes and its word about specials."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ardd
from ardd.runtime.codec import FLOATS, Codec
from ardd.runtime.group_values import GroupValues
from ardd.runtime.narrow_integers import NarrowIntegers
from ardd.runtime.pack_bits import PackBits
from ardd.runtime.plain_values import PLAIN
from ardd.runtime.quantize_groups import QuantizeGroups
from ardd.runtime.round_values import RoundValues
from ardd.runtime.token_rows import TokenRows, select_rows
from ardd.runtime.top_values import TopValues

VALUES: list[Codec] = [PLAIN, RoundValues(), QuantizeGroups(8), QuantizeGroups(4)]
SIGNED: list[Codec] = [QuantizeGroups(8, sign=True), QuantizeGroups(4, sign=True)]
DITHERED: list[Codec] = [QuantizeGroups(8), QuantizeGroups(4), *SIGNED]
GROUPED: list[Codec] = [GroupValues(n, m, v) for n, m in ((2, 8), (4, 16), (8, 16)) for v in VALUES]
ODD: list[Codec] = [GroupValues(1, 16), GroupValues(3, 16)]
TOP: list[Codec] = [TopValues(1), *(TopValues(5, v) for v in VALUES)]
LOSSY: list[Codec] = [*DITHERED, *GROUPED, *ODD, *TOP, RoundValues()]
EXACT: list[Codec] = [PackBits(), NarrowIntegers(255), NarrowIntegers(256), NarrowIntegers(40_000)]
SELECTING: list[Codec] = [*GROUPED, *ODD, *TOP]

FEW: list[Codec] = [*DITHERED, GroupValues(4, 16), GroupValues(4, 16, QuantizeGroups(8))]
FEW += [TopValues(5), TopValues(80, QuantizeGroups(4)), RoundValues()]

each_lossy = pytest.mark.parametrize("codec", LOSSY, ids=lambda codec: codec.name)
each_exact = pytest.mark.parametrize("codec", EXACT, ids=lambda c: f"{c.name}-{vars(c)}")
each_of_few = pytest.mark.parametrize("codec", FEW, ids=lambda codec: codec.name)
each_codec = pytest.mark.parametrize("codec", [*EXACT, *LOSSY], ids=lambda c: f"{c.name}-{vars(c)}")


def draws_no_dither(codec: Codec) -> bool:
    return "int" not in codec.name or codec.exact


# ---- what is encoded ---------------------------------------------------------------------


def ordinary(shape: Sequence[int]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def shifted(shape: Sequence[int]) -> Tensor:
    return 100 + torch.randn(shape, dtype=torch.float64)


def ties(shape: Sequence[int]) -> Tensor:
    return torch.randint(-2, 3, shape).double()


def zeros(shape: Sequence[int]) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def sparse(shape: Sequence[int]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64) * (torch.rand(shape) < 0.1)


def scales(shape: Sequence[int]) -> Tensor:
    """Magnitudes that half precision still holds."""
    return torch.randn(shape, dtype=torch.float64) * 10 ** torch.empty(shape).uniform_(-3, 3)


def denormals(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.randint(-99, 100, shape).double() * torch.finfo(dtype).smallest_normal / 128


def huge(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=torch.float64).uniform_(-1, 1) * torch.finfo(dtype).max


KINDS = [ordinary, shifted, ties, zeros, sparse, scales]
LEADS = st.lists(st.integers(0, 3), max_size=3)
ROWS = st.integers(5, 200)  # all that the largest `kept` here allows


@st.composite
def tensors(draw: st.DrawFn, rows: st.SearchStrategy[int] = ROWS) -> Tensor:
    """Floating tensors of all shapes, types and strides."""
    make, dtype = draw(st.sampled_from(KINDS)), draw(st.sampled_from(FLOATS))
    x = make([*draw(LEADS), draw(rows)]).to(dtype)
    return strided(x, draw(st.booleans()))


def strided(x: Tensor, apart: bool) -> Tensor:
    """Returns the same tensor, its elements apart in memory if wanted."""
    if not apart:
        return x
    wide = torch.full((*x.shape[::-1], 2), 7, dtype=x.dtype)
    wide[..., 0] = x.permute(*reversed(range(x.dim())))
    return wide[..., 0].permute(*reversed(range(x.dim())))


def round_trip(codec: Codec, x: Tensor) -> Tensor:
    return codec.decode(codec.encode(x), x.shape[-1], x.dtype)


def unsupported(codec: Codec, dtype: torch.dtype) -> bool:
    return isinstance(codec, RoundValues) and codec.refusal(dtype, 256) is not None


def check_bound(codec: Codec, x: Tensor) -> None:
    decoded, bound = round_trip(codec, x), codec.error_bound(x)
    assert (decoded.shape, decoded.dtype) == (x.shape, x.dtype)
    error = (decoded.double() - x.double()).abs()
    assert not bound.isnan().any()
    assert (error <= bound).all(), f"{error.max()}, bounds up to {bound.max()}"


# ---- bounds and bytes --------------------------------------------------------------------


@each_lossy
@settings(max_examples=40)
@given(x=tensors())
def test_error_is_bounded(codec: Codec, x: Tensor) -> None:
    check_bound(codec, x.abs() if codec in SIGNED else x)


@each_of_few
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_error_of_denormals_is_bounded(codec: Codec, dtype: torch.dtype) -> None:
    if unsupported(codec, dtype):
        return
    x = denormals((64, 130), dtype).to(dtype)
    check_bound(codec, x.abs() if codec in SIGNED else x)
    check_bound(codec, x.abs() * 9)


@each_of_few
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_error_of_huge_values_is_bounded(codec: Codec, dtype: torch.dtype) -> None:
    """Finite values within a bound that is finite, up to the largest that the type has."""
    if unsupported(codec, dtype):
        return
    x = huge((64, 130), dtype).to(dtype)
    x[..., ::16] = torch.finfo(dtype).max
    check_bound(codec, x.abs() if codec in SIGNED else x)


@each_lossy
@settings(max_examples=20)
@given(x=tensors())
def test_bytes_are_those_of_the_formula(codec: Codec, x: Tensor) -> None:
    check_bytes(codec, x.abs())


@each_exact
@settings(max_examples=30)
@given(lead=LEADS, row=st.integers(0, 200), apart=st.booleans())
def test_exact_ones_are_exact(codec: Codec, lead: list[int], row: int, apart: bool) -> None:
    """Bit for bit, and with a bound of zero."""
    largest = codec.largest if isinstance(codec, NarrowIntegers) else 1
    x = torch.randint(0, largest + 1, [*lead, row])
    x[..., :1] = largest
    x = strided(x.bool() if isinstance(codec, PackBits) else x, apart)
    assert codec.exact
    decoded = round_trip(codec, x)
    assert (decoded.shape, decoded.dtype) == (x.shape, x.dtype)
    assert torch.equal(decoded, x)
    bound = codec.error_bound(x)
    assert bound.shape == x.shape
    assert not bound.any()
    check_bytes(codec, x)


def check_bytes(codec: Codec, x: Tensor) -> None:
    parts = codec.encode(x)
    rows = math.prod(x.shape[:-1])
    assert sum(part.nbytes for part in parts) == rows * codec.row_bytes(x.shape[-1], x.dtype)
    assert all(part.shape[:-1] == x.shape[:-1] for part in parts)


@pytest.mark.parametrize(
    ("codec", "row", "dtype", "expected"),
    [
        (PackBits(), 17, torch.bool, 3),
        (NarrowIntegers(255), 10, torch.int64, 10),
        (NarrowIntegers(256), 10, torch.int64, 20),
        (NarrowIntegers(32_768), 10, torch.int64, 40),
        (QuantizeGroups(8), 128, torch.float32, 128 + 2 * 4),
        (QuantizeGroups(4), 128, torch.float32, 64 + 2 * 4),
        (QuantizeGroups(4, sign=True), 65, torch.float32, 64 + 2 * 2),
        (GroupValues(4, 16), 64, torch.float32, 8 + 64),
        (GroupValues(2, 8), 64, torch.bfloat16, 8 + 32),
        (GroupValues(3, 16), 17, torch.bfloat16, 2 * 2 + 12),
        (GroupValues(4, 16, QuantizeGroups(8)), 256, torch.float32, 32 + 64 + 4),
        (TopValues(10), 100, torch.float64, 13 + 80),
        (TopValues(10, RoundValues()), 100, torch.float64, 13 + 20),
        (RoundValues(), 9, torch.float32, 18),
    ],
)
def test_bytes_counted_by_hand(codec: Codec, row: int, dtype: torch.dtype, expected: int) -> None:
    assert codec.row_bytes(row, dtype) == expected


# ---- the same payload --------------------------------------------------------------------


@pytest.mark.parametrize("codec", SELECTING, ids=lambda codec: codec.name)
@settings(max_examples=20)
@given(x=tensors())
def test_equal_tensors_have_equal_payloads(codec: Codec, x: Tensor) -> None:
    """Whatever their strides; with dither only where the values are is the same."""
    first, second = codec.encode(x), codec.encode(x.contiguous().clone())
    parts = len(first) if draws_no_dither(codec) else 1
    pairs = zip(first[:parts], second[:parts], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("codec", DITHERED, ids=lambda codec: codec.name)
def test_dither_draws_nothing(codec: Codec) -> None:
    """It follows from the values: torch's generators are left to the program's own masks."""
    x = torch.rand(4, 128)
    before = torch.get_rng_state()
    first, second = codec.encode(x), codec.encode(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    x[:, 1] = 1.01  # the largest: all others are rounded in another way
    third, other = codec.encode(x), codec.encode(x.clone().index_fill_(1, torch.tensor(1), 1.02))
    assert not torch.equal(third[0], other[0])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("signs", ["equal", "mixed"])
def test_of_equal_magnitudes_the_first_are_kept(dtype: torch.dtype, signs: str) -> None:
    x = torch.ones(32, dtype=dtype)
    if signs == "mixed":
        x[1::2] = -1
        x[17::2], x[16::2] = 1, -1
    top = round_trip(TopValues(5), x)
    assert top.nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    # A group is what lies at one place of 16 runs: runs of two here.
    grouped = round_trip(GroupValues(4, 16), x)
    assert grouped.nonzero().flatten().tolist() == list(range(8))


@pytest.mark.parametrize("codec", SELECTING, ids=lambda codec: codec.name)
@settings(max_examples=20)
@given(x=tensors(rows=st.integers(64, 200)))
def test_what_is_kept_is_the_largest(codec: Codec, x: Tensor) -> None:
    """What decodes to zero is nowhere larger than what does not, of its group or row."""
    if not isinstance(codec, TopValues):
        assert isinstance(codec, GroupValues)
        codec = dataclasses.replace(codec, values=PLAIN)
        runs = -(-x.shape[-1] // codec.group)
        padded = torch.nn.functional.pad(x, (0, runs * codec.group - x.shape[-1]))
        decoded = round_trip(codec, padded).unflatten(-1, (codec.group, -1)).double()
        magnitude = padded.unflatten(-1, (codec.group, -1)).double().abs()
        dim = -2
    else:
        codec = dataclasses.replace(codec, values=PLAIN)
        decoded, magnitude, dim = round_trip(codec, x).double(), x.double().abs(), -1
    kept = decoded != 0
    assert (kept.sum(dim) <= codec.kept).all()
    least = torch.where(kept, magnitude, torch.inf).amin(dim, keepdim=True)
    dropped = torch.where(kept, 0.0, magnitude)
    # Magnitudes that differ in the last bits alone count as equal.
    slack = 1 + 2.0**-17
    assert (dropped <= least * slack).all()
    wanted = (magnitude != 0).sum(dim).clamp_max(codec.kept)
    assert torch.equal(kept.sum(dim), wanted)


def test_what_is_kept_keeps_its_value() -> None:
    """Exactly by top-k, and to 18 bits by groups, which is all that half precision has."""
    for dtype in FLOATS:
        x = torch.randn(8, 64, dtype=torch.float64).to(dtype)
        top, grouped = round_trip(TopValues(9), x), round_trip(GroupValues(4, 16), x)
        assert torch.equal(top[top != 0], x[top != 0])
        kept = grouped != 0
        if dtype in (torch.float16, torch.bfloat16):
            assert torch.equal(grouped[kept], x[kept])
        error = (grouped[kept].double() / x[kept].double() - 1).abs()
        assert (error <= 2.0**-18).all()


# ---- specials ----------------------------------------------------------------------------


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each_lossy
def test_what_is_not_finite_stays_so(codec: Codec, dtype: torch.dtype, special: float) -> None:
    """An overflow that a plain run would show must not vanish in an encoding."""
    x = torch.rand(3, 130, dtype=torch.float64).to(dtype)
    x[1, 77] = abs(special) if codec in SIGNED else special
    decoded = round_trip(codec, x)
    assert not decoded[1, 77].isfinite()
    assert decoded[0].isfinite().all(), "it reached another row"
    assert decoded[2].isfinite().all(), "it reached another row"
    if codec.name.startswith("int"):
        assert decoded[1, 64:128].isnan().all(), "its group does not decode to NaN"
    elif "int" not in codec.name and not math.isnan(special):
        assert decoded[1, 77].item() == special


def test_nan_counts_as_larger_than_infinity() -> None:
    x = torch.rand(48)
    x[::3], x[7] = torch.inf, torch.nan
    assert round_trip(TopValues(1), x).isnan().nonzero().item() == 7
    assert round_trip(GroupValues(1, 16), x)[7].isnan()


@pytest.mark.parametrize("codec", SIGNED, ids=lambda codec: codec.name)
@settings(max_examples=60)
@given(x=tensors(rows=st.integers(1, 200)))
def test_sign_is_exact(codec: Codec, x: Tensor) -> None:
    """Above 0 is what was above 0, and nothing else."""
    x = x.abs()
    decoded = round_trip(codec, x)
    assert torch.equal(decoded > 0, x > 0)
    assert (decoded >= 0).all()


@pytest.mark.parametrize("codec", SIGNED, ids=lambda codec: codec.name)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sign_of_extremes_is_exact(codec: Codec, dtype: torch.dtype) -> None:
    """Beside values a hundred million times larger, and among denormals."""
    x = torch.rand(4, 64, dtype=torch.float64)
    x[x < 0.3] = 0
    info = torch.finfo(dtype)
    x[1] *= info.smallest_normal / 16
    x[2] *= info.smallest_normal * 300
    x[3] = torch.where(torch.arange(64) % 2 == 0, x[3] * info.smallest_normal * 4, x[3])
    x = x.to(dtype)
    assert torch.equal(round_trip(codec, x) > 0, x > 0)


@pytest.mark.parametrize("codec", DITHERED, ids=lambda codec: codec.name)
def test_rounding_is_unbiased(codec: Codec) -> None:
    """The mean error over many tensors is 0: 6 sigma of a step, for 128 elements.

    The dither follows from the largest value of a group, which therefore varies.
    """
    assert isinstance(codec, QuantizeGroups)
    n, x = 4096, torch.rand(2, 64)
    x[:, 0], x[:, 1] = 0, 1  # the ends, that bfloat16 holds
    total = torch.zeros(2, 64, dtype=torch.float64)
    for i in range(n):
        x[:, 1] = 1 + i * 2.0**-14
        total += (round_trip(codec, x) - x).double()
    step = (1.25 + 2.0**-6) / (2**codec.bits - 2)
    # A step drawn with chance q has a deviation of at most a half; dither has steps of 2**-14.
    bound = step * (6 * 0.5 / math.sqrt(n) + 2.0**-14) + 1e-6
    inner = slice(2, None)
    if codec.sign:  # the smallest positive code is the value 0: nothing lies below it
        assert not total[:, 0].any()
    assert ((total / n)[:, inner].abs() <= bound).all()


@pytest.mark.parametrize("codec", DITHERED, ids=lambda codec: codec.name)
def test_dither_of_neighbours_is_independent(codec: Codec) -> None:
    """Errors of two elements, of neighbours and of neighbouring rows, do not go together."""
    x = torch.full((16, 512), 0.501)
    x[:, ::64], x[:, 1::64] = 0, 1
    errors = []
    for i in range(200):
        x[:, 1::64] = 1 + i * 2.0**-12
        errors.append((round_trip(codec, x) - x).double())
    noise = torch.stack(errors)[..., 2:64]
    noise = noise - noise.mean(0)
    deviation = noise.std()
    assert deviation > 0
    for a, b in ((noise[:, :, 1:], noise[:, :, :-1]), (noise[:, 1:], noise[:, :-1])):
        correlation = (a * b).mean() / deviation**2
        assert abs(correlation) < 0.05


# ---- payloads ----------------------------------------------------------------------------


def widened(part: Tensor) -> Tensor:
    return torch.cat([part, part[..., :1]], -1)


TAMPERED: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "first has another type": lambda p: [p[0].to(torch.float64), *p[1:]],
    "last has another type": lambda p: [*p[:-1], p[-1].to(torch.complex64)],
    "first is longer": lambda p: [widened(p[0]), *p[1:]],
    "last is longer": lambda p: [*p[:-1], widened(p[-1])],
    "last is shorter": lambda p: [*p[:-1], p[-1][..., 1:]],
    "a part is missing": lambda p: p[:-1],
    "a part too many": lambda p: [*p, p[-1]],
    "nothing": lambda p: [],
    "no dimensions": lambda p: [part.flatten()[0] for part in p],
}


@each_codec
@pytest.mark.parametrize("how", TAMPERED)
def test_tampered_payloads_are_refused(codec: Codec, how: str) -> None:
    x, payload = encoded_sample(codec)
    with pytest.raises(ardd.PayloadError, match="Cannot decode") as caught:
        codec.decode(TAMPERED[how](payload), x.shape[-1], x.dtype)
    assert isinstance(caught.value, ValueError)


@each_codec
def test_payloads_of_other_rows_are_refused(codec: Codec) -> None:
    x, payload = encoded_sample(codec)
    with pytest.raises(ardd.PayloadError):
        codec.decode(payload, 2 * x.shape[-1], x.dtype)


@pytest.mark.parametrize("codec", FEW[:-1], ids=lambda codec: codec.name)
@pytest.mark.parametrize("part", ["first", "last"])
@pytest.mark.parametrize("lead", [(3, 2), (1, 1)])
def test_leading_sizes_that_differ_are_refused(
    codec: Codec, part: str, lead: tuple[int, ...]
) -> None:
    """They must not broadcast silently."""
    x, payload = encoded_sample(codec)
    assert x.shape[:-1] == (3, 1)
    at = 0 if part == "first" else -1
    payload[at] = torch.zeros(*lead, payload[at].shape[-1], dtype=payload[at].dtype)
    with pytest.raises(ardd.PayloadError, match="leading sizes"):
        codec.decode(payload, x.shape[-1], x.dtype)


def encoded_sample(codec: Codec) -> tuple[Tensor, list[Tensor]]:
    if isinstance(codec, PackBits):
        x = torch.rand(3, 1, 130) < 0.5
    elif isinstance(codec, NarrowIntegers):
        x = torch.randint(0, 200, (3, 1, 130))
    else:
        x = torch.rand(3, 1, 130)
    return x, list(codec.encode(x))


# ---- refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8], ids=str)
@each_lossy
def test_types_without_magnitudes_are_refused(codec: Codec, dtype: torch.dtype) -> None:
    why = codec.refusal(dtype, 256)
    assert why is not None
    assert str(dtype) in why


@each_lossy
def test_common_rows_are_not_refused(codec: Codec) -> None:
    short = isinstance(codec, TopValues) and isinstance(codec.values, QuantizeGroups)
    codec = dataclasses.replace(codec, kept=64) if short else codec  # type: ignore[type-var]
    assert codec.refusal(torch.float32, 256) is None
    assert codec.row_bytes(256, torch.float32) < 256 * 4


@pytest.mark.parametrize(
    ("codec", "dtype", "row", "words"),
    [
        (PackBits(), torch.float32, 64, "no mask"),
        (PackBits(), torch.int64, 64, "no mask"),
        (NarrowIntegers(255), torch.float32, 64, "no indices"),
        (NarrowIntegers(255), torch.bool, 64, "no indices"),
        (NarrowIntegers(2**40), torch.int64, 64, "smallest"),
        (NarrowIntegers(40_000), torch.int32, 64, "smallest"),
        (QuantizeGroups(8), torch.bfloat16, 8, "too short"),
        (GroupValues(16, 16), torch.float32, 64, "not smaller"),
        (GroupValues(8, 16), torch.float32, 1, "not smaller"),
        (GroupValues(4, 16, RoundValues()), torch.bfloat16, 64, "not larger"),
        (GroupValues(4, 16, QuantizeGroups(8)), torch.bfloat16, 16, "too short"),
        (TopValues(65), torch.float32, 64, "have no 65 values"),
        (TopValues(64), torch.float32, 64, "not smaller"),
        (TopValues(8, RoundValues()), torch.float16, 64, "not larger"),
        (RoundValues(), torch.bfloat16, 64, "not larger"),
    ],
)
def test_what_cannot_be_encoded_is_refused(
    codec: Codec, dtype: torch.dtype, row: int, words: str
) -> None:
    why = codec.refusal(dtype, row)
    assert why is not None
    assert words in why


@each_lossy
@settings(max_examples=30)
@given(row=st.integers(1, 200), dtype=st.sampled_from(FLOATS))
def test_what_is_not_refused_is_smaller(codec: Codec, row: int, dtype: torch.dtype) -> None:
    if codec.refusal(dtype, row) is None:
        assert codec.row_bytes(row, dtype) < row * dtype.itemsize


def test_names_tell_codecs_apart() -> None:
    names = [codec.name for codec in LOSSY]
    assert len(set(names)) == len(names)
    assert GroupValues(4, 16, QuantizeGroups(8)).name == "nm 4:16, int8"
    assert TopValues(5, RoundValues()).name == "top 5, bf16"
    assert QuantizeGroups(4, sign=True).name == "int4 + sign"
    assert TokenRows(64, 256).name == "rows 64:256"
    assert TokenRows(64, 256, sampled=True).name == "sampled rows 64:256"


# ---- rows of tokens ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_largest_rows_are_kept(dtype: torch.dtype) -> None:
    x = torch.randn(20, 6, dtype=torch.float64).to(dtype)
    x *= torch.arange(1, 21).roll(5)[:, None] ** 2  # no two norms are close
    rows, values = torch.ops.ardd.select_rows(x, 7, False)
    norms = x.double().norm(dim=1)
    assert set(rows.tolist()) == set(norms.topk(7).indices.tolist())
    assert torch.equal(rows, rows.sort().values)
    assert torch.equal(values, x[rows])


def test_all_rows_leave_the_product_as_it_is() -> None:
    x, g = torch.randn(9, 4), torch.randn(9, 3)
    rows, values = select_rows(x, 9, False)
    assert torch.equal(g[rows].t() @ values, g.t() @ x)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_kept(sampled: bool, special: float) -> None:
    x = torch.rand(16, 4)
    x[5, 2] = special
    rows, values = select_rows(x, 4, sampled)
    assert 5 in rows.tolist()
    assert not values[rows == 5].isfinite().all()


def test_sampled_rows_leave_products_unbiased() -> None:
    """The mean over 10,000 draws is the product, within 5 sigma of that mean, entry by entry."""
    n, x, g = 10_000, torch.randn(12, 3, dtype=torch.float64), torch.randn(12, 2).double()
    x *= torch.logspace(-2, 1, 12)[:, None]
    x[3] = 0  # its gradient is not
    products = torch.empty(n, 2, 3, dtype=torch.float64)
    for i in range(n):
        rows, values = select_rows(x, 4, True)
        products[i] = g[rows].t() @ values
    expected = g.t() @ x
    sigma = products.std(0) / math.sqrt(n)
    assert ((products.mean(0) - expected).abs() <= 5 * sigma).all()
    # The largest alone are another product: this test can fail.
    rows, values = select_rows(x, 4, False)
    assert ((g[rows].t() @ values - expected).abs() > 5 * sigma).any()


def test_sampled_rows_ascend_and_may_repeat() -> None:
    x = torch.full((50, 2), 1e-3)
    x[7] = 1000.0
    rows, values = select_rows(x, 20, True)
    assert torch.equal(rows, rows.sort().values)
    assert (rows == 7).sum() > 10
    assert values.shape == (20, 2)


def test_rows_of_zeros_can_be_sampled() -> None:
    rows, values = select_rows(torch.zeros(8, 3), 4, True)
    assert rows.shape == (4,)
    assert torch.equal(values, torch.zeros(4, 3))


def test_bytes_of_rows() -> None:
    codec = TokenRows(4, 16)
    x = torch.randn(16, 10, dtype=torch.bfloat16)
    assert codec.payload_bytes(10, x.dtype) == 4 * (10 * 2 + 8)
    assert codec.payload_bytes(10, x.dtype) == sum(p.nbytes for p in select_rows(x, 4, False))
    assert not codec.exact


@pytest.mark.parametrize(
    ("codec", "dtype", "row", "words"),
    [
        (TokenRows(4, 16), torch.int64, 10, "no norm"),
        (TokenRows(16, 16), torch.float32, 10, "not smaller"),
        (TokenRows(8, 16), torch.bfloat16, 1, "not smaller"),
    ],
)
def test_rows_that_cannot_be_kept(
    codec: TokenRows, dtype: torch.dtype, row: int, words: str
) -> None:
    why = codec.refusal(dtype, row)
    assert why is not None
    assert words in why
    assert TokenRows(4, 16).refusal(torch.bfloat16, 10) is None


# ---- custom ops --------------------------------------------------------------------------


def samples() -> list[Any]:
    ops = torch.ops.ardd
    bitmap, values = ops.select_top(torch.randn(3, 2, 20), 4)
    return [
        pytest.param(ops.select_top, (torch.randn(3, 2, 20), 4), id="select_top"),
        pytest.param(ops.select_top, (torch.randn(20, 3).t(), 5), id="select_top-strided"),
        pytest.param(ops.select_top, (torch.randn(0, 9), 9), id="select_top-empty"),
        pytest.param(ops.select_top, (torch.randn(9).bfloat16(), 1), id="select_top-bf16"),
        pytest.param(ops.place_values, (bitmap, values, 20), id="place_values"),
        pytest.param(ops.select_rows, (torch.randn(20, 6), 5, False), id="select_rows"),
        pytest.param(ops.select_rows, (torch.randn(6, 20).t(), 5, False), id="select_rows-strided"),
        pytest.param(ops.select_rows, (torch.randn(20, 6), 5, True), id="select_rows-sampled"),
    ]


@pytest.mark.parametrize(("op", "args"), samples())
def test_opcheck(op: Any, args: tuple[Any, ...]) -> None:
    """Schema, fake values and registration are what torch expects of an op."""
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op.default, args, test_utils=utils)


@pytest.mark.parametrize("kept", [1, 5, 20])
def test_top_values_are_by_position(kept: int) -> None:
    x = torch.randn(3, 2, 20)
    bitmap, values = torch.ops.ardd.select_top(x, kept)
    placed = torch.ops.ardd.place_values(bitmap, values, 20)
    indices = x.abs().topk(kept).indices.sort().values
    assert torch.equal(values, x.gather(-1, indices))
    assert torch.equal(placed, torch.zeros_like(x).scatter(-1, indices, values))
