"""One pass over a tensor: the integers of its sketch, and the amax of every channel and token.

Three ways with the same result, to the bit: `summary.c` on a CPU, one Triton kernel on a GPU, and
plain torch for whatever is left. All three are given float32 or bfloat16: other narrow floats are
looked at as float32, which holds them; float64, as in every cast, as what float32 makes of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fp8lab import kernels
from fp8lab.sketch import (
    BINS,
    COUNTS,
    EDGES,
    FIELDS,
    INFINITY,
    LOW,
    LOW_BITS,
    NEAR,
    NOTHING,
    NUM_SUMS,
    PACKED,
    SQUARES,
    SQUARES_HIGH,
)

# Elements that plain torch looks at together: it needs ten times their memory.
_AT_ONCE = 1 << 22
# Elements from which a thread pays for a result of its own, which is cleared and added up.
_SHARE = 1 << 18


class Summary(NamedTuple):
    """`packed` int64 [12548], see `sketch.Sketch.from_packed`; `channels` float32 [last axis] and
    `tokens` float32 [product of the others]: amaxes, NaN ignored, 0 of nothing. On the tensor's
    device."""

    packed: Tensor
    channels: Tensor
    tokens: Tensor


def summary(tensor: Tensor) -> Summary:
    """Of any tensor: the one pass in which everything is measured that a row shows of it.

    Of a distributed tensor, that of the part which lies here. A tensor on the meta device has no
    elements. Nothing is waited for.
    """
    matrix = as_matrix(tensor)
    if matrix.dtype not in (torch.float32, torch.bfloat16):
        matrix = matrix.float()
    matrix = matrix.contiguous()
    if kernels.usable(matrix):
        return _compiled(matrix)
    if matrix.is_cuda and matrix.numel():
        from fp8lab.kernels import gpu

        found = gpu.summary(matrix) if gpu.usable() else None
        if found is not None:
            return Summary(*found)
    return plain(matrix)


def as_matrix(tensor: Tensor) -> Tensor:
    """[product of the other axes, last axis] of any tensor, without a gradient: what of it lies
    here, as plain numbers; none of a tensor on the meta device."""
    tensor = tensor.detach()
    if type(tensor) not in (Tensor, nn.Parameter):
        for unwrap in ("to_local", "dequantize"):  # DTensor; the quantised ones of torchao and TE
            if getattr(type(tensor), unwrap, None) is not getattr(Tensor, unwrap, None):
                tensor = getattr(tensor, unwrap)()
        tensor = tensor.as_subclass(Tensor)
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    channels = tensor.shape[-1] if tensor.dim() else 1
    if tensor.is_meta:
        return torch.zeros(0, channels)
    if not tensor.is_floating_point():
        tensor = tensor.float()
    return tensor.resolve_neg().reshape(-1 if channels else tensor.shape[:-1].numel(), channels)


def _compiled(matrix: Tensor) -> Summary:
    rows, columns = matrix.shape
    threads = kernels.threads_for(matrix.numel())
    shares = max(1, min(threads, rows, matrix.numel() // _SHARE, 64))
    packed = torch.empty(shares, PACKED, dtype=torch.int64, device="cpu")
    channels = torch.empty(shares, columns, dtype=torch.float32, device="cpu")
    tokens = torch.empty(rows, dtype=torch.float32, device="cpu")
    kernels.library().fp8lab_summary(
        matrix.data_ptr(),
        matrix.dtype is torch.bfloat16,
        rows,
        columns,
        shares,
        packed.data_ptr(),
        channels.data_ptr(),
        tokens.data_ptr(),
    )
    if shares == 1:
        return Summary(packed[0], channels[0], tokens)
    return Summary(packed[0].clone(), channels[0].clone(), tokens)  # of the rest nothing is kept


def plain(matrix: Tensor) -> Summary:
    """`summary` of a contiguous [tokens, channels] in plain torch, on any device."""
    rows, columns = matrix.shape
    packed = torch.zeros(PACKED, dtype=torch.int64, device=matrix.device)
    extremes = torch.cat([packed.new_full((1,), nothing) for nothing in NOTHING])
    channels = torch.zeros(columns, dtype=torch.int64, device=matrix.device)
    tokens = [channels[:0]]
    for part in torch.split(matrix, max(1, _AT_ONCE // max(columns, 1))) if matrix.numel() else ():
        code = part.float().contiguous().view(torch.int32).long()
        size = code & 0x7FFFFFFF
        _add(packed, code.flatten(), size.flatten())
        extremes = torch.maximum(extremes, _extremes(code, size))
        known = torch.where(size > INFINITY, 0, size)
        channels = torch.maximum(channels, known.amax(dim=0))
        tokens.append(known.amax(dim=1))
    packed[NUM_SUMS:] = extremes
    found = torch.cat(tokens) if matrix.numel() else channels.new_zeros(rows)
    return Summary(packed, _floats(channels), _floats(found))


def _add(packed: Tensor, code: Tensor, size: Tensor) -> None:
    bins, low = size >> LOW_BITS, size & ((1 << LOW_BITS) - 1)
    squares = low * low
    for field, value in (
        (COUNTS, torch.ones_like(low)),
        (EDGES, (low == 0).long()),
        (NEAR, ((low == 1) | (low == 2)).long()),
        (LOW, low),
        (SQUARES, squares & 0xFFFFFFFF),
        (SQUARES_HIGH, squares >> 32),
    ):
        packed.scatter_add_(0, bins + field * BINS, value)
    exponent = size >> 23
    significand = (size & 0x7FFFFF) + ((exponent > 0).long() << 23)
    signed = torch.where(code < 0, -significand, significand)
    packed.scatter_add_(0, exponent + len(FIELDS) * BINS, signed)
    carry = packed[SQUARES * BINS : (SQUARES + 1) * BINS]
    packed[SQUARES_HIGH * BINS : (SQUARES_HIGH + 1) * BINS] += carry >> 32
    carry &= 0xFFFFFFFF


def _extremes(code: Tensor, size: Tensor) -> Tensor:
    finite, nonzero = size < INFINITY, (size > 0) & (size < INFINITY)
    place = torch.where(code < 0, -1 - size, code)
    largest, smallest, least, greatest = NOTHING
    return torch.stack(
        [
            torch.where(finite, size, largest).amax(),
            torch.where(nonzero, -size, smallest).amax(),
            torch.where(finite, -place, least).amax(),
            torch.where(finite, place, greatest).amax(),
        ]
    )


def _floats(codes: Tensor) -> Tensor:
    return codes.to(torch.int32).view(torch.float32)
