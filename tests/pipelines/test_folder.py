"""Folders as people have them: which file is whose, what is left out, and what becomes of links and of doubles."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from featurestore.errors import DecodeError, InputError, SpecError
from featurestore.store import FeatureStore
from featurestore.verify import verify
from jobs import plan
from jobs import spec as specs
from jobs.report import field_counts, rejected
from jobs.run import Runner
from pipelines.sources.files import FileValue
from pipelines.sources.folder import Ambiguous, Folder, Listed, Patterns, listing
from tests.loopback_s3 import loopback_s3

TEXTS = {"text": ["{id}.txt", "{id}.md"], "desc": "{id}_desc.txt"}


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"the text of {name}".encode("utf-8", "surrogateescape"))


FIELDS = {name: {"modality": "text", "from": given, "read": None} for name, given in TEXTS.items()}


def source_of(folder: Path | str, fields: dict[str, Any] | None = None, **columns: str) -> Folder:
    return Folder(
        {
            "source": {"type": "folder", "path": [str(folder)]},
            "columns": {"id": "id", **columns},
            "fields": {
                name: {"modality": "text", "from": given, "read": None} for name, given in (fields or TEXTS).items()
            },
        }
    )


def found(source: Folder) -> dict[str, dict[str, str]]:
    """Id -> field -> the file's text, as a worker reads it, in the source's order."""
    return {
        sample.id: {field: value.fetch().decode() for field, value in sample.values.items() if value is not None}
        for sample in source.samples(source.references())
    }


def test_samples_are_the_union_of_the_ids_in_the_order_of_their_ids(tmp_path: Path) -> None:
    put(tmp_path, "b/2.txt", "b/2_desc.txt", "a/9.md", "10.txt", "b/only_desc.txt", "b/x.png", "b/2.json")
    assert found(source_of(tmp_path)) == {
        "10": {"text": "the text of 10.txt"},
        "a/9": {"text": "the text of a/9.md"},
        "b/2": {"text": "the text of b/2.txt", "desc": "the text of b/2_desc.txt"},
        "b/only": {"desc": "the text of b/only_desc.txt"},
    }


@pytest.mark.parametrize(
    "name",
    [
        "a b",
        "v1.5/clip 0.37",
        "100%/50%25",
        "ä/字",
        "e\u0301",
        "_desc",
        "a#b?c=1&d",
        "tab\there",
        "x::y",
        "[1]*{2}",
        "~",
    ],
)
def test_a_name_is_an_id_as_it_stands(tmp_path: Path, name: str) -> None:
    put(tmp_path, f"{name}.txt", f"{name}_desc.txt")
    assert found(source_of(tmp_path)) == {
        name: {"text": f"the text of {name}.txt", "desc": f"the text of {name}_desc.txt"}
    }


def test_parts_before_and_behind_the_id_join_folders_beside_each_other(tmp_path: Path) -> None:
    put(tmp_path, "texts/a/1.txt", "descs/a/1.txt", "texts/2.txt", "1.txt", "texts/.txt", "whole/3/t.txt")
    fields = {"text": "texts/{id}.txt", "desc": "descs/{id}.txt", "whole": "whole/{id}/t.txt", "rest": "{id}.txt"}
    assert {sample_id: sorted(values) for sample_id, values in found(source_of(tmp_path, fields)).items()} == {
        "1": ["rest"],
        "2": ["text"],
        "3": ["whole"],
        "a/1": ["desc", "text"],
    }


def test_the_longest_pattern_takes_a_file_wherever_it_stands_in_the_spec() -> None:
    for fields in (
        {"short": "{id}.ogg", "long": "{id}_desc.ogg"},
        {"long": "{id}_desc.ogg", "short": "{id}.ogg"},
    ):
        patterns = Patterns(fields)
        for path, field, sample_id in (
            ("a/7_desc.ogg", "long", "a/7"),
            ("a/7.ogg", "short", "a/7"),
            ("_desc.ogg", "short", "_desc"),
        ):
            matched = patterns.match(path)
            assert matched is not None
            assert (patterns.all[matched[0]].field, matched[1]) == (field, sample_id)
    assert [patterns.match(path) for path in ("a.OGG", ".ogg", "a/_desc.ogg/x", "ogg")] == [None] * 4
    assert Patterns({"whole": "{id}/a.png"}).match("/a.png") is None


PARTS = st.text("ab_./", max_size=4)


@given(fields=st.lists(st.tuples(PARTS, PARTS), min_size=1, max_size=4, unique=True), path=st.text("ab_./", max_size=8))
@settings(max_examples=300)
def test_a_match_is_the_longest_and_leads_back_to_the_file(fields: list[tuple[str, str]], path: str) -> None:
    given_patterns = {f"f{number}": f"{before}{{id}}{after}" for number, (before, after) in enumerate(fields)}
    try:
        patterns = Patterns(given_patterns)
        matched = patterns.match(path)
    except InputError:
        return
    fits = [
        len(before + after)
        for before, after in fields
        if path.startswith(before)
        and path.endswith(after)
        and len(middle := path[len(before) : len(path) - len(after)]) + len(before + after) == len(path)
        and middle.strip("/") == middle != ""
    ]
    if matched is None:
        assert fits == []
    else:
        number, sample_id = matched
        assert patterns.all[number].path(sample_id) == path
        assert len(str(patterns.all[number])) - len("{id}") == max(fits)


def test_a_file_that_two_equally_long_patterns_match_is_told(tmp_path: Path) -> None:
    put(tmp_path, "ab.txt")
    told = r"'ab\.txt' matches 'a\{id\}\.txt' of field 'one' and '\{id\}b\.txt' of field 'two', which are equally long"
    with pytest.raises(InputError, match=told):
        list(source_of(tmp_path, {"one": "a{id}.txt", "two": "{id}b.txt"}).references())


def test_columns_are_the_id_its_folder_and_its_name(tmp_path: Path) -> None:
    put(tmp_path, "top.txt", "a/b/c.txt", "a/b/d.txt")
    source = source_of(tmp_path)
    samples = {sample.id: sample for sample in source.samples(source.references())}
    assert source.columns() == {"id", "folder", "name"}
    assert source.kept() == {"id", "group", "folder", "name"}
    assert samples["a/b/c"].columns == {"folder": "a/b", "name": "c"}
    assert samples["top"].columns == {"folder": None, "name": "top"}
    grouped = source_of(tmp_path, group="folder")
    assert [(each.id, each.group) for each in grouped.references()] == [
        ("a/b/c", "a/b"),
        ("a/b/d", "a/b"),
        ("top", "top"),
    ]
    samples = {sample.id: sample for sample in grouped.samples(grouped.references())}
    assert samples["a/b/c"].columns == {"folder": "a/b", "name": "c"}, "as it is, where it is the group too"
    assert samples["top"].columns["folder"] is None


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", ".b.txt", ".git/c.txt", "d/.e/f.txt", "d/g.h/i.txt")
    assert [each.id for each in source_of(tmp_path).references()] == ["a", "d/g.h/i"]


def test_two_files_for_one_value_are_both_named_and_the_sample_stays(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", "a.md", "a_desc.txt", "b.md")
    source = source_of(tmp_path)
    first, second = source.samples(source.references())
    value = first.values["text"]
    assert isinstance(value, Ambiguous)
    with pytest.raises(DecodeError, match=r"^ambiguous: a\.txt, a\.md: 2 files for one value; keep one"):
        value.fetch()
    assert first.values["desc"] is not None
    assert second.values["text"] is not None
    before = etags(source)
    os.utime(tmp_path / "a.md", (1, 1))
    assert etags(source)["a"] != before["a"]


def etags(source: Folder) -> dict[str, str]:
    return {reference.id: reference.etag for reference in source.references()}


def test_an_etag_changes_with_a_files_size_and_time_and_with_which_files_there_are(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", "b.txt", "c.txt", "d.txt", "e.txt", "e_desc.txt")
    before = etags(source_of(tmp_path))
    assert etags(source_of(tmp_path)) == before
    os.utime(tmp_path / "a.txt", (1, 1))
    times = os.stat(tmp_path / "b.txt")
    (tmp_path / "b.txt").write_text("longer than it was before")
    os.utime(tmp_path / "b.txt", ns=(times.st_atime_ns, times.st_mtime_ns))
    put(tmp_path, "c_desc.txt")
    for old, new in (("e.txt", "aside"), ("e_desc.txt", "e.txt"), ("aside", "e_desc.txt")):
        (tmp_path / old).rename(tmp_path / new)
    after = etags(source_of(tmp_path))
    assert {sample_id for sample_id in before if before[sample_id] != after[sample_id]} == {"a", "b", "c", "e"}


def test_planning_opens_no_file_and_knows_their_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "a.txt", "a_desc.txt", "b.txt")
    opened: list[str] = []
    sys.addaudithook(
        lambda event, args: opened.append(str(args[0])) if event == "open" and opened is not None else None
    )
    monkeypatch.setattr(FileValue, "stat", lambda self: pytest.fail(f"{self.uri} was asked for again"))
    opened.clear()
    sizes = {each.id: each.bytes for each in source_of(tmp_path).references()}
    assert [path for path in opened if path.startswith(str(tmp_path))] == []
    assert sizes == {name: sum(path.stat().st_size for path in tmp_path.glob(f"{name}*.txt")) for name in "ab"}


@pytest.mark.parametrize("given", [["f/a", "f/b"], ["f/{a,b}"], ["f/*"], ["f/b", "f/a", "f/a/"], ["f/[ab]"]])
def test_several_folders_have_ids_of_the_folder_that_they_are_in(tmp_path: Path, given: list[str]) -> None:
    put(
        tmp_path, "f/a/1.txt", "f/a/x/2.txt", "f/b/1.txt", "f/b/1_desc.txt", "f/top.txt", "f/.hidden/3.txt", "f/b-/4.md"
    )
    shutil.rmtree(tmp_path / "f/b-")
    paths = [f"{tmp_path}/{each}" for each in given]
    source = Folder({"source": {"path": paths}, "columns": {"id": "id", "group": "folder"}, "fields": FIELDS})
    assert found(source) == {
        "a/1": {"text": "the text of f/a/1.txt"},
        "a/x/2": {"text": "the text of f/a/x/2.txt"},
        "b/1": {"text": "the text of f/b/1.txt", "desc": "the text of f/b/1_desc.txt"},
    }
    references = list(source.references())
    assert [each.group for each in references] == ["a", "a/x", "b"]
    assert source.place(references[2]).endswith("f/b, sample 'b/1'")
    (sample,) = source.samples(references[2:])
    assert {field: value.source for field, value in sample.values.items() if value} == {
        "text": "b/1.txt",
        "desc": "b/1_desc.txt",
    }


def test_a_pattern_that_finds_one_folder_gives_the_ids_that_it_gives_with_more(tmp_path: Path) -> None:
    put(tmp_path, "f/a/1.txt")
    assert [*found(source_of(tmp_path / "f/*"))] == ["a/1"]
    assert [*found(source_of(tmp_path / "f/a"))] == ["1"]
    put(tmp_path, "f/a-b/1.txt", "f/c/1.txt")
    assert [*found(source_of(tmp_path / "f/*"))] == ["a-b/1", "a/1", "c/1"]
    (tmp_path / "f/a/leak.txt").symlink_to("../c/1.txt")
    source = source_of(tmp_path / "f/*")
    values = {each.id: each.values["text"] for each in source.samples(source.references())}
    with pytest.raises(DecodeError, match=r"outside: a/leak\.txt: a link that leads out"):
        values["a/leak"].fetch()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["f", "f/a"], "folder .*f/a lies in folder .*f, and its files would come in twice; name one of them"),
        (["f/*", "f/a/x"], "folder .*f/a/x lies in folder .*f/a, and"),
        (["f/*.d"], "names no file; correct the pattern"),
        (["f/*.txt"], "names no folder; correct the pattern"),
        (["f/a", "s3://bucket/b"], "are in no one place; make them corpora of their own"),
        (["f/{a,nowhere}"], "nowhere cannot be read: No such file or directory"),
    ],
)
def test_folders_that_cannot_be_one_corpus_are_told(tmp_path: Path, given: list[str], told: str) -> None:
    put(tmp_path, "f/a/x/1.txt", "f/b/1.txt", "f/2.txt")
    paths = [each if "://" in each else f"{tmp_path}/{each}" for each in given]
    with pytest.raises(InputError, match=told):
        list(Folder({"source": {"path": paths}, "columns": {"id": "id"}, "fields": FIELDS}).references())


def test_links_are_followed_to_files_and_never_out_of_the_folder(tmp_path: Path) -> None:
    put(tmp_path, "in/real/a.txt", "out/secret.txt", "in.txt")
    folder = tmp_path / "in"
    (folder / "alias.txt").symlink_to("real/a.txt")
    (folder / "leak.txt").symlink_to("../out/secret.txt")
    (folder / "sibling.txt").symlink_to("../in.txt")
    (folder / "broken.txt").symlink_to("nowhere.txt")
    (folder / "loop.txt").symlink_to("loop.txt")
    (folder / "up").symlink_to("..")
    (folder / "again").symlink_to("real")
    (folder / "folder.txt").symlink_to("real")
    os.mkfifo(folder / "pipe.txt")
    source = source_of(folder)
    reasons: dict[str, str] = {}
    told: list[str] = []
    for sample in source.samples(source.references()):
        value = sample.values["text"]
        assert value is not None
        try:
            assert value.fetch() == b"the text of in/real/a.txt"
        except DecodeError as error:
            reasons[sample.id], told = error.reason, [*told, error.detail]
    assert [each.id for each in source.references()] == [
        *("alias", "broken", "leak", "loop", "pipe", "real/a", "sibling"),
    ]
    sizes = {each.id: each.bytes for each in source.references()}
    assert sizes["alias"] == sizes["real/a"] == len("the text of in/real/a.txt")
    assert not any(str(tmp_path) in each for each in told), "a folder of this machine"
    assert reasons == {
        "leak": "outside",
        "sibling": "outside",
        "broken": "unreadable",
        "loop": "unreadable",
        "pipe": "unreadable",
    }
    (tmp_path / "link").symlink_to(folder)
    assert [each.id for each in source_of(tmp_path / "link").references()] == [each.id for each in source.references()]
    assert found(source_of(tmp_path / "link" / "real")) == {"a": {"text": "the text of in/real/a.txt"}}


def test_a_reference_that_was_tampered_with_reads_nothing_outside(tmp_path: Path) -> None:
    put(tmp_path, "in/a.txt", "secret.txt")
    source = source_of(tmp_path / "in")
    (reference,) = source.references()
    forged = reference._replace(id="../secret", group="../secret")
    (sample,) = source.samples([forged])
    value = sample.values["text"]
    assert value is not None
    with pytest.raises(DecodeError, match=r"^outside: "):
        value.fetch()


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ((), r"has no file that matches '.*', '\{id\}\.txt', .*; files there: 0; correct corpus\.source\.path"),
        (("a.png", "b.png"), r"has no file that matches .*; files there: 2, e\.g\. 'a\.png'; .* `braid init FOLDER`"),
        (("caf\udce9.txt",), r"id 'caf\\udce9' is not valid UTF-8; correct it in the source"),
        (("x" * 200 + "/" + ("y" * 200 + "/") * 5 + "z.txt",), r"has 1207 bytes; at most 1024 are allowed"),
    ],
)
def test_a_folder_without_samples_or_with_a_name_that_is_no_id_is_told(
    tmp_path: Path, names: tuple[str, ...], told: str
) -> None:
    put(tmp_path, *names)
    with pytest.raises(InputError, match=told) as raised:
        list(source_of(tmp_path).references())
    str(raised.value).encode()


def test_a_folder_that_is_none_is_told(tmp_path: Path) -> None:
    put(tmp_path, "a.txt")
    for path, told in (
        (tmp_path / "none", r"none cannot be read: No such file or directory; correct the path"),
        (tmp_path / "a.txt", r"a\.txt/? cannot be read: Not a directory"),
        ("http://127.0.0.1:1/x", r"a web server does not list its files; write a manifest of their addresses"),
        ("ftp://host/x", r"addresses of this kind are not read; allowed: file, "),
    ):
        with pytest.raises(InputError, match=told):
            list(source_of(path).references())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_in_it_that_may_not_be_read_is_told(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", "b/c.txt")
    (tmp_path / "b").chmod(0)
    with pytest.raises(InputError, match=r"/b/? cannot be read: Permission denied"):
        list(source_of(tmp_path).references())


SPEC = """\
version: 1
store: {{uri: {folder}/store}}
corpus:
  name: texts
  source: {{type: folder, path: {folder}/in}}
  columns: {{group: folder}}
  fields:
    text: {{modality: text, from: ["{{id}}.txt", "{{id}}.md"]}}
    desc: {{modality: text, from: "{{id}}_desc.txt"}}
  shard_rows: 4
  failure_budget: 20%
