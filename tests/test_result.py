"""The page of an experiment, from the runs of a real one: `tiny_experiment.py`, in a hurry.

That a page is a function of its runs is tested by writing it twice; its tables are read back and
compared with run.json.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fp8lab.lab.experiment import Settings, load_experiment, run_experiment
from fp8lab.lab.result import (
    Clause,
    NoConclusion,
    Picture,
    Result,
    Table,
    diverged,
    final_losses,
    judged,
    ratios,
    require_conclusion,
    results,
    runs_of,
    spread,
    wilson,
    write_log,
    write_page,
)
from fp8lab.lab.work import Chosen
from fp8lab.monitor.about import command
from fp8lab.store import find_runs, open_run

TINY = Path(__file__).with_name("tiny_experiment.py")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experiment with its first seed and two steps; not to be written to."""
    out = tmp_path_factory.mktemp("quick") / "out"
    file, experiment = load_experiment(str(TINY))
    assert run_experiment(file, experiment, out, workers=1, settings=Settings(quick=True)) == []
    return out


@pytest.fixture
def whole(quick: Path, tmp_path: Path) -> Path:
    """The same runs as if they were all that the experiment asks for."""
    out = tmp_path / "out"
    shutil.copytree(quick, out)
    told = json.loads((out / "experiment.json").read_text())
    told["settings"]["quick"] = False
    (out / "experiment.json").write_text(json.dumps(told))
    return out


def one_seed() -> tuple[Path, object]:
    file, experiment = load_experiment(str(TINY))
    parts = tuple(replace(part, seeds=(0,)) for part in experiment.parts)
    return file, replace(experiment, parts=parts)


def test_in_a_hurry_there_is_one_seed_and_few_steps(quick: Path) -> None:
    runs = [open_run(path) for path in find_runs(quick)]
    assert [run.info["config"]["seed"] for run in runs] == [0, 0, 0, 0]
    assert {run.info["config"]["steps"] for run in runs} == {2}
    assert json.loads((quick / "experiment.json").read_text())["settings"]["quick"] is True


def test_runs_of_a_part_by_arm_and_seed(quick: Path) -> None:
    assert runs_of(quick, "second").keys() == {("bf16", 0), ("hot", 0)}
    assert runs_of(quick, "third") == {}


def test_the_page_says_verdict_question_tables_and_where_it_is_from(
    whole: Path, tmp_path: Path
) -> None:
    file, experiment = one_seed()
    page = write_page(experiment, file, whole, tmp_path / "reports")
    assert page == tmp_path / "reports" / "tiny.md"
    lines = page.read_text(encoding="utf-8").splitlines()
    end = open_run(whole / "second" / "hot" / "seed-0").info["result"]["diverged_at"]
    verdict = "refuted. 0" if end is None else "confirmed. 1"
    assert lines[0] == f"# tiny: {verdict} of 1 hot runs diverged."
    assert "**Does a learning rate of a million diverge?**" in lines
    assert "*Predicted before the first run:* It does." in lines
    assert "*Refuted if* it does not." in lines
    assert f"| hot | 0 | {'–' if end is None else end} |" in lines
    assert "| bf16 | 0 | – |" in lines
    assert "- It is tiny." in lines
    assert "![Losses](<tiny-losses.png>)" in lines
    assert f"- `{command()}`, 4 runs" in lines
    versions = open_run(whole / "first" / "bf16" / "seed-0").info["versions"]
    assert f"torch {versions['torch']}" in page.read_text(encoding="utf-8")


def test_a_folder_that_knows_no_command_has_the_usual_one(whole: Path, tmp_path: Path) -> None:
    told = json.loads((whole / "experiment.json").read_text())
    assert told.pop("commands") == [command()]
    (whole / "experiment.json").write_text(json.dumps(told))
    file, experiment = one_seed()
    lines = write_page(experiment, file, whole, tmp_path).read_text(encoding="utf-8").splitlines()
    assert "- `fp8lab run tiny --report reports`, 4 runs" in lines


@pytest.mark.parametrize("fails", ["conclude", "a picture"])
def test_a_conclusion_that_fails_is_a_line_and_a_file(
    whole: Path, tmp_path: Path, fails: str
) -> None:
    def raising(*_: object) -> Result:
        raise KeyError("the arm\nand more")

    file, experiment = one_seed()
    drawn = Result(
        verdict="partly", sentence="It did.", parts=(Picture(name="a", title="A", draw=raising),)
    )  # type: ignore[arg-type]
    failing = replace(experiment, conclude=raising if fails == "conclude" else lambda _: drawn)
    with pytest.raises(NoConclusion) as caught:
        write_page(failing, file, whole, tmp_path / "reports")
    place = f"(test_result.py:{raising.__code__.co_firstlineno + 1})"
    told = f"no conclusion: KeyError: 'the arm\\nand more' {place}; all of the error is in "
    assert str(caught.value) == f"experiment tiny: {told}{whole / 'traceback.txt'}"
    assert (whole / "traceback.txt").read_text().startswith("Traceback (most recent call last)")
    write_page(experiment, file, whole, tmp_path / "reports")
    assert not (whole / "traceback.txt").exists()


