"""Casts of tensors: what decides the codes of an operand, under every recipe.

    codes = round(clamp(x · scale, ±max(format)))         nearest even, saturating
    value = codes · (1 / scale)                           the reciprocal rounded once

Recipes differ in what shares a scale, a whole tensor or a tile of it, in how the scale is made of
amax (`scaling`), and in what is done to the tensor before.

A `Cast` is everything that decides the codes of one operand. The layer builds it to compute and
the monitor asks for the same one to measure, so what is reported is what was done.

Cost: one pass through `kernels` (on a GPU under one scale, or where the scales of tiles are made in
the same pass), which equals the plain torch path here bit for bit; that path takes five. Rejected:
arithmetic on bit patterns in eager torch, slower than torch's own casts.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8lab import formats, kernels
from fp8lab.formats import FloatFormat, Rounding
from fp8lab.kernels import gpu_casts
from fp8lab.plan import as_recipe
from fp8lab.recipe import (
    OPERANDS,
    BitNetScaling,
    DelayedScaling,
    Direction,
    Float8BlockScaling,
    Float8CurrentScaling,
    HighPrecision,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    Operand,
    Recipe,
    RowwiseScaling,
    operand_format,
)
from fp8lab.rounding import ROUNDED_ONCE, codes_of, round_float32, values_of
from fp8lab.scaling import (
    FLOAT32_MAX,
    Tile,
    absolute_maximum,
    exponent_scales,
    matrix_shape,
    rowwise_scale,
    scales_for,
    spread,
    tile_maximum,
    tile_of,
)


class Cast(NamedTuple):
    """What decides the codes of one operand: the tensor as it is cast, and how.

    `scale` multiplies before and `scale_inv` after the rounding: float32, [] for the whole tensor
    or, with a `tile`, one for each tile of the tensor seen as [tokens, last axis]; None where the
    recipe is high precision. `channel_scale`, float32 [channels], has already multiplied `tensor`
    where a mitigation balances channels. `rotated` says that `tensor` is a random Hadamard
    transform along its tokens, of which zeros were appended to fill the last sixteen. Where the
    rounding is stochastic, every call draws anew.
    """

    tensor: Tensor
    recipe: Recipe
    format: FloatFormat
    scale: Tensor | None
    scale_inv: Tensor | None
    tile: Tile | None = None
    rounding: Rounding = "nearest"
    channel_scale: Tensor | None = None
    rotated: bool = False

    def fake_quantized(self, out: Tensor | None = None) -> Tensor:
        """Quantised and dequantised, float32, still times the channel scale, still rotated.

        `out`, float32 of the tensor's shape, receives the result if given.
        """
        tensor = self.tensor.detach()
        if self.scale is None or self.scale_inv is None:
            return _into(out, round_float32(tensor.float(), self.format))
        if self._has_kernel(tensor) and (out is None or _is_writable(out)):
            target = torch.empty_like(tensor, dtype=torch.float32) if out is None else out
            matrix = tensor if self.tile is None else tensor.view(matrix_shape(tensor.shape))
            arguments = matrix, self.format, self.scale, self.scale_inv, self.tile, target
            kernels.fake_quantize(*arguments)
            return target
        if self._has_gpu_kernel(tensor) and (out is None or gpu_casts.usable(out)):
            target = torch.empty_like(tensor, dtype=torch.float32) if out is None else out
            how = self.format, self.scale, self.scale_inv
            if target.dtype is torch.float32 and gpu_casts.fake_quantize(tensor, *how, target):
                return target
        rounded = self.rounded()
        return _into(out, rounded * spread(self.scale_inv, self.tile, tensor.shape))

    def fake_quantized_and_amax(self) -> tuple[Tensor, Tensor]:
        """`fake_quantized()` and `absolute_maximum` of the tensor, in one pass where possible.

        A DTensor's amax is that of the whole tensor, on every process that has a share of it.
        """
        tensor = self.tensor.detach()
        if self.tile is None and self._has_kernel(tensor):
            out = torch.empty_like(tensor, dtype=torch.float32)
            assert self.scale is not None and self.scale_inv is not None
            how = self.format, self.scale, self.scale_inv
            amax, _, _ = kernels.fake_quantize_and_count(tensor, *how, out)
            return out, amax
        if self._has_gpu_kernel(tensor):
            out = torch.empty_like(tensor, dtype=torch.float32)
            assert self.scale is not None and self.scale_inv is not None
            how = self.format, self.scale, self.scale_inv
            found = gpu_casts.fake_quantize_and_count(tensor, *how, out)
            if found is not None:
                return out, found[0]
        amax = absolute_maximum(tensor)
        return self.fake_quantized(), amax.full_tensor() if hasattr(amax, "full_tensor") else amax

    def _has_kernel(self, tensor: Tensor) -> bool:
        return self.scale is not None and self._is_nearest() and kernels.usable(tensor)

    def _has_gpu_kernel(self, tensor: Tensor) -> bool:
        # Of a tensor on a GPU plain torch takes a scale that lies on the CPU, too.
        there = self.scale is not None and self.scale.device == tensor.device
        whole = there and self.tile is None and self._is_nearest()
        return whole and gpu_casts.usable(tensor)

    def _is_nearest(self) -> bool:
        return self.rounding == "nearest" and self.format is not formats.SIGN

    def scaled(self) -> Tensor:
        """The values that meet the format's grid, float32."""
        values = self.tensor.detach().float()
        if self.scale is None:
            return values
        return values * spread(self.scale, self.tile, values.shape)

    def rounded(self) -> Tensor:
        """The values on the format's grid, float32."""
        if self.format is formats.SIGN:
            return torch.where(self.tensor.detach() > 0, 1.0, -1.0)
        return round_float32(self.scaled(), self.format, self.rounding)

    def saturated(self) -> Tensor:
        """Which elements lie beyond ±max, bool.

        A hair beyond does not count: of the tensors under current scaling one in ten has its amax
        lifted there, one float32 step above max, by the rounding of scale and of x · scale.
        """
        return self.scaled().abs() > self.format.max * (1 + 2.0**-23)


