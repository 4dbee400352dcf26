"""What is to be done: pure functions from a spec, a snapshot of the catalog and a listing of the store.

Nothing here runs a pipeline. `braid plan` prints the steps, `braid run` carries out those that are not fresh.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from featurestore import builds
from featurestore.catalog import Catalog, Snapshot, lost
from featurestore.corpora import MEDIA, QUARANTINE, ROWS
from featurestore.errors import InputError, NotFound, StoreError
from featurestore.ids import IDS
from featurestore.storage import Storage
from featurestore.tombstones import TOMBSTONES
from featurestore.views import VIEW
from jobs.report import counted
from jobs.spec import Spec
from pipelines import encode_plan
from pipelines.ingest import Ingest, Known, scan
from pipelines.sources import Source, open_source

STAGES = ("shard", "encode", "align", "index", "fuse")
BUILD_STAGES = {"align": builds.SPACE, "index": builds.INDEX, "fuse": builds.TRAINING}

FRESH, STALE, PENDING = "fresh", "stale", "pending"
"""A pending step is stale only if an earlier one gives other bytes than before."""

GONE = "a file of it is gone or has another size"


class Step(NamedTuple):
    """One job: `todo` of `total` shards (of builds: 0 or 1 of 1), and why; `rows` are those of its shards to encode."""

    stage: str
    name: str
    state: str
    todo: int
    total: int
    why: str
    rows: int = 0


def open_catalog(storage: Storage) -> Snapshot:
    """The store's newest snapshot; the store is made where there is none."""
    catalog = Catalog(storage)
    catalog.create()
    return catalog.snapshot()


def corpus_dict(spec: Spec) -> dict[str, Any]:
    """The corpus part of a spec, as it travels to workers, and which fields no view would ever decode."""
    corpus: dict[str, Any] = spec.corpus.model_dump(mode="json", by_alias=True)
    source = corpus["source"]
    if spec.corpus.media == "reference" and spec.store.media_root is not None:
        # Who names the root of what stays in its files allows what is there.
        source["root"] = [*(source["root"] or ()), spec.store.media_root]
    viewed = {field for view in spec.views.values() for field in view.reads}
    return corpus | {"unviewed": sorted(corpus["fields"].keys() - viewed)}


def ingest(spec: Spec, snapshot: Snapshot, known: Known | None = None) -> Ingest:
    """What the source holds that the store does not; `known`, of the snapshot, learns which samples were only touched.

    Raises:
        StoreError: a file of the stored corpus is gone.
        InputError: the source holds nothing, or less than was stored because its files are not whole; or the corpus's fields
            changed since it was stored.
    """
    corpus = corpus_dict(spec)
    name, source = corpus["name"], open_source(corpus)
    check_settings(snapshot, corpus)
    if name in snapshot.names(ROWS):
        check_whole(snapshot, name)
    found = scan(source, known or Known(snapshot, name))
    if not found.samples + found.known:
        raise InputError(f"{_path(spec)} holds no samples; name another one in corpus.source.path")
    _check_columns(spec, source)
    remarks = tuple(source.remarks())
    if found.gone + found.changed and not source.whole():
        raise InputError(
            f"corpus {name!r}: {counted(found.gone + found.changed, 'stored sample')} would be removed or replaced after "
            f"files that are not whole ({'; '.join(remarks)}); bring these whole: nothing was changed"
        )
    return found._replace(remarks=remarks)


def check_settings(snapshot: Snapshot, corpus: dict[str, Any]) -> None:
    """InputError where a stored corpus was made from other fields or columns than the spec has now."""
    for entry in snapshot.entries(ROWS, corpus["name"])[:1]:
        stored = entry.info()["settings"]
        if stored["media"] != corpus["media"]:
            adopt = corpus["source"]["adopt"]
            given, mend = (", as adopt means,", "leave adopt out") if adopt else ("", "write that")
            raise InputError(
                f"corpus.media: {corpus['media']!r}{given} where corpus {corpus['name']!r} was stored with "
                f"{stored['media']!r}; its shards are never changed, so {mend}, or name another corpus or store"
            )
        for part in ("fields", "columns"):
            if stored[part] != corpus[part]:
                names = sorted(
                    key for key in {**stored[part], **corpus[part]} if stored[part].get(key) != corpus[part].get(key)
                )
                raise InputError(
                    f"corpus.{part}: {', '.join(names)} changed since corpus {corpus['name']!r} was stored; its shards are "
                    f"never changed, so name another corpus or store (stored: {stored[part]})"
                )


def _path(spec: Spec) -> str:
    return ", ".join(spec.corpus.source.path)


