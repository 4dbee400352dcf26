"""`braid init`: looks at a folder or a file of samples and writes a spec for it, commented, to be edited.

At most `MAX_SEEN` files or rows are looked at; media are not decoded. The same corpus gives the same text.
"""

import csv
import io
import itertools
import json
import os
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from featurestore import media
from featurestore.errors import InputError
from jobs import guess_columns, guess_files, guesses
from jobs.guesses import Columns, Field
from jobs.init_spec import Found, spec_text
from jobs.report import counted
from pipelines.sources import files, folder
from pipelines.sources.manifest import Manifest
from pipelines.sources.rows import ROW

__all__ = ["look", "write"]

MAX_SEEN = 10_000
"""Files, rows or members of a tar."""

MAX_SEEN_BYTES = 64 << 20
"""Of a Parquet file."""

_PARQUET_BATCH = 64

MAX_JSON_BYTES = 64 << 10
"""Of a tar's `.json` member; a larger one is not read."""

MAX_JSONS = 1_000
"""So many members `.json` of a tar are read."""

KINDS = "a folder, .jsonl, .csv, .tsv, .parquet, .tar"


def write(path: str, output: Path | None) -> tuple[Path, Found]:
    """Writes a spec for what is at `path`; returns its path, `<corpus>.yaml` where `output` is None, and what was seen.

    Raises:
        InputError: nothing is at `path` that a spec could be guessed from, or the spec is there already: none is overwritten.
    """
    if output is not None:
        _refuse_existing(output)
    found = look(path)
    output = output or Path(f"{found.name}.yaml")
    _refuse_existing(output)
    text = spec_text(found, output)
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror}); name another with --output") from error
    return output, found


def _refuse_existing(output: Path) -> None:
    if output.exists():
        raise InputError(f"{output} is there already, and is not overwritten; name another with --output")


def look(path: str) -> Found:
    """What is at a path or an address. Raises InputError where it is nothing that a spec could be guessed from."""
    ending = guesses.extension(path.rstrip("/")).lower()
    is_folder = os.path.isdir(path) if "://" not in path else ending not in _OF_FILE
    if is_folder:
        return _of_folder(path.rstrip("/") or "/")
    if "://" not in path and not os.path.exists(path):
        raise InputError(f"{path} is not there; name one of: {KINDS}")
    if ending not in _OF_FILE:
        raise InputError(f"{path}: no kind of file that samples are read from; name one of: {KINDS}")
    return _OF_FILE[ending](path)


