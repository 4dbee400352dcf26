"""`braid` as a person calls it, in a process of its own; and waiting, with a time limit, for what other processes do."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.test_imports import ROOT

__all__ = ["BRAID", "Said", "answers", "braid", "start", "wait_for"]

BRAID = (sys.executable, "-c", "from jobs.cli import main; main()")
TIME_LIMIT_S = 120


class Said(NamedTuple):
    """Exit status, standard output and standard error of one command."""

    status: int
    out: str
    err: str


def braid(*args: str | Path, time_limit_s: float = TIME_LIMIT_S, env: Mapping[str, str] | None = None) -> Said:
    """`braid ARGS`, with more environment; fails after its time limit."""
    with start(*args, env=env) as process:
        try:
            out, err = process.communicate(timeout=time_limit_s)
        finally:
            process.kill()
    return Said(process.returncode, out, err)


def start(
    *args: str | Path, env: Mapping[str, str] | None = None, out: int | Any = subprocess.PIPE
) -> "subprocess.Popen[str]":
    """`braid ARGS`, not waited for; `out` is where its standard output goes."""
    command = [*BRAID, *map(str, args)]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | dict(env or {}), stdout=out, stderr=subprocess.PIPE, text=True
    )


def wait_for(done: Callable[[], Any], timeout_s: float, what: Callable[[], str] | str) -> Any:
    """What `done` gives once it is true. Fails after `timeout_s`, and says what was waited for."""
    deadline = time.monotonic() + timeout_s
    while not (found := done()):
        assert time.monotonic() < deadline, f"{what if isinstance(what, str) else what()}: not within {timeout_s} s"
        time.sleep(0.002)
    return found


def answers(host: str, port: int) -> bool:
    """Whether something listens there."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0
