"""A recorded run × a plan → numbers: what each cast would have done to the tensors as recorded.

Whoever casts a tensor with one scale asks two things of it: the amaxes that make the scale, and how
many elements have which magnitude. A gate product's amax is in the rows of every step, so its
delayed history is replayed step by step, by Transformer Engine's update: the first step is cast
with scale 1, an amax of 0 moves nothing, one of infinity keeps the scale as long as it is in the
history. Other tensors have an amax where they were recorded, and a delayed scale if that was at
every step. The magnitudes are in the rows that were recorded in full (`magnitudes`).

Scales of blocks, rows and columns cannot be made from such rows. What a run recorded of them as
what-if statistics (`mxfp8_underflows%`) is taken over; else the answer is "unknown", and says what
to record. Nothing is guessed: a number is exact, or lies between two, or is missing (NaN) and
`reason` says why.

Of several processes the one with the largest amax is reported; where they share their history
(`reduce_amax`), with the counts of all of them if these were recorded together (rank -1).

Cost: the columns that are asked for, the packed bins of some ten thousand rows at a time, and a
tenth of a millisecond for each row that was recorded in full.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fp8lab.forecast.histories import current_scales, delayed_scales, foreign_function
from fp8lab.forecast.magnitudes import Magnitudes, thresholds
from fp8lab.forecast.recorded import (
    KEYS,
    PATTERNS,
    joined,
    layers_of,
    layers_of_feed_forwards,
    one_each,
)
from fp8lab.formats import E5M2, FloatFormat
from fp8lab.plan import Plan
from fp8lab.recipe import (
    GEMMS,
    BitNetScaling,
    DelayedScaling,
    Direction,
    Float8BlockScaling,
    Float8CurrentScaling,
    Format,
    HighPrecision,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    Operand,
    Recipe,
    RowwiseScaling,
    direction_of,
    operand_format,
)
from fp8lab.runs import Run
from fp8lab.segments import RunError

ROWS_AT_ONCE, UNPACKED_AT_ONCE = 1 << 15, 1 << 10
# Channels whose amax is beyond this multiple of the median channel's are outliers, see `measure`.
OUTLIER_CHANNEL = 16.0

# What is cast of a feed-forward: its tensors' roles, as operands of which of its layers.
_OF_FEED_FORWARD: dict[str, tuple[str, Operand]] = {
    "product": ("down", "input"),
    "grad_gate": ("gate", "grad_output"),
    "grad_up": ("up", "grad_output"),
    "grad_output": ("down", "grad_output"),
}
_OPERANDS = ("input", "weight", "grad_output")

# Why something is unknown that a run can record.
EVERY_STEP = "a delayed scale needs the amax of every step"
AMAX_ALONE, NO_BINS = "recorded with its amax alone", "no histogram"

_COUNTS = ("saturated", "flushed", "subnormal")
_BINS = ("bins", "histogram_start", "histogram")
_RECORDED: tuple[str, ...] = (
    "count",
    "zeros",
    "infs",
    "cur_amax",
    "l2_norm",
    "channel_ratio",
    "recipe",
    "format",
)
_RECORDED += ("statistics",)
COLUMNS: tuple[str, ...] = (
    "step",
    "site",
    "layer",
    "operand",
    "gemms",
    "recipe",
    "format",
    "rank",
    "cur_amax",
)
COLUMNS += ("scale", "staleness", "clipped")
_NUMBERS: tuple[str, ...] = tuple(
    f"{name}_{end}" for name in (*_COUNTS, "error") for end in ("low", "high")
)
_NUMBERS += ("error", "bulk_error")
COLUMNS += (*_NUMBERS, "reason")


@dataclass(frozen=True, kw_only=True)
class Use:
    """A recorded tensor as what it is cast to under a plan: for some GEMMs of a layer."""

    site: str
    layer: str
    operand: Operand
    gemms: tuple[str, ...]
    recipe: Recipe
    format: FloatFormat
    direction: Direction

    @property
    def name(self) -> str:
        """The site; with the GEMM of columns that are cast apart from its rows."""
        alike = len(self.gemms) > 1 or self.direction == "rowwise"
        return self.site if alike else f"{self.site}@{self.gemms[0]}"

    @property
    def is_scaled_whole(self) -> bool:
        """Whether one scale, or none, is for the whole tensor."""
        return isinstance(self.recipe, DelayedScaling | Float8CurrentScaling | HighPrecision)


class Uses(NamedTuple):
    """What of a run's tensors is cast under a plan, what the plan leaves out, and what cannot be
    told, with the reason."""

    cast: list[Use]
    left_out: list[str]
    unknown: dict[str, str]


def uses_of(run: Run, sites: list[str], plan: Plan) -> Uses:
    """Which of these sites' tensors are operands, and how `plan` casts them."""
    found = Uses([], [], {})
    layers, known = layers_of_feed_forwards(run), layers_of(run)
    for site in sites:
        module, _, role = site.rpartition(":")
        names = layers.get(module)
        if role in _OF_FEED_FORWARD and (names is not None or role not in _OPERANDS):
            part, operand = _OF_FEED_FORWARD[role]
            layer = joined(module, part) if names is None else names[part]
            if part != "down" and names is not None and names["gate"] == names["up"]:
                found.unknown[site] = f"a part of what {layer} casts: record {layer}:grad_output"
                continue
        elif role in _OPERANDS and (not known or module in known):  # else of an embedding, a norm
            layer, operand = module, cast(Operand, role)
        else:
            continue
        if plan.covers(layer):
            found.cast.extend(uses_in(site, layer, operand, plan))
        else:
            found.left_out.append(site)
    return found


