"""The streams source end to end: a spec, its shard stage, and what stands in the store, against recordings of known truth."""

import datetime
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from featurestore import artefact
from featurestore.catalog import Catalog
from featurestore.corpora import QUARANTINE, Corpus
from featurestore.errors import InputError, SpecError
from featurestore.media import decode_sensor
from featurestore.row_order import BY_ID
from featurestore.storage import Storage
from featurestore.verify import verify
from jobs import spec as specs
from jobs.plan import corpus_dict
from pipelines.ingest import Known, scan
from pipelines.sources import Missing, Sample, open_source
from pipelines.sources.files import FileValue
from pipelines.sources.stored import StoredShards
from tests.faults.stores import shard_corpus
from tests.recordings import (
    FRAME_NS,
    RATE,
    SECOND,
    beeps,
    frame_number,
    frame_times,
    sensor_csv,
    video,
    write_sound,
)  # fmt: skip

SECONDS = 6
OFFSET_S, DRIFT_PPM, START_S = 0.237, 40.0, 1.4
STARTED = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
SRT = """1
00:00:01,500 --> 00:00:02,250
a <i>first</i> cue

2
00:00:03,000 --> 00:00:05,500
a second

"""
FIELDS = """
    frame: {modality: image, from: video, policy: nearest, tolerance: 17ms}
    sound: {modality: audio, from: sound, clock: {offset: 237ms, drift: 40ppm}}
    words: {modality: text, from: words}
    motion: {modality: sensor, from: motion, policy: linear, tolerance: 20ms, clock: {unit: s}}
"""


def spec_text(folder: Path, fields: str = FIELDS, windows: str = "{every: 1s, length: 2s}") -> str:
    return f"""\
version: 1
store: {{uri: {folder}/store}}
corpus:
  name: talks
  source: {{type: streams, path: {folder}/recordings.jsonl, windows: {windows}}}
  columns: {{id: id, event_timestamp: start}}
  fields: {fields}
  shard_rows: 5
  failure_budget: 100%
"""


def settings(folder: Path, fields: str = FIELDS, windows: str = "{every: 1s, length: 2s}") -> dict[str, Any]:
    return corpus_dict(specs.parse(spec_text(folder, fields, windows), "spec.yaml"))


def write_manifest(folder: Path, **columns: str | None) -> None:
    row = {"id": "talk", "start": "2026-01-01T00:00:00Z", "room": "blue", **columns}
    (folder / "recordings.jsonl").write_text(json.dumps(row) + "\n")


