"""Gradients that their format or their scale cannot hold, while the forward pass is sound.

Underflow: gradients in E4M3. `gradients_of_channels` is a stack of residual feed-forwards with a
gain per output channel (LayerScale, as CaiT has it), of which all but a few channels fade from some
step on: behind them the gradients fade too, and in E4M3 they end. `gradients_of_tokens` is a
language model whose loss weighs its tokens, most of them less and less: what importance sampling
does that has collapsed.

Overflow: gradients under delayed scaling. `gradients_jump` has a heavy batch now and then, whose
loss counts for more, with a history that is shorter than the time between; `gradients_no_headroom`
gives its gradients a negative margin from some step on.

Onsets. Underflow: the first step in which the majority of the non-zero values of the planted
gradient become zero. Overflow: the first step after the first in which an element of the planted
gradient lies an octave beyond the format's largest value. Both by hooks of the scenario's own,
which apply the layer's own cast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fp8lab.conversion import convert
from fp8lab.ffn import GatedFeedForward
from fp8lab.lab.data import stdlib_text
from fp8lab.lab.model import LanguageModel, ModelConfig
from fp8lab.lab.scenarios import Draw, Label, Scenario
from fp8lab.linear import Fp8Linear
from fp8lab.plan import Plan
from fp8lab.recipe import DelayedScaling, Float8CurrentScaling, Format, Recipe

T = TypeVar("T")

OCTAVE = 2.0


class Stack(nn.Module):
    """x + gain ⊙ mlp(norm(x)), `layers` times: x [batch, dim] in, the same out."""

    class Layer(nn.Module):
        gain: Tensor

        def __init__(self, dim: int, hidden: int, variant: str) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(dim)
            self.mlp = GatedFeedForward(dim, hidden, variant)
            self.register_buffer("gain", torch.ones(dim))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gain * self.mlp(self.norm(x))  # type: ignore[no-any-return]

    def __init__(self, layers: int, dim: int, hidden: int, variant: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer(dim, hidden, variant) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Dice:
    """What the seed chooses, apart for each scenario."""

    def __init__(self, draw: Draw, name: str) -> None:
        self._generator = np.random.default_rng([draw.seed, *name.encode()])

    def one(self, options: Sequence[T]) -> T:
        return options[int(self._generator.integers(len(options)))]

    def whole(self, low: int, high: int) -> int:
        return int(self._generator.integers(low, high))

    def stack(self) -> Stack:
        dim, variant = self.one((32, 48, 64)), self.one(("swiglu", "geglu", "swiglu"))
        return Stack(self.one((1, 2, 2)), dim, self.one((1, 2)) * dim, variant)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        rate = self.one((1e-3, 3e-3))
        if self.one((True, False)):
            return torch.optim.Adam(model.parameters(), lr=rate)
        return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)


class Teacher:
    """A regression: inputs normal, answers of a fixed random linear map."""

    def __init__(self, dim: int, seed: int, batch: int = 64) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._map = torch.randn(dim, dim, generator=self._generator) / dim**0.5
        self._batch = batch

    def errors(self, model: nn.Module) -> Tensor:
        """Squared errors of the next batch, [batch, dim]."""
        x = torch.randn(self._batch, len(self._map), generator=self._generator)
        return (model(x) - x @ self._map).square()  # type: ignore[no-any-return]


class Witness:
    """Sees the gradient of a layer's output, and knows the first step in which `harmed` holds of it
    and of the layer."""

    def __init__(
        self, layer: nn.Module, harmed: Callable[[Fp8Linear, Tensor], bool], skip: int = 0
    ) -> None:
        assert isinstance(layer, Fp8Linear)
        self._layer, self._harmed, self._skip = layer, harmed, skip
        self.step, self.onset = 0, -1
        layer.register_forward_hook(self._ran)

    def _ran(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._see)  # type: ignore[no-untyped-call]

    def _see(self, gradient: Tensor) -> None:
        looks = self.onset < 0 and self.step >= self._skip
        if looks and self._harmed(self._layer, gradient):
            self.onset = self.step


@torch.no_grad()
def mostly_flushed(layer: Fp8Linear, gradient: Tensor) -> bool:
    """Whether the majority of a gradient's non-zero values become zero in its cast."""
    cast = layer.cast_in_force("grad_output", gradient).fake_quantized()
    return bool(((cast == 0) & (gradient != 0)).sum() > 0.5 * (gradient != 0).sum())


