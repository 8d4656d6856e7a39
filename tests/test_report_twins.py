"""Which run of a page is the twin of which, where no experiment says so, and what it decides.

Rows by hand: two trainings of one model that nothing but precision tells apart, and what could be
mistaken for that.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rows_by_hand import Row, write
from typer.testing import CliRunner

from fp8lab.cli import app
from fp8lab.record import Finding
from fp8lab.report import report_data
from fp8lab.report.answer import answer_of
from fp8lab.report.story import load
from fp8lab.store import RunError, find_runs

HELD = {"fp8": "E4M3 DelayedScaling", "bf16": "BF16 HighPrecision"}


def run(
    path: Path,
    precision: str,
    lost: int | None = None,
    rate: float = 0.1,
    width: int = 8,
    start: float = 1.0,
    count: int = 9,
) -> Path:
    """Some steps as `watch` records them of somebody's own training."""
    losses = [start if lost is None or step < lost else math.nan for step in range(count)]
    steps: list[Row] = [{"loss": loss, "learning_rate": rate} for loss in losses]
    kind = "Fp8Linear" if precision == "fp8" else "Linear"
    info = {
        "config": {},
        "linears": {"down": {"class": kind, "in": width, "out": 4}},
        "precision": {"down": {"input@output": HELD[precision]}},
    }
    write(path, steps=steps, info=info)
    return path


def twin_named(*paths: Path, twin: Path | None = None) -> str | None:
    story = load(paths, twin)
    (broken,) = (one for one in story.runs if one.label == "broken")
    found = story.twin_of(broken)
    return None if found is None else found.label


def test_the_only_run_that_differs_in_precision_alone_is_the_twin(tmp_path: Path) -> None:
    broken = run(tmp_path / "broken", "fp8", lost=6)
    same = run(tmp_path / "same", "bf16")
    slower = run(tmp_path / "slower", "bf16", rate=0.05)
    wider = run(tmp_path / "wider", "bf16", width=16)
    others = run(tmp_path / "others", "bf16", start=1.1)
    short = run(tmp_path / "short", "bf16", count=4)
    fp8 = run(tmp_path / "fp8", "fp8")
    assert twin_named(broken, same, slower, wider, others, short, fp8) == "same"
    assert twin_named(broken, slower, wider, others, short, fp8) is None
    story = load([broken, same])
    assert story.twin_of(story.runs[1]) is None


def test_of_two_that_it_may_be_it_is_neither_but_the_one_that_is_given(tmp_path: Path) -> None:
    paths = [run(tmp_path / name, "bf16") for name in ("a", "b")]
    broken = run(tmp_path / "broken", "fp8", lost=6)
    assert twin_named(broken, *paths) is None
    assert twin_named(broken, *paths, twin=paths[1]) == "b"
    assert twin_named(broken, twin=paths[0]) == "a"
    with pytest.raises(RunError):
        load([broken], tmp_path / "nothing")
    with pytest.raises(RunError, match="operands of it are FP8"):
        load([paths[0]], broken)


def answer(*paths: Path, twin: Path | None = None) -> tuple[str, str, str]:
    story = load(paths, twin)
    found = Finding(
        cause="delayed_saturation", severity="high", confidence="high", summary="", evidence=()
    )
    for one in story.runs:
        told = (found,) if one.label == "broken" else ()
        object.__setattr__(one.diagnosis, "findings", told)
    said = answer_of(story)
    return said.word, said.confidence, said.cannot_exclude


def test_what_went_wrong_in_high_precision_too_is_not_said_to_be_fp8(tmp_path: Path) -> None:
    broken = run(tmp_path / "broken", "fp8", lost=6)
    healthy, lost = run(tmp_path / "healthy", "bf16"), run(tmp_path / "lost", "bf16", lost=5)
    assert answer(broken, healthy) == ("Yes", "high", "")
    assert answer(broken, lost)[:2] == ("Cannot say", "low")
    assert answer(broken)[2].endswith("in high precision too: no such run is here")
    assert answer(broken, healthy, lost)[2].endswith("that is here is known to be its twin")


