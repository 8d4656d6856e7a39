"""`replay` against re-quantising the same tensors, and its decisions on each side of a threshold.

Numbers are held against torch: every tensor of a short real training is kept, cast by
`casting.cast_for` or by an `Fp8Linear` that lives through the same steps, and counted. Decisions
are held against runs of rows that are made for them.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rows_by_hand import Row, write
from torch import Tensor, nn
from typer.testing import CliRunner

import fp8lab
from fp8lab import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    Format,
    HighPrecision,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    Plan,
    RowwiseScaling,
    Selection,
    formats,
    replay,
)
from fp8lab.casting import Cast, cast_for
from fp8lab.cli import app
from fp8lab.forecast import DAMAGED, MOST, RELEASED, SATURATED, WINDOW, WOUND_UP
from fp8lab.forecast.histories import current_scales, delayed_scales
from fp8lab.forecast.not_judged import not_judged
from fp8lab.forecast.recorded import recorded_sites
from fp8lab.forecast.to_record import Missing, select_of
from fp8lab.forecast.what_if import COLUMNS, uses_of
from fp8lab.linear import Fp8Linear
from fp8lab.monitor.measure import summary
from fp8lab.recipe import Recipe
from fp8lab.report import what_if
from fp8lab.report.story import load
from fp8lab.scaling import power_of_two_scale, scale_for
from fp8lab.sketch import Sketch
from fp8lab.store import RunError, RunWriter, open_run

POWERS = DelayedScaling(amax_history_len=3, scaling_factor_compute_algo=power_of_two_scale)
STEPS = 9
WHAT_IFS = ("fp8_current_scaling", "mxfp8", "fp8_block_scaling_1d", "nvfp4", "rowwise")
ASKED = tuple(
    f"{recipe}_{statistic}" for recipe in WHAT_IFS for statistic in ("underflows%", "overflows%")
)
ASKED += ("mxfp8_mse", "mxfp8_underflows%_columnwise", "mxfp8_overflows%_columnwise")


class Kept:
    """A recorded training, and the tensors of it."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(fp8lab.GatedFeedForward(16, 48)).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-7)
        self.path = path
        self.tensors: dict[str, list[Tensor]] = {"0:product": [], "0.gate:grad_output": []}
        self.tensors |= {"0.down:weight": []}
        mlp: Any = model[0]
        mlp.down.register_forward_pre_hook(self._keeps("0:product"))
        mlp.gate.register_full_backward_hook(
            lambda module, grads, outputs: self.tensors["0.gate:grad_output"].append(outputs[0])
        )
        select = [
            Selection(layers=("0",), tensors=("product",), statistics=ASKED, freq=1),
            Selection(layers=("0.gate",), tensors=("grad_output",), freq=1),
            Selection(layers=("0.down",), tensors=("weight",), freq=2),
        ]
        watching = fp8lab.watch(model, path, optimizer=optimizer, every=1, select=select)
        with watching as watch:
            self.tensors["0:product"].clear()  # of the probe that finds the feed-forward
            for step in range(STEPS):
                jump = 40.0 if step == 5 else 0.03 if step == 6 else 1.0
                x = (torch.randn(12, 16).to(dtype) * jump).requires_grad_()
                loss = (model(x) - x).square().mean()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self.tensors["0.down:weight"].append(mlp.down.weight.detach().clone())
                optimizer.step()
                watch.step(step, loss=loss)

    def _keeps(self, name: str) -> Any:
        return lambda module, args: self.tensors[name].append(args[0].detach().clone())


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    return Kept(tmp_path_factory.mktemp("kept") / "run", request.param)


def shares(tensor: Tensor, how: Cast) -> dict[str, float]:
    code, values = how.rounded().abs(), how.fake_quantized()
    if how.rotated:
        tensor = how.tensor
    flushed = (values == 0) & (tensor != 0)
    return {
        "saturated": int(how.saturated().sum()) / tensor.numel(),
        "flushed": int(flushed.sum()) / max(int(tensor.count_nonzero()), 1),
        "subnormal": int(((code > 0) & (code < how.format.smallest_normal)).sum()) / tensor.numel(),
    }


def error(tensor: Tensor, how: Cast) -> float:
    exact = tensor.double()
    return float((how.fake_quantized().double() - exact).norm() / exact.norm())


def rows_of(forecast: fp8lab.Forecast, site: str, gemm: str = "") -> pd.DataFrame:
    frame = forecast.frame
    mine = (frame["site"] == site) & frame["gemms"].str.contains(gemm)
    return frame[mine].reset_index(drop=True)


def scales_of(tensors: Iterable[Tensor], recipe: DelayedScaling, operand: Any) -> list[float]:
    """What a layer that lives through these operands casts them with."""
    recipes: dict[Any, Recipe] = dict.fromkeys(("input", "weight", "grad_output"), HighPrecision())
    layer = Fp8Linear(4, 4, recipes=recipes | {operand: recipe})
    found, column = [], ("input", "weight", "grad_output").index(operand)
    for tensor in tensors:
        found.append(float(layer.scale[column]))
        layer.quantized(layer.cast_as_given(operand, tensor, "grad_weight"), operand, True)
        layer.move_scales(operand)
    return found


