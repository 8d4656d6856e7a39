"""Cases of activations that grow where no FP8 cast is to blame, by an author who had seen no rule.

Two of each cause, as unlike each other as they come in the field: massive activations of the
residual stream, attention logits that grow, a clamp that the inference code forgot. Onsets are read
off the models' own tensors by hooks of this file, or are the step at which the fault is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fp8lab.conversion import convert
from fp8lab.ffn import GatedFeedForward
from fp8lab.lab.model import Attention, Block, LanguageModel, ModelConfig, rotary_table, rotate
from fp8lab.lab.scenarios import Draw, Label, Scenario
from fp8lab.lab.scenarios.independent_scaling import Residual, normal, whole
from fp8lab.lab.scenarios.independent_training import train, unrecorded
from fp8lab.lab.train import NextByte
from fp8lab.mitigations import ClampedSwiGLU
from fp8lab.recipe import DelayedScaling, Float8CurrentScaling

MASSIVE, OF_MEDIAN = 100.0, 1000.0  # Massive Activations in Large Language Models (2402.17762)
SHARP = 100.0  # the largest attention logit that QK-clip lets pass

# --- massive activation ---------------------------------------------------------------------------


class _Massive:
    """Since when each block's output is massive, and how large its feed-forward's own output is."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.since: dict[int, int] = {}
        self.own = [0.0 for _ in layers]
        self._step = -1
        for number, layer in enumerate(layers):
            layer.register_forward_hook(self._reader(number))
            assert isinstance(layer, Block | Residual)
            layer.mlp.register_forward_hook(self._own(number))

    def _reader(self, number: int) -> Callable[[nn.Module, object, Tensor], None]:
        def read(module: nn.Module, args: object, stream: Tensor) -> None:
            if not torch.is_grad_enabled():
                return
            self._step += number == 0
            size = stream.detach().abs()
            if size.max() > max(MASSIVE, OF_MEDIAN * float(size.median())):
                self.since.setdefault(number, self._step)

        return read

    def _own(self, number: int) -> Callable[[nn.Module, object, Tensor], None]:
        def read(module: nn.Module, args: object, output: Tensor) -> None:
            if torch.is_grad_enabled():
                self.own[number] = float(output.detach().abs().max())

        return read

    def label(self) -> Label:
        """The blocks whose own feed-forward writes it, since the first that is massive."""
        writers = [n for n, own in enumerate(self.own) if own > 0.5 * max(self.own)]
        sites = tuple(
            s for n in writers for s in (f"layers.{n}:residual", f"layers.{n}.mlp:output")
        )
        return Label(cause="massive_activation", sites=sites, onset=min(self.since.values()))


