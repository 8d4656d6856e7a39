"""Scenarios of a scale that does not fit what it scales: one token, another time, no time yet.

`rare_spike` and `rare_feature`: single steps in which one token is far larger than all others under
a scale made just in time; it enters with the data, or a feed-forward makes it of a rare feature.
`history_too_long`: after one large batch, or after a reparametrisation that makes weights small,
the delayed scale is still that of before. `history_too_short`: batches that come now and then are
larger, and each time the history has forgotten them. `cold_start` and `resume_without_state`: the
scale is 1 because nothing has been measured yet, or because a checkpoint was loaded without it.

All are regressions of a small stack of gated feed-forwards on a teacher of its own shape. A batch
whose loss is not to be learnt from is left out, as padding is and as a loss scaler skips a step:
what is told in FP8 then is the scale's doing alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fp8lab.conversion import convert
from fp8lab.formats import E4M3
from fp8lab.lab.scenarios import Draw, Label, Scenario
from fp8lab.lab.scenarios.gate import ONE_OCTAVE, Stack
from fp8lab.linear import Fp8Linear
from fp8lab.recipe import DelayedScaling, Float8CurrentScaling, Recipe

STEPS = 60
TOKENS = 64


class Trial:
    """A stack, its teacher and its optimizer, and what the casts of its inputs and weights did."""

    def __init__(self, rng: random.Random, recipe: Recipe, *, whole: tuple[int, ...] = ()) -> None:
        self.dim, hidden = rng.choice([24, 32]), rng.choice([48, 64])
        self.layers = rng.choice([1, 2])
        variant = rng.choice(["swiglu", "geglu"])
        self.model = Stack(self.dim, hidden, self.layers, variant=variant, whole=whole)
        self.teacher = Stack(self.dim, hidden, self.layers, variant=variant, whole=whole)
        self.teacher.requires_grad_(False)
        convert(self.model, recipe)
        self.rng = rng
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(self.model.parameters(), lr=0.05)
            if rng.random() < 0.5
            else torch.optim.Adam(self.model.parameters(), lr=2e-3)
        )
        self.step = -1
        self.flushed: dict[str, list[int]] = {}
        self.clipped: dict[str, list[int]] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, Fp8Linear):
                module.register_forward_pre_hook(self._look(name, module))

    def _look(self, name: str, linear: Fp8Linear) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            for index, operand, tensor in ((0, "input", args[0]), (1, "weight", linear.weight)):
                tensor = tensor.detach()
                scale = E4M3.max / tensor.abs().amax()
                if isinstance(linear.recipes["input"], DelayedScaling):
                    scale = linear.scale[index]
                scaled = tensor * scale
                zero = scaled.to(torch.float8_e4m3fn).float() == 0
                if float((zero & (tensor != 0)).sum()) > 0.5 * float((tensor != 0).sum()):
                    self.flushed.setdefault(f"{name}:{operand}", []).append(self.step)
                if float(scaled.abs().amax()) > ONE_OCTAVE * E4M3.max:
                    self.clipped.setdefault(f"{name}:{operand}", []).append(self.step)

        return look

    def batch(self, step: int) -> Tensor:
        """float32 [64, dim], a function of the step."""
        return torch.randn(TOKENS, self.dim, generator=torch.Generator().manual_seed(step))

    def train(self, loss: Tensor, *, learn: bool = True) -> None:
        """One step of the optimizer, unless the step is skipped."""
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if not learn:
            self.optimizer.zero_grad(set_to_none=False)
        self.optimizer.step()

    def sites(self, steps: dict[str, list[int]], onset: int | None) -> tuple[str, ...]:
        """Where it happened at the onset, products under both of their names."""
        found = [site for site, when in steps.items() if onset in when]
        products = [s.replace(".down:input", ":product") for s in found if "down:input" in s]
        return tuple(found + products)


def _first(steps: dict[str, list[int]], since: int = 0) -> int | None:
    return min((s for when in steps.values() for s in when if s >= since), default=None)


def _errors(trial: Trial, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = trial.teacher(x)
    errors: Tensor = (trial.model(x) - target).square().sum(-1)
    return errors


def rare_spike(draw: Draw) -> Label:
    """The dial is how much larger the token is: 2^18 to 2^26 times. It is not learnt from."""
    rng = random.Random(draw.seed)
    trial = Trial(rng, Float8CurrentScaling())
    start, gap = rng.randint(8, 25), rng.randint(6, 14)
    size, token = draw.between(2.0**18, 2.0**26), rng.randrange(TOKENS)
    common = torch.arange(TOKENS) != token
    with draw.watch(trial.model, trial.optimizer) as watching:
        for trial.step in range(STEPS):
            x = trial.batch(trial.step)
            if trial.step >= start and (trial.step - start) % gap == 0:
                x[token] *= size
            loss = _errors(trial, x)[common].mean()
            trial.train(loss)
            watching.step(trial.step, loss=loss)
    onset = _first(trial.flushed, start)
    return Label(cause="token_outlier", sites=trial.sites(trial.flushed, onset), onset=onset)


def rare_feature(draw: Draw) -> Label:
    """The last input says that a token is rare; one channel answers to nothing else, and nothing
    answers to the channel. The dial is how large it becomes: 2^18 to 2^24."""
    rng = random.Random(draw.seed)
    trial = Trial(rng, Float8CurrentScaling())
    layer = rng.randrange(trial.layers)
    mlp, channel = trial.model.mlp(layer), rng.randrange(48)
    size = draw.between(2.0**18, 2.0**24)
    with torch.no_grad():
        for index in range(trial.layers):
            for side in (trial.model.mlp(index), trial.teacher.mlp(index)):
                side.gate.weight[:, -1], side.up.weight[:, -1] = 0.0, 0.0
                side.down.weight[-1] = 0.0
        for weight in (mlp.gate.weight, mlp.up.weight):
            weight[channel] = 0.0
            weight[channel, -1] = 1.0
        mlp.down.weight[:, channel] = 0.0
    for index in range(trial.layers):
        side = trial.model.mlp(index)
        _freeze(side.down.weight, 0, trial.dim - 1)
        for linear in (side.gate, side.up):
            _freeze(linear.weight, 1, trial.dim - 1)
            if index == layer:
                _freeze(linear.weight, 0, channel)
    _freeze(mlp.down.weight, 1, channel)
    start, gap, token = rng.randint(8, 25), rng.randint(6, 14), rng.randrange(TOKENS)
    with draw.watch(trial.model, trial.optimizer) as watching:
        for trial.step in range(STEPS):
            x = trial.batch(trial.step)
            x[:, -1] = 0.0
            if trial.step >= start and (trial.step - start) % gap == 0:
                x[token, -1] = size**0.5
            errors = _errors(trial, x)
            loss = errors[torch.arange(TOKENS) != token].mean()
            trial.train(loss)
            watching.step(trial.step, loss=loss)
    site = f"layers.{layer}.mlp.down:input"
    onset = _first({site: trial.flushed.get(site, [])}, start)
    sites = (site, f"layers.{layer}.mlp:product")
    return Label(cause="token_outlier", sites=sites, onset=onset)


def _freeze(weight: Tensor, dim: int, line: int) -> None:
    def without(gradient: Tensor) -> Tensor:
        return gradient.index_fill(dim, torch.tensor([line]), 0.0)

    weight.register_hook(without)  # type: ignore[no-untyped-call]


def history_too_long(draw: Draw) -> Label:
    """One batch is 2^18 to 2^24 times larger and its step is skipped; or, with odd seeds, the
    weights of up become smaller by as much and those of down larger, once."""
    rng = random.Random(draw.seed)
    recipe = DelayedScaling(amax_history_len=rng.choice([24, 64, 1024]))
    trial = Trial(rng, recipe)
    jump, factor = rng.randint(8, 30), 2.0 ** round(18 + 6 * draw.strength)
    layer = rng.randrange(trial.layers)
    with draw.watch(trial.model, trial.optimizer) as watching:
        for trial.step in range(STEPS):
            x, is_large = trial.batch(trial.step), trial.step == jump and draw.seed % 2 == 0
            if is_large:
                x *= factor
            if trial.step == jump and draw.seed % 2:
                with torch.no_grad():
                    trial.model.mlp(layer).up.weight /= factor
                trial.model.mlp(layer).down.weight.requires_grad_(False).mul_(factor)
                trial.model.mlp(layer).up.weight.requires_grad_(False)
            errors = _errors(trial, x)
            loss = (errors / factor**2 if is_large else errors).mean()
            trial.train(loss, learn=not is_large)
            watching.step(trial.step, loss=loss)
    onset = _first(trial.flushed, jump)
    return Label(cause="stale_scale", sites=trial.sites(trial.flushed, onset), onset=onset)


def history_too_short(draw: Draw) -> Label:
    """Every so often a batch is 2^3 to 2^7 times larger, and is learnt relative to its size."""
    rng = random.Random(draw.seed)
    history = rng.choice([1, 2, 4])
    trial = Trial(rng, DelayedScaling(amax_history_len=history))
    start, gap = rng.randint(5, 15), history + rng.randint(3, 8)
    size = draw.between(2.0**3, 2.0**7)
    with draw.watch(trial.model, trial.optimizer) as watching:
        for trial.step in range(STEPS):
            x = trial.batch(trial.step)
            is_large = trial.step >= start and (trial.step - start) % gap == 0
            if is_large:
                x *= size
            with torch.no_grad():
                power = trial.teacher(x).square().sum(-1).mean() / trial.dim
            loss = _errors(trial, x).mean() / power
            trial.train(loss)
            watching.step(trial.step, loss=loss)
    onset = _first(trial.clipped, start)
    return Label(cause="stale_scale", sites=trial.sites(trial.clipped, onset), onset=onset)


def cold_start(draw: Draw) -> Label:
    """Features in raw units: 2^12 to 2^18 times larger than one, or with odd seeds smaller; the
    first layer's weights are so much smaller, or larger."""
    rng = random.Random(draw.seed)
    trial = Trial(rng, DelayedScaling(amax_history_len=rng.choice([4, 16, 1024])), whole=(0,))
    size = draw.between(2.0**12, 2.0**18) ** (-1 if draw.seed % 2 else 1)
    with torch.no_grad():
        for side in (trial.model, trial.teacher):
            for linear in (side.mlp(0).gate, side.mlp(0).up):
                linear.weight /= size
    small = [trial.model.mlp(0).gate.weight, trial.model.mlp(0).up.weight]
    others = [p for p in trial.model.parameters() if all(p is not weight for weight in small)]
    groups = [{"params": small, "lr": 2e-3 / size}, {"params": others, "lr": 2e-3}]
    trial.optimizer = torch.optim.Adam(groups, eps=0.0 if size < 1 else 1e-12)
    with draw.watch(trial.model, trial.optimizer) as watching:
        for trial.step in range(STEPS):
            loss = _errors(trial, trial.batch(trial.step) * size).mean()
            trial.train(loss)
            watching.step(trial.step, loss=loss)
    sites = trial.sites(trial.flushed, 0) + trial.sites(trial.clipped, 0)
    return Label(cause="cold_start", sites=sites, onset=0)


