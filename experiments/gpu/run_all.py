"""The GPU suite: every part, one process, ten minutes, no network.

    python experiments/gpu/run_all.py --out DIR              on a machine with a Hopper
    python experiments/gpu/run_all.py --out DIR --rehearse   tiny, on a CPU: does the code run?

Says first what is here and what is missing; a part that needs what is missing is left out by name.
Each part has its seconds: it is told how many are left, and stopped where it does not listen. What
it found lies in DIR/PART.json from the first row on; DIR/gpu.md is all of it. `write_report.py`
brings a real run into `reports/`; a rehearsal it refuses.

Rejected: a process for each part, whose start costs ten seconds of TE's import each; and pytest,
which the machine may not have.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import platform
import shutil
import signal
import sys
import time
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NEEDED_BY_TE = "transformer_engine", "pydantic"
# Part -> seconds, what it cannot do without.
PARTS: dict[str, tuple[float, tuple[str, ...]]] = {
    "casts_against_te": (110.0, NEEDED_BY_TE),
    "kernels": (70.0, ("triton",)),
    "overhead": (170.0, ("numpy", "pandas", "pyarrow")),
    "training": (200.0, NEEDED_BY_TE),
}
OPTIONAL = (
    *("transformer_engine", "pydantic", "packaging", "nvdlfw_inspect", "onnx", "onnxscript"),
    *("einops", "triton", "numpy", "pandas", "pyarrow", "yaml"),
)


def main() -> int:
    """Run the parts that were asked for; the exit status is 1 if one did not end well."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT", "runs/gpu"))
    parser.add_argument("--rehearse", action="store_true", help="tiny, on a CPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT)]
    if options.rehearse:
        # TE compiles some of its statistics, for a GPU that is not there.
        os.environ |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        print("run_all: no CUDA device here, expected one, or --rehearse", file=sys.stderr)
        return 2
    missing = frozenset(name for name in OPTIONAL if find_spec(name) is None)
    if options.rehearse and "numpy" in missing:
        print("run_all: numpy is missing, expected for a rehearsal", file=sys.stderr)
        return 2
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    machine = about(torch, options.rehearse, missing)
    (out / "machine.json").write_text(json.dumps(machine, indent=1), encoding="utf-8")
    print("; ".join(f"{name}: {value}" for name, value in machine.items()), flush=True)
    left_out = {p: absent for p in options.only if (absent := missing & {*PARTS[p][1]})}
    for part, absent in left_out.items():
        print(f"{part} is left out: {', '.join(sorted(absent))} missing here", flush=True)
    failed = False
    for part in options.only:
        ended = run(part, options.rehearse, out, missing, left_out.get(part, frozenset()))
        failed |= ended != "complete"
    from write_report import markdown

    (out / "gpu.md").write_text(markdown(out), encoding="utf-8")
    print(f"written: {out / 'gpu.md'}")
    return int(failed)


def about(torch: Any, rehearsal: bool, missing: frozenset[str]) -> dict[str, str]:
    """What this runs on, for the top of the report."""
    told = {"device": "CPU (rehearsal)"} if rehearsal else {}
    if not rehearsal:
        device = torch.cuda.get_device_properties(0)
        capability = f"sm_{device.major}{device.minor}"
        told["device"] = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, {capability}"
    told |= {"torch": torch.__version__, "CUDA": str(torch.version.cuda)}
    told["Python"] = platform.python_version()
    for name, package in (("Triton", "triton"), ("Transformer Engine", "transformer_engine")):
        told[name] = "missing" if package in missing else _version(package)
    told["C compiler"] = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), "none")
    from fp8lab import kernels

    told["compiled CPU casts"] = kernels.why_unavailable() or "yes"
    told["missing"] = ", ".join(sorted(missing)) or "nothing"
    return told


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "no version known"


class OutOfTimeError(TimeoutError):
    """A part has used its seconds."""


def run(
    part: str, rehearsal: bool, out: Path, missing: frozenset[str], absent: frozenset[str]
) -> str:
    """How a part ended; its page lies in `out`, whatever happened."""
    import torch
    from suite import Page, Setting, last_line

    seconds = PARTS[part][0]
    page = Page(part, part, out / f"{part}.json")
    begun = time.monotonic()

    def stop(*_: object) -> None:
        raise OutOfTimeError(f"{seconds:.0f} s were over")

    signal.signal(signal.SIGALRM, stop)
    print(f"\n=== {part}, at most {seconds:.0f} s", flush=True)
    try:
        if absent:
            page.ended = f"left out: {', '.join(sorted(absent))} missing"
            return page.ended
        page.save()
        # And every ten seconds: who goes on whatever a hook raises may have swallowed the first.
        signal.setitimer(signal.ITIMER_REAL, seconds, 10.0)
        module = importlib.import_module(part)
        page.title = module.TITLE
        device = "cpu" if rehearsal else "cuda"
        # The soft end comes first, so that what is under way can still become a row.
        setting = Setting(device, rehearsal, out, begun + 0.9 * seconds, missing)
        module.run(setting, page)
        page.ended = "complete"
    except Exception as error:  # the others go on
        traceback.print_exc()
        page.ended = last_line(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        page.seconds = time.monotonic() - begun
        gc.collect()  # what a part leaves on the device is not the next one's
        if not rehearsal:
            torch.cuda.empty_cache()
        page.save()
        print(f"{part}: {page.ended}, {page.seconds:.0f} s", flush=True)
    return page.ended


if __name__ == "__main__":
    sys.exit(main())
