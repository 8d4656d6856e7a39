"""Scales from recorded amaxes: what a layer's history would have made of them, step by step.

The same formulas as in `scaling` and `Fp8Linear.move_scales`, Transformer Engine's, in numpy and
for a whole run at once, so that a forecast needs no torch; equal to them in every bit. An amax that
was not recorded is NaN, and so is every scale with it in its history.

Cost: a microsecond a step. The largest of the last n amaxes is the first of a falling queue, so a
history of 1024 costs what one of 4 does.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fp8lab.formats import FloatFormat
from fp8lab.recipe import DelayedScaling

Numbers = NDArray[np.float64]

FLOAT32_MAX = float(np.finfo(np.float32).max)


def delayed_scales(amaxes: Numbers, recipe: DelayedScaling, fmt: FloatFormat) -> Numbers:
    """The scale with which each step is cast, float64 [steps]; NaN where a history holds an amax
    that is not known (NaN).

    `amaxes` float64 [steps], infinite where an element is. Source: `Fp8Linear.move_scales`, that is
    TE `delayed_scaling.cu`; with `power_of_two_scale` TE's `_amax_and_scale_update`, which always
    rolls.
    """
    powers = recipe.scaling_factor_compute_algo is not None
    largest = np.float32(fmt.max * 2.0**-recipe.margin)
    length = 1 if recipe.amax_compute_algo == "most_recent" else recipe.amax_history_len
    scale, scales = 1.0, np.empty(len(amaxes))
    maxima: deque[tuple[int, float]] = deque()  # falling, of the last `length` that were pushed
    pushed, last_unknown = 0, -length
    for step, amax in enumerate(amaxes.tolist()):
        scales[step] = scale
        if amax == 0.0 and not powers:
            continue
        pushed += 1
        if math.isnan(amax):
            last_unknown = pushed
        while maxima and not maxima[-1][1] > amax:
            maxima.pop()
        maxima.append((pushed, amax))
        while maxima[0][0] <= pushed - length:
            maxima.popleft()
        known = pushed - last_unknown >= length
        scale = _moved(maxima[0][1], scale, largest, powers) if known else math.nan
    return scales


def _moved(amax: float, scale: float, largest: np.float32, powers: bool) -> float:
    if not 0.0 < amax < math.inf:
        return scale
    with np.errstate(over="ignore"):
        new = float(np.minimum(largest / np.float32(amax), np.float32(FLOAT32_MAX)))
    if powers:
        new = float(_floor_to_power_of_two(np.array([new]))[0])
    return new if new > 0 or not powers else scale


def current_scales(amaxes: Numbers, fmt: FloatFormat, power_of_two: bool) -> Numbers:
    """The just-in-time scale of each step, float64; NaN where the amax is. Source: TE
    `recipe_common.cuh`, as `scaling.scale_for`."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scale = np.float32(fmt.max) / amaxes.astype(np.float32)
    scale = np.where(np.isinf(scale), np.float32(FLOAT32_MAX), scale)
    if power_of_two:
        scale = _floor_to_power_of_two(scale)
    usable = np.isfinite(amaxes) & (amaxes > 0)
    return np.where(usable, scale, np.where(np.isnan(amaxes), np.nan, 1.0)).astype(np.float64)


def _floor_to_power_of_two(scales: NDArray[Any]) -> NDArray[np.float32]:
    bits = scales.astype(np.float32).view(np.uint32)
    return (bits & np.uint32(0xFF800000)).view(np.float32)


def foreign_function(recipe: DelayedScaling) -> str:
    """Which function of it cannot be replayed without torch; empty if there is none."""
    scaling = recipe.scaling_factor_compute_algo
    named = f"{getattr(scaling, '__module__', '')}.{getattr(scaling, '__name__', '')}"
    if callable(recipe.amax_compute_algo):
        return "amax_compute_algo is a function"
    if scaling is not None and named != "fp8lab.scaling.power_of_two_scale":
        return "scaling_factor_compute_algo is a function other than power_of_two_scale"
    return ""
