"""Rows in files: what one process has recorded, whole segment by whole segment.

    segments/000007/         one flush: steps.arrow, tensors.arrow, channels.arrow, events.arrow
    segments/000000-000006/  the rows of seven segments in one; it stands for all it covers
    steps.parquet …          the same rows in one file a table, once the run has ended

A segment is written into a hidden folder and appears by one rename, so it is there whole or not at
all. Merging, resuming and compacting go the same way: what replaces appears first, then what it
stands for is removed, and a reader takes the one that covers more. Whatever kills the process, no
row is lost and none is read twice. (Power loss is another matter: nothing is fsynced.)

Sixteen segments of one size become one of the next, up to 64 MiB, so that a week of flushes is a
hundred folders; each row is rewritten at most a few times. Reading goes piece by piece and holds
one record batch or row group at a time: first the columns that select (step, rank, site), then, if
any row is wanted, the columns asked for.

Rejected: one appended Arrow stream a table. A kill in the middle of a record batch leaves a tail
that must be repaired, and the four tables of one step may end at different steps. Rejected too:
pyarrow.dataset, which reads a file that a merge removes meanwhile as damage.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet

from fp8lab.record import FORMER_NAMES, TABLES, Table
from fp8lab.wanted import EVERYTHING, KEYS, Wanted, schema_of

MERGED_AT_ONCE = 16
LARGEST_MERGED_BYTES = 64 << 20
ROWS_AT_ONCE = 1 << 15  # about 30 MB of tensor rows: what merging and compacting hold in memory

_Kept = TypeVar("_Kept")
_NAME = re.compile("([0-9]{1,18})(?:-([0-9]{1,18}))?")
# What Arrow raises where the bytes of a file are not what they should be.
_DAMAGE = (
    OSError, pa.ArrowException, ValueError, LookupError, ArithmeticError, TypeError, MemoryError
)  # fmt: skip


class RunError(Exception):
    """A run directory that is not one, is damaged, or is in the way; the message is one line."""


def path_of(run: Any) -> Path:
    """Raises TypeError for what is no path, as several are where one run is asked for."""
    if not isinstance(run, str | os.PathLike):
        raise TypeError(f"run: {run!r:.80}, expected the path of one run")
    return Path(run)


def told_by(error: OSError) -> str:
    """Why the disk refused; Arrow's own text is longer."""
    return str(error) if error.errno is None else os.strerror(error.errno)


class Segment(NamedTuple):
    """The flushes `first` to `last`, both included, in one folder."""

    first: int
    last: int

    @property
    def name(self) -> str:
        """The folder's own name."""
        first, last = f"{self.first:06d}", f"{self.last:06d}"
        return first if first == last else f"{first}-{last}"


# --- reading ----------------------------------------------------------------------------------


def listed(folder: Path) -> list[Segment]:
    """The segments in force, in order: what another one covers is left out."""
    names = _settled_names(folder / "segments")
    found = []
    for match in map(_NAME.fullmatch, names):
        if match is not None:
            found.append(Segment(int(match[1]), int(match[2] or match[1])))
    in_force: list[Segment] = []
    for segment in sorted(found, key=lambda one: (one.first, -one.last)):
        if in_force and segment.last <= in_force[-1].last:
            continue
        # Version 1 marked the segment that a resumed run starts with instead of naming its range.
        if (folder / "segments" / segment.name / "replaces-earlier").exists():
            in_force.clear()
        in_force.append(segment)
    return in_force


def _settled_names(folder: Path) -> list[str]:
    """A listing that two readings agree on: one taken during a merge may lack both versions."""
    before = None
    try:
        while (names := sorted(os.listdir(folder))) != before:  # noqa: PTH208 - names, not paths
            before = names
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise RunError(f"{folder}: cannot be read: {told_by(error)}") from None
    return names


def files_of(folder: Path, table: Table) -> list[Path]:
    """The files that hold a table's rows, in order."""
    # Segments are listed first: closing removes them after the compacted file has appeared.
    files = [folder / "segments" / one.name / f"{table}.arrow" for one in listed(folder)]
    files = [file for file in files if file.exists()]
    compacted = folder / f"{table}.parquet"
    return [compacted] if compacted.exists() else files


