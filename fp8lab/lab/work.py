"""What there is to do of an experiment: those of the chosen runs that its folder lacks.

A run that is finished is kept, if it is that of the same arm. What was left unfinished is removed
and done again, but for what somebody is writing, and for what no run writes: that is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fp8lab.failure import TRACEBACK
from fp8lab.plan import named
from fp8lab.recipe import shown
from fp8lab.store import Run, RunError, open_run

if TYPE_CHECKING:
    from fp8lab.lab.arm import Arm
    from fp8lab.lab.experiment import Experiment, Part

_OF_A_RUN = ("run.json", "segments", "ranks", TRACEBACK)  # and its tables: removed with it


class Chosen(NamedTuple):
    """Some runs of an experiment, by name and number; None: whatever the part, arm or seed."""

    parts: frozenset[str] | None
    arms: frozenset[str] | None
    seeds: frozenset[int] | None

    @classmethod
    def of(
        cls,
        parts: Iterable[str] | None,
        arms: Iterable[str] | None,
        seeds: Iterable[int] | None,
    ) -> Chosen:
        return cls(
            None if parts is None else frozenset(parts),
            None if arms is None else frozenset(arms),
            None if seeds is None else frozenset(seeds),
        )

    def has(self, part: str, arm: str, seed: int) -> bool:
        """Whether the run is among them."""
        asked = zip(self, (part, arm, seed), strict=True)
        return all(some is None or one in some for some, one in asked)

    def known_to(self, experiment: Experiment) -> Chosen:
        """These. Raises ValueError for what the experiment has not: a prediction is about the runs
        that its file names, and so is its page."""
        parts = [part for part in experiment.parts if self.parts is None or part.name in self.parts]
        _require(self.parts, "part", [part.name for part in experiment.parts])
        _require(self.arms, "arm", sorted(arm.name for part in parts for arm in part.arms))
        seeds = [seed for part in parts for seed in part.seeds]
        _require(self.seeds, "seed", seeds, ", as the experiment has them")
        asked = self.arms != frozenset() and self.seeds != frozenset()
        if asked and parts and not any(self.has(*run) for run in _runs_of(parts)):
            arms, numbers = (", ".join(map(str, sorted(some or ()))) for some in self[1:])
            raise ValueError(f"arm {arms} with seed {numbers}: expected ones that a part has both")
        return self


def _require(
    wanted: Iterable[str] | Iterable[int] | None, what: str, known: Iterable[object], more: str = ""
) -> None:
    known = list(dict.fromkeys(known))
    unknown = ", ".join(str(one) for one in sorted(wanted or ()) if one not in known)
    if unknown:
        expected = ", ".join(map(str, known))
        raise ValueError(f"{what} {named(unknown)}: expected some of {expected}{more}")


def _runs_of(parts: Iterable[Part]) -> Iterator[tuple[str, str, int]]:
    for part in parts:
        yield from ((part.name, arm.name, seed) for seed in part.seeds for arm in part.arms)


class Work(NamedTuple):
    """A run, or without an arm what is prepared for a part's runs of one seed, in its folder."""

    part: Part
    arm: Arm | None
    seed: int
    path: Path

    @property
    def label(self) -> str:
        """As in "part/arm/seed-0"."""
        return label_of(self.part.name, self.arm.name if self.arm else "prepare", self.seed)

    @property
    def whole_error(self) -> Path:
        """The file in which an error is left."""
        return whole_error(self.arm.name if self.arm else None, self.seed, self.path)

    def clear(self) -> None:
        """Remove what an earlier try has left."""
        self.whole_error.unlink(missing_ok=True)
        if self.arm is not None and self.path.exists():
            shutil.rmtree(self.path)


def label_of(part: str, arm: str, seed: int) -> str:
    """A run in words, which are also its place in the folder."""
    return f"{part}/{arm}/seed-{seed}"


def whole_error(arm: str | None, seed: int, path: Path) -> Path:
    """Where an error is left; what is prepared shares the part's folder with other seeds."""
    return path / (TRACEBACK if arm is not None else f"prepare-seed-{seed}-{TRACEBACK}")


def stages(
    experiment: Experiment, out: Path, chosen: Chosen, quick: bool
) -> tuple[list[Work], list[Work], int]:
    """What parts prepare, all runs without those that are finished, and the number of these.

    Raises RunError for what stands in the way of a run and must not be removed.
    """
    preparations: list[Work] = []
    runs: list[Work] = []
    kept = 0
    for part in experiment.parts:
        seeds = part.seeds if chosen.seeds is None else tuple(sorted({*part.seeds}))
        for seed in seeds[:1] if quick and chosen.seeds is None else seeds:
            todo: list[Work] = []
            for arm in part.arms:
                if not chosen.has(part.name, arm.name, seed):
                    continue
                path = out / label_of(part.name, arm.name, seed)
                if _finished(path, arm):
                    kept += 1
                else:
                    todo.append(Work(part, arm, seed, path))
            if todo and part.prepare is not None:
                preparations.append(Work(part, None, seed, out / part.name))
            runs += todo
    return preparations, runs, kept


def _finished(path: Path, arm: Arm) -> bool:
    """Whether a run is complete. What was left unfinished will be removed, to be done again.

    Raises RunError if it must not be: somebody is writing it, or it holds what no run writes. So it
    does for a finished run that was another arm's.
    """
    if not path.exists() and not path.is_symlink():
        return False
    if not path.is_dir():
        raise RunError(f"{path}: is no folder, expected a run directory or nothing")
    # Without a run.json: its process was killed between two lines of `RunWriter.create`.
    if {child.name for child in path.iterdir()} - {"segments", ".run.json", TRACEBACK}:
        run = open_run(path)
        # Its training may have failed behind the last row.
        if run.state == "finished" and not (path / TRACEBACK).exists():
            _require_same(run, arm)
            return True
        if run.state == "running":
            raise RunError(f"{path}: is being written by process {run.info.get('pid')}")
    for child in sorted(path.iterdir()):
        name = child.name
        if name not in _OF_A_RUN and not name.startswith(".") and child.suffix != ".parquet":
            expected = "expected nothing but the run, which is to be done again"
            raise RunError(f"{path}: holds {shown(name)}, {expected}")
    if path.is_symlink():
        raise RunError(f"{path}: is a link to a run that has to be done again, expected the run")
    return False


def _require_same(run: Run, arm: Arm) -> None:
    config, described = run.info.get("config"), arm.describe()
    for key in ("recipe", "mitigations", "options"):
        if not isinstance(config, dict) or key not in config:
            continue  # from before it was said, or by another's hand
        found, wanted = config[key], described[key]
        if key == "mitigations" and isinstance(found, list) and set(map(type, found)) == {str}:
            wanted = [one["name"] for one in wanted]  # so it was said before
        if found != json.loads(json.dumps(wanted)):
            got, expected = (json.dumps(one)[:300] for one in (found, wanted))
            told = f"a finished run with {key}={got}, expected {expected}, or a new folder"
            raise RunError(f"{run.path}: {told}")
