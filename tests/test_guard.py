"""The guard on the training that diverges: what it tells, when, what it does, and that it does not
touch what it watches.

The training is the rare-token regression of the main experiment, shortened: history 4, one rare
token in ten steps. Unguarded it diverges; what a guard did is read back from the run on disk.
"""

from __future__ import annotations

import math
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp8lab import (
    DelayedScaling,
    Float8CurrentScaling,
    GatedFeedForward,
    HighPrecision,
    Plan,
    convert,
    guard,
    watch,
)
from fp8lab.diagnosis import Diagnosis, diagnose
from fp8lab.guard import FIRST_STEPS, Checkpoints, Guard
from fp8lab.lab.data import RareToken
from fp8lab.mitigations import AntiWindup, ClampedSwiGLU, HighPrecisionProduct, ZClip
from fp8lab.monitor.recorder import StepRows
from fp8lab.record import Finding, Severity
from fp8lab.store import open_run

PLAN = Plan(
    recipe=DelayedScaling(amax_history_len=4), overrides={"*:grad_output": Float8CurrentScaling()}
)
STEPS = 180


class Training:
    """The model, its optimizer and a step."""

    def __init__(self, seed: int = 3) -> None:
        torch.manual_seed(seed)
        self.model = convert(nn.Sequential(GatedFeedForward(64, 128)), PLAN)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.025)
        self.task = RareToken(seed=seed, hidden=64, target_scale=70.0, event_probability=0.1)

    def step(self, step: int) -> Tensor:
        x, y, _ = self.task.batch(step)
        loss: Tensor = (self.model(x) - y).square().sum(-1).mean()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()

    def save(self, path: Path) -> None:
        torch.save(self.model.state_dict(), path)

    def load(self, path: Path) -> None:
        self.model.load_state_dict(torch.load(path, weights_only=True))


def train(
    path: Path, steps: int = STEPS, first: int = 0, seed: int = 3, **options: Any
) -> tuple[Training, list[float], Guard]:
    training = options.pop("training", None) or Training(seed)
    losses: list[float] = []
    with watch(training.model, path, optimizer=training.optimizer, every=1) as watching:
        guard = Guard(watching, **options)
        for step in range(first, steps):
            losses.append(float(training.step(step)))
            watching.step(step, loss=losses[-1])
            if not math.isfinite(losses[-1]):
                break
    return training, losses, guard


def events(path: Path) -> list[tuple[int, str, str | None]]:
    found = open_run(path).events()
    # What a rare token does to the loss is an alarm of its own, which has no site.
    return [
        (int(row.step), str(row.kind), row.site if isinstance(row.site, str) else None)
        for row in found.itertuples()
        if row.kind != "alarm" or str(row.detail).startswith("delayed_saturation")
    ]


@pytest.fixture(scope="module")
def unguarded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """What happens without anybody's help."""
    path = tmp_path_factory.mktemp("unguarded") / "run"
    training, losses = Training(), []
    with watch(training.model, path, optimizer=training.optimizer, every=1) as watching:
        for step in range(STEPS):
            losses.append(float(training.step(step)))
            watching.step(step, loss=losses[-1])
            if not math.isfinite(losses[-1]):
                break
    return path, losses


def test_it_tells_before_the_loss_does_and_what_the_rules_tell_of_the_same_rows(
    tmp_path: Path, unguarded: tuple[Path, list[float]]
) -> None:
    told: list[tuple[Finding, int]] = []
    _, losses, guard = train(tmp_path / "run", on_alarm=[lambda f, step: told.append((f, step))])
    assert losses == pytest.approx(unguarded[1], abs=0.0, nan_ok=True)  # to the bit
    assert not math.isfinite(losses[-1])
    told = [pair for pair in told if pair[0].cause == "delayed_saturation"]
    finding, step = told[0]
    diagnosis = diagnose(unguarded[0])
    worst = diagnosis.findings[0]
    assert (finding.cause, finding.site) == (worst.cause, worst.site)
    assert (finding.cause, finding.site) == ("delayed_saturation", "0:product")
    assert diagnosis.loss_alarm is not None and step < diagnosis.loss_alarm
    assert [f for f, _ in told] == [f for f in guard.findings if f.cause == finding.cause]
    alarms = [event for event in events(tmp_path / "run") if event[1] == "alarm"]
    assert alarms == [(step, "alarm", found.site) for found, step in told]


