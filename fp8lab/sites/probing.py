"""Running a module on a few tokens without leaving a trace, to see its linear maps.

The matrices are stand-ins: random numbers in float32, of the true shapes, so that nothing is
gathered, converted or zero. What is small (biases, norms, slopes) stays what it is. A module that
holds a stack of matrices for experts is called as one that routes: each token to two experts, by
arguments whose meaning their names tell (`top_k_index`, `routing_weights`, `tokens_per_expert`);
whether that was right, the fit decides. Where a module runs on a GPU that cannot do it in float32,
it is run on the CPU.

Cost: one forward on eight or sixteen tokens, and memory for the stand-ins; of a large stack one
matrix serves for all. Rejected: `deepcopy`, which may copy the rest of the model along.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fp8lab.ffn import FeedForward, GatedFeedForward
from fp8lab.sites.te_casts import te_name
from fp8lab.sites.tracing import LinearMap, Source, Trace

# A prime: no two of so many rows are made of the same numbers, whatever their length.
_NUMBERS = 65537
# A stack of matrices with more elements is one matrix, seen many times.
_SMALL_STACK = 1 << 24
_TOKENS, _ROUTED_TOKENS = 8, 16
_local = threading.local()


def probe(
    module: nn.Module, names: Mapping[str, bool], dim: int, *, training: bool = False
) -> list[LinearMap]:
    """The linear maps that one forward of `module` on tokens of width `dim` computes, in order.

    `names` are those of its matrices, and whether they are stacks; `training` is the mode. Raises
    whatever the module raises, or ValueError if it cannot be called.
    """
    device = module.get_parameter(next(iter(names))).device
    devices = dict.fromkeys([device, torch.device("cpu")])
    for place in devices:
        try:
            return _run(module, names, dim, place, training)
        except Exception:
            if place.type == "cpu":
                raise
    raise AssertionError


def is_probing() -> bool:
    """Whether the forward that runs now is such a run, for a hook that counts the model's own."""
    return getattr(_local, "depth", 0) > 0


def proposal(hook: Any) -> Any:
    """What the object that `hook` is a method of says that it makes of the product (its `formula`),
    None if it says nothing."""
    return getattr(getattr(hook, "__self__", None), "formula", None)


def proposals(module: nn.Module) -> list[Any]:
    """The formulas that the hooks before the module's children say they put in force."""
    hooks = [h for child in module.children() for h in child._forward_pre_hooks.values()]
    return [said for said in map(proposal, hooks) if said is not None]


def numbers(module: nn.Module) -> list[float]:
    """The numbers among a module's attributes and its children's: one may be a slope or a limit."""
    found: dict[float, None] = {}
    for owner in (module, *module.children()):
        for value in (*vars(owner).values(), *owner._parameters.values()):
            if hasattr(value, "to_local"):  # a shard, which may be of nothing
                value = value.to_local()
            if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
                value = float(value.detach())
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and math.isfinite(value) and abs(value) <= 1000:
                found[float(value)] = None
    return list(found)


def _run(
    module: nn.Module,
    names: Mapping[str, bool],
    dim: int,
    device: torch.device,
    training: bool,
) -> list[LinearMap]:
    maps: list[LinearMap] = []
    ended: list[LinearMap] = []

    def begins(known: LinearMap) -> None:
        known.input = known.input.clone()  # an activation may work in place
        maps.append(known)

    def ends(known: LinearMap) -> None:
        known.output = known.output.clone()
        ended.append(known)

    with ExitStack() as stack:
        stack.enter_context(_undisturbed(module, device, training))
        tensors = _stand_ins(module, device)
        trace = Trace(
            {n: t for n, t in tensors.items() if n in names or t.dim() <= 2}, begins, ends
        )
        tensors |= {n: b.clone().to(device) for n, b in module.named_buffers()}
        for child_name, child in module.named_children():
            if f"{child_name}.weight" in names:
                _note_calls(stack, trace, child_name, child)
        args, kwargs = _arguments(module, names, dim, device)
        stack.enter_context(trace)
        _local.depth = getattr(_local, "depth", 0) + 1
        try:
            torch.func.functional_call(module, tensors, args, kwargs)
        finally:
            _local.depth -= 1
        trace.finish()
    return [known for known in maps if known in ended and known.source.name in names]