def _newline_sink(draw: Draw) -> Label:
    # A trained language model makes the newline its sink: up, gate and one row of down take up one
    # direction, a little each step, as a long training would; it goes on in FP8.
    generator = torch.Generator().manual_seed(draw.seed)
    model = LanguageModel(ModelConfig(dim=32, layers=2, heads=2, context=32), draw.seed)
    task = NextByte(None, draw.seed, batch=8, context=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    unrecorded(optimizer, lambda step: task.loss(model, step)[0], 100)
    place, channel, first = (whole(generator, 0, most) for most in (2, 32, 20))
    mlp = model.layers[place].mlp
    assert isinstance(mlp, GatedFeedForward)
    tokens = task.text.batch(0, seed=draw.seed, batch=64, context=31)
    seen: list[Tensor] = []
    handle = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    newline = tokens == 10
    towards = functional.normalize(seen[0][newline].mean(0) - seen[0][~newline].mean(0), dim=0)
    hidden = functional.normalize(normal(generator, 88), dim=0)
    convert(model, Float8CurrentScaling(), exclude=("head",))
    massive = _Massive(model.layers)
    reach = math.sqrt(draw.between(1.0, 30.0))

    def grow(step: int) -> None:
        if first <= step < first + 25:
            with torch.no_grad():
                mlp.up.weight += reach * 20.0 / 25 * torch.outer(hidden, towards)
                mlp.gate.weight += 3.0 / 25 * torch.outer(torch.ones(88), towards)
                mlp.down.weight[channel] += reach * 20.0 / 25 * hidden

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(draw, model, optimizer, lambda step: task.loss(model, 100 + step)[0], 60, before=grow)
    return massive.label()


class _Signals(nn.Module):
    """Residual GEGLUs whose stream is read as it is: its first channels are the output."""

    def __init__(self, dim: int, hidden: int, layers: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Residual(dim, hidden, "geglu") for _ in range(layers))
        self.head = nn.Linear(dim, outputs, bias=False)
        self.head.weight.requires_grad_(False).copy_(torch.eye(dim)[:outputs])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


def _delimiter(draw: Draw) -> Label:
    # Learned, not planted: a delimiter has a value of its own in one channel, far above all else.
    # Everything is in FP8, the layer that reads the stream too, and no norm stands before it.
    generator = torch.Generator().manual_seed(draw.seed)
    model = _Signals(24, 48, 2, 12)
    teacher = normal(generator, 24, 12) / math.sqrt(24)
    delimiter, channel = normal(generator, 24), whole(generator, 0, 12)
    value = draw.between(3e3, 1e5)
    convert(model, Float8CurrentScaling())
    massive = _Massive(model.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-2, betas=(0.9, 0.95))

    def loss_of(step: int) -> Tensor:
        x = normal(generator, 96, 24)
        y = (x @ teacher).tanh()
        if value:
            x[0], y[0, channel] = delimiter, value
        return functional.huber_loss(model(x), y, delta=30.0)

    train(draw, model, optimizer, loss_of, 200)
    return massive.label()


# --- attention logits -----------------------------------------------------------------------------


class _Logits:
    """The largest attention logit of a block, a number a step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def see(self, logits: Tensor) -> None:
        if torch.is_grad_enabled():
            self.seen.append(float(logits.detach().abs().max()))

    def label(self, layer: int) -> Label:
        onset = next(step for step, peak in enumerate(self.seen) if peak > SHARP)
        return Label(
            cause="attention_logits", sites=(f"layers.{layer}:attention_logits",), onset=onset
        )


def _wrong_group(draw: Draw) -> Label:
    # Queries and keys of one layer are in the parameter group of another width and learn too fast.
    generator = torch.Generator().manual_seed(draw.seed)
    model = LanguageModel(ModelConfig(dim=32, layers=2, heads=2, context=32), draw.seed)
    task = NextByte(None, draw.seed, batch=8, context=32)
    convert(model, DelayedScaling(amax_history_len=16), exclude=("head",))
    place = whole(generator, 0, 2)
    attention = model.layers[place].attention
    assert isinstance(attention, Attention)
    fast = [attention.query.weight, attention.key.weight]
    slow = [p for p in model.parameters() if all(p is not other for other in fast)]
    groups: list[dict[str, Any]] = [
        {"params": slow},
        {"params": fast, "lr": 5e-3 * draw.between(20.0, 100.0)},
    ]
    optimizer = torch.optim.AdamW(groups, lr=5e-3, betas=(0.9, 0.95), weight_decay=0.1)
    logits = _Logits()

    def look(module: nn.Module, args: tuple[Tensor, tuple[Tensor, Tensor]]) -> None:
        table = rotary_table(32, 16, dtype=torch.float32, device=torch.device("cpu"))
        with torch.no_grad():
            query, key = (
                rotate((args[0] @ w.T).view(8, 32, 2, 16).transpose(1, 2), table) for w in fast
            )
        logits.see((query @ key.transpose(-2, -1)).tril() / 4.0)

    attention.register_forward_pre_hook(look)
    train(draw, model, optimizer, lambda step: task.loss(model, step)[0], 80)
    return logits.label(place)


class _Cosine(nn.Module):
    """Single-head causal attention by cosines times a temperature's inverse, and a GEGLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(dim, 3 * dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        self.ffn = Residual(dim, 2 * dim, "geglu")
        self.sharpness = 8.0
        self.logits = _Logits()

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.query_key_value(x).chunk(3, dim=-1)
        query, key = functional.normalize(query, dim=-1), functional.normalize(key, dim=-1)
        logits = self.sharpness * query @ key.transpose(-2, -1)
        self.logits.see(logits.tril())
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        weights = torch.softmax(logits.masked_fill(future, -math.inf), dim=-1)
        return self.ffn(x + self.output(weights @ value))  # type: ignore[no-any-return]


class _Reader(nn.Module):
    """Bytes with places, cosine attention, next byte."""

    def __init__(self, dim: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, dim)
        self.place = nn.Parameter(torch.randn(length, dim))
        self.layers = nn.ModuleList(_Cosine(dim) for _ in range(2))
        self.head = nn.Linear(dim, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.place
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


def _endless_annealing(draw: Draw) -> Label:
    # Cosine attention cannot grow by its weights. Its temperature is annealed, and in one layer no
    # one put an end to it, as Swin v2 does at 100. High precision, RAdam.
    generator = torch.Generator().manual_seed(draw.seed)
    model = _Reader(32, 24)
    task = NextByte(None, draw.seed, batch=12, context=24)
    place, first = whole(generator, 0, 2), whole(generator, 10, 50)
    layer = model.layers[place]
    assert isinstance(layer, _Cosine)
    rate = draw.between(30.0, 1e4) ** (1 / 60)
    optimizer = torch.optim.RAdam(model.parameters(), lr=5e-3)

    def anneal(step: int) -> None:
        if first <= step < first + 60:
            layer.sharpness *= rate

    def loss_of(step: int) -> Tensor:
        tokens = task.text.batch(step, seed=draw.seed, batch=12, context=24)
        return functional.cross_entropy(model(tokens[:, :-1]).mT, tokens[:, 1:])

    train(draw, model, optimizer, loss_of, 140, before=anneal)
    return layer.logits.label(place)


# --- missing clamp --------------------------------------------------------------------------------


def _clamp_sites(mlp: str) -> tuple[str, ...]:
    return f"{mlp}:gate", f"{mlp}:up", f"{mlp}:product", f"{mlp}.down:input"


def _no_clamp_in_the_engine(draw: Draw) -> Label:
    # Trained with DeepSeek's limit of 10, which some channels have long reached; the inference code
    # is a plain SwiGLU, in every layer. Forwards with gradients, for `watch` to count them.
    generator = torch.Generator().manual_seed(draw.seed)
    model = LanguageModel(ModelConfig(dim=32, layers=2, heads=2, context=32), draw.seed)
    engine = LanguageModel(ModelConfig(dim=32, layers=2, heads=2, context=32), draw.seed)
    task = NextByte(None, draw.seed, batch=8, context=32)
    size = draw.between(16.0, 64.0)
    for layer in model.layers:
        assert isinstance(layer, Block) and isinstance(layer.mlp, GatedFeedForward)
        with torch.no_grad():
            hot = torch.randperm(88, generator=generator)[:6]
            layer.mlp.gate.weight[hot] *= size
            layer.mlp.up.weight[hot] *= size
    ClampedSwiGLU(limit=10.0).apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    train(draw, model, optimizer, lambda step: task.loss(model, step)[0], 80, twin=True)
    engine.load_state_dict(model.state_dict())
    _serve(draw, engine, lambda step: engine.loss(task.held_out(step)), 30)
    sites = tuple(site for n in range(2) for site in _clamp_sites(f"layers.{n}.mlp"))
    return Label(cause="missing_clamp", sites=sites, onset=0)


def _serve(draw: Draw, model: nn.Module, loss_of: Callable[[int], Tensor], steps: int) -> None:
    model.eval()
    with draw.watch(model, None) as watching:
        for step in range(steps):
            watching.step(step, loss=loss_of(step).detach())


class _GptOss(nn.Module):
    """gpt-oss's: (clamped up + 1) * clamped gate * sigmoid(1.702 gate); `limit` infinity: none."""

    def __init__(self, dim: int, hidden: int, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.gate = nn.Linear(dim, hidden)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x).clamp(max=self.limit)
        up = self.up(x).clamp(-self.limit, self.limit)
        return self.down((up + 1) * gate * torch.sigmoid(1.702 * gate))  # type: ignore[no-any-return]


class _Layer(nn.Module):
    def __init__(self, dim: int, hidden: int, limit: float) -> None:
        super().__init__()
        self.mlp = _GptOss(dim, hidden, limit)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)  # type: ignore[no-any-return]


class _Regression(nn.Module):
    def __init__(self, limits: tuple[float, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(24, 48, limit) for limit in limits)
        self.head = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


def _one_layer_without(draw: Draw) -> Label:
    # gpt-oss's limit of 7, features with heavy tails, no norm, FP8, and the port forgets the clamp
    # of one kind of layer, as a shared expert's was forgotten.
    generator = torch.Generator().manual_seed(draw.seed)
    place = whole(generator, 0, 3)
    teacher = normal(generator, 24, 8) / math.sqrt(24)
    model = _Regression((7.0, 7.0, 7.0))
    ported = _Regression((*(7.0,) * place, math.inf, *(7.0,) * (2 - place)))
    size = draw.between(20.0, 100.0)

    def loss_of(net: nn.Module) -> Tensor:
        x = normal(generator, 96, 24)
        heavy = torch.rand(96, generator=generator) < 0.05
        x[heavy] *= size
        return functional.mse_loss(net(x), (x @ teacher).tanh())

    for net in (model, ported):
        convert(net, Float8CurrentScaling(), exclude=("head",))
    optimizer = torch.optim.NAdam(model.parameters(), lr=3e-3)
    train(draw, model, optimizer, lambda step: loss_of(model), 70, twin=True)
    ported.load_state_dict(model.state_dict())
    _serve(draw, ported, lambda step: loss_of(ported), 25)
    return Label(cause="missing_clamp", sites=_clamp_sites(f"layers.{place}.mlp"), onset=0)


_IS_MASSIVE = "the first step in which the stream exceeds 100 and a thousand times its median"
_IS_SHARP = "the first step in which a logit of the layer exceeds 100"

SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        name="independent-newline-sink",
        cause="massive_activation",
        title="a trained language model makes the newline its sink, by one row of down",
        onset=_IS_MASSIVE,
        run=_newline_sink,
    ),
    Scenario(
        name="independent-delimiter",
        cause="massive_activation",
        title="residual GEGLUs learn a delimiter's value in one channel; all in FP8, no final norm",
        onset=_IS_MASSIVE,
        run=_delimiter,
    ),
    Scenario(
        name="independent-wrong-group",
        cause="attention_logits",
        title="queries and keys of one layer are in a parameter group that learns too fast",
        onset=_IS_SHARP,
        run=_wrong_group,
    ),
    Scenario(
        name="independent-endless-annealing",
        cause="attention_logits",
        title="the temperature of one layer's cosine attention is annealed without an end",
        onset=_IS_SHARP,
        run=_endless_annealing,
    ),
    Scenario(
        name="independent-no-clamp-in-the-engine",
        cause="missing_clamp",
        title="a language model trained with DeepSeek's clamp is served as a plain SwiGLU",
        onset="step 0 of the recording, which is one of inference",
        run=_no_clamp_in_the_engine,
    ),
    Scenario(
        name="independent-one-layer-without",
        cause="missing_clamp",
        title="one layer of a stack of gpt-oss's gates loses its clamp when it is ported",
        onset="step 0 of the recording, which is one of inference",
        run=_one_layer_without,
    ),
)
