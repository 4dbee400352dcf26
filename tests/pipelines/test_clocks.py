"""Clocks: exact where they are given, and as close as they say where they are measured."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.synchronize import clocks
from pipelines.synchronize.clocks import STEP_NS, Clock, Envelope, Estimate, Weak, estimate, grid
from tests.recordings import SECOND, flashes, frame_times

HOURS_10 = 36_000 * SECOND
OFFSET_NS, DRIFT_PPM = 237_000_000, 40.0


@given(
    st.integers(-HOURS_10, HOURS_10),
    st.integers(-HOURS_10, HOURS_10),
    st.integers(-20_000, 20_000).map(lambda n: n / 100),
)
def test_a_clock_is_exact_to_a_nanosecond_over_ten_hours_and_goes_back(time: int, offset: int, drift: float) -> None:
    clock = Clock(offset, drift)
    found = int(clock.to_reference(np.array([time]))[0])
    exact = (time + offset) * (1 + Fraction(drift) / 10**6)
    assert abs(found - exact) <= 1
    assert abs(int(clock.to_stream(np.array([found]))[0]) - time) <= 1


def test_times_since_1970_keep_their_nanoseconds() -> None:
    since = 1_700_000_000 * SECOND
    times = since + np.array([0, 1, 2, HOURS_10 + 1])
    assert (Clock(-since, 0.0).to_reference(times) == times - since).all()
    drifted = Clock(-since, 100.0).to_reference(times)
    assert drifted.tolist() == [0, 1, 2, HOURS_10 + 1 + HOURS_10 // 10_000]


def test_an_envelope_is_linear_between_samples_and_the_mean_of_those_in_a_step() -> None:
    first, values = grid([(np.array([SECOND, SECOND + 4 * STEP_NS]), np.array([0, 8], np.float32))])
    assert (first, values.tolist()) == (SECOND, [0, 2, 4, 6, 8])
    dense = np.arange(0, 100 * STEP_NS, STEP_NS // 50)
    noisy = np.random.default_rng(0).normal(5, 1, len(dense)).astype(np.float32)
    one = grid([(dense, noisy)])[1]
    assert one.std() < 0.25
    many = grid((dense[at : at + 37], noisy[at : at + 37]) for at in range(0, len(dense), 37))[1]
    assert np.allclose(one, many)
    with pytest.raises(Weak, match="nothing in it"):
        grid([(np.zeros(0, np.int64), np.zeros(0, np.float32))])
    with pytest.raises(Weak, match="more than a day long"):
        grid([(np.array([0, 25 * 3600 * SECOND]), np.array([0, 1], np.float32))])


def seen(seconds: float, seed: int = 0, noise: float = 0.02, lit=flashes) -> Envelope:
    """Of a video that flashes each second: noise as a share of a flash, on the brightness of each frame."""
    ticks = frame_times(seconds, start_s=1.4, drop=0.1, seed=seed)
    values = lit(ticks / 30_000) + np.random.default_rng(seed).normal(0, noise, len(ticks))
    return grid([(np.rint(ticks * SECOND / 30_000).astype(np.int64), values.astype(np.float32))])


def heard(seconds: float, clock: Clock, seed: int = 0, noise_db: float = 6.0, lit=flashes) -> Envelope:
    """Of a sound that beeps each second, on its own clock: the loudness in steps of 5 ms of a beep and of white noise."""
    rng = np.random.default_rng(seed + 1)
    own = np.arange(0, round(seconds * SECOND), STEP_NS)
    fine = (np.arange(20) / 20 - 0.475) * STEP_NS
    time = (own[:, None] + fine + clock.offset_ns) * (1 + clock.drift_ppm / 1e6) / SECOND
    power = lit(time).mean(axis=1) / 8 + 1 / 8 / 10 ** (noise_db / 10) * (1 + rng.normal(0, 0.16, len(own)))
    return grid([(own, np.sqrt(np.maximum(power, 0)).astype(np.float32))])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("clock", [Clock(OFFSET_NS, DRIFT_PPM), Clock(-OFFSET_NS, -DRIFT_PPM), Clock(0, 0)])
def test_offset_and_drift_are_found_at_6_db(seed: int, clock: Clock) -> None:
    found = estimate(heard(600, clock, seed), seen(600, seed))
    assert abs(found.clock.offset_ns - clock.offset_ns) <= 2_000_000
    assert abs(found.clock.drift_ppm - clock.drift_ppm) <= 10
    assert found.certainty > 20
    assert found.offset_error_ns < 2_000_000
    assert found.drift_error_ppm < 15


def once(time_s: np.ndarray) -> np.ndarray:
    """Light at moments that do not come again: each second's at a place of its own."""
    place = np.random.default_rng(9).uniform(0, 0.8, 100_000)[np.clip(time_s.astype(int), 0, 99_999)]
    return (time_s % 1 >= place) & (time_s % 1 < place + 0.1)


