"""Values on web servers: one GET each, of bounded size and time.

Redirects are followed to other web addresses, ten at most, and nowhere else. A server that does not say how much will come, or
has no HEAD, is read all the same; less than it said is an error, and what comes beyond that is no part of any value.
"""

from typing import Any

import fsspec

from featurestore.errors import DecodeError

__all__ = ["SILENCE_S", "TIME_LIMIT_S", "get", "get_part", "options"]

TIME_LIMIT_S = 300
"""An answer that is not whole by then is given up: 256 MiB, the largest value, at 0.9 MB/s."""

SILENCE_S = 60
"""So is one of which nothing comes for so long, and a server that accepts no connection."""

_PIECE_BYTES = 1 << 20


def options() -> dict[str, Any]:
    """What fsspec's client for web servers is opened with."""
    # Here, so that what reads from disks does not wait for it.
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=TIME_LIMIT_S, sock_connect=SILENCE_S, sock_read=SILENCE_S)
    return {"client_kwargs": {"timeout": timeout}}


def get(fs: fsspec.AbstractFileSystem, url: str, max_bytes: int) -> bytes:
    """All that is at an address.

    Raises:
        DecodeError: `too_large`.
        FileNotFoundError, aiohttp.ClientError, TimeoutError: what the server or the connection did.
    """
    content: bytes = fsspec.asyn.sync(fs.loop, _get, fs, url, max_bytes)
    if len(content) > max_bytes:
        raise DecodeError("too_large", f"more than {max_bytes} bytes, which are allowed, came")
    return content


def get_part(fs: fsspec.AbstractFileSystem, url: str, offset: int, size: int) -> bytes:
    """`size` bytes at `offset` of what is at an address, or fewer where it ends before.

    A server that gives no ranges sends all there is: what begins there is had from it too, and no more of it is waited for.

    Raises:
        ValueError: the server gives no ranges, and the part does not begin at 0.
        FileNotFoundError, aiohttp.ClientError, TimeoutError: what the server or the connection did.
    """
    content: bytes = fsspec.asyn.sync(fs.loop, _get, fs, url, size, (offset, offset + size - 1))
    return content[:size]


async def _get(fs: Any, url: str, max_bytes: int, part: tuple[int, int] | None = None) -> bytes:
    """What comes, up to a little more than `max_bytes`."""
    # Packed on the way, a body of a few bytes could be of any size.
    headers = {"Accept-Encoding": "identity"}
    if part is not None:
        headers["Range"] = f"bytes={part[0]}-{part[1]}"
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), headers=headers) as answer:
        if answer.status == 404:
            raise FileNotFoundError(url)
        if part is not None and answer.status == 416:
            return b""
        answer.raise_for_status()
        if part is None and (answer.content_length or 0) > max_bytes:
            raise DecodeError("too_large", f"{answer.content_length} bytes; at most {max_bytes} are allowed")
        if part is not None and answer.status != 206 and part[0] > 0:
            raise ValueError(f"the server gives no ranges of files: it answered {answer.status} instead of 206")
        content = bytearray()
        async for piece in answer.content.iter_chunked(_PIECE_BYTES):
            content += piece
            if len(content) > max_bytes:
                break
    return bytes(content)
