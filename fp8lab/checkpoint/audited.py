"""What an audit of a checkpoint says: results as values, and the findings that follow from them.

Thresholds stand here, each with its source; where none is published, it says that it is ours. An
audit sees weights alone, so a finding says what may happen when they meet data and FP8, never that
it did: `diagnose` says that, of a run. No torch: what is judged are numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fp8lab.record import SEVERITIES, Evidence, Finding, Severity

RECIPE_NAMES = ("current", "rowwise", "block 128x128", "MXFP8", "MXFP8 OCP floor", "NVFP4")
# E4M3's own relative error is 2.66 %, and doubles with every mantissa bit less; twice that is lost.
LARGEST_ERROR = dict.fromkeys(RECIPE_NAMES, 0.0532) | {"NVFP4": 4 * 0.0532}
# Ours. E2M1 flushes a tenth of a normal distribution, which its error counts.
LARGEST_FLUSHED = dict.fromkeys(RECIPE_NAMES, 0.01) | {"NVFP4": 1.0}
LARGEST_SATURATED = dict.fromkeys(RECIPE_NAMES, 0.05) | {"NVFP4": 1.0}
# Ours: no threshold is published. By chance 0.08 of a Llama-7B's 352,256 pairs.
ALIGNED = 0.5
SIGNIFICANT = 0.01
# As everywhere in fp8lab: beyond 16 times the median a channel is none of the bulk.
HOT = 16.0
# Ours, an octave below: an aligned channel of less gain is a note. Alignment alone doubles a gain,
# the rest is norms that grow. Chosen on a few trainings, then held against others (seeds 100 to 105
# of small Llamas, Mistrals and Qwen2s on bytes with AdamW; 200 to 211 of the rare-token
# regression). False alarms: 1 of 18 at learning rates of 3e-4 and 1e-3 (10.9), 1 of 12 regressions
# in BF16 (22.9). True ones: 6 of 6 at 3e-3 without warm-up; of the 10 regressions that delayed
# scaling lost, 4 two hundred steps before the end, 8 a hundred, all ten before. At 6 the 18 have 7
# false alarms, at 12 only 6 of the 10 have one a hundred steps before. It is of gains, not of
# products with data: these were beyond 8 in 9 of the 18, beyond 16 in 6, and in all 6 at 3e-3.
GROWN = 8.0
CLIPPED_BLOCKS = 0.5


@dataclass(frozen=True, kw_only=True)
class Survival:
    """What a recipe's cast does to a weight: sqrt(error power / power), the shares of non-zero
    elements flushed and of elements saturated; `why` it does not survive, "" if it does."""

    recipe: str
    relative_error: float
    flushed: float
    saturated: float
    why: str

    @property
    def survives(self) -> bool:
        """Whether all of the three are within their limits."""
        return not self.why


@dataclass(frozen=True, kw_only=True)
class WeightAudit:
    """A matrix, or those of a layer's experts together (the ratios: of the worst of them).

    `crest` is amax / rms, `kurtosis` mean(x⁴)/mean(x²)², uncentred; `row_ratio` the rms of the row
    with the largest over the median row's, `row` which, `row_crest` the largest amax / rms of a
    row, and so for columns. `survival` is empty where casts were not asked for or not possible.
    """

    name: str
    shape: tuple[int, ...]
    amax: float
    rms: float
    crest: float
    kurtosis: float
    row_ratio: float
    row: int
    row_crest: float
    column_ratio: float
    column: int
    column_crest: float
    survival: tuple[Survival, ...]


@dataclass(frozen=True, kw_only=True)
class Channel:
    """A channel to watch: its cosine, what chance makes of it (corrected), norms of its gate row,
    up row and down column, its gain over the layer's median, `why`; and of a product that was seen,
    its amax over the median channel's."""

    site: str
    expert: int | None
    channel: int
    alignment: float
    p_value: float
    gate_norm: float
    up_norm: float
    down_norm: float
    gain_ratio: float
    why: tuple[str, ...] = ()
    product_ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class LayerAudit:
    """A feed-forward. `alignment` is the cosine largest in magnitude and `channel` whose, `control`
    the largest magnitude among the permuted pairs, `chance_level` what the largest of so many
    random pairs in `effective_dim` dimensions exceeds one time in twenty. All None without a gate.
    Norms are medians over channels; `note` says what names and shapes leave open."""

    site: str
    channels: int
    dim: int
    experts: int
    activation: str
    note: str
    alignment: float | None
    channel: int | None
    expert: int | None
    control: float | None
    chance_level: float | None
    effective_dim: float | None
    gate_norm: float | None
    up_norm: float
    down_norm: float
    gain_ratio: float
    weights: tuple[WeightAudit, ...]