def _is_writable(out: Tensor) -> bool:
    return out.dtype is torch.float32 and kernels.usable(out)


def _into(out: Tensor | None, values: Tensor) -> Tensor:
    return values if out is None else out.copy_(values)


def cast_for(
    tensor: Tensor,
    recipe: Recipe,
    operand: Operand,
    scale: Tensor | None = None,
    direction: Direction = "rowwise",
) -> Cast:
    """How `recipe` casts `tensor` as that operand; `scale`, float32 [], overrides the just-in-time
    one of recipes that have one for the whole tensor. Stochastic rounding draws from torch's
    default generator of the device.

    Raises ValueError for delayed scaling without a scale, whose history is kept by a layer, for a
    scale where there are many, for float64, which would be rounded twice, and for an operand or a
    direction that is none.
    """
    _check(tensor, operand, direction)
    if scale is not None and (
        not isinstance(scale, Tensor) or scale.dtype is not torch.float32 or scale.dim() > 0
    ):
        raise ValueError(f"{operand}: scale: {scale!r}, expected a float32 tensor of no dimension")
    fmt = operand_format(recipe, operand, direction)
    if fmt is formats.FP32 or isinstance(recipe, HighPrecision):
        return Cast(tensor, recipe, fmt, None, None)
    if isinstance(recipe, DelayedScaling | Float8CurrentScaling):
        if scale is None:
            if isinstance(recipe, DelayedScaling):
                raise ValueError(
                    "DelayedScaling: no scale, expected scale= from the layer's history"
                )
            scale, scale_inv = scales_for(absolute_maximum(tensor), fmt, recipe.use_power_2_scales)
        else:
            scale_inv = scale.reciprocal()
        stochastic = recipe.stochastic_rounding and operand == "grad_output"
        rounding: Rounding = "stochastic" if stochastic else "nearest"
        return Cast(tensor, recipe, fmt, scale, scale_inv, rounding=rounding)
    if scale is not None:
        name = type(recipe).__name__
        raise ValueError(f"{name}: scale given, expected none: it is made just in time")
    if isinstance(recipe, BitNetScaling):
        return _bitnet_cast(tensor, recipe, operand, fmt)
    if isinstance(recipe, NVFP4BlockScaling):
        return _nvfp4_cast(tensor, recipe, operand, direction)
    return _tile_cast(tensor, recipe, operand, direction, fmt)