@pytest.mark.parametrize("site", ["0:product", "0.gate:grad_output"])
@pytest.mark.parametrize(
    "recipe",
    [
        POWERS,
        DelayedScaling(amax_history_len=3, margin=1),
        Float8CurrentScaling(),
        Float8CurrentScaling(use_power_2_scales=True, fp8_format=Format.E4M3),
        DelayedScaling(amax_compute_algo="most_recent", fp8_format=Format.GAUDI2),
    ],
    ids=["powers", "delayed", "current", "current powers", "most recent"],
)
def test_one_scale_is_what_requantising_finds(kept: Kept, site: str, recipe: Any) -> None:
    operand: Any = "input" if site == "0:product" else "grad_output"
    rows, tensors = rows_of(replay(kept.path, recipe), site), kept.tensors[site]
    assert rows["step"].tolist() == list(range(STEPS))
    assert (rows["reason"] == "").all()
    if isinstance(recipe, DelayedScaling):
        scales = scales_of(tensors, recipe, operand)
    else:
        scales = [float(cast_for(t, recipe, operand).scale) for t in tensors]  # type: ignore[arg-type]
    assert rows["scale"].tolist() == scales
    powers = recipe is POWERS or getattr(recipe, "use_power_2_scales", False)
    measured = site == "0:product" and recipe == Float8CurrentScaling()
    for tensor, (_, row) in zip(tensors, rows.iterrows(), strict=True):
        scale = torch.tensor(row["scale"], dtype=torch.float32)
        how = cast_for(tensor, recipe, operand, scale)
        largest = how.format.max * 2.0 ** -getattr(recipe, "margin", 0)
        amax = float(tensor.float().abs().max())
        assert row["staleness"] == pytest.approx(amax * row["scale"] / largest, rel=1e-12)
        assert row["clipped"] == bool(how.saturated().any())
        for name, share in shares(tensor, how).items():
            low, high = row[f"{name}_low"], row[f"{name}_high"]
            assert low - 1e-15 <= share <= high + 1e-15
            if powers or (measured and name != "subnormal"):
                assert low == high == pytest.approx(share, abs=1e-15)
            # Within a bin, an eighth of an octave: a tenth of the elements of a smooth tensor.
            assert high - low < 0.15
        truth = error(tensor, how)
        assert row["error_low"] * (1 - 1e-5) <= truth <= row["error_high"] * (1 + 1e-5)
        assert row["error"] == pytest.approx(truth, rel=0.25)


AMAXES = st.one_of(
    st.floats(2.0**-20, 2.0**20, width=32),
    st.sampled_from([0.0, float("inf"), 2.0**-149, 3e38, 448.0]),
)
FUNCTIONS = st.sampled_from([None, power_of_two_scale])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(AMAXES, min_size=1, max_size=20),
    st.integers(1, 6),
    st.integers(-2, 3),
    st.sampled_from(["max", "most_recent"]),
    FUNCTIONS,
)
@example([5.0, 1.0, 0.0, 1.0], 2, 0, "max", None)
@example([5.0, 1.0, 0.0, 1.0], 2, 0, "max", power_of_two_scale)
def test_scales_are_those_of_a_layer(
    amaxes: list[float], length: int, margin: int, algorithm: Any, function: Any
) -> None:
    recipe = DelayedScaling(
        amax_history_len=length,
        margin=margin,
        amax_compute_algo=algorithm,
        scaling_factor_compute_algo=function,
    )
    expected = scales_of((torch.tensor([[a, 0.0, 0.0, 0.0]]) for a in amaxes), recipe, "input")
    assert delayed_scales(np.array(amaxes), recipe, formats.E4M3).tolist() == expected


@given(st.lists(AMAXES, min_size=1, max_size=8), st.booleans())
def test_just_in_time_scales_are_those_of_the_cast(amaxes: list[float], powers: bool) -> None:
    tensor = torch.tensor(amaxes, dtype=torch.float32)
    expected = scale_for(tensor, formats.E5M2, power_of_two=powers)
    assert current_scales(np.array(amaxes), formats.E5M2, powers).tolist() == expected.tolist()


def test_an_amax_that_is_not_known_is_in_the_history_until_it_leaves_it() -> None:
    amaxes = np.array([1.0, np.nan, 2.0, 4.0, 1.0, 1.0])
    recipe = DelayedScaling(amax_history_len=2)
    scales = delayed_scales(amaxes, recipe, formats.E4M3)
    assert scales.tolist()[:2] == [1.0, 448.0]
    assert np.isnan(scales[2:4]).all()
    assert scales[4:].tolist() == [112.0, 112.0]


