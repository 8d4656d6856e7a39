"""What watching costs: tables for `make bench`, beside what others cost in the same run."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench_ratio import Row, Work, decided, ratio
from torch import nn

import fp8lab
from fp8lab import GatedFeedForward, Selection
from fp8lab.monitor import probes

WIDTH, HIDDEN, LAYERS, TOKENS = 256, 688, 6, 1024

GRADIENTS = Selection(tensors=("grad_gate", "grad_up", "grad_product", "grad_output"), freq=1)
WEIGHTS = Selection(layers=("*.gate", "*.up", "*.down"), tensors=("weight", "grad_weight"), freq=1)
MOMENTS = Selection(layers=WEIGHTS.layers, tensors=("exp_avg", "exp_avg_sq"), freq=1)
WHAT_IFS = Selection(
    tensors=("product",),
    statistics=("fp8_current_scaling_underflows%", "mxfp8_underflows%", "mxfp8_mse"),
    freq=1,
)


class Training:
    """Steps of a stack of SwiGLU feed-forwards, with or without an optimizer."""

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self, width: int = WIDTH, layers: int = LAYERS, tokens: int = TOKENS, adam: bool = False
    ) -> None:
        torch.manual_seed(0)
        hidden = width * HIDDEN // WIDTH
        self.model = nn.Sequential(*(GatedFeedForward(width, hidden) for _ in range(layers)))
        self.x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0) if adam else None

    def twin(self) -> Training:
        """Other modules with the same parameters and input: where tensors lie in memory makes a
        per cent, and would be taken for the cost of watching."""
        twin = copy.copy(self)
        same = {id(parameter): parameter for parameter in self.model.parameters()}
        twin.model = copy.deepcopy(self.model, same)
        if self.optimizer is not None:
            twin.optimizer = torch.optim.AdamW(twin.model.parameters(), lr=0.0)
        return twin

    def step(self) -> torch.Tensor:
        self.model.zero_grad(set_to_none=True)
        loss = self.model(self.x).square().mean()
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        return loss


@contextlib.contextmanager
def watched(
    training: Training, steps: int = 1, guarded: bool = False, **options: Any
) -> Iterator[Work]:
    """So many steps of a training that is watched."""
    with tempfile.TemporaryDirectory() as folder:
        path, number = Path(folder) / "run", iter(range(1_000_000))
        with fp8lab.watch(
            training.model, path, optimizer=training.optimizer, **options
        ) as watching:
            if guarded:
                fp8lab.Guard(watching)

            def work() -> None:
                for _ in range(steps):
                    loss = training.step()
                    watching.step(next(number), loss=loss)

            yield work


def no_idle_core() -> Any:
    """Measuring waits its turn, as on a machine whose cores are all at work."""
    return mock.patch.object(probes, "has_idle_core", return_value=False)


def steps_of(training: Training, steps: int = 1) -> Work:
    def work() -> None:
        for _ in range(steps):
            training.step()

    return work


def watching_rows() -> Iterator[Row]:
    """Six SwiGLU feed-forwards 256/688, 1024 tokens, forward and backward: watched / unwatched; \
