"""The training loop. There is one.

A task says what a batch is and what the loss of a model on it is; the loop does the rest the same
way for every task, precision and mitigation: forward, backward, clip, optimizer step, `watch.step`.
Batches are pure functions of the step, so a resumed run sees what the uninterrupted one would have.

A checkpoint is one safetensors file: parameters, buffers (FP8 histories and scales among them),
optimizer state and the random state as tensors, the step in the metadata. No pickle. Training
resumed from it gives the same losses to the bit.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fp8lab.agreement import world_size
from fp8lab.lab.data import read_text, stdlib_text
from fp8lab.lab.model import LanguageModel, next_byte_loss
from fp8lab.lab.parallel import clip_gradients, mean_over_processes, part_of
from fp8lab.linear import Fp8Linear
from fp8lab.monitor import Watch
from fp8lab.plan import named
from fp8lab.recipe import shown


class Task(Protocol):
    """What is trained on."""

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of `model` on the batch of `step`, and further numbers to record.

        Each of several processes asks for the same step, and nothing is divided: a task that is to
        share its batch out takes `parallel.part_of` of it, as `NextByte` does.
        """


class NextByte:
    """The task of a language model: mean cross-entropy in nats per byte on windows of a text.

    `text` is a file or folder to read, the standard library's own source if None. A batch is
    [batch, context + 1] bytes and a function of (seed, step) alone, of which each of several
    processes takes its part. Raises what `read_text` does.
    """

    def __init__(self, text: str | Path | None, seed: int, *, batch: int, context: int) -> None:
        self.text = stdlib_text() if text is None else read_text(text, context=context)
        self._seed, self._batch, self._context = seed, batch, context

    def loss(self, model: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        tokens = self.text.batch(step, seed=self._seed, batch=self._batch, context=self._context)
        return next_byte_loss(model, part_of(tokens, model)), {}

    def held_out(self, index: int) -> Tensor:
        """Batch `index` of text that is not trained on."""
        return self.text.batch(
            index, seed=self._seed, batch=self._batch, context=self._context, split="held_out"
        )

    @torch.no_grad()
    def held_out_loss(self, model: LanguageModel, batches: int) -> float:
        """The mean over so many batches of text that is not trained on."""
        return sum(float(model.loss(self.held_out(index))) for index in range(batches)) / batches

    def origin(self) -> dict[str, str]:
        """What a run's config says of its text."""
        return {"text": self.text.source, "text_sha256": self.text.sha256}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long, how clipped, and when a run counts as diverged.

    `clip_norm` limits the gradients' total norm. A run has diverged when its loss (or the metric
    named `judged_by`) is not finite or above `diverged_above`; it ends there.
    """

    steps: int
    clip_norm: float | None = None
    diverged_above: float = math.inf
    judged_by: str = "loss"
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "checkpoint_every"):
            value = getattr(self, name)
            if type(value) is not int and (name == "steps" or value is not None):
                raise ValueError(f"Schedule: {name}={shown(value)}, expected a whole number")
            if value is not None and value < 1:
                raise ValueError(f"Schedule: {name}={shown(value)}, expected at least 1")
        for name in ("clip_norm", "diverged_above"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not math.isnan(value)
            if not number and not (name == "clip_norm" and value is None):
                raise ValueError(f"Schedule: {name}={shown(value)}, expected a number")
        if not isinstance(self.judged_by, str):
            raise ValueError(f"Schedule: judged_by={shown(self.judged_by)}, expected a name")


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    task: Task,
    schedule: Schedule,
    *,
    watch: Watch | None = None,
    checkpoints: Path | None = None,
    first_step: int = 0,
    stop: tuple[int, Path] | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> int | None:
    """Train from `first_step`; returns the step at which the run diverged, None if it did not.

    In a process group, on a model of `parallel.parallelize`, it is called in every process; losses
    are the mean over all of them, and there are no checkpoints: those of several processes are
    `torch.distributed.checkpoint`'s.

    With `checkpoint_every`, step n's checkpoint is `checkpoints/step-n.safetensors`: the state
    before step n. With `stop` the training ends before that step, whose checkpoint it writes to the
    file. Raises ValueError if only one of `checkpoint_every` and `checkpoints` is given, or
    checkpoints are to be written in a process group.
    """
    _require_places(schedule, checkpoints, stop)
    for step in range(first_step, schedule.steps):
        if stop is not None and step == stop[0]:
            save_checkpoint(stop[1], model, optimizer, step)
            return None
        if schedule.checkpoint_every and step % schedule.checkpoint_every == 0 and checkpoints:
            save_checkpoint(checkpoints / f"step-{step}.safetensors", model, optimizer, step)
        loss, metrics = task.loss(model, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if schedule.clip_norm is not None:
            clip_gradients(model.parameters(), schedule.clip_norm)
        optimizer.step()
        value = mean_over_processes(loss)
        if watch is not None:
            watch.step(step, loss=value, **metrics)
        if progress is not None:
            progress(step, value)
        of_metrics = schedule.judged_by != "loss"  # one number on all processes: they end together
        judged = mean_over_processes(metrics[schedule.judged_by]) if of_metrics else value
        if not math.isfinite(judged) or judged > schedule.diverged_above:
            if watch is not None:
                watch.event(step, "diverged", f"{schedule.judged_by} is {judged:.4g}")
            return step
    return None


def _require_places(
    schedule: Schedule, checkpoints: Path | None, stop: tuple[int, Path] | None
) -> None:
    if world_size() > 1 and (checkpoints is not None or stop is not None):
        raise ValueError(f"train: {world_size()} processes and checkpoints, expected one of them")
    if (schedule.checkpoint_every is None) != (checkpoints is None):
        raise ValueError(
            f"train: checkpoint_every={schedule.checkpoint_every}, checkpoints={checkpoints}, "
            f"expected both or neither"
        )


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Write everything that the next step depends on, by one rename."""
    from safetensors.torch import save_file

    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    plain: dict[str, dict[str, Any]] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                plain.setdefault(str(index), {})[name] = value
    tensors["random"] = torch.get_rng_state()
    copies = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    metadata = {
        "step": str(step),
        "optimizer_groups": json.dumps(_added(optimizer)),
        "optimizer": _kind(optimizer),
        "optimizer_state": json.dumps(plain),
        "rewritten": json.dumps(_rewritten(model)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    save_file(copies, temporary, metadata=metadata)
    temporary.replace(path)


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    other_precision: bool = False,
) -> int:
    """Restore model, optimizer and random state in place; returns the step to go on with.

    With `other_precision` the checkpoint may be from a training under another plan, or with other
    rewritings of what layers cast: of their state a layer takes what it has room for, and what it
    lacks is as at its birth. So is the history of an input that was rewritten otherwise: it is that
    of another tensor.

    Raises ValueError in one line if the file is damaged or belongs to another model or optimizer;
    then nothing has changed.
    """
    step, kind, tensors, states, added, rewritten = _read(path)
    if kind != _kind(optimizer):
        wanted = _kind(optimizer)
        raise ValueError(f"checkpoint {path}: optimizer {named(kind)}, expected {wanted}")
    now = _rewritten(model)
    rewritten = now if rewritten is None else rewritten  # None: an older file
    others = {layer for layer in now | rewritten if now.get(layer) != rewritten.get(layer)}
    if others and not other_precision:
        layer = min(others)
        got, wanted = (words.get(layer, "as it is") for words in (rewritten, now))
        where = f"checkpoint {path}: {named(layer)}: input"
        raise ValueError(f"{where} {shown(got)}, expected {wanted!r}")
    weights = tensors["model"]
    if other_precision:
        weights = _with_state_fitted(weights, model, others)
    _compare(path, "", _shapes(weights), _shapes(model.state_dict()))
    after_a_step = _states_after_a_step(optimizer)
    for number, state in states.items():
        where = f"optimizer state {number}: "
        _compare(path, where, _shapes(state), _shapes(after_a_step.get(number, {})))
        counted = float(state.get("step", 0))
        if not 0 <= counted <= step:
            raise ValueError(f"checkpoint {path}: {where}step {counted:g}, expected 0 to {step}")
    added = [{} for _ in optimizer.param_groups] if added is None else added  # an older file
    if not _are_alike(added, expected := _added(optimizer)):
        raise ValueError(f"checkpoint {path}: optimizer groups, expected the state of {expected}")
    try:
        torch.set_rng_state(tensors["random"][""])
    except (RuntimeError, TypeError):
        raise ValueError(f"checkpoint {path}: damaged: random state") from None
    model.load_state_dict(weights)
    groups = optimizer.state_dict()["param_groups"]
    for group, found in zip(groups, added, strict=True):
        group |= found
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    return step


class _Read(NamedTuple):
    step: int
    kind: str  # of optimizer
    tensors: dict[str, dict[str, Tensor]]
    states: dict[int, dict[str, Any]]  # the optimizer's
    added: Any  # to its groups
    rewritten: dict[str, str] | None  # the layers whose operands are, and how


def _read(path: Path) -> _Read:
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "random": {}}
    try:
        if path.exists() and not path.is_file():  # the open of a pipe cannot be interrupted
            raise ValueError("not a file")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for name in file.keys():
                kind, _, rest = name.partition(".")
                tensors[kind][rest] = file.get_tensor(name)
        step, kind = int(metadata["step"]), metadata["optimizer"]
        if step < 0:
            raise ValueError(f"step {step}, expected at least 0")
        states = {int(i): dict(of) for i, of in json.loads(metadata["optimizer_state"]).items()}
        for name, value in tensors["optimizer"].items():
            index, _, key = name.partition(".")
            states.setdefault(int(index), {})[key] = value
        tensors["random"][""]
        added = json.loads(metadata.get("optimizer_groups", "null"))
        rewritten = json.loads(metadata.get("rewritten", "null"))
        rewritten = None if rewritten is None else dict(rewritten.items())
    except (
        *(SafetensorError, OSError, LookupError, ValueError, TypeError, AttributeError),
        *(RuntimeError, MemoryError),  # RecursionError, for JSON that is nested, is of the former
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"checkpoint {path}: cannot be loaded: {reason[:200]}") from None
    return _Read(step, kind, tensors, states, added, rewritten)


