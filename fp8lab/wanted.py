"""What is wanted of a table: which rows, which columns, and how texts come.

A choice is held against the columns that select (step, rank, site), so that a reader decodes the
others only where a row is left. Rejected: pyarrow's expressions, which know no patterns of names.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

import pyarrow as pa
import pyarrow.compute

from fp8lab.record import TABLES, Table

KEYS = ("step", "rank", "site")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which rows and columns to read; None is all of them.

    `sites` are names or patterns (`*:product`), `steps` a range or numbers. The columns that tell
    rows apart (step, rank, site, channel) are always read. With `coded` a text column comes as
    codes (int32) and the few different texts, not as a text a row.
    """

    columns: Collection[str] | None = None
    sites: Collection[str] | None = None
    steps: Collection[int] | None = None
    ranks: Collection[int] | None = None
    coded: bool = False

    def names(self, schema: pa.Schema) -> list[str]:
        """The columns to read, in the schema's order. Raises ValueError for one that is none."""
        if self.sites is not None and "site" not in schema.names:
            raise ValueError("sites: this table has none, expected no choice of sites")
        if self.columns is None:
            return list(schema.names)
        for name in self.columns:
            if name not in schema.names:
                raise ValueError(f"columns: {name!r}, expected one of {', '.join(schema.names)}")
        wanted = {*self.columns, *KEYS, "channel"}
        return [name for name in schema.names if name in wanted]

    def keys(self) -> list[str]:
        """The columns that decide which rows are wanted."""
        chosen = (self.steps, self.ranks, self.sites)
        return [key for key, choice in zip(KEYS, chosen, strict=True) if choice is not None]

    def mask(self, key: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """True where that one of the `keys` leaves a row in."""
        if key == "rank":
            return _is_in(column, self.ranks or ())
        if key == "site":
            return _matches(column, self.sites or ())
        steps = self.steps or ()
        if isinstance(steps, range) and abs(steps.step) == 1:
            ends = steps[0], steps[-1]
            first, last = max(min(ends), -(2**63)), min(max(ends), 2**63 - 1)  # as int64 holds them
            above = pa.compute.greater_equal(column, first)
            return pa.compute.and_(above, pa.compute.less_equal(column, last))
        return _is_in(column, steps)


def _is_in(column: pa.ChunkedArray, values: Collection[int]) -> pa.ChunkedArray:
    return pa.compute.is_in(column, value_set=pa.array(list(values), column.type))


def _matches(column: pa.ChunkedArray, patterns: Collection[str]) -> pa.ChunkedArray:
    """A pattern is held against each distinct name, not against each row."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    chunks = []
    for chunk in column.chunks:
        wanted = _matching(tuple(chunk.dictionary.to_pylist()), tuple(patterns))
        chunks.append(pa.compute.take(wanted, chunk.indices))
    return pa.chunked_array(chunks, pa.bool_())


@lru_cache(maxsize=64)  # one row group after the other has the same names
def _matching(names: tuple[str | None, ...], patterns: tuple[str, ...]) -> pa.Array:
    return pa.array(
        [
            name is not None and any(fnmatchcase(name, pattern) for pattern in patterns)
            for name in names
        ],
        pa.bool_(),
    )


EVERYTHING = Wanted()


def schema_of(table: Table, coded: bool) -> pa.Schema:
    """A table's schema, as `Wanted.coded` asks for it."""
    schema, code = TABLES[table], pa.dictionary(pa.int32(), pa.string())
    if not coded:
        return schema
    fields = [f.with_type(code) if f.type == pa.string() else f for f in schema]
    return pa.schema(fields, metadata=schema.metadata)
