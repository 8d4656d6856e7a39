"""Weights in files, named and mapped, never loaded: safetensors, shards of it, torch checkpoints.

A checkpoint comes from strangers. Of a safetensors file only the header is parsed, by the rules of
the format (safetensors 0.8): every tensor lies inside the file, none overlaps another, nothing is
left over. Of an index only plain file names are followed. A torch checkpoint goes through
`torch.load(weights_only=True, mmap=True)`, which runs no code, and only if its zip is stored
uncompressed, so that nothing inflates. What is wrong ends in one line: which file, what, what was
expected.

Tensors are views of the mapped file; `release` gives the pages of one back, so that what is
resident is what is being read and not what was. Rejected: safetensors' own reader, an optional
dependency which maps as well but neither gives pages back nor says what is wrong in a line; pickle
of any kind, legacy torch files included.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import re
import stat
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
LARGEST_HEADER = 100_000_000  # bytes, as in safetensors
LARGEST_JSON = 1 << 26
LARGEST_PICKLE = 1 << 28
# What wraps a state dict in a checkpoint, outermost first.
CONTAINERS = ("model", "state_dict", "model_state_dict", "module")
# What a Guard, and Hugging Face's Trainer, call those that they write into one folder.
CHECKPOINT = re.compile(r"(kept-)?step-\d+|checkpoint-\d+")
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

# bits of an element, and torch's dtype where torch can read it
DTYPES: dict[str, tuple[int, torch.dtype | None]] = {
    "F64": (64, torch.float64),
    "F32": (32, torch.float32),
    "F16": (16, torch.float16),
    "BF16": (16, torch.bfloat16),
    "F8_E4M3": (8, torch.float8_e4m3fn),
    "F8_E5M2": (8, torch.float8_e5m2),
    "F8_E8M0": (8, None),
    "F8_E4M3FNUZ": (8, None),
    "F8_E5M2FNUZ": (8, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F4": (4, None),
    "BOOL": (8, None),
    "C64": (64, None),
} | {f"{kind}{bits}": (bits, None) for kind in "IU" for bits in (8, 16, 32, 64)}
FLOATS = frozenset(dtype for _, dtype in DTYPES.values() if dtype is not None)


_OF_ACTIVATION = re.compile(r"^(input|output|act|activation|[qkv])_")


class WeightsError(ValueError):
    """A file that cannot be read as weights: which, what, what was expected, in one line."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor of a checkpoint: its shape, its dtype in words, how it is got at.

    `get` gives a view [*shape] of the file; None where it is no float that is read here.
    """

    shape: tuple[int, ...]
    dtype: str
    get: Callable[[], Tensor] | None


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The tensors of a checkpoint by name, and the config.json beside it ({} without one)."""

    path: str
    tensors: Mapping[str, Stored]
    config: Mapping[str, Any] = field(default_factory=dict)
    mapped: bool = True

    def release(self, tensor: Tensor) -> None:
        """Give back the memory of what was read of a file; a model's own stays."""
        if self.mapped:
            _give_back(tensor)


def open_weights(path: str | Path) -> Weights:
    """The weights of a .safetensors file, a folder as Hugging Face writes it (one file, or shards
    with an index), or a torch checkpoint: a state dict, or one inside `CONTAINERS`.

    Maps, does not read. Raises WeightsError in one line, OSError where a file cannot be opened.
    """
    path = Path(path)
    if path.is_dir():
        tensors = _folder(path)
    elif path.name.endswith(".index.json"):
        tensors = _shards(path)
    else:
        tensors = _file(path)
    folder = path if path.is_dir() else path.parent
    return Weights(path=str(path), tensors=tensors, config=_config(folder / "config.json"))


