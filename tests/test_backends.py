"""`convert(backend=…)`: a model in another engine's FP8 is that engine's model, or it stops.

torchao's real classes train on a CPU; the oracle is the emulation, which has no part in them. Of
Transformer Engine its own Python runs, in a worker on the stand-in for its kernels; the oracle is a
model written by hand with `te.Linear` (`converted_transformer_engine`).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import converted_transformer_engine as worker
import pytest
import torch
from torch import Tensor, nn
from transformer_engine_on_cpu import TransformerEngine, assert_same_bits

import fp8lab
from fp8lab import formats
from fp8lab.diagnosis.not_fp8 import uses_fp8
from fp8lab.linear import Fp8Linear
from fp8lab.recipe import Format

logging.getLogger("torchao").setLevel(logging.ERROR)
BF16, FP32 = torch.bfloat16, torch.float32
OPERANDS_OF_GEMMS = (
    *("input@output", "weight@output", "grad_output@grad_input"),
    *("weight@grad_input", "grad_output@grad_weight", "input@grad_weight"),
)
DELAYED = fp8lab.DelayedScaling(amax_history_len=3)
CURRENT = fp8lab.Float8CurrentScaling()
ROWS = fp8lab.RowwiseScaling()
WIDE = {"FP32": fp8lab.HighPrecision(format=formats.FP32), "BF16": fp8lab.HighPrecision()}


@pytest.fixture(scope="module")
def te() -> Iterator[TransformerEngine]:
    with TransformerEngine() as running:
        yield running


def plain(dtype: torch.dtype, bias: bool = False) -> worker.Model:
    torch.manual_seed(0)

    def linear(inputs: int, outputs: int) -> nn.Module:
        return nn.Linear(inputs, outputs, bias=bias, dtype=dtype)

    return worker.Model(linear, linear)


def test_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend='xe', expected one of 'emulated', 'te', 'torcha"):
        fp8lab.convert(plain(FP32), CURRENT, backend="xe")  # type: ignore[arg-type]


def test_a_layer_replaced_after_the_conversion_stops_the_first_forward() -> None:
    for backend in ("emulated", "torchao"):
        model = fp8lab.convert(plain(FP32), CURRENT, backend=backend)
        model.layers[1].up = nn.Linear(worker.DIM, worker.HIDDEN)
        with pytest.raises(RuntimeError, match=r"layers\.1\.up was converted to FP8 .* replaced"):
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


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [
        (CURRENT, FP32),
        (CURRENT, BF16),
        (fp8lab.Float8CurrentScaling(use_power_2_scales=True), FP32),
        (fp8lab.Float8CurrentScaling(fp8_format=Format.E4M3), FP32),
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


def test_rows_in_fp32_are_rounded_to_bf16_by_torchao() -> None:
    """Of an FP32 model too its GEMMs of rows give BF16."""
    ours, theirs = layers_of_both(ROWS, FP32)
    for mine, other in zip(ran_one(ours), ran_one(theirs), strict=True):
        assert_same_bits(mine.bfloat16().float(), other)


def test_rows_with_other_scales_than_powers_of_two() -> None:
    """torchao rounds a gradient to BF16 before its scales are put on, and after: a second half of
    a unit in the last place. The output is the emulation's, bit for bit."""
    recipe = fp8lab.RowwiseScaling(round_scales_to_power_of_2=False)
    (output, *ours), (same, *theirs) = map(ran_one, layers_of_both(recipe, BF16))
    assert_same_bits(output, same)
    for mine, other in zip(ours, theirs, strict=True):
        assert not torch.equal(mine, other)
        torch.testing.assert_close(mine.float(), other.float(), rtol=2**-7, atol=0)


def test_a_model_of_torchao_is_the_emulation() -> None:
    """In FP32, where a fused product is not rounded: losses and parameters of ten steps of AdamW,
    made before the conversion, equal to the bit, with a bias."""
    results = []
    for backend in ("emulated", "torchao"):
        model = plain(FP32, bias=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        fp8lab.convert(model, CURRENT, exclude=["head"], backend=backend)
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


def test_a_gemm_of_torchao_in_high_precision() -> None:
    """Both operands of one GEMM as they are: equal to the emulation of that plan."""
    overrides = {"*.down@grad_weight": WIDE["FP32"], "head": WIDE["FP32"]}
    ours, theirs = (
        fp8lab.convert(plain(FP32), CURRENT, overrides=overrides, backend=backend)
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


def test_a_watch_of_torchao(tmp_path: Path) -> None:
    """The precision of each operand in the words of the emulation, and the same rows."""
    for backend in ("emulated", "torchao"):
        overrides = {"*.down@grad_weight": WIDE["FP32"]}
        model = fp8lab.convert(plain(FP32), CURRENT, overrides=overrides, backend=backend)
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


# --- Transformer Engine ------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [DELAYED, CURRENT], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"dtype": BF16, "bias": False},
        {"wide_head": True},
        {"accumulate": 2},
        {"recompute": True},
    ],
    ids=str,
)
def test_a_converted_model_is_one_written_by_hand(
    te: TransformerEngine, recipe: Any, how: dict[str, Any]
) -> None:
    """Losses and parameters of eight steps of an optimizer that was made before the conversion,
    equal to the bit, under gradient accumulation in `fp8lab.autocast` too."""
    losses, parameters = te(worker.trained, "convert", recipe, 8, **how)
    by_hand, theirs = te(worker.trained, "hand", recipe, 8, **how)
    assert len({float(loss) for loss in losses}) == 8
    for mine, other in zip(losses, by_hand, strict=True):
        assert_same_bits(mine, other)
    assert parameters.keys() == theirs.keys()
    for name, parameter in parameters.items():
        assert_same_bits(parameter, theirs[name])


