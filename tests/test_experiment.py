"""Experiments in real processes: what a run leaves behind, whatever befalls it or its neighbours.

`tiny_experiment.py` is run; a worker costs the import of torch (a second or two), so that one
experiment serves many questions. Nothing is simulated: runs are killed, and Ctrl-C is a signal to
the process group. That nobody is left is read off the pipe of stderr: it ends with its last holder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import operator
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fp8lab.lab.arm import Arm
from fp8lab.lab.experiment import (
    Experiment,
    Part,
    Report,
    load_experiment,
    run_experiment,
)
from fp8lab.lab.result import runs_of
from fp8lab.lab.workers import Workers
from fp8lab.mitigations import ClampedSwiGLU, HadamardProduct, QKClip, SmoothSwiGLU
from fp8lab.monitor.about import command
from fp8lab.plan import Plan
from fp8lab.recipe import Float8CurrentScaling, HighPrecision
from fp8lab.record import TABLES
from fp8lab.store import Run, RunError, RunWriter, find_runs, open_run

pytestmark = pytest.mark.long

TINY = Path(__file__).with_name("tiny_experiment.py")
ARMS = {"first": ("bf16", "current"), "second": ("bf16", "hot")}
LABELS = [f"{part}/{arm}/seed-{seed}" for part in ARMS for seed in (0, 1) for arm in ARMS[part]]


def run_tiny(out: Path, **more: Any) -> list[str]:
    file, experiment = load_experiment(str(TINY))
    return run_experiment(file, experiment, out, **more)


def rows(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Everything recorded, less the clock."""
    tables = {table: run.arrow(table) for table in TABLES}
    tables["steps"] = tables["steps"].drop_columns(["seconds"])
    return {name: table.to_pylist() for name, table in tables.items()}


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below: when it was written, and what is in it."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@dataclasses.dataclass
class Told:
    """What the callbacks were told, in order."""

    labels: dict[int, str] = dataclasses.field(default_factory=dict)
    reports: list[Report] = dataclasses.field(default_factory=list)
    ends: dict[int, str | None] = dataclasses.field(default_factory=dict)

    def listen(self) -> dict[str, Any]:
        return {
            "on_start": self.labels.__setitem__,
            "on_report": self.reports.append,
            "on_end": self.ends.__setitem__,
        }


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Told]]:
    """The whole experiment, by two workers; not to be written to."""
    out, told = tmp_path_factory.mktemp("tiny") / "runs", Told()
    assert run_tiny(out, workers=2, **told.listen()) == []
    before = snapshot(out)
    yield out, told
    assert snapshot(out) == before


# --- what is left behind ------------------------------------------------------------------------


def test_every_run_has_its_directory(done: tuple[Path, Told]) -> None:
    out, _ = done
    assert [str(path.relative_to(out)) for path in find_runs(out)] == sorted(LABELS)
    for label in LABELS:
        run = open_run(out / label)
        config = run.info["config"]
        assert "/".join([config["part"], config["arm"], f"seed-{config['seed']}"]) == label
        assert run.state == "finished" and config["experiment"] == "tiny"
        assert run.info["result"]["diverged_at"] == (1 if "hot" in label else None)
        assert len(run.steps()) == (2 if "hot" in label else 4)
    assert {path.name for path in out.iterdir()} == {"experiment.json", *ARMS}


def test_experiment_json_is_the_experiment_and_the_settings(done: tuple[Path, Told]) -> None:
    out, _ = done
    _, experiment = load_experiment(str(TINY))
    described = json.loads((out / "experiment.json").read_text())
    settings = {"steps": None, "text": None, "quick": False}
    files = [hashlib.sha256(TINY.read_bytes()).hexdigest()[:16]]
    made_by = {"files": files, "commands": [command()]}
    assert described == experiment.describe() | {"settings": settings} | made_by
    assert described["prediction"] == "It does." and described["limits"] == ["It is tiny."]
    hot = described["parts"][1]["arms"][1]
    assert hot == {
        "name": "hot",
        "title": "BF16, too hot",
        "recipe": {"recipe": "HighPrecision"},
        "mitigations": [],
        "changes_function": False,
        "predicted": "diverges",
        "options": {"hotter": 1e8},
    }


