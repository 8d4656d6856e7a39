"""The debug statistics of Transformer Engine itself, run on a CPU, as an oracle.

TE's own features (`LogTensorStats`, `LogFp8TensorStats`, `LogNvfp4TensorStats`), its formulas
(`stats_computation.py`), its buffers and their merges run unchanged; so do its tensor classes. What
stands in for a kernel is the cast, and for MXFP8 and NVFP4 the way back: `plain_scaling`, which
knows nothing of fp8lab, makes the codes and the scales, and they are laid out and padded as TE's
quantizers do it. So a test against this checks fp8lab's statistics *and* its casts.

`statistics` and `formulas` are for the worker of `transformer_engine_on_cpu`; this imports neither
fp8lab nor pytest.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from pathlib import Path
from typing import Any

import plain_scaling as plain
import torch
import torch.nn.functional as F
from torch import Tensor

FORMATS = {7: (plain.E4M3, torch.float8_e4m3fn), 8: (plain.E5M2, torch.float8_e5m2)}
E2M1_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
INPUT_MAX = {torch.float32: plain.FLOAT32_MAX, torch.bfloat16: plain.BFLOAT16_MAX}


# --- casts in the place of kernels ---------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _scaled(rows: tuple[tuple[float, ...], ...], kind: str, *arguments: Any) -> plain.Scaled:
    return getattr(plain, kind)([list(row) for row in rows], *arguments)


def _cast(tensor: Tensor, kind: str, *arguments: Any) -> plain.Scaled:
    matrix = tensor.float().reshape(-1, tensor.shape[-1])
    return _scaled(tuple(map(tuple, matrix.tolist())), kind, *arguments)


def _bytes(codes: plain.Matrix, dtype: torch.dtype) -> Tensor:
    return torch.tensor(codes).to(dtype).view(torch.uint8)


def _padded(scales: Tensor, rows: int, columns: int) -> Tensor:
    height, width = scales.shape
    return F.pad(scales, (0, -width % columns, 0, -height % rows))


def quantize(tensor: Tensor, quantizer: Any, out: Any = None, noop: Any = None) -> Any:
    """`tex.quantize` of a matrix, for every quantizer that TE's statistics can meet."""
    del out, noop
    return _QUANTIZE[type(quantizer).__name__](tensor, quantizer)


def _per_tensor(tensor: Tensor, quantizer: Any) -> Any:
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor

    fmt, dtype = FORMATS[int(quantizer.dtype)]
    if type(quantizer).__name__ == "Float8Quantizer":
        scale = float(quantizer.scale)
        factors = scale, plain.divide(1.0, scale)
        whole = tensor.shape
        done = plain.scaled(tensor.float().tolist(), fmt, tuple(whole), lambda _: factors)
    else:
        done = _cast(tensor, "current_scaling", fmt, quantizer.force_pow_2_scales)
    return Float8Tensor(
        shape=tensor.shape,
        dtype=tensor.dtype,
        device=tensor.device,
        data=_bytes(done.codes, dtype),
        fp8_scale_inv=torch.tensor(done.inverses[0]),
        fp8_dtype=quantizer.dtype,
        quantizer=quantizer,
    )


def _blocks(tensor: Tensor, quantizer: Any) -> Any:
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor

    (fmt, dtype), square = FORMATS[int(quantizer.dtype)], quantizer.block_scaling_dim == 2
    fields: dict[str, Any] = {}
    for way, tile in (("rowwise", (1, 128)), ("columnwise", (128, 1))):
        tile = (128, 128) if square else tile
        arguments = fmt, tile, quantizer.force_pow_2_scales, INPUT_MAX[tensor.dtype]
        done = _cast(tensor, "block_scaling", *arguments)
        codes, inverses = _bytes(done.codes, dtype), torch.tensor(done.inverses)
        if way == "columnwise":
            codes = codes.t().contiguous()
        if square == (way == "columnwise"):
            inverses = inverses.t()
        fields |= {f"{way}_data": codes, f"{way}_scale_inv": _padded(inverses, 1, 4)}
    return Float8BlockwiseQTensor(
        shape=tensor.shape,
        dtype=tensor.dtype,
        device=tensor.device,
        fp8_dtype=quantizer.dtype,
        quantizer=quantizer,
        is_2D_scaled=square,
        **fields,
    )


