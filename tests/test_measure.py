"""Every measured column against its definition in `record`, written out again in plain numpy.

The casts of the oracle are `FloatFormat.round`, one element at a time, between float32 products:
what casting's formulas say, without casting's code. Nothing is taken from `measure` but what is
tested. Shares and extremes are equal; sums may differ by the rounding of their order.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fp8lab import formats, kernels
from fp8lab.casting import Cast, cast_for
from fp8lab.formats import FloatFormat
from fp8lab.monitor import measure
from fp8lab.recipe import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    HighPrecision,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    Recipe,
    RowwiseScaling,
)

F64 = NDArray[np.float64]
SUM_TOLERANCE = 1e-12


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(tensor: Tensor) -> F64:
    """float64 [tokens, channels]"""
    return tensor.detach().double().numpy().reshape(-1, tensor.shape[-1])


def heavy(channels: int = 25, seed: int = 0) -> Tensor:
    """A product [3, 7, channels] with tails, zeros, tiny values and two outlier channels."""
    tensor = normal(3, 7, channels, seed=seed) ** 5
    tensor[0, 0] = 0.0
    tensor[..., 4] *= 900.0
    tensor[..., 11] *= 60.0
    tensor[..., 13] *= 1e-4
    tensor[..., 14] = 0.0
    return tensor


# --- sentinel: at every step ------------------------------------------------------------------


def sentinel(product: Tensor, how: Cast | None) -> list[float]:
    values: list[float] = measure.sentinel_vector(product, how).tolist()
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sentinel_finds_the_largest_magnitude_and_its_channel(dtype: torch.dtype) -> None:
    product = heavy().to(dtype)
    product[2, 3, 19] = -1e6
    amax, channel, scale, staleness = sentinel(product, None)
    assert amax == np.abs(plain(product)).max()
    assert channel == 19
    assert math.isnan(scale)
    assert math.isnan(staleness)


@pytest.mark.parametrize("margin", [0, 2, -1])
@pytest.mark.parametrize("made_by", [0.5, 3.0, 700.0])
def test_staleness_is_amax_over_the_amax_that_made_the_scale(made_by: float, margin: int) -> None:
    recipe = DelayedScaling(margin=margin)
    scale = np.float32(448.0 * 2.0**-margin) / np.float32(made_by)
    product = heavy()
    how = cast_for(product, recipe, "input", torch.tensor(scale))
    _, _, in_force, staleness = sentinel(product, how)
    assert in_force == scale
    # The scale is rounded to float32, the ratio is not.
    assert staleness == pytest.approx(np.abs(plain(product)).max() / made_by, rel=2.0**-23)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_just_in_time_scale_is_never_stale(power_of_two: bool) -> None:
    recipe = Float8CurrentScaling(use_power_2_scales=power_of_two)
    product = heavy()
    how = cast_for(product, recipe, "input")
    _, _, scale, staleness = sentinel(product, how)
    exact = np.float32(448.0) / np.float32(np.abs(plain(product)).max())
    assert scale == (2.0 ** math.floor(math.log2(exact)) if power_of_two else exact)
    assert staleness == 1.0


def test_staleness_is_that_of_the_operand_as_it_is_cast() -> None:
    product = heavy()
    scale = torch.full((25,), 0.25)
    how = cast_for(product * scale, DelayedScaling(), "input", torch.tensor(448.0))
    amax, _, _, staleness = sentinel(product, how._replace(channel_scale=scale))
    assert amax == np.abs(plain(product)).max()
    assert staleness == amax / 4


def test_high_precision_has_neither_scale_nor_staleness() -> None:
    how = cast_for(heavy(), HighPrecision(), "input")
    assert np.isnan(sentinel(heavy(), how)[2:]).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_sentinel_shows_what_is_not_finite(bad: float) -> None:
    product = heavy()
    product[1, 2, 9] = bad
    how = cast_for(product, DelayedScaling(), "input", torch.tensor(2.0))
    amax, channel, _, _ = sentinel(product, how)
    assert not math.isfinite(amax)
    assert channel == 9


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
def test_a_summary_saves_the_sentinel_its_pass(bad: float | None) -> None:
    product = heavy()
    product[2, 3, 19] = -1e6
    product[1, 2, 9] = 1e6  # the first of two alike
    if bad is not None:
        product[1, 2, 12] = bad
    how = cast_for(product, DelayedScaling(), "input", torch.tensor(2.0))
    seen = measure.sentinel_vector(product, how, measure.summary(product))
    np.testing.assert_array_equal(seen, measure.sentinel_vector(product, how))
    assert seen[1] == (9 if bad is None else 12)


def test_the_sentinel_of_nothing_is_zero() -> None:
    assert sentinel(torch.zeros(0, 7), None)[:2] == [0.0, 0.0]


# --- amax and power: what the factors of a product are held against it by ----------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("channels", [1, 25, 5000])
def test_amax_and_power_are_those_of_the_tensor(dtype: torch.dtype, channels: int) -> None:
    tensor = normal(3, 7, channels).to(dtype)
    x = plain(tensor if dtype is not torch.float64 else tensor.float())
    expected = [np.abs(x).max(), np.square(x).sum()]
    for seen in (tensor, measure.summary(tensor)):
        found = measure.amax_and_power(seen)
        assert found.dtype is torch.float64
        assert found.tolist() == pytest.approx(expected, rel=SUM_TOLERANCE)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_amax_and_power_show_what_is_not_finite(bad: float) -> None:
    tensor = heavy()
    tensor[1, 2, 9] = bad
    for seen in (tensor, measure.summary(tensor)):
        assert not measure.amax_and_power(seen).isfinite().all()


def test_amax_and_power_of_nothing_are_zero() -> None:
    for tensor in (torch.zeros(0, 8), torch.zeros(8, 0), torch.zeros(4, 8)):
        for seen in (tensor, measure.summary(tensor)):
            assert measure.amax_and_power(seen).tolist() == [0.0, 0.0]


# --- operand: what the cast did ---------------------------------------------------------------


def expected_cast(how: Cast) -> tuple[F64, F64, F64]:
    """What meets the grid, the grid's values, and the values after the cast; [tokens, channels]."""
    tensor = plain(how.tensor).astype(np.float32)
    scale = np.float32(1.0 if how.scale is None else how.scale.item())
    met = tensor * scale
    grid = np.array([how.format.round(x) for x in met.ravel().tolist()]).reshape(met.shape)
    back = grid.astype(np.float32) * (np.float32(1.0) / scale)
    channel_scale = 1.0 if how.channel_scale is None else how.channel_scale.double().numpy()
    return met.astype(np.float64), grid, back.astype(np.float64) / channel_scale


