"""The Triton casts: equal to the specification, to plain torch and to the compiled C, bit for bit.

Without a GPU they run in Triton's interpreter, in a process of its own, and are compiled for a
Hopper, where what may change a bit (contraction, flushed subnormals) can be read in the PTX. That
they are fast, only a GPU can show: `experiments/gpu`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fp8lab import Float8CurrentScaling, casting, formats, kernels, scaling
from fp8lab.kernels import gpu_casts

COMPARED = """
import warnings
import torch
from fp8lab import casting, formats, kernels, scaling
from fp8lab.kernels import gpu_casts
from tests.test_devices import (
    DIRECTIONS, OPERANDS, RECIPES, absolute_maximum, adversarial, assert_same, plain, scale_given
)
from fp8lab.formats import E4M3FNUZ
from tests.test_kernels import (
    INF, NAN, ROUNDED, TORCH, assert_equal, edges, fake_quantized_by_torch, values_of_all_kinds
)

warnings.simplefilter("ignore", RuntimeWarning)  # the interpreter's numpy says when it overflows
assert gpu_casts.works(), gpu_casts.why_broken()

one = torch.ones(())
for fmt in ROUNDED:
    points = [sign * point for point in edges(fmt) for sign in (1.0, -1.0)]
    values, out = torch.tensor(points), torch.full((len(points),), 123.0)
    assert gpu_casts.fake_quantize(values, fmt, one, one, out), gpu_casts.why_broken()
    assert_equal(out, torch.tensor([fmt.round(point) for point in points]))

for count in (1, 4096, 9001):
    for dtype in (torch.float32, torch.bfloat16):
        x = values_of_all_kinds(count, dtype)
        for fmt in TORCH:
            for factor in (1.0, 37.7, 1e-30, 0.0, INF, torch.finfo(torch.float32).max):
                scale = torch.tensor(factor)
                x[0] = torch.nextafter(torch.tensor(fmt.max), one * INF)  # not saturated yet
                amax = torch.nan_to_num(x.float().abs(), nan=0.0, posinf=INF).amax()
                assert torch.equal(gpu_casts.amax(x), amax)
                how = fmt, scale, scale.reciprocal()
                out = torch.full((count,), 123.0)
                found = gpu_casts.fake_quantize_and_count(x, *how, out)
                expected = fake_quantized_by_torch(x, *how)
                assert_equal(out, expected)
                scaled = x.float() * scale
                saturated = (scaled.abs() > fmt.max * (1 + 2.0**-23)).sum()
                flushed = ((scaled.clamp(-fmt.max, fmt.max).to(TORCH[fmt]).float() == 0) & (x != 0))
                for mine, other in zip(found, (amax, saturated, flushed.sum()), strict=True):
                    assert mine.dtype == other.dtype and torch.equal(mine, other), (fmt, factor)
                own = x.float().clone()
                assert gpu_casts.fake_quantize(own, *how, own)  # `out` may be the tensor itself
                assert_equal(own, expected)

# By the way that casts go: as if the CPU were the GPU.
launched = []
launch = gpu_casts._launch
gpu_casts._launch = lambda *given: launched.append(given[0]) or launch(*given)
is_plain = kernels.is_plain
for name, recipe in RECIPES.items():
    for dtype in (torch.float32, torch.bfloat16):
        for operand in OPERANDS:
            tensor = adversarial(20).to(dtype)
            expected, amax = plain(tensor, recipe, operand, "rowwise"), None
            kernels.usable = lambda tensor: False
            values, amax = expected.fake_quantized(), absolute_maximum(tensor)
            gpu_casts.usable = lambda tensor: is_plain(tensor)
            how = casting.cast_for(
                tensor, recipe, operand, scale_given(tensor, recipe), "rowwise"
            )
            assert_same(how.scale, expected.scale)
            assert_same(how.fake_quantized(), values)
            assert_same(how.fake_quantized(out=torch.empty(tensor.shape)), values)
            assert_same(how.fake_quantized_and_amax()[0], values)
            assert_same(scaling.absolute_maximum(tensor), amax)
            gpu_casts.usable = lambda tensor: False
            is_whole = how.tile is None and how.scale is not None
            is_whole = is_whole and how.format is not formats.SIGN
            assert (launched.count(1) == 3) == is_whole, (name, launched)
            launched.clear()
# Amax, scales and cast of tiles in one pass, by way of `fake_quantize`.
kernels.usable = lambda tensor: False
for name in ("block", "block, any scale", "MXFP8, up"):
    recipe, size = RECIPES[name], 32 if name == "MXFP8, up" else 128
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 40):
            wide = adversarial(rows + 6, 384)[6 if rows == 1 else 0 :].to(dtype).contiguous()
            gpu_casts.usable = lambda tensor: False
            out, expected = torch.empty(wide.shape), torch.empty(wide.shape)
            casting.fake_quantize(wide, recipe, "input", out=expected)
            gpu_casts.usable = lambda tensor: is_plain(tensor)
            launched.clear()
            casting.fake_quantize(wide, recipe, "input", out=out)
            assert launched == [2], (name, launched)
            assert_same(out, expected)
            assert gpu_casts.fake_quantize_blocks(wide, E4M3FNUZ, size, "any", 1e30, out)
            assert not ((out == 0) & out.signbit()).any()
print("equal")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fp8lab.kernels import gpu, gpu_casts

