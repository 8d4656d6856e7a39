"""The runs of an experiment as tasks of a Ray cluster, of which one machine may be this one.

A task takes one core and one thread and is never repeated by Ray: what a lost worker leaves is
removed and done again by the next `fp8lab run`, as after any kill. So it costs its run and no
other. What tasks report of their progress comes through a queue that the cluster holds.

Ray is an extra; it is imported when an address is given.
"""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch

from fp8lab.failure import in_one_line
from fp8lab.lab.workers import Call


class RayWorkers:
    """What `Workers` is, on the cluster at `address` ("auto", "local", "ray://host:port").

    Raises ValueError in one line if ray is not installed or there is no cluster.
    """

    def __init__(self, address: str) -> None:
        try:
            import ray
            from ray.util.queue import Queue
        except ImportError:
            raise ValueError('ray: not installed, expected `pip install "fp8lab[ray]"`') from None
        try:
            _knock(address)  # Ray itself tries for minutes
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"ray {address!r}: {in_one_line(error)}") from None
        self._ray = ray
        self._waiting: list[Any] = []
        self._queue = Queue(actor_options={"num_cpus": 0})

    def do(
        self,
        jobs: Mapping[int, Call],
        on_report: Callable[[Any], None],
        on_end: Callable[[int, str | None], None],
    ) -> None:
        """Do all jobs, as `Workers.do` does."""
        task = self._ray.remote(num_cpus=1, max_retries=0)(_serve)
        indexes = {task.remote(self._queue, sys.argv, *job): i for i, job in jobs.items()}
        self._waiting = list(indexes)
        while self._waiting:
            ended, self._waiting = self._ray.wait(self._waiting, timeout=0.2)
            self._hear(on_report)
            for one in ended:
                try:
                    error = self._ray.get(one)
                except self._ray.exceptions.RayError as lost:
                    error = f"its worker was lost: {in_one_line(lost)}"
                on_end(indexes[one], error)

    def _hear(self, on_report: Callable[[Any], None]) -> None:
        for report in self._queue.get_nowait_batch(self._queue.qsize()):
            on_report(report)

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for one in self._waiting:  # as Ctrl-C would: each closes its run
            self._ray.cancel(one)
        if self._waiting:
            self._ray.wait(self._waiting, num_returns=len(self._waiting), timeout=30)
        self._ray.shutdown()


def _knock(address: str) -> None:
    """Raises OSError if nobody listens at a "host:port"."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def _serve(
    queue: Any, typed: list[str], function: Callable[..., None], arguments: tuple[Any, ...]
) -> str | None:
    """On a worker: one job; the error in one line, None if it went well."""
    torch.set_num_threads(1)
    sys.argv = typed  # which the run tells, and not how Ray starts its workers
    try:
        function(queue.put, *arguments)
    except (Exception, SystemExit) as error:
        return in_one_line(error)
    return None
