"""Scenarios: what `generate` promises of draws, and that the rules name the cause of a few.

What is promised of the cache is tested on scenarios that only write their label, in this process;
one test kills a real generation. The draws at the end are real trainings, the weakest of each
scenario, one for every cause; all the others are in `make bench-diagnosis`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_detectors import DETECTORS, Scored, gradient_z_score, loss_z_score, rule_online
from bench_diagnosis import Judged, confusion, headline, judge_run, misses, wilson

from fp8lab.diagnosis import OF_PRECISION, OF_TRAINING, Diagnosis
from fp8lab.diagnosis.rows import Loaded
from fp8lab.lab import scenarios as room
from fp8lab.lab.scenarios import Draw, Drawn, Label, Scenario, draw_of, generate, scenarios
from fp8lab.lab.scenarios.healthy import TOLERANCE, unhealthy
from fp8lab.record import Finding, Severity
from fp8lab.store import RunWriter, open_run

# --- the framework --------------------------------------------------------------------------------

CALLS: list[tuple[str, int]] = []
LABEL = Label(cause="made_up", sites=("a.mlp:product", "a.mlp.down:input"), onset=7)


def works(draw: Draw) -> Label:
    CALLS.append(("works", draw.seed))
    (draw.folder / "run").mkdir()
    return LABEL


def lies(draw: Draw) -> Label:
    return Label(cause="something_else")


def fails(draw: Draw) -> Label:
    CALLS.append(("fails", draw.seed))
    if draw.seed == 1:
        raise ValueError("no luck")
    return LABEL


class Here:
    """Does jobs in this process."""

    def __init__(self, size: int) -> None:
        pass

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def do(
        self, jobs: Mapping[int, Any], on_report: object, on_end: Callable[[int, str | None], None]
    ) -> None:
        for index, (call, arguments) in jobs.items():
            try:
                call(lambda report: None, *arguments)
            except ValueError as error:
                on_end(index, str(error))
            else:
                on_end(index, None)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    known = {
        run.__name__: Scenario(
            name=run.__name__, cause="made_up", title="", onset="a step", run=run
        )
        for run in (works, lies, fails)
    }
    monkeypatch.setattr(room, "scenarios", lambda: known)
    monkeypatch.setattr(room, "Workers", Here)


@pytest.mark.usefixtures("made_up")
def test_draws_are_done_once_and_come_with_their_labels(tmp_path: Path) -> None:
    first = list(generate("development", tmp_path, names=["works"], draws=3))
    assert [drawn.label for drawn in first] == [LABEL] * 3
    assert [drawn.run for drawn in first] == [
        tmp_path / "development" / "works" / str(number) / "run" for number in range(3)
    ]
    assert {drawn.twin for drawn in first} == {None}
    again = list(generate("development", tmp_path, names=["works"], draws=4))
    assert again[:3] == first
    assert CALLS == [("works", seed) for seed in range(4)]


@pytest.mark.usefixtures("made_up")
def test_a_draw_without_a_label_is_done_again_from_nothing(tmp_path: Path) -> None:
    (drawn,) = generate("development", tmp_path, names=["works"], draws=1)
    label = drawn.draw.folder / "label.json"
    for damage in (label.unlink, lambda: label.write_text('{"made_by"'), lambda: forget(label)):
        CALLS.clear()
        damage()
        (drawn.run / "left over").touch()
        assert list(generate("development", tmp_path, names=["works"], draws=1)) == [drawn]
        assert CALLS == [("works", 0)]
        assert list(drawn.run.iterdir()) == []


def forget(label: Path) -> None:
    said = json.loads(label.read_text())
    del said["label"]["cause"]
    label.write_text(json.dumps(said))


@pytest.mark.usefixtures("made_up")
def test_a_scenario_whose_file_has_changed_is_drawn_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "scenario.py"
    monkeypatch.setattr(room.inspect, "getfile", lambda function: str(source))
    for text, calls in (("one", 1), ("one", 0), ("two", 1)):
        CALLS.clear()
        source.write_text(text)
        list(generate("development", tmp_path / "out", names=["works"], draws=1))
        assert len(CALLS) == calls


@pytest.mark.usefixtures("made_up")
def test_a_twin_that_was_recorded_comes_along(tmp_path: Path) -> None:
    (drawn,) = generate("development", tmp_path, names=["works"], draws=1)
    (drawn.draw.folder / "twin").mkdir()
    assert drawn.twin == drawn.draw.folder / "twin"


@pytest.mark.usefixtures("made_up")
def test_draws_that_fail_are_named_when_all_are_done(tmp_path: Path) -> None:
    told: list[tuple[str, str | None]] = []
    with pytest.raises(RuntimeError, match=r"^fails, seed 1: no luck$"):
        list(
            generate(
                "development",
                tmp_path,
                names=["fails"],
                draws=3,
                on_end=lambda name, error: told.append((name, error)),
            )
        )
    assert told == [("fails, seed 0", None), ("fails, seed 1", "no luck"), ("fails, seed 2", None)]


@pytest.mark.usefixtures("made_up")
def test_a_label_that_is_not_the_scenarios_cause_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="label something_else, expected made_up"):
        list(generate("development", tmp_path, names=["lies"], draws=1))


def test_unknown_names_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scenario 'no such': expected some of .*healthy-bf16"):
        list(generate("development", tmp_path, names=["no such"]))
    with pytest.raises(ValueError, match="split 'test': expected one of development, evaluation"):
        list(generate("test", tmp_path))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_splits_share_no_seed_and_no_dial(tmp_path: Path) -> None:
    ours = [draw_of("development", "a", number, tmp_path) for number in range(10)]
    fresh = [draw_of("evaluation", "a", number, tmp_path) for number in range(10)]
    assert [draw.seed for draw in ours] == list(range(10))
    assert [draw.seed for draw in fresh] == list(range(2000, 2010))
    # Other seeds never take the place of those that are on disk.
    assert [draw.folder.name for draw in (*ours, *fresh)] == [
        str(draw.seed) for draw in (*ours, *fresh)
    ]
    np.testing.assert_array_equal([draw.strength for draw in ours], np.arange(10) / 9)
    dials = [draw.strength for draw in fresh]
    assert all(0 <= dial < 1 for dial in dials)
    others = [draw_of("evaluation", "b", number, tmp_path).strength for number in range(10)]
    assert len({*dials, *others, *(draw.strength for draw in ours)}) == 30
    assert dials == [draw_of("evaluation", "a", n, tmp_path).strength for n in range(10)]


def test_a_dial_runs_between_two_numbers_by_factors() -> None:
    draws = [Draw(0, strength, Path()).between(2.0, 32.0) for strength in (0.0, 0.5, 1.0)]
    assert draws == [2.0, 8.0, 32.0]


@pytest.mark.long
def test_a_killed_generation_goes_on_where_it_was(tmp_path: Path) -> None:
    name = "healthy-plain-gelu"
    code = (
        "from pathlib import Path; from fp8lab.lab.scenarios import generate\n"
        "if __name__ == '__main__': list(generate("
        f"'development', Path({str(tmp_path)!r}), names=[{name!r}], draws=2, workers=1))"
    )
    script = tmp_path / "generation.py"
    script.write_text(code)
    first, second = (tmp_path / "development" / name / str(number) for number in range(2))
    process = subprocess.Popen([sys.executable, script], start_new_session=True)
    for _ in range(1200):
        if (second / "run").exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (first / "label.json").exists() and not (second / "label.json").exists()
    before = (first / "label.json").stat().st_mtime_ns
    drawn = list(generate("development", tmp_path, names=[name], draws=2, workers=1))
    assert [one.draw.folder for one in drawn] == [first, second]
    assert (first / "label.json").stat().st_mtime_ns == before
    assert open_run(second / "run").state == "finished"


# --- what healthy means ---------------------------------------------------------------------------


def test_healthy_is_below_the_start_and_near_the_twin() -> None:
    good = {"start": 3.0, "final": 2.2, "twin_final": 2.0}
    assert unhealthy(good) is None
    assert unhealthy(good | {"final": 2.0 * TOLERANCE}) is None
    assert "BF16" in str(unhealthy(good | {"final": np.nextafter(2.0 * TOLERANCE, 3.0)}))
    assert "began" in str(unhealthy({"start": 3.0, "final": 3.0, "twin_final": 3.0}))
    assert "ends at nan" in str(unhealthy(good | {"final": float("nan")}))


# --- the harness ----------------------------------------------------------------------------------


def test_wilson_is_the_interval_of_the_textbook() -> None:
    # Newcombe 1998, table I: 81/263, 15/148, 0/20 and 1/29.
    table = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605)}
    table |= {(0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (good, of), interval in table.items():
        np.testing.assert_allclose(wilson(good, of), interval, atol=5e-5)


def found(cause: str, severity: Severity = "high", **more: Any) -> Finding:
    return Finding(cause=cause, summary="", severity=severity, confidence="high", **more)


def judged(name: str, label: Label, *findings: Finding, steps: int = 100) -> Judged:
    run = works if name != "independent" else fails
    scenario = Scenario(name=name, cause=label.cause, title="", onset="", run=run)
    drawn = Drawn(scenario, Draw(1000, 0.5, Path()), label)
    return Judged(drawn, Diagnosis(run="", findings=findings, loss_alarm=None), steps)


def test_what_counts_as_right() -> None:
    label = Label(cause="a", sites=("x", "y"), onset=50)
    good = found("a", site="y", since=60)
    assert judged("one", label, good, found("b")).is_right
    assert judged("one", label, found("b", "low"), good).is_right  # low findings are notes
    for since, right in ((40, True), (39, False), (61, False), (None, False)):
        assert judged("one", label, found("a", site="x", since=since)).onset_is_right is right
    wrong = judged("one", label, found("b", site="x", since=50), good)
    assert (wrong.cause_is_right, wrong.site_is_right, wrong.onset_is_right) == (False, True, True)
    assert not judged("one", label, found("a", site="z", since=50)).site_is_right
    nothing = judged("one", label, found("a", "low", site="x", since=50))
    assert (nothing.top, nothing.is_right, nothing.site_is_right) == ("nothing", False, False)
    nowhere = Label(cause="a")
    assert judged("one", nowhere, found("a")).is_right
    assert judged("one", Label(cause=None), found("a", "low")).is_right
    assert not judged("one", Label(cause=None), found("a", "medium")).is_right


def test_the_report_counts_and_names_what_is_wrong() -> None:
    label = Label(cause="a", sites=("x",), onset=50)
    faulty = [judged("one", label, found("a", site="x", since=50)) for _ in range(3)]
    faulty.append(judged("two", label, found("b", "medium", since=7), found("a")))
    controls = [judged("fine", Label(cause=None)), judged("loud", Label(cause=None), found("b"))]
    lines = list(headline(faulty, controls))
    assert "| top-1 cause right | 3/4 = 75.0% (30.1%–95.4%) | – | ≥ 95 % |" in lines
    assert "| a second cause named above “low” | 1/4 = 25.0% (4.6%–69.9%) | – |  |" in lines
    assert "controls with a finding above “low” | 1/2 = 50.0%" in lines[-1]
    table = list(confusion(faulty + controls))
    assert table[0] == "| | label \\ top-1 | 1 | 2 | nothing |"
    assert table[2:4] == ["| 1 | a | **3** | 1 | · |", "|  | healthy | · | 1 | **1** |"]
    told = list(misses(faulty + controls))
    assert told[2] == (
        "| two, seed 1000, dial 0.50 | a at x, step 50 of 100 | medium: b, step 7; high: a "
        "| cause, site, onset |"
    )
    assert len(told) == 7 and told[-1] == "- two (1): not explained yet"
    assert list(misses(faulty[:3])) == ["None."]


# --- detectors ------------------------------------------------------------------------------------


def test_a_lead_is_counted_from_the_first_alarm_to_the_loss() -> None:
    detector = DETECTORS[0]
    nan = np.nan
    runs = [np.array([1.0, 3.0, 1.0, 9.0]), np.array([nan, 1.0, 1.0]), np.array([5.0])]
    scored = Scored(detector, runs, np.array([0.0, 2.0, 4.0, nan] * 5))
    at = scored.at(2.0)
    np.testing.assert_array_equal(at.leads, [3, 0, 1])  # above the threshold, not on it
    assert (at.median_lead, at.detected, at.false_alarms) == (1.0, 2 / 3, 2500.0)
    np.testing.assert_array_equal(scored.at(3.0).leads, [1, 0, 1])
    best = scored.within(0.0)
    assert best is not None and (best.threshold, best.median_lead) == (4.0, 1.0)
    least = scored.within(-1.0)
    assert least is None


@pytest.mark.long
def test_scores_know_no_step_that_is_to_come(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    losses, norms = rng.normal(5.0, 1.0, 60), rng.normal(2.0, 0.1, 60)
    norms[40], losses[50] = 4.0, 50.0
    whole = written(tmp_path / "whole", losses, norms)
    for last in (30, 45, 55):
        part = written(tmp_path / str(last), losses[:last], norms[:last])
        for detector in DETECTORS:
            expected = detector.score(whole)[:last]
            np.testing.assert_array_equal(detector.score(part), expected, err_msg=detector.name)
    assert np.nanargmax(gradient_z_score(whole)) == 40
    before = losses[:50]
    expected = (50.0 - before.mean()) / before.std(ddof=1)
    np.testing.assert_allclose(loss_z_score(50)(whole)[50], expected, rtol=1e-9)
    # The rule, in the step in which it first finds something.
    np.testing.assert_array_equal(np.flatnonzero(~np.isnan(rule_online(whole))), [19])


def test_the_gradients_z_score_is_zclips(tmp_path: Path) -> None:
    # 25 norms of mean 2 and variance 0.0096, then a spike, which enters as 2 + sd 2.5^2 / z = 2.06.
    norms = [1.9, 2.1] * 12 + [2.0, 3.0, 2.0]
    scores = gradient_z_score(written(tmp_path / "run", [5.0] * 27, norms))
    assert np.isnan(scores[:25]).all()
    mean = 0.97 * 2.0 + 0.03 * 2.06
    variance = 0.97 * 0.0096 + 0.03 * (2.06 - mean) ** 2
    expected = [1.0 / 0.0096**0.5, (2.0 - mean) / variance**0.5]
    np.testing.assert_allclose(scores[25:], expected, rtol=1e-6)


def written(path: Path, losses: Any, norms: Any) -> Loaded:
    writer = RunWriter.create(path, {})
    rows = zip(losses, norms, strict=True)
    writer.append(
        "steps",
        [{"step": i, "rank": 0, "loss": x, "grad_norm": g} for i, (x, g) in enumerate(rows)],
    )
    products = [
        {
            "step": step,
            "rank": 0,
            "site": "mlp:product",
            "staleness": 3.0 if step % 20 == 19 else 1.0,
            "cur_amax": 2.0**step if step % 20 == 19 else 1.0,
            "hot_channel": 1,
        }
        for step in range(len(losses))
    ]
    writer.append("tensors", products)
    writer.close()
    return Loaded(open_run(path))


# --- real draws: the weakest of a scenario for each cause, and controls ---------------------------

QUICK = (
    "amax_no_longer_reduced",
    "attention_rate",
    "cold_start",
    "corrupt_inputs",
    "floor_comes",
    "gradients_no_headroom",
    "gradients_of_tokens",
    "history_too_short",
    "hot_channel_stack",
    "label_never_true",
    "massive_activation",
    "missing_clamp",
    "output_rate",
    "rare_spike",
    "rare_token",
    "rate_from_start",
    "second_moment",
    "sums_too_short",
    "weights_cluster",
    "healthy-anti-windup",
    "healthy-plain-bare",
    "healthy-spike",
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Drawn]:
    out = tmp_path_factory.mktemp("draws")
    draws = generate("development", out, names=QUICK, draws=1, workers=1)
    return {drawn.scenario.name: drawn for drawn in draws}


@pytest.mark.long
@pytest.mark.parametrize("name", QUICK)
def test_the_weakest_draw_is_diagnosed_right(drawn: dict[str, Drawn], name: str) -> None:
    one = drawn[name]
    judged = Judged(one, *judge_run(one.run, one.twin))
    assert (judged.top, judged.is_right) == (one.label.cause or "nothing", True)


def test_every_cause_has_a_draw_here() -> None:
    known = scenarios()
    causes = {scenario.cause for scenario in known.values()}
    assert {known[name].cause for name in QUICK} == causes
    rules = {rule.__name__.rpartition(".")[2] for rule in (*OF_PRECISION, *OF_TRAINING)}
    assert rules == causes - {None}


def test_there_are_two_scenarios_of_each_cause_and_forty_controls() -> None:
    counts = Counter(scenario.cause for scenario in scenarios().values())
    assert counts.pop(None) >= 40
    assert min(counts.values()) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(n for n in scenarios() if n.startswith("healthy-")))
def test_controls_are_healthy(tmp_path: Path, name: str) -> None:
    (one,) = generate("development", tmp_path, names=[name], draws=1, workers=1)
    result = open_run(one.run).info["result"]
    assert unhealthy(result) is None
