import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from featurestore.errors import DecodeError
from featurestore.media import decode_audio, decode_image, decode_text
from tests.planted import (
    CLASSES,
    COLOURS,
    ODD_IDS,
    SAMPLE_RATE,
    SHARD_ROWS,
    SIZES,
    plant_bad_values,
    planted_spec,
    write_planted,
)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("planted")).parent


def rows_of(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "manifest.jsonl").read_bytes().decode("utf-8", "surrogateescape")
    return [json.loads(line) for line in text.splitlines()]


def truth_of(folder: Path) -> dict[str, dict[str, Any]]:
    truth: dict[str, dict[str, Any]] = json.loads((folder / "truth.json").read_text())
    return truth


def mode_of(path: Path) -> str:
    with Image.open(path) as image:
        return image.mode


def digests(folder: Path) -> dict[str, tuple[str, int]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in files
    }


def test_the_same_seed_writes_the_same_bytes_and_times(tmp_path: Path) -> None:
    write_planted(tmp_path / "a", n=24, bad=True)
    write_planted(tmp_path / "b", n=24, bad=True)
    write_planted(tmp_path / "c", n=24, bad=True, seed=1)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a") != digests(tmp_path / "c")


def test_it_fills_at_least_16_shards_with_groups_missing_values_and_every_format(planted: Path) -> None:
    rows = rows_of(planted)
    assert len(rows) == 160 >= 16 * SHARD_ROWS
    assert max(Counter(row["group"] for row in rows).values()) > 1
    assert {row["label"] for row in rows} == set(CLASSES)
    missing = {
        name: sum(row[name] is None for row in rows) for name in ("image_path", "caption", "sound_path", "note_path")
    }
    assert missing == {"image_path": 5, "caption": 10, "sound_path": 40, "note_path": 140}
    assert {mode_of(planted / row["image_path"]) for row in rows if row["image_path"]} == {"RGB", "RGBA", "P"}
    assert {path.suffix for path in planted.rglob("*.*")} == {".jpg", ".png", ".ogg", ".wav", ".txt", ".json", ".jsonl"}


def test_captions_and_bytes_of_different_groups_differ(planted: Path) -> None:
    owners: dict[object, set[str]] = {}
    for row in rows_of(planted):
        files = [(planted / row[name]).read_bytes() for name in ("image_path", "sound_path", "note_path") if row[name]]
        for value in [*files, row["caption"]]:
            if value is not None:
                owners.setdefault(value, set()).add(row["group"])
    assert {len(groups) for groups in owners.values()} == {1}


def test_every_modality_shows_the_latent(planted: Path) -> None:
    truth = truth_of(planted)
    areas, pitches, sizes, heard = [], [], [], []
    for row in rows_of(planted):
        told = truth[row["id"]]
        _, size = told["latent"]
        if row["caption"]:
            assert COLOURS[told["label"]] in row["caption"]
            assert SIZES[min(int(size * 5), 4)] in row["caption"]
        if row["image_path"] and told["label"] == "circle":
            pixels = np.asarray(decode_image((planted / row["image_path"]).read_bytes()), dtype=int)
            areas.append((pixels[..., 0] - pixels[..., 1] > 80).sum() ** 0.5)
            sizes.append(size)
        if row["sound_path"]:
            sound = decode_audio((planted / row["sound_path"]).read_bytes(), SAMPLE_RATE)
            pitches.append(np.log(np.abs(np.fft.rfft(sound, 1 << 15))[1:].argmax() + 1))
            heard.append(size)
    assert np.corrcoef(areas, sizes)[0, 1] > 0.99
    assert np.corrcoef(pitches, heard)[0, 1] < -0.95


def test_bad_values_fail_to_decode_for_the_reason_that_is_promised(tmp_path: Path) -> None:
    manifest = write_planted(tmp_path)
    good = {row["id"]: row for row in rows_of(tmp_path)}
    expected = plant_bad_values(tmp_path, manifest)
    assert len(expected) == len({sample_id for sample_id, _ in expected}) == 10
    found = {}
    for row in rows_of(tmp_path):
        for field in ("image", "caption", "note", "sound"):
            reason = reason_of(tmp_path, row, field)
            if reason:
                found[row["id"], field] = reason
    assert found == expected
    assert set(good) | set(ODD_IDS) == {row["id"] for row in rows_of(tmp_path)} == set(truth_of(tmp_path))


def reason_of(folder: Path, row: dict[str, Any], field: str) -> str | None:
    value = row["caption" if field == "caption" else f"{field}_path"]
    if value is None:
        return None
    try:
        raw = value.encode("utf-8", "surrogateescape") if field == "caption" else (folder / value).read_bytes()
        if field == "image":
            decode_image(raw)
        elif field == "sound":
            decode_audio(raw, SAMPLE_RATE)
        else:
            decode_text(raw)
    except DecodeError as error:
        return error.reason
    except FileNotFoundError:
        return "unreadable"
    return None


def test_the_spec_is_yaml_that_names_the_manifest_and_the_store(tmp_path: Path) -> None:
    spec = yaml.safe_load(planted_spec(tmp_path, tmp_path / "store", failure_budget="5%"))
    assert spec["corpus"]["source"]["path"] == str(tmp_path / "manifest.jsonl")
    assert spec["store"]["uri"] == str(tmp_path / "store")
    assert spec["corpus"]["failure_budget"] == "5%"