def test_what_the_callbacks_are_told(done: tuple[Path, Told]) -> None:
    _, told = done
    prepared = [f"first/prepare/seed-{seed}" for seed in (0, 1)]
    assert told.labels == dict(enumerate([*prepared, *LABELS]))
    assert told.ends == dict.fromkeys(told.labels)
    for index, label in told.labels.items():
        reports = [report for report in told.reports if report.index == index]
        steps = [report.step for report in reports]
        assert steps == sorted(set(steps))
        assert {report.steps for report in reports} == {1 if "prepare" in label else 4}
        if "hot" not in label:  # the last step is always told; that one did not reach it
            assert steps[-1] == reports[-1].steps


def test_one_worker_gives_the_same_rows_as_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: tuple[Path, Told]
) -> None:
    out, told = done[0], Told()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # a worker has one, whatever it is told
    assert run_tiny(tmp_path / "runs", workers=1, **told.listen()) == []
    assert list(told.ends) == list(told.labels)
    for label in LABELS:
        run = open_run(tmp_path / "runs" / label)
        assert rows(run) == rows(open_run(out / label)), label
        assert run.info["config"]["threads"] == 1
    zero, one = (open_run(out / "second" / "bf16" / f"seed-{seed}") for seed in (0, 1))
    assert zero.steps()["loss"].tolist() != one.steps()["loss"].tolist()


def test_what_is_finished_is_left_alone(done: tuple[Path, Told]) -> None:
    out, _ = done
    before, told = snapshot(out), Told()
    assert run_tiny(out, **told.listen()) == []
    assert told.labels == {} and snapshot(out) == before


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"mitigations": (ClampedSwiGLU(limit=0.01),)}, "mitigations"),
        ({"mitigations": (QKClip(),)}, "mitigations"),
        ({"options": {"hotter": 1e7}}, "options"),
        ({"plan": Plan(recipe=Float8CurrentScaling())}, "recipe"),
    ],
    ids=str,
)
def test_a_finished_run_of_another_arm_is_refused(
    tmp_path: Path, done: tuple[Path, Told], change: dict[str, Any], key: str
) -> None:
    """A mitigation's parameter, here, is all that is new: the arm's name says nothing of it."""
    file, experiment = load_experiment(str(TINY))
    out, label = tmp_path / "runs", "second/hot/seed-0"
    shutil.copytree(done[0], out)
    first, second = experiment.parts

    def run_with(**changes: Any) -> dict[int, str]:
        told = Told()
        arms = (second.arms[0], dataclasses.replace(second.arms[1], **changes))
        parts = (first, dataclasses.replace(second, arms=arms))
        changed = dataclasses.replace(experiment, parts=parts)
        assert run_experiment(file, changed, out, **told.listen()) == []
        return told.labels

    json_file = out / label / "run.json"
    if key == "mitigations":
        (wanted,) = change[key]
        other = {"name": type(wanted).__name__, "limit": 10.0}
        info = json.loads(json_file.read_text())
        info["config"][key] = [other]
        json_file.write_text(json.dumps(info))
    before = snapshot(out)
    with pytest.raises(RunError) as caught:
        run_with(**change)
    assert str(caught.value).startswith(f"{out / label}: a finished run with {key}=")
    assert str(caught.value).endswith(", or a new folder")
    assert snapshot(out) == before
    if key == "mitigations":  # with nothing but names, as it was said before, or nothing at all
        for said in ({key: [type(wanted).__name__]}, {}):
            kept = {name: one for name, one in info["config"].items() if name != key}
            for seed in (0, 1):
                json_file = out / "second" / "hot" / f"seed-{seed}" / "run.json"
                json_file.write_text(json.dumps(info | {"config": kept | said}))
            assert run_with(**change) == {}


def described(*mitigations: Any) -> Any:
    plan = Plan(recipe=HighPrecision())
    arm = Arm(name="a", title="A", plan=plan, mitigations=mitigations)
    said = arm.describe()["mitigations"]
    assert json.loads(json.dumps(said, allow_nan=False)) == said
    return said


def test_arms_that_differ_in_a_parameter_are_described_apart() -> None:
    smooth = [
        *(SmoothSwiGLU(), SmoothSwiGLU(timing="delayed"), SmoothSwiGLU.reference_code()),
        *(SmoothSwiGLU.fog_baseline(), ClampedSwiGLU.gpt_oss(), ClampedSwiGLU.step()),
    ]
    said = [json.dumps(described(one)) for one in smooth]
    assert len(set(said)) == len(smooth)
    assert described(HadamardProduct(block=4)) != described(HadamardProduct(block=8))
    assert described(QKClip(tau=3.0), QKClip()) == [
        {"name": "QKClip", "tau": 3.0},
        {"name": "QKClip", "tau": 100.0},
    ]

    class Group:
        """What JSON cannot hold is told by its repr, without the address."""

    one, other = (SmoothSwiGLU.reference_code(group=Group()) for _ in range(2))
    assert described(one) == described(other) != described(SmoothSwiGLU.reference_code())


