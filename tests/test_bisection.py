"""Bisections of trainings whose guilty operands are known.

Invented ones, by the hundred, whose outcome is a function of what is in FP8; and small real ones in
which an operand was planted.

An invented training records a real run directory (its layers, ten losses, the divergence) and takes
milliseconds. Whether a set suffices, and whether a member of it can be left out, is asked of the
function itself, not of the bisection.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted_operands import Planted, broke
from torch import nn
from typer.testing import CliRunner

import fp8lab
from fp8lab import DelayedScaling, Float8CurrentScaling, HighPrecision, Plan, convert, open_run
from fp8lab.bisection import Bisection, Cell, Direction, bisect, patterns_of
from fp8lab.bisection.reruns import Batch
from fp8lab.cli import app
from fp8lab.formats import FP32
from fp8lab.lab.train import Schedule, load_checkpoint, save_checkpoint, train
from fp8lab.recipe import GEMMS, OPERANDS, Recipe
from fp8lab.store import Run, RunError, RunWriter

TESTS = Path(__file__).parent
STEPS, BREAKS_AT = 10, 7
FP8 = Plan(recipe=Float8CurrentScaling())
Cells = frozenset[Cell]
Breaks = Callable[[Cells], bool]


def layers(count: int) -> list[str]:
    return [f"layers.{index}" for index in range(count)]


def cells_of(*names: str) -> Cells:
    """Of LAYER:OPERAND, which has two cells, or LAYER:OPERAND@GEMM."""
    found = set()
    for name in names:
        site, _, gemm = name.partition("@")
        layer, _, operand = site.partition(":")
        found |= {Cell(layer, operand, g) for g in GEMMS if operand in GEMMS[g] and gemm in ("", g)}
    return frozenset(found)


def every_cell(count: int) -> Cells:
    return cells_of(*(f"{layer}:{operand}" for layer in layers(count) for operand in OPERANDS))


class Invented:
    """Training that breaks where `breaks` says so of the cells in FP8."""

    def __init__(self, breaks: Breaks, count: int = 3) -> None:
        self.breaks, self.names, self.calls = breaks, layers(count), 0
        self.befalls: Callable[[Path], None] = lambda path: None
        self.steps = STEPS

    def __call__(self, plan: Plan, path: Path, *more: Path) -> None:
        self.calls += 1
        self.befalls(path)
        low: set[Cell] = set()
        precision: dict[str, dict[str, str]] = {}
        for layer in filter(plan.covers, self.names):
            precision[layer] = {}
            for operand, gemm in product(OPERANDS, GEMMS):
                if operand in GEMMS[gemm]:
                    recipe = plan.recipe_for(layer, operand, gemm)
                    high = isinstance(recipe, HighPrecision)
                    word = recipe.format.name if isinstance(recipe, HighPrecision) else "E4M3"
                    precision[layer][f"{operand}@{gemm}"] = f"{word} {type(recipe).__name__}"
                    low |= set() if high else {Cell(layer, operand, gemm)}
        breaks = self.breaks(frozenset(low))
        write_run(path, precision, BREAKS_AT if breaks else None, self.steps)


def write_run(path: Path, precision: Any, breaks_at: int | None, steps: int = STEPS) -> None:
    writer = RunWriter.create(path, {"precision": precision})
    last = steps if breaks_at is None else breaks_at + 1
    writer.append("steps", [{"step": step, "loss": 1.0} for step in range(last)])
    if breaks_at is not None:
        writer.append("events", [{"step": breaks_at, "kind": "diverged", "detail": "invented"}])
    writer.flush()
    writer.set_state("finished")  # `close` would compact it first, which takes longest


def guilty_of(*names: str) -> Breaks:
    """Any of these in FP8 breaks the run; of an operand, in either of its GEMMs."""
    guilty = [cells_of(name) for name in names]
    return lambda low: any(one & low for one in guilty)


def bisected(breaks: Breaks, path: Path, count: int = 3, **options: Any) -> Bisection:
    invented = Invented(breaks, count)
    found = bisect(invented, FP8, path=path, **{"suspects": ()} | options)
    assert len(found.reruns) == invented.calls
    assert len({one.high_precision for one in found.reruns}) == len(found.reruns)
    return found


# --- one guilty operand -----------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("operand", OPERANDS)
def test_one_guilty_operand_is_named_within_the_bound(
    count: int, operand: str, tmp_path: Path
) -> None:
    for layer in layers(count):
        site = f"{layer}:{operand}"
        gemm = next(g for g in GEMMS if operand in GEMMS[g])
        for guilty in (site, f"{site}@{gemm}"):
            found = bisected(guilty_of(guilty), tmp_path / guilty, count)
            assert (found.guilty, found.sites, found.unique) == ((guilty,), (site,), True)
            assert found.cells == 6 * count
            assert len(found.reruns) <= found.bound == math.ceil(math.log2(6 * count)) + 6


def test_the_bound_holds_at_every_place_of_a_long_row(tmp_path: Path) -> None:
    counts = []
    for index in range(0, 3 * 24, 13):
        site = f"layers.{index // 3}:{OPERANDS[index % 3]}"
        found = bisected(guilty_of(site), tmp_path / str(index), 24)
        assert found.guilty == (site,)
        counts.append(len(found.reruns))
    # Stricter than the bound of ceil(log2(144)) + 6: operands are halved, not cells.
    assert max(counts) <= math.ceil(math.log2(72)) + 6 == 13


def test_suspects_come_first_and_are_not_needed(tmp_path: Path) -> None:
    site = "layers.20:weight"
    told = bisected(guilty_of(site), tmp_path / "told", 24, suspects=[site])
    assert told.guilty == (site,)
    assert [one.asked for one in told.reruns] == [
        "the plan as it is",
        "all in high precision",
        site,
        f"{site}@output",
        f"{site}@grad_input",
        f"all but {site}",
    ]
    untold = bisected(guilty_of(site), tmp_path / "untold", 24)
    wrong = ["layers.1:input", "layers.2:grad_output"]
    misled = bisected(guilty_of(site), tmp_path / "misled", 24, suspects=wrong)
    assert misled.guilty == untold.guilty == (site,)
    assert len(misled.reruns) <= len(untold.reruns) + 1
    assert len(misled.reruns) <= misled.bound


def test_suspects_are_those_of_the_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fp8lab.bisection as module

    found = fp8lab.Finding(
        cause="x", summary="", severity="high", confidence="high", site="layers.2.mlp:product"
    )
    other = fp8lab.Finding(
        cause="x", summary="", severity="low", confidence="high", site="layers.1:weight"
    )
    diagnosis = fp8lab.Diagnosis(run="", findings=(found, other), loss_alarm=None)
    monkeypatch.setattr(module, "diagnose", lambda run: diagnosis)
    sites = [
        {"site": "mlp", "down": "down.weight"},
        {"site": "layers.2.mlp", "down": "out.weight"},
        {"site": "", "down": "last.weight"},
    ]
    run = Run(tmp_path, {"sites": sites})
    assert module._suspects_of(run) == ("layers.2.mlp.out:input", "layers.1:weight")
    assert module._suspects_of(Run(tmp_path, {"sites": "damaged"})) == ("layers.1:weight",)


# --- several ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "guilty",
    [
        ("layers.0:input", "layers.2:weight"),
        ("layers.1:input", "layers.1:weight"),
        ("layers.0:grad_output@grad_weight", "layers.1:input", "layers.2:grad_output"),
    ],
)
def test_saving_needs_all_of_several(guilty: tuple[str, ...], tmp_path: Path) -> None:
    found = bisected(guilty_of(*guilty), tmp_path / "b")
    assert (sorted(found.guilty), found.unique) == (sorted(guilty), True)
    assert f"{len(guilty)} operands together: with one fewer it fails" in found.notes
    # Each costs a halving of the 9 operands, a rerun alone, its two GEMMs, two proofs.
    assert len(found.reruns) <= 2 + len(guilty) * (4 + 1 + 2 + 2)


def test_all_may_be_guilty(tmp_path: Path) -> None:
    every = [f"layers.0:{operand}" for operand in OPERANDS]
    found = bisected(guilty_of(*every), tmp_path / "b", 1)
    assert (set(found.sites), found.unique) == (set(every), True)


def test_a_set_that_is_not_the_only_one_is_said_to_be_none(tmp_path: Path) -> None:
    first, second = cells_of("layers.0:input"), cells_of("layers.2:weight")
    found = bisected(lambda low: bool(first & low) and bool(second & low), tmp_path / "b")
    assert found.guilty in (("layers.0:input",), ("layers.2:weight",))
    assert found.unique is False
    assert found.notes == (
        "a set that suffices, not the only one: all but it in high precision saves the run too",
    )


def test_either_gemm_may_suffice(tmp_path: Path) -> None:
    both = cells_of("layers.1:input")
    found = bisected(lambda low: both <= low, tmp_path / "b")
    assert (found.guilty, found.unique) == (("layers.1:input@output",), False)
    assert "layers.1:input: either of its GEMMs suffices" in found.notes


@pytest.mark.parametrize("direction", ["saves", "breaks"])
def test_what_is_named_suffices_and_is_one_minimal_whatever_the_runs_do(
    direction: Direction, tmp_path: Path
) -> None:
    every = every_cell(2)

    def arbitrary(seed: int) -> Breaks:
        """Not monotone: each set of operands breaks or does not, as a coin says."""

        def breaks(low: Cells) -> bool:
            if low in (every, frozenset()):
                return low == every
            text = ",".join(sorted(":".join(cell) for cell in low))
            return bool(np.random.default_rng([seed, *text.encode()]).random() < 0.4 + seed / 100)

        return breaks

    sizes = set()
    for seed in range(12):
        breaks = arbitrary(seed)
        found = bisected(breaks, tmp_path / str(seed), 2, direction=direction, suspects=())

        def does(cells: Cells, breaks: Breaks = breaks) -> bool:
            return not breaks(every - cells) if direction == "saves" else breaks(cells)

        members = [cells_of(name) for name in found.guilty]
        assert does(frozenset().union(*members))
        for member in members:
            assert not does(frozenset().union(*(one for one in members if one is not member)))
        sizes.add(len(members))
        assert found.unique is not any(does(every - member) for member in members)
    assert max(sizes) > 1


# --- the other way round ----------------------------------------------------------------------


def test_the_smallest_set_that_breaks(tmp_path: Path) -> None:
    site = "layers.2:grad_output"
    found = bisected(guilty_of(f"{site}@grad_weight"), tmp_path / "a", direction="breaks")
    assert (found.guilty, found.unique) == ((f"{site}@grad_weight",), True)
    assert len(found.reruns) <= found.bound
    both = cells_of("layers.0:input"), cells_of("layers.2:weight")
    found = bisected(lambda low: all(one & low for one in both), tmp_path / "b", direction="breaks")
    assert sorted(found.sites) == ["layers.0:input", "layers.2:weight"]
    assert found.unique is False  # either of the two GEMMs of each
    either = guilty_of("layers.0:input", "layers.2:weight")
    found = bisected(either, tmp_path / "c", direction="breaks")
    assert found.sites in (("layers.0:input",), ("layers.2:weight",))
    assert found.unique is False


def test_both_directions_share_a_folder(tmp_path: Path) -> None:
    invented = Invented(guilty_of("layers.1:weight@output"))
    saves = bisect(invented, FP8, path=tmp_path / "b")
    before = invented.calls
    breaks = bisect(invented, FP8, path=tmp_path / "b", direction="breaks")
    assert saves.guilty == breaks.guilty == ("layers.1:weight@output",)
    assert invented.calls - before < len(breaks.reruns)
    index = json.loads((tmp_path / "b" / "bisection.json").read_text())
    assert set(index["results"]) == {"saves", "breaks"}
    assert len(index["reruns"]) == invented.calls


# --- what is in question ----------------------------------------------------------------------


def test_only_what_is_in_fp8_and_asked_for_is_in_question(tmp_path: Path) -> None:
    overrides: dict[str, Recipe] = {
        "layers.0": HighPrecision(format=FP32),
        "layers.1:input@output": HighPrecision(),
    }
    plan = Plan(recipe=DelayedScaling(), exclude=("layers.3",), overrides=overrides)
    invented = Invented(guilty_of("layers.1:input"), 4)
    found = bisect(invented, plan, path=tmp_path / "a")
    assert (found.cells, found.guilty) == (11, ("layers.1:input@grad_weight",))
    found = bisect(invented, plan, ["layers.1:input", "layers.2:*"[:8]], path=tmp_path / "b")
    assert (found.cells, found.guilty) == (7, ("layers.1:input@grad_weight",))
    found = bisect(invented, plan, ["*:weight"], path=tmp_path / "c")
    assert found.stopped == "high precision there breaks too (broke at step 7): not FP8"


def test_what_is_switched_wins_over_every_override(tmp_path: Path) -> None:
    overrides: dict[str, Recipe] = {
        "layers.1:input": DelayedScaling(),  # the very pattern that will be switched
        "layers.1*": Float8CurrentScaling(),
        "*@output": Float8CurrentScaling(),
    }
    found = bisect(
        Invented(guilty_of("layers.1:input")),
        Plan(recipe=HighPrecision(), overrides=overrides),
        path=tmp_path / "b",
    )
    assert (found.guilty, found.unique) == (("layers.1:input",), True)


def test_patterns_name_these_cells_and_nothing_else() -> None:
    every = sorted(every_cell(1))
    assert patterns_of(every) == ["layers.0"]
    assert patterns_of(every[:-1]) != ["layers.0"]
    odd = "blocks[0]*.a"
    cells = cells_of(f"{odd}:input", f"{odd}:weight@output")
    plan = Plan(
        recipe=Float8CurrentScaling(),
        overrides=dict.fromkeys(patterns_of(sorted(cells)), HighPrecision()),
    )
    for layer in (odd, "blocks0x.a", "blocks[0]x.a"):
        for operand, gemm in product(OPERANDS, GEMMS):
            if operand in GEMMS[gemm]:
                high = isinstance(plan.recipe_for(layer, operand, gemm), HighPrecision)
                assert high == (Cell(layer, operand, gemm) in cells)


# --- nothing to find --------------------------------------------------------------------------


def test_a_plan_that_does_not_break(tmp_path: Path) -> None:
    found = bisected(lambda low: False, tmp_path / "b")
    assert found.stopped == "the plan as it is survived to step 9: nothing to bisect"
    assert (found.guilty, found.unique, len(found.reruns)) == ((), None, 1)
    assert str(found).splitlines()[0] == f"{tmp_path}/b: {found.stopped}"


def test_a_training_that_breaks_in_high_precision_too(tmp_path: Path) -> None:
    found = bisected(lambda low: True, tmp_path / "b")
    assert found.stopped == "high precision breaks too (broke at step 7): not FP8"
    late = bisect(Invented(lambda low: True), FP8, path=tmp_path / "c", checkpoint=tmp_path / "x")
    assert late.stopped == f"{found.stopped}, or the checkpoint is too late"
    assert len(found.reruns) == len(late.reruns) == 2


# --- errors are no outcomes -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "told"),
    [
        (
            FP8,
            "rerun-001: layers.0:input@output is in FP8 under a plan that has it in high precision",
        ),
        (Plan(recipe=HighPrecision()), "rerun-000: no layer is in FP8"),
    ],
)
def test_a_training_with_a_plan_of_its_own_is_refused(own: Plan, told: str, tmp_path: Path) -> None:
    invented = Invented(lambda low: bool(low))
    with pytest.raises(RunError) as caught:
        bisect(lambda plan, path: invented(own, path), FP8, path=tmp_path, suspects=())
    told += ", expected train to convert with the plan that it is given"
    assert str(caught.value) == f"{tmp_path / 'reruns'}/{told}"
    high = Plan(recipe=HighPrecision())
    found = bisect(invented, high, path=tmp_path / "high", suspects=())
    assert found.stopped == "the plan as it is survived to step 9: nothing to bisect"


def test_after_a_site_that_is_none_the_folder_takes_another(tmp_path: Path) -> None:
    """And the rerun of the plan as it is counts for it."""
    invented = Invented(guilty_of("layers.1:input"))
    with pytest.raises(ValueError, match=r"site 'third\.\*', expected layers among layers\.0"):
        bisect(invented, FP8, "third.*", path=tmp_path, suspects=())
    found = bisect(invented, FP8, "layers.1", path=tmp_path, suspects=())
    assert found.guilty == ("layers.1:input",)
    assert invented.calls == len(found.reruns)
    with pytest.raises(RunError, match="holds a bisection with sites "):
        bisect(invented, FP8, "*", path=tmp_path, suspects=())


def test_a_rerun_that_raises_ends_the_bisection(tmp_path: Path) -> None:
    invented = Invented(guilty_of("layers.1:input"))

    def out_of_memory(path: Path) -> None:
        if path.name == "rerun-003":
            raise MemoryError("no memory\nand more")

    invented.befalls = out_of_memory
    with pytest.raises(RunError) as told:
        bisect(invented, FP8, path=tmp_path / "b")
    assert str(told.value) == (
        f"{tmp_path}/b/reruns/rerun-003: layers.0:input, layers.0:weight: MemoryError: no memory; "
        f"all of the error is in {tmp_path}/b/reruns/rerun-003/traceback.txt"
    )
    whole = (tmp_path / "b/reruns/rerun-003/traceback.txt").read_text()
    assert whole.endswith("MemoryError: no memory\nand more\n")
    invented.befalls = lambda path: None
    found = bisect(invented, FP8, path=tmp_path / "b")
    assert found.guilty == ("layers.1:input",)
    assert invented.calls == len(found.reruns) + 1


def test_a_rerun_that_raises_after_it_diverged_broke(tmp_path: Path) -> None:
    inner = Invented(guilty_of("layers.1:input"))

    def raising(plan: Plan, path: Path) -> None:
        inner(plan, path)
        if len(open_run(path).events()):
            raise FloatingPointError("the loss is NaN")

    found = bisect(raising, FP8, path=tmp_path / "b")
    assert found.guilty == ("layers.1:input",)
    errors = {one.error for one in found.reruns if one.broke}
    assert errors == {"FloatingPointError: the loss is NaN"}
    assert {one.error for one in found.reruns if not one.broke} == {None}


def _raises_after(plan: Plan, path: Path) -> None:
    write_run(path, {"layers.0": {}}, None)
    raise RuntimeError("boom")


def _leaves_open(plan: Plan, path: Path) -> None:
    writer = RunWriter.create(path, {"precision": {}})
    writer.append("steps", [{"step": 0, "loss": 1.0}])
    writer.flush()


def _fails(plan: Plan, path: Path) -> None:
    writer = RunWriter.create(path, {"precision": {}})
    writer.append("steps", [{"step": 0, "loss": 1.0}])
    writer.close("failed")


@pytest.mark.parametrize(
    ("training", "told"),
    [
        (lambda plan, path: None, "no run here, expected a directory with a run.json"),
        (_raises_after, "rerun-000/traceback.txt"),
        (_leaves_open, "its run is still open, expected train to leave its `with`"),
        (_fails, "its run is failed and did not diverge"),
        (lambda plan, path: write_run(path, {}, None, 0), "its run has no steps"),
    ],
)
def test_a_rerun_that_tells_nothing_is_no_outcome(training: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        bisect(training, FP8, path=tmp_path / "b")
    assert str(caught.value).startswith(f"{tmp_path}/b/reruns/rerun-000: the plan as it is: ")
    assert str(caught.value).endswith(told)
    assert json.loads((tmp_path / "b" / "bisection.json").read_text())["reruns"] == []


def test_a_rerun_that_ends_early_survived_nothing(tmp_path: Path) -> None:
    invented = Invented(guilty_of("layers.1:input"))
    invented.steps = BREAKS_AT
    with pytest.raises(RunError, match="ended at step 6, expected to reach step 7, at which"):
        bisect(invented, FP8, path=tmp_path / "b")


def test_a_judge_may_say_only_whether(tmp_path: Path) -> None:
    def judge(run: Run) -> bool:
        return bool(len(run.events()))

    found = bisect(Invented(guilty_of("layers.0:weight")), FP8, path=tmp_path / "b", judge=judge)
    assert found.guilty == ("layers.0:weight",)
    assert {(one.step, str(one)) for one in found.reruns if one.broke} == {(None, "broke")}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sites": ["layers.9"]}, "bisect: site 'layers.9', expected layers among layers.0"),
        ({"sites": ["*:product"]}, "override '*:product': operand 'product', expected"),
        ({"sites": ["*@output"]}, "bisect: site '*@output', expected LAYERS or LAYERS:OPERAND"),
        ({"sites": [3]}, "bisect: site 3, expected LAYERS or LAYERS:OPERAND"),
        ({"direction": "both"}, "bisect: direction='both', expected 'saves' or 'breaks'"),
        ({"about": {"x": {1}}}, "bisect: about={'x': {...}}, expected what JSON can hold"),
    ],
)
def test_wrong_words_are_refused(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        bisect(Invented(lambda low: True), FP8, path=tmp_path / "b", **options)
    assert str(caught.value).startswith(told)


def test_a_model_without_converted_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"among none: nothing was converted$"):
        bisect(Invented(lambda low: True, 0), FP8, path=tmp_path / "b")
    plan = Plan(recipe=HighPrecision())
    with pytest.raises(ValueError, match=r"nothing of \* is in FP8$"):
        bisect(Invented(lambda low: True), plan, path=tmp_path / "c")


# --- a folder that holds something ------------------------------------------------------------


def test_a_finished_bisection_is_read_and_not_done_again(tmp_path: Path) -> None:
    invented = Invented(guilty_of("layers.1:input"))
    first = bisect(invented, FP8, path=tmp_path / "b")
    calls = invented.calls
    again = bisect(invented, FP8, path=tmp_path / "b")
    assert (again, invented.calls) == (first, calls)


def test_outcomes_are_judged_from_the_evidence(tmp_path: Path) -> None:
    invented = Invented(guilty_of("layers.1:input"))
    bisect(invented, FP8, path=tmp_path / "b")
    index = json.loads((tmp_path / "b" / "bisection.json").read_text())
    for one in index["reruns"]:
        one["broke"] = not one["broke"]
    (tmp_path / "b" / "bisection.json").write_text(json.dumps(index))
    assert bisect(invented, FP8, path=tmp_path / "b").guilty == ("layers.1:input",)
    found = bisect(invented, FP8, path=tmp_path / "b", judge=lambda run: None)
    assert found.stopped == "the plan as it is survived to step 7: nothing to bisect"


def test_a_rerun_whose_evidence_is_gone_is_done_again(tmp_path: Path) -> None:
    invented = Invented(guilty_of("layers.1:input"))
    first = bisect(invented, FP8, path=tmp_path / "b")
    (tmp_path / "b" / "reruns" / "rerun-001" / "run.json").unlink()
    calls = invented.calls
    again = bisect(invented, FP8, path=tmp_path / "b")
    assert again.guilty == first.guilty
    assert invented.calls == calls + 1


def another(plan: Plan, path: Path) -> None:
    raise AssertionError


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"plan": Plan(recipe=DelayedScaling())}, "plan"),
        ({"sites": ["layers.*"]}, "sites"),
        ({"about": {"seed": 2}}, "about"),
        ({"checkpoint": Path("step-3.safetensors")}, "checkpoint"),
        ({"high_precision": HighPrecision(format=FP32)}, "high_precision"),
        ({"train": another}, "train"),
    ],
)
def test_a_folder_of_another_question_is_refused(
    change: dict[str, Any], key: str, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {
        "train": Invented(guilty_of("layers.1:input")),
        "plan": FP8,
        "about": {"seed": 1},
    }
    bisect(**asked, path=tmp_path / "b")
    before = sorted((tmp_path / "b").rglob("*"))
    with pytest.raises(RunError) as caught:
        bisect(**asked | change, path=tmp_path / "b")
    assert f"{tmp_path}/b: holds a bisection with {key} " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted((tmp_path / "b").rglob("*")) == before


def test_a_folder_whose_first_rerun_has_yet_to_begin_takes_no_other_question(
    tmp_path: Path,
) -> None:
    """A model may load for minutes before there is a run."""
    refused: list[str] = []

    def loads(plan: Plan, path: Path) -> None:
        with pytest.raises(RunError) as caught:
            bisect(another, FP8, path=tmp_path / "b")
        refused.append(str(caught.value))
        raise MemoryError

    with pytest.raises(RunError, match="MemoryError"):
        bisect(loads, FP8, path=tmp_path / "b")
    assert len(refused) == 1 and refused[0].startswith(
        f"{tmp_path}/b: holds a bisection with train"
    )


def test_a_folder_in_which_nothing_was_finished_takes_another_question(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"rerun-000: the plan as it is: AssertionError; all of"):
        bisect(another, FP8, path=tmp_path / "b")
    invented = Invented(guilty_of("layers.1:input"))
    (tmp_path / "b" / "step-3.safetensors").touch()  # of that question's training
    with pytest.raises(RunError, match="holds a bisection with train "):
        bisect(invented, FP8, path=tmp_path / "b")
    (tmp_path / "b" / "step-3.safetensors").unlink()
    found = bisect(invented, FP8, path=tmp_path / "b")
    assert found.guilty == ("layers.1:input",)
    assert found.reruns[0].name == "rerun-001"  # nothing is removed


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "[]",
        "{}",
        '{"question": [1], "reruns": [], "results": {}}',
        '{"question": {}, "reruns": 3, "results": {}}',
        '{"question": {}, "reruns": [3], "results": {}}',
        '{"question": {}, "reruns": [{"name": "x"}], "results": {}}',
        '{"question": {}, "reruns": [], "results": 5}',
        "[" * 100_000,
    ],
)
def test_a_folder_that_holds_no_bisection_is_refused(content: str | None, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    if content is not None:
        (tmp_path / "bisection.json").write_text(content)
    with pytest.raises(RunError) as caught:
        bisect(Invented(lambda low: True), FP8, path=tmp_path)
    expected = f"{tmp_path}: exists and holds no bisection, expected a new folder"
    assert str(caught.value) == expected


def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    invented = Invented(guilty_of("layers.1:input"))
    bisect(invented, FP8, path=tmp_path / "b")
    file = tmp_path / "b" / "bisection.json"
    file.write_text(file.read_text().replace("rerun-001", "../../rerun-001"))
    with pytest.raises(RunError, match="holds no bisection"):
        bisect(invented, FP8, path=tmp_path / "b")


def test_a_rerun_that_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    invented = Invented(guilty_of("layers.1:input"))
    bisect(invented, FP8, path=tmp_path / "b")
    writer = RunWriter.create(tmp_path / "b" / "reruns" / "rerun-099", {})
    with pytest.raises(RunError, match="rerun-099: is being written by another process"):
        bisect(invented, FP8, path=tmp_path / "b")
    writer.close()
    bisect(invented, FP8, path=tmp_path / "b")


KILLED = """
import sys, time
from pathlib import Path
from test_bisection import FP8, Invented, guilty_of
from fp8lab.bisection import bisect

