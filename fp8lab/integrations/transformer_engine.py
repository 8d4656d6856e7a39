"""Tensors of Transformer Engine's layers, by way of its own debug features, into a recording.

`watch` sees the gates of TE's modules by itself. This feature of nvidia-dlframework-inspect feeds
it what only TE's debug path shows: inputs, weights, output gradients, outputs and the gradients of
both GEMMs, of any TE layer, chosen in the YAML that TE's other features are chosen in:

    fp8lab:
      enabled: True
      layers: {layer_name_regex_pattern: ".*fc2"}
      transformer_engine:
        FP8LabTensors: {enabled: True, tensors: [gradient, wgrad], freq: 10, start_step: 100}

    transformer_engine.register()                  # before `initialize`
    nvdlfw_inspect.api.initialize("features.yaml", transformer_engine.feature_dirs())
    model = ...                                    # TE wants its layers built afterwards
    with fp8lab.watch(model, "runs/mine") as watch, transformer_engine.feeding(watch, model):
        ...                                        # each step: watch.step(...), then api.step()

Options are those of TE's features: `tensors` or `tensors_struct`, of activation, weight, gradient,
output, wgrad and dgrad; `freq`, `start_step`, `end_step`, `start_end_list`. Rows have fp8lab's
words: the product is `mlp:product`, whatever TE calls its layer.

Cost: TE's debug path, on the steps where a feature asks for a tensor. That path quantises the
rounded BF16 product where TE's kernel quantises the FP32 one, so under delayed and current scaling
**training in it is not equal to the bit to training without it**: the one thing that fp8lab watches
and changes. Rejected: a file for `feature_dirs`. Every file beside it would be executed, each
anonymously, and one named after this module would hide TE from them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fp8lab.casting import Cast, cast_for
from fp8lab.plan import from_te
from fp8lab.recipe import DelayedScaling, Operand, Recipe

_NAMESPACE = "transformer_engine"
# TE's name of a tensor -> ours.
_WORDS = {
    "activation": "input",
    "weight": "weight",
    "gradient": "grad_output",
    "output": "output",
    "wgrad": "grad_weight",
    "dgrad": "grad_input",
}
_OPERANDS: dict[str, Operand] = {
    "activation": "input",
    "weight": "weight",
    "gradient": "grad_output",
}
_OPTIONS = (
    *("enabled", "tensors", "tensors_struct", "tensor"),
    *("freq", "start_step", "end_step", "start_end_list"),
)
# Of a gated LayerNormMLP, TE's layer and tensor -> what a feed-forward calls it. What fc1 gives out
# is gate and up side by side.
_OF_THE_GATE = {
    ("fc1", "output"): ("gate", "up"),
    ("fc1", "gradient"): ("grad_gate", "grad_up"),
    ("fc2", "activation"): ("product",),
    ("fc2", "output"): ("output",),
    ("fc2", "gradient"): ("grad_output",),
}


class Sink(Protocol):
    """Who is fed: `fp8lab.watch` returns one."""

    def see(self, site: str, tensor: Tensor, how: Cast | None = None) -> None: ...


class _Feed:
    """A sink, and which TE layer is which module of the model."""

    def __init__(self, sink: Sink, model: nn.Module) -> None:
        self.sink = sink
        self._recipes: dict[str, Recipe] = {}
        self._gates: dict[str, tuple[str, str, int]] = {}  # TE's name -> path, part, hidden
        self._layers: dict[str, str] = {}
        for path, module in model.named_modules():
            name = getattr(module, "name", None)
            if not isinstance(name, str):
                continue
            self._layers[name] = path or "."
            if hasattr(module, "fc1_weight"):
                hidden = module.fc2_weight.shape[1]
                for part in ("fc1", "fc2"):
                    if module.fc1_weight.shape[0] == 2 * hidden:
                        self._gates[f"{name}.{part}"] = path or ".", part, hidden
                    self._layers[f"{name}.{part}"] = f"{path}.{part}".lstrip(".")

    def sites(self, layer: str, tensor: str, width: int) -> tuple[str, ...]:
        """The rows that TE's `tensor` of `layer` belongs to; its halves, if there are two."""
        path, part, hidden = self._gates.get(layer, ("", "", 0))
        if (part, tensor) in _OF_THE_GATE:
            return tuple(f"{path}:{word}" for word in _OF_THE_GATE[part, tensor])
        if (part, tensor, width) == ("fc1", "dgrad", hidden):  # TE hands out that of fc2 as fc1's
            return (f"{path}:grad_product",)
        return (f"{self._layers.get(layer, layer)}:{_WORDS[tensor]}",)

    def recipe(self, layer: str) -> Recipe | None:
        """The recipe of the layer's last forward: in a backward the region is over."""
        manager = sys.modules["transformer_engine.pytorch.quantization"].FP8GlobalStateManager
        if manager.is_fp8_enabled():
            try:
                self._recipes[layer] = from_te(manager.get_fp8_recipe())
            except ValueError:  # nothing that fp8lab has a word for
                self._recipes.pop(layer, None)
        return self._recipes.get(layer)


_feeds: list[_Feed] = []  # the features have no arguments but those of the YAML