pointers = {"x": "*i32", "out": "*fp32", "scale": "*fp32", "scale_inv": "*fp32", "amax": "*i32"}
pointers |= {"counts": "*i64", "tables": "*i64", "extremes": "*i32", "channels": "*i32"}
pointers |= {"tokens": "*i32", "largest": "fp32", "limit": "fp32"}
pointers |= {"reciprocal": "fp32", "most": "fp32"}
values = {"HALF": True, "SIZE": 128, "COUNTS": True, "ONE_ZERO": True, "BLOCKS": 32, "KIND": 1}
values |= {"ROWS": 32, "COLUMNS": 128}
for function in (*gpu_casts._kernels(), gpu._kernel()[1]):
    for half in (True, False):
        types = {name: pointers.get(name, "i32") for name in function.arg_names}
        types |= {name: "constexpr" for name in function.arg_names if name in values}
        types["x"] = "*i16" if half else "*i32"
        constants = {name: values[name] for name in types if name in values} | {"HALF": half}
        source = ASTSource(fn=function, signature=types, constexprs=constants)
        options = {"enable_fp_fusion": False}
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert made.asm["cubin"]
        assert "fma" not in made.asm["ptx"] and ".ftz" not in made.asm["ptx"]
print("compiled")
"""


def said_by(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_in_the_interpreter_the_casts_are_those_of_plain_torch() -> None:
    pytest.importorskip("triton")
    assert said_by(COMPARED, TRITON_INTERPRET="1") == "equal"


def test_the_kernels_compile_for_a_hopper_and_round_each_operation(tmp_path: Path) -> None:
    pytest.importorskip("triton.backends.nvidia")
    assert said_by(COMPILED, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)) == "compiled"


def fails() -> None:
    raise RuntimeError("0 active\ndrivers")


def test_a_triton_that_fails_is_not_asked_again_and_torch_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(6, 50)
    expected = casting.fake_quantize(x, Float8CurrentScaling(), "input")
    monkeypatch.setattr(gpu_casts, "_broken", [])
    monkeypatch.setattr(gpu_casts, "_kernels", lambda: ({}, {}))
    monkeypatch.setattr(kernels, "usable", lambda tensor: False)
    monkeypatch.setattr(gpu_casts, "usable", lambda tensor: gpu_casts.works())
    assert gpu_casts.works() and gpu_casts.why_broken() is None
    monkeypatch.setattr(gpu_casts, "_kernels", fails)
    with pytest.warns(UserWarning, match="casts on a GPU go by plain torch: Triton fails: 0 activ"):
        how = casting.cast_for(x, Float8CurrentScaling(), "input")
    assert gpu_casts.why_broken() == "0 active drivers"
    assert not gpu_casts.works()
    assert torch.equal(how.fake_quantized(), expected)
    values, amax = how.fake_quantized_and_amax()
    assert torch.equal(values, expected) and amax == x.abs().max()
    monkeypatch.setattr(gpu_casts, "usable", lambda tensor: True)  # works() was asked before
    assert torch.equal(how.fake_quantized(), expected)
    assert torch.equal(how.fake_quantized_and_amax()[0], expected)
    assert scaling.absolute_maximum(x) == x.abs().max()


def test_what_is_not_the_memory_that_is_expected_is_refused() -> None:
    x, one = torch.randn(6, 50), torch.ones(())
    with pytest.raises(ValueError, match=r"^out: torch.float32 \[50, 6\] on cpu, expected 300"):
        gpu_casts.fake_quantize(x, formats.E4M3, one, one, torch.empty(6, 50).t())
    with pytest.raises(ValueError, match=r"^scale: torch.float64 \[\] on cpu, expected 1 contig"):
        gpu_casts.fake_quantize(x, formats.E4M3, one.double(), one, torch.empty(6, 50))
    with pytest.raises(ValueError, match=r"^BF16: expected a signed format of at most 8 bits"):
        gpu_casts.fake_quantize(x, formats.BF16, one, one, torch.empty(6, 50))


def test_a_tensor_that_is_not_on_a_gpu_is_not_for_these_kernels() -> None:
    assert not gpu_casts.usable(torch.ones(3))
    assert not gpu_casts.usable(torch.ones(3, device="meta"))


@pytest.mark.gpu
def test_on_a_gpu_the_same_casts() -> None:
    """Sixteen million elements, so that programs meet; what a program on its own does, the table in
    `test_devices` shows."""
    x = torch.randn(1 << 24) * torch.exp2(torch.randint(-30, 30, (1 << 24,)).float())
    x[::1001] = torch.nan
    for dtype in (torch.float32, torch.bfloat16):
        tensor, scale = x.to(dtype), torch.tensor(0.37)
        how = formats.E4M3, scale, scale.reciprocal()
        expected = torch.empty_like(x)
        counted = kernels.fake_quantize_and_count(tensor, *how, expected)
        out = torch.empty_like(x, device="cuda")
        there = formats.E4M3, how[1].cuda(), how[2].cuda()
        found = gpu_casts.fake_quantize_and_count(tensor.cuda(), *there, out)
        assert found is not None, gpu_casts.why_broken()
        assert torch.equal(out.cpu().nan_to_num(7.7), expected.nan_to_num(7.7))
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, counted, strict=True))
        assert torch.equal(gpu_casts.amax(tensor.cuda()).cpu(), kernels.amax(tensor))
