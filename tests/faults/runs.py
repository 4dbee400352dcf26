"""`braid run` in a process of its own, that may be killed at any moment, and what it was at work on then.

The process is forked from a server that has imported everything and has no threads of its own: imports are what takes longest.
What it opens in the store goes to its log by an audit hook, so that a kill while it imports or plans is told from one that
hit a job at work.
"""

import os
import sys
import time
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import yaml

__all__ = ["TIME_LIMIT_S", "Run", "start_server", "store_of"]

TIME_LIMIT_S = 300
_IMPORTS = (
    "__main__",
    "apache_beam.runners.portability.fn_api_runner.fn_runner",
    "faiss",
    "featurestore.encoders.log_mel",
    "featurestore.encoders.mfcc",
    "jobs.cli",
    "jobs.run",
    "pyarrow.dataset",
    "safetensors.numpy",
    "sklearn.linear_model",
    "soundfile",
    "soxr",
    "tests.faults.runs",
    "torch",
)
# jemalloc, inside Arrow and delta-rs, stops its thread before a fork and starts it after.
_FORK_SAFE_THREAD = "jemalloc_bg_thd"


def start_server(*imports: str) -> ForkServerContext:
    """The server that runs are forked from, with further modules imported; it ends with the process that asked first."""
    context = get_context("forkserver")
    context.set_forkserver_preload([*_IMPORTS, *imports])
    return context


def store_of(spec: Path) -> Path:
    """The store of a spec."""
    return Path(yaml.safe_load(spec.read_text())["store"]["uri"])


class Run:
    """One `braid run SPEC`. Used as a context it leaves no process behind."""

    def __init__(self, server: ForkServerContext, spec: Path) -> None:
        self.log = spec.with_suffix(".log")
        self.log.write_text("")
        self.opened: dict[str, list[tuple[float, str]]] = {}
        """Job -> the files of the store that it opened, catalog left out: (seconds since 1970, key)."""
        self._file, self._rest, self._started = self.log.open(), "", ""
        self._deadline = time.monotonic() + TIME_LIMIT_S
        arguments = (str(spec), str(store_of(spec)), str(self.log))
        self._process = server.Process(target=_braid, args=arguments, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        """The id of its process."""
        assert self._process.pid is not None
        return self._process.pid

    def is_alive(self) -> bool:
        """Whether the run goes on; reads what it has logged meanwhile. Fails where it takes too long."""
        alive = self._process.is_alive()
        *lines, self._rest = (self._rest + self._file.read()).split("\n")
        for line in lines:
            if line.startswith("opened ") and self._started:
                _, moment, key = line.split(" ", 2)
                self.opened.setdefault(self._started, []).append((float(moment), key))
            elif ": started" in line:
                self._started = line.partition(":")[0]
        assert not alive or time.monotonic() < self._deadline, f"more than {TIME_LIMIT_S} s:\n{self.log.read_text()}"
        return alive

    def kill(self) -> None:
        """Kill -9; waits until the process is gone."""
        self._process.kill()
        self._process.join()
        self.is_alive()

    def check_ended_well(self) -> None:
        """Fails with the run's log where it did not end by itself with status 0."""
        self._process.join()
        assert self._process.exitcode == 0, f"status {self._process.exitcode}:\n{self.log.read_text()}"

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self._file.close()
        self._process.close()


def _braid(spec: str, store: str, log: str) -> None:
    """What the forked process does: what the command `braid run SPEC` does."""
    names = [(task / "comm").read_text().strip() for task in Path(f"/proc/{os.getppid()}/task").iterdir()]
    if len([name for name in names if name != _FORK_SAFE_THREAD]) != 1:
        raise RuntimeError(f"the server has threads {names}: what one of them holds while it forks is never let go")
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.addaudithook(_Opened(store, file))
    from jobs.cli import main

    sys.argv = ["braid", "run", spec]
    main()


class _Opened:
    """Audit hook: notes in the log when a file of the store is opened; its catalog, which planning reads, left out."""

    def __init__(self, store: str, log: int) -> None:
        self._within, self._without, self._log = f"{store}/", f"{store}/catalog/", log

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str | os.PathLike):
            path = os.fspath(args[0])
            if path.startswith(self._within) and not path.startswith(self._without):
                os.write(self._log, f"opened {time.time()} {path.removeprefix(self._within)}\n".encode())
