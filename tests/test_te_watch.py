"""Watching Transformer Engine's modules: what is seen is what TE's kernels got and made.

TE's own Python runs on a CPU in a worker, on the stand-in for its compiled extension. The oracle is
written down at the kernels' door, or handed out by TE's debug features; see
`watched_transformer_engine`. What is shown here is the wiring: which tensor is shown when, under
which scale, and that nothing is changed or left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import watched_transformer_engine as worker
from transformer_engine_on_cpu import TransformerEngine, assert_same_bits

from fp8lab import open_run
from fp8lab.integrations import transformer_engine as integration

BF16 = torch.bfloat16
DELAYED = ("DelayedScaling", {"amax_history_len": 3})
CURRENT = ("Float8CurrentScaling", {})
RECIPES = {"none": None, "delayed": DELAYED, "current": CURRENT}
SETTINGS: dict[Any, dict[str, Any]] = {worker.layernorm_mlp: worker.APART, worker.operations: {}}


@pytest.fixture(scope="module")
def te() -> Iterator[TransformerEngine]:
    with TransformerEngine() as running:
        yield running


def assert_seen_is_what_the_kernel_got(run: dict[str, Any], num_steps: int) -> None:
    """Gate, up, product and output of each step, in that order, once; and how it was cast."""
    assert run["order"] == ["gate", "up", "product", "output"] * num_steps
    steps = zip(run["seen"], run["kernel"], run["outputs"], strict=True)
    for seen, kernel, output in steps:
        assert_same_bits(torch.cat([seen["gate"], seen["up"]], dim=-1), kernel["both"])
        assert_same_bits(seen["output"], output)
        if "scale_inv" not in kernel:
            assert_same_bits(seen["product"], kernel["product"])
            assert "cast" not in seen
        else:
            # TE's own quantised product, dequantised by its scale.
            assert_same_bits(seen["dequantized"], kernel["product"])
            assert_same_bits(seen["scale"].reciprocal().reshape(1), kernel["scale_inv"])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("build", SETTINGS, ids=lambda build: build.__name__)
def test_what_is_seen(te: TransformerEngine, build: Any, recipe: str) -> None:
    """Equal to what TE's activation kernel was given, and, cast as fp8lab says that TE casts, to
    what it gave. Under delayed scaling the amax that TE wrote down is that of the product seen."""
    run = te(worker.train, build, SETTINGS[build], BF16, RECIPES[recipe], 5, watched=True)
    assert_seen_is_what_the_kernel_got(run, 5)
    for seen in run["seen"]:
        assert seen["product"].dtype == (BF16 if recipe == "none" else torch.float32)
        if recipe == "none":
            continue
        assert seen["cast"] == (RECIPES[recipe][0], "E4M3")
        if recipe == "delayed":
            assert_same_bits(seen["amax in TE"], seen["product"].abs().amax())
            assert_same_bits(seen["scale in TE"], seen["scale"])
        else:
            assert "amax in TE" not in seen


def test_fp32_and_a_norm_fused_with_its_cast(te: TransformerEngine) -> None:
    for recipe in RECIPES.values():
        run = te(worker.train, worker.layernorm_mlp, {}, torch.float32, recipe, 2, watched=True)
        assert_seen_is_what_the_kernel_got(run, 2)


@pytest.mark.parametrize("activation", ["glu", "geglu", "qgeglu", "reglu", "sreglu"])
def test_every_gate(te: TransformerEngine, activation: str) -> None:
    settings = {"activation": activation}
    run = te(
        *(worker.train, worker.layernorm_mlp, settings, BF16, None, 2, True), kernel=activation
    )
    assert_seen_is_what_the_kernel_got(run, 2)


def test_a_clamped_gate(te: TransformerEngine) -> None:
    """With TE's own limits and offset, and with others; gate and up are shown before the clamp."""
    others = {"limit": 0.01, "alpha": 3.0, "glu_linear_offset": 0.25}
    for parameters in (None, others):
        settings = {"activation": "clamped_swiglu", "activation_params": parameters}
        run = te(
            *(worker.train, worker.layernorm_mlp, settings, BF16, None, 2, True),
            kernel="clamped_swiglu",
        )
        assert_seen_is_what_the_kernel_got(run, 2)