training = Invented(guilty_of("layers.2:weight"))
training.befalls = lambda path: time.sleep(float(sys.argv[2]))
print(bisect(training, FP8, path=sys.argv[1]).guilty, training.calls)
"""


@pytest.mark.long
def test_a_killed_bisection_goes_on_where_it_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "b"

    def started(pause: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", KILLED, str(folder), str(pause)]
        environment = os.environ | {"PYTHONPATH": str(TESTS)}
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    def finished() -> int:
        try:
            return len(json.loads((folder / "bisection.json").read_text())["reruns"])
        except (OSError, ValueError):
            return 0

    with started(0.2) as process:
        while finished() < 4:
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    done = finished()
    # As if it had died in the middle of a rerun.
    (folder / "reruns" / "rerun-050" / "segments").mkdir(parents=True)
    with started(0.0) as process:
        told, _ = process.communicate()
    whole = bisected(guilty_of("layers.2:weight"), tmp_path / "whole")
    assert told == f"('layers.2:weight',) {len(whole.reruns) - done}\n"
    assert finished() == len(whole.reruns)


# --- several at once, progress, print ---------------------------------------------------------


class AtOnce:
    """A batch that does its reruns last first."""

    def __init__(self, breaks: Breaks) -> None:
        self.one, self.sizes = Invented(breaks), []  # type: tuple[Invented, list[int]]

    def rerun_all(
        self, plans: Mapping[Path, Plan], on_end: Callable[[Path, str | None], None]
    ) -> None:
        self.sizes.append(len(plans))
        for path in reversed(list(plans)):
            self.one(plans[path], path)
            on_end(path, None)


def test_a_batch_is_given_several_at_once(tmp_path: Path) -> None:
    batch = AtOnce(guilty_of("layers.2:input", "layers.1:weight"))
    assert isinstance(batch, Batch)
    found = bisect(batch, FP8, path=tmp_path / "b")
    assert sorted(found.guilty) == ["layers.1:weight", "layers.2:input"]
    assert max(batch.sizes) == 2
    assert sum(batch.sizes) == len(found.reruns)


def test_progress_tells_how_many_there_will_be_at_most(tmp_path: Path) -> None:
    bounds: list[tuple[int, int]] = []
    told: list[Any] = []
    found = bisect(
        Invented(guilty_of("layers.1:grad_output")),
        FP8,
        path=tmp_path / "b",
        on_start=lambda index, label: told.append((index, label)),
        on_end=lambda index, error: told.append((index, error)),
        on_bound=lambda done, at_most: bounds.append((done, at_most)),
    )
    assert [done for done, _ in bounds][-1] == len(found.reruns) == bounds[-1][1]
    known = [at_most for _, at_most in bounds if at_most > 2]
    assert known == sorted(known, reverse=True)  # one is guilty: never more than was said
    assert known[0] <= found.bound
    assert told[:2] == [(0, "rerun-000: the plan as it is"), (0, None)]
    assert len(told) == 2 * len(found.reruns)


def test_what_is_printed_and_what_is_kept(tmp_path: Path) -> None:
    found = bisected(guilty_of("layers.0:input"), tmp_path / "b", 1)
    assert str(found) == (
        f"{tmp_path}/b: layers.0:input in high precision: the run is saved\n"
        "  the only smallest set: with all but it in high precision the run still breaks\n"
        "  6 operands of GEMMs in question, 7 reruns (one site: within 9)\n"
        "  rerun-000  the plan as it is           broke at step 7\n"
        "  rerun-001  all in high precision       survived to step 9\n"
        "  rerun-002  layers.0:input              survived to step 9\n"
        "  rerun-003  layers.0:input@output       broke at step 7\n"
        "  rerun-004  layers.0:input@grad_weight  broke at step 7\n"
        "  rerun-005  all but layers.0:input      broke at step 7"
    ).replace("7 reruns", "6 reruns")
    index = json.loads((tmp_path / "b" / "bisection.json").read_text())
    kept = json.loads(json.dumps(found.to_dict()))
    assert index["results"]["saves"] == kept | {"path": "."}
    assert kept["guilty"] == ["layers.0:input"]
    for one in found.reruns:
        assert (loss_told := open_run(found.evidence(one))).state == "finished"
        assert bool(len(loss_told.events())) == one.broke
    several = bisected(
        guilty_of("layers.0:input", "layers.1:input"), tmp_path / "c", 2, direction="saves"
    )
    assert "within" not in str(several)
    breaking = bisected(guilty_of("layers.0:input@output"), tmp_path / "d", direction="breaks")
    first = str(breaking).splitlines()[0]
    assert first == (
        f"{tmp_path}/d: layers.0:input@output alone in FP8: a run in high precision breaks"
    )


# --- from a checkpoint ------------------------------------------------------------------------


def made(plan: Plan) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = convert(nn.Sequential(fp8lab.GatedFeedForward(8, 16)), plan)
    return model, torch.optim.Adam(model.parameters(), lr=0.01)


class Reconstruction:
    def loss(self, model: nn.Module, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        return (model(x) - x).square().mean(), {}


def losses_of(model: nn.Module, optimizer: torch.optim.Optimizer, first: int) -> list[float]:
    losses: list[float] = []
    train(
        *(model, optimizer, Reconstruction(), Schedule(steps=8)),
        first_step=first,
        progress=lambda step, loss: losses.append(loss),
    )
    return losses


LONG = DelayedScaling(amax_history_len=6)
DELAYED = Plan(recipe=LONG, overrides={"*.gate:input": DelayedScaling(amax_history_len=4)})


def test_a_training_that_stops_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    whole = losses_of(*made(DELAYED), 0)
    model, optimizer = made(DELAYED)
    file = tmp_path / "step-5.safetensors"
    schedule, told = Schedule(steps=8), []
    stopped = train(
        *(model, optimizer, Reconstruction(), schedule),
        stop=(5, file),
        progress=lambda step, loss: told.append(loss),
    )
    assert (stopped, told) == (None, whole[:5])
    model, optimizer = made(DELAYED)
    assert load_checkpoint(file, model, optimizer, other_precision=True) == 5
    assert losses_of(model, optimizer, 5) == whole[5:]


def test_another_plan_takes_what_it_has_room_for(tmp_path: Path) -> None:
    model, optimizer = made(DELAYED)
    losses_of(model, optimizer, 0)
    file = tmp_path / "c.safetensors"
    save_checkpoint(file, model, optimizer, 8)
    before = model.state_dict()
    wide = DelayedScaling(fp8_format=fp8lab.Format.HYBRID_E5M2_COPIES)
    overrides = {
        "*.gate:weight": HighPrecision(),
        "*.gate:grad_output": HighPrecision(),  # left: the input, of a history of 4
        "*.up": HighPrecision(),
        "*.down": wide,  # a history of 1024, scales of copies
    }
    plan = Plan(recipe=LONG, overrides=dict(DELAYED.overrides) | overrides)
    other, fresh = made(plan)
    with pytest.raises(ValueError, match=r"checkpoint .*amax_history: .*, expected "):
        load_checkpoint(file, other, fresh)
    load_checkpoint(file, other, fresh, other_precision=True)
    state = other.state_dict()
    assert "0.up.scale" in before and "0.up.scale" not in state
    assert torch.equal(state["0.gate.amax_history"], before["0.gate.amax_history"][:4])
    assert torch.equal(state["0.gate.scale"], before["0.gate.scale"])
    assert torch.equal(state["0.down.amax_history"][:6], before["0.down.amax_history"])
    assert float(state["0.down.amax_history"][6:].abs().max()) == 0.0
    assert torch.equal(state["0.down.scale"][:3], before["0.down.scale"])
    assert state["0.down.scale"][3:].tolist() == [1.0, 1.0]
    for name in before:
        if name.endswith("weight"):
            assert torch.equal(state[name], before[name])
    bf16, fresh = made(Plan(recipe=HighPrecision()))
    save_checkpoint(file, bf16, fresh, 0)
    model, optimizer = made(DELAYED)  # and from a run that had no scales
    load_checkpoint(file, model, optimizer, other_precision=True)
    assert set(model.state_dict()["0.gate.scale"].tolist()) == {1.0}
    with pytest.raises(ValueError, match=r"0\.down\.weight: "):
        narrow = nn.Sequential(fp8lab.GatedFeedForward(8, 32))
        adam = torch.optim.Adam(narrow.parameters())
        load_checkpoint(file, convert(narrow, DELAYED), adam, other_precision=True)


# --- the command line -------------------------------------------------------------------------

EXPERIMENT = """
from test_bisection import DELAYED, FP8, Invented, Reconstruction, Schedule, guilty_of, made
from fp8lab import watch
from fp8lab.lab.arm import Arm
from fp8lab.lab.experiment import Experiment, Part
from fp8lab.lab.train import load_checkpoint, train
from fp8lab.recipe import HighPrecision

