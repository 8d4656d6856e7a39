"""Scales of blocks, rows and tensors, to the bit, against programs that are not fp8lab's.

`plain_scaling` works out small adversarial matrices one number at a time; torchao, gfloat and
ml_dtypes work out a million numbers each. Comparisons are of bits (-0.0 is not 0.0; only a NaN's
payload is free). On a CPU `fake_quantize` runs compiled code where there is a compiler and plain
torch where there is none: both are held against the same expectations.

Where torchao is not exact, what differs is named, predicted from the amaxes alone and asserted to
be all that differs:

- a block with a NaN is all NaN there; Transformer Engine's kernels, and so fp8lab, ignore NaN in
  an amax;
- the scale 2^-127 (E8M0 code 0) is stored, but the data are divided by 2^-126 (RCEIL: by 1);
- RCEIL takes ceil(log2 v) in float32, where a v a hair above 2^k has the logarithm k: the scale is
  half of what it should be and amax saturates; for a scale per row floor(log2) is as wrong a hair
  below 2^k. |k| < 128 and float32 has 24 bits, so a hair is less than 2^-18 of v;
- NVFP4: both levels of scale are rounded elsewhere, and E4M3's subnormals are not used.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import plain_scaling as plain
import pytest
import torch
from torch import Tensor
from torchao.float8.config import ScalingGranularity
from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
from torchao.float8.float8_training_tensor import LinearMMConfig
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

from fp8lab import kernels
from fp8lab.casting import cast_for, fake_quantize, quantize
from fp8lab.formats import E2M1, E4M3, FORMATS, FloatFormat
from fp8lab.recipe import (
    OPERANDS,
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    Format,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    Recipe,
    RowwiseScaling,
    operand_format,
)
from fp8lab.rounding import round_to

INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIRECTIONS = ["rowwise", "columnwise"]
PLAIN = {
    "E4M3": plain.E4M3,
    "E4M3_GAUDI2": plain.E4M3_GAUDI2,
    "E5M2": plain.E5M2,
    "E2M1": plain.E2M1,
}
ELEMENTS: dict[str, Any] = {
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
}


def bits(tensor: Tensor) -> Tensor:
    """float32 as int32, every NaN the same."""
    return torch.where(tensor.isnan(), torch.nan, tensor).view(torch.int32)


def assert_same(actual: Tensor, expected: Tensor, given: Tensor | None = None) -> None:
    assert actual.dtype == expected.dtype == torch.float32
    assert actual.shape == expected.shape
    wrong = bits(actual) != bits(expected)
    if wrong.any():
        at = wrong.nonzero()[:5].tolist()
        source = "" if given is None else f"of {given.float()[wrong][:5]} "
        pytest.fail(f"{source}came {actual[wrong][:5]}, expected {expected[wrong][:5]} at {at}")


def decoded(codes: Tensor, fmt: FloatFormat) -> Tensor:
    """Codes as float32, read by torch or, where torch has no such dtype, by ml_dtypes."""
    if codes.dtype != torch.uint8:
        return codes.float()
    return torch.from_numpy(codes.numpy().view(ELEMENTS[fmt.name]).astype(np.float32))


# --- matrices that find mistakes ----------------------------------------------------------------

# Amaxes of tiles: what has a rule of its own, and both sides of every decision about a scale.
AMAXES = [
    0.0, INF, 1e-45, 3e-42, 2.0**-127, 2.0**-126, 1.3e-36, 448 * 2.0**-127,
    448 * 2.0**-127 * (1 + 2.0**-10), 448 * 2.0**-126 * (1 + 2.0**-23), 2.0**-118, 1e-30,
    1e-12, 6e-8, 2.0**-14, 1.0, 3.7, 6.0, 2688.0, 2.0**8, 2.0**8 * (1 + 2.0**-23),
    2.0**9 * (1 - 2.0**-24), 1.9375 * 2.0**8, 1.9375 * 2.0**8 * (1 - 2.0**-24), 448.0,
    448 * (1 + 2.0**-22), 448 * (1 - 2.0**-23), 480.0, 240.0, 57344.0, 57344 * (1 + 2.0**-22),
    1.75 * 2.0**100 * (1 + 2.0**-22), 3e38, plain.FLOAT32_MAX, 65504.0,
]  # fmt: skip


def adversarial(
    shape: tuple[int, int], tile: tuple[int, int], fmt: FloatFormat, amaxes: list[float]
) -> Tensor:
    """float32: each tile has the next of `amaxes`. Of its elements a third lie on the format's ties
    under a scale of max / amax, a third on those under a power of two, both a float32 step or two
    aside; the others lie everywhere, down to zeros of both signs."""
    rng = np.random.default_rng(7)
    grid = np.array(list(fmt.values()))
    ties = (grid[1:] + grid[:-1]) / 2
    matrix = np.zeros(shape, dtype=np.float32)
    tops, lefts = range(0, shape[0], tile[0]), range(0, shape[1], tile[1])
    for count, (top, left) in enumerate(itertools.product(tops, lefts)):
        block = matrix[top : top + tile[0], left : left + tile[1]]
        amax, size = np.float32(amaxes[count % len(amaxes)]), block.size
        finite = amax if np.isfinite(amax) else np.float32(1000)
        tie, power = rng.choice(ties, size), math.frexp(finite)[1] - math.frexp(fmt.max)[1]
        kinds = [tie * (finite / fmt.max), np.ldexp(tie, power), rng.random(size) ** 9 * finite]
        values = np.choose(rng.integers(3, size=size), kinds).astype(np.float32)
        steps = rng.integers(-2, 3, size)  # the bits of a positive float ascend with it
        values = np.maximum(values.view(np.int32) + steps.astype(np.int32), 0).view(np.float32)
        values = np.minimum(values, finite)
        values[rng.integers(size)] = 0.0
        values[rng.integers(size)] = amax
        block[:] = np.where(rng.random(size) < 0.5, -values, values).reshape(block.shape)
    return torch.from_numpy(matrix)


def matrices(tile: tuple[int, int], fmt: FloatFormat, dtype: torch.dtype) -> Iterator[Tensor]:
    """Ragged at both edges, with at least as many tiles as AMAXES; then with NaN, where the format
    has one; then next to nothing."""
    height, width = tile
    if height == width:
        shape = (3, width * len(AMAXES) + 5)
        yield adversarial((height + 3, width + 1), tile, fmt, AMAXES[15:]).to(dtype)
    else:
        shape = (5, width * 8 + 3) if height == 1 else (height * 8 + 3, 5)
    yield adversarial(shape, tile, fmt, AMAXES).to(dtype)
    if fmt is E2M1:  # the largest amax makes another scale; with it the others lie on E4M3's ties
        grid = np.array(list(E4M3.values()))
        ties = (grid[1:] + grid[:-1]) / 2 / 448
        for seed, largest in enumerate((1e-40, 1e-12, 1.3, 3.7, 2688.0, 65504.0, 3e37, 3.4e38)):
            tie = np.random.default_rng(seed).choice(ties, 34)
            amaxes = [largest, *(tie * largest * (1 + np.arange(-2, 32) % 5 * 2.0**-23))]
            yield adversarial(shape, tile, fmt, amaxes).to(dtype)
    if fmt.has_nan:
        holed = adversarial(shape, tile, fmt, AMAXES[::-1])
        holed[0, ::7], holed[-1, :], holed[:, -1] = NAN, NAN, -NAN
        yield holed.to(dtype)
    yield from (torch.zeros(rows, columns, dtype=dtype) for rows, columns in [(0, 5), (5, 0)])
    yield torch.tensor([[-3.3]], dtype=dtype)


class Case(NamedTuple):
    """A recipe's cast of one operand, and the plain program's of a matrix in that tile."""

    recipe: Recipe
    operand: Any
    direction: Any
    tile: tuple[int, int]
    dtype: torch.dtype
    expected: Callable[[plain.Matrix, plain.Format], plain.Scaled]

    def __str__(self) -> str:
        fields = {k: getattr(v, "name", v) for k, v in vars(self.recipe).items()}
        default = vars(type(self.recipe)())
        own = [f"{k}={v}" for k, v in fields.items() if vars(self.recipe)[k] != default[k]]
        name = f"{type(self.recipe).__name__}({','.join(own)})"
        return f"{name}-{self.operand}-{self.direction}-{str(self.dtype).removeprefix('torch.')}"


def lying(length: int, direction: str) -> tuple[int, int]:
    return (1, length) if direction == "rowwise" else (length, 1)


def block_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        largest = {torch.bfloat16: plain.BFLOAT16_MAX, torch.float16: plain.FLOAT16_MAX}
        input_max = largest.get(dtype, plain.FLOAT32_MAX)
        for recipe, operand, direction in (
            (Float8BlockScaling(), "input", "rowwise"),
            (Float8BlockScaling(), "input", "columnwise"),
            (Float8BlockScaling(), "weight", "rowwise"),
            (Float8BlockScaling(use_f32_scales=True), "weight", "columnwise"),
            (Float8BlockScaling(), "grad_output", "columnwise"),
            (Float8BlockScaling(fp8_format=Format.HYBRID), "grad_output", "rowwise"),
            (Float8BlockScaling(use_f32_scales=True), "input", "rowwise"),
            (Float8BlockScaling(use_f32_scales=True, x_block_scaling_dim=2,
                                w_block_scaling_dim=1), "weight", "columnwise"),
            (Float8BlockScaling(use_f32_scales=True, fp8_format=Format.HYBRID),
             "grad_output", "columnwise"),
        ):  # fmt: skip
            powers = not recipe.use_f32_scales
            square = operand == "weight" and recipe.w_block_scaling_dim == 2
            tile = (128, 128) if square else lying(128, direction)

            def expected(
                m: plain.Matrix, f: plain.Format, t: Any = tile, p: Any = powers, x: Any = input_max
            ) -> plain.Scaled:
                return plain.block_scaling(m, f, t, p, x)

            yield Case(recipe, operand, direction, tile, dtype, expected)


def mx_cases() -> Iterator[Case]:
    for rounding in plain.EXPONENTS:
        plainly = MXFP8BlockScaling(scale_rounding=rounding)
        hybrid = MXFP8BlockScaling(scale_rounding=rounding, fp8_format=Format.HYBRID)
        square = MXFP8BlockScaling(scale_rounding=rounding, enable_2d_quantization=True)
        for recipe, operand, direction, tile, dtype in (
            (plainly, "input", "rowwise", (1, 32), torch.float32),
            (plainly, "input", "columnwise", (32, 1), torch.bfloat16),
            (plainly, "weight", "columnwise", (32, 1), torch.float16),
            (hybrid, "grad_output", "rowwise", (1, 32), torch.float32),
            (hybrid, "grad_output", "columnwise", (32, 1), torch.float32),
            (square, "weight", "rowwise", (32, 32), torch.float32),
            (square, "weight", "columnwise", (32, 32), torch.bfloat16),
            (square, "input", "columnwise", (32, 1), torch.float32),
        ):

            def expected(
                m: plain.Matrix, f: plain.Format, t: Any = tile, r: Any = rounding
            ) -> plain.Scaled:
                return plain.mx_scaling(m, f, t, r)

            yield Case(recipe, operand, direction, tile, dtype, expected)


def nvfp4_cases() -> Iterator[Case]:
    still = NVFP4BlockScaling(disable_rht=True, disable_stochastic_rounding=True)
    flat = NVFP4BlockScaling(
        disable_rht=True, disable_stochastic_rounding=True, disable_2d_quantization=True
    )
    for dtype in DTYPES:
        for recipe, operand, direction, tile in (
            (NVFP4BlockScaling(), "input", "rowwise", (1, 16)),
            (still, "input", "columnwise", (16, 1)),
            (still, "weight", "rowwise", (16, 16)),
            (NVFP4BlockScaling(), "weight", "columnwise", (16, 16)),
            (flat, "weight", "columnwise", (16, 1)),
            (still, "grad_output", "rowwise", (1, 16)),
        ):

            def expected(m: plain.Matrix, f: plain.Format, t: Any = tile) -> plain.Scaled:
                return plain.nvfp4_scaling(m, t)

            yield Case(recipe, operand, direction, tile, dtype, expected)


def of_case(case: Case) -> str:
    return str(case)


@pytest.fixture(params=["compiled", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the compiled kernels where they can be built, and without."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "usable", lambda tensor: False)


class Expected(NamedTuple):
    """What the plain program makes of a tensor, float32."""

    codes: Tensor
    scales: Tensor
    inverses: Tensor
    values: Tensor


def worked_out(case: Case, tensor: Tensor, fmt: FloatFormat) -> Expected:
    wanted = case.expected(tensor.float().tolist(), PLAIN[fmt.name])
    tiles = tuple(-(-size // step) for size, step in zip(tensor.shape, case.tile, strict=True))
    return Expected(
        torch.tensor(wanted.codes).reshape(tensor.shape),
        torch.tensor(wanted.scales).reshape(tiles),
        torch.tensor(wanted.inverses).reshape(tiles),
        torch.tensor(wanted.dequantized()).reshape(tensor.shape),
    )


@functools.cache  # the two paths meet the same
def all_worked_out(case: Case, fmt: FloatFormat) -> list[tuple[Tensor, Expected]]:
    tensors = matrices(case.tile, fmt, case.dtype)
    return [(tensor, worked_out(case, tensor, fmt)) for tensor in tensors]


def check(case: Case, tensor: Tensor, fmt: FloatFormat, expected: Expected) -> None:
    """Codes, scales, their reciprocals and the dequantised values: all equal."""
    arguments = tensor, case.recipe, case.operand
    codes, scales, inverses, values = expected
    how = cast_for(*arguments, direction=case.direction)
    assert (how.tile, how.format) == (case.tile, fmt)
    assert_same(how.scale, scales)
    assert_same(how.scale_inv, inverses)
    quantized = quantize(*arguments, direction=case.direction)
    assert_same(decoded(quantized.codes, fmt), codes, tensor)
    assert_same(quantized.scale_inv, inverses)
    assert_same(quantized.dequantize(), values, tensor)
    out = torch.full(tensor.shape, 7.0)
    assert fake_quantize(*arguments, direction=case.direction, out=out) is out
    assert_same(out, values, tensor)
    faked = fake_quantize(*arguments, direction=case.direction)
    assert faked.dtype == tensor.dtype
    assert_same(faked.float(), values.to(tensor.dtype).float(), tensor)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("case", [*block_cases(), *mx_cases(), *nvfp4_cases()], ids=of_case)
def test_tiles_are_plain_python(case: Case) -> None:
    fmt = operand_format(case.recipe, case.operand, case.direction)
    for tensor, expected in all_worked_out(case, fmt):
        check(case, tensor, fmt, expected)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("powers", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("fp8_format", [Format.E4M3, Format.HYBRID])
def test_rows_are_plain_python(powers: bool, dtype: Any, direction: Any, fp8_format: Any) -> None:
    recipe = RowwiseScaling(fp8_format=fp8_format, round_scales_to_power_of_2=powers)
    for operand, shape in itertools.product(OPERANDS, [(45, 37), (1, 5), (5, 1), (0, 5)]):
        fmt = operand_format(recipe, operand, direction)
        rows, columns = shape if direction == "rowwise" else shape[::-1]
        length = max(columns if direction == "rowwise" else rows, 1)
        tile = lying(length, direction)
        tensor = adversarial((rows, columns), tile, fmt, AMAXES)
        if tensor.numel() > 5:
            tensor[4, 4], tensor[9, 9] = NAN, -NAN

        def expected(
            m: plain.Matrix, f: plain.Format, t: Any = tile, p: Any = powers
        ) -> plain.Scaled:
            return plain.rowwise_scaling(m, f, t, p)

        case, tensor = Case(recipe, operand, direction, tile, dtype, expected), tensor.to(dtype)
        check(case, tensor, fmt, worked_out(case, tensor, fmt))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("powers", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("fp8_format", "operand", "direction", "name"),
    [
        (Format.HYBRID, "input", "rowwise", "E4M3"),
        (Format.HYBRID, "grad_output", "columnwise", "E5M2"),
        (Format.E4M3, "grad_output", "rowwise", "E4M3"),
        (Format.GAUDI2, "weight", "columnwise", "E4M3_GAUDI2"),
        (Format.GAUDI2_E5M2_COPIES, "input", "rowwise", "E4M3_GAUDI2"),
        (Format.GAUDI2_E5M2_COPIES, "input", "columnwise", "E5M2"),
        (Format.HYBRID_E5M2_COPIES, "weight", "columnwise", "E5M2"),
    ],
)
def test_one_scale_is_plain_python(
    powers: bool, dtype: Any, fp8_format: Any, operand: Any, direction: Any, name: str
) -> None:
    recipe = Float8CurrentScaling(use_power_2_scales=powers, fp8_format=fp8_format)
    for amax in AMAXES:
        tensor = adversarial((3, 23), (3, 23), FORMATS[name], [amax]).to(dtype)
        if amax == 3.7:
            tensor[1, 1:3] = NAN
        wanted = plain.current_scaling(tensor.float().tolist(), PLAIN[name], powers)
        how = cast_for(tensor, recipe, operand, direction=direction)
        assert (how.tile, how.format) == (None, FORMATS[name])
        assert_same(how.scale, torch.tensor(wanted.scales[0][0]))
        quantized = quantize(tensor, recipe, operand, direction=direction)
        assert_same(decoded(quantized.codes, how.format), torch.tensor(wanted.codes), tensor)
        assert_same(quantized.scale_inv, torch.tensor(wanted.inverses[0][0]))
        faked = fake_quantize(tensor, recipe, operand, direction=direction)
        values = torch.tensor(wanted.dequantized()).to(dtype)
        assert_same(faked.float(), values.float(), tensor)


@pytest.mark.parametrize("operand", ["input", "grad_output"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [16, 48, 5, 37])
def test_the_hadamard_transform_of_small_integers_is_exact(
    operand: Any, dtype: Any, tokens: int
) -> None:
    # Their sums fit bfloat16, so that no order of summation and no rounding can tell.
    recipe = NVFP4BlockScaling(disable_stochastic_rounding=True)
    generator = torch.Generator().manual_seed(8)
    tensor = torch.randint(-8, 9, (tokens, 21), generator=generator).to(dtype)
    turned = plain.hadamard_transform(tensor.float().tolist())
    how = cast_for(tensor, recipe, operand, direction="columnwise")
    assert how.rotated
    assert_same(how.tensor.float(), torch.tensor(turned))
    wanted = plain.nvfp4_scaling(turned, (16, 1))
    assert_same(how.scale, torch.tensor(wanted.scales))
    assert_same(how.fake_quantized(), torch.tensor(wanted.dequantized()))
    # Turned back, it is what was there, up to what four bits lose.
    back = fake_quantize(tensor, recipe, operand, direction="columnwise")
    assert back.shape == tensor.shape
    assert (back - tensor).float().norm() < 0.15 * tensor.float().norm()


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "recipe",
    [
        Float8CurrentScaling(),
        Float8BlockScaling(),
        MXFP8BlockScaling(),
        NVFP4BlockScaling(disable_stochastic_rounding=True),
        RowwiseScaling(),
        RowwiseScaling(high_precision_grad_weight=True),
    ],
)
def test_leading_axes_are_tokens_and_strides_do_not_matter(recipe: Recipe, direction: Any) -> None:
    shapes = [(3, 5, 300), (8,), (), (0,), (1, 0), (2, 0, 3), (3, 1, 1)]
    for operand, shape in itertools.product(OPERANDS, shapes):
        every_other = torch.randn(*shape, 2)[..., 1]
        for tensor in (every_other, every_other.transpose(0, -1) if shape else every_other):
            columns = tensor.shape[-1] if shape else 1
            matrix = tensor.reshape(math.prod(tensor.shape[:-1]), columns)
            expected = fake_quantize(matrix.contiguous(), recipe, operand, direction=direction)
            out = torch.empty(tensor.shape)
            fake_quantize(tensor, recipe, operand, direction=direction, out=out)
            assert_same(out, expected.view(tensor.shape))
            assert_same(fake_quantize(tensor, recipe, operand, direction=direction), out)
            quantized = quantize(tensor, recipe, operand, direction=direction)
            if not cast_for(tensor, recipe, operand, direction=direction).rotated:
                assert quantized.codes.shape == tensor.shape
                assert_same(quantized.dequantize(), out)


def test_a_nan_has_no_code_in_four_bits() -> None:
    tensor = torch.tensor([[1.0, NAN]])
    with pytest.raises(ValueError, match="E2M1: NaN cannot be represented"):
        quantize(tensor, NVFP4BlockScaling(), "input")
    faked = fake_quantize(tensor, NVFP4BlockScaling(), "input")
    assert_same(faked, torch.tensor([[1.0, NAN]]))


# --- a million values against other libraries ---------------------------------------------------


def million(dtype: torch.dtype, length: int) -> Tensor:
    """[2^20 / length, length]: each row has a magnitude of its own, of all that float32 has. Among
    the rows are such with E4M3's ties, with an amax some steps beside 448 · 2^k, 57344 · 2^k, 2^k
    and what "even" rounds up; among the elements zeros of both signs, infinities and NaNs."""
    rng = np.random.default_rng(9)
    rows = (1 << 20) // length
    powers = np.ldexp(1.0, rng.integers(-149, 128, (rows, 1)))
    grid = np.array(list(E4M3.values()))
    ties = rng.choice((grid[1:] + grid[:-1]) / 2 / 512, (rows, length)) * powers
    spread = rng.uniform(-1, 1, (rows, length)) * powers / 4
    values = np.where(rng.random((rows, 1)) < 0.3, ties, spread).astype(np.float32)
    edge = rng.choice([448, 512, 480, 496, 460], rows) * powers[:, 0] / 512
    steps = rng.integers(-9, 10, rows, dtype=np.int32)
    edge = np.maximum(edge.astype(np.float32).view(np.int32) + steps, 0).view(np.float32)
    on_edge = rng.random(rows) < 0.3
    values[on_edge] /= 8
    values[on_edge, 3] = edge[on_edge]
    values.reshape(-1)[rng.choice(values.size, 300)] = rng.choice([INF, -INF, NAN, 0.0, -0.0], 300)
    values[::997] = 0.0
    return torch.from_numpy(values).to(dtype)


MODES = [
    ("up", ScaleCalculationMode.RCEIL),
    ("ocp_floor", ScaleCalculationMode.FLOOR),
    ("ceil", ScaleCalculationMode.CEIL),
    ("even", ScaleCalculationMode.EVEN),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operand", ["input", "grad_output"])
@pytest.mark.parametrize(("rounding", "mode"), MODES)
def test_mx_is_torchaos(rounding: Any, mode: Any, operand: Any, dtype: torch.dtype) -> None:
    recipe = MXFP8BlockScaling(scale_rounding=rounding, fp8_format=Format.HYBRID)
    tensor = million(dtype, 32).view(-1, 1024)
    ours = quantize(tensor, recipe, operand)
    exponents, codes = to_mx(tensor, ours.codes.dtype, 32, mode)
    blocks = tensor.float().view(len(tensor), -1, 32)
    has_nan = blocks.isnan().any(-1)
    amax = blocks.abs().amax(-1).double()
    wrong_scale = has_nan
    if rounding == "up":
        ratio = amax / ours.format.max
        above = ratio / torch.exp2(torch.floor(torch.log2(ratio)))
        wrong_scale = has_nan | ((above > 1) & (above < 1 + 2.0**-18))
    theirs = exponents.view(torch.uint8).int()
    own = torch.round(torch.log2(ours.scale_inv.double()) + 127).int()
    differs = own != theirs
    assert not (differs & ~wrong_scale).any()
    assert (theirs[has_nan] == 255).all()
    off = differs & ~has_nan
    assert (theirs - own)[off].eq(-1).all()
    assert off.any() == (rounding == "up" and dtype == torch.float32)
    # What is compared to the bit, and the data of E8M0 code 0 where the amax is not zero either.
    known = ~(differs | (theirs == 0) | has_nan)
    assert known.double().mean() > 0.8
    own_codes = ours.codes.float().view(blocks.shape)
    their_codes = codes.float().view(blocks.shape)
    assert_same(own_codes[known], their_codes[known], blocks[known])
    smallest = (theirs == 0) & (own == 0)
    divisor = 1.0 if rounding == "up" else 2.0**-126
    largest = ours.format.max
    scaled = (blocks[smallest] / divisor).clamp(-largest, largest).to(ours.codes.dtype)
    assert_same(their_codes[smallest], scaled.float())
    assert smallest.sum() > 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("operand", ["input", "grad_output"])
@pytest.mark.parametrize("powers", [False, True])
def test_rows_are_torchaos(powers: bool, operand: Any, direction: Any, dtype: torch.dtype) -> None:
    recipe = RowwiseScaling(fp8_format=Format.HYBRID, round_scales_to_power_of_2=powers)
    tensor = million(dtype, 256)
    if direction == "columnwise":
        tensor = tensor.t().contiguous()
    ours = quantize(tensor, recipe, operand, direction=direction)
    config = LinearMMConfig()
    theirs = hp_tensor_to_float8_dynamic(
        tensor,
        ours.codes.dtype,
        config,
        scaling_granularity=ScalingGranularity.AXISWISE,
        axiswise_dim=-1 if direction == "rowwise" else 0,
        round_scales_to_power_of_2=powers,
    )
    own = cast_for(tensor, recipe, operand, direction=direction).scale
    exact = own == theirs._scale
    exact |= own.isnan() & theirs._scale.isnan()
    if powers:
        plainly = RowwiseScaling(fp8_format=Format.HYBRID, round_scales_to_power_of_2=False)
        scale = cast_for(tensor, plainly, operand, direction=direction).scale
        below = (scale / own)[~exact]
        assert (below > 2 * (1 - 2.0**-18)).all()
        assert (theirs._scale[~exact] == own[~exact] * 2).all()
        assert 0 < below.numel() < 0.1 * own.numel() or dtype == torch.bfloat16
    assert exact.double().mean() > 0.9
    exact = exact.expand_as(tensor)
    assert_same(ours.codes.float()[exact], theirs._data.float()[exact], tensor[exact])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("powers", [False, True])
@pytest.mark.parametrize("operand", ["input", "grad_output"])
def test_one_scale_is_torchaos(operand: Any, powers: bool, dtype: torch.dtype) -> None:
    # Tensors of an amax from 1e-12 on, torchao's least; without infinity, its rule for which is 0.
    recipe = Float8CurrentScaling(use_power_2_scales=powers)
    for number, factor in enumerate((3.7e-12, 1e-3, 1.0, 1.00001, 7.3, 1e30)):
        tensor = torch.randn(1 << 18, generator=torch.Generator().manual_seed(number)) * factor
        ours = quantize(tensor.to(dtype), recipe, operand)
        theirs = hp_tensor_to_float8_dynamic(
            tensor.to(dtype), ours.codes.dtype, LinearMMConfig(), round_scales_to_power_of_2=powers
        )
        assert_same(ours.scale_inv, theirs._scale.reciprocal())
        assert_same(ours.codes.float(), theirs._data.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_is_nearly_torchaos(dtype: torch.dtype) -> None:
    # torchao divides by 6 and by amax / 2688 where Transformer Engine multiplies by fp32(1 / 6) and
    # 2688 / amax. So a scale may be a step of E4M3 away where it meets a tie (of bfloat16: 7 in a
    # thousand), an element a step of E2M1 where it meets one. Where the scale is a subnormal of
    # E4M3 torchao takes the smallest normal number.
    generator = torch.Generator().manual_seed(10)
    powers = torch.logspace(-4, 0.5, 256)[:, None]
    same_scales, same_codes, subnormal = [], [], 0
    for factor in (1.0, 1.137, 3.7e-9, 7.77, 2.9e8):
        tensor = (torch.randn(256, 1024, generator=generator) * powers * factor).to(dtype)
        amax = tensor.float().abs().max()
        ours = quantize(tensor, NVFP4BlockScaling(), "input")
        scales, packed = nvfp4_quantize(tensor, 16, per_tensor_amax_to_scale(amax))
        theirs = torch.stack([packed & 15, packed >> 4], -1).view(tensor.shape)
        own = (ours.scale_inv * (2688 / amax)).to(torch.float8_e4m3fn)
        normal = own.float() >= 2.0**-6
        assert (scales.float()[~normal] == 2.0**-6).all()
        step = own.view(torch.uint8).int() - scales.view(torch.uint8).int()
        assert step[normal].abs().max() <= 1
        same = (step == 0).repeat_interleave(16, 1)
        apart = ours.codes[same].int() - theirs[same].int()
        assert apart.abs().max() <= 1
        same_scales.append((step == 0)[normal])
        same_codes.append(apart == 0)
        subnormal += int((~normal).sum())
    assert torch.cat(same_scales).double().mean() > 0.99
    assert torch.cat(same_codes).double().mean() > 0.999
    assert subnormal > 1000


GFLOAT = {
    "E4M3": gfloat.formats.format_info_ocp_e4m3,
    "E5M2": gfloat.formats.format_info_ocp_e5m2,
    "E3M2": gfloat.formats.format_info_ocp_e3m2,
    "E2M3": gfloat.formats.format_info_ocp_e2m3,
    "E2M1": gfloat.formats.format_info_ocp_e2m1,
    "BF16": gfloat.formats.format_info_bfloat16,
    "FP16": gfloat.formats.format_info_binary16,
}


def patterns_near(fmt: FloatFormat) -> Tensor:
    """float32 [10^6]: half any bit pattern, half of the format's own exponents and a few around."""
    rng = np.random.default_rng(11)
    anything = rng.integers(0, 1 << 32, 500_000, dtype=np.uint32).view(np.float32)
    low, high = fmt.min_exponent - fmt.mantissa_bits - 3, fmt.max_exponent + 3
    exponents = rng.integers(max(low, -149), min(high, 127), 500_000)
    fractions = rng.integers(0, 1 << (fmt.mantissa_bits + 3), 500_000) * 2.0 ** -(
        fmt.mantissa_bits + 3
    )
    near = np.ldexp(rng.choice([-1, 1], 500_000) * (1 + fractions), exponents).astype(np.float32)
    return torch.from_numpy(np.concatenate([anything, near]))


