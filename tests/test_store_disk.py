"""Disks that are full, read-only or gone: no flushed row is lost, and what waits is written later.

The disks are real: each scenario runs in a process with a mount namespace of its own, where it
mounts a few kilobytes of memory as a file system (no root needed, but a kernel that lets users make
namespaces; without, these tests are skipped). The file is both the test and the process.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from errno import ENOENT, ENOSPC, EROFS
from pathlib import Path

import pytest
from test_store import TABLE_NAMES, add, only, write, written

from fp8lab import store
from fp8lab.store import RunError, RunWriter, find_runs, open_run

PAGE = 4096
Scenario = Callable[[Path], None]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


def namespace(*command: str) -> subprocess.CompletedProcess[str]:
    unshare = ["unshare", "--user", "--map-root-user", "--mount", *command]
    return subprocess.run(unshare, capture_output=True, text=True, check=False)


def mount(disk: Path, *options: str) -> None:
    subprocess.run(["mount", *options, "fp8lab-test", str(disk)], check=True)


def leave(disk: Path, pages: int) -> Path:
    """Fill the disk up to so many pages."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"\1" * PAGE) == PAGE:
                pass
        except OSError as error:
            assert error.errno == ENOSPC
        size = file.tell() // PAGE * PAGE
        file.truncate(max(size - pages * PAGE, 0))
    return filler


def refused(action: Callable[[], object]) -> OSError:
    try:
        action()
    except OSError as error:
        return error
    raise AssertionError("the disk took it")


@scenario
def full_when_it_starts(disk: Path) -> None:
    leave(disk, 0)
    for rank in (0, 3):
        try:
            RunWriter.create(disk / "runs" / "one", {}, rank=rank)
        except RunError as error:
            assert str(error) == f"{disk}/runs/one: cannot be created: No space left on device"
        else:
            raise AssertionError("the disk took it")
        assert not (disk / "runs" / "one").exists()


@scenario
def full_for_a_while(disk: Path) -> None:
    writer = write(disk / "run", range(3))
    filler = leave(disk, 0)
    for step in range(3, 6):
        add(writer, range(step, step + 1), flush_every=100)
        assert refused(writer.flush).errno == ENOSPC
        assert written(disk / "run") == only(range(3))
        assert len(list((disk / "run" / "segments").iterdir())) == 3  # no half of a fourth
    assert writer.pending == 3 * 2 * len(TABLE_NAMES)
    assert refused(lambda: writer.set_state("running")).errno == ENOSPC
    filler.unlink()
    writer.flush()
    assert writer.pending == 0
    assert written(disk / "run") == only(range(6))
    writer.close()
    assert written(disk / "run") == only(range(6))
    left = {path.name for path in (disk / "run").iterdir()}
    assert left == {"run.json", *(f"{table}.parquet" for table in TABLE_NAMES)}


@scenario
def full_for_one_who_does_not_wait(disk: Path) -> None:
    writer = write(disk / "run", range(3))
    filler = leave(disk, 0)
    add(writer, range(3, 4), flush_every=100)
    writer.flush(wait=False)  # told by the next one
    for _ in range(2):
        assert writer._writing is not None
        writer._writing[0].exception()
        assert refused(lambda: writer.flush(wait=False)).errno == ENOSPC
    filler.unlink()
    writer.flush()
    assert written(disk / "run") == only(range(4))


@scenario
def full_after_so_many_pages(disk: Path) -> None:
    """Full at each point of flushing, merging, closing and resuming, one after the other."""
    ends = set()
    for pages in range(0, 64, 4):
        path = disk / f"run{pages}"
        writer = write(path, range(14))
        add(writer, range(14, 18), flush_every=100)
        filler = leave(disk, pages)
        steps = 14
        try:
            writer.flush()
            steps = 18
            writer.close()
            end = "closed"
        except OSError:
            end = "flushed" if steps == 18 else "refused"
        ends.add(end)
        assert not list(path.glob(".*")), "what could not be finished takes no room"
        assert written(path) == only(range(steps)), pages
        try:
            RunWriter.resume(path, 10)
        except RunError as error:
            assert str(error) == f"{path}: cannot be resumed: No space left on device"
            assert written(path) == only(range(steps)), pages
        filler.unlink()
        again = RunWriter.resume(path, 10)
        assert written(path) == only(range(10))
        add(again, range(10, 12))
        again.close()
        assert written(path) == only(range(12))
        assert list(find_runs(disk)) == [path]
        shutil.rmtree(path)
    assert ends == {"refused", "flushed", "closed"}


