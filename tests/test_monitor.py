"""Watching changes no bit of the training, leaves nothing behind, and never ends it.

The same training runs twice, watched and not, and everything that it leaves is equal: losses,
parameters, optimizer state, FP8 histories and scales, the random state. Then what `watch` does
around the training: hooks, run.json, errors before anything exists, a full disk. What the rows say
is in test_probes.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fp8lab
from fp8lab.ffn import GatedFeedForward
from fp8lab.lab.model import Block, LanguageModel, ModelConfig
from fp8lab.monitor import Watch, watch
from fp8lab.plan import Plan
from fp8lab.recipe import Accumulation, DelayedScaling, Float8CurrentScaling
from fp8lab.record import TABLES
from fp8lab.store import RunError, RunWriter, open_run

CONFIG = ModelConfig(dim=16, layers=1, heads=2, context=8)
DELAYED = DelayedScaling(amax_history_len=4)
PARTLY = Plan(recipe=DELAYED, exclude=("head",), overrides={"*.down:input": Float8CurrentScaling()})


def plain() -> LanguageModel:
    return LanguageModel(CONFIG, seed=0)


def dropping() -> LanguageModel:
    model = plain()
    for layer in model.layers:
        layer.mlp.dropout = 0.3
    return model


class Checkpointed(LanguageModel):
    """Every block is repeated in the backward pass; `reentrant` says by which of torch's kinds."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__(CONFIG, seed=0)
        for layer in self.layers:
            self._wrap(layer, reentrant)

    def _wrap(self, layer: Block, reentrant: bool) -> None:
        forward = layer.forward
        layer.forward = lambda *args: checkpoint(forward, *args, use_reentrant=reentrant)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "FP32": plain,
    "FP32, dropout": dropping,
    "BF16": lambda: plain().bfloat16(),
    "delayed": lambda: fp8lab.convert(plain(), DELAYED),
    "delayed, dropout": lambda: fp8lab.convert(dropping(), DELAYED),
    "current": lambda: fp8lab.convert(plain(), Float8CurrentScaling()),
    "BF16, delayed and current": lambda: fp8lab.convert(plain().bfloat16(), PARTLY),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
}


def tokens_of(step: int) -> Tensor:
    return torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(step))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    watching: Watch | None = None,
    loss_of: Callable[[nn.Module, int], Tensor] | None = None,
) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step) if loss_of else model.loss(tokens_of(step))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if watching is not None:
            watching.step(step, loss=loss)
    return losses


