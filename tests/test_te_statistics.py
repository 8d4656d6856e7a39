"""fp8lab's statistics against what Transformer Engine's own features log, on a CPU.

The oracle is `transformer_engine_statistics`: TE's formulas, buffers and merges as the wheel has
them, on codes that a scalar transcription of the recipes made. Counts, extremes and scales must be
equal; of what is summed TE's float32 (or bfloat16) sum must lie within its own rounding of ours.
Where TE does something else on purpose not copied, a test says what TE does, so that it fails when
TE changes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformer_engine_statistics as worker
from torch import Tensor
from transformer_engine_on_cpu import TransformerEngine

from fp8lab import casting, recipe
from fp8lab.casting import Cast
from fp8lab.monitor import statistics
from fp8lab.recipe import Operand

PLAIN = ["min", "max", "mean", "std", "l1_norm", "l2_norm", "cur_amax", "dynamic_range"]
BARE = ["underflows%", "scale_inv_min", "scale_inv_max", "mse"]
OPERANDS: dict[str, Operand] = {
    "activation": "input",
    "weight": "weight",
    "gradient": "grad_output",
}
SCALE = 37.0  # of delayed scaling: some elements of every kind are clipped, others flushed
IN_FORCE = {
    "fp8_delayed_scaling": recipe.DelayedScaling(),
    "fp8_current_scaling": recipe.Float8CurrentScaling(),
    "mxfp8": recipe.MXFP8BlockScaling(),
    "fp8_block_scaling": recipe.Float8BlockScaling(),
}
OF_BLOCKS = ("mxfp8", "fp8_block_scaling")
KINDS = ("random", "outliers", "zeros", "padded", "wide")
DTYPES = (torch.float32, torch.bfloat16)
# TE's own rounding, relative to a sum of magnitudes: of float32 sums of ten thousand elements, on a
# CPU one after the other; of bfloat16 elements squared, and of their sum.
ROUNDING = {torch.float32: 2.0**-17, torch.bfloat16: 2.0**-7}


@pytest.fixture(scope="module")
def te() -> Iterator[TransformerEngine]:
    with TransformerEngine() as running:
        yield running


def tensor_of(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix that MXFP8 takes; its blocks of 128 are cut off, and its MXFP8 scales padded."""
    generator = torch.Generator().manual_seed(KINDS.index(kind) + 1)
    shape = (32, 96) if kind == "padded" else (64, 160)
    tensor = torch.randn(shape, generator=generator)
    if kind == "outliers":
        tensor[:, 5] *= 3000.0
        tensor[7, 9] = -2.5e5
    if kind == "zeros":
        tensor[:32] = 0.0
        tensor[40, ::3] = -0.0
        tensor[:, 64:96] = 0.0
    if kind == "wide":
        tensor *= torch.exp2(torch.randint(-40, 6, shape, generator=generator).float())
    return tensor.to(dtype)


def cast_in_force(name: str, tensor: Tensor, role: Operand) -> Cast:
    scale = torch.tensor(SCALE) if name == "fp8_delayed_scaling" else None
    return casting.cast_for(tensor, IN_FORCE[name], role, scale)


def ours(
    names: Sequence[str], tensor: Tensor, how: Cast | None = None, role: Operand = "input"
) -> dict[str, float]:
    return statistics.finish(names, statistics.measure(names, tensor, how, role).numpy())


def names_with(in_force: str) -> list[str]:
    """All that LogFp8TensorStats logs with that recipe in force."""
    names = list(BARE)
    if in_force in OF_BLOCKS:
        names += [f"{name}_columnwise" for name in BARE]
    if in_force == "fp8_delayed_scaling":
        names += ["overflows%", "fp8_delayed_scaling_overflows%"]
    for other in IN_FORCE:
        if other == "fp8_delayed_scaling" and in_force != other:
            continue
        names += [f"{other}_{name}" for name in BARE]
        if other in OF_BLOCKS:
            names += [f"{other}_{name}_columnwise" for name in BARE]
    return names


def assert_agree(mine: dict[str, float], theirs: dict[str, float], in_force: str = "") -> None:
    """Percentages are a float32 quotient of equal counts; scales are equal."""
    assert list(mine) == list(theirs)
    for name, expected in theirs.items():
        of_exponents = name.startswith("mxfp8") or (in_force == "mxfp8" and name[:3] != "fp8")
        if "scale_inv" in name:  # TE logs an E8M0 code as it is
            assert mine[name] == (2.0 ** (expected - 127) if of_exponents else expected), name
        elif "%" in name:
            assert mine[name] == pytest.approx(expected, rel=2.0**-22, abs=0), name
        else:
            assert mine[name] == pytest.approx(expected, rel=2.0**-17, abs=0), name


