"""How pictures are drawn: the look, the axes, the keys, and the bytes they end as.

Every picture can be read without colour: what differs in hue differs in dash, marker or lightness
too. Titles and legends stand above the axes, so nothing covers data. Names that come from a model
or a run are drawn as they are: math text is off, and powers are in plain superscripts.

Long lines are rasterised inside the SVG; all else stays vector. Figures are made without pyplot,
under a style that ends with the `with`, and the same rows give the same bytes.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from fp8lab.report.story import superscript

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET, FAINT = "#1f2933", "#7b8794", "#c3cad2"
BLUE, RED, ORANGE = "#1f5fa8", "#c8321f", "#e08e1b"
# Okabe and Ito's hues, darkest to lightest and apart in dash and marker.
ARM_STYLES = (
    ("#111111", "-", "o"),
    ("#c8321f", "--", "X"),
    ("#1f5fa8", "-.", "s"),
    ("#7a3e9d", (0, (5, 1, 1, 1, 1, 1)), "v"),
    ("#0b8f6a", ":", "D"),
    ("#e08e1b", (0, (6, 2)), "^"),
    ("#4fb0e3", (0, (3, 1)), "P"),
    ("#8a8f98", (0, (1, 1)), "h"),
)
# Of a legend: name to colour, dash ("" for none) and marker ("" for none).
Keys = Mapping[str, tuple[str, Any, str]]
MARK = "fp8lab report"  # in every PNG, by which it is known again
LONG = 400  # points beyond which a line is rasterised
WIDTH = 9.6  # inches; at 100 pixels an inch as wide as the page


@contextmanager
def style(*, cycle: bool = False) -> Iterator[None]:
    """The look of every picture, and bytes that do not depend on the time.

    With `cycle` lines that are given no look of their own take `ARM_STYLES` in turn.
    """
    import matplotlib
    import seaborn
    from cycler import cycler

    look = seaborn.axes_style("ticks") | {
        "font.family": ["DejaVu Sans"],
        "font.size": 9.5,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 9.5,
        "axes.linewidth": 0.7,
        "axes.edgecolor": QUIET,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "text.color": INK,
        "xtick.color": QUIET,
        "ytick.color": QUIET,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.major.size": 3,
        "ytick.major.size": 3,
        "xtick.major.width": 0.7,
        "ytick.major.width": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": "#e8ebee",
        "grid.linewidth": 0.7,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "legend.handlelength": 2.2,
        "figure.dpi": 100,
        "savefig.facecolor": "white",
        "svg.hashsalt": "fp8lab",
        "svg.fonttype": "path",
        "text.parse_math": False,
    }
    if cycle:
        colours, dashes, _ = zip(*ARM_STYLES, strict=True)
        look |= {"axes.prop_cycle": cycler(color=colours, linestyle=dashes)}
    with warnings.catch_warnings(), matplotlib.rc_context(look):
        # A name may be in a script that the font lacks; a box is drawn for it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG without dates; call it under `style`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def to_png(figure: Figure) -> bytes:
    """The figure as PNG, 150 pixels an inch, known again by `MARK`; call it under `style`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": MARK})
    return buffer.getvalue()


def plain(name: str, length: int = 44) -> str:
    """A name as a picture shows it: printable, on one line, its middle left out if it is long."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    half = length // 2
    return shown if len(shown) <= length else f"{shown[:half]}…{shown[-half + 1 :]}"


def wrapped(title: str) -> str:
    """A panel's title on at most three lines."""
    return textwrap.fill(plain(title, 60), 25)


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure, in inches, whose parts make room for each other."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=_layout()(w_pad=0.08, h_pad=0.1))


