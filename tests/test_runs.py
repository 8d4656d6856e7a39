"""Reading runs: a part is what pandas picks from the whole, old versions open, states are honest.

The oracle for every selection is the whole frame, filtered by pandas with the same words.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from test_store import one_line, only, write, written

from fp8lab import record, runs, segments
from fp8lab.record import TABLES
from fp8lab.runs import Run, find_runs, open_run
from fp8lab.segments import RunError
from fp8lab.store import RunWriter

SITES = ["layers.0.mlp:product", "layers.0.mlp:gate", "layers.10.mlp:product", "lm[0]:product"]
FAR = 2**62


def recorded(path: Path, *, closed: bool, flush_every: int = 7) -> Run:
    writer = RunWriter.create(path, {})
    draw = np.random.default_rng(0)
    for step in [*range(40), FAR]:
        for rank in (0, 1, 2):
            writer.append(
                "tensors",
                [
                    {"step": step, "rank": rank, "site": site, "cur_amax": float(draw.normal())}
                    | {"histogram": [step % 5] * (step % 3)}
                    | (
                        {"statistics": [("overflows%", float(step)), ("l0", 1.0)]}
                        if step % 2
                        else {}
                    )
                    for site in SITES
                ],
            )
            writer.append("channels", [{"step": step, "rank": rank, "site": "a", "channel": 3}])
        writer.append("steps", [{"step": step, "loss": step / 2, "metrics": [("tokens", 8.0)]}])
        writer.append("events", [{"step": step, "kind": "noted", "site": None}])
        if step % flush_every == 0:
            writer.flush()
    writer.flush()
    if closed:
        writer.close()
    return open_run(path)


@pytest.fixture(scope="module", params=[False, True], ids=["running", "closed"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    # More than one row group, with few rows.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "ROWS_AT_ONCE", 100)
        return recorded(tmp_path_factory.mktemp("runs") / "run", closed=request.param)


# --- a part is the part of the whole ------------------------------------------------------------

STEPS: list[Any] = [
    None, 5, range(3, 9), range(9, 3, -1), range(0, 50, 3), range(0), [], [4, 2, 99], {7},
    range(38, FAR + 1), range(-(2**80), 2**80), range(FAR, FAR + 1), range(50, FAR),
]  # fmt: skip
PATTERNS: list[Any] = [
    None, "*:product", "layers.0.mlp:gate", ["*.10.*", "*:gate"], "layers.?.mlp:*", [], "nothing",
    "lm[[]0]:product",
]  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "sites"),
    [(steps, PATTERNS[1]) for steps in STEPS] + [(range(3, 40, 2), sites) for sites in PATTERNS],
    ids=str,
)
def test_a_part_is_what_pandas_picks(run: Run, steps: Any, sites: Any) -> None:
    whole = run.tensors()
    assert len(whole) == 41 * 3 * len(SITES)
    for ranks in (None, [0, 2], 5):
        wanted = pd.Series(True, index=whole.index)
        if steps is not None:
            numbers = [steps] if isinstance(steps, int) else steps
            wanted &= whole["step"].map(lambda step, numbers=numbers: step in numbers)
        if sites is not None:
            patterns = [sites] if isinstance(sites, str) else sites
            wanted &= whole["site"].map(
                lambda site, patterns=patterns: any(fnmatch.fnmatchcase(site, p) for p in patterns)
            )
        if ranks is not None:
            wanted &= whole["rank"].isin([ranks] if isinstance(ranks, int) else ranks)
        expected = whole[wanted].reset_index(drop=True)
        part = run.tensors(steps=steps, sites=sites, ranks=ranks)
        if not len(expected):
            assert len(part) == 0
            continue
        further = ["overflows%", "l0"]  # in a part that has none of them there is no such column
        assert part[part["step"] % 2 == 1].columns.tolist() == part.columns.tolist()
        part, expected = (
            frame.reindex(columns=whole.columns).astype(dict.fromkeys(further, float))
            for frame in (part, expected)
        )
        pd.testing.assert_frame_equal(part, expected)


def test_columns_come_with_those_that_tell_rows_apart(run: Run) -> None:
    whole = run.tensors()
    part = run.tensors("cur_amax", sites="*:product", steps=range(10))
    assert part.columns.tolist() == ["step", "rank", "site", "cur_amax"]
    assert run.tensors(["step"]).columns.tolist() == ["step", "rank", "site"]
    assert run.tensors([]).columns.tolist() == ["step", "rank", "site"]
    pd.testing.assert_frame_equal(
        run.tensors(["histogram", "cur_amax"]),
        whole[["step", "rank", "site", "cur_amax", "histogram"]],
    )
    channels = run.channels("product_amax", steps=3)
    assert channels.columns.tolist() == ["step", "rank", "site", "channel", "product_amax"]
    assert run.arrow("steps", ["loss"], steps=[1]).to_pylist() == [
        {"step": 1, "rank": 0, "loss": 0.5}
    ]


def test_what_is_kept_by_name_is_a_column_of_its_own(run: Run) -> None:
    steps = run.steps(["tokens", "loss"], steps=range(3))
    assert steps.to_dict("list") == {
        "step": [0, 1, 2], "rank": [0, 0, 0], "loss": [0.0, 0.5, 1.0], "tokens": [8.0] * 3
    }  # fmt: skip
    part = run.tensors("overflows%", sites="*:gate", ranks=2, steps=range(4))
    assert part.columns.tolist() == ["step", "rank", "site", "overflows%"]
    np.testing.assert_array_equal(part["overflows%"], [np.nan, 1.0, np.nan, 3.0])
    whole = run.tensors()
    np.testing.assert_array_equal(whole["l0"].isna(), whole["step"] % 2 == 0)
    assert "statistics" not in whole


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda run: run.tensors("cur_amx"), "run: tensors: 'cur_amx' was not recorded"),
        (lambda run: run.channels(["site", "cur_amax"]), "columns: 'cur_amax', expected one of"),
        (lambda run: run.arrow("steps", sites="*"), "sites: this table has none"),
    ],
)
def test_what_is_no_column_is_an_error(run: Run, read: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(run)
    assert "\n" not in str(error.value)


def test_a_row_group_without_a_wanted_step_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "ROWS_AT_ONCE", 100)
    run = recorded(tmp_path / "run", closed=True)
    reading, read = pa.parquet.ParquetFile.read_row_group, []

    def noting(self: Any, group: int, columns: list[str]) -> pa.Table:
        read.append((group, columns))
        return reading(self, group, columns=columns)

    monkeypatch.setattr(pa.parquet.ParquetFile, "read_row_group", noting)
    frame = run.tensors("cur_amax", steps=range(20, 21), sites="*:gate")
    assert len(frame) == 3
    # Step 20 is in rows 240 to 251 of 492: the third group of five. Of the others only steps.
    steps = ["step"]
    assert read[:5] == [(0, steps), (1, steps), (2, steps), (2, ["site"]), (2, read[4][1])]
    assert read[5:] == [(3, steps), (4, steps)]
    assert "cur_amax" in read[4][1] and "histogram" not in read[4][1]


# --- versions -----------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Two runs as version 1 wrote them: a closed one, and one killed in the middle of a resume."""
    with tarfile.open(Path(__file__).parent / "data" / "runs_of_version_1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "runs"


def test_version_1_opens(old: Path) -> None:
    closed, killed = map(open_run, sorted(find_runs(old)))
    assert [run.info["schema_version"] for run in (closed, killed)] == [1, 1]
    assert (closed.state, killed.state) == ("failed", "killed")
    for run, steps in ((closed, range(4)), (killed, range(3))):
        frame = run.steps()
        assert frame["step"].tolist() == list(steps)
        assert frame["loss"].tolist() == [2.0 / (step + 1) for step in steps]
        assert frame["tokens"].tolist() == [8.0 * step for step in steps]
        tensors = run.tensors(["cur_amax", "histogram", "seen"], sites="layers.1.*")
        assert tensors["cur_amax"].tolist() == [1.5 * step + 1 for step in steps]
        assert [list(counts) for counts in tensors["histogram"]] == [[1, 2, s] for s in steps]
        assert tensors["seen"].isna().all()  # newer than the run
        assert run.channels()["gate_weights"].map(list).tolist() == [[0.5, 1.0]] * len(steps)
    assert closed.events()["kind"].tolist() == ["diverged"]


def test_version_2_opens(tmp_path: Path) -> None:
    with tarfile.open(Path(__file__).parent / "data" / "runs_of_version_2.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    closed, killed = map(open_run, sorted(find_runs(tmp_path)))
    assert [run.info["schema_version"] for run in (closed, killed)] == [2, 2]
    assert (closed.state, killed.state) == ("finished", "killed")
    for run, steps in ((closed, range(8)), (killed, range(3))):
        assert run.steps()["step"].tolist() == list(steps)
        products = run.tensors(["histogram", "bins"], sites="*:product")
        assert products["step"].tolist() == list(steps)
        assert products["bins"].isna().all()  # newer than the run
    RunWriter.resume(tmp_path / "runs" / "killed", 2).close()
    again = open_run(tmp_path / "runs" / "killed")
    assert again.info["schema_version"] == record.SCHEMA_VERSION
    assert again.tensors("histogram")["histogram"].map(sum).tolist() == [8, 8]


@pytest.mark.parametrize("name", ["closed", "killed"])
def test_version_1_goes_on_as_today(name: str, old: Path) -> None:
    writer = RunWriter.resume(old / name, 2)
    assert open_run(old / name).info["schema_version"] == record.SCHEMA_VERSION
    assert open_run(old / name).steps()["step"].tolist() == [0, 1]
    writer.append("steps", [{"step": 2}])
    writer.close()
    assert open_run(old / name).steps()["step"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["closed", "killed"])
def test_a_column_that_was_renamed_is_found_by_its_new_name(
    name: str, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = TABLES["tensors"]
    at = schema.get_field_index("cur_amax")
    renamed = schema.set(at, schema.field(at).with_name("largest"))
    monkeypatch.setitem(TABLES, "tensors", renamed)
    with pytest.raises(RunError, match="damaged: columns cur_amax, expected those of tensors"):
        open_run(old / name).tensors()
    monkeypatch.setitem(record.FORMER_NAMES, "tensors", {"cur_amax": "largest"})
    frame = open_run(old / name).tensors("largest", steps=1)
    assert frame["largest"].tolist() == [1.5, 2.5]
    RunWriter.resume(old / name, 2).close()
    assert open_run(old / name).tensors("largest", steps=1)["largest"].tolist() == [1.5, 2.5]


# --- states -------------------------------------------------------------------------------------


def change(path: Path, **facts: Any) -> Run:
    file = path / "run.json"
    info = json.loads(file.read_text()) | facts
    file.write_text(json.dumps({key: value for key, value in info.items() if value is not None}))
    return open_run(path)


def test_a_number_that_was_given_to_another_process_is_a_killed_run(tmp_path: Path) -> None:
    path = write(tmp_path / "run", range(2)).path
    assert open_run(path).state == "running"
    assert change(path, born=open_run(path).info["born"] + 1).state == "killed"
    assert change(path, born=None).state == "running"  # as version 1 says it
    assert change(path, pid=True).state == "killed"


def test_on_another_machine_the_last_flush_tells(tmp_path: Path) -> None:
    path = write(tmp_path / "run", range(2)).path
    run = change(path, host=f"not-{socket.gethostname()}", pid=2**22 + 1)
    assert run.state == "running"
    long_ago = time.time() - runs.HEARTBEAT_SECONDS - 1
    os.utime(path / "segments", (long_ago, long_ago))
    assert run.state == "unknown"
    RunWriter.resume(path, 1).close()  # nobody can say that somebody writes it
    assert open_run(path).state == "finished"


def test_a_run_that_another_process_writes_is_not_resumed(tmp_path: Path) -> None:
    path = write(tmp_path / "run", range(2)).path
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            change(path, pid=other.pid, born=runs._born(other.pid))
            with pytest.raises(RunError) as error:
                RunWriter.resume(path, 1)
            assert one_line(error) == f"{path}: is being written by process {other.pid}"
            assert written(path) == only(range(2))
        finally:
            other.kill()
    RunWriter.resume(path, 1)
    assert written(path) == only(range(1))


RESUME = """
import sys
from fp8lab.store import RunError, RunWriter
sys.stdin.readline()
try:
    RunWriter.resume(sys.argv[1], 1)
    print("mine", flush=True)
except RunError as error:
    print(error, flush=True)
sys.stdin.readline()
"""


def test_of_two_that_resume_at_once_one_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "run", range(2)).path
    change(path, pid=2**22 + 1)
    root = Path(__file__).resolve().parents[1]
    others = [
        subprocess.Popen(
            [sys.executable, "-c", RESUME, str(path)],
            cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    time.sleep(1.0)  # all have imported
    for other in others:
        assert other.stdin is not None
        print(file=other.stdin, flush=True)
    said = [other.stdout.readline().strip() for other in others if other.stdout is not None]
    for other in others:
        other.communicate("\n", timeout=60)
    assert said.count("mine") == 1
    assert all(line == "mine" or "another process" in line or "by process" in line for line in said)
    assert written(path) == only(range(1))


# --- reading while segments are merged ----------------------------------------------------------


def test_many_flushes_leave_few_folders_and_no_reader_misses_a_row(tmp_path: Path) -> None:
    path = tmp_path / "run"
    writer = write(path, range(1))
    flushed, over, seen = 0, threading.Event(), []

    def keep_reading() -> None:
        while not over.is_set():
            before = flushed
            steps = open_run(path).arrow("events")["step"].to_pylist()[::2]
            assert steps == list(range(len(steps)))
            assert len(steps) > before
            seen.append(len(steps))

    failures: list[BaseException] = []
    monkey = threading.excepthook
    threading.excepthook = lambda args: failures.append(args.exc_value)  # type: ignore[assignment]
    reader = threading.Thread(target=keep_reading)
    reader.start()
    most = 0
    for step in range(1, 300):
        writer.append("events", [{"step": step, "rank": rank} for rank in (0, 1)])
        writer.flush()
        flushed = step
        most = max(most, len(list((path / "segments").iterdir())))
    over.set()
    reader.join()
    threading.excepthook = monkey
    assert failures == []
    assert len(set(seen)) > 3
    assert most <= 3 * segments.MERGED_AT_ONCE
    writer.close()
    assert open_run(path).arrow("events")["step"].to_pylist()[::2] == list(range(300))


def test_what_is_merged_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "LARGEST_MERGED_BYTES", 1)
    write(tmp_path / "run", range(40))
    assert len(segments.listed(tmp_path / "run")) == 40
    assert written(tmp_path / "run") == only(range(40))


# --- what lies about ----------------------------------------------------------------------------


def test_pipes_links_and_giants_are_no_runs(tmp_path: Path) -> None:
    for name in ("pipe", "endless", "giant", "deep"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe" / "run.json")
    (tmp_path / "endless" / "run.json").symlink_to("/dev/zero")
    with (tmp_path / "giant" / "run.json").open("wb") as file:
        file.truncate(1 << 40)
    deep = '{"schema_version": 2, "config": ' + "[" * 60 + "]" * 60 + "}"
    (tmp_path / "deep" / "run.json").write_text(deep)
    for name in ("pipe", "endless", "giant"):
        with pytest.raises(RunError, match=r"run.json: damaged: expected a file of at most 64 MiB"):
            open_run(tmp_path / name)
    with pytest.raises(RunError, match=r"run.json: damaged: nested deeper than 50"):
        open_run(tmp_path / "deep")


@pytest.mark.parametrize("kind", ["pipe", "folder", "no step", "twice the same column"])
def test_a_table_that_is_none_is_damage(kind: str, tmp_path: Path) -> None:
    file = write(tmp_path / "run", range(2)).path / "segments" / "000001" / "tensors.arrow"
    rows = open_run(tmp_path / "run").arrow("tensors", steps=1)
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        if kind == "no step":
            rows = rows.set_column(0, rows.schema.field(0), pa.nulls(2, pa.int64()))
        else:
            rows = rows.append_column(rows.schema.field("cur_amax"), rows["cur_amax"])
        with pa.ipc.new_file(str(file), rows.schema) as writer:
            writer.write_table(rows)
    with pytest.raises(RunError) as error:
        open_run(tmp_path / "run").tensors()
    assert one_line(error).startswith(f"{file}: damaged: ")
    assert open_run(tmp_path / "run").events()["step"].tolist() == [0, 0, 1, 1]


def test_names_that_are_no_numbers_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "run", range(2)).path
    for name in ("²", "٣", "1-", "-1", "notes", "1" * 30):
        (path / "segments" / name).mkdir()
        (path / "ranks" / name).mkdir(parents=True)
    (path / "segments" / "000009").write_text("a file")
    assert written(path) == only(range(2))
    assert open_run(path).ranks()["rank"].tolist() == [0, int("1" * 30)]


def test_segments_that_are_a_file_hold_nothing(tmp_path: Path) -> None:
    path = RunWriter.create(tmp_path / "run", {}).path
    (path / "segments").rmdir()
    (path / "segments").write_text("mine")
    assert written(path) == only([])


def test_a_thousand_folders_deep_is_searched(tmp_path: Path) -> None:
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        for _ in range(1100):
            Path("d").mkdir()
            os.chdir("d")
        Path("run.json").write_text("{}")
        os.chdir(here)
        assert len(list(find_runs(tmp_path))) == 1
    finally:
        os.chdir(here)
        subprocess.run(["rm", "-r", str(tmp_path / "d")], check=True)  # too deep for shutil


@pytest.mark.parametrize("target", ["nowhere", "000000"])
def test_a_segment_that_is_a_link_to_nothing_is_damage(tmp_path: Path, target: str) -> None:
    """It was waited for as for one that is being merged, for ever."""
    run = recorded(tmp_path / "run", closed=False)
    segment = sorted((tmp_path / "run" / "segments").iterdir())[0]
    shutil.rmtree(segment)
    segment.symlink_to(segment.name if target == "000000" else target)
    with pytest.raises(RunError, match=r"segments/\d+: a link to nothing$"):
        run.tensors()