def sensor_at(time_s: np.ndarray) -> np.ndarray:
    return np.stack([np.sin(2 * time_s), time_s], axis=1)


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of 6 s: video from 1.4 s on of which every tenth frame is lost, sound on another clock, two cues, 100 Hz."""
    folder = tmp_path_factory.mktemp("talk")
    video(folder / "talk.mp4", frame_times(SECONDS, start_s=START_S, drop=0.1))
    write_sound(folder / "talk.wav", beeps(SECONDS + START_S, offset_s=OFFSET_S, drift_ppm=DRIFT_PPM))
    (folder / "talk.srt").write_text(SRT)
    times = 1.0 + np.sort(np.arange(0, SECONDS, 0.01) + np.random.default_rng(1).uniform(-0.003, 0.003, SECONDS * 100))
    sensor_csv(folder / "talk.csv", times, sensor_at(np.round(times, 9)))
    write_manifest(folder, video="talk.mp4", sound="talk.wav", words="talk.srt", motion="talk.csv")
    return folder


def samples(corpus: dict[str, Any]) -> list[Sample]:
    source = open_source(corpus)
    return list(source.samples(source.references()))


def fetched(sample: Sample, field: str) -> bytes:
    value = sample.values[field]
    assert value is not None
    assert not isinstance(value, Missing), value
    return value.fetch()


def reason(sample: Sample, field: str) -> str:
    value = sample.values[field]
    return value.reason if isinstance(value, Missing) else ""


def test_a_spec_of_streams_becomes_aligned_samples_in_the_store(talk: Path, tmp_path: Path) -> None:
    corpus, storage = settings(talk), Storage.of(tmp_path / "store")
    shard_corpus(storage, corpus)
    stored = Corpus(Catalog(storage).snapshot(), "talks")
    ticks = frame_times(SECONDS, start_s=START_S, drop=0.1)
    frames_ns = ticks * SECOND / 30_000
    rows = [
        (row, {field: stored.value(entry.shard, number, field) for field in ("frame", "sound", "words", "motion")})
        for entry in stored.shards
        for number, row in enumerate(stored.read(entry.shard).to_pylist())
    ]
    assert [row["id"] for row, _ in rows] == [f"talk/{number:07d}" for number in range(len(rows))]
    assert [(row["begin_ns"], row["end_ns"]) for row, _ in rows] == [
        (n * SECOND, (n + 2) * SECOND) for n in range(len(rows))
    ]
    assert {(row["group"], row["room"]) for row, _ in rows} == {("talk", "blue")}
    said = {"": 0}
    for row, values in rows:
        anchor = row["begin_ns"] + SECOND
        assert row["event_timestamp"] == STARTED + datetime.timedelta(microseconds=anchor // 1000)
        nearest = int(np.argmin(np.abs(frames_ns - anchor)))
        if abs(frames_ns[nearest] - anchor) <= 17e6:
            assert values["frame"] is not None
            assert frame_number(values["frame"]) == nearest
            assert row["frame_residual_ns"] == round(frames_ns[nearest] - anchor)
        else:
            assert row["frame"]["miss_reason"] in ("out_of_tolerance", "not_started", "stream_ended")
            assert row["frame_residual_ns"] is None
        if values["motion"] is not None:
            found = decode_sensor(values["motion"])
            assert found.shape == (1, 2)
            assert np.abs(found - sensor_at(np.array([anchor / SECOND]))).max() < 2e-3
        cues = [
            text
            for start, end, text in ((1.5, 2.25, "a <i>first</i> cue"), (3.0, 5.5, "a second"))
            if start * SECOND < row["end_ns"] and end * SECOND > row["begin_ns"]
        ]
        assert (values["words"] or b"").decode() == "\n".join(cues)
        said[row["words"]["miss_reason"] or ""] = said.get(row["words"]["miss_reason"] or "", 0) + 1
    assert said == {"": 6, "stream_ended": len(rows) - 6}
    assert sum(values["frame"] is not None for _, values in rows) >= 4
    assert sum(values["motion"] is not None for _, values in rows) >= 5
    assert storage.list("quarantine") == {}
    assert verify(storage, level="rows").ok


def test_a_clip_of_sound_holds_the_samples_of_its_window_on_the_recordings_clock(talk: Path) -> None:
    whole = beeps(SECONDS + START_S, offset_s=OFFSET_S, drift_ppm=DRIFT_PPM)
    stored, rate = soundfile.read(talk / "talk.wav", dtype="int16")
    assert (len(stored), rate) == (len(whole), RATE)
    own_s = np.arange(len(stored)) / RATE
    time_ns = (own_s * SECOND + OFFSET_S * SECOND) * (1 + DRIFT_PPM / 1e6)
    for sample in samples(settings(talk)):
        begin, end = sample.columns["begin_ns"], sample.columns["end_ns"]
        inside = np.flatnonzero((time_ns >= begin - 0.5) & (time_ns < end - 0.5))
        clip, _ = soundfile.read(io.BytesIO(fetched(sample, "sound")), dtype="int16")
        assert np.array_equal(clip, stored[inside])
        assert abs(sample.columns["sound_residual_ns"] - (time_ns[inside[0]] - begin)) <= 2


def test_planning_again_and_running_again_give_the_same(talk: Path, tmp_path: Path) -> None:
    corpus = settings(talk)
    first, second = (list(open_source(corpus).references()) for _ in range(2))
    assert first == second
    assert all(reference.bytes > 0 for reference in first)
    for name in ("a", "b"):
        shard_corpus(Storage.of(tmp_path / name), corpus)
    a, b = (Catalog(Storage.of(tmp_path / name)).snapshot() for name in ("a", "b"))
    assert sorted(a.all()) == sorted(b.all())
    wider = list(open_source(settings(talk, windows="{every: 1s, length: 3s}")).references())
    assert {each.etag for each in first}.isdisjoint(each.etag for each in wider), "another cut is another sample"


def test_any_choice_of_windows_gives_each_the_same_value(talk: Path) -> None:
    """Shards hold some windows of a recording: what they hold must not depend on which."""
    source = open_source(settings(talk))
    references = list(source.references())
    whole = {sample.id: sample for sample in source.samples(references)}
    for chosen in (references[3:5], references[::3], references[::-1]):
        for sample in source.samples(chosen):
            assert sample.columns == whole[sample.id].columns
            for field in ("frame", "sound", "words", "motion"):
                assert reason(sample, field) == reason(whole[sample.id], field)
                if not reason(sample, field):
                    assert fetched(sample, field) == fetched(whole[sample.id], field)


def test_windows_asked_for_one_by_one_take_one_pass(talk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As planning does to tell files that were only touched from others: not one pass for each window."""
    source = open_source(settings(talk))
    references = list(source.references())
    whole = list(source.samples(references))
    opened: list[str] = []
    real = FileValue.open
    monkeypatch.setattr(FileValue, "open", lambda self: opened.append(self.source) or real(self))
    for reference, expected in zip(references, whole, strict=True):
        (sample,) = source.samples([reference])
        assert sample.columns == expected.columns
        assert sample.id == expected.id
        for field in expected.values:
            assert reason(sample, field) == reason(expected, field)
            if not reason(sample, field):
                assert fetched(sample, field) == fetched(expected, field)
    assert len(opened) <= 20
    (again,) = source.samples([references[2]])
    assert again.columns == whole[2].columns


