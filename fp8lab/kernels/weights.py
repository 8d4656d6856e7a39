"""What `weighing` asks of weights on a CPU, compiled: passes over whole rows, by `weights.c`.

Every function is for usable tensors (see `kernels.usable`): its caller has asked, and has the same
in plain torch for the others. Each runs on one thread and lets go of the interpreter's lock.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from fp8lab import kernels
from fp8lab.formats import E2M1, E4M3


class Moments(NamedTuple):
    """What the first pass over a matrix adds to.

    `amax` of rows [rows], columns [columns] and tiles [rows / 16, columns / 16] are float32 (NaN
    where there is one); `power`, sums of squares, and `fourth` [1], of x⁴, are float64.
    """

    row_amax: Tensor
    column_amax: Tensor
    tile_amax: Tensor
    row_power: Tensor
    column_power: Tensor
    fourth: Tensor


class Scales(NamedTuple):
    """float32 scales of E4M3 for the tensor, [rows] and [rows / 128, columns / 128], these powers
    of two; of E2M1 for [rows / 16, columns / 16], with their inverses."""

    tensor: float
    tensor_inv: float
    rows: Tensor
    squares: Tensor
    tiles: Tensor
    tiles_inv: Tensor


class Losses(NamedTuple):
    """What the second pass adds to: squared errors float64 [6], flushed and saturated int64 [6, 2],
    zeros int64 [1]; of current, rowwise, block, MXFP8 (up, OCP's floor), NVFP4."""

    errors: Tensor
    counts: Tensor
    zeros: Tensor


def scan(rows: Tensor, first: int, to: Moments) -> None:
    """Adds rows [n, columns] of a matrix, the `first` of them a multiple of 16, to its moments."""
    height, width = rows.shape  # of two dimensions, or the call would be another
    kernels.library().fp8lab_scan(
        rows.data_ptr(),
        kernels.is_half(rows),
        height,
        width,
        to.row_amax.data_ptr() + 4 * first,
        to.column_amax.data_ptr(),
        to.tile_amax.data_ptr() + 4 * to.tile_amax.shape[1] * (first // 16),
        to.row_power.data_ptr() + 8 * first,
        to.column_power.data_ptr(),
        to.fourth.data_ptr(),
    )


def cast(rows: Tensor, first: int, scales: Scales, to: Losses) -> None:
    """Adds what the casts do to rows [n, columns], the `first` a multiple of 128; all finite."""
    squares, tiles = scales.squares.shape[1], scales.tiles.shape[1]
    height, width = rows.shape
    kernels.library().fp8lab_cast_weights(
        rows.data_ptr(),
        kernels.is_half(rows),
        height,
        width,
        ctypes.addressof(kernels.format_of(E4M3)),
        ctypes.addressof(kernels.format_of(E2M1)),
        scales.tensor,
        scales.tensor_inv,
        scales.rows.data_ptr() + 4 * first,
        scales.squares.data_ptr() + 4 * squares * (first // 128),
        scales.tiles.data_ptr() + 4 * tiles * (first // 16),
        scales.tiles_inv.data_ptr() + 4 * tiles * (first // 16),
        *(part.data_ptr() for part in to),
    )


def pairs(gate: Tensor, up: Tensor, other: Tensor) -> Tensor:
    """float64 [2, n]: scalar products of each row of gate [n, dim] with those of two more."""
    found = torch.empty(2, len(gate), dtype=torch.float64)
    height, width = gate.shape
    kernels.library().fp8lab_pairs(
        *(rows.data_ptr() for rows in (gate, up, other)),
        kernels.is_half(gate),
        height,
        width,
        *(dots.data_ptr() for dots in found),
    )
    return found


def turned(rows: Tensor) -> Tensor | None:
    """A contiguous copy of a plain bfloat16 matrix on a CPU whose columns lie together, as those of
    a transposed one, or of every other row of it; None of any other."""
    plain = type(rows) is Tensor and rows.is_cpu and rows.dtype is torch.bfloat16
    if not plain or rows.is_neg() or not rows.numel() or kernels.why_unavailable() is not None:
        return None
    step, stride = rows.stride()
    if step not in (1, 2) or stride <= step:
        return None
    copy = torch.empty(rows.shape, dtype=rows.dtype)
    kernels.library().fp8lab_turn(rows.data_ptr(), *rows.shape, step, stride, copy.data_ptr())
    return copy


def tile_scales(amax: Tensor, factor: float, tensor_inv: float) -> tuple[Tensor, Tensor]:
    """NVFP4's scales of tiles with a usable float32 amax, and their inverses: the amax times
    `factor` on E4M3's grid, times `tensor_inv`."""
    scales, inverses = torch.empty_like(amax), torch.empty_like(amax)
    kernels.library().fp8lab_tile_scales(
        amax.data_ptr(),
        amax.numel(),
        ctypes.addressof(kernels.format_of(E4M3)),
        factor,
        tensor_inv,
        scales.data_ptr(),
        inverses.data_ptr(),
    )
    return scales, inverses
