"""Gradients, operands, weights, moments, the residual stream and attention logits, as selected.

Oracles: what torch itself keeps (`.grad`, the optimizer's state), gradients asked of autograd one
layer at a time, logits written out. Whether watching these changes a bit is in test_families.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import fp8lab
from fp8lab.ffn import GatedFeedForward
from fp8lab.lab.model import LanguageModel, ModelConfig
from fp8lab.monitor import statistics as statistics_room
from fp8lab.monitor import taps
from fp8lab.monitor.selection import Selection

CONFIG = ModelConfig(dim=16, layers=2, heads=2, context=8)


def tokens_of(step: int) -> Tensor:
    return torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(step))


def watched(path: Path, model: nn.Module, steps: int = 1, **options: Any) -> pd.DataFrame:
    """Tensor rows of some steps of AdamW, by site."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with fp8lab.watch(model, path, optimizer=optimizer, every=1, **options) as watching:
        for step in range(steps):
            optimizer.zero_grad()
            loss = model.loss(tokens_of(step))
            loss.backward()
            optimizer.step()
            watching.step(step, loss=loss)
    return fp8lab.open_run(path).tensors().set_index("site")


def assert_row_of(rows: pd.DataFrame, site: str, tensor: Tensor) -> None:
    """Of one step: the row is of exactly this tensor."""
    row = rows.loc[site]
    values = tensor.detach().double()
    assert row["count"] == values.numel()
    assert (row["min"], row["max"]) == (values.min(), values.max())
    assert row["l2_norm"] == pytest.approx(float(values.norm()), rel=1e-14)


def test_weights_their_gradients_and_moments_are_those_of_the_step(tmp_path: Path) -> None:
    model = LanguageModel(CONFIG, seed=0)
    name, down = "layers.1.mlp.down", model.layers[1].mlp.down
    before = down.weight.detach().clone()
    tensors = ("weight", "grad_weight", "exp_avg", "exp_avg_sq")
    select = Selection(layers=(name,), tensors=tensors)
    rows = watched(tmp_path / "run", model, select=select)
    gradient = down.weight.grad
    assert gradient is not None
    assert_row_of(rows, f"{name}:weight", before)
    assert_row_of(rows, f"{name}:grad_weight", gradient)
    assert_row_of(rows, f"{name}:exp_avg", gradient * (1.0 - 0.9))
    row = rows.loc[f"{name}:exp_avg_sq"]
    assert row["max"] == pytest.approx(float(gradient.abs().max()) ** 2 * 1e-3, rel=1e-6)
    assert len(rows) == 2 * 4 + 4


def test_moments_in_fp8_are_read_as_they_are_used(tmp_path: Path) -> None:
    model = LanguageModel(CONFIG, seed=0)
    optimizer = fp8lab.Fp8AdamW(model.parameters(), lr=1e-3)
    select = Selection(layers=("head",), tensors=("exp_avg", "exp_avg_sq"))
    path = tmp_path / "run"
    with fp8lab.watch(model, path, optimizer=optimizer, every=1, select=select) as watching:
        model.loss(tokens_of(0)).backward()
        optimizer.step()
        watching.step(0)
    rows = fp8lab.open_run(path).tensors().set_index("site")
    moments = optimizer.moments(model.head.weight)
    for site, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
        assert_row_of(rows, f"head:{site}", moment)


def test_gradients_of_a_feed_forward_are_those_of_its_tensors(tmp_path: Path) -> None:
    def gradients() -> dict[str, Tensor]:
        model = LanguageModel(CONFIG, seed=0)
        mlp, kept = model.layers[0].mlp, {}
        mlp.gate.register_forward_hook(lambda *a: kept.update(grad_gate=a[-1]))
        mlp.up.register_forward_hook(lambda *a: kept.update(grad_up=a[-1]))
        mlp.down.register_forward_pre_hook(lambda m, a: kept.update(grad_product=a[0]))
        mlp.down.register_forward_hook(lambda *a: kept.update(grad_output=a[-1]))
        loss = model.loss(tokens_of(0))
        return dict(zip(kept, torch.autograd.grad(loss, list(kept.values())), strict=True))

    expected = gradients()
    select = Selection(layers=("layers.0.mlp",), tensors=tuple(expected))
    rows = watched(tmp_path / "run", LanguageModel(CONFIG, seed=0), select=select)
    for name, gradient in expected.items():
        assert_row_of(rows, f"layers.0.mlp:{name}", gradient)