def _check_columns(spec: Spec, source: Source) -> None:
    """InputError where the spec names what is nowhere in the source, or a label that the corpus will not have."""
    columns, kept, nowhere = source.columns(), source.kept(), f"no sample of {_path(spec)} has it"
    named = {f"corpus.columns.{key}": column for key, column in spec.corpus.columns if column}
    wrong = {place: column for place, column in named.items() if column not in columns}
    wrong |= {f"corpus.fields.{name}.from": given for name, given in source.unmatched().items()}
    said = "; ".join(f"{place}: {given!r}" for place, given in wrong.items())
    told = [f"{said}: {nowhere}; columns: {', '.join(sorted(columns))}"] if wrong else []
    for name, label in ((name, each.label) for name, each in spec.training_sets.items() if each.label not in kept):
        why = _stored_as(spec, label) or nowhere
        told.append(f"training_sets.{name}.label: {label!r}: {why}; columns to learn: {', '.join(sorted(kept))}")
    if told:
        raise InputError("\n".join(told))


def _stored_as(spec: Spec, column: str) -> str | None:
    """What becomes of a column that the corpus does not keep under its own name, and what to write instead of it."""
    for key, named in spec.corpus.columns:
        if named == column and key != "group":
            return f"corpus.columns names it as {key}, and so the corpus calls it: write label: {key}"
    for field, about in spec.corpus.fields.items():
        if column == field or column in ([about.from_] if isinstance(about.from_, str) else about.from_):
            return f"it is read as field {field!r}, which is no column: name another one"
    return None


def view_plans(spec: Spec) -> list[encode_plan.ViewPlan]:
    """The spec's views with their recipes."""
    return [
        encode_plan.view_plan(
            name,
            spec.corpus.name,
            "+".join(view.reads),
            view.encoder,
            view.options,
            "+".join(spec.corpus.fields[field].modality for field in view.reads),
        )
        for name, view in spec.views.items()
    ]


def build_settings(spec: Spec, stage: str) -> dict[str, dict[str, Any]]:
    """Name -> settings of the builds of a stage."""
    stages: dict[str, dict[str, Any]] = {
        "align": dict(spec.spaces),
        "index": dict(spec.indexes),
        "fuse": dict(spec.training_sets),
    }
    made = {name: {"corpus": spec.corpus.name, **part.model_dump(mode="json")} for name, part in stages[stage].items()}
    if stage == "align":
        for space in made.values():
            space["equal"] = _equal_field(spec, space["views"])
    return made


def _equal_field(spec: Spec, views: list[str]) -> str | None:
    """The text field by which two samples answer the same query: of the space's own views, else the first that is encoded."""
    fields = [field for name in [*views, *spec.views] for field in spec.views[name].reads]
    return next((field for field in fields if spec.corpus.fields[field].modality == "text"), None)


def planned_build(snapshot: Snapshot, stage: str, name: str, settings: dict[str, Any]) -> builds.Build | None:
    """The build to make, or None where the catalog names it and its files are there."""
    planned = builds.plan(snapshot, BUILD_STAGES[stage], name, settings)
    entries = snapshot.entries(planned.kind, name)
    listing = snapshot.storage.list(planned.stem)
    whole = bool(entries) and not len(lost(entries.table, listing))
    return None if whole and {entry.recipe for entry in entries} == {planned.key} else planned


def steps(spec: Spec, snapshot: Snapshot, found: Ingest | None = None) -> list[Step]:
    """Every step of a spec, in order, with its state; `found` is what `ingest` gives, where that was asked before."""
    first = _shard_step(spec, found or ingest(spec, snapshot))
    encodes = list(_encode_steps(spec, snapshot, grows=first.todo > 0))
    changes = dict.fromkeys(spec.views, STALE)  # samples come or go
    views = changes if first.state != FRESH else _outcomes(spec, snapshot, encodes)
    spaces = list(_build_steps(spec, snapshot, "align", views))
    # A space that only lost a file is remade, in all likelihood with the same bytes.
    behind = {step.name: PENDING if step.why == GONE else step.state for step in spaces if step.state != FRESH}
    return [
        first,
        *encodes,
        *spaces,
        *_build_steps(spec, snapshot, "index", views, behind),
        *_build_steps(spec, snapshot, "fuse", views),
    ]


def unlisted(spec: Spec, snapshot: Snapshot) -> list[str]:
    """What the store holds of the spec's corpus and the spec does not name: `view old`. Nothing deletes it."""
    listed: dict[str, set[str]] = {
        VIEW: {*spec.views},
        builds.SPACE: {*spec.spaces},
        builds.INDEX: {*spec.indexes},
        builds.TRAINING: {*spec.training_sets},
    }
    found = []
    for kind, names in listed.items():
        for name in snapshot.names(kind):
            info = snapshot.entries(kind, name)[0].info()
            if name not in names and (info if kind == VIEW else info["settings"])["corpus"] == spec.corpus.name:
                found.append(f"{builds.NAMES.get(kind, kind)} {name}")
    return found


