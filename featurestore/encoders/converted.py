"""Weights in another dtype than their checkpoint's, converted once on a machine.

Safetensors of the dtype that a model computes in are mapped into memory, and the processes of a machine share them. Of any
other dtype each would hold a copy of its own: so the model is saved again in that dtype, in the user's cache folder, and every
process maps that. Its numbers are those of a model that was converted as it was loaded.
"""

import fcntl
import gc
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from featurestore.encoders.runtime import giving_memory_back

__all__ = ["cache_folder", "differs", "folder_of_copy"]

_HEADER_BYTES = 8
_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


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


def folder_of_copy(told: Mapping[str, Any], save: Callable[[Path], None]) -> Path | None:
    """The folder of a model in its dtype, saved there where it was not yet; None where nothing can be written.

    Args:
        told: JSON values that say which model it is: another has another folder.
        save: loads it in that dtype, saves it into a folder and lets go of it.
    """
    name = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]
    cache = cache_folder("converted")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f"{name}.lock").open("w") as lock:
            # One process converts, the others wait for it.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (cache / name).is_dir():
                _place(save, cache / name)
    except OSError:
        return None
    return cache / name


def _place(save: Callable[[Path], None], target: Path) -> None:
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}-"))
    try:
        # Else what was converted would stay with this process.
        with giving_memory_back():
            save(aside)
            gc.collect()
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
