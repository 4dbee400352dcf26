"""Timed streams: a manifest of recordings, each several files of one thing, cut into windows: one sample a window.

The manifest's columns are as `manifest` reads them; a field's `from` names the column of its file. A sample's id is
`<recording>/<number of the window>`, its group the recording's, its `event_timestamp` the window's anchor where the manifest
tells the recording's start. Kept beside the manifest's columns are

- `begin_ns` and `end_ns` of the window on the recording's clock;
- for each field `<field>_residual_ns`;
- of sound and of policy `overlap` `<field>_covered_ns`, how much of the window what is there covers: less than the window where
  a sound begins late or ends early, or where nothing is said;
- of a clock that is measured, `<field>_offset_ns`, `<field>_drift_ppm`, `<field>_offset_error_ns`, `<field>_certainty` and
  `<field>_ambiguous_ns`, as `synchronize.clocks.Estimate` tells them. Of a beep each second the last is 1 s: the clock may as
  well be off by whole seconds. Which it is, a `clock.offset` tells that is given beside `estimate`, right to half a second.

How many windows a recording has is known from the headers of its files (the cues, the times of a sensor, and the packets of a
file whose header is not trusted to say how long it is, are read for it: `container.header`) and never from a measured clock:
planning decodes nothing. Where one of these files cannot be read now, how a recording is cut is not known either: what is
stored of it stays as it is until it can, and is told in `remarks`.
"""

import itertools
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from featurestore.errors import DecodeError, InputError
from featurestore.identity import check_id, digest_of
from featurestore.row_order import BY_ID
from featurestore.storage import Storage
from pipelines import sources
from pipelines.sources import Sample, SampleRef, Source
from pipelines.sources.files import FileValue
from pipelines.synchronize.clock_store import ClockStore
from pipelines.synchronize.clocks import METHOD, Estimate
from pipelines.synchronize.recording import Recording, Window

BATCH = 256
"""Recordings that are read from the manifest at once."""

_TOLD_DOUBTS = 3
"""So many recordings that cannot be read now are told one by one."""

_AHEAD = 16
"""So many recordings are opened ahead of the one whose windows are asked for."""


def open_source(corpus: dict[str, Any]) -> Source:
    """The recordings that a corpus's `source.path` names."""
    return Streams(corpus)