@contextmanager
def feeding(sink: Sink, model: nn.Module) -> Iterator[None]:
    """Feed what the features see to `sink` while the `with` lasts.

    `model` says which module of it a TE layer is. Feed what the sink does not see by itself: two
    sources of one row count as two micro-batches.
    """
    feed = _Feed(sink, model)
    _feeds.append(feed)
    try:
        yield
    finally:
        _feeds.remove(feed)


def feature_dirs() -> list[str]:
    """TE's own features, which `nvdlfw_inspect.api.initialize` has to be given."""
    import transformer_engine

    assert transformer_engine.__file__ is not None
    return [str(Path(transformer_engine.__file__).parent / "debug" / "features")]


def register() -> None:
    """Make `FP8LabTensors` known; before each `nvdlfw_inspect.api.initialize`.

    Raises ImportError without nvdlfw-inspect or Transformer Engine.
    """
    from nvdlfw_inspect.registry import NamespaceData, Registry, api_method
    from transformer_engine.debug.features.api import TEConfigAPIMapper
    from transformer_engine.debug.features.utils import next_enabled_iter

    def due(config: Any, iteration: int) -> tuple[bool, int | None]:
        steps = map(config.get, ("start_step", "end_step", "start_end_list"))
        now, following = next_enabled_iter(*steps, config.get("freq", 1), iteration)
        return now, following

    class FP8LabTensors(TEConfigAPIMapper):  # type: ignore[misc]
        """Feeds tensors to fp8lab; see `fp8lab.integrations.transformer_engine`."""

        def parse_config_and_api(self, config: Any, **kwargs: Any) -> Any:
            _check(config)
            return super().parse_config_and_api(config, **kwargs)

        @api_method  # type: ignore[untyped-decorator]
        def inspect_tensor_enabled(
            self, config: Any, layer_name: str, tensor_name: str, iteration: int
        ) -> tuple[bool, int | None]:
            run, following = due(config, iteration)
            return bool(_feeds) and run, following

        @api_method  # type: ignore[untyped-decorator]
        def inspect_tensor(
            self,
            config: Any,
            layer_name: str,
            tensor_name: str,
            iteration: int,
            tp_group: Any,
            tensor: Tensor | None,
            rowwise_quantized_tensor: Any = None,
            columnwise_quantized_tensor: Any = None,
            quantizer: Any = None,
            tp_size: int = 1,
        ) -> None:
            # TE asks every feature that names the tensor when any of them wants it.
            if not (due(config, iteration)[0] and _counts(tensor_name)):
                return
            if tensor is None:  # a weight that is stored in FP8
                tensor = rowwise_quantized_tensor.dequantize()
            is_quantised = hasattr(rowwise_quantized_tensor, "_quantizer")
            # A scale that is made of several ranks' amax cannot be made again here.
            is_known = is_quantised and not getattr(quantizer, "with_amax_reduction", False)
            for feed in _feeds:
                recipe = feed.recipe(layer_name) if is_known else None
                _feed(feed, layer_name, tensor_name, tensor.detach(), recipe, quantizer)

    # As `Registry.register_feature` does before it knows TE's namespace. Later it would write to a
    # log that only `initialize` opens.
    known = Registry.data.setdefault(_NAMESPACE, NamespaceData(_NAMESPACE, None))
    known.deferred_features.append(FP8LabTensors)


def _check(config: Any) -> None:
    """Raises ValueError, in one line, for an option or a tensor that does not exist."""
    for key in config:
        if key not in _OPTIONS:
            choice = ", ".join(_OPTIONS)
            raise ValueError(f"FP8LabTensors: {key}: unknown option, expected one of {choice}")
    sections = config.get("tensors_struct", [])
    for name in [*config.get("tensors", []), *(section.get("tensor") for section in sections)]:
        if name not in _WORDS:
            choice = ", ".join(_WORDS)
            raise ValueError(f"FP8LabTensors: tensors: {name!r}, expected one of {choice}")
    for section in sections:
        _check(section)


def _counts(tensor_name: str) -> bool:
    """Whether this is training and no checkpoint's second forward (as in `probes`)."""
    in_backward = torch._C._current_graph_task_id() != -1
    if in_backward or tensor_name in ("gradient", "wgrad", "dgrad"):
        return in_backward and tensor_name in ("gradient", "wgrad", "dgrad")
    # TE's autograd functions run without gradients; so does an evaluation, but in no function.
    return torch.is_grad_enabled() or not torch._C._is_fwd_grad_enabled()


@torch.no_grad()
def _feed(
    feed: _Feed, layer: str, name: str, tensor: Tensor, recipe: Recipe | None, quantizer: Any
) -> None:
    sites = feed.sites(layer, name, tensor.shape[-1])
    for site, part in zip(sites, tensor.chunk(len(sites), dim=-1), strict=True):
        how: Cast | None = None
        if recipe is not None and name in _OPERANDS:
            # Of a half only a scale that TE holds is known: one made just in time was the whole's.
            scale = quantizer.scale.reshape(()) if isinstance(recipe, DelayedScaling) else None
            if len(sites) == 1 or scale is not None:
                how = cast_for(part, recipe, _OPERANDS[name], scale)
        feed.sink.see(site, part, how)
