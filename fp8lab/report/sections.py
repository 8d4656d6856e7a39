"""The document: sections in the order of a reader's questions.

What went wrong, did it go as predicted, how did every run end; then the pictures, from the loss
down to the bits of one tensor; then all findings with their evidence, what does not follow, and
what it takes to do it again. A section that has nothing to show says what is missing, in one line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp8lab.report import pictures, tables
from fp8lab.report.blocks import (
    Block,
    Document,
    Findings,
    Folded,
    Note,
    Picture,
    Points,
    Section,
)
from fp8lab.report.story import (
    Part,
    Place,
    Seen,
    Story,
    clipped_row,
    place_of,
    starved_row,
    weight_rows,
)
from fp8lab.report.verdict import contradictions, headline, sightings, unfinished, verdicts

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def document_of(story: Story) -> Document:
    """All that is told of the story's runs; to be called under `drawing.style`."""
    names = [str(one["name"]) for one in story.experiments] or [run.label for run in story.runs]
    return Document(
        title=", ".join(names[:3]) + (", …" if len(names) > 3 else ""),
        headline=headline(story),
        unfinished=unfinished(story),
        unread=story.unread,
        verdicts=verdicts(story),
        experiments=story.experiments,
        against=[one for part in story.parts for one in contradictions(part)],
        predictions=[
            tables.predictions(part)
            for part in story.parts
            if any(arm.predicted != "open" for arm in part.arms)
        ],
        sections=_sections(story),
    )


def _sections(story: Story) -> list[Section]:
    trained = [part for part in story.parts if not part.is_dose_response]
    worst = story.worst_first()
    shown = worst[0] if worst else None
    place = None if shown is None else place_of(shown)
    return [
        Section("outcomes", "How every run ended", _outcome_blocks(trained)),
        Section("loss", "Loss by arm", [_loss(part) for part in trained] or [_MISSING_TRAINING]),
        Section("timeline", "The timeline of one run", [_timeline(story, shown, place)]),
        Section("weights", "Gate and up rows of the hot channel", [_weights(story, worst)]),
        Section("layers", "Largest product by layer", [_layers(story, shown)]),
        Section("dose", "One channel amplified: the dose response", _dose_blocks(story)),
        Section("range", "The product against the format's range", [_ranges(story, shown, place)]),
        Section("findings", "All findings", _finding_blocks(story)),
        Section("limits", "What does not follow", _limit_blocks(story)),
        Section("provenance", "Provenance", _provenance(story)),
    ]


_MISSING_TRAINING = Note("No training run is here.", missing=True)


def _picture(name: str, drawn: Figure | str, alt: str, caption: str) -> Picture | Note:
    """A drawn figure; or what is missing, in one line."""
    if isinstance(drawn, str):
        return Note(f"Not shown: {drawn}.", missing=True)
    return Picture(name=name, figure=drawn, alt=alt, caption=caption)


def _outcome_blocks(parts: list[Part]) -> list[Block]:
    blocks: list[Block] = []
    for part in parts:
        blocks.append(tables.outcomes(part))
        if len(part.arms) > 1 and any(run.result for run in part.runs):
            blocks.append(tables.mitigations(part))
    return blocks or [_MISSING_TRAINING]


def _loss(part: Part) -> Picture | Note:
    return _picture(
        "losses",
        pictures.losses(part),
        f"Loss of every run of {part.title}, a panel an arm, log scale",
        f"{part.title}. Every line is a run. A diverged run ends in a ×, drawn at the top where "
        f"it is beyond {pictures.LOST:g} times the start.",
    )


def _timeline(story: Story, run: Seen | None, place: Place | None) -> Picture | Note:
    if run is None or place is None:
        return Note("Not shown: no run has a recorded gate product.", missing=True)
    why = (
        "of the runs that diverged, the one whose evidence lies furthest beyond its threshold"
        if run.diverged_at is not None
        else "no run diverged; it is the one with the most to show"
    )
    return _picture(
        "timeline",
        pictures.timeline(run, place),
        f"Alignment, product, staleness, gradient norm and loss of {run.label} by step",
        f"Shown is {_named(story, run)}: {why}. From the top: do the rows of channel "
        f"{place.channel} of {place.module} align, does the product jump, was the scale in force "
        "made without the jump, and when do gradients and loss tell? Where a line is absent, "
        "nothing of it was recorded.",
    )


def _weights(story: Story, worst: list[Seen]) -> Picture | Note:
    """Of the first run that kept its channel's weights twice; else of the first that did once."""
    for needed in (2, 1):
        for run in worst:
            place = place_of(run)
            rows = [] if place is None else weight_rows(run, place)
            if place is not None and len(rows) >= needed:
                return _picture(
                    "weights",
                    pictures.weights(run, rows),
                    f"Gate weights against up weights of channel {place.channel} of {place.module}",
                    f"Channel {place.channel} of {place.module} in {_named(story, run)}: a point "
                    "is an input dimension; first and last step at which these weights were "
                    "recorded. Points on a diagonal mean aligned rows: the product is then a "
                    "square, and grows like one.",
                )
    return Note(
        "Not shown: no run recorded the weights of its hot channel (they are kept when it is the "
        "hottest in a step that is recorded in full).",
        missing=True,
    )


