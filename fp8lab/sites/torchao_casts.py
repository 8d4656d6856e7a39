"""How torchao's `Float8Linear` casts, read from its config.

Its scales are made just in time, so cast and precision follow from the config and the tensor, by
`casting`: equal bit for bit to what torchao does. Its formula for a scale is that of rows for the
whole tensor, too: an amax below 1e-12 counts as that, and one NaN or infinity makes the whole
tensor NaN, where `Float8CurrentScaling`, as in Transformer Engine, keeps the rest of it. torchao is
recognised by the name of its class and never imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8lab.casting import Cast, cast_for
from fp8lab.formats import FloatFormat
from fp8lab.recipe import (
    GEMMS,
    Float8CurrentScaling,
    Format,
    Gemm,
    Operand,
    Recipe,
    RowwiseScaling,
    operand_format,
)
from fp8lab.rounding import FORMAT_OF, dtype_name
from fp8lab.scaling import rowwise_scale

# What has a field of its own in torchao's config, `cast_config_OPERAND_for_GEMM`.
_SECOND = {("input", "grad_weight"), ("weight", "grad_input"), ("grad_output", "grad_weight")}


def is_torchao(module: Any) -> bool:
    """Whether this is torchao's `Float8Linear`, or derived from it."""
    return any(
        cls.__name__ == "Float8Linear" and cls.__module__.partition(".")[0] == "torchao"
        for cls in type(module).__mro__
    )


def precision(module: Any) -> dict[str, str]:
    """What each operand of each GEMM is in a `Float8Linear` (`input@output` -> format, recipe), as
    `Fp8Linear.precision` says it."""
    uses: dict[str, str] = {}
    for gemm, operands in GEMMS.items():
        for operand in operands:
            kind, fmt = _cast(module, operand, gemm)
            wide = f"{dtype_name(module.weight.dtype)} HighPrecision"
            uses[f"{operand}@{gemm}"] = wide if fmt is None else f"{fmt.name} {kind.__name__}"
    return uses


def cast_in_force(module: Any, operand: Operand, tensor: Tensor) -> Cast | None:
    """How a `Float8Linear` casts `tensor` as that operand for the first of its GEMMs; None if it
    does not, or to a format for which there is no recipe."""
    kind, fmt = _cast(module, operand, "grad_input" if operand == "grad_output" else "output")
    either = (f for f in (Format.E4M3, Format.HYBRID) if f.of(operand) == fmt)
    chosen = next(either, None)
    if chosen is None:
        return None
    powers = module.config.round_scales_to_power_of_2
    rows = RowwiseScaling(fp8_format=chosen, round_scales_to_power_of_2=powers)
    if operand == "input" and torch.is_autocast_enabled():  # as in its forward
        tensor = tensor.to(torch.get_autocast_dtype("cuda"))
    if kind is RowwiseScaling:
        return cast_for(tensor, rows, operand)
    whole = Float8CurrentScaling(fp8_format=chosen, use_power_2_scales=powers)
    scale = rowwise_scale(tensor.detach(), rows, operand_format(whole, operand), None)
    return cast_for(tensor, whole, operand, scale)


def _cast(module: Any, operand: Operand, gemm: Gemm) -> tuple[type[Recipe], FloatFormat | None]:
    """The recipe of one cast, and its format, None for an operand that stays as it is."""
    second = f"_for_{gemm}" if (operand, gemm) in _SECOND else ""
    cast = getattr(module.config, f"cast_config_{operand}{second}")
    kind = RowwiseScaling if cast.scaling_granularity.name == "AXISWISE" else Float8CurrentScaling
    return kind, None if cast.scaling_type.name == "DISABLED" else FORMAT_OF[cast.target_dtype]
