"""A view of two fields from a spec to vectors, search and a training set: with fields missing, bad, and mended."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from featurestore import encoders
from featurestore.catalog import Catalog
from featurestore.corpora import QUARANTINE
from featurestore.encoders import contract
from featurestore.errors import InputError, SpecError
from featurestore.identity import input_digest, joined_digest
from featurestore.inspection import Inspection, view_shard
from featurestore.search import Query
from featurestore.store import FeatureStore
from featurestore.verify import verify
from featurestore.views import VIEW
from jobs import plan
from jobs.compact import compact
from jobs.report import field_counts
from jobs.retry import Retrier
from jobs.run import Runner
from jobs.spec import Spec, parse
from pipelines import encode, encode_plan
from pipelines.decode_apart import DecodeApart
from tests.checkpoints import checkpoint

COLORS = ("red", "blue", "green", "black")
PAIRS = [f"pair/{number:02}" for number in range(28)]
ODD = {
    "odd/bad-image": (b"no image", "a bird"),
    "odd/bad-title": (contract.image("red", (20, 30)), "  "),
    "odd/both-bad": (b"no image", "  "),
    "odd/gone-image": (None, "a black bird"),
    "odd/lone-bad": (b"no image", None),
    "odd/lone-image": (contract.image("green", (30, 20)), None),
    "odd/lone-title": (None, "a long text"),
    "odd/nothing": (None, None),
}
"""Id -> image and title. `gone-image` names a file that is not there."""


def options(kind: str = "idefics") -> dict[str, Any]:
    return {"checkpoint": str(checkpoint(kind))}


BUILDS = """\
spaces:
  seen: {views: [image, both], method: cca, dim: 2}
indexes:
  birds: {space: seen, views: [image, both]}
training_sets:
  kinds: {views: [both], label: kind, splits: {train: 0.8, test: 0.2}, group_equal: [image, title]}
"""


def spec_text(folder: Path, store: Path) -> str:
    views = {
        "image": {"field": "image", "encoder": "hf-image", "options": options("vit")},
        "both": {"fields": ["title", "image"], "encoder": "joint", "options": options() | {"batch_size": 3}},
    }
    return f"""\
version: 1
store: {{uri: "{store}"}}
corpus:
  name: birds
  source: {{type: manifest, path: "{folder}/birds.jsonl"}}
  fields:
    image: {{modality: image, from: file}}
    title: {{modality: text, from: title}}
  shard_rows: 12
  failure_budget: 50%
