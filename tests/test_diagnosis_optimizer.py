"""Causes in the optimizer, the data and the use of a model: thresholds by hand, real trainings.

As in `test_diagnosis_training`: rows on both sides of each threshold, then the scenarios, whose
labels come from what they injected and not from what was recorded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rows_by_hand import Row, above, below, found_by, write

from fp8lab.diagnosis import (
    corrupt_batch,
    diagnose,
    learning_rate,
    missing_clamp,
    second_moment_lag,
)
from fp8lab.diagnosis.rows import Loaded
from fp8lab.diagnosis.weights import moved
from fp8lab.lab.scenarios import Draw, scenarios
from fp8lab.record import Finding
from fp8lab.store import Run, open_run

# --- learning rate ------------------------------------------------------------------------------


def updated(path: Path, *ratios: float, **more: Any) -> list[Finding]:
    rates = more.pop("rates", [0.1] * len(ratios))
    loss = more.pop("loss", [3.0] * len(ratios))
    triples = zip(ratios, rates, loss, strict=True)
    rows = [{"update_ratio": u, "learning_rate": r, "loss": x} for u, r, x in triples]
    return found_by(learning_rate, write(path, steps=rows, **more))


def test_updates_of_a_tenth_of_the_parameters_twice_running(paths: Iterator[Path]) -> None:
    assert updated(next(paths), 0.1, 0.1, 0.01) == []
    assert updated(next(paths), above(0.1), 0.1, 0.01) == []
    (found,) = updated(next(paths), above(0.1), above(0.1), 0.01)
    assert (found.cause, found.severity, found.since) == ("learning_rate", "medium", 0)


def test_updates_that_become_large_are_the_rates_doing_if_it_rose(paths: Iterator[Path]) -> None:
    ratios = [0.01] * 10 + [0.2] * 5
    assert updated(next(paths), *ratios) == []
    for factor, expected in ((2.0, 1), (below(2.0), 0)):
        rates = [0.001] * 10 + [0.001 * factor] * 5
        assert len(updated(next(paths), *ratios, rates=rates)) == expected
    assert len(updated(next(paths), 0.01, *[0.2] * 5)) == 1  # a first step may be small


def test_a_learning_rate_moves_most_weights(paths: Iterator[Path]) -> None:
    def weights(moving: int) -> list[Row]:
        return [
            {"step": step, "site": f"{name:02}:weight", "l2_norm": norm}
            for name in range(100)
            for step, norm in ((0, 1.0), (10, 1.2 if name < moving else 1.1), (11, 9.0))
        ]

    for moving, severity in ((49, "low"), (50, "medium")):
        run = write(next(paths), tensors=weights(moving))
        assert moved(Loaded(run), 0) == ([f"{name:02}:weight" for name in range(moving)], 100)
        (found,) = updated(next(paths), *[0.2] * 5, tensors=weights(moving))
        assert found.severity == severity


def test_a_loss_that_rises_with_the_updates_is_the_harm(paths: Iterator[Path]) -> None:
    for then, severity in ((3.0, "medium"), (above(3.0), "high"), (below(3.0), "low")):
        (found,) = updated(next(paths), *[0.2] * 20, loss=[3.0] * 8 + [then] * 12)
        assert found.severity == severity
    for length, severity in ((9, "high"), (7, "medium")):  # until updates are ordinary again
        ratios = [0.2] * length + [0.01] * (20 - length)
        (found,) = updated(next(paths), *ratios, loss=[3.0] * 5 + [9.0] * 5 + [3.0] * 10)
        assert found.severity == severity
    for step, severity in ((23, "high"), (24, "medium")):
        events = [{"step": step, "kind": "diverged"}]
        ratios = [0.2] * 13 + [0.01] * 20
        assert updated(next(paths), *ratios, events=events)[0].severity == severity


def test_a_hard_batch_is_no_harm_of_the_rate(paths: Iterator[Path]) -> None:
    for hard, severity in ((2, "low"), (3, "high")):  # of the five steps that tell
        loss = [3.0] + [9.0] * hard + [2.0] * (5 - hard) + [9.0] * 4
        (found,) = updated(next(paths), 0.2, 0.2, *[0.01] * 8, loss=loss)
        assert found.severity == severity


def test_the_rate_before_is_that_of_ten_steps(paths: Iterator[Path]) -> None:
    def since(apart: int, rates: list[float]) -> list[int | None]:
        rows = [
            {"step": apart * i, "loss": 3.0, "learning_rate": rate, "update_ratio": ratio}
            for i, (rate, ratio) in enumerate(zip(rates, [0.01] * 10 + [0.2] * 3, strict=True))
        ]
        return [one.since for one in found_by(learning_rate, write(next(paths), steps=rows))]

    assert since(5, [1.0] * 8 + [0.001] * 2 + [0.002] * 3) == [50]
    assert since(5, [1.0] * 9 + [0.001] * 1 + [0.002] * 3) == []
    assert since(20, [1.0] * 9 + [0.001] * 1 + [0.002] * 3) == [200]


# --- second moment ------------------------------------------------------------------------------


def lagged(path: Path, rms: float = 6.0, **more: Any) -> list[Finding]:
    """Twenty calm steps, RMS_t and updates from step 20 on, loss from step 22 on."""
    loss = [1.0, 1.1] * 11 + more.get("after", [2.0] * 10)
    rms_t = [1.0] * 20 + [rms] + more.get("then", [6.0] * 3 + [1.0] * 8)
    updates = [0.01] * 20 + [more.get("update", 0.02)] * 12
    rates = [0.1] * 20 + [more.get("rate", 0.1)] * 12
    rows = [
        {"loss": x, "rms_t": r, "update_ratio": u, "learning_rate": a}
        for x, r, u, a in zip(loss, rms_t, updates, rates, strict=True)
    ]
    for step, changes in more.get("changed", {}).items():
        rows[step] |= changes
    rows[1:1] = [rows[1]] * more.get("moved", 0)  # the first row is so much earlier
    rows = [row | {"step": more.get("apart", 1) * step} for step, row in enumerate(rows)]
    return found_by(second_moment_lag, write(path, steps=rows))


def test_a_spike_of_rms_before_one_of_the_loss(paths: Iterator[Path]) -> None:
    then = [below(2.3)] * 11  # nor is there a spike in what follows
    assert lagged(next(paths), below(2.3), then=then) == []
    (found,) = lagged(next(paths), 2.3, then=[2.3] * 11)
    assert (found.cause, found.severity, found.since) == ("second_moment_lag", "medium", 20)
    assert found.confidence == "high"
    assert [e.step for e in found.evidence] == [20, 22]


def test_rms_stands_out_of_what_it_was_before(paths: Iterator[Path]) -> None:
    for before, expected in ((4.0, 1), (above(4.0), 0)):
        changed = {5: {"rms_t": before}}
        assert len(lagged(next(paths), 6.0, changed=changed)) == expected


def test_a_lag_stays_and_a_batch_does_not(paths: Iterator[Path]) -> None:
    for length, expected in ((2, 0), (3, 1)):  # and the spike itself
        assert len(lagged(next(paths), then=[6.0] * length + [1.0] * (11 - length))) == expected
    for level, expected in ((2.3, 1), (below(2.3), 0)):
        assert len(lagged(next(paths), then=[level] * 11)) == expected
    usual = {step: {"rms_t": 2.0} for step in range(20)}
    for level, expected in ((3.0, 1), (below(3.0), 0)):
        assert len(lagged(next(paths), then=[level] * 11, changed=usual)) == expected


def test_a_loss_that_follows_makes_it_sure(paths: Iterator[Path]) -> None:
    def sure(**more: Any) -> str:
        (found,) = lagged(next(paths), **more)
        return found.confidence

    for first, confidence in ((22, "high"), (27, "high"), (28, "medium")):  # two of steps 21 to 28
        assert sure(after=[1.0] * (first - 22) + [2.0] * (32 - first)) == confidence
    assert sure(changed={20: {"loss": 2.0}}) == "medium"  # at once: it is the loss that changed
    assert sure(after=[2.0, *[1.0] * 9]) == "medium"
    limit = np.tile([1.0, 1.1], 10).mean() + 3.2 * np.tile([1.0, 1.1], 10).std()
    assert sure(after=[float(limit)] * 10) == "medium"
    assert sure(after=[above(float(limit))] * 10) == "high"


def test_the_running_mean_is_of_twenty_steps(paths: Iterator[Path]) -> None:
    for calm, confidence in ((0, "medium"), (1, "high")):
        rows = {0: {"loss": 100.0}}  # 20 steps before the spike, or 21
        (found,) = lagged(next(paths), changed=rows, moved=calm)
        assert found.confidence == confidence


def test_a_lag_needs_larger_updates_and_a_steady_rate(paths: Iterator[Path]) -> None:
    for update, expected in ((0.015, 1), (below(0.015), 0)):
        assert len(lagged(next(paths), update=update)) == expected
    for rate, expected in ((0.1 * 1.5, 0), (0.1499, 1)):
        assert len(lagged(next(paths), rate=rate)) == expected
    for before, expected in ((below(0.015), 1), (0.015, 0)):  # the cause comes first
        assert len(lagged(next(paths), changed={19: {"update_ratio": before}})) == expected
    for first, expected in ((27, 1), (28, 0)):
        changed = {step: {"update_ratio": 0.01} for step in range(20, first)}
        assert len(lagged(next(paths), changed=changed)) == expected


def test_a_lag_is_measured_in_steps_and_not_in_rows(paths: Iterator[Path]) -> None:
    for length, expected in ((0, 0), (1, 1)):  # ten steps later it is still there
        then = [6.0] * length + [1.0] * (11 - length)
        found = lagged(next(paths), apart=10, then=then)
        assert [one.since for one in found] == [200] * expected
    assert lagged(next(paths), apart=50) == []  # nothing is known of the steps before


# --- corrupt batch ------------------------------------------------------------------------------


def jumped(path: Path, loss: list[float], **more: Any) -> list[Finding]:
    updates = more.pop("updates", [0.01] * len(loss))
    changed = more.pop("changed", {})
    rows = [
        {"loss": x, "update_ratio": u, "grad_norm": 1.0, "rms_t": 1.0} | changed.get(step, {})
        for step, (x, u) in enumerate(zip(loss, updates, strict=True))
    ]
    return found_by(corrupt_batch, write(path, steps=rows, **more))


NOISE = [2.0, 2.1, 2.2, 2.3, 2.4] * 2 + [2.4, 2.3, 2.2, 2.1, 2.0] * 2  # median 2.2, no trend
START = [5.0] * 5


def test_a_batch_on_which_the_model_is_worse_than_untrained(paths: Iterator[Path]) -> None:
    start = 5.0 - 0.14826  # noise: the median deviation of a normal distribution
    for loss, severity, sure in (
        (start + 1e-9, "medium", "high"),
        (start - 1e-9, "low", "low"),
    ):
        (found,) = jumped(next(paths), [*START, *NOISE, loss, *NOISE])
        assert (found.cause, found.severity, found.confidence) == ("corrupt_batch", severity, sure)
        assert found.since == 25
    events = [{"step": 30, "kind": "diverged"}]
    (found,) = jumped(next(paths), [*START, *NOISE, 9.0, *NOISE], events=events)
    assert found.severity == "high"


def test_who_has_learnt_little_does_not_know_what_untrained_is(paths: Iterator[Path]) -> None:
    for start, severity in ((2.2 / 0.75 + 1e-9, "medium"), (2.2 / 0.75 - 1e-9, "low")):
        (found,) = jumped(next(paths), [*[start] * 5, *NOISE, 20.0, *NOISE])
        assert found.severity == severity
    for loss, severity in ((above(25.0), "medium"), (25.0, "low")):
        (found,) = jumped(next(paths), [*[2.5] * 5, *NOISE, loss, *NOISE])
        assert found.severity == severity


def test_a_batch_does_harm_by_its_gradient(paths: Iterator[Path]) -> None:
    loss = [*START, *NOISE, 9.0, *NOISE]
    for gradient, severity in ((0.9, "medium"), (below(0.9), "low")):
        (found,) = jumped(next(paths), loss, changed={25: {"grad_norm": gradient}})
        assert found.severity == severity


def test_the_gradient_of_one_batch_does_not_stay(paths: Iterator[Path]) -> None:
    loss = [*START, *NOISE, 9.0, *NOISE]
    for length, expected in ((3, 1), (4, 0)):
        changed = {step: {"rms_t": 6.0} for step in range(25, 25 + length)}
        assert len(jumped(next(paths), loss, changed=changed)) == expected


def test_a_jump_is_eight_standard_deviations(paths: Iterator[Path]) -> None:
    limit = 2.2 + 8 * 0.14826
    assert jumped(next(paths), [*START, *NOISE, limit - 1e-9, *NOISE]) == []
    assert len(jumped(next(paths), [*START, *NOISE, limit + 1e-9, *NOISE])) == 1


def test_a_loss_that_was_rising_is_no_jump(paths: Iterator[Path]) -> None:
    for before, expected in ((3.19, 1), (3.21, 0)):  # a tenth of the jump from 2.2 to 12.2 is 1
        loss = [*START, *NOISE, before, 12.2, *NOISE]
        assert len(jumped(next(paths), loss)) == expected


def test_what_comes_again_belongs_to_the_data(paths: Iterator[Path]) -> None:
    for times, expected in ((2, 1), (3, 0)):
        loss = [*START, *NOISE, *[9.0, *NOISE] * times]
        assert len(jumped(next(paths), loss)) == expected


def test_weights_that_changed_more_than_usual_may_explain_it(paths: Iterator[Path]) -> None:
    loss = [*START, *NOISE, 9.0, *NOISE]
    for update, expected in ((0.02, 1), (above(0.02), 0)):
        updates = [0.01] * 24 + [update] + [0.01] * 21
        assert len(jumped(next(paths), loss, updates=updates)) == expected
    for change, expected in ((0.0599, 1), (0.0601, 0)):
        norms = 100.0 * 1.01 ** np.arange(25)
        norms = [*norms, norms[-1] * (1.0 + change)]
        rows = [{"step": i, "site": "up:weight", "l2_norm": n} for i, n in enumerate(norms)]
        assert len(jumped(next(paths), loss, tensors=rows)) == expected


def test_a_clipped_product_is_suspected_first(paths: Iterator[Path]) -> None:
    loss = [*START, *NOISE, *NOISE, *NOISE, 9.0, *NOISE]  # at step 65
    for step, staleness, severity in ((15, 3.0, "low"), (14, 3.0, "medium"), (65, 2.0, "medium")):
        rows = [{"step": step, "site": "mlp:product", "staleness": staleness, "cur_amax": 1.0}]
        (found,) = jumped(next(paths), loss, tensors=rows)
        assert found.severity == severity


# --- missing clamp ------------------------------------------------------------------------------

CLAMPED = {"site": "mlp", "activation": "silu", "gate_limit": 4.0, "up_limit": 2.0}
FREE = {"site": "mlp", "activation": "silu"}
ALLOWED = 4.0 / (1.0 + math.exp(-4.0)) * 2.0


def used(path: Path, gate: float, up: float, product: float, site: Row = FREE) -> Run:
    values = (("gate", gate), ("up", up), ("product", product))
    rows = [
        {"step": step, "site": f"mlp:{role}", "cur_amax": value + step, "max": value + step}
        for step in range(2)
        for role, value in values
    ]
    return write(path, tensors=rows, info={"sites": [site]})


def test_a_gate_or_up_beyond_the_limit_of_the_twin(paths: Iterator[Path]) -> None:
    twin = write(next(paths), info={"sites": [CLAMPED]})
    rounded = 1.0 + 2.0**-8
    assert found_by(missing_clamp, used(next(paths), 1.0, 0.5, 1.0), twin) == []
    for gate, up, since in ((4.0 * rounded, 1.0, 1), (above(4.0 * rounded), 1.0, 0), (1.0, 2.1, 0)):
        (found,) = found_by(missing_clamp, used(next(paths), gate, up, 1.0), twin)
        assert (found.severity, found.site, found.since) == ("medium", "mlp:product", since)
    beyond = ALLOWED * rounded - 1.0
    for product, severity in ((beyond - 1e-9, "medium"), (beyond + 1e-9, "high")):
        (found,) = found_by(missing_clamp, used(next(paths), 5.0, 1.0, product), twin)
        assert found.severity == severity


def test_a_clamp_needs_a_twin_that_has_it_and_a_run_that_has_not(paths: Iterator[Path]) -> None:
    twin = write(next(paths), info={"sites": [CLAMPED]})
    run = used(next(paths), 9.0, 9.0, 99.0)
    assert len(found_by(missing_clamp, run, twin)) == 1
    assert found_by(missing_clamp, run) == []
    assert found_by(missing_clamp, run, write(next(paths), info={"sites": [FREE]})) == []
    assert found_by(missing_clamp, used(next(paths), 9.0, 9.0, 9.0, CLAMPED), twin) == []
    looser = CLAMPED | {"gate_limit": 4.5}
    assert len(found_by(missing_clamp, used(next(paths), 9.0, 9.0, 99.0, looser), twin)) == 1


def test_a_clamp_after_the_activation(paths: Iterator[Path]) -> None:
    """Step's: silu(gate) at most 4; the gate at which it bites is a little above 4."""
    after = {name: value for name, value in CLAMPED.items() if name != "gate_limit"}
    twin = write(next(paths), info={"sites": [after | {"activated_limit": 4.0}]})
    rounded = 1.0 + 2.0**-8
    bites = 4.0 * (1.0 + math.exp(-4.0)) * rounded
    assert bites / (1.0 + math.exp(-bites)) > 4.0
    for gate, since in ((bites, 1), (above(bites), 0)):
        (found,) = found_by(missing_clamp, used(next(paths), gate, 1.0, 1.0), twin)
        assert (found.severity, found.since) == ("medium", since)
    most = 4.0 * 2.0 * rounded - 1.0  # silu(gate) and up at their limits
    for product, severity in ((most - 1e-9, "medium"), (most + 1e-9, "high")):
        (found,) = found_by(missing_clamp, used(next(paths), 5.0, 1.0, product), twin)
        assert found.severity == severity


