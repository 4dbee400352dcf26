"""`braid plan`: the steps that are to do and why, what each takes, and what cannot fit."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from featurestore.catalog import Catalog
from featurestore.errors import InputError
from jobs import plan, sizes
from jobs.report import counted
from jobs.sizes import Size, Sizes, human
from jobs.spec import Prices, Spec
from jobs.spec_mistakes import document, dotted
from jobs.spec_shape import of_shape

__all__ = ["read_prices", "show"]

_NOTHING = "Everything is fresh: `braid run` computes nothing."


def show(spec: Spec, console: Console, sample: int | None, prices: Mapping[str, float]) -> None:
    """Prints the plan; with a sample, what that gives more, which is kept in the store for the run.

    Raises:
        InputError: a step cannot fit this machine, or the store's disk; the plan is printed first.
    """
    snapshot = Catalog(spec.store).peek()
    found = plan.ingest(spec, snapshot)
    steps = plan.steps(spec, snapshot, found)
    console.print(_steps(steps))
    if unlisted := plan.unlisted(spec, snapshot):
        console.print(f"Kept in the store, but not in the spec: {', '.join(unlisted)}.")
    todo = Sizes(spec, snapshot, steps, found)
    if not todo.steps:
        console.print(_NOTHING)
        return
    console.print(f"{len(todo.steps)} of {counted(len(steps), 'step')} to run\n")
    sizes.check_windows(spec, todo.encoders)
    made = todo.all()
    _check(spec, made)
    remarks: list[str] = []
    if sample is not None:
        from jobs import forecast, preflight

        made, remarks = preflight.measured(todo, made, sample)
    console.print(_sizes(made, prices, sample is not None))
    for line in (*remarks, *_totals(made, prices)):
        console.print(line, markup=False)
    if sample is not None:
        _check(spec, made)
        forecast.save(spec.store, made)


def _check(spec: Spec, made: list[Size]) -> None:
    sizes.check_memory(spec, made)
    sizes.check_fits(spec, made)


def _steps(steps: list[plan.Step]) -> Table:
    table = Table("stage", "name", "state", "to do", "why", box=None, pad_edge=False)
    for step in steps:
        todo = f"{step.todo} of {step.total}" if step.state != plan.FRESH else ""
        table.add_row(step.stage, step.name, step.state, todo, step.why)
    return table


def _sizes(made: list[Size], prices: Mapping[str, float], sampled: bool) -> Table:
    columns = [
        "stage",
        "name",
        "shards",
        "rows",
        "reads",
        "writes" if sampled else "vectors",
        "memory",
        *_TIMED * sampled,
    ]
    table = Table(*columns, "", box=None, pad_edge=False)
    for each in made:
        written = each.written_bytes if sampled else each.vector_bytes
        cells = [each.stage, each.name, _or(each.shards, str), _or(each.rows, str)]
        cells += [_or(size, human) for size in (each.read_bytes, written, each.memory_bytes)]
        if sampled:
            cells += [_or(each.seconds, lasting), _or(each.hours, lambda hours, of=each.device: _hours(hours, of))]
            cells.append(_or(_price(each, prices), "{:.3g}".format))
        table.add_row(*cells, each.note)
    return table


_TIMED = ["time here", "hours", "price"]


def _or(value: Any, told: Any) -> str:
    return "" if value is None else str(told(value))


def _hours(hours: float, device: str) -> str:
    return f"{hours:.3g} {'core' if device == 'cpu' else device}"


def lasting(seconds: float) -> str:
    """`40 s`, `12 min`, `3.2 h`."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def _price(each: Size, prices: Mapping[str, float]) -> float | None:
    return each.hours * prices[each.device] if each.hours is not None and each.device in prices else None


def _totals(made: list[Size], prices: Mapping[str, float]) -> Iterator[str]:
    devices = sorted({each.device for each in made if each.hours is not None})
    for device in devices:
        hours = sum(each.hours or 0 for each in made if each.device == device)
        what = "core" if device == "cpu" else device
        cost = (
            f"{hours * prices[device]:.3g} at {prices[device]:g} an hour" if device in prices else "no price is given"
        )
        yield f"{hours:.3g} {what} hours: {cost}"


def read_prices(path: Path) -> Prices:
    """What `--prices` names: YAML or JSON, `{nvidia-l4: 0.70, cpu: 0.05}`. InputError says what is wrong, by line."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prices {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    tree = document(text)
    told = [f"line {mistake.line}: {mistake.text}" for mistake in tree.mistakes]
    prices: Prices = {}
    if tree.readable:
        try:
            prices = TypeAdapter(Prices).validate_python(tree.value, strict=True)
        except ValidationError as error:
            told += [f"line {each.line}: {dotted(each.place)}: {each.text}" for each in of_shape(error, Prices, tree)]
    if told:
        raise InputError(
            f"--prices {path}: {'; '.join(told)}; write what an hour costs, like {{nvidia-l4: 0.70, cpu: 0.05}}"
        )
    return prices
