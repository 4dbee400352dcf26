import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from featurestore.errors import NotFound, SpecError
from jobs.spec import MAX_BYTES, Spec, load, parse

GOOD = """\
version: 1
store: {uri: ./stamps-store}
corpus:
  name: stamps
  source: {type: manifest, path: stamps.jsonl}
  columns: {id: id, group: group, event_timestamp: added}
  fields:
    image: {modality: image, from: image_path}
    caption: {modality: text, from: caption}
    sound: {modality: audio, from: sound_path}
  failure_budget: 1%
views:
  image: {field: image, encoder: efficientnet-lite0}
  caption: {field: caption, encoder: minilm-l6}
  sound: {field: sound, encoder: log-mel}
spaces:
  seen: {views: [image, caption], method: cca, dim: 64}
  heard: {views: [image, sound], method: cca}
indexes:
  stamps: {space: seen, views: [image, caption], recall: 0.9}
training_sets:
  category:
    views: [image, caption, sound]
    label: label
    splits: {train: 0.8, val: 0.1, test: 0.1}
"""


def mistakes(text: str) -> list[str]:
    with pytest.raises(SpecError, match=r"^spec\.yaml: ") as caught:
        parse(text, "spec.yaml")
    head, *lines = str(caught.value).split("\n  ")
    assert head == f"spec.yaml: {len(lines)} mistake{'s' * (len(lines) != 1)}"
    return lines


def changed(old: str, new: str) -> str:
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


def test_a_good_spec_is_read_with_its_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.yaml").write_text(GOOD)
    spec = load("spec.yaml")
    assert spec == parse(GOOD, "elsewhere")
    assert spec.store.uri == str(tmp_path / "stamps-store")
    corpus = spec.corpus
    assert (corpus.media, corpus.shard_rows, corpus.shard_mb, corpus.failure_budget) == ("copy", 10_000, 512, 0.01)
    assert {n: (f.from_, f.read) for n, f in corpus.fields.items()} == {
        "image": ("image_path", None),
        "caption": ("caption", None),
        "sound": ("sound_path", None),
    }
    assert (spec.spaces["seen"].dim, spec.spaces["heard"].dim) == (64, 128)
    assert spec.training_sets["category"].seed == 0
    assert list(spec.views) == ["image", "caption", "sound"]


def test_escapes_in_a_spec_are_what_they_stand_for() -> None:
    spec = parse(changed("sound_path", '"sp\\u2028 \\U0001F600\\x7f"'), "x")
    assert spec.corpus.fields["sound"].from_ == "sp\u2028 \U0001f600\x7f"


def test_only_what_is_required_is_required() -> None:
    spec = parse(GOOD[: GOOD.index("views:")], "x")
    assert spec.views == spec.spaces == spec.indexes == spec.training_sets == {}


def test_a_view_is_found_by_name_or_the_names_are_told() -> None:
    spec = parse(GOOD, "x")
    assert spec.view("sound").encoder == "log-mel"
    with pytest.raises(NotFound, match="no view 'sond'; it has: image, caption, sound"):
        spec.view("sond")


