"""What every layer computes in, per operand and GEMM: the precision really in force.

`Fp8Linear` and torchao's `Float8Linear` know it from birth and are asked when recording begins.
Transformer Engine decides at each forward, by the autocast region, so its layers are asked after
their first forward that counts and in every step that is recorded in full; they say so where they
run in high precision, too. Who says nothing (a plain `nn.Linear`) is not here: what it computes in,
no attribute of it tells.

What is known from birth is true of a layer that runs. One that does not, though its weight gets a
gradient, is told: somebody else computes with the weight, in what precision no one knows. So it is
with a layer of TE's. Of weights that FSDP2 has sharded the gradient is looked for at the whole
weight, which the module has while it runs: what the shard gets may be another process's.

A layer that is converted while it is watched, or back, is told: rows before and after it are of two
models. The way back is an event and no warning: to train the last steps in high precision is usual.
run.json keeps what such a layer said while it did.

Processes must agree. Precision known from birth is compared before a run begins; what TE's layers
say of a step with what they say elsewhere in that step, and who says otherwise second leaves an
event.

Cost: a hook on the outermost modules of TE; on every layer that says its precision one, and one on
its weight, which go after the first step that trained. Rejected: TE's global state when recording
begins; no region is open then.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fp8lab.agreement import unlike
from fp8lab.hooking import OfOneModel
from fp8lab.monitor.probes import counts
from fp8lab.monitor.ranks import watched_modules
from fp8lab.monitor.recorder import Recorder
from fp8lab.plan import in_words
from fp8lab.sites import te_casts, torchao_casts
from fp8lab.sites.observe import eagerly

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
        told[_sized(name, sizes)] = {
            use: words + _settings(modules[name], use) for use, words in said.get(name, {}).items()
        }
        # Converted to TE's, it runs under that recipe or stops.
        if name in modules and (recipe := te_casts.declared(modules[name])) is not None:
            told[_sized(name, sizes)] = {"every operand": te_casts.declared_in_words(recipe)}
    return told


def _sized(name: str, sizes: dict[str, dict[str, Any]]) -> str:
    return f"{name} {sizes[name]['in']}x{sizes[name]['out']}" if name in sizes else name


def _settings(module: nn.Module, use: str) -> str:
    if not callable(getattr(type(module), "recipe_for", None)):
        return ""
    recipe = module.recipe_for(*use.split("@"))  # type: ignore[operator]
    return in_words(recipe).removeprefix(type(recipe).__name__)


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


class Notice(NamedTuple):
    """What is to be an event of the run: its kind, where, and in words."""

    kind: str
    site: str
    detail: str


class PrecisionProbe:
    """Asks TE's layers when they have run, and whether those that say it run at all; `path` is
    where the other processes write that record the same run."""

    def __init__(self, model: nn.Module, recorder: Recorder, path: str) -> None:
        self._recorder = recorder
        self._path = path
        self._model = model
        self._sizes = linears(model)
        self._said = in_full(model)
        self._told: Precision = {}
        self._latest: Precision = {}
        self._modules = dict(watched_modules(model))
        self._kinds = [type(module) for module in self._modules.values()]
        self._calls = _Calls(model)

    def attach(self) -> list[Any]:
        outermost = _outermost_of_te(self._modules)
        return [*(self._asked(name) for name in outermost), *self._calls.attach()]

    def _asked(self, outer: str) -> Any:
        module = self._modules[outer]
        parts = [
            (part, known)
            for name, part in self._modules.items()
            if name == outer or name.startswith(f"{outer}.") or not outer
            for known in _of_te(name, part)
        ]
        has_said = False

        def ran(*_: Any) -> None:
            nonlocal has_said
            if not counts(module, self._recorder) or (has_said and not self._recorder.is_due):
                return
            has_said = True
            for part, known in parts:
                said = te_casts.precision(part)
                if said is not None:
                    self._latest[known] = said

        return module.register_forward_hook(eagerly(ran))

    def news(self, step: int) -> tuple[Precision, list[Notice]]:
        """After a step: what layers say that they had not said before, and what is to be known of
        that and of layers that do not run."""
        born, converted = self._converted(step)
        told, notices = self._news_of_te()
        return born | told, converted + notices + self._calls.not_run()

    def _converted(self, step: int) -> tuple[Precision, list[Notice]]:
        """Layers that have become others; a conversion gives a layer another class, in place."""
        kinds = [type(module) for module in self._modules.values()]
        if kinds == self._kinds:
            return {}, []
        before, self._said, self._kinds = self._said, in_full(self._model), kinds
        changed = [name for name, said in self._said.items() if said != before.get(name, {})]
        if not changed:  # a hook's or a wrapper's class
            return {}, []
        first = changed[0]
        detail = f"by step {step}, {_change(before.get(first, {}), self._said[first])}"
        site = first.partition(" ")[0]
        detail += f"; {len(changed)} layers in all" if len(changed) > 1 else ""
        kind = "converted" if any(self._said[name] for name in changed) else "unconverted"
        return known_from_birth(self._model), [Notice(kind, site, detail)]

    def _news_of_te(self) -> tuple[Precision, list[Notice]]:
        told = {name: said for name, said in self._latest.items() if said != self._told.get(name)}
        notices = [
            Notice("precision_changed", name, _change(self._told[name], said))
            for name, said in told.items()
            if name in self._told
        ]
        self._told |= told
        self._latest = {}
        words = {_sized(name, self._sizes): said for name, said in told.items()}
        place = f"watch, step {self._recorder.step}: {self._path}"
        if words and (line := unlike(place, words)) is not None:
            notices.append(Notice("unlike", line.partition(" ")[0], line))
        return told, notices


def _outermost_of_te(modules: dict[str, nn.Module]) -> list[str]:
    outermost: list[str] = []  # inside of te.ops.Sequential no hook is called
    for name, module in modules.items():
        inside = any(name.startswith(f"{outer}.") or not outer for outer in outermost)
        if te_casts.te_name(module) is not None and not inside:
            outermost.append(name)
    return outermost


def _change(before: dict[str, str], now: dict[str, str]) -> str:
    uses = dict.fromkeys((*now, *before))
    changed = [use for use in uses if now.get(use) != before.get(use)]
    use, others = changed[0], f"; so {len(changed)} of {len(uses)} operands"
    was, became = (said.get(use, "not converted") for said in (before, now))
    return f"{use} was {was} and is {became}{others if len(changed) > 1 else ''}"


def _weights_of(layer: nn.Module, is_te: bool) -> list[nn.Parameter]:
    if is_te:
        return [one for one in layer.parameters() if one.dim() >= 2]
    weight = layer._parameters.get("weight")
    return [] if weight is None else [weight]


class _Seen:
    """Whether something happened. A compiled model notes it too, without a break in its graph."""

    def __init__(self) -> None:
        self.forward = self.gradient = self.is_hooked = False

    def ran(self, *_: Any) -> None:
        self.forward = self.forward or torch.is_grad_enabled()

    def got_gradient(self, _: Tensor) -> None:
        self.gradient = True


class _Calls:
    """Which layers that say their precision are run by the first step that trains."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        named = dict(watched_modules(model))
        self._layers = {name: named[name] for name in known_from_birth(model)}
        # What TE runs inside of its own modules no hook shows: all in one runs with it.
        self._layers |= {name: named[name] for name in _outermost_of_te(named)}
        self._seen = {name: _Seen() for name in self._layers}
        self._root = _Seen()
        self._handles: list[Any] = []

    def attach(self) -> list[Any]:
        for name, layer in self._layers.items():
            seen, is_te = self._seen[name], te_casts.te_name(layer) is not None
            weights = [w for w in _weights_of(layer, is_te) if w.requires_grad]
            if weights:
                self._handles.append(layer.register_forward_hook(OfOneModel(seen.ran)))
            for weight in weights:
                # Not `.grad` after the step: what another process has got may be in it.
                self._handles.append(weight.register_hook(seen.got_gradient))  # type: ignore[no-untyped-call]
        self._handles += self._attach_to_whole()
        if self._handles:
            self._handles.append(self._model.register_forward_hook(OfOneModel(self._root.ran)))
        return [self]

    def remove(self) -> None:
        """Leave no hook behind."""
        while self._handles:
            self._handles.pop().remove()

    def _attach_to_whole(self) -> list[Any]:
        """Before the forward of a module that FSDP2 gathers, and after it has: on the weights that
        it has then, once."""
        fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # whoever has sharded has imported it
        if fsdp is None:
            return []
        of_unit: dict[nn.Module, list[tuple[nn.Module, _Seen]]] = {}
        units = [(n, m) for n, m in watched_modules(self._model) if isinstance(m, fsdp.FSDPModule)]
        for name, layer in self._layers.items():
            around = [m for n, m in units if n in ("", name) or name.startswith(f"{n}.")]
            if around:  # the innermost
                of_unit.setdefault(around[-1], []).append((layer, self._seen[name]))
        return [
            unit.register_forward_pre_hook(OfOneModel(partial(self._gathered, layers)))
            for unit, layers in of_unit.items()
        ]

    def _gathered(self, layers: list[tuple[nn.Module, _Seen]], *_: Any) -> None:
        if not torch.is_grad_enabled():
            return
        for layer, seen in layers:
            weights = _weights_of(layer, te_casts.te_name(layer) is not None)
            for weight in () if seen.is_hooked else weights:
                if weight.requires_grad:
                    self._handles.append(weight.register_hook(seen.got_gradient))  # type: ignore[no-untyped-call]
            seen.is_hooked = True

    def not_run(self) -> list[Notice]:
        """Once, after the first step that trained from its forward on."""
        trained = any(seen.gradient for seen in self._seen.values())
        if not trained or not (self._root.forward or any(s.forward for s in self._seen.values())):
            return []
        self.remove()
        there = dict(watched_modules(self._model))
        found = []
        for name, layer in self._layers.items():
            if reason := self._why_not(layer, there.get(name), self._seen[name]):
                found.append(Notice("not_run", name, reason))
        self._layers, self._seen = {}, {}
        return found

    def _why_not(self, layer: nn.Module, now: nn.Module | None, seen: _Seen) -> str:
        if now is not layer:
            return f"it is {'no longer in the model' if now is None else 'another layer now'}"
        if seen.gradient and not seen.forward:
            return (
                "its weight got a gradient and it did not run: something computes with the weight"
            )
        replaced: Any = vars(layer).get("forward")
        while hasattr(replaced, "__wrapped__"):  # libraries that go on to call the layer's own
            replaced = replaced.__wrapped__
        if replaced is not None and getattr(replaced, "__func__", None) is not type(layer).forward:
            return "its forward has been replaced"
        return ""