def _folder(folder: Path) -> dict[str, Stored]:
    if (folder / INDEX).exists():
        return _shards(folder / INDEX)
    if (folder / "pytorch_model.bin.index.json").exists():
        return _shards(folder / "pytorch_model.bin.index.json")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        files = sorted(file for file in folder.iterdir() if file.suffix in TORCH_SUFFIXES)
        if len(files) > 1:  # an optimizer's state, more often than not
            names = ", ".join(file.name for file in files[:3])
            raise WeightsError(f"{folder}: {names}: expected one of them, name the file")
    if not files:
        raise WeightsError(f"{folder}: {_instead_of_weights(folder)}")
    found: dict[str, Stored] = {}
    for file in files:
        for name, stored in _file(file).items():
            if name in found:
                raise WeightsError(f"{file}: {name!r} is in another file too, expected it once")
            found[name] = stored
    return found


def _instead_of_weights(folder: Path) -> str:
    """What a folder without weights is, where that is known, and what was expected."""
    checkpoints = [one.name for one in folder.iterdir() if CHECKPOINT.fullmatch(one.name)]
    if checkpoints:
        names = ", ".join(sorted(checkpoints)[:3])
        return f"checkpoints of a training, {names}: expected one of them, name it"
    if any(True for depth in range(4) for _ in folder.glob("*/" * depth + "run.json")):
        return "what a run recorded, expected weights; fp8lab diagnose and report read a run"
    return f"no weights in this folder, expected {INDEX}, *.safetensors or a torch checkpoint"


def _shards(index: Path) -> dict[str, Stored]:
    read = _json(index, LARGEST_JSON)
    where = read.get("weight_map") if isinstance(read, dict) else None
    if not isinstance(where, dict) or not where:
        raise WeightsError(f"{index}: no weight_map, expected names and their files")
    found: dict[str, Stored] = {}
    files: dict[str, dict[str, Stored]] = {}
    for name, shard in where.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or set(shard) & set("/\\\0"):
            raise WeightsError(f"{index}: {shard!r:.100}: expected the name of a file beside it")
        if shard not in files:
            if not (index.parent / shard).exists():
                raise WeightsError(f"{index}: {shard}: no such file, expected the shard there")
            files[shard] = _file(index.parent / shard)
        if name not in files[shard]:
            raise WeightsError(f"{index}: {name!r} is not in {shard}, expected it there")
        found[name] = files[shard][name]
    return found


def _file(path: Path) -> dict[str, Stored]:
    descriptor = _open(path)
    try:
        start = os.pread(descriptor, 8, 0)
        if start[:4] == b"PK\x03\x04":
            return _torch(path)
        size = os.fstat(descriptor).st_size
        # A pickle's first bytes, unless they are a safetensors header's length.
        is_too_long = int.from_bytes(start, "little") > size
        pickled = start[:1] == b"\x80" and is_too_long
        if pickled or path.suffix in TORCH_SUFFIXES:
            raise WeightsError(f"{path}: no zip of torch.save, expected one: pickles are not read")
        if is_too_long and path.suffix != ".safetensors":
            raise WeightsError(f"{path}: no weights, expected a .safetensors file or torch.save's")
        return _safetensors(path, descriptor)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    """A descriptor of a regular file; a pipe does not make it wait."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise WeightsError(f"{path}: not a regular file, expected one with weights")
    return descriptor


# --- scales ---------------------------------------------------------------------------------------


def scale_of(name: str, stored: Mapping[str, Stored]) -> str | None:
    """The scale of an FP8 weight, by Hugging Face's names; None of others, and without one."""
    if not _is_fp8(stored[name]):
        return None
    return next((n for n in (f"{name}_scale_inv", f"{name}_scale") if n in stored), None)


def unknown_scales(stored: Mapping[str, Stored], scales: Mapping[str, str]) -> dict[str, str]:
    """What may be the scale of an FP8 matrix that has none in `scales`, by another name: a tensor
    of its module called a scale, of no activation and of no other weight. To read the weight
    without it is right only where there is none."""
    taken = set(scales.values())
    near: dict[str, str] = {}
    for name in sorted(set(stored) - taken):
        module, _, leaf = name.rpartition(".")
        if "scale" in leaf and not _OF_ACTIVATION.match(leaf):
            near.setdefault(module, name)
    found = {}
    for name, one in stored.items():
        scale = near.get(name.rpartition(".")[0], near.get(name))
        if scale and name not in scales and _is_fp8(one) and len(one.shape) > 1 and one.get:
            found[name] = scale
    return found


