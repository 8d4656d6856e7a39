"""What the page's charts show: rows picked from a story, as JSON that a browser can draw.

Nothing is computed here that a picture does not show as well. A long line is thinned, see
`thinning`; a heat map keeps of each stretch the worst value. Numbers have four digits, those of a
heat map three; what is not finite is null, but for what is infinite in a heat map: that is the
worst there is.

The budgets below bound the whole, whatever is in a run: 80 layers over 10,000 steps stay below
4 MB. What a chart opens with is thinned least, what can be chosen instead shares what is left.
Rejected: every row, packed as binary. It would be hundreds of megabytes, and a screen has a
thousand columns. Names are made printable here and turned into text by `page.js`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fp8lab import formats
from fp8lab.comparison import loss_name
from fp8lab.record import CLIPPED_STALENESS
from fp8lab.report import longest
from fp8lab.report.answer import named
from fp8lab.report.drawing import plain
from fp8lab.report.picked import dose_rows, ranged_rows, starved_row, weight_rows
from fp8lab.report.pictures_of_layers import hot_channels, telling_statistic
from fp8lab.report.story import Part, Place, Seen, Story, place_of
from fp8lab.report.thinning import LINE_POINTS, line, rounded, short, thin
from fp8lab.report.verdict import in_words

if TYPE_CHECKING:
    import pandas as pd

Chart = dict[str, Any]

CHART_POINTS = 40_000  # of all lines of a chart
HEAT_BINS = 200  # stretches of steps
HEAT_CELLS = 200_000  # of the heat maps shown first, and of all others together
COLOUR_DIGITS = 3  # of what a heat map shows
TRACK_CELLS = 200_000  # of all channels but those of the layer shown first
SITES, CHANNELS = 16, 6  # whose channels are followed, whose weights are shown
WEIGHT_STEPS, WEIGHTS = 24, 512  # scatters of one channel, and the points of one
RANGE_STEPS = 48  # histograms of one tensor, steps of the layers' amaxes

KINDS = ("finding", "loss", "end")  # of what is noticed; of one step the last lies on top
# Of a tensor's statistics: what it is called, and whether the small values are the bad ones.
STATISTICS = {
    "cur_amax": ("largest magnitude", False),
    "staleness": ("staleness", False),
    "saturated": ("share saturated", False),
    "flushed": ("share flushed to zero", False),
    "subnormal": ("share subnormal", False),
    "bulk_error": ("bulk error", False),
    "gemm_error": ("error of its GEMM", False),
    "sqnr_db": ("SQNR in dB", True),
    "cosine": ("cosine with its cast", True),
    "amplification": ("amplification", False),
    "coincidence": ("coincidence", False),
    "crest": ("crest", False),
    "kurtosis": ("kurtosis", False),
    "dynamic_range": ("dynamic range in octaves", False),
    "channel_ratio": ("channel ratio", False),
    "token_ratio": ("token ratio", False),
    "nans": ("not-a-number", False),
    "infs": ("infinite", False),
}
TRACKS = {
    "product_amax": "largest product",
    "alignment": "alignment: cosine of gate row and up row",
    "gate_amax": "largest gate output",
    "up_amax": "largest up output",
    "channel_ratio": "channel ratio",
    "gate_norm": "norm of the gate row",
    "up_norm": "norm of the up row",
    "down_norm": "norm of the down column",
}
QUANTITIES = {
    "common_loss": "common_loss",
    "loss": "loss",
    "grad_norm": "gradient norm",
    "update_ratio": "update ratio",
    "rms_t": "RMS_t",
    "logit_max": "largest logit",
    "learning_rate": "learning rate",
}
DOSED = {
    "loss": "loss",
    "gradient_cosine": "cosine of the gradient with the exact one",
    "bulk_error": "relative error of the cast, outlier channel left out",
    "flushed": "share of the product that became zero",
}


def payload(story: Story) -> dict[str, Any]:
    """The data of every chart that has rows, by the name of the picture whose place it takes.

    `losses` and `doses` are lists, a chart for each part that trained, or was measured at doses, in
    the order of their pictures.
    """
    runs = story.worst_first()
    shown = runs[0] if runs else None
    place = None if shown is None else place_of(shown)
    trained = [_losses(story, part) for part in story.parts if not part.is_dose_response]
    charts: dict[str, Any] = {"losses": [chart for chart in trained if chart]}
    charts["doses"] = [_doses(part) for part in story.parts if part.is_dose_response]
    if shown is not None:
        charts["heat"] = _heat(shown)
        charts["layers"] = _layers(story, shown)
        charts["ranges"] = _ranges(story, shown, place)
    if shown is not None and place is not None:
        charts["timeline"] = _timeline(shown, place)
        charts["channels"] = _channels(shown, place)
    charts["weights"] = next(
        (chart for run in _kept_weights(runs) if (chart := _weights(run))), None
    )
    twins = ((run, story.twin_of(run)) for run in runs if not run.doses)
    charts["twin"] = next((_twin(story, run, other) for run, other in twins if other), None)
    return {name: chart for name, chart in charts.items() if chart}


def _share(lines: int) -> int:
    """How many points each of so many lines may have."""
    return max(40, min(LINE_POINTS, CHART_POINTS // max(1, lines)))


def _recorded(rows: pd.DataFrame, names: Iterable[str]) -> list[str]:
    return [n for n in names if n in rows and np.isfinite(rows[n].to_numpy(float)).any()]


def _marks(run: Seen) -> list[list[Any]]:
    """Steps at which something was noticed, what, and its kind: since when findings above "low"
    hold, where the loss itself told, where the run ended."""
    said: dict[tuple[int, str], dict[str, None]] = {}
    for finding in run.diagnosis.findings:
        if finding.since is not None and finding.severity != "low":
            where = "" if finding.site is None else f" at {plain(finding.site)}"
            words = in_words(finding.cause) + where
            said.setdefault((finding.since, "finding"), {})[words] = None
    if run.diagnosis.loss_alarm is not None:
        said[run.diagnosis.loss_alarm, "loss"] = {"the loss itself told": None}
    if run.diverged_at is not None:
        said[run.diverged_at, "end"] = {"diverged": None}
    order = sorted(said, key=lambda mark: (mark[0], KINDS.index(mark[1])))
    return [[step, list(said[step, kind])[:6], kind] for step, kind in order]


# --- the charts -----------------------------------------------------------------------------------


def _losses(story: Story, part: Part) -> Chart | None:
    """Every run of a part: its lines by quantity, and what was noticed.

    Of several arms the chart opens with one seed, the worst run's that all of them have; the others
    are there to choose. All of them at once would hide each other.
    """
    loss = loss_name(run.steps for run in part.runs)
    wanted = [loss, *(name for name in QUANTITIES if name not in ("common_loss", "loss"))]
    found = dict.fromkeys(name for run in part.runs for name in _recorded(run.steps, wanted))
    if loss not in found:
        return None
    names = [name for name in wanted if name in found]
    most = _share(len(part.runs) * len(names))
    arms = [arm for arm in part.arms if arm.runs]
    seeds = list(dict.fromkeys(run.seed for run in part.runs if run.seed != ""))
    seeds.sort(key=part.seeds.index)
    shared = set(seeds).intersection(*({run.seed for run in arm.runs} for arm in arms))
    worst = [run.seed for run in story.worst_first() if run in part.runs and run.seed in shared]
    return {
        "quantities": [[name, QUANTITIES[name]] for name in names],
        "seeds": [plain(str(seed)) for seed in seeds],
        "seed": seeds.index(worst[0]) if worst and len(arms) > 1 else None,
        "arms": [plain(arm.title) for arm in arms],
        "precise": [not arm.uses_fp8 for arm in arms],
        "runs": [
            {
                "name": plain(named(story, run), 80),
                "arm": position,
                "seed": seeds.index(run.seed) if run.seed in seeds else None,
                "lines": {n: line(run.steps, run.steps[n], most) for n in names if n in run.steps},
                "marks": _marks(run),
            }
            for position, arm in enumerate(arms)
            for run in arm.runs
        ],
    }


def _twin(story: Story, run: Seen, other: Seen) -> Chart | None:
    """A run beside the same training in high precision, and where they first parted."""
    pair, parted, place = (run, other), run.diagnosis.divergence, place_of(run)
    names = [n for n in QUANTITIES if all(_recorded(one.steps, [n]) for one in pair)]
    lines = [{n: line(one.steps, one.steps[n]) for n in names} for one in pair]
    labels = [[name, QUANTITIES[name]] for name in names]
    site = parted.site if parted is not None else "" if place is None else place.site
    norms = [one.products[one.products["site"] == site] for one in pair]
    if all(_recorded(rows, ["l2_norm"]) for rows in norms):
        labels.append(["l2_norm", f"l2 norm of {plain(site)}"])
        for own, rows in zip(lines, norms, strict=True):
            own["l2_norm"] = line(rows, rows["l2_norm"])
    marks = _marks(run)
    if parted is not None:
        words = f"first parted at {plain(parted.site)}"
        marks = sorted([*marks, [parted.step, [words], "parted"]], key=lambda mark: mark[0])
    titles = [plain(named(story, run), 80), "its twin in high precision"]
    runs = [{"name": t, "lines": own} for t, own in zip(titles, lines, strict=True)]
    return {"quantities": labels, "runs": runs, "marks": marks} if labels else None


def _timeline(run: Seen, place: Place) -> Chart | None:
    """One clock for all that a run recorded of one gate product, of each layer by choice."""
    found = run.products["site"].unique().tolist()
    if place.site not in found:
        return None
    most = _share(7 * len(found))
    by_site = run.products.groupby("site", sort=False)
    followed = ["step", "site", "channel", "product_amax", "alignment", "permuted_alignment"]
    none = run.channels[followed][:0]
    by_layer = {str(site): rows for site, rows in run.channels[followed].groupby("site")}
    layers = [by_layer.get(site.removesuffix(":product"), none) for site in found]
    return {
        "steps": {
            name: line(run.steps, run.steps[name])
            for name in ("grad_norm", "loss", "common_loss")
            if _recorded(run.steps, [name])
        },
        "sites": [
            _causes(
                place,
                site,
                by_site.get_group(site),
                channels,
                LINE_POINTS if site == place.site else most,
            )
            for site, channels in zip(found, layers, strict=True)
        ],
        "chosen": found.index(place.site),
        "threshold": CLIPPED_STALENESS,
        "marks": _marks(run),
    }


def _causes(
    place: Place, site: str, rows: pd.DataFrame, channels: pd.DataFrame, most: int
) -> Chart:
    channel: int | None = place.channel if site == place.site else None
    if channel is None and channels["product_amax"].notna().any():
        channel = int(channels.nlargest(1, "product_amax").iloc[0]["channel"])
    tracked = channels[channels["channel"] == channel]
    scaled = rows[rows["staleness"] > 0]
    return {
        "name": plain(site),
        "channel": channel,
        "alignment": line(tracked, tracked["alignment"].abs(), most),
        "control": line(tracked, tracked["permuted_alignment"].abs(), most),
        "amplification": line(rows, rows["amplification"], most),
        "amax": line(rows, rows["cur_amax"], most),
        "allowed": line(scaled, scaled["cur_amax"] / scaled["staleness"], most),
        "staleness": line(rows, rows["staleness"], most),
        "flushed": line(rows, rows["flushed"], most),
        "saturated": line(rows, rows["saturated"], most),
    }


def _heat(run: Seen) -> Chart | None:
    """Layer by step, of every statistic and tensor that was recorded."""
    maps = longest.worst(run.run, {name: low for name, (_, low) in STATISTICS.items()}, HEAT_BINS)
    modules = list(dict.fromkeys(s.rpartition(":")[0] for _, w in maps.values() for s in w))
    roles = list(dict.fromkeys(s.rpartition(":")[2] for _, w in maps.values() for s in w))
    if not maps:
        return None
    maps_of = {n: len({s.rpartition(":")[2] for s in worst}) for n, (_, worst) in maps.items()}
    telling = telling_statistic(run)
    chosen = list(maps).index(telling) if telling in maps else 0
    charts: list[Chart] = []
    for name, (steps, worst) in maps.items():
        label, low_is_bad = STATISTICS[name]
        pick = np.fmin if low_is_bad else np.fmax
        sharing = maps_of[name] if len(charts) == chosen else sum(maps_of.values())
        apart = -(-sharing * len(modules) * HEAT_BINS // HEAT_CELLS)
        starts = np.arange(0, len(steps), apart)
        empty = [None] * len(starts)
        kept = {
            site: [
                rounded(value, COLOUR_DIGITS, infinite=True)
                for value in pick.reduceat(row, starts).tolist()
            ]
            for site, row in worst.items()
        }
        tables = {
            role: [kept.get(f"{module}:{role}", empty) for module in modules]
            for role in roles
            if any(f"{module}:{role}" in kept for module in modules)
        }
        charts.append({"label": label, "low": low_is_bad, "steps": steps[starts].tolist()})
        charts[-1]["roles"] = tables
    marks = [
        [f.since, modules.index(f.site.rpartition(":")[0]), in_words(f.cause)]
        for f in run.diagnosis.findings
        if f.since is not None and f.severity != "low"
        if f.site is not None and f.site.endswith(":product")
        if f.site.rpartition(":")[0] in modules
    ]
    return {
        "layers": [plain(module) for module in modules],
        "statistics": charts,
        "chosen": chosen,
        "marks": marks,
    }


def _layers(story: Story, run: Seen) -> Chart | None:
    """Of every layer the product's amax, by step; beside it the twin's."""
    largest = run.products.dropna(subset="cur_amax").groupby("step")["cur_amax"].max()
    if largest.empty:
        return None
    twin = story.twin_of(run)
    runs = [run] if twin is None else [run, twin]
    sites = list(dict.fromkeys(site for one in runs for site in one.products["site"]))
    most = max(2, min(RANGE_STEPS, CHART_POINTS // (len(sites) * len(runs))))
    steps = largest.index[thin([largest.to_numpy(float)], most)]
    lines = []
    for one in runs:
        rows = one.products[one.products["step"].isin(steps)]
        amaxes = rows.pivot_table("cur_amax", "step", "site", observed=True)
        told = amaxes.reindex(index=steps, columns=sites).to_numpy(float)
        lines.append({"name": plain(named(story, one), 80), "amax": [short(row) for row in told]})
    return {
        "layers": [plain(site) for site in sites],
        "when": [plain(run.when(int(step))) for step in steps],
        "runs": lines,
        "chosen": int(largest.to_numpy(float)[largest.index.isin(steps)].argmax()),
    }


def _doses(part: Part) -> Chart:
    """By quantity and arm the mean at each dose, and each run's own."""
    found = dose_rows(part)
    charts = []
    for key, label in DOSED.items():
        rows = found.measured if key in found.measured else found.cast
        rows = rows.reindex(columns=["arm", "run", "dose", key]).dropna()
        lines = []
        for arm in found.arms:
            mine = rows[rows["arm"] == arm.name]
            runs = [_by_dose(one, key) for _, one in mine.groupby("run", sort=False)]
            lines.append({"mean": _by_dose(mine, key), "runs": runs})
        charts.append({"label": label, "arms": lines, "log": key == "bulk_error"})
    return {
        "arms": [plain(arm.title) for arm in found.arms],
        "precise": [not arm.uses_fp8 for arm in found.arms],
        "quantities": charts,
    }