def left_by(
    model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]
) -> dict[str, Any]:
    left: dict[str, Any] = {f"loss {step}": torch.tensor(loss) for step, loss in enumerate(losses)}
    left |= {name: p.detach().clone() for name, p in model.named_parameters()}
    left |= {f"grad {name}": p.grad.clone() for name, p in model.named_parameters()}
    left |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            left[f"optimizer {index} {name}"] = torch.as_tensor(value).clone()
    left["random"] = torch.random.get_rng_state()
    return left


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@cache
def unwatched(name: str, optimizer_name: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model = MODELS[name]()
    optimizer = OPTIMIZERS[optimizer_name](model)
    return left_by(model, optimizer, train(model, optimizer, range(20)))


# --- not one bit ------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_watching_changes_no_bit(
    name: str, optimizer_name: str, every: int, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model = MODELS[name]()
    optimizer = OPTIMIZERS[optimizer_name](model)
    with watch(model, tmp_path / "run", optimizer=optimizer, every=every) as watching:
        losses = train(model, optimizer, range(20), watching)
    assert_equal(left_by(model, optimizer, losses), unwatched(name, optimizer_name))
    run = open_run(tmp_path / "run")
    assert run.steps()["loss"].tolist() == losses
    assert len(run.tensors()) == sum(4 if step % every == 0 else 1 for step in range(20))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("converted", [False, True])
def test_watching_changes_no_bit_of_a_checkpointed_model(
    converted: bool, reentrant: bool, tmp_path: Path
) -> None:
    left = []
    for path in (None, tmp_path / "run"):
        model = Checkpointed(reentrant)
        if converted:
            fp8lab.convert(model, DELAYED)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if path is None:
            losses = train(model, optimizer, range(6))
        else:
            with watch(model, path, optimizer=optimizer, every=2) as watching:
                losses = train(model, optimizer, range(6), watching)
        left.append(left_by(model, optimizer, losses))
    assert_equal(*left)


def test_what_is_compared_can_differ() -> None:
    torch.manual_seed(1)
    model = MODELS["delayed"]()
    optimizer = OPTIMIZERS["AdamW"](model)
    losses = train(model, optimizer, range(20))
    with torch.no_grad():
        model(tokens_of(0)[:, :-1])  # evaluation: nothing moves
    assert_equal(left_by(model, optimizer, losses), unwatched("delayed", "AdamW"))
    model.loss(tokens_of(20))
    with pytest.raises(AssertionError, match=r"amax_history|scale"):
        assert_equal(left_by(model, optimizer, losses), unwatched("delayed", "AdamW"))


# --- nothing left behind ----------------------------------------------------------------------


def hooks_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    """How many hooks of each kind every module and the optimizer have."""
    owners = [(module, name) for module in model.modules() for name in vars(module)]
    owners += [(optimizer, name) for name in vars(optimizer)]
    return [len(getattr(owner, name) or ()) for owner, name in owners if "hook" in name]


ENDS: dict[str, tuple[BaseException | None, str]] = {
    "normally": (None, "finished"),
    "with an error": (RuntimeError("first line\nsecond line"), "failed"),
    "by hand": (KeyboardInterrupt(), "interrupted"),
}


@pytest.mark.parametrize("end", ENDS)
def test_hooks_are_gone_and_rows_are_there_however_it_ends(end: str, tmp_path: Path) -> None:
    error, state = ENDS[end]
    model = fp8lab.convert(plain(), DELAYED)
    optimizer = torch.optim.AdamW(model.parameters())
    before = hooks_of(model, optimizer)
    try:
        with watch(model, tmp_path / "run", optimizer=optimizer, every=2) as watching:
            assert sum(hooks_of(model, optimizer)) > sum(before)
            assert open_run(tmp_path / "run").state == "running"
            train(model, optimizer, range(5), watching)
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt) as caught:
        assert caught is error
    assert hooks_of(model, optimizer) == before
    run = open_run(tmp_path / "run")
    assert run.state == state
    told = None
    if state == "failed":
        assert error is not None and error.__traceback__ is not None
        told = f"RuntimeError: first line (test_monitor.py:{error.__traceback__.tb_lineno})"
    assert run.info.get("error") == told
    assert run.steps()["step"].tolist() == list(range(5))
    train(model, optimizer, range(5, 7))
    assert len(open_run(tmp_path / "run").steps()) == 5


def test_a_forward_that_raises_leaves_no_hook_and_no_torn_row(tmp_path: Path) -> None:
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = hooks_of(model, optimizer)
    with (
        pytest.raises(ValueError, match="expected int64 tokens"),
        watch(model, tmp_path / "run", optimizer=optimizer, every=1) as watching,
    ):
        train(model, optimizer, range(2), watching)
        model(torch.zeros(2, 8))
    assert hooks_of(model, optimizer) == before
    assert open_run(tmp_path / "run").tensors()["step"].unique().tolist() == [0, 1]


# --- run.json and events ----------------------------------------------------------------------


def test_from_a_source_tree_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("fp8lab.monitor.about.version", version)
    with watch(plain(), tmp_path / "run"):
        pass
    said = open_run(tmp_path / "run").info["versions"]["fp8lab"]
    assert said == "not installed, run from its source"


