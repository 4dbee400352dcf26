"""Bars: each a ratio measured in one run, written to build/bench-<area>.json and printed; a missed bar is said as missed."""

import json
from pathlib import Path
from typing import Any, NamedTuple

OUT = Path("build")


class Bar(NamedTuple):
    """One measured bar: `value` against `bar`, which it has to reach."""

    area: str
    name: str
    value: float
    bar: float
    ok: bool
    detail: dict[str, Any]


def at_least(area: str, name: str, value: float, bar: float, **detail: Any) -> Bar:
    """A bar that a value has to reach or pass."""
    return Bar(area, name, round(value, 4), bar, value >= bar, detail)


def at_most(area: str, name: str, value: float, bar: float, **detail: Any) -> Bar:
    """A bar that a value must not pass."""
    return Bar(area, name, round(value, 4), bar, value <= bar, detail)


def write(area: str, bars: list[Bar]) -> Path:
    """Writes an area's bars and prints a line for each."""
    OUT.mkdir(exist_ok=True)
    path = OUT / f"bench-{area}.json"
    path.write_text(json.dumps([bar._asdict() for bar in bars], indent=1) + "\n")
    for bar in bars:
        print(
            f"{'ok    ' if bar.ok else 'MISSED'} {bar.area} {bar.name}: {bar.value:.3f} against {bar.bar:.3f}  {bar.detail}"
        )
    return path
