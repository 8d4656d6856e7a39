"""Casts on a GPU, a Triton kernel and a pass each: amax, fake-quantisation under one scale, and
under scales of 1 × n tiles, which are made in the same pass.

Plain torch reads or writes the tensor ten times for a cast and as often for an amax that ignores
NaN. Here a program takes a stretch of it, rounds on the bits of float32 as `cpu.c` does (a power of
two that is added and subtracted again), and what crosses programs is an integer maximum or sum, so
that the result does not depend on who comes first. Equal bit for bit to plain torch, which does
the same where Triton cannot be had or does not get along with the device: that is a warning, once,
and `usable` says no then.

The compiler may not contract a product and a sum into one rounding (`enable_fp_fusion=False`), and
quotients are `div_rn`, for Triton's `/` is not the rounded one.

Rejected: the hardware's own conversion to E4M3 and E5M2 (`cvt.rn.satfinite`), which not every GPU
has, and which leaves the formats of Gaudi2 and of 4 and 6 bits to another way.
"""

from __future__ import annotations

import textwrap
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fp8lab import kernels
from fp8lab.formats import FloatFormat

_SIZE = 4096  # elements of a program

_broken: list[str] = []
_on_grid: Any = (
    None  # called by the kernels, which find names of the module in every mode of Triton
)


@cache
def _make_rounding() -> None:
    global _on_grid
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def on_grid(scaled, largest, smallest_exponent, shift, ONE_ZERO: tl.constexpr):  # type: ignore[no-untyped-def]
        """See `on_grid` in floats.h. NaN is not greater than `largest` and stays."""
        bits = scaled.to(tl.int32, bitcast=True)
        magnitude = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
        size = tl.where(magnitude > largest, largest, magnitude)
        exponent = size.to(tl.int32, bitcast=True) & 0x7F800000
        step = tl.maximum(exponent, smallest_exponent) + shift
        step = step.to(tl.float32, bitcast=True)
        rounded = (size + step) - step
        sign = bits & -0x80000000
        if ONE_ZERO:  # a -0.0 to be added, as in C, arrives as +0.0 in some releases
            sign = tl.where(rounded == 0.0, 0, sign)
        return (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)

    _on_grid = on_grid