def test_gradient_hooks_hold_no_activation(tmp_path: Path) -> None:
    """The graph holds the hooks, and Python's collector does not look into it."""
    model, kept = LanguageModel(CONFIG, seed=0), []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        kept.append(weakref.ref(output))

    model.layers[0].mlp.gate.register_forward_hook(keep)
    select = Selection(tensors=("grad_gate", "grad_up", "grad_product", "grad_output"))
    rows = watched(tmp_path / "run", model, steps=3, select=select)
    gc.collect()
    assert len(kept) >= 3
    assert [held for held in kept if held() is not None] == []
    assert "layers.0.mlp:grad_gate" in rows.index


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 16)])
def test_gradients_of_inputs_of_any_dimension(shape: tuple[int, ...], tmp_path: Path) -> None:
    model = fp8lab.GatedFeedForward(16, 24)
    select = Selection(tensors=("grad_gate", "grad_product"))
    with fp8lab.watch(model, tmp_path / "run", every=1, select=select) as watching:
        model(torch.ones(shape)).sum().backward()
        watching.step(0)
    sites = fp8lab.open_run(tmp_path / "run").tensors()["site"].tolist()
    assert {".:grad_gate", ".:grad_product"} <= set(sites)
    assert fp8lab.open_run(tmp_path / "run").events().empty


def test_statistics_know_which_operand_a_tensor_is(tmp_path: Path) -> None:
    model = LanguageModel(CONFIG, seed=0)
    name = "layers.0.mlp.down"
    statistics = ("fp8_current_scaling_mse", "nvfp4_mse", "l1_norm")
    select = Selection(layers=(name,), tensors=("weight", "grad_weight"), statistics=statistics)
    weight = model.layers[0].mlp.down.weight.detach().clone()
    rows = watched(tmp_path / "run", model, select=select)
    gradient = model.layers[0].mlp.down.weight.grad
    assert gradient is not None
    for site, tensor, role in (
        ("weight", weight, "weight"),
        ("grad_weight", gradient, "grad_output"),
    ):
        names = statistics[:2]
        vector = statistics_room.measure(names, tensor, role=role)
        expected = statistics_room.finish(names, vector.numpy())
        assert {n: rows.loc[f"{name}:{site}"][n] for n in names} == expected
        assert rows.loc[f"{name}:{site}"]["l1_norm"] == pytest.approx(float(tensor.abs().sum()))


def test_the_input_gradient_of_a_layer_is_its_own_share(tmp_path: Path) -> None:
    """gate and up read the same tensor; its gradient is the sum, the layer's is one part."""
    model = LanguageModel(CONFIG, seed=0)
    kept: dict[str, Tensor] = {}
    gate = model.layers[0].mlp.gate
    handle = gate.register_forward_hook(lambda m, a, o: kept.update(output=o))
    (grad_output,) = torch.autograd.grad(model.loss(tokens_of(0)), [kept["output"]])
    handle.remove()
    name = "layers.0.mlp.gate"
    tensors = ("input", "output", "grad_input", "grad_output")
    select = Selection(layers=(name,), tensors=tensors)
    rows = watched(tmp_path / "run", model, select=select)
    assert_row_of(rows, f"{name}:grad_output", grad_output)
    grad_input = grad_output.flatten(0, 1) @ LanguageModel(CONFIG, seed=0).layers[0].mlp.gate.weight
    assert_row_of(rows, f"{name}:grad_input", grad_input)
    assert_row_of(rows, f"{name}:output", kept["output"])


@pytest.mark.parametrize("converted", [False, True])
def test_operands_of_a_converted_layer_are_seen_too(converted: bool, tmp_path: Path) -> None:
    model = LanguageModel(CONFIG, seed=0)
    if converted:
        fp8lab.convert(model, fp8lab.Float8CurrentScaling())
    select = Selection(layers=("layers.0.*",), tensors=("input", "grad_input", "grad_output"))
    rows = watched(tmp_path / "run", model, select=select)
    linears = [n for n, m in model.named_modules() if n[:8] == "layers.0" and hasattr(m, "weight")]
    linears = [name for name in linears if "norm" not in name]
    for name in linears:
        for tensor in ("input", "grad_input", "grad_output"):
            assert rows.loc[f"{name}:{tensor}"]["count"] > 0, (name, tensor)


