"""Runs, as they are read: also while they are written, by whatever number of processes.

A table comes whole or in part: columns, sites, steps and ranks are chosen in the files, so that
one statistic of one site of five million rows takes a second and as much memory as it has values.
Rows of all processes are put together and sorted by step.

Whether a process that says "running" still does: on this machine the kernel knows, by its number
and the moment it was born (numbers are given again, in a new container at once). On another machine
only its last flush tells, and when that is long ago the state is "unknown".

Rejected: telling the living by a lock, which not every file system of a cluster has.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from fp8lab import segments
from fp8lab.record import NOT_AS_TOLD, SCHEMA_VERSION, TABLES, Table
from fp8lab.segments import RunError
from fp8lab.wanted import Wanted, schema_of

HEARTBEAT_SECONDS = 300.0  # one on another machine that flushed nothing for so long may be dead
LARGEST_INFO_BYTES, DEEPEST_INFO = 64 << 20, 50  # a run.json beyond this is none
NAMED_RANKS = 8  # in one sentence
OFTEN = 5.0  # seconds between two writes of a process, if it does not say
_REFUSED = "could not write"  # of a process, beside its state
UNTOLD = ("running", "killed", "unknown")  # states in which more was done than is on disk

BISECTION = "bisection.json"  # beside the reruns that it lists
_STATES = ("running", "killed", "failed", "interrupted", "unknown")  # the first of them tells
_FURTHER: dict[Table, str] = {"steps": "metrics", "tensors": "statistics"}  # numbers by name

_Kept = TypeVar("_Kept")
Names = str | Collection[str] | None
Numbers = int | Collection[int] | None


class Run:
    """A recorded run. Its tables come as pandas frames whose columns `record` describes.

    A table can be read in part, and only that part is loaded: `columns` by name (those that tell
    rows apart always come along), `sites` by name or pattern (`*:product`), `steps` as a range,
    a number or several, `ranks` likewise. Raises ValueError for a column that is none, RunError
    if a file is damaged.
    """

    def __init__(self, path: Path, info: dict[str, Any]) -> None:
        self.path = path
        self.info = info

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.state})"

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.path.name

    @property
    def state(self) -> str:
        """running, finished, interrupted, failed; killed: its process is gone; unknown.

        Of several processes: running if any is, else killed if any was, and so on.
        """
        states = {self.state_of(rank) for rank in self.folders()} - {"finished", "left"}
        return min(states, key=lambda one: [*_STATES, one].index(one), default="finished")

    @property
    def lost(self) -> str:
        """Which of several processes have not come to an end, or not written all their rows, in
        words: "rank 3 killed; ranks 0, 1 failed". Empty if there are none, and for one process."""
        ranks = self._by_end()
        order = [state for state in (*_STATES[1:], _REFUSED) if state in ranks]
        return "; ".join(f"{_named(ranks[state])} {state}" for state in order)

    @property
    def incomplete(self) -> str:
        """Of several processes those that may have had rows which are not on disk, in words: "rank
        3" was killed, or its disk refuses. A process that failed has written what it had."""
        ranks = self._by_end()
        which = {rank for state in (*UNTOLD[1:], _REFUSED) for rank in ranks.get(state, ())}
        return _named(sorted(which)) if which else ""

    def _by_end(self) -> dict[str, list[int]]:
        """Of several processes those of each state, and those whose disk refuses; of one none."""
        ranks: dict[str, list[int]] = {}
        folders = self.folders()
        for rank in folders if len(folders) > 1 else ():
            ranks.setdefault(self.state_of(rank), []).append(rank)
            if self.info_of(rank).get("refused") is not None:
                ranks.setdefault(_REFUSED, []).append(rank)
        return ranks

    def writes_every(self, rank: int) -> float:
        """Seconds between two writes of a process: what was done since its last, a kill loses."""
        told: Any = self.info_of(rank).get("flush_seconds", OFTEN)
        return float(told) if type(told) in (int, float) and 0 <= told < 1 << 1000 else OFTEN

    @property
    def not_as_told(self) -> list[str]:
        """Events after which its rows are not what they seem, each once: "kind: site: detail"."""
        events = self.events(["kind", "site", "detail"])[["kind", "site", "detail"]]
        found = events[events["kind"].isin(NOT_AS_TOLD)].fillna("").to_numpy()
        return list(dict.fromkeys(": ".join(filter(None, words)) for words in found))

    def ranks(self) -> pd.DataFrame:
        """A row a process: rank, state, last_step (that it wrote; missing without), flushed (when
        it last wrote, in seconds since 1970; NaN where nothing tells), error (with which its
        training ended), refused (why the disk has not taken the rows that follow), pid, host.

        The state "left" is that of a rank which the resumed training has no more.
        """
        rows = []
        for rank, folder in self.folders().items():
            pieces = [p for t in TABLES for p in segments.read(folder, t, Wanted(columns=()))]
            steps = [pa.compute.max(piece["step"]).as_py() for piece in pieces]
            last = max((step for step in steps if step is not None), default=None)
            info = self.info_of(rank)
            row = {"rank": rank, "state": self.state_of(rank), "last_step": last}
            row |= {"flushed": _last_written(folder, info)}
            rows.append(row | {key: info.get(key) for key in ("error", "refused", "pid", "host")})
        return pd.DataFrame(rows).astype({"last_step": "Int64"})

    def steps(
        self, columns: Names = None, *, steps: Numbers = None, ranks: Numbers = None
    ) -> pd.DataFrame:
        """A row a step; numbers given to `watch.step` are columns of their own."""
        return self._frame("steps", columns, None, steps, ranks)

    def tensors(
        self,
        columns: Names = None,
        *,
        sites: Names = None,
        steps: Numbers = None,
        ranks: Numbers = None,
    ) -> pd.DataFrame:
        """A row per step, rank and site; a column per statistic."""
        return self._frame("tensors", columns, sites, steps, ranks)

    def channels(
        self,
        columns: Names = None,
        *,
        sites: Names = None,
        steps: Numbers = None,
        ranks: Numbers = None,
    ) -> pd.DataFrame:
        """A row per step, rank, site and channel, for the channels that matter."""
        return self._frame("channels", columns, sites, steps, ranks)

    def events(
        self,
        columns: Names = None,
        *,
        sites: Names = None,
        steps: Numbers = None,
        ranks: Numbers = None,
    ) -> pd.DataFrame:
        """What happened, in order."""
        return self._frame("events", columns, sites, steps, ranks)

    def arrow(
        self,
        table: Table,
        columns: Names = None,
        *,
        sites: Names = None,
        steps: Numbers = None,
        ranks: Numbers = None,
        coded: bool = False,
    ) -> pa.Table:
        """A table, or what is wanted of it, in the order of recording, rank by rank.

        With `coded` a text column is a dictionary column.
        """
        wanted = replace(wanted_of(columns, sites, steps, ranks), coded=coded)
        schema = schema_of(table, coded)
        fields = [schema.field(name) for name in wanted.names(schema)]
        none = pa.schema(fields, metadata=schema.metadata).empty_table()
        folders = self.folders().values()
        return pa.concat_tables(
            [none, *(p for f in folders for p in segments.read(f, table, wanted))]
        )

    def coded(
        self, table: Table, columns: Names = None, *, sites: Names = None, steps: Numbers = None
    ) -> pd.DataFrame:
        """As `tensors` and its like; text columns are categories in the order of their texts.

        A site of millions of rows is then two bytes a row, and found as quickly as a number.
        """
        return self._frame(table, columns, sites, steps, None, coded=True)

    def reduced(
        self,
        table: Table,
        reduce: Callable[[pa.Table], _Kept],
        columns: Names = None,
        *,
        sites: Names = None,
    ) -> list[_Kept]:
        """What `reduce` makes of each piece of a table, in the order of recording, rank by rank.

        One piece is in memory at a time; its text columns are dictionary columns.
        """
        wanted = replace(wanted_of(columns, sites, None, None), coded=True)
        return [
            kept
            for folder in self.folders().values()
            for kept in segments.reduced(folder, table, reduce, wanted)
        ]

    def check(self) -> None:
        """Read all there is and keep nothing. Raises RunError if a file is damaged."""
        for table in TABLES:
            self.reduced(table, len)

    def _frame(
        self,
        table: Table,
        columns: Names,
        sites: Names,
        steps: Numbers,
        ranks: Numbers,
        coded: bool = False,
    ) -> pd.DataFrame:
        schema, further = TABLES[table], _FURTHER.get(table)
        asked = (columns,) if isinstance(columns, str) else columns
        own, by_name = asked, []
        if asked is not None and further is not None:
            by_name = [name for name in asked if name not in schema.names]
            own = [name for name in asked if name in schema.names] + [further] * bool(by_name)
        rows = self.arrow(table, own, sites=sites, steps=steps, ranks=ranks, coded=coded)
        spread: dict[str, NDArray[np.float64]] = {}
        if further in rows.column_names:
            spread = _spread(rows[further])
            rows = rows.drop_columns([further])
            for name in by_name:
                if name not in spread:
                    raise ValueError(f"{self.path}: {table}: {name!r} was not recorded")
        frame: pd.DataFrame = _coded(rows) if coded else rows.to_pandas()
        kept = {k: v for k, v in spread.items() if k not in frame and (not by_name or k in by_name)}
        if kept:
            frame = pd.concat([frame, pd.DataFrame(kept, index=frame.index)], axis=1)
        if frame["step"].is_monotonic_increasing:
            return frame
        return frame.sort_values("step", kind="stable", ignore_index=True)

    def folders(self) -> dict[int, Path]:
        """Rank -> its folder, in order; rank 0 is missing where it never came."""
        try:
            names = [child.name for child in (self.path / "ranks").iterdir() if child.is_dir()]
        except OSError:
            names = []
        found = sorted(int(n) for n in names if n.isascii() and n.isdigit() and n == str(int(n)))
        others = {rank: folder_of(self.path, rank) for rank in found if rank}
        return (
            others if others and not state_file(self.path, 0).exists() else {0: self.path} | others
        )

    def info_of(self, rank: int) -> dict[str, Any]:
        """What run.json or rank.json says now; empty if it is damaged."""
        try:
            return _read_info(state_file(self.path, rank))
        except RunError:
            return self.info if rank == 0 else {}

    def state_of(self, rank: int) -> str:
        """The state of one process, as `state`; or "left", see `ranks`."""
        info = self.info_of(rank)
        if (state := info.get("state", "unknown")) != "running":
            return str(state)
        if info.get("host", socket.gethostname()) == socket.gethostname():
            return "running" if _alive(info.get("pid"), info.get("born")) else "killed"
        flushed = _last_written(folder_of(self.path, rank), {})
        return "running" if time.time() - flushed < HEARTBEAT_SECONDS else "unknown"


