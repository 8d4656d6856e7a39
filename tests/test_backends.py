"""`convert(backend=…)`: a model in another engine's FP8 is that engine's model, or it stops.

torchao's real classes train on a CPU; the oracle is the emulation, which has no part in them.
Transformer Engine has a file of its own, `test_backends_te`; what needs a GPU of both is here.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import converted_transformer_engine as worker
import pytest
import torch
from converted_transformer_engine import plain
from torch import Tensor, nn
from transformer_engine_on_cpu import assert_same_bits

import fp8lab
from fp8lab import formats
from fp8lab.diagnosis.not_fp8 import uses_fp8
from fp8lab.engines import torchao
from fp8lab.recipe import OPERANDS, Format, Operand
from fp8lab.sites import cast_in_force

logging.getLogger("torchao").setLevel(logging.ERROR)
BF16, FP32 = torch.bfloat16, torch.float32
OPERANDS_OF_GEMMS = (
    *("input@output", "weight@output", "grad_output@grad_input"),
    *("weight@grad_input", "grad_output@grad_weight", "input@grad_weight"),
)
DELAYED = fp8lab.DelayedScaling(amax_history_len=3)
CURRENT = fp8lab.Float8CurrentScaling()
POWERS = fp8lab.Float8CurrentScaling(use_power_2_scales=True)
ROWS = fp8lab.RowwiseScaling()
of_this_torch = pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13),
    reason="on a CPU torch's FP8 GEMM takes no scales per row, and its others sum in another order",
)
WIDE = {"FP32": fp8lab.HighPrecision(format=formats.FP32), "BF16": fp8lab.HighPrecision()}


def test_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend='xe', expected one of 'emulated', 'te', 'torcha"):
        fp8lab.convert(plain(FP32), CURRENT, backend="xe")  # type: ignore[arg-type]


def test_a_layer_replaced_after_the_conversion_stops_the_first_forward() -> None:
    for backend in ("emulated", "torchao"):
        model = fp8lab.convert(plain(FP32), CURRENT, backend=backend)
        model.layers[1].up = nn.Linear(worker.DIM, worker.HIDDEN)
        with pytest.raises(RuntimeError, match=r"layers\.1\.up was converted to FP8 .* replaced"):
            model(torch.ones(16, worker.DIM))
        del model.layers[1]
        with pytest.raises(RuntimeError, match=r"layers\.1\.gate was .* is no longer in the model"):
            model(torch.ones(16, worker.DIM))


def test_a_probe_is_no_first_forward(tmp_path: Path) -> None:
    """Of a model that is a feed-forward itself, the search for gates runs the whole."""
    model = fp8lab.convert(plain(FP32).layers[0], CURRENT)
    with fp8lab.watch(model, tmp_path / "run"):
        model.up = nn.Linear(worker.DIM, worker.HIDDEN)
        with pytest.raises(RuntimeError, match=r"up was converted to FP8 .* replaced since"):
            model(torch.ones(16, worker.DIM))


# --- torchao -----------------------------------------------------------------------------------


def ran(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and all gradients of a step."""
    generator = torch.Generator().manual_seed(1)
    given = torch.randn(24, worker.DIM, generator=generator).to(dtype).requires_grad_()
    output = model(given)
    output.backward(torch.randn(output.shape, generator=generator).to(dtype))
    assert given.grad is not None
    seen = {"output": output.detach(), "input.grad": given.grad}
    return seen | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@of_this_torch
