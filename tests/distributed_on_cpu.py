"""One process of a distributed training, for test_distributed: run by torchrun.

    torchrun --nproc-per-node N tests/distributed_on_cpu.py SCENARIO FOLDER

SCENARIO is one of the functions below. What a process has to tell is FOLDER/told-RANK.json; what
befalls the training befalls the process with the highest rank.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

import fp8lab
from fp8lab import (
    DelayedScaling,
    Float8CurrentScaling,
    HighPrecision,
    MXFP8BlockScaling,
    Plan,
    store,
)
from fp8lab.lab.model import LanguageModel, ModelConfig
from fp8lab.lab.parallel import Parallel, mean_over_processes, parallelize, part_of
from fp8lab.listing import ranks_of

CONFIG = ModelConfig(dim=32, layers=2, heads=2, context=16)
SEQUENCES = 4
SCENARIOS: dict[str, Callable[[Path], Any]] = {}


def scenario(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
    SCENARIOS[function.__name__] = function
    return function


def tokens_of(step: int) -> Tensor:
    """The step's sequences, of all processes."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 256, (SEQUENCES, CONFIG.context + 1), generator=generator)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def model_of(plan: Any, layers: int = CONFIG.layers) -> LanguageModel:
    model = LanguageModel(ModelConfig(dim=32, layers=layers, heads=2, context=16), seed=0)
    return fp8lab.convert(model, plan)


# --- a mismatch -------------------------------------------------------------------------------

DELAYED = DelayedScaling(amax_history_len=4)
# What the first process and the others convert with, and how many layers the others have.
MISMATCHES: dict[str, tuple[Any, Any, int]] = {
    "recipe": (DELAYED, Float8CurrentScaling(), 2),
    "setting": (DELAYED, DelayedScaling(amax_history_len=4, margin=1), 2),
    "one operand": (
        DELAYED,
        Plan(recipe=DELAYED, overrides={"layers.1.mlp.down:input@output": HighPrecision()}),
        3,
    ),
    "not converted": (DELAYED, Plan(recipe=DELAYED, exclude=("*.query",)), 2),
    "none": (DELAYED, DELAYED, 2),
    "other layers": (
        Plan(recipe=DELAYED, overrides={"layers.1.*": HighPrecision()}, exclude=("head",)),
        Plan(recipe=DELAYED, overrides={"layers.[12].*": HighPrecision()}, exclude=("head",)),
        3,
    ),
}


@scenario
def mismatch(folder: Path) -> dict[str, str | None]:
    """Each in turn, and at last one of which torch's wrapper sees something before anybody
    watches."""
    told = {}
    first = dist.get_rank() == 0
    for name, (plan, other, layers) in MISMATCHES.items():
        model = model_of(plan) if first else model_of(other, layers)
        try:
            with fp8lab.watch(model, folder / name, group=dist.group.WORLD):
                told[name] = None
        except ValueError as error:
            told[name] = str(error)
    tell(folder, told)
    # Buffers of another shape: gloo aborts who gets more than it expects, and tells no one of less.
    other = DelayedScaling(amax_history_len=8)
    nn.parallel.DistributedDataParallel(model_of(other if first else DELAYED))
    return told


@scenario
def uncaught(folder: Path) -> None:
    """Without a group: the process that begins first trains, until the other one refuses."""
    first = dist.get_rank() == 0
    model = model_of(MISMATCHES["setting"][0 if first else 1])  # of which DDP sees nothing
    wrapped = nn.parallel.DistributedDataParallel(model)
    if not first:
        dist.barrier()
    with fp8lab.watch(wrapped, folder / "uncaught", every=1, flush_seconds=0.0) as watching:
        if first:
            dist.barrier()
        for step in range(1000):
            loss = wrapped(tokens_of(step)[:, :-1]).square().mean()
            loss.backward()
            watching.step(step, loss=loss)


# --- losses -----------------------------------------------------------------------------------

STEPS = 4
RECIPES = {"delayed": DELAYED, "current": Float8CurrentScaling(), "mxfp8": MXFP8BlockScaling()}
Trained = dict[str, Any]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Scales and histories, by plain names."""
    buffers = {name.removeprefix("module."): value for name, value in model.named_buffers()}
    return {name: value.clone() for name, value in buffers.items() if "_before" not in name}


def trained(
    recipe: str, run: Path, *, parts: int = 1, how: Parallel | None = None, steps: int = STEPS
) -> Trained:
    """The losses of the global batch and the FP8 state after each step, of one process that takes
    `parts` micro-batches, or of this one among others."""
    gc.collect()  # models of earlier trainings take part in reductions until they are gone
    model: nn.Module = model_of(RECIPES[recipe])
    if how is not None:
        model = parallelize(model, how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    told: Trained = {"losses": [], "states": []}
    group = None if how is None else dist.group.WORLD
    with fp8lab.watch(model, run, optimizer=optimizer, every=1, group=group) as watching:
        for step in range(steps):
            optimizer.zero_grad()
            losses = []
            with fp8lab.autocast():
                for tokens in part_of(tokens_of(step), model).chunk(parts):
                    losses.append(loss_of(model, tokens))
                    losses[-1].backward()
            for parameter in model.parameters() if parts > 1 else ():
                parameter.grad /= parts
            optimizer.step()
            loss = mean_over_processes(torch.stack(losses).double().mean())
            watching.step(step, loss=loss)
            told["losses"].append(loss)
            told["states"].append(state_of(model))
    return told


@scenario
def losses(folder: Path) -> None:
    told = {
        (recipe, how): trained(recipe, folder / f"{recipe} {how}", how=how)
        for recipe in RECIPES
        for how in get_args(Parallel)
    }
    torch.save(told, folder / f"trained-{dist.get_rank()}.pt")


# --- on another number of processes -----------------------------------------------------------

STAGE = 2  # steps, after which a checkpoint is written; then follows one more


def whole_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Trained:
    """Parameters and Adam's moments, gathered, and the FP8 state."""
    options = StateDictOptions(full_state_dict=True)
    of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
    moments = of_optimizer["state"]
    told = {f"{name}: {k}": v for name, state in moments.items() for k, v in state.items()}
    return {k: v.clone() for k, v in {**of_model, **told}.items()}


