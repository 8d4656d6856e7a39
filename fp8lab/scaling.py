"""Scales: which elements share one, and what it is. Amax → scale for every recipe but NVFP4's.

The formulas are Transformer Engine's (recipe_common.cuh, delayed_scaling.cu and ptx.cuh of 2.20),
in FP32, the division rounded once:

    scale = max(format) / amax

Two traps are closed here so that nobody meets them elsewhere. `448.0 / t` in torch multiplies by
a reciprocal and is one ulp off for a quarter of all amaxes: `torch.div` is used. And TE's amax
ignores NaN while torch's maximum propagates it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fp8lab import kernels
from fp8lab.formats import FloatFormat
from fp8lab.kernels import gpu_casts
from fp8lab.recipe import (
    DelayedScaling,
    Direction,
    Float8BlockScaling,
    Float8CurrentScaling,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    Operand,
    Recipe,
    RowwiseScaling,
    ScaleRounding,
    operand_format,
)

FLOAT32_MAX = torch.finfo(torch.float32).max
# Rows and columns of a 2-D view that share a scale; the last of each may be cut off at an edge.
Tile = tuple[int, int]


def absolute_maximum(tensor: Tensor) -> Tensor:
    """max |x|, float32 [], ignoring NaN as TE's kernels do; 0 for an empty tensor."""
    tensor = tensor.detach()
    if tensor.numel() == 0:
        return torch.zeros((), device=tensor.device)
    if kernels.usable(tensor):
        return kernels.amax(tensor)
    if gpu_casts.usable(tensor) and (found := gpu_casts.amax(tensor)) is not None:
        return found
    amax = tensor.abs().amax().float()
    if tensor.device.type == "cpu" and not amax.isnan():
        return amax
    return _without_nan(tensor).amax()