def test_what_the_conversion_keeps(te: TransformerEngine) -> None:
    kept = te(worker.kept_by_conversion)
    assert [what for what, is_kept in kept.items() if not is_kept] == []


def test_a_layer_without_fp8_stops_the_run(te: TransformerEngine) -> None:
    said = te(worker.said_of_layers_without_fp8)
    delayed = "expected the DelayedScaling that it was converted to; "
    outside = "it was called outside of the model's forward, or inside of te.autocast(enabled=Fal"
    expected = [
        f"layers.1.gate: Transformer Engine runs it without FP8, {delayed}{outside}",
        f"layers.1.gate: Transformer Engine runs it under another Float8CurrentScaling, {delayed}",
        f"layers.0.gate: Transformer Engine runs it without FP8, {delayed}{outside}",
        "convert: layers.1.up was converted to FP8 (backend='te') and has been replaced since",
        f"layers.1.gate: Transformer Engine runs it without FP8, {delayed}a checkpoint of torch",
    ]
    assert len(said) == len(expected)
    for message, opening in zip(said, expected, strict=True):
        assert message.startswith(opening)


TE_REFUSES: dict[str, tuple[dict[str, Any], str, str]] = {
    "rows": ({"recipe": ROWS}, "", "ValueError: to_te: Transformer Engine has no RowwiseScaling"),
    "bits": (
        {"recipe": fp8lab.BitNetScaling()},
        "",
        "ValueError: to_te: Transformer Engine has no BitNetScaling",
    ),
    "nothing": (
        {"recipe": WIDE["FP32"]},
        "",
        "ValueError: every layer is HighPrecision, expected a recipe in FP8",
    ),
    "another format": (
        {"recipe": CURRENT, "overrides": {"head": WIDE["BF16"]}},
        "",
        "ValueError: head: BF16, expected FP32, the layer's own",
    ),
    "an operand": (
        {"recipe": CURRENT, "overrides": {"*.down:input": WIDE["FP32"]}},
        "",
        "ValueError: layers.0.down:input@output: HighPrecision, expected Float8CurrentScaling as "
        "everywhere: TE has one recipe for a model, and a layer as a whole in high precision",
    ),
    "a GEMM": (
        {"recipe": DELAYED, "overrides": {"*@grad_weight": CURRENT}},
        "",
        "ValueError: layers.0.gate:grad_output@grad_weight: Float8CurrentScaling, expected Delayed",
    ),
    "a field": (
        {"recipe": fp8lab.DelayedScaling(stochastic_rounding=True)},
        "",
        "ValueError: to_te: Transformer Engine has no DelayedScaling(stochastic_rounding=True)",
    ),
    "accumulation": (
        {"recipe": CURRENT, "accumulation": fp8lab.Accumulation()},
        "",
        "ValueError: accumulation: Accumulation(bits=14",
    ),
    "sizes": (
        {"recipe": CURRENT},
        "odd",
        "ValueError: head: 32 → 40 features, expected multiples of 16: exclude it",
    ),
    "float64": (
        {"recipe": CURRENT},
        "double",
        "ValueError: layers.0.gate: torch.float64, expected one of FP32, BF16 and FP16",
    ),
    "a CPU": (
        {"recipe": CURRENT},
        "cpu",
        "ValueError: layers.0.gate is on cpu, expected a GPU: move the model first",
    ),
    "no GPU": (
        {"recipe": CURRENT},
        "no gpu",
        "RuntimeError: expected a GPU that computes in FP8, and torch sees none",
    ),
    "an old GPU": (
        {"recipe": CURRENT},
        "old gpu",
        "RuntimeError: Float8CurrentScaling: in words of TE",
    ),
    "a Hopper": (
        {"recipe": fp8lab.MXFP8BlockScaling()},
        "",
        "RuntimeError: MXFP8BlockScaling: Device compute capability 10.0 or higher required",
    ),
    "a Hopper, four bits": (
        {"recipe": fp8lab.NVFP4BlockScaling()},
        "",
        "RuntimeError: NVFP4BlockScaling: Device compute capability 10.0 or higher required",
    ),
}


