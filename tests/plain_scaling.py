"""Scaling recipes in scalar form: one number at a time, from the published formulas alone.

What fp8lab does in tensors and in C is done here a second time by someone who has neither: nothing
but the standard library is imported, and nothing was derived from fp8lab. The sources are

- Transformer Engine 2.20, the headers of its source distribution (common/recipe/recipe_common.cuh,
  common/util/ptx.cuh, common/util/ptx_arch_spec.cuh, common/cast/mxfp8/quantize_mxfp8.cuh,
  common/cast/nvfp4/core_nvfp4.cuh and quantize_transpose_nvfp4.cuh) and its Python reference
  (pytorch/custom_recipes/reference_nvfp4.py);
- OCP Microscaling Formats 1.0, 6.3, and torchao 0.18 for the names of its variants;
- torchao 0.18, float8/float8_utils.py, for a scale per row.

Numbers are Python floats that hold float32 values. Arithmetic is float32's, correctly rounded: a
product of two float32 is exact in binary64 (24 + 24 bits of 53, exponents far inside), so that one
rounding by `struct` is the only one; a quotient is exact as a fraction and rounded by hand, for
binary64 would round a subnormal one twice. A matrix is a list of rows. Codes are written as the
numbers they stand for, which tells them apart but for the payload of NaN.

Cost: some microseconds a number. Rejected: numpy's float32, which is exact too, but is what the
other tests use, and whose every expression would need a proof of what it promotes to.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

Matrix = list[list[float]]
Tile = tuple[int, int]
FLOAT32_MAX = (2 - 2.0**-23) * 2.0**127
BFLOAT16_MAX = (2 - 2.0**-7) * 2.0**127
FLOAT16_MAX = 65504.0


class Format(NamedTuple):
    """An element format: its largest finite number, and where its subnormals begin."""

    mantissa_bits: int
    min_exponent: int
    max: float

    @property
    def max_exponent(self) -> int:
        return math.frexp(self.max)[1] - 1


E4M3 = Format(3, -6, 448.0)
E4M3_GAUDI2 = Format(3, -6, 240.0)
E5M2 = Format(2, -14, 57344.0)
E2M1 = Format(1, 0, 6.0)


class Scaled(NamedTuple):
    """Codes of the matrix; of every tile the factor before rounding and the one after it."""

    codes: Matrix
    scales: Matrix
    inverses: Matrix
    tile: Tile

    def dequantized(self) -> Matrix:
        """code · inverse, in float32."""
        height, width = self.tile
        return [
            [times(code, self.inverses[i // height][j // width]) for j, code in enumerate(row)]
            for i, row in enumerate(self.codes)
        ]


# --- float32 ------------------------------------------------------------------------------------


def float32(value: float) -> float:
    """A binary64 rounded to float32, ties to even; beyond the largest it is infinite."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def times(left: float, right: float) -> float:
    """The float32 product, rounded once."""
    return float32(left * right)


def divide(dividend: float, divisor: float) -> float:
    """The float32 quotient of a positive number by one that may be 0 or infinite, rounded once."""
    if divisor == 0:
        return math.inf
    if math.isinf(divisor):
        return 0.0
    exact = Fraction(dividend) / Fraction(divisor)
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    if exact < Fraction(2) ** exponent:
        exponent -= 1
    quantum = max(exponent, -126) - 23
    quotient = math.ldexp(round(exact / Fraction(2) ** quantum), quantum)
    return quotient if quotient <= FLOAT32_MAX else math.inf


def floor_to_power_of_two(value: float) -> float:
    """A float32 without its mantissa: 0 and infinity stay, and so, unlike its bits, does NaN."""
    if value == 0 or not math.isfinite(value):
        return value
    return math.ldexp(0.5, math.frexp(value)[1])


# --- elements and tiles -------------------------------------------------------------------------


def nearest(value: float, fmt: Format) -> float:
    """The nearest number of the format, ties to even, saturating (PTX `cvt.rn.satfinite`)."""
    if math.isnan(value):
        return value
    magnitude = abs(value)
    if magnitude >= fmt.max:
        return math.copysign(fmt.max, value)
    exponent = max(math.frexp(magnitude)[1] - 1, fmt.min_exponent)
    quantum = 2.0 ** (exponent - fmt.mantissa_bits)
    return math.copysign(round(magnitude / quantum) * quantum, value)


