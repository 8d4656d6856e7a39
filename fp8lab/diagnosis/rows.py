"""What rules read: the tables of a run, by the same methods, whether on disk or as they come.

A rule names the columns and sites that it needs and nothing else is loaded; what several rules ask
for alike is loaded once, and what several derive from it is derived `once`. `guard` holds the last
rows of a run that goes on, as frames.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import wraps
from glob import escape
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.compute

from fp8lab.record import Table
from fp8lab.runs import Run

# Reading more rows once more takes a tenth of a second a million; keeping them, 50 MB a million.
KEPT_ROWS = 1 << 18

Names = str | Collection[str] | None
_Derived = TypeVar("_Derived")


class Rows(Protocol):
    """The part of `runs.Run` that rules use; its methods and columns mean the same."""

    path: Path
    info: dict[str, Any]

    def steps(self, columns: Names = None) -> pd.DataFrame: ...

    def tensors(self, columns: Names = None, *, sites: Names = None) -> pd.DataFrame: ...

    def channels(self, columns: Names = None, *, sites: Names = None) -> pd.DataFrame: ...

    def events(self) -> pd.DataFrame: ...


class Loaded:
    """A run of which each part is loaded once, unless it is large: what the rules ask for together
    would be most of a run. Frames are shared: rules leave them as they are.

    Text columns are categories, as of `Run.coded`.
    """

    def __init__(self, run: Run) -> None:
        self.path, self.info = run.path, run.info
        self._run = run
        self._frames: dict[Any, pd.DataFrame] = {}
        self.derived: dict[Callable[..., Any], Any] = {}  # by the function that derives it

    def steps(self, columns: Names = None) -> pd.DataFrame:
        return self._once("steps", columns)

    def tensors(self, columns: Names = None, *, sites: Names = None) -> pd.DataFrame:
        return self._once("tensors", columns, sites)

    def channels(self, columns: Names = None, *, sites: Names = None) -> pd.DataFrame:
        return self._once("channels", columns, sites)

    def events(self) -> pd.DataFrame:
        return self._once("events", None)

    def picked_channels(
        self, columns: Collection[str], sites: tuple[str, ...], channels: Collection[int]
    ) -> pd.DataFrame:
        """Channel rows of any of these sites and any of these channels."""
        wanted = pa.array(list(channels), pa.int32())

        def pick(piece: pa.Table) -> pa.Table:
            return piece.filter(pa.compute.is_in(piece["channel"], value_set=wanted))

        pieces = self._run.reduced("channels", pick, columns, sites=sites)
        if not pieces:
            return self.channels(columns, sites=sites)
        rows: pd.DataFrame = pa.concat_tables(pieces).unify_dictionaries().to_pandas()
        return rows.sort_values("step", kind="stable", ignore_index=True)

    def _once(self, table: Table, columns: Names, sites: Names = None) -> pd.DataFrame:
        key = table, _as_tuple(columns), _as_tuple(sites)
        found = self._frames.get(key)
        if found is None:
            found = self._run.coded(table, columns, sites=sites)
            if len(found) <= KEPT_ROWS:
                self._frames[key] = found
        return found


def of_channels(
    run: Rows, columns: Collection[str], places: Collection[tuple[str, int]]
) -> pd.DataFrame:
    """Channel rows of these sites and channels, with `columns`, in order of their steps; the table,
    the longest of a run, is read once and only what is asked for is held."""
    sites = tuple({escape(site): None for site, _ in places})
    if isinstance(run, Loaded):
        rows = run.picked_channels(columns, sites, {channel for _, channel in places})
    else:
        rows = run.channels(columns, sites=sites)
    wanted = pd.MultiIndex.from_tuples(places, names=["site", "channel"])
    keys = pd.MultiIndex.from_arrays([rows["site"].astype(object), rows["channel"]])
    return rows[keys.isin(wanted)]


def once(derive: Callable[[Rows], _Derived]) -> Callable[[Rows], _Derived]:
    """`derive`, whose answer on a `Loaded` run is kept; on a run that may still grow, it is not."""

    @wraps(derive)
    def kept(run: Rows) -> _Derived:
        if not isinstance(run, Loaded):
            return derive(run)
        if derive not in run.derived:
            run.derived[derive] = derive(run)
        found: _Derived = run.derived[derive]
        return found

    return kept


def facts_of(info: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """A part of run.json that says something of each of several layers; what is not of that form,
    for a run.json may hold anything, is left out."""
    part = info.get(key)
    if not isinstance(part, dict):
        return {}
    return {str(name): facts for name, facts in part.items() if isinstance(facts, dict)}


def _as_tuple(names: Names) -> tuple[str, ...] | None:
    return names if names is None else ((names,) if isinstance(names, str) else tuple(names))
