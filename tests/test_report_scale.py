"""A page of a long run: what is read of it, how often, and how much of it is in memory at once.

Nothing here is timed. Reads are counted in a process of its own, by the files' own reader: each
cell (a column of a row) is read a few times at most, however many there are; and memory is that
process's peak. The runs are those of `bench_report`, which also has the seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from bench_report import CHANNELS, record

from fp8lab.diagnosis.rows import Loaded, of_channels
from fp8lab.record import TABLES, Table
from fp8lab.report import longest
from fp8lab.report.story import Seen, load
from fp8lab.runs import Run, hottest
from fp8lab.store import open_run

ROOT = Path(__file__).resolve().parents[1]
COUNTED = """
import collections, json, os, sys
from pathlib import Path
from fp8lab import segments
from fp8lab.record import TABLES
from fp8lab.report import write_report

def peak():
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024

cells, whole = collections.Counter(), collections.Counter()
init, read = segments._ParquetFile.__init__, segments._ParquetFile.read

def opened(self, file, table):
    init(self, file, table)
    self.table = table

def counted(self, chunk, names):
    rows = read(self, chunk, names)
    cells[self.table] += rows.num_rows * len(names)
    whole[self.table] += len(names) == len(TABLES[self.table])
    chunks[self.table] = self.chunks
    return rows

chunks = {}
segments._ParquetFile.__init__, segments._ParquetFile.read = opened, counted
page = write_report([sys.argv[1]], sys.argv[2])
told = {table: [cells[table], whole[table], chunks[table]] for table in chunks}
print(json.dumps(told | {"MiB": peak(), "bytes": page.stat().st_size}))
"""


def counted(run: Path) -> dict[str, Any]:
    """By table: cells read, pieces read with all columns, pieces; peak MiB; bytes of the page."""
    done = subprocess.run(
        [sys.executable, "-c", COUNTED, str(run), str(run.with_suffix(".html"))],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 layers x 700 steps, of which a page does not show all."""
    path = tmp_path_factory.mktemp("scale") / "run"
    assert record(path, 8, 700) == 8 * 700 * 6
    return path


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scale") / "half"
    record(path, 8, 350)
    return path


# Of a table's cells, how often a page reads each on average: measured 4.4 and 2.4.
READ: dict[Table, float] = {"tensors": 5.0, "channels": 3.0}


@pytest.mark.long
def test_what_is_read_is_a_few_times_what_was_recorded(run: Path) -> None:
    told = counted(run)
    for table, times in READ.items():
        cells, in_full, pieces = told[table]
        assert cells <= times * len(TABLES[table]) * open_run(run).arrow(table, "step").num_rows
        assert in_full <= 2 * pieces  # the check for damage, and the rows that are shown
    assert told["MiB"] < 450  # measured 341, of which 320 for half as many rows
    assert told["bytes"] < 5e6  # measured 3.9


