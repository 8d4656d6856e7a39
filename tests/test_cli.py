"""The command line: what it prints, what it returns, and one line for everything that is wrong.

In process through typer's runner, which keeps stdout and stderr apart, and as the installed program
where only a process shows: its exit code, a pipe that closes, an experiment of worker processes.
"""

from __future__ import annotations

import io
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner, Result

from fp8lab.cli import app
from fp8lab.diagnosis import diagnose
from fp8lab.listing import print_grids
from fp8lab.store import RunWriter, open_run

TINY = Path(__file__).with_name("tiny_experiment.py")
PROGRAM = Path(sys.executable).with_name("fp8lab")
COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]
ONLY = ["--arm", "bf16", "--arm", "hot", "--seed", "0", "--steps", "3"]
LABELS = ["first/bf16/seed-0", "second/bf16/seed-0", "second/hot/seed-0"]


def invoke(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def strict(text: str) -> Any:
    """What JSON's own grammar says: no NaN, no infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below: when it was written, and what is in it."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def spoken(text: str) -> str:
    """A table's text, however its cells are wrapped."""
    return " ".join(text.split())


@pytest.fixture(scope="module")
def first_run(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("cli") / "runs"
    finished = subprocess.run(
        [PROGRAM, "run", TINY, "--out", out, *ONLY, "--workers", "1", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    return out, finished


@pytest.fixture
def runs(first_run: tuple[Path, Any]) -> Path:
    return first_run[0]


# --- the verbs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = invoke(command, "--help")
    described = get_command(app).commands[command]  # type: ignore[attr-defined]
    assert result.exit_code == 0 and result.stderr == ""
    assert described.help.splitlines()[0] in spoken(result.stdout.replace("\n\n", "\n"))
    for option in (name for p in described.params for name in p.opts if name.startswith("--")):
        assert option in result.stdout


def test_the_commands_are_these() -> None:
    assert COMMANDS == sorted(
        "audit bisect compare diagnose ls replay report run show tail".split()
    )
    result = invoke()
    assert result.exit_code == 2 and result.stderr == ""
    assert all(command in result.stdout for command in COMMANDS)


def test_run(first_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, finished = first_run
    assert finished.returncode == 0
    done = ["first/prepare/seed-0", *LABELS]
    assert finished.stderr.splitlines() == [
        f"done: {label} ({number}/{len(done)})" for number, label in enumerate(done, 1)
    ]
    rows = strict(finished.stdout)
    assert [Path(row["run"]).relative_to(out).as_posix() for row in rows] == LABELS
    for row, label in zip(rows, LABELS, strict=True):
        run = open_run(out / label)
        assert row == {
            "run": str(run.path),
            "state": "finished",
            "part": label.split("/")[0],
            "arm": label.split("/")[1],
            "seed": 0,
            "steps": 2 if "hot" in label else 3,
            "loss": float(run.steps()["loss"].iloc[-1]),
            "diverged_at": 1 if "hot" in label else None,
            "final_loss": None if "hot" in label else float(run.steps()["loss"].iloc[-1]),
            "error": None,
        }


def test_run_again_does_nothing_and_shows_a_grid(runs: Path) -> None:
    before = snapshot(runs)
    result = invoke("run", TINY, "--out", runs, *ONLY)
    assert (result.exit_code, result.stderr) == (0, "")
    assert snapshot(runs) == before
    final = open_run(runs / LABELS[1]).info["result"]["final_loss"]
    table = spoken(result.stdout)
    assert "From a common start arm seed 0 BF16" in table and "From scratch" in table
    assert f"BF16 {final:.3f} BF16, too hot ✗ 1 " in table


def test_a_run_that_fails_is_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_EXPERIMENT", json.dumps({"first/current/seed-1": "raises"}))
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("enough for two windows")
    only = ("--arm", "current", "--seed", "1", "--workers", "1")
    result = invoke("run", TINY, *only, "--text", "text")
    (line,) = [n for n, of in enumerate(TINY.read_text().split("\n"), 1) if "it raised" in of]
    error = f"RuntimeError: it raised (tiny_experiment.py:{line})"
    whole = Path("runs/tiny/first/current/seed-1/traceback.txt")
    told = f"{error}; all of the error is in {whole}"
    assert (result.exit_code, result.stderr) == (1, f"failed: first/current/seed-1: {told}\n")
    assert whole.read_text().startswith("Traceback (most recent call last)")
    assert whole.read_text().endswith("RuntimeError: it raised\nand said more\n")
    assert result.stdout.splitlines()[0] == "done: first/prepare/seed-1 (1/2)"
    assert "it raised" not in result.stdout and "FP8 failed" in spoken(result.stdout)
    assert f"error {told}" in spoken(invoke("show", whole.parent).stdout)
    listed = invoke("ls", "runs/tiny").stdout.splitlines()
    assert listed[-1] == f"first/current/seed-1: {error}"
    described = json.loads(Path("runs/tiny/experiment.json").read_text())
    assert described["settings"] == {"steps": None, "text": "text", "quick": False}


def test_a_conclusion_that_fails_is_exit_code_1(tmp_path: Path) -> None:
    file, page = tmp_path / TINY.name, tmp_path / "page"
    text = TINY.read_text().replace('verdict="confirmed"', "verdict=1 / 0")
    file.write_text(text)
    quick = ("--quick", "--workers", "1")
    result = invoke("run", file, "--out", tmp_path / "runs", "--report", page, *quick)
    whole = tmp_path / "runs" / "traceback.txt"
    told = f"; all of the error is in {whole}\n"
    assert result.exit_code == 1 and result.stderr.endswith(told)
    assert "error: experiment tiny: no conclusion: ZeroDivisionError" in result.stderr
    assert whole.read_text().endswith("ZeroDivisionError: division by zero\n")


def test_a_grids_title_and_key_have_the_width_of_the_terminal(runs: Path) -> None:
    title = "From scratch, and with a title that is wider than its table of two columns"
    arms = [SimpleNamespace(name="hot", title="H")]
    printed = io.StringIO()
    part = SimpleNamespace(name="second", title=title, arms=arms)
    print_grids(Console(file=printed, width=100), [part], runs)
    key = "a number: the final loss; ✗ n: diverged at step n"
    assert [line.rstrip() for line in printed.getvalue().splitlines()] == [
        *(title, " arm  seed 0", " H    ✗ 1", key, f"runs: {runs}")
    ]


def test_run_prints_as_json_what_was_asked_for_of_a_folder_with_more(runs: Path) -> None:
    only = ("--arm", "hot", "--seed", "0", "--steps", "3")
    result = invoke("run", TINY, "--out", runs, *only, "--json")
    assert [row["run"] for row in strict(result.stdout)] == [str(runs / LABELS[2])]


def test_ls(runs: Path) -> None:
    result = invoke("ls", runs)
    assert (result.exit_code, result.stderr) == (0, "")
    first, _, hot = (line for line in result.stdout.splitlines() if "seed-0" in line)
    final = open_run(runs / LABELS[0]).info["result"]["final_loss"]
    last = [f"{open_run(runs / LABELS[n]).steps()['loss'].iloc[-1]:.3g}" for n in (0, 2)]
    assert first.split() == [LABELS[0], "finished", "3", "-", last[0], f"{final:.3g}"]
    assert hot.split() == [LABELS[2], "finished", "2", "1", last[1], "-"]
    listed = strict(invoke("ls", runs, "--json").stdout)
    assert [row["run"] for row in listed] == [str(runs / label) for label in LABELS]


def test_ls_lists_what_is_damaged_too(tmp_path: Path) -> None:
    RunWriter.create(tmp_path / "good", {}).close()
    for name, text in (("bad", "{"), ("new", '{"schema_version": 99}'), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    RunWriter.create(tmp_path / "torn", {}).close()
    (tmp_path / "torn" / "steps.parquet").write_bytes(b"PAR1")
    result = invoke("ls", tmp_path, "--json")
    assert result.exit_code == 0
    states = {Path(row["run"]).name: row["state"] for row in strict(result.stdout)}
    damaged = dict.fromkeys(("bad", "new", "list", "torn"), "damaged")
    assert states == {"good": "finished"} | damaged
    told = invoke("ls", tmp_path).stdout
    assert spoken(told).count("damaged - - - -") == 4
    assert f"\nnew: {tmp_path}/new/run.json: schema_version: 99, expected 1" in told


def test_ls_of_a_folder_without_runs_says_so(tmp_path: Path) -> None:
    result = invoke("ls", tmp_path)
    assert (result.exit_code, result.stdout) == (0, f"no runs in {tmp_path}\n")
    assert strict(invoke("ls", tmp_path, "--json").stdout) == []


def test_ls_looks_in_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    RunWriter.create("runs/mine", {}).close()
    assert strict(invoke("ls", "--json").stdout)[0]["run"] == "runs/mine"


def test_show(runs: Path) -> None:
    run = open_run(runs / LABELS[2])
    told = strict(invoke("show", run.path, "--json").stdout)
    assert {key: told.get(key) for key in run.info} == run.info | {"pid": None}
    assert (told["steps"], told["state"], told["arm"]) == (2, "finished", "hot")
    loss = float(run.steps()["loss"].iloc[-1])
    event = {
        "step": 1,
        "rank": 0,
        "kind": "diverged",
        "site": None,
        "detail": f"loss is {loss:.4g}",
    }
    assert told["events"] == [event]
    text = spoken(invoke("show", run.path).stdout)
    assert f"step 1 diverged: loss is {loss:.4g}" in text
    assert "site 0 gate gate.weight, up up.weight, down down.weight; silu" in text
    bf16 = "BF16 × BF16 HighPrecision"
    assert f"0.down output {bf16}; grad_input {bf16}; grad_weight {bf16}" in text


def test_names_are_text(tmp_path: Path) -> None:
    """Of a stranger's run: nothing in it moves the cursor or names the window."""
    bad, told = "\x1b]0;x\x07\x1b[2J", r"\x1b]0;x\x07\x1b[2J"
    casts = {"input": bad, "weight": "E4M3", "grad_output": "BF16"}
    info = {
        "machine": bad,
        "versions": {bad: bad},
        "sites": [{"site": bad, "gate": bad}],
        "precision": {bad: casts},
        "config": {"part": "first", "arm": "a", "seed": 0},
        "result": {"diverged_at": bad, "final_loss": 1.0},
        "every": bad,
    }
    steps = [{"step": step, "rank": 0, "loss": 1.0} for step in range(600)]
    staleness = [32.0 if step == 500 else 1.0 for step in range(600)]
    product = {"rank": 0, "site": f"{bad}:product", "recipe": "DelayedScaling", "format": "E4M3"}
    product |= {"hot_channel": 7, "scale": 224.0, "saturated": 0.01}
    rows = [{"step": i, "cur_amax": 2.0 * s, "staleness": s} for i, s in enumerate(staleness)]
    writer = RunWriter.create(tmp_path / "run", info)
    writer.append("steps", steps)
    writer.append("tensors", [product | row for row in rows])
    writer.append("events", [{"step": 0, "rank": 0, "kind": bad, "detail": bad}])
    writer.close()
    for arguments in (["show"], ["diagnose"], ["replay", "--recipe", "DelayedScaling"]):
        text = invoke(arguments[0], tmp_path / "run", *arguments[1:]).stdout
        assert told in text, arguments
        assert not {"\x1b", "\x07"} & set(text), arguments
    arm = SimpleNamespace(name="a", title=bad)
    part = SimpleNamespace(name="first", title=bad, arms=[arm])
    printed = io.StringIO()
    print_grids(Console(file=printed, width=300), [part], tmp_path)
    assert printed.getvalue().count(told) == 2  # a step that is no number is none
    assert not {"\x1b", "\x07"} & set(printed.getvalue())


def test_a_run_whose_process_is_gone_was_killed(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    RunWriter.create(tmp_path / "run", {})
    described = json.loads((tmp_path / "run" / "run.json").read_text()) | {"pid": gone.pid}
    (tmp_path / "run" / "run.json").write_text(json.dumps(described))
    for command in (("show", tmp_path / "run"), ("ls", tmp_path)):
        told = strict(invoke(*command, "--json").stdout)
        assert (told if command[0] == "show" else told[0])["state"] == "killed"


def test_diagnose(runs: Path) -> None:
    fine, hot = runs / LABELS[1], runs / LABELS[2]
    result = invoke("diagnose", fine)
    assert (result.exit_code, result.stdout) == (0, f"{fine}: nothing found\n")
    result = invoke("diagnose", hot)
    assert (result.exit_code, result.stdout) == (1, f"{diagnose(hot)}\n")
    assert "not_fp8" in result.stdout
    result = invoke("diagnose", runs, "--json")
    assert result.exit_code == 1
    told = [diagnose(runs / label).to_dict() for label in LABELS]
    assert strict(result.stdout) == json.loads(json.dumps(told))


def test_diagnose_beside_a_twin(tmp_path: Path, runs: Path) -> None:
    run = RunWriter.create(tmp_path / "fp8", {"precision": {"down": {"input": "E4M3 X"}}})
    run.append("events", [{"step": 5, "rank": 0, "kind": "diverged", "detail": ""}])
    run.close()
    assert invoke("diagnose", run.path, "--twin", runs / LABELS[1]).exit_code == 0
    assert invoke("diagnose", run.path, "--twin", runs / LABELS[2]).exit_code == 1


def test_diagnose_says_what_it_could_not_judge_where_it_finds_nothing(tmp_path: Path) -> None:
    info = {"precision": {"head": {"input@output": "E4M3 X", "weight@output": "BF16 X"}}}
    told = (
        "not recorded, so not judged: input of 1 layer (head): watch(…, "
        "select=[fp8lab.Selection(layers=('head',), tensors=('input',), freq=1)])\n"
    )
    for name, kind in (("lost", "diverged"), ("well", "note")):
        run = RunWriter.create(tmp_path / name, info)
        run.append("steps", [{"step": 5, "rank": 0, "loss": 1.0}])
        run.append("events", [{"step": 5, "rank": 0, "kind": kind, "detail": ""}])
        run.close()
        result = invoke("diagnose", run.path)
        assert result.exit_code == 0
        expected = told if name == "lost" else ""
        assert result.stdout == f"{diagnose(run.path)}\n{expected}"


def test_compare(runs: Path, tmp_path: Path) -> None:
    result = invoke("compare", runs, "--json")
    assert result.exit_code == 0
    rows = {row["arm"]: row for row in strict(result.stdout)}
    assert list(rows) == ["first/bf16", "second/bf16", "second/hot"]
    run = open_run(runs / LABELS[1])
    products = run.tensors().query("site == '0:product'")
    assert rows["second/bf16"] == {
        "arm": "second/bf16",
        "runs": 1,
        "diverged": 0,
        "final_loss": run.info["result"]["final_loss"],
        "loss_gap": 0.0,
        "staleness": None,
        "saturated": products["saturated"].max(),
        "flushed": products["flushed"].max(),
        "bulk_error": products["bulk_error"].max(),
        "in_full": f"{products['flushed'].count()} of {len(products)}",
        "steps_per_second": 1 / run.steps()["seconds"].median(),
        "step_time_ratio": 1.0,
        "changes_function": False,
    }
    assert rows["second/hot"]["diverged"] == 1 and rows["second/hot"]["final_loss"] is None
    text = spoken(invoke("compare", runs).stdout)
    final = f"{rows['second/bf16']['final_loss']:.3g}"
    # Too wide for a row an arm.
    assert text.startswith("arm first/bf16 second/bf16 second/hot runs 1 1 1 diverged 0 0 1 final")
    assert f"final loss {final} {final} - loss gap 0 0 - staleness - - -" in text


def test_compare_takes_medians_and_maxima_over_the_runs_of_an_arm(tmp_path: Path) -> None:
    finals, peaks = [3.0, 1.0, 2.5], [4.0, 9.0, 2.0]
    for seed, (final, peak) in enumerate(zip(finals, peaks, strict=True)):
        writer = RunWriter.create(
            tmp_path / f"seed-{seed}",
            {"config": {"part": "p", "arm": "a"}, "result": {"final_loss": final}},
        )
        row = {"rank": 0, "site": "mlp:product", "staleness": peak}
        writer.append("tensors", [row | {"step": 0}])
        writer.append("tensors", [row | {"step": 0, "site": "mlp:gate", "staleness": 99.0}])
        for site, lost in (("mlp.down", peak / 10), ("mlp.up", 0.95), ("mlp.countdown", 0.97)):
            told = {"site": f"{site}:weight", "flushed": lost, "bulk_error": lost / 2}
            writer.append("tensors", [row | {"step": 0} | told])
        writer.append("steps", [{"step": s, "rank": 0, "seconds": 1.0 + seed} for s in range(2)])
        writer.close()
    (row,) = strict(invoke("compare", tmp_path, "--json").stdout)
    assert (row["arm"], row["runs"], row["diverged"]) == ("p/a", 3, 0)
    assert row["final_loss"] == statistics.median(finals)
    assert row["staleness"] == max(peaks) and row["saturated"] is None
    assert row["flushed"] is row["bulk_error"] is None
    assert (row["weight_flushed"], row["weight_bulk_error"]) == (0.9, 0.45)
    assert row["steps_per_second"] == 1 / 2
    assert row["loss_gap"] is row["step_time_ratio"] is row["changes_function"] is None


def test_compare_pairs_the_seeds_of_two_arms(tmp_path: Path) -> None:
    finals = {"bf16": {0: 1.0, 1: 2.0, 2: 9.0}, "smooth": {0: 1.5, 1: 2.25, 3: 0.0}}
    for arm, losses in finals.items():
        for seed, final in losses.items():
            config = {"part": "p", "arm": arm, "seed": seed, "changes_function": arm == "smooth"}
            writer = RunWriter.create(
                tmp_path / arm / f"seed-{seed}",
                {"config": config, "result": {"final_loss": final}},
            )
            seconds = 2.0 if arm == "bf16" else 3.0
            writer.append("steps", [{"step": s, "rank": 0, "seconds": seconds} for s in range(2)])
            writer.close()
    rows = {row["arm"]: row for row in strict(invoke("compare", tmp_path, "--json").stdout)}
    assert rows["p/smooth"]["loss_gap"] == statistics.median([0.5, 0.25])
    assert rows["p/smooth"]["step_time_ratio"] == 1.5
    assert rows["p/smooth"]["changes_function"] is True
    assert rows["p/bf16"]["loss_gap"] == 0.0 and rows["p/bf16"]["changes_function"] is False
    rows = strict(invoke("compare", tmp_path, "--against", "smooth", "--json").stdout)
    assert rows[0]["loss_gap"] == -0.375


def test_without_all_runs_there_is_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_EXPERIMENT", '{"first/prepare/seed-0": "raises"}')
    page = tmp_path / "pages"
    result = invoke("run", TINY, "--out", tmp_path / "runs", "--quick", "--report", page)
    assert result.exit_code == 1
    assert result.stdout.endswith("no page: 1 failed\n")
    assert not page.exists()


def test_what_did_not_finish_has_no_final_loss(tmp_path: Path) -> None:
    """Of a run that failed the last loss is no final one, and of no gap; a run of fewer steps is
    told."""
    ends = {"bf16": ("finished", 4), "fp8": ("failed", 2), "quick": ("interrupted", 1)}
    for arm, (state, steps) in ends.items():
        for seed in (0, 1):
            config = {"part": "p", "arm": arm, "seed": seed}
            writer = RunWriter.create(tmp_path / arm / str(seed), {"config": config})
            rows = [{"step": i, "rank": 0, "loss": 9.0 - i} for i in range(steps)]
            writer.append("steps", rows)
            if arm == "quick" and seed:
                writer.close()
            else:
                writer.close(state, error="it broke")
    rows = strict(invoke("compare", tmp_path, "--json").stdout)
    names = ("arm", "runs", "unfinished", "final_loss", "loss_gap", "steps")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("p/bf16", 2, None, 6.0, 0.0, "4"),
        ("p/fp8", 2, "2 failed", None, None, None),
        ("p/quick", 2, "1 interrupted", 9.0, 3.0, "1"),
    ]
    assert "unfinished - 2 failed 1 interrupted" in spoken(invoke("compare", tmp_path).stdout)
    page = tmp_path / "page.md"
    assert invoke("compare", tmp_path, "--out", page).exit_code == 0
    assert "| 2 failed |" in page.read_text("utf-8")


def test_report(runs: Path, tmp_path: Path) -> None:
    before = snapshot(runs)
    page = tmp_path / "pages" / "mine.html"
    result = invoke("report", runs, "-o", page)
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"report: {page}\n", "")
    assert "<html" in page.read_text(encoding="utf-8")
    assert snapshot(runs) == before


def test_runs_that_say_little_about_themselves(tmp_path: Path) -> None:
    RunWriter.create(tmp_path / "bare", {}).close()
    RunWriter.create(tmp_path / "[/odd]", {"config": {"arm": "a"}, "result": 5}).close()
    RunWriter.create(tmp_path / "[bold]", {"config": [1], "versions": None}).close()
    for name in ("bare", "[/odd]", "[bold]"):
        told = strict(invoke("show", tmp_path / name, "--json").stdout)
        assert (told["steps"], told["loss"], told["events"]) == (0, None, [])
        assert invoke("show", tmp_path / name).exit_code == 0
    result = invoke("ls", tmp_path)
    assert result.exit_code == 0
    assert "[/odd]" in result.stdout and "[bold]" in result.stdout
    for command, code in (("compare", 0), ("diagnose", 2)):
        result = invoke(command, tmp_path)
        assert result.exit_code == code and "nan" not in result.stdout
    assert result.stdout.count("nothing was recorded") == 3
    assert len(strict(invoke("compare", tmp_path, "--json").stdout)) == 3


def test_steps_of_several_processes_are_counted_once(tmp_path: Path) -> None:
    for rank in (0, 1):
        writer = RunWriter.create(tmp_path / "run", {"job": "one"}, rank=rank)
        writer.append("steps", [{"step": step, "loss": 10.0 * rank + step} for step in range(3)])
        writer.close()
    (told,) = strict(invoke("ls", tmp_path, "--json").stdout)
    assert (told["steps"], told["loss"]) == (3, 2.0)


def test_json_has_no_nan(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", {"config": {"lr": float("inf")}})
    losses = [1.0, float("inf"), float("nan")]
    writer.append("steps", [{"step": s, "rank": 0, "loss": x} for s, x in enumerate(losses)])
    writer.append("events", [{"step": 1, "rank": 0, "kind": "nonfinite_loss", "detail": "x"}])
    writer.info["result"] = {"final_loss": float("nan")}
    writer.close()
    told = strict(invoke("show", tmp_path / "run", "--json").stdout)
    assert told["config"] == {"lr": None} and told["result"] == {"final_loss": None}
    for command in ("ls", "compare", "diagnose"):
        strict(invoke(command, tmp_path, "--json").stdout)


# --- what is wrong, in a line -------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one of everything that is wrong, to stand in."""
    monkeypatch.chdir(tmp_path)
    RunWriter.create("run", {}).close()
    for name, text in (("damaged", "{"), ("newer", '{"schema_version": 99}'), ("list", "[]")):
        Path(name).mkdir()
        Path(name, "run.json").write_text(text)
    RunWriter.create("torn", {}).close()
    Path("torn/steps.parquet").write_bytes(b"PAR1")
    Path("empty").mkdir()
    Path("foreign").mkdir()
    Path("foreign/thesis.txt").write_text("all of it")
    Path("file").write_text("a file")
    Path("nothing.txt").touch()
    Path("syntax.py").write_text("x = (\n")
    Path("fails.py").write_text("import nowhere\n")
    Path("without.py").write_text("x = 1\n")
    return tmp_path


RUN = ("run", str(TINY), "--out")
EXPERIMENTS = ", ".join(
    sorted(path.stem for path in (Path(__file__).parents[1] / "experiments").glob("*.py"))
)
NEEDS_A_RUN = "no run here, expected a directory with a run.json"
WRONG: list[tuple[tuple[str, ...], str]] = [
    *((((verb, "missing")), f"missing: {NEEDS_A_RUN}") for verb in ("show", "diagnose", "compare")),
    *((((verb, "file")), f"file: {NEEDS_A_RUN}") for verb in ("show", "diagnose", "report")),
    *((((verb, "empty")), f"empty: {NEEDS_A_RUN}") for verb in ("show", "report", "compare")),
    *(((verb, "damaged"), "damaged/run.json: damaged: ") for verb in ("show", "diagnose")),
    *(
        ((verb, "torn"), "torn/steps.parquet: damaged: ")
        for verb in ("show", "diagnose", "compare")
    ),
    (("show", "newer"), "newer/run.json: schema_version: 99, expected 1"),
    (("show", "list"), "list/run.json: schema_version: None, expected 1"),
    (("diagnose", "run", "--twin", "missing"), f"missing: {NEEDS_A_RUN}"),
    (("ls", "missing"), "missing: no such folder"),
    (("ls", "file"), "file: no such folder"),
    (("ls",), "runs: no such folder"),
    (("run", "large"), f"experiment 'large': expected a .py file or one of: {EXPERIMENTS}"),
    (("run", "missing.py"), "experiment missing.py: no such file"),
    (("run", "syntax.py"), "experiment syntax.py: SyntaxError: '(' was never closed (syntax.py, "),
    (("run", "fails.py"), "experiment fails.py: ModuleNotFoundError: No module named 'nowhere' ("),
    (("run", "without.py"), "experiment without.py: expected a value EXPERIMENT"),
    ((*RUN, "new", "--text", "nothing.txt"), "text nothing.txt: the file is empty"),
    ((*RUN, "new", "--text", "missing.txt"), "text missing.txt: No such file or directory"),
    ((*RUN, "new", "--text", "empty"), "text empty: Is a directory"),
    ((*RUN, "foreign"), "foreign: exists and holds no experiment, expected a new folder"),
    ((*RUN, "file"), "file: Not a directory"),
    ((*RUN, "new", "--part", "third"), "part third: expected some of first, second"),
    ((*RUN, "new", "--arm", "cold"), "arm cold: expected some of bf16, current, hot"),
    ((*RUN, "new", "--part", "first", "--arm", "hot"), "arm hot: expected some of bf16, current"),
    ((*RUN, "new", "--seed", "5"), "seed 5: expected some of 0, 1, as the experiment has them"),
    ((*RUN, "new", "--report", "file"), "Invalid value for '--report': "),
    ((*RUN, "new", "--workers", "-1"), "Invalid value for '--workers': "),
    ((*RUN, "new", "--workers", "0"), "Invalid value for '--workers': "),
    ((*RUN, "new", "--workers", "two"), "Invalid value for '--workers': "),
    ((*RUN, "new", "--steps", "0"), "Invalid value for '--steps': "),
    ((*RUN, "new", "--seed", "one"), "Invalid value for '--seed': "),
    (("run",), "Missing argument 'EXPERIMENT'."),
    (("show",), "Missing argument 'RUN'."),
    (("show", "run", "run"), "Got unexpected extra argument"),
    (("show", "run", "--yaml"), "No such option: --yaml"),
    (("--yaml",), "No such option: --yaml"),
    (("fix", "run"), "No such command 'fix'."),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda value: " ".join(value[-2:]))
def test_bad_input_is_one_line_and_exit_code_2(
    place: Path, arguments: tuple[str, ...], message: str
) -> None:
    before = snapshot(place)
    for more in ((), ("--json",)):
        result = invoke(*arguments, *(more if arguments[0] not in ("report", "--yaml") else ()))
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith(f"error: {message}"), result.stderr
        assert result.stderr.count("\n") == 1 and result.stderr.endswith("\n")
    assert snapshot(place) == before and not (place / "new").exists()


def test_a_bug_is_not_bad_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(path: Path) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("fp8lab.listing.find_runs", broken)
    result = CliRunner().invoke(app, ["ls", str(tmp_path)])
    assert isinstance(result.exception, KeyError)


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("one\ntwo"), "one"), (ValueError(), "ValueError"), (OSError("x"), "x")],
)
def test_an_error_is_its_first_line_or_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, line: str
) -> None:
    def broken(path: Path) -> None:
        raise error

    monkeypatch.setattr("fp8lab.listing.find_runs", broken)
    assert invoke("ls", tmp_path).stderr == f"error: {line}\n"


def in_a_process(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_the_installed_program(runs: Path, tmp_path: Path) -> None:
    """What the runner cannot show: exit codes and streams of a real process."""
    expected: list[tuple[tuple[str | Path, ...], int, Callable[[str], bool], str]] = [
        (("diagnose", runs / LABELS[1]), 0, lambda out: "nothing found" in out, ""),
        (("diagnose", runs / LABELS[2]), 1, lambda out: "not_fp8" in out, ""),
        (("show", "missing"), 2, lambda out: out == "", f"error: missing: {NEEDS_A_RUN}\n"),
        (("--yaml",), 2, lambda out: out == "", "error: No such option: --yaml\n"),
    ]
    for arguments, code, fits, told in expected:
        finished = in_a_process(*arguments, cwd=tmp_path)
        assert (finished.returncode, finished.stderr) == (code, told)
        assert fits(finished.stdout)


def test_a_reader_that_leaves_is_no_error(runs: Path) -> None:
    process = subprocess.Popen(
        [PROGRAM, "ls", runs, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    told = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), told) == (1, b"")


def test_a_folder_that_cannot_be_written(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    result = invoke("report", runs, "-o", tmp_path / "page")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "Is a directory" in result.stderr and list((tmp_path / "page").iterdir()) == []
