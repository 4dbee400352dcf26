"""Where a store lives: one model, translated for both clients (fsspec for data, deltalake for the catalog).

s3fs's option names are silently ignored by deltalake, which then looks for other credentials, and deltalake
refuses plain http unless told. So nobody outside this module writes client options.
"""

import errno
import importlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self, cast

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from featurestore.addresses import redacted
from featurestore.errors import BraidError, InputError, MissingExtra, NotFound, StoreError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = ["Storage"]

SCRATCH = ".tmp"
# Characters that S3, GCS and the URL parsers of both clients take unescaped.
OBJECT_URI = re.compile(
    r"(?P<scheme>s3|gs)://(?P<bucket>[a-z0-9][a-z0-9._-]*)(?P<prefix>(/[A-Za-z0-9_=+-][A-Za-z0-9._=+-]*)*)"
)

# In a local path deltalake 1.6 turns these into another path, or panics.
FOREIGN_TO_DELTALAKE = re.compile(r"%[0-9A-Fa-f]{2}|[\[\]\\|^]")


class Storage(BaseModel):
    """The address of a store and how to reach it; no secrets: credentials come from the clients' own chain.

    Keys are relative, `/`-separated, and no part of one begins with a dot: those names are the store's own
    (scratch), and listings leave them out.

    Attributes:
        uri: a local folder (made absolute here), `s3://bucket/prefix` or `gs://bucket/prefix`.
        endpoint: `https://host[:port]` of an S3-compatible store; None is AWS.
        region: S3 region; None takes AWS_REGION, AWS_DEFAULT_REGION or the profile's.
        profile: name in ~/.aws/config; its keys go to both clients, also where the environment holds others.
        allow_http: needed for an `http://` endpoint.
        anonymous: send unsigned requests (public buckets).
        media_root: the folder, bucket or web folder below which lie the values that a corpus of `media: reference` refers to.
            Readers open nothing else outside the store; it is reached with the clients' own settings.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    uri: str
    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    allow_http: bool = False
    anonymous: bool = False
    media_root: str | None = None

    @field_validator("uri")
    @classmethod
    def _normal_uri(cls, uri: str) -> str:
        path = uri.removeprefix("file://")
        if "://" not in path:
            if not path or FOREIGN_TO_DELTALAKE.search(path) or not path.isprintable():
                raise ValueError(
                    f"{uri!r} is not a store's address; allowed: a folder whose path holds no control characters, "
                    "no brackets [ ], no \\ | ^ and no % with two hex digits"
                )
            # Absolute, because Beam's workers run in other folders.
            return os.path.abspath(os.path.expanduser(path))
        if not OBJECT_URI.fullmatch(path.rstrip("/")):
            raise ValueError(
                f"{redacted(uri)!r} is not a store's address; allowed: a folder, s3://bucket/prefix, gs://bucket/prefix "
                "of letters, digits and ._=+- (a bucket's letters are small, credentials belong in a profile)"
            )
        return path.rstrip("/")

    @field_validator("media_root")
    @classmethod
    def _normal_root(cls, root: str | None) -> str | None:
        if root is None:
            return None
        path = root.removeprefix("file://").removeprefix("local://")
        if "://" not in path and path and path.isprintable():
            return os.path.abspath(os.path.expanduser(path))
        if (
            not re.fullmatch(r"(s3|gs|https?)://[^\s/?#@]+(/[^\s?#]*)?", path)
            or ".." in path.split("/")
            or "::" in path
        ):
            raise ValueError(
                f"{redacted(root)!r} is no root of values; allowed: a folder, or one at s3://, gs://, http:// or https://"
            )
        return path.rstrip("/")

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        given = self.model_dump(exclude_defaults=True, exclude={"uri", "media_root"})
        allowed = {"s3": set(given), "gs": {"anonymous"}, "file": set()}[self.scheme]
        if foreign := sorted(set(given) - allowed):
            raise ValueError(f"{', '.join(foreign)}: not for {self.uri!r}; leave it out (S3 has these options)")
        if self.endpoint and not re.fullmatch(r"https?://[^\s/@?#]+/?", self.endpoint):
            raise ValueError(
                f"endpoint {redacted(self.endpoint)!r}: write http(s)://host[:port], no path, no credentials"
            )
        if self.endpoint and self.endpoint.startswith("http:") and not self.allow_http:
            raise ValueError(f"endpoint {self.endpoint!r} is not encrypted: use https, or set allow_http: true")
        if self.profile and self.anonymous:
            raise ValueError("profile and anonymous exclude each other: leave one out")
        return self

    @classmethod
    def of(cls, store: "str | os.PathLike[str] | Storage") -> "Storage":
        """Take an address or a Storage; InputError names what is wrong with it."""
        return store if isinstance(store, Storage) else cls._checked({"uri": os.fspath(store)})

    def to_json(self) -> str:
        """A text for Beam's options and workers; the same Storage, the same text."""
        return self.model_dump_json(exclude_defaults=True)

    @classmethod
    def from_json(cls, text: str) -> "Storage":
        """Read what `to_json` wrote."""
        try:
            return cls._checked(json.loads(text))
        except ValueError as error:
            raise InputError(f"not a Storage in JSON: {redacted(text)[:200]!r} ({error})") from error

    @classmethod
    def _checked(cls, options: object) -> "Storage":
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            mistakes = [".".join(map(str, e["loc"])) + ": " + e["msg"] for e in error.errors()]
            raise InputError("store: " + "; ".join(m.removeprefix(": ") for m in mistakes)) from error

    @property
    def scheme(self) -> str:
        """`file`, `s3` or `gs`."""
        return self.uri.partition("://")[0] if "://" in self.uri else "file"

    @property
    def is_local(self) -> bool:
        """Whether the store is a folder of this machine."""
        return self.scheme == "file"

    @property
    def root(self) -> str:
        """The address without its protocol: what `fs` calls the store's folder."""
        return self.uri.partition("://")[2] if "://" in self.uri else self.uri

    @property
    def fs(self) -> "AbstractFileSystem":
        """The fsspec client: one per process (s3fs does not survive a fork)."""
        return _open_filesystem(self, os.getpid())

    def delta_uri(self, sub: str) -> tuple[str, dict[str, str]]:
        """Give `(uri, storage_options)` of a table in the store's folder `sub`, for deltalake.

        With a profile the options hold its keys: do not print or keep them.
        """
        uri = f"{self.uri}/{_checked_key(sub)}"
        if self.scheme == "s3":
            return uri, self._s3_delta_options()
        if self.scheme == "gs":
            return uri, {"GOOGLE_SKIP_SIGNATURE": "true"} if self.anonymous else {}
        return uri, {}

    def put(self, local_path: Path, key: str) -> None:
        """Place a local file under `key`, whole or not at all.

        On a local store a file of `scratch()` is moved, any other is copied; on an object store it is one
        upload. Names end in their content's hash, so a retry that replaces a same-named object is harmless.
        """
        target = self._path(key)
        with self._errors("write", key):
            if not local_path.is_file():
                raise InputError(f"{local_path}: not a file, cannot be put as {key!r}")
            if not self.is_local:
                self.fs.put_file(str(local_path), target)
            elif self._scratch_base in local_path.absolute().parents:
                _place(local_path, Path(target))
            else:
                with self.scratch() as folder:
                    _place(Path(shutil.copyfile(local_path, folder / "copy")), Path(target))

    def touch(self, key: str) -> None:
        """Make an empty object. On a local disk it outlives its process, not a power cut: nothing waits for the disk."""
        target = self._path(key)
        with self._errors("write", key):
            if self.is_local:
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                Path(target).touch()
            else:
                self.fs.pipe_file(target, b"")

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Give an empty local folder, removed at the end: where an artefact is written before it is `put`.

        On a local store it is inside the store, so that placing is a rename on one filesystem.
        """
        try:
            self._scratch_base.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise StoreError(
                f"{self.uri}: a part of this path is a file; a store is a folder: correct store.uri"
            ) from error
        except OSError as error:
            raise StoreError(
                f"{self.uri}: cannot make this folder ({error.strerror}); check the path and its rights"
            ) from error
        with self._errors("write", SCRATCH):
            owner = f"braid-{socket.gethostname()}-{os.getpid()}-"
            folder = Path(tempfile.mkdtemp(prefix=owner, dir=self._scratch_base))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def clean_scratch(self) -> int:
        """Remove scratch folders whose process (of this host) no longer lives; give their number."""
        prefix = f"braid-{socket.gethostname()}-"
        removed = 0
        for folder in self._scratch_base.glob("braid-*"):
            pid = folder.name.removeprefix(prefix).partition("-")[0]
            if folder.name.startswith(prefix) and pid.isdecimal() and not _is_alive(int(pid)):
                shutil.rmtree(folder, ignore_errors=True)
                removed += not folder.exists()
        return removed

    def open(self, key: str) -> IO[bytes]:
        """Open an object for reading, seekable. Raises NotFound."""
        with self._errors("open", key):
            return cast(IO[bytes], self.fs.open(self._path(key), "rb"))

    def read(self, key: str, offset: int | None = None, length: int | None = None) -> bytes:
        """Read an object, or exactly `length` bytes of it from `offset`.

        Raises:
            NotFound: there is no such object.
            StoreError: the object ends before `offset + length`.
        """
        start = offset or 0
        if start < 0 or (length is not None and length < 0):
            raise InputError(f"read({key!r}, {offset}, {length}): offset and length are not negative")
        with self._errors("read", key):
            if length == 0:
                return b""
            if self.is_local:
                with open(self._path(key), "rb") as file:
                    file.seek(start)
                    data = file.read() if length is None else file.read(length)
            else:
                end = None if length is None else start + length
                data = cast(bytes, self.fs.cat_file(self._path(key), start=start or None, end=end))
        if length is not None and len(data) != length:
            raise StoreError(
                f"{self.uri}/{key}: {len(data)} bytes at {start}, {length} expected: the file is cut short; "
                f"see: braid verify {self.uri}"
            )
        return data

    def local_path(self, key: str) -> Path | None:
        """The object's path on this machine (whether or not it exists); None on an object store."""
        return Path(self._path(key)) if self.is_local else None

    def size(self, key: str) -> int:
        """Bytes of the object. Raises NotFound."""
        with self._errors("look up", key):
            info = self.fs.info(self._path(key))
            if info["type"] != "file":
                raise FileNotFoundError(f"{key} is a folder")
            return int(info["size"])

    def exists(self, key: str) -> bool:
        """Whether there is an object `key` (a folder is none)."""
        try:
            self.size(key)
        except NotFound:
            return False
        return True

    def list(self, prefix: str = "") -> dict[str, int]:
        """List the folder `prefix` and all below it, in one listing: key -> bytes, sorted by key.

        A folder that is missing is empty; a missing bucket raises StoreError.
        """
        folder = self._path(prefix) if prefix else self.root
        with self._errors("list", prefix):
            found = _walk(folder) if self.is_local else self._find(folder)
        keys = {path.removeprefix(self.root).lstrip("/"): size for path, size in found.items()}
        hidden = re.compile(r"(^|/)\.")
        return {key: keys[key] for key in sorted(keys) if key != prefix and not hidden.search(key)}

    def delete(self, key: str) -> None:
        """Remove an object; one that is gone already is no error, so that a killed vacuum can run again."""
        with self._errors("delete", key):
            try:
                self.fs.rm_file(self._path(key))
            except FileNotFoundError as error:
                self._refuse_missing_bucket(error)

    def _path(self, key: str) -> str:
        return f"{self.root.rstrip('/')}/{_checked_key(key)}"

    @property
    def _scratch_base(self) -> Path:
        return Path(self.root, SCRATCH) if self.is_local else Path(tempfile.gettempdir())

    def _find(self, folder: str) -> dict[str, int]:
        try:
            found = self.fs.find(folder, detail=True)
        except FileNotFoundError as error:
            self._refuse_missing_bucket(error)
            return {}
        return {name: int(info["size"]) for name, info in found.items() if info["type"] == "file" and name[-1] != "/"}

    @contextmanager
    def _errors(self, action: str, key: str) -> Iterator[None]:
        """Turn what the clients raise into NotFound and StoreError."""
        where = f"{self.uri}/{key}"
        try:
            yield
        except BraidError:
            raise
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            self._refuse_missing_bucket(error)
            raise NotFound(f"{where}: no such object ({action}); see what there is with: braid status") from error
        except PermissionError as error:
            raise StoreError(
                f"{where}: not allowed to {action} ({error}); check the rights and store.profile"
            ) from error
        except Exception as error:
            # An object store's client raises classes of five packages, none of them ours to import here.
            if self.is_local and not isinstance(error, OSError):
                raise
            raise StoreError(f"{where}: cannot {action}: {self.client_says(error)}") from error

    def client_says(self, error: Exception) -> str:
        """What a client of the store raised, on one line, and the mend. Clients draw trees over several lines."""
        text = re.sub(r"\x1b\[[\d;]*m|↳", "", f"{type(error).__name__}: {error}")
        line = ": ".join(part.strip().rstrip(":") for part in text.splitlines() if part.strip())
        if self.is_local:
            return f"{line}; check the path, its rights and the disk"
        if not re.search(r"(No|Partial)Credentials|(locate|loading|no) credentials|token request", line):
            return f"{line}; check the store's uri, endpoint, region and credentials, and try again"
        keys = {"s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", "gs": "GOOGLE_APPLICATION_CREDENTIALS"}[
            self.scheme
        ]
        also = {
            "s3": "name a profile in store.profile, ",
            "gs": "sign in with `gcloud auth application-default login`, ",
        }[self.scheme]
        return (
            f"no credentials for it are found here; {also}set {keys} in the environment, or write `anonymous: true` "
            "under store for what is open to all"
        )

    def _refuse_missing_bucket(self, error: Exception) -> None:
        cause: Any = error.__cause__
        code = getattr(cause, "response", {}).get("Error", {}).get("Code") if cause is not None else None
        if code == "NoSuchBucket" or (not self.is_local and "bucket does not exist" in str(error)):
            bucket = self.root.partition("/")[0]
            raise StoreError(f"{self.uri}: there is no bucket {bucket!r}; make it or correct store.uri") from error

    def _client_options(self) -> dict[str, Any]:
        if self.is_local:
            return {}
        # Listings are not cached: other processes write to the same store.
        options: dict[str, Any] = {"use_listings_cache": False}
        if self.scheme == "gs":
            return options | ({"token": "anon"} if self.anonymous else {})
        if region := self._region():
            options["client_kwargs"] = {"region_name": region}
        options |= {"anon": self.anonymous, "endpoint_url": self.endpoint, "profile": self.profile}
        return {name: value for name, value in options.items() if value is not None}

    def _s3_delta_options(self) -> dict[str, str]:
        options = {"AWS_REGION": self._region()}
        if self.endpoint:
            options |= {"AWS_ENDPOINT_URL": self.endpoint, "AWS_ALLOW_HTTP": str(self.allow_http).lower()}
        if self.anonymous:
            options["AWS_SKIP_SIGNATURE"] = "true"
        if self.profile:
            options |= _profile_keys(self.profile)
        return {name: value for name, value in options.items() if value}

    def _region(self) -> str | None:
        # botocore does not read AWS_REGION, deltalake reads both: give both clients the same one.
        return self.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")