@scenario
def full_to_the_end(disk: Path) -> None:
    writer = write(disk / "run", range(3))
    add(writer, range(3, 5), flush_every=100)
    filler = leave(disk, 0)
    message = str(refused(writer.close))
    told, place = message.split("; they are in ")
    assert told == f"{disk}/run: 16 rows could not be written (No space left on device)"
    assert "\n" not in message
    place, target = place.split(": move that to ")
    assert written(disk / "run") == only(range(3))
    filler.unlink()
    shutil.move(place, target)
    assert written(disk / "run") == only(range(5))


@scenario
def read_only_for_a_while(disk: Path) -> None:
    writer = write(disk / "run", range(3))
    add(writer, range(3, 5), flush_every=100)
    mount(disk, "-o", "remount,ro")
    assert refused(writer.flush).errno == EROFS
    assert written(disk / "run") == only(range(3))
    for action in (
        lambda: RunWriter.create(disk / "other", {}),
        lambda: RunWriter.resume(disk / "run", 2),
    ):
        try:
            action()
        except RunError as error:
            assert str(error).endswith("Read-only file system"), error
        else:
            raise AssertionError("a read-only disk took it")
    mount(disk, "-o", "remount,rw")
    writer.flush()
    assert written(disk / "run") == only(range(5))


@scenario
def removed_meanwhile(disk: Path) -> None:
    writer = write(disk / "run", range(3))
    shutil.rmtree(disk / "run")
    add(writer, range(3, 5), flush_every=100)
    assert refused(writer.flush).errno == ENOENT
    assert not (disk / "run").exists()
    assert "; they are in " in str(refused(writer.close))


@scenario
def full_for_too_long(disk: Path) -> None:
    """Memory is bounded: the oldest rows go, and the run says so."""
    store.BACKLOG_BYTES = 1 << 20
    writer = RunWriter.create(disk / "run", {})
    filler = leave(disk, 0)
    held = []
    for step in range(400):
        for table in TABLE_NAMES:
            writer.append(table, [{"step": step, "rank": 0}] * (10 if table == "tensors" else 1))
        if step % 10 == 9:
            assert refused(writer.flush).errno == ENOSPC
            held.append(sum(rows.nbytes for rows in writer._backlog._tables.values()))
    assert 1 << 19 < max(held) <= 1 << 20
    filler.unlink()
    writer.flush()
    run = open_run(disk / "run")
    assert run.steps()["step"].tolist() == list(range(400))
    kept = run.tensors()["step"]
    assert kept.iloc[-1] == 399
    (told,) = run.events().query("kind == 'rows_dropped'").to_dict("records")
    lost = 4000 - len(kept)
    assert lost > 100
    first = (lost - 1) // 10
    assert told["detail"] == (
        f"{lost} rows of steps 0 to {first}: nothing could be written and 1 MiB waited already"
    )
    add(writer, range(400, 401))
    assert len(open_run(disk / "run").events().query("kind == 'rows_dropped'")) == 1


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_disk(name: str, tmp_path: Path) -> None:
    if (allowed := namespace("true")).returncode:
        pytest.skip(f"no namespaces here: {allowed.stderr.strip()}")
    done = namespace(sys.executable, __file__, name, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


if __name__ == "__main__":
    warnings.simplefilter("error")
    mount(Path(sys.argv[2]), "-t", "tmpfs", "-o", f"size={256 * PAGE}")
    SCENARIOS[sys.argv[1]](Path(sys.argv[2]))
    print("done")
