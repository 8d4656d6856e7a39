"""The run directory: create, append, survive a kill, load. Refuses to overwrite.

    run.json             what ran: versions, recipe, configuration, state
    segments/000007/     one flush: steps.arrow, tensors.arrow, channels.arrow, events.arrow
    steps.parquet …      the same rows in one file a table, once the run has ended

A flush is written into a hidden folder and appears by one rename, so a segment is there whole or
not at all, and a process killed at any moment leaves every flushed step readable. Closing
compacts segments to Parquet, again by rename; a reader that meets both takes the Parquet file.

Rejected: appending to one Arrow stream a table. A kill in the middle of a record batch leaves a
tail that must be repaired, and the four tables of one step may end at different steps.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet

from fp8lab.record import SCHEMA_VERSION, TABLES, Table


class RunError(Exception):
    """A run directory that is not one, is damaged, or is in the way; the message is one line."""


class RunWriter:
    """Appends rows to a run directory. Use `create` or `resume`."""

    def __init__(self, path: Path, info: dict[str, Any], next_segment: int) -> None:
        self.path = path
        self.info = info
        self._next_segment = next_segment
        self._pending: dict[Table, list[Mapping[str, Any]]] = {table: [] for table in TABLES}

    @classmethod
    def create(cls, path: str | Path, info: Mapping[str, Any]) -> RunWriter:
        """Start a run. Raises RunError if `path` exists already, TypeError if `info` is not
        JSON-able; then nothing was created."""
        path = Path(path)
        json.dumps(dict(info))
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise RunError(f"{path}: exists already, expected a new run directory") from None
        except OSError as error:
            raise RunError(f"{path}: cannot be created: {error.strerror}") from None
        (path / "segments").mkdir()
        writer = cls(path, {"schema_version": SCHEMA_VERSION, **info}, 0)
        writer.set_state("running")
        return writer

    @classmethod
    def resume(
        cls, path: str | Path, step: int, info: Mapping[str, Any] | None = None
    ) -> RunWriter:
        """Go on with a run at `step`: its rows from that step on are dropped, the rest kept.

        What `info` holds replaces what run.json says, but for the time of creation. Raises RunError
        if `path` is no run, or another process is writing it.
        """
        run = open_run(path)
        if run.state == "running" and run.info.get("pid") != os.getpid():
            raise RunError(f"{path}: is being written by process {run.info.get('pid')}")
        kept: dict[Table, pa.Table] = {}
        for table in TABLES:
            rows = run.arrow(table)
            kept[table] = rows.filter(pa.compute.less(rows["step"], step))
        folder = run.path / "segments"
        folder.mkdir(exist_ok=True)
        numbers = [int(segment.name) for segment in folder.iterdir() if segment.name.isdigit()]
        facts = {key: value for key, value in run.info.items() if key != "error"}
        facts |= {key: value for key, value in (info or {}).items() if key != "created"}
        writer = cls(run.path, facts, max(numbers, default=-1) + 1)
        writer._write_segment(kept, replaces_earlier=True)
        for number in numbers:
            shutil.rmtree(run.path / "segments" / f"{number:06d}")
        for table in TABLES:
            (run.path / f"{table}.parquet").unlink(missing_ok=True)
        writer.set_state("running")
        return writer

    def append(self, table: Table, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows; a column that a row does not name is null. They are safe after `flush`."""
        self._pending[table].extend(rows)

    @property
    def pending(self) -> int:
        """Rows appended since the last flush."""
        return sum(len(rows) for rows in self._pending.values())

    def flush(self) -> None:
        """Write what is pending; when this returns the rows survive a kill."""
        if not self.pending:
            return
        tables = {
            table: pa.Table.from_pylist([dict(row) for row in rows], schema=TABLES[table])
            for table, rows in self._pending.items()
        }
        self._write_segment(tables)
        for rows in self._pending.values():
            rows.clear()

    def _write_segment(
        self, tables: Mapping[Table, pa.Table], replaces_earlier: bool = False
    ) -> None:
        name = f"{self._next_segment:06d}"
        hidden = self.path / "segments" / f".{name}"
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir()
        for table, rows in tables.items():
            if rows.num_rows:
                with pa.ipc.new_file(str(hidden / f"{table}.arrow"), TABLES[table]) as file:
                    file.write_table(rows)
        if replaces_earlier:
            (hidden / "replaces-earlier").touch()
        hidden.rename(hidden.with_name(name))
        self._next_segment += 1

    def set_state(self, state: str, **more: Any) -> None:
        """Rewrite run.json with this state: running, finished, interrupted or failed."""
        self.info |= {"state": state, "pid": os.getpid(), "updated": time.time(), **more}
        temporary = self.path / ".run.json"
        temporary.write_text(json.dumps(self.info, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path / "run.json")

    def close(self, state: str = "finished", **more: Any) -> None:
        """Flush, compact to Parquet, and write the final state."""
        self.flush()
        run = Run(self.path, self.info)
        for table in TABLES:
            temporary = self.path / f".{table}.parquet"
            pa.parquet.write_table(run.arrow(table), temporary, compression="zstd")
            temporary.replace(self.path / f"{table}.parquet")
        shutil.rmtree(self.path / "segments")
        self.set_state(state, **more)


class Run:
    """A recorded run. Its tables come as pandas frames whose columns `record` describes."""

    def __init__(self, path: Path, info: dict[str, Any]) -> None:
        self.path = path
        self.info = info

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.state})"

    @property
    def state(self) -> str:
        """running, finished, interrupted, failed; or killed: its process is gone."""
        state = str(self.info.get("state", "unknown"))
        if state == "running" and not _alive(self.info.get("pid")):
            return "killed"
        return state

    @property
    def name(self) -> str:
        """The directory's own name."""
        return self.path.name

    def steps(self) -> pd.DataFrame:
        """A row a step; numbers given to `watch.step` are columns of their own."""
        frame = self._frame("steps")
        metrics = [dict(pairs) if pairs is not None else {} for pairs in frame.pop("metrics")]
        return frame.join(pd.DataFrame(metrics, index=frame.index))

    def tensors(self) -> pd.DataFrame:
        """A row per step, rank and site; a column per statistic."""
        return self._frame("tensors")

    def channels(self) -> pd.DataFrame:
        """A row per step, rank, site and channel, for the channels that matter."""
        return self._frame("channels")

    def events(self) -> pd.DataFrame:
        """What happened, in order."""
        return self._frame("events")

    def _frame(self, table: Table) -> pd.DataFrame:
        frame: pd.DataFrame = self.arrow(table).to_pandas()
        return frame.sort_values("step", kind="stable", ignore_index=True)

    def arrow(self, table: Table) -> pa.Table:
        """A table as recorded. Raises RunError if a file of it is damaged."""
        while True:
            files = self._files(table)
            try:
                parts = [_read(file, TABLES[table]) for file in files]
            except RunError:
                if all(file.exists() for file in files):
                    raise
            else:
                if all(file.exists() for file in files):
                    return pa.concat_tables([TABLES[table].empty_table(), *parts])
            # The run was closed or resumed meanwhile: its rows are in another file now.

    def _files(self, table: Table) -> list[Path]:
        # Segments are listed first: closing removes them after the compacted file has appeared.
        files = [segment / f"{table}.arrow" for segment in _segments(self.path)]
        files = [file for file in files if file.exists()]
        compacted = self.path / f"{table}.parquet"
        return [compacted] if compacted.exists() else files