def _by_dose(rows: pd.DataFrame, key: str) -> list[list[Any]]:
    means = rows.groupby("dose")[key].mean()
    return [means.index.tolist(), short(means)]


def _channels(run: Seen, place: Place) -> Chart | None:
    """The hottest channels of each feed-forward, over the steps that recorded them."""
    rows = run.channels.dropna(subset="product_amax")
    names = _recorded(rows, TRACKS)
    if "product_amax" not in names:
        return None
    by_site = rows[["step", "site", "channel", *names]].groupby("site", sort=False)
    peaks = by_site["product_amax"].max()
    hottest = {*peaks.nlargest(SITES).index, place.module}
    sites = [site for site in peaks.index if site in hottest]
    if place.module not in sites:
        return None
    most = TRACK_CELLS // (len(sites) * CHANNELS * (len(names) + 1))
    charts = []
    for site in sites:
        mine = by_site.get_group(site)
        peak = int(mine.nlargest(1, "product_amax").iloc[0]["channel"])
        first = place.channel if site == place.module else peak
        points = LINE_POINTS if site == place.module else min(most, LINE_POINTS)
        tracks = [_track(mine, channel, names, points) for channel in hot_channels(mine, first)]
        charts.append({"name": plain(site), "tracks": tracks})
    return {
        "quantities": [[name, TRACKS[name]] for name in names],
        "sites": charts,
        "chosen": sites.index(place.module),
    }


