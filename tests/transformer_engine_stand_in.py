"""A stand-in for `transformer_engine_torch`, the compiled extension of Transformer Engine.

TE's wheel is pure Python around that extension. With this in `sys.modules`, and a `torch.cuda` that
claims a device, its modules run forward and backward on a CPU. What is here is written from the
formulas of TE's kernels, each named where it is used, and is as much as `Linear` and `LayerNormMLP`
need under the two per-tensor recipes, and the casts of block scaling; anything else raises
NotImplementedError.

`install` changes the process for good: it belongs into the worker of `transformer_engine_on_cpu`
and nowhere else.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import importlib.machinery
import itertools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPSILON = 1e-5
FLOAT32_MAX = torch.finfo(torch.float32).max
GEMM_BLOCK: int | None = None  # see `generic_gemm`
CURRENT_BEHIND_A_NORM = False  # see `rmsnorm_fwd`

E4M3, E5M2 = 7, 8  # as DType below
TORCH_DTYPES = {
    4: torch.float32,
    5: torch.float16,
    6: torch.bfloat16,
    E4M3: torch.float8_e4m3fn,
    E5M2: torch.float8_e5m2,
}


class _Anything(type):
    """A class of which every attribute is 0: an enumeration that is only ever looked at."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        return 0


class _Extension(types.ModuleType):
    """A module in which every name exists; calling one that is not written below is an error."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        placeholder = _Anything(name, (), {"__init__": functools.partialmethod(_missing, name)})
        setattr(self, name, placeholder)
        return placeholder


def _missing(_: object, name: str, *args: Any, **kwargs: Any) -> None:
    raise NotImplementedError(f"transformer_engine_torch.{name}: not in the stand-in")


def _numbered(name: str, members: list[str]) -> type[enum.IntEnum]:
    return enum.IntEnum(name, {member: number for number, member in enumerate(members)})


def install() -> None:
    """Make `import transformer_engine.pytorch` work in this process, for good, and import it."""
    extension = _Extension("transformer_engine_torch")
    extension.__spec__ = None
    extension.DType = enum.IntEnum(
        "DType",
        {
            "kByte": 0,
            "kInt32": 2,
            "kFloat32": 4,
            "kFloat16": 5,
            "kBFloat16": 6,
            "kFloat8E4M3": E4M3,
            "kFloat8E5M2": E5M2,
            "kFloat4E2M1": 10,
        },
    )
    forward = [f"GEMM{n}_{tensor}" for n in (1, 2, 3) for tensor in ("INPUT", "WEIGHT", "OUTPUT")]
    backward = [f"GRAD_{tensor}{n}" for n in (1, 2, 3) for tensor in ("OUTPUT", "INPUT")]
    extension.FP8FwdTensors = _numbered("FP8FwdTensors", forward)
    extension.FP8BwdTensors = _numbered("FP8BwdTensors", backward)
    attention = {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}
    extension.NVTE_Fused_Attn_Backend = enum.IntEnum("NVTE_Fused_Attn_Backend", attention)
    extension.get_cudnn_version = lambda: 91900
    for kernel in KERNELS:
        setattr(extension, kernel.__name__, kernel)
    for name in GATES | PLAIN:
        setattr(extension, name, functools.partial(_gated, name))
        backward_name = name.replace("swiglu", "dswiglu") if "_" in name else f"d{name}"
        setattr(extension, backward_name, functools.partial(_gated_backward, name))
    sys.modules["transformer_engine_torch"] = extension
    sys.meta_path.insert(0, _NoTriton())  # type: ignore[arg-type]
    _pretend_cuda()

    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None

    import transformer_engine.pytorch.cpp_extensions.gemm as gemm
    from transformer_engine.pytorch import cpp_extensions, quantization

    cpp_extensions.__getattr__ = functools.partial(getattr, extension)
    gemm.get_cublas_workspace = lambda *_: torch.empty(1)
    create = functools.partial(quantization.RecipeState.create, device=torch.device("cpu"))
    quantization.RecipeState.create = staticmethod(create)
    for module in list(sys.modules.values()):
        if "_empty_tensor" in getattr(module, "__dict__", {}):
            module._empty_tensor = lambda: torch.Tensor()
        if "_get_cuda_rng_state" in getattr(module, "__dict__", {}):  # checkpoints keep it
            module._get_cuda_rng_state = lambda *_, **__: torch.zeros(16, dtype=torch.uint8)
            module._set_cuda_rng_state = lambda *_, **__: None


class _NoTriton:
    """TE's Triton kernels exist as empty modules: they run on a GPU alone."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name.startswith("transformer_engine.pytorch.triton"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _Extension(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _pretend_cuda() -> None:
    """A Hopper: its FP8 GEMMs take transposed copies, so TE's handling of those runs too."""
    properties = types.SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, name="none", total_memory=0
    )
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_properties = lambda *_: properties  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.get_rng_state = lambda *_, **__: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.set_rng_state = lambda *_, **__: None
    torch.cuda.device = lambda *_: contextlib.nullcontext()  # type: ignore[misc, assignment]
    torch.cuda.nvtx.range_push = lambda *_: None
    torch.cuda.nvtx.range_pop = lambda *_: None
    torch.Tensor.is_cuda = True  # type: ignore[assignment, misc]


