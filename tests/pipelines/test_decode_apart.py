"""A child process decodes as the encoder does here, and whatever a value does to it is said of that value alone."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featurestore import encoders, media
from featurestore.encoders import contract
from featurestore.errors import DecodeError
from pipelines import decode_apart
from pipelines.decode_apart import DecodeApart, ForwardApart
from tests.contract.test_encoders import CASES, key_of, options
from tests.faults.deadly import HANG, OUT_OF_MEMORY, SEGFAULT, set_deadly

BAD, GOOD = contract.sound(440, 0.5), contract.sound(220, 0.5)


@pytest.mark.parametrize("case", sorted({key_of(case): case for case in CASES if key_of(case) != "remote"}.values()))
def test_values_come_out_as_the_encoder_decodes_them_here(case: str) -> None:
    encoder = encoders.find(key_of(case), options(case))
    with DecodeApart(key_of(case), options(case)) as apart:
        fields = [(raw, place) for place, modality in enumerate(encoder.reads) for raw in contract.examples(modality)]
        for raw, place in fields:
            here, there = encoder.decode_field(raw, place), apart(raw, place)
            assert type(there) is type(here)
            assert all(map(np.array_equal, there, here) if isinstance(here, tuple) else [np.array_equal(there, here)])


def test_what_the_decoder_refuses_is_refused_in_its_words() -> None:
    for decode, value in ((DecodeApart("log-mel"), (b"no sound",)), (DecodeApart(), ("image", b"no image"))):
        with decode as apart, pytest.raises(DecodeError) as there:
            apart(*value)
        with pytest.raises(DecodeError) as here:
            encoders.find("log-mel").decode(*value) if len(value) == 1 else media.check(*value)
        assert str(there.value) == str(here.value)


@pytest.mark.parametrize(
    ("deed", "reason", "detail"),
    [
        (SEGFAULT, "killed_decoder", "the decoder's process ended by SIGSEGV"),
        (
            OUT_OF_MEMORY,
            "killed_decoder",
            "the decoder's process ended by SIGKILL (the kernel does so where memory runs out)",
        ),
        (HANG, "decoder_timeout", "the decoder had come to no end after 1 s"),
    ],
)
def test_a_deadly_value_is_named_after_two_tries_and_the_next_one_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deed: str, reason: str, detail: str
) -> None:
    monkeypatch.setattr(decode_apart, "TIMEOUT_S", 1.0 if deed == HANG else 60.0)
    monkeypatch.setattr(decode_apart, "MEMORY_BYTES", 1 << 28)
    struck = set_deadly(monkeypatch, tmp_path / "deadly", BAD, deed) / "struck"
    with DecodeApart("log-mel") as apart:
        apart(GOOD)
        with pytest.raises(DecodeError) as caught:
            apart(BAD)
        assert (caught.value.reason, caught.value.detail) == (reason, detail)
        pids = struck.read_text().split()
        assert len(set(pids)) == 2
        assert str(os.getpid()) not in pids
        assert np.array_equal(apart(GOOD), encoders.find("log-mel").decode(GOOD))


def test_batches_come_out_as_the_model_gives_them_here() -> None:
    encoder = encoders.find("log-mel")
    values = [encoder.decode(BAD), encoder.decode(GOOD)]
    with ForwardApart("log-mel", {}) as apart:
        assert np.array_equal(np.stack(apart(values).vectors), encoder.encode(values))
        assert apart([]).vectors == []


@pytest.mark.parametrize(
    ("deed", "reason", "detail"),
    [
        (SEGFAULT, "killed_encoder", "the encoder's process ended by SIGSEGV"),
        (HANG, "encoder_timeout", "the encoder had come to no end after 3 s"),
    ],
)
def test_of_a_batch_that_kills_the_model_the_one_value_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deed: str, reason: str, detail: str
) -> None:
    monkeypatch.setattr(decode_apart, "TIMEOUT_S", 3.0)
    encoder = encoders.find("log-mel")
    good, bad = encoder.decode(GOOD), encoder.decode(BAD)
    struck = set_deadly(monkeypatch, tmp_path / "deadly", bad.tobytes(), deed, forward=True) / "struck"
    with ForwardApart("log-mel", {}) as apart:
        first, lost, last = apart([good, bad, good]).vectors
    assert isinstance(lost, DecodeError)
    assert (lost.reason, lost.detail) == (reason, detail)
    assert np.array_equal(first, last)
    assert np.array_equal(first, encoder.encode([good])[0])
    pids, sizes = zip(*(line.split() for line in struck.read_text().splitlines()), strict=True)
    assert sizes == ("3", "3", "1", "1"), "the batch as it is, and then value by value"
    assert len(set(pids)) == 4
    assert str(os.getpid()) not in pids


def test_a_child_that_somebody_else_killed_costs_no_value() -> None:
    with DecodeApart("log-mel") as apart:
        before = apart(GOOD)
        assert apart._process is not None
        os.kill(apart._process.popen.pid, signal.SIGKILL)
        assert np.array_equal(apart(GOOD), before)


def test_the_kernel_ends_the_child_first() -> None:
    with DecodeApart("log-mel") as apart:
        apart(GOOD)
        assert apart._process is not None
        assert Path(f"/proc/{apart._process.popen.pid}/oom_score_adj").read_text().strip() == "1000"


def test_threads_take_turns_and_at_the_end_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    struck = set_deadly(monkeypatch, tmp_path / "deadly", BAD, HANG) / "struck"
    raised: list[BaseException] = []

    def ask() -> None:
        try:
            apart(BAD)
        except RuntimeError as error:
            raised.append(error)

    with DecodeApart("log-mel") as apart:
        with ThreadPoolExecutor(4) as pool:
            assert len({value.tobytes() for value in pool.map(lambda _: apart(GOOD), range(8))}) == 1
        waiting: Any = threading.Thread(target=ask)
        waiting.start()
        while not struck.exists():
            time.sleep(0.01)
        begun = time.monotonic()
    waiting.join()
    assert time.monotonic() - begun < 5
    assert "has ended" in str(raised[0])
    assert apart._process is None


def test_no_child_is_started_where_nothing_is_decoded() -> None:
    with DecodeApart() as apart:
        pass
    assert apart._process is None