@pytest.mark.parametrize("offset_ns", [25 * SECOND, -12_345_678_901])
def test_an_offset_of_many_seconds_is_found_where_it_is_not_ambiguous(offset_ns: int) -> None:
    found = estimate(heard(300, Clock(offset_ns), lit=once), seen(300, lit=once))
    assert abs(found.clock.offset_ns - offset_ns) <= 4_000_000


def shown(seconds: float, *, begin_s: float, length_s: float, seed: int, offset_s: float = 0.0) -> Envelope:
    """A part of `seconds` of a light that is lit for 0.1 s now and then, on average each 3 s; with noise at 26 dB."""
    rng = np.random.default_rng(seed)
    begins = np.cumsum(rng.exponential(3, round(seconds)))
    own = begin_s + np.arange(round(length_s * 200)) / 200
    nearest = np.searchsorted(begins, own + offset_s, "right") - 1
    lit = (nearest >= 0) & (own + offset_s - begins[nearest.clip(0)] < 0.1)
    noise = np.random.default_rng([seed, round(begin_s)]).normal(0, 0.05, len(own))
    return round(begin_s * SECOND), (lit + noise).astype(np.float32)


@pytest.mark.parametrize("shared_s", [2, 4, 6, 10, 20, 40])
def test_of_two_streams_that_share_little_no_clock_is_told_or_the_right_one(shared_s: int) -> None:
    """Two or three flashes meet by chance at some offset or other: that is nothing to go by."""
    right = 0
    for seed in range(5):
        late = shown(700, begin_s=120 - shared_s, length_s=120, seed=seed, offset_s=0.1)
        try:
            found = estimate(late, shown(700, begin_s=0, length_s=120, seed=seed))
        except Weak:
            continue
        middle = round((120 - shared_s / 2) * SECOND)
        there = int(found.clock.to_reference(np.array([middle - SECOND // 10]))[0])
        assert abs(there - middle) <= 10_000_000
        assert abs(found.clock.drift_ppm) <= clocks.MAX_DRIFT_PPM
        assert found.ambiguous_ns is None
        right += 1
    assert right == 5 if shared_s == 40 else right <= (0 if shared_s < 6 else 5)


@pytest.mark.parametrize("offset_ms", [237, 700, -1_200, 15_300])
def test_what_beeps_each_second_is_off_by_whole_seconds_and_says_so(offset_ms: int) -> None:
    """The smallest offset is taken; a first guess that is given, right to half a second, makes it the right one."""
    beeping, seeing = heard(60, Clock(offset_ms * 1_000_000)), seen(60)
    found = estimate(beeping, seeing)
    assert found.ambiguous_ns == pytest.approx(SECOND, rel=0.01)
    assert abs((found.clock.offset_ns / 1e6 - offset_ms + 500) % 1000 - 500) < 5
    assert abs(found.clock.offset_ns) < SECOND * 0.51
    guess_ns = (offset_ms + 300) * 1_000_000
    guessed = estimate((beeping[0] + guess_ns, beeping[1]), seeing)
    assert abs(guessed.clock.offset_ns + guess_ns - offset_ms * 1_000_000) < 5_000_000


def test_a_drift_past_what_is_looked_for_is_no_clock() -> None:
    with pytest.raises(Weak, match=r"^a drift of \d{3} ppm fits best; looked for: up to 200"):
        estimate(heard(300, Clock(0, 240.0), noise_db=20, lit=once), seen(300, lit=once))


@st.composite
def envelopes(draw: st.DrawFn) -> Envelope:
    """Parts of the same events or of others, still, empty or broken ones, of a sample or of half a minute."""
    begin_s = draw(st.sampled_from((0, 5, 18, 29.5, 40)))
    count = draw(st.sampled_from((0, 1, 2, 1999, 2000, 2400, 6000)))
    kind = draw(st.sampled_from(("lit", "lit", "lit", "silent", "still", "noise", "click", "broken")))
    values = shown(90, begin_s=begin_s, length_s=count / 200, seed=draw(st.integers(0, 2)))[1]
    if kind in ("silent", "still"):
        values[:] = 0 if kind == "silent" else 0.1
    elif kind == "noise":
        values[:] = np.random.default_rng(count).normal(1e9, 1, count)
    elif kind == "click":
        values[:] = np.arange(count) == count // 2
    elif kind == "broken":
        values[count // 3 : count // 3 + 1] = draw(st.sampled_from((np.nan, np.inf, -np.inf, 3e38)))
    return draw(st.sampled_from((0, 3600 * SECOND, -7))) + round(begin_s * SECOND), values


@settings(max_examples=80, deadline=None)
@given(envelopes(), envelopes())
def test_whatever_two_streams_are_there_is_a_clock_within_its_limits_or_a_reason(
    stream: Envelope, reference: Envelope
) -> None:
    try:
        found = estimate(stream, reference)
    except Weak:
        return
    middle = reference[0] + len(reference[1]) * STEP_NS // 2
    assert abs(found.clock.drift_ppm) <= clocks.MAX_DRIFT_PPM
    assert abs(int(found.clock.to_reference(np.array([middle]))[0]) - middle) <= clocks.MAX_OFFSET_NS + SECOND
    assert found.certainty >= clocks.MIN_CERTAINTY
    assert 0 < found.offset_error_ns < SECOND
    assert found.drift_error_ppm > 0


def test_what_is_told_of_the_error_holds() -> None:
    """In two of three recordings, or nearly, the offset in the middle is within a standard error."""
    within = 0
    for seed in range(12):
        found = estimate(heard(200, Clock(OFFSET_NS), seed), seen(200, seed, noise=0.5))
        middle = 100 * SECOND
        error = int(found.clock.to_reference(np.array([middle]))[0]) - middle - OFFSET_NS
        within += abs(error) <= found.offset_error_ns
    assert 6 <= within <= 12


def test_a_long_recording_is_no_more_work_than_it_has_to_be() -> None:
    found = estimate(heard(3600, Clock(OFFSET_NS, DRIFT_PPM)), seen(3600))
    assert abs(found.clock.drift_ppm - DRIFT_PPM) < 1
    assert abs(found.clock.offset_ns - OFFSET_NS) < 2_000_000


def test_a_short_recording_gets_an_offset_and_no_drift() -> None:
    found = estimate(heard(20, Clock(OFFSET_NS, DRIFT_PPM)), seen(20))
    assert found.clock.drift_ppm == 0
    assert found.drift_error_ppm == float("inf")
    assert abs(found.clock.offset_ns - OFFSET_NS) < 15_000_000


@pytest.mark.parametrize("seed", range(10))
def test_noise_has_no_clock(seed: int) -> None:
    rng = np.random.default_rng(seed)
    seconds = (12, 20, 60, 300)[seed % 4]
    noise = grid([(np.arange(0, seconds * SECOND, STEP_NS), rng.normal(0, 1, seconds * 200).astype(np.float32))])
    with pytest.raises(Weak, match=r"certainty \d\.\d; at least 8 is needed|fewer than 3 segments"):
        estimate(noise, seen(seconds, seed, 0.5))


@pytest.mark.parametrize(
    ("values", "told"),
    [(np.zeros(100), r"^0\.5 s long; at least 10 s are needed"), (np.ones(4000), "^nothing changes in it")],
)
def test_what_is_too_short_or_still_has_no_clock(values: np.ndarray, told: str) -> None:
    with pytest.raises(Weak, match=told):
        estimate((0, values.astype(np.float32)), seen(20))


def test_streams_that_do_not_meet_have_no_clock() -> None:
    first, values = heard(60, Clock())
    with pytest.raises(Weak):
        estimate((first + 3600 * SECOND, values), seen(60))


def test_an_estimate_is_told_in_steps_that_do_not_depend_on_the_machine() -> None:
    found = estimate(heard(60, Clock(OFFSET_NS, DRIFT_PPM)), seen(60))
    assert isinstance(found, Estimate)
    assert found.clock.offset_ns % 1000 == 0
    assert round(found.clock.drift_ppm, 2) == found.clock.drift_ppm
    assert clocks.estimate(heard(60, Clock(OFFSET_NS, DRIFT_PPM)), seen(60)) == found
