"""Does a bisection name the operand that was planted, and how many reruns does it take?

Twenty small real trainings with one guilty operand each (`planted_operands`), bisected with nothing
told but the plan and what counts as broken. Named means: the guilty set is the planted operand and
nothing else, and where one of its GEMMs was planted, that one. Further trainings have two guilty
operands, and some are bisected the other way round. The trainings, the limit and the search were
developed on seeds below 1000; these are drawn from `FIRST_SEED` on.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
from planted_operands import Planted, broke, planted, planted_in_twos

from fp8lab.bisection import Bisection, Direction, bisect

FIRST_SEED = 1000


def is_named(case: Planted, found: Bisection) -> bool:
    """Whether the guilty set is what was planted; a planted operand may have one guilty GEMM."""
    told = found.guilty if any("@" in site for site in case.guilty) else found.sites
    return sorted(told) == sorted(case.guilty)


def bisected(case: Planted, direction: Direction = "saves") -> tuple[Bisection, float]:
    """The bisection of a planted training, and the seconds of one rerun."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        path = Path(folder) / "bisection"
        found = bisect(case.train, case.plan, path=path, judge=broke, direction=direction)
        seconds = time.perf_counter() - began
        print(_row(case, found), f"{seconds:.0f} s", file=sys.stderr, flush=True)
        return found, seconds / len(found.reruns)


def bisection_lines() -> list[str]:
    """Markdown: a row a training, and what follows from all."""
    torch.set_num_threads(1)
    cases = [(case, "saves") for case in planted(FIRST_SEED)]
    found = [bisected(case) for case, _ in cases]
    right = [is_named(case, one) for (case, _), (one, _) in zip(cases, found, strict=True)]
    within = [len(one.reruns) <= one.bound for one, _ in found]
    further: list[tuple[Planted, Direction]] = [
        *((case, "saves") for case in planted_in_twos(FIRST_SEED + 300)),
        *((case, "breaks") for case in planted(FIRST_SEED + 400)[::8]),
    ]
    others = [bisected(case, direction) for case, direction in further]
    counts = sorted(len(one.reruns) for one, _ in found)
    cells = found[0][0].cells
    lowest = 0.025 ** (1 / len(right))
    interval = f" (95 % interval from {lowest:.0%})" if all(right) else ""
    return [
        f"{sum(right)} of {len(right)} planted operands named{interval}, among {cells} operands of "
        f"GEMMs, in {counts[0]} to {counts[-1]} reruns; {sum(within)} of {len(within)} within "
        f"⌈log2({cells})⌉ + 6 = {found[0][0].bound}. A rerun takes "
        f"{sum(seconds for _, seconds in found) / len(found):.1f} s.",
        "",
        "| fault | planted | seed | named | reruns | only smallest set |",
        "|---|---|---|---|---|---|",
        *(_row(case, one) for (case, _), (one, _) in zip(cases, found, strict=True)),
        "",
        "Two guilty operands, which takes more reruns; and the smallest set that breaks BF16:",
        "",
        "| fault | planted | seed | named | reruns | only smallest set |",
        "|---|---|---|---|---|---|",
        *(_row(case, one) for (case, _), (one, _) in zip(further, others, strict=True)),
    ]


def _row(case: Planted, found: Bisection) -> str:
    told = ", ".join(found.guilty) or str(found.stopped)
    told += "" if is_named(case, found) else " ✗"
    told += " (breaks BF16)" if found.direction == "breaks" and found.guilty else ""
    unique = "yes" if found.unique else "no"
    planted_sites = ", ".join(case.guilty)
    reruns = len(found.reruns)
    return f"| {case.fault} | {planted_sites} | {case.seed} | {told} | {reruns} | {unique} |"


if __name__ == "__main__":
    print("\n".join(bisection_lines()))
