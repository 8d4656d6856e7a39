"""The pictures: what they show equals the rows, read off the figures' own lines and meshes.

The runs are those of `test_report`; what only a large model shows is written as rows by hand. How a
picture looks has to be looked at: no test here does it.
"""

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rows_by_hand import Row, write
from test_report import record_experiment

from fp8lab.report import drawing, pictures, pictures_of_casts, pictures_of_layers
from fp8lab.report.interactive import payload
from fp8lab.report.picked import clipped_row, weight_rows
from fp8lab.report.sections import document_of
from fp8lab.report.story import Place, Seen, Story, load, place_of
from fp8lab.report.thinning import short
from fp8lab.sketch import bin_edge


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    return load([record_experiment(tmp_path_factory.mktemp("experiment"))])


@pytest.fixture(scope="module")
def worst(story: Story) -> Seen:
    run = story.worst_first()[0]
    assert run.label.startswith("train/delayed/")
    return run


def drawn(axes: Any, index: int) -> list[list[float]]:
    return [list(values) for values in axes.lines[index].get_data()]


def test_the_timeline_shows_the_rows(worst: Seen) -> None:
    place = place_of(worst)
    assert place is not None
    with drawing.style():
        figure = pictures.timeline(worst, place)
        assert not isinstance(figure, str)
        _, alignment, amplified, product, staleness, cast, norm, loss = figure.axes
    channels, rows = worst.run.channels(), worst.run.tensors()
    channels = channels[channels["channel"] == place.channel].dropna(subset="alignment")
    rows = rows[rows["site"] == "mlp:product"].dropna(subset="cur_amax")
    steps = worst.run.steps()
    assert drawn(alignment, 0) == [list(channels["step"]), list(channels["alignment"].abs())]
    assert drawn(alignment, 1)[1] == list(channels["permuted_alignment"].abs())
    peaked = rows.dropna(subset="amplification")
    assert drawn(amplified, 0) == [list(peaked["step"]), list(peaked["amplification"])]
    assert drawn(product, 0) == [list(rows["step"]), list(rows["cur_amax"])]
    scaled = rows[rows["staleness"] > 0]
    assert drawn(product, 1)[1] == list(scaled["cur_amax"] / scaled["staleness"])
    clipped = rows[rows["staleness"] > 2.0]
    assert len(clipped) > 0
    assert drawn(product, 2) == [list(clipped["step"]), list(clipped["cur_amax"])]
    assert drawn(staleness, 1) == [list(clipped["step"]), list(clipped["staleness"])]
    for index, column in enumerate(("saturated", "flushed")):
        lost = rows[rows[column] > 0]
        assert len(lost) > 0
        assert drawn(cast, index) == [list(lost["step"]), list(lost[column])]
    for axes, column in ((norm, "grad_norm"), (loss, "loss")):
        finite = steps[np.isfinite(steps[column])]
        assert drawn(axes, 0) == [list(finite["step"]), list(finite[column])]
    alarms = [worst.diagnosis.first_alarm, worst.diagnosis.loss_alarm]
    assert [line.get_xdata()[0] for line in loss.lines[-2:]] == alarms


def test_a_timeline_names_each_cause_once_and_no_more_than_fit(worst: Seen) -> None:
    run = Seen("run", worst.run)
    one = worst.diagnosis.findings[0]
    causes = [(f"cause_{number}", 9 - number) for number in range(6)]
    findings = [replace(one, cause=cause, since=since) for cause, since in causes]
    findings += [replace(one, cause="cause_5", since=40), replace(one, cause="low", severity="low")]
    run.diagnosis = replace(worst.diagnosis, findings=tuple(findings), loss_alarm=37)
    place = place_of(worst)
    assert place is not None
    with drawing.style():
        figure = pictures.timeline(run, place)
        assert not isinstance(figure, str)
        names = [text.get_text() for text in figure.axes[0].texts]
        assert names == [
            *(f"Cause {number}, step {9 - number}" for number in (5, 4, 3, 2)),
            "The loss's own alarm, step 37",
        ]
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_losses_and_norms_are_drawn_by_how_they_ended(story: Story) -> None:
    part = story.parts[0]
    with drawing.style():
        figure = pictures.losses(part)
        assert not isinstance(figure, str)
        high, delayed, _, norms = figure.axes
    assert [line.get_color() for line in high.lines if line.get_linestyle() == "-"] == [
        drawing.BLUE,
        drawing.BLUE,
    ]
    for axes, column in ((delayed, "common_loss"), (norms, "grad_norm")):
        reference, lines = axes.lines[:2], axes.lines[2:]
        assert [line.get_color() for line in reference] == [drawing.FAINT] * 2
        assert [line.get_marker() for line in lines] == ["None", "X", "v", "s"] * 2
        for run, line, first, alarm in zip(
            part.arms[1].runs, lines[::4], lines[2::4], lines[3::4], strict=True
        ):
            rows = run.run.steps()
            finite = rows[np.isfinite(rows[column])]
            top = float(np.max(line.get_ydata()))
            assert list(line.get_ydata()) == list(np.minimum(finite[column], top))
            diagnosis = run.diagnosis
            told = [first.get_xdata()[0], alarm.get_xdata()[0]]
            assert told == [diagnosis.first_alarm, diagnosis.loss_alarm]
            before = finite[finite["step"] <= diagnosis.first_alarm]
            assert first.get_ydata()[0] == min(before[column].iloc[-1], top)


