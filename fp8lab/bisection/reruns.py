"""A folder of reruns of one training, each under another plan, done once and kept.

    PATH/bisection.json         the question, every rerun that is finished, what was found
    PATH/reruns/rerun-NNN/      a run, see `store`

A rerun enters the index when it is over; one that was killed stays where it is, and the next gets
another number: nothing is ever removed or written twice. A folder in which reruns were begun and
none is finished answers no question yet, and takes another; where that of the plan as it is alone
is, other sites. Of one that raised, all of the error is in its folder, in `traceback.txt`. Outcomes
are judged from the run directories whenever the folder is opened, so that index and evidence cannot
disagree.

An error is not an outcome. A rerun that raises counts only where what it recorded had diverged by
then, and one that survived must have come as far as the step at which the plan itself breaks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from fp8lab.failure import TRACEBACK, and_where, left_in
from fp8lab.plan import Plan
from fp8lab.recipe import HighPrecision, Recipe, shown
from fp8lab.runs import BISECTION
from fp8lab.store import Run, RunError, open_run

Train = Callable[..., object]  # (plan, path), or (plan, path, checkpoint)
Judge = Callable[[Run], int | bool | None]


@runtime_checkable
class Batch(Protocol):
    """What trains several plans at once, in processes of its own."""

    def rerun_all(
        self, plans: Mapping[Path, Plan], on_end: Callable[[Path, str | None], None]
    ) -> None:
        """Record a run under each plan at its path; tell its end, with the error in one line."""


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """One training of a bisection: what was in high precision, what became of it.

    `high_precision` are patterns of `Plan.overrides`; `step` is where it broke, where the judge
    says; `last_step` the last that was recorded; `error` what the training raised where it broke.
    """

    name: str
    asked: str
    high_precision: tuple[str, ...]
    broke: bool
    step: int | None
    last_step: int
    error: str | None = None

    def __str__(self) -> str:
        if not self.broke:
            return f"survived to step {self.last_step}"
        return "broke" if self.step is None else f"broke at step {self.step}"


class Reruns:
    """The reruns of a folder: done once each, indexed, judged."""

    def __init__(
        self,
        *,
        folder: Path,
        train: Train | Batch,
        plan: Plan,
        high: HighPrecision,
        checkpoint: Path | None,
        judge: Judge,
        question: dict[str, Any],
        listeners: tuple[Callable[..., None], ...],
    ) -> None:
        self.folder, self.plan, self.high, self.question = folder, plan, high, question
        self.train, self.checkpoint, self.judge = train, checkpoint, judge
        self.on_start, self.on_end, self.on_bound = listeners
        self.known: dict[tuple[str, ...], Rerun] = {}
        self.asked: dict[tuple[str, ...], Rerun] = {}  # by this bisection, in its order
        self.results: dict[str, Any] = {}
        self.at_most = 2
        self._open()

    def _open(self) -> None:
        """Take over what an earlier bisection of the same question has done."""
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return
        theirs, earlier = self._read()
        others = {child.name for child in self.folder.iterdir()} - {BISECTION, "reruns"}
        # A checkpoint, say, is that of its own question; one without a rerun may be under way; the
        # plan as it is, is that of all sites.
        is_held = bool(earlier or others or not self._places())
        asked = set(self.question) if is_held else set()
        if self._places() and not any(one.high_precision for one in earlier):
            asked.discard("sites")
        for key in (one for one in self.question if one in asked):
            mine, other = self.question[key], theirs.get(key)
            if mine != other:
                told = f"holds a bisection with {key} {shown(other)}, expected {shown(mine)}"
                raise RunError(f"{self.folder}: {told}")
        for place in self._places():
            try:
                running = open_run(place).state == "running"
            except RunError:  # its process was killed before it had begun
                continue
            if running:
                raise RunError(f"{place}: is being written by another process")
        for one in earlier:
            try:
                self.known[one.high_precision] = self._judged(
                    one.name, one.asked, one.high_precision, one.error
                )
            except (RunError, OSError):
                pass  # its evidence is gone: it is done again

    def _read(self) -> tuple[dict[str, Any], list[Rerun]]:
        try:
            index = json.loads((self.folder / BISECTION).read_text(encoding="utf-8"))
            question, self.results = dict(index["question"]), dict(index["results"])
            reruns = [
                Rerun(**one | {"high_precision": tuple(map(str, one["high_precision"]))})
                for one in index["reruns"]
            ]
            if all(Path(one.name).name == one.name for one in reruns):
                return question, reruns
        except (OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError):
            pass
        raise RunError(f"{self.folder}: exists and holds no bisection, expected a new folder")

    def _places(self) -> list[Path]:
        folder = self.folder / "reruns"
        return sorted(folder.iterdir()) if folder.is_dir() else []

    def write(self) -> None:
        """The index, by one rename."""
        reruns = [asdict(one) for one in self.known.values()]
        content = {"question": self.question, "reruns": reruns, "results": self.results}
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{BISECTION}"
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.folder / BISECTION)

    def path(self, rerun: Rerun) -> Path:
        return self.folder / "reruns" / rerun.name

    def ask(self, questions: Mapping[tuple[str, ...], str]) -> list[Rerun]:
        """What becomes of the run with these patterns in high precision, each asked in words."""
        numbers = [int(p.name[6:]) for p in self._places() if p.name[6:].isdecimal()]
        number = max(numbers, default=-1)
        todo: dict[Path, tuple[tuple[str, ...], str]] = {}
        for patterns, asked in questions.items():
            if patterns not in self.known:
                number += 1
                todo[self.folder / "reruns" / f"rerun-{number:03}"] = patterns, asked
        if todo:
            self.write()
            self._do(todo)
        for patterns, asked in questions.items():
            if patterns not in self.asked:
                self.asked[patterns] = replace(self.known[patterns], asked=asked)
            self._refuse_ended_early(self.asked[patterns])
        self.on_bound(len(self.asked), max(self.at_most, len(self.asked)))
        return [self.asked[patterns] for patterns in questions]

    def _do(self, todo: dict[Path, tuple[tuple[str, ...], str]]) -> None:
        indices = {path: int(path.name[6:]) for path in todo}
        failed: list[Exception] = []

        def ended(path: Path, error: str | None) -> None:
            patterns, asked = todo[path]
            told = error
            try:
                rerun = self._judged(path.name, asked, patterns, error)
            except (RunError, OSError) as reason:
                whole = and_where(f"{path}: {asked}: {error or reason}", path / TRACEBACK)
                failed.append(RunError(whole))
                told = str(failed[-1])
            else:
                self.known[patterns] = rerun
                self.write()
                told = None
            self.on_end(indices[path], told)

        for path, (_, asked) in todo.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.on_start(indices[path], f"{path.name}: {asked}")
        plans = {path: self.switched(patterns) for path, (patterns, _) in todo.items()}
        if isinstance(self.train, Batch):
            self.train.rerun_all(plans, ended)
        else:
            for path, plan in plans.items():
                ended(path, self._trained(plan, path))
                if failed:
                    break
        if failed:
            raise failed[0]

    def _trained(self, plan: Plan, path: Path) -> str | None:
        more = () if self.checkpoint is None else (self.checkpoint,)
        try:
            assert not isinstance(self.train, Batch)
            with left_in(path / TRACEBACK):
                self.train(plan, path, *more)
        except Exception as error:  # whatever a training raises
            reason = (str(error).strip().splitlines() or [""])[0]
            return f"{type(error).__name__}: {reason}".removesuffix(": ")
        return None

    @property
    def is_low(self) -> bool:
        """Whether the plan as it is puts anything into FP8, in a layer that it names."""
        recipes = (self.plan.recipe, *self.plan.overrides.values())
        return not all(isinstance(one, HighPrecision) for one in recipes)

    def switched(self, patterns: Sequence[str]) -> Plan:
        """The plan with these in high precision: last among its overrides, for the last one wins"""
        kept = {key: r for key, r in self.plan.overrides.items() if key not in patterns}
        added: dict[str, Recipe] = dict.fromkeys(patterns, self.high)
        return replace(self.plan, overrides=kept | added)

    def _judged(self, name: str, asked: str, patterns: tuple[str, ...], error: str | None) -> Rerun:
        """The outcome of a finished rerun. Raises RunError where what it left tells nothing."""
        run = open_run(self.folder / "reruns" / name)
        if run.state == "running":
            raise RunError("its run is still open, expected train to leave its `with`")
        steps = run.steps("loss")["step"]
        if not len(steps):
            raise RunError("its run has no steps")
        said = self.judge(run)
        broke = said is not None and said is not False
        if not broke and (error is not None or run.state != "finished"):
            raise RunError(f"its run is {run.state} and did not diverge")
        step = None if said is None or isinstance(said, bool) else int(said)
        return Rerun(
            name=name,
            asked=asked,
            high_precision=patterns,
            broke=broke,
            step=step,
            last_step=int(steps.max()),
            error=error,
        )

    def _refuse_ended_early(self, rerun: Rerun) -> None:
        base = self.asked.get(())
        if base is None or base.step is None or rerun.broke or rerun.last_step >= base.step:
            return
        expected = f"expected to reach step {base.step}, at which the plan as it is breaks"
        raise RunError(f"{self.path(rerun)}: ended at step {rerun.last_step}, {expected}")
