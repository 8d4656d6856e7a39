"""Causes that are no scale's doing: each threshold on rows by hand, each cause on a real training.

Rows by hand say where a rule turns over: a value on the threshold and the next float beyond it, a
step too few and one enough. The real trainings are scenarios, whose labels come from what they
injected and not from what was recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rows_by_hand import Row, above, below, found_by, write
from torch import nn

import fp8lab
from fp8lab.diagnosis import (
    attention_logits,
    diagnose,
    massive_activation,
    not_fp8,
    output_logits,
)
from fp8lab.diagnosis.growth import departure, spread
from fp8lab.diagnosis.loss import loss_alarm
from fp8lab.diagnosis.rows import Loaded
from fp8lab.diagnosis.twin import first_divergence
from fp8lab.lab.scenarios import Draw, scenarios
from fp8lab.record import Finding
from fp8lab.sketch import bin_edge
from fp8lab.store import Run, open_run

# --- growth -------------------------------------------------------------------------------------


def test_growth_began_after_the_last_ordinary_step() -> None:
    values = np.array([1.0, 1.0, 1.0, 3.0, above(3.0), 9.0, 90.0])
    assert departure(values, 6) == 4
    assert departure(np.array([1.0, 1.0, 9.0, 1.0, 9.0, 9.0]), 5) == 4  # it came back once
    assert departure(np.array([1.0, 1.0, 40.0, above(40.0)]), 3, mark=40.0) == 3
    assert departure(np.array([50.0, 60.0, 160.0, 300.0]), 3, mark=40.0) == 3


def test_one_outlier_does_not_move_the_spread() -> None:
    noise = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert spread(noise) == spread(np.array([1.0, 2.0, 3.0, 4.0, 500.0])) == 1.4826
    assert spread(np.array([])) == 0.0


# --- the loss's own alarm -----------------------------------------------------------------------


def losses(*values: float) -> list[Row]:
    return [{"loss": value} for value in values]


def test_a_spike_that_recovers_is_no_alarm_and_one_that_lasts_is(paths: Iterator[Path]) -> None:
    start = [1.0] * 20
    for length, expected in ((5, None), (6, 20)):
        rows = losses(*start, *[10.5] * length, *[1.0] * 20)
        assert loss_alarm(write(next(paths), steps=rows)) == expected
    # One that goes to and fro is gone all the same.
    rows = losses(*start, *[10.5, 10.5, 1.0] * 10)
    assert loss_alarm(write(next(paths), steps=rows)) == 20


def test_half_of_what_was_learnt_is_lost(paths: Iterator[Path]) -> None:
    learnt = [4.0] * 10 + [2.0] * 40
    for level, expected in ((3.0, None), (above(3.0), 55)):
        # The median of ten steps is beyond from the sixth on: that of five and five is between.
        rows = losses(*learnt, *[level] * 20)
        assert loss_alarm(write(next(paths), steps=rows)) == expected
    rows = losses(*learnt, *[3.9] * 4, *[2.0] * 20)
    assert loss_alarm(write(next(paths), steps=rows)) is None


def test_who_has_learnt_little_has_nothing_to_lose(paths: Iterator[Path]) -> None:
    for best, expected in ((3.0, None), (below(3.0), 36)):
        rows = losses(*[4.0] * 10, *[best] * 20, *[3.9] * 20)
        assert loss_alarm(write(next(paths), steps=rows)) == expected


def test_what_is_lost_must_stand_out_of_the_noise(paths: Iterator[Path]) -> None:
    for noise, expected in ((0.28, 55), (0.29, None)):
        learnt = [2.0 + noise * (-1) ** step for step in range(40)]
        rows = losses(*[4.0] * 10, *learnt, *[3.5] * 20)
        assert loss_alarm(write(next(paths), steps=rows)) == expected


def test_a_loss_that_is_negative_somewhere_may_rise(paths: Iterator[Path]) -> None:
    for lowest, expected in ((0.0, 20), (below(0.0), None)):
        rows = losses(*[1.0] * 19, lowest, *[99.0] * 20)
        assert loss_alarm(write(next(paths), steps=rows)) == expected
    events = [{"step": 25, "kind": "nonfinite_loss"}]
    assert loss_alarm(write(next(paths), steps=rows, events=events)) == 25


# --- not FP8 ------------------------------------------------------------------------------------

CASTS = {"fp8": "E4M3 delayed", "bf16": "BF16 HighPrecision"}


def gone_wrong(path: Path, cast: str | None, step: int, *, says_so: bool = True) -> Run:
    events = [{"step": step, "kind": "diverged"}] if says_so else []
    info = {"precision": {} if cast is None else {"mlp.down": {"input": CASTS[cast]}}}
    return write(path, steps=losses(*[1.0] * step, *[99.0] * 20), events=events, info=info)


def test_a_twin_that_goes_wrong_much_later_is_no_witness(paths: Iterator[Path]) -> None:
    run = gone_wrong(next(paths), "fp8", 12)
    for step, expected in ((62, 1), (63, 0)):
        twin = gone_wrong(next(paths), "bf16", step)
        assert len(found_by(not_fp8, run, twin)) == expected


def test_a_loss_that_only_rises_accuses_less(paths: Iterator[Path]) -> None:
    for cast, said, unsaid in (("bf16", "high", "medium"), (None, "high", "low")):
        for says_so, severity in ((True, said), (False, unsaid)):
            (found,) = found_by(not_fp8, gone_wrong(next(paths), cast, 12, says_so=says_so))
            assert (found.severity, found.since) == (severity, 12)
            assert "adversary" in found.cannot_exclude
    run, twin = (gone_wrong(next(paths), cast, 12, says_so=False) for cast in ("fp8", "bf16"))
    assert [found.severity for found in found_by(not_fp8, run, twin)] == ["medium"]


# --- massive activations ------------------------------------------------------------------------


def stream(step: int, amax: float, site: str = "layers.0:residual", **more: Any) -> Row:
    """A residual stream of 100 elements: one is `amax`, the others lie in one bin below 0.5."""
    start = next(i for i in range(1024) if bin_edge(i + 1) == 0.5)
    last = max(i for i in range(1024) if bin_edge(i) <= amax)
    histogram = [0] * (last - start + 1)
    histogram[0], histogram[-1] = 99, 1
    row = {"step": step, "site": site, "cur_amax": amax, "count": 100, "zeros": 0}
    return row | {"hot_channel": 3, "histogram_start": start, "histogram": histogram} | more


def massive(path: Path, *amaxes: float, **more: Any) -> list[Finding]:
    rows = [stream(step, amax, **more) for step, amax in enumerate(amaxes)]
    return found_by(massive_activation, write(path, tensors=rows))


def test_massive_is_a_thousand_times_the_median(paths: Iterator[Path]) -> None:
    quiet = [4.0] * 10
    assert massive(next(paths), *quiet, *[below(500.0)] * 6) == []
    (found,) = massive(next(paths), *quiet, *[500.0] * 6)
    assert (found.cause, found.severity, found.site) == (
        "massive_activation",
        "medium",
        "layers.0:residual",
    )
    assert (found.channel, found.since) == (3, 10)
    assert [(e.step, e.value) for e in found.evidence] == [(10, 1000.0), (10, 1000.0)]


def test_massive_is_above_a_hundred(paths: Iterator[Path]) -> None:
    """In a stream whose median is far smaller."""

    def tiny(step: int, amax: float) -> Row:
        row = stream(step, 400.0)
        return row | {"cur_amax": amax, "histogram_start": row["histogram_start"] - 40}

    for amax, expected in ((100.0, 0), (above(100.0), 1)):
        rows = [tiny(step, amax) for step in range(6)]
        run = write(next(paths), tensors=rows)
        assert len(found_by(massive_activation, run)) == expected


def test_a_massive_activation_lasts_in_one_channel(paths: Iterator[Path]) -> None:
    quiet = [4.0] * 10
    assert massive(next(paths), *quiet, *[600.0] * 4) == []
    assert len(massive(next(paths), *quiet, *[600.0] * 5)) == 1
    sporadic = [600.0, 4.0, 4.0] * 6
    assert massive(next(paths), *quiet, *sporadic) == []
    rows = [stream(step, 600.0, hot_channel=step) for step in range(8)]
    assert found_by(massive_activation, write(next(paths), tensors=rows)) == []


def test_a_massive_activation_is_there_in_half_of_the_steps(paths: Iterator[Path]) -> None:
    for between, expected in ((19, 1), (20, 0)):  # of 20 that are, the first and the last
        amaxes = [600.0, *[4.0] * between, *[600.0] * 19]
        assert len(massive(next(paths), *[4.0] * 5, *amaxes, 4.0)) == expected


def test_a_stream_without_a_histogram_has_no_median(paths: Iterator[Path]) -> None:
    for histogram in ([], None):
        assert massive(next(paths), *[600.0] * 9, histogram=histogram) == []


def test_the_first_layer_in_the_models_order_is_the_place(paths: Iterator[Path]) -> None:
    rows = [
        stream(step, 600.0, site=f"layers.{layer}:residual")
        for step in range(6)
        for layer in (10, 2)
    ]
    (found,) = found_by(massive_activation, write(next(paths), tensors=rows))
    assert found.site == "layers.2:residual"


def test_a_massive_activation_began_where_its_feed_forward_left_the_ordinary(
    paths: Iterator[Path],
) -> None:
    amaxes = [4.0] * 10 + [5.0, 9.0, 600.0, *[900.0] * 6]
    rows = [stream(step, amax) for step, amax in enumerate(amaxes)]
    (found,) = found_by(massive_activation, write(next(paths), tensors=rows))
    assert found.since == 12
    outputs = [0.5] * 10 + [1.6, 5.0, 599.0, *[899.0] * 6]
    rows += [
        {"step": step, "site": "layers.0.mlp:output", "cur_amax": amax}
        for step, amax in enumerate(outputs)
    ]
    (found,) = found_by(massive_activation, write(next(paths), tensors=rows))
    assert found.since == 10
    assert "layers.0.mlp:output made it" in found.summary
    rows[-7:] = [row | {"cur_amax": row["cur_amax"] / 3} for row in rows[-7:]]
    (found,) = found_by(massive_activation, write(next(paths), tensors=rows))
    assert found.since == 12


def test_a_massive_activation_is_bad_where_the_loss_told(paths: Iterator[Path]) -> None:
    rows = [stream(step, amax) for step, amax in enumerate([4.0] * 10 + [600.0] * 6)]
    events = [{"step": 12, "kind": "diverged"}]
    (found,) = found_by(massive_activation, write(next(paths), tensors=rows, events=events))
    assert found.severity == "high"


# --- attention logits ---------------------------------------------------------------------------


def attended(path: Path, *amaxes: float, layer: int = 0, **more: Any) -> Run:
    site = f"layers.{layer}:attention_logits"
    rows = [{"step": i, "site": site, "cur_amax": amax} for i, amax in enumerate(amaxes)]
    return write(path, tensors=rows, **more)


def test_attention_logits_beyond_a_hundred_for_five_steps(paths: Iterator[Path]) -> None:
    quiet = [5.0] * 10
    for level, length, expected in ((100.0, 5, 0), (above(100.0), 4, 0), (above(100.0), 5, 1)):
        run = attended(next(paths), *quiet, 90.0, *[level] * length, 90.0)
        found = found_by(attention_logits, run)
        assert [(one.severity, one.confidence, one.since) for one in found] == (
            [("medium", "medium", 11)] * expected
        )
    assert [(e.step, e.threshold) for e in found[0].evidence] == [(11, 100.0)]


def test_attention_logits_beyond_ten_thousand(paths: Iterator[Path]) -> None:
    quiet = [5.0] * 10
    run = attended(next(paths), *quiet, 90.0, 200.0, 10_000.0)
    assert found_by(attention_logits, run) == []
    run = attended(next(paths), *quiet, 90.0, 200.0, above(10_000.0))
    (found,) = found_by(attention_logits, run)
    assert (found.severity, found.site, found.since) == ("medium", "layers.0:attention_logits", 11)
    assert [(e.step, e.threshold) for e in found.evidence] == [(11, 100.0), (12, 10_000.0)]
    events = [{"step": 12, "kind": "diverged"}]
    for level, severity in ((10_000.0, "medium"), (above(10_000.0), "high")):
        run = attended(next(paths), *quiet, *[level] * 5, events=events)
        assert found_by(attention_logits, run)[0].severity == severity


def test_who_begins_with_large_attention_logits_is_used_to_them(paths: Iterator[Path]) -> None:
    for level, expected in ((100.0, [1]), (above(100.0), [])):
        run = attended(next(paths), level, *[above(100.0)] * 9)
        assert [found.since for found in found_by(attention_logits, run)] == expected
    run = attended(next(paths), *[200.0] * 9, 2e4)
    assert [found.since for found in found_by(attention_logits, run)] == [0]


def test_the_layer_whose_logits_were_too_large_first(paths: Iterator[Path]) -> None:
    rows = [
        {"step": step, "site": f"layers.{layer}:attention_logits", "cur_amax": amax}
        for step in range(12)
        for layer, amax in ((0, 5.0 if step < 11 else 2e4), (1, 5.0 if step < 9 else 2e4))
    ]
    (found,) = found_by(attention_logits, write(next(paths), tensors=rows))
    assert (found.site, found.since, found.confidence) == (
        "layers.1:attention_logits",
        9,
        "medium",
    )


# --- output logits ------------------------------------------------------------------------------

HEAD: Row = {"linears": {"layers.0.mlp.up": {}, "head": {}}}


def drifted(path: Path, *values: float, info: Row = HEAD, **more: Any) -> list[Finding]:
    rows = [{"logit_max": value, "loss": 3.0} for value in values]
    return found_by(output_logits, write(path, steps=rows, info=info, **more))


def test_output_logits_beyond_the_whole_nats_of_bf16(paths: Iterator[Path]) -> None:
    calm = [1.0] * 10
    assert drifted(next(paths), *calm, 20.0, *[128.0] * 9) == []
    (found,) = drifted(next(paths), *calm, 20.0, *[above(128.0)] * 9)
    assert (found.severity, found.site, found.since) == ("medium", "head:output", 10)
    events = [{"step": 12, "kind": "diverged"}]
    assert drifted(next(paths), *calm, *[200.0] * 9, events=events)[0].severity == "high"


def test_output_logits_drift_and_do_not_blow_up(paths: Iterator[Path]) -> None:
    calm = [1.0] * 10
    assert drifted(next(paths), *calm, *[200.0] * 4) == []
    assert len(drifted(next(paths), *calm, *[200.0] * 5)) == 1


def test_a_model_that_begins_with_large_outputs_is_no_classifier(paths: Iterator[Path]) -> None:
    assert len(drifted(next(paths), 16.0, *[200.0] * 9)) == 1
    assert drifted(next(paths), above(16.0), *[200.0] * 9) == []


def test_logits_drift_from_what_no_data_call_for(paths: Iterator[Path]) -> None:
    for level, since in ((16.0, 11), (above(16.0), 10)):
        (found,) = drifted(next(paths), *[1.0] * 10, level, *[200.0] * 9)
        assert found.since == since


def test_a_head_that_is_handed_more_makes_larger_logits(paths: Iterator[Path]) -> None:
    for size, expected in ((12.0, 1), (above(12.0), 0)):  # the root of 144
        handed = [
            {"step": step, "site": "head:input", "cur_amax": 1.0 if step < 10 else size}
            for step in range(19)
        ]
        values = [1.0] * 10 + [144.0] + [200.0] * 8
        assert len(drifted(next(paths), *values, tensors=handed)) == expected


def test_outputs_of_a_regression_are_no_logits(paths: Iterator[Path]) -> None:
    values = [1.0] * 10 + [200.0] * 9
    plain = {"linears": {"layers.0.mlp.up": {}, "layers.0.attention.output": {}}}
    assert drifted(next(paths), *values, info=plain) == []
    assert len(drifted(next(paths), *values, info={"precision": {"lm_head": {}}})) == 1
    attends = [{"step": 0, "site": "layers.0:attention_logits", "cur_amax": 1.0}]
    (found,) = drifted(next(paths), *values, info={}, tensors=attends)
    assert found.site is None


# --- where a run parts from its twin ------------------------------------------------------------


def norms(path: Path, **sites: list[float]) -> Run:
    """l2 norms by site, from step 0 on; in a name `_of_` is a dot and `__` the colon."""
    rows = [
        {"step": step, "site": site.replace("__", ":").replace("_of_", "."), "l2_norm": norm}
        for site, values in sites.items()
        for step, norm in enumerate(values)
    ]
    return write(path, tensors=rows, info={"linears": {"mlp.up": {}, "mlp.down": {}, "head": {}}})


def test_rounding_moves_a_norm_by_an_eighth_at_most(paths: Iterator[Path]) -> None:
    twin = norms(next(paths), mlp__product=[8.0] * 20)
    for norm, expected in ((9.0, None), (above(9.0), 12)):
        for sign in (1, -1):  # larger here, or there
            run = norms(next(paths), mlp__product=[8.0] * 12 + [norm] * 8)
            pair = (run, twin)[::sign]
            parted = first_divergence(Loaded(pair[0]), Loaded(pair[1]))
            assert (None if parted is None else parted.step) == expected
    assert parted is not None
    assert (parted.site, parted.here, parted.there) == ("mlp:product", 8.0, above(9.0))


def test_a_difference_lasts_and_stands_out_of_those_before(paths: Iterator[Path]) -> None:
    twin = Loaded(norms(next(paths), mlp__product=[1.0] * 20))
    for length, expected in ((2, None), (3, 10)):
        run = norms(next(paths), mlp__product=[1.0] * 10 + [2.0] * length + [1.0] * 9)
        parted = first_divergence(Loaded(run), twin)
        assert (None if parted is None else parted.step) == expected
    for usual, expected in ((0.1, 10), (0.17, None)):  # six times 0.17 is more than 1
        run = norms(next(paths), mlp__product=[1.0 + usual] * 10 + [2.0] * 10)
        parted = first_divergence(Loaded(run), twin)
        assert expected is None or (parted is not None and parted.step == expected)
        assert expected is not None or parted is None or parted.step == 0


def test_of_the_tensors_that_part_the_one_computed_first(paths: Iterator[Path]) -> None:
    names = (
        "mlp_of_up__weight",
        "mlp_of_up__input",
        "mlp__product",
        "mlp__output",
        "head__input",
        "head__grad_output",
        "mlp__grad_output",
    )
    twin = Loaded(norms(next(paths), **{name: [1.0] * 10 for name in names}))
    for first, name in enumerate(names):
        late = {other: [1.0] * 5 + [3.0] * 5 for other in names[first:]}
        parted = first_divergence(Loaded(norms(next(paths), **late)), twin)
        assert parted is not None
        assert (parted.step, parted.site) == (5, name.replace("__", ":").replace("_of_", "."))
    early = {names[0]: [1.0] * 5 + [3.0] * 5, names[-1]: [1.0] * 4 + [3.0] * 6}
    parted = first_divergence(Loaded(norms(next(paths), **early)), twin)
    assert parted is not None and (parted.step, parted.site) == (4, "mlp:grad_output")


def test_a_diagnosis_says_where_a_run_parted_from_its_twin(paths: Iterator[Path]) -> None:
    twin = norms(next(paths), mlp__product=[1.0] * 10)
    run = norms(next(paths), mlp__product=[1.0] * 5 + [3.0] * 5)
    diagnosis = diagnose(run, twin)
    assert str(diagnosis).splitlines()[1] == (
        "first parted from its twin at step 5 at mlp:product: l2_norm 3, the twin's 1"
    )
    told = {"step": 5, "site": "mlp:product", "here": 3.0, "there": 1.0}
    assert diagnosis.to_dict()["divergence"] == told
    assert diagnose(run).to_dict()["divergence"] is None
    assert diagnose(run, norms(next(paths), other__product=[1.0])).divergence is None


# --- recording a model in use -------------------------------------------------------------------


class Clamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.limit = 2.5
        self.w1, self.w2, self.w3 = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = nn.functional.silu(self.w1(x).clamp(max=self.limit))
        result: torch.Tensor = self.w2(gate * self.w3(x).clamp(-self.limit, self.limit))
        return result


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_a_model_in_use_is_recorded_if_one_says_so(without_gradients: Any, tmp_path: Path) -> None:
    model, x = Clamped(), torch.randn(4, 8)
    with fp8lab.watch(model, tmp_path / "used", every=1, inference=True) as watching:
        for step in range(3):
            with without_gradients():
                model(x)
            watching.step(step)
    run = open_run(tmp_path / "used")
    assert run.tensors()["site"].value_counts().to_dict() == dict.fromkeys(
        [".:gate", ".:up", ".:product", ".:output"], 3
    )
    (site,) = run.info["sites"]
    assert (site["gate_limit"], site["up_limit"]) == (2.5, 2.5)
    assert run.info["inference"] is True
    product = nn.functional.silu(model.w1(x).clamp(max=2.5)) * model.w3(x).clamp(-2.5, 2.5)
    amax = run.tensors("cur_amax", sites=".:product")["cur_amax"]
    assert amax.tolist() == [pytest.approx(float(product.detach().abs().max()), rel=1e-6)] * 3


def test_who_forgets_to_say_so_is_told(tmp_path: Path) -> None:
    model = Clamped()
    with (
        fp8lab.watch(model, tmp_path / "used", every=1) as watching,
        pytest.warns(UserWarning, match="inference=True") as seen,
    ):
        for step in range(3):
            with torch.no_grad():
                model(torch.randn(4, 8))
            watching.step(step)
    assert len(seen) == 1
    run = open_run(tmp_path / "used")
    assert run.tensors().empty
    (told,) = run.events()["detail"]
    assert str(seen[0].message) == f"{run.path}: {told}"


def test_who_tells_numbers_of_his_own_is_told_in_an_event_only(tmp_path: Path) -> None:
    model = Clamped()
    with torch.no_grad(), fp8lab.watch(model, tmp_path / "used", every=1) as watching:
        for step in range(3):
            watching.step(step, loss=model(torch.randn(4, 8)).square().mean())
    events = open_run(tmp_path / "used").events()
    assert events[["kind", "step"]].values.tolist() == [["not_seen", 0]]
    assert "inference=True" in events["detail"][0]


def test_a_model_in_use_has_no_optimizer(tmp_path: Path) -> None:
    model = Clamped()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="inference with optimizer"):
        fp8lab.watch(model, tmp_path / "run", optimizer=optimizer, inference=True)


# --- real trainings -----------------------------------------------------------------------------

DRAWS = (
    ("massive_activation", 9),
    ("attention_rate", 0),
    ("attention_growth", 0),
    ("output_sign", 0),
    ("output_rate", 0),
)


@pytest.mark.long
@pytest.mark.parametrize(("name", "seed"), DRAWS)
def test_the_cause_of_a_real_training_is_found(name: str, seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    label = scenarios()[name].run(Draw(seed, seed / 9, tmp_path))
    found = diagnose(tmp_path / "run").findings[0]
    steps = open_run(tmp_path / "run").steps("loss")["step"].nunique()
    assert (found.cause, found.severity == "low") == (label.cause, False)
    assert found.site in label.sites
    assert found.since is not None and label.onset is not None
    assert abs(found.since - label.onset) <= 0.1 * steps
