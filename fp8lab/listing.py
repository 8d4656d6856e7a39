"""Rows in a terminal: runs as `ls` and `show` have them, the grid of an experiment, any rows.

Numbers are those that the run recorded; what it does not say is None.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fp8lab.comparison import config_of, lost_at, number_of, told_losses, told_of
from fp8lab.ending import error_of
from fp8lab.failure import TRACEBACK, and_where
from fp8lab.recipe import GEMMS, gemm_in_words
from fp8lab.runs import UNTOLD, often_in_words
from fp8lab.store import Run, RunError, find_runs, open_run
from fp8lab.terminal import printable

NAMED = 3  # layers, of those that are cast alike
WRAPPED = 32  # characters, beyond which a cell of several words goes on in the next line


def summary_of(run: Run) -> dict[str, Any]:
    """A run in a row, JSON-able but for NaN."""
    rows = run.arrow("steps", ("loss",))
    result = told_of(run, "result")
    losses = told_losses(rows)["loss"]
    return {
        "run": str(run.path),
        "state": run.state,
        "part": config_of(run).get("part"),
        "arm": config_of(run).get("arm"),
        "seed": config_of(run).get("seed"),
        "steps": len(pa.compute.unique(rows["step"])),
        "loss": losses[-1].as_py() if len(losses) else None,
        "diverged_at": lost_at(run),
        "final_loss": result.get("final_loss"),
        "error": error_of(run),
    }


def summaries_below(folder: Path) -> list[dict[str, Any]]:
    """Of the runs below a folder those that can be read, then those that are damaged."""
    summaries, damaged = [], []
    for path in find_runs(folder):
        try:
            summaries.append(summary_of(open_run(path)))
        except (RunError, OSError, ValueError) as error:
            damaged.append({"run": str(path), "state": "damaged", "error": str(error)})
    return summaries + damaged


def print_runs(console: Console, summaries: Iterable[Mapping[str, Any]], folder: Path) -> None:
    """A row a run, and below why one failed or cannot be read."""
    names = ("state", "steps", "diverged_at", "loss", "final_loss")
    rows, why = [], []
    for summary in summaries:
        run = Path(str(summary["run"])).relative_to(folder)
        rows.append({"run": run} | {name: summary.get(name) for name in names})
        if summary.get("error") is not None:
            why.append(printable(f"{run}: {summary['error']}"))
    if not rows:
        why = [f"no runs in {printable(str(folder))}"]
    else:
        print_rows(console, rows)
    for line in why:
        console.print(line, highlight=False, soft_wrap=True)


def facts_of(run: Run, info: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What `show` says of a run but for its processes and events, in rows."""
    for key in ("run", "state", "steps", "loss", "machine", "command", "every"):
        yield key, cell_of(info.get(key))
    if info.get("error") is not None:
        yield "error", and_where(str(info["error"]), run.path / TRACEBACK)
    yield "versions", ", ".join(f"{k} {v}" for k, v in told_of(run, "versions").items())
    sites = info.get("sites")
    for site in sites if isinstance(sites, list) else []:
        if isinstance(site, dict):
            parts = ", ".join(f"{role} {site.get(role)}" for role in ("gate", "up", "down"))
            yield f"site {site.get('site')}", f"{parts}; {site.get('activation')}"
    alike: dict[str, list[str]] = {}
    for layer, casts in told_of(run, "precision").items():
        if isinstance(casts, dict):
            told = "; ".join(f"{gemm} {gemm_in_words(casts, gemm)}" for gemm in GEMMS)
            alike.setdefault(told, []).append(layer)
    if not alike and "precision" in run.info:
        yield "precision", "no layer says its own: as the model's dtype and autocast have it"
    for told, layers in alike.items():
        more = f" and {len(layers) - NAMED} more" if len(layers) > NAMED else ""
        yield ", ".join(layers[:NAMED]) + more, told


def ranks_of(run: Run) -> list[dict[str, Any]]:
    """The processes of a run as rows, JSON-able but for NaN; flush_seconds is how often each
    writes, so how much of a killed one may be lost."""
    rows = run.ranks().drop(columns=["pid", "host"]).to_dict("records")
    return [
        {str(k): v if k == "flushed" or pd.notna(v) else None for k, v in row.items()}
        | {"flush_seconds": run.writes_every(row["rank"])}
        for row in rows
    ]


