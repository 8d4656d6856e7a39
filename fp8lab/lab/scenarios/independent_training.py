"""Cases of a training that fails at any precision, by an author who had seen no rule.

Two of each cause, as unlike each other as they come in the field: output logits that drift, Adam's
second moment behind the gradient, a learning rate too high, one corrupt batch. Each fault has one
size, `Draw.between`, so that the same training without it is one number away. Onsets are the steps
at which the fault is injected, or read off the training's own losses and logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from fp8lab.conversion import convert
from fp8lab.lab.model import LanguageModel, ModelConfig
from fp8lab.lab.scenarios import Draw, Label, Scenario
from fp8lab.lab.scenarios.independent_scaling import Encoder, Stack, normal, whole
from fp8lab.lab.train import NextByte
from fp8lab.plan import Plan
from fp8lab.recipe import DelayedScaling, Float8CurrentScaling, MXFP8BlockScaling

LARGE_LOGIT = 50.0  # a difference of 20 decides everything; beyond 50 all is offset


def train(
    draw: Draw,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[int], Tensor],
    steps: int,
    *,
    before: Callable[[int], None] = lambda step: None,
    weight: Callable[[int], float] = lambda step: 1.0,
    plan: Plan | None = None,
    twin: bool = False,
) -> list[float]:
    """The training, recorded; its losses. What is differentiated is `weight` times the loss."""
    losses: list[float] = []
    with draw.watch(model, optimizer, plan=plan, twin=twin) as watching:
        for step in range(steps):
            before(step)
            loss = loss_of(step)
            optimizer.zero_grad()
            (weight(step) * loss).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            watching.step(step, loss=loss)
            losses.append(float(loss.detach()))
    return losses


def unrecorded(
    optimizer: torch.optim.Optimizer, loss_of: Callable[[int], Tensor], steps: int
) -> None:
    """What was trained before anyone watched."""
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(step).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def small_llama(draw: Draw, layers: int = 1) -> tuple[LanguageModel, Callable[[int], Tensor]]:
    """A language model of dim 32 and its loss on the text of a step."""
    model = LanguageModel(ModelConfig(dim=32, layers=layers, heads=2, context=32), draw.seed)
    task = NextByte(None, draw.seed, batch=8, context=32)
    return model, lambda step: task.loss(model, step)[0]


# --- output logits --------------------------------------------------------------------------------


def _to_bfloat16(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output.bfloat16().float()


class _Peaks:
    """The largest magnitude of the logits, a number a step."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[float] = []
        model.register_forward_hook(self._see)

    def _see(self, module: nn.Module, args: object, logits: Tensor) -> None:
        if torch.is_grad_enabled():
            self.seen.append(float(logits.detach().abs().max()))

    def label(self) -> Label:
        onset = next(step for step, peak in enumerate(self.seen) if peak > LARGE_LOGIT)
        return Label(cause="output_logits", onset=onset)


def _z_loss_of_the_wrong_sign(draw: Draw) -> Label:
    # The fused cross-entropy adds the z-loss in its backward, and someone turned its sign: the
    # logits' normaliser is driven away from zero, and the head writes BF16. The loss does not say.
    model, loss_of = small_llama(draw)
    convert(model, Float8CurrentScaling(), exclude=("head",))
    model.head.register_forward_hook(_to_bfloat16)
    peaks = _Peaks(model)
    coefficient = draw.between(0.01, 0.05)

    def add_z_loss(module: nn.Module, args: object, logits: Tensor) -> None:
        if not logits.requires_grad:
            return
        z = logits.detach().logsumexp(-1, keepdim=True)
        share = logits.detach().softmax(-1) / z.numel()
        logits.register_hook(lambda gradient: gradient - 2 * coefficient * z * share)  # type: ignore[no-untyped-call]

    model.head.register_forward_hook(add_z_loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-2, weight_decay=0.0)
    train(draw, model, optimizer, loss_of, 100)
    return peaks.label()


