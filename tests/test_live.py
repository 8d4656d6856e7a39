"""Live views: a run that is being recorded, followed in a terminal and as a page.

For real: a process trains and records, stepped by this one, while `fp8lab tail` follows it in a
pseudo-terminal and in a pipe, and `fp8lab report --live` serves. What a frame shows is held against
rows written by hand, to the character.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import math
import os
import pty
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import sync_playwright
from rich.console import Console
from rows_by_hand import Row, write
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner, Result

from fp8lab import segments
from fp8lab.cli import app
from fp8lab.diagnosis import diagnose
from fp8lab.diagnosis.rows import Loaded
from fp8lab.live import following
from fp8lab.live.following import Curve, Follower, chosen
from fp8lab.live.frames import frame, sparkline
from fp8lab.record import Finding
from fp8lab.store import RunError, RunWriter, open_run

PROGRAM = str(Path(sys.executable).with_name("fp8lab"))
PATIENCE = 60.0  # seconds; two busy cores need a tenth
TRAINING = """
import sys
import torch
import fp8lab
from fp8lab.integrations.tensorboard import Writer
from fp8lab.lab.model import LanguageModel, ModelConfig
from torch.utils.tensorboard import SummaryWriter

torch.set_num_threads(1)
torch.manual_seed(0)
model = LanguageModel(ModelConfig(dim=16, layers=2, heads=2, context=8), seed=0)
fp8lab.convert(model, fp8lab.DelayedScaling())
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
run, board = sys.argv[1:]
with (
    SummaryWriter(board) as summary_writer,
    fp8lab.watch(
        model, run, optimizer=optimizer, every=5, flush_seconds=0.0,
        listeners=[Writer(summary_writer)],
    ) as watch,
):
    step = 0
    print("watching", flush=True)
    for order in sys.stdin:
        if order == "poison\\n":
            with torch.no_grad():
                mlp = model.layers[1].mlp
                for name, weight in mlp.named_parameters():
                    if "gate" in name or "up" in name:
                        weight[3] *= 60.0
            continue
        for step in range(step, step + int(order)):
            optimizer.zero_grad()
            loss = model.loss(torch.randint(0, 256, (2, 9)))
            loss.backward()
            optimizer.step()
            watch.step(step, loss=loss)
        step += 1
