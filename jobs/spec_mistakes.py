"""Finding and telling what is wrong with a spec: every mistake at once, each with its line and its mend."""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.nodes import MappingNode, Node, SequenceNode

from featurestore.addresses import HOW_ELSE, has_credentials, redacted
from featurestore.errors import InputError

__all__ = [
    "Document",
    "Mistake",
    "Place",
    "document",
    "dotted",
    "nearest",
    "of_credentials",
    "of_references",
    "report",
    "shown",
]

MAX_DEPTH = 20
MAX_LISTED = 50
MAX_NUMBER = 64
PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")}

Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Mistake:
    """One mistake: its line (from 1), the path of keys to it, and what to say."""

    line: int
    place: Place
    text: str


@dataclass
class Document:
    """A YAML text as plain values, the line of every node, and what could not be read."""

    value: Any = None
    readable: bool = False
    lines: dict[Place, int] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)

    def mistake(self, place: Place, text: str) -> Mistake:
        """A mistake at the line of `place`, or of the nearest node around it."""
        known = place
        while known and known not in self.lines:
            known = known[:-1]
        return Mistake(self.lines.get(known, 1), place, text)


class _Loader(yaml.SafeLoader):
    """Composes nodes without aliases (a few of them can stand for gigabytes) and without deep nesting."""

    depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "aliases (*name) are not allowed; write it out", mark)
        if self.depth > MAX_DEPTH:
            raise ComposerError(None, None, f"nested deeper than {MAX_DEPTH}", mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def document(text: str) -> Document:
    """Read YAML into plain values with lines. What is wrong with the YAML itself is in `mistakes`."""
    tree = Document()
    try:
        root = yaml.compose(text, Loader=_Loader)
    # PyYAML lets ValueErrors of chr() and int() through.
    except (yaml.YAMLError, ValueError) as error:
        tree.mistakes.append(_syntax_mistake(error, text))
        return tree
    if not isinstance(root, MappingNode):
        tree.mistakes.append(Mistake(1, (), "the spec is empty, or no mapping of keys; begin with 'version: 1'"))
        return tree
    tree.readable = True
    tree.value = _value(root, (), tree)
    return tree


def _syntax_mistake(error: Exception, text: str) -> Mistake:
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        what = ", ".join(part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part)
        return Mistake(mark.line + 1, (), f"column {mark.column + 1}: not YAML: {what}")
    position = getattr(error, "position", 0)
    what = getattr(error, "reason", None) or str(error)
    return Mistake(text.count("\n", 0, position) + 1, (), f"not YAML: {what}")


def _value(node: Node, place: Place, tree: Document) -> Any:
    tree.lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, MappingNode):
        return _mapping(node, place, tree)
    if isinstance(node, SequenceNode):
        return tuple(_value(item, (*place, i), tree) for i, item in enumerate(node.value))
    return _scalar(node, place, tree)


def _mapping(node: MappingNode, place: Place, tree: Document) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = key_node.value
        if key_node.tag != "tag:yaml.org,2002:str":
            text = f"key {shown(key)} is no text to YAML (it is {_kind(key_node)}); put it in quotes"
            tree.mistakes.append(Mistake(line, place, text))
        elif key in found:
            first = tree.lines[(*place, key)]
            tree.mistakes.append(Mistake(line, (*place, key), f"is here twice (first in line {first}); keep one"))
        else:
            tree.lines[(*place, key)] = line
            found[key] = _value(value_node, (*place, key), tree)
    return found


def _scalar(node: Node, place: Place, tree: Document) -> Any:
    if node.tag not in PLAIN_TAGS:
        text = f"{shown(node.value)} is {_kind(node)} to YAML; allowed: text, numbers, true, false; put text in quotes"
        tree.mistakes.append(tree.mistake(place, text))
        return None
    if node.tag != "tag:yaml.org,2002:str" and len(node.value) > MAX_NUMBER:
        tree.mistakes.append(tree.mistake(place, f"{shown(node.value)} is too long for a number"))
        return None
    try:
        return yaml.constructor.SafeConstructor().construct_object(node)  # type: ignore[no-untyped-call]
    except (yaml.YAMLError, ValueError, KeyError, IndexError) as error:
        tree.mistakes.append(tree.mistake(place, f"{shown(node.value)} is no {_kind(node)}: {error}"))
        return None


def _kind(node: Node) -> str:
    return str(node.tag).removeprefix("tag:yaml.org,2002:")


