"""What `braid init` makes of a folder or a file: a spec that `braid plan` takes as it is, or one clear error."""

import csv
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import yaml
from PIL import Image
from rich.console import Console

from featurestore.catalog import Catalog
from featurestore.errors import InputError
from featurestore.store import FeatureStore
from jobs import guess_files, guesses, init, plan
from jobs import spec as specs
from jobs.report import field_counts
from jobs.run import Runner
from tests.loopback_s3 import loopback_s3
from tests.planted import write_planted
from tests.processes import braid


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of its own, beside which corpora are."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def written(path: Path | str) -> dict[str, Any]:
    """The spec that is written for a corpus, as plain values; it has to be a good one where its source exists already."""
    output, _ = init.write(str(path), None)
    text = output.read_text()
    tree: dict[str, Any] = yaml.safe_load(text)
    if tree["corpus"]["source"]["type"] in ("folder", "manifest"):
        specs.load(output)
    output.unlink()
    return tree


def froms(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: field["from"] for name, field in tree["corpus"]["fields"].items()}


def steps(tree_or_path: Path) -> list[plan.Step]:
    spec = specs.load(tree_or_path)
    return plan.steps(spec, Catalog(spec.store).peek())


def guessed(*names: str) -> dict[str, Any]:
    return {field.name: field.given for field in guess_files.fields_of_files(names)}


def picture() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(out, "PNG")
    return out.getvalue()


def sound() -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.sin(np.arange(2000) / 10), 8000, format="WAV")
    return out.getvalue()


def test_a_spec_for_a_folder_plans_and_runs_as_it_is(here: Path) -> None:
    folder = here.parent / "My Pictures (1)"
    for kind in ("birds", "fish"):
        for number in range(12):
            stem = folder / kind / f"{kind} v1.{number} 100%"
            stem.parent.mkdir(parents=True, exist_ok=True)
            stem.with_name(f"{stem.name}.wav").write_bytes(sound())
            stem.with_name(f"{stem.name}.txt").write_text(f"{kind} number {number}")
            if number % 2:
                stem.with_name(f"{stem.name}_desc.wav").write_bytes(sound())
    put(folder, "birds/.DS_Store", "birds/drawing.svg", "fish/drawing.svg", "notes.md")
    output, found = init.write(str(folder), None)
    assert output == Path("my_pictures_1.yaml")
    assert found.seen == [
        f"63 files of {folder}: 24 samples",
        "Left out, for no pattern matches them: 3 files (2 .svg, 1 .md), e.g. notes.md",
    ]
    text = output.read_text()
    for line in found.seen:
        assert f"# {line}\n" in text
    assert "    desc: {modality: audio, from: '{id}_desc.wav'} # 12 of 24 samples seen\n" in text
    tree = yaml.safe_load(text)
    assert froms(tree) == {"audio": "{id}.wav", "desc": "{id}_desc.wav", "text": "{id}.txt"}
    assert tree["store"] == {"uri": "./my_pictures_1-store"}
    assert tree["views"] == {
        "audio": {"field": "audio", "encoder": "log-mel"},
        "desc": {"field": "desc", "encoder": "log-mel"},
        "text": {"field": "text", "encoder": "minilm-l6"},
    }
    assert tree["spaces"] == {"audio-text": {"views": ["audio", "text"], "method": "cca"}}
    assert tree["indexes"] == {"audio-text": {"space": "audio-text", "views": ["audio", "text"]}}
    assert tree["training_sets"]["folder"]["label"] == "folder"
    assert [(step.stage, step.name) for step in steps(output)] == [
        ("shard", "my_pictures_1"),
        *(("encode", name) for name in ("audio", "desc", "text")),
        *(("align", "audio-text"), ("index", "audio-text"), ("fuse", "folder")),
    ]
    Runner(specs.load(output), Console(quiet=True)).run(("shard", "encode"), "audio")
    store = FeatureStore(here / "my_pictures_1-store")
    assert field_counts(store, "my_pictures_1")["desc"] == {"present": 12, "missing": 12, "quarantined": 0}
    assert sum(store.view("audio").to_arrow(["present"])["present"].to_pylist()) == 24
    assert set(store.corpus("my_pictures_1").to_arrow()["folder"].to_pylist()) == {"birds", "fish"}


