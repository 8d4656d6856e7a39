"""The pictures of a training: rows in, a drawn figure out, or one line that says what is missing.

Each function is one picture and picks its own columns; what they share, from the palette to the
log axis, is in `drawing`. What is inside one step is in `pictures_of_layers` and
`pictures_of_casts`. All of them are called under `drawing.style`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fp8lab.comparison import loss_name
from fp8lab.diagnosis.twin import Divergence
from fp8lab.record import CLIPPED_STALENESS
from fp8lab.report.drawing import (
    BLUE,
    FAINT,
    INK,
    LONG,
    ORANGE,
    QUIET,
    RED,
    handles,
    legend,
    line,
    log_axis,
    mark,
    new_figure,
    plain,
    points,
    power_of_ten,
    say_if_empty,
    step_axis,
    track,
    wrapped,
)
from fp8lab.report.story import Part, Place, Seen
from fp8lab.report.verdict import in_words

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOST = 30.0  # a loss beyond this multiple of where it started is drawn at the top
NAMED_CAUSES = 4  # of a timeline; each has a line through all panels


def ceiling(starts: Iterable[float]) -> float:
    """The height above which a loss, or a norm, is drawn at the top; where none of these is
    positive there is no multiple of them, and nothing is cut off."""
    start = max(starts, default=0.0)
    return LOST * start if start > 0 else np.inf


def losses(part: Part) -> Figure | str:
    """Loss of every run and below it the gradient norm, two panels an arm; the same training in
    high precision lies behind, and alarms are marked where they were."""
    loss = loss_name(run.steps for run in part.runs)
    curves = {run.label: _loss(run, loss) for run in part.runs}
    arms = [arm for arm in part.arms if any(len(curves[run.label][0]) for run in arm.runs)]
    if not arms:
        return "no finite loss was recorded"
    norms = {run.label: points(run.steps, "grad_norm") for run in part.runs}
    top = ceiling(float(curve[0]) for _, curve in curves.values() if len(curve))
    kinds = [(curves, top, loss)]
    if any(len(norm) for _, norm in norms.values()):
        kinds.append((norms, _calm_top(part, norms), "gradient norm"))
    columns, each = min(4, len(arms)), len(kinds)
    rows = -(-len(arms) // columns)
    figure = new_figure((2.0 if each == 1 else 3.3) * rows + 0.9)
    heights = [1.0, 0.65][:each] * rows
    grid = figure.subplots(
        each * rows, columns, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for kind, (lines, top, name) in enumerate(kinds):
        panels = grid[kind::each].ravel()
        for axes in panels[1:]:
            axes.sharey(panels[0])
        for position, (axes, arm) in enumerate(zip(panels, arms, strict=False)):
            reference = part.reference_of(arm)
            for run in () if reference is None else reference.runs:
                x, values = lines[run.label]
                line(axes, x, np.minimum(values, top), color=FAINT, linewidth=0.5)
            for run in arm.runs:
                _run_line(axes, run, *lines[run.label], top)
            if kind == 0:
                axes.set_title(wrapped(arm.title), fontsize=9)
            axes.set_ylabel("" if position % columns else plain(name))
            last = kind == each - 1 and position + columns >= len(arms)
            axes.tick_params(labelleft=not position % columns, labelbottom=last)
        everything = [values for _, values in lines.values()]
        log_axis(panels[0].yaxis, np.minimum(np.concatenate(everything), top))
        for axes in panels[len(arms) :]:
            axes.set_visible(False)
    step_axis(grid[0, 0])
    figure.supxlabel("step", fontsize=9.5)
    keys = _loss_keys(part)
    figure.legend(handles(keys), list(keys), loc="outside upper right", ncols=3)
    return figure


def _run_line(axes: Axes, run: Seen, x: Any, values: Any, top: float) -> None:
    """A run by how it ended, its end if it was lost, and its alarms on it."""
    lost = run.diverged_at is not None
    colour = RED if lost else BLUE if run.decided else ORANGE
    values = np.minimum(values, top)
    line(axes, x, values, color=colour, linewidth=0.7)
    if lost and len(x):
        axes.plot(x[-1], values[-1], "X", color=RED, markersize=6.5, clip_on=False, zorder=5)
    for step, marker in (run.diagnosis.first_alarm, "v"), (run.diagnosis.loss_alarm, "s"):
        if step is not None and (x <= step).any():
            mark(axes, [step], [values[x <= step][-1]], marker)


def _loss_keys(part: Part) -> dict[str, tuple[str, str, str]]:
    keys: dict[str, tuple[str, str, str]] = {}
    if any(run.decided and run.diverged_at is None for run in part.runs):
        keys["survived"] = (BLUE, "-", "")
    if any(run.diverged_at is not None for run in part.runs):
        keys["diverged, × its end"] = (RED, "-", "X")
    if any(not run.decided for run in part.runs):
        keys["not finished"] = (ORANGE, "-", "")
    if any(part.reference_of(arm) is not None for arm in part.arms):
        keys["the same in high precision"] = (FAINT, "-", "")
    if any(run.diagnosis.first_alarm is not None for run in part.runs):
        keys["first finding"] = (INK, "", "v")
    if any(run.diagnosis.loss_alarm is not None for run in part.runs):
        keys["the loss's own alarm"] = (INK, "", "s")
    return keys


def _calm_top(part: Part, curves: Mapping[str, tuple[Any, Any]]) -> float:
    """A multiple of the largest value before any loss told; what is beyond lies at the top."""
    calm = []
    for run in part.runs:
        (x, values), alarm = curves[run.label], run.diagnosis.loss_alarm
        calm.append(values if alarm is None else values[x < alarm])
    return ceiling(np.concatenate(calm).tolist())


def _loss(run: Seen, name: str) -> tuple[Any, Any]:
    return points(run.steps, name) if name in run.steps else (np.array([]), np.array([]))


def timeline(run: Seen, place: Place) -> Figure | str:
    """One run on one clock: alignment, amplification, product, staleness, what the cast lost,
    gradient norm, loss; findings are lines through all of them."""
    rows = run.products[run.products["site"] == place.site]
    if rows.empty:
        return f"{run.label} has no row of {place.site}"
    marks = _marks(run)
    named = 0.22 * max(1, len(marks))
    heights = [named, 1.0, 0.8, 1.25, 1.0, 0.9, 0.9, 0.9]
    figure = new_figure(1.45 * sum(heights[1:]) + named)
    grid = figure.subplots(8, 1, sharex=True, gridspec_kw={"height_ratios": heights})
    strip, panels = grid[0], grid[1:]
    _alignment_panel(panels[0], run, place)
    _amplification_panel(panels[1], rows)
    _product_panel(panels[2], rows)
    _staleness_panel(panels[3], rows)
    _cast_panel(panels[4], rows)
    _growth_panel(panels[5], run, "Gradient norm", {"grad_norm": INK})
    looks = {"loss": INK} | ({"common_loss": ORANGE} if "common_loss" in run.steps else {})
    _growth_panel(panels[6], run, "Loss", looks)
    panels[-1].set_xlabel("step")
    step_axis(panels[-1])
    steps = run.steps["step"] if len(run.steps) else rows["step"]
    margin = 0.5 + 0.008 * float(steps.max() - steps.min())
    panels[-1].set_xlim(float(steps.min()) - margin, float(steps.max()) + margin)
    _draw_marks(strip, panels, marks)
    for axes in panels:
        axes.yaxis.set_label_coords(-0.055, 0.5)
    return figure


def _alignment_panel(axes: Axes, run: Seen, place: Place) -> None:
    beside = run.channels[run.channels["site"] == place.module]
    rows = beside[beside["channel"] == place.channel]
    axes.set_title(f"Alignment of channel {place.channel}: |cos(gate row, up row)|")
    axes.set_ylim(0, 1.02)
    x, values = track(rows, "alignment", beside["step"])
    line(axes, x, np.abs(values), color=BLUE, linewidth=1.3, marker="o", markersize=2.5)
    control = track(rows, "permuted_alignment", beside["step"])
    line(axes, control[0], np.abs(control[1]), color=QUIET, linewidth=1.0, linestyle="--")
    axes.set_ylabel("|cosine|")
    say_if_empty(axes, values)
    control_key = (QUIET, "--", "")
    legend(
        axes,
        {f"channel {place.channel}": (BLUE, "-", "o"), "another up row (control)": control_key},
    )


def _amplification_panel(axes: Axes, rows: pd.DataFrame) -> None:
    x, values = points(rows, "amplification")
    axes.set_title("Amplification: crest of the product / the larger crest of its factors")
    axes.set_ylabel("ratio")
    log_axis(axes.yaxis, values)
    line(axes, x, values, color=BLUE, linewidth=1.0, marker="o", markersize=2.5)
    say_if_empty(axes, values)


def _product_panel(axes: Axes, rows: pd.DataFrame) -> None:
    x, amax = points(rows, "cur_amax")
    axes.set_title("Largest gate product, and what the scale in force allowed")
    axes.set_ylabel("amax")
    log_axis(axes.yaxis, amax)
    line(axes, x, amax, color=BLUE, linewidth=0.7)
    scaled = rows[rows["staleness"] > 0]
    allowed = scaled["cur_amax"] / scaled["staleness"]
    axes.step(scaled["step"], allowed, where="mid", color=ORANGE, linewidth=1.6, zorder=3)
    clipped = scaled["staleness"] > CLIPPED_STALENESS
    at, peak = scaled["step"][clipped], scaled["cur_amax"][clipped]
    axes.vlines(at, allowed[clipped], peak, color=RED, linewidth=1.6, zorder=4)
    axes.plot(at, peak, "v", color=RED, markersize=5, zorder=5)
    say_if_empty(axes, amax)
    cut_off = (RED, "-", "v")
    legend(
        axes, {"amax": (BLUE, "-", ""), "allowed": (ORANGE, "-", ""), "cut off beyond 2×": cut_off}
    )


def _staleness_panel(axes: Axes, rows: pd.DataFrame) -> None:
    x, values = points(rows, "staleness")
    axes.set_title("Staleness: amax now / the amax that made the scale")
    axes.set_ylabel("ratio")
    log_axis(axes.yaxis, np.append(values, CLIPPED_STALENESS))
    beyond = values > CLIPPED_STALENESS
    rasterized = len(x) > LONG
    axes.plot(x[~beyond], values[~beyond], ".", color=QUIET, markersize=2, rasterized=rasterized)
    axes.plot(x[beyond], values[beyond], "v", color=RED, markersize=5, zorder=5)
    axes.axhline(CLIPPED_STALENESS, color=INK, linewidth=0.9, linestyle="--")
    say_if_empty(axes, values, "no scale: the product is not cast to FP8, or was not recorded")
    threshold = f"threshold {CLIPPED_STALENESS:g}"
    legend(
        axes, {"within": (QUIET, "", "."), "clipped": (RED, "", "v"), threshold: (INK, "--", "")}
    )


def _cast_panel(axes: Axes, rows: pd.DataFrame) -> None:
    """The two ways in which a cast loses an element; a log axis has no place for none."""
    axes.set_title("Share of the product that the cast saturated, and that it flushed to zero")
    axes.set_ylabel("share")
    looks = {"saturated": (RED, "", "v"), "flushed": (ORANGE, "", "o")}
    shares = {name: points(rows, name) for name in looks}
    known = sum(len(values) for _, values in shares.values())
    positive = {name: (x[v > 0], v[v > 0]) for name, (x, v) in shares.items()}
    log_axis(axes.yaxis, np.concatenate([values for _, values in positive.values()]))
    for name, (colour, _, marker) in looks.items():
        axes.plot(*positive[name], marker, color=colour, markersize=3.5, rasterized=known > LONG)
    drawn = np.concatenate([values for _, values in positive.values()])
    say_if_empty(axes, drawn, "none, in any step that was recorded" if known else "not recorded")
    legend(axes, looks)


def _growth_panel(axes: Axes, run: Seen, title: str, looks: Mapping[str, str]) -> None:
    """Columns of the steps on a log axis; what explodes leaves it at the top, and is named."""
    axes.set_title(title)
    curves = {column: points(run.steps, column) for column in looks}
    alarm = run.diagnosis.loss_alarm
    before = [v[x < alarm] if alarm is not None else v for x, v in curves.values()]
    calm = np.concatenate(before)
    top = ceiling(calm.tolist())
    everything = np.concatenate([v for _, v in curves.values()])
    log_axis(axes.yaxis, np.minimum(everything, top))
    for colour, (x, values) in zip(looks.values(), curves.values(), strict=True):
        line(axes, x, values, color=colour, linewidth=0.8)
    if len(everything) and everything.max() > top > 0:
        lowest = float(everything.min())
        positive = everything[everything > 0]
        axes.set_ylim(lowest if lowest < 0 else 0.7 * float(positive.min()), top)
        axes.set_title(f"{title} (up to {power_of_ten(everything.max())}, beyond the axis)")
    say_if_empty(axes, everything)
    if len(looks) > 1:
        legend(axes, {column: (colour, "-", "") for column, colour in looks.items()})


class _Mark(NamedTuple):
    step: int
    name: str
    colour: str
    dash: Any


def _marks(run: Seen) -> list[_Mark]:
    """The first sighting of each cause above "low", earliest first, then the loss's own alarm."""
    since: dict[str, int] = {}
    for finding in run.diagnosis.findings:
        if finding.since is not None and finding.severity != "low":
            since[finding.cause] = min(finding.since, since.get(finding.cause, finding.since))
    dashes = ("--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
    causes = sorted(since, key=lambda cause: since[cause])[:NAMED_CAUSES]
    marks = [
        _Mark(since[cause], in_words(cause), ORANGE, dash)
        for cause, dash in zip(causes, dashes, strict=False)
    ]
    if run.diagnosis.loss_alarm is not None:
        marks.append(_Mark(run.diagnosis.loss_alarm, "The loss's own alarm", RED, "-"))
    return marks


def _draw_marks(strip: Axes, panels: Any, marks: Sequence[_Mark]) -> None:
    """Vertical lines through all panels, named in a strip above them, a row each."""
    strip.set_axis_off()
    strip.set_ylim(0, max(1, len(marks)))
    low, high = panels[-1].get_xlim()
    for row, (step, name, colour, dash) in enumerate(marks):
        for axes in panels:
            axes.axvline(step, color=colour, linewidth=1.2, linestyle=dash, zorder=2)
        height = len(marks) - row - 0.5
        strip.plot([step, step], [0, height], color=colour, linewidth=1.2, linestyle=dash)
        on_the_left = step > low + 0.6 * (high - low)
        strip.annotate(
            f"{name}, step {step}",
            (step, height),
            xytext=(-4 if on_the_left else 4, 0),
            textcoords="offset points",
            ha="right" if on_the_left else "left",
            va="center",
            fontweight="bold",
        )


def twin(run: Seen, other: Seen, site: str, divergence: Divergence | None) -> Figure | str:
    """A run and its twin in high precision: loss, and one tensor's l2 norm, by step; a line where
    they first parted."""
    norms = [_norms(one, site) for one in (run, other)]
    loss = loss_name((run.steps, other.steps))
    curves = [_loss(one, loss) for one in (run, other)]
    if not all(len(x) for x, _ in curves) and not all(len(x) for x, _ in norms):
        return "nothing was recorded of both the run and its twin"
    figure = new_figure(4.6)
    panels = figure.subplots(2, 1, sharex=True)
    top = ceiling(float(values[0]) for _, values in curves if len(values))
    titles = "Loss" if loss == "loss" else loss, f"l2 norm of {plain(site, 60)}"
    pairs = [[(x, np.minimum(v, top)) for x, v in curves], norms]
    for axes, title, pair in zip(panels, titles, pairs, strict=True):
        axes.set_title(title)
        log_axis(axes.yaxis, np.concatenate([values for _, values in pair]))
        looks = {"color": INK, "linewidth": 1.8, "linestyle": "--"}, {"color": RED, "linewidth": 1}
        for (x, values), look in zip(reversed(pair), looks, strict=True):
            line(axes, x, values, **look)
        say_if_empty(axes, np.concatenate([values for _, values in pair]))
        if divergence is not None:
            axes.axvline(divergence.step, color=ORANGE, linewidth=1.2, linestyle="-.", zorder=2)
    panels[-1].set_xlabel("step")
    step_axis(panels[-1])
    keys = {"FP8": (RED, "-", ""), "its twin in high precision": (INK, "--", "")}
    if divergence is not None:
        keys[f"first parted, step {divergence.step}"] = (ORANGE, "-.", "")
    legend(panels[0], keys)
    return figure


def _norms(run: Seen, site: str) -> tuple[Any, Any]:
    """Of the process where it is largest, as the comparison of twins takes it."""
    from glob import escape

    rows = run.run.tensors(("step", "rank", "site", "l2_norm"), sites=escape(site))
    largest = rows[rows["rank"] >= 0].groupby("step")["l2_norm"].max()
    return points(largest.reset_index(), "l2_norm")
