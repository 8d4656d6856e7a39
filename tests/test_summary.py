"""One pass over a tensor: three ways to the same integers, and numpy's.

The oracle takes a tensor's bits apart in numpy and sums in Python's integers. C, plain torch and
the Triton kernel (in Triton's interpreter, in a process of its own) give those numbers, not nearly
but equal, whatever the shape, the dtype, the number of threads, and for every kind of tensor that a
model may hand over. What is computed from summaries is tested in `test_measure`.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fp8lab import kernels
from fp8lab.kernels import gpu
from fp8lab.kernels.summary import Summary, plain, summary
from fp8lab.sketch import NUM_SUMS, PACKED, Sketch

INF, NAN = math.inf, math.nan
RUNNABLE = kernels.why_unavailable() is None
needs_kernels = pytest.mark.skipif(not RUNNABLE, reason=str(kernels.why_unavailable()))

# One element; less than a block of the C loop; whole blocks; wider than what it takes at once;
# more than one table holds; enough bfloat16 to be counted by value.
SHAPES = [(1, 1), (3, 5), (2, 64), (7, 4500), (2, 10000), (300, 1), (130, 40), (300, 500)]


def of_all_kinds(count: int, seed: int = 0) -> Tensor:
    """float32 [count]: random bit patterns, normal numbers, elements at and near edges of bins."""
    generator = torch.Generator().manual_seed(seed + count)
    patterns = torch.randint(-(2**31), 2**31, (count,), generator=generator)
    near = patterns[::4] & ~0xFFFFF
    patterns[::4] = near + torch.randint(0, 5, near.shape, generator=generator)
    tensor = patterns.to(torch.int32).view(torch.float32)
    tensor[1::2] = torch.randn(tensor[1::2].shape, generator=generator)
    tensor[torch.rand(count, generator=generator) < 0.1] = 0.0
    return tensor


def kinds(x: Tensor) -> Iterator[Tensor]:
    """As it is; finite; of one sign and of the other; zeros of both; NaN."""
    finite = torch.where(x.isfinite(), x, 0.5)
    yield from (x, finite, finite.abs(), -finite.abs() - 1e-30, 0.0 * finite, x * NAN)


def oracle(tensor: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    values = tensor.detach().float().numpy()
    code = values.view(np.uint32).astype(np.int64)
    size = code & 0x7FFFFFFF
    exponent, bins, low = size >> 23, (size >> 20).ravel(), (size & 0xFFFFF).ravel()
    significand = (size & 0x7FFFFF) + (exponent > 0) * (1 << 23)
    fields = np.zeros((6, 2048), dtype=np.int64)
    for field, chosen in ((0, low >= 0), (1, low == 0), (2, (low == 1) | (low == 2))):
        fields[field] = np.bincount(bins[chosen], minlength=2048)
    np.add.at(fields[3], bins, low)
    squares = [0] * 2048
    for index in np.unique(bins).tolist():
        squares[index] = sum(x * x for x in low[bins == index].tolist())
    fields[4], fields[5] = [x % 2**32 for x in squares], [x >> 32 for x in squares]
    signed = np.zeros(256, dtype=np.int64)
    np.add.at(signed, exponent.ravel(), np.where(code >> 31, -significand, significand).ravel())
    finite = values[np.isfinite(values)]
    extremes = [0, -0x7F800000, -0x7F800000, -0x7F800001]
    if finite.size:
        magnitude = np.abs(finite)
        extremes[0] = bits_of(magnitude.max())
        if magnitude.any():
            extremes[1] = -bits_of(magnitude[magnitude > 0].min())
        # -0.0 comes before 0.0, which numpy's minimum does not know.
        order = np.lexsort((~np.signbit(finite), finite))
        extremes[2], extremes[3] = -place_of(finite[order[0]]), place_of(finite[order[-1]])
    known = np.abs(np.where(np.isnan(values), np.float32(0), values))
    packed = np.concatenate([fields.ravel(), signed, np.array(extremes)])
    return packed, known.max(axis=0, initial=0.0), known.max(axis=1, initial=0.0)


def bits_of(value: np.float32) -> int:
    return int(np.float32(value).view(np.uint32))


def place_of(value: np.float32) -> int:
    return -1 - bits_of(-value) if np.signbit(value) else bits_of(value)


def assert_equal(found: Summary, expected: Any) -> None:
    assert (found.packed.dtype, found.packed.shape) == (torch.int64, (PACKED,))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.numpy(), np.asarray(other))
        assert one.dtype in (torch.int64, torch.float32)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_number_equals_numpys(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for tensor in kinds(of_all_kinds(math.prod(shape)).view(shape)):
        x = tensor.to(dtype)
        expected = oracle(x)
        assert kernels.usable(x)
        assert_equal(summary(x), expected)
        assert_equal(plain(x), expected)


@needs_kernels
def test_a_tensor_of_the_worst_elements_overflows_nothing() -> None:
    # 2^22 + 64 elements whose low bits are all ones: in one bin, in tables emptied 257 times.
    worst = float(np.nextafter(np.float32(2.25), np.float32(0.0)))
    n, low = 2**22 + 64, 2**20 - 1
    packed = summary(torch.full((2, n // 2), worst)).packed.numpy()
    index = bits_of(np.float32(worst)) >> 20
    fields = packed[: 6 * 2048].reshape(6, 2048)[:, index].tolist()
    assert fields == [n, 0, 0, n * low, n * low**2 % 2**32, n * low**2 >> 32]
    assert np.count_nonzero(packed[: 6 * 2048]) == 4
    assert Sketch.from_packed(packed).sum_abs == n * worst
    ones = Sketch.from_packed(summary(torch.ones(2, n // 2)).packed.numpy())
    assert (ones.sum, ones.bins[1].sum()) == (n, n)
    coarse = torch.full((2, n // 2), -2.234375).bfloat16()
    assert Sketch.from_packed(summary(coarse).packed.numpy()).sum_squares == n * 2.234375**2


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_nothing(dtype: torch.dtype) -> None:
    x = of_all_kinds(111 * 15000).view(-1, 111).to(dtype)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 4, 7):
            torch.set_num_threads(threads)
            found.append(summary(x))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))
        # Nor what is kept of a tensor until its step ends.
        sizes = [part.untyped_storage().nbytes() for part in other]
        assert sizes == [8 * PACKED, 4 * 111, 4 * 15000]


@needs_kernels
def test_a_long_column_of_bfloat16_is_counted_in_parts() -> None:
    # Its table of values is emptied after 2^31 elements; a row, however short, counts as 4096.
    x = of_all_kinds(2**19 + 2**10).view(-1, 1).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = summary(x)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(found, plain(x), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e5m2], ids=str)
def test_every_pass_is_given_float32_or_bfloat16(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The GPU's, for one, reads anything else as if it were one of the two.
    given = []
    monkeypatch.setattr(kernels, "usable", lambda matrix: given.append(matrix.dtype))
    x = torch.randn(8, 8).to(dtype)
    assert_equal(summary(x), oracle(x.float()))
    assert given == [torch.float32]


IN_A_SMALL_THREAD = """
import threading
import torch
from fp8lab.kernels.summary import plain, summary

