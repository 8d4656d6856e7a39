"""Transformer Engine's own Python code, run on a CPU, as an oracle.

With a stand-in for its compiled extension (`transformer_engine_stand_in.py`) TE's modules, recipes,
scale updates and reference quantizers run unchanged. Two kinds of oracle come of it, and they must
not be confused:

* TE's reference quantizers and `_amax_and_scale_update` are arithmetic by TE's authors. The
  stand-in has no part in it.
* `Linear` and `LayerNormMLP` decide *which* tensor is cast *when*, with whose scale, and which
  codes enter which GEMM. The casts, GEMMs and activations themselves are the stand-in's: such a
  run checks the wiring, never a kernel.

All of it lives in a worker process: patched `torch.cuda`, environment and `sys.modules` end with
it. `TransformerEngine()` starts one (4 to 5 s, the import of TE); calling it runs a function of
this module there; tensors travel through the worker's pipes as `torch.save` writes them.

    with TransformerEngine() as te:
        codes = te(current_scaling, tensor, dtype=torch.float8_e4m3fn, power_of_two=False)

Rejected: patching inside pytest's process and undoing it. TE keeps global state, caches what it
asked of the device, and registers itself with torch; none of that can be undone.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
import transformer_engine_stand_in as stand_in
from torch import Tensor, nn

# --- the client: pytest's process --------------------------------------------------------------


class TransformerEngine:
    """A worker in which TE runs on the CPU; a context manager, for it is a process."""

    def __init__(self) -> None:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("NVTE_")
        }
        environment |= {
            "NVTE_PROJECT_BUILDING": "1",  # do not look for the compiled libraries
            "NVTE_TORCH_COMPILE": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
        }
        code = f"import {__name__} as worker; worker.serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def __enter__(self) -> TransformerEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # the end of its input ends the worker

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `function`, one of this module, returns in the worker; its error is raised here."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            _send(self._process.stdin, (function, args, kwargs))
            raised, result = _receive(self._process.stdout)
        except (EOFError, BrokenPipeError):
            raise RuntimeError(f"the worker died: exit status {self._process.wait()}") from None
        if raised:
            raise RuntimeError(f"in the worker:\n{result}")
        return result


def _send(stream: IO[bytes], message: Any) -> None:
    # Not pickle alone: it cannot read back a tensor of FP8 codes. torch.save can.
    buffer = io.BytesIO()
    torch.save(message, buffer)
    pickle.dump(buffer.getvalue(), stream)
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    return torch.load(io.BytesIO(pickle.load(stream)), weights_only=False)


def serve() -> None:
    """The worker: for each call on its standard input an answer on its standard output."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed goes to standard error
    torch.set_num_threads(1)
    stand_in.install()
    while True:
        try:
            function, args, kwargs = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = (False, function(*args, **kwargs))
        except Exception:
            answer = (True, traceback.format_exc())
        _send(answers, answer)


# --- what the worker answers -------------------------------------------------------------------


