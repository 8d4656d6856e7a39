"""Scenarios of the gate product: a channel that aligns by itself, and a channel that grows hot.

`rare_token` plants nothing. One token in ten steps asks for a large answer, and the student grows a
channel whose gate and up rows point along that token; the delayed scale, whose history is shorter
than the gap, clips its product, and what the clipping hides winds up. It is the experiment
`swiglu_divergence` in small (history and gap scaled down together), in the last of the layers.

`hot_channel` and `hot_channel_stack` let one channel of a product grow from step to step, up's row
by the factor and down's column by its inverse, both frozen: in high precision nothing changes, and
under a scale made just in time the other channels sink below the format.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from fp8lab.conversion import convert
from fp8lab.ffn import GatedFeedForward
from fp8lab.formats import E4M3
from fp8lab.lab.data import RareToken
from fp8lab.lab.model import LanguageModel, ModelConfig
from fp8lab.lab.scenarios import Draw, Label, Scenario
from fp8lab.lab.train import NextByte
from fp8lab.linear import Fp8Linear
from fp8lab.plan import Plan
from fp8lab.recipe import DelayedScaling, Float8CurrentScaling, HighPrecision, RowwiseScaling

ONE_OCTAVE = 2.0
LOST_OF_THE_BULK = 0.1
# So that it is the product that suffers, and not the rows of up's weight beside the large one.
ROWS_APART = {"*.up:weight": RowwiseScaling()}


class Block(nn.Module):
    """x + mlp(x), or mlp(x) where it is not residual; x [tokens, dim]."""

    def __init__(self, dim: int, hidden: int, variant: str, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.mlp = GatedFeedForward(dim, hidden, variant)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.mlp(x)
        return x + output if self.residual else output


class Stack(nn.Module):
    """Gated feed-forwards one behind the other, without norms: `layers.{i}.mlp`. All but those of
    `whole` are residual and begin small, as in deep networks."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        layers: int,
        *,
        variant: str = "swiglu",
        whole: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Block(dim, hidden, variant, index not in whole) for index in range(layers)
        )
        with torch.no_grad():
            for index in set(range(layers)) - set(whole):
                self.mlp(index).down.weight *= 0.2

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x

    def mlp(self, layer: int) -> GatedFeedForward:
        """The feed-forward of a layer."""
        mlp = self.layers[layer].mlp
        assert isinstance(mlp, GatedFeedForward)
        return mlp


def product_sites(layer: int) -> tuple[str, str]:
    """The product of a layer's feed-forward, under both of its names."""
    return f"layers.{layer}.mlp:product", f"layers.{layer}.mlp.down:input"


def rare_token(draw: Draw) -> Label:
    """See the module; the dial is the size of the answer that the rare token asks for. The learning
    rate is one at which the same training survives in BF16."""
    rng = random.Random(draw.seed)
    dim, hidden = rng.choice([(48, 96), (64, 96), (64, 128)])
    layers = rng.choice([1, 2])
    task = RareToken(
        seed=draw.seed,
        dim=dim,
        hidden=hidden // 2,
        batch_size=96,
        event_probability=1 / rng.choice([10, 12]),
        target_scale=draw.between(60.0, 80.0),
    )
    plan = Plan(
        recipe=DelayedScaling(amax_history_len=rng.choice([3, 4, 5])),
        overrides={"*:grad_output": Float8CurrentScaling()},
    )
    model = Stack(dim, hidden, layers, whole=(layers - 1,))
    for index in range(layers):
        model.mlp(index).requires_grad_(index == layers - 1)
    rate, twin = 0.03, convert(copy.deepcopy(model), HighPrecision())
    while _learn(copy.deepcopy(twin), task, rate) is not None:
        rate *= 0.8
    down = model.mlp(layers - 1).down
    convert(model, plan)
    clipped: list[int] = []
    begun: list[int] = []

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(down, Fp8Linear)
        amax = float(args[0].detach().abs().amax() * down.scale[0])
        if len(begun) > 1 and amax > ONE_OCTAVE * E4M3.max:
            clipped.append(begun[-1])

    down.register_forward_pre_hook(look)
    _learn(model, task, rate, draw, begun)
    onset = clipped[0] if clipped else None
    return Label(cause="delayed_saturation", sites=product_sites(layers - 1), onset=onset)