def of_references(tree: Document) -> Iterator[Mistake]:
    """What names something that is not there. Works on whatever could be read, so that all is told at once."""
    for place, value, names, what in _references(tree.value):
        if isinstance(value, str) and value not in names:
            allowed = f"allowed: {_listed(names)}" if names else "there is none"
            yield tree.mistake(place, f"{shown(value)} is not {what}; {allowed}{nearest(value, names)}")
    for section, key in (("views", "fields"), *((each, "views") for each in ("spaces", "indexes", "training_sets"))):
        for name, entry in _entries(tree.value, section).items():
            yield from _repeated((section, name, key), entry.get(key), tree)
    yield from _of_encoders(tree)
    yield from _of_source(tree)
    yield from _of_streams(tree)


def of_credentials(tree: Document) -> Iterator[Mistake]:
    """Addresses with a user's name or password, wherever they stand."""
    for place, text in _texts(tree.value):
        if has_credentials(text):
            yield tree.mistake(place, f"{shown(text)} holds a name or a password; {HOW_ELSE} (store.profile)")


def _texts(value: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    if isinstance(value, str):
        yield place, value
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple) else ()
    for key, part in parts:
        yield from _texts(part, (*place, key))


TIMED = ("clock", "policy", "tolerance", "staleness", "time", "channels")
"""Keys of a field that only timed streams have."""

POLICIES = {
    "image": ("nearest", "previous"),
    "audio": ("window",),
    "text": ("overlap", "nearest", "previous", "window"),
    "sensor": ("window", "nearest", "previous", "linear", "overlap"),
}
"""Modality -> how its values may be chosen for a window; the first where nothing is said."""


def _of_streams(tree: Document) -> Iterator[Mistake]:
    """What only a corpus of timed streams may have, or what one lacks."""
    corpus = tree.value.get("corpus")
    source = corpus.get("source") if isinstance(corpus, dict) else None
    if not isinstance(source, dict):
        return
    fields, place = _entries(corpus, "fields"), ("corpus", "source")
    if source.get("type") != "streams":
        if "windows" in source:
            yield tree.mistake((*place, "windows"), "only recordings are cut into windows: write type: streams")
        for name, field in fields.items():
            for key in sorted(field.keys() & set(TIMED)):
                yield tree.mistake(("corpus", "fields", name, key), "only timed streams have it: write type: streams")
        return
    if "windows" not in source:
        yield tree.mistake(place, "windows is missing; add it, e.g. windows: {every: 1s, length: 2s}")
    per = source["windows"].get("per") if isinstance(source.get("windows"), dict) else None
    cut = [name for name, each in fields.items() if each.get("modality") in ("text", "sensor") and not _estimated(each)]
    if isinstance(per, str) and per not in cut:
        told = f"{shown(per)} is no text or sensor field with a clock that is given; allowed: {_listed(cut) or 'none'}"
        yield tree.mistake((*place, "windows", "per"), told + nearest(per, cut))
    elif isinstance(per, str) and fields[per]["modality"] == "sensor" and "length" not in source["windows"]:
        told = f"{shown(per)} is a sensor, whose readings are moments: add a length, e.g. length: 2s"
        yield tree.mistake((*place, "windows", "per"), told)
    for name, field in fields.items():
        for at, told in _of_stream(name, field, fields):
            yield tree.mistake(("corpus", "fields", name, *at), told)


def _estimated(field: Mapping[str, Any]) -> bool:
    return isinstance(field.get("clock"), dict) and "estimate" in field["clock"]