# --- what rows cannot tell ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    [MXFP8BlockScaling(), Float8BlockScaling(), NVFP4BlockScaling(), RowwiseScaling()],
    ids=lambda recipe: type(recipe).__name__,
)
def test_blocks_are_what_was_recorded_of_them(kept: Kept, recipe: Any) -> None:
    forecast = replay(kept.path, recipe)
    rows = rows_of(forecast, "0:product", "output")
    for tensor, (_, row) in zip(kept.tensors["0:product"], rows.iterrows(), strict=True):
        how = cast_for(tensor, recipe, "input")
        share = shares(tensor, how)
        for name in ("saturated", "flushed"):
            low, high = row[f"{name}_low"], row[f"{name}_high"]
            assert low == high == pytest.approx(share[name], rel=1e-12)
        if isinstance(recipe, MXFP8BlockScaling):
            assert row["error"] == row["error_low"] == pytest.approx(error(tensor, how), rel=1e-6)
    assert (rows["reason"] == "").all()
    assert rows["scale"].isna().all()
    gradient = rows_of(forecast, "0.gate:grad_output")
    assert gradient["flushed_low"].isna().all()
    assert "record" in gradient["reason"][0] or "no what-if statistics" in gradient["reason"][0]
    copies = rows_of(forecast, "0:product", "grad_weight")
    assert copies["flushed_low"].notna().all() == isinstance(recipe, MXFP8BlockScaling)


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (MXFP8BlockScaling(scale_rounding="ocp_floor"), "no what-if statistics say what MXFP8"),
        (Float8BlockScaling(use_f32_scales=True), "no what-if statistics say what Float8Block"),
        (Float8BlockScaling(x_block_scaling_dim=2, w_block_scaling_dim=1), "record fp8_block_sc"),
        (fp8lab.BitNetScaling(), "no recording can tell what BitNetScaling does"),
        (DelayedScaling(amax_compute_algo=max), "amax_compute_algo is a function"),
        (DelayedScaling(scaling_factor_compute_algo=max), "scaling_factor_compute_algo is a fu"),
    ],
)
def test_what_cannot_be_told_says_why(kept: Kept, recipe: Any, reason: str) -> None:
    forecast = replay(kept.path, recipe)
    rows = rows_of(forecast, "0:product", "output")
    assert rows["reason"].str.startswith(reason).all()
    assert rows[["flushed_low", "flushed_high", "scale", "staleness"]].isna().all(axis=None)
    assert forecast.unknown["0:product"].startswith(reason)
    assert forecast.serious == ()
    assert "cannot tell" in str(forecast)


def test_a_delayed_scale_needs_every_amax(kept: Kept) -> None:
    forecast = replay(kept.path, DelayedScaling())
    rows = rows_of(forecast, "0.down:weight")
    assert rows["scale"].isna().all()
    assert rows["reason"].str.startswith("a delayed scale needs the amax of every step").all()
    current = rows_of(replay(kept.path, Float8CurrentScaling()), "0.down:weight")
    assert current["step"].tolist() == list(range(0, STEPS, 2))
    expected = [
        shares(tensor, cast_for(tensor, Float8CurrentScaling(), "weight"))["saturated"]
        for tensor in kept.tensors["0.down:weight"][::2]
    ]
    assert current["saturated_low"].tolist() == current["saturated_high"].tolist() == expected


def test_operands_that_were_not_recorded_are_said_to_be_unknown(kept: Kept) -> None:
    unknown = replay(kept.path, Float8CurrentScaling()).unknown
    assert list(unknown) == [
        "input of 2 layers (0.gate, 0.up)",
        "weight of 2 layers (0.gate, 0.up)",
        "grad_output of 2 layers (0.up, 0.down)",
    ]
    assert replay(kept.path, HighPrecision()).unknown == {}


def trained(path: Path, plan: Plan | None = None, **options: Any) -> Path:
    """Three feed-forwards, or with a plan one before a linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(*(fp8lab.GatedFeedForward(32, 64) for _ in range(3)))
    if plan is not None:
        model = fp8lab.convert(nn.Sequential(model[0], nn.Linear(32, 32)), plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with fp8lab.watch(model, path, optimizer=optimizer, every=3, **options) as watch:
        for step in range(5):
            loss = (model(torch.randn(32, 32)) - 1.0).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watch.step(step, loss=loss)
    return path


def test_one_argument_records_what_all_recipes_need(tmp_path: Path) -> None:
    def asked(path: Path) -> list[str]:
        _, *folded = what_if.what_if(load([path]).runs[0], "run")
        return [row[0].text for one in folded for row in one.blocks[0].rows]  # type: ignore[union-attr]

    (select,) = asked(trained(tmp_path / "first"))
    second = trained(tmp_path / "second", **eval(f"dict({select})", {"fp8lab": fp8lab}))
    assert asked(second) == []
    assert [replay(second, recipe).select for recipe in what_if.RECIPES] == [""] * 6


def test_what_a_run_in_fp8_did_not_record_is_named_with_what_records_it(tmp_path: Path) -> None:
    plan = fp8lab.Plan(recipe=DelayedScaling(), overrides={"1:weight": HighPrecision()})
    first = open_run(trained(tmp_path / "first", plan=plan))
    left = not_judged(first)
    assert left.what == (
        "input of 3 layers (0.gate, 0.up, 1), weight of 3 layers (0.gate, 0.up, 0.down), "
        "grad_output of 4 layers (0.gate, 0.up, 0.down, …)"
    )
    select = eval(f"dict({left.select})", {"fp8lab": fp8lab})
    second = open_run(trained(tmp_path / "second", plan=plan, **select))
    assert not_judged(second) == not_judged(open_run(trained(tmp_path / "plain"))) == ("", "")


def test_a_tensor_of_two_names_is_one(tmp_path: Path) -> None:
    """A product is its down projection's input: what is recorded of either is known of it."""
    select = [Selection(layers=("*.down",), tensors=("input",), freq=1)]
    forecast = replay(trained(tmp_path / "run", select=select), DelayedScaling())
    assert list(forecast.frame["site"].unique()) == ["0:product", "1:product", "2:product"]
    assert forecast.frame["flushed_low"].notna().all()
    assert replay(trained(tmp_path / "less"), DelayedScaling()).frame["flushed_low"].isna().any()
    sites = [{"site": "mlp", "gate": "gate.weight", "up": "up.weight", "down": "down.weight"}]
    for product, operand, count in ((2.0, 1.0, 2), (np.inf, np.inf, 1)):
        rows = [{"step": 0, "site": "mlp:product", "cur_amax": product}]
        rows += [{"step": 0, "site": "mlp.down:input", "cur_amax": operand}]  # 1.0: smoothed
        run = write(tmp_path / str(count), steps=[{}], tensors=rows, info={"sites": sites})
        assert replay(run, DelayedScaling()).frame["site"].nunique() == count


