"""How a recording is cut: windows at a fixed distance, or one for each event of a stream."""

from collections.abc import Iterable, Iterator

import numpy as np

from featurestore.errors import InputError
from pipelines.synchronize import TIME_LIMIT_NS, Events, WindowChunk

__all__ = ["WindowChunk", "every", "per_event"]

CHUNK = 1 << 16


def every(first_ns: int, last_ns: int, every_ns: int, length_ns: int) -> Iterator[WindowChunk]:
    """Windows of `length_ns` at first, first + every, first + 2 every …, each anchored in its middle.

    The last is the first that reaches `last_ns`, so that no time between first and last is left out by the end; it may reach
    past it, and what a stream lacks there is told as `stream_ended`. There is one window at the least. Windows overlap where
    they are longer than they are apart, and leave gaps where they are shorter. The middle of a window of an odd number of
    nanoseconds is the earlier.

    Raises:
        InputError: a distance or a length below 1 ns, a last before the first, or a window past ±TIME_LIMIT_NS.
    """
    if every_ns < 1 or length_ns < 1:
        raise InputError(f"windows every {every_ns} ns of {length_ns} ns; both must be 1 ns or more")
    if last_ns < first_ns:
        raise InputError(f"windows from {first_ns} ns to {last_ns} ns; the last must not lie before the first")
    span = last_ns - first_ns
    # The first to reach the end, among those that begin before it.
    count = 1 + max(0, min(-(-span // every_ns) - 1, -((length_ns - span) // every_ns)))
    if first_ns < -TIME_LIMIT_NS or first_ns + (count - 1) * every_ns + length_ns > TIME_LIMIT_NS:
        raise InputError(
            f"windows from {first_ns} ns to {last_ns} ns, every {every_ns} ns of {length_ns} ns, pass what times are "
            f"allowed: ±{TIME_LIMIT_NS} ns"
        )
    return _every(first_ns, count, every_ns, length_ns)


def _every(first_ns: int, count: int, every_ns: int, length_ns: int) -> Iterator[WindowChunk]:
    for done in range(0, count, CHUNK):
        begin = first_ns + done * every_ns + np.arange(min(CHUNK, count - done), dtype=np.int64) * every_ns
        yield WindowChunk(begin, begin + length_ns // 2, begin + length_ns)


def per_event(events: Iterable[Events]) -> Iterator[WindowChunk]:
    """One window for each event, in their order, from its start to its end and anchored in its middle.

    A point event's window is 1 ns long: its anchor is the event's time, and nothing else falls into it.
    """
    for chunk in events:
        length = np.maximum(chunk.end_ns - chunk.start_ns, 1)
        yield WindowChunk(chunk.start_ns, chunk.start_ns + length // 2, chunk.start_ns + length)
