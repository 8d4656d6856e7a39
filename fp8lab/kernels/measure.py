"""What `measure` asks of tensors on a CPU, compiled: one pass each, by `measure.c`.

Every function is for usable tensors (see `kernels.usable`): its caller has asked, and has the same
in plain torch for the others. Counts and amaxes are equal to that, float64 sums to their rounding;
they do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fp8lab import kernels
from fp8lab.formats import FloatFormat

_F64 = torch.float64


def sentinel(matrix: Tensor, found: Tensor) -> None:
    """Of a [rows, channels] with elements: the largest magnitude (NaN if it has one) and its first
    channel, into the first two numbers of `found`, contiguous float64 on the CPU."""
    rows, columns = matrix.shape
    shares = _shares(matrix.numel(), rows)
    peaks = torch.empty(shares * columns, dtype=torch.int32, device="cpu")
    kernels.library().fp8lab_sentinel(
        matrix.data_ptr(),
        kernels.is_half(matrix),
        rows,
        columns,
        shares,
        peaks.data_ptr(),
        found.data_ptr(),
    )


def amax_and_power(tensor: Tensor, silu: bool = False) -> Tensor:
    """float64 [2] of any shape: the largest magnitude (NaN if there is one), the sum of squares;
    of silu(tensor) in float32, each right to 2^-21, if it is asked for and the tensor is float32.
    Of packed int64 (`Summary.packed`), both are NaN where something is not finite."""
    found = torch.empty(2, dtype=_F64, device="cpu")
    if tensor.dtype is torch.int64:
        kernels.library().fp8lab_power_of_packed(tensor.data_ptr(), found.data_ptr())
        return found
    count = tensor.numel()
    sums = torch.empty(-(-count // 4096), dtype=_F64, device="cpu")
    kernels.library().fp8lab_power(
        tensor.data_ptr(),
        kernels.is_half(tensor),
        silu,
        count,
        _shares(count, len(sums)),
        sums.data_ptr(),
        found.data_ptr(),
    )
    return found


def channel_matrix(
    amaxes: tuple[Tensor, Tensor, Tensor], weights: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """float64 [8, channels]: amaxes of product, gate and up, alignment, permuted alignment and
    three norms; of float32 [channels] thrice, and of weights [channels, dim] twice and [outputs,
    channels]."""
    gate_rows, _, down = weights
    channels, dim = gate_rows.shape
    matrix = torch.empty(8, channels, dtype=_F64, device="cpu")
    kernels.library().fp8lab_weights(
        *(weight.data_ptr() for weight in weights),
        _halves(*weights),
        channels,
        dim,
        down.shape[0],
        _shares(gate_rows.numel(), channels),
        *(amax.data_ptr() for amax in amaxes),
        matrix.data_ptr(),
    )
    return matrix


def sampled_rows(
    amax: Tensor, gate_rows: Tensor, up_rows: Tensor, followed: list[int], stride: int
) -> Tensor:
    """float64 [1 + followed, 1 + 2n]: a channel and every `stride`-th weight of its two rows; first
    of the channel with the largest of `amax`, float32 [channels]."""
    channels, dim = gate_rows.shape
    rows = torch.empty(1 + len(followed), 1 + 2 * -(-dim // stride), dtype=_F64, device="cpu")
    kernels.library().fp8lab_samples(
        gate_rows.data_ptr(),
        up_rows.data_ptr(),
        _halves(gate_rows, up_rows),
        channels,
        dim,
        stride,
        amax.data_ptr(),
        (ctypes.c_int64 * len(followed))(*followed),
        len(followed),
        rows.data_ptr(),
    )
    return rows


def operand(
    matrix: Tensor,
    fmt: FloatFormat,
    scale: Tensor,
    scale_inv: Tensor,
    tile: tuple[int, int],
    balance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a cast to the nearest of `fmt` does to a [rows, columns] that `balance` [columns] has
    multiplied: counts int64 [4] (non-zero, saturated, flushed, subnormal), sums float64 [4,
    columns] (error, power, power of the cast, product with it; balance undone), and channels'
    amaxes float32 [columns] (NaN if there is one, balance not undone).

    Scales are contiguous float32, one a tile. Raises ValueError for a format without a kernel, as
    `kernels.fake_quantize` does.
    """
    rows, columns = matrix.shape
    counts = torch.empty(4, dtype=torch.int64, device="cpu")
    sums = torch.empty(4, columns, dtype=_F64, device="cpu")
    peaks = torch.empty(columns, dtype=torch.float32, device="cpu")
    kernels.library().fp8lab_operand(
        matrix.data_ptr(),
        kernels.is_half(matrix),
        rows,
        columns,
        *tile,
        ctypes.addressof(kernels.format_of(fmt)),
        scale.data_ptr(),
        scale_inv.data_ptr(),
        None if balance is None else balance.data_ptr(),
        _shares(matrix.numel(), columns),
        counts.data_ptr(),
        sums.data_ptr(),
        peaks.data_ptr(),
    )
    return counts, sums, peaks


def _halves(*tensors: Tensor) -> int:
    return sum(kernels.is_half(tensor) << place for place, tensor in enumerate(tensors))


def _shares(elements: int, units: int) -> int:
    return max(1, min(kernels.threads_for(elements), units, 64))
