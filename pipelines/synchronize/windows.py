"""How a recording is cut: windows at a fixed distance, or one for each event of a stream.

The anchor of a window of [begin, end) stands at its `begin`, in its `centre` (of an odd number of nanoseconds the earlier), or
at its `end`, which is the last nanosecond in it.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from featurestore.errors import InputError
from pipelines.synchronize import TIME_LIMIT_NS, Events, Int64s, WindowChunk

__all__ = ["ANCHORS", "WindowChunk", "every", "per_event"]

ANCHORS: dict[str, Callable[[Int64s], Int64s]] = {
    "begin": lambda length: length * 0,
    "centre": lambda length: length // 2,
    "end": lambda length: length - 1,
}
"""Where the anchor stands -> how far from the begin that is, of windows of some lengths in ns."""

CHUNK = 1 << 16


def every(first_ns: int, last_ns: int, every_ns: int, length_ns: int, anchor: str = "centre") -> Iterator[WindowChunk]:
    """Windows of `length_ns` at first, first + every, first + 2 every ….

    The last is the first that reaches `last_ns`, so that no time between first and last is left out by the end; it may reach
    past it, and what a stream lacks there is told as `stream_ended`. There is one window at the least. Windows overlap where
    they are longer than they are apart, and leave gaps where they are shorter.

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
    return _every(first_ns, count, every_ns, length_ns, anchor)


def _every(first_ns: int, count: int, every_ns: int, length_ns: int, anchor: str) -> Iterator[WindowChunk]:
    for done in range(0, count, CHUNK):
        begin = first_ns + done * every_ns + np.arange(min(CHUNK, count - done), dtype=np.int64) * every_ns
        length = np.full(len(begin), length_ns)
        yield WindowChunk(begin, begin + ANCHORS[anchor](length), begin + length)


def per_event(events: Iterable[Events], length_ns: int | None = None, anchor: str = "centre") -> Iterator[WindowChunk]:
    """One window for each event, in their order: of a length, with its anchor at the event's start; of none, the event's own.

    That is from its start to its end, and 1 ns long of a point event.
    """
    for chunk in events:
        if length_ns is None:
            length = np.maximum(chunk.end_ns - chunk.start_ns, 1)
            begin = chunk.start_ns
        else:
            length = np.full(len(chunk.start_ns), length_ns)
            begin = chunk.start_ns - ANCHORS[anchor](length)
        yield WindowChunk(begin, begin + ANCHORS[anchor](length), begin + length)
