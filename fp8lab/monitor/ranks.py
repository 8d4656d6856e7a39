"""A model among wrappers and processes: its own names, and the rows of all processes together.

Each process records what passes through its part of the model. That adds up: the elements of a
batch that is split over processes, or of a product that tensor parallelism splits by channels, are
those of the whole, and a sketch is made of integers and extremes. So one all-reduce of one vector
of int64 merges a step. Counts and power sums are added by it. What does not add up (extremes,
float64 sums, whose order matters) has a place of its own for each process, where the others hold
zero; it arrives as it was sent and is merged in the order of the processes, so the result is the
same on every one, and does not depend on how the all-reduce adds.

Not reduced: channels and tokens, which are long, and weights. Their columns are in the rows of the
processes. A tensor that every process holds whole (after tensor parallelism's own all-reduce)
counts once a process; the output of a down projection, where that is so, is left to the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from fp8lab.agreement import UnlikeError, rank_of, unlike, world_size
from fp8lab.monitor.recorder import Kinds, Recorder, Vector, merged_kind, tensor_row
from fp8lab.sketch import NUM_EXTREMES, NUM_SUMS
from fp8lab.store import RunError

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.")
_Key = tuple[str, str]  # site, kind
_Done = TypeVar("_Done")
# Long, or of this process alone.
_NOT_REDUCED = ("channels", "amaxes", "tokens", "weights", "sampled", "loss")


def in_all(
    group: Any,
    do: Callable[[], _Done],
    settings: Callable[[_Done], Mapping[str, object]] | None = None,
    *,
    undo: Callable[[_Done, Exception], None] | None = None,
) -> _Done:
    """What `do` returns, if no process of the group fails at it and all have the same `settings`.

    Else every one of them raises the same line, and undoes what it has done. A collective, without
    a group none: then this is `do()`, and who comes second raises alone.
    """
    if group is None:
        try:
            return do()
        except UnlikeError as told:
            raise ValueError(*told.args) from None
    done, error = None, None
    mine: dict[str, str] = {}
    try:
        done = do()
        mine = {name: str(value) for name, value in (settings(done) if settings else {}).items()}
    except Exception as raised:
        error = raised
    everyone: list[Any] = [None] * dist.get_world_size(group)
    said = dist.get_rank(), _in_one_line(error), mine
    dist.all_gather_object(everyone, said, group=group)
    failed = next((one for _, one, _ in everyone if one is not None), None)
    failed = failed or _unlike_settings(everyone)
    if failed is None:
        return done  # type: ignore[return-value]
    kind, line = failed
    failure = kind(line)
    if error is None and undo is not None:
        undo(done, failure)  # type: ignore[arg-type]
    raise failure from (error if kind is RuntimeError else None)  # else the line tells it all


def _in_one_line(error: Exception | None) -> tuple[type[Exception], str] | None:
    if error is None:
        return None
    if isinstance(error, UnlikeError):
        return ValueError, str(error)
    kinds = (RunError, ValueError, TypeError)
    kind = next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)
    told = " ".join(str(error).split()) or type(error).__name__
    return kind, f"{told} (on rank {rank_of()})"


def _unlike_settings(everyone: list[Any]) -> tuple[type[Exception], str] | None:
    first, _, here = everyone[0]
    for rank, _, there in everyone[1:]:
        for name, value in here.items():
            if there[name] != value:
                told = f"{value:.200} on rank {first}, {there[name]:.200} on rank {rank}"
                return ValueError, f"watch: {name}: {told}, expected the same in a group"
    return None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return model


def plain_name(name: str) -> str:
    """A module's name as it is without what wraps modules inside the model."""
    for wrapper in _WRAPPERS:
        name = f"{name}.".replace(wrapper, "").removesuffix(".") or "."
    return name


