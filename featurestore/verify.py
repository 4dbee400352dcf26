"""Proves that every artefact that a store's catalog names is whole and aligned: row i of shard s is the same sample in all.

Three levels, each with those before it: `footers` (files, sizes and what footers claim), `rows` (ids, input digests and row
digests of every row, every member of every tar, every vector of every index), `bytes` (sha256 of every file).

What is proven falls into units that know nothing of each other, so that a large store can be proven by as many workers as
there are: `units` lists them, `inspect` proves one. A broken store never makes an exception of itself: all is a finding.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from featurestore import artefact, builds, views
from featurestore.build_inspection import index_build, plain_build, space_build
from featurestore.catalog import Catalog, Entry, Snapshot
from featurestore.corpora import MEDIA, QUARANTINE, ROWS, Corpus
from featurestore.encoders import fingerprint_of
from featurestore.errors import BraidError, InputError, NotFound
from featurestore.id_inspection import id_index, tombstone_file
from featurestore.identity import hash64
from featurestore.ids import IDS
from featurestore.inspection import LEVELS, Finding, Inspection, corpus_shard, view_shard
from featurestore.storage import Storage
from featurestore.tombstones import TOMBSTONES, gone_rows
from featurestore.training_inspection import training_build

__all__ = ["LEVELS", "Finding", "Outcome", "Report", "Unit", "catalog_findings", "inspect", "units", "verify"]

THREADS = 2


class Unit(NamedTuple):
    """Files that must agree with each other, proven by one worker.

    `entries` are by kind: of a corpus shard its rows, tar and quarantine; of a view's shard itself, the rows beside it and
    its quarantine; of a build all its files; and one of any other file.
    """

    kind: str
    name: str
    entries: tuple[Entry, ...]

    def one(self, kind: str) -> Entry | None:
        """The unit's file of a kind."""
        return next((entry for entry in self.entries if entry.kind == kind), None)


@dataclass(frozen=True)
class Outcome:
    """What the inspection of one unit gave; `ids` are the hash64 of a corpus shard's ids."""

    findings: tuple[Finding, ...]
    files: int
    rows: int
    file_bytes: int
    ids: bytes = b""


@dataclass(frozen=True)
class Report:
    """What does not hold in a store at a version; all holds where there are no findings."""

    store: str
    version: int
    level: str
    findings: tuple[Finding, ...]
    artefacts: tuple[tuple[str, int], ...]
    rows: int
    file_bytes: int

    @property
    def ok(self) -> bool:
        """Whether all holds."""
        return not self.findings

    def lines(self) -> Iterator[str]:
        """The report for a person: each finding, then what was proven."""
        yield from map(str, self.findings)
        files = ", ".join(f"{count} {kind}" for kind, count in self.artefacts) or "no files"
        yield (
            f"{self.store} version {self.version}, level {self.level}: {files}; {self.rows} rows read, "
            f"{self.file_bytes / 1e6:.1f} MB; " + (f"findings: {len(self.findings)}" if self.findings else "all holds")
        )


def verify(storage: Storage, version: int | None = None, level: str = "bytes") -> Report:
    """Proves a store at a version (the newest where None) and reports what does not hold.

    Memory: the largest shard twice, 8 bytes for each sample, and the largest index.

    Raises:
        InputError: another level than `footers`, `rows`, `bytes`.
        NotFound: there is no store at the address, or it has no such version.
    """
    if level not in LEVELS:
        raise InputError(f"level {level!r} is not allowed; one of: {', '.join(LEVELS)}")
    try:
        snapshot = Catalog(storage).snapshot(version)
        entries = snapshot.all()
    except NotFound:
        raise
    except Exception as error:
        # A damaged Delta log or file: Rust's, Arrow's and JSON's errors.
        unread = f"the catalog cannot be read: {type(error).__name__}: {error}"
        mend = "read an earlier version (`braid history`), or restore the folder `catalog`"
        finding = Finding("catalog", storage.uri, "", "catalog", unread, mend)
        return Report(storage.uri, -1 if version is None else version, level, (finding,), (), 0, 0)
    todo = units(entries)
    with ThreadPoolExecutor(THREADS) as pool:
        outcomes = list(pool.map(lambda unit: inspect(snapshot, unit, level), todo))
    findings = [*catalog_findings(snapshot), *_repeated_ids(snapshot, todo, outcomes)]
    findings += [finding for outcome in outcomes for finding in outcome.findings]
    return Report(
        storage.uri,
        snapshot.version,
        level,
        tuple(findings),
        tuple(sorted(Counter(entry.kind for entry in entries).items())),
        sum(outcome.rows for outcome in outcomes),
        sum(outcome.file_bytes for outcome in outcomes),
    )


