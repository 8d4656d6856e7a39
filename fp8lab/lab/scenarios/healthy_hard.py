"""Healthy controls that look like trouble: see `healthy`, whose definition holds here too.

Two ranks are two processes that start anew, which is most of what that control costs.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fp8lab.ffn import GatedFeedForward
from fp8lab.lab.data import RareToken
from fp8lab.lab.model import LanguageModel, amplify
from fp8lab.lab.scenarios import Draw, Label, Scenario
from fp8lab.lab.scenarios.healthy import (
    BF16,
    CURRENT,
    DELAYED,
    MX,
    Imitation,
    Make,
    Stack,
    Training,
    language,
    run_control,
    stack,
)
from fp8lab.lab.train import NextByte
from fp8lab.plan import Plan
from fp8lab.recipe import RowwiseScaling


class _Rare:
    """The rare-token regression, as in the experiment in which delayed scaling diverges."""

    def __init__(self, seed: int, dim: int) -> None:
        self._task = RareToken(
            seed=seed, dim=dim, hidden=dim, batch_size=64, event_probability=0.1, target_scale=15.0
        )

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        x, y, _ = self._task.batch(step)
        return (model(x) - y).square().sum(-1).mean(), {}


def rare_token(**more: Any) -> Make:
    """One feed-forward that meets a rare token now and then; SGD without clipping."""

    def make(draw: Draw, rng: np.random.Generator) -> Training:
        dim = 8 * int(rng.integers(4, 8))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw.seed)
            model = Stack([GatedFeedForward(dim, 2 * dim)], dim, residual=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=draw.between(0.03, 0.05))
        given: dict[str, Any] = {"steps": 120} | more
        return Training(model=model, task=_Rare(draw.seed, dim), optimizer=optimizer, **given)

    return make


# --- what makes it hard ---------------------------------------------------------------------------

Change = Callable[[Training, Draw, np.random.Generator], Training]


def but(make: Make, change: Change) -> Make:
    """A training with something changed before it begins."""

    def changed(draw: Draw, rng: np.random.Generator) -> Training:
        return change(make(draw, rng), draw, rng)

    return changed


def hard_batch(training: Training, draw: Draw, rng: np.random.Generator) -> Training:
    """Two steps of inputs up to 1.4 times as large: the loss about doubles, and recovers."""
    assert isinstance(training.task, Imitation)
    first = int(rng.integers(20, 40))
    training.task.hard, training.task.height = frozenset({first, first + 1}), draw.between(1.1, 1.4)
    return training


def heavy_loss(training: Training, draw: Draw, rng: np.random.Generator) -> Training:
    """A loss 10 to 1,000 times as large, whose gradients are clipped in every step."""
    assert isinstance(training.task, Imitation)
    training.task.weight = draw.between(10.0, 1000.0)
    return replace(training, clip_norm=1.0)


def outlier_channel(training: Training, draw: Draw, rng: np.random.Generator) -> Training:
    """A channel of a product 2^3 to 2^6 times as large: its function is the same."""
    model = training.model
    assert isinstance(model, LanguageModel)
    layer, channel = (int(rng.integers(n)) for n in (model.config.layers, 32))
    amplify(model, layer, channel, 2.0 ** round(3 + 3 * draw.strength))
    return training


@torch.no_grad()
def large_weights(training: Training, draw: Draw, rng: np.random.Generator) -> Training:
    """Linear weights that begin up to twice as large."""
    for module in training.model.modules():
        if isinstance(module, nn.Linear):
            module.weight *= draw.between(1.2, 2.0)
    return training


@torch.no_grad()
def outlier_embedding(training: Training, draw: Draw, rng: np.random.Generator) -> Training:
    """One dimension of the embedding, and one byte of it, 4 to 16 times as large."""
    assert isinstance(training.model, LanguageModel)
    table = training.model.embedding.weight
    table[:, int(rng.integers(table.shape[1]))] *= draw.between(4.0, 16.0)
    table[ord("e")] *= draw.between(4.0, 16.0)
    return training


def gradient_noise(training: Training, draw: Draw, rng: np.random.Generator) -> Training:
    """Every gradient with noise of up to its own size."""

    def disturb(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        generator = torch.Generator().manual_seed(draw.seed * 100_000 + step)
        for parameter in model.parameters():
            if (grad := parameter.grad) is not None:
                noise = torch.randn(grad.shape, generator=generator)
                grad += noise * draw.between(0.2, 1.0) * grad.square().mean().sqrt()

    return replace(training, disturb=disturb)


def warm_up_and_cosine(training: Training, draw: Draw, rng: np.random.Generator) -> Training:
    """Ten steps up, then down to nothing; the peak is three times the rate."""
    peak = 3 * float(training.optimizer.param_groups[0]["lr"])

    def disturb(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        along = (step - 10) / (training.steps - 10)
        rate = (step + 1) / 10 if step < 10 else (1 + math.cos(math.pi * along)) / 2
        for group in optimizer.param_groups:
            group["lr"] = peak * rate

    return replace(training, disturb=disturb)


def evaluated(training: Training, draw: Draw, rng: np.random.Generator) -> Training:
    """A pass over text that is not trained on after every few steps, in evaluation mode."""
    task, every = training.task, int(rng.integers(3, 9))
    assert isinstance(task, NextByte)

    def disturb(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        assert isinstance(model, LanguageModel)
        if step % every == 0:
            model.eval()
            task.held_out_loss(model, batches=2)
            model.train()

    return replace(training, disturb=disturb)


def fine_tuned(training: Training, draw: Draw, rng: np.random.Generator) -> Training:
    """Begins where 15 steps in FP32 on other batches have led; a new optimizer, warmed up."""
    assert isinstance(training.task, NextByte)
    before = replace(training, task=NextByte(None, draw.seed + 50, batch=8, context=32), steps=15)
    before.losses(None)
    optimizer = torch.optim.AdamW(training.model.parameters(), lr=1e-3)

    def disturb(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 10)

    return replace(training, optimizer=optimizer, disturb=disturb)


def resumed(training: Training, draw: Draw, rng: np.random.Generator) -> Training:
    """Ended and gone on with from its checkpoint, in the middle."""
    return replace(training, resume_at=int(rng.integers(15, 30)))


def with_dropout(training: Training, draw: Draw, rng: np.random.Generator) -> Training:
    """Feed-forwards whose outputs are dropped with a probability of up to 0.2."""
    for module in training.model.modules():
        if isinstance(module, GatedFeedForward):
            module.dropout = draw.between(0.05, 0.2)
    return training


# --- two ranks ------------------------------------------------------------------------------------

RANKS = 2


def averaged(training: Training, draw: Draw, rng: np.random.Generator) -> Training:
    """A rank of a training whose gradients are averaged: batches of its own, the same model."""

    def disturb(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= RANKS

    task = NextByte(None, draw.seed + 100 * dist.get_rank(), batch=4, context=32)
    return replace(training, task=task, disturb=disturb, clip_norm=None)


def do_rank(rank: int, draw: Draw) -> None:
    """One process of the training and of its twin."""
    torch.set_num_threads(1)
    meeting = f"file://{(draw.folder / 'meeting').absolute()}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    try:
        run_control(but(language(), averaged), "ranks", draw)
    finally:
        dist.destroy_process_group()


def run_ranks(draw: Draw) -> Label:
    """In processes of their own: amaxes are reduced over all that was ever converted in one."""
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=do_rank, args=(rank, draw)) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        raise RuntimeError(f"{draw.folder}: ranks ended with {[r.exitcode for r in ranks]}")
    return Label(cause=None)


# --- the controls ---------------------------------------------------------------------------------

HONEST = Plan(recipe=DELAYED, exclude=("head", "layers.0.*"))
# Name, title, training.
CONTROLS: tuple[tuple[str, str, Make], ...] = (
    ("warm-up", "Warm-up and cosine, delayed", but(language(), warm_up_and_cosine)),
    (
        "warm-up-current",
        "Warm-up and cosine, current",
        but(stack(recipe=CURRENT), warm_up_and_cosine),
    ),
    ("spike", "A loss that spikes and recovers, current", but(stack(recipe=CURRENT), hard_batch)),
    ("spike-delayed", "A loss that spikes and recovers, delayed", but(stack(), hard_batch)),
    ("spike-bf16", "A loss that spikes and recovers, BF16", but(stack(recipe=BF16), hard_batch)),
    ("fine-tune-bf16", "A fine-tune in BF16", but(language(recipe=BF16, steps=60), fine_tuned)),
    ("fine-tune", "A fine-tune in FP8", but(language(recipe=CURRENT, steps=60), fine_tuned)),
    ("rare-current", "Rare tokens, current", rare_token(recipe=CURRENT)),
    ("rare-rowwise", "Rare tokens, a scale per row", rare_token(recipe=RowwiseScaling())),
    ("rare-bf16", "Rare tokens, BF16", rare_token(recipe=BF16)),
    (
        "outlier-current",
        "A channel 2^3 to 2^6 times as large",
        but(language(recipe=CURRENT), outlier_channel),
    ),
    ("outlier-delayed", "The same under delayed scaling", but(language(), outlier_channel)),
    ("outlier-mx", "The same under MXFP8", but(language(recipe=MX), outlier_channel)),
    ("clipped", "Gradients that are clipped all the time", but(stack(), heavy_loss)),
    ("noise", "Noisy gradients", but(language(recipe=CURRENT), gradient_noise)),
    ("resumed", "Resumed, delayed", but(language(), resumed)),
    ("evaluated", "Evaluations in between, delayed", but(language(), evaluated)),
    ("large-weights", "Weights that begin large", but(language(recipe=CURRENT), large_weights)),
    ("large-weights-delayed", "The same, delayed", but(language(), large_weights)),
    (
        "outlier-embedding",
        "Outliers in the embedding",
        but(language(recipe=CURRENT), outlier_embedding),
    ),
    ("honest", "A first layer in BF16, as the plan says", language(recipe=HONEST, depth=2)),
    ("dropout", "Dropout, delayed", but(language(), with_dropout)),
)


def _scenario(name: str, title: str, make: Make) -> Scenario:
    def run(draw: Draw) -> Label:
        return run_control(make, name, draw)

    return Scenario(name=f"healthy-{name}", cause=None, title=title, onset="none", run=run)


SCENARIOS = (
    *(_scenario(*control) for control in CONTROLS),
    Scenario(
        name="healthy-ranks",
        cause=None,
        title="Two ranks whose amaxes are reduced, delayed",
        onset="none",
        run=run_ranks,
    ),
)
