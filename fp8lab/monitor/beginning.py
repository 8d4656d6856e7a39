"""What is looked at before a run begins: all that may be refused while nothing is on the disk.

Where processes watch in a group all do this before any writes (`ranks.in_all`), so that none begins
a run that another cannot join.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fp8lab.agreement import UnlikeError, job_at, rank_of, unlike, world_size
from fp8lab.monitor.precision import in_full
from fp8lab.monitor.ranks import Reduction, plain_name, unwrapped, watched_modules
from fp8lab.monitor.recorder import Recorder
from fp8lab.monitor.selection import (
    FEED_FORWARD_GRADIENTS,
    FEED_FORWARD_TENSORS,
    Selection,
    as_selections,
    require_seen,
)
from fp8lab.monitor.taps import TensorTaps
from fp8lab.record import NOTHING_BETWEEN
from fp8lab.sites import FeedForwardSite, GateSite, find_gates, modules_of, survey
from fp8lab.store import RunWriter, open_run


class Prepared(NamedTuple):
    """What a recording is made of but for its writer."""

    model: nn.Module  # without wrappers
    recorder: Recorder
    sites: list[GateSite | FeedForwardSite]
    taps: TensorTaps


class Asked(NamedTuple):
    """What `watch` was asked for, see there."""

    model: Any
    optimizer: torch.optim.Optimizer | None
    every: int
    channels: int
    burst: int
    select: Selection | Iterable[Selection] | Mapping[str, Any] | str | Path
    inference: bool
    resume_at: int | None
    path: str | Path

    def alike(self, ready: Prepared) -> dict[str, object]:
        """What must be the same for all processes whose rows are added up."""
        of_all = {"every": self.every, "resume_at": self.resume_at}
        return of_all | {"select": ready.recorder.selections}


def prepared(asked: Asked, reduction: Reduction | None) -> Prepared:
    """Raises TypeError for what is no model, ValueError for the rest, see `watch`."""
    _check(asked)
    model, path = unwrapped(asked.model), str(Path(asked.path))
    selections, always = as_selections(asked.select), asked.burst > 0
    recorder = Recorder(asked.every, selections, asked.resume_at or 0, always, asked.inference)
    sites = _feed_forwards(model)
    taps = TensorTaps(watched_modules(model), recorder, asked.optimizer)
    require_seen(recorder.selections, _layers_of_tensors(sites, taps))
    if (line := unlike(f"watch: {path}", in_full(model))) is not None:
        raise UnlikeError(f"watch: {line}")
    if reduction is not None:
        reduction.require_own_rows(path, [site.name for site in sites])
    return Prepared(model, recorder, sites, taps)


def _check(asked: Asked) -> None:
    modules_of(asked.model)
    optimizer = asked.optimizer
    if optimizer is not None and not hasattr(optimizer, "register_step_pre_hook"):
        raise TypeError(f"watch: optimizer: {type(optimizer).__name__}, expected a torch optimizer")
    if asked.inference and optimizer is not None:
        raise ValueError("watch: inference with optimizer=, expected one of them")
    if optimizer is not None:
        _require_own(optimizer, asked.model)
    for name, least in (("every", 1), ("channels", 1), ("burst", 0), ("resume_at", 0)):
        value = getattr(asked, name)
        is_left_out = name == "resume_at" and value is None
        if not is_left_out and (not isinstance(value, int | np.integer) or value < least):
            got = f"watch: {name}={value!r:.60}"
            raise ValueError(f"{got}, expected an integer of at least {least}")


def _require_own(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """One of several optimizers, or of one that trains other models too, shares some parameters.
    Copies in higher precision than the model's own, as mixed precision keeps them, are its, and so
    are flat buffers of many, as ZeRO's. One that says nothing yet may get its own later."""
    groups: list[dict[str, Any]] = getattr(optimizer, "param_groups", [])
    held = [one for group in groups for one in group["params"]]
    own = list(model.parameters())
    lowest = min((one.element_size() for one in own), default=0)
    is_copy = all(one.element_size() > lowest or one.dim() == 1 for one in held)
    if not is_copy and {id(one) for one in held}.isdisjoint(map(id, own)):
        told = f"watch: optimizer: none of its {len(held)} parameters is one of the model's"
        raise ValueError(f"{told}, expected the optimizer that trains it")


def _feed_forwards(model: nn.Module) -> list[GateSite | FeedForwardSite]:
    found = survey(model)
    sites: list[GateSite | FeedForwardSite] = [*found.gates, *found.feed_forwards]
    if not sites:
        find_gates(model)  # says why
    return [replace(site, name=plain_name(site.name)) for site in sites]


def _layers_of_tensors(
    sites: list[GateSite | FeedForwardSite], taps: TensorTaps
) -> dict[str, list[str]]:
    found = {tensor: [*layers] for tensor, layers in taps.layers.items()}
    for tensor in (*FEED_FORWARD_TENSORS, *FEED_FORWARD_GRADIENTS):
        is_of_gate = tensor.endswith("gate")
        here = [site.name for site in sites if isinstance(site, GateSite) or not is_of_gate]
        found[tensor] = [*found.get(tensor, ()), *here]
    return found


def writer_at(path: str | Path, info: dict[str, Any], resume_at: int | None) -> RunWriter:
    """Of this process, for a new run or one that goes on, which an event tells. Raises RunError as
    `RunWriter` does."""
    rank = rank_of()
    if job := job_at(str(path)):
        info["job"] = job
    if resume_at is None:
        return RunWriter.create(path, info, rank=rank)
    steps = open_run(path).arrow("steps", "step", ranks=rank)["step"].to_pylist()
    writer = RunWriter.resume(path, resume_at, info, rank=rank, ranks=world_size())
    told = _resumed(resume_at, max(steps, default=None))
    writer.append("events", [{"step": resume_at, "kind": "resumed", "detail": told}])
    return writer


def _resumed(step: int, last: int | None) -> str:
    if last is None:
        return f"at step {step}, the first"
    told = f"at step {step} after step {last}"
    if last >= step:
        return f"{told}: the rows from step {step} on gave way"
    return told if last == step - 1 else f"{told}: {NOTHING_BETWEEN}"
