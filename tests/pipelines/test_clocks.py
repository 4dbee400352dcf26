"""Clocks: exact where they are given, and as close as they say where they are measured."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
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