@pytest.mark.parametrize("activation", ["relu", "srelu", "silu", "gelu"])
def test_no_gate(te: TransformerEngine, activation: str) -> None:
    """What a feed-forward without a gate is shown as. GELU is fused with the bias: no kernel to
    stand at, but what is shown is what enters fc2, to the precision of TE's formula in BF16."""
    asked = worker.train, worker.layernorm_mlp
    reference = te(*asked, {"activation": "silu"}, BF16, None, 1, True, kernel="silu")
    fused = activation == "gelu"
    named = {"kernel": "silu" if fused else activation, "backward": not fused}
    run = te(*asked, {"activation": activation}, BF16, None, 1, True, **named)
    assert run["order"] == ["up", "product", "output"]
    (seen,) = run["seen"]
    assert_same_bits(seen["up"], reference["kernel"][0]["both"])
    if fused:
        entered = seen["product"].float() @ run["parameters"]["fc2_weight"].float().t()
        torch.testing.assert_close(run["outputs"][0].float(), entered, rtol=2**-7, atol=2**-10)
        assert run["kernel"] == []
    else:
        assert_same_bits(seen["product"], run["kernel"][0]["product"])


def test_what_cannot_be_seen_is_said_once(te: TransformerEngine) -> None:
    """A GELU that is fused with its bias, in a forward that keeps nothing."""
    said, seen = te(worker.warnings_of, "gelu")
    assert len(said) == 1
    assert said[0].startswith("mlp: only its output can be seen: Transformer Engine keeps")
    assert seen == ["output"] * 3
    assert te(worker.warnings_of, "silu") == ([], ["up", "product", "output"] * 3)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("build", SETTINGS, ids=lambda build: build.__name__)
def test_what_te_computes_otherwise_is_refused(
    te: TransformerEngine, build: Any, recipe: str
) -> None:
    """A kernel that took the halves the other way round: one warning, and no wrong row."""
    said, seen = te(worker.refused, build, RECIPES[recipe])
    assert len(said) == 1
    assert said[0].startswith("mlp: only its output is recorded: ")
    assert said[0].endswith("that Transformer Engine made is not silu of what went in")
    assert seen == ["output"] * 3


def test_what_holds_a_feed_forward_of_te_is_none(te: TransformerEngine) -> None:
    """Even where TE's kernels can be looked into: here they are torch's operations."""
    assert te(worker.sites_around, worker.layernorm_mlp) == [["."], ["0"], ["0.0"], ["mlp"]]


# --- nothing is changed ------------------------------------------------------------------------


def assert_equal_to_the_bit(watched: dict[str, Any], alone: dict[str, Any]) -> None:
    assert alone["seen"] == []
    assert watched["left"] and alone["left"]
    assert watched["parameters"].keys() == alone["parameters"].keys()
    for name, parameter in alone["parameters"].items():
        assert_same_bits(watched["parameters"][name], parameter)
    for mine, theirs in zip(watched["outputs"], alone["outputs"], strict=True):
        assert_same_bits(mine, theirs)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("build", SETTINGS, ids=lambda build: build.__name__)
def test_twenty_steps_are_equal_to_the_bit(te: TransformerEngine, build: Any, recipe: str) -> None:
    asked = worker.train, build, SETTINGS[build], BF16, RECIPES[recipe], 20
    watched, alone = te(*asked, watched=True), te(*asked, watched=False)
    assert_equal_to_the_bit(watched, alone)
    assert len(watched["seen"]) == 20


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "wrap",
    [
        worker.reentrant_of_te,
        worker.not_reentrant_of_te,
        worker.offloaded,
        worker.without_gradients,
        worker.by_name,
    ],
    ids=lambda wrap: wrap.__name__,
)
def test_where_the_graph_does_not_hold_fc1(
    te: TransformerEngine, wrap: Callable[..., Any], recipe: str
) -> None:
    """Under activation checkpoints, offloading and without gradients too everything is seen, once,
    and nothing is changed. (And where the input is given by its name.)"""
    asked = worker.train, worker.layernorm_mlp, worker.APART, BF16, RECIPES[recipe], 4
    watched, alone = te(*asked, True, wrap), te(*asked, False, wrap)
    assert_seen_is_what_the_kernel_got(watched, 4)
    assert_equal_to_the_bit(watched, alone)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_checkpoint_of_a_layernorm_mlp(te: TransformerEngine, recipe: str) -> None:
    settings = worker.APART | {"checkpoint": True}
    asked = worker.train, worker.layernorm_mlp, settings, BF16, RECIPES[recipe], 4
    watched, alone = te(*asked, watched=True), te(*asked, watched=False)
    assert_seen_is_what_the_kernel_got(watched, 4)
    assert_equal_to_the_bit(watched, alone)