def test_a_remedy_that_was_tried_in_vain_makes_the_answer_less_sure(tmp_path: Path) -> None:
    found = Finding(
        cause="delayed_saturation",
        severity="high",
        confidence="high",
        summary="",
        site="down:input",
        evidence=(),
    )

    def answered(*names: str) -> tuple[str, str, bool]:
        story = load([tmp_path / name for name in names])
        for one in story.runs:
            told = (found,) if one.label == "broken" else ()
            object.__setattr__(one.diagnosis, "findings", told)
        said = answer_of(story)
        because = "a run with it in high precision diverged too (run vain)" in said.because
        return said.word, said.confidence, because

    for name, lost, held in (
        ("broken", 6, "fp8"),
        ("vain", 7, "bf16"),
        ("saved", None, "bf16"),
        ("other", 7, "fp8"),
    ):
        losses = [1.0 if lost is None or step < lost else math.nan for step in range(9)]
        casts = {"input@output": HELD[held], "weight@output": HELD["fp8"]}
        info = {"config": {}, "precision": {"down": casts}}
        write(tmp_path / name, steps=[{"loss": loss} for loss in losses], info=info)
    assert answered("broken", "saved", "other") == ("Yes", "high", False)
    assert answered("broken", "saved", "vain") == ("Cannot say", "low", True)


def test_where_nothing_is_found_what_was_not_recorded_is_told(tmp_path: Path) -> None:
    said = answer_of(load([run(tmp_path / "lost", "fp8", lost=6)]))
    assert said.because.endswith("not recorded, so not judged: input of 1 layer (down)")
    assert "fp8lab diagnose RUN" in said.remedy


def test_what_went_well_is_not_yet_fp8(tmp_path: Path) -> None:
    assert answer(run(tmp_path / "broken", "fp8"))[:2] == ("Not yet", "high")


def test_the_seed_that_survives_in_another_arm_is_told_of(tmp_path: Path) -> None:
    told: dict[str, Any] = {"part": "p", "seed": 3}
    for arm, lost in (("broken", 6), ("mended", None), ("lost", 7), ("bf16", None)):
        losses = [1.0 if lost is None or step < lost else math.nan for step in range(9)]
        held = HELD["bf16" if arm == "bf16" else "fp8"]
        info = {"config": told | {"arm": arm}, "precision": {"x": {"input@output": held}}}
        write(tmp_path / arm, steps=[{"loss": loss} for loss in losses], info=info)
    story = load([tmp_path])
    found = Finding(
        cause="delayed_saturation", severity="high", confidence="high", summary="", evidence=()
    )
    for one in story.runs:
        object.__setattr__(one.diagnosis, "findings", (found,) if one.label == "broken" else ())
    assert answer_of(story).because.endswith("with the same seed it survives as mended")


def test_the_command_line_takes_the_twin(tmp_path: Path) -> None:
    broken = run(tmp_path / "broken", "fp8", lost=6)
    twin = run(tmp_path / "twin", "bf16", lost=6, rate=0.2)
    done = CliRunner().invoke(app, ["report", str(broken), "--twin", str(twin), "--json"])
    assert done.exit_code == 0
    assert "twin" in json.loads(done.stdout)["sections"]
    assert "twin" not in report_data([broken, twin])["sections"]


def test_reruns_of_a_bisection_are_found_from_its_own_folder_on(tmp_path: Path) -> None:
    mine, rerun = tmp_path / "runs" / "mine", tmp_path / "runs" / "why" / "reruns" / "rerun-000"
    run(mine, "fp8")
    run(rerun, "fp8")
    (tmp_path / "runs" / "why" / "bisection.json").write_text("{}")
    assert list(find_runs(tmp_path / "runs")) == [mine]
    assert list(find_runs(tmp_path / "runs" / "why")) == [rerun]
    assert list(find_runs(rerun.parent)) == [rerun]
