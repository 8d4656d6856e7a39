"""`watch`: hooks that turn a training run into rows and change nothing else.

At every gated feed-forward the outputs of gate, up and down and the product (down's input) are
reduced on their device, inside the hook, to short vectors (`probes`); nothing is kept of the
tensors. `step` packs the step's vectors into one transfer and writes rows. Every `every`-th step
is recorded in full. At every step a sentinel is kept: the product's amax against the amax that
made the scale in force, because clipping may happen in one step of forty.

Watching changes no bit: hooks return nothing, draw no random numbers, and write to no tensor that
is not their own. A forward that an activation checkpoint repeats inside the backward is not counted
again, nor is an evaluation: a forward without gradients.

Rejected: keeping tensors until the step ends (memory), and `.item()` in hooks (a host sync each).
"""

from __future__ import annotations

import platform
import sys
import time
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fp8lab.probes import GateProbe, OptimizerProbe, OutputProbe, Vector
from fp8lab.record import CLIPPED_STALENESS, STEPS
from fp8lab.sites import GateSite, find_gates
from fp8lab.store import RunWriter

_STEP_COLUMNS = {column.name for column in STEPS}


def watch(
    model: nn.Module,
    path: str | Path,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    every: int = 10,
    channels: int = 8,
    config: Mapping[str, Any] | None = None,
    flush_seconds: float = 5.0,
    resume_at: int | None = None,
) -> Watch:
    """Record the training of `model` into the run directory `path`; use it in a `with`.

    ::

        with fp8lab.watch(model, "runs/mine", optimizer=optimizer) as watch:
            for step, batch in enumerate(batches):
                loss = train_step(model, batch)
                watch.step(step, loss=loss)

    Every `every`-th step is recorded in full, with the `channels` hottest channels and those that
    were among them before; the sentinel at every step. `config` (JSON-able) is kept in run.json.
    `resume_at` goes on with an existing run from that step on; what differs then (precision,
    `every`, versions) replaces what run.json said. Learning rate, gradient norm, update ratio and
    RMS_t need the `optimizer`.

    Raises ValueError if the model has no gated feed-forward, RunError if `path` exists.
    """
    if every < 1 or channels < 1:
        raise ValueError(f"watch: every={every}, channels={channels}, expected at least 1")
    sites = find_gates(model)
    info = _describe(model, sites) | {"every": every, "config": dict(config or {})}
    if resume_at is None:
        writer = RunWriter.create(path, info)
    else:
        writer = RunWriter.resume(path, resume_at, info)
    return Watch(model, sites, optimizer, writer, every, channels, flush_seconds, resume_at or 0)


