"""The audit's compiled passes where their vectors end, and stacks whose experts lie transposed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fp8lab import audit, casting, kernels
from fp8lab.checkpoint import weighing
from fp8lab.checkpoint.weighing import Bands, pair, weigh
from fp8lab.kernels import weights as compiled

if kernels.why_unavailable() is not None:
    pytest.skip(str(kernels.why_unavailable()), allow_module_level=True)

WIDTHS = [1, 15, 31, 32, 33, 64, 127, 129, 160, 2047, 2048, 2050, 4111]


def spread(rows: int, columns: int, seed: int, width: float) -> torch.Tensor:
    """bfloat16 of many magnitudes: blocks that are clipped, flushed, and zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * 0.02
    values *= torch.exp(width * torch.randn(rows, columns, generator=generator)).clamp(1e-9, 1e6)
    values[::5, columns // 3 : columns // 2] = 0.0
    return values.bfloat16()


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("width", [0.0, 2.0, 7.0])
def test_counts_and_amaxes_at_every_edge(columns: int, width: float) -> None:
    tensor = spread(70, columns, columns, width)
    found, values = weigh(Bands(tensor)), tensor.double().numpy()
    assert np.array_equal(found.row_amax, np.abs(values).max(1))
    assert np.array_equal(found.column_amax, np.abs(values).max(0))
    assert np.allclose(found.row_power, (values**2).sum(1), rtol=2**-16, atol=0)
    assert np.allclose(found.column_power, (values**2).sum(0), rtol=2**-16, atol=0)
    assert found.fourth == pytest.approx((values**4).sum(), rel=2**-16)
    assert found.zeros == (values == 0).sum()
    for name, recipe in weighing.RECIPES.items():
        how = casting.cast_for(tensor, recipe, "weight")
        value, original = how.fake_quantized().double(), tensor.double()
        lost = found.losses[name]
        assert lost.flushed == int(((how.rounded() == 0) & (original != 0)).sum())
        assert lost.saturated == int(how.saturated().sum())
        assert lost.error == pytest.approx(float((value - original).square().sum()), rel=2**-16)


@pytest.mark.parametrize("columns", WIDTHS)
def test_products_at_every_edge(columns: int) -> None:
    gate, up = spread(7, columns, 1, 0.0), spread(7, columns, 2, 0.0)
    products = compiled.pairs(gate, up, up.flip(0)).numpy()
    expected = [(gate.double() * other.double()).sum(1).numpy() for other in (up, up.flip(0))]
    np.testing.assert_allclose(products, expected, rtol=0, atol=2**-20 * columns * 0.01)


@pytest.mark.parametrize("shape", [(1, 1), (31, 33), (32, 32), (64, 96), (100, 70), (33, 2)])
@pytest.mark.parametrize("step", [1, 2])
def test_what_lies_transposed_is_turned(shape: tuple[int, int], step: int) -> None:
    stored = torch.randn(shape[1] + 1, step * shape[0] + 3).bfloat16()
    view = stored.t()[: step * shape[0] : step, : shape[1]]
    turned = compiled.turned(view)
    assert turned is not None and turned.is_contiguous()
    assert torch.equal(turned, view)
    assert compiled.turned(view.float()) is None
    assert compiled.turned(stored.t()[::3]) is None


def test_scales_of_tiles_are_those_of_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = weighing._nothing((512, 480))
    moments.tile_amax.copy_(spread(32, 30, 3, 3.0).abs())
    moments.tile_amax[0] = 0.0
    amax = moments.tile_amax.max()
    found = weighing._scales(moments, amax, torch.bfloat16)
    monkeypatch.setattr(kernels, "usable", lambda tensor: False)
    expected = weighing._scales(moments, amax, torch.bfloat16)
    assert torch.equal(found.tiles, expected.tiles)
    assert torch.equal(found.tiles_inv, expected.tiles_inv)


def test_a_transposed_matrix_weighs_what_its_copy_does(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = spread(300, 260, 4, 2.0)
    lying = tensor.t().contiguous().t()
    for band in (weighing.BAND, 1):  # kept whole, and made by bands
        monkeypatch.setattr(weighing, "BAND", band)
        one, other = Bands(tensor), Bands(lying)
        a, b = weigh(one), weigh(other)
        assert a.losses == b.losses and a.fourth == b.fourth
        assert np.array_equal(a.row_power, b.row_power)
        assert np.array_equal(pair(one, one, a, a).permuted, pair(other, other, b, b).permuted)


def test_experts_are_alike_on_any_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks = {"m.experts.gate_up_proj": (5, 96, 160), "m.experts.down_proj": (5, 80, 96)}
    save_file({n: torch.randn(s).bfloat16() for n, s in stacks.items()}, tmp_path / "a.safetensors")
    several = audit(tmp_path / "a.safetensors")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    assert audit(tmp_path / "a.safetensors") == several
    assert several.layers[0].experts == 5
