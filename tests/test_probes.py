"""What the rows of a watched step say, against what the test saw with hooks of its own.

`measure` and `sketch` are tested on their own; here the question is which tensor a column is of,
in which step it appears, and how micro-batches, repeated forwards and evaluations merge. The test
catches its tensors with its own hooks, or computes them by hand where nothing is called.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fp8lab
from fp8lab.casting import Cast, cast_for
from fp8lab.ffn import GatedFeedForward
from fp8lab.monitor import Watch, measure, watch
from fp8lab.recipe import DelayedScaling, Float8CurrentScaling, HighPrecision
from fp8lab.sketch import Sketch
from fp8lab.store import open_run

DIM, HIDDEN = 16, 24
DELAYED = DelayedScaling(amax_history_len=4)


class Uncalled(GatedFeedForward):
    """Seed 002: the weights are used, the modules are never called; dropout follows."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(F.linear(x, self.gate.weight)) * F.linear(x, self.up.weight)
        return F.dropout(F.linear(hidden, self.down.weight), 0.5, self.training)


class Twice(GatedFeedForward):
    """Seed 000: gate is called twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x).sigmoid() * self.gate(x) * self.up(x))


class InPlace(GatedFeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(input=F.silu(self.gate(x), inplace=True) * self.up(x))


class Seen:
    """What the test itself saw of a feed-forward since it was last asked."""

    def __init__(self, model: GatedFeedForward) -> None:
        self.model = model
        self.tensors: dict[str, Tensor] = {}
        for role in ("gate", "up"):
            getattr(model, role).register_forward_hook(self._keep(role))
        model.down.register_forward_pre_hook(self._product, with_kwargs=True)
        model.down.register_forward_hook(self._keep("output"))

    def _keep(self, role: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.tensors[role] = output.detach().clone()

        return hook

    def _product(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.tensors["product"] = (*args, *kwargs.values())[0].detach().clone()

    def by_hand(self, x: Tensor) -> None:
        with torch.no_grad():
            gate, up = F.linear(x, self.model.gate.weight), F.linear(x, self.model.up.weight)
            product = F.silu(gate) * up
            output = F.linear(product, self.model.down.weight)
        self.tensors = {"gate": gate, "up": up, "product": product, "output": output}


def statistics(tensor: Tensor) -> dict[str, Any]:
    return Sketch.from_packed(measure.summary(tensor).packed.numpy()).statistics()


def ratios(seen: dict[str, Tensor]) -> dict[str, float]:
    """Of the product and its factors, as the columns define them."""
    factors = {"gate": F.silu(seen["gate"]), "up": seen["up"], "product": seen["product"]}
    sizes = {n: t.double().abs().reshape(-1, HIDDEN).numpy() for n, t in factors.items()}
    tokens, channels = sizes["product"].max(axis=1), sizes["product"].max(axis=0)
    crests = {n: size.max() / np.sqrt(np.mean(size**2)) for n, size in sizes.items()}
    return {
        "token_ratio": np.quantile(tokens, 0.999) / np.median(tokens),
        "channel_ratio": channels.max() / np.median(channels),
        "amplification": crests["product"] / max(crests["gate"], crests["up"]),
        "coincidence": channels.max() / (sizes["gate"].max() * sizes["up"].max()),
    }


def expected_product(seen: dict[str, Tensor], how: Cast | None) -> dict[str, Any]:
    product = seen["product"]
    row = statistics(product)
    row |= {name: pytest.approx(value, rel=2**-20) for name, value in ratios(seen).items()}
    amax = product.abs().reshape(-1, HIDDEN).amax(dim=0)
    row |= {"cur_amax": float(amax.max()), "hot_channel": int(amax.argmax())}
    if how is not None:
        row |= measure.operand_statistics(measure.operand_vector(how).numpy())
        row |= {"recipe": type(how.recipe).__name__, "format": "E4M3"}
        staleness = measure.sentinel_vector(product, how).tolist()[3]
        row |= {"scale": float(how.scale), "staleness": staleness}
    return row


def rows(path: Path, table: str = "tensors") -> list[dict[str, Any]]:
    """A dictionary a row, without what is missing."""
    table_rows = open_run(path).arrow(table).to_pylist()
    return [{k: v for k, v in row.items() if v is not None} for row in table_rows]


def by_role(path: Path, step: int) -> dict[str, dict[str, Any]]:
    found = {}
    for row in rows(path):
        if row.pop("step") == step:
            row.pop("rank")
            found[row.pop("site").partition(":")[2]] = row
    return found


@contextmanager
def recording(model: nn.Module, path: Path, **settings: Any) -> Iterator[Watch]:
    with watch(model, path, **{"every": 1, **settings}) as watching:
        yield watching


def inputs(step: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 5, DIM)), generator=torch.Generator().manual_seed(step))


# --- which tensor a row is of -----------------------------------------------------------------

FORMS: dict[str, Callable[[], GatedFeedForward]] = {
    "plain": lambda: GatedFeedForward(DIM, HIDDEN, dropout=0.5),
    "BF16": lambda: GatedFeedForward(DIM, HIDDEN).bfloat16(),
    "called twice": lambda: Twice(DIM, HIDDEN),
    "in place": lambda: InPlace(DIM, HIDDEN),
    "uncalled": lambda: Uncalled(DIM, HIDDEN),
    "delayed": lambda: fp8lab.convert(GatedFeedForward(DIM, HIDDEN), DELAYED),
    "current": lambda: fp8lab.convert(GatedFeedForward(DIM, HIDDEN), Float8CurrentScaling()),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_of_the_tensors_that_were_there(form: str, tmp_path: Path) -> None:
    model = FORMS[form]()
    seen, kept = Seen(model), []
    with recording(model, tmp_path / "run") as watching:
        for step in range(3):
            x = inputs(step).to(model.gate.weight.dtype)
            scale = float(model.down.scale[0]) if form == "delayed" else None
            output = model(x)
            if form == "uncalled":
                seen.by_hand(x)
            output.float().square().sum().backward()
            watching.step(step)
            kept.append((dict(seen.tensors), scale))
    for step, (tensors, scale) in enumerate(kept):
        how = None
        if form in ("delayed", "current"):
            recipe = DELAYED if form == "delayed" else Float8CurrentScaling()
            in_force = None if scale is None else torch.tensor(scale)
            how = cast_for(tensors["product"], recipe, "input", in_force)
        got = by_role(tmp_path / "run", step)
        persistence = got["product"].pop("persistence", None)
        assert (persistence is None) == (step == 0)
        assert got["product"].pop("seen") == "seen"
        assert got.pop("product") == expected_product(tensors, how)
        assert got == {role: statistics(tensors[role]) for role in ("gate", "up", "output")}
    if form == "delayed":
        assert len({scale for _, scale in kept}) == 3, "the scale never moved"


def test_high_precision_has_a_recipe_and_errors_but_no_scale(tmp_path: Path) -> None:
    model = fp8lab.convert(GatedFeedForward(DIM, HIDDEN), HighPrecision())
    with recording(model, tmp_path / "run") as watching:
        model(inputs(0))
        watching.step(0)
    product = by_role(tmp_path / "run", 0)["product"]
    assert (product["recipe"], product["format"]) == ("HighPrecision", "BF16")
    assert product.keys().isdisjoint({"scale", "staleness"})
    assert product["mse"] > 0


def test_a_module_that_is_called_by_keyword(tmp_path: Path) -> None:
    model = nn.ModuleDict({"mlp": Uncalled(DIM, HIDDEN)})
    with recording(model, tmp_path / "run") as watching:
        model["mlp"](x=inputs(0))
        watching.step(0)
    assert by_role(tmp_path / "run", 0)["product"]["count"] == 10 * HIDDEN


# --- in which step ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain", "called twice", "uncalled", "delayed"])
def test_the_sentinel_is_kept_at_every_step_and_the_rest_at_every_nth(
    form: str, tmp_path: Path
) -> None:
    model = FORMS[form]()
    seen, amaxes, channels = Seen(model), [], []
    with recording(model, tmp_path / "run", every=3) as watching:
        for step in range(7):
            model(inputs(step))
            if form == "uncalled":
                seen.by_hand(inputs(step))
            amax = seen.tensors["product"].abs().amax(dim=(0, 1))
            amaxes.append(float(amax.max()))
            channels.append(int(amax.argmax()))
            watching.step(step)
    frame = open_run(tmp_path / "run").tensors()
    product = frame[frame["site"] == ".:product"]
    assert product["cur_amax"].tolist() == amaxes
    assert product["hot_channel"].tolist() == channels
    assert product["count"].notna().tolist() == [step % 3 == 0 for step in range(7)]
    assert frame.groupby("step").size().tolist() == [4, 1, 1, 4, 1, 1, 4]
    assert open_run(tmp_path / "run").channels()["step"].unique().tolist() == [0, 3, 6]
    if form == "delayed":
        assert product["staleness"].notna().all()
        assert product["scale"].notna().all()


def test_clipping_between_the_recorded_steps_is_seen(tmp_path: Path) -> None:
    model = fp8lab.convert(GatedFeedForward(DIM, HIDDEN), DELAYED)
    seen = Seen(model)
    with recording(model, tmp_path / "run", every=10) as watching:
        for step in range(10):
            x = inputs(0)
            if step == 7:
                x[1, 3] *= 100.0
            made_the_scale = 448.0 / float(model.down.scale[0])
            model(x).sum().backward()
            watching.step(step)
            if step == 7:
                product = seen.tensors["product"].abs().amax(dim=(0, 1))
                stale = float(product.max()) / made_the_scale
    frame = open_run(tmp_path / "run").tensors()
    product_rows = frame[frame["site"] == ".:product"].set_index("step")
    assert stale > 5  # gate and up clip, too: their scale is as stale
    assert product_rows["staleness"][7] == pytest.approx(stale, rel=1e-6)
    assert product_rows["hot_channel"][7] == int(product.argmax())
    assert (product_rows["staleness"].drop([0, 7]) < 1.1).all()
    assert np.isnan(product_rows["saturated"][7])
    assert watching.alarms == 1


def test_a_step_in_which_nothing_ran_has_no_rows(tmp_path: Path) -> None:
    model = nn.ModuleDict({"one": GatedFeedForward(DIM, HIDDEN), "two": Uncalled(DIM, HIDDEN)})
    with recording(model, tmp_path / "run") as watching:
        model["one"](inputs(0))
        model["two"](inputs(0, 0, DIM))  # an expert that got no token
        watching.step(0)
        model["one"](inputs(0, 0, DIM))
        model["one"](inputs(0))
        model["two"](inputs(0))
        watching.step(1)
        watching.step(2)
    frame = open_run(tmp_path / "run").tensors()
    sites = {step: set(of_step["site"]) for step, of_step in frame.groupby("step")}
    one, two = ({f"{name}:{role}" for role in ("gate", "up", "product", "output")}
                for name in ("one", "two"))  # fmt: skip
    assert sites == {0: one, 1: one | two}
    assert set(frame["count"]) == {10 * HIDDEN, 10 * DIM}


# --- what counts ------------------------------------------------------------------------------


def same_rows(one: Path, other: Path) -> None:
    for table in ("tensors", "channels"):
        frames = [getattr(open_run(path), table)() for path in (one, other)]
        assert len(frames[0]) > 0
        pd.testing.assert_frame_equal(*frames, check_exact=True)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("form", ["plain", "delayed", "uncalled"])
def test_what_a_checkpoint_repeats_is_not_counted_again(
    form: str, reentrant: bool, tmp_path: Path
) -> None:
    original = FORMS[form]()
    for name, repeats in (("whole", False), ("checkpointed", True)):
        model = copy.deepcopy(original)
        torch.manual_seed(0)
        with recording(model, tmp_path / name, every=2) as watching:
            for step in range(5):
                x = inputs(step).requires_grad_()
                y = checkpoint(model, x, use_reentrant=reentrant) if repeats else model(x)
                y.square().sum().backward()
                watching.step(step)
    same_rows(tmp_path / "whole", tmp_path / "checkpointed")


def repeated(model: nn.Module, x: Tensor, reentrant: bool) -> None:
    checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)


EVALUATIONS: dict[str, tuple[Callable[[nn.Module, Tensor], object], bool, Any]] = {
    "no_grad": (lambda model, x: model(x), False, torch.no_grad),
    "no_grad, in training mode": (lambda model, x: model(x), True, torch.no_grad),
    "inference mode": (lambda model, x: model(x), False, torch.inference_mode),
    "inference mode, in training mode": (lambda model, x: model(x), True, torch.inference_mode),
    "checkpointed": (lambda model, x: repeated(model, x, False), False, torch.no_grad),
    "reentrant": (lambda model, x: repeated(model, x, True), False, torch.no_grad),
}


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize("form", ["plain", "current", "uncalled"])
def test_an_evaluation_between_steps_is_not_counted(
    form: str, evaluation: str, tmp_path: Path
) -> None:
    evaluate, in_training_mode, without_gradients = EVALUATIONS[evaluation]
    original = FORMS[form]()
    for name, evaluates in (("whole", False), ("evaluated", True)):
        model = copy.deepcopy(original)
        with recording(model, tmp_path / name, every=2) as watching:
            for step in range(3):
                model(inputs(step)).square().sum().backward()
                if evaluates:
                    model.train(in_training_mode)
                    with without_gradients():
                        evaluate(model, 100.0 * inputs(step))
                    model.train()
                watching.step(step)
    same_rows(tmp_path / "whole", tmp_path / "evaluated")


def exact_model() -> GatedFeedForward:
    """Small whole numbers and ReLU: no sum is rounded, in whatever order."""
    model = GatedFeedForward(DIM, HIDDEN, "reglu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape))
    return model


@pytest.mark.parametrize("converted", [False, True])
def test_micro_batches_merge_into_the_whole_batch(converted: bool, tmp_path: Path) -> None:
    whole = torch.randint(-2, 3, (12, DIM)).float()
    whole[7] *= 8.0
    for name, parts in (("whole", [whole]), ("parts", list(whole.split([5, 1, 4, 2])))):
        torch.manual_seed(0)
        model = exact_model()
        if converted:
            fp8lab.convert(model, DELAYED)
            model.down.scale[0] = 0.25
        with recording(model, tmp_path / name) as watching, fp8lab.autocast():
            for part in parts:
                model(part)
            watching.step(0)
    merged, expected = by_role(tmp_path / "parts", 0), by_role(tmp_path / "whole", 0)
    for row in (merged["product"], expected["product"]):
        row.pop("bulk_error", None)  # the bulk is chosen in each micro-batch
        assert row.pop("seen") == "seen"
    for role in expected:
        histogram = merged[role].pop("histogram")
        assert histogram == expected[role].pop("histogram"), role
        assert merged[role].pop("bins") == expected[role].pop("bins"), role
        for name in ("recipe", "format"):
            assert merged[role].pop(name, None) == expected[role].pop(name, None)
        assert merged[role] == pytest.approx(expected[role], rel=1e-12), role
    assert merged["product"]["count"] == 12 * HIDDEN
    amaxes = ("product_amax", "gate_amax", "up_amax")
    channels = rows(tmp_path / "whole", "channels")
    assert len(channels) == 8
    for part, row in zip(rows(tmp_path / "parts", "channels"), channels, strict=True):
        assert [part[name] for name in amaxes] == [row[name] for name in amaxes]
        assert part.keys() == row.keys()


def test_a_ratio_is_that_of_all_micro_batches_together(tmp_path: Path) -> None:
    model = GatedFeedForward(DIM, HIDDEN)
    seen, parts = Seen(model), []
    with recording(model, tmp_path / "run") as watching:
        for x in (inputs(0), torch.zeros(2, 5, DIM), inputs(1)):
            model(x)
            parts.append(seen.tensors)
            seen.tensors = {}
        watching.step(0)
    product = by_role(tmp_path / "run", 0)["product"]
    whole = {role: torch.cat([part[role] for part in parts]) for role in parts[0]}
    assert {name: product[name] for name in ratios(whole)} == pytest.approx(ratios(whole))


# --- channels ---------------------------------------------------------------------------------


def test_channel_rows_are_those_of_the_hottest_channels(tmp_path: Path) -> None:
    model = GatedFeedForward(DIM, HIDDEN)
    seen = Seen(model)
    with recording(model, tmp_path / "run", channels=3) as watching:
        model(inputs(0))
        watching.step(0)
    amax = seen.tensors["product"].abs().amax(dim=(0, 1))
    table = {row["channel"]: row for row in rows(tmp_path / "run", "channels")}
    hottest = amax.argsort(descending=True)[:3].tolist()
    assert list(table) == sorted(hottest)
    weights = model.gate.weight, model.up.weight, model.down.weight
    seen_here = seen.tensors["product"], seen.tensors["gate"], seen.tensors["up"]
    matrix = measure.channel_matrix(*seen_here, weights)
    for channel, row in table.items():
        assert row.pop("site") == "."
        assert row.pop("channel_ratio") == float(amax[channel]) / float(amax.double().quantile(0.5))
        sampled = row.pop("gate_weights", None), row.pop("up_weights", None)
        rest = {name: row[name] for name in measure.CHANNEL_COLUMNS}
        assert list(rest.values()) == matrix[:, channel].tolist()
        is_hottest = channel == hottest[0]
        gate_row, up_row = model.gate.weight[channel].tolist(), model.up.weight[channel].tolist()
        assert sampled == ((gate_row, up_row) if is_hottest else (None, None))


def heat(channel: int, amax: float) -> Tensor:
    """An input that makes this channel of a Gates model the hottest."""
    x = torch.full((4, HIDDEN), 0.01)
    x[2, channel] = amax
    return x


def gates() -> GatedFeedForward:
    model = GatedFeedForward(HIDDEN, HIDDEN, "reglu")
    with torch.no_grad():
        model.gate.weight.copy_(torch.eye(HIDDEN))
        model.up.weight.copy_(torch.eye(HIDDEN))
    return model


def test_channels_once_hot_are_followed_and_the_hottest_never_missing(tmp_path: Path) -> None:
    with recording(model := gates(), tmp_path / "run", channels=1) as watching:
        for step, channel in enumerate([3, 5, 9, 11, 13, 17, 19]):
            model(heat(channel, 64.0 / 2**step))  # ever less hot
            watching.step(step)
    table = open_run(tmp_path / "run").channels()
    followed = table.groupby("step")["channel"].agg(list).tolist()
    first_four = [3, 5, 9, 11]  # at most four times the number asked for
    assert followed[:4] == [first_four[: step + 1] for step in range(4)]
    assert followed[4:] == [[*first_four, hottest] for hottest in (13, 17, 19)]


def test_a_channel_hot_between_recorded_steps_is_followed(tmp_path: Path) -> None:
    with recording(model := gates(), tmp_path / "run", channels=1, every=4) as watching:
        for step, channel in enumerate([3, 5, 3, 3, 3]):
            model(heat(channel, 8.0))
            watching.step(step)
    assert open_run(tmp_path / "run").channels()["channel"].tolist() == [3, 3, 5]


def test_persistence_is_the_share_of_the_top_that_stayed(tmp_path: Path) -> None:
    with recording(model := gates(), tmp_path / "run", channels=2) as watching:
        for step, pair in enumerate([(3, 5), (3, 5), (5, 9), (11, 13), (11, 3)]):
            model(torch.cat([heat(channel, 8.0) for channel in pair]))
            watching.step(step)
    frame = open_run(tmp_path / "run").tensors()
    persistence = frame[frame["site"] == ".:product"]["persistence"]
    assert np.isnan(persistence.iloc[0])
    assert persistence.tolist()[1:] == [1.0, 0.5, 0.0, 0.5]


def test_the_sampled_rows_are_of_the_hottest_micro_batch(tmp_path: Path) -> None:
    with recording(model := gates(), tmp_path / "run", channels=2) as watching:
        for channel, amax in ((3, 2.0), (5, 8.0), (9, 4.0)):
            model(heat(channel, amax))
        watching.step(0)
    assert by_role(tmp_path / "run", 0)["product"]["hot_channel"] == 5
    sampled = [
        row["channel"] for row in rows(tmp_path / "run", "channels") if "gate_weights" in row
    ]
    assert sampled == [5]


def test_the_weights_of_the_channels_that_were_hottest_so_far_are_kept(tmp_path: Path) -> None:
    with recording(model := gates(), tmp_path / "run", channels=1) as watching:
        for step, (channel, amax) in enumerate(((3, 2.0), (5, 8.0), (9, 4.0), (2, 3.0), (7, 1.0))):
            model(heat(channel, amax))
            watching.step(step)
    kept: dict[int, list[int]] = {}
    for row in rows(tmp_path / "run", "channels"):
        if "gate_weights" in row:
            kept.setdefault(row["step"], []).append(row["channel"])
    assert kept == {0: [3], 1: [3, 5], 2: [3, 5, 9], 3: [2, 3, 5, 9], 4: [2, 5, 7, 9]}
