"""fp8lab: why an FP8 training run diverges, which tensor, layer and channel, since when.

This is the door: the public names and where they live. Names resolve on first use, so importing
fp8lab is free and reading a report needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fp8lab import formats as formats
    from fp8lab import mitigations as mitigations
    from fp8lab.bisection import Bisection as Bisection
    from fp8lab.bisection import bisect as bisect
    from fp8lab.casting import Quantized as Quantized
    from fp8lab.casting import fake_quantize as fake_quantize
    from fp8lab.casting import quantize as quantize
    from fp8lab.checkpoint import audit as audit
    from fp8lab.checkpoint.audited import Audit as Audit
    from fp8lab.conversion import convert as convert
    from fp8lab.diagnosis import Diagnosis as Diagnosis
    from fp8lab.diagnosis import diagnose as diagnose
    from fp8lab.ffn import FeedForward as FeedForward
    from fp8lab.ffn import GatedFeedForward as GatedFeedForward
    from fp8lab.forecast import Forecast as Forecast
    from fp8lab.forecast import replay as replay
    from fp8lab.formats import FloatFormat as FloatFormat
    from fp8lab.guard import Checkpoints as Checkpoints
    from fp8lab.guard import Guard as Guard
    from fp8lab.monitor import watch as watch
    from fp8lab.monitor.selection import Selection as Selection
    from fp8lab.optim import Fp8AdamW as Fp8AdamW
    from fp8lab.plan import Plan as Plan
    from fp8lab.plan import load_recipe as load_recipe
    from fp8lab.recipe import Accumulation as Accumulation
    from fp8lab.recipe import BitNetScaling as BitNetScaling
    from fp8lab.recipe import DelayedScaling as DelayedScaling
    from fp8lab.recipe import Float8BlockScaling as Float8BlockScaling
    from fp8lab.recipe import Float8CurrentScaling as Float8CurrentScaling
    from fp8lab.recipe import Format as Format
    from fp8lab.recipe import HighPrecision as HighPrecision
    from fp8lab.recipe import MXFP8BlockScaling as MXFP8BlockScaling
    from fp8lab.recipe import NVFP4BlockScaling as NVFP4BlockScaling
    from fp8lab.recipe import RowwiseScaling as RowwiseScaling
    from fp8lab.record import Finding as Finding
    from fp8lab.regions import autocast as autocast
    from fp8lab.report import write_report as write_report
    from fp8lab.rounding import round_to as round_to
    from fp8lab.sites import FeedForwardSite as FeedForwardSite
    from fp8lab.sites import GateSite as GateSite
    from fp8lab.sites import find_feed_forwards as find_feed_forwards
    from fp8lab.sites import find_gates as find_gates
    from fp8lab.store import Run as Run
    from fp8lab.store import open_run as open_run

__version__ = "0.1.0"

_ROOMS = {
    "bisection": ("Bisection", "bisect"),
    "casting": ("Quantized", "fake_quantize", "quantize"),
    "checkpoint": ("Audit", "audit"),
    "conversion": ("convert",),
    "diagnosis": ("Diagnosis", "diagnose"),
    "ffn": ("FeedForward", "GatedFeedForward"),
    "forecast": ("Forecast", "replay"),
    "formats": ("FloatFormat",),
    "guard": ("Checkpoints", "Guard"),
    "monitor": ("watch",),
    "monitor.selection": ("Selection",),
    "optim": ("Fp8AdamW",),
    "plan": ("Plan", "load_recipe"),
    "recipe": (
        "Accumulation",
        "BitNetScaling",
        "DelayedScaling",
        "Float8BlockScaling",
        "Float8CurrentScaling",
        "Format",
        "HighPrecision",
        "MXFP8BlockScaling",
        "NVFP4BlockScaling",
        "RowwiseScaling",
    ),
    "record": ("Finding",),
    "regions": ("autocast",),
    "report": ("write_report",),
    "rounding": ("round_to",),
    "sites": ("FeedForwardSite", "GateSite", "find_feed_forwards", "find_gates"),
    "store": ("Run", "open_run"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = sorted([*_ROOM_OF, "formats", "mitigations"])


def __getattr__(name: str) -> Any:
    if name in ("formats", "mitigations"):
        return import_module(f"fp8lab.{name}")
    if name in _ROOM_OF:
        return getattr(import_module(f"fp8lab.{_ROOM_OF[name]}"), name)
    raise AttributeError(f"module 'fp8lab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
