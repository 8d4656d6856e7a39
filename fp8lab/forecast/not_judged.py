"""What of a run in FP8 no rule could judge, as it was never recorded, and how to record it.

A default selection has the feed-forwards alone, so that a head that saturates is not seen. Where a
run went wrong and nothing was found, "nothing found" is only as good as what was looked at.
"""

from __future__ import annotations

from typing import NamedTuple

from fp8lab.forecast.recorded import is_watchable, low_casts, recorded_sites
from fp8lab.forecast.to_record import Missing, select_of
from fp8lab.forecast.what_if import uses_of
from fp8lab.plan import Plan
from fp8lab.recipe import OPERANDS, DelayedScaling
from fp8lab.runs import Run

_WHOLE = Plan(recipe=DelayedScaling())  # any under which every operand of every layer is cast


class NotJudged(NamedTuple):
    """`what` names, in words, operands that were cast to less than 16 bits and have no rows;
    `select` is the argument of `watch` that records them, as Python. Each is empty where there is
    none."""

    what: str
    select: str

    def __str__(self) -> str:
        told = f"not recorded, so not judged: {self.what}"
        return f"{told}: watch(…, {self.select})" if self.select else told


def not_judged(run: Run) -> NotJudged:
    """Of a run whose layers say what they cast; of others nothing. Raises RunError if a run is
    damaged."""
    recorded = {operand_at(run, site) for site in recorded_sites(run)}
    left = [one for one in low_casts(run) if one not in recorded]
    told = []
    for operand in OPERANDS:
        layers = [layer for layer, of in left if of == operand]
        if layers:
            told.append(f"{operand} of {in_short(layers)}")
    return NotJudged(
        what=", ".join(told),
        select=select_of(Missing(*one) for one in left if is_watchable(run, one[0])),
    )


def operand_at(run: Run, site: str) -> tuple[str, str] | None:
    """(Layer, operand) that is the tensor recorded there, None if it is no layer's."""
    uses = uses_of(run, [site], _WHOLE).cast
    return (uses[0].layer, uses[0].operand) if uses else None


def in_short(layers: list[str]) -> str:
    """How many, and the first three."""
    listed = ", ".join(layers[:3]) + (", …" if len(layers) > 3 else "")
    return f"{len(layers)} layer{'s' * (len(layers) != 1)} ({listed})"
