"""What the report answers, foresees and prices, and what it says of all that is missing."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rows_by_hand import Row, write
from test_report import CURRENT, DELAYED, HIGH, record, record_experiment

import fp8lab
from fp8lab.comparison import side_by_side
from fp8lab.diagnosis import OF_PRECISION
from fp8lab.lab.experiment import Settings, load_experiment, run_experiment
from fp8lab.record import Evidence, Finding, Severity
from fp8lab.report import answer, drawing, what_if
from fp8lab.report.answer import ENOUGH_STEPS, Answer, answer_of, named
from fp8lab.report.blocks import Document, Folded, Note
from fp8lab.report.interactive import QUANTITIES, STATISTICS, TRACKS
from fp8lab.report.sections import WORDS, document_of
from fp8lab.report.story import Seen, Story, cut_short, load
from fp8lab.report.tables import Table, meaning_of, mitigations
from fp8lab.report.verdict import verdicts


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record_experiment(tmp_path_factory.mktemp("experiment"))


@pytest.fixture(scope="module")
def story(experiment: Path) -> Story:
    return load([experiment])


@pytest.fixture(scope="module")
def document(story: Story) -> Document:
    with drawing.style():
        return document_of(story)


def told_of(path: Path) -> Document:
    with drawing.style():
        return document_of(load([path]))


def found(cause: str, severity: Severity = "high", **further: Any) -> Finding:
    evidence = (Evidence(step=3, site="mlp:product", quantity="staleness", value=8.0),)
    fields: dict[str, Any] = {
        "summary": "it is so",
        "confidence": "medium",
        "evidence": evidence,
        "since": 3,
    }
    return Finding(cause=cause, severity=severity, **(fields | further))


# --- is it FP8? -----------------------------------------------------------------------------------


def test_the_answer_is_of_the_worst_run(story: Story, document: Document) -> None:
    run = story.worst_first()[0]
    finding, said = run.diagnosis.findings[0], document.answer
    assert said is not None
    assert (said.word, said.cause) == ("Yes", "Delayed saturation")
    assert (said.site, said.channel) == (finding.site, finding.channel)
    assert said.since == f"step {finding.since}"
    assert (said.remedy, said.summary) == (finding.remedy, finding.summary)
    assert said.confidence == finding.confidence
    assert said.run == f"the delayed arm, seed {run.seed}"
    assert said.because == (
        f"Delayed saturation at mlp:product, channel {finding.channel}, since step "
        f"{finding.since}, in {said.run}; the run diverged at step 47; its twin in high "
        "precision neither diverged nor gave an alarm"
    )
    assert said.cannot_exclude == finding.cannot_exclude
    assert document.headline == f"{said} {document.counts}"
    assert str(said).startswith(f"Is it FP8? Yes (confidence {finding.confidence}): Delayed")


@pytest.mark.parametrize(
    ("findings", "word"),
    [
        ([found("delayed_saturation")], "Not yet"),
        ([found("short_accumulator", "medium")], "Not yet"),
        ([found("not_fp8"), found("delayed_saturation", "medium")], "No"),
        ([found("learning_rate", "medium")], "No"),
        ([found("precision_label", "medium")], "Cannot say"),
        ([found("delayed_saturation", "low")], "Not tried"),
        ([], "Not tried"),
    ],
)
def test_the_worst_finding_decides(tmp_path: Path, findings: list[Finding], word: str) -> None:
    story = load([write(tmp_path / "run", steps=[{"loss": 1.0}] * 9).path])
    (run,) = story.runs
    run.diagnosis = replace(run.diagnosis, findings=tuple(findings))
    said = answer_of(story)
    assert said.word == word
    if word == "Not yet":
        assert said.because.endswith("the loss itself never told")
        assert "no such run is here" in said.cannot_exclude
    if findings and findings[0].severity != "low":
        assert said.confidence == "medium"
    else:
        assert said.confidence == "low"  # nine steps of nothing are not much
        assert "no operand says that it is FP8" in said.because


@pytest.mark.parametrize(
    ("cast", "said"),
    [
        ("E4M3 DelayedScaling", "It goes wrong in high precision too"),
        ("BF16 HighPrecision", "It goes wrong without FP8"),
    ],
)
def test_not_fp8_is_no_switch_that_was_thrown(tmp_path: Path, cast: str, said: str) -> None:
    """In words: "Not FP8 since step 9" reads as if FP8 had ended there."""
    precision = {"mlp.down": {"input": cast}}
    steps = [{"loss": 1.0}] * 12
    story = load([write(tmp_path / "hot", steps=steps, info={"precision": precision}).path])
    (run,) = story.runs
    run.diagnosis = replace(run.diagnosis, findings=(found("not_fp8", since=9),))
    answer = answer_of(story)
    assert (answer.word, answer.cause) == ("No", "Not FP8")
    assert answer.because == f"{said}, since step 9, in run hot; the loss itself never told"


def test_every_rule_of_precision_is_known_by_the_name_of_its_cause() -> None:
    told = set()
    for rule in OF_PRECISION:
        source = Path(str(rule.__file__)).read_text(encoding="utf-8")
        causes = set(re.findall(r'cause="(\w+)"', source))
        assert len(causes) <= 1
        told |= causes or {rule.__name__.rpartition(".")[2]}
    assert told == answer._OF_PRECISION


def test_an_alarm_without_a_cause_cannot_be_explained(tmp_path: Path) -> None:
    losses = [{"loss": 1.0}] * 30 + [{"loss": float("nan")}]
    events: list[Row] = [{"step": 30, "kind": "nonfinite_loss"}]
    story = load([write(tmp_path / "run", steps=losses, events=events).path])
    (run,) = story.runs
    run.diagnosis = replace(run.diagnosis, findings=())
    said = answer_of(story)
    assert said.word == "Cannot say"
    assert said.because == (
        "the run diverged at step 30 in run run, and no rule found a cause in what was recorded"
    )


def test_nothing_found_is_worth_more_the_more_was_recorded(tmp_path: Path) -> None:
    for steps, confidence in ((ENOUGH_STEPS - 1, "low"), (ENOUGH_STEPS, "medium")):
        product: Row = {"site": "mlp:product", "cur_amax": 1.0, "recipe": "A", "format": "E4M3"}
        run = write(
            tmp_path / str(steps),
            steps=[{"loss": 1.0, "grad_norm": 1.0}] * steps,
            tensors=[product | {"step": step} for step in range(steps)],
        )
        said = answer_of(load([run.path]))
        assert (said.word, said.confidence) == ("No", confidence)
        assert "was not tried" not in said.because


def test_of_nothing_nothing_can_be_said(tmp_path: Path) -> None:
    empty = answer_of(load([write(tmp_path / "run").path]))
    none = answer_of(Story(experiments=(), parts=(), unread=()))
    assert (empty.word, empty.because) == ("Cannot say", "nothing was recorded")
    assert (none.word, none.because) == ("Cannot say", "no run could be read")


def test_an_answer_in_one_paragraph() -> None:
    said = Answer(word="No", because="so", confidence="high", cannot_exclude="that")
    assert str(said) == "Is it FP8? No (confidence high): so. Cannot exclude: that."
    assert str(Answer(word="No", because="so")) == "Is it FP8? No (confidence low): so."


def test_a_verdict_is_as_sure_as_its_least_sure_finding(story: Story) -> None:
    (one,) = [verdict for verdict in verdicts(story) if verdict.cause == "Delayed saturation"]
    runs = [run for run in story.runs if run.label.startswith("train/delayed")]
    both = [run.diagnosis.findings[0] for run in runs]
    assert one.cannot_exclude == both[0].cannot_exclude
    told = [run.diagnosis for run in runs]
    for confidences in (("high", "low"), ("medium", "high")):
        for run, confidence in zip(runs, confidences, strict=True):
            first, *others = run.diagnosis.findings
            changed = (replace(first, confidence=confidence), *others)
            run.diagnosis = replace(run.diagnosis, findings=changed)
        (one,) = [verdict for verdict in verdicts(story) if verdict.cause == "Delayed saturation"]
        assert one.confidence == max(confidences, key=["high", "medium", "low"].index)
    for run, diagnosis in zip(runs, told, strict=True):
        run.diagnosis = diagnosis


# --- the price ------------------------------------------------------------------------------------


def test_prices_are_those_of_the_comparison(experiment: Path, tmp_path: Path) -> None:
    shutil.copytree(experiment / "train", tmp_path / "train")
    shutil.copy(experiment / "experiment.json", tmp_path / "experiment.json")
    finals = {"high": (0.25, 1.25), "delayed": (0.5, 2.0)}
    for arm, losses in finals.items():
        for seed, loss in enumerate(losses):
            file = tmp_path / "train" / arm / f"seed-{seed}" / "run.json"
            info = json.loads(file.read_text())
            info["result"] = {"diverged_at": None, "final_loss": loss}
            info["config"]["changes_function"] = arm == "delayed"
            file.write_text(json.dumps(info))
    part = load([tmp_path]).parts[0]
    table = mitigations(part)
    high, delayed = ({**dict(zip(table.head, row, strict=True))} for row in table.rows)
    assert (high["function"].text, delayed["function"]) == ("kept", ("changed", "warn"))
    assert [high[name].text for name in ("loss gap", "time of a step")] == ["–", "–"]
    assert delayed["loss gap"].text == "+0.5"  # the median of 0.25 and 0.75
    rows = side_by_side([run.run for run in part.runs], "high")
    (ratio,) = [row["step_time_ratio"] for row in rows if row["arm"] == "train/delayed"]
    assert delayed["time of a step"].text == f"×\N{NO-BREAK SPACE}{ratio:.3g}"
    assert "gap and time are to the high arm" in table.note


def test_without_an_arm_in_high_precision_nothing_is_compared(experiment: Path) -> None:
    part = load([experiment / "train" / "delayed"]).parts[0]
    assert "loss gap" not in mitigations(part).head


# --- what other recipes would have met ------------------------------------------------------------


def test_what_if_is_what_replay_says(story: Story) -> None:
    run = story.worst_first()[0]
    table, to_record = what_if.what_if(run, "it")
    assert isinstance(table, Table) and isinstance(to_record, Folded)
    ((asked, *_),) = to_record.blocks[0].rows
    cells = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    assert list(cells) == [type(recipe).__name__ for recipe in what_if.RECIPES]
    for recipe in what_if.RECIPES:
        forecast = fp8lab.replay(run.run, recipe)
        told, worst, known = cells[type(recipe).__name__]
        frame = forecast.frame
        if not (frame["staleness"].notna() | frame["flushed_low"].notna()).any():
            assert (told, worst) == ("unknown", "–")
            assert known in forecast.unknown.values()
            continue
        assert worst == (str(forecast.troubles[0]) if forecast.troubles else "–")
        assert f"counts in {frame['flushed_low'].notna().sum()}" in known
        assert forecast.select and asked.text.startswith("select=[fp8lab.Selection(layers=")
        assert (forecast.serious != ()) == ("serious since step" in told)
    assert {told for told, *_ in cells.values()} > {"unknown"}


def test_a_bound_is_said_to_be_one(tmp_path: Path) -> None:
    """A scale that is no power of two cuts a bin; nothing is exact then, and the page says so."""
    run = record(tmp_path / "run", steps=9, recipe=HIGH)
    (seen,) = load([run]).runs
    table, *_ = what_if.what_if(seen, "it")
    assert isinstance(table, Table)
    known = {row[0].text: row[-1].text for row in table.rows}["Float8CurrentScaling"]
    frame = fp8lab.replay(seen.run, fp8lab.Float8CurrentScaling()).frame
    counted = frame.dropna(subset="flushed_low")
    pairs = [counted[f"{name}_low"] == counted[f"{name}_high"] for name in ("flushed", "saturated")]
    exact = int((pairs[0] & pairs[1]).sum())
    assert known.endswith(
        "exact" if exact == len(counted) else f"{exact} exact, else within bounds"
    )


def test_a_large_run_is_not_replayed(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    run = story.worst_first()[0]
    rows = len(run.run.tensors())
    monkeypatch.setattr(what_if, "MOST_ROWS", rows - 1)
    told = what_if.what_if(run, "it")
    assert isinstance(told, str) and f"it has {rows} tensor rows" in told
    monkeypatch.setattr(what_if, "MOST_ROWS", rows)
    assert isinstance(what_if.what_if(run, "it")[0], Table)


def test_amaxes_alone_promise_nothing(tmp_path: Path) -> None:
    rows: list[Row] = [{"step": s, "site": "mlp:product", "cur_amax": 1.0} for s in range(4)]
    sites = [{"site": "mlp", "gate": "gate.weight", "up": "up.weight", "down": "down.weight"}]
    run = Seen("run", write(tmp_path / "run", tensors=rows, info={"sites": sites}))
    table, *_ = what_if.what_if(run, "it")
    assert isinstance(table, Table)
    current = {row[0].text: row for row in table.rows}["Float8CurrentScaling"]
    assert current[1] == ("none by amax alone", "")
    assert current[3].text == "scale in 4 of 4 rows, counts in 0"
    assert "mlp:product: recorded with its amax alone" in table.note


# --- what is missing ------------------------------------------------------------------------------


def test_what_has_nothing_to_show_is_a_line_of_the_last_section(tmp_path: Path) -> None:
    document = told_of(record(tmp_path / "healthy", steps=12, recipe=CURRENT))
    assert document.sections[-1].anchor == "missing"
    lines = [block.text for block in document.sections[-1].blocks if isinstance(block, Note)]
    assert len(lines) == len(document.sections[-1].blocks)
    assert [line.split(":")[0] for line in lines] == [
        "Beside its twin in high precision",
        "One channel amplified",
        "What does not follow",
    ]
    for section in document.sections[:-1]:
        assert not any(isinstance(block, Note) and block.missing for block in section.blocks)


def test_a_part_of_which_nothing_ran_is_one_line(experiment: Path, tmp_path: Path) -> None:
    shutil.copytree(experiment / "dose", tmp_path / "dose")
    shutil.copy(experiment / "experiment.json", tmp_path / "experiment.json")
    document = told_of(tmp_path)
    lines = [block.text for block in document.sections[-1].blocks if isinstance(block, Note)]
    assert "How every run ended: A training: none of its runs is here." in lines
    assert "losses" not in document.pictures() and "doses" in document.pictures()


def test_names_stay_as_they_are_in_pictures_and_tables(tmp_path: Path) -> None:
    """Text everywhere: no mark-up is made of it, and mathematics is not parsed."""
    name = "<script>alert(1)</script>$x_2^$"
    document = told_of(record(tmp_path / "run", steps=20, recipe=DELAYED, name=name))
    said = document.answer
    assert said is not None and said.site in (None, f"{name}:product")
    for picture in document.pictures().values():
        svg = drawing.to_svg(picture.figure).decode()
        assert "<script" not in svg
    labels = document.pictures()["heat"].figure.axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == [drawing.plain(f"{name}:product")]
    assert "cast by other recipes" in str(document.sections)


def test_what_is_not_recorded_of_a_run_is_named(tmp_path: Path) -> None:
    document = told_of(write(tmp_path / "run", steps=[{"loss": 1.0}]).path)
    (table,) = [
        block
        for section in document.sections
        for block in section.blocks
        if section.anchor == "provenance" and isinstance(block, Table)
    ]
    facts = {row[0].text: row[1].text for row in table.rows}
    for name in ("versions", "machine", "command", "SHA-256 of the text"):
        assert facts[name] == "not recorded"
    assert facts["schema of the rows"] != "not recorded"
    assert facts["this page"] == f"fp8lab {fp8lab.__version__}"


def test_a_run_is_named_by_its_arm_and_seed(story: Story) -> None:
    assert named(story, story.parts[0].arms[1].runs[1]) == "the delayed arm, seed 1"


def test_a_statistic_is_explained_in_the_schemas_words() -> None:
    assert meaning_of("crest") == "amax / rms"
    assert any("crest = amax / rms; " in words for words in WORDS)
    assert meaning_of("else") == "else"


def test_what_all_processes_say_of_the_steps_is_said_once(tmp_path: Path) -> None:
    events = [
        {"step": step, "rank": rank, "kind": "resumed", "detail": f"at step {step}"}
        for rank in range(3)
        for step in (1, 2)
    ]
    run = write(tmp_path / "run", steps=[{"loss": 1.0}] * 4, events=events)
    page = fp8lab.write_report([run.path], tmp_path / "page.md").read_text(encoding="utf-8")
    assert "0 to 3; resumed: at step 1; resumed: at step 2 |" in page


def test_every_statistic_that_can_be_chosen_is_explained() -> None:
    plain = {"nans", "infs", "gate_amax", "up_amax", "product_amax", "loss", "grad_norm"}
    plain |= {"gate_norm", "up_norm", "down_norm", "logit_max", "learning_rate", "common_loss"}
    words = " ".join(WORDS).lower()
    for name in {*STATISTICS, *TRACKS, *QUANTITIES} - plain:
        known = name.removeprefix("cur_")
        assert known in words or known.replace("_", " ") in words, name
    for name in ("control", "twin", "gradient cosine", "dose", "saturated", "common_loss"):
        assert name in words, name


def test_layers_that_are_not_in_the_precision_told_are_named_but_not_all(tmp_path: Path) -> None:
    events = [
        {"step": 0, "kind": "not_run", "site": f"layers.{layer}", "detail": "frozen"}
        for layer in range(7)
    ]
    run = write(tmp_path / "run", steps=[{"loss": 1.0}] * 3, events=events)
    page = fp8lab.write_report([run.path], tmp_path / "page.md").read_text(encoding="utf-8")
    told = "; ".join(f"not\\_run: layers.{layer}: frozen" for layer in range(5))
    assert f"0 to 2; {told}; 2 more, see fp8lab show |" in page


# --- runs that were cut ---------------------------------------------------------------------------


def demand_not_judged(out: Path, settings: Settings, how: str) -> None:
    """Of real runs under these settings, and judged as soon as the same say that they are whole."""
    file, experiment = load_experiment(str(Path(__file__).with_name("tiny_experiment.py")))
    arms = {"hot"}  # predicted to diverge
    assert run_experiment(file, experiment, out, workers=1, arms=arms, settings=settings) == []
    html, markdown = (
        fp8lab.write_report([out], out.parent / f"page.{ending}").read_text(encoding="utf-8")
        for ending in ("html", "md")
    )
    said = f"these runs were cut ({how}): nothing follows from them for the prediction"
    assert f"<dt>so far</dt><dd>{said}</dd>" in html
    assert f"\n- so far: {said}\n" in markdown
    assert "Against the prediction" not in html + markdown
    document = told_of(out)
    (row,) = [row for table in document.predictions for row in table.rows if "hot" in row[0].text]
    assert row[-1] == ("not judged: cut short", "quiet")
    assert "bad" not in {cell.meaning for cell in row}
    described = json.loads((out / "experiment.json").read_text())
    described["settings"] |= {"quick": False, "steps": None}
    (out / "experiment.json").write_text(json.dumps(described))
    (row,) = [row for one in told_of(out).predictions for row in one.rows if "hot" in row[0].text]
    assert row[-1].text in ("contradicted", "as predicted")


def test_quick_runs_are_not_held_against_the_prediction(tmp_path: Path) -> None:
    how = "--quick: few steps of one seed"
    demand_not_judged(tmp_path / "out", Settings(quick=True), how)


def test_runs_of_other_steps_are_not_held_against_the_prediction(tmp_path: Path) -> None:
    demand_not_judged(tmp_path / "out", Settings(steps=1), "--steps 1")
    quick = {"settings": {"quick": True, "steps": 1}}
    assert cut_short(quick) == "--quick: one seed, --steps 1"
