"""What a manifest names outside of its own folder: rejected, unless the spec allows it."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featurestore.errors import DecodeError, InputError, SpecError
from featurestore.storage import Storage
from featurestore.store import FeatureStore
from jobs import spec as specs
from jobs.plan import corpus_dict
from jobs.report import rejected
from pipelines.sources import open_source
from pipelines.sources.bounds import bounds_of
from pipelines.sources.files import FileValue
from tests.faults.stores import shard_corpus

SPEC = """\
version: 1
store: {{uri: {folder}/store}}
corpus:
  name: notes
  source: {{type: {kind}, path: {path}{more}}}
  fields: {{note: {{modality: text, from: note, read: file}}}}
  failure_budget: 100%
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder `in` with a text, links and a folder that is a link; beside it `out` and `inside`, which are not to be read."""
    for name in ("in", "out", "inside"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(f"a text {name}")
    (tmp_path / "in/link.txt").symlink_to("../out/a.txt")
    (tmp_path / "in/there.txt").symlink_to("a.txt")
    (tmp_path / "in/more").symlink_to("../out")
    return tmp_path


def corpus_of(folder: Path, path: Path, kind: str = "manifest", more: str = "") -> dict[str, Any]:
    return corpus_dict(specs.parse(SPEC.format(folder=folder, kind=kind, path=path, more=more), "spec.yaml"))


def names(folder: Path) -> list[str]:
    return [
        *("a.txt", "there.txt", f"{folder}/in/a.txt", f"file://{folder}/in/a.txt", "../in/a.txt"),
        *(
            "../out/a.txt",
            "../inside/a.txt",
            f"{folder}/out/a.txt",
            f"file://{folder}/out/a.txt",
            "link.txt",
            "more/a.txt",
        ),
        *(f"local://{folder}/out/a.txt", f"{folder}/in/../out/a.txt", "more/../../out/a.txt"),
    ]


IN = 5


def write(folder: Path, kind: str) -> Path:
    rows = [{"id": f"{number:02}", "note": name} for number, name in enumerate(names(folder))]
    path = folder / ("in/m.jsonl" if kind == "manifest" else "in/m.parquet")
    if kind == "manifest":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["manifest", "parquet"])
def test_what_leads_out_of_the_manifests_folder_is_rejected_and_nothing_of_it_is_opened(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = io.open

    def watched(path: Any, *given: Any, **more: Any) -> Any:
        opened.append(os.path.realpath(path) if isinstance(path, str) else "")
        return real(path, *given, **more)

    monkeypatch.setattr("builtins.open", watched)
    corpus = corpus_of(folder, write(folder, kind), kind)
    shard_corpus(Storage.of(folder / "store"), corpus)
    store = FeatureStore(folder / "store")
    bad = {row["id"]: (row["reason"], row["detail"]) for row in rejected(store, "notes")}
    assert {each: reason for each, (reason, _) in bad.items()} == {
        f"{number:02}": "outside" for number in range(IN, len(names(folder)))
    }
    told = (
        "../out/a.txt: it leads out of the folder of what names it; name the folder that it is in as corpus.source.root"
    )
    assert bad[f"{IN:02}"][1] == told
    stored = store.corpus("notes")
    for number in range(IN):
        assert stored.value(*stored.locate(f"{number:02}"), "note") == b"a text in"
    assert str(folder / "in/a.txt") in opened
    assert not [path for path in opened if path.startswith((f"{folder}/out", f"{folder}/inside"))]


def test_a_root_allows_what_is_in_it_and_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(folder, "manifest")
    for more in (
        f", root: {folder}/out",
        f", root: [{folder}/nowhere, {folder}/out/]",
        f", root: 'file://{folder}/out'",
    ):
        texts = fetched(corpus_of(folder, path, more=more))
        # The last one's dots are counted from where the link leads.
        assert texts == [*["a text in"] * IN, "a text out", "outside", *["a text out"] * 6, "outside"]
    monkeypatch.chdir(folder)
    assert fetched(corpus_of(folder, path, more=", root: out"))[IN] == "a text out"
    assert fetched(corpus_of(folder, path, more=", root: /"))[IN:] == [
        *("a text out", "a text inside", *["a text out"] * 6, "unreadable")
    ]


def fetched(corpus: dict[str, Any]) -> list[str]:
    source, found = open_source(corpus), []
    for sample in source.samples(source.references()):
        value = sample.values["note"]
        assert isinstance(value, FileValue)
        try:
            found.append(value.fetch().decode())
        except DecodeError as error:
            found.append(error.reason)
    return found


def test_a_value_is_another_sample_once_it_is_allowed(folder: Path) -> None:
    path = write(folder, "manifest")
    before = [each.etag for each in open_source(corpus_of(folder, path)).references()]
    after = [each.etag for each in open_source(corpus_of(folder, path, more=f", root: {folder}")).references()]
    assert [one == other for one, other in zip(before, after, strict=True)][:6] == [True] * IN + [False]


@pytest.mark.parametrize(
    ("manifest", "roots", "inside", "outside"),
    [
        ("/d/m.jsonl", (), ["s3://any/x", "https://host/x", "gs://b/../x", "file:///d/x"], ["file:///x", "file:///dx/y"]),
        ("/d/m.jsonl", ("s3://b/p",), ["s3://b/p/x", "file:///d/x"], ["s3://b/px", "s3://b/p/../x", "https://host/x"]),
        ("/d/m.jsonl", ("https://h/p/",), ["https://h/p/x?y=1"], ["https://h/p/%2e%2e/x", "http://h/p/x", "https://h/p"]),
        ("/d/m.jsonl", ("s3://b", "/e"), ["s3://b/x", "file:///e/x", "file:///d/x"], ["gs://b/x", "file:///f"]),
        ("s3://b/d/m.jsonl", (), ["s3://b/x", "s3://c/x"], ["file:///etc/passwd", "local:///etc/passwd"]),
        ("s3://b/d/m.jsonl", ("s3://c",), ["s3://b/d/x", "s3://c/x"], ["s3://b/x", "s3://b/d/../x"]),
        ("s3://b/d/m.jsonl", ("/e",), ["s3://b/x", "file:///e/x"], ["file:///etc/passwd", "file:///e/../etc/passwd"]),
    ],
)  # fmt: skip
def test_addresses_elsewhere_are_allowed_until_a_root_names_some(
    manifest: str, roots: tuple[str, ...], inside: list[str], outside: list[str]
) -> None:
    bounds = bounds_of(manifest, roots)
    assert [uri for uri in (*inside, *outside) if bounds.hold(uri)] == inside
    for uri in outside:
        value = FileValue(uri, "it", bounds)
        assert value.stat() == (0, "outside")
        with pytest.raises(DecodeError, match="outside: it: it leads out of"):
            value.fetch()
        with pytest.raises(DecodeError, match="outside: it: it leads out of"):
            value.open()


def test_what_is_no_root_is_told(folder: Path) -> None:
    with pytest.raises(InputError, match=r"corpus\.source\.root: addresses of this kind are not read; allowed: file"):
        list(open_source(corpus_of(folder, write(folder, "manifest"), more=", root: 'ftp://h/x'")).references())
    with pytest.raises(SpecError, match=r"line 5: corpus\.source\.root: only rows name files that may lie elsewhere"):
        corpus_of(folder, folder, "webdataset", ", root: /")
