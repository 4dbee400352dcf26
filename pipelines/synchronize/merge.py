"""Which events of a stream belong to each window: a sorted merge of two streams of chunks.

What is held of the events is what windows still to come may need: since windows ascend by their begins, that is the events
from the next begin on as far as was read, the last before it, and for `overlap` those that are not over by then. So memory
grows with the longest window and the number of events alive at once, not with the recording.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import InputError
from pipelines.synchronize import TIME_LIMIT_NS, Events, Int64s, WindowChunk

__all__ = ["POLICIES", "REASONS", "Events", "Matches", "align"]

Bools = NDArray[np.bool_]

REASONS = ("", "out_of_tolerance", "stale", "stream_ended", "not_started", "no_event")
"""Why a window has no event, by the code of it in Matches."""

_OUT_OF_TOLERANCE, _STALE, _STREAM_ENDED, _NOT_STARTED, _NO_EVENT = range(1, len(REASONS))


class Matches(NamedTuple):
    """What belongs to each window of a chunk, [N] each. Where nothing does: -1, -1, 0, 0, the reason, 0.

    Args:
        first: int64, index of the first matched event.
        last: int64, index of the last, the same where one event is matched. Of `overlap`, events between the two may have
            ended before the window begins: those are not matched.
        weight: float64 from 0 to below 1, of `linear` the share of the last event: value = (1 - weight) first + weight last.
            0 for other policies.
        residual_ns: int64, the time of the matched event that is nearest to the anchor, minus the anchor. Of `overlap` the
            time of an event is the moment from its start to its end that is nearest: 0 where an event covers the anchor.
        reason: int8, 0 where matched, else a code of REASONS.
        overlap_ns: int64, of `overlap` how much of the window is covered by events, counting no moment twice. 0 for others.
    """

    first: Int64s
    last: Int64s
    weight: NDArray[np.float64]
    residual_ns: Int64s
    reason: NDArray[np.int8]
    overlap_ns: Int64s


def align(
    windows: Iterable[WindowChunk],
    events: Iterable[Events],
    policy: str,
    tolerance_ns: int | None = None,
    staleness_ns: int | None = None,
) -> Iterator[Matches]:
    """The events of one stream that belong to each window: one Matches for each chunk of windows.

    Policies:
        nearest: the event whose start is nearest to the anchor; of two as near, the earlier.
        previous: the last event that starts at the anchor or before it.
        linear: the two events around the anchor; an event at the anchor alone, if there is one.
        window: all events that start in [begin, end).
        overlap: all events that share a moment with [begin, end); a point event does where it lies in it.

    Of events that start at the same moment, the first that the stream gives stands for all, except in `window` and `overlap`,
    which take them all. What comes out does not depend on how either side is cut into chunks.

    Args:
        windows: ascending by their begins.
        events: ascending by their starts.
        policy: one of POLICIES.
        tolerance_ns: how far the matched event may be from the anchor, on either side; of `linear` both events; of `window`
            and `overlap` the nearest. None: as far as it likes.
        staleness_ns: how long before the anchor the matched event may be; of `linear` the first. None: as long as it likes.

    Returns:
        Matches. Reasons: `not_started` and `stream_ended` (the window is not matched, and the stream has only later events, or
        only earlier ones: of `overlap`, ones that are over), `stale`, `out_of_tolerance`, `no_event` (the stream has none at
        all, or none in the window); where several hold, the first of these.

    Raises:
        InputError: an unknown policy, a negative limit; while read: a window or an event out of order, one that ends before
            it starts, or a time past ±TIME_LIMIT_NS, named by its number or index.
    """
    if policy not in POLICIES:
        raise InputError(f"policy {policy!r} is unknown; allowed: {', '.join(POLICIES)}")
    for name, limit in (("tolerance", tolerance_ns), ("staleness", staleness_ns)):
        if limit is not None and not 0 <= limit <= TIME_LIMIT_NS:
            raise InputError(f"{name} of {limit} ns; allowed: 0 to {TIME_LIMIT_NS}, or none")
    return _merged(windows, _Held(events, policy == "overlap"), policy, tolerance_ns, staleness_ns)


def _merged(
    windows: Iterable[WindowChunk], held: "_Held", policy: str, tolerance_ns: int | None, staleness_ns: int | None
) -> Iterator[Matches]:
    for chunk in _checked(windows):
        size, done = len(chunk.begin_ns), 0
        made = Matches(
            np.full(size, -1), np.full(size, -1), np.zeros(size), np.zeros(size, np.int64), np.zeros(size, np.int8),
            np.zeros(size, np.int64),
        )  # fmt: skip
        columns: tuple[NDArray[Any], ...] = made
        # A window can be told once an event past all that it asks for was read.
        asks = np.maximum.accumulate(chunk.end_ns if policy in _RANGES else chunk.anchor_ns)
        while done < size:
            known = size if held.ended else int(np.searchsorted(asks, held.read_to_ns))
            if known > done:
                part = WindowChunk(*(column[done:known] for column in chunk))
                matches = _told(held, part, POLICIES[policy], tolerance_ns, staleness_ns)
                for column, values in zip(columns, matches, strict=True):
                    column[done:known] = values
                done = known
            if done < size:
                held.forget(int(chunk.begin_ns[done]))
                held.read()
        yield made


def _checked(windows: Iterable[WindowChunk]) -> Iterator[WindowChunk]:
    number, last = 0, -TIME_LIMIT_NS
    for chunk in windows:
        begin, anchor, end = chunk
        before = np.concatenate([[last], begin[:-1]])[: len(begin)]
        wrong = (begin < before) | (anchor < begin) | (end <= anchor) | (end > TIME_LIMIT_NS)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise InputError(
                f"window {number + at}: [{begin[at]}, {end[at]}) ns, anchored at {anchor[at]}, after one that begins at "
                f"{before[at]}; windows must ascend, hold their anchors, and lie within ±{TIME_LIMIT_NS}"
            )
        if len(begin):
            number, last = number + len(begin), int(begin[-1])
        yield chunk


class _Held:
    """The events that windows may still need.

    Args:
        events: the stream.
        keep_alive: whether those are needed that began before the next window and are not over.
    """

    def __init__(self, events: Iterable[Events], keep_alive: bool) -> None:
        self._events, self._keep_alive = iter(events), keep_alive
        none = np.empty(0, np.int64)
        self.start, self.end, self.index = none, none, none
        self.latest_end = none
        """Of each event and all before it in the stream: the latest end."""
        self.covered = none
        """How much time each event and all before it in the stream cover together."""
        self.ended = False
        self.first_ns: int | None = None
        self.read_to_ns = -TIME_LIMIT_NS

    def read(self) -> None:
        """Reads on: as many events as are held at the least, so that few large pieces are joined and not many small."""
        fresh: list[tuple[Int64s, ...]] = []
        latest_end = self.latest_end[-1:] if len(self.start) else np.array([-TIME_LIMIT_NS])
        covered = self.covered[-1:] if len(self.start) else np.array([0])
        count = 0
        while count <= len(self.start):
            chunk = next(self._events, None)
            if chunk is None:
                self.ended = True
                break
            if not len(chunk.start_ns):
                continue
            self._check(chunk)
            start, end, index = chunk
            ends = np.maximum.accumulate(np.concatenate([latest_end, end]))
            added = np.maximum(end - np.maximum(start, ends[:-1]), 0)
            fresh.append((start, end, index, ends[1:], covered + np.cumsum(added)))
            latest_end, covered = ends[-1:], fresh[-1][-1][-1:]
            count += len(start)
        held = (self.start, self.end, self.index, self.latest_end, self.covered)
        self.start, self.end, self.index, self.latest_end, self.covered = (
            np.concatenate(columns) for columns in zip(held, *fresh, strict=True)
        )

    def _check(self, chunk: Events) -> None:
        start, end, index = chunk
        before = np.concatenate([[self.read_to_ns], start[:-1]])
        wrong = (start < before) | (end < start) | (end > TIME_LIMIT_NS)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise InputError(
                f"event {index[at]}: from {start[at]} ns to {end[at]} ns, after one from {before[at]} ns; events must "
                f"ascend by their starts, end where they start or later, and lie within ±{TIME_LIMIT_NS}; sort the stream"
            )
        self.first_ns = int(start[0]) if self.first_ns is None else self.first_ns
        self.read_to_ns = int(start[-1])

    def forget(self, begin_ns: int) -> None:
        """Lets go what no window that begins then or later needs."""
        if not len(self.start):
            return
        keep = self.start >= begin_ns
        if self._keep_alive:
            keep |= self.end > begin_ns
        # The last before it: the first of those that start at the same moment, and the last, whose sums go on.
        if (before := int(np.searchsorted(self.start, begin_ns)) - 1) >= 0:
            keep[[before, np.searchsorted(self.start, self.start[before])]] = True
        self.start, self.end, self.index, self.latest_end, self.covered = (
            column[keep] for column in (self.start, self.end, self.index, self.latest_end, self.covered)
        )

    def covered_before(self, time_ns: Int64s) -> Int64s:
        """How much of the time before each moment is covered by events."""
        at = np.searchsorted(self.start, time_ns) - 1
        # Those that started before a moment cover what follows it without a gap, up to the latest end.
        return np.where(at >= 0, self.covered[at] - np.maximum(self.latest_end[at] - time_ns, 0), 0)


class _Found(NamedTuple):
    """Positions among the held events, valid where `matched`, and by how much the first and the last miss the anchor.

    For `window` and `overlap` both are the nearest event's. `ended`: the stream has nothing after; `unstarted`: nothing before.
    """

    first: Int64s
    last: Int64s
    first_ns: Int64s
    last_ns: Int64s
    matched: Bools
    ended: Bools
    unstarted: Bools
    overlap_ns: Int64s | int = 0


def _told(
    held: _Held,
    windows: WindowChunk,
    policy: Callable[[_Held, WindowChunk], _Found],
    tolerance_ns: int | None,
    staleness_ns: int | None,
) -> tuple[Int64s | NDArray[np.float64] | NDArray[np.int8] | int, ...]:
    """Matches' columns for windows of which all events are held."""
    if not len(held.start):
        return -1, -1, 0, 0, _NO_EVENT, 0
    found = policy(held, windows)
    before, after = found.first_ns, found.last_ns
    reason = np.where(found.matched, 0, _NO_EVENT).astype(np.int8)
    if tolerance_ns is not None:
        reason[found.matched & (np.maximum(np.abs(before), np.abs(after)) > tolerance_ns)] = _OUT_OF_TOLERANCE
    if staleness_ns is not None:
        reason[found.matched & (-before > staleness_ns)] = _STALE
    missing = reason > 0
    reason[missing & found.ended] = _STREAM_ENDED
    reason[missing & found.unstarted] = _NOT_STARTED
    apart = np.where(missing | (after == before), 1, after - before)
    here = (
        held.index[np.where(missing, 0, found.first)],
        held.index[np.where(missing, 0, found.last)],
        np.where(after == before, 0, -before / apart),
        np.where(np.abs(before) <= np.abs(after), before, after),
    )
    first, last, weight, residual = (
        np.where(missing, none, column) for none, column in zip((-1, -1, 0.0, 0), here, strict=True)
    )
    return first, last, weight, residual, reason, np.where(missing, 0, found.overlap_ns)