def _checked_key(key: str) -> str:
    bad = [part for part in key.split("/") if not part or part.startswith(".") or not part.isprintable()]
    if bad or "?" in key:
        raise InputError(
            f"{key!r} is not a key of a store; allowed: relative, parts separated by one '/', none empty or "
            "beginning with a dot (so no '..'), no '?' and no control characters"
        )
    return key


def _place(source: Path, target: Path) -> None:
    """Rename `source` to `target` with its bytes and then its name safely on disk: what names it comes after."""
    _sync(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        raise StoreError(
            f"{target.parent} is on another disk than the store's {SCRATCH}: keep a store on one"
        ) from error
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _walk(folder: str) -> dict[str, int]:
    """Sizes of all files below `folder`.

    Not fsspec's `find`: a file that another process renames meanwhile makes it drop the whole folder unseen.
    """
    found: dict[str, int] = {}
    folders = [folder]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        folders.append(entry.path)
                    else:
                        found |= _size_of(entry)
        except (FileNotFoundError, NotADirectoryError):
            continue
    return found


def _size_of(entry: os.DirEntry[str]) -> dict[str, int]:
    try:
        return {entry.path: entry.stat().st_size}
    except FileNotFoundError:
        return {}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@lru_cache(maxsize=16)
def _open_filesystem(storage: Storage, pid: int) -> "AbstractFileSystem":
    import fsspec

    package = {"s3": "s3fs", "gs": "gcsfs"}.get(storage.scheme, "fsspec")
    try:
        importlib.import_module(package)
    except ImportError as error:
        extra = "braid[read]" if package == "s3fs" else package
        raise MissingExtra(f"{storage.uri} needs {package}, not installed here: pip install '{extra}'") from error
    return fsspec.filesystem(storage.scheme, **storage._client_options())


def _profile_keys(profile: str) -> dict[str, str]:
    """The profile's keys, resolved by botocore: deltalake would prefer keys of the environment."""
    try:
        from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]
        from botocore.session import Session  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtra("a store's profile needs s3fs, not installed here: pip install 'braid[read]'") from error
    try:
        session = Session(profile=profile)
        found = session.get_credentials()
        region = session.get_config_variable("region")
    except BotoCoreError as error:
        raise StoreError(f"store.profile {profile!r}: {error}; see ~/.aws/config") from error
    if found is None:
        raise StoreError(f"store.profile {profile!r} gives no credentials; see ~/.aws/config")
    keys = found.get_frozen_credentials()
    options = {"AWS_ACCESS_KEY_ID": keys.access_key, "AWS_SECRET_ACCESS_KEY": keys.secret_key}
    return options | {
        name: value for name, value in (("AWS_SESSION_TOKEN", keys.token), ("AWS_REGION", region)) if value
    }
