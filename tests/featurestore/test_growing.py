"""Reading while a corpus grows: samples are there, and not encoded yet. Readers go on, and give no row of another sample."""

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from featurestore.errors import InputError, NotFound, StoreError
from featurestore.export import export_webdataset
from featurestore.store import FeatureStore
from featurestore.training import ROW_DIGEST
from featurestore.verify import verify
from featurestore.views import whole
from jobs.run import Runner
from jobs.spec import load
from tests.conftest import Made

NEW = [f"new/{n}" for n in range(20)]


class Growing(Made):
    """A store of 48 samples with 20 more, of which one stage after the other is run."""

    def run(self, *stages: str, only: str | None = None) -> FeatureStore:
        Runner(load(self.spec), Console(quiet=True)).run(stages, only)
        return self.open()


def query(store: FeatureStore) -> np.ndarray:
    return np.random.default_rng(0).normal(size=store.index("heard").space.dim)


@pytest.fixture
def grown(small: Made, tmp_path: Path) -> Growing:
    """Sharded, with 20 new samples and one that changed; nothing of it is encoded."""
    made = Growing(*small.copy_to(tmp_path))
    manifest = made.corpus / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    with_sound = next(row for row in rows if row["sound_path"])
    rows += [with_sound | {"id": each} for each in NEW]
    with_sound["label"] = "another"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made.run("shard")
    return made


def changed(made: Made) -> str:
    rows = (made.corpus / "manifest.jsonl").read_text().splitlines()
    return next(str(row["id"]) for row in map(json.loads, rows) if row["label"] == "another")


def test_a_view_is_read_at_the_shards_that_it_has(small: Made, grown: Growing) -> None:
    before, store = small.open().view("loud"), grown.open()
    view, gone = store.view("loud"), changed(grown)
    kept = [each for each in before.to_arrow(["id"])["id"].to_pylist() if each != gone]
    assert (view.rows, view.unencoded, store.corpus("planted").rows) == (47, 3, 68)
    assert repr(view).endswith("log-mel of planted.sound; 21 samples not encoded yet)")
    expected = before.take(kept)
    assert view.to_arrow().equals(expected)
    assert sum(len(batch) for batch in view.scanner(batch_size=5)) == 47
    assert view.take(range(47)).equals(expected)
    assert view.take(kept[::-1])["id"].to_pylist() == kept[::-1]
    matrix, present = view.matrix()
    assert present.tolist() == expected["present"].to_pylist()
    assert len(matrix) == 47
    for sample in (NEW[0], gone):
        with pytest.raises(NotFound, match=rf"'{sample}' is not encoded yet: view 'loud' has 6 of the 9 .*`braid run`"):
            view.take([kept[0], sample])
    with pytest.raises(NotFound, match="has no row 47; it has rows 0 to 46"):
        view.take([47])


def test_a_search_goes_on_through_every_stage_and_passes_over_what_is_gone(small: Made, grown: Growing) -> None:
    old = small.open()
    asked = query(old)
    expected = [hit[:4] for hit in old.search("heard", vector=asked, k=99) if hit.id != changed(grown)]
    assert len(expected) == 35
    # As wide as what is left: what is gone takes no hit's place.
    for stage in ("shard", "encode", "align"):
        store = grown.run(stage)
        found = store.search("heard", vector=asked, k=35)
        assert [hit[:4] for hit in found] == expected, stage
        assert store.index("heard").version < store.version
    store = grown.run("index")
    assert store.index("heard").version == store.version
    assert {*NEW, changed(grown)} <= {hit.id for hit in store.search("heard", vector=query(store), k=99)}


def test_a_training_set_is_as_it_was_until_it_is_built_again(small: Made, grown: Growing) -> None:
    found, expected = (made.open().training_set("heard").to_arrow("train") for made in (grown, small))
    assert found[ROW_DIGEST].equals(expected[ROW_DIGEST])


def test_verify_tells_of_each_view_once_and_of_nothing_else(grown: Growing) -> None:
    for level in ("footers", "bytes"):
        findings = verify(grown.open().storage, level=level).findings
        assert [(each.kind, each.name) for each in findings] == [
            ("view", "loud"),
            ("view", "short"),
            ("view", "timbre"),
        ]
        for each in findings:
            assert each.problem == "incomplete: the corpus has 9 shards, and the view has not this one, nor 2 more"
            assert each.mend == "`braid run` encodes what is missing"
    store = grown.run("encode")
    found = verify(store.storage).findings
    assert {each.kind for each in found} == {"space", "index", "training"}
    assert len(found) == 6
    assert all("stale" in each.problem for each in found)
    found = verify(grown.run("align", "index").storage).findings
    assert {each.kind for each in found} == {"training"}


def test_views_that_cover_the_same_shards_are_exported_and_others_refused_with_the_last_version_that_was_whole(
    small: Made, grown: Growing, tmp_path: Path
) -> None:
    tars = export_webdataset(grown.open(), ["loud", "timbre"], tmp_path / "now")
    assert len(tars) == 6
    version = small.open().version
    store = grown.run("encode", only="loud")
    told = (
        rf"view 'timbre' has 6 of the 9 shards of .*`braid run` encodes the rest; or read version {version}, the last"
    )
    with pytest.raises(StoreError, match=f"^the views cover different shards; {told}"):
        export_webdataset(store, ["loud", "timbre"], tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()
    with pytest.raises(StoreError, match=told):
        whole(store.snapshot, ["loud", "timbre"])
    assert [*whole(store.snapshot, ["loud"])] == ["loud"]
    before = export_webdataset(grown.open(version), ["loud", "timbre"], tmp_path / "then")
    whole_tars = export_webdataset(small.open(), ["loud", "timbre"], tmp_path / "small")
    assert [tar.read_bytes() for tar in before] == [tar.read_bytes() for tar in whole_tars]
    assert len(export_webdataset(store, ["loud"], tmp_path / "one")) == 9


def test_one_text_is_no_list_and_half_a_row_is_none(small: Made) -> None:
    view = small.open().view("loud")
    with pytest.raises(InputError, match=r"ids is one text, 'a/1'; give a list: \['a/1'\]"):
        view.take("a/1")
    with pytest.raises(InputError, match=r"columns is one text, 'id'; give a list"):
        view.to_arrow("id")
    with pytest.raises(InputError, match=r"an item of ids \(all texts, or all row numbers\) is 2\.5; allowed: a whole"):
        view.take([2.5])  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"batch_size is '3'; allowed: a whole number, at least 1"):
        view.scanner(batch_size="3")  # type: ignore[arg-type]