@torch.no_grad()
def clipped(layer: Fp8Linear, gradient: Tensor) -> bool:
    """Whether an element is an octave beyond what the scale in force has room for."""
    how = layer.cast_in_force("grad_output", gradient)
    return bool(how.scaled().abs().max() > OCTAVE * how.format.max)


def _loop(
    draw: Draw,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    witness: Witness,
    steps: int,
    losses: Callable[[int], tuple[Tensor, Tensor]],
) -> None:
    """`losses` gives the loss that is trained on and the one that is reported."""
    with draw.watch(model, optimizer) as watching:
        for step in range(steps):
            witness.step = step
            optimizer.zero_grad()
            loss, plain = losses(step)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            watching.step(step, loss=plain.detach())
    if witness.onset < 0:
        raise RuntimeError("what is planted did not come")


def _where(layer: str) -> tuple[str, ...]:
    return (f"{layer}:grad_output", f"{layer}:grad_weight")


E4M3 = Float8CurrentScaling(fp8_format=Format.E4M3)


def of_channels(draw: Draw) -> Label:
    dice = Dice(draw, "gradients_of_channels")
    model = dice.stack()
    index = dice.whole(0, len(model.layers))
    layer = f"layers.{index}.mlp.down"
    gradients: Recipe = E4M3
    if dice.one((True, False)):
        gradients = DelayedScaling(fp8_format=Format.E4M3, amax_history_len=dice.one((4, 16)))
    everywhere = dice.one((True, False))
    pattern = "*:grad_output" if everywhere else f"{layer}:grad_output"
    convert(model, Plan(recipe=Float8CurrentScaling(), overrides={pattern: gradients}))
    gain = model.layers[index].gain
    assert isinstance(gain, Tensor)
    kept, floor = dice.whole(2, 6), draw.between(2.0**-21, 2.0**-27)
    begins, steps = dice.whole(12, 40), 64
    task = Teacher(len(gain), draw.seed)
    witness = Witness(model.get_submodule(layer), mostly_flushed)

    def losses(step: int) -> tuple[Tensor, Tensor]:
        if step >= begins:
            gain[kept:] = (gain[kept:] / 16.0).clamp(min=floor)
        loss = task.errors(model).sum(-1).mean()
        return loss, loss

    _loop(draw, model, dice.optimizer(model), witness, steps, losses)
    return Label(cause="gradient_underflow", sites=_where(layer), onset=witness.onset)


def of_tokens(draw: Draw) -> Label:
    dice = Dice(draw, "gradients_of_tokens")
    config = ModelConfig(dim=dice.one((32, 48)), layers=2, heads=2, context=32)
    model = LanguageModel(config, draw.seed)
    index, projection = dice.whole(0, 2), dice.one(("mlp.down", "attention.output", "mlp.up"))
    layer = f"layers.{index}.{projection}"
    overrides = {f"{layer}:grad_output": E4M3}
    plan = Plan(recipe=Float8CurrentScaling(), exclude=("head",), overrides=overrides)
    convert(model, plan)
    text, batch, steps = stdlib_text(), 8, 40
    begins, kept = dice.whole(8, 24), dice.whole(1, 3)
    floor = draw.between(2.0**-24, 2.0**-30)
    witness = Witness(model.get_submodule(layer), mostly_flushed)

    def losses(step: int) -> tuple[Tensor, Tensor]:
        tokens = text.batch(step, seed=draw.seed, batch=batch, context=config.context)
        logits = model(tokens[:, :-1]).flatten(0, 1)
        each = functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
        weights = torch.ones(batch, config.context)
        weights[kept:] = max(floor, 16.0 ** -max(step - begins, 0))
        return (weights.flatten() * each).sum() / weights.sum(), each.mean()

    _loop(draw, model, dice.optimizer(model), witness, steps, losses)
    return Label(cause="gradient_underflow", sites=_where(layer), onset=witness.onset)