# --- what befalls a run -------------------------------------------------------------------------


def test_what_fails_or_dies_is_told_in_a_line_and_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: tuple[Path, Told]
) -> None:
    out, told = tmp_path / "runs", Told()
    fates = {
        "first/bf16/seed-0": "raises",
        "first/current/seed-0": "killed",
        "first/prepare/seed-1": "raises",
        "second/bf16/seed-0": "terminated",
        "second/bf16/seed-1": "exits",
    }
    monkeypatch.setenv("TINY_EXPERIMENT", json.dumps(fates))
    failures = run_tiny(out, **told.listen())
    reasons = {
        "first/bf16/seed-0": "RuntimeError: it raised",
        "first/current/seed-0": "its process ended with exit code -9",
        "first/prepare/seed-1": "ValueError: nothing prepared",
        "second/bf16/seed-0": "its process ended with exit code 0",
        "second/bf16/seed-1": "SystemExit: 3",
    }
    assert {one.split(" (tiny")[0] for one in failures} == {f"{k}: {v}" for k, v in reasons.items()}
    whole = "first/bf16/seed-0/traceback.txt"
    assert f"; all of the error is in {out / whole}" in "".join(failures)
    assert (out / whole).read_text().endswith("RuntimeError: it raised\nand said more\n")
    whole = "first/prepare-seed-1-traceback.txt"
    assert f"; all of the error is in {out / whole}" in "".join(failures)
    assert (out / whole).read_text().endswith("ValueError: nothing prepared\n")
    unprepared = {"first/bf16/seed-1", "first/current/seed-1"}
    ends = {told.labels[index]: error for index, error in told.ends.items()}
    assert ends.keys() == {*LABELS, "first/prepare/seed-0", "first/prepare/seed-1"} - unprepared
    assert sorted(filter(None, ends.values())) == sorted(failures)
    states = {str(path.relative_to(out)): open_run(path).state for path in find_runs(out)}
    assert states == dict.fromkeys(set(LABELS) - unprepared, "finished") | {
        "first/bf16/seed-0": "failed",
        "first/current/seed-0": "killed",
        "second/bf16/seed-0": "interrupted",
        "second/bf16/seed-1": "failed",
    }
    for label, state in states.items():
        if state != "finished":  # the steps before are there
            assert open_run(out / label).steps()["step"].tolist() == [0, 1]

    # And of one no more is left than a process leaves that is killed while it makes the directory.
    (out / "first" / "bf16" / "seed-1" / "segments").mkdir(parents=True)
    monkeypatch.delenv("TINY_EXPERIMENT")
    kept = {label: snapshot(out / label) for label in states if states[label] == "finished"}
    again = Told()
    assert run_tiny(out, workers=1, **again.listen()) == []
    assert set(again.labels.values()) == {*reasons, *unprepared, "first/prepare/seed-0"}
    assert {label: snapshot(out / label) for label in kept} == kept
    for label in LABELS:
        assert rows(open_run(out / label)) == rows(open_run(done[0] / label)), label
    assert not [*out.rglob("*traceback.txt")]