def _named(ranks: list[int]) -> str:
    more = f" and {len(ranks) - NAMED_RANKS} more" if len(ranks) > NAMED_RANKS else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:NAMED_RANKS]))}{more}"


def often_in_words(seconds: float) -> str:
    """What a kill may have taken from a process that writes so often."""
    often = f"every {seconds:g} s: steps of that time" if seconds else "each step: one"
    return f"it writes {often} may be lost"


def wanted_of(columns: Names, sites: Names, steps: Numbers, ranks: Numbers) -> Wanted:
    """What a reader asks for; one thing is as good as several."""
    return Wanted(
        columns=(columns,) if isinstance(columns, str) else columns,
        sites=(sites,) if isinstance(sites, str) else sites,
        steps=(steps,) if isinstance(steps, int) else steps,
        ranks=(ranks,) if isinstance(ranks, int) else ranks,
    )


def _coded(rows: pa.Table) -> pd.DataFrame:
    """Dictionary columns as categories: one order for all pieces, and that of the texts."""
    # A block a column, and each column of `rows` goes as it has come: never all of them twice.
    frame: pd.DataFrame = rows.unify_dictionaries().to_pandas(split_blocks=True, self_destruct=True)
    for name in frame.columns[frame.dtypes == "category"]:
        column = frame[name].cat
        frame[name] = column.set_categories(sorted(column.categories))
    return frame