def test_rows_and_columns_that_are_cast_apart_have_names_of_their_own(tmp_path: Path) -> None:
    lost = {f"nvfp4_{n}%{end}": 90.0 for n in ("underflows",) for end in ("", "_columnwise")}
    row: Row = {"step": 0, "site": "mlp:product", "count": 100, "zeros": 0, "cur_amax": 1.0}
    run = write(tmp_path / "run", steps=[{}], tensors=[row | {"statistics": lost}])
    told = [trouble.site for trouble in replay(run, NVFP4BlockScaling()).troubles]
    assert told == ["mlp:product", "mlp:product@grad_weight"]


@pytest.mark.parametrize(
    ("cast", "said"),
    [("E4M3 DelayedScaling", True), ("BF16 HighPrecision", False), ("BF16", False)],
)
def test_a_run_that_was_fp8_itself_says_so(tmp_path: Path, cast: str, said: bool) -> None:
    row: Row = {"step": 0, "site": "m:product", "cur_amax": 1.0}
    info = {"precision": {"mlp.down": {"input@output": cast, "weight@output": "BF16"}}}
    run = write(tmp_path / "run", steps=[{}], tensors=[row], info=info)
    told = str(replay(run, Float8CurrentScaling()))
    assert (
        "the run itself has operands in E4M3 DelayedScaling: its tensors have been" in told
    ) == said
    assert "freq=1 measures that in every step" in told


@pytest.mark.parametrize(
    "recipe",
    [
        DelayedScaling(),
        Float8CurrentScaling(),
        Float8BlockScaling(),
        MXFP8BlockScaling(),
        NVFP4BlockScaling(),
        RowwiseScaling(),
    ],
    ids=lambda recipe: type(recipe).__name__,
)
def test_what_is_not_known_is_once_it_is_recorded_as_was_told(tmp_path: Path, recipe: Any) -> None:
    """`select` is Python, and with it a run knows all that a record can tell."""
    first = replay(trained(tmp_path / "first"), recipe)
    assert first.unknown and first.select in str(first)
    assert "…" not in first.select and first.select == first.to_dict()["select"]
    told = eval(f"dict({first.select})", {"fp8lab": fp8lab})
    assert all(isinstance(one, Selection) for one in told["select"])
    second = replay(trained(tmp_path / "second", **told), recipe)
    assert second.select == "" and "to know it" not in str(second)
    assert all("no what-if statistics" in why for why in second.unknown.values())
    assert (second.unknown == {}) == (not isinstance(recipe, NVFP4BlockScaling))


def test_what_no_watch_can_record_is_not_asked_for(tmp_path: Path) -> None:
    """`watch` refuses a selection of which it sees nothing, and a LayerNormMLP hides its layers."""
    sizes = {"in": 32, "out": 32}
    inside = {"class": "transformer_engine.LayerNormMLP", **sizes}
    linears = {"mlp.fc1": inside, "mlp.fc2": inside, "head": {"class": "Linear", **sizes}}
    sites = [{"site": "mlp", "gate": "fc1_weight", "up": "fc1_weight", "down": "fc2_weight"}]
    info = {"linears": linears, "sites": sites}
    run = write(tmp_path / "run", steps=[{}], tensors=[{"step": 0, "site": "mlp:x"}], info=info)
    told = replay(run, Float8CurrentScaling())
    assert "mlp.fc1, mlp.fc2" in str(told.unknown)
    selections = eval(f"dict({told.select})", {"fp8lab": fp8lab})["select"]
    assert [one.layers for one in selections] == [("head",)]