def units(entries: Iterable[Entry]) -> list[Unit]:
    """All that a catalog names, cut into units; each file is the subject of one."""
    made, shards, rejected, files = [], defaultdict(list), {}, []
    rows: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        if entry.kind in (ROWS, MEDIA):
            shards[entry.name, entry.shard].append(entry)
            if entry.kind == ROWS:
                rows[entry.name, entry.shard] = entry
        elif entry.kind == QUARANTINE:
            rejected[entry.name, entry.recipe, entry.shard] = entry
        else:
            files.append(entry)
    for (name, shard), own in shards.items():
        bad = rejected.pop((f"shard/{name}", "", shard), None)
        made.append(Unit(ROWS, name, (*own, bad) if bad else tuple(own)))
    whole = defaultdict(list)
    corpora = {lineage: _corpus_of(lineage) for lineage in {entry.lineage for entry in files}}
    for entry in files:
        if entry.kind != views.VIEW:
            shard = entry.shard if entry.kind in (IDS, TOMBSTONES) else ""
            whole[entry.kind, entry.name, entry.recipe, shard].append(entry)
            continue
        beside = rows.get((corpora[entry.lineage], entry.shard))
        bad = rejected.pop((f"encode/{entry.name}", entry.recipe, entry.shard), None)
        made.append(Unit(views.VIEW, entry.name, tuple(each for each in (entry, beside, bad) if each)))
    made += [Unit(kind, name, tuple(own)) for (kind, name, *_), own in whole.items()]
    return made + [Unit(QUARANTINE, entry.name, (entry,)) for entry in rejected.values()]


def _corpus_of(lineage: str) -> str:
    """The corpus that a view's lineage names; none where it cannot be read, which `catalog_findings` tells."""
    try:
        return str(json.loads(lineage)["corpus"])
    except (ValueError, KeyError, TypeError):
        return ""


def inspect(snapshot: Snapshot, unit: Unit, level: str) -> Outcome:
    """Proves one unit. Raises nothing for what is broken in it."""
    look = Inspection(snapshot.storage, level)
    ids: list[str] = []
    with look.guard(unit.entries[0]):
        ids = _inspect(look, snapshot, unit)
    hashes = np.array([hash64(each) for each in ids], np.uint64).tobytes()
    return Outcome(tuple(look.findings), look.files, look.rows, look.file_bytes, hashes)


def _inspect(look: Inspection, snapshot: Snapshot, unit: Unit) -> list[str]:
    rows, quarantine = unit.one(ROWS), unit.one(QUARANTINE)
    if unit.kind == ROWS and rows is not None:
        # Of values outside the store, those of samples that are gone or changed may be too.
        outside = look.reads("bytes") and rows.info()["settings"]["media"] == "reference"
        gone = gone_rows(snapshot, unit.name).get(rows.shard, ()) if outside else ()
        return corpus_shard(look, rows, unit.one(MEDIA), quarantine, {int(row) for row in gone})
    if unit.kind == views.VIEW and rows is not None:
        view_shard(look, unit.entries[0], rows, quarantine)
    elif unit.kind in builds.BUILDS:
        proof = {builds.SPACE: space_build, builds.INDEX: index_build, builds.TRAINING: training_build}[unit.kind]
        made_from = builds.made_from(snapshot, unit.entries[0]) or snapshot
        proof(look, made_from, {entry.shard: entry for entry in unit.entries})
    elif unit.kind in (IDS, TOMBSTONES):
        (id_index if unit.kind == IDS else tombstone_file)(look, snapshot, unit.entries[0])
    else:
        plain_build(look, unit.entries)
    return []


