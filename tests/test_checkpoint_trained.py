"""Checkpoints of real trainings: what an audit says of healthy ones, and of one that is breaking.

A small Llama learns the standard library's source, at a learning rate that suits it: at three times
that its channels do become hot, with data too, and the audit says so. The rare-token regression
breaks under delayed scaling and does not in BF16. Weights alone do not separate the two long before
the end; held here is that a healthy one raises no alarm, and that one on its way out does.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import fp8lab
from fp8lab.checkpoint import Audit, audit
from fp8lab.lab.rare_tokens import BF16, Regression, Student, fp8
from fp8lab.plan import Plan

pytestmark = pytest.mark.long


def aligned(found: Audit) -> dict[str, float]:
    """The largest gain among the channels of each severity of this finding."""
    gains: dict[str, float] = {}
    for finding in found.findings:
        if finding.cause == "gate_up_alignment":
            (gain,) = (e.value for e in finding.evidence if e.quantity.startswith("gain"))
            gains[finding.severity] = max(gain, gains.get(finding.severity, 0.0))
    return gains


def test_a_healthy_llama_has_a_note_and_no_alarm(tmp_path: Path) -> None:
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = torch.tensor(list(b"".join(file.read_bytes() for file in files[:60])))
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=256, num_attention_heads=4, num_key_value_heads=4, **sizes)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    losses = []
    for _ in range(500):
        starts = torch.randint(len(text) - 49, (4,)).tolist()
        batch = torch.stack([text[start : start + 48] for start in starts])
        loss: Tensor = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    model.save_pretrained(tmp_path)
    assert sum(losses[-50:]) / 50 < 0.5 * losses[0]
    found = audit(tmp_path)
    assert list(aligned(found)) == ["low"]
    assert not found.severe and {one.severity for one in found.findings} == {"low"}
    assert "none yet: its gain is ordinary" in str(found)


def regressed(plan: Plan, steps: int) -> Student:
    """The rare-token regression of `swiglu_divergence`, seed 9, after so many steps."""
    model, task = Student(9), Regression(9)
    fp8lab.convert(model, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.025)
    for step in range(steps):
        loss, _ = task.loss(model, step)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model


def test_a_training_on_its_way_out_is_an_alarm() -> None:
    """A hundred steps before delayed scaling loses it; its twin in BF16 has aligned rows too."""
    breaking, healthy = (audit(regressed(plan, 540)) for plan in (fp8(16), BF16))
    assert breaking.severe and aligned(breaking)["high"] > 16.0
    assert list(aligned(healthy)) == ["low"] and not healthy.severe
    first = breaking.findings[0]
    assert (first.cause, first.severity, first.channel) == ("gate_up_alignment", "high", 37)
    assert first.remedy.startswith("SmoothSwiGLU")