@dataclass(frozen=True, kw_only=True)
class NormAudit:
    """The weight of a norm, [count], under MXFP8 with OCP's floor: the share of blocks of 32 whose
    largest mantissa is beyond 1.75, of elements clipped, and the relative error (2506.20752)."""

    name: str
    count: int
    blocks: float
    clipped: float
    relative_error: float


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What `audit` found; `not_audited` has tensors by name and why."""

    path: str
    layers: tuple[LayerAudit, ...]
    weights: tuple[WeightAudit, ...]
    norms: tuple[NormAudit, ...]
    channels: tuple[Channel, ...]
    not_audited: dict[str, str]
    findings: tuple[Finding, ...]

    @property
    def severe(self) -> bool:
        """Whether a finding is of high severity."""
        return any(finding.severity == "high" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each feed-forward: what the command line prints."""
        return [_row(layer) for layer in self.layers]

    def __str__(self) -> str:
        lines = [f"{self.path}: {len(self.layers)} feed-forwards, {len(self.weights)} more weights"]
        lines += [f"note: {note}" for note in sorted({one.note for one in self.layers} - {""})][:3]
        reasons = sorted(set(self.not_audited.values()))
        lines += [f"not audited: {reason}" for reason in reasons[:3]]
        alike: dict[tuple[str, ...], list[str]] = {}
        for one in self.findings:  # of notes that say the same of many weights, one
            note = (one.cause, one.remedy) if one.severity == "low" else (one.cause, str(one.site))
            alike.setdefault(note, []).append(one.site or self.path)
            if len(alike[note]) == 1:
                lines += [f"[{one.severity}] {one.cause} at {alike[note][0]}", f"  {one.summary}"]
                lines += [f"  remedy: {one.remedy}", f"  cannot exclude: {one.cannot_exclude}"]
        lines += [
            f"[low] {cause}: the same at {len(sites) - 1} more: {', '.join(sites[1:4])}, …"
            for (cause, _), sites in alike.items()
            if len(sites) > 1
        ]
        return "\n".join(lines if self.findings else [*lines, "nothing found"])


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _row(layer: LayerAudit) -> dict[str, Any]:
    lost = {s.recipe: s for w in layer.weights for s in w.survival if not s.survives}
    cast = all(weight.survival for weight in layer.weights)
    survived = ", ".join(name for name in RECIPE_NAMES if name not in lost) or "none"
    return {
        "layer": layer.site,
        "alignment": None if layer.channel is None else f"{layer.alignment:.3f} of {layer.channel}",
        "control, chance": f"{_short(layer.control)}, {_short(layer.chance_level)}",
        "norms": ", ".join(map(_short, (layer.gate_norm, layer.up_norm, layer.down_norm))),
        "gain": layer.gain_ratio,
        "crest": max(weight.crest for weight in layer.weights),
        "kurtosis": max(weight.kurtosis for weight in layer.weights),
        "survives": ("all" if not lost else survived) if cast else None,
    }


def survival_of(recipe: str, relative_error: float, flushed: float, saturated: float) -> Survival:
    """Whether a weight of which a recipe's cast loses so much survives it."""
    held = (
        ("relative error", relative_error, LARGEST_ERROR[recipe]),
        ("flushed", flushed, LARGEST_FLUSHED[recipe]),
        ("saturated", saturated, LARGEST_SATURATED[recipe]),
    )
    why = ", ".join(f"{name} {value:.2g} > {most:g}" for name, value, most in held if value > most)
    return Survival(
        recipe=recipe,
        relative_error=relative_error,
        flushed=flushed,
        saturated=saturated,
        why=why,
    )


def corrected(probability: float, pairs: int) -> float:
    """The probability that the most extreme of `pairs` independent pairs is as extreme (Šidák)."""
    if not probability < 1.0:
        return probability
    return -math.expm1(pairs * math.log1p(-probability))


def judged(candidates: Sequence[Channel], pairs: int) -> list[Channel]:
    """Those of the channels that are worth watching, worst first, each with why; p-values, of a
    single pair in `candidates`, are corrected for all `pairs`."""
    channels = []
    for channel in candidates:
        p_value = corrected(channel.p_value, pairs)
        why = []
        if p_value < SIGNIFICANT:
            why.append(f"cosine of its rows {channel.alignment:.3f}, by chance {p_value:.1g}")
        if channel.gain_ratio >= HOT:
            why.append(f"gain {channel.gain_ratio:.3g} times the median channel's")
        if why:
            channels.append(replace(channel, p_value=p_value, why=tuple(why)))
    return sorted(channels, key=_rank)


