"""What `watch` offers beside its rows: bursts, listeners, tensors given by hand, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fp8lab
from fp8lab import GatedFeedForward
from fp8lab.lab.model import LanguageModel, ModelConfig

CONFIG = ModelConfig(dim=16, layers=1, heads=2, context=8)


def train(model: nn.Module, watching: Any, steps: range, bad: tuple[int, ...] = ()) -> None:
    for step in steps:
        loss = model(torch.randn(4, 16, generator=torch.Generator().manual_seed(step))).sum()
        loss.backward()
        watching.step(step, loss=math.inf if step in bad else loss)


# --- bursts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("burst", "full"),
    [(0, [0, 10]), (1, [0, 6, 7, 8, 10]), (3, [0, 4, 5, 6, 7, 8, 9, 10]), (40, list(range(13)))],
)
def test_a_burst_keeps_the_steps_around_an_alarm(
    burst: int, full: list[int], tmp_path: Path
) -> None:
    model = GatedFeedForward(16, 24)
    with fp8lab.watch(model, tmp_path / "run", burst=burst) as watching:
        train(model, watching, range(13), bad=(7,))
    rows = fp8lab.open_run(tmp_path / "run").tensors()
    product = rows[rows["site"] == ".:product"].set_index("step")
    assert product.index.tolist() == list(range(13))  # the sentinel
    assert product.index[product["kurtosis"].notna()].tolist() == full
    gate = rows[rows["site"] == ".:gate"]
    assert gate["step"].tolist() == full
    steps = fp8lab.open_run(tmp_path / "run").steps()
    assert steps["step"].tolist() == list(range(13))


def test_what_led_to_an_error_is_kept_in_full(tmp_path: Path) -> None:
    model = GatedFeedForward(16, 24)
    with (
        pytest.raises(KeyError),
        fp8lab.watch(model, tmp_path / "run", every=100, burst=3) as watching,
    ):
        train(model, watching, range(8))
        raise KeyError("user")
    rows = fp8lab.open_run(tmp_path / "run").tensors()
    assert rows[rows["site"] == ".:up"]["step"].tolist() == [0, 5, 6, 7]


def test_a_step_of_a_burst_has_the_rows_of_a_recorded_step(tmp_path: Path) -> None:
    frames = []
    for name, options in {"all": {"every": 1}, "burst": {"every": 100, "burst": 99}}.items():
        torch.manual_seed(0)
        model = GatedFeedForward(16, 24)
        with fp8lab.watch(model, tmp_path / name, **options) as watching:
            train(model, watching, range(5), bad=(4,))
        frames.append(fp8lab.open_run(tmp_path / name).tensors())
    assert frames[0].equals(frames[1])


# --- selections finer than `every` ------------------------------------------------------------


@pytest.mark.parametrize("burst", [0, 3])
def test_a_selection_may_be_finer_than_every(burst: int, tmp_path: Path) -> None:
    """Two feed-forwards in a run of every 10; one is asked for at steps 3 to 5, its block's stream
    at every second step: the rows are those of a run that records all, at these steps."""
    asked = [
        fp8lab.Selection(
            layers=("layers.1.mlp",), tensors=("product",), freq=1, start_end_list=[(3, 5)]
        ),
        fp8lab.Selection(layers=("layers.0",), tensors=("residual",), freq=2),
    ]
    everything = fp8lab.Selection(layers=("layers.0",), tensors=("residual",))
    frames = {}
    for name, options in {
        "fine": {"every": 10, "burst": burst, "select": asked},
        "all": {"every": 1, "select": [everything]},
    }.items():
        model = LanguageModel(ModelConfig(dim=16, layers=2, heads=2, context=8), seed=0)
        with fp8lab.watch(model, tmp_path / name, **options) as watching:
            for step in range(8):
                tokens = torch.randint(
                    0, 256, (2, 9), generator=torch.Generator().manual_seed(step)
                )
                loss = model.loss(tokens)
                loss.backward()
                watching.step(step, loss=loss)
        run = fp8lab.open_run(tmp_path / name)
        frames[name] = run.tensors(), run.channels()
    fine, channels = frames["fine"]
    whole, all_channels = frames["all"]
    full = fine[fine["kurtosis"].notna()]
    steps = {site: of["step"].tolist() for site, of in full.groupby("site")}
    for role in ("gate", "up", "product", "output"):
        assert steps[f"layers.1.mlp:{role}"] == [0, 3, 4, 5]
        assert steps[f"layers.0.mlp:{role}"] == [0]
    assert steps["layers.0:residual"] == [0, 2, 4, 6]
    columns = ["step", "site", "cur_amax", "kurtosis", "crest", "coincidence"]
    keys = full.set_index(["step", "site"]).index
    theirs = whole.set_index(["step", "site"]).loc[keys].reset_index()
    assert full[columns].reset_index(drop=True).equals(theirs[columns])
    here = channels[channels["step"].isin((3, 4, 5))]
    assert set(here["site"]) == {"layers.1.mlp"}
    there = all_channels[all_channels["step"].isin((3, 4, 5))]
    there = there[there["site"] == "layers.1.mlp"]
    hottest = ["step", "product_amax"]
    assert (
        here.groupby("step")["product_amax"]
        .max()
        .equals(there.groupby("step")["product_amax"].max())
    ), hottest


# --- listeners --------------------------------------------------------------------------------


def test_listeners_get_the_numbers_of_every_recorded_step(tmp_path: Path) -> None:
    model, met = GatedFeedForward(16, 24), {}
    with fp8lab.watch(
        model, tmp_path / "run", every=2, listeners=[lambda s, scalars: met.update({s: scalars})]
    ) as watching:
        train(model, watching, range(5))
    run = fp8lab.open_run(tmp_path / "run")
    rows = run.tensors().set_index(["step", "site"])
    assert sorted(met) == [0, 2, 4]
    for step, scalars in met.items():
        assert scalars["fp8lab/./product/cur_amax"] == rows.loc[step, ".:product"]["cur_amax"]
        assert scalars["fp8lab/./up/std"] == rows.loc[step, ".:up"]["std"]
        assert scalars["fp8lab/loss"] == run.steps()["loss"][step]
        channels = run.channels()
        hottest = channels[channels["step"] == step].nlargest(1, "product_amax").iloc[0]
        assert scalars["fp8lab/./alignment"] == hottest["alignment"]


def test_a_listener_that_fails_is_dropped_and_the_training_goes_on(tmp_path: Path) -> None:
    def failing(step: int, scalars: dict[str, float]) -> None:
        raise OSError("no route to the dashboard")

    model, met = GatedFeedForward(16, 24), []
    listeners = [failing, lambda step, scalars: met.append(step)]
    with fp8lab.watch(model, tmp_path / "run", every=1, listeners=listeners) as watching:
        with pytest.warns(UserWarning, match="a listener failed .*no route to the dashboard"):
            train(model, watching, range(1))
        train(model, watching, range(1, 4))
    assert met == [0, 1, 2, 3]


# --- by hand, and what goes wrong ---------------------------------------------------------------


def test_a_tensor_given_by_hand_is_a_row(tmp_path: Path) -> None:
    model = GatedFeedForward(16, 24)
    with fp8lab.watch(model, tmp_path / "run", every=2) as watching:
        for step in range(3):
            tensor = torch.full((3, 5), float(step + 1))
            if watching.is_due:
                watching.see("router:logits", tensor)
            train(model, watching, range(step, step + 1))
    rows = fp8lab.open_run(tmp_path / "run").tensors()
    rows = rows[rows["site"] == "router:logits"]
    assert rows[["step", "count", "cur_amax"]].values.tolist() == [[0, 15, 1.0], [2, 15, 3.0]]


class Changed(GatedFeedForward):
    """Computes something else while it trains than what the probe saw."""

    def product(self, x: Tensor) -> Tensor:
        product = super().product(x)
        return product * 2.0 if self.training else product


def test_a_wrong_site_is_refused_and_the_others_are_recorded(tmp_path: Path) -> None:
    model = nn.Sequential(GatedFeedForward(16, 24), Changed(16, 24))
    with fp8lab.watch(model, tmp_path / "run", every=1) as watching:
        with pytest.warns(UserWarning, match=r"1: not recorded: .*product"):
            train(model, watching, range(1))
        train(model, watching, range(1, 3))
    run = fp8lab.open_run(tmp_path / "run")
    assert run.events()[["kind", "site", "step"]].values.tolist() == [["not_recorded", "1", 0]]
    assert set(run.tensors()["site"].str.partition(":")[0]) == {"0"}
    assert len(run.tensors()) == 3 * 4


def test_what_cannot_be_measured_ends_no_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def out_of_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    model = GatedFeedForward(16, 24)
    with fp8lab.watch(model, tmp_path / "run", every=1) as watching:
        train(model, watching, range(1))
        with monkeypatch.context() as patch, pytest.warns(UserWarning, match="no room") as seen:
            patch.setattr("fp8lab.monitor.measure.summary", out_of_memory)
            train(model, watching, range(1, 4))
    assert len(seen) == 1
    run = fp8lab.open_run(tmp_path / "run")
    assert run.steps()["step"].tolist() == [0, 1, 2, 3]
    assert run.events()["kind"].tolist() == ["not_recorded"]


def test_a_plain_feed_forward_is_watched_and_said_to_be_ungated(tmp_path: Path) -> None:
    model = fp8lab.FeedForward(16, 24, activation="relu_squared")
    with fp8lab.watch(model, tmp_path / "run", every=1) as watching:
        train(model, watching, range(2))
    run = fp8lab.open_run(tmp_path / "run")
    (site,) = run.info["sites"]
    assert (site["site"], site["gated"], site["activation"]) == (".", False, "relu_squared")
    assert sorted(run.tensors()["site"].unique()) == [".:output", ".:product", ".:up"]
    assert run.tensors()["amplification"].isna().all()


def test_a_feed_forward_that_no_hook_sees_is_said(tmp_path: Path) -> None:
    model = nn.ModuleList([GatedFeedForward(16, 24), GatedFeedForward(16, 24)])
    with fp8lab.watch(model, tmp_path / "run", every=1) as watching:
        train(model[0], watching, range(3))
    events = fp8lab.open_run(tmp_path / "run").events()
    assert events[["kind", "site", "step"]].values.tolist() == [["not_seen", "1", 0]]


# --- steps in another order than time's -------------------------------------------------------


def told_of(path: Path) -> list[list[Any]]:
    return list(fp8lab.open_run(path).events()[["step", "kind", "detail"]].values.tolist())


def test_a_step_that_was_told_before_is_loud(tmp_path: Path) -> None:
    """As of each micro-batch, or of each epoch anew: nothing is lost, and nothing ends."""
    model, path = GatedFeedForward(16, 24), tmp_path / "run"
    with fp8lab.watch(model, path, every=1) as watching, pytest.warns(UserWarning) as seen:
        for step in (0, 0, 1, 1, 2, 0, 1, 0):
            train(model, watching, range(step, step + 1))
    twice = "rows of one step now stand twice"
    assert told_of(path) == [
        [0, "repeated", f"watch.step: step 0 after step 0: {twice}"],
        [0, "rewound", f"watch.step: step 0 after step 2: {twice}"],
        [0, "rewound", f"watch.step: step 0 after step 1: {twice}"],
    ]
    again, back = (str(one.message).partition(": ")[2] for one in seen)
    assert again == f"watch.step: step 0 after step 0: {twice}, expected a later one"
    assert back == (
        f"watch.step: step 0 after step 2: {twice}, expected a later one; to go back, leave this "
        "watch and begin watch(..., resume_at=0)"
    )
    assert fp8lab.open_run(path).steps()["step"].tolist() == [0, 0, 0, 0, 1, 1, 1, 2]
    first, second, *_ = fp8lab.replay(path, fp8lab.DelayedScaling()).notes
    taken = "the last of each are taken, the others are not"
    assert first == second == f"from step 0 on rows of one step stand twice: {taken}"


@pytest.mark.parametrize(
    ("resume_at", "told"),
    [
        (4, "at step 4 after step 3"),
        (2, "at step 2 after step 3: the rows from step 2 on gave way"),
        (9, "at step 9 after step 3: of those between nothing is recorded"),
    ],
)
def test_a_resumed_run_says_so(resume_at: int, told: str, tmp_path: Path) -> None:
    model, path = GatedFeedForward(16, 24), tmp_path / "run"
    with fp8lab.watch(model, path, every=1) as watching:
        train(model, watching, range(4))
    with fp8lab.watch(model, path, every=1, resume_at=resume_at) as watching:
        train(model, watching, range(resume_at, resume_at + 2))
    assert told_of(path) == [[resume_at, "resumed", told]]
    page = fp8lab.write_report([path], tmp_path / "page.md").read_text(encoding="utf-8")
    assert f"0 to {resume_at + 1}; resumed: {told}" in page
    notes = " ".join(fp8lab.replay(path, fp8lab.DelayedScaling()).notes)
    assert ("before step 9 steps are missing, and amaxes" in notes) == (resume_at == 9)


def test_a_step_before_that_of_the_resume_is_loud(tmp_path: Path) -> None:
    model, path = GatedFeedForward(16, 24), tmp_path / "run"
    fp8lab.watch(model, path).__exit__(None, None, None)
    with fp8lab.watch(model, path, resume_at=5) as watching, pytest.warns(UserWarning):
        train(model, watching, range(3, 6))
    assert [kind for _, kind, _ in told_of(path)] == ["rewound", "resumed"]
    assert told_of(path)[0][2] == "watch.step: step 3 in a run that goes on at step 5"
    assert told_of(path)[1][2] == "at step 5, the first"


def test_a_step_after_the_end_and_a_loss_that_is_none_are_told(tmp_path: Path) -> None:
    with fp8lab.watch(GatedFeedForward(16, 24), tmp_path / "run") as watching:
        watching.step(0, loss=1.0)
        with pytest.raises(ValueError, match=r"^watch.step: loss 'high', expected a number$"):
            watching.step(1, loss="high")  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"step 1 after the end is not recorded$"):
        watching.step(1, loss=1.0)
    assert fp8lab.open_run(tmp_path / "run").steps()["step"].tolist() == [0]


def test_a_model_that_is_converted_while_it_is_watched_is_told(tmp_path: Path) -> None:
    """What rows say before it and after it is of two models."""
    model, path = nn.Sequential(GatedFeedForward(16, 24)), tmp_path / "run"
    with pytest.warns(UserWarning) as said, fp8lab.watch(model, path, every=1) as watching:
        train(model, watching, range(3))
        model[0].gate.__class__ = type("Named", (nn.Linear,), {})  # casts as it did
        train(model, watching, range(3, 4))
        model[0].gate.__class__ = nn.Linear
        fp8lab.convert(model, fp8lab.DelayedScaling())
        train(model, watching, range(4, 6))
    detail = "by step 4, input@output was not converted and is E4M3 DelayedScaling; "
    detail += "so 6 of 6 operands; 3 layers in all"
    assert told_of(path) == [[4, "converted", detail]]
    (line,) = [str(one.message) for one in said]
    assert line == f"{path}: 0.gate: converted while it is watched, expected before: {detail}"
    assert fp8lab.diagnose(path).not_as_told == (f"converted: 0.gate: {detail}",)
    page = fp8lab.write_report([path], tmp_path / "page.md").read_text(encoding="utf-8")
    assert "; converted: 0.gate: by step 4" in page
    notes = fp8lab.replay(path, fp8lab.DelayedScaling()).notes
    assert "from step 4 on rows are of layers that cast otherwise than before" in notes
    info = fp8lab.open_run(path).info
    assert info["precision"]["0.down"]["input@output"] == "E4M3 DelayedScaling"
    rows = fp8lab.open_run(path).tensors("recipe", sites="0:product")
    assert rows["recipe"].fillna("").tolist() == [*[""] * 4, *["DelayedScaling"] * 2]


def test_layers_whose_casts_go_while_they_are_watched_are_an_event(tmp_path: Path) -> None:
    """And no warning: a training may end in high precision on purpose."""
    model, path = nn.Sequential(GatedFeedForward(16, 24)), tmp_path / "run"
    fp8lab.convert(model, fp8lab.Float8CurrentScaling(), include=("*.up", "*.down"))
    with fp8lab.watch(model, path, every=1) as watching:
        train(model, watching, range(2))
        model[0].up.__class__ = model[0].down.__class__ = nn.Linear
        model.append(nn.Linear(16, 16))  # what was never there was never converted either
        train(model, watching, range(2, 3))
    detail = "by step 2, input@output was E4M3 Float8CurrentScaling and is not converted; "
    detail += "so 6 of 6 operands; 2 layers in all"
    assert told_of(path) == [[2, "unconverted", detail]]
    assert fp8lab.diagnose(path).not_as_told == (f"unconverted: 0.up: {detail}",)
    notes = fp8lab.replay(path, fp8lab.DelayedScaling()).notes
    assert "from step 2 on rows are of layers that cast otherwise than before" in notes


# --- torch.compile ------------------------------------------------------------------------------


# Dynamo looks at .grad of whatever it resumes with after a break of the graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("way", ["compiled before", "compiled after", "module.compile()"])
def test_a_compiled_model_is_watched(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = LanguageModel(CONFIG, seed=0)
    tokens = torch.randint(0, 256, (2, 8))

    def rows(model: nn.Module, path: Path, called: nn.Module) -> Any:
        with fp8lab.watch(model, path, every=1) as watching:
            for step in range(3):
                called(tokens).square().mean().backward()
                watching.step(step)
        return fp8lab.open_run(path).tensors().set_index(["step", "site"])

    expected = rows(plain, tmp_path / "eager", plain)
    model = LanguageModel(CONFIG, seed=0)
    called: Any = torch.compile(model, backend="aot_eager")
    if way == "module.compile()":
        model.compile(backend="aot_eager")
        called = model
    if way != "compiled after":
        called(tokens)
    found = rows(called, tmp_path / "compiled", called)
    assert found.index.tolist() == expected.index.tolist()
    for column in ("count", "zeros"):
        assert found[column].tolist() == expected[column].tolist()
    for column in ("cur_amax", "l2_norm", "crest"):
        assert found[column].tolist() == pytest.approx(expected[column].tolist(), rel=1e-5)
    assert torch.isfinite(called(tokens)).all()  # compiles anew, without hooks
    assert not any(module._forward_hooks for module in model.modules())
