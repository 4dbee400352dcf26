"""What the work on one shard came to, and what a worker's time went to. No time goes into a file: it is never the same twice.

Steps of batches overlap in threads, so the sum of their times may pass the time that went by. Whether the model, on a GPU above
all, waits for the rest is told by `Busy`: for how long it had at least one batch, of the time that there was a shard to do.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

__all__ = ["Busy", "Spent", "Tally"]

Step = Literal["waiting", "decoding", "model", "writing"]


class Spent(NamedTuple):
    """Milliseconds. Summed over threads: waiting for a shard's rows and values, decoding, in the model, writing.

    Of a process's time, told once, by whichever shard ends next: `open`, while it had a shard to do, and `computing`, while the
    model had a batch.
    """

    waiting_ms: int = 0
    decoding_ms: int = 0
    model_ms: int = 0
    writing_ms: int = 0
    open_ms: int = 0
    computing_ms: int = 0


class Tally:
    """Of one shard. Safe in threads.

    Attributes:
        batches_halved: how often a batch was halved because it did not fit into memory.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[Step, float] = dict.fromkeys(("waiting", "decoding", "model", "writing"), 0.0)
        self.batches_halved = 0

    def halved(self, times: int) -> None:
        """Counts batches that were halved."""
        with self._lock:
            self.batches_halved += times

    @contextmanager
    def timed(self, step: Step) -> Iterator[None]:
        """Counts what goes by within."""
        begun = time.monotonic()
        try:
            yield
        finally:
            took = time.monotonic() - begun
            with self._lock:
                self._seconds[step] += took

    def spent(self, opened: "Busy", computing: "Busy") -> Spent:
        """What it came to, with what the process's clocks have to tell."""
        with self._lock:
            steps = {f"{step}_ms": round(1000 * seconds) for step, seconds in self._seconds.items()}
        return Spent(**steps, open_ms=opened.taken_ms(), computing_ms=computing.taken_ms())


class Busy:
    """For how long at least one thread was within. Safe in threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._within, self._since, self._seconds = 0, 0.0, 0.0

    def __enter__(self) -> None:
        with self._lock:
            self._go_on()
            self._within += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._go_on()
            self._within -= 1

    def _go_on(self) -> None:
        now = time.monotonic()
        self._seconds += now - self._since if self._within else 0.0
        self._since = now

    def taken_ms(self) -> int:
        """Milliseconds since it was last asked; those of threads that are still within, too. What is left of one is kept."""
        with self._lock:
            self._go_on()
            whole = int(1000 * self._seconds)
            self._seconds -= whole / 1000
            return whole
