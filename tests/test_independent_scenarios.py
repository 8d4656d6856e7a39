"""Independent scenarios: each says its own cause, at places that the run has, within the run.

A draw takes seconds, so one of each file runs by default, and all of them, at the ends of the dial,
as slow tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fp8lab
from fp8lab.lab.scenarios import (
    Draw,
    Scenario,
    independent_activations,
    independent_blocks,
    independent_gradients,
    independent_histories,
    independent_scaling,
    independent_training,
)

QUICK = ("independent-raw-units", "independent-many-rows")
FILES = (
    independent_scaling,
    independent_histories,
    independent_blocks,
    independent_gradients,
    independent_training,
    independent_activations,
)
NO_PLACE = {"output_logits", "second_moment_lag", "learning_rate", "corrupt_batch"}
ALL = [scenario for file in FILES for scenario in file.SCENARIOS]


def run(scenario: Scenario, seed: int, strength: float, folder: Path) -> None:
    folder.mkdir()
    torch.manual_seed(seed)
    label = scenario.run(Draw(seed, strength, folder))
    recorded = fp8lab.open_run(folder / "run")
    assert label.cause == scenario.cause
    assert label.onset in set(recorded.steps()["step"])
    # A layer that is exchanged or shut off may leave a place without a row, but never all.
    assert bool(label.sites) == (label.cause not in NO_PLACE)
    assert not label.sites or set(label.sites) & set(recorded.tensors()["site"])
    assert len(set(label.sites)) == len(label.sites)


def losses(folder: Path) -> list[float]:
    return list(fp8lab.open_run(folder / "run").steps()["loss"])


@pytest.mark.long
@pytest.mark.parametrize("scenario", [s for s in ALL if s.name in QUICK], ids=lambda s: s.name)
def test_a_draw_is_repeated_to_the_bit(scenario: Scenario, tmp_path: Path) -> None:
    run(scenario, 1, 1.0, tmp_path / "once")
    run(scenario, 1, 1.0, tmp_path / "again")
    assert losses(tmp_path / "once") == losses(tmp_path / "again")


def test_each_cause_has_two_scenarios() -> None:
    causes = [scenario.cause for scenario in ALL]
    assert {causes.count(cause) for cause in causes} == {2}
    assert len({scenario.name for scenario in ALL}) == len(ALL)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "strength"), [(0, 0.0), (9, 1.0)])
@pytest.mark.parametrize("scenario", ALL, ids=lambda s: s.name)
def test_a_draw_has_its_cause_and_an_onset(
    scenario: Scenario, seed: int, strength: float, tmp_path: Path
) -> None:
    run(scenario, seed, strength, tmp_path / "draw")
