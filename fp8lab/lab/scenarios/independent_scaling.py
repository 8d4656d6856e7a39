"""Cases of a scale that does not fit its tensor, by an author who had seen no rule.

Two of each cause, as unlike each other as they come in the field: what clips, and what makes the
rest of a tensor flush. In FP32 each training is fine. Onsets are injected, or read off the layers'
own tensors by hooks of this file. The models and the loop serve the other independent files too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from fp8lab.conversion import convert
from fp8lab.ffn import GatedFeedForward
from fp8lab.lab.data import stdlib_text
from fp8lab.lab.model import LanguageModel, ModelConfig, amplify
from fp8lab.lab.scenarios import Draw, Label, Scenario
from fp8lab.plan import Plan
from fp8lab.recipe import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    Format,
)
from fp8lab.scaling import power_of_two_scale

CLIPPED = 2.0  # beyond this multiple of what the scale in force can hold, harm is certain
SMALLEST = 2.0**-10  # half the smallest subnormal of E4M3: what is below becomes zero


class Residual(nn.Module):
    """x + mlp(norm(x))."""

    def __init__(self, dim: int, hidden: int, variant: str = "swiglu") -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.mlp = GatedFeedForward(dim, hidden, variant)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))  # type: ignore[no-any-return]


class Stack(nn.Module):
    """Residual feed-forwards and a head, over rows."""

    def __init__(self, dim: int, hidden: int, layers: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Residual(dim, hidden) for _ in range(layers))
        self.head = nn.Linear(dim, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Features through an encoder, a norm or none, one gated feed-forward and a head."""

    def __init__(
        self, features: int, dim: int, hidden: int, outputs: int, variant: str, normed: bool
    ) -> None:
        super().__init__()
        self.encoder = nn.Linear(features, dim, bias=False)
        self.norm = nn.RMSNorm(dim, eps=1e-5) if normed else nn.Identity()
        self.mlp = GatedFeedForward(dim, hidden, variant)
        self.head = nn.Linear(dim, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.encoder(x))
        return self.head(x + self.mlp(x))  # type: ignore[no-any-return]


class Bytes(nn.Module):
    """Bengio's language model: the embeddings of the last bytes side by side, a feed-forward."""

    def __init__(self, window: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.mlp = GatedFeedForward(window * width, hidden, "geglu")
        self.head = nn.Linear(window * width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).flatten(-2)
        return self.head(x + self.mlp(x))  # type: ignore[no-any-return]


def follow(
    draw: Draw,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[int], Tensor],
    steps: int,
    before: Callable[[int], None] = lambda step: None,
    plan: Plan | None = None,
) -> None:
    """The training, recorded, and what it says of its precision."""
    with draw.watch(model, optimizer, plan=plan) as watching:
        for step in range(steps):
            before(step)
            loss = loss_of(step)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            watching.step(step, loss=loss)