def _stand_ins(module: nn.Module, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(_NUMBERS, generator=generator).to(device)
    tensors: dict[str, Tensor] = {}
    for position, (name, parameter) in enumerate(module.named_parameters()):
        if parameter.dim() < 2 and not _is_sharded(parameter):
            tensors[name] = parameter.to(device, torch.float32, copy=True)
            continue
        shape = tuple(parameter.shape)
        stacked = parameter.dim() == 3 and parameter.numel() > _SMALL_STACK
        drawn = (1, *shape[1:]) if stacked else shape
        values = table.roll(7919 * position).repeat(math.prod(drawn) // _NUMBERS + 1)
        values = values[: math.prod(drawn)].view(drawn) / max(1, shape[-1:][0]) ** 0.5
        tensors[name] = values.expand(shape)
    return tensors


def _is_sharded(parameter: Tensor) -> bool:
    return hasattr(parameter, "full_tensor")  # a DTensor, whose import would cost more than this


def _arguments(
    module: nn.Module, names: Mapping[str, bool], dim: int, device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tokens of growing size, and what a module of experts wants besides."""
    generator = torch.Generator().manual_seed(0)
    if not any(names.values()):
        sizes = 2.0 ** (torch.arange(_TOKENS) - 1)
        tokens = sizes[:, None] * torch.randn(1, _TOKENS, dim, generator=generator)
        return (tokens.to(device),), {}
    stack = next(name for name, stacked in names.items() if stacked)
    experts = module.get_parameter(stack).shape[0]
    _, *others = inspect.signature(module.forward).parameters.values()
    others = [p for p in others if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    num_tokens = _ROUTED_TOKENS if others else experts * -(-_ROUTED_TOKENS // experts)
    sizes = 2.0 ** (torch.arange(num_tokens) % 8 - 1)
    args = [sizes[:, None] * torch.randn(num_tokens, dim, generator=generator)]
    kwargs: dict[str, Any] = {}
    for other in others:
        value = _routing(other.name, num_tokens, experts)
        if value is None and other.default is other.empty:
            raise ValueError(f"its forward takes {other.name!r}, which the probe does not know")
        # By position: what a forward is replaced with may call the same things otherwise.
        if other.kind is not other.KEYWORD_ONLY and len(args) == 1 + others.index(other):
            args.append(other.default if value is None else value.to(device))
        elif value is not None:
            kwargs[other.name] = value.to(device)
    return (args[0].to(device), *args[1:]), kwargs


def _routing(name: str, num_tokens: int, experts: int) -> Tensor | None:
    """What an argument of that name stands for: a choice of experts, its weights, or counts."""
    chosen = min(2, experts)
    slots = torch.arange(num_tokens * chosen).reshape(num_tokens, chosen) % experts
    counts = torch.bincount(torch.arange(num_tokens) % experts, minlength=experts)
    if "tokens_per_expert" in name or "counts" in name:
        return counts
    if name.startswith("off"):
        return counts.cumsum(0).to(torch.int32)
    if "index" in name or "indices" in name or "ids" in name or "selected" in name:
        return slots
    if "weight" in name or "score" in name or "prob" in name:
        return torch.full((num_tokens, chosen), 0.75)
    return None


def _note_calls(stack: ExitStack, trace: Trace, name: str, child: nn.Module) -> None:
    weight, bias = f"{name}.weight", getattr(child, "bias", None)
    has_bias = bias is not None and bias.numel() > 0  # Transformer Engine's none is an empty one

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        input = next(iter((*args, *kwargs.values())), None)
        shape: tuple[int, ...] = tuple(module.weight.shape)
        transposed = isinstance(input, Tensor) and input.shape[-1] != shape[-1]
        source = Source(weight, 0, shape[-1 if transposed else -2], 1, transposed)
        trace.enter_module(source, f"{name}.bias" if has_bias else None, module, input)

    def leave(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        trace.leave_module(result)

    stack.callback(child.register_forward_pre_hook(enter, with_kwargs=True).remove)
    stack.callback(child.register_forward_hook(leave, with_kwargs=True, always_call=True).remove)


@contextmanager
def _undisturbed(module: nn.Module, device: torch.device, training: bool) -> Iterator[None]:
    """A mode, no gradients, no autocast, no random numbers used up, nothing compiled, activations
    as precise as the tensors; everything restored."""
    children = list(module.modules())
    changed: list[tuple[nn.Module, str, Any]] = []

    def change(owner: nn.Module, name: str, value: Any) -> None:
        changed.append((owner, name, vars(owner)[name]))
        vars(owner)[name] = value

    sharded = any(_is_sharded(parameter) for parameter in module.parameters())
    devices = {p.device for p in module.parameters() if p.is_cuda}
    with ExitStack() as stack:
        for child in children:
            change(child, "training", training)
            if isinstance(child, GatedFeedForward | FeedForward):
                change(child, "activation_format", None)
            if vars(child).get("_compiled_call_impl") is not None:
                change(child, "_compiled_call_impl", None)
            # They gather and distribute what the stand-ins are whole without; a formula stays.
            for hooks in ("_forward_pre_hooks", "_forward_hooks") if sharded else ():
                kept = ((n, h) for n, h in vars(child)[hooks].items() if proposal(h) is not None)
                change(child, hooks, type(vars(child)[hooks])(kept))
        if any(te_name(child) is not None for child in children):
            from fp8lab.sites import te_modules

            stack.enter_context(te_modules.plain_linears(module))
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        try:
            yield
        finally:
            for owner, name, value in reversed(changed):
                vars(owner)[name] = value