@pytest.mark.parametrize("name", ELEMENTS)
def test_a_million_elements_are_those_of_ml_dtypes(name: str) -> None:
    fmt = FORMATS[name]
    given = patterns_near(fmt)
    given = given if fmt.has_nan else given[~given.isnan()]
    clamped = given.clamp(-fmt.max, fmt.max) if fmt.overflow == "saturate" else given
    with np.errstate(over="ignore", invalid="ignore"):
        expected = clamped.numpy().astype(ELEMENTS[name]).astype(np.float32)
    assert_same(round_to(given, fmt), torch.from_numpy(expected), given)


@pytest.mark.parametrize("name", GFLOAT)
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
def test_a_million_elements_are_those_of_gfloat(name: str, rounding: Any) -> None:
    fmt = FORMATS[name]
    given = patterns_near(fmt)
    given = given if fmt.has_nan else given[~given.isnan()]
    mode = {"nearest": gfloat.RoundMode.TiesToEven, "toward_zero": gfloat.RoundMode.TowardZero}
    for overflow in ("saturate", "special") if fmt.has_nan else ("saturate",):
        if overflow == "special":  # gfloat takes its time
            given = given[::5]
        with np.errstate(all="ignore"):
            wide, saturates = given.double().numpy(), overflow == "saturate"
            expected = gfloat.round_ndarray(GFLOAT[name], wide, mode[rounding], saturates)
        rounded = round_to(given, fmt, rounding, overflow=overflow)
        assert_same(rounded, torch.from_numpy(expected).float(), given)


