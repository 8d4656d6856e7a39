"""The report: what it says equals what was recorded, and it is written whatever was recorded.

The runs are real and tiny: one SwiGLU layer under `fp8lab.watch`, a loud batch every 17 steps that
a delayed scale was not made for, and in one arm a learning rate that ends it. What a page says is
held against run.json and against `diagnose`; what a picture shows against the rows it was drawn
from, read off the figure's own lines. How a page looks has to be looked at: no test here does it.
"""

import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest
import torch
from torch import nn

import fp8lab
from fp8lab.report import drawing, pictures, write_pictures, write_report
from fp8lab.report.story import Story, load
from fp8lab.report.tables import dose_numbers, number, outcomes, precision
from fp8lab.report.verdict import contradictions, sightings, unfinished, verdicts
from fp8lab.store import RunError, RunWriter, open_run

PICTURED = "loss timeline heat channels weights layers range twin dose".split()
SECTIONS = ["verdict", "outcomes", *PICTURED, *"whatif findings limits words provenance".split()]
DOSES = (0, 16)


class Model(nn.Module):
    """One gated feed-forward, under a name of choice."""

    def __init__(self, name: str = "mlp") -> None:
        super().__init__()
        self.name = name
        self.add_module(name, fp8lab.GatedFeedForward(16, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = getattr(self, self.name)(x)
        return x + y


def record(
    path: Path,
    *,
    steps: int,
    recipe: Any = None,
    name: str = "mlp",
    learning_rate: float = 0.1,
    loss_is: float | None = None,
    config: Mapping[str, Any] | None = None,
    result: Mapping[str, Any] | None = None,
    doses: bool = False,
) -> Path:
    torch.manual_seed(0)
    model = Model(name)
    if recipe is not None:
        fp8lab.convert(model, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    with fp8lab.watch(model, path, optimizer=optimizer, every=4, config=config) as watching:
        for step in range(steps):
            x = torch.randn(32, 16) * (2.5 if step % 17 == 16 else 1.0)
            loss = (model(x) - 3.0 * x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            value = float(loss.detach()) if loss_is is None else loss_is
            more = {"dose": DOSES[step * 2 // steps]} if doses else {"common_loss": value / 2.0}
            watching.step(step, loss=value, **more)
        if result is not None:
            watching.set_result(**result)
    return path


DELAYED = fp8lab.DelayedScaling(amax_history_len=4)
CURRENT = fp8lab.Float8CurrentScaling()
HIGH = fp8lab.HighPrecision()
LIMIT = "It shows nothing about <large> models."


def describe(name: str, recipe: Any, predicted: str) -> dict[str, Any]:
    # One as arms are described now, one as older runs have it.
    mitigations = [{"name": "ClampedSwiGLU", "limit": 7.0}, "QKClip"] if name == "high" else []
    arm = {"name": name, "title": f"the {name} arm", "predicted": predicted}
    return arm | {"mitigations": mitigations}


def record_experiment(folder: Path) -> Path:
    """Two arms in two seeds and one planned seed that never ran; a dose response in two arms."""
    arms = {"high": (HIGH, "diverges", None), "delayed": (DELAYED, "survives", 47)}
    for arm, (recipe, _, diverged) in arms.items():
        for seed in (0, 1):
            config = {"experiment": "tiny", "part": "train", "arm": arm, "seed": seed}
            record(
                folder / "train" / arm / f"seed-{seed}",
                steps=48,
                recipe=recipe,
                learning_rate=1.0 if arm == "delayed" else 0.05,
                config=config | {"mitigations": []},
                result={"diverged_at": diverged, "final_loss": None if diverged else 0.25 + seed},
            )
    for arm, recipe in {"high": HIGH, "current": CURRENT}.items():
        doses = [{"dose": d, "loss": 1.0 + d, "gradient_cosine": 1.0 - d / 32} for d in DOSES]
        record(
            folder / "dose" / arm / "seed-0",
            steps=8,
            recipe=recipe,
            config={"experiment": "tiny", "part": "dose", "arm": arm, "seed": 0},
            result={"doses": doses, "diverged_at": None, "final_loss": 17.0},
            doses=True,
        )
    described = {
        "name": "tiny",
        "question": "Does the product break?",
        "prediction": "High precision diverges & FP8 does not.",
        "refuted_if": "it is the other way round",
        "limits": [LIMIT],
        "parts": [
            {
                "name": "train",
                "title": "A training",
                "seeds": [0, 1, 2],
                "arms": [describe(arm, how[0], how[1]) for arm, how in arms.items()],
            },
            {
                "name": "dose",
                "title": "A dose response",
                "seeds": [0],
                "arms": [describe("high", HIGH, "open"), describe("current", CURRENT, "open")],
            },
        ],
    }
    (folder / "experiment.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record_experiment(tmp_path_factory.mktemp("experiment"))


@pytest.fixture(scope="module")
def page(experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "deep" / "report.html"
    assert write_report([experiment], path) == path
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def story(experiment: Path) -> Story:
    return load([experiment])


def text_of(page: str) -> str:
    """The words of a page, its mark-up and white space reduced to single spaces."""
    words = re.sub(r"<style.*?</style>|<[^>]*>", " ", without_scripts(page), flags=re.S)
    return " ".join(html.unescape(words).split())


def without_scripts(page: str) -> str:
    """What is read and printed; the scripts have tests in a browser."""
    return re.sub(r"<script.*?</script>", " ", page, flags=re.S)


def images(page: str) -> list[tuple[str, bytes]]:
    """Alternative text and SVG of every picture."""
    found = re.findall(r"<img src='data:image/svg\+xml,([^'<>&#]+)' alt=\"([^\"]*)\"", page)
    assert len(found) == page.count("<img")
    return [(alt, unquote_to_bytes(data)) for data, alt in found]


# --- the page -------------------------------------------------------------------------------------


def test_sections_in_order(page: str) -> None:
    assert re.findall(r'<section id="([a-z]+)"', page) == SECTIONS
    assert re.findall(r'<a href="#([a-z]+)"', page) == SECTIONS[1:]
    assert "Not shown" not in page


def test_every_picture_is_there_and_well_formed(page: str) -> None:
    for one in PICTURED:
        section = page.split(f'<section id="{one}"')[1].split("</section>")[0]
        assert len(images(section)) == 1, one
    for alt, svg in images(page):
        assert alt
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"


def test_nothing_is_loaded_from_anywhere(page: str) -> None:
    page = without_scripts(page)
    for _, svg in images(page):
        assert re.findall(rb'href="(?!#|data:image/png;base64,)', svg) == []
    page = re.sub(r"src='data:[^']*'", 'src="data:"', page)
    assert "://" not in page
    assert all(
        link.startswith(("#", "data:")) for link in re.findall(r'(?:src|href)="(.{5})', page)
    )
    assert not re.search(r"<script|<link|<iframe|@import|url\(|\son\w+=", page)


def test_nothing_of_the_machine_is_told(page: str, experiment: Path) -> None:
    assert str(experiment) not in page
    assert str(experiment.parent.name) not in page


@pytest.mark.long
def test_same_runs_same_bytes_and_no_torch(page: str, experiment: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from fp8lab.report import write_report\n"
        "lazy = {'torch', 'pandas', 'matplotlib', 'seaborn', 'jinja2'} & set(sys.modules)\n"
        "write_report([sys.argv[1]], sys.argv[2]); print(sorted(lazy), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(experiment), str(tmp_path / "again.html")],
        env=os.environ | {"PYTHONHASHSEED": "7", "MPLBACKEND": "agg"},
        cwd=Path(fp8lab.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("[] False\n", "")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_a_page_replaces_the_one_before_or_leaves_it(tmp_path: Path) -> None:
    run = record(tmp_path / "run", steps=0)
    old = tmp_path / "report.html"
    old.write_text("<!doctype html>old")
    with pytest.raises(RunError, match=r"^.*nowhere: no run here"):
        write_report([tmp_path / "nowhere"], old)
    assert old.read_text() == "<!doctype html>old"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_report([run], tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "report.html", "run"]
    assert "no step recorded" in write_report([run], old).read_text(encoding="utf-8")


def test_a_single_path_is_a_mistake(experiment: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="expected a list of paths"):
        write_report(str(experiment), tmp_path / "report.html")


def test_pictures_for_a_readme(experiment: Path, tmp_path: Path) -> None:
    written = write_pictures([experiment], tmp_path / "pictures")
    assert [path.name for path in written] == ["losses.png", "timeline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


# --- what it says ---------------------------------------------------------------------------------


def test_the_experiment_is_told_first(page: str) -> None:
    text = text_of(page)
    head = text.split("How every run ended")[0]
    for words in (
        "Is it FP8? Yes confidence high Delayed saturation at mlp:product",
        "Does the product break?",
        "4 training runs, 2 diverged; 2 dose-response runs.",
        "High precision diverges & FP8 does not.",
        "it is the other way round",
        "2 contradictions",
        "the high arm (train) was predicted to diverge, and 2 of 2 runs survived (seed 0, 1)",
        "the delayed arm (train) was predicted to survive, and 2 of 2 runs diverged (seed 0, 1)",
        "2 planned and not here",
    ):
        assert words in head, words
    assert head.index("Against the prediction") < head.index(
        "Delayed saturation severity high confidence high at mlp:product ,"
    )
    assert LIMIT in text


def test_cells_are_the_results(page: str) -> None:
    outcomes = page.split('<section id="outcomes"')[1].split("</section>")[0]
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</tr>", outcomes, flags=re.S)
    cells = [text_of("<i>" + row) for row in rows]
    assert cells[0] == "the high arm 0.25 1.25 –"
    assert cells[1] == "the delayed arm diverged at 47 diverged at 47 –"
    high = "the high arm ClampedSwiGLU, QKClip – 0 of 2 0.75 – – Corrupt batch, low: 2 of 2"
    assert cells[2] == high


def test_doses_are_the_results(page: str) -> None:
    text = text_of(page)
    assert "arm 2⁰ 2¹⁶ the high arm 1.0000 17.0000 the current arm 1.0000 17.0000" in text
    assert "the high arm 1.0000 0.5000" in text


def test_doses_are_means_over_seeds(experiment: Path, tmp_path: Path) -> None:
    for seed, loss in enumerate((1.0, 4.0, 4.0)):
        run = shutil.copytree(experiment / "dose" / "high" / "seed-0", tmp_path / str(seed))
        info = json.loads((run / "run.json").read_text())
        info["result"]["doses"] = [{"dose": 3, "loss": loss, "gradient_cosine": 1.0}]
        (run / "run.json").write_text(json.dumps(info))
    (part,) = load([tmp_path]).parts
    assert dose_numbers(part, "loss", "").rows == [(("high", ""), ("3.0000", ""))]


def test_layers_numbered_alike_share_a_line(experiment: Path) -> None:
    arm = load([experiment]).parts[0].arms[1]
    name = arm.runs[0].run.info["precision"]
    name = {layer: dict(casts) for layer, casts in name.items()}
    for casts in name.values():
        casts["input@grad_weight"] = "BF16 HighPrecision"
    arm.runs[0].run.info["precision"] = name
    arm.runs[1].run.info["precision"] = {f"blocks.{i}.up": name["mlp.up"] for i in (0, 1, 10)}
    (row,) = precision(arm, "").rows
    assert row[0].text == "mlp.gate, mlp.up, mlp.down, blocks.*.up (3)"
    assert [cell.text for cell in row[1:]] == [
        "E4M3 × E4M3 DelayedScaling",
        "E5M2 × E4M3 DelayedScaling",
        "E5M2 DelayedScaling × BF16 HighPrecision",
    ]
    # A run of fp8lab 0.1 knows its operands alone.
    old = {"input": "E4M3 A", "weight": "BF16 B", "grad_output": "E5M2 A"}
    for run in arm.runs:
        run.run.info["precision"] = {"up": old}
    (row,) = precision(arm, "").rows
    assert [cell.text for cell in row[1:]] == [
        "E4M3 A × BF16 B",
        "E5M2 A × BF16 B",
        "E5M2 × E4M3 A",
    ]


def test_every_finding_is_told_with_its_evidence(page: str, story: Story, experiment: Path) -> None:
    text, told = text_of(page), 0
    for run in story.runs:
        twin = story.twin_of(run)
        expected = fp8lab.diagnose(run.run.path, None if twin is None else twin.run)
        assert run.diagnosis.findings == expected.findings
        for finding in expected.findings:
            assert f"{finding.summary[0].upper()}{finding.summary[1:]}." in text
            assert finding.remedy in text
            for evidence in finding.evidence:
                row = f"{evidence.step} {evidence.quantity} {number(evidence.value)}"
                assert f"{row} {number(evidence.threshold)} {evidence.source or '–'}" in text
            told += 1
    assert told >= 2
    assert page.count('<article class="finding') == told


def test_a_cause_is_told_once(story: Story) -> None:
    found = [s for s in sightings(story) if s.finding.cause == "delayed_saturation"]
    (one,) = [verdict for verdict in verdicts(story) if verdict.cause == "Delayed saturation"]
    worst = [s for s in found if s.finding.severity == one.severity]
    assert one.sites == ("mlp:product",)
    assert one.arms == (("2 of 2 runs of", "the delayed arm (train)"),)
    since = {s.finding.since for s in worst}
    assert one.since == f"step {min(since)}" and len(since) == 1
    leads = {s.run.diagnosis.loss_alarm - s.finding.since for s in worst}
    assert one.lead == f"{leads.pop()} steps before the loss's own alarm" and not leads


def test_the_twin_is_the_same_seed_in_high_precision(story: Story) -> None:
    twins = {
        run.label: twin and twin.label for run in story.runs if (twin := story.twin_of(run)) or 1
    }
    assert twins == {
        "train/high/seed-0": None,
        "train/high/seed-1": None,
        "train/delayed/seed-0": "train/high/seed-0",
        "train/delayed/seed-1": "train/high/seed-1",
        "dose/high/seed-0": None,
        "dose/current/seed-0": "dose/high/seed-0",
    }


def test_a_twin_that_differs_in_more_is_none(experiment: Path, tmp_path: Path) -> None:
    shutil.copytree(experiment, tmp_path / "copy")
    file = tmp_path / "copy" / "train" / "high" / "seed-0" / "run.json"
    info = json.loads(file.read_text())
    info["config"]["learning_rate"] = 1.0
    file.write_text(json.dumps(info))
    story = load([tmp_path / "copy"])
    labels = {run.label: story.twin_of(run) for run in story.runs}
    assert labels["train/delayed/seed-0"] is None
    assert labels["train/delayed/seed-1"] is not None


def test_an_open_prediction_cannot_be_contradicted(story: Story) -> None:
    assert [len(contradictions(part)) for part in story.parts] == [2, 0]


# --- whatever was recorded ------------------------------------------------------------------------


def test_names_are_text(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>$x_2^$\N{CJK UNIFIED IDEOGRAPH-4E2D}"
    run = record(tmp_path / "<b>run$</b>".replace("/", "-"), steps=20, recipe=DELAYED, name=name)
    page = write_report([run], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and "<b>run" not in page
    assert html.escape(f"{name}:product") in page
    assert "the dose response: no dose-response run is here" in text_of(page)
    layers = next(svg for alt, svg in images(page) if "every layer" in alt)
    assert "$x_2^$" in layers.decode()  # matplotlib names the text that it draws, in a comment


def test_a_healthy_run(tmp_path: Path) -> None:
    run = record(tmp_path / "healthy", steps=12, recipe=CURRENT)
    text = text_of(write_report([run], tmp_path / "report.html").read_text(encoding="utf-8"))
    loss = float(open_run(run).steps()["loss"].iloc[-1])
    assert "1 training run, none diverged. Nothing found." in text
    assert f"healthy {number(loss)} finished 0 to 11" in text
    assert "mlp.gate, mlp.up, mlp.down E4M3 × E4M3 Float8CurrentScaling E5M2 × E4M3" in text


def test_a_run_of_several_processes(tmp_path: Path) -> None:
    """A row a step and site, of the process where the product is largest; all channels."""
    steps = range(4)
    for rank in (0, 1):
        writer = RunWriter.create(tmp_path / "run", {"job": "one"}, rank=rank)
        product = {"site": "mlp:product", "channel_ratio": 2.0, "hot_channel": 4 * rank}
        for step in steps:
            row = {"step": step, "cur_amax": 1.0 + (step % 2 == rank)} | product
            both = {"step": step, "rank": -1, "site": "mlp:product", "cur_amax": 2.0}
            writer.append("tensors", [both, row] if rank == 0 else [row])
            channels = [{"step": step, "site": "mlp", "channel": c} for c in (4 * rank, 9)]
            writer.append("channels", channels)
            writer.append("steps", [{"step": step, "loss": 1.0 + rank}])
        writer.close()
    (run,) = load([tmp_path / "run"]).runs
    assert run.products[["step", "hot_channel"]].to_numpy().tolist() == [
        [step, 4 * (step % 2)] for step in steps
    ]
    assert run.steps["loss"].tolist() == [1.0] * len(steps)
    assert sorted(run.channels["channel"]) == sorted([0, 4, 9] * len(steps))
    assert write_report([tmp_path / "run"], tmp_path / "report.html").exists()


@pytest.mark.parametrize("steps", [0, 1])
def test_almost_no_run(tmp_path: Path, steps: int) -> None:
    run = record(tmp_path / "short", steps=steps, recipe=DELAYED)
    page = write_report([run], tmp_path / "report.html").read_text(encoding="utf-8")
    if steps:
        assert len(images(page)) >= 3
    else:
        assert images(page) == []
        assert "finished, no step recorded" in text_of(page)
        missing = page.split('<section id="missing"')[1].split("</section>")[0]
        assert missing.count('class="missing"') == 11


def test_a_run_without_a_finite_loss(tmp_path: Path) -> None:
    run = record(tmp_path / "nan", steps=12, recipe=DELAYED, loss_is=math.nan)
    page = write_report([run], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "1 training run, 1 diverged." in text_of(page)
    assert "Loss and gradient norm: Runs: no finite loss was recorded." in text_of(page)


@pytest.mark.parametrize(
    ("pid", "state"),
    [(os.getpid(), "running"), (2**22 + 1, "killed")],
    ids=["running", "killed"],
)
def test_a_run_that_is_not_finished(tmp_path: Path, pid: int, state: str) -> None:
    run = record(tmp_path / "part", steps=12)
    info = json.loads((run / "run.json").read_text()) | {"state": "running", "pid": pid}
    (run / "run.json").write_text(json.dumps(info))
    story = load([run])
    assert unfinished(story) == f"Runs that are not finished: 1 {state}."
    assert outcomes(story.parts[0]).rows[0][1] == (f"{state} at step 11", "warn")
    with drawing.style():
        figure = pictures.losses(story.parts[0])
        assert not isinstance(figure, str)
    assert [line.get_color() for line in figure.axes[0].lines] == [drawing.ORANGE]


def test_doses_whose_steps_are_lost_are_drawn_all_the_same(
    experiment: Path, tmp_path: Path
) -> None:
    """What the casts did cannot be laid beside a dose then; the losses are in run.json."""
    shutil.copytree(experiment, tmp_path / "out")
    for steps in (tmp_path / "out" / "dose").rglob("steps.parquet"):
        steps.unlink()
    page = write_report([tmp_path / "out"], tmp_path / "page.html")
    assert page.stat().st_size > 100_000


@pytest.mark.parametrize("file", ["run.json", "tensors.parquet", "channels.parquet"])
def test_a_damaged_run_is_named_and_left_out(tmp_path: Path, file: str) -> None:
    record(tmp_path / "runs" / "good", steps=4, recipe=DELAYED)
    bad = record(tmp_path / "runs" / "bad", steps=4, recipe=DELAYED) / file
    bad.write_bytes(bad.read_bytes()[:60])
    story = load([tmp_path / "runs"])
    assert [run.label for run in story.runs] == ["good"]
    (unread,) = story.unread
    assert unread.label == "bad"
    assert unread.reason.startswith(f"{file}: damaged")
    assert str(tmp_path) not in unread.reason


@pytest.mark.parametrize("content", ["{", '{"name": "x"}', "[]"])
def test_a_damaged_experiment_costs_only_itself(tmp_path: Path, content: str) -> None:
    record(tmp_path / "runs" / "good", steps=2, config={"arm": "mine", "seed": 3})
    (tmp_path / "runs" / "experiment.json").write_text(content)
    page = write_report([tmp_path / "runs"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Could not be read, and left out: experiment.json : damaged" in text_of(page)
    assert "arm seed 3 mine" in text_of(page)


def test_an_experiment_of_which_nothing_ran(experiment: Path, tmp_path: Path) -> None:
    shutil.copy(experiment / "experiment.json", tmp_path / "experiment.json")
    text = text_of(write_report([tmp_path], tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "0 training runs, none diverged. Nothing found." in text
    assert "8 planned and not here" in text


def test_a_run_given_twice_is_read_once(experiment: Path) -> None:
    again = experiment / "dose" / ".." / "train" / "high" / "seed-0"
    runs = load([experiment / "train", again]).runs
    assert [run.label for run in runs] == [
        f"{arm}/seed-{seed}" for arm in ("delayed", "high") for seed in (0, 1)
    ]