@pytest.mark.parametrize("wrap", [worker.reentrant, worker.not_reentrant])
@pytest.mark.parametrize("build", SETTINGS, ids=lambda build: build.__name__)
def test_checkpoints_of_torch(te: TransformerEngine, build: Any, wrap: Any) -> None:
    asked = worker.train, build, SETTINGS[build], BF16, None, 4
    watched, alone = te(*asked, True, wrap), te(*asked, False, wrap)
    assert_seen_is_what_the_kernel_got(watched, 4)
    assert_equal_to_the_bit(watched, alone)


@pytest.mark.parametrize("roles", [("product",), ("output",), ("gate", "output"), ()])
@pytest.mark.parametrize("build", SETTINGS, ids=lambda build: build.__name__)
def test_only_what_is_wanted_is_shown(te: TransformerEngine, build: Any, roles: Any) -> None:
    for wrap in (worker.plainly, worker.reentrant):
        run = te(worker.train, build, {}, BF16, None, 2, True, wrap, roles=roles)
        assert run["order"] == [*roles] * 2


@pytest.mark.parametrize("checkpoint", [False, True])
def test_nothing_is_left_after_a_forward_that_fails(
    te: TransformerEngine, checkpoint: bool
) -> None:
    assert te(worker.failing, worker.layernorm_mlp, checkpoint) == (True, True)
    assert te(worker.failing, worker.operations, False) == (True, True)


@pytest.mark.parametrize("build", SETTINGS, ids=lambda build: build.__name__)
def test_two_watches_on_one_module(te: TransformerEngine, build: Any) -> None:
    """Each sees every forward until it is removed, in whatever order."""
    assert te(worker.two_watches, build) == ([2, 3, 3], True)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["LayerNormMLP", "te.ops", "own"])
def test_a_watch(te: TransformerEngine, tmp_path: Path, kind: str, recipe: str) -> None:
    """`fp8lab.watch` over 20 steps: parameters equal to the bit, nothing left, the product proved
    and not refused; at every step amax and scale are those of TE's own state."""
    asked = RECIPES[recipe], 20
    parameters, noted = te(worker.watched_run, kind, str(tmp_path / "run"), *asked)
    alone, also_noted = te(worker.watched_run, kind, None, *asked)
    assert noted == also_noted
    for name, parameter in alone.items():
        assert_same_bits(parameters[name], parameter)
    run = open_run(tmp_path / "run")
    assert list(run.events()["kind"]) == []
    rows = run.tensors()
    assert set(rows["site"]) == {f"mlp:{role}" for role in ("gate", "up", "product", "output")}
    product = rows[rows["site"] == "mlp:product"]
    assert list(product["step"]) == list(range(20))
    if recipe == "delayed":
        assert list(zip(product["cur_amax"], product["scale"], strict=True)) == noted
        assert (product["staleness"] > 1).any()
    if recipe != "none":
        assert set(product["recipe"].dropna()) == {RECIPES[recipe][0]}


# --- a gate between TE's linear layers ---------------------------------------------------------


def test_gates_are_found(te: TransformerEngine) -> None:
    """TE's own by what TE calls them, a user's by what it computes; nothing is left in them."""
    dim, hidden = worker.DIM, worker.HIDDEN
    up, down = (hidden, dim), (dim, hidden)
    expected = {
        "own": [("two.weight", None, up), ("one.weight", None, up), ("three.weight", None, down)],
        "own, fused": [
            ("both.weight", hidden, up),
            ("both.weight", 0, up),
            ("last.weight", None, down),
        ],
        "LayerNormMLP": [
            ("fc1_weight", 0, up),
            ("fc1_weight", hidden, up),
            ("fc2_weight", None, down),
        ],
        "te.ops": [("0.weight", 0, up), ("0.weight", hidden, up), ("2.weight", None, down)],
    }
    for kind, projections in expected.items():
        found = te(worker.roles_of, kind)
        assert [found["gate"], found["up"], found["down"]] == projections
        assert (found["name"], found["activation"], found["left"]) == ("layer", "silu", True)
        biases = [found[f"{role} bias"] for role in ("gate", "up", "down")]
        assert biases == ([None] * 3 if kind == "own" else [(hidden,), (hidden,), (dim,)])