def _of_stream(name: str, field: Mapping[str, Any], fields: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
    modality = field.get("modality")
    if modality == "video":
        yield ("modality",), "'video' is for whole files; a window has a frame of a video: write modality: image"
        return
    allowed = POLICIES.get(modality, ()) if isinstance(modality, str) else ()
    policy = field.get("policy", allowed[0] if allowed else None)
    if allowed and policy not in allowed:
        yield ("policy",), f"{shown(policy)} is not for {modality}; allowed: {', '.join(allowed)}"
    if policy == "nearest" and "tolerance" not in field:
        told = "needs a tolerance, e.g. tolerance: 20ms: without one the last value would stand for all that the stream lacks"
        yield (), f"policy nearest {told}"
    if "read" in field:
        yield ("read",), "a stream is a file always; leave it out"
    if modality != "sensor":
        for key in ("time", "channels"):
            if key in field:
                yield (key,), "only a sensor's file has columns; leave it out"
    clock = field.get("clock")
    if not isinstance(clock, dict):
        return
    if "unit" in clock and modality != "sensor":
        yield ("clock", "unit"), "only a sensor's column of times has a unit; leave it out"
    if isinstance(clock.get("estimate"), str):
        yield from _of_estimate(name, field, clock["estimate"].removeprefix("from "), fields)


def _of_estimate(
    name: str, field: Mapping[str, Any], reference: str, fields: Mapping[str, Any]
) -> Iterator[tuple[Place, str]]:
    able = [
        other
        for other, each in fields.items()
        if other != name and each.get("modality") in ("image", "audio", "sensor") and not _estimated(each)
    ]
    if reference not in able:
        told = f"{shown(reference)} is no other image, audio or sensor field with a clock that is given"
        yield ("clock", "estimate"), f"{told}; allowed: {_listed(able) or 'none'}{nearest(reference, able)}"
    if field.get("modality") == "text":
        yield ("clock", "estimate"), "the clock of texts cannot be measured; write its offset and drift"
    if "drift" in field["clock"]:
        yield ("clock", "drift"), "is measured with the offset; leave it out (an offset may be given as a first guess)"


def _references(spec: Any) -> Iterator[tuple[Place, Any, list[str], str]]:
    """Every name in the spec that stands for something else: where, the name, the names there are, of what."""
    from featurestore import encoders

    fields, views = list(_entries(spec.get("corpus"), "fields")), list(_entries(spec, "views"))
    spaces, known = _entries(spec, "spaces"), encoders.keys()
    for name, view in _entries(spec, "views").items():
        for place, source in _read(view):
            yield ("views", name, *place), source, fields, "a field of this corpus"
        yield ("views", name, "encoder"), view.get("encoder"), known, "an encoder"
    for section in ("spaces", "training_sets"):
        for name, entry in _entries(spec, section).items():
            yield from _views_of((section, name), entry, views, "a view of this spec")
    for name, entry in _entries(spec, "training_sets").items():
        listed = entry.get("group_equal", ())
        for i, each in enumerate(listed if isinstance(listed, tuple) else ()):
            yield ("training_sets", name, "group_equal", i), each, fields, "a field of this corpus"
    for name, index in _entries(spec, "indexes").items():
        space = index.get("space")
        yield ("indexes", name, "space"), space, list(spaces), "a space of this spec"
        if isinstance(space, str) and isinstance(spaces.get(space, {}).get("views"), tuple):
            members = [view for view in spaces[space]["views"] if isinstance(view, str)]
            yield from _views_of(("indexes", name), index, members, f"a view of space {space!r}")


def _views_of(
    place: Place, entry: Mapping[str, Any], names: list[str], what: str
) -> Iterator[tuple[Place, Any, list[str], str]]:
    views = entry.get("views")
    for i, view in enumerate(views if isinstance(views, tuple) else ()):
        yield (*place, "views", i), view, names, what


def _repeated(place: Place, listed: Any, tree: Document) -> Iterator[Mistake]:
    seen: set[str] = set()
    for i, each in enumerate(listed if isinstance(listed, tuple) else ()):
        if isinstance(each, str):
            if each in seen:
                yield tree.mistake((*place, i), f"{shown(each)} is listed twice; keep one")
            seen.add(each)


def _read(view: Mapping[str, Any]) -> list[tuple[Place, Any]]:
    """The fields that a view reads: where in it each is named, and the name."""
    several = view.get("fields")
    named = [(("fields", i), each) for i, each in enumerate(several if isinstance(several, tuple) else ())]
    return [*([(("field",), view["field"])] if "field" in view else []), *named]


def _of_encoders(tree: Document) -> Iterator[Mistake]:
    """Options that an encoder does not take, and encoders on fields of other modalities."""
    from featurestore import encoders

    fields, known = _entries(tree.value.get("corpus"), "fields"), encoders.keys()
    for name, view in _entries(tree.value, "views").items():
        key, options = view.get("encoder"), view.get("options", {})
        if not isinstance(key, str) or key not in known or not isinstance(options, dict):
            continue
        sources = [source for _, source in _read(view)]
        each = [fields.get(source, {}).get("modality") if isinstance(source, str) else None for source in sources]
        known_all = bool(each) and all(isinstance(modality, str) for modality in each)
        has, takes = "+".join(map(str, each)) if known_all else None, encoders.modalities(key)
        noun, verb = ("field", "is") if len(each) == 1 else ("fields", "are")
        said = f"{noun} {', '.join(map(shown, sources))} {verb} {shown(has)}"
        fits = has is not None and encoders.takes(key, has)
        if has is not None and not fits:
            yield tree.mistake(("views", name, "encoder"), f"{shown(key)} takes {' or '.join(takes)}, but {said}")
        try:
            made = encoders.find_for(key, options, has if has is not None else takes[0])
        except InputError as error:
            yield tree.mistake(("views", name, "options"), str(error))
            continue
        if fits and made.modality != has:
            yield tree.mistake(("views", name, "options"), f"it takes {made.modality}, but {said}")


def _of_source(tree: Document) -> Iterator[Mistake]:
    """What a field's `from`, the source's path and its columns may not be with this type of source."""
    corpus = tree.value.get("corpus")
    sections = corpus if isinstance(corpus, dict) else {}
    source, columns = (part if isinstance(part, dict) else {} for part in map(sections.get, ("source", "columns")))
    given = {name: field.get("from") for name, field in _entries(corpus, "fields").items()}
    if "adopt" in source and source.get("type") != "webdataset":
        yield tree.mistake(
            ("corpus", "source", "adopt"), "only tars are adopted: write type: webdataset, or leave it out"
        )
    elif source.get("adopt") is True and sections.get("media") == "copy":
        text = "'copy' is not what adopt does, which leaves values in their tars: leave one of them out"
        yield tree.mistake(("corpus", "media"), text)
    if "root" in source and source.get("type") in ("folder", "webdataset"):
        text = "only rows name files that may lie elsewhere: write type: manifest, parquet or streams, or leave it out"
        yield tree.mistake(("corpus", "source", "root"), text)
    if source.get("type") == "folder":
        yield from _of_folder(columns, given, tree)
    elif source.get("type") in ("manifest", "parquet"):
        for name, texts in given.items():
            if isinstance(texts, tuple):
                yield tree.mistake(("corpus", "fields", name, "from"), f"{shown(texts)} is a list: name one column")


def _of_folder(columns: Mapping[str, Any], given: Mapping[str, Any], tree: Document) -> Iterator[Mistake]:
    from pipelines.sources import folder

    for key, column in columns.items():
        allowed = ["id"] if key == "id" else list(folder.COLUMNS)
        if isinstance(column, str) and column not in allowed:
            text = f"{shown(column)} is no column of a folder for this; allowed: {', '.join(allowed)}"
            yield tree.mistake(("corpus", "columns", key), text)
    texts = {
        name: each
        for name, each in given.items()
        if isinstance(each, str) or (isinstance(each, tuple) and all(isinstance(text, str) for text in each))
    }
    for name, entry in _entries(tree.value["corpus"], "fields").items():
        if entry.get("read") == "inline":
            yield tree.mistake(("corpus", "fields", name, "read"), "a folder's values are files: leave it out")
    for name, told in folder.mistakes(texts):
        yield tree.mistake(("corpus", "fields", name, "from"), told)


def _entries(section: Any, key: str) -> dict[str, dict[str, Any]]:
    """The entries of `section[key]`; what is no section reads as empty, and `of_shape` tells of it."""
    entries = section.get(key) if isinstance(section, dict) else None
    if not isinstance(entries, dict):
        return {}
    return {name: entry if isinstance(entry, dict) else {} for name, entry in entries.items()}


def _listed(names: list[str]) -> str:
    return ", ".join(names[:MAX_LISTED]) + (" ..." if len(names) > MAX_LISTED else "")


def nearest(value: object, names: list[str]) -> str:
    """`; did you mean …?`, where one of the names is like the value."""
    if not isinstance(value, str) or len(value) > 64:
        return ""
    near = difflib.get_close_matches(value, names[:MAX_LISTED], n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def shown(value: object) -> str:
    """The value as YAML would have it, cut short, without passwords."""
    text = redacted(repr(value) if isinstance(value, str) else json.dumps(value, default=str))
    return text if len(text) <= 80 else text[:76] + " ..."


def report(mistakes: Iterable[Mistake], where: str) -> str:
    """All mistakes in the order of their lines, under their number."""
    told = sorted({(m.line, dotted(m.place), m.text) for m in mistakes})
    count = f"{len(told)} mistake{'s' if len(told) != 1 else ''}"
    lines = [f"  line {line}: {place + ': ' if place else ''}{text}" for line, place, text in told[:MAX_LISTED]]
    rest = [f"  and {len(told) - MAX_LISTED} more"] if len(told) > MAX_LISTED else []
    return "\n".join(_printable(line) for line in [f"{where}: {count}", *lines, *rest])


def _printable(line: str) -> str:
    """Escape what a terminal obeys or cannot encode: the parser and pydantic quote the file's text as it is."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line)


def dotted(place: Place) -> str:
    """The keys to a place, as a person writes them."""
    parts = (
        str(part) if isinstance(part, int) or re.fullmatch(r"[\w-]{1,64}", part) else shown(part) for part in place
    )
    return ".".join(parts)