def test_a_spec_for_json_lines_plans_as_it_is(here: Path) -> None:
    corpus = here.parent / "corpus"
    write_planted(corpus, 48)
    output, found = init.write(str(corpus / "manifest.jsonl"), here / "specs.yaml")
    tree = yaml.safe_load(output.read_text())
    assert output == here / "specs.yaml"
    assert tree["corpus"]["source"] == {"type": "manifest", "path": f"{corpus}/manifest.jsonl"}
    assert tree["corpus"]["columns"] == {"id": "id", "event_timestamp": "added", "group": "group"}
    assert tree["corpus"]["fields"] == {
        "image": {"modality": "image", "from": "image_path"},
        "caption": {"modality": "text", "from": "caption"},
        "sound": {"modality": "audio", "from": "sound_path"},
        "note": {"modality": "text", "from": "note_path", "read": "file"},
    }
    rows = [json.loads(line) for line in (corpus / "manifest.jsonl").read_text().splitlines()]
    for field in found.fields:
        assert len(field.samples) == sum(row[str(field.given)] is not None for row in rows)
        assert f"# {len(field.samples)} of 48 samples seen\n" in output.read_text()
    assert tree["spaces"] == {"image-caption": {"views": ["image", "caption"], "method": "cca"}}
    assert tree["training_sets"] == {
        "label": {
            "views": ["image", "caption", "sound", "note"],
            "label": "label",
            "splits": {"train": 0.8, "val": 0.1, "test": 0.1},
        }
    }
    assert [step.todo for step in steps(output) if step.stage == "shard"] == [48]


def test_pairs_too_few_to_learn_from_are_no_space(here: Path) -> None:
    put(here.parent / "few", *(f"{number}.{ending}" for number in range(19) for ending in ("png", "txt")))
    output, _ = init.write(str(here.parent / "few"), None)
    assert "# Too few to learn from; at least 20 are needed:\n# spaces: " in output.read_text()
    assert "spaces" not in yaml.safe_load(output.read_text())
    assert [step.stage for step in steps(output)] == ["shard", "encode", "encode"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.png", "b.JPG", "c.jpg", "d.jpg"], {"image": ["{id}.jpg", "{id}.JPG", "{id}.png"]}),
        (["1.png", "2.png", "1_desc.ogg", "2_desc.ogg"], {"image": "{id}.png", "desc": "{id}_desc.ogg"}),
        (
            [f"{n}{end}" for n in range(4) for end in (".png", ".ogg", "_desc.ogg", "_desc_fr.ogg")],
            {"image": "{id}.png", "audio": "{id}.ogg", "desc": "{id}_desc.ogg", "desc_fr": "{id}_desc_fr.ogg"},
        ),
        (
            [f"{n}{end}" for n in range(4) for end in ("-image.png", "-caption.txt", ".speech.wav")],
            {"image": "{id}-image.png", "speech": "{id}.speech.wav", "caption": "{id}-caption.txt"},
        ),
        (
            [
                f"{colour}_{what}.{end}"
                for colour in ("red", "blue")
                for what in ("bird", "fish")
                for end in ("png", "txt")
            ],
            {"image": "{id}.png", "text": "{id}.txt"},
        ),
        ([f"{c}_{w}.png" for c in ("red", "blue") for w in ("bird", "fish")], {"image": "{id}.png"}),
        (["bird.png", "bird_red.png", "fish.png", "cat.png", "dog.png", "dog_red.png"], {"image": "{id}.png"}),
        (
            [f"{n}{end}" for n in range(4) for end in (".mp4", ".txt", "_cam2.mov")],
            {"video": "{id}.mp4", "cam2": "{id}_cam2.mov", "text": "{id}.txt"},
        ),
        (
            [f"{n}{end}" for n in range(4) for end in (".png", "_mask.png")],
            {"image": "{id}.png", "mask": "{id}_mask.png"},
        ),
        (
            ["images/1.png", "images/a/2.png", "sounds/1.wav", "sounds/a/2.wav", "sounds/3.wav"],
            {"images": "images/{id}.png", "sounds": "sounds/{id}.wav"},
        ),
        (
            [f"data/x/{folder}/{n}.{end}" for n in range(3) for folder, end in (("id", "png"), ("label", "txt"))],
            {"image_id": "data/x/id/{id}.png", "text_label": "data/x/label/{id}.txt"},
        ),
        (
            [f"{n}{end}" for n in range(3) for end in (".png", "_filled.png", "_filled_desc.ogg")]
            + [f"{n}{end}" for n in range(3, 60) for end in (".png", "_desc.ogg")],
            {"image": "{id}.png", "desc": "{id}_desc.ogg"},
        ),
        (["cats/1.png", "cats/2.png", "dogs/1.png"], {"image": "{id}.png"}),
        (["pictures/1.png", "sounds/2.wav"], {"image": "{id}.png", "audio": "{id}.wav"}),
        ([*(f"{n}.png" for n in range(30)), "README.txt", "x/LICENSE.txt"], {"image": "{id}.png"}),
        (
            [f"{n}/{n}_{word}.{end}" for n in range(3) for word, end in (("a", "png"), ("b", "wav"))],
            {"a": "{id}_a.png", "b": "{id}_b.wav"},
        ),
        (["{id}.png", "a{id}.txt", "1.png"], {"image": "{id}.png"}),
        (["a.mp3", "b.svg", "noending", ".txt"], {}),
        ([], {}),
    ],
)
def test_fields_are_guessed_from_names(names: list[str], expected: dict[str, Any]) -> None:
    assert guessed(*names) == expected
    assert guessed(*reversed(names)) == expected


