"""What the lab trains on: real bytes without a download, and one synthetic task that breaks FP8.

A batch is a pure function of (seed, step). No iterator has a position to save, so a run that
resumes at step n sees what an uninterrupted run sees, and the arms of an experiment see the same
bytes in the same order whatever their numerics. The mix, stated once: every draw comes from
numpy's PCG64 seeded with SeedSequence((stream, seed, step)), three 32-bit words, where the stream
names the purpose. (Cost: some 20 microseconds a step to seed. torch.Generator was rejected: its CPU
engine keeps 32 bits of a seed, so seed and step would have to be hashed into one word and collide.)

The text is the running Python's own standard library: present wherever fp8lab runs, free, a few
megabytes, and identified by its hash, since it differs between Python releases.
"""

from __future__ import annotations

import hashlib
import math
import platform
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fp8lab.recipe import shown

CORPUS_CAP = 8_000_000  # bytes; the library of CPython 3.11 has 7.8 million by the rule below
HELD_OUT_DIVISOR = 10  # the last tenth of a corpus is held out
SILU_SECOND_MOMENT = 0.355776  # E[silu(g)^2] for g ~ N(0, 1), by quadrature

# Packages of code that people wrote; not tests, tables (encodings, pydoc_data) or whole programs.
_PACKAGES = (
    "asyncio collections concurrent ctypes curses dbm email html http importlib json logging "
    "multiprocessing re sqlite3 tomllib unittest urllib venv wsgiref xml xmlrpc zoneinfo"
).split()

_STREAMS = {"train": 0, "held_out": 1, "rare_token_task": 2, "rare_token_batch": 3}


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Bytes to model: read-only uint8 [n], their SHA-256 in hex, and where they came from.

    Two corpora are equal when hash and source are. The last tenth (rounded down) is held out; the
    rest is the training split, and no window crosses the border. Raises ValueError if data is not a
    read-only uint8 vector or does not have that hash.
    """

    data: npt.NDArray[np.uint8] = field(compare=False, repr=False)
    sha256: str
    source: str

    def __post_init__(self) -> None:
        if self.data.dtype != np.uint8 or self.data.ndim != 1 or self.data.flags.writeable:
            raise ValueError(f"corpus {self.source}: data must be a read-only uint8 vector")
        if hashlib.sha256(self.data.tobytes()).hexdigest() != self.sha256:
            raise ValueError(f"corpus {self.source}: data does not have SHA-256 {self.sha256}")

    @property
    def border(self) -> int:
        """The first held-out byte: train is data[:border], held out is data[border:]."""
        return len(self.data) - len(self.data) // HELD_OUT_DIVISOR

    def batch(
        self,
        step: int,
        *,
        seed: int,
        batch: int,
        context: int,
        split: Literal["train", "held_out"] = "train",
    ) -> Tensor:
        """Windows at uniformly random places: int64 [batch, context + 1], a pure function.

        Raises ValueError for a batch or context below 1, a seed or step outside [0, 2^32), or a
        corpus whose held-out split is too short for one window, whichever split is asked for: what
        would fail at the first evaluation fails at the first step.
        """
        if batch < 1 or context < 1:
            raise ValueError(
                f"corpus {self.source}: expected batch and context of at least 1, "
                f"got {batch} and {context}"
            )
        _check_length(len(self.data), context, self.source)
        spans = {"train": (0, self.border), "held_out": (self.border, len(self.data))}
        if split not in spans:
            raise ValueError(
                f"corpus {self.source}: split must be one of {', '.join(spans)}, got {split!r}"
            )
        first, last = spans[split]
        generator = _generator(split, seed, step)
        start = generator.integers(first, last - context, size=batch)
        window = start[:, None] + np.arange(context + 1)
        return torch.from_numpy(self.data[window].astype(np.int64))


def stdlib_text() -> Corpus:
    """The running Python's standard library: top-level modules and packages of source, in one.

    Files are sorted by relative POSIX name and joined without a separator, up to CORPUS_CAP bytes
    of whole files; tests and what a distribution or an installation adds are left out. About 0.1 s.
    Raises ValueError if this Python has no source files (a frozen or zipped library).
    """
    root = Path(sysconfig.get_path("stdlib"))
    pieces: list[bytes] = []
    size = 0
    for name in _stdlib_names(root):
        piece = (root / name).read_bytes()
        if size + len(piece) > CORPUS_CAP:
            break
        pieces.append(piece)
        size += len(piece)
    if not size:
        raise ValueError("stdlib_text: this Python's standard library has no source files")
    source = f"standard library of Python {platform.python_version()}, {len(pieces)} files"
    return _corpus(b"".join(pieces), source)


def read_text(path: str | Path, *, context: int = 1) -> Corpus:
    """A file's bytes, whatever they are; the whole file is read into memory.

    `context`, if given, is checked against the length now and not at the first batch. Raises
    ValueError, in one line, for a file that is missing, a directory, a pipe or device, unreadable,
    empty, larger than memory, or too short for a held-out split with one window of context + 1
    bytes.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError(f"text {path}: not a file")  # a pipe, say: it would never end
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"text {path}: {error.strerror}") from None
    except MemoryError:
        size = path.stat().st_size
        raise ValueError(f"text {path}: {size} bytes, more than fit into memory") from None
    if not raw:
        raise ValueError(f"text {path}: the file is empty")
    _check_length(len(raw), context, str(path))
    return _corpus(raw, path.name)