"""


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"{id}_desc.txt"', "desc", r"line 9: corpus.fields.desc.from: pattern 'desc' must have {id} in it once"),
        ('"{id}_desc.txt"', "'{id}/{id}.txt'", "line 9: corpus.fields.desc.from: pattern '{id}/{id}.txt' must have"),
        ('"{id}_desc.txt"', "'../{id}.txt'", "pattern '../{id}.txt' must be a path below the folder"),
        ('"{id}_desc.txt"', "'/in/{id}.txt'", "pattern '/in/{id}.txt' must be a path below the folder"),
        ('"{id}_desc.txt"', "'.x/{id}.txt'", "hidden files are left out"),
        (
            '"{id}_desc.txt"',
            "'{id}.md'",
            "line 9: corpus.fields.desc.from: pattern '{id}.md' is one of field 'text' alr",
        ),
        ('"{id}_desc.txt"', "[]", "line 9: corpus.fields.desc.from: [] is wrong: write a text, or a list of texts"),
        ('"{id}_desc.txt"', "[7]", "write a text, or a list of texts"),
        ("desc:", "name:", "line 9: corpus.fields.name.from: every sample of a folder has a column 'name'; rename"),
        (
            "group: folder",
            "group: album",
            "columns.group: 'album' is no column of a folder for this; allowed: id, folder",
        ),
        (
            "group: folder",
            "id: name",
            "line 6: corpus.columns.id: 'name' is no column of a folder for this; allowed: id",
        ),
        (
            "modality: text, from: [",
            "modality: text, read: inline, from: [",
            "a folder's values are files: leave it out",
        ),
        ("type: folder", "type: manifest", 'line 8: corpus.fields.text.from: ["{id}.txt", "{id}.md"] is a list: name'),
    ],
)
def test_a_spec_that_a_folder_cannot_have_is_told_by_its_line(old: str, new: str, told: str) -> None:
    text = SPEC.format(folder="x")
    assert text.count(old) == 1
    specs.parse(text, "spec")
    with pytest.raises(SpecError) as caught:
        specs.parse(text.replace(old, new), "spec")
    assert told in str(caught.value)


def test_more_patterns_than_a_reference_can_tell_are_refused() -> None:
    with pytest.raises(InputError, match="63 patterns in all; at most 62 are allowed"):
        Patterns({"text": [f"{{id}}.{number}" for number in range(63)]})
    assert len(Patterns({"text": [f"{{id}}.{number}" for number in range(62)]}).all) == 62


def run(text: str) -> FeatureStore:
    spec = specs.parse(text, "spec")
    Runner(spec, Console(quiet=True)).run(("shard",))
    return FeatureStore(spec.store)


def test_a_run_stores_every_sample_once_and_a_second_one_only_what_is_new(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    names = [f"{group}/{number}" for group in ("a", "b c", "ü") for number in range(5)]
    put(folder, *(f"{name}.txt" for name in names), *(f"{name}_desc.txt" for name in names[::2]), "a/0.md", "left.png")
    (folder / "a/1.txt").write_bytes(b"Caf\xe9")
    text = SPEC.format(folder=tmp_path)
    store = run(text)
    corpus = store.corpus("texts")
    table = corpus.to_arrow().to_pylist()
    assert sorted(row["id"] for row in table) == sorted(names)
    assert {row["group"] for row in table} == {"a", "b c", "ü"}
    assert {row["name"] for row in table} == set("01234")
    for entry in corpus.shards:
        for row, sample_id in enumerate(corpus.ids(entry.shard)):
            raw = corpus.value(entry.shard, row, "desc")
            assert raw == (f"the text of {sample_id}_desc.txt".encode() if names.index(sample_id) % 2 == 0 else None)
    assert field_counts(store, "texts")["text"] == {"present": 13, "missing": 0, "quarantined": 2}
    assert {row["id"]: row["reason"] for row in rejected(store, "texts")} == {
        "a/0": "ambiguous",
        "a/1": "invalid_utf8",
    }
    assert not verify(store.storage).findings
    put(folder, "new/1.txt", "new/2.txt")
    left = "files that no pattern takes, left out: 1 (1 .png), e.g. 'left.png'"
    assert shard_step(text, store) == (plan.STALE, 2, 17, f"samples: 2 new; {left}")
    grown = run(text)
    assert {entry.shard for entry in corpus.shards} < {entry.shard for entry in grown.corpus("texts").shards}
    assert shard_step(text, grown) == (plan.FRESH, 0, 17, f"17 samples stored; {left}")
    (folder / "new/1.txt").write_text("another text")
    put(folder, "b c/1_desc.txt")
    (folder / "ü/0_desc.txt").unlink()
    (folder / "ü/4.txt").unlink()
    (folder / "ü/4_desc.txt").unlink()
    os.utime(folder / "a/2.txt", (1, 1))
    told = f"samples: 2 changed, 1 gone; 2 touched: `braid run` compares them once; {left}"
    assert shard_step(text, grown) == (plan.STALE, 2, 16, told)


def shard_step(text: str, store: FeatureStore) -> tuple[str, int, int, str]:
    (step,) = [step for step in plan.steps(specs.parse(text, "spec"), store.snapshot) if step.stage == "shard"]
    return step.state, step.todo, step.total, step.why


def test_fields_in_another_order_as_workers_get_them_give_the_same_references(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", "a_desc.txt", "b.md", "c_desc.txt")
    there, back = source_of(tmp_path), source_of(tmp_path, dict(reversed(TEXTS.items())))
    assert list(there.references()) == list(back.references())
    assert [sample.values for sample in back.samples(there.references())] == [
        sample.values for sample in there.samples(there.references())
    ]


def test_another_order_of_the_disk_gives_the_same_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, *(f"{folder}/{number}.txt" for folder in "ba" for number in range(20)))
    before = list(source_of(tmp_path).references())
    assert [each.id for each in before] == sorted(each.id for each in before)
    monkeypatch.setattr("pipelines.sources.folder.listing", lambda folder: reversed([*listing(folder)]))
    assert list(source_of(tmp_path).references()) == before


def test_a_pattern_that_no_file_matches_is_told(tmp_path: Path) -> None:
    put(tmp_path / "in", "a.txt")
    with pytest.raises(InputError, match=r"corpus\.fields\.desc\.from: '\{id\}_desc\.txt': no sample of .*in has it"):
        run(SPEC.format(folder=tmp_path))


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with loopback_s3() as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").mkdir("folder-source")
        yield "s3://folder-source"
        fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_folder_in_an_object_store_is_listed_a_page_at_a_time(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = fsspec.filesystem("s3")
    names = ["a b/1.txt", "a b/1_desc.txt", "100%25/é+x.txt", "x::y.txt", "a//2.txt", ".hidden/3.txt", "4.png"]
    texts = {f"in/{name}": f"the text of {name}".encode() for name in names} | {"inner/5.txt": b"beside it"}
    client.pipe({f"folder-source/{name}": text for name, text in texts.items()})
    client.touch("folder-source/in/marker/")
    calls: list[str] = []
    real = type(client).call_s3

    def small_pages(self: Any, method: str, **more: Any) -> Any:
        calls.append(method)
        return real(self, method, **more, MaxKeys=2)

    monkeypatch.setattr(type(client), "call_s3", small_pages)
    assert [file.path for file in listing(f"{bucket}/in/")] == sorted(name for name in names if name[0] != ".")
    assert calls == ["list_objects_v2"] * 4
    source = source_of(f"{bucket}/in")
    references = list(source.references())
    assert set(calls) == {"list_objects_v2"}, "no object is asked for by itself"
    assert [(each.id, each.bytes) for each in references] == [
        ("100%25/é+x", 27),
        ("a b/1", 47),
        ("a//2", 20),
        ("x::y", 20),
    ]
    expected = {"100%25/é+x": {"text": "the text of 100%25/é+x.txt"}, "x::y": {"text": "the text of x::y.txt"}}
    got = found(source)
    assert {sample_id: got[sample_id] for sample_id in expected} == expected
    before = etags(source)
    client.pipe("folder-source/in/x::y.txt", b"the text of x::z.txt")
    assert {each for each in before if etags(source)[each] != before[each]} == {"x::y"}


def test_a_bucket_that_is_not_there_is_told(bucket: str) -> None:
    with pytest.raises(
        InputError, match=r"folder s3://folder-sauce cannot be read: .*; correct the path, or the rights"
    ):
        list(source_of("s3://folder-sauce").references())
    with pytest.raises(InputError, match=r"s3://folder-source/none has no file that matches"):
        list(source_of(f"{bucket}/none").references())


def test_memory_of_planning_is_within_400_bytes_a_sample(tmp_path: Path) -> None:
    """Of two files each, listed as if they were there."""
    count = 200_000
    code = f"""
from pipelines.sources import folder
def hwm():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
def listing(count):
    for ext in ("txt", "png"):
        for number in range(count):
            yield folder.Listed(f"class{{number % 100:04}}/sample-{{number:09}}.{{ext}}", number, str(number))
fields = {{ext: {{"modality": "text", "from": "{{id}}." + ext, "read": None}} for ext in ("txt", "png")}}
source = folder.Folder({{"source": {{"path": ["."]}}, "columns": {{"id": "id", "group": "folder"}}, "fields": fields}})
folder.listing = lambda path: listing(1000)
assert sum(1 for _ in source.references()) == 1000
before = hwm()
folder.listing = lambda path: listing({count})
assert sum(1 for _ in source.references()) == {count}
print((hwm() - before) / {count})
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) < 400


def test_what_is_listed_is_found_again(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", "b/c.txt")
    listed = {file.path: file.size for file in listing(str(tmp_path))}
    assert listed == {name: (tmp_path / name).stat().st_size for name in ("a.txt", "b/c.txt")}
    assert all(isinstance(file, Listed) for file in listing(f"file://{tmp_path}"))
