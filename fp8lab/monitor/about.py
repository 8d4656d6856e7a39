"""What run.json says of what is watched: software, machine, the precision of each layer, and the
feed-forwards as they were found.

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

from fp8lab.monitor.precision import known_from_birth, linears
from fp8lab.monitor.probes import how_seen
from fp8lab.sites import FeedForwardSite, GateSite


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
