"""`Fp8Linear`: a linear layer whose three GEMMs take operands cast as a recipe says.

    output      = cast(input)       @ cast(weight)^T         [tokens, out]
    grad_input  = cast(grad_output) @ cast(weight)           [tokens, in]
    grad_weight = cast(grad_output)^T @ cast(input)          [out, in]

As in Transformer Engine each operand is cast once and both of its GEMMs use the same codes, forward
operands in E4M3 and gradients in E5M2 under HYBRID. The GEMMs run in FP32 on dequantised values.
Hardware multiplies the codes, exactly, and scales the sum; here each operand and each product is
rounded to FP32 first, by at most 2^-24 of itself, and the order and width of the accumulation are
FP32's. Parameters keep their dtype, as master weights; the output has the dtype of the input.

Delayed scaling needs to know when a step ends. Scales move once per region: `with autocast():`, or
the outermost forward of a converted model, or a bare call of the layer. Forward operands move when
the region closes; gradients when the backward pass ends, or when the region closes if the
backward ran inside it. Nothing moves without gradients (evaluation), and a forward that runs
*inside* a backward pass (activation checkpointing) uses the scales of the forward it repeats; the
first run is the one that counts, with use_reentrant=True too, where it runs without gradients.
Rejected: moving scales inside the layer's own forward, which breaks gradient accumulation.

The state is in two buffers named as TE names them, one column per operand (input, weight,
grad_output); row 0 of the history collects the running step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fp8lab.casting import Cast, absolute_maximum, cast_for, scale_for
from fp8lab.recipe import OPERANDS, DelayedScaling, Operand, Recipe, operand_format


class Fp8Linear(nn.Linear):
    """An `nn.Linear` with emulated low-precision GEMMs.

    `recipes` gives each operand its recipe and may be changed between steps (but not to
    `DelayedScaling` where there was none: its history is allocated at birth). `channel_scale` maps
    an input to float32 [in_features], without a gradient; the input is multiplied by it and the
    weight's columns divided, before either is cast. `gradient_of_saturated` says what an input
    element that saturated receives: its gradient ("straight_through", as TE) or none ("zero").

    Known limits, with activation checkpointing: of two forwards, each its own region, before their
    two backwards, the first is repeated with the second's scales; and an evaluation through
    use_reentrant=True counts as training unless its region was opened without gradients.
    """

    amax_history: Tensor
    scale: Tensor
    _scale_before: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        recipes: dict[Operand, Recipe],
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self._set_up(recipes)

    @classmethod
    def adopt(cls, linear: nn.Linear, recipes: dict[Operand, Recipe]) -> Fp8Linear:
        """Turn a layer into an `Fp8Linear` in place: its parameters, hooks and every reference to
        it, an optimizer's included, stay what they are."""
        linear.__class__ = cls
        converted = cast(Fp8Linear, linear)
        converted._set_up(recipes)
        return converted

    def _set_up(self, recipes: dict[Operand, Recipe]) -> None:
        self.recipes = dict(recipes)
        self.channel_scale: Callable[[Tensor], Tensor] | None = None
        self.gradient_of_saturated: Literal["straight_through", "zero"] = "straight_through"
        delayed = [r for r in recipes.values() if isinstance(r, DelayedScaling)]
        if delayed:
            length = max(recipe.amax_history_len for recipe in delayed)
            device = self.weight.device
            self.register_buffer("amax_history", torch.zeros(length, 3, device=device))
            self.register_buffer("scale", torch.ones(3, device=device))
            self.register_buffer("_scale_before", torch.ones(3, device=device), persistent=False)

    def extra_repr(self) -> str:
        casts = ", ".join(f"{o}={type(r).__name__}" for o, r in self.recipes.items())
        return f"{super().extra_repr()}, {casts}"

    def precision(self) -> dict[Operand, str]:
        """What each operand really is: its format, its recipe, and what is put on top."""
        operands = {
            operand: f"{operand_format(recipe, operand).name} {type(recipe).__name__}"
            for operand, recipe in self.recipes.items()
        }
        if self.channel_scale is not None:
            operands["input"] += ", channels balanced"
        if self.gradient_of_saturated == "zero":
            operands["input"] += ", no gradient where saturated"
        return operands

    def cast_in_force(self, operand: Operand, tensor: Tensor) -> Cast:
        """How this layer casts `tensor` now; changes no state.

        An input is multiplied by the channel scale first, if there is one.
        """
        channel_scale = None
        if operand == "input" and self.channel_scale is not None:
            channel_scale = self.channel_scale(tensor)
            tensor = tensor * channel_scale
        recipe, scale = self.recipes[operand], None
        if isinstance(recipe, DelayedScaling):
            moved_since = operand != "grad_output" and _steps.repeats_forward_of(self)
            scales = self._scale_before if moved_since else self.scale
            # A copy: what was decided for this cast stays when the layer's own scale moves on.
            scale = scales[OPERANDS.index(operand)].clone()
        return cast_for(tensor, recipe, operand, scale)._replace(channel_scale=channel_scale)

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        inputs, weight = self.cast_in_force("input", input), self.weight
        if inputs.channel_scale is not None:
            weight = weight / inputs.channel_scale
        weights = self.cast_in_force("weight", weight)
        if _steps.forward_counts():
            self._record(inputs, "input")
            self._record(weights, "weight")
            _steps.forward_ran(self)
        with torch.autocast(input.device.type, enabled=False):
            output = _Gemms.apply(  # type: ignore[no-untyped-call]
                inputs.tensor, weights.tensor, self.bias, inputs, weights, self
            )
        return cast(Tensor, output).to(input.dtype)  # a channel scale made it float32

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        # `model.bfloat16()` is about parameters: a scale in BF16 would be another scale.
        state = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in state.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # A checkpoint from before the conversion has no FP8 state: it starts afresh, as in TE.
        missing: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        own = (f"{prefix}amax_history", f"{prefix}scale")
        missing_keys += [key for key in missing if not set(own) <= set(missing) or key not in own]

    def _record(self, how: Cast, operand: Operand) -> None:
        if isinstance(how.recipe, DelayedScaling):
            running = self.amax_history[0, OPERANDS.index(operand)]
            torch.maximum(running, absolute_maximum(how.tensor), out=running)

    @torch.no_grad()
    def move_scales(self, *operands: Operand) -> None:
        """End of a step for these operands: a new scale from the history, and the history rolls.

        Source: TE `delayed_scaling.cu` (bulk kernel): the amax is taken over the last
        `amax_history_len` steps, this one included; a step whose amax is 0 leaves the scale and the
        history as they are. With a function TE takes another path (`_amax_and_scale_update`), which
        asks it at every step and always rolls.
        """
        for operand in operands:
            recipe, column = self.recipes[operand], OPERANDS.index(operand)
            if not isinstance(recipe, DelayedScaling):
                continue
            if _ranks() > 1:
                raise RuntimeError("DelayedScaling: emulated amaxes are not reduced over ranks yet")
            if recipe.amax_history_len > len(self.amax_history):
                raise RuntimeError(
                    f"DelayedScaling: amax_history_len={recipe.amax_history_len}, expected at most "
                    f"the {len(self.amax_history)} steps that the layer was converted with"
                )
            history = self.amax_history[: recipe.amax_history_len, column]
            rolled = history.roll(-1)
            if callable(recipe.amax_compute_algo):
                amax = recipe.amax_compute_algo(history)
            else:
                latest = history[0]
                most_recent = recipe.amax_compute_algo == "most_recent"
                amax = latest if most_recent else absolute_maximum(history)
                amax = torch.where(latest == 0, latest, amax)
                rolled = torch.where(latest == 0, history, rolled)
            fmt = operand_format(recipe, operand)
            self._scale_before[column] = self.scale[column]
            self.scale[column] = scale_for(
                amax, fmt, margin=recipe.margin, previous=self.scale[column]
            )
            history.copy_(rolled)
            history[0] = 0.0


