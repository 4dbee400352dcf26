"""Attempt receipts: which shards a worker was at work on when it was killed.

A receipt is an empty object in the store, made before a shard is begun and removed when it is done, or when it failed by an
error that somebody gets to read. One that is there at the beginning was left by an attempt that was cut off: by a value that
kills its process, or by chance. A straggler's second attempt beside its first finds one too, and is careful for nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from featurestore.errors import BraidError
from featurestore.storage import Storage

__all__ = ["attempt"]


@contextmanager
def attempt(storage: Storage, receipt: str) -> Iterator[bool]:
    """Gives whether an earlier attempt at a shard was cut off, and keeps its receipt while this one goes on."""
    again = storage.exists(receipt)
    if not again:
        storage.touch(receipt)
    try:
        yield again
    except MemoryError:
        # Just short of being killed: the next attempt is to be careful.
        raise
    except BaseException:
        with suppress(BraidError):
            storage.delete(receipt)
        raise
    storage.delete(receipt)
