"""The compiled casts against plain torch, written out again here: equal bit for bit.

Two oracles, neither of them `casting`: torch's own operations and casts for the formats it has, and
`FloatFormat.round` on every representable value, midpoint and neighbour for those it lacks. NaNs
are compared by where they are, everything else as integers, so that -0.0 is not 0.0. A process
tries once to build the library: `untried` makes it forget that, and a race takes two of them.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fp8lab import formats, kernels
from fp8lab.formats import E4M3, E5M2, FloatFormat

TORCH = {
    formats.E4M3: torch.float8_e4m3fn,
    formats.E4M3FNUZ: torch.float8_e4m3fnuz,
    formats.E5M2: torch.float8_e5m2,
    formats.E5M2FNUZ: torch.float8_e5m2fnuz,
}
EXTREME = FloatFormat(name="E5M2+", exponent_bits=5, mantissa_bits=2, bias=-75, top="finite")
TINY = FloatFormat(name="E3M0", exponent_bits=3, mantissa_bits=0, bias=127, top="finite")
ROUNDED = [
    *(
        fmt
        for fmt in formats.FORMATS.values()
        if fmt.overflow == "saturate" and fmt.signed and fmt.has_zero
    ),
    EXTREME,
    TINY,
]
# Each way through the C: constant, odd and wide tiles; down columns by fours and ones; ragged.
TILES = [
    *[(1, 16), (1, 32), (1, 128), (16, 16), (32, 32), (128, 128), (16, 1), (32, 1), (128, 1)],
    *[(1, 7), (3, 1), (5, 3), (1, 5000), (2, 5000), (1000, 1), (1000, 1000), (1000, 5000)],
]
SHAPES = [(1, 1), (3, 5), (37, 100), (64, 256), (130, 40), (7, 4500), (4, 10000)]
INF, NAN = math.inf, math.nan
RUNNABLE = kernels.why_unavailable() is None
needs_kernels = pytest.mark.skipif(not RUNNABLE, reason=str(kernels.why_unavailable()))


def assert_equal(found: Tensor, expected: Tensor) -> None:
    """Same shape, NaNs in the same places, every other bit the same."""
    assert found.dtype == expected.dtype == torch.float32
    assert found.shape == expected.shape
    bits = [torch.where(t.isnan(), 1.0, t).view(torch.int32) for t in (found, expected)]
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(*bits)


def values_of_all_kinds(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[count]: random bit patterns, normal numbers, and the special ones in between."""
    generator = torch.Generator().manual_seed(count)
    patterns = torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int64)
    tensor = patterns.to(torch.int32).view(torch.float32)
    tensor[::2] = torch.randn(tensor[::2].shape, generator=generator) * 100
    powers = torch.tensor([2.0**e for e in range(-149, 128)])
    special = torch.cat([powers, 1.5 * powers[1:], torch.tensor([0.0, INF, NAN])])
    special = torch.cat([special, -special])
    where = torch.randperm(count, generator=generator)[: len(special)]
    tensor[where] = special[torch.randperm(len(special), generator=generator)[: len(where)]]
    return tensor.to(dtype)


def fake_quantized_by_torch(x: Tensor, fmt: FloatFormat, scale: Tensor, inverse: Tensor) -> Tensor:
    """The formula in torch's own operations; the scales are spread to x's shape."""
    y = (x.float() * scale).clamp(-fmt.max, fmt.max)
    return y.to(TORCH[fmt]).float() * inverse


