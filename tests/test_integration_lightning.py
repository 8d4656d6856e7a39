"""Lightning's own Trainer trains a tiny language model, watched by one line.

The oracles are what the module itself sees: its losses, the norm of its gradients after clipping,
and the same training unwatched. Every test trains for real, with gradient accumulation, and with
validation in the middle of an epoch.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

import fp8lab
from fp8lab.integrations.lightning import WatchCallback
from fp8lab.lab.model import LanguageModel, ModelConfig
from fp8lab.store import RunError

CONFIG = ModelConfig(dim=16, layers=2, heads=2, context=8)
ACCUMULATED, BATCH = 3, 2
SITE = "model.layers.1.mlp:product"

pytestmark = [
    # Lightning asks torch in a way that torch is about to give up.
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
    # About the test's loader: not enough workers for this machine, a checkpoint amid an epoch.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]


class Module(LightningModule):
    """Keeps, of every optimizer step, what it saw itself."""

    def __init__(self, optimizer: str = "AdamW") -> None:
        super().__init__()
        self.model = LanguageModel(CONFIG, seed=0)
        for layer in self.model.layers:
            layer.mlp.dropout = 0.2
        self.optimizer = optimizer
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.validated = 0

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)

    def loss(self, batch: Tensor) -> Tensor:
        logits = self(batch[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.loss(batch)
        self.validated += 1

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(*args, **kwargs)
        gradients = [p.grad.double().flatten() for p in self.parameters()]
        self.norms.append(torch.linalg.vector_norm(torch.cat(gradients)).item())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "LBFGS":
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)
        return getattr(torch.optim, self.optimizer)(self.parameters(), lr=1e-2)


class ByHand(Module):
    """Optimizes by hand, every second batch."""

    def __init__(self, every: int, optimizers: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.every = every
        self.count = optimizers

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        if (batch_idx + 1) % self.every == 0:
            optimizers = self.optimizers()
            for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                optimizer.step()
            self.zero_grad()
        return loss

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        parameters = list(self.parameters())
        return [torch.optim.SGD(parameters[i :: self.count], lr=0.1) for i in range(self.count)]


class Stop(Callback):
    """Raises when a step begins."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error


def loader(count: int = 40) -> DataLoader:
    data = torch.randint(0, 256, (count, 9), generator=torch.Generator().manual_seed(0))
    return DataLoader(data, batch_size=BATCH)


