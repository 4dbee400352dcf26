"""What `braid init` makes of names and of values: which files and columns are fields, ids, groups, times and labels.

Guesses are pure functions of the first files or rows of a corpus, and say how many samples have what, so that a person sees
what they were made from. None is more than a proposal: they are written into a spec to be edited.
"""

import datetime
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from featurestore.errors import InputError
from featurestore.identity import MAX_ID_BYTES
from featurestore.times import RESERVED, timestamp_ns
from jobs.spec import TRAINING_COLUMNS
from pipelines.sources import folder

__all__ = [
    "Columns",
    "Field",
    "extension",
    "field_name",
    "fields_of_files",
    "modality_of",
    "of_folders",
    "of_rows",
    "slug",
]

MODALITIES = {
    "image": ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff"),
    "audio": ("ogg", "oga", "opus", "wav", "flac"),
    "text": ("txt", "text", "caption"),
}
"""What is decoded, and the endings it goes by."""

_OF_ENDING = {ending: modality for modality, endings in MODALITIES.items() for ending in endings}

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

MIN_PER_LABEL = 10
"""Samples a value of a label has on average, where only its values say that it is one."""

MAX_LABELS = 100

MIN_SHARE = 0.05
"""Of the samples, that an ending of names tells a field of."""


class Field(NamedTuple):
    """A guessed field: `given` is its `from`, `samples` are those seen that have it."""

    name: str
    modality: str
    given: str | list[str]
    read: str | None
    samples: set[str]


class Columns(NamedTuple):
    """Guessed columns: of the spec's `columns`, the label, all that are kept, and fields that columns hold."""

    roles: dict[str, str]
    label: str | None
    kept: list[str]
    fields: list[Field]


def extension(path: str) -> str:
    """The ending of a path's or an address's last part, as it is written, without the dot."""
    name = (urlsplit(path).path if "://" in path else path).rpartition("/")[2]
    stem, dot, ending = name.rpartition(".")
    return ending if dot and stem else ""


def modality_of(path: str) -> str | None:
    """The modality that a file's ending promises; None where it is not decoded."""
    return _OF_ENDING.get(extension(path).lower())


def slug(text: str, otherwise: str) -> str:
    """A text as a name in a spec."""
    return re.sub(r"[^a-z0-9_-]+", "_", text.lower()).strip("_-")[:48] or otherwise


def field_name(wanted: str, modality: str, taken: Iterable[str]) -> str:
    """A name for a field and its view: the one wanted, or one like it that is free."""
    name = slug(wanted, modality)
    used = RESERVED | TRAINING_COLUMNS | set(taken)
    tried = [name, f"{modality}_{name}", *(f"{modality}_{name}_{number}" for number in range(2, 1000))]
    return next(each for each in tried if each not in used)


def fields_of_files(paths: Sequence[str]) -> list[Field]:
    """The fields of a folder's samples, by the names of its files.

    Files with one stem in one folder are a sample's; what follows a stem in many names (`_desc`) tells a field of its own; or
    folders beside each other hold a modality each, and equal names. A field's patterns are by falling number of files.
    """
    media = [(path, modality) for path in paths if (modality := modality_of(path)) and "{id}" not in path]
    shapes = _beside(media) or _suffixes(media)
    counts: Counter[tuple[tuple[str, str, str], str]] = Counter()
    for path, modality in media:
        ending = extension(path)
        stem = path[: -len(ending) - 1]
        for shape in shapes:
            before, after, its_modality = shape
            if its_modality == modality and stem.startswith(before) and stem.endswith(after):
                counts[shape, ending] += 1
    given: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for (before, after, modality), ending in _by_count(counts)[: folder.MAX_PATTERNS]:
        given[before, after, modality].append(f"{before}{{id}}{after}.{ending}")
    order = list(MODALITIES)
    shapes = sorted(given, key=lambda shape: (order.index(shape[2]), *shape[:2]))
    fields: list[Field] = []
    for number, patterns, samples in _matched(paths, {at: given[shape] for at, shape in enumerate(shapes)}):
        before, after, modality = shapes[number]
        wanted = after or before.rstrip("/").rpartition("/")[2] or modality
        name = field_name(wanted, modality, [*(field.name for field in fields), *folder.COLUMNS])
        fields.append(Field(name, modality, patterns if len(patterns) > 1 else patterns[0], None, samples))
    return fields


