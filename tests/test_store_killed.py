"""The run directory survives a kill at any moment, with every flushed row and no row twice.

Killed in two ways. For real: a process that watches a training is sent SIGKILL at random moments,
and every step it had reported as flushed must be there. And at each single operation: `close` and
`resume` are cut off before every call that changes the disk, one after the other, so that no order
of events is left to luck. The watchers are forked from one process that has watched once; starting
each anew would take seconds a kill.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from test_store import add, closed_run, killed_run, only, write, written
from typer.testing import CliRunner

from fp8lab.cli import app
from fp8lab.store import Run, RunWriter, open_run

ROOT = Path(__file__).resolve().parents[1]

# --- real kills -------------------------------------------------------------------------------

ZYGOTE = """
import os, sys, pathlib, tempfile, time
import torch
from torch import nn
import fp8lab

torch.set_num_threads(1)

class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 16), nn.Linear(8, 16)
        self.down_proj, self.act_fn = nn.Linear(16, 8), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

def work(path, say):
    torch.manual_seed(0)
    model = Gated()
    optimizer = torch.optim.AdamW(model.parameters())
    with fp8lab.watch(model, path, optimizer=optimizer, every=1) as watching:
        say(b"-1\\n")
        for step in range(18):  # so that sixteen flushes are merged meanwhile
            loss = model(torch.randn(4, 8)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watching.step(step, loss=loss)
            watching.event(step, "flushed")  # an event is on the disk when this returns
            say(b"%d\\n" % step)
    say(b"closed\\n")

with tempfile.TemporaryDirectory() as warm:
    work(pathlib.Path(warm) / "first", lambda told: None)  # imports what is imported late
    began = time.monotonic()
    work(pathlib.Path(sys.argv[1]), lambda told: None)
    os.write(1, b"%f\\n" % (time.monotonic() - began))

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        work(pathlib.Path(line.strip()), lambda told: os.write(1, told))
        os._exit(0)
    os.write(1, b"started %d\\n" % child)
    sys.stdin.readline()
    os.waitpid(child, 0)
    os.write(1, b"gone\\n")
"""


@pytest.fixture
def zygote(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", ZYGOTE, str(tmp_path / "whole")],
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


def recorded(path: Path, whole: Run) -> list[int]:
    """The steps of a watched run, whose rows must be those of the run that nobody killed."""
    run = open_run(path)
    steps = run.steps().drop(columns="seconds")
    part = range(len(steps))
    pd.testing.assert_frame_equal(steps, whole.steps(steps=part).drop(columns="seconds"))
    pd.testing.assert_frame_equal(run.tensors(), whole.tensors(steps=part))
    pd.testing.assert_frame_equal(run.channels(), whole.channels(steps=part))
    assert run.events()["step"].tolist() in (list(part), list(part)[:-1])
    return list(part)


def listing(folder: Path) -> list[dict[str, Any]]:
    done = CliRunner().invoke(app, ["ls", str(folder), "--json"])
    assert done.exit_code == 0, done.output
    return list(json.loads(done.stdout))


@pytest.mark.long
@pytest.mark.parametrize(
    "kills", [15, pytest.param(200, marks=pytest.mark.slow, id="200 times")], ids=str
)
def test_a_kill_loses_no_flushed_step(
    kills: int, zygote: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert zygote.stdout is not None
    seconds = float(zygote.stdout.readline())  # that a run takes
    moments = random.Random(kills)
    reached: Counter[str] = Counter()
    whole = open_run(tmp_path / "whole")
    for attempt in range(10 * kills):
        if attempt >= kills and len(reached) > 3:  # on a busy machine many fall on one moment
            break
        path = tmp_path / f"run{attempt}"
        said = killed_after(zygote, path, moments.uniform(0.0, 1.1 * seconds))
        states = [row["state"] for row in listing(path)] if path.exists() else []
        if not said:  # killed before the run existed
            shutil.rmtree(path, ignore_errors=True)
            reached["not created"] += 1
            continue
        flushed = max(int(line) for line in said if line != "closed")
        steps = recorded(path, whole)
        # One more may have appeared between its rename and the report.
        assert steps in (list(range(flushed + 1)), list(range(flushed + 2)))
        assert states in (["killed"], ["finished"])
        assert states == ["finished"] or "closed" not in said
        reached["closed" if "closed" in said else f"step {flushed}"] += 1
        resumed = RunWriter.resume(path, 3)
        resumed.append("steps", [{"step": step} for step in (3, 4)])
        resumed.close()
        assert open_run(path).steps()["step"].tolist() == [*steps[:3], 3, 4]
    assert len(listing(tmp_path)) == 1 + sum(reached.values()) - reached["not created"]
    assert len(reached) > 3, "the kills fell on the same moment"
    print(f"{attempt} kills: {dict(reached)}")


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
        patch.setattr(pa.parquet, "ParquetWriter", dying(pa.parquet.ParquetWriter))
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
    assert before == 7  # two folders, a file a table, a rename


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


@pytest.mark.long
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
