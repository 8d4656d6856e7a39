"""`bisect`: which operands make a run fail, found by running it again and again.

The proof by intervention. The training is repeated with some operands of some layers switched to
high precision, until the smallest set is known that saves the run; or, the other way round, the
smallest set that breaks a run in high precision. Nothing is concluded from what was recorded: each
answer is a rerun, kept as a run directory.

The operands are put in a row, suspects of the diagnosis first. The shortest beginning of the row
that saves the run is found by halving: its last operand is needed. It is kept switched, and if it
does not suffice alone, the search goes on in the beginning before it. So one guilty operand of n
costs ceil(log2 n) reruns, each further one as many again, and operands that save the run only
together cost no more than others. Then the two GEMMs of each guilty operand are told apart, each
member of a larger set is left out once (so that the set is 1-minimal whatever the runs do, and not
only where more high precision never does harm), and a rerun with all others switched instead tells
whether another set would have done as well. With the two that come first, the plan as it is and all
in high precision, one guilty operand is named within ceil(log2(cells)) + 6 reruns, where a cell is
an operand of one GEMM of one layer, six a layer.

`train` is any callable. It converts with the plan it is given and watches into the path:

    def train(plan, path):
        torch.manual_seed(0)
        model = fp8lab.convert(Model(), plan)
        with fp8lab.watch(model, path) as watch:
            ...

    print(fp8lab.bisect(train, fp8lab.Plan(recipe=fp8lab.DelayedScaling()), path="runs/why"))

Rejected: classic delta debugging (Zeller 2002), which tries the halves and then their complements:
with two culprits it falls back to quarters, eighths, and needs k^2 runs. And trusting the halving
without a rerun of what is left, which a run that is not monotone deceives.
"""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fp8lab.bisection.reruns import Batch, Judge, Rerun, Reruns, Train
from fp8lab.diagnosis import diagnose
from fp8lab.diagnosis.loss import loss_alarm
from fp8lab.diagnosis.not_fp8 import WIDE
from fp8lab.diagnosis.rows import facts_of
from fp8lab.plan import Plan, recipe_to_dict
from fp8lab.recipe import GEMMS, OPERANDS, Gemm, HighPrecision, Operand, shown
from fp8lab.store import Run, RunError, open_run

Direction = Literal["saves", "breaks"]
_AS_GIVEN = "expected train to convert with the plan that it is given"


class Cell(NamedTuple):
    """An operand of one GEMM of one layer."""

    layer: str
    operand: Operand
    gemm: Gemm


@dataclass(frozen=True, kw_only=True)
class Bisection:
    """What a bisection found, and the reruns that show it.

    `guilty` is a smallest set, as `LAYER:OPERAND` or `LAYER:OPERAND@GEMM`: in high precision it
    saves the run ("saves"), alone in FP8 it breaks it ("breaks"), and no member can be left out.
    `unique`: every other set that does so contains it. It is empty where `stopped` says, in a line,
    why there is nothing to find. `cells` is how many operands of GEMMs were in FP8 and in question.
    `path` holds the reruns, each a run directory below `reruns`, and this as JSON.
    """

    path: str
    direction: Direction
    guilty: tuple[str, ...]
    unique: bool | None
    stopped: str | None
    cells: int
    reruns: tuple[Rerun, ...]
    notes: tuple[str, ...] = ()

    @property
    def sites(self) -> tuple[str, ...]:
        """The guilty operands, `LAYER:OPERAND`, whatever their GEMMs."""
        return tuple(dict.fromkeys(one.partition("@")[0] for one in self.guilty))

    @property
    def bound(self) -> int:
        """Within how many reruns one guilty operand is named."""
        return _log2(self.cells) + 6

    def evidence(self, rerun: Rerun) -> Path:
        """The run directory of a rerun."""
        return Path(self.path) / "reruns" / rerun.name

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"sites": list(self.sites), "bound": self.bound}

    def __str__(self) -> str:
        count = f"{len(self.reruns)} reruns"
        if self.stopped is not None:
            lines = [f"{self.path}: {self.stopped}"]
        else:
            names = ", ".join(self.guilty)
            told = f"{names} in high precision: the run is saved"
            if self.direction == "breaks":
                told = f"{names} alone in FP8: a run in high precision breaks"
            lines = [f"{self.path}: {told}", *(f"  {note}" for note in self.notes)]
            within = f" (one site: within {self.bound})" if len(self.sites) == 1 else ""
            count = f"{self.cells} operands of GEMMs in question, {count}{within}"
        width = max(len(one.asked) for one in self.reruns)
        rows = [f"  {one.name}  {one.asked:<{width}}  {one}" for one in self.reruns]
        return "\n".join([*lines, f"  {count}", *rows])