@pytest.mark.parametrize("recipe", ["delayed", "current"])
def test_a_linear_layer_says_how_it_is_about_to_cast(te: TransformerEngine, recipe: str) -> None:
    """Asked before the forward, from the first one on: equal to what enters TE's GEMM."""
    casts = te(worker.casts_of_linear, RECIPES[recipe], 4)
    assert len(casts) == 4
    for said, done in casts:
        assert_same_bits(said, done)


# --- the feature of TE's debug path ------------------------------------------------------------

TENSORS = ["activation", "weight", "gradient", "output", "wgrad", "dgrad"]


@pytest.fixture
def yaml(tmp_path: Path) -> Callable[..., str]:
    def write(options: str, layers: str = ".*", raw: bool = True) -> str:
        path = tmp_path / "features.yaml"
        path.write_text(
            "everything:\n"
            "  enabled: True\n"
            f"  layers: {{layer_name_regex_pattern: '{layers}'}}\n"
            "  transformer_engine:\n"
            f"    FP8LabTensors: {{enabled: True, {options}}}\n"
            f"    RawTensors: {{enabled: {raw}, tensors: {TENSORS}}}\n"
        )
        return str(path)

    return write


# TE's layer and tensor -> our rows; TE hands out the product's gradient as fc1's.
SITES = {
    ("block.mlp.fc1", "activation", 32): ["layer.mlp.fc1:input"],
    ("block.mlp.fc1", "weight", 32): ["layer.mlp.fc1:weight"],
    ("block.mlp.fc1", "output", 96): ["layer.mlp:gate", "layer.mlp:up"],
    ("block.mlp.fc1", "gradient", 96): ["layer.mlp:grad_gate", "layer.mlp:grad_up"],
    ("block.mlp.fc1", "wgrad", 32): ["layer.mlp.fc1:grad_weight"],
    ("block.mlp.fc1", "dgrad", 32): ["layer.mlp.fc1:grad_input"],
    ("block.mlp.fc1", "dgrad", 48): ["layer.mlp:grad_product"],
    ("block.mlp.fc2", "activation", 48): ["layer.mlp:product"],
    ("block.mlp.fc2", "weight", 48): ["layer.mlp.fc2:weight"],
    ("block.mlp.fc2", "output", 32): ["layer.mlp:output"],
    ("block.mlp.fc2", "gradient", 32): ["layer.mlp:grad_output"],
    ("block.mlp.fc2", "wgrad", 48): ["layer.mlp.fc2:grad_weight"],
    ("the_head", "activation", 32): ["head:input"],
    ("the_head", "weight", 32): ["head:weight"],
    ("the_head", "output", 32): ["head:output"],
    ("the_head", "gradient", 32): ["head:grad_output"],
    ("the_head", "wgrad", 32): ["head:grad_weight"],
    ("the_head", "dgrad", 32): ["head:grad_input"],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_feature_feeds_what_te_hands_out(
    te: TransformerEngine, yaml: Callable[..., str], tmp_path: Path, recipe: str
) -> None:
    """Every tensor of every layer, in fp8lab's words; and each operand, cast as the feature says,
    equal to TE's own quantised tensor."""
    path = yaml(f"tensors: {TENSORS}")
    run = te(worker.fed, path, str(tmp_path), RECIPES[recipe], 3)
    rows = iter(run["rows"])
    named = set()
    for iteration, layer, name, tensor, quantised in run["raw"]:
        sites = SITES[layer, name, tensor.shape[-1]]
        named.update(sites)
        parts = tensor.chunk(len(sites), dim=-1)
        casts = [None] * len(sites) if quantised is None else quantised.chunk(len(sites), dim=-1)
        for site, part, cast in zip(sites, parts, casts, strict=True):
            step, fed, seen, how = next(rows)
            assert (step, fed) == (iteration, site)
            assert_same_bits(seen, part)
            if cast is None or (len(sites) == 2 and recipe == "current"):
                assert how is None  # the scale was made of both halves
            else:
                assert how[:2] == (RECIPES[recipe][0], "E5M2" if "grad" in site else "E4M3")
                assert_same_bits(how[2], cast)
    assert list(rows) == []
    assert named == {site for sites in SITES.values() for site in sites}


def test_the_product_is_the_one_that_the_hooks_see(
    te: TransformerEngine, yaml: Callable[..., str], tmp_path: Path
) -> None:
    """In a run without FP8, whose debug path computes the same. The kernel of the same forward is
    the third witness."""
    path = yaml("tensors: [activation]", layers=".*fc2")
    run = te(worker.fed, path, str(tmp_path), None, 1)
    ((_, site, product, how),) = run["rows"]
    hooked = te(worker.hooked_like_fed)
    assert (site, how) == ("layer.mlp:product", None)
    assert_same_bits(product, hooked["product"])


def test_difference_the_debug_path_rounds_the_product_first(
    te: TransformerEngine, yaml: Callable[..., str], tmp_path: Path
) -> None:
    """TE's kernel casts the FP32 product under delayed scaling, its debug path what is left of it
    in BF16: with a feature that asks for a tensor the outputs are others, for TE's own features as
    for ours. Where none is asked for (`start_step`), they are the same."""
    asked = str(tmp_path), DELAYED, 3
    late = te(worker.fed, yaml("tensors: [activation], start_step: 3", raw=False), *asked)
    inspected = te(worker.fed, yaml("tensors: [activation]", raw=False), *asked)
    alone = te(worker.fed, None, *asked)
    assert late["rows"] == []
    assert any(
        not torch.equal(a, b) for a, b in zip(inspected["outputs"], alone["outputs"], strict=True)
    )
    for mine, theirs in zip(late["outputs"], alone["outputs"], strict=True):
        assert_same_bits(mine, theirs)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ("tensors: [activation]", [0, 1, 2, 3, 4, 5, 6]),
        ("tensors: [activation], freq: 3", [0, 3, 6]),
        ("tensors: [activation], start_step: 2, end_step: 4", [2, 3, 4]),
        ("tensors: [activation], freq: 2, start_end_list: [[1, 3], [5, 6]]", [2, 6]),
        ("tensors_struct: [{tensor: activation, freq: 4}]", [0, 4]),
    ],
)
def test_when_the_feature_feeds(
    te: TransformerEngine, yaml: Callable[..., str], tmp_path: Path, options: str, steps: list[int]
) -> None:
    run = te(worker.fed, yaml(options, layers="the_head"), str(tmp_path), None, 7)
    assert [(step, site) for step, site, *_ in run["rows"]] == [
        (step, "head:input") for step in steps
    ]


