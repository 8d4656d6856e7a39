"""One process of a distributed training that is watched, for test_ranks: run by torchrun.

    torchrun --nproc-per-node N tests/ranks_on_cpu.py PARALLELISM RATE RUN PARAMETERS

PARALLELISM is a key of PARALLEL, RATE the learning rate. Every process computes its part
of the same data; where RUN is "-" nothing is watched. The parameters that are left are written by
process 0, whole.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fp8lab
from fp8lab.lab.model import LanguageModel, ModelConfig
from fp8lab.lab.parallel import Parallel, parallelize

CONFIG = ModelConfig(dim=32, layers=2, heads=2, context=16)
STEPS, SEQUENCES = 4, 4
SELECT = fp8lab.Selection(
    tensors=("residual", "grad_product", "weight", "grad_weight", "exp_avg"),
    layers=("layers.?", "*.mlp", "*.down"),
    statistics=("l1_norm", "mxfp8_underflows%"),
)


def experts(model: nn.Module) -> nn.Module:
    """Every process has as many layers more as its number says."""
    for _ in range(dist.get_rank()):
        model.layers.append(LanguageModel(CONFIG, seed=1).layers[0])
    return model


PARALLEL = {how: partial(parallelize, how=how) for how in get_args(Parallel)} | {"experts": experts}


def batches(step: int, parts: int) -> Iterator[Tensor]:
    """The step's sequences in `parts` of equal size."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 256, (SEQUENCES, CONFIG.context + 1), generator=generator)
    yield from tokens.chunk(parts)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(model: nn.Module, optimizer: Any, parts: int, mine: slice, watching: Any) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        for tokens in list(batches(step, parts))[mine]:
            loss = loss_of(model, tokens)
            loss.backward()
        optimizer.step()
        if watching is not None:
            watching.step(step, loss=loss)


def whole(parameter: Tensor) -> Tensor:
    full = getattr(parameter, "full_tensor", None)
    return parameter.detach().clone() if full is None else full().detach()


def main(parallelism: str, rate: str, run: str, parameters: str) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = PARALLEL[parallelism](LanguageModel(CONFIG, seed=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=float(rate))
    parts = 1 if parallelism == "tensor_parallel" else size
    mine = slice(None) if parts == 1 else slice(rank, rank + 1)
    if run == "-":
        train(model, optimizer, parts, mine, None)
    else:
        watching = fp8lab.watch(
            model,
            run,
            optimizer=optimizer,
            every=1,
            select=SELECT,
            group=dist.group.WORLD,
        )
        with watching:
            train(model, optimizer, parts, mine, watching)
    left = {name: whole(parameter) for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save(left, Path(parameters))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # everything is closed; on a busy machine gloo's threads may abort what follows


if __name__ == "__main__":
    main(*sys.argv[1:])