def test_the_newest_checkpoint_from_before_the_onset_is_kept(tmp_path: Path) -> None:
    training = Training()
    folder = tmp_path / "safe"
    checkpoints = Checkpoints(folder=folder, save=training.save, every=10, keep=2)
    _, losses, guard = train(tmp_path / "run", training=training, checkpoints=checkpoints)
    onset = guard.findings[0].since
    assert onset is not None
    kept = open_run(tmp_path / "run").events().query("kind == 'checkpoint_kept'")
    detail = kept["detail"].iloc[0]
    name = f"kept-step-{onset // 10 * 10}"
    assert detail == f"{name}: from before step {onset}"
    assert (folder / name).exists()
    # The kept one, the two newest, and the oldest of each doubling of age.
    newest = len(losses) // 10 * 10
    left = {int(file.name.removeprefix("step-")) for file in folder.glob("step-*")}
    assert {newest, newest - 10} <= left
    assert len(left) <= 6
    # From there the same training goes on without what poisoned it, where the product is in BF16.
    again = Training()
    again.load(folder / name)
    HighPrecisionProduct().apply(again.model)
    _, losses, _ = train(tmp_path / "again", first=onset // 10 * 10, training=again)
    assert len(losses) == STEPS - onset // 10 * 10 and all(map(math.isfinite, losses))


def test_a_mitigation_is_put_on_that_feed_forward_and_saves_the_run(tmp_path: Path) -> None:
    training, losses, _ = train(
        tmp_path / "run", least="medium", mitigations={"delayed_saturation": AntiWindup()}
    )
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    down: Any = training.model.get_submodule("0.down")
    assert down.gradient_of_saturated == "zero"
    kinds = [(kind, site) for _, kind, site in events(tmp_path / "run")]
    assert kinds[:2] == [("alarm", "0:product"), ("mitigated", "0:product")]


def test_after_an_alarm_steps_are_recorded_in_full(tmp_path: Path) -> None:
    training, path = Training(), tmp_path / "run"
    with watch(training.model, path, optimizer=training.optimizer, every=1000) as watching:
        guard = Guard(watching, every=1, least="medium", burst=7)
        for step in range(70):
            watching.step(step, loss=training.step(step))
    (alarm,) = [step for step, kind, _ in events(path) if kind == "alarm"]
    assert guard.findings and [k for _, k, _ in events(path)] == ["alarm", "burst"]
    rows = open_run(path).tensors("crest", sites="*:product").dropna()
    assert rows["step"].tolist() == [0, *range(alarm + 1, alarm + 8)]


@pytest.mark.long
def test_a_window_that_has_forgotten_the_onset_does_not_keep_what_came_after(
    tmp_path: Path,
) -> None:
    """Only the worst is an alarm here, long after the rows of the onset have left the window."""
    kept = []
    for window in (200, 20):
        training, folder = Training(), tmp_path / str(window)
        checkpoints = Checkpoints(folder=folder, save=training.save, every=5)
        options = {"training": training, "checkpoints": checkpoints, "least": "high", "every": 1}
        train(tmp_path / f"run-{window}", window=window, **options)
        kept.append([file.name for file in folder.glob("kept-*")][:1])
    assert kept[0] == kept[1] != []


def test_an_alarm_before_the_first_checkpoint_says_so(tmp_path: Path) -> None:
    training = Training()
    checkpoints = Checkpoints(folder=tmp_path / "safe", save=training.save, every=100)
    train(tmp_path / "run", training=training, steps=60, checkpoints=checkpoints)
    assert "no_checkpoint" in [kind for _, kind, _ in events(tmp_path / "run")]


@pytest.mark.long
def test_both_bursts_are_recorded(tmp_path: Path) -> None:
    training, path = Training(), tmp_path / "run"
    with watch(training.model, path, optimizer=training.optimizer, every=1000, burst=2) as w:
        Guard(w, every=1, burst=7)
        for step in range(70):
            w.step(step, loss=training.step(step))
    alarm = next(step for step, kind, _ in events(path) if kind == "alarm")
    rows = open_run(path).tensors("crest", sites="*:product").dropna()
    assert set(range(alarm - 2, alarm + 8)) <= set(rows["step"])


@pytest.mark.long
def test_what_gets_worse_is_an_alarm_again(tmp_path: Path) -> None:
    _, _, guard = train(tmp_path / "run", every=1)
    severities = [f.severity for f in guard.findings if f.cause == "delayed_saturation"]
    assert severities == ["medium", "high"]


OF_CHECKPOINTS = ("checkpoint_kept", "no_checkpoint", "guard_failed")


def kept_on(
    alarms: dict[int, Finding],
    tmp_path: Path,
    steps: range,
    monkeypatch: pytest.MonkeyPatch,
    every: int = 20,
) -> list[tuple[int, str, str]]:
    """Steps of a run under a Guard whose rules find, at a step, what is told; what became of
    checkpoints in them."""
    model, path = nn.Sequential(GatedFeedForward(8, 16)), tmp_path / "run"
    checkpoints = Checkpoints(folder=tmp_path / "safe", save=Path.mkdir, every=every)
    planted: list[Finding] = []
    monkeypatch.setattr(
        guard, "judge", lambda _: Diagnosis(run="", findings=tuple(planted), loss_alarm=None)
    )
    with watch(model, path, every=1000, resume_at=steps.start or None) as watching:
        Guard(watching, every=1, window=1, checkpoints=checkpoints)
        for step in steps:
            planted[:] = [alarms[step]] if step in alarms else []
            watching.step(step)
    found = open_run(path).events(["step", "kind", "detail"])
    rows = found[found["step"].isin(steps) & found["kind"].isin(OF_CHECKPOINTS)]
    return [(int(row.step), str(row.kind), str(row.detail)) for row in rows.itertuples()]


def trouble(site: str, severity: Severity, since: int) -> Finding:
    return Finding(
        cause="delayed_saturation",
        severity=severity,
        confidence="high",
        site=f"{site}:product",
        since=since,
        summary="planted",
    )


def test_what_is_kept_already_is_what_a_later_alarm_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of trouble that got worse, and of another site's since then."""
    alarms = {
        83: trouble("0", "medium", 59),
        95: trouble("1", "high", 51),
        107: trouble("0", "high", 59),
        109: trouble("2", "high", 30),
        110: trouble("3", "high", 0),
    }
    assert kept_on(alarms, tmp_path, range(112), monkeypatch) == [
        (83, "checkpoint_kept", "kept-step-40: from before step 59"),
        (95, "checkpoint_kept", "kept-step-40: from before step 51, kept already"),
        (107, "checkpoint_kept", "kept-step-40: from before step 59, kept already"),
        (109, "checkpoint_kept", "kept-step-20: from before step 30"),
        (110, "no_checkpoint", "none is from before step 0"),
    ]


def test_where_a_run_goes_on_its_checkpoints_are_known_and_none_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But those of steps that gave way are not, and what has another name is none."""
    safe = tmp_path / "safe"
    kept_on({50: trouble("0", "high", 45)}, tmp_path, range(70), monkeypatch)
    (safe / "step-20.partial").mkdir()
    assert {file.name for file in safe.iterdir()} >= {"step-20", "kept-step-40", "step-60"}
    # The training went back to before step 60.
    alarms = {
        62: trouble("0", "high", 61),
        64: trouble("1", "high", 30),
        66: trouble("2", "high", 30),
        67: trouble("3", "high", 19),
    }
    assert kept_on(alarms, tmp_path, range(45, 250), monkeypatch, every=25) == [
        (62, "checkpoint_kept", "kept-step-50: from before step 61"),
        (64, "checkpoint_kept", "kept-step-20: from before step 30"),
        (66, "checkpoint_kept", "kept-step-20: from before step 30, kept already"),
        (67, "no_checkpoint", "none is from before step 19"),
    ]
    assert {file.name for file in safe.glob("*0")} >= {
        *("kept-step-20", "kept-step-40", "kept-step-50", "step-60", "step-250")
    }


def test_a_folder_of_checkpoints_is_that_of_one_run(tmp_path: Path) -> None:
    """Which may go on in it, also where it has been moved; a new one of the same name may not."""
    model = nn.Sequential(GatedFeedForward(8, 16))
    checkpoints = Checkpoints(folder=tmp_path / "safe", save=lambda path: path.mkdir(), every=1)
    path = tmp_path / "first"
    with watch(model, path, every=1000) as watching:
        Guard(watching, checkpoints=checkpoints)
        watching.step(0)
    path = path.rename(tmp_path / "moved")
    with watch(model, path, every=1000, resume_at=1) as watching:
        Guard(watching, checkpoints=checkpoints)
        watching.step(1)
    assert sorted(file.name for file in (tmp_path / "safe").glob("step-*")) == ["step-1", "step-2"]
    told = (
        r"safe is the folder of another run, first \(.run in it\), expected one for this run alone$"
    )
    for name in ("second", "first"):
        with watch(model, tmp_path / name) as watching:
            with pytest.raises(ValueError, match=f"^Guard: checkpoints: .*/{told}"):
                Guard(watching, checkpoints=checkpoints)
            assert watching.observers == []


def test_a_full_disk_takes_no_folder_from_its_run(tmp_path: Path) -> None:
    checkpoints = Checkpoints(folder=tmp_path / "safe", save=lambda path: path.mkdir(), every=1)
    with watch(nn.Sequential(GatedFeedForward(8, 16)), tmp_path / "run") as watching:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        try:
            with pytest.raises(OSError):
                Guard(watching, checkpoints=checkpoints)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        Guard(watching, checkpoints=checkpoints)


def test_of_old_checkpoints_one_stays_for_each_doubling_of_age(tmp_path: Path) -> None:
    training, folder = Training(), tmp_path / "safe"
    checkpoints = Checkpoints(folder=folder, save=lambda path: path.mkdir(), every=1, keep=2)
    with watch(training.model, tmp_path / "run", every=1000) as watching:
        Guard(watching, every=1000, checkpoints=checkpoints)
        for step in range(100):
            watching.step(step)
    left = sorted(100 - int(file.name.removeprefix("step-")) for file in folder.glob("step-*"))
    assert left[:2] == [0, 1]
    assert [age.bit_length() for age in left[2:]] == [2, 3, 4, 5, 6, 7]


def test_what_fails_is_told_and_ends_nothing(tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full\nand more")

    checkpoints = Checkpoints(folder=tmp_path / "safe", save=fail, every=50)
    with pytest.warns(UserWarning, match="guard: a (callback|checkpoint): OSError: disk full and"):
        _, losses, guard = train(
            tmp_path / "run", steps=110, least="medium", on_alarm=[fail], checkpoints=checkpoints
        )
    assert len(losses) == 110
    failed = open_run(tmp_path / "run").events().query("kind == 'guard_failed'")
    details = failed["detail"].tolist()
    assert details.count("a checkpoint: OSError: disk full and more") == 2
    assert details.count("a callback: OSError: disk full and more") == len(guard.findings) > 0


def test_a_mitigation_that_cannot_be_put_there_is_told(tmp_path: Path) -> None:
    class Refusing:
        def apply(self, model: nn.Module) -> nn.Module:
            raise ValueError("not here")

    with pytest.warns(UserWarning, match="guard: Refusing: ValueError: not here"):
        train(
            tmp_path / "run",
            steps=60,
            least="medium",
            mitigations={"delayed_saturation": Refusing()},
        )


def test_its_memory_is_a_window(tmp_path: Path) -> None:
    training = Training()
    with watch(training.model, tmp_path / "run", every=1) as watching:
        guard = Guard(watching, window=20)
        for step in range(150):
            watching.step(step, loss=training.step(step))
    recent = guard._recent
    assert recent.tensors("cur_amax", sites="*:product")["step"].tolist() == [*range(130, 150)]
    assert recent.steps("loss")["step"].tolist() == [*range(50), *range(130, 150)]
    on_disk = open_run(tmp_path / "run").tensors(steps=range(130, 150))
    for name in ("cur_amax", "bulk_error", "staleness", "format"):
        assert recent.tensors(name)[name].tolist() == pytest.approx(
            on_disk[name].tolist(), abs=0.0, nan_ok=True
        ) or recent.tensors(name)[name].equals(on_disk[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "Guard: every=0, expected at least 1"),
        ({"window": 0}, "Guard: window=0, expected at least 1"),
        ({"burst": -1}, "Guard: burst=-1, expected at least 0"),
        ({"every": True}, "Guard: every=True, expected at least 1"),
        ({"on_alarm": print}, r"Guard: on_alarm=.*, expected functions of a finding and a step"),
        ({"on_alarm": ["print"]}, r"Guard: on_alarm=\['print'\], expected functions of a find.*"),
        ({"checkpoints": {"every": 5}}, r"Guard: checkpoints=.*, expected fp8lab.Checkpoints"),
        ({"least": "worst"}, r"Guard: least='worst', expected one of \('high', 'medium', 'low'\)"),
    ],
)
def test_what_is_no_guard_is_refused(tmp_path: Path, options: Any, message: str) -> None:
    with watch(Training().model, tmp_path / "run") as watching:
        with pytest.raises(ValueError, match=f"^{message}$"):
            Guard(watching, **options)
        assert watching.observers == []


def test_what_are_no_checkpoints_is_refused() -> None:
    for name in ("every", "keep"):
        with pytest.raises(ValueError, match=rf"^Checkpoints: {name}=0, expected at least 1$"):
            Checkpoints(folder="x", save=print, **{name: 0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a function of a path"):
        Checkpoints(folder="x", save="y")  # type: ignore[arg-type]


def test_the_rules_see_nothing_older_than_the_window(tmp_path: Path) -> None:
    recent = guard._Recent(tmp_path, {}, 10)
    for step in range(50 + FIRST_STEPS):
        rows = StepRows(step, is_full=True)
        rows.steps.append({"loss": 1.0})
        rows.channels.append({"site": "m", "channel": 1})
        recent.add(rows, rank=0)
    steps = list(range(40 + FIRST_STEPS, 50 + FIRST_STEPS))
    assert recent.channels()["step"].tolist() == steps
    assert sum(recent.reduced("channels", len, ("step",), sites="m")) == 10
    assert recent.steps()["step"].tolist() == [*range(FIRST_STEPS), *steps]


@pytest.mark.parametrize(
    ("mitigations", "told"),
    [
        ({"delayed_saturatio": AntiWindup()}, "'delayed_saturatio', expected one of"),
        ({"delayed_saturation": "AntiWindup"}, "expected a mitigation of a model"),
        ({"delayed_saturation": AntiWindup}, "expected a mitigation of a model"),
        ({"delayed_saturation": ZClip()}, "is of the optimizer, expected one of a model"),
        (
            {"delayed_saturation": AntiWindup()},
            r"^Guard: mitigations: delayed_saturation: AntiWindup\(\): no layer here is in FP8, "
            r"expected a model that convert\(\) was called on before watch$",
        ),
    ],
)
def test_what_can_mend_nothing_is_refused(
    tmp_path: Path, mitigations: dict[str, Any], told: str
) -> None:
    for number, plan in enumerate((None, HighPrecision())):
        model = nn.Sequential(GatedFeedForward(8, 16))
        model = model if plan is None else convert(model, plan)
        with watch(model, tmp_path / f"run-{number}") as watching:
            with pytest.raises(ValueError, match=told):
                Guard(watching, mitigations=mitigations)
            Guard(watching, mitigations={"massive_activation": ClampedSwiGLU()})  # of any precision
