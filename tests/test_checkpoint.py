"""The audit of checkpoints: against torch and `casting`, over every layout, from all kinds of file.

What is read is held against oracles that we did not write: torch's cosine similarity, numpy's sums,
safetensors' and transformers' own files. A file, its shards and the live model give equal numbers.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import foreign_feed_forwards as foreign
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_families import FAMILIES, hugging_face
from torch import Tensor, nn

import fp8lab
from fp8lab import casting, kernels
from fp8lab.checkpoint import audit, audited, weighing
from fp8lab.checkpoint.audited import Audit, Channel, corrected, findings_of, judged, survival_of
from fp8lab.checkpoint.layouts import find_layouts
from fp8lab.checkpoint.weighing import Bands, chance, chance_level, pair, weigh
from fp8lab.checkpoint.weights import WeightsError, open_weights
from fp8lab.sites import GateSite, find_gates, survey
from fp8lab.store import RunWriter

DTYPES = [torch.bfloat16, torch.float32, torch.float16]
SHAPES = [(300, 200), (128, 33), (1, 5000), (257, 4100), (17, 1), (640, 2048)]


def matrix(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Weights with an outlier, small rows, small blocks and a column of zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * 0.02
    values[0, 0] = 3.0
    values[shape[0] // 2] *= 1e-4
    values[:, shape[1] // 2] = 0.0
    return values.to(dtype)


@pytest.fixture(params=["compiled", "plain"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(weighing.kernels, "usable", lambda tensor: False)
    elif kernels.why_unavailable() is not None:
        pytest.skip(str(kernels.why_unavailable()))


# --- matrices -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_moments_are_those_of_numpy(shape: tuple[int, int], dtype: torch.dtype) -> None:
    tensor = matrix(shape, dtype)
    found, values = weigh(Bands(tensor)), tensor.double().numpy()
    assert (found.shape, found.count) == (shape, values.size)
    assert np.array_equal(found.row_amax, np.abs(values).max(axis=1))
    assert np.array_equal(found.column_amax, np.abs(values).max(axis=0))
    assert found.amax == np.abs(values).max()
    assert np.allclose(found.row_power, (values**2).sum(axis=1), rtol=2**-16, atol=0)
    assert np.allclose(found.column_power, (values**2).sum(axis=0), rtol=2**-16, atol=0)
    assert found.fourth == pytest.approx((values**4).sum(), rel=2**-16)
    assert found.zeros == (values == 0).sum()


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_are_those_of_the_casts(shape: tuple[int, int], dtype: torch.dtype) -> None:
    tensor = matrix(shape, dtype)
    losses = weigh(Bands(tensor)).losses
    assert list(losses) == list(weighing.RECIPES)
    for name, recipe in weighing.RECIPES.items():
        # float16 is cast from float32, in which it is exact.
        source = tensor.float() if dtype is torch.float16 else tensor
        assert_lost(losses[name], casting.cast_for(source, recipe, "weight"))


def assert_lost(found: weighing.Loss, how: casting.Cast, rel: float = 2**-16) -> None:
    value, original = how.fake_quantized().double(), how.tensor.double()
    assert found.flushed == int(((how.rounded() == 0) & (original != 0)).sum())
    assert found.saturated == int(how.saturated().sum())
    assert found.error == pytest.approx(float((value - original).square().sum()), rel=rel)


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_ties_and_of_what_is_just_below_a_power_of_two(dtype: torch.dtype) -> None:
    """Under scales that are powers of two, where nothing is rounded before it is."""
    ties = torch.tensor([0.25, 0.5, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]).repeat(64, 16)
    below = torch.tensor([0.5, 1.0, 2.0, 4.0]).view(torch.int32).repeat(64, 32) - 1
    below -= torch.arange(64)[:, None].int()
    tensor = torch.cat([ties, below.view(torch.float32)], 1)
    tensor[:, ::16] = 6.0
    tensor[0, 0] = 2688.0  # NVFP4's scales of the other tiles are 1
    losses = weigh(Bands(tensor.to(dtype))).losses
    for name, recipe in weighing.RECIPES.items():
        assert_lost(losses[name], casting.cast_for(tensor.to(dtype), recipe, "weight"))


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-12, 1.0, 1e20])
@pytest.mark.parametrize("recipe", weighing.RECIPES)
def test_losses_of_the_tiny_and_the_huge(recipe: str, scale: float) -> None:
    tensor = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)) * scale
    found = weigh(Bands(tensor)).losses[recipe]
    how = casting.cast_for(tensor, weighing.RECIPES[recipe], "weight")
    value, original = how.fake_quantized().double(), tensor.double()
    assert found.flushed == int(((how.rounded() == 0) & (original != 0)).sum())
    assert found.saturated == int(how.saturated().sum())
    if 1e-18 < scale < 1e18:  # else the squares leave float32
        assert found.error == pytest.approx(float((value - original).square().sum()), rel=2**-16)


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("size", [1e-6, 1e-5, 3e-5, 1e-4])
def test_losses_where_all_but_one_of_a_row_are_subnormal(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = (torch.rand(256, 320, generator=generator) + 0.5) * size
    tensor[:, 0] = 1.0
    losses = weigh(Bands(tensor)).losses
    for name, recipe in weighing.RECIPES.items():
        assert_lost(losses[name], casting.cast_for(tensor, recipe, "weight"), 2**-12)


def test_public_quantize_gives_the_same_errors() -> None:
    tensor = matrix((256, 512), torch.bfloat16)
    found = weigh(Bands(tensor))
    for name, recipe in weighing.RECIPES.items():
        value = fp8lab.quantize(tensor, recipe, "weight").dequantize().double()
        error = float((value - tensor.double()).square().sum())
        assert found.losses[name].error == pytest.approx(error, rel=2**-16)


def test_bands_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = matrix((700, 300), torch.bfloat16)
    whole = weigh(Bands(tensor))
    monkeypatch.setattr(weighing, "BAND", 1)
    banded = weigh(Bands(tensor))
    assert Bands(tensor).height == 128
    assert np.array_equal(whole.row_power, banded.row_power)
    assert np.array_equal(whole.column_amax, banded.column_amax)
    for recipe, loss in whole.losses.items():
        assert loss[1:] == banded.losses[recipe][1:]
        assert loss.error == pytest.approx(banded.losses[recipe].error, rel=2**-16)


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-60, 2.0**-30, 2.0**40, 2.0**70, 2.0**120])
def test_moments_of_what_has_no_squares_in_float32(scale: float, dtype: torch.dtype) -> None:
    tensor = matrix((300, 200), dtype) * scale
    found, values = weigh(Bands(tensor)), tensor.double().numpy()
    assert np.allclose(found.row_power, (values**2).sum(axis=1), rtol=2**-16, atol=0)
    assert np.allclose(found.column_power, (values**2).sum(axis=0), rtol=2**-16, atol=0)
    assert found.fourth == pytest.approx((values**4).sum(), rel=2**-16, abs=0)
    for name, recipe in weighing.RECIPES.items() if scale < 2.0**90 else ():
        how = casting.cast_for(tensor, recipe, "weight")
        error = float((how.fake_quantized().double() - tensor.double()).square().sum())
        assert found.losses[name].error == pytest.approx(error, rel=2**-16, abs=0)


@pytest.mark.usefixtures("passes")
def test_cosines_of_what_has_no_squares_in_float32() -> None:
    gate = matrix((64, 80), torch.float32, 1)
    expected = pair(*(2 * [Bands(gate)]), *(2 * [weigh(Bands(gate))]))
    for scale in (2.0**-100, 2.0**70, 2.0**120):
        bands = Bands(gate * scale)
        found = pair(bands, bands, weigh(bands), weigh(bands))
        np.testing.assert_allclose(found.alignment, expected.alignment, rtol=0, atol=2**-18)
        np.testing.assert_allclose(found.permuted, expected.permuted, rtol=0, atol=2**-18)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e35])
def test_what_is_not_finite_has_no_casts(bad: float) -> None:
    tensor = torch.ones(40, 40)
    tensor[3, 4] = bad
    found = weigh(Bands(tensor))
    assert found.losses == {}
    assert np.array_equal([found.amax], [np.float32(bad)], equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("passes")
def test_cosines_are_those_of_torch(dtype: torch.dtype) -> None:
    gate, up = matrix((301, 500), dtype, 1), matrix((301, 500), dtype, 2)
    up[7] = gate[7] * 2
    up[8] = -gate[8]
    bands = Bands(gate), Bands(up)
    found = pair(*bands, *(weigh(one) for one in bands))
    expected = torch.nn.functional.cosine_similarity(gate.double(), up.double(), eps=0.0)
    control = torch.nn.functional.cosine_similarity(gate.double(), up.double().roll(-150, 0))
    np.testing.assert_allclose(found.alignment, expected.numpy(), atol=2**-18, rtol=0)
    np.testing.assert_allclose(found.permuted, control.numpy(), atol=2**-18, rtol=0)
    assert found.alignment[7] == pytest.approx(1.0, abs=2**-18)
    assert found.alignment[8] == pytest.approx(-1.0, abs=2**-18)
    with pytest.raises(ValueError, match=r"pair: \[301, 500\] and \[300, 500\]"):
        pair(bands[0], Bands(up[1:]), weigh(bands[0]), weigh(bands[1]))


# --- chance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1e-3, 0.1, 0.3, 0.5, 0.8, 0.99, 0.99999])
def test_chance_has_its_closed_forms(t: float) -> None:
    assert chance(t, 2) == pytest.approx(2 / math.pi * math.acos(t), rel=1e-9)
    assert chance(t, 3) == pytest.approx(1 - t, rel=1e-9)  # Archimedes: a sphere's zones
    assert chance(t, 5) == pytest.approx(1 - (3 * t - t**3) / 2, rel=1e-9)
    assert (chance(0.0, 7), chance(1.0, 7), chance(0.5, 1.0)) == (1.0, 0.0, 1.0)


def test_chance_is_what_random_directions_do() -> None:
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((2, 200_000, 24))
    cosines = np.abs((rows[0] * rows[1]).sum(1)) / np.prod(np.linalg.norm(rows, axis=2), axis=0)
    for t in (0.1, 0.3, 0.5):
        expected = chance(t, 24)
        deviation = math.sqrt(expected / 200_000)
        assert abs((cosines >= t).mean() - expected) < 4 * deviation
    largest = cosines.reshape(2000, 100).max(axis=1)
    assert (largest > chance_level(100, 24)).mean() == pytest.approx(0.05, abs=0.02)


def test_the_chance_level_of_a_large_model() -> None:
    # facts: "about 0.08" for the pairs of Llama2-7B
    assert chance_level(11008 * 32, 4096) == pytest.approx(0.082, abs=0.001)
    assert corrected(1e-9, 1000) == pytest.approx(1e-6, rel=1e-3)
    assert corrected(1.0, 5) == 1.0


# --- layouts ------------------------------------------------------------------------------------


def numbers(found: Audit) -> list[tuple[Any, ...]]:
    """All numbers of the feed-forwards, without what differs between a file and a live model."""
    return [
        (
            *(one.alignment, one.channel, one.expert, one.control, one.chance_level),
            *(one.gate_norm, one.up_norm, one.down_norm, one.gain_ratio, one.experts),
            *((w.shape, w.amax, w.rms, w.kurtosis, w.row, w.column) for w in one.weights),
            *(w.survival for w in one.weights),
        )
        for one in found.layers
    ]


def saved(model: nn.Module, path: Path) -> Path:
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return path


# Families whose file says less than the module: the names of the roles are not in it.
NAMELESS = {"einsum", "seed 000", "seed 002", "plain, uncalled", "torchao Float8Linear"}


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NAMELESS])
def test_every_family_reads_from_a_file_as_from_the_live_model(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name].build().bfloat16()
    live = audit(model)
    path = saved(model, tmp_path / "model.safetensors")
    if "gpt_oss" in name:
        (tmp_path / "config.json").write_text('{"model_type": "gpt_oss"}')
    read = audit(path)
    assert len(live.layers) == len(survey(model).gates) + len(survey(model).feed_forwards)
    assert sorted(map(str, numbers(read))) == sorted(map(str, numbers(live)))
    assert {one.site for one in read.layers} == {one.site for one in live.layers}


def test_roles_without_names_are_told_by_shapes() -> None:
    down_is_w3 = {"w1.weight": (40, 16), "w2.weight": (40, 16), "w3.weight": (16, 40)}
    (layout,) = find_layouts(down_is_w3)
    assert (layout.gate[0].tensor, layout.down[0].tensor) == ("w1.weight", "w3.weight")
    down_is_w2 = {"w1.weight": (40, 16), "w2.weight": (16, 40), "w3.weight": (40, 16)}
    (layout,) = find_layouts(down_is_w2)
    assert (layout.up[0].tensor, layout.down[0].tensor) == ("w3.weight", "w2.weight")
    (layout,) = find_layouts({f"w{i}.weight": (16, 16) for i in (1, 2, 3)})
    assert layout.note == "w2.weight is square: down taken by its name"
    assert find_layouts({"w1.weight": (40, 16), "w2.weight": (41, 16), "w3.weight": (9, 9)}) == []


def test_what_is_fused_says_what_it_leaves_open() -> None:
    fused = {"mlp.gate_up_proj.weight": (80, 16), "mlp.down_proj.weight": (16, 40)}
    (layout,) = find_layouts(fused)
    assert layout.note.startswith("gate taken for the first half of mlp.gate_up_proj.weight")
    stack = {"experts.gate_up_proj": (4, 16, 80), "experts.down_proj": (4, 40, 16)}
    (layout,) = find_layouts(stack)
    assert (layout.experts, layout.gate[3].expert, layout.up[0].rows.start) == (4, 3, 40)
    for alternate in (
        find_layouts(stack, {"model_type": "gpt_oss"}),
        find_layouts({**stack, "experts.gate_up_proj_bias": (4, 80)}),
    ):
        assert alternate[0].up[0].rows == slice(1, None, 2)
        assert alternate[0].note.startswith("gate and up taken to alternate")


def test_experts_of_a_file_of_their_own_are_one_layer(tmp_path: Path) -> None:
    """Mixtral's files have a tensor for each expert, the live model one for all."""
    model = FAMILIES["mixtral eager"].build().bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    read, live = audit(tmp_path), audit(model)
    assert numbers(read) == numbers(live)
    assert {one.experts for one in read.layers} == {4}
    assert read.layers[0].activation == "silu"


