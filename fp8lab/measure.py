"""Tensors reduced on their own device to short float64 vectors: what the monitor keeps.

Every function returns one float64 vector and waits for nothing, so that a step's vectors can travel
to the host together. What adds up over micro-batches is returned as sums and counts; ratios
are taken of the merged sums, in `operand_statistics` and in `sketch`, on the host.

Cost: about a dozen passes over a recorded tensor, most of them in float64. Rejected for now: one
fused kernel; the plain form is what such a kernel has to equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fp8lab.casting import Cast
from fp8lab.recipe import DelayedScaling
from fp8lab.scaling import absolute_maximum
from fp8lab.sketch import HISTOGRAM_BINS

# Channels whose amax is beyond this multiple of the median channel's are left out of the bulk.
OUTLIER_CHANNEL = 16.0
# At most this many weights of a row are kept for a scatter plot.
SAMPLED_WEIGHTS = 256

STRUCTURE_COLUMNS = ("token_ratio", "channel_ratio")
GATE_COLUMNS = ("amplification", "coincidence")
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


def sketch_vector(tensor: Tensor) -> Tensor:
    """float64 [12 + 1024]: `sketch.SCALARS`, then the histogram."""
    values = tensor.detach().float().flatten()
    nans, infs = values.isnan().sum(), values.isinf().sum()
    is_finite = values.isfinite()
    finite = torch.where(is_finite, values, 0.0)
    magnitude = finite.abs()
    squares = magnitude.double().square()
    if values.numel():
        smallest = torch.where(is_finite, values, torch.inf).amin()
        largest = torch.where(is_finite, values, -torch.inf).amax()
        amin = torch.where(magnitude > 0, magnitude, torch.inf).amin()
        amax = magnitude.amax()
    else:
        amin = smallest = values.new_full((), torch.inf)
        amax, largest = values.new_zeros(()), values.new_full((), -torch.inf)
    zeros = (values == 0).sum()
    scalars = [
        torch.full_like(amin, values.numel(), dtype=torch.float64),
        *(count.double() for count in (zeros, nans, infs)),
        *(extreme.double() for extreme in (amax, amin, smallest, largest)),
        finite.double().sum(),
        magnitude.double().sum(),
        squares.sum(),
        squares.square().sum(),
    ]
    bins = (values.view(torch.int32) & 0x7FFFFFFF) >> 21
    histogram = torch.bincount(bins, minlength=HISTOGRAM_BINS)
    # Counted apart: zeros, and in the last four bins infinities and NaNs.
    histogram[0] -= zeros
    histogram[-4:] = 0
    return torch.cat([torch.stack(scalars), histogram.double()])


def sentinel_vector(product: Tensor, how: Cast | None) -> Tensor:
    """float64 [4]: amax of a product with elements (NaN if it has one) and its channel, the scale
    in force and the staleness of the operand (both NaN where nothing is scaled)."""
    nothing = torch.full((), torch.nan, dtype=torch.float64, device=product.device)
    amax, hottest = product.detach().reshape(-1, product.shape[-1]).abs().amax(dim=0).max(dim=0)
    found = [amax.double(), hottest.double()]
    if how is None or how.scale is None:
        return torch.stack([*found, nothing, nothing])
    staleness = torch.ones_like(nothing)
    if how.tile is not None:  # there is no one scale; each was made just in time
        return torch.stack([*found, nothing, staleness])
    if isinstance(how.recipe, DelayedScaling):
        made_the_scale = how.format.max * 2.0**-how.recipe.margin / how.scale.double()
        staleness = absolute_maximum(how.tensor).double() / made_the_scale
    return torch.stack([*found, how.scale.double(), staleness])


def structure_vector(product: Tensor) -> Tensor:
    """float64 [2]: `STRUCTURE_COLUMNS` of a product [..., channels]."""
    magnitude = product.detach().reshape(-1, product.shape[-1]).abs().float()
    tokens, channels = magnitude.amax(dim=1).double(), magnitude.amax(dim=0).double()
    return torch.stack(
        [
            tokens.quantile(0.999) / tokens.quantile(0.5),
            channels.amax() / channels.quantile(0.5),
        ]
    )


def gate_vector(product: Tensor, activated_gate: Tensor, activated_up: Tensor) -> Tensor:
    """float64 [2]: `GATE_COLUMNS`."""
    peaks, crests = [], []
    for tensor in (product, activated_gate, activated_up):
        magnitude = tensor.detach().abs().double()
        peaks.append(magnitude.amax())
        crests.append(magnitude.amax() / magnitude.square().mean().sqrt())
    amplification = crests[0] / torch.maximum(crests[1], crests[2])
    return torch.stack([amplification, peaks[0] / (peaks[1] * peaks[2])])


def operand_vector(how: Cast) -> Tensor:
    """float64 [11]: counts and sums that say what a cast did; see `operand_statistics`.

    A channel scale is undone first, so that errors are those of the product itself.
    """
    restored = 1.0 if how.channel_scale is None else how.channel_scale.double()
    original = how.tensor.detach().double() / restored
    rounded = how.fake_quantized().double() / restored
    code = how.rounded().abs()
    flushed = (rounded == 0) & (original != 0)
    subnormal = (code > 0) & (code < how.format.smallest_normal)
    error, power = (rounded - original).square(), original.square()
    channels = original.abs().reshape(-1, original.shape[-1]).amax(dim=0)
    bulk = channels <= OUTLIER_CHANNEL * channels.quantile(0.5)
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
    product: Tensor,
    gate: Tensor,
    up: Tensor,
    weights: tuple[nn.Parameter, nn.Parameter, nn.Parameter],
) -> Tensor:
    """float64 [8, channels]: `CHANNEL_COLUMNS`, for every channel.

    `weights` are those of gate [channels, dim], up [channels, dim] and down [dim, channels]. The
    permuted control pairs each gate row with the up row half the channels further on.
    """
    amaxes = [
        tensor.detach().reshape(-1, tensor.shape[-1]).abs().amax(dim=0).double()
        for tensor in (product, gate, up)
    ]
    gate_rows, up_rows, down_columns = (weight.detach().double() for weight in weights)
    gate_norm, up_norm = gate_rows.norm(dim=1), up_rows.norm(dim=1)
    half = gate_rows.shape[0] // 2
    other_rows, other_norm = up_rows.roll(-half, 0), up_norm.roll(-half, 0)
    return torch.stack(
        [
            *amaxes,
            (gate_rows * up_rows).sum(1) / (gate_norm * up_norm),
            (gate_rows * other_rows).sum(1) / (gate_norm * other_norm),
            gate_norm,
            up_norm,
            down_columns.norm(dim=0),
        ]
    )


def sampled_rows(
    product: Tensor, gate: nn.Parameter, up: nn.Parameter, followed: Sequence[int] = ()
) -> Tensor:
    """float64 [1 + followed, 1 + 2n]: a channel, its gate row and its up row, evenly sampled.

    First the hottest channel of this product, then those of `followed`.
    """
    peaks = product.detach().reshape(-1, product.shape[-1]).abs().amax(dim=0)
    others = torch.tensor(list(followed), dtype=torch.int64, device=product.device)
    # Not `weight[hottest]`: an index that is a scalar on the device is waited for.
    channels = torch.cat([peaks.argmax(dim=0, keepdim=True), others])
    stride = -(-gate.shape[1] // SAMPLED_WEIGHTS)
    sampled = [weight.detach()[:, ::stride].index_select(0, channels) for weight in (gate, up)]
    return torch.cat([channels[:, None].double(), *(rows.double() for rows in sampled)], dim=1)
