"""One table, two implementations: the scalar specification and the tensor code must both obey it.

The oracles are torch's own casts, ml_dtypes and numpy's float32 division; zero tolerance, on every
bfloat16 pattern there is. Expected values carry Transformer Engine's overflow rule (saturate),
which neither torch nor ml_dtypes has: their inputs are clamped first, and what lies beyond max is
stated by hand in TABLE. Comparisons are of bits, so that -0.0 is not 0.0; only a NaN's payload is
free.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from fp8lab import NVFP4BlockScaling, formats
from fp8lab.casting import cast_for, fake_quantize, quantize
from fp8lab.formats import E2M1, E4M3, E5M2, FORMATS, FloatFormat
from fp8lab.recipe import (
    OPERANDS,
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    Format,
    HighPrecision,
    MXFP8BlockScaling,
    operand_format,
)
from fp8lab.rounding import codes_of, round_to, values_of
from fp8lab.scaling import absolute_maximum, scale_for

ML_DTYPES: dict[str, Any] = {
    "E4M3": ml_dtypes.float8_e4m3fn,
    "E4M3_GAUDI2": ml_dtypes.float8_e4m3,
    "E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "E5M2": ml_dtypes.float8_e5m2,
    "E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "E3M2": ml_dtypes.float6_e3m2fn,
    "E2M3": ml_dtypes.float6_e2m3fn,
    "E2M1": ml_dtypes.float4_e2m1fn,
    "BF16": ml_dtypes.bfloat16,
    "FP16": np.float16,
    "FP32": np.float32,
}
TORCH = {
    "E4M3": torch.float8_e4m3fn,
    "E4M3FNUZ": torch.float8_e4m3fnuz,
    "E5M2": torch.float8_e5m2,
    "E5M2FNUZ": torch.float8_e5m2fnuz,
    "BF16": torch.bfloat16,
    "FP16": torch.float16,
}
FLOAT32_MAX = float(np.finfo(np.float32).max)
INF, NAN = math.inf, math.nan
Implementation = Callable[[Tensor, FloatFormat, str], Tensor]


def by_specification(tensor: Tensor, fmt: FloatFormat, rounding: str = "nearest") -> Tensor:
    return torch.tensor([fmt.round(value, rounding) for value in tensor.tolist()])


@pytest.fixture(params=[by_specification, round_to], ids=["specification", "tensor"])
def rounds(request: pytest.FixtureRequest) -> Implementation:
    """float32 [n], format, rounding -> float32 [n]: the two that share every expectation here."""
    return request.param


def bits(tensor: Tensor) -> Tensor:
    """float32 as int32, every NaN the same."""
    return torch.where(tensor.isnan(), torch.nan, tensor).view(torch.int32)


def assert_same(actual: Tensor, expected: Tensor, given: Tensor | None = None) -> None:
    assert actual.dtype == expected.dtype == torch.float32
    assert actual.shape == expected.shape
    wrong = bits(actual) != bits(expected)
    if wrong.any():
        source = (actual if given is None else given)[wrong][:5]
        pytest.fail(f"of {source} came {actual[wrong][:5]}, expected {expected[wrong][:5]}")


def every_bfloat16() -> Tensor:
    """All 65,536 patterns, NaNs and infinities included, as float32."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16).float()


def random_patterns(count: int) -> Tensor:
    """float32 of every magnitude, subnormals, NaNs and infinities included."""
    drawn = np.random.default_rng(0).integers(0, 1 << 32, count, dtype=np.uint32)
    return torch.from_numpy(drawn.view(np.float32))


