"""What came of an experiment: a verdict, and the tables and pictures that it rests on, as a page.

An experiment's `conclude` reads its runs and says what they show; every number of the page comes
from their rows that way, and nothing is typed in. The page is Markdown with PNG pictures beside it,
for a repository or an issue tracker: FOLDER/<experiment>.md and FOLDER/<experiment>-<picture>.png.
Its first heading is the verdict. The same runs give the same bytes; what made them (versions, the
machine, the command, text, seeds, a hash of the experiment's file and of the runs) stands last.

`write_log` puts the verdicts of all pages of a folder into one list, the laboratory's log.

Rejected: the HTML report, which is about single runs and their diagnosis.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import pandas as pd

from fp8lab.failure import TRACEBACK, and_where, in_one_line, left_in
from fp8lab.lab.description import file_hash
from fp8lab.lab.work import Chosen, label_of
from fp8lab.store import Run, RunError, find_runs, open_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fp8lab.lab.experiment import Experiment


class NoConclusion(ValueError):
    """The experiment's own code has failed on runs that are all there."""

    exit_code = 1  # of the command: as of a run that failed, and not of a wrong word in it


Verdict = Literal["confirmed", "refuted", "partly", "undecided"]
"""Of the prediction: as predicted, not, in some clauses only, or the runs cannot tell."""


# In the place of a verdict: its sentence may tell of steps and seeds that were not run.
QUICK = "a quick run, few steps of one seed. Nothing follows from it."


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows and columns under a heading; floats are shown with four digits, None as a dash."""

    title: str
    rows: pd.DataFrame
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure by the name of its file; `draw` makes it."""

    name: str
    title: str
    draw: Callable[[], Figure]
    note: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9_]+", self.name):
            raise ValueError(f"Picture: name={self.name!r}, expected letters a-z, digits and _")


@dataclass(frozen=True, kw_only=True)
class Result:
    """`sentence` says in one line, with figures, what was found; `against` what the literature has
    otherwise, which the heading then says too."""

    verdict: Verdict
    sentence: str
    parts: Sequence[str | Table | Picture] = ()
    against: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in get_args(Verdict):
            expected = ", ".join(get_args(Verdict))
            raise ValueError(f"Result: verdict={self.verdict!r}, expected one of {expected}")
        if not self.sentence or "\n" in self.sentence + self.against:
            raise ValueError(f"Result: sentence={self.sentence!r}, expected one line")


def runs_of(out: Path, part: str) -> dict[tuple[str, int], Run]:
    """The finished runs of a part in an experiment's folder, by arm and seed.

    Raises RunError for one that says neither.
    """
    found = {}
    for path in find_runs(out / part):
        run = open_run(path)
        if run.state == "finished":
            config = run.info.get("config")
            if not isinstance(config, dict) or not {"arm", "seed"} <= config.keys():
                told = "its config says no arm and seed"
                raise RunError(f"{path}: {told}, expected watch(…, config=job.config(…))")
            found[config["arm"], config["seed"]] = run
    return found


def results(out: Path, part: str) -> pd.DataFrame:
    """What the finished runs of a part came to, a row a run: its arm, its seed, all that its result
    says, and its number of steps, if it says so."""
    return pd.DataFrame(
        [
            {
                "arm": arm,
                "seed": seed,
                **(run.info.get("result") or {}),
                "steps": run.info["config"].get("steps"),
            }
            for (arm, seed), run in runs_of(out, part).items()
        ]
    )


def final_losses(out: Path, part: str) -> pd.DataFrame:
    """The final losses of `results`: a row a seed, a column an arm, NaN where a run diverged or
    says nothing."""
    found: dict[str, dict[int, float]] = {}
    for (arm, seed), run in runs_of(out, part).items():
        result = run.info.get("result") or {}
        final = result.get("final_loss") if result.get("diverged_at") is None else None
        found.setdefault(arm, {})[seed] = math.nan if final is None else float(final)
    return pd.DataFrame(found).rename_axis(index="seed", columns="arm").sort_index()


def diverged(rows: pd.DataFrame, *arms: str) -> tuple[int, int]:
    """How many of the arms' runs diverged, of how many; `rows` are `results`."""
    of = rows[rows["arm"].isin(arms)]
    return int(of["diverged_at"].notna().sum()), len(of)