@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [
        (CURRENT, BF16),
        (POWERS, FP32),
        (fp8lab.Float8CurrentScaling(fp8_format=Format.E4M3, use_power_2_scales=True), FP32),
        (ROWS, BF16),
        (fp8lab.RowwiseScaling(fp8_format=Format.HYBRID), BF16),
        (fp8lab.RowwiseScaling(high_precision_grad_weight=True), BF16),
    ],
    ids=str,
)
def test_a_layer_of_torchao_is_the_emulation(recipe: fp8lab.Recipe, dtype: torch.dtype) -> None:
    """Output and gradients equal to the bit; torchao multiplies the codes on a CPU too."""
    ours, theirs = layers_of_both(recipe, dtype)
    for mine, other in zip(ran_one(ours), ran_one(theirs), strict=True):
        assert_same_bits(mine, other)
    assert type(theirs[0]).__module__ == "torchao.float8.float8_linear"
    assert not theirs[0].config.emulate


@of_this_torch
@pytest.mark.parametrize("fmt", [Format.E4M3, Format.HYBRID])
def test_a_scale_that_is_no_power_of_two(fmt: Format) -> None:
    """Some processors' GEMMs round otherwise then: FP32's last bits of the largest sums."""
    recipe = fp8lab.Float8CurrentScaling(fp8_format=fmt)
    for mine, other in zip(*map(ran_one, layers_of_both(recipe, FP32)), strict=True):
        assert (mine - other).abs().max() <= 2**-21 * other.abs().max()


def layers_of_both(recipe: fp8lab.Recipe, dtype: torch.dtype) -> list[nn.Module]:
    layer = nn.Sequential(nn.Linear(64, 48, bias=False, dtype=dtype))
    backends: tuple[Any, ...] = ("emulated", "torchao")
    return [fp8lab.convert(deepcopy(layer), recipe, backend=backend) for backend in backends]


def ran_one(model: nn.Module) -> list[Tensor]:
    """Output and gradients of one layer."""
    (weight,) = model.parameters()
    generator = torch.Generator().manual_seed(3)
    given = torch.randn(24, 64, generator=generator).to(weight.dtype)
    given[3] *= 100
    output = model(given.requires_grad_())
    output.backward(torch.randn(24, 48, generator=generator).to(weight.dtype))
    assert given.grad is not None and weight.grad is not None
    return [output.detach(), given.grad, weight.grad]


@of_this_torch
def test_rows_in_fp32_are_rounded_to_bf16_by_torchao() -> None:
    """Of an FP32 model too its GEMMs of rows give BF16."""
    ours, theirs = layers_of_both(ROWS, FP32)
    for mine, other in zip(ran_one(ours), ran_one(theirs), strict=True):
        assert_same_bits(mine.bfloat16().float(), other)


@of_this_torch
def test_rows_with_other_scales_than_powers_of_two() -> None:
    """torchao rounds a gradient to BF16 before its scales are put on, and after: a second half of
    a unit in the last place. The output is the emulation's, bit for bit."""
    recipe = fp8lab.RowwiseScaling(round_scales_to_power_of_2=False)
    (output, *ours), (same, *theirs) = map(ran_one, layers_of_both(recipe, BF16))
    assert_same_bits(output, same)
    for mine, other in zip(ours, theirs, strict=True):
        assert not torch.equal(mine, other)
        torch.testing.assert_close(mine.float(), other.float(), rtol=2**-7, atol=0)