def _rounded_one_way(draw: Draw) -> Label:
    # The softmax does not feel a common offset of its logits; the head's bias is kept in a format
    # that rounds one way, and so it wanders, faster the farther it is. SGD, a classifier, BF16.
    generator = torch.Generator().manual_seed(draw.seed)
    model = Encoder(24, 32, 64, 12, "geglu", normed=True)
    teacher = normal(generator, 24, 12)
    first, sign = whole(generator, 10, 60), 2.0 * whole(generator, 0, 2) - 1.0
    model.head.register_forward_hook(_to_bfloat16)
    peaks = _Peaks(model)
    wander = draw.between(6.0, 40.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def drift(step: int) -> None:
        if step >= first:
            with torch.no_grad():
                model.head.bias.add_(sign * wander)

    def loss_of(step: int) -> Tensor:
        x = normal(generator, 128, 24)
        return functional.cross_entropy(model(x), (x @ teacher).argmax(-1))

    train(draw, model, optimizer, loss_of, 200, before=drift)
    return peaks.label()


# --- second moment lag ----------------------------------------------------------------------------


def _sum_for_mean(draw: Draw) -> Label:
    # Resumed with Adam's state, but the loss is now divided by another number of tokens: gradients
    # are so many times larger from one step to the next, which Adam would not feel but for its lag.
    model, loss_of = small_llama(draw)
    generator = torch.Generator().manual_seed(draw.seed)
    convert(model, DelayedScaling(amax_history_len=16), exclude=("head",))
    resumed, factor = whole(generator, 15, 40), draw.between(32.0, 512.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.1)
    unrecorded(optimizer, loss_of, 250)
    train(
        *(draw, model, optimizer, lambda step: loss_of(250 + step), 80),
        weight=lambda step: factor if step >= resumed else 1.0,
    )
    return Label(cause="second_moment_lag", onset=resumed)


def _second_head(draw: Draw) -> Label:
    # The weight of a second task goes up at once and not slowly: for its head and what feeds it
    # the second moment is that of a task that hardly counted. NAdam with a long memory, no text.
    generator = torch.Generator().manual_seed(draw.seed)
    model = Stack(24, 64, 2, 16)
    first_teacher, second_teacher = normal(generator, 24, 8), normal(generator, 24, 8)
    joined, least = whole(generator, 20, 60), 1.0 / draw.between(100.0, 10_000.0)
    optimizer = torch.optim.NAdam(model.parameters(), lr=1e-2, betas=(0.9, 0.9995))

    def loss_of(step: int) -> Tensor:
        x = normal(generator, 96, 24)
        y = model(x)
        first = functional.mse_loss(y[:, :8], (x @ first_teacher).tanh())
        second = functional.mse_loss(y[:, 8:], x @ second_teacher)
        return first + (1.0 if step >= joined else least) * second

    unrecorded(optimizer, lambda _: loss_of(0), 300)
    train(draw, model, optimizer, loss_of, 120)
    return Label(cause="second_moment_lag", onset=joined)


# --- learning rate --------------------------------------------------------------------------------


def _set(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _wrong_restart(draw: Draw) -> Label:
    # A schedule restarts with the rate of a far smaller model; in FP32 it fails in the same way.
    generator = torch.Generator().manual_seed(draw.seed)
    restart, peak = whole(generator, 25, 40), 3e-3 * draw.between(60.0, 300.0)
    for twin in (False, True):
        model, loss_of = small_llama(draw)
        if not twin:
            convert(model, Float8CurrentScaling(), exclude=("head",))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))

        def schedule(step: int, optimizer: torch.optim.Optimizer = optimizer) -> None:
            _set(optimizer, peak if step >= restart else 3e-3)

        train(draw, model, optimizer, loss_of, 60, before=schedule, twin=twin)
    return Label(cause="learning_rate", onset=restart)


def _warm_up_too_far(draw: Draw) -> Label:
    # SGD, gradients clipped: the warm-up goes on past the edge of stability. MXFP8, and FP32 too.
    losses: list[float] = []
    peak = draw.between(25.0, 60.0)
    for twin in (True, False):
        generator = torch.Generator().manual_seed(draw.seed)
        torch.manual_seed(draw.seed)
        model = Stack(24, 48, 2, 24)
        teacher = normal(generator, 24, 24) / math.sqrt(24)
        if not twin:
            convert(model, MXFP8BlockScaling(), exclude=("head",))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

        def clip(*_: object, model: nn.Module = model) -> None:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)

        def loss_of(
            step: int,
            model: nn.Module = model,
            teacher: Tensor = teacher,
            generator: torch.Generator = generator,
        ) -> Tensor:
            x = normal(generator, 64, 24)
            return functional.mse_loss(model(x), x @ teacher)

        def warm_up(step: int, optimizer: torch.optim.Optimizer = optimizer) -> None:
            _set(optimizer, peak * (step + 1) / 100)

        optimizer.register_step_pre_hook(clip)
        losses = train(draw, model, optimizer, loss_of, 100, before=warm_up, twin=twin)
    onset = next(s for s in range(1, 100) if losses[s] > 2.0 * min(losses[:s]))
    return Label(cause="learning_rate", onset=onset)


