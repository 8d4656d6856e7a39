"""What the hooks of a step have measured, and the one transfer that brings it to the host.

A hook asks whether a tensor is due in this step, reduces it on its device to short vectors
(`measure`, `statistics`) and leaves these here. At the end of the step all of them travel together:
float64 as the bits of int64, one copy a device and no other wait. On the host `tensor_row` turns
what belongs to one row into its columns; micro-batches and ranks merge there, counts and power
sums exactly, extremes as extremes.

On a GPU measuring runs beside the training anyway. On a CPU it does where a core is idle: a thread
measures a tensor while the model computes with it, and is waited for before the model can be done
with it (`beside`, `settle`). What was written to meanwhile, as the tensor's version tells, is
dropped and not measured wrongly.

Rejected: `.item()` in hooks, a wait each; and a vector a statistic, a kernel launch each.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fp8lab.casting import Cast
from fp8lab.monitor import measure, statistics
from fp8lab.monitor.selection import FEED_FORWARD_TENSORS, Selection
from fp8lab.recipe import Operand
from fp8lab.record import SENTINEL_COLUMNS, TENSORS
from fp8lab.sketch import Sketch

Vector = NDArray[Any]
_COLUMNS = {column.name for column in TENSORS}
_Measured = tuple[str, str, Tensor]  # site, kind, vector
Kinds = dict[str, list[Vector]]  # what was measured of one tensor: kind -> a vector a micro-batch


class Recorder:
    """Knows what is due, and keeps what was measured since the last `collect`."""

    def __init__(
        self,
        every: int,
        selections: Sequence[Selection],
        first_step: int,
        always: bool,
        inference: bool = False,
    ) -> None:
        for selection in selections:
            statistics.check(selection.statistics)
        self.step = first_step  # counted by `advance`: the caller may number steps otherwise
        self.full_until = -1  # steps up to this one are recorded whatever `every` says
        self.inference = inference  # every forward counts, with gradients or without
        self.passed_over = False  # a forward did not count, since this was last looked at
        self._every = every
        self._always = always
        self.selections = selections
        self._due: dict[tuple[str, str], tuple[str, ...] | None] = {}
        self._vectors: list[_Measured] = []
        self._thread: ThreadPoolExecutor | None = None
        self._jobs: list[tuple[Future[list[_Measured]], Tensor, int, Callable[[], None]]] = []
        self._aside = threading.local()
        self._named: dict[str, tuple[str, ...]] = {}
        # For adding processes up: sites of which another process sends this part, and sites of
        # which every process holds the same whole.
        self.copies: set[str] = set()
        self.wholes: set[str] = set()
        self.failures: list[tuple[str, str]] = []  # (layer, why) since they were last looked at
        self.casts: dict[str, dict[str, str]] = {}  # site -> recipe, format in this step

    @property
    def is_due(self) -> bool:
        """Whether the gates are recorded in full in this step."""
        return self._always or self.is_regular

    @property
    def is_scheduled(self) -> bool:
        """Whether the step is a multiple of `every`: so on all processes alike."""
        return self.step % self._every == 0

    @property
    def is_regular(self) -> bool:
        """Whether this step's rows are kept in full even if nothing happens."""
        return self.is_scheduled or self.step <= self.full_until

    def due(self, layer: str, tensor: str) -> tuple[str, ...] | None:
        """Names of the statistics that selections ask for in this step, None if none selects it."""
        key = layer, tensor
        if key not in self._due:
            asked = [
                selection.statistics
                for selection in self.selections
                if selection.names(layer, tensor) and selection.covers(self.step, self._every)
            ]
            names = tuple(dict.fromkeys(name for group in asked for name in group))
            self._due[key] = names if asked else None
        return self._due[key]

    def is_due_at(self, layer: str) -> bool:
        """Whether the feed-forward of that name is recorded in full in this step: all are, or a
        selection asks for one of its tensors."""
        return self.is_due or self.is_asked_for(layer)

    def is_asked_for(self, layer: str) -> bool:
        """Whether a selection asks for a tensor of the feed-forward of that name in this step."""
        if not self.selections:
            return False
        return any(self.due(layer, tensor) is not None for tensor in FEED_FORWARD_TENSORS)

    def selects(self, layer: str, tensor: str) -> bool:
        """Whether any selection is about it, at whatever step."""
        return any(selection.names(layer, tensor) for selection in self.selections)

    def advance(self) -> None:
        """The step is over."""
        self.step += 1
        self._due.clear()
        self.casts.clear()  # a layer may be put back to high precision

    def add(self, site: str, kind: str, vector: Tensor) -> None:
        """Keep a vector, int64 or floating, of the row of `site` until the step ends."""
        vector = vector if vector.dtype == torch.int64 else vector.double()
        getattr(self._aside, "vectors", self._vectors).append((site, kind, vector))

    def beside(self, tensor: Tensor, job: Callable[[], None], changed: Callable[[], None]) -> None:
        """Start `job`, which measures `tensor`, on another thread; `settle` waits for it.

        If the tensor was written to by then, what was measured is dropped and `changed` called.
        """

        def run() -> list[_Measured]:
            measured: list[_Measured] = []
            self._aside.vectors = measured
            try:
                with torch.no_grad():
                    job()
            finally:
                del self._aside.vectors
            return measured

        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "fp8lab-measure")
        version = version_of(tensor)
        self._jobs.append((self._thread.submit(run), tensor, version, changed))

    def settle(self) -> None:
        """Wait for what runs beside.

        Versions are looked at here: torch counts them up when a write is over, so the thread itself
        would miss one that is under way.
        """
        jobs, self._jobs = self._jobs, []
        for job, tensor, version, changed in jobs:
            measured = job.result()
            if version_of(tensor) == version:
                self._vectors.extend(measured)
            else:
                changed()

    def close(self) -> None:
        """End the thread, if there is one."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    @torch.no_grad()
    def record(
        self,
        site: str,
        tensor: Tensor,
        names: tuple[str, ...] = (),
        how: Cast | None = None,
        whole: bool = False,
    ) -> measure.Summary:
        """Summarise `tensor`, any shape and floating dtype, for the row of `site`.

        `whole` says that, unless it is a DTensor, every process has the same one.
        """
        if is_copy(tensor):
            self.copies.add(site)
        elif whole and not hasattr(tensor, "placements"):
            self.wholes.add(site)
        tensor = local(tensor.detach())
        summary = measure.summary(tensor)
        self.add(site, "summary", summary.packed)
        # The summary has the plain ones.
        names = tuple(name for name in names if name not in statistics.PLAIN)
        if names:
            self._named[site] = names
            role = _operand_of(site)
            self.add(site, "statistics", statistics.measure(names, tensor, how, role))
        if how is not None:
            self.note_cast(site, how)
        return summary

    def fail(self, layer: str, reason: str) -> None:
        """Something of `layer` cannot be recorded, for a reason; `watch` says so."""
        self.failures.append((layer, " ".join(reason.split())))

    def note_cast(self, site: str, how: Cast) -> None:
        """Remember which recipe and format the rows of `site` are about."""
        self.casts[site] = {"recipe": type(how.recipe).__name__, "format": how.format.name}

    def names_of(self, site: str) -> tuple[str, ...]:
        """The statistics that were measured of `site` by name."""
        return self._named.get(site, ())

    def row(self, site: str, kinds: Kinds) -> dict[str, Any]:
        """`tensor_row` of a tensor that was measured here."""
        return tensor_row(site, kinds, self.names_of(site))

    @property
    def has_measured(self) -> bool:
        """Whether anything was, since the last call of `collect`."""
        return bool(self._vectors or self._jobs)

    def collect(self) -> dict[str, Kinds]:
        """Everything measured since the last call, on the host, by site and kind."""
        self.settle()
        collected: dict[str, Kinds] = {}
        hosted = to_host([vector for _, _, vector in self._vectors])
        for (site, kind, _), vector in zip(self._vectors, hosted, strict=True):
            collected.setdefault(site, {}).setdefault(kind, []).append(vector)
        self._vectors.clear()
        return collected


def _operand_of(site: str) -> Operand:
    """As which operand a tensor would be cast, as far as the name of its row tells."""
    name = site.rpartition(":")[2]
    if name == "weight":
        return "weight"
    return "grad_output" if name.startswith("grad_") else "input"


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been written to; one made in inference mode does not count it."""
    return 0 if tensor.is_inference() else tensor._version


