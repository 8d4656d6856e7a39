"""The loop and its checkpoints: to the bit, watched or not, resumed or not, and safe to load.

A resumed run is compared with the uninterrupted one in all that a step leaves behind: losses,
parameters, FP8 histories and the recorded rows. It starts from a model with other weights, so that
what a checkpoint fails to restore shows.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fp8lab.conversion import convert
from fp8lab.ffn import GatedFeedForward
from fp8lab.lab.data import read_text
from fp8lab.lab.model import LanguageModel, ModelConfig
from fp8lab.lab.train import NextByte, Schedule, load_checkpoint, save_checkpoint, train
from fp8lab.mitigations import (
    AdaGC,
    AntiWindup,
    HadamardProduct,
    HotChannelPatch,
    SmoothSwiGLU,
    ZClip,
)
from fp8lab.monitor import watch
from fp8lab.recipe import DelayedScaling, Format, HighPrecision
from fp8lab.record import TABLES
from fp8lab.store import Run, open_run

STEPS, RESUME_AT = 11, 5


class Reconstruction:
    """Learn the identity; a batch depends on the step alone. One step in four is four times as
    large, so that delayed scales clip."""

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
        x *= 4.0 if step % 4 == 3 else 1.0
        loss = (model(x) - x).square().mean()
        return loss, {"twice": 2 * loss.item()}


class Noisy(Reconstruction):
    """The same with noise from the global generator, as dropout draws it."""

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        loss, metrics = super().loss(model, step)
        return loss * torch.rand(()), metrics


class Constant(Reconstruction):
    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        loss, metrics = super().loss(model, step)
        return loss * 0.0 + 2.0, metrics


PRECISIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "bf16": lambda model: convert(model, HighPrecision()),
    "delayed": lambda model: convert(model, DelayedScaling(amax_history_len=3)),
    "smooth": lambda model: SmoothSwiGLU().apply(PRECISIONS["delayed"](model)),
    "anti-windup": lambda model: AntiWindup().apply(PRECISIONS["delayed"](model)),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
}


def made(precision: str = "plain", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return PRECISIONS[precision](nn.Sequential(GatedFeedForward(8, 16)))


def losses_of(model: nn.Module, optimizer: torch.optim.Optimizer, **more: Any) -> list[float]:
    """The losses of training on from `first_step`."""
    losses: list[float] = []
    schedule = more.pop("schedule", Schedule(steps=STEPS))
    task = more.pop("task", Reconstruction())
    train(model, optimizer, task, schedule, progress=lambda _, loss: losses.append(loss), **more)
    return losses


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rows(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Everything recorded, less the clock."""
    tables = {table: run.arrow(table) for table in TABLES}
    tables["steps"] = tables["steps"].drop_columns(["seconds"])
    return {name: table.to_pylist() for name, table in tables.items()}


@pytest.mark.parametrize("mitigation", [ZClip(warm_up=2), AdaGC(warm_up=2)], ids=repr)
def test_a_resumed_run_has_the_state_of_its_mitigations(tmp_path: Path, mitigation: Any) -> None:
    model = made()
    optimizer = mitigation.apply(OPTIMIZERS["adamw"](model))
    whole = losses_of(
        model,
        optimizer,
        schedule=Schedule(steps=STEPS, checkpoint_every=3),
        checkpoints=tmp_path,
    )
    again = made(seed=1)
    resumed = mitigation.apply(OPTIMIZERS["adamw"](again))
    first = load_checkpoint(tmp_path / "step-3.safetensors", again, resumed)
    assert first == 3
    assert losses_of(again, resumed, first_step=first) == whole[3:]
    assert equal(state(model), state(again))
    assert resumed.param_groups[0].keys() == optimizer.param_groups[0].keys()
    for name in ("zclip", "adagc"):
        assert resumed.param_groups[0].get(name) == optimizer.param_groups[0].get(name)
    plain = OPTIMIZERS["adamw"](made())
    with pytest.raises(ValueError, match=r"optimizer groups, expected the state of \[\{\}\]$"):
        load_checkpoint(tmp_path / "step-3.safetensors", made(), plain)


