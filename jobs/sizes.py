"""What the steps of a plan take, as far as it is known without a sample: shards, rows, bytes, memory; and what cannot fit.

Arithmetic over a plan: neither Beam nor torch is imported, and no model loaded.
"""

import json
import math
import os
import resource
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc

from featurestore import encoders, indexes
from featurestore.catalog import Snapshot
from featurestore.corpora import ROWS
from featurestore.encoders import BaseEncoder
from featurestore.errors import InputError
from jobs import plan
from jobs.spec import Spec
from pipelines.sources.files import expand

__all__ = ["Size", "Sizes", "check_fits", "check_memory", "check_windows", "human", "peak_bytes", "worker_bytes"]

_READ_ROW_BYTES, _BUILD_ROW_BYTES = 1500, 200
"""Of each row of a view while it is read for an index, and of an index while it is built, beside its vector: ids, places and
digests. Builds of 80,000 vectors of 128 dimensions, exact, by graph and by lists, took 0.83 to 1.04 of what is told."""


class Size(NamedTuple):
    """What a step that is to do takes; None where that is not known, or not of its stage.

    Args:
        key: what it is of: an ingest, a recipe, or the settings of a build.
        rows: samples; of an index vectors, at most, as values may be missing.
        read_bytes: of raw values, or of the files of views.
        written_bytes: of what the catalog will name.
        vector_bytes: float32 [rows, dim].
        memory_bytes: of one worker: a model's weights, or what an index is built in.
        seconds: from the first shard's start to the last one's end, on a machine like this one.
        device: what is paid for: `cpu`, or the type of a GPU.
        hours: of a device; of `cpu`, those of its cores summed.
        note: more in words.
    """

    stage: str
    name: str
    key: str
    shards: int | None = None
    rows: int | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None
    vector_bytes: int | None = None
    memory_bytes: int | None = None
    seconds: float | None = None
    device: str = ""
    hours: float | None = None
    note: str = ""


class Sizes:
    """Sizes of the steps of a spec that are not fresh.

    Args:
        spec: what is planned.
        snapshot: the store's.
        steps: of the plan.
        found: what the source holds anew, as `plan.ingest` gives it.
    """

    def __init__(self, spec: Spec, snapshot: Snapshot, steps: Iterable[plan.Step], found: Any) -> None:
        self.spec, self.snapshot, self.found = spec, snapshot, found
        self.steps = [step for step in steps if step.state != plan.FRESH]
        self.views = {each.name: each for each in plan.view_plans(spec)}
        self.encoders: dict[str, BaseEncoder] = {
            name: encoders.find(view.encoder, view.options) for name, view in self.views.items()
        }
        stored = snapshot.table(ROWS, spec.corpus.name, None, ("rows",))["rows"]
        self.new_shards = _new_shards(spec, found)
        self.corpus_shards = len(stored) + self.new_shards
        self.corpus_rows = (pc.sum(stored).as_py() or 0) + found.samples - found.gone - found.changed

    def all(self) -> list[Size]:
        """In the order of the steps."""
        return [getattr(self, f"_{step.stage}")(step) for step in self.steps]

    def _shard(self, step: plan.Step) -> Size:
        found = self.found
        return Size("shard", step.name, found.key, self.new_shards, found.samples, found.bytes)

    def _encode(self, step: plan.Step) -> Size:
        encoder, rows = self.encoders[step.name], step.rows + self.found.samples
        return Size(
            "encode",
            step.name,
            self.views[step.name].recipe,
            step.todo + self.new_shards,
            rows,
            vector_bytes=4 * rows * encoder.dim,
            memory_bytes=sum(path.stat().st_size for path in encoder.weights().values()) or None,
            note=f"{encoder.dim} float32 a row",
        )

    def _align(self, step: plan.Step) -> Size:
        return Size("align", step.name, self._settings(step), rows=self.corpus_rows)

    def _index(self, step: plan.Step) -> Size:
        chosen = self.spec.indexes[step.name]
        rows, dim = dict.fromkeys(chosen.views, self.corpus_rows), self.space_dim(chosen.space, self.corpus_rows)
        return self.index(step.name, rows, dim)

    def index(self, name: str, rows: Mapping[str, int], dim: int) -> Size:
        """Of an index of so many vectors from each of its views. InputError where its rows cannot train it."""
        chosen, total = self.spec.indexes[name], max(1, sum(rows.values()))
        factory = indexes.choose_factory(total, dim, chosen.recall)
        try:
            indexes.check_factory(factory, total)
        except InputError as error:
            raise InputError(f"indexes.{name}: {error}") from None
        return Size(
            "index",
            name,
            settings_key(plan.build_settings(self.spec, "index")[name]),
            rows=total,
            written_bytes=indexes.size(factory, total, dim),
            vector_bytes=4 * total * dim,
            memory_bytes=_build_bytes(factory, dim, rows, {each: self.encoders[each].dim for each in chosen.views}),
            note=f"{factory} of {dim} dimensions",
        )

    def space_dim(self, space: str, unlike: int) -> int:
        """Of the vectors of a space that is learned from so many unlike values: what is asked for, or as many as there are."""
        chosen = self.spec.spaces[space]
        return max(1, min(chosen.dim, unlike - 1, *(self.encoders[name].dim for name in chosen.views)))

    def _fuse(self, step: plan.Step) -> Size:
        return Size("fuse", step.name, self._settings(step), rows=self.corpus_rows)

    def _settings(self, step: plan.Step) -> str:
        return settings_key(plan.build_settings(self.spec, step.stage)[step.name])