def _of_folder(path: str) -> Found:
    """Files that belong together by their names; or nothing but tars, or Parquet files."""
    listed = [file.path for file in itertools.islice(folder.listing(path), MAX_SEEN + 1)]
    seen, cut = listed[:MAX_SEEN], len(listed) > MAX_SEEN
    if not seen:
        raise InputError(f"{path} is a folder without files (hidden ones are left out)")
    fields = guess_files.fields_of_files(seen)
    endings = Counter(guesses.extension(each).lower() for each in seen)
    for ending in ("tar", "parquet"):
        if endings[ending] * 2 > len(seen) and not fields:
            inside = "**/" if any("/" in each for each in seen if each.endswith(ending)) else ""
            own = sorted(each for each in seen if guesses.extension(each).lower() == ending)
            looked_at = sorted({own[0], own[len(own) // 2], own[-1]}) if ending == "tar" else own[:1]
            paths = [f"{path}/{each}" for each in looked_at]
            found = _of_tars(paths) if ending == "tar" else _OF_FILE[ending](paths[0])
            note = f"Of {counted(len(own), 'file')} that end in .{ending} looked at: {', '.join(looked_at)}"
            return found._replace(path=f"{path}/{inside}*.{ending}", name=_name(path), seen=[note, *found.seen])
    if not fields:
        told = ", ".join(f"{count} {_dotted(ending)}" for ending, count in endings.most_common(5))
        raise InputError(
            f"{path}: none of its files is a picture, a video, a sound or a text that is decoded ({told}); decoded are: "
            f"{', '.join(ending for its in guesses.MODALITIES.values() for ending in its)}"
        )
    samples = set().union(*(field.samples for field in fields))
    matcher = folder.Patterns({field.name: field.given for field in fields})
    left = [each for each in seen if matcher.match(each) is None]
    notes = [f"{'The first ' if cut else ''}{counted(len(seen), 'file')} of {path}: {counted(len(samples), 'sample')}"]
    if left:
        by_ending = Counter(_dotted(guesses.extension(each).lower()) for each in left).most_common(8)
        told = ", ".join(f"{count} {ending}" for ending, count in by_ending)
        notes.append(f"Left out, for no pattern matches them: {counted(len(left), 'file')} ({told}), e.g. {left[0]}")
    manifests = [each for each in left if "/" not in each and guesses.extension(each).lower() in _MANIFESTS]
    notes += [f"{each} may be a manifest of these files: braid init {path}/{each}" for each in manifests[:3]]
    return Found("folder", path, _name(path), len(samples), fields, guess_files.of_folders(samples), notes)


def _dotted(ending: str) -> str:
    return f".{ending}" if ending else "without an ending"


def _of_manifest(path: str) -> Found:
    """One row a sample."""
    rows = list(itertools.islice(_rows(path), MAX_SEEN + 1))
    return _of_rows("manifest", path, rows, len(rows) > MAX_SEEN, [])


def _rows(path: str) -> Iterator[dict[str, Any]]:
    ending = guesses.extension(path).lower()
    if ending in ("csv", "tsv"):
        with files.opened(path, "file") as file:
            text = io.TextIOWrapper(file, "utf-8-sig", errors="replace", newline="")
            try:
                for row in csv.DictReader(text, delimiter="\t" if ending == "tsv" else ","):
                    yield {name: value for name, value in row.items() if isinstance(name, str)}
            except csv.Error as error:
                raise InputError(f"{path}: no {ending.upper()}: {error}") from None
    else:
        corpus = {"source": {"path": [path]}, "columns": {"id": "id"}, "fields": {}}
        yield from (row.columns for row in Manifest(corpus).rows())


def _of_rows(kind: str, path: str, rows: list[dict[str, Any]], cut: bool, fields: list[Field]) -> Found:
    if not rows:
        raise InputError(f"{path} holds no rows")
    seen = rows[:MAX_SEEN]
    columns = guess_columns.of_rows(seen, path, [str(field.given) for field in fields])
    # A Parquet file's texts are values, where nothing says that they are paths.
    are_paths = kind == "parquet"
    fields += [each._replace(read="file") if are_paths and each.modality != "text" else each for each in columns.fields]
    if not fields:
        raise InputError(
            f"{path}: no column holds paths of pictures, sounds or texts, or texts; columns: "
            f"{', '.join(map(repr, columns.kept[:50]))}"
        )
    return Found(kind, path, _name(path), len(seen), fields, columns, [_looked_at(len(seen), "row", path, cut)])


def _looked_at(count: int, what: str, path: str, cut: bool) -> str:
    return f"{'The first ' if cut else ''}{counted(count, what)} of {path}"


def _of_parquet(path: str) -> Found:
    """Columns of bytes, or of Hugging Face's `{bytes, path}`, are fields; a file without them is a manifest."""
    rows: list[dict[str, Any]] = []
    examples: dict[str, bytes] = {}
    size = 0
    with files.opened(path, "file") as file, _told(path):
        parquet = pq.ParquetFile(file)
        binary = [each.name for each in parquet.schema_arrow if _is_binary(each.type)]
        for batch in parquet.iter_batches(_PARQUET_BATCH):
            for row in batch.to_pylist():
                for name in binary:
                    raw = row[name].get("bytes") if isinstance(row[name], dict) else row[name]
                    if raw:
                        examples.setdefault(name, raw)
                    row[name] = bool(row[name])
                rows.append(row)
            size += batch.nbytes
            if len(rows) > MAX_SEEN or size > MAX_SEEN_BYTES:
                break
        cut = len(rows[:MAX_SEEN]) < parquet.metadata.num_rows
    fields: list[Field] = []
    for name in binary:
        modality = _modality(name, examples.get(name, b""))
        if modality is not None:
            taken = {*(each.name for each in fields), *(set(parquet.schema_arrow.names) - {name})}
            have = {str(number) for number, row in enumerate(rows[:MAX_SEEN]) if row[name]}
            fields.append(Field(guesses.field_name(name, modality, taken), modality, name, None, have))
    return _of_rows("parquet" if binary else "manifest", path, rows, cut, fields)


@contextmanager
def _told(path: str) -> Iterator[None]:
    """Makes what pyarrow says of a broken file an InputError."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: no Parquet file that can be read: {error}") from error


def _is_binary(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _modality(name: str, raw: bytes) -> str | None:
    """By the first bytes of a value; by the column's name where there is none."""
    by_name = next((modality for modality in guesses.MODALITIES if modality in name.lower()), None)
    return guesses.modality_of(f"x.{media.sniff_extension(raw)}") if raw else by_name


def _of_tar(path: str) -> Found:
    """Members of one name up to its first dot are a sample; what follows the dot says which field they are."""
    return _of_tars([path])


def _of_tars(paths: Sequence[str]) -> Found:
    """Tars of one corpus. Where keys of one stand in another too, samples are called by both."""
    tars = [_look_into(path, MAX_SEEN // len(paths)) for path in paths]
    keys, rows = dict[str, set[str]](), list[dict[str, Any]]()
    for tar in tars:
        rows += tar.rows
        for ending, own in tar.keys.items():
            keys.setdefault(ending, set()).update(f"{tar.path} {key}" for key in own)
    fields = _fields_of_tar(keys)
    samples = set().union(*keys.values())
    if not fields:
        raise InputError(
            f"{paths[0]}: none of its members is a picture, a video, a sound or a text; they end in: {', '.join(sorted(keys))}"
        )
    columns = guess_columns.of_rows(rows, paths[0], id_column="__key__") if rows else Columns({}, None, [], [])
    own_keys = [set().union(*tar.keys.values()) for tar in tars]
    if len(samples) > len(set().union(*own_keys)):
        columns = columns._replace(roles={"id": ROW, **columns.roles})
    left = sorted(keys.keys() - {ending for field in fields for ending in _listed(field.given)} - {"json"})
    notes = [tar.note for tar in tars]
    notes += [f"Left out: {', '.join(f'{len(keys[ending])} .{ending}' for ending in left[:8])}"] if left else []
    return Found("webdataset", paths[0], _name(paths[0]), len(samples), fields, columns, notes)


class _Tar(NamedTuple):
    """What was seen in a tar: keys by ending, what members `json` hold, and how much was looked at."""

    path: str
    keys: dict[str, set[str]]
    rows: list[dict[str, Any]]
    note: str


def _look_into(path: str, most: int) -> _Tar:
    """The first members of a tar. Raises InputError where there is none that can be read."""
    keys: dict[str, set[str]] = defaultdict(set)
    rows: list[dict[str, Any]] = []
    count, note = 0, ""
    try:
        with files.opened(path, "tar") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for count, member in enumerate(tar, 1):
                folders, slash, last = member.name.rpartition("/")
                stem, _, ending = last.partition(".")
                if member.isfile() and stem and ending:
                    keys[ending.lower()].add(f"{folders}{slash}{stem}")
                    if ending.lower() == "json" and member.size <= MAX_JSON_BYTES and len(rows) < MAX_JSONS:
                        rows += _json_row(tar, member)
                if count == most:
                    break
    except (tarfile.TarError, EOFError) as error:
        if not keys:
            raise InputError(f"{path}: no tar that can be read: {error}; unpack what is compressed") from None
        note = f"; then it is broken: {error}"
    samples = counted(len(set().union(*keys.values())), "sample")
    return _Tar(path, keys, rows, f"{_looked_at(count, 'member', path, count == most)}: {samples}{note}")


def _json_row(tar: tarfile.TarFile, member: tarfile.TarInfo) -> list[dict[str, Any]]:
    content = tar.extractfile(member)
    try:
        row = json.loads(content.read()) if content else None
    except (ValueError, RecursionError):
        return []
    return [row] if isinstance(row, dict) else []


def _fields_of_tar(keys: dict[str, set[str]]) -> list[Field]:
    """A field for each modality, of all endings that never meet in a sample; a field for each that does, or has two parts."""
    fields: list[Field] = []
    for ending, its in sorted(keys.items(), key=lambda item: ("." in item[0], -len(item[1]), item[0])):
        modality = guesses.modality_of(f"x.{ending}")
        if modality is None:
            continue
        same = next((field for field in fields if field.modality == modality and not field.samples & its), None)
        if same is not None and "." not in ending:
            merged = same._replace(given=[*_listed(same.given), ending], samples=same.samples | its)
            fields[fields.index(same)] = merged
        else:
            wanted = ending.rpartition(".")[0] or (
                ending if any(field.modality == modality for field in fields) else modality
            )
            fields.append(
                Field(
                    guesses.field_name(wanted, modality, (field.name for field in fields)), modality, ending, None, its
                )
            )
    return fields


def _listed(given: str | list[str]) -> list[str]:
    return [given] if isinstance(given, str) else given


_MANIFESTS = ("jsonl", "ndjson", "json", "csv", "tsv")
_OF_FILE: dict[str, Callable[[str], Found]] = {
    **dict.fromkeys(_MANIFESTS, _of_manifest),
    "parquet": _of_parquet,
    "tar": _of_tar,
}


def _name(path: str) -> str:
    """What to call a corpus: as its folder or file is called."""
    whole = path if "://" in path else os.path.abspath(path)
    last = whole.rstrip("/").rpartition("/")[2]
    stem, dot, ending = last.rpartition(".")
    return guesses.slug(stem if dot and ending.lower() in _OF_FILE else last, "corpus")