# --- the loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_seed_gives_the_same_losses_watched_or_not(tmp_path: Path, precision: str) -> None:
    trained = []
    for name in (None, None, "run"):
        model = made(precision)
        optimizer = OPTIMIZERS["sgd"](model)
        if name is None:
            losses = losses_of(model, optimizer, task=Noisy())
        else:
            with watch(model, tmp_path / name, optimizer=optimizer, every=2) as watching:
                losses = losses_of(model, optimizer, task=Noisy(), watch=watching)
        trained.append((losses, state(model)))
    assert trained[0][0] == trained[1][0] == trained[2][0]
    assert equal(trained[0][1], trained[1][1]) and equal(trained[0][1], trained[2][1])
    steps = open_run(tmp_path / "run").steps()
    assert steps["step"].tolist() == list(range(STEPS))
    assert steps["loss"].tolist() == trained[0][0]
    assert steps["twice"].notna().all()
    other = made(precision, seed=1)
    assert losses_of(other, OPTIMIZERS["sgd"](other), task=Noisy()) != trained[0][0]


def test_the_loop_is_the_textbooks() -> None:
    model, by_hand = made(), made()
    losses = losses_of(
        model, OPTIMIZERS["sgd"](model), schedule=Schedule(steps=STEPS, clip_norm=0.1)
    )
    optimizer, expected = OPTIMIZERS["sgd"](by_hand), []
    for step in range(STEPS):
        loss, _ = Reconstruction().loss(by_hand, step)
        optimizer.zero_grad()
        loss.backward()
        assert nn.utils.clip_grad_norm_(by_hand.parameters(), 0.1) > 0.1
        optimizer.step()
        expected.append(loss.item())
    assert losses == expected and equal(state(model), state(by_hand))


@pytest.mark.parametrize(
    ("schedule", "stops"),
    [
        (Schedule(steps=20, diverged_above=2.0), True),
        (Schedule(steps=20, diverged_above=2.0, judged_by="twice"), True),
        (Schedule(steps=20, diverged_above=4.0, judged_by="twice"), True),
        (Schedule(steps=20), False),
    ],
)
def test_divergence_stops_the_loop_and_is_recorded(
    tmp_path: Path, schedule: Schedule, stops: bool
) -> None:
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # the loss is that of the batches
    values = [Reconstruction().loss(model, step)[1]["twice"] for step in range(20)]
    factor = 1.0 if schedule.judged_by == "twice" else 0.5
    beyond = [s for s, twice in enumerate(values) if twice * factor > schedule.diverged_above]
    with watch(model, tmp_path / "run") as watching:
        diverged = train(model, optimizer, Reconstruction(), schedule, watch=watching)
    run = open_run(tmp_path / "run")
    assert bool(beyond) == stops
    assert diverged == (beyond[0] if stops else None)
    assert len(run.steps()) == (beyond[0] + 1 if stops else 20)
    events = run.events()[["step", "kind", "detail"]].to_dict("records")
    told = f"{schedule.judged_by} is {values[beyond[0]] * factor:.4g}" if stops else ""
    assert events == ([{"step": diverged, "kind": "diverged", "detail": told}] if stops else [])


