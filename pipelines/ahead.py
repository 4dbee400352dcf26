"""Work of many that mostly waits, done in threads ahead of the one that is asked for; the order stays."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["ahead"]

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


def ahead(
    work: Callable[[_Item], _Made], items: Iterable[_Item], threads: int, most: int
) -> Iterator[tuple[_Item, _Made]]:
    """Each item with what `work` made of it, in the order of the items, of which at most `most` are begun and not given yet.

    Raises what `items` or `work` raises, at its place.
    """
    waiting: deque[tuple[_Item, Future[_Made]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) >= most:
                    first, made = waiting.popleft()
                    yield first, made.result()
            while waiting:
                first, made = waiting.popleft()
                yield first, made.result()
        finally:
            # Whoever asks for no more waits for no more than what has begun.
            pool.shutdown(wait=True, cancel_futures=True)
