"""A view of a run as a frame for a terminal of any width, and as lines where nobody watches.

Curves are blocks on one axis of steps, each the largest of its steps, so that no spike falls
between two; heights are logarithmic where all values are positive. Under them the steps at which
findings began are marked. What does not fit the terminal's height is left out, for a frame that
scrolls cannot be drawn anew. Names come from a stranger's model: none is markup, and none moves the
cursor.

Rejected: a screen of its own, as editors have. What it showed would be gone when it ends.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fp8lab.live.following import Curve, View
from fp8lab.record import CLIPPED_STALENESS, Finding
from fp8lab.terminal import printable

BLOCKS = "▁▂▃▄▅▆▇█"
LABEL, NUMBER = 11, 10  # cells left and right of a curve
PRODUCTS, FINDINGS, EVENTS = 6, 5, 3  # at most so many of them in a frame
NARROW, NARROWEST = 66, 52  # cells, below which columns are left out

_STATES = {
    "running": ("●", "recording", "bold green"),
    "finished": ("✓", "finished", "bold green"),
    "killed": ("✗", "killed: its process is gone", "bold red"),
    "failed": ("✗", "failed", "bold red"),
    "interrupted": ("■", "interrupted", "bold yellow"),
    "unknown": ("?", "unknown: on another machine, and long silent", "bold yellow"),
}
_SEVERITY = {"high": "bold red", "medium": "yellow", "low": "dim"}


def frame(view: View, width: int, height: int | None) -> Text | Table:
    """The whole view; at most `height` lines of `width` cells, None for as many as it takes."""
    grid = Table.grid(padding=0)
    grid.add_column(width=width, no_wrap=True, overflow="ellipsis")
    lines = [*_head(view, width), *_curves(view, width)]
    for part in (_findings(view, width), _products(view, width), _events(view)):
        if part and (height is None or len(lines) + 1 + len(part) < height):
            lines += [Text(), *part]
    for line in lines:
        grid.add_row(line)
    return grid


def _head(view: View, width: int) -> Iterator[Text]:
    name = _end_of(printable(str(view.path)), width)
    yield Text(name, "bold")
    if view.note:
        yield Text(view.note, "dim")
    sign, state, style = _STATES.get(view.state, ("?", printable(view.state), "bold yellow"))
    line = Text(f"{sign} {state}", style)
    if view.error is not None:
        line.append(f": {printable(view.error)}")
    if view.lost:
        yield Text(view.lost, "bold red")
    if view.step is None:
        none = "no step yet" if view.state == "running" else "no step on disk"
        line.append(f"   {none}", "not bold default")
        yield line
        return
    facts = [f"step {view.step:,}" + (f" of {view.planned:,}" if view.planned else "")]
    if view.speed is not None:
        facts.append(f"{view.speed:.3g} steps/s")
    if view.age is not None and view.state in ("running", "unknown"):
        facts.append(f"rows {_duration(view.age)} ago")
    told = "   ".join(facts)
    if cell_len(line.plain) + 3 + len(told) <= width:
        line.append("   " + told, "not bold default")
        yield line
    else:
        yield line
        yield Text(told)


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


# --- curves ---------------------------------------------------------------------------------------


def _curves(view: View, width: int) -> Iterator[Text]:
    shown = {"loss": view.curves["loss"], "grad norm": view.curves["grad_norm"]}
    shown = {name: curve for name, curve in shown.items() if len(curve.steps)}
    if not shown:
        return
    first = min(int(curve.steps[0]) for curve in shown.values())
    last = max(int(curve.steps[-1]) for curve in shown.values())
    cells = max(8, min(width - LABEL - NUMBER, last - first + 1))
    yield Text()
    for name, curve in shown.items():
        line = Text(name.ljust(LABEL), "dim")
        line.append_text(sparkline(curve, first, last, cells))
        line.append(f"{curve.values[-1]:.4g}".rjust(NUMBER), _unless_finite(curve.values[-1]))
        yield line
    yield from _axis(view, first, last, cells)


def _unless_finite(value: float) -> str:
    return "bold default" if math.isfinite(value) else "bold red"


def sparkline(curve: Curve, first: int, last: int, cells: int) -> Text:
    """`cells` blocks for the steps `first` to `last`; × where a value was not finite."""
    place = _place(curve.steps, first, last, cells)
    finite = np.isfinite(curve.values)
    values = np.where(finite, curve.values, np.nan)
    low, high = (np.nanmin(values), np.nanmax(values)) if finite.any() else (0.0, 0.0)
    if low > 0:
        values, low, high = np.log(values), math.log(low), math.log(high)
    peaks = pd.Series(values).groupby(place).max()
    broken = {int(cell) for cell in place[~finite]}
    text = Text()
    for cell in range(cells):
        if cell in broken:
            text.append("×", "bold red")
        elif cell in peaks.index:
            height = (peaks[cell] - low) / (high - low) if high > low else 0.0
            text.append(BLOCKS[round(height * (len(BLOCKS) - 1))], "cyan")
        else:
            text.append(" ")
    return text


def _place(steps: np.ndarray, first: int, last: int, cells: int) -> np.ndarray:
    return ((steps - first) * min(cells, last - first + 1)) // (last - first + 1)


def _axis(view: View, first: int, last: int, cells: int) -> Iterator[Text]:
    """Marks where findings began, if any did; the first and the last step."""
    marks = {
        int(_place(np.array(found.since), first, last, cells)): found.severity
        for found in reversed(view.findings or ())  # the worst last, on top
        if found.since is not None and first <= found.since <= last and found.severity != "low"
    }
    if marks:
        line = Text(" " * LABEL)
        for cell in range(max(marks) + 1):
            line.append("▲" if cell in marks else " ", _SEVERITY[marks.get(cell, "low")])
        yield line
    start, end = f"{first:,}", f"{last:,}"
    together = len(start) + 1 + len(end) <= cells
    start = start if together else ""
    yield Text("step".ljust(LABEL) + start.ljust(cells - len(end)) + end, "dim")


# --- what is wrong --------------------------------------------------------------------------------


def _findings(view: View, width: int) -> list[Text]:
    if view.step is None:
        return []
    told = "" if view.judged is None else f"  (the rules see steps {view.judged:,} on)"
    found = "  not looked for yet" if view.findings is None else "" if view.findings else "  none"
    lines = [Text.assemble(("findings", "bold"), (found + told, "dim"))]
    for one in (view.findings or ())[:FINDINGS]:
        title, summary = (
            textwrap.wrap(text, max(width - 8, 1), max_lines=3, placeholder=" …")
            for text in (_title(one), printable(one.summary))
        )
        severity = (one.severity.ljust(8), _SEVERITY[one.severity])
        lines.append(Text.assemble(severity, *title[:1]))
        lines += [Text(" " * 8 + line) for line in title[1:]]
        lines += [Text(" " * 8 + line, "dim") for line in summary]
    if (left := len(view.findings or ()) - FINDINGS) > 0:
        lines.append(Text(f"{' ' * 8}and {left} more", "dim"))
    return lines


def _title(found: Finding) -> str:
    where = f" at {found.site}" if found.site else ""
    where += f", channel {found.channel}" if found.channel is not None else ""
    since = f", since step {found.since:,}" if found.since is not None else ""
    return printable(found.cause.replace("_", " ") + where + since)


def _products(view: View, width: int) -> list[Text]:
    if view.products.empty:
        return []
    step = int(view.products["step"].max())
    told = f" of step {step:,}"
    if view.cast_step not in (None, step):
        told += f", shares of step {view.cast_step:,}"
    lines = [Text.assemble(("products", "bold"), (told, "dim"))]
    columns = [("channel", 9), ("amax", 11), ("staleness", 11), ("saturated", 11), ("flushed", 9)]
    left_out = ("channel", "flushed") if width < NARROWEST else ("channel",)
    columns = [c for c in columns if width >= NARROW or c[0] not in left_out]
    room = max(9, width - sum(size for _, size in columns))
    head = "site".ljust(room) + "".join(name.rjust(size) for name, size in columns)
    lines.append(Text(head, "dim"))
    for row in view.products.head(PRODUCTS).to_dict("records"):
        cells = {
            "channel": ("–" if pd.isna(row["hot_channel"]) else f"{row['hot_channel']:.0f}", ""),
            "amax": _amax(row),
            "staleness": _number(row["staleness"], row["staleness"] > CLIPPED_STALENESS),
            "saturated": _share(row["saturated"]),
            "flushed": _share(row["flushed"]),
        }
        name = _end_of(printable(row["site"].removesuffix(":product")), room - 1)
        line = Text(name + " " * (room - cell_len(name)))
        for key, size in columns:
            text, style = cells[key]
            line.append(text.rjust(size), style)
        lines.append(line)
    if (left := len(view.products) - PRODUCTS) > 0:
        lines.append(Text(f"and {left} more", "dim"))
    return lines


def _amax(row: Mapping[Hashable, Any]) -> tuple[str, str]:
    return _number(row["cur_amax"], False) if row["finite"] else ("not finite", "bold red")


def _number(value: float, is_bad: bool) -> tuple[str, str]:
    return ("–", "dim") if pd.isna(value) else (f"{value:.4g}", "bold red" if is_bad else "")


def _share(value: float) -> tuple[str, str]:
    if pd.isna(value):
        return "–", "dim"
    return (f"{100 * value:.2g} %", "yellow") if value > 0 else ("0", "")


def _events(view: View) -> list[Text]:
    rows = view.events.tail(EVENTS).to_dict("records")
    return [Text("events", "bold"), *(Text(_told(row)) for row in rows)] if rows else []


def _told(event: Mapping[Hashable, Any]) -> str:
    site = f" at {event['site']}" if isinstance(event["site"], str) else ""
    return printable(f"step {event['step']:,}  {event['kind']}{site}: {event['detail']}")


def _end_of(name: str, width: int) -> str:
    """A name that fits; of a long one the end, which tells layers apart."""
    if cell_len(name) <= width:
        return name
    name = name[-width:]
    while cell_len(name) >= width:
        name = name[1:]
    return f"…{name}"


# --- where they are shown -------------------------------------------------------------------------


class Screen:
    """One frame in a terminal, drawn over the last one."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> Screen:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, view: View) -> None:
        width, height = self._console.size
        self._live.update(frame(view, width, height), refresh=True)


