"""Statistics against direct computation, on every kind of tensor, and their merges.

Here the oracles are math.fsum, numpy and a cast's own codes; what TE says to the same names is in
`test_te_statistics`. The names that TE lacks are tested here alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp8lab import casting, formats, recipe
from fp8lab.casting import Cast
from fp8lab.monitor import statistics
from fp8lab.recipe import Operand

PLAIN = list(statistics.PLAIN)
RECIPES = {
    "fp8_current_scaling": recipe.Float8CurrentScaling(),
    "mxfp8": recipe.MXFP8BlockScaling(),
    "fp8_block_scaling": recipe.Float8BlockScaling(w_block_scaling_dim=1, x_block_scaling_dim=2),
    "fp8_block_scaling_1d": recipe.Float8BlockScaling(),
    "nvfp4": recipe.NVFP4BlockScaling(),
    "rowwise": recipe.RowwiseScaling(),
}
NARROW = (torch.float32, torch.bfloat16, torch.float16)


def of(
    names: Sequence[str], tensor: Tensor, how: Cast | None = None, role: Operand = "input"
) -> dict[str, float]:
    vector = statistics.measure(names, tensor, how, role)
    assert vector.dtype == torch.float64 and vector.shape == (len(statistics.operations(names)),)
    return statistics.finish(names, vector.numpy())


def wide(rows: int = 40, columns: int = 200) -> Tensor:
    """Every row has its own magnitude, and some elements are 0."""
    tensor = torch.randn(rows, columns) * torch.exp2(torch.randint(-24, 8, (rows, columns)).float())
    return tensor * (torch.rand(rows, columns) > 0.1)


# --- of the tensor itself ------------------------------------------------------------------------


def plainly(values: list[float]) -> dict[str, float]:
    """The first eight of the finite values, exactly summed."""
    kept = [value for value in values if math.isfinite(value)]
    magnitudes = [abs(value) for value in kept if value]
    mean = math.fsum(kept) / len(kept)
    return {
        "min": min(kept),
        "max": max(kept),
        "mean": mean,
        "std": math.sqrt(math.fsum((value - mean) ** 2 for value in kept) / (len(kept) - 1)),
        "l1_norm": math.fsum(magnitudes),
        "l2_norm": math.sqrt(math.fsum(value * value for value in kept)),
        "cur_amax": max(magnitudes),
        "dynamic_range": math.log2(max(magnitudes)) - math.log2(min(magnitudes)),
    }


@pytest.mark.parametrize(
    "dtype", [*NARROW, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
@pytest.mark.parametrize("size", [7, 40_000])
def test_plain_statistics_are_those_of_exact_sums(size: int, dtype: torch.dtype) -> None:
    """40 000 is more than one piece."""
    tensor = torch.randn(size).to(dtype)
    expected = plainly(tensor.double().tolist())
    mine = of(PLAIN, tensor)
    for name in ("min", "max", "cur_amax", "dynamic_range"):
        assert mine[name] == expected[name], name
    for name in ("std", "l1_norm", "l2_norm"):
        assert mine[name] == pytest.approx(expected[name], rel=2.0**-45), name
    assert mine["mean"] == pytest.approx(expected["mean"], abs=2.0**-50 * expected["l1_norm"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_few_that_are_not_finite_spoil_nothing(bad: float) -> None:
    tensor = torch.randn(40_000)
    tensor[5] = bad
    clean = torch.cat([tensor[:5], tensor[6:]])
    mine, expected = of(PLAIN, tensor), of(PLAIN, clean)
    assert list(mine) == list(expected) == PLAIN
    for name in PLAIN:
        assert mine[name] == pytest.approx(expected[name], rel=2.0**-45), name


def test_the_smallest_subnormals_and_both_zeros() -> None:
    tensor = torch.tensor([0.0, -0.0, 2.0**-149, -(2.0**-140), 2.0**-126, 1.0])
    assert of(["dynamic_range"], tensor) == {"dynamic_range": 149.0}
    assert of(["dynamic_range"], tensor.double() * 2.0**-900) == {"dynamic_range": 149.0}
    assert of(["max_blockwise_dynamic_range"], tensor) == {"max_blockwise_dynamic_range": 149.0}


def test_what_is_undefined_is_missing() -> None:
    names = [*PLAIN, "max_blockwise_dynamic_range", "mse", *statistics.CAST]
    nothing = torch.randn(0, 64)
    how = casting.cast_for(torch.randn(4, 64), recipe.MXFP8BlockScaling(), "input")
    assert of(names, nothing) == of(names, nothing, how._replace(tensor=nothing)) == {}
    assert set(of(PLAIN, torch.zeros(3))) == set(PLAIN) - {"dynamic_range"}
    assert set(of(PLAIN, torch.ones(1))) == set(PLAIN) - {"std"}
    assert of(PLAIN, torch.full((3,), math.nan)) == {}
    assert of(["mse", "fp8_delayed_scaling_mse"], torch.ones(3)) == {}
    exact = torch.full((4, 32), 2.0)
    how = casting.cast_for(exact, recipe.MXFP8BlockScaling(), "input")
    assert of(["sqnr_db", "mse"], exact, how) == {"mse": 0.0}


def test_a_view_of_any_strides_and_a_scalar() -> None:
    names = [*PLAIN, "max_blockwise_dynamic_range", *RECIPES_OF_ALL]
    tensor = wide(64, 96).t()[::2, 1::3]
    assert not tensor.is_contiguous()
    assert of(names, tensor) == of(names, tensor.contiguous())
    three = wide(24, 96).reshape(2, 12, 96)
    assert of(names, three) == of(names, three.reshape(24, 96))
    assert of(["max", "mxfp8_underflows%"], torch.tensor(3.0)) == {
        "max": 3.0,
        "mxfp8_underflows%": 0.0,
    }


RECIPES_OF_ALL = [f"{name}_underflows%" for name in RECIPES]


def test_integers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"statistics: torch.int32, expected a floating-point"):
        statistics.measure(["max"], torch.ones(3, dtype=torch.int32))


def block_range(matrix: Tensor, size: int, dims: int) -> float:
    """By hand: the largest log2(amax / amin) of a block."""
    rows, columns = matrix.shape
    if dims == 1:
        flat = matrix.flatten().tolist()
        blocks = [flat[start : start + size] for start in range(0, len(flat), size)]
    else:
        corners = itertools.product(range(0, rows, size), range(0, columns, size))
        blocks = [matrix[i : i + size, j : j + size].flatten().tolist() for i, j in corners]
    ranges = [0.0]
    for block in blocks:
        if magnitudes := [abs(value) for value in block if value and math.isfinite(value)]:
            ranges.append(math.log2(max(magnitudes) / min(magnitudes)))
    return max(ranges)


@pytest.mark.parametrize("size", [1, 7, 32])
@pytest.mark.parametrize("shape", [(32, 64), (33, 50), (5, 3)])
def test_the_blockwise_dynamic_range(shape: tuple[int, int], size: int) -> None:
    """The last block may be cut off; TE refuses such shapes."""
    tensor = wide(*shape)
    tensor[0, 0] = math.inf
    name = f"max_blockwise_dynamic_range_block_size_{size}_dims"
    along = block_range(tensor, size, 1)
    both = max(along, block_range(tensor.t(), size, 1))
    mine = of([f"{name}_1", f"{name}_1_max_over_orientations", f"{name}_2"], tensor)
    assert list(mine.values()) == [along, both, block_range(tensor, size, 2)]


def test_blocks_of_zeros_have_no_range() -> None:
    bare = "max_blockwise_dynamic_range"
    assert of([bare, "l1_norm"], torch.zeros(40, 40)) == {bare: 0.0, "l1_norm": 0.0}
    tensor = torch.zeros(64, 64)
    tensor[0, :2] = torch.tensor([2.0**-3, 2.0**9])
    assert of([bare], tensor) == {bare: 12.0}


def test_blocks_larger_than_the_tensor_cost_no_memory() -> None:
    tensor = wide(16, 24)
    huge = 10**20  # elements a side
    for dims, fitting in ((1, 16 * 24), (2, 24)):
        names = [f"max_blockwise_dynamic_range_block_size_{n}_dims_{dims}" for n in (huge, fitting)]
        one, other = statistics.measure(names, tensor).tolist()
        assert one == other > 1.0


def test_without_options_the_blockwise_dynamic_range_is_that_of_te_for_the_operand() -> None:
    tensor, bare = wide(), "max_blockwise_dynamic_range"
    roles: dict[str, Operand] = {"activation": "input", "gradient": "grad_output"}
    for tensor_name, role in roles.items():
        spelled = statistics.name_of({bare: {}}, tensor_name)
        assert of([bare], tensor, role=role)[bare] == of([spelled], tensor)[spelled]
    assert (
        len({*of([bare], tensor).values(), *of([bare], tensor, role="grad_output").values()}) == 2
    )


# --- of casts ------------------------------------------------------------------------------------


def tiles_of(matrix: Tensor, tile: tuple[int, int]) -> list[Tensor]:
    corners = itertools.product(
        range(0, matrix.shape[0], tile[0]), range(0, matrix.shape[1], tile[1])
    )
    return [matrix[i : i + tile[0], j : j + tile[1]] for i, j in corners]


def directly(how: Cast) -> dict[str, float]:
    """All statistics of a cast, in float64, from its codes; underflow is that of the codes."""
    x, codes, q = how.tensor.double(), how.rounded().double(), how.fake_quantized().double()
    lost = (x != 0) & (codes == 0)
    found = {
        "underflows%": 100 * lost.sum().item() / x.numel(),
        "overflows%": 100 * how.saturated().sum().item() / x.numel(),
        "mse": (q - x).square().mean().item(),
        "cosine": ((x * q).sum() / (x.norm() * q.norm())).item(),
        "sqnr_db": 10 * math.log10(x.square().sum() / (q - x).square().sum()),
    }
    if how.scale_inv is not None:
        scales = how.scale_inv.double().flatten().numpy()
        scales = scales[scales > (2.0**-127 if type(how.recipe).__name__[:2] == "MX" else 0.0)]
        found |= {"scale_inv_min": scales.min(), "scale_inv_max": scales.max()}
        if how.tile is not None:
            shares = [tile.double().mean().item() for tile in tiles_of(lost, how.tile)]
            found["underflowing_blocks%"] = 100 * np.mean([share > 0 for share in shares])
            found["underflows%_worst_block"] = 100 * max(shares)
            if len(scales) > 1:
                found["scale_inv_std"] = scales.std(ddof=1)
    return found


def assert_close(mine: dict[str, float], expected: dict[str, float]) -> None:
    assert set(mine) == set(expected)
    for name, value in expected.items():
        assert mine[name] == pytest.approx(value, rel=2.0**-36, abs=0), name


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("role", recipe.OPERANDS)
@pytest.mark.parametrize("direction", ["rowwise", "columnwise"])
@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_would_do(
    name: str, direction: Any, role: Operand, dtype: torch.dtype
) -> None:
    """Every statistic; the recipe as `casting` has it, of the tensor in high precision."""
    tensor, one = wide().to(dtype), RECIPES[name]
    if name == "fp8_current_scaling" and direction == "columnwise":
        return  # as in TE there is no such name
    if name == "fp8_block_scaling":
        place = {"input": "x", "weight": "w", "grad_output": "grad"}[role]
        dims = {"x_block_scaling_dim": 1, "w_block_scaling_dim": 1, f"{place}_block_scaling_dim": 2}
        one = recipe.Float8BlockScaling(**dims)
    if name == "fp8_block_scaling_1d":
        one = recipe.Float8BlockScaling(w_block_scaling_dim=1)
    if name == "nvfp4":
        one = recipe.NVFP4BlockScaling(disable_stochastic_rounding=True)
    how = casting.cast_for(tensor, one, role, direction=direction)
    suffix = "_columnwise" if direction == "columnwise" else ""
    expected = directly(how)
    names = [f"{name}_{statistic}{suffix}" for statistic in expected]
    mine = of(names, tensor, role=role)
    assert_close(mine, dict(zip(names, expected.values(), strict=True)))


@pytest.mark.parametrize("role", recipe.OPERANDS)
@pytest.mark.parametrize(
    "one",
    [
        recipe.Float8CurrentScaling(use_power_2_scales=True),
        recipe.Float8CurrentScaling(fp8_format=recipe.Format.GAUDI2),
        recipe.Float8BlockScaling(use_f32_scales=True),
        recipe.MXFP8BlockScaling(scale_rounding="ocp_floor", fp8_format=recipe.Format.HYBRID),
        recipe.RowwiseScaling(round_scales_to_power_of_2=False),
        recipe.BitNetScaling(),
        recipe.HighPrecision(format=formats.FP16),
        recipe.HighPrecision(format=formats.FP32),
    ],
    ids=lambda one: f"{type(one).__name__}",
)
def test_the_cast_in_force(one: Any, role: Operand) -> None:
    """Without a recipe's name: whatever is in force, in both directions where they differ."""
    tensor = wide()
    how = casting.cast_for(tensor, one, role)
    names = list(statistics.CAST)
    is_exact = how.format is formats.FP32
    expected = {} if is_exact else directly(how)
    if how.format is formats.SIGN:
        expected["underflows%"] = 0.0
    mine = of(names, tensor, how, role)
    if is_exact:
        assert mine.pop("cosine") == pytest.approx(1.0, abs=2.0**-50)
        assert mine == {"underflows%": 0.0, "overflows%": 0.0, "mse": 0.0}
    else:
        assert_close(mine, expected)
    columnwise = of([f"{name}_columnwise" for name in names], tensor, how, role)
    if how.tile is None:
        assert columnwise == {}
    else:
        turned = directly(casting.cast_for(tensor, one, role, direction="columnwise"))
        assert_close(columnwise, {f"{name}_columnwise": turned[name] for name in turned})


