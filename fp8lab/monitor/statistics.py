"""Transformer Engine's debug statistics, under TE's names, for any tensor on any device.

`LogTensorStats`, `LogFp8TensorStats` and `LogNvfp4TensorStats` of TE 2.20 need a GPU, the one that
has the format in hardware, and a TE module. Their names mean here what they mean there:

    min max mean std l1_norm l2_norm cur_amax dynamic_range
    max_blockwise_dynamic_range[_block_size_B_dims_D[_max_over_orientations]]
    [RECIPE_](underflows% | overflows% | scale_inv_min | scale_inv_max | mse)[_columnwise]

Without a RECIPE the last row is of the cast in force, with one it says what that recipe would have
done: fp8_delayed_scaling (in force or not at all, for it needs a history), fp8_current_scaling,
mxfp8, fp8_block_scaling (TE's what-if: 128 × 128 for every operand), nvfp4. Ours are two recipes,
fp8_block_scaling_1d (1 × 128) and rowwise (torchao's), and the last rows of CAST; also, every
statistic for every recipe.

A tensor is reduced on its device to a float64 vector of partial results, its lanes, each a sum, a
maximum or a minimum: vectors of micro-batches and ranks merge lane by lane, and ratios are taken
once, of the merged. Where TE's number would be NaN or infinite there is none here, but what a few
NaN or infinities would spoil (the first eight) is of the finite elements, as in a sketch.

What differs from TE, on purpose. TE logs MXFP8's scale_inv as its E8M0 code; here it is the factor,
2^(code - 127). TE merges standard deviations with the wrong sign; here they are those of all
elements. TE's mse_columnwise is of the rowwise codes while it has them; here of the columnwise. TE
rounds sums to the tensor's dtype; here they are float64. Blocks may be cut off at the tensor's end.

Cost: one pass for the plain ones, in pieces that stay in cache; one cast and one pass for each
recipe asked for, however many its statistics. Rejected: asking a sketch. Its exponent histogram
knows nothing of blocks, and to an arbitrary scale it can only give bounds.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fp8lab import formats
from fp8lab import recipe as recipes
from fp8lab.casting import Cast, cast_for
from fp8lab.recipe import Direction, Format, Operand, Recipe
from fp8lab.rounding import round_float32
from fp8lab.scaling import Tile, matrix_shape, spread, tile_of

Operation = Literal["sum", "max", "min"]
_NEUTRAL: dict[Operation, float] = {"sum": 0.0, "max": -math.inf, "min": math.inf}
_MERGE = {"sum": np.add, "max": np.maximum, "min": np.minimum}
_TOGETHER: dict[Operation, Any] = {"sum": torch.sum, "max": torch.amax, "min": torch.amin}

# Elements that a CPU reduces at a time: as float64, a quarter of a megabyte.
_PIECE = 1 << 15

# Every lane that a statistic may need, by how two of it merge: of the tensor's finite elements, of
# its blocks, of a cast's elements, scales (padding left out) and tiles.
_LANES: dict[Operation, str] = {
    "sum": "finite total total_abs total_squares numel underflows overflows error power dot "
    "rounded_power scales scale_inv_total scale_inv_squares tiles underflowing_tiles",
    "max": "largest block_range scale_inv_max worst_tile",
    "min": "smallest amin scale_inv_min",
}
LANES = {lane: operation for operation, lanes in _LANES.items() for lane in lanes.split()}


class Statistic(NamedTuple):
    """What it is computed from, and how; undefined where that fails or is not finite."""

    lanes: tuple[str, ...]
    value: Callable[..., float]


class Source(NamedTuple):
    """What lanes are of: the tensor, a cast of it, or its blocks.

    `recipe` "" is the cast in force. `orientations` None: both, for inputs and weights.
    """

    kind: Literal["plain", "cast", "blocks"]
    recipe: str = ""
    direction: Direction = "rowwise"
    block_size: int = 32
    dims: int = 1
    orientations: bool | None = None


def _deviation(count: float, total: float, squares: float) -> float:
    """With the divisor n - 1, as torch.std and so TE; rounding may cost mean² / variance ulp."""
    return math.sqrt(max(squares - total * total / count, 0.0) / (count - 1))


def _range(smallest: float, largest: float, amin: float) -> float:
    return math.log2(max(-smallest, largest)) - math.log2(amin)


PLAIN: dict[str, Statistic] = {
    "min": Statistic(("smallest",), lambda smallest: smallest),
    "max": Statistic(("largest",), lambda largest: largest),
    "mean": Statistic(("total", "finite"), lambda total, n: total / n),
    "std": Statistic(("finite", "total", "total_squares"), _deviation),
    "l1_norm": Statistic(("total_abs", "finite"), lambda total, n: total if n else math.nan),
    "l2_norm": Statistic(("total_squares", "finite"), lambda a, n: math.sqrt(a) if n else math.nan),
    "cur_amax": Statistic(("smallest", "largest"), lambda low, high: max(-low, high)),
    "dynamic_range": Statistic(("smallest", "largest", "amin"), _range),
}
# The last three need blocks: a recipe with one scale for the tensor does not have them.
OF_BLOCKS = ("scale_inv_std", "underflowing_blocks%", "underflows%_worst_block")
CAST: dict[str, Statistic] = {
    "underflows%": Statistic(("underflows", "numel"), lambda some, n: 100 * some / n),
    "overflows%": Statistic(("overflows", "numel"), lambda some, n: 100 * some / n),
    # The second lane speaks where all scales are what TE takes for padding.
    "scale_inv_min": Statistic(("scale_inv_min", "scale_inv_max"), min),
    "scale_inv_max": Statistic(("scale_inv_max",), lambda largest: largest),
    "mse": Statistic(("error", "numel"), lambda error, n: error / n),
    "cosine": Statistic(
        ("dot", "power", "rounded_power"), lambda dot, x, y: dot / (math.sqrt(x) * math.sqrt(y))
    ),
    "sqnr_db": Statistic(("power", "error"), lambda x, error: 10 * math.log10(x / error)),
    "scale_inv_std": Statistic(("scales", "scale_inv_total", "scale_inv_squares"), _deviation),
    "underflowing_blocks%": Statistic(
        ("underflowing_tiles", "tiles"), lambda some, n: 100 * some / n
    ),
    "underflows%_worst_block": Statistic(("worst_tile",), lambda share: 100 * share),
}
_BLOCK_RANGE = Statistic(("block_range",), math.log2)
_BLOCKS = re.compile(
    r"max_blockwise_dynamic_range"
    r"(?:_block_size_([1-9][0-9]*)_dims_([12])(_max_over_orientations)?)?"
)

# What a prefix means where that recipe is not in force; the first cannot be made up.
_RECIPES: dict[str, type[Recipe]] = {
    "fp8_delayed_scaling": recipes.DelayedScaling,
    "fp8_current_scaling": recipes.Float8CurrentScaling,
    "mxfp8": recipes.MXFP8BlockScaling,
    "fp8_block_scaling": recipes.Float8BlockScaling,
    "fp8_block_scaling_1d": recipes.Float8BlockScaling,
    "nvfp4": recipes.NVFP4BlockScaling,
    "rowwise": recipes.RowwiseScaling,
}
# fp8_block_scaling_1d is a what-if whatever is in force.
_IN_FORCE = {recipe: name for name, recipe in _RECIPES.items() if name != "fp8_block_scaling_1d"}
_OF_THE_TENSOR = ("fp8_delayed_scaling", "fp8_current_scaling")


# --- names ---------------------------------------------------------------------------------------


def _every_name() -> dict[str, tuple[Statistic, Source]]:
    known = {name: (statistic, Source("plain")) for name, statistic in PLAIN.items()}
    known["max_blockwise_dynamic_range"] = _BLOCK_RANGE, Source("blocks")
    for recipe in ("", *_RECIPES):
        for name, statistic in CAST.items():
            full = f"{recipe}_{name}" if recipe else name
            if recipe in _OF_THE_TENSOR and name in OF_BLOCKS:
                continue
            known[full] = statistic, Source("cast", recipe)
            if recipe not in _OF_THE_TENSOR:
                known[f"{full}_columnwise"] = statistic, Source("cast", recipe, "columnwise")
    return known


# All but those with a block size in them.
NAMES = _every_name()


@cache
def _meaning(name: str) -> tuple[Statistic, Source]:
    if found := NAMES.get(name):
        return found
    if match := _BLOCKS.fullmatch(name):
        size, dims, both = match.groups()
        blocks = Source("blocks", "", "rowwise", int(size), int(dims), both is not None)
        return _BLOCK_RANGE, blocks
    near = difflib.get_close_matches(name, NAMES, n=4, cutoff=0.5) or [*PLAIN, *CAST]
    raise ValueError(f"statistics: {name!r} is not one, expected for example {', '.join(near)}")


def check(names: Sequence[str]) -> None:
    """Raises ValueError, in one line that lists near names, for a name that is no statistic."""
    for name in names:
        _meaning(name)


def name_of(statistic: str | Mapping[str, Mapping[str, int]], tensor_name: str) -> str:
    """The name of an entry of `stats:` in TE's configuration, as TE's logs spell it.

    It may be {max_blockwise_dynamic_range: {block_size: 32, dims: 1}}; of those that TE calls
    `activation` and `weight` that is the maximum over both orientations. Raises ValueError for
    what `check` does not know and for other options.
    """
    if isinstance(statistic, str):
        check([statistic])
        return statistic
    options = dict(statistic.get("max_blockwise_dynamic_range", {"": 0}))
    size, dims = options.pop("block_size", 32), options.pop("dims", 1)
    if len(statistic) != 1 or options or type(size) is not int or size < 1 or dims not in (1, 2):
        expected = "{'max_blockwise_dynamic_range': {'block_size': from 1, 'dims': 1 or 2}}"
        raise ValueError(f"statistics: {statistic!r}, expected a name or {expected}")
    both = "_max_over_orientations" if tensor_name in ("activation", "weight") else ""
    return f"max_blockwise_dynamic_range_block_size_{size}_dims_{dims}{both}"


@cache
def _layout(names: tuple[str, ...]) -> dict[tuple[Source, str], int]:
    """Where each lane stands in the vector of these names."""
    places: dict[tuple[Source, str], int] = {}
    for statistic, source in map(_meaning, names):
        for lane in statistic.lanes:
            places.setdefault((source, lane), len(places))
    return places


def operations(names: Sequence[str]) -> tuple[Operation, ...]:
    """How each lane of the vector of these names merges."""
    return tuple(LANES[lane] for _, lane in _layout(tuple(names)))


# --- a tensor to its lanes -----------------------------------------------------------------------


@torch.no_grad()
def measure(
    names: Sequence[str], tensor: Tensor, how: Cast | None = None, role: Operand = "input"
) -> Tensor:
    """float64 [lanes] on the tensor's device: partial results of these statistics; nothing waits.

    Any floating dtype and any shape, seen as [tokens, last axis]. `how` is the rowwise cast in
    force, of which statistics without a recipe are, and those whose recipe it has; `role` is the
    operand that the tensor is or would be. Other recipes cast the tensor as their defaults say,
    rounding to nearest, and as TE does a gradient to E5M2 if the cast in force has it, else to
    E4M3; in high precision to what the recipe itself has (E5M2 under current scaling).
    A vector of an empty tensor is neutral in merges. Raises ValueError for an unknown name and for
    a tensor of integers.
    """
    if not tensor.is_floating_point():
        raise ValueError(f"statistics: {tensor.dtype}, expected a floating-point tensor")
    tensor = tensor.detach()
    places = _layout(tuple(names))
    wanted: dict[Source, list[str]] = {}
    for source, lane in places:
        wanted.setdefault(source, []).append(lane)
    neutral = [_NEUTRAL[LANES[lane]] for _, lane in places]
    vector = [torch.full((), n, dtype=torch.float64, device=tensor.device) for n in neutral]
    for source, lanes in wanted.items() if tensor.numel() else ():
        for lane, value in _lanes_of(source, lanes, tensor, how, role).items():
            vector[places[source, lane]] = value.double()
    return torch.stack(vector) if vector else tensor.new_empty(0, dtype=torch.float64)


def _lanes_of(
    source: Source, wanted: list[str], tensor: Tensor, how: Cast | None, role: Operand
) -> dict[str, Tensor]:
    """Those of the lanes that are wanted and can be had, each []."""
    if source.kind == "plain":
        return _by_pieces(_of_values, wanted, tensor)
    if source.kind == "blocks":
        return {"block_range": _block_range(source, tensor, role)}
    in_question = _cast_of(source, tensor, how, role)
    return {} if in_question is None else _of_cast(in_question, wanted)


def _by_pieces(
    reduce: Callable[..., dict[str, Callable[[], Tensor]]], wanted: Sequence[str], *tensors: Tensor
) -> dict[str, Tensor]:
    """Lanes of tensors of one size, reduced as [n] each, a piece at a time on a CPU."""
    size = _PIECE if tensors[0].device.type == "cpu" else tensors[0].numel()
    found: dict[str, list[Tensor]] = {lane: [] for lane in wanted}
    for piece in zip(*(torch.split(t.reshape(-1), size) for t in tensors), strict=True):
        lanes = reduce(*piece)
        for lane in wanted:
            found[lane].append(lanes[lane]())
    return {lane: _TOGETHER[LANES[lane]](torch.stack(of)) for lane, of in found.items()}


def _of_values(piece: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Lanes of the finite ones among [n]."""
    values, low = piece.double(), _single_or_double(piece)
    total, finite, high = values.sum(), values.new_full((), len(values)), low
    if values.device.type != "cpu" or not total.isfinite():
        is_finite = low.isfinite()
        low, high = (torch.where(is_finite, low, beyond) for beyond in (torch.inf, -torch.inf))
        values = torch.where(is_finite, values, 0.0)
        total, finite = values.sum(), is_finite.sum()
    return {
        "finite": lambda: finite,
        "total": lambda: total,
        "total_abs": lambda: values.abs().sum(),
        "total_squares": lambda: torch.dot(values, values),
        "smallest": low.amin,
        "largest": high.amax,
        "amin": lambda: _smallest(low.abs(), (0,)),
    }