def test_a_map_holds_the_largest_of_each_column(tmp_path: Path) -> None:
    """Eighty layers, more steps than columns; one layer was not recorded at first."""
    random = np.random.default_rng(0)
    steps, layers = 3 * pictures_of_layers.MAP_COLUMNS, 80
    amax = random.lognormal(size=(steps, layers))
    sites = [f"model.layers.{layer}.mlp:product" for layer in range(layers)]
    rows: list[Row] = [
        {"step": step, "site": sites[layer], "cur_amax": amax[step, layer]}
        for step in range(steps)
        for layer in range(layers)
        if (layer, step // 10) != (79, 0)
    ]
    run = Seen("run", write(tmp_path / "run", tensors=rows))
    assert pictures_of_layers.telling_statistic(run) == "cur_amax"
    named, starts, values = pictures_of_layers.map_of(run, "cur_amax")
    assert named == sites
    assert starts.tolist() == list(range(0, steps + 1, 3))
    expected = amax.reshape(-1, 3, layers).max(axis=1).T
    expected[79, 3] = amax[10:12, 79].max()  # steps 9 to 11, of which 9 is not there
    assert np.isnan(values[79, :3]).all()
    assert np.array_equal(values[:79], expected[:79])
    assert np.array_equal(values[79, 3:], expected[79, 3:])
    with drawing.style():
        figure = pictures_of_layers.heat(run, "cur_amax")
        assert not isinstance(figure, str)
        axes = figure.axes[0]
        assert np.array_equal(axes.collections[0].get_array().filled(np.nan)[:79], expected[:79])
        figure.draw_without_rendering()
        labels = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert figure.get_figheight() <= 9.5
    assert 20 <= len(labels) <= pictures_of_layers.LABELLED
    assert not any(a.overlaps(b) for a, b in combinations(labels, 2))


def test_a_map_shows_what_the_worst_finding_rests_on_and_where(worst: Seen) -> None:
    finding = worst.diagnosis.findings[0]
    assert finding.site is not None
    run = Seen("run", worst.run)
    for quantity, shown in (("flushed", "flushed"), ("sqnr_db", "staleness")):
        evidence = replace(finding.evidence[0], quantity=quantity)
        changed = replace(finding, evidence=(evidence,))
        low = replace(finding, severity="low", since=3)
        run.diagnosis = replace(worst.diagnosis, findings=(changed, low))
        assert pictures_of_layers.telling_statistic(run) == shown
    with drawing.style():
        figure = pictures_of_layers.heat(run, "staleness")
        assert not isinstance(figure, str)
    assert drawn(figure.axes[0], 0) == [[finding.since], [0.5]]
    assert len(figure.axes[0].lines) == 1


def test_a_map_of_zeros_is_drawn(tmp_path: Path) -> None:
    rows: list[Row] = [{"step": 0, "site": "mlp:product", "cur_amax": 0.0}]
    with drawing.style():
        figure = pictures_of_layers.heat(Seen("r", write(tmp_path / "r", tensors=rows)), "cur_amax")
        assert not isinstance(figure, str)
        figure.draw_without_rendering()


def test_channels_are_the_rows(worst: Seen) -> None:
    place = place_of(worst)
    assert place is not None
    with drawing.style():
        figure = pictures_of_layers.channels(worst, place)
        assert not isinstance(figure, str)
        upper, lower = figure.axes
    rows = worst.run.channels()
    largest = rows.groupby("channel")["product_amax"].max().sort_values(ascending=False)
    others = [channel for channel in largest.index if channel != place.channel]
    median = (rows["product_amax"] / rows["channel_ratio"]).groupby(rows["step"]).first().dropna()
    assert drawn(upper, 0) == [list(median.index), list(median)]
    # Points without a neighbour are drawn once more, as dots; where a line has a gap it is NaN.
    lines = [
        [one for one in axes.lines if one.get_linestyle() != "None"] for axes in (upper, lower)
    ]
    for index, channel in enumerate([place.channel, *others[:4]]):
        mine = rows[rows["channel"] == channel]
        finite = mine[np.isfinite(mine["product_amax"])]
        aligned = mine.dropna(subset="alignment")
        amaxes, cosines = (
            np.array(one.get_data()) for one in (lines[0][index + 1], lines[1][index])
        )
        amaxes, cosines = (data[:, np.isfinite(data[1])].tolist() for data in (amaxes, cosines))
        assert amaxes == [list(finite["step"]), list(finite["product_amax"])]
        assert cosines == [list(aligned["step"]), list(aligned["alignment"].abs())]
    assert len(lines[0]) == 6
    looks = {(line.get_linestyle(), line.get_marker()) for line in lines[0]}
    assert len(looks) == 6  # apart without their colours


@pytest.mark.parametrize("which", [0, -1])
def test_the_weights_are_the_channels(story: Story, which: int) -> None:
    run = story.worst_first()[which]
    place = place_of(run)
    assert place is not None
    rows, peak = weight_rows(run, place), pictures_of_layers.peak_rows(run, place)
    assert {int(row["channel"]) for row in rows} == {place.channel}
    with drawing.style():
        figure = pictures_of_layers.weights(run, rows, peak)
    assert len(figure.axes) == len(rows) + 1
    for axes, row in zip(figure.axes, rows, strict=False):
        points = np.stack([row["gate_weights"], row["up_weights"]], axis=1)
        assert np.array_equal(axes.collections[0].get_offsets(), points)
        ((gate, up),) = axes.collections[1].get_offsets()
        assert abs(gate * up) == np.abs(points.astype(float).prod(axis=1)).max()
        assert f"{row['alignment']:.2f}" in axes.get_title(loc="left")
    scatter, (largest, looked_at, line) = figure.axes[-1].collections[0], figure.axes[-1].lines
    others = peak.iloc[1:][["gate_amax", "up_amax"]].to_numpy()
    assert np.array_equal(scatter.get_offsets(), others)
    hot, top = peak.iloc[0], peak.nlargest(1, "product_amax").iloc[0]
    assert [looked_at.get_xdata()[0], looked_at.get_ydata()[0]] == [
        hot["gate_amax"],
        hot["up_amax"],
    ]
    assert [largest.get_xdata()[0], largest.get_ydata()[0]] == [top["gate_amax"], top["up_amax"]]
    assert np.allclose(line.get_xdata() * line.get_ydata(), hot["product_amax"], rtol=1e-15)


def test_the_peak_is_where_the_channels_product_is_largest(story: Story) -> None:
    run = story.worst_first()[-1]
    place = place_of(run)
    assert place is not None
    rows = run.run.channels()
    mine = rows[rows["channel"] == place.channel]
    step = int(mine.loc[mine["product_amax"].idxmax(), "step"])
    peak = pictures_of_layers.peak_rows(run, place)
    assert set(peak["step"]) == {step}
    assert peak["channel"].iloc[0] == place.channel
    assert set(peak["channel"]) == set(rows[rows["step"] == step]["channel"])
    assert pictures_of_layers.peak_rows(run, Place(place.site, 10_000)).empty


def test_a_twin_is_drawn_beside_its_run(story: Story, worst: Seen) -> None:
    other, parted = story.twin_of(worst), worst.diagnosis.divergence
    assert other is not None and parted is not None
    with drawing.style():
        figure = pictures.twin(worst, other, parted.site, parted)
        assert not isinstance(figure, str)
        losses, norms = figure.axes
    for index, run in enumerate((other, worst)):
        steps, rows = run.run.steps(), run.run.tensors()
        kept = rows[(rows["site"] == parted.site) & np.isfinite(rows["l2_norm"])]
        assert drawn(norms, index) == [list(kept["step"]), list(kept["l2_norm"])]
        finite = steps[np.isfinite(steps["common_loss"])]
        top = max(drawn(losses, index)[1])
        assert drawn(losses, index)[1] == list(np.minimum(finite["common_loss"], top))
    here = dict(zip(*drawn(norms, 1), strict=True))[parted.step]
    there = dict(zip(*drawn(norms, 0), strict=True))[parted.step]
    assert (here, there) == (parted.here, parted.there)
    assert [axes.lines[2].get_xdata()[0] for axes in figure.axes] == [parted.step] * 2
    with drawing.style():
        figure = pictures.twin(worst, other, parted.site, None)
        assert not isinstance(figure, str)
    assert [len(axes.lines) for axes in figure.axes] == [2, 2]


def test_a_twin_of_which_nothing_is_known(tmp_path: Path) -> None:
    run = Seen("run", write(tmp_path / "run"))
    assert isinstance(pictures.twin(run, run, "[", None), str)


def test_the_range_lies_where_the_cast_saturated(story: Story) -> None:
    """The bound is drawn at max / scale: beyond it lie the elements that the cast counted."""
    run = story.worst_first()[0]
    place = place_of(run)
    assert place is not None
    row = clipped_row(run, place)
    assert row is not None and row["saturated"] > 0
    with drawing.style():
        axes = pictures_of_casts.ranges([("title", row)]).axes[0]
        bound = 2.0 ** axes.lines[-1].get_xdata()[0]
        floor, normal = (2.0 ** line.get_xdata()[0] for line in axes.lines[:2])
    edges = np.array([bin_edge(int(row["histogram_start"]) + i) for i in range(1025)])
    counts = np.asarray(row["histogram"])
    lower, upper = edges[: len(counts)], edges[1 : len(counts) + 1]
    for at, share, beyond in (
        (bound, row["saturated"] * row["count"], lambda edge: edge > bound),
        (floor, row["flushed"] * (row["count"] - row["zeros"]), lambda edge: edge < floor),
    ):
        inner, outer = (lower, upper) if at == bound else (upper, lower)
        assert counts[beyond(inner)].sum() <= round(share) <= counts[beyond(outer)].sum()
    assert normal == pytest.approx(floor * 16.0)  # E4M3: three octaves of subnormals, and the half


def test_the_weights_shown_are_the_first_and_the_last_kept(story: Story) -> None:
    run = Seen("run", story.runs[0].run)
    kept = run.channels.dropna(subset="gate_weights").iloc[:1]
    steps = (3, 5, 9)
    run.channels = pd.concat([kept.assign(step=step) for step in steps])
    place = Place(f"{kept['site'].iloc[0]}:product", int(kept["channel"].iloc[0]))
    assert [row["step"] for row in weight_rows(run, place)] == [3, 9]


def test_layers_show_the_amax_of_two_steps(story: Story) -> None:
    run = story.worst_first()[0]
    rows = run.run.tensors().query("site == 'mlp:product'").set_index("step")["cur_amax"]
    with drawing.style():
        caption = document_of(story).pictures()["layers"].caption
        assert f"at step 0 and at step {rows.idxmax()}, where the delayed arm, seed" in caption
        figure = pictures_of_layers.layers([("title", run)], 0, 16)
        assert not isinstance(figure, str)
    line = figure.axes[0].lines[0]
    assert list(line.get_xdata()) == [rows[0], rows[16]]


def test_a_long_name_is_cut_in_its_middle() -> None:
    name = "model.layers." + "x" * 60 + ".mlp:product"
    assert len(drawing.plain(name)) == 44
    assert drawing.plain(name).endswith(".mlp:product")
    assert drawing.plain("a\nb\x00") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.001, "0.001"), (500.0, "500"), (1e4, "10⁴"), (2e4, "2·10⁴"), (1e-7, "10⁻⁷"), (0.0, "")],
)
def test_powers_are_plain_text(value: float, shown: str) -> None:
    assert drawing.power_of_ten(value) == shown