def _learn(
    model: nn.Module,
    task: RareToken,
    rate: float,
    draw: Draw | None = None,
    begun: list[int] | None = None,
) -> int | None:
    """Train, recorded if there is a draw; the step at which it diverged, None if it did not.
    `begun` gets every step when it begins."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=rate)
    with nullcontext() if draw is None else draw.watch(model, optimizer) as watching:
        for step in range(240):
            if begun is not None:
                begun.append(step)
            x, y, is_rare = task.batch(step)
            errors = (model(x) - y).square().sum(-1)
            optimizer.zero_grad()
            errors.mean().backward()
            optimizer.step()
            common = float(errors.detach()[~is_rare].mean())
            if watching is not None:
                watching.step(step, loss=common, loss_with_rare=float(errors.detach().mean()))
            if not common < 1000.0:
                if watching is not None:
                    watching.event(step, "diverged", f"loss is {common:.4g}")
                return step
    return None


def hot_channel(draw: Draw) -> Label:
    """A byte-level language model; the dial is how far the channel grows: 2^17 to 2^24."""
    rng = random.Random(draw.seed)
    layers = rng.choice([1, 2])
    config = ModelConfig(dim=rng.choice([16, 24]), layers=layers, heads=2, context=16)
    model = LanguageModel(config, draw.seed)
    convert(model, Float8CurrentScaling(), exclude=("head",), overrides=ROWS_APART)
    layer = rng.randrange(layers)
    mlp = model.layers[layer].mlp
    assert isinstance(mlp, GatedFeedForward)
    text = NextByte(None, draw.seed, batch=4, context=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rng.choice([1e-3, 3e-3]), weight_decay=0.0)
    onset = _grow(draw, rng, model, mlp, optimizer, lambda step: text.loss(model, step)[0])
    return Label(cause="bulk_underflow", sites=product_sites(layer), onset=onset)


def hot_channel_stack(draw: Draw) -> Label:
    """A regression by a stack without norms; the dial is how far the channel grows."""
    rng = random.Random(draw.seed)
    layers, dim, hidden = rng.choice([1, 2]), rng.choice([24, 32]), rng.choice([48, 64])
    variant = rng.choice(["swiglu", "geglu", "reglu"])
    model = Stack(dim, hidden, layers, variant=variant)
    teacher = Stack(dim, hidden, layers, variant=variant).requires_grad_(False)
    convert(model, Float8CurrentScaling(), overrides=ROWS_APART)
    layer = rng.randrange(layers)
    if rng.random() < 0.5:
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def loss(step: int) -> Tensor:
        x = torch.randn(64, dim, generator=torch.Generator().manual_seed(step))
        loss: Tensor = (model(x) - teacher(x)).square().sum(-1).mean()
        return loss

    onset = _grow(draw, rng, model, model.mlp(layer), optimizer, loss)
    return Label(cause="bulk_underflow", sites=product_sites(layer), onset=onset)


def _grow(
    draw: Draw,
    rng: random.Random,
    model: nn.Module,
    mlp: GatedFeedForward,
    optimizer: torch.optim.Optimizer,
    loss_at: Callable[[int], Tensor],
) -> int | None:
    """Train while one channel grows by two octaves a step; the first step in which the cast of the
    other channels loses a tenth of their norm."""
    channel = rng.randrange(mlp.up.weight.shape[0])
    start, steps = rng.randint(8, 20), 48
    octaves, grown = round(17 + 7 * draw.strength), 0
    first: list[int] = []
    step = 0

    def freeze_row(gradient: Tensor) -> Tensor:
        return gradient.index_fill(0, torch.tensor([channel]), 0.0)

    def freeze_column(gradient: Tensor) -> Tensor:
        return gradient.index_fill(1, torch.tensor([channel]), 0.0)

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        product = args[0].detach().flatten(0, -2)
        scale = E4M3.max / product.abs().amax()
        cast = (product * scale).to(torch.float8_e4m3fn).float() / scale
        error = (cast - product).index_fill(1, torch.tensor([channel]), 0.0).norm()
        if error > LOST_OF_THE_BULK * product.index_fill(1, torch.tensor([channel]), 0.0).norm():
            first.append(step)

    mlp.up.weight.register_hook(freeze_row)  # type: ignore[no-untyped-call]
    mlp.down.weight.register_hook(freeze_column)  # type: ignore[no-untyped-call]
    mlp.down.register_forward_pre_hook(look)
    with draw.watch(model, optimizer) as watching:
        for step in range(steps):
            if step >= start and grown < octaves:
                with torch.no_grad():
                    more = min(2, octaves - grown)
                    mlp.up.weight[channel] *= 2.0**more
                    mlp.down.weight[:, channel] /= 2.0**more
                    grown += more
            loss = loss_at(step)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            watching.step(step, loss=loss)
    return first[0] if first else None


SCENARIOS = (
    Scenario(
        name="rare_token",
        cause="delayed_saturation",
        title="A rare token aligns a channel by itself; a short history clips its product",
        onset="the first step in which the product is more than an octave beyond its scale",
        run=rare_token,
    ),
    Scenario(
        name="hot_channel",
        cause="bulk_underflow",
        title="A channel of a language model's product grows hot under current scaling",
        onset="the first step in which the cast of the other channels loses a tenth of their norm",
        run=hot_channel,
    ),
    Scenario(
        name="hot_channel_stack",
        cause="bulk_underflow",
        title="A channel of a stack without norms grows hot under current scaling",
        onset="the first step in which the cast of the other channels loses a tenth of their norm",
        run=hot_channel_stack,
    ),
)