def fake_quantized(
    x: Tensor,
    fmt: FloatFormat,
    scale: Tensor,
    inverse: Tensor,
    tile: tuple[int, int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    assert kernels.usable(x)
    out = torch.full(x.shape, 123.0) if out is None else out
    kernels.fake_quantize(x, fmt, scale, inverse, tile, out)
    return out


def spread(per_tile: Tensor, tile: tuple[int, int], shape: torch.Size) -> Tensor:
    row, column = (torch.arange(n) // t for n, t in zip(shape, tile, strict=True))
    return per_tile[row[:, None], column[None, :]]


def tile_amax_by_torch(x: Tensor, tile: tuple[int, int]) -> Tensor:
    magnitude = torch.nan_to_num(x.float().abs(), nan=0.0, posinf=INF)
    strips = [strip.amax(0) for strip in magnitude.split(tile[0])]
    return torch.stack([torch.stack([p.amax() for p in s.split(tile[1])]) for s in strips])


def edges(fmt: FloatFormat) -> Iterator[float]:
    """Every value, every midpoint, and the float32 on either side of each; beyond max; specials."""
    grid = list(fmt.values())
    points = grid + [(a + b) / 2 for a, b in itertools.pairwise(grid)]
    points += [fmt.max * (1 + 2.0**-23), fmt.max * 1.0625, fmt.max * 2, 2.0**-149, 2.0**-126]
    tensor = torch.tensor(points)
    for towards in (-INF, INF):
        around = torch.nextafter(tensor, torch.tensor(towards))
        yield from around.tolist()
    yield from (*tensor.tolist(), INF)


@needs_kernels
@pytest.mark.parametrize("fmt", ROUNDED, ids=repr)
def test_every_edge_of_a_format_equals_the_specification(fmt: FloatFormat) -> None:
    points = [sign * point for point in edges(fmt) for sign in (1.0, -1.0)]
    expected = torch.tensor([fmt.round(point) for point in points])
    one = torch.ones(())
    assert_equal(fake_quantized(torch.tensor(points), fmt, one, one), expected)
    assert fake_quantized(torch.tensor([NAN, -NAN]), fmt, one, one).isnan().all()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", TORCH, ids=repr)
def test_a_million_values_equal_torch(fmt: FloatFormat, dtype: torch.dtype) -> None:
    x = values_of_all_kinds(1_000_003, dtype)
    # 0 and infinity make NaNs of infinities and zeros; the last has a subnormal inverse
    for factor in (1.0, 37.7, 1e-30, 0.0, INF, torch.finfo(torch.float32).max):
        scale = torch.tensor(factor)
        inverse = scale.reciprocal()
        expected = fake_quantized_by_torch(x, fmt, scale, inverse)
        assert_equal(fake_quantized(x, fmt, scale, inverse), expected)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_amax_ignores_nan_and_counts_infinity(dtype: torch.dtype) -> None:
    for count in (1, 2, 31, 4096, 4097, 100_003):
        x = values_of_all_kinds(count, dtype)
        finite = torch.where(x.isinf(), 0.0, x)
        for tensor in (x, finite, torch.full_like(x, NAN), -finite):
            assert_equal(kernels.amax(tensor), tile_amax_by_torch(tensor[None], (1, count))[0, 0])
    x = torch.tensor([[2.0**-149, -(2.0**-140), NAN]])
    assert kernels.amax(x) == 2.0**-140


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_tiles_equal_torch_also_where_they_are_cut(
    tile: tuple[int, int], dtype: torch.dtype
) -> None:
    for shape in SHAPES:
        x = values_of_all_kinds(shape[0] * shape[1]).view(shape)
        x = torch.where(torch.rand(shape) < 0.5, x.nan_to_num(0.0, 0.0, 0.0), x).to(dtype)
        if math.prod(shape) // math.prod(tile) < 2000:  # the loop over tiles is slow
            assert_equal(kernels.tile_amax(x, tile), tile_amax_by_torch(x, tile))
        tiles = [-(-n // t) for n, t in zip(shape, tile, strict=True)]
        scale = torch.rand(tiles) * 100
        inverse = torch.rand(tiles)  # unrelated to scale, so that a mix-up shows
        wide = (spread(factor, tile, x.shape) for factor in (scale, inverse))
        expected = fake_quantized_by_torch(x, E4M3, *wide)
        assert_equal(fake_quantized(x, E4M3, scale, inverse, tile), expected)


@needs_kernels
def scales_by_torch(amax: Tensor, kind: str, most: float) -> tuple[Tensor, Tensor]:
    if kind == "exponent":  # TE's float_to_e8m0 and exp2f_rcp, in numpy's integers
        codes = (amax * torch.tensor(1 / 448)).numpy().view(np.int32).astype(np.int64)
        exponent, mantissa = codes >> 23, codes & 0x7FFFFF
        exponent += (mantissa > 0) & (exponent != 254) & ~((exponent == 0) & (mantissa <= 0x400000))
        exponent = np.where(amax.isinf().numpy(), 254, exponent)
        two = np.exp2(127.0 - exponent)
        return torch.tensor(two).float(), torch.tensor(1 / two).float()
    quotient = (448.0 / amax.numpy().astype(np.float64)).astype(np.float32)
    quotient = np.where(np.isinf(quotient), np.float32(most), quotient)
    if kind == "power_of_two":
        quotient = np.exp2(np.frexp(quotient.astype(np.float64))[1] - 1.0).astype(np.float32)
    quotient = np.where((amax.numpy() > 0) & np.isfinite(amax.numpy()), quotient, np.float32(1))
    return torch.from_numpy(quotient), torch.from_numpy(np.float32(1) / quotient)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [16, 32, 128, 4096])
@pytest.mark.parametrize("kind", ["any", "power_of_two", "exponent"])
def test_blocks_in_one_pass_equal_amax_scales_and_cast(
    kind: Any, size: int, dtype: torch.dtype
) -> None:
    x = values_of_all_kinds(3 * 8192 * 5, dtype).view(5, -1)
    x[2] *= torch.exp2(torch.randint(-140, 100, x[2].shape).float()).to(dtype)
    x[3, :4096], x[4, 5] = 0.0, INF
    most = torch.finfo(dtype).max
    amax = tile_amax_by_torch(x, (1, size))
    scale, scale_inv = scales_by_torch(amax, kind, most)
    found = kernels.exponents(amax, 448.0)
    if kind != "exponent":
        found = kernels.scales(amax, 448.0, most, kind == "power_of_two")
    assert_equal(found[0], scale)
    assert_equal(found[1], scale_inv)
    out = torch.empty(x.shape)
    kernels.fake_quantize_blocks(x, E4M3, size, kind, most, out)
    tile = (1, size)
    inverse = spread(scale_inv, tile, x.shape)
    assert_equal(out, fake_quantized_by_torch(x, E4M3, spread(scale, tile, x.shape), inverse))
    with pytest.raises(ValueError, match="in tiles of 20, expected whole ones"):
        kernels.fake_quantize_blocks(x, E4M3, 20, kind, most, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", [E4M3, formats.E5M2FNUZ], ids=repr)
def test_counts_are_those_of_torch(fmt: FloatFormat, dtype: torch.dtype) -> None:
    for count, factor in ((1, 1e9), (4095, 1.0), (4096, 1e-4), (100_003, 30.0), (100_003, 0.0)):
        x = values_of_all_kinds(count, dtype)
        scale = torch.tensor(factor)
        inverse = torch.tensor(0.1)
        out = torch.empty(count)
        amax, saturated, flushed = kernels.fake_quantize_and_count(x, fmt, scale, inverse, out)
        assert_equal(out, fake_quantized_by_torch(x, fmt, scale, inverse))
        assert_equal(amax, kernels.amax(x))
        scaled = x.float() * scale
        rounded = scaled.clamp(-fmt.max, fmt.max).to(TORCH[fmt]).float()
        assert saturated.equal((scaled.abs() > fmt.max * (1 + 2.0**-23)).sum())
        assert flushed.equal(((rounded == 0) & (x != 0)).sum())


@needs_kernels
def test_a_hair_beyond_max_is_not_saturated() -> None:
    ulp = 2.0**-15
    x = torch.tensor([E4M3.max + n * ulp for n in range(5)])
    one = torch.ones(())
    _, saturated, _ = kernels.fake_quantize_and_count(x, E4M3, one, one, torch.empty(5))
    assert saturated == (x.abs() > E4M3.max * (1 + 2.0**-23)).sum() == 2


@needs_kernels
@pytest.mark.parametrize("tile", [None, (1, 32), (128, 128), (32, 1), (3, 5)], ids=str)
def test_out_may_be_the_input_and_autograd_is_told(tile: tuple[int, int] | None) -> None:
    x = values_of_all_kinds(130 * 100).view(130, 100)
    tiles = [] if tile is None else kernels.tile_amax(x, tile).shape
    scale = torch.rand(tiles)
    expected = fake_quantized(x, E5M2, scale, scale, tile)
    version = x._version
    assert_equal(fake_quantized(x, E5M2, scale, scale, tile, out=x), expected)
    assert x._version > version


@needs_kernels
def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_THREADS_FROM", 1)
    x = values_of_all_kinds(300 * 5001).view(300, 5001)
    scale = torch.tensor(3.0)

    def results() -> list[Tensor]:
        out = torch.empty_like(x)
        found = list(kernels.fake_quantize_and_count(x, E4M3, scale, scale, out))
        found += [out, kernels.amax(x), fake_quantized(x, E4M3, scale, scale)]
        for tile in ((1, 32), (1, 5001), (128, 128), (32, 1), (300, 1), (1, 9000)):
            amax = kernels.tile_amax(x, tile)
            found += [amax, fake_quantized(x, E4M3, amax, amax, tile)]
        return found

    alone = results()
    for count in (2, 3, 7, 200):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        for one, many in zip(alone, results(), strict=True):
            if one.dtype == torch.int64:
                assert one.equal(many)
            else:
                assert_equal(many, one)


@needs_kernels
def test_usable_refuses_what_cannot_be_read_as_it_is() -> None:
    x = torch.randn(4, 6)
    assert kernels.usable(x)
    assert kernels.usable(x.bfloat16())
    assert kernels.usable(torch.nn.Parameter(x))
    assert kernels.usable(x[1:3])
    refused = [
        *[x.half(), x.double(), x.int(), x.t(), x[:, 1:], x[:0], torch.empty(0), x.to("meta")],
        *[x.to_sparse(), torch._neg_view(x), torch._efficientzerotensor(4)],
        x.as_subclass(type("Sub", (Tensor,), {})),
    ]
    assert [kernels.usable(tensor) for tensor in refused] == [False] * len(refused)
    seen = []
    torch.vmap(lambda row: seen.append(kernels.usable(row)) or row)(x)
    torch.func.grad(lambda t: seen.append(kernels.usable(t)) or t.sum())(x)
    with torch.utils._python_dispatch.TorchDispatchMode():
        seen.append(kernels.usable(x))
    assert seen == [False] * 3
    assert kernels.usable(x)


@needs_kernels
def test_wrong_memory_and_formats_without_a_kernel_are_refused() -> None:
    x, one = torch.randn(4, 6), torch.ones(())
    for out in (torch.empty(4, 5), torch.empty(6, 4).t(), torch.empty(4, 6).double()):
        with pytest.raises(ValueError, match=r"^out: .*expected 24 contiguous float32"):
            kernels.fake_quantize(x, E4M3, one, one, None, out)
    with pytest.raises(ValueError, match=r"^scale: .*expected 6 contiguous float32"):
        kernels.fake_quantize(x, E4M3, one, one, (2, 2), torch.empty(4, 6))
    with pytest.raises(ValueError, match=r"^scale_inv: "):
        kernels.fake_quantize_and_count(x, E4M3, one, one.double(), torch.empty(4, 6))
    low = FloatFormat(name="LOW", exponent_bits=4, mantissa_bits=3, bias=128, top="fn")
    high = FloatFormat(name="HIGH", exponent_bits=5, mantissa_bits=2, bias=-76, top="finite")
    for fmt in (formats.BF16, formats.E8M0, low, high):
        with pytest.raises(ValueError, match=f"^{fmt.name}: "):
            kernels.fake_quantize(x, fmt, one, one, None, torch.empty(4, 6))


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process that has not asked for a library yet, and its empty cache folder."""
    monkeypatch.setattr(kernels, "_library", None)
    monkeypatch.setattr(kernels, "_reason", None)
    monkeypatch.setattr(kernels, "_tried", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fp8lab"


def compiler(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.long
@needs_kernels
def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    script = """
import torch
from fp8lab import kernels
assert kernels.usable(torch.ones(3)), kernels.why_unavailable()
assert kernels.amax(torch.arange(6.0)) == 5
"""
    racing = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    assert [(process.communicate(timeout=120)[0], process.returncode) for process in racing] == [
        ("", 0),
        ("", 0),
    ]
    assert {path.suffix for path in (tmp_path / "fp8lab").iterdir()} == {".so"}


@pytest.mark.long
@needs_kernels
def test_a_truncated_library_is_built_again_and_a_whole_one_is_not(
    untried: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernels.usable(torch.ones(3))
    (library,) = untried.iterdir()
    whole = library.read_bytes()
    library.unlink()  # it is mapped here: another file takes its name
    library.write_bytes(whole[:5000])  # mapped, this one could kill the process
    monkeypatch.setattr(kernels, "_tried", False)
    assert kernels.why_unavailable() is None
    assert max(path.stat().st_size for path in untried.iterdir()) > 5000
    monkeypatch.setattr(kernels, "_tried", False)
    monkeypatch.setattr(kernels, "_build", None)
    assert kernels.why_unavailable() is None


@needs_kernels
def test_a_compiler_that_does_not_know_this_processor_still_serves(
    untried: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picky = 'case "$*" in *=native*) exit 1;; esac\nexec cc "$@"'
    monkeypatch.setenv("CC", compiler(untried.parent / "picky", picky))
    x, scale = values_of_all_kinds(100_003), torch.tensor(3.0)
    assert_equal(
        fake_quantized(x, E4M3, scale, scale), fake_quantized_by_torch(x, E4M3, scale, scale)
    )


def test_without_a_compiler_there_is_a_reason(
    untried: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(untried.parent))
    assert not kernels.usable(torch.ones(3))
    assert kernels.why_unavailable() == "no C compiler on PATH: cc, gcc, clang"
    with pytest.raises(RuntimeError, match="no C compiler on PATH"):
        kernels.amax(torch.ones(3))


def test_where_building_fails_there_is_a_reason(
    untried: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = compiler(untried.parent / "cc", "echo 'here: error: no' >&2; exit 1")
    monkeypatch.setenv("CC", f"{failing} -x")
    assert not kernels.usable(torch.ones(3))
    assert kernels.why_unavailable() == f"{failing} -x: here: error: no"
    assert not list(untried.iterdir())


def test_without_a_folder_to_write_to_there_is_a_reason(
    untried: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler(untried.parent / "cc", "exit 1"))
    untried.touch()
    assert not kernels.usable(torch.ones(3))
    assert str(untried) in str(kernels.why_unavailable())


def test_the_environment_switches_kernels_off(
    untried: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FP8LAB_KERNELS", "0")
    assert not kernels.usable(torch.ones(3))
    assert kernels.why_unavailable() == "switched off by FP8LAB_KERNELS=0"
    assert not untried.exists()


@pytest.mark.long
def test_a_library_that_others_could_have_written_is_not_loaded(
    untried: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernels.why_unavailable() is None
    (library,) = untried.glob("*.so")
    assert not (library.stat().st_mode | untried.stat().st_mode) & 0o022
    for path, said in ((untried, "others may write to it"), (library, None)):
        monkeypatch.setattr(kernels, "_tried", False)
        mode = path.stat().st_mode
        path.chmod(mode | 0o002)
        reason = kernels.why_unavailable()
        assert reason is None if said is None else said in str(reason)
        if path is untried:
            path.chmod(mode)
    assert not library.stat().st_mode & 0o002  # built again
