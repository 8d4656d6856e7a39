"""`watch`: hooks that turn a training run into rows and change nothing else.

Every feed-forward's gate, up, product and output, and what selections name besides, are reduced
inside the hook, on their device, to short vectors; nothing is kept of the tensors. `step` brings
the step's vectors to the host in one transfer and writes rows. Every `every`-th step is recorded in
full. At every step a sentinel is kept: the product's amax against the amax that made the scale in
force, because clipping may happen in one step of forty.

Watching changes no bit: hooks return nothing, draw no random numbers, and write to no tensor that
is not their own. Nor does it end a training: what cannot be measured or written is said once, as a
warning and an event, and left out. A forward that an activation checkpoint repeats inside the
backward is not counted again, nor is an evaluation: a forward without gradients.

Code that `torch.compile` made before does not know the hooks. It is dropped when watching starts
and when it ends (`observe`), so that the model compiles anew; each hook then is a break in its
graph, which may change what is fused and so the last bits of a result.

Rejected: keeping tensors until the step ends (memory), and `.item()` in hooks (a host sync each).
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat

import numpy as np
import torch
from torch import Tensor, nn

from fp8lab.agreement import is_of_others, said_of
from fp8lab.casting import Cast
from fp8lab.failure import in_one_line
from fp8lab.monitor.about import describe
from fp8lab.monitor.beginning import Asked, Prepared, prepared, writer_at
from fp8lab.monitor.precision import PrecisionProbe
from fp8lab.monitor.probes import FeedForwardProbe
from fp8lab.monitor.ranks import Reduction, in_all
from fp8lab.monitor.recorder import Kinds, StepRows
from fp8lab.monitor.selection import Selection
from fp8lab.monitor.step_probes import STEP, OptimizerProbe, OutputProbe, step_columns
from fp8lab.record import CLIPPED_STALENESS, STEPS
from fp8lab.store import RunWriter

Listener = Callable[[int, dict[str, float]], None]
Observer = Callable[[StepRows], None]

_STEP_COLUMNS = {column.name for column in STEPS}
_TOLD = {"not_run": "not in the precision told", "unlike": "cast otherwise by another process"}
_TOLD |= {"converted": "converted while it is watched, expected before"}


def watch(
    model: nn.Module,
    path: str | Path,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    every: int = 10,
    channels: int = 8,
    select: Selection | Iterable[Selection] | Mapping[str, Any] | str | Path = (),
    burst: int = 0,
    group: Any = None,
    listeners: Iterable[Listener] = (),
    config: Mapping[str, Any] | None = None,
    flush_seconds: float = 5.0,
    resume_at: int | None = None,
    inference: bool = False,
) -> Watch:
    """Record the training of `model` into the run directory `path`; use it in a `with`.

    ::

        with fp8lab.watch(model, "runs/mine", optimizer=optimizer) as watch:
            for step, batch in enumerate(batches):
                loss = train_step(model, batch)
                watch.step(step, loss=loss)

    Every `every`-th step is recorded in full, with the `channels` hottest channels and those that
    were among them before; the sentinel at every step. Learning rate, gradient norm, update ratio
    and RMS_t need the `optimizer`.

    `select` names further tensors and statistics (`fp8lab.Selection`, several, sections by name, or
    a YAML file of these). `burst`: so many steps before an alarm and after it are kept in full, for
    which rows wait. `listeners` are called after each recorded step with its number and numbers.

    Each process of a distributed training watches its part and writes its rows. In a `group`
    (`torch.distributed.group.WORLD`) all must watch, and all raise if one cannot; an all-reduce in
    each `every`-th step adds up their rows, which the first process writes as rank -1.

    `config` (JSON-able) is kept in run.json. `resume_at` goes on with an existing run from that
    step on, which an event tells; what differs then (precision, `every`, versions) replaces what
    run.json said. With `inference` forwards without gradients are recorded too: a model in use.

    Raises TypeError for what is no model, optimizer or group; ValueError if no feed-forward is
    seen, a selection is none, an optimizer is another model's or beside `inference`, processes cast
    or watch otherwise; RunError if `path` exists. Of a group any other error is a RuntimeError.
    """
    reduction = Reduction(group) if group is not None else None
    asked = Asked(model, optimizer, every, channels, burst, select, inference, resume_at, path)
    ready = in_all(group, lambda: prepared(asked, reduction), asked.alike)
    told = {"config": dict(config or {}), "inference": inference}
    told |= {"every": every, "flush_seconds": flush_seconds}

    def begin() -> Watch:
        writer = writer_at(path, describe(ready.model, ready.sites) | told, resume_at)
        probes = [FeedForwardProbe(site, channels, ready.recorder) for site in ready.sites]
        watching = Watch(ready, probes, writer, reduction, burst, flush_seconds)
        watching.listeners += listeners
        watching.attach(optimizer)
        return watching

    return in_all(group, begin, undo=lambda begun, why: begun.__exit__(type(why), why, None))


def _check_step(step: Any, loss: Any, metrics: Mapping[str, Any]) -> None:
    if isinstance(step, bool) or not isinstance(step, int | np.integer):
        raise ValueError(f"watch.step: step {step!r:.60}, expected an integer")
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise ValueError(f"watch.step: loss {list(loss.shape)}, expected one number")
    if not isinstance(loss, Tensor | SupportsFloat | None):
        raise ValueError(f"watch.step: loss {loss!r:.60}, expected a number")
    for name in metrics.keys() & _STEP_COLUMNS:
        raise ValueError(f"watch.step: {name} is a column of its own, expected another name")


class Watch:
    """A recording; made by `watch`. Leaves no hook behind when the `with` ends."""

    def __init__(
        self,
        ready: Prepared,
        probes: list[FeedForwardProbe],
        writer: RunWriter,
        reduction: Reduction | None,
        burst: int,
        flush_seconds: float,
    ) -> None:
        self._model, self._recorder = ready.model, ready.recorder
        self._probes, self._taps = probes, ready.taps
        self._writer = writer
        self._reduction = reduction
        self._burst = burst
        self._flush_seconds = flush_seconds
        self._precision = PrecisionProbe(ready.model, ready.recorder, str(writer.path))
        self._optimizer: OptimizerProbe | None = None
        self._handles: list[Any] = []
        self._held: deque[StepRows] = deque()
        self._unseen = {probe.site.name for probe in probes}
        self._last_time: float | None = None
        self._goes_on_at = ready.recorder.step
        self._last_step = ready.recorder.step - 1 if ready.recorder.step else None
        self._last_flush = time.monotonic()
        self._warned: set[str] = set()
        self._loss_was_finite = True
        self._happened: list[dict[str, Any]] = []  # events that no step's rows have told of yet
        self.listeners: list[Listener] = []
        self.observers: list[Observer] = []  # called with each step's rows before they are written
        self.alarms = 0  # steps in which a product was clipped or something was not finite

    def attach(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Put the hooks in place; if one cannot be, none stays."""
        parts: list[Any] = [
            *self._probes,
            self._taps,
            self._precision,
            OutputProbe(self._model, self._recorder),
        ]
        if optimizer is not None:
            ranks = 1 if self._reduction is None else self._reduction.size
            self._optimizer = OptimizerProbe(optimizer, self._recorder, ranks)
            parts.append(self._optimizer)
        try:
            for part in parts:
                self._handles += part.attach()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    @property
    def path(self) -> Path:
        """The run directory."""
        return self._writer.path

    @property
    def info(self) -> dict[str, Any]:
        """What run.json says of this process."""
        return self._writer.info

    @property
    def rank(self) -> int:
        """The number of this process."""
        return self._writer.rank

    def feed_forward(self, name: str) -> nn.Module:
        """The watched feed-forward of that name. Raises ValueError if there is none."""
        for probe in self._probes:
            if probe.site.name == name:
                return probe.site.module
        names = ", ".join(probe.site.name for probe in self._probes)
        raise ValueError(f"feed-forward {name!r:.60}: expected one of {names}")

    def record_in_full(self, steps: int) -> None:
        """Record the next `steps` steps in full, whatever `every` says."""
        last = self._recorder.step + steps
        self._recorder.full_until = max(self._recorder.full_until, last)

    def see(self, site: str, tensor: Tensor, how: Cast | None = None) -> None:
        """Record a tensor that no hook sees, any shape and floating dtype, as the row of `site`
        (module:role) in this step, if the step is recorded. `how` says how it was cast.
        """
        if self._recorder.is_due and tensor.numel():
            layer, _, role = site.rpartition(":")
            names = self._recorder.due(layer, role) or ()
            self._recorder.record(site, tensor, names, how)

    @property
    def is_due(self) -> bool:
        """Whether the step that runs now is recorded in full."""
        return self._recorder.is_due

    def step(self, step: int, *, loss: Tensor | float | None = None, **metrics: float) -> None:
        """The step is over: write its rows. Call it once per optimizer step, with a later number
        each time. An earlier one, or the same again, as for each micro-batch, is told by an event
        and a warning: the rows of a step then stand twice (`resume_at` takes rows back).

        `metrics` are further numbers to keep with the step. Raises ValueError for one that has the
        name of a column of `record.STEPS`, a step that is no integer, a loss that is no number.
        """
        _check_step(step, loss, metrics)
        if self._writer.info["state"] != "running":
            self._warn(f"watch.step: step {step} after the end is not recorded", once="over")
            return
        now = time.monotonic()
        seconds = None if self._last_time is None else now - self._last_time
        self._last_time = now
        if loss is not None:
            self._recorder.add(STEP, "loss", torch.as_tensor(loss).detach().double().reshape(1))
        collected = self._recorder.collect()
        if STEP in collected:  # of several optimizer steps in one, and several losses, the last
            of_step = collected[STEP]
            collected[STEP] = {k: v if k == "logit_max" else v[-1:] for k, v in of_step.items()}
        self._note_order(step)
        rows = StepRows(step, self._recorder.is_regular)
        merged = self._merged(step, collected)
        self._note_unseen(step, collected, is_told=loss is not None or bool(metrics))
        of_step = collected.pop(STEP, {})
        alarming = self._add_rows(step, rows, collected)
        row = self._step_row(of_step, merged) | {"seconds": seconds}
        row["metrics"] = [(name, float(value)) for name, value in metrics.items()]
        rows.steps.append(row)
        self._note_loss(step, row.get("loss"))
        alarming = alarming or not self._loss_was_finite
        self.alarms += alarming
        rows.is_alarming = alarming
        self._keep(rows, alarming)
        rows.events, self._happened = self._happened, []
        for observer in self.observers:
            observer(rows)
        if merged is not None:
            self._write_merged(step, merged)
        self._note_failures(step)
        self._note_precision(step)
        if rows.is_full:
            self._tell(rows)
        self._recorder.advance()
        if now - self._last_flush >= self._flush_seconds:
            self._flush(wait=self._flush_seconds <= 0.0)  # 0: whoever asks that waits for it

    def _add_rows(self, step: int, rows: StepRows, collected: dict[str, Kinds]) -> bool:
        alarming = False
        for probe in self._probes:
            tensors, channels = probe.rows(collected)
            self._note_nonfinite(step, probe, tensors)
            rows.tensors += tensors
            rows.channels += channels
            clipped = any(row.get("staleness", 0.0) > CLIPPED_STALENESS for row in tensors)
            alarming = alarming or clipped or not probe.was_finite
            if self._recorder.is_asked_for(probe.site.name):
                rows.asked.add(probe.site.name)
        for site, kinds in collected.items():
            rows.tensors.append(self._whole_row(site, kinds))
            layer, _, tensor = site.rpartition(":")
            if self._recorder.due(layer, tensor) is not None:
                rows.asked.add(site)
        return alarming

    def _whole_row(self, site: str, kinds: Kinds) -> dict[str, Any]:
        return self._recorder.row(site, kinds) | self._recorder.casts.get(site, {})

    def _merged(self, step: int, collected: dict[str, Kinds]) -> dict[str, Kinds] | None:
        """What all processes have measured together, in a step of which all know that it is due."""
        if self._reduction is None or not self._recorder.is_scheduled:
            return None
        try:
            return self._reduction.reduce(step, collected, self._recorder)
        except ValueError as error:
            if "not_merged" not in self._warned:
                self.event(step, "not_merged", str(error))
            self._warn(f"rows of all processes are left out: {error}", once="not_merged")
            return None

    def _step_row(self, kinds: Kinds, merged: dict[str, Kinds] | None) -> dict[str, Any]:
        probe = self._optimizer
        row: dict[str, Any] = {}
        if probe is not None:
            row["learning_rate"], probe.learning_rate = probe.learning_rate, None
        is_sharded = probe is not None and probe.is_sharded
        row |= step_columns(kinds, is_whole=not is_sharded)
        if is_sharded:
            row |= step_columns((merged or {}).get(STEP, {}), is_whole=True)
        if "loss" in kinds:
            row["loss"] = float(kinds["loss"][-1][0])
        return row

    def _keep(self, rows: StepRows, alarming: bool) -> None:
        """Write the rows, or hold them back until it is known whether an alarm follows."""
        self._held.append(rows)
        if alarming and self._burst:
            self.record_in_full(self._burst)
            for held in self._held:
                held.is_full = True
        while len(self._held) > self._burst or (self._held and self._held[0].is_full):
            self._write(self._held.popleft())

    def _write(self, rows: StepRows) -> None:
        where = {"step": rows.step, "rank": self.rank}
        self._writer.append("tensors", [where | row for row in rows.kept_tensors()])
        self._writer.append("channels", [where | row for row in rows.kept_channels()])
        self._writer.append("steps", [where | row for row in rows.steps])

    def _write_merged(self, step: int, merged: dict[str, Kinds]) -> None:
        if self._reduction is not None and self._reduction.writes:
            where = {"step": step, "rank": -1}
            rows = [
                self._reduction.row(site, kinds, self._recorder)
                for site, kinds in merged.items()
                if site != STEP
            ]
            self._writer.append("tensors", [where | row for row in rows])

    def _tell(self, rows: StepRows) -> None:
        scalars = rows.scalars() if self.listeners else {}
        for listener in list(self.listeners):
            try:
                listener(rows.step, scalars)
            except Exception as error:
                self.listeners.remove(listener)
                self._warn(f"a listener failed and is not called again: {error!r}")

    def event(self, step: int, kind: str, detail: str = "", site: str | None = None) -> None:
        """Record that something happened, and flush."""
        self._events(step, [(kind, site, str(detail))])

    def _events(self, step: int, told: Sequence[tuple[str, str | None, str]]) -> None:
        where = {"step": step, "rank": self.rank}
        rows = [where | {"kind": kind, "site": site, "detail": said} for kind, site, said in told]
        if rows:
            self._happened += rows
            self._writer.append("events", rows)
            self._flush()

    def set_result(self, **result: Any) -> None:
        """What the run came to, JSON-able; kept in run.json."""
        self._writer.info["result"] = result

    def _note_order(self, step: int) -> None:
        last, self._last_step = self._last_step, step
        if last is not None and step <= last:
            kind = "repeated" if step == last else "rewound"
            told = f"watch.step: step {step} after step {last}: rows of one step now stand twice"
            if last + 1 == self._goes_on_at:
                told = f"watch.step: step {step} in a run that goes on at step {last + 1}"
            if kind == "rewound" or kind not in self._warned:
                self._events(step, [(kind, None, told)])
            told += ", expected a later one"
            if kind == "rewound":
                told += f"; to go back, leave this watch and begin watch(..., resume_at={step})"
            self._warn(told, once=kind)

    def _note_loss(self, step: int, loss: float | None) -> None:
        finite = loss is None or bool(np.isfinite(loss))
        if not finite and self._loss_was_finite:
            self.event(step, "nonfinite_loss", f"loss is {loss}")
        self._loss_was_finite = finite

    def _note_nonfinite(
        self, step: int, probe: FeedForwardProbe, tensors: list[dict[str, Any]]
    ) -> None:
        site = probe.site.site("product")
        # The sentinel names a channel unless the amax is none.
        finite = all("hot_channel" in row for row in tensors if row["site"] == site)
        if not finite and probe.was_finite:
            self.event(step, "nonfinite_product", "the product has NaN or infinity", site)
        probe.was_finite = finite

    def _note_failures(self, step: int) -> None:
        failures, self._recorder.failures = self._recorder.failures, []
        self._events(step, [("not_recorded", layer, reason) for layer, reason in failures])
        for reason in dict.fromkeys(reason for _, reason in failures):
            first, *others = [layer for layer, why in failures if why == reason]
            more = f" and {len(others)} more" if others else ""
            self._warn(f"{first}{more}: not recorded: {reason}")

    def _note_precision(self, step: int) -> None:
        """What layers say that know their precision only when they have run, and who does not."""
        told, notices = self._precision.news(step)
        self._writer.info["precision"] |= told
        if told:
            try:
                self._writer.set_state("running")
            except OSError as error:  # it is written again when the run ends
                self._warn(f"run.json cannot be written: {error}", once="info")
        self._events(step, notices)
        for kind, site, why in notices:
            if kind in _TOLD:
                self._warn(f"{site}: {_TOLD[kind]}: {why}", once=kind)

    def _note_unseen(self, step: int, collected: dict[str, Kinds], is_told: bool) -> None:
        """Once, after a step that trained: which feed-forwards no hook has seen. Where all ran
        without gradients an event tells, and a warning unless the caller has told his own numbers.
        """
        trained = "grad_squares" in collected.get(STEP, {})
        seen = {name for name in self._unseen if f"{name}:product" in collected}
        passed_over, self._recorder.passed_over = self._recorder.passed_over, False
        untrained = not (seen or trained) and len(self._unseen) == len(self._probes)
        if passed_over and untrained and "inference" not in self._warned:
            detail = "only forwards without gradients ran, which a training's run leaves out"
            detail += "; watch(..., inference=True) records them"
            self._events(step, [("not_seen", None, detail)])
            self._warned |= {"inference"} if is_told else set()
            self._warn(detail, once="inference")
        if not self._unseen or not (seen or trained):
            return
        unseen, self._unseen = sorted(self._unseen - seen), set()
        detail = "did not run, or inside code that hides it, in the first step"
        self._events(step, [("not_seen", name, detail) for name in unseen])
        if not seen:
            self._warn("no feed-forward was seen in the first step")

    def _warn(self, message: str, once: str = "") -> None:
        if (once or message) not in self._warned:
            warnings.warn(f"{self.path}: {message}", stacklevel=3)
        self._warned.add(once or message)

    def _flush(self, wait: bool = True) -> None:
        try:
            self._writer.flush(wait=wait)
        except OSError as error:
            # A full disk must not end the training; the rows wait for the next try.
            self._warn(f"rows cannot be written: {error}", once="flush")
        self._last_flush = time.monotonic()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._handles:
            self._handles.pop().remove()
        is_forgotten = self._last_time is None and self._recorder.has_measured
        self._recorder.close()
        for rows in self._held:  # what led to an error is wanted in full
            rows.is_full = rows.is_full or kind is not None
            self._write(rows)
        self._held.clear()
        if kind is None:
            self._close("finished")
            if is_forgotten:
                self._warn("nothing is recorded: call watch.step(step, loss=loss) in the loop")
        elif issubclass(kind, KeyboardInterrupt):
            self._close("interrupted")
        # Of a process that refused to begin, torch tells the others that a connection is closed.
        elif is_of_others(error) and (line := said_of(f"watch: {self.path}")) is not None:
            self._close("failed", error=f"ValueError: watch: {line}")
            raise ValueError(f"watch: {line}") from None
        else:
            self._close("failed", error=in_one_line(error or kind()))

    def _close(self, state: str, **more: Any) -> None:
        try:
            self._writer.close(state, **more)
        except OSError as error:
            self._warn(f"the run cannot be closed: {error}")
