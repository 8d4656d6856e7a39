"""One table of casts on every device: codes and scales equal those of plain torch on the CPU.

On the CPU that compares the compiled kernels with the plain path; on a GPU the plain path there
with the plain path here. Where there is no GPU the run says how many tests one would add.
"""

from __future__ import annotations

from typing import get_args
from unittest import mock

import pytest
import torch
from torch import Tensor

from fp8lab import (
    BitNetScaling,
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    Format,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    RowwiseScaling,
    formats,
    kernels,
    round_to,
)
from fp8lab.casting import Cast, cast_for
from fp8lab.recipe import OPERANDS, Direction, Operand, Recipe, ScaleRounding
from fp8lab.scaling import absolute_maximum

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RECIPES: dict[str, Recipe] = {
    "delayed": DelayedScaling(),
    "delayed, Gaudi2": DelayedScaling(fp8_format=Format.GAUDI2_E5M2_COPIES),
    "current": Float8CurrentScaling(),
    "current, powers of two": Float8CurrentScaling(use_power_2_scales=True),
    "block": Float8BlockScaling(),
    "block, any scale": Float8BlockScaling(use_f32_scales=True),
    "block, 2-D input": Float8BlockScaling(x_block_scaling_dim=2, w_block_scaling_dim=1),
    **{f"MXFP8, {how}": MXFP8BlockScaling(scale_rounding=how) for how in get_args(ScaleRounding)},
    "MXFP8, 2-D": MXFP8BlockScaling(enable_2d_quantization=True),
    "NVFP4": NVFP4BlockScaling(disable_stochastic_rounding=True, disable_rht=True),
    "row-wise": RowwiseScaling(),
    "row-wise, any scale": RowwiseScaling(round_scales_to_power_of_2=False),
    "BitNet": BitNetScaling(),
}
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)


def adversarial(rows: int = 200, columns: int = 333) -> Tensor:
    """Sixty orders of magnitude, every midpoint of E4M3, zeros, subnormals, infinity and NaN."""
    random = torch.randn(rows, columns) * torch.exp2(torch.randint(-100, 100, (rows, 1)).float())
    values = torch.tensor(list(formats.E4M3.values()))
    ties = torch.cat([values, (values[1:] + values[:-1]) / 2, -values])
    random[:2] = 0.0
    random[2, : len(ties)] = ties[:columns]
    random[3] = torch.arange(columns) * 2.0**-149
    random[4, 7], random[5, 8] = torch.inf, torch.nan
    return random


def plain(tensor: Tensor, recipe: Recipe, operand: Operand, direction: Direction) -> Cast:
    with mock.patch.object(kernels, "usable", return_value=False):
        return cast_for(tensor, recipe, operand, scale_given(tensor, recipe), direction)


def scale_given(tensor: Tensor, recipe: Recipe) -> Tensor | None:
    delayed = isinstance(recipe, DelayedScaling)
    return torch.full((), 0.37, device=tensor.device) if delayed else None


def assert_same(left: Tensor | None, right: Tensor | None) -> None:
    if left is None or right is None:
        assert left is right
        return
    left, right = left.cpu(), right.cpu()
    assert left.shape == right.shape and left.dtype == right.dtype
    assert torch.equal(left.isnan(), right.isnan())
    differ = ~left.isnan() & (left.view(torch.int32) != right.view(torch.int32))
    assert not differ.any(), f"{int(differ.sum())} of {differ.numel()} differ"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("name", RECIPES)
def test_casts_are_those_of_plain_torch_on_the_cpu(
    name: str, operand: Operand, direction: Direction, dtype: torch.dtype, device: str
) -> None:
    recipe, tensor = RECIPES[name], adversarial().to(dtype)
    if isinstance(recipe, BitNetScaling) and operand == "weight":
        tensor = tensor.float().nan_to_num(0, 0, 0).clamp(-9, 9).to(dtype)
        tensor = torch.round(tensor * 4) / 4  # sums that are exact on every device
    expected = plain(tensor, recipe, operand, direction)
    there = tensor.to(device)
    how = cast_for(there, recipe, operand, scale_given(there, recipe), direction)
    assert how.format == expected.format and how.tile == expected.tile
    assert_same(how.scale, expected.scale)
    assert_same(how.scale_inv, expected.scale_inv)
    with mock.patch.object(kernels, "usable", return_value=False):
        rounded, values = expected.rounded(), expected.fake_quantized()
        saturated, amax = expected.saturated(), absolute_maximum(tensor)
    assert_same(how.rounded(), rounded)
    assert_same(how.fake_quantized(), values)
    assert torch.equal(how.saturated().cpu(), saturated)
    assert_same(how.fake_quantized_and_amax()[0], values)
    if expected.tensor is tensor:
        assert_same(how.fake_quantized_and_amax()[1], amax)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rounding", ["nearest", "toward_zero"])
@pytest.mark.parametrize("name", [f for f in formats.FORMATS if f != "E8M0"])
def test_rounding_is_that_of_the_cpu(name: str, rounding: formats.Rounding, device: str) -> None:
    tensor, fmt = adversarial(), formats.FORMATS[name]
    assert_same(round_to(tensor.to(device), fmt, rounding), round_to(tensor, fmt, rounding))