def test_layers_that_differ_in_numbers_are_one_pattern() -> None:
    layers = [f"layers.{n}.mlp.{name}" for n in range(80) for name in ("gate", "up")]
    missing = [Missing(layer, "weight") for layer in [*layers, "head", "odd[1]*"]]
    missing += [Missing("head", "input", ("a", "b")), Missing("head", "input", ("b", "c"))]
    told = eval(f"dict({select_of(missing)})", {"fp8lab": fp8lab})["select"]
    assert [one.layers for one in told] == [
        ("layers.*.mlp.gate", "layers.*.mlp.up", "head", "odd[[]1][*]"), ("head",)
    ]  # fmt: skip
    assert all(told[0].names(one.layer, "weight") for one in missing[:-2])
    assert not told[0].names("odd11", "weight")
    assert told[1].statistics == ("a", "b", "c")
    assert select_of([]) == ""


def old_runs(folder: Path, version: int) -> list[Path]:
    name = f"runs_of_version_{version}.tar.xz"
    with tarfile.open(Path(__file__).parent / "data" / name) as archive:
        archive.extractall(folder, filter="data")
    return [folder / "runs" / "closed", folder / "runs" / "killed"]


def test_rows_of_version_2_give_bounds(tmp_path: Path) -> None:
    closed, killed = old_runs(tmp_path, 2)
    told = "recorded with its amax alone (4 of 8 steps)"
    assert replay(closed, DelayedScaling()).unknown["0:product"] == told
    frame = replay(killed, DelayedScaling(scaling_factor_compute_algo=power_of_two_scale)).frame
    for step, row in frame.iterrows():
        tensor = torch.tensor([2.0**k * 1.5 for k in range(-4, 4)]) * (float(step) + 1)  # type: ignore[arg-type]
        how = cast_for(tensor, POWERS, "input", torch.tensor(row["scale"], dtype=torch.float32))
        for name, share in shares(tensor, how).items():
            assert row[f"{name}_low"] <= share <= row[f"{name}_high"]
        assert row["error_low"] <= error(tensor, how) <= row["error_high"]


def test_rows_of_version_1_are_read(tmp_path: Path) -> None:
    for path in old_runs(tmp_path, 1):
        assert [*replay(path, DelayedScaling()).frame.columns] == [*COLUMNS]


# --- runs that are made -------------------------------------------------------------------------


def made(
    path: Path, rows: Iterable[dict[str, Any]], info: Any = None, steps: int | None = None
) -> Path:
    rows = list(rows)
    for rank in sorted({max(row.get("rank", 0), 0) for row in rows} | {0}):
        writer = RunWriter.create(path, {"job": "made"} | (info or {}), rank=rank)
        mine = [row for row in rows if max(row.get("rank", 0), 0) == rank]
        writer.append("tensors", mine)
        count = max((row["step"] for row in rows), default=-1) + 1 if steps is None else steps
        writer.append("steps", [{"step": step} for step in range(count)])
        writer.close()
    return path


def row_of(step: int, tensor: Tensor, site: str = "mlp:product", **more: Any) -> dict[str, Any]:
    sketch = Sketch.from_packed(summary(tensor).packed.numpy())
    return {"step": step, "site": site} | sketch.statistics() | more


def sentinels(amaxes: Iterable[float], site: str = "mlp:product") -> list[dict[str, Any]]:
    return [{"step": s, "site": site, "cur_amax": amax} for s, amax in enumerate(amaxes)]


def kinds(forecast: fp8lab.Forecast) -> list[str]:
    return [trouble.kind for trouble in forecast.troubles]


def test_of_several_processes_the_hottest_is_told_and_all_share_a_history(tmp_path: Path) -> None:
    cold, hot = torch.tensor([1.0, 0.5]), torch.tensor([4.0, 2.0**-12])
    pairs = [(cold, hot), (hot, cold), (cold, cold)]
    rows = [
        row_of(step, tensor, rank=rank) for step, pair in enumerate(pairs)
        for rank, tensor in enumerate(pair)
    ]  # fmt: skip
    path = made(tmp_path / "apart", rows)
    shared = replay(path, DelayedScaling(amax_history_len=1)).frame
    assert shared["rank"].tolist() == [1, 0, 0]
    assert shared["scale"].tolist() == [1.0, 112.0, 112.0]
    assert shared["cur_amax"].tolist() == [4.0, 4.0, 1.0]
    alone = replay(path, DelayedScaling(amax_history_len=1, reduce_amax=False)).frame
    assert alone["scale"].tolist() == [1.0, 448.0, 112.0]
    assert alone["clipped"].tolist() == [False, True, False]
    merged = [row_of(step, torch.cat(pair), rank=-1) for step, pair in enumerate(pairs)]
    path = made(tmp_path / "together", rows + merged)
    together = replay(path, DelayedScaling(amax_history_len=1)).frame
    assert together["rank"].tolist() == [-1, -1, -1]
    assert together["scale"].tolist() == [1.0, 112.0, 112.0]
    assert together["flushed_low"].tolist() == [0.25, 0.0, 0.0]
    assert shared["flushed_low"].tolist() == [0.5, 0.0, 0.0]


