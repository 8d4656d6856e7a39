"""A clamp that is there in training and missing where the model is used.

A stack of clamped SwiGLUs (as DeepSeek-V4 has them, or with gpt-oss's offset and slope) learns a
regression whose answers ask for large products, so that the clamp bites. The twin is the training,
recorded with the clamp. The run is the same weights without it, in FP8 or BF16, on new batches
without gradients, as another implementation of the model would use them.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fp8lab.lab.scenarios import Draw, Label, Scenario
from fp8lab.lab.scenarios.training import RECIPES, Regression, converted, pick
from fp8lab.lab.train import Schedule, train
from fp8lab.mitigations import ClampedSwiGLU
from fp8lab.monitor import watch


class _Clamped(nn.Module):
    """down(swish(min(gate, limit)) * (clamp(up) + offset)); without a limit none is clamped."""

    def __init__(self, dim: int, limit: float | None, beta: float, offset: float) -> None:
        super().__init__()
        self.limit, self.beta, self.offset = limit, beta, offset
        self.gate = nn.Linear(dim, 2 * dim, bias=False)
        self.up = nn.Linear(dim, 2 * dim, bias=False)
        self.down = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x), self.up(x)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        sloped = gate if self.beta == 1.0 else gate * self.beta
        activated = functional.silu(gate) if sloped is gate else gate * sloped.sigmoid()
        product = activated * (up + self.offset if self.offset else up)
        return self.down(product)  # type: ignore[no-any-return]


class _Layer(nn.Module):
    def __init__(self, dim: int, limit: float | None, beta: float, offset: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.mlp = _Clamped(dim, limit, beta, offset)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))  # type: ignore[no-any-return]


class _Stack(nn.Module):
    def __init__(self, draw: Draw, limit: float | None, beta: float, offset: float) -> None:
        super().__init__()
        dim = pick(draw, "width", (16, 24, 32))
        layers = pick(draw, "layers", (1, 2, 3))
        self.layers = nn.ModuleList(_Layer(dim, limit, beta, offset) for _ in range(layers))
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _Large(Regression):
    """Answers of which some are far larger than the rest."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        x, y = super().batch(step)
        return x, y + 10.0 * functional.relu(x @ self._teacher - 1.0).square()


def missing_clamp(draw: Draw) -> Label:
    """The model's own clamp, which another implementation leaves out."""
    return _forgotten(draw, from_outside=False)


def missing_mitigation(draw: Draw) -> Label:
    """A clamp that a mitigation set on a plain SwiGLU."""
    return _forgotten(draw, from_outside=True)


def _forgotten(draw: Draw, *, from_outside: bool) -> Label:
    recipe = pick(draw, "recipe", RECIPES)
    formula = (1.0, 0.0) if from_outside else pick(draw, "formula", ((1.0, 0.0), (1.702, 1.0)))
    limit = draw.between(5.0, 2.5)
    trained = _Stack(draw, None if from_outside else limit, *formula)
    used = _Stack(draw, None, *formula)
    converted(draw, trained, recipe)
    if from_outside:
        ClampedSwiGLU(limit=limit).apply(trained)
    task = _Large(draw, trained.dim)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.02)
    train(trained, optimizer, task, Schedule(steps=300))
    with draw.watch(trained, optimizer, twin=True) as watching:
        train(trained, optimizer, task, Schedule(steps=330), watch=watching, first_step=300)
    converted(draw, used, recipe)
    used.load_state_dict(trained.state_dict())
    beyond = _watch_inference(draw, used, task, limit)
    sites = [f"layers.{layer}.mlp:product" for layer in sorted({layer for layer, _ in beyond})]
    return Label(cause="missing_clamp", sites=tuple(sites), onset=beyond[0][1])


def _watch_inference(
    draw: Draw, model: _Stack, task: Regression, limit: float
) -> list[tuple[int, int]]:
    """Layers whose gate or up was beyond the limit, and in which step, in order of steps."""
    beyond: list[tuple[int, int]] = []
    step = 0

    def look(layer: int, largest: bool) -> None:
        if largest:
            beyond.append((layer, step))

    for number, mlp in enumerate(cast(_Layer, layer).mlp for layer in model.layers):
        mlp.gate.register_forward_hook(lambda *a, n=number: look(n, bool(a[2].max() > limit)))
        mlp.up.register_forward_hook(lambda *a, n=number: look(n, bool(a[2].abs().max() > limit)))
    with watch(model, draw.folder / "run", every=1, inference=True) as watching:
        for step in range(40):
            with torch.inference_mode() if draw.seed % 2 else torch.no_grad():
                loss = task.loss(model, 10_000 + step)[0]
            watching.step(step, loss=float(loss))
    if not beyond:
        raise ValueError("the clamp never bit")
    return beyond


SCENARIOS = (
    Scenario(
        name="missing_clamp",
        cause="missing_clamp",
        title="the model's own clamp, left out where it is used",
        onset="the first step in which a gate or up is beyond the training's limit",
        run=missing_clamp,
    ),
    Scenario(
        name="missing_mitigation",
        cause="missing_clamp",
        title="a clamp set by a mitigation, left out where the model is used",
        onset="the first step in which a gate or up is beyond the training's limit",
        run=missing_mitigation,
    ),
)
