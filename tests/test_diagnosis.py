"""Every rule at each of its thresholds, on rows written by hand, and on real trainings.

Rows by hand say where a rule turns over: one value on the threshold, the next float beyond it. The
real trainings say that what the rules name is what happened: the channel that the rare token's
product is largest in is computed here from the weights of a second, unwatched training.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rows_by_hand import Row, above, below
from torch import nn
from torch.nn import functional

from fp8lab.conversion import convert
from fp8lab.diagnosis import Diagnosis, diagnose, ranked
from fp8lab.diagnosis.loss import loss_alarm
from fp8lab.diagnosis.rows import Loaded
from fp8lab.diagnosis.twin import first_divergence
from fp8lab.ffn import GatedFeedForward
from fp8lab.lab.experiment import Settings, load_experiment, run_experiment
from fp8lab.lab.model import LanguageModel, ModelConfig, amplify
from fp8lab.lab.rare_tokens import LEARNING_RATE, Regression, Student
from fp8lab.mitigations import SmoothSwiGLU
from fp8lab.monitor import watch
from fp8lab.monitor.selection import Selection
from fp8lab.recipe import Float8CurrentScaling, HighPrecision, Recipe
from fp8lab.record import Finding, Severity
from fp8lab.store import Run, RunError, RunWriter, open_run

FP8 = {"mlp.down": {"input": "E4M3 DelayedScaling", "weight": "E4M3 DelayedScaling"}}
BF16 = {"mlp.down": {"input": "BF16 HighPrecision", "weight": "FP32 HighPrecision"}}


def write(
    path: Path,
    *,
    tensors: Iterable[Row] = (),
    losses: Iterable[float | None] = (),
    events: Iterable[Row] = (),
    precision: dict[str, dict[str, str]] | None = None,
) -> Run:
    """A run of these rows; `losses` from step 0 on."""
    writer = RunWriter.create(path, {} if precision is None else {"precision": precision})
    writer.append("tensors", [{"rank": 0} | row for row in tensors])
    writer.append("steps", [{"step": i, "rank": 0, "loss": x} for i, x in enumerate(losses)])
    writer.append("events", [{"rank": 0} | event for event in events])
    writer.close()
    return open_run(path)


def findings(path: Path, *rows: Row, **more: Any) -> tuple[Finding, ...]:
    return diagnose(write(path, tensors=rows, **more)).findings


# --- delayed saturation -------------------------------------------------------------------------


def clipped(step: int, amax: float, staleness: float = 5.0, channel: int = 7, **more: Any) -> Row:
    row = {"step": step, "site": "mlp:product", "cur_amax": amax, "staleness": staleness}
    return row | {"hot_channel": channel} | more


def test_delayed_saturation_needs_more_than_an_octave_of_staleness(paths: Iterator[Path]) -> None:
    assert findings(next(paths), clipped(5, 10.0, staleness=2.0)) == ()
    (found,) = findings(next(paths), clipped(5, 10.0, staleness=above(2.0)))
    assert (found.cause, found.severity, found.since) == ("delayed_saturation", "low", 5)


def test_delayed_saturation_reads_products_only(paths: Iterator[Path]) -> None:
    assert findings(next(paths), clipped(5, 10.0, site="mlp:output")) == ()


def test_wind_up_is_two_octaves_of_growth_behind_the_clipping(paths: Iterator[Path]) -> None:
    expected: list[tuple[float, Severity]] = [(below(40.0), "medium"), (40.0, "high")]
    for peak, severity in expected:
        (found,) = findings(next(paths), clipped(5, 10.0), clipped(9, peak))
        assert (found.severity, found.confidence) == (severity, severity)


def test_wind_up_is_measured_against_the_clipped_steps_before_the_peak(
    paths: Iterator[Path],
) -> None:
    # The median of 10 and 30 is 20. With the peak, or with what follows it, it would be 30 and 90.
    rows = [clipped(1, 10.0), clipped(2, 30.0), clipped(3, 80.0)]
    assert findings(next(paths), *rows)[0].severity == "high"
    assert findings(next(paths), *rows, clipped(4, 79.0), clipped(5, 79.0))[0].severity == "high"
    assert findings(next(paths), *rows[:2], clipped(3, below(80.0)))[0].severity == "medium"
    # Not against steps that were not clipped, however small.
    unclipped = [clipped(step, 1.0, staleness=1.0) for step in range(3)]
    assert findings(next(paths), *unclipped, clipped(3, 80.0))[0].severity == "medium"


def test_a_loss_that_tells_after_the_clipping_makes_it_as_bad_but_not_as_sure(
    paths: Iterator[Path],
) -> None:
    for step, severity in ((55, "high"), (56, "medium"), (6, "high"), (5, "medium")):
        events = [{"step": step, "kind": "diverged", "detail": "it did"}]
        found = findings(next(paths), clipped(5, 10.0), events=events, precision=FP8)[0]
        assert (found.severity, found.confidence) == (severity, "medium")


def test_what_begins_after_the_loss_told_is_no_cause(paths: Iterator[Path]) -> None:
    for alarm, severity in ((5, "medium"), (4, "low")):
        events = [{"step": alarm, "kind": "diverged", "detail": "it did"}]
        found = findings(next(paths), clipped(5, 10.0), events=events, precision=FP8)[0]
        assert found.severity == severity


def test_of_several_processes_a_step_counts_once(paths: Iterator[Path]) -> None:
    alone = [clipped(5, 10.0), clipped(6, 11.0), clipped(9, 39.0)]
    others = [clipped(row["step"], 1.0, channel=3, rank=1) for row in alone]
    together = [clipped(row["step"], row["cur_amax"], channel=0, rank=-1) for row in alone]
    expected = findings(next(paths), *alone)
    assert findings(next(paths), *together, *alone, *others) == expected
    assert findings(next(paths), *together) == ()


def test_what_delayed_saturation_says(paths: Iterator[Path]) -> None:
    rows = [
        clipped(4, 9.0, staleness=1.5, channel=1),
        clipped(6, 10.0, staleness=2.5, channel=2),
        clipped(7, 11.0, staleness=8.0, channel=3),
        clipped(8, 90.0, staleness=3.0, channel=4),
        clipped(9, 80.0, staleness=4.0, channel=5),
    ]
    (found,) = findings(next(paths), *rows)
    assert (found.site, found.channel, found.since) == ("mlp:product", 4, 6)
    assert found.summary == (
        "the delayed scale clipped the product in 4 steps, at worst to 1/8 of its largest value; "
        "behind the clipping the product grew to 8.57 times what it was"
    )
    assert [(e.step, e.value, e.threshold) for e in found.evidence] == [
        (6, 2.5, 2.0),
        (7, 8.0, 2.0),
        (8, 90.0 / 10.5, 4.0),
    ]
    assert "BF16" in found.remedy and "BF16" in found.cannot_exclude


def test_delayed_saturation_is_silent_where_a_number_is_missing(paths: Iterator[Path]) -> None:
    for missing in ("staleness", "cur_amax", "hot_channel"):
        row = clipped(5, 10.0)
        del row[missing]
        assert findings(next(paths), row) == ()


def test_every_clipped_site_has_a_finding_the_earlier_first(paths: Iterator[Path]) -> None:
    rows = [clipped(9, 1.0, site="a:product"), clipped(8, 1.0, site="b:product")]
    assert [f.site for f in findings(next(paths), *rows)] == ["b:product", "a:product"]


# --- bulk underflow -----------------------------------------------------------------------------


def underflown(step: int = 5, bulk_error: float = 0.3, **more: Any) -> Row:
    row = {"step": step, "site": "mlp:product", "scale": 2.0, "bulk_error": bulk_error}
    row |= {"flushed": 0.25, "subnormal": 0.25, "hot_channel": 3, "channel_ratio": 1e5}
    return row | more


def test_bulk_underflow_begins_at_four_times_the_formats_own_error(paths: Iterator[Path]) -> None:
    assert findings(next(paths), underflown(bulk_error=0.11)) == ()
    (found,) = findings(next(paths), underflown(bulk_error=above(0.11)))
    assert (found.cause, found.severity) == ("bulk_underflow", "medium")


def test_bulk_underflow_is_bad_where_half_of_the_signal_is_error(paths: Iterator[Path]) -> None:
    assert findings(next(paths), underflown(bulk_error=below(0.5)))[0].severity == "medium"
    assert findings(next(paths), underflown(bulk_error=0.5))[0].severity == "high"


def test_bulk_underflow_needs_values_below_the_normal_range(paths: Iterator[Path]) -> None:
    assert findings(next(paths), underflown(flushed=0.1, subnormal=0.1)) == ()
    for flushed, subnormal in ((above(0.2), 0.0), (0.0, above(0.2)), (0.125, 0.125)):
        assert len(findings(next(paths), underflown(flushed=flushed, subnormal=subnormal))) == 1


def test_bulk_underflow_reads_scaled_products_only(paths: Iterator[Path]) -> None:
    assert findings(next(paths), underflown(site="mlp:output")) == ()
    assert findings(next(paths), underflown(scale=None)) == ()


def test_bulk_underflow_reads_of_weights_that_of_down_alone(paths: Iterator[Path]) -> None:
    for name in ("down", "mlp.down", "layers.0.mlp.down_proj"):
        row = underflown(site=f"{name}:weight", channel_ratio=None)
        (found,) = findings(next(paths), row)
        assert (found.site, found.severity, found.channel) == (f"{name}:weight", "medium", None)
        assert found.remedy.startswith("keep the product in BF16") and "block" in found.remedy
        assert findings(next(paths), row | {"bulk_error": 0.11}) == ()
        assert findings(next(paths), row | {"scale": None}) == ()  # a scale per block or row
    for name in ("mlp.up", "mlp.gate", "countdown", "mlp.down.0", "mlp.down_gate"):
        assert findings(next(paths), underflown(site=f"{name}:weight")) == ()


def test_bulk_underflow_is_silent_where_a_number_is_missing(paths: Iterator[Path]) -> None:
    for missing in ("bulk_error", "flushed", "subnormal", "hot_channel"):
        assert findings(next(paths), underflown(**{missing: None})) == ()


def test_what_bulk_underflow_says(paths: Iterator[Path]) -> None:
    rows = [
        underflown(4, 0.1, hot_channel=1),
        underflown(6, 0.2, hot_channel=2),
        underflown(7, 0.6, hot_channel=5, channel_ratio=4e4, flushed=0.75),
        underflown(8, 0.4, hot_channel=6, flushed=0.9),
    ]
    (found,) = findings(next(paths), *rows)
    assert (found.site, found.channel, found.since) == ("mlp:product", 5, 6)
    assert found.summary == (
        "channel 5 is 4e+04 times the median channel and takes the range: the others are cast with "
        "an error of 60%, 75% of all values became zero"
    )
    assert [(e.step, e.value, e.threshold) for e in found.evidence] == [
        (6, 0.2, 0.11),
        (7, 0.6, 0.5),
    ]
    assert found.remedy.startswith("keep the product in BF16") and "SmoothSwiGLU" in found.remedy
    assert "BF16" in found.cannot_exclude


# --- not FP8, and the loss's own alarm ----------------------------------------------------------

DIVERGED = [{"step": 12, "kind": "diverged", "detail": "it did"}]


def test_not_fp8_where_no_operand_is_fp8(paths: Iterator[Path]) -> None:
    half = {"mlp.down": {"input": "FP16 HighPrecision"}}
    # A model that says nothing of its casts may have been made FP8 by another library.
    for precision, confidence in ((BF16, "high"), (half, "high"), ({}, "medium"), (None, "medium")):
        (found,) = diagnose(write(next(paths), events=DIVERGED, precision=precision)).findings
        assert (found.cause, found.severity, found.since) == ("not_fp8", "high", 12)
        assert found.confidence == confidence
        assert ("another library" in found.cannot_exclude) == (confidence == "medium")
        assert [(e.step, e.value) for e in found.evidence] == [(12, 12)]
    mixed = BF16 | FP8
    assert diagnose(write(next(paths), events=DIVERGED, precision=mixed)).findings == ()


def test_not_fp8_needs_a_run_that_went_wrong(paths: Iterator[Path]) -> None:
    assert diagnose(write(next(paths), losses=[1.0] * 30, precision=BF16)).findings == ()
    went_wrong = write(next(paths), events=DIVERGED, precision=BF16)
    healthy = write(next(paths), losses=[1.0] * 30, precision=FP8)
    assert diagnose(healthy, went_wrong).findings == ()


def test_not_fp8_where_the_twin_in_high_precision_went_wrong_too(paths: Iterator[Path]) -> None:
    run = write(next(paths), events=DIVERGED, precision=FP8)
    earlier = [{"step": 10, "kind": "nonfinite_loss", "detail": "loss is nan"}]
    twin = write(next(paths), events=earlier, precision=BF16)
    (found,) = diagnose(run, twin).findings
    assert (found.cause, found.severity, found.since) == ("not_fp8", "high", 12)
    assert "twin" in found.summary
    assert [(e.step, e.value) for e in found.evidence] == [(10, 10)]


def test_what_precision_cannot_have_caused_it_has_only_accompanied(paths: Iterator[Path]) -> None:
    rows = [clipped(5, 10.0), clipped(9, 40.0), underflown(6, 0.6, site="a:product")]
    run = write(next(paths), tensors=rows, events=DIVERGED, precision=FP8)
    twin = write(next(paths), events=DIVERGED, precision=BF16)
    for other, expected in (
        (None, [("delayed_saturation", "high", "high"), ("bulk_underflow", "high", "high")]),
        (
            twin,
            [
                ("not_fp8", "high", "high"),
                ("delayed_saturation", "medium", "low"),
                ("bulk_underflow", "medium", "low"),
            ],
        ),
    ):
        found = diagnose(run, other).findings
        assert [(f.cause, f.severity, f.confidence) for f in found] == expected


def test_a_twin_that_is_healthy_or_in_fp8_excuses_nothing(paths: Iterator[Path]) -> None:
    run = write(next(paths), events=DIVERGED, precision=FP8)
    healthy = write(next(paths), losses=[1.0] * 30, precision=BF16)
    in_fp8 = write(next(paths), events=DIVERGED, precision=FP8)
    for twin in (None, healthy, in_fp8):
        assert diagnose(run, twin).findings == ()


def test_the_loss_alarm_is_ten_times_the_start(paths: Iterator[Path]) -> None:
    start = [1.0] * 9 + [2.0]
    assert loss_alarm(write(next(paths), losses=[*start, 1.0, 20.0])) is None
    assert loss_alarm(write(next(paths), losses=[*start, 1.0, above(20.0), 99.0])) == 11
    assert loss_alarm(write(next(paths), losses=[*start, math.inf])) == 10


def test_the_start_is_a_twentieth_of_the_run_and_at_least_ten_steps(paths: Iterator[Path]) -> None:
    losses = [1.0] * 400
    losses[19], losses[200:210] = 5.0, [30.0] * 10
    assert loss_alarm(write(next(paths), losses=losses)) is None
    losses[19], losses[20] = 1.0, 5.0
    assert loss_alarm(write(next(paths), losses=losses)) == 200
    losses[9], losses[20] = 5.0, 1.0
    assert loss_alarm(write(next(paths), losses=losses[:201])) is None
    losses[9], losses[10] = 1.0, 5.0
    assert loss_alarm(write(next(paths), losses=losses[:201])) == 200


def test_the_loss_alarm_counts_steps_and_not_processes(paths: Iterator[Path]) -> None:
    path, losses = next(paths), [1.0] * 5 + [2.0] * 5 + [15.0, 21.0]
    writer = RunWriter.create(path, {})
    for rank, scale in ((0, 1.0), (1, 0.5)):
        rows = [{"step": i, "rank": rank, "loss": scale * x} for i, x in enumerate(losses)]
        writer.append("steps", rows)
    writer.close()
    assert loss_alarm(open_run(path)) == 11


def test_the_loss_alarm_passes_over_what_is_missing_or_below_zero(paths: Iterator[Path]) -> None:
    assert loss_alarm(write(next(paths), losses=[None, 1.0] * 10 + [11.0])) == 20
    assert loss_alarm(write(next(paths), losses=[-1.0] * 10 + [5.0])) is None
    assert loss_alarm(write(next(paths), losses=[0.0] * 10 + [5.0])) is None


def test_the_loss_alarm_is_the_earliest_of_events_and_loss(paths: Iterator[Path]) -> None:
    losses = [1.0] * 15 + [100.0]
    for kind, expected in (("diverged", 12), ("nonfinite_loss", 12), ("resumed", 15)):
        events = [{"step": step, "kind": kind, "detail": ""} for step in (12, 14)]
        assert loss_alarm(write(next(paths), losses=losses, events=events)) == expected
    late = [{"step": 16, "kind": "diverged", "detail": ""}]
    assert loss_alarm(write(next(paths), losses=losses, events=late)) == 15


# --- what diagnose makes of them ----------------------------------------------------------------


def test_the_worst_first_then_the_earliest(paths: Iterator[Path]) -> None:
    found = findings(
        next(paths),
        clipped(3, 10.0, site="a:product"),
        underflown(5, 0.6, site="b:product"),
        underflown(4, 0.6, site="c:product"),
    )
    assert [(f.severity, f.site) for f in found] == [
        ("high", "c:product"),
        ("high", "b:product"),
        ("medium", "a:product"),
    ]


def of(cause: str, severity: Severity, since: int, confidence: Severity = "high") -> Finding:
    return Finding(cause=cause, summary="s", severity=severity, confidence=confidence, since=since)


def test_a_fault_of_the_setup_comes_before_what_is_as_bad_and_as_sure() -> None:
    apart = of("rank_local_amax", "high", 9)
    for other, is_first in (
        (of("stale_scale", "high", 1), True),
        (of("stale_scale", "high", 1, "medium"), True),
        (of("missing_clamp", "high", 8), False),
    ):
        assert (ranked([other, apart], None)[0] is apart) == is_first
    label = of("precision_label", "medium", 0)
    assert ranked([label, of("stale_scale", "high", 1)], None)[-1] is label


def test_what_follows_a_rate_that_breaks_all_weights_is_no_worse_than_it(
    paths: Iterator[Path],
) -> None:
    rates = [(0.01, 0.001)] * 6 + [(0.3, 0.01)] * 14
    steps = [
        {"step": i, "rank": 0, "loss": 1.0, "update_ratio": ratio, "learning_rate": rate}
        for i, (ratio, rate) in enumerate(rates)
    ]
    for since, severity in ((5, "high"), (6, "medium")):
        writer = RunWriter.create(path := next(paths), {})
        writer.append("steps", steps)
        rows = [underflown(step, 0.6, site="a:product") for step in range(since, 20)]
        writer.append("tensors", [{"rank": 0} | row for row in rows])
        writer.close()
        found = {f.cause: f for f in diagnose(path).findings}
        assert found["learning_rate"].severity == "medium"
        assert found["bulk_underflow"].severity == severity


def test_a_difference_stands_out_by_six_times_and_lasts_for_most_of_five_steps(
    paths: Iterator[Path],
) -> None:
    def parted(*norms: float) -> int | None:
        here, there = (
            Loaded(
                write(
                    next(paths),
                    tensors=[
                        {"step": step, "site": "mlp:product", "l2_norm": norm}
                        for step, norm in enumerate(values)
                    ],
                )
            )
            for values in (norms, [1.0] * len(norms))
        )
        found = first_divergence(here, there)
        return None if found is None else found.step

    usual = [1.125] * 10
    assert parted(*usual, *[1.75] * 5) is None  # six times an eighth
    assert parted(*usual, *[above(1.75)] * 5) == 10
    sound = [1.0] * 10
    assert parted(*sound, 2.0, 1.0, 1.0, 2.0, 2.0, *sound) == 10
    assert parted(*sound, 2.0, 1.0, 1.0, 2.0, 1.0, *sound) is None


def judged(*since: tuple[Severity, int | None], alarm: int | None) -> Diagnosis:
    made = [
        Finding(cause="c", summary="s", severity=severity, confidence="low", since=step)
        for severity, step in since
    ]
    return Diagnosis(run="r", findings=tuple(made), loss_alarm=alarm)


def test_the_first_alarm_is_not_a_low_one() -> None:
    assert judged(("medium", 8), ("high", 9), ("low", 3), ("high", None), alarm=1).first_alarm == 8
    assert judged(("low", 3), alarm=1).first_alarm is None


def test_in_words() -> None:
    assert str(judged(alarm=None)) == "r: nothing found"
    assert str(judged(alarm=5)) == "r: nothing found; the loss told at step 5"
    high = "r:\n[high] c, since step 0\n  s"
    assert str(judged(("high", 0), alarm=None)) == high
    lead = "\nthe loss told at step 5, 5 steps after the first alarm"
    assert str(judged(("high", 0), alarm=5)) == high + lead
    assert str(judged(("high", 0), alarm=0)) == high + "\nthe loss told at step 0"


def test_as_data(paths: Iterator[Path]) -> None:
    rows = [clipped(5, 10.0), underflown(6)]
    told = diagnose(write(next(paths), tensors=rows, losses=[1.0] * 10 + [11.0], precision=FP8))
    data = told.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == json.loads(json.dumps(data))
    assert (data["first_alarm"], data["loss_alarm"]) == (5, 10)
    assert [f["cause"] for f in data["findings"]] == ["delayed_saturation", "bulk_underflow"]


@pytest.mark.parametrize("several", [["a", "b"], None])
def test_what_is_no_path_is_refused_in_one_line(several: Any) -> None:
    with pytest.raises(
        TypeError, match=f"^run: {re.escape(repr(several))}, expected the path of o"
    ):
        diagnose(several)


def test_a_run_may_be_given_as_itself_or_by_its_path(paths: Iterator[Path]) -> None:
    run = write(next(paths), tensors=[clipped(5, 10.0)])
    assert diagnose(run) == diagnose(run.path) == diagnose(str(run.path), str(run.path))
    missing = next(paths)
    for arguments in ((missing,), (run, missing)):
        with pytest.raises(RunError, match="no run here"):
            diagnose(*arguments)


def test_runs_with_next_to_nothing_in_them(paths: Iterator[Path]) -> None:
    everything = dict.fromkeys(
        ("cur_amax", "staleness", "scale", "bulk_error", "flushed"), math.nan
    )
    everything |= dict.fromkeys(("subnormal", "channel_ratio"), math.nan)
    row = {"step": 0, "site": "mlp:product"}
    for run in (
        write(next(paths)),
        write(next(paths), tensors=[row], losses=[1.0]),
        write(next(paths), tensors=[row], losses=[None]),
        write(next(paths), tensors=[row | everything] * 3, losses=[math.nan] * 30, precision=FP8),
        write(next(paths), tensors=[row | {"cur_amax": 1.0, "hot_channel": 0}], losses=[1.0] * 30),
    ):
        assert diagnose(run).findings == ()
        assert loss_alarm(run) is None


# --- real trainings -----------------------------------------------------------------------------

SURVIVORS = ("bf16", "fp8-current", "product-bf16", "smooth")


def rare_token_runs(out: Path, seeds: list[int], steps: int | None) -> Path:
    """Trainings of the main experiment, without its other parts."""
    file, experiment = load_experiment("swiglu_divergence")
    (part,) = (part for part in experiment.parts if part.name == "divergence")
    others = dataclasses.replace(part, seeds=tuple(seeds))  # other than the rules were made on
    arms = ("fp8-delayed", "anti-windup", *SURVIVORS)
    failures = run_experiment(
        file,
        dataclasses.replace(experiment, parts=(others,)),
        out,
        workers=2,
        arms=arms,
        settings=Settings(steps=steps),
    )
    assert failures == []
    return out / "divergence"


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Seed 3 diverges at step 540 of 2000; with anti-wind-up it is first clipped at step 413.
    return rare_token_runs(tmp_path_factory.mktemp("short") / "runs", [3], 600)


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rare_token_runs(tmp_path_factory.mktemp("full") / "runs", [3, 1], None)


def trained_again(seed: int, steps: int) -> tuple[list[float], int]:
    """The diverging arm without `watch`: the losses before `steps`, and then the channel in which
    the pure rare token's product is largest."""
    load_experiment("swiglu_divergence")
    experiment = sys.modules["fp8lab_experiment_swiglu_divergence"]
    model = experiment.DELAYED_ARM.prepare(Student(seed))
    task = Regression(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for step in range(steps):
        loss, _ = task.loss(model, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    token = task.task.rare_input
    gate, up = (functional.linear(token, layer.weight) for layer in (model.mlp.gate, model.mlp.up))
    return losses, int((functional.silu(gate) * up).abs().argmax())


def check_the_diverged(run: Run, seed: int) -> None:
    diagnosis = diagnose(run)
    (found,) = diagnosis.findings
    assert (found.cause, found.severity, found.confidence) == ("delayed_saturation", "high", "high")
    assert found.site == "mlp:product"
    assert run.info["result"]["diverged_at"] is not None
    assert diagnosis.loss_alarm is not None and diagnosis.first_alarm is not None
    assert diagnosis.first_alarm < diagnosis.loss_alarm <= run.info["result"]["diverged_at"]
    # The last model before the loss told: the blow-up itself wrecks the channel.
    losses, channel = trained_again(seed, diagnosis.loss_alarm)
    assert found.channel == channel
    assert run.steps()["loss"].tolist()[: len(losses)] == losses


def check_the_clipped(run: Run) -> None:
    """Anti-wind-up: clipping without wind-up."""
    (found,) = diagnose(run).findings
    assert found.cause == "delayed_saturation" and found.severity != "high"
    assert run.info["result"]["diverged_at"] is None


def check_the_healthy(run: Run) -> None:
    diagnosis = diagnose(run)
    assert [f for f in diagnosis.findings if f.severity != "low"] == []
    assert diagnosis.loss_alarm is None and run.info["result"]["diverged_at"] is None


@pytest.mark.long
def test_the_rare_token_diverges_and_is_named(short: Path) -> None:
    check_the_diverged(open_run(short / "fp8-delayed" / "seed-3"), 3)


def test_anti_windup_is_clipped_and_no_more(short: Path) -> None:
    check_the_clipped(open_run(short / "anti-windup" / "seed-3"))


@pytest.mark.parametrize("arm", SURVIVORS)
def test_nothing_is_found_where_nothing_happened(short: Path, arm: str) -> None:
    check_the_healthy(open_run(short / arm / "seed-3"))


def test_a_healthy_twin_leaves_the_finding_alone(short: Path) -> None:
    run, twin = short / "fp8-delayed" / "seed-3", short / "bf16" / "seed-3"
    diagnosis = diagnose(run, twin)
    assert diagnosis.findings == diagnose(run).findings
    assert diagnosis.divergence is not None


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3, 1])
def test_the_full_trainings_of_two_seeds(full: Path, seed: int) -> None:
    check_the_diverged(open_run(full / "fp8-delayed" / f"seed-{seed}"), seed)
    check_the_clipped(open_run(full / "anti-windup" / f"seed-{seed}"))
    for arm in SURVIVORS:
        check_the_healthy(open_run(full / arm / f"seed-{seed}"))


