"""Progress of a job, read from what lies in the store: the same on every runner, and true after a kill."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from featurestore.errors import BraidError
from jobs.report import counted

_POLL_S = 0.25


class _RateAndTimeLeft(ProgressColumn):
    """Since the job began, without what lay done before: over rich's own window of 30 s hardly a shard is done."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        done = task.completed - task.fields["before"]
        if done <= 0 or not task.elapsed or task.total is None:
            return Text("")
        rate = done / task.elapsed
        left = timedelta(seconds=round((task.total - task.completed) / rate))
        return Text(f"{_figure(rate)}/s, {left} left")


def _figure(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


@contextmanager
def track(
    console: Console, label: str, total: int | None = None, done: Callable[[], int] | None = None
) -> Iterator[None]:
    """Shows a bar while a job runs: with rate and time left where it can be known what is done, else with the time that it took
    so far. Where there is no terminal, a line at its start and end.

    Args:
        console: where to.
        label: stage and name.
        total: samples to do; None where only a beginning and an end are known.
        done: how many of them are done, asked a few times a second; None where nothing tells before the end.
    """
    begun, before = time.monotonic(), done() if done else 0
    if not console.is_terminal:
        console.print(f"{label}: started" + (f", {counted(total, 'sample')}" if total else ""))
        yield
    elif total and done:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _RateAndTimeLeft())
        with Progress(*columns, console=console, transient=True) as bar, _polling(bar, label, total, done, before):
            yield
    else:
        timed = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*timed, console=console, transient=True) as bar:
            bar.add_task(label, total=None)
            yield
    seconds = time.monotonic() - begun
    rate = f", {_figure((total - before) / seconds)} samples/s" if total and total > before and seconds > 0 else ""
    console.print(f"{label}: done in {seconds:.1f} s{rate}")


@contextmanager
def _polling(bar: Progress, label: str, total: int, done: Callable[[], int], before: int) -> Iterator[None]:
    task, stop = bar.add_task(label, total=total, completed=before, before=before), threading.Event()

    def poll() -> None:
        while not stop.wait(_POLL_S):
            # A store that does not answer now is asked again.
            with suppress(BraidError):
                bar.update(task, completed=done())

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
