"""An error in one line: its type, the first line of what it says, and where in the user's code.

A training breaks somewhere in torch, and its author looks for the line of his own that led there:
the innermost of the traceback that is neither fp8lab's nor an installed library's. Its file goes by
its name alone, for a run that tells of the error is passed on to others.

Rejected: the innermost line of all, which is a library's as a rule.
"""

from __future__ import annotations

import traceback
from pathlib import Path

_OWN = Path(__file__).resolve().parent
_SHIPPED = _OWN / "_experiments"  # these travel in the wheel, and are read like anybody's
_STANDARD = Path(traceback.__file__).resolve().parent
_INSTALLED = {"site-packages", "dist-packages"}


def in_one_line(error: BaseException) -> str:
    """Such as "RuntimeError: it broke (mine.py:12)"; without a place where no code but a library's
    was under way."""
    reason = (str(error).strip().splitlines() or [""])[0]
    told = f"{type(error).__name__}: {reason}".removesuffix(": ")
    frames = traceback.extract_tb(error.__traceback__)
    places = [
        f"{Path(one.filename).name}:{one.lineno}" for one in frames if _is_users(one.filename)
    ]
    return " ".join([told, *(f"({place})" for place in places[-1:])])


def _is_users(file: str) -> bool:
    try:
        path = Path(file).resolve()
        if not path.is_file():
            return False
    except (OSError, ValueError):  # generated code may call its file anything, of any length
        return False
    of_library = path.is_relative_to(_OWN) or path.is_relative_to(_STANDARD)
    of_library = of_library or not _INSTALLED.isdisjoint(path.parts)
    return path.is_relative_to(_SHIPPED) or not of_library