def test_a_loss_at_the_limit_has_not_diverged() -> None:
    for limit, expected in ((2.0, None), (math.nextafter(2.0, 0.0), 0)):
        model = made()
        still = torch.optim.SGD(model.parameters(), lr=0.0)
        schedule = Schedule(steps=2, diverged_above=limit)
        assert train(model, still, Constant(), schedule) == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_divergence_whatever_the_limit(bad: float) -> None:
    class Spoilt(Reconstruction):
        def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
            loss, metrics = super().loss(model, step)
            return (loss * bad if step == 3 else loss), metrics

    model = made()
    assert train(model, OPTIMIZERS["sgd"](model), Spoilt(), Schedule(steps=9)) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "Schedule: steps=0, expected at least 1"),
        ({"steps": 1, "checkpoint_every": 0}, "Schedule: checkpoint_every=0, expected at least 1"),
    ],
)
def test_schedule_errors(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Schedule(**fields)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_checkpoints_need_a_folder_and_a_folder_needs_checkpoints(tmp_path: Path) -> None:
    for every, folder in ((5, None), (None, tmp_path)):
        model = made()
        before = state(model)
        with pytest.raises(ValueError, match="expected both or neither"):
            losses_of(
                model,
                OPTIMIZERS["sgd"](model),
                schedule=Schedule(steps=STEPS, checkpoint_every=every),
                checkpoints=folder,
            )
        assert equal(state(model), before)


# --- resumed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, precision: str, optimizer_name: str
) -> None:
    model = made(precision)
    optimizer = OPTIMIZERS[optimizer_name](model)
    schedule = Schedule(steps=STEPS, checkpoint_every=RESUME_AT)
    with watch(model, tmp_path / "whole", optimizer=optimizer, every=3) as watching:
        expected = losses_of(model, optimizer, task=Noisy(), watch=watching)

    first = made(precision)
    optimizer = OPTIMIZERS[optimizer_name](first)
    begun: list[float] = []

    def stop_at_eight(step: int, loss: float) -> None:
        begun.append(loss)
        if step == 8:
            raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        watch(first, tmp_path / "resumed", optimizer=optimizer, every=3) as watching,
    ):
        train(
            first,
            optimizer,
            Noisy(),
            schedule,
            watch=watching,
            checkpoints=tmp_path / "checkpoints",
            progress=stop_at_eight,
        )
    assert begun == expected[:9]
    assert open_run(tmp_path / "resumed").state == "interrupted"

    second = made(precision, seed=1)
    optimizer = OPTIMIZERS[optimizer_name](second)
    checkpoint = tmp_path / "checkpoints" / f"step-{RESUME_AT}.safetensors"
    step = load_checkpoint(checkpoint, second, optimizer)
    assert step == RESUME_AT
    with watch(
        second, tmp_path / "resumed", optimizer=optimizer, every=3, resume_at=step
    ) as watching:
        resumed = losses_of(second, optimizer, task=Noisy(), watch=watching, first_step=step)

    assert begun[:step] + resumed == expected
    assert equal(state(second), state(model))
    if precision == "delayed":
        assert any(name.endswith("amax_history") for name in state(second))
    whole, again = (rows(open_run(tmp_path / name)) for name in ("whole", "resumed"))
    assert again["steps"] == whole["steps"] and whole["events"] == []
    assert [event["kind"] for event in again["events"]] == ["resumed"]
    # What was hot is forgotten when a process ends: `persistence`, channels followed since, and
    # which channels' weights are kept.
    for row in [*again["tensors"], *whole["tensors"]]:
        del row["persistence"]
    for row in [*again["channels"], *whole["channels"]]:
        del row["gate_weights"], row["up_weights"]
    assert again["tensors"] == whole["tensors"]
    assert [row for row in whole["channels"] if row in again["channels"]] == again["channels"]
    assert {row["step"] for row in again["channels"]} == {0, 3, 6, 9}


# --- checkpoints --------------------------------------------------------------------------------


def saved(path: Path, precision: str = "delayed", optimizer_name: str = "adamw") -> Path:
    model = made(precision)
    optimizer = OPTIMIZERS[optimizer_name](model)
    losses_of(model, optimizer, schedule=Schedule(steps=3))
    save_checkpoint(path, model, optimizer, 3)
    return path


def test_a_checkpoint_restores_model_optimizer_and_random_state(tmp_path: Path) -> None:
    model = made("delayed")
    optimizer = OPTIMIZERS["adamw"](model)
    losses_of(model, optimizer, schedule=Schedule(steps=3))
    random = torch.get_rng_state()
    save_checkpoint(tmp_path / "c.safetensors", model, optimizer, 3)
    other = made("delayed", seed=1)
    fresh = OPTIMIZERS["adamw"](other)
    assert load_checkpoint(tmp_path / "c.safetensors", other, fresh) == 3
    assert equal(state(other), state(model))
    assert torch.equal(torch.get_rng_state(), random)
    for index, expected in optimizer.state_dict()["state"].items():
        assert equal(fresh.state_dict()["state"][index], expected)


