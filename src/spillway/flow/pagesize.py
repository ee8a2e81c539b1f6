"""How many rows the next page of a backfill should have. Pure.

A page is as large as its credit allows, as long as the source reads it and the sink takes it in a short time: the
snapshot of a page is held while it is read, and live changes that come right behind it wait until the sink has taken
it. Of the time that the sink takes a part is the same whatever it is given (its latency), and a part goes by the row;
both are estimated from the last pages, by a line through them. The second part is bounded: by `TAKE_SECONDS`, or by a
little more than the first, since a live change waits for that anyway and smaller pages would only be more round trips.
The size doubles at most from page to page, and is halved at most.

Pages of one size do not tell one part from the other: what is latency may be taken for the rows', and pages stay small.
So one of `PROBE_PAGES` that have kept their size is twice as large.
"""

from __future__ import annotations

FIRST_ROWS = 50
LEAST_ROWS = 10
MOST_ROWS = 50_000
READ_SECONDS = 0.5
TAKE_SECONDS = 0.02
LATENCY_FACTOR = 1.5
KEPT = 0.9  # the weight of the pages so far, when another comes
APART = 0.15  # sizes must differ by so much, relatively, to tell one part from the other
PROBE_PAGES = 25
UNKNOWN_ROW_BYTES = 16 << 10  # of credit
LEAST_CREDIT_BYTES = 256 << 10


class _Line:
    """Seconds for a page: ``latency_seconds + rows * row_seconds``. Least squares, older pages counting for less."""

    def __init__(self) -> None:
        self.latency_seconds = 0.0
        self.row_seconds = 0.0
        self._weight = self._rows = self._seconds = self._squares = self._products = 0.0

    def took(self, rows: int, seconds: float) -> None:
        self._weight = KEPT * self._weight + 1
        self._rows = KEPT * self._rows + rows
        self._seconds = KEPT * self._seconds + seconds
        self._squares = KEPT * self._squares + rows * rows
        self._products = KEPT * self._products + rows * seconds
        mean_rows, mean_seconds = self._rows / self._weight, self._seconds / self._weight
        variance = self._squares / self._weight - mean_rows * mean_rows
        if variance > (APART * mean_rows) ** 2:
            covariance = self._products / self._weight - mean_rows * mean_seconds
            self.row_seconds = max(0.0, covariance / variance)
            self.latency_seconds = max(0.0, mean_seconds - self.row_seconds * mean_rows)
        else:  # all of one size: what was known of the latency stays
            self.latency_seconds = min(self.latency_seconds, mean_seconds)
        self.row_seconds = max(self.row_seconds, (mean_seconds - self.latency_seconds) / mean_rows)


class PageSize:
    def __init__(self) -> None:
        self.rows = FIRST_ROWS
        self._row_bytes = 0.0  # credit for a row, as found
        self._line = _Line()
        self._kept = 0  # pages since the size has changed

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
        found, before = used_bytes / rows, self.rows
        self._row_bytes = max(found, 0.8 * self._row_bytes + 0.2 * found)
        self._line.took(rows, take_seconds)
        bound_seconds = max(TAKE_SECONDS, LATENCY_FACTOR * self._line.latency_seconds)
        allowed = bound_seconds / self._line.row_seconds if self._line.row_seconds else 2.0 * MOST_ROWS
        if read_seconds > READ_SECONDS:
            allowed = min(allowed, rows * READ_SECONDS / read_seconds)
        if rows > allowed:
            self.rows = min(self.rows, max(LEAST_ROWS, round(allowed), rows // 2))
        elif allowed >= 2 * self.rows and rows >= 0.9 * self.rows and read_seconds < READ_SECONDS / 2:
            self.rows = min(MOST_ROWS, 2 * self.rows)
        self._kept = self._kept + 1 if self.rows == before and rows >= 0.9 * before else 0
        if self._kept >= PROBE_PAGES and read_seconds < READ_SECONDS / 2:
            self.rows = min(MOST_ROWS, 2 * self.rows)
            self._kept = 0

    def timed_out(self) -> None:
        self.rows = max(1, self.rows // 2)
