"""What breaks inside the model and is not the scale's doing: massive activations and logits.

Small byte-level language models, or stacks of residual feed-forwards on a regression, trained with
Adam under a recipe that the seed chooses, BF16 among them. Massive activations are planted as TWEO
(2511.23225) explains them: a down row becomes colinear with a left singular direction u_i of up, so
that its output is sum_i s_i (w . u_i)(v_i . x), and grows step by step. Attention logits grow
because queries and keys of one layer do: their learning rate is too high, or both are multiplied in
every step. Output logits drift because the head learns too fast, or because the z-loss, which
should hold logsumexp^2 down, has the wrong sign.

The onset is the step in which what is wrong is injected. That it came to something (an activation
above 100 and 1000 times the median, an attention logit above 10,000, an output logit above 128)
each draw checks by hooks of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fp8lab.conversion import convert
from fp8lab.ffn import FeedForward, GatedFeedForward
from fp8lab.lab.model import Block, LanguageModel, ModelConfig, rotate
from fp8lab.lab.scenarios import Draw, Label, Scenario
from fp8lab.lab.train import NextByte, Schedule, train
from fp8lab.plan import Plan
from fp8lab.recipe import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    HighPrecision,
    Recipe,
)

T = TypeVar("T")
Change = Callable[[nn.Module, int], None]

RECIPES: tuple[Recipe, ...] = (
    Float8CurrentScaling(),
    DelayedScaling(amax_history_len=16),
    HighPrecision(),
    Float8BlockScaling(),
)
MASSIVE, TIMES_MEDIAN = 100.0, 1000.0  # 2402.17762
ATTENTION_LOGIT = 1e4  # 2309.14322
OUTPUT_LOGIT = 128.0  # from there on neighbouring BF16 numbers are a whole nat apart


def pick(draw: Draw, what: str, options: Sequence[T]) -> T:
    """One of `options`, by the seed and the name of what is chosen."""
    key = int.from_bytes(what.encode()[:8].ljust(8), "big") % 2**32
    return options[int(np.random.default_rng([draw.seed, key]).integers(len(options)))]


class Stack(nn.Module):
    """x + mlp(norm(x)), several times: x [batch, dim] in, the same out. Plain or gated."""

    class Layer(nn.Module):
        def __init__(self, dim: int, hidden: int, activation: str) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(dim)
            gated = activation.endswith("glu")
            make = GatedFeedForward if gated else FeedForward
            self.mlp = make(dim, hidden, activation)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(self.norm(x))  # type: ignore[no-any-return]

    def __init__(self, draw: Draw, activation: str, layers: int) -> None:
        super().__init__()
        dim = pick(draw, "width", (32, 48, 64))
        self.layers = nn.ModuleList(self.Layer(dim, 2 * dim, activation) for _ in range(layers))
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Regression:
    """Squared error against a fixed smooth function, [64, dim] inputs from N(0, 1)."""

    def __init__(self, draw: Draw, dim: int) -> None:
        self._seed, self._dim = draw.seed, dim
        generator = torch.Generator().manual_seed(draw.seed)
        self._teacher = torch.randn(dim, dim, generator=generator) / math.sqrt(dim)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * self._seed + step)
        x = torch.randn(64, self._dim, generator=generator)
        return x, x + 2.0 * torch.sin(x @ self._teacher)

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        x, y = self.batch(step)
        return (model(x) - y).square().mean(), {}


class Changed:
    """A task before each batch of which something is done to the model."""

    def __init__(self, task: Any, change: Change) -> None:
        self._task, self._change = task, change

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        self._change(model, step)
        loss, metrics = self._task.loss(model, step)
        return loss, metrics


def language_model(draw: Draw, layers: int) -> tuple[LanguageModel, NextByte]:
    """A byte-level model and real text; the seed chooses the width."""
    dim = pick(draw, "dim", (32, 48))
    config = ModelConfig(dim=dim, layers=layers, heads=2, context=24)
    return LanguageModel(config, draw.seed), NextByte(None, draw.seed, batch=8, context=24)


def converted(draw: Draw, model: nn.Module, recipe: Recipe | None = None) -> nn.Module:
    """Under the recipe that the seed chooses, if none is given; a language model's head stays."""
    chosen = pick(draw, "recipe", RECIPES) if recipe is None else recipe
    exclude = ("head",) if isinstance(model, LanguageModel) else ()
    return convert(model, Plan(recipe=chosen, exclude=exclude))