def uses_in(site: str, layer: str, operand: Operand, plan: Plan) -> Iterator[Use]:
    """What a plan casts an operand of a layer to: one for all GEMMs that take the same codes."""
    alike: dict[Any, list[str]] = {}
    for gemm, operands in GEMMS.items():
        if operand in operands:
            recipe, direction = plan.recipe_for(layer, operand, gemm), direction_of(operand, gemm)
            fmt = operand_format(recipe, operand, direction)
            whole = isinstance(recipe, DelayedScaling | Float8CurrentScaling | HighPrecision)
            has_copies = whole and fmt is not operand_format(recipe, operand)
            shown = "columnwise" if has_copies or (not whole and direction != "rowwise") else ""
            key = recipe, fmt, shown or "rowwise"
            alike.setdefault(key, []).append(gemm)
    for (recipe, fmt, direction), gemms in alike.items():
        yield Use(
            site=site,
            layer=layer,
            operand=operand,
            gemms=tuple(gemms),
            recipe=recipe,
            format=fmt,
            direction=direction,
        )


# --- rows ---------------------------------------------------------------------------------------


def replayed(run: Run, uses: list[Use], same: Mapping[str, str]) -> pd.DataFrame:
    """A row per use and step with `COLUMNS`, sorted by site, GEMM and step; `same` as `same_as`.

    Shares are those of `record`: saturated and subnormal of all elements, flushed of those that are
    not zero. `error` is the relative l2 error of the cast, `bulk_error` that of the elements up to
    16 times the median channel's amax, both as if the elements of a bin were evenly spread.
    """
    rows = one_each(run.tensors(_RECORDED, sites=PATTERNS), same)
    every_step = np.unique(run.steps("step")["step"].to_numpy())
    by_site = dict(tuple(rows.groupby("site", sort=False)))
    frames = [_with_scales(by_site[use.site], use, every_step) for use in uses]
    counted = [(frame, use) for frame, use in zip(frames, uses, strict=True) if use.is_scaled_whole]
    for steps in _pieces(rows) if counted else ():
        bins = one_each(run.tensors(_BINS, sites=PATTERNS, steps=steps), same)
        for frame, use in counted:
            try:
                _count(frame, use, bins, steps)
            except ValueError as error:
                raise RunError(f"{run.path}: damaged: {use.site}: {error}") from None
    whole = _together(frames, uses)
    ordered: pd.DataFrame = whole.sort_values(
        ["site", "gemms", "step"], kind="stable", ignore_index=True
    )
    return ordered