def catalog_findings(snapshot: Snapshot) -> list[Finding]:
    """What does not hold in the catalog by itself, no file opened."""
    look = Inspection(snapshot.storage, LEVELS[0])
    entries = snapshot.all()
    _unique(look, entries)
    for name in sorted({entry.name for entry in entries if entry.kind in (ROWS, MEDIA)}):
        _tars(look, snapshot, name)
    for name in snapshot.names(views.VIEW):
        first = snapshot.entries(views.VIEW, name)[0]
        with look.guard(first):
            _recipe(look, snapshot, name)
            _covers(look, snapshot, name)
    for kind in builds.BUILDS:
        for name in snapshot.names(kind):
            with look.guard(snapshot.entries(kind, name)[0], "`braid run` completes what it is made from"):
                _fresh(look, snapshot, kind, name)
    return look.findings


def _unique(look: Inspection, entries: list[Entry]) -> None:
    keys = Counter(entry.key for entry in entries)
    paths: dict[str, Entry] = {}
    for entry in entries:
        first = paths.setdefault(entry.path, entry)
        if keys[entry.key] > 1:
            look.say(entry, f"stands {keys[entry.key]} times in the catalog")
        elif first is not entry:
            look.say(entry, f"is the same file as {first.kind} {first.name}, shard {first.shard}")
        if not artefact.is_named_for(entry.path, entry.sha256):
            look.say(entry, f"its name does not end in its sha256 ({entry.sha256[:8]})")


def _tars(look: Inspection, snapshot: Snapshot, name: str) -> None:
    rows = {entry.shard: entry for entry in snapshot.entries(ROWS, name)}
    tars = {entry.shard: entry for entry in snapshot.entries(MEDIA, name)}
    for shard in sorted(rows.keys() | tars.keys()):
        if shard not in tars and not rows[shard].input_sha256:
            continue
        if shard not in tars:
            look.say(rows[shard], "the catalog has its rows and no tar")
        elif shard not in rows:
            look.say(tars[shard], "the catalog has its tar and no rows")
        else:
            for of_rows, of_tar, what in (
                ("ids_sha256", "ids_sha256", "ids"),
                ("rows", "rows", "number of rows"),
                ("input_sha256", "sha256", "sha256"),
            ):
                if getattr(rows[shard], of_rows) != getattr(tars[shard], of_tar):
                    look.say(rows[shard], f"its tar in the catalog has another {what} than its rows say")


def _of_the_view(entry: Entry) -> dict[str, Any]:
    """What a view's row of the catalog says that is the same of all its shards."""
    return {name: each for name, each in entry.info().items() if name not in ("tried", "batches_halved")}


def _recipe(look: Inspection, snapshot: Snapshot, name: str) -> None:
    """One recipe over all shards of a view, and it is that of the field and of the encoder's fingerprint."""
    entries = snapshot.entries(views.VIEW, name)
    first = _of_the_view(entries[0])
    for entry in entries:
        info = entry.info()
        encoder = info["encoder"]
        if entry.recipe != entries[0].recipe or _of_the_view(entry) != first:
            look.say(entry, f"made by another encoder than shard {entries[0].shard} (recipe {entry.recipe})")
        if (
            fingerprint_of({key: each for key, each in encoder.items() if key != "fingerprint"})
            != encoder["fingerprint"]
        ):
            look.say(entry, f"the encoder's fingerprint {encoder['fingerprint'][:16]}… is not that of its card")
        if views.recipe(info["field"], encoder["fingerprint"]) != entry.recipe:
            look.say(entry, f"recipe {entry.recipe} is not that of its field and its encoder's fingerprint")