ONE_MISTAKE = [
    ("version: 1", "version: 2", "line 1: version: 2 is wrong: this Braid reads version 1"),
    ("version: 1", "version: true", "line 1: version: true is wrong: this Braid reads version 1"),
    ("version: 1\n", "\n", "line 2: version: is missing; add it, a whole number, e.g. 1"),
    ("version: 1\n", "version: 1\nviws: {}\n", "line 2: viws: is not a key of this section; allowed: version, store,"),
    ("version: 1\n", "version: 1\nviws: {}\n", "; did you mean 'views'?"),
    ("{uri: ./stamps-store}", "{}", "line 2: store.uri: is missing"),
    ("{uri: ./stamps-store}", "./stamps-store", "line 2: store: './stamps-store' is no section; allowed keys: uri, "),
    ("./stamps-store}", "./s, allow_http: 1}", "line 2: store.allow_http: 1 is wrong: write true or false"),
    ("./stamps-store}", "./s, endpoint_url: x}", "line 2: store.endpoint_url: is not a key of this section"),
    ("uri: ./stamps-store", "uri: 's3://k:s@b'", "line 2: store.uri: 's3://***@b' holds a name or a password; leave "
     "out all before the @: credentials come from the environment, or from a profile (store.profile)"),
    ("path: stamps.jsonl", "path: [a.jsonl, 'https://me@host/b.jsonl']", "line 5: corpus.source.path.1: 'https://***@host/b."
     "jsonl' holds a name or a password; leave out all before the @"),
    ("encoder: log-mel}", "encoder: log-mel, options: {url: 's3://k:s/+x@b'}}", "line 15: views.sound.options.url: 's3://***@b'"),
    ("name: stamps", "name: Stamps", "line 4: corpus.name: 'Stamps' is not a name; allowed: small letters"),
    ("type: manifest", "type: csv", "line 5: corpus.source.type: 'csv' is not allowed here; allowed: manifest, folder"),
    (", path: stamps.jsonl}", "}", "line 5: corpus.source.path: is missing"),
    ("modality: image", "modality: smell", "line 8: corpus.fields.image.modality: 'smell' is not allowed here"),
    ("modality: image", "modality: video", "line 13: views.image.encoder: 'efficientnet-lite0' takes image, but"),
    ("caption: {modality: text, from", "'Cap.tion': {modality: text, from", "'Cap.tion' is not a name"),
    ("from: sound_path", "form: sound_path", "line 10: corpus.fields.sound.form: is not a key of this section"),
    ("from: sound_path", "form: sound_path", "staleness, time, channels; did you mean 'from'?"),
    ("budget: 1%", "budget: 1", "line 11: corpus.failure_budget: 1 is wrong: write a share of all values"),
    ("budget: 1%", "budget: 101%", "line 11: corpus.failure_budget: '101%' is wrong"),
    ("budget: 1%", "budget: .nan", "line 11: corpus.failure_budget: NaN is wrong"),
    ("budget: 1%", "budget: 1%\n  media: link", "line 12: corpus.media: 'link' is not allowed here; allowed: copy, reference"),
    ("budget: 1%", "budget: 1%\n  shard_rows: 0", "line 12: corpus.shard_rows: 0 is wrong: write a whole number from 1, up "
     "to 1000000, e.g. 10000"),
    ("budget: 1%", "budget: 1%\n  shard_rows: '64'", "line 12: corpus.shard_rows: '64' is wrong: write a whole number from 1, "
     "up to 1000000, without quotes"),
    ("budget: 1%", "budget: 1%\n  shard_rows: null", "null is wrong: write a whole number from 1, up to 1000000; or leave i"),
    ("name: stamps", "name: 5", 'line 4: corpus.name: 5 is wrong: write a text, in quotes: "5"'),
    ("name: stamps", 'name: "\\ud800"', "line 4: corpus.name: '\\ud800' is wrong: write a text; an escape in it stands for"),
    ("id: id", "id: ''", "line 6: corpus.columns.id: '' is wrong: write a text that is not empty"),
    ("{type: manifest, path: stamps.jsonl}", "{type: webdataset, path: s.tar, adopt: 'true'}",
     "line 5: corpus.source.adopt: 'true' is wrong: write true or false, without quotes"),
    ("path: stamps.jsonl", "path: [a, 5]", "line 5: corpus.source.path.1: 5 is wrong: write a text that is not empty, in quot"),
    ("path: stamps.jsonl", "path: []", "line 5: corpus.source.path: [] is wrong: write a list of 1 or more"),
    ("from: sound_path", "read: file", "line 10: corpus.fields.sound.from: is missing; add it, a text, or a list of texts"),
    ("[image, caption], method", "[image, 5], method", "line 17: spaces.seen.views.1: 5 is wrong: write a text that is not"),
    ("method: cca, dim: 64", "dim: 64", "line 17: spaces.seen.method: is missing; add it, one of: cca"),
    ("{train: 0.8, val: 0.1, test: 0.1}", "0.8", "splits: 0.8 is wrong: write a section of names of your own, like {name: …}"),
    ("val: 0.1", "val: .inf", "line 25: training_sets.category.splits.val: Infinity is wrong: write a number above 0, up to 1"),
    ("    label: label\n", "    label: label\n    seed: 5000000000\n",
     "seed: 5000000000 is wrong: write a whole number from 0, below 4294967296, e.g. 0"),
    ("field: caption,", "field: captoin,", "line 14: views.caption.field: 'captoin' is not a field of this corpus; "
     "allowed: image, caption, sound; did you mean 'caption'?"),
    ("minilm-l6", "minilm-l7", "line 14: views.caption.encoder: 'minilm-l7' is not an encoder; allowed: clap, clip, "),
    ("minilm-l6", "mfcc", "line 14: views.caption.encoder: 'mfcc' takes audio, but field 'caption' is 'text'"),
    ("minilm-l6}", "minilm-l6, options: {zap: 3}}", "line 14: views.caption.options: encoder 'minilm-l6': option 'zap'"),
    ("[image, caption], method", "[image, sond], method", "line 17: spaces.seen.views.1: 'sond' is not a view of this "
     "spec; allowed: image, caption, sound; did you mean 'sound'?"),
    ("[image, sound]", "[image]", 'line 18: spaces.heard.views: ["image"] is wrong: write a list of 2'),
    ("[image, sound]", "[sound, sound]", "line 18: spaces.heard.views.1: 'sound' is listed twice; keep one"),
    ("dim: 64", "dim: 64.5", "line 17: spaces.seen.dim: 64.5 is wrong: write a whole number from 1, up to 65536, e.g. 128"),
    ("method: cca, dim", "method: ccca, dim", "allowed: cca; did you mean 'cca'?"),
    ("space: seen", "space: sen", "line 20: indexes.stamps.space: 'sen' is not a space of this spec; allowed: seen, h"),
    ("[image, caption], recall", "[image, sound], recall", "line 20: indexes.stamps.views.1: 'sound' is not a view of "
     "space 'seen'; allowed: image, caption"),
    ("recall: 0.9", "recall: 1.9", "line 20: indexes.stamps.recall: 1.9 is wrong: write a number above 0, up to 1, e.g. 0.95"),
    ("[image, caption, sound]", "image", "line 23: training_sets.category.views: 'image' is wrong: write a list of 1 or more, "
     "like [image]"),
    ("[image, caption, sound]", "[image, smell]", "line 23: training_sets.category.views.1: 'smell' is not a view"),
    ("    label: label\n", "", "line 22: training_sets.category.label: is missing"),
    ("test: 0.1", "test: 0.2", "line 25: training_sets.category.splits: "),
    ("test: 0.1", "test: 0.2", "the fractions sum to 1.1; they must sum to 1"),
    ("test: 0.1", "Test: 0.1", "line 25: training_sets.category.splits.Test: 'Test' is not a name"),
    ("name: stamps", "name: &n stamps", None),
    ("id: id", "id: &n id, available_timestamp: *n", "line 6: column 45: not YAML: aliases (*name) are not allowed"),
    ("name: stamps", "name: stamps\n  name: b", "line 5: corpus.name: is here twice (first in line 4); keep one"),
    ("name: stamps", "name: 2020-01-01", "line 4: corpus.name: '2020-01-01' is timestamp to YAML"),
    ("version: 1\n", "version: 1\nno: 3\n", "line 2: key 'no' is no text to YAML (it is bool); put it in quotes"),
    ("[image, sound]", "[image, sound", "line 18: column 44: not YAML: while parsing a flow sequence"),
    ("stamps.jsonl", '"stamps\\U00110000"', "not YAML: "),
    ("id: id", "id: \x07", "line 6: not YAML: special characters are not allowed"),
    ("recall: 0.9", "recall: " + "9" * 5000, "is too long for a number"),
    ("recall: 0.9", "recall: !!python/object:os.system {}", "line 20: indexes.stamps.recall: {} is wrong"),
    ("recall: 0.9", "recall: !!int x", "line 20: indexes.stamps.recall: 'x' is no int"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "told"), ONE_MISTAKE)
