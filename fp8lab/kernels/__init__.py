"""Casts on a CPU, compiled: equal bit for bit to what `casting` and `scaling` do in plain torch.
(A NaN is a NaN in the same place; its payload may be another.)

In eager torch a cast is five passes over the tensor and a tiled one more; `cpu.c` does either in
one, at the speed of a copy (and `summary.c` and `measure.c` all that is measured of a tensor: see
the modules beside this one). It is C in the package, built at first use (three seconds, once per
machine) with the system's own compiler for the CPU at hand, kept in `$XDG_CACHE_HOME/fp8lab`
or `~/.cache/fp8lab`, and called through ctypes, which lets go of the interpreter's lock.

Nobody needs a compiler: where there is none, or no folder to write to, `usable` says no, casting
goes on in plain torch with the same results, and `why_unavailable` has the reason. The environment
variable FP8LAB_KERNELS=0, read at first use, says no as well.

A library's name holds the hash of its source, compiler and CPU, so that machines can share a home,
and the hash of its own bytes, so that a truncated one is never mapped (which kills the process).
Processes may race: each builds its own and renames it into place.

Rejected: an extension module (a wheel per platform, for one CPU's instructions), numba (seven
times a copy, and a heavy import), torch.compile (seconds per shape and process).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fp8lab.formats import FloatFormat

Tile = tuple[int, int]  # rows, columns of elements that share a scale

_SOURCES = sorted(Path(__file__).parent.glob("*.[ch]"))
# No fast-math, no fused multiply-add: every operation rounds once, as torch's do.
_FLAGS = ["-std=c11", "-O3", "-ffp-contract=off", "-fopenmp-simd", "-pthread", "-fPIC", "-shared"]
_BUILD_SECONDS = 120
_THREADS_FROM = 1 << 20  # elements from which starting threads (20 µs each) pays

_POINTER, _REAL, _INT, _INT64 = ctypes.c_void_p, ctypes.c_float, ctypes.c_int, ctypes.c_int64
_SIGNATURES = {
    "fp8lab_amax": [_POINTER, _INT, _INT64, _POINTER, _INT],
    "fp8lab_tile_amax": [_POINTER, _INT, *[_INT64] * 4, _POINTER, _INT],
    "fp8lab_cast": [_POINTER, _INT, *[_INT64] * 4, *[_POINTER] * 4, _INT],
    "fp8lab_cast_and_count": [_POINTER, _INT, _INT64, *[_POINTER] * 7, _INT],
    "fp8lab_cast_blocks": [
        *[_POINTER, _INT, *[_INT64] * 3, _POINTER, _INT],
        *[_REAL, _POINTER, _INT],
    ],
    "fp8lab_scales": [_POINTER, _INT64, _REAL, _REAL, _INT, _POINTER, _POINTER],
    "fp8lab_exponents": [_POINTER, _INT64, _REAL, _POINTER, _POINTER],
    "fp8lab_move_scale": [_POINTER, _INT64, _INT64, _REAL, _INT, _POINTER, _POINTER],
    "fp8lab_summary": [_POINTER, _INT, *[_INT64] * 3, *[_POINTER] * 3],
    "fp8lab_sentinel": [_POINTER, _INT, *[_INT64] * 3, *[_POINTER] * 2],
    "fp8lab_power": [_POINTER, *[_INT] * 2, *[_INT64] * 2, *[_POINTER] * 2],
    "fp8lab_power_of_packed": [*[_POINTER] * 2],
    "fp8lab_weights": [*[_POINTER] * 3, _INT, *[_INT64] * 4, *[_POINTER] * 4],
    "fp8lab_samples": [*[_POINTER] * 2, _INT, *[_INT64] * 3, *[_POINTER] * 2, _INT64, _POINTER],
    "fp8lab_scan": [_POINTER, _INT, *[_INT64] * 2, *[_POINTER] * 6],
    "fp8lab_cast_weights": [
        *[_POINTER, _INT, *[_INT64] * 2, *[_POINTER] * 2],
        *[*[_REAL] * 2, *[_POINTER] * 7],
    ],
    "fp8lab_turn": [_POINTER, *[_INT64] * 4, _POINTER],
    "fp8lab_tile_scales": [_POINTER, _INT64, _POINTER, *[_REAL] * 2, *[_POINTER] * 2],
    "fp8lab_pairs": [*[_POINTER] * 3, _INT, *[_INT64] * 2, *[_POINTER] * 2],
    "fp8lab_operand": [_POINTER, _INT, *[_INT64] * 4, *[_POINTER] * 4, _INT64, *[_POINTER] * 3],
}
_FLOAT = torch.zeros((), dtype=torch.float32, device="cpu")
_COUNT = torch.zeros((), dtype=torch.int64, device="cpu")

_library: ctypes.CDLL | None = None
_reason: str | None = "not tried yet"
_tried = False
_loading = threading.Lock()


class _Format(ctypes.Structure):
    """What cpu.c knows of a format; the fields are explained there."""

    _fields_ = (
        ("largest", ctypes.c_float),
        ("limit", ctypes.c_float),
        ("zero", ctypes.c_float),
        ("smallest_exponent", ctypes.c_int32),
        ("shift", ctypes.c_int32),
    )


def usable(tensor: Tensor) -> bool:
    """Whether the kernels take it: plain (`is_plain`) and on a CPU. Costs one microsecond."""
    return (
        is_plain(tensor)
        and tensor.is_cpu
        and (_library is not None or (not _tried and why_unavailable() is None))
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether it is what a kernel can read: float32 or bfloat16, contiguous, not empty, memory that
    holds the values as they are, and nobody watching who would miss the call: no subclass, no
    functorch wrapper, no compiler, tracer or dispatch mode."""
    return (
        not torch.compiler.is_compiling()  # first: a compiler that traces this stops here
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.dtype in (torch.float32, torch.bfloat16)
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not tensor.is_neg()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and tensor.data_ptr() != 0  # empty, freed, or zeros that were never made
    )