def _rewritten(model: nn.Module) -> dict[str, str]:
    """What run.json says of the inputs that layers rewrite before they cast them."""
    return {
        layer: module.rewrite.words
        for layer, module in model.named_modules()
        if isinstance(module, Fp8Linear) and module.rewrite is not None
    }


def _added(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What mitigations keep in the groups beside the optimizer's own settings, which are the
    caller's: state as dictionaries of numbers."""
    return [
        {
            name: value
            for name, value in group.items()
            if name not in optimizer.defaults and isinstance(value, dict)
        }
        for group in optimizer.param_groups
    ]


def _are_alike(found: Any, expected: Any) -> bool:
    """Whether both are made of the same dictionaries; in them numbers, None, or lists of these."""
    if isinstance(expected, dict):
        return (
            isinstance(found, dict)
            and found.keys() == expected.keys()
            and all(_are_alike(found[name], expected[name]) for name in expected)
        )
    if isinstance(expected, list) and any(isinstance(one, dict) for one in expected):
        same = isinstance(found, list) and len(found) == len(expected)
        return same and all(map(_are_alike, found, expected))
    values = found if isinstance(expected, list) and isinstance(found, list) else [found]
    return all(
        one is None or (type(one) in (int, float) and math.isfinite(float(one))) for one in values
    )


def _with_state_fitted(
    tensors: dict[str, Tensor], model: nn.Module, others: set[str]
) -> dict[str, Tensor]:
    """All that FP8 and rewritings keep in layers as this model's have it, every other tensor as it
    is. `others` are the layers whose input was rewritten otherwise.

    A history's first rows are the same whatever its length, and so are a scale's first columns.
    """
    fitted = dict(tensors)
    for layer, module in model.named_modules():
        if not isinstance(module, Fp8Linear):
            continue
        prefix = f"{layer}." if layer else ""
        state = module.state_dict().items()
        own = {prefix + name: value for name, value in state if "." not in name}
        kept = {prefix + name for name, _ in module.named_parameters(recurse=False)}
        of_layer = {key for key in tensors if key.rpartition(".")[0] == layer}
        for key in sorted((own.keys() | of_layer) - kept):
            found, fresh = fitted.pop(key, None), own.get(key)
            if fresh is None:
                continue
            fitted[key] = fresh.clone()
            is_fp8 = key.removeprefix(prefix) in ("amax_history", "scale")
            if found is None or found.ndim != fresh.ndim or (layer in others and not is_fp8):
                continue
            part = tuple(map(slice, map(min, found.shape, fresh.shape)))
            fitted[key][part] = found[part]
            if layer in others:  # the columns of the input and of its copy, see `Fp8Linear`
                fitted[key][..., 0::3] = fresh[..., 0::3]
    return fitted


def _compare(path: Path, where: str, found: dict[str, str], expected: dict[str, str]) -> None:
    for name in sorted(found.keys() | expected.keys()):
        got, wanted = found.get(name, "nothing"), expected.get(name, "nothing")
        if got != wanted:
            raise ValueError(f"checkpoint {path}: {where}{named(name)}: {got}, expected {wanted}")


def _states_after_a_step(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """What an optimizer would keep of every parameter: a copy of it has made a step of zeros.

    Only it knows; torch loads any state and fails at the next step. Costs a copy of parameters and
    state for as long as this takes.
    """
    twin = copy.deepcopy(optimizer)
    for group in twin.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    with torch.random.fork_rng(devices=[]):
        twin.step()
    states: dict[int, dict[str, Any]] = twin.state_dict()["state"]
    return states


def _kind(optimizer: torch.optim.Optimizer) -> str:
    """Its class, and how many parameters each of its groups has."""
    groups = [len(group["params"]) for group in optimizer.param_groups]
    return f"{type(optimizer).__name__} of {groups} parameters"


def _shapes(values: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: f"{value.dtype} {list(value.shape)}"
        if isinstance(value, Tensor)
        else f"a {type(value).__name__}"
        for name, value in values.items()
    }