_NONE_NS = np.iinfo(np.int64).max


def _around(held: _Held, at: Int64s) -> tuple[Int64s, Int64s, Int64s, Int64s]:
    """The last event at a time or before it, of those of one start the first, and the first after it; and how far they are."""
    after = np.searchsorted(held.start, at, "right")
    before = np.where(after > 0, np.searchsorted(held.start, held.start[after - 1]), -1)
    since = np.where(before >= 0, at - held.start[before], _NONE_NS)
    until = np.where(after < len(held.start), held.start[np.minimum(after, len(held.start) - 1)] - at, _NONE_NS)
    return before, after, since, until


def _nearest(held: _Held, windows: WindowChunk) -> _Found:
    before, after, since, until = _around(held, windows.anchor_ns)
    chosen = np.where(since <= until, before, after)
    residual = np.where(since <= until, -since, until)
    return _Found(
        chosen, chosen, residual, residual, np.ones(len(chosen), bool), after == len(held.start), before < 0
    )  # fmt: skip


def _previous(held: _Held, windows: WindowChunk) -> _Found:
    before, after, since, _ = _around(held, windows.anchor_ns)
    return _Found(before, before, -since, -since, before >= 0, after == len(held.start), before < 0)


def _linear(held: _Held, windows: WindowChunk) -> _Found:
    before, after, since, until = _around(held, windows.anchor_ns)
    exact, ended = since == 0, after == len(held.start)
    last, last_ns = np.where(exact, before, after), np.where(exact, 0, until)
    return _Found(before, last, -since, last_ns, (before >= 0) & (exact | ~ended), ended, before < 0)


