"""What a training set is not made of."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from featurestore.errors import InputError
from featurestore.store import FeatureStore
from featurestore.verify import verify
from jobs.report import duplicate_lines
from jobs.run import Runner
from jobs.spec import load
from tests.conftest import Made


def test_a_label_column_without_a_value_is_named(small: Made, tmp_path: Path) -> None:
    made = small.copy_to(tmp_path)
    manifest = made.corpus / "manifest.jsonl"
    rows = [json.loads(line) | {"label": None} for line in manifest.read_text().splitlines()]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))

    made.spec.write_text(made.spec.read_text().replace(str(made.store), str(tmp_path / "another")))
    told = r"corpus 'planted': none of its 48 samples has a value in the label column 'label'"
    with pytest.raises(InputError, match=told):
        Runner(load(made.spec), Console(quiet=True)).run(("shard", "encode", "fuse"))


def test_what_samples_are_grouped_by_can_be_learned_by_either_name(small: Made, tmp_path: Path) -> None:
    made = small.copy_to(tmp_path)
    manifest = made.corpus / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for row in rows:
        row["album"] = row.pop("group")
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = made.spec.read_text().replace(str(made.store), str(tmp_path / "another"))
    text = text.replace("group: group", "group: album").replace("timbre], label: label", "timbre], label: album")
    made.spec.write_text(text.replace("[short], label: label", "[short], label: group"))
    Runner(load(made.spec), Console(quiet=True)).run(("shard", "encode", "fuse"))
    store = FeatureStore(tmp_path / "another")
    albums = {row["id"]: row["album"] for row in rows}
    for name in ("heard", "other"):
        table = store.training_set(name).to_arrow("train")
        assert len({*albums.values()}) > 5
        assert (
            table["label"].to_pylist()
            == table["group"].to_pylist()
            == [albums[each] for each in table["id"].to_pylist()]
        )


def test_a_label_that_whole_shards_lack_is_learned_from_the_others_and_verified(small: Made, tmp_path: Path) -> None:
    made, corpus = small.copy_to(tmp_path), small.open().corpus("planted")
    some = {sample_id for entry in corpus.shards[:5] for sample_id in corpus.ids(entry.shard)}
    manifest = made.corpus / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    manifest.write_text(
        "".join(json.dumps(row | ({"rare": row["label"]} if row["id"] in some else {})) + "\n" for row in rows)
    )
    text = made.spec.read_text().replace(str(made.store), str(tmp_path / "another"))
    made.spec.write_text(text.replace("[short], label: label", "[short], label: rare"))
    Runner(load(made.spec), Console(quiet=True)).run(("shard", "encode", "fuse"))
    store = FeatureStore(tmp_path / "another")
    table = store.training_set("other")
    assert {each for split in ("train", "test") for each in table.to_arrow(split)["id"].to_pylist()} == some
    assert not verify(store.storage, level="rows").findings


def test_samples_with_equal_bytes_stand_on_one_side_where_the_set_says_so(small: Made, tmp_path: Path) -> None:
    made = small.copy_to(tmp_path)
    manifest = made.corpus / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    sounds = {row["id"]: made.corpus / row["sound_path"] for row in rows if row["sound_path"]}
    before = small.open().training_set("heard")
    one, other = (
        next(each for each in before.to_arrow(side)["id"].to_pylist() if each in sounds) for side in ("train", "test")
    )
    sounds[one].write_bytes(sounds[other].read_bytes())
    spec, runner = made.spec.read_text(), lambda: Runner(load(made.spec), Console(quiet=True))
    runner().run(("shard", "encode"))
    told = r"equal bytes of sound in (train and test|test and train): .*\n.*name the fields in the training set's group_equal"
    with pytest.raises(InputError, match=f"(?s){told}"):
        runner().run(("fuse",))
    assert "sound: 1 value in 2 samples" in list(duplicate_lines(made.open(), "planted"))
    made.spec.write_text(spec.replace("label: label,", "label: label, group_equal: sound,"))
    runner().run(("fuse",))
    store = made.open()
    equal = {one, other}
    sides = {
        split: equal & set(store.training_set("heard").to_arrow(split)["id"].to_pylist()) for split in ("train", "test")
    }
    assert sorted(map(len, sides.values())) == [0, len(equal)]
    assert store.card("training", "heard")["certificate"]["passed"]
    assert verify(store.storage, level="rows").findings == () or run_builds(runner(), store)


def run_builds(runner: Runner, store: FeatureStore) -> bool:
    runner.run(("align", "index"))
    return verify(store.storage, level="rows").ok