def has_idle_core() -> bool:
    """Whether torch leaves one of the cores that this process may use idle."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return cores > torch.get_num_threads()


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this process holds; any other tensor as it is.

    Raises TypeError for one whose parts still have to be added up: they are no elements of it.
    """
    if any(placement.is_partial() for placement in getattr(tensor, "placements", ())):
        raise TypeError("a DTensor whose parts are not added up yet cannot be measured")
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def is_copy(tensor: Tensor) -> bool:
    """Whether a DTensor's part is held by a process before this one as well."""
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return False
    coordinate = tensor.device_mesh.get_coordinate() or ()  # type: ignore[attr-defined]
    places = zip(coordinate, placements, strict=False)
    return any(index > 0 and not placement.is_shard() for index, placement in places)


def to_host(vectors: list[Tensor]) -> list[Vector]:
    """int64 and float64 vectors in one transfer (one a device, if the model is spread out)."""
    hosted: list[Vector] = [vector.numpy() if vector.is_cpu else np.empty(0) for vector in vectors]
    by_device: dict[torch.device, list[int]] = {}
    for position, vector in enumerate(vectors):
        if not vector.is_cpu:
            by_device.setdefault(vector.device, []).append(position)
    for positions in by_device.values():
        packed = torch.cat([vectors[p].view(torch.int64) for p in positions]).cpu().numpy()
        ends = np.cumsum([vectors[p].numel() for p in positions])
        for position, part in zip(positions, np.split(packed, ends[:-1]), strict=True):
            is_float = vectors[position].dtype == torch.float64
            hosted[position] = part.view(np.float64) if is_float else part
    return hosted


