"""Progress of a job, read from what lies in the store: the same on every runner, and true after a kill."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from jobs.report import counted

_POLL_S = 0.25


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")


@contextmanager
def track(console: Console, label: str, total: int | None, done: Callable[[], int] | None = None) -> Iterator[None]:
    """Shows a bar with rate and time left while a job runs; a line at its start and end where there is no terminal.

    Args:
        console: where to.
        label: stage and name.
        total: samples to do; None where only a beginning and an end are known.
        done: how many of them are done, asked a few times a second.
    """
    begun = time.monotonic()
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar, _polling(bar, label, total, done):
            yield
    else:
        console.print(f"{label}: started" + (f", {counted(total, 'sample')}" if total else ""))
        yield
    seconds = time.monotonic() - begun
    rate = f", {total / seconds:,.0f} samples/s" if total and seconds > 0 else ""
    console.print(f"{label}: done in {seconds:.1f} s{rate}")


@contextmanager
def _polling(bar: Progress, label: str, total: int | None, done: Callable[[], int] | None) -> Iterator[None]:
    task, stop = bar.add_task(label, total=total), threading.Event()

    def poll() -> None:
        while not stop.wait(_POLL_S):
            if done is not None:
                bar.update(task, completed=done())

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