def test_a_conclusion_is_a_result(whole: Path, tmp_path: Path) -> None:
    file, experiment = one_seed()
    told: Any = lambda out: "It did."  # noqa: E731
    with pytest.raises(NoConclusion, match=r"TypeError: conclude: returned str, expected a Result"):
        write_page(replace(experiment, conclude=told), file, whole, tmp_path / "reports")


def test_the_same_runs_give_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    file, experiment = one_seed()
    written = []
    for folder in (tmp_path / "one", tmp_path / "other"):
        write_page(experiment, file, whole, folder)
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0].keys() == {"tiny.md", "tiny-losses.png"}
    assert written[0] == written[1]


def test_a_page_in_a_hurry_says_that_nothing_follows(quick: Path, tmp_path: Path) -> None:
    file, experiment = load_experiment(str(TINY))
    page = write_page(experiment, file, quick, tmp_path)
    heading = page.read_text(encoding="utf-8").splitlines()[0]
    assert heading == "# tiny: a quick run, few steps of one seed. Nothing follows from it."
    write_log(tmp_path, tmp_path / "LOG.txt")
    assert "tiny" not in (tmp_path / "LOG.txt").read_text(encoding="utf-8")


def test_a_missing_run_is_named_and_nothing_written(whole: Path, tmp_path: Path) -> None:
    file, experiment = load_experiment(str(TINY))  # of two seeds
    with pytest.raises(ValueError, match=r"out: 4 runs are not finished, first/bf16/seed-1 first$"):
        write_page(experiment, file, whole, tmp_path / "reports")
    assert not (tmp_path / "reports").exists()


def test_an_experiment_without_a_conclusion_has_no_page(whole: Path, tmp_path: Path) -> None:
    file, experiment = load_experiment(str(TINY))
    with pytest.raises(ValueError, match=r"^experiment tiny: has no conclusion to write$"):
        write_page(replace(experiment, conclude=None), file, whole, tmp_path)


