"""`Guard`: the rules of `diagnosis`, asked while the training runs, and what then is done about it.

    with fp8lab.watch(model, "runs/mine", optimizer=optimizer, burst=8) as watch:
        guard = fp8lab.Guard(
            watch,
            checkpoints=Checkpoints(folder="safe", save=save, every=500),
            mitigations={"delayed_saturation": AntiWindup()},
        )

It holds the rows of the last steps, puts them before the same rules as `diagnose` every so many
steps and in every step that alarms (a clipped product, something not finite), and acts on each new
finding once. An action is opt-in and a row among the run's events: `alarm`, `checkpoint_kept` (or
`no_checkpoint`), `burst`, `mitigated`; `guard_failed` where one could not be
done, for nothing here ends a training.

A checkpoint is worth something only if it is older than the trouble, and trouble is often older
than its alarm. So the newest few stay and of the others the oldest of each doubling of age, and an
alarm keeps for good the newest one from before its finding's onset: what was written after that
step has the poison in it. Where that one is kept already, by an alarm before, it is what this one
names. Those that lie in the folder where a run goes on may be kept too; deleted are only a Guard's
own.

Without mitigations a guarded training is the unguarded one to the bit. Cost: the rules read frames
of a few thousand rows, some tens of milliseconds for a few feed-forwards and some hundreds for
thirty, every `every` steps and where alarms begin: choose `every` so that this is little beside
that many steps.
Rejected: rules of its own, quicker and other than those that the report shows.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
from torch import nn

from fp8lab.agreement import world_size
from fp8lab.diagnosis import OF_PRECISION, OF_TRAINING, judge
from fp8lab.diagnosis.rows import Loaded
from fp8lab.monitor import Watch
from fp8lab.monitor.recorder import StepRows
from fp8lab.record import SEVERITIES, TABLES, Finding, Severity, Table
from fp8lab.runs import Excerpt, Names, Numbers, wanted_of
from fp8lab.wanted import schema_of

# Of the first steps the rows stay: a loss is held against them.
FIRST_STEPS = 50


class Mitigation(Protocol):
    """What can be put on one feed-forward while the training goes on."""

    def apply(self, model: nn.Module) -> nn.Module: ...


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where checkpoints go, how one is written, and how many of them stay.

    `save(path)` writes what a training needs to go on to `path`, a file or a folder of the name
    `step-N`: the state before step N. It is called after every `every`-th step; the newest `keep`
    stay, and one for each doubling of age before those. What an alarm keeps becomes `kept-step-N`;
    from there the run goes on with `watch(..., resume_at=N)`. A folder is that of one run, which a
    file `.run` in it tells.

    Raises ValueError for a number below 1 and what is no function.
    """

    folder: str | Path
    save: Callable[[Path], object]
    every: int = 100
    keep: int = 3

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"Checkpoints: {name}={value!r:.60}, expected at least 1")
        if not callable(self.save):
            raise ValueError(f"Checkpoints: save={self.save!r:.60}, expected a function of a path")


