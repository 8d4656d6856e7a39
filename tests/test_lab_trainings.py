"""The trainings that experiments share: rare tokens, and byte-level language models.

The oracle of the oracle (`exact`) is the layer itself, not converted; that watching it changes
nothing is two trainings with the same losses, to the bit.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fp8lab import HighPrecision, Plan, convert
from fp8lab.formats import FP32
from fp8lab.lab import language, rare_tokens
from fp8lab.lab.arm import Arm
from fp8lab.lab.experiment import Job, Settings
from fp8lab.lab.language import Setup, Trained, pretrain, pretrained, train_bytes
from fp8lab.lab.model import LanguageModel, ModelConfig
from fp8lab.lab.rare_tokens import (
    Punctual,
    RareTokens,
    Regression,
    Student,
    fp8,
    learning_rate_of,
    optimizer_of,
    regress,
    regress_spaced,
    table_of_ends,
)
from fp8lab.lab.result import results
from fp8lab.lab.train import NextByte
from fp8lab.mitigations.tweo import TWEO
from fp8lab.mitigations.z_loss import ZLoss
from fp8lab.runs import Run, open_run

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SMALL = Setup(
    config=ModelConfig(dim=16, layers=1, heads=2, context=16),
    steps=4,
    quick=2,
    learning_rate=1e-3,
    batch=2,
    held_out=1,
)


def job_of(path: Path, plan: Plan = rare_tokens.BF16, **options: Any) -> Job:
    """Of seed 1, whose first rare token at a random gap of forty comes at step 7."""
    arm = Arm(name="an-arm", title="an arm", plan=plan, options=options)
    return Job("x", "part", arm, 1, path / "part" / "an-arm" / "seed-1", Settings())


PENALTIES = (TWEO(weight=0.5), ZLoss(weight=0.01))


def punished(arm: Arm) -> Arm:
    return replace(arm, mitigations=PENALTIES)


def quiet(step: int, steps: int, loss: float, alarms: int) -> None:
    pass


def ran(run: Any, job: Job, **more: Any) -> Run:
    run(job, quiet, **more)
    return open_run(job.path)


# --- rare tokens ----------------------------------------------------------------------------------


def test_the_punctual_token_comes_at_every_gap_th_step() -> None:
    task = Punctual(Regression(0).asked, 4)
    rare = [bool(task.batch(step)[2].any()) for step in range(12)]
    assert [step for step, is_rare in enumerate(rare) if is_rare] == [3, 7, 11]


def test_the_oracle_is_the_layer_without_a_cast() -> None:
    plain = Student(1)
    task = RareTokens(1, 1, punctual=True)
    token, target = task.asked.rare_input, task.asked.rare_target
    with torch.no_grad():
        product = plain.mlp.product(token)
        error = (plain(token) - target).square().sum() / target.square().sum()
    found = task.exact(convert(Student(1), fp8(16)))
    assert found["product"] == pytest.approx(float(product.abs().max()), rel=1e-6)
    assert found["exact_error"] == pytest.approx(float(error), rel=1e-6)


def test_the_oracle_changes_no_bit_of_the_training(tmp_path: Path) -> None:
    job = job_of(tmp_path / "a", fp8(4))
    plain = ran(regress, replace(job, settings=Settings(steps=12))).steps()
    spaced = ran(regress_spaced, job_of(tmp_path / "b", fp8(4), steps=12)).steps()
    assert plain["rare_error"].notna().tolist() == [step == 7 for step in range(12)]
    for name in ("loss", "common_loss", "rare_error"):
        assert plain[name].dropna().tolist() == spaced[name].dropna().tolist()
    assert spaced["product"].notna().tolist() == spaced["rare_error"].notna().tolist()


def test_a_clipped_product_is_above_what_the_scale_holds(tmp_path: Path) -> None:
    """Seldomer than the history is long: the scale is the common tokens', the product grows."""
    options = {"gap": 4, "punctual": True, "steps": 28}
    delayed = ran(regress_spaced, job_of(tmp_path / "a", fp8(2), **options)).steps()
    exact = ran(regress_spaced, job_of(tmp_path / "b", **options)).steps()
    ratios = delayed["ratio"].dropna()
    assert ratios.is_monotonic_increasing and ratios.iloc[0] < 1 < ratios.iloc[-1]
    assert "ratio" not in exact.columns