def _single_or_double(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def _smallest(magnitude: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The smallest that is not 0, infinity if there is none; by its bits, for which 0 is last."""
    whole = torch.int64 if magnitude.dtype is torch.float64 else torch.int32
    last = torch.iinfo(whole).max
    below = (magnitude.view(whole) - 1).bitwise_and_(last).amin(dims)
    return torch.where(below == last, torch.inf, (below + 1).view(magnitude.dtype))


def _tiles(matrix: Tensor, tile: Tile) -> Tensor:
    """[tile rows, rows of a tile, tile columns, columns of a tile], zeros beyond the edges."""
    tile = min(tile[0], len(matrix)), min(tile[1], matrix.shape[1])  # the rest would be zeros
    missing = -matrix.shape[0] % tile[0], -matrix.shape[1] % tile[1]
    if any(missing):
        matrix = F.pad(matrix, (0, missing[1], 0, missing[0]))
    return matrix.reshape(len(matrix) // tile[0], tile[0], -1, tile[1])


def _block_range(source: Source, tensor: Tensor, role: Operand) -> Tensor:
    """[]: over all blocks the largest max / min of the magnitudes that are not 0, or 1."""
    magnitude = torch.nan_to_num(_single_or_double(tensor).abs(), nan=0.0, posinf=0.0)
    matrix = magnitude.reshape(matrix_shape(tensor.shape))
    if source.dims == 2:
        views = [_tiles(matrix, (source.block_size, source.block_size))]
    else:  # consecutive elements, across the ends of rows too
        both = role != "grad_output" if source.orientations is None else source.orientations
        flat = [matrix.reshape(1, -1), matrix.t().reshape(1, -1)][: 1 + both]
        views = [_tiles(one, (1, source.block_size)) for one in flat]
    each = [view.amax((1, 3)).double() / _smallest(view, (1, 3)).double() for view in views]
    return torch.cat([ranges.flatten() for ranges in each]).amax().clamp(min=1.0)


# --- a cast to its lanes -------------------------------------------------------------------------


def _cast_of(source: Source, tensor: Tensor, how: Cast | None, role: Operand) -> Cast | None:
    """The cast that a source names, of this tensor or the one in force; None: there is none."""
    if how is not None and source.recipe in ("", _IN_FORCE.get(type(how.recipe))):
        if source.direction == "rowwise":
            return how
        if tile_of(how.recipe, role, "columnwise", how.tensor.shape) is None:
            return None
        columnwise = cast_for(how.tensor, how.recipe, role, direction="columnwise")
        return columnwise._replace(channel_scale=how.channel_scale)
    if source.recipe in ("", "fp8_delayed_scaling"):
        return None
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        tensor = tensor.float()
    recipe = _what_if(source.recipe, role, _gradients_in_e5m2(source.recipe, how))
    return cast_for(tensor, recipe, role, direction=source.direction)


def _gradients_in_e5m2(recipe: str, how: Cast | None) -> bool:
    """Source: TE `LogFp8TensorStats.update_aux_dict`."""
    if how is None or how.scale is None or isinstance(how.recipe, recipes.BitNetScaling):
        return recipe == "fp8_current_scaling"
    if isinstance(how.recipe, recipes.MXFP8BlockScaling | recipes.NVFP4BlockScaling):
        return False
    return how.format is formats.E5M2


@cache
def _what_if(recipe: str, role: Operand, gradients_in_e5m2: bool) -> Recipe:
    """Source: TE `_get_new_quantizer`, whose block scaling has 128 × 128 for every operand."""
    if recipe == "nvfp4":  # training must not notice: nothing is drawn
        return recipes.NVFP4BlockScaling(disable_stochastic_rounding=True)
    settings: dict[str, Any] = {"fp8_format": Format.HYBRID if gradients_in_e5m2 else Format.E4M3}
    if recipe.startswith("fp8_block_scaling"):
        for operand, field in {"input": "x", "weight": "w", "grad_output": "grad"}.items():
            square = recipe == "fp8_block_scaling" and operand == role
            settings[f"{field}_block_scaling_dim"] = 1 + square
    return _RECIPES[recipe](**settings)


def _of_cast(how: Cast, wanted: Sequence[str]) -> dict[str, Tensor]:
    """Lanes of a cast; of the elements that are cast, which a Hadamard transform may have mixed."""
    tensor = how.tensor.detach()
    lanes = {"numel": torch.full((), tensor.numel(), device=tensor.device)}
    if "overflows" in wanted and how.tile is None:
        lanes |= _by_pieces(lambda piece: _of_clipped(how, piece), ["overflows"], tensor)
    elif "overflows" in wanted:
        lanes["overflows"] = how.saturated().sum()
    if how.scale_inv is not None:
        lanes |= _of_scales(how, how.scale_inv.double().flatten())
    by_elements = [lane for lane in wanted if lane in _OF_PAIRS]
    tile = None if {"tiles", "worst_tile"}.isdisjoint(wanted) else how.tile
    if by_elements or tile is not None:
        codes, values = _rounded(how, tensor)
        if tile is not None:
            lanes |= _of_tiles(tile, _nonzero(tensor) - _nonzero(codes))
        triple = [tensor, values, codes]
        if how.channel_scale is not None:  # errors are those of the tensor before it
            triple[:2] = [tensor / how.channel_scale.double(), values / how.channel_scale.double()]
        lanes |= _by_pieces(_of_pairs, by_elements, *triple)
    return {lane: value for lane, value in lanes.items() if lane in wanted}


_OF_PAIRS = ("underflows", "error", "power", "rounded_power", "dot")


def _of_pairs(original: Tensor, values: Tensor, codes: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Lanes of [n] each: what was cast, what became of it, and its codes."""
    before, after = original.double(), values.double()
    return {
        # Only a format without zero, that of BitNet's weights, makes more of them.
        "underflows": lambda: (original.count_nonzero() - codes.count_nonzero()).clamp_(min=0),
        "error": lambda: (after - before).square_().sum(),
        "power": lambda: torch.dot(before, before),
        "rounded_power": lambda: torch.dot(after, after),
        "dot": lambda: torch.dot(before, after),
    }


def _rounded(how: Cast, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """float32: the values on the format's grid, or others that are 0 where they are; dequantised.

    No scale_inv makes 0 of a code, but for that of NVFP4, which may be 0.
    """
    may_be_zero = how.scale_inv if how.format is formats.E2M1 else None
    is_not = may_be_zero is None or (may_be_zero.device.type == "cpu" and may_be_zero.all())
    if how.rounding == "nearest" and is_not:
        values = how.fake_quantized()
        return values, values
    # Drawn apart, so that training does not notice; as likely as the draw that was used.
    drawn = torch.Generator(tensor.device).manual_seed(0) if how.rounding == "stochastic" else None
    codes = round_float32(how.scaled(), how.format, how.rounding, drawn)
    assert how.scale_inv is not None
    return codes, codes * spread(how.scale_inv, how.tile, codes.shape)


def _of_clipped(how: Cast, piece: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The lane of what one scale puts beyond ±max, of [n]; a hair is nothing if the scale was made
    just in time. Source: TE `compute_fp8_delayed_scaling_overflows_num`."""
    if isinstance(how.recipe, recipes.DelayedScaling) and how.scale_inv is not None:
        clipped = piece.float().abs() > how.format.max * how.scale_inv
    else:
        clipped = how._replace(tensor=piece).saturated()
    return {"overflows": clipped.count_nonzero}


def _of_scales(how: Cast, scale_inv: Tensor) -> dict[str, Tensor]:
    """Lanes of float64 [scales]. NaN, which only torchao's rows have, is no scale; nor, as in TE,
    are 0 and MXFP8's code 0, with which TE pads."""
    is_scale = scale_inv > (2.0**-127 if isinstance(how.recipe, recipes.MXFP8BlockScaling) else 0)
    lanes = {
        "scale_inv_min": torch.where(is_scale, scale_inv, torch.inf).amin(),
        "scale_inv_max": torch.where(scale_inv.isnan(), -torch.inf, scale_inv).amax(),
    }
    if how.tile is not None:
        scales = torch.where(is_scale, scale_inv, 0.0)
        lanes |= {"scales": is_scale.sum(), "scale_inv_total": scales.sum()}
        lanes["scale_inv_squares"] = torch.dot(scales, scales)
    return lanes


def _nonzero(tensor: Tensor) -> Tensor:
    """float32 [tokens, last axis]: 1 or 0. (A mask of bools takes ten times as long.)"""
    out = torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device)
    return torch.ne(tensor, 0, out=out).reshape(matrix_shape(tensor.shape))


def _of_tiles(tile: Tile, underflowed: Tensor) -> dict[str, Tensor]:
    """Lanes of a matrix that is 1 where an element became 0, and else 0."""
    in_tile, ones = _tiles(underflowed, tile).sum((1, 3)), torch.ones_like(underflowed)
    worst = (in_tile.double() / _tiles(ones, tile).sum((1, 3))).amax()
    tiles = torch.full((), in_tile.numel(), device=in_tile.device)
    return {"tiles": tiles, "underflowing_tiles": in_tile.count_nonzero(), "worst_tile": worst}


# --- lanes to numbers ----------------------------------------------------------------------------


def merge(
    names: Sequence[str], left: NDArray[np.float64], right: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The lanes of both tensors together, float64 [lanes].

    Counts, maxima and minima are exact, whatever the order; sums of values to float64 rounding.
    """
    pairs = zip(operations(names), left, right, strict=True)
    return np.array([_MERGE[operation](a, b) for operation, a, b in pairs], dtype=np.float64)


def finish(names: Sequence[str], vector: NDArray[np.float64]) -> dict[str, float]:
    """The statistics of merged lanes, by name; those that are undefined are left out."""
    places, numbers = _layout(tuple(names)), vector.tolist()
    statistics: dict[str, float] = {}
    for name in names:
        statistic, source = _meaning(name)
        try:
            value = statistic.value(*(numbers[places[source, lane]] for lane in statistic.lanes))
        except (ArithmeticError, ValueError):  # divided by 0, the logarithm of 0
            continue
        if math.isfinite(value):
            statistics[name] = value
    return statistics
