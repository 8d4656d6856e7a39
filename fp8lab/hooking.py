"""Hooks as both who watches and who mitigates put them: on a model that may be copied, and before
an optimizer changes anything, whether its step is given a closure or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle


class OfOneModel:
    """A hook that a copy of the model does not have, nor a file that the model is saved in: the
    copy is somebody else's, would be counted as the model and keep the hook for ever."""

    def __init__(self, hook: Callable[..., None]) -> None:
        self._hook = hook

    def __call__(self, *args: Any) -> None:
        self._hook(*args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _nothing


def _nothing(*_: Any) -> None:
    pass


def when_gradients_are_there(
    optimizer: torch.optim.Optimizer, call: Callable[[], None], *, always: bool = False
) -> RemovableHandle:
    """Call `call` in each step of `optimizer` before it changes anything: at once, or, where the
    step is given a closure that computes the gradients, after its first call, or after each of its
    calls if `always`."""

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            call()
            return None
        called = False

        def closing() -> Any:
            nonlocal called
            loss = closure()
            if always or not called:
                called = True
                call()
            return loss

        if "closure" in kwargs:
            return args, kwargs | {"closure": closing}
        return (args[0], closing, *args[2:]), kwargs

    return optimizer.register_step_pre_hook(before)
