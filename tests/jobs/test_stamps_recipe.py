import hashlib
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from featurestore.errors import InputError
from jobs.recipes import stamps

FILES: dict[str, bytes] = {
    "animals/frog.png": b"frog",
    "animals/frog.txt": "A frog = small.\nfr.utf8=Une grenouille.\nru.utf8=Лягушка.\n".encode(),
    "animals/frog.ogg": b"croak",
    "animals/frog_fr.ogg": b"a localised effect",
    "animals/frog.dat": b"aside",
    "animals/frog_desc.ogg": b"frog, said",
    "animals/frog_desc_fr.ogg": b"grenouille, dit",
    "animals/frog-1.png": b"another frog",
    "animals/frog-1.txt": "A green thing.\nde.utf8=Etwas Grünes.\n".encode(),
    "animals/frog-1_desc_fr.wav": b"une chose verte, dit",
    "animals/duck_mirror.png": b"kcud",
    "animals/only.svg": b"<svg/>",
    "birds/duck.png": b"duck",
    "birds/duck.txt": b"A duck.\n",
    "birds/duck.wav": b"no effect: those are .ogg",
    "birds/duck_desc.ogg.ogg": b"duck, said",
}


def write_tree(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def rows_of(folder: Path, files: dict[str, bytes]) -> dict[str, stamps.Row]:
    rows, _ = stamps.build_rows(write_tree(folder, files))
    assert [row["id"] for row in rows] == sorted(str(row["id"]) for row in rows)
    return {str(row["id"]): row for row in rows}


def groups_of(folder: Path, files: dict[str, bytes]) -> set[frozenset[str]]:
    members: dict[str | None, set[str]] = {}
    for sample_id, row in rows_of(folder, files).items():
        members.setdefault(row["group"], set()).add(sample_id)
    assert all(group == min(ids) for group, ids in members.items())
    return {frozenset(ids) for ids in members.values()}


def test_a_sample_is_a_png_with_what_stands_beside_it(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, FILES)
    assert list(rows) == ["animals/duck_mirror", "animals/frog", "animals/frog-1", "birds/duck"]
    assert rows["animals/frog"] == {
        "id": "animals/frog",
        "group": "animals/frog",
        "label": "animals",
        "image_path": "animals/frog.png",
        "caption": "A frog = small.",
        "caption_fr": "Une grenouille.",
        "caption_ru": "Лягушка.",
        "sound_path": "animals/frog.ogg",
        "speech_path": "animals/frog_desc.ogg",
        "speech_language": "en",
    }
    assert rows["animals/frog-1"]["speech_path"] == "animals/frog-1_desc_fr.wav"
    assert rows["animals/frog-1"]["speech_language"] == "fr"
    assert rows["birds/duck"]["speech_path"] == "birds/duck_desc.ogg.ogg"
    absent = {key for key, value in rows["animals/duck_mirror"].items() if value is None}
    assert absent == {"caption", "caption_fr", "caption_ru", "sound_path", "speech_path", "speech_language"}
    assert stamps.counts_of(list(rows.values())) == {
        "image": 4, "caption": 3, "caption_fr": 1, "caption_ru": 1, "sound": 1, "speech": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 + 2 = 4\nfr.utf8=Quatre = 4", {"en": "2 + 2 = 4", "fr": "Quatre = 4"}),
        ("fr.utf8=is English here\r\npt_BR.utf8=Um\r\n", {"en": "fr.utf8=is English here", "pt_BR": "Um"}),
        ("\nfr.utf8=Sans anglais\nde.utf8=\n", {"fr": "Sans anglais"}),
        ("One\nno translation\nru.utf8=Раз\nru.utf8=Два", {"en": "One", "ru": "Раз"}),
        ("Split by \u2028 is one line", {"en": "Split by \u2028 is one line"}),
        ("", {}),
    ],
)
def test_the_first_line_is_english_and_the_others_name_their_language(text: str, expected: dict[str, str]) -> None:
    assert stamps.caption_of(text) == expected


@pytest.mark.parametrize(
    ("sample_id", "key"),
    [
        ("a/frog-1", "a/frog"),
        ("a/Snail2", "a/snail"),
        ("a/fireman240a", "a/fireman"),
        ("a/note_025_b", "a/note"),
        ("a/toy_photo_1", "a/toy"),
        ("a/dumper_mirror", "a/dumper"),
        ("a/b_filled", "a/b"),
        ("a/asl_b", "a/asl_b"),
        ("a/7", "a/7"),
        ("a/001", "a/001"),
        ("a/2_venus", "a/2_venus"),
        ("a1/mirror", "a1/mirror"),
    ],
)
def test_a_stem_loses_numbers_and_variant_suffixes_only(sample_id: str, key: str) -> None:
    assert stamps.stem_key(sample_id) == key