def _together(frames: list[pd.DataFrame], uses: list[Use]) -> pd.DataFrame:
    """The frames of all uses one behind the other, with what is the same in all rows of a use."""
    reasons = []
    for frame, use in zip(frames, uses, strict=True):
        _take_what_ifs(frame, use)
        reasons.append(_reasons(frame, use))
    of_a_use: dict[str, list[str]] = {
        "layer": [use.layer for use in uses],
        "operand": [use.operand for use in uses],
        "gemms": [", ".join(use.gemms) for use in uses],
        "recipe": [type(use.recipe).__name__ for use in uses],
        "format": [use.format.name for use in uses],
    }
    lengths = [len(frame) for frame in frames]
    added = {name: np.repeat(values, lengths) for name, values in of_a_use.items()}
    if not frames:
        return pd.DataFrame({name: [] for name in COLUMNS})
    others = [name for name in COLUMNS if name not in (*added, "reason")]
    whole = pd.concat([frame[others] for frame in frames], ignore_index=True)
    return whole.assign(**added, reason=np.concatenate(reasons))[[*COLUMNS]]


def _with_scales(rows: pd.DataFrame, use: Use, every_step: NDArray[Any]) -> pd.DataFrame:
    """One row a step, that of the hottest process, with the scale of its cast, whether it clips,
    and empty numbers.

    `seen` is the amax as TE has it: infinite where an element is.
    """
    is_product, recipe = use.site.endswith(":product"), use.recipe
    own = rows[rows["rank"] >= 0]
    own = (rows if own.empty else own).sort_values("step", kind="stable", ignore_index=True)
    steps, step = np.unique(own["step"].to_numpy(), return_inverse=True)
    ranks, rank = np.unique(own["rank"].to_numpy(), return_inverse=True)
    # A process without a row of a product had no token for it.
    amaxes = np.full((len(steps), len(ranks)), 0.0 if is_product else np.nan)
    amaxes[step, rank] = np.where(own["infs"] > 0, np.inf, own["cur_amax"])
    place = np.full(amaxes.shape, -1)
    place[step, rank] = np.arange(len(own))
    heat = np.where(place < 0, -1.0, np.where(np.isnan(amaxes), np.inf, amaxes))
    line, hottest = np.arange(len(steps)), heat.argmax(axis=1)
    frame: pd.DataFrame = own.iloc[place[line, hottest]].reset_index(drop=True)
    frame["seen"] = amaxes[line, hottest]
    scales = np.full(len(steps), np.nan)
    if isinstance(recipe, HighPrecision):
        scales[:] = 1.0
    elif isinstance(recipe, Float8CurrentScaling):
        amax = frame["seen"].to_numpy()
        scales = current_scales(amax, use.format, recipe.use_power_2_scales)
    elif isinstance(recipe, DelayedScaling) and not foreign_function(recipe):
        # A product has rows of all the steps in which it ran.
        if is_product or np.array_equal(steps, every_step):
            if recipe.reduce_amax:
                frame = _all_together(rows, frame)
                amaxes = np.repeat(amaxes.max(axis=1, keepdims=True), len(ranks), axis=1)
            each = [delayed_scales(column, recipe, use.format) for column in amaxes.T]
            scales = np.stack(each)[hottest, line]
    margin = recipe.margin if isinstance(recipe, DelayedScaling) else 0
    seen = frame["seen"].to_numpy(float)
    told = {"scale": scales, "staleness": seen * scales / (use.format.max * 2.0**-margin)}
    told |= _clipping(seen, scales, use)
    # At once: one column after another costs more than all that is in them.
    return pd.concat([frame, pd.DataFrame(told, index=frame.index)], axis=1)


def _all_together(rows: pd.DataFrame, hottest: pd.DataFrame) -> pd.DataFrame:
    """The same steps, of all processes together where that was recorded."""
    merged = rows[(rows["rank"] == -1) & rows["step"].isin(hottest["step"])]
    if merged.empty:
        return hottest
    merged = merged.assign(seen=np.where(merged["infs"] > 0, np.inf, merged["cur_amax"]))
    both = pd.concat([hottest[~hottest["step"].isin(merged["step"])], merged])
    together: pd.DataFrame = both.sort_values("step", ignore_index=True)
    return together


# --- counts -------------------------------------------------------------------------------------


def _clipping(seen: NDArray[np.float64], scales: NDArray[np.float64], use: Use) -> dict[str, Any]:
    """Whether any element saturates, which the amax tells in every step; all else is open."""
    known = ~np.isnan(scales) & ~np.isnan(seen)
    limits = thresholds(use.format, np.where(known, scales, 1.0))[0]
    with np.errstate(over="ignore"):
        codes = np.where(known, seen, 0.0).astype(np.float32).view(np.uint32).astype(np.int64)
    numbers: dict[str, Any] = {name: np.full(len(seen), np.nan) for name in _NUMBERS}
    for name in ("saturated_low", "saturated_high"):
        numbers[name][known & (codes < limits)] = 0.0
    return numbers | {"clipped": pd.arrays.BooleanArray(codes >= limits, ~known)}


