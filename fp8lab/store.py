"""The run directory, as it is written: create, append, survive a kill. Refuses to overwrite.

    run.json             what ran: versions, recipe, configuration, state
    segments/, *.parquet rows of the process with rank 0, see `segments`
    ranks/3/             the same of the process with rank 3: rank.json, segments/, *.parquet

Each process writes what is its own and waits for no other: they may start, end and die in any
order, and a reader (`runs`) puts their rows together. `flush` turns rows into Arrow (4 µs a row)
and hands them to a thread that writes a segment. What the disk refuses stays in memory, up to
`BACKLOG_BYTES`, and is tried again; beyond that the oldest rows go, and an event says how many.
What cannot be written in the end goes into a temporary folder that the error names.

Rejected: one file for all processes, which needs a lock that a killed one may hold; and writing in
the caller's thread, where Ctrl-C between a rename and the next line writes rows twice.
"""

from __future__ import annotations

import json
import operator
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute

from fp8lab import segments
from fp8lab.failure import TRACEBACK
from fp8lab.record import SCHEMA_VERSION, TABLES, Table
from fp8lab.runs import Run as Run
from fp8lab.runs import claimed, folder_of, state_file, this_process
from fp8lab.runs import find_runs as find_runs
from fp8lab.runs import open_run as open_run
from fp8lab.segments import RunError as RunError
from fp8lab.segments import Segment, told_by

BACKLOG_BYTES = 256 << 20
_OF_AN_END = ("error", "refused")  # what run.json says of one, and not of a run that goes on


