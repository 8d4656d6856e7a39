"""How a run of several processes broke off: which of them stopped first, and with what error.

Who stops takes the others' connection along, and each of them then says an error of its own: what
gloo or NCCL says of a peer that has gone. The cause is what the first one said.

Rejected: the error of rank 0, which is the first to be read and mostly one of those.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from fp8lab.runs import Run

# What gloo and NCCL say in a process of which another has gone.
CUT_OFF = ("connection closed by peer", "connection reset", "broken pipe", "remote process exited")


def error_of(run: Run) -> str | None:
    """With what error a run ended, None where it says none: of several processes that of the one
    that stopped first, or that may have, behind its rank."""
    folders = run.folders()
    told = {rank: run.info_of(rank).get("error") for rank in folders}
    errors = {rank: str(error) for rank, error in told.items() if error is not None}
    if not errors or len(folders) == 1:
        return next(iter(errors.values()), None)
    first, _ = _first(run)
    own = [rank for rank, error in errors.items() if not _is_cut_off(error)]
    rank = first if first in errors else next(iter([*own, *errors]))
    return f"rank {rank}: {errors[rank]}"


def stopped_first(run: Run) -> str | None:
    """Which of several processes stopped first, in words, as far as anything tells; None where all
    came to their end, or were interrupted together.

    A process that lost the connection to another was alive when that was not; of those that are
    gone without a word some may have been ended because one failed. Else the times of the last
    writes tell, where they are further apart than processes write; of one that wrote no step they
    do not, for it may have done many.
    """
    return _first(run)[1]


def _is_cut_off(error: object) -> bool:
    return any(words in str(error).lower() for words in CUT_OFF)


def _first(run: Run) -> tuple[int | None, str | None]:
    """The rank that stopped first, if that is known, and `stopped_first`."""
    rows = run.ranks()
    rows = rows[rows["state"] != "left"]
    lost = rows[rows["state"].isin(["killed", "failed", "unknown"])]
    if len(rows) < 2 or lost.empty:
        return None, None
    own = lost[~lost["error"].map(_is_cut_off).astype(bool)]
    if own.empty:
        return None, "not known: each lost the connection to another"
    failed = own[own["state"] == "failed"]
    ended = rows[rows["state"].isin(["finished", "interrupted"])]
    # Who was killed may have been so after the others had ended.
    rivals = (pd.concat([own, ended]) if failed.empty else failed).sort_values("flushed")
    writes = max(run.writes_every(rank) for rank in rows["rank"])
    silent = rivals[rivals["last_step"].isna()]
    if len(rivals) > 1 and not silent.empty:
        silent_rank = silent["rank"].iloc[0]
        return None, f"not known: rank {silent_rank} has no step on disk that would tell when"
    near = rivals[rivals["flushed"] - rivals["flushed"].iloc[0] <= writes]
    if len(near) > 1:
        ranks = ", ".join(map(str, sorted(near["rank"])))
        often = f"within {writes:g} s, which is how often they do"
        return None, f"not known: ranks {ranks} wrote last {often}"
    first = rivals.iloc[0]
    return int(first["rank"]), _first_in_words(first, rows)


def _first_in_words(first: pd.Series[Any], rows: pd.DataFrame) -> str:
    """The rank, and its last step as far as known: a write is no end of one that was killed."""
    told = f"rank {first['rank']}"
    is_told = first["state"] == "failed" and pd.isna(first["refused"])
    if pd.isna(first["last_step"]):
        return f"{told}, " + ("before its first step" if is_told else "with no step on disk yet")
    gap = float(rows[rows["rank"] != first["rank"]]["flushed"].min() - first["flushed"])
    since = f", {'' if is_told else 'written '}{gap:.0f} s before the others" * (gap >= 1.0)
    return f"{told}, last step {'' if is_told else 'on disk '}{first['last_step']}{since}"