def _covers(look: Inspection, snapshot: Snapshot, name: str) -> None:
    """A shard of the view for every shard of its corpus, and no other."""
    entries = snapshot.entries(views.VIEW, name)
    info = entries[0].info()
    shards = [entry.shard for entry in snapshot.entries(ROWS, info["corpus"])]
    if not shards:
        look.say(entries[0], f"its corpus {info['corpus']!r} is not in the catalog")
        return
    fields = Corpus(snapshot, info["corpus"]).fields
    modality = "+".join(str(fields.get(name)) for name in views.fields_of(info["field"]))
    if modality != info["encoder"]["modality"]:
        look.say(
            entries[0], f"reads field {info['field']!r} as {info['encoder']['modality']}; the corpus has {modality}"
        )
    if missing := sorted(set(shards) - {entry.shard for entry in entries}):
        first = entries[0]._replace(shard=missing[0], path=f"views/{name}/{entries[0].recipe}")
        more = f", nor {len(missing) - 1} more" if len(missing) > 1 else ""
        incomplete = f"incomplete: the corpus has {len(shards)} shards, and the view has not this one{more}"
        look.say(first, incomplete, mend="`braid run` encodes what is missing")
    for entry in entries:
        if entry.shard not in shards:
            look.say(entry, "the corpus has no such shard", mend="`braid history`: read a version before it came in")


def _fresh(look: Inspection, snapshot: Snapshot, kind: str, name: str) -> None:
    """A build is that of its inputs as they are now. Of what is not encoded yet its view's own finding tells."""
    entries = snapshot.entries(kind, name)
    if len({entry.recipe for entry in entries}) > 1:
        look.say(entries[-1], "two builds of one name stand in the catalog")
    settings = entries[0].info()["settings"]
    encoded = {*snapshot.names(views.VIEW)}.intersection(settings["views"])
    if not all(views.covers(snapshot, view, settings["corpus"]) for view in encoded):
        return
    now = builds.plan(snapshot, kind, name, settings).key
    if now != entries[0].recipe:
        stale = f"stale: its inputs have changed since it was built (they give build {now})"
        look.say(entries[0], stale, mend="`braid run` builds it again")


def _repeated_ids(snapshot: Snapshot, todo: list[Unit], outcomes: list[Outcome]) -> list[Finding]:
    """Ids that stand in two shards of a corpus and are not gone: found by their hashes, named by reading those shards again."""
    look = Inspection(snapshot.storage, LEVELS[0])
    by_corpus: dict[str, list[tuple[Entry, np.ndarray]]] = defaultdict(list)
    for unit, outcome in zip(todo, outcomes, strict=True):
        if outcome.ids:
            by_corpus[unit.name].append((unit.entries[0], np.frombuffer(outcome.ids, np.uint64)))
    for corpus, shards in by_corpus.items():
        try:
            gone = gone_rows(snapshot, corpus)
        except BraidError:
            gone = {}  # told where the tombstones themselves are inspected
        hashes, counts = np.unique(
            np.concatenate([np.delete(each, gone.get(entry.shard, [])) for entry, each in shards]), return_counts=True
        )
        repeated = hashes[counts > 1]
        seen: dict[int, tuple[str, int]] = {}
        for entry, own in shards if len(repeated) else ():
            for row in np.setdiff1d(np.flatnonzero(np.isin(own, repeated)), gone.get(entry.shard, [])).tolist():
                first = seen.setdefault(int(own[row]), (entry.shard, row))
                if first != (entry.shard, row):
                    look.say(entry, f"its id stands in shard {first[0]}, row {first[1]}, too", row)
    return look.findings
