"""What keeps a tar from being adopted, told with its place; and what does not go with `adopt` in a spec."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from featurestore.errors import InputError, SpecError
from jobs import spec as specs
from jobs.run import Runner
from tests.pipelines.tars import header, pairs, source_of, tar_of, written
from tests.pipelines.test_adopted_tars import SPEC

REFUSED: list[tuple[bytes, str]] = [
    (tar_of(pairs(3))[:3400], r"byte 3400: it is cut off in '0001\.jpg'.*leave adopt out"),
    (tar_of([*pairs(2), ("0000.png", b"x")]), r"byte \d+: key '0000' comes back after '0001'.*take it out of"),
    (tar_of([("a.txt", b"x"), ("a.TXT", b"y")]), r"byte 1024: 'a\.TXT' stands twice, first at byte 0.*leave adopt out"),
    (tar_of([("a.txt", b"x"), ("a.cls", b"y"), ("a.cls", b"y")]), r"byte 2048: 'a\.cls' stands twice.*leave adopt out"),
    (header("a.jpg", type=b"2", linkname="b") + tar_of(pairs(1)), r"byte 0: 'a\.jpg' is a symbolic link.*leave adopt out"),
    (header("x", type=b"1", linkname="b") + tar_of(pairs(1)), r"byte 0: 'x' is a hard link.*leave adopt out"),
    (header("dev.jpg", type=b"3") + tar_of(pairs(1)), r"byte 0: 'dev\.jpg' is a device.*leave adopt out"),
    (tar_of([("a.json", b"{}"), ("b.cls", b"1")]), r": none of its 2 samples has a value.*; correct corpus\.fields"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "told"), REFUSED, ids=range(len(REFUSED)))
def test_a_tar_that_is_not_as_it_must_be_is_refused_with_its_place(tmp_path: Path, content: bytes, told: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(InputError, match=rf"^{path}.{{0,2}}{told}"):
        list(source_of(path, adopt=True).references())
    written(tmp_path, tar_of(pairs(2)), "good.tar")
    text = SPEC.format(store=tmp_path / "store", tars=tmp_path, adopt=", adopt: true").partition("views:")[0]
    text = text.replace("{00000..00002}", "*").replace("group: video", "group: null")
    with pytest.raises(InputError, match=told):
        Runner(specs.parse(text, "spec"), Console(quiet=True)).run(("shard",))
    assert not list((tmp_path / "store").glob("corpora/**/*"))


def test_a_key_that_comes_back_is_copied_where_ids_are_others(tmp_path: Path) -> None:
    contents = [(f"{key}.json", json.dumps({"own": str(own)}).encode()) for own, key in enumerate("aba")]
    contents = [member for name, raw in contents for member in ((name.replace("json", "txt"), b"x"), (name, raw))]
    path = written(tmp_path, tar_of(contents))
    source = source_of(path, columns={"id": "own"}, adopt=True)
    with pytest.raises(InputError, match=r"key 'a' comes back after 'b'.*leave adopt out of corpus\.source"):
        list(source.references())
    copied = source_of(path, columns={"id": "own"})
    assert [each.id for each in copied.references()] == ["0", "1", "2"]


def test_an_empty_tar_makes_no_shard_and_folders_are_passed_over(tmp_path: Path) -> None:
    written(tmp_path, tar_of([]), "a.tar")
    written(tmp_path, header("folder", type=b"5") + tar_of(pairs(2)), "b.tar")
    source = source_of(tmp_path / "*.tar", adopt=True)
    assert [each.id for each in source.references()] == ["0000", "0001"]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "  shard_rows",
            "  media: copy\n  shard_rows",
            r"line 12: corpus\.media: 'copy' is not what adopt does.*leave",
        ),
        (
            "type: webdataset",
            "type: manifest",
            r"line 6: corpus\.source\.adopt: only tars are adopted: write type: web",
        ),
        ("adopt: true", "adopt: 1", r"line 6: corpus\.source\.adopt: 1 is wrong: write true or false"),
    ],
)
def test_what_does_not_go_with_adopt_is_a_mistake_of_the_spec(tmp_path: Path, old: str, new: str, told: str) -> None:
    text = SPEC.format(store=tmp_path / "store", tars=tmp_path, adopt=", adopt: true")
    with pytest.raises(SpecError, match=told):
        specs.parse(text.replace(old, new), "spec")


def test_adopted_tars_stay_where_they_are_without_a_word(tmp_path: Path) -> None:
    text = SPEC.format(store=tmp_path / "store", tars=tmp_path, adopt=", adopt: true")
    spec = specs.parse(text, "spec")
    assert (spec.corpus.media, spec.store.media_root) == ("reference", str(tmp_path))
    assert specs.parse(text.replace("  shard_rows", "  media: reference\n  shard_rows"), "spec") == spec
    assert specs.parse(text.replace("adopt: true", "adopt: false"), "spec").corpus.media == "copy"
