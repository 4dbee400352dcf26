"""Recordings whose files cannot be read for a while: nothing leaves the store, and what comes later takes its place."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featurestore.verify import verify
from jobs import plan
from jobs.report import rejected
from jobs.spec import load
from tests.conftest import Made
from tests.jobs.test_retry import retry, run
from tests.recordings import beeps, sensor_csv, write_sound

NAMES = ("a", "b", "c")
SECONDS = 6


def spec_text(corpus: Path, store: Path, windows: str = "{every: 1s}") -> str:
    return f"""\
version: 1
store: {{uri: {store}}}
corpus:
  name: planted
  source: {{type: streams, path: {corpus}/m.jsonl, windows: {windows}}}
  columns: {{id: id}}
  fields:
    sound: {{modality: audio, from: sound}}
    words: {{modality: text, from: words}}
    motion: {{modality: sensor, from: motion, policy: nearest, tolerance: 100ms}}
  shard_rows: 4
  failure_budget: 100%
"""


def write(folder: Path, names: tuple[str, ...]) -> None:
    """Sounds of 4.5 s, cues, and sensors of 6 s from 0 s on."""
    for name in names:
        write_sound(folder / f"{name}.wav", beeps(SECONDS - 1.5, noise=0.01))
        (folder / f"{name}.srt").write_text(
            "1\n00:00:00,000 --> 00:00:03,000\nfirst\n\n2\n00:00:03,500 --> 00:00:05,000\nsecond\n"
        )
        times = np.arange(0, SECONDS, 0.05)
        sensor_csv(folder / f"{name}.csv", times, np.stack([times, times], axis=1))


def manifest(folder: Path, names: tuple[str, ...]) -> None:
    rows = [{"id": name, "sound": f"{name}.wav", "words": f"{name}.srt", "motion": f"{name}.csv"} for name in names]
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Three recordings, the sound of `c` not there when they were stored. Read only."""
    folder = tmp_path_factory.mktemp("stored")
    made = Made(folder / "corpus", folder / "spec.yaml", folder / "store")
    made.corpus.mkdir()
    write(made.corpus, NAMES)
    manifest(made.corpus, NAMES)
    (made.corpus / "c.wav").rename(folder / "c.wav")
    made.spec.write_text(spec_text(made.corpus, made.store))
    run(made)
    return made


def step(made: Made) -> plan.Step:
    spec = load(made.spec)
    return plan.steps(spec, plan.open_catalog(spec.store))[0]


def rows(made: Made) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in made.open().corpus("planted").to_arrow().to_pylist()}


def test_a_recording_that_cannot_be_read_now_loses_nothing(stored: Made, tmp_path: Path) -> None:
    """The sensor is what reaches furthest: without it, the recording would have fewer windows, and without values."""
    made = stored.copy_to(tmp_path)
    before = made.open()
    assert step(made).state == plan.FRESH
    for name in ("a.csv", "b.wav"):
        (made.corpus / name).rename(tmp_path / name)
    found = step(made)
    assert (found.state, found.todo) == (plan.FRESH, 0)
    for name, file in (("a", "a.csv"), ("b", "b.wav"), ("c", "c.wav")):
        told = rf"recording '{name}' cannot be read as a whole now \(unreadable: {file}: No such file or directory\): what is"
        assert re.search(told, found.why), found.why
    write(made.corpus, ("d",))
    manifest(made.corpus, (*NAMES, "d"))
    (made.corpus / "b.srt").write_text("1\n00:00:00,000 --> 00:00:06,000\nwaits until b can be read as a whole\n")
    assert step(made).why.startswith("samples: 6 new; recording 'a' cannot be read")
    run(made)
    after = made.open().corpus("planted")
    assert after.gone == {}
    assert {*before.corpus("planted").shards} < {*after.shards}
    assert sum(name.startswith("d/") for name in rows(made)) == SECONDS
    for name in ("a.csv", "b.wav"):
        (tmp_path / name).rename(made.corpus / name)
    assert re.match(r"samples: 6 changed; recording 'c'", step(made).why), "b.srt is another"


def test_a_value_that_is_not_looked_at_to_cut_windows_is_not_given_up_either(stored: Made, tmp_path: Path) -> None:
    made = stored.copy_to(tmp_path)
    made.spec.write_text(spec_text(made.corpus, tmp_path / "other", "{per: words}"))
    made = made._replace(store=tmp_path / "other")
    run(made)
    (made.corpus / "a.csv").unlink()
    assert step(made).state == plan.FRESH
    sensor_csv(made.corpus / "a.csv", np.arange(0, SECONDS, 0.05), np.zeros((SECONDS * 20, 2)))
    assert step(made).why.startswith("samples: 2 changed")


def test_a_stream_that_was_mended_takes_its_place_in_every_window(stored: Made, tmp_path: Path) -> None:
    made = stored.copy_to(tmp_path)
    before, old = made.open().corpus("planted"), rows(made)
    assert [row["reason"] for row in rejected(made.open(), "planted")] == ["unreadable"] * SECONDS
    (made.corpus / "c.wav").write_bytes((stored.spec.parent / "c.wav").read_bytes())
    assert f"shard planted: {SECONDS} values tried, {SECONDS} in now, 0 in quarantine" in retry(made)
    after, new = made.open().corpus("planted"), rows(made)
    assert [(each.shard, each.ids_sha256) for each in after.shards] == [
        (each.shard, each.ids_sha256) for each in before.shards
    ]
    assert after.gone == {}
    assert new.keys() == old.keys()
    for number in range(SECONDS):
        mended, like = (new[f"{name}/{number:07d}"] for name in ("c", "a"))
        assert mended["sound"]["present"] == like["sound"]["present"] == (number < SECONDS - 1)
        for key in ("digest", "miss_reason"):
            assert mended["sound"][key] == like["sound"][key]
        assert mended["sound_residual_ns"] == like["sound_residual_ns"] == (0 if number < SECONDS - 1 else None)
        assert mended["motion"] | {"offset": 0, "source": ""} == old[mended["id"]]["motion"] | {
            "offset": 0,
            "source": "",
        }
    assert step(made).state == plan.FRESH
    assert verify(made.open().storage).ok
