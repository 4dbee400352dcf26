"""How a recording is cut into windows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurestore.errors import InputError
from pipelines.synchronize import TIME_LIMIT_NS, Events, windows
from pipelines.synchronize.windows import every, per_event


def rows(chunks: object) -> list[tuple[int, ...]]:
    return [tuple(row) for chunk in chunks for row in np.stack(chunk, axis=1).tolist()]  # type: ignore[attr-defined]


@given(
    st.integers(-50, 50), st.integers(0, 60), st.integers(1, 12), st.integers(1, 12), st.sampled_from((1, 3, 1 << 16))
)
def test_windows_stand_at_a_distance_until_one_reaches_the_end(
    first: int, span: int, every_ns: int, length_ns: int, chunk: int
) -> None:
    expected, last, begin = [], first + span, first
    while True:
        expected.append((begin, begin + length_ns // 2, begin + length_ns))
        if begin + length_ns >= last or begin + every_ns >= last:
            break
        begin += every_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "CHUNK", chunk)
        made = list(every(first, last, every_ns, length_ns))
        others = {anchor: rows(every(first, last, every_ns, length_ns, anchor)) for anchor in ("begin", "end")}
    assert rows(made) == expected
    assert others == {
        "begin": [(begin, begin, end) for begin, _, end in expected],
        "end": [(begin, end - 1, end) for begin, _, end in expected],
    }
    assert {column.dtype for each in made for column in each} == {np.dtype(np.int64)}
    assert max(len(each.begin_ns) for each in made) <= chunk
    if length_ns >= every_ns:
        seen = {moment for begin, _, end in expected for moment in range(begin, end)}
        assert seen >= set(range(first, last))


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ((0, 10, 0, 2), r"windows every 0 ns of 2 ns; both must be 1 ns or more"),
        ((0, 10, 2, -1), r"windows every 2 ns of -1 ns; both"),
        ((10, 9, 1, 1), r"windows from 10 ns to 9 ns; the last must not lie before the first"),
        ((TIME_LIMIT_NS - 5, TIME_LIMIT_NS, 4, 4), r"pass what times are allowed: ±4611686018427387903 ns"),
        ((-TIME_LIMIT_NS - 1, 0, 4, 4), r"pass what times are allowed"),
    ],
)
def test_windows_that_cannot_be_are_told_at_once(asked: tuple[int, int, int, int], told: str) -> None:
    with pytest.raises(InputError, match=told):
        every(*asked)


def test_each_event_has_a_window_anchored_in_its_middle_and_a_point_has_one_of_a_nanosecond() -> None:
    starts, ends = np.array([3, 10, 10], np.int64), np.array([8, 10, 40], np.int64)
    made = rows(per_event([Events(starts, ends, np.arange(3)), Events(ends[2:], ends[2:] + 2, np.arange(3, 4))]))
    assert made == [(3, 5, 8), (10, 10, 11), (10, 25, 40), (40, 41, 42)]


@pytest.mark.parametrize(("anchor", "first"), [("begin", (3, 3, 10)), ("centre", (0, 3, 7)), ("end", (-3, 3, 4))])
def test_windows_of_a_length_hold_the_event_where_the_anchor_stands(anchor: str, first: tuple[int, ...]) -> None:
    starts = np.array([3, 10, 10], np.int64)
    made = rows(per_event([Events(starts, starts + 50, np.arange(3))], 7, anchor))
    assert made == [first, *[tuple(time + 7 for time in first)] * 2]