def expected_operand(product: Tensor, how: Cast) -> dict[str, float]:
    """The columns of `record.TENSORS` from "saturated" on, each from its one-line meaning; those
    that are not finite (FP16 overflows to infinity) are missing."""
    x = plain(product)
    met, grid, cast = expected_cast(how)
    error, nonzero = cast - x, x != 0
    amax = np.abs(x).max(axis=0)
    bulk = amax <= 16.0 * np.median(amax)
    row = {
        "saturated": float((np.abs(met) > how.format.max * (1 + 2.0**-23)).mean()),
        "subnormal": float(((grid != 0) & (np.abs(grid) < how.format.smallest_normal)).mean()),
        "mse": float(np.square(error).mean()),
    }
    if nonzero.any():
        row["flushed"] = float((cast[nonzero] == 0).mean())
    if 0 < np.square(error).sum() < math.inf and nonzero.any():
        row["sqnr_db"] = 10 * math.log10(np.square(x).sum() / np.square(error).sum())
    if nonzero.any() and cast.any() and np.isfinite(cast).all():
        row["cosine"] = float((x * cast).sum() / np.linalg.norm(x) / np.linalg.norm(cast))
    if x[:, bulk].any():
        row["bulk_error"] = float(np.linalg.norm(error[:, bulk]) / np.linalg.norm(x[:, bulk]))
    return {name: value for name, value in row.items() if math.isfinite(value)}