def _mx(tensor: Tensor, quantizer: Any) -> Any:
    from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Tensor

    fmt, dtype = FORMATS[int(quantizer.dtype)]
    fields: dict[str, Any] = {}
    for way, tile, pad in (("rowwise", (1, 32), (128, 4)), ("columnwise", (32, 1), (4, 128))):
        done = _cast(tensor, "mx_scaling", fmt, tile)
        exponents = torch.tensor(done.inverses, dtype=torch.float64).log2() + 127
        fields[f"{way}_data"] = _bytes(done.codes, dtype)
        fields[f"{way}_scale_inv"] = _padded(exponents.to(torch.uint8), *pad)
        shape = tuple(quantizer.get_scale_shape(tensor.shape, way == "columnwise"))
        assert tuple(fields[f"{way}_scale_inv"].shape) == shape
    return MXFP8Tensor(
        shape=tensor.shape,
        dtype=tensor.dtype,
        device=tensor.device,
        fp8_dtype=quantizer.dtype,
        quantizer=quantizer,
        with_gemm_swizzled_scales=False,
        **fields,
    )


def _nvfp4(tensor: Tensor, quantizer: Any) -> Any:
    from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Tensor

    done = _cast(tensor, "nvfp4_scaling", (16, 16) if quantizer.with_2d_quantization else (1, 16))
    codes = torch.tensor(done.codes)
    nibbles = torch.searchsorted(E2M1_VALUES, codes.abs()).to(torch.uint8)
    nibbles |= codes.signbit().to(torch.uint8) << 3
    made = NVFP4Tensor(
        shape=tensor.shape,
        dtype=tensor.dtype,
        device=tensor.device,
        rowwise_data=nibbles[:, ::2] | nibbles[:, 1::2] << 4,
        rowwise_scale_inv=torch.tensor(done.inverses),
        columnwise_data=None,
        columnwise_scale_inv=None,
        amax_rowwise=tensor.float().abs().amax().reshape(1),
        amax_columnwise=None,
        fp4_dtype=quantizer.dtype,
        quantizer=quantizer,
        with_gemm_swizzled_scales=False,
    )
    made.dequantized = torch.tensor(done.dequantized())
    return made


_QUANTIZE = {
    "Float8Quantizer": _per_tensor,
    "Float8CurrentScalingQuantizer": _per_tensor,
    "Float8BlockQuantizer": _blocks,
    "MXFP8Quantizer": _mx,
    "NVFP4Quantizer": _nvfp4,
}


def dequantize(quantized: Any, dtype: Any) -> Tensor:
    """`tex.dequantize` of MXFP8 and NVFP4; for the others TE has it in Python."""
    del dtype
    if hasattr(quantized, "dequantized"):
        return quantized.dequantized.to(quantized._dtype)
    _, code = FORMATS[int(quantized._fp8_dtype)]
    data, exponents, tile = quantized._rowwise_data, quantized._rowwise_scale_inv, (1, 32)
    if data is None:
        data, exponents, tile = quantized._columnwise_data, quantized._columnwise_scale_inv, (32, 1)
    factors = torch.exp2(exponents.double() - 127)
    spread = factors.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)
    values = data.view(code).double() * spread[: data.shape[0], : data.shape[1]]
    return values.to(quantized._dtype)


@functools.cache
def _prepare() -> tempfile.TemporaryDirectory[str]:
    """A Blackwell, whose casts are those above; and nvdlfw-inspect, asked to log nothing.

    The folder of its log goes with the worker.
    """
    import nvdlfw_inspect.api as debug_api
    import transformer_engine.debug.features
    import transformer_engine.pytorch.tensor.nvfp4_tensor as nvfp4
    import transformer_engine_torch as extension

    # The Hadamard matrix of the columns, which nothing here reads, would lie on the GPU.
    nvfp4.get_random_sign_mask_for_rht = lambda *_, **__: 0
    nvfp4.NVFP4Quantizer._rebuild_derived_state = lambda _: None
    extension.quantize, extension.dequantize = quantize, dequantize
    torch.cuda.get_device_capability = lambda *_: (10, 0)
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.Tensor.to = _staying(torch.Tensor.to)  # type: ignore[method-assign]
    folder = tempfile.TemporaryDirectory()
    feature = {"LogTensorStats": {"enabled": True, "tensors": ["weight"], "stats": ["min"]}}
    nowhere = {"enabled": True, "layers": {"layer_name_regex_pattern": "^$"}}
    debug_api.initialize(
        config_file={"config": nowhere | {"transformer_engine": feature}},
        feature_dirs=[str(Path(transformer_engine.debug.features.__file__).parent)],
        log_dir=folder.name,
    )
    return folder


