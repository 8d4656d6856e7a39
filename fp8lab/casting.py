"""Casts of tensors: round, amax → scale, quantise to codes, fake-quantise. Plain torch.

The formulas are Transformer Engine's (recipe_common.cuh and delayed_scaling.cu of 2.20):

    scale = max(format) / amax          in FP32, one correctly rounded division
    codes = round(clamp(x · scale, ±max(format)))         nearest even, saturating
    value = codes · (1 / scale)         the reciprocal rounded once

Three traps are closed here so that nobody meets them elsewhere. `448.0 / t` in torch multiplies by
a reciprocal and is one ulp off for a quarter of all amaxes: `torch.div` is used. What torch's own
casts do on overflow changed between releases: every cast clamps first. And TE's amax ignores NaN
while torch's maximum propagates it.

A `Cast` is everything that decides the codes of one operand. The layer builds it to compute and
the monitor asks for the same one to measure, so what is reported is what was done.

Cost: five passes over the tensor. Rejected: arithmetic on bit patterns in eager torch, slower than
torch's own casts.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fp8lab import formats
from fp8lab.formats import FloatFormat, Rounding
from fp8lab.recipe import DelayedScaling, HighPrecision, Operand, Recipe, operand_format

# Formats whose rounding torch does itself (nearest, ties to even).
_NATIVE: dict[FloatFormat, torch.dtype] = {
    formats.E4M3: torch.float8_e4m3fn,
    formats.E4M3FNUZ: torch.float8_e4m3fnuz,
    formats.E5M2: torch.float8_e5m2,
    formats.E5M2FNUZ: torch.float8_e5m2fnuz,
    formats.BF16: torch.bfloat16,
    formats.FP16: torch.float16,
    formats.FP32: torch.float32,
}
_FLOAT32_MAX = torch.finfo(torch.float32).max


def round_to(
    tensor: Tensor,
    fmt: FloatFormat,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Each element rounded to the nearest value of `fmt`, in the dtype of `tensor`.

    Any shape; float32, bfloat16 or float16. Ties go to even; `"stochastic"` rounds up with the
    probability of the distance to the lower neighbour, drawn from `generator`. Overflow is the
    format's own (`FloatFormat.overflow`); NaN stays NaN. `FloatFormat.round` is the specification.

    Raises ValueError for float64 (its values would be rounded twice) and for E8M0, which holds
    scales and not elements.
    """
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"round_to: {tensor.dtype}, expected float32, bfloat16 or float16")
    if not fmt.signed:
        raise ValueError(f"round_to: {fmt.name} is a format of scales, expected one of elements")
    rounded = _round_float32(tensor.float(), fmt, rounding, generator).to(tensor.dtype)
    return rounded.clone() if rounded is tensor else rounded  # FP32 of float32: nothing to round


def _round_float32(
    values: Tensor,
    fmt: FloatFormat,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
) -> Tensor:
    if rounding == "nearest" and fmt in _NATIVE:
        if fmt.overflow == "saturate":
            values = values.clamp(-fmt.max, fmt.max)
        return values.to(_NATIVE[fmt]).float()
    return _round_by_quantum(values, fmt, rounding, generator)


def _round_by_quantum(
    values: Tensor, fmt: FloatFormat, rounding: Rounding, generator: torch.Generator | None
) -> Tensor:
    """The specification's own steps, for formats and roundings that torch does not have."""
    exponent = (torch.frexp(values).exponent - 1).clamp(min=fmt.min_exponent)
    # In float64 every quantum of every format is normal and the quotient is exact. A power of two
    # is made from its bits: what ldexp and pow return is not promised to be one.
    quantum = ((exponent.long() + (1023 - fmt.mantissa_bits)) << 52).view(torch.float64)
    quotient = values.double() / quantum
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
    rounded = torch.where(values.isinf(), values.double(), rounded)
    if fmt.overflow == "saturate":
        rounded = rounded.clamp(-fmt.max, fmt.max)
    else:
        beyond = rounded.abs() > fmt.max
        rounded = torch.where(beyond, rounded * torch.inf, rounded)
    if fmt.top == "fnuz":
        rounded = rounded + 0.0  # -0.0 + 0.0 is +0.0: the format has no negative zero
    return rounded.float()


def absolute_maximum(tensor: Tensor) -> Tensor:
    """max |x|, float32 [], ignoring NaN as TE's kernels do; 0 for an empty tensor."""
    if tensor.numel() == 0:
        return torch.zeros((), device=tensor.device)
    amax = tensor.detach().abs().amax().float()
    if tensor.device.type == "cpu" and not amax.isnan():
        return amax
    return torch.nan_to_num(tensor.detach().abs().float(), nan=0.0, posinf=torch.inf).amax()