def resume_without_state(draw: Draw) -> Label:
    """A checkpoint is loaded in which the FP8 state is missing: histories are empty and scales 1,
    where activations are in the tens of thousands. Recorded from the sixth step on."""
    rng = random.Random(draw.seed)
    trial = Trial(rng, DelayedScaling(amax_history_len=rng.choice([4, 16, 64])), whole=(0,))
    size, resumed = draw.between(2.0**12, 2.0**18), rng.randint(15, 45)
    with torch.no_grad():
        for side in (trial.model, trial.teacher):
            side.mlp(0).up.weight *= size
            side.mlp(0).down.weight /= size
    trial.model.mlp(0).up.weight.requires_grad_(False)
    trial.model.mlp(0).down.weight.requires_grad_(False)
    for _ in range(5):
        trial.train(_errors(trial, trial.batch(10_000)).mean())
    with draw.watch(trial.model, trial.optimizer) as watching:
        for trial.step in range(STEPS):
            if trial.step == resumed:
                state = trial.model.state_dict()
                kept = {k: v for k, v in state.items() if not k.endswith(("amax_history", "scale"))}
                trial.model.load_state_dict(kept)
            loss = _errors(trial, trial.batch(trial.step)).mean()
            trial.train(loss)
            watching.step(trial.step, loss=loss)
    sites = trial.sites(trial.clipped, resumed) + trial.sites(trial.flushed, resumed)
    return Label(cause="cold_start", sites=sites, onset=resumed)


