"""Live views of a run that is being recorded: in the terminal, and as a page that renews itself.

    following  what a run's directory says now, and what the rules find in it
    frames     that as a frame for a terminal, and as a line where nobody watches
    serving    the report, written anew while the run grows, on this machine's loopback

Both read the run directory and nothing else, so they need no word with the training, start and end
when they like, and cost it nothing but the reading: where nothing was written, two listings of a
folder; at a run of 10,000 steps and 80 layers, a tenth of a second. Rules and pages cost seconds
there, and take at most a share of the time. Rejected: a socket to the training, which would have to
be opened in it, and guarded.
"""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from fp8lab.live.following import UNDER_WAY, Follower, chosen
from fp8lab.live.frames import Lines, Screen, frame
from fp8lab.terminal import printable


def follow(path: str | Path, console: Console, *, interval: float = 2.0, once: bool = False) -> str:
    """Show a run, or the newest below a folder, until it is no longer being recorded.

    A terminal shows one frame, drawn anew every `interval` seconds; elsewhere an update is a line,
    and a frame follows at the end. With `once` a frame is all. Returns the run's state then.
    A run that is not there yet is waited for, but with `once`.

    Raises RunError if there is no run at `path` and none can come, or it is damaged.
    """
    path = Path(path)
    which = chosen(path, awaiting=not once)
    if which is None:
        told = f"{printable(str(path))}: no run yet, waiting for one; Ctrl-C ends that"
        console.print(told, soft_wrap=True)
    while which is None:
        time.sleep(interval)
        which = chosen(path, awaiting=True)
    follower = Follower(*which)
    if once:
        view = follower.look()
        console.print(frame(view, console.width, None))
        return view.state
    shown = Screen if console.is_terminal and not console.is_dumb_terminal else Lines
    with shown(console) as show:
        show.update(follower.look(judging=False))
        while True:
            view = follower.look()
            show.update(view)
            if view.state not in UNDER_WAY:
                return view.state
            time.sleep(interval)