def test_more_kinds_of_names_than_patterns_are_allowed_leave_the_rarest_out() -> None:
    parts = [f"part{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(70)]
    names = [f"{n}_{part}.wav" for at, part in enumerate(parts) for n in range(3 + (at < 10))] + [
        f"{n}.png" for n in range(4)
    ]
    fields = guessed(*names)
    assert len(fields) == 62
    assert {"image", *parts[:10]} <= fields.keys()


@pytest.mark.parametrize(
    ("ids", "roles", "label"),
    [
        ([f"{folder}/{n}" for folder in "ab" for n in range(10)], {}, "folder"),
        ([f"{folder}/{n}" for folder in "ab" for n in range(9)], {"group": "folder"}, None),
        ([f"{folder}/{n}" for folder in range(101) for n in range(20)], {"group": "folder"}, None),
        ([f"one/{n}" for n in range(30)], {}, None),
        ([f"{n}" for n in range(30)], {}, None),
    ],
)
def test_few_folders_of_many_samples_are_a_label_and_many_of_few_a_group(
    ids: list[str], roles: dict[str, str], label: str | None
) -> None:
    columns = guess_files.of_folders(ids)
    assert (columns.roles, columns.label) == (roles, label)


def rows_of(count: int = 20, **more: Any) -> list[dict[str, Any]]:
    """Rows with an id, a path, and columns of which each value may be a function of the row's number."""
    return [
        {"id": f"s{n}", "file": f"p/{n}.jpg"} | {k: v(n) if callable(v) else v for k, v in more.items()}
        for n in range(count)
    ]


@pytest.mark.parametrize(
    ("more", "roles", "label", "fields"),
    [
        ({}, {}, None, ["image"]),
        ({"speaker": lambda n: f"sp{n // 4}", "when": "2026-01-01"}, {"group": "speaker"}, None, ["image"]),
        ({"group": lambda n: f"g{n // 4}", "session": "s"}, {"group": "group"}, None, ["image"]),
        ({"album": lambda n: n // 4}, {}, None, ["image"]),
        ({"timestamp": lambda n: f"2026-01-{n + 1:02}T10:00:00Z"}, {"event_timestamp": "timestamp"}, None, ["image"]),
        ({"timestamp": lambda n: 1_750_000_000 + n}, {}, None, ["image"]),
        ({"created": lambda n: 1_750_000_000_000_000_000 + n}, {"event_timestamp": "created"}, None, ["image"]),
        ({"date": lambda n: "soon" if n == 7 else "2026-01-01"}, {}, None, ["image"]),
        ({"published_at": "2026-01-01"}, {"available_timestamp": "published_at"}, None, ["image"]),
        ({"class": lambda n: n % 3}, {}, "class", ["image"]),
        ({"label": lambda n: f"l{n}"}, {}, None, ["image"]),
        ({"breed": lambda n: f"b{n % 2}", "split": lambda n: ("train", "test")[n % 2]}, {}, "breed", ["image"]),
        ({"lang": lambda n: ("en", "fr")[n % 2]}, {}, None, ["image"]),
        ({"caption": lambda n: f"{n}"}, {}, None, ["image", "caption"]),
        ({"said": lambda n: f"These are some words of number {n}."}, {}, None, ["image", "said"]),
        ({"said": "These are always the same words."}, {}, None, ["image"]),
        ({"clip_url": lambda n: f"https://host/a/{n}.ogg?key=1"}, {}, None, ["image", "clip"]),
        ({"notes_path": lambda n: f"{n}.txt" if n % 2 else None}, {}, None, ["image", "notes"]),
        ({"image": lambda n: n}, {}, None, ["file"]),
        ({"caption": lambda n: [n]}, {}, None, ["image"]),
    ],
)
def test_columns_are_guessed_from_names_and_values(
    here: Path, more: dict[str, Any], roles: dict[str, str], label: str | None, fields: list[str]
) -> None:
    (here / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(**more)))
    tree = written("m.jsonl")
    assert tree["corpus"]["columns"] == {"id": "id", **roles}
    assert list(tree["corpus"]["fields"]) == fields
    assert [each["label"] for each in tree.get("training_sets", {}).values()] == ([label] if label else [])


def test_an_id_is_found_where_no_column_is_called_so(here: Path) -> None:
    rows = [{"picture": f"{n}.png", "note": "x", "number": n} for n in range(5)]
    (here / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = written("m.jsonl")
    assert tree["corpus"]["columns"] == {"id": "picture"}
    assert tree["corpus"]["fields"] == {"picture": {"modality": "image", "from": "picture"}}


def table(folder: Path, name: str, rows: Sequence[dict[str, Any]], delimiter: str) -> None:
    with (folder / name).open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize(("name", "delimiter"), [("m.csv", ","), ("m.TSV", "\t")])
def test_tables_of_text_are_manifests(here: Path, name: str, delimiter: str) -> None:
    rows = rows_of(caption=lambda n: f'A "quoted"\nline, number {n}', label=lambda n: f"l{n % 2}", speaker="a")
    table(here, name, rows, delimiter)
    tree = written(name)
    assert tree["corpus"]["source"] == {"type": "manifest", "path": name}
    assert tree["corpus"]["columns"] == {"id": "id", "group": "speaker"}
    assert froms(tree) == {"image": "file", "caption": "caption"}
    assert tree["training_sets"]["label"]["label"] == "label"


def test_parquet_is_a_manifest_or_holds_its_values(here: Path) -> None:
    rows = rows_of(sound_path=lambda n: f"{n}.wav", label=lambda n: f"l{n % 2}")
    pq.write_table(pa.Table.from_pylist(rows), "plain.parquet")
    tree = written("plain.parquet")
    assert tree["corpus"]["source"] == {"type": "manifest", "path": "plain.parquet"}
    assert tree["corpus"]["fields"]["sound"] == {"modality": "audio", "from": "sound_path"}
    held = [
        row | {"image": {"bytes": picture() if n % 4 else None, "path": None}, "raw": sound(), "hash": b"\x01\x02"}
        for n, row in enumerate(rows)
    ]
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    whole = pa.Table.from_pylist(held)
    at = whole.schema.get_field_index("image")
    whole = whole.set_column(at, "image", whole["image"].cast(struct))
    pq.write_table(whole, "held.parquet", row_group_size=7)
    output, found = init.write("held.parquet", None)
    tree = yaml.safe_load(output.read_text())
    assert tree["corpus"]["source"] == {"type": "parquet", "path": "held.parquet"}
    assert tree["corpus"]["fields"] == {
        "image": {"modality": "image", "from": "image"},
        "raw": {"modality": "audio", "from": "raw"},
        "file": {"modality": "image", "from": "file", "read": "file"},
        "sound": {"modality": "audio", "from": "sound_path", "read": "file"},
    }
    assert tree["training_sets"]["label"]["label"] == "label"
    assert {field.name: len(field.samples) for field in found.fields}["raw"] == 20


def tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))


def test_a_tar_is_a_webdataset(here: Path) -> None:
    members = {}
    for n in range(30):
        key = f"./{n // 10:05}/{n:09}"
        members[f"{key}.{'png' if n % 5 == 0 else 'jpg'}"] = picture()
        members[f"{key}.txt"] = b"words"
        members[f"{key}.seg.png"] = picture()
        members[f"{key}.json"] = json.dumps({"key": f"{n}", "width": 8, "label": f"l{n % 2}", "video": "v"}).encode()
        members[f"{key}.cls"] = b"3"
    tar(here / "00000.tar", members)
    output, found = init.write("00000.tar", Path("one.yaml"))
    tree = yaml.safe_load(output.read_text())
    assert tree["corpus"]["source"] == {"type": "webdataset", "path": "00000.tar"}
    assert froms(tree) == {"image": ["jpg", "png"], "text": "txt", "seg": "seg.png"}
    assert tree["corpus"]["columns"] == {"group": "video"}
    assert tree["training_sets"]["label"]["label"] == "label"
    assert found.seen == ["150 members of 00000.tar: 30 samples", "Left out: 30 .cls"]
    (here / "cut.tar").write_bytes((here / "00000.tar").read_bytes()[:70_000])
    assert "then it is broken" in init.look("cut.tar").seen[0] or init.look("cut.tar").samples < 30


def test_a_folder_of_tars_or_of_parquet_files_is_read_as_these(here: Path) -> None:
    folder = here.parent / "shards"
    (folder / "a").mkdir(parents=True)
    for number in range(3):
        tar(folder / f"{number:05}.tar", {f"{number}.jpg": picture()})
        pq.write_table(pa.Table.from_pylist(rows_of(2, image=picture())), folder / "a" / f"{number}.parquet")
    tree = written(folder / "a")
    assert tree["corpus"]["source"] == {"type": "parquet", "path": f"{folder}/a/*.parquet"}
    for path in (folder / "a").iterdir():
        path.unlink()
    tree = written(folder)
    assert tree["corpus"]["source"] == {"type": "webdataset", "path": f"{folder}/*.tar"}
    assert (tree["corpus"]["name"], froms(tree)) == ("shards", {"image": "jpg"})


def test_a_manifest_in_a_folder_is_pointed_at(here: Path) -> None:
    folder = here.parent / "photos"
    put(folder, "1.png", "2.png", "metadata.jsonl", "sub/other.csv")
    assert init.look(str(folder)).seen[-1] == (
        f"metadata.jsonl may be a manifest of these files: braid init {folder}/metadata.jsonl"
    )


def test_no_more_than_the_first_files_and_rows_are_looked_at(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "MAX_SEEN", 10)
    put(here.parent / "many", *(f"{n:02}.png" for n in range(12)), "99.txt")
    found = init.look(str(here.parent / "many"))
    assert (found.samples, found.seen) == (10, [f"The first 10 files of {here.parent}/many: 10 samples"])
    (here / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(11)) + "no JSON, and never read\n")
    assert init.look("m.jsonl").seen == ["The first 10 rows of m.jsonl"]
    pq.write_table(pa.Table.from_pylist(rows_of(200, image=picture())), "p.parquet")
    found = init.look("p.parquet")
    assert (found.samples, found.seen) == (10, ["The first 10 rows of p.parquet"])
    tar(here / "t.tar", {f"{n}.jpg": b"x" for n in range(12)})
    assert init.look("t.tar").seen == ["The first 10 members of t.tar: 10 samples"]