def test_groups_follow_stem_caption_and_bytes_and_nothing_else(tmp_path: Path) -> None:
    files = {f"{name}.png": name.encode() for name in ("a/x", "a/x-2", "b/x", "c/y", "d/z", "e/w", "f/v", "g/u")}
    files |= {"a/x-2.txt": b"The letter A.", "c/y.txt": b"the  LETTER a", "b/x.txt": b"Something else."}
    files |= {"c/y.ogg": b"same", "d/z_desc.ogg": b"same", "e/w.png": b"twin", "f/v.png": b"twin"}
    files |= {"e/w.txt": b"?", "g/u.txt": b"!"}  # captions without a word tie nothing
    assert groups_of(tmp_path, files) == {
        frozenset({"a/x", "a/x-2", "c/y", "d/z"}), frozenset({"e/w", "f/v"}), frozenset({"b/x"}), frozenset({"g/u"}),
    }  # fmt: skip


@given(st.lists(st.frozensets(st.integers(0, 12), max_size=3), max_size=12))
def test_groups_are_the_finest_partition_that_keeps_keys_whole(keys: list[frozenset[int]]) -> None:
    found = stamps._groups([[("k", str(key)) for key in own] for own in keys])
    expected = list(range(len(keys)))
    for _ in keys:
        for i, own in enumerate(keys):
            for j, other in enumerate(keys):
                if own & other:
                    expected[i] = expected[j] = min(expected[i], expected[j])
    assert found == expected


def test_a_folder_without_png_or_with_a_caption_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no PNG: it must be the folder usr/share/tuxpaint/stamps"):
        stamps.build_rows(tmp_path / "nowhere")
    write_tree(tmp_path, {"a/x.png": b"x", "a/x.txt": b"Caf\xe9"})
    with pytest.raises(InputError, match=r"a/x\.txt is not UTF-8"):
        stamps.build_rows(tmp_path)


def test_a_folder_of_ones_own_is_copied_beside_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = write_tree(tmp_path / "tree", FILES)
    monkeypatch.setenv("STAMPS_DIR", str(tree))
    manifest = tmp_path / "out/stamps.jsonl"
    assert stamps.main(["--out", str(tmp_path / "out")]) == 0
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert all(
        row["image_path"].startswith("stamps/") and (manifest.parent / row["image_path"]).is_file() for row in rows
    )
    assert "4 samples, 3 groups, 2 labels" in capsys.readouterr().out
    before = manifest.stat().st_mtime_ns, manifest.read_bytes()
    assert stamps.main(["--out", str(tmp_path / "out")]) == 0
    assert (manifest.stat().st_mtime_ns, manifest.read_bytes()) == before
    said = capsys.readouterr().out
    assert "already there: nothing to do" in said
    assert "counts not checked" in said


# --- fetching, with an apt-get and a dpkg of our own: the "package" is a tar ---------------------------------------