def absolute_maximum(values: list[float]) -> float:
    """The largest magnitude, NaN ignored; 0 of nothing (every kernel of TE: fmaxf from 0)."""
    return max((abs(value) for value in values if not math.isnan(value)), default=0.0)


def tiles(matrix: Matrix, tile: Tile) -> Iterator[tuple[int, int, list[float]]]:
    """(tile row, tile column, its elements); a tile cut off at an edge is a tile."""
    height, width = tile
    for top in range(0, len(matrix), height):
        rows = matrix[top : top + height]
        for left in range(0, len(rows[0]), width):
            values = [value for row in rows for value in row[left : left + width]]
            yield top // height, left // width, values


def scaled(
    matrix: Matrix, fmt: Format, tile: Tile, factors: Callable[[list[float]], tuple[float, float]]
) -> Scaled:
    """`factors` makes of a tile's elements (factor before rounding, factor after it)."""
    rows, columns = len(matrix), len(matrix[0]) if matrix else 0
    count = -(-columns // tile[1])
    scales = [[math.nan] * count for _ in range(-(-rows // tile[0]))]
    inverses = [row[:] for row in scales]
    for i, j, values in tiles(matrix, tile):
        scales[i][j], inverses[i][j] = factors(values)
    codes = [
        [
            nearest(times(value, scales[i // tile[0]][j // tile[1]]), fmt)
            for j, value in enumerate(row)
        ]
        for i, row in enumerate(matrix)
    ]
    return Scaled(codes, scales, inverses, tile)


# --- one float32 scale per tensor or per tile ---------------------------------------------------


def scale_from_amax(
    amax: float, largest: float, power_of_two: bool, value_for_infinity: float
) -> float:
    """recipe_common.cuh, compute_scale_from_amax, with its default epsilon of 0."""
    if math.isinf(amax) or amax == 0 or math.isnan(amax):
        return 1.0
    scale = divide(largest, amax)
    if math.isinf(scale):
        scale = value_for_infinity
    return floor_to_power_of_two(scale) if power_of_two else scale


def current_scaling(matrix: Matrix, fmt: Format, power_of_two: bool = False) -> Scaled:
    """One scale, whatever the input's dtype (value_for_inf = FLT_MAX)."""
    whole = max(len(matrix), 1), max((len(row) for row in matrix), default=0) or 1
    return block_scaling(matrix, fmt, whole, power_of_two, FLOAT32_MAX)


def block_scaling(
    matrix: Matrix, fmt: Format, tile: Tile, power_of_two: bool, input_max: float
) -> Scaled:
    """recipe_common.cuh, compute_scale_from_types: an infinite scale becomes `input_max`, the
    largest finite number of the input's dtype. Tiles are 1 × 128, 128 × 1 or 128 × 128."""

    def factors(values: list[float]) -> tuple[float, float]:
        amax = absolute_maximum(values)
        scale = scale_from_amax(amax, fmt.max, power_of_two, input_max)
        return scale, divide(1.0, scale)  # __frcp_rn

    return scaled(matrix, fmt, tile, factors)


# --- one E8M0 scale per tile --------------------------------------------------------------------


def exponent_up(amax: float, fmt: Format) -> int:
    """TE: amax · fp32(1 / max), rounded up to a power of two from 2^-127 to 2^127.

    ptx_arch_spec.cuh, float_to_e8m0 (PTX `cvt.rp.satfinite.ue8m0x2.f32`); torchao's RCEIL.
    """
    value = times(amax, divide(1.0, fmt.max))
    if value == 0:
        return -127
    if math.isinf(value):
        return 127
    mantissa, exponent = math.frexp(value)  # in [1/2, 1): 1/2 is a power of two
    return min(max(exponent - (mantissa == 0.5), -127), 127)


def exponent_floor(amax: float, fmt: Format) -> int:
    """OCP MX 1.0, 6.3: floor(log2 amax) - emax(format); torchao's FLOOR."""
    return _in_e8m0(_floor_of_log2(amax) - fmt.max_exponent)


def exponent_ceil(amax: float, fmt: Format) -> int:
    """The same with ceil(log2 amax); torchao's CEIL."""
    above = math.isfinite(amax) and amax != 0 and math.frexp(amax)[0] != 0.5
    return _in_e8m0(_floor_of_log2(amax) + above - fmt.max_exponent)


def exponent_even(amax: float, fmt: Format) -> int:
    """The OCP floor of an amax first rounded to the format's mantissa; torchao's EVEN.

    Only the rounding that carries into the next power of two matters, from half a step below it on.
    """
    carries = math.isfinite(amax) and math.frexp(amax)[0] >= 1 - 2.0 ** -(fmt.mantissa_bits + 2)
    return _in_e8m0(_floor_of_log2(amax) + carries - fmt.max_exponent)


def _floor_of_log2(amax: float) -> int:
    """What float32's exponent field says: infinity reads as 2^128, and 0 as what lies below all."""
    if math.isinf(amax):
        return 128
    return math.frexp(amax)[1] - 1 if amax else -(2**10)


def _in_e8m0(exponent: int) -> int:
    return min(max(exponent, -127), 127)


EXPONENTS = {
    "up": exponent_up,
    "ocp_floor": exponent_floor,
    "ceil": exponent_ceil,
    "even": exponent_even,
}


def mx_scaling(matrix: Matrix, fmt: Format, tile: Tile, rounding: str = "up") -> Scaled:
    """quantize_mxfp8.cuh: x · exp2f_rcp(code), and 2^(code - 127) after it.

    Tiles are 1 × 32, 32 × 1 or 32 × 32. As everywhere amax ignores NaN: no tile has E8M0's NaN.
    """

    def factors(values: list[float]) -> tuple[float, float]:
        exponent = EXPONENTS[rounding](absolute_maximum(values), fmt)
        return math.ldexp(1.0, -exponent), math.ldexp(1.0, exponent)

    return scaled(matrix, fmt, tile, factors)


# --- NVFP4: an E4M3 scale per tile and a float32 scale per tensor -------------------------------


def nvfp4_scaling(matrix: Matrix, tile: Tile) -> Scaled:
    """core_nvfp4.cuh, quantize_transpose_nvfp4.cuh; tiles are 1 × 16, 16 × 1 or 16 × 16.

    The factor after rounding is E4M3 scale · (1 / global scale), the one whose reciprocal is the
    factor before it.
    """
    amax = absolute_maximum([value for row in matrix for value in row])
    # compute_global_encode_scaling_factor_FP4
    encode = min(divide(448.0 * 6.0, amax), FLOAT32_MAX)
    if amax == 0 or encode == 0:
        encode = 1.0
    decode = divide(1.0, encode)

    def factors(values: list[float]) -> tuple[float, float]:
        # compute_decoding_scaling_factor
        exact = times(absolute_maximum(values), times(encode, divide(1.0, 6.0)))
        block = nearest(min(exact, FLOAT32_MAX), E4M3)
        inverse = times(block, decode)
        return min(divide(1.0, inverse), FLOAT32_MAX), inverse

    return scaled(matrix, E2M1, tile, factors)


# reference_nvfp4.py, get_wgrad_sign_vector
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def hadamard_transform(matrix: Matrix) -> Matrix:
    """Sixteen rows at a time, zeros below the last: row j = Σ_i x_i · sign_i · H_ij / 4.

    H_ij = (-1)^(number of bits that i and j share), Sylvester's matrix. The sum is exact; float32
    gives the same where its own are, for small integers. Source: reference_nvfp4.py, _apply_rht,
    of the transposed tensor.
    """
    columns = len(matrix[0]) if matrix else 0
    padded = matrix + [[0.0] * columns] * (-len(matrix) % 16)
    turned: Matrix = []
    for top in range(0, len(padded), 16):
        for j in range(16):
            signs = [sign * (-1) ** (i & j).bit_count() for i, sign in enumerate(SIGNS)]
            rows = list(zip(signs, padded[top : top + 16], strict=True))
            turned.append([math.fsum(s * row[k] for s, row in rows) / 4 for k in range(columns)])
    return turned


# --- one scale per row or column ----------------------------------------------------------------


def rowwise_scaling(matrix: Matrix, fmt: Format, tile: Tile, power_of_two: bool) -> Scaled:
    """torchao's float8_utils.py, amax_to_scale: a binary64 division, an amax of at least 1e-12.

    Here NaN goes on: torch's maximum has it, and the whole row becomes NaN. Rounding down to a
    power of two is exact; torchao's exp2(floor(log2 scale)) is not, see the test.
    """

    def factors(values: list[float]) -> tuple[float, float]:
        if any(math.isnan(value) for value in values):
            return math.nan, math.nan
        scale = float32(fmt.max / max(absolute_maximum(values), 1e-12))
        if power_of_two:
            scale = floor_to_power_of_two(scale)
        return scale, divide(1.0, scale)

    return scaled(matrix, fmt, tile, factors)