def te_with(
    te: TransformerEngine, in_force: str, tensors: list[Tensor], *arguments: Any, **settings: Any
) -> dict[str, float]:
    """What TE logs with that recipe in force; gradients are E5M2 where its recipe is hybrid."""
    settings.setdefault("hybrid", in_force in ("fp8_delayed_scaling", "fp8_current_scaling"))
    settings["scale"] = torch.tensor(SCALE)
    logged = te(worker.statistics, tensors, *arguments, in_force, **settings)
    assert isinstance(logged, dict)
    return logged


def te_with_one(
    te: TransformerEngine, in_force: str, tensor: Tensor, tensor_name: str, names: list[str]
) -> dict[str, float]:
    """`te_with` of one tensor; mse is that of the same numbers in float32.

    In bfloat16 TE rounds the dequantised values, the squares and their sum. None of that happens in
    training; that it explains the difference is checked here.
    """
    logged = te_with(te, in_force, [tensor], tensor_name, names)
    squares = [name for name in logged if "mse" in name]
    if tensor.dtype is torch.bfloat16:
        exact = te_with(te, in_force, [tensor.float()], tensor_name, names)
        norm = tensor.double().square().mean().sqrt().item()
        for name in squares:
            root, exact_root = math.sqrt(logged[name]), math.sqrt(exact[name])
            bound = 2.0**-9 * (norm + exact_root) + 2.0**-8 * (root + exact_root)
            assert abs(root - exact_root) <= bound
            logged[name] = exact[name]
    return logged


# --- of the tensor itself ------------------------------------------------------------------------


def blockwise(size: int, dims: int) -> dict[str, dict[str, int]]:
    return {"max_blockwise_dynamic_range": {"block_size": size, "dims": dims}}