def test_the_formula_of_a_clamp(paths: Iterator[Path]) -> None:
    """gpt-oss's: slope 1.702, and one is added to up."""
    sloped = CLAMPED | {"activation": "swish", "beta": 1.702, "up_offset": 1.0}
    allowed = 4.0 / (1.0 + math.exp(-1.702 * 4.0)) * 3.0 * (1.0 + 2.0**-8) - 1.0
    twin = write(next(paths), info={"sites": [sloped]})
    for product, severity in ((allowed - 1e-9, "medium"), (allowed + 1e-9, "high")):
        (found,) = found_by(missing_clamp, used(next(paths), 5.0, 1.0, product), twin)
        assert found.severity == severity


def test_a_clamp_from_outside_shows_in_the_rows(paths: Iterator[Path]) -> None:
    for times, expected in ((2, 0), (3, 1)):
        gates, ups = [4.0] * times + [3.0] * 3, [2.0] * times + [1.0] * 3
        rows = [{"step": i, "site": "mlp:gate", "max": value} for i, value in enumerate(gates)]
        rows += [{"step": i, "site": "mlp:up", "cur_amax": value} for i, value in enumerate(ups)]
        twin = write(next(paths), tensors=rows, info={"sites": [FREE]})
        assert len(found_by(missing_clamp, used(next(paths), 9.0, 9.0, 99.0), twin)) == expected