def read(folder: Path, table: Table, wanted: Wanted = EVERYTHING) -> list[pa.Table]:
    """The rows as recorded, in pieces. Raises RunError if a file is damaged."""
    return reduced(folder, table, lambda piece: piece, wanted)


def reduced(
    folder: Path, table: Table, reduce: Callable[[pa.Table], _Kept], wanted: Wanted = EVERYTHING
) -> list[_Kept]:
    """What `reduce` makes of each piece; the piece itself is gone before the next one is read.

    Raises RunError if a file is damaged. Where a run is merged meanwhile all begins anew.
    """
    while True:
        segments = [folder / "segments" / one.name for one in listed(folder)]
        files = files_of(folder, table)
        try:
            kept = [reduce(piece) for file in files for piece in _pieces(file, table, wanted)]
        except RunError:
            if all(file.exists() for file in files):
                raise
        else:
            # The segments too: a file that went before it was looked for is not among the files.
            is_compacted = any(file.suffix == ".parquet" for file in files)
            places = files if is_compacted else segments
            if all(place.exists() for place in places):
                return kept
            for place in places:
                if place.is_symlink() and not place.exists():
                    raise RunError(f"{place}: a link to nothing")
        # The run was merged, closed or resumed meanwhile: its rows are in another file now.


def _pieces(file: Path, table: Table, wanted: Wanted) -> Iterator[pa.Table]:
    """What is wanted of one file, a batch or row group at a time."""
    schema = TABLES[table]
    names, keys = wanted.names(schema), wanted.keys()
    try:
        if not file.is_file():  # a pipe would never end
            raise ValueError("not a file")
        kind = _ParquetFile if file.suffix == ".parquet" else _ArrowFile
        with kind(file, table) as opened:
            for chunk in range(opened.chunks):
                mask = None
                for key in keys:  # one by one: of most chunks the steps say that nothing is wanted
                    column = _conformed(opened.read(chunk, [key]), table, [key], True)[key]
                    holds = wanted.mask(key, column)
                    mask = holds if mask is None else pa.compute.and_(mask, holds)
                    if not pa.compute.any(mask).as_py():
                        break
                else:
                    rows = _conformed(opened.read(chunk, names), table, names, wanted.coded)
                    yield rows if mask is None else rows.filter(mask)
    except _DAMAGE as error:
        reason = str(error).strip() or type(error).__name__
        raise RunError(f"{file}: damaged: {reason.splitlines()[0]}") from None


def _conformed(rows: pa.Table, table: Table, names: list[str], coded: bool) -> pa.Table:
    """The columns `names` as the schema has them; one newer than the file was not measured."""
    rows.validate(full=True)  # offsets of a damaged file point anywhere
    schema = schema_of(table, coded)
    for name in names:
        if name not in rows.column_names:
            rows = rows.append_column(name, pa.nulls(rows.num_rows, schema.field(name).type))
        elif pa.types.is_dictionary(schema.field(name).type):
            if not pa.types.is_dictionary((column := rows[name]).type):
                codes = column.cast(pa.string()).dictionary_encode()
                rows = rows.set_column(rows.column_names.index(name), name, codes)
    fields = [schema.field(name) for name in names]
    rows = rows.select(names).cast(pa.schema(fields, metadata=schema.metadata))
    for name in ("step", "rank"):
        if name in names and rows[name].null_count:
            raise ValueError(f"{name}: missing in {rows[name].null_count} rows")
    return rows