def settings_key(settings: Mapping[str, Any]) -> str:
    """The settings of a build as a text."""
    return json.dumps(settings, sort_keys=True)


def _new_shards(spec: Spec, found: Any) -> int:
    """About as many as the shard stage will cut, from rows and bytes; of adopted tars one each."""
    if not found.samples:
        return 0
    if spec.corpus.source.adopt:
        return min(int(found.samples), len(expand(spec.corpus.source.path)))
    full = max(found.samples / spec.corpus.shard_rows, found.bytes / (spec.corpus.shard_mb << 20))
    ranges: int = found.ranges(plan.corpus_dict(spec))
    return int(ranges * math.ceil(full / ranges))


def _build_bytes(factory: str, dim: int, rows: Mapping[str, int], dims: Mapping[str, int]) -> int:
    """What an index is built in, as `pipelines.index` goes about it.

    Either the largest view while it is read and projected (its matrix, its present rows, and those copied and centred), beside
    vectors that are there already; or the last view's matrix, the vectors as parts and joined, the index, and it as bytes
    twice, or, where something is tuned before, a trial index, an exact one and the vectors of one.
    """
    total = sum(rows.values())
    vectors, size = 4 * total * dim, indexes.size(factory, total, dim)
    views = {name: 4 * rows[name] * dims[name] for name in rows}
    largest = max(views, key=lambda name: views[name])
    reading = vectors * 3 // 2 + 4 * views[largest] + _READ_ROW_BYTES * rows[largest]
    more = 2 * size if factory == "Flat" else max(2 * size, size + 2 * vectors)
    building = [*views.values()][-1] + 2 * vectors + size + more + _BUILD_ROW_BYTES * total
    return max(reading, building)


def check_fits(spec: Spec, sizes: Iterable[Size]) -> None:
    """InputError where what will be written has no room in a store on this machine's disk."""
    written = sum(size.written_bytes or size.vector_bytes or 0 for size in sizes)
    if not spec.store.is_local or not written:
        return
    folder = next(each for each in [Path(spec.store.root), *Path(spec.store.root).parents] if each.exists())
    free = shutil.disk_usage(folder).free
    if written > free:
        raise InputError(
            f"store.uri {spec.store.uri}: {human(written)} are to be written and {human(free)} are free there; make room, or "
            "name a store elsewhere"
        )


def check_memory(spec: Spec, sizes: Iterable[Size]) -> None:
    """InputError where a step takes more memory than its worker has: what a view's `resources` name, else this machine's.

    Of a spec with views that name any, builds are not held against this machine: they run elsewhere.
    """
    here = memory_bytes()
    elsewhere = any(view.resources.model_dump(exclude_defaults=True) for view in spec.views.values())
    for size in sizes:
        has, where, place = here, "this machine has", f"indexes.{size.name}"
        mend = "leave views out, give the space fewer dimensions, or build it on a larger machine"
        if size.stage == "encode":
            resources, place = spec.views[size.name].resources, f"views.{size.name}"
            mend = "take a smaller model, or a larger machine"
            if resources.min_ram:
                has, where = ram_bytes(resources.min_ram), f"its resources.min_ram is {resources.min_ram},"
            elif elsewhere:
                continue
        elif elsewhere:
            continue
        if (size.memory_bytes or 0) > has:
            what = "the weights of its encoder have" if size.stage == "encode" else "building it takes about"
            raise InputError(f"{place}: {what} {human(size.memory_bytes or 0)}, and {where} {human(has)}; {mend}")


def check_windows(spec: Spec, encoders: Mapping[str, BaseEncoder]) -> None:
    """InputError where windows of recordings are shorter than what an encoder of their sounds takes."""
    windows = spec.corpus.source.windows
    length_ns = None if windows is None else windows.model_dump()["length"]
    for name, encoder in encoders.items():
        shortest_s = encoder.shortest_s
        if length_ns is not None and length_ns < 1e9 * shortest_s:
            raise InputError(
                f"corpus.source.windows: of {length_ns / 1e9:g} s, and views.{name} fills sounds shorter than {shortest_s:g} s "
                f"up with silence, which {encoder.key} would then describe; make them at least as long, or leave the view out"
            )


def worker_bytes(spec: Spec, view: str) -> int:
    """What one process that encodes a view may hold: its `resources.min_ram`, else this machine's memory."""
    wanted = spec.views[view].resources.min_ram
    return ram_bytes(wanted) if wanted else memory_bytes()


def memory_bytes() -> int:
    """This machine's memory, or what its control group may have of it."""
    limit = Path("/sys/fs/cgroup/memory.max")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    told = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(told)) if told.isdigit() else total


def peak_bytes() -> int:
    """The most memory that this process has held. Not getrusage's where there is another: that counts the parent's, from before
    exec.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def ram_bytes(text: str) -> int:
    """`16GB` in bytes."""
    number, unit = text.rstrip("MGTiB"), text.lstrip("0123456789")
    base, power = (1024 if "i" in unit else 1000), "MGT".index(unit[0]) + 2
    return int(int(number) * base**power)


def human(size: float) -> str:
    """Bytes in the unit that fits: `1.2 GB`."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.3g} {unit}"
