"""The document: sections in the order of a reader's questions.

What went wrong, did it go as predicted, how did every run end, what does each remedy cost; then the
pictures, from the loss down to the bits of one tensor; what other recipes would have done; then all
findings with their evidence, what does not follow, and what it takes to do it again. What cannot be
shown is one line of the last section, with the reason, and leaves no hole where it would have been.

Of many runs the pictures of one are shown: of those that diverged the one with the worst finding,
see `Story.worst_first`. Each caption says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fp8lab.report import pictures, pictures_of_casts, pictures_of_layers, tables
from fp8lab.report.answer import answer_of, named
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
from fp8lab.report.picked import clipped_row, dose_rows, starved_row, weight_rows
from fp8lab.report.provenance import provenance
from fp8lab.report.story import Part, Place, Seen, Story, place_of
from fp8lab.report.tables import meaning_of
from fp8lab.report.verdict import (
    contradictions,
    counts,
    not_judged,
    sightings,
    unfinished,
    verdicts,
)
from fp8lab.report.what_if import what_if

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def document_of(story: Story) -> Document:
    """All that is told of the story's runs; to be called under `drawing.style`."""
    answer, counted = answer_of(story), counts(story)
    names = [str(one["name"]) for one in story.experiments] or [run.label for run in story.runs]
    return Document(
        title=", ".join(names[:3]) + (", …" if len(names) > 3 else ""),
        answer=answer,
        counts=counted,
        headline=f"{answer} {counted}",
        unfinished=unfinished(story),
        unread=story.unread,
        verdicts=verdicts(story),
        experiments=story.experiments,
        not_judged=tuple(map(not_judged, story.experiments)),
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
    sections = [
        Section("outcomes", "How every run ended", _outcome_blocks(trained)),
        Section("loss", "Loss and gradient norm", _losses(trained)),
        Section("timeline", "The timeline of one run", [_timeline(story, shown, place)]),
        Section("heat", "Every layer, step by step", [_heat(story, shown)]),
        Section("channels", "The hot channels", [_channels(story, shown, place)]),
        Section("weights", "Gate and up of the hot channel", [_weights(story, worst)]),
        Section("layers", "Largest product by layer", [_layers(story, shown)]),
        Section("range", "The product against the format's range", [_ranges(story, shown, place)]),
        Section("twin", "Beside its twin in high precision", [_twin(story, worst)]),
        Section("dose", "One channel amplified: the dose response", _dose_blocks(story)),
        Section("whatif", "What other recipes would have met", _what_if(story, shown)),
        Section("findings", "All findings", _finding_blocks(story)),
        Section("limits", "What does not follow", _limit_blocks(story)),
        Section("words", "What the words mean", [Points(WORDS)]),
        Section("provenance", "Provenance", provenance(story)),
    ]
    return _with_the_missing_last(sections)


def _with_the_missing_last(sections: list[Section]) -> list[Section]:
    """Sections that have something to show; of the others, one that says what they lack."""
    shown, missing = [], []
    for section in sections:
        notes = [block for block in section.blocks if isinstance(block, Note) and block.missing]
        if len(notes) < len(section.blocks):
            shown.append(section)
            continue
        for text in dict.fromkeys(note.text.removeprefix(_NOT_SHOWN) for note in notes):
            missing.append(Note(f"{section.title}: {text}", missing=True))
    if missing:
        shown.append(Section("missing", "What is not shown, and why", list(missing)))
    return shown


# Statistics that go by the names of their columns; the schema says what they are.
_COLUMNS = (
    *("crest", "kurtosis", "coincidence", "dynamic_range", "channel_ratio", "token_ratio"),
    *("subnormal", "sqnr_db", "cosine", "gemm_error", "update_ratio", "rms_t"),
)
WORDS = [
    "gate, up, product, down: of a gated feed-forward, down(act(gate) ⊙ up); the product is "
    "what down takes, and a channel is one of its columns.",
    "amax: the largest magnitude of a tensor. Staleness: amax now over the amax that the "
    "delayed scale was made for; beyond 1 the largest values are clipped (saturated).",
    "flushed: the share of what is not zero that the cast makes zero. Bulk error: the "
    "relative error of the cast outside outlier channels, which the error of the whole hides.",
    "alignment: cosine of a channel's gate row and up row; control: that of the same gate row "
    "with another up row, what chance gives. Amplification: how much more peaked the product is "
    "than the more peaked of its factors.",
    "twin: the same training in high precision, of the same seed. Dose: the power of two by "
    "which one channel was amplified; gradient cosine: between the gradient and the exact one.",
    "the loss told, the loss's own alarm: the first step at which the loss itself says that "
    "something is wrong; a lead is how many steps before that a finding was there.",
    "loss gap: the final loss less that of the arm compared with. common_loss: the loss "
    "without the rare tokens, whose error is the rare error.",
    "function kept or changed: whether a mitigation leaves the trained function what it was.",
    "By the names of their columns: "
    + "; ".join(f"{name} = {meaning_of(name)}" for name in _COLUMNS)
    + ".",
]
_NOT_SHOWN = "Not shown: "
_NO_RUN = "no run is here"
_MISSING_TRAINING = Note("no training run is here.", missing=True)


def _picture(name: str, drawn: Figure | str, alt: str, caption: str) -> Picture | Note:
    """A drawn figure; or what is missing, in one line."""
    if isinstance(drawn, str):
        return _missing(drawn)
    return Picture(name=name, figure=drawn, alt=alt, caption=caption)


def _missing(why: str) -> Note:
    return Note(f"{_NOT_SHOWN}{why}.", missing=True)


def _outcome_blocks(parts: list[Part]) -> list[Block]:
    blocks: list[Block] = []
    for part in parts:
        if not part.runs:
            blocks.append(_missing(f"{part.title}: none of its runs is here"))
            continue
        blocks.append(tables.outcomes(part))
        if len(part.arms) > 1 and any(run.result for run in part.runs):
            blocks.append(tables.mitigations(part))
    return blocks or [_MISSING_TRAINING]


def _losses(parts: list[Part]) -> list[Block]:
    return [_loss(part) for part in parts if part.runs] or [_MISSING_TRAINING]


def _loss(part: Part) -> Picture | Note:
    drawn = pictures.losses(part)
    return _picture(
        "losses",
        f"{part.title}: {drawn}" if isinstance(drawn, str) else drawn,
        f"Loss and gradient norm of every run of {part.title}, two panels an arm, log scale",
        f"{part.title}. Every line is a run, its gradient norm below its loss. A diverged run ends "
        f"in a ×, drawn at the top where it is beyond {pictures.LOST:g} times the start; ▽ is the "
        "first step that a finding above “low” names, □ the one at which the loss itself told."
        + _not_finite(part.runs),
    )


def _not_finite(runs: Sequence[Seen], place: Place | None = None) -> str:
    """What a line leaves out: in how many steps a number that was recorded is none."""
    common = all("common_loss" in run.steps for run in runs)
    named = {"common_loss" if common else "loss": "the loss", "grad_norm": "the gradient norm"}
    steps = {name: sum(run.not_finite(column) for run in runs) for column, name in named.items()}
    if place is not None:
        amaxes = [run.products.loc[run.products["site"] == place.site, "cur_amax"] for run in runs]
        steps["the product"] = sum(int((~np.isfinite(amax)).sum()) for amax in amaxes)
    said = [f"{name} in {count} step{'s' * (count > 1)}" for name, count in steps.items() if count]
    return f" Not finite, and not drawn: {', '.join(said)}." if said else ""


def _timeline(story: Story, run: Seen | None, place: Place | None) -> Picture | Note:
    if run is None or place is None:
        return _missing("no run has a gate product whose channels were recorded")
    why = (
        "of the runs that diverged, the one whose evidence lies furthest beyond its threshold"
        if run.diverged_at is not None
        else "no run diverged; it is the one with the most to show"
    )
    return _picture(
        "timeline",
        pictures.timeline(run, place),
        f"Alignment, amplification, product, staleness, what the cast lost, gradient norm and loss "
        f"of {run.label}, by step",
        f"Shown is {named(story, run)}: {why}. From the top: do the rows of channel "
        f"{place.channel} of {place.module} align, does multiplying them amplify their peaks, does "
        "the product jump, was the scale in force made without the jump, what did the cast lose, "
        "and when do gradients and loss tell? Where a line is absent, or runs straight past steps, "
        "nothing of it was recorded." + _not_finite([run], place),
    )


def _heat(story: Story, run: Seen | None) -> Picture | Note:
    statistic = None if run is None else pictures_of_layers.telling_statistic(run)
    if run is None or statistic is None:
        return _missing("no gate product was recorded")
    return _picture(
        "heat",
        pictures_of_layers.heat(run, statistic),
        f"{statistic} of the gate product by layer and step in {run.label}",
        f"{statistic} in {named(story, run)}: {meaning_of(statistic)}. A row is a layer, a column "
        f"the largest of its steps, at most {pictures_of_layers.MAP_COLUMNS} columns; hatched "
        "where nothing was recorded. ▽ marks where and since when a finding above “low” is.",
    )


def _channels(story: Story, run: Seen | None, place: Place | None) -> Picture | Note:
    if run is None or place is None:
        return _missing("no run has a gate product whose channels were recorded")
    return _picture(
        "channels",
        pictures_of_layers.channels(run, place),
        f"Largest product and alignment of the hot channels of {place.module} by step",
        f"{named(story, run)}: channel {place.channel}, bold, and the channels of {place.module} "
        "with the largest products beside it, over the layer's median channel. A line has gaps "
        "where its channel was not among those recorded.",
    )


def _weights(story: Story, worst: list[Seen]) -> Picture | Note:
    """Of the first run that kept its channel's weights twice; else of the first that did once, or
    has the channels of its peak alone."""
    for needed in (2, 1, 0):
        for run in worst:
            place = place_of(run)
            if place is None:
                continue
            rows, peak = weight_rows(run, place), pictures_of_layers.peak_rows(run, place)
            if len(rows) >= needed and (rows or len(peak)):
                return _weights_picture(story, run, place, rows, peak)
    return _missing(
        "no run recorded the weights of its hot channel (they are kept when it is the hottest in a "
        "step that is recorded in full)"
    )


def _weights_picture(
    story: Story, run: Seen, place: Place, rows: list[pd.Series], peak: pd.DataFrame
) -> Picture:
    told = f"Channel {place.channel} of {place.module} in {named(story, run)}. "
    if rows:
        told += (
            "A point is an input dimension, at the first and the last step at which these weights "
            "were recorded; the ring is on the one with the largest gate × up. Points on a "
            "diagonal mean aligned rows: the product is then a square, and grows like one. "
        )
    if len(peak):
        told += (
            "By channel: the largest gate against the largest up of each recorded channel in the "
            f"step in which channel {place.channel}, ×, has its largest product; ◆ is the channel "
            "whose product is the largest then. On the dashed line gate × up is the product of ×: "
            "near it both were largest in the same element, beyond it they were not."
        )
    return Picture(
        name="weights",
        figure=pictures_of_layers.weights(run, rows, peak),
        alt=f"Gate weights against up weights of channel {place.channel} of {place.module}",
        caption=told.strip(),
    )


def _layers(story: Story, run: Seen | None) -> Picture | Note:
    amax = None if run is None else run.products.dropna(subset="cur_amax")
    if run is None or amax is None or amax.empty:
        return _missing("no gate product was recorded")
    late = int(amax.nlargest(1, "cur_amax").iloc[0]["step"])
    early = int(amax["step"].min())
    twin = story.twin_of(run)
    runs = [run] if twin is None else [run, twin]
    return _picture(
        "layers",
        pictures_of_layers.layers([(named(story, one), one) for one in runs], early, late),
        "Largest magnitude of the product in every layer, early and late",
        f"Largest magnitude of each gate product at {run.when(early)}"
        + ("" if late == early else f" and at {run.when(late)}")
        + f", where {named(story, run)} has its largest"
        + ("." if twin is None else "; beside it the same steps in high precision."),
    )


def _dose_blocks(story: Story) -> list[Block]:
    blocks: list[Block] = []
    for part in story.parts:
        if part.is_dose_response:
            blocks += _dose_part(part)
    return blocks or [_missing("no dose-response run is here (an experiment's matter)")]


def _dose_part(part: Part) -> list[Block]:
    found = dose_rows(part)
    return [
        _picture(
            "doses",
            pictures_of_casts.doses(found),
            "Loss, gradient cosine, bulk error and flushed share against amplification, by arm",
            f"{part.title}. But for clamps its function is the same at every dose; the range of "
            f"{found.site} grows. Bold: mean over seeds; faint: each seed.",
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
        return _missing("no step was recorded in full in which a product was cast with one scale")
    titled = [
        (
            f"{named(story, one)}, {one.when(int(row['step']))}: {row['site']}, {row['format']}, "
            f"{row['recipe']}",
            row,
        )
        for one, row in shown
    ]
    return _picture(
        "ranges",
        pictures_of_casts.ranges(titled),
        "Histograms of the product by magnitude over the representable range of its format",
        "Magnitudes of one step's product, four bins an octave, over what the format can hold at "
        "the scale in force. A scale made without the largest values saturates them; a scale made "
        "by them alone pushes all others below the format's normal range. Shares are of elements.",
    )


def _twin(story: Story, worst: list[Seen]) -> Picture | Note:
    """Of the first run that has one."""
    for run in worst:
        other, place = story.twin_of(run), place_of(run)
        if other is None or run.doses:
            continue
        parted = run.diagnosis.divergence
        site = parted.site if parted is not None else "" if place is None else place.site
        lost = run.diverged_at
        until = "" if lost is None else f", until the run diverged at {run.when(lost)}"
        told = "Of the tensors that both recorded, none parted for long by more than rounding does"
        told += f"{until}."
        if parted is not None:
            told = (
                f"They first parted by more than rounding explains at step {parted.step} at "
                f"{parted.site}: l2 norm {tables.number(parted.here)}, the twin's "
                f"{tables.number(parted.there)}. Which of the two is right, this does not say."
            )
        return _picture(
            "twin",
            pictures.twin(run, other, site, parted),
            f"Loss and l2 norm of {site} of {run.label} and of its twin in high precision, by step",
            f"{named(story, run)} and the same training in high precision. {told}",
        )
    return _missing(
        "no run has a twin, a run of the same training in high precision; with one the page could "
        "say whether it goes wrong without FP8 too"
    )


def _what_if(story: Story, run: Seen | None) -> list[Block]:
    told = _NO_RUN if run is None else what_if(run, named(story, run))
    return [_missing(told)] if isinstance(told, str) else [*told]


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
    return [_missing("nothing was written down: these runs belong to no experiment")]