@pytest.mark.parametrize("what", TE_REFUSES)
def test_what_te_refuses(te: TransformerEngine, what: str) -> None:
    """By name, in one line, and nothing is converted."""
    convert, change, expected = TE_REFUSES[what]
    said, is_untouched = te(worker.said_when_refused, convert, change)
    kind, _, message = expected.partition(": ")
    assert said.startswith(f"{kind}: convert: backend='te': {message}")
    assert "\n" not in said
    assert is_untouched


def test_a_layer_of_te_in_high_precision_stays_plain(
    te: TransformerEngine,
) -> None:
    """An override for a whole layer is what leaving it out is."""
    overridden = fp8lab.Plan(recipe=CURRENT, overrides={"head": WIDE["FP32"]})
    mine, _ = te(worker.trained, "convert", overridden, 3)
    by_hand, _ = te(worker.trained, "hand", CURRENT, 3, wide_head=True)
    for loss, theirs in zip(mine, by_hand, strict=True):
        assert_same_bits(loss, theirs)


@pytest.mark.parametrize("recipe", [DELAYED, CURRENT], ids=lambda r: type(r).__name__)
def test_a_watch_of_te(te: TransformerEngine, tmp_path: Path, recipe: Any) -> None:
    """Nothing is changed; gates are seen and every operand's precision is told."""
    losses, _ = te(worker.trained, "convert", recipe, 4, path=str(tmp_path / "run"))
    alone, _ = te(worker.trained, "convert", recipe, 4)
    for mine, theirs in zip(losses, alone, strict=True):
        assert_same_bits(mine, theirs)
    run = fp8lab.open_run(tmp_path / "run")
    assert list(run.events()["kind"]) == []
    assert {f"layers.{n}:{role}" for n in (0, 1) for role in ("gate", "up", "product")} <= set(
        run.tensors()["site"]
    )
    product = run.tensors(sites="layers.1:product")
    assert (product["scale"] > 0).all()
    emulated = fp8lab.convert(plain(FP32), recipe)
    expected = {n: m.precision() for n, m in emulated.named_modules() if isinstance(m, Fp8Linear)}
    assert run.info["precision"] == expected
    assert run.info["linears"]["layers.0.down"] == {
        "class": "transformer_engine.Linear",
        "in": worker.HIDDEN,
        "out": worker.DIM,
    }


LAYERS = {
    "LayerNormMLP": {"mlp.fc1": (32, 96), "mlp.fc2": (48, 32)},
    "te.ops": {"mlp.0": (32, 96), "mlp.2": (48, 32)},
    "own": {"mlp.one": (32, 48), "mlp.two": (32, 48), "mlp.three": (48, 32)},
    "fused": {"mlp.both": (32, 96), "mlp.last": (48, 32)},
}


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        *((kind, DELAYED) for kind in LAYERS),
        *((kind, None) for kind in LAYERS if kind != "fused"),  # not in the stand-in
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_precision_of_modules_of_te(
    te: TransformerEngine, tmp_path: Path, kind: str, recipe: Any
) -> None:
    """Told by the forward that trains, whatever an evaluation before it was; and what the
    diagnosis makes of a plan that they do not keep."""
    te(worker.watched, kind, recipe, str(tmp_path / "run"), DELAYED)
    run = fp8lab.open_run(tmp_path / "run")
    wide, narrow = ["BF16 HighPrecision"] * 6, ["E4M3 DelayedScaling"] * 6
    narrow[2] = narrow[4] = "E5M2 DelayedScaling"
    casts = dict(zip(OPERANDS_OF_GEMMS, wide if recipe is None else narrow, strict=True))
    assert run.info["precision"] == dict.fromkeys(LAYERS[kind], casts)
    sizes = {name: (facts["in"], facts["out"]) for name, facts in run.info["linears"].items()}
    assert sizes == LAYERS[kind]
    assert uses_fp8(run) == (recipe is not None)
    found = fp8lab.diagnose(tmp_path / "run").findings
    lying = [finding for finding in found if finding.cause == "precision_label"]
    assert len(lying) == (recipe is None)
    if recipe is None:
        said = f"{len(LAYERS[kind])} layers"
        assert lying[0].summary.startswith(said)
        assert lying[0].summary.endswith("input@output is to be E4M3 and is BF16 HighPrecision")


def test_precision_is_in_the_file_before_the_run_ends(
    te: TransformerEngine, tmp_path: Path
) -> None:
    """What a killed run leaves: run.json as it is read in the middle of the second step."""
    said = te(worker.read_in_the_middle, DELAYED, str(tmp_path / "run"))
    assert said["state"] == "running"
    assert set(said["precision"]) == set(LAYERS["own"])


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
