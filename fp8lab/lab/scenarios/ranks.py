"""Two processes that train one model, and scale its operands apart.

Real processes that talk over gloo, started for the draw: a layer left over from another one would
take part in the reductions. Each has its half of the batch, gradients are averaged, every operand
is under delayed scaling. What is wrong: the amaxes are not reduced, from the start
(`amax_of_ranks`) or from some step on (`amax_no_longer_reduced`). Now and then one of the two, in
turns, meets a token much larger than the rest: a history of all processes remembers the last such
token, a history of one alone has forgotten its own by then.

The onset is the first step in which a scale in force differs between the two, which they tell each
other.
"""

from __future__ import annotations

import multiprocessing
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fp8lab.conversion import convert
from fp8lab.lab.scenarios import Draw, Label, Scenario
from fp8lab.lab.scenarios.gradients import Dice, Stack
from fp8lab.linear import Fp8Linear
from fp8lab.plan import Plan
from fp8lab.recipe import OPERANDS, DelayedScaling, Float8CurrentScaling

RANKS = 2
PATIENCE = timedelta(seconds=120)


def _draw(draw: Draw, name: str, later: bool) -> Label:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    processes = [
        context.Process(target=_train, args=(rank, theirs, draw, name, later))
        for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    theirs.close()
    try:
        sites, onset = ours.recv()  # what the first process has to tell, or the end of both
    except EOFError:
        for process in processes:
            process.terminate()
        raise RuntimeError("a process ended before the training did") from None
    finally:
        ours.close()
        for process in processes:
            process.join()
    return Label(cause="rank_local_amax", sites=sites, onset=onset)


def _train(rank: int, pipe: Connection, draw: Draw, name: str, later: bool) -> None:
    """One of the processes; the first one sends the sites with delayed scales, and the onset."""
    torch.set_num_threads(1)
    meeting = (draw.folder / "meeting").resolve()
    dist.init_process_group(
        "gloo", init_method=meeting.as_uri(), rank=rank, world_size=RANKS, timeout=PATIENCE
    )
    try:
        found = _trained(rank, draw, Dice(draw, name), later)
        if rank == 0:
            pipe.send(found)
    finally:
        dist.destroy_process_group()


def _trained(rank: int, draw: Draw, dice: Dice, later: bool) -> tuple[tuple[str, ...], int]:
    torch.manual_seed(draw.seed)
    dim = dice.one((32, 48))
    model = Stack(dice.one((1, 2)), dim, 2 * dim, dice.one(("swiglu", "geglu")))
    for layer in model.layers:
        layer.norm = nn.Identity()
    every, gradients_too = dice.whole(4, 8), dice.one((True, False))
    length = every + dice.whole(1, every - 1)
    begins, steps = (dice.whole(6, 16) if later else 0), 40
    reduced = DelayedScaling(amax_history_len=length)
    local = DelayedScaling(amax_history_len=length, reduce_amax=False)
    gradients = {} if gradients_too else {"*:grad_output": Float8CurrentScaling()}
    convert(model, Plan(recipe=reduced if later else local, overrides=gradients))
    linears = {n: m for n, m in model.named_modules() if isinstance(m, Fp8Linear)}
    optimizer = torch.optim.Adam(model.parameters(), lr=dice.one((1e-3, 3e-3)))
    batch = _Batches(rank, draw, dim, every)
    onset = -1
    with draw.watch(model, optimizer) as watching:
        for step in range(steps):
            if step == begins:
                _set(linears, reduced, local)
            if onset < 0 and _differ(linears):
                onset = step
            optimizer.zero_grad()
            x, y = batch.of(step)
            loss = ((model(x) - y).square().sum(-1) / x.square().sum(-1)).mean()
            loss.backward()
            _average([p.grad for p in model.parameters() if p.grad is not None])
            optimizer.step()
            watching.step(step, loss=loss.detach())
    if onset < 0:
        raise RuntimeError("the scales never differed")
    operands = [o for o in OPERANDS if gradients_too or o != "grad_output"]
    products = [f"layers.{index}.mlp:product" for index in range(len(model.layers))]
    return (*(f"{n}:{o}" for n in linears for o in operands), *products), onset


def _average(gradients: list[Tensor]) -> None:
    """In place, over all processes."""
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start:][: gradient.numel()].view_as(gradient) / RANKS)
        start += gradient.numel()


def _set(layers: dict[str, Fp8Linear], reduced: Any, local: Any) -> None:
    for layer in layers.values():
        for operand, recipe in layer.recipes.items():
            if recipe == reduced:
                layer.recipes[operand] = local


def _differ(layers: dict[str, Fp8Linear]) -> bool:
    """Whether a scale in force is not the same on all processes."""
    mine = torch.cat([layer.scale for layer in layers.values()])
    all_of_them = [torch.empty_like(mine) for _ in range(RANKS)]
    dist.all_gather(all_of_them, mine)
    return not torch.equal(*all_of_them)


class _Batches:
    """Each process's own data; every so many steps, from the first on, one in turns has a token
    `factor` times larger."""

    def __init__(self, rank: int, draw: Draw, dim: int, every: int) -> None:
        self._rank, self._draw, self._every = rank, draw, every
        generator = torch.Generator().manual_seed(draw.seed)
        self._map = torch.randn(dim, dim, generator=generator) / dim**0.5
        self._factor = draw.between(6.0, 60.0)

    def of(self, step: int) -> tuple[Tensor, Tensor]:
        random = np.random.default_rng([self._draw.seed, self._rank, step])
        x = torch.from_numpy(random.normal(size=(32, len(self._map))).astype(np.float32))
        if step % self._every == 0 and step // self._every % RANKS == self._rank:
            x[0] *= self._factor
        return x, x @ self._map


def amax_of_ranks(draw: Draw) -> Label:
    return _draw(draw, "amax_of_ranks", later=False)


def amax_no_longer_reduced(draw: Draw) -> Label:
    return _draw(draw, "amax_no_longer_reduced", later=True)


_APART = "first step in which a scale in force differs between the processes"

SCENARIOS = (
    Scenario(
        name="amax_of_ranks",
        cause="rank_local_amax",
        title="two processes keep amax histories of their own",
        onset=_APART,
        run=amax_of_ranks,
    ),
    Scenario(
        name="amax_no_longer_reduced",
        cause="rank_local_amax",
        title="two processes stop reducing their amaxes",
        onset=_APART,
        run=amax_no_longer_reduced,
    ),
)