def test_a_recipe_in_force_is_taken_as_it_is() -> None:
    tensor = wide()
    how = casting.cast_for(tensor, recipe.MXFP8BlockScaling(scale_rounding="ocp_floor"), "input")
    names = ["overflows%", "mxfp8_overflows%", "fp8_delayed_scaling_overflows%"]
    mine = of(names, tensor, how)
    assert mine["mxfp8_overflows%"] == mine["overflows%"] > 0
    assert of(names, tensor) == {"mxfp8_overflows%": 0.0}
    blocks = casting.cast_for(tensor, recipe.Float8BlockScaling(), "input")
    names = ["scale_inv_std", "fp8_block_scaling_scale_inv_std"]
    names += ["fp8_block_scaling_1d_scale_inv_std"]
    assert len(set(of(names, tensor, blocks).values())) == 1
    without = of(names[1:], tensor)
    assert without[names[1]] != without[names[2]] == of(names, tensor, blocks)[names[0]]


def test_delayed_scaling_counts_what_its_scale_clips() -> None:
    tensor = torch.tensor([1.0, 2.0, -4.0, 4.5, 1e-9, math.inf, math.nan, 0.0])
    how = casting.cast_for(tensor, recipe.DelayedScaling(), "input", scale=torch.tensor(112.0))
    names = [
        "overflows%",
        "underflows%",
        "scale_inv_min",
        "fp8_delayed_scaling_scale_inv_max",
        "mse",
    ]
    assert of(names, tensor, how) == {
        "overflows%": 25.0,  # 4.5 and infinity; 4 is 448 / 112
        "underflows%": 12.5,
        "scale_inv_min": float(torch.tensor(112.0).reciprocal()),
        "fp8_delayed_scaling_scale_inv_max": float(torch.tensor(112.0).reciprocal()),
    }