class Lines:
    """A line for each update, finding and event; a whole frame at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._view: View | None = None
        self._told: set[tuple[str, str | None, str]] = set()
        self._events = 0

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None and self._view is not None:
            self._console.print(frame(self._view, self._console.width, None))

    def update(self, view: View) -> None:
        if view.step is not None and (self._view is None or view.step != self._view.step):
            self._say(_line(view))
        for event in view.events.iloc[self._events :].to_dict("records"):
            self._say(_told(event))
        self._events = len(view.events)
        for found in view.findings or ():
            key = found.cause, found.site, found.severity
            if key not in self._told:
                self._say(f"{found.severity}: {_title(found)}")
            self._told.add(key)
        self._view = view

    def _say(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)


def _line(view: View) -> str:
    parts = [f"step {view.step:,}"]
    for name, key in (("loss", "loss"), ("grad norm", "grad_norm")):
        if len(values := view.curves[key].values):
            parts.append(f"{name} {values[-1]:.4g}")
    if view.speed is not None:
        parts.append(f"{view.speed:.3g} steps/s")
    for row in view.products.head(1).to_dict("records"):
        staleness = "" if pd.isna(row["staleness"]) else f", staleness {row['staleness']:.4g}"
        parts.append(printable(f"{row['site']} amax {_amax(row)[0]}{staleness}"))
    return "  ".join(parts)
