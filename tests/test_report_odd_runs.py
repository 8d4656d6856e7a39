"""Runs that a page meets seldom: gaps, infinities, unknown names, twins that end early.

Their rows are written by hand; what is demanded is the answer that a reader would give from them.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import colors
from rows_by_hand import Row, write

from fp8lab.comparison import lost_at
from fp8lab.diagnosis.rows import facts_of
from fp8lab.forecast import Trouble
from fp8lab.recipe import DelayedScaling
from fp8lab.record import Finding, Severity
from fp8lab.report import drawing, interactive, pictures_of_layers, what_if, write_report
from fp8lab.report.answer import answer_of
from fp8lab.report.drawing import BLUE
from fp8lab.report.page import render
from fp8lab.report.picked import ranged_rows
from fp8lab.report.sections import document_of
from fp8lab.report.story import Arm, Part, Story, load
from fp8lab.report.tables import precision
from fp8lab.store import RunWriter

PRODUCT = "layers.0.mlp:product"
CAST: Row = {"site": PRODUCT, "recipe": "DelayedScaling", "format": "E4M3", "scale": 224.0}


def found(cause: str, severity: Severity = "high", site: str | None = None) -> Finding:
    return Finding(
        cause=cause, severity=severity, confidence="high", summary="so", evidence=(), site=site
    )


def steps(count: int, lost: int | None = None, value: float = math.nan) -> list[Row]:
    return [{"loss": 1.0 if lost is None or i < lost else value} for i in range(count)]


def findings(story: Story, **by_run: tuple[Finding, ...]) -> None:
    for run in story.runs:
        told = by_run.get(run.label.rpartition("/")[2], ())
        run.diagnosis = replace(run.diagnosis, findings=told, loss_alarm=None)


# --- where a loss was lost ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "events", "result", "expected"),
    [
        (steps(9), (), {}, None),
        (steps(9, 5), (), {}, 5),
        (steps(9, 5, math.inf), (), {}, 5),
        ([*steps(9, 5), {"loss": 1.0}], (), {}, None),  # it came back
        ([{"loss": 1.0}, {"loss": math.nan}, *steps(3), {"loss": math.nan}], (), {}, 5),
        ([*steps(9), {"grad_norm": 1.0}], (), {}, None),  # not recorded is not lost
        ([*steps(9, 5), {"grad_norm": 1.0}], (), {}, 5),
        ([{"loss": math.nan}, *steps(2, 0)], (), {}, 0),
        ([], (), {}, None),
        (steps(9), [{"step": 7, "kind": "diverged"}, {"step": 4, "kind": "diverged"}], {}, 4),
        (steps(9), [{"step": 7, "kind": "nonfinite_loss"}], {}, None),
        (steps(9, 5), (), {"diverged_at": 3}, 3),
        (steps(9, 5), [{"step": 4, "kind": "diverged"}], {"diverged_at": None}, None),
        (steps(9, 5), (), {"diverged_at": "soon"}, 5),
        (steps(9, 5), (), {"diverged_at": math.nan}, 5),
        (steps(9), (), {"diverged_at": True}, None),
        (steps(9), (), {"diverged_at": 1e300}, None),
    ],
)
def test_where_a_loss_was_lost(
    tmp_path: Path, rows: list[Row], events: Any, result: Row, expected: int | None
) -> None:
    run = write(tmp_path / "run", steps=rows, events=events, info={"result": result})
    assert lost_at(run) == expected
    assert load([run.path]).runs[0].diverged_at == expected


def test_of_several_processes_the_first_tells(tmp_path: Path) -> None:
    rows = [{"step": i, "rank": 1, "loss": 1.0} for i in range(9)]
    assert lost_at(write(tmp_path / "run", steps=[*steps(9, 5), *rows])) == 5


# --- is it FP8? -----------------------------------------------------------------------------------


def pair(folder: Path, run: list[Row], twin: list[Row]) -> Story:
    for arm, rows in (("fp8", run), ("bf16", twin)):
        held = "E4M3" if arm == "fp8" else "BF16"
        info = {"config": {"part": "p", "arm": arm, "seed": 1}, "precision": {"x": {"input": held}}}
        write(folder / arm, steps=rows, info=info)
    return load([folder])


@pytest.mark.parametrize(
    ("cause", "twin", "word", "because", "excluded"),
    [
        ("delayed_saturation", steps(6), "Yes", "neither diverged nor gave", None),
        ("delayed_saturation", steps(5), "Yes", None, "wrong in high precision too: its twin"),
        ("delayed_saturation", [], "Yes", None, "in high precision ended before it did"),
        ("delayed_saturation", steps(9, 7), "Yes", "diverged too, at step 7", "but hasten what"),
        ("delayed_saturation", steps(9, 5), "Cannot say", "too, at step 5, so that FP8 need", None),
        ("learning_rate", steps(6), "Cannot say", "neither diverged nor gave", None),
        ("learning_rate", steps(5), "No", None, "that FP8 has a part in it: its twin in high"),
        ("learning_rate", steps(9, 7), "No", "high precision diverged too, at step 7", None),
    ],
)
def test_a_twin_is_told_of_as_far_as_it_went(
    tmp_path: Path,
    cause: str,
    twin: list[Row],
    word: str,
    because: str | None,
    excluded: str | None,
) -> None:
    story = pair(tmp_path, steps(9, 5), twin)
    findings(story, fp8=(found(cause),))
    said = answer_of(story)
    hastened = excluded is not None and "hasten" in excluded
    sure = "low" if word == "Cannot say" else "medium" if hastened else "high"
    assert (said.word, said.confidence) == (word, sure)
    assert because in said.because if because else "twin" not in said.because
    assert excluded in said.cannot_exclude if excluded else "twin" not in said.cannot_exclude


def test_of_a_run_that_survived_the_twin_reached_as_far(tmp_path: Path) -> None:
    for count, reached in ((9, True), (8, False)):
        story = pair(tmp_path / str(count), steps(9), steps(count))
        findings(story, fp8=(found("learning_rate"),))
        said = answer_of(story)
        assert said.word == "No"
        assert ("neither diverged" in said.because) == reached
        assert ("ended before it did" in said.cannot_exclude) != reached


def test_a_finding_without_a_site_is_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, steps=steps(9))
    story = load([tmp_path])
    findings(story, a=(found("delayed_saturation", "low", PRODUCT),), b=(found("learning_rate"),))
    assert [run.label for run in story.worst_first()] == ["b", "a"]
    assert (answer_of(story).word, answer_of(story).cause) == ("No", "Learning rate")


def test_what_dose_response_runs_found_is_not_denied(tmp_path: Path) -> None:
    dose = {"dose": 1.0, "loss": 1.0, "gradient_cosine": 1.0}
    write(tmp_path / "dosed", steps=steps(9), info={"result": {"doses": [dose]}})
    write(tmp_path / "trained", steps=steps(9))
    story = load([tmp_path])
    findings(story, dosed=(found("bulk_underflow"),))
    assert answer_of(story).because.startswith("of the runs that are no dose-response, none div")


def test_what_could_not_be_read_is_not_cleared(tmp_path: Path) -> None:
    product = [CAST | {"step": step, "cur_amax": 1.0} for step in range(200)]
    write(tmp_path / "good", steps=steps(200), tensors=product)
    lost = write(tmp_path / "lost", steps=steps(200), info={"result": {"diverged_at": 199}})
    assert answer_of(load([tmp_path])).run == "run lost"
    (lost.path / "tensors.parquet").write_bytes(b"xx")
    said = answer_of(load([tmp_path]))
    assert (said.word, said.confidence) == ("Cannot say", "low")
    assert said.because.startswith("of the runs that could be read, none diverged")
    assert said.cannot_exclude.startswith("what 1 run that cannot be read holds")


def test_runs_that_were_planned_and_are_not_here_lower_the_confidence(tmp_path: Path) -> None:
    product = [CAST | {"step": step, "cur_amax": 1.0} for step in range(200)]
    config = {"experiment": "x", "part": "p", "arm": "a", "seed": 0}
    write(tmp_path / "run", steps=steps(200), tensors=product, info={"config": config})
    told: Row = dict.fromkeys(("question", "prediction", "refuted_if"), "so") | {"limits": []}
    for seeds, confidence in (([0], "medium"), ([0, 1], "low")):
        part = {"name": "p", "title": "P", "seeds": seeds, "arms": [{"name": "a"}]}
        file = tmp_path / "experiment.json"
        file.write_text(json.dumps(told | {"name": "x", "parts": [part]}))
        said = answer_of(load([tmp_path]))
        assert (said.word, said.confidence) == ("No", confidence)
        assert ("1 planned and not here" in said.cannot_exclude) == (confidence == "low")
    file.write_text("{")  # no run is lost with it
    assert answer_of(load([tmp_path])).word == "No"


def test_an_empty_run_hides_no_other(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", steps=steps(9), tensors=[CAST | {"step": 0, "cur_amax": 1.0}])
    story = load([tmp_path])
    assert story.worst_first()[0].label == "b"
    assert answer_of(story).word == "No"
    write(tmp_path / "c", info={"result": {"diverged_at": 3}})  # says that it diverged, and no more
    story = load([tmp_path])
    assert story.worst_first()[0].label == "c"
    assert answer_of(story).because.startswith("the run diverged at step 3")


FP8: Row = {"x": {"input": "E4M3"}}


def broken_off(path: Path, count: int, **told: Any) -> None:
    """A run in FP8 that has recorded so many steps and then ended otherwise than it should."""
    config = {"part": "p", "arm": path.name, "seed": 1}
    run = write(path, steps=steps(count), info={"config": config, "precision": FP8})
    file = run.path / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | told))


KILLED: Row = {"state": "running", "pid": 1 << 22, "born": 1}


def test_of_fp8_that_broke_off_nothing_is_known(tmp_path: Path) -> None:
    """A finding in BF16, or none at all, is no answer where FP8 has not been seen to its end."""
    config = {"part": "p", "arm": "bf16", "seed": 1}
    held = {"x": {"input": "BF16"}}
    write(tmp_path / "bf16", steps=steps(9), info={"config": config, "precision": held})
    for seed, name in enumerate(("fp8", "other")):
        broken_off(tmp_path / name, 3 * (1 - seed), state="failed", error="OSError: no GPU")
    story = load([tmp_path])
    how = "run came to its end: run fp8 and 1 more: failed after step 2: OSError: no GPU"
    for cause in (None, "learning_rate"):
        findings(story, **({"bf16": (found(cause),)} if cause else {}))
        said = answer_of(story)
        assert (said.word, said.confidence) == ("Cannot say", "low")
        assert how.replace("run came", "run in FP8 came" if cause else "run came") in said.because
    write(
        tmp_path / "whole",
        steps=steps(9),
        info={"config": config | {"arm": "fp8"}, "precision": FP8},
    )
    said = answer_of(load([tmp_path]))  # one that came to its end tells; of the others it is said
    assert (said.word, said.confidence) == ("No", "low") and "but not every" in said.because
    (run,) = load([tmp_path / "fp8"]).runs
    run.diagnosis = replace(run.diagnosis, findings=(found("learning_rate"),), loss_alarm=2)
    alone = Part(name="", title="", seeds=(), arms=(Arm(name="a", title="a", runs=(run,)),))
    story = Story(experiments=(), parts=(alone,), unread=())
    assert answer_of(story).word == "No"  # it went wrong while it was seen


def test_what_broke_off_is_not_cleared(tmp_path: Path) -> None:
    broken_off(tmp_path / "run", 200, **KILLED)
    said = answer_of(load([tmp_path]))
    assert (said.word, said.confidence) == ("Cannot say", "low")
    assert said.because.endswith("its end: run run: killed, last step on disk 199")
    page = write_report([tmp_path], tmp_path / "page.html").read_text(encoding="utf-8")
    told = "No rule saw a cause in what was recorded, and not all was."
    assert f'<div class="verdict"><p><strong>Nothing found.</strong> {told}</p></div>' in page
    assert told in write_report([tmp_path], tmp_path / "page.md").read_text(encoding="utf-8")
    broken_off(tmp_path / "empty", 0, state="failed", error="OSError: no GPU")
    said = answer_of(load([tmp_path / "empty"]))
    assert said.because == "nothing was recorded: failed before its first step: OSError: no GPU"
    broken_off(tmp_path / "stopped", 200, state="interrupted")  # by who watched it
    said = answer_of(load([tmp_path / "stopped"]))
    assert (said.word, said.confidence) == ("No", "low") and said.because.endswith(" so far")


def test_a_note_is_no_alarm_beside_an_answer_that_speaks_of_notes(tmp_path: Path) -> None:
    path = tmp_path / "run"
    write(path, steps=steps(9), events=[{"step": 3, "kind": "nothing"}], info={"precision": FP8})
    story = load([path])
    findings(story, run=(found("cold_start", "low"),))
    with drawing.style():
        page = render(document_of(story))
    assert "no rule found more than a note (severity low)" in page
    assert '<div class="verdict low">' in page
    assert '<span class="tag low">severity low</span>' in page


# --- what a page is made of -----------------------------------------------------------------------


def test_a_long_run_whose_channel_was_never_hot_in_a_full_step(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", {"every": 2})
    full: Row = {"histogram_start": 500, "histogram": [1, 2, 3], "bulk_error": 0.02}
    channel: Row = {"site": "layers.0.mlp", "channel": 3, "product_amax": 2.0}
    jumps = (1001, 1003, 1005)
    writer.append("steps", [{"step": i, "rank": 0, "loss": 1.0} for i in range(1400)])
    writer.append(
        "tensors",
        [
            CAST
            | {"step": i, "rank": 0, "cur_amax": 64.0 if i in jumps else 2.0}
            | {"hot_channel": 7 if i in jumps else 3, "staleness": 32.0 if i in jumps else 1.0}
            | (full if i % 2 == 0 else {})
            for i in range(1400)
        ],
    )
    writer.append("channels", [channel | {"step": i, "rank": 0} for i in range(0, 1400, 2)])
    writer.close()
    (run,) = load([tmp_path / "run"]).runs
    assert run.diagnosis.findings[0].channel == 7
    assert set(run.channels["channel"]) == {3}


def test_channels_whose_product_was_not_recorded_have_no_chart(tmp_path: Path) -> None:
    rows = [
        CAST | {"step": i, "cur_amax": 64.0 if i > 150 else 2.0, "hot_channel": 7, "staleness": s}
        for i in range(300)
        for s in [32.0 if i == 151 else 1.0]
    ]
    run = write(tmp_path / "run", steps=steps(300), tensors=rows)
    assert "channels" not in interactive.payload(load([run.path]))


def test_the_kind_is_that_of_the_first_serious_trouble() -> None:
    def trouble(kind: Any, step: int) -> Trouble:
        fields: Row = {"site": "a:product", "layer": "a", "operand": "input", "steps": 1}
        fields |= {"known_steps": 9, "quantity": "q", "worst": 1.0, "threshold": 1.0, "source": "s"}
        return Trouble(kind=kind, step=step, **fields)

    troubles = (trouble("breaks", 900), trouble("underflows", 3))
    counts = ("flushed_low", "flushed_high", "saturated_low", "saturated_high", "staleness")
    frame = pd.DataFrame({name: [0.0] for name in counts})
    forecast: Any = SimpleNamespace(troubles=troubles, serious=troubles, unknown={}, frame=frame)
    assert what_if._row(DelayedScaling(), forecast)[1].text == "underflows: serious since step 3"


def infinite_at_50(folder: Path) -> Story:
    rows = [
        {"step": i, "site": PRODUCT, "cur_amax": math.inf if i == 50 else 2.0, "infs": int(i == 50)}
        for i in range(400)
    ]
    weights = [{"step": i, "site": "layers.0.mlp.up:weight", "cur_amax": 1.0} for i in range(400)]
    norms: list[Row] = [
        {"loss": 1.0, "grad_norm": math.inf if i == 50 else 1.0, "metrics": {"common_loss": loss}}
        for i in range(400)
        for loss in [math.nan if i == 99 else 1.0]
    ]
    norms.append({"loss": 1.0, "grad_norm": 1.0})  # nothing more of it was recorded
    return load([write(folder, steps=norms, tensors=rows + weights).path])


def test_an_infinite_peak_is_the_worst_of_a_map(tmp_path: Path) -> None:
    (run,) = infinite_at_50(tmp_path / "run").runs
    heat = interactive._heat(run)
    assert heat is not None
    amax = next(one for one in heat["statistics"] if one["label"] == "largest magnitude")
    (values,) = [row for row in amax["roles"]["product"] if row[0] is not None]
    at = values.index("inf")
    assert amax["steps"][at] == 50
    assert set(values) == {2, "inf"}
    with drawing.style():
        figure = pictures_of_layers.heat(run, "cur_amax")
        assert not isinstance(figure, str)
        axes = figure.axes[0]
        mesh = axes.collections[0]
        shown = mesh.to_rgba(np.asarray(mesh.get_array()))[0]
        figure.draw_without_rendering()
    _, edges, _ = pictures_of_layers.map_of(run, "cur_amax")
    blue = np.flatnonzero((shown == colors.to_rgba(BLUE)).all(axis=1))
    assert blue.tolist() == [int(np.searchsorted(edges, 50, side="right")) - 1]
    assert axes.get_title(loc="left").endswith(", blue is infinite")


def test_a_map_of_nothing_but_infinity_is_drawn(tmp_path: Path) -> None:
    rows: list[Row] = [{"step": 0, "site": PRODUCT, "cur_amax": math.inf}]
    (run,) = load([write(tmp_path / "run", tensors=rows).path]).runs
    with drawing.style():
        figure = pictures_of_layers.heat(run, "cur_amax")
        assert not isinstance(figure, str)
        figure.draw_without_rendering()


def test_what_a_line_leaves_out_is_said(tmp_path: Path) -> None:
    story = infinite_at_50(tmp_path / "run")
    (run,) = story.runs
    assert [run.not_finite(name) for name in ("loss", "grad_norm", "common_loss")] == [0, 1, 1]
    with drawing.style():
        caption = document_of(story).pictures()["losses"].caption
    told = "Not finite, and not drawn: the loss in 1 step, the gradient norm in 1 step."
    assert caption.endswith(told)


def test_names_that_nobody_knows_cost_only_themselves(tmp_path: Path) -> None:
    full = CAST | {"staleness": 1.0, "histogram_start": 500, "histogram": [1, 2], "cur_amax": 2.0}
    rows = [full | {"step": 0, "format": "E9M9"}, full | {"step": 1, "format": "FloatFormat"}]
    rows += [full | {"step": step} for step in (2, 3)]
    odd = write(tmp_path / "odd", steps=steps(4), tensors=rows, info={"precision": [1], "sites": 5})
    story = load([odd.path])
    (run,) = story.runs
    assert ranged_rows(run.products)["step"].tolist() == [2, 3]
    assert facts_of(run.run.info, "precision") == {}
    assert precision(story.parts[0].arms[0], "").rows == []
    write_report([odd.path], tmp_path / "page.html")


def test_a_chart_has_what_it_shows_and_marks_products_alone(tmp_path: Path) -> None:
    story = infinite_at_50(tmp_path / "run")
    (run,) = story.runs
    marked = [replace(found("cold_start", site=PRODUCT), since=3)]
    marked += [replace(found("cold_start", site="layers.0.mlp.up:weight"), since=4)]
    run.diagnosis = replace(run.diagnosis, findings=tuple(marked))
    heat = interactive._heat(run)
    assert heat is not None
    assert [(step, heat["layers"][row]) for step, row, _ in heat["marks"]] == [(3, "layers.0.mlp")]
    (losses,) = interactive.payload(story)["losses"]
    assert set(losses["runs"][0]) == {"name", "arm", "seed", "lines", "marks"}