def test_a_training_that_never_watched_is_a_run_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: tuple[Path, Told]
) -> None:
    out, which = tmp_path / "runs", {"parts": ["second"], "arms": ["bf16"]}
    raised, killed = (out / "second" / "bf16" / f"seed-{seed}" for seed in (0, 1))
    fates = {"second/bf16/seed-0": "raises early", "second/bf16/seed-1": "killed early"}
    monkeypatch.setenv("TINY_EXPERIMENT", json.dumps(fates))
    for _ in range(2):  # what a failure leaves hinders no second one
        failures = run_tiny(out, workers=1, **which)
        reasons = [open_run(path).info["error"] for path in (raised, killed)]
        assert reasons[0].startswith("RuntimeError: it never began (tiny_experiment.py:")
        assert reasons[1] == "its process ended with exit code -9"
        whole = raised / "traceback.txt"
        assert failures == [
            f"second/bf16/seed-0: {reasons[0]}; all of the error is in {whole}",
            f"second/bf16/seed-1: {reasons[1]}",
        ]
        assert whole.read_text().endswith("RuntimeError: it never began\nand said more\n")
        assert whole.read_text().count("Traceback") == 1
    assert [path.relative_to(out).as_posix() for path in find_runs(out)] == [*fates]
    for run in (open_run(raised), open_run(killed)):
        finished = open_run(done[0] / run.path.relative_to(out)).info["config"]
        assert run.state == "failed" and len(run.steps()) == 0
        assert run.info["config"] == {k: finished[k] for k in run.info["config"]}
    monkeypatch.delenv("TINY_EXPERIMENT")
    assert run_tiny(out, workers=1, **which) == []
    for path in (raised, killed):
        assert rows(open_run(path)) == rows(open_run(done[0] / path.relative_to(out)))
        assert not (path / "traceback.txt").exists()