def tensor_row(site: str, kinds: Kinds, names: tuple[str, ...] = ()) -> dict[str, Any]:
    """The columns of one tensor row; what was not measured is left out."""
    row: dict[str, Any] = {"site": site}
    found = {kind: merged_kind(kind, vectors, names) for kind, vectors in kinds.items()}
    if "sentinel" in found:
        row |= _sentinel_columns(found["sentinel"])
    if "summary" in found:
        sketch = Sketch.from_packed(found["summary"])
        row |= sketch.statistics()
        if "activated_gate" in found and "activated_up" in found:
            row |= _gate_columns(sketch, found["activated_gate"], found["activated_up"])
    if "channels" in found:
        row |= finite_columns(("channel_ratio",), _peak_ratio(found["channels"], 1.0))
    if "tokens" in found:
        row |= finite_columns(("token_ratio",), _peak_ratio(found["tokens"], 0.999))
    if "operand" in found:
        row |= measure.operand_statistics(found["operand"])
    if "gemm" in found:
        with np.errstate(all="ignore"):
            errors = np.sqrt(found["gemm"][:1] / found["gemm"][1:])
        row |= finite_columns(("gemm_error",), errors)
    if "extremes" in found:
        row |= finite_columns(("cur_amax", "max"), found["extremes"])
    if "statistics" in found:
        further = statistics.finish(names, found["statistics"])
        row = {name: value for name, value in further.items() if name in _COLUMNS} | row
        row["statistics"] = [pair for pair in further.items() if pair[0] not in _COLUMNS]
    return row


def merged_kind(kind: str, vectors: list[Vector], names: tuple[str, ...] = ()) -> Vector:
    """One vector for all micro-batches, or all processes, of a row; `names` are its statistics."""
    if len(vectors) == 1:
        return vectors[0]
    if kind == "summary":
        return reduce(Sketch.merge, map(Sketch.from_packed, vectors)).to_packed()
    if kind == "statistics":
        return reduce(lambda one, other: statistics.merge(names, one, other), vectors)
    if kind == "tokens":
        return np.concatenate(vectors)
    stacked = np.stack(vectors)
    if kind in ("channels", "amaxes", "extremes", "logit_max"):
        return np.asarray(np.max(stacked, axis=0))
    if kind == "sentinel":
        amax, channel, scale, staleness = stacked.T
        hottest = int(np.argmax(amax))  # the first NaN, if there is one
        merged = amax[hottest], channel[hottest], scale[-1], staleness.max()
        return np.array(merged)
    if kind.startswith("activated"):
        return np.array([stacked[:, 0].max(), *stacked[:, 1:].sum(axis=0)])
    if kind in ("operand", "gemm", "grad_squares", "update", "rms_t"):
        return np.asarray(np.sum(stacked, axis=0))
    return vectors[-1]  # of weights, the loss: the last


