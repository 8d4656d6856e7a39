"""One run of an experiment by several processes, which torchrun starts and ends together.

A worker (see `workers`) starts torchrun and hears what the ranks say on their standard output: the
first one's progress, and each one's error. Rows go into the one run directory, a folder a rank. If
a rank dies, torchrun ends the others; if the worker is interrupted, it ends torchrun, which ends
the ranks, and each closes its run; if it is gone, the first rank notices at its next report. What
is not finished is done again by the next `fp8lab run`, as any run is.

Rejected: `torch.multiprocessing`, whose processes would be a worker's own. A rank that hangs in a
collective because another died is torchrun's business, and so is a rank's rendezvous.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
import torch.distributed as dist

from fp8lab.failure import in_one_line
from fp8lab.lab.parallel import Parallel
from fp8lab.store import RunError, open_run

if TYPE_CHECKING:
    from fp8lab.lab.experiment import Part, Report, Settings
    from fp8lab.lab.work import Chosen

MARK = "\x1efp8lab "  # opens a line that is said to the worker


def require_parallel(
    settings: Settings, parts: Iterable[Part], chosen: Chosen, ray: str | None
) -> None:
    """Raises ValueError in one line for what several processes could not do of the chosen runs."""
    size, how, known = settings.processes, settings.parallel, ", ".join(get_args(Parallel))
    if type(size) is not int or size < 1:
        raise ValueError(f"processes: {size!r:.60}, expected at least 1")
    if (size > 1) != (how is not None):
        expected = f"expected both or neither, parallel one of {known}"
        raise ValueError(f"processes: {size}, parallel {how}, {expected}")
    if how is None:
        return
    if how not in get_args(Parallel):
        raise ValueError(f"parallel: {how!r:.60}, expected one of {known}")
    if ray is not None:
        raise ValueError(f"processes: {size} with ray, expected one of them")
    for part in parts:
        arms = [a for a in part.arms if any(chosen.has(part.name, a.name, s) for s in part.seeds)]
        if arms and not part.parallel:
            told = "its training is one of one process"
            raise ValueError(f"part {part.name}: {told}, expected Part(parallel=True)")
        for arm in arms if how != "ddp" else ():
            if arm.mitigations:
                told = f"arm {arm.name}: mitigations under {how}"
                raise ValueError(f"part {part.name}: {told}, expected ddp")


def do_in_processes(
    send: Callable[[Report], None],
    index: int,
    file: Path,
    part_name: str,
    arm_name: str,
    about: tuple[int, Path, Settings],
) -> None:
    """In a worker: one job. Raises RuntimeError if a rank failed or died."""
    from fp8lab.lab.experiment import Report

    seed, path, settings = about
    job = [sys.argv, index, str(file), part_name, arm_name, seed, str(path), asdict(settings)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={settings.processes}", "-m", __name__, json.dumps(job)]
    # torchrun's own account of a failure says no more than what is heard here.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    errors = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            _, mark, told = line.partition(MARK)  # after what an experiment printed, maybe
            kind, _, said = told.partition(" ")
            if mark and kind == "error":
                errors.append(json.loads(said))
            elif mark:
                send(Report(**json.loads(said)))
    except BaseException:
        process.terminate()
        raise
    finally:
        process.wait()
    if process.returncode:
        code = f"torchrun ended with exit code {process.returncode}"
        raise RuntimeError(": ".join(filter(None, [_lost_of(path), *(errors[:1] or [code])])))


def _lost_of(path: Path) -> str:
    try:
        return open_run(path).lost
    except RunError:
        return ""  # nobody came so far


# --- in a rank --------------------------------------------------------------------------------


def _say(kind: str, what: Any) -> None:
    try:
        print(f"{MARK}{kind} {json.dumps(what)}", flush=True)
    except OSError:  # the worker is gone
        raise KeyboardInterrupt from None


def _interrupt(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one does not wait for the run to close
    raise KeyboardInterrupt


def _do(job: list[Any]) -> None:
    from fp8lab.lab.experiment import Settings, do_job

    sys.argv, index, file, part_name, arm_name, seed, path, settings = job
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def report(message: Report) -> None:
        if rank == 0:
            _say("report", asdict(message))

    about = seed, Path(path), Settings(**settings)
    do_job(report, index, Path(file), part_name, arm_name, about)
    dist.barrier()
    dist.destroy_process_group()


def main(job: str) -> None:
    """A rank of the job, JSON of what `do_in_processes` was given."""
    signal.signal(signal.SIGTERM, _interrupt)
    code = 1
    try:
        _do(json.loads(job))
        code = 0
    except (Exception, SystemExit) as error:
        _say("error", in_one_line(error))
    except KeyboardInterrupt:
        pass
    sys.stderr.flush()
    os._exit(code)  # all is closed; gloo's threads may abort a process that ends by itself


if __name__ == "__main__":
    main(sys.argv[1])
