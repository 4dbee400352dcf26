"""Tars that count their keys anew: `id: __row__` calls a sample by its tar and its key, and `braid init` writes that."""

import io
import os
from pathlib import Path

import pytest
import yaml
from PIL import Image
from rich.console import Console

from featurestore.catalog import Catalog, Snapshot
from featurestore.corpora import ROWS
from featurestore.errors import InputError
from featurestore.storage import Storage
from featurestore.store import FeatureStore
from featurestore.verify import verify
from jobs import init, plan
from jobs import spec as specs
from jobs.run import Runner
from pipelines.ingest import Known, scan
from pipelines.sources.webdataset import WebDataset
from tests.pipelines.tars import pairs, source_of, tar_of, values_of, written

SPEC = """
version: 1
store: {{uri: {folder}/store}}
corpus:
  name: tars
  source: {{type: webdataset, path: "{folder}/in/*.tar"{adopt}}}
  columns: {{id: __row__}}
  fields: {{image: {{modality: image, from: jpg}}, caption: {{modality: text, from: txt}}}}
"""


def picture(colour: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 40, 80)).save(out, "JPEG")
    return out.getvalue()


def tars(folder: Path, *names: str, samples: int = 3) -> Path:
    """Each with the same keys, and values of its own."""
    for name in names:
        path = folder / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        members = [(f"{n:04}.jpg", picture(n + 10 * len(name))) for n in range(samples)]
        texts = [(f"{n:04}.txt", f"{name}, {n}".encode()) for n in range(samples)]
        path.write_bytes(tar_of(sorted(members + texts)))
    return folder / "in"


def scanned(source: WebDataset) -> int:
    return scan(source, Known(Snapshot(Storage.of("/nowhere"), [], -1), "tars")).samples


def run(text: str) -> FeatureStore:
    spec = specs.parse(text, "spec")
    Runner(spec, Console(quiet=True)).run(("shard",))
    return FeatureStore(spec.store)


def test_a_sample_is_called_by_its_tar_and_its_key(tmp_path: Path) -> None:
    folder = tars(tmp_path, "00000.tar", "00001.tar", "more/v1.5.tar")
    numbered = {"id": "__row__"}
    source = source_of(f"{folder}/**/*.tar", columns=numbered)
    names = ("00000", "00001", "more/v1.5")
    references = list(source.references())
    assert [each.id for each in references] == [f"{name}/{n:04}" for name in names for n in range(3)]
    assert {each.id: each.columns["__key__"] for each in source.samples(references)} == {
        f"{name}/{n:04}": f"{n:04}" for name in names for n in range(3)
    }
    assert values_of(source)["00001/0002"]["caption"] == b"00001.tar, 2"
    assert "__row__" in source.columns()
    # However many tars are named.
    (one, *_), brace = (
        [each.id for each in source_of(path, columns=numbered).references()]
        for path in (f"{folder}/00001.tar", f"{folder}/{{00000..00001}}.tar")
    )
    assert one == "00001/0000"
    assert one in brace


def test_a_column_that_is_called_so_is_not_the_id(tmp_path: Path) -> None:
    path = written(tmp_path, tar_of([("k.txt", b"x"), ("k.json", b'{"__row__": "mine", "id": 7}')]))
    for columns, kept in (
        ({"id": "__row__"}, {"json.__row__": "mine", "json.id": 7, "__key__": "k"}),
        ({"id": "id"}, {"__row__": "mine", "json.id": 7}),
    ):
        source = source_of(path, columns=columns, caption=("text", "txt"))
        (sample,) = source.samples(list(source.references()))
        assert (sample.id, sample.columns) == ("000/k" if "__row__" in columns.values() else "k", kept)