def _check(tensor: Tensor, operand: Operand, direction: Direction) -> None:
    if operand not in OPERANDS:
        raise ValueError(f"operand: {operand!r}, expected one of {', '.join(OPERANDS)}")
    if direction not in ("rowwise", "columnwise"):
        raise ValueError(f"{operand}: direction={direction!r}, expected 'rowwise' or 'columnwise'")
    if tensor.dtype not in ROUNDED_ONCE:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{operand}: {dtype}, expected float32, bfloat16 or float16")


def _tile_cast(
    tensor: Tensor, recipe: Any, operand: Operand, direction: Direction, fmt: FloatFormat
) -> Cast:
    tile = tile_of(recipe, operand, direction, tensor.shape)
    matrix = tensor.detach().reshape(matrix_shape(tensor.shape))
    if isinstance(recipe, RowwiseScaling):
        scale = rowwise_scale(matrix, recipe, fmt, tile)
        return Cast(tensor, recipe, fmt, scale, scale.reciprocal(), tile)
    assert tile is not None
    amax = tile_maximum(matrix, tile)
    if isinstance(recipe, MXFP8BlockScaling):
        scales = exponent_scales(amax, fmt, recipe.scale_rounding)
    else:
        largest_scale = torch.finfo(tensor.dtype).max
        scales = scales_for(amax, fmt, not recipe.use_f32_scales, largest_scale)
    return Cast(tensor, recipe, fmt, *scales, tile)


# The signs of TE's transform (`get_wgrad_sign_vector`), for all tensors: both operands of the GEMM
# must be turned alike.
_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def hadamard(device: torch.device, dtype: torch.dtype) -> Tensor:
    """TE's random Hadamard matrix / 4, [16, 16], orthogonal; Sylvester's, rows times signs."""
    matrix = torch.ones(1, 1)
    while len(matrix) < len(_SIGNS):
        top, bottom = torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)
        matrix = torch.cat([top, bottom])
    return (torch.tensor(_SIGNS)[:, None] * matrix).to(device, dtype) * 0.25


def _rotated(tensor: Tensor) -> Tensor:
    """[tokens, channels] → [tokens up to a multiple of 16, channels], sixteen tokens at a time."""
    matrix = tensor.detach().reshape(matrix_shape(tensor.shape))
    tokens = F.pad(matrix.t(), (0, -len(matrix) % 16)).contiguous()
    with torch.autocast(tensor.device.type, enabled=False):
        turned = tokens.view(-1, 16) @ hadamard(tensor.device, tensor.dtype)
    return turned.view(tokens.shape).t().contiguous()


def rotated_back(values: Tensor, tokens: int) -> Tensor:
    """What a rotated operand stands for, float32 [tokens, channels]: the transform undone."""
    with torch.autocast(values.device.type, enabled=False):
        columns = values.t().reshape(-1, 16) @ hadamard(values.device, values.dtype).t()
    return columns.view(values.shape[1], values.shape[0]).t()[:tokens]