x = torch.randn(512, 512)
threading.stack_size(256 << 10)  # there are systems that give less
for tensor in (x, x.bfloat16()):
    found = []
    thread = threading.Thread(target=lambda: found.append(summary(tensor)))
    thread.start()
    thread.join()
    assert all(torch.equal(*pair) for pair in zip(found[0], plain(tensor), strict=True))
"""


@needs_kernels
def test_a_thread_with_little_memory_of_its_own_is_enough() -> None:
    command = [sys.executable, "-c", IN_A_SMALL_THREAD]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_plain_torch_takes_large_tensors_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = of_all_kinds(5000).view(50, 100)
    expected = oracle(x)
    for at_once in (1, 100, 700, 10**6):
        monkeypatch.setattr("fp8lab.kernels.summary._AT_ONCE", at_once)
        assert_equal(plain(x), expected)


def test_without_a_compiler_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = of_all_kinds(6000).view(60, 100)
    before = summary(x)
    monkeypatch.setattr(kernels, "usable", lambda tensor: False)
    assert all(torch.equal(*pair) for pair in zip(before, summary(x), strict=True))


# --- the Triton kernel --------------------------------------------------------------------------

IN_THE_INTERPRETER = """
import torch
from fp8lab.kernels import gpu
from fp8lab.kernels.summary import plain
from tests.test_summary import kinds, of_all_kinds