@of_this_torch
def test_a_model_of_torchao_is_the_emulation() -> None:
    """In FP32, where a fused product is not rounded: losses and parameters of ten steps of AdamW,
    made before the conversion, equal to the bit, with a bias."""
    results = []
    for backend in ("emulated", "torchao"):
        model = plain(FP32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        fp8lab.convert(model, POWERS, exclude=["head"], backend=backend)
        generator, losses = torch.Generator().manual_seed(1), []
        for _ in range(10):
            loss = model(torch.randn(24, worker.DIM, generator=generator)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        results.append([*losses, *(parameter.detach() for parameter in model.parameters())])
    for mine, theirs in zip(*results, strict=True):
        assert_same_bits(mine, theirs)


@of_this_torch
def test_a_gemm_of_torchao_in_high_precision() -> None:
    """Both operands of one GEMM as they are: equal to the emulation of that plan."""
    overrides = {"*.down@grad_weight": WIDE["FP32"], "head": WIDE["FP32"]}
    ours, theirs = (
        fp8lab.convert(plain(FP32), POWERS, overrides=overrides, backend=backend)
        for backend in ("emulated", "torchao")
    )
    mine, other = ran(ours, FP32), ran(theirs, FP32)
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert_same_bits(tensor, other[name])
    assert type(theirs.head) is nn.Linear


def test_what_torchao_keeps() -> None:
    """Parameters, hooks and references; a checkpoint from before loads."""
    model, calls = plain(FP32), []
    before = deepcopy(model.state_dict())
    down, parameters = model.layers[0].down, list(model.parameters())
    down.register_forward_hook(lambda *_: calls.append("forward"))
    assert fp8lab.convert(model, CURRENT, backend="torchao") is model
    calls.clear()
    ran(model, FP32)
    assert calls == ["forward"]
    assert model.layers[0].down is down
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    model.load_state_dict(before)
    ran(deepcopy(model), FP32)


TORCHAO_REFUSES: dict[str, tuple[dict[str, Any], str]] = {
    "delayed": (
        {"recipe": DELAYED},
        "layers.0.gate:input@output: torchao has no DelayedScaling, expected Float8CurrentScaling, "
        "RowwiseScaling or HighPrecision",
    ),
    "blocks": (
        {"recipe": fp8lab.MXFP8BlockScaling(scale_rounding="ceil")},
        "layers.0.gate:input@output: torchao has no MXFP8BlockScaling, scales rounded ceil, "
        "expected Float8CurrentScaling, RowwiseScaling or HighPrecision",
    ),
    "nothing": (
        {"recipe": WIDE["FP32"]},
        "every layer is HighPrecision, expected a recipe in FP8",
    ),
    "one operand": (
        {"recipe": CURRENT, "overrides": {"*.down:input@output": WIDE["FP32"]}},
        "layers.0.down@output: one operand in high precision, expected both or none: torchao's "
        "GEMMs take no other",
    ),
    "another format": (
        {"recipe": CURRENT, "overrides": {"head": WIDE["BF16"]}},
        "head: BF16, expected FP32, the layer's own: the engine leaves such operands as they are",
    ),
    "two recipes": (
        {"recipe": CURRENT, "overrides": {"*.up:weight": ROWS}},
        "layers.0.up:weight@output: ",
    ),
    "formats": (
        {"recipe": fp8lab.Float8CurrentScaling(fp8_format=Format.GAUDI2)},
        "layers.0.gate: Format.GAUDI2, expected Format.E4M3 or Format.HYBRID",
    ),
    "stochastic": (
        {"recipe": fp8lab.Float8CurrentScaling(stochastic_rounding=True)},
        "layers.0.gate: torchao rounds no gradient stochastically",
    ),
    "accumulation": (
        {"recipe": CURRENT, "accumulation": fp8lab.Accumulation()},
        "accumulation: Accumulation(bits=14",
    ),
}


@pytest.mark.parametrize("what", TORCHAO_REFUSES)
def test_what_torchao_refuses(what: str) -> None:
    """By name, in one line, and nothing is converted."""
    convert, message = TORCHAO_REFUSES[what]
    model = plain(FP32)
    with pytest.raises(ValueError) as refused:
        fp8lab.convert(model, backend="torchao", **convert)
    said = str(refused.value)
    assert said.startswith(f"convert: backend='torchao': {message}")
    assert "\n" not in said
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert not model._forward_pre_hooks


@of_this_torch
def test_what_torchao_refuses_of_a_layer_and_of_an_input() -> None:
    """In one line that names the layer: a dtype, a weight that is made, no tokens, a mode."""
    model = plain(FP32).double()
    with pytest.raises(
        ValueError, match=r"torchao': layers\.0\.gate: torch\.float64, expected one"
    ):
        fp8lab.convert(model, CURRENT, backend="torchao")
    model = plain(FP32)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.head)
    with pytest.raises(
        ValueError, match=r"head: its weight is made of .*weight_g, weight_v: exclu"
    ):
        fp8lab.convert(model, CURRENT, backend="torchao")
    assert type(model.layers[0].gate) is nn.Linear
    x = torch.ones(16, worker.DIM)
    for recipe in (CURRENT, ROWS):
        model = deepcopy(fp8lab.convert(plain(BF16), recipe, backend="torchao"))
        with pytest.raises(ValueError, match=r"layers\.0\.gate: input \[0, 32\]: torchao casts no"):
            model(x[:0].bfloat16())
        torch.compile(model, backend="eager", fullgraph=True)(x.bfloat16()).sum().backward()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="gate: torchao has no Rowwise"):
        model(x.bfloat16())


