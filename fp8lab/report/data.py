"""The document as data: what a page says, for a program.

Every block is a mapping with its `kind`; tables are rows of text as they are shown, findings have
their evidence as numbers, of a picture there is what it shows and not the picture. A field that a
block gains is here without a line of code. The alternative, a format of its own beside the page,
would sooner or later say something else than the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from fp8lab.report.blocks import Document, Note, Picture
from fp8lab.report.story import Arm, Part, Seen
from fp8lab.report.tables import Cell


def as_data(document: Document) -> dict[str, Any]:
    """What json can write: the document's fields, its sections by their anchors, and under
    `missing` every line that stands for something that could not be shown."""
    told: dict[str, Any] = _plain(document)
    told["sections"] = {section.pop("anchor"): section for section in told["sections"]}
    told["missing"] = [
        block.text
        for section in document.sections
        for block in section.blocks
        if isinstance(block, Note) and block.missing
    ]
    return told


def _plain(value: Any) -> Any:
    if isinstance(value, Cell):
        return value.text
    if isinstance(value, Seen):
        return value.label
    if isinstance(value, Part | Arm):
        return value.title
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if is_dataclass(value):
        named = {field.name: getattr(value, field.name) for field in fields(value)}
        if isinstance(value, Picture):
            del named["figure"]
        return _plain(named)
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value
