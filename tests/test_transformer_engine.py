"""fp8lab's casts and scales against the arithmetic of Transformer Engine's authors, on a CPU.

The oracles are Python that TE's wheel ships: its reference quantizers for current scaling and NVFP4
and its update of delayed scales. They are compared bit for bit. Where such a reference is not what
TE's CUDA kernels compute, the test says so, and that fp8lab follows the kernel.
TE's recipe classes are compared in test_recipe.py, its modules in test_transformer_engine_modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformer_engine_on_cpu as worker
from torch import Tensor
from transformer_engine_on_cpu import TransformerEngine, assert_same_bits, bits

from fp8lab import casting, formats, quantize, recipe, scaling
from fp8lab.formats import FloatFormat
from fp8lab.linear import Fp8Linear
from fp8lab.recipe import DelayedScaling, Float8CurrentScaling

CODES = {formats.E4M3: torch.float8_e4m3fn, formats.E5M2: torch.float8_e5m2}
FORMAT_OF = {"input": formats.E4M3, "weight": formats.E4M3, "grad_output": formats.E5M2}
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def te() -> Iterator[TransformerEngine]:
    with TransformerEngine() as running:
        yield running


# --- current scaling ---------------------------------------------------------------------------


def edge_values(fmt: FloatFormat) -> Tensor:
    """float32 [n]: of a format every value, every midpoint, their float32 neighbours, ±, 0, -0, and
    every power of two that float32 has."""
    values = torch.tensor(list(fmt.values()), dtype=torch.float32)
    middles = (values[1:] + values[:-1]) / 2
    exact = torch.cat([values, middles])
    around = [torch.nextafter(exact, torch.full_like(exact, toward)) for toward in (0.0, torch.inf)]
    powers = torch.ldexp(torch.ones(277), torch.arange(-149, 128))
    positive = torch.cat([exact, *around, powers[powers <= fmt.max]])
    positive = positive[positive <= fmt.max]
    return torch.cat([positive, -positive])


def tensors_of(fmt: FloatFormat, dtype: torch.dtype) -> list[Tensor]:
    """[512, 512] each: edge values at a scale of 1, at other powers of two, at odd scales; random
    values of every binade; all zero."""
    generator = torch.Generator().manual_seed(1)
    edges = edge_values(fmt)
    draw = torch.randint(len(edges), (512, 512), generator=generator)
    at_one = edges[draw]
    at_one[0, 0] = fmt.max
    wide = torch.randn(512, 512, generator=generator)
    wide *= torch.exp2(torch.randint(-40, 8, (512, 512), generator=generator).float())
    odd = [at_one * factor for factor in (2.0**-9, 4.0, 1 / 3, 0.777)]
    return [tensor.to(dtype) for tensor in (at_one, *odd, wide, torch.zeros(512, 512))]


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operand", FORMAT_OF)
def test_current_scaling_is_the_reference_bit_for_bit(
    te: TransformerEngine, operand: Any, dtype: torch.dtype, power_of_two: bool
) -> None:
    ours = Float8CurrentScaling(use_power_2_scales=power_of_two)
    fmt = FORMAT_OF[operand]
    for tensor in tensors_of(fmt, dtype):
        rowwise, columnwise = (
            quantize(tensor, ours, operand, direction=direction)
            for direction in ("rowwise", "columnwise")
        )
        codes, scale_inv, codes_t, scale_inv_t = te(
            worker.current_scaling, tensor, CODES[fmt], power_of_two
        )
        assert_same_bits(rowwise.codes, codes)
        assert_same_bits(columnwise.codes.t(), codes_t)
        assert_same_bits(rowwise.scale_inv.reshape(1), scale_inv)
        assert_same_bits(columnwise.scale_inv.reshape(1), scale_inv_t)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("fmt", CODES, ids=str)
def test_the_scale_of_a_million_amaxes_is_the_reference_and_one_ieee_division(
    te: TransformerEngine, fmt: FloatFormat, power_of_two: bool
) -> None:
    """Amaxes of every binade, subnormal ones too: the random bit patterns of positive numbers."""
    patterns = torch.randint(1, 0x7F800000, (2**20,), dtype=torch.int32)
    amaxes = torch.cat([patterns.view(torch.float32), torch.zeros(1)])
    ours = scaling.scale_for(amaxes, fmt, power_of_two=power_of_two)
    theirs = te(worker.current_scaling_scales, amaxes, torch.float32, CODES[fmt], power_of_two)
    assert_same_bits(ours, theirs)
    with np.errstate(over="ignore", divide="ignore"):
        divided = np.float32(fmt.max) / amaxes.numpy()
    if not power_of_two:
        ordinary = np.isfinite(divided)
        assert ordinary.mean() > 0.9
        np.testing.assert_array_equal(ours.numpy()[ordinary], divided[ordinary])


def test_where_the_reference_is_not_the_kernel(te: TransformerEngine) -> None:
    """recipe_common.cuh: an amax of infinity gives the scale 1, an infinite scale becomes the
    largest float32, and the amax ignores NaN. The reference has 0, the largest number of the
    tensor's dtype, and NaN. fp8lab follows the kernel in all three.
    """
    ours = Float8CurrentScaling()
    finite = torch.randn(64, 64)

    infinite = finite.clone()
    infinite[3, 4], infinite[5, 6] = torch.inf, -torch.inf
    codes, scale_inv, _, _ = te(worker.current_scaling, infinite, torch.float8_e4m3fn, False)
    assert scale_inv.isinf().all()
    assert codes.float().isnan().sum() == 2  # infinity · 0
    mine = quantize(infinite, ours, "input")
    assert mine.scale_inv.item() == 1.0
    assert_same_bits(mine.codes, infinite.clamp(-448, 448).to(torch.float8_e4m3fn))

    tiny = finite.bfloat16() * 2.0**-130
    _, scale_inv, _, _ = te(worker.current_scaling, tiny, torch.float8_e4m3fn, False)
    assert scale_inv.item() == 1 / torch.tensor(torch.finfo(torch.bfloat16).max)
    assert quantize(tiny, ours, "input").scale_inv.item() == (
        1 / torch.tensor(torch.finfo(torch.float32).max)
    )

    spoiled = finite.clone()
    spoiled[7, 8] = torch.nan
    codes, scale_inv, _, _ = te(worker.current_scaling, spoiled, torch.float8_e4m3fn, False)
    assert scale_inv.isnan().all()
    mine = quantize(spoiled, ours, "input")
    without = spoiled.nan_to_num(nan=0.0)
    codes, scale_inv, _, _ = te(worker.current_scaling, without, torch.float8_e4m3fn, False)
    assert mine.codes[7, 8].float().isnan()
    rest = torch.ones(64, 64, dtype=torch.bool)
    rest[7, 8] = False
    assert_same_bits(mine.codes.view(torch.uint8)[rest], codes.view(torch.uint8)[rest])
    assert_same_bits(mine.scale_inv.reshape(1), scale_inv)


# --- NVFP4 -------------------------------------------------------------------------------------


def unpacked(packed: Tensor) -> Tensor:
    """Two codes to the byte, the first in the low half: [m, n / 2] -> [m, n]."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


