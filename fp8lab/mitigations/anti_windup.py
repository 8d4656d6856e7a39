"""Anti-wind-up: no gradient through product elements that saturated in the cast.

While the product is clipped the output no longer answers to gate and up, yet the straight-through
gradient keeps pushing them: the integrator wind-up of control theory. When a later event is not
clipped, all that growth is let loose at once. Anti-wind-up gives saturated elements no gradient,
as quantisation-aware training does by default (the clipped straight-through estimator); Transformer
Engine and torchao pass the gradient through.

It bounds the growth behind the clipping, not the clipping: the forward error of a stale scale
stays, for the steps until the history has caught up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fp8lab.conversion import converted_downs
from fp8lab.recipe import (
    DelayedScaling,
    HighPrecision,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    Recipe,
    recipe_in_words,
)


@dataclass(frozen=True, kw_only=True)
class AntiWindup:
    """Zero the gradient of product elements beyond the format's largest value."""

    kind: ClassVar[str] = "model"
    changes_function: ClassVar[bool] = False
    foldable: ClassVar[bool] = False  # nothing is left of it at inference
    cost: ClassVar[str] = "a bit per product element, one comparison and one masked write"
    source: ClassVar[str] = (
        "clipped straight-through estimator of quantisation-aware training; "
        "jax-ml/jax pull request 27304, for block scales of NVFP4"
    )

    def apply(self, model: nn.Module) -> nn.Module:
        """Put it on every gated feed-forward of a converted model; returns the same model.

        Raises ValueError where nothing could saturate: a product is not cast with a scale, or with
        one that is made just in time and large enough for the largest element.
        """
        downs = converted_downs(model, type(self).__name__)
        for name, down in downs:
            recipe = down.recipe_for("input", "output")
            why = None
            if isinstance(recipe, HighPrecision):
                why = "is not FP8"
            elif not _may_saturate(recipe):
                why = f"is scaled just in time ({recipe_in_words(recipe)})"
            if why is not None:
                raise ValueError(f"AntiWindup: the product of {name} {why}, nothing saturates")
        for _, down in downs:
            down.gradient_of_saturated = "zero"
        return model


def _may_saturate(recipe: Recipe) -> bool:
    if isinstance(recipe, MXFP8BlockScaling):
        return recipe.scale_rounding in ("ocp_floor", "even")
    # NVFP4's scales are E4M3, rounded to nearest.
    return isinstance(recipe, DelayedScaling | NVFP4BlockScaling)
