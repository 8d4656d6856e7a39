"""The lab's data: pure functions of (seed, step), hashes that hold, splits that do not touch."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
import sysconfig
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from fp8lab.ffn import GatedFeedForward
from fp8lab.lab import data
from fp8lab.lab.data import Corpus, RareToken, read_text, stdlib_text


def corpus_of(raw: bytes) -> Corpus:
    return Corpus(
        data=np.frombuffer(raw, dtype=np.uint8),
        sha256=hashlib.sha256(raw).hexdigest(),
        source="test",
    )


def positions(length: int) -> Corpus:
    """A corpus whose windows tell where they come from: every byte differs from its neighbours."""
    return corpus_of(bytes(i % 251 for i in range(length)))


# Corpus


def test_corpus_is_validated_and_frozen() -> None:
    raw = b"some text, long enough"
    array = np.frombuffer(raw, dtype=np.uint8)
    sha256 = hashlib.sha256(raw).hexdigest()
    corpus = Corpus(data=array, sha256=sha256, source="test")
    with pytest.raises(FrozenInstanceError):
        corpus.source = "other"
    assert corpus == corpus_of(raw) and corpus != corpus_of(raw + b".")
    assert hash(corpus) == hash(corpus_of(raw))
    for wrong in (array.astype(np.int16), array.reshape(2, -1), array.copy()):
        with pytest.raises(ValueError, match="corpus test: data must be a read-only uint8 vector"):
            Corpus(data=wrong, sha256=sha256, source="test")
    with pytest.raises(ValueError, match="corpus test: data does not have SHA-256 beef"):
        Corpus(data=array, sha256="beef", source="test")


def test_windows_are_consecutive_bytes() -> None:
    corpus = positions(5000)
    for split in ("train", "held_out"):
        windows = corpus.batch(3, seed=1, batch=32, context=20, split=split)
        assert windows.dtype == torch.int64 and windows.shape == (32, 21)
        assert ((windows[:, 1:] - windows[:, :-1]) % 251 == 1).all()


@pytest.mark.parametrize("length", [200, 201, 209, 210, 250])
def test_splits_are_reached_to_the_last_byte_and_never_overlap(length: int) -> None:
    corpus = positions(length)  # every byte is its own position
    seen: dict[str, set[int]] = {"train": set(), "held_out": set()}
    for split, found in seen.items():
        for step in range(200):
            windows = corpus.batch(step, seed=0, batch=16, context=9, split=split)
            found.update(windows.flatten().tolist())
    border = length - length // 10
    assert seen["train"] == set(range(border))
    assert seen["held_out"] == set(range(border, length))
    assert corpus.border == border


def test_starts_are_uniform() -> None:
    windows = positions(251).batch(0, seed=0, batch=100_000, context=1)
    counts = torch.bincount(windows[:, 0])
    border = 251 - 25
    assert len(counts) == border - 1
    expected = 100_000 / (border - 1)
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    degrees = border - 2
    assert abs(chi_squared - degrees) < 5 * math.sqrt(2 * degrees)


def test_batch_is_a_pure_function_of_seed_and_step() -> None:
    corpus = positions(100_000)

    def draw(step: int, seed: int = 0, split: str = "train") -> torch.Tensor:
        return corpus.batch(step, seed=seed, batch=8, context=16, split=split)

    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    forward = [draw(step) for step in range(20)]
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    torch.manual_seed(99)
    backward = [draw(step) for step in reversed(range(20))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert len({tuple(window.flatten().tolist()) for window in forward}) == 20
    assert not torch.equal(draw(0), draw(0, seed=1))
    assert not torch.equal(draw(1, seed=0), draw(0, seed=1))


def test_a_batch_can_be_written_to() -> None:
    corpus = positions(1000)
    batch = corpus.batch(0, seed=0, batch=2, context=8)
    kept = batch.clone()
    batch.zero_()
    assert torch.equal(corpus.batch(0, seed=0, batch=2, context=8), kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "corpus test: expected batch and context of at least 1, got 0 and 8"),
        ({"context": 0}, "corpus test: expected batch and context of at least 1, got 2 and 0"),
        ({"context": 100}, "text test: has 1000 bytes, but context 100 needs at least 1010"),
        ({"seed": -1}, "train: expected seed and step in [0, 2^32), got -1 and 5"),
        ({"step": 2**32}, "train: expected seed and step in [0, 2^32), got 0 and 4294967296"),
        ({"split": "test"}, "corpus test: split must be one of train, held_out, got 'test'"),
    ],
)
def test_batch_errors(change: dict[str, object], message: str) -> None:
    arguments = {"step": 5, "seed": 0, "batch": 2, "context": 8} | change
    with pytest.raises(ValueError) as caught:
        positions(1000).batch(**arguments)
    assert str(caught.value) == message


def test_the_shortest_text_for_a_context() -> None:
    for split in ("train", "held_out"):
        windows = positions(90).batch(0, seed=0, batch=4, context=8, split=split)
        assert windows.shape == (4, 9)
        with pytest.raises(ValueError, match="has 89 bytes, but context 8 needs at least 90"):
            positions(89).batch(0, seed=0, batch=4, context=8, split=split)


# The standard library


def test_stdlib_text_is_its_files_and_its_hash() -> None:
    corpus = stdlib_text()
    root = Path(sysconfig.get_path("stdlib"))
    names = data._stdlib_names(root)
    assert names == sorted(set(names))
    digest, size = hashlib.sha256(), 0
    for name in names:
        raw = (root / name).read_bytes()
        digest.update(raw)
        size += len(raw)
    assert size <= data.CORPUS_CAP  # else the hash below is that of a prefix
    assert corpus.sha256 == digest.hexdigest()
    assert len(corpus.data) == size > 4_000_000
    assert corpus.source.endswith(f", {len(names)} files") and str(root) not in corpus.source
    assert corpus == stdlib_text()


def test_stdlib_names_leave_out_tests_and_this_installation() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    names = data._stdlib_names(root)
    assert {"argparse.py", "json/decoder.py", "importlib/metadata/__init__.py"} <= set(names)
    for name in names:
        assert name.endswith(".py")
        assert not {"test", "tests", "site-packages", "idlelib", "__pycache__"} & set(
            name.split("/")
        )
        assert "sysconfigdata" not in name and "sitecustomize" not in name


def fake_library(root: Path, monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    for name, size in sizes.items():
        (root / f"{name}.py").write_bytes(name.encode() * size)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(root))


def test_stdlib_text_is_capped_at_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_library(tmp_path, monkeypatch, a=40, b=60, c=1, _sysconfigdata__x=5, sitecustomize=5)
    assert stdlib_text().data.tobytes() == b"a" * 40 + b"b" * 60 + b"c"
    monkeypatch.setattr(data, "CORPUS_CAP", 100)
    corpus = stdlib_text()
    assert corpus.data.tobytes() == b"a" * 40 + b"b" * 60
    assert corpus.source.endswith(", 2 files")
    monkeypatch.setattr(data, "CORPUS_CAP", 99)
    assert stdlib_text().data.tobytes() == b"a" * 40


def test_stdlib_text_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_library(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="standard library has no source files"):
        stdlib_text()


# The user's file


def test_read_text_is_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(bytes(range(256)))
    for given in (path, str(path)):
        corpus = read_text(given)
        assert corpus.data.tobytes() == path.read_bytes()
        assert corpus.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert corpus.source == "mine.txt"


def test_read_text_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(b"x" * 19)
    (tmp_path / "folder").mkdir()
    expected = {
        "missing": "No such file or directory",
        "folder": "Is a directory",
        "empty": "the file is empty",
        "short": "has 19 bytes, but context 1 needs at least 20",
    }
    for name, reason in expected.items():
        path = tmp_path / name
        with pytest.raises(ValueError) as caught:
            read_text(path)
        assert str(caught.value).removeprefix(f"text {path}: ") == reason
    with pytest.raises(ValueError, match="has 19 bytes, but context 128 needs at least 1290"):
        read_text(tmp_path / "short", context=128)


# The rare token


def test_rare_token_batch_is_pure() -> None:
    task, twin = RareToken(seed=4), RareToken(seed=4)
    state = torch.get_rng_state()
    forward = [task.batch(step) for step in range(60)]
    backward = [twin.batch(step) for step in reversed(range(60))][::-1]
    for first, second in zip(forward, backward, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(forward[0][0], forward[1][0])
    other = RareToken(seed=5)
    assert not torch.equal(task.rare_input, other.rare_input)
    assert not torch.equal(task.teacher[0], other.teacher[0])
    assert not torch.equal(task.batch(0)[0], other.batch(0)[0])


def test_common_tokens_avoid_u_and_follow_the_teacher() -> None:
    task = RareToken(seed=0)
    module = GatedFeedForward(task.dim, task.hidden)
    for child, weight in zip((module.gate, module.up, module.down), task.teacher, strict=True):
        child.weight.data.copy_(weight)
    tokens, targets = [], []
    for step in range(100):
        x, y, is_rare = task.batch(step)
        assert (x.dtype, y.dtype, is_rare.dtype) == (torch.float32, torch.float32, torch.bool)
        assert x.shape == y.shape == (128, 64) and is_rare.shape == (128,)
        assert torch.equal(module(x)[~is_rare], y[~is_rare])
        tokens.append(x[~is_rare])
        targets.append(y[~is_rare])
    x, y = torch.cat(tokens).double(), torch.cat(targets)
    u = task.rare_input.double()
    assert (x @ u).abs().max() < 1e-4  # |x||u| is about 64
    # N(0, I) less one direction: the covariance is the projector, to five standard errors of each.
    covariance = x.T @ x / len(x)
    projector = torch.eye(64, dtype=torch.float64) - torch.outer(u, u) / 64
    assert (covariance - projector).abs().max() < 5 * math.sqrt(2 / len(x))
    assert 0.8 < y.square().mean() < 1.2


def test_rare_token_is_u_with_target_v() -> None:
    task = RareToken(seed=1, event_probability=1.0)
    assert torch.equal(task.rare_input.abs(), torch.ones(64))
    assert torch.equal(task.rare_target.abs(), torch.full((64,), 7.5))
    assert task.rare_target.norm().item() == 60.0
    assert abs(task.rare_input.sum()) < 40 and abs(task.rare_target.sum()) < 40 * 7.5
    noise, rows = [], set()
    for step in range(300):
        x, y, is_rare = task.batch(step)
        assert is_rare.sum() == 1
        assert torch.equal(y[is_rare][0], task.rare_target)
        noise.append(x[is_rare][0] - task.rare_input)
        rows.add(int(is_rare.nonzero()))
    assert len(rows) > 100  # of 128 rows, 116 are expected
    assert torch.stack(noise).std().item() == pytest.approx(0.1, rel=5 / math.sqrt(2 * 300 * 64))
    exact = replace(task, noise=0.0).batch(0)
    assert torch.equal(exact[0][exact[2]][0], task.rare_input)


def test_events_come_with_their_probability() -> None:
    for probability in (1 / 40, 0.5):
        task = RareToken(seed=2, dim=2, hidden=2, batch_size=2, event_probability=probability)
        rare = [bool(task.batch(step)[2].any()) for step in range(8000)]
        error = math.sqrt(probability * (1 - probability) / 8000)
        assert abs(sum(rare) / 8000 - probability) < 4 * error
        # Independent of the step before: pairs come with the square of the probability.
        pairs = sum(a and b for a, b in pairwise(rare)) / 8000
        assert abs(pairs - probability**2) < 5 * math.sqrt(probability**2 / 8000)


def test_common_tokens_do_not_depend_on_the_events() -> None:
    always = RareToken(seed=3, event_probability=1.0)
    never = replace(always, event_probability=0.0)
    for step in range(20):
        x, y, is_rare = always.batch(step)
        plain_x, plain_y, none = never.batch(step)
        assert not none.any()
        assert torch.equal(x[~is_rare], plain_x[~is_rare])
        assert torch.equal(y[~is_rare], plain_y[~is_rare])


def test_scales_scale() -> None:
    task = RareToken(seed=0)
    scaled = replace(task, teacher_scale=4.0, target_scale=120.0)
    assert torch.equal(scaled.batch(0)[1], 4 * task.batch(0)[1])
    assert torch.equal(scaled.rare_target, 2 * task.rare_target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, "RareToken.dim: expected at least 1, got 0"),
        ({"hidden": 0}, "RareToken.hidden: expected at least 1, got 0"),
        ({"batch_size": 0}, "RareToken.batch_size: expected at least 1, got 0"),
        ({"event_probability": 1.5}, "RareToken.event_probability: expected 0 to 1, got 1.5"),
        ({"noise": -1.0}, "RareToken.noise: expected finite and at least 0, got -1.0"),
        (
            {"target_scale": math.nan},
            "RareToken.target_scale: expected finite and at least 0, got nan",
        ),
        (
            {"teacher_scale": math.inf},
            "RareToken.teacher_scale: expected finite and at least 0, got inf",
        ),
        ({"seed": -1}, "rare_token_task: expected seed and step in [0, 2^32), got -1 and 0"),
    ],
)
def test_rare_token_errors(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        RareToken(**{"seed": 0} | change)
    assert str(caught.value) == message


PRINT_DIGEST = """
import hashlib
import torch
from fp8lab.lab.data import RareToken, stdlib_text
torch.set_num_threads({threads})
digest = hashlib.sha256()
for split in ("train", "held_out"):
    digest.update(stdlib_text().batch(7, seed=3, batch=4, context=32, split=split).numpy())
for tensor in RareToken(seed=3).batch(7):
    digest.update(tensor.numpy())
print(digest.hexdigest())
"""


@pytest.mark.long
def test_same_batches_in_every_process_and_on_any_number_of_threads() -> None:
    printed = {
        subprocess.run(
            [sys.executable, "-c", PRINT_DIGEST.format(threads=threads)],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
        ).stdout
        for threads, hash_seed in ((1, "1"), (2, "2"))
    }
    assert len(printed) == 1 and len(printed.pop().strip()) == 64
