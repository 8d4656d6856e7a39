"""The lab's models over several processes: copied (DDP), sharded (FSDP2) or cut (tensor parallel).

`parallelize` is called in each process, after the model was converted and before its optimizer is
made, whose parameters it may replace. Where processes share a batch (`part_of`), each takes the
mean over its part and the gradients' mean is taken over processes. So a gradient is cast as one of
a micro-batch: it is as many times larger as there are parts, and under just-in-time scaling each
part has its own amax. The same training in one process is one that takes these parts as
micro-batches of a step (`autocast`) and divides the gradients by their number; to that, two
processes are equal to the bit. What differs with more is the order in which gradients are added.

Tensor parallelism cuts the feed-forwards alone, gate and up by rows, down by columns: the down
projection's shares are then added up in another order than one process adds.

Rejected: to choose for the reader by memory and size. This is to see what FP8 does under each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fp8lab.agreement import rank_of, world_size
from fp8lab.ffn import FeedForward, GatedFeedForward

Parallel = Literal["ddp", "fsdp2", "tensor_parallel"]


def parallelize(model: nn.Module, how: Parallel) -> nn.Module:
    """The model as a part of this process group's: a wrapper of it, or itself, changed in place.

    All processes must call it with models that are equal. Raises ValueError without a process
    group, for another `how`, and for a model that has no `layers` to shard or no feed-forward of
    `fp8lab.ffn` to cut, or one whose width the processes do not divide.
    """
    if how not in get_args(Parallel):
        known = ", ".join(get_args(Parallel))
        raise ValueError(f"parallelize: {how!r:.60}, expected one of {known}")
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("parallelize: no process group, expected a start by torchrun")
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh

    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    return _sharded(model, mesh) if how == "fsdp2" else _cut(model, mesh)


def _sharded(model: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    layers = model if isinstance(model, nn.Sequential) else getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleList | nn.Sequential):
        got = f"parallelize: fsdp2: {type(model).__name__}"
        raise ValueError(f"{got}, expected an nn.Sequential or a model with a ModuleList `layers`")
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _cut(model: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    found = [one for one in model.modules() if isinstance(one, GatedFeedForward | FeedForward)]
    if not found:
        raise ValueError(f"parallelize: tensor_parallel: {type(model).__name__}: no feed-forward")
    for feed_forward in found:
        hidden = feed_forward.down.in_features
        if hidden % mesh.size():
            expected = f"a multiple of {mesh.size()} processes"
            raise ValueError(f"parallelize: tensor_parallel: width {hidden}, expected {expected}")
        ways = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
        plan = {name: way for name, way in ways.items() if hasattr(feed_forward, name)}
        parallelize_module(feed_forward, mesh, plan)
        for layer in feed_forward.children():
            # Scales and histories, which each process has whole, are not to be spread out.
            for name, buffer in layer._buffers.items():
                if isinstance(buffer, DTensor):
                    layer._buffers[name] = buffer.to_local()
    return model


def shares_batch(model: nn.Module) -> bool:
    """Whether each process takes a part of the batch: under DDP and FSDP2."""
    if world_size() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, nn.parallel.DistributedDataParallel | FSDPModule)


def part_of(batch: Tensor, model: nn.Module) -> Tensor:
    """What this process takes of a batch [batch, ...]: all of it, or where processes share one
    [batch / processes, ...]. Raises ValueError where they do not divide it."""
    if not shares_batch(model):
        return batch
    if len(batch) % world_size():
        expected = f"a multiple of {world_size()} processes"
        raise ValueError(f"parallel training: batch {len(batch)}, expected {expected}")
    return batch.chunk(world_size())[rank_of()]


def mean_over_processes(value: Tensor | float) -> float:
    """The mean of what the processes have, the same number on each."""
    number = torch.as_tensor(value).detach()
    if world_size() == 1:
        return float(number)
    device = number.device if "nccl" in str(dist.get_backend()) else "cpu"
    total = number.to(device=device, dtype=torch.float64, copy=True)
    dist.all_reduce(total)
    return float(total) / world_size()


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> None:
    """`nn.utils.clip_grad_norm_`, also where some parameters are spread out and some are not, which
    torch refuses: the norm is that of all gradients, whole."""
    parameters = [one for one in parameters if one.grad is not None]
    spread = [one for one in parameters if hasattr(one.grad, "full_tensor")]
    if not spread:
        nn.utils.clip_grad_norm_(parameters, largest)
        return
    plain = [one for one in parameters if not hasattr(one.grad, "full_tensor")]
    norms: list[Tensor] = [torch.linalg.vector_norm(one.grad) for one in plain]
    norms += [torch.linalg.vector_norm(one.grad).full_tensor() for one in spread]
    total = math.hypot(*(float(norm) for norm in norms))
    factor = largest / (total + 1e-6)
    factor = 1.0 if factor > 1.0 else factor  # NaN stays, as torch's: then no gradient is one
    for one in parameters:
        assert one.grad is not None
        one.grad.mul_(factor)