def bisect(
    train: Train | Batch,
    plan: Plan,
    sites: Iterable[str] = ("*",),
    *,
    path: str | Path,
    direction: Direction = "saves",
    judge: Judge = loss_alarm,
    suspects: Iterable[str] | None = None,
    checkpoint: str | Path | None = None,
    high_precision: HighPrecision | None = None,
    about: Mapping[str, Any] | None = None,
    on_start: Callable[[int, str], None] = lambda index, label: None,
    on_end: Callable[[int, str | None], None] = lambda index, error: None,
    on_bound: Callable[[int, int], None] = lambda done, at_most: None,
) -> Bisection:
    """Name the smallest set of operands that, in high precision, saves a run that breaks in FP8.

    `train(plan, path)` trains under a plan and records a run at `path`, the same training at every
    call; with a `checkpoint` it is called `train(plan, path, checkpoint)` and goes on from there,
    which saves the steps before the trouble. `sites` are patterns, `LAYERS` or `LAYERS:OPERAND`, of
    what may be switched, among what the first rerun recorded as converted. With the direction
    "breaks" the set is named that, alone in FP8, breaks a run otherwise in high precision.

    `judge` says of a run at which step it broke (or True), None or False if it did not. A rerun
    that raises counts as broken where its judge says so of what it recorded. `suspects` are sites
    to try first; by default those of the findings on the first rerun. They cost one rerun at most
    and are not needed. `high_precision` is BF16 unless given.

    `path` keeps every rerun; a bisection that was killed goes on there, its outcomes judged again
    from what was recorded. `about` (JSON-able) tells this training from others, such as its seed.
    Of a rerun `on_start` gets number and label, `on_end` number and error; `on_bound` how many are
    done and how many there will be at most, if no further site is guilty.

    Raises ValueError for a pattern that matches nothing; RunError if `path` holds another question
    of which not every rerun failed, or if a rerun records no run, raises without having diverged,
    ends before the plan itself breaks, or, of the first two, is not in the precision of its plan.
    """
    patterns = (sites,) if isinstance(sites, str) else tuple(sites)
    _check(plan, patterns, direction)
    high = high_precision or HighPrecision()
    start = None if checkpoint is None else Path(checkpoint)
    reruns = Reruns(
        folder=Path(path),
        train=train,
        plan=plan,
        high=high,
        checkpoint=start,
        judge=judge,
        question={
            "train": getattr(train, "__qualname__", type(train).__qualname__),
            "plan": recipe_to_dict(plan),
            "sites": list(patterns),
            "high_precision": recipe_to_dict(high),
            "checkpoint": None if start is None else start.name,
            "about": _as_json(dict(about or {})),
        },
        listeners=(on_start, on_end, on_bound),
    )
    return _Search(reruns, direction, patterns, suspects).result()


def _check(plan: Plan, patterns: tuple[str, ...], direction: str) -> None:
    if direction not in ("saves", "breaks"):
        raise ValueError(f"bisect: direction={shown(direction)}, expected 'saves' or 'breaks'")
    for pattern in patterns:
        if not isinstance(pattern, str) or "@" in pattern:
            raise ValueError(f"bisect: site {shown(pattern)}, expected LAYERS or LAYERS:OPERAND")
        Plan(recipe=plan.recipe, overrides={pattern: plan.recipe})  # refuses an unknown operand


