"""`summary` on a GPU: one Triton kernel, one launch a tensor, and nothing is waited for.

A program takes a tile. Counts it makes in shared memory (`tl.histogram`), and adds them once; low
bits and their squares it adds element by element, by atomics on integers, so that the result does
not depend on who comes first. Programs share tables by turns, many enough that few meet at one
address, and that no sum of squares of 40 bits can fill 64. The tables, by sign and bin, are then
brought into the packed form by a few operations on a few thousand numbers.

Triton is imported at first use. Where it cannot be had, or does not get along with the device,
`usable` says no, and plain torch does the same: equal to the bit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fp8lab.sketch import BINS, FIELDS, LOW_BITS, NOTHING

_ROWS, _COLUMNS = 32, 128  # of a tile
_SIGNED_BINS = 2 * BINS
_TABLES = 64
_FILLED_BY = 1 << 23  # elements whose squares of 40 bits sum to 63 bits

_broken: list[str] = []


@cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def summarise(  # type: ignore[no-untyped-def]
        x,
        tables,
        extremes,
        channels,
        tokens,
        rows,
        columns,
        across,
        num_tables,
        HALF: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        program = tl.program_id(0)
        row = (program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = (program % across) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        code = tl.load(x + row[:, None] * columns + column[None, :], mask=inside, other=0)
        code = code.to(tl.int32)
        if HALF:
            code = code << 16
        size = code & 0x7FFFFFFF
        known = tl.where(inside & (size <= 0x7F800000), size, 0)
        tl.atomic_max(channels + column, tl.max(known, axis=0), mask=column < columns)
        tl.atomic_max(tokens + row, tl.max(known, axis=1), mask=row < rows)

        finite = inside & (size < 0x7F800000)
        place = tl.where(code < 0, -1 - size, code)
        tl.atomic_max(extremes, tl.max(tl.where(finite, size, 0)))
        nonzero = tl.where(finite & (size > 0), -size, -0x7F800000)
        tl.atomic_max(extremes + 1, tl.max(nonzero))
        # The place of -infinity, -0x7F800001, has no negative: the least finite one's has.
        tl.atomic_max(extremes + 2, tl.max(tl.where(finite, -place, -0x7F800000)))
        tl.atomic_max(extremes + 3, tl.max(tl.where(finite, place, -0x7F800001)))

        table = tables + (program % num_tables).to(tl.int64) * (5 * 4096)
        where = (code >> 20) & 0xFFF
        low = (code & 0xFFFFF).to(tl.int64)
        flat = tl.reshape(where, (ROWS * COLUMNS,))
        every = tl.reshape(inside, (ROWS * COLUMNS,))
        edge = tl.reshape(inside & (low == 0), (ROWS * COLUMNS,))
        entry = tl.arange(0, 4096)
        counts = tl.histogram(flat, 4096, mask=every)
        tl.atomic_add(table + entry, counts.to(tl.int64), mask=counts > 0)
        edges = tl.histogram(flat, 4096, mask=edge)
        tl.atomic_add(table + 4096 + entry, edges.to(tl.int64), mask=edges > 0)
        near = inside & ((low == 1) | (low == 2))
        tl.atomic_add(table + 2 * 4096 + where, near.to(tl.int64), mask=near)
        tl.atomic_add(table + 3 * 4096 + where, low, mask=inside & (low > 0))
        tl.atomic_add(table + 4 * 4096 + where, low * low, mask=inside & (low > 0))

    return triton, summarise


def usable() -> bool:
    """Whether Triton is here and has not failed yet."""
    if not _broken:
        try:
            _kernel()
        except Exception as error:  # whatever an import can raise
            _broken.append(str(error))
    return not _broken


def summary(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Packed, channels and tokens of a contiguous [rows, columns] of float32 or bfloat16 with
    elements; see `kernels.summary`. None if Triton fails, from when on it is not asked again."""
    rows, columns = matrix.shape
    half = matrix.dtype is torch.bfloat16
    across = -(-columns // _COLUMNS)
    programs = -(-rows // _ROWS) * across
    most = _FILLED_BY // (_ROWS * _COLUMNS)  # programs that may share a table
    num_tables = max(min(_TABLES, programs), -(-programs // most))
    device = matrix.device
    tables = torch.zeros(num_tables, 5, _SIGNED_BINS, dtype=torch.int64, device=device)
    nothing = [torch.full((1,), n, dtype=torch.int32, device=device) for n in NOTHING]
    extremes = torch.cat(nothing)
    channels = torch.zeros(columns, dtype=torch.int32, device=device)
    tokens = torch.zeros(rows, dtype=torch.int32, device=device)
    codes = matrix.view(torch.int16 if half else torch.int32)
    arguments = codes, tables, extremes, channels, tokens, rows, columns, across, num_tables
    options = {"HALF": half, "ROWS": _ROWS, "COLUMNS": _COLUMNS}
    options["enable_fp_fusion"] = False  # there are no floats; some releases warn if it is not said
    try:
        with torch.cuda.device(device) if matrix.is_cuda else torch.no_grad():
            _kernel()[1][(programs,)](*arguments, **options)
    except Exception as error:  # a driver, compiler or device that Triton does not get along with
        _broken.append(str(error))
        return None
    return _packed(tables, extremes), channels.view(torch.float32), tokens.view(torch.float32)


def _packed(tables: Tensor, extremes: Tensor) -> Tensor:
    squares = torch.stack([tables[:, 4] & 0xFFFFFFFF, tables[:, 4] >> 32]).sum(dim=1)
    fields = torch.cat([tables[:, :4].sum(dim=0), squares])
    positive, negative = fields.view(len(FIELDS), 2, BINS).unbind(1)
    bins = positive + negative
    bins[-1] += bins[-2] >> 32
    bins[-2] &= 0xFFFFFFFF
    index = torch.arange(BINS, device=tables.device)
    leading = index % 8 + torch.where(index < 8, 0, 8)
    signed = (positive[0] - negative[0]) * (leading << LOW_BITS) + (positive[3] - negative[3])
    signed = signed.view(-1, 8).sum(dim=1)
    return torch.cat([bins.flatten(), signed, extremes.long()])
