"""What the writer wrote, read back from the event files by TensorBoard's own reader."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import fp8lab
from fp8lab.integrations.headlines import HEADLINES
from fp8lab.integrations.tensorboard import Writer
from fp8lab.lab.model import LanguageModel, ModelConfig

SITE = "fp8lab/layers.3.mlp/product"


def curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(path))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def test_the_headlines_and_what_belongs_to_no_site(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as summary_writer:
        writer = Writer(summary_writer)
        writer(7, {"fp8lab/loss": 5.5, f"{SITE}/cur_amax": 448.0, f"{SITE}/std": 1.5})
        writer(17, {"fp8lab/loss": 5.25, f"{SITE}/staleness": 2.5, "fp8lab/of_mine": -1.0})
        summary_writer.add_scalar("train/loss", 5.5, 7)
    assert curves(tmp_path) == {
        "fp8lab/loss": [(7, 5.5), (17, 5.25)],
        "fp8lab/of_mine": [(17, -1.0)],
        f"{SITE}/cur_amax": [(7, 448.0)],
        f"{SITE}/staleness": [(17, 2.5)],
        "train/loss": [(7, 5.5)],
    }


def test_statistics_of_ones_own_choice(tmp_path: Path) -> None:
    scalars = {f"{SITE}/{name}": 0.5 for name in (*HEADLINES, "std", "mxfp8_underflows%")}
    with SummaryWriter(str(tmp_path)) as summary_writer:
        Writer(summary_writer, statistics=["mxfp8_underflows%", "std"])(0, scalars)
    assert curves(tmp_path).keys() == {f"{SITE}/mxfp8_underflows%", f"{SITE}/std"}


def test_a_statistic_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as summary_writer:
        with pytest.raises(ValueError, match="'amax' is not one, expected"):
            Writer(summary_writer, statistics=["amax", "cur_amax"])
        with pytest.raises(ValueError, match="'cur_amax', expected a collection"):
            Writer(summary_writer, statistics="cur_amax")


def test_through_a_real_watch(tmp_path: Path) -> None:
    model = LanguageModel(ModelConfig(dim=16, layers=1, heads=2, context=8), seed=0)
    fp8lab.convert(model, fp8lab.DelayedScaling())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    with SummaryWriter(str(tmp_path / "board")) as summary_writer:
        writer = Writer(summary_writer)
        with fp8lab.watch(
            model, tmp_path / "run", optimizer=optimizer, every=2, listeners=[writer]
        ) as watch:
            for step in range(4):
                optimizer.zero_grad()
                loss = model.loss(torch.randint(0, 256, (2, 9)))
                loss.backward()
                optimizer.step()
                watch.step(step, loss=loss, accuracy=0.5)
                losses.append(loss.item())
    found = curves(tmp_path / "board")
    run = fp8lab.open_run(tmp_path / "run")
    product = run.tensors().query("site == 'layers.0.mlp:product'").set_index("step")
    assert found["fp8lab/loss"] == [(0, losses[0]), (2, losses[2])]
    assert found["fp8lab/accuracy"] == [(0, 0.5), (2, 0.5)]
    for name in ("cur_amax", "saturated", "flushed", "staleness", "bulk_error", "kurtosis"):
        expected = [(step, float(np.float32(product.loc[step, name]))) for step in (0, 2)]
        assert found[f"fp8lab/layers.0.mlp/product/{name}"] == expected, name
    assert "fp8lab/layers.0.mlp/alignment" in found
    assert "fp8lab/layers.0.mlp/product/std" not in found


def test_without_the_library_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.delitem(sys.modules, "fp8lab.integrations.tensorboard")
    with pytest.raises(ImportError, match=r"pip install 'fp8lab\[tensorboard\]'$"):
        import fp8lab.integrations.tensorboard  # noqa: F401
