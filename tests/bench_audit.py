"""What an audit costs beside reading the same file, and how much of it is in memory at once.

The file is a gigabyte of random BF16 in a Llama's layout, in the page cache. What reading is has
several readings, and the audit stands beside each, the strictest first: safetensors' `safe_open`
with `get_tensor` of every tensor, which maps and reads nothing, so that each is cloned into memory
of one's own (what loading a model does); safetensors' `load` of the file's bytes; `torch.load`
without mapping of the same weights; and, to know the machine, sums of what was mapped, in float32
and in torch's BF16 kernel. Sides take turns in one process; ratios are medians of paired turns, of
wall seconds and of the process's CPU seconds, which other processes disturb less.

Memory is that of a process of its own: the peak of its resident set while it audits (VmHWM, reset
before; Linux) less what was resident after it audited a small file, so that imports and kernels do
not count. Resident pages of the mapped file count like any others, until they are given back. Run
as a program; a minute or two, and two gigabytes of disk.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from fp8lab.checkpoint import audit

DIM, HIDDEN, VOCABULARY = 2048, 5504, 8192
TURNS = 9
MEASURED = """
import sys
from pathlib import Path
from fp8lab.checkpoint import audit

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

audit(sys.argv[1])
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
audit(sys.argv[2])
print(resident("VmHWM") - before)
"""


def llama(path: Path, layers: int, dim: int = DIM, hidden: int = HIDDEN) -> int:
    """A file of random BF16 weights; the bytes of its largest tensor."""
    tensors = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (VOCABULARY, dim))
    for layer in range(layers):
        for name in "qkvo":
            tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = (dim, dim)
        for name, shape in (
            ("gate", (hidden, dim)),
            ("up", (hidden, dim)),
            ("down", (dim, hidden)),
        ):
            tensors[f"model.layers.{layer}.mlp.{name}_proj.weight"] = shape
    return _random(path, tensors)


def experts(path: Path, count: int = 8, dim: int = 1024, hidden: int = 1024) -> int:
    """The same of GPT-OSS's stacks: an expert is [in, out], and its gate every other column."""
    site = "model.layers.0.mlp.experts"
    return _random(
        path,
        {
            f"{site}.gate_up_proj": (count, dim, 2 * hidden),
            f"{site}.gate_up_proj_bias": (count, 2 * hidden),
            f"{site}.down_proj": (count, hidden, dim),
        },
    )


def _random(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> int:
    generator = torch.Generator().manual_seed(0)
    made = {n: torch.randn(s, generator=generator).mul_(0.02).bfloat16() for n, s in shapes.items()}
    save_file(made, path)
    return max(2 * tensor.numel() for tensor in made.values())


def reading(path: Path, touch: Callable[[Tensor], object]) -> Callable[[], None]:
    def read() -> None:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                touch(file.get_tensor(name))

    return read


class Seconds(NamedTuple):
    wall: float
    cpu: float


def seconds(work: Callable[[], object]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def paired(name: str, read: Callable[[], object], path: Path, turns: int) -> str:
    """A row of the table."""
    read()
    pairs = [(seconds(read), seconds(lambda: audit(path))) for _ in range(turns)]
    cells = [
        f"{statistics.median(one.wall for one in side):.3f}" for side in zip(*pairs, strict=True)
    ]
    cells.append(f"{statistics.median(one.wall / other.wall for one, other in pairs):.0%}")
    cells.append(f"{statistics.median(one.cpu / other.cpu for one, other in pairs):.0%}")
    return f"| {name} | {' | '.join(cells)} |"


def peak(path: Path, small: Path) -> int:
    """Bytes that an audit of a file has at once, of a process that has audited a small one."""
    command = [sys.executable, "-c", MEASURED, str(small), str(path)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def audit_lines(layers: int = 10, turns: int = TURNS) -> list[str]:
    """Markdown: the audit beside each way of reading, and its memory."""
    with tempfile.TemporaryDirectory() as folder:
        path, small = Path(folder) / "large.safetensors", Path(folder) / "small.safetensors"
        largest = llama(path, layers)
        llama(small, 1, 64, 128)
        size = path.stat().st_size
        audit(path)
        lines = [
            f"A file of {size / 1e9:.2f} GB in the page cache, {torch.get_num_threads()} torch "
            f"threads; medians of {turns} paired turns.",
            "",
            "| reading | reading, s | audit, s | audit's share of its speed | by CPU seconds |",
            "|---|---|---|---|---|",
        ]
        copy = Path(folder) / "large.pt"
        torch.save(load_file(path), copy)
        stacks = Path(folder) / "experts.safetensors"
        largest_stack = experts(stacks)
        readers = {
            "get_tensor and clone": reading(path, torch.clone),
            "safetensors.torch.load of the file's bytes": lambda: load(path.read_bytes()),
            "torch.load(mmap=False) of the same": lambda: torch.load(copy, mmap=False),
            "get_tensor and a float32 sum": reading(path, lambda one: one.sum(dtype=torch.float32)),
            "get_tensor and a BF16 sum": reading(path, torch.sum),
        }
        lines += [paired(name, read, path, turns) for name, read in readers.items()]
        cloned = reading(stacks, torch.clone)
        lines.append(paired("stacks of experts: get_tensor and clone", cloned, stacks, turns))
        lines.append("")
        for name, file, of in (
            ("this file", path, largest),
            ("stacks of experts, transposed, as GPT-OSS has them", stacks, largest_stack),
        ):
            most = peak(file, small)
            lines.append(
                f"Peak memory of the audit of {name}: {most / of:.2f} of the largest tensor "
                f"({most / 1e6:.0f} of {of / 1e6:.0f} MB)."
            )
    return lines


if __name__ == "__main__":
    print("\n".join(audit_lines()))