def _require(seen: list[bool], otherwise: str) -> None:
    """A draw in which the cause did not come about is none."""
    if not any(seen):
        raise ValueError(otherwise)


# --- massive activations --------------------------------------------------------------------------


def massive_activation(draw: Draw) -> Label:
    """A down row turns towards up's largest left singular direction and grows from a step on."""
    layers = pick(draw, "layers", (1, 2, 3))
    activation = pick(draw, "activation", ("relu", "gelu", "swiglu", "language"))
    if activation == "language":
        model: Any
        task: Any
        model, task = language_model(draw, min(layers, 2))
    else:
        model = Stack(draw, activation, layers)
        task = Regression(draw, model.dim)
    layers = len(model.layers)
    layer, start = pick(draw, "layer", range(layers)), pick(draw, "start", range(20, 35))
    row = pick(draw, "row", range(model.layers[layer].mlp.down.weight.shape[0]))
    converted(draw, model)
    seen: list[bool] = []
    model.layers[layer].register_forward_hook(lambda *of: seen.append(_is_massive(of[2])))
    growth = draw.between(1.5, 3.0)

    @torch.no_grad()
    def plant(model: Any, step: int) -> None:
        if step < start:
            return
        mlp = model.layers[layer].mlp
        direction = torch.linalg.svd(mlp.up.weight.double(), full_matrices=False)[0][:, 0]
        row_of_down = mlp.down.weight[row]
        size = float(row_of_down.norm()) * growth
        row_of_down.copy_(direction * min(max(size, 1.0), 1e4))

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = Schedule(steps=pick(draw, "steps", range(60, 80)), clip_norm=1.0)
    with draw.watch(model, optimizer) as watching:
        train(model, optimizer, Changed(task, plant), schedule, watch=watching)
    name = f"layers.{layer}"
    sites = (f"{name}:residual", f"{name}.mlp:output")
    _require(seen, "the stream never became massive")
    return Label(cause="massive_activation", sites=sites, onset=start)


def _is_massive(stream: Tensor) -> bool:
    sizes = stream.detach().abs()
    return bool(sizes.max() > max(MASSIVE, TIMES_MEDIAN * float(sizes.median())))


# --- attention logits -----------------------------------------------------------------------------


def _attended(draw: Draw) -> tuple[LanguageModel, NextByte, int, list[bool]]:
    """A language model, its text, the layer in which something will go wrong, and whether its
    logits were too large, step by step."""
    model, task = language_model(draw, pick(draw, "layers", (1, 2)))
    converted(draw, model)
    layer = pick(draw, "layer", range(len(model.layers)))
    attention = cast(Block, model.layers[layer]).attention
    parts: dict[str, Tensor] = {}
    seen: list[bool] = []

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: parts.update({name: output.detach().float()})

    def look(module: Any, args: Any, output: Any) -> None:
        query, key = (
            rotate(_by_head(parts[name], attention.heads), args[1]) for name in ("query", "key")
        )
        logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        seen.append(bool(logits.tril().abs().max() > ATTENTION_LOGIT))

    attention.query.register_forward_hook(keep("query"))
    attention.key.register_forward_hook(keep("key"))
    attention.register_forward_hook(look)
    return model, task, layer, seen