def _track(rows: pd.DataFrame, channel: int, names: list[str], most: int) -> Chart:
    """One channel; a row of nulls stands where the layer was recorded and the channel was not."""
    order = {step: at for at, step in enumerate(dict.fromkeys(rows["step"]))}
    mine = rows[rows["channel"] == channel]
    steps, ats = mine["step"].to_numpy(), mine["step"].map(order).to_numpy()
    kept = thin([mine[name].to_numpy(float) for name in names], most)
    gaps = np.flatnonzero(np.diff(ats[kept]) > np.diff(kept)) + 1
    track: Chart = {
        "channel": channel,
        "steps": np.insert(steps[kept], gaps, steps[kept][gaps]).tolist(),
    }
    for name in names:
        track[name] = short(np.insert(mine[name].to_numpy(float)[kept], gaps, np.nan))
    return track


def _kept_weights(runs: Sequence[Seen]) -> list[Seen]:
    """Those that kept their channel's weights twice, then once, then never."""

    def times(run: Seen) -> int:
        place = place_of(run)
        return 0 if place is None else len(weight_rows(run, place))  # two at most

    return sorted(runs, key=times, reverse=True)


def _weights(run: Seen) -> Chart | None:
    """Gate row against up row of the channels whose weights were kept most often; and each
    recorded channel's largest gate against its largest up."""
    place = place_of(run)
    if place is None:
        return None
    rows = run.channels[run.channels["gate_weights"].notna() & run.channels["alignment"].notna()]
    kept = rows.groupby(["site", "channel"]).size().nlargest(CHANNELS).index.tolist()
    charts: list[Chart] = []
    for site, channel in dict.fromkeys([(place.module, place.channel), *kept]):
        mine = rows[(rows["site"] == site) & (rows["channel"] == channel)]
        if len(mine):
            at = np.unique(np.linspace(0, len(mine) - 1, WEIGHT_STEPS).astype(int))
            scatters = [_scatter(mine.iloc[position]) for position in at]
            name = f"weights of channel {channel} of {plain(site)}"
            charts.append({"name": name, "scatters": scatters})
    if peaks := _peaks(run, place):
        charts.append({"name": f"outputs of {plain(place.module)}, by channel", "peaks": peaks})
    return {"places": charts} if charts else None


