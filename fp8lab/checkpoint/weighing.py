"""What is kept of a matrix of weights, and of the pairs of a gate's and an up's rows.

Two passes over a matrix: the first finds what decides every scale (amaxes of rows, columns and
tiles) and the moments; the second casts as six recipes do and counts what is lost. Pairs of rows
take one more over gate and up. Rows come in bands of whole tiles, so that of a file only a band is
resident, and what is summed in which order depends on the matrix's shape alone: a file, its shards
and the live model give equal numbers.

Counts and amaxes are exact and equal to those of `casting`'s casts; sums are right to 2^-16. On a
CPU `kernels` does the passes in C, else plain torch does, in float64: so too for what has squares
that float32 does not hold, as weights in use hardly ever have. Rejected: `measure`'s kernels, exact
to the last bit of float64 at five times the time, and one cast at a time, six passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fp8lab import kernels
from fp8lab.casting import Cast
from fp8lab.checkpoint.audited import RECIPE_NAMES, corrected
from fp8lab.formats import E2M1, E4M3, FloatFormat
from fp8lab.kernels import weights as compiled
from fp8lab.kernels.weights import Losses, Moments, Scales
from fp8lab.recipe import (
    Float8BlockScaling,
    Float8CurrentScaling,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    Recipe,
    RowwiseScaling,
)
from fp8lab.rounding import round_float32
from fp8lab.scaling import exponent_scales, rowwise_scale, scales_for, tile_maximum

# In the order of weights.c. Of weights delayed scaling is current scaling: they hardly move.
_CASTS: tuple[Recipe, ...] = (
    Float8CurrentScaling(),
    RowwiseScaling(),
    Float8BlockScaling(),
    MXFP8BlockScaling(),
    MXFP8BlockScaling(scale_rounding="ocp_floor"),
    NVFP4BlockScaling(),
)
RECIPES: dict[str, Recipe] = dict(zip(RECIPE_NAMES, _CASTS, strict=True))
BAND = 1 << 21  # elements of a band, about
# Beyond, float32 has no room to round; no weight is there.
LARGEST = 2.0**100
# Fourth powers and squares of amaxes within these, and sums of thousands, are float32's to 2^-16.
_FOURTH = 2.0**-25, 2.0**27
_SMALLEST_SQUARE = 2.0**-51
# Tiles in one operation: of more, torch starts threads, and so do the other matrices' threads.
_AT_ONCE = 1 << 15

_WEIGHED = torch.float32, torch.bfloat16

Array = NDArray[np.float64]
Release = Callable[[Tensor], None]


class Loss(NamedTuple):
    """What a recipe's cast did: the sum of squared errors, and how many elements were flushed to
    zero or saturated."""

    error: float
    flushed: int
    saturated: int


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """What is kept of a matrix [rows, columns]: amaxes and sums of squares by row and by column,
    the sum of x⁴, and what each recipe loses ({} where an element is not finite or beyond 2^100).
    """

    row_amax: Array
    row_power: Array
    column_amax: Array
    column_power: Array
    fourth: float
    zeros: int
    losses: dict[str, Loss]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, columns."""
        return len(self.row_amax), len(self.column_amax)

    @property
    def count(self) -> int:
        """Elements."""
        return len(self.row_amax) * len(self.column_amax)

    @property
    def amax(self) -> float:
        """The largest magnitude; NaN if there is one, 0 of nothing."""
        return float(self.row_amax.max(initial=0.0))

    @property
    def power(self) -> float:
        """The sum of squares."""
        return float(self.row_power.sum())


