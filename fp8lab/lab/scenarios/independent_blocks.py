"""Cases of sums and of blocks, by an author who had seen no rule.

Two of each cause, as unlike each other as they come in the field: sums that are cut off, and blocks
whose values, all of them or the largest, the scale leaves out. In FP32 each training is fine.
Onsets are injected, or read off the weights themselves.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fp8lab.casting import Cast, cast_for
from fp8lab.conversion import convert
from fp8lab.ffn import FeedForward, GatedFeedForward
from fp8lab.lab.scenarios import Draw, Label, Scenario
from fp8lab.lab.scenarios.independent_scaling import Encoder, Stack, follow, normal, whole
from fp8lab.recipe import (
    Accumulation,
    Float8CurrentScaling,
    MXFP8BlockScaling,
)

# --- short accumulator ----------------------------------------------------------------------------


def _wide_and_positive(draw: Draw) -> Label:
    # Products of ReLUs and a down projection that averages them: 4096 terms of one sign, of which a
    # sum that is never promoted drops the last ones.
    generator = torch.Generator().manual_seed(draw.seed)
    hidden = 4096
    inner, teacher = (GatedFeedForward(16, hidden, "reglu") for _ in range(2))
    model = nn.Sequential(inner)
    with torch.no_grad():
        for mlp in (inner, teacher):
            mlp.up.weight.copy_(mlp.gate.weight)
            mlp.down.weight.abs_().mul_(4)
        inner.load_state_dict(teacher.state_dict())
        inner.down.weight += 0.05 * inner.down.weight.std() * normal(generator, 16, hidden)
    bits = round(12 - 4 * draw.strength)
    short = Accumulation(bits=bits, promote_every=None, gemms=("output",))
    convert(model, Float8CurrentScaling(), accumulation=short)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def loss_of(step: int) -> Tensor:
        x = normal(generator, 32, 16)
        with torch.no_grad():
            y = teacher(x)
        return functional.mse_loss(model(x), y)

    follow(draw, model, optimizer, loss_of, 60)
    sites = ("0:product", "0:output", "0.down:input", "0.down:weight")
    return Label(cause="short_accumulator", sites=sites, onset=0)


def _many_rows(draw: Draw) -> Label:
    # The gradient of a weight sums over the rows of a batch: 8192 of them, with a shared sign, and
    # late rows no longer count.
    generator = torch.Generator().manual_seed(draw.seed)
    model, teacher = (nn.Sequential(FeedForward(8, 16, "gelu")) for _ in range(2))
    short = Accumulation(
        bits=round(10 - 4 * draw.strength), promote_every=None, gemms=("grad_weight",)
    )
    convert(model, Float8CurrentScaling(), accumulation=short)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)

    def loss_of(step: int) -> Tensor:
        x = normal(generator, 8192, 8)
        # Sorted as a data set is: what comes last of a batch is of another kind.
        x[:4096] += 2.0
        x[4096:] -= 2.0
        with torch.no_grad():
            y = 3 * teacher(x)
        return functional.mse_loss(model(x), y)

    follow(draw, model, optimizer, loss_of, 60)
    sites = [f"0.{n}:{t}" for n in ("up", "down") for t in ("grad_weight", "grad_output", "input")]
    return Label(cause="short_accumulator", sites=(*sites, "0:product"), onset=0)


# --- shared exponent ------------------------------------------------------------------------------

FLOOR = MXFP8BlockScaling(scale_rounding="ocp_floor")


class MxNorm(nn.Module):
    """An RMSNorm whose gain is cast as MX, as in 2506.20752; its gradient passes straight through.

    The gain is [1, dim], and `cast_in_force` says how it is cast, so that it is watched like the
    weight of a layer.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_features = dim
        self.weight = nn.Parameter(torch.ones(1, dim))

    def cast_in_force(self, operand: str, tensor: Tensor) -> Cast | None:
        return cast_for(tensor, FLOOR, "weight") if operand == "weight" else None

    def forward(self, x: Tensor) -> Tensor:
        gain = cast_for(self.weight, FLOOR, "weight").fake_quantized()
        gain = self.weight + (gain - self.weight).detach() if self.quantised else self.weight
        return functional.rms_norm(x, (self.in_features,), eps=1e-5) * gain

    quantised = True


