"""An error in one line: its type, the first line of what it says, and where in the user's code; and
whole, as a file.

A training breaks somewhere in torch, and its author looks for the line of his own that led there:
the innermost of the traceback that is neither fp8lab's nor an installed library's. Its file goes by
its name alone, for a run that tells of the error is passed on to others.

Where several lines are said, the rest is in the file, with the way that led there. It names files
as they lie on this machine, for its reader is who can mend them.

Rejected: the innermost line of all, which is a library's as a rule.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TRACEBACK = "traceback.txt"  # in the folder of a run whose training failed

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


@contextmanager
def left_in(file: Path, heading: str = "") -> Iterator[None]:
    """Leave an error that ends the block in `file`, behind what other processes left; it goes on.

    The file's folder is made where it is missing. A disk that takes nothing hides no error.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as whole:
                whole.write(heading + "".join(traceback.format_exception(error)))
        raise


def and_where(error: str, file: Path) -> str:
    """The line, and the file that has all of the error, if there is one."""
    return f"{error}; all of the error is in {file}" if file.is_file() else error


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