def test_a_log_axis_is_for_what_is_not_negative(tmp_path: Path) -> None:
    losses = {"falling": [2.0, 1.0, -1.0], "above": [2.0, 1.0, 0.0]}
    for name, told in losses.items():
        write(tmp_path / name, steps=[{"loss": loss} for loss in told])
        (part,) = load([tmp_path / name]).parts
        with drawing.style():
            figure = pictures.losses(part)
            assert not isinstance(figure, str)
        axes = figure.axes[0]
        assert axes.get_yscale() == ("linear" if name == "falling" else "log")
        assert drawn(axes, 0)[1] == told
        assert name == "above" or axes.get_ylim()[0] < -1.0


def test_runs_beside_each_other_are_drawn_by_one_loss(tmp_path: Path) -> None:
    """Else what only one of them has lies beside another quantity of the other."""
    for arm, more in {"a": {"metrics": {"common_loss": 1.0}}, "b": {}}.items():
        rows = [{"loss": 5.0, "grad_norm": 1.0} | more for _ in range(3)]
        write(tmp_path / arm, steps=rows, info={"config": {"part": "p", "arm": arm, "seed": 0}})
    write(tmp_path / "c", info={"config": {"part": "p", "arm": "c", "seed": 0}})
    for arms, name, value in (("abc", "loss", 5.0), ("ac", "common_loss", 1.0)):
        story = load([tmp_path / arm for arm in arms])
        (part,) = story.parts
        with drawing.style():
            figure = pictures.losses(part)
            beside = pictures.twin(part.runs[0], part.runs[len(arms) - 2], "m", None)
            assert not isinstance(figure, str) and not isinstance(beside, str)
        told = [axes for axes in figure.axes if axes.get_visible() and axes.get_title(loc="left")]
        assert [drawn(axes, 0)[1] for axes in told] == [[value] * 3] * (len(arms) - 1)
        assert told[0].get_ylabel() == name
        titles = {"loss": "Loss", "common_loss": "common_loss"}
        assert beside.axes[0].get_title(loc="left") == titles[name]
        assert {y for line in beside.axes[0].lines for y in line.get_ydata()} == {value}
        (chart,) = payload(story)["losses"]
        assert chart["quantities"][0][0] == name