def assert_nvfp4(
    ours: casting.Quantized, codes: Tensor, block_scales: Tensor, amax: Tensor
) -> None:
    """Codes and scales, as TE stores them: [m, n / 2] of codes, [m, n / 16] of scales, amax [1].

    Ours keeps the product of block and global scale; here it is made of TE's two, and rounded once.
    TE repeats the scale of a 16 x 16 tile in each of its rows.
    """
    theirs = unpacked(codes)
    # The reference writes 0 for -0, the instruction of the hardware, and ours, 8.
    zero = theirs == 0
    assert_same_bits(torch.where(zero, torch.zeros_like(theirs), ours.codes), theirs)
    assert set(ours.codes[zero].unique().tolist()) <= {0, 8}
    whole = torch.div(torch.full_like(amax, 448 * 6), amax)
    whole = whole.clamp(max=torch.finfo(torch.float32).max)
    whole = torch.where(whole == 0, torch.ones_like(whole), whole)
    rows, columns = ours.tile
    assert columns == 16
    spread = ours.scale_inv.repeat_interleave(rows, dim=0)
    assert_same_bits(spread, block_scales.float() * torch.div(torch.ones_like(whole), whole))


def columnwise_as_rows(ours: casting.Quantized) -> casting.Quantized:
    """The same of the transposed tensor, which is how TE stores it."""
    rows, columns = ours.tile
    return ours._replace(codes=ours.codes.t(), scale_inv=ours.scale_inv.t(), tile=(columns, rows))


