"""What a next run has to record, so that of it is known what is not known of this one.

A forecast says of each operand why something is unknown. Where a record could have told, this is
one argument of `watch` for all of it, as Python that can be pasted: layers that differ in numbers
alone are one pattern, tensors that need the same are one `Selection`. It may name a layer too many,
never one too few. Everything is asked for at every step, which is what it takes to know all; who
has less room gives a larger `freq`. Rejected: the `Selection` beside each reason. A model has
hundreds, and nobody puts them together by hand.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pandas as pd

from fp8lab.forecast.histories import foreign_function
from fp8lab.forecast.what_if import AMAX_ALONE, EVERY_STEP, NO_BINS, Use, statistics_of
from fp8lab.recipe import DelayedScaling


class Missing(NamedTuple):
    """A tensor of a layer, and the statistics that are needed of it beside its row."""

    layer: str
    tensor: str
    statistics: tuple[str, ...] = ()


def missing_of(use: Use, rows: pd.DataFrame | None) -> Iterator[Missing]:
    """What is missing for this use, of which there are such `rows`, None if nothing was recorded;
    nothing where no record could tell."""
    layer, _, tensor = use.site.rpartition(":")
    if isinstance(use.recipe, DelayedScaling) and foreign_function(use.recipe):
        return
    if use.is_scaled_whole:
        cured = AMAX_ALONE, EVERY_STEP, NO_BINS
        if rows is None or rows["reason"].isin(cured).any():
            yield Missing(layer, tensor)
        return
    name, _ = statistics_of(use)
    if name and (rows is None or (rows["reason"] != "").any()):
        yield Missing(layer, tensor, (name.format("underflows%"), name.format("overflows%")))


def select_of(missing: Iterable[Missing]) -> str:
    """`select=[…]` for `watch`, in which `fp8lab` is imported; empty if nothing is missing."""
    needed: dict[tuple[str, str], dict[str, None]] = {}
    for one in missing:
        needed.setdefault((one.layer, one.tensor), {}).update(dict.fromkeys(one.statistics))
    layers: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (layer, tensor), statistics in needed.items():
        layers.setdefault((tensor, tuple(statistics)), []).append(layer)
    tensors: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for (tensor, told), names in layers.items():
        tensors.setdefault((_patterns(names), told), []).append(tensor)
    selections = [
        f"fp8lab.Selection(layers={patterns!r}, tensors={tuple(names)!r}, "
        + (f"statistics={told!r}, " if told else "")
        + "freq=1)"
        for (patterns, told), names in tensors.items()
    ]
    return f"select=[{', '.join(selections)}]" if selections else ""


def _patterns(layers: Iterable[str]) -> tuple[str, ...]:
    """Names; of those that differ in numbers alone, one pattern."""
    alike: dict[str, list[str]] = {}
    for layer in map(glob.escape, layers):
        alike.setdefault(re.sub(r"\d+", "*", layer), []).append(layer)
    return tuple(names[0] if len(names) == 1 else pattern for pattern, names in alike.items())