def _by_count(counts: Counter[Any]) -> list[Any]:
    return [key for key, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def _beside(media: Sequence[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """(before, "", modality) of folders beside each other, each with a modality and the names of another's; else nothing."""
    folders = [path.split("/")[:-1] for path, _ in media]
    common = 0
    while folders and all(len(each) > common and each[common] == folders[0][common] for each in folders):
        common += 1
    stems: dict[str, set[str]] = defaultdict(set)
    modalities: dict[str, set[str]] = defaultdict(set)
    for path, modality in media:
        parts = path.split("/")
        if len(parts) < common + 2:
            return []
        before = "/".join(parts[: common + 1]) + "/"
        stems[before].add(path[len(before) : -len(extension(path)) - 1])
        modalities[before].add(modality)
    if not all(len(each) == 1 for each in modalities.values()) or len(set.union(set(), *modalities.values())) < 2:
        return []
    for before, own in stems.items():
        others: set[str] = set().union(*(each for other, each in stems.items() if other != before))
        if len(own & others) * 2 < len(own):
            return []
    return [(before, "", min(found)) for before, found in sorted(modalities.items())]


def _suffixes(media: Sequence[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """("", suffix, modality) of every field; the suffix is empty for the files that are called as their sample is."""
    stems: dict[str, set[str]] = defaultdict(set)
    for path, modality in media:
        stems[path[: -len(extension(path)) - 1]].add(modality)
    bases: dict[tuple[str, str], set[str]] = defaultdict(set)
    for stem, modality in ((stem, modality) for stem, its in stems.items() for modality in its):
        bases["", modality].add(stem)
        cuts = list(_cuts(stem))
        # Of a_b_desc.ogg beside a.png and a_b.png, the name is a_b.
        for base, suffix in [cut for cut in cuts if stems.get(cut[0], set()) - {modality}][-1:] or cuts:
            bases[suffix, modality].add(base)
    forms: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for form, its in bases.items():
        for base in its:
            forms[base].add(form)
    roots = sum(not any(base in stems for base, _ in _cuts(stem)) for stem in stems)
    found = [
        form
        for form, its in bases.items()
        if not form[0] or (len(its) >= max(2, MIN_SHARE * roots) and _is_suffix(form, bases, forms))
    ]
    return [("", suffix, modality) for suffix, modality in found]


def _cuts(stem: str) -> Iterator[tuple[str, str]]:
    """Every way to cut a stem into a name and what may tell a field: what begins with a separator and a letter."""
    start = stem.rfind("/") + 1
    for cut in re.finditer(r"[-_. ](?=[^\W\d_])", stem[start:]):
        at = start + cut.start()
        if cut.start() and re.fullmatch(r"[\w-]+", stem[at + 1 :]):
            yield stem[:at], stem[at:]


def _is_suffix(
    form: tuple[str, str], bases: Mapping[tuple[str, str], set[str]], forms: Mapping[str, set[tuple[str, str]]]
) -> bool:
    """Whether an ending of names tells a field, and is no part of the sample's own name.

    It tells one where most of its bases have a value of another modality by another name, and the ending itself has not; or
    where most files of the same modality without it have one with it.
    """
    suffix, modality = form
    its = bases[form]
    whole = sum(
        any(other == suffix and its_modality != modality for other, its_modality in forms[base]) for base in its
    )
    paired = sum(
        any(other != suffix and its_modality != modality for other, its_modality in forms[base]) for base in its
    )
    bare = bases.get(("", modality), set())
    without = {stem for stem in bare if not stem.endswith(suffix)}
    return whole * 2 < len(its) and (paired * 2 >= len(its) or len(its & without) * 2 > len(without))


def _matched(paths: Sequence[str], given: dict[int, list[str]]) -> list[tuple[int, list[str], set[str]]]:
    """Number, patterns and the samples that the source would find, without patterns and fields that find none or hardly any."""
    if not given:
        return []
    matcher = folder.Patterns({str(number): patterns for number, patterns in given.items()})
    found: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        if (matched := matcher.match(path)) is not None:
            found[str(matcher.all[matched[0]])].add(matched[1])
    samples = {number: set().union(*(found[each] for each in patterns)) for number, patterns in given.items()}
    total = len(set().union(*samples.values()))
    kept = []
    for number, its in samples.items():
        others = set().union(*(each for other, each in samples.items() if other != number))
        # A README.txt beside pictures is no caption.
        if its and (len(its) * 10 >= total or len(its & others) * 10 >= len(its)):
            kept.append((number, [each for each in given[number] if found[each]], its))
    # What one field leaves, another may take.
    return kept if len(kept) == len(given) else _matched(paths, {number: patterns for number, patterns, _ in kept})


def of_folders(ids: Iterable[str]) -> Columns:
    """A folder's columns: the folder is a label where few folders hold many samples each, else a group."""
    counts = Counter(sample_id.rpartition("/")[0] for sample_id in ids)
    named = {name: count for name, count in counts.items() if name}
    kept = list(folder.COLUMNS)
    if 2 <= len(named) <= MAX_LABELS and sum(named.values()) >= MIN_PER_LABEL * len(named):
        return Columns({}, "folder", kept, [])
    return Columns({"group": "folder"} if len(named) >= 2 else {}, None, kept, [])


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
        InputError: no column can be the id, or one has a name that Braid needs for itself.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    values = {name: [row[name] for row in rows if row.get(name) not in (None, "")] for name in names}
    is_id = _ids(values, len(rows))
    roles: dict[str, str] = {}
    if id_column is None:
        roles["id"] = _id_of(names, is_id, where)
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
    """Columns with another text in each row."""
    return {
        name
        for name, its in values.items()
        if len(its) == count and _are_texts(its) and len(set(its)) == count and max(map(len, its)) * 4 <= MAX_ID_BYTES
    }


def _id_of(names: Sequence[str], is_id: set[str], where: str) -> str:
    if "id" in names and "id" not in is_id:
        raise InputError(f"{where}: column 'id' is not another text in each row; make it that, or rename it")
    found = next((name for name in (*IDS, *names) if name in is_id), None)
    if found is None:
        raise InputError(
            f"{where}: no column has another text in each row, as ids of samples are; add one, e.g. 'id'; columns: "
            f"{', '.join(map(repr, names[:50]))}"
        )
    return found


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
