"""A folder's fields and columns, guessed from the names of its files."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jobs.guesses import MAX_LABELS, MIN_PER_LABEL, MODALITIES, Columns, Field, extension, field_name, modality_of
from pipelines.sources import folder

__all__ = ["fields_of_files", "of_folders"]

MIN_SHARE = 0.05
"""Of the samples, that an ending of names tells a field of."""


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