views: {json.dumps(views)}
"""


def write(folder: Path) -> None:
    values: dict[str, tuple[bytes | None, str | None]] = {
        each: (contract.image(COLORS[at % 4], (20 + at, 40)), f"a {COLORS[at % 4]} bird {at}")
        for at, each in enumerate(PAIRS)
    }
    lines = []
    for at, (sample_id, (image, title)) in enumerate((values | ODD).items()):
        row: dict[str, Any] = {"id": sample_id, "kind": COLORS[at % 2]}
        file = f"{sample_id.replace('/', '-')}.png"
        if image is not None:
            (folder / file).write_bytes(image)
        if image is not None or "gone" in sample_id:
            row["file"] = file
        lines.append(json.dumps(row | ({"title": title} if title is not None else {})))
    (folder / "birds.jsonl").write_text("\n".join(lines) + "\n")


class Made:
    """A folder with a corpus, and its store."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, folder / "store"

    @property
    def spec(self) -> Spec:
        return parse(spec_text(self.folder, self.store), "spec.yaml")

    def open(self) -> FeatureStore:
        return FeatureStore(str(self.store))

    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["id"]: row for row in self.open().view("both").to_arrow().to_pylist()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Read only."""
    made = Made(tmp_path_factory.mktemp("joint"))
    write(made.folder)
    Runner(made.spec, Console(quiet=True)).run()
    return made


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Made:
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    return Made(tmp_path)


def alone(title: str | None, image: bytes | None) -> np.ndarray:
    encoder = encoders.find("joint", options() | {"modality": "text+image"})
    raws = (None if title is None else title.encode(), image)
    parts = [raw and encoder.decode_field(raw, place) for place, raw in enumerate(raws)]
    return np.asarray(encoder.encode([encoder.joined(parts)])[0])


def decoded_here(apart: DecodeApart, raw: bytes, place: int) -> Any:
    return encoders.find(apart._work.encoder, apart._work.options).decode_field(raw, place)


def test_a_sample_has_the_vector_of_the_fields_that_it_has(made: Made) -> None:
    rows = made.rows()
    reasons = {name.removeprefix("odd/"): rows[name]["miss_reason"] for name in ODD if rows[name]["miss_reason"]}
    assert reasons == {
        "both-bad": "empty+unsupported_format",
        "lone-bad": "absent+unsupported_format",
        "nothing": "absent+absent",
    }
    for sample_id in (*PAIRS[:3], *ODD):
        row, (image, title) = rows[sample_id], ODD.get(sample_id, (None, None))
        if sample_id in PAIRS:
            at = PAIRS.index(sample_id)
            image, title = contract.image(COLORS[at], (20 + at, 40)), f"a {COLORS[at]} bird {at}"
        digests = [title and input_digest(title.encode()), image and input_digest(image)]
        assert row["input_digest"] == joined_digest([each or None for each in digests])
        assert row["present"] == (row["miss_reason"] is None) == (row["embedding"] is not None)
        if row["present"]:
            good = (None if title == "  " else title, None if image == b"no image" else image)
            np.testing.assert_allclose(row["embedding"], alone(*good), atol=1e-5)


def test_a_bad_value_is_in_quarantine_under_its_own_field_and_nothing_is_lost(made: Made) -> None:
    store = made.open()
    found = {
        (row["id"], row["field"]): row["reason"]
        for row in store.quarantine("birds").to_pylist()
        if row["view"] == "both"
    }
    assert found == {
        ("odd/bad-image", "image"): "unsupported_format",
        ("odd/bad-title", "title"): "empty",
        ("odd/both-bad", "image"): "unsupported_format",
        ("odd/both-bad", "title"): "empty",
        ("odd/lone-bad", "image"): "unsupported_format",
    }
    assert verify(store.storage).ok
    counts = field_counts(store, "birds")
    assert counts["image"] == {"present": 30, "missing": 2, "quarantined": 4}
    assert counts["title"] == {"present": 31, "missing": 3, "quarantined": 2}
    tried = [entry.info()["tried"] for entry in store.snapshot.entries(VIEW, "both")]
    assert (sum(tried), len(tried)) == (33 + 33, 3)


def test_the_bytes_do_not_depend_on_the_number_of_threads(made: Made, copy: Made) -> None:
    (planned,) = (each for each in plan.view_plans(copy.spec) if each.name == "both")
    assert (planned.field, planned.recipe) == ("title+image", made.open().view("both").recipe)
    storage = copy.spec.store
    files = storage.list(encode.folder(planned))
    for path in files:
        (copy.store / path).unlink()
    snapshot = Catalog(storage).snapshot()
    worker = encode.ShardEncoder(storage, planned, threads=5, version=snapshot.version)
    for task in encode_plan.stale(snapshot, planned, encode_plan.listed(storage, planned)):
        worker.encode(task)
    assert storage.list(encode.folder(planned)) == files


def test_a_query_of_one_field_is_a_sample_without_the_others(made: Made) -> None:
    view, query, picture = made.open().view("both"), Query(), contract.image("red", (20, 40))
    assert (view.modality, view.fields) == ("text+image", ["title", "image"])
    assert np.array_equal(query.encode(view, b"a red bird", "text")[0], alone("a red bird", None))
    assert np.array_equal(query.encode(view, picture, "image")[0], alone(None, picture))


@pytest.mark.slow
def test_an_index_and_a_training_set_are_made_of_it(copy: Made) -> None:
    text = spec_text(copy.folder, copy.store) + BUILDS
    Runner(parse(text, "spec.yaml"), Console(quiet=True)).run()
    store, picture = copy.open(), contract.image("red", (20, 40))
    assert verify(store.storage).ok
    index = store.index("birds")
    query = index.embed("both", alone("a red bird 0", None)[None])[0]
    assert store.search("birds", text="a red bird 0", via="both", k=3) == index.search(query, 3)
    query = index.embed("both", alone(None, picture)[None])[0]
    hits = store.search("birds", image=picture, via="both", k=9, modality="text+image")
    assert [each.view for each in hits] == ["both"] * 9
    assert (hits[0].text or "").startswith("a ")
    assert index.via(None, "image").name == "image"
    with pytest.raises(InputError, match=r"no view of modality 'text'; name one as via; it has: .*both \(text.image\)"):
        store.search("birds", text="a bird")
    with pytest.raises(InputError, match=r"via 'both': this view reads text\+image, not audio"):
        store.search("birds", audio=contract.sound(440, 0.1), via="both")
    patterns = store.card("training", "kinds")["certificate"]["patterns"]
    assert {pattern for side in patterns.values() for pattern in side} >= {"title+image"}


def test_trying_again_takes_in_what_came_and_leaves_the_rest(copy: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    # Here and not in a process apart, which would load all there is for each shard.
    monkeypatch.setattr(DecodeApart, "__call__", decoded_here)
    before, catalog = copy.rows(), Catalog(copy.spec.store)
    version = catalog.snapshot().version
    Retrier(copy.spec, Console(quiet=True)).retry("spec.yaml")
    assert catalog.snapshot().version == version
    image = contract.image("black", (33, 44))
    (copy.folder / "odd-gone-image.png").write_bytes(image)
    Retrier(copy.spec, Console(quiet=True)).retry("spec.yaml")
    after = copy.rows()
    assert {name for name in after if after[name] != before[name]} == {"odd/gone-image"}
    np.testing.assert_allclose(after["odd/gone-image"]["embedding"], alone("a black bird", image), atol=1e-5)
    assert [each for each in verify(copy.spec.store).findings if each.kind in (VIEW, QUARANTINE)] == []


@pytest.mark.slow
def test_compacted_shards_have_the_same_vectors_and_rejections(copy: Made) -> None:
    lines = (copy.folder / "birds.jsonl").read_text().splitlines(keepends=True)
    (copy.folder / "birds.jsonl").write_text("".join(each for each in lines if PAIRS[5] not in each))
    Runner(copy.spec, Console(quiet=True)).run()
    before, bad = copy.rows(), copy.open().quarantine("birds").num_rows
    compact(copy.spec, Console(quiet=True))
    assert PAIRS[5] not in before
    assert copy.rows() == before
    store = copy.open()
    assert (store.quarantine("birds").num_rows, verify(store.storage).findings) == (bad, ())
    assert sum(entry.info()["tried"] for entry in store.snapshot.entries(VIEW, "both")) == 32 + 32


def test_verify_tells_a_quarantine_that_is_not_that_of_its_rows(made: Made) -> None:
    snapshot = made.open().snapshot
    bad = {entry.shard: entry for entry in snapshot.entries(QUARANTINE, "encode/both")}
    view = next(entry for entry in snapshot.entries(VIEW, "both") if entry.shard in bad)
    rows = made.open().corpus("birds").shard(view.shard)
    look = Inspection(snapshot.storage, "rows")
    view_shard(look, view, rows, bad[view.shard])
    assert look.findings == []
    view_shard(look, view, rows, None)
    assert "and no quarantine is there" in str(look.findings)


FIELDS, WRITE = (
    '"fields": ["title", "image"]',
    "write field: NAME, or fields: [NAME, NAME] for an encoder that reads several",
)
TAKES = "'joint' takes image+text or text+image or video+audio or audio+video, but field 'title' is 'text'"
ONE_MISTAKE = [
    (FIELDS, '"fields": ["title"]', 'views.both.fields: ["title"] is wrong: write a list of 2 to 16'),
    (
        FIELDS,
        '"fields": ["title", "imag"]',
        "views.both.fields.1: 'imag' is not a field of this corpus; allowed: image",
    ),
    (FIELDS, '"fields": ["title", "title"]', "views.both.fields.1: 'title' is listed twice; keep one"),
    (FIELDS, '"field": "title"', f"views.both.encoder: {TAKES}"),
    (FIELDS, f'"field": "title", {FIELDS}', WRITE),
    (f"{FIELDS}, ", "", WRITE),
    (
        '"field": "image", "encoder": "hf-image"',
        '"fields": ["image", "title"], "encoder": "hf-image"',
        "views.image.encoder: 'hf-image' takes image, but fields 'image', 'title' are 'image+text'",
    ),
    ('"batch_size": 3', '"modality": "video+audio"', "it reads images and texts, not video+audio"),
]


@pytest.mark.parametrize(("old", "new", "told"), ONE_MISTAKE)
def test_a_mistake_is_told_with_its_line(made: Made, old: str, new: str, told: str) -> None:
    text = spec_text(made.folder, made.store)
    assert text.count(old) == 1
    with pytest.raises(SpecError) as caught:
        parse(text.replace(old, new), "spec.yaml")
    told_at = "line 11: views" if told.startswith("views") else "line 11: "
    assert told in str(caught.value)
    assert told_at in str(caught.value)
