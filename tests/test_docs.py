"""Documents that cannot lie: the README's map is the tree, its commands exist, its code runs."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.main import get_command

import fp8lab
from fp8lab import GatedFeedForward
from fp8lab.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_map_is_the_tree() -> None:
    rooms = re.search(r"## The rooms\n\n```\n(.*?)```", README, flags=re.DOTALL)
    assert rooms is not None
    inside = re.findall(r"^  (\S+) ", rooms[1], flags=re.MULTILINE)
    top = re.findall(r"^(\S+/)", rooms[1], flags=re.MULTILINE)
    package = ROOT / "fp8lab"
    on_disk = {
        f"{entry.name}/" if entry.is_dir() else entry.name
        for entry in package.iterdir()
        if entry.name not in ("__pycache__", "py.typed")
    }
    assert set(inside) == on_disk
    assert set(top) == {"fp8lab/", "experiments/", "reports/", "tests/"}
    assert all((ROOT / folder).is_dir() for folder in top)


def test_every_command_is_in_the_readme_and_every_one_there_exists() -> None:
    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"\| `fp8lab (\w+)", README)) == commands


def test_every_command_and_option_has_help() -> None:
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        assert command.help, f"{name} has no help"
        for parameter in command.params:
            described = getattr(parameter, "help", None)
            assert described, f"{name} {parameter.name} has no help"


def test_every_make_target_in_the_documents_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)\b", " ".join(blocks("sh")) + contributing))
    assert named, "the documents name no target"
    assert named <= targets


def test_every_relative_link_leads_somewhere() -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert (ROOT / link).exists(), f"{name}: {link}"


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = GatedFeedForward(16, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("number", range(5))
def test_the_python_blocks_run_as_they_stand(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("reports").mkdir()
    model = Model()
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)

    def train_step(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        opt.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        opt.step()
        return loss

    found = blocks("python")
    assert len(found) == 5
    names = {
        "fp8lab": fp8lab,
        "torch": torch,
        "model": model,
        "opt": opt,
        "train_step": train_step,
        "batches": [torch.randn(4, 16) for _ in range(3)],
    }
    if "replay" in found[number]:  # of a run that is there
        exec(found[0].replace("runs/mine", "runs/bf16"), names)
    exec(found[number], names)
    if number < 2:
        assert len(fp8lab.open_run("runs/mine").steps()) == (3 if number == 0 else 0)
    if number == 0:
        assert Path("reports/mine.html").stat().st_size > 0