def test_where_torchao_cannot_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another device, an old GPU, and on a new one sizes that it does not take."""
    model = nn.Sequential(nn.Linear(32, 40, device="meta"))
    with pytest.raises(RuntimeError, match="0 is on meta, expected a CPU or a GPU with FP8"):
        fp8lab.convert(model, CURRENT, backend="torchao")
    assert type(model[0]) is nn.Linear
    on_gpu: Any = SimpleNamespace(
        weight=SimpleNamespace(device=torch.device("cuda")), in_features=32, out_features=40
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    with pytest.raises(
        RuntimeError, match=r"head: a GPU of compute capability 8\.6, expected 8\.9"
    ):
        torchao._require_device("head", on_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.raises(ValueError, match="head: 32 → 40 features, expected multiples of 16: excl"):
        torchao._require_device("head", on_gpu)


@pytest.mark.parametrize(
    ("backend", "library", "message"),
    [
        ("torchao", "torchao.float8", "torchao cannot be imported: .*; pip install torchao$"),
        ("te", "transformer_engine.pytorch", "Transformer Engine cannot be imported: .*; pip inst"),
    ],
)
def test_without_the_library(
    backend: Any, library: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=f"^convert: backend='{backend}': {message}"):
        fp8lab.convert(plain(FP32), CURRENT, backend=backend)


@pytest.mark.parametrize("powers", [True, False])
@pytest.mark.parametrize("fmt", [Format.E4M3, Format.HYBRID])
@pytest.mark.parametrize("operand", OPERANDS)
def test_torchao_says_how_it_casts(operand: Operand, fmt: Format, powers: bool) -> None:
    """The same values as the emulation, whose own test of them is against torchao's quantiser."""
    tensor = torch.randn(48, 64) * torch.logspace(-3, 3, 48)[:, None]
    for recipe in (
        fp8lab.RowwiseScaling(fp8_format=fmt, round_scales_to_power_of_2=powers),
        fp8lab.Float8CurrentScaling(fp8_format=fmt, use_power_2_scales=powers),
    ):
        ours, theirs = (cast_in_force(m[0], operand, tensor) for m in layers_of_both(recipe, FP32))
        assert (type(theirs.recipe), theirs.format) == (type(recipe), ours.format)
        assert_same_bits(theirs.fake_quantized(), ours.fake_quantized())
    wide = {"*@output": WIDE["FP32"], "*@grad_input": WIDE["FP32"]}
    model = fp8lab.convert(plain(FP32), CURRENT, overrides=wide, backend="torchao")
    assert cast_in_force(model.head, operand, tensor) is None