def neighbourhood(fmt: FloatFormat, most: int = 2000) -> Tensor:
    """float32: `most` values of the format, their midpoints, and one float32 step beside both."""
    values = np.array(list(fmt.values()), dtype=np.float32)
    ties = (values[1:].astype(np.float64) + values[:-1]) / 2
    centres = np.concatenate([values, ties.astype(np.float32)])[:: max(1, len(values) // most)]
    steps = [np.nextafter(centres, np.float32(to)) for to in (-INF, INF)]
    around = np.concatenate([centres, *steps])
    return torch.from_numpy(np.concatenate([around, -around]))


def by_ml_dtypes(tensor: Tensor, fmt: FloatFormat) -> Tensor:
    if fmt.overflow == "saturate":
        tensor = tensor.clamp(-fmt.max, fmt.max)
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = tensor.numpy().astype(ML_DTYPES[fmt.name]).astype(np.float32)
    return torch.from_numpy(rounded)


# format, value, what becomes of it; of E4M3 and E5M2 as in OCP OFP8 with SATFINITE conversion
TABLE = [
    (E4M3, 448.0, 448.0),
    (E4M3, 449.0, 448.0),
    (E4M3, 464.0, 448.0),
    (E4M3, 1e30, 448.0),
    (E4M3, INF, 448.0),
    (E4M3, -INF, -448.0),
    (E4M3, NAN, NAN),
    (E4M3, 17.0, 16.0),
    (E4M3, 19.0, 20.0),
    (E4M3, 2.0**-9, 2.0**-9),
    (E4M3, 2.0**-10, 0.0),
    (E4M3, -(2.0**-10), -0.0),
    (E4M3, 2.0**-10 * (1 + 2.0**-23), 2.0**-9),
    (E4M3, 3 * 2.0**-10, 2.0**-8),
    (E4M3, 1e-45, 0.0),
    (E4M3, -0.0, -0.0),
    (formats.E4M3_GAUDI2, 241.0, 240.0),
    (formats.E4M3_GAUDI2, INF, 240.0),
    (formats.E4M3_GAUDI2, NAN, NAN),
    (formats.E4M3FNUZ, 1e9, 240.0),
    (formats.E4M3FNUZ, -INF, -240.0),
    (formats.E4M3FNUZ, -0.0, 0.0),
    (formats.E4M3FNUZ, -(2.0**-11), 0.0),
    (formats.E4M3FNUZ, NAN, NAN),
    (E5M2, 57344.0, 57344.0),
    (E5M2, 61440.0, 57344.0),
    (E5M2, -INF, -57344.0),
    (E5M2, NAN, NAN),
    (E5M2, 9.0, 8.0),
    (E5M2, 11.0, 12.0),
    (E5M2, 2.0**-17, 0.0),
    (formats.E5M2FNUZ, -(2.0**-18), 0.0),
    (formats.E3M2, 100.0, 28.0),
    (formats.E3M2, INF, 28.0),
    (formats.E2M3, -7.6, -7.5),
    (E2M1, 2.5, 2.0),
    (E2M1, 3.5, 4.0),
    (E2M1, -5.0, -4.0),
    (E2M1, -INF, -6.0),
    (formats.BF16, 1 + 2.0**-8, 1.0),
    (formats.BF16, 1 + 3 * 2.0**-8, 1 + 2.0**-6),
    (formats.BF16, FLOAT32_MAX, INF),
    (formats.BF16, -INF, -INF),
    (formats.FP16, 65519.0, 65504.0),
    (formats.FP16, 65520.0, INF),
    (formats.FP32, 1e-45, 1e-45),
    (formats.FP32, FLOAT32_MAX, FLOAT32_MAX),
]


@pytest.mark.parametrize(("fmt", "value", "expected"), TABLE)
def test_table(rounds: Implementation, fmt: FloatFormat, value: float, expected: float) -> None:
    given = torch.tensor([value])
    assert_same(rounds(given, fmt, "nearest"), torch.tensor([expected]), given)


@pytest.mark.parametrize("name", ["E4M3", "E5M2"])
def test_every_bfloat16_is_cast_as_torch_casts_it(rounds: Implementation, name: str) -> None:
    fmt, given = FORMATS[name], every_bfloat16()
    expected = given.clamp(-fmt.max, fmt.max).to(TORCH[name]).float()
    assert given.isnan().sum() == 254
    assert given.isfinite().sum() == (1 << 16) - 256
    assert_same(rounds(given, fmt, "nearest"), expected, given)


@pytest.mark.parametrize("name", ML_DTYPES)
def test_every_bfloat16_is_cast_as_ml_dtypes_casts_it(rounds: Implementation, name: str) -> None:
    fmt, given = FORMATS[name], every_bfloat16()
    if not fmt.has_nan:
        given = given[~given.isnan()]
    assert_same(rounds(given, fmt, "nearest"), by_ml_dtypes(given, fmt), given)


@pytest.mark.parametrize("name", ML_DTYPES)
def test_every_magnitude_and_every_tie_of_float32(rounds: Implementation, name: str) -> None:
    fmt = FORMATS[name]
    given = random_patterns(20_000)
    if name != "FP32":  # the tensor code on all there are; the specification takes its time
        most = 2000 if rounds is by_specification else 1 << 16
        given = torch.cat([given, neighbourhood(fmt, most)])
    if not fmt.has_nan:
        given = given[~given.isnan()]
    assert_same(rounds(given, fmt, "nearest"), by_ml_dtypes(given, fmt), given)


@pytest.mark.parametrize("name", [n for n in ML_DTYPES if n != "FP32"])
def test_toward_zero_is_the_same_in_both(name: str) -> None:
    fmt = FORMATS[name]
    given = torch.cat([random_patterns(20_000), neighbourhood(fmt), torch.tensor([INF, -INF])])
    if not fmt.has_nan:
        given = given[~given.isnan()]
    rounded = round_to(given, fmt, "toward_zero")
    assert_same(rounded, by_specification(given, fmt, "toward_zero"), given)
    finite = given.isfinite()
    assert (rounded.abs() <= given.abs())[finite].all()
    assert rounded[finite].isfinite().all()


@pytest.mark.parametrize("name", [n for n in ML_DTYPES if n != "FP32"])
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero", "stochastic"])
@pytest.mark.parametrize("overflow", ["saturate", "special"])
def test_overflow_is_the_same_in_both(name: str, rounding: Any, overflow: Any) -> None:
    fmt = FORMATS[name]
    step = fmt.max - list(fmt.values())[-2]
    beyond = [fmt.max + step * k / 64 for k in (*range(130), 640)] + [2 * fmt.max, 4 * fmt.max]
    beyond = [
        value for value in (*beyond, FLOAT32_MAX, INF) if value <= FLOAT32_MAX or value == INF
    ]
    steps = np.nextafter(np.array(beyond, dtype=np.float32)[:-2, None], np.float32([0, INF]))
    given = torch.cat(
        [torch.tensor(beyond), torch.from_numpy(steps.ravel()), neighbourhood(fmt, 300)]
    )
    given = torch.cat([given, -given])
    if overflow == "special" and not (fmt.has_infinity or fmt.has_nan):
        with pytest.raises(ValueError, match=f"overflow='special': {name} has no infinity"):
            round_to(given, fmt, rounding, overflow=overflow)
        return
    rounded = round_to(given, fmt, rounding, overflow=overflow)
    at_most, at_least = (
        torch.tensor([fmt.round(v, rounding, overflow, draw) for v in given.tolist()])
        for draw in (0.0, 1 - 2.0**-53)
    )
    if rounding == "stochastic":
        either = (bits(rounded) == bits(at_most)) | (bits(rounded) == bits(at_least))
        assert either.all(), given[~either]
    else:
        assert_same(rounded, at_most, given)
    outside = given.abs() > fmt.max + step
    largest = torch.tensor(fmt.max if overflow == "saturate" else INF if fmt.has_infinity else NAN)
    if rounding == "toward_zero":
        outside &= given.isinf()
    assert_same(rounded[outside].abs(), largest.expand(int(outside.sum())))


@pytest.mark.parametrize("name", ["E3M2", "E2M3", "E2M1"])
def test_a_format_without_nan_leaves_it_in_a_tensor(name: str) -> None:
    # The specification refuses it; a tensor keeps what its other elements are.
    rounded = round_to(torch.tensor([NAN, 1.0]), FORMATS[name])
    assert rounded[0].isnan()
    assert rounded[1] == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero", "stochastic"])
def test_the_dtype_and_shape_of_the_tensor_stay(dtype: torch.dtype, rounding: Any) -> None:
    tensor = torch.randn(3, 0, 5, dtype=dtype)
    assert round_to(tensor, E4M3, rounding).shape == (3, 0, 5)
    tensor = torch.randn(4, 5, 6).to(dtype)
    rounded = round_to(tensor, E4M3, rounding, torch.Generator().manual_seed(1))
    expected = round_to(tensor.float(), E4M3, rounding, torch.Generator().manual_seed(1))
    assert rounded.dtype == dtype
    assert_same(rounded.float(), expected)


STOCHASTIC = [
    (E4M3, 1.03), (E4M3, -1.09), (E4M3, 0.0007), (E4M3, 440.0), (E4M3, 1.9999), (E5M2, -50000.0),
    (E5M2, 1.7e-5), (E5M2, 1.06), (formats.BF16, 1.001), (formats.BF16, -1.5e-40),
    (formats.BF16, 3.38e38), (formats.FP16, -3e-8), (formats.FP16, 1.0003), (formats.FP16, 65480.0),
    (E2M1, 0.1), (E2M1, -1.05), (E2M1, 5.9),
    (formats.E4M3_GAUDI2, 0.0007), (formats.E4M3_GAUDI2, -1.09), (formats.E4M3_GAUDI2, 237.0),
    (formats.E4M3FNUZ, 0.0007), (formats.E4M3FNUZ, -1.09), (formats.E4M3FNUZ, -237.0),
    (formats.E5M2FNUZ, 1.7e-5), (formats.E5M2FNUZ, 1.06), (formats.E5M2FNUZ, -57000.0),
    (formats.E3M2, 0.1), (formats.E3M2, -1.06), (formats.E3M2, 27.0),
    (formats.E2M3, 0.3), (formats.E2M3, -1.09), (formats.E2M3, 7.4),
]  # fmt: skip


@pytest.mark.parametrize(("fmt", "value"), STOCHASTIC)
def test_stochastic_rounding_is_unbiased(fmt: FloatFormat, value: float) -> None:
    draws = 1_000_000
    given = torch.full((draws,), value)
    value = float(given[0])
    rounded = round_to(given, fmt, "stochastic", torch.Generator().manual_seed(2)).double()
    lower = fmt.round(value, "stochastic", draw=0.99999999)
    upper = fmt.round(value, "stochastic", draw=0.0)
    assert set(rounded.unique().tolist()) == {lower, upper}
    probability = (value - lower) / (upper - lower)
    assert 0 < probability < 1
    error = math.sqrt(probability * (1 - probability) / draws)
    share = (rounded == upper).double().mean().item()
    assert abs(share - probability) < 4 * error
    again = round_to(given, fmt, "stochastic", torch.Generator().manual_seed(2))
    assert torch.equal(rounded, again.double())


@pytest.mark.parametrize("name", [n for n in ML_DTYPES if n != "FP32"])
def test_stochastic_rounding_ends_on_a_neighbour(name: str) -> None:
    fmt = FORMATS[name]
    given = torch.cat([random_patterns(20_000), neighbourhood(fmt), torch.tensor([INF, -INF])])
    if not fmt.has_nan:
        given = given[~given.isnan()]
    rounded = round_to(given, fmt, "stochastic", torch.Generator().manual_seed(3))
    toward = by_specification(given, fmt, "toward_zero")
    away = torch.tensor([fmt.round(value, "stochastic", draw=0.0) for value in given.tolist()])
    either = (bits(rounded) == bits(toward)) | (bits(rounded) == bits(away))
    assert either.all(), given[~either]
    representable = torch.tensor(list(fmt.values()))
    assert_same(round_to(representable, fmt, "stochastic"), representable)


def test_round_to_refuses() -> None:
    with pytest.raises(ValueError, match=r"round_to: torch\.float64, expected float32"):
        round_to(torch.ones(2, dtype=torch.float64), E4M3)
    with pytest.raises(ValueError, match="round_to: E8M0 is a format of scales"):
        round_to(torch.ones(2), formats.E8M0)
    with pytest.raises(ValueError, match="rounding: 'up', expected 'nearest'"):
        round_to(torch.ones(2), E4M3, "up")
    for fmt in (E4M3, formats.E2M1, formats.FP32):
        with pytest.raises(ValueError, match="round_to: overflow='saturated', expected 'satu"):
            round_to(torch.ones(2), fmt, overflow="saturated")


@pytest.mark.parametrize("fmt", [formats.E4M3_GAUDI2, E5M2], ids=repr)
def test_infinity_has_a_code_where_the_format_has_one(fmt: FloatFormat) -> None:
    given = torch.tensor([1e9, -1e9, INF, -INF, fmt.max])
    rounded = round_to(given, fmt, overflow="special")
    assert rounded.tolist() == [INF, -INF, INF, -INF, fmt.max]
    codes = codes_of(rounded, fmt)
    theirs = rounded.numpy().astype(ML_DTYPES[fmt.name]).view(np.uint8)
    assert codes.view(torch.uint8).tolist() == theirs.tolist()
    assert torch.equal(values_of(codes, fmt), rounded)


# --- amax and scale ---------------------------------------------------------------------------


def amaxes() -> np.ndarray:
    """1e5 positive float32 of every magnitude, and what has a rule of its own."""
    drawn = np.random.default_rng(1).integers(1, 0x7F800000, 100_000, dtype=np.uint32)
    special = [0.0, INF, NAN, 1e-45, 1e-38, 2.0**-126, 448.0, 57344.0, 1.0, FLOAT32_MAX]
    return np.concatenate([drawn.view(np.float32), np.array(special, dtype=np.float32)])


def divided(largest: float, amax: np.ndarray) -> np.ndarray:
    """TE's compute_scale_from_amax in numpy, whose float32 division is correctly rounded."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scale = np.minimum(np.float32(largest) / amax, np.float32(FLOAT32_MAX))
    return np.where((amax > 0) & np.isfinite(amax), scale, np.float32(1))


@pytest.mark.parametrize("fmt", [E4M3, E5M2, formats.E4M3_GAUDI2, E2M1])
@pytest.mark.parametrize("margin", [0, 1, 5, -3])
def test_scale_is_one_correctly_rounded_division(fmt: FloatFormat, margin: int) -> None:
    amax = torch.from_numpy(amaxes())
    expected = torch.from_numpy(divided(fmt.max * 2.0**-margin, amaxes()))
    assert_same(scale_for(amax, fmt, margin=margin), expected, amax)


def test_the_trap_of_the_reciprocal_is_real() -> None:
    # What `448.0 / amax` gives in torch: were it the same, the test above could not fail.
    amax = torch.rand(10_000, generator=torch.Generator().manual_seed(4)) + 0.5
    naive = 448.0 / amax
    assert 0.1 < (naive != scale_for(amax, E4M3)).double().mean() < 0.5


@pytest.mark.parametrize("fmt", [E4M3, E5M2, E2M1])
def test_powers_of_two_are_the_exponent_of_the_scale(fmt: FloatFormat) -> None:
    amax = torch.from_numpy(amaxes())
    plain = divided(fmt.max, amaxes()).tolist()
    expected = torch.tensor([math.ldexp(1.0, math.frexp(scale)[1] - 1) for scale in plain])
    assert_same(scale_for(amax, fmt, power_of_two=True), expected, amax)


@pytest.mark.parametrize("amax", [0.0, INF, NAN])
def test_an_amax_that_says_nothing_keeps_the_previous_scale(amax: float) -> None:
    assert scale_for(torch.tensor(amax), E4M3).item() == 1.0
    assert scale_for(torch.tensor(amax), E4M3, previous=torch.tensor(7.5)).item() == 7.5
    assert scale_for(torch.tensor(2.0), E4M3, previous=torch.tensor(7.5)).item() == 224.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, -3.0, 2.0], 3.0), ([NAN, -3.0], 3.0), ([NAN, NAN], 0.0), ([], 0.0), ([-0.0], 0.0),
        ([1.0, -INF], INF), ([NAN, INF], INF), ([[1.0, NAN], [-5.0, 4.0]], 5.0), (-2.0, 2.0),
    ],
)  # fmt: skip
def test_amax_ignores_nan(dtype: torch.dtype, values: Any, expected: float) -> None:
    amax = absolute_maximum(torch.tensor(values, dtype=dtype, requires_grad=True))
    assert_same(amax, torch.tensor(expected))
    assert not amax.requires_grad
    assert not torch.signbit(amax)


def test_amax_is_numpys() -> None:
    for size in (1, 7, 1000):
        tensor = random_patterns(size).reshape(1, size)
        assert absolute_maximum(tensor).item() == np.nanmax(np.abs(tensor.numpy()))


# --- quantise -----------------------------------------------------------------------------------

RECIPES = [
    Float8CurrentScaling(),
    Float8CurrentScaling(fp8_format=Format.E4M3),
    Float8CurrentScaling(use_power_2_scales=True),
    DelayedScaling(),
    DelayedScaling(fp8_format=Format.E4M3, margin=2),
    HighPrecision(),
    HighPrecision(format=formats.FP16),
    HighPrecision(format=formats.FP32),
]
every_recipe = pytest.mark.parametrize("recipe", RECIPES)
every_operand = pytest.mark.parametrize("operand", OPERANDS)


def in_plain_python(tensor: Tensor, recipe: Any, operand: str, scale: float) -> list[float]:
    """Quantise and dequantise, element by element: FloatFormat.round and numpy float32 products."""
    values = tensor.float().flatten().tolist()
    if isinstance(recipe, HighPrecision):
        return [recipe.format.round(value) for value in values]
    fmt = E5M2 if operand == "grad_output" and recipe.fp8_format == Format.HYBRID else E4M3
    factor = np.float32(scale)
    if isinstance(recipe, Float8CurrentScaling):
        amax = max((abs(value) for value in values if not math.isnan(value)), default=0.0)
        usable = 0 < amax < INF
        factor = np.float32(fmt.max) / np.float32(amax) if usable else np.float32(1)
        if recipe.use_power_2_scales:
            factor = np.float32(2.0 ** (math.frexp(factor)[1] - 1))
    inverse = np.float32(1) / factor
    codes = [fmt.round(float(np.float32(value) * factor)) for value in values]
    return [float(np.float32(code) * inverse) for code in codes]


def some_tensor(kind: str) -> Tensor:
    tensor = torch.randn(9, 13) * torch.logspace(-6, 3, 13)
    if kind == "non-finite":
        tensor[0, 0], tensor[1, 1], tensor[2, 2] = INF, -INF, NAN
    return {"zeros": torch.zeros(2, 3), "empty": torch.zeros(0, 3)}.get(kind, tensor)


@every_recipe
@every_operand
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["finite", "non-finite", "zeros", "empty"])
def test_quantize_is_plain_python(recipe: Any, operand: Any, dtype: Any, kind: str) -> None:
    tensor = some_tensor(kind).to(dtype)
    scale = torch.tensor(3.7) if isinstance(recipe, DelayedScaling) else None
    expected = torch.tensor(in_plain_python(tensor, recipe, operand, 3.7)).reshape(tensor.shape)
    quantized = quantize(tensor, recipe, operand, scale=scale)
    assert_same(quantized.dequantize(), expected, tensor)
    assert quantized.codes.shape == tensor.shape
    assert quantized.scale_inv.shape == ()
    faked = fake_quantize(tensor, recipe, operand, scale=scale)
    assert faked.dtype == dtype
    assert_same(faked.float(), expected.to(dtype).float(), tensor)


@every_operand
@pytest.mark.parametrize("factor", [3.7, 0.123, 448 / 3, 7e5])
def test_the_product_with_the_scale_is_rounded_once(operand: Any, factor: float) -> None:
    # x · scale one float32 step off is another code where it falls on the other side of a tie.
    fmt, scale = operand_format(DelayedScaling(), operand), np.float32(factor)
    values = np.array(list(fmt.values()))
    near_ties = ((values[1:] + values[:-1]) / 2 / float(scale)).astype(np.float32)
    below = above = near_ties
    steps = [near_ties]
    for _ in range(3):
        below, above = np.nextafter(below, np.float32(0)), np.nextafter(above, np.float32(INF))
        steps += [below, above]
    given = np.concatenate(steps)
    expected = torch.from_numpy((given * scale).astype(ML_DTYPES[fmt.name]).astype(np.float32))
    quantized = quantize(
        torch.from_numpy(given), DelayedScaling(), operand, scale=torch.tensor(scale)
    )
    assert_same(quantized.codes.float(), expected)
    faked = fake_quantize(
        torch.from_numpy(given), DelayedScaling(), operand, scale=torch.tensor(scale)
    )
    assert_same(faked, expected * float(np.float32(1) / scale))


def test_codes_have_the_formats_own_dtype() -> None:
    for recipe, forward, backward in (
        (Float8CurrentScaling(), torch.float8_e4m3fn, torch.float8_e5m2),
        (Float8CurrentScaling(fp8_format=Format.E4M3), torch.float8_e4m3fn, torch.float8_e4m3fn),
        (HighPrecision(), torch.bfloat16, torch.bfloat16),
    ):
        dtypes = [quantize(torch.randn(4), recipe, operand).codes.dtype for operand in OPERANDS]
        assert dtypes == [forward, forward, backward]


def test_infinity_has_the_rule_of_te() -> None:
    # Its amax is infinite, so the scale is 1; the element saturates and NaN stays NaN.
    tensor = torch.tensor([INF, -INF, NAN, 3.3, 500.0])
    quantized = quantize(tensor, Float8CurrentScaling(), "input")
    assert quantized.scale_inv.item() == 1.0
    assert_same(quantized.codes.float(), torch.tensor([448.0, -448.0, NAN, 3.25, 448.0]))


def test_a_tiny_amax_has_the_largest_scale() -> None:
    tensor = torch.tensor([1e-40, -1e-42])
    quantized = quantize(tensor, Float8CurrentScaling(), "input")
    assert quantized.scale_inv.item() == float(np.float32(1) / np.float32(FLOAT32_MAX))
    expected = by_specification(tensor * FLOAT32_MAX, E4M3)
    assert_same(quantized.codes.float(), expected)


@every_recipe
def test_the_gradient_passes_straight_through(recipe: Any) -> None:
    tensor = torch.tensor([1.07, -600.0, 0.0, 1e-9], requires_grad=True)
    scale = torch.tensor(1.0) if isinstance(recipe, DelayedScaling) else None
    incoming = torch.tensor([0.3, -1.7, 2.0, 5.0])
    fake_quantize(tensor, recipe, "input", scale=scale).backward(incoming)
    assert torch.equal(tensor.grad, incoming)


@every_operand
@pytest.mark.parametrize("function", [quantize, fake_quantize, cast_for])
def test_delayed_scaling_without_a_scale_is_refused(function: Any, operand: Any) -> None:
    with pytest.raises(ValueError, match="DelayedScaling: no scale"):
        function(torch.ones(2), DelayedScaling(), operand)


def test_current_scaling_saturates_nothing() -> None:
    # scale and x · scale are rounded: in one tensor of ten amax lands a float32 step above 448.
    lifted = 0
    for tensor in torch.rand(3000, 1, generator=torch.Generator().manual_seed(5)) + 0.01:
        how = cast_for(tensor, Float8CurrentScaling(), "input")
        lifted += int(how.scaled() > 448)
        assert not how.saturated()
    assert lifted > 100


def test_saturated_is_what_lies_beyond_max() -> None:
    tensor = torch.tensor([448.0, 448.001, -449.0, 0.0, INF, -INF, NAN])
    how = cast_for(tensor, DelayedScaling(), "input", torch.tensor(1.0))
    assert how.saturated().tolist() == [False, True, True, False, True, True, False]
    how = cast_for(tensor, DelayedScaling(), "grad_output", torch.tensor(1.0))
    assert how.saturated().tolist() == [False, False, False, False, True, True, False]


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    x, current = torch.randn(4, 128), Float8CurrentScaling()
    for out in (torch.empty(128, 4), torch.empty(4, 128).bfloat16(), torch.randn(4, 128).double()):
        with pytest.raises(
            ValueError, match=r"^fake_quantize: out: .* expected float32 \[4, 128\]"
        ):
            fake_quantize(x, current, "input", out=out)
    for scale in (2.0, torch.ones(5), torch.ones(1), torch.ones((), dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"^input: scale: .*, expected a float32 tensor"):
            cast_for(x, current, "input", scale)  # type: ignore[arg-type]
    for dtype in (torch.int64, torch.float64, torch.bool):
        with pytest.raises(
            ValueError, match=r"^weight: \w+, expected float32, bfloat16 or float16$"
        ):
            fake_quantize(x.to(dtype), current, "weight")
    for recipe in (current, Float8BlockScaling(), MXFP8BlockScaling(), HighPrecision()):
        out = torch.empty(4, 128)
        for more in ({}, {"out": out}):
            with pytest.raises(ValueError, match=r"^operand: 'inputs', expected one of input, "):
                fake_quantize(x, recipe, "inputs", **more)  # type: ignore[arg-type]
            with pytest.raises(ValueError, match=r"^input: direction='columns', expected 'roww"):
                fake_quantize(x, recipe, "input", direction="columns", **more)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"^input: int64, expected float32, bfloat16 or"):
            fake_quantize(x.long(), recipe, "input", out=out)


def test_the_result_is_memory_of_its_own() -> None:
    x = torch.randn(4, 16)
    before = x.clone()
    fake_quantize(x, HighPrecision(format=formats.FP32), "input").add_(1.0)
    assert torch.equal(x, before)
    out = torch.empty(4, 16)
    x.requires_grad_()
    fake_quantize(x, NVFP4BlockScaling(), "input", direction="columnwise", out=out)
    assert not out.requires_grad
    fake_quantize(x, NVFP4BlockScaling(), "input", direction="columnwise").relu_()
