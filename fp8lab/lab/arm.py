"""An arm of an experiment: one way to train, in precision and in what is put on top.

Mitigations of every kind stand in one list. A training asks its arm for each kind where its time
has come: the model's configuration, the model, the optimizer, and what is added to the loss.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor, nn

from fp8lab.conversion import convert
from fp8lab.plan import Plan, recipe_to_dict
from fp8lab.recipe import shown


class Mitigation(Protocol):
    """What can be put on top; `kind` says what `apply` takes (see `fp8lab.mitigations`)."""

    @property
    def kind(self) -> str: ...

    @property
    def changes_function(self) -> bool: ...

    def apply(self, target: Any, /, *more: Any) -> Any: ...


KINDS = ("architecture", "model", "recipe", "optimizer", "loss")
Prediction = Literal["diverges", "survives", "open"]
_Config = TypeVar("_Config")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train: the precision of every operand, and what is put on top.

    `predicted` is this arm's share of the experiment's prediction.
    """

    name: str
    title: str
    plan: Plan
    mitigations: tuple[Mitigation, ...] = ()
    predicted: Prediction = "open"
    options: Mapping[str, Any] | None = None  # what else the part's training changes for this arm
    _asked: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        where = f"Arm {shown(self.name)}"
        require_types(where, self, name=str, title=str, plan=Plan, mitigations=tuple)
        if self.predicted not in get_args(Prediction):
            expected = ", ".join(get_args(Prediction))
            got = shown(self.predicted)
            raise ValueError(f"{where}: predicted={got}, expected one of {expected}")
        for mitigation in self.mitigations:
            if getattr(mitigation, "kind", None) not in KINDS:
                expected = f"a mitigation of kind {', '.join(KINDS)}"
                raise ValueError(f"{where}: {shown(mitigation)}, expected {expected}")
        try:
            json.dumps(dict(self.options or {}), allow_nan=False)  # JSON has no infinity
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            got = f"options={shown(self.options)}: {str(error)[:200]}"
            raise ValueError(f"{where}: {got}, expected what JSON can hold") from None

    def configured(self, config: _Config) -> _Config:
        """The lab model's configuration, as the mitigations of kind architecture have it."""
        for mitigation in self._of("architecture"):
            config = mitigation.apply(config)
        return config

    def prepare(self, model: nn.Module) -> nn.Module:
        """Convert `model` in place and put the mitigations of model and recipe on it."""
        convert(model, self.plan)
        for mitigation in self._of("model", "recipe"):
            mitigation.apply(model)
        return model

    def prepare_optimizer(
        self, optimizer: torch.optim.Optimizer, model: nn.Module
    ) -> torch.optim.Optimizer:
        """Put the mitigations of kind optimizer on it; some want to know the model as well."""
        for mitigation in self._of("optimizer"):
            needs_model = getattr(mitigation, "needs_model", False)
            optimizer = mitigation.apply(optimizer, *([model] if needs_model else []))
        return optimizer

    def penalties(self, model: nn.Module) -> list[Callable[[], Tensor]]:
        """What each mitigation of kind loss adds to the loss, asked after a forward."""
        return [mitigation.apply(model) for mitigation in self._of("loss")]

    def require_all_asked(self) -> None:
        """Raises ValueError if the training has not asked for a kind of mitigation that is here."""
        for mitigation in self.mitigations:
            if mitigation.kind not in self._asked:
                got = f"{type(mitigation).__name__} has not been applied"
                expected = f"expected a training that asks its arm for kind {mitigation.kind}"
                raise ValueError(f"Arm {shown(self.name)}: {got}, {expected}")

    def _of(self, *kinds: str) -> list[Mitigation]:
        self._asked.update(kinds)
        return [mitigation for mitigation in self.mitigations if mitigation.kind in kinds]

    def describe(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "name": self.name,
            "title": self.title,
            "recipe": recipe_to_dict(self.plan),
            "mitigations": [_said_of(mitigation) for mitigation in self.mitigations],
            "changes_function": any(m.changes_function for m in self.mitigations),
            "predicted": self.predicted,
            "options": dict(self.options or {}),
        }


def _said_of(mitigation: Mitigation) -> dict[str, Any]:
    """Its name and fields, JSON-able and equal for equal ones in whatever process."""
    said: dict[str, Any] = {"name": type(mitigation).__name__}
    if is_dataclass(mitigation):
        said |= {one.name: _plain(getattr(mitigation, one.name)) for one in fields(mitigation)}
    return said


def _plain(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # an address is of one process


def require_types(where: str, value: object, **types: type) -> None:
    """Raises ValueError, opening with `where`, for an attribute of another type."""
    for name, kind in types.items():
        found = getattr(value, name)
        if not isinstance(found, kind):
            raise ValueError(f"{where}: {name}={shown(found)}, expected a {kind.__name__}")
