"""The merge of timed events against a brute-force one in Python's own integers, however either side is cut into chunks."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurestore.errors import InputError
from pipelines.synchronize import TIME_LIMIT_NS, Events, WindowChunk
from pipelines.synchronize.merge import POLICIES, REASONS, align

SECOND = 1_000_000_000
MISSING = (-1, -1, 0.0, 0)


class Event(NamedTuple):
    start: int
    end: int
    index: int


class Window(NamedTuple):
    begin: int
    anchor: int
    end: int


class Match(NamedTuple):
    first: int
    last: int
    weight: float
    residual: int
    reason: str
    overlap: int


def event_chunks(events: Sequence[Event], cuts: Sequence[int] = ()) -> Iterator[Events]:
    """Events in chunks that end where `cuts` says; some may be empty."""
    for rows in cut(events, cuts):
        yield Events(*np.array(rows, np.int64).reshape(-1, 3).T)


def window_chunks(windows: Sequence[Window], cuts: Sequence[int] = ()) -> Iterator[WindowChunk]:
    for rows in cut(windows, cuts):
        yield WindowChunk(*np.array(rows, np.int64).reshape(-1, 3).T)


def cut(rows: Sequence[tuple[int, ...]], cuts: Sequence[int]) -> Iterator[Sequence[tuple[int, ...]]]:
    bounds = [0, *sorted(min(each, len(rows)) for each in cuts), len(rows)]
    for begin, end in itertools.pairwise(bounds):
        yield rows[begin:end]


def aligned(
    windows: Sequence[Window],
    events: Sequence[Event],
    policy: str,
    tolerance: int | None = None,
    staleness: int | None = None,
    cuts: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> list[Match]:
    found = []
    made = align(window_chunks(windows, cuts[0]), event_chunks(events, cuts[1]), policy, tolerance, staleness)
    for chunk, matches in zip(window_chunks(windows, cuts[0]), made, strict=True):
        first, last, weight, residual, reason, overlap = (column.tolist() for column in matches)
        assert len(first) == len(chunk.begin_ns)
        reasons = [REASONS[code] for code in reason]
        found += [Match(*row) for row in zip(first, last, weight, residual, reasons, overlap, strict=True)]
    return found


def brute_force(
    window: Window, events: Sequence[Event], policy: str, tolerance: int | None, staleness: int | None
) -> Match:
    """What belongs to a window, by looking at every event."""
    begin, anchor, end = window
    before = [each for each in events if each.start <= anchor]
    after = [each for each in events if each.start > anchor]
    chosen: list[Event] = []
    ended, unstarted = not after, not before
    if policy == "nearest":
        chosen = sorted(events, key=lambda each: (abs(each.start - anchor), each.start, each.index))[:1]
    elif policy in ("previous", "linear"):
        chosen = sorted(before, key=lambda each: (-each.start, each.index))[:1]
        if policy == "linear" and chosen and chosen[0].start < anchor:
            chosen = chosen + after[:1] if after else []
    elif policy == "window":
        chosen = [each for each in events if begin <= each.start < end]
        ended, unstarted = all(each.start < begin for each in events), all(each.start >= end for each in events)
    else:
        chosen = [each for each in events if begin <= each.start < end or each.start < begin < each.end]
        ended = all(each.start < begin and each.end <= begin for each in events)
        unstarted = all(each.start >= end for each in events)
    covered = sum(any(each.start <= moment < each.end for each in events) for moment in range(begin, end))
    if policy == "overlap":
        misses = [min(max(anchor, each.start), each.end) - anchor for each in chosen]
    else:
        misses = [each.start - anchor for each in chosen]
    residual = min(misses, key=lambda miss: (abs(miss), miss), default=0)
    told = misses if policy == "linear" else [residual]
    reason = "" if chosen else "no_event"
    if chosen and tolerance is not None and max(map(abs, told)) > tolerance:
        reason = "out_of_tolerance"
    if chosen and staleness is not None and -min(told) > staleness:
        reason = "stale"
    if reason and events:
        reason = "not_started" if unstarted else "stream_ended" if ended else reason
    if reason:
        return Match(*MISSING, reason, 0)
    weight = misses[0] / (misses[0] - misses[1]) if policy == "linear" and len(misses) == 2 else 0.0
    return Match(chosen[0].index, chosen[-1].index, weight, residual, "", covered if policy == "overlap" else 0)


@st.composite
def streams(draw: st.DrawFn) -> list[Event]:
    """Events with gaps, runs of one start, points, and intervals that are long and overlap each other."""
    time, events = draw(st.integers(-20, 20)), []
    for index in range(draw(st.integers(0, 14))):
        time += draw(st.sampled_from((0, 0, 1, 1, 2, 3, 30)))
        events.append(Event(time, time + draw(st.sampled_from((0, 0, 1, 2, 5, 40))), index))
    return events


@st.composite
def cuts_of_time(draw: st.DrawFn) -> list[Window]:
    """Windows that ascend by their begins; ends and anchors may not."""
    begin, windows = draw(st.integers(-40, 20)), []
    for _ in range(draw(st.integers(0, 10))):
        begin += draw(st.sampled_from((0, 1, 2, 7, 30)))
        anchor = begin + draw(st.sampled_from((0, 0, 1, 3, 25)))
        windows.append(Window(begin, anchor, anchor + draw(st.sampled_from((1, 1, 2, 4, 30)))))
    return windows


LIMITS = st.none() | st.integers(0, 12)
CUTS = st.lists(st.integers(0, 14), max_size=14)


@given(cuts_of_time(), streams(), LIMITS, LIMITS, CUTS, CUTS, st.sampled_from(sorted(POLICIES)))
def test_however_both_sides_are_cut_into_chunks_each_window_gets_what_brute_force_finds(
    windows: list[Window],
    events: list[Event],
    tolerance: int | None,
    staleness: int | None,
    window_cuts: list[int],
    event_cuts: list[int],
    policy: str,
) -> None:
    expected = [brute_force(window, events, policy, tolerance, staleness) for window in windows]
    assert aligned(windows, events, policy, tolerance, staleness, (window_cuts, event_cuts)) == expected
    assert aligned(windows, events, policy, tolerance, staleness, (range(14), range(14))) == expected


@given(cuts_of_time(), streams(), st.sampled_from((-TIME_LIMIT_NS + 1000, TIME_LIMIT_NS - 1000)))
def test_moving_both_sides_to_the_ends_of_time_changes_nothing(
    windows: list[Window], events: list[Event], by: int
) -> None:
    for policy in POLICIES:
        moved = aligned(
            [Window(*(time + by for time in window)) for window in windows],
            [Event(each.start + by, each.end + by, each.index) for each in events],
            policy,
        )
        assert moved == aligned(windows, events, policy)


def test_times_as_far_apart_as_they_may_be_do_not_overflow() -> None:
    first, last = Event(-TIME_LIMIT_NS, TIME_LIMIT_NS, 0), Event(TIME_LIMIT_NS, TIME_LIMIT_NS, 1)
    window = Window(-TIME_LIMIT_NS, TIME_LIMIT_NS - 1, TIME_LIMIT_NS)
    span = 2 * TIME_LIMIT_NS
    assert aligned([window], [first, last], "previous") == [Match(0, 0, 0.0, 1 - span, "", 0)]
    (match,) = aligned([window], [first, last], "linear")
    assert (match.first, match.last, match.residual) == (0, 1, 1)
    assert math.isclose(match.weight, 1)
    assert aligned([window], [first, last], "overlap") == [Match(0, 0, 0.0, 0, "", span)]
    assert aligned([window], [last], "window") == [Match(*MISSING, "not_started", 0)]
    assert aligned([window], [first], "previous", TIME_LIMIT_NS) == [Match(*MISSING, "stream_ended", 0)]


FRAMES = [Event(at, at, index) for index, at in enumerate((0, 10, 20, 20, 60))]


@pytest.mark.parametrize(
    ("policy", "anchor", "expected"),
    [
        ("nearest", 15, Match(1, 1, 0.0, -5, "", 0)),
        ("nearest", 16, Match(2, 2, 0.0, 4, "", 0)),
        ("nearest", 45, Match(*MISSING, "out_of_tolerance", 0)),
        ("nearest", -9, Match(0, 0, 0.0, 9, "", 0)),
        ("nearest", -99, Match(*MISSING, "not_started", 0)),
        ("nearest", 99, Match(*MISSING, "stream_ended", 0)),
        ("previous", 20, Match(2, 2, 0.0, 0, "", 0)),
        ("previous", 27, Match(2, 2, 0.0, -7, "", 0)),
        ("previous", 29, Match(*MISSING, "stale", 0)),
        ("previous", -1, Match(*MISSING, "not_started", 0)),
        ("linear", 12, Match(1, 2, 0.2, -2, "", 0)),
        ("linear", 20, Match(2, 2, 0.0, 0, "", 0)),
        ("linear", 27, Match(*MISSING, "out_of_tolerance", 0)),
        ("linear", 60, Match(4, 4, 0.0, 0, "", 0)),
        ("linear", 61, Match(*MISSING, "stream_ended", 0)),
        ("linear", -1, Match(*MISSING, "not_started", 0)),
    ],
)
def test_a_policy_picks_by_the_anchor(policy: str, anchor: int, expected: Match) -> None:
    window = Window(anchor - 100, anchor, anchor + 100)
    assert aligned([window], FRAMES, policy, tolerance=10, staleness=8) == [expected]


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [
        (0, 20, Match(0, 1, 0.0, 0, "", 0)),
        (10, 21, Match(1, 3, 0.0, -5, "", 0)),
        (30, 50, Match(*MISSING, "no_event", 0)),
        (61, 80, Match(*MISSING, "stream_ended", 0)),
        (-9, 0, Match(*MISSING, "not_started", 0)),
    ],
)
def test_a_window_takes_what_starts_in_it_without_its_end(begin: int, end: int, expected: Match) -> None:
    assert aligned([Window(begin, (begin + end) // 2, end)], FRAMES, "window") == [expected]


def test_cues_that_overlap_are_weighed_by_the_time_they_cover() -> None:
    cues = [Event(0, 100, 0), Event(10, 12, 1), Event(50, 60, 2), Event(120, 130, 3)]
    windows = [
        Window(0, 20, 40),
        Window(20, 30, 45),
        Window(90, 112, 125),
        Window(100, 110, 120),
        Window(130, 140, 150),
    ]
    assert aligned(windows, cues, "overlap") == [
        Match(0, 1, 0.0, 0, "", 40),
        Match(0, 0, 0.0, 0, "", 25),
        Match(0, 3, 0.0, 8, "", 15),
        Match(*MISSING, "no_event", 0),
        Match(*MISSING, "stream_ended", 0),
    ]


def test_a_stream_of_nothing_has_no_event() -> None:
    for policy in POLICIES:
        assert aligned([Window(0, 1, 2)], [], policy, 5, 5) == [Match(*MISSING, "no_event", 0)]


@pytest.mark.parametrize(
    ("events", "told"),
    [
        ([Event(5, 5, 70), Event(4, 4, 71)], r"event 71: from 4 ns to 4 ns, after one from 5 ns; events must ascend"),
        ([Event(5, 4, 70)], r"event 70: from 5 ns to 4 ns, .* end where they start or later"),
        ([Event(0, TIME_LIMIT_NS + 1, 7)], r"event 7: from 0 ns to 4611686018427387904 ns, .* lie within ±46116"),
        ([Event(-TIME_LIMIT_NS - 1, 0, 7)], r"event 7: from -4611686018427387904 ns"),
    ],
)
@pytest.mark.parametrize("cuts", [(), (1,)])
def test_events_out_of_order_are_named(events: list[Event], told: str, cuts: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=told):
        aligned([Window(0, 50, 99)], events, "nearest", cuts=((), cuts))


@pytest.mark.parametrize(
    ("windows", "told"),
    [
        (
            [Window(0, 1, 2), Window(5, 6, 7), Window(4, 5, 6)],
            r"window 2: \[4, 6\) ns, anchored at 5, after one .* at 5",
        ),
        ([Window(0, 2, 2)], r"window 0: \[0, 2\) ns, anchored at 2"),
        ([Window(3, 2, 5)], r"window 0: \[3, 5\) ns, anchored at 2"),
        ([Window(0, 2, TIME_LIMIT_NS + 1)], r"window 0: .* must ascend, hold their anchors, and lie within"),
    ],
)
@pytest.mark.parametrize("cuts", [(), (1, 2)])
def test_windows_out_of_order_are_named(windows: list[Window], told: str, cuts: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=told):
        aligned(windows, FRAMES, "nearest", cuts=(cuts, ()))


def test_what_is_asked_wrongly_is_told_before_anything_is_read() -> None:
    with pytest.raises(
        InputError, match=r"policy 'closest' is unknown; allowed: nearest, previous, linear, window, overlap"
    ):
        align([], [], "closest")
    for wrong in (-1, TIME_LIMIT_NS + 1):
        with pytest.raises(InputError, match=rf"staleness of {wrong} ns; allowed: 0 to 4611686018427387903, or none"):
            align([], [], "previous", None, wrong)


def test_what_is_held_does_not_grow_with_the_stream() -> None:
    """Of an hour of 100 Hz, with a window each second, no more than a few chunks are held at any time."""
    held: list[int] = []

    def events() -> Iterator[Events]:
        for begin in range(0, 360_000, 500):
            at = np.arange(begin, begin + 500, dtype=np.int64) * (SECOND // 100)
            held.append(begin)
            yield Events(at, at + SECOND // 100, np.arange(begin, begin + 500))

    windows = [Window(n * SECOND, n * SECOND + SECOND // 2, (n + 2) * SECOND) for n in range(3600)]
    for policy in POLICIES:
        held.clear()
        read = []
        for part, _ in enumerate(align(window_chunks(windows, range(100, 3600, 100)), events(), policy)):
            read.append(held[-1] - part * 10_000)
        assert max(read) <= 13_000