@pytest.mark.parametrize("operand", ["input", "grad_output"])
def test_the_ocp_floor_is_gfloats(operand: Any) -> None:
    recipe = MXFP8BlockScaling(scale_rounding="ocp_floor", fp8_format=Format.HYBRID)
    blocks = million(torch.float32, 32)
    blocks = blocks[blocks.isfinite().all(-1)][:3000]
    how = cast_for(blocks, recipe, operand)
    wide = blocks.double().numpy()  # in float32 its log2 would be inexact, as torchao's
    info = GFLOAT[how.format.name]
    scales = np.array([[gfloat.compute_scale_amax(info.emax, block)] for block in wide])
    assert_same(how.scale_inv, torch.from_numpy(scales).float())
    expected = gfloat.round_ndarray(info, wide / scales, gfloat.RoundMode.TiesToEven, True)
    codes = decoded(quantize(blocks, recipe, operand).codes, how.format)
    assert_same(codes, torch.from_numpy(expected).float(), blocks)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "recipe",
    [
        NVFP4BlockScaling(),
        Float8CurrentScaling(stochastic_rounding=True),
        DelayedScaling(stochastic_rounding=True),
    ],
)
def test_gradients_are_rounded_stochastically(recipe: Recipe, direction: Any) -> None:
    tensor = torch.randn(48, 80)
    scale = torch.tensor(3.7) if isinstance(recipe, DelayedScaling) else None
    how = cast_for(tensor, recipe, "grad_output", scale, direction)
    scaled = how.scaled().double()
    lower = round_to(how.scaled(), how.format, "toward_zero").double()
    rounded = torch.stack([how.rounded() for _ in range(300)]).double()
    inside = scaled.abs() < how.format.max
    steps = ((rounded - lower) * scaled.sign())[:, inside]
    upper = steps.amax(0)
    assert (steps.eq(0) | steps.eq(upper)).all()
    probability = (scaled - lower).abs()[inside] / upper.clamp(min=1e-9)
    known = (upper > 0) & (probability < 1)
    assert known.double().mean() > 0.9
    variance = (upper**2 * probability * (1 - probability))[known].sum() / len(rounded)
    bias = (steps.mean(0) - (scaled - lower).abs()[inside])[known].sum()
    assert bias.abs() < 4 * variance.sqrt()
    for operand in ("input", "weight"):
        assert cast_for(tensor, recipe, operand, scale, direction).rounding == "nearest"