def watched_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules and their plain names, without the wrappers themselves."""
    for name, module in model.named_modules():
        if not any(wrapper.rstrip(".") in module._modules for wrapper in _WRAPPERS):
            yield plain_name(name) if name else "", module


class Reduction:
    """Adds up what the processes of a `group` measured in a step, in one all-reduce.

    Raises ValueError in a process that is no member of the group.
    """

    def __init__(self, group: Any) -> None:
        no_member = dist.GroupMember.NON_GROUP_MEMBER
        if not isinstance(group, dist.ProcessGroup) and group != no_member:
            raise TypeError(f"watch: group={group!r:.60}, expected a process group, as group.WORLD")
        self._rank = dist.get_rank(group)
        if self._rank < 0:
            raise ValueError(f"watch: group: rank {rank_of()} is no member, expected one that is")
        self.size = dist.get_world_size(group)
        self._group = group
        self.writes = self._rank == 0  # the first process of the group writes for all
        self._layout: dict[_Key, int] | None = None  # length of the vector
        self._unlike: set[_Key] = set()  # not of one length on all processes: nothing to add up
        self._owner: dict[str, int] = {}  # the one process that sends a whole tensor
        # What the row of a site is about, of a process that has measured it: its statistics, its
        # cast. The one that writes may never have met it.
        self._about: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {}
        on_gpu = "nccl" in str(dist.get_backend(group))
        self._device = torch.device("cuda" if on_gpu else "cpu")

    def require_own_rows(self, path: str, sites: Iterable[str]) -> None:
        """Raises UnlikeError if another group adds up rows of one of these sites for the run at
        `path`: there is one row of all processes together, and it would be of either."""
        if self.size < world_size():
            group = f"ranks {', '.join(map(str, dist.get_process_group_ranks(self._group)))}"
            told = {f"group: rows of {site} together": {"added up": group} for site in sites}
            if (line := unlike(f"watch, groups: {path}", told)) is not None:
                raise UnlikeError(f"watch: {line}: give group=dist.group.WORLD, or None")

    def reduce(
        self, step: int, collected: dict[str, Kinds], recorder: Recorder
    ) -> dict[str, Kinds]:
        """The same for all processes together: as if their parts were micro-batches of one.

        Raises ValueError, in all processes alike, where this is not the same step for all of them.
        """
        mine = {
            (site, kind): merged_kind(kind, vectors, recorder.names_of(site))
            for site, kinds in collected.items()
            if site not in recorder.copies
            for kind, vectors in kinds.items()
            if kind not in _NOT_REDUCED
        }
        reduced = None if self._layout is None else self._all_reduce(step, self._alike(mine))
        if reduced is None:  # some process met a tensor for the first time: all agree anew
            self._agree(mine, recorder)
            reduced = self._all_reduce(step, self._alike(mine))
        assert reduced is not None
        return reduced

    def _alike(self, mine: dict[_Key, Vector]) -> dict[_Key, Vector]:
        return {key: vector for key, vector in mine.items() if key not in self._unlike}

    def _agree(self, mine: dict[_Key, Vector], recorder: Recorder) -> None:
        everyone: list[Any] = [None] * self.size
        lengths = {key: len(vector) for key, vector in mine.items()}
        sites = {site for site, _ in mine}
        about = {site: (recorder.names_of(site), recorder.casts.get(site, {})) for site in sites}
        said = lengths, sites & recorder.wholes, about
        dist.all_gather_object(everyone, said, group=self._group)
        union = dict(self._layout or {})
        for lengths, _, about in everyone:
            union |= lengths
            self._about |= about
        for lengths, _, _ in everyone:
            self._unlike |= {key for key, length in lengths.items() if length != union[key]}
        self._layout = {key: union[key] for key in sorted(union.keys() - self._unlike)}
        for rank, (_, wholes, _) in reversed(list(enumerate(everyone))):
            self._owner |= dict.fromkeys(wholes, rank)

    def row(self, site: str, kinds: Kinds, recorder: Recorder) -> dict[str, Any]:
        """The row of a tensor that some process has measured, maybe another one."""
        names, cast = self._about.get(site, ((), {}))
        row = tensor_row(site, kinds, recorder.names_of(site) or names)
        return row | recorder.casts.get(site, cast if "operand" in kinds else {})

    def _all_reduce(self, step: int, mine: dict[_Key, Vector]) -> dict[str, Kinds] | None:
        """None, on every process alike, if one of them holds something that is not agreed."""
        assert self._layout is not None
        known = self._layout
        is_new = any(known.get(key) != len(vector) for key, vector in mine.items())
        sent = {k: v for k, v in mine.items() if self._owner.get(k[0], self._rank) == self._rank}
        added = [key for key in self._layout if key[1] == "summary"]
        head = 1 + self.size
        length = head + len(added) * NUM_SUMS
        apart = sum(1 + self._apart(key) for key in self._layout)
        packed = np.zeros(length + self.size * apart, dtype=np.int64)
        packed[0] = is_new
        packed[1 + self._rank] = step
        for number, key in enumerate(added):
            if key in sent and not is_new:
                packed[head + number * NUM_SUMS :][:NUM_SUMS] = sent[key][:NUM_SUMS]
        at = length + self._rank * apart
        for key in self._layout:
            if key in sent and not is_new:
                vector = sent[key][NUM_SUMS:] if key[1] == "summary" else sent[key]
                packed[at] = 1
                packed[at + 1 : at + 1 + self._apart(key)] = vector.view(np.int64)
            at += 1 + self._apart(key)
        tensor = torch.from_numpy(packed).to(self._device)
        dist.all_reduce(tensor, group=self._group)
        packed = tensor.cpu().numpy()
        if (packed[1:head] != packed[1]).any():
            other = int(np.argmax(packed[1:head] != packed[1]))
            told = f"step {packed[1]} of process 0 and step {packed[1 + other]} of process {other}"
            raise ValueError(f"{told} of the group came together, expected the same step")
        return None if packed[0] else self._taken_apart(packed, added, length, apart)

    def _apart(self, key: _Key) -> int:
        assert self._layout is not None
        return NUM_EXTREMES if key[1] == "summary" else self._layout[key]

    def _taken_apart(
        self, packed: Vector, added: list[_Key], length: int, apart: int
    ) -> dict[str, Kinds]:
        assert self._layout is not None
        merged: dict[str, Kinds] = {}
        at = length
        for site, kind in self._layout:
            width = self._apart((site, kind))
            parts = [packed[at + rank * apart :][: 1 + width] for rank in range(self.size)]
            present = [part[1:] for part in parts if part[0]]
            at += 1 + width
            if kind == "summary":
                number = added.index((site, kind))
                sums = packed[1 + self.size + number * NUM_SUMS :][:NUM_SUMS]
                vectors = [np.concatenate([sums, np.max(present, axis=0)])] if present else []
            else:
                vectors = [part.view(np.float64) for part in present]
            if vectors:
                merged.setdefault(site, {})[kind] = vectors
        return merged
