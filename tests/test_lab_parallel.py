"""Experiments whose runs several processes do together: `fp8lab run --processes N --parallel HOW`.

Real processes, started by torchrun, as the program starts them. A run costs a dozen seconds of CPU,
all of it imports.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import parallel_experiment
import pytest
from parallel_experiment import ARMS, EXPERIMENT, PARTS, SETUP, experiment
from torch import Tensor, nn

import fp8lab
from fp8lab.lab.experiment import Job, Part, Settings, do_job, run_experiment
from fp8lab.lab.language import train_bytes
from fp8lab.lab.train import NextByte, next_byte_loss

pytestmark = pytest.mark.long

FILE = Path(parallel_experiment.__file__)
ROOT = FILE.parents[1]


def lab(
    out: Path, *more: str, befalls: dict[str, Any] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command_of(out, *more),
        env=os.environ | {"PARALLEL_EXPERIMENT": json.dumps(befalls or {})},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def command_of(out: Path, *more: str) -> list[str]:
    program = [sys.executable, "-c", "from fp8lab.cli import app; app()", "run", str(FILE)]
    return [*program, "--out", str(out), "--workers", "1", *more]


DDP = ("--processes", "2", "--parallel", "ddp")


def test_two_processes_do_a_run_together(tmp_path: Path) -> None:
    done = lab(tmp_path / "two", *DDP, "--arm", "bf16")
    assert done.returncode == 0, done.stderr
    do_job(lambda _: None, 0, FILE, "first", "bf16", (0, tmp_path / "one", Settings()))
    run = fp8lab.open_run(tmp_path / "two" / "first" / "bf16" / "seed-0")
    one = fp8lab.open_run(tmp_path / "one")
    assert run.ranks()["state"].tolist() == ["finished", "finished"]
    config = dict(run.info["config"])
    assert (config.pop("processes"), config.pop("parallel")) == (2, "ddp")
    assert config == one.info["config"]
    typed = f"-c run {FILE.name} --out two --workers 1 {' '.join(DDP)} --arm bf16"
    assert [run.info_of(rank)["command"] for rank in range(2)] == [typed, typed]
    # In high precision a batch in two parts differs by the order of its sums alone.
    found, expected = run.info["result"], one.info["result"]
    assert found == expected | {"final_loss": pytest.approx(expected["final_loss"], rel=1e-6)}
    for rank in range(2):
        losses = run.steps(ranks=rank)["loss"].tolist()
        assert losses == pytest.approx(one.steps()["loss"].tolist(), rel=1e-6)
    assert "result" not in run.info_of(1)  # it is there once
    rows = run.tensors()
    assert rows.groupby("rank")["count"].sum().tolist() == [
        one.tensors()["count"].sum(),
        *[one.tensors()["count"].sum() / 2] * 2,
    ]


class _Started(Exception):
    """Nothing was refused."""


@pytest.mark.parametrize(
    ("parts", "settings", "ray", "told"),
    [
        (
            PARTS[:1],
            {"processes": 2},
            None,
            "parallel None, expected both or neither, parallel one of ddp",
        ),
        (PARTS[:1], {"parallel": "ddp"}, None, "processes: 1, parallel ddp, expected both or"),
        (PARTS[:1], {"processes": 0, "parallel": "ddp"}, None, "processes: 0, expected at least 1"),
        (
            PARTS[:1],
            {"processes": 2, "parallel": "zero"},
            None,
            "parallel: 'zero', expected one",
        ),
        (PARTS[:1], {"processes": 2, "parallel": "ddp"}, "auto", "processes: 2 with ray, expected"),
        (
            PARTS[:2],
            {"processes": 2, "parallel": "ddp"},
            None,
            "part alone: its training is one",
        ),
        (PARTS[2:], {"processes": 2, "parallel": "fsdp2"}, None, "arm clamped: mitigations under"),
        (PARTS[:1], {"processes": 2, "parallel": "ddp"}, None, None),
        (PARTS[2:], {"processes": 2, "parallel": "ddp"}, None, None),
        (PARTS, {}, None, None),
    ],
)
def test_what_several_processes_cannot_do_is_refused(
    parts: tuple[Part, ...],
    settings: dict[str, Any],
    ray: str | None,
    told: str | None,
    tmp_path: Path,
) -> None:
    def started(index: int, label: str) -> None:
        raise _Started

    out = tmp_path / "out"
    with pytest.raises((ValueError, _Started)) as error:
        run_experiment(
            FILE, experiment(*parts), out, ray=ray, settings=Settings(**settings), on_start=started
        )
    assert (told is None) == isinstance(error.value, _Started)
    assert told is None or (told in str(error.value) and "\n" not in str(error.value))
    assert out.exists() == (told is None)


@pytest.mark.parametrize(
    ("which", "how"), [({"parts": ["first"]}, "ddp"), ({"arms": ["bf16"]}, "fsdp2")]
)
def test_what_was_not_asked_for_hinders_nothing(
    which: dict[str, Any], how: Any, tmp_path: Path
) -> None:
    """Part `alone` is one of one process, an arm of `mixed` has mitigations."""

    def started(index: int, label: str) -> None:
        raise _Started

    mixed = replace(PARTS[2], name="mixed", arms=(*PARTS[0].arms, *PARTS[2].arms))
    parts = PARTS[:2] if how == "ddp" else (mixed,)
    settings = Settings(processes=2, parallel=how)
    more: dict[str, Any] = {"settings": settings, "on_start": started}
    with pytest.raises(_Started):
        run_experiment(FILE, experiment(*parts), tmp_path / "out", **which, **more)


@pytest.mark.slow
def test_runs_that_broke_off_are_done_again(tmp_path: Path) -> None:
    some = [*DDP, "--arm", "bf16", "--arm", "delayed", "--arm", "current"]
    broken = lab(tmp_path / "out", *some, befalls={"delayed": "killed", "current": "raises"})
    assert broken.returncode == 1
    failed = [line for line in broken.stderr.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 2
    assert failed[0].startswith("failed: first/delayed/seed-0: RuntimeError: rank 1 killed")
    assert "RuntimeError: it raised (parallel_experiment.py:" in failed[1]
    first = tmp_path / "out" / "first"
    whole = first / "current" / "seed-0" / "traceback.txt"
    assert failed[1].endswith(f"; all of the error is in {whole}")
    told = whole.read_text()
    assert "rank 1: Traceback (most" in told and "RuntimeError: it raised\nand said more\n" in told
    bf16 = fp8lab.open_run(first / "bf16" / "seed-0")
    before = bf16.info["updated"]
    states = fp8lab.open_run(first / "delayed" / "seed-0").ranks()["state"].tolist()
    assert states[1] == "killed"
    assert states[0] in ("killed", "failed", "interrupted")  # torchrun ends it, or gloo does
    again = lab(tmp_path / "out", *some)
    assert again.returncode == 0, again.stderr
    for arm in ARMS:
        run = fp8lab.open_run(first / arm.name / "seed-0")
        assert run.ranks()["state"].tolist() == ["finished", "finished"]
        assert run.steps(ranks=1)["step"].tolist() == [0, 1, 2, 3]
    assert fp8lab.open_run(bf16.path).info["updated"] == before
    other = lab(tmp_path / "out", "--processes", "2", "--parallel", "fsdp2")
    assert other.returncode == 2
    assert "holds runs with" in other.stderr


class InParts(NextByte):
    """As two processes share a batch: each part's gradients as its own, and then their mean."""

    are_halved = False

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        for parameter in () if self.are_halved else model.parameters():
            parameter.register_hook(lambda gradient: gradient / 2.0)  # type: ignore[no-untyped-call]
        self.are_halved = True
        tokens = self.text.batch(step, seed=self._seed, batch=self._batch, context=self._context)
        with fp8lab.autocast():
            first, second = (next_byte_loss(model, part) for part in tokens.chunk(2))
        return first + second, {"mean": (first.item() + second.item()) / 2.0}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp2", "tensor_parallel"])