@pytest.mark.slow
def test_80_layers_and_10_000_steps(tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert record(path, 80, 10_000) == 4_800_000
    told = counted(path)
    for table, times in READ.items():
        rows = 4_800_000 if table == "tensors" else 80 * 10_000 * CHANNELS
        assert told[table][0] <= times * len(TABLES[table]) * rows
    assert told["MiB"] < 1536  # measured 1064
    assert told["bytes"] < 15e6  # measured 11.0


def test_of_a_long_run_the_extremes_are_shown(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longest, "STRETCHES", 20)
    opened = open_run(run)
    seen = Seen("run", opened)
    recorded = hottest(opened.tensors(sites="*:product"))
    shown = seen.products
    pd.testing.assert_frame_equal(
        shown.drop(columns="histogram"), recorded[shown.columns].drop(columns="histogram")
    )
    kept = shown[shown["histogram"].notna()]
    assert len(kept) <= 8 * (3 * 20 + 2)
    for site, rows in recorded.groupby("site"):
        steps = set(kept.loc[kept["site"] == site, "step"])
        assert {0, 699} <= steps
        for name in longest.PEAKS:
            assert int(rows.loc[rows[name].idxmax(), "step"]) in steps
    for position in kept.index[::50]:
        assert list(kept["histogram"][position]) == list(recorded["histogram"][position])
    channels = opened.channels().set_index(["step", "site"])
    places = pd.MultiIndex.from_arrays(
        [kept["step"], kept["site"].str.removesuffix(":product")], names=["step", "site"]
    )
    wanted = channels[channels.index.isin(places)].reset_index()[list(seen.channels.columns)]
    shown = seen.channels.merge(wanted[["step", "site", "channel"]])
    pd.testing.assert_frame_equal(shown, wanted)
    assert len(seen.channels) <= len(wanted) + 2 * 28  # the ends of the hot channel


def test_a_shorter_run_is_shown_whole(half: Path) -> None:
    opened = open_run(half)
    seen = Seen("run", opened)
    recorded = hottest(opened.tensors(sites="*:product"))
    assert seen.products["histogram"].map(list).tolist() == recorded["histogram"].map(list).tolist()
    pd.testing.assert_frame_equal(seen.channels, opened.channels())


def test_of_each_stretch_the_worst_is_kept(half: Path) -> None:
    rows = open_run(half).tensors()
    found = longest.worst(
        open_run(half), {"staleness": False, "sqnr_db": True, "gemm_error": False}, 7
    )
    assert set(found) == {"staleness", "sqnr_db"}
    stretches = np.array_split(np.arange(350), 7)
    for name, pick in (("staleness", "max"), ("sqnr_db", "min")):
        steps, by_site = found[name]
        assert steps.tolist() == [stretch[0] for stretch in stretches]
        assert set(by_site) == set(rows.dropna(subset=name)["site"])
        for site, values in by_site.items():
            mine = rows[rows["site"] == site].set_index("step")[name]
            assert values.tolist() == [mine.loc[stretch].agg(pick) for stretch in stretches]


def test_columns_come_alone(run: Path) -> None:
    rows = Seen("run", open_run(run)).tensor_columns(["staleness"], sites="*:product")
    assert set(rows) == {"step", "rank", "site", "cur_amax", "staleness"}
    recorded = hottest(open_run(run).tensors(sites="*:product"))
    assert rows["site"].astype(str).tolist() == recorded["site"].tolist()
    np.testing.assert_array_equal(rows["staleness"], recorded["staleness"])


def test_channels_are_picked_from_the_files(half: Path) -> None:
    rows = open_run(half).channels(("channel", "alignment"))
    places = [("layers.0.mlp", 0), ("layers.3.mlp", 34), ("layers.3.mlp", 35), ("elsewhere", 0)]
    picked = of_channels(Loaded(open_run(half)), ("alignment",), places)
    wanted = rows[[place in places for place in zip(rows["site"], rows["channel"], strict=True)]]
    assert set(wanted["channel"]) == {0, 34}
    picked = picked.astype({"site": wanted["site"].dtype})
    pd.testing.assert_frame_equal(picked.reset_index(drop=True), wanted.reset_index(drop=True))
    assert of_channels(Loaded(open_run(half)), ("alignment",), places[-1:]).empty


def test_coded_rows_are_the_rows(half: Path) -> None:
    opened = open_run(half)
    coded, plain = opened.coded("tensors", sites="*:gate"), opened.tensors(sites="*:gate")
    for name in ("site", "recipe", "format", "seen"):
        assert coded[name].dtype == "category"
        assert list(coded[name].cat.categories) == sorted(coded[name].cat.categories)
        coded[name] = coded[name].astype(plain[name].dtype)
    pd.testing.assert_frame_equal(coded, plain)


@pytest.mark.parametrize("table", ["tensors", "channels"])
def test_damage_in_a_column_that_no_rule_reads_is_told(half: Path, table: str) -> None:
    file = half / f"{table}.parquet"
    sound = file.read_bytes()
    damaged = bytearray(sound)
    # All but the head and the footer, a byte in every page.
    for place in range(len(damaged) // 2, len(damaged) * 3 // 4, 512):
        damaged[place] ^= 0xFF
    file.write_bytes(damaged)
    try:
        story = load([half])
    finally:
        file.write_bytes(sound)
    assert not story.runs
    assert [one.reason.partition(":")[0] for one in story.unread] == [file.name]


def test_a_check_keeps_nothing(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    reduced = Run.reduced
    monkeypatch.setattr(
        Run, "reduced", lambda run, *how, **more: kept.extend(reduced(run, *how, **more)) or kept
    )
    open_run(half).check()
    assert kept and all(type(one) is int for one in kept)