@cache
def _kernels() -> Any:
    import triton
    import triton.language as tl

    _make_rounding()

    @triton.jit  # type: ignore[untyped-decorator]
    def find_amax(x, amax, count, HALF: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
        place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
        code = tl.load(x + place, mask=place < count, other=0).to(tl.int32)
        code = (code << 16) if HALF else code
        size = code & 0x7FFFFFFF
        tl.atomic_max(amax, tl.max(tl.where(size <= 0x7F800000, size, 0)))

    @triton.jit  # type: ignore[untyped-decorator]
    def cast(  # type: ignore[no-untyped-def]
        x,
        out,
        scale,
        scale_inv,
        amax,
        counts,
        count,
        largest,
        limit,
        smallest_exponent,
        shift,
        ONE_ZERO: tl.constexpr,
        HALF: tl.constexpr,
        COUNTS: tl.constexpr,
        SIZE: tl.constexpr,
    ):
        place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
        inside = place < count
        code = tl.load(x + place, mask=inside, other=0).to(tl.int32)
        code = (code << 16) if HALF else code
        scaled = code.to(tl.float32, bitcast=True) * tl.load(scale)
        rounded = _on_grid(scaled, largest, smallest_exponent, shift, ONE_ZERO)
        tl.store(out + place, rounded * tl.load(scale_inv), mask=inside)
        if COUNTS:  # what is outside was read as 0
            bits = code & 0x7FFFFFFF
            tl.atomic_max(amax, tl.max(tl.where(bits <= 0x7F800000, bits, 0)))
            saturated = tl.sum((tl.abs(scaled) > limit).to(tl.int64))
            flushed = tl.sum(((rounded == 0.0) & (bits != 0)).to(tl.int64))
            tl.atomic_add(counts, saturated, mask=saturated > 0)
            tl.atomic_add(counts + 1, flushed, mask=flushed > 0)

    return find_amax, cast, _block_kernel()


@cache
def _block_kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def cast_blocks(  # type: ignore[no-untyped-def]
        x,
        out,
        count,
        largest,
        reciprocal,
        most,
        smallest_exponent,
        shift,
        KIND: tl.constexpr,
        ONE_ZERO: tl.constexpr,
        HALF: tl.constexpr,
        BLOCKS: tl.constexpr,
        SIZE: tl.constexpr,
    ):
        block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        place = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        inside = place < count
        code = tl.load(x + place, mask=inside, other=0).to(tl.int32)
        code = (code << 16) if HALF else code
        bits = code & 0x7FFFFFFF
        size = tl.max(tl.where(bits <= 0x7F800000, bits, 0), axis=1)
        amax = size.to(tl.float32, bitcast=True)
        if KIND == 2:  # scaling._exponents, rounded up
            quotient = (amax * reciprocal).to(tl.int32, bitcast=True)
            exponent = tl.where(quotient <= 0x400000, 0, (quotient + 0x7FFFFF) >> 23)
            exponent = tl.minimum(exponent, 254)
            scale = tl.maximum((254 - exponent) << 23, 0x400000).to(tl.float32, bitcast=True)
            scale_inv = tl.maximum(exponent << 23, 0x400000).to(tl.float32, bitcast=True)
        else:  # scaling.scale_for
            scale = tl.div_rn(tl.zeros_like(amax) + largest, amax)
            scale = tl.where(scale.to(tl.int32, bitcast=True) == 0x7F800000, most, scale)
            kept = scale.to(tl.int32, bitcast=True) & (0x7F800000 if KIND == 1 else -1)
            usable = (size > 0) & (size < 0x7F800000)
            scale = tl.where(usable, kept.to(tl.float32, bitcast=True), 1.0)
            scale_inv = tl.div_rn(tl.zeros_like(scale) + 1.0, scale)
        scaled = code.to(tl.float32, bitcast=True) * scale[:, None]
        rounded = _on_grid(scaled, largest, smallest_exponent, shift, ONE_ZERO)
        tl.store(out + place, rounded * scale_inv[:, None], mask=inside)

    return cast_blocks


def usable(tensor: Tensor) -> bool:
    """Whether the kernels take it: as `kernels.usable`, on a CUDA device where Triton `works`."""
    return tensor.is_cuda and kernels.is_plain(tensor) and works()


def works() -> bool:
    """Whether Triton is here and has not failed yet."""
    if not _broken:
        try:
            _kernels()
        except Exception as error:  # whatever an import can raise
            _breaks(error)
    return not _broken


def _breaks(error: Exception) -> None:
    _broken.append(str(error) or type(error).__name__)
    if len(_broken) == 1:
        reason = textwrap.shorten(why_broken() or "", 200, placeholder=" …")
        warnings.warn(f"casts on a GPU go by plain torch: Triton fails: {reason}", stacklevel=2)


def why_broken() -> str | None:
    """What Triton failed with, in one line; None as long as it has not."""
    return " ".join(_broken[0].split()) if _broken else None


def amax(tensor: Tensor) -> Tensor | None:
    """max |x| of a plain tensor of any shape, float32 [], NaN ignored: `kernels.amax`. None if
    Triton fails, from when on it is not asked again."""
    found = torch.zeros((), dtype=torch.int32, device=tensor.device)
    done = _launch(0, tensor, (found, tensor.numel()), {})
    return found.view(torch.float32) if done else None


def fake_quantize(
    tensor: Tensor, fmt: FloatFormat, scale: Tensor, scale_inv: Tensor, out: Tensor
) -> bool:
    """`kernels.fake_quantize` under one scale; False, and `out` is not written, if Triton fails.

    `tensor` is plain (`kernels.is_plain`) and of any shape; scale and scale_inv are float32 [], out
    is float32, contiguous, of as many elements in the same order, and may be `tensor`, all on its
    device. Raises ValueError for a format whose casts do not saturate or whose exponents leave
    float32 no room to round, and where the memory of `out` or of a scale is not what is said here.
    """
    return _cast(tensor, fmt, scale, scale_inv, out, None, None)


def fake_quantize_and_count(
    tensor: Tensor, fmt: FloatFormat, scale: Tensor, scale_inv: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`kernels.fake_quantize_and_count`: also amax, float32 [], saturated and flushed, int64 [], of
    the same pass, which nothing waits for. None if Triton fails; raises as `fake_quantize`."""
    found = torch.zeros((), dtype=torch.int32, device=tensor.device)
    counts = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    if not _cast(tensor, fmt, scale, scale_inv, out, found, counts):
        return None
    return found.view(torch.float32), counts[0], counts[1]


def fake_quantize_blocks(
    tensor: Tensor,
    fmt: FloatFormat,
    size: int,
    kind: kernels.ScaleKind,
    largest_scale: float,
    out: Tensor,
) -> bool:
    """`kernels.fake_quantize_blocks`: amax, scales and cast of 1 × size tiles in one pass; False,
    and `out` is not written, if Triton fails.

    `tensor` is plain, [rows, columns] of whole tiles of a power of two columns, 16 to 4096; out as
    in `fake_quantize`. Raises ValueError as that does, and for other tiles.
    """
    columns = tensor.shape[-1]
    if not 16 <= size <= 4096 or size & (size - 1) or columns % size:
        raise ValueError(f"{columns} columns in tiles of {size}, expected whole ones, 16 to 4096")
    _check(tensor, (("out", out, tensor.numel()),))
    how, blocks = kernels.format_of(fmt), max(1, _SIZE // size)
    numbers = how.largest, 1.0 / how.largest, largest_scale, how.smallest_exponent, how.shift
    options = {"KIND": ("any", "power_of_two", "exponent").index(kind), "BLOCKS": blocks}
    options |= {"ONE_ZERO": fmt.top == "fnuz", "SIZE": size}
    done = _launch(2, tensor, (out, tensor.numel(), *numbers), options, blocks * size)
    if done:
        torch.autograd.graph.increment_version(out)
    return done


def _check(tensor: Tensor, memories: tuple[tuple[str, Tensor, int], ...]) -> None:
    for name, memory, count in memories:
        there = memory.device == tensor.device and memory.is_contiguous()
        if not (there and memory.dtype is torch.float32 and memory.numel() == count):
            got = f"{memory.dtype} {list(memory.shape)} on {memory.device}"
            expected = f"{count} contiguous float32 on {tensor.device}"
            raise ValueError(f"{name}: {got}, expected {expected}")


def _cast(
    tensor: Tensor,
    fmt: FloatFormat,
    scale: Tensor,
    scale_inv: Tensor,
    out: Tensor,
    found: Tensor | None,
    counts: Tensor | None,
) -> bool:
    scales = ("scale", scale, 1), ("scale_inv", scale_inv, 1)
    _check(tensor, (("out", out, tensor.numel()), *scales))
    how = kernels.format_of(fmt)
    numbers = how.largest, how.limit, how.smallest_exponent, how.shift
    counted = out if found is None else found, out if counts is None else counts
    arguments = out, scale, scale_inv, *counted, tensor.numel(), *numbers
    options = {"COUNTS": counts is not None, "ONE_ZERO": fmt.top == "fnuz"}
    done = _launch(1, tensor, arguments, options)
    if done:
        torch.autograd.graph.increment_version(out)
    return done


def _launch(
    which: int,
    tensor: Tensor,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    elements: int = _SIZE,  # of a program
) -> bool:
    half = tensor.dtype is torch.bfloat16
    codes = tensor.detach().view(torch.int16 if half else torch.int32)
    grid = (-(-tensor.numel() // elements),)
    options = {"SIZE": _SIZE, "HALF": half, "enable_fp_fusion": False} | options
    try:
        with torch.cuda.device(tensor.device) if tensor.is_cuda else torch.no_grad():
            _kernels()[which][grid](codes, *arguments, **options)
    except Exception as error:  # a driver, compiler or device that Triton does not get along with
        _breaks(error)
        return False
    return True