def rank_in_words(row: Mapping[str, Any]) -> str:
    """Where a process stands, and since when nothing came of it.

    Of one that did not come to an end, or whose disk refuses, only what is on disk is known.
    """
    last, flushed, error = row["last_step"], row["flushed"], row["error"]
    told = f"{row['state']}, "
    if row["state"] not in UNTOLD and row["refused"] is None:
        told += "no step" if last is None else f"last step {last}"
    elif last is not None:
        told += f"last step on disk {last}"
    else:
        told += f"no step of it on disk ({often_in_words(row['flush_seconds'])})"
    if math.isfinite(flushed) and last is not None:
        told += f", written {datetime.fromtimestamp(flushed, UTC):%Y-%m-%d %H:%M:%S} UTC"
    told = told if error is None else f"{told}: {error}"
    refused = row["refused"]
    return told if refused is None else f"{told}; not written: {refused}"


def print_grids(console: Console, parts: Iterable[Any], out: Path) -> None:
    """The runs below `out`, a grid a part."""
    runs = [open_run(path) for path in find_runs(out)]
    for part in parts:
        if any(config_of(one).get("part") == part.name for one in runs):
            titles = {one.name: printable(one.title) for one in part.arms}
            table, key = _grid(titles, part.name, runs)
            # Not the table's own, which are as narrow as it is.
            console.print(printable(part.title), style="table.title", highlight=False)
            console.print(table)
            if key:
                console.print(key, style="table.caption", highlight=False)
    console.print(f"runs: {printable(str(out))}", highlight=False, soft_wrap=True)


def _grid(arms: dict[str, str], part: str, runs: list[Run]) -> tuple[Table, str]:
    """Arms x seeds: the step at which a run diverged, or its final loss; and how to read it."""
    cells: dict[tuple[str, int], str | Text] = {}
    for one in runs:
        config, summary = config_of(one), summary_of(one)
        where = (config.get("arm"), config.get("seed"))
        if config.get("part") == part and isinstance(where[0], str) and isinstance(where[1], int):
            diverged, final = summary["diverged_at"], number_of(summary["final_loss"])
            cell: str | Text = printable(summary["state"]) if final is None else f"{final:.3f}"
            if diverged is not None:
                cell = Text(printable(f"✗ {diverged}"), style="bold red")
            cells[where[0], where[1]] = cell
    seeds = sorted({seed for _, seed in cells})
    has_diverged = any(isinstance(cell, Text) for cell in cells.values())
    key = "a number: the final loss; ✗ n: diverged at step n" * has_diverged
    table = Table(box=None)
    for name in ("arm", *(f"seed {seed}" for seed in seeds)):
        table.add_column(name)
    for arm, arm_title in arms.items():
        if any((arm, seed) in cells for seed in seeds):
            table.add_row(arm_title, *(cells.get((arm, seed), "") for seed in seeds))
    return table, key


def print_rows(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table, whose first column names the row; where it is too wide, its rows are columns, and
    where it is then still too wide, each is a paragraph.

    Headings wrap, and cells of several words; others do not: half of a number is none.
    """
    names = [name.replace("_", " ") for name in (rows[0] if rows else ())]
    cells = [[printable(cell_of(value)) for value in row.values()] for row in rows]
    turned = [list(line) for line in zip(names, *cells, strict=True)]
    if _print_table(console, names, cells) or _print_table(console, turned[0], turned[1:]):
        return
    for row in cells:
        told = (f"{name} {cell}" for name, cell in zip(names[1:], row[1:], strict=True))
        console.print(row[0], highlight=False)
        console.print(Padding(", ".join(told), (0, 0, 0, 2)), highlight=False)


def _print_table(console: Console, names: list[str], cells: list[list[str]]) -> bool:
    """Whether there was room for it; else nothing is printed."""
    table, width = Table(box=None), 0
    for position, name in enumerate(names):
        column = [row[position] for row in cells]
        widest = max(map(len, [*name.split(), *(one for one in column if not _wraps(one))]))
        widest = max([widest, *(min(len(one), WRAPPED) for one in column)])
        table.add_column(name, width=widest)
        width += widest + 2
    for row in cells:
        table.add_row(*(Text(cell, no_wrap=not _wraps(cell)) for cell in row))
    if width <= console.width:
        console.print(table)
    return width <= console.width


def _wraps(cell: str) -> bool:
    return len(cell) > WRAPPED and " " in cell


def cell_of(value: Any) -> str:
    """Three digits of a number; a dash for what is missing."""
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