def operand_row(*casts: Cast) -> dict[str, float]:
    sums = np.sum([measure.operand_vector(how).numpy() for how in casts], axis=0)
    return measure.operand_statistics(sums)


RECIPES: dict[str, tuple[Recipe, float | None]] = {
    "delayed": (DelayedScaling(), 0.07),
    "delayed, stale": (DelayedScaling(), 2.0),  # clips
    "delayed, too small": (DelayedScaling(), 1e-4),  # flushes
    "delayed, margin": (DelayedScaling(margin=3), 0.3),
    "current": (Float8CurrentScaling(), None),
    "current, powers of two": (Float8CurrentScaling(use_power_2_scales=True), None),
    "BF16": (HighPrecision(), None),
    "FP16": (HighPrecision(format=formats.FP16), None),
    "FP32": (HighPrecision(format=formats.FP32), None),
}


def cast_as(name: str, tensor: Tensor) -> Cast:
    recipe, scale = RECIPES[name]
    return cast_for(tensor, recipe, "input", None if scale is None else torch.tensor(scale))


@pytest.mark.parametrize("channels", [24, 25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RECIPES)
def test_operand_columns_are_their_definitions(
    name: str, dtype: torch.dtype, channels: int
) -> None:
    product = heavy(channels).to(dtype)
    how = cast_as(name, product)
    expected = expected_operand(product, how)
    assert operand_row(how) == pytest.approx(expected, rel=SUM_TOLERANCE, abs=1e-300)


@pytest.mark.parametrize("name", RECIPES)
def test_a_channel_scale_is_undone_before_errors_are_taken(name: str) -> None:
    product = heavy()
    channel_scale = 2.0 ** torch.randint(-9, 9, (25,), generator=torch.Generator().manual_seed(0))
    how = cast_as(name, product * channel_scale)._replace(channel_scale=channel_scale)
    expected = expected_operand(product, how)
    assert operand_row(how) == pytest.approx(expected, rel=SUM_TOLERANCE, abs=1e-300)


def test_the_cases_show_every_way_to_fail() -> None:
    rows = {name: operand_row(cast_as(name, heavy())) for name in RECIPES}
    assert rows["delayed, stale"]["saturated"] > 0.01
    assert rows["delayed, too small"]["flushed"] > 0.5
    assert rows["delayed"]["subnormal"] > 0.05
    assert rows["current"]["saturated"] == 0.0
    assert rows["FP32"]["mse"] == 0.0
    assert "sqnr_db" not in rows["FP32"]
    bulk, all_channels = rows["current"]["bulk_error"], rows["current"]["sqnr_db"]
    assert bulk > 2 * 10 ** (-all_channels / 20)  # the outliers hide what the rest suffers


def test_the_median_of_an_even_number_of_channels_is_between_the_middle_ones() -> None:
    # Amaxes 1, 1, 3, 20: the last is beyond 16 times the lower middle one, not 16 times the median.
    product = torch.tensor([[1.0, 1.0, 3.0, 20.0], [0.3, 0.7, 2.9, 1.7]])
    how = cast_as("current", product)
    everything = 10 ** (-operand_row(how)["sqnr_db"] / 20)
    assert operand_row(how)["bulk_error"] == pytest.approx(everything, rel=SUM_TOLERANCE)


@pytest.mark.parametrize("seed", range(30))
def test_just_in_time_scales_saturate_nothing(seed: int) -> None:
    # In one of ten such tensors x · scale is rounded one step above the format's largest value.
    assert operand_row(cast_as("current", heavy(seed=seed)))["saturated"] == 0.0


def test_a_value_rounded_up_to_the_smallest_normal_is_not_subnormal() -> None:
    just_below = float(np.nextafter(np.float32(2.0**-6), np.float32(0.0)))
    product = torch.tensor([[just_below, 2.0**-7, 2.0**-11, 1.0]])
    row = operand_row(cast_for(product, DelayedScaling(), "input", torch.tensor(1.0)))
    assert (row["subnormal"], row["flushed"]) == (0.25, 0.25)


def test_what_the_scale_itself_flushes_counts_as_flushed() -> None:
    product = torch.tensor([[1e-20, 1e-30, 0.0, 3e38]])
    row = operand_row(cast_for(product, DelayedScaling(), "input", torch.tensor(1e-30)))
    assert row["flushed"] == pytest.approx(2 / 3)


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    parts = [heavy(seed=seed) for seed in range(3)]
    whole = torch.cat(parts)
    expected = expected_operand(whole, cast_as("delayed", whole))
    merged = operand_row(*(cast_as("delayed", part) for part in parts))
    # All but the bulk, whose channels are chosen per micro-batch.
    for row in (merged, expected):
        row.pop("bulk_error")
    assert merged == pytest.approx(expected, rel=SUM_TOLERANCE)


def test_an_all_zero_operand_has_no_ratios() -> None:
    row = operand_row(cast_as("current", torch.zeros(4, 8)))
    assert row == {"saturated": 0.0, "subnormal": 0.0, "mse": 0.0}


def test_infinity_in_an_outlier_channel_leaves_the_bulk_error() -> None:
    product = normal(6, 8)
    product[2, 3] = math.inf
    how = cast_for(product, DelayedScaling(), "input", torch.tensor(100.0))
    row = operand_row(how)
    assert row.keys() == {"saturated", "flushed", "subnormal", "bulk_error"}
    rest = product[:, [0, 1, 2, 4, 5, 6, 7]]
    alone = operand_row(how._replace(tensor=rest))
    assert row["bulk_error"] == pytest.approx(alone["bulk_error"], rel=SUM_TOLERANCE)


def test_nan_leaves_the_shares_only() -> None:
    product = normal(6, 8)
    product[2, 3] = math.nan
    how = cast_for(product, DelayedScaling(), "input", torch.tensor(100.0))
    assert operand_row(how).keys() == {"saturated", "flushed", "subnormal"}


# --- channels and rows ------------------------------------------------------------------------


def weights_of(channels: int, dim: int) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    gate, up = normal(channels, dim, seed=5), normal(channels, dim, seed=6)
    up[2] = 3.0 * gate[2]
    down = normal(dim, channels, seed=7)
    return nn.Parameter(gate), nn.Parameter(up), nn.Parameter(down)


@pytest.mark.parametrize("channels", [24, 25])
def test_channel_columns_are_their_definitions(channels: int) -> None:
    product, gate, up = heavy(channels), heavy(channels, seed=1), heavy(channels, seed=2)
    weights = weights_of(channels, 16)
    got = measure.channel_matrix(product, gate, up, weights).numpy()
    gates, ups, downs = (plain(weight) for weight in weights)

    def cosine(a: F64, b: F64) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    for c in range(channels):
        expected = {
            "product_amax": np.abs(plain(product)[:, c]).max(),
            "gate_amax": np.abs(plain(gate)[:, c]).max(),
            "up_amax": np.abs(plain(up)[:, c]).max(),
            "alignment": cosine(gates[c], ups[c]),
            "permuted_alignment": cosine(gates[c], ups[(c + channels // 2) % channels]),
            "gate_norm": np.linalg.norm(gates[c]),
            "up_norm": np.linalg.norm(ups[c]),
            "down_norm": np.linalg.norm(downs[:, c]),
        }
        row = dict(zip(measure.CHANNEL_COLUMNS, got[:, c].tolist(), strict=True))
        assert row == pytest.approx(expected, rel=SUM_TOLERANCE, abs=1e-14)
    assert got[3, 2] == pytest.approx(1.0, rel=SUM_TOLERANCE)


@pytest.mark.parametrize("dim", [16, 256, 257, 600])
def test_the_sampled_rows_are_those_of_the_hottest_channel_and_the_followed(dim: int) -> None:
    gate, up, _ = weights_of(25, dim)
    sampled = measure.sampled_rows(heavy(), gate, up, [7, 4, 0]).numpy()
    stride = math.ceil(dim / 256)
    assert np.abs(plain(heavy())).max(axis=0).argmax() == 4
    assert sampled[:, 0].tolist() == [4, 7, 4, 0]
    for channel, *weights in sampled.tolist():
        rows = np.split(np.array(weights), 2)
        assert rows[0].tolist() == plain(gate)[int(channel), ::stride].tolist()
        assert rows[1].tolist() == plain(up)[int(channel), ::stride].tolist()
        assert len(rows[0]) <= measure.SAMPLED_WEIGHTS


def test_measuring_leaves_no_trace() -> None:
    product = heavy().requires_grad_()
    gate, up, down = weights_of(25, 16)
    how = cast_as("current", product)
    before = product.detach().clone()
    state = torch.random.get_rng_state()
    vectors = [
        measure.sentinel_vector(product, how),
        measure.amax_and_power(product),
        measure.operand_vector(how),
        measure.channel_matrix(product, product, product, (gate, up, down)),
        measure.sampled_rows(product, gate, up),
    ]
    assert all(v.dtype == torch.float64 and not v.requires_grad for v in vectors)
    assert torch.equal(product, before)
    assert torch.equal(torch.random.get_rng_state(), state)


# --- compiled, against plain torch --------------------------------------------------------------

TILED: dict[str, Recipe] = {
    "rowwise": RowwiseScaling(),
    "blocks": Float8BlockScaling(),
    "MXFP8": MXFP8BlockScaling(),
    "NVFP4": NVFP4BlockScaling(),
}
CASTS: list[str] = [*RECIPES, *TILED]


def any_cast(name: str, tensor: Tensor) -> Cast:
    return cast_for(tensor, TILED[name], "input") if name in TILED else cast_as(name, tensor)


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "usable", lambda tensor: False)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASTS)
def test_the_compiled_operand_equals_plain_torch(
    name: str, dtype: torch.dtype, balanced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for channels, bad in ((32, None), (512, None), (320, math.nan), (320, math.inf)):
        product = heavy(channels).to(dtype)
        if bad is not None:
            product[1, 1, 3] = bad
        how = any_cast(name, product)
        if balanced:
            how = how._replace(channel_scale=torch.rand(channels) + 0.5)
        found = measure.operand_vector(how)
        with monkeypatch.context() as patch:
            without_kernels(patch)
            expected = measure.operand_vector(how)
        assert torch.equal(found[:5], expected[:5])
        np.testing.assert_allclose(found[5:], expected[5:], rtol=SUM_TOLERANCE)


@pytest.mark.parametrize("fmt", [f for f in formats.FORMATS.values() if f.bits <= 8 and f.signed])
def test_every_format_is_counted_as_plain_torch_counts(
    fmt: FloatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.tensor([*fmt.values()], dtype=torch.float32)
    near = torch.cat([values, (values[1:] + values[:-1]) / 2, values * 1.0625])
    near = torch.cat([torch.nextafter(near, torch.tensor(s)) for s in (-9e9, 9e9)] + [near, -near])
    tensor = torch.cat([near, torch.tensor([math.nan, math.inf, 0.0, -0.0])])[None]
    for scale in (1.0, 0.37, 2.0**100):
        single = torch.tensor(scale)
        how = Cast(tensor / scale, Float8CurrentScaling(), fmt, single, single.reciprocal())
        found = measure.operand_vector(how)[:5]
        with monkeypatch.context() as patch:
            without_kernels(patch)
            assert torch.equal(found, measure.operand_vector(how)[:5])


@pytest.mark.skipif(kernels.why_unavailable() is not None, reason="plain torch promises less")
def test_the_number_of_threads_changes_no_measurement() -> None:
    product = normal(1500, 900)
    how = cast_as("delayed", product)
    weights = (normal(900, 1300), normal(900, 1300, seed=1), normal(1300, 900))
    before = torch.get_num_threads()
    found: list[list[Tensor]] = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            seen = measure.summary(product)
            found.append(
                [
                    measure.sentinel_vector(product, how),
                    measure.amax_and_power(product),
                    measure.operand_vector(how),
                    measure.channel_matrix(seen, seen, seen, weights),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_compiler_nothing_changes(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = heavy(25).to(dtype)
    gate, up, down = (weight.to(dtype) for weight in weights_of(25, 600))

    def measured() -> list[Tensor]:
        seen = measure.summary(product)
        return [
            measure.sentinel_vector(product, None),
            measure.sentinel_vector(product, None, seen),
            measure.amax_and_power(product),
            measure.amax_and_power(seen),
            measure.channel_matrix(seen, product, seen, (gate, up, down)),
            measure.sampled_rows(seen, gate, up, [7, 0]),
        ]

    compiled = measured()
    without_kernels(monkeypatch)
    for one, other in zip(compiled, measured(), strict=True):
        np.testing.assert_allclose(one, other, rtol=SUM_TOLERANCE, atol=1e-14)


def test_measurements_of_nothing_add_nothing() -> None:
    for tensor in (torch.zeros(0, 8), torch.zeros(3, 8, device="meta")):
        how = Cast(tensor, DelayedScaling(), formats.E4M3, torch.ones(()), torch.ones(()))
        assert measure.operand_vector(how).tolist() == [0.0] * 11


def test_wrong_weights_and_channels_are_refused() -> None:
    gate, up, down = weights_of(25, 16)
    with pytest.raises(ValueError, match=r"weights \[25, 16\], \[16, 25\], \[16, 25\], expected"):
        measure.channel_matrix(heavy(), heavy(), heavy(), (gate, down, down))
    with pytest.raises(ValueError, match=r"channel 25, expected 0\.\.24"):
        measure.sampled_rows(heavy(), gate, up, [25])


def test_amax_and_power_of_silu_are_those_of_torch() -> None:
    """Every float32 exponent and both signs; and a bound on each element alone."""
    codes = torch.arange(0, 2**31 - 2**23, 2**15 + 1, dtype=torch.int64).int()
    values = codes.view(torch.float32)
    values = torch.cat([values, -values, torch.linspace(-90, 90, 200_001)])
    for gate in (values[values.abs() < 1e18], *torch.linspace(-20, 20, 401)[:, None].float()):
        expected = torch.nn.functional.silu(gate.double())
        amax, power = measure.amax_and_power_of_silu(gate).tolist()
        assert amax == pytest.approx(float(expected.abs().max()), rel=2**-21)
        assert power == pytest.approx(float(expected.square().sum()), rel=2**-20)
    for special in (torch.nan, torch.inf):
        found = measure.amax_and_power_of_silu(torch.tensor([1.0, special]))
        assert not torch.isfinite(found).any()
    half = torch.randn(100).bfloat16()
    expected = measure.amax_and_power(torch.nn.functional.silu(half))
    assert torch.equal(measure.amax_and_power_of_silu(half), expected)


def test_weights_of_another_width_are_refused_and_not_read() -> None:
    gate, narrow, down = torch.randn(40, 8), torch.randn(3, 8), torch.randn(8, 40)
    few, many = measure.summary(torch.randn(5, 3)), measure.summary(torch.randn(5, 40))
    with pytest.raises(ValueError, match="channel_matrix: 3, 40, 40 channels, expected 40 in each"):
        measure.channel_matrix(few, many, many, (gate, gate, down))
    for product, up in ((few, gate), (many, narrow)):
        with pytest.raises(ValueError, match="sampled_rows: weights"):
            measure.sampled_rows(product, gate, up)