def test_processes_may_share_the_model(how: str, tmp_path: Path) -> None:
    """What differs are sums in another order: down's shares of tensor parallelism, and the norm
    by which gradients are clipped. Why that stays below 1e-6 is told in test_distributed, which
    holds a training without clipping to equality."""
    done = lab(tmp_path / "two", "--processes", "2", "--parallel", how, "--arm", "delayed")
    assert done.returncode == 0, done.stderr
    setup = SETUP if how == "tensor_parallel" else replace(SETUP, task=InParts)
    about = {"experiment": "one", "part": "first", "arm": ARMS[1], "seed": 0}
    job = Job(**about, path=tmp_path / "one", settings=Settings())
    train_bytes(job, lambda *_: None, setup=setup)
    run = fp8lab.open_run(tmp_path / "two" / "first" / "delayed" / "seed-0")
    one = fp8lab.open_run(tmp_path / "one").steps()
    expected = one["loss" if how == "tensor_parallel" else "mean"].tolist()
    assert run.steps(ranks=1)["loss"].tolist() == pytest.approx(expected, rel=1e-6)
    assert EXPERIMENT.name == run.info["config"]["experiment"]


def alive(pids: Iterable[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
def test_ctrl_c_closes_the_run_of_all_processes(tmp_path: Path) -> None:
    path = tmp_path / "out" / "first" / "bf16" / "seed-0"
    process = subprocess.Popen(
        command_of(tmp_path / "out", *DDP, "--arm", "bf16", "--steps", "10000"),
        env=os.environ | {"PARALLEL_EXPERIMENT": json.dumps({"pause": 0.05})},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (path / "ranks" / "1" / "segments").exists() or not list(
        (path / "ranks" / "1" / "segments").iterdir()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    ranks = fp8lab.open_run(path).ranks()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "interrupted: what was recorded is kept" in error
    assert alive(ranks["pid"]) == []
    states = fp8lab.open_run(path).ranks()["state"].tolist()
    assert "interrupted" in states
    assert set(states) <= {"interrupted", "failed"}  # by the connection to the other, maybe