class Guard:
    """The rules online. It works from its making until the watch ends.

    `every`: steps between two judgements; `window`: steps whose rows are judged; `least`: the
    severity from which on a finding is an alarm, "medium" unless told, so that a note ("low") is
    none; one that got worse is an alarm again. On an alarm, in this order: the newest checkpoint
    from before it is kept; the next `burst` steps are recorded in full; each of `on_alarm` is
    called with the finding and the step; the mitigation for the finding's cause, if `mitigations`
    has one, is put on the feed-forward of the finding's site.

    Raises ValueError for a number below 1, an unknown severity or cause; `on_alarm` that are no
    functions; what are no `Checkpoints`, or their folder is another run's; what is no mitigation of
    a model, or for a cause of FP8 where no layer is in FP8; and mitigations in a training of
    several processes: each judges its own rows, and they would no longer hold the same model.
    OSError if the folder cannot be written.
    """

    def __init__(
        self,
        watching: Watch,
        *,
        every: int = 10,
        window: int = 200,
        least: Severity = "medium",
        burst: int = 0,
        checkpoints: Checkpoints | None = None,
        on_alarm: Iterable[Callable[[Finding, int], object]] = (),
        mitigations: Mapping[str, Mitigation] | None = None,
    ) -> None:
        for name, value, lowest in (
            ("every", every, 1),
            ("window", window, 1),
            ("burst", burst, 0),
        ):
            if type(value) is not int or value < lowest:
                raise ValueError(f"Guard: {name}={value!r:.60}, expected at least {lowest}")
        if least not in SEVERITIES:
            raise ValueError(f"Guard: least={least!r:.60}, expected one of {SEVERITIES}")
        if mitigations and world_size() > 1:
            raise ValueError(f"Guard: mitigations in {world_size()} processes, expected one")
        if not isinstance(checkpoints, Checkpoints | None):
            raise ValueError(f"Guard: checkpoints={checkpoints!r:.60}, expected fp8lab.Checkpoints")
        if not isinstance(on_alarm, Iterable) or not all(map(callable, on_alarm := [*on_alarm])):
            told = f"Guard: on_alarm={on_alarm!r:.60}"
            raise ValueError(f"{told}, expected functions of a finding and a step")
        _check(mitigations or {}, watching.info)
        if checkpoints is not None and watching.rank == 0:
            _claim(Path(checkpoints.folder), watching)
        self._watch = watching
        self._every, self._burst = every, burst
        self._severities = SEVERITIES[: SEVERITIES.index(least) + 1]
        self._checkpoints = checkpoints
        self._written: list[tuple[int, Path]] = []  # take turns
        self._staying: list[tuple[int, Path]] = []  # the kept ones, and those of the run's past
        self._is_first = True
        self._callbacks = tuple(on_alarm)
        self._mitigations = dict(mitigations or {})
        self._recent = _Recent(watching.path, watching.info, window)
        self._told: dict[tuple[str, str | None], Severity] = {}
        self._mitigated: set[tuple[str, str | None]] = set()
        # Of all findings, also those that were no alarm yet: the window forgets where one began.
        self._since: dict[tuple[str, str | None], int] = {}
        self._was_alarming = False
        self.findings: list[Finding] = []
        watching.observers.append(self._observe)

    def _observe(self, rows: StepRows) -> None:
        """Called by `watch` when a step is over."""
        self._recent.add(rows, self._watch.rank)
        if self._checkpoints is not None and self._is_first:
            self._attempt(rows.step, "a checkpoint", lambda: self._look(rows.step))
        self._is_first = False
        begins, self._was_alarming = rows.is_alarming > self._was_alarming, rows.is_alarming
        if begins or rows.step % self._every == 0:
            self._attempt(rows.step, "the rules", lambda: self._judge(rows.step))
        if self._checkpoints is not None and (rows.step + 1) % self._checkpoints.every == 0:
            self._attempt(rows.step, "a checkpoint", lambda: self._save(rows.step + 1))

    def _judge(self, step: int) -> None:
        for finding in judge(Loaded(self._recent)).findings:
            key = finding.cause, finding.site
            since = step if finding.since is None else finding.since
            self._since[key] = min(since, self._since.get(key, since))
            # Those as bad as what was told of this, and those that do not count.
            known = SEVERITIES[SEVERITIES.index(self._told.get(key, "low")) :]
            if finding.severity in self._severities and (
                key not in self._told or finding.severity not in known
            ):
                self._told[key] = finding.severity
                self.findings.append(finding)
                self._alarm(finding, step)

    def _alarm(self, finding: Finding, step: int) -> None:
        self._watch.event(step, "alarm", f"{finding.cause}: {finding.summary}", finding.site)
        onset = self._since[finding.cause, finding.site]
        if self._checkpoints is not None:
            self._attempt(step, "a checkpoint", lambda: self._keep(onset, step))
        if self._burst:
            # The step that is over still counts as the running one.
            self._watch.record_in_full(self._burst)
            self._watch.event(step, "burst", f"the next {self._burst} steps are recorded in full")
        for callback in self._callbacks:
            self._attempt(step, "a callback", lambda: callback(finding, step))  # noqa: B023
        if (mitigation := self._mitigations.get(finding.cause)) is not None:
            what = type(mitigation).__name__
            self._attempt(step, what, lambda: self._mitigate(mitigation, finding, step))

    def _attempt(self, step: int, what: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # a guard that ends what it guards is none
            reason = f"{what}: {type(error).__name__}: {' '.join(str(error).split())}"
            warnings.warn(f"{self._watch.path}: guard: {reason}", stacklevel=2)
            self._watch.event(step, "guard_failed", reason)

    # --- checkpoints ----------------------------------------------------------------------------

    def _look(self, first: int) -> None:
        """What the run left there before step `first`; later ones are of steps that gave way."""
        assert self._checkpoints is not None
        for path in Path(self._checkpoints.folder).glob("*step-*"):
            name = re.fullmatch(r"(?:kept-)?step-([0-9]+)", path.name)
            if name is not None and int(name[1]) <= first:
                self._staying.append((int(name[1]), path))

    def _save(self, next_step: int) -> None:
        assert self._checkpoints is not None
        path = Path(self._checkpoints.folder) / f"step-{next_step}"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._checkpoints.save(path)
        for known in (self._written, self._staying):
            known[:] = [pair for pair in known if pair[0] < next_step]  # it went back
        self._written.append((next_step, path))
        stay = dict(self._written[: -self._checkpoints.keep][::-1])
        oldest = {(next_step - step).bit_length(): step for step in stay}
        for step, old in stay.items():
            if step not in oldest.values():
                self._written.remove((step, old))
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)

    def _keep(self, onset: int, step: int) -> None:
        """The newest from before step `onset` ran leaves the turns and stays, by another name; one
        that is kept already has done so."""
        lying = [pair for pair in self._staying if pair[1].exists()]  # a user may tidy up
        before = [pair for pair in (*self._written, *lying) if pair[0] <= onset]
        if not before:
            self._watch.event(step, "no_checkpoint", f"none is from before step {onset}")
            return
        # Of a kept one and another of the same step, where a run went back, the other is newer.
        newest = max(before, key=lambda pair: (pair[0], not pair[1].name.startswith("kept-")))
        number, path = newest
        told = f"from before step {onset}, kept already"
        if not path.name.startswith("kept-"):
            for known in (self._written, self._staying):
                known[:] = [pair for pair in known if pair != newest]
            path = path.rename(path.with_name(f"kept-{path.name}"))
            self._staying.append((number, path))
            told = f"from before step {onset}"
        self._watch.event(step, "checkpoint_kept", f"{path.name}: {told}")

    # --- mitigations ----------------------------------------------------------------------------

    def _mitigate(self, mitigation: Mitigation, finding: Finding, step: int) -> None:
        layer = (finding.site or "").rpartition(":")[0]
        if (finding.cause, finding.site) in self._mitigated:
            return
        self._mitigated.add((finding.cause, finding.site))
        mitigation.apply(self._watch.feed_forward(layer))
        self._watch.event(step, "mitigated", type(mitigation).__name__, finding.site)