def test_large_values_of_a_parquet_file_bound_how_many_rows_are_read(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(init, "MAX_SEEN_BYTES", 100_000)
    pq.write_table(pa.Table.from_pylist(rows_of(500, image=picture() + bytes(5_000))), "p.parquet")
    assert init.look("p.parquet").samples == 64


def test_the_store_is_never_in_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "photos"
    put(folder, "a/1.png")
    for inside, path, store in (
        (".", ".", "../photos-store"),
        ("a", "..", "../../photos-store"),
        ("..", "photos", "./photos-store"),
    ):
        monkeypatch.chdir(folder / inside)
        tree = written(path)
        assert tree["store"]["uri"] == store
        assert os.path.realpath(store) == str(tmp_path / "photos-store")


def test_names_that_yaml_or_a_terminal_would_obey_are_only_names(here: Path) -> None:
    folder = here.parent / "odd"
    odd = ["a\nviews: {x: 1}", "b # c", "d: e", "f'g\"h", "\x1b[31mred", "ä 字", "100% {x}", "- i", "\u2028"]
    put(folder, *(f"{name}/{name}.png" for name in odd), *(f"{name}.svg" for name in odd), "no\nsuch: y_a.svg")
    output, found = init.write(str(folder), None)
    assert found.samples == len(odd)
    assert "\x1b" not in output.read_text()
    assert froms(yaml.safe_load(output.read_text())) == {"image": "{id}.png"}
    assert [step.todo for step in steps(output) if step.stage == "shard"] == [len(odd)]
    quoted = here.parent / "q: {#'}\n-"
    put(quoted, "i\nm/1.png", "s: ound/1.wav")
    output, _ = init.write(str(quoted), None)
    assert froms(yaml.safe_load(output.read_text())) == {"i_m": "i\nm/{id}.png", "s_ound": "s: ound/{id}.wav"}
    assert [step.todo for step in steps(output) if step.stage == "shard"] == [1]


@pytest.mark.parametrize("name", ["2024", "00000", "no", "null", "1e5", "2024-01-01", "~"])
def test_a_corpus_whose_name_is_no_text_to_yaml_has_a_name(here: Path, name: str) -> None:
    put(here.parent / name, *(f"{n}_{name}.ogg" for n in range(3)), *(f"{n}.txt" for n in range(3)))
    assert written(here.parent / name)["corpus"]["name"] == guesses.slug(name, "corpus")


def test_no_file_is_overwritten(here: Path) -> None:
    put(here.parent / "photos", "1.png")
    for output in (None, here / "photos.yaml"):
        (here / "photos.yaml").write_text("mine")
        with pytest.raises(InputError, match=r"photos\.yaml is there already, and is not overwritten; .* --output"):
            init.write(str(here.parent / "photos"), output)
        assert (here / "photos.yaml").read_text() == "mine"
    with pytest.raises(InputError, match=r"none/x\.yaml: cannot be written \(No such file or directory\)"):
        init.write(str(here.parent / "photos"), here / "none" / "x.yaml")


def jsonl(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none", None, r"none is not there; name one of: a folder, \.jsonl"),
        *(
            (f"s3://k:secret@b/{name}", None, rf"s3://\*\*\*@b/{name}.*: the address holds a name or a password; leave")
            for name in ("folder", r"x.jsonl", r"x.tar", r"x.parquet")
        ),
        ("x.zip", b"PK", r"x\.zip: no kind of file that samples are read from; name one of: a folder, \.jsonl"),
        ("x", b"?", r"x: no kind of file"),
        ("x.jsonl", b"", r"x\.jsonl holds no rows"),
        ("x.jsonl", b"[1]\n", r"x\.jsonl, line 1: '\[1\]' is no JSON object"),
        (
            "x.jsonl",
            jsonl({"a": 1}, {"a": 2}),
            r"x\.jsonl: no column holds paths of pictures, sounds or texts, .*: 'a'",
        ),
        (
            "x.jsonl",
            jsonl({"id": 1.5}, {"id": 2.5}),
            r"'id' is none of ids: '1\.5' in row 1 is no text and no whole number",
        ),
        (
            "x.jsonl",
            jsonl({"id": "a"}, {"id": None}),
            r"column 'id' is none of ids: row 2 has none; correct it, or rename",
        ),
        (
            "x.jsonl",
            jsonl({"id": "b"}, {"id": "a"}, {"id": "a"}),
            r"ids: 'a' stands twice, in rows 2 and 3; correct it",
        ),
        (
            "x.jsonl",
            jsonl({"id": 7}, {"id": 7}),
            r"column 'id' is none of ids: '7' stands twice, in rows 1 and 2; correct",
        ),
        ("x.jsonl", jsonl({"id": "a"}, {"id": 7}), r"its values, e\.g\. 'a', are texts and numbers, too long, or not"),
        ("x.jsonl", jsonl({"id": "a", "n": 1}), r"no column holds paths of pictures, sounds or texts, .*: 'id', 'n'"),
        ("x.jsonl", jsonl({"id": "a", "f": "1.png", "row": 1}), r"column 'row' is none to Braid as it is, .*rename it"),
        ("x.jsonl", jsonl({"id": "a", "f": "1.png", "group": 1}), r"column 'group' is none to Braid as it is"),
        ("x.csv", b"id,f\n", r"x\.csv holds no rows"),
        ("x.parquet", b"PAR1", r"x\.parquet: no Parquet file that can be read"),
        ("x.tar", b"\x1f\x8b not a tar", r"x\.tar: no tar that can be read: .*; unpack what is compressed"),
    ],
)
def test_what_no_spec_can_be_guessed_from_is_told(here: Path, name: str, content: bytes | None, told: str) -> None:
    if content is not None:
        (here / name).write_bytes(content)
    with pytest.raises(InputError, match=told):
        init.write(name, None)
    assert not list(here.glob("*.yaml"))


