"""Runs whose rows are written by hand: what a rule is held against at its thresholds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fp8lab.diagnosis.rows import Loaded
from fp8lab.record import Finding
from fp8lab.store import Run, RunWriter, open_run

Row = dict[str, Any]


def above(threshold: float) -> float:
    return math.nextafter(threshold, math.inf)


def below(threshold: float) -> float:
    return math.nextafter(threshold, -math.inf)


def write(
    path: Path,
    *,
    steps: Iterable[Row] = (),
    tensors: Iterable[Row] = (),
    events: Iterable[Row] = (),
    info: Row | None = None,
) -> Run:
    """A run of these rows; step rows are numbered from 0 where they do not say."""
    writer = RunWriter.create(path, info or {})
    writer.append("steps", [{"step": i, "rank": 0} | row for i, row in enumerate(steps)])
    writer.append("tensors", [{"rank": 0} | row for row in tensors])
    writer.append("events", [{"rank": 0, "detail": ""} | row for row in events])
    writer.close()
    return open_run(path)


def found_by(rule: Any, run: Run, twin: Run | None = None) -> list[Finding]:
    findings: list[Finding] = rule.find(Loaded(run), None if twin is None else Loaded(twin))
    return findings