def test_steps_with_their_amax_alone_tell_only_of_clipping(tmp_path: Path) -> None:
    path = made(tmp_path / "run", sentinels([1.0, 1.0, 8.0, 1.0]))
    frame = replay(path, DelayedScaling(amax_history_len=2)).frame
    assert frame["staleness"].tolist() == [1 / 448, 1.0, 8.0, 0.125]
    assert frame["clipped"].tolist() == [False, False, True, False]
    assert frame["saturated_high"].fillna(-1.0).tolist() == [0.0, 0.0, -1.0, 0.0]
    assert frame["flushed_low"].isna().all()
    assert frame["reason"].unique().tolist() == ["recorded with its amax alone"]


def test_what_is_not_finite(tmp_path: Path) -> None:
    infinite = torch.tensor([1.0, float("inf")])
    rows = [row_of(0, torch.ones(2)), row_of(1, infinite), row_of(2, torch.ones(2))]
    rows += [{"step": 3, "site": "mlp:product"}, row_of(4, torch.ones(2))]
    frame = replay(made(tmp_path / "run", rows), DelayedScaling(amax_history_len=2)).frame
    assert frame["scale"].fillna(-1.0).tolist() == [1.0, 448.0, 448.0, 448.0, -1.0]
    assert frame["saturated_low"].fillna(-1.0).tolist() == [0.0, 0.5, 0.0, -1.0, -1.0]
    assert frame["reason"].tolist()[3:] == ["recorded with its amax alone", "an amax is not known"]


@pytest.mark.parametrize("recipe", [DelayedScaling(), MXFP8BlockScaling(), HighPrecision()])
def test_an_empty_run_tells_nothing(recipe: Any, tmp_path: Path) -> None:
    forecast = replay(made(tmp_path / "run", []), recipe)
    assert [*forecast.frame.columns] == [*COLUMNS]
    assert (forecast.troubles, forecast.breaks_at) == ((), None)
    is_needless = isinstance(recipe, HighPrecision)
    assert ("nothing to forecast" if is_needless else "cannot tell") in str(forecast)


def test_bins_that_are_damaged_are_an_error_in_one_line(tmp_path: Path) -> None:
    path = made(tmp_path / "run", [row_of(0, torch.ones(3), bins=b"\0\0\x05abc")])
    with pytest.raises(RunError, match="run: damaged: mlp:product: bins: 6 bytes, expected"):
        replay(path, Float8CurrentScaling())


# --- which operand of which layer ---------------------------------------------------------------

SITES = [
    {"site": "a.mlp", "gate": "gate.weight", "up": "up.weight", "down": "down.weight"},
    {"site": "b.mlp", "gate": "gate_up.weight", "up": "gate_up.weight", "down": "w2"},
    {"site": ".", "gated": False, "up": "up.weight", "down": "down.weight"},
    "nonsense",
    {"site": 3},
]


def test_tensors_are_operands_of_layers(tmp_path: Path) -> None:
    names = ["a.mlp:product", "a.mlp:gate", "a.mlp:grad_gate", "a.mlp:grad_output", "b.mlp:grad_up"]
    names += ["b.mlp:product", ".:product", "q:input", "q:grad_output", "q:weight", "x:product"]
    names += ["skipped:weight", "a.mlp:output", "q:grad_weight", "q:exp_avg"]
    path = made(
        tmp_path / "run", [row_of(0, torch.ones(2), name) for name in names], {"sites": SITES}
    )
    run = open_run(path)
    found = uses_of(run, recorded_sites(run), Plan(recipe=DelayedScaling(), exclude=("skipped",)))
    assert {(use.site, use.layer, use.operand) for use in found.cast} == {
        ("a.mlp:product", "a.mlp.down", "input"),
        ("a.mlp:grad_gate", "a.mlp.gate", "grad_output"),
        ("a.mlp:grad_output", "a.mlp.down", "grad_output"),
        ("b.mlp:product", "b.mlp.w2", "input"),
        (".:product", "down", "input"),
        ("q:input", "q", "input"),
        ("q:grad_output", "q", "grad_output"),
        ("q:weight", "q", "weight"),
        ("x:product", "x.down", "input"),
    }
    assert found.left_out == ["skipped:weight"]
    assert list(found.unknown) == ["b.mlp:grad_up"]
    assert "b.mlp.gate_up:grad_output" in found.unknown["b.mlp:grad_up"]


def test_gemms_that_take_other_codes_are_told_apart(tmp_path: Path) -> None:
    path = made(tmp_path / "run", sentinels([1.0, 600.0]))
    copies = Float8CurrentScaling(fp8_format=Format.HYBRID_E5M2_COPIES)
    frame = replay(path, copies).frame
    assert frame["gemms"].tolist() == ["grad_weight"] * 2 + ["output"] * 2
    assert frame["format"].tolist() == ["E5M2"] * 2 + ["E4M3"] * 2
    assert frame["scale"].tolist() == pytest.approx([57344.0, 57344 / 600, 448.0, 448 / 600])
    plan = Plan(recipe=copies, overrides={"*:input@grad_weight": HighPrecision()})
    assert replay(path, plan).frame["format"].tolist() == ["BF16"] * 2 + ["E4M3"] * 2
    assert replay(path, DelayedScaling()).frame["gemms"].unique().tolist() == [
        "output, grad_weight"
    ]