def scales_fit(scales: tuple[int, ...], matrix: tuple[int, ...]) -> bool:
    """Whether these are one scale, one for each row, or one for each 128 × 128; of stacked experts,
    so for each."""
    *several, rows, columns = matrix
    blocks = -(-rows // 128), -(-columns // 128)
    each = [(*several, rows, 1), (*several, *blocks)] if rows and columns else []
    return scales in each or (math.prod(scales) == 1 and len(scales) <= 2)


class Bands:
    """A matrix by bands of rows, each contiguous, on the CPU and of a dtype that can be weighed.

    `matrix` is a view [rows, columns] of any float dtype and strides. `scale_inv` multiplies it, as
    of an FP8 checkpoint: of one element, [rows, 1], or one for each 128 × 128. Raises ValueError
    for a scale of another shape.
    """

    def __init__(
        self, matrix: Tensor, scale_inv: Tensor | None = None, release: Release | None = None
    ) -> None:
        self.matrix, self.release = matrix.detach(), release
        self.shape = matrix.shape[0], matrix.shape[1]
        self.height = max(128, BAND // max(self.shape[1], 1) // 128 * 128)
        if scale_inv is not None and not scales_fit(tuple(scale_inv.shape), self.shape):
            raise ValueError(f"scale_inv {list(scale_inv.shape)} of a matrix {list(self.shape)}")
        self.scale_inv = None if scale_inv is None else scale_inv.detach().float()
        plain = scale_inv is None and matrix.is_cpu and matrix.dtype in _WEIGHED
        self._plain = plain and matrix.is_contiguous()
        self._kept: Tensor | None = None  # what had to be made, where it is small

    def rows(self, first: int, last: int) -> Tensor:
        """float32 or bfloat16 [last - first, columns], contiguous."""
        if self._plain:
            return self.matrix[first:last]
        if self._kept is None and self.matrix.numel() <= BAND:
            self._kept = self._made(0, self.shape[0])
        return self._made(first, last) if self._kept is None else self._kept[first:last]

    def _made(self, first: int, last: int) -> Tensor:
        rows = self.matrix[first:last].cpu()
        if self.scale_inv is not None:
            rows = rows.float() * self._spread(first, last)
        elif rows.dtype not in _WEIGHED:
            rows = rows.float()
        turned = None if rows.is_contiguous() else compiled.turned(rows)
        return rows.contiguous() if turned is None else turned

    def _spread(self, first: int, last: int) -> Tensor:
        assert self.scale_inv is not None
        if self.scale_inv.numel() == 1:
            return self.scale_inv.reshape(())
        if tuple(self.scale_inv.shape) == (self.shape[0], 1):
            return self.scale_inv[first:last]
        tall = self.scale_inv[first // 128 : -(-last // 128)].repeat_interleave(128, 0)
        skipped = first % 128  # the control's rows begin anywhere
        tall = tall[skipped : skipped + last - first]
        return tall.repeat_interleave(128, 1)[:, : self.shape[1]]

    def each(self, backwards: bool = False) -> Iterator[tuple[int, Tensor]]:
        """The first row of each band, and the band."""
        firsts = range(0, self.shape[0], self.height)
        for first in reversed(firsts) if backwards else firsts:
            last = min(first + self.height, self.shape[0])
            yield first, self.rows(first, last)
            self.give_back(first, last)

    def give_back(self, first: int, last: int) -> None:
        """Whoever owns the memory may have it again."""
        if self.release is not None:
            self.release(self.matrix[first:last])


def weigh(bands: Bands, casts: bool = True) -> Matrix:
    """What is kept of a matrix; without its casts, in one pass, if these are not asked for."""
    moments, losses = _nothing(bands.shape), _losses()
    _pass(bands.each(), compiled.scan, _scan, moments)
    wide = not _in_float32(moments.row_amax.numpy(), moments.column_amax.numpy())
    if wide:
        moments = _nothing(bands.shape)
        _pass(bands.each(), _scan, _scan, moments)
    amax = moments.row_amax.max() if bands.shape[0] else torch.zeros(())
    casts = casts and bool(amax < LARGEST)
    if casts:
        scales = _scales(moments, amax, bands.matrix.dtype)
        # Backwards: the last bands are still in the processor's cache.
        fast = _cast if wide else compiled.cast
        _pass(bands.each(backwards=True), fast, _cast, scales, losses)
    lost = zip(losses.errors.tolist(), losses.counts.tolist(), strict=True)
    named = zip(RECIPES, (Loss(max(error, 0.0), *counts) for error, counts in lost), strict=True)
    return Matrix(
        row_amax=moments.row_amax.double().numpy(),
        row_power=moments.row_power.numpy(),
        column_amax=moments.column_amax.double().numpy(),
        column_power=moments.column_power.numpy(),
        fourth=float(moments.fourth),
        zeros=int(losses.zeros),
        losses=dict(named) if casts else {},
    )


def _nothing(shape: tuple[int, int]) -> Moments:
    rows, columns = shape
    tiles = -(-rows // 16), -(-columns // 16)
    # By numpy, which starts no threads to clear memory.
    amaxes = (torch.from_numpy(np.zeros(n, np.float32)) for n in (rows, columns, tiles))
    return Moments(*amaxes, *(torch.zeros(n, dtype=torch.float64) for n in (rows, columns, 1)))


def _losses() -> Losses:
    counts = torch.zeros(len(RECIPES), 2, dtype=torch.int64)
    return Losses(torch.zeros(len(RECIPES), dtype=torch.float64), counts, counts.new_zeros(1))


def _pass(
    bands: Iterator[tuple[int, Tensor]],
    fast: Callable[..., None],
    plain: Callable[..., None],
    *to: object,
) -> None:
    """Over all bands; in parts where they are not compiled, of which float64 needs the memory."""
    for first, band in bands:
        if fast is not plain and kernels.usable(band):
            fast(band, first, *to)
        else:
            for top in range(0, len(band), 128):
                plain(band[top : top + 128], first + top, *to)


def _in_float32(*amaxes: NDArray[Any]) -> bool:
    """Whether sums of squares and fourth powers of float32 are right, of a matrix with such amaxes
    of rows and columns; of one that is not finite they are wrong in any case."""
    every = np.concatenate(amaxes).astype(np.float64)
    every = every[every != 0.0]
    if not every.size or not np.isfinite(every).all():
        return True
    largest, smallest = every.max(), every.min()
    return bool(_FOURTH[0] <= largest <= _FOURTH[1] and smallest >= _SMALLEST_SQUARE)


def _scales(moments: Moments, amax: Tensor, dtype: torch.dtype) -> Scales:
    """Of the amaxes that the first pass found, by the formulas of `scaling`."""
    scale, scale_inv = scales_for(amax, E4M3, False)
    rowwise = RECIPES["rowwise"]
    assert isinstance(rowwise, RowwiseScaling)
    rows = rowwise_scale(moments.row_amax[:, None], rowwise, E4M3, (1, 1))
    largest = torch.finfo(dtype if dtype.itemsize > 1 else torch.float32).max
    squares, _ = scales_for(tile_maximum(moments.tile_amax, (8, 8)), E4M3, True, largest)
    # NVFP4: TE `core_nvfp4.cuh`, as in `casting`.
    top = torch.full_like(amax, E4M3.max * E2M1.max)
    encode = torch.div(top, amax).clamp(max=torch.finfo(torch.float32).max)
    encode = torch.where((amax == 0) | (encode == 0), 1.0, encode)
    sixth = torch.full_like(amax, E2M1.max).reciprocal()
    if kernels.usable(moments.tile_amax):
        factors = float(encode * sixth), float(encode.reciprocal())
        tiles, tiles_inv = compiled.tile_scales(moments.tile_amax, *factors)
        return Scales(float(scale), float(scale_inv), rows, squares, tiles, tiles_inv)
    tiles, tiles_inv = torch.empty(2, *moments.tile_amax.shape)
    flat = (part.view(-1).split(_AT_ONCE) for part in (moments.tile_amax, tiles, tiles_inv))
    for found, to, to_inv in zip(*flat, strict=True):
        inverse = round_float32(found * (encode * sixth), E4M3) * encode.reciprocal()
        to_inv.copy_(inverse)
        to.copy_(inverse.reciprocal().clamp(max=torch.finfo(torch.float32).max))
    return Scales(float(scale), float(scale_inv), rows, squares, tiles, tiles_inv)


def _scan(band: Tensor, first: int, to: Moments) -> None:
    """`compiled.scan` in plain torch."""
    rows, columns = band.shape
    last = first + rows
    size, square = band.double().abs(), band.double().square()
    padded = torch.nn.functional.pad(size, (0, -columns % 16, 0, -rows % 16))
    tiles = padded.view(-1, 16, padded.shape[1] // 16, 16).amax((1, 3))
    to.tile_amax[first // 16 : -(-last // 16)] = tiles.float()
    to.row_amax[first:last] = size.amax(1).float()
    torch.maximum(to.column_amax, size.amax(0).float(), out=to.column_amax)
    to.row_power[first:last] = square.sum(1)
    to.column_power.add_(square.sum(0))
    to.fourth.add_(square.square().sum())


def _cast(band: Tensor, first: int, scales: Scales, to: Losses) -> None:
    """`compiled.cast` in plain torch."""
    last = first + len(band)
    squares = slice(first // 128, -(-last // 128))
    tiles = slice(first // 16, -(-last // 16))
    exponents = (
        exponent_scales(tile_maximum(band, (1, 32)), E4M3, rounding)
        for rounding in ("up", "ocp_floor")
    )
    whole = torch.tensor(scales.tensor), torch.tensor(scales.tensor_inv)
    rows, blocks = scales.rows[first:last], scales.squares[squares]
    casts: list[tuple[FloatFormat, tuple[Tensor, Tensor], tuple[int, int] | None]] = [
        (E4M3, whole, None),
        (E4M3, (rows, rows.reciprocal()), (1, max(band.shape[1], 1))),
        (E4M3, (blocks, blocks.reciprocal()), (128, 128)),
        *((E4M3, exponent, (1, 32)) for exponent in exponents),
        (E2M1, (scales.tiles[tiles], scales.tiles_inv[tiles]), (16, 16)),
    ]
    original = band.double()
    for place, (fmt, (scale, scale_inv), tile) in enumerate(casts):
        recipe = list(RECIPES.values())[place]
        how = Cast(band, recipe, fmt, scale.contiguous(), scale_inv.contiguous(), tile)
        value = how.fake_quantized().double()
        to.errors[place] += (value - original).square().sum()
        to.counts[place, 0] += ((how.rounded() == 0) & (original != 0)).sum()
        to.counts[place, 1] += how.saturated().sum()
    to.zeros[0] += (original == 0).sum()


class Pairs(NamedTuple):
    """Cosines of gate row i and up row i, and of gate row i and the up row half the rows further
    on: the control. float64 [rows] each, NaN where a row is zero."""

    alignment: Array
    permuted: Array


def pair(gate: Bands, up: Bands, gate_matrix: Matrix, up_matrix: Matrix) -> Pairs:
    """The cosines between the rows of a gate and of an up of the same shape.

    Raises ValueError where the shapes differ.
    """
    if gate.shape != up.shape:
        shapes = f"{list(gate.shape)} and {list(up.shape)}"
        raise ValueError(f"pair: {shapes}, expected two matrices of one shape")
    rows, half = gate.shape[0], gate.shape[0] // 2
    fast = all(_in_float32(one.row_amax, one.column_amax) for one in (gate_matrix, up_matrix))
    dots = np.empty((2, rows))
    stops = sorted({*range(0, rows, gate.height), rows - half, rows})
    for first, last in pairwise(stops):
        other = (first + half) % rows
        triple = [
            gate.rows(first, last),
            up.rows(first, last),
            up.rows(other, other + last - first),
        ]
        if len({part.dtype for part in triple}) > 1:
            triple = [part.float() for part in triple]
        compute = compiled.pairs if fast and all(map(kernels.usable, triple)) else _pairs
        dots[:, first:last] = compute(*triple).numpy()
        gate.give_back(first, last)
        up.give_back(first, last)
        up.give_back(other, other + last - first)
    gate_norm, up_norm = np.sqrt(gate_matrix.row_power), np.sqrt(up_matrix.row_power)
    with np.errstate(invalid="ignore", divide="ignore"):
        alignment = dots[0] / (gate_norm * up_norm)
        permuted = dots[1] / (gate_norm * np.roll(up_norm, -half))
    return Pairs(np.clip(alignment, -1.0, 1.0), np.clip(permuted, -1.0, 1.0))


def _pairs(gate: Tensor, up: Tensor, other: Tensor) -> Tensor:
    rows = gate.double()
    return torch.stack([(rows * up.double()).sum(1), (rows * other.double()).sum(1)])


def chance(cosine: float, dim: float) -> float:
    """The probability that two random directions in `dim` dimensions have |cos| ≥ `cosine`.

    Of random directions cos² has the distribution Beta(1/2, (dim - 1)/2) (Muirhead 1982, theorem
    1.5.7), so it is the regularised incomplete beta function I(1 - cos²; (dim - 1)/2, 1/2), here by
    its continued fraction (DLMF 8.17.22). `dim` is at least 1 and need not be whole.
    """
    x, a, b = 1.0 - cosine * cosine, (dim - 1.0) / 2.0, 0.5
    if cosine <= 0.0 or dim <= 1.0:
        return 1.0
    if x <= 0.0:
        return 0.0
    if x > (a + 1.0) / (a + b + 2.0):
        return 1.0 - _beta_fraction(1.0 - x, b, a)
    return _beta_fraction(x, a, b)


def _beta_fraction(x: float, a: float, b: float) -> float:
    """I(x; a, b) for x < (a + 1) / (a + b + 2), by Lentz's method."""
    ends = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(ends + a * math.log(x) + b * math.log1p(-x)) / a
    tiny = 1e-300
    c, d = 1.0, 1.0 / max(1.0 - (a + b) * x / (a + 1.0), tiny)
    value = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d, c = 1.0 / ((1.0 + term * d) or tiny), (1.0 + term / c) or tiny
            value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return front * value


def chance_level(pairs: int, dim: float, probability: float = 0.05) -> float:
    """The |cos| that the largest of `pairs` random pairs exceeds with that probability."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        exceeds = corrected(chance(middle, dim), pairs) > probability
        low, high = (middle, high) if exceeds else (low, middle)
    return high