APT = """#!/bin/sh
echo "$@" >> "$FAKE/calls"
case "$*" in
  *update*) exit 0 ;;
  *Dir::State::lists=*) ;;
  *) if [ -e "$FAKE/no-lists" ]; then echo "E: Unable to locate package" >&2; exit 100; fi ;;
esac
cp "$FAKE/package.tar" tuxpaint-stamps-default_2022.06.04-1_all.deb
"""
DPKG = """#!/bin/sh
mkdir -p "$3" && tar -xf "$2" -C "$3"
if [ -e "$FAKE/cut" ]; then echo "dpkg: unexpected end of file" >&2; exit 2; fi
"""


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with fake tools on the PATH, which serves FILES as the package."""
    fake = tmp_path / "fake"
    tree = write_tree(fake / "root/usr/share/tuxpaint/stamps", FILES)
    with tarfile.open(fake / "package.tar", "w") as tar:
        tar.add(fake / "root", ".")
    for name, script in (("apt-get", APT), ("dpkg", DPKG)):
        (fake / "bin").mkdir(exist_ok=True)
        (fake / "bin" / name).write_text(script)
        (fake / "bin" / name).chmod(0o755)
    rows, content = stamps.build_rows(tree)
    monkeypatch.setenv("PATH", f"{fake / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(fake))
    monkeypatch.delenv("STAMPS_DIR", raising=False)
    monkeypatch.setattr(stamps, "PACKAGE_SHA256", hashlib.sha256((fake / "package.tar").read_bytes()).hexdigest())
    monkeypatch.setattr(stamps, "CONTENT_SHA256", content)
    monkeypatch.setattr(stamps, "EXPECTED", stamps.counts_of(rows))
    return fake


def calls(debian: Path) -> list[str]:
    return (debian / "calls").read_text().splitlines()


def read_manifest(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "stamps.jsonl").read_text().splitlines()]


def test_fetching_unpacks_once_and_names_files_relative_to_the_manifest(
    debian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert stamps.main(["--out", str(out)]) == 0
    assert (out / read_manifest(out)[1]["image_path"]).read_bytes() == b"frog"
    assert {path.name for path in out.iterdir()} == {"stamps", "stamps.jsonl"}
    assert "present: image 4, caption 3" in capsys.readouterr().out
    assert stamps.main(["--out", str(out)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert calls(debian) == ["download tuxpaint-stamps-default=2022.06.04-1"]


def test_empty_package_lists_are_filled_in_a_folder_of_our_own(debian: Path, tmp_path: Path) -> None:
    (debian / "no-lists").touch()
    assert stamps.main(["--out", str(tmp_path / "out")]) == 0
    asked, update, download = calls(debian)
    assert asked.startswith("download")
    assert update.endswith("update")
    assert download.endswith(asked)
    for call in (update, download):
        assert f"Dir::State::lists={tmp_path}/out/.apt/lists" in call
        assert f"Dir::Cache={tmp_path}/out/.apt/cache" in call
        assert "APT::Sandbox::User=root" in call


def test_another_package_is_refused_and_leaves_nothing(
    debian: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stamps, "PACKAGE_SHA256", "0" * 64)
    assert stamps.main(["--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert f"has sha256 {hashlib.sha256((debian / 'package.tar').read_bytes()).hexdigest()}, not {'0' * 64}" in said
    assert list((tmp_path / "out").iterdir()) == []


def test_a_cut_unpacking_leaves_nothing_and_the_next_run_finishes(
    debian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (debian / "cut").touch()
    assert stamps.main(["--out", str(tmp_path / "out")]) == 1
    assert "exited with 2: dpkg: unexpected end of file; run it again" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    (debian / "cut").unlink()
    write_tree(tmp_path / "out/.work/unpacked/usr/share/tuxpaint/stamps", {"a/left-by-a-kill.png": b"x"})
    assert stamps.main(["--out", str(tmp_path / "out")]) == 0
    assert len(read_manifest(tmp_path / "out")) == 4


@pytest.mark.parametrize("damage", ["flip", "delete", "empty"])
def test_a_damaged_folder_is_fetched_again(
    debian: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert stamps.main(["--out", str(out)]) == 0
    manifest = (out / "stamps.jsonl").read_bytes()
    victims = [out / "stamps/animals/frog.txt"] if damage != "empty" else list((out / "stamps").rglob("*.*"))
    for victim in victims:
        victim.write_bytes(b"A fro9.") if damage == "flip" else victim.unlink()
    assert stamps.main(["--out", str(out)]) == 0
    assert "fetching it again" in capsys.readouterr().err
    assert (out / "stamps.jsonl").read_bytes() == manifest
    assert len(calls(debian)) == 2


def test_counts_that_differ_from_the_known_ones_are_a_bug(
    debian: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stamps, "EXPECTED", {**stamps.EXPECTED, "sound": 2})
    with pytest.raises(AssertionError, match="the package is right, but its fields count"):
        stamps.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out/stamps.jsonl").exists()


def test_without_apt_the_error_names_the_package_and_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("STAMPS_DIR", raising=False)
    assert stamps.main(["--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: apt-get is not installed here")
    assert "tuxpaint-stamps-default 2022.06.04-1" in said
    assert "STAMPS_DIR=DIR" in said
    assert said.count("\n") == 1


def test_the_recipe_s_spec_reads_every_field_of_the_manifest() -> None:
    spec = yaml.safe_load((Path(stamps.__file__).parent / "stamps.yaml").read_text())
    fields = {name: field["from"] for name, field in spec["corpus"]["fields"].items()}
    assert fields == stamps.FIELD_COLUMNS
    assert spec["corpus"]["source"]["path"] == "build/stamps/stamps.jsonl"
