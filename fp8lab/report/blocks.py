"""What a document is made of, whatever it is written as: sections of blocks.

A block says what it shows in words and numbers; `page` lays it out as HTML, `markdown` as Markdown.
Everything is text until a writer escapes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fp8lab.report.answer import Answer
from fp8lab.report.story import Unread
from fp8lab.report.tables import Table
from fp8lab.report.verdict import Sighting, Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure, what it shows for those who cannot see it, and what to look for.

    `name` is that of its file, and of the chart that takes its place where a script runs.
    """

    name: str
    figure: Figure
    alt: str
    caption: str
    kind: str = field(default="picture", init=False)


@dataclass(frozen=True)
class Note:
    """A line of text; `missing` where it stands for something that could not be shown."""

    text: str
    missing: bool = False
    kind: str = field(default="note", init=False)


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    texts: list[str]
    kind: str = field(default="points", init=False)


@dataclass(frozen=True)
class Findings:
    """The findings of one arm, folded away under one line."""

    title: str
    found: list[Sighting]
    unfolded: bool
    kind: str = field(default="findings", init=False)


@dataclass(frozen=True)
class Folded:
    """Tables behind one line."""

    title: str
    blocks: list[Table]
    kind: str = field(default="folded", init=False)


Block = Picture | Note | Points | Findings | Folded | Table


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    anchor: str
    title: str
    blocks: list[Block]


@dataclass(frozen=True, kw_only=True)
class Document:
    """All that is told of some runs, in the order of a reader's questions.

    `answer` says whether it is FP8, `counts` how many runs there are and how they ended; `headline`
    is both in one paragraph. A document that answers another question has no `answer`.
    """

    title: str
    answer: Answer | None = None
    counts: str = ""
    headline: str
    unfinished: str
    unread: tuple[Unread, ...]
    verdicts: list[Verdict]
    experiments: tuple[dict[str, Any], ...]
    not_judged: tuple[str, ...]  # of each experiment, as `verdict.not_judged` says
    against: list[str]  # contradicted predictions
    predictions: list[Table]
    sections: list[Section]

    @property
    def nothing_found(self) -> str:
        """What stands where causes would, a sentence without its full stop."""
        told = "No rule saw a cause in what was recorded"
        return f"{told}, and not all was" if self.is_part else told

    @property
    def is_part(self) -> bool:
        """Whether there is, or may come, more than what was judged."""
        return bool(self.unfinished or self.unread)

    def pictures(self) -> dict[str, Picture]:
        """By name, of each the first."""
        blocks = [block for section in reversed(self.sections) for block in section.blocks[::-1]]
        return {block.name: block for block in blocks if isinstance(block, Picture)}