@pytest.mark.parametrize("powers", [True, False])
@pytest.mark.parametrize("amax", [torch.inf, -torch.inf, torch.nan, 1e-20, 0.0, 3.0])
def test_torchao_casts_what_is_not_finite(amax: float, powers: bool) -> None:
    """Equal to the bit to torchao's own cast: one such element, and under one scale all are NaN."""
    from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
    from torchao.float8.float8_training_tensor import LinearMMConfig

    tensor = torch.linspace(-1, 1, 32 * 64).view(32, 64) * (amax if abs(amax) < torch.inf else 1)
    tensor[3, 5] = amax
    for dtype in (FP32, BF16):
        recipe = fp8lab.Float8CurrentScaling(use_power_2_scales=powers)
        _, theirs = layers_of_both(recipe, dtype)
        cast = cast_in_force(theirs[0], "input", tensor.to(dtype))
        by_torchao = hp_tensor_to_float8_dynamic(
            *(tensor.to(dtype), torch.float8_e4m3fn, LinearMMConfig()),
            round_scales_to_power_of_2=powers,
        )
        expected = by_torchao._data.float() * by_torchao._scale.reciprocal()
        assert_same_bits(cast.fake_quantized().nan_to_num(7.7), expected.nan_to_num(7.7))
        assert expected.isnan().all() == (not abs(amax) < torch.inf)
        assert expected.isnan().all() == theirs(tensor.to(dtype)).isnan().all()


def test_a_watch_of_torchao_that_meets_infinity(tmp_path: Path) -> None:
    """The rows say that the cast kept nothing, which the layer's output is."""
    model = fp8lab.convert(plain(FP32), CURRENT, backend="torchao")
    select = fp8lab.Selection(layers=("layers.0.gate",), tensors=("input",))
    with fp8lab.watch(model, tmp_path / "run", every=1, select=select) as watch:
        given = torch.randn(24, worker.DIM)
        given[0, 0] = torch.inf
        assert model.layers[0].gate(given).isnan().all()
        watch.step(0)
    (row,) = (
        fp8lab.open_run(tmp_path / "run").tensors(sites="layers.0.gate:input").to_dict("records")
    )
    assert row["infs"] == 1 and row["scale"] == 0


@of_this_torch
def test_a_watch_of_torchao(tmp_path: Path) -> None:
    """The precision of each operand in the words of the emulation, and the same rows."""
    for backend in ("emulated", "torchao"):
        overrides = {"*.down@grad_weight": WIDE["FP32"]}
        model = fp8lab.convert(plain(FP32), POWERS, overrides=overrides, backend=backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        select = fp8lab.Selection(layers=("layers.*.down",), tensors=("input", "weight"))
        path = tmp_path / backend
        with fp8lab.watch(model, path, optimizer=optimizer, every=1, select=select) as watch:
            for step in range(2):
                ran(model, FP32)
                optimizer.step()
                watch.step(step)
    ours, theirs = (fp8lab.open_run(tmp_path / name) for name in ("emulated", "torchao"))
    assert ours.info["precision"] == theirs.info["precision"]
    assert theirs.info["precision"]["layers.0.down"] == dict(
        zip(
            OPERANDS_OF_GEMMS,
            ["E4M3 Float8CurrentScaling"] * 2
            + ["E5M2 Float8CurrentScaling", "E4M3 Float8CurrentScaling"]
            + ["FP32 HighPrecision"] * 2,
            strict=True,
        )
    )
    assert uses_fp8(theirs)
    assert list(theirs.events()["kind"]) == []
    mine, other = ours.tensors(), theirs.tensors()
    assert {"layers.0:gate", "layers.0:up", "layers.0:product"} <= set(other["site"])
    product = other["site"] == "layers.1:product"
    assert (other.loc[product, "scale"] > 0).all()
    assert mine.equals(other)


# --- layers that carry a label and do not run ---------------------------------------------------


class Reads(nn.Module):
    """Computes with the weight of its layer, or calls it."""

    def __init__(self, calls: bool) -> None:
        super().__init__()
        self.q, self.calls = nn.Linear(worker.DIM, worker.DIM), calls

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) if self.calls else nn.functional.linear(x, self.q.weight, self.q.bias)