def test_keys_that_repeat_are_told_with_what_to_write(tmp_path: Path) -> None:
    folder = tars(tmp_path, "00000.tar", "00001.tar")
    told = r"id '0000' stands twice: .*00000\.tar, byte 0 and .*00001\.tar, byte 0; .*write corpus\.columns: \{id: __row__\}"
    with pytest.raises(InputError, match=told):
        scanned(source_of(f"{folder}/*.tar"))
    assert scanned(source_of(f"{folder}/*.tar", columns={"id": "__row__"})) == 6
    # In one tar that is no way out, and is not offered.
    again = written(tmp_path, tar_of([*pairs(2), *pairs(1)]))
    for columns in ({}, {"id": "__row__"}):
        with pytest.raises(InputError, match=r"000' stands twice: .*so rename or remove one$"):
            scanned(source_of(again, columns=columns))


@pytest.mark.parametrize("adopt", [False, True])
def test_tars_come_in_as_they_are_and_more_of_them_change_none(tmp_path: Path, adopt: bool) -> None:
    text = SPEC.format(folder=tmp_path, adopt=", adopt: true" if adopt else "")
    tars(tmp_path, "00000.tar", "00001.tar")
    before = run(text)
    tars(tmp_path, "00000b.tar")
    store = run(text)
    corpus, ids = store.corpus("tars"), [f"{name}/{n:04}" for name in ("00000", "00001", "00000b") for n in range(3)]
    assert sorted(corpus.to_arrow()["id"].to_pylist()) == sorted(ids)
    assert {each.shard for each in before.snapshot.entries(ROWS)} < {
        each.shard for each in store.snapshot.entries(ROWS)
    }
    assert not corpus.gone
    for sample_id in ids:
        tar, _, key = sample_id.partition("/")
        assert corpus.value(*corpus.locate(sample_id), "caption") == f"{tar}.tar, {int(key)}".encode()
    media = list((tmp_path / "store/corpora").rglob("*.tar"))
    assert bool(media) != adopt, "an adopted tar is not written anew: its own keys stay in it"
    assert verify(store.storage, level="bytes").ok
    os.utime(tmp_path / "in/00001.tar", (1, 1))
    assert plan.ingest(specs.parse(text, "spec"), store.snapshot).touched == 3


def test_a_key_that_comes_back_in_an_adopted_tar_is_refused_without_an_offer_to_copy(tmp_path: Path) -> None:
    path = written(tmp_path, tar_of([*pairs(2), ("0000.png", b"x")]))
    with pytest.raises(InputError, match=r"key '0000' comes back after '0001'.*take it out of corpus\.source\.path"):
        list(source_of(path, columns={"id": "__row__"}, adopt=True).references())


def test_a_spec_that_init_writes_for_keys_that_repeat_plans_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tars(tmp_path, *(f"{number:05}.tar" for number in range(5)), samples=12)
    monkeypatch.chdir(tmp_path)
    output, found = init.write(str(folder), None)
    text = output.read_text()
    assert yaml.safe_load(text)["corpus"]["columns"] == {"id": "__row__"}
    assert "  # Keys stand in several tars: __row__ calls a sample by its tar and its key" in text
    assert found.seen[0] == "Of 5 files that end in .tar looked at: 00000.tar, 00002.tar, 00004.tar"
    assert found.samples == 36
    spec = specs.load(output)
    assert plan.steps(spec, Catalog(spec.store).peek())[0].why == "samples: 60 new"


def test_init_looks_at_more_than_the_first_tar(tmp_path: Path) -> None:
    for name, ending in (("a", "jpg"), ("b", "jpg"), ("c", "png")):
        written(tmp_path, tar_of([(f"{name}{n}.{ending}", picture(n)) for n in range(2)]), f"{name}.tar")
    found = init.look(str(tmp_path))
    assert [field.given for field in found.fields] == [["jpg", "png"]]
    assert found.columns.roles == {}
    (tmp_path / "b.tar").write_bytes((tmp_path / "c.tar").read_bytes())
    assert init.look(str(tmp_path)).columns.roles == {"id": "__row__"}