def _nvfp4_cast(
    tensor: Tensor, recipe: NVFP4BlockScaling, operand: Operand, direction: Direction
) -> Cast:
    """Source: TE `core_nvfp4.cuh` and its reference `NVFP4QuantizerRef`."""
    rotated = direction == "columnwise" and operand != "weight" and not recipe.disable_rht
    if rotated:
        tensor = _rotated(tensor)
    tile = tile_of(recipe, operand, direction, tensor.shape)
    assert tile is not None
    vector_amax = tile_maximum(tensor.reshape(matrix_shape(tensor.shape)), tile)
    amax = absolute_maximum(vector_amax)
    top = torch.full_like(amax, formats.E4M3.max * formats.E2M1.max)
    encode = torch.div(top, amax).clamp(max=FLOAT32_MAX)
    encode = torch.where((amax == 0) | (encode == 0), 1.0, encode)
    decode = encode.reciprocal()
    sixth = torch.full_like(amax, formats.E2M1.max).reciprocal()
    block = round_float32(vector_amax * (encode * sixth), formats.E4M3)
    scale_inv = block * decode
    scale = scale_inv.reciprocal().clamp(max=FLOAT32_MAX)
    stochastic = operand == "grad_output" and not recipe.disable_stochastic_rounding
    rounding: Rounding = "stochastic" if stochastic else "nearest"
    how = Cast(tensor, recipe, formats.E2M1, scale, scale_inv, tile, rounding)
    return how._replace(rotated=rotated)


def _bitnet_cast(tensor: Tensor, recipe: BitNetScaling, operand: Operand, fmt: FloatFormat) -> Cast:
    """Source: BitNet, 2310.11453, section 2.1."""
    if operand == "input":
        return Cast(tensor, recipe, fmt, *scales_for(absolute_maximum(tensor), fmt, False))
    weight = tensor.detach().double()  # so that the order of the sums does not show
    mean, centred = weight.abs().mean().float(), (weight - weight.mean()).float()
    return Cast(centred, recipe, fmt, mean.reciprocal().clamp(max=FLOAT32_MAX), mean)


def _in_one_pass(
    tensor: Tensor, recipe: Recipe, operand: Operand, direction: Direction, out: Tensor
) -> bool:
    """Fake-quantises into `out` if amax, scales and cast of these tiles can go together."""
    if not isinstance(recipe, Float8BlockScaling | MXFP8BlockScaling):
        return False
    _check(tensor, operand, direction)
    kind: kernels.ScaleKind = "exponent"
    if isinstance(recipe, Float8BlockScaling):
        kind = "any" if recipe.use_f32_scales else "power_of_two"
    elif recipe.scale_rounding != "up":
        return False
    source = tensor.detach()
    rows, size = tile_of(recipe, operand, direction, tensor.shape) or (0, 0)
    whole = rows == 1 and size > 1 and matrix_shape(tensor.shape)[1] % size == 0
    fmt, most = operand_format(recipe, operand, direction), torch.finfo(tensor.dtype).max
    if whole and kernels.usable(source) and _is_writable(out):
        matrix = source.view(matrix_shape(tensor.shape))
        kernels.fake_quantize_blocks(matrix, fmt, size, kind, most, out)
        return True
    if whole and gpu_casts.usable(source) and gpu_casts.usable(out):
        matrix = source.view(matrix_shape(tensor.shape))
        return gpu_casts.fake_quantize_blocks(matrix, fmt, size, kind, most, out)
    return False


class FusedProduct:
    """What gate, up and down of one feed-forward share so that its product is rounded as in TE.

    TE computes act(gate) ⊙ up in FP32, in one kernel with the cast, whatever the dtype of the
    model. Gate and up therefore give their outputs, rounded to `dtype`, as float32, and down takes
    the float32 product. `dtype` is set by the forward passes of gate and up, and None again after
    that of down.
    """

    dtype: torch.dtype | None = None

    def cast_as(self, tensor: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor | None]:
        """The tensor that is cast, and the amax that makes its scale if that is another's.

        Delayed scaling casts the FP32 values; current scaling takes their amax and casts what they
        are in `dtype`; all others see only that (TE `activation.cpp`; `gated_mxfp8.cuh`).
        """
        if isinstance(recipe, DelayedScaling) or self.dtype in (None, torch.float32):
            return tensor, None
        of_current = isinstance(recipe, Float8CurrentScaling)
        return tensor.to(self.dtype), absolute_maximum(tensor) if of_current else None


