"""The spec: one YAML file that says what a store shall hold, validated whole before anything runs.

Relative paths in it, of the store and of the source, are relative to the working directory.
"""

import decimal
import math
import posixpath
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import fsspec
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from featurestore.addresses import HOW_ELSE, has_credentials
from featurestore.errors import NotFound, SpecError
from featurestore.storage import Storage
from featurestore.times import RESERVED
from jobs.spec_mistakes import TIMED, Mistake, document, of_credentials, of_references, report
from jobs.spec_shape import of_shape

__all__ = [
    "ClockSpec",
    "ColumnsSpec",
    "CorpusSpec",
    "FieldSpec",
    "IndexSpec",
    "Prices",
    "ResourcesSpec",
    "SourceSpec",
    "SpaceSpec",
    "Spec",
    "TrainingSetSpec",
    "ViewSpec",
    "WindowsSpec",
    "load",
    "parse",
]

MAX_BYTES = 1_000_000

# Names become folders, and field names become members of tars, which WebDataset lowercases.
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
# What a training set's columns and the rows of its fusion table are called, besides its views.
TRAINING_COLUMNS = {
    *("id", "group", "label", "split", "fold", "weight", "row_digest"),
    *("chance", "early", "late", "hybrid"),
}

Text = Annotated[str, StringConstraints(min_length=1)]


def _fraction(value: Any) -> Any:
    """`1%` and `0.01` are the same; a bare 1 could mean either 1 % or all, so it is refused."""
    number: Any = value
    if isinstance(value, str) and value.endswith("%"):
        try:
            number = float(value[:-1]) / 100
        except ValueError:
            number = math.nan
    elif isinstance(value, int | float) and value >= 1:
        number = math.nan
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= 1:
        raise ValueError("write a share of all values as a percentage from 0% to 100%, or as a number below 1")
    return float(number)


_POWERS = {"ns": 0, "us": 3, "ms": 6, "s": 9, "min": 9, "h": 9}
_SECONDS = {"min": 60, "h": 3600}


def _duration(value: Any) -> Any:
    """`20ms` in whole nanoseconds; a bare number could be of any unit, so it is refused."""
    match = (
        re.fullmatch(rf"(-?\d{{1,12}}(?:\.\d{{1,9}})?) ?({'|'.join(_POWERS)})", value)
        if isinstance(value, str)
        else None
    )
    if match is None:
        raise ValueError("write a number and its unit: ns, us, ms, s, min or h, like 20ms or 1.5s")
    number = decimal.Decimal(match[1]).scaleb(_POWERS[match[2]]) * _SECONDS.get(match[2], 1)
    if number != int(number) or abs(number) > _LONGEST_NS:
        raise ValueError("write whole nanoseconds, and at most 100 years")
    return int(number)


_LONGEST_NS = 100 * 366 * 86_400 * 10**9


def _ppm(value: Any) -> Any:
    match = re.fullmatch(r"(-?\d{1,5}(?:\.\d{1,6})?) ?ppm", value) if isinstance(value, str) else None
    if match is None or abs(float(match[1])) > 10_000:
        raise ValueError("write parts per million with their unit, from -10000ppm to 10000ppm, like 40ppm")
    return float(match[1])