def why_unavailable() -> str | None:
    """Why there are no kernels, in one line; None when there are. Builds or loads at first use."""
    global _library, _reason, _tried
    with _loading:
        if not _tried:
            try:
                _library, _reason = _load(), None
            # ValueError: quotes in CC; RuntimeError: no home; SubprocessError: the time is up.
            # AttributeError: a library without a function.
            except (AttributeError, OSError, RuntimeError, ValueError) as error:
                _reason = " ".join(str(error).split())
            except subprocess.SubprocessError as error:
                _reason = " ".join(str(error).split())
            _tried = True
    return _reason


def amax(tensor: Tensor) -> Tensor:
    """max |x| of any shape, float32 [], NaN ignored: `scaling.absolute_maximum` of a usable tensor.

    Here and below the caller has asked `usable(tensor)`.
    """
    result = torch.empty_like(_FLOAT)
    count = tensor.numel()
    library().fp8lab_amax(
        tensor.data_ptr(), is_half(tensor), count, result.data_ptr(), threads_for(count)
    )
    return result


def tile_amax(tensor: Tensor, tile: Tile) -> Tensor:
    """max |x| of every tile of a usable [rows, columns], NaN ignored.

    float32 [ceil(rows / tile rows), ceil(columns / tile columns)]; tiles at the edges may be cut.
    """
    rows, columns = tensor.shape
    result = torch.empty(_tiles(rows, columns, tile), dtype=torch.float32, device="cpu")
    library().fp8lab_tile_amax(
        tensor.data_ptr(),
        is_half(tensor),
        rows,
        columns,
        *tile,
        result.data_ptr(),
        threads_for(rows * columns),
    )
    return result


def fake_quantize(
    tensor: Tensor,
    fmt: FloatFormat,
    scale: Tensor,
    scale_inv: Tensor,
    tile: Tile | None,
    out: Tensor,
) -> None:
    """out = round(clamp(tensor · scale, ±max)) · scale_inv, float32, nearest even, NaN kept.

    `tensor` is usable, [rows, columns] where there is a tile and of any shape where not; `out` is
    float32, contiguous, as many elements in the same order, and may be `tensor` itself. The scales
    are float32 and contiguous, one per tile, [] without.

    Raises ValueError where the memory of `out` or of a scale is not what is said here, and for a
    format whose casts do not saturate or whose exponents do not leave float32 room to round.
    """
    if tile is None:
        rows, columns = 1, tensor.numel()
        tile, tiles = (1, columns), 1
    else:
        rows, columns = tensor.shape
        down, across = _tiles(rows, columns, tile)
        tiles = down * across
    _check(tensor, out, scale, scale_inv, tiles)
    library().fp8lab_cast(
        tensor.data_ptr(),
        is_half(tensor),
        rows,
        columns,
        *tile,
        ctypes.addressof(format_of(fmt)),
        scale.data_ptr(),
        scale_inv.data_ptr(),
        out.data_ptr(),
        threads_for(rows * columns),
    )
    torch.autograd.graph.increment_version(out)