def test_run_json_says_what_ran(tmp_path: Path) -> None:
    model = fp8lab.convert(plain(), PARTLY)
    with watch(model, tmp_path / "run", every=3, config={"lr": 0.1}) as watching:
        watching.set_result(diverged=None)
    info = open_run(tmp_path / "run").info
    assert (info["every"], info["config"], info["result"]) == (3, {"lr": 0.1}, {"diverged": None})
    assert info["versions"]["torch"] == torch.__version__
    assert info["precision"]["layers.0.mlp.down"] == {
        "input@output": "E4M3 Float8CurrentScaling",
        "weight@output": "E4M3 DelayedScaling",
        "grad_output@grad_input": "E5M2 DelayedScaling",
        "weight@grad_input": "E4M3 DelayedScaling",
        "grad_output@grad_weight": "E5M2 DelayedScaling",
        "input@grad_weight": "E4M3 Float8CurrentScaling",
    }
    assert "head" not in info["precision"]
    assert info["sites"][0] == {
        "site": "layers.0.mlp",
        "gate": "gate.weight",
        "up": "up.weight",
        "down": "down.weight",
        "activation": "silu",
        "up_activation": "identity",
        "channels": CONFIG.feed_forward_hidden,
        "product": "seen",
    }


@pytest.mark.parametrize("precision", ["bf16-mixed", nn.Identity()])
def test_a_module_with_an_attribute_named_precision_is_none_of_ours(
    precision: Any, tmp_path: Path
) -> None:
    model = plain()
    model.precision = precision
    with watch(model, tmp_path / "run"):
        pass
    assert open_run(tmp_path / "run").info["precision"] == {}


def test_step_rows_hold_loss_time_and_metrics(tmp_path: Path) -> None:
    with watch(plain(), tmp_path / "run") as watching:
        assert watching.path == tmp_path / "run"
        watching.step(0, loss=torch.tensor(1.5, dtype=torch.bfloat16), tokens=16)
        time.sleep(0.01)
        watching.step(1, loss=0.25)
        watching.step(2, accuracy=0.5)
    steps = open_run(tmp_path / "run").steps()
    assert steps["loss"].tolist()[:2] == [1.5, 0.25]
    assert steps["seconds"][1] >= 0.01
    missing = {"loss": [2], "seconds": [0], "tokens": [1, 2], "accuracy": [0, 1]}
    for of_the_optimizer in ("learning_rate", "grad_norm", "update_ratio", "rms_t"):
        missing[of_the_optimizer] = [0, 1, 2]
    for name, steps_without in missing.items():
        assert steps.index[steps[name].isna()].tolist() == steps_without, name


@pytest.mark.parametrize("name", ["grad_norm", "seconds", "rank"])
def test_a_metric_named_like_a_column_is_refused(name: str, tmp_path: Path) -> None:
    with watch(plain(), tmp_path / "run") as watching:
        with pytest.raises(ValueError, match=f"^watch.step: {name} is a column of its own"):
            watching.step(0, loss=1.0, **{name: 1.0})
        watching.step(0, loss=1.0)
    assert len(open_run(tmp_path / "run").steps()) == 1


@pytest.mark.parametrize(
    ("step", "loss", "reason"),
    [(0.5, 1.0, "step 0.5, expected an int"), (True, 1.0, "step True"), (0, [1.0, 2.0], "loss")],
)
def test_what_is_no_step_is_refused_before_it_spoils_rows(
    step: Any, loss: Any, reason: str, tmp_path: Path
) -> None:
    with watch(plain(), tmp_path / "run") as watching:
        with pytest.raises(ValueError, match=f"^watch.step: {reason}"):
            watching.step(step, loss=torch.tensor(loss))
        watching.step(0, loss=1.0)
    assert open_run(tmp_path / "run").steps()["step"].tolist() == [0]


def events(path: Path) -> list[tuple[int, str, str | None]]:
    frame = open_run(path).events()
    sites = [None if pd.isna(site) else str(site) for site in frame["site"]]
    return list(zip(frame["step"].tolist(), frame["kind"].tolist(), sites, strict=True))