class Cooling(torch.optim.SGD):
    """An optimizer that counts in plain numbers."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            count = self.state[parameter].get("count", 0) + 1
            self.state[parameter].update(count=count, heat=1 / (3 * count))


def test_plain_numbers_in_the_optimizer_are_kept(tmp_path: Path) -> None:
    model = made()
    optimizer = Cooling(model.parameters(), lr=0.01)
    losses_of(model, optimizer, schedule=Schedule(steps=3))
    save_checkpoint(tmp_path / "c.safetensors", model, optimizer, 3)
    fresh = Cooling(model.parameters(), lr=0.01)
    load_checkpoint(tmp_path / "c.safetensors", model, fresh)
    kept = fresh.state_dict()["state"]
    assert kept == {index: {"count": 3, "heat": 1 / 9} for index in range(3)}


def test_step_ns_checkpoint_is_the_state_before_step_n(tmp_path: Path) -> None:
    model = made()
    optimizer = OPTIMIZERS["sgd"](model)
    before = state(model)
    losses_of(
        model,
        optimizer,
        schedule=Schedule(steps=STEPS, checkpoint_every=4),
        checkpoints=tmp_path / "new" / "folder",
    )
    files = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert files == ["step-0.safetensors", "step-4.safetensors", "step-8.safetensors"]
    assert load_checkpoint(tmp_path / "new" / "folder" / files[0], model, optimizer) == 0
    assert equal(state(model), before)


def test_a_checkpoint_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "c.safetensors")
    before = path.read_bytes()

    def disk_is_full(tensors: Any, file: Path, **more: Any) -> None:
        Path(file).write_bytes(b"half of it")
        raise OSError("No space left on device")

    model = made("delayed", seed=1)
    optimizer = OPTIMIZERS["adamw"](model)
    monkeypatch.setattr(safetensors.torch, "save_file", disk_is_full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, model, optimizer, 4)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path / "new.safetensors", model, optimizer, 4)
    assert path.read_bytes() == before
    assert not (tmp_path / "new.safetensors").exists()


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file in two: what its header says, and the bytes of the tensors."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_metadata(**changes: str | None) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        described, tensors = header(path)
        metadata = described["__metadata__"] | changes
        described["__metadata__"] = {key: value for key, value in metadata.items() if value}
        raw = json.dumps(described).encode()
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + tensors)

    return spoil


def with_tensors(**tensors: Tensor) -> Callable[[Path], None]:
    """The file with these tensors instead of, or beside, its own ("__" in a name is a dot)."""

    def spoil(path: Path) -> None:
        metadata = header(path)[0]["__metadata__"]
        given = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        safetensors.torch.save_file(safetensors.torch.load_file(path) | given, path, metadata)

    return spoil


class Bomb:
    """What a pickle can do: call anything."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def replaced_by_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(path.with_name("exploded"))))


def replaced_by_torch_save(path: Path) -> None:
    torch.save({"model": Bomb(path.with_name("exploded"))}, path)


def replaced_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


