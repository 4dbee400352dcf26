"""The columns of rows, guessed from their names and values: ids, groups, times, labels, and fields that stand in them."""

import datetime
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from featurestore.errors import InputError
from featurestore.identity import MAX_ID_BYTES
from featurestore.times import RESERVED, timestamp_ns
from jobs.guesses import MAX_LABELS, MIN_PER_LABEL, Columns, Field, field_name, modality_of
from pipelines.sources.rows import ROW

__all__ = ["of_rows"]

IDS = (
    "id",
    "key",
    "__key__",
    "sample_id",
    "uid",
    "uuid",
    "image_id",
    "clip_id",
    "file_name",
    "filename",
    "path",
    "name",
)
GROUPS = (
    *(
        "group",
        "group_id",
        "speaker",
        "speaker_id",
        "video",
        "video_id",
        "session",
        "session_id",
        "recording",
        "patient",
    ),
    *("patient_id", "subject", "user", "user_id", "author", "album", "scene", "episode", "document", "client_id"),
)
TIMES = ("event_timestamp", "timestamp", "datetime", "time", "date", "recorded_at", "created_at", "created", "added")
AVAILABLE = ("available_timestamp", "available_at", "ingested_at", "published_at")
TEXTS = {
    *(
        "caption",
        "text",
        "title",
        "description",
        "transcript",
        "transcription",
        "sentence",
        "prompt",
        "summary",
        "comment",
    ),
    *("abstract", "question", "answer", "utterance", "lyrics", "alt"),
}
LABELS = ("label", "class", "category", "target", "kind", "genre", "emotion", "species", "topic", "intent", "sentiment")
NO_LABELS = {
    *("split", "fold", "partition", "subset", "language", "lang", "licence", "license", "source", "url"),
    *(*TIMES, *AVAILABLE),
}


def of_rows(
    rows: Sequence[Mapping[str, Any]], where: str, own: Sequence[str] = (), id_column: str | None = None
) -> Columns:
    """The columns of rows, and the fields that are paths or texts in them.

    Args:
        rows: the first of a corpus, at least one.
        where: what they stand in, for messages.
        own: columns that are fields already.
        id_column: the column that the source has ids in by itself, if it has one.

    Raises:
        InputError: a column `id` is none of ids, or one has a name that Braid needs for itself.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    values = {name: [row[name] for row in rows if row.get(name) not in (None, "")] for name in names}
    is_id = _ids(values, len(rows))
    roles: dict[str, str] = {}
    if id_column is None:
        roles["id"] = _id_of(names, is_id, values, rows, where)
    for role, allowed in (("event_timestamp", TIMES), ("available_timestamp", AVAILABLE)):
        if time := next((name for name in allowed if values.get(name) and all(map(_is_time, values[name]))), None):
            roles[role] = time
    if group := next((name for name in GROUPS if name not in is_id and _are_texts(values.get(name, ()))), None):
        roles["group"] = group
    fields = _fields_of(values, rows, {*roles.values(), *own} - {roles.get("id", "")}, roles.get("id", ""))
    used = {*roles.values(), *own, *(str(field.given) for field in fields)}
    if id_column is None and (clash := sorted((RESERVED | {field.name for field in fields}) & set(names) - used)):
        raise InputError(
            f"{where}: column {clash[0]!r} is none to Braid as it is, but would go by the name of its own; rename it"
        )
    return Columns(
        roles, _label_of({name: values[name] for name in names if name not in used}, len(rows)), names, fields
    )


def _ids(values: Mapping[str, Sequence[Any]], count: int) -> set[str]:
    """Columns with another text in each row, but sentences; or with another whole number, where the name is an id's."""
    found = set()
    for name, its in values.items():
        numbers = name.lower() in IDS and all(isinstance(value, int) and not isinstance(value, bool) for value in its)
        texts = _are_texts(its) and (name.lower() in IDS or not _is_prose(name, its))
        if (numbers or texts) and len(its) == count == len(set(its)) and _longest(its) * 4 <= MAX_ID_BYTES:
            found.add(name)
    return found


def _longest(values: Sequence[Any]) -> int:
    return max(len(str(value)) for value in values)


