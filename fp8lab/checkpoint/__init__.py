"""`audit`: what a checkpoint's weights say before anything is run.

Of every feed-forward, per channel: the cosine of its gate row and its up row beside a control
(gate row i with the up row half the channels further on) and beside chance, and its gain; of every
matrix: outliers by row and column, and which recipes it survives; of weights of norms: what OCP's
scale clips. The mechanism is that of 2409.12517: where gate and up align, their product grows as
the square, and FP8 has no room for one channel.

**Chance.** The largest of n cosines is large by itself. In d dimensions |cos| of random directions
follows a beta distribution (`weighing.chance`); a layer's rows are not random directions, so d is
the one that the control behaves like, 1 / mean(cos²), at most the real one. p-values are corrected
for all pairs of the checkpoint (Šidák).

**Gain** of a channel: the largest of |g·x| |u·x| |down| over unit x, which is (|g| |u| + |g·u|) / 2
times |down|, the largest eigenvalue of the symmetric part of g uᵀ. It bounds SwiGLU too, for
|silu(z)| ≤ |z|.

Each tensor is read by bands of rows (`weighing`), on as many threads as cores; of a file, pages are
given back. With a live model and tokens, forward passes are watched, and what is hot there and
aligned here is one finding. Rejected: reading only gate and up, faster, which cannot say which
recipe the rest of the model survives.
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fp8lab.checkpoint.audited import Audit, Channel, NormAudit, WeightAudit, findings_of, judged
from fp8lab.checkpoint.layouts import Layout, find_layouts
from fp8lab.checkpoint.summing import (
    Expert,
    FeedForward,
    LayerFound,
    channels_of,
    layer_found,
    norm_audit,
    weight_audit,
)
from fp8lab.checkpoint.weighing import Bands, scales_fit, weigh
from fp8lab.checkpoint.weighing import pair as pair_rows
from fp8lab.checkpoint.weights import (
    FLOATS,
    Weights,
    open_weights,
    scale_of,
    unknown_scales,
)
from fp8lab.monitor import watch
from fp8lab.sites import FeedForwardSite, GateSite, survey
from fp8lab.store import open_run

TOKENS = "an int64 tensor [batch, length]"


def audit(
    source: str | Path | nn.Module,
    *,
    top: int = 8,
    tokens: Tensor | Iterable[Tensor] | None = None,
    run: str | Path | None = None,
) -> Audit:
    """Audit the weights of a file, a folder or a torch checkpoint (see `weights.open_weights`), or
    of a live model; `top` channels to watch at most of each feed-forward.

    With `tokens`, int64 [batch, length] or several of these, `source` has to be a model that takes
    them: it is run on each in evaluation mode and watched into the run directory `run`, or a
    temporary one. Raises ValueError (WeightsError) in one line for what cannot be read, for tokens
    without a model or that it does not take; TypeError for what is neither a path nor a model.
    """
    if top < 1:
        raise ValueError(f"audit: top={top}, expected at least 1")
    if not isinstance(source, str | os.PathLike | nn.Module):
        raise TypeError(f"audit: {type(source).__name__}, expected a file, a folder or a model")
    batches = None if tokens is None else _batches(tokens)
    if isinstance(source, nn.Module):
        path, jobs = type(source).__name__, _of_model(source)
    elif batches is not None:
        raise ValueError("audit: tokens without a model, expected audit(model, tokens=...)")
    else:
        weights = open_weights(source)
        path, jobs = weights.path, _of_file(weights)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(max(1, min(cores or 1, 8))) as pool:
        # The largest first, so that no thread is left with one at the end.
        order = sorted(range(len(jobs.jobs)), key=lambda place: -jobs.jobs[place].work)
        under_way = {place: _UnderWay(jobs.jobs[place], top) for place in order}
        parts = [(place, part) for place in order for part in range(jobs.jobs[place].parts)]
        list(pool.map(lambda which: under_way[which[0]].run(which[1]), parts))
    found = [under_way[place].result for place in range(len(jobs.jobs))]
    layers = [one for one in found if isinstance(one, LayerFound)]
    channels = judged([c for one in layers for c in one.candidates], sum(n.pairs for n in layers))
    if isinstance(source, nn.Module) and batches is not None:
        channels = _with_products(channels, source, batches, run)
    weights_found = tuple(one for one in found if isinstance(one, WeightAudit))
    norms = tuple(one for one in found if isinstance(one, NormAudit))
    every = [*(w for one in layers for w in one.audit.weights), *weights_found]
    return Audit(
        path=path,
        layers=tuple(one.audit for one in layers),
        weights=weights_found,
        norms=norms,
        channels=tuple(channels),
        not_audited=jobs.not_audited,
        findings=findings_of(channels, every, norms),
    )


# --- what there is to do --------------------------------------------------------------------------


class _UnderWay:
    """A job whose parts are done by any thread; whichever does the last makes the result."""

    def __init__(self, job: _Job, top: int) -> None:
        self.job, self.top = job, top
        self.done: dict[int, Any] = {}
        self.result: Any = None
        self._counting = threading.Lock()

    def run(self, part: int) -> None:
        found = self.job.run(part)
        with self._counting:
            self.done[part] = found
            last = len(self.done) == self.job.parts
        if last:
            self.result = self.job.result([self.done[n] for n in range(self.job.parts)], self.top)
            self.done.clear()


class _FeedForwardJob(NamedTuple):
    """Bands of gate, up and down of each expert; no gates in one without a gate."""

    site: str
    gate: Sequence[Callable[[], Bands]]
    up: Sequence[Callable[[], Bands]]
    down: Sequence[Callable[[], Bands]]
    experts: int
    activation: str
    note: str
    work: float = math.inf

    @property
    def parts(self) -> int:
        return len(self.down)

    def run(self, part: int) -> Expert:
        return _expert(self, part)

    def result(self, found: list[Expert], top: int) -> LayerFound:
        return _layer(self, found, top)


class _MatrixJob(NamedTuple):
    name: str
    shape: tuple[int, ...]
    bands: Callable[[], Bands]
    casts: bool
    parts: int = 1

    @property
    def work(self) -> float:
        return math.prod(self.shape)

    def run(self, _: int) -> WeightAudit:
        return weight_audit(self.name, self.shape, [weigh(self.bands(), self.casts)])

    def result(self, found: list[WeightAudit], _: int) -> WeightAudit:
        return found[0]


class _NormJob(NamedTuple):
    name: str
    bands: Callable[[], Bands]
    work: float = 0.0
    parts: int = 1

    def run(self, _: int) -> NormAudit:
        return norm_audit(self.name, self.bands())

    def result(self, found: list[NormAudit], _: int) -> NormAudit:
        return found[0]


_Job = _FeedForwardJob | _MatrixJob | _NormJob


class _Jobs(NamedTuple):
    jobs: list[_Job]
    not_audited: dict[str, str]


# Buffers of a converted layer, beside its weight.
_FP8_STATE = ("amax_history", "scale")


def _of_file(weights: Weights) -> _Jobs:
    readable = {name: stored for name, stored in weights.tensors.items() if stored.get is not None}
    not_audited = {
        name: f"{stored.dtype}: packed or no float, expected F32, F16, BF16 or FP8"
        for name, stored in weights.tensors.items()
        if stored.get is None
    }
    scales = {name: scale for name in readable if (scale := scale_of(name, readable))}
    for name, scale in list(scales.items()):
        shapes = readable[scale].shape, readable[name].shape
        if len(shapes[1]) < 2 or not scales_fit(*shapes):
            told = f"its scale {scale!r:.100} is {list(shapes[0])}"
            not_audited[name] = f"{told}, expected one, one for each row or for each 128 × 128"
            del scales[name], readable[name]
            readable.pop(scale, None)
    for name, scale in unknown_scales(weights.tensors, scales).items():
        expected = "expected floats named as the weight with _scale_inv or _scale behind"
        if readable.pop(name, None):
            not_audited[name] = f"FP8 whose scale may be {scale!r:.100}, {expected}"
        not_audited.setdefault(scale, f"may be the scale of {name!r:.100}, which is not audited")
        readable.pop(scale, None)
    state = {f"{n.removesuffix('weight')}{own}" for n in readable for own in _FP8_STATE}
    others = {n: s for n, s in readable.items() if n not in scales.values() and n not in state}

    def bands(name: str, part: Callable[[Tensor], Tensor]) -> Callable[[], Bands]:
        def made() -> Bands:
            scale = weights.tensors[scales[name]].get if name in scales else None
            get = weights.tensors[name].get
            assert get is not None
            tensor = get()
            scale_inv = None if scale is None else part(scale()) if scale().dim() > 2 else scale()
            return Bands(part(tensor), scale_inv, weights.release)

        return made

    layouts = find_layouts({name: stored.shape for name, stored in others.items()}, weights.config)
    activation = _activation(weights.config)
    jobs: list[_Job] = []
    for layout in layouts:
        gate, up, down = ([bands(p.tensor, p.of) for p in role] for role in _roles(layout))
        more = layout.experts, activation, layout.note
        jobs.append(_FeedForwardJob(layout.site, gate, up, down, *more))
    taken = {name for layout in layouts for name in layout.tensors}
    rest = {name: stored.shape for name, stored in others.items() if name not in taken}
    return _Jobs([*jobs, *_rest(rest, bands)], not_audited)


def _roles(layout: Layout) -> tuple[Any, Any, Any]:
    return layout.gate, layout.up, layout.down


def _activation(config: Any) -> str:
    config = config if isinstance(config, dict) else {}
    config = inner if isinstance(inner := config.get("text_config"), dict) else config
    keys = ("hidden_act", "hidden_activation", "activation_function", "hidden_act_fn")
    named = next((config[key] for key in keys if isinstance(config.get(key), str)), "unknown")
    limit = config.get("swiglu_limit")
    return named if limit is None else f"{named}, clamped at {limit}"


def _of_model(model: nn.Module) -> _Jobs:
    found = survey(model)
    jobs: list[_Job] = []
    taken = set()
    sites: list[GateSite | FeedForwardSite] = [*found.gates, *found.feed_forwards]
    for site in sites:
        projections = [site.up, site.down]
        if isinstance(site, GateSite):
            projections.insert(0, site.gate)
        taken |= {id(projection.parameter) for projection in projections}
        roles = [_of_projection(projection.weight) for projection in projections]
        gate, up, down = roles if len(roles) == 3 else ([], *roles)
        jobs.append(_FeedForwardJob(site.name, gate, up, down, site.experts, _words(site), ""))
    named = {n: p.detach() for n, p in model.named_parameters() if id(p) not in taken}
    fit = {n: p for n, p in named.items() if p.dtype in FLOATS and not p.is_meta}
    not_audited = {n: f"{p.dtype}: no float with values" for n, p in named.items() if n not in fit}
    shapes = {n: tuple(p.shape) for n, p in fit.items()}

    def bands(name: str, part: Callable[[Tensor], Tensor]) -> Callable[[], Bands]:
        return lambda: Bands(part(fit[name]))

    return _Jobs([*jobs, *_rest(shapes, bands)], not_audited)


def _of_projection(weight: Tensor) -> list[Callable[[], Bands]]:
    stack = weight.detach() if weight.dim() == 3 else weight.detach()[None]
    return [lambda matrix=matrix: Bands(matrix) for matrix in stack]  # type: ignore[misc]


def _words(site: GateSite | FeedForwardSite) -> str:
    limit = getattr(site, "gate_limit", None)
    return site.activation if limit is None else f"{site.activation}, clamped at {limit:g}"


def _rest(shapes: dict[str, tuple[int, ...]], bands: Any) -> list[_Job]:
    """What is no feed-forward: matrices, and the weights of norms."""
    jobs: list[_Job] = []
    for name, shape in shapes.items():
        if math.prod(shape) == 0:
            continue
        if len(shape) >= 2:
            embedding = any(word in name for word in ("embed", "wte", "wpe"))
            flat = bands(name, lambda tensor: tensor.reshape(-1, tensor.shape[-1]))
            jobs.append(_MatrixJob(name, shape, flat, not embedding))
        elif len(shape) == 1 and not name.endswith("bias") and ("norm" in name or "ln" in name):
            jobs.append(_NormJob(name, bands(name, lambda tensor: tensor[None])))
    return jobs


# --- with a model that runs --------------------------------------------------------------------


def _batches(tokens: Any) -> list[Tensor]:
    many = isinstance(tokens, Iterable) and not isinstance(tokens, Tensor)
    batches = list(tokens) if many else [tokens]
    if not batches or not all(isinstance(one, Tensor) for one in batches):
        kinds = ", ".join(dict.fromkeys(type(one).__name__ for one in batches)) or "nothing"
        raise ValueError(f"audit: tokens: {kinds}, expected {TOKENS}, or several of these")
    return batches


def _run_on(model: nn.Module, batch: Tensor, number: int) -> None:
    """A model's own words for what is no token of its vocabulary say nothing of tokens."""
    try:
        model(batch)
    except torch.OutOfMemoryError:
        raise  # of tokens that it takes, but for which there is no room
    except Exception as error:
        what = f"{str(batch.dtype).removeprefix('torch.')} {list(batch.shape)}"
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"audit: tokens, batch {number}: {type(model).__name__} does not take {what}, expected "
            f"{TOKENS} below its vocabulary: {told}"
        ) from error


