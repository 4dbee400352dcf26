"""What a worker's time went to: of one shard, and of the process whose threads overlap."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from featurestore import encoders
from jobs.run import Done, Runner
from jobs.spec import load
from pipelines import tally
from pipelines.tally import Busy, Spent, Tally
from tests.conftest import Made, check_same


class Clock:
    """Goes on when it is told to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(tally, "time", made)
    return made


def test_time_in_which_several_were_within_counts_once_and_is_told_once(clock: Clock) -> None:
    busy = Busy()
    clock.now = 5
    with busy:
        clock.now += 1
        with busy:
            clock.now += 2
            assert busy.taken_ms() == 3000
        clock.now += 0.5
    clock.now += 100
    with busy:
        clock.now += 0.25
    assert busy.taken_ms() == 750
    assert busy.taken_ms() == 0


def test_what_is_left_of_a_millisecond_is_not_lost(clock: Clock) -> None:
    busy, told = Busy(), 0
    with busy:
        for _ in range(64):
            clock.now += 2**-12
            told += busy.taken_ms()
    assert told == 15


def test_steps_of_several_threads_are_added() -> None:
    made = Tally()

    def work() -> None:
        with made.timed("model"):
            time.sleep(0.05)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    with pytest.raises(ValueError, match="x"), made.timed("decoding"):
        raise ValueError("x")
    spent = made.spent(Busy(), Busy())
    assert 150 <= spent.model_ms < 5000
    assert spent == Spent(model_ms=spent.model_ms)


class Ran:
    """The encode jobs of a store whose views are gone, and what they took."""

    def __init__(self, made: Made, workers: int) -> None:
        for path in made.store.glob("views/*/*/*.parquet"):
            path.unlink()
        self.store = made
        runner = Runner(load(made.spec), Console(quiet=True), workers=workers)
        self.done: dict[str, Done] = {step.name: step for step in runner.run(("encode",))}


def test_a_run_tells_what_its_workers_time_went_to_and_writes_the_same(
    small: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = encoders.find("mfcc").__class__
    plain = slow.encode

    def encode(self: Any, values: Any) -> Any:
        time.sleep(0.02)
        return plain(self, values)

    monkeypatch.setattr(slow, "encode", encode)
    ran = Ran(small.copy_to(tmp_path), workers=1)
    check_same(ran.store.open(), small.open())
    for step in ran.done.values():
        assert step.worker_s is not None
        assert 0 < step.worker_s <= step.span_s + 0.01
        assert step.values_per_worker_s == pytest.approx(step.values / step.worker_s)
        assert min(step.waiting_s, step.decoding_s, step.model_s, step.writing_s) > 0
        assert 0 <= step.stall <= 1
    # A batch or two of each of six shards.
    assert ran.done["timbre"].model_s >= 6 * 0.02 - 0.01
    assert ran.done["timbre"].model_s > ran.done["loud"].model_s
