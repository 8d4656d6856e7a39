"""One process of a tensor-parallel training in emulated FP8, for test_sharded: run by torchrun.

    torchrun --nproc-per-node N tests/sharded_on_cpu.py FILE

Process 0 writes to FILE, as JSON, the losses of `losses` under every recipe, and which casts of a
distributed tensor differ from those of the whole one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from fp8lab import (
    DelayedScaling,
    Float8BlockScaling,
    Float8CurrentScaling,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    RowwiseScaling,
    convert,
    fake_quantize,
)
from fp8lab.ffn import GatedFeedForward
from fp8lab.recipe import OPERANDS, Recipe

RECIPES: dict[str, Recipe] = {
    "delayed": DelayedScaling(amax_history_len=4),
    "current": Float8CurrentScaling(),
    "blocks": Float8BlockScaling(),
    "mxfp8": MXFP8BlockScaling(),
    "rows": RowwiseScaling(),
    "nvfp4": NVFP4BlockScaling(disable_stochastic_rounding=True, disable_rht=True),
}
PLAN = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}


def losses(recipe: Recipe, mesh: DeviceMesh | None) -> list[float]:
    """Of four steps of two feed-forwards; with a mesh, cut over its processes."""
    torch.manual_seed(0)
    model = nn.Sequential(GatedFeedForward(64, 128), GatedFeedForward(64, 128))
    if mesh is not None:
        for feed_forward in model:
            parallelize_module(feed_forward, mesh, PLAN)
    convert(model, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = []
    for step in range(4):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step)) * (1 + step)
        optimizer.zero_grad()
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def casts_that_differ(mesh: DeviceMesh) -> list[str]:
    values = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    values *= torch.logspace(-6, 3, 128)
    differing = []
    for name, recipe in RECIPES.items():
        scale = torch.tensor(0.5) if name == "delayed" else None
        for operand in OPERANDS:
            for placement in (Replicate(), Shard(0), Shard(1)):
                shared = distribute_tensor(values, mesh, [placement])
                cast = fake_quantize(shared, recipe, operand, scale=scale)
                whole = cast.full_tensor() if isinstance(cast, DTensor) else cast
                if not torch.equal(whole, fake_quantize(values, recipe, operand, scale=scale)):
                    differing.append(f"{name}, {operand}, {placement}")
    return differing


def main(file: str) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {name: losses(recipe, mesh) for name, recipe in RECIPES.items()}
    told = {"losses": found, "differing": casts_that_differ(mesh)}
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # everything is closed; on a busy machine gloo's threads may abort what follows


if __name__ == "__main__":
    main(*sys.argv[1:])
