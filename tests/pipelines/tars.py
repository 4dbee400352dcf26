"""Tars for the tests of the webdataset source: whole ones, single headers, and what comes of them."""

import io
import tarfile
from pathlib import Path
from typing import Any

from featurestore.errors import DecodeError
from pipelines.sources import SampleRef, open_source
from pipelines.sources.webdataset import WebDataset

__all__ = ["expected", "header", "pairs", "signed", "source_of", "tar_of", "values_of", "written"]

FIELDS = {"image": ("image", ["jpg", "png"]), "caption": ("text", "txt")}
Members = list[tuple[str, bytes]]
Values = dict[str, dict[str, bytes | str | None]]


def tar_of(contents: Members, kind: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar as Python writes it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        for name, raw in contents:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return out.getvalue()


def header(name: str, size: int = 0, **more: Any) -> bytes:
    """One header alone."""
    info = tarfile.TarInfo(name)
    info.size = size
    for key, value in more.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def signed(block: bytes) -> bytes:
    """A header with the checksum that it should have."""
    blank = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(blank) + block[156:]


def source_of(
    *paths: Path | str, columns: dict[str, str] | None = None, adopt: bool = False, **fields: Any
) -> WebDataset:
    chosen = {
        name: {"modality": modality, "from": given, "read": None}
        for name, (modality, given) in (fields or FIELDS).items()
    }
    source = open_source(
        {
            "source": {"type": "webdataset", "path": [str(path) for path in paths], "adopt": adopt},
            "columns": {"id": "id", "group": None} | (columns or {}),
            "fields": chosen,
        }
    )
    assert isinstance(source, WebDataset)
    return source


def values_of(source: WebDataset, references: list[SampleRef] | None = None) -> Values:
    """Id -> field -> the bytes, the reason of a rejection, or None."""
    found: Values = {}
    for sample in source.samples(list(source.references()) if references is None else references):
        assert sample.id not in found
        found[sample.id] = {}
        for field, value in sample.values.items():
            try:
                found[sample.id][field] = None if value is None else value.fetch()
            except DecodeError as error:
                found[sample.id][field] = error.reason
    return found


def written(folder: Path, content: bytes, name: str = "000.tar") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def pairs(count: int, size: int = 700) -> Members:
    """Members of `count` samples, a picture and a caption each."""
    contents = []
    for number in range(count):
        contents += [(f"{number:04}.jpg", bytes([number % 251 + 1]) * size), (f"{number:04}.txt", b"text %d" % number)]
    return contents


def expected(count: int, size: int = 700) -> Values:
    return {
        f"{number:04}": {"image": bytes([number % 251 + 1]) * size, "caption": b"text %d" % number}
        for number in range(count)
    }