def _staying(to: Any) -> Any:
    """`Tensor.to` without going anywhere: MXFP8 tensors are sent to the GPU to be dequantised."""

    @functools.wraps(to)
    def stay(self: Tensor, *arguments: Any, **options: Any) -> Any:
        if isinstance(options.get("device"), torch.device):
            del options["device"]
            return to(self, *arguments, **options) if arguments or options else self
        return to(self, *arguments, **options)

    return stay


# --- what the worker answers ---------------------------------------------------------------------


def _quantizer(recipe: str, role: str, settings: dict[str, Any]) -> Any:
    """What TE's recipe state of that recipe gives to that operand (quantization.py)."""
    import transformer_engine.pytorch.tensor as te
    from transformer_engine.pytorch.constants import DType

    e5m2 = settings.get("hybrid", False) and role == "gradient"
    dtype = DType.kFloat8E5M2 if e5m2 else DType.kFloat8E4M3
    both = {"rowwise": True, "columnwise": True}
    if recipe == "fp8_delayed_scaling":
        return te.Float8Quantizer(settings["scale"].reshape(1), torch.zeros(1), dtype, **both)
    if recipe == "fp8_current_scaling":
        return te.Float8CurrentScalingQuantizer(dtype, torch.device("cpu"), **both)
    if recipe == "fp8_block_scaling":
        dims = 2 if role == "weight" else 1
        return te.Float8BlockQuantizer(fp8_dtype=dtype, block_scaling_dim=dims, **both)
    if recipe == "mxfp8":
        return te.MXFP8Quantizer(fp8_dtype=dtype, **both)
    return te.NVFP4Quantizer(with_2d_quantization=role == "weight", columnwise=False)


def statistics(
    batches: list[Tensor],
    tensor_name: str,
    stats: list[Any],
    recipe: str | None = None,
    **settings: Any,
) -> dict[str, float]:
    """What TE logs of one tensor after these micro-batches, by the names in its log.

    `tensor_name` is activation, weight or gradient. Without a recipe it is LogTensorStats; else the
    feature for the recipe's quantized tensors, with that recipe in force (`scale`: of delayed
    scaling, `hybrid`: E5M2 gradients, `columnwise_only`: the rowwise codes are gone).
    """
    _prepare()
    from transformer_engine.debug.features.log_fp8_tensor_stats import LogFp8TensorStats
    from transformer_engine.debug.features.log_nvfp4_tensor_stats import LogNvfp4TensorStats
    from transformer_engine.debug.features.log_tensor_stats import LogTensorStats
    from transformer_engine.debug.features.utils.stats_buffer import STATS_BUFFERS

    STATS_BUFFERS.reset()
    quantizer, feature = None, LogTensorStats()
    if recipe is not None:
        quantizer = _quantizer(recipe, tensor_name, settings)
        of_nvfp4 = recipe == "nvfp4" and set(stats) <= {"underflows%", "mse"}
        feature = LogNvfp4TensorStats() if of_nvfp4 else LogFp8TensorStats()
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"), torch.no_grad():
        warnings.simplefilter("ignore")  # the standard deviation of one element
        for tensor in batches:
            quantized = None if quantizer is None else quantizer(tensor)
            if settings.get("columnwise_only"):
                quantized.update_usage(rowwise_usage=False, columnwise_usage=True)
                quantizer.rowwise_usage = False
            feature.inspect_tensor(
                config={"stats": stats},
                layer_name="layer",
                tensor_name=tensor_name,
                iteration=0,
                tp_group=None,
                tensor=tensor,
                rowwise_quantized_tensor=quantized,
                columnwise_quantized_tensor=quantized,
                quantizer=quantizer,
            )
        logged = STATS_BUFFERS.log_stats()
    return {str(name): float(value) for (_, _, name, _), value in logged.items()}
