"""Opening a store, reading its views, and searching it: against brute force, across modalities, at one version."""

import datetime
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from rich.console import Console

from featurestore import encoders
from featurestore.errors import AlignmentError, InputError, NotFound, StoreError
from featurestore.search import Hit, Hits
from featurestore.store import FeatureStore
from featurestore.views import COLUMNS, View
from jobs.run import Runner
from jobs.spec import load
from tests.conftest import Made
from tests.planted import SAMPLE_RATE, SIDE


@pytest.fixture(scope="module")
def store(made: Made) -> FeatureStore:
    return made.open()


def rows_of(view: View, *columns: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = view.to_arrow(columns or COLUMNS).to_pylist()
    return rows


def a_value(store: FeatureStore, field: str, skip: int = 0) -> tuple[str, bytes]:
    """The id and raw bytes of some sample that has a field."""
    corpus = store.corpus("planted")
    for sample_id in corpus.to_arrow()["id"].to_pylist()[skip:]:
        raw = corpus.value(*corpus.locate(sample_id), field)
        if raw is not None:
            return sample_id, raw
    raise LookupError(field)


def encoded(view: View, raw: bytes) -> np.ndarray:
    encoder = encoders.find(view.encoder["key"], view.encoder["options"])
    return encoder.encode([encoder.decode(raw)])


def brute_force(
    store: FeatureStore, index: str, query: np.ndarray, keep: Callable[[dict[str, Any]], bool] = lambda _: True
) -> dict[tuple[str, str], float]:
    """(id, view) -> score of every row of an index's views, projected and compared here; best first.

    `keep` is given the sample's columns, with `view`.
    """
    opened = store.index(index)
    columns = {row["id"]: row for row in store.corpus("planted").to_arrow().to_pylist()}
    scores = {}
    for name in opened.views:
        view = store.view(name)
        matrix, present = view.matrix()
        projected = store.space(opened.space.name).projections[name].apply(matrix[present])
        ids = np.array(view.to_arrow(["id"])["id"].to_pylist())[present]
        for sample_id, score in zip(ids.tolist(), (projected @ query).tolist(), strict=True):
            if keep(columns[sample_id] | {"view": name}):
                scores[sample_id, name] = score
    return dict(sorted(scores.items(), key=lambda item: -item[1]))


def assert_best(hits: Hits, expected: dict[tuple[str, str], float], k: int) -> None:
    """The hits are the k best samples, each by its best view; samples of equal score may change places."""
    best: dict[str, float] = {}
    for (sample_id, _), score in expected.items():
        best.setdefault(sample_id, score)
    assert [hit.score for hit in hits] == pytest.approx(list(best.values())[:k], abs=1e-5)
    for hit in hits:
        assert hit.score == pytest.approx(expected[hit.id, hit.view], abs=1e-5)
    assert len({hit.id for hit in hits}) == len(hits)


def test_the_store_says_what_it_holds(store: FeatureStore) -> None:
    assert store.corpora() == ["planted"]
    assert store.views() == ["caption", "image", "sound", "timbre"]
    assert store.spaces() == store.indexes() == ["heard", "seen", "sounds"]
    assert store.training_sets() == ["category"]
    assert repr(store).endswith("indexes ['heard', 'seen', 'sounds'], training sets ['category'])")
    assert [each["version"] for each in store.history()] == list(range(store.version, -1, -1))
    assert repr(store.view("timbre")) == "View('timbre', 160 rows × 40, mfcc of planted.sound)"


@pytest.mark.parametrize(
    ("index", "kind", "via", "field"),
    [
        ("seen", "text", None, "caption"),
        ("seen", "image", None, "image"),
        ("heard", "audio", None, "sound"),
        ("sounds", "audio", "timbre", "sound"),
    ],
)
def test_a_search_is_brute_force_over_the_projected_vectors(
    store: FeatureStore, index: str, kind: str, via: str | None, field: str
) -> None:
    view = via or {"text": "caption", "image": "image", "audio": "sound"}[kind]
    for skip in (0, 60):
        sample_id, raw = a_value(store, field, skip)
        query = store.space(index).projections[view].apply(encoded(store.view(view), raw))[0]
        hits = store.search(index, **{kind: raw if kind != "text" else raw.decode()}, via=via, k=12)
        assert_best(hits, brute_force(store, index, query), 12)
        # The sample's own row is as near as one can be.
        own = store.search(index, **{kind: raw if kind != "text" else raw.decode()}, via=via, k=5, modality=kind)
        assert sample_id in [hit.id for hit in own if hit.score > 0.999]


def test_a_query_of_one_modality_finds_the_others(store: FeatureStore) -> None:
    """Of 20 captions, as many find their own group's picture among ten as the card says of held-out ones."""
    groups = dict(zip(*(store.corpus("planted").to_arrow()[name].to_pylist() for name in ("id", "group")), strict=True))
    both = [row["id"] for row in rows_of(store.view("image"), "id", "present") if row["present"]][:40:2]
    vectors = store.view("caption").take(both, ["id", "present", "embedding"]).to_pylist()
    found = [
        groups[row["id"]] in {groups[hit.id] for hit in hits}
        for row in vectors
        if row["present"]
        for hits in [store.search("seen", vector=row["embedding"], via="caption", modality="image", k=10)]
    ]
    assert len(found) >= 15
    assert np.mean(found) >= 0.8


@pytest.mark.parametrize("form", ["path", "text path", "bytes", "PIL"])
def test_a_picture_may_be_a_path_bytes_or_an_open_image(store: FeatureStore, tmp_path: Path, form: str) -> None:
    _, raw = a_value(store, "image")
    path = tmp_path / "query.png"
    path.write_bytes(raw)
    given = {"path": path, "text path": str(path), "bytes": raw, "PIL": Image.open(io.BytesIO(raw)).convert("RGB")}
    hits = store.search("seen", image=given[form], modality="image", k=1)
    assert hits[0].score > 0.999


def test_a_vector_is_of_a_view_or_of_the_space(store: FeatureStore) -> None:
    row = next(row for row in rows_of(store.view("sound")) if row["present"])
    vector = np.array(row["embedding"], np.float32)
    projected = store.space("heard").projections["sound"].apply(vector[None])[0]
    expected = brute_force(store, "heard", projected)
    assert_best(store.search("heard", vector=vector, via="sound", k=7), expected, 7)
    assert_best(store.search("heard", vector=projected, k=7), expected, 7)
    assert_best(store.search("heard", vector=projected.tolist(), k=7), expected, 7)
    for length in (1e-30, 7.5, 1e200):
        assert_best(store.search("heard", vector=projected.astype(float) * length, k=7), expected, 7)


def test_more_hits_than_samples_are_all_samples_once(store: FeatureStore) -> None:
    index = store.index("sounds")
    vector = np.eye(index.space.dim, dtype=np.float32)[0]
    hits = store.search("sounds", vector=vector, k=10_000)
    assert_best(hits, brute_force(store, "sounds", vector), 10_000)
    assert len(hits) == 120


def space_vector(store: FeatureStore, index: str) -> np.ndarray:
    """Some unit vector of an index's space."""
    vector = np.random.default_rng(0).normal(size=store.index(index).space.dim)
    return np.asarray(vector / np.linalg.norm(vector), np.float32)


def test_conditions_keep_only_the_rows_that_fulfil_all_of_them(store: FeatureStore) -> None:
    query, when = space_vector(store, "heard"), datetime.datetime(2026, 3, 10, 12, tzinfo=datetime.UTC)
    nanoseconds = int(when.timestamp()) * 10**9
    expected = brute_force(
        store,
        "heard",
        query,
        lambda row: row["label"] in ("ring", "cross") and row["view"] == "image" and row["event_timestamp"] <= when,
    )
    assert 5 < len(expected) < 60
    where = "label IN ('ring', 'cross')"
    for as_of in ("2026-03-10T12:00:00Z", "2026-03-10 12:00", "2026-03-10T14:00:00+02:00", nanoseconds):
        hits = store.search("heard", vector=query, k=99, where=where, modality="image", as_of=as_of)
        assert_best(hits, expected, 99)
        assert len(hits) == len(expected)
    assert {hit.columns["label"] for hit in hits} == {"ring", "cross"}
    assert store.search("heard", vector=query, as_of="2025-12-31") == []
    assert store.search("heard", vector=query, where="label = 'hexagon'") == []


@pytest.mark.parametrize(
    "where",
    [
        "1=1); COPY (SELECT 1) TO '{file}'; --",
        "true; COPY (SELECT 1) TO '{file}'",
        "true) UNION SELECT 999999 --",
        "true); SELECT 999999 AS __row --",
        "label IN (SELECT column0 FROM read_csv('{readable}'))",
        "label IN (SELECT * FROM '{readable}')",
        "label IN (SELECT label FROM a_variable)",
        "EXISTS (SELECT 1 FROM read_blob('{readable}'))",
        "true, false",
        "",
        "label",
        "nothing = 1",
        "label = ",
    ],
)
def test_a_condition_that_is_more_than_one_over_the_columns_is_refused(
    store: FeatureStore, tmp_path: Path, where: str
) -> None:
    readable, file = tmp_path / "readable.csv", tmp_path / "written.csv"
    readable.write_text("ring\n")
    a_variable = pa.table({"label": ["ring"]})
    assert len(a_variable) == 1
    where = where.format(file=file, readable=readable)
    with pytest.raises(InputError, match=r"where ['\"].*columns: shard, id, group, .*label") as caught:
        store.search("heard", vector=space_vector(store, "heard"), where=where)
    assert str(caught.value).startswith(f"where {where!r}: ")
    assert not file.exists()


def test_a_query_that_cannot_be_answered_says_what_can(store: FeatureStore) -> None:
    vector = space_vector(store, "heard")
    dim = len(vector)
    for told, index, query in [
        (r"search by one of: text, image, audio .*; given: none", "heard", {}),
        (r"given: text, vector", "heard", {"text": "a", "vector": vector}),
        (r"2 views of modality 'audio'; name one as via; .* sound \(audio\), timbre \(audio\)", "sounds", {"audio": b"x"}),
        (r"no view of modality 'text'; .* it has: image \(image\), sound \(audio\)", "heard", {"text": "a"}),
        (r"via 'caption': index 'heard' has no such view; allowed: image, sound", "heard", {"text": "a", "via": "caption"}),
        (r"via 'image': this view reads image, not audio", "heard", {"audio": b"x", "via": "image"}),
        (r"image takes a path or bytes or a PIL image, not int", "heard", {"image": 3}),
        (r"^k is 0; allowed: a whole number, at least 1", "heard", {"vector": vector, "k": 0}),
        (r"^k is 2\.5; allowed: a whole number", "heard", {"vector": vector, "k": 2.5}),
        (r"^k is '3'; allowed: a whole number", "heard", {"vector": vector, "k": "3"}),
        (r"^k is True; allowed: a whole number", "heard", {"vector": vector, "k": True}),
        (rf"^vector 'abc' is none; space 'heard' has vectors of \[{dim}\], numbers", "heard", {"vector": "abc"}),
        (r"^vector \[1, 'a'\] is none", "heard", {"vector": [1, "a"]}),
        (r"at least 1", "heard", {"vector": vector, "k": -1, "where": "label = 'hexagon'"}),
        (rf"vector of shape \({dim + 1},\): space 'heard' has vectors of \[{dim}\]", "heard", {"vector": np.ones(dim + 1)}),
        (rf"vector of shape \(1, {dim}\)", "heard", {"vector": vector[None]}),
        (r"view 'sound' has vectors of \[128\], all finite", "heard", {"vector": vector, "via": "sound"}),
        (r"all finite", "heard", {"vector": np.full(dim, np.nan)}),
        (r"all finite", "heard", {"vector": np.full(dim, np.inf)}),
        (r"modality 'smell' is not allowed; index 'heard' has: audio, image", "heard", {"vector": vector, "modality": "smell"}),
        (r"modality 'text' is not allowed; index 'heard' has: audio, image", "heard", {"vector": vector, "modality": "text"}),
        (r"as_of: 'soon' is not a time; allowed: ISO 8601", "heard", {"vector": vector, "as_of": "soon"}),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=told):
            store.search(index, **query)
    with pytest.raises(NotFound, match=r"no index 'nose' in .*; it has: heard, seen, sounds"):
        store.search("nose", text="a")
    with pytest.raises(NotFound, match=r"no training set 'nose' in .*; it has: \w+"):
        store.training_set("nose")


@pytest.mark.parametrize("content", [None, b"", b"no picture"])
def test_a_file_that_is_no_query_is_named(store: FeatureStore, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "query.png"
    if content is None:
        with pytest.raises(InputError, match=rf"^image '{path}' cannot be read: No such file or directory; correct"):
            store.search("seen", image=path)
        return
    path.write_bytes(content)
    told = "unsupported_format" if content else "empty"
    with pytest.raises(InputError, match=rf"^image '{path}' cannot be searched by: {told}: .*; give another image"):
        store.search("seen", image=path)
    with pytest.raises(InputError, match=rf"^the image given cannot be searched by: {told}: "):
        store.search("seen", image=content)
    with pytest.raises(InputError, match=r"^text '   ' cannot be searched by: empty: "):
        store.search("seen", text="   ")


def test_a_zero_vector_points_nowhere_and_is_refused(store: FeatureStore) -> None:
    with pytest.raises(InputError, match="all zeros"):
        store.search("heard", vector=np.zeros(store.index("heard").space.dim))


def test_a_hit_opens_its_sample(store: FeatureStore, made: Made) -> None:
    manifest = {row["id"]: row for row in map(json.loads, (made.corpus / "manifest.jsonl").read_text().splitlines())}
    hits = store.search("seen", text="A huge blue cross", k=20)
    assert len(hits) == 20
    for hit in hits:
        row = manifest[hit.id]
        assert (
            hit.text == row["caption"]
            or (row["caption"] is None and hit.raw("text") is not None)
            or row["note_path"] is None
        )
        assert (hit.image is None) == (row["image_path"] is None)
        assert (hit.audio is None) == (row["sound_path"] is None)
        if hit.image is not None:
            assert (hit.image.mode, hit.image.size) == ("RGB", (SIDE, SIDE))
            assert hit.raw("image") == (made.corpus / row["image_path"]).read_bytes()
        if hit.audio is not None:
            samples, rate = hit.audio
            assert (samples.dtype, samples.ndim, rate) == (np.float32, 1, SAMPLE_RATE)
            assert len(samples) == round(0.3 * SAMPLE_RATE)
        assert {"group": row["group"], "label": row["label"]}.items() <= hit.columns.items()
        assert hit.id in repr(hit)


class _Sample:
    """Stands in for a place in a corpus: a sample with such values."""

    def __init__(self, **values: bytes) -> None:
        self._values = values

    def raw(self, modality: str) -> bytes | None:
        return self._values.get(modality)


def test_a_hit_with_values_that_cannot_be_decoded_opens_the_others() -> None:
    sample = _Sample(text=b"   ", image=b"no picture", audio=b"no sound")
    hit = Hit("a", 0.5, "v", {}, sample)  # type: ignore[arg-type]
    assert (hit.text, hit.image, hit.audio) == (None, None, None)


def test_a_hit_shows_itself_in_a_notebook_and_nothing_in_it_is_obeyed() -> None:
    picture = io.BytesIO()
    Image.new("RGB", (400, 300), "red").save(picture, "PNG")
    evil = "<script>alert(1)</script>"
    sample = _Sample(text=evil.encode(), image=picture.getvalue(), audio=b"RIFF")
    hit = Hit(f"a&b/{evil}", 0.5, f"v{evil}", {"label": evil}, sample)  # type: ignore[arg-type]
    shown = Hits([hit])._repr_html_()
    assert "<script" not in shown
    assert shown.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 3
    assert "<b>a&amp;b/" in shown
    assert '<img src="data:image/png;base64,' in shown
    assert '<audio controls src="data:;base64,UklGRg==">' in shown
    bare = Hit("id", 0.5, "v", {}, _Sample())._repr_html_()  # type: ignore[arg-type]
    assert bare == "<div><b>id</b> 0.500 <i>v</i><br></div>"


def test_times_keep_their_nanoseconds(small: Made, tmp_path: Path) -> None:
    copy, exact = small.copy_to(tmp_path), 1_700_000_000_123_456_789
    rows = [json.loads(line) | {"added": exact} for line in (copy.corpus / "manifest.jsonl").read_text().splitlines()]
    (copy.corpus / "manifest.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    copy.spec.write_text(copy.spec.read_text().replace(str(copy.store), str(tmp_path / "new")))
    Runner(load(copy.spec), Console(quiet=True)).run(("shard", "encode", "align", "index"))
    store = FeatureStore(tmp_path / "new")
    query = space_vector(store, "heard")
    assert len(store.search("heard", vector=query, k=99, as_of=exact)) == 36
    assert store.search("heard", vector=query, as_of=exact - 1) == []
    hit = store.search("heard", vector=query, k=1)[0]
    assert hit.columns["event_timestamp"] == "2023-11-14T22:13:20.123456789Z"
    entry = store.corpus("planted").shards[0]
    assert (entry.event_min_ns, entry.event_max_ns) == (exact, exact)


def test_take_scanner_and_to_arrow_agree_row_by_row(store: FeatureStore) -> None:
    view = store.view("sound")
    whole = view.to_arrow()
    assert whole.schema == view.schema
    assert whole["id"].to_pylist() == store.corpus("planted").to_arrow()["id"].to_pylist()
    for batch_size in (1, 3, 4096):
        batches = list(view.scanner(batch_size=batch_size))
        assert max(len(batch) for batch in batches) <= batch_size
        assert pa.Table.from_batches(batches).equals(whole)
    ids = whole["id"].to_pylist()
    order = [*np.random.default_rng(0).permutation(len(ids)).tolist(), 5, 5, 0]
    expected = whole.take(order)
    assert view.take([ids[row] for row in order]).equals(expected)
    assert view.take(order).equals(expected)
    assert view.take(np.array(order)).equals(expected)
    assert view.take([]).equals(whole.slice(0, 0))
    chosen = view.take(order[:4], ["miss_reason", "id"])
    assert chosen.equals(expected.slice(0, 4).select(["miss_reason", "id"]))
    matrix, present = view.matrix()
    assert present.tolist() == whole["present"].to_pylist()
    assert [row is None for row in whole["embedding"].to_pylist()] == (~present).tolist()
    assert matrix[present].tolist() == [row for row in whole["embedding"].to_pylist() if row is not None]


def test_reading_what_is_not_there_says_what_is(store: FeatureStore) -> None:
    view = store.view("sound")
    for told, ask in [
        (r"no view 'smell' in .*; it has: caption, image, sound, timbre", lambda: store.view("smell")),
        (r"no corpus 'x' in .*; it has: planted", lambda: store.corpus("x")),
        (r"no sample 'nobody' in version", lambda: view.take(["nobody"])),
        (r"no row 160; it has rows 0 to 159", lambda: view.take([160])),
        (r"no row -1; it has rows 0 to 159", lambda: view.take([-1])),
    ]:
        with pytest.raises(NotFound, match=told):
            ask()
    with pytest.raises(InputError, match="no column 'vector'; allowed: id, present, embedding"):
        view.to_arrow(["vector"])
    with pytest.raises(InputError, match="batch_size is 0; allowed: a whole number, at least 1"):
        list(view.scanner(batch_size=0))


def test_a_pinned_version_answers_the_same_after_new_commits(small: Made, tmp_path: Path) -> None:
    copy = small.copy_to(tmp_path)
    old = copy.open()
    query = space_vector(old, "heard")
    before, rows = old.search("heard", vector=query, k=99), old.view("loud").to_arrow()
    manifest = copy.corpus / "manifest.jsonl"
    first = json.loads(manifest.read_text().splitlines()[0])
    with manifest.open("a") as file:
        file.writelines(json.dumps(first | {"id": f"new/{n}"}) + "\n" for n in range(3))
    runner = Runner(load(copy.spec), Console(quiet=True))

    runner.run(("shard",))
    runner.run(("encode",))
    assert len(copy.open().view("loud").to_arrow()) == 51

    for pinned in (old, copy.open(old.version)):
        again = pinned.search("heard", vector=query, k=99)
        assert [hit[:4] for hit in again] == [hit[:4] for hit in before]
        assert pinned.view("loud").to_arrow().equals(rows)
        assert pinned.corpus("planted").rows == 48


def test_a_query_through_another_encoder_than_the_view_was_made_with_is_refused(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featurestore.encoders import mel

    _, raw = a_value(made.open(), "sound")
    monkeypatch.setitem(mel.SPECTROGRAM, "hop", 99)
    with pytest.raises(
        StoreError, match=r"view 'sound' was encoded by another log-mel than the one here .*differ in preprocessing"
    ):
        made.open().search("heard", audio=raw)


def test_a_changed_index_file_does_not_answer(small: Made, tmp_path: Path) -> None:
    copy = small.copy_to(tmp_path)
    entry = next(entry for entry in copy.open().snapshot.entries("index", "heard") if entry.shard == "index")
    content = bytearray((copy.store / entry.path).read_bytes())
    content[-4:] = struct.pack("<f", 0.5)
    (copy.store / entry.path).write_bytes(content)
    with pytest.raises(AlignmentError, match=r"indexes/heard/.*\.faiss: sha256 .* where the catalog says"):
        copy.open().search("heard", vector=np.ones(8))