class RunWriter:
    """Appends the rows of one process to a run directory. Use `create` or `resume`.

    A disk that is full, read-only or gone is an OSError of `flush`, `close` or `set_state`; the
    writer can be used on, and nothing that was flushed is lost.
    """

    def __init__(self, path: Path, info: dict[str, Any], rank: int) -> None:
        self.path = path
        self.info = info
        self.rank = rank
        self._folder = folder_of(path, rank)
        self._pending: dict[Table, list[Mapping[str, Any]]] = {table: [] for table in TABLES}
        self._backlog = _Backlog(rank)
        self._writing: tuple[Future[None], _Backlog] | None = None
        self._thread = ThreadPoolExecutor(1, "fp8lab-store")
        listed = segments.listed(self._folder)
        self._segments = [(one, segments.size_of(self._folder, one)) for one in listed]
        self._next_segment = listed[-1].last + 1 if listed else 0

    @classmethod
    def create(cls, path: str | Path, info: Mapping[str, Any], rank: int = 0) -> RunWriter:
        """Start a run or, with another `rank`, join one that starts; whoever comes first makes it.

        `info["job"]`, if it is the same for all processes of a training, tells them from what an
        earlier training left at `path`; without it, they must still run. Raises RunError if `path`
        is taken or cannot be written, TypeError if `info` is not JSON-able; then nothing was
        created.
        """
        path = Path(path)
        json.dumps(dict(info))
        try:
            _refuse_taken(path, info, rank)
            return cls._begin(path, dict(info), rank)
        except OSError as error:
            raise RunError(f"{path}: cannot be created: {told_by(error)}") from None

    @classmethod
    def _begin(cls, path: Path, info: dict[str, Any], rank: int) -> RunWriter:
        folder, existed = folder_of(path, rank), path.exists()
        try:
            folder.mkdir(parents=True, exist_ok=rank == 0)
            (folder / "segments").mkdir()  # of two that come at once, one fails here
        except FileExistsError:
            raise RunError(f"{folder}: exists already, expected a new run directory") from None
        writer = cls(path, info | {"schema_version": SCHEMA_VERSION}, rank)
        try:
            writer.set_state("running")
        except OSError:
            made = [folder / "segments", folder, *([folder.parent, path] if rank else [])]
            for place in made[: -1 if existed else None]:
                _remove_if_empty(place)
            raise
        return writer

    @classmethod
    def resume(
        cls,
        path: str | Path,
        step: int,
        info: Mapping[str, Any] | None = None,
        *,
        rank: int = 0,
        ranks: int = 1,
    ) -> RunWriter:
        """Go on with a run at `step`: the rows of this rank from that step on go, the rest stays.

        `ranks` is the number of processes from now on; rank 0 also cuts the rows of those beyond.
        What `info` holds replaces what run.json says, but for the time of creation. Raises RunError
        if `path` is no run, is damaged or cannot be written, or another process is writing it.
        """
        run = open_run(path)
        info = dict(info or {})
        try:
            for gone in [number for number in run.folders() if rank == 0 and number >= ranks > 0]:
                with claimed(run.path, gone):
                    segments.cut(folder_of(run.path, gone), step)
                    known = run.info_of(gone) | {"state": "left"}
                    _write_json(state_file(run.path, gone), known)
            if not state_file(run.path, rank).exists():
                _remove_unstarted(run.path, rank)
                return cls._begin(run.path, info, rank)
            with claimed(run.path, rank):
                known = {k: v for k, v in run.info_of(rank).items() if k not in _OF_AN_END}
                info = known | {key: value for key, value in info.items() if key != "created"}
                segments.cut(folder_of(run.path, rank), step)
                writer = cls(run.path, info | {"schema_version": SCHEMA_VERSION}, rank)
                writer.set_state("running")
                return writer
        except OSError as error:
            raise RunError(f"{path}: cannot be resumed: {told_by(error)}") from None

    def append(self, table: Table, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows; they are safe after `flush`.

        A column that a row does not name is null, but `rank`, which is this writer's. Raises
        ValueError if a row has no step, or one that is no integer.
        """
        rows = list(rows)
        for step in (row.get("step") for row in rows):
            if step is None:
                raise ValueError(
                    f"{self.path}: {table}: a row without a step, expected one in each"
                )
            if not _is_int64(step):
                raise ValueError(f"{self.path}: {table}: step {step!r:.60}, expected an integer")
        self._pending[table] += rows

    @property
    def pending(self) -> int:
        """Rows appended and not yet in a file."""
        waiting = self._backlog.rows + (self._writing[1].rows if self._writing is not None else 0)
        return waiting + sum(len(rows) for rows in self._pending.values())

    def flush(self, *, wait: bool = True) -> None:
        """Write what is pending; when this returns, the rows survive a kill.

        With `wait=False` it returns at once and the rows are written meanwhile; a flush that is
        under way then takes them on the next call. Raises OSError if the disk refuses them (without
        waiting: if it refused those before); they stay pending and are tried again.
        """
        tables = {t: self._as_arrow(t, rows) for t, rows in self._pending.items() if rows}
        self._backlog.add(tables)
        self._pending = {table: [] for table in TABLES}
        if not wait and self._writing is not None and not self._writing[0].done():
            return
        error = self._settled()
        if self._backlog.rows:
            batch, self._backlog = self._backlog, _Backlog(self.rank)
            self._writing = self._started(batch.contents()), batch
            if wait:
                error = self._settled()
        self._note(None if error is None else told_by(error))
        if error is not None:
            raise error

    def _note(self, refused: str | None) -> None:
        """Say beside the state why rows are missing, as long as they are: a reader sees no more
        than their end."""
        if refused != self.info.get("refused"):
            self.info["refused"] = refused
            with suppress(OSError):  # the same disk, maybe
                self.set_state(self.info["state"])

    def _started(self, rows: dict[Table, pa.Table]) -> Future[None]:
        try:
            return self._thread.submit(self._write_segment, rows)
        except RuntimeError:  # the interpreter is ending and starts nothing any more
            written: Future[None] = Future()
            try:
                self._write_segment(rows)
                written.set_result(None)
            except OSError as error:
                written.set_exception(error)
            return written

    def _as_arrow(self, table: Table, rows: list[Mapping[str, Any]]) -> pa.Table:
        made = pa.Table.from_pylist(rows, schema=TABLES[table])
        rank = pa.compute.fill_null(made["rank"], self.rank)
        return made.set_column(made.schema.get_field_index("rank"), "rank", rank)

    def _settled(self) -> OSError | None:
        """Wait for the write under way; what the disk refused is pending again."""
        if self._writing is None:
            return None
        future, batch = self._writing
        error = future.exception()
        self._writing = None
        if error is not None:
            batch.add_all(self._backlog)
            self._backlog = batch
        if error is not None and not isinstance(error, OSError):
            raise error
        return error

    def _write_segment(self, tables: Mapping[Table, pa.Table]) -> None:
        segment = Segment(self._next_segment, self._next_segment)
        segments.write(self._folder, segment, {table: [rows] for table, rows in tables.items()})
        self._next_segment += 1
        try:
            self._segments.append((segment, segments.size_of(self._folder, segment)))
            while count := segments.due(self._segments):
                merged = segments.merge(self._folder, [one for one, _ in self._segments[-count:]])
                self._segments[-count:] = [(merged, segments.size_of(self._folder, merged))]
        except (OSError, RunError):
            pass  # the rows are safe, in more files than they need; the next flush tries again

    def set_state(self, state: str, **more: Any) -> None:
        """Rewrite run.json with this state: running, finished, interrupted or failed."""
        self.info |= {"state": state, **this_process(), **more}
        _write_json(state_file(self.path, self.rank), self.info)

    def close(self, state: str = "finished", **more: Any) -> None:
        """Flush, compact to Parquet, and write the final state.

        Raises OSError where the disk refused, after all that was possible: rows that could not be
        written are in a temporary folder that the message names, uncompacted segments stay.
        """
        error: OSError | None = None
        if more:  # what ended the training, lest nobody knows if this takes too long
            with suppress(OSError):
                self.set_state("running", **more)
        try:
            self.flush()
            segments.compact(self._folder)
        except RunError as damaged:
            error = OSError(str(damaged))
        except OSError as refused:
            error = self._rescued(refused) if self.pending else refused
            if self.pending:
                self._note(f"{self.pending} rows, {told_by(refused)}")
        self._thread.shutdown()
        try:
            self.set_state(state, **more)
        except OSError as refused:
            error = error or refused
        if error is not None:
            raise error

    def _rescued(self, refused: OSError) -> OSError:
        segment = Segment(self._next_segment, self._next_segment)
        told = f"{self.path}: {self.pending} rows could not be written ({told_by(refused)})"
        try:
            place = Path(tempfile.mkdtemp(prefix="fp8lab-"))
            rows = {table: [rows] for table, rows in self._backlog.contents().items()}
            segments.write(place, segment, rows)
        except OSError as error:
            return OSError(f"{told} and are lost: {told_by(error)}")
        lies = place / "segments" / segment.name
        return OSError(f"{told}; they are in {lies}: move that to {self._folder / 'segments'}")


def _is_int64(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and -(2**63) <= operator.index(value) < 2**63
    except TypeError:
        return False


class _Backlog:
    """Rows that no file holds yet, as Arrow; beyond `BACKLOG_BYTES` the oldest are dropped."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._tables: dict[Table, pa.Table] = {}
        self._lost: list[tuple[int, int, int]] = []  # rows, first and last step

    @property
    def rows(self) -> int:
        return sum(rows.num_rows for rows in self._tables.values())

    def add(self, later: Mapping[Table, pa.Table]) -> None:
        for table, rows in later.items():
            joined = pa.concat_tables(
                [self._tables[table], rows] if table in self._tables else [rows]
            )
            self._tables[table] = (
                joined.combine_chunks() if joined["step"].num_chunks > 64 else joined
            )
        while sum(rows.nbytes for rows in self._tables.values()) > BACKLOG_BYTES:
            table = max(self._tables, key=lambda one: self._tables[one].nbytes)
            rows = self._tables[table].combine_chunks()
            count = -(-rows.num_rows // 4)
            ends = pa.compute.min_max(rows["step"].slice(0, count)).as_py()
            self._lost.append((count, ends["min"], ends["max"]))
            self._tables[table] = rows.slice(count)

    def add_all(self, later: _Backlog) -> None:
        self._lost += later._lost
        self.add(later._tables)

    def contents(self) -> dict[Table, pa.Table]:
        """All of it, with an event that tells what was dropped."""
        if not self._lost:
            return self._tables
        counts, firsts, lasts = zip(*self._lost, strict=True)
        detail = f"{sum(counts)} rows of steps {min(firsts)} to {max(lasts)}: "
        detail += f"nothing could be written and {BACKLOG_BYTES >> 20} MiB waited already"
        event = {"step": max(lasts), "rank": self._rank, "kind": "rows_dropped", "detail": detail}
        events = pa.Table.from_pylist([event], schema=TABLES["events"])
        return self._tables | {
            "events": pa.concat_tables([self._tables.get("events", events.slice(0, 0)), events])
        }


def _refuse_taken(path: Path, info: Mapping[str, Any], rank: int) -> None:
    """An empty folder is free; so is what other ranks of this training made, or one of which all
    that a training left is why it failed before it began."""
    expected = "expected a new run directory; watch(resume_at=STEP) goes on with one"
    taken = RunError(f"{path}: exists already, {expected}")
    if not path.is_dir():
        if path.exists():
            raise taken
        return
    names = {child.name for child in path.iterdir()} - {TRACEBACK}
    starting = {"ranks"} if rank == 0 else {"ranks", "segments", ".run.json"}
    # Asked by name: a listing taken while it is replaced may lack it.
    if not names <= starting and (rank == 0 or not (path / "run.json").exists()):
        raise taken
    run = Run(path, {})
    for number in run.folders():
        if state_file(path, number).exists():
            other = run.info_of(number)
            job = info.get("job")
            same = other.get("job") == job if job is not None else run.state_of(number) == "running"
            if not same:
                raise taken


def _remove_unstarted(path: Path, rank: int) -> None:
    """What a process leaves that died while it came. Rows, if there are any, stay."""
    folder = folder_of(path, rank)
    state_file(path, rank).with_name(f".{state_file(path, rank).name}").unlink(missing_ok=True)
    for place in (folder / "segments", folder):
        _remove_if_empty(place)


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        pass  # something is in it, or it is not there


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    temporary = file.with_name(f".{file.name}")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