"""


class Training:
    """A process that records and takes as many steps as it is told."""

    def __init__(self, folder: Path) -> None:
        self.run, self.board = folder / "run", folder / "board"
        self.process = subprocess.Popen(
            [sys.executable, "-c", TRAINING, self.run, self.board],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "watching\n"

    def tell(self, order: int | str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(PATIENCE) == 0


class Watcher:
    """`fp8lab` in a process whose output is read while it comes: a terminal of 80 x 40, a pipe."""

    def __init__(self, *arguments: str | Path, terminal: bool = False) -> None:
        read, written = pty.openpty() if terminal else os.pipe()
        if terminal:
            fcntl.ioctl(written, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
        self.process = subprocess.Popen(
            [PROGRAM, *map(str, arguments)],
            stdin=written if terminal else subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.PIPE,
            env={k: v for k, v in os.environ.items() if k != "COLUMNS"} | {"TERM": "xterm"},
            text=True,
        )
        os.close(written)
        self._read = read
        self.raw = ""

    @property
    def output(self) -> str:
        """Without colours and moves of the cursor."""
        return re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", self.raw)

    def until(self, wanted: str, after: int = 0) -> int:
        """Read on until the text is there; where it ends."""
        deadline = time.monotonic() + PATIENCE
        while wanted not in self.output[after:]:
            is_waiting = time.monotonic() < deadline and self._more()
            assert is_waiting, f"no {wanted!r}: {self.output[-3000:]}"
        return self.output.index(wanted, after) + len(wanted)

    def ended(self) -> int:
        """The exit code, when all was read."""
        while self._more():
            pass
        os.close(self._read)
        return self.process.wait(PATIENCE)

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def _more(self) -> bool:
        if not select.select([self._read], [], [], PATIENCE)[0]:
            return False
        try:
            data = os.read(self._read, 1 << 16)
        except OSError:  # a terminal's other side is gone
            return False
        self.raw += data.decode()
        return bool(data)


@contextmanager
def closing(*things: Training | Watcher) -> Iterator[None]:
    try:
        yield
    finally:
        for thing in things:
            thing.process.kill()
            thing.process.wait()
            for stream in (thing.process.stdin, thing.process.stdout, thing.process.stderr):
                if stream is not None:
                    stream.close()


def tail(*arguments: str | Path, width: int = 80) -> Result:
    runner = CliRunner(env={"COLUMNS": str(width)})
    result = runner.invoke(app, ["tail", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def lines_of(result: Result) -> list[str]:
    return [line.rstrip() for line in result.stdout.splitlines()]


def product(step: int, **row: Any) -> Row:
    return {"step": step, "site": "layers.0.mlp:product", "cur_amax": 1.0} | row


def going_on(path: Path, steps: int = 1, info: Row | None = None) -> RunWriter:
    """A run that this process is still recording."""
    writer = RunWriter.create(path, info or {})
    add(writer, range(steps))
    return writer


def add(writer: RunWriter, steps: range, **row: Any) -> None:
    writer.append("steps", [{"step": step, "loss": 2.0 + step} for step in steps])
    writer.append("tensors", [product(step, **row) for step in steps])
    writer.flush()


# --- a training and those who watch it ------------------------------------------------------------


@pytest.mark.long
def test_a_training_is_followed_in_a_terminal_and_in_a_pipe_beside_tensorboard(
    tmp_path: Path,
) -> None:
    training = Training(tmp_path)
    screen = Watcher("tail", training.run, "--interval", "0.1", terminal=True)
    pipe = Watcher("tail", training.run, "--interval", "0.1")
    with closing(training, screen, pipe):
        screen.until("recording   no step yet")
        training.tell(20)
        seen = screen.until("recording   step 19 ")
        pipe.until("step 19  loss 5.")
        assert "saturation" not in screen.output + pipe.output
        training.tell("poison")
        training.tell(20)
        screen.until("recording   step 39 ", seen)
        alarm = "delayed saturation at layers.1.mlp:product, channel 3, since step 20"
        seen = screen.until(alarm, seen)
        pipe.until(f": {alarm}\n")
        training.end()
        screen.until("finished   step 39 ", seen)
        assert screen.ended() == pipe.ended() == 0
        assert screen.errors() == pipe.errors() == ""
    assert "\x1b[1A" in screen.raw  # drawn over the last frame
    assert screen.raw.endswith("\x1b[?25h")  # the cursor is back
    assert "\x1b" not in pipe.raw
    last = pipe.output[pipe.output.rindex(str(training.run)) :].splitlines()
    assert last[1].startswith("✓ finished   step 39 ")
    events = EventAccumulator(str(training.board))
    events.Reload()
    recorded = open_run(training.run).steps("loss").query("step % 5 == 0")
    curve = [(e.step, e.value) for e in events.Scalars("fp8lab/loss")]
    assert curve == [
        (step, float(np.float32(loss)))
        for step, loss in zip(recorded["step"], recorded["loss"], strict=True)
    ]


@pytest.mark.long
def test_a_killed_training_is_told(tmp_path: Path) -> None:
    training = Training(tmp_path)
    screen = Watcher("tail", training.run, "--interval", "0.1", terminal=True)
    with closing(training, screen):
        training.tell(3)
        seen = screen.until("recording   step 2 ")
        training.process.send_signal(signal.SIGKILL)
        training.process.wait()  # till then the kernel still knows it
        screen.until("killed: its process is gone", seen)
        assert screen.ended() == 1
        assert screen.errors() == ""


@pytest.mark.long
@pytest.mark.parametrize("terminal", [True, False])
def test_ctrl_c_ends_it_and_nothing_else(tmp_path: Path, terminal: bool) -> None:
    writer = going_on(tmp_path / "run")
    watcher = Watcher("tail", tmp_path / "run", "--interval", "0.1", terminal=terminal)
    with closing(watcher):
        watcher.until("findings  none" if terminal else "step 0  loss 2")
        watcher.process.send_signal(signal.SIGINT)
        assert watcher.ended() == 130
        assert watcher.errors() == "interrupted: what was recorded is kept\n"
    assert not terminal or "\x1b[?25h" in watcher.raw.rpartition("\x1b[?25l")[2]
    add(writer, range(1, 2))
    writer.close()


# --- what a frame shows ---------------------------------------------------------------------------


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    """Forty steps of two layers, in full every tenth; the second is clipped from the 31st on."""
    tensors = []
    for step in range(40):
        full = {"saturated": 0.0, "flushed": 0.001} if step % 10 == 0 else {}
        tensors.append(product(step, cur_amax=2.0, hot_channel=7, staleness=1.0, **full))
        worse = full and {"saturated": 0.02 * (step == 30), "flushed": 0.125}
        tensors.append(
            product(step, cur_amax=1e5, hot_channel=123, staleness=0.5 + 2.5 * (step > 30))
            | {"site": "layers.1.mlp:product"}
            | worse
        )
    write(
        tmp_path / "run",
        steps=[
            {"loss": 4.0 if step < 20 else 1.0, "grad_norm": float(step), "seconds": 0.25}
            for step in range(40)
        ],
        tensors=tensors,
        events=[{"step": 39, "kind": "nonfinite_loss", "detail": "loss is nan"}],
        info={"config": {"steps": 2000}},
    )
    return tmp_path / "run"


def test_a_frame_to_the_character(ended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ended.parent)
    finding = Finding(
        cause="delayed_saturation",
        summary="the delayed scale clipped the product in 9 steps " * 5,
        severity="high",
        confidence="high",
        site="layers.1.mlp:product",
        channel=123,
        since=31,
    )
    monkeypatch.setattr(
        following,
        "judge",
        lambda rows: diagnose(ended).__class__(run="", findings=(finding,), loss_alarm=None),
    )
    result = tail("run", "--once")
    assert result.exit_code == 0 and result.stderr == ""
    rising = "▁▁▁▂▂▂▂▂▂▃▃▃▃▃▄▄▄▄▄▄▅▅▅▅▅▅▆▆▆▆▆▇▇▇▇▇▇███"
    assert lines_of(result) == [
        "run",
        "✓ finished   step 39 of 2,000   4 steps/s",
        "",
        f"loss       {'█' * 20}{'▁' * 20}         1",
        f"grad norm  {rising}        39",
        "                                          ▲",
        f"step       0{'39':>39}",
        "",
        "findings",
        "high    delayed saturation at layers.1.mlp:product, channel 123, since step 31",
        "        the delayed scale clipped the product in 9 steps the delayed scale",
        "        clipped the product in 9 steps the delayed scale clipped the product in",
        "        9 steps the delayed scale clipped the product in 9 steps the delayed …",
        "",
        "products of step 39, shares of step 30",
        "site                           channel       amax  staleness  saturated  flushed",
        "layers.1.mlp                       123      1e+05          3        2 %     12 %",
        "layers.0.mlp                         7          2          1          0    0.1 %",
        "",
        "events",
        "step 39  nonfinite_loss: loss is nan",
    ]
    narrow = lines_of(tail("run", "--once", width=44))
    assert narrow == [
        "run",
        "✓ finished   step 39 of 2,000   4 steps/s",
        "",
        f"loss       {'█' * 11}{'▁' * 12}         1",
        "grad norm  ▁▂▂▂▂▃▃▃▄▄▄▅▅▅▆▆▆▇▇▇▇██        39",
        f"{'▲':>29}",
        f"step       0{'39':>22}",
        "",
        "findings",
        "high    delayed saturation at",
        "        layers.1.mlp:product, channel 123,",
        "        since step 31",
        "        the delayed scale clipped the",
        "        product in 9 steps the delayed scale",
        "        clipped the product in 9 steps the …",
        "",
        "products of step 39, shares of step 30",
        "site              amax  staleness  saturated",
        "…ers.1.mlp       1e+05          3        2 %",
        "…ers.0.mlp           2          1          0",
        "",
        "events",
        "step 39  nonfinite_loss: loss is nan",
    ]


def test_no_line_is_wider_than_the_terminal_and_no_frame_higher(ended: Path) -> None:
    view = Follower(ended).look()
    for width in range(1, 120, 7):
        console = Console(width=width, force_terminal=False)
        for height in (*range(6, 30, 3), None):
            with console.capture() as captured:
                console.print(frame(view, width, height))
            shown = captured.get().splitlines()
            assert max(map(len, shown)) <= width
            assert height is None or width < 30 or len(shown) < max(height, 9)


def test_the_worst_products_come_first(tmp_path: Path) -> None:
    rows: dict[str, Row] = {
        "large": {"cur_amax": 100.0, "staleness": 1.5},
        "saturated": {"cur_amax": 1.0, "saturated": 0.1},
        "clipped": {"cur_amax": 1.0, "staleness": 2.5},
        "more clipped": {"cur_amax": 1.0, "staleness": 3.0},
        "small": {"cur_amax": 1.0},
        "infinite": {"cur_amax": math.inf},
        "not a number": {"cur_amax": 1.0, "nans": 1},
    }
    write(tmp_path / "run", steps=[{}], tensors=[
        product(0) | {"site": f"{name}:product"} | row for name, row in rows.items()
    ])  # fmt: skip
    sites = Follower(tmp_path / "run").look().products["site"].str.removesuffix(":product")
    expected = "infinite, not a number, more clipped, clipped, saturated, large, small"
    assert ", ".join(sites) == expected
    assert "not finite" in tail(tmp_path / "run", "--once").stdout


def test_of_several_processes_the_worst_counts(tmp_path: Path) -> None:
    writers = [RunWriter.create(tmp_path / "run", {"job": 1}, rank) for rank in (0, 1)]
    for rank, writer in enumerate(writers):
        writer.append("steps", [{"step": 0, "loss": 7.0 + rank}])
        row = {"cur_amax": 1.0 + rank, "hot_channel": rank, "saturated": 0.2 - 0.1 * rank}
        writer.append("tensors", [product(0, **row), product(0, rank=-1, cur_amax=9.0)])
        writer.flush()
    view = Follower(tmp_path / "run").look()
    assert view.curves["loss"].values.tolist() == [7.0]
    (seen,) = view.products.to_dict("records")
    assert (seen["cur_amax"], seen["hot_channel"], seen["saturated"]) == (2.0, 1, 0.2)


def blocks(values: list[float], cells: int) -> str:
    curve = Curve(np.arange(len(values)), np.array(values))
    return sparkline(curve, 0, len(values) - 1, cells).plain


def test_a_curve_of_blocks() -> None:
    assert blocks([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0], 8) == "▁▂▃▄▅▆▇█"
    assert blocks([-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5], 8) == "▁▂▃▄▅▆▇█"
    assert blocks([1.0, 1.0, 1.0], 3) == "▁▁▁"
    assert blocks([math.nan, math.inf], 2) == "××"
    assert blocks([1.0, math.nan, 2.0, -math.inf, 4.0], 5) == "▁×▅×█"
    spike = [1.0] * 10_000
    spike[4321] = 2.0
    assert blocks(spike, 100) == "▁" * 43 + "█" + "▁" * 56
    spike[4321] = math.nan
    assert blocks(spike, 100) == "▁" * 43 + "×" + "▁" * 56
    gap = Curve(np.array([0, 1, 9]), np.array([1.0, 1.0, 2.0]))
    assert sparkline(gap, 0, 9, 10).plain == "▁▁       █"


def test_a_run_without_a_row(tmp_path: Path) -> None:
    RunWriter.create(tmp_path / "run", {})
    assert lines_of(tail(tmp_path / "run", "--once"))[1:] == ["● recording   no step yet"]


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    writer = going_on(tmp_path / "run")
    writer.close("failed", error="RuntimeError: it raised")
    result = tail(tmp_path / "run", "--once")
    assert result.exit_code == 1
    assert lines_of(result)[1].startswith("✗ failed: RuntimeError: it raised   step 0")


def test_names_are_text(tmp_path: Path) -> None:
    bad = "\x1b[2J[bold]x[/bold]\u202e\n\x07<script>"
    told = r"\x1b[2J[bold]x[/bold]\u202e\n\x07<script>"
    writer = going_on(tmp_path / bad)
    writer.append("tensors", [product(0) | {"site": f"{bad}:product", "cur_amax": math.inf}])
    writer.append("events", [{"step": 0, "kind": bad, "site": bad, "detail": bad}])
    writer.close("failed", error=bad)
    for arguments in (["--once"], ["--interval", "0.1"]):
        result = tail(tmp_path / bad, *arguments, width=200)
        assert not {"\x1b", "\x07", "\u202e"} & set(result.stdout)
        assert result.stdout.count(told) >= 6
        for line in (f"✗ failed: {told}", f"{told} ", f"step 0  {told} at {told}: {told}"):
            assert any(one.startswith(line) for one in result.stdout.splitlines()), line


# --- which run, and what is read of it ------------------------------------------------------------


def test_of_a_folder_the_newest_that_is_being_recorded(tmp_path: Path) -> None:
    def started(name: str, at: int) -> None:
        os.utime(tmp_path / name / "run.json", (at, at))

    write(tmp_path / "a", steps=[{}])
    write(tmp_path / "b", steps=[{}])
    started("a", 2000)
    started("b", 1000)
    assert chosen(tmp_path) == (tmp_path / "a", "the newest of 2 runs, none being recorded")
    going_on(tmp_path / "c")
    started("c", 500)
    assert chosen(tmp_path) == (tmp_path / "c", "the one that is being recorded")
    going_on(tmp_path / "d")
    started("d", 400)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    note = "the newest of 2 that are being recorded"
    assert chosen(tmp_path) == (tmp_path / "c", note)
    assert chosen(tmp_path / "a") == (tmp_path / "a", "")
    assert lines_of(tail(tmp_path, "--once"))[:2] == [str(tmp_path / "c")[-80:], note]


def test_no_run_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("all of it")
    for arguments in (["none", "--once"], ["file"], ["file/run"]):
        result = tail(tmp_path / arguments[0], *arguments[1:])
        assert result.exit_code == 2 and result.stdout == ""
        expected = "no run here, expected a directory with a run.json"
        assert result.stderr == f"error: {tmp_path / arguments[0]}: {expected}\n"


def test_where_there_is_no_disk_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a drive that is none: nothing of the path is there."""
    monkeypatch.setattr(Path, "exists", lambda _: False)
    with pytest.raises(RunError, match=r"^nowhere/run: no run here"):
        chosen(Path("nowhere/run"), awaiting=True)