class _ArrowFile:
    """A segment's file of one table, a record batch at a time; columns go by today's names."""

    def __init__(self, file: Path, table: Table) -> None:
        self._source = _opened(file, "rb")  # no memory map: a file cut meanwhile is a SIGBUS
        self._reader = pa.ipc.open_file(self._source)
        self._stored = _stored_names(self._reader.schema.names, table)
        self.chunks = self._reader.num_record_batches

    def __enter__(self) -> _ArrowFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._source.close()

    def read(self, chunk: int, names: Iterable[str]) -> pa.Table:
        """Those of the columns that the file has."""
        stored = list(self._stored)
        fields = [stored.index(name) for name in names if name in stored] or [0]
        reader = self._reader
        if len(fields) < len(stored):
            options = pa.ipc.IpcReadOptions(included_fields=fields)
            reader = pa.ipc.open_file(self._source, options=options)
        batch = reader.get_batch(chunk)
        kept = [name for position, name in enumerate(stored) if position in fields]
        return pa.Table.from_batches([batch]).rename_columns(kept)


class _ParquetFile:
    """A compacted table, a row group at a time; columns go by today's names.

    The statistics of row groups are left alone: where they are damaged pyarrow 26 does not raise
    an error but ends the process.
    """

    def __init__(self, file: Path, table: Table) -> None:
        self._source = _opened(file, "rb")
        self._file = pa.parquet.ParquetFile(self._source)
        names = self._file.schema_arrow.names
        self._stored = _stored_names(names, table)
        texts = [name for name in names if self._file.schema_arrow.field(name).type == pa.string()]
        self._file = pa.parquet.ParquetFile(self._source, read_dictionary=texts)
        self.chunks = self._file.num_row_groups

    def __enter__(self) -> _ParquetFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._source.close()

    def read(self, chunk: int, names: Iterable[str]) -> pa.Table:
        """Those of the columns that the file has."""
        called = {self._stored[name]: name for name in names if name in self._stored}
        rows = self._file.read_row_group(chunk, columns=list(called))
        return rows.rename_columns([called[name] for name in rows.column_names])


def _stored_names(names: list[str], table: Table) -> dict[str, str]:
    """Today's name of each column -> its name in the file, in the file's order."""
    former = FORMER_NAMES[table]
    stored = {former.get(name, name): name for name in names}
    unknown = set(stored) - set(TABLES[table].names)
    if unknown or len(stored) < len(names) or not names:
        listing = ", ".join(sorted(unknown) or sorted(names))
        raise ValueError(f"columns {listing or 'none'}, expected those of {table}")
    return stored


# --- writing ----------------------------------------------------------------------------------


def write(folder: Path, segment: Segment, tables: Mapping[Table, Iterable[pa.Table]]) -> None:
    """Write a segment; when this returns it survives a kill of the process.

    `tables` are pieces, of which one at a time is held. Raises OSError if the disk refuses; then
    no trace is left.
    """
    place = folder / "segments"
    place.mkdir(exist_ok=True)
    hidden = place / f".{segment.name}"
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        hidden.mkdir()
        for table, pieces in tables.items():
            _write_arrow(hidden / f"{table}.arrow", TABLES[table], pieces)
        hidden.rename(place / segment.name)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise


def _write_arrow(file: Path, schema: pa.Schema, pieces: Iterable[pa.Table]) -> None:
    # What the columns mean is in the Parquet file: here it would be most of a small file.
    bare = pa.schema([pa.field(c.name, c.type) for c in schema], metadata=schema.metadata)
    options = pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False)
    pieces = _regrouped(pieces)
    if (piece := next(pieces, None)) is None:
        return
    with _opened(file, "wb") as sink, pa.ipc.new_file(sink, bare, options=options) as writer:
        while piece is not None:
            writer.write_table(piece.cast(bare))
            piece = next(pieces, None)


def _opened(file: Path, mode: str) -> pa.OSFile:
    return pa.OSFile(os.fsencode(file), mode)  # a name need not be UTF-8, as Arrow has it


