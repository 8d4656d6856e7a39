"""Lightning's Trainer, watched: `Trainer(callbacks=[WatchCallback("runs/mine")])`.

A step is a batch after which `trainer.global_step` has moved. Steps are numbered as Lightning
numbers them: from 0, and after `ckpt_path=` on from the checkpoint's, in the same run directory. A
checkpoint is an event of the run and flushes it, so that the rows before it are never missing. The
step's loss is the mean of what `training_step` returned. An exception closes the run as failed,
Ctrl+C as interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        f"fp8lab.integrations.lightning: {error}: pip install 'fp8lab[lightning]'"
    ) from None

from fp8lab.monitor import Watch, watch


class WatchCallback(Callback):
    """Records the training into the run directory `path`; `options` are those of `fp8lab.watch`.

    With several optimizers none is watched: learning rate, gradient norm and what else is read
    there is missing. Raises TypeError for an unknown option. When the training begins: what `watch`
    raises, so RunError if `path` exists and the training does not resume, ValueError if the model
    has no feed-forward to watch.
    """

    def __init__(self, path: str | Path, **options: Any) -> None:
        signature(watch).bind(nn.Module(), path, optimizer=None, resume_at=None, **options)
        self._path = Path(path)
        self._options = options
        # Asked here and not when the training begins, when another rank may have made it already.
        self._exists = self._path.exists()
        self._watch: Watch | None = None
        self._steps = 0
        self._losses: list[Tensor] = []
        self._open = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the run directory."""
        optimizer = trainer.optimizers[0] if len(trainer.optimizers) == 1 else None
        self._steps = trainer.global_step
        resume_at = self._steps if self._steps > 0 and self._exists else None
        with ExitStack() as opening:
            watching = watch(
                pl_module, self._path, optimizer=optimizer, resume_at=resume_at, **self._options
            )
            self._watch = opening.enter_context(watching)
            self._open = opening.pop_all()
        self._exists = True
        self._losses = []

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """If the optimizer has stepped, write the step's rows."""
        if self._watch is None:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses.append(loss.detach().float().reshape(()))
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        self._watch.step(self._steps - 1, loss=self._step_loss(trainer, pl_module))

    def _step_loss(self, trainer: Trainer, pl_module: LightningModule) -> Tensor | None:
        losses, self._losses = self._losses, []
        if pl_module.automatic_optimization and losses:
            # Lightning has divided each by the number of micro-batches of a full step. The last
            # step of an epoch may have fewer, and its loss is not smaller for that.
            return torch.stack(losses).sum() * (trainer.accumulate_grad_batches / len(losses))
        # Who optimizes by hand divides, or does not, as he likes: of several there is no mean.
        return losses[0] if len(losses) == 1 else None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A checkpoint: an event, and a flush."""
        if self._watch is not None and self._steps > 0:
            self._watch.event(self._steps - 1, "checkpoint", f"global_step {self._steps}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the run as finished."""
        self._close(None)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Close the run as failed, or interrupted."""
        self._close(exception)

    def _close(self, error: BaseException | None) -> None:
        self._watch = None
        if error is None:
            self._open.close()
        else:
            self._open.__exit__(type(error), error, error.__traceback__)