def _outcomes(spec: Spec, snapshot: Snapshot, encodes: list[Step]) -> dict[str, str]:
    """What a view that is not fresh means to what is made from it: name -> STALE or PENDING.

    Stale where the view will change for sure: it gets more rows, or another recipe. Else its lost shards are remade, in all
    likelihood with the same bytes.
    """
    recipes = {plan.name: plan.recipe for plan in view_plans(spec)}
    total = _count(snapshot, ROWS, spec.corpus.name)
    return {
        step.name: STALE if _count(snapshot, VIEW, step.name, recipes[step.name]) != total else PENDING
        for step in encodes
        if step.state != FRESH
    }


def _count(snapshot: Snapshot, kind: str, name: str, recipe: str | None = None) -> int:
    return len(snapshot.table(kind, name, recipe, ("shard",)))


def _shard_step(spec: Spec, found: Ingest) -> Step:
    touched = (f"{found.touched} touched: `braid run` compares them once",) if found.touched else ()
    more, name = "; ".join(["", *touched, *found.remarks]), spec.corpus.name
    if not found.samples + found.gone:
        return Step("shard", name, FRESH, 0, found.known, f"{counted(found.known, 'sample')} stored{more}")
    parts = {"new": found.samples - found.changed, "changed": found.changed, "gone": found.gone}
    why = ", ".join(f"{count} {what}" for what, count in parts.items() if count)
    return Step("shard", name, STALE, found.samples, found.known + found.samples, f"samples: {why}{more}")


def check_whole(snapshot: Snapshot, name: str) -> None:
    """StoreError where a file of a stored corpus is gone or has another size."""
    listing = snapshot.storage.list(f"corpora/{name}") | snapshot.storage.list(f"quarantine/shard/{name}")
    scopes = (*((kind, name) for kind in (ROWS, MEDIA, IDS, TOMBSTONES)), (QUARANTINE, f"shard/{name}"))
    tables = [lost(snapshot.table(*scope, columns=("path", "bytes")), listing) for scope in scopes]
    missing = [path for table in tables for path in table["path"].to_pylist()]
    if missing:
        raise StoreError(
            f"corpus {name!r}: {counted(len(missing), 'file')} gone or of another size, e.g. {missing[0]}: the raw data of a "
            "store cannot be made again from itself; restore them, or shard into a new store"
        )


def _encode_steps(spec: Spec, snapshot: Snapshot, *, grows: bool) -> Iterator[Step]:
    for plan in view_plans(spec):
        if grows and spec.corpus.name not in snapshot.names(ROWS):
            yield Step("encode", plan.name, STALE, 0, 0, "its corpus is new")
            continue
        tasks = encode_plan.stale(snapshot, plan, encode_plan.listed(snapshot.storage, plan))
        total, rows = _count(snapshot, ROWS, spec.corpus.name), sum(task.rows for task in tasks)
        if grows:
            yield Step("encode", plan.name, STALE, len(tasks), total, "its corpus grows", rows)
        elif tasks:
            yield Step("encode", plan.name, STALE, len(tasks), total, _why(snapshot, plan, len(tasks)), rows)
        else:
            yield Step("encode", plan.name, FRESH, 0, total, counted(total, "shard"))


def _why(snapshot: Snapshot, plan: encode_plan.ViewPlan, todo: int) -> str:
    recipes = set(snapshot.table(VIEW, plan.name, columns=("recipe",))["recipe"].to_pylist())
    if not recipes:
        return "not encoded yet"
    if recipes != {plan.recipe}:
        return "another field, encoder, option or version than it was encoded with"
    return f"{counted(todo, 'shard')} new, gone or of another size"


def _build_steps(
    spec: Spec, snapshot: Snapshot, stage: str, views: dict[str, str], spaces: dict[str, str] | None = None
) -> Iterator[Step]:
    for name, settings in build_settings(spec, stage).items():
        after = {view: views[view] for view in settings["views"] if view in views}
        if spaces and settings.get("space") in spaces:
            after[settings["space"]] = spaces[settings["space"]]
        kind = BUILD_STAGES[stage]
        try:
            planned = planned_build(snapshot, stage, name, settings)
        except NotFound as missing:
            yield Step(stage, name, STALE, 1, 1, str(missing))
            continue
        if planned is not None:
            recipes = {entry.recipe for entry in snapshot.entries(kind, name)}
            why = (
                "not made yet"
                if not recipes
                else GONE
                if recipes == {planned.key}
                else "its settings or inputs changed"
            )
            yield Step(stage, name, STALE, 1, 1, why)
        elif after:
            yield _waiting(stage, name, after)
        else:
            yield Step(stage, name, FRESH, 0, 1, "")


def _waiting(stage: str, name: str, after: dict[str, str]) -> Step:
    """A build that is whole itself, behind inputs that are not: surely stale where one of them will change."""
    inputs = ", ".join(sorted(after))
    if STALE in after.values():
        return Step(stage, name, STALE, 1, 1, f"made from {inputs}, which changes")
    return Step(stage, name, PENDING, 1, 1, f"only if {inputs} comes out with other bytes")
