"""What is measured once a step: the model's output and what the optimizer does.

Both leave sums and maxima with the recorder, of which `step_columns` makes numbers on the host. A
parameter that is spread over ranks (a DTensor) counts with what this process holds of it, divided
by how often that is held, so that adding the ranks up gives the whole; without such a sum its
columns stay empty, for a part is not the norm. Source of RMS_t: StableAdamW (2304.13013).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fp8lab.hooking import when_gradients_are_there
from fp8lab.monitor.probes import counts
from fp8lab.monitor.recorder import Kinds, Recorder, local, merged_kind
from fp8lab.sites.observe import eagerly

STEP = ""  # the site of what belongs to the whole step
# Of the parameters before an update at most so many elements are kept, evenly spread: a copy of
# all would be what a large model has no room for.
SAMPLED_PARAMETERS = 1 << 24


class _Guarded:
    """What cannot be measured is said once and then left out: it must not end the training."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._is_refused = False

    def _guarded(self, what: str, look: Callable[..., None]) -> Callable[..., None]:
        def guarded(*args: Any) -> None:
            if not self._is_refused:
                try:
                    look(*args)
                except Exception as error:
                    self._is_refused = True
                    self._recorder.fail(what, f"{type(error).__name__}: {error}")

        return guarded


class OutputProbe(_Guarded):
    """The largest magnitude of what the model returns: of its logits, in a language model.

    Looks at a tensor, or at the `logits` of an output that has them; anything else is passed over.
    """

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        super().__init__(recorder)
        self._model = model

    def attach(self) -> list[Any]:
        hook = self._guarded("the model's output", self._returned)
        return [self._model.register_forward_hook(eagerly(hook))]

    def _returned(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._recorder.is_due and counts(module, self._recorder):
            logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
            if isinstance(logits, Tensor) and logits.is_floating_point() and logits.numel():
                peak = local(logits.detach()).aminmax()
                largest = torch.maximum(peak.max, -peak.min).double()
                self._recorder.add(STEP, "logit_max", largest.reshape(1))


class OptimizerProbe(_Guarded):
    """Reads the optimizer around its step."""

    def __init__(self, optimizer: torch.optim.Optimizer, recorder: Recorder, ranks: int) -> None:
        super().__init__(recorder)
        self._optimizer = optimizer
        self._ranks = ranks
        self._before: list[tuple[nn.Parameter, Tensor]] = []
        self._stride = 1  # between the elements of a parameter that are kept
        self._rms: list[Tensor | None] = []
        self.learning_rate: float | None = None
        self.is_sharded = False

    def attach(self) -> list[Any]:
        before = self._guarded("the optimizer", self._before_step)
        after = self._guarded("the optimizer", self._after_step)
        return [
            when_gradients_are_there(self._optimizer, before),
            self._optimizer.register_step_post_hook(after),
        ]

    def _parameters(self) -> list[nn.Parameter]:
        groups = self._optimizer.param_groups
        return [p for group in groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def _before_step(self) -> None:
        parameters = self._parameters()
        if "lr" in self._optimizer.param_groups[0]:
            self.learning_rate = float(self._optimizer.param_groups[0]["lr"])
        self.is_sharded = any(_is_sharded(p) for p in parameters)
        if parameters:
            squares = _squares((p, p.grad) for p in parameters)
            if (scale := gradient_scale(self._optimizer)) is not None:
                squares = squares / scale.to(squares.device).double().square()
            self._recorder.add(
                STEP, "grad_squares", self._weighted(parameters, squares).sum()[None]
            )
        if self._recorder.is_due:
            count = sum(local(p).numel() for p in parameters)  # 0 of shards that hold nothing
            self._stride = max(1, -(-count // SAMPLED_PARAMETERS))
            self._before = [(p, _sample(p, self._stride).clone()) for p in parameters]
            groups = self._optimizer.param_groups
            self._rms = [self._rms_of_stored(p, g) for g in groups for p in g["params"]]

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        if not self._before:
            return
        parameters = [p for p, _ in self._before]
        changes = _squares((p, _sample(p, self._stride).double() - b) for p, b in self._before)
        sums = torch.stack([changes, _squares(self._before)])
        self._recorder.add(STEP, "update", self._weighted(parameters, sums).sum(dim=1))
        self._before = []
        groups = self._optimizer.param_groups
        rms = [_rms_t(p, self._optimizer.state.get(p, {}), g) for g in groups for p in g["params"]]
        known = [value for value in self._rms + rms if value is not None]
        if known:
            # Of as many parameters in each step and process: their vectors are added up.
            none = torch.zeros_like(known[0])
            pairs = zip(self._rms, rms, strict=True)
            each = [next((v for v in pair if v is not None), none) for pair in pairs]
            self._recorder.add(STEP, "rms_t", _on_one_device(each).flatten())

    def _weighted(self, parameters: list[nn.Parameter], squares: Tensor) -> Tensor:
        """A tensor's squares, divided by the number of processes that have the same ones."""
        if not self.is_sharded:
            return squares
        copies = [_copies(p, self._ranks) for p in parameters]
        return squares / torch.tensor(copies, dtype=torch.float64, device=squares.device)

    def _rms_of_stored(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor | None:
        """RMS_t of a second moment that is stored in FP8: what the step is about to use, and not
        what will be left of it, where a small one is zero and RMS_t would be a million."""
        state = self._optimizer.state.get(parameter, {})
        read = getattr(self._optimizer, "moments", None)
        if read is None or "exp_avg_sq" in state or parameter.grad is None:
            return None
        beta, squares = group["betas"][1], parameter.grad.double().square()
        before = read(parameter)[1].double() if state else torch.zeros_like(squares)
        moment = beta * before + (1.0 - beta) * squares
        return _rms_t(
            parameter, {"exp_avg_sq": moment, "step": state["step"] + 1 if state else 1}, group
        )


def gradient_scale(optimizer: Any) -> Tensor | None:
    """By what the gradients before the step are too large: a fused optimizer leaves it to its
    kernel to undo what a GradScaler did, which hands it the factor so (torch.amp)."""
    scale = getattr(optimizer, "grad_scale", None)
    return scale if isinstance(scale, Tensor) else None


def step_columns(kinds: Kinds, is_whole: bool) -> dict[str, float]:
    """Columns of a step row, from one vector a process; those that need every part of the
    parameters only if `is_whole`."""
    row: dict[str, float] = {}
    found = {kind: merged_kind(kind, vectors) for kind, vectors in kinds.items()}
    if "logit_max" in found:
        row["logit_max"] = float(found["logit_max"][0])
    if not is_whole:
        return row
    if "grad_squares" in found:
        row["grad_norm"] = float(np.sqrt(found["grad_squares"][0]))
    with np.errstate(all="ignore"):
        if "update" in found:
            changes, before = np.sqrt(found["update"])
            row["update_ratio"] = float(changes / before)
        if "rms_t" in found:
            squares, counts = found["rms_t"].reshape(-1, 2).T
            row["rms_t"] = float(np.sqrt(squares[counts > 0] / counts[counts > 0]).max())
    return row


def _rms_t(parameter: nn.Parameter, state: Any, group: dict[str, Any]) -> Tensor | None:
    """float64 [2]: the sum of g^2 / max(v, eps^2) and how many they are."""
    # Adafactor, too, has an exp_avg_sq, but no beta to correct it with.
    if parameter.grad is None or not {"exp_avg_sq", "step"} <= state.keys():
        return None
    if "betas" not in group or not isinstance(group.get("eps"), int | float):
        return None
    # A fused optimizer counts its steps on the device: converting to a float would wait for it.
    steps = torch.as_tensor(state["step"], dtype=torch.float64)
    second_moment = local(state["exp_avg_sq"]).double() / (1.0 - group["betas"][1] ** steps)
    ratio = local(parameter.grad).double().square() / second_moment.clamp(min=group["eps"] ** 2)
    return torch.stack([ratio.sum(), torch.full_like(ratio.sum(), ratio.numel())])


def _squares(tensors: Iterable[tuple[nn.Parameter, Tensor | None]]) -> Tensor:
    """float64 [tensors]: of each the sum of squares; a norm in BF16 would have two digits."""
    norms = [
        torch.linalg.vector_norm(local(tensor), dtype=torch.float64)
        for _, tensor in tensors
        if tensor is not None
    ]
    return _on_one_device(norms).square()


def _sample(parameter: nn.Parameter, stride: int) -> Tensor:
    return local(parameter.detach()).reshape(-1)[::stride]


def _on_one_device(vectors: list[Tensor]) -> Tensor:
    return torch.stack([vector.to(vectors[0].device) for vector in vectors])


def _is_sharded(parameter: Tensor) -> bool:
    return any(placement.is_shard() for placement in getattr(parameter, "placements", ()))


def _copies(parameter: Tensor, ranks: int) -> float:
    """How many of `ranks` processes hold the same part of a parameter."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return float(ranks)
    parts = 1
    for size, placement in zip(mesh.shape, parameter.placements, strict=True):  # type: ignore[attr-defined]
        parts *= size if placement.is_shard() else 1
    return ranks / parts
