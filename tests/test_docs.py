"""Documents that cannot lie: the README's map is the tree, its commands exist, its code runs.

The pages of docs/ are run whole by `documents.py`, each in a fresh folder; the README's fragments
run here, around a small model. What takes minutes there, the demo, is asked of make itself.
"""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import documents
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
    for folder, listed in re.findall(r"^  (\w+)/ .*\n((?:    .*\n)+)", rooms[1], re.MULTILINE):
        files = {path.name for path in (package / folder).glob("*.py")} - {"__init__.py"}
        assert {line.split()[0] for line in listed.splitlines()} == files
    assert set(top) == {"fp8lab/", "docs/", "experiments/", "reports/", "tests/"}
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


def test_the_readme_types_nothing_but_make() -> None:
    """So that all of it is run: targets, which make knows; everything else stands in docs/."""
    for line in "\n".join(blocks("sh")).splitlines():
        target = re.fullmatch(r"make ([a-z-]+) +# .*", line)
        assert target is not None, line
        asked = subprocess.run(
            ["make", "--dry-run", target[1]], cwd=ROOT, capture_output=True, text=True
        )
        assert asked.returncode == 0, asked.stderr
        assert "fp8lab run" in asked.stdout or "pytest" in asked.stdout


def test_what_the_readme_quotes_was_printed() -> None:
    page = (documents.DOCS / "my-run-diverged.md").read_text(encoding="utf-8").splitlines()
    quoted = "".join(blocks("text")).splitlines()
    assert quoted
    assert set(quoted) <= set(page)


def documented() -> list[Path]:
    """Every document with links, but the reports, which programs write."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(documents.DOCS.glob("*.md"))]


def headings(text: str) -> Iterator[str]:
    """Their anchors, as GitHub makes them."""
    code = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#+ (.*)$", code, flags=re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", documented(), ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(<?([^)>]+)>?\)", text):
        assert not link.startswith("http"), f"{document.name}: {link}: readers may be offline"
        path, _, anchor = link.partition("#")
        target = document.parent / unquote(path) if path else document
        assert target.exists(), f"{document.name}: {link}"
        if anchor:
            assert anchor in set(headings(target.read_text(encoding="utf-8"))), link


def test_every_page_can_be_found() -> None:
    linked = {
        (document.parent / link.partition("#")[0]).resolve()
        for document in documented()
        for link in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8"))
    }
    reports = [path for path in (ROOT / "reports").iterdir() if path.suffix in (".md", ".html")]
    assert reports
    assert {*documents.DOCS.glob("*.md"), *reports} <= linked


@pytest.mark.long
@pytest.mark.parametrize("page", documents.pages(), ids=lambda page: page.stem)
def test_a_page_prints_what_it_says(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert documents.renewed(text, tmp_path) == text


def test_the_reference_of_the_commands_is_theirs() -> None:
    text = (documents.DOCS / "cli.md").read_text(encoding="utf-8")
    assert documents.cli_reference() == text
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        of_it = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)
        assert of_it is not None
        names = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
        told = "\n".join(re.findall(r"^\| `(.*?)`", of_it[1], flags=re.MULTILINE))
        options = set(re.findall(r"(?<![\w-])--?\w[\w-]*", told))
        assert options == {name for name in names if name.startswith("-")}


def test_the_gallery_shows_every_report() -> None:
    text = (documents.DOCS / "gallery.md").read_text(encoding="utf-8")
    assert documents.gallery() == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("```text\nhello\n```", "no sh block right before it"),
        ("```sh\ntrue\n```\nWords.\n```text\nhello\n```", "no sh block right before it"),
        ("```toml\nx = 1\n```", "expected one of"),
        ("```python\nprint(1)\n```", "without its name"),
        ("```python\n# lost.py\nprint(1)\n```", "no sh block uses it"),
        ("```sh\nexit 2\n```", "exit code 2"),
        ("```sh\nfalse\nexit 3\n```", "exit code 3"),
        ("```python\n# bad.py\n1 / 0\n```\n```sh\npython bad.py\n```", "ZeroDivisionError"),
    ],
)
def test_a_page_that_is_not_run_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        documents.renewed(text, tmp_path)


def test_what_is_printed_is_what_is_compared(tmp_path: Path) -> None:
    page = "```sh\necho found 3 at 0.25\n```\n\n```text{how}\nfound {said}\n```\n"
    cases = [("", "3 at 0.25", True), ("", "3 at 0.26", False)]
    cases += [(" varying", "31 at  1e-6", True), (" varying", "3 in 0.25", False)]
    for number, (how, said, same) in enumerate(cases):
        text = page.replace("{how}", how).replace("{said}", said)
        (tmp_path / str(number)).mkdir()
        assert (documents.renewed(text, tmp_path / str(number)) == text) is same


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
    if "Guard" in found[number]:  # with a mitigation of FP8
        fp8lab.convert(model, fp8lab.DelayedScaling())
    exec(found[number], names)
    if number < 2:
        assert len(fp8lab.open_run("runs/mine").steps()) == (3 if number == 0 else 0)
    if number == 0:
        assert Path("reports/mine.html").stat().st_size > 0