class Quantized(NamedTuple):
    """Codes, of the shape of the source, and what dequantises them.

    Where the recipe turns the operand by a random Hadamard transform they are of the turned tensor,
    [tokens up to a multiple of 16, channels], as `Cast.rotated` is, and so is what is dequantised.
    `codes` are of the format's own torch dtype, or its bit patterns in uint8 where torch has none;
    `scale_inv` is float32, [] or one for each `tile` of the tensor seen as [tokens, last axis].
    """

    codes: Tensor
    scale_inv: Tensor
    format: FloatFormat
    tile: Tile | None

    def dequantize(self) -> Tensor:
        """float32 values: codes · scale_inv."""
        scale_inv = spread(self.scale_inv, self.tile, self.codes.shape)
        return values_of(self.codes, self.format) * scale_inv


def quantize(
    tensor: Tensor,
    recipe: Recipe,
    operand: Operand,
    *,
    scale: Tensor | None = None,
    direction: Direction = "rowwise",
) -> Quantized:
    """`tensor` as codes and the reciprocals of its scales, as `recipe` casts that operand.

    Any shape; float32, bfloat16 or float16. High precision has scale_inv 1. `direction` is that of
    what shares a scale: "rowwise" along the last axis, "columnwise" along the tokens (with a random
    Hadamard transform where the recipe has one). `recipe` may be one of Transformer Engine's.
    Raises ValueError as `cast_for` does, and for NaN where the format has none.
    """
    how = cast_for(tensor, as_recipe(recipe, "quantize"), operand, scale, direction)
    ones = torch.ones((), device=tensor.device)
    scale_inv = ones if how.scale_inv is None else how.scale_inv
    return Quantized(codes_of(how.rounded(), how.format), scale_inv, how.format, how.tile)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, how: Cast) -> Tensor:
        values = how.fake_quantized()
        if how.rotated:
            values = rotated_back(values, matrix_shape(tensor.shape)[0])
            values = values.reshape(tensor.shape).clone()  # a view could not be changed in place
        result = values.to(tensor.dtype)
        return result.clone() if result.data_ptr() == tensor.data_ptr() else result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def fake_quantize(
    tensor: Tensor,
    recipe: Recipe,
    operand: Operand,
    *,
    scale: Tensor | None = None,
    direction: Direction = "rowwise",
    out: Tensor | None = None,
) -> Tensor:
    """`tensor` quantised and dequantised, in its own dtype; the gradient passes straight through.

    `out`, float32 of the same shape, receives the values instead, without a gradient. A random
    Hadamard transform is undone. `recipe` may be one of Transformer Engine's. Raises ValueError as
    `cast_for` does.
    """
    recipe = as_recipe(recipe, "fake_quantize")
    if out is not None and (
        out.shape != tensor.shape or out.dtype != torch.float32 or out.requires_grad
    ):
        expected = f"float32 {list(tensor.shape)} without a gradient"
        raise ValueError(f"fake_quantize: out: {out.dtype} {list(out.shape)}, expected {expected}")
    if out is not None and scale is None and _in_one_pass(tensor, recipe, operand, direction, out):
        return out
    how = cast_for(tensor, recipe, operand, scale, direction)
    if out is not None and not how.rotated:
        return how.fake_quantized(out)
    values = _StraightThrough.apply(tensor, how)  # type: ignore[no-untyped-call]
    return cast(Tensor, values if out is None else out.copy_(values.detach()))
