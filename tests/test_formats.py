"""The scalar specification against the published specifications and two libraries we did not write.

`ml_dtypes` decodes every code of every format; `gfloat` states facts and rounds in every mode, also
where it refuses. Between them no number below is ours alone. Expected roundings are built from the
list of representable values alone (neighbours, midpoints, the parity of a code), not from a formula
that could share a mistake with `round`. Zero tolerance everywhere; -0.0 is not 0.0.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest

from fp8lab import formats
from fp8lab.formats import FORMATS, FloatFormat

# From the texts: OCP OFP8 1.0 tables 1-2 (E4M3, E5M2), OCP MX 1.0 tables 3-7 (E3M2, E2M3, E2M1,
# E8M0), IEEE 754 table 3.5, ONNX's float8 page for FNUZ, 2409.12517 for Gaudi2.
#            bits  largest              normal    subnormal  infinity, NaN
SPECIFIED = {
    "E4M3": (8, 448.0, 2.0**-6, 2.0**-9, False, True),
    "E4M3_GAUDI2": (8, 240.0, 2.0**-6, 2.0**-9, True, True),
    "E4M3FNUZ": (8, 240.0, 2.0**-7, 2.0**-10, False, True),
    "E5M2": (8, 57344.0, 2.0**-14, 2.0**-16, True, True),
    "E5M2FNUZ": (8, 57344.0, 2.0**-15, 2.0**-17, False, True),
    "E3M2": (6, 28.0, 0.25, 0.0625, False, False),
    "E2M3": (6, 7.5, 1.0, 0.125, False, False),
    "E2M1": (4, 6.0, 1.0, 0.5, False, False),
    "E8M0": (8, 2.0**127, 2.0**-127, 2.0**-127, False, True),
    "BF16": (16, (2 - 2.0**-7) * 2.0**127, 2.0**-126, 2.0**-133, True, True),
    "FP16": (16, 65504.0, 2.0**-14, 2.0**-24, True, True),
    "FP32": (32, (2 - 2.0**-23) * 2.0**127, 2.0**-126, 2.0**-149, True, True),
}
ML_DTYPES: dict[str, type] = {
    "E4M3": ml_dtypes.float8_e4m3fn,
    "E4M3_GAUDI2": ml_dtypes.float8_e4m3,
    "E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "E5M2": ml_dtypes.float8_e5m2,
    "E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "E3M2": ml_dtypes.float6_e3m2fn,
    "E2M3": ml_dtypes.float6_e2m3fn,
    "E2M1": ml_dtypes.float4_e2m1fn,
    "E8M0": ml_dtypes.float8_e8m0fnu,
    "BF16": ml_dtypes.bfloat16,
    "FP16": np.float16,
    "FP32": np.float32,
}
GFLOAT = {
    "E4M3": gfloat.formats.format_info_ocp_e4m3,
    "E5M2": gfloat.formats.format_info_ocp_e5m2,
    "E3M2": gfloat.formats.format_info_ocp_e3m2,
    "E2M3": gfloat.formats.format_info_ocp_e2m3,
    "E2M1": gfloat.formats.format_info_ocp_e2m1,
    "E8M0": gfloat.formats.format_info_ocp_e8m0,
    "BF16": gfloat.formats.format_info_bfloat16,
    "FP16": gfloat.formats.format_info_binary16,
    "FP32": gfloat.formats.format_info_binary32,
}
every_format = pytest.mark.parametrize("name", FORMATS)
# FP32 has two thousand million values; it is sampled instead.
every_short_format = pytest.mark.parametrize("name", [n for n in FORMATS if n != "FP32"])
every_element_format = pytest.mark.parametrize(
    "name", [n for n in FORMATS if n not in ("FP32", "E8M0")]
)


def same(left: float, right: float) -> bool:
    """Equal, where NaN equals NaN and -0.0 does not equal 0.0."""
    if math.isnan(left) or math.isnan(right):
        return math.isnan(left) and math.isnan(right)
    return left == right and math.copysign(1, left) == math.copysign(1, right)


def neighbours(fmt: FloatFormat, most: int = 300) -> Iterator[tuple[int, float, float]]:
    """(code of lower, lower, upper) of adjacent values: all of them, or about `most` and the ends.

    The code is the position, for the codes of these formats ascend with their values.
    """
    pairs = list(enumerate(itertools.pairwise(fmt.values())))
    chosen = pairs if len(pairs) <= most else pairs[:20] + pairs[20 :: len(pairs) // most]
    for code, (lower, upper) in [*chosen, *pairs[-20:]]:
        yield code, lower, upper


def decoded(name: str) -> Any:
    """Every code of the format as ml_dtypes (numpy) reads it, float64."""
    bits = SPECIFIED[name][0]
    codes = np.arange(1 << bits, dtype=np.uint16 if bits == 16 else np.uint8)
    with np.errstate(invalid="ignore"):
        return codes.view(ML_DTYPES[name]).astype(np.float64)


def test_the_table_names_every_format() -> None:
    assert list(FORMATS) == list(SPECIFIED) == list(ML_DTYPES)
    for name, fmt in FORMATS.items():
        assert fmt.name == name == repr(fmt)
        assert getattr(formats, name) is fmt


@every_format
def test_facts_are_the_published_ones(name: str) -> None:
    fmt = FORMATS[name]
    facts = (fmt.bits, fmt.max, fmt.smallest_normal, fmt.smallest_subnormal)
    assert (*facts, fmt.has_infinity, fmt.has_nan) == SPECIFIED[name]


@every_format
def test_facts_are_those_of_ml_dtypes(name: str) -> None:
    fmt, info = FORMATS[name], ml_dtypes.finfo(ML_DTYPES[name])
    assert fmt.bits == info.bits
    assert fmt.mantissa_bits == info.nmant
    assert fmt.exponent_bits == info.nexp
    assert fmt.max == float(info.max)
    assert fmt.smallest_normal == float(info.smallest_normal)
    assert fmt.smallest_subnormal == float(info.smallest_subnormal)
    assert fmt.epsilon == float(info.eps)
    assert fmt.min_exponent == info.minexp
    assert fmt.max_exponent == info.maxexp - 1  # theirs is the first that overflows
    assert fmt.signed == (float(info.min) < 0)


@pytest.mark.parametrize("name", GFLOAT)
def test_facts_are_those_of_gfloat(name: str) -> None:
    fmt, info = FORMATS[name], GFLOAT[name]
    assert fmt.bits == info.bits
    assert fmt.bias == info.bias
    assert fmt.mantissa_bits == info.precision - 1
    assert fmt.exponent_bits == info.expBits
    assert fmt.max == info.max
    assert fmt.max_exponent == info.emax
    assert fmt.smallest_subnormal == info.smallest
    assert fmt.epsilon == info.eps
    assert fmt.signed == info.is_signed
    assert fmt.has_zero == info.has_zero
    assert fmt.has_infinity == (info.num_infs > 0)
    assert fmt.has_nan == (info.num_nans > 0)


@every_short_format
def test_values_are_the_decoded_codes(name: str) -> None:
    finite = decoded(name)[np.isfinite(decoded(name))]
    expected = sorted(set(finite[finite >= 0].tolist()))
    values = list(FORMATS[name].values())
    assert values == expected
    assert all(math.copysign(1, value) == 1 for value in values)


@every_short_format
def test_every_code_is_a_value_an_infinity_or_a_nan(name: str) -> None:
    fmt, everything = FORMATS[name], decoded(name)
    count = sum(1 for _ in fmt.values())
    # The codes of a sign are mirrored; unsigned zero gives its negative code to NaN.
    finite = count * 2 - (fmt.top == "fnuz") if fmt.signed else count
    assert finite == np.isfinite(everything).sum()
    assert fmt.has_infinity == bool(np.isinf(everything).any())
    assert fmt.has_nan == bool(np.isnan(everything).any())


def test_values_of_fp32_begin_as_numpy_decodes_them() -> None:
    codes = np.arange(5000, dtype=np.uint32).view(np.float32).astype(np.float64)
    assert list(itertools.islice(formats.FP32.values(), 5000)) == codes.tolist()


@every_format
def test_a_representable_value_stays(name: str) -> None:
    fmt = FORMATS[name]
    for value in itertools.islice(fmt.values(), 1 << 16):
        for rounding in ("nearest", "toward_zero"):
            assert same(fmt.round(value, rounding), value)
        assert same(fmt.round(value, "stochastic", draw=0.0), value)
        if fmt.signed and (value != 0 or fmt.top != "fnuz"):
            assert same(fmt.round(-value), -value)


@every_element_format
def test_nearest_takes_the_nearer_neighbour_and_ties_take_the_even_code(name: str) -> None:
    fmt = FORMATS[name]
    for code, lower, upper in neighbours(fmt, most=2000):
        middle = (lower + upper) / 2  # exact in float64, as are its neighbours
        even = lower if code % 2 == 0 else upper
        for value, expected in (
            (math.nextafter(lower, math.inf), lower),
            (math.nextafter(middle, 0.0), lower),
            (middle, even),
            (math.nextafter(middle, math.inf), upper),
            (math.nextafter(upper, 0.0), upper),
        ):
            assert same(fmt.round(value), expected), value
            unsigned_zero = expected == 0 and fmt.top == "fnuz"
            assert same(fmt.round(-value), expected if unsigned_zero else -expected), -value


def test_nearest_of_scales_is_that_of_ml_dtypes() -> None:
    # E8M0 has no mantissa whose parity could break a tie: ml_dtypes goes up, as we do. From the
    # second value on: it reads float32's own subnormals inexactly.
    for lower, upper in itertools.pairwise(itertools.islice(formats.E8M0.values(), 1, None)):
        tie = np.float32((lower + upper) / 2)
        for value in (np.nextafter(tie, np.float32(0)), tie, np.nextafter(tie, tie * 2)):
            expected = float(value.astype(ML_DTYPES["E8M0"]))
            assert formats.E8M0.round(float(value)) == expected, value
    assert formats.E8M0.round(1.4999 * 2.0**-127) == 2.0**-127
    assert formats.E8M0.round(2.0**-149) == 2.0**-127  # no zero to fall to
    assert formats.E8M0.round(1e300) == formats.E8M0.round(math.inf) == 2.0**127


@every_element_format
def test_toward_zero_takes_the_lower_neighbour(name: str) -> None:
    fmt = FORMATS[name]
    for _, lower, upper in neighbours(fmt):
        for value in (math.nextafter(lower, math.inf), math.nextafter(upper, 0.0)):
            assert same(fmt.round(value, "toward_zero"), lower), value
            unsigned_zero = lower == 0 and fmt.top == "fnuz"
            assert same(fmt.round(-value, "toward_zero"), lower if unsigned_zero else -lower)


@every_element_format
def test_stochastic_is_exact_in_expectation(name: str) -> None:
    fmt, draws = FORMATS[name], [k / 64 for k in range(64)]
    for _, lower, upper in neighbours(fmt):
        for k in (0, 1, 31, 63):
            value = lower + (upper - lower) * k / 64
            rounded = [fmt.round(value, "stochastic", draw=draw) for draw in draws]
            assert set(rounded) <= {lower, upper}
            assert rounded.count(upper) == k  # so that the mean over all draws is the value


def beyond(fmt: FloatFormat) -> list[float]:
    """Values from max on: around the tie with the next value up, had the format one, and far."""
    step = fmt.max - list(itertools.islice(fmt.values(), (1 << 16) - 1))[-2]
    tie = fmt.max + step / 2
    near = [math.nextafter(tie, 0), tie, math.nextafter(tie, math.inf), fmt.max + step]
    return [math.nextafter(fmt.max, math.inf), *near, 2 * fmt.max, 1e300, math.inf]


@pytest.mark.parametrize("name", [n for n in GFLOAT if n not in ("E8M0", "FP32")])
@pytest.mark.parametrize(
    ("rounding", "mode"),
    [
        ("nearest", gfloat.RoundMode.TiesToEven),
        ("toward_zero", gfloat.RoundMode.TowardZero),
    ],
)
@pytest.mark.parametrize("overflow", ["saturate", "special"])
def test_beyond_max_is_as_in_gfloat(name: str, rounding: Any, mode: Any, overflow: Any) -> None:
    fmt = FORMATS[name]
    inside = [x for _, lower, upper in neighbours(fmt, 100) for x in (lower, (lower + upper) / 2)]
    for value in [0.0, *inside, *beyond(fmt)]:
        for signed in (value, -value):
            try:
                expected = gfloat.round_float(GFLOAT[name], signed, mode, overflow == "saturate")
            except ValueError:
                with pytest.raises(ValueError, match="overflows and the format has no infinity"):
                    fmt.round(signed, rounding, overflow)
                continue
            assert same(fmt.round(signed, rounding, overflow), expected), signed


@pytest.mark.parametrize("name", ["E4M3", "E4M3_GAUDI2", "E4M3FNUZ", "E5M2", "E5M2FNUZ"])
def test_special_overflow_is_that_of_ml_dtypes(name: str) -> None:
    fmt = FORMATS[name]
    # In float32, for from float64 ml_dtypes rounds twice.
    tie = np.float32(beyond(fmt)[2])
    steps = [np.nextafter(tie, np.float32(0)), tie, np.nextafter(tie, np.float32(np.inf))]
    values = np.array([*steps, fmt.max, 2 * fmt.max, np.inf], dtype=np.float32)
    values = np.concatenate([values, -values])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(ML_DTYPES[name]).astype(np.float64)
    for value, wanted in zip(values.tolist(), expected.tolist(), strict=True):
        assert same(fmt.round(value, overflow="special"), wanted), value


@every_format
def test_by_default_short_formats_saturate_and_wide_ones_overflow(name: str) -> None:
    fmt = FORMATS[name]
    largest = fmt.max if fmt.bits <= 8 else math.inf
    assert fmt.overflow == ("saturate" if fmt.bits <= 8 else "special")
    for value in (2 * fmt.max, 1e300, math.inf):
        assert fmt.round(value) == largest
        if fmt.signed:
            assert fmt.round(-value) == -largest
    assert fmt.round(1e300, "toward_zero") == fmt.max
    assert fmt.round(math.inf, "toward_zero") == largest
    assert fmt.round(1e300, "stochastic", draw=0.99) == largest


@every_element_format
def test_zeros_and_what_is_flushed_to_them(name: str) -> None:
    fmt = FORMATS[name]
    negative = 0.0 if fmt.top == "fnuz" else -0.0
    tiny = fmt.smallest_subnormal / 4
    assert same(fmt.round(0.0), 0.0)
    assert same(fmt.round(tiny), 0.0)
    assert same(fmt.round(5e-324), 0.0)
    assert same(fmt.round(-0.0), negative)
    assert same(fmt.round(-tiny), negative)
    assert same(fmt.round(-tiny, "toward_zero"), negative)
    assert same(fmt.round(-tiny, "stochastic", draw=0.25), negative)
    assert same(fmt.round(-tiny, "stochastic", draw=0.2499), -fmt.smallest_subnormal)


@every_format
def test_nan_stays_nan_or_is_refused(name: str) -> None:
    fmt = FORMATS[name]
    for rounding in ("nearest", "toward_zero", "stochastic"):
        if fmt.has_nan:
            assert math.isnan(fmt.round(math.nan, rounding))
        else:
            with pytest.raises(ValueError, match=f"{name}: NaN cannot be represented"):
                fmt.round(math.nan, rounding)


@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, -math.inf])
def test_scales_are_positive(value: float) -> None:
    with pytest.raises(ValueError, match=f"E8M0: {value} cannot be represented"):
        formats.E8M0.round(value)


@pytest.mark.parametrize("value", [0.0, 1.1, math.inf])
def test_an_unknown_rounding_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="rounding: 'up', expected 'nearest'"):
        formats.E4M3.round(value, "up")


def test_an_unknown_overflow_is_refused() -> None:
    with pytest.raises(ValueError, match="overflow: 'saturated', expected 'saturate' or 'special'"):
        formats.E4M3.round(1e9, overflow="saturated")


def test_a_format_is_a_frozen_keyword_only_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        formats.E4M3.bias = 8
    with pytest.raises(TypeError):
        FloatFormat("E4M3", 4, 3, 7, "fn")
    assert dataclasses.replace(formats.E4M3) == formats.E4M3
    assert hash(dataclasses.replace(formats.E4M3)) == hash(formats.E4M3)
    assert dataclasses.replace(formats.E4M3, top="ieee") != formats.E4M3
