"""Which process stopped first: what its state, its error and the time of its last write can tell,
and where they cannot."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fp8lab.diagnosis import diagnose
from fp8lab.ending import error_of, stopped_first
from fp8lab.listing import rank_in_words, ranks_of, summary_of
from fp8lab.live.following import Follower
from fp8lab.report import write_report
from fp8lab.runs import folder_of, state_file
from fp8lab.store import RunWriter, open_run

CLOSED = "RuntimeError: [pair.cc:553] Connection closed by peer [127.0.0.1]:1"
RESET = "RuntimeError: [pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer"
OWN = "ValueError: loss is nan"


def run_of(path: Path, ranks: list[tuple[str, int | None, float, str | None]], **info: Any) -> str:
    """What is said of processes with a state, a last step, the time of a last write, an error."""
    for rank, (state, step, written, error) in enumerate(ranks):
        writer = RunWriter.create(path, {"job": "one", **info}, rank=rank)
        if step is not None:
            writer.append("steps", [{"step": step}])
        writer.flush()
        file = state_file(path, rank)
        told = json.loads(file.read_text()) | {"error": error}
        told |= {"state": state} if state != "killed" else {"pid": 1 << 22, "born": 1}
        file.write_text(json.dumps(told))
        os.utime(folder_of(path, rank) / "segments", (written, written))
    return str(stopped_first(open_run(path)))


@pytest.mark.parametrize(
    ("ranks", "told"),
    [
        ([("finished", 9, 100, None), ("finished", 9, 101, None)], "None"),
        ([("interrupted", 9, 100, None), ("interrupted", 9, 101, None)], "None"),
        ([("left", 3, 50, None), ("finished", 9, 101, None)], "None"),
        # A connection that is closed was not closed by who says so, however late the other wrote.
        ([("failed", 9, 100, CLOSED), ("killed", 8, 99, None)], "rank 1, last step on disk 8, w"),
        ([("failed", 9, 100, RESET), ("killed", 9, 104, None)], "rank 1, last step on disk 9"),
        ([("failed", 9, 100, RESET), ("killed", None, 99.9, None)], "rank 1, with no step on d"),
        ([("failed", 9, 100, RESET), ("failed", None, 99.9, OWN)], "rank 1, before its first step"),
        ([("failed", 9, 100, CLOSED), ("failed", 9, 99, RESET)], "not known: each lost the"),
        # torchrun ends the others, which had waited for the one that failed.
        ([("killed", 9, 70, None), ("failed", 9, 100, OWN)], "rank 1, last step 9"),
        ([("failed", 9, 102, OWN), ("failed", 9, 100, OWN)], "not known: ranks 0, 1"),
        ([("failed", 12, 120, OWN), ("failed", 9, 100, OWN)], "rank 1, last step 9, 20 s"),
        ([("killed", 120, 112, None), ("killed", 99, 100, None)], "rank 1, last step on d"),
        # The time of one that wrote no step is that of its beginning.
        ([("killed", 120, 112, None), ("killed", None, 100, None)], "not known: rank 1 has no"),
        ([("failed", 12, 120, OWN), ("failed", None, 100, OWN)], "not known: rank 1 has no step"),
        ([("finished", 20, 150, None), ("killed", None, 100, None)], "not known: rank 1 has no"),
        ([("finished", 20, 102, None), ("killed", 9, 100, None)], "not known: ranks 0, 1 wrote"),
        ([("killed", 120, 104, None), ("killed", 99, 100, None)], "not known: ranks 0, 1"),
        ([("finished", 20, 150, None), ("killed", 9, 100, None)], "rank 1, last step on d"),
    ],
)  # fmt: skip
def test_which_process_stopped_first(ranks: Any, told: str, tmp_path: Path) -> None:
    said = run_of(tmp_path / "run", ranks)
    assert said.startswith(told)
    assert (said == "None") == (told == "None")


@pytest.mark.parametrize(
    ("ranks", "error"),
    [
        ([("failed", 9, 100, CLOSED), ("failed", 9, 100, OWN)], f"rank 1: {OWN}"),
        ([("failed", 12, 120, OWN), ("failed", 9, 100, OWN + "!")], f"rank 1: {OWN}!"),
        ([("failed", 9, 100, None), ("failed", 9, 100, OWN)], f"rank 1: {OWN}"),
        ([("failed", 9, 100, CLOSED), ("killed", 9, 99, None)], f"rank 0: {CLOSED}"),
        ([("failed", 9, 100, OWN)], OWN),
        ([("killed", 9, 100, None), ("killed", 9, 100, None)], None),
    ],
)
def test_the_error_is_that_of_the_process_that_stopped_first(
    ranks: Any, error: str | None, tmp_path: Path
) -> None:
    """In rows, in a frame, in a diagnosis and in the headline of a page."""
    run_of(tmp_path / "run", ranks, precision={"down": {"input": "E4M3 DelayedScaling"}})
    run = open_run(tmp_path / "run")
    assert error_of(run) == summary_of(run)["error"] == Follower(run.path).look().error == error
    if error is not None:
        assert diagnose(run).ended.endswith(f": {error}")
        assert f": {error}: rows end there" in str(diagnose(run))
        page = write_report([run.path], tmp_path / "page.md").read_text("utf-8")
        assert error.partition(" [")[0] in page


def test_a_frame_shows_the_steps_of_who_has_some(tmp_path: Path) -> None:
    run_of(tmp_path / "run", [("killed", None, 100, None), ("failed", None, 100, OWN)])
    writer = RunWriter.create(tmp_path / "run", {"job": "one"}, rank=2)
    writer.append("steps", [{"step": 22, "loss": 1.0}])
    writer.close()
    assert Follower(tmp_path / "run").look().step == 22


def test_how_often_processes_write_is_in_the_run(tmp_path: Path) -> None:
    ranks = [("killed", 120, 112.0, None), ("killed", 99, 100.0, None)]
    told = "not known: ranks 0, 1 wrote last within 60 s, which is how often they do"
    assert run_of(tmp_path / "run", ranks, flush_seconds=60.0) == told


def test_one_process_has_none_before_it(tmp_path: Path) -> None:
    assert run_of(tmp_path / "run", [("failed", 1, 100.0, OWN)]) == "None"


def test_a_last_write_is_no_end(tmp_path: Path) -> None:
    killed: Any = [("failed", 9, 100, CLOSED), ("killed", 8, 98, None)]
    told = "rank 1, last step on disk 8, written 2 s before the others"
    assert run_of(tmp_path / "run", killed) == told
    silent: Any = [("failed", 31, 100, CLOSED), ("killed", None, 98, None)]
    assert run_of(tmp_path / "silent", silent) == "rank 1, with no step on disk yet"


LOST = "no step of it on disk (it writes every 7 s: steps of that time may be lost)"


def test_of_a_killed_process_only_what_is_on_disk_is_told(tmp_path: Path) -> None:
    ranks: Any = [
        ("failed", 35, 100.0, RESET),
        ("killed", None, 99.0, None),
        ("killed", 35, 99.0, None),
    ]
    run_of(tmp_path / "run", ranks, flush_seconds=7.0)
    run = open_run(tmp_path / "run")
    failed, silent, killed = map(rank_in_words, ranks_of(run))
    assert failed.startswith("failed, last step 35, written")
    assert silent == f"killed, {LOST}"
    assert killed.startswith("killed, last step on disk 35, written")
    told = f"ranks 1, 2 killed; rank 0 failed, last step on disk 35: rank 0: {RESET}"
    told += ": rows end there, the last of ranks 1, 2 may be missing"
    assert str(diagnose(run)).endswith(told)


def test_a_process_that_failed_has_written_what_it_had(tmp_path: Path) -> None:
    run_of(tmp_path / "run", [("finished", 9, 100.0, None), ("failed", 3, 99.0, OWN)])
    assert str(diagnose(tmp_path / "run")).endswith(
        f"rank 1 failed after step 9: rank 1: {OWN}: rows end there"
    )


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ("failed", "failed after step 9: ValueError: loss is nan: rows end there"),
        ("killed", "killed, last step on disk 9: rows end there"),
        ("finished", "nothing found"),
    ],
)
def test_a_run_that_broke_off_is_not_just_one_where_nothing_was_found(
    state: str, told: str, tmp_path: Path
) -> None:
    run_of(tmp_path / "run", [(state, 9, 100.0, OWN if state == "failed" else None)])
    assert str(diagnose(tmp_path / "run")).endswith(told)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_without_rows_was_not_killed_before_its_first_step(
    ranks: int, tmp_path: Path
) -> None:
    run_of(tmp_path / "run", [("killed", None, 100.0, None)] * ranks, flush_seconds=0.0)
    told = "killed, no step on disk (it writes each step: one may be lost)"
    assert diagnose(tmp_path / "run").ended == told