def test_nan_in_the_first_batch_is_an_event_and_no_exception(tmp_path: Path) -> None:
    model = fp8lab.convert(GatedFeedForward(16, 24), DELAYED)
    with watch(model, tmp_path / "run", every=1) as watching:
        for step, bad in enumerate([True, True, False, True]):
            x = torch.full((3, 16), torch.nan) if bad else torch.ones(3, 16)
            loss = model(x).sum()
            loss.backward()
            watching.step(step, loss=loss)
    assert events(tmp_path / "run") == [
        (0, "nonfinite_product", ".:product"),
        (0, "nonfinite_loss", None),
        (3, "nonfinite_product", ".:product"),
        (3, "nonfinite_loss", None),
    ]
    assert watching.alarms == 3
    tensors = open_run(tmp_path / "run").tensors()
    product = tensors[tensors["site"] == ".:product"]
    assert product["nans"].tolist() == [72, 72, 0, 72]
    assert product["cur_amax"].isna().tolist() == [True, True, False, True]


def test_an_event_is_on_disk_at_once(tmp_path: Path) -> None:
    with watch(plain(), tmp_path / "run", flush_seconds=1e9) as watching:
        watching.step(0, loss=1.0)
        assert len(open_run(tmp_path / "run").steps()) == 0
        watching.event(0, "diverged", "loss is 9")
        assert events(tmp_path / "run") == [(0, "diverged", None)]
        assert len(open_run(tmp_path / "run").steps()) == 1


# --- loud before anything exists --------------------------------------------------------------


def test_a_model_without_a_feed_forward_is_refused_before_anything_exists(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no gated feed-forward"):
        watch(nn.Linear(16, 24), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "error", "reason"),
    [
        ({"every": 0}, ValueError, "watch: every=0, expected an integer of at least 1"),
        ({"channels": 0}, ValueError, "watch: channels=0, expected an integer of at least 1"),
        ({"config": {"a": {1}}}, TypeError, "set is not JSON serializable"),
        ({"resume_at": 3}, RunError, "no run here"),
        ({"resume_at": "3"}, ValueError, "watch: resume_at='3', expected an integer of at least 0"),
        ({"select": "product"}, ValueError, "select: product: cannot be read: No such file"),
        ({"select": {"tensors": "product"}}, ValueError, "tensors: 'product', expected a section"),
        ({"group": "WORLD"}, TypeError, "group='WORLD', expected a process group"),
        ({"optimizer": nn.Linear(2, 2)}, TypeError, "optimizer: Linear, expected a torch optim"),
        (
            {"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)},
            ValueError,
            "^watch: optimizer: none of its 2 parameters is one of the model's, expected the opt",
        ),
    ],
)
def test_wrong_settings_are_refused_before_anything_exists(
    settings: dict[str, Any], error: type[Exception], reason: str, tmp_path: Path
) -> None:
    model = plain()
    with pytest.raises(error, match=reason):
        watch(model, tmp_path / "run", **settings)
    assert list(tmp_path.iterdir()) == []
    assert not any(module._forward_hooks for module in model.modules())


def test_an_optimizer_may_share_some_parameters_or_hold_copies_in_higher_precision(
    paths: Iterator[Path],
) -> None:
    """As of a GAN, where two share one model, and as mixed precision keeps its parameters."""
    model = plain()
    both = [*list(model.parameters())[:1], *nn.Linear(2, 2).parameters()]
    copies = [one.detach().clone() for one in model.parameters()]
    for held, watched in ((both, model), (copies, plain().bfloat16())):
        optimizer = torch.optim.SGD(held, lr=0.1)
        for one in held:
            one.grad = torch.ones_like(one)
        with watch(watched, path := next(paths), optimizer=optimizer) as watching:
            watched(torch.zeros(1, 8, dtype=torch.long))
            optimizer.step()
            watching.step(0)
        squares = sum(one.numel() for one in held)
        assert open_run(path).steps()["grad_norm"].tolist() == [pytest.approx(squares**0.5)]


def test_an_optimizer_may_hold_flat_copies_or_nothing_yet(paths: Iterator[Path]) -> None:
    """As ZeRO keeps them, in float32 too, and of layers that are trained later."""
    model = plain()
    flat = nn.Parameter(torch.cat([one.detach().flatten() for one in model.parameters()]))
    for held in ([flat], [{"params": []}]):
        with watch(model, next(paths), optimizer=torch.optim.SGD(held, lr=0.1)):
            pass


def test_an_existing_directory_is_refused_and_not_touched(tmp_path: Path) -> None:
    model = plain()
    with watch(model, tmp_path / "run") as watching:
        watching.step(0, loss=1.0)
    before = [(path, path.stat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))]
    with pytest.raises(RunError, match="exists already"):
        watch(model, tmp_path / "run")
    assert [(path, path.stat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))] == before
    assert not any(module._forward_hooks for module in model.modules())