def test_a_run_that_cannot_be_found_again_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Watched at another path, or without the config that names its arm and seed."""
    out, which = tmp_path / "runs", {"parts": ["second"], "arms": ["bf16"]}
    fates = {"second/bf16/seed-0": "elsewhere", "second/bf16/seed-1": "unnamed"}
    monkeypatch.setenv("TINY_EXPERIMENT", json.dumps(fates))
    lost, unnamed = (out / label for label in fates)
    reasons = {
        lost: f"ValueError: no run at {lost}: expected watch(model, job.path, …)",
        unnamed: "ValueError: its run was recorded with config experiment=None, not 'tiny': "
        "expected watch(…, config=job.config(…))",
    }
    assert run_tiny(out, workers=1, **which) == [
        f"{path.relative_to(out)}: {reason}; all of the error is in {path / 'traceback.txt'}"
        for path, reason in reasons.items()
    ]
    assert open_run(lost).state == "failed" and open_run(lost).info["error"] == reasons[lost]
    expected = f"{unnamed}: its config says no arm and seed, expected watch(…, config=job.config"
    with pytest.raises(RunError) as caught:
        runs_of(out, "second")
    assert str(caught.value).startswith(expected)
    shutil.rmtree(tmp_path / "elsewhere")
    monkeypatch.delenv("TINY_EXPERIMENT")
    assert run_tiny(out, workers=1, **which) == []


def test_finished_runs_of_another_version_of_the_file_are_told(
    tmp_path: Path, done: tuple[Path, Told]
) -> None:
    """Nothing but the file knows of a learning rate in its code."""
    out, file, notes = tmp_path / "runs", tmp_path / TINY.name, list[str]()
    shutil.copytree(done[0], out)
    file.write_text(TINY.read_text().replace("lr=0.01", "lr=0.02"))
    before, now = (hashlib.sha256(one.read_bytes()).hexdigest()[:16] for one in (TINY, file))

    def told(file: Path) -> list[str]:
        notes.clear()
        assert run_experiment(*load_experiment(str(file)), out, on_note=notes.append) == []
        return notes

    assert told(TINY) == []
    of = f"another version of {TINY.name} (SHA-256 {before}, now {now}): another --out runs it"
    assert told(file) == [f"{out}: 8 finished runs are kept, made by {of} as it is now"]
    shutil.rmtree(out / "second" / "hot" / "seed-1")
    assert told(file) == [f"{out}: 7 finished runs are kept, made by {of} as it is now"]
    assert told(file) == [f"{out}: 8 finished runs are kept, some made by {of} as it is now"]


def unfinished(path: Path, state: str) -> None:
    RunWriter.create(path, {}).set_state(state)


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "second" / "hot" / "seed-0"
    run_tiny(tmp_path / "runs", arms=[])
    unfinished(path, "running")  # by this process, which lives
    before = snapshot(tmp_path)
    with pytest.raises(RunError) as caught:
        run_tiny(tmp_path / "runs", arms=["hot"])
    assert str(caught.value) == f"{path}: is being written by process {os.getpid()}"
    assert snapshot(tmp_path).keys() == before.keys()


def test_a_folder_where_a_run_should_be_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "second" / "hot" / "seed-0"
    run_tiny(tmp_path / "runs", arms=[])
    path.mkdir(parents=True)
    (path / "thesis.txt").write_text("all of it")
    with pytest.raises(RunError, match="no run here"):
        run_tiny(tmp_path / "runs", arms=["hot"])
    assert (path / "thesis.txt").read_text() == "all of it"


def test_a_worker_that_dies_while_it_has_nothing_to_do_is_replaced() -> None:
    heard: list[str] = []
    with Workers(1) as pool:
        for index, word in enumerate(("one", "two")):
            pool.do({index: (operator.call, (word,))}, heard.append, lambda *_: None)
            for process in multiprocessing.active_children():
                process.kill()
                process.join()
    assert heard == ["one", "two"]


# --- what is refused ----------------------------------------------------------------------------


def test_an_unknown_arm_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        run_tiny(tmp_path / "runs", arms=["hot", "cold"])
    assert str(caught.value) == "arm cold: expected some of bf16, current, hot"
    with pytest.raises(ValueError, match="workers: 0, expected at least 1"):
        run_tiny(tmp_path / "runs", workers=0)
    with pytest.raises(ValueError, match=r"^arm hot: expected some of bf16, current$"):
        run_tiny(tmp_path / "runs", parts=["first"], arms=["hot"])
    assert list(tmp_path.iterdir()) == []


def test_an_arm_and_a_seed_that_no_part_has_together_are_refused(tmp_path: Path) -> None:
    file, experiment = load_experiment(str(TINY))
    first, second = experiment.parts
    parts = first, dataclasses.replace(second, seeds=(2,))
    with pytest.raises(ValueError, match=r"^arm hot with seed 0: expected ones that a part has"):
        run_experiment(
            file,
            dataclasses.replace(experiment, parts=parts),
            tmp_path / "runs",
            arms=["hot"],
            seeds=[0],
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"notes.txt": "mine"}, "exists and holds no experiment, expected a new folder"),
        ({"experiment.json": "{"}, "exists and holds no experiment, expected a new folder"),
        ({"experiment.json": "[]"}, "exists and holds no experiment, expected a new folder"),
        ({"experiment.json": "{}"}, "exists and holds no experiment, expected a new folder"),
        (
            {"experiment.json": '{"name": "large", "settings": {}}'},
            "holds experiment 'large', expected 'tiny'",
        ),
        (
            {"experiment.json": '{"name": "tiny", "settings": {"steps": 2, "text": null}}'},
            "holds runs with steps=2, not the experiment's own settings: "
            "expected the same, or another folder as --out",
        ),
        (
            {"experiment.json": '{"name": "tiny", "settings": {}, "prediction": "It does not."}'},
            "holds runs from before this prediction was written: "
            "expected the same, or another folder as --out",
        ),
    ],
)
def test_a_folder_that_holds_something_else_is_refused(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = snapshot(tmp_path)
    with pytest.raises(RunError) as caught:
        run_tiny(tmp_path)
    assert str(caught.value) == f"{tmp_path}: {message}"
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, ": no such file"),
        ("\0", ": SyntaxError: source code string cannot contain null bytes"),
        ("x = 1\ny = (2\n", ": SyntaxError: '(' was never closed (mine.py, line 2)"),
        ("x = 1\n\nprint(y)\n", ": NameError: name 'y' is not defined (mine.py:3)"),
        ("def f():\n    raise ValueError\n\nf()\n", ": ValueError (mine.py:2)"),
        ("import nowhere\n", ": ModuleNotFoundError: No module named 'nowhere' (mine.py:1)"),
        ("import uuid\nuuid.UUID('x')\n", ": ValueError: badly formed hexadecimal UUID string (m"),
        ("x = 1\n", ": expected a value EXPERIMENT of type Experiment"),
        ("EXPERIMENT = 'mine'\n", ": expected a value EXPERIMENT of type Experiment"),
    ],
)
def test_a_file_that_is_no_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)  # a long path would be shortened
    if text is not None:
        Path("mine.py").write_text(text)
    with pytest.raises(ValueError) as caught:
        load_experiment("mine.py")
    assert str(caught.value).startswith(f"experiment mine.py{message}")
    assert "\n" not in str(caught.value) and not str(caught.value).endswith(": ")


def test_an_experiment_by_name() -> None:
    file, experiment = load_experiment("swiglu_divergence")
    assert file.name == "swiglu_divergence.py" and experiment.name == "swiglu_divergence"
    experiments = ", ".join(sorted(path.stem for path in file.parent.glob("*.py")))
    with pytest.raises(ValueError) as caught:
        load_experiment("large")
    assert str(caught.value) == (
        f"experiment 'large': expected a .py file or one of: {experiments}"
    )


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", "-a", "hot"])
def test_names_are_distinct_and_name_a_folder(name: str) -> None:
    _, experiment = load_experiment(str(TINY))
    _, second = experiment.parts
    renamed = dataclasses.replace(second.arms[0], name=name)
    with pytest.raises(ValueError, match=f"Part 'second': arms: '{name}', expected distinct"):
        dataclasses.replace(second, arms=(renamed, *second.arms[1:]))

    def with_parts(*parts: Part) -> Experiment:
        return dataclasses.replace(experiment, parts=parts)

    if name != "hot":
        with pytest.raises(ValueError, match=f"Experiment: parts: '{name}', expected distinct"):
            with_parts(dataclasses.replace(second, name=name))
        with pytest.raises(ValueError, match=f"Experiment: name: '{name}', expected distinct"):
            dataclasses.replace(experiment, name=name)
    with pytest.raises(ValueError, match="Experiment: parts: 'second', expected distinct"):
        with_parts(second, second)


# --- Ctrl-C, and an end that is worse -----------------------------------------------------------


def start(out: Path, pause: float) -> subprocess.Popen[str]:
    program = [sys.executable, "-c", "from fp8lab.cli import app; app()"]
    return subprocess.Popen(
        [*program, "run", str(TINY), "--out", str(out), "--arm", "bf16", "--steps", "1000"],
        env=os.environ | {"TINY_EXPERIMENT": json.dumps({"pause": pause})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and stderr, once the last process that holds stderr is gone."""
    try:
        _, told = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, told