def test_residual_stream_and_its_gradient(tmp_path: Path) -> None:
    model = LanguageModel(CONFIG, seed=0)
    kept: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda m, a, o, n=n: kept.update({f"layers.{n}": o}))
        for n, layer in enumerate(model.layers)
    ]
    loss = model.loss(tokens_of(0))
    gradients = torch.autograd.grad(loss, list(kept.values()))
    for handle in handles:
        handle.remove()
    select = Selection(layers=("layers.?",), tensors=("residual", "grad_residual"))
    rows = watched(tmp_path / "run", LanguageModel(CONFIG, seed=0), select=select)
    for name, gradient in zip(kept, gradients, strict=True):
        assert_row_of(rows, f"{name}:residual", kept[name])
        assert_row_of(rows, f"{name}:grad_residual", gradient)


# --- attention logits ---------------------------------------------------------------------------


class Attention(nn.Module):
    """One head's or several heads' attention, written in one of the ways that models have."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.qkv = nn.Linear(16, 16 + 2 * (8 if way == "grouped" else 16), bias=False)
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        kv = 8 if self.way == "grouped" else 16
        q, k, v = self.qkv(x).split([16, kv, kv], dim=-1)
        q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in (q, k, v))
        full = k.repeat_interleave(2, dim=1) if self.way == "grouped" else k
        logits = q @ full.transpose(-1, -2) / 2.0
        causal = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
        if self.way == "sliding":
            causal &= torch.ones_like(causal).triu(-2)
        self.kept["allowed"] = logits.detach()[..., causal]
        lowest = torch.finfo(logits.dtype).min
        added = torch.zeros(causal.shape).masked_fill(~causal, lowest)
        if self.way == "eager":
            out = functional.softmax(logits + added, dim=-1) @ v
        elif self.way == "added mask":
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=added)
        elif self.way == "sliding":
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=causal)
        else:
            out = functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=self.way == "grouped"
            )
        return x + out.transpose(1, 2).flatten(2)


WAYS = ("causal", "grouped", "sliding", "added mask", "eager")


class Attending(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(way)])
        self.mlp = fp8lab.GatedFeedForward(16, 24)

    def loss(self, tokens: Tensor) -> Tensor:
        x = functional.one_hot(tokens % 16, 16).float() * 3.0
        return self(x).square().mean()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.layers[0](x))


@pytest.mark.parametrize("way", WAYS)
def test_attention_logits_are_those_before_the_softmax(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Attending(way)
    select = Selection(tensors=("attention_logits",))
    rows = watched(tmp_path / "run", model, select=select)
    logits = model.layers[0].kept["allowed"].double()
    row = rows.loc["layers.0:attention_logits"]
    # The recomputed product is another GEMM of the same numbers.
    assert row["cur_amax"] == pytest.approx(float(logits.abs().max()), rel=1e-6)
    assert row["max"] == pytest.approx(float(logits.max()), rel=1e-6)


class Hidden(nn.Module):
    """Its attention calls softmax inside of torch, where no mode sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return x + attended


