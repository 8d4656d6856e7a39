"""What `convert` refuses, in a line each, before anything has been changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fp8lab
from fp8lab import DelayedScaling, GatedFeedForward, Plan
from fp8lab.linear import Fp8Linear

LONG = "x" * 10_000


def model() -> nn.Module:
    return nn.Sequential(GatedFeedForward(16, 32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"exclude": ["*.gait"]},
            "convert: pattern '*.gait' matches no linear layer, expected one of 3, nearest 0.gate",
        ),
        (
            {"overrides": {"*.gait:input": DelayedScaling()}},
            "convert: pattern '*.gait' matches no linear layer, expected one of 3, nearest 0.gate",
        ),
        (
            {"exclude": "head"},
            "convert: pattern 'head' matches no linear layer, expected one of 3, nearest 0.gate",
        ),
        ({"include": [LONG]}, "convert: pattern 'xxx"),
        (
            {"exclude": ["*"]},
            "convert: nothing to convert in Sequential: 3 linear layers, none inc",
        ),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(options: Any, message: str) -> None:
    refused = model()
    with pytest.raises(ValueError) as caught:
        fp8lab.convert(refused, DelayedScaling(), **options)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
    assert not any(isinstance(module, Fp8Linear) for module in refused.modules())


@pytest.mark.parametrize(
    ("option", "written"),
    [
        ({"include": ["0*"]}, "include: ['0*']"),
        ({"exclude": "lm_head"}, "exclude: ['lm_head']"),
        ({"overrides": {"*:weight": DelayedScaling()}}, "overrides: …"),
    ],
)
def test_a_plan_has_its_own_patterns(option: dict[str, Any], written: str) -> None:
    (name,) = option
    with pytest.raises(ValueError) as caught:
        fp8lab.convert(model(), Plan(recipe=DelayedScaling()), **option)
    assert str(caught.value) == (
        f"convert: {name}= beside a plan, expected in the plan: `{written}` in its file, "
        f"or dataclasses.replace(plan, {name}=…)"
    )


def test_what_is_converted_is_not_converted_again() -> None:
    converted = fp8lab.convert(model(), DelayedScaling())
    with pytest.raises(ValueError, match=r"^convert: 0\.gate is a Fp8Linear \(converted already\)"):
        fp8lab.convert(converted, DelayedScaling())


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^convert: nothing to convert in Identity: 0 linear lay"):
        fp8lab.convert(nn.Identity(), DelayedScaling())


def test_a_layer_with_a_forward_of_its_own_is_refused() -> None:
    patched = model()
    patched[0].up.forward = lambda x: torch.zeros(1)
    with pytest.raises(ValueError, match=r"^convert: 0\.up has a forward of its own: exclude it"):
        fp8lab.convert(patched, DelayedScaling())
    assert type(patched[0].gate) is nn.Linear
