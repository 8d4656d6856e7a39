"""A sketch against the tensor it was made of: each number equals its definition.

Sums are taken in Python's fractions and equal, as are counts and extremes; the histogram's oracle
takes every magnitude apart with math.frexp, so that no bit view is trusted. What a cast does is
asked of torch's own float8 casts and of `FloatFormat.round`, element by element. Only the fourth
power is an approximation, and held to its bound. Merging is tested with `==`: to the bit.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from fp8lab import formats
from fp8lab.casting import Cast
from fp8lab.formats import FloatFormat
from fp8lab.monitor.measure import summary
from fp8lab.recipe import Float8CurrentScaling
from fp8lab.sketch import HISTOGRAM_BINS, PACKED, Bounds, Sketch, bin_edge

EXACT = ("count", "zeros", "nans", "infs", "amax", "amin", "min", "max")
FOURTH_POWER = 3e-4  # the stated bound


def sketch(tensor: Tensor) -> Sketch:
    return Sketch.from_packed(summary(tensor).packed.numpy())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outlier() -> Tensor:
    tensor = normal(64, 96)
    tensor[3, 17] = 4096.5
    return tensor


def padded() -> Tensor:
    tensor = normal(32, 48)
    tensor[20:] = 0.0
    return tensor


def spoilt() -> Tensor:
    tensor = normal(16, 16).abs() + 5.0  # so that a zero in place of a NaN would be the smallest
    tensor[0, 0], tensor[1, 1], tensor[2, 2] = math.nan, math.inf, -math.inf
    return tensor


TENSORS = {
    "random": normal(128, 512),
    "outlier": outlier(),
    "padded": padded(),
    "spoilt": spoilt(),
    "positive": normal(300).abs() + 1.0,
    "negative": -normal(300).abs() - 1.0,
    "zeros": torch.zeros(4, 8),
    "negative zeros": torch.full((5,), -0.0),
    "only NaN": torch.full((3,), math.nan),
    "only infinite": torch.tensor([math.inf, -math.inf]),
    "empty": torch.zeros(0, 8),
    "scalar": torch.tensor(-3.5),
    "bf16": normal(64, 64).bfloat16(),
    "fp16": (normal(64, 64) * 1e-6).half(),  # its subnormals
    "subnormal": torch.tensor([1e-45, -3e-39, 2e-38, 0.0]),
    "huge": torch.tensor([3.4e38, -3.4e38, 1e30]),
    "powers of two": torch.tensor([2.0**k for k in range(-126, 128)]),
    "not contiguous": normal(32, 64).t(),
    "gradient": normal(8).requires_grad_(),
}


def plain(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().double().numpy().ravel()


def frexp_bin(magnitude: float) -> int:
    """Bin of a positive float32 magnitude: bins of 1/4 octave, those below 2^-126 equally wide."""
    fraction, exponent = math.frexp(magnitude)  # fraction in [1/2, 1)
    if exponent - 1 < -126:
        return math.floor(math.ldexp(magnitude, 126 + 2))
    return 4 * (exponent - 1 + 127) + math.floor((2.0 * fraction - 1.0) * 4.0)


def exact(total: Fraction) -> float:
    """The float64 nearest to it, as Python divides integers."""
    return total.numerator / total.denominator


def expected_sketch(tensor: Tensor) -> dict[str, Any]:
    x = plain(tensor).astype(np.float32).astype(np.float64)
    finite = x[np.isfinite(x)]
    magnitude = np.abs(finite)
    nonzero = magnitude[magnitude > 0]
    histogram = np.zeros(HISTOGRAM_BINS, dtype=np.int64)
    for index, count in Counter(frexp_bin(m) for m in nonzero.tolist()).items():
        histogram[index] = count
    parts = [Fraction(value) for value in finite.tolist()]
    return {
        "count": x.size,
        "zeros": int((x == 0).sum()),
        "nans": int(np.isnan(x).sum()),
        "infs": int(np.isinf(x).sum()),
        "amax": magnitude.max(initial=0.0),
        "amin": nonzero.min(initial=math.inf),
        "min": finite.min(initial=math.inf),
        "max": finite.max(initial=-math.inf),
        "sum": exact(sum(parts, Fraction())),
        "sum_abs": exact(sum(map(abs, parts), Fraction())),
        "sum_squares": exact(sum((part**2 for part in parts), Fraction())),
        "sum_fourth_powers": math.fsum(magnitude**4),
        "histogram": histogram,
    }


def assert_is_sketch_of(got: Sketch, tensor: Tensor) -> None:
    expected = expected_sketch(tensor)
    for name in (*EXACT, "sum", "sum_abs", "sum_squares"):
        assert getattr(got, name) == expected[name], name
    assert got.histogram.tolist() == expected["histogram"].tolist()
    fourth = expected["sum_fourth_powers"]
    # Below 2^-126 the bins are as wide as their numbers, of which 0.2 is left when squared twice.
    beyond = 2.0**-126 * got.finite if got.amin < 2.0**-126 else 0.0
    assert abs(got.sum_fourth_powers - fourth) <= FOURTH_POWER * fourth + beyond**4


@pytest.mark.parametrize("name", TENSORS)
def test_every_number_is_its_definition(name: str) -> None:
    assert_is_sketch_of(sketch(TENSORS[name]), TENSORS[name])


def assert_are_bins_of(packed: Any, magnitude: NDArray[np.float64]) -> None:
    start, width = int.from_bytes(packed[:2], "little"), packed[2]
    planes = np.frombuffer(packed, np.uint8)[3:].reshape(width, 3, -1)
    bins = (planes.astype(np.int64) << 8 * np.arange(width)[:, None, None]).sum(axis=0)
    codes = magnitude.astype(np.float32).view(np.int32)
    index, low = codes >> 20, codes & 0xFFFFF
    for got, where in zip(bins, (low >= 0, low == 0, (low == 1) | (low == 2)), strict=True):
        assert got.tolist() == [int((index[where] == start + i).sum()) for i in range(len(got))]
    assert (start, start + bins.shape[1] - 1) == (index.min(), index.max())


FLOATS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=24),
    elements=st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, math.nan, math.inf]),
)


@settings(deadline=None, max_examples=100)
@given(FLOATS)
def test_every_number_is_its_definition_for_any_tensor(values: NDArray[np.float32]) -> None:
    assert_is_sketch_of(sketch(torch.from_numpy(values)), torch.from_numpy(values))


@pytest.mark.parametrize("name", TENSORS)
def test_every_statistic_is_its_definition(name: str) -> None:
    x = plain(TENSORS[name])
    finite = x[np.isfinite(x)]
    row = sketch(TENSORS[name]).statistics()
    counts = ("count", "zeros", "nans", "infs")
    if finite.size == 0:
        assert tuple(row) == counts
        return
    magnitude = np.abs(finite)
    squares = np.square(finite)
    rms = math.sqrt(squares.mean())
    expected = {
        "cur_amax": magnitude.max(),
        "min": finite.min(),
        "max": finite.max(),
        "mean": finite.mean(),
        "l1_norm": magnitude.sum(),
        "l2_norm": math.sqrt(expected_sketch(TENSORS[name])["sum_squares"]),
    }
    if finite.size > 1:
        expected["std"] = finite.std(ddof=1)
    if magnitude.max() > 0:
        expected |= {
            "crest": magnitude.max() / rms,
            "kurtosis": np.square(squares).mean() / squares.mean() ** 2,
            "dynamic_range": math.log2(magnitude.max() / magnitude[magnitude > 0].min()),
        }
        counted = expected_sketch(TENSORS[name])["histogram"]
        used = np.flatnonzero(counted)
        assert row.pop("histogram_start") == used[0]
        assert row.pop("histogram") == counted[used[0] : used[-1] + 1].tolist()
        assert_are_bins_of(row.pop("bins"), magnitude[magnitude > 0])
    assert set(row) == {*counts, *expected}
    for quantity in ("cur_amax", "min", "max"):
        assert row[quantity] == expected[quantity], quantity
    parts = [Fraction(value) for value in finite.tolist()]
    mean = sum(parts, Fraction()) / len(parts)
    assert row["mean"] == pytest.approx(exact(mean), rel=1e-15)
    if finite.size > 1:
        variance = sum(((part - mean) ** 2 for part in parts), Fraction()) / (len(parts) - 1)
        root = math.isqrt(int(variance * 2**400)) / 2**200  # variances may be below float64
        assert row["std"] == pytest.approx(root, rel=1e-15)
    for quantity in expected.keys() - {"cur_amax", "min", "max", "std", "mean", "kurtosis"}:
        assert row[quantity] == pytest.approx(expected[quantity], rel=1e-14), quantity
    if "kurtosis" in expected and row["dynamic_range"] < 100:
        assert row["kurtosis"] == pytest.approx(expected["kurtosis"], rel=FOURTH_POWER)


def test_a_gaussian_has_kurtosis_three() -> None:
    kurtosis = sketch(normal(256, 256)).statistics()["kurtosis"]
    # The estimator's standard deviation is sqrt(96 / n) / 1, here 0.038.
    assert abs(float(kurtosis) - 3.0) < 0.15


MERGED = ("random", "outlier", "padded", "spoilt", "positive", "zeros", "only NaN", "empty")


def joined(*names: str) -> Tensor:
    return torch.cat([TENSORS[name].detach().float().flatten() for name in names])


@pytest.mark.long
@pytest.mark.parametrize(("one", "other"), list(itertools.product(MERGED, MERGED)))
def test_two_sketches_merge_into_that_of_both_tensors(one: str, other: str) -> None:
    merged = sketch(TENSORS[one]).merge(sketch(TENSORS[other]))
    assert merged == sketch(joined(one, other))
    assert_is_sketch_of(merged, joined(one, other))


@settings(deadline=None, max_examples=50)
@given(st.lists(FLOATS, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_any_number_of_sketches_merges_in_any_order(
    parts: list[NDArray[np.float32]], order: Any
) -> None:
    sketches = [sketch(torch.from_numpy(part)) for part in parts]
    packed = [one.to_packed() for one in sketches]
    whole = sketch(torch.from_numpy(np.concatenate([part.ravel() for part in parts])))
    while len(sketches) > 1:
        order.shuffle(sketches)
        sketches.append(sketches.pop().merge(sketches.pop()))
    assert sketches[0] == whole
    # So does a reduction over ranks: the sum of all but the extremes, of which the maximum.
    reduced = np.concatenate([np.sum(packed, axis=0)[:-4], np.max(packed, axis=0)[-4:]])
    assert Sketch.from_packed(reduced) == whole


def test_a_sketch_differs_where_a_tensor_does() -> None:
    one = sketch(TENSORS["random"])
    changed = TENSORS["random"].clone()
    changed[5, 7] = torch.nextafter(changed[5, 7], torch.tensor(9.0))
    assert one == sketch(TENSORS["random"])
    assert one != sketch(changed)
    assert one != "sketch"


def test_one_nan_is_as_good_as_another() -> None:
    codes = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32)
    sketches = [
        sketch(torch.cat([code.view(torch.float32)[None], torch.ones(3)])) for code in codes
    ]
    assert all(one == sketches[0] for one in sketches)


def test_sums_of_a_number_of_elements_that_no_tensor_has_are_exact() -> None:
    # 2^38 copies of an element, made by doubling: their squares need 86 bits.
    value = float(np.nextafter(np.float32(2.0), np.float32(0.0)))
    doubled = sketch(torch.tensor([value, -1.0]))
    for _ in range(38):
        doubled = doubled.merge(doubled)
    n = 2**38
    assert doubled.count == 2 * n
    assert doubled.sum == n * (value - 1.0)
    assert doubled.sum_abs == n * (value + 1.0)
    assert doubled.sum_squares == exact(n * (Fraction(value) ** 2 + 1))


def test_a_packed_sketch_travels_as_integers() -> None:
    one = sketch(TENSORS["spoilt"])
    assert one.to_packed().dtype == np.int64
    assert one.to_packed().shape == (PACKED,)
    assert Sketch.from_packed(one.to_packed()) == one
    with pytest.raises(ValueError, match=r"\[7\] numbers, expected \[12548\]"):
        Sketch.from_packed(np.zeros(7, dtype=np.int64))


# --- questions about a cast --------------------------------------------------------------------

ELEMENTS = [fmt for fmt in formats.FORMATS.values() if fmt.signed]
EIGHT_BITS = [fmt for fmt in ELEMENTS if fmt.bits <= 8]
POWERS = [2.0**power for power in (-126, -40, -7, -1, 0, 1, 5, 12, 60, 127)]


def around_edges(fmt: FloatFormat, scale: float) -> Tensor:
    """Every value of the format and every midpoint, divided by the scale, and what is around it in
    float32, up to five steps away; and some of everything else."""
    values = np.array([*itertools.islice(fmt.values(), 300), fmt.max], dtype=np.float64)
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2, [0.0, fmt.max * 1.0625]])
    with np.errstate(over="ignore", under="ignore"):
        single = (points / scale).astype(np.float32)
    codes = single.view(np.int32).astype(np.int64)[:, None] + np.arange(-5, 6)
    near = codes.clip(0, 0x7F800000).astype(np.int32).view(np.float32).ravel()
    rest = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 3e38]
    tensor = torch.from_numpy(np.concatenate([near, -near, np.float32(rest)]))
    return torch.cat([tensor, normal(300) / scale])


def counted(tensor: Tensor, fmt: FloatFormat, scale: float) -> dict[str, int]:
    """By the cast itself, as `measure` counts for an operand that is cast."""
    single = torch.tensor(scale)
    how = Cast(tensor, Float8CurrentScaling(), fmt, single, single.reciprocal())
    code = how.rounded().abs()
    return {
        "saturated": int(how.saturated().sum()),
        "flushed": int(((code * single.reciprocal() == 0) & (tensor != 0)).sum()),
        "subnormal": int(((code > 0) & (code < fmt.smallest_normal)).sum()),
    }


def answers(one: Sketch, fmt: FloatFormat, scale: float) -> dict[str, Bounds]:
    return {
        "saturated": one.saturated(fmt, scale),
        "flushed": one.flushed(fmt, scale),
        "subnormal": one.subnormal(fmt, scale),
    }


@pytest.mark.parametrize("scale", POWERS)
@pytest.mark.parametrize("fmt", EIGHT_BITS, ids=repr)
def test_counts_under_a_power_of_two_are_those_of_the_cast(fmt: FloatFormat, scale: float) -> None:
    tensor = around_edges(fmt, scale)
    if fmt.max / scale < 3e38 and fmt.smallest_subnormal / scale > 1e-36:
        found = answers(sketch(tensor), fmt, scale)
        assert {name: (n, n) for name, n in counted(tensor, fmt, scale).items()} == found


@pytest.mark.parametrize("scale", [*POWERS, 3.0, 448 / 17.3, 1e-30, 3e38])
@pytest.mark.parametrize("fmt", ELEMENTS, ids=repr)
def test_counts_under_any_scale_lie_between_the_bounds(fmt: FloatFormat, scale: float) -> None:
    tensor = around_edges(fmt, scale)
    found = answers(sketch(tensor), fmt, scale)
    for name, number in counted(tensor, fmt, float(np.float32(scale))).items():
        low, high = found[name]
        assert 0 <= low <= number <= high, name


@settings(deadline=None, max_examples=200)
@given(
    FLOATS,
    st.sampled_from(ELEMENTS),
    st.floats(2.0**-100, 2.0**100, width=32) | st.integers(-40, 40).map(lambda power: 2.0**power),
)
def test_counts_of_any_tensor_lie_between_the_bounds(
    values: NDArray[np.float32], fmt: FloatFormat, scale: float
) -> None:
    tensor = torch.from_numpy(values)
    found = answers(sketch(tensor), fmt, scale)
    exact_here = fmt.bits <= 8 and math.frexp(scale)[0] == 0.5 and 2**-40 <= scale <= 2**40
    for name, number in counted(tensor, fmt, scale).items():
        low, high = found[name]
        assert low <= number <= high, name
        assert low == high or not exact_here, name


def test_bounds_are_no_wider_than_the_bin_they_lie_in() -> None:
    tensor = normal(100_000)
    bounds = sketch(tensor).saturated(formats.E4M3, 448 / 1.1)
    beyond = float((tensor.abs() > 1.1).sum())
    assert not bounds.exact
    assert bounds.low <= beyond <= bounds.high
    assert bounds.low == int((tensor.abs() >= 1.125).sum())
    assert bounds.high == int((tensor.abs() >= 1.0).sum())


@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [(formats.E4M3, ml_dtypes.float8_e4m3fn), (formats.E5M2, ml_dtypes.float8_e5m2)],
)
def test_flushed_is_what_ml_dtypes_flushes(fmt: FloatFormat, dtype: Any) -> None:
    tensor = around_edges(fmt, 1.0)
    values = tensor.numpy()
    zeros = (values.astype(dtype).astype(np.float32) == 0) & (values != 0)
    assert sketch(tensor).flushed(fmt) == (zeros.sum(), zeros.sum())


def test_what_cannot_be_asked_is_refused() -> None:
    one = sketch(TENSORS["random"])
    for scale in (0.0, -1.0, math.inf, math.nan, 1e39):
        with pytest.raises(ValueError, match="expected positive and finite"):
            one.saturated(formats.E4M3, scale)
    with pytest.raises(ValueError, match="E8M0 is a format of scales"):
        one.flushed(formats.E8M0)


def test_bin_edges_are_the_smallest_magnitudes_of_their_bins() -> None:
    for index in range(1, HISTOGRAM_BINS - 4):
        edge = bin_edge(index)
        below = float(np.nextafter(np.float32(edge), np.float32(0.0)))
        assert frexp_bin(edge) == index
        assert below == 0.0 or frexp_bin(below) == index - 1
    assert bin_edge(0) == 0.0
    assert bin_edge(HISTOGRAM_BINS - 4) == math.inf