IMAGES = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def hugging_face(path: Path, **columns: list[Any]) -> Path:
    """Rows as `datasets` writes them: pictures, and no ids."""
    cells = pa.array([{"bytes": picture(), "path": f"{number}.png"} for number in range(20)], IMAGES)
    pq.write_table(pa.table({"image": cells, **columns}), path, row_group_size=7)
    return path


def test_rows_without_ids_are_called_by_their_place_and_captions_are_no_ids(here: Path) -> None:
    captions = [f"a picture of {number} ducks on a pond" for number in range(20)]
    path = hugging_face(here.parent / "hf.parquet", label=list(range(20)), text=captions)
    output, _ = init.write(str(path), None)
    text = output.read_text()
    assert (
        "  # No column has another text in each row, as ids have: __row__ calls a row by its file and its place" in text
    )
    tree = yaml.safe_load(text)
    assert tree["corpus"]["columns"] == {"id": "__row__"}
    assert froms(tree) == {"image": "image", "text": "text"}
    assert steps(output)[0].why == "samples: 20 new"
    Runner(specs.load(output), Console(quiet=True)).run(("shard",))
    corpus = FeatureStore(here / "hf-store").corpus("hf")
    assert sorted(corpus.to_arrow()["id"].to_pylist()) == sorted(f"hf.parquet#{number}" for number in range(20))
    assert corpus.value(*corpus.locate("hf.parquet#17"), "text") == captions[17].encode()
    assert steps(output)[0].why == "20 samples stored"


