"""Cause: gradients span more than the format does, and the small ones become zero.

One scale has to serve a whole gradient. In E4M3 what is 2^-18 of the largest value becomes zero
(448 against half of 2^-9); E5M2, made for gradients, goes to 2^-33. Where a few tokens or channels
have gradients that many octaves above the bulk, the bulk is flushed. The output hides it, for there
is none: nothing is wrong in the forward pass, and the norm of the gradient is that of the few. What
shows is that weights behind the bulk receive a gradient of exactly zero and stop moving.

Seen first: in the row of a `grad_output` most of the non-zero values are flushed, step after step.
Then: exact zeros in the row of the same layer's `grad_weight`, the harm itself.

What contradicts: a scale that was made by something much larger (staleness far below 1: a history
that remembers a spike, or a first scale of 1): just in time the same gradient would fit, so the
history is at fault and not the format. A scale that never moves is another matter: gradients cast
as they come end in zero too. And a few steps alone do not count, for the first batches are seldom
like the others.
"""

from __future__ import annotations

import pandas as pd

from fp8lab.diagnosis.rows import Rows
from fp8lab.record import Evidence, Finding
from fp8lab.runs import hottest

# Nearly the majority. A gradient of one scale whose values spread as normal numbers do flushes 1e-5
# of them in E4M3.
MAJORITY = 0.45
# Below this staleness the scale alone costs three octaves of the format's eighteen or more.
STALE = 0.125
STEPS = 3
# Of the steps from the first of them on: a gradient that is too wide stays it.
LASTING = 0.5
# Share of a layer's weights that get a gradient of exactly zero.
UNMOVED = 0.25

REMEDY = (
    "gradients in E5M2 (Format.HYBRID), or a scale per block (Float8BlockScaling, "
    "MXFP8BlockScaling) or per row; or keep this layer's grad_output in BF16"
)


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """One finding for every gradient of which the majority is flushed in `STEPS` steps or more."""
    columns = ("cur_amax", "flushed", "staleness", "format", "scale")
    rows = hottest(run.tensors(columns, sites="*:grad_output"))
    fits = rows["staleness"].isna() | (rows["staleness"] >= STALE)
    # A scale that never moves is no history's.
    fits |= rows.groupby("site", observed=True)["scale"].transform("nunique") == 1
    flushed = rows[(rows["flushed"] >= MAJORITY) & fits]
    if flushed.empty:
        return []
    weights = hottest(run.tensors(("cur_amax", "zeros", "count"), sites="*:grad_weight"))
    return [
        _judge(str(site), found, weights)
        for site, found in flushed.groupby("site", observed=True)
        if len(found) >= STEPS and _lasts(found, rows[rows["site"] == site])
    ]


def _lasts(flushed: pd.DataFrame, rows: pd.DataFrame) -> bool:
    since = rows["step"] >= flushed["step"].iloc[0]
    return len(flushed) >= LASTING * int(since.sum())


def _judge(site: str, flushed: pd.DataFrame, weights: pd.DataFrame) -> Finding:
    layer = site.rpartition(":")[0]
    first, worst = flushed.iloc[0], flushed.nlargest(1, "flushed").iloc[0]
    behind = weights[(weights["site"] == f"{layer}:grad_weight")]
    behind = behind[behind["step"].isin(flushed["step"]) & (behind["count"] > 0)]
    unmoved = behind["zeros"] / behind["count"]
    still = float(unmoved.median()) if len(unmoved) else 0.0
    summary = (
        f"in {len(flushed)} steps most of this gradient became zero in {worst['format']}, at worst "
        f"{worst['flushed']:.0%} of its non-zero values"
    )
    evidence = [_evidence(first), _evidence(worst)]
    if still >= UNMOVED:
        summary += f"; {still:.0%} of the layer's weights got a gradient of exactly zero"
        evidence.append(
            Evidence(
                step=int(behind["step"].iloc[int(unmoved.argmax())]),
                site=f"{layer}:grad_weight",
                quantity="zeros / count, median over these steps",
                value=still,
                threshold=UNMOVED,
                source="weights that stand still",
            )
        )
    return Finding(
        cause="gradient_underflow",
        summary=summary,
        severity="high" if still >= UNMOVED else "medium",
        confidence="high",
        site=site,
        since=int(first["step"]),
        evidence=tuple(evidence),
        remedy=REMEDY,
        cannot_exclude=(
            "that the flushed part would have taught nothing: the same run with this gradient in "
            "E5M2 or BF16 decides"
        ),
    )


def _evidence(row: pd.Series) -> Evidence:
    return Evidence(
        step=int(row["step"]),
        site=str(row["site"]),
        quantity="flushed",
        value=float(row["flushed"]),
        threshold=MAJORITY,
        source="nearly the majority",
    )