def test_a_mistake_is_told_with_its_line_and_its_mend(old: str, new: str, told: str | None) -> None:
    if told is None:
        parse(changed(old, new), "spec.yaml")
        return
    assert any(told in line for line in mistakes(changed(old, new))), mistakes(changed(old, new))


def test_one_mistake_is_told_once_and_no_part_of_a_long_password() -> None:
    (line,) = mistakes(changed("[image, sound]", "[image, 5]"))
    assert line.startswith("line 18: spaces.heard.views.1: 5 is wrong")
    (line,) = mistakes(changed("./stamps-store", f"'s3://k:{'secret' * 20}@b'"))
    assert line.startswith("line 2: store.uri: 's3://***@b' holds a name")


def test_all_mistakes_are_told_at_once_by_line() -> None:
    text = GOOD.replace("1\n", "2\n", 1).replace("field: caption", "field: captoin").replace("recall: 0.9", "recall: 9")
    text = text.replace("encoder: log-mel", "encoder: mel").replace("name: stamps", "nam: stamps")
    assert [line.split(" is ")[0] for line in mistakes(text)] == [
        "line 1: version: 2",
        "line 3: corpus.name:",
        "line 4: corpus.nam:",
        "line 14: views.caption.field: 'captoin'",
        "line 15: views.sound.encoder: 'mel'",
        "line 20: indexes.stamps.recall: 9",
    ]