def test_touched_files_are_no_change_and_another_cue_is(talk: Path, tmp_path: Path) -> None:
    for path in talk.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    corpus, storage = settings(tmp_path), Storage.of(tmp_path / "store")
    shard_corpus(storage, corpus)
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    catalog = Catalog(storage)
    found = scan(open_source(corpus), Known(catalog.snapshot(), "talks"))
    assert (found.samples, found.changed, found.gone) == (0, 0, 0)
    (tmp_path / "talk.srt").write_text(SRT.replace("a second", "another"))
    changed = scan(open_source(corpus), Known(catalog.snapshot(), "talks"))
    spoken = sum(
        reference.columns["end_ns"] > 3e9 and reference.columns["begin_ns"] < 5.5e9 for reference in samples(corpus)
    )
    assert (changed.changed, changed.gone) == (spoken, 0)


def test_compacted_shards_keep_why_a_value_is_not_there(talk: Path, tmp_path: Path) -> None:
    storage = Storage.of(tmp_path / "store")
    shard_corpus(storage, settings(talk))
    snapshot = Catalog(storage).snapshot()
    stored = Corpus(snapshot, "talks")
    shards = [entry.shard for entry in stored.shards]
    source = StoredShards(snapshot, "talks", shards, BY_ID)
    found = {sample.id: sample for sample in source.samples(source.references())}
    said = set()
    for row in stored.to_arrow().to_pylist():
        for field in ("frame", "sound", "words", "motion"):
            assert reason(found[row["id"]], field) == (row[field]["miss_reason"] or "")
            said.add(row[field]["miss_reason"])
    assert {None, "stream_ended", "not_started"} <= said


def test_a_window_for_each_cue(talk: Path) -> None:
    first, second = samples(settings(talk, windows="{per: words}"))
    assert [(each.columns["begin_ns"], each.columns["end_ns"]) for each in (first, second)] == [
        (1_500_000_000, 2_250_000_000), (3_000_000_000, 5_500_000_000),
    ]  # fmt: skip
    assert [fetched(each, "words").decode() for each in (first, second)] == ["a <i>first</i> cue", "a second"]
    frames_ns = frame_times(SECONDS, start_s=START_S, drop=0.1) * SECOND / 30_000
    assert frame_number(fetched(first, "frame")) == int(np.argmin(np.abs(frames_ns - 1.875e9)))