@pytest.mark.parametrize(
    ("columns", "id_column"),
    [
        ({"label": [n % 10 for n in range(20)]}, "__row__"),
        ({"label": [*range(20)]}, "__row__"),
        ({"id": [*range(20)]}, "id"),
        ({"image_id": [*range(20)], "label": [1] * 20}, "image_id"),
        ({"code": [f"c{n}" for n in range(20)]}, "code"),
        ({"text": [f"t{n}" for n in range(20)]}, "__row__"),
        ({"note": [f"the {n} ducks that swim over there" for n in range(20)]}, "__row__"),
    ],
)
def test_ids_are_guessed_of_texts_that_are_no_sentences_and_of_numbers_that_are_called_so(
    here: Path, columns: dict[str, list[Any]], id_column: str
) -> None:
    tree = written(hugging_face(here.parent / "x.parquet", **columns))
    assert tree["corpus"]["columns"]["id"] == id_column


def test_a_column_of_ids_may_be_of_whole_numbers(here: Path) -> None:
    (here / "x.jsonl").write_bytes(jsonl(*({"id": number, "text": f"text {number}"} for number in range(3))))
    output, _ = init.write("x.jsonl", None)
    assert steps(output)[0].why == "samples: 3 new"
    Runner(specs.load(output), Console(quiet=True)).run(("shard",))
    assert FeatureStore(here / "x-store").corpus("x").to_arrow()["id"].to_pylist() == ["0", "1", "2"]