def _sentinel_columns(sentinel: Vector) -> dict[str, Any]:
    amax, channel, scale, staleness = sentinel
    row: dict[str, Any] = {}
    if np.isfinite(amax):
        row |= {"cur_amax": float(amax), "hot_channel": int(channel)}
    return row | finite_columns(("scale", "staleness"), np.array([scale, staleness]))


def _gate_columns(sketch: Sketch, gate: Vector, up: Vector) -> dict[str, float]:
    """From the product's sketch and [amax, sum of squares] of either factor; all three have the
    same number of elements, which cancels."""
    if sketch.finite < sketch.count:
        return {}
    peaks, powers = np.array([[sketch.amax, sketch.sum_squares], gate, up]).T
    with np.errstate(all="ignore"):
        crests = peaks / np.sqrt(powers)
        values = np.array([crests[0] / crests[1:].max(), peaks[0] / (peaks[1] * peaks[2])])
    return finite_columns(("amplification", "coincidence"), values)


def _peak_ratio(amaxes: Vector, share: float) -> Vector:
    """A quantile / the median, both as numpy.quantile has them, which is slow for so few."""
    ascending = np.sort(amaxes)
    with np.errstate(all="ignore"):
        return np.array([quantile(ascending, share) / quantile(ascending, 0.5)])


def quantile(ascending: Vector, share: float) -> Any:
    """The quantile of sorted numbers, interpolated between the two that are nearest."""
    if not len(ascending):
        return np.nan
    place = share * (len(ascending) - 1)
    below = int(place)
    low, high = ascending[below], ascending[min(below + 1, len(ascending) - 1)]
    return low + (high - low) * (place - below)


def finite_columns(names: Sequence[str], values: Vector) -> dict[str, float]:
    """Names with their values, those left out that are not finite."""
    pairs = zip(names, values.tolist(), strict=True)
    return {name: value for name, value in pairs if math.isfinite(value)}


class StepRows:
    """The rows of one step of this process."""

    def __init__(self, step: int, is_full: bool) -> None:
        self.step = step
        self.is_full = is_full
        self.tensors: list[dict[str, Any]] = []
        self.channels: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.is_alarming = False
        self.asked: set[str] = set()  # feed-forwards, and other sites, that a selection asks for

    def kept_tensors(self) -> list[dict[str, Any]]:
        """All, or what selections ask for and the sentinels of the other products."""
        kept = []
        for row in self.tensors:
            layer, _, role = row["site"].rpartition(":")
            if self.is_full or row["site"] in self.asked or layer in self.asked:
                kept.append(row)
            elif role == "product":
                kept.append({n: v for n, v in row.items() if n in SENTINEL_COLUMNS})
        return kept

    def kept_channels(self) -> list[dict[str, Any]]:
        """Those of the feed-forwards whose tensors are kept whole."""
        return [row for row in self.channels if self.is_full or row["site"] in self.asked]

    def scalars(self) -> dict[str, float]:
        """Every number by a name like fp8lab/layers.3.mlp/product/cur_amax."""
        found: dict[str, float] = {}
        for row in self.steps:
            numbers = {name: value for name, value in row.items() if name != "metrics"}
            found |= _named("fp8lab", numbers | dict(row["metrics"]))
        for row in self.tensors:
            layer, _, role = row["site"].rpartition(":")
            found |= _named(f"fp8lab/{layer}/{role}", row | dict(row.get("statistics", ())))
        hottest: dict[str, dict[str, Any]] = {}
        for row in self.channels:
            best = hottest.setdefault(row["site"], row)
            if row.get("product_amax", 0.0) > best.get("product_amax", 0.0):
                hottest[row["site"]] = row
        for site, row in hottest.items():
            found |= _named(f"fp8lab/{site}", row)
        return found


def _named(prefix: str, row: Mapping[str, Any]) -> dict[str, float]:
    numbers = {n: v for n, v in row.items() if isinstance(v, int | float)}
    return {f"{prefix}/{name}": float(value) for name, value in numbers.items()}