def test_a_hair_beyond_counts_only_where_te_counts_it() -> None:
    """448 · (1 / scale) may round to a float32 below the amax that made the scale."""
    amaxes = torch.linspace(1, 2, 200)
    clipped = []
    for amax in amaxes:
        just_in_time = casting.cast_for(amax, recipe.Float8CurrentScaling(), "input")
        assert of(["overflows%"], amax, just_in_time) == {"overflows%": 0.0}
        delayed = just_in_time._replace(recipe=recipe.DelayedScaling())
        clipped.append(of(["overflows%"], amax, delayed)["overflows%"])
        assert delayed.scale_inv is not None
        assert clipped[-1] == 100.0 * (amax > 448.0 * delayed.scale_inv)
    assert 0 < sum(clipped) < 100.0 * len(amaxes)


def test_bitnet_makes_something_of_zeros_and_that_is_no_underflow() -> None:
    tensor = torch.tensor([1.0, 0.0, -1.0])
    how = casting.cast_for(tensor, recipe.BitNetScaling(), "weight")
    assert of(["underflows%"], tensor, how, "weight") == {"underflows%": 0.0}


@pytest.mark.parametrize(
    ("in_force", "expected"),
    [
        (recipe.Float8CurrentScaling(), formats.E5M2),
        (recipe.Float8CurrentScaling(fp8_format=recipe.Format.E4M3), formats.E4M3),
        (recipe.Float8BlockScaling(fp8_format=recipe.Format.HYBRID), formats.E5M2),
        (recipe.MXFP8BlockScaling(fp8_format=recipe.Format.HYBRID), formats.E4M3),
        (recipe.HighPrecision(), formats.E4M3),
        (None, formats.E4M3),
    ],
)
def test_the_format_of_gradients(in_force: Any, expected: formats.FloatFormat) -> None:
    """That of the cast in force where TE looks at it."""
    tensor, role = wide(), "grad_output"
    how = None if in_force is None else casting.cast_for(tensor, in_force, role)
    format_of = recipe.Format.HYBRID if expected is formats.E5M2 else recipe.Format.E4M3
    names = [f"rowwise_{name}" for name in ("underflows%", "mse", "scale_inv_max")]
    would = casting.cast_for(tensor, recipe.RowwiseScaling(fp8_format=format_of), role)
    direct = directly(would)
    assert_close(of(names, tensor, how, role), {name: direct[name[8:]] for name in names})
    assert of(names, tensor, None if in_force is None else how) == of(names, tensor)


