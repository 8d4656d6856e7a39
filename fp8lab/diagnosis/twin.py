"""Where a run and its twin in high precision first part: the step, and in it the tensor.

Two trainings on the same batches, of which one rounds more, have the same tensors at first and
others later. What rounding itself may do to a tensor's norm is bounded: no element that is rounded
to a normal number moves by more than half a step, 2^-4 of itself in E4M3 and 2^-3 in E5M2, so the
norm of a tensor moves by no more than an eighth. A norm that is farther off than that has something
else in it: values that were clipped or flushed, other weights, other inputs.

But training amplifies small differences, and gradients most. So a difference must also be six times
the median of what the same tensor's were before, and still be there in most of the next steps. Of
the tensors that part in the first such step, the one comes first that is computed first: weights,
then activations in the model's order, then gradients from the last layer to the first.

Nothing here says which of the two is right, or why; the rules do.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fp8lab.diagnosis.rows import Rows, facts_of

ROUNDED = 2.0**-3  # E5M2's largest relative rounding error, and so that of any norm
STANDS_OUT = 6.0  # times the median difference of the steps before
LASTS = 5  # steps, most of which must show it


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The first step in which a tensor's l2 norm differed from the twin's by more than rounding
    explains: the norm here, the norm there."""

    step: int
    site: str
    here: float
    there: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"first parted from its twin at step {self.step} at {self.site}: "
            f"l2_norm {self.here:.4g}, the twin's {self.there:.4g}"
        )


def first_divergence(run: Rows, twin: Rows) -> Divergence | None:
    """Where they part; None if they do not, or nothing was recorded of both."""
    here, there = _norms(run), _norms(twin)
    parted: list[Divergence] = []
    for site in here.keys() & there.keys():
        both = pd.concat([here[site], there[site]], axis=1, join="inner").dropna()
        pair = both.to_numpy(float)
        place = _first(_differences(pair))
        if place is not None:
            norms = {"here": float(pair[place, 0]), "there": float(pair[place, 1])}
            parted.append(Divergence(step=int(both.index[place]), site=site, **norms))
    order = _Order(run)
    return min(parted, key=lambda one: (one.step, order(one.site)), default=None)


def _norms(run: Rows) -> dict[str, pd.Series]:
    """By site the norm at each step; one index of both would take a hundred bytes a row."""
    rows = run.tensors("l2_norm")
    by_site = rows[rows["rank"] >= 0].groupby("site", observed=True)
    return {str(site): of.groupby("step")["l2_norm"].max() for site, of in by_site}


def _differences(pair: NDArray[np.float64]) -> NDArray[np.float64]:
    """Relative, of the larger to the smaller [steps]; infinite where only one is zero."""
    low, high = pair.min(axis=1), pair.max(axis=1)
    ratios = np.where(high > 0, np.inf, 1.0)
    np.divide(high, low, out=ratios, where=low > 0)
    return np.asarray(ratios - 1.0)


def _first(differences: NDArray[np.float64]) -> int | None:
    """The first position from which on most of the next steps differ by more than they should."""
    usual = pd.Series(differences).expanding().median().shift().fillna(0.0).to_numpy()
    limit = np.maximum(ROUNDED, STANDS_OUT * usual)
    for place in np.flatnonzero(differences > limit):
        if np.mean(differences[place : place + LASTS] > limit[place]) > 0.5:
            return int(place)
    return None


class _Order:
    """Sorts sites as they are computed in a step, as far as run.json knows the layers' order."""

    def __init__(self, run: Rows) -> None:
        names = [*facts_of(run.info, "linears"), *facts_of(run.info, "precision")]
        self._layers = list(dict.fromkeys(names))

    def __call__(self, site: str) -> tuple[int, float, str]:
        layer, _, role = site.rpartition(":")
        inside = [
            number
            for number, name in enumerate(self._layers)
            if name == layer or name.startswith(f"{layer}.")
        ]
        place = float(min(inside, default=len(self._layers)))
        after = {"product": -0.5, "output": 0.25, "residual": 0.5}
        if role in after and inside:
            place = max(inside) + after[role]
        elif role == "up" and inside:
            place += 0.5
        if role == "weight":
            return 0, place, site
        return (2, -place, site) if role.startswith("grad_") else (1, place, site)