@pytest.mark.parametrize("tensor_name", OPERANDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_plain_statistics(
    te: TransformerEngine, kind: str, dtype: torch.dtype, tensor_name: str
) -> None:
    tensor = tensor_of(kind, dtype)
    asked = [*PLAIN, blockwise(32, 1), blockwise(16, 2), blockwise(4, 1), blockwise(8, 2)]
    names = [statistics.name_of(one, tensor_name) for one in asked]
    theirs = te(worker.statistics, [tensor], tensor_name, asked)
    mine = ours(names, tensor, role=OPERANDS[tensor_name])
    assert list(theirs) == names and list(mine) == names
    for name in ("min", "max", "cur_amax"):
        assert mine[name] == theirs[name]
    for name in names[7:]:  # the difference of two float32 logarithms, of at most 2^7 each
        assert mine[name] == pytest.approx(theirs[name], rel=0, abs=2.0**-16), name
    for name in ("std", "l1_norm", "l2_norm"):
        assert mine[name] == pytest.approx(theirs[name], rel=ROUNDING[dtype], abs=0), name
    mean_magnitude = tensor.double().abs().mean().item()
    assert abs(mine["mean"] - theirs["mean"]) <= ROUNDING[dtype] * mean_magnitude


def test_the_plain_statistics_of_an_odd_shape(te: TransformerEngine) -> None:
    tensor = torch.randn(7, 33).transpose(0, 1)[::2]
    asked = [*PLAIN, blockwise(7, 1)]
    names = [statistics.name_of(one, "activation") for one in asked]
    theirs = te(worker.statistics, [tensor], "activation", asked)
    mine = ours(names, tensor)
    for name in names:
        assert mine[name] == pytest.approx(theirs[name], rel=2.0**-17, abs=2.0**-20), name


def test_the_standard_deviation_has_the_divisor_n_minus_1(te: TransformerEngine) -> None:
    tensor = torch.tensor([[1.0, 2.0, 4.0]])
    assert ours(["std"], tensor)["std"] == pytest.approx(np.std([1, 2, 4], ddof=1), rel=2.0**-50)
    assert te(worker.statistics, [tensor], "activation", ["std"])["std"] == pytest.approx(
        np.std([1, 2, 4], ddof=1), rel=2.0**-22
    )


def test_what_te_logs_as_infinite_or_not_a_number_is_left_out(te: TransformerEngine) -> None:
    zeros, one = torch.zeros(4, 4), torch.ones(1, 1)
    assert te(worker.statistics, [zeros], "activation", ["dynamic_range"]) == {
        "dynamic_range": math.inf
    }
    assert ours(["dynamic_range", "cur_amax"], zeros) == {"cur_amax": 0.0}
    assert math.isnan(te(worker.statistics, [one], "activation", ["std"])["std"])
    assert ours(["std"], one) == {}
    tensor = torch.tensor([[1.0, math.nan, -3.0, math.inf]])
    theirs = te(worker.statistics, [tensor], "activation", PLAIN)
    assert not any(math.isfinite(value) for name, value in theirs.items() if name != "min")
    assert ours(PLAIN, tensor) == ours(PLAIN, torch.tensor([1.0, -3.0]))


# --- of casts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor_name", OPERANDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_force", IN_FORCE)
def test_statistics_of_casts(
    te: TransformerEngine, in_force: str, kind: str, dtype: torch.dtype, tensor_name: str
) -> None:
    """Bare, and of every other recipe as what-if; both directions where TE has both."""
    tensor, names = tensor_of(kind, dtype), names_with(in_force)
    names = [name for name in names if not name.endswith("mse_columnwise")]  # see below
    theirs = te_with_one(te, in_force, tensor, tensor_name, names)
    role = OPERANDS[tensor_name]
    mine = ours(names, tensor, cast_in_force(in_force, tensor, role), role)
    assert_agree(mine, theirs, in_force)


@pytest.mark.parametrize("in_force", OF_BLOCKS)
def test_what_ifs_of_e5m2_gradients(te: TransformerEngine, in_force: str) -> None:
    """TE's are in E5M2 as well, but not where MXFP8 is in force."""
    tensor, names = tensor_of("wide"), names_with(in_force)
    names = [name for name in names if not name.endswith("mse_columnwise")]
    theirs = te_with(te, in_force, [tensor], "gradient", names, hybrid=True)
    one = dataclasses.replace(IN_FORCE[in_force], fp8_format=recipe.Format.HYBRID)
    how = casting.cast_for(tensor, one, "grad_output")
    assert_agree(ours(names, tensor, how, "grad_output"), theirs, in_force)


@pytest.mark.parametrize("tensor_name", OPERANDS)
@pytest.mark.parametrize("in_force", OF_BLOCKS)
def test_the_columnwise_mse_is_of_the_columnwise_codes(
    te: TransformerEngine, in_force: str, tensor_name: str
) -> None:
    """As TE's documentation has it. TE dequantises the rowwise codes as long as there are any."""
    tensor, role = tensor_of("outliers"), OPERANDS[tensor_name]
    how = cast_in_force(in_force, tensor, role)
    mine = ours(["mse", "mse_columnwise"], tensor, how, role)
    alone = te_with(te, in_force, [tensor], tensor_name, ["mse_columnwise"], columnwise_only=True)
    assert_agree({"mse_columnwise": mine["mse_columnwise"]}, alone)
    both = te_with(te, in_force, [tensor], tensor_name, ["mse", "mse_columnwise"])
    assert both["mse_columnwise"] == both["mse"]
    assert both["mse"] == pytest.approx(mine["mse"], rel=2.0**-20)


@pytest.mark.parametrize("tensor_name", OPERANDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_nvfp4(te: TransformerEngine, kind: str, dtype: torch.dtype, tensor_name: str) -> None:
    """TE takes the bare names and logs them with the recipe; FP8 what-ifs are in E4M3."""
    tensor, role = tensor_of(kind, dtype), OPERANDS[tensor_name]
    how = casting.cast_for(tensor, recipe.NVFP4BlockScaling(disable_stochastic_rounding=True), role)
    names = ["nvfp4_underflows%", "nvfp4_mse"]
    theirs = te_with_one(te, "nvfp4", tensor, tensor_name, ["underflows%", "mse"])
    assert_agree(ours(names, tensor, how, role), theirs)
    assert ours(names, tensor, None, role) == ours(names, tensor, how, role)
    names = [f"{other}_{name}" for other in ("mxfp8", "fp8_current_scaling") for name in BARE]
    theirs = te_with_one(te, "nvfp4", tensor, tensor_name, names)
    assert_agree(ours(names, tensor, how, role), theirs)


def test_the_scale_inv_of_zeros(te: TransformerEngine) -> None:
    """All that TE takes for padding: it logs the code 0, of which 2^-127 is the factor."""
    tensor, names = torch.zeros(32, 64), ["scale_inv_min", "scale_inv_max"]
    theirs = te_with(te, "mxfp8", [tensor], "activation", names)
    assert theirs == {"scale_inv_min": 0.0, "scale_inv_max": 0.0}
    how = cast_in_force("mxfp8", tensor, "input")
    assert ours(names, tensor, how) == {"scale_inv_min": 2.0**-127, "scale_inv_max": 2.0**-127}


# --- micro-batches -------------------------------------------------------------------------------


def batches(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of unlike sizes, and one has no tokens."""
    three = [tensor_of(kind, dtype) for kind in ("outliers", "zeros", "wide")]
    return [three[0], three[1][32:], three[2][:0], three[2]]


def merged(
    names: Sequence[str], tensors: Sequence[Tensor], hows: Sequence[Cast | None]
) -> dict[str, float]:
    vectors = [
        statistics.measure(names, tensor, how).numpy()
        for tensor, how in zip(tensors, hows, strict=True)
    ]
    vector = vectors[0]
    for other in vectors[1:]:
        vector = statistics.merge(names, vector, other)
    return statistics.finish(names, vector)


def test_plain_statistics_merge_as_in_te(te: TransformerEngine) -> None:
    asked = [name for name in PLAIN if name != "std"] + [blockwise(32, 1)]
    names = [statistics.name_of(one, "activation") for one in asked]
    theirs = te(worker.statistics, batches(), "activation", asked)
    mine = merged(names, batches(), [None] * 4)
    for name in names:
        assert mine[name] == pytest.approx(theirs[name], rel=2.0**-17), name


def test_te_merges_standard_deviations_with_the_wrong_sign(te: TransformerEngine) -> None:
    """`compute_variance` subtracts what the means differ by; ours is that of all elements."""
    tensors = [torch.randn(8, 16), torch.randn(24, 16) + 0.5]
    mine = merged(["std"], tensors, [None] * 2)["std"]
    together = te(worker.statistics, [torch.cat(tensors)], "activation", ["std"])["std"]
    assert mine == pytest.approx(together, rel=2.0**-20)
    theirs = te(worker.statistics, tensors, "activation", ["std"])["std"]
    sizes = np.array([tensor.numel() for tensor in tensors])
    means = np.array([tensor.double().mean() for tensor in tensors])
    variances = np.array([tensor.double().var() for tensor in tensors])
    spread = (means - (sizes * means).sum() / sizes.sum()) ** 2
    wrong = np.sqrt((sizes * (variances - spread)).sum() / sizes.sum())
    assert theirs == pytest.approx(wrong, rel=2.0**-20)
    assert wrong < 0.98 * mine


@pytest.mark.parametrize("in_force", IN_FORCE)
def test_statistics_of_casts_merge_as_in_te(te: TransformerEngine, in_force: str) -> None:
    names = [name for name in names_with(in_force) if not name.endswith("mse_columnwise")]
    tensors = [tensor for tensor in batches() if len(tensor)]
    theirs = te_with(te, in_force, tensors, "activation", names)
    hows = [cast_in_force(in_force, tensor, "input") for tensor in tensors]
    assert_agree(merged(names, tensors, hows), theirs, in_force)


def test_te_counts_the_weight_once(te: TransformerEngine) -> None:
    """Of micro-batches TE keeps the first weight: nothing is merged, and the caller's to do."""
    tensors = [torch.ones(4, 4), torch.full((4, 4), 2.0)]
    assert te(worker.statistics, tensors, "weight", ["max"]) == {"max": 1.0}


def test_te_lets_a_micro_batch_of_zeros_hide_the_smallest_scale(te: TransformerEngine) -> None:
    tensors, names = [tensor_of("random"), torch.zeros(32, 160)], ["scale_inv_min"]
    hows = [cast_in_force("mxfp8", tensor, "input") for tensor in tensors]
    assert te_with(te, "mxfp8", tensors, "activation", names) == {"scale_inv_min": 0.0}
    assert merged(names, tensors, hows) == ours(names, tensors[0], hows[0])


# --- names ---------------------------------------------------------------------------------------


def test_every_name_that_te_takes_is_known_here() -> None:
    for in_force in IN_FORCE:
        statistics.check(names_with(in_force))
    statistics.check([*PLAIN, "nvfp4_underflows%", "nvfp4_mse"])


@pytest.mark.parametrize(
    "name",
    ["fp8_current_scaling_mse_columnwise", "fp8_delayed_scaling_mse_columnwise", "mxfp8_max"],
)
def test_what_te_refuses_is_refused(te: TransformerEngine, name: str) -> None:
    tensor = tensor_of("random")
    with pytest.raises(RuntimeError, match="ValueError"):
        te_with(te, "fp8_delayed_scaling", [tensor], "activation", [name])
    with pytest.raises(ValueError, match="is not one, expected"):
        statistics.check([name])