def _read(file: Path, schema: pa.Schema) -> pa.Table:
    try:
        if file.suffix == ".parquet":
            rows = pa.parquet.read_table(file)
        else:
            with pa.ipc.open_file(pa.memory_map(str(file))) as reader:
                rows = reader.read_all()
        rows.validate(full=True)  # offsets of a damaged file point anywhere
        unknown = set(rows.column_names) - set(schema.names)
        if unknown:
            raise ValueError(f"columns {', '.join(sorted(unknown))}, expected those of {file.stem}")
        for column in schema:  # a column newer than the file was not measured then
            if column.name not in rows.column_names:
                rows = rows.append_column(column, pa.nulls(rows.num_rows, column.type))
        return rows.select(schema.names).cast(schema)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise RunError(f"{file}: damaged: {str(error).splitlines()[0]}") from None


def _segments(path: Path) -> list[Path]:
    try:
        segments = [s for s in (path / "segments").iterdir() if s.name.isdigit()]
    except FileNotFoundError:
        return []
    segments.sort(key=lambda segment: int(segment.name))
    for position in range(len(segments) - 1, -1, -1):
        # A resumed run starts with one segment that holds what was kept of all before it.
        if (segments[position] / "replaces-earlier").exists():
            return segments[position:]
    return segments


def _alive(pid: Any) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def open_run(path: str | Path) -> Run:
    """Open a run directory for reading, also while it is being written.

    Raises RunError in one line if there is none, or its run.json is damaged or too new.
    """
    path = Path(path)
    try:
        info = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{path}: no run here, expected a directory with a run.json") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunError(f"{path / 'run.json'}: damaged: {str(error).splitlines()[0]}") from None
    version = info.get("schema_version") if isinstance(info, dict) else None
    if version != SCHEMA_VERSION:
        raise RunError(
            f"{path / 'run.json'}: schema_version: {version!r}, expected {SCHEMA_VERSION}"
        )
    return Run(path, info)


def find_runs(path: str | Path) -> Iterator[Path]:
    """Run directories at or below `path`, sorted; unreadable folders are passed over."""
    path = Path(path)
    try:
        if (path / "run.json").is_file():
            yield path
            return
        children = [child for child in sorted(path.iterdir()) if child.is_dir()]
    except OSError:
        return
    for child in children:
        if not child.is_symlink():
            yield from find_runs(child)