def test_files_shards_torch_and_the_live_model_are_equal(tmp_path: Path) -> None:
    model = hugging_face("llama", "Llama", tie_word_embeddings=False).bfloat16()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    torch.save({"step": 3, "model": model.state_dict()}, tmp_path / "nested.pt")
    torch.save({"state_dict": {"epoch": 1, **model.state_dict()}}, tmp_path / "lightning.ckpt")
    live = audit(model)
    assert len(live.layers) == 2 and len(live.weights) == 10 and len(live.norms) == 5
    for path in ("whole", "shards", "plain.pt", "nested.pt", "lightning.ckpt",
                 "whole/model.safetensors", "shards/model.safetensors.index.json"):  # fmt: skip
        found = audit(tmp_path / path)
        assert numbers(found) == numbers(live)
        by_name = {weight.name: weight for weight in found.weights}
        assert by_name == {weight.name: weight for weight in live.weights}
        assert {n.name: n for n in found.norms} == {n.name: n for n in live.norms}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_reads_as_the_live_model(dtype: torch.dtype, tmp_path: Path) -> None:
    model = foreign.Torchtitan().to(dtype)
    assert numbers(audit(saved(model, tmp_path / "a.safetensors"))) == numbers(audit(model))


@pytest.mark.parametrize("kind", ["block", "row", "tensor", "none"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_weights_are_read_with_their_scales(
    dtype: torch.dtype, kind: str, tmp_path: Path
) -> None:
    tensors, plain = {}, {}
    for name, shape in (("gate", (200, 160)), ("up", (200, 160)), ("down", (160, 200))):
        codes = torch.randn(shape).to(dtype)
        blocks = tuple(-(-n // 128) for n in shape)
        scales = {"block": blocks, "row": (shape[0], 1), "tensor": (1,), "none": (1,)}[kind]
        scale = torch.rand(scales) * 2.0 + 0.5
        tensors[f"mlp.{name}_proj.weight"] = codes
        if kind == "none":
            scale = torch.ones(1)
        else:
            suffix = "_scale_inv" if kind == "block" else "_scale"
            tensors[f"mlp.{name}_proj.weight{suffix}"] = scale
        spread = scale
        if kind == "block":
            spread = scale.repeat_interleave(128, 0)[: shape[0]]
            spread = spread.repeat_interleave(128, 1)[:, : shape[1]]
        plain[f"mlp.{name}_proj.weight"] = codes.float() * spread
    save_file(tensors, tmp_path / "fp8.safetensors")
    save_file({k: v.contiguous() for k, v in plain.items()}, tmp_path / "plain.safetensors")
    found, expected = audit(tmp_path / "fp8.safetensors"), audit(tmp_path / "plain.safetensors")
    assert numbers(found) == numbers(expected)
    assert found.weights == ()


@pytest.mark.parametrize("name", ["weight_scale_x", "scale_weight", "weight.scale", "weight_scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_fp8_weights_are_not_read_without_a_scale_of_another_name(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    weight = torch.randn(128, 128).to(torch.float8_e4m3fn)
    others = {
        "b.weight": weight.clone(),
        "b.input_scale": torch.ones(1),
        "b.c.scale": torch.ones(1),
    }
    path, scale = tmp_path / "a.safetensors", torch.ones(1).to(dtype)
    save_file({"a.weight": weight, f"a.{name}": scale, **others}, path)
    found = audit(path)
    known = name == "weight_scale" and dtype is torch.float32
    assert [one.name for one in found.weights] == (["a.weight"] if known else []) + ["b.weight"]
    assert set(found.not_audited) == (set() if known else {"a.weight", f"a.{name}"})
    if not known:
        expected = f"FP8 whose scale may be 'a.{name}', expected floats named as the weight with"
        assert found.not_audited["a.weight"].startswith(expected)


def test_what_is_packed_is_named_and_not_audited(tmp_path: Path) -> None:
    save_file(
        {
            "mlp.gate_up_proj_blocks": torch.zeros(4, 4, dtype=torch.uint8),
            "qweight": torch.zeros(4, 4, dtype=torch.int32),
            "lm_head.weight": torch.ones(4, 4),
        },
        tmp_path / "a.safetensors",
    )
    found = audit(tmp_path / "a.safetensors")
    assert set(found.not_audited) == {"mlp.gate_up_proj_blocks", "qweight"}
    assert found.not_audited["qweight"].startswith("I32: packed or no float")
    assert [weight.name for weight in found.weights] == ["lm_head.weight"]
    assert "not audited: I32" in str(found)


# --- files from strangers -----------------------------------------------------------------------


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


TWICE = b'{"a": %b, "a": %b}' % ((json.dumps(entry(0, 16)).encode(),) * 2)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "a header of 0 bytes in a file of 0: truncated"),
    "short": (b"\x01\x00", "truncated"),
    "length": (safetensors_bytes({}, length=1 << 63), "a header of 9223372036854775808 bytes"),
    "beyond": (safetensors_bytes({}, length=3), "a header of 3 bytes in a file of 10"),
    "cut": (safetensors_bytes({"a": entry(0, 16)}, bytes(15)), "15 bytes of tensors, expected 16"),
    "more": (safetensors_bytes({"a": entry(0, 16)}, bytes(17)), "17 bytes of tensors, expected 16"),
    "list": (safetensors_bytes([1]), "expected an object of tensors"),
    "no json": (safetensors_bytes(b"{{{{"), "header: no JSON"),
    "utf-8": (safetensors_bytes(b'{"\xff": 1}'), "header: no JSON"),
    "deep": (safetensors_bytes(b"[" * 200_000), "header: no JSON"),
    "twice": (safetensors_bytes(TWICE, bytes(16)), "'a' is there twice"),
    "overlap": (
        safetensors_bytes({"a": entry(0, 16), "b": entry(8, 24)}, bytes(24)),
        "'b': begins at 8, expected 16",
    ),
    "hole": (
        safetensors_bytes({"a": entry(0, 16), "b": entry(20, 36)}, bytes(36)),
        "'b': begins at 20, expected 16",
    ),
    "dtype": (safetensors_bytes({"a": entry(0, 16, dtype="F33")}, bytes(16)), "dtype 'F33'"),
    "dtypes": (safetensors_bytes({"a": entry(0, 16, dtype=[1])}, bytes(16)), "dtype [1]"),
    "size": (safetensors_bytes({"a": entry(0, 16, (5,))}, bytes(16)), "expected 20"),
    "huge": (safetensors_bytes({"a": entry(0, 16, (2**62, 2**62))}, bytes(16)), "16 bytes for F32"),
    "negative": (safetensors_bytes({"a": entry(0, 16, (-2, -2))}, bytes(16)), "shape [-2, -2]"),
    "bool": (safetensors_bytes({"a": entry(0, 4, (True,))}, bytes(4)), "shape [True]"),
    "float": (safetensors_bytes({"a": entry(0, 16, (4.0,))}, bytes(16)), "shape [4.0]"),
    "backwards": (safetensors_bytes({"a": entry(16, 0)}, bytes(16)), "expected two, ascending"),
    "no entry": (safetensors_bytes({"a": 3}), "expected dtype, shape and data_offsets"),
    "pickle": (pickle.dumps({"a": 1}), "pickles are not read"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_broken_file_ends_in_one_line(name: str, tmp_path: Path) -> None:
    data, expected = HOSTILE[name]
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(WeightsError) as error:
        audit(path)
    assert str(path) in str(error.value) and expected in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


class Bomb:
    """What a pickle runs when it is loaded as pickles are."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "run"))


@pytest.mark.parametrize("how", ["zip", "legacy", "bare", "inside"])
def test_no_code_of_a_pickle_runs(how: str, tmp_path: Path) -> None:
    path, trace = tmp_path / "a.pt", tmp_path / "trace"
    if how == "bare":
        path.write_bytes(pickle.dumps(Bomb(trace)))
    else:
        content = {"model": {"a": torch.ones(2, 2), "b": Bomb(trace)}}
        torch.save(
            content if how == "inside" else Bomb(trace),
            path,
            _use_new_zipfile_serialization=how != "legacy",
        )
    expected = "refused" if how in ("zip", "inside") else "pickles are not read"
    with pytest.raises(WeightsError, match=expected) as error:
        audit(path)
    assert not trace.exists() and "\n" not in str(error.value)


def test_a_pickled_model_is_told_from_its_state_dict(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    with pytest.raises(WeightsError) as error:
        audit(tmp_path / "whole.pt")
    assert str(error.value) == (
        f"{tmp_path / 'whole.pt'}: holds a pickled torch.nn.modules.linear.Linear, refused by "
        "torch.load(weights_only=True), expected tensors alone: torch.save(model.state_dict(), …)"
    )


def test_zips_that_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 24))
    with pytest.raises(WeightsError, match="a compressed zip"):
        audit(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello", b"there")
    with pytest.raises(WeightsError, match="refused"):
        audit(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(WeightsError, match="a broken zip"):
        audit(path)
    for nothing in ([1, 2], {"optimizer": {"a": torch.ones(2)}}, {"model": 3}):
        torch.save(nothing, path)
        with pytest.raises(WeightsError, match="no state dict in this checkpoint"):
            audit(path)


def test_a_tensor_larger_than_its_storage_is_not_audited(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(1, 1).expand(1 << 20, 1 << 20), "v": torch.ones(4, 4)}
    torch.save(tensors, tmp_path / "a.pt")
    found = audit(tmp_path / "a.pt")
    assert set(found.not_audited) == {"w"} and [w.name for w in found.weights] == ["v"]


def test_folders_and_what_is_no_file(tmp_path: Path) -> None:
    def refused(path: Path, expected: str) -> None:
        with pytest.raises(WeightsError) as error:
            audit(path)
        assert expected in str(error.value) and "\n" not in str(error.value)

    refused(tmp_path, "no weights in this folder")
    script = tmp_path / "model.py"
    script.write_text("import torch\n")
    refused(script, f"{script}: no weights, expected a .safetensors file or torch.save's")
    RunWriter.create(tmp_path / "runs" / "fp8", {}).close()
    for folder in (tmp_path / "runs", tmp_path / "runs" / "fp8"):
        refused(folder, f"{folder}: what a run recorded, expected weights; fp8lab diagnose and rep")
    safe = tmp_path / "safe"
    safe.mkdir()
    for name in ("kept-step-300", "step-500"):
        torch.save({"w": torch.ones(4, 4)}, safe / name)
    refused(safe, f"{safe}: checkpoints of a training, kept-step-300, step-500: expected one of")
    assert [one.name for one in audit(safe / "step-500").weights] == ["w"]
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(tmp_path / "pipe.safetensors", "not a regular file")
    refused(tmp_path, "not a regular file")
    (tmp_path / "pipe.safetensors").unlink()
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    with pytest.raises(OSError, match="symbolic links"):
        audit(tmp_path / "loop.safetensors")
    with pytest.raises(FileNotFoundError):
        audit(tmp_path / "missing.safetensors")
    (tmp_path / "loop.safetensors").unlink()
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"w": torch.ones(4, 4)}, tmp_path / name)
    refused(tmp_path, "'w' is in another file too")
    two = tmp_path / "two"
    two.mkdir()
    for name in ("a.pt", "b.pt"):
        torch.save({"w": torch.ones(4, 4)}, two / name)
    refused(two, "a.pt, b.pt: expected one of them")


def test_an_index_leads_nowhere_else(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"w": torch.ones(4, 4)}, tmp_path / "outside.safetensors")
    save_file({"w": torch.ones(4, 4)}, folder / "inside.safetensors")
    index = folder / "model.safetensors.index.json"
    for shard, expected in (
        ("../outside.safetensors", "the name of a file beside it"),
        (str(tmp_path / "outside.safetensors"), "the name of a file beside it"),
        ("..", "the name of a file beside it"),
        ("", "the name of a file beside it"),
        (7, "the name of a file beside it"),
        ("missing.safetensors", "no such file"),
        (".", "the name of a file beside it"),
    ):
        index.write_text(json.dumps({"weight_map": {"w": shard}}))
        with pytest.raises(WeightsError) as error:
            audit(folder)
        assert expected in str(error.value) and "\n" not in str(error.value)
    index.write_text(json.dumps({"weight_map": {"v": "inside.safetensors"}}))
    with pytest.raises(WeightsError, match=r"'v' is not in inside\.safetensors"):
        audit(folder)
    for nothing in ("[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'):
        index.write_text(nothing)
        with pytest.raises(WeightsError, match="no weight_map"):
            audit(folder)
    index.write_text('{"weight_map": {"w": "inside.safetensors"}}')
    assert [weight.name for weight in audit(folder).weights] == ["w"]


def test_mutated_files_end_in_a_line_or_in_numbers(tmp_path: Path) -> None:
    """A few hundred files with bytes changed, cut out or put in: nothing else ever comes."""
    torch.manual_seed(0)
    save_file(foreign.Torchtitan().bfloat16().state_dict(), tmp_path / "a.safetensors")
    torch.save(foreign.Torchtitan().bfloat16().state_dict(), tmp_path / "a.pt")
    drawn = random.Random(0)
    outcomes = {"numbers": 0, "line": 0}
    for turn in range(300):
        source = tmp_path / ("a.pt" if turn % 3 == 0 else "a.safetensors")
        data = bytearray(source.read_bytes())
        for _ in range(drawn.randint(1, 4)):
            place = drawn.randrange(min(len(data), 600) if drawn.random() < 0.7 else len(data))
            how = drawn.randrange(4)
            if how == 0:
                data[place] = drawn.randrange(256)
            elif how == 1:
                del data[place : place + drawn.randint(1, 40)]
            elif how == 2:
                data[place:place] = drawn.randbytes(drawn.randint(1, 20))
            else:
                data = data[: place + 1]
        broken = tmp_path / f"broken{source.suffix}"
        broken.write_bytes(data)
        try:
            audit(broken)
            outcomes["numbers"] += 1
        except WeightsError as error:
            assert "\n" not in str(error)
            outcomes["line"] += 1
    assert min(outcomes.values()) > 10, outcomes


def test_headers_are_those_that_safetensors_writes(tmp_path: Path) -> None:
    dtypes = [*DTYPES, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64]
    tensors = {str(dtype): torch.randn(3, 5).to(dtype) for dtype in dtypes}
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(1.5)}
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    read = open_weights(tmp_path / "a.safetensors").tensors
    assert set(read) == set(tensors)
    for name, stored in read.items():
        assert stored.get is not None
        assert stored.get().dtype == tensors[name].dtype
        assert torch.equal(stored.get().float(), tensors[name].float())


def test_a_tensor_that_is_not_aligned_is_read(tmp_path: Path) -> None:
    values = torch.randn(4, 4)
    header = {"a": entry(0, 1, (1,), "U8"), "b": entry(1, 65, (4, 4))}
    data = b"\0" + values.numpy().tobytes()
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header, data))
    (found,) = audit(tmp_path / "a.safetensors").weights
    assert found.amax == values.abs().max()


def test_pages_are_given_back_and_come_again(tmp_path: Path) -> None:
    values = torch.randn(512, 512)
    save_file({"w": values}, tmp_path / "a.safetensors")
    weights = open_weights(tmp_path / "a.safetensors")
    get = weights.tensors["w"].get
    assert get is not None
    tensor = get()
    weights.release(tensor)
    assert torch.equal(tensor, values)
    live = audited_model(values)
    assert torch.equal(live, values)  # nobody gives back the memory of a live model


def audited_model(values: Tensor) -> Tensor:
    model = nn.Sequential(nn.Linear(512, 512, bias=False))
    model[0].weight = nn.Parameter(values.clone())
    audit(model)
    return model[0].weight.detach()


# --- what follows -------------------------------------------------------------------------------


def planted(seed: int = 0, dim: int = 256, width: int = 512) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (("gate", (width, dim)), ("up", (width, dim)), ("down", (dim, width)))
    return {
        f"layers.0.mlp.{name}_proj.weight": torch.randn(shape, generator=generator) * 0.02
        for name, shape in shapes
    }


def test_an_aligned_channel_with_gain_is_found(tmp_path: Path) -> None:
    tensors = planted()
    gate, up = (tensors[f"layers.0.mlp.{role}_proj.weight"] for role in ("gate", "up"))
    up[77] = -5 * gate[77]
    gate[77] *= 5
    save_file(tensors, tmp_path / "a.safetensors")
    found = audit(tmp_path / "a.safetensors")
    assert found.severe
    (finding,) = found.findings
    assert (finding.cause, finding.site, finding.channel) == (
        "gate_up_alignment", "layers.0.mlp", 77
    )  # fmt: skip
    (layer,) = found.layers
    assert (layer.channel, layer.alignment) == (77, pytest.approx(-1.0, abs=2**-16))
    channel = found.channels[0]
    expected = (
        gate[77].norm() * up[77].norm() * tensors["layers.0.mlp.down_proj.weight"].norm(dim=0)
    )
    gains = tensors_gain(tensors)
    assert channel.gain_ratio == pytest.approx(float(gains[77] / gains.median()), rel=2e-2)
    assert channel.gate_norm == pytest.approx(float(gate[77].norm()), rel=1e-5)
    assert channel.down_norm * channel.gate_norm * channel.up_norm == pytest.approx(
        float(expected[77]), rel=1e-4
    )
    assert channel.p_value < 1e-100 and channel.expert is None


def tensors_gain(tensors: dict[str, Tensor]) -> Tensor:
    """Each channel's gain as the largest eigenvalue of the symmetric part of g uᵀ, by torch."""
    gate, up, down = (tensors[f"layers.0.mlp.{r}_proj.weight"] for r in ("gate", "up", "down"))
    outer = gate[:, :, None].double() * up[:, None, :].double()
    eigenvalues = torch.linalg.eigvalsh((outer[70:90] + outer[70:90].transpose(1, 2)) / 2)
    gains = torch.full((len(gate),), math.nan, dtype=torch.float64)
    gains[70:90] = eigenvalues.abs().amax(1)
    gains *= down.double().norm(dim=0)
    return torch.where(gains.isnan(), gains.nanmedian(), gains)


def test_random_weights_have_nothing_to_watch(tmp_path: Path) -> None:
    watched = 0
    for seed in range(10):
        save_file(planted(seed), tmp_path / "a.safetensors")
        found = audit(tmp_path / "a.safetensors")
        assert (found.findings, found.severe) == ((), False)
        assert str(found).endswith("nothing found")
        watched += len(found.channels)
    assert watched <= 2  # one seed in a hundred has a largest cosine that far beyond chance


def channel(**of: Any) -> Channel:
    given = {"site": "a", "expert": None, "channel": 1, "alignment": 0.0, "p_value": 1.0,
             "gate_norm": 1.0, "up_norm": 1.0, "down_norm": 1.0, "gain_ratio": 1.0}  # fmt: skip
    return Channel(**given | of)


@pytest.mark.parametrize(
    ("given", "severity"),
    [
        ({"alignment": 0.51, "p_value": 1e-9, "gain_ratio": 16.0}, "high"),
        ({"alignment": 0.49, "p_value": 1e-9, "gain_ratio": 16.0}, "medium"),
        ({"alignment": 0.51, "p_value": 1e-9, "gain_ratio": 15.9}, "medium"),
        ({"alignment": 0.51, "p_value": 1e-9, "gain_ratio": 8.0}, "medium"),
        ({"alignment": 0.51, "p_value": 1e-9, "gain_ratio": 7.9}, "low"),
        ({"alignment": 0.51, "p_value": 1e-9, "product_ratio": 16.0}, "high"),
        ({"alignment": 0.51, "p_value": 1e-9, "product_ratio": 15.9}, "low"),
        ({"alignment": 0.49, "p_value": 1e-9, "gain_ratio": 15.9}, None),
        ({"alignment": 0.9, "p_value": 2e-3, "gain_ratio": 1.0}, None),
        ({"alignment": math.nan, "p_value": math.nan, "gain_ratio": 16.0}, "medium"),
    ],
)
def test_each_threshold_of_a_channel_has_two_sides(given: Any, severity: str | None) -> None:
    found = findings_of(judged([channel(**given)], pairs=10), [], [])
    assert [finding.severity for finding in found] == ([severity] if severity else [])


def test_p_values_are_corrected_for_all_pairs() -> None:
    (kept,) = judged([channel(alignment=0.3, p_value=1e-6)], pairs=9_000)
    assert kept.p_value == pytest.approx(9e-3, rel=1e-2)
    assert judged([channel(alignment=0.3, p_value=1e-6)], pairs=11_000) == []


@pytest.mark.parametrize("recipe", weighing.RECIPES)
def test_each_limit_of_a_recipe_has_two_sides(recipe: str) -> None:
    limits = (audited.LARGEST_ERROR, audited.LARGEST_FLUSHED, audited.LARGEST_SATURATED)
    for place, limit in enumerate(limits):
        numbers_of = [0.0, 0.0, 0.0]
        numbers_of[place] = limit[recipe]
        assert survival_of(recipe, *numbers_of).survives
        numbers_of[place] = limit[recipe] * 1.01
        assert not survival_of(recipe, *numbers_of).survives


def test_weights_that_a_recipe_loses(tmp_path: Path) -> None:
    lost = torch.randn(256, 256) * 1e-4
    lost[3, 3] = 3e4
    save_file({"q_proj.weight": lost}, tmp_path / "a.safetensors")
    found = audit(tmp_path / "a.safetensors")
    (finding,) = found.findings
    assert (finding.cause, finding.severity) == ("weights_lost", "high")
    survived = {one.recipe: one.survives for one in found.weights[0].survival}
    assert not survived["current"] and survived["rowwise"] is True
    bad = torch.ones(8, 8)
    bad[1, 1] = math.nan
    save_file({"q_proj.weight": bad}, tmp_path / "a.safetensors")
    assert [f.cause for f in audit(tmp_path / "a.safetensors").findings] == ["nonfinite_weights"]


def test_norms_under_a_shared_exponent(tmp_path: Path) -> None:
    save_file(
        {
            "input_layernorm.weight": torch.full((64,), 0.95),  # mantissa 1.9
            "final_norm.weight": torch.full((64,), 0.85),  # mantissa 1.7
            "norm.bias": torch.full((64,), 0.95),
        },
        tmp_path / "a.safetensors",
    )
    found = audit(tmp_path / "a.safetensors")
    norms = {norm.name: norm for norm in found.norms}
    assert len(norms) == 2
    risky, safe = norms["input_layernorm.weight"], norms["final_norm.weight"]
    assert (risky.blocks, risky.clipped) == (1.0, 1.0)
    assert risky.relative_error == pytest.approx(1 - 0.875 / 0.95)
    assert (safe.blocks, safe.clipped) == (0.0, 0.0)
    (finding,) = found.findings
    assert (finding.cause, finding.severity) == ("mx_shared_exponent_clipping", "low")


def test_activations_join_what_the_weights_say(tmp_path: Path) -> None:
    model = hugging_face("llama", "Llama").eval()
    gate = find_gates(model)[1]
    with torch.no_grad():
        gate.up.parameter[5] = 40 * gate.gate.parameter[5]
        gate.gate.parameter[5] *= 40
    model.train()
    tokens = torch.randint(1, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = audit(model, tokens=[tokens, tokens], run=tmp_path / "run")
    assert model.training and all(torch.equal(model.state_dict()[n], v) for n, v in before.items())
    (finding,) = [f for f in found.findings if f.severity == "high"]
    assert (finding.site, finding.channel, finding.confidence) == ("model.layers.1.mlp", 5, "high")
    assert found.channels[0].product_ratio is not None and found.channels[0].product_ratio > 16
    assert len(fp8lab.open_run(tmp_path / "run").steps()) == 2
    assert audit(model, tokens=tokens).channels[0].product_ratio is not None
    with pytest.raises(ValueError, match="tokens without a model"):
        audit(tmp_path, tokens=tokens)
    of_model = r"batch 1: LlamaForCausalLM does not take {}, expected an int64 tensor \[batch, len"
    for wrong, told in (
        (tokens.float(), of_model.format(r"float32 \[2, 16\]")),
        (
            tokens + 99_999,
            of_model.format(r"int64 \[2, 16\]") + ".* below its vocabulary: index out",
        ),
        (tokens[0], of_model.format(r"int64 \[16\]")),
        ([1, 2], "tokens: Tensor, list, expected an int64 tensor"),
    ):
        with pytest.raises(ValueError, match=told):
            audit(model, tokens=[tokens, wrong])  # type: ignore[list-item]
    for nothing, kind in (([], "nothing"), (3, "int"), ("some text", "str")):
        with pytest.raises(ValueError, match=f"tokens: {kind}, expected an int64"):
            audit(model, tokens=nothing)  # type: ignore[arg-type]

    def too_large(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")  # which says nothing of what a model takes

    with model.register_forward_pre_hook(too_large), pytest.raises(torch.OutOfMemoryError):
        audit(model, tokens=tokens)
    with pytest.raises(TypeError, match="audit: OrderedDict, expected a file, a folder or a model"):
        audit(model.state_dict())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="audit: top=0, expected at least 1"):
        audit(model, top=0)


def test_the_clamp_of_a_configuration(tmp_path: Path) -> None:
    save_file(planted(), tmp_path / "a.safetensors")
    config = {"hidden_act": "silu", "swiglu_limit": 10.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert audit(tmp_path).layers[0].activation == "silu, clamped at 10.0"
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"hidden_act": "gelu"}}))
    assert audit(tmp_path).layers[0].activation == "gelu"
    (tmp_path / "config.json").unlink()
    assert audit(tmp_path).layers[0].activation == "unknown"
    assert isinstance(find_gates(foreign.Clamped())[0], GateSite)
    assert audit(foreign.Clamped()).layers[0].activation == "silu, clamped at 7"


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fp8lab.cli import app

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            app(words)
        return (int(stopped.value.code or 0), *capsys.readouterr())

    path = tmp_path / "a.safetensors"
    save_file(planted(), path)
    code, out, _ = run("audit", str(path))
    assert code == 0 and "layers.0.mlp" in out and "nothing found" in out
    code, out, _ = run("audit", str(path), "--json")
    assert code == 0 and json.loads(out)["layers"][0]["channels"] == 512
    tensors = planted()
    tensors["layers.0.mlp.up_proj.weight"][3] = 9 * tensors["layers.0.mlp.gate_proj.weight"][3]
    tensors["layers.0.mlp.gate_proj.weight"][3] *= 9
    save_file(tensors, path)
    code, out, _ = run("audit", str(path), "--top", "1")
    assert code == 1 and "[high] gate_up_alignment at layers.0.mlp" in out
    path.write_bytes(b"\xff" * 100)
    code, out, error = run("audit", str(path))
    assert (code, out) == (2, "")
    assert error.startswith(f"error: {path}: a header of") and error.count("\n") == 1


@pytest.mark.parametrize("shape", [(1, 1, 128), (128,), (0,), (3, 2), (2, 2), (0, 4, 4)])
def test_scales_of_another_shape_are_not_used(shape: tuple[int, ...], tmp_path: Path) -> None:
    """A kernel that took the third number of such a shape for a pointer wrote there."""
    roles = ("gate", "up", "down")
    tensors = {f"m.{r}_proj.weight": torch.randn(128, 128).to(torch.float8_e4m3fn) for r in roles}
    tensors["m.gate_proj.weight_scale_inv"] = torch.ones(shape)
    tensors["m.other.weight"] = torch.randn(8, 8)
    save_file(tensors, tmp_path / "model.safetensors")
    found = audit(tmp_path / "model.safetensors")
    assert "m.gate_proj.weight" in found.not_audited
    assert "expected one, one for each row" in found.not_audited["m.gate_proj.weight"]


def test_a_configuration_may_say_anything(tmp_path: Path) -> None:
    save_file({"m.weight": torch.randn(8, 8)}, tmp_path / "model.safetensors")
    for config in ({"text_config": "x"}, {"text_config": [1]}, []):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert audit(tmp_path).not_audited == {}
