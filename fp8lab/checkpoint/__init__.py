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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fp8lab.checkpoint.audited import (
    Audit,
    Channel,
    LayerAudit,
    NormAudit,
    Survival,
    WeightAudit,
    findings_of,
    judged,
    survival_of,
)
from fp8lab.checkpoint.layouts import Layout, find_layouts
from fp8lab.checkpoint.weighing import (
    RECIPES,
    Array,
    Bands,
    Matrix,
    chance,
    chance_level,
    scales_fit,
    weigh,
)
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
    temporary one. Raises ValueError (WeightsError) in one line for what cannot be read, and for
    tokens without a model.
    """
    if top < 1:
        raise ValueError(f"audit: top={top}, expected at least 1")
    if isinstance(source, nn.Module):
        path, jobs = type(source).__name__, _of_model(source)
    elif tokens is not None:
        raise ValueError("audit: tokens without a model, expected audit(model, tokens=...)")
    else:
        weights = open_weights(source)
        path, jobs = weights.path, _of_file(weights)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(max(1, min(cores or 1, 8))) as pool:
        # The largest first, so that no thread is left with one at the end.
        order = sorted(range(len(jobs.jobs)), key=lambda place: -jobs.jobs[place].work)
        done = list(pool.map(lambda place: jobs.jobs[place].run(top), order))
    found = [one for _, one in sorted(zip(order, done, strict=True), key=itemgetter(0))]
    layers = [one for one in found if isinstance(one, _Layer)]
    channels = judged([c for one in layers for c in one.candidates], sum(n.pairs for n in layers))
    if isinstance(source, nn.Module) and tokens is not None:
        channels = _with_products(channels, source, tokens, run)
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

    def run(self, top: int) -> _Layer:
        return _layer(self, top)


class _MatrixJob(NamedTuple):
    name: str
    shape: tuple[int, ...]
    bands: Callable[[], Bands]
    casts: bool

    @property
    def work(self) -> float:
        return math.prod(self.shape)

    def run(self, top: int) -> WeightAudit:
        return _weight_audit(self.name, self.shape, [weigh(self.bands(), self.casts)])


class _NormJob(NamedTuple):
    name: str
    bands: Callable[[], Bands]
    work: float = 0.0

    def run(self, top: int) -> NormAudit:
        return _norm_audit(self.name, self.bands())


class _Jobs(NamedTuple):
    jobs: list[_FeedForwardJob | _MatrixJob | _NormJob]
    not_audited: dict[str, str]


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
    others = {n: s for n, s in readable.items() if n not in scales.values()}

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
    jobs: list[_FeedForwardJob | _MatrixJob | _NormJob] = []
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
    jobs: list[_FeedForwardJob | _MatrixJob | _NormJob] = []
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


def _rest(shapes: dict[str, tuple[int, ...]], bands: Any) -> list[_MatrixJob | _NormJob]:
    """What is no feed-forward: matrices, and the weights of norms."""
    jobs: list[_MatrixJob | _NormJob] = []
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


def _with_products(
    channels: list[Channel],
    model: nn.Module,
    tokens: Tensor | Iterable[Tensor],
    run: str | Path | None,
) -> list[Channel]:
    """The channels with what their product's amax was over the median channel's, hot ones added."""
    batches = [tokens] if isinstance(tokens, Tensor) else list(tokens)
    modes = {module: module.training for module in model.modules()}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "run" if run is None else Path(run)
        model.eval()
        try:
            # With gradients: what runs without is an evaluation, which is not counted.
            with torch.enable_grad(), watch(model, path, every=1) as watching:
                for step, batch in enumerate(batches):
                    model(batch)
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


# --- one feed-forward, one matrix, one norm -------------------------------------------------------


class _Layer(NamedTuple):
    audit: LayerAudit
    pairs: int
    candidates: list[Channel]


def _layer(job: _FeedForwardJob, top: int) -> _Layer:
    """Expert by expert; of the channels only those that may be worth watching are kept."""
    names = [("gate", job.gate), ("up", job.up), ("down", job.down)]
    matrices: dict[str, list[Matrix]] = {role: [] for role, parts in names if parts}
    experts = []
    for expert in range(len(job.down)):
        made = {role: parts[expert]() for role, parts in names if parts}
        for role, bands in made.items():
            matrices[role].append(weigh(bands))
        weighed = {role: matrices[role][-1] for role in made}
        pairs = None
        if job.gate:
            pairs = pair_rows(made["gate"], made["up"], weighed["gate"], weighed["up"])
        for bands in made.values():
            bands.give_back(0, bands.shape[0])
        experts.append(_channels(weighed, pairs))
    stacked = {key: np.stack([one[key] for one in experts]) for key in experts[0]}
    shape = matrices["up"][0].shape
    audits = tuple(
        _weight_audit(
            f"{job.site}:{role}", (*((job.experts,) if job.experts else ()), *found[0].shape), found
        )
        for role, found in matrices.items()
    )
    return _summarised(job, stacked, shape, audits, top)


def _channels(weighed: dict[str, Matrix], pairs: Any) -> dict[str, Array]:
    up, down = np.sqrt(weighed["up"].row_power), np.sqrt(weighed["down"].column_power)
    if pairs is None:
        return {"up": up, "down": down, "gain": up * down}
    gate = np.sqrt(weighed["gate"].row_power)
    aligned = np.nan_to_num(pairs.alignment)
    gain = gate * up * (1.0 + np.abs(aligned)) / 2 * down
    control = np.nan_to_num(pairs.permuted)
    return {
        "gate": gate, "up": up, "down": down, "gain": gain, "cos": aligned, "control": control
    }  # fmt: skip


def _summarised(
    job: _FeedForwardJob,
    found: dict[str, Array],
    shape: tuple[int, int],
    weights: tuple[WeightAudit, ...],
    top: int,
) -> _Layer:
    median = float(np.median(found["gain"]))
    with np.errstate(invalid="ignore"):  # infinite weights are a finding of their own
        ratio = found["gain"] / median if median > 0 else np.ones_like(found["gain"])
    width, dim = shape
    size = np.abs(found["cos"]) if job.gate else ratio
    best = int(size.argmax())
    chosen = {*_largest(size, top), *_largest(ratio, top)} if job.gate else {*_largest(ratio, top)}
    effective = None
    if job.gate:
        effective = min(float(dim), 1.0 / max(float((found["control"] ** 2).mean()), 1e-30))
    candidates = [
        Channel(
            site=job.site,
            expert=place // width if job.experts else None,
            channel=place % width,
            alignment=float(found["cos"].flat[place]) if job.gate else math.nan,
            p_value=math.nan if effective is None else chance(float(size.flat[place]), effective),
            gate_norm=float(found["gate"].flat[place]) if job.gate else math.nan,
            up_norm=float(found["up"].flat[place]),
            down_norm=float(found["down"].flat[place]),
            gain_ratio=float(ratio.flat[place]),
        )
        for place in sorted(chosen)
    ]
    audit = LayerAudit(
        site=job.site,
        channels=width,
        dim=dim,
        experts=job.experts,
        activation=job.activation,
        note=job.note,
        alignment=float(found["cos"].flat[best]) if job.gate else None,
        channel=best % width if job.gate else None,
        expert=best // width if job.gate and job.experts else None,
        control=float(np.abs(found["control"]).max()) if job.gate else None,
        chance_level=None if effective is None else chance_level(size.size, effective),
        effective_dim=effective,
        gate_norm=float(np.median(found["gate"])) if job.gate else None,
        up_norm=float(np.median(found["up"])),
        down_norm=float(np.median(found["down"])),
        gain_ratio=float(ratio.max()),
        weights=weights,
    )
    return _Layer(audit, size.size if job.gate else 0, candidates)


def _largest(values: Array, top: int) -> list[int]:
    return [int(place) for place in np.argsort(values, axis=None, kind="stable")[::-1][:top]]


def _weight_audit(name: str, shape: tuple[int, ...], found: list[Matrix]) -> WeightAudit:
    count, power = sum(m.count for m in found), sum(m.power for m in found)
    fourth, amax = sum(m.fourth for m in found), float(np.max([m.amax for m in found]))
    rms = math.sqrt(power / count)
    rows = max(_outlier(m.row_amax, m.row_power, m.shape[1]) for m in found)
    columns = max(_outlier(m.column_amax, m.column_power, m.shape[0]) for m in found)
    survival = []
    if all(m.losses for m in found):
        survival = [_survival(recipe, found) for recipe in RECIPES]
    return WeightAudit(
        name=name,
        shape=shape,
        amax=amax,
        rms=rms,
        crest=amax / rms if rms > 0 else math.nan,
        kurtosis=fourth * count / power**2 if power > 0 else math.nan,
        row_ratio=rows[0],
        row=rows[1],
        row_crest=max(_crest(m.row_amax, m.row_power, m.shape[1]) for m in found),
        column_ratio=columns[0],
        column=columns[1],
        column_crest=max(_crest(m.column_amax, m.column_power, m.shape[0]) for m in found),
        survival=tuple(survival),
    )


def _outlier(amax: Array, power: Array, length: int) -> tuple[float, int]:
    """rms of the row with the largest over that of the median row, and which it is."""
    rms = np.sqrt(power / length)
    median = float(np.median(rms))
    hottest = int(rms.argmax())
    return (float(rms[hottest]) / median if median > 0 else 1.0), hottest


def _crest(amax: Array, power: Array, length: int) -> float:
    rms = np.sqrt(power / length)
    with np.errstate(invalid="ignore"):
        crest = np.divide(amax, rms, out=np.zeros_like(amax), where=rms > 0)
    return float(np.max(crest, initial=0.0))


def _survival(recipe: str, found: list[Matrix]) -> Survival:
    """Of the worst of the matrices, each cast as a tensor of its own."""
    shares = []
    for matrix in found:
        loss, nonzero = matrix.losses[recipe], matrix.count - matrix.zeros
        error = math.sqrt(loss.error / matrix.power) if matrix.power > 0 else 0.0
        shares.append((error, loss.flushed / max(nonzero, 1), loss.saturated / matrix.count))
    return survival_of(recipe, *(max(values) for values in zip(*shares, strict=True)))


def _norm_audit(name: str, bands: Bands) -> NormAudit:
    matrix, values = weigh(bands), bands.rows(0, 1).double().abs().numpy()[0]
    blocks = np.pad(values, (0, -len(values) % 32)).reshape(-1, 32).max(axis=1)
    mantissa = 2 * np.frexp(blocks[np.isfinite(blocks) & (blocks > 0)])[0]
    loss = matrix.losses.get("MXFP8 OCP floor")
    return NormAudit(
        name=name,
        count=len(values),
        blocks=float((mantissa > 1.75).mean()) if len(mantissa) else 0.0,
        clipped=loss.saturated / len(values) if loss else math.nan,
        relative_error=math.sqrt(loss.error / matrix.power) if loss and matrix.power else math.nan,
    )
