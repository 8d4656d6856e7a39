"""The report of runs that are being recorded: on this machine's loopback, renewed while they grow.

    /         a small outer page: a line that says how things stand, and the report in a frame
    /report   the report as it was last written, bytes of the very file
    /changed  JSON: which one that is, and that line

The outer page asks `/changed` and puts the next report in place of the last one when it has loaded,
as it was scrolled and unfolded; so the report is the same file as ever, and forbids itself any
network. The main thread writes and others serve: a look at a page never writes one, and Ctrl-C ends
all. Writing takes at most half of the time, however large the runs are.

Only this machine can connect, but a browser on it opens strangers' pages too: who names another
host (DNS rebinding) is refused, and no answer may be framed or read from elsewhere. Rejected: a web
framework and a socket that pushes, for two answers a second.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NoReturn

from fp8lab.live.following import stamp_of
from fp8lab.report import write_report
from fp8lab.runs import find_runs, open_run
from fp8lab.segments import RunError
from fp8lab.terminal import printable

LOOPBACK = "127.0.0.1"
EVERY = 3.0  # seconds between two looks at the runs
_HOST = re.compile(r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?")
OUTER = Path(__file__).with_name("outer.html").read_text(encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Current:
    """What is served: the report's bytes, its number (0: none yet), and how things stand."""

    report: bytes = b""
    number: int = 0
    told: str = "the page is being written"


class Server(ThreadingHTTPServer):
    """Serves `current` on loopback. Raises OSError where the port is taken."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        self.current = Current()
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise OSError(f"port {port}: {error.strerror}, expected a free one") from None

    @property
    def address(self) -> str:
        """What to open."""
        return f"http://{LOOPBACK}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    """GET of three paths; anything else is refused."""

    server: Server
    timeout = 30.0

    def do_GET(self) -> None:
        current = self.server.current
        # Any port: a tunnel from another machine ends at one of its own.
        if not all(_HOST.fullmatch(host) for host in self.headers.get_all("Host", [""])):
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
        elif self.path == "/":
            self._send(OUTER.encode(), "text/html; charset=utf-8")
        elif self.path == "/changed":
            told = {"number": current.number, "told": current.told}
            self._send(json.dumps(told).encode(), "application/json")
        elif self.path == "/report" and current.number:
            self._send(current.report, "text/html; charset=utf-8")
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def end_headers(self) -> None:
        for name, value in (
            ("Cache-Control", "no-store"),
            ("Content-Security-Policy", "frame-ancestors 'self'"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
        ):
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """A browser that asks every second is no news."""


def serve(
    runs: Iterable[Path],
    page: Path,
    *,
    twin: Path | None = None,
    port: int = 0,
    say: Callable[[str], object] = print,
) -> NoReturn:
    """Write the report about `runs`, and their `twin`, to `page` and serve it, anew whenever they
    have grown.

    It ends with Ctrl-C. `port` 0 is any that is free. `say` is told the address, and why a page
    could not be written; the last good one then stays. Raises ValueError if `page` is no .html,
    OSError where the port is taken.
    """
    if page.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{page}: a browser shows it, expected a name that ends in .html or .htm")
    runs = list(runs)
    with Server(port) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        say(f"live: {server.address}  (Ctrl-C ends it)")
        written: object = None
        while True:
            began = time.monotonic()
            stamps = _stamps(runs if twin is None else [*runs, twin])
            if stamps != written:
                try:
                    report = write_report(runs, page, twin=twin).read_bytes()
                except Exception as error:  # the last good page is better than none
                    failed = _failed(server.current, error)
                    if failed.told != server.current.told:
                        say(printable(failed.told))
                    server.current = failed
                else:
                    number = server.current.number + 1
                    server.current = Current(report=report, number=number, told=_told(stamps))
                    written = stamps
            time.sleep(max(EVERY, time.monotonic() - began))


def _stamps(runs: list[Path]) -> dict[Path, tuple[str, object]]:
    """Of each run at or below the paths; one that cannot be read is its own stamp."""
    stamps: dict[Path, tuple[str, object]] = {}
    for path in (found for run in runs for found in find_runs(run)):
        try:
            stamps[path] = stamp_of(open_run(path))
        except (RunError, OSError) as error:
            stamps[path] = "damaged", str(error)
    return stamps


def _told(stamps: dict[Path, tuple[str, object]]) -> str:
    states = Counter("being recorded" if s == "running" else s for s, _ in stamps.values())
    told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    runs = "run" if len(stamps) == 1 else "runs"
    return f"written at {time.strftime('%H:%M:%S')}; {runs}: {told}"


def _failed(current: Current, error: Exception) -> Current:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    last = "the last good one is shown" if current.number else "there is none yet"
    return replace(current, told=f"the page could not be written ({reason}): {last}")