FOREIGN: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "a folder": replaced_by_folder,
    "empty": lambda path: path.write_bytes(b""),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "no safetensors": lambda path: path.write_bytes(b"\xff" * 4096),
    "a pickle": replaced_by_pickle,
    "a pickle of torch's": replaced_by_torch_save,
    "no step": with_metadata(step=None),
    "a step in words": with_metadata(step="three"),
    "no optimizer": with_metadata(optimizer=None),
    "optimizer state that is no JSON": with_metadata(optimizer_state="{"),
    "optimizer state that is a list": with_metadata(optimizer_state="[1]"),
    "optimizer state of numbers": with_metadata(optimizer_state='{"0": 1}'),
    "groups that are no JSON": with_metadata(optimizer_groups="{"),
    "groups of another number": with_metadata(optimizer_groups="[{}, {}]"),
    "rewritings that are no mapping": with_metadata(rewritten="[1]"),
    "rewritings of what is not rewritten": with_metadata(rewritten='{"0.down": [1]}'),
    "groups of what nothing keeps": with_metadata(optimizer_groups='[{"lr": 1.0}]'),
    "optimizer state of no number": with_metadata(optimizer_state='{"a": {}}'),
    "no metadata": lambda path: safetensors.torch.save_file({"random": torch.zeros(3)}, path),
    "a tensor of no kind": with_tensors(other=torch.zeros(3)),
    "one weight too many": with_tensors(model__new=torch.zeros(3)),
    "a weight of another shape": with_tensors(model__0__up__weight=torch.zeros(16, 9)),
    "a weight of another type": with_tensors(
        model__0__up__weight=torch.zeros(16, 8, dtype=torch.bfloat16)
    ),
    "a random state too short": with_tensors(random=torch.zeros(3, dtype=torch.uint8)),
    "a random state of floats": with_tensors(random=torch.zeros(5056)),
    "SGD's": lambda path: saved(path, optimizer_name="sgd"),
    "another precision's": lambda path: saved(path, precision="bf16"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_checkpoint_that_cannot_be_loaded_changes_nothing(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path / "c.safetensors")
    FOREIGN[kind](path)
    model = made("delayed", seed=1)
    optimizer = OPTIMIZERS["adamw"](model)
    losses_of(model, optimizer, schedule=Schedule(steps=2))
    before, random = state(model), torch.get_rng_state()
    optimizer_before = {i: dict(of) for i, of in optimizer.state_dict()["state"].items()}
    with pytest.raises(ValueError) as caught:
        load_checkpoint(path, model, optimizer)
    assert str(caught.value).startswith(f"checkpoint {path}: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) > len(f"checkpoint {path}: ")
    assert equal(state(model), before) and torch.equal(torch.get_rng_state(), random)
    for index, expected in optimizer_before.items():
        assert equal(optimizer.state_dict()["state"][index], expected)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("one weight too many", "new: torch.float32 [3], expected nothing"),
        (
            "a weight of another shape",
            "0.up.weight: torch.float32 [16, 9], expected torch.float32 [16, 8]",
        ),
        ("SGD's", "optimizer SGD of [3] parameters, expected AdamW of [3] parameters"),
        ("rewritings of what is not rewritten", "0.down: input [1], expected 'as it is'"),
        ("a random state too short", "damaged: random state"),
        ("no metadata", "cannot be loaded: 'step'"),
    ],
)
def test_what_a_foreign_checkpoint_is_told(tmp_path: Path, kind: str, message: str) -> None:
    path = saved(tmp_path / "c.safetensors")
    FOREIGN[kind](path)
    model = made("delayed")
    with pytest.raises(ValueError) as caught:
        load_checkpoint(path, model, OPTIMIZERS["adamw"](model))
    assert str(caught.value) == f"checkpoint {path}: {message}"


def test_what_a_clipper_keeps_is_of_so_many_tensors(tmp_path: Path) -> None:
    def clipped() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = made()
        return model, AdaGC(warm_up=2).apply(OPTIMIZERS["adamw"](model))

    path, (model, optimizer) = tmp_path / "c.safetensors", clipped()
    losses_of(model, optimizer, schedule=Schedule(steps=3))
    kept = optimizer.param_groups[0]["adagc"]["gamma"]
    assert len(kept) == 3
    for other in ({"0": kept["0"]}, kept | {"3": 1.0}, list(kept.values())):
        state = {"step": 3, "gamma": other}
        save_checkpoint(path, model, optimizer, 3)
        with_metadata(optimizer_groups=json.dumps([{"adagc": state}]))(path)
        with pytest.raises(ValueError, match="optimizer groups, expected the state of"):
            load_checkpoint(path, *clipped())