def test_errors_are_those_of_the_tensor_before_a_channel_scale() -> None:
    tensor = wide()
    scale = torch.exp2(torch.randint(-3, 4, (tensor.shape[1],)).float())
    how = casting.cast_for(tensor * scale, recipe.Float8CurrentScaling(), "input")
    how = how._replace(channel_scale=scale)
    restored = how.fake_quantized() / scale
    mine = of(["mse", "underflows%"], tensor, how)
    assert mine["mse"] == pytest.approx((restored - tensor).double().square().mean().item())
    assert mine["underflows%"] == directly(how)["underflows%"]
    how = casting.cast_for(tensor * scale, recipe.MXFP8BlockScaling(), "input")
    turned = casting.cast_for(tensor * scale, how.recipe, "input", direction="columnwise")
    restored = turned.fake_quantized() / scale
    mine = of(["mse_columnwise"], tensor, how._replace(channel_scale=scale))
    expected = (restored - tensor).double().square().mean().item()
    assert mine["mse_columnwise"] == pytest.approx(expected, rel=2.0**-20)


def test_training_does_not_notice() -> None:
    """Stochastic roundings are drawn apart, and gradients do not flow."""
    tensor = wide().requires_grad_()
    names = list(statistics.NAMES)
    before = torch.get_rng_state()
    for one in (recipe.NVFP4BlockScaling(), recipe.Float8CurrentScaling(stochastic_rounding=True)):
        how = casting.cast_for(tensor, one, "grad_output")
        assert how.rounding == "stochastic"
        how = how._replace(channel_scale=torch.ones(tensor.shape[1], requires_grad=True))
        vector = statistics.measure(names, tensor, how, "grad_output")
        assert not vector.requires_grad
        assert torch.equal(vector, statistics.measure(names, tensor, how, "grad_output"))
    assert torch.equal(before, torch.get_rng_state())
    assert tensor.grad is None