def _describe(model: nn.Module, sites: list[GateSite]) -> dict[str, Any]:
    precision = {
        name: module.precision()
        for name, module in model.named_modules()
        if callable(getattr(module, "precision", None))
    }
    return {
        "created": time.time(),
        "versions": {
            "fp8lab": version("fp8lab"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": f"{platform.system()} {platform.machine()}, {_device_name(model)}",
        "command": " ".join([Path(sys.argv[0]).name, *map(_without_place, sys.argv[1:])]),
        "precision": precision,
        "sites": [
            {
                "site": site.name,
                "gate": site.gate.name,
                "up": site.up.name,
                "down": site.down.name,
                "activation": site.activation,
                "up_activation": site.up_activation,
                "channels": site.gate.weight.shape[0],
                "product": "seen" if site.hookable else "recomputed",
            }
            for site in sites
        ],
    }


def _without_place(argument: str) -> str:
    """A run is passed on to others: where on this machine a file lies is nobody's business."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _device_name(model: nn.Module) -> str:
    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class Watch:
    """A recording; made by `watch`. Leaves no hook behind when the `with` ends."""

    def __init__(
        self,
        model: nn.Module,
        sites: list[GateSite],
        optimizer: torch.optim.Optimizer | None,
        writer: RunWriter,
        every: int,
        channels: int,
        flush_seconds: float,
        first_step: int,
    ) -> None:
        self._writer = writer
        self._every = every
        self._flush_seconds = flush_seconds
        self._steps_taken = first_step  # counted here: the caller may number steps otherwise
        self._last_time: float | None = None
        self._last_flush = time.monotonic()
        self._warned = False
        self._loss_was_finite = True
        self.alarms = 0  # steps in which a product was clipped or something was not finite
        self._probes = [GateProbe(site, channels, self._records_now) for site in sites]
        self._step_probes: list[OutputProbe | OptimizerProbe] = [
            OutputProbe(model, self._records_now)
        ]
        if optimizer is not None:
            self._step_probes.append(OptimizerProbe(optimizer, self._records_now))
        probes = [*self._probes, *self._step_probes]
        self._handles = [handle for probe in probes for handle in probe.attach()]

    @property
    def path(self) -> Path:
        """The run directory."""
        return self._writer.path

    def _records_now(self) -> bool:
        return self._steps_taken % self._every == 0

    def step(self, step: int, *, loss: Tensor | float | None = None, **metrics: float) -> None:
        """The step is over: write its rows. Call it once per optimizer step.

        `metrics` are further numbers to keep with the step. Raises ValueError if one of them has
        the name of a column of `record.STEPS`.
        """
        for name in metrics.keys() & _STEP_COLUMNS:
            raise ValueError(f"watch.step: {name} is a column of its own, expected another name")
        now = time.monotonic()
        seconds = None if self._last_time is None else now - self._last_time
        self._last_time = now
        probes = [*self._probes, *self._step_probes]
        vectors = [vector for probe in probes for vector in probe.vectors()]
        if loss is not None:
            vectors.append(torch.as_tensor(loss).detach().double().reshape(1))
        values = iter(_to_host(vectors))
        where = {"step": step, "rank": 0}
        alarming = False
        for probe in self._probes:
            tensors, channels = probe.rows([next(values) for _ in range(probe.count)])
            self._note_nonfinite(step, probe, tensors)
            self._writer.append("tensors", [where | tensor for tensor in tensors])
            self._writer.append("channels", [where | channel for channel in channels])
            clipped = any(row.get("staleness", 0.0) > CLIPPED_STALENESS for row in tensors)
            alarming = alarming or clipped or not probe.was_finite
        row: dict[str, Any] = where | {"seconds": seconds}
        row["metrics"] = [(name, float(value)) for name, value in metrics.items()]
        for step_probe in self._step_probes:
            row |= step_probe.row([next(values) for _ in range(step_probe.count)])
        if loss is not None:
            row["loss"] = float(next(values)[0])
        self._writer.append("steps", [row])
        self._note_loss(step, row.get("loss"))
        self.alarms += alarming or not self._loss_was_finite
        self._steps_taken += 1
        if now - self._last_flush >= self._flush_seconds:
            self._flush()

    def event(self, step: int, kind: str, detail: str = "", site: str | None = None) -> None:
        """Record that something happened, and flush."""
        row = {"step": step, "rank": 0, "kind": kind, "site": site, "detail": detail}
        self._writer.append("events", [row])
        self._flush()

    def set_result(self, **result: Any) -> None:
        """What the run came to, JSON-able; kept in run.json."""
        self._writer.info["result"] = result

    def _note_loss(self, step: int, loss: float | None) -> None:
        finite = loss is None or bool(np.isfinite(loss))
        if not finite and self._loss_was_finite:
            self.event(step, "nonfinite_loss", f"loss is {loss}")
        self._loss_was_finite = finite

    def _note_nonfinite(self, step: int, probe: GateProbe, tensors: list[dict[str, Any]]) -> None:
        finite = not any(row.get("nonfinite") for row in tensors)
        for row in tensors:
            row.pop("nonfinite", None)
        if not finite and probe.was_finite:
            site = probe.site.site("product")
            self.event(step, "nonfinite_product", "the gate product has NaN or infinity", site)
        probe.was_finite = finite

    def _flush(self) -> None:
        try:
            self._writer.flush()
        except OSError as error:
            # A full disk must not end the training; the rows wait for the next try.
            if not self._warned:
                warnings.warn(f"{self.path}: rows cannot be written: {error}", stacklevel=3)
            self._warned = True
        self._last_flush = time.monotonic()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if kind is None:
            self._writer.close("finished")
        elif issubclass(kind, KeyboardInterrupt):
            self._writer.close("interrupted")
        else:
            self._writer.close("failed", error=f"{kind.__name__}: {error}".splitlines()[0])


def _to_host(vectors: list[Tensor]) -> list[Vector]:
    """All vectors in one transfer (one a device, if the model is spread over several)."""
    by_device: dict[torch.device, list[int]] = {}
    for position, vector in enumerate(vectors):
        by_device.setdefault(vector.device, []).append(position)
    hosted: dict[int, Vector] = {}
    for positions in by_device.values():
        packed = torch.cat([vectors[p].flatten() for p in positions]).cpu().numpy()
        ends = np.cumsum([vectors[p].numel() for p in positions])
        hosted |= dict(zip(positions, np.split(packed, ends[:-1]), strict=True))
    return [hosted[position] for position in range(len(vectors))]
