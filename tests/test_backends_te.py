"""`convert(backend="te")`: a model of `te.Linear`s under `te.autocast`, or an error.

Transformer Engine's own Python runs in a worker, on the stand-in for its kernels; the oracle is a
model written by hand with its layers (`converted_transformer_engine`). And what TE's own modules,
converted or not, really compute in, as a run says it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import converted_transformer_engine as worker
import pytest
import torch
from transformer_engine_on_cpu import TransformerEngine, assert_same_bits

import fp8lab
from fp8lab import formats
from fp8lab.diagnosis.not_fp8 import uses_fp8
from fp8lab.linear import Fp8Linear

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


def test_inside_of_te_s_own_autocast(te: TransformerEngine) -> None:
    """Two forwards of a converted model in one region of TE are one step, as by hand."""
    mine, theirs = (te(worker.trained, by, DELAYED, 6, accumulate=2) for by in ("both", "hand"))
    for loss, by_hand in zip(mine[0], theirs[0], strict=True):
        assert_same_bits(loss, by_hand)


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


def test_a_checkpoint_around_a_converted_model(te: TransformerEngine) -> None:
    """Delayed scales have moved when it is repeated: an error; just in time it is the same step."""
    *alone, within = te(worker.said_of_a_repeated_model, DELAYED)
    assert set(alone) == {
        "convert: backend='te': a checkpoint repeats the converted model outside of its region, "
        "whose DelayedScaling has moved its scales since: use te.checkpoint inside of the model"
    }
    assert within == "equal"
    assert te(worker.said_of_a_repeated_model, CURRENT) == ["equal"] * 4


def test_a_model_has_one_recipe_of_te(te: TransformerEngine) -> None:
    """A second one is refused when it is converted; parts of a model may differ."""
    opening, ending = "convert: backend='te': ", "already: convert its parts one by one Linear"
    expected = f"expected the DelayedScaling that the model is converted to {ending}"
    assert te(worker.said_of_two_recipes) == [
        "ran",
        f"{opening}Float8CurrentScaling, {expected}",
        f"{opening}DelayedScaling of other fields, {expected}",
    ]


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
    emulated = fp8lab.convert(worker.plain(FP32), recipe)
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


@pytest.mark.parametrize("ends_in_fp8", [True, False])
def test_a_precision_that_changes(te: TransformerEngine, tmp_path: Path, ends_in_fp8: bool) -> None:
    """A region that is opened, or left out, from step 1 on: run.json says what is in force since,
    an event of every layer that and when it changed, as far as steps are recorded."""
    path = tmp_path / "run"
    te(worker.warmed_up, str(path), [not ends_in_fp8, *[ends_in_fp8] * 4])
    run = fp8lab.open_run(path)
    words = ["E4M3 DelayedScaling", "BF16 HighPrecision"][:: 1 if ends_in_fp8 else -1]
    now = {name: uses["input@output"] for name, uses in run.info["precision"].items()}
    assert now == dict.fromkeys(LAYERS["own"], words[0])
    said = f"input@output was {words[1]} and is {words[0]}; so 6 of 6 operands"
    events = run.events()[["step", "kind", "site", "detail"]].values.tolist()
    assert sorted(events) == [[2, "precision_changed", n, said] for n in sorted(LAYERS["own"])]


def test_a_layer_of_te_s_that_does_not_run_is_told(te: TransformerEngine, tmp_path: Path) -> None:
    events = te(worker.read_and_not_run, str(tmp_path / "run"))
    assert events == [[0, "not_run", "read"]]


@pytest.mark.parametrize("is_fp8", [[True, False], [True, True]], ids=str)
def test_processes_whose_layers_of_te_s_differ(
    te: TransformerEngine, is_fp8: list[bool], tmp_path: Path
) -> None:
    """Who comes second tells the first layer that differs, of the step in which it is told."""
    events, said = te(worker.of_two_processes, str(tmp_path), is_fp8)
    if is_fp8[0] == is_fp8[1]:
        assert (events, said) == ([], [])
        return
    ((step, kind, site, detail),) = events
    assert (step, kind) == (0, "unlike")
    assert site in LAYERS["own"]
    use = "grad_output@grad_input: BF16 HighPrecision on rank 1, E5M2 DelayedScaling on rank 0"
    rows, columns = LAYERS["own"][site]
    assert detail == f"{site} {rows}x{columns}: {use}, expected the same on both"
    assert [f"{site}: cast otherwise by another process: {detail}" in one for one in said] == [True]


def test_what_a_converted_model_tells_other_processes(te: TransformerEngine) -> None:
    """Before a forward, where nothing runs yet: the recipe that it was converted to."""
    words = te(worker.words_of_converted, DELAYED)
    casts = {"every operand": "DelayedScaling (amax_history_len=3)"}
    assert set(map(str, words.values())) == {str(casts)}
    other = te(worker.words_of_converted, CURRENT)
    assert set(map(str, other.values())) == {str({"every operand": "Float8CurrentScaling"})}
    assert words.keys() == other.keys()
