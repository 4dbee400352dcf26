"""Attempt receipts: which shards a worker was at work on when it was killed.

A receipt is an empty object in the store, made before a shard is begun and removed when it is done, or when it failed by an
error that somebody gets to read. One that is there at the beginning was left by an attempt that was cut off: by a value that
kills its process, or by chance; the next attempt adds one of its own. A straggler's second attempt beside its first finds one
too, and is careful for nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from featurestore.errors import BraidError
from featurestore.storage import Storage

__all__ = ["attempt", "forget"]

_AGAIN = ".again"


@contextmanager
def attempt(storage: Storage, receipt: str) -> Iterator[int]:
    """Gives how many earlier attempts at a shard were cut off (2 for more), and keeps a receipt while this one goes on."""
    cut = next((number for number, key in enumerate((receipt, receipt + _AGAIN)) if not storage.exists(key)), 2)
    if cut < 2:
        storage.touch(receipt + _AGAIN if cut else receipt)
    try:
        yield cut
    except MemoryError:
        # Just short of being killed: the next attempt is to be careful.
        raise
    except BaseException:
        with suppress(BraidError):
            forget(storage, receipt)
        raise
    forget(storage, receipt)


def forget(storage: Storage, receipt: str) -> None:
    """Removes the receipts of a shard that is done."""
    # The second first: alone it would count for nothing.
    storage.delete(receipt + _AGAIN)
    storage.delete(receipt)
