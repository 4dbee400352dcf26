"""What is wrong with the options of an encoder, in the words of a spec."""

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from featurestore.addresses import redacted

__all__ = ["option_errors"]


def option_errors(key: str, known: Mapping[str, Any], error: ValidationError) -> str:
    """Everything that is wrong with an encoder's options, and all that it takes.

    Args:
        key: the encoder's.
        known: the JSON schema of each option that it has.
        error: what pydantic found.
    """
    wrong = []
    for found in error.errors():
        name, value = str(found["loc"][0]), redacted(repr(found["input"]))
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        if found["type"] == "missing":
            wrong.append(f"option {name!r} is missing")
            continue
        told = f"does not exist{hint}" if found["type"] == "extra_forbidden" else "is not allowed"
        wrong.append(f"option {name!r} = {value if len(value) <= 80 else value[:76] + ' ...'} {told}")
    allowed = "; ".join(f"{name} ({_what_it_takes(about)})" for name, about in known.items())
    return f"encoder {key!r}: {'; '.join(wrong)}; allowed: {allowed}"


def _what_it_takes(about: Mapping[str, Any]) -> str:
    """An option's type, range, meaning and default, from its JSON schema."""
    kinds = [each for each in about.get("anyOf", [about]) if each.get("type") != "null"]
    limits = [f"{word} {kinds[0][name]}" for word, name in (("from", "minimum"), ("to", "maximum")) if name in kinds[0]]
    kind = " or ".join(map(str, kinds[0]["enum"])) if "enum" in kinds[0] else str(kinds[0]["type"])
    default = f", default {about['default']}" if about.get("default") is not None else ""
    needed = "" if "default" in about else ", needed"
    return f"{' '.join([kind, *limits])}{default}{needed}: {about['description']}"