ScaleKind = Literal["any", "power_of_two", "exponent"]


def fake_quantize_blocks(
    tensor: Tensor, fmt: FloatFormat, size: int, kind: ScaleKind, largest_scale: float, out: Tensor
) -> None:
    """`tile_amax`, `scales` or `exponents`, and `fake_quantize` of 1 × size tiles in one pass.

    `tensor` is usable, [rows, columns] of whole tiles of 16 to 4096 columns; otherwise as
    `fake_quantize`.
    """
    rows, columns = tensor.shape
    _check(tensor, out, _FLOAT, _FLOAT, 1)
    if not 16 <= size <= 4096 or columns % size:
        raise ValueError(
            f"fp8lab.kernels: {columns} columns in tiles of {size}, expected whole ones"
        )
    library().fp8lab_cast_blocks(
        tensor.data_ptr(),
        is_half(tensor),
        rows,
        columns,
        size,
        ctypes.addressof(format_of(fmt)),
        ("any", "power_of_two", "exponent").index(kind),
        largest_scale,
        out.data_ptr(),
        threads_for(rows * columns),
    )
    torch.autograd.graph.increment_version(out)


def fake_quantize_and_count(
    tensor: Tensor, fmt: FloatFormat, scale: Tensor, scale_inv: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`fake_quantize` under one scale; returns amax, saturated and flushed of the same pass.

    amax is float32 [], as `amax` of the tensor. Saturated counts |x · scale| > max · (1 + 2^-23),
    as `Cast.saturated`, and flushed the elements that are not 0 and round to 0; both int64 [].

    Raises ValueError as `fake_quantize` does.
    """
    _check(tensor, out, scale, scale_inv, 1)
    largest = torch.empty_like(_FLOAT)
    saturated, flushed = torch.empty_like(_COUNT), torch.empty_like(_COUNT)
    count = tensor.numel()
    library().fp8lab_cast_and_count(
        tensor.data_ptr(),
        is_half(tensor),
        count,
        ctypes.addressof(format_of(fmt)),
        scale.data_ptr(),
        scale_inv.data_ptr(),
        out.data_ptr(),
        largest.data_ptr(),
        saturated.data_ptr(),
        flushed.data_ptr(),
        threads_for(count),
    )
    torch.autograd.graph.increment_version(out)
    return largest, saturated, flushed


def scales(
    amax: Tensor, largest: float, largest_scale: float, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    """`scaling.scale_for` of a usable float32 amax without a previous scale, and its reciprocal."""
    scale, scale_inv = torch.empty_like(amax), torch.empty_like(amax)
    library().fp8lab_scales(
        amax.data_ptr(),
        amax.numel(),
        largest,
        largest_scale,
        power_of_two,
        scale.data_ptr(),
        scale_inv.data_ptr(),
    )
    return scale, scale_inv


def exponents(amax: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """MXFP8's scale and scale_inv of a usable float32 amax, the exponent rounded up."""
    scale, scale_inv = torch.empty_like(amax), torch.empty_like(amax)
    pointers = scale.data_ptr(), scale_inv.data_ptr()
    library().fp8lab_exponents(amax.data_ptr(), amax.numel(), 1.0 / largest, *pointers)
    return scale, scale_inv


def move_scale(
    history: Tensor,
    column: int,
    length: int,
    largest: float,
    most_recent: bool,
    scale: Tensor,
    before: Tensor,
) -> None:
    """`Fp8Linear.move_scales` of one column of a usable history, in place.

    `history` float32 [rows, operands], `scale` and `before` float32 [operands], all contiguous.
    """
    for state in (history, scale, before):
        if state.dtype is not torch.float32 or not usable(state):
            raise ValueError(f"fp8lab.kernels: {state.dtype} state, expected contiguous float32")
    offset = 4 * column
    library().fp8lab_move_scale(
        history.data_ptr() + offset,
        length,
        history.shape[1],
        largest,
        most_recent,
        scale.data_ptr() + offset,
        before.data_ptr() + offset,
    )


def is_half(tensor: Tensor) -> bool:
    """Whether elements are bfloat16: of what is usable, the rest is float32."""
    return tensor.dtype is torch.bfloat16


def threads_for(count: int) -> int:
    """How many threads share the work on so many elements."""
    return torch.get_num_threads() if count >= _THREADS_FROM else 1


def _tiles(rows: int, columns: int, tile: Tile) -> Tile:
    return -(-rows // tile[0]), -(-columns // tile[1])


def _check(tensor: Tensor, out: Tensor, scale: Tensor, scale_inv: Tensor, tiles: int) -> None:
    """What C reads and writes has to be there: it would not notice."""
    for name, memory, count in (
        ("out", out, tensor.numel()),
        ("scale", scale, tiles),
        ("scale_inv", scale_inv, tiles),
    ):
        if not (
            memory.dtype is torch.float32
            and memory.is_cpu
            and memory.numel() == count
            and memory.is_contiguous()
        ):
            found = f"{memory.dtype} {list(memory.shape)} on {memory.device}"
            raise ValueError(f"{name}: {found}, expected {count} contiguous float32 on the CPU")


@cache
def format_of(fmt: FloatFormat) -> _Format:
    """`fmt` as C knows it. Raises ValueError as `fake_quantize` does."""
    shift = 23 - fmt.mantissa_bits
    if not (fmt.signed and fmt.has_zero and fmt.overflow == "saturate"):
        raise ValueError(f"{fmt.name}: expected a signed format of at most 8 bits, with a zero")
    if fmt.min_exponent < -126 or fmt.max_exponent + shift > 127:
        exponents = f"{fmt.min_exponent}..{fmt.max_exponent}"
        raise ValueError(f"{fmt.name}: exponents {exponents}, expected -126..{127 - shift}")
    return _Format(
        largest=fmt.max,
        limit=fmt.max * (1 + 2.0**-23),
        zero=0.0 if fmt.top == "fnuz" else -0.0,
        smallest_exponent=(fmt.min_exponent + 127) << 23,
        shift=shift << 23,
    )


def library() -> ctypes.CDLL:
    """The built library, for a caller who has asked `usable`."""
    if _library is None:
        raise RuntimeError(f"fp8lab.kernels: {_reason}")
    return _library


def _load() -> ctypes.CDLL:
    if os.environ.get("FP8LAB_KERNELS") == "0":
        raise OSError("switched off by FP8LAB_KERNELS=0")
    compiler = _compiler()
    told = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = (told if told.is_absolute() else Path.home() / ".cache") / "fp8lab"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_ours(folder):
        raise OSError(f"{folder}: others may write to it, and what lies there is executed")
    parts = (*(path.read_text() for path in _SOURCES), *_FLAGS, *compiler, _processor())
    prefix = f"cpu-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}-"
    built = [
        path
        for path in folder.glob(f"{prefix}*.so")
        # Asked first: a pipe by that name would never end, a dangling link has no owner.
        if path.is_file() and _is_ours(path) and path.name == prefix + _digest(path)
    ]
    library = ctypes.CDLL(str(built[0] if built else _build(compiler, folder, prefix)))
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def _is_ours(path: Path) -> bool:
    """Whether nobody but this user (or root) can have written it."""
    status = path.stat()
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & 0o022


def _compiler() -> list[str]:
    """The command $CC, or the first compiler on PATH; its program as a full path."""
    asked = shlex.split(os.environ.get("CC", ""))
    for name in asked[:1] or ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found, *asked[1:]]
    raise OSError(f"no C compiler on PATH: {asked[0] if asked else 'cc, gcc, clang'}")


def _processor() -> str:
    """What -march=native depends on, without starting the compiler."""
    try:
        with Path("/proc/cpuinfo").open() as file:
            first = file.read(1 << 14).split("\n\n")[0].splitlines()
    except OSError:
        return repr(platform.uname())
    # vendor, family, model, flags (x86); implementer, part, Features (ARM); not frequencies
    names = ("vendor", "cpu family", "model", "flags", "CPU", "Features", "isa", "uarch")
    return "\n".join([platform.machine(), *(line for line in first if line.startswith(names))])


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] + ".so"


def _build(compiler: list[str], folder: Path, prefix: str) -> Path:
    # Which of the two a compiler knows depends on the machine; without either it is still correct.
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    native = ["-march=native"] if x86 else ["-mcpu=native", "-march=native"]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        output = Path(scratch) / "cpu.so"
        for flag in [[one] for one in native] + [[]]:
            sources = [str(path) for path in _SOURCES if path.suffix == ".c"]
            command = [*compiler, *_FLAGS, *flag, *sources, "-o", str(output), "-lm"]
            result = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_BUILD_SECONDS,
            )
            if result.returncode == 0:
                output.chmod(0o755)  # whatever the umask says
                return output.replace(folder / (prefix + _digest(output)))
    complaints = [line for line in result.stderr.splitlines() if "error" in line] or ["no reason"]
    raise OSError(f"{shlex.join(compiler)}: {complaints[0]}")