def test_what_is_nearest_is_within_half_a_frame(tmp_path: Path) -> None:
    """And `round(t x average rate)`, as tools count frames, is far off where frames are lost and the video starts late."""
    ticks = frame_times(40, start_s=START_S, drop=0.1)
    video(tmp_path / "v.mp4", ticks)
    write_manifest(tmp_path, video="v.mp4")
    fields = "{frame: {modality: image, from: video, tolerance: 100ms}}"
    found = samples(settings(tmp_path, fields, "{every: 50ms}"))
    residuals = np.array([each.columns["frame_residual_ns"] for each in found if not reason(each, "frame")])
    assert len(residuals) > 700
    gaps = np.diff(ticks) * SECOND / 30_000
    assert np.percentile(np.abs(residuals), 99) <= np.percentile(gaps, 99) / 2 + 1
    assert np.percentile(np.abs(residuals), 89) <= FRAME_NS / 2 + 1
    anchors = np.array([each.columns["begin_ns"] + 25_000_000 for each in found if not reason(each, "frame")])
    counted = np.clip(np.round((anchors / SECOND) * len(ticks) / 40).astype(int), 0, len(ticks) - 1)
    naive = np.abs(ticks[counted] * SECOND / 30_000 - anchors)
    assert naive.mean() > 300e6 > 20 * np.abs(residuals).mean()


def test_linear_readings_err_a_fifth_of_the_nearest_at_most(talk: Path) -> None:
    errors = {}
    for policy in ("linear", "nearest"):
        fields = f"{{motion: {{modality: sensor, from: motion, policy: {policy}, tolerance: 20ms, channels: x}}}}"
        found = [each for each in samples(settings(talk, fields, "{every: 7ms}")) if not reason(each, "motion")]
        assert len(found) > 800
        anchors = np.array([each.columns["begin_ns"] + 3_500_000 for each in found]) / SECOND
        values = np.array([decode_sensor(fetched(each, "motion"))[0, 0] for each in found])
        errors[policy] = np.sqrt(np.mean((values - np.sin(2 * anchors)) ** 2))
    assert errors["linear"] <= errors["nearest"] / 5


def test_a_clock_is_measured_from_what_is_seen_and_heard(tmp_path: Path) -> None:
    seconds = 40
    video(tmp_path / "v.mp4", frame_times(seconds, start_s=START_S, drop=0.1), noise=70)
    write_sound(tmp_path / "s.wav", beeps(seconds + START_S, offset_s=OFFSET_S, drift_ppm=DRIFT_PPM, noise=0.177))
    write_manifest(tmp_path, video="v.mp4", sound="s.wav")
    fields = """
    frame: {modality: image, from: video, tolerance: 50ms}
    sound: {modality: audio, from: sound, clock: {estimate: from frame}}
    """
    found = samples(settings(tmp_path, fields))
    (told,) = {tuple(each.columns[f"sound_{key}"] for key in ("offset_ns", "certainty")) for each in found}
    assert abs(told[0] - 237e6) < 5e6
    assert told[1] > 10
    assert not any(reason(each, "sound") for each in found[2:-2])


def test_what_has_nothing_in_common_gets_no_clock(talk: Path, tmp_path: Path) -> None:
    write_sound(tmp_path / "noise.wav", np.random.default_rng(0).normal(0, 0.1, 20 * RATE).astype(np.float32))
    video(tmp_path / "v.mp4", frame_times(20), lit=lambda time_s: np.sin(time_s * 7) > 0.3)
    write_manifest(tmp_path, video="v.mp4", sound="noise.wav")
    fields = """
    frame: {modality: image, from: video, tolerance: 50ms}
    sound: {modality: audio, from: sound, clock: {estimate: from frame}}
    """
    found = samples(settings(tmp_path, fields))
    assert {reason(each, "sound") for each in found} == {"no_clock"}
    assert {each.columns["sound_offset_ns"] for each in found} == {None}


