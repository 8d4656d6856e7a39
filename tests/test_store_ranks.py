"""Several processes write one run: in any order, dying when they like; a reader sees all rows.

Real processes where order matters, and one process with several writers where only files do: a
writer does not know whether the others live in its process.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_store import TABLE_NAMES, one_line

from fp8lab.store import RunError, RunWriter, find_runs, open_run

ROOT = Path(__file__).resolve().parents[1]
RANKS = 4
Writer = subprocess.Popen[str]

RANK = """
import sys, time
from fp8lab.store import RunWriter
path, rank, steps, job = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
print("ready", flush=True)
sys.stdin.readline()
writer = RunWriter.create(path, {"every": 1, "job": job} if job else {"every": 1}, rank=rank)
for step in range(steps):
    writer.append("tensors", [{"step": step, "rank": rank, "site": "a", "cur_amax": rank + step}])
    writer.append("steps", [{"step": step}])
    writer.flush()
    print(step, flush=True)
if sys.argv[5] == "close":
    writer.close()
print("done", flush=True)
sys.stdin.readline()
"""

NEW = "expected a new run directory; watch(resume_at=STEP) goes on with one"


def start(path: Path, rank: int, steps: int, job: str = "", end: str = "close") -> Writer:
    return subprocess.Popen(
        [sys.executable, "-c", RANK, str(path), str(rank), str(steps), job, end],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def together(processes: list[Writer]) -> None:
    """All have imported, then all go."""
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        print(file=process.stdin, flush=True)


def said(process: Writer, last: str) -> None:
    while (line := process.stdout.readline().strip()) != last:
        assert line, process.stderr.read()


def ended(processes: list[Writer]) -> None:
    for process in processes:
        _, told = process.communicate("\n", timeout=60)
        assert process.returncode in (0, -9), told


def test_processes_that_start_at_once_write_one_run(tmp_path: Path) -> None:
    """Each pair of creations meets in another order; an end does not wait for a start."""
    path = tmp_path / "a" / "run"
    processes = [start(path, rank, 3, "job 7") for rank in range(RANKS)]
    late = start(path, RANKS, 3, "job 7")
    together(processes)
    for process in processes:
        said(process, "done")
    assert open_run(path).state == "finished"
    together([late])
    said(late, "done")
    ended([*processes, late])
    run = open_run(path)
    assert (run.state, run.info["every"]) == ("finished", 1)
    frame = run.tensors()
    expected = [(s, r) for s in range(3) for r in range(RANKS + 1)]
    assert list(zip(frame["step"], frame["rank"], strict=True)) == expected
    assert frame["cur_amax"].tolist() == [step + rank for step, rank in expected]
    assert run.tensors(ranks=[1, 4])["rank"].unique().tolist() == [1, 4]
    assert run.steps()["rank"].tolist() == list(range(RANKS + 1)) * 3  # the writer's own
    assert list(find_runs(tmp_path)) == [path]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_ranks_come_in_any_order(order: tuple[int, ...], tmp_path: Path) -> None:
    for number, rank in enumerate(order):
        writer = RunWriter.create(tmp_path / "run", {"config": {"lr": 0.1}}, rank=rank)
        writer.append("tensors", [{"step": 5, "site": "a"}])
        writer.flush()
        run = open_run(tmp_path / "run")
        assert list(find_runs(tmp_path)) == [tmp_path / "run"]
        assert (run.state, run.info["config"]) == ("running", {"lr": 0.1})
        assert run.tensors()["rank"].tolist() == sorted(order[: number + 1])
    with pytest.raises(RunError, match="exists already"):
        RunWriter.create(tmp_path / "run", {}, rank=order[0])


def test_a_rank_that_dies_is_named_with_its_last_step(tmp_path: Path) -> None:
    path = tmp_path / "run"
    processes = [start(path, rank, 2 + rank, end="go on") for rank in range(3)]
    together(processes)
    for process in processes:
        said(process, "done")
    processes[2].kill()
    processes[2].wait()
    run = open_run(path)
    ranks = run.ranks()
    assert ranks["state"].tolist() == ["running", "running", "killed"]
    assert ranks["last_step"].tolist() == [1, 2, 3]
    assert ranks["pid"].tolist() == [process.pid for process in processes]
    assert ranks["host"].nunique() == 1
    assert run.state == "running"
    with pytest.raises(RunError, match=f"is being written by process {processes[1].pid}"):
        RunWriter.resume(path, 1, ranks=1)  # rank 1 is still there
    for process in processes[:2]:
        process.kill()
    ended(processes)
    assert run.state == "killed"


def test_kills_of_all_ranks_lose_no_flushed_step(tmp_path: Path) -> None:
    moments = random.Random(0)
    for attempt in range(3):
        path = tmp_path / f"run{attempt}"
        processes = [start(path, rank, 10_000) for rank in range(3)]
        together(processes)
        time.sleep(moments.uniform(0.1, 0.5))
        for process in processes:
            process.kill()
        outs = [process.communicate()[0].split() for process in processes]
        run = open_run(path)
        for rank, out in enumerate(outs):
            steps = run.tensors(ranks=rank)["step"].tolist()
            assert steps == list(range(len(steps)))
            assert len(steps) in (len(out), len(out) + 1)
        assert run.state == "killed"


def filled(path: Path, ranks: int, *, close: bool) -> None:
    for rank in range(ranks):
        writer = RunWriter.create(path, {}, rank=rank)
        for table in TABLE_NAMES:
            writer.append(table, [{"step": step} for step in range(6)])
        writer.flush()
        if close:
            writer.close()
            writer.set_state("running")  # so that the next rank may join
    if close:
        for rank in range(ranks):
            file = path / "run.json" if rank == 0 else path / "ranks" / str(rank) / "rank.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"state": "failed"}))


@pytest.mark.parametrize("close", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("order", [1, -1])
def test_resumed_with_another_number_of_ranks(
    order: int, ranks: int, close: bool, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    filled(path, 3, close=close)
    for rank in list(range(ranks))[::order]:
        writer = RunWriter.resume(path, 4, rank=rank, ranks=ranks)
        for table in TABLE_NAMES:
            writer.append(table, [{"step": 4}])
        writer.close()
    run = open_run(path)
    for table in TABLE_NAMES:
        rows = run.arrow(table).to_pydict()
        found = sorted(zip(rows["rank"], rows["step"], strict=True))
        kept = [(rank, step) for rank in range(3) for step in range(4)]
        assert found == sorted(kept + [(rank, 4) for rank in range(ranks)])
    states = dict(zip(run.ranks()["rank"], run.ranks()["state"], strict=True))
    assert set(states.values()) - {"left"} == {"finished"}
    assert [rank for rank, state in states.items() if state == "left"] == list(range(ranks, 3))
    assert run.state == "finished"


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_what_an_earlier_training_left_is_not_joined(rank: int, tmp_path: Path) -> None:
    path = tmp_path / "run"
    for other in {0, 1, 2} - {rank}:
        RunWriter.create(path, {"job": "one"}, rank=other)
    before = sorted((p, p.stat().st_mtime_ns) for p in path.rglob("*"))
    with pytest.raises(RunError) as error:
        RunWriter.create(path, {"job": "two"}, rank=rank)
    assert one_line(error) == f"{path}: exists already, {NEW}"
    for file in (*path.glob("run.json"), *path.glob("ranks/*/rank.json")):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"pid": 2**22 + 1}))
    with pytest.raises(RunError, match="exists already"):
        RunWriter.create(path, {}, rank=rank)  # without a job: the others must still run
    assert [p for p, _ in before] == sorted(path.rglob("*"))
    RunWriter.create(path, {"job": "one"}, rank=rank)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_rank_does_not_join_what_is_no_run(rank: int, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(RunError, match="exists already"):
        RunWriter.create(tmp_path, {}, rank=rank)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_rank_that_died_while_it_came_is_no_obstacle(tmp_path: Path) -> None:
    filled(tmp_path / "run", 1, close=False)
    (tmp_path / "run" / "ranks" / "1" / "segments").mkdir(parents=True)
    assert open_run(tmp_path / "run").ranks()["state"].tolist() == ["running", "unknown"]
    RunWriter.resume(tmp_path / "run", 4, rank=1, ranks=2)
    assert open_run(tmp_path / "run").ranks()["state"].tolist() == ["running", "running"]


def test_rank_0_may_come_when_the_run_goes_on(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", {"every": 3}, rank=1)
    writer.append("steps", [{"step": 0}])
    writer.close()
    (tmp_path / "run" / "segments").mkdir()  # rank 0 was killed while it came
    RunWriter.resume(tmp_path / "run", 1, {"every": 3}, rank=0, ranks=2).close()
    run = open_run(tmp_path / "run")
    assert run.ranks()[["rank", "state"]].to_numpy().tolist() == [[0, "finished"], [1, "finished"]]
    assert run.steps()["rank"].tolist() == [1]


@pytest.mark.parametrize("rank", [0, 1])
def test_rows_without_a_state_are_not_written_over(rank: int, tmp_path: Path) -> None:
    filled(tmp_path / "run", 3, close=False)
    folder = tmp_path / "run" / "ranks" / "1" if rank else tmp_path / "run"
    (folder / ("rank.json" if rank else "run.json")).unlink()
    with pytest.raises(RunError, match="exists already"):
        RunWriter.resume(tmp_path / "run", 0, rank=rank, ranks=3)
    assert len(list((folder / "segments").iterdir())) == 1


def test_a_damaged_rank_json_hides_no_row(tmp_path: Path) -> None:
    filled(tmp_path / "run", 3, close=False)
    (tmp_path / "run" / "ranks" / "1" / "rank.json").write_text("{")
    run = open_run(tmp_path / "run")
    assert run.ranks()["state"].tolist() == ["running", "unknown", "running"]
    assert run.steps()["rank"].tolist() == [0, 1, 2] * 6
