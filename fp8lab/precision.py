"""What every layer computes in, per operand and GEMM: the precision really in force.

`Fp8Linear` and torchao's `Float8Linear` know it from birth and are asked when recording begins.
Transformer Engine decides at each forward, by the autocast region, so its layers are asked after
their first forward that counts; they say so where they run in high precision, too. Who says nothing
(a plain `nn.Linear`) is not here: what it computes in, no attribute of it tells.

Cost: a hook on the outermost modules of TE, which goes after their first forward. Rejected: TE's
global state when recording begins; no region is open then.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import nn

from fp8lab import te_casts, torchao_casts
from fp8lab.observe import eagerly
from fp8lab.probes import counts
from fp8lab.ranks import watched_modules
from fp8lab.recorder import Recorder

Precision = dict[str, dict[str, str]]  # layer -> operand@gemm -> format, recipe


def known_from_birth(model: nn.Module) -> Precision:
    """The precision of every layer that says it without having run."""
    found: Precision = {}
    for name, module in watched_modules(model):
        # A method of the class: a module of that name, or a text, is somebody else's.
        if callable(getattr(type(module), "precision", None)):
            found[name] = module.precision()  # type: ignore[operator]
        elif torchao_casts.is_torchao(module):
            found[name] = torchao_casts.precision(module)
    return found


def in_full(model: nn.Module) -> Precision:
    """The same with all settings that are not the recipe's defaults; linear layers that do not say
    it, empty. A layer's name is followed by its sizes, so that layers of two pipeline stages that
    share a name and no more are two."""
    said, modules, sizes = known_from_birth(model), dict(watched_modules(model)), linears(model)
    told: Precision = {}
    for name in dict.fromkeys((*said, *sizes)):
        size = f" {sizes[name]['in']}x{sizes[name]['out']}" if name in sizes else ""
        told[name + size] = {
            use: words + _settings(modules[name], use) for use, words in said.get(name, {}).items()
        }
    return told


def _settings(module: nn.Module, use: str) -> str:
    if not callable(getattr(type(module), "recipe_for", None)):
        return ""
    recipe = module.recipe_for(*use.split("@"))  # type: ignore[operator]
    other = {
        one.name: getattr(value, "__qualname__", value)  # a function's repr is of one process
        for one in fields(recipe)
        if (value := getattr(recipe, one.name)) != one.default
    }
    return f" ({', '.join(f'{name}={value}' for name, value in other.items())})" if other else ""


def linears(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Linear layer -> its class and its sizes, whatever its precision."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in watched_modules(model):
        if isinstance(module, nn.Linear):
            kind, sizes = type(module).__name__, (module.in_features, module.out_features)
            found[name] = {"class": kind, "in": sizes[0], "out": sizes[1]}
        for part, (inputs, outputs) in _of_te(name, module).items():
            kind = f"transformer_engine.{te_casts.te_name(module)}"
            found[part] = {"class": kind, "in": inputs, "out": outputs}
    return found


def _of_te(name: str, module: nn.Module) -> dict[str, tuple[int, int]]:
    if "basic_ops" in name.split("."):  # of a layer of te.ops, which is there itself
        return {}
    parts = te_casts.linears_in(module).items()
    return {f"{name}{part}".removeprefix("."): sizes for part, sizes in parts}


class PrecisionProbe:
    """Asks TE's layers after their first forward that counts."""

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        self._recorder = recorder
        self._told: Precision = {}
        self._modules = dict(watched_modules(model))

    def attach(self) -> list[Any]:
        outermost: list[str] = []  # inside of te.ops.Sequential no hook is called
        for name, module in self._modules.items():
            inside = any(name.startswith(f"{outer}.") or not outer for outer in outermost)
            if te_casts.te_name(module) is not None and not inside:
                outermost.append(name)
        return [self._asked_once(name) for name in outermost]

    def _asked_once(self, outer: str) -> Any:
        module = self._modules[outer]
        parts = [
            (part, known)
            for name, part in self._modules.items()
            if name == outer or name.startswith(f"{outer}.") or not outer
            for known in _of_te(name, part)
        ]

        def ran(*_: Any) -> None:
            if not counts(module, self._recorder):
                return
            for part, known in parts:
                said = te_casts.precision(part)
                if said is not None:
                    self._told[known] = said
            handle.remove()

        handle = module.register_forward_hook(eagerly(ran))
        return handle

    def news(self) -> Precision:
        """What was said since this was last asked."""
        told, self._told = self._told, {}
        return told