NVFP4_CASES = {
    # operand, what is disabled, TE's tile, does columnwise rotate
    "input": ("input", (), (1, 16), True),
    "input, no transform": ("input", ("rht",), (1, 16), False),
    "weight": ("weight", (), (16, 16), False),
    "weight, 1-D": ("weight", ("2d_quantization",), (1, 16), False),
    "gradient": ("grad_output", ("stochastic_rounding",), (1, 16), True),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", NVFP4_CASES)
def test_nvfp4_is_the_reference(te: TransformerEngine, case: str, dtype: torch.dtype) -> None:
    """Codes, block scales and the tensor's scale, both ways, of tensors with every midpoint."""
    operand, disabled, tile, rotates = NVFP4_CASES[case]
    ours = recipe.NVFP4BlockScaling(**{f"disable_{what}": True for what in disabled})
    tensors = tensors_of(formats.E2M1, dtype)
    steep = torch.randn(512, 512) * torch.exp2(torch.linspace(-60, 20, 512))
    tensors.append(steep.to(dtype))  # block scales from nothing to the largest
    infinite = torch.randn(64, 64, dtype=dtype)
    infinite[5, 6] = torch.inf
    tensors.append(infinite)
    if not rotates:  # TE rotates whole sixteens alone
        tensors.append(torch.randn(40, 72, dtype=dtype))
    for tensor in tensors:
        theirs = te(worker.nvfp4, tensor, tile, rotates)
        rowwise = quantize(tensor, ours, operand)
        assert_nvfp4(rowwise, *(theirs[f"rowwise {what}"] for what in ("codes", "scales", "amax")))
        columnwise = columnwise_as_rows(quantize(tensor, ours, operand, direction="columnwise"))
        what = (theirs[f"columnwise {what}"] for what in ("codes", "scales", "amax"))
        assert_nvfp4(columnwise, *what)


# --- delayed scaling ---------------------------------------------------------------------------

ALGORITHMS: dict[str, Any] = {
    "max": "max",
    "most_recent": "most_recent",
    "a function": worker.second_largest,
}
FP8_MAX = {operand: fmt.max for operand, fmt in FORMAT_OF.items()}


def divides_alike(amaxes: Tensor) -> Tensor:
    """For which amaxes both ways to write max / amax agree; see `test_the_trap_…`."""
    alike = torch.ones_like(amaxes, dtype=torch.bool)
    for largest in set(FP8_MAX.values()):
        whole = torch.full_like(amaxes, largest)
        alike &= torch.div(whole, amaxes) == largest / amaxes
    return alike


def amaxes_of(steps: int, *, alike: bool = True) -> Tensor:
    """[steps] of a run that grows, collapses and jumps; some below what has a finite scale."""
    wander = torch.randn(steps * 8).cumsum(0) * 2
    amaxes = torch.exp2(wander - wander.mean()) * (1 + torch.rand(steps * 8))
    if alike:
        amaxes = amaxes[divides_alike(amaxes)]
    amaxes = amaxes[:steps].clone()
    amaxes[steps // 2 : steps // 2 + 3] = torch.tensor([2.0**-149, 2.0**-140, 2.0**127])
    return amaxes


def our_trajectory(amaxes: Tensor, ours: DelayedScaling) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """(amax_history, scale) of each operand after each step."""
    operands = list(FORMAT_OF)
    layer = Fp8Linear(4, 4, recipes=dict.fromkeys(operands, ours))
    trajectory: dict[str, list[tuple[Tensor, Tensor]]] = {operand: [] for operand in operands}
    for amax in amaxes:
        layer.amax_history[0] = amax
        layer.move_scales(*operands)
        for column, operand in enumerate(operands):
            state = layer.amax_history[:, column].clone(), layer.scale[column].clone()
            trajectory[operand].append(state)
    return trajectory


def assert_trajectories(
    te: TransformerEngine,
    theirs_from: Tensor,
    ours_from: Tensor,
    fields: dict[str, Any],
    compared: list[bool] | None = None,
) -> None:
    """Histories and scales of TE's unfused update over its amaxes are those of ours, for every
    operand, at every step of ours that is `compared`."""
    compared = [True] * len(ours_from) if compared is None else compared
    ours = our_trajectory(ours_from, DelayedScaling(**fields))
    for operand, fp8_max in FP8_MAX.items():
        theirs = te(worker.scale_trajectory, theirs_from[:, None], fp8_max, fields)
        mine = [state for state, keep in zip(ours[operand], compared, strict=True) if keep]
        assert len(mine) == len(theirs)
        for (history, scale), (te_history, te_scale) in zip(mine, theirs, strict=True):
            assert_same_bits(history, te_history[:, 0])
            assert_same_bits(scale, te_scale[0])


@pytest.mark.parametrize("margin", [0, 2, -1])
@pytest.mark.parametrize("length", [2, 16, 300])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_two_hundred_steps_of_delayed_scaling(
    te: TransformerEngine, algorithm: str, length: int, margin: int
) -> None:
    """Infinite amaxes among them, which keep the old scale for as long as they are in the history.

    The amaxes are those on which the division of TE's unfused update is exact, see below.
    """
    amaxes = amaxes_of(200)
    amaxes[[20, 21, 90]] = torch.inf
    fields = {
        "amax_history_len": length,
        "amax_compute_algo": ALGORITHMS[algorithm],
        "margin": margin,
    }
    assert_trajectories(te, amaxes, amaxes, fields)


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
def test_a_step_without_an_amax_does_not_count(te: TransformerEngine, algorithm: str) -> None:
    """TE's fused kernel leaves history and scale alone if the amax is 0; its unfused update rolls.

    So our run with such steps is TE's unfused run without them, on every other step.
    """
    amaxes = amaxes_of(200)
    zero = torch.rand(200) < 0.2
    zero[:2] = True
    amaxes[zero] = 0.0
    fields = {"amax_history_len": 16, "amax_compute_algo": algorithm}
    assert_trajectories(te, amaxes[~zero], amaxes, fields, (~zero).tolist())
    ours = our_trajectory(amaxes, DelayedScaling(**fields))["input"]
    for step in zero.nonzero().flatten().tolist()[2:]:
        assert_same_bits(ours[step][0], ours[step - 1][0])
        assert_same_bits(ours[step][1], ours[step - 1][1])


def test_with_a_function_a_step_without_an_amax_does_count(te: TransformerEngine) -> None:
    """A function sends TE to its unfused update, which asks it and rolls at every step."""
    amaxes = amaxes_of(200)
    amaxes[torch.rand(200) < 0.2] = 0.0
    fields = {"amax_history_len": 16, "amax_compute_algo": worker.second_largest}
    assert_trajectories(te, amaxes, amaxes, fields)


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
def test_nan_in_the_history_is_passed_over(te: TransformerEngine, algorithm: str) -> None:
    """fmaxf of the fused kernel ignores NaN where the unfused update's max is NaN: its run is then
    the unfused one with 0 for NaN, which rolls too. No kernel of TE's makes such an amax.
    """
    amaxes = amaxes_of(200)
    nan = torch.rand(200) < 0.1
    ours_from = torch.where(nan, torch.full_like(amaxes, torch.nan), amaxes)
    theirs_from = torch.where(nan, torch.zeros_like(amaxes), amaxes)
    fields = {"amax_history_len": 8, "amax_compute_algo": algorithm}
    ours = our_trajectory(ours_from, DelayedScaling(**fields))
    for operand, fp8_max in FP8_MAX.items():
        theirs = te(worker.scale_trajectory, theirs_from[:, None], fp8_max, fields)
        for (history, scale), (te_history, te_scale) in zip(ours[operand], theirs, strict=True):
            assert_same_bits(history.nan_to_num(nan=0.0, posinf=torch.inf), te_history[:, 0])
            assert_same_bits(scale, te_scale[0])


@pytest.mark.parametrize(
    "algorithm", ["most_recent", worker.latest], ids=["most_recent", "function"]
)
def test_the_trap_in_the_unfused_update(te: TransformerEngine, algorithm: Any) -> None:
    """`448 / amax` on a torch tensor is 448 · (1 / amax), rounded twice: of TE's unfused scales a
    quarter is one float32 step beside the division of its fused kernel. Ours is the division, also
    with a function, which sends TE itself to the unfused update: there ours is beside TE's.
    """
    amaxes = amaxes_of(200, alike=False)
    amaxes = amaxes[(amaxes > 2.0**-100) & (amaxes < 2.0**100)]
    fields = {"amax_history_len": 1, "amax_compute_algo": algorithm}
    for operand, trajectory in our_trajectory(amaxes, DelayedScaling(**fields)).items():
        ours = torch.stack([scale for _, scale in trajectory])
        largest = FP8_MAX[operand]
        unfused = te(worker.scale_trajectory, amaxes[:, None], largest, fields)
        theirs = torch.stack([scale[0] for _, scale in unfused])
        np.testing.assert_array_equal(ours.numpy(), np.float32(largest) / amaxes.numpy())
        assert_same_bits(theirs, amaxes.reciprocal() * largest)
        steps = (bits(ours) - bits(theirs)).abs()
        assert steps.max() == 1
        assert 0.1 < (steps > 0).float().mean() < 0.45


def test_the_margin_comes_before_the_division(te: TransformerEngine) -> None:
    """As in the fused kernel: 112 / 2^-120 is a float32, 448 / 2^-120 is infinite and stays so."""
    amax = torch.tensor([2.0**-120])
    fields = {"margin": 2, "amax_history_len": 1}
    ours = our_trajectory(amax, DelayedScaling(**fields))["input"]
    assert ours[0][1].item() == 112 * 2.0**120
    theirs = te(worker.scale_trajectory, amax[:, None], 448.0, fields)
    assert theirs[0][1].item() == torch.finfo(torch.float32).max


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_scaling_factor_of_ones_own(te: TransformerEngine, algorithm: str) -> None:
    """TE hands it (amax, old scale, max of the format, recipe), and takes what it returns, at every
    step, one without an amax too."""
    amaxes = amaxes_of(200)
    amaxes[torch.rand(200) < 0.2] = 0.0
    fields = {
        "amax_history_len": 16,
        "amax_compute_algo": ALGORITHMS[algorithm],
        "scaling_factor_compute_algo": worker.halved_scale,
    }
    assert_trajectories(te, amaxes, amaxes, fields)
