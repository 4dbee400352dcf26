"""Containers of videos by their first bytes: which one a file is, and how long it says that it is."""

__all__ = ["EXTENSIONS", "FORMATS", "sniff", "stated_bytes"]

EXTENSIONS = ("mp4", "mov", "mkv", "webm", "avi", "ts")

FORMATS = "avi,matroska,webm,mov,mp4,mpegts"
"""FFmpeg's names of them. Playlists, and lists of files, are none of them: they open other files."""

# Boxes that a QuickTime file without a brand begins with.
_OLD_MOV = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
# Brands of pictures and of sounds, in the same boxes.
_NO_VIDEO = (b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis", b"M4A ", b"M4B ")
_PACKETS = ((0, 188), (4, 192))
"""Where the first packet of a transport stream begins, and the next: on the air, and as cameras and discs store it."""


def sniff(raw: bytes) -> str | None:
    """One of EXTENSIONS; None where the first bytes are of none."""
    if raw[4:8] == b"ftyp":
        return None if raw[8:12] in _NO_VIDEO else "mov" if raw[8:12] == b"qt  " else "mp4"
    if raw[4:8] in _OLD_MOV:
        return "mov"
    if raw.startswith(b"\x1a\x45\xdf\xa3"):
        return "webm" if b"webm" in raw[:64] else "mkv"
    if raw[:4] == b"RIFF" and raw[8:12] == b"AVI ":
        return "avi"
    return "ts" if any(_has_packets(raw[start:], size) for start, size in _PACKETS) else None


def _has_packets(raw: bytes, size: int) -> bool:
    signs = raw[: 4 * size + 1 : size]
    return len(signs) > 1 and signs == b"G" * len(signs)


def stated_bytes(raw: bytes) -> int:
    """Where the file says that it ends, or its first part; 0 where it does not say, as a transport stream never does."""
    kind = sniff(raw)
    if kind == "avi":
        return 8 + int.from_bytes(raw[4:8], "little")
    if kind in ("mkv", "webm"):
        return _end_of_segment(raw)
    return _end_of_boxes(raw) if kind in ("mp4", "mov") else 0


def _end_of_boxes(raw: bytes) -> int:
    """Of an MP4's boxes (ISO 14496-12, section 4.2), the end of the one that is cut; what stands behind them is no box."""
    at = 0
    while at + 8 <= len(raw):
        size, name = int.from_bytes(raw[at : at + 4]), raw[at + 4 : at + 8]
        if size == 1:
            size = int.from_bytes(raw[at + 8 : at + 16])
        if size < 8:
            return 0
        at += size
        if at > len(raw):
            return at if name in (b"moov", b"moof", b"mdat") else 0
    return 0


def _end_of_segment(raw: bytes) -> int:
    """The end of a Matroska's one segment (RFC 8794, section 4): all ones is an unknown size, of a live recording."""
    size, begin = _ebml_size(raw, 4)
    segment = begin + size
    if raw[segment : segment + 4] != b"\x18\x53\x80\x67":
        return 0
    size, begin = _ebml_size(raw, segment + 4)
    return begin + size


def _ebml_size(raw: bytes, at: int) -> tuple[int, int]:
    """A size and where it ends; as many bytes follow its first as that has leading zeros."""
    width = 9 - raw[at : at + 1].ljust(1, b"\1")[0].bit_length()
    value = int.from_bytes(raw[at : at + width]) & ((1 << 7 * width) - 1)
    return (0 if value == (1 << 7 * width) - 1 else value), at + width
