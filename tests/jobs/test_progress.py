"""What a person sees of a job while it runs, at a terminal and in a file."""

import io
import re
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from rich.console import Console

from featurestore.errors import StoreError
from jobs import progress
from jobs.progress import track

SOON_S = 10.0


class Terminal:
    """A terminal of 120 columns that keeps what it was sent."""

    def __init__(self) -> None:
        self._out = io.StringIO()
        self.console = Console(file=self._out, force_terminal=True, width=120, highlight=False)

    @property
    def text(self) -> str:
        return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", self._out.getvalue())

    def shows(self, pattern: str) -> re.Match[str]:
        """What is shown soon, at the latest."""
        last = time.monotonic() + SOON_S
        while (found := re.search(pattern, self.text)) is None and time.monotonic() < last:
            time.sleep(0.02)
        assert found is not None, self.text
        return found


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "_POLL_S", 0.02)
    return Terminal()


def test_a_terminal_shows_what_is_done_its_rate_and_the_time_left(terminal: Terminal) -> None:
    done = [0]
    with track(terminal.console, "encode image", 1000, lambda: done[0]):
        terminal.shows(r"encode image +\S+ +0/1000 *\r?\n?")
        done[0] = 40
        rate, hours, minutes, seconds = terminal.shows(
            r"encode image +\S+ +40/1000 ([\d.,]+)/s, (\d+):(\d\d):(\d\d) left"
        ).groups()
        left_s = 3600 * int(hours) + 60 * int(minutes) + int(seconds)
        assert float(rate.replace(",", "")) * left_s == pytest.approx(
            960, rel=0.2, abs=2 * float(rate.replace(",", ""))
        )
    last = terminal.text.splitlines()[-1]
    assert re.fullmatch(r".*encode image: done in [\d.]+ s, [\d.,]+ samples/s", last), last


def test_what_lay_done_before_is_no_part_of_the_rate(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill hours of work seem to be done at once."""
    asked = []
    with track(terminal.console, "encode image", 100, lambda: asked.append(0) or 90):
        terminal.shows(r" 90/100")
        begun = len(asked)
        while len(asked) < begun + 20:
            time.sleep(0.02)
        assert "/s" not in terminal.text
    times = iter([5.0, 7.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(times)))
    assert piped("encode image", 100, lambda: 90) == [
        "encode image: started, 100 samples",
        "encode image: done in 2.0 s, 5 samples/s",
    ]


def test_a_store_that_does_not_answer_for_a_moment_is_asked_again(terminal: Terminal) -> None:
    answers = iter([0, StoreError("s3://b: cannot list"), 7])

    def done() -> int:
        answer = next(answers, 7)
        if isinstance(answer, StoreError):
            raise answer
        return answer

    with track(terminal.console, "shard stamps", 9, done):
        terminal.shows(r"shard stamps .* 7/9 ")


def test_where_nothing_tells_what_is_done_the_time_that_went_by_is_shown(terminal: Terminal) -> None:
    with track(terminal.console, "align seen"):
        terminal.shows(r"align seen +\S+ +0:00:0[1-9]")
    with track(terminal.console, "compact stamps", 9):
        terminal.shows(r"compact stamps +\S+ +0:00:0[1-9]")
    bars = re.sub(r".*: done in .*", "", terminal.text)
    assert "/?" not in bars
    assert "/s" not in bars


def piped(label: str, total: int | None, done: Callable[[], int] | None) -> list[str]:
    out = io.StringIO()
    with track(Console(file=out, width=240), label, total, done):
        pass
    return out.getvalue().splitlines()


def test_a_file_has_a_plain_line_at_the_beginning_and_at_the_end() -> None:
    begun, ended = piped("align seen", None, None)
    assert begun == "align seen: started"
    assert re.fullmatch(r"align seen: done in \d\.\d s", ended)
    begun, ended = piped("compact stamps", 9, None)
    assert begun == "compact stamps: started, 9 samples"
    assert re.fullmatch(r"compact stamps: done in \d\.\d s, [\d,]+ samples/s", ended)
