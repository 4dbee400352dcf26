"""Addresses that hold a name and a password: they are told of without these, and never read or kept."""

import re

__all__ = ["HOW_ELSE", "has_credentials", "redacted"]

# Up to an @ in the host's place; or from a colon in it, behind which a port is no password, up to an @ anywhere: the secret
# keys of AWS have slashes in them.
_CREDENTIALS = r"(?:[^\s/?#@'\"]*|[^\s/?#@:\[\]'\"]+:(?!\d{1,5}(?:/|$))[^\s@'\"]*)@"
_ANYWHERE = re.compile(f"(?<=://){_CREDENTIALS}")
_AT_FIRST = re.compile(f"[A-Za-z][A-Za-z0-9+.-]*://{_CREDENTIALS}")

HOW_ELSE = "leave out all before the @: credentials come from the environment, or from a profile"


def has_credentials(address: str) -> bool:
    """Whether an address names a user, as in `s3://key:secret@bucket`."""
    return _AT_FIRST.match(address) is not None


def redacted(text: str) -> str:
    """A text with `***` for the names and passwords in the addresses in it."""
    return _ANYWHERE.sub("***@", text)