# --- corrupt batch --------------------------------------------------------------------------------


def _binary_file(draw: Draw) -> Label:
    # A compressed file among the sources: most windows of one batch are bytes without a meaning.
    generator = torch.Generator().manual_seed(draw.seed)
    model = LanguageModel(ModelConfig(dim=32, layers=1, heads=2, context=32), draw.seed)
    task = NextByte(None, draw.seed, batch=8, context=32)
    convert(model, DelayedScaling(amax_history_len=16), exclude=("head",))
    bad, windows = whole(generator, 40, 90), round(draw.between(4.0, 8.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)

    def loss_of(step: int) -> Tensor:
        tokens = task.text.batch(step, seed=draw.seed, batch=8, context=32)
        if step == bad:
            tokens[:windows] = torch.randint(0, 256, (windows, 33), generator=generator)
        return model.loss(tokens)

    train(draw, model, optimizer, loss_of, 110)
    return Label(cause="corrupt_batch", onset=bad)


def _wrong_unit(draw: Draw) -> Label:
    # One file has its outcomes in another unit. Adagrad never forgets the gradient of that batch.
    generator = torch.Generator().manual_seed(draw.seed)
    model = Encoder(24, 32, 64, 8, "swiglu", normed=True)
    teacher = normal(generator, 24, 8) / math.sqrt(24)
    bad, unit = whole(generator, 60, 140), draw.between(30.0, 1000.0)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)

    def loss_of(step: int) -> Tensor:
        x = normal(generator, 96, 24)
        y = (x @ teacher).tanh()
        return functional.mse_loss(model(x), y * unit if step == bad else y)

    train(draw, model, optimizer, loss_of, 200)
    return Label(cause="corrupt_batch", onset=bad)


_LARGE = "the first step in which a logit is larger than 50 in magnitude"

SCENARIOS: tuple[Scenario, ...] = (
    Scenario(
        name="independent-z-loss-sign",
        cause="output_logits",
        title="the z-loss in a fused backward has the wrong sign; a BF16 head",
        onset=_LARGE,
        run=_z_loss_of_the_wrong_sign,
    ),
    Scenario(
        name="independent-rounded-one-way",
        cause="output_logits",
        title="the bias of a classifier's head wanders for all classes together; SGD",
        onset=_LARGE,
        run=_rounded_one_way,
    ),
    Scenario(
        name="independent-sum-for-mean",
        cause="second_moment_lag",
        title="resumed with Adam's state and gradients that are many times larger",
        onset="the first step with the larger gradients",
        run=_sum_for_mean,
    ),
    Scenario(
        name="independent-second-head",
        cause="second_moment_lag",
        title="a second task begins to count from one step to the next; NAdam with a long memory",
        onset="the first step in which the second task counts",
        run=_second_head,
    ),
    Scenario(
        name="independent-wrong-restart",
        cause="learning_rate",
        title="a schedule restarts at a rate far too high, in FP8 and in FP32",
        onset="the step of the restart",
        run=_wrong_restart,
    ),
    Scenario(
        name="independent-warm-up-too-far",
        cause="learning_rate",
        title="SGD with clipped gradients is warmed up past what is stable, in MXFP8 and in FP32",
        onset="the first step whose loss is more than twice the lowest before it",
        run=_warm_up_too_far,
    ),
    Scenario(
        name="independent-binary-file",
        cause="corrupt_batch",
        title="one batch of a language model is a compressed file",
        onset="the step of the batch",
        run=_binary_file,
    ),
    Scenario(
        name="independent-wrong-unit",
        cause="corrupt_batch",
        title="one batch has its targets in another unit; Adagrad",
        onset="the step of the batch",
        run=_wrong_unit,
    ),
)