def quarantined(storage: Storage) -> dict[tuple[str, str], str]:
    rows = [
        row
        for entry in Catalog(storage).snapshot().entries(QUARANTINE, "shard/talks")
        for row in artefact.read_table(storage.read(entry.path)).to_pylist()
    ]
    return {(row["id"], row["field"]): f"{row['reason']}: {row['detail']}" for row in rows}


@pytest.mark.parametrize(
    ("spoil", "field", "told"),
    [
        (lambda folder: (folder / "talk.csv").write_text("time,x,y\n1.0,0,0\n2.0,0,0\n1.5,0,0\n6.0,0,0\n"), "motion",
         r"unsorted_times: talk\.csv, row 3: 1500000000 ns after 2000000000 ns; sort the file by 'time'"),
        (lambda folder: (folder / "talk.csv").write_text("time,x,y\n1.0,0,0\n2.0,zero,0\n6.0,0,0\n"), "motion",
         r"decode_error: talk\.csv: .*invalid value 'zero'"),
        (lambda folder: (folder / "talk.csv").write_text("t,x\n1.0,0\n"), "motion",
         r"decode_error: talk\.csv: column 'time' is there 0 times; columns: \['t', 'x'\]"),
        (lambda folder: (folder / "talk.csv").unlink(), "motion", r"unreadable: talk\.csv: No such file"),
        (lambda folder: (folder / "talk.mp4").write_bytes(b"no video at all" * 99), "frame", r"decode_error: talk\.mp4: "),
        (lambda folder: (folder / "talk.wav").write_bytes(b""), "sound", r"decode_error: talk\.wav: "),
        (lambda folder: (folder / "talk.srt").write_bytes(b"\xff\xff\xff"), "words", r"invalid_utf8: talk\.srt: byte 0"),
        (lambda folder: (folder / "talk.srt").write_text("no cues"), "words", r"unsupported_format: talk\.srt: no cue"),
    ],
)  # fmt: skip
def test_a_stream_that_breaks_is_quarantined_and_the_others_live(
    talk: Path, tmp_path: Path, spoil: Any, field: str, told: str
) -> None:
    for path in talk.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    spoil(tmp_path)
    storage = Storage.of(tmp_path / "store")
    shard_corpus(storage, settings(tmp_path))
    rejected = quarantined(storage)
    assert rejected
    assert {name for _, name in rejected} == {field}
    assert all(re.match(told, each) for each in rejected.values()), rejected
    stored = Corpus(Catalog(storage).snapshot(), "talks").to_arrow().to_pylist()
    others = {"frame", "sound", "words", "motion"} - {field}
    assert all(sum(row[other]["present"] for row in stored) >= 4 for other in others)
    assert verify(storage, level="rows").ok
    for row in stored:
        assert row[field]["present"] or row[field]["miss_reason"] in (
            "not_started", "stream_ended", "out_of_tolerance",
        ) or (row["id"], field) in rejected  # fmt: skip


def test_a_video_without_sound_has_none_and_one_that_is_cut_gives_what_is_there(tmp_path: Path) -> None:
    video(tmp_path / "v.mp4", frame_times(8), options=None)
    whole = video(tmp_path / "v.mkv", frame_times(8), codec="ffv1").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    write_manifest(tmp_path, video="cut.mkv", sound="v.mp4")
    fields = """
    frame: {modality: image, from: video, tolerance: 50ms}
    sound: {modality: audio, from: sound}
    """
    found = samples(settings(tmp_path, fields, "{every: 1s}"))
    assert {reason(each, "sound") for each in found} == {"no_stream"}
    there = [each for each in found if not reason(each, "frame")]
    assert 2 <= len(there) <= 5
    for each in there:
        assert abs(frame_number(fetched(each, "frame")) * FRAME_NS - each.columns["begin_ns"] - SECOND / 2) < FRAME_NS
    assert {reason(each, "frame") for each in found[len(there) :]} == {"stream_ended"}


