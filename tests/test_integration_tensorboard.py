"""What the writer wrote, read back from the event files by TensorBoard's own reader."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from fp8lab.integrations.headlines import HEADLINES
from fp8lab.integrations.tensorboard import Writer

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
    scalars = {f"{SITE}/{name}": 0.5 for name in (*HEADLINES, "std", "mse")}
    with SummaryWriter(str(tmp_path)) as summary_writer:
        Writer(summary_writer, statistics=["mse", "std"])(0, scalars)
    assert curves(tmp_path).keys() == {f"{SITE}/mse", f"{SITE}/std"}


def test_a_statistic_that_no_row_has_is_refused(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as summary_writer:
        with pytest.raises(ValueError, match="'amax', expected a column"):
            Writer(summary_writer, statistics=["amax", "cur_amax"])
        with pytest.raises(ValueError, match="'cur_amax', expected a collection"):
            Writer(summary_writer, statistics="cur_amax")


def test_without_the_library_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.delitem(sys.modules, "fp8lab.integrations.tensorboard")
    with pytest.raises(ImportError, match=r"pip install 'fp8lab\[tensorboard\]'$"):
        import fp8lab.integrations.tensorboard  # noqa: F401
