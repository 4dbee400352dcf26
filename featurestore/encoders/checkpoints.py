"""Checkpoints as transformers writes them: where they lie, what of them is read, and how a model comes out of one.

An address is a local folder, `s3://…` or `gs://…`, or a hub id (`name` or `owner/name`), in this order. What is not local is
fetched once into the user's cache folder, under a name that changes with its files, and read from there.

Weights are safetensors alone: a pickle could run code. No code of a checkpoint is run either (`trust_remote_code` stays off).
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from featurestore.addresses import HOW_ELSE, has_credentials
from featurestore.encoders import BaseEncoder, EncoderOptions, converted
from featurestore.encoders.runtime import device, placed
from featurestore.errors import InputError, MissingExtra

__all__ = ["CheckpointEncoder", "CheckpointOptions", "file_of", "folder_of", "silent", "tokenizer_of"]

READ = (".json", ".txt", ".model", ".safetensors")
"""Endings of the files of a checkpoint that are read, in its folder itself."""

MAX_BYTES = 200 << 30
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class CheckpointOptions(EncoderOptions):
    """Options of every encoder whose weights are a checkpoint."""

    checkpoint: str = Field(min_length=1, description="a folder, s3://…, gs://…, or a hub id, with safetensors")
    revision: str | None = Field(default=None, min_length=1, description="branch, tag or commit of a hub id")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="what the model computes in; vectors are float32"
    )
    compiled: bool = Field(default=False, description="torch.compile the model; needs a C++ compiler")


class CheckpointEncoder(BaseEncoder):
    """What encoders of checkpoints share. `fingerprint()` is of the checkpoint's bytes, wherever it lies."""

    libraries: ClassVar[tuple[str, ...]] = ("safetensors", "tokenizers", "torch", "transformers")
    licence = "the checkpoint's"
    options: CheckpointOptions

    def __init__(self, options: CheckpointOptions) -> None:
        super().__init__(options)
        self.folder = folder_of(options.checkpoint, options.revision)
        self.config = _config(self.folder)
        self.source = str(self.config.get("_name_or_path") or "a checkpoint")

    def weights(self) -> dict[str, Path]:
        """Return every file of the checkpoint that is read."""
        return {path.name: path for path in sorted(self.folder.iterdir()) if path.suffix in READ}

    def address(self) -> dict[str, Any]:
        """Say where the checkpoint is."""
        return {"checkpoint": self.options.checkpoint, "revision": self.options.revision}

    def in_config(self, *names: str) -> int:
        """Return the first of some sizes that the checkpoint's configuration states. InputError where it has none."""
        for name in names:
            found = self.config
            for part in name.split("."):
                found = found.get(part) if isinstance(found, dict) else None  # type: ignore[assignment]
            if isinstance(found, list) and found:
                found = found[-1]
            if isinstance(found, int) and found > 0:
                return found
        raise self.unfit(f"its config.json states none of {', '.join(names)}")

    def unfit(self, why: str) -> InputError:
        """The error that says why a checkpoint is none of this encoder's."""
        return InputError(f"checkpoint {self.options.checkpoint!r} is none for encoder {self.key!r}: {why}")

    def model(
        self,
        auto: str,
        unused: Iterable[str] = (),
        *,
        part: Callable[[Any], Any] = lambda model: model,
        method: str = "forward",
        channels_last: bool = False,
    ) -> Any:
        """Load the model with a class of transformers: in `dtype`, on this machine's device, ready to run.

        Args:
            auto: name of the class, e.g. `AutoModel`.
            unused: beginnings of names of weights that the encoder does not compute with, which may be missing.
            part: takes what is kept of it.
            method: what the encoder calls, which is compiled where option `compiled` says so.
            channels_last: the layout that convolutions run best in.

        Raises:
            InputError: a weight is missing, is of another shape, or is one more than the architecture has.
        """
        folder, dtype, unused = self.folder, self.options.dtype, tuple(unused)
        # On a GPU each process copies its weights anyway.
        if device() == "cpu" and converted.differs(folder, dtype):
            card = self.card()
            told = {"files": card["weights"], "libraries": card["libraries"], "class": auto, "dtype": dtype}
            folder = converted.folder_of_copy(told, partial(self._save, auto, unused)) or folder
        loaded = part(self._read(folder, auto, unused))
        return placed(loaded, channels_last=channels_last, compiled=(method,) * self.options.compiled)

    def _save(self, auto: str, unused: tuple[str, ...], folder: Path) -> None:
        loaded = self._read(self.folder, auto, unused)
        with silent():
            loaded.save_pretrained(folder)

    def _read(self, folder: Path, auto: str, unused: tuple[str, ...]) -> Any:
        import torch
        import transformers
        from safetensors import SafetensorError

        with silent():
            try:
                loaded, told = getattr(transformers, auto).from_pretrained(
                    folder,
                    local_files_only=True,
                    use_safetensors=True,
                    dtype=getattr(torch, self.options.dtype),
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # told below, by name
                    trust_remote_code=False,
                )
            except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
                raise self.unfit(" ".join(str(error).split())[:500]) from error
        self._check(loaded, told, unused)
        return loaded

    def _check(self, loaded: Any, told: dict[str, Any], unused: tuple[str, ...]) -> None:
        missing = sorted(name for name in told["missing_keys"] if not name.startswith(unused or ("\0",)))
        # Heads that a base model has no use for are no mistake; one more of its own layers is.
        own = {name for name, _ in loaded.named_children()}
        prefix = f"{loaded.base_model_prefix}."
        more = sorted(name for name in told["unexpected_keys"] if name.removeprefix(prefix).partition(".")[0] in own)
        shapes = sorted(str(each[0]) if isinstance(each, tuple) else str(each) for each in told["mismatched_keys"])
        for names, what in (
            (missing, "lacks"),
            (more, "has beyond its architecture"),
            (shapes, "has in another shape than its config.json says"),
        ):
            if names:
                listed = f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
                raise self.unfit(f"it {what} {len(names)} weights: {listed}; take one that is whole")


