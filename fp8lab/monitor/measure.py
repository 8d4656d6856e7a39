"""Tensors reduced on their own device to short vectors: what the monitor keeps.

Every function returns one vector of int64 or float64 and waits for nothing, so that a step's
vectors can travel to the host together. What adds up over micro-batches is returned as sums and
counts; ratios are taken of the merged sums, in `operand_statistics` and in `sketch`, on the host.

A tensor is read once, by `summary`; what else is asked of it is asked of that summary, and where a
function takes a tensor or its summary (`Seen`), a tensor is summarised first. Casts, weights and
the activated gate have a pass of their own. Plain torch does everything; on a CPU, `kernels` does
the passes in C. Rejected: rows and channels kept per element in float64, a dozen passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fp8lab import formats, kernels
from fp8lab.casting import Cast
from fp8lab.kernels import measure as compiled
from fp8lab.kernels.summary import Summary, as_matrix, summary
from fp8lab.recipe import DelayedScaling
from fp8lab.scaling import absolute_maximum, matrix_shape
from fp8lab.sketch import (
    BINS,
    COUNTS,
    EDGES,
    FIELDS,
    FIRST_SPECIAL,
    LOW,
    LOW_BITS,
    NUM_SUMS,
    SQUARES,
    SQUARES_HIGH,
)

__all__ = [
    "CHANNEL_COLUMNS",
    "Seen",
    "Summary",
    "amax_and_power",
    "channel_matrix",
    "operand_statistics",
    "operand_vector",
    "sampled_rows",
    "sentinel_vector",
    "summary",
]

Seen = Tensor | Summary

# Channels whose amax is beyond this multiple of the median channel's are left out of the bulk.
OUTLIER_CHANNEL = 16.0
# At most this many weights of a row are kept for a scatter plot.
SAMPLED_WEIGHTS = 256

CHANNEL_COLUMNS = (
    "product_amax",
    "gate_amax",
    "up_amax",
    "alignment",
    "permuted_alignment",
    "gate_norm",
    "up_norm",
    "down_norm",
)


def _seen(seen: Seen) -> Summary:
    return seen if isinstance(seen, Summary) else summary(seen)


def sentinel_vector(product: Tensor, how: Cast | None, seen: Summary | None = None) -> Tensor:
    """float64 [4]: amax of a product (NaN if it has one, 0 of nothing) and its channel, the scale
    in force and the staleness of the operand (both NaN where nothing is scaled).

    `seen`, the product's summary if there is one, saves the pass over it.
    """
    matrix = as_matrix(product)
    found = torch.full((4,), torch.nan, dtype=torch.float64, device=matrix.device)
    if not matrix.numel():
        found[:2] = 0.0
    elif seen is not None and matrix.is_cpu and not _has_nan(seen):
        channels = seen.channels.numpy()
        hottest = int(channels.argmax())
        found[0], found[1] = float(channels[hottest]), hottest
    elif kernels.usable(matrix):
        compiled.sentinel(matrix, found)
    else:
        amax, hottest_channel = matrix.abs().amax(dim=0).max(dim=0)
        found[0], found[1] = amax, hottest_channel
    if how is None or how.scale is None:
        return found
    if how.tile is None:  # or there is no one scale; each was made just in time
        found[2] = how.scale
    found[3] = 1.0
    if isinstance(how.recipe, DelayedScaling):
        made_the_scale = how.format.max * 2.0**-how.recipe.margin / how.scale.double()
        found[3] = absolute_maximum(how.tensor).double() / made_the_scale
    return found


def amax_and_power(seen: Seen) -> Tensor:
    """float64 [2]: amax and sum of squares, not both finite where an element is not.

    A tensor is looked at in a pass that takes a sixth of a summary's time.
    """
    if isinstance(seen, Summary):
        if seen.packed.is_cpu and kernels.usable(seen.packed.view(torch.float32)):
            return compiled.amax_and_power(seen.packed)
        bins = seen.packed[: len(FIELDS) * BINS].view(len(FIELDS), BINS)
        factors = _square_factors(bins.device)
        amax = seen.packed[NUM_SUMS].int().view(torch.float32).double()
        found = torch.stack([amax, (bins * factors).sum()])
        return torch.where(bins[COUNTS, FIRST_SPECIAL:].any(), torch.nan, found)
    matrix = as_matrix(seen).contiguous()
    if not matrix.numel():
        return torch.zeros(2, dtype=torch.float64, device=matrix.device)
    if kernels.usable(matrix):
        return compiled.amax_and_power(matrix)
    magnitude = matrix.double().abs()
    return torch.stack([magnitude.amax(), magnitude.square().sum()])


def amax_and_power_of_silu(gate: Tensor) -> Tensor:
    """`amax_and_power` of silu(gate), float32, without making it: each number right to 2^-21."""
    matrix = as_matrix(gate).contiguous()
    if matrix.dtype is torch.float32 and matrix.numel() and kernels.usable(matrix):
        return compiled.amax_and_power(matrix, silu=True)
    return amax_and_power(functional.silu(matrix))


def _has_nan(seen: Summary) -> bool:
    packed = seen.packed.numpy()
    infinities = packed[EDGES * BINS + FIRST_SPECIAL]
    return bool(packed[FIRST_SPECIAL:BINS].sum() > infinities)


@cache
def _square_factors(device: torch.device) -> Tensor:
    """float64 [6, 2048]: what a packed number counts in the sum of squares of the finite."""
    bins = np.arange(BINS)
    unit = 4.0 ** (np.maximum(bins // 8, 1) - 150)
    significand = (bins % 8 + np.where(bins < 8, 0, 8)) * 2.0**LOW_BITS
    factors = np.zeros((len(FIELDS), BINS))
    factors[COUNTS] = significand**2 * unit
    factors[LOW] = 2 * significand * unit
    factors[SQUARES], factors[SQUARES_HIGH] = unit, unit * 2.0**32
    factors[:, FIRST_SPECIAL:] = 0
    return torch.from_numpy(factors).to(device)


def _median(values: Tensor) -> Tensor:
    """Between the middle two of an even number. Not torch.quantile, which has a largest size."""
    ascending = values.sort().values
    return (ascending[(len(values) - 1) // 2] + ascending[len(values) // 2]) / 2


def operand_vector(how: Cast) -> Tensor:
    """float64 [11]: counts and sums that say what a cast did; see `operand_statistics`.

    A channel scale is undone first, so that errors are those of the product itself.
    """
    if not how.tensor.numel() or how.tensor.is_meta:
        return torch.zeros(11, dtype=torch.float64)
    return _compiled_operand(how) if _has_kernel(how) else _plain_operand(how)


def _has_kernel(how: Cast) -> bool:
    scales = how.scale, how.scale_inv
    return (
        None not in scales
        and how.rounding == "nearest"
        and how.format is not formats.SIGN
        and how.tensor.dim() > 0
        and kernels.usable(how.tensor)
        and all(
            _is_single(part) and kernels.usable(part)
            for part in (*scales, how.channel_scale)
            if part is not None
        )
        # The kernel reads a scale a column, whatever it is given.
        and (how.channel_scale is None or how.channel_scale.shape == how.tensor.shape[-1:])
    )


def _is_single(tensor: Tensor) -> bool:
    return tensor.dtype is torch.float32


def _compiled_operand(how: Cast) -> Tensor:
    rows, columns = matrix_shape(how.tensor.shape)
    matrix = how.tensor.detach().view(rows, columns)
    assert how.scale is not None and how.scale_inv is not None
    balance = how.channel_scale
    counts, sums, peaks = compiled.operand(
        matrix, how.format, how.scale, how.scale_inv, how.tile or (rows, columns), balance
    )
    bulk = _bulk(peaks.double() if balance is None else peaks.double() / balance.double())
    return torch.cat(
        [
            torch.tensor([matrix.numel()], dtype=torch.float64),
            counts.double(),
            sums.sum(dim=1),
            torch.where(bulk, sums[:2], 0.0).sum(dim=1),
        ]
    )


def _bulk(channels: Tensor) -> Tensor:
    """Which channels are no outliers; none where one has a NaN (whose place among others is not
    promised)."""
    median = _median(channels)
    bulk: Tensor = (channels <= OUTLIER_CHANNEL * median) & ~channels.isnan().any()
    return bulk


def _plain_operand(how: Cast) -> Tensor:
    restored = 1.0 if how.channel_scale is None else how.channel_scale.double()
    original = how.tensor.detach().double() / restored
    rounded = how.fake_quantized().double() / restored
    code = how.rounded().abs()
    flushed = (rounded == 0) & (original != 0)
    subnormal = (code > 0) & (code < how.format.smallest_normal)
    error, power = (rounded - original).square(), original.square()
    channels = original.abs().reshape(matrix_shape(original.shape)).amax(dim=0)
    bulk = _bulk(channels)
    return torch.stack(
        [
            torch.full_like(error.sum(), original.numel()),
            (original != 0).sum().double(),
            *(shown.sum().double() for shown in (how.saturated(), flushed, subnormal)),
            error.sum(),
            power.sum(),
            rounded.square().sum(),
            (original * rounded).sum(),
            torch.where(bulk, error, 0.0).sum(),
            torch.where(bulk, power, 0.0).sum(),
        ]
    )


def operand_statistics(sums: NDArray[np.float64]) -> dict[str, float]:
    """Columns of a tensor row from the merged sums of `operand_vector`; undefined ones left out.

    `saturated` and `subnormal` are shares of all elements, `flushed` is the share of the non-zero
    ones that became zero.
    """
    count, nonzero, saturated, flushed, subnormal = (float(x) for x in sums[:5])
    error, power, rounded, dot, bulk_error, bulk_power = (float(x) for x in sums[5:])
    row: dict[str, float] = {}
    if count:
        row |= {"saturated": saturated / count, "subnormal": subnormal / count}
        row["mse"] = error / count
    if nonzero:
        row["flushed"] = flushed / nonzero
    if power > 0 and 0 < error < np.inf:
        row["sqnr_db"] = 10.0 * float(np.log10(power / error))
    if power > 0 and rounded > 0:
        row["cosine"] = dot / float(np.sqrt(power) * np.sqrt(rounded))
    if bulk_power > 0:
        row["bulk_error"] = float(np.sqrt(bulk_error / bulk_power))
    return {name: value for name, value in row.items() if np.isfinite(value)}


def channel_matrix(
    product: Seen, gate: Seen, up: Seen, weights: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """float64 [8, channels]: `CHANNEL_COLUMNS`, for every channel.

    `weights` are those of gate [channels, dim], up [channels, dim] and down [dim, channels]. The
    permuted control pairs each gate row with the up row half the channels further on. Raises
    ValueError for weights of other shapes.
    """
    gate_rows, up_rows, down = (weight.detach() for weight in weights)
    if gate_rows.shape != up_rows.shape or down.dim() != 2 or down.shape[1] != len(gate_rows):
        shapes = ", ".join(str(list(weight.shape)) for weight in weights)
        expected = "[channels, dim] twice and [dim, channels]"
        raise ValueError(f"channel_matrix: weights {shapes}, expected {expected}")
    amaxes = _seen(product).channels, _seen(gate).channels, _seen(up).channels
    if any(len(amax) != len(gate_rows) for amax in amaxes):  # a kernel would read beyond their end
        found = ", ".join(str(len(amax)) for amax in amaxes)
        raise ValueError(f"channel_matrix: {found} channels, expected {len(gate_rows)} in each")
    if all(kernels.usable(part) for part in (gate_rows, up_rows, down, *amaxes)):
        return compiled.channel_matrix(amaxes, (gate_rows, up_rows, down))
    rows, others = gate_rows.double(), up_rows.double()
    gate_norm, up_norm = rows.norm(dim=1), others.norm(dim=1)
    half = len(rows) // 2
    permuted, permuted_norm = others.roll(-half, 0), up_norm.roll(-half, 0)
    return torch.stack(
        [
            *(amax.double() for amax in amaxes),
            (rows * others).sum(1) / (gate_norm * up_norm),
            (rows * permuted).sum(1) / (gate_norm * permuted_norm),
            gate_norm,
            up_norm,
            down.double().norm(dim=0),
        ]
    )


def sampled_rows(product: Seen, gate: Tensor, up: Tensor, followed: Sequence[int] = ()) -> Tensor:
    """float64 [1 + followed, 1 + 2n]: a channel, its gate row and its up row, evenly sampled.

    First the hottest channel of this product, then those of `followed`.
    """
    peaks = _seen(product).channels
    gate, up = gate.detach(), up.detach()
    channels, dim = gate.shape
    if gate.shape != up.shape or len(peaks) != channels:
        shapes = f"{list(gate.shape)} and {list(up.shape)}"
        raise ValueError(f"sampled_rows: weights {shapes}, expected [{len(peaks)}, dim] twice")
    for channel in followed:
        if not 0 <= channel < channels:
            raise ValueError(f"sampled_rows: channel {channel}, expected 0..{channels - 1}")
    stride = -(-dim // SAMPLED_WEIGHTS)
    if all(kernels.usable(part) for part in (peaks, gate, up)):
        return compiled.sampled_rows(peaks, gate, up, list(followed), stride)
    others = torch.tensor(list(followed), dtype=torch.int64, device=peaks.device)
    # Not `weight[hottest]`: an index that is a scalar on the device is waited for.
    chosen = torch.cat([peaks.argmax(dim=0, keepdim=True), others])
    sampled = [weight[:, ::stride].index_select(0, chosen) for weight in (gate, up)]
    return torch.cat([chosen[:, None].double(), *(rows.double() for rows in sampled)], dim=1)
