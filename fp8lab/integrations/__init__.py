"""Other people's training loops and dashboards: one file for each outside library.

A loop of its own needs none of this: `fp8lab.watch` and one `watch.step` a step are enough. Where
somebody else's loop trains, a callback of that library does those two calls; where somebody else's
dashboard shows, a writer passes on what was recorded. Each file imports its library when it is
imported itself and says in one line which extra installs it; nothing is imported here, so that
none of the libraries is ever needed by another.
"""
