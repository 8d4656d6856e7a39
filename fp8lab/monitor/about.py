"""How a run begins, and what its run.json says of what is watched: software, machine, the precision
of each layer, and the feed-forwards as they were found.

A run is passed on to others, so nothing here says where on a machine a file lies.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fp8lab.monitor.precision import in_full, known_from_birth, linears
from fp8lab.monitor.probes import how_seen
from fp8lab.monitor.ranks import job_at, rank_of, require_alike, world_size
from fp8lab.sites import FeedForwardSite, GateSite
from fp8lab.store import RunWriter, open_run


def describe(model: nn.Module, sites: Sequence[GateSite | FeedForwardSite]) -> dict[str, Any]:
    """JSON-able: versions, machine, command, the precision of every layer that says it already, all
    linear layers, sites."""
    return {
        "created": time.time(),
        "versions": {
            "fp8lab": _own_version(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": f"{platform.system()} {platform.machine()}, {_device_name(model)}",
        "command": command(),
        "precision": known_from_birth(model),
        "linears": linears(model),
        "sites": [_describe_site(site) for site in sites],
    }


def command() -> str:
    """The command line of this process as it was typed, but for where files lie."""
    return " ".join([Path(sys.argv[0]).name, *map(_without_place, sys.argv[1:])])


def begun(
    path: str | Path, model: nn.Module, info: dict[str, Any], resume_at: int | None
) -> RunWriter:
    """The run of this process, made, or with `resume_at` gone on with; an event says so then."""
    rank = rank_of()
    require_alike(str(path), in_full(model))
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
    return told if last == step - 1 else f"{told}: of those between nothing is recorded"


def _own_version() -> str:
    try:
        return version("fp8lab")
    except PackageNotFoundError:
        return "not installed, run from its source"


def _describe_site(site: GateSite | FeedForwardSite) -> dict[str, Any]:
    facts: dict[str, Any] = {"site": site.name}
    facts |= {"gate": site.gate.name} if isinstance(site, GateSite) else {"gated": False}
    facts |= {"up": site.up.name, "down": site.down.name} | site.formula.facts
    if not isinstance(site, GateSite):
        del facts["up_activation"]
    facts |= {"channels": site.channels, "product": how_seen(site)}
    return facts | ({"experts": site.experts} if site.experts else {})


def _without_place(argument: str) -> str:
    """A run is passed on to others: where on this machine a file lies is nobody's business."""
    option, is_given, value = argument.rpartition("=")
    place = Path(value)
    return f"{option}{is_given}{place.name}" if place.is_absolute() else argument


def _device_name(model: nn.Module) -> str:
    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