# --- a full disk ------------------------------------------------------------------------------


def test_a_full_disk_warns_once_and_its_rows_are_written_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    writing, attempts = RunWriter._write_segment, itertools.count()

    def full_for_a_while(self: RunWriter, *rows: Any) -> None:
        if next(attempts) < 3:
            raise OSError(28, "No space left on device")
        writing(self, *rows)

    monkeypatch.setattr(RunWriter, "_write_segment", full_for_a_while)
    with watch(model, tmp_path / "run", optimizer=optimizer, flush_seconds=0.0) as watching:
        with pytest.warns(UserWarning, match=r"run: rows cannot be written: .*No space") as seen:
            train(model, optimizer, range(3), watching)
        assert len(seen) == 1
        assert len(open_run(tmp_path / "run").steps()) == 0
        train(model, optimizer, range(3, 5), watching)
        watching.event(4, "looked at")  # waits for what is being written
        assert open_run(tmp_path / "run").steps()["step"].tolist() == list(range(5))
    assert open_run(tmp_path / "run").steps()["step"].tolist() == list(range(5))
    assert len(open_run(tmp_path / "run").tensors()) == 4 + 4


# --- resume, and the schema -------------------------------------------------------------------


def test_a_resumed_run_equals_one_that_went_through(tmp_path: Path) -> None:
    def run(path: Path, *parts: tuple[int | None, range]) -> pd.DataFrame:
        model = plain()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for resume_at, steps in parts:
            with watch(model, path, optimizer=optimizer, every=3, resume_at=resume_at) as watching:
                train(model, optimizer, steps, watching)
        rows = open_run(path)
        assert rows.steps()["step"].tolist() == list(range(8))
        # What was hot is forgotten when a process ends.
        return rows.tensors().drop(columns="persistence")

    whole = run(tmp_path / "whole", (None, range(8)))
    parts = run(tmp_path / "parts", (None, range(4)), (4, range(4, 8)))
    pd.testing.assert_frame_equal(whole, parts, check_exact=True)


def test_every_key_of_every_row_is_a_column(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    appending = RunWriter.append
    met: dict[str, set[str]] = {table: set() for table in TABLES}

    def noting(self: RunWriter, table: Any, rows: Any) -> None:
        rows = list(rows)
        met[table] = met[table].union(*rows)
        appending(self, table, rows)

    monkeypatch.setattr(RunWriter, "append", noting)
    model = fp8lab.convert(plain(), DELAYED, accumulation=Accumulation())
    optimizer = torch.optim.AdamW(model.parameters())
    select = fp8lab.Selection(tensors=("product", "input"), statistics=("mxfp8_mse",))
    with watch(model, tmp_path / "run", optimizer=optimizer, every=1, select=select) as watching:
        train(model, optimizer, range(3), watching)
        watching.event(2, "diverged")
    for table, schema in TABLES.items():
        assert met[table] == set(schema.names), table


@pytest.mark.parametrize(
    ("argument", "said"),
    [("/a/b/run", "run"), ("--out=/a/b/run", "--out=run"), ("--seeds=0,1", "--seeds=0,1")],
)
def test_no_argument_says_where_a_file_lies(
    argument: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/train", argument])
    with fp8lab.watch(nn.Sequential(fp8lab.GatedFeedForward(8, 16)), tmp_path / "run"):
        pass
    assert fp8lab.open_run(tmp_path / "run").info["command"] == f"train {said}"