def test_a_recording_that_nothing_can_be_cut_from_is_one_sample_that_says_so(tmp_path: Path) -> None:
    write_manifest(tmp_path, words="gone.srt")
    fields = "{words: {modality: text, from: words}}"
    for windows in ("{every: 1s}", "{per: words}"):
        (sample,) = samples(settings(tmp_path, fields, windows))
        with pytest.raises(Exception, match=r"unreadable: gone\.srt"):
            fetched(sample, "words")


def test_a_clock_that_makes_more_windows_than_a_recording_can_have_is_told(talk: Path) -> None:
    fields = FIELDS.replace("{unit: s}", "{unit: s, offset: 50 h}")
    with pytest.raises(InputError, match=r"recording 'talk': its streams reach from .* correct the unit or the offset"):
        list(open_source(settings(talk, fields, "{every: 10ms}")).references())


@pytest.mark.parametrize(
    ("fields", "windows", "told"),
    [
        (FIELDS, "{every: 1}", r"source\.windows\.every: 1 is wrong: write a number and its unit"),
        (FIELDS, "{every: -1s}", r"source\.windows\.every: '-1s' is wrong: write a time above 0, like 20ms"),
        (FIELDS, "{every: 0.1ns}", r"write whole nanoseconds"),
        (FIELDS, "{evry: 1s}", r"windows\.evry: is not a key .*; allowed: every, length, per, anchor; did you mean"),
        (FIELDS.replace("drift:", "drft:"), "{every: 1s}", r"clock\.drft: .*allowed: unit, offset, drift, estimate; did"),
        (FIELDS.replace("{unit: s}", "seconds"), "{every: 1s}", r"motion\.clock: 'seconds' is no section; allowed keys"),
        (FIELDS, "{every: 1s, per: words}", r"write \{every: 1s, length: 2s\}, or \{per: FIELD, length: 2s\}"),
        (FIELDS, "{every: 1s, anchor: middle}", r"windows\.anchor: 'middle' is not allowed here; allowed: begin, centre, end"),
        (FIELDS, "{per: motion}", r"windows\.per: 'motion' is a sensor, whose readings are moments: add a length"),
        (FIELDS, "{per: word}", r"windows\.per: 'word' is no text or sensor field .*did you mean 'words'"),
        (FIELDS.replace("17ms", "17"), "{every: 1s}", r"frame\.tolerance: 17 is wrong: write a number and its unit"),
        (FIELDS.replace(", tolerance: 17ms", ""), "{every: 1s}", r"fields\.frame: policy nearest needs a tolerance"),
        (FIELDS.replace("40ppm", "40"), "{every: 1s}", r"sound\.clock\.drift: 40 is wrong: write parts per million"),
        (FIELDS.replace("nearest", "linear"), "{every: 1s}", r"'linear' is not for image; allowed: nearest, previous"),
        (FIELDS.replace("offset: 237ms", "estimate: from words"), "{every: 1s}",
         r"'words' is no other image, audio or sensor field .*allowed: frame, motion"),
        (FIELDS.replace("offset: 237ms", "estimate: from frame"), "{every: 1s}",
         r"sound\.clock\.drift: is measured with the offset"),
        (FIELDS.replace("modality: image", "modality: video"), "{every: 1s}",
         r"frame\.modality: 'video' is for whole files; a window has a frame of a video: write modality: image"),
        (FIELDS.replace("offset: 237ms", "estimate: frame"), "{every: 1s}", r"write from and the name of a field"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_spec_of_streams_is_told_with_its_mend(
    tmp_path: Path, fields: str, windows: str, told: str
) -> None:
    with pytest.raises(SpecError, match=told):
        specs.parse(spec_text(tmp_path, fields, windows), "spec.yaml")


def test_only_streams_have_windows_and_clocks(tmp_path: Path) -> None:
    text = spec_text(tmp_path).replace("type: streams", "type: manifest")
    with pytest.raises(SpecError, match=r"source\.windows: only recordings are cut into windows") as error:
        specs.parse(text, "spec.yaml")
    assert "fields.sound.clock: only timed streams have it: write type: streams" in str(error.value)
