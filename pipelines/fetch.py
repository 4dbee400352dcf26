"""A value of a source, checked: its bytes, and where a corpus of `media: reference` finds them again."""

from collections.abc import Callable
from typing import Any

from featurestore.errors import DecodeError
from featurestore.references import relative
from featurestore.storage import Storage
from pipelines.sources import Missing, Referable, Value


def fetched(value: Value, modality: str, decode: Callable[[str, bytes], Any] | None) -> bytes:
    """A value's bytes; DecodeError as the shard stage rejects it: `decode` is given what no view would ever decode."""
    raw = value.fetch()
    if not raw:
        raise DecodeError("empty", f"{value.source}: 0 bytes")
    if modality == "text":
        try:
            raw.decode()
        except UnicodeDecodeError as error:
            raise DecodeError("invalid_utf8", f"{value.source}: {error}") from None
    if decode is not None:
        decode(modality, raw)
    return raw


def reference_to(storage: Storage, value: Value | Missing | None) -> tuple[str | None, int]:
    """Where a value is referred to, relative to the root, and its offset there; None where it goes into the tar.

    Those are values in no file of their own (texts of rows, a Parquet file's cells, windows), and files whose name is no text.
    """
    address = value.address if isinstance(value, Referable) else None
    return (None, 0) if address is None else (relative(storage, address[0]), address[1])