def _rank(channel: Channel) -> tuple[float, float]:
    aligned = 1.0 if math.isnan(channel.alignment) else 1.0 + abs(channel.alignment)
    return (-channel.gain_ratio * aligned, channel.channel)


def findings_of(
    channels: Iterable[Channel], weights: Iterable[WeightAudit], norms: Sequence[NormAudit]
) -> tuple[Finding, ...]:
    """What follows, worst first."""
    found = [finding for channel in channels if (finding := _of_channel(channel))]
    found += [finding for weight in weights for finding in _of_weight(weight)]
    found += _of_norms(norms)
    return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


def _of_channel(channel: Channel) -> Finding | None:
    aligned = abs(channel.alignment) >= ALIGNED and channel.p_value < SIGNIFICANT
    hot, product = channel.gain_ratio >= HOT, channel.product_ratio
    seen_hot = product is not None and product >= HOT
    if not aligned and not hot:
        return None
    grown = channel.gain_ratio >= GROWN or seen_hot
    severity: Severity = "high" if aligned and (hot or seen_hot) else "medium" if grown else "low"
    limit = HOT if hot or not aligned else GROWN
    evidence = [
        _evidence(channel.site, "gain over the median channel's", channel.gain_ratio, limit)
    ]
    if not math.isnan(channel.alignment):
        cosine = abs(channel.alignment)
        evidence.insert(0, _evidence(channel.site, "|cosine| of gate and up", cosine, ALIGNED))
    if product is not None:
        evidence.append(_evidence(channel.site, "product amax over the median's", product, HOT))
    expert = "" if channel.expert is None else f" of expert {channel.expert}"
    return Finding(
        cause="gate_up_alignment" if aligned else "hot_channel",
        summary=f"channel {channel.channel}{expert}: {'; '.join(channel.why)}",
        severity=severity,
        confidence="high" if seen_hot else "medium" if aligned and hot else "low",
        site=channel.site,
        channel=channel.channel,
        evidence=tuple(evidence),
        remedy="SmoothSwiGLU or the product in BF16; no per-tensor scale for down's input"
        if grown
        else "none yet: its gain is ordinary; audit a later checkpoint, and see whether it grows",
        cannot_exclude="a channel that data never reach: weights alone do not say what is activated"
        if not seen_hot
        else "that the sample is unlike the training data",
    )


def _evidence(site: str, quantity: str, value: float, threshold: float) -> Evidence:
    return Evidence(step=0, site=site, quantity=quantity, value=value, threshold=threshold)


def _of_weight(weight: WeightAudit) -> list[Finding]:
    if not weight.amax < math.inf:
        return [
            Finding(
                cause="nonfinite_weights",
                summary=f"{weight.name} has infinities or NaN",
                severity="high",
                confidence="high",
                site=weight.name,
                remedy="an earlier checkpoint",
                cannot_exclude="that they were written so by a broken save",
            )
        ]
    lost = [one for one in weight.survival if not one.survives]
    if not lost:
        return []
    severity: Severity = "high" if any(one.recipe == "current" for one in lost) else "medium"
    if all(one.recipe == "MXFP8 OCP floor" for one in lost):
        severity = "low"
    whys = "; ".join(f"{one.recipe}: {one.why}" for one in lost)
    good = [one.recipe for one in weight.survival if one.survives]
    return [
        Finding(
            cause="weights_lost",
            summary=f"{weight.name} does not survive {whys}",
            severity=severity,
            confidence="high",
            site=weight.name,
            evidence=tuple(
                _evidence(
                    weight.name,
                    f"relative error under {one.recipe}",
                    one.relative_error,
                    LARGEST_ERROR[one.recipe],
                )
                for one in lost
            ),
            remedy=f"it survives {', '.join(good)}" if good else "keep it in BF16",
            cannot_exclude="that the elements lost do not matter",
        )
    ]


def _of_norms(norms: Sequence[NormAudit]) -> list[Finding]:
    """One for all: they are alike, and there are two a layer."""
    risky = [norm for norm in norms if norm.blocks > CLIPPED_BLOCKS]
    if not risky:
        return []
    worst = max(risky, key=lambda norm: norm.clipped)
    return [
        Finding(
            cause="mx_shared_exponent_clipping",
            summary=f"{len(risky)} of {len(norms)} weights of norms have blocks whose largest "
            f"mantissa is beyond 1.75; of {worst.name} OCP's floor clips {worst.clipped:.1%}",
            severity="low",
            confidence="high",
            site=worst.name,
            evidence=(_evidence(worst.name, "blocks beyond 1.75", worst.blocks, CLIPPED_BLOCKS),),
            remedy="weights of norms in BF16, or MXFP8's scale rounded up",
            cannot_exclude="that nobody casts weights of norms: Transformer Engine does not",
        )
    ]
