"""A Dask cluster of real processes: `dask scheduler` and `dask worker`, on this host or in network namespaces."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.processes import wait_for
from tests.test_imports import ROOT

__all__ = ["Cluster"]

START_S = 60


class Cluster:
    """One scheduler and its workers. Used as a context it leaves no process behind.

    Args:
        folder: for logs and scratch.
        host: where the scheduler listens.
        on: the command that puts a process onto the scheduler's host, e.g. `ip netns exec NAME`.
        env: more environment for every process, e.g. Dask's own config.
    """

    def __init__(
        self, folder: Path, host: str = "127.0.0.1", on: Sequence[str] = (), env: dict[str, str] | None = None
    ) -> None:
        self.folder, self._env = folder, env or {}
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "scheduler.json"
        options = ["--host", host, "--port", "0", "--no-dashboard", "--dashboard-address", f"{host}:0"]
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        self.scheduler = self._start("scheduler", [*options, "--scheduler-file", str(file)], on, {})
        wait_for(lambda: file.exists() and file.read_text().endswith("}"), START_S, "the scheduler's start")
        self.address: str = json.loads(file.read_text())["address"]

    def add_worker(
        self,
        name: str,
        on: Sequence[str] = (),
        threads: int = 2,
        env: dict[str, str] | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        """Starts a worker, which no nanny starts again where it dies."""
        options = ["--nthreads", str(threads), "--no-nanny", "--no-dashboard", "--name", name, "--host", host]
        options += ["--dashboard-address", f"{host}:0", "--local-directory", str(self.folder / name)]
        self.workers[name] = self._start("worker", [self.address, *options], on, env or {}, name)

    def _start(
        self, command: str, options: list[str], on: Sequence[str], env: dict[str, str], name: str = ""
    ) -> "subprocess.Popen[bytes]":
        with (self.folder / f"{name or command}.log").open("wb") as log:
            # `-m`, so that the checkout's own modules are found, as where braid is installed.
            return subprocess.Popen(
                [*on, sys.executable, "-m", "dask", command, *options],
                cwd=ROOT,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | self._env | env,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    def kill(self, name: str) -> None:
        """Kill -9."""
        self.workers[name].send_signal(signal.SIGKILL)
        self.workers.pop(name).wait()

    def logs(self) -> str:
        """What all its processes said."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *error: object) -> None:
        processes = [*self.workers.values(), self.scheduler]
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
