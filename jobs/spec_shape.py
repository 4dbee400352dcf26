"""What pydantic finds wrong with the shape of a spec, in its own words: the value, what is allowed there, and the mend."""

import json
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from jobs.spec_mistakes import Document, Mistake, Place, nearest, shown

__all__ = ["of_shape"]

NAME_RULE = "small letters, digits, '-' and '_', beginning with a letter or digit, at most 64"


class _Slot(NamedTuple):
    """What may stand in a place: its type, without None and what limits it; its limits; its default or an example, if any."""

    kind: Any
    limits: dict[str, Any]
    example: Any
    optional: bool

    @property
    def keys(self) -> list[str]:
        """Those of a section."""
        return [info.alias or name for name, info in self.kind.model_fields.items()]

    @property
    def is_section(self) -> bool:
        return isinstance(self.kind, type) and issubclass(self.kind, BaseModel)


def of_shape(error: ValidationError, model: Any, tree: Document) -> Iterator[Mistake]:
    """Translate what pydantic found of a model, or of a mapping of names."""
    for found in error.errors():
        place = found["loc"]
        if found["type"] == "too_short" and len(found["input"]) >= found["ctx"]["min_length"]:
            continue  # some of its entries are wrong, which is told of each
        if place[-1:] == ("[key]",):
            rule = NAME_RULE if found["type"] == "string_pattern_mismatch" else "a text that is not empty"
            yield tree.mistake(place[:-1], f"{shown(found['input'])} is not a name; allowed: {rule}")
        else:
            yield tree.mistake(place, _told(found, model))


def _told(found: Mapping[str, Any], model: Any) -> str:
    kind, value, place = found["type"], found["input"], found["loc"]
    if kind == "extra_forbidden":
        keys = _slot(place[:-1], model).keys
        return f"is not a key of this section; allowed: {', '.join(keys)}{nearest(place[-1], keys)}"
    if kind == "value_error":
        return f"{shown(value)} is wrong: {found['ctx']['error']}"
    if kind == "string_pattern_mismatch":
        return f"{shown(value)} is not a name; allowed: {NAME_RULE}"
    slot = _slot(place, model)
    if kind == "missing":
        return f"is missing; add it, {_allowed(slot)}{_example(slot)}"
    if kind == "literal_error":
        allowed = [str(each) for each in typing.get_args(slot.kind)]
        return f"{shown(value)} is not allowed here; allowed: {', '.join(allowed)}{nearest(value, allowed)}"
    if kind == "model_type":
        return (
            f"{shown(value)} is no section; allowed keys: {', '.join(slot.keys)}; write it like {{{slot.keys[0]}: …}}"
        )
    return f"{shown(value)} is wrong: write {_allowed(slot)}{_hint(value, slot)}"


def _slot(place: Place, model: Any) -> _Slot:
    here = _unwrapped(model, {}, None)
    for part in place:
        if here.is_section:
            infos = {info.alias or name: info for name, info in here.kind.model_fields.items()}
            info = infos[str(part)]
            default = None if info.is_required() else info.default
            example = info.examples[0] if info.examples else default
            here = _unwrapped(info.annotation, _limits(info.metadata), example, not info.is_required())
        else:
            arguments = typing.get_args(here.kind)
            here = _unwrapped(arguments[0 if typing.get_origin(here.kind) is tuple else -1], {}, None)
    return here


def _unwrapped(annotation: Any, limits: dict[str, Any], example: Any, optional: bool = False) -> _Slot:
    """The type itself, of `Annotated[X, …]` and of `X | None`."""
    inner, *more = typing.get_args(annotation) or (annotation,)
    if typing.get_origin(annotation) is typing.Annotated:
        found = _limits([each for part in more for each in (part.metadata if isinstance(part, FieldInfo) else [part])])
        return _unwrapped(inner, found | limits, example, optional)
    if type(None) in more:
        return _unwrapped(inner, limits, example, optional)
    return _Slot(annotation, limits, example, optional)


_LIMITS = {"ge": "from {}", "gt": "above {}", "le": "up to {}", "lt": "below {}"}


def _limits(metadata: list[Any]) -> dict[str, Any]:
    names = (*_LIMITS, "min_length", "max_length")
    found = {name: getattr(each, name, None) for each in metadata for name in names if hasattr(each, name)}
    return {name: value for name, value in found.items() if value is not None}


def _allowed(slot: _Slot) -> str:
    """What to write in a place."""
    if slot.is_section:
        return f"a section of: {', '.join(slot.keys)}"
    kind = typing.get_origin(slot.kind) or slot.kind
    if kind is typing.Literal:
        return f"one of: {', '.join(map(str, typing.get_args(slot.kind)))}"
    least, most = slot.limits.get("min_length"), slot.limits.get("max_length")
    if kind is tuple:
        count = f" of {least}" if least else ""
        return f"a list{count}" + ("" if least == most else f" to {most}" if most else " or more" if least else "")
    if kind is dict:
        return "a section of names of your own, like {name: …}"
    texts = {
        bool: "true or false",
        str: "a text that is not empty" if least else "a text",
        Any: "a text, or a list of texts",
    }
    limits = [text.format(slot.limits[name]) for name, text in _LIMITS.items() if name in slot.limits]
    numbers = {int: "a whole number", float: "a number"}
    return texts.get(kind) or f"{numbers[kind]} {', '.join(limits)}".strip()


def _hint(value: Any, slot: _Slot) -> str:
    """How to write what is allowed, where the value shows what was meant."""
    kind = typing.get_origin(slot.kind) or slot.kind
    if value is None and slot.optional:
        return "; or leave it out"
    if kind is str and isinstance(value, bool | int | float):
        return f", in quotes: {json.dumps(str(value) if not isinstance(value, bool) else str(value).lower())}"
    if kind is str and isinstance(value, str) and value:
        return "; an escape in it stands for half a character"
    if kind is tuple and isinstance(value, str) and re.fullmatch(r"[\w./-]+", value):
        return f", like [{value}]"
    if kind in (int, float, bool) and isinstance(value, str):
        return ", without quotes"
    return _example(slot)


def _example(slot: _Slot) -> str:
    is_number = isinstance(slot.example, int | float) and not isinstance(slot.example, bool)
    return f", e.g. {slot.example}" if is_number else ""