def _pieces(rows: pd.DataFrame) -> Iterator[range]:
    """Ranges of steps with some ten thousand rows each that were recorded in full."""
    counts = rows.loc[rows["count"].notna(), "step"].value_counts().sort_index()
    piece = counts.cumsum() // ROWS_AT_ONCE
    for _, part in counts.groupby(piece):
        yield range(int(part.index[0]), int(part.index[-1]) + 1)


def _count(frame: pd.DataFrame, use: Use, bins: pd.DataFrame, steps: range) -> None:
    """Fill in what follows from the magnitudes of these steps."""
    inside = frame["step"].between(steps[0], steps[-1])
    part = frame.loc[inside & frame["clipped"].notna() & frame["count"].notna()]
    cells = part[KEYS].merge(bins, on=KEYS, how="left")
    for first in range(0, len(part), UNPACKED_AT_ONCE):
        some = slice(first, first + UNPACKED_AT_ONCE)
        _unpack(frame, use, part[some], cells[some])


def _unpack(frame: pd.DataFrame, use: Use, part: pd.DataFrame, cells: pd.DataFrame) -> None:
    """The same for some rows and their bins, or what an older schema has of them."""
    fine = (cells["bins"].notna() | ~(part["cur_amax"].to_numpy() > 0)).to_numpy()
    coarse = cells["histogram"].notna().to_numpy() & ~fine
    infs = part["infs"].fillna(0).to_numpy(np.int64)
    if fine.any():
        packed = [cell if isinstance(cell, bytes) else b"" for cell in cells["bins"][fine]]
        _fill(frame, use, part[fine], Magnitudes.unpacked(packed, infs[fine]))
    if coarse.any():
        starts = cells["histogram_start"][coarse].astype(int).tolist()
        told = Magnitudes.coarse(starts, list(cells["histogram"][coarse]), infs[coarse])
        _fill(frame, use, part[coarse], told)


def _fill(frame: pd.DataFrame, use: Use, part: pd.DataFrame, told: Magnitudes) -> None:
    scales, count = part["scale"].to_numpy(), part["count"].to_numpy(float)
    amax = part["cur_amax"].fillna(0.0).to_numpy()
    saturated = told.saturated(use.format, scales)
    clipped = part["clipped"].to_numpy(bool)  # the amax knows better than its bin
    low, high = np.maximum(saturated.low, clipped), np.where(clipped, saturated.high, 0)
    limits = [(low, high), told.flushed(use.format, scales), told.subnormal(use.format, scales)]
    nonzero = count - part["zeros"].fillna(0).to_numpy(float)
    with np.errstate(all="ignore"):
        cut = np.nan_to_num(OUTLIER_CHANNEL * amax / part["channel_ratio"].to_numpy(float))
        errors = told.errors(use.format, scales, amax, cut)
        power = part["l2_norm"].to_numpy(float) ** 2
        for name, (low, high) in zip(_COUNTS, limits, strict=True):
            of = nonzero if name == "flushed" else count
            frame.loc[part.index, f"{name}_low"] = np.where(of > 0, low / of, 0.0)
            frame.loc[part.index, f"{name}_high"] = np.where(of > 0, high / of, 0.0)
        frame.loc[part.index, "error_low"] = np.sqrt(errors.low / power)
        frame.loc[part.index, "error_high"] = np.sqrt(errors.high / power)
        frame.loc[part.index, "error"] = np.sqrt(errors.likely / power)
        frame.loc[part.index, "bulk_error"] = np.sqrt(errors.bulk / errors.bulk_power)


# --- what-if statistics -------------------------------------------------------------------------

# A prefix of `statistics`, and the recipe that it means; formats apart.
_WHAT_IFS: dict[str, Recipe] = {
    "fp8_current_scaling": Float8CurrentScaling(),
    "mxfp8": MXFP8BlockScaling(),
    "nvfp4": NVFP4BlockScaling(),
    "rowwise": RowwiseScaling(),
}


_MEASURED = ("overflows%", "underflows%", "mse")