@dataclass(frozen=True, kw_only=True)
class RareToken:
    """A regression that makes one SwiGLU channel grow aligned, and with it FP8 diverge.

    A student of the same shape learns a random SwiGLU teacher. Common tokens are N(0, I) without
    their component along u, a vector of +-1, so u is a direction they never use and its amax is no
    outlier. With probability event_probability a step has one rare token instead, at a random row:
    u + noise * N(0, I), whose target is target_scale * v, v of entries +-1/sqrt(dim) and norm 1.
    The cheap way to fit it is a channel whose gate and up rows both point along u, quadratic
    in the token: the alignment that the FP8-at-scale paper (Fishman et al. 2024) blames.

    Teacher: gate and up weights N(0, 1/dim), down weights N(0, 1/(E[silu(g)^2] * hidden)), all
    times teacher_scale at the output, which gives common targets teacher_scale^2 variance per
    element. u, v and teacher depend on `seed` alone. A minimal model of one failure path: the task
    drives the alignment, not weight decay, and it says nothing about a large run. Raises ValueError
    for a size below 1, an event_probability outside [0, 1], a scale or noise that is negative or
    not finite, or a seed or step outside [0, 2^32).
    """

    seed: int
    dim: int = 64
    hidden: int = 128
    batch_size: int = 128
    event_probability: float = 1 / 40
    target_scale: float = 60.0
    teacher_scale: float = 1.0
    noise: float = 0.1

    def __post_init__(self) -> None:
        self._require(_is_whole, "at least 1", "dim", "hidden", "batch_size")
        self._require(lambda p: 0.0 <= p <= 1.0, "0 to 1", "event_probability")
        scales = ("target_scale", "teacher_scale", "noise")
        self._require(lambda s: 0.0 <= s < 2.0**128, "finite and at least 0", *scales)
        _generator("rare_token_task", self.seed, 0)

    def _require(self, good: Callable[[Any], bool], expected: str, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int | float) or not good(value):
                raise ValueError(f"RareToken.{name}: expected {expected}, got {shown(value)}")

    @cached_property
    def rare_input(self) -> Tensor:
        """u: float32 [dim], entries +-1."""
        return self._task[0]

    @cached_property
    def rare_target(self) -> Tensor:
        """target_scale * v: float32 [dim]."""
        return self._task[1] * (self.target_scale / math.sqrt(self.dim))

    @cached_property
    def teacher(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights gate and up [hidden, dim] and down [dim, hidden], float32."""
        gate, up, down = self._task[2:]
        inner = 1 / math.sqrt(self.dim)
        outer = self.teacher_scale / math.sqrt(SILU_SECOND_MOMENT * self.hidden)
        return gate * inner, up * inner, down * outer

    @cached_property
    def _task(self) -> tuple[Tensor, ...]:
        generator = _generator("rare_token_task", self.seed, 0)
        signs = generator.integers(0, 2, size=(2, self.dim), dtype=np.int8) * 2.0 - 1.0
        rows, columns = (self.hidden, self.dim), (self.dim, self.hidden)
        weights = (_normal(generator, shape) for shape in (rows, rows, columns))
        return *torch.from_numpy(signs.astype(np.float32)), *weights

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs and targets, float32 [batch_size, dim], and is_rare, bool [batch_size].

        Every step draws the same numbers whether or not it has a rare token, so common tokens do
        not depend on event_probability.
        """
        generator = _generator("rare_token_batch", self.seed, step)
        event = generator.random() < self.event_probability
        row = int(generator.integers(self.batch_size))
        x = _normal(generator, (self.batch_size, self.dim))
        rare = self.rare_input + self.noise * _normal(generator, (self.dim,))
        is_rare = torch.zeros(self.batch_size, dtype=torch.bool)
        x -= torch.outer(x @ self.rare_input / self.dim, self.rare_input)
        gate, up, down = self.teacher
        y = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        if event:
            x[row], y[row], is_rare[row] = rare, self.rare_target, True
        return x, y, is_rare


def _is_whole(value: object) -> bool:
    return type(value) is int and 1 <= value < 2**32


def _generator(stream: str, seed: int, step: int) -> np.random.Generator:
    if not all(isinstance(n, int | np.integer) and 0 <= n < 2**32 for n in (seed, step)):
        got = f"{shown(seed)} and {shown(step)}"
        raise ValueError(f"{stream}: expected seed and step in [0, 2^32), got {got}")
    return np.random.default_rng((_STREAMS[stream], seed, step))


def _normal(generator: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def _check_length(length: int, context: int, source: str) -> None:
    needed = HELD_OUT_DIVISOR * (context + 1)
    if length < needed:
        raise ValueError(
            f"text {source}: has {length} bytes, but context {context} needs at least {needed}"
        )


def _corpus(raw: bytes, source: str) -> Corpus:
    data = np.frombuffer(raw, dtype=np.uint8)
    return Corpus(data=data, sha256=hashlib.sha256(raw).hexdigest(), source=source)


def _stdlib_names(root: Path) -> list[str]:
    """Relative POSIX names in sorted order.

    Left out: tests inside packages, and the top-level files that describe one installation
    (_sysconfigdata has its build paths) or that a distribution adds (sitecustomize).
    """
    patterns = ["*.py", *(f"{package}/**/*.py" for package in _PACKAGES)]
    paths = [path.relative_to(root) for pattern in patterns for path in root.glob(pattern)]
    return sorted(
        path.as_posix()
        for path in paths
        if not {"test", "tests"}.intersection(path.parts)
        and not path.name.startswith(("_sysconfigdata", "sitecustomize", "usercustomize"))
    )
