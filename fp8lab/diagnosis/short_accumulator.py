"""Cause: a GEMM sums in too few bits, over too many elements.

Hopper's tensor cores keep some 14 bits of the running sum of FP8 products, and cut the rest off at
every step of 32. The error grows with the length K of the sum: with 14 bits, unpromoted, the
product of normal numbers is off by 1.3e-4 at K = 128, 8e-4 at 1024 and 3.3e-3 at 4096 (measured);
promoted to FP32 every 128 elements it stays at 1.3e-4 whatever K is. It is an error of the sum:
the operands' rows look as they should, and no scale, format or mitigation of them changes it.

Seen: `gemm_error` of an input (output GEMM), a grad_output (grad_input GEMM) or a grad_weight (the
GEMM that sums over tokens), the relative error against FP32 sums of the same codes. What the layer
says of itself ("summed in 14 bits") is told and not believed.

What contradicts: an error that stays at the promoted level, however few the bits that are declared.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from fp8lab.diagnosis.rows import Rows, facts_of
from fp8lab.record import Evidence, Finding
from fp8lab.runs import hottest

# Eight times what 14 bits and a promotion every 128 elements leave, and a fortieth of the operands'
# own rounding: below it nobody has shown harm. 14 bits cross it at K = 1200, 12 bits at 300.
NOTABLE = 1e-3
# E4M3's own rounding error (an operand, normal numbers): the sum is as bad as the codes.
AS_BAD_AS_ROUNDING = 0.0266

REMEDY = (
    "promote the running sum to FP32 every 128 elements (use_split_accumulator=True; DeepSeek-V3, "
    "2412.19437, section 3.3.2), or split K"
)


def find(run: Rows, twin: Rows | None) -> list[Finding]:
    """One finding for the run, at the operand whose GEMM sums worst."""
    rows = run.tensors(
        ("cur_amax", "gemm_error"), sites=("*:input", "*:grad_output", "*:grad_weight")
    )
    rows = hottest(rows[rows["gemm_error"] >= NOTABLE])
    if rows.empty:
        return []
    mean = rows.groupby("site", observed=True)["gemm_error"].mean()
    site = str(mean.idxmax())
    return [_judge(site, len(mean), rows[rows["site"] == site], run.info)]


def _judge(site: str, sites: int, found: pd.DataFrame, info: dict[str, Any]) -> Finding:
    layer, _, operand = site.rpartition(":")
    first, worst = found.iloc[0], found.nlargest(1, "gemm_error").iloc[0]
    gemm = {"input": "output", "grad_output": "grad_input"}.get(operand, operand)
    length = _length(info, layer, gemm)
    over = f" over {length} elements" if length else ""
    left = "input" if gemm == "output" else "grad_output"
    declared = str(facts_of(info, "precision").get(layer, {}).get(f"{left}@{gemm}", ""))
    bits = declared.partition(", summed in ")[2].partition(",")[0]
    said = f"; it says that it sums in {bits}" if bits else "; it says nothing of how it sums"
    bad = worst["gemm_error"] >= AS_BAD_AS_ROUNDING
    return Finding(
        cause="short_accumulator",
        summary=(
            f"the {gemm} GEMM sums{over} with an error of {worst['gemm_error']:.2g}, against FP32 "
            f"sums of the same codes{said}; the GEMMs of {sites} operands are short"
        ),
        severity="high" if bad else "medium",
        confidence="high",
        site=site,
        since=int(first["step"]),
        evidence=(
            _evidence(first, NOTABLE),
            _evidence(worst, AS_BAD_AS_ROUNDING if bad else NOTABLE),
        ),
        remedy=REMEDY,
        cannot_exclude="that the training tolerates it: the same run with FP32 sums decides",
    )


def _length(info: dict[str, Any], layer: str, gemm: str) -> int | None:
    sizes = facts_of(info, "linears").get(layer, {})
    length = sizes.get({"output": "in", "grad_input": "out"}.get(gemm, ""))
    return length if isinstance(length, int) else None


def _evidence(row: pd.Series, threshold: float) -> Evidence:
    return Evidence(
        step=int(row["step"]),
        site=str(row["site"]),
        quantity="gemm_error",
        value=float(row["gemm_error"]),
        threshold=threshold,
        source="14 bits promoted every 128: 1.3e-4; E4M3's own rounding: 0.0266",
    )
