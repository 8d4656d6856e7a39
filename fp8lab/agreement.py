"""What the processes of one training say to each other without waiting for anybody.

Through the store by which they found each other: whoever says a thing first leaves it there, and
who comes later compares. So nobody can hang, whichever processes ask; but who comes first cannot
know, and has to ask again (`said_of`) when something has failed. Processes that say the same, which
is all of them but in a mismatch or where layers are spread out, compare one hash.

Rejected: a collective, which waits for ever where one process alone converts or watches.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_times: Counter[str] = Counter()  # how often this process has said something at a place


class UnlikeError(ValueError):
    """Processes that should do the same do not; the line names them."""


def rank_of() -> int:
    """This process's number in torch.distributed, 0 without."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes torch.distributed has, 1 without."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _store() -> Any:
    """None for one process, and for a backend that needs no store (MPI)."""
    if world_size() == 1:
        return None
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def job_at(path: str) -> str | None:
    """A name for this training, the same for all processes that record into `path`; None for one
    process."""
    if (store := _store()) is None:
        return None
    return str(store.compare_set(_key("job", path), "", uuid.uuid4().hex), "ascii")


def unlike(place: str, told: Mapping[str, Mapping[str, str]]) -> str | None:
    """Compare what this process says (of what -> in what respect -> in words) with what others say
    who call this for the same place as many times; what one process alone has may be anything. A
    place is named by whose it is and then where, so that no path is another's place.

    None if nobody has said otherwise before, else one line on the first thing that differs.
    """
    if (store := _store()) is None:
        return None
    rank = rank_of()
    _times[place] += 1
    words = json.dumps(told, sort_keys=True)
    mine = f"{rank} {hashlib.sha256(words.encode()).hexdigest()}"
    agreed = str(store.compare_set(_now(place), "", mine), "ascii")
    if agreed != mine and agreed.partition(" ")[2] == mine.partition(" ")[2]:
        return None
    for name, uses in told.items():
        said = store.compare_set(_now(place, "of", name), "", json.dumps([rank, dict(uses)]))
        other, theirs = json.loads(str(said, "ascii"))
        for use in sorted(uses.keys() | theirs.keys()):
            here, there = (one.get(use, "not converted") for one in (uses, theirs))
            if here != there:
                line = f"{name}: {use}: {here} on rank {rank}, {there} on rank {other}"
                line = json.dumps(f"{line}, expected the same on both")
                first = store.compare_set(_now(place, "unlike"), "", line)
                return str(json.loads(str(first, "ascii")))
    return None


def said_of(place: str, seconds: float = 0.0) -> str | None:
    """The line that any process has got by now from `unlike` for this place, for which it is waited
    so long at most; None if there is none, or nobody to ask any more."""
    key = _now(place, "unlike")
    with suppress(RuntimeError):  # the store was in a process that is gone; the time is over
        if (store := _store()) is not None:
            if seconds:
                store.wait([key], timedelta(seconds=seconds))
            if store.check([key]):
                return str(json.loads(str(store.get(key), "ascii")))
    return None


def is_of_others(error: BaseException | None) -> bool:
    """Whether an error may come of what another process did: that it left a collective, or the
    store, as torch tells it in a kind of its own or gloo in the name of its file."""
    if not dist.is_available():
        return False
    of_gloo = isinstance(error, RuntimeError) and "gloo/" in str(error)
    return of_gloo or isinstance(error, dist.DistError)


def _now(place: str, *more: str) -> str:
    """The key for what is said at a place this time."""
    return _key("said", place, _times[place], *more)


def _key(*parts: str | int) -> str:
    return f"fp8lab{json.dumps(parts)}"  # no two for the same parts, whatever is in a path