def fit(
    module: Module, *callbacks: Callback, ckpt_path: Path | None = None, **options: Any
) -> Trainer:
    arguments: dict[str, Any] = {
        "max_steps": 8,
        "accumulate_grad_batches": ACCUMULATED,
        "val_check_interval": 7,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    torch.manual_seed(1)
    trainer = Trainer(callbacks=list(callbacks), **(arguments | options))
    trainer.fit(module, loader(), loader(4), ckpt_path=ckpt_path)
    return trainer


def by_step(values: list[float]) -> list[float]:
    """Means over the micro-batches of each step: twenty an epoch, so the seventh has two."""
    sizes = [ACCUMULATED] * 6 + [2] + [ACCUMULATED]
    numbers = iter(values)
    return [sum(next(numbers) for _ in range(size)) / size for size in sizes]


def hooks_of(module: Module, optimizers: list[torch.optim.Optimizer]) -> list[Any]:
    owners = [(m, name) for m in module.modules() for name in ("_forward_hooks", "_backward_hooks")]
    owners += [(m, "_forward_pre_hooks") for m in module.modules()]
    owners += [(o, "_optimizer_step_pre_hooks") for o in optimizers]
    owners += [(o, "_optimizer_step_post_hooks") for o in optimizers]
    return [hook for owner, name in owners for hook in getattr(owner, name).values()]


class Keep(Callback):
    """Keeps the optimizers, which Lightning forgets when it is done."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.optimizers = trainer.optimizers


# --- what is recorded ---------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["AdamW", "LBFGS"])
def test_watching_changes_no_bit_of_the_training(optimizer: str, tmp_path: Path) -> None:
    clip = {} if optimizer == "LBFGS" else {"gradient_clip_val": 0.5}
    watched, plain, keep = Module(optimizer), Module(optimizer), Keep()
    fit(watched, WatchCallback(tmp_path / "run", every=3), keep, max_steps=20, **clip)
    state = torch.random.get_rng_state()
    fit(plain, max_steps=20, **clip)
    assert torch.equal(state, torch.random.get_rng_state())
    assert watched.losses == plain.losses
    assert watched.validated == plain.validated > 4
    for name, parameter in watched.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name
    assert hooks_of(watched, keep.optimizers) == []


@pytest.mark.parametrize("clip", [None, 0.3])
def test_the_rows_are_those_of_the_training(clip: float | None, tmp_path: Path) -> None:
    module = Module()
    fit(module, WatchCallback(tmp_path / "run", every=2), gradient_clip_val=clip)
    run = fp8lab.open_run(tmp_path / "run")
    steps = run.steps()
    assert run.state == "finished"
    assert steps["step"].tolist() == list(range(8))
    assert steps["loss"].tolist() == pytest.approx(by_step(module.losses), rel=1e-6)
    # Of this step and not of the one before, and after the clipping.
    assert steps["grad_norm"].tolist() == pytest.approx(module.norms, rel=1e-12)
    assert steps["learning_rate"].tolist() == [1e-2] * 8
    product = run.tensors().query("site == @SITE")
    assert product["step"].tolist() == list(range(8))
    hidden = module.model.layers[1].mlp.gate.weight.shape[0]
    # Every micro-batch is counted, once, and no validation; the seventh step has two.
    elements = float(BATCH * 8 * hidden)
    assert product["count"].dropna().tolist() == [elements * n for n in (3, 3, 3, 2)]


def test_without_accumulation_the_loss_is_equal(tmp_path: Path) -> None:
    module = Module("SGD")
    fit(module, WatchCallback(tmp_path / "run"), accumulate_grad_batches=1)
    assert fp8lab.open_run(tmp_path / "run").steps()["loss"].tolist() == module.losses


def test_optimizing_by_hand(tmp_path: Path) -> None:
    one, two, several = ByHand(1), ByHand(2), ByHand(1, optimizers=2)
    for module, name in ((one, "one"), (two, "two"), (several, "several")):
        fit(module, WatchCallback(tmp_path / name), max_steps=4, accumulate_grad_batches=1)
    steps = fp8lab.open_run(tmp_path / "one").steps()
    assert steps["loss"].tolist() == one.losses
    assert steps["grad_norm"].notna().all()
    steps = fp8lab.open_run(tmp_path / "two").steps()
    assert steps["step"].tolist() == [0, 1, 2, 3]
    assert steps["loss"].isna().all()  # of two batches: nobody knows how they were weighted
    steps = fp8lab.open_run(tmp_path / "several").steps()
    assert steps["step"].tolist() == [1, 3]  # Lightning counts both optimizers' steps
    assert steps["grad_norm"].isna().all()


# --- checkpoints and the end --------------------------------------------------------------------


def test_a_resumed_training_goes_on_in_the_same_run(tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 4 and trainer.fit_loop.epoch_loop.batch_idx == 11:
                trainer.save_checkpoint(tmp_path / "checkpoint")

    fit(Module(), WatchCallback(tmp_path / "whole", every=2), max_steps=6)
    with pytest.raises(OSError, match="unplugged"):
        stop = Stop(5, OSError("unplugged"))
        fit(Module(), WatchCallback(tmp_path / "run", every=2), Save(), stop, max_steps=6)
    failed = fp8lab.open_run(tmp_path / "run")
    error, _, place = failed.info["error"].partition(" (")
    assert (failed.state, error) == ("failed", "OSError: unplugged")
    assert place.startswith("test_integration_lightning.py:")
    assert failed.steps()["step"].tolist() == [0, 1, 2, 3, 4]
    assert failed.events()[["step", "kind"]].values.tolist() == [[3, "checkpoint"]]

    resumed = WatchCallback(tmp_path / "run", every=2)
    fit(Module(), resumed, ckpt_path=tmp_path / "checkpoint", max_steps=6)
    run, expected = fp8lab.open_run(tmp_path / "run"), fp8lab.open_run(tmp_path / "whole")
    assert run.state == "finished"
    assert run.steps()["step"].tolist() == list(range(6))
    assert run.tensors()["step"].tolist() == expected.tensors()["step"].tolist()
    before = run.steps().loc[:3, ["loss", "grad_norm"]]
    pd.testing.assert_frame_equal(before, expected.steps().loc[:3, ["loss", "grad_norm"]])


def test_rows_before_a_checkpoint_are_on_disk(tmp_path: Path) -> None:
    on_disk: list[int] = []

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 3 and not on_disk:
                trainer.save_checkpoint(tmp_path / "checkpoint")
                on_disk.extend(fp8lab.open_run(tmp_path / "run").steps()["step"])

    fit(Module(), WatchCallback(tmp_path / "run", flush_seconds=1e9), Save(), max_steps=4)
    assert on_disk == [0, 1, 2]


def test_resuming_what_was_not_watched_begins_a_run(tmp_path: Path) -> None:
    fit(Module(), max_steps=2).save_checkpoint(tmp_path / "checkpoint")
    resumed = WatchCallback(tmp_path / "run")
    fit(Module(), resumed, ckpt_path=tmp_path / "checkpoint", max_steps=4)
    assert fp8lab.open_run(tmp_path / "run").steps()["step"].tolist() == [2, 3]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Lightning ignores Ctrl+C from the first one on."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("error", "raised", "state"),
    [(OSError("x"), OSError, "failed"), (KeyboardInterrupt(), SystemExit, "interrupted")],
)
def test_an_exception_closes_the_run(
    error: BaseException, raised: type[BaseException], state: str, tmp_path: Path
) -> None:
    module, keep = Module(), Keep()
    with pytest.raises(raised):
        fit(module, WatchCallback(tmp_path / "run"), keep, Stop(2, error))
    run = fp8lab.open_run(tmp_path / "run")
    assert run.state == state
    assert run.steps()["step"].tolist() == [0, 1]
    assert hooks_of(module, keep.optimizers) == []


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    callback = WatchCallback(tmp_path / "run")
    fit(Module(), callback, max_steps=2)
    for again in (callback, WatchCallback(tmp_path / "run")):
        module, keep = Module(), Keep()
        with pytest.raises(RunError, match="exists already"):
            fit(module, keep, again, max_steps=2)
        assert module.losses == []
        assert hooks_of(module, keep.optimizers) == []
    assert len(fp8lab.open_run(tmp_path / "run").steps()) == 2


def test_an_unknown_option_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="evry"):
        WatchCallback(tmp_path / "run", evry=3)


def test_without_the_library_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "fp8lab.integrations.lightning")
    with pytest.raises(ImportError, match=r"pip install 'fp8lab\[lightning\]'$"):
        import fp8lab.integrations.lightning  # noqa: F401