def scale_for(
    amax: Tensor,
    fmt: FloatFormat,
    *,
    margin: int = 0,
    previous: Tensor | None = None,
    power_of_two: bool = False,
) -> Tensor:
    """The factor that maps amax to the format's largest value; float32, of amax's shape.

    An amax of 0, infinity or NaN gives `previous`, or 1 without one. A scale that would be infinite
    is the largest float32. Source: TE `recipe_common.cuh`, `delayed_scaling.cu`.
    """
    largest = torch.full_like(amax, fmt.max * 2.0**-margin, dtype=torch.float32)
    scale = torch.div(largest, amax).clamp(max=_FLOAT32_MAX)
    if power_of_two:
        scale = (scale.view(torch.int32) & -0x800000).view(torch.float32)
    usable = (amax > 0) & amax.isfinite()
    return torch.where(usable, scale, torch.ones_like(scale) if previous is None else previous)


class Cast(NamedTuple):
    """What decides the codes of one operand: the tensor as it is cast, and how.

    `scale` is float32 [], None where the recipe is high precision. `channel_scale`, float32
    [channels], has already multiplied `tensor` where a mitigation balances channels.
    """

    tensor: Tensor
    recipe: Recipe
    format: FloatFormat
    scale: Tensor | None
    channel_scale: Tensor | None = None

    def fake_quantized(self) -> Tensor:
        """Quantised and dequantised, float32, still times the channel scale."""
        values = self.tensor.detach().float()
        if self.scale is None:
            return _round_float32(values, self.format)
        return _round_float32(values * self.scale, self.format).mul_(self.scale.reciprocal())

    def scaled(self) -> Tensor:
        """The values that meet the format's grid, float32."""
        values = self.tensor.detach().float()
        return values if self.scale is None else values * self.scale

    def saturated(self) -> Tensor:
        """Which elements lie beyond ±max, bool.

        A hair beyond does not count: of the tensors under current scaling one in ten has its amax
        lifted there, one float32 step above max, by the rounding of scale and of x · scale.
        """
        return self.scaled().abs() > self.format.max * (1 + 2.0**-23)


def cast_for(tensor: Tensor, recipe: Recipe, operand: Operand, scale: Tensor | None = None) -> Cast:
    """How `recipe` casts `tensor` as that operand; `scale` overrides the just-in-time one.

    Raises ValueError for delayed scaling without a scale, whose history is kept by a layer, and for
    float64, which would be rounded twice.
    """
    if tensor.dtype == torch.float64:
        raise ValueError(f"{operand}: float64, expected float32, bfloat16 or float16")
    fmt = operand_format(recipe, operand)
    if isinstance(recipe, HighPrecision):
        return Cast(tensor, recipe, fmt, None)
    if scale is None:
        if isinstance(recipe, DelayedScaling):
            raise ValueError("DelayedScaling: no scale, expected scale= from the layer's history")
        power_of_two = recipe.use_power_2_scales
        scale = scale_for(absolute_maximum(tensor), fmt, power_of_two=power_of_two)
    return Cast(tensor, recipe, fmt, scale)


class Quantized(NamedTuple):
    """Codes in the element format's own torch dtype, the shape of the source, and 1 / scale."""

    codes: Tensor
    scale_inv: Tensor

    def dequantize(self) -> Tensor:
        """float32 values: codes · scale_inv."""
        return self.codes.float() * self.scale_inv


def quantize(
    tensor: Tensor, recipe: Recipe, operand: Operand, *, scale: Tensor | None = None
) -> Quantized:
    """`tensor` as codes and the reciprocal of its scale, as `recipe` casts that operand.

    Any shape; float32, bfloat16 or float16. High precision has scale_inv 1. Raises ValueError for
    delayed scaling without `scale`.
    """
    how = cast_for(tensor, recipe, operand, scale)
    rounded = _round_float32(how.scaled(), how.format)
    ones = torch.ones((), device=tensor.device)
    return Quantized(
        rounded.to(_NATIVE[how.format]), ones if how.scale is None else how.scale.reciprocal()
    )


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, how: Cast) -> Tensor:
        return how.fake_quantized().to(tensor.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def fake_quantize(
    tensor: Tensor, recipe: Recipe, operand: Operand, *, scale: Tensor | None = None
) -> Tensor:
    """`tensor` quantised and dequantised, in its own dtype; the gradient passes straight through.

    Raises ValueError for delayed scaling without `scale`.
    """
    how = cast_for(tensor, recipe, operand, scale)
    return cast(Tensor, _StraightThrough.apply(tensor, how))  # type: ignore[no-untyped-call]
