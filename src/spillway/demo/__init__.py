"""``spillway demo``: the main job on stage, with nothing at hand but this installation.

In reading order: `stages` (the story and the checks at its end), `server` (a PostgreSQL 18 of its own), `load` (what
changes the table), `running` (the real engine, as a process), `outside` (what the checks rest on: the kernel, the files
of the sinks and PostgreSQL, never a counter of the engine), `screen` (what is shown).

The exit status is 0 when every check held, 1 when one did not or something failed. Whatever happens, Ctrl-C included,
the processes it started are ended and its folder is removed.
"""


def main() -> int:
    """Play it. Returns the exit status."""
    from spillway.demo.stages import play  # noqa: PLC0415 - psycopg, httpx and rich only when there is a show

    return play()
