"""Hugging Face's Trainer, watched: `Trainer(..., callbacks=[WatchCallback("runs/mine")])`.

Steps are the trainer's optimizer steps, counted from 0: what its logs call step 1 is row 0, and
training that goes on from `checkpoint-500` goes on with row 500 of the same run directory.
A checkpoint is an event of the run and flushes it, so that the rows before it are never missing.

The step's loss is what the model returned, summed or averaged over the micro-batches as Trainer
does; it stays on its device until `watch` fetches the step. Where the loss is not the model's
(label smoothing, `compute_loss_func`) it is missing. Rejected: the loss that `on_log` is given. It
comes after the step's end, and is a mean over `logging_steps` steps. `grad_norm` is read at the
optimizer's step, so after Trainer's clipping; what Trainer logs is the norm before it.

Trainer tells its callbacks nothing of an exception that ends it. When the process ends of it the
run is closed as failed or interrupted; a process that catches it and lives on should write
`with WatchCallback(...) as callback:`, which closes at once and leaves no hook behind.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from inspect import signature
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        f"fp8lab.integrations.transformers: {error}: pip install 'fp8lab[hf]'"
    ) from None

from fp8lab.monitor import Watch, watch


class WatchCallback(TrainerCallback):
    """Records the training into the run directory `path`; `options` are those of `fp8lab.watch`.

    Raises TypeError for an unknown option. When the training begins: what `watch` raises, so
    RunError if `path` exists and the training does not resume, ValueError if the model has no
    feed-forward to watch or runs in nn.DataParallel.
    """

    def __init__(self, path: str | Path, **options: Any) -> None:
        for name in {"optimizer", "resume_at"} & options.keys():
            told = "known from the Trainer: a new folder, or resume_from_checkpoint"
            raise TypeError(f"WatchCallback: {name}: {told}")
        signature(watch).bind(nn.Module(), path, **options)
        self._path = Path(path)
        self._options = options
        # Asked here and not when the training begins, when another rank may have made it already.
        self._exists = self._path.exists()
        self._watch: Watch | None = None
        self._losses = _Losses(1)
        self._open = ExitStack()
        weakref.finalize(self, _close_left_open, self._open, os.getpid())

    def __enter__(self) -> WatchCallback:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._watch = None
        self._open.__exit__(kind, error, trace)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Open the run directory; hooks go onto the model itself and the optimizer itself."""
        if args.n_gpu > 1:
            raise ValueError(
                f"WatchCallback: nn.DataParallel over {args.n_gpu} GPUs, expected a process for "
                "each: start the script with torchrun"
            )
        # A batch size that did not fit is retried inside the same `train`: the run begins anew.
        goes_on = state.global_step > 0 or (args.auto_find_batch_size and self._watch is not None)
        _close(self._open, RuntimeError("the training began anew"))
        watching = watch(
            kwargs["model"],
            self._path,
            optimizer=_stepped(kwargs["optimizer"]),
            resume_at=state.global_step if goes_on and self._exists else None,
            **self._options,
        )
        self._watch = self._open.enter_context(watching)
        self._exists = True
        # Tokens are counted over all processes, those of one tensor-parallel group once.
        tensor_parallel = getattr(kwargs["model"], "tp_size", None) or 1
        shares = args.world_size // tensor_parallel if args.average_tokens_across_devices else 1
        self._losses = _Losses(shares)
        hook = kwargs["model"].register_forward_hook(self._losses.returned, with_kwargs=True)
        self._open.callback(hook.remove)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """The optimizer has stepped: write the step's rows."""
        if self._watch is not None:
            self._watch.step(state.global_step - 1, loss=self._losses.take())

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """A checkpoint: an event, and a flush."""
        if self._watch is not None and state.global_step > 0:
            self._watch.event(
                state.global_step - 1, "checkpoint", f"checkpoint-{state.global_step}"
            )

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Close the run as finished."""
        self.__exit__(None, None, None)


def _stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Accelerate's wrapper is an Optimizer that has no hooks: it steps the one inside."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


class _Losses:
    """The losses that the model returned in this step, one a micro-batch, on their device."""

    def __init__(self, shares: int) -> None:
        self._losses: list[Tensor] = []
        self._summed = False
        self._shares = shares

    def returned(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook. An evaluation, which runs without gradients, does not count."""
        if not torch.is_grad_enabled():
            return
        parts = output if isinstance(output, tuple | list) else (None,)
        loss = output.get("loss") if isinstance(output, Mapping) else next(iter(parts), None)
        if isinstance(loss, Tensor) and loss.numel() == 1:
            # A copy, for Trainer scales the loss in place, though not always this very tensor.
            self._losses.append(loss.detach().clone())
            self._summed = kwargs.get("num_items_in_batch") is not None

    def take(self) -> Tensor | None:
        """The step's loss as Trainer adds it up: losses of tokens that were divided by the number
        of all the step's tokens, in all `shares`, are summed and scaled up; others averaged."""
        losses, self._losses = self._losses, []
        if not losses:
            return None
        parts = [loss * self._shares if self._summed else loss / len(losses) for loss in losses]
        return torch.as_tensor(sum(part.float().reshape(()) for part in parts))


def _close(opened: ExitStack, error: BaseException) -> None:
    opened.__exit__(type(error), error, error.__traceback__)


def _close_left_open(opened: ExitStack, pid: int) -> None:
    """When the callback is gone or the process ends: only then is an exception known, by what
    Python keeps of the one that nobody caught. A forked child must not close its parent's run."""
    if os.getpid() == pid:
        reason = SystemExit("the process ended before the training did")
        _close(opened, getattr(sys, "last_value", None) or reason)