def _is_fp8(stored: Stored) -> bool:
    return stored.dtype.lower().startswith(("f8", "float8"))


# --- safetensors ----------------------------------------------------------------------------------


def _safetensors(path: Path, descriptor: int) -> dict[str, Stored]:
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or length > size - 8:
        found = f"a header of {length} bytes in a file of {size}"
        raise WeightsError(f"{path}: {found}: truncated, or no safetensors file")
    if length > LARGEST_HEADER:
        raise WeightsError(f"{path}: a header of {length} bytes, expected up to {LARGEST_HEADER}")
    header = _parsed(os.pread(descriptor, length, 8), f"{path}: header")
    if not isinstance(header, dict):
        raise WeightsError(f"{path}: header: expected an object of tensors")
    header.pop("__metadata__", None)
    spans = []
    for name, entry in header.items():
        begin, end, shape, dtype = _entry(f"{path}: {name!r:.100}", entry)
        spans.append((begin, end, name, shape, dtype))
    expected = 0
    for begin, end, name, _, _ in sorted(spans):
        if begin != expected:
            raise WeightsError(f"{path}: {name!r:.100}: begins at {begin}, expected {expected}")
        expected = end
    if expected != size - 8 - length:
        found = f"{size - 8 - length} bytes of tensors, expected {expected}"
        raise WeightsError(f"{path}: {found}: truncated, or with something behind")
    mapped = _mapped(descriptor) if expected else torch.empty(0, dtype=torch.uint8)
    found_tensors = {}
    for begin, end, name, shape, dtype in spans:
        kind = DTYPES[dtype][1]
        get = None
        if kind is not None:
            get = _view_of(mapped, 8 + length + begin, 8 + length + end, kind, shape)
        found_tensors[name] = Stored(shape=shape, dtype=dtype, get=get)
    return {name: found_tensors[name] for name in header}


