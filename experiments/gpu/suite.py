"""What the parts of the suite are given, and what becomes of what they find.

A part is given a `Setting` (the device, sizes, how much time is left) and a `Page`, on which it
puts tables row by row. The page is written after every row, so that what was measured is kept
whatever happens next: a part that raises, runs out of its time or dies with the process leaves its
rows, and the last line of the error. A row that cannot be had says why and the next is tried.

Times on a GPU are CUDA events around the work; works that are compared take turns in one process,
in another order each turn, and the ratio is taken within a turn. Rejected: seconds side by side
from separate runs, which differ by more than what is asked.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

REHEARSAL = "rehearsal on a CPU: no figure of this is a measurement"

Work = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """Where a part runs; `deadline` is when it must be done, on time.monotonic's clock, and
    `missing` is what of the optional packages is not here."""

    device: str
    rehearsal: bool
    out: Path
    deadline: float
    missing: frozenset[str]

    def pick(self, real: Any, tiny: Any) -> Any:
        """The size of a measurement, or that of a rehearsal."""
        return tiny if self.rehearsal else real

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


def last_line(error: BaseException) -> str:
    """The kind and the message of an error, in one short line that a table can hold."""
    message = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {message}"[:200].replace("|", "/")


@dataclass
class Table:
    """A table that grows; every row is kept at once."""

    title: str
    columns: tuple[str, ...]
    saved: Work
    rows: list[list[str]] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        """A row: its cells as text, empty where there are fewer than columns."""
        row = [_shown(cell) for cell in cells]
        self.rows.append(row + [""] * (len(self.columns) - len(row)))
        print("| " + " | ".join(self.rows[-1]) + " |", flush=True)
        self.saved()

    def attempt(self, name: str, work: Callable[[], tuple[object, ...]]) -> None:
        """A row of a name and what `work` gives, or of why it gives nothing."""
        try:
            cells = work()
        except TimeoutError:
            raise
        except Exception as error:  # whatever a kernel or a library can raise
            self.add(name, f"no result: {last_line(error)}")
        else:
            self.add(name, *cells)


def _shown(cell: object) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


@dataclass
class Page:
    """What one part has found so far, in `file`, as JSON."""

    name: str
    title: str
    file: Path
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ended: str = "did not end: it was killed, or is running"
    seconds: float = 0.0

    def table(self, title: str, *columns: str) -> Table:
        """A new table at the end of the page."""
        print(f"\n{title}\n| {' | '.join(columns)} |", flush=True)
        self.tables.append(Table(title, columns, self.save))
        self.save()
        return self.tables[-1]

    def note(self, text: str) -> None:
        """A line below the tables."""
        print(text, flush=True)
        self.notes.append(text)
        self.save()

    def save(self) -> None:
        """Write what there is; a reader never meets half a file."""
        tables = [{"title": t.title, "columns": t.columns, "rows": t.rows} for t in self.tables]
        found = {"name": self.name, "title": self.title, "ended": self.ended, "notes": self.notes}
        found |= {"seconds": round(self.seconds, 1), "tables": tables}
        half = self.file.with_suffix(".half")
        half.write_text(json.dumps(found, indent=1), encoding="utf-8")
        half.replace(self.file)


def seconds_of(setting: Setting, work: Work, repeat: int = 1) -> float:
    """Seconds of one run of `work`, the mean of `repeat` in a row, on the device's clock."""
    if setting.device == "cpu":
        begun = time.perf_counter()
        for _ in range(repeat):
            work()
        return (time.perf_counter() - begun) / repeat
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeat):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeat


def ratios(
    setting: Setting, works: Mapping[str, Work], baseline: Work, turns: int, repeat: int = 1
) -> dict[str, tuple[float, float, float]]:
    """Quartiles of the time of each of `works` / that of `baseline`, over interleaved turns; fewer
    turns if the time runs out."""
    sides = [("", baseline), *works.items()]
    for _, work in sides * 2:
        work()
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns):
        begun = time.monotonic()
        ordered = sides[turn % len(sides) :] + sides[: turn % len(sides)]
        took = {name: seconds_of(setting, work, repeat) for name, work in ordered}
        for name in works:
            found[name].append(took[name] / took[""])
        if turn >= 2 and setting.left < 2 * (time.monotonic() - begun):
            break
    return {name: tuple(statistics.quantiles(r, n=4)) for name, r in found.items()}  # type: ignore[misc]
