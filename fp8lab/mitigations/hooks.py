"""Where a mitigation of an optimizer or a loss stands: in torch's own hooks, and nowhere else.

An optimizer's step hooks see any torch optimizer, foreach and fused ones too, and leave its class
and its methods alone. They have two edges. Gradients may not be there before the step: with
`step(closure)`, as Lightning calls it, the closure computes them, so the change is made inside it.
And torch forgets the hooks of an optimizer that is copied or unpickled: apply the mitigation again.
What a mitigation must know from one step to the next lies in the optimizer's parameter groups as
plain numbers. There it is part of `state_dict()` to the bit; in `optimizer.state` torch would round
it to the parameter's dtype, and an optimizer that makes its state in the first step would think
that it had.

Hooks run in the order in which they came: a monitor that is attached later sees the clipped
gradients, and the learning rate of that step. The gradients are those that `step` is given: what
the training loop has clipped before is clipped. The norm of what a rank does not have (FSDP1's flat
parameters) is not known, so these are refused; parameters that are DTensors are whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fp8lab.hooking import when_gradients_are_there
from fp8lab.regions import inside_backward, with_gradients

Optimizer = torch.optim.Optimizer
Group = dict[str, Any]


# Whose hooks an optimizer has; a copy, which has none, is not in it.
_ON: WeakKeyDictionary[Optimizer, set[str]] = WeakKeyDictionary()


def check_optimizer(who: str, optimizer: Any) -> None:
    """Raises TypeError, opening with `who`, for what is no optimizer; ValueError for one that no
    change of gradients would do right on, or that `who` is on already."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{who}: {type(optimizer).__name__}, expected a torch optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(f"{who}: LBFGS computes gradients many times a step, expected once")
    if who in _ON.get(optimizer, ()):
        raise ValueError(f"{who}: on this {type(optimizer).__name__} already")
    for parameter in parameters(optimizer):
        if parameter.is_complex():
            raise ValueError(f"{who}: a parameter of {parameter.dtype}, expected real ones")
        if getattr(parameter, "_is_flat_param", False):
            raise ValueError(f"{who}: a rank's share of FSDP1, expected whole tensors or DTensors")


def check_adam(who: str, optimizer: Any) -> None:
    """`check_optimizer`, and for what has Adam's second moment; raises ValueError."""
    check_optimizer(who, optimizer)
    kind = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Adam):
        raise ValueError(f"{who}: {kind} has not Adam's second moment, expected Adam or AdamW")
    if any(group["amsgrad"] for group in optimizer.param_groups):
        raise ValueError(f"{who}: {kind} with amsgrad divides by another second moment")


def check_numbers(value: Any, **bounds: tuple[float, float]) -> None:
    """Raises ValueError for an attribute of `value` that is not strictly between its bounds."""
    for name, (low, high) in bounds.items():
        number = getattr(value, name)
        if not isinstance(number, int | float) or not low < number < high:
            expected = f"a number above {low:g}" + ("" if high == math.inf else f", below {high:g}")
            raise ValueError(f"{type(value).__name__}: {name}={number!r}, expected {expected}")


def check_count(value: Any, *names: str) -> None:
    """Raises ValueError for an attribute of `value` that is not a whole number of at least 1."""
    for name in names:
        number = getattr(value, name)
        if type(number) is not int or number < 1:
            kind = type(value).__name__
            raise ValueError(f"{kind}: {name}={number!r}, expected a whole number, at least 1")


def parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """Of all groups, in their order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def before_update(
    who: str, optimizer: Optimizer, change: Callable[[Optimizer], None]
) -> RemovableHandle:
    """Call `change` in each step, without gradients, when the gradients are there and nothing has
    been done with them. The step raises RuntimeError for sparse gradients, and for those that a
    GradScaler has not unscaled."""

    def changing() -> None:
        if getattr(optimizer, "grad_scale", None) is not None:
            expected = "expected scaler.unscale_(optimizer) before the step"
            raise RuntimeError(f"{who}: gradients are multiplied by the GradScaler, {expected}")
        for parameter in parameters(optimizer):
            if parameter.grad is not None and parameter.grad.is_sparse:
                raise RuntimeError(f"{who}: a sparse gradient, expected dense ones")
        with torch.no_grad():
            change(optimizer)

    _ON.setdefault(optimizer, set()).add(who)
    return when_gradients_are_there(optimizer, changing, always=True)


def after_update(who: str, optimizer: Optimizer, change: Callable[[], None]) -> RemovableHandle:
    """Call `change` after each step."""
    _ON.setdefault(optimizer, set()).add(who)
    return optimizer.register_step_post_hook(lambda *_: change())


# What an optimizer's groups are but for the step that it is in; several mitigations may set them.
_GROUPS: WeakKeyDictionary[Optimizer, list[Group]] = WeakKeyDictionary()
_RESTORED: WeakSet[Optimizer] = WeakSet()


def restore_groups_after_step(optimizer: Optimizer) -> None:
    """From now on what `set_groups_for_step` does is undone after each step, and before the next
    where one raised; to be called before `before_update`."""
    if optimizer in _RESTORED:  # once: between two changes of the same step it would undo the first
        return
    _RESTORED.add(optimizer)
    optimizer.register_step_pre_hook(_put_back)
    optimizer.register_step_post_hook(_put_back)


def set_groups_for_step(optimizer: Optimizer, groups: list[Group]) -> None:
    """Other groups, with the same parameters and other options, for the update at hand."""
    _GROUPS.setdefault(optimizer, optimizer.param_groups)
    optimizer.param_groups = groups


def own_groups(optimizer: Optimizer) -> list[Group]:
    """Those that it has when no step is under way: in them lies what a mitigation keeps of a group
    as a whole, whatever another has done for the update at hand."""
    return _GROUPS.get(optimizer, optimizer.param_groups)


def _put_back(optimizer: Optimizer, *_: Any) -> None:
    groups = _GROUPS.pop(optimizer, None)
    if groups is not None:
        optimizer.param_groups = groups


def norms(gradients: Iterable[Tensor]) -> list[float]:
    """The Euclidean norm of each, summed in float64; one transfer from the device for all."""
    found = [whole(torch.linalg.vector_norm(g, dtype=torch.float64)) for g in gradients]
    return to_host(found)


def to_host(numbers: list[Tensor]) -> list[float]:
    """Scalars of whatever device, in one transfer where it is the same."""
    if not numbers:
        return []
    values: list[float] = torch.stack([n.to(numbers[0].device) for n in numbers]).tolist()
    return values


def whole(number: Tensor) -> Tensor:
    """What a DTensor's reduction comes to on all ranks; any other tensor as it is."""
    gathered: Tensor = number.full_tensor() if hasattr(number, "full_tensor") else number
    return gathered


def is_of_training() -> bool:
    """Whether a forward that runs now is the first of a step: no evaluation, and not repeated."""
    return with_gradients() and not inside_backward()
