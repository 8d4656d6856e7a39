"""Bars for what runs in other processes: one over all runs, one for each that is under way.

Where nobody watches (a file, a pipe) there are no bars but a line for each run that has ended. What
failed is a line on stderr in any case.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fp8lab.terminal import printable


class Bars:
    """A bar over all runs and a line for each one that is under way."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._all = self._bars.add_task("runs", total=0, numbers="")
        self._jobs: dict[int, tuple[str, Any, float]] = {}
        self._alarms: dict[int, int] = {}
        self._at_most = 0
        self._is_planned = False  # a bisection does not know how many runs it will take

    def __enter__(self) -> Bars:
        if self._console.is_terminal:  # else the bars, though never drawn, end in an empty line
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def interrupted(self) -> None:
        """Nothing moves any more; that processes close their runs may take seconds."""
        if self._console.is_terminal:
            self._bars.stop()
            self._console.print("interrupted: the runs that are under way are being closed")

    def noted(self, line: str) -> None:
        """What does not fail and should be known."""
        print(f"note: {printable(line)}", file=sys.stderr)

    def planned(self, total: int) -> None:
        self._at_most, self._is_planned = total, True
        self._bars.update(self._all, total=total)

    def started(self, index: int, label: str) -> None:
        self._jobs[index] = (label, None, 0.0)
        self._bars.update(self._all, total=max(len(self._jobs), self._at_most))

    def bounded(self, done: int, at_most: int) -> None:
        self._at_most = at_most
        self._bars.update(self._all, completed=done, total=at_most)

    def reported(self, report: Any) -> None:
        label, task, began = self._jobs[report.index]
        if task is None:
            began = time.monotonic()
            task = self._bars.add_task(label, total=report.steps, numbers="")
            self._jobs[report.index] = (label, task, began)
        self._alarms[report.index] = report.alarms
        speed = report.step / max(time.monotonic() - began, 0.1)
        numbers = f"{speed:.0f} steps/s  loss {report.loss:.4g}  alarms {report.alarms}"
        self._bars.update(task, completed=report.step, numbers=numbers)
        self._bars.update(self._all, numbers=f"alarms {sum(self._alarms.values())}")

    def ended(self, index: int, error: str | None) -> None:
        label, task, _ = self._jobs[index]
        if task is not None:
            self._bars.remove_task(task)
        self._bars.advance(self._all)
        if error is not None:
            print(f"failed: {printable(error)}", file=sys.stderr)  # above the bars, if there are
        elif not self._console.is_terminal:
            which = f" ({self._bars.tasks[0].completed:.0f}/{self._at_most})"
            told = f"done: {label}{which * self._is_planned}"
            self._console.print(told, highlight=False, soft_wrap=True)