def _window(held: _Held, windows: WindowChunk) -> _Found:
    first, beyond = np.searchsorted(held.start, windows.begin_ns), np.searchsorted(held.start, windows.end_ns)
    before, after, since, until = _around(held, windows.anchor_ns)
    since = np.where(before >= first, since, _NONE_NS)
    until = np.where(after < beyond, until, _NONE_NS)
    residual = np.where(since <= until, -since, until)
    ended, unstarted = first == len(held.start), windows.end_ns <= (held.first_ns or 0)
    return _Found(first, beyond - 1, residual, residual, first < beyond, ended, unstarted)


def _overlap(held: _Held, windows: WindowChunk) -> _Found:
    begin, _, end = windows
    starting, beyond = np.searchsorted(held.start, begin), np.searchsorted(held.start, end)
    # The first event by which the latest end passes the begin is one that does so itself.
    first = np.minimum(np.searchsorted(held.latest_end, begin, "right"), starting)
    last = beyond - 1
    matched = first <= last
    over = matched & (last < starting)
    last[over] = _last_past(held.end, last[over], begin[over])
    residual = _from_covered(held, windows, starting, beyond)
    ended, unstarted = first == len(held.start), end <= (held.first_ns or 0)
    covered = held.covered_before(end) - held.covered_before(begin)
    return _Found(first, last, residual, residual, matched, ended, unstarted, covered)