def test_a_chart_opens_with_the_seed_of_the_worst_run_that_all_arms_have(tmp_path: Path) -> None:
    """All arms and seeds at once would hide each other."""
    for arm, seed in (("a", 0), ("a", 1), ("b", 0), ("b", 1), ("b", 2), ("c", 0), ("c", 1)):
        rows = [{"loss": 1.0} for _ in range(3)]
        lost = [{"step": 2, "kind": "diverged"}] * (arm == "b" and seed > 0)
        info = {"config": {"part": "p", "arm": arm, "seed": seed}}
        write(tmp_path / arm / str(seed), steps=rows, events=lost, info=info)
    (chart,) = payload(load([tmp_path]))["losses"]
    assert (chart["seeds"], chart["seed"]) == (["0", "1", "2"], 1)  # an arm lacks seed 2
    assert [run["seed"] for run in chart["runs"]] == [0, 1, 0, 1, 2, 0, 1]
    (alone,) = payload(load([tmp_path / "b"]))["losses"]
    assert alone["seed"] is None


def test_the_chart_of_layers_holds_the_rows(story: Story, worst: Seen) -> None:
    chart = payload(story)["layers"]
    twin = story.twin_of(worst)
    assert twin is not None and len(chart["runs"]) == 2
    for run, told in zip((worst, twin), chart["runs"], strict=True):
        rows = run.products.set_index("step")["cur_amax"]
        steps = [int(words.removeprefix("step ")) for words in chart["when"]]
        assert [amaxes for (amaxes,) in told["amax"]] == short(rows.reindex(steps))
    amaxes = [amax for (amax,) in chart["runs"][0]["amax"]]
    assert amaxes[chart["chosen"]] == max(amaxes) == short([worst.products["cur_amax"].max()])[0]


