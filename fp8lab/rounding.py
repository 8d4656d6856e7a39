"""Tensors rounded to a format, and formats' codes. Plain torch.

`formats.FloatFormat.round` is the specification, scalar and exact; this is the same for tensors, on
any device, tested against it on every value, midpoint and neighbour. What torch's own casts can do
they do, after a clamp: what they do on overflow changed between releases.

Cost: three passes where torch has the format, a dozen elsewhere. The codes of formats that torch
lacks are looked up in the list of their values, for codes ascend with magnitude in every format.
Rejected: arithmetic on bit patterns in eager torch, slower than torch's own casts.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from fp8lab import formats
from fp8lab.formats import FloatFormat, Overflow, Rounding

# Formats whose rounding torch does itself (nearest, ties to even).
NATIVE: dict[FloatFormat, torch.dtype] = {
    formats.E4M3: torch.float8_e4m3fn,
    formats.E4M3FNUZ: torch.float8_e4m3fnuz,
    formats.E5M2: torch.float8_e5m2,
    formats.E5M2FNUZ: torch.float8_e5m2fnuz,
    formats.BF16: torch.bfloat16,
    formats.FP16: torch.float16,
    formats.FP32: torch.float32,
}
FORMAT_OF = {dtype: fmt for fmt, dtype in NATIVE.items()}
# What a format's values are rounded from; float64 would be rounded twice.
ROUNDED_ONCE = (torch.float32, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    """What a dtype is called in reports: the name of its format, or torch's."""
    return FORMAT_OF[dtype].name if dtype in FORMAT_OF else str(dtype).removeprefix("torch.")


def round_to(
    tensor: Tensor,
    fmt: FloatFormat,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
    overflow: Overflow | None = None,
) -> Tensor:
    """Each element rounded to the nearest value of `fmt`, in the dtype of `tensor`.

    Any shape; float32, bfloat16 or float16. Ties go to even; `"stochastic"` rounds up with the
    probability of the distance to the lower neighbour, drawn from `generator`. `overflow` is the
    format's own (`FloatFormat.overflow`) unless given; NaN stays NaN. `FloatFormat.round` is the
    specification.

    Raises ValueError for float64 (its values would be rounded twice), for E8M0, which holds
    scales and not elements, for `overflow="special"` in a format without infinity and NaN, and for
    a rounding or an overflow that is none.
    """
    if tensor.dtype not in ROUNDED_ONCE:
        raise ValueError(f"round_to: {tensor.dtype}, expected float32, bfloat16 or float16")
    if not fmt.signed:
        raise ValueError(f"round_to: {fmt.name} is a format of scales, expected one of elements")
    if overflow not in (None, "saturate", "special"):
        raise ValueError(f"round_to: overflow={overflow!r}, expected 'saturate' or 'special'")
    if overflow == "special" and fmt.top == "finite":
        raise ValueError(f"round_to: overflow={overflow!r}: {fmt.name} has no infinity and no NaN")
    rounded = round_float32(tensor.float(), fmt, rounding, generator, overflow).to(tensor.dtype)
    return rounded.clone() if rounded is tensor else rounded  # FP32 of float32: nothing to round


def round_float32(
    values: Tensor,
    fmt: FloatFormat,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
    overflow: Overflow | None = None,
) -> Tensor:
    """`round_to` for float32, unchecked; FP32 returns the tensor itself."""
    if rounding == "nearest" and fmt in NATIVE and overflow in (None, fmt.overflow):
        if fmt.overflow == "saturate":
            values = values.clamp(-fmt.max, fmt.max)
        return values.to(NATIVE[fmt]).float()
    return _round_by_quantum(values, fmt, rounding, generator, overflow or fmt.overflow)


def _round_by_quantum(
    values: Tensor,
    fmt: FloatFormat,
    rounding: Rounding,
    generator: torch.Generator | None,
    overflow: Overflow,
) -> Tensor:
    """The specification's own steps, for formats and roundings that torch does not have."""
    # In float64 every value and every quantum of every format is normal, and the quotient exact. A
    # power of two is made from its bits: what ldexp and pow return is not promised to be one, and
    # frexp of a DTensor is none before torch 2.13.
    wide = values.double()
    # Not `>>` and `<<`, which give back a DTensor as it is (torch 2.13).
    biased = torch.bitwise_right_shift(wide.view(torch.int64), 52).bitwise_and(0x7FF)
    biased = biased.clamp(min=fmt.min_exponent + 1023) - fmt.mantissa_bits
    quantum = torch.bitwise_left_shift(biased, 52).view(torch.float64)
    quotient = wide / quantum
    if rounding == "nearest":
        steps = quotient.round()
    elif rounding == "toward_zero":
        steps = quotient.trunc()
    elif rounding == "stochastic":
        draws = torch.rand(
            values.shape, dtype=torch.float64, device=values.device, generator=generator
        )
        magnitude = quotient.abs()
        lower = magnitude.floor()
        steps = torch.copysign(lower + (draws < magnitude - lower), quotient)
    else:
        expected = "'nearest', 'toward_zero' or 'stochastic'"
        raise ValueError(f"rounding: {rounding!r}, expected {expected}")
    rounded = steps * quantum
    if rounding == "toward_zero":
        rounded = rounded.clamp(-fmt.max, fmt.max)
    rounded = torch.where(values.isinf(), wide, rounded)
    if overflow == "saturate":
        rounded = rounded.clamp(-fmt.max, fmt.max)
    else:
        beyond = torch.inf if fmt.has_infinity else torch.nan
        rounded = torch.where(rounded.abs() > fmt.max, rounded * beyond, rounded)
    if fmt.top == "fnuz":
        rounded = rounded + 0.0  # -0.0 + 0.0 is +0.0: the format has no negative zero
    return rounded.float()


def codes_of(rounded: Tensor, fmt: FloatFormat) -> Tensor:
    """The codes of values of `fmt`: in the format's own torch dtype, or uint8 bit patterns.

    float32, any shape; infinity where the format has one. Raises ValueError for NaN in a format
    that has none.
    """
    if fmt in NATIVE:
        return rounded.to(NATIVE[fmt])
    values = _values(fmt, rounded.device)
    codes = torch.searchsorted(values, rounded.abs().contiguous())
    is_nan = rounded.isnan()
    if fmt.has_nan:
        codes[is_nan] = (1 << (fmt.bits - 1)) - 1  # every bit but the sign
    elif is_nan.any():
        raise ValueError(f"{fmt.name}: NaN cannot be represented, the format has no NaN")
    codes |= rounded.signbit().long() << (fmt.bits - 1)
    return codes.to(torch.uint8)


def values_of(codes: Tensor, fmt: FloatFormat) -> Tensor:
    """What `codes_of` gave, as float32 values again."""
    if codes.dtype != torch.uint8:
        return codes.float()
    magnitude = codes.long() & ((1 << (fmt.bits - 1)) - 1)
    values = _values(fmt, codes.device)
    known = values[magnitude.clamp(max=len(values) - 1)]
    known = torch.where(magnitude < len(values), known, torch.nan)
    return torch.where(codes >> (fmt.bits - 1) == 1, -known, known)


def _values(fmt: FloatFormat, device: torch.device) -> Tensor:
    return torch.tensor(_listed(fmt), dtype=torch.float32, device=device)


@cache
def _listed(fmt: FloatFormat) -> list[float]:
    return [*fmt.values(), *[math.inf] * fmt.has_infinity]