def _by_head(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def attention_rate(draw: Draw) -> Label:
    """Queries and keys of one layer learn hundreds of times as fast as the rest."""
    model, task, layer, seen = _attended(draw)
    fast = [
        p
        for name, p in model.named_parameters()
        if name.startswith(f"layers.{layer}.attention.") and ("query" in name or "key" in name)
    ]
    rest = [p for p in model.parameters() if not any(p is one for one in fast)]
    rate = 3e-3
    high = rate * draw.between(300.0, 2000.0)
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": fast, "lr": high}]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    with draw.watch(model, optimizer) as watching:
        train(model, optimizer, task, Schedule(steps=70, clip_norm=1.0), watch=watching)
    return _attention_label(layer, seen, 0)


def attention_growth(draw: Draw) -> Label:
    """Queries and keys of one layer are multiplied by a factor in every step from one on."""
    model, task, layer, seen = _attended(draw)
    start, factor = pick(draw, "start", range(15, 30)), draw.between(1.25, 1.8)

    @torch.no_grad()
    def grow(model: Any, step: int) -> None:
        attention = model.layers[layer].attention
        if step >= start and float(attention.query.weight.norm()) < 1e4:
            attention.query.weight *= factor
            attention.key.weight *= factor

    optimizer = torch.optim.Adam(model.parameters(), lr=pick(draw, "rate", (1e-3, 3e-3)))
    with draw.watch(model, optimizer) as watching:
        schedule = Schedule(steps=80, clip_norm=1.0)
        train(model, optimizer, Changed(task, grow), schedule, watch=watching)
    return _attention_label(layer, seen, start)


def _attention_label(layer: int, seen: list[bool], onset: int) -> Label:
    _require(seen, "no attention logit exceeded 10,000")
    sites = (f"layers.{layer}:attention_logits",)
    return Label(cause="attention_logits", sites=sites, onset=onset)


# --- output logits --------------------------------------------------------------------------------


def _drift(draw: Draw, weight: float, head_rate: float) -> Label:
    """Train with `weight` times the z-loss from a step on, and the head at a rate of its own."""
    model, task = language_model(draw, pick(draw, "layers", (1, 2)))
    converted(draw, model)
    seen: list[bool] = []
    start = pick(draw, "start", range(10, 25))
    logits: list[Tensor] = []

    def look(module: Any, args: Any, output: Tensor) -> None:
        seen.append(bool(output.detach().abs().max() > OUTPUT_LOGIT))
        logits[:] = [output]

    model.register_forward_hook(look)
    body = [p for name, p in model.named_parameters() if not name.startswith("head")]
    groups = [{"params": body}, {"params": list(model.head.parameters())}]
    optimizer = torch.optim.Adam(groups, lr=3e-3)

    class WithZLoss:
        def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
            if step == start:
                optimizer.param_groups[1]["lr"] = head_rate
            loss, metrics = task.loss(model, step)
            if step >= start and weight:
                size = functional.softplus(logits[0].logsumexp(-1).square().mean().sqrt())
                extra = weight * size
                loss = loss + extra - extra.detach()
            return loss, metrics

    with draw.watch(model, optimizer) as watching:
        train(model, optimizer, WithZLoss(), Schedule(steps=80), watch=watching)
    sites = ("head:output", "head:weight", "head")
    _require(seen, "no logit exceeded 128")
    return Label(cause="output_logits", sites=sites, onset=start)


def output_sign(draw: Draw) -> Label:
    """A z-loss of the wrong sign pushes logsumexp away from zero."""
    return _drift(draw, -draw.between(30.0, 300.0), 0.1)


def output_rate(draw: Draw) -> Label:
    """From a step on the head learns hundreds of times as fast as the rest."""
    return _drift(draw, 0.0, 3e-3 * draw.between(400.0, 4000.0))


SCENARIOS = (
    Scenario(
        name="massive_activation",
        cause="massive_activation",
        title="a down row becomes colinear with a singular direction of up",
        onset="the step from which on the row is planted",
        run=massive_activation,
    ),
    Scenario(
        name="attention_rate",
        cause="attention_logits",
        title="queries and keys of one layer learn too fast",
        onset="the first step: the rate is wrong from the beginning",
        run=attention_rate,
    ),
    Scenario(
        name="attention_growth",
        cause="attention_logits",
        title="queries and keys of one layer are multiplied in every step",
        onset="the step from which on they are multiplied",
        run=attention_growth,
    ),
    Scenario(
        name="output_sign",
        cause="output_logits",
        title="a z-loss of the wrong sign",
        onset="the step from which on the z-loss is added",
        run=output_sign,
    ),
    Scenario(
        name="output_rate",
        cause="output_logits",
        title="the head learns too fast",
        onset="the step from which on the rate is wrong",
        run=output_rate,
    ),
)
