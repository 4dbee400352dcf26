"""Decoding and encoding in child processes, so that a value which kills them (segfault, out of memory, without end) kills no
worker.

For shards at which earlier attempts were cut off, and those behind them (pipelines/attempts.py): from the second attempt on
values are decoded in a child, one at a time, so that the one it dies of is known; from the third on the model runs in a child
too, on the batches of any attempt, whose vectors stay what they are byte for byte. A batch that kills the child is run again
value by value: the one that does so then is known, and the others' vectors are those of batches of one. Whatever kills a child
is tried again in a fresh one first, as the kernel may have killed it for another's memory. A child holds a model of its own
beside the worker's.
"""

import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

from featurestore import encoders, media
from featurestore.encoders.runtime import tune_process
from featurestore.errors import DecodeError
from pipelines.forward import Forwarded, forward
from pipelines.workers import Process

__all__ = ["DecodeApart", "ForwardApart"]

TIMEOUT_S = 60.0
"""What a value, or a batch, may take. The largest that the limits of `featurestore.media` let pass take a few seconds."""

MEMORY_BYTES = 4 << 30
"""What a value, or a batch beside its model, may take. The largest that the limits of `featurestore.media` let pass take about
2 GiB."""

TRIES = 2


class _Work(NamedTuple):
    """What a child does: an encoder's forward or `decode_field`, or `media.check` where no encoder is named."""

    encoder: str
    options: dict[str, Any]
    memory_bytes: int
    forwards: bool = False

    def open(self, threads: int) -> Callable[..., Any]:
        """The function that takes a value, or a batch."""
        function = self._function()
        _limit(self.memory_bytes)
        return function

    def _function(self) -> Callable[..., Any]:
        if not self.encoder:
            return media.check
        encoder = encoders.find(self.encoder, self.options)
        if not self.forwards:
            return encoder.decode_field
        tune_process()
        encoder.load()
        return partial(forward, encoder)

    def do(self, function: Callable[..., Any], task: tuple[Any, ...]) -> Any:
        """Calls it. Short of memory the process ends, as the kernel would end it: others are not to suffer."""
        try:
            return function(*task)
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


class _Apart:
    """A function in a process of its own, started with the first call; used as a context, it is ended with it.

    May be called from several threads: they take turns.

    Attributes:
        lost: whether a value was found that kills it, or comes to no end.
    """

    def __init__(self, noun: str, work: _Work) -> None:
        self._noun, self._work, self.lost = noun, work, False
        self._process: Process | None = None
        self._turn, self._closed = threading.Lock(), False

    def _ask(self, *task: Any) -> Any:
        """What the function gives, as if it were called here; _Lost where it kills its process, or comes to no end, twice."""
        with self._turn:
            for _ in range(TRIES):
                if self._closed:
                    raise RuntimeError("the shard that this value is of has ended")
                try:
                    return self._call(task)
                except _Lost as each:
                    self._end()
                    lost = each
            self.lost = True
            raise lost

    def _call(self, task: tuple[Any, ...]) -> Any:
        if self._process is None:
            self._process = Process(self._work, 1, 1)
            self._process.wait_until_open()
        (place,) = self._process.places
        try:
            place.send(task)
            if not place.poll(TIMEOUT_S):
                raise _Lost(f"{self._noun}_timeout", f"the {self._noun} had come to no end after {TIMEOUT_S:g} s")
            given, error = place.recv()
        except (EOFError, OSError) as gone:
            raise _Lost(f"killed_{self._noun}", f"the {self._noun}'s process ended {self._process.ended()}") from gone
        if error is not None:
            raise error
        return given

    def _end(self) -> None:
        if self._process is not None:
            self._process.popen.kill()
            self._process.popen.wait()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._closed = True
        if self._process is not None:
            # Whoever waits for a value gives up his turn.
            self._process.popen.kill()
        with self._turn:
            self._end()


class DecodeApart(_Apart):
    """A decoder in a process of its own.

    Args:
        encoder: the encoder whose `decode_field` is called; without one, `media.check`.
        options: the encoder's.
    """

    def __init__(self, encoder: str = "", options: Mapping[str, Any] | None = None) -> None:
        super().__init__("decoder", _Work(encoder, dict(options or {}), MEMORY_BYTES))

    def __call__(self, *value: Any) -> Any:
        """What the decoder gives for a value.

        Raises:
            DecodeError: the decoder's own; `killed_decoder` or `decoder_timeout`, where it died or came to no end, twice.
        """
        try:
            return self._ask(*value)
        except _Lost as lost:
            raise DecodeError(lost.reason, lost.detail) from lost


class ForwardApart(_Apart):
    """An encoder's model in a process of its own."""

    def __init__(self, encoder: str, options: Mapping[str, Any]) -> None:
        super().__init__("encoder", _Work(encoder, dict(options), MEMORY_BYTES, forwards=True))

    def __call__(self, values: list[Any]) -> Forwarded:
        """What `forward` gives for decoded values; `killed_encoder` or `encoder_timeout` for one that does so alone, twice."""
        if not values:
            return Forwarded([])
        try:
            made: Forwarded = self._ask(values)
            return made
        except _Lost as lost:
            if len(values) == 1:
                return Forwarded([DecodeError(lost.reason, lost.detail)])
        return Forwarded([vector for value in values for vector in self([value]).vectors])


class _Lost(Exception):
    """The child is lost to a value, and why."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail
