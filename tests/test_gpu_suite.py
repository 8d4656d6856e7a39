"""The GPU suite without a GPU: its scripts run, keep what they find, and cannot pass for measured.

The rehearsal is the suite itself, tiny, in a process of its own: TE's Python on the stand-in,
Triton in its interpreter. What it finds of codes must be right even so. What only a GPU can show,
how fast and whether TE's kernels agree, it cannot, and says so.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_report
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SUITE = ROOT / "experiments" / "gpu"
PARTS = ("casts_against_te", "kernels", "overhead", "training")


def suite_run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the suite, by name."""
    monkeypatch.syspath_prepend(str(SUITE))
    names = ("suite", "run_all", "write_report")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("triton")
    out: Path = tmp_path_factory.mktemp("rehearsed")
    done = suite_run(str(SUITE / "run_all.py"), "--rehearse", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def tables_of(folder: Path, part: str) -> list[dict[str, Any]]:
    page = json.loads((folder / f"{part}.json").read_text())
    assert page["ended"] == "complete"
    tables: list[dict[str, Any]] = page["tables"]
    return tables


@pytest.mark.parametrize("part", PARTS)
def test_a_rehearsal_fills_every_table(rehearsed: Path, part: str) -> None:
    tables = tables_of(rehearsed, part)
    assert tables
    for table in tables:
        assert table["rows"], table["title"]
        for row in table["rows"]:
            assert len(row) == len(table["columns"])
            assert not row[1].startswith("no result"), row


def test_what_it_compares_is_equal(rehearsed: Path) -> None:
    """In the stand-in's arithmetic, and in Triton's interpreter."""
    quantizers, histories, layers = tables_of(rehearsed, "casts_against_te")
    assert len(quantizers["rows"]) == 20 and len(histories["rows"]) == 4
    for row in quantizers["rows"]:
        assert int(row[1]) > 100_000 and int(row[3]) > 0
        assert (row[2], row[4], row[5]) == ("0", "0", "")
    for row in histories["rows"]:
        assert int(row[3]) >= 240 and (row[2], row[4]) == ("0", "0")
    compared = {row[0]: row for row in layers["rows"] if row[1].isdecimal()}
    assert len(compared) == 4
    for name, row in compared.items():
        assert int(row[1]) > 10_000 and row[2] == "0"
        assert row[3] == "0" or name == "te.LayerNormMLP, DelayedScaling"  # TE casts the FP32 norm
    equal, *_ = tables_of(rehearsed, "kernels")
    assert len(equal["rows"]) == 12
    assert {row[2] for row in equal["rows"]} == {"0"}


def test_who_is_compared_with_whom(rehearsed: Path) -> None:
    torch_table, syncs, *te = tables_of(rehearsed, "overhead")
    ours = ["nothing (noise)", "fp8lab, every step", "fp8lab, every 10 steps"]
    assert [row[0] for row in torch_table["rows"]] == ours
    assert [row[3] for row in torch_table["rows"]] == ["", "≤ 1.03", "≤ 1.005"]
    assert [row[0] for row in syncs["rows"]] == ["forward and backward", "watch.step"]
    theirs = {f"TE's debug statistics, every {often}" for often in ("step", "10 steps")}
    assert len(te) == 2
    for table in te:
        assert {row[0] for row in table["rows"]} == {*ours, *theirs}
    (arms,) = tables_of(rehearsed, "training")
    names = ["BF16", "FP8, delayed", "FP8, current", "FP8, delayed, Smooth-SwiGLU"]
    assert [row[0] for row in arms["rows"]] == names
    assert [row[-1] for row in arms["rows"]] == ["none", "none", "none", "not watched"]
    losses = [[float(cell) for cell in row[2:5]] for row in arms["rows"]]
    assert all(abs(cell - 5.55) < 0.2 for row in losses for cell in row)  # ln 256
    assert len({tuple(row) for row in losses}) > 1  # FP8 is not BF16


SMOOTH = """
import torch
import engine, training
te = engine.load(True)
torch.manual_seed(0)
made = {"bias": False, "params_dtype": torch.float32, "device": "cpu"}
fused = te.LayerNormMLP(32, 48, activation="swiglu", normalization="RMSNorm", **made)
smooth = training.Smooth(te, fused, "cpu", training.smooth_recipe()).float()
x = torch.randn(64, 32) * 30
x[:, 3] *= 100
torch.testing.assert_close(smooth(x), fused(x), rtol=1e-4, atol=1e-4)
product = torch.nn.functional.silu(smooth.gate(smooth.norm(x))) * smooth.up(smooth.norm(x))
balanced = (product * smooth.down.divisor).abs().amax(0)
assert ((balanced > 0.5) & (balanced <= 1.0)).all(), balanced
print("the same")
"""


def test_smooth_swiglu_around_te_changes_nothing_but_the_cast(suite: Any) -> None:
    done = suite_run("-W", "ignore", "-c", SMOOTH, PYTHONPATH=f"{ROOT}{os.pathsep}{SUITE}")
    assert done.stdout == "the same\n", done.stderr


def test_a_rehearsal_says_that_it_is_one_and_is_not_reported(suite: Any, rehearsed: Path) -> None:
    before = [(ROOT / "reports" / name).read_bytes() for name in ("gpu.md", "benchmarks.md")]
    assert f"**{suite.suite.REHEARSAL}.**" in (rehearsed / "gpu.md").read_text().splitlines()
    done = suite_run(str(SUITE / "write_report.py"), str(rehearsed))
    assert done.returncode == 2
    assert done.stderr == f"write_report: {rehearsed}: {suite.suite.REHEARSAL}\n"
    after = [(ROOT / "reports" / name).read_bytes() for name in ("gpu.md", "benchmarks.md")]
    assert before == after


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_does_not_pretend(tmp_path: Path) -> None:
    done = suite_run(str(SUITE / "run_all.py"), "--out", str(tmp_path / "out"))
    expected = "run_all: no CUDA device here, expected one, or --rehearse\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_run_of_the_tests_says_what_only_a_gpu_would_add() -> None:
    asked = ["-q", "-p", "no:cacheprovider", "tests/test_gpu_casts.py", "tests/test_devices.py"]
    done = suite_run("-m", "pytest", *asked, "-k", "not_on_a_gpu_is_not")
    said = next(line for line in done.stdout.splitlines() if line.startswith("no GPU here"))
    counts = re.fullmatch(
        r"no GPU here: one would add (\d+) tests: (\d+) of test_devices.py, "
        "1 of test_gpu_casts.py; and what experiments/gpu measures",
        said,
    )
    assert counts is not None, said
    assert int(counts[1]) == int(counts[2]) + 1 > 100


# --- what is kept --------------------------------------------------------------------------------


def test_every_row_is_kept_at_once(suite: Any, tmp_path: Path) -> None:
    page = suite.suite.Page("part", "A part", tmp_path / "part.json")
    table = page.table("A table", "name", "figure", "more")
    table.add("first", 0.123456)

    def fails() -> tuple[object, ...]:
        raise RuntimeError("two\nlines | and a bar")

    table.attempt("second", fails)
    table.attempt("third", lambda: (1, 2))
    assert json.loads(page.file.read_text())["tables"][0]["rows"] == [
        ["first", "0.1235", ""],
        ["second", "no result: RuntimeError: two lines / and a bar", ""],
        ["third", "1", "2"],
    ]


def part_of(suite: Any, monkeypatch: pytest.MonkeyPatch, work: Any, seconds: float = 60.0) -> None:
    monkeypatch.setitem(sys.modules, "a_part", SimpleNamespace(TITLE="A part", run=work))
    monkeypatch.setitem(suite.run_all.PARTS, "a_part", (seconds, ()))


def test_a_part_that_fails_leaves_its_rows_and_its_last_line(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(setting: Any, page: Any) -> None:
        page.table("A table", "name").add("a row")
        raise ValueError("the rest is missing")

    part_of(suite, monkeypatch, work)
    ended = suite.run_all.run("a_part", True, tmp_path, frozenset(), frozenset())
    page = json.loads((tmp_path / "a_part.json").read_text())
    assert page["tables"][0]["rows"] == [["a row"]]
    assert ended == page["ended"] == "ValueError: the rest is missing"


def test_a_part_that_does_not_end_is_ended(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(setting: Any, page: Any) -> None:
        table = page.table("A table", "name")
        while True:
            table.attempt("a row", lambda: ())

    part_of(suite, monkeypatch, work, seconds=0.3)
    ended = suite.run_all.run("a_part", True, tmp_path, frozenset(), frozenset())
    assert ended == "OutOfTimeError: 0 s were over"
    assert json.loads((tmp_path / "a_part.json").read_text())["tables"][0]["rows"]


def test_what_is_missing_is_named(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part_of(suite, monkeypatch, None)
    absent = frozenset({"pandas", "numpy"})
    ended = suite.run_all.run("a_part", True, tmp_path, absent, absent)
    assert ended == "left out: numpy, pandas missing"
    assert json.loads((tmp_path / "a_part.json").read_text())["ended"] == ended


def test_on_a_gpu_events_around_the_work_tell_the_time(
    suite: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("record")

        def synchronize(self) -> None:
            order.append("synchronize")

        def elapsed_time(self, end: Event) -> float:
            assert isinstance(end, Event) and end is not self
            return 12.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    setting = SimpleNamespace(device="cuda")
    assert suite.suite.seconds_of(setting, lambda: order.append("work"), 3) == 0.004
    assert order == ["record", "work", "work", "work", "record", "synchronize"]


def test_ratios_are_those_of_turns(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"plain": 2.0, "twice": 4.0}
    monkeypatch.setattr(suite.suite, "seconds_of", lambda setting, work, repeat: seconds[work()])
    setting = SimpleNamespace(left=100.0)
    found = suite.suite.ratios(setting, {"twice": lambda: "twice"}, lambda: "plain", 5)
    assert found == {"twice": (2.0, 2.0, 2.0)}


# --- what is reported ----------------------------------------------------------------------------


def a_real_run(folder: Path) -> None:
    machine = {"device": "A GPU, 80 GiB, sm_90", "torch": "2.11", "missing": "nothing"}
    (folder / "machine.json").write_text(json.dumps(machine))
    table = {"title": "T", "columns": ["a", "b"], "rows": [["x", "1.01"]]}
    for name, ended in (("overhead", "complete"), ("training", "RuntimeError: no memory")):
        page = {"name": name, "title": f"Title of {name}", "ended": ended, "notes": ["A note."]}
        page |= {"seconds": 3.2, "tables": [table]}
        (folder / f"{name}.json").write_text(json.dumps(page))


def test_a_real_run_is_reported(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports, folder = tmp_path / "reports", tmp_path / "run"
    reports.mkdir(), folder.mkdir()
    a_real_run(folder)
    bench = "# Benchmarks\n\n## On a GPU\n\nNothing.\n\n## Another\n\nkept\n"
    (reports / "benchmarks.md").write_text(bench)
    monkeypatch.setattr(suite.write_report, "REPORTS", reports)
    monkeypatch.setattr(sys, "argv", ["write_report.py", str(folder)])
    for _ in range(2):  # the second time in the place of the first
        assert suite.write_report.main() == 0
        text = (reports / "benchmarks.md").read_text()
        assert text.count("## On a GPU") == 1 and text.endswith("\n## Another\n\nkept\n")
        assert "A GPU, 80 GiB, sm_90; torch 2.11; missing nothing." in text
        assert "| x | 1.01 |" in text and "Nothing." not in text
        assert "Title of training" not in text
    whole = (reports / "gpu.md").read_text()
    assert "*This part is not complete: RuntimeError: no memory.*" in whole
    assert "rehearsal" not in whole
    renewed = bench_report.with_kept("# Benchmarks\n\nnew\n", text)  # as `make bench` does
    assert "| x | 1.01 |" in renewed and renewed.startswith("# Benchmarks\n\nnew\n")


def test_a_run_without_a_row_is_not_reported(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite.write_report, "REPORTS", tmp_path / "none")
    monkeypatch.setattr(sys, "argv", ["write_report.py", str(tmp_path)])
    assert suite.write_report.main() == 2
    assert capsys.readouterr().err == f"write_report: {tmp_path}: no run of the suite there\n"
    (tmp_path / "machine.json").write_text('{"device": "A GPU"}')
    assert suite.write_report.main() == 2
    assert capsys.readouterr().err == f"write_report: {tmp_path}: no part has a row\n"


def test_the_reports_name_a_device_or_say_that_none_was_there() -> None:
    for name in ("gpu.md", "benchmarks.md"):
        section = (ROOT / "reports" / name).read_text().partition("# On a GPU\n")[2]
        assert (
            "sm_" in section or "No GPU was at hand so far: nothing here was measured." in section
        )
