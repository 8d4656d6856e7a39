"""Who tells first: our sentinel and rule beside the detectors of the literature, on recorded rows.

Each detector is a score per step, taken from a run's rows as an online monitor would have had them;
it alarms in the steps in which the score is above its threshold. On gate scenarios the lead is the
number of steps from its first alarm, at the onset or later, to the step in which the loss tells
(`diagnosis.loss`); a run in which it is silent until then has a lead of 0 and lowers the share
detected. On healthy controls every alarm is false. A threshold trades one for the other, so a
detector is a curve, and its published threshold a point on it; some have none.

All are as published but for what small runs cannot have: OLMo's window of 1,000 steps is what there
is of it, and statistics begin after 25 steps, ZClip's warm-up. The comparison is on our scenarios,
whose outlier is the gate product's; it says nothing of loss spikes that begin elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fp8lab.diagnosis import delayed_saturation
from fp8lab.diagnosis.loss import loss_alarm
from fp8lab.diagnosis.rows import Loaded, Names, Rows
from fp8lab.lab.scenarios import Drawn
from fp8lab.record import CLIPPED_STALENESS, SEVERITIES
from fp8lab.report.drawing import ARM_STYLES, QUIET, handles, new_figure, style, to_png
from fp8lab.store import open_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = Path(__file__).resolve().parents[1] / "reports" / "diagnosis_lead.png"
WARM_UP = 25
BUDGETS = (1.0, 10.0)  # false alarms per 10,000 healthy steps
Series = NDArray[np.float64]


# --- scores: float64 [steps], NaN where the detector has nothing to say ---------------------------


def of_products(column: str) -> Callable[[Rows], Series]:
    """The largest of a column over all gate products."""

    def score(run: Rows) -> Series:
        rows = run.tensors((column, "step", "site"), sites="*:product")
        return on_steps(run, rows.groupby("step")[column].max())

    return score


def of_steps(column: str) -> Callable[[Rows], Series]:
    def score(run: Rows) -> Series:
        return on_steps(run, run.steps((column, "step")).groupby("step")[column].max())

    return score


def on_steps(run: Rows, values: pd.Series) -> Series:
    """The values on the steps of the run, one after another."""
    steps = np.unique(run.steps(("step", "loss"))["step"])
    return values.reindex(steps).to_numpy(dtype=float)


def gradient_z_score(run: Rows) -> Series:
    """ZClip, 2504.02507: moving mean and variance of the gradient norm, alpha 0.97, after a
    warm-up of 25 steps; a norm beyond z = 2.5 enters them as mean + std z^2 / its z."""
    norms = of_steps("grad_norm")(run)
    scores = np.full(len(norms), np.nan)
    known = norms[:WARM_UP][np.isfinite(norms[:WARM_UP])]
    if len(known) < 2:
        return scores
    mean, variance = known.mean(), known.var()
    for step in range(WARM_UP, len(norms)):
        deviation = np.sqrt(variance) + 1e-12
        scores[step] = (norms[step] - mean) / deviation
        if not np.isfinite(norms[step]):
            scores[step] = np.inf if not np.isnan(norms[step]) else np.nan
            continue
        entering = norms[step]
        if scores[step] > 2.5:
            entering = mean + deviation * 2.5**2 / scores[step]
        mean = 0.97 * mean + 0.03 * entering
        variance = 0.97 * variance + 0.03 * (entering - mean) ** 2
    return scores


def loss_z_score(window: int) -> Callable[[Rows], Series]:
    """Standard deviations of the loss above the mean of up to `window` steps before."""

    def score(run: Rows) -> Series:
        losses = pd.Series(of_steps("loss")(run))
        before = losses.shift(1).rolling(window, min_periods=WARM_UP)
        with np.errstate(all="ignore"):
            return ((losses - before.mean()) / before.std()).to_numpy(dtype=float)

    return score


class Until:
    """The rows of a run up to a step, as they were when it ended."""

    def __init__(self, run: Rows, last: int) -> None:
        self.path, self.info = run.path, run.info
        self._run, self._last = run, last

    def _cut(self, frame: pd.DataFrame) -> pd.DataFrame:
        return frame[frame["step"] <= self._last]

    def steps(self, columns: Names = None) -> pd.DataFrame:
        return self._cut(self._run.steps(columns))

    def tensors(self, columns: Names = None, *, sites: Names = None) -> pd.DataFrame:
        return self._cut(self._run.tensors(columns, sites=sites))

    def channels(self, columns: Names = None, *, sites: Names = None) -> pd.DataFrame:
        return self._cut(self._run.channels(columns, sites=sites))

    def events(self) -> pd.DataFrame:
        return self._cut(self._run.events())


def rule_online(run: Rows) -> Series:
    """Our rule in each step on the rows up to it: 1 low, 2 medium, 3 high in the step in which its
    worst finding becomes that, NaN else. Where no product is clipped it has nothing to read."""
    steps = np.unique(run.steps(("step", "loss"))["step"])
    scores = np.full(len(steps), np.nan)
    if not np.nanmax(of_products("staleness")(run), initial=0.0) > CLIPPED_STALENESS:
        return scores
    worst = 0
    for number, step in enumerate(steps):
        found = delayed_saturation.find(Until(run, int(step)), None)
        now = max((3 - SEVERITIES.index(finding.severity) for finding in found), default=0)
        if now > worst:
            worst = now
            scores[number] = now
    return scores


@dataclass(frozen=True, kw_only=True)
class Detector:
    """A score, and the threshold that its source gives, None where there is none."""

    name: str
    score: Callable[[Rows], Series]
    threshold: float | None
    source: str


DETECTORS = (
    Detector(
        name="staleness of the product",
        score=of_products("staleness"),
        threshold=CLIPPED_STALENESS,
        source="fp8lab, kept at every step",
    ),
    Detector(
        name="rule delayed_saturation, online",
        score=rule_online,
        threshold=1.0,
        source="fp8lab, medium or high",
    ),
    Detector(
        name="product saturated",
        score=of_products("saturated"),
        threshold=1e-5,
        source="FP8-LM, 2310.18313",
    ),
    Detector(
        name="kurtosis of the product",
        score=of_products("kurtosis"),
        threshold=None,
        source="FOG, 2505.20524: no number given",
    ),
    Detector(
        name="RMS_t", score=of_steps("rms_t"), threshold=2.3, source="StableAdamW, 2304.13013; Adam"
    ),
    Detector(name="gradient norm, z-score", score=gradient_z_score, threshold=2.5, source="ZClip"),
    Detector(
        name="loss, sigmas of 1,000 steps",
        score=loss_z_score(1000),
        threshold=7.0,
        source="OLMo's spike score",
    ),
    Detector(
        name="loss, sigmas of 50 steps",
        score=loss_z_score(50),
        threshold=3.2,
        source="mean + 3.2 std, 2304.13013",
    ),
)


# --- lead and false alarms ------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a detector does at a threshold: the lead of each run that diverges (0 if it was silent),
    the number of false alarms per 10,000 healthy steps."""

    threshold: float
    leads: Series
    false_alarms: float

    @property
    def median_lead(self) -> float:
        return float(np.median(self.leads)) if len(self.leads) else 0.0

    @property
    def detected(self) -> float:
        return float(np.mean(self.leads > 0)) if len(self.leads) else 0.0