def _scatter(row: pd.Series) -> Chart:
    gate, up = (np.asarray(row[name], dtype=float) for name in ("gate_weights", "up_weights"))
    every = -(-len(gate) // WEIGHTS)
    peak = int(np.abs(gate * up).argmax())
    picked = sorted({*range(0, len(gate), every), peak})
    return {
        "step": int(row["step"]),
        "alignment": rounded(float(row["alignment"])),
        "gate": short(gate[picked]),
        "up": short(up[picked]),
        "peak": picked.index(peak),
    }


def _peaks(run: Seen, place: Place) -> list[Chart]:
    """By step, the channels of the place's layer with their largest gate, up and product."""
    names = ["gate_amax", "up_amax", "product_amax"]
    rows = run.channels[run.channels["site"] == place.module]
    rows = rows[(np.isfinite(rows[names].to_numpy(float)) & (rows[names] > 0)).all(axis=1)]
    largest = rows.groupby("step")["product_amax"].max()
    steps = largest.index[thin([largest.to_numpy(float)], WEIGHT_STEPS)]
    return [
        {"step": int(step), "channels": one["channel"].astype(int).tolist()}
        | {name: short(one[name]) for name in names}
        for step in steps
        for one in [rows[rows["step"] == step].nlargest(WEIGHTS, "product_amax")]
    ]


def _ranges(story: Story, run: Seen, place: Place | None) -> Chart | None:
    """Histograms of products that were cast with one scale, step by step."""
    ranged = ranged_rows(run.products)
    order = ranged.groupby("site")["staleness"].max().nlargest(SITES).index.tolist()
    sites = dict.fromkeys(([] if place is None else [place.site]) + order)
    starved = starved_row(story.runs)
    tensors = [(run, ranged[ranged["site"] == site]) for site in sites]
    if starved is not None and starved[0] is not run:
        other = ranged_rows(starved[0].products)
        tensors.append((starved[0], other[other["site"] == starved[1]["site"]]))
    charts = []
    for one, rows in tensors:
        if len(rows):
            names = [n for n in ("staleness", "flushed", "saturated", "cur_amax") if n in rows]
            picked = rows.iloc[thin([rows[n].to_numpy(float) for n in names], RANGE_STEPS)]
            row = picked.iloc[0]
            about = f"{plain(str(row['site']))} in {plain(named(story, one), 60)}"
            steps = [_histogram(one, each) for _, each in picked.iterrows()]
            charts.append({"name": about, "steps": steps})
    return {"tensors": charts} if charts else None


def _histogram(run: Seen, row: pd.Series) -> Chart:
    counts = np.asarray(row["histogram"], dtype=np.int64)
    format_ = getattr(formats, str(row["format"]))
    bounds = np.array([format_.smallest_subnormal / 2, format_.smallest_normal, format_.max])
    return {
        "when": plain(run.when(int(row["step"]))),
        "format": str(row["format"]),
        "start": int(row["histogram_start"]),
        "counts": counts.tolist(),
        "bounds": short(np.log2(bounds / float(row["scale"]))),
        "shares": short([row["flushed"], row["subnormal"], row["saturated"]]),
        "staleness": rounded(float(row["staleness"])),
    }