assert gpu.usable(), gpu._broken
for shape in [(1, 1), (3, 5), (70, 300), (33, 129), (5, 1000)]:
    for dtype in (torch.float32, torch.bfloat16):
        for tensor in kinds(of_all_kinds(shape[0] * shape[1]).view(shape)):
            x = tensor.to(dtype)
            found = gpu.summary(x)
            assert found is not None, gpu._broken
            for one, other in zip(found, plain(x), strict=True):
                assert one.dtype == other.dtype
                assert torch.equal(one, other), (shape, dtype)
print("equal")
"""


def test_the_triton_kernel_gives_the_same_numbers() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", IN_THE_INTERPRETER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "equal", done.stderr


def test_a_triton_that_fails_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("0 active drivers")

    monkeypatch.setattr(gpu, "_broken", [])
    monkeypatch.setattr(gpu, "_kernel", fails)
    assert gpu.summary(of_all_kinds(6).view(2, 3)) is None
    assert gpu._broken == ["0 active drivers"]
    assert not gpu.usable()


@pytest.mark.gpu
def test_on_a_gpu_the_same_numbers() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = of_all_kinds(300 * 500).view(300, 500).to(dtype)
        found = summary(x.cuda())
        assert gpu.usable(), gpu._broken
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, summary(x), strict=True))


# --- whatever a model hands over ----------------------------------------------------------------


class Tagged(Tensor):
    """A subclass as libraries have them: a tensor with a memory."""


def handed_over() -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> what is summarised, and the plain float32 matrix that it means."""
    x = of_all_kinds(24 * 40).view(24, 40)
    x = torch.where(x.isnan(), NAN, x)  # arithmetic makes one NaN of all
    return {
        "three axes": (x.view(4, 6, 40), x),
        "not contiguous": (x.t().contiguous().t(), x),
        "a slice": (torch.cat([x, x], dim=1)[:, :40], x),
        "every other column": (x[:, ::2], x[:, ::2].contiguous()),
        "expanded": (x[:1].expand(5, 40), x[:1].repeat(5, 1)),
        "float64": (x.double(), x),
        "float16": (x.half(), x.half().float()),
        "integers": (torch.arange(-6, 6).view(3, 4), torch.arange(-6, 6).view(3, 4).float()),
        "booleans": (x > 0, (x > 0).float()),
        "complex": (torch.complex(x, -x).conj(), torch.stack([x, x], dim=-1).view(-1, 2)),
        "negated": (torch._neg_view(-x), x),
        "sparse": (torch.eye(4).to_sparse(), torch.eye(4)),
        "a parameter": (nn.Parameter(x.clone()), x),
        "with a gradient": (x.clone().requires_grad_() * 1.0, x),
        "a subclass": (x.clone().as_subclass(Tagged), x),
        "float8": (x.nan_to_num(0.0).clamp(-9, 9).to(torch.float8_e4m3fn), None),
        "one number": (torch.tensor(-3.5), torch.tensor([[-3.5]])),
        "one axis": (x[0], x[:1]),
        "no tokens": (x[:0], x[:0]),
        "no channels": (x[:, :0], x[:, :0]),
        "meta": (torch.empty(3, 40, device="meta"), x[:0]),
    }


@pytest.mark.parametrize("name", handed_over())
def test_anything_that_holds_numbers_is_summarised(name: str) -> None:
    tensor, meaning = handed_over()[name]
    meaning = tensor.float() if meaning is None else meaning
    with torch.random.fork_rng():
        found = summary(tensor)
    assert all(type(part) is Tensor and not part.requires_grad for part in found)
    assert_equal(found, oracle(meaning))


def test_of_a_distributed_tensor_the_part_that_lies_here_is_summarised() -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    x = of_all_kinds(24 * 40).view(24, 40)
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        assert_equal(summary(distribute_tensor(x, mesh, [Shard(0)])), oracle(x))
    finally:
        distributed.destroy_process_group()


def test_in_inference_mode_and_under_autocast_nothing_changes() -> None:
    x = of_all_kinds(240).view(6, 40)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert_equal(summary(x), oracle(x))
        assert_equal(plain(x), oracle(x))
    assert NUM_SUMS + 4 == PACKED
