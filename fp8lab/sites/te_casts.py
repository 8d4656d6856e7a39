"""How Transformer Engine's layers cast, asked of TE itself.

A scale that a monitor reports must be the one that was used. Of the recipes that make a scale just
in time it follows from the tensor, by `casting`; under delayed scaling it is the number that the
layer's quantizer holds until its autocast region ends, so that is read, and with it the amax that
TE's kernel has written beside it. The recipe is that of the region, not the one that a layer
remembers: a layer that has not run yet remembers none.

Cost: none beyond what `casting.cast_for` costs. TE is recognised by the names of its modules and
never imported before the model has done so. What a layer computes in it does not know before its
first forward: the region decides. Rejected: `amax_history` for the scale of a step that
is over; its rows have moved by then.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from fp8lab.casting import Cast, cast_for
from fp8lab.plan import from_te, in_words
from fp8lab.recipe import (
    GEMMS,
    DelayedScaling,
    Float8CurrentScaling,
    Operand,
    Recipe,
    direction_of,
    operand_format,
    recipe_in_words,
)
from fp8lab.rounding import dtype_name
from fp8lab.scaling import absolute_maximum, scales_for

# Which of a module's quantizers casts which operand: TE's `FP8FwdTensorIdx`, `FP8BwdTensorIdx`.
_FIRST_GEMM = {"input": 0, "weight": 1, "grad_output": 0}
_SECOND_GEMM = {"input": 3, "weight": 4, "grad_output": 2}
# TE's layers that are one linear map, or several alike.
LINEARS = ("Linear", "LayerNormLinear", "GroupedLinear", "BasicLinear")


def te_name(module: Any) -> str | None:
    """The name of the class of TE that this is, or that it was derived from; None for others."""
    for cls in type(module).__mro__:
        if cls.__module__.partition(".")[0] == "transformer_engine":
            return cls.__name__
    return None


def _global_state() -> Any:
    """TE's FP8GlobalStateManager; whoever has one of its modules has imported it."""
    return sys.modules["transformer_engine.pytorch.quantization"].FP8GlobalStateManager


def recipe_in_force(module: Any, operand: Operand) -> Recipe | None:
    """The recipe of the autocast region, of a gradient that of the forward; None without FP8, and
    for what `from_te` does not know (a CustomRecipe, say)."""
    manager = _global_state()
    recipe = manager.get_fp8_recipe() if manager.is_fp8_enabled() else None
    if operand == "grad_output":
        recipe = module.fp8_meta["recipe"] if getattr(module, "fp8", False) else None
    try:
        return None if recipe is None else from_te(recipe)
    except ValueError:
        return None


def _quantizer(module: Any, operand: Operand) -> Any:
    """What casts that operand of a module (of a LayerNormMLP: of fc2); None before its first
    forward under FP8."""
    index = (_SECOND_GEMM if te_name(module) == "LayerNormMLP" else _FIRST_GEMM)[operand]
    backward = operand == "grad_output"
    if hasattr(module, "get_quantizer"):  # of te.ops
        return module.get_quantizer("backward" if backward else "forward", index)
    quantizers = module.quantizers["scaling_bwd" if backward else "scaling_fwd"]
    return quantizers[index] if index < len(quantizers) else None


def _is_delayed(quantizer: Any) -> bool:
    # By name, for one of the layer's last recipe is there until TE begins the next forward.
    return type(quantizer).__name__ == "Float8Quantizer"


def _dtype(module: Any) -> torch.dtype:
    """In which the module computes what is not in FP8."""
    known = getattr(module, "activation_dtype", None)
    if known is None:
        device = module.weight.device.type
        autocast = torch.is_autocast_enabled(device)
        known = torch.get_autocast_dtype(device) if autocast else module.weight.dtype
    dtype: torch.dtype = known
    return dtype