# --- the kernels ------------------------- ----------------------------------------------------


def _amax(values: Tensor) -> Tensor:
    """max |x| as atomicMax and fmaxf have it: NaN is not there."""
    magnitude = values.abs()
    return torch.where(magnitude.isnan(), torch.zeros_like(magnitude), magnitude).amax().reshape(1)


def _scale_of(amax: Tensor, largest: float, power_of_two: bool, epsilon: float) -> Tensor:
    """recipe_common.cuh: `compute_scale_from_amax`."""
    amax = amax.clamp(min=epsilon)
    scale = torch.div(torch.full_like(amax, largest), amax)  # one division, rounded once
    scale = torch.where(scale.isinf(), torch.full_like(scale, FLOAT32_MAX), scale)
    if power_of_two:
        scale = (scale.view(torch.int32) & -0x800000).view(torch.float32)
    return torch.where((amax > 0) & amax.isfinite(), scale, torch.ones_like(scale))


def _cast(values: Tensor, quantizer: Any, dtype: torch.dtype, amax: Tensor) -> Any:
    """float32 values to a TE tensor, as its two per-tensor quantizers do it."""
    from transformer_engine.pytorch.tensor import float8_tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    code = TORCH_DTYPES[int(quantizer.dtype)]
    largest = torch.finfo(code).max
    if type(quantizer) is float8_tensor.Float8Quantizer:
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))  # in amax_history[0]
        scale = quantizer.scale.reshape(1).clone()
    elif type(quantizer) is float8_tensor.Float8CurrentScalingQuantizer:
        scale = _scale_of(amax, largest, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
    elif type(quantizer).__name__ == "Float8BlockQuantizer":
        return _cast_in_blocks(values, quantizer, dtype)
    else:
        raise NotImplementedError(f"{type(quantizer).__name__}: not in the stand-in")
    data = (values * scale).clamp(-largest, largest).to(code).view(torch.uint8)
    fields = {
        "data": data,
        "fp8_scale_inv": scale.reciprocal(),
        "fp8_dtype": quantizer.dtype,
        "requires_grad": False,
        "quantizer": quantizer,
        "data_transpose": data.reshape(-1, data.shape[-1]).t().contiguous()
        if quantizer.columnwise_usage
        else None,
    }
    if quantizer.internal:
        return Float8TensorStorage(fake_dtype=dtype, **fields)
    return float8_tensor.Float8Tensor(shape=data.shape, dtype=dtype, device=data.device, **fields)


def _cast_in_blocks(values: Tensor, quantizer: Any, dtype: torch.dtype) -> Any:
    """quantize_transpose_vector_blockwise.cu, quantize_transpose_square_blockwise.cu; the scales as
    the quantizer's `get_scale_shape` lays them out. Shapes are whole blocks."""
    from transformer_engine.pytorch.tensor import float8_blockwise_tensor as blockwise

    rows, columns = values.shape
    code, fields = TORCH_DTYPES[int(quantizer.dtype)], {}
    for way, columnwise in (("rowwise", False), ("columnwise", True)):
        tile = (1, 128) if quantizer.block_scaling_dim == 1 else (128, 128)
        tile = tile[::-1] if columnwise else tile
        tiled = values.view(rows // tile[0], tile[0], columns // tile[1], tile[1])
        amax = torch.where(tiled.isnan(), 0.0, tiled.abs()).amax((1, 3))
        largest = torch.finfo(code).max
        scale = _scale_of(amax, largest, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
        most = torch.finfo(dtype).max  # blockwise, what an infinite scale becomes
        scale = torch.where(scale == FLOAT32_MAX, most, scale)
        data = (tiled * scale[:, None, :, None]).clamp(-largest, largest).view(rows, columns)
        data = data.to(code).view(torch.uint8)
        turned = quantizer.block_scaling_dim == 1 and not columnwise
        turned = turned or (quantizer.block_scaling_dim == 2 and columnwise)
        told = scale.reciprocal().t() if turned else scale.reciprocal()
        padded = torch.zeros(quantizer.get_scale_shape(values.shape, columnwise))
        padded[: told.shape[0], : told.shape[1]] = told
        fields[f"{way}_data"] = data.t().contiguous() if columnwise else data
        fields[f"{way}_scale_inv"] = padded
    fields |= {"fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    fields["is_2D_scaled"] = quantizer.block_scaling_dim == 2
    if quantizer.internal:
        return blockwise.Float8BlockwiseQTensorStorage(**fields, fake_dtype=dtype)
    tensor = blockwise.Float8BlockwiseQTensor
    return tensor(shape=values.shape, dtype=dtype, device=values.device, **fields)


def quantize(tensor: Tensor, quantizer: Any, out: Any = None, noop: Any = None) -> Any:
    if out is not None or noop is not None:
        raise NotImplementedError("quantize in place: not in the stand-in")
    values = tensor.detach().float()
    return _cast(values, quantizer, tensor.dtype, _amax(values))


def dequantize(tensor: Any, dtype: Any) -> Tensor:
    values = tensor._data.view(TORCH_DTYPES[int(tensor._fp8_dtype)]).float() * tensor._scale_inv
    return values.to(TORCH_DTYPES[int(dtype)])


def bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    summed = gradient.float().reshape(-1, gradient.shape[-1]).sum(0)
    return summed.to(gradient.dtype), quantize(gradient, quantizer)


def fp8_transpose(data: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    return data.reshape(-1, data.shape[-1]).t().contiguous()


# activation/*.cu, util/math.h: what is done to all of it, or to the first half, and the second half
# is a factor.
PLAIN: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "srelu": lambda x: F.relu(x).square(),
    "silu": F.silu,
}
GATES: dict[str, Callable[..., Tensor]] = {
    "swiglu": F.silu,
    "glu": torch.sigmoid,
    "geglu": functools.partial(F.gelu, approximate="tanh"),
    "qgeglu": lambda gate: gate * torch.sigmoid(1.702 * gate),
    "reglu": F.relu,
    "sreglu": lambda gate: F.relu(gate).square(),
    "clamped_swiglu": lambda gate, limit=7.0, alpha=1.702: (
        gate.clamp(max=limit) * torch.sigmoid(alpha * gate.clamp(max=limit))
    ),
}


def _product(name: str, gate_and_up: Tensor, parameters: dict[str, float]) -> Tensor:
    if name in PLAIN:
        return PLAIN[name](gate_and_up.float())
    gate, up = gate_and_up.float().chunk(2, dim=-1)
    if name == "clamped_swiglu":
        limit = parameters.get("limit", 7.0)
        up = up.clamp(-limit, limit) + parameters.get("glu_linear_offset", 1.0)
        return GATES[name](gate, limit, parameters.get("alpha", 1.702)) * up
    return GATES[name](gate.contiguous()) * up


def _rounded_or_cast(values: Tensor, dtype: torch.dtype, quantizer: Any) -> Any:
    """activation.cpp: delayed scaling casts the FP32 values; current scaling takes their amax and
    casts what is left of them in the model's dtype."""
    if quantizer is None:
        return values.to(dtype)
    if type(quantizer).__name__ == "Float8Quantizer":
        return _cast(values, quantizer, dtype, _amax(values))
    return _cast(values.to(dtype).float(), quantizer, dtype, _amax(values))


def _gated(
    name: str, gate_and_up: Tensor, quantizer: Any = None, *given: float, **named: float
) -> Any:
    named |= dict(zip(("limit", "alpha", "glu_linear_offset"), given, strict=False))
    return _rounded_or_cast(_product(name, gate_and_up, named), gate_and_up.dtype, quantizer)


def _gated_backward(
    name: str,
    gradient: Tensor,
    gate_and_up: Tensor,
    quantizer: Any = None,
    *given: float,
    **named: float,
) -> Any:
    named |= dict(zip(("limit", "alpha", "glu_linear_offset"), given, strict=False))
    with torch.enable_grad():
        leaf = gate_and_up.detach().float().requires_grad_()
        (both,) = torch.autograd.grad(_product(name, leaf, named), leaf, gradient.float())
    return _rounded_or_cast(both, gradient.dtype, quantizer)


def _norm(tensor: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(tensor.float(), weight.shape, weight.float(), NORM_EPSILON)


def rmsnorm_fwd(
    tensor: Tensor,
    weight: Tensor,
    epsilon: float,
    out: Any,
    quantizer: Any,
    dtype: Any,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[Any, None, Tensor]:
    """normalization.cpp: delayed scaling casts the FP32 result of the norm. What current scaling
    casts in BF16 is not known here; with CURRENT_BEHIND_A_NORM a run goes on with the rounded one,
    and shows that it runs, nothing more."""
    if epsilon != NORM_EPSILON or zero_centered or out is not None:
        raise NotImplementedError("rmsnorm_fwd: not in the stand-in")
    normed = _norm(tensor, weight)
    rsigma = torch.rsqrt(tensor.float().square().mean(-1) + epsilon)
    if quantizer is None:
        return normed.to(tensor.dtype), None, rsigma
    if type(quantizer).__name__ != "Float8Quantizer" and tensor.dtype != torch.float32:
        if not CURRENT_BEHIND_A_NORM:
            raise NotImplementedError("a fused norm under current scaling: not in the stand-in")
        normed = normed.to(tensor.dtype).float()
    return _cast(normed, quantizer, tensor.dtype, _amax(normed)), None, rsigma


def rmsnorm_bwd(
    gradient: Tensor,
    tensor: Tensor,
    rsigma: Tensor,
    weight: Tensor,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaves = tensor.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
        to_tensor, to_weight = torch.autograd.grad(_norm(*leaves), leaves, gradient.float())
    return to_tensor.to(tensor.dtype), to_weight.to(weight.dtype)


def _operand(operand: Any, transposed: bool) -> Tensor:
    """What a GEMM reads: codes as they lie in memory, or their transposed copy, in FP32; of an
    operand without codes its values.

    A Hopper's FP8 GEMM wants both operands with the summed axis last, so of an operand whose other
    axis is last it reads the transposed copy, and fails if there is none.
    """
    if not hasattr(operand, "_fp8_dtype"):
        return operand.float().reshape(-1, operand.shape[-1])
    code = TORCH_DTYPES[int(operand._fp8_dtype)]
    if transposed:
        assert not operand._transpose_invalid
        data = operand._transpose.t().contiguous()
    else:
        data = operand._data
    values = data.view(code).float() * operand._scale_inv
    return values.reshape(-1, values.shape[-1])


def generic_gemm(
    a: Any,
    transpose_a: bool,
    b: Any,
    transpose_b: bool,
    out: Any,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_input: Any,
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    split_accumulator: bool,
    **_: Any,
) -> tuple[Tensor, None, None, None]:
    """B times A as cuBLAS's column-major layouts have it: TN output, NN grad_input, NT grad_weight.

    The sums are those of torch's GEMMs in FP32. TE's fc1 holds gate and up in one weight; with
    GEMM_BLOCK output and grad_weight are computed for that many output features at a time, so that
    they sum in the order of two separate layers (an order that cuBLAS does not promise either).
    """
    if (
        gelu
        or accumulate
        or out is not None
        or quantizer is not None
        or (grad and bias is not None)
    ):
        raise NotImplementedError("generic_gemm: not in the stand-in")
    left, right = _operand(b, transpose_b), _operand(a, not transpose_a)
    block = GEMM_BLOCK or max(left.shape[-1], len(right))
    if transpose_a:
        biases = [None] if bias is None else bias.float().split(block)
        parts = zip(right.split(block), itertools.cycle(biases))
        product = torch.cat([F.linear(left, part, its_bias) for part, its_bias in parts], dim=-1)
    elif transpose_b:
        parts = left.split(block, dim=-1)
        product = torch.cat([part.contiguous().t() @ right for part in parts])
    else:
        product = left @ right
    return product.to(TORCH_DTYPES[int(out_dtype)]), None, None, None


def fused_amax_and_scale_update_after_reduction(
    amaxes: Tensor,
    histories: list[Tensor],
    scales: list[Tensor],
    algorithm: str,
    dtype: Any,
    margin: int,
) -> None:
    """delayed_scaling.cu, `kernel_bulk`: one column after the other, each in four sentences."""
    largest = torch.tensor(torch.finfo(TORCH_DTYPES[int(dtype)]).max * 2.0**-margin)
    column = 0
    for history, scale in zip(histories, scales, strict=True):
        for tensor in range(scale.numel()):
            latest = amaxes[column] if amaxes[column] != 0 else history[0, tensor].clone()
            column += 1
            amax = torch.zeros(())
            if latest != 0:
                rolled = torch.cat([history[1:, tensor], latest.reshape(1)])
                amax = _amax(rolled)[0]
                history[:, tensor] = rolled
                history[0, tensor] = 0.0
            if algorithm == "most_recent":
                amax = latest
            if amax.isfinite() and amax > 0:
                scale[tensor] = torch.div(largest, amax).clamp(max=FLOAT32_MAX)


KERNELS: list[Callable[..., Any]] = [
    quantize,
    dequantize,
    bgrad_quantize,
    fp8_transpose,
    rmsnorm_fwd,
    rmsnorm_bwd,
    generic_gemm,
    fused_amax_and_scale_update_after_reduction,
]