@pytest.mark.parametrize("arm", ["current", "smooth", "bf16"])
def test_a_planted_hot_channel_is_named_unless_it_does_no_harm(tmp_path: Path, arm: str) -> None:
    model: nn.Module = LanguageModel(ModelConfig(dim=24, layers=2, heads=3, context=16), 0)
    assert isinstance(model, LanguageModel)
    amplify(model, 1, 5, 2.0**18)
    recipe: Recipe = HighPrecision() if arm == "bf16" else Float8CurrentScaling()
    convert(model, recipe, exclude=("head",))
    if arm == "smooth":
        SmoothSwiGLU().apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with watch(model, tmp_path / "run", optimizer=optimizer, every=2) as watching:
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            loss = model.loss(torch.randint(0, 256, (4, 17), generator=generator))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watching.step(step, loss=loss)
    found = diagnose(tmp_path / "run").findings
    named = [(f.cause, f.severity, f.site, f.channel, f.since) for f in found]
    planted = ("bulk_underflow", "high", "layers.1.mlp:product", 5, 0)
    assert named == ([planted] if arm == "current" else [])


@pytest.mark.parametrize("compensated", [False, True])
def test_balanced_channels_that_down_cannot_take_are_named(
    tmp_path: Path, compensated: bool
) -> None:
    """SmoothSwiGLU hands the channels' range to down's columns, whose cast then loses the others;
    unless down's column was as much smaller as the channel was larger."""
    model = LanguageModel(ModelConfig(dim=32, layers=2, heads=2, context=16), 0)
    mlp = model.layers[1].mlp
    with torch.no_grad():
        mlp.gate.weight[7] *= 2.0**9
        mlp.up.weight[7] *= 2.0**11
        mlp.down.weight[:, 7] *= 2.0**-20 if compensated else 1.0
    convert(model, Float8CurrentScaling(), exclude=("head",))
    SmoothSwiGLU().apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    weights = Selection(tensors=("weight",), layers=("*.down",), statistics=("mse",))
    with watch(model, tmp_path / "run", optimizer=optimizer, every=1, select=weights) as watching:
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            loss = model.loss(torch.randint(0, 256, (2, 17), generator=generator))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watching.step(step, loss=loss)
    found = diagnose(tmp_path / "run").findings
    named = [(f.cause, f.severity, f.site, f.channel, f.since) for f in found]
    planted = ("bulk_underflow", "high", "layers.1.mlp.down:weight", None, 0)
    assert named == ([] if compensated else [planted])
    if found:
        assert found[0].summary.startswith(
            "a column of the weight as it is cast is the largest and takes the range: the others"
        )