# --- decisions ----------------------------------------------------------------------------------

STOCK = DelayedScaling(amax_history_len=4)


def jumps(staleness: Iterable[tuple[int, float]], again: int, release: float = 1.0) -> list[float]:
    """Amaxes of 1 with jumps that are clipped, and after the last of them one that is not, which
    falls among amaxes of 0.1."""
    jumped = dict(staleness)
    last = max(jumped)
    steps = last + 8
    amaxes = [jumped.get(step, 1.0 if step <= last else 0.1) for step in range(steps)]
    amaxes[last + again] = release * jumped[last]
    return amaxes


HALF = 2.0 ** (WOUND_UP / 2)


@pytest.mark.parametrize(
    ("amaxes", "step"),
    [
        (jumps([(10, HALF), (30, HALF)], 2), 32),
        (jumps([(10, HALF * 0.99), (30, HALF)], 2), None),
        (jumps([(10, HALF), (30, HALF)], 3), 33),
        (jumps([(10, HALF), (30, HALF)], 5), None),  # it is clipped anew
        (jumps([(10, HALF), (9 + WINDOW, HALF)], 2), 11 + WINDOW),
        (jumps([(10, HALF), (10 + WINDOW, HALF)], 2), None),
        (jumps([(10, 64.0)], 2, RELEASED), 12),
        (jumps([(10, 64.0)], 2, RELEASED * 0.99), None),
        ([64000.0, 1.0, 1.0, 1.0, 1.0], None),  # a cold start
    ],
)
def test_a_wound_up_product_that_jumps_unclipped_breaks(
    amaxes: list[float], step: int | None, tmp_path: Path
) -> None:
    forecast = replay(made(tmp_path / "run", sentinels(amaxes)), STOCK)
    assert forecast.breaks_at == step
    assert ("breaks" in kinds(forecast)) == (step is not None)
    inputs = made(tmp_path / "inputs", sentinels(amaxes, "mlp.down:input"))
    assert replay(inputs, STOCK).breaks_at is None  # of a gate product only
    assert replay(tmp_path / "run", Float8CurrentScaling()).troubles == ()


def test_a_staleness_above_an_octave_is_a_warning(tmp_path: Path) -> None:
    for factor, expected in ((2.0, []), (2.001, ["clips"])):
        path = made(tmp_path / f"{factor}", sentinels([1.0, 1.0, factor, 1.0]))
        forecast = replay(path, STOCK)
        assert kinds(forecast) == expected
        assert forecast.serious == ()
        assert ("you may switch" in str(forecast)) == (expected == [])
        assert ("let a short run in FP8 decide" in str(forecast)) == (expected != [])


def test_saturation_beyond_fp8_lms_rule_is_a_warning(tmp_path: Path) -> None:
    count = round(1 / SATURATED)
    for extra, expected in ((0, []), (-1, ["clips"])):
        tensor = torch.ones(count + extra)
        tensor[0] = 1.5
        rows = [row_of(0, torch.ones(2)), row_of(1, tensor)]
        forecast = replay(made(tmp_path / f"{extra}", rows), STOCK)
        assert kinds(forecast) == expected


@pytest.mark.parametrize(("lost", "expected"), [(50, []), (51, ["underflows"])])
def test_most_becoming_zero_is_trouble(lost: int, expected: list[str], tmp_path: Path) -> None:
    assert MOST == 0.5
    tensor = torch.ones(100)
    tensor[:lost] = 2.0**-20
    path = made(tmp_path / "run", [row_of(s, tensor, "q:grad_output") for s in range(3)])
    plan = Plan(recipe=Float8CurrentScaling(fp8_format=Format.E4M3))
    forecast = replay(path, plan)
    assert kinds(forecast) == expected
    if expected:
        (trouble,) = forecast.troubles
        assert (trouble.step, trouble.steps, trouble.known_steps) == (0, 3, 3)
        assert (trouble.worst, trouble.quantity) == (0.51, "flushed")
        assert forecast.safer_plan.overrides == {"q:grad_output": HighPrecision()}
        assert replay(path, forecast.safer_plan).serious == ()
        # Of overrides the last one wins, and this one is there already, before another.
        current = Float8CurrentScaling(fp8_format=Format.E4M3)
        overrides = {"q:grad_output": current, "*:grad_output": current}
        forecast = replay(path, Plan(recipe=plan.recipe, overrides=overrides))
        assert replay(path, forecast.safer_plan).serious == ()