def test_a_list_of_very_many_mistakes_is_cut() -> None:
    text = GOOD + "".join(f"k{i}: 1\n" for i in range(70))
    with pytest.raises(SpecError, match=r"x: 70 mistakes\n(.*\n){50}  and 20 more$"):
        parse(text, "x")


@pytest.mark.parametrize("text", ["", "# nothing", "- 1", "spec", "null", "[" * 9_999, "- " * 9_999, "a: " * 99])
def test_what_is_no_spec_at_all_is_one_mistake(text: str) -> None:
    assert len(mistakes(text)) == 1


def test_the_file_is_bounded_and_must_be_text(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(b"#" * MAX_BYTES)
    with pytest.raises(SpecError, match="the spec is empty"):
        load(path)
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(SpecError, match="larger than 1,000,000 bytes"):
        load(path)
    path.write_bytes(b"version: 1\nstore: \xff")
    with pytest.raises(SpecError, match="line 2: not UTF-8"):
        load(path)
    for missing in (tmp_path / "gone.yaml", tmp_path, "a\0b"):
        with pytest.raises(SpecError, match="cannot read the spec"):
            load(missing)


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(path for key, child in items for path in paths(child, (*here, key)))]


TREE = yaml.safe_load(GOOD)
PATHS = paths(TREE)[1:]
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4)
    | st.dates() | st.sampled_from(["image", "seen", "cca", "text", "1%", "log-mel", "<<", "="])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3),
    max_leaves=6,
)


def spec_or_mistakes(text: str) -> None:
    try:
        spec = parse(text, "x")
    except SpecError as error:
        message = str(error)
        assert message.startswith("x: ")
        assert all(line.isprintable() for line in message.splitlines())
        assert message.encode()
        assert not re.search("(nput|tring|uple|list|ictionary) should", message), message
    else:
        assert Spec.model_validate_json(spec.model_dump_json(by_alias=True)) == spec


@settings(max_examples=150)
@given(data=st.data())
def test_any_change_of_a_good_spec_is_a_spec_or_told_mistakes(data: st.DataObject) -> None:
    tree = copy.deepcopy(TREE)
    for path in data.draw(st.lists(st.sampled_from(PATHS), min_size=1, max_size=3, unique=True)):
        at: Any = tree
        try:
            for key in path[:-1]:
                at = at[key]
            act = data.draw(st.sampled_from(["replace", "remove", "add"]))
            if act == "replace":
                at[path[-1]] = data.draw(VALUES)
            elif act == "remove":
                del at[path[-1]]
            else:
                at[path[-1]][data.draw(SCALARS)] = data.draw(VALUES)
        except (KeyError, IndexError, TypeError):
            continue
    spec_or_mistakes(yaml.safe_dump(tree, sort_keys=False))


@settings(max_examples=150)
@given(
    at=st.integers(0, len(GOOD)),
    cut=st.integers(0, 12),
    new=st.text(max_size=4) | st.text("{}[]:,-&*!|>'\"%@#?\n ", max_size=5),
)
def test_any_change_of_its_text_is_a_spec_or_told_mistakes(at: int, cut: int, new: str) -> None:
    spec_or_mistakes(GOOD[:at] + new + GOOD[at + cut :])


@settings(max_examples=100)
@given(value=VALUES, text=st.text(max_size=60))
def test_anything_else_is_told_mistakes(value: object, text: str) -> None:
    spec_or_mistakes(yaml.safe_dump(value))
    spec_or_mistakes(text)


def test_the_import_is_light() -> None:
    code = "import sys, jobs.spec; print([m for m in ('torch', 'apache_beam', 'faiss', 'transformers') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