def test_what_can_have_no_rows_is_said_once(tmp_path: Path) -> None:
    model = Attending("causal")
    model.layers.extend([Hidden(), Hidden()])
    model.forward = lambda x: model.mlp(nn.Sequential(*model.layers)(x))  # type: ignore[method-assign]
    select = Selection(tensors=("attention_logits", "exp_avg", "exp_avg_sq"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    path = tmp_path / "run"
    with (
        pytest.warns(UserWarning) as said,
        fp8lab.watch(model, path, optimizer=optimizer, every=1, select=select) as watching,
    ):
        for step in range(2):
            optimizer.zero_grad()
            model.loss(tokens_of(step)).backward()
            optimizer.step()
            watching.step(step)
    hidden = "attention_logits: softmax and scaled_dot_product_attention are not called where"
    owner = "layers.0.qkv"
    assert [str(one.message).partition(": ")[2] for one in said] == [
        f"layers.1 and 1 more: not recorded: {hidden} it is seen",
        f"the optimizer: not recorded: exp_avg: SGD keeps none of {owner}",
        f"the optimizer: not recorded: exp_avg_sq: SGD keeps none of {owner}",
    ]
    run = fp8lab.open_run(path)
    events = run.events()[["step", "kind", "site"]].values.tolist()
    places = ["layers.1", "layers.2", "the optimizer", "the optimizer"]
    assert events == [[0, "not_recorded", place] for place in places]
    found = run.tensors(sites="*:attention_logits")["site"].tolist()
    assert found == ["layers.0:attention_logits"] * 2


class WithExperts(nn.Module):
    """A block of attention and blocks that have none, as of a mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention("causal")
        self.experts = nn.ModuleList([GatedFeedForward(16, 24), GatedFeedForward(16, 24)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        for expert in self.experts:
            x = x + expert(x)
        return x


def test_of_a_block_inside_of_one_no_attention_is_expected(tmp_path: Path) -> None:
    model = Attending("causal")
    model.layers[0] = WithExperts()
    path, select = tmp_path / "run", Selection(tensors=("attention_logits",))
    rows = watched(path, model, select=select)
    assert [*rows.filter(like="attention_logits", axis=0).index] == ["layers.0:attention_logits"]
    assert fp8lab.open_run(path).events().empty


def test_the_moments_of_another_optimizer_are_none_that_fail(tmp_path: Path) -> None:
    """Of two optimizers one is watched: of what the other trains nothing is expected."""
    model = Attending("causal")
    adam = torch.optim.Adam(model.mlp.parameters(), lr=0.1)
    select, path = Selection(tensors=("exp_avg_sq",)), tmp_path / "run"
    with fp8lab.watch(model, path, optimizer=adam, every=1, select=select) as watching:
        model.loss(tokens_of(0)).backward()
        adam.step()
        watching.step(0)
    run = fp8lab.open_run(path)
    expected = [f"mlp.{name}:exp_avg_sq" for name in ("gate", "up", "down")]
    assert run.tensors(sites="*:exp_avg_sq")["site"].tolist() == expected
    assert run.events().empty


def test_the_mode_that_sees_attention_is_gone_after_an_error(tmp_path: Path) -> None:
    model = Attending("causal")
    model.layers[0].register_forward_pre_hook(lambda *_: None)
    before = torch._C._len_torch_function_stack()
    select = Selection(tensors=("attention_logits",))
    with (
        pytest.raises(RuntimeError),
        fp8lab.watch(model, tmp_path / "run", every=1, select=select),
    ):
        model(torch.zeros(2, 3, 15))
    assert torch._C._len_torch_function_stack() == before


class Odd(nn.Module):
    """Calls softmax, and attention, in ways that are allowed and not looked at."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mlp = GatedFeedForward(16, 24)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.mlp(x) + self.call(x).sum()
        return mixed


def watched_logits(call: Callable[[Tensor], Tensor], path: Path, **options: Any) -> pd.DataFrame:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.layers = nn.ModuleList([Odd(call)])
    select = Selection(tensors=("attention_logits",))
    with fp8lab.watch(model, path, every=1, select=select) as watching:
        for step in range(2):
            with torch.autocast("cpu", **options):
                output = model.layers[0](torch.randn(2, 3, 16))
            output.sum().backward()
            watching.step(step)
    rows = fp8lab.open_run(path).tensors()
    return rows[rows["site"].str.endswith("logits")]


def nothing_to_attend_to(x: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(x[:0], x[:0], x[:0])


@pytest.mark.parametrize(
    ("call", "rows"),
    [
        (lambda x: torch.softmax(input=x, dim=-1), 2),
        (lambda x: torch.softmax(x.long(), -1, dtype=torch.float32), 0),
        (nothing_to_attend_to, 0),
    ],
    ids=["by name", "of integers", "empty"],
)
def test_attention_that_is_called_oddly_ends_no_training(
    call: Callable[[Tensor], Tensor], rows: int, tmp_path: Path
) -> None:
    assert len(watched_logits(call, tmp_path / "run", enabled=False)) == rows


def test_logits_that_cannot_be_read_are_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no such view")

    monkeypatch.setattr(taps, "_extremes", fails)
    with pytest.warns(
        UserWarning, match=r"layers\.0: .*attention_logits: RuntimeError: no such view"
    ):
        rows = watched_logits(lambda x: x.softmax(-1), tmp_path / "run", enabled=False)
    assert rows.empty
    events = fp8lab.open_run(tmp_path / "run").events()
    assert events["kind"].tolist() == ["not_recorded"]


def test_logits_are_computed_in_float32_under_autocast(tmp_path: Path) -> None:
    kept: list[Tensor] = []

    def attends(x: Tensor) -> Tensor:
        kept.append(x.detach())
        return functional.scaled_dot_product_attention(x, x, x, scale=1.0)

    rows = watched_logits(attends, tmp_path / "run", enabled=True, dtype=torch.bfloat16)
    expected = [float((x @ x.mT).abs().max()) for x in kept]
    assert rows["cur_amax"].tolist() == pytest.approx(expected, rel=1e-6)


def test_the_mode_is_gone_after_ctrl_c_too(tmp_path: Path) -> None:
    def interrupts(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watched_logits(interrupts, tmp_path / "run", enabled=False)
    assert torch._C._len_torch_function_stack() == 0


# --- when, and with what ------------------------------------------------------------------------


def test_overlapping_selections_add_up(tmp_path: Path) -> None:
    select = [
        Selection(tensors=("residual",), layers=("layers.0",), freq=2, statistics=("l1_norm",)),
        Selection(tensors=("residual",), layers=("*.0",), freq=3, statistics=("mxfp8_mse",)),
    ]
    rows = watched(tmp_path / "run", LanguageModel(CONFIG, seed=0), steps=7, select=select)
    rows = rows.loc["layers.0:residual"].set_index("step")
    assert sorted(rows.index) == [0, 2, 3, 4, 6]
    has = {name: rows.index[rows[name].notna()].tolist() for name in ("mxfp8_mse",)}
    assert has == {"mxfp8_mse": [0, 3, 6]}


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_repeats_is_recorded_once(reentrant: bool, tmp_path: Path) -> None:
    names = ("residual", "grad_residual", "grad_product", "input", "grad_output")
    select = Selection(layers=("layers.0*",), tensors=names)
    counts = []
    for kind in (None, reentrant):
        model = LanguageModel(CONFIG, seed=0)
        if kind is not None:
            for layer in model.layers:
                forward = layer.forward
                layer.forward = lambda *args, forward=forward: checkpoint(
                    forward, *args, use_reentrant=reentrant
                )
        rows = watched(tmp_path / f"run {kind}", model, select=select)
        counts.append(rows[["count", "cur_amax"]].sort_index())
    pd.testing.assert_frame_equal(*counts)


@pytest.mark.parametrize(
    ("select", "reason"),
    [
        (Selection(tensors=("weight",)), "are read at the optimizer's step, expected optimizer="),
        (
            Selection(tensors=("gate", "up"), layers=("*.mpl",)),
            r"^watch: select: no layer has gate, up and a name like \*.mpl, "
            r"expected one of 2, nearest layers.0.mlp$",
        ),
        (
            Selection(tensors=("input",), layers=("layers.0.mlp",)),
            r"^watch: select: no layer has input and a name like layers.0.mlp, "
            r"expected one of 15, nearest layers.0.mlp.up, layers.0.mlp.gate, layers.0.mlp.down, ",
        ),
        (Selection(tensors=("gate",), statistics=("l3_norm",)), "l3_norm"),
    ],
)
def test_a_selection_that_selects_nothing_is_refused_before_anything_exists(
    select: Selection, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=reason):
        fp8lab.watch(LanguageModel(CONFIG, seed=0), tmp_path / "run", select=select)
    assert list(tmp_path.iterdir()) == []


def test_tensors_of_which_a_model_has_none_are_refused(tmp_path: Path) -> None:
    told = (
        r"no layer has residual and a name like \*, expected tensors that a layer of this model h"
    )
    with pytest.raises(ValueError, match=told):
        fp8lab.watch(GatedFeedForward(16, 24), tmp_path, select=Selection(tensors=("residual",)))


@pytest.mark.parametrize("accumulation", [None, fp8lab.Accumulation()])
def test_casts_that_round_at_random_leave_the_trainings_randomness_alone(
    accumulation: fp8lab.Accumulation | None, tmp_path: Path
) -> None:
    """NVFP4's gradients are rounded stochastically, and so is the cast that is measured."""

    def train(watched: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(GatedFeedForward(32, 64), GatedFeedForward(32, 64))
        recipe = fp8lab.NVFP4BlockScaling()
        fp8lab.convert(model, fp8lab.Plan(recipe=recipe, accumulation=accumulation))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def steps(after: Callable[[int], object]) -> None:
            for step in range(3):
                optimizer.zero_grad()
                model(torch.randn(16, 32)).square().mean().backward()
                optimizer.step()
                after(step)

        if not watched:
            steps(lambda step: None)
        else:
            select = Selection(tensors=("input", "weight", "grad_output", "grad_weight"))
            path = tmp_path / "run"
            with fp8lab.watch(model, path, optimizer=optimizer, every=1, select=select) as watch:
                steps(watch.step)
        return [*model.state_dict().values(), torch.get_rng_state()]

    for one, other in zip(train(True), train(False), strict=True):
        assert torch.equal(one, other)
