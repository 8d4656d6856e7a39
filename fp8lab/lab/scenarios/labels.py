"""Labels that lie: trainings that are called FP8 and have layers in high precision.

All declare their plan, as an experiment does. `label_never_true` converts less than it declares: a
layer is left out by a pattern that matches too much, or an override keeps it in BF16, wholly or one
operand of it. `label_no_longer_true` starts as declared; from some step on a layer is put back to
high precision, by new recipes in place or by another layer with the same weights in its stead.

The onset is 0, or the step in which the layer changes.
"""

from __future__ import annotations

import torch
from torch import nn

from fp8lab.conversion import convert
from fp8lab.lab.data import stdlib_text
from fp8lab.lab.model import LanguageModel, ModelConfig
from fp8lab.lab.scenarios import Draw, Label, Scenario
from fp8lab.lab.scenarios.gradients import Dice
from fp8lab.linear import Fp8Linear
from fp8lab.plan import Plan
from fp8lab.recipe import (
    OPERANDS,
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    HighPrecision,
    MXFP8BlockScaling,
    Recipe,
)

RECIPES: tuple[Recipe, ...] = (
    DelayedScaling(amax_history_len=16),
    Float8CurrentScaling(),
    Float8BlockScaling(),
    MXFP8BlockScaling(),
)
LAYERS = ("mlp.down", "mlp.up", "mlp.gate", "attention.output", "attention.query")


def _model(draw: Draw, dice: Dice) -> tuple[LanguageModel, Plan]:
    shape = ModelConfig(dim=dice.one((32, 48)), layers=dice.one((1, 2)), heads=2, context=32)
    model = LanguageModel(shape, draw.seed)
    return model, Plan(recipe=dice.one(RECIPES), exclude=("head",))


def _train(
    draw: Draw, dice: Dice, model: LanguageModel, plan: Plan, begins: int, layer: str, how: str
) -> None:
    optimizer, text = dice.optimizer(model), stdlib_text()
    with draw.watch(model, optimizer, plan=plan) as watching:
        for step in range(44):
            if step == begins and how:
                _put_back(model, layer, how)
            optimizer.zero_grad()
            loss = model.loss(text.batch(step, seed=draw.seed, batch=8, context=32))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            watching.step(step, loss=loss.detach())


def _put_back(model: nn.Module, layer: str, how: str) -> None:
    old = model.get_submodule(layer)
    assert isinstance(old, Fp8Linear)
    if how == "recipes":
        old.recipes.update(dict.fromkeys(OPERANDS, HighPrecision()))
    elif how == "class":
        old.__class__ = nn.Linear  # type: ignore[assignment]
    else:
        new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
        with torch.no_grad():
            new.weight.copy_(old.weight)
        model.set_submodule(layer, new)


def never_true(draw: Draw) -> Label:
    dice = Dice(draw, "label_never_true")
    model, plan = _model(draw, dice)
    layer = f"layers.{dice.whole(0, len(model.layers))}.{dice.one(LAYERS)}"
    if dice.one((True, False)):
        done = Plan(recipe=plan.recipe, exclude=("head", layer))
    else:
        operand = dice.one(("", ":input", ":weight"))
        done = Plan(
            recipe=plan.recipe, exclude=("head",), overrides={f"{layer}{operand}": HighPrecision()}
        )
    convert(model, done)
    _train(draw, dice, model, plan, 0, layer, "")
    return Label(cause="precision_label", sites=_of(layer), onset=0)


def no_longer_true(draw: Draw) -> Label:
    dice = Dice(draw, "label_no_longer_true")
    model, plan = _model(draw, dice)
    layer = f"layers.{dice.whole(0, len(model.layers))}.{dice.one(LAYERS)}"
    convert(model, plan)
    begins, how = dice.whole(8, 34), dice.one(("recipes", "class", "layer"))
    _train(draw, dice, model, plan, begins, layer, how)
    return Label(cause="precision_label", sites=_of(layer), onset=begins)


def _of(layer: str) -> tuple[str, ...]:
    return (layer, *(f"{layer}:{operand}" for operand in OPERANDS))


SCENARIOS = (
    Scenario(
        name="label_never_true",
        cause="precision_label",
        title="a layer that is declared FP8 and never was",
        onset="the first step",
        run=never_true,
    ),
    Scenario(
        name="label_no_longer_true",
        cause="precision_label",
        title="a layer goes back to high precision in mid-training",
        onset="the step in which it changes",
        run=no_longer_true,
    ),
)