def test_ends_are_means_of_the_last_steps_and_events(tmp_path: Path) -> None:
    how = {"gap": 2, "punctual": True, "steps": 16}
    run = ran(regress_spaced, job_of(tmp_path, **how))
    rows, result = run.steps(), run.info["result"]
    assert result["events"] == 8 and result["diverged_at"] is None
    assert result["final_loss"] == result["final_common_loss"]
    assert result["final_loss"] == pytest.approx(rows["common_loss"].mean(), rel=1e-12)
    for name in ("rare_error", "exact_error", "product"):
        last = rows[name].dropna().tail(5)
        assert result[f"final_{name}"] == pytest.approx(last.mean(), rel=1e-12)
    config = run.info["config"]
    assert {name: config[name] for name in how} == how
    table = table_of_ends(results(tmp_path, "part"))
    assert table["diverged"].tolist() == ["0 of 1"]
    assert table["largest product"].tolist() == [result["final_product"]]


def test_a_run_that_diverges_has_no_end(tmp_path: Path) -> None:
    for run, name in ((regress, "a"), (regress_spaced, "b")):
        result = ran(run, job_of(tmp_path / name, learning_rate=1e3)).info["result"]
        assert result["diverged_at"] is not None
        assert {v for k, v in result.items() if k.startswith("final")} == {None}


def test_optimizers_as_the_options_say() -> None:
    student = Student(0)

    def made(**options: Any) -> tuple[str, dict[str, Any]]:
        arm = Arm(name="a", title="a", plan=rare_tokens.BF16, options=options)
        optimizer = optimizer_of(arm, student)
        assert learning_rate_of(arm) == optimizer.defaults["lr"]
        return type(optimizer).__name__, optimizer.defaults

    kind, found = made()
    assert (kind, found["lr"], found["momentum"]) == ("SGD", 0.025, 0.0)
    assert made(learning_rate=0.5, momentum=0.9)[1]["momentum"] == 0.9
    kind, found = made(optimizer="adam")
    assert (kind, found["lr"]) == ("Adam", 0.003)
    kind, found = made(optimizer="adamw", learning_rate=0.1, beta2=0.99)
    assert (kind, found["lr"], found["betas"]) == ("AdamW", 0.1, (0.9, 0.99))
    with pytest.raises(KeyError, match="adamw"):  # which has no rate of its own
        made(optimizer="adamw")


def test_a_student_without_a_gate_has_as_many_weights() -> None:
    sizes = [sum(p.numel() for p in Student(0, name).parameters()) for name in (None, "relu")]
    assert sizes[0] == sizes[1]
    assert torch.equal(Student(5).mlp.up.weight, Student(5).mlp.up.weight)
    assert not torch.equal(Student(5).mlp.up.weight, Student(6).mlp.up.weight)


# --- language models ------------------------------------------------------------------------------


def test_a_run_says_what_it_was_told(tmp_path: Path) -> None:
    ended: list[Trained] = []

    def ends(trained: Trained) -> dict[str, Any]:
        ended.append(trained)
        return {"more": 5}

    setup = replace(SMALL, ends=ends, looks=lambda model, task, step: {"looked": float(step)})
    job = job_of(tmp_path, language.BF16, learning_rate=0.01)
    run = ran(train_bytes, job, setup=setup, extra="so")
    config, (trained,) = run.info["config"], ended
    told = {name: config[name] for name in ("steps", "learning_rate", "weight_decay", "extra")}
    assert told == {"steps": 4, "learning_rate": 0.01, "weight_decay": 0.1, "extra": "so"}
    assert config["text_sha256"] == trained.task.text.sha256
    assert run.steps()["looked"].dropna().tolist() == [0.0, 2.0]  # three at least, of four steps
    loss = trained.task.held_out_loss(trained.model, 1)
    assert run.info["result"] == {"diverged_at": None, "final_loss": loss, "more": 5}


@pytest.mark.parametrize(("at_least", "recorded"), [(3, [0, 2]), (None, [0]), (4, [0, 2])])
def test_a_short_run_is_recorded_in_full_some_times(
    at_least: int | None, recorded: list[int], tmp_path: Path
) -> None:
    setup = replace(SMALL, at_least=at_least)
    run = ran(train_bytes, job_of(tmp_path, language.BF16), setup=setup)
    rows = run.tensors(["step", "cur_amax"], sites="*:gate").dropna()
    assert rows["step"].unique().tolist() == recorded


