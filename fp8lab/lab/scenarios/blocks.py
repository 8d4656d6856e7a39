"""Blocks that share an exponent, and sums that are kept too short.

`weights_cluster` and `inputs_cluster` train under MXFP8, and make one operand's magnitudes alike:
weights are drawn to one magnitude in every step from some step on, as a penalty that binarises them
or a decay towards 1 does; inputs are decay factors of a sigmoid that saturates, as state-space
models have them, close to 1. The scales of the layer are rounded down, so that a cluster below a
power of two is clipped, or up, with a cluster half-way between two codes. `floor_of_scales` and
`floor_comes` are under scales that are rounded down, from the start or from some step on, as when a
run goes on on other hardware. `sums_too_short` and `sums_shortened` are feed-forwards with a wide
hidden layer whose GEMMs keep 8 to 12 bits of the sum, from the start or from some step on.

Onsets. Clusters: the first step in which, in the mean over blocks of 32, most values are cast to
the block's commonest magnitude; by the scenario's own cast. The others: the injected step, or 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fp8lab.casting import cast_for
from fp8lab.conversion import convert
from fp8lab.lab.scenarios import Draw, Label, Scenario
from fp8lab.lab.scenarios.gradients import Dice, Stack, Teacher
from fp8lab.linear import Fp8Linear
from fp8lab.plan import Plan
from fp8lab.recipe import (
    OPERANDS,
    Accumulation,
    Float8BlockScaling,
    Float8CurrentScaling,
    MXFP8BlockScaling,
    Operand,
    Recipe,
    ScaleRounding,
)

BLOCK = 32

Change = Callable[[int], None]


def _loop(draw: Draw, model: nn.Module, dice: Dice, steps: int, dim: int, change: Change) -> None:
    """A regression, with `change` before every step."""
    optimizer, task = dice.optimizer(model), Teacher(dim, draw.seed, batch=dice.one((32, 64)))
    with draw.watch(model, optimizer) as watching:
        for step in range(steps):
            change(step)
            optimizer.zero_grad()
            loss = task.errors(model).sum(-1).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            watching.step(step, loss=loss.detach())


@torch.no_grad()
def mostly_one_code(tensor: Tensor, recipe: MXFP8BlockScaling, operand: Operand) -> bool:
    """Whether most values of the blocks, in their mean, are cast to their block's commonest
    magnitude; tensor [..., a multiple of 32]."""
    codes = cast_for(tensor, recipe, operand).rounded().abs().reshape(-1, BLOCK)
    same = (codes[:, :, None] == codes[:, None, :]).sum(-1).amax(-1)
    return bool(same.float().mean() > 0.5 * BLOCK)


class Decays(nn.Module):
    """A stack whose output decides decay factors in (0, 1), which a linear layer reads."""

    def __init__(self, stack: Stack, dim: int) -> None:
        super().__init__()
        self.stack, self.read = stack, nn.Linear(dim, dim)
        self.shift, self.scale = 0.0, 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.read(torch.sigmoid(self.shift + self.scale * self.stack(x)))  # type: ignore[no-any-return]


def _stack(dice: Dice, factor: int = 2) -> tuple[Stack, int]:
    dim = dice.one((32, 64))
    return Stack(dice.one((1, 2)), dim, factor * dim, dice.one(("swiglu", "geglu"))), dim


def _only(layer: str, recipe: MXFP8BlockScaling) -> Plan:
    """MX scales in one layer whatever they are, elsewhere rounded up."""
    return Plan(recipe=MXFP8BlockScaling(), overrides={layer: recipe})


def weights_cluster(draw: Draw) -> Label:
    dice = Dice(draw, "weights_cluster")
    model, dim = _stack(dice)
    kinds: tuple[tuple[ScaleRounding, float], ...] = (
        *(("ocp_floor", mantissa) for mantissa in (0.9, 0.92, 0.94)),
        ("up", 1.3125),  # half-way between two codes
    )
    rounding, mantissa = dice.one(kinds)
    recipe = MXFP8BlockScaling(scale_rounding=rounding)
    name = f"layers.{dice.whole(0, len(model.layers))}.mlp.{dice.one(('gate', 'up', 'down'))}"
    convert(model, _only(name, recipe))
    layer = model.get_submodule(name)
    assert isinstance(layer, Fp8Linear)
    spread = draw.between(0.015, 0.003)
    common = mantissa * 2.0 ** int(torch.log2(layer.weight.detach().std()))
    begins, steps, onsets = dice.whole(6, 30), 60, list[int]()

    @torch.no_grad()
    def change(step: int) -> None:
        if step >= begins:
            centre = layer.weight.sign() * common
            away = layer.weight - centre
            layer.weight.copy_(centre + away * max(0.6, spread * common / float(away.std())))
        if not onsets and mostly_one_code(layer.weight, recipe, "weight"):
            onsets.append(step)

    _loop(draw, model, dice, steps, dim, change)
    sites = (f"{name}:weight",)
    return Label(cause="shared_exponent", sites=sites, onset=_found(onsets))


def inputs_cluster(draw: Draw) -> Label:
    dice = Dice(draw, "inputs_cluster")
    (stack, dim), recipe = _stack(dice), MXFP8BlockScaling(scale_rounding="ocp_floor")
    model = Decays(stack, dim)
    convert(model, _only("read", recipe))
    begins, steps, onsets = dice.whole(6, 30), 60, list[int]()
    shift, scale = draw.between(2.5, 4.0), draw.between(0.3, 0.1)

    def change(step: int) -> None:
        ripe = min(max(step - begins, 0) / 8, 1.0)
        model.shift, model.scale, model.read.now = ripe * shift, scale**ripe, step  # type: ignore[assignment]

    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not onsets and mostly_one_code(args[0].detach(), recipe, "input"):
            onsets.append(int(module.now))  # type: ignore[arg-type]

    model.read.register_forward_pre_hook(see)
    _loop(draw, model, dice, steps, dim, change)
    return Label(cause="shared_exponent", sites=("read:input",), onset=_found(onsets))


def _found(onsets: list[int]) -> int:
    if not onsets:
        raise RuntimeError("what is planted did not come")
    return onsets[0]


def _floor(draw: Draw, dice: Dice, begins: int) -> Label:
    model, dim = _stack(dice)
    down = MXFP8BlockScaling(scale_rounding="ocp_floor")
    operands = dice.one((OPERANDS, ("weight",), ("input", "grad_output")))
    convert(model, MXFP8BlockScaling())
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Fp8Linear)}

    def change(step: int) -> None:
        if step == begins:
            for layer in layers.values():
                layer.recipes.update(dict.fromkeys(operands, down))

    change(0)
    _loop(draw, model, dice, 50, dim, change)
    sites = tuple(f"{layer}:{operand}" for layer in layers for operand in operands)
    return Label(cause="floor_saturation", sites=sites, onset=begins)


def floor_of_scales(draw: Draw) -> Label:
    return _floor(draw, Dice(draw, "floor_of_scales"), 0)


def floor_comes(draw: Draw) -> Label:
    dice = Dice(draw, "floor_comes")
    return _floor(draw, dice, dice.whole(8, 35))


def _short(draw: Draw, dice: Dice, begins: int) -> Label:
    dim, hidden = dice.one((32, 48)), dice.one((768, 1024, 1280))
    model = Stack(dice.one((1, 2)), dim, hidden, dice.one(("swiglu", "geglu")))
    recipes: tuple[Recipe, ...] = (Float8CurrentScaling(), Float8BlockScaling())
    recipe = dice.one(recipes)
    short = Accumulation(bits=12 - round(4 * draw.strength), promote_every=None)
    promoted = Accumulation(bits=14, promote_every=128)
    convert(model, Plan(recipe=recipe, accumulation=promoted if begins else short))
    layers = [m for m in model.modules() if isinstance(m, Fp8Linear)]

    def change(step: int) -> None:
        if step == begins:
            for layer in layers:
                layer.accumulation = short

    _loop(draw, model, dice, 40, dim, change)
    named = [f"layers.{index}.mlp" for index in range(len(model.layers))]
    sites = [
        f"{n}.{o}" for n in named for o in ("down:input", "gate:grad_output", "up:grad_output")
    ]
    return Label(cause="short_accumulator", sites=tuple(sites), onset=begins)


def sums_too_short(draw: Draw) -> Label:
    return _short(draw, Dice(draw, "sums_too_short"), 0)


def sums_shortened(draw: Draw) -> Label:
    dice = Dice(draw, "sums_shortened")
    return _short(draw, dice, dice.whole(6, 28))


_ONE_CODE = "first step in which most values of a block, in the mean, have its commonest code"

SCENARIOS = (
    Scenario(
        name="weights_cluster",
        cause="shared_exponent",
        title="MXFP8: a layer's weights are drawn to one magnitude",
        onset=_ONE_CODE,
        run=weights_cluster,
    ),
    Scenario(
        name="inputs_cluster",
        cause="shared_exponent",
        title="MXFP8: a layer reads decay factors that saturate",
        onset=_ONE_CODE,
        run=inputs_cluster,
    ),
    Scenario(
        name="floor_of_scales",
        cause="floor_saturation",
        title="MXFP8: scales are rounded down",
        onset="the first step",
        run=floor_of_scales,
    ),
    Scenario(
        name="floor_comes",
        cause="floor_saturation",
        title="MXFP8: from some step on scales are rounded down",
        onset="the injected step",
        run=floor_comes,
    ),
    Scenario(
        name="sums_too_short",
        cause="short_accumulator",
        title="a wide layer sums in 8 to 12 bits",
        onset="the first step",
        run=sums_too_short,
    ),
    Scenario(
        name="sums_shortened",
        cause="short_accumulator",
        title="from some step on a wide layer sums in 8 to 12 bits",
        onset="the injected step",
        run=sums_shortened,
    ),
)