def wrapped(layer: nn.Module) -> None:
    """As accelerate does it: what it is replaced with calls it."""
    forward = layer.forward
    layer.forward = functools.wraps(forward)(lambda x: forward(x))


COMPUTES = "its weight got a gradient and it did not run: something computes with the weight"
NOT_RUN: dict[str, tuple[bool, Callable[[nn.Module], Any], list[str]]] = {
    "called": (True, lambda _: None, []),
    "read": (False, lambda _: None, [COMPUTES]),
    "replaced": (
        *(True, lambda m: setattr(m[1], "q", nn.Linear(worker.DIM, worker.DIM))),
        ["it is another layer now"],
    ),
    "removed": (
        *(True, lambda m: setattr(m[1], "q", nn.Identity()) or delattr(m[1], "q")),
        ["it is no longer in the model"],
    ),
    "its forward": (
        *(True, lambda m: setattr(m[1].q, "forward", nn.Linear(worker.DIM, worker.DIM).forward)),
        ["its forward has been replaced"],
    ),
    "wrapped": (True, lambda m: wrapped(m[1].q), []),
}


@pytest.mark.parametrize("backend", ["emulated", "torchao"])
@pytest.mark.parametrize("what", NOT_RUN)
def test_a_layer_that_does_not_run_in_what_it_says(what: str, backend: Any, tmp_path: Path) -> None:
    """Told once, after the first step that trained; an evaluation before it does not count."""
    calls, change, expected = NOT_RUN[what]
    model = nn.Sequential(plain(FP32), Reads(calls))
    fp8lab.convert(model, CURRENT, backend=backend)
    weights = [parameter._backward_hooks for parameter in model.parameters()]
    x, told = torch.randn(24, worker.DIM), contextlib.nullcontext()
    if expected:
        told = pytest.warns(UserWarning, match=f"1.q: not in the precision told: {expected[0]}")
    with fp8lab.watch(model, tmp_path / "run", every=1) as watch:
        with torch.no_grad():
            model(x)
        change(model)
        if what == "removed":
            model[1].forward = lambda x: x
        model(x).square().sum().backward()
        with told:
            watch.step(0)
        model(x).square().sum().backward()
        watch.step(1)
    events = fp8lab.open_run(tmp_path / "run").events()
    assert events[["step", "kind", "site", "detail"]].values.tolist() == [
        [0, "not_run", "1.q", detail] for detail in expected
    ]
    assert not any(module._forward_hooks for module in model[0].layers.modules())
    assert weights == [None] * len(weights)
    assert not any(parameter._backward_hooks for parameter in model.parameters())


# --- the real thing ----------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["te", "torchao"])
@pytest.mark.parametrize("recipe", [DELAYED, CURRENT], ids=lambda r: type(r).__name__)
def test_on_a_gpu(backend: Any, recipe: Any, tmp_path: Path) -> None:
    """Five watched steps in BF16 fall like those of the emulation, within what the order of sums
    and the rounding of the product make, and say what they are."""
    if backend == "torchao" and recipe is DELAYED:
        pytest.skip("torchao has none")
    pytest.importorskip("torchao" if backend == "torchao" else "transformer_engine_torch")
    losses = []
    for engine in ("emulated", backend):
        model = plain(BF16).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        fp8lab.convert(model, recipe, backend=engine)
        generator = torch.Generator().manual_seed(1)
        with fp8lab.watch(model, tmp_path / engine, optimizer=optimizer, every=1) as watch:
            for step in range(5):
                batch = torch.randn(32, worker.DIM, generator=generator).to("cuda", BF16)
                loss = model(batch).float().square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                watch.step(step, loss=loss)
                losses.append(loss.detach())
    mine, theirs = (fp8lab.open_run(tmp_path / engine) for engine in ("emulated", backend))
    assert mine.info["precision"] == theirs.info["precision"]
    torch.testing.assert_close(torch.stack(losses[:5]), torch.stack(losses[5:]), rtol=0.05, atol=0)
