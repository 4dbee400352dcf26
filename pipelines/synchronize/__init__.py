"""Stage 2: timed streams on one clock, cut into windows: one sample a window.

A recording is several streams of one thing: frames, sound, cues, readings of a sensor. A reader gives a stream's events in
time order, windows.py cuts the recording, and merge.py says which events belong to each window, how far from its anchor they
are, and why where there is none. Both sides come in chunks, so memory does not grow with the length of a recording.

All times are int64 nanoseconds of one clock, the reference's, and lie within ±TIME_LIMIT_NS.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]

TIME_LIMIT_NS = (1 << 62) - 1
"""About 146 years on either side of zero: so no difference of two times overflows an int64."""


class Events(NamedTuple):
    """Some events of a stream, int64 [N] each, in the order of their starts, which ascend over all chunks of the stream too.

    Args:
        start_ns: when an event begins. What is called an event's time is this.
        end_ns: when it is over, at the earliest at its start. A point event, a reading of a sensor, ends where it starts.
        index: which one it is to the reader that gave it, ascending: the number of a cue, of a row; of a frame its own time.
    """

    start_ns: Int64s
    end_ns: Int64s
    index: Int64s  # type: ignore[assignment]


class WindowChunk(NamedTuple):
    """Some windows [begin, end), int64 [N] each; begins ascend over all chunks, and each holds its anchor.

    The anchor is the time that a sample is of: what is nearest, and residuals, are told from it.
    """

    begin_ns: Int64s
    anchor_ns: Int64s
    end_ns: Int64s