@scenario
def stage(folder: Path) -> None:
    """Goes on from the newest checkpoint, on however many processes that was written, and with the
    run; FSDP2, or as it is in one process."""
    number = len(list(folder.glob("checkpoint-*")))
    model: nn.Module = model_of(DELAYED)
    alone = not dist.is_initialized()
    if not alone:
        model = parallelize(model, "fsdp2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    told: dict[str, Any] = {"losses": []}
    if number:
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        checkpoint.load(state, checkpoint_id=folder / f"checkpoint-{number}")
        of_model, of_optimizer = state.values()
        set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)
        told["loaded"] = whole_of(model, optimizer)
    resume_at = number * STAGE if number else None
    with fp8lab.watch(
        model, folder / "run", optimizer=optimizer, every=1, resume_at=resume_at
    ) as watching:
        for step in range(number * STAGE, (number + 1) * STAGE + 1):
            if step == (number + 1) * STAGE:
                state = dict(
                    zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)
                )
                place = folder / f"checkpoint-{number + 1}"
                checkpoint.save(state, checkpoint_id=place)
                told["saved"] = whole_of(model, optimizer)
            optimizer.zero_grad()
            loss = loss_of(model, part_of(tokens_of(step), model))
            loss.backward()
            optimizer.step()
            told["losses"].append(mean_over_processes(loss))
            watching.step(step, loss=told["losses"][-1])
    torch.save(told, folder / f"stage-{number}-{0 if alone else dist.get_rank()}.pt")


# --- a process that is killed -----------------------------------------------------------------


@scenario
def killed(folder: Path) -> None:
    """Trains until somebody ends it, and says which steps are on the disk."""
    parallel = nn.parallel.DistributedDataParallel(model_of(DELAYED))
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.01)
    watching = fp8lab.watch(
        parallel, folder / "run", optimizer=optimizer, every=1, flush_seconds=0.0
    )
    with watching:
        for step in range(100_000):
            optimizer.zero_grad()
            mine = tokens_of(step).chunk(dist.get_world_size())[dist.get_rank()]
            loss = loss_of(parallel, mine)
            loss.backward()
            optimizer.step()
            watching.step(step, loss=loss)
            print(step, flush=True)


# --- a slow process, and one whose disk is full -----------------------------------------------

SLOW = 0.25  # seconds that a step of the last process takes longer


def mount(segments: Path, *options: str) -> None:
    subprocess.run(["mount", *options, "fp8lab-test", str(segments)], check=True)


def troubled(run: Path, ends_at: int | None) -> None:
    """Eight steps. Of the last process the disk takes nothing after two, until the step `ends_at`;
    each of its steps takes long."""
    gc.collect()
    last = dist.get_rank() == dist.get_world_size() - 1
    parallel = parallelize(model_of(DELAYED), "ddp")
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.01)
    segments = run / "ranks" / str(dist.get_rank()) / "segments"
    group = dist.group.WORLD
    with fp8lab.watch(
        parallel, run, optimizer=optimizer, every=1, group=group, flush_seconds=0.0
    ) as watching:
        for step in range(8):
            if last and step == 2:
                mount(segments, "-t", "tmpfs", "-o", "size=4096")  # no room for a file
            if last and step == ends_at:
                subprocess.run(["umount", str(segments)], check=True)
            if last:
                time.sleep(SLOW)
            optimizer.zero_grad()
            loss = loss_of(parallel, part_of(tokens_of(step), parallel))
            loss.backward()
            optimizer.step()
            watching.step(step, loss=mean_over_processes(loss))
            if dist.get_rank() == 0 and step in (1, 4):
                (run.parent / f"{run.name}-{step}.json").write_text(
                    json.dumps([*ranks_of(fp8lab.open_run(run))])
                )


@scenario
def slow_and_full(folder: Path) -> None:
    troubled(folder / "to the end", None)
    if dist.get_rank() == dist.get_world_size() - 1:
        store.BACKLOG_BYTES = 1 << 16  # two steps
    troubled(folder / "for a while", 6)


# --- the process ------------------------------------------------------------------------------


def tell(folder: Path, told: Any) -> None:
    (folder / f"told-{dist.get_rank()}.json").write_text(json.dumps(told))


def main(name: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tell(Path(folder), SCENARIOS[name](Path(folder)))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # everything is closed; on a busy machine gloo's threads may abort what follows


if __name__ == "__main__":
    main(*sys.argv[1:])
