"""`experiment.json`: what makes a folder an experiment's, written before its first run.

It holds the question, the prediction, the arms and the settings, which versions of the file made
runs, and by which commands. Runs that were made under another prediction or other settings are
refused: a prediction is written before what it predicts. Rejected: refusing another version of the
file as well. Files are worked on; the page names every version that made a run.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8lab.recipe import shown
from fp8lab.store import RunError

if TYPE_CHECKING:
    from fp8lab.lab.experiment import Experiment, Settings

OTHER = "expected the same, or another folder as --out"


def file_hash(file: Path) -> str:
    """SHA-256 of an experiment's file, its first 16 digits."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def description_of(out: Path, experiment: Experiment, settings: Settings) -> dict[str, Any]:
    """What makes `out` this experiment's folder; `files` are the versions that made its runs,
    `commands` what was typed, as far as it is known.

    Raises RunError if it is another's, or its runs were made under other settings, or before
    another prediction was written.
    """
    file = out / "experiment.json"
    wanted = asdict(settings)
    if settings.parallel is None:
        del wanted["processes"], wanted["parallel"]
    if settings.text is not None:  # where it lies on this machine is nobody's business
        wanted["text"] = Path(settings.text).name
    description = experiment.describe() | {"settings": wanted, "files": [], "commands": []}
    if out.exists() and any(out.iterdir()):
        try:
            text = file.read_text(encoding="utf-8") if file.is_file() else ""
            known = json.loads(text)
            name, earlier = known["name"], dict(known["settings"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError):
            raise RunError(
                f"{out}: exists and holds no experiment, expected a new folder"
            ) from None
        if name != experiment.name:
            raise RunError(f"{out}: holds experiment {shown(name)}, expected {experiment.name!r}")
        usual = asdict(type(settings)())
        if usual | earlier != usual | wanted:
            told = f"{_in_words(earlier, usual)}, not {_in_words(wanted, usual)}"
            raise RunError(f"{out}: holds runs with {told}: {OTHER}")
        for key in ("prediction", "refuted_if"):
            if known.get(key) != description[key]:
                raise RunError(f"{out}: holds runs from before this {key} was written: {OTHER}")
        for key in ("files", "commands"):
            told = known.get(key)
            description[key] = list(told) if isinstance(told, list) else []
    return description


def other_versions(description: dict[str, Any], file: Path) -> str | None:
    """In words, if runs of the folder were made by another version of the file than this one.

    Which of them is not known once several versions have made some.
    """
    made_by, now = description["files"], file_hash(file)
    others = ", ".join(str(one) for one in made_by if one != now)
    if not others:
        return None
    which = "some made by" if now in made_by else "made by"
    told = f"{which} another version of {file.name} (SHA-256 {others}, now {now})"
    return f"{told}: another --out runs it as it is now"


def add_maker(description: dict[str, Any], file: Path, command: str) -> None:
    """This version of the file, and this command, make runs from now on."""
    for name, told in (("files", file_hash(file)), ("commands", command)):
        description[name] = list(dict.fromkeys([*description[name], told]))


def _in_words(settings: dict[str, Any], usual: dict[str, Any]) -> str:
    others = {name: value for name, value in settings.items() if value != usual.get(name)}
    told = ", ".join(f"{name}={shown(value)}" for name, value in sorted(others.items()))
    return told or "the experiment's own settings"


def write_description(out: Path, description: dict[str, Any]) -> None:
    """Write it, whole or not at all, where it is not what stands there."""
    out.mkdir(parents=True, exist_ok=True)
    temporary, text = out / ".experiment.json", json.dumps(description, indent=1) + "\n"
    if (out / "experiment.json").is_file():
        if (out / "experiment.json").read_text(encoding="utf-8") == text:
            return
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(out / "experiment.json")