@pytest.mark.long
@pytest.mark.parametrize("made", ["run", "run/below", None])
def test_a_run_that_is_not_there_yet_is_waited_for(tmp_path: Path, made: str | None) -> None:
    watcher = Watcher("tail", tmp_path / "run", "--interval", "0.1")
    with closing(watcher):
        watcher.until(f"{tmp_path / 'run'}: no run yet, waiting for one; Ctrl-C ends that\n")
        if made is None:
            watcher.process.send_signal(signal.SIGINT)
        else:
            writer = going_on(tmp_path / made)
            watcher.until("step 0  loss 2")
            writer.close()
        assert watcher.ended() == (130 if made is None else 0)


def test_segments_that_are_merged_meanwhile_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends between two questions about its folder."""
    going_on(tmp_path / "run")
    follower = Follower(tmp_path / "run")
    assert follower.look().age is not None
    asked = Path.stat

    def gone(path: Path, **options: Any) -> os.stat_result:
        found = asked(path, **options)
        if path.name == "segments":
            shutil.rmtree(path)
            raise FileNotFoundError(str(path))
        return found

    run = open_run(tmp_path / "run")
    monkeypatch.setattr(Path, "stat", gone)
    assert following._age(run) is None


def test_of_a_large_run_no_reader_of_the_rules_sees_older_rows(tmp_path: Path) -> None:
    writer = going_on(tmp_path / "run", steps=50)
    rows = [{"step": s, "rank": 0, "site": "m", "channel": 1} for s in range(50)]
    writer.append("channels", rows)
    writer.flush()
    recent = following._Recent(open_run(tmp_path / "run"), range(40, 50))
    assert recent.channels()["step"].tolist() == list(range(40, 50))
    assert sum(recent.reduced("channels", len, ("step",), sites="m")) == 10
    picked = Loaded(recent).picked_channels(("step",), ("m",), {1})
    assert picked["step"].tolist() == list(range(40, 50))
    assert sum(recent.reduced("steps", len)) == 50


def test_where_nothing_was_written_nothing_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = going_on(tmp_path / "run", steps=3)
    follower = Follower(tmp_path / "run")
    assert follower.look().step == 2
    read = segments.read

    def refuse(*_: Any) -> Any:
        raise AssertionError("read")

    monkeypatch.setattr(segments, "read", refuse)
    assert follower.look().step == 2
    monkeypatch.setattr(segments, "read", read)
    add(writer, range(3, 5))
    assert follower.look().step == 4


def test_a_resumed_run_takes_steps_back(tmp_path: Path) -> None:
    going_on(tmp_path / "run", steps=9).close()
    follower = Follower(tmp_path / "run")
    assert follower.look().step == 8
    RunWriter.resume(tmp_path / "run", 5)
    view = follower.look()
    assert (view.step, view.state) == (4, "running")


def test_a_small_run_is_judged_as_diagnose_does(tmp_path: Path) -> None:
    steps = 60
    rows = [{"staleness": 1.0 + 7.0 * (step > 50), "format": "E4M3"} for step in range(steps)]
    casts = {
        "recipe": "DelayedScaling",
        "scale": 3.0,
        "saturated": 0.1,
        "count": 100,
        "hot_channel": 3,
    }
    run = write(
        tmp_path / "run",
        steps=[{"loss": 2.0} for _ in range(steps)],
        tensors=[product(step, **rows[step], **casts) for step in range(steps)],
    )
    found = diagnose(run).findings
    view = Follower(run.path).look()
    assert found and set(view.findings or ()) == set(found)
    assert view.judged is None


def test_of_a_large_run_the_last_steps_are_judged_and_findings_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "JUDGED_ROWS", 20)
    monkeypatch.setattr(following, "SHARE", 1.0)
    judged: list[list[int]] = []
    finding = Finding(
        cause="token_outlier", summary="", severity="low", confidence="low", site="s", since=30
    )

    class Found:
        findings: tuple[Finding, ...] = (finding,)

    def judge(rows: Any) -> Found:
        assert len(rows.steps("loss")) == rows.steps("loss")["step"].max() + 1
        judged.append(rows.tensors("cur_amax", sites="*:product")["step"].tolist())
        return Found()

    monkeypatch.setattr(following, "judge", judge)
    writer = going_on(tmp_path / "run", steps=50)
    follower = Follower(tmp_path / "run")
    view = follower.look()
    assert judged == [list(range(30, 50))]
    assert (view.judged, view.findings) == (30, (finding,))
    assert "  (the rules see steps 30 on)" in tail(tmp_path / "run", "--once").stdout
    add(writer, range(50, 60))
    worse = Finding(
        cause="token_outlier", summary="", severity="high", confidence="low", site="s", since=45
    )
    Found.findings = (worse,)
    (told,) = follower.look().findings or ()
    assert (told.severity, told.since) == ("high", 30)
    Found.findings = ()
    add(writer, range(60, 61))
    assert [one.cause for one in follower.look().findings or ()] == ["token_outlier"]


def test_the_rules_take_a_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    judged = []

    class Found:
        findings = ()

    def judge(rows: Any) -> Found:
        judged.append(now[0])
        now[0] += 2.0
        return Found()

    monkeypatch.setattr(following, "judge", judge)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    writer = going_on(tmp_path / "run", steps=1)
    follower = Follower(tmp_path / "run")
    for step in range(1, 15):
        follower.look()
        now[0] += 3.0
        add(writer, range(step, step + 1))
    assert judged == [0.0, 20.0, 40.0]  # two seconds of every twenty
    writer.close()
    follower.look()
    assert len(judged) == 4  # at the end it is judged at once


# --- the page -------------------------------------------------------------------------------------


class Page:
    """`fp8lab report --live` and what it answers."""

    def __init__(self, run: Path, page: Path) -> None:
        self.watcher = Watcher("report", run, "--live", "--out", page)
        end = self.watcher.until("/  (Ctrl-C ends it)")
        (self.port,) = map(
            int, re.findall(r"^live: http://127\.0\.0\.1:(\d+)/", self.watcher.output[:end])
        )

    def ask(
        self, path: str, method: str = "GET", host: str | None = None
    ) -> tuple[int, bytes, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        headers = {} if host is None else {"Host": host}
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        found = answer.status, answer.read(), answer.headers
        connection.close()
        return found

    def changed(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """What `/changed` says, when it is so."""
        deadline = time.monotonic() + PATIENCE
        while not wanted(said := json.loads(self.ask("/changed")[1])):
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
        return dict(said)


@pytest.mark.long
def test_a_page_that_renews_itself(tmp_path: Path) -> None:
    writer = going_on(tmp_path / "run", steps=12)
    file = tmp_path / "page.html"
    page = Page(tmp_path / "run", file)
    with closing(page.watcher):
        status, body, headers = page.ask("/")
        assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
        assert b'<iframe src="/report"' in body
        said = page.changed(lambda said: said["number"] == 1)
        assert re.fullmatch(r"written at \d\d:\d\d:\d\d; run: 1 being recorded", said["told"])
        first = page.ask("/report")[1]
        assert first == file.read_bytes() and b"running at step 11" in first

        refused = ["/page.html", "/run/run.json", "/../page.html", "/changed/", "/report?1"]
        assert [page.ask(path)[0] for path in refused] == [404] * len(refused)
        for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
            assert page.ask("/", method)[0] == 501
        for path in ("/", "/changed", "/report"):
            for host in ("evil.example", f"evil.example:{page.port}", "127.0.0.1.evil.example", ""):
                assert page.ask(path, host=host)[0] == 421
            for host in ("localhost", "localhost:1234", "127.0.0.1"):  # a tunnel's end is elsewhere
                status, _, headers = page.ask(path, host=host)
                assert status == 200
                assert headers["Content-Security-Policy"] == "frame-ancestors 'self'"
                assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
                assert headers["X-Content-Type-Options"] == "nosniff"
                assert headers["Cache-Control"] == "no-store"
        assert listening(page.port) == {"127.0.0.1"}

        add(writer, range(12, 20))
        page.changed(lambda said: said["number"] == 2)
        second = page.ask("/report")[1]
        assert second == file.read_bytes() and b"running at step 19" in second

        file.unlink()
        file.mkdir()  # now it cannot be written
        add(writer, range(20, 21))
        said = page.changed(lambda said: "could not" in said["told"])
        assert said["number"] == 2 and said["told"].endswith("the last good one is shown")
        assert page.ask("/report")[1] == second
        file.rmdir()
        writer.close()
        said = page.changed(lambda said: said["number"] == 3)
        assert said["told"].endswith("run: 1 finished")
        assert page.ask("/report")[1] == file.read_bytes()

        page.watcher.process.send_signal(signal.SIGINT)
        assert page.watcher.ended() == 130
        assert page.watcher.errors() == "interrupted: what was recorded is kept\n"
        _, failed = page.watcher.output.splitlines()
        assert failed.startswith("the page could not be written (IsADirectoryError: ")


CHOOSE = """document.querySelectorAll("select").forEach((one) => {
  one.value = one.options.length - 1;
  one.dispatchEvent(new Event("input"));
})"""
CHOSEN = "[...document.querySelectorAll('select')].map((one) => one.selectedOptions[0]?.text ?? '')"


def test_in_a_browser_it_stays_where_it_was(tmp_path: Path) -> None:
    executable = shutil.which("chromium")
    assert executable is not None, "no chromium on PATH: apt-get install chromium"
    writer = going_on(tmp_path / "run", steps=0)
    add(writer, range(30), staleness=1.0, crest=2.0)
    served = Page(tmp_path / "run", tmp_path / "page.html")
    faults: list[str] = []
    asked: set[str] = set()
    with closing(served.watcher), sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=executable, args=arguments)
        page = browser.new_page(viewport={"width": 1000, "height": 500})
        page.set_default_timeout(PATIENCE * 1000)
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: asked.add(request.url))
        page.goto(f"http://127.0.0.1:{served.port}/")
        page.wait_for_function("number === 1")
        report = page.frames[1]
        report.evaluate("document.querySelector('details').open = true")
        report.evaluate(CHOOSE)
        chosen = report.evaluate(CHOSEN)
        assert len(set(chosen)) > 1
        report.evaluate("scrollTo(0, 300)")
        add(writer, range(30, 40), staleness=1.0, crest=2.0)
        page.wait_for_function("number === 2")
        (_, report) = page.frames
        assert "running at step 39" in report.inner_text("body")
        assert report.evaluate("scrollY") == 300
        assert report.evaluate("document.querySelector('details').open") is True
        assert report.evaluate(CHOSEN) == chosen
        assert page.inner_text("#told").endswith("run: 1 being recorded")
        served.watcher.process.kill()
        page.wait_for_function("told.textContent.startsWith('the server has ended')")
        assert "running at step 39" in report.inner_text("body")
        browser.close()
    assert {url.rpartition("/")[2] for url in asked if url[:4] == "http"} == {
        "", "changed", "report"
    }  # fmt: skip
    assert all("ERR_CONNECTION_REFUSED" in fault for fault in faults), faults


def listening(port: int) -> set[str]:
    """The addresses on which anybody on this machine listens to that port."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, number = local.split(":")
            if int(number, 16) == port and state == "0A":
                is_4 = table == "tcp"
                found.add(socket.inet_ntoa(bytes.fromhex(address)[::-1]) if is_4 else address)
    return found


def test_what_cannot_be_served_is_one_line(tmp_path: Path) -> None:
    going_on(tmp_path / "run").close()
    page = tmp_path / "page.html"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, reason in (
            (["--live", "--port", port, "--out", page], f"port {port}: Address already in use"),
            (["--port", "1234"], "--port 1234: expected --live with it"),
            (["--live", "--json"], "--live: serves a page, expected no --json"),
            (["--live", "--out", tmp_path / "page.md"], f"{tmp_path / 'page.md'}: a browser shows"),
        ):
            result = CliRunner().invoke(
                app, ["report", str(tmp_path / "run"), *map(str, arguments)]
            )
            assert result.exit_code == 2 and result.stdout == ""
            assert result.stderr.startswith(f"error: {reason}") and result.stderr.count("\n") == 1