def _from_field(value: Any) -> Any:
    match = re.fullmatch(r"from ([a-z0-9][a-z0-9_-]{0,63})", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError("write from and the name of a field, like: from video")
    return match[1]


def _version(value: Any) -> Any:
    if type(value) is not int or value != 1:
        raise ValueError("this Braid reads version 1; write version: 1")
    return value


class _Node(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _listed(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Texts = Annotated[tuple[Text, ...], BeforeValidator(_listed), Field(min_length=1)]
"""One text, or a list of them."""


def _one_or_more(value: Any) -> Any:
    texts = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("write a text, or a list of texts")
    return value if isinstance(value, str) else texts


OneOrMore = Annotated[Any, PlainValidator(_one_or_more)]
"""A text, which stays one, or a list of them."""


def _length(value: Any) -> Any:
    if (length := _duration(value)) < 1:
        raise ValueError("write a time above 0, like 20ms or 1.5s")
    return length


Duration = Annotated[int, BeforeValidator(_duration)]
"""In ns."""
Length = Annotated[int, BeforeValidator(_length)]


class WindowsSpec(_Node):
    """How recordings are cut: a window every so often of some length (default: as long as they are apart), or one per event.

    `per` names a field of text or of a sensor: a window at each cue or reading. Without a length it is the cue's own, from its
    start to its end; with one its anchor stands at the cue's start. A reading, which is a moment, needs one. `anchor` says
    where in a window its anchor is, the time that it is of and that values are near to.
    """

    every: Length | None = None
    length: Length | None = None
    per: Text | None = None
    anchor: Literal["begin", "centre", "end"] = "centre"

    @model_validator(mode="after")
    def _one_way(self) -> "WindowsSpec":
        if (self.every is None) == (self.per is None):
            raise ValueError(
                "write {every: 1s, length: 2s}, or {per: FIELD, length: 2s} for a window at each event of a field"
            )
        return self

    @model_serializer
    def _filled(self) -> dict[str, Any]:
        length = self.every if self.length is None else self.length
        written = {"every": self.every, "length": length, "per": self.per}
        # What is said of a corpus that is stored already stays as it was.
        return written if self.anchor == "centre" else written | {"anchor": self.anchor}


class ClockSpec(_Node):
    """A stream's clock: the recording's time is (stream's time + offset) × (1 + drift). `unit` is of a sensor's column."""

    unit: Literal["ns", "us", "ms", "s"] = "s"
    offset: Duration = 0
    drift: Annotated[float, BeforeValidator(_ppm)] = 0.0
    estimate: Annotated[Text | None, BeforeValidator(_from_field)] = None


class SourceSpec(_Node):
    """Where the samples come from: files, or folders, at one path or several, with patterns (`*`) and lists (`{00..99}`).

    A webdataset with `adopt` is indexed where it lies: each tar is a shard, its values stay in it. Files that rows name are
    read from the folder of the file that the rows are in, and from `root`: more folders, or beginnings of addresses.
    """

    type: Literal["manifest", "folder", "webdataset", "parquet", "streams"]
    path: Texts
    root: Texts | None = None
    adopt: bool = False
    windows: WindowsSpec | None = None


class ColumnsSpec(_Node):
    """Names of the source's columns that have a meaning to Braid; the others are kept as they are."""

    id: Text = "id"
    group: Text | None = None
    event_timestamp: Text | None = None
    available_timestamp: Text | None = None


class FieldSpec(_Node):
    """One field: its modality and where its values are in the source.

    `from` names a column of a manifest or a Parquet file; of a folder it is a pattern of paths, of a webdataset an
    extension, or a list of them. `read` says whether a column holds the value itself (`inline`) or its file's path (`file`);
    without it a manifest's texts are inline and its other values files, and a Parquet file's all inline. The others are of
    timed streams: `time` and `channels` are columns of a sensor's file.

    `policy` is how the value in a window is chosen. `nearest` and `previous`: what begins nearest to the anchor, or last before
    it; `linear`: between the readings before and after it; `window`: all that begins in the window; `overlap`: all cues that
    share a moment with it; of a sensor, each reading of which holds until the next (and no longer than `staleness`), the mean
    of those that hold in the window, each weighted by how long. `tolerance`: how far from the anchor it may be; of sound, how
    much later than the window it may begin. `staleness`: how long before the anchor. What is farther is missing, with the
    reason.
    """

    modality: Literal["text", "image", "audio", "video", "sensor"]
    from_: OneOrMore = Field(alias="from")
    read: Literal["inline", "file"] | None = None
    clock: ClockSpec | None = None
    policy: Literal["nearest", "previous", "linear", "window", "overlap"] | None = None
    tolerance: Length | None = None
    staleness: Length | None = None
    time: Text | None = None
    channels: Texts | None = None

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What is said of a corpus that is stored already stays as it was.
        written: dict[str, Any] = handler(self)
        return {key: value for key, value in written.items() if value is not None or key not in TIMED}


class CorpusSpec(_Node):
    """The corpus and how it is cut into shards; `failure_budget` is the share of values that may be rejected.

    With `media: reference` raw values stay in their files, below `store.media_root` (without it, the source's folder); so do
    those of adopted tars, without a word.
    """

    name: Name
    source: SourceSpec
    columns: ColumnsSpec = ColumnsSpec()
    fields: dict[Name, FieldSpec] = Field(min_length=1)

    @field_validator("fields")
    @classmethod
    def _field_names_are_free(cls, fields: dict[str, FieldSpec]) -> dict[str, FieldSpec]:
        if taken := sorted(fields.keys() & RESERVED):
            raise ValueError(f"a field named {taken[0]!r} would stand for Braid's own column; rename the field")
        return fields

    media: Literal["copy", "reference"] = "copy"
    shard_rows: int = Field(default=10_000, ge=1, le=1_000_000)
    shard_mb: int = Field(default=512, ge=1, le=1_000_000)
    failure_budget: Annotated[float, BeforeValidator(_fraction)] = 0.01

    @model_validator(mode="before")
    @classmethod
    def _adopted_stay(cls, given: Any) -> Any:
        source = given.get("source") if isinstance(given, dict) else None
        adopted = isinstance(source, dict) and source.get("adopt") is True
        return {"media": "reference"} | given if adopted else given


class ResourcesSpec(_Node):
    """What the machines that encode a view shall be, where the runner rents them: it changes no byte of what they make."""

    accelerator: Text | None = None
    min_ram: Text | None = None
    workers: int | None = Field(default=None, ge=1, le=4000)
    machine_type: Text | None = None
    image: Text | None = None

    @field_validator("accelerator", "machine_type")
    @classmethod
    def _one_word(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch("[a-z][a-z0-9-]*", value):
            raise ValueError("write the type's name alone, like nvidia-l4 or g2-standard-8; a worker has one GPU")
        return value

    @field_validator("min_ram")
    @classmethod
    def _size(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[1-9]\d*([MGT]i?B)", value):
            raise ValueError("write a whole number and its unit: MB, GB, TB, MiB, GiB or TiB, like 16GB")
        return value

    @field_validator("image")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(
            r"[\w.-]+(:\d+)?(/[\w.-]+)+(:[\w.-]+)?(@sha256:[0-9a-f]{64})?", value
        ):
            raise ValueError(
                "write the address of a container image, like europe-docker.pkg.dev/project/braid/worker-gpu:1"
            )
        return value


class ViewSpec(_Node):
    """A view: one encoder over one field, or over several that it reads at once."""

    field: Text | None = None
    fields: tuple[Text, ...] | None = Field(default=None, min_length=2, max_length=16)
    encoder: Text
    options: dict[Text, Any] = {}
    resources: ResourcesSpec = ResourcesSpec()

    @model_validator(mode="after")
    def _one_way(self) -> "ViewSpec":
        if (self.field is None) == (self.fields is None):
            raise ValueError("write field: NAME, or fields: [NAME, NAME] for an encoder that reads several at once")
        return self

    @property
    def reads(self) -> tuple[str, ...]:
        """The fields that it reads, in order."""
        return (self.field,) if self.field is not None else self.fields or ()


class SpaceSpec(_Node):
    """A joint space learned from the pairs of two views."""

    views: tuple[Text, ...] = Field(min_length=2, max_length=2)
    method: Literal["cca"]
    dim: int = Field(default=128, ge=1, le=65_536)


class IndexSpec(_Node):
    """An index over views of one space; `recall` is what it is tuned to, against exact search."""

    space: Text
    views: tuple[Text, ...] = Field(min_length=1)
    recall: float = Field(default=0.95, gt=0, le=1)


class TrainingSetSpec(_Node):
    """Aligned rows of views with the source's column `label`; `splits` are fractions of the samples.

    Samples of one group stand on one side, and those that have equal bytes in a field of `group_equal`.
    """

    views: tuple[Text, ...] = Field(min_length=1)
    label: Text
    group_equal: Annotated[tuple[Text, ...], BeforeValidator(_listed)] = ()
    splits: dict[Name, Annotated[float, Field(gt=0, le=1)]]
    seed: int = Field(default=0, ge=0, lt=2**32)

    @field_validator("views")
    @classmethod
    def _names_are_free(cls, views: tuple[str, ...]) -> tuple[str, ...]:
        if taken := sorted(set(views) & TRAINING_COLUMNS):
            raise ValueError(
                f"a view named {taken[0]!r} would stand for a training set's own column or row; rename the view"
            )
        return views

    @field_validator("splits")
    @classmethod
    def _sum_to_one(cls, splits: dict[str, float]) -> dict[str, float]:
        if not math.isclose(total := math.fsum(splits.values()), 1, abs_tol=1e-6):
            raise ValueError(f"the fractions sum to {total:.6g}; they must sum to 1")
        if "train" not in splits:
            raise ValueError(
                f"no split is named 'train', from which the heads are fitted; there are: {', '.join(splits)}"
            )
        return splits


Price = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
Prices = dict[Name, Price]
"""What an hour costs, of a core under `cpu`, of a GPU under its type's name: in whatever money, which is that of all prices."""


class Spec(_Node):
    """What a store shall hold. Its sections are DESIGN.md's words; `prices` change nothing of it."""

    version: Annotated[int, BeforeValidator(_version)] = Field(examples=[1])
    store: Storage
    corpus: CorpusSpec
    views: dict[Name, ViewSpec] = {}
    spaces: dict[Name, SpaceSpec] = {}
    indexes: dict[Name, IndexSpec] = {}
    training_sets: dict[Name, TrainingSetSpec] = {}
    prices: Prices = {}

    def view(self, name: str) -> ViewSpec:
        """Give the view of this name. Raises NotFound with the names that there are."""
        if name not in self.views:
            raise NotFound(f"the spec has no view {name!r}; it has: {', '.join(self.views) or 'none'}")
        return self.views[name]


def load(path: str | Path) -> Spec:
    """Read and check a spec: a file's, or an object's at s3://… or gs://….

    Raises:
        SpecError: its text lists all mistakes, by line.
    """
    if has_credentials(str(path)):
        raise SpecError(f"{path}: the address holds a name or a password; {HOW_ELSE}")
    try:
        with fsspec.open(str(path), "rb") if "://" in str(path) else open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError, ImportError) as error:
        why = getattr(error, "strerror", None) or error
        raise SpecError(f"{path}: cannot read the spec: {why}; correct the path") from error
    try:
        return parse(raw.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise SpecError(report([Mistake(line, (), "not UTF-8; save the file as UTF-8")], str(path))) from error


def parse(text: str, where: str) -> Spec:
    """Check a spec's text; `where` names it in messages. Raises SpecError that lists all mistakes, by line."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise SpecError(f"{where}: larger than {MAX_BYTES:,} bytes, which no spec is; is it the right file?")
    tree = document(text)
    mistakes = list(tree.mistakes)
    spec = None
    if tree.readable:
        try:
            spec = Spec.model_validate(tree.value)
        except ValidationError as error:
            mistakes += of_shape(error, Spec, tree)
        else:
            try:
                spec = _rooted(spec)
            except ValueError as error:
                mistakes.append(tree.mistake(("corpus", "media"), f"'reference' is wrong: {error}"))
        mistakes += of_references(tree)
        told = list(of_credentials(tree))
        mistakes = [each for each in mistakes if each.place not in {every.place for every in told}] + told
    if mistakes or spec is None:
        raise SpecError(report(mistakes, where))
    return spec


def _rooted(spec: Spec) -> Spec:
    """With the source's folder as the root of values that stay where they are, where the spec names none."""
    if spec.corpus.media == "copy" or spec.store.media_root is not None:
        return spec
    folders = {_folder(path, whole=str(spec.corpus.source.type) == "folder") for path in spec.corpus.source.path}
    parts = [folder.rpartition("://") for folder in folders]
    kinds = {kind for kind, _, _ in parts}
    common = posixpath.commonpath([rest for _, _, rest in parts]) if len(kinds) == 1 else ""
    root = common and "".join([*parts[0][:2], common])
    try:
        store = Storage.model_validate(spec.store.model_dump(exclude_defaults=True) | {"media_root": root})
    except ValidationError:
        raise ValueError(
            f"no one folder or bucket holds {', '.join(spec.corpus.source.path)}; name the one that holds all values in "
            "store.media_root, or write media: copy"
        ) from None
    return spec.model_copy(update={"store": store})


def _folder(path: str, whole: bool) -> str:
    """The folder that a source's path lies in (a folder is it itself), up to the first pattern or list."""
    plain = re.split(r"[*?\[{]", path, maxsplit=1)[0]
    folder = plain if whole and plain == path else posixpath.dirname(plain)
    return folder.rstrip("/") if "://" in path else str(Path(folder.removeprefix("file:")).absolute())