def _as_json(about: dict[str, Any]) -> Any:
    """As it will be read again."""
    try:
        return json.loads(json.dumps(about, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        got = f"about={shown(about)}"
        raise ValueError(f"bisect: {got}, expected what JSON can hold") from None


class _Search:
    """A question put to reruns. A site here is the cells of one operand of one layer."""

    def __init__(
        self,
        reruns: Reruns,
        direction: Direction,
        patterns: tuple[str, ...],
        suspects: Iterable[str] | None,
    ) -> None:
        self.reruns, self.direction, self.patterns = reruns, direction, patterns
        self.suspects = None if suspects is None else tuple(suspects)
        self.cells: list[Cell] = []
        self.notes: list[str] = []

    def result(self) -> Bisection:
        """Search, write and return what was found."""
        stopped = self._stopped_at_once()
        guilty, unique = ((), None) if stopped else self._guilty()
        found = Bisection(
            path=str(self.reruns.folder),
            direction=self.direction,
            guilty=guilty,
            unique=unique,
            stopped=stopped,
            cells=len(self.cells),
            reruns=tuple(self.reruns.asked.values()),
            notes=tuple(self.notes),
        )
        self.reruns.results[self.direction] = found.to_dict() | {"path": "."}
        self.reruns.write()
        return found

    def _stopped_at_once(self) -> str | None:
        """Why there is nothing to bisect, None if there is."""
        (base,) = self.reruns.ask({(): "the plan as it is"})
        run = open_run(self.reruns.path(base))
        if not base.broke:
            if self.reruns.is_low and not _low_cells(run):
                raise RunError(f"{run.path}: no layer is in FP8, {_AS_GIVEN}")
            return f"the plan as it is {base}: nothing to bisect"
        self.cells = self._cells_in_question(run)
        if self.suspects is None:
            self.suspects = _suspects_of(run)
        first = {tuple(patterns_of(self.cells)): "all in high precision"}
        (high,) = self.reruns.ask(first)
        place = self.reruns.path(high)
        still_low = set(_low_cells(open_run(place)))
        if kept := [cell for cell in self.cells if cell in still_low]:
            told = (
                f"{patterns_of(kept[:1])[0]} is in FP8 under a plan that has it in high precision"
            )
            raise RunError(f"{place}: {told}, {_AS_GIVEN}")
        if high.broke:
            everywhere = "high precision" if self.patterns == ("*",) else "high precision there"
            late = "" if self.reruns.checkpoint is None else ", or the checkpoint is too late"
            return f"{everywhere} breaks too ({high}): not FP8{late}"
        return None

    def _cells_in_question(self, run: Run) -> list[Cell]:
        """Every operand of a GEMM that the run cast to less than 16 bits and a pattern covers."""
        layers = facts_of(run.info, "precision")
        for pattern in self.patterns:
            if not any(fnmatchcase(layer, pattern.partition(":")[0]) for layer in layers):
                known = ", ".join([*layers][:8]) or "none: nothing was converted"
                raise ValueError(f"bisect: site {shown(pattern)}, expected layers among {known}")
        cells = [
            cell
            for cell in _low_cells(run)
            if any(_covers(pattern, cell.layer, cell.operand) for pattern in self.patterns)
        ]
        if not cells:
            raise ValueError(f"bisect: {run.path}: nothing of {', '.join(self.patterns)} is in FP8")
        return cells

    def _does(self, cells: Iterable[Cell], asked: str) -> bool:
        """Whether these cells do it: in high precision save the run, alone in FP8 break it."""
        return self._do([(cells, asked)])[0]

    def _do(self, sets: Sequence[tuple[Iterable[Cell], str]]) -> list[bool]:
        questions = {}
        for cells, asked in sets:
            chosen = set(cells)
            high = [c for c in self.cells if (c in chosen) == (self.direction == "saves")]
            questions[tuple(patterns_of(high))] = asked
        saves = self.direction == "saves"
        outcomes = dict(zip(questions, self.reruns.ask(questions), strict=True))
        return [outcomes[key].broke != saves for key in questions]

    def _guilty(self) -> tuple[tuple[str, ...], bool]:
        sites: dict[tuple[str, Operand], list[Cell]] = {}
        for cell in self.cells:
            sites.setdefault((cell.layer, cell.operand), []).append(cell)
        row = sorted(sites.values(), key=lambda site: patterns_of(site)[0] not in self._first())
        found = self._smallest(row)
        self.reruns.at_most = len(self.reruns.asked) + (4 if len(found) > 1 else 3) * len(found)
        found = self._without_needless(self._by_gemm(found))
        return tuple(patterns_of(site)[0] for site in found), self._is_unique(found)

    def _first(self) -> tuple[str, ...]:
        return self.suspects or ()

    def _smallest(self, row: list[list[Cell]]) -> list[list[Cell]]:
        """Sites that do it together. `needed` and all of `row` do, at every turn, by a rerun."""
        needed: list[list[Cell]] = []
        middle = sum(patterns_of(site)[0] in self._first() for site in row)
        while row and not (needed and self._does(_joined(needed), _alone(needed))):
            fewer, enough = 0, len(row)
            halvings = _log2(len(row)) + (not needed and 0 < middle < len(row) // 2)
            self.reruns.at_most = len(self.reruns.asked) + halvings + 4 + 3 * len(needed)
            while enough - fewer > 1:
                if needed or not fewer < middle < min(enough, len(row) // 2):
                    middle = (fewer + enough) // 2
                sites = [*needed, *row[:middle]]
                if self._does(_joined(sites), _in_words(sites, len(row))):
                    enough = middle
                else:
                    fewer = middle
            needed.append(row[enough - 1])
            row = row[:fewer]
        return needed

    def _without_needless(self, found: list[list[Cell]]) -> list[list[Cell]]:
        """1-minimal: each was left out, and then the others did not do it."""
        kept = list(found)
        while len(kept) > 1:
            for site in kept:
                rest = [one for one in kept if one is not site]
                if self._does(_joined(rest), f"without {patterns_of(site)[0]}"):
                    kept = rest
                    break
            else:
                self.notes.append(f"{len(kept)} operands together: with one fewer it fails")
                break
        return kept

    def _is_unique(self, found: list[list[Cell]]) -> bool:
        """Whether each set that does it contains these: all the others do not do it."""
        tried = []
        for site in found:
            others = [cell for cell in self.cells if cell not in site]
            tried.append((others, f"all but {patterns_of(site)[0]}"))
        replaced = self._do(tried)
        saves = self.direction == "saves"
        rest = f"all but {'it' if len(found) == 1 else 'one of these'} in "
        rest += "high precision" if saves else "FP8"
        if any(replaced):
            does = "saves the run too" if saves else "breaks it too"
            self.notes.append(f"a set that suffices, not the only one: {rest} {does}")
        else:
            fails = "the run still breaks" if saves else "it survives"
            self.notes.append(f"the only smallest set: with {rest} {fails}")
        return not any(replaced)

    def _by_gemm(self, found: list[list[Cell]]) -> list[list[Cell]]:
        """Sites reduced to one of their GEMMs where that does it."""
        kept = list(found)
        for position, site in enumerate(found):
            if len(site) == 1:
                continue
            tried = [[*kept[:position], [cell], *kept[position + 1 :]] for cell in site]
            names = [patterns_of([cell])[0] for cell in site]
            does = self._do([(_joined(t), n) for t, n in zip(tried, names, strict=True)])
            if any(does):
                kept[position] = [site[does.index(True)]]
            if all(does):
                self.notes.append(f"{patterns_of(site)[0]}: either of its GEMMs suffices")
        return kept


def patterns_of(cells: Iterable[Cell]) -> list[str]:
    """The fewest patterns of `Plan.overrides` that name these cells and nothing else."""
    layers: dict[str, dict[Operand, list[Gemm]]] = {}
    for layer, operand, gemm in cells:
        layers.setdefault(layer, {}).setdefault(operand, []).append(gemm)
    patterns = []
    for layer, operands in layers.items():
        name = glob.escape(layer)
        if sum(map(len, operands.values())) == 2 * len(OPERANDS):
            patterns.append(name)
            continue
        for operand, gemms in operands.items():
            whole = len(gemms) == 2
            patterns += [f"{name}:{operand}"] if whole else [f"{name}:{operand}@{gemms[0]}"]
    return patterns


def _low_cells(run: Run) -> list[Cell]:
    """Every operand of a GEMM that the run cast to less than 16 bits."""
    return [
        Cell(layer, operand, gemm)
        for layer, casts in facts_of(run.info, "precision").items()
        for operand in OPERANDS
        for gemm in GEMMS
        if operand in GEMMS[gemm]
        and str(casts.get(f"{operand}@{gemm}", "BF16")).split(" ")[0] not in WIDE
    ]


def _covers(pattern: str, layer: str, operand: Operand) -> bool:
    layers, _, of = pattern.partition(":")
    return fnmatchcase(layer, layers) and of in ("", operand)


def _suspects_of(run: Run) -> tuple[str, ...]:
    """The operands that the findings on a run name; a product is its down projection's input."""
    sites = run.info.get("sites")
    downs = {}
    for site in sites if isinstance(sites, list) else []:
        if isinstance(site, dict):
            layer = str(site.get("down")).removesuffix(".weight")
            downs[site.get("site")] = f"{site.get('site')}.{layer}".lstrip(".")
    suspects = []
    for finding in diagnose(run).findings:
        module, _, role = (finding.site or "").rpartition(":")
        if role == "product" and module in downs:
            suspects.append(f"{glob.escape(downs[module])}:input")
        elif role in OPERANDS:
            suspects.append(f"{glob.escape(module)}:{role}")
    return tuple(dict.fromkeys(suspects))


def _joined(sites: Iterable[list[Cell]]) -> list[Cell]:
    return [cell for site in sites for cell in site]


def _alone(sites: list[list[Cell]]) -> str:
    return f"{_in_words(sites, 0)}, nothing else"


def _in_words(sites: list[list[Cell]], of: int) -> str:
    names = patterns_of(_joined(sites))
    return ", ".join(names) if len(names) <= 2 else f"{len(sites)} of {of} operands"


def _log2(count: int) -> int:
    """ceil(log2(count)), 0 of nothing."""
    return math.ceil(math.log2(count)) if count > 1 else 0