def test_a_stochastic_rounding_is_measured_as_one() -> None:
    tensor = torch.randn(64, 256)
    one = recipe.Float8CurrentScaling(stochastic_rounding=True)
    how = casting.cast_for(tensor, one, "grad_output")
    drawn = (how.fake_quantized() - tensor).double().square().mean().item()
    assert of(["mse"], tensor, how, "grad_output")["mse"] == pytest.approx(drawn, rel=0.05)
    nearest = directly(how._replace(rounding="nearest"))["mse"]
    assert drawn > 1.5 * nearest


def test_counts_of_tiles_do_not_depend_on_the_default_dtype() -> None:
    tensor = wide(256, 256)
    tensor[:, ::2] *= 1e-9
    names = [name for name in statistics.NAMES if "block" in name]
    expected = statistics.measure(names, tensor)
    assert (
        0.0
        < statistics.finish(names, expected.numpy())["fp8_block_scaling_underflows%_worst_block"]
        < 100.0
    )
    torch.set_default_dtype(torch.bfloat16)  # as models are often built: 257 is not one of its
    try:
        found = statistics.measure(names, tensor)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", RECIPES)
def test_one_cast_per_recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = casting.cast_for

    def counted(*arguments: Any, **options: Any) -> Cast:
        calls.append(arguments[1])
        return original(*arguments, **options)

    monkeypatch.setattr(statistics, "cast_for", counted)
    names = [full for full in statistics.NAMES if full.startswith(f"{name}_")]
    if name == "fp8_block_scaling":
        names = [full for full in names if "_1d_" not in full]
    statistics.measure([n for n in names if not n.endswith("_columnwise")], wide())
    assert len(calls) == 1
    statistics.measure([n for n in names if n.endswith("_columnwise")], wide())
    assert len(calls) == 1 + (name != "fp8_current_scaling")


