"""A catalog of 1,000,000 shards with nothing behind it: what a plan costs, and the commit of an encode of 100,000 of them.

10,000 rows a shard, so ten billion samples: one view whole, another encoded for the first half. What the workers would have
written is left out: a listing gives what the catalog names, as `Storage.list` would. Left out of the plan is the reading of the
source, and of the ids that the store holds (each shard's rows), to say which samples are new.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pyarrow as pa
from deltalake import write_deltalake

from featurestore import encoders
from featurestore.catalog import FOLDER, SCHEMA, Catalog, Entry
from featurestore.corpora import MEDIA, QUARANTINE, ROWS, Corpus
from featurestore.storage import Storage
from featurestore.views import VIEW
from jobs import plan as planning
from jobs import spec as specs
from jobs.sizes import peak_bytes
from pipelines import encode_plan
from pipelines.ingest import Ingest
from pipelines.runner import Result, Scope, before, changes, result
from tests.benchmarks import Bar, at_most

SHARDS, ENCODED, MORE = 1_000_000, 500_000, 100_000
ROWS_A_SHARD = 10_000
MAX_SECONDS, MAX_MB = 120, 2000
BATCH = 50_000
SPEC = """
version: 1
store: {{uri: {store}}}
corpus:
  name: big
  source: {{type: manifest, path: big.jsonl}}
  columns: {{id: id, group: group, event_timestamp: time}}
  fields: {{image: {{modality: image, from: image}}, caption: {{modality: text, from: caption}}}}
views:
  image: {{field: image, encoder: efficientnet-lite0}}
  caption: {{field: caption, encoder: minilm-l6}}
training_sets:
  labels: {{views: [image], label: label, splits: {{train: 0.8, val: 0.1, test: 0.1}}}}
"""


def bars() -> list[Bar]:
    """The bars of this area that are about size; each part runs in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="braid-bench-") as folder:
        parts: dict[str, dict[str, Any]] = {}
        for part in ("write", "plan", "commit"):
            command = [sys.executable, "-m", "tests.benchmarks.bench_engines_scale", part, f"{folder}/store"]
            parts[part] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    found = []
    for part, what in (("plan", f"plan of {SHARDS:,} shards"), ("commit", f"commit of {MORE:,} of {SHARDS:,} shards")):
        detail = {**parts[part], "catalog_mb": parts["write"]["catalog_mb"], "catalog_rows": parts["write"]["rows"]}
        found.append(at_most("engines", f"{what}: seconds", parts[part]["seconds"], MAX_SECONDS, **detail))
        found.append(at_most("engines", f"{what}: MB of memory", parts[part]["peak_mb"], MAX_MB))
    return found


