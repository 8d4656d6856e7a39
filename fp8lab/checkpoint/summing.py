"""What an audit says of matrices that have been weighed: of one, of those of a feed-forward, of the
weight of a norm.

All of it is numpy over a number for each row, column or channel, and costs little beside weighing:
medians and the largest are found by partitions. Rejected: to sort every channel, which shows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fp8lab.checkpoint.audited import (
    Channel,
    LayerAudit,
    NormAudit,
    Survival,
    WeightAudit,
    survival_of,
)
from fp8lab.checkpoint.weighing import (
    RECIPES,
    Array,
    Bands,
    Matrix,
    Pairs,
    chance,
    chance_level,
    weigh,
)


class FeedForward(NamedTuple):
    """What is known of a feed-forward before it is weighed; `experts` is 0 of a dense one."""

    site: str
    experts: int
    activation: str
    note: str
    gated: bool


class LayerFound(NamedTuple):
    """A feed-forward's audit, how many pairs of gate and up it has, its channels to judge."""

    audit: LayerAudit
    pairs: int
    candidates: list[Channel]


class Expert(NamedTuple):
    """Matrices by role, and a number for each channel by quantity, of one expert."""

    matrices: dict[str, Matrix]
    channels: dict[str, Array]


def channels_of(weighed: dict[str, Matrix], pairs: Pairs | None) -> dict[str, Array]:
    """Norms, gain and cosines of an expert's channels, [channels] each."""
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


def layer_found(
    job: FeedForward,
    found: dict[str, Array],
    shape: tuple[int, int],
    weights: tuple[WeightAudit, ...],
    top: int,
) -> LayerFound:
    """What is said of a feed-forward: numbers by quantity [experts, channels], `shape` that of up;
    of channels only those that may be worth watching are kept."""
    median = float(np.median(found["gain"]))
    with np.errstate(invalid="ignore"):  # infinite weights are a finding of their own
        ratio = found["gain"] / median if median > 0 else np.ones_like(found["gain"])
    width, dim = shape
    size = np.abs(found["cos"]) if job.gated else ratio
    best = int(size.argmax())
    chosen = {*_largest(size, top), *_largest(ratio, top)} if job.gated else {*_largest(ratio, top)}
    effective = None
    if job.gated:
        effective = min(float(dim), 1.0 / max(float((found["control"] ** 2).mean()), 1e-30))
    candidates = [
        Channel(
            site=job.site,
            expert=place // width if job.experts else None,
            channel=place % width,
            alignment=float(found["cos"].flat[place]) if job.gated else math.nan,
            p_value=math.nan if effective is None else chance(float(size.flat[place]), effective),
            gate_norm=float(found["gate"].flat[place]) if job.gated else math.nan,
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
        alignment=float(found["cos"].flat[best]) if job.gated else None,
        channel=best % width if job.gated else None,
        expert=best // width if job.gated and job.experts else None,
        control=float(np.abs(found["control"]).max()) if job.gated else None,
        chance_level=None if effective is None else chance_level(size.size, effective),
        effective_dim=effective,
        gate_norm=float(np.median(found["gate"])) if job.gated else None,
        up_norm=float(np.median(found["up"])),
        down_norm=float(np.median(found["down"])),
        gain_ratio=float(ratio.max()),
        weights=weights,
    )
    return LayerFound(audit, size.size if job.gated else 0, candidates)


def _largest(values: Array, top: int) -> list[int]:
    flat = values.reshape(-1)
    # Few are sorted: those that are not below the one which is the last of the largest.
    places = np.flatnonzero(~(flat < np.partition(flat, -top)[-top])) if top < flat.size else None
    if places is None:
        places = np.arange(flat.size)
    return [int(n) for n in places[np.argsort(flat[places], kind="stable")[::-1][:top]]]


def weight_audit(name: str, shape: tuple[int, ...], found: list[Matrix]) -> WeightAudit:
    """What is said of a matrix, or of those of several experts together."""
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


def norm_audit(name: str, bands: Bands) -> NormAudit:
    """What is said of the weight of a norm, bands of one row."""
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