# --- merges --------------------------------------------------------------------------------------

SUMMED = {"total", "total_abs", "total_squares", "error", "power", "rounded_power", "dot"}
SUMMED |= {"scale_inv_total", "scale_inv_squares"}
ALL = list(statistics.NAMES)


def rounded_lanes(names: Sequence[str]) -> list[bool]:
    return [lane in SUMMED for _, lane in statistics._layout(tuple(names))]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.floats(width=32), max_size=20), min_size=2, max_size=5),
    st.randoms(use_true_random=False),
)
def test_the_order_of_merges_never_matters(batches: list[list[float]], random: Any) -> None:
    """Counts and extremes to the bit, in any order and grouping."""
    names = [*PLAIN, "max_blockwise_dynamic_range_block_size_4_dims_1", "mxfp8_underflows%"]
    names += ["rowwise_scale_inv_min", "rowwise_scale_inv_max"]
    names += [
        "mxfp8_scale_inv_min",
        "mxfp8_underflows%_worst_block",
        "fp8_current_scaling_overflows%",
    ]
    vectors = [statistics.measure(names, torch.tensor(batch)).numpy() for batch in batches]
    exact = ~np.array(rounded_lanes(names))
    expected = vectors[0]
    for vector in vectors[1:]:
        expected = statistics.merge(names, expected, vector)
    while len(vectors) > 1:
        random.shuffle(vectors)
        vectors = [*vectors[2:], statistics.merge(names, vectors[0], vectors[1])]
    np.testing.assert_array_equal(vectors[0][exact], expected[exact])
    assert not np.isnan(expected[exact]).any()


def test_merged_pieces_are_the_whole() -> None:
    """Where a recipe's scales do not depend on the other tokens, of every statistic."""
    tensor = wide(96, 256)
    names = [*PLAIN, "max_blockwise_dynamic_range_block_size_32_dims_1"]
    names += [name for name in ALL if name.startswith(("mxfp8", "rowwise", "fp8_block_scaling_1d"))]
    names = [name for name in names if name.startswith("mxfp8") or "columnwise" not in name]
    parts = [statistics.measure(names, part).numpy() for part in tensor.split([32, 0, 64])]
    merged = statistics.merge(names, statistics.merge(names, parts[0], parts[1]), parts[2])
    whole = statistics.measure(names, tensor).numpy()
    rounded = np.array(rounded_lanes(names))
    np.testing.assert_array_equal(merged[~rounded], whole[~rounded])
    np.testing.assert_allclose(merged[rounded], whole[rounded], rtol=2.0**-40, atol=2.0**-40)
    assert set(statistics.finish(names, merged)) == set(names)