def test_a_folder_without_anything_to_read_is_told(here: Path) -> None:
    put(here.parent / "empty", ".hidden.png")
    with pytest.raises(InputError, match=r"empty is a folder without files \(hidden ones are left out\)"):
        init.write(str(here.parent / "empty"), None)
    put(here.parent / "other", "1.mp3", "2.mp3", "3.svg")
    with pytest.raises(InputError, match=r"is decoded \(2 \.mp3, 1 \.svg\); decoded are: png, jpg, .*, flac, txt"):
        init.write(str(here.parent / "other"), None)


def test_the_command_says_what_it_saw_and_refuses_without_a_traceback(tmp_path: Path) -> None:
    put(tmp_path / "photos", "1.png", "2.png", "2.svg")
    said = braid("init", tmp_path / "photos", "--output", tmp_path / "spec.yaml")
    assert said.status == 0, said.err
    assert said.out.splitlines() == [
        f"3 files of {tmp_path}/photos: 2 samples",
        "Left out, for no pattern matches them: 1 file (1 .svg), e.g. 2.svg",
        "  image: image, 2 of 2",
        f"{tmp_path}/spec.yaml is written: read it, edit it, and then: braid plan {tmp_path}/spec.yaml",
    ]
    planned = braid("plan", tmp_path / "spec.yaml")
    assert planned.status == 0, planned.err
    assert "samples: 2 new" in planned.out
    for args, told in (
        ((tmp_path / "none",), "none is not there"),
        ((tmp_path / "photos", "--output", tmp_path / "spec.yaml"), "is there already"),
        ((tmp_path / "spec.yaml", "--output", tmp_path / "x.yaml"), "is a spec already, for its store to be made"),
    ):
        said = braid("init", *args)
        assert (said.status, said.out) == (2, "")
        assert said.err.startswith("error: ")
        assert told in said.err
        assert "Traceback" not in said.err