def _with_products(
    channels: list[Channel],
    model: nn.Module,
    batches: list[Tensor],
    run: str | Path | None,
) -> list[Channel]:
    """The channels with what their product's amax was over the median channel's, hot ones added."""
    modes = {module: module.training for module in model.modules()}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "run" if run is None else Path(run)
        model.eval()
        try:
            # With gradients: what runs without is an evaluation, which is not counted.
            with torch.enable_grad(), watch(model, path, every=1) as watching:
                for step, batch in enumerate(batches):
                    _run_on(model, batch, step)
                    watching.step(step)
        finally:
            for module, mode in modes.items():
                module.training = mode
        rows = open_run(path).channels()
    seen = rows.groupby(["site", "channel"])["channel_ratio"].max()
    return [
        replace(channel, product_ratio=float(seen[channel.site, channel.channel]))
        if (channel.site, channel.channel) in seen.index and channel.expert is None
        else channel
        for channel in channels
    ]


# --- one feed-forward -----------------------------------------------------------------------------


def _expert(job: _FeedForwardJob, expert: int) -> Expert:
    """Of one expert, or of a dense layer."""
    roles = [("gate", job.gate), ("up", job.up), ("down", job.down)]
    made = {role: parts[expert]() for role, parts in roles if parts}
    weighed = {role: weigh(bands) for role, bands in made.items()}
    pairs = None
    if job.gate:
        pairs = pair_rows(made["gate"], made["up"], weighed["gate"], weighed["up"])
    for bands in made.values():
        bands.give_back(0, bands.shape[0])
    return Expert(weighed, channels_of(weighed, pairs))


def _layer(job: _FeedForwardJob, experts: list[Expert], top: int) -> LayerFound:
    """Of channels only those that may be worth watching are kept."""
    stacked = {key: np.stack([one.channels[key] for one in experts]) for key in experts[0].channels}
    matrices = {role: [one.matrices[role] for one in experts] for role in experts[0].matrices}
    shape = matrices["up"][0].shape
    audits = tuple(
        weight_audit(
            f"{job.site}:{role}", (*((job.experts,) if job.experts else ()), *found[0].shape), found
        )
        for role, found in matrices.items()
    )
    about = FeedForward(job.site, job.experts, job.activation, job.note, bool(job.gate))
    return layer_found(about, stacked, shape, audits, top)
