"""Decoding in a child process, so that a value which kills its decoder (segfault, out of memory, without end) kills no worker.

For shards at which an earlier attempt was cut off. Values go to the child one at a time, so the one that it dies of is known;
it is tried again in a fresh child, as the kernel may have killed the first for another's memory. Of a value that kills the
model's forward, not its decoder, this knows nothing: such a job fails as often as it is run.
"""

import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from featurestore import encoders, media
from featurestore.errors import DecodeError
from pipelines.workers import Process

__all__ = ["DecodeApart"]

TIMEOUT_S = 60.0
"""What a value may take. The largest that the limits of `featurestore.media` let pass take a few seconds."""

MEMORY_BYTES = 4 << 30
"""What a value may take. The largest that the limits of `featurestore.media` let pass take about 2 GiB."""

TRIES = 2


class _Work(NamedTuple):
    """What the child does: an encoder's `decode`, or `media.check` where no encoder is named."""

    encoder: str
    options: dict[str, Any]
    memory_bytes: int

    def open(self, threads: int) -> Callable[..., Any]:
        """The function that takes a value."""
        decode = encoders.find(self.encoder, self.options).decode if self.encoder else media.check
        _limit(self.memory_bytes)
        return decode

    def do(self, decode: Callable[..., Any], task: tuple[Any, ...]) -> Any:
        """Decodes a value. Short of memory the process ends, as the kernel would end it: others are not to suffer."""
        try:
            return decode(*task)
        except MemoryError:
            os.kill(os.getpid(), signal.SIGKILL)


def _limit(memory_bytes: int) -> None:
    """Makes this process the first that the kernel ends where memory runs out, and bounds what more it may take.

    Not RLIMIT_AS: libraries reserve address space that they never use, CUDA's by the terabyte.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if sys.platform != "linux":
        return
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    held = re.search(r"^VmData:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if held:
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = (int(held[1]) << 10) + memory_bytes
        resource.setrlimit(
            resource.RLIMIT_DATA, (wanted if soft == resource.RLIM_INFINITY else min(wanted, soft), hard)
        )


class DecodeApart:
    """A decoder in a process of its own, started with the first value; used as a context, it is ended with it.

    May be called from several threads: values take turns.

    Args:
        encoder: the encoder whose `decode` is called; without one, `media.check`.
        options: the encoder's.
    """

    def __init__(self, encoder: str = "", options: Mapping[str, Any] | None = None) -> None:
        self._work = _Work(encoder, dict(options or {}), MEMORY_BYTES)
        self._process: Process | None = None
        self._turn, self._closed = threading.Lock(), False

    def __call__(self, *value: Any) -> Any:
        """What the decoder gives for a value, as if it were called here.

        Raises:
            DecodeError: the decoder's own; `killed_decoder` or `decoder_timeout`, where it died or came to no end, twice.
        """
        with self._turn:
            for _ in range(TRIES):
                if self._closed:
                    raise RuntimeError("the shard that this value is of has ended")
                try:
                    return self._decode(value)
                except _Lost as lost:
                    self._end()
                    rejected = DecodeError(lost.reason, lost.detail)
            raise rejected

    def _decode(self, value: tuple[Any, ...]) -> Any:
        if self._process is None:
            self._process = Process(self._work, 1, 1)
            self._process.wait_until_open()
        (place,) = self._process.places
        try:
            place.send(value)
            if not place.poll(TIMEOUT_S):
                raise _Lost("decoder_timeout", f"the decoder had come to no end after {TIMEOUT_S:g} s")
            decoded, error = place.recv()
        except (EOFError, OSError) as gone:
            raise _Lost("killed_decoder", f"the decoder's process ended {self._process.ended()}") from gone
        if error is not None:
            raise error
        return decoded

    def _end(self) -> None:
        if self._process is not None:
            self._process.popen.kill()
            self._process.popen.wait()
            self._process = None

    def __enter__(self) -> "DecodeApart":
        return self

    def __exit__(self, *error: object) -> None:
        self._closed = True
        if self._process is not None:
            # Whoever waits for a value gives up his turn.
            self._process.popen.kill()
        with self._turn:
            self._end()


class _Lost(Exception):
    """The child is lost to a value, and why."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail
