"""Cause: a clamp that the training had, and that the model which is used now has not.

A clamped SwiGLU (gpt-oss: gate <= 7, |up| <= 7; DeepSeek-V4: 10; Step: 7 after the SiLU) is another
function where the clamp bites. Leave it out at inference, as another implementation of the same
weights easily does, and channels that learnt under it are free: DeepSeek-V4's shared expert then
reaches +-2000 and the text is corrupt (sglang #23776).

So the run is a recording of the model in use (`watch(..., inference=True)`), its twin the training,
or any run of the right model. run.json says which formula each feed-forward computes; a clamp set
from outside, by hooks on the projections, shows in the rows: the largest value of gate, or the
largest magnitude of up, is the same number in step after step. Seen: the twin's feed-forward has
both limits, the run's has none or larger ones, and its gate or up is beyond them, from then on.
Where its product is larger than the twin's formula allows, act(limit) (up_limit + offset), it is
certain that the model computes what the training never saw. What contradicts: gate and up that stay
within the limits, for where a clamp never bites the function is the same.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from fp8lab.diagnosis.rows import Rows
from fp8lab.record import Evidence, Finding

ROUNDED = 1.0 + 2.0**-8  # a BF16 number may be so much larger than what it was
SAME = 3  # steps in which a clamped tensor's largest value is the same number
REMEDY = "put the training's clamp on the feed-forwards of the model in use"


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """One finding, for the feed-forward that is farthest beyond what its twin's clamp allows."""
    if twin is None:
        return []
    here, there = _formulas(run), _formulas(twin)
    found = []
    for site in here.keys() & there.keys():
        allowed = _bound(there[site])
        if math.isfinite(allowed) and not _bound(here[site]) <= allowed:
            found += _judge(run, site, there[site], allowed)
    found.sort(key=lambda f: (f.severity != "high", f.since or 0, f.site or ""))
    return found[:1]


def _formulas(run: Rows) -> dict[str, dict[str, Any]]:
    """Gated feed-forward -> what run.json says of it, with the limits that its rows show."""
    said = run.info.get("sites")
    described = [s for s in said if isinstance(s, dict)] if isinstance(said, list) else []
    gated = [site for site in described if site.get("gated", True) and "site" in site]
    found: dict[str, dict[str, Any]] = {str(site["site"]): _numbers(site) for site in gated}
    names = [f"{name}:{role}" for name in found for role in ("gate", "up")]
    rows = run.tensors(("cur_amax", "max", "l2_norm"), sites=tuple(names))
    # The same input again has the same largest value without a clamp.
    again = rows.duplicated(["site", "l2_norm"]) & rows["l2_norm"].notna()
    rows = rows[~again]
    for name, facts in found.items():
        gate = rows.loc[rows["site"] == f"{name}:gate", "max"]
        up = rows.loc[rows["site"] == f"{name}:up", "cur_amax"]
        # Mostly there is one limit for both.
        both = _repeated(pd.concat([gate, up])) if gate.max() == up.max() else None
        for role, values in (("gate", gate), ("up", up)):
            shown = both or _repeated(values)
            if shown is not None:
                facts.setdefault(f"{role}_limit", shown)
    return found


def _numbers(site: dict[str, Any]) -> dict[str, Any]:
    """What is said of a site, without limits and slopes that are no numbers."""
    numbers = ("gate_limit", "activated_limit", "up_limit", "up_offset", "beta")
    wrong = [n for n in numbers if n in site and not isinstance(site[n], int | float)]
    facts = {name: value for name, value in site.items() if name not in wrong}
    after = facts.get("activated_limit")
    if after is not None and 0 < after < 700:  # silu(gate) is at the limit there, or just beyond
        facts.setdefault("gate_limit", after * (1.0 + math.exp(-after)))
    return facts


def _repeated(values: pd.Series) -> float | None:
    """The largest value, if so many steps have exactly that one."""
    largest = values.max()
    return float(largest) if (values == largest).sum() >= SAME and largest > 0 else None


def _bound(facts: dict[str, Any]) -> float:
    """The largest product that a formula allows; infinite without both limits."""
    gate, up = facts.get("gate_limit"), facts.get("up_limit")
    if gate is None or up is None:
        return math.inf
    try:
        sigmoid = 1.0 / (1.0 + math.exp(-float(facts.get("beta", 1.0)) * gate))
        activated = gate * sigmoid if facts.get("activation") in ("silu", "swish") else gate
        activated = min(activated, facts.get("activated_limit", math.inf))
        return float(activated * (up + abs(facts.get("up_offset", 0.0))))
    except OverflowError:  # no numbers that a model has
        return math.inf


def _judge(run: Rows, site: str, facts: dict[str, Any], allowed: float) -> list[Finding]:
    bitten = _bitten(run, site, facts)
    if bitten is None:
        return []
    products = run.tensors("cur_amax", sites=f"{site}:product")["cur_amax"]
    reached = float(products.max())
    is_beyond = reached > allowed * ROUNDED
    told = f"the twin clamps (gate <= {facts['gate_limit']:g}, |up| <= {facts['up_limit']:g}), "
    told += f"this model does not: {bitten.site} is {bitten.value:.3g}"
    if is_beyond:
        told += f", and the product reached {reached:.3g}, where {allowed:.3g} is the most"
    return [
        Finding(
            cause="missing_clamp",
            summary=told,
            severity="high" if is_beyond else "medium",
            confidence="high",
            site=f"{site}:product",
            since=bitten.step,
            evidence=(bitten,),
            remedy=REMEDY,
            cannot_exclude="that the two runs are of models that are meant to differ",
        )
    ]


def _bitten(run: Rows, site: str, facts: dict[str, Any]) -> Evidence | None:
    """The first gate or up on which the twin's clamp would act."""
    found = []
    for role, column in (("gate", "max"), ("up", "cur_amax")):
        limit = float(facts[f"{role}_limit"])
        rows = run.tensors(column, sites=f"{site}:{role}")
        for _, row in rows[rows[column] > limit * ROUNDED].head(1).iterrows():
            where, source = f"{site}:{role}", "the twin's limit"
            found.append(
                Evidence(
                    step=int(row["step"]),
                    site=where,
                    quantity=column,
                    value=float(row[column]),
                    threshold=limit,
                    source=source,
                )
            )
    return min(found, key=lambda one: one.step, default=None)