def _ranks() -> int:
    distributed = torch.distributed
    started = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if started else 1


class _Gemms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        inputs: Cast,
        weights: Cast,
        layer: Fp8Linear,
    ) -> Tensor:
        quantized_input = inputs.fake_quantized().reshape(-1, layer.in_features)
        quantized_weight = weights.fake_quantized()
        saturated = None
        if layer.gradient_of_saturated == "zero":
            saturated = inputs.saturated()
        ctx.save_for_backward(quantized_input, quantized_weight, saturated)
        ctx.layer, ctx.dtypes, ctx.shape = layer, (input.dtype, weight.dtype), input.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        output = functional.linear(
            quantized_input, quantized_weight, None if bias is None else bias.float()
        )
        return output.to(input.dtype).view(*input.shape[:-1], layer.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        quantized_input, quantized_weight, saturated = ctx.saved_tensors
        layer: Fp8Linear = ctx.layer
        gradient = layer.cast_in_force("grad_output", grad_outputs[0])
        layer._record(gradient, "grad_output")
        _steps.backward_ran(layer)
        quantized = gradient.fake_quantized().reshape(-1, layer.out_features)
        grad_input = grad_weight = grad_bias = None
        # A backward that is called inside torch's autocast would run these GEMMs in BF16.
        with torch.autocast(quantized.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_input = (quantized @ quantized_weight).view(ctx.shape)
                if saturated is not None:
                    grad_input.masked_fill_(saturated, 0.0)
                grad_input = grad_input.to(ctx.dtypes[0])
            if ctx.needs_input_grad[1]:
                grad_weight = (quantized.t() @ quantized_input).to(ctx.dtypes[1])
        if ctx.needs_input_grad[2]:
            # Not a GEMM: TE sums the bias gradient from the unquantised gradient.
            unquantized = grad_outputs[0].reshape(-1, layer.out_features)
            grad_bias = unquantized.float().sum(0).to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, None, None, None


class _Steps:
    """Which layers ran since their scales last moved, and whether a region is open."""

    def __init__(self) -> None:
        self.depth = 0
        self.opened_with_gradients = False
        self.forward_layers: dict[Fp8Linear, None] = {}
        self.backward_layers: dict[Fp8Linear, None] = {}
        self.end_of_backward: Callable[[], object] = lambda: None

    def open(self) -> None:
        if self.depth == 0:
            self.opened_with_gradients = _with_gradients()
        self.depth += 1

    def close(self) -> None:
        # torch also closes a forward that raised in another pre-hook, before it was opened.
        self.depth = max(self.depth - 1, 0)
        if self.depth == 0 and self.opened_with_gradients and not _inside_backward():
            self._move_forward()
            self._move_backward()

    def forward_counts(self) -> bool:
        """Whether the amaxes of the forward that now begins enter the history."""
        if _inside_backward():
            self._await_end_of_backward()
            return False
        return _with_gradients() and (self.depth == 0 or self.opened_with_gradients)

    def forward_ran(self, layer: Fp8Linear) -> None:
        self.forward_layers[layer] = None
        if self.depth == 0:
            self._move_forward()

    def backward_ran(self, layer: Fp8Linear) -> None:
        self.backward_layers[layer] = None
        self._await_end_of_backward()

    def repeats_forward_of(self, layer: Fp8Linear) -> bool:
        """Whether a forward of `layer` now repeats one whose scales have moved since."""
        return _inside_backward() and layer not in self.forward_layers

    def _await_end_of_backward(self) -> None:
        # One callback, on the outermost pass: use_reentrant=True repeats a forward in one pass and
        # runs another inside it. The engine alone owns the callback, so a pass that raised takes it
        # along and leaves nothing behind.
        if self.end_of_backward() is None:
            callback = partial(self._backward_ended)
            self.end_of_backward = weakref.ref(callback)
            torch.autograd.Variable._execution_engine.queue_callback(callback)

    def _backward_ended(self) -> None:
        if self.depth == 0:
            self._move_backward()

    def _move_forward(self) -> None:
        layers, self.forward_layers = self.forward_layers, {}
        for layer in layers:
            layer.move_scales("input", "weight")

    def _move_backward(self) -> None:
        layers, self.backward_layers = self.backward_layers, {}
        for layer in layers:
            layer.move_scales("grad_output")


_steps = _Steps()


def _inside_backward() -> bool:
    # Private, and the only way that tells a recomputed forward from a first one in both kinds of
    # activation checkpointing: with use_reentrant=False gradients are enabled both times.
    return torch._C._current_graph_task_id() != -1


def _with_gradients() -> bool:
    # Or in `autograd.Function.forward`, where use_reentrant=True does its first run, torch's and
    # every library's own: unlike `torch.no_grad` it turns forward-mode gradients off too.
    inside_function = not (torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled())
    return torch.is_grad_enabled() or inside_function


class autocast:
    """One step's region: delayed scales move when the outermost one closes, once.

    Wrap what makes one optimizer step's forward passes (with gradient accumulation, all of them).
    Without it the outermost forward of a converted model is the region.
    """

    def __enter__(self) -> autocast:
        _steps.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _steps.close()


def open_region(*_: object) -> None:
    """Forward pre-hook of a converted model."""
    _steps.open()


def close_region(*_: object) -> None:
    """Forward hook of a converted model, called even if the forward raised."""
    _steps.close()