def _from_covered(held: _Held, windows: WindowChunk, starting: Int64s, beyond: Int64s) -> Int64s:
    """How far the moment nearest to the anchor is at which an event of the window goes on; 0 where one does at the anchor."""
    begin, anchor, _ = windows
    after = np.searchsorted(held.start, anchor, "right")
    latest_end = held.latest_end[after - 1]
    there = (after > 0) & ((latest_end > begin) | (after > starting))
    since = np.where(there, np.maximum(anchor - latest_end, 0), _NONE_NS)
    until = np.where(after < beyond, held.start[np.minimum(after, len(held.start) - 1)] - anchor, _NONE_NS)
    return np.where(since <= until, -since, until)


def _last_past(end: Int64s, upto: Int64s, time_ns: Int64s) -> Int64s:
    """The last position up to each of `upto` whose end is past a time; there is one.

    Over blocks of 2^k events, the largest first: a block that ends at the position and is over by then is passed.
    """
    latest = [end]
    while (width := 1 << (len(latest) - 1)) * 2 <= len(end) and len(upto):
        longer = latest[-1].copy()
        longer[width:] = np.maximum(longer[width:], latest[-1][:-width])
        latest.append(longer)
    for power, block in reversed(list(enumerate(latest))):
        upto = np.where(block[upto] <= time_ns, upto - (1 << power), upto)
    return upto


_RANGES = ("window", "overlap")
POLICIES: dict[str, Callable[[_Held, WindowChunk], _Found]] = {
    "nearest": _nearest,
    "previous": _previous,
    "linear": _linear,
    "window": _window,
    "overlap": _overlap,
}
"""What may be asked of a stream, by its name in a spec."""