def invented(job, progress):
    assert (job.path.parents[1] / f"prepared-{job.seed}").exists()
    Invented(guilty_of(f"layers.{job.seed}:weight"))(job.arm.plan, job.path)
    progress(10, 10, 1.0, 0)

def prepare(seed, folder, settings, progress):
    (folder / f"prepared-{seed}").touch()

def trained(job, progress):
    # Really trained; that it breaks where down's input is in FP8 is said, not so.
    model, optimizer = made(job.arm.plan)
    first = 0
    if job.start is not None:
        first = load_checkpoint(job.start, model, optimizer, other_precision=True)
    with watch(model, job.path, config=job.config()) as watching:
        train(model, optimizer, Reconstruction(), Schedule(steps=job.settings.steps or 8),
              watch=watching, first_step=first, stop=job.stop)
        recipe = job.arm.plan.recipe_for("0.down", "input", "output")
        if not isinstance(recipe, HighPrecision) and job.stop is None:
            watching.event(7, "diverged", "it is said")

fp8 = Arm(name="fp8", title="FP8", plan=FP8)
delayed = Arm(name="delayed", title="FP8", plan=DELAYED)
EXPERIMENT = Experiment(
    name="invented", question="?", prediction="", refuted_if="", limits=(),
    parts=(
        Part(name="first", title="", arms=(fp8, delayed), seeds=(0,), run=invented,
             prepare=prepare),
        Part(name="second", title="", arms=(fp8,), seeds=(0,), run=invented, prepare=prepare),
        Part(name="third", title="", arms=(delayed,), seeds=(0,), run=trained, restarts=True),
    ),
)