def test_a_learning_rate_too_high_for_bf16_is_not_fp8(tmp_path: Path) -> None:
    model = convert(nn.Sequential(GatedFeedForward(8, 16)), HighPrecision())
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    with watch(model, tmp_path / "run", optimizer=optimizer) as watching:
        for step in range(20):
            x = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
            loss = (model(x) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watching.step(step, loss=loss)
    diagnosis = diagnose(tmp_path / "run")
    (found,) = diagnosis.findings
    assert (found.cause, found.severity, found.since) == ("not_fp8", "high", diagnosis.loss_alarm)
    assert diagnosis.loss_alarm is not None


def test_what_did_not_run_as_told_is_said_beside_the_findings(paths: Iterator[Path]) -> None:
    usual: dict[str, Any] = {"losses": [1.0] * 9}
    plain = write(next(paths), **usual, events=[{"step": 3, "kind": "checkpoint", "detail": ""}])
    assert str(diagnose(plain)) == f"{plain.path}: nothing found"
    assert diagnose(plain).to_dict()["not_as_told"] == []
    events = [{"step": 2, "kind": "resumed", "detail": "at step 2"}] * 2
    events += [
        {"step": 2, "kind": "not_run", "site": f"layers.{layer}", "detail": "frozen"}
        for layer in range(6)
    ]
    run = write(next(paths), **usual, events=events)
    told = ["resumed: at step 2", *(f"not_run: layers.{layer}: frozen" for layer in range(6))]
    said = "\n".join([*told[:5], "2 more, see fp8lab show"])
    assert str(diagnose(run)) == f"{run.path}: nothing found\n{said}"
    assert diagnose(run).to_dict()["not_as_told"] == told
