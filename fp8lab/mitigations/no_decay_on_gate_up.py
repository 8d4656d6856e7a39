"""No weight decay on the matrices of gate and up.

Theorem 1 of Fishman et al. (2409.12517) makes weight decay the cause of the alignment of gate and
up, and a remark on it foretells larger norms without it. As a remedy it is not published as far as
we know: an experiment. Their biases, and every other parameter, keep the decay that they had.

The optimizer's parameter groups that decay are split: gate and up move to groups of their own
behind all others, with the options of the group that they were in and weight_decay 0. A state of
the optimizer before the split has other groups and does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fp8lab.mitigations.hooks import Group, Optimizer, check_optimizer
from fp8lab.sites import find_gates

_THAT_KNOW_THE_GROUPS = {
    "initial_lr": "a learning rate scheduler",
    "adagc": "AdaGC",
    "spam": "SPAM",
    "zclip": "ZClip",
}


@dataclass(frozen=True, kw_only=True)
class NoDecayOnGateUp:
    """Take gate and up of every gated feed-forward out of weight decay."""

    kind: ClassVar[str] = "optimizer"
    needs_model: ClassVar[bool] = True
    changes_function: ClassVar[bool] = False
    foldable: ClassVar[bool] = True  # the trained model has nothing of it
    cost: ClassVar[str] = "a parameter group more"
    source: ClassVar[str] = "an experiment on Fishman et al. 2409.12517, theorem 1"

    def apply(self, optimizer: Optimizer, model: nn.Module) -> Optimizer:
        """Put it on any torch optimizer of `model`'s parameters; returns the same optimizer.

        Raises ValueError, with nothing changed, if the model has no gated feed-forward; if a gate
        or up is not a parameter of the optimizer (flattened ones are not); if none of them decays;
        or if a learning rate scheduler or a mitigation is there already that counts on the groups
        it knows.
        """
        who = type(self).__name__
        check_optimizer(who, optimizer)
        chosen = _gates_and_ups(model)
        groups = optimizer.param_groups
        known = {id(parameter) for group in groups for parameter in group["params"]}
        for key, name in chosen.items():
            if key not in known:
                raise ValueError(f"{who}: {name} is no parameter of the {type(optimizer).__name__}")
        decaying = [
            group
            for group in groups
            if group.get("weight_decay") and any(id(p) in chosen for p in group["params"])
        ]
        if not decaying:
            raise ValueError(f"{who}: no gate and no up has weight decay, nothing to take off")
        for mark, owner in _THAT_KNOW_THE_GROUPS.items():
            if any(mark in group for group in groups):
                raise ValueError(f"{who}: {owner} knows the groups already, expected this before")
        for group in decaying:
            moved = _split(group, chosen)
            if not group["params"]:
                group.update(moved)
            else:
                optimizer.add_param_group(moved)
        return optimizer


def _gates_and_ups(model: nn.Module) -> dict[int, str]:
    """By the id of the parameter, where it is."""
    return {
        id(projection.parameter): f"{site.name}: {projection.name}"
        for site in find_gates(model)
        for projection in (site.gate, site.up)
    }


def _split(group: Group, chosen: dict[int, str]) -> Group:
    """Take gates and ups out of a group; returns the group that they come into."""
    stays: list[Tensor] = []
    leaves: list[Tensor] = []
    names: dict[bool, list[str]] = {True: [], False: []}
    for index, parameter in enumerate(group["params"]):
        is_chosen = id(parameter) in chosen
        (leaves if is_chosen else stays).append(parameter)
        if "param_names" in group:
            names[is_chosen].append(group["param_names"][index])
    moved = {**group, "params": leaves, "weight_decay": 0.0}
    group["params"] = stays
    if "param_names" in group:
        moved["param_names"], group["param_names"] = names[True], names[False]
    return moved