def current_scaling(
    tensor: Tensor, dtype: torch.dtype, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scale_inv of TE's reference, row-wise and of the transpose."""
    from transformer_engine.pytorch.custom_recipes import reference_current_scaling as reference

    quantizer = reference.CurrentScalingQuantizerRef(dtype=dtype, pow_2_scales=power_of_two)
    done = quantizer.quantize(tensor)
    return done.data, done.scale, done.data_t, done.scale_t


def current_scaling_scales(
    amaxes: Tensor, tensor_dtype: torch.dtype, dtype: torch.dtype, power_of_two: bool
) -> Tensor:
    """The scale of TE's reference for each amax, [n] -> [n]."""
    from transformer_engine.pytorch.custom_recipes import reference_current_scaling as reference

    scale, _, _ = reference._scale_from_amax_tensor(
        tensor_dtype, amaxes, dtype, eps=0.0, pow_2_scales=power_of_two
    )
    return scale


def nvfp4(
    tensor: Tensor, tile: tuple[int, int], hadamard: bool, signs: bool = True
) -> dict[str, Tensor]:
    """Codes (two E2M1 in a byte), block scales (E4M3) and amax of TE's reference, both ways."""
    from transformer_engine.pytorch.custom_recipes import reference_nvfp4 as reference
    from transformer_engine.pytorch.custom_recipes.reference_utils import Fp4Formats

    quantizer = reference.NVFP4QuantizerRef(
        dtype=Fp4Formats.E2M1,
        quant_tile_shape=tile,
        with_rht=hadamard,
        with_random_sign_mask=signs,
    )
    done = quantizer.quantize(tensor)
    return {
        "rowwise codes": done.data,
        "rowwise scales": done.scale,
        "rowwise amax": done.global_amax_row,
        "columnwise codes": done.data_t,
        "columnwise scales": done.scale_t,
        "columnwise amax": done.global_amax_col,
    }


def scale_trajectory(
    amaxes: Tensor, fp8_max: float, recipe: dict[str, Any]
) -> list[tuple[Tensor, Tensor]]:
    """(amax_history, scale) after each step of TE's unfused update; amaxes [steps, tensors]."""
    from transformer_engine.common.recipe import DelayedScaling
    from transformer_engine.pytorch.quantization import _amax_and_scale_update

    settings = DelayedScaling(**recipe)
    history = torch.zeros(settings.amax_history_len, amaxes.shape[1])
    scale = torch.ones(amaxes.shape[1])
    trajectory = []
    for amax in amaxes:
        history[0] = amax
        _amax_and_scale_update(history, scale, fp8_max, settings)
        trajectory.append((history.clone(), scale.clone()))
    return trajectory


def train(
    kind: str,
    settings: dict[str, Any],
    parameters: dict[str, Tensor],
    inputs: Tensor,
    gradients: Tensor,
    recipe: tuple[str, dict[str, Any]],
    learning_rate: float = 0.0,
    gemm_block: int | None = None,
) -> list[dict[str, Tensor]]:
    """Steps of one TE module under `autocast(recipe)`, plain gradient descent between them.

    `inputs` and `gradients` are [steps, ...]: a step's input and the gradient of its output. Each
    step gives `output`, `input.grad`, `NAME.grad`, and under delayed scaling the `scale` and
    `amax_history` of forward and backward as they are after the step. `gemm_block` is
    the stand-in's GEMM_BLOCK.
    """
    import transformer_engine.common.recipe as recipes
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    stand_in.GEMM_BLOCK = gemm_block
    FP8GlobalStateManager.reset()  # it would go on to move the scales of an earlier call's module
    settings_of_recipe = dict(recipe[1])
    if "fp8_format" in settings_of_recipe:
        settings_of_recipe["fp8_format"] = recipes.Format[settings_of_recipe["fp8_format"]]
    chosen = getattr(recipes, recipe[0])(**settings_of_recipe)
    module = getattr(te, kind)(**settings, params_dtype=inputs.dtype, device="cpu")
    assert set(parameters) == {name for name, _ in module.named_parameters()}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(parameters[name])
    steps = []
    for given, gradient in zip(inputs, gradients, strict=True):
        step = given.clone().requires_grad_()
        module.zero_grad(set_to_none=True)
        with te.autocast(enabled=True, recipe=chosen):
            output = module(step)
        output = output[0] if isinstance(output, tuple) else output
        output.backward(gradient)
        seen = {"output": output.detach(), "input.grad": step.grad}
        for name, parameter in module.named_parameters():
            seen[f"{name}.grad"] = parameter.grad.clone()
            with torch.no_grad():
                parameter.sub_(learning_rate * parameter.grad)
        if recipe[0] == "DelayedScaling":
            seen |= _state(module)
        steps.append(seen)
    return steps


# What a training loop may do with one layer; both sides run these. `inputs` and `gradients`: two.

Region = Callable[[], contextlib.AbstractContextManager[Any]]


def one_step(layer: nn.Module, region: Region, inputs: Tensor, gradients: Tensor) -> None:
    with region():
        output = layer(inputs[0])
    output.backward(gradients[0])


def two_micro_batches(layer: nn.Module, region: Region, inputs: Tensor, gradients: Tensor) -> None:
    for given, gradient in zip(inputs, gradients, strict=True):
        with region():
            output = layer(given)
        output.backward(gradient)


def two_forwards(layer: nn.Module, region: Region, inputs: Tensor, gradients: Tensor) -> None:
    with region():
        outputs = [layer(given) for given in inputs]
    torch.autograd.backward(outputs, list(gradients))


def two_backwards(layer: nn.Module, region: Region, inputs: Tensor, gradients: Tensor) -> None:
    with region():
        outputs = [layer(given) for given in inputs]
    for output, gradient in zip(outputs, gradients, strict=True):
        output.backward(gradient)


def backward_inside(layer: nn.Module, region: Region, inputs: Tensor, gradients: Tensor) -> None:
    with region():
        layer(inputs[0]).backward(gradients[0])


def nested(layer: nn.Module, region: Region, inputs: Tensor, gradients: Tensor) -> None:
    with region():
        with region():
            output = layer(inputs[0])
        other = layer(inputs[1])
    torch.autograd.backward([output, other], list(gradients))


def forward_alone(layer: nn.Module, region: Region, inputs: Tensor, gradients: Tensor) -> None:
    with region():
        layer(inputs[0])


def evaluation(layer: nn.Module, region: Region, inputs: Tensor, gradients: Tensor) -> None:
    with torch.no_grad(), region():
        layer(inputs[0])


def evaluation_inside(layer: nn.Module, region: Region, inputs: Tensor, gradients: Tensor) -> None:
    with region(), torch.no_grad():
        layer(inputs[0])


def states_of_linear(
    loop: list[Callable[..., None]],
    weight: Tensor,
    inputs: Tensor,
    gradients: Tensor,
    recipe: dict[str, Any],
) -> list[dict[str, Tensor]]:
    """Scales and histories of a TE Linear under delayed scaling after each part of the loop;
    inputs and gradients are [parts, 2, ...]."""
    import transformer_engine.common.recipe as recipes
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()
    layer = te.Linear(weight.shape[1], weight.shape[0], bias=False, device="cpu")
    with torch.no_grad():
        layer.weight.copy_(weight)
    chosen = recipes.DelayedScaling(**recipe)
    states = []
    for part, *batch in zip(loop, inputs, gradients, strict=True):
        part(layer, lambda: te.autocast(enabled=True, recipe=chosen), *batch)
        states.append(_state(layer))
    return states


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {
        f"{way} {what}": getattr(module.fp8_meta[key], what).clone()
        for key, way in (("scaling_fwd", "forward"), ("scaling_bwd", "backward"))
        for what in ("scale", "amax_history")
    }


# Functions a recipe may name; they are pickled by their names, so they live here.


def latest(amax_history: Tensor) -> Tensor:
    """The amax of the step: [steps, tensors] -> [tensors], or [steps] -> []."""
    return amax_history[0].clone()


def second_largest(amax_history: Tensor) -> Tensor:
    """The second largest of the history: [steps, tensors] -> [tensors], or [steps] -> []."""
    return amax_history.topk(2, dim=0).values[1]


def seven(amax_history: Tensor) -> Tensor:
    """7, whatever was seen: 448 / 7 and 57344 / 7 are powers of two, exact in every formula."""
    return torch.full_like(amax_history[0], 7.0)


def halved_scale(amax: Tensor, scale: Tensor, fp8_max: float, recipe: object) -> Tensor:
    """A `scaling_factor_compute_algo` in which every argument has a part."""
    del recipe
    room = torch.div(torch.full_like(amax, fp8_max), amax + 1.0)
    return torch.where(amax > 0, 0.5 * torch.minimum(room, 4.0 * scale), scale)


# --- how answers are compared ------------------------------------------------------------------


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns, so that -0 is not 0, and NaN (made one NaN) equals itself."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    pattern = tensor.contiguous().view(whole)
    if tensor.element_size() == 1:
        return pattern
    return torch.where(tensor.isnan(), torch.full_like(pattern, -1), pattern)


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    """Same dtype, same shape, same bits."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    wrong = bits(ours) != bits(theirs)
    if wrong.any():
        first = f"{ours[wrong][0].item()!r} for {theirs[wrong][0].item()!r}"
        raise AssertionError(f"{int(wrong.sum())} of {wrong.numel()} differ, first {first}")