def steps_on_disk(out: Path) -> list[int]:
    return [len(list(path.glob("segments/0*"))) for path in find_runs(out)]


@pytest.mark.parametrize("to_all", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_ctrl_c_ends_everyone_and_keeps_what_was_recorded(tmp_path: Path, to_all: bool) -> None:
    process = start(tmp_path / "runs", pause=0.05)
    wait_for(lambda: len(c := steps_on_disk(tmp_path / "runs")) == 2 and min(c) >= 2, process)
    (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
    assert ended(process) == (130, "interrupted: what was recorded is kept\n")
    for path in find_runs(tmp_path / "runs"):
        run = open_run(path)
        assert run.state == "interrupted"
        assert run.steps()["step"].tolist() == list(range(len(run.steps())))
        assert len(run.steps()) >= 2


def test_after_ctrl_c_no_bar_is_drawn_any_more(tmp_path: Path) -> None:
    terminal, far = pty.openpty()
    program = [sys.executable, "-c", "from fp8lab.cli import app; app()", "run", str(TINY)]
    process = subprocess.Popen(
        [*program, "--out", str(tmp_path / "runs"), "--arm", "hot"],
        env=os.environ | {"TERM": "xterm", "TINY_EXPERIMENT": json.dumps({"pause": 0.5})},
        stdin=far,
        stdout=far,
        stderr=far,
        start_new_session=True,
    )
    os.close(far)
    printed, asked = b"", False
    with suppress(OSError):  # so a terminal ends that nobody holds any more
        while chunk := os.read(terminal, 1 << 16):
            printed += chunk
            if not asked and b" 0/2" in printed:
                os.killpg(process.pid, signal.SIGINT)
                asked = True
    os.close(terminal)
    assert process.wait() == 130
    _, mark, after = printed.partition(b"interrupted: the runs that are under way")
    assert mark and after == b" are being closed\r\ninterrupted: what was recorded is kept\r\n"


def test_ctrl_c_while_the_workers_start(tmp_path: Path) -> None:
    process = start(tmp_path / "runs", pause=0.0)
    wait_for((tmp_path / "runs" / "experiment.json").exists, process)
    time.sleep(0.5)  # the workers import torch
    os.killpg(process.pid, signal.SIGINT)
    assert ended(process) == (130, "interrupted: what was recorded is kept\n")


@pytest.mark.slow
def test_workers_do_not_outlive_their_parent(tmp_path: Path) -> None:
    process = start(tmp_path / "runs", pause=0.05)
    wait_for(lambda: len(c := steps_on_disk(tmp_path / "runs")) == 2 and min(c) >= 2, process)
    process.kill()
    assert ended(process) == (-signal.SIGKILL, "")
    for path in find_runs(tmp_path / "runs"):
        assert open_run(path).state == "interrupted"