def cast_in_force(module: Any, operand: Operand, tensor: Tensor) -> Cast | None:
    """How a TE layer casts `tensor` as that operand now; None without FP8 or where unknown.

    Of a LayerNormMLP the operands are those of fc2. To be asked inside of the forward, of a
    gradient inside of the backward: the recipe is that of the region. A float32 product of a BF16
    layer is what TE's kernel has before its cast: delayed scaling casts that, current scaling takes
    the amax of it and casts what it is in BF16 (TE `activation.cpp`).
    """
    recipe = recipe_in_force(module, operand)
    if recipe is None:
        return None
    quantizer = _quantizer(module, operand)
    if isinstance(recipe, DelayedScaling):
        # TE starts from 1.
        scale = quantizer.scale if _is_delayed(quantizer) else tensor.new_ones(1).float()
        return cast_for(tensor, recipe, operand, scale.detach().reshape(()))
    if getattr(quantizer, "with_amax_reduction", False):
        return None  # its scale is made of the largest amax of several ranks, which nobody keeps
    dtype = _dtype(module)
    if tensor.dtype == torch.float32 != dtype and isinstance(recipe, Float8CurrentScaling):
        fmt = operand_format(recipe, operand)
        scale, _ = scales_for(absolute_maximum(tensor), fmt, recipe.use_power_2_scales)
        return cast_for(tensor.to(dtype), recipe, operand, scale)
    return cast_for(tensor, recipe, operand)


def amax_and_scale(module: Any) -> tuple[Tensor, Tensor] | None:
    """Under delayed scaling: the largest magnitude of the layer's input so far in this step, and
    the scale that cast it, float32 [] each, as TE's own kernel wrote them: a sentinel without a
    pass. Of a LayerNormMLP the input is that of fc2, the product.

    The first is a view of `amax_history`, which moves on when the autocast region ends. None under
    every other recipe.
    """
    if not isinstance(recipe_in_force(module, "input"), DelayedScaling):
        return None
    quantizer = _quantizer(module, "input")
    if not _is_delayed(quantizer):
        return None
    return quantizer.amax.reshape(()), quantizer.scale.reshape(())


def linears_in(module: Any) -> dict[str, tuple[int, int]]:
    """The linear maps that a module of TE itself is: what is put behind its name -> (in, out); a
    LayerNormMLP's are .fc1 and .fc2. Empty for every other module."""
    kind = te_name(module)
    if kind == "LayerNormMLP":
        pairs = {".fc1": module.fc1_weight, ".fc2": module.fc2_weight}
        return {name: (weight.shape[1], weight.shape[0]) for name, weight in pairs.items()}
    if kind not in LINEARS:
        return {}
    module = _linear_op(module)
    return {"": (module.in_features, module.out_features)}


def _linear_op(module: Any) -> Any:
    """The operation in a linear layer of te.ops; any other module as it is."""
    return getattr(module, "basic_ops", [module])[0]


def declared(module: Any) -> Any:
    """The recipe, TE's own object, under which a layer that was converted to TE's runs or stops;
    None of every other module."""
    return getattr(module, "declared", None) if te_name(module) is not None else None


def declared_in_words(recipe: Any) -> str:
    """A recipe of TE's with the settings that are not TE's default; of one that we have no word
    for its name."""
    try:
        return in_words(from_te(recipe))
    except ValueError:
        return type(recipe).__name__


def precision(module: Any) -> dict[str, str] | None:
    """What each operand of each GEMM of a linear layer of TE, or of both of a LayerNormMLP, was in
    its last forward (`input@output` -> format, recipe), as `Fp8Linear.precision` says it; None
    before its first.

    A recipe that we have no word for is "unknown" and its name. What TE's debug features switch off
    in one GEMM is not known here.
    """
    module = _linear_op(module)
    if hasattr(module, "get_quantizer"):  # of te.ops
        metas = module._fp8_metas
        recipe = None if metas is None else metas["forward"]["recipe"]
    elif not getattr(module, "forwarded_at_least_once", False):
        return None
    else:
        recipe = module.fp8_meta["recipe"] if module.fp8 else None
    uses = [(operand, gemm) for gemm, operands in GEMMS.items() for operand in operands]
    if recipe is None:
        wide = f"{dtype_name(_dtype(module))} HighPrecision"
        return {f"{o}@{gemm}": wide for o, gemm in uses}
    try:
        ours = from_te(recipe)
    except ValueError:
        return {f"{o}@{gemm}": f"unknown {type(recipe).__name__}" for o, gemm in uses}
    return {
        f"{o}@{gemm}": f"{operand_format(ours, o, direction_of(o, gemm)).name} "
        f"{recipe_in_words(ours)}"
        for o, gemm in uses
    }