@pytest.mark.parametrize(("octaves", "expected"), [(14, []), (17, ["underflows"])])
def test_a_bulk_that_loses_its_digits_is_trouble(
    octaves: int, expected: list[str], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    bulk = torch.rand(4000, generator=generator) + 1e-3
    tensor = torch.cat([bulk, torch.tensor([2.0**octaves])])
    row = row_of(4, tensor, channel_ratio=2.0**octaves)
    forecast = replay(made(tmp_path / "run", [row], steps=5), Float8CurrentScaling())
    assert kinds(forecast) == expected
    how = cast_for(tensor, Float8CurrentScaling(), "input")
    truth = float((how.fake_quantized()[:-1] - bulk).norm() / bulk.norm())
    assert (truth > DAMAGED) == bool(expected)
    assert forecast.frame["bulk_error"][0] == pytest.approx(truth, rel=0.1)


@pytest.mark.parametrize(("amax", "expected"), [(65504.0, []), (65600.0, ["overflows"])])
def test_fp16_has_a_largest_value(amax: float, expected: list[str], tmp_path: Path) -> None:
    path = made(tmp_path / "run", sentinels([1.0, amax]))
    forecast = replay(path, HighPrecision(format=formats.FP16))
    assert kinds(forecast) == expected
    assert forecast.breaks_at == (1 if expected else None)
    assert replay(path, HighPrecision()).troubles == ()


def test_a_cold_start_is_told_and_no_trouble(tmp_path: Path) -> None:
    tensor = torch.full((4,), 2.0**-12)
    path = made(tmp_path / "run", [row_of(s, tensor) for s in range(2)])
    forecast = replay(path, STOCK)
    assert forecast.frame["flushed_low"].tolist() == [1.0, 0.0]
    assert forecast.troubles == ()
    assert "cold start: scale 1 makes zeros of 100% of what is not zero" in str(forecast)


def test_what_the_run_itself_met_is_told(tmp_path: Path) -> None:
    writer = RunWriter.create(tmp_path / "run", {})
    writer.append("events", [{"step": 7, "kind": "nonfinite_loss"}])
    writer.close()
    told = str(replay(tmp_path / "run", STOCK))
    assert told.endswith("from step 7 on the run's own loss is not finite")


# --- the command line ---------------------------------------------------------------------------


def test_the_command_decides(tmp_path: Path) -> None:
    path = made(tmp_path / "run", sentinels(jumps([(10, 64.0)], 2)))
    (tmp_path / "plan.yaml").write_text("recipe: DelayedScaling\namax_history_len: 4\n")
    runner = CliRunner()
    arguments = ["replay", str(path), "--recipe"]
    bad = runner.invoke(app, [*arguments, str(tmp_path / "plan.yaml")])
    assert bad.exit_code == 1
    lines = bad.stdout.splitlines()
    assert lines[0].endswith("× DelayedScaling(amax_history_len=4), 18 steps of 1 tensors:")
    assert lines[1] == "expected trouble at step 12; switch to FP8 only with these in BF16"
    assert lines[2].startswith("  mlp:product (mlp.down, input): breaks at step 12: octaves clip")
    good = runner.invoke(app, [*arguments, "Float8CurrentScaling", "--json"])
    assert good.exit_code == 0
    data = json.loads(good.stdout)
    assert data["plan"] == {"recipe": "Float8CurrentScaling"}
    assert (data["breaks_at"], data["troubles"], data["safer_plan"]) == (None, [], None)
    assert data["operands"][0]["clipped_steps"] == 0
    data = json.loads(
        runner.invoke(app, [*arguments, str(tmp_path / "plan.yaml"), "--json"]).stdout
    )
    assert data["safer_plan"]["overrides"] == {"mlp.down:input": {"recipe": "HighPrecision"}}
    assert (data["breaks_at"], data["troubles"][0]["kind"]) == (12, "breaks")


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (
            "Nothing",
            "recipe Nothing: no such file, expected a YAML file or one of DelayedScaling, ",
        ),
        (
            "DelayedScalling",
            "recipe DelayedScalling: no such file, expected a YAML file or Delayed",
        ),
        ("there/is/none.yaml", "there/is/none.yaml: No such file or directory"),
    ],
)
def test_a_recipe_that_is_none_is_an_error_in_one_line(
    recipe: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = made(tmp_path / "run", [])
    monkeypatch.setattr("sys.argv", ["fp8lab", "replay", str(path), "--recipe", recipe])
    with pytest.raises(SystemExit) as ended:
        app()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {expected}")
    assert told.count("\n") == 1


def test_what_is_no_recipe_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path / "run", [])
    with pytest.raises(ValueError, match=r"^replay: 'DelayedScaling', expected one of Delayed"):
        replay(path, "DelayedScaling")
    with pytest.raises(RunError, match="no run here"):
        replay(tmp_path, DelayedScaling())


def test_of_a_plan_without_fp8_there_is_nothing_to_forecast(tmp_path: Path) -> None:
    path = made(tmp_path / "run", sentinels(jumps([(10, 64.0)], 2)))
    told = "nothing to forecast: this plan has no operand in FP8"
    result = CliRunner().invoke(app, ["replay", str(path), "--recipe", "HighPrecision"])
    assert (result.exit_code, result.stdout.splitlines()[1]) == (0, told)
    high = HighPrecision()
    for plan, expected in (
        (Plan(recipe=high, overrides={"*:input": high}), True),
        (Plan(recipe=high, overrides={"*:input": Float8CurrentScaling()}), False),
        (Plan(recipe=HighPrecision(format=formats.FP16)), False),
        (Plan(recipe=Float8CurrentScaling(), overrides={"*:input": high}), False),
    ):
        assert (told in str(replay(path, plan))) == expected