def _norm_gains(draw: Draw) -> Label:
    # A student whose gains lie close together wanders to a teacher's below one, into the last bin
    # of their shared exponent, where a block becomes 0.875 as a whole.
    generator = torch.Generator().manual_seed(draw.seed)
    model, teacher = (Stack(32, 64, 2, 16) for _ in range(2))
    goal = 0.92 + 0.07 * draw.strength
    for stack, gain in ((model, 1.04), (teacher, goal)):
        for layer in stack.layers:
            norm = MxNorm(32)
            norm.weight.data.copy_(gain + 0.005 * normal(generator, 1, 32))
            norm.quantised = stack is model
            layer.norm = norm
        stack.head.weight.data *= 10
    named = dict(teacher.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(named[name])
    convert(model, Float8CurrentScaling(), include=("layers.*",))
    gains = [p for name, p in model.named_parameters() if "norm" in name]
    rest = [p for name, p in model.named_parameters() if "norm" not in name]
    optimizer = torch.optim.Adam([{"params": gains, "lr": 2e-3}, {"params": rest, "lr": 1e-5}])
    onset: list[int] = []

    def look(step: int) -> None:
        clipped = [
            cast_for(p.detach(), FLOOR, "weight").saturated().float().mean() > 0.5 for p in gains
        ]
        if any(clipped):
            onset.append(step)

    def loss_of(step: int) -> Tensor:
        x = normal(generator, 128, 32)
        with torch.no_grad():
            y = teacher(x)
        return functional.mse_loss(model(x), y)

    follow(draw, model, optimizer, loss_of, 90, look)
    sites = tuple(f"layers.{i}.norm:weight" for i in range(2))
    return Label(cause="shared_exponent", sites=sites, onset=onset[0])


class Mixer(nn.Module):
    """Positions averaged by a layer that begins as a plain mean, then a gated feed-forward."""

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.mix = nn.Linear(length, 16, bias=False)
        nn.init.constant_(self.mix.weight, 1.0 / length)
        self.mlp = GatedFeedForward(16, 48, "swiglu")
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:  # [batch, dim, length]
        x = self.mix(x)
        return self.head(x + self.mlp(x))  # type: ignore[no-any-return]


def _means_of_positions(draw: Draw) -> Label:
    # Weights that begin as 1 / length: for 33 to 35 positions all of them lie in the last bin.
    generator = torch.Generator().manual_seed(draw.seed)
    length = (35, 34, 33)[min(int(3 * draw.strength), 2)] * 2
    model, teacher = (Mixer(length, 8) for _ in range(2))
    model.mlp.load_state_dict(teacher.mlp.state_dict())
    model.head.load_state_dict(teacher.head.state_dict())
    with torch.no_grad():
        teacher.mix.weight *= 1 + 0.02 * normal(generator, 16, length)
    convert(model, FLOOR, exclude=("head",))
    optimizer = torch.optim.SGD(model.parameters(), lr=3e-5, momentum=0.9)

    def loss_of(step: int) -> Tensor:
        x = 5 + normal(generator, 64, 1, 1) + normal(generator, 64, 4, length)
        with torch.no_grad():
            y = 3 * teacher(x)
        return functional.mse_loss(model(x), y)

    follow(draw, model, optimizer, loss_of, 120)
    return Label(cause="shared_exponent", sites=("mix:weight",), onset=0)


# --- floor saturation -----------------------------------------------------------------------------


def _highlights(draw: Draw) -> Label:
    # Eight-bit pixels. From some step on the pictures have highlights of 226 to 255, which all
    # become 224 where the scale of a block is rounded down; what they say is then lost.
    generator = torch.Generator().manual_seed(draw.seed)
    model = Encoder(64, 32, 64, 4, "swiglu", normed=False)
    answer = normal(generator, 64, 4) / 4
    convert(model, FLOOR, exclude=("head",))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = whole(generator, 30, 70)
    bright = round(draw.between(8, 24))

    def loss_of(step: int) -> Tensor:
        pixels = 120 * torch.rand(128, 64, generator=generator)
        told = torch.zeros(128, 64)
        if step >= first:
            places = torch.rand(128, 64, generator=generator).topk(bright, dim=1).indices
            highlights = 226 + 29 * torch.rand(128, bright, generator=generator)
            pixels.scatter_(1, places, highlights)
            told.scatter_(1, places, (highlights - 240) / 8)
        y = (told + pixels / 128) @ answer
        return functional.mse_loss(model(pixels / 128), y)

    follow(draw, model, optimizer, loss_of, 190)
    return Label(cause="floor_saturation", sites=("encoder:input",), onset=first)


class Chain(nn.Module):
    """Linear layers that begin near the identity, then a plain feed-forward."""

    def __init__(self, depth: int, gain: float) -> None:
        super().__init__()
        self.chain = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(depth)))
        for layer in self.chain:
            cast(nn.Linear, layer).weight.data = gain * torch.eye(32)
        self.mlp = FeedForward(32, 64, "gelu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.chain(x)
        return x + self.mlp(x)  # type: ignore[no-any-return]


def _decayed_identities(draw: Draw) -> Label:
    # A deep chain of near-identities that weight decay has shrunk a little: of each block of a
    # weight one element counts, and it is the one that is cut off, layer after layer.
    generator = torch.Generator().manual_seed(draw.seed)
    depth = round(4 + 4 * draw.strength)
    gain = 0.96 + 0.03 * draw.strength
    model, teacher = Chain(depth, gain), Chain(depth, gain)
    with torch.no_grad():
        for layer in (*model.chain, *teacher.chain):
            weight = cast(nn.Linear, layer).weight
            weight += 0.01 * normal(generator, 32, 32)
        model.mlp.load_state_dict(teacher.mlp.state_dict())
    convert(model, FLOOR, include=("chain.*",))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)

    def loss_of(step: int) -> Tensor:
        x = normal(generator, 64, 32)
        with torch.no_grad():
            y = teacher(x)
        return functional.mse_loss(model(x), y)

    follow(draw, model, optimizer, loss_of, 110)
    sites = tuple(f"chain.{i}:weight" for i in range(depth))
    return Label(cause="floor_saturation", sites=sites, onset=0)


SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        name="independent-wide-and-positive",
        cause="short_accumulator",
        title="4096 terms of one sign, summed in few bits",
        onset="step 0",
        run=_wide_and_positive,
    ),
    Scenario(
        name="independent-many-rows",
        cause="short_accumulator",
        title="weight gradients summed over 8192 rows in few bits",
        onset="step 0",
        run=_many_rows,
    ),
    Scenario(
        name="independent-norm-gains",
        cause="shared_exponent",
        title="gains of norms, close together, in the last bin of their exponent",
        onset="the first step in which most gains of a norm are beyond the largest value",
        run=_norm_gains,
    ),
    Scenario(
        name="independent-means-of-positions",
        cause="shared_exponent",
        title="a layer that begins as a mean: all its weights in the last bin",
        onset="step 0",
        run=_means_of_positions,
    ),
    Scenario(
        name="independent-highlights",
        cause="floor_saturation",
        title="highlights of eight-bit pixels, scales rounded down",
        onset="the first step with highlights",
        run=_highlights,
    ),
    Scenario(
        name="independent-decayed-identities",
        cause="floor_saturation",
        title="near-identities whose diagonal is cut off, one layer after another",
        onset="step 0",
        run=_decayed_identities,
    ),
)