def test_what_diverges_ends_without_a_loss(tmp_path: Path) -> None:
    setup = replace(SMALL, diverged_above=0.0, ends=lambda of: {"at": of.diverged_at})
    run = ran(train_bytes, job_of(tmp_path, language.BF16), setup=setup)
    assert run.info["result"] == {"diverged_at": 0, "final_loss": None, "at": 0}


def test_penalties_are_in_the_loss_and_not_in_the_held_out_one(tmp_path: Path) -> None:
    plain = job_of(tmp_path / "plain")
    job = replace(plain, path=tmp_path / "punished", arm=punished(plain.arm))
    steps = ran(train_bytes, job, setup=SMALL).steps()
    without = ran(train_bytes, plain, setup=SMALL).steps()
    model = LanguageModel(SMALL.config, plain.seed)
    plain.arm.prepare(model)
    task = NextByte(None, plain.seed, batch=SMALL.batch, context=SMALL.config.context)
    penalties = [mitigation.apply(model) for mitigation in PENALTIES]
    task.loss(model, 0)
    by_hand = torch.stack([penalty() for penalty in penalties]).sum().detach()
    assert steps["penalty"][0] == float(by_hand) > 0.0
    assert steps["loss"][0] == pytest.approx(without["loss"][0] + float(by_hand), rel=1e-6)
    said = open_run(job.path).info["config"]["mitigations"]
    assert said == job.arm.describe()["mitigations"]
    at_rest = replace(SMALL, learning_rate=0.0, weight_decay=0.0)
    ends = [
        ran(train_bytes, replace(one, path=one.path / "rest"), setup=at_rest).info["result"]
        for one in (plain, job)
    ]
    assert ends[0]["final_loss"] == ends[1]["final_loss"]


def test_a_mitigation_that_a_training_does_not_ask_for_is_refused(tmp_path: Path) -> None:
    plain = job_of(tmp_path)
    with pytest.raises(ValueError) as raised:
        regress(replace(plain, arm=punished(plain.arm)), quiet)
    expected = "expected a training that asks its arm for kind loss"
    assert str(raised.value) == f"Arm 'an-arm': TWEO has not been applied, {expected}"
    assert not plain.path.exists()


def test_the_learning_rate_fades_to_zero(tmp_path: Path) -> None:
    rates: list[float] = []
    setup = replace(SMALL, fades=True, ends=lambda of: rates.append(_rate(of)) or {})
    train_bytes(job_of(tmp_path / "a", language.BF16), quiet, setup=setup)
    train_bytes(job_of(tmp_path / "b", language.BF16), quiet, setup=replace(setup, fades=False))
    assert rates == [0.0, 1e-3]


def _rate(trained: Trained) -> float:
    return float(trained.optimizer.param_groups[0]["lr"])


def test_windows_are_recorded_in_full(tmp_path: Path) -> None:
    setup = replace(SMALL, steps=8, at_least=None, windows=lambda steps: [(steps - 4, steps - 2)])
    run = ran(train_bytes, job_of(tmp_path, language.BF16), setup=setup)
    rows = run.tensors(["step", "cur_amax"], sites="*:gate").dropna()
    assert rows["step"].unique().tolist() == [0, 4, 5, 6]


@pytest.mark.parametrize(
    ("plan", "same"),
    [(language.BF16, language.BF16), (None, Plan(recipe=HighPrecision(format=FP32)))],
    ids=["BF16", "not converted"],
)
def test_arms_start_from_what_was_pretrained(plan: Plan | None, same: Plan, tmp_path: Path) -> None:
    pretrain(1, tmp_path / "part", Settings(), quiet, setup=SMALL, plan=plan)
    found = [pretrained(job_of(tmp_path, fp8(4)), SMALL).state_dict() for _ in range(2)]
    setup = replace(SMALL, ends=lambda of: found.append(of.model.state_dict()) or {})
    train_bytes(job_of(tmp_path / "trained", same), quiet, setup=setup)
    one, other, trained = found
    assert one.keys() == trained.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) and torch.equal(value, trained[name])


# --- the experiments ------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(EXPERIMENTS.glob("*.py")), ids=lambda file: file.stem)
def test_no_experiment_runs_another_ones_file(file: Path) -> None:
    """What a page says made it is the hash of one file: the rest is the package's."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.name for alias in node.names}
    assert not names & {"load_module", "load_experiment", "importlib", "importlib.util", "runpy"}
