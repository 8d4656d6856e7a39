"""The run directory: rows come back as they went in, and damage is an error of one line.

What a kill leaves of it is in test_store_killed, a full disk in test_store_disk, several processes
in test_store_ranks, reading in test_runs.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from fp8lab import segments
from fp8lab.record import SCHEMA_VERSION, TABLES, Table
from fp8lab.store import Run, RunError, RunWriter, find_runs, open_run

TABLE_NAMES: tuple[Table, ...] = get_args(Table)

VALUES: dict[pa.DataType, list[Any]] = {
    pa.int64(): [0, -3, 2**62],
    pa.int32(): [0, 7, 2**31 - 1],
    pa.float64(): [0.1, -0.0, 1e300],
    pa.string(): ["layers.3.mlp:product", "", "naïve ⊙\n"],
    pa.binary(): [b"\x00\xff\n", b"", b"bins"],
    pa.list_(pa.int64()): [[1, 2, 2**40], [], [0]],
    pa.list_(pa.float32()): [[0.5, -1.25], [], [3.0]],
    pa.map_(pa.string(), pa.float64()): [[("lr", 0.5)], [], [("a", 1.0), ("b", -2.0)]],
}


def row_of(table: Table, choice: int) -> dict[str, Any]:
    return {field.name: VALUES[field.type][choice] for field in TABLES[table]}


def write(path: Path, steps: range, *, flush_every: int = 1) -> RunWriter:
    """A run with two rows a step in every table; the last rows may be pending."""
    writer = RunWriter.create(path, {})
    add(writer, steps, flush_every=flush_every)
    return writer


def add(writer: RunWriter, steps: range, *, flush_every: int = 1) -> None:
    for step in steps:
        for table in TABLE_NAMES:
            writer.append(table, [{"step": step, "rank": rank} for rank in (0, 1)])
        if step % flush_every == flush_every - 1:
            writer.flush()


def written(path: Path) -> dict[Table, list[int]]:
    """The steps in every table, where each must be there with both its rows."""
    run = open_run(path)
    steps: dict[Table, list[int]] = {}
    for table in TABLE_NAMES:
        rows = run.arrow(table).to_pydict()
        steps[table] = rows["step"][::2]
        assert rows["step"] == [step for step in steps[table] for _ in (0, 1)]
        assert rows["rank"] == [0, 1] * len(steps[table])
    return steps


def only(steps: Iterable[int]) -> dict[Table, list[int]]:
    return {table: list(steps) for table in TABLE_NAMES}


# --- rows in, rows out ------------------------------------------------------------------------


def test_every_column_type_has_a_value_here() -> None:
    assert {field.type for schema in TABLES.values() for field in schema} == set(VALUES)


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("table", TABLE_NAMES)
def test_every_column_comes_back_as_it_went_in(table: Table, closed: bool, tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", {})
    rows = [row_of(table, choice) for choice in range(3)]
    for row in rows:
        writer.append(table, [row])
        writer.flush()
    if closed:
        writer.close()
    back = open_run(tmp_path / "run").arrow(table)
    assert back.schema.equals(TABLES[table])
    assert back.to_pylist() == rows
    for other in set(TABLE_NAMES) - {table}:
        assert open_run(tmp_path / "run").arrow(other).num_rows == 0


@pytest.mark.parametrize("closed", [False, True])
def test_what_is_not_named_is_missing_and_not_zero(closed: bool, tmp_path: Path) -> None:
    writer = write(tmp_path / "run", range(3))
    if closed:
        writer.close()
    run = open_run(tmp_path / "run")
    for table in TABLE_NAMES:
        rows = run.arrow(table)
        for name in set(rows.column_names) - {"step", "rank"}:
            assert rows[name].null_count == 6, (table, name)
    assert run.tensors()["cur_amax"].isna().all()


def test_numpy_values_are_numbers_too(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", {})
    weights = np.arange(4, dtype=np.float64)
    row = {"step": np.int64(3), "rank": 0, "channel": np.int32(2), "gate_norm": np.float64(0.5)}
    writer.append("channels", [row | {"gate_weights": weights}])
    writer.flush()
    (back,) = open_run(tmp_path / "run").arrow("channels").to_pylist()
    assert (back["step"], back["channel"], back["gate_norm"]) == (3, 2, 0.5)
    assert back["gate_weights"] == [0.0, 1.0, 2.0, 3.0]


def test_pending_rows_are_counted_and_then_written_once(tmp_path: Path) -> None:
    writer = write(tmp_path / "run", range(4), flush_every=100)
    assert writer.pending == 4 * 2 * len(TABLE_NAMES)
    assert written(tmp_path / "run") == only(range(0))
    writer.flush()
    writer.flush()
    assert writer.pending == 0
    assert written(tmp_path / "run") == only(range(4))


def test_a_flush_that_does_not_wait_writes_meanwhile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    writing, go_on = segments.write, threading.Event()

    def slowly(*args: Any) -> None:
        assert go_on.wait(60)
        writing(*args)

    writer = RunWriter.create(tmp_path / "run", {})
    with monkeypatch.context() as patch:
        patch.setattr(segments, "write", slowly)
        for step in range(3):  # the first is under way, the others wait for it
            add(writer, range(step, step + 1), flush_every=100)
            writer.flush(wait=False)
        assert writer.pending == 3 * 2 * len(TABLE_NAMES)
        assert written(tmp_path / "run") == only(range(0))
        go_on.set()
        writer.flush()
    assert writer.pending == 0
    assert written(tmp_path / "run") == only(range(3))
    assert len(segments.listed(tmp_path / "run")) == 2


def test_ctrl_c_in_a_flush_writes_no_row_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    writing = segments.write

    def interrupted(*args: Any) -> None:
        signal.raise_signal(signal.SIGINT)  # which the main thread gets, as it waits
        time.sleep(0.2)
        writing(*args)

    writer = write(tmp_path / "run", range(2))
    add(writer, range(2, 4), flush_every=100)
    monkeypatch.setattr(segments, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.flush()
    monkeypatch.setattr(segments, "write", writing)
    writer.close("interrupted")
    assert written(tmp_path / "run") == only(range(4))


def test_a_path_need_not_be_text(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff")
    writer = write(path, range(20))
    assert written(path) == only(range(20))
    writer.close()
    assert written(path) == only(range(20))


def test_a_row_without_a_step_is_refused_and_one_without_a_rank_is_the_writers(
    tmp_path: Path,
) -> None:
    writer = RunWriter.create(tmp_path / "run", {}, rank=3)
    for row in ({"loss": 1.0}, {"step": None}):
        with pytest.raises(ValueError, match="steps: a row without a step, expected one in each"):
            writer.append("steps", [{"step": 0}, row])
    writer.append("steps", [{"step": 1}, {"step": 1, "rank": -1}])
    writer.flush()
    assert open_run(tmp_path / "run").steps()["rank"].tolist() == [3, -1]


@pytest.mark.parametrize("step", [0.5, "a", True, [1], 1 << 63])
def test_a_step_that_is_no_number_is_refused_and_the_rest_is_kept(
    step: Any, tmp_path: Path
) -> None:
    writer = write(tmp_path / "run", range(2))
    with pytest.raises(ValueError, match="expected an integer"):
        writer.append("steps", [{"step": step}])
    writer.append("steps", [{"step": np.int64(2)}])
    writer.close()
    assert open_run(tmp_path / "run").steps()["step"].unique().tolist() == [0, 1, 2]


def test_more_flushes_than_six_digits_stay_in_order(tmp_path: Path) -> None:
    writer = write(tmp_path / "run", range(2))
    writer._next_segment = 999_999
    add(writer, range(2, 5))
    assert written(tmp_path / "run") == only(range(5))
    writer.close()
    assert written(tmp_path / "run") == only(range(5))


def test_frames_are_sorted_by_step_and_metrics_are_columns(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", {})
    writer.append("steps", [{"step": 2, "loss": 0.5, "metrics": [("tokens", 8.0)]}])
    writer.append("steps", [{"step": 1, "loss": 1.5, "metrics": [("accuracy", 0.25)]}])
    writer.append("steps", [{"step": 0, "loss": 2.5}])
    writer.flush()
    frame = open_run(tmp_path / "run").steps()
    assert frame["step"].tolist() == [0, 1, 2]
    assert frame["loss"].tolist() == [2.5, 1.5, 0.5]
    assert "metrics" not in frame
    missing = [[True, True], [False, True], [True, False]]
    assert frame[["accuracy", "tokens"]].isna().to_numpy().tolist() == missing
    assert frame["tokens"][2] == 8.0
    assert frame["accuracy"][1] == 0.25


@pytest.mark.parametrize("closed", [False, True])
def test_a_run_without_rows_has_empty_tables(closed: bool, tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", {})
    if closed:
        writer.close()
    run = open_run(tmp_path / "run")
    for frame in (run.steps(), run.tensors(), run.channels(), run.events()):
        assert isinstance(frame, pd.DataFrame)
        assert len(frame) == 0


# --- create and state -------------------------------------------------------------------------


def test_create_keeps_what_it_was_told(tmp_path: Path) -> None:
    RunWriter.create(tmp_path / "a" / "b" / "run", {"every": 7, "config": {"lr": 0.1}})
    run = open_run(tmp_path / "a" / "b" / "run")
    assert run.info["schema_version"] == SCHEMA_VERSION
    assert (run.info["every"], run.info["config"]) == (7, {"lr": 0.1})
    assert (run.name, run.state) == ("run", "running")
    assert repr(run) == f"Run('{tmp_path}/a/b/run', running)"


@pytest.mark.parametrize("kind", ["run", "damaged run", "folder with a file", "file"])
def test_create_refuses_what_exists_and_touches_nothing(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    if kind == "run":
        write(path, range(3)).close()
    elif kind == "damaged run":
        (path / "segments" / "000000").mkdir(parents=True)
    elif kind == "folder with a file":
        path.mkdir()
        (path / "mine").write_text("mine")
    else:
        path.write_text("mine")
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
    with pytest.raises(RunError, match=r"run: exists already, expected a new run directory; watch"):
        RunWriter.create(path, {})
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before


def test_create_below_a_file_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"^[^\n]*cannot be created: Not a directory$"):
        RunWriter.create(tmp_path / "file" / "run", {})


def test_create_with_info_that_is_not_json_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="set is not JSON serializable"):
        RunWriter.create(tmp_path / "run", {"config": {1, 2}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("state", ["finished", "interrupted", "failed"])
def test_close_writes_the_last_state_and_one_file_a_table(state: str, tmp_path: Path) -> None:
    writer = write(tmp_path / "run", range(5), flush_every=2)
    writer.close(state, error="why")
    run = open_run(tmp_path / "run")
    assert (run.state, run.info["error"]) == (state, "why")
    assert written(tmp_path / "run") == only(range(5))
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {"run.json", *(f"{table}.parquet" for table in TABLE_NAMES)}


@pytest.mark.parametrize(
    ("info", "state"),
    [
        ({"state": "running", "pid": os.getpid()}, "running"),
        ({"state": "running", "pid": 2**22 + 1}, "killed"),  # beyond Linux's largest
        ({"state": "running", "pid": 2**80}, "running"),  # no number of a process: cannot say
        ({"state": "running", "pid": 0}, "killed"),
        ({"state": "running"}, "killed"),
        ({"state": "finished", "pid": 2**22 + 1}, "finished"),
        ({}, "unknown"),
    ],
)
def test_a_running_run_without_its_process_was_killed(info: dict[str, Any], state: str) -> None:
    assert Run(Path("run"), info).state == state


# --- resume -----------------------------------------------------------------------------------


def closed_run(path: Path) -> None:
    write(path, range(6), flush_every=3).close("failed", error="boom")


def killed_run(path: Path) -> None:
    write(path, range(6), flush_every=3)


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("step", [0, 3, 6, 100])
def test_resume_drops_the_rows_from_its_step_on(step: int, closed: bool, tmp_path: Path) -> None:
    (closed_run if closed else killed_run)(tmp_path / "run")
    writer = RunWriter.resume(tmp_path / "run", step)
    assert len(list((tmp_path / "run" / "segments").iterdir())) == 1
    assert written(tmp_path / "run") == only(range(min(step, 6)))
    assert open_run(tmp_path / "run").state == "running"
    add(writer, range(min(step, 6), 9))
    writer.close()
    assert written(tmp_path / "run") == only(range(9))


def test_a_resumed_run_forgets_why_it_failed(tmp_path: Path) -> None:
    closed_run(tmp_path / "run")
    RunWriter.resume(tmp_path / "run", 3).close()
    run = open_run(tmp_path / "run")
    assert run.state == "finished"
    assert "error" not in run.info


def test_resume_of_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run here"):
        RunWriter.resume(tmp_path / "run", 0)
    assert not (tmp_path / "run").exists()


# --- reading while it is written --------------------------------------------------------------


@pytest.mark.parametrize("moment", ["listed", "read"])
def test_a_run_that_is_closed_while_it_is_read_is_read_whole(
    moment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    writer = write(tmp_path / "run", range(4))
    run = open_run(tmp_path / "run")
    if moment == "listed":
        listing = segments.files_of

        def list_then_close(folder: Path, table: Table) -> list[Path]:
            files = listing(folder, table)
            monkeypatch.setattr(segments, "files_of", listing)
            writer.close()
            return files

        monkeypatch.setattr(segments, "files_of", list_then_close)
    else:
        opening = pa.OSFile

        def close_then_open(name: bytes, mode: str) -> Any:
            monkeypatch.setattr(pa, "OSFile", opening)
            writer.close()
            return opening(name, mode)

        monkeypatch.setattr(pa, "OSFile", close_then_open)
    assert run.arrow("tensors")["step"].to_pylist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert run.arrow("tensors")["step"].to_pylist() == [0, 0, 1, 1, 2, 2, 3, 3]


# --- damage -----------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[RunError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("table", TABLE_NAMES)
@pytest.mark.parametrize("damage", ["empty", "cut", "text", "another table"])
def test_a_damaged_table_is_an_error_of_one_line(
    damage: str, table: Table, closed: bool, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    writer = write(path, range(3))
    if closed:
        writer.close()
    folder = path if closed else path / "segments" / "000001"
    file = folder / f"{table}.{'parquet' if closed else 'arrow'}"
    whole = file.read_bytes()
    other = next(f for f in sorted(folder.glob(f"*{file.suffix}")) if f != file)
    contents = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "text": b"not a table\nat all\n",
        "another table": other.read_bytes(),
    }
    file.write_bytes(contents[damage])
    run = open_run(path)
    with pytest.raises(RunError) as error:
        run.arrow(table)
    assert one_line(error).startswith(f"{file}: damaged: ")
    for intact in set(TABLE_NAMES) - {table}:
        assert run.arrow(intact).num_rows == 6


def test_text_that_is_none_is_damage(tmp_path: Path) -> None:
    write(tmp_path / "run", range(1))
    file = tmp_path / "run" / "segments" / "000000" / "events.arrow"
    offsets = pa.py_buffer(np.array([0, 3, 6], dtype=np.int32))
    kind = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"abc\xff\xfef"))
    rows = open_run(tmp_path / "run").arrow("events").combine_chunks()
    rows = rows.set_column(rows.column_names.index("kind"), rows.schema.field("kind"), kind)
    with pa.ipc.new_file(str(file), rows.schema) as writer:
        writer.write_table(rows)
    with pytest.raises(RunError, match="damaged"):
        open_run(tmp_path / "run").events()


@pytest.mark.parametrize("closed", [False, True])
def test_flipped_bits_never_raise_anything_else(closed: bool, tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", {})
    for table in TABLE_NAMES:
        writer.append(table, [row_of(table, choice) for choice in range(3)])
    writer.flush()
    if closed:
        writer.close()
    run = open_run(tmp_path / "run")
    files = [f for table in TABLE_NAMES for f in segments.files_of(run.path, table)]
    draw = random.Random(0)
    refused = 0
    for _ in range(100):
        file = draw.choice(files)
        whole = file.read_bytes()
        broken = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            broken[draw.randrange(len(broken))] ^= 1 << draw.randrange(8)
        file.write_bytes(broken)
        try:
            for frame in (run.steps, run.tensors, run.channels, run.events):
                frame()
        except RunError as error:
            assert "\n" not in str(error)
            refused += 1
        file.write_bytes(whole)
    assert refused > 25


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no run here, expected a directory with a run.json"),
        (b"", "run.json: damaged: Expecting value"),
        (b'{"schema_version": 1', "run.json: damaged: Expecting"),
        (b"\xff\xfe", "run.json: damaged: 'utf-8' codec"),
        (b"[1]", "run.json: schema_version: None, expected 1 to 3"),
        (b"3", "run.json: schema_version: None, expected 1 to 3"),
        (b"{}", "run.json: schema_version: None, expected 1 to 3"),
        (b'{"schema_version": "1"}', "run.json: schema_version: '1', expected 1 to 3"),
        (b'{"schema_version": true}', "run.json: schema_version: True, expected 1 to 3"),
        (b'{"schema_version": 0}', "run.json: schema_version: 0, expected 1 to 3"),
        (
            b'{"schema_version": 4}',
            "run.json: schema_version: 4, expected 1 to 3: a newer fp8lab wrote it",
        ),
        (b"[" * 100_000, "run.json: damaged: maximum recursion depth exceeded"),
        (b'{"a": ' + b"9" * 5000 + b"}", "run.json: damaged: Exceeds the limit"),
    ],
)
def test_a_run_json_that_is_none_is_an_error_of_one_line(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    path.mkdir()
    if content is not None:
        (path / "run.json").write_bytes(content)
    with pytest.raises(RunError) as error:
        open_run(path)
    assert message in one_line(error)


def test_a_file_and_a_folder_named_run_json_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="no run here"):
        open_run(tmp_path / "file")
    (tmp_path / "run" / "run.json").mkdir(parents=True)
    with pytest.raises(RunError, match=r"run.json: damaged: "):
        open_run(tmp_path / "run")


def test_run_json_is_what_a_person_can_read(tmp_path: Path) -> None:
    write(tmp_path / "run", range(1))
    text = (tmp_path / "run" / "run.json").read_text()
    assert text.endswith("}\n")
    assert json.loads(text)["state"] == "running"


# --- finding ----------------------------------------------------------------------------------


def test_find_runs_yields_runs_sorted_and_does_not_look_inside_them(tmp_path: Path) -> None:
    for name in ("b/two", "b/one", "a", "c/d/e"):
        write(tmp_path / name, range(1))
    write(tmp_path / "a" / "nested", range(1))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = [str(path.relative_to(tmp_path)) for path in find_runs(tmp_path)]
    assert found == ["a", "b/one", "b/two", "c/d/e"]
    assert list(find_runs(tmp_path / "a")) == [tmp_path / "a"]
    assert list(find_runs(tmp_path / "nothing")) == []
    assert list(find_runs(tmp_path / "file")) == []


def test_find_runs_passes_over_a_folder_it_may_not_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("a", "b", "c"):
        write(tmp_path / name / "run", range(1))
    reading = Path.iterdir

    def forbidden(self: Path) -> Iterator[Path]:
        if self.name == "b":
            raise PermissionError(13, "Permission denied")
        return reading(self)

    monkeypatch.setattr(Path, "iterdir", forbidden)
    assert [path.parent.name for path in find_runs(tmp_path)] == ["a", "c"]