def ratios(rows: pd.DataFrame, column: str, of: str, to: str) -> pd.Series:
    """One arm's column over another's, seed by seed, of what both have; `rows` are `results`."""
    table = rows.pivot(index="seed", columns="arm", values=column).astype(float)
    return (table[of] / table[to]).dropna()


def wilson(count: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share, from Wilson, J. Am. Stat. Assoc. 22 (1927) 209; (0, 1) of
    nothing."""
    if not of:
        return 0.0, 1.0
    z, share = 1.959964, count / of
    middle = share + z * z / (2 * of)
    reach = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    size = 1 + z * z / of
    return max(0.0, (middle - reach) / size), min(1.0, (middle + reach) / size)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """The mean and the range of some seeds' numbers, in words; what is not finite is left out."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return "nothing"
    low, high, mean = min(known), max(known), sum(known) / len(known)
    return f"{mean:.{digits}g} ({low:.{digits}g} to {high:.{digits}g})"


class Clause(NamedTuple):
    """One thing that was predicted, what was found, and whether it holds; None: cannot be told."""

    predicted: str
    found: str
    holds: bool | None


def judged(
    clauses: Sequence[tuple[str, str, bool | None]], *, killed: bool | None = None
) -> tuple[Verdict, Table]:
    """The verdict on a prediction, and it clause by clause, as every page has it first.

    The clauses are `Clause`, or tuples of the same. "partly" is of a prediction of which every
    clause can be told and some hold. `killed` is for a prediction that says what would refute it
    whatever else holds: whether that has come; None if it says no such thing, or the runs cannot
    tell.
    """
    words = {True: "yes", False: "**no**", None: "cannot be told"}
    rows = [(predicted, found, words[holds]) for predicted, found, holds in clauses]
    told = {holds for _, _, holds in clauses}
    verdict: Verdict = "partly"
    if killed:
        verdict = "refuted"
    elif None in told or not told:
        verdict = "undecided"
    elif len(told) == 1:
        verdict = "confirmed" if True in told else "refuted"
    if killed is not None:
        rows.append(("what would refute it", "came" if killed else "did not come", "–"))
    table = pd.DataFrame(rows, columns=pd.Index(["predicted", "found", "holds"]))
    return verdict, Table(title="Clause by clause", rows=table)


def unfinished(experiment: Experiment, out: Path, quick: bool) -> list[tuple[str, str, int]]:
    """Part, arm and seed of the runs that a conclusion asks for and `out` lacks."""
    there = {part.name: runs_of(out, part.name) for part in experiment.parts}
    return [
        (part.name, arm.name, seed)
        for part in experiment.parts
        for arm in part.arms
        for seed in (part.seeds[:1] if quick else part.seeds)
        if (arm.name, seed) not in there[part.name]
    ]


def require_conclusion(experiment: Experiment, out: Path, quick: bool, chosen: Chosen) -> None:
    """Raises ValueError if no page can follow from the chosen runs and from what `out` has
    already: better before they are trained."""
    if experiment.conclude is None:
        raise ValueError(f"--report: {experiment.name} has no conclusion, expected none")
    others = [run for run in unfinished(experiment, out, quick) if not chosen.has(*run)]
    if others:
        told = f"--report: {out} lacks {len(others)} runs that --part, --arm and --seed leave out"
        raise ValueError(f"{told}, as {label_of(*others[0])}: expected all runs of the experiment")


def write_page(experiment: Experiment, file: Path, out: Path, folder: Path) -> Path:
    """Conclude from the runs in `out`, and write page and pictures into `folder`.

    Raises ValueError if the experiment has no conclusion, or `out` lacks a run that it would have;
    NoConclusion if the experiment's own code fails: `out`/traceback.txt then has all of the error.
    """
    if experiment.conclude is None:
        raise ValueError(f"experiment {experiment.name}: has no conclusion to write")
    quick = _settings(out).get("quick", False)
    if missing := unfinished(experiment, out, quick):
        first = label_of(*missing[0])
        raise ValueError(f"{out}: {len(missing)} runs are not finished, {first} first")
    folder.mkdir(parents=True, exist_ok=True)
    whole = out / TRACEBACK
    whole.unlink(missing_ok=True)
    try:
        with left_in(whole):
            lines = _concluded(experiment, out, folder, quick)
    except Exception as error:  # of the experiment's own code
        told = and_where(f"no conclusion: {in_one_line(error)}", whole)
        raise NoConclusion(f"experiment {experiment.name}: {told}") from error
    lines += ["## What does not follow", "", *(f"- {one}" for one in experiment.limits), ""]
    lines += ["## Where this is from", "", *_provenance(experiment, file, out), ""]
    page = folder / f"{experiment.name}.md"
    page.write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")
    return page


def _settings(out: Path) -> dict[str, Any]:
    told = json.loads((out / "experiment.json").read_text(encoding="utf-8"))
    settings: dict[str, Any] = told["settings"]
    return settings


def _concluded(experiment: Experiment, out: Path, folder: Path, quick: bool) -> list[str]:
    """The page down to the last table or picture; pictures go into `folder`."""
    assert experiment.conclude is not None
    result = experiment.conclude(out)
    if not isinstance(result, Result):
        raise TypeError(f"conclude: returned {type(result).__name__}, expected a Result")
    lines = _head(experiment, result, quick)
    for part in result.parts:
        if isinstance(part, str):
            lines += [part, ""]
        elif isinstance(part, Table):
            lines += [f"## {part.title}", "", _markdown(part.rows), ""]
            lines += [part.note, ""] if part.note else []
        else:
            lines += _drawn(part, experiment.name, folder)
    return lines


def _head(experiment: Experiment, result: Result, quick: bool) -> list[str]:
    against = f" Against the literature: {result.against}" if result.against else ""
    verdict = f"{result.verdict}. {result.sentence}{against}"
    return [
        f"# {experiment.name}: {QUICK if quick else verdict}",
        "",
        f"**{experiment.question}**",
        "",
        f"*Predicted before the first run:* {experiment.prediction}",
        "",
        f"*Refuted if* {experiment.refuted_if}.",
        "",
    ]


def _drawn(picture: Picture, name: str, folder: Path) -> list[str]:
    from matplotlib import pyplot

    figure = picture.draw()
    file = f"{name}-{picture.name}.png"
    # Without what would change from one writing to the next.
    figure.savefig(folder / file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    lines = [f"## {picture.title}", "", f"![{picture.title}](<{file}>)", ""]
    return lines + ([picture.note, ""] if picture.note else [])


def _markdown(rows: pd.DataFrame) -> str:
    cells = [[str(name) for name in rows.columns], ["---"] * len(rows.columns)]
    cells += [[_cell(value) for value in row] for row in rows.itertuples(index=False)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def _cell(value: Any) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and value != value):
        return "–"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _provenance(experiment: Experiment, file: Path, out: Path) -> list[str]:
    runs = [open_run(path) for path in find_runs(out)]
    versions: dict[str, set[str]] = {}
    for run in runs:
        for library, version in run.info.get("versions", {}).items():
            versions.setdefault(library, set()).add(str(version))
    machines = sorted({str(run.info.get("machine")) for run in runs})
    texts = sorted(
        {
            f"{config['text']}, SHA-256 {str(config['text_sha256'])[:16]}"
            for config in (run.info.get("config", {}) for run in runs)
            if "text_sha256" in config
        }
    )
    told = ", ".join(f"{name} {'/'.join(sorted(found))}" for name, found in versions.items())
    described = json.loads((out / "experiment.json").read_text(encoding="utf-8"))
    made_by = described.get("files") or [file_hash(file)]
    settings = {k: v for k, v in described["settings"].items() if v}
    commands = described.get("commands") or [f"fp8lab run {experiment.name} --report reports"]
    return [
        f"- {', '.join(f'`{one}`' for one in commands)}, {len(runs)} runs"
        + (f", settings {json.dumps(settings)}" if settings else ""),
        f"- the experiment's file: SHA-256 {', '.join(map(str, made_by))}",
        f"- {told}",
        *(f"- {machine}" for machine in machines),
        *(f"- text: {text}" for text in texts),
    ]


def write_log(folder: Path, file: Path) -> None:
    """The first line of every page of an experiment in `folder`, with a link to it."""
    about = "Every experiment with its verdict on what was predicted"
    lines = ["# Log", "", f"{about}, as `make experiments` wrote it.", ""]
    for page in sorted(folder.glob("*.md")):
        heading, _, rest = page.read_text(encoding="utf-8").partition("\n")
        question = next((line for line in rest.splitlines() if line.startswith("**")), None)
        if re.match(r"# [\w.-]+: (confirmed|refuted|partly|undecided)\. ", heading) and question:
            lines += [
                f"#{heading}",
                "",
                f"{question} [The page](<../{folder.name}/{page.name}>).",
                "",
            ]
    file.write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")
