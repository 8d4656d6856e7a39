"""Other people's FP8 layers in place of `nn.Linear`: one file an engine.

A layer is not replaced but *becomes* the engine's layer: it takes that class and what the class
keeps beside what every module has. Its parameters, its hooks and every reference to it stay, so an
optimizer that was made before goes on training it. Everything is looked at and built before the
first layer changes; after an error the model is what it was.

Rejected: putting new modules in the parents' places, as the engines' own converters do. It loses
hooks in silence, and leaves whoever holds the old layer with one that no longer trains.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from torch import nn

from fp8lab.plan import Plan
from fp8lab.recipe import GEMMS, Gemm, HighPrecision, Operand, Recipe
from fp8lab.rounding import dtype_name

Use = tuple[Operand, Gemm]


def become(layer: nn.Module, made: nn.Module) -> None:
    """Turn `layer` into what `made` is; what every module has (parameters, hooks, mode) stays."""
    of_every_module = vars(nn.Module())
    vars(layer).update({n: v for n, v in vars(made).items() if n not in of_every_module})
    layer.__class__ = type(made)


def uses_of(plan: Plan, layer: str) -> dict[Use, Recipe]:
    """The recipe of every operand of every GEMM of a layer."""
    return {
        (operand, gemm): plan.recipe_for(layer, operand, gemm)
        for gemm, operands in GEMMS.items()
        for operand in operands
    }


def require_own_dtype(where: str, recipe: HighPrecision, linear: nn.Linear) -> None:
    """Raises ValueError if what an engine leaves as it is, is not in the format that was asked."""
    own = dtype_name(linear.weight.dtype)
    if recipe.format.name != own:
        raise ValueError(
            f"{where}: {recipe.format.name}, expected {own}, the layer's own: the engine leaves "
            f"such operands as they are"
        )


def narrow(
    chosen: Mapping[str, nn.Linear], plan: Plan, where: str
) -> dict[str, tuple[nn.Linear, dict[Use, Recipe]]]:
    """Layers with their recipes, without those that stay in high precision as a whole.

    Raises ValueError, opening with `where`, where no layer is left, or one is in pieces over
    several processes, wants a format that is not its own, or has a weight that is no parameter.
    """
    kept: dict[str, tuple[nn.Linear, dict[Use, Recipe]]] = {}
    for name, linear in chosen.items():
        uses = uses_of(plan, name)
        wide = [recipe for recipe in uses.values() if isinstance(recipe, HighPrecision)]
        if len(wide) == len(uses):
            for recipe in wide:
                require_own_dtype(f"{where}: {name}", recipe, linear)
            continue
        if any(hasattr(parameter, "placements") for parameter in linear.parameters()):
            raise ValueError(f"{where}: {name} is a DTensor, expected conversion before sharding")
        if "weight" not in linear._parameters:  # as `nn.utils.weight_norm` leaves it
            made = ", ".join(linear._parameters)
            raise ValueError(f"{where}: {name}: its weight is made of {made}: exclude it")
        kept[name] = linear, uses
    if not kept:
        raise ValueError(f"{where}: every layer is HighPrecision, expected a recipe in FP8")
    return kept


def why(error: BaseException) -> str:
    """The reason for which a library cannot be imported, in one line that is not too long."""
    return textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" …")


def shown_use(layer: str, use: Any) -> str:
    """`layers.0.mlp.down:input@output`."""
    operand, gemm = use
    return f"{layer}:{operand}@{gemm}"