def filled(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields with what their spec leaves out."""
    clock = {"unit": "s", "offset": 0, "drift": 0.0, "estimate": None}
    return {
        name: {"policy": DEFAULT_POLICY[field["modality"]], "tolerance": None, "staleness": None}
        | {"time": "time", "channels": None}
        | field
        | {"clock": {**clock, **(field.get("clock") or {})}}
        for name, field in fields.items()
    }


DEFAULT_POLICY = {"image": "nearest", "audio": "window", "text": "overlap", "sensor": "window"}


class _Cut(NamedTuple):
    """A reference to a recording as those to its windows are, but for their ids; how many there are; what cannot be read."""

    recording: SampleRef
    windows: int
    unread: DecodeError | None


class _Pass(NamedTuple):
    """A pass over a recording that can go on from its window `next`."""

    recording: SampleRef
    next: int
    samples: Iterator[Sample]


class Streams:
    """Recordings.

    Clocks that are measured are kept in the store that the source names, and taken from there; where it names none, or has not
    got them, every pass over a recording measures them.
    """

    order = BY_ID

    def __init__(self, corpus: dict[str, Any]) -> None:
        self._fields, self._windows = filled(corpus["fields"]), corpus["source"]["windows"]
        files = {
            name: {"modality": field["modality"], "from": field["from"], "read": "file"}
            for name, field in self._fields.items()
        }
        self._measured = [name for name, field in self._fields.items() if field["clock"]["estimate"] is not None]
        self._covering = [
            name for name, field in self._fields.items() if field["modality"] == "audio" or field["policy"] == "overlap"
        ]
        self._about = {name: self._columns_about(name) for name in self._fields}
        store = corpus["source"].get("store")
        self._clocks = ClockStore(Storage.from_json(store), corpus["name"]) if store else None
        self._thread = threading.local()
        self._doubts: dict[str, DecodeError] = {}
        self._recordings = sources.open_source(
            {**corpus, "source": {**corpus["source"], "type": "manifest"}, "fields": files}
        )

    def remarks(self) -> list[str]:
        """What the manifest of the recordings has to say, and which of them cannot be read now."""
        doubts = [
            f"recording {name!r} cannot be read as a whole now ({error}): what is stored of it stays as it is"
            for name, error in itertools.islice(self._doubts.items(), _TOLD_DOUBTS)
        ]
        if len(self._doubts) > _TOLD_DOUBTS:
            doubts.append(f"nor can {len(self._doubts) - _TOLD_DOUBTS} more recordings")
        return [*self._recordings.remarks(), *doubts]

    def whole(self) -> bool:
        """Whether all of that manifest was there."""
        return self._recordings.whole()

    def in_doubt(self, sample_id: str) -> bool:
        """Whether a window's recording cannot be read as a whole now."""
        return sample_id.rpartition("/")[0] in self._doubts

    def references(self) -> Iterator[SampleRef]:
        """Every window; InputError names a recording of too many windows, or whose columns stand for ours."""
        self._doubts = {}
        waiting: deque[Future[_Cut]] = deque()
        with ThreadPoolExecutor(_AHEAD) as pool:
            for reference, sample in self._rows():
                waiting.append(pool.submit(self._cut, reference, sample))
                if len(waiting) >= _AHEAD:
                    yield from self._numbered(waiting.popleft().result())
            while waiting:
                yield from self._numbered(waiting.popleft().result())

    def _numbered(self, cut: "_Cut") -> Iterator[SampleRef]:
        if cut.unread is not None:
            self._doubts[cut.recording.id] = cut.unread
        for number in range(cut.windows):
            yield cut.recording._replace(id=_id(cut.recording.id, number))

    def _rows(self) -> Iterator[tuple[SampleRef, Sample]]:
        found = self._recordings.references()
        while batch := list(itertools.islice(found, BATCH)):
            yield from zip(batch, self._recordings.samples(batch), strict=True)

    def _cut(self, reference: SampleRef, sample: Sample) -> "_Cut":
        if clash := sorted((sample.columns.keys() | self._fields.keys()) & self._own_columns()):
            raise InputError(
                f"{self._recordings.place(reference)}: a column or field {clash[0]!r} would stand for a window's own column; "
                "rename it"
            )
        recording = self._recording(sample)
        etag, size = digest_of(reference.etag, self._windows), recording.bytes_per_window()
        check_id(_id(sample.id, 0), self._recordings.place(reference))
        count = sum(len(chunk.begin_ns) for chunk in recording.windows())
        return _Cut(reference._replace(etag=etag, bytes=size), count, recording.unread)

    def _recording(self, sample: Sample) -> Recording:
        files = {name: value if isinstance(value, FileValue) else None for name, value in sample.values.items()}
        return Recording(sample.id, files, self._fields, self._windows)

    def columns(self) -> set[str]:
        """Names of the manifest's columns, and of those that a window has."""
        return self._recordings.columns() | self._own_columns()

    def kept(self) -> set[str]:
        """What is kept of the manifest's columns, and a window's own."""
        return self._recordings.kept() | self._own_columns()

    def _own_columns(self) -> set[str]:
        return {"begin_ns", "end_ns"}.union(*self._about.values())

    def _columns_about(self, name: str) -> list[str]:
        """Those that tell of a field's value, and are null while it has none."""
        covered = [f"{name}_covered_ns"] if name in self._covering else []
        told = [f"{name}_{each}" for each in _TOLD] if name in self._measured else []
        return [f"{name}_residual_ns", *covered, *told]

    def unmatched(self) -> dict[str, str]:
        """Field -> its `from`, of the fields that no recording has a column of."""
        return self._recordings.unmatched()

    def place(self, reference: SampleRef) -> str:
        """The manifest, the recording's line and the window."""
        recording, number = _parts(reference)
        return f"{self._recordings.place(recording)}, window {number}"

    def samples(self, references: Iterable[SampleRef]) -> Iterator[Sample]:
        """Some windows, in the order given. Each stretch of one recording that ascends takes one pass over its files."""
        for stretch in _stretches(references):
            if len(stretch) == 1:
                yield self._one(stretch[0])
            else:
                yield from self._read(stretch[0], [_parts(reference)[1] for reference in stretch])

    def _read(self, first: SampleRef, numbers: Sequence[int]) -> Iterator[Sample]:
        """Windows of the recording that a window is of, by their numbers."""
        recording_ref, _ = _parts(first)
        (sample,) = self._recordings.samples([recording_ref])
        recording = self._recording(sample)
        if self._clocks is not None and self._measured:
            recording.estimates |= self._clocks.get(self._clock_key(recording_ref)) or {}
        for window in recording.read(numbers):
            columns = self._columns_of(sample, recording, window)
            window_id = _id(sample.id, window.number)
            yield Sample(window_id, sample.group, first.etag, columns, window.values, self._about)

    def _one(self, reference: SampleRef) -> Sample:
        """One window. Who asks for one after the other, to compare them with what is stored, goes on in the same pass."""
        recording, number = _parts(reference)
        held: _Pass | None = getattr(self._thread, "held", None)
        if held is None or held.recording != recording or held.next > number:
            count = sum(len(chunk.begin_ns) for chunk in self._opened(recording).windows())
            held = _Pass(recording, number, self._read(reference, range(number, max(count, number + 1))))
        self._thread.held = held._replace(next=number + 1)
        return next(sample for sample in held.samples if sample.id == reference.id)

    def _opened(self, recording: SampleRef) -> Recording:
        (sample,) = self._recordings.samples([recording])
        return self._recording(sample)

    def _columns_of(self, sample: Sample, recording: Recording, window: Window) -> dict[str, Any]:
        columns = {**sample.columns, "begin_ns": window.begin_ns, "end_ns": window.end_ns}
        if (start := sample.columns.get("event_timestamp")) is not None:
            columns["event_timestamp"] = start + window.anchor_ns
        columns |= {f"{name}_residual_ns": residual for name, residual in window.residual_ns.items()}
        columns |= {f"{name}_covered_ns": window.covered_ns[name] for name in self._covering}
        for name in self._measured:
            columns |= {f"{name}_{key}": told for key, told in _told(recording.estimates.get(name)).items()}
        return columns

    def measures(self) -> bool:
        """Whether a clock is measured."""
        return bool(self._measured)

    def to_measure(self, references: Iterable[SampleRef]) -> Iterator[SampleRef]:
        """The recordings of some windows, each once where its windows follow each other."""
        for recording, _ in itertools.groupby(references, lambda reference: _parts(reference)[0]):
            yield recording

    def measure(self, recording: SampleRef) -> None:
        """Measures the clocks of a recording, unless the store has them, and keeps them there."""
        assert self._clocks is not None, "clocks are measured for the store that the source names"
        key = self._clock_key(recording)
        if self._clocks.get(key) is None:
            opened = self._opened(recording)
            opened.measure()
            self._clocks.put(key, opened.estimates)

    def _clock_key(self, recording: SampleRef) -> str:
        return digest_of(recording.id, recording.etag, self._fields, METHOD)


_TOLD = ("offset_ns", "drift_ppm", "offset_error_ns", "certainty", "ambiguous_ns")


def _told(found: object) -> dict[str, Any]:
    if not isinstance(found, Estimate):
        return dict.fromkeys(_TOLD)
    clock = found.clock
    values = (clock.offset_ns, clock.drift_ppm, found.offset_error_ns, found.certainty, found.ambiguous_ns)
    return dict(zip(_TOLD, values, strict=True))


def _id(recording: str, number: int) -> str:
    # As many digits as MAX_WINDOWS needs: ids ascend with time.
    return f"{recording}/{number:07d}"


def _parts(reference: SampleRef) -> tuple[SampleRef, int]:
    """The reference of a window's recording, and the window's number."""
    recording, _, number = reference.id.rpartition("/")
    return reference._replace(id=recording), int(number)


def _stretches(references: Iterable[SampleRef]) -> Iterator[list[SampleRef]]:
    """References of one recording whose windows ascend, as long as they do."""
    stretch: list[SampleRef] = []
    for reference in references:
        if stretch and (reference[4:] != stretch[-1][4:] or reference.id <= stretch[-1].id):
            yield stretch
            stretch = []
        stretch.append(reference)
    if stretch:
        yield stretch