def jump(draw: Draw) -> Label:
    dice = Dice(draw, "gradients_jump")
    model = dice.stack()
    layer = f"layers.{dice.whole(0, len(model.layers))}.mlp.{dice.one(('down', 'up', 'gate'))}"
    length, every = dice.one((2, 4, 6)), dice.whole(8, 14)
    delayed = DelayedScaling(
        amax_history_len=length, fp8_format=dice.one((Format.HYBRID, Format.E4M3))
    )
    overrides = {f"{layer}:grad_output": delayed}
    convert(model, Plan(recipe=Float8CurrentScaling(), overrides=overrides))
    begins, steps, weight = dice.whole(12, 40), 80, draw.between(30.0, 400.0)
    task = Teacher(model.layers[0].gain.numel(), draw.seed)  # type: ignore[operator]
    witness = Witness(model.get_submodule(layer), clipped, skip=1)

    def losses(step: int) -> tuple[Tensor, Tensor]:
        loss = task.errors(model).sum(-1).mean()
        heavy = step >= begins and (step - begins) % every == 0
        return loss * weight if heavy else loss, loss

    _loop(draw, model, dice.optimizer(model), witness, steps, losses)
    return Label(cause="gradient_overflow", sites=_where(layer), onset=witness.onset)


def no_headroom(draw: Draw) -> Label:
    dice = Dice(draw, "gradients_no_headroom")
    model = dice.stack()
    index = dice.whole(0, len(model.layers))
    layer = f"layers.{index}.mlp.{dice.one(('down', 'up', 'gate'))}"
    delayed = DelayedScaling(amax_history_len=dice.one((4, 16, 64)))
    narrow = DelayedScaling(
        amax_history_len=delayed.amax_history_len, margin=-round(draw.between(3, 8))
    )
    overrides = {f"{layer}:grad_output": delayed}
    convert(model, Plan(recipe=Float8CurrentScaling(), overrides=overrides))
    begins, steps = dice.whole(8, 44), 70
    task = Teacher(model.layers[0].gain.numel(), draw.seed)  # type: ignore[operator]
    module = model.get_submodule(layer)
    assert isinstance(module, Fp8Linear)
    witness = Witness(module, clipped, skip=1)

    def losses(step: int) -> tuple[Tensor, Tensor]:
        if step == begins:
            module.recipes["grad_output"] = narrow
        loss = task.errors(model).sum(-1).mean()
        return loss, loss

    _loop(draw, model, dice.optimizer(model), witness, steps, losses)
    return Label(cause="gradient_overflow", sites=_where(layer), onset=witness.onset)


_FLUSHED = "first step in which most of the gradient's non-zero values become zero"
_CLIPPED = "first step after the first in which the gradient is an octave beyond the format"

SCENARIOS = (
    Scenario(
        name="gradients_of_channels",
        cause="gradient_underflow",
        title="E4M3 gradients, all but a few channels fade",
        onset=_FLUSHED,
        run=of_channels,
    ),
    Scenario(
        name="gradients_of_tokens",
        cause="gradient_underflow",
        title="E4M3 gradients, all but a few tokens weigh less and less",
        onset=_FLUSHED,
        run=of_tokens,
    ),
    Scenario(
        name="gradients_jump",
        cause="gradient_overflow",
        title="delayed scaling forgets heavy batches before the next one comes",
        onset=_CLIPPED,
        run=jump,
    ),
    Scenario(
        name="gradients_no_headroom",
        cause="gradient_overflow",
        title="a negative margin for gradients under delayed scaling",
        onset=_CLIPPED,
        run=no_headroom,
    ),
)