REWRITINGS: dict[str, Any] = {
    "none": None,
    "balanced": SmoothSwiGLU(),
    "balanced, delayed": SmoothSwiGLU(timing="delayed"),
    "balanced by up, delayed": SmoothSwiGLU(timing="delayed", branch="linear"),
    "balanced by token": SmoothSwiGLU.reference_code(),
    "turned": HadamardProduct(block=4),
    "patched": HotChannelPatch(channels=2, timing="persistent"),
}


PAIRS = [(one, one) for one in REWRITINGS] + [
    *[("none", one) for one in REWRITINGS if one != "none"],
    *[(one, "none") for one in REWRITINGS if one != "none"],
    ("balanced, delayed", "balanced by up, delayed"),
    ("balanced, delayed", "patched"),
    ("turned", "balanced by token"),
]


@pytest.mark.parametrize(("before", "now"), PAIRS)
def test_the_history_of_another_rewriting_is_of_another_tensor(
    tmp_path: Path, before: str, now: str
) -> None:
    def rewritten(how: str) -> tuple[nn.Module, torch.optim.Optimizer]:
        recipe = DelayedScaling(amax_history_len=3, fp8_format=Format.HYBRID_E5M2_COPIES)
        model = convert(nn.Sequential(GatedFeedForward(8, 16)), recipe)
        if REWRITINGS[how] is not None:
            REWRITINGS[how].apply(model)
        return model, OPTIMIZERS["sgd"](model)

    model, optimizer = rewritten(before)
    losses_of(model, optimizer, schedule=Schedule(steps=3))
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, model, optimizer, 3)
    old, (other, fresh) = state(model), rewritten(now)
    born = state(other)
    if before == now:
        load_checkpoint(path, other, fresh)
        assert equal(state(other), old)
    else:
        with pytest.raises(ValueError, match=r"0\.down: input '.*', expected '.*'$"):
            load_checkpoint(path, other, fresh)
        assert equal(state(other), born)
    load_checkpoint(path, other, fresh, other_precision=True)
    found = state(other)
    if before == now:
        assert equal(found, old)
        return
    assert found.keys() == born.keys()
    for name, value in found.items():
        if name in ("0.down.amax_history", "0.down.scale"):
            columns = [0, 3] if name.endswith("scale") else [0]
            others = [index for index in range(value.shape[-1]) if index not in columns]
            assert torch.equal(value[..., columns], born[name][..., columns]), name
            assert torch.equal(value[..., others], old[name][..., others]), name
        else:  # the rewriting's own, of which the file has nothing that is of this one
            is_own = name.startswith("0.down.") and name != "0.down.weight"
            assert torch.equal(value, (born if is_own else old)[name]), name


def test_other_parameter_groups_are_another_optimizer(tmp_path: Path) -> None:
    path = saved(tmp_path / "c.safetensors")
    model = made("delayed")
    first, *others = model.parameters()
    optimizer = torch.optim.AdamW([{"params": [first]}, {"params": others}])
    with pytest.raises(ValueError, match=r"AdamW of \[3\] parameters, expected AdamW of \[1, 2\]"):
        load_checkpoint(path, model, optimizer)


def test_next_byte_is_the_loss_on_windows_of_a_text(tmp_path: Path) -> None:
    file = tmp_path / "text.py"
    file.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    model = LanguageModel(ModelConfig(dim=8, layers=1, heads=2, context=16), 0)
    task, text = NextByte(str(file), 3, batch=4, context=16), read_text(file, context=16)
    shape = {"seed": 3, "batch": 4, "context": 16}
    assert task.origin() == {"text": text.source, "text_sha256": text.sha256}
    assert task.loss(model, 5) == (model.loss(text.batch(5, **shape)), {})
    held_out = [text.batch(index, **shape, split="held_out") for index in range(3)]
    assert torch.equal(task.held_out(2), held_out[2])
    assert task.held_out_loss(model, 3) == sum(model.loss(t).item() for t in held_out) / 3