def script(plan, path):
    import random, torch
    draws.append((random.random(), float(torch.rand(()))))
    assert len(draws) == 1 and draws[0] == (0.8444218515250481, 0.49625658988952637)
    Invented(guilty_of("layers.2:input"))(plan, path)

def starts(plan, path, checkpoint):
    assert checkpoint.name == "mine.pt"
    script(plan, path)

def dies(plan, path):
    import os
    os._exit(3)

draws = []
"""


def invoke(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["bisect", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("experiment") / "invented.py"
    file.write_text(EXPERIMENT)
    return file


@pytest.mark.long
def test_an_arm_is_bisected_from_the_command_line(experiment: Path, tmp_path: Path) -> None:
    asked = (experiment, "--arm", "fp8", "--part", "second", "--seed", "2", "--out", tmp_path / "b")
    code, told, _ = invoke(*asked, "--workers", "2")
    first = told.splitlines()[-len(open_reruns(tmp_path / "b")) - 3]
    assert (code, first) == (
        0,
        f"{tmp_path}/b: layers.2:weight in high precision: the run is saved",
    )
    code, told, errors = invoke(*asked, "--json", "--break")
    data = json.loads(told)
    assert (code, data["sites"], data["unique"]) == (0, ["layers.2:weight"], False)
    code, told, errors = invoke(*asked[:-2], "--seed", "1", "--out", tmp_path / "b")
    assert (code, told) == (2, "")
    assert errors.startswith(f"error: {tmp_path}/b: holds a bisection with about ")
    assert errors.count("\n") == 1


def open_reruns(folder: Path) -> list[Run]:
    return [open_run(path) for path in sorted((folder / "reruns").iterdir())]


@pytest.mark.long
def test_an_arm_starts_from_a_checkpoint_of_its_own(experiment: Path, tmp_path: Path) -> None:
    asked = (experiment, "--arm", "delayed", "--part", "third", "--site", "*.down:input")
    code, told, _ = invoke(*asked, "--from", "3", "--out", tmp_path / "b")
    assert (code, "0.down:input@output in high precision" in told) == (0, True)
    whole = losses_of(*made(DELAYED), 0)
    base, *_ = open_reruns(tmp_path / "b")
    steps = base.steps("loss")
    assert (steps["step"].tolist(), steps["loss"].tolist()) == ([3, 4, 5, 6, 7], whole[3:])
    assert all(run.steps()["step"].min() == 3 for run in open_reruns(tmp_path / "b"))
    code, told, errors = invoke(*asked, "--from", "9", "--steps", "4", "--out", tmp_path / "c")
    assert code == 2
    assert errors.splitlines()[-1].endswith("the plan as it is: the arm ended before step 9")


@pytest.mark.long
def test_a_script_is_bisected_from_the_command_line(experiment: Path, tmp_path: Path) -> None:
    recipe = ("--recipe", "DelayedScaling")
    code, told, _ = invoke(f"{experiment}:script", *recipe, "--out", tmp_path / "b")
    assert (code, "layers.2:input in high precision: the run is saved" in told) == (0, True)
    plan = tmp_path / "plan.yaml"
    plan.write_text("recipe: HighPrecision\noverrides: {'layers.1': DelayedScaling}\n")
    mine = tmp_path / "mine.pt"
    mine.touch()
    asked = (f"{experiment}:starts", "--recipe", plan, "--checkpoint", mine)
    code, told, _ = invoke(*asked, "--out", tmp_path / "c")
    assert (code, "survived to step 9: nothing to bisect" in told) == (1, True)
    code, _, errors = invoke(f"{experiment}:dies", *recipe, "--out", tmp_path / "d")
    expected = "the plan as it is: its process ended with exit code 3"
    assert (code, errors.splitlines()[-1].endswith(expected)) == (2, True)
    assert not list((tmp_path / "d" / "reruns").iterdir())


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("EXPERIMENT", "bisect: EXPERIMENT: expected --arm with the arm that breaks, of "),
        ("large", "experiment 'large': expected a .py file or one of: "),
        ("EXPERIMENT --arm fp9", "arm fp9: expected one of fp8, delayed"),
        ("EXPERIMENT --arm fp8", "arm fp8: is in parts first, second, expected one of them with"),
        ("EXPERIMENT --arm fp8 --part x", "part x: expected one of first, second, third"),
        (
            "EXPERIMENT --arm fp8 --part first --from 3",
            "part first: expected a part whose training can start from a checkpoint",
        ),
        ("EXPERIMENT --arm fp8 --recipe MXFP8BlockScaling", "bisect: --recipe is for SCRIPT.py:"),
        ("EXPERIMENT:script", "bisect: EXPERIMENT:script: expected --recipe with the plan that"),
        ("EXPERIMENT:script --arm fp8", "bisect: --arm is for an experiment, EXPERIMENT:script is"),
        ("EXPERIMENT:script --recipe FP9", "recipe FP9: no such file, expected a YAML file or one"),
        ("EXPERIMENT:script --recipe no.yaml", "no.yaml: No such file or directory"),
        (
            "EXPERIMENT:script --recipe MXFP8BlockScaling --checkpoint no.pt",
            "checkpoint no.pt: no such file",
        ),
        ("no.py:train --recipe MXFP8BlockScaling", "script no.py: no such file"),
        ("nothing --arm x", "experiment 'nothing': expected a .py file or one of: "),
    ],
)
def test_wrong_words_end_in_one_line(
    asked: str, told: str, experiment: Path, tmp_path: Path
) -> None:
    arguments = asked.replace("EXPERIMENT", str(experiment)).split()
    code, out, errors = invoke(*arguments, "--out", tmp_path / "b")
    assert (code, out, errors.count("\n")) == (2, "", 1)
    assert errors.startswith(f"error: {told.replace('EXPERIMENT', str(experiment))}")
    assert not (tmp_path / "b").exists()


def test_a_function_that_is_none_ends_in_one_line(experiment: Path, tmp_path: Path) -> None:
    asked = (f"{experiment}:nothing", "--recipe", "MXFP8BlockScaling", "--out", tmp_path / "b")
    code, _, errors = invoke(*asked)
    assert code == 2
    whole = tmp_path / "b" / "reruns" / "rerun-000" / "traceback.txt"
    told = f"expected a function nothing(plan, path); all of the error is in {whole}"
    assert errors.splitlines()[-1].endswith(told)
    code, _, errors = invoke(f"{experiment}:neither", *asked[1:])
    assert "expected a function neither(plan, path)" in errors.splitlines()[-1]


# --- real trainings ---------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    ("planted", "guilty"),
    [
        (Planted("saturated", ("layers.2.down:input",), 4), "layers.2.down:input@output"),
        pytest.param(
            Planted("flushed gradients", ("layers.1.gate:grad_output",), 5),
            "layers.1.gate:grad_output@grad_weight",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_planted_operand_is_named(planted: Planted, guilty: str, tmp_path: Path) -> None:
    found = bisect(planted.train, planted.plan, path=tmp_path / "b", judge=broke)
    assert (found.guilty, found.sites, found.unique) == ((guilty,), planted.guilty, True)
    assert found.cells == 72
    assert len(found.reruns) <= found.bound == 13