def test_the_log_has_the_verdict_in_its_headings(whole: Path, tmp_path: Path) -> None:
    file, experiment = one_seed()
    heading = write_page(experiment, file, whole, tmp_path / "reports").read_text().splitlines()[0]
    (tmp_path / "reports" / "benchmarks.md").write_text(
        "# Benchmarks: fast. 3 times.\n\n**Bold**\n"
    )
    write_log(tmp_path / "reports", tmp_path / "LOG.md")
    lines = (tmp_path / "LOG.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("#")] == ["# Log", f"#{heading}"]
    assert "[The page](<../reports/tiny.md>)" in lines[-1]


def test_what_contradicts_the_literature_stands_in_the_heading(whole: Path, tmp_path: Path) -> None:
    file, experiment = one_seed()
    result = Result(verdict="partly", sentence="It did.", against="2409.12517 has it otherwise.")
    page = write_page(replace(experiment, conclude=lambda out: result), file, whole, tmp_path)
    heading = page.read_text(encoding="utf-8").splitlines()[0]
    assert heading == "# tiny: partly. It did. Against the literature: 2409.12517 has it otherwise."


@pytest.mark.parametrize(
    ("holds", "verdict"),
    [
        ([True, True], "confirmed"),
        ([False, False], "refuted"),
        ([True, False], "partly"),
        ([True, False, None], "undecided"),
        ([True, None], "undecided"),
        ([False, None], "undecided"),
        ([], "undecided"),
    ],
)
@pytest.mark.parametrize("killed", [None, False, True])
def test_the_verdict_of_clauses(holds: list[bool | None], verdict: str, killed: bool) -> None:
    found, _ = judged([Clause("a", "b", one) for one in holds], killed=killed)
    assert found == ("refuted" if killed else verdict)


def test_a_prediction_clause_by_clause() -> None:
    clauses = [Clause("a", "1", True), ("b", "2", False), Clause("c", "–", None)]
    _, table = judged(clauses)
    assert table.rows["predicted"].tolist() == ["a", "b", "c"]
    assert table.rows["found"].tolist() == ["1", "2", "–"]
    assert table.rows["holds"].tolist() == ["yes", "**no**", "cannot be told"]
    of_numpy = [Clause("a", "1", np.True_), Clause("b", "2", np.False_)]
    assert judged(of_numpy)[0] == "partly"
    assert judged(of_numpy)[1].rows["holds"].tolist() == ["yes", "**no**"]


@pytest.mark.parametrize(("killed", "said"), [(True, "came"), (False, "did not come")])
def test_what_would_refute_it_stands_last(killed: bool, said: str) -> None:
    _, table = judged([Clause("a", "1", True)], killed=killed)
    assert table.rows.iloc[-1].tolist() == ["what would refute it", said, "–"]
    assert len(table.rows) == 2 and len(judged([Clause("a", "1", True)])[1].rows) == 1


def test_results_are_a_row_a_run(quick: Path) -> None:
    rows = results(quick, "second")
    assert rows[["arm", "seed", "steps"]].values.tolist() == [["bf16", 0, 2], ["hot", 0, 2]]
    for row, arm in enumerate(("bf16", "hot")):
        told = open_run(quick / "second" / arm / "seed-0").info["result"]
        kept = {name: value for name, value in told.items() if value is not None}
        assert rows.loc[row].dropna().to_dict() == kept | {"arm": arm, "seed": 0, "steps": 2}
    assert results(quick, "third").empty


def test_how_many_of_the_arms_diverged() -> None:
    rows = pd.DataFrame(
        {"arm": ["a", "a", "b", "c"], "diverged_at": [3.0, math.nan, 5.0, math.nan]}
    )
    assert diverged(rows, "a") == (1, 2)
    assert diverged(rows, "a", "b") == (2, 3)
    assert diverged(rows, "d") == (0, 0)


def test_ratios_are_of_the_seeds_that_both_have() -> None:
    rows = pd.DataFrame(
        {
            "arm": ["a", "b", "a", "b", "a"],
            "seed": [0, 0, 1, 1, 2],
            "x": [6.0, 3.0, 1.0, None, 5.0],
        }
    )
    assert ratios(rows, "x", "a", "b").to_dict() == {0: 2.0}


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    # Newcombe, Stat. Med. 17 (1998) 857, table I, method 3: score without continuity correction.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_as_newcombe_prints_it(count: int, of: int, low: float, high: float) -> None:
    assert tuple(round(end, 4) for end in wilson(count, of)) == (low, high)


def test_wilson_of_nothing_and_of_all() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(6, 6)[1] == 1.0


def test_spread_in_words() -> None:
    assert spread([1.0, 2.0, math.nan, 6.0]) == "3 (1 to 6)"
    assert spread([1.23456, 1.23456], digits=2) == "1.2 (1.2 to 1.2)"
    assert spread([math.inf, math.nan]) == spread([]) == "nothing"


def test_final_losses_by_seed_and_arm(quick: Path) -> None:
    finals = final_losses(quick, "second")
    run = open_run(quick / "second" / "bf16" / "seed-0")
    assert finals.index.tolist() == [0] and sorted(finals.columns) == ["bf16", "hot"]
    assert finals.loc[0, "bf16"] == run.info["result"]["final_loss"]
    diverged = open_run(quick / "second" / "hot" / "seed-0").info["result"]["diverged_at"]
    assert finals["hot"].isna().tolist() == [diverged is not None]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.123456, "0.1235"), (float("nan"), "–"), (None, "–"), (3, "3"), ("a|b\nc", "a\\|b c")],
)
def test_cells(value: object, shown: str, whole: Path, tmp_path: Path) -> None:
    file, experiment = one_seed()
    rows = pd.DataFrame({"what": pd.Series([value], dtype=object)})
    result = Result(verdict="confirmed", sentence="So.", parts=(Table(title="T", rows=rows),))
    page = write_page(replace(experiment, conclude=lambda out: result), file, whole, tmp_path)
    assert f"| {shown} |" in page.read_text(encoding="utf-8").splitlines()


def test_bad_values_are_refused_at_birth() -> None:
    with pytest.raises(ValueError, match=r"^Result: verdict='yes', expected one of confirmed, "):
        Result(verdict="yes", sentence="So.")
    for sentence in ("", "two\nlines"):
        with pytest.raises(ValueError, match=r"^Result: sentence=.*, expected one line$"):
            Result(verdict="partly", sentence=sentence)
    with pytest.raises(ValueError, match=r"^Picture: name='\.\./x', expected letters"):
        Picture(name="../x", title="", draw=lambda: None)


def test_a_page_is_refused_before_its_other_runs_are_missed(quick: Path) -> None:
    _, experiment = load_experiment(str(TINY))
    everything = Chosen.of(None, None, None)
    require_conclusion(experiment, quick, True, everything)
    require_conclusion(experiment, quick, True, Chosen.of(None, ["bf16"], None))
    nothing = quick.parent / "nothing"
    require_conclusion(experiment, nothing, True, everything)
    left_out = r"runs that --part, --arm and --seed leave out, as \w+/.*: expected"
    for lacks, chosen in (
        (4, Chosen.of(None, None, [10**6])),
        (2, Chosen.of(["second"], None, None)),
    ):
        with pytest.raises(ValueError, match=f"^--report: .*nothing lacks {lacks} {left_out}"):
            require_conclusion(experiment, nothing, True, chosen)