def test_one_limit_for_gate_and_up_shows_in_both(paths: Iterator[Path]) -> None:
    for up, times, expected in ((4.0, 2, 1), (4.0, 1, 0), (4.5, 2, 0)):
        gates, ups = [4.0, 3.0, 3.0], [up] * times + [1.0] * 2
        rows = [{"step": i, "site": "mlp:gate", "max": value} for i, value in enumerate(gates)]
        rows += [{"step": i, "site": "mlp:up", "cur_amax": value} for i, value in enumerate(ups)]
        twin = write(next(paths), tensors=rows, info={"sites": [FREE]})
        assert len(found_by(missing_clamp, used(next(paths), 9.0, 9.0, 99.0), twin)) == expected


# --- real trainings -----------------------------------------------------------------------------

DRAWS = (
    ("rate_from_start", 1),
    ("rate_jump", 1),
    ("second_moment", 1),
    ("corrupt_text", 2),
    ("corrupt_inputs", 1),
    ("missing_clamp", 1),
    ("missing_mitigation", 2),
)


@pytest.mark.long
@pytest.mark.parametrize(("name", "seed"), DRAWS)
def test_the_cause_of_a_real_training_is_found(name: str, seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    label = scenarios()[name].run(Draw(seed, seed / 9, tmp_path))
    twin = tmp_path / "twin"
    diagnosis = diagnose(tmp_path / "run", twin if twin.exists() else None)
    found = diagnosis.findings[0]
    steps = open_run(tmp_path / "run").steps("loss")["step"].nunique()
    assert (found.cause, found.severity == "low") == (label.cause, False)
    assert not label.sites or found.site in label.sites
    assert found.since is not None and label.onset is not None
    assert abs(found.since - label.onset) <= 0.1 * steps
