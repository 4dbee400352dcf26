"""Attempt receipts: which shards a worker was at work on when it was killed.

A receipt is an empty object in the store, made before a shard is begun and removed when it is done, or when it failed by an
error that somebody gets to read. One that is there at the beginning was left by an attempt that was cut off: by a value that
kills its process, or by chance; the next attempt adds one of its own. A straggler's second attempt beside its first finds one
too, and is careful for nothing.

A runner has a bundle done again a few times (Dataflow: four in all), and it may hold several such values: so what comes behind
a shard with a receipt in its bundle is done as carefully as that one, until those with a receipt are done and nothing was found
in them. Chance aside, two attempts are cut off at most: the first, and one more by a model that a value kills.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from threading import Lock

from featurestore.errors import BraidError
from featurestore.storage import Storage

__all__ = ["Attempt", "Bundle", "attempt", "forget", "within"]

_AGAIN = ".again"


class Attempt:
    """One attempt at a shard.

    Attributes:
        cut: how many earlier attempts were cut off (2 for more), at it or at one before it in its bundle.
        found: set by whoever makes it, where a value was found that kills.
    """

    def __init__(self, cut: int) -> None:
        self.cut, self.found = cut, False


class Bundle:
    """What the attempts at the shards of one bundle know of each other. They may be in several threads."""

    def __init__(self) -> None:
        self._cut, self._open, self._found, self._lock = 0, 0, False, Lock()

    def begin(self, cut: int) -> Attempt:
        """An attempt at a shard at which so many were cut off."""
        with self._lock:
            self._cut, self._open = max(self._cut, cut), self._open + bool(cut)
            return Attempt(self._cut)

    def end(self, cut: int, found: bool) -> None:
        """It came to its end, and found a value that kills, or none."""
        with self._lock:
            self._open, self._found = self._open - bool(cut), self._found or found
            if not self._open and not self._found:
                # They were cut off by chance: care costs time.
                self._cut = 0


_BUNDLE: ContextVar[Bundle | None] = ContextVar("bundle", default=None)


@contextmanager
def within(bundle: Bundle) -> Iterator[None]:
    """Attempts of this thread are of the bundle; else each is one of its own."""
    token = _BUNDLE.set(bundle)
    try:
        yield
    finally:
        _BUNDLE.reset(token)


@contextmanager
def attempt(storage: Storage, receipt: str) -> Iterator[Attempt]:
    """Keeps a receipt of a shard while it is attempted; one more for each earlier attempt that was cut off."""
    receipts, bundle = (receipt, receipt + _AGAIN), _BUNDLE.get() or Bundle()
    cut = next((number for number, key in enumerate(receipts) if not storage.exists(key)), 2)
    made = bundle.begin(cut)
    for key in receipts[cut : made.cut + 1]:
        storage.touch(key)
    try:
        yield made
    except MemoryError:
        # Just short of being killed: the next attempt is to be careful.
        raise
    except BaseException:
        with suppress(BraidError):
            forget(storage, receipt)
        raise
    finally:
        bundle.end(cut, made.found)
    forget(storage, receipt)


def forget(storage: Storage, receipt: str) -> None:
    """Removes the receipts of a shard that is done."""
    # The second first: alone it would count for nothing.
    storage.delete(receipt + _AGAIN)
    storage.delete(receipt)