def _without_nan(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(tensor.abs().float(), nan=0.0, posinf=torch.inf)


def tile_maximum(matrix: Tensor, tile: Tile) -> Tensor:
    """max |x| of every tile, ignoring NaN, float32 [tile rows, tile columns]."""
    matrix = matrix.detach()
    if kernels.usable(matrix):
        return kernels.tile_amax(matrix, tile)
    height, width = matrix.shape
    rows, columns = -(-height // tile[0]), -(-width // tile[1])
    if not matrix.numel():
        return matrix.new_zeros(rows, columns, dtype=torch.float32)
    padded = _without_nan(matrix)
    # Not F.pad: torch 2.11 gives a distributed tensor the shape that it had before.
    for axis, missing in enumerate((rows * tile[0] - height, columns * tile[1] - width)):
        if missing:
            shape = [*padded.shape]
            shape[axis] = missing
            padded = torch.cat([padded, padded.new_zeros(shape)], axis)
    return padded.view(rows, tile[0], columns, tile[1]).amax((1, 3))


def spread(per_tile: Tensor, tile: Tile | None, shape: torch.Size) -> Tensor:
    """One value a tile → one value an element of a tensor of that shape."""
    if tile is None:
        return per_tile
    rows, columns = matrix_shape(shape)
    tall = per_tile.repeat_interleave(tile[0], 0)[:rows]
    return tall.repeat_interleave(tile[1], 1)[:, :columns].reshape(shape)


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """A tensor seen as [tokens, last axis]."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def scale_for(
    amax: Tensor,
    fmt: FloatFormat,
    *,
    margin: int = 0,
    previous: Tensor | None = None,
    power_of_two: bool = False,
    largest_scale: float = FLOAT32_MAX,
) -> Tensor:
    """The factor that maps amax to the format's largest value; float32, of amax's shape.

    An amax of 0, infinity or NaN gives `previous`, or 1 without one. A scale that would be infinite
    is `largest_scale`. Source: TE `recipe_common.cuh`, `delayed_scaling.cu`.
    """
    most = fmt.max * 2.0**-margin
    most = most if most <= FLOAT32_MAX else math.inf  # torch converts nothing that overflows
    largest = torch.full_like(amax, most, dtype=torch.float32)
    scale = torch.div(largest, amax)
    scale = torch.where(scale.isinf(), largest_scale, scale)
    if power_of_two:
        scale = _floor_to_power_of_two(scale)
    usable = (amax > 0) & amax.isfinite()
    return torch.where(usable, scale, torch.ones_like(scale) if previous is None else previous)


def scales_for(
    amax: Tensor, fmt: FloatFormat, power_of_two: bool, largest_scale: float = FLOAT32_MAX
) -> tuple[Tensor, Tensor]:
    """`scale_for` without a previous scale, and its reciprocal."""
    if kernels.usable(amax):
        return kernels.scales(amax, fmt.max, largest_scale, power_of_two)
    scale = scale_for(amax, fmt, power_of_two=power_of_two, largest_scale=largest_scale)
    return scale, scale.reciprocal()


def _floor_to_power_of_two(scale: Tensor) -> Tensor:
    return (scale.view(torch.int32) & -0x800000).view(torch.float32)


def power_of_two_scale(amax: Tensor, scale: Tensor, fp8_max: Tensor, recipe: Any) -> Tensor:
    """A `scaling_factor_compute_algo` for delayed scaling: rounded down to a power of two.

    All float32 []. It is Gaudi's, whose hardware takes nothing else (2409.12517, appendix).
    """
    largest = (fp8_max * 2.0**-recipe.margin).to(torch.float32)
    new = _floor_to_power_of_two(torch.div(largest, amax).clamp(max=FLOAT32_MAX))
    return torch.where((amax > 0) & amax.isfinite() & (new > 0), new, scale)


def exponent_scales(
    amax: Tensor, fmt: FloatFormat, rounding: ScaleRounding
) -> tuple[Tensor, Tensor]:
    """MXFP8's scale and scale_inv, powers of two, float32 of amax's shape.

    Sources: TE `ptx.cuh`, `float_to_e8m0`; OCP Microscaling Formats 1.0, 6.3; torchao
    `ScaleCalculationMode`.
    """
    if rounding == "up" and kernels.usable(amax):
        return kernels.exponents(amax, fmt.max)
    code = _exponents(amax, fmt, rounding)
    return _power_of_two(254 - code), _power_of_two(code)


def _exponents(amax: Tensor, fmt: FloatFormat, rounding: ScaleRounding) -> Tensor:
    """E8M0 codes of scale_inv, int32.

    Shifts are written out: `>>` of a DTensor gives back its operand, unshifted (torch 2.13).
    """
    if rounding == "up":
        bits = (amax * (1.0 / fmt.max)).view(torch.int32)
        # Any mantissa carries into the exponent; up to 2^-127 the code is 0, infinity's is 254.
        code = torch.bitwise_right_shift(bits + 0x7FFFFF, 23)
        return code.masked_fill_(bits <= 0x400000, 0).clamp_(max=254)
    bits = amax.view(torch.int32)
    if rounding == "even":
        bits = bits + (1 << (22 - fmt.mantissa_bits))
    if rounding == "ceil":
        bits = bits + 0x7FFFFF
    return (torch.bitwise_right_shift(bits, 23) - fmt.max_exponent).clamp_(0, 254)


def _power_of_two(code: Tensor) -> Tensor:
    """2^(code - 127) of an E8M0 code, float32; code 0 is subnormal there."""
    return torch.bitwise_left_shift(code, 23).clamp_(min=0x400000).view(torch.float32)


def rowwise_scale(
    matrix: Tensor, recipe: RowwiseScaling, fmt: FloatFormat, tile: Tile | None
) -> Tensor:
    """torchao's formula: float64 division, an amax of at least 1e-12, and NaN goes on."""
    if tile is not None and kernels.usable(matrix) and matrix.sum().isfinite():
        amax = tile_maximum(matrix, tile)  # without NaN there is none to ignore
    else:
        amax = _amax_with_nan(matrix.abs(), tile)
    scale = (fmt.max / amax.double().clamp(min=1e-12)).float()
    if recipe.round_scales_to_power_of_2:
        scale = torch.where(scale.isnan(), scale, _floor_to_power_of_two(scale))
    return scale


def _amax_with_nan(magnitude: Tensor, tile: Tile | None) -> Tensor:
    """The largest of rows or of columns, in the shape of their tiles; of all without a tile."""
    if tile is None:
        return magnitude.amax() if magnitude.numel() else magnitude.new_zeros(())
    if not magnitude.numel():
        return tile_maximum(magnitude, tile)
    if tile == (1, 1):
        return magnitude
    return magnitude.amax(dim=1 if tile[0] == 1 else 0, keepdim=True)


def tile_of(
    recipe: Recipe, operand: Operand, direction: Direction, shape: torch.Size
) -> Tile | None:
    """Which elements share a scale, in a tensor seen as [tokens, last axis]; None: all."""
    rows, columns = matrix_shape(shape)
    square = False
    if isinstance(recipe, Float8BlockScaling):
        length = 128
        dims = recipe.x_block_scaling_dim, recipe.w_block_scaling_dim, recipe.grad_block_scaling_dim
        square = dict(zip(("input", "weight", "grad_output"), dims, strict=True))[operand] == 2
    elif isinstance(recipe, MXFP8BlockScaling):
        length = 32
        square = recipe.enable_2d_quantization and operand == "weight"
    elif isinstance(recipe, NVFP4BlockScaling):
        length = 16
        square = not recipe.disable_2d_quantization and operand == "weight"
    elif isinstance(recipe, RowwiseScaling):
        if recipe.high_precision_grad_weight and direction == "columnwise":
            return None
        length = max(columns if direction == "rowwise" else rows, 1)
    else:
        return None
    if square:
        return length, length
    return (1, length) if direction == "rowwise" else (length, 1)


def is_the_same_both_ways(recipe: Recipe, operand: Operand) -> bool:
    """Whether an operand's rowwise codes are its columnwise codes too, so that one cast does."""
    if isinstance(recipe, DelayedScaling | Float8CurrentScaling):
        return not recipe.fp8_format.has_copies or operand == "grad_output"
    shape = torch.Size((1, 2))
    rowwise = tile_of(recipe, operand, "rowwise", shape), operand_format(recipe, operand)
    return rowwise == (
        tile_of(recipe, operand, "columnwise", shape),
        operand_format(recipe, operand, "columnwise"),
    )