class Excess:
    """By how much the input of each layer named exceeds what its scale in force can hold, a number
    a step: read before the cast, from the layer's own scale."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], largest: float = 448.0) -> None:
        self.of: dict[str, list[float]] = {name: [] for name in names}
        for name in names:
            model.get_submodule(name).register_forward_pre_hook(self._reader(name, largest))

    def _reader(self, name: str, largest: float) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def read(layer: nn.Module, args: tuple[Tensor]) -> None:
            if not torch.is_grad_enabled():  # whoever looks for gates tries the model out
                return
            scale = float(getattr(layer, "scale", torch.ones(1))[0])
            self.of[name].append(float(args[0].detach().abs().max()) * scale / largest)

        return read

    def label(self, cause: str, sites: Callable[[str], tuple[str, ...]]) -> Label:
        """Every layer that was clipped, since the first time that one was."""
        clipped = [name for name, values in self.of.items() if max(values) > CLIPPED]
        steps = zip(*self.of.values(), strict=True)
        onset = next((step for step, row in enumerate(steps) if max(row) > CLIPPED), None)
        return Label(
            cause=cause, sites=tuple(s for name in clipped for s in sites(name)), onset=onset
        )


def product_sites(down: str) -> tuple[str, ...]:
    """What the product of a feed-forward is called, from the name of its down projection."""
    return f"{down.removesuffix('.down')}:product", f"{down}:input"


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def whole(generator: torch.Generator, least: int, most: int) -> int:
    """A whole number from `least` up to and without `most`."""
    return int(torch.randint(least, most, (), generator=generator))


# --- delayed saturation ---------------------------------------------------------------------------


def _rare_word(draw: Draw) -> Label:
    # A rare input, of either sign, has a target so large that a channel learns to see nothing else
    # (quadratic, as gate times up is); between two of its visits the short history forgets it.
    generator = torch.Generator().manual_seed(draw.seed)
    model = Stack(24, 48, 1, 24)
    teacher = normal(generator, 24, 24) / math.sqrt(24)
    word, meaning = (functional.normalize(normal(generator, 24), dim=0) for _ in range(2))
    visits = torch.rand(220, generator=generator) < 0.15
    convert(model, DelayedScaling(amax_history_len=3), exclude=("head",))
    excess = Excess(model, ("layers.0.mlp.down",))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, betas=(0.9, 0.95), weight_decay=0.1)

    def loss_of(step: int) -> Tensor:
        x = normal(generator, 96, 24)
        x = x - torch.outer(x @ word, word)
        y = x @ teacher
        if visits[step]:
            sign = 2.0 * whole(generator, 0, 2) - 1.0
            x[0], y[0] = sign * word * math.sqrt(24), draw.between(500.0, 1500.0) * meaning
        return functional.huber_loss(model(x), y, delta=30.0)

    follow(draw, model, optimizer, loss_of, 220)
    return excess.label("delayed_saturation", product_sites)


def _rare_sensor(draw: Draw) -> Label:
    # Gaudi's way: E4M3 up to 240, powers of two, only the last amax counts. A sensor that seldom
    # speaks drives an outcome of its own; GEGLU, no norm before it, SGD with clipped gradients.
    generator = torch.Generator().manual_seed(draw.seed)
    model = Encoder(24, 32, 48, 8, "geglu", normed=False)
    sensor = whole(generator, 0, 24)
    teacher = normal(generator, 24, 8) / math.sqrt(24)
    recipe = DelayedScaling(
        fp8_format=Format.GAUDI2,
        amax_history_len=1,
        amax_compute_algo="most_recent",
        scaling_factor_compute_algo=power_of_two_scale,
    )
    convert(model, recipe, include=("mlp.*",))
    excess = Excess(model, ("mlp.down",), largest=240.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)

    def loss_of(step: int) -> Tensor:
        x = normal(generator, 64, 24)
        x[:, sensor] = 0.0
        speaks = bool(torch.rand((), generator=generator) < 0.15)
        y = x @ teacher
        if speaks:
            x[0] *= 0.1
            x[0, sensor], y[0] = 4.0, draw.between(150.0, 600.0)
        return functional.huber_loss(model(x), y, delta=20.0)

    def clip(*_: object) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    optimizer.register_step_pre_hook(clip)
    follow(draw, model, optimizer, loss_of, 300)
    return excess.label("delayed_saturation", product_sites)


# --- bulk underflow -------------------------------------------------------------------------------


def _as_it_is(mlp: GatedFeedForward, channel: int) -> None:
    """The hot channel is at rest: at its size one step of any optimizer would throw it out."""
    mask = torch.ones(mlp.gate.out_features)
    mask[channel] = 0.0
    for weight, rows in ((mlp.up.weight, mask[:, None]), (mlp.down.weight, mask)):
        weight.register_hook(partial(torch.mul, rows))  # type: ignore[no-untyped-call]


def _hot_checkpoint(draw: Draw) -> Label:
    # A language model trained in high precision, one channel of it hot, goes on in FP8.
    generator = torch.Generator().manual_seed(draw.seed)
    model = LanguageModel(ModelConfig(dim=32, layers=1, heads=2, context=32), draw.seed)
    text = stdlib_text()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)

    def loss_of(step: int) -> Tensor:
        return model.loss(text.batch(step, seed=draw.seed, batch=12, context=32))

    for step in range(250):
        optimizer.zero_grad()
        loss_of(step).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    layer, channel = 0, whole(generator, 0, 88)
    amplify(model, layer, channel, 2.0 ** round(18 + 5 * draw.strength))
    mlp = model.layers[layer].mlp
    assert isinstance(mlp, GatedFeedForward)
    _as_it_is(mlp, channel)
    convert(model, Float8CurrentScaling(), exclude=("head",))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0)
    follow(draw, model, optimizer, lambda step: loss_of(250 + step), 60)
    name = f"layers.{layer}.mlp.down"
    return Label(cause="bulk_underflow", sites=product_sites(name), onset=0)


def _drifting_channel(draw: Draw) -> Label:
    # Up and down of one channel drift apart, which the function does not feel; rows, not text.
    generator = torch.Generator().manual_seed(draw.seed)
    model, teacher = Stack(32, 96, 2, 16), Stack(32, 96, 2, 16)
    place, channel, first = (whole(generator, 0, most) for most in (2, 96, 25))
    layer = model.layers[place]
    assert isinstance(layer, Residual)
    mlp = layer.mlp
    _as_it_is(mlp, channel)
    convert(model, Float8CurrentScaling(use_power_2_scales=True), exclude=("head",))
    flushed: list[float] = []

    def look(_: nn.Module, args: tuple[Tensor]) -> None:
        if not torch.is_grad_enabled():
            return
        size = args[0].detach().abs()
        bulk = torch.cat([size[:, :channel], size[:, channel + 1 :]], dim=1)
        flushed.append(float((bulk * (448.0 / size.max()) < SMALLEST).float().mean()))

    mlp.down.register_forward_pre_hook(look)
    optimizer = torch.optim.NAdam(model.parameters(), lr=3e-3)

    def drift(step: int) -> None:
        if first <= step < first + 30:
            factor = draw.between(2.0**22, 2.0**28) ** (1 / 30)
            with torch.no_grad():
                mlp.up.weight[channel] *= factor
                mlp.down.weight[:, channel] /= factor

    def loss_of(step: int) -> Tensor:
        x = normal(generator, 128, 32)
        with torch.no_grad():
            y = teacher(x)
        return functional.mse_loss(model(x), y)

    follow(draw, model, optimizer, loss_of, 110, drift)
    onset = next(step for step, share in enumerate(flushed) if share > 0.5)
    return Label(
        cause="bulk_underflow", sites=product_sites(f"layers.{place}.mlp.down"), onset=onset
    )


# --- token outlier --------------------------------------------------------------------------------


def _uninitialised_padding(draw: Draw) -> Label:
    # Padding that nobody filled: now and then a row holds what the memory held. The loss masks it.
    generator = torch.Generator().manual_seed(draw.seed)
    model = Encoder(32, 32, 64, 16, "swiglu", normed=False)
    teacher = Encoder(32, 32, 64, 16, "swiglu", normed=False)
    convert(model, Float8CurrentScaling(), exclude=("head",))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    spikes = torch.rand(250, generator=generator) < 0.2
    spikes[: whole(generator, 20, 60)] = False

    def loss_of(step: int) -> Tensor:
        x = normal(generator, 128, 32)
        with torch.no_grad():
            y = teacher(x)
        padding = whole(generator, 0, 128)
        x[padding] = 0.0
        if spikes[step]:
            x[padding] = draw.between(2.0**15, 2.0**20) * normal(generator, 32)
        keep = torch.arange(128) != padding
        return functional.mse_loss(model(x)[keep], y[keep])

    follow(draw, model, optimizer, loss_of, 250)
    sites = ("encoder:input", "mlp.gate:input", "mlp.up:input", *product_sites("mlp.down"))
    return Label(cause="token_outlier", sites=sites, onset=int(spikes.nonzero()[0]))


def _glitch_byte(draw: Draw) -> Label:
    # A byte whose embedding was never trained down, in the prompt part of some windows, which the
    # loss leaves out. Tiles of 128 x 128: 127 other windows share its scale.
    generator = torch.Generator().manual_seed(draw.seed)
    model = Bytes(8, 16, 192)
    text = stdlib_text()
    glitch = whole(generator, 128, 256)
    with torch.no_grad():
        model.embedding.weight[glitch] = draw.between(2.0**12, 2.0**18) * normal(generator, 16)
    recipe = Float8BlockScaling(x_block_scaling_dim=2, w_block_scaling_dim=1)
    convert(model, recipe, exclude=("head",))
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
    visits = torch.rand(180, generator=generator) < 0.15
    visits[: whole(generator, 15, 50)] = False

    def loss_of(step: int) -> Tensor:
        tokens = text.batch(step, seed=draw.seed, batch=128, context=8)
        tokens[tokens == glitch] = 32
        row, place = whole(generator, 0, 128), whole(generator, 0, 8)
        if visits[step]:
            tokens[row, place] = glitch
        keep = (tokens[:, :8] != glitch).all(dim=1)
        return functional.cross_entropy(model(tokens[:, :8])[keep], tokens[keep, 8])

    follow(draw, model, optimizer, loss_of, 180)
    sites = ("mlp.gate:input", "mlp.up:input", *product_sites("mlp.down"))
    return Label(cause="token_outlier", sites=sites, onset=int(visits.nonzero()[0]))


_CLIPPED_TWICE = "the first step in which an operand was more than twice what its scale could hold"

SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        name="independent-rare-word",
        cause="delayed_saturation",
        title="a residual stack learns a rare word with one gate, which delayed scaling forgets",
        onset=_CLIPPED_TWICE,
        run=_rare_word,
    ),
    Scenario(
        name="independent-rare-sensor",
        cause="delayed_saturation",
        title="GEGLU with SGD learns a sensor that seldom speaks; Gaudi's most recent amax",
        onset=_CLIPPED_TWICE,
        run=_rare_sensor,
    ),
    Scenario(
        name="independent-hot-checkpoint",
        cause="bulk_underflow",
        title="a trained language model with a hot channel goes on under current scaling",
        onset="step 0: the checkpoint has the channel",
        run=_hot_checkpoint,
    ),
    Scenario(
        name="independent-drifting-channel",
        cause="bulk_underflow",
        title="up and down of one channel drift apart until the rest of the product is zero",
        onset="the first step in which most of the product outside the channel becomes zero",
        run=_drifting_channel,
    ),
    Scenario(
        name="independent-uninitialised-padding",
        cause="token_outlier",
        title="a padded row holds garbage now and then, masked in the loss",
        onset="the first step with garbage",
        run=_uninitialised_padding,
    ),
    Scenario(
        name="independent-glitch-byte",
        cause="token_outlier",
        title="a byte with a giant embedding visits some windows; blocks of 128 x 128",
        onset="the first step with the byte",
        run=_glitch_byte,
    ),
)