@cache
def _layout() -> Any:
    """Constrained layout without its last digits, which differ from one process to the next: its
    solver takes the constraints in the order of their addresses."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    class Rounded(ConstrainedLayoutEngine):
        def execute(self, fig: Figure) -> Any:
            grids = super().execute(fig)
            for axes in fig.axes:
                left, bottom, width, height = axes.get_position(original=True).bounds
                axes.set_position(tuple(round(one, 6) for one in (left, bottom, width, height)))
                axes.set_in_layout(True)  # which setting a position ends
            return grids

    return Rounded


def points(rows: pd.DataFrame, column: str) -> tuple[Any, Any]:
    """Steps and values where the value is finite."""
    x, values = rows["step"].to_numpy(float), rows[column].to_numpy(float)
    finite = np.isfinite(values)
    return x[finite], values[finite]


def track(rows: pd.DataFrame, column: str, recorded: pd.Series[Any]) -> tuple[Any, Any]:
    """As `points` of one channel, with NaN where `recorded` has steps at which it was not among
    those recorded: a line has a gap there."""
    x, values = points(rows, column)
    gaps = np.flatnonzero(np.diff(np.searchsorted(np.unique(recorded), x)) > 1) + 1
    return np.insert(x, gaps, x[gaps]), np.insert(values, gaps, np.nan)


def line(axes: Axes, x: Any, values: Any, **look: Any) -> None:
    """A line, with gaps where values are NaN; a dot where a point has no neighbour."""
    axes.plot(x, values, rasterized=len(x) > LONG, **look)
    known = np.pad(np.isfinite(np.asarray(values, float)), 1)
    alone = known[1:-1] & ~known[:-2] & ~known[2:]
    if alone.any():
        axes.plot(x[alone], values[alone], "o", color=look["color"], markersize=4)


def mark(axes: Axes, x: Any, y: Any, marker: str) -> None:
    """Hollow markers over all else: where something was found."""
    axes.plot(
        x,
        y,
        marker=marker,
        linestyle="",
        markerfacecolor="white",
        markeredgecolor=INK,
        markersize=5.5,
        clip_on=False,
        zorder=6,
    )


def log_axis(axis: Any, values: Any) -> None:
    """A log axis with labels in plain text, if there is anything positive to show on it, and
    nothing negative, which it would leave out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    below, values = (values < 0).any(), values[values > 0]
    if below or not len(values):
        return
    set_scale = axis.axes.set_yscale if axis.axis_name == "y" else axis.axes.set_xscale
    set_scale("log", nonpositive="mask")
    decades = np.log10(values.max() / values.min())
    wide = decades > 0.6 or decades == 0
    subs = (1.0,) if decades > 1.5 else (1.0, 2.0, 5.0) if wide else tuple(range(1, 10))
    axis.set_major_locator(LogLocator(subs=subs, numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value)))
    axis.set_minor_locator(NullLocator())
    if decades == 0:
        set_limits = axis.axes.set_ylim if axis.axis_name == "y" else axis.axes.set_xlim
        set_limits(values[0] / 4, values[0] * 4)


def step_axis(axes: Axes) -> None:
    """Steps are whole numbers, of one step too."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(
        MaxNLocator(nbins="auto", integer=True, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10])
    )


def power_of_ten(value: float) -> str:
    """A tick's label; empty for what a log axis cannot show."""
    if value <= 0 or not np.isfinite(value):
        return ""
    if 1e-3 <= value < 1e4:
        return f"{value:g}"
    exponent = int(np.floor(np.log10(value) + 1e-9))
    lead = round(value / 10.0**exponent)
    return f"{lead}·10{superscript(exponent)}" if lead > 1 else f"10{superscript(exponent)}"


def handles(keys: Keys) -> list[Any]:
    """What a legend shows beside each name; a marker in ink and without a line is a `mark`."""
    from matplotlib.lines import Line2D

    return [
        Line2D(
            [],
            [],
            color=colour,
            linestyle=dash,
            marker=marker,
            markersize=6,
            linewidth=1.6,
            markerfacecolor="white" if (colour, dash) == (INK, "") else colour,
        )
        for colour, dash, marker in keys.values()
    ]


def legend(axes: Axes, keys: Keys) -> None:
    """In the line of the title, on the right."""
    axes.legend(
        handles(keys),
        list(keys),
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=len(keys),
        borderaxespad=0.0,
        columnspacing=1.2,
        handletextpad=0.5,
    )


def say_if_empty(axes: Axes, values: Any, why: str = "not recorded") -> None:
    if not len(values):
        axes.text(
            0.5,
            0.5,
            why,
            transform=axes.transAxes,
            ha="center",
            va="center",
            color=QUIET,
            style="italic",
        )
