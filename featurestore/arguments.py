"""What callers give: refused here in our own words, where Python's own error would say nothing of what is allowed."""

import operator
from typing import Any, TypeVar

from featurestore.errors import InputError

__all__ = ["several", "whole_number"]

_T = TypeVar("_T")


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """A whole number of any integer type; InputError for another type, a truth, or less than `least`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        at_least = "" if least is None else f", at least {least}"
        raise InputError(f"{name} is {value!r}; allowed: a whole number{at_least}")
    return number


def several(name: str, value: _T) -> _T:
    """A sequence; InputError for one text, whose letters would be taken for its items."""
    if isinstance(value, str | bytes):
        raise InputError(f"{name} is one text, {value!r}; give a list: [{value!r}]")
    return value
