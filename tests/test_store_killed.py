"""The run directory survives a kill at any moment, with every flushed row and no row twice.

Killed in two ways. For real: a process that writes is sent SIGKILL at random moments, and every
step it had reported as flushed must be there. And at each single operation: `close` and `resume`
are cut off before every call that changes the disk, one after the other, so that no order of
events is left to luck. The writers are forked from one process that has imported the room once;
starting each anew would take a second a kill.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from test_store import add, closed_run, killed_run, only, write, written

from fp8lab.store import RunWriter, open_run

ROOT = Path(__file__).resolve().parents[1]

# --- real kills -------------------------------------------------------------------------------

ZYGOTE = """
import os, sys, pathlib
from fp8lab.record import TABLES
from fp8lab.store import RunWriter

def work(path):
    writer = RunWriter.create(path, {})
    os.write(1, b"-1\\n")
    for step in range(12):
        for table in TABLES:
            writer.append(table, [{"step": step, "rank": rank} for rank in (0, 1)])
        writer.flush()
        os.write(1, b"%d\\n" % step)
    writer.close()
    os.write(1, b"closed\\n")

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        work(pathlib.Path(line.strip()))
        os._exit(0)
    os.write(1, b"started %d\\n" % child)
    sys.stdin.readline()
    os.waitpid(child, 0)
    os.write(1, b"gone\\n")
"""


@pytest.fixture(scope="module")
def zygote() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", ZYGOTE],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
    assert process.returncode == 0


def killed_after(zygote: subprocess.Popen[str], path: Path, seconds: float) -> list[str]:
    """What the writer of `path` reported until it was killed, that long after its start."""
    assert zygote.stdin is not None
    assert zygote.stdout is not None
    print(path, file=zygote.stdin, flush=True)
    said = []
    while not (line := zygote.stdout.readline().strip()).startswith("started"):
        said.append(line)
    time.sleep(seconds)
    os.kill(int(line.split()[1]), signal.SIGKILL)  # not reaped yet: the number is still its own
    print("reap", file=zygote.stdin, flush=True)
    while (line := zygote.stdout.readline().strip()) != "gone":
        said.append(line)
    return said


@pytest.mark.parametrize(
    "kills", [20, pytest.param(200, marks=pytest.mark.slow, id="200 times")], ids=str
)
def test_a_kill_loses_no_flushed_step(
    kills: int, zygote: subprocess.Popen[str], tmp_path: Path
) -> None:
    moments = random.Random(kills)
    reached = set()
    for attempt in range(10 * kills):
        if attempt >= kills and len(reached) > 3:  # on a busy machine many fall on one moment
            break
        path = tmp_path / f"run{attempt}"
        said = killed_after(zygote, path, moments.uniform(0.0, 0.08))
        if not said:  # killed before the run existed
            continue
        flushed = max(int(line) for line in said if line != "closed")
        steps = written(path)
        # One more may have appeared between its rename and the report.
        assert steps in (only(range(flushed + 1)), only(range(flushed + 2)))
        state = open_run(path).state
        assert state in ("killed", "finished")
        assert state == "finished" or "closed" not in said
        reached.add(flushed)
        resumed = RunWriter.resume(path, 3)
        add(resumed, range(3, 5))
        resumed.close()
        assert written(path) == only([*steps["steps"][:3], 3, 4])
    assert len(reached) > 3, "the kills fell on the same moment"


# --- a kill at every operation ----------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def cut_off(monkeypatch: pytest.MonkeyPatch, before: int, action: Callable[[], object]) -> bool:
    """Run `action` until its operation number `before` that changes the disk; False if it ended."""
    calls = itertools.count()

    def dying(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == before:
                raise Killed
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
            patch.setattr(os, name, dying(getattr(os, name)))
        patch.setattr(Path, "touch", dying(Path.touch))
        patch.setattr(Path, "write_text", dying(Path.write_text))
        patch.setattr(pa.parquet, "write_table", dying(pa.parquet.write_table))
        patch.setattr(pa.ipc, "new_file", dying(pa.ipc.new_file))
        try:
            action()
        except Killed:
            return True
    return False


def test_flush_cut_off_anywhere_is_there_whole_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for before in itertools.count():
        path = tmp_path / f"run{before}"
        writer = write(path, range(3))
        add(writer, range(3, 5), flush_every=100)
        cut = cut_off(monkeypatch, before, writer.flush)
        steps = written(path)
        assert steps in (only(range(3)), only(range(5)))
        if not cut:
            assert steps == only(range(5))
            break
    assert before == 6  # a folder, a file a table, a rename


def test_close_cut_off_anywhere_loses_and_doubles_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for before in itertools.count():
        path = tmp_path / f"run{before}"
        writer = write(path, range(4), flush_every=2)
        cut = cut_off(monkeypatch, before, writer.close)
        assert written(path) == only(range(4))
        again = RunWriter.resume(path, 3)
        add(again, range(3, 6), flush_every=3)
        again.close()
        assert written(path) == only(range(6))
        if not cut:
            break
    assert before > 15


def killed_while_closing(path: Path, monkeypatch: pytest.MonkeyPatch, before: int) -> None:
    writer = write(path, range(6), flush_every=3)
    assert cut_off(monkeypatch, before, writer.close)


@pytest.mark.parametrize("first", ["closed", "killed", "killed while closing", "resumed"])
def test_resume_cut_off_anywhere_loses_and_doubles_nothing(
    first: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for before in itertools.count():
        path = tmp_path / f"run{before}"
        if first == "closed":
            closed_run(path)
        elif first == "killed while closing":
            killed_while_closing(path, monkeypatch, 5)
        else:
            killed_run(path)
        if first == "resumed":
            add(RunWriter.resume(path, 4), range(4, 6))
        cut = cut_off(monkeypatch, before, lambda path=path: RunWriter.resume(path, 4))
        for steps in written(path).values():
            assert steps in (list(range(4)), list(range(6)))
        again = RunWriter.resume(path, 4)
        add(again, range(4, 8), flush_every=4)
        again.close()
        assert written(path) == only(range(8))
        if not cut:
            break
    assert before > 6