def _claim(folder: Path, watching: Watch) -> None:
    """Two runs in one folder would overwrite, rename and delete each other's checkpoints. A run is
    known by when it was created: it may go on, and be moved."""
    mark, mine = folder / ".run", f"{watching.info['created']!r} {watching.path.name}"
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError), mark.open("x", encoding="utf-8") as file:
        try:
            file.write(mine)
            file.flush()
        except OSError:  # a mark without a name on it would keep everybody out, this run too
            mark.unlink()
            raise
    created, _, owner = mark.read_text(encoding="utf-8").partition(" ")
    if created != mine.partition(" ")[0]:
        told = f"Guard: checkpoints: {folder} is the folder of another run, {owner}"
        raise ValueError(f"{told} ({mark.name} in it), expected one for this run alone")


def _check(mitigations: Mapping[str, Mitigation], info: Mapping[str, Any]) -> None:
    causes = [rule.__name__.rpartition(".")[2] for rule in (*OF_PRECISION, *OF_TRAINING)]
    for cause, mitigation in mitigations.items():
        if cause not in causes:
            choice = ", ".join(causes)
            raise ValueError(f"Guard: mitigations: {cause!r:.60}, expected one of {choice}")
        told = f"Guard: mitigations: {cause}: {mitigation!r:.60}"
        if not callable(getattr(mitigation, "apply", None)) or isinstance(mitigation, type):
            raise ValueError(f"{told}, expected a mitigation of a model, as SmoothSwiGLU()")
        if (kind := getattr(mitigation, "kind", "model")) not in ("model", "recipe"):
            raise ValueError(f"{told} is of the {kind}, expected one of a model")
        if cause in causes[: len(OF_PRECISION)] and not _may_cast(info):
            expected = "expected a model that convert() was called on before watch"
            raise ValueError(f"{told}: no layer here is in FP8, {expected}")


def _may_cast(info: Mapping[str, Any]) -> bool:
    """Whether a layer computes in FP8, or is TE's, which says so only when it has run."""
    said = [words for uses in info["precision"].values() for words in uses.values()]
    of_te = any(str(one["class"]).startswith("transformer") for one in info["linears"].values())
    return of_te or any("HighPrecision" not in words for words in said)


class _Recent(Excerpt):
    """The rows of the last steps, read like those of a run."""

    def __init__(self, path: Path, info: dict[str, Any], window: int) -> None:
        super().__init__(path, info)
        self._tables: dict[Table, deque[pa.Table]] = {name: deque(maxlen=window) for name in TABLES}
        self._first: list[pa.Table] = []
        self._joined: dict[Table, pa.Table] = {}  # what was asked for since the last step

    def add(self, rows: StepRows, rank: int) -> None:
        """Take in a step's rows."""
        self._joined.clear()
        of_step: dict[Table, list[dict[str, Any]]] = {
            "steps": rows.steps,
            "tensors": rows.tensors,
            "channels": rows.channels,
            "events": rows.events,
        }
        where = {"step": rows.step, "rank": rank}
        for name, found in of_step.items():
            table = pa.Table.from_pylist([where | row for row in found], schema=TABLES[name])
            if name == "steps" and len(self._first) < FIRST_STEPS:
                self._first.append(table)
            else:
                self._tables[name].append(table)

    def arrow(
        self,
        table: Table,
        columns: Names = None,
        *,
        sites: Names = None,
        steps: Numbers = None,
        ranks: Numbers = None,
        coded: bool = False,
    ) -> pa.Table:
        wanted = wanted_of(columns, sites, steps, ranks)
        if table not in self._joined:
            first = self._first if table == "steps" else []
            every = [TABLES[table].empty_table(), *first, *self._tables[table]]
            # In one piece: a table of a piece a step is filtered ten times as slowly.
            self._joined[table] = pa.concat_tables(every).combine_chunks()
        rows = self._joined[table]
        for key in wanted.keys():
            rows = rows.filter(wanted.mask(key, rows[key]))
        schema = schema_of(table, coded)
        names = wanted.names(schema)
        return rows.select(names).cast(pa.schema([schema.field(name) for name in names]))