def test_the_chart_of_doses_holds_what_the_runs_say(story: Story) -> None:
    (part,) = (part for part in story.parts if part.is_dose_response)
    (chart,) = payload(story)["doses"]
    assert chart["arms"] == [arm.title for arm in part.arms]
    for quantity, key in enumerate(("loss", "gradient_cosine")):
        for arm, told in zip(part.arms, chart["quantities"][quantity]["arms"], strict=True):
            each = [[one[key] for one in run.doses] for run in arm.runs]
            assert [values for _, values in told["runs"]] == [short(one) for one in each]
            assert told["mean"][1] == short(np.mean(each, axis=0))
            assert told["mean"][0] == [one["dose"] for one in arm.runs[0].doses]
    for quantity, key in ((2, "bulk_error"), (3, "flushed")):
        (arm, *_), (told, *_) = part.arms, chart["quantities"][quantity]["arms"]
        run = arm.runs[0]
        rows = run.products.merge(run.steps[["step", "dose"]], on="step")
        assert told["runs"][0][1] == short(rows.dropna(subset=key).groupby("dose")[key].mean())


def test_a_track_has_a_gap_where_its_channel_was_not_recorded() -> None:
    """And what stands alone between two gaps is a dot."""
    recorded = pd.Series([0, 10, 20, 30, 40, 50, 60])
    rows = pd.DataFrame({"step": [0, 10, 30, 50, 60], "alignment": [0.1, 0.2, 0.3, 0.4, 0.5]})
    x, values = drawing.track(rows, "alignment", recorded)
    np.testing.assert_equal(values, [0.1, 0.2, np.nan, 0.3, np.nan, 0.4, 0.5])
    assert list(x[np.isfinite(values)]) == list(rows["step"])
    axes = drawing.new_figure(2.0).subplots()
    drawing.line(axes, x, values, color="C0")
    assert drawn(axes, 1) == [[30], [0.3]]
    assert len(axes.lines) == 2