def _sha256(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _tried(number: int) -> int:
    """One value in six is missing, so shards differ in how many there are."""
    return int(ROWS_A_SHARD * 5 / 6) + int(_sha256("tried", number)[:6], 16) % 200 - 100


def _entry(kind: str, plan: encode_plan.ViewPlan | None, about: dict[str, Any], number: int) -> Entry:
    """The entry that a worker would have made: deterministic, so that a listing needs no catalog."""
    key = f"0123456789ab-{number // 32:05d}-{number % 32:05d}"
    name, recipe = (plan.name, plan.recipe) if plan else ("big", "")
    sha256, ids = _sha256(kind, name, number), _sha256("ids", number)
    made_from = {ROWS: (MEDIA, "big"), VIEW: (ROWS, "big")}.get(kind)
    folder = encode_plan.folder(plan) if plan else "corpora/big"
    path = f"{folder}/{key}-{sha256[:8]}.{'tar' if kind == MEDIA else 'parquet'}"
    lineage = json.dumps({**about, "tried": _tried(number)}, sort_keys=True) if about else "{}"
    size = 1_000_000 + number
    input_sha256 = _sha256(*made_from, number) if made_from else ""
    first, last = (None, None) if plan else (10**18 + number, 10**18 + number + 10**9)
    return Entry(kind, name, recipe, key, path, ROWS_A_SHARD, size, sha256, ids, input_sha256, first, last, lineage)


def _contents(spec: specs.Spec) -> list[tuple[str, encode_plan.ViewPlan | None, dict[str, Any], int]]:
    """(kind, view, what its lineage says, how many shards of it there are) of all that the store holds."""
    corpus = planning.corpus_dict(spec)
    fields = {field: each["modality"] for field, each in corpus["fields"].items()}
    settings = {"fields": corpus["fields"], "columns": corpus["columns"], "media": corpus["media"]}
    about = {"fields": fields, "source": "manifest", "settings": settings}
    image, caption = planning.view_plans(spec)
    return [
        (ROWS, None, about, SHARDS),
        (MEDIA, None, {}, SHARDS),
        (VIEW, image, _about(image), SHARDS),
        (VIEW, caption, _about(caption), ENCODED),
    ]


def _about(plan: encode_plan.ViewPlan) -> dict[str, Any]:
    encoder = encoders.find(plan.encoder, plan.options)
    card = {**encoder.card(), "fingerprint": encoder.fingerprint()}
    return {"corpus": plan.corpus, "field": plan.field, "encoder": card}


class Listed(Storage):
    """A store whose artefacts are named and not there. `seconds` is what making up the listings took: hashing their names."""

    seconds: ClassVar[float] = 0.0

    def list(self, prefix: str = "") -> dict[str, int]:
        """What a listing would give: key -> bytes."""
        begun = time.monotonic()
        spec = specs.parse(SPEC.format(store=self.uri), "benchmark")
        listing = {
            entry.path: entry.bytes
            for kind, plan, _, count in _contents(spec)
            if prefix == (encode_plan.folder(plan) if plan else "corpora/big")
            for entry in (_entry(kind, plan, {}, number) for number in range(count))
        }
        Listed.seconds += time.monotonic() - begun
        return listing


def _write(spec: specs.Spec) -> dict[str, Any]:
    """The catalog, as the commits of its jobs would have left it."""
    catalog = Catalog(spec.store)
    catalog.create()
    folder = Path(spec.store.root, FOLDER)
    contents = _contents(spec)
    for content in contents:
        reader = pa.RecordBatchReader.from_batches(SCHEMA, _batches(*content))
        write_deltalake(str(folder), reader, mode="append")
    size = sum(path.stat().st_size for path in folder.glob("*.parquet"))
    return {"rows": sum(content[3] for content in contents), "catalog_mb": size / 1e6}


def _batches(
    kind: str, plan: encode_plan.ViewPlan | None, about: dict[str, Any], count: int
) -> Iterator[pa.RecordBatch]:
    for start in range(0, count, BATCH):
        rows = [_entry(kind, plan, about, number) for number in range(start, min(start + BATCH, count))]
        columns = zip(zip(*rows, strict=True), SCHEMA, strict=True)
        yield pa.record_batch([pa.array(values, field.type) for values, field in columns], SCHEMA)


def _plan(spec: specs.Spec) -> dict[str, Any]:
    spec = spec.model_copy(update={"store": Listed(uri=spec.store.uri)})
    begun = time.monotonic()
    snapshot = Catalog(spec.store).snapshot()
    known = Corpus(snapshot, "big").rows
    opened = time.monotonic() - begun
    unchanged = Ingest("", 0, 0, known=known, changed=0, gone=0)
    with mock.patch.object(planning, "ingest", return_value=unchanged):
        steps = planning.steps(spec, snapshot)
    seconds = time.monotonic() - begun
    todo = [(step.name, step.state, step.todo) for step in steps]
    left = ("caption", "stale", SHARDS - ENCODED)
    _hold(todo == [("big", "fresh", 0), ("image", "fresh", 0), left, ("labels", "stale", 1)], todo)
    return {"seconds": seconds, "open_s": opened, "listing_s": Listed.seconds}


def _commit(spec: specs.Spec) -> dict[str, Any]:
    """The last step of an encode job, from the Results of its workers."""
    _, plan = planning.view_plans(spec)
    scopes = [Scope(VIEW, plan.name, plan.recipe), Scope(QUARANTINE, f"encode/{plan.name}", plan.recipe)]
    about = _about(plan)
    results = [_result(plan, about, number) for number in range(ENCODED, ENCODED + MORE)]
    catalog = Catalog(spec.store)
    version = catalog.snapshot().version
    begun = time.monotonic()
    before(catalog.snapshot(), scopes, results)
    judged = time.monotonic() - begun
    made = catalog.commit("encode caption", changes(results, scopes, whole=False))
    committed = time.monotonic() - begun
    _hold(catalog.commit("encode caption", changes(results, scopes, whole=False)) == made == version + 1, made)
    again = time.monotonic() - begun - committed
    counts = [len(catalog.snapshot(each).entries(VIEW, "caption")) for each in (version, made)]
    _hold(counts == [ENCODED, ENCODED + MORE], counts)
    return {"seconds": committed, "budget_s": judged, "again_s": again}


def _hold(true: bool, found: object) -> None:
    if not true:
        raise RuntimeError(f"not what was planted: {found}")


def _result(plan: encode_plan.ViewPlan, about: dict[str, Any], number: int) -> Result:
    entry = _entry(VIEW, plan, about, number)
    return result(entry.shard, [entry], ROWS_A_SHARD, 0)


PARTS: dict[str, Callable[[specs.Spec], dict[str, Any]]] = {"write": _write, "plan": _plan, "commit": _commit}

if __name__ == "__main__":
    measured = PARTS[sys.argv[1]](specs.parse(SPEC.format(store=sys.argv[2]), "benchmark"))
    print(json.dumps({name: round(value, 2) for name, value in {**measured, "peak_mb": peak_bytes() / 1e6}.items()}))
