"""The text of the spec that `braid init` writes: YAML, with what was seen in comments."""

import itertools
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from featurestore import encoders
from jobs.guesses import Columns, Field, slug
from jobs.report import counted
from pipelines.sources.rows import ROW

__all__ = ["Found", "spec_text"]

MIN_PAIRS = 20
"""Samples with both views that a space needs at least."""


class Found(NamedTuple):
    """What was seen of a corpus, and guessed of it.

    Args:
        kind: the source's type in the spec.
        path: the source's path there.
        name: what to call the corpus.
        samples: number of samples seen.
        fields: what they are made of.
        columns: their columns.
        seen: lines for a person: how much was looked at, and what was left out.
    """

    kind: str
    path: str
    name: str
    samples: int
    fields: list[Field]
    columns: Columns
    seen: list[str]


def spec_text(found: Found, output: Path) -> str:
    """The spec's YAML. What was seen stands in comments."""
    views = {field.name: (field, keys) for field in found.fields if (keys := encoders.ready(field.modality))}
    lines = [
        f"# Written by `braid init`: a guess, to be edited. Then: braid plan {output}, braid run {output}",
        *(f"# {line}" for line in found.seen),
        "version: 1",
        f"store: {_flow({'uri': _store_of(found)})} # or s3://bucket/prefix, gs://bucket/prefix",
        "corpus:",
        f"  {_entry('name', found.name)}",
        f"  # {_PATHS[found.kind]}",
        f"  source: {_flow({'type': found.kind, 'path': found.path})}",
        *_column_lines(found),
        "  fields:",
        *(_field_line(field, found.samples) for field in found.fields),
        "  failure_budget: 1% # more rejected values than this fail a job",
        *_view_lines(views),
        *_space_lines(list(views.values())),
        *_training_lines(found, list(views)),
    ]
    return "".join(f"{_printable(line)}\n" for line in lines)


_PATHS = {
    "folder": "{id} in a field's pattern stands for the sample's id: the path below the folder, without what a pattern adds.",
    "manifest": "A field's `from` is a column: of texts, of paths, or of addresses. Paths lead into the manifest's own folder, "
    "or into one that is named beside `path` as `root`.",
    "parquet": "A field's `from` is a column: of bytes, of {bytes, path}, or of texts.",
    "webdataset": "A field's `from` is what members of a tar are called behind their first dot, or a list. With adopt: true in "
    "source nothing is copied: the tars stay and are read where they are.",
}


_BY_ROW = (
    "No column has another text in each row, as ids have: __row__ calls a row by its file and its place in it. Such ids stay",
    "as long as no row is put in or taken out before others; a column of ids would outlast that.",
)
_BY_TAR = ("Keys stand in several tars: __row__ calls a sample by its tar and its key, 00017/0042. Tars may be added.",)


def _column_lines(found: Found) -> list[str]:
    roles = found.columns.roles
    used = {*roles.values(), *(field.given for field in found.fields if isinstance(field.given, str)), "id"}
    kept = [name for name in found.columns.kept if name not in used]
    told = f"  # Other columns, kept as they are: {', '.join(kept[:30])}" if kept else ""
    hint = "" if "group" in roles else " # group: COLUMN, of what must not be split between train and test"
    told_of_rows = _BY_TAR if found.kind == "webdataset" else _BY_ROW
    numbered = [f"  # {line}" for line in told_of_rows] if roles.get("id") == ROW else []
    return [*([told] if told else []), *numbered, f"  columns: {_flow(roles)}{hint}"]


def _field_line(field: Field, total: int) -> str:
    given = {"modality": field.modality, "from": field.given} | ({"read": field.read} if field.read else {})
    return f"    {_entry(field.name, given)} # {len(field.samples)} of {counted(total, 'sample')} seen"


def _view_lines(views: dict[str, tuple[Field, list[str]]]) -> list[str]:
    lines = []
    for name, (_, keys) in views.items():
        others = f" # or: {', '.join(keys[1:])}" if keys[1:] else ""
        lines.append(f"  {_entry(name, {'field': name, 'encoder': keys[0]})}{others}")
    return ["views:", *lines] if lines else []


def _space_lines(views: list[tuple[Field, list[str]]]) -> list[str]:
    """A space and an index of two views: of pictures and texts, if there are, else those that share most samples."""
    pairs = [(one, two, len(one.samples & two.samples)) for (one, _), (two, _) in itertools.combinations(views, 2)]
    if not pairs:
        return []
    one, two, shared = max(
        pairs,
        key=lambda pair: (
            pair[2] >= MIN_PAIRS,
            {pair[0].modality, pair[1].modality} == {"image", "text"},
            pair[0].modality != pair[1].modality,
            pair[2],
        ),
    )
    name, both = f"{one.name[:31]}-{two.name[:31]}", [one.name, two.name]
    lines = [
        f"spaces: # a joint space of two views, learned from the samples that have both: {shared} of those seen",
        f"  {_entry(name, {'views': both, 'method': 'cca'})}",
        "indexes: # what `braid search` searches",
        f"  {_entry(name, {'space': name, 'views': both})}",
    ]
    if shared < MIN_PAIRS:
        return [f"# Too few to learn from; at least {MIN_PAIRS} are needed:", *(f"# {line}" for line in lines)]
    return lines


def _training_lines(found: Found, views: list[str]) -> list[str]:
    label = found.columns.label
    if label is None or not views:
        return ["# training_sets: of views with a column as `label`; none looks like one"] if views else []
    chosen = {"views": views, "label": label, "splits": {"train": 0.8, "val": 0.1, "test": 0.1}}
    return [
        "training_sets: # to learn the column `label` from the views",
        f"  {_entry(slug(label, 'label'), chosen)}",
    ]


def _store_of(found: Found) -> str:
    """A folder of this one; beside the corpus where this one is in it, so that the corpus does not hold its store."""
    here, corpus = os.path.realpath("."), os.path.realpath(found.path)
    inside = found.kind == "folder" and "://" not in found.path and os.path.commonpath([here, corpus]) == corpus
    above = os.path.relpath(os.path.dirname(corpus), here) if inside else "."
    return f"{above}/{found.name}-store"


class _Dumper(yaml.SafeDumper):
    """Texts with line breaks are written with escapes: else they would go over several lines."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


def _flow(value: dict[str, Any]) -> str:
    """YAML in one line."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf
    )
    return text.rstrip("\n")


def _entry(name: str, value: Any) -> str:
    return _flow({name: value})[1:-1]


def _printable(line: str) -> str:
    """A line that no name in it can break, or end a comment of."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line)
