"""One process of several that do not do the same, for test_agreement: run by torchrun.

    torchrun --nproc-per-node 2 tests/agreement_on_cpu.py FOLDER

Each scenario below in turn; what it tells, or the error that ends it, is FOLDER/told-RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_on_cpu import CONFIG, DELAYED, loss_of, model_of, tokens_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import fp8lab
from fp8lab import Float8CurrentScaling, HighPrecision, Plan
from fp8lab.lab.model import LanguageModel
from fp8lab.lab.parallel import clip_gradients, parallelize
from fp8lab.store import RunError

SITE = "layers.0.mlp:product"


def first() -> bool:
    return dist.get_rank() == 0


def plain() -> LanguageModel:
    return LanguageModel(CONFIG, seed=0)


def steps_of(watching: Any, model: nn.Module, numbers: range) -> None:
    for step in numbers:
        loss_of(model, tokens_of(10 * step + dist.get_rank())).backward()
        watching.step(step)


def every(run: Path) -> None:
    """Rows of other steps would be added up."""
    with fp8lab.watch(model_of(DELAYED), run, every=1 if first() else 2, group=dist.group.WORLD):
        pass


def select(run: Path) -> None:
    """As many statistics, but other ones."""
    name = "l1_norm" if first() else "underflows%"
    selection = fp8lab.Selection(tensors=("residual",), layers=("*",), statistics=(name,))
    with fp8lab.watch(model_of(DELAYED), run, select=selection, group=dist.group.WORLD):
        pass


def cannot_begin(run: Path) -> None:
    """Where the last process would write there is something."""
    if not first():
        (run / "ranks" / "1").mkdir(parents=True)
    dist.barrier()
    with fp8lab.watch(model_of(DELAYED), run, group=dist.group.WORLD):
        pass


def no_model(run: Path) -> None:
    model: Any = model_of(DELAYED) if first() else None
    with fp8lab.watch(model, run, group=dist.group.WORLD):
        pass


def no_member(run: Path) -> list[int]:
    group = dist.new_group([0])
    try:
        with fp8lab.watch(model_of(DELAYED), run, group=group):
            pass
    finally:
        dist.barrier()
    return [int(rank) for rank in fp8lab.open_run(run).ranks()["rank"]]


def of_two_groups(run: Path) -> list[list[float]]:
    """One of them adds up rows of the sites of the other."""
    groups = [dist.new_group([0]), dist.new_group([1])]
    if not first():
        dist.barrier()
    try:
        with fp8lab.watch(plain(), run, every=1, group=groups[dist.get_rank()]) as watching:
            steps_of(watching, watching._model, range(1))
    finally:
        if first():
            dist.barrier()
    return merged_of(run)


def merged_of(run: Path) -> list[list[float]]:
    rows = fp8lab.open_run(run).tensors(("cur_amax", "count"), sites=SITE, ranks=-1)
    return [[float(value) for value in row] for row in rows[["step", "cur_amax", "count"]].values]


def skipped(run: Path) -> list[Any]:
    """The second process leaves out one step: its next ones come together with others'."""
    model = plain()
    numbers = range(6) if first() else [0, 2, 3, 4, 5, 6]
    with (
        warnings.catch_warnings(record=True) as said,
        fp8lab.watch(model, run, every=2, group=dist.group.WORLD) as watching,
    ):
        warnings.simplefilter("always")
        steps_of(watching, model, numbers)  # type: ignore[arg-type]
    dist.barrier()
    events = fp8lab.open_run(run).events()[["step", "rank", "kind", "detail"]]
    return [merged_of(run), [str(one.message) for one in said], events.values.tolist()]


class Reads(nn.Module):
    """A gated feed-forward beside a layer whose weight alone it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.read = (nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return down + functional.linear(x, self.read.weight)


def sharded(run: Path) -> list[Any]:
    model = fp8lab.convert(nn.Sequential(Reads(), Reads()), Float8CurrentScaling())
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:  # type: ignore[attr-defined]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with (
        warnings.catch_warnings(record=True),
        fp8lab.watch(model, run, every=1, group=dist.group.WORLD) as watching,
    ):
        warnings.simplefilter("always")
        for step in range(2):
            model(torch.randn(4, 8)).sum().backward()
            watching.step(step)
    dist.barrier()
    events = fp8lab.open_run(run).events()
    return events[["step", "rank", "kind", "site"]].values.tolist()


def of_nothing(run: Path) -> list[bool]:
    """A parameter of one element, of which the second process holds none."""
    model = Reads()
    model.slope = nn.Parameter(torch.ones(1))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW([model.slope], lr=0.01)
    with fp8lab.watch(model, run, optimizer=optimizer, every=1, group=dist.group.WORLD) as watching:
        (model(torch.randn(4, 8)).sum() * 1.0).backward()
        model.slope.grad = model.slope.detach().clone()
        optimizer.step()
        watching.step(0)
    dist.barrier()
    run_of = fp8lab.open_run(run)
    return [bool(run_of.steps()["grad_norm"].notna().all()), len(run_of.events()) == 0]


def clipped(run: Path) -> int:
    """In one gradient of a model of which a part is cut there is a NaN: gradients without a NaN."""
    model = parallelize(plain(), "tensor_parallel")
    loss_of(model, tokens_of(0)).backward()
    parameters = list(model.parameters())
    assert parameters[0].grad is not None
    parameters[0].grad.fill_(torch.nan)
    clip_gradients(parameters, 1.0)
    local = [getattr(one.grad, "to_local", lambda one=one: one.grad)() for one in parameters]
    return sum(not bool(gradient.isnan().all()) for gradient in local)


def other_amaxes(run: Path) -> None:
    """As many layers of the same sizes under delayed scaling, but not the same ones."""
    wide = "layers.0.mlp.gate" if first() else "layers.0.mlp.up"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_of(Plan(recipe=DELAYED, overrides={wide: HighPrecision()}))
    loss_of(model, tokens_of(0))


SCENARIOS: tuple[Callable[[Path], Any], ...] = (
    *(every, select, cannot_begin, no_model, no_member, of_two_groups, skipped),
    *(sharded, of_nothing, clipped, other_amaxes),
)


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    told: dict[str, Any] = {"chained": []}
    for scenario in SCENARIOS:
        name = scenario.__name__
        try:
            told[name] = scenario(Path(folder) / name)
        except (ValueError, TypeError, RuntimeError, RunError) as error:
            told[name] = f"{type(error).__name__}: {error}"
            if error.__cause__ is not None or error.__context__ is not None:
                told["chained"].append(name)
        dist.barrier()
    Path(folder, f"told-{dist.get_rank()}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # everything is closed; on a busy machine gloo's threads may abort what follows


if __name__ == "__main__":
    main(*sys.argv[1:])
