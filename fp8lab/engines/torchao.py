"""torchao: every chosen layer a `Float8Linear` with the cast of each operand that the plan says.

torchao scales just in time, per tensor (`Float8CurrentScaling`) or per row (`RowwiseScaling`), and
can leave both operands of a GEMM as they are; that much of a plan is said exactly, the rest is
refused by name. One layer takes one recipe, another layer may take another.

Its GEMMs multiply the codes (`torch._scaled_mm`), on a GPU that can and on a CPU; torchao's own
emulation, which rounds dequantised operands to the model's dtype, is never used. On a CPU layers
are those of `backend="emulated"` bit for bit, but for this: with scales that are no powers of two
some processors' GEMMs differ in FP32's last bits; a bias is added behind the rounding to the
model's dtype; GEMMs of rows give BF16 in every model, and gradients are rounded to it before scales
that are no powers of two are put on; an amax below 1e-12 counts as 1e-12; under one scale for a
tensor a NaN or an infinity makes all of it NaN; and the product of a gated feed-forward is rounded
where the model does it, not as in Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fp8lab import formats
from fp8lab.engines import Use, become, narrow, require_own_dtype, shown_use, why
from fp8lab.plan import Plan
from fp8lab.recipe import (
    GEMMS,
    OPERANDS,
    Float8CurrentScaling,
    HighPrecision,
    Operand,
    Recipe,
    RowwiseScaling,
    operand_format,
    recipe_in_words,
)
from fp8lab.rounding import NATIVE

_WHERE = "convert: backend='torchao'"
_LEAST_CAPABILITY = (8, 9)
_SIZES = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FORMATS = (formats.E4M3, formats.E5M2)
# Operand -> the GEMM of torchao's main field for it, and the field and GEMM of the other.
_SECOND: dict[Operand, tuple[str, str]] = {
    "input": ("output", "grad_weight"),
    "weight": ("output", "grad_input"),
    "grad_output": ("grad_input", "grad_weight"),
}


def convert(chosen: Mapping[str, nn.Linear], plan: Plan) -> list[nn.Module]:
    """Turn the `chosen` layers into layers of torchao; the layers.

    Raises ValueError for what torchao cannot do, ImportError without torchao, RuntimeError where
    the device cannot multiply in FP8: one line each, and nothing is changed.
    """
    if plan.accumulation is not None:
        raise ValueError(
            f"{_WHERE}: accumulation: {plan.accumulation}, expected None: it is torchao's"
        )
    layers = narrow(chosen, plan, _WHERE)
    recipes = {name: _recipe(name, linear, uses) for name, (linear, uses) in layers.items()}
    swap = _imported()
    for name, (linear, _) in layers.items():
        _require_device(name, linear)
        if linear.weight.dtype not in _DTYPES:
            got = linear.weight.dtype
            raise ValueError(f"{_WHERE}: {name}: {got}, expected one of FP32, BF16 and FP16")
    made = {
        name: swap(linear, config=_config(recipes[name], uses))
        for name, (linear, uses) in layers.items()
    }
    for name, (linear, _) in layers.items():
        become(linear, made[name])
        in_rows = isinstance(recipes[name], RowwiseScaling)
        linear.register_forward_pre_hook(Given(name, in_rows))
    return [linear for linear, _ in layers.values()]


def _recipe(
    name: str, linear: nn.Linear, uses: Mapping[Use, Recipe]
) -> Float8CurrentScaling | RowwiseScaling:
    """The one recipe of what is cast in a layer."""
    found: Float8CurrentScaling | RowwiseScaling | None = None
    for use, recipe in uses.items():
        where = f"{_WHERE}: {shown_use(name, use)}"
        if isinstance(recipe, HighPrecision):
            require_own_dtype(where, recipe, linear)
            continue
        if not isinstance(recipe, Float8CurrentScaling | RowwiseScaling):
            got = recipe_in_words(recipe)
            expected = "Float8CurrentScaling, RowwiseScaling or HighPrecision"
            raise ValueError(f"{where}: torchao has no {got}, expected {expected}")
        found = found or recipe
        if recipe != found:
            raise ValueError(f"{where}: {recipe}, expected one recipe for a layer, here {found}")
    assert found is not None  # `narrow` leaves out layers without one
    _require_fields(name, found)
    for gemm, operands in GEMMS.items():
        one, other = (isinstance(uses[operand, gemm], HighPrecision) for operand in operands)
        if one != other:
            raise ValueError(
                f"{_WHERE}: {name}@{gemm}: one operand in high precision, expected both or none: "
                f"torchao's GEMMs take no other"
            )
        if one and isinstance(found, RowwiseScaling) and found.high_precision_grad_weight:
            raise ValueError(
                f"{_WHERE}: {name}@{gemm}: HighPrecision beside high_precision_grad_weight, "
                f"expected one of them"
            )
    return found


def _require_fields(name: str, recipe: Float8CurrentScaling | RowwiseScaling) -> None:
    for operand in OPERANDS:
        fmt = operand_format(recipe, operand)
        if fmt not in _FORMATS or recipe.fp8_format.has_copies:
            raise ValueError(
                f"{_WHERE}: {name}: {recipe.fp8_format}, expected Format.E4M3 or Format.HYBRID"
            )
    if isinstance(recipe, Float8CurrentScaling) and recipe.stochastic_rounding:
        raise ValueError(f"{_WHERE}: {name}: torchao rounds no gradient stochastically")


class Given:
    """Forward pre-hook of a converted layer: what torchao cannot take is refused in our words.

    Raises ValueError for an input without elements, RuntimeError for rows in inference mode.
    """

    def __init__(self, name: str, in_rows: bool) -> None:
        self._name = name or "the model"
        self._in_rows = in_rows

    def __call__(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        if args and args[0].numel() == 0:
            shape = list(args[0].shape)
            raise ValueError(f"{self._name}: input {shape}: torchao casts no empty tensor")
        # torch.compile cannot trace the question, which would be a break in its graph.
        asked = self._in_rows and not torch.compiler.is_compiling()
        if asked and torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{self._name}: torchao has no RowwiseScaling in torch.inference_mode(), expected "
                f"torch.no_grad()"
            )


def _imported() -> Callable[..., nn.Module]:
    try:
        from torchao.float8 import convert_to_float8_training
    except (ImportError, OSError, RuntimeError) as error:
        raise ImportError(
            f"{_WHERE}: torchao cannot be imported: {why(error)}; pip install torchao"
        ) from None
    swap: Callable[..., nn.Module] = convert_to_float8_training
    return swap


def _require_device(name: str, linear: nn.Linear) -> None:
    device = linear.weight.device
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise RuntimeError(f"{_WHERE}: {name} is on {device}, expected a CPU or a GPU with FP8")
    if torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < _LEAST_CAPABILITY:
            raise RuntimeError(
                f"{_WHERE}: {name}: a GPU of compute capability {major}.{minor}, expected 8.9 or "
                f"higher, which multiplies in FP8"
            )
    sizes = linear.in_features, linear.out_features
    if any(size % _SIZES for size in sizes):
        raise ValueError(
            f"{_WHERE}: {name}: {sizes[0]} → {sizes[1]} features, expected multiples of {_SIZES}:"
            f" exclude it"
        )


def _config(recipe: Float8CurrentScaling | RowwiseScaling, uses: Mapping[Use, Recipe]) -> Any:
    """torchao's words for it."""
    from torchao.float8.config import (
        CastConfig,
        Float8LinearConfig,
        ScalingGranularity,
        ScalingType,
    )

    rows = isinstance(recipe, RowwiseScaling)
    # torchao's ROWWISE_WITH_GW_HP: grad_weight as it is, grad_input with one scale for the weight.
    wide_grad_weight = isinstance(recipe, RowwiseScaling) and recipe.high_precision_grad_weight

    def cast(operand: Operand, gemm: Any) -> Any:
        wide = isinstance(uses[operand, gemm], HighPrecision)
        wide = wide or (wide_grad_weight and gemm == "grad_weight")
        in_rows = rows and not (wide_grad_weight and (operand, gemm) == ("weight", "grad_input"))
        granularity = ScalingGranularity.AXISWISE if in_rows else ScalingGranularity.TENSORWISE
        return CastConfig(
            scaling_type=ScalingType.DISABLED if wide else ScalingType.DYNAMIC,
            scaling_granularity=ScalingGranularity.TENSORWISE if wide else granularity,
            target_dtype=NATIVE[operand_format(recipe, operand)],
        )

    fields = {}
    for operand, (first, second) in _SECOND.items():
        fields[f"cast_config_{operand}"] = cast(operand, first)
        fields[f"cast_config_{operand}_for_{second}"] = cast(operand, second)
    powers = (
        recipe.round_scales_to_power_of_2
        if isinstance(recipe, RowwiseScaling)
        else recipe.use_power_2_scales
    )
    return Float8LinearConfig(**fields, round_scales_to_power_of_2=powers)
