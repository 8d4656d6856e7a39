"""Whatever state a run is in, its page is written and says what is missing.

The runs are real and small. They are cut off, emptied, filled with noise and deprived of files; one
is looked at while the process that trains is at work, and again after `kill -9`. Each time all
formats are written through the command line: exit code 0, nothing on stderr, and a sentence on the
page that names the lack. Only a folder in which there is no run is an error, of one line.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_report import DELAYED, Model, record
from test_report_formats import Elements, inlines, invoke, text_of

import fp8lab
from fp8lab.store import open_run

TABLES = ("steps", "tensors", "channels", "events")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("whole") / "whole", steps=20, recipe=DELAYED)


def told(runs: Path, out: Path) -> str:
    """What the pages say of the runs: both the same of what is missing, and so do the data."""
    pages = []
    for page in (out / "page.html", out / "page.md"):
        result = invoke("report", runs, "-o", page)
        assert (result.exit_code, result.stderr) == (0, ""), result.output
        assert result.stdout == f"report: {page}\n"
    pages.append(" ".join(Elements(out / "page.html").words))
    markdown = (out / "page.md").read_text(encoding="utf-8")
    pages.append(" ".join(text_of(token) for _, token in inlines(markdown)))
    html, text = (" ".join(page.split()) for page in pages)
    (where,) = re.findall(r"What is not shown, and why (.*)", text)
    assert where in html
    return text


def pictures(out: Path) -> set[str]:
    return {file.stem.removeprefix("page-") for file in out.glob("page-*.png")}


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_of_no_step_or_one(tmp_path: Path, steps: int) -> None:
    out = tmp_path / "out"
    text = told(record(tmp_path / "run", steps=steps, recipe=DELAYED), out)
    assert ("finished, no step recorded" in text) == (steps == 0)
    assert ("Nothing was recorded" in text) == (steps == 0)
    if steps:
        assert {"losses", "timeline", "weights", "layers"} <= pictures(out)
    else:
        assert pictures(out) == set()
    assert "no dose-response run is here" in text


def test_a_run_that_is_nothing_but_nan(tmp_path: Path) -> None:
    """Weights that are not numbers: so are product, loss and gradients, from the first step."""
    torch.manual_seed(0)
    model = Model()
    fp8lab.convert(model, DELAYED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with fp8lab.watch(model, tmp_path / "run", optimizer=optimizer, every=2) as watching:
        for step in range(6):
            loss = model(torch.randn(8, 16)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watching.step(step, loss=loss)
    assert open_run(tmp_path / "run").steps()["loss"].isna().all()
    text = told(tmp_path / "run", tmp_path / "out")
    assert "1 training run, 1 diverged" in text
    assert "no finite loss was recorded" in text


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def noise(file: Path) -> None:
    file.write_bytes(bytes(range(256)) * 4)


def test_damaged_runs_are_named_beside_a_good_one(whole: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(whole, runs / "good")
    names = ["run.json", *(f"{table}.parquet" for table in TABLES)]
    bad = [(damage, name) for damage in (cut, empty, noise) for name in names]
    for damage, name in bad:
        shutil.copytree(whole, runs / damage.__name__ / name)
        damage(runs / damage.__name__ / name / name)
    text = told(runs, tmp_path / "out")
    assert "1 training run, none diverged" in text
    assert "Could not be read, and left out:" in text
    for damage, name in bad:
        assert f"{damage.__name__}/{name}: {name}: damaged" in text
    assert str(tmp_path) not in text


def test_nothing_but_a_damaged_run(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    cut(run / "steps.parquet")
    text = told(run, tmp_path / "out")
    assert "Could not be read, and left out: run: steps.parquet: damaged" in text
    assert "0 training runs, none diverged" in text
    assert "no run could be read" in text.casefold() and pictures(tmp_path / "out") == set()
    data = json.loads(invoke("report", run, "--json").stdout, parse_constant=pytest.fail)
    assert data["unread"][0]["reason"].startswith("steps.parquet: damaged")
    assert data["missing"] and all(one in text for one in data["missing"])
    # To compare takes whole runs on the terminal, and not for a page.
    assert invoke("compare", run).exit_code == 2
    for name in ("compared.html", "compared.md"):
        assert invoke("compare", run, "-o", tmp_path / name).exit_code == 0
    assert "no run is here" in (tmp_path / "compared.md").read_text()


@pytest.mark.parametrize(
    ("lost", "line", "none"),
    [
        ("steps", "finished, no step recorded", {"losses"}),
        ("tensors", "The timeline of one run: ", {"timeline", "layers", "ranges"}),
        ("channels", "Gate and up of the hot channel: ", {"weights", "channels"}),
    ],
)
def test_a_table_that_is_lost(
    whole: Path, tmp_path: Path, lost: str, line: str, none: set[str]
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    (run / f"{lost}.parquet").unlink()
    assert line in told(run, tmp_path / "out")
    assert not none & pictures(tmp_path / "out")


# --- while it is written, and after its end -------------------------------------------------------

TRAINING = """
import sys, time
sys.path.insert(0, sys.argv[2])
import torch
import fp8lab
from test_report import DELAYED, Model

torch.set_num_threads(1)
model = Model()
fp8lab.convert(model, DELAYED)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
with fp8lab.watch(model, sys.argv[1], optimizer=optimizer, every=1) as watching:
    for step in range(10**6):
        loss = model(torch.randn(8, 16)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        watching.step(step, loss=loss)
        watching.event(step, "flushed")  # an event is on the disk when this returns
        print(step, flush=True)
        time.sleep(0.5)
"""


@pytest.fixture
def training(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    tests = Path(__file__).parent
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(tmp_path / "run"), str(tests)],
        cwd=tests.parent,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process
        process.kill()


@pytest.mark.long
def test_a_run_that_is_written_and_then_killed(
    training: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert training.stdout is not None
    while training.stdout.readline().strip() != "5":
        assert training.poll() is None
    text = told(tmp_path / "run", tmp_path / "running")
    assert training.poll() is None
    assert "Runs that are not finished: 1 running." in text
    os.kill(training.pid, signal.SIGKILL)
    training.wait()
    text = told(tmp_path / "run", tmp_path / "killed")
    assert "Runs that are not finished: 1 killed." in text
    last = int(open_run(tmp_path / "run").steps()["step"].iloc[-1])
    assert last >= 5 and f"killed at step {last}" in text


# --- no run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["report", "compare"])
@pytest.mark.parametrize("name", ["page.html", "page.md"])
def test_a_folder_without_a_run_is_an_error_of_one_line(
    tmp_path: Path, verb: str, name: str
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "run.txt").write_text("{}")
    result = invoke(verb, tmp_path / "notes", "-o", tmp_path / name)
    reason = "no run here, expected a directory with a run.json"
    expected = (2, "", f"error: {tmp_path / 'notes'}: {reason}\n")
    assert (result.exit_code, result.stdout, result.stderr) == expected
    assert not (tmp_path / name).exists()
