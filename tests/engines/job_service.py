"""Beam's own job service and its workers, as processes of this machine."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import small_spec
from tests.processes import answers, wait_for
from tests.test_imports import ROOT

__all__ = ["START_S", "SUBPROCESS", "JobService", "flow_spec", "worker_pool"]

SUBPROCESS = "beam:env:harness_subprocess_python:v1"
START_S = 60


def flow_spec(corpus: Path, store: Path | str, **of_store: Any) -> str:
    """A spec with every stage and the fewest jobs: two views of the sounds, one space, one index, one training set."""
    spec = yaml.safe_load(small_spec(corpus, Path("/")))
    spec["store"] = {"uri": str(store), **of_store}
    for section, kept in (
        ("views", ("timbre", "short")),
        ("spaces", ("other",)),
        ("indexes", ("other",)),
        ("training_sets", ("other",)),
    ):
        spec[section] = {name: spec[section][name] for name in kept}
    return yaml.safe_dump(spec)


class JobService:
    """`local_job_service_main` in a process group of its own. Used as a context it leaves no process behind."""

    def __init__(self, folder: Path) -> None:
        port = folder / "port"
        self.log = folder / "log"
        options = ["--port", "0", "--port_file", str(port), "--staging_dir", str(folder / "staged")]
        self.process = _start("apache_beam.runners.portability.local_job_service_main", options, self.log)
        wait_for(port.exists, START_S, self.log.read_text)
        self.endpoint = f"localhost:{port.read_text()}"

    def args(self, environment: str = SUBPROCESS, config: str | None = None) -> list[str]:
        """What stands after `--`; the subprocess environment's `config` is a worker of this Python where it is None."""
        if environment == SUBPROCESS and config is None:
            config = f"{sys.executable} -m apache_beam.runners.worker.sdk_worker_main"
        options = ["--runner=PortableRunner", f"--job_endpoint={self.endpoint}", f"--environment_type={environment}"]
        return options + ([f"--environment_config={config}"] if config else [])

    def __enter__(self) -> "JobService":
        return self

    def __exit__(self, *error: object) -> None:
        _end(self.process)


@contextmanager
def worker_pool(folder: Path) -> Iterator[str]:
    """The address of a worker pool, as it stands beside Flink's task managers."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    options = ["--service_port", str(port)]
    process = _start("apache_beam.runners.worker.worker_pool_main", options, folder / "pool.log")
    try:
        wait_for(lambda: answers("127.0.0.1", port), START_S, (folder / "pool.log").read_text)
        yield f"localhost:{port}"
    finally:
        _end(process)


def _start(module: str, options: list[str], log: Path) -> subprocess.Popen[bytes]:
    # The pool starts its workers as `python`.
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", module, *options]
    with log.open("wb") as file:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
