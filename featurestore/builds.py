"""Builds: spaces, indexes and training sets, each one immutable result of its settings and of the bytes it was made from.

A build's key is a hash of (settings, the inputs' sha256s in order), known before it is made. A build is stale when the key
computed from the catalog as it is now is another one: a remade input with the same bytes leaves it fresh.
"""

from typing import Any, NamedTuple

import pyarrow.compute as pc

from featurestore.catalog import Entry, Snapshot
from featurestore.corpora import ROWS
from featurestore.errors import NotFound
from featurestore.identity import digest_of
from featurestore.tombstones import TOMBSTONES
from featurestore.views import VIEW, covers

SPACE, INDEX, TRAINING = "space", "index", "training"
BUILDS = (SPACE, INDEX, TRAINING)
NAMES = {SPACE: "space", INDEX: "index", TRAINING: "training set"}
FOLDERS = {SPACE: "spaces", INDEX: "indexes", TRAINING: "training"}
VERSION = 3
"""Part of every build's key: raise it when what a build computes changes."""


class Build(NamedTuple):
    """A build's identity. `settings` are JSON values: what the spec says, plus `corpus`."""

    kind: str
    name: str
    settings: dict[str, Any]
    key: str

    @property
    def stem(self) -> str:
        """Where the build's files are."""
        return f"{FOLDERS[self.kind]}/{self.name}/{self.key}"


def plan(snapshot: Snapshot, kind: str, name: str, settings: dict[str, Any]) -> Build:
    """The build that these settings give on the snapshot; NotFound where an input is not there or not whole."""
    return Build(kind, name, settings, digest_of(VERSION, kind, settings, _inputs(snapshot, kind, settings)))


def made_from(snapshot: Snapshot, entry: Entry) -> Snapshot | None:
    """The newest version, this or an earlier one, at which the inputs were those that a build was made from.

    A build is read and proven beside these: they stay as they were, while what is there now goes on.

    Args:
        snapshot: where to begin.
        entry: a file of the build.

    Returns:
        None where no such version is found.
    """
    settings = entry.info()["settings"]

    def fresh(at: Snapshot) -> bool:
        try:
            return plan(at, entry.kind, entry.name, settings).key == entry.recipe
        except NotFound:
            return False

    return snapshot.last(fresh)


def grown(before: Snapshot, now: Snapshot, settings: dict[str, Any]) -> bool:
    """Whether all that a build's views had at an earlier version is there now as it was: samples only came or went."""
    for view in settings["views"]:
        was, there = (each.table(VIEW, view, columns=("sha256",))["sha256"] for each in (before, now))
        if not pc.all(pc.is_in(was, there)).as_py():
            return False
    return True


def files(snapshot: Snapshot, kind: str, name: str) -> dict[str, Entry]:
    """The files of a build: place in the build (`index`, `card` …) -> entry. NotFound lists the names there are."""
    if kind not in BUILDS:
        raise NotFound(f"no builds of kind {kind!r}; allowed: {', '.join(BUILDS)}")
    entries = {entry.shard: entry for entry in snapshot.entries(kind, name)}
    if not entries:
        raise NotFound(
            f"no {NAMES[kind]} {name!r} in {snapshot.storage.uri}; it has: {', '.join(snapshot.names(kind)) or 'none'}"
        )
    return entries


def stale(snapshot: Snapshot) -> list[tuple[Entry, str]]:
    """Builds of the catalog whose inputs have changed since: (one entry of the build, why)."""
    found = []
    for kind in BUILDS:
        for name in snapshot.names(kind):
            entry = snapshot.entries(kind, name)[0]
            try:
                now = plan(snapshot, kind, name, entry.info()["settings"]).key
            except NotFound as error:
                found.append((entry, f"an input is gone: {error}"))
                continue
            if now != entry.recipe:
                found.append((entry, f"made from inputs that have changed since (build {entry.recipe}, now {now})"))
    return found


def _inputs(snapshot: Snapshot, kind: str, settings: dict[str, Any]) -> list[str]:
    shards = snapshot.table(ROWS, settings["corpus"], columns=("sha256",))
    inputs: list[str] = [] if kind == INDEX else shards["sha256"].to_pylist()
    inputs += snapshot.table(TOMBSTONES, settings["corpus"], columns=("sha256",))["sha256"].to_pylist()
    if kind == INDEX:
        space = snapshot.entries(SPACE, settings["space"])
        if not space:
            raise NotFound(f"space {settings['space']!r} is not there yet")
        inputs += [entry.sha256 for entry in space if entry.shard == "space"]
    for view in settings["views"]:
        made = snapshot.table(VIEW, view, columns=("sha256",))
        if not covers(snapshot, view, settings["corpus"]):
            raise NotFound(f"view {view!r} does not cover corpus {settings['corpus']!r} yet")
        inputs += made["sha256"].to_pylist()
    return inputs