@dataclass(frozen=True)
class Scored:
    """A detector's scores on all runs: of a gate scenario those from its onset until the loss
    told, so that a lead is how many are left when the first is above the threshold."""

    detector: Detector
    diverging: list[Series]
    healthy: Series

    def at(self, threshold: float) -> Outcome:
        leads = [_lead(scores, threshold) for scores in self.diverging]
        alarms = float(np.sum(self.healthy > threshold))
        rate = 1e4 * alarms / max(1, len(self.healthy))
        return Outcome(threshold, np.asarray(leads, dtype=float), rate)

    def curve(self) -> list[Outcome]:
        """From the strictest threshold to the laxest; the threshold is a score that occurs."""
        scores = np.concatenate([*self.diverging, self.healthy])
        scores = np.unique(scores[np.isfinite(scores)])
        if len(scores) > 200:
            scores = np.unique(np.quantile(scores, np.linspace(0, 1, 400) ** 0.25))
        return [self.at(float(score)) for score in scores[::-1]]

    def within(self, budget: float) -> Outcome | None:
        """The longest median lead for at most so many false alarms."""
        allowed = [one for one in self.curve() if one.false_alarms <= budget]
        return max(allowed, key=lambda one: (one.median_lead, one.detected), default=None)


def _lead(scores: Series, threshold: float) -> int:
    above = np.flatnonzero(scores > threshold)
    return len(scores) - int(above[0]) if len(above) else 0


def scored(gate_draws: Iterable[Drawn], healthy_draws: Iterable[Drawn]) -> list[Scored]:
    """Every detector's scores; gate draws whose loss never tells are left out."""
    diverging: list[list[Series]] = [[] for _ in DETECTORS]
    healthy: list[list[Series]] = [[np.empty(0)] for _ in DETECTORS]
    for drawn in gate_draws:
        run = Loaded(open_run(drawn.run))
        alarm, onset = loss_alarm(run), drawn.label.onset or 0
        if alarm is None or alarm <= onset:
            continue
        steps = np.unique(run.steps(("step", "loss"))["step"])
        chosen = (steps >= onset) & (steps < alarm)
        for number, detector in enumerate(DETECTORS):
            diverging[number].append(detector.score(run)[chosen])
    for drawn in healthy_draws:
        run = Loaded(open_run(drawn.run))
        for number, detector in enumerate(DETECTORS):
            healthy[number].append(detector.score(run))
    return [
        Scored(detector, ours, np.concatenate(controls))
        for detector, ours, controls in zip(DETECTORS, diverging, healthy, strict=True)
    ]


