"""Times: int64 nanoseconds since 1970 UTC, everywhere; and the names of the columns that Braid keeps for itself."""

import datetime
import re

from featurestore.errors import InputError

TIMESTAMPS = ("event_timestamp", "available_timestamp")
"""The columns of a corpus that are times."""

RESERVED = frozenset({"shard", "row", "id", "group", "etag", *TIMESTAMPS})
"""Columns that every corpus has or may have: no field and no kept column goes by these names."""


def timestamp_ns(value: object, where: str) -> int | None:
    """Nanoseconds since 1970 UTC of an ISO 8601 text (UTC where it names no zone) or of whole nanoseconds.

    Those may be a text of nine digits or more, as in a CSV; eight are a date.
    """
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return _checked(value, value, where)
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{9,19}", value):
        return _checked(int(value), value, where)
    try:
        moment = datetime.datetime.fromisoformat(str(value))
    except ValueError:
        raise InputError(
            f"{where}: {str(value)[:80]!r} is not a time; allowed: ISO 8601, e.g. 2026-01-31T12:00:00Z, or whole nanoseconds "
            "since 1970"
        ) from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
    since = moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return _checked(((since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds) * 1_000, value, where)


def _checked(time_ns: int, value: object, where: str) -> int:
    if not -(1 << 63) < time_ns < 1 << 63:
        raise InputError(
            f"{where}: {str(value)[:80]} is too far from 1970 for nanoseconds in 64 bits; allowed: 1677-09-22 to 2262-04-11"
        )
    return time_ns