def _spread(column: pa.ChunkedArray) -> dict[str, NDArray[np.float64]]:
    """A column of (name, number) pairs as a column a name; what a row lacks is NaN."""
    spread: dict[str, NDArray[np.float64]] = {}
    start = 0
    for chunk in column.chunks:
        offsets = chunk.offsets.to_numpy()
        first, length = int(offsets[0]), int(offsets[-1] - offsets[0])
        names = chunk.keys.slice(first, length).dictionary_encode()
        numbers = chunk.items.slice(first, length).to_numpy(zero_copy_only=False)
        row = start + np.repeat(np.arange(len(chunk)), np.diff(offsets))
        codes = names.indices.to_numpy(zero_copy_only=False)
        for code, name in enumerate(names.dictionary.to_pylist()):
            values = spread.setdefault(name, np.full(len(column), np.nan))
            values[row[codes == code]] = numbers[codes == code]
        start += len(chunk)
    return spread


def hottest(rows: pd.DataFrame) -> pd.DataFrame:
    """Of tensor rows one a step and site, of the process whose amax is largest or not finite.

    Rows of all processes together (rank -1) are left out: they know of no channel.
    """
    if (rows["rank"] < 0).any():
        rows = rows[rows["rank"] >= 0]
    if not rows.duplicated(["step", "site"]).any():
        return rows
    ranked = rows.sort_values("cur_amax", ascending=False, kind="stable", na_position="first")
    return ranked.drop_duplicates(["step", "site"]).sort_index()


# --- processes --------------------------------------------------------------------------------