# --- the table and the picture --------------------------------------------------------------------


def detector_lines(gate_draws: Iterable[Drawn], healthy_draws: Iterable[Drawn]) -> list[str]:
    """Markdown: a row a detector; draws `reports/diagnosis_lead.png`, to which it links."""
    every = scored(gate_draws, healthy_draws)
    runs, steps = len(every[0].diverging), len(every[0].healthy)
    if not runs or not steps:
        return [f"Not measured: {runs} gate runs that diverge, {steps} healthy steps."]
    draw(every, PICTURE)
    span = np.median([len(one) for one in every[0].diverging])
    lines = [
        f"{runs} gate runs whose loss tells in the end, a median of {span:.0f} steps after the "
        f"onset; {steps:,} steps of healthy controls. The lead is from the first alarm at the "
        "onset or later to the step in which the loss tells, the median over all of these runs: a "
        "run in which the detector is silent until then counts as 0. Every step of a healthy "
        "control in which it is above its threshold is a false alarm. The onset is the first "
        "clipped step, which is what the staleness tells by definition: no detector can lead it.",
        "",
        f"![lead time against false alarms](<{PICTURE.name}>)",
        "",
        "| detector | its threshold | median lead | detected | false alarms per 10,000 steps "
        + "".join(f"| lead at ≤ {budget:g} false alarms " for budget in BUDGETS)
        + "| threshold from |",
        "|---|---|---|---|---" + "|---" * len(BUDGETS) + "|---|",
    ]
    return lines + [_row(one) for one in every]


def _row(one: Scored) -> str:
    told = "| – | – | – | – "
    if one.detector.threshold is not None:
        found = one.at(one.detector.threshold)
        told = (
            f"| {found.threshold:g} | {found.median_lead:.0f} | {found.detected:.0%} "
            f"| {found.false_alarms:.1f} "
        )
    for budget in BUDGETS:
        best = one.within(budget)
        told += (
            "| 0 "
            if best is None
            else f"| {best.median_lead:.0f} ({best.detected:.0%}, above {best.threshold:.3g}) "
        )
    return f"| {one.detector.name} {told}| {one.detector.source} |"


def draw(every: list[Scored], path: Path) -> Path:
    """Median lead against false alarms, a line a detector, its own threshold a marker."""
    least = 1e4 / len(every[0].healthy)  # one alarm in all
    none = least / 3  # where a log axis shows zero
    with style():
        figure = new_figure(5.4)
        axes = figure.subplots()
        keys = {}
        for one, (colour, dash, marker) in zip(every, ARM_STYLES, strict=True):
            front = _front(one)
            x = np.maximum([found.false_alarms for found in front], none)
            leads = np.array([found.median_lead for found in front])
            x, leads = np.append(x, 1e4), np.append(leads, leads[-1])
            axes.step(x, leads, where="post", color=colour, linestyle=dash, linewidth=1.6)
            if one.detector.threshold is not None:
                at = one.at(one.detector.threshold)
                axes.plot(
                    [max(at.false_alarms, none)],
                    [at.median_lead],
                    marker=marker,
                    markersize=8,
                    color=colour,
                    markeredgecolor="white",
                    clip_on=False,
                    zorder=5,
                )
            keys[one.detector.name] = (colour, dash, marker if one.detector.threshold else "")
        _label(axes, none)
        figure.legend(handles(keys), list(keys), loc="outside upper left", ncols=3)
        path.write_bytes(to_png(figure))
        return path


def _front(one: Scored) -> list[Outcome]:
    """Of the curve what is best for its number of false alarms; begins at none."""
    best = [Outcome(np.inf, np.zeros(1), 0.0)]
    for found in sorted(one.curve(), key=lambda found: (found.false_alarms, -found.median_lead)):
        if found.median_lead > best[-1].median_lead:
            best.append(found)
    return best


def _label(axes: Axes, none: float) -> None:
    axes.set_xscale("log")
    axes.set_xlim(none, 1e4)
    ticks = [10.0**power for power in range(-1, 5) if 10.0**power > 2 * none]
    axes.set_xticks([none, *ticks], ["none", *(f"{tick:,.10g}" for tick in ticks)])
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("false alarms per 10,000 healthy steps")
    axes.set_ylabel("median steps before the loss tells")
    axes.set_title(
        "How early a detector tells, and at what price; a marker: the threshold of its source"
    )
    axes.axvspan(none, none * 1.8, color=QUIET, alpha=0.08, linewidth=0)