@contextmanager
def silent() -> Iterator[None]:
    """Transformers without bars and warnings, which would break through a job's own."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def tokenizer_of(owner: CheckpointEncoder) -> Any:
    """The tokenizer of an encoder's checkpoint, padding on the right. InputError where it cannot be read."""
    from transformers import AutoTokenizer

    with silent():
        try:
            tokenizer = AutoTokenizer.from_pretrained(owner.folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise owner.unfit(f"its tokenizer cannot be read: {' '.join(str(error).split())[:300]}") from error
    # On the left it would move the positions of a model that counts them from the first place.
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(
            f"checkpoint {folder}: its config.json cannot be read: {why}; name a checkpoint of transformers"
        ) from None
    if not isinstance(config, dict):
        raise InputError(f"checkpoint {folder}: its config.json is no object; name a checkpoint of transformers")
    return config


def folder_of(address: str, revision: str | None = None) -> Path:
    """The local folder of a checkpoint, fetched where it is elsewhere.

    Raises:
        InputError: there is none, or it has no safetensors.
    """
    if "://" in address:
        found = _fetched(address)
    elif (local := Path(address).expanduser()).is_dir():
        found = local
    elif _HUB_ID.fullmatch(address):
        found = _of_hub(address, revision)
    else:
        raise InputError(
            f"checkpoint {address!r}: no such folder; name one, s3://…, gs://…, or a hub id like owner/name"
        )
    if not any(path.suffix == ".safetensors" for path in found.iterdir()):
        pickled = sorted(path.name for path in found.iterdir() if path.suffix in _PICKLES)
        has = f"only {pickled[0]}, which is a pickle and is never loaded" if pickled else "no weights"
        raise InputError(
            f"checkpoint {address!r} has {has}; save it with safetensors: "
            "AutoModel.from_pretrained(…).save_pretrained(FOLDER)"
        )
    return found


@lru_cache(maxsize=16)
def _of_hub(address: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(address, revision=revision, allow_patterns=[f"*{ending}" for ending in READ]))
    except Exception as error:
        # A dozen classes, of the hub's client and of its HTTP library.
        raise InputError(
            f"checkpoint {address!r}: no folder here, and the hub does not give it: {' '.join(str(error).split())[:300]}; "
            "name a folder, s3://… or gs://…"
        ) from error


def file_of(address: str) -> Path:
    """A file that is here, or of an object store and fetched. InputError where there is none."""
    found = _fetched(address) / address.rpartition("/")[2] if "://" in address else Path(address).expanduser()
    if not found.is_file():
        raise InputError(f"{address!r}: no such file; name one that is here, or at s3://… or gs://…")
    return found


@lru_cache(maxsize=16)
def _fetched(address: str) -> Path:
    """A checkpoint or a file of an object store, in the cache folder under a digest of its address and of sizes and etags."""
    import fsspec

    if has_credentials(address):
        raise InputError(f"checkpoint {address}: the address holds a name or a password; {HOW_ELSE}")
    try:
        fs, root = fsspec.core.url_to_fs(address)
        fs.invalidate_cache()
        found = [each for each in fs.ls(root, detail=True) if each["type"] == "file"]
        listed = {each["name"].rpartition("/")[2]: each for each in found}
    except ImportError as error:
        raise MissingExtra(f"checkpoint {address} needs a package that is not installed here: {error}") from error
    except Exception as error:
        raise InputError(
            f"checkpoint {address} cannot be listed: {error}; correct the address or its rights"
        ) from error
    wanted = {name: each for name, each in sorted(listed.items()) if Path(name).suffix in READ or len(found) == 1}
    if (size := sum(int(each["size"] or 0) for each in wanted.values())) > MAX_BYTES:
        raise InputError(f"checkpoint {address} has {size} bytes; at most {MAX_BYTES} are fetched")
    state = [(name, each["size"], str(each.get("ETag") or each.get("etag"))) for name, each in wanted.items()]
    key = hashlib.sha256(json.dumps([address, state]).encode()).hexdigest()[:32]
    cache = converted.cache_folder("checkpoints")
    if not (cache / key).is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=cache, prefix=f"{key}-"))
        try:
            for name, each in wanted.items():
                fs.get_file(each["name"], str(aside / name))
            _into_place(aside, cache / key)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return cache / key


def _into_place(aside: Path, target: Path) -> None:
    """Renames a folder that is whole; another process may have been first, with the same files."""
    try:
        aside.rename(target)
    except OSError:
        if not target.is_dir():
            raise