def test_the_same_corpus_gives_the_same_text(tmp_path: Path) -> None:
    names = [
        f"{f}/{n}{e}" for f in "ab" for n in range(4) for e in (".png", ".txt", "_en.ogg", "_fr.ogg", ".jpeg", ".md")
    ]
    put(tmp_path / "photos", *names)
    texts = set()
    for seed in ("1", "2", "3"):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; from jobs import init; init.write(sys.argv[1], None)",
                tmp_path / "photos",
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        texts.add((tmp_path / "photos.yaml").read_text())
        (tmp_path / "photos.yaml").unlink()
    assert len(texts) == 1


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with loopback_s3() as endpoint, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").mkdir("init-source")
        yield "s3://init-source"
        fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_folders_and_files_in_an_object_store_are_looked_at(here: Path, bucket: str) -> None:
    client = fsspec.filesystem("s3")
    client.pipe({f"init-source/in/{n}.{end}": b"x" for n in range(25) for end in ("png", "txt")})
    client.pipe("init-source/m.jsonl", jsonl(*rows_of()))
    output, found = init.write(f"{bucket}/in/", None)
    assert found.samples == 25
    tree = yaml.safe_load(output.read_text())
    assert tree["corpus"]["source"] == {"type": "folder", "path": f"{bucket}/in"}
    assert tree["corpus"]["name"] == "in"
    assert [step.todo for step in steps(output) if step.stage == "shard"] == [25]
    assert froms(written(f"{bucket}/m.jsonl")) == {"image": "file"}
    with pytest.raises(InputError, match="s3://init-source/none is a folder without files"):
        init.write(f"{bucket}/none", None)
