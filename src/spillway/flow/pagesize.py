"""How many rows the next page of a backfill should have. Pure.

A page is as large as its credit allows, as long as the source reads it and the sink takes it in a short time: the
snapshot of a page is held while it is read, and live changes that come right behind it wait until the sink has taken
it. Both times are aimed at; the size doubles at most from page to page and is halved by whatever takes too long. A sink
that needs long for whatever it is given (`PageSize._usual_seconds`) is not asked for less than it can take at once: a
live change behind a page waits for a few times what it would wait for anyway.
"""

from __future__ import annotations

FIRST_ROWS = 50
LEAST_ROWS = 10
MOST_ROWS = 50_000
READ_SECONDS = 0.5
UNKNOWN_ROW_BYTES = 16 << 10  # of credit
LEAST_CREDIT_BYTES = 256 << 10
TAKE_SECONDS = 0.02
USUAL_FACTOR = 2.5
USUAL_GROWTH = 1.05  # a page, in case that the sink has become slower


class PageSize:
    def __init__(self) -> None:
        self.rows = FIRST_ROWS
        self._row_bytes = 0.0  # credit for a row, as found
        self._usual_seconds = 0.0  # the least that the sink has lately needed for a page

    def credit_bytes(self, most_bytes: int) -> int:
        """What a page of this size needs, as far as is known."""
        return min(most_bytes, int(1.5 * self.rows * (self._row_bytes or UNKNOWN_ROW_BYTES)) + LEAST_CREDIT_BYTES)

    def fitting(self, credit_bytes: int) -> int:
        """The rows to ask for with this much credit."""
        if not self._row_bytes:
            return self.rows
        return max(1, min(self.rows, int(0.9 * credit_bytes / self._row_bytes)))

    def took(self, rows: int, used_bytes: int, read_seconds: float, take_seconds: float) -> None:
        """A page came, and was taken. Those that were cut short by anything but their size do not make it grow."""
        if not rows:
            return
        found = used_bytes / rows
        self._row_bytes = max(found, 0.8 * self._row_bytes + 0.2 * found)
        usual = self._usual_seconds * USUAL_GROWTH
        self._usual_seconds = min(usual, take_seconds) if usual else take_seconds
        aim_seconds = max(TAKE_SECONDS, USUAL_FACTOR * self._usual_seconds)
        worst = max(read_seconds / READ_SECONDS, take_seconds / aim_seconds)
        if worst > 1:
            self.rows = min(self.rows, max(LEAST_ROWS, int(rows / min(worst, 2.0))))
        elif worst < 0.5 and rows >= 0.9 * self.rows:
            self.rows = min(MOST_ROWS, 2 * self.rows)

    def timed_out(self) -> None:
        self.rows = max(1, self.rows // 2)
