"""Worker processes of this machine, for the local runner: `python -m pipelines.workers`, started and stopped by `Workers`.

A process holds one opened `Work` and does several tasks at once. Tasks and Results go over socket pairs that nobody else can
open, one for each task at once; a closed one tells either side that the other is gone, at once, also after kill -9.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Protocol

from featurestore.errors import WorkerDied
from pipelines import log
from pipelines.attempts import Bundle, within

__all__ = ["Process", "Work", "Workers"]


class Work(Protocol):
    """What is done with a task of a stage. It is pickled to where it is done: it holds descriptions, nothing open."""

    def open(self, threads: int) -> Any:
        """What doing it needs, once a process: clients, a model; with so many threads to compute in."""

    def do(self, opened: Any, task: Any) -> Any:
        """The task's Result. Called from several threads; again for the same task, it gives the same."""


class Workers:
    """`processes` processes that do `at_once` tasks each. `do` may be called from as many threads as there are such places."""

    def __init__(self, work: Work, processes: int, at_once: int, threads: int) -> None:
        self._processes = [Process(work, at_once, threads) for _ in range(processes)]
        self._free: SimpleQueue[tuple[Process, Connection]] = SimpleQueue()
        try:
            for process in self._processes:
                process.wait_until_open()
        except BaseException:
            self.close()
            raise
        for turn in range(at_once):
            for process in self._processes:
                self._free.put((process, process.places[turn]))

    def do(self, task: Any) -> Any:
        """What `Work.do` gives for the task, from whichever process is free.

        Raises:
            WorkerDied: the process was killed. The others are ended too.
            Exception: what `Work.do` raised.
        """
        process, place = self._free.get()
        try:
            place.send(task)
            result, error = place.recv()
        except (EOFError, OSError) as gone:
            died = process.death(getattr(task, "shard", getattr(task, "key", "?")))
            self.close()
            raise died from gone
        finally:
            # Also of a process that is gone: whoever waits for a place is told the same.
            self._free.put((process, place))
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        """Ends the processes, whatever they are at."""
        for process in self._processes:
            process.popen.kill()
        for process in self._processes:
            process.popen.wait()


class Process:
    """One process with its `places`; its `life` pair carries the work to it, and ends it when this side is gone."""

    def __init__(self, work: Work, at_once: int, threads: int) -> None:
        pairs = [socket.socketpair() for _ in range(1 + at_once)]
        theirs = [pair[1].fileno() for pair in pairs]
        self.popen = subprocess.Popen([sys.executable, "-m", __name__, *map(str, theirs)], pass_fds=theirs)
        for _, their in pairs:
            their.close()
        self._life, *self.places = (Connection(our.detach()) for our, _ in pairs)
        # One that is gone already is told by `wait_until_open`.
        with suppress(BrokenPipeError, ConnectionResetError):
            self._life.send((work, threads))

    def wait_until_open(self) -> None:
        """Waits until the work is opened; raises what opening it raised."""
        try:
            error = self._life.recv()
        except (EOFError, OSError) as gone:
            raise self.death("") from gone
        if error is not None:
            raise error

    def ended(self) -> str:
        """How the process ended, in words; waits for it."""
        status = self.popen.wait()
        why = " (the kernel does so where memory runs out)" if status == -signal.SIGKILL else ""
        return f"by {signal.Signals(-status).name}{why}" if status < 0 else f"with exit status {status}"

    def death(self, shard: str) -> WorkerDied:
        """What is raised where the process ended."""
        return WorkerDied(
            f"a worker process ended {self.ended()}{f' while it was at shard {shard}' if shard else ''}; nothing was published "
            "and what is done is kept: run it again"
        )


def _serve(work: Work, opened: Any, place: Connection, bundle: Bundle) -> None:
    while True:
        result, raised = None, None
        try:
            task = place.recv()
        except (EOFError, OSError):
            return
        try:
            with within(bundle):
                result = work.do(opened, task)
        except Exception as error:
            error.add_note(f"in a worker process: {traceback.format_exc()}")
            raised = error
        try:
            place.send((result, raised))
        except OSError:
            return
        except Exception as error:
            # What was made, or raised, cannot be pickled; nothing of it was sent.
            place.send(
                (None, TypeError(f"{type(raised or result).__name__} cannot be sent to another process: {error}"))
            )


def main() -> None:
    """A worker process: opens the work it is sent, and does tasks until the other side is gone."""
    # Ctrl-C reaches the whole group: the process that asked decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log.inherit()
    life, *places = (Connection(int(fd)) for fd in sys.argv[1:])
    try:
        work, threads = life.recv()
        try:
            opened = work.open(threads)
        except Exception as error:
            life.send(error)
            return
        life.send(None)
    except (EOFError, OSError):
        return
    bundle = Bundle()
    for place in places:
        threading.Thread(target=_serve, args=(work, opened, place, bundle), daemon=True).start()
    try:
        life.recv()
    except (EOFError, OSError):
        # At once: nobody waits for what is being done.
        os._exit(0)


if __name__ == "__main__":
    main()