def _entry(where: str, entry: Any) -> tuple[int, int, tuple[int, ...], str]:
    """begin, end, shape and dtype of a tensor in a header."""
    if not isinstance(entry, dict):
        raise WeightsError(f"{where}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise WeightsError(f"{where}: dtype {dtype!r:.40}, expected one of {', '.join(DTYPES)}")
    if not _whole_numbers(shape) or len(shape) > 16:
        raise WeightsError(f"{where}: shape {shape!r:.80}, expected whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise WeightsError(f"{where}: data_offsets {offsets!r:.80}, expected two, ascending")
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[dtype][0]
    if needed != 8 * (end - begin):
        found = f"{end - begin} bytes for {dtype} {shape}"
        raise WeightsError(f"{where}: {found}, expected {needed / 8:.20g}")
    return begin, end, tuple(shape), dtype


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _mapped(descriptor: int) -> Tensor:
    """uint8 [bytes of the file]: copied on write, which nobody does (torch wants it writable)."""
    file = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(file, dtype=torch.uint8)


def _view_of(
    mapped: Tensor, begin: int, end: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> Callable[[], Tensor]:
    def view() -> Tensor:
        octets = mapped[begin:end]
        if begin % dtype.itemsize:  # the format allows it, processors need not
            octets = octets.clone()
        return octets.view(dtype).view(shape)

    return view


# --- torch ----------------------------------------------------------------------------------------


def _torch(path: Path) -> dict[str, Stored]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise WeightsError(f"{path}: a broken zip: {error}, expected one of torch.save") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise WeightsError(f"{path}: a compressed zip, expected torch.save's, which is stored")
    if sys.byteorder not in _byte_orders(path, entries):
        # torch swaps bytes in memory of its own, which must not be given back.
        raise WeightsError(f"{path}: of another byte order, expected {sys.byteorder}-endian")
    total, size = sum(entry.file_size for entry in entries), path.stat().st_size
    pickles = [entry.file_size for entry in entries if entry.filename.endswith(".pkl")]
    if total > size or sum(pickles) > LARGEST_PICKLE:
        raise WeightsError(f"{path}: a zip of {total} bytes in {size}, expected no more inside")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a foreign unpickler may raise anything; it has run no code
        if foreign := re.search(r"Unsupported (?:global: GLOBAL|class) ([\w.]{1,200})", str(error)):
            raise WeightsError(
                f"{path}: holds a pickled {foreign[1]}, refused by torch.load(weights_only=True), "
                "expected tensors alone: torch.save(model.state_dict(), …)"
            ) from None
        reason = " ".join(str(error).split("\n")[0].split())[:200] or type(error).__name__
        raise WeightsError(f"{path}: torch.load(weights_only=True) refused: {reason}") from None
    return {name: _in_torch(tensor) for name, tensor in _state_dict(path, loaded)}


def _byte_orders(path: Path, entries: list[zipfile.ZipInfo]) -> set[str]:
    """What a checkpoint says of its byte order; older ones say nothing: this machine's."""
    named = [e.filename for e in entries if e.filename.rpartition("/")[2] == "byteorder"]
    try:
        with zipfile.ZipFile(path) as archive:
            read = [archive.read(name)[:16] for name in named[:4]]
    except Exception as error:  # of a damaged entry zipfile raises what it likes
        raise WeightsError(f"{path}: a broken zip: {' '.join(str(error).split())[:120]}") from None
    said = {octets.decode("ascii", "replace").strip() for octets in read}
    return said or {sys.byteorder}


def _state_dict(path: Path, loaded: Any) -> Iterator[tuple[str, Tensor]]:
    for _ in CONTAINERS:
        inner = [loaded[key] for key in CONTAINERS if _is_mapping(loaded) and key in loaded]
        if not inner or not _is_mapping(inner[0]):
            break
        loaded = inner[0]
    found = {}
    if _is_mapping(loaded):
        found = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)}
    if not found:
        inside = f"one, or one inside {', '.join(CONTAINERS)}"
        raise WeightsError(f"{path}: no state dict in this checkpoint, expected {inside}")
    yield from found.items()


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _in_torch(tensor: Tensor) -> Stored:
    tensor = tensor.detach()
    dtype = str(tensor.dtype).removeprefix("torch.")
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_meta:
        return Stored(shape=tuple(tensor.shape), dtype=f"{type(tensor).__name__}", get=None)
    held = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > held:
        return Stored(shape=tuple(tensor.shape), dtype=f"{dtype}, {held} bytes", get=None)
    get = (lambda: tensor) if tensor.dtype in FLOATS else None
    return Stored(shape=tuple(tensor.shape), dtype=dtype, get=get)


# --- both -----------------------------------------------------------------------------------------


def _config(path: Path) -> dict[str, Any]:
    """config.json, {} where there is none or it says nothing."""
    if not path.is_file():
        return {}
    config = _json(path, LARGEST_JSON)
    return config if isinstance(config, dict) else {}


def _json(path: Path, largest: int) -> Any:
    descriptor = _open(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > largest:
            raise WeightsError(f"{path}: {size} bytes, expected up to {largest}")
        return _parsed(os.pread(descriptor, size, 0), str(path))
    finally:
        os.close(descriptor)


def _parsed(text: bytes, where: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise WeightsError(f"{where}: {key!r:.100} is there twice, expected once")
            found[key] = value
        return found

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except WeightsError:
        raise
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise WeightsError(f"{where}: no JSON ({reason}), expected it in UTF-8") from None


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def _give_back(tensor: Tensor) -> None:
    """Whole pages under a tensor that lies in a mapped file; read again, they come back."""
    advise = _madvise()
    if advise is None or not tensor.numel():
        return
    spans = ((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    length = sum(spans) * tensor.element_size()
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + length) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        advise(begin, end - begin, mmap.MADV_DONTNEED)