def _layers(story: Story, run: Seen | None) -> Picture | Note:
    amax = None if run is None else run.products.dropna(subset="cur_amax")
    if run is None or amax is None or amax.empty:
        return Note("Not shown: no gate product was recorded.", missing=True)
    late = int(amax.nlargest(1, "cur_amax").iloc[0]["step"])
    early = int(amax["step"].min())
    twin = story.twin_of(run)
    runs = [run] if twin is None else [run, twin]
    return _picture(
        "layers",
        pictures.layers([(_named(story, one), one) for one in runs], early, late),
        "Largest magnitude of the product in every layer, early and late",
        f"Largest magnitude of each gate product at {run.when(early)} and at {run.when(late)}, "
        f"where {_named(story, run)} has its largest"
        + ("." if twin is None else "; beside it the same steps in high precision."),
    )


def _dose_blocks(story: Story) -> list[Block]:
    blocks: list[Block] = []
    for part in story.parts:
        if part.is_dose_response:
            blocks += _dose_part(part)
    missing = Note(
        "Not shown: no dose-response run is here (an experiment's matter).", missing=True
    )
    return blocks or [missing]


def _dose_part(part: Part) -> list[Block]:
    run = next(run for run in part.runs if run.doses)
    ratios = run.products.dropna(subset="channel_ratio")
    site = "" if ratios.empty else str(ratios.nlargest(1, "channel_ratio").iloc[0]["site"])
    return [
        _picture(
            "doses",
            pictures.doses(part, site),
            "Loss, gradient cosine, bulk error and flushed share against amplification, by arm",
            f"{part.title}. But for clamps its function is the same at every dose; the range of "
            f"{site} grows. Bold: mean over seeds; faint: each seed.",
        ),
        Folded(
            "The numbers",
            [
                tables.dose_numbers(part, "loss", "Loss"),
                tables.dose_numbers(part, "gradient_cosine", "Gradient cosine"),
            ],
        ),
    ]


def _ranges(story: Story, run: Seen | None, place: Place | None) -> Picture | Note:
    shown = []
    if run is not None and place is not None:
        row = clipped_row(run, place)
        shown += [] if row is None else [(run, row)]
    starved = starved_row(story.runs)
    if starved is not None and starved[0] is not run:
        shown.append(starved)
    if not shown:
        return Note(
            "Not shown: no step was recorded in full in which a product was cast with one scale.",
            missing=True,
        )
    titled = [
        (
            f"{_named(story, one)}, {one.when(int(row['step']))}: {row['site']}, {row['format']}, "
            f"{row['recipe']}",
            row,
        )
        for one, row in shown
    ]
    return _picture(
        "ranges",
        pictures.ranges(titled),
        "Histograms of the product by magnitude over the representable range of its format",
        "Magnitudes of one step's product, four bins an octave, over what the format can hold at "
        "the scale in force. A scale made without the largest values saturates them; a scale made "
        "by them alone pushes all others below the format's normal range. Shares are of elements.",
    )


def _finding_blocks(story: Story) -> list[Block]:
    found = sightings(story)
    blocks: list[Block] = []
    for part in story.parts:
        for arm in part.arms:
            mine = [one for one in found if one.part is part and one.arm is arm]
            if mine:
                where = f"{part.title}: {arm.title}" if len(story.parts) > 1 else arm.title
                runs = len({one.run.label for one in mine})
                title = f"{where}: findings in {runs} of {len(arm.runs)} runs"
                blocks.append(Findings(title, mine, unfolded=not blocks))
    return blocks or [Note("Nothing found.")]


def _limit_blocks(story: Story) -> list[Block]:
    limits = [str(one) for experiment in story.experiments for one in experiment["limits"]]
    if limits:
        return [Points(limits)]
    text = "Nothing was written down about limits: these runs belong to no experiment."
    return [Note(text, missing=True)]


def _provenance(story: Story) -> list[Block]:
    facts: dict[str, dict[str, None]] = {}
    for run in story.runs:
        info = run.run.info
        versions = info.get("versions") or {}
        values = {
            "versions": ", ".join(f"{name} {value}" for name, value in versions.items()),
            "machine": info.get("machine"),
            "command": info.get("command"),
            "text": run.config.get("text"),
            "SHA-256 of the text": run.config.get("text_sha256"),
        }
        for name, value in values.items():
            if value:
                facts.setdefault(name, {})[str(value)] = None
    for experiment in story.experiments:
        name = experiment["name"]
        again = f"fp8lab run {name} --out {name}; fp8lab report {name} -o {name}.html"
        facts.setdefault("to do it again", {})[again] = None
    rows = [(tables.Cell(name), tables.Cell(" · ".join(values))) for name, values in facts.items()]
    arms = [
        tables.precision(arm, f"{part.title}: {arm.title}")
        for part in story.parts
        for arm in part.arms
        if arm.runs
    ]
    return [
        tables.Table(head=("what", "recorded"), rows=rows),
        Folded("Precision in force: every layer and operand of every arm", arms),
        Folded("Every run", [tables.recorded_runs(story)]),
    ]


def _named(story: Story, run: Seen) -> str:
    """A run as a caption names it: its arm's title and its seed, if it has them."""
    for part in story.parts:
        for arm in part.arms:
            if run in arm.runs and arm.title != run.label:
                return f"{arm.title}, seed {run.seed}" if run.seed != "" else arm.title
    return f"run {run.label}"