def statistics_of(use: Use) -> tuple[str, str]:
    """What a run must have recorded to tell of a cast: the name of its statistics with {} where
    `underflows%` and the like stand, empty if there are none, and then the reason."""
    recipe, prefix = use.recipe, ""
    if isinstance(recipe, Float8BlockScaling):
        dims = recipe.x_block_scaling_dim, recipe.w_block_scaling_dim, recipe.grad_block_scaling_dim
        square = dict(zip(("input", "weight", "grad_output"), dims, strict=True))[use.operand] == 2
        is_known = not recipe.use_f32_scales
        prefix = "fp8_block_scaling" if square else "fp8_block_scaling_1d"
    else:
        prefix = next((p for p, of in _WHAT_IFS.items() if type(of) is type(recipe)), "")
        is_known = bool(prefix) and _but_for_format(recipe) == _but_for_format(_WHAT_IFS[prefix])
    if isinstance(recipe, NVFP4BlockScaling) and use.operand == "grad_output":
        is_known = recipe.disable_stochastic_rounding
    if isinstance(recipe, BitNetScaling):
        return "", "no recording can tell what BitNetScaling does"
    if not is_known:
        return "", f"no what-if statistics say what {type(recipe).__name__} with its options does"
    return f"{prefix}_{{}}" + ("_columnwise" if use.direction == "columnwise" else ""), ""


def _but_for_format(recipe: Recipe) -> Recipe:
    if isinstance(recipe, NVFP4BlockScaling):
        return replace(recipe, disable_stochastic_rounding=True)
    if isinstance(recipe, Float8CurrentScaling | MXFP8BlockScaling | RowwiseScaling):
        return replace(recipe, fp8_format=Format.HYBRID)
    return recipe


def _take_what_ifs(frame: pd.DataFrame, use: Use) -> None:
    """Take over what was measured of the recipe, where these rows' statistics are about it."""
    name, _ = statistics_of(use)
    if not name or isinstance(use.recipe, DelayedScaling):
        return
    if not any(name.format(statistic) in frame for statistic in _MEASURED):
        return
    in_force = frame["recipe"].fillna("")
    about_it = in_force != type(use.recipe).__name__  # else it is of the options in force
    if use.operand == "grad_output":  # see `statistics.measure`
        unscaled = in_force.isin(["", "HighPrecision", "BitNetScaling"])
        in_blocks = in_force.isin(["MXFP8BlockScaling", "NVFP4BlockScaling"])
        in_e5m2 = (frame["format"] == "E5M2") & ~in_blocks & ~unscaled
        in_e5m2 |= unscaled & (name == "fp8_current_scaling_{}")
        about_it &= in_e5m2 == (use.format is E5M2)

    def measured(statistic: str) -> pd.Series:
        column = frame.get(name.format(statistic))
        return pd.Series(np.nan, frame.index) if column is None else column.where(about_it)

    count = frame["count"]
    of = {"saturated": ("overflows%", count), "flushed": ("underflows%", count - frame["zeros"])}
    for kind, (statistic, share_of) in of.items():
        share = measured(statistic) / 100 * count / share_of
        for end in ("low", "high"):
            frame[f"{kind}_{end}"] = share.where(share.notna(), frame[f"{kind}_{end}"])
    if not use.is_scaled_whole:
        overflows = measured("overflows%")
        frame["clipped"] = (overflows > 0).astype("boolean").mask(overflows.isna())
    error = np.sqrt(measured("mse") * count) / frame["l2_norm"]
    for column in ("error_low", "error_high", "error"):
        frame[column] = error.where(error.notna(), frame[column])


def _reasons(frame: pd.DataFrame, use: Use) -> Any:
    """Why a number is missing in a row; empty where none is but what has no definition."""
    name, why = statistics_of(use)
    full = frame["flushed_low"].notna() & frame["saturated_low"].notna()
    if not use.is_scaled_whole:
        names = f"{name.format('underflows%')}, {name.format('overflows%')}"
        return np.where(full, "", why or f"record {names}")
    if isinstance(use.recipe, DelayedScaling):
        why = foreign_function(use.recipe)
        if not why and frame["scale"].isna().all():
            why = EVERY_STEP
    no_scale = why if isinstance(use.recipe, DelayedScaling) and why else "an amax is not known"
    no_bins = np.where(frame["count"].isna(), AMAX_ALONE, NO_BINS)
    return np.where(frame["scale"].isna(), no_scale, np.where(full, "", no_bins))
