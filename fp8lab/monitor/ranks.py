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

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from fp8lab.monitor.recorder import Kinds, Recorder, Vector, merged_kind
from fp8lab.sketch import NUM_EXTREMES, NUM_SUMS

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.")
_Key = tuple[str, str]  # site, kind
# Long, or of this process alone.
_NOT_REDUCED = ("channels", "amaxes", "tokens", "weights", "sampled", "loss")


def rank_of() -> int:
    """This process's number in torch.distributed, 0 without."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes torch.distributed has, 1 without."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def job_at(path: str) -> str | None:
    """A name for this training, the same for all processes that record into `path`; None for one
    process. Agreed through the store by which they found each other: nobody waits for anybody."""
    if world_size() == 1:
        return None
    from torch.distributed.distributed_c10d import _get_default_store

    mine = uuid.uuid4().hex
    agreed = _get_default_store().compare_set(f"fp8lab/{path}", "", mine)
    return str(agreed, "ascii")


def require_alike(path: str, casts: Mapping[str, Mapping[str, str]]) -> None:
    """Compare what each use of each layer's operands is cast to (layer -> use -> words) with what
    the other processes say that watch into `path`; layers that one process alone has may be
    anything.

    Through the same store: whoever says a layer's words first leaves them there, and nobody waits.
    Processes with the words of the first one, which is all of them but in a mismatch or where
    layers are spread out, compare one hash. Raises ValueError in one line for the first layer that
    is cast otherwise elsewhere; the process that comes second is the one that knows.
    """
    if world_size() == 1:
        return
    from torch.distributed.distributed_c10d import _get_default_store

    store, rank = _get_default_store(), rank_of()
    count = store.add(f"fp8lab/{path}/watches of {rank}", 1)  # the same run may go on otherwise
    place = f"fp8lab/{path}/casts {count}"
    words = json.dumps(casts, sort_keys=True)
    mine = f"{rank} {hashlib.sha256(words.encode()).hexdigest()}"
    agreed = str(store.compare_set(place, "", mine), "ascii")
    if agreed != mine and agreed.partition(" ")[2] == mine.partition(" ")[2]:
        return
    for layer, uses in casts.items():
        said = store.compare_set(f"{place}/{layer}", "", json.dumps([rank, dict(uses)]))
        other, theirs = json.loads(str(said, "ascii"))
        for use in sorted(uses.keys() | theirs.keys()):
            here, there = (one.get(use, "not converted") for one in (uses, theirs))
            if here != there:
                told = f"{here} on rank {rank}, {there} on rank {other}"
                raise ValueError(f"watch: {layer}: {use}: {told}, expected the same on both")


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
    """Adds up what the processes of a `group` measured in a step, in one all-reduce."""

    def __init__(self, group: Any) -> None:
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"watch: group={group!r:.60}, expected a process group, as group.WORLD")
        self.size = dist.get_world_size(group)
        self._group = group
        self._rank = dist.get_rank(group)
        self.writes = self._rank == 0  # the first process of the group writes for all
        self._layout: dict[_Key, int] | None = None  # length of the vector
        self._unlike: set[_Key] = set()  # not of one length on all processes: nothing to add up
        self._owner: dict[str, int] = {}  # the one process that sends a whole tensor
        on_gpu = "nccl" in str(dist.get_backend(group))
        self._device = torch.device("cuda" if on_gpu else "cpu")

    def reduce(self, collected: dict[str, Kinds], recorder: Recorder) -> dict[str, Kinds]:
        """The same for all processes together: as if their parts were micro-batches of one."""
        mine = {
            (site, kind): merged_kind(kind, vectors, recorder.names_of(site))
            for site, kinds in collected.items()
            if site not in recorder.copies
            for kind, vectors in kinds.items()
            if kind not in _NOT_REDUCED
        }
        reduced = None if self._layout is None else self._all_reduce(self._alike(mine))
        if reduced is None:  # some process met a tensor for the first time: all agree anew
            self._agree(mine, recorder.wholes)
            reduced = self._all_reduce(self._alike(mine))
        assert reduced is not None
        return reduced

    def _alike(self, mine: dict[_Key, Vector]) -> dict[_Key, Vector]:
        return {key: vector for key, vector in mine.items() if key not in self._unlike}

    def _agree(self, mine: dict[_Key, Vector], wholes: set[str]) -> None:
        everyone: list[Any] = [None] * self.size
        lengths = {key: len(vector) for key, vector in mine.items()}
        whole_here = {site for site, _ in mine if site in wholes}
        dist.all_gather_object(everyone, (lengths, whole_here), group=self._group)
        union = dict(self._layout or {})
        for lengths, _ in everyone:
            union |= lengths
        for lengths, _ in everyone:
            self._unlike |= {key for key, length in lengths.items() if length != union[key]}
        self._layout = {key: union[key] for key in sorted(union.keys() - self._unlike)}
        for rank, (_, sites) in reversed(list(enumerate(everyone))):
            self._owner |= dict.fromkeys(sites, rank)

    def _all_reduce(self, mine: dict[_Key, Vector]) -> dict[str, Kinds] | None:
        """None, on every process alike, if one of them holds something that is not agreed."""
        assert self._layout is not None
        known = self._layout
        is_new = any(known.get(key) != len(vector) for key, vector in mine.items())
        sent = {k: v for k, v in mine.items() if self._owner.get(k[0], self._rank) == self._rank}
        added = [key for key in self._layout if key[1] == "summary"]
        length = 1 + len(added) * NUM_SUMS
        apart = sum(1 + self._apart(key) for key in self._layout)
        packed = np.zeros(length + self.size * apart, dtype=np.int64)
        packed[0] = is_new
        for number, key in enumerate(added):
            if key in sent and not is_new:
                packed[1 + number * NUM_SUMS :][:NUM_SUMS] = sent[key][:NUM_SUMS]
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
                sums = packed[1 + number * NUM_SUMS :][:NUM_SUMS]
                vectors = [np.concatenate([sums, np.max(present, axis=0)])] if present else []
            else:
                vectors = [part.view(np.float64) for part in present]
            if vectors:
                merged.setdefault(site, {})[kind] = vectors
        return merged
