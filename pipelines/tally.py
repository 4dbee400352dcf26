"""What the work on one shard came to, summed over the threads that did it."""

import threading

__all__ = ["Tally"]


class Tally:
    """Of one shard. Safe in threads.

    Attributes:
        batches_halved: how often a batch was halved because it did not fit into memory.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.batches_halved = 0

    def halved(self, times: int) -> None:
        """Counts batches that were halved."""
        with self._lock:
            self.batches_halved += times
