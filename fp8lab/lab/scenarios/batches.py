"""A batch that is garbage, in a training that is healthy before it.

Labels that belong to other inputs, bytes that are noise (a compressed file among the text), inputs
a thousand times too large: for one batch, or for two or three in a row. Nothing in it is NaN. What
the dial changes is how much of the batch is garbage, and whether the optimizer's gradients are
clipped, so that the training recovers from it or not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fp8lab.lab.model import LanguageModel
from fp8lab.lab.scenarios import Draw, Label, Scenario
from fp8lab.lab.scenarios.training import Regression, Stack, converted, language_model, pick
from fp8lab.lab.train import NextByte, Schedule, train


def corrupt_text(draw: Draw) -> Label:
    """Bytes that are noise, or targets that belong to other bytes."""
    model, _ = language_model(draw, pick(draw, "layers", (1, 2)))
    kind = pick(draw, "kind", ("noise", "targets"))
    start = pick(draw, "start", range(35, 55))
    share = draw.between(0.8, 1.0)

    class Corrupted(NextByte):
        def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
            if step != start:
                return super().loss(model, step)
            assert isinstance(model, LanguageModel)
            text = self.text.batch(step, seed=draw.seed, batch=8, context=24)
            generator = torch.Generator().manual_seed(draw.seed)
            spoilt = max(1, round(share * len(text)))
            if kind == "noise":
                text[:spoilt] = torch.randint(256, text[:spoilt].shape, generator=generator)
                return model.loss(text), {}
            logits = model(text[:, :-1]).float()
            targets = text[:, 1:].clone()
            targets[:spoilt] = torch.randint(256, targets[:spoilt].shape, generator=generator)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            return loss, {}

    corrupted = Corrupted(None, draw.seed, batch=8, context=24)
    return _train(draw, model, corrupted, start, 3e-3)


def corrupt_inputs(draw: Draw) -> Label:
    """Inputs of a regression that are far too large, or answers in another order and size."""
    model = Stack(draw, pick(draw, "activation", ("gelu", "swiglu")), pick(draw, "layers", (1, 2)))
    kind = pick(draw, "kind", ("inputs", "targets"))
    start, length = pick(draw, "start", range(35, 55)), pick(draw, "length", (1, 1, 2, 3))
    factor = draw.between(30.0, 1000.0)

    class Corrupted(Regression):
        def batch(self, step: int) -> tuple[Tensor, Tensor]:
            x, y = super().batch(step)
            if not start <= step < start + length:
                return x, y
            return (factor * x, y) if kind == "inputs" else (x, factor * y.roll(1, 0))

    return _train(draw, model, Corrupted(draw, model.dim), start, 3e-3)


def _train(draw: Draw, model: nn.Module, task: Any, start: int, rate: float) -> Label:
    converted(draw, model)
    kind = pick(draw, "optimizer", ("adam", "adam", "sgd"))
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    if kind == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    clip = pick(draw, "clip", (1.0, None)) if kind == "adam" else 1.0
    schedule = Schedule(steps=pick(draw, "steps", range(70, 90)), clip_norm=clip)
    with draw.watch(model, optimizer) as watching:
        train(model, optimizer, task, schedule, watch=watching)
    return Label(cause="corrupt_batch", onset=start)


SCENARIOS = (
    Scenario(
        name="corrupt_text",
        cause="corrupt_batch",
        title="a batch of text that is noise, or has the targets of another",
        onset="the step of the batch",
        run=corrupt_text,
    ),
    Scenario(
        name="corrupt_inputs",
        cause="corrupt_batch",
        title="a batch whose inputs are too large, or whose answers are those of others",
        onset="the step of the first such batch",
        run=corrupt_inputs,
    ),
)