_FLUSHED = "the first step in which the majority of an operand's non-zero values becomes zero"
_CLIPPED = "the first step in which an operand is more than an octave beyond its scale"

SCENARIOS = (
    Scenario(
        name="rare_spike",
        cause="token_outlier",
        title="A token from the data that is far larger than the others, now and then",
        onset=_FLUSHED,
        run=rare_spike,
    ),
    Scenario(
        name="rare_feature",
        cause="token_outlier",
        title="A rare feature of which a gated feed-forward makes a spike, now and then",
        onset=_FLUSHED,
        run=rare_feature,
    ),
    Scenario(
        name="history_too_long",
        cause="stale_scale",
        title="A long history keeps the scale of one large batch, or of weights that were larger",
        onset=_FLUSHED,
        run=history_too_long,
    ),
    Scenario(
        name="history_too_short",
        cause="stale_scale",
        title="A short history forgets batches that come back",
        onset=_CLIPPED,
        run=history_too_short,
    ),
    Scenario(
        name="cold_start",
        cause="cold_start",
        title="Features in raw units meet a scale of 1",
        onset="the first step",
        run=cold_start,
    ),
    Scenario(
        name="resume_without_state",
        cause="cold_start",
        title="A run goes on from a checkpoint without the FP8 state",
        onset="the step at which it goes on",
        run=resume_without_state,
    ),
)
