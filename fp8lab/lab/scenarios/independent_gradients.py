"""Cases of gradients and of labels, by an author who had seen no rule.

Two of each cause, as unlike each other as they come in the field: gradients that a format is too
short for, and layers that are not in the precision that the plan says. In FP32 each training is
fine. Onsets are injected, or read off the gradients by hooks of this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fp8lab.conversion import convert
from fp8lab.lab.data import stdlib_text
from fp8lab.lab.model import LanguageModel, ModelConfig
from fp8lab.lab.scenarios import Draw, Label, Scenario
from fp8lab.lab.scenarios.independent_scaling import Encoder, Stack, follow, normal, whole
from fp8lab.linear import Fp8Linear
from fp8lab.plan import Plan
from fp8lab.recipe import (
    OPERANDS,
    DelayedScaling,
    Float8CurrentScaling,
    Format,
    HighPrecision,
)


def gradient_sites(*layers: str) -> tuple[str, ...]:
    return tuple(f"{layer}:grad_output" for layer in layers)


# --- gradient underflow ---------------------------------------------------------------------------


def _quiet_task(draw: Draw) -> Label:
    # Two tasks in a batch, the second with a weight some orders smaller, on features of its own:
    # Adam would learn both alike, E4M3 with one scale for all gradients drops the second.
    generator = torch.Generator().manual_seed(draw.seed)
    model, teacher = (Encoder(48, 48, 96, 8, "swiglu", normed=False) for _ in range(2))
    convert(model, Float8CurrentScaling(fp8_format=Format.E4M3), exclude=("head",))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, eps=1e-20)
    weight = torch.ones(128, 1)
    weight[64:] = draw.between(2.0**-19, 2.0**-24)

    def loss_of(step: int) -> Tensor:
        x = normal(generator, 128, 48)
        x[:64, 24:], x[64:, :24] = 0.0, 0.0
        with torch.no_grad():
            y = 4 * teacher(x)
        loss: Tensor = weight * (model(x) - y) ** 2
        # What is written down is what both tasks lose, each with its own weight taken off.
        losses.append(float((loss.detach() / weight).mean()))
        return loss.mean() / weight.mean()

    losses: list[float] = []
    with draw.watch(model, optimizer) as watching:
        for step in range(170):
            loss = loss_of(step)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            watching.step(step, loss=losses[-1])
    sites = gradient_sites("encoder", "mlp.gate", "mlp.up", "mlp.down")
    return Label(cause="gradient_underflow", sites=sites, onset=0)


def _as_they_come(amax: Tensor, scale: Tensor, largest: Tensor, recipe: object) -> Tensor:
    return torch.ones_like(scale)


def _no_scale(draw: Draw) -> Label:
    # Gradients cast as they come, by a scale that stays 1: a mean over many tokens is too small for
    # E5M2, and the loss is made smaller still by the share of a gradient accumulation.
    model = LanguageModel(ModelConfig(dim=32, layers=1, heads=2, context=32), draw.seed)
    text = stdlib_text()
    straight = DelayedScaling(scaling_factor_compute_algo=_as_they_come, amax_history_len=1)
    overrides = {"*:grad_output": straight}
    convert(model, Float8CurrentScaling(), exclude=("head",), overrides=overrides)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-16)
    parts = draw.between(8.0, 512.0)

    def loss_of(step: int) -> Tensor:
        return model.loss(text.batch(step, seed=draw.seed, batch=12, context=32)) / parts

    follow(draw, model, optimizer, loss_of, 80)
    layers = _layers_of(model)
    return Label(cause="gradient_underflow", sites=gradient_sites(*layers), onset=0)


# --- gradient overflow ----------------------------------------------------------------------------


class Largest:
    """The largest gradient of each layer's output, a number a step."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        self.of: dict[str, list[float]] = {name: [] for name in names}
        for name in names:
            model.get_submodule(name).register_forward_hook(self._hook(self.of[name]))

    def _hook(self, values: list[float]) -> Callable[[nn.Module, object, Tensor], None]:
        def read(_: nn.Module, args: object, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(  # type: ignore[no-untyped-call]
                    lambda gradient: values.append(float(gradient.abs().max()))
                )

        return read

    def first_above(self, limit: float) -> int:
        steps = zip(*self.of.values(), strict=True)
        return next(step for step, row in enumerate(steps) if max(row) > limit)


def _growing_loss_scale(draw: Draw) -> Label:
    # The loss scale of FP16 habits doubles until something is infinite. A saturating cast to E5M2
    # without a scale never is, and SGD loses what is cut off.
    generator = torch.Generator().manual_seed(draw.seed)
    model, teacher = (Encoder(32, 32, 64, 8, "geglu", normed=True) for _ in range(2))
    straight = DelayedScaling(scaling_factor_compute_algo=_as_they_come, amax_history_len=1)
    names = ("encoder", "mlp.gate", "mlp.up", "mlp.down")
    overrides = {"*:grad_output": straight}
    convert(model, Float8CurrentScaling(), exclude=("head",), overrides=overrides)
    largest = Largest(model, names)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    interval, step_now = round(draw.between(9.0, 5.0)), 0
    start = 2.0 ** whole(generator, 14, 17)

    def scale() -> float:
        return float(start * 2.0 ** (step_now // interval))

    def unscale(*_: object) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= scale()

    optimizer.register_step_pre_hook(unscale)
    with draw.watch(model, optimizer) as watching:
        for step in range(180):
            step_now = step
            x = normal(generator, 128, 32)
            with torch.no_grad():
                y = 2 * teacher(x)
            loss = functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            (loss * scale()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            watching.step(step, loss=loss)
    onset = largest.first_above(57344.0)
    return Label(cause="gradient_overflow", sites=gradient_sites(*names), onset=onset)


def _negative_margin(draw: Draw) -> Label:
    # "Use the range better": a margin below zero in delayed scaling, for gradients alone.
    model = LanguageModel(ModelConfig(dim=32, layers=1, heads=2, context=32), draw.seed)
    text = stdlib_text()
    margin = -round(5 + 6 * draw.strength)
    greedy = DelayedScaling(margin=margin, fp8_format=Format.E4M3, amax_history_len=16)
    overrides = {"*:grad_output": greedy}
    convert(model, Float8CurrentScaling(), exclude=("head",), overrides=overrides)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def loss_of(step: int) -> Tensor:
        return model.loss(text.batch(step, seed=draw.seed, batch=12, context=32))

    follow(draw, model, optimizer, loss_of, 80)
    layers = _layers_of(model)
    # In step 0 the scale is still 1.
    return Label(cause="gradient_overflow", sites=gradient_sites(*layers), onset=1)


# --- labels that lie about precision --------------------------------------------------------------


def _operands(*layers: str) -> tuple[str, ...]:
    downs = [f"{name.removesuffix('.down')}:product" for name in layers if name.endswith(".down")]
    return (*(f"{name}:{operand}" for name in layers for operand in OPERANDS), *downs)


def _layers_of(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, Fp8Linear)]


def _surgery(draw: Draw) -> Label:
    # Layers are exchanged after the conversion, as pruning or re-initialising does; the plan that
    # is written down still says FP8 everywhere.
    generator = torch.Generator().manual_seed(draw.seed)
    model, teacher = Stack(32, 64, 2, 16), Stack(32, 64, 2, 16)
    plan = Plan(recipe=DelayedScaling(amax_history_len=16), exclude=("head",))
    convert(model, plan)
    layers = _layers_of(model)
    order = torch.randperm(len(layers), generator=generator)[: 1 + round(3 * draw.strength)]
    chosen = tuple(layers[int(index)] for index in order)
    for name in chosen:
        old = model.get_submodule(name)
        assert isinstance(old, Fp8Linear)
        owner, _, child = name.rpartition(".")
        new = nn.Linear(old.in_features, old.out_features, bias=False)
        setattr(model.get_submodule(owner), child, new)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def loss_of(step: int) -> Tensor:
        x = normal(generator, 96, 32)
        with torch.no_grad():
            y = teacher(x)
        return functional.mse_loss(model(x), y)

    follow(draw, model, optimizer, loss_of, 100, plan=plan)
    return Label(cause="precision_label", sites=_operands(*chosen), onset=0)


def _after_evaluation(draw: Draw) -> Label:
    # An evaluation in BF16 in the midst of training, after which some layers stay in BF16.
    generator = torch.Generator().manual_seed(draw.seed)
    model = LanguageModel(ModelConfig(dim=32, layers=1, heads=2, context=32), draw.seed)
    text = stdlib_text()
    plan = Plan(recipe=Float8CurrentScaling(), exclude=("head",))
    convert(model, plan)
    layers = _layers_of(model)
    order = torch.randperm(len(layers), generator=generator)[: 1 + round(3 * draw.strength)]
    forgotten = tuple(layers[int(index)] for index in order)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    at = whole(generator, 20, 50)

    def evaluate(step: int) -> None:
        if step != at:
            return
        before = {}
        for name in layers:
            layer = cast(Fp8Linear, model.get_submodule(name))
            before[name] = layer.recipes
            layer.recipes = dict.fromkeys(OPERANDS, HighPrecision())
        with torch.no_grad():
            model.loss(text.batch(0, seed=draw.seed, batch=12, context=32, split="held_out"))
        for name in layers:
            if name not in forgotten:
                cast(Fp8Linear, model.get_submodule(name)).recipes = before[name]

    def loss_of(step: int) -> Tensor:
        return model.loss(text.batch(step, seed=draw.seed, batch=12, context=32))

    follow(draw, model, optimizer, loss_of, 80, evaluate, plan=plan)
    return Label(cause="precision_label", sites=_operands(*forgotten), onset=at)


SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        name="independent-quiet-task",
        cause="gradient_underflow",
        title="a task of small weight shares the scale of its gradients with a loud one",
        onset="step 0",
        run=_quiet_task,
    ),
    Scenario(
        name="independent-no-scale",
        cause="gradient_underflow",
        title="gradients of a mean over many tokens are cast to E5M2 as they come",
        onset="step 0",
        run=_no_scale,
    ),
    Scenario(
        name="independent-growing-loss-scale",
        cause="gradient_overflow",
        title="a loss scale doubles on, since a saturating cast is never infinite",
        onset="the first step in which a gradient is beyond the largest value of E5M2",
        run=_growing_loss_scale,
    ),
    Scenario(
        name="independent-negative-margin",
        cause="gradient_overflow",
        title="delayed scaling of gradients with a margin below zero",
        onset="step 1: the first with a scale of the recipe",
        run=_negative_margin,
    ),
    Scenario(
        name="independent-surgery",
        cause="precision_label",
        title="layers exchanged after the conversion, the plan unchanged",
        onset="step 0",
        run=_surgery,
    ),
    Scenario(
        name="independent-after-evaluation",
        cause="precision_label",
        title="an evaluation in BF16 after which some layers stay so",
        onset="the first step after the evaluation",
        run=_after_evaluation,
    ),
)