def _regrouped(pieces: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows, `ROWS_AT_ONCE` at a time."""
    held: list[pa.Table] = []
    rows = 0
    for piece in pieces:
        while rows + piece.num_rows >= ROWS_AT_ONCE:
            room = ROWS_AT_ONCE - rows
            yield pa.concat_tables([*held, piece.slice(0, room)]).combine_chunks()
            held, rows, piece = [], 0, piece.slice(room)
        if piece.num_rows:
            held.append(piece)
            rows += piece.num_rows
    if held:
        yield pa.concat_tables(held).combine_chunks()


def merge(folder: Path, segments: list[Segment]) -> Segment:
    """Put one segment in the place of neighbours.

    Raises RunError where a file is damaged, OSError if the disk refuses; then all is as it was.
    """
    merged = Segment(segments[0].first, segments[-1].last)
    places = [folder / "segments" / one.name for one in segments]
    tables: dict[Table, Iterable[pa.Table]] = {}
    for table in TABLES:
        files = [place / f"{table}.arrow" for place in places]
        tables[table] = _all_pieces([file for file in files if file.exists()], table)
    write(folder, merged, tables)
    tidy(folder)
    return merged


def cut(folder: Path, step: int) -> Segment:
    """Drop the rows from `step` on; one segment with the others takes the place of all files.

    Raises as `merge`.
    """
    before = Wanted(steps=range(-(2**63), step))
    kept = Segment(0, max((one.last + 1 for one in listed(folder)), default=0))
    write(folder, kept, {t: _all_pieces(files_of(folder, t), t, before) for t in TABLES})
    tidy(folder)
    for table in TABLES:
        (folder / f"{table}.parquet").unlink(missing_ok=True)
    return kept


def _all_pieces(
    files: Iterable[Path], table: Table, wanted: Wanted = EVERYTHING
) -> Iterator[pa.Table]:
    return (piece for file in files for piece in _pieces(file, table, wanted))


def tidy(folder: Path) -> None:
    """Remove what segments in force cover, and what a killed process left half written."""
    in_force = {one.name for one in listed(folder)}
    # In order: a reader that missed one of them finds that the first it met are gone.
    for path in sorted((folder / "segments").iterdir()):
        if path.name not in in_force and (path.name[0] == "." or _NAME.fullmatch(path.name)):
            shutil.rmtree(path, ignore_errors=True)


def due(segments: list[tuple[Segment, int]]) -> int:
    """How many of the last segments should become one. `segments` come with their bytes.

    Sixteen neighbours of the same level, where a level is how often their rows were merged.
    """
    tail = segments[-MERGED_AT_ONCE:]
    levels = {(segment.last - segment.first + 1).bit_length() // 4 for segment, _ in tail}
    if len(tail) < MERGED_AT_ONCE or len(levels) > 1:
        return 0
    return MERGED_AT_ONCE if sum(size for _, size in tail) <= LARGEST_MERGED_BYTES else 0


def size_of(folder: Path, segment: Segment) -> int:
    """Bytes of a segment's files."""
    return sum(file.stat().st_size for file in (folder / "segments" / segment.name).iterdir())


def compact(folder: Path) -> None:
    """Put one Parquet file a table in the place of all segments.

    Raises OSError if the disk refuses, RunError where a file is damaged; then the segments of the
    tables not done yet are still there, and nothing is lost.
    """
    for table in TABLES:
        schema = TABLES[table]
        temporary = folder / f".{table}.parquet"
        pieces = _all_pieces(files_of(folder, table), table)
        try:
            with (
                _opened(temporary, "wb") as sink,
                pa.parquet.ParquetWriter(sink, schema, **_encodings(schema)) as writer,
            ):
                for piece in _regrouped(pieces):
                    writer.write_table(piece, row_group_size=ROWS_AT_ONCE)
            temporary.replace(folder / f"{table}.parquet")
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    shutil.rmtree(folder / "segments", ignore_errors=True)  # nobody reads it any more


def _encodings(schema: pa.Schema) -> dict[str, Any]:
    """How columns are packed: a quarter smaller and twice as fast as what Parquet does unasked."""
    encodings = {}
    for field in schema:
        if field.type == pa.float64():
            encodings[field.name] = "BYTE_STREAM_SPLIT"
        elif field.type == pa.list_(pa.int64()):
            encodings[f"{field.name}.list.element"] = "DELTA_BINARY_PACKED"
    return {
        "compression": "zstd",
        "use_dictionary": [field.name for field in schema if field.type == pa.string()],
        "column_encoding": encodings,
        "write_statistics": [key for key in KEYS if key in schema.names],
    }