95 % confidence"""
    plain, adam = Training(), Training(adam=True)
    yield Row("nothing (noise)", decided(steps_of(plain.twin()), steps_of(plain), 1.0, 31, 31))
    with watched(plain.twin(), every=1) as work:
        yield Row(
            "all statistics of gate, up and product, every step",
            decided(work, steps_of(plain), 1.08),
            "≤ 1.08",
        )
    with watched(plain.twin(), every=1) as work, no_idle_core():
        yield Row("the same where no core is idle", ratio(work, steps_of(plain)))
    with watched(plain.twin(), steps=10) as work:
        found = decided(work, steps_of(plain, 10), 1.03, at_most=61)
        yield Row("default: sentinel every step, all every 10", found, "≤ 1.03")
    with watched(adam.twin(), steps=10) as work:
        found = decided(work, steps_of(adam, 10), 1.03, at_least=9, at_most=21)
        yield Row("default, with AdamW and what it does", found)
    with watched(plain.twin(), steps=10, guarded=True) as work:
        for _ in range(20):
            work()  # the window of the guard is full then
        yield Row("default, with a guard that judges every 10", ratio(work, steps_of(plain, 10)))
    groups = {
        "gradients": (GRADIENTS, False),
        "weights and their gradients": (WEIGHTS, True),
        "AdamW's moments": (MOMENTS, True),
        "what-if statistics of three recipes": (WHAT_IFS, False),
    }
    for name, (selection, needs_adam) in groups.items():
        baseline = adam if needs_adam else plain
        with watched(baseline.twin(), every=1, select=selection) as work:
            yield Row(f"every step, with {name}", ratio(work, steps_of(baseline), turns=15))


def other_watching_rows() -> Iterator[Row]:
    """The same training watched by others / unwatched"""
    plain = Training()
    for name, attach in OTHERS.items():
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings(action="ignore"))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            training = plain.twin()
            try:
                after = attach(training.model, stack)
            except ImportError:
                continue

            def work() -> None:
                training.step()  # noqa: B023
                after()  # noqa: B023

            found = ratio(work, steps_of(plain), turns=15)
        yield Row(name, found)


def nvdlfw(model: nn.Module, stack: ExitStack) -> Callable[[], object]:
    """Six of its statistics of the down projections' inputs."""
    import nvdlfw_inspect.api as api

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    config = folder / "config.yaml"
    config.write_text(
        "log:\n  enabled: True\n  layers: {layer_name_regex_pattern: .*}\n  LogTensorStats:\n"
        "    enabled: True\n    tensors: [activation]\n    freq: 1\n"
        "    stats: [min, max, mean, std, l1_norm, l2_norm]\n"
    )
    api.initialize(config_file=str(config), log_dir=str(folder), default_logging_enabled=True)
    stack.callback(api.end_debug)

    def of(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            api.log_tensor_stats(
                layer_name=name,
                tensor_name="activation",
                tensor=args[0].detach(),
                skip_reduction=True,
            )

        return hook

    for name, module in model.named_modules():
        if name.endswith("down"):
            module.register_forward_pre_hook(of(name))
    return api.step


def transformers(model: nn.Module, stack: ExitStack) -> Callable[[], object]:
    from transformers.debug_utils import DebugUnderflowOverflow

    DebugUnderflowOverflow(model)
    return lambda: None


def torchao(model: nn.Module, stack: ExitStack) -> Callable[[], object]:
    """By hooks: with its own wrapped weights a model has no backward."""
    from torchao.prototype.quant_logger.quant_logger import get_default_stats

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda m, args: print(get_default_stats(args[0])))
    return lambda: None


def wandb(model: nn.Module, stack: ExitStack) -> Callable[[], object]:
    import wandb

    folder = stack.enter_context(tempfile.TemporaryDirectory())
    settings = wandb.Settings(silent=True, console="off")
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    run = wandb.init(mode="offline", dir=folder, settings=settings)
    stack.callback(run.finish)
    run.watch(model, log="all", log_freq=1)
    return lambda: run.log({})


OTHERS: dict[str, Callable[[nn.Module, ExitStack], Callable[[], object]]] = {
    "nvdlfw-inspect, six statistics of the product": nvdlfw,
    "transformers' DebugUnderflowOverflow": transformers,
    "torchao's quant logger's three statistics of linear inputs, by hooks": torchao,
    "wandb.watch(log='all', log_freq=1), offline": wandb,
}


def scaling_rows() -> Iterator[Row]:
    """All statistics at every step, by size, where no core is idle: watched / unwatched, 256 \
tokens"""
    sizes = [(width, 2) for width in (256, 512, 1024, 2048)]
    sizes += [(256, layers) for layers in (6, 12, 24)]
    for width, layers in sizes:
        plain = steps_of(Training(width, layers, tokens=256))
        with watched(Training(width, layers, tokens=256), every=1) as work, no_idle_core():
            turns = 9 if width > 1000 else 21
            yield Row(f"width {width}, {layers} layers", ratio(work, plain, turns=turns))


def size_lines() -> Iterator[str]:
    """Of a run that is recorded in full at every step."""
    training, resident = Training(width=64, layers=2, tokens=16), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        with fp8lab.watch(training.model, path, every=1) as watching:
            for step in range(10_000):
                training.x.normal_()  # or every row would be the one before, and weigh nothing
                loss = training.step()
                watching.step(step, loss=loss)
                if step + 1 in (1000, 5000, 10_000):
                    resident.append(resident_bytes())
        run = fp8lab.open_run(path)
        rows, channels = len(run.tensors(["step"])), len(run.channels(["step"]))
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    yield (
        f"- {rows} tensor rows and {channels} channel rows of 10,000 steps, finished: "
        f"{size / rows:.0f} bytes a tensor row, all included; "
        f"{rows / size * 1e9 / 1e6:.1f} million tensor rows a GB."
    )
    told = ", ".join(f"{size / 2**20:.0f}" for size in resident)
    yield f"- Memory of the process after 1,000, 5,000 and 10,000 steps: {told} MiB."


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
