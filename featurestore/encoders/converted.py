"""Weights in another dtype than their checkpoint's, converted once on a machine.

Safetensors of the dtype that a model computes in are mapped into memory, and the processes of a machine share them. Of any
other dtype each would hold a copy of its own: so the model is saved again in that dtype, in the user's cache folder, and every
process maps that. Its numbers are those of a model that was converted as it was loaded.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from featurestore.encoders import find

__all__ = ["Copy", "cache_folder", "differs", "folder_of_copy"]

_HEADER_BYTES = 8
_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class Copy(NamedTuple):
    """A model to be converted: its encoder, the class of transformers that loads it, and which weights may be missing."""

    key: str
    options: dict[str, Any]
    auto: str
    unused: Sequence[str]


def cache_folder(what: str) -> Path:
    """The user's folder for what can be made or fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "braid" / what


def differs(folder: Path, dtype: str) -> bool:
    """Whether any weights of a checkpoint are floats of another dtype."""
    found = {name for path in folder.glob("*.safetensors") for name in _dtypes(path)}
    return bool(found & {*_NAMES.values()} - {_NAMES[dtype]})


def _dtypes(path: Path) -> set[str]:
    """From the header of a file: its length, and JSON. Nothing where it is damaged, which is told by who loads it."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(_HEADER_BYTES), "little")
        try:
            header = json.loads(file.read(min(size, path.stat().st_size)))
            return {each["dtype"] for name, each in header.items() if name != "__metadata__"}
        except (ValueError, LookupError, TypeError, AttributeError):
            return set()


def folder_of_copy(wanted: Copy, told: Mapping[str, Any]) -> Path | None:
    """The folder of a model in its dtype, converted where it is not there yet; None where that fails.

    It is done in a process of its own, because what one converts with would stay with it.

    Args:
        wanted: the model.
        told: JSON values that say which one it is: another has another folder.
    """
    name = hashlib.sha256(json.dumps([told, wanted.auto], sort_keys=True).encode()).hexdigest()[:32]
    cache = cache_folder("converted")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f"{name}.lock").open("w") as lock:
            # One process converts, the others wait for it.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (cache / name).is_dir():
                _convert(wanted, cache / name)
    except (OSError, subprocess.CalledProcessError):
        return None
    return cache / name


def _convert(wanted: Copy, target: Path) -> None:
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}-"))
    command = [sys.executable, "-m", __spec__.name, json.dumps(wanted), str(aside)]
    try:
        # What it has to say is said again by who loads the checkpoint as it is.
        subprocess.run(
            command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def main(wanted: str, folder: str) -> None:
    """Loads a model as its encoder does, its weights checked, and saves it into a folder."""
    key, options, auto, unused = Copy(*json.loads(wanted))
    encoder: Any = find(key, options)
    model = encoder.read(encoder.folder, auto, tuple(unused))
    model.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