def _id_of(
    names: Sequence[str],
    is_id: set[str],
    values: Mapping[str, Sequence[Any]],
    rows: Sequence[Mapping[str, Any]],
    where: str,
) -> str:
    """The column of ids; ROW where no column can be it."""
    if "id" in names and "id" not in is_id:
        raise InputError(
            f"{where}: column 'id' is none of ids: {_no_ids(values['id'], rows)}; correct it, or rename it"
        )
    return next((name for name in (*IDS, *names) if name in is_id), ROW)


def _no_ids(values: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Why a column `id` is none, with the rows, counted from 1."""
    first: dict[Any, int] = {}
    for number, row in enumerate(rows, 1):
        value = row.get("id")
        if value in (None, ""):
            return f"row {number} has none"
        if not isinstance(value, str | int) or isinstance(value, bool):
            return f"{str(value)[:40]!r} in row {number} is no text and no whole number"
        if first.setdefault(value, number) != number:
            return f"{str(value)[:40]!r} stands twice, in rows {first[value]} and {number}"
    return f"its values, e.g. {str(values[0])[:40]!r}, are texts and numbers, too long, or not printable"


def _are_texts(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(value, str) and value.isprintable() for value in values)


def _is_time(value: Any) -> bool:
    if isinstance(value, datetime.datetime | datetime.date):
        return True
    if isinstance(value, int) and not isinstance(value, bool):
        # Seconds, or milliseconds, would be read as nanoseconds.
        return value > 10**17
    try:
        return isinstance(value, str) and timestamp_ns(value, "") is not None
    except InputError:
        return False


def _fields_of(
    values: Mapping[str, Sequence[Any]], rows: Sequence[Mapping[str, Any]], taken: set[str], id_column: str
) -> list[Field]:
    fields: list[Field] = []
    for name, its in values.items():
        texts = [value for value in its if isinstance(value, str)]
        if name in taken or not texts or len(texts) < len(its):
            continue
        modality, read = _media_of(texts), "file"
        if modality is None and name != id_column and _is_prose(name, texts):
            modality, read = "text", "inline"
        if modality is not None:
            wanted = re.sub(r"_(path|file|filename|file_name|url|uri)$", "", name)
            taken_names = {*(each.name for each in fields), *(set(values) - {name})}
            if wanted in {"path", "file", "filename", "file_name", "url", "uri", *IDS} and modality not in taken_names:
                wanted = modality
            free = field_name(wanted, modality, taken_names)
            have = {str(number) for number, row in enumerate(rows) if row.get(name) not in (None, "")}
            # What the source chooses by itself needs no word.
            fields.append(Field(free, modality, name, "file" if modality == "text" and read == "file" else None, have))
    return fields


def _media_of(texts: Sequence[str]) -> str | None:
    """The modality of a column of paths; None where it holds something else."""
    counts = Counter(modality_of(text) for text in texts)
    ((modality, count),) = counts.most_common(1)
    return modality if modality is not None and count * 10 >= 9 * len(texts) else None


def _is_prose(name: str, texts: Sequence[str]) -> bool:
    """By its name, or by its values: long, of several words, and mostly different from each other."""
    if TEXTS & set(re.split(r"[^a-z]+", name.lower())):
        return True
    half = len(texts) / 2
    return (
        sum(map(len, texts)) >= 20 * len(texts)
        and sum(text.strip().count(" ") >= 2 for text in texts) >= half
        and len(set(texts)) >= half
    )


def _label_of(values: Mapping[str, Sequence[Any]], count: int) -> str | None:
    scalars = {
        name: set(its)
        for name, its in values.items()
        if name and its and all(isinstance(value, str | int) for value in its) and len(its) * 2 >= count
    }
    for name in LABELS:
        if 2 <= len(scalars.get(name, ())) <= max(2, count / 2):
            return name
    for name, distinct in scalars.items():
        few = 2 <= len(distinct) <= MAX_LABELS and len(distinct) * MIN_PER_LABEL <= len(values[name])
        if few and all(isinstance(value, str) for value in distinct) and name.lower() not in NO_LABELS:
            return name
    return None