@pytest.mark.parametrize("how", [{"evaluate": True}, {"checkpoint": True}])
def test_evaluations_and_recomputations_are_not_fed(
    te: TransformerEngine, yaml: Callable[..., str], tmp_path: Path, how: dict[str, bool]
) -> None:
    path = yaml(f"tensors: {TENSORS}")
    once = te(worker.fed, path, str(tmp_path), DELAYED, 2)
    run = te(worker.fed, path, str(tmp_path), DELAYED, 2, **how)
    assert len(run["raw"]) > len(once["raw"])
    assert [row[:2] for row in run["rows"]] == [row[:2] for row in once["rows"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("tensors: [activaton]", "FP8LabTensors: tensors: 'activaton', expected one of activation"),
        ("tensors: [weight], frequency: 2", "FP8LabTensors: frequency: unknown option, expected"),
    ],
)
def test_a_misspelt_option_is_refused(
    te: TransformerEngine, yaml: Callable[..., str], tmp_path: Path, options: str, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        te(worker.fed, yaml(options), str(tmp_path), None, 1)


def test_a_watch_is_fed(te: TransformerEngine, yaml: Callable[..., str], tmp_path: Path) -> None:
    """Beside what it sees by itself: gradients, which TE's debug path alone shows."""
    path = yaml("tensors: [gradient, dgrad, wgrad]", raw=False)
    te(worker.fed, path, str(tmp_path), DELAYED, 2, run=str(tmp_path / "run"))
    rows = open_run(tmp_path / "run").tensors()
    for sites in [sites for (_, name, _), sites in SITES.items() if "grad" in name]:
        for site in sites:
            (both,) = [rows[rows["site"] == site]]
            assert list(both["step"]) == [0, 1]
            assert (both["cur_amax"] > 0).all()
    assert list(rows[rows["site"] == "layer.mlp:product"]["step"]) == [0, 1]


def test_nobody_is_fed_after_the_with() -> None:
    with integration.feeding(worker.Rows(), torch.nn.Linear(2, 2)):
        assert len(integration._feeds) == 1
    assert integration._feeds == []
