"""Processes that do the runs of an experiment, one at a time each.

A worker that dies (no memory left, a signal) takes the job it had along and no other; a new one
takes its place. Ctrl-C reaches the parent alone: workers start with SIGINT blocked, or it would hit
them in the middle of importing torch, and the parent ends them with SIGTERM, which is raised inside
the job as KeyboardInterrupt. So each closes its run, and nobody prints a traceback. A worker whose
parent is gone ends at its next report.

Each has a pipe of its own. Rejected: `concurrent.futures`, whose pool ends every job when one
worker dies, and one queue for all, which a worker that is killed while it writes locks for ever.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import torch

from fp8lab.failure import in_one_line

Call = tuple[Callable[..., None], tuple[Any, ...]]  # called with a function that reports, and these


@dataclass(frozen=True)
class _End:
    """A worker's last word on a job."""

    error: str | None


class Workers:
    """Up to `size` processes, started when needed; leaving the `with` by an error interrupts them.

    Each has one thread. Raises ValueError for a size below 1.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"workers: {size}, expected at least 1")
        self._size = size
        self._processes: dict[Connection, BaseProcess] = {}
        self._idle: list[Connection] = []
        self._busy: dict[Connection, int] = {}

    def do(
        self,
        jobs: Mapping[int, Call],
        on_report: Callable[[Any], None],
        on_end: Callable[[int, str | None], None],
    ) -> None:
        """Do all jobs. `on_report` gets what they report, `on_end` a job's index when it is over,
        and its error in one line, None if it went well."""
        waiting = list(jobs.items())[::-1]
        while waiting or self._busy:
            while waiting and len(self._busy) < self._size:
                index, job = waiting.pop()
                self._busy[self._give(job)] = index
            for pipe in wait(list(self._busy)):
                assert isinstance(pipe, Connection)
                message = self._hear(pipe)
                if isinstance(message, _End):
                    on_end(self._busy.pop(pipe), message.error)
                else:
                    on_report(message)

    def _give(self, job: Call) -> Connection:
        while self._idle:
            pipe = self._idle.pop()
            try:
                pipe.send(job)
            except OSError:  # it died meanwhile
                continue
            return pipe
        pipe = self._start()
        pipe.send(job)
        return pipe

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        pipe, far = context.Pipe()
        process = context.Process(target=_serve, args=(far,))
        resource_tracker.ensure_running()  # not below: where it starts, it unblocks SIGINT
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        far.close()
        self._processes[pipe] = process
        return pipe

    def _hear(self, pipe: Connection) -> Any:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            return _End(f"its process ended with exit code {self._bury(pipe)}")
        if isinstance(message, _End):
            self._idle.append(pipe)
        return message

    def _bury(self, pipe: Connection) -> int | None:
        process = self._processes.pop(pipe)
        pipe.close()
        process.join()
        return process.exitcode

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pipe, process in self._processes.items():
            if pipe in self._busy:
                process.terminate()
            pipe.close()
        for process in self._processes.values():
            process.join()


def _serve(pipe: Connection) -> None:
    """In a worker: jobs come in, reports and ends go out, until the parent closes its end."""
    torch.set_num_threads(1)

    def report(message: Any) -> None:
        try:
            pipe.send(message)
        except OSError:  # the parent is gone
            raise KeyboardInterrupt from None

    while True:
        try:
            function, arguments = pipe.recv()
            end = _End(None)
            signal.signal(signal.SIGTERM, _interrupt)
            try:
                function(report, *arguments)
            except (Exception, SystemExit) as error:
                end = _End(in_one_line(error))
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            pipe.send(end)
        except (EOFError, OSError, KeyboardInterrupt):
            return


def _interrupt(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one does not wait for the run to close
    raise KeyboardInterrupt
