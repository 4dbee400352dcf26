"""Subtitles: the cues of an SRT or a WebVTT file with their texts, tags and all.

Real files are read: a byte order mark, any line ends, cues out of order, overlapping, before time 0, without blank lines
between them or without counters. Cues are sorted by their starts; of equal starts the one that stands first comes first. A
cue whose times cannot be right is an event all the same, so that what it says is quarantined and not lost: one that ends
before it starts stands at its start, one with no times to read at the start of the cue above it.

A line with an arrow, `-->`, has a cue's times where it has two of them. One that has not is a cue whose times cannot be read
where a cue's times would stand: below a blank line or a counter, of a WebVTT anywhere in a block without a cue that is no
note; anywhere else it is said.

A counter is a number directly above a cue's times that stands below a blank line or first in the file; any other is said. In a
file without a blank line between its cues, whose first has a counter, each is one.
"""

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from featurestore.errors import DecodeError
from pipelines.sources.files import FileValue
from pipelines.synchronize import Events

__all__ = ["Cue", "cues", "events"]

MAX_BYTES = 16 << 20
"""A day of speech is about 2 MB."""

_TIME = r"(-?)(?:(\d{1,4}):)?(-?\d{1,4}):(\d{1,2})(?:[,.](\d{1,9}))?"
_TIMING = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}(?:\s.*)?$")
_NO_CUE = re.compile(r"(WEBVTT|NOTE|STYLE|REGION)(\s|$)")
"""How blocks of a WebVTT begin that are no cues."""


class Cue(NamedTuple):
    """One cue: [start, end) in ns, its text, or what is wrong with it."""

    start_ns: int
    end_ns: int
    text: str
    wrong: DecodeError | None = None


def cues(file: FileValue) -> list[Cue]:
    """All cues of a file that have a text, by their starts.

    Raises:
        DecodeError: `unreadable`, `too_large`, `invalid_utf8`; `unsupported_format` where no line has the times of a cue.
    """
    with file.open() as opened:
        raw = opened.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise DecodeError("too_large", f"{file.source}: more than {MAX_BYTES} bytes")
    try:
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DecodeError("invalid_utf8", f"{file.source}: byte {error.start}; save it as UTF-8") from None
    lines = re.split(r"\r\n|\r|\n", text)
    web = text.startswith("WEBVTT")
    arrows = [number for number, line in enumerate(lines) if "-->" in line]
    close = bool(arrows) and _is_close(lines[: arrows[-1]], arrows[0])
    timings = _timings(lines, web, close)
    if not timings and text.strip().removeprefix("WEBVTT").strip():
        raise DecodeError("unsupported_format", f"{file.source}: no cue of an SRT or WebVTT file in it")
    found: list[Cue] = []
    for number, following in itertools.pairwise([*timings, len(lines)]):
        said = _said(lines[number + 1 : following], web, last=following == len(lines), close=close)
        if said or not _TIMING.match(lines[number]):
            before = found[-1].start_ns if found else 0
            found.append(_cue(lines[number], said, f"{file.source}, line {number + 1}", before))
    return sorted(found, key=lambda cue: cue.start_ns)


def _timings(lines: list[str], web: bool, close: bool) -> list[int]:
    """Numbers of the lines of times, of those too that cannot be read."""
    found: list[int] = []
    block = 0
    for number, line in enumerate(lines):
        if not line.strip():
            block = number + 1
        elif _TIMING.match(line) or (
            "-->" in line
            and not (web and _NO_CUE.match(lines[block]))
            and (not found or (found[-1] < block if web else _is_headed(lines, number, found[-1], close)))
        ):
            found.append(number)
    return found


def _is_headed(lines: list[str], number: int, above: int, close: bool) -> bool:
    """Whether a line stands where a cue's times would, in line `above` at the earliest of those of the cue before."""
    head = lines[number - 1].strip()
    if not head.isdigit():
        return not head
    return not lines[number - 2].strip() or (close and number - 2 > above)


def _is_close(lines: list[str], first: int) -> bool:
    """Whether cues have counters, and no blank lines between them; the first has its times in line `first`."""
    return first > 0 and lines[first - 1].strip().isdigit() and all(line.strip() for line in lines[first:])


def _said(lines: list[str], web: bool, last: bool, close: bool) -> str:
    """The text between a line of times and the next."""
    if web:
        # Up to the blank line: after it come names of cues, notes and styles.
        return "\n".join(lines[: next((at for at, line in enumerate(lines) if not line.strip()), len(lines))]).strip()
    below_blank = len(lines) > 1 and not lines[-2].strip()
    if lines and not last and lines[-1].strip().isdigit() and (close or below_blank):
        # The counter of the next cue.
        lines = lines[:-1]
    return "\n".join(line for line in lines if line.strip()).strip()


def _cue(timing: str, said: str, where: str, before_ns: int) -> Cue:
    match = _TIMING.match(timing)
    if match is None:
        wrong = DecodeError(
            "decode_error", f"{where}: {timing.strip()[:60]!r} has no times of a cue; text: {said[:200]!r}"
        )
        return Cue(before_ns, before_ns, said, wrong)
    start, end = _nanoseconds(*match.groups()[:5]), _nanoseconds(*match.groups()[5:])
    if end < start:
        wrong = DecodeError("decode_error", f"{where}: the cue ends before it starts; text: {said[:200]!r}")
        return Cue(start, start, said, wrong)
    return Cue(start, end, said)


def _nanoseconds(sign: str, hours: str | None, minutes: str, seconds: str, part: str | None) -> int:
    negative = bool(sign) or minutes.startswith("-")
    whole = (int(hours or 0) * 60 + abs(int(minutes))) * 60 + int(seconds)
    time = whole * 10**9 + int((part or "").ljust(9, "0"))
    return -time if negative else time


def events(found: list[Cue]) -> Iterator[Events]:
    """The cues as intervals, in one chunk; `index` counts them as they stand in the list."""
    starts, ends = (np.array([cue[part] for cue in found], np.int64) for part in (0, 1))
    yield Events(starts, ends, np.arange(len(found), dtype=np.int64))
