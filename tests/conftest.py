"""Planted corpora and complete stores, made once for all tests that only read them."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest

from featurestore.store import FeatureStore
from tests.planted import SHARD_ROWS, planted_spec, write_planted

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# How long an example takes is the machine's business: a busy one is no failure.
hypothesis.settings.register_profile("braid", deadline=None)
hypothesis.settings.load_profile("braid")


class Made(NamedTuple):
    """A corpus, its spec, and the store that `braid run` made of it; what that took is in `run.json` beside the spec."""

    corpus: Path
    spec: Path
    store: Path

    def open(self, version: int | None = None) -> FeatureStore:
        return FeatureStore(self.store, version)

    def copy_to(self, folder: Path) -> "Made":
        """The same in a folder of its own, files' times included, for a test that changes something."""
        copy = Made(folder / "corpus", folder / "spec.yaml", folder / "store")
        shutil.copytree(self.corpus, copy.corpus)
        shutil.copytree(self.store, copy.store)
        text = self.spec.read_text().replace(str(self.corpus), str(copy.corpus))
        copy.spec.write_text(text.replace(str(self.store), str(copy.store)))
        return copy


def check_same(found: FeatureStore, expected: FeatureStore) -> None:
    """Fails where two stores differ in anything but their history, and says in which entries."""
    differ = set(found.snapshot.all()) ^ set(expected.snapshot.all())
    assert not differ, "\n".join(map(str, sorted(differ)))
    assert found.digest() == expected.digest()


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """160 samples in 20 shards: images, captions, notes, sounds; 4 views, 3 spaces, 3 indexes, a training set. Read only."""
    return _make(tmp_path_factory.mktemp("made"), 160, full_spec)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """48 samples in 6 shards and nothing but sounds: what runs in seconds. Read only; `copy_to` to change it."""
    return _make(tmp_path_factory.mktemp("small"), 48, small_spec)


def _make(folder: Path, samples: int, spec_of: Callable[[Path, Path], str]) -> Made:
    # Here, so that tests which need no store do not wait for Beam.
    from rich.console import Console

    from jobs.run import Runner
    from jobs.spec import load

    made = Made(folder / "corpus", folder / "spec.yaml", folder / "store")
    write_planted(made.corpus, samples)
    made.spec.write_text(spec_of(made.corpus, made.store))
    Runner(load(made.spec), Console(quiet=True), metrics=folder / "run.json").run()
    return made


def full_spec(corpus: Path, store: Path) -> str:
    """The planted spec and a second view of the sounds, with a space and an index of both."""
    text = planted_spec(corpus, store)
    for section, more in (
        ("spaces", "  timbre: {field: sound, encoder: mfcc}\n"),
        ("indexes", "  sounds: {views: [sound, timbre], method: cca}\n"),
        ("training_sets", "  sounds: {space: sounds, views: [sound, timbre]}\n"),
    ):
        text = text.replace(f"{section}:\n", f"{more}{section}:\n")
    return text


def small_spec(corpus: Path, store: Path) -> str:
    """Three views of the sounds; of the spaces, indexes and sets, one each has `loud` and one has not."""
    return f"""\
version: 1
store: {{uri: {store}}}
corpus:
  name: planted
  source: {{type: manifest, path: {corpus}/manifest.jsonl}}
  columns: {{id: id, group: group, event_timestamp: added}}
  fields:
    caption: {{modality: text, from: caption}}
    sound: {{modality: audio, from: sound_path}}
  shard_rows: {SHARD_ROWS}
views:
  loud: {{field: sound, encoder: log-mel, options: {{batch_size: 32}}}}
  timbre: {{field: sound, encoder: mfcc}}
  short: {{field: sound, encoder: mfcc, options: {{n_mfcc: 8}}}}
spaces:
  heard: {{views: [loud, timbre], method: cca, dim: 8}}
  other: {{views: [timbre, short], method: cca, dim: 8}}
indexes:
  heard: {{space: heard, views: [loud, timbre]}}
  other: {{space: other, views: [short]}}
training_sets:
  heard: {{views: [loud, timbre], label: label, splits: {{train: 0.6, test: 0.4}}}}
  other: {{views: [short], label: label, splits: {{train: 0.6, test: 0.4}}}}
"""