def test_zeros_change_no_extreme_but_their_own() -> None:
    names = ["dynamic_range", "mxfp8_scale_inv_min", "min"]
    full, zeros = (statistics.measure(names, t).numpy() for t in (wide() + 4096.0, torch.zeros(64)))
    alone = statistics.finish(names, full)
    assert alone["min"] > 0
    assert statistics.finish(names, statistics.merge(names, full, zeros)) == alone | {"min": 0.0}


def test_the_neutral_vector_is_that_of_an_empty_tensor() -> None:
    full, empty = (statistics.measure(ALL, t).numpy() for t in (wide(), torch.zeros(0, 200)))
    np.testing.assert_array_equal(statistics.merge(ALL, full, empty), full)
    np.testing.assert_array_equal(statistics.merge(ALL, empty, full), full)
    assert statistics.measure([], wide()).shape == (0,)


# --- names ---------------------------------------------------------------------------------------


def test_unknown_names_are_refused_with_near_ones() -> None:
    cases = {
        "underflow%": "underflows%",
        "fp8_current_scaling_mse_columnwise": "fp8_current_scaling_mse",
        "mxfp8_scale_inv_mim": "mxfp8_scale_inv_min",
        "max_blockwise_dynamic_range_block_size_32": "max_blockwise_dynamic_range",
        "zzz": "min, max",
    }
    for name, near in cases.items():
        with pytest.raises(ValueError, match="is not one") as raised:
            statistics.check(["mse", name])
        assert near in str(raised.value) and repr(name) in str(raised.value)
        assert "\n" not in str(raised.value)
    for wrong in ("block_size_0_dims_1", "block_size_32_dims_3", "block_size_08_dims_1"):
        with pytest.raises(ValueError, match="is not one"):
            statistics.check([f"max_blockwise_dynamic_range_{wrong}"])
    statistics.check(
        ["max_blockwise_dynamic_range_block_size_5_dims_2_max_over_orientations", *ALL]
    )


def test_entries_of_te_configurations_have_names() -> None:
    bare = "max_blockwise_dynamic_range"
    spelled = f"{bare}_block_size_32_dims_1"
    assert statistics.name_of({bare: {}}, "gradient") == spelled
    assert statistics.name_of({bare: {}}, "weight") == f"{spelled}_max_over_orientations"
    assert statistics.name_of("mxfp8_mse", "weight") == "mxfp8_mse"
    wrong: list[Any] = [{bare: {"dims": 3}}, {bare: {"size": 3}}, {"min": {}}]
    wrong += [{bare: {"block_size": 0}}, {bare: {"block_size": True}}, {bare: {}, "min": {}}]
    for entry in wrong:
        with pytest.raises(ValueError, match=r"statistics: .*expected a name or"):
            statistics.name_of(entry, "weight")
    with pytest.raises(ValueError, match="is not one"):
        statistics.name_of("minn", "weight")


@pytest.mark.gpu
def test_on_a_gpu_nothing_is_waited_for_and_the_numbers_are_the_same() -> None:
    """But for NVFP4's columns, whose Hadamard matrix is copied there."""
    tensor, names = wide(256, 512), [name for name in ALL if not name.startswith("nvfp4")]
    there = tensor.cuda()
    statistics.measure(names, there)
    torch.cuda.set_sync_debug_mode("error")
    try:
        vector = statistics.measure(names, there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    mine = statistics.finish(names, vector.cpu().numpy())
    for name, value in of(names, tensor).items():
        assert mine[name] == pytest.approx(value, rel=2.0**-20), name