def _last_written(folder: Path, info: dict[str, Any]) -> float:
    """A flush leaves its time at the folder of segments, an end in the state."""
    with suppress(OSError):
        return (folder / "segments").stat().st_mtime
    updated = info.get("updated")
    return float(updated) if isinstance(updated, int | float) else math.nan


def folder_of(path: Path, rank: int) -> Path:
    """Where the process `rank` of the run at `path` writes."""
    return path / "ranks" / str(rank) if rank else path


def state_file(path: Path, rank: int) -> Path:
    """What tells of the process: run.json, or rank.json in its own folder."""
    return folder_of(path, rank) / ("rank.json" if rank else "run.json")


def this_process() -> dict[str, Any]:
    """What tells this process from all others."""
    pid = os.getpid()
    return {"pid": pid, "born": _born(pid), "host": socket.gethostname(), "updated": time.time()}


def _born(pid: int) -> int | None:
    """When a process started, in ticks since the machine did; None where nobody tells."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
        return int(status.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _alive(pid: Any, born: Any) -> bool:
    if type(pid) is not int or pid <= 0:  # True is an int
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return born is None or _born(pid) in (born, None)


@contextmanager
def claimed(path: Path, rank: int) -> Iterator[None]:
    """Nobody else goes on with this rank meanwhile.

    Raises RunError if another process writes it, or is about to.
    """
    with state_file(path, rank).open("rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{path}: is being resumed by another process") from None
        run = Run(path, {})
        pid = run.info_of(rank).get("pid")
        if run.state_of(rank) == "running" and pid != os.getpid():
            raise RunError(f"{path}: is being written by process {pid}")
        yield


# --- opening and finding ----------------------------------------------------------------------


class Excerpt(Run):
    """Some of a run's rows, read like a run's: what `arrow` gives is all there is."""

    def reduced(
        self,
        table: Table,
        reduce: Callable[[pa.Table], _Kept],
        columns: Names = None,
        *,
        sites: Names = None,
    ) -> list[_Kept]:
        return [reduce(self.arrow(table, columns, sites=sites, coded=True))]


def open_run(path: str | Path) -> Run:
    """Open a run directory for reading, also while it is being written.

    Raises RunError in one line if there is none, or its run.json is damaged or too new.
    """
    path = segments.path_of(path)
    if not state_file(path, 0).exists() and (below := next(find_runs(path), path)) != path:
        raise RunError(f"{path}: no run here but below, expected one of those, as {below}")
    run = Run(path, {})
    first = next(iter(run.folders()))  # not 0 if that process has not come yet, or never came
    return Run(path, _read_info(state_file(path, first)))


def _read_info(file: Path) -> dict[str, Any]:
    try:
        if not file.exists():
            raise RunError(f"{file.parent}: no run here, expected a directory with a {file.name}")
        if not file.is_file() or file.stat().st_size > LARGEST_INFO_BYTES:
            raise ValueError(f"expected a file of at most {LARGEST_INFO_BYTES >> 20} MiB")
        info = json.loads(file.read_text(encoding="utf-8"))
        if _depth(info) > DEEPEST_INFO:
            raise ValueError(f"nested deeper than {DEEPEST_INFO}")
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise RunError(f"{file}: damaged: {(str(error) or 'too large').splitlines()[0]}") from None
    version = info.get("schema_version") if isinstance(info, dict) else None
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        newer = type(version) is int and version > SCHEMA_VERSION
        told = f"schema_version: {repr(version)[:40]}, expected 1 to {SCHEMA_VERSION}"
        raise RunError(f"{file}: {told}{': a newer fp8lab wrote it' if newer else ''}")
    return dict(info)


def _depth(value: Any) -> int:
    inside = value.values() if isinstance(value, dict) else value
    return 1 + max(map(_depth, inside), default=0) if isinstance(value, dict | list) else 0


def find_runs(path: str | Path) -> Iterator[Path]:
    """Run directories at or below `path`, sorted; unreadable folders are passed over.

    A bisection's reruns were made to break, and are found only from its own folder on.
    """
    waiting = [Path(path)]
    while waiting:
        folder = waiting.pop()
        try:
            started = (folder / "run.json").is_file() or _is_joined(folder)
            ends = started or (folder != Path(path) and (folder / BISECTION).is_file())
            children = [] if ends else [c for c in sorted(folder.iterdir()) if c.is_dir()]
        except (OSError, ValueError):
            continue
        if started:
            yield folder
        waiting += [child for child in reversed(children) if not child.is_symlink()]


def _is_joined(path: Path) -> bool:
    """Whether ranks other than 0 have come."""
    return any(state_file(path, rank).is_file() for rank in Run(path, {}).folders() if rank)
