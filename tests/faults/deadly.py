"""A decoder, or a model, that really dies: every Python that finds the written `sitecustomize.py` ends at one value.

The value is a good sound of the corpus, so that the store of an undisturbed run says what all others must come out as.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from featurestore.store import FeatureStore

__all__ = ["HANG", "OUT_OF_MEMORY", "SEGFAULT", "deadly_folder", "on_path", "set_deadly", "sound_of"]

SEGFAULT = "ctypes.string_at(0)"
OUT_OF_MEMORY = "held = [bytearray(1 << 24) for _ in iter(int, 1)]"
HANG = "time.sleep(3600)"

_SITECUSTOMIZE = """
import ctypes, hashlib, os, resource, time
from featurestore import media

decode_audio = media.decode_audio

def deadly(raw, *args, **kwargs):
    if hashlib.sha256(raw).hexdigest() in {sha256s!r}:
        open({struck!r}, "a").write(f"{{os.getpid()}}\\n")
        {deed}
    return decode_audio(raw, *args, **kwargs)

media.decode_audio = deadly
{prepare}
"""

_FORWARD = """
import ctypes, hashlib, os, resource, time
from featurestore.encoders import log_mel

encode = log_mel.Encoder.encode

def deadly(self, values):
    if any(hashlib.sha256(value.tobytes()).hexdigest() in {sha256s!r} for value in values):
        open({struck!r}, "a").write(f"{{os.getpid()}} {{len(values)}}\\n")
        {deed}
    return encode(self, values)

log_mel.Encoder.encode = deadly
{prepare}
"""


def sound_of(store: FeatureStore) -> tuple[str, str, bytes]:
    """(Id, shard, bytes) of a sound in the middle of the corpus."""
    corpus = store.corpus("planted")
    present = store.view("loud").to_arrow(["present"])
    rows = [row for row, held in enumerate(present["present"].to_pylist()) if held]
    sample_id = store.view("loud").to_arrow()["id"][rows[len(rows) // 2]].as_py()
    shard, row = corpus.locate(sample_id)
    raw = corpus.value(shard, row, "sound")
    assert raw is not None
    return sample_id, shard, raw


def deadly_folder(
    folder: Path, raw: bytes | Sequence[bytes], deed: str, prepare: str = "", forward: bool = False
) -> Path:
    """Writes what goes onto PYTHONPATH; `struck` beside it has a line for each process that came to a value.

    With `forward` it is log-mel's model that dies, and `raw` is the decoded value's bytes.
    """
    folder.mkdir()
    sha256s = [hashlib.sha256(each).hexdigest() for each in ([raw] if isinstance(raw, bytes) else raw)]
    text = (_FORWARD if forward else _SITECUSTOMIZE).format(
        sha256s=sha256s, struck=str(folder / "struck"), deed=deed, prepare=prepare
    )
    (folder / "sitecustomize.py").write_text(text)
    return folder


def on_path(folder: Path) -> dict[str, str]:
    """The environment that has a process find it first, and what it found before behind it."""
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


def set_deadly(patch: pytest.MonkeyPatch, folder: Path, raw: bytes, deed: str, forward: bool = False) -> Path:
    """The same for the processes that are started from here; this one is left as it is."""
    made = deadly_folder(folder, raw, deed, forward=forward)
    patch.setenv("PYTHONPATH", str(made), prepend=os.pathsep)
    return made
