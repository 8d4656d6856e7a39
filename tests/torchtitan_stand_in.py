"""A trainer with the methods of torchtitan 0.3's that docs/add-it-to-my-loop.md uses, on a CPU.

torchtitan itself needs a GPU and a dozen libraries. What its `Trainer` promises is read from its
source: `train` counts `step` from 1 and calls `train_step(iterator)`, which calls
`forward_backward_step(input_dict=, labels=, global_valid_tokens=)` once a micro-batch, where the
loss is a sum over the tokens divided by all the step's. So this checks the page and no torchtitan.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fp8lab import GatedFeedForward

STEPS, MICRO_BATCHES = 3, 2


class Trainer:
    """Two micro-batches a step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model_parts = [nn.Sequential(GatedFeedForward(16, 32))]
        adam = torch.optim.AdamW(self.model_parts[0].parameters(), lr=0.01)
        self.optimizers = types.SimpleNamespace(optimizers=[adam])
        self.step = 0

    def forward_backward_step(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: Tensor
    ) -> Tensor:
        errors = self.model_parts[0](input_dict["input"]) - labels
        loss = errors.square().sum() / global_valid_tokens
        loss.backward()
        return loss

    def train_step(self, data_iterator: Iterator[Tensor]) -> None:
        (adam,) = self.optimizers.optimizers
        adam.zero_grad()
        for x in [next(data_iterator) for _ in range(MICRO_BATCHES)]:
            valid = torch.tensor(float(MICRO_BATCHES * x.numel()))
            self.forward_backward_step(input_dict={"input": x}, labels=x, global_valid_tokens=valid)
        adam.step()

    def train(self) -> None:
        batches = iter(torch.randn(STEPS * MICRO_BATCHES, 8, 16))
        while self.step < STEPS:
            self.step += 1
            self.train_step(batches)


class ConfigManager:
    """Whatever the arguments, the trainer above."""

    def parse_args(self) -> Any:
        return types.SimpleNamespace(build=Trainer)


def install() -> None:
    """Make `from torchtitan.config import ConfigManager` work in this process."""
    package, config = types.ModuleType("torchtitan"), types.ModuleType("torchtitan.config")
    config.ConfigManager = ConfigManager
    sys.modules |= {"torchtitan": package, "torchtitan.config": config}
