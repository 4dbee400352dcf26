"""Faults put into a store: `verify` names the shard and the row, and no reader returns a row that is not its sample's.

Each fault comes naive (a file changed on disk) and forged, as a writer with a bug would leave it: the file consistent
in itself, its footer and the catalog's path, sha256, bytes and rows bearing it out.
"""

import io
import json
import tarfile
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from featurestore import vectors
from featurestore.catalog import Entry
from featurestore.corpora import MEDIA, MEMBER, QUARANTINE, ROWS, Corpus
from featurestore.encoders import fingerprint_of
from featurestore.errors import AlignmentError, InputError, NotFound
from featurestore.identity import from_tar_key, row_digest
from featurestore.ids import IDS
from featurestore.inspection import MOST_NAMED, Inspection
from featurestore.storage import Storage
from featurestore.verify import LEVELS, inspect, units, verify
from featurestore.views import VIEW
from tests.faults.conftest import Check, Whole
from tests.faults.stores import Broken, flip, members, misreadings, present_rows, set_column, swap, tar_of

FORMS = pytest.mark.parametrize("forged", [False, True], ids=["naive", "forged"])
PARQUET = pytest.mark.parametrize(("kind", "name"), [(VIEW, "sound"), (ROWS, "planted")])
FILES = pytest.mark.parametrize(("kind", "name"), [(VIEW, "sound"), (ROWS, "planted"), (MEDIA, "planted")])
SHARD, OTHER = 2, 4  # positions of the shards that are broken


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_is_found_in_a_whole_store(whole: Whole, level: str) -> None:
    report = verify(whole.storage, level=level)
    assert report.ok
    assert [str(each) for each in report.findings] == []
    counts = dict(report.artefacts)
    assert counts[VIEW] == 2 * counts[ROWS] == 2 * counts[MEDIA]
    assert counts[QUARANTINE] >= 2
    assert "all holds" in list(report.lines())[-1]


def test_every_file_of_the_catalog_is_the_subject_of_one_unit(whole: Whole, broken: Broken) -> None:
    entries = broken.snapshot().all()
    subjects = [
        entry for unit in units(entries) for entry in unit.entries if not (unit.kind == VIEW and entry.kind == ROWS)
    ]
    assert sorted(subjects) == sorted(entries)


@FILES
@FORMS
def test_a_missing_file_is_found(broken: Broken, caught: Check, kind: str, name: str, forged: bool) -> None:
    entry = broken.entry(kind, name, SHARD)
    broken.change(entry, None, forged)
    found = {VIEW: (VIEW, "has not"), ROWS: (MEDIA, "no rows"), MEDIA: (ROWS, "no tar")}[kind]
    caught(*((found[0], entry.shard) if forged else (kind, entry.shard)), problem=found[1] if forged else "gone")


@FILES
@FORMS
def test_an_empty_file_is_found(broken: Broken, caught: Check, kind: str, name: str, forged: bool) -> None:
    entry = broken.entry(kind, name, SHARD)
    broken.change(entry, b"", forged, rows=0)
    caught(kind, entry.shard, level="footers" if not forged else "rows")


@PARQUET
@FORMS
def test_a_file_a_row_short_is_found(broken: Broken, caught: Check, kind: str, name: str, forged: bool) -> None:
    entry = broken.entry(kind, name, SHARD)
    table = broken.read(entry)
    broken.rewrite(entry, pa.concat_tables([table.slice(0, 3), table.slice(4)]), forged)
    # A view's row 3 is missing, so the sample of row 3 has another's row.
    caught(kind, entry.shard, *([3] if kind == VIEW else []), problem="rows" if kind == VIEW else "ids")
    caught(kind, entry.shard, level="footers", problem="rows")


@PARQUET
@FORMS
def test_a_file_a_row_long_is_found(broken: Broken, caught: Check, kind: str, name: str, forged: bool) -> None:
    entry = broken.entry(kind, name, SHARD)
    table = broken.read(entry)
    broken.rewrite(entry, pa.concat_tables([table, table.slice(2, 1)]), forged)
    caught(kind, entry.shard, len(table))
    caught(kind, entry.shard, level="footers", problem="rows")


@FILES
@FORMS
def test_a_copy_of_another_shard_is_found(broken: Broken, caught: Check, kind: str, name: str, forged: bool) -> None:
    entry, other = broken.entry(kind, name, SHARD), broken.entry(kind, name, OTHER)
    broken.change(entry, broken.path(other).read_bytes(), forged, rows=other.rows)
    caught(kind, entry.shard, level="rows")


@FILES
@FORMS
def test_two_swapped_files_are_found(broken: Broken, caught: Check, kind: str, name: str, forged: bool) -> None:
    entry, other = broken.entry(kind, name, SHARD), broken.entry(kind, name, OTHER)
    contents = broken.path(entry).read_bytes(), broken.path(other).read_bytes()
    broken.change(entry, contents[1], forged, rows=other.rows)
    broken.change(other, contents[0], forged, rows=entry.rows)
    caught(kind, entry.shard, level="rows")
    caught(kind, other.shard, level="rows")


@FILES
def test_two_files_swapped_in_the_catalog_are_found(broken: Broken, caught: Check, kind: str, name: str) -> None:
    entry, other = broken.entry(kind, name, SHARD), broken.entry(kind, name, OTHER)
    broken.commit(entry, entry._replace(path=other.path, bytes=other.bytes, sha256=other.sha256, rows=other.rows))
    broken.commit(other, other._replace(path=entry.path, bytes=entry.bytes, sha256=entry.sha256, rows=entry.rows))
    caught(kind, entry.shard, level="rows")
    caught(kind, other.shard, level="rows")


@PARQUET
@FORMS
def test_rows_swapped_inside_a_shard_are_found(
    broken: Broken, caught: Check, kind: str, name: str, forged: bool
) -> None:
    entry = broken.entry(kind, name, SHARD)
    table = broken.read(entry)
    first, second = present_rows(broken.read(broken.entry(VIEW, "sound", SHARD)))[:2]
    broken.rewrite(entry, swap(table, first, second), forged)
    rows = (first, second) if kind == VIEW else (first + 1,)
    caught(kind, entry.shard, *rows, level="rows")


@FORMS
def test_vectors_permuted_under_unchanged_ids_are_found(broken: Broken, caught: Check, forged: bool) -> None:
    entry = broken.entry(VIEW, "sound", SHARD)
    table = broken.read(entry)
    rows = present_rows(table)
    matrix = vectors.matrix(table["embedding"]).copy()
    matrix[rows] = matrix[np.roll(rows, 1)]
    broken.rewrite(entry, set_column(table, "embedding", vectors.column(matrix)), forged)
    caught(VIEW, entry.shard, *rows, problem="row_digest", level="rows")


def test_a_batch_scattered_to_wrong_rows_is_found(broken: Broken, caught: Check) -> None:
    """As an encoder's bug would leave it: each vector goes with its input's digest, the row digests are made after."""
    entry = broken.entry(VIEW, "sound", SHARD)
    table = broken.read(entry)
    rows = present_rows(table)
    order = np.arange(len(table))
    order[rows] = np.roll(rows, 1)
    moved = table.take(order)
    ids = broken.read(broken.entry(ROWS, "planted", SHARD))["id"].to_pylist()
    matrix = vectors.matrix(moved["embedding"])
    digests = zip(ids, moved["input_digest"].to_pylist(), (vector.tobytes() for vector in matrix), strict=True)
    broken.rewrite(
        entry, set_column(moved, "row_digest", pa.array([row_digest(*row) for row in digests], pa.binary(8))), True
    )
    caught(VIEW, entry.shard, *rows, problem="input_digest", level="rows")


def test_fields_permuted_under_unchanged_ids_are_found(broken: Broken, caught: Check) -> None:
    entry = broken.entry(ROWS, "planted", SHARD)
    table = broken.read(entry)
    first, second = present_rows(broken.read(broken.entry(VIEW, "sound", SHARD)))[:2]
    moved = swap(table, first, second)["sound"].combine_chunks()
    broken.rewrite(entry, set_column(table, "sound", moved), True)
    caught(ROWS, entry.shard, first + 1, level="rows")
    caught(MEDIA, entry.shard, first, second, level="rows")


def test_a_value_given_to_the_sample_before_it_is_found_and_not_read(broken: Broken) -> None:
    """The places still ascend: only the name in the tar tells."""
    entry = broken.entry(ROWS, "planted", SHARD)
    table = broken.read(entry)
    field, sounds = table["caption"].to_pylist(), table["sound"].to_pylist()
    row = next(row for row in range(len(field) - 1) if not sounds[row]["present"] and field[row + 1]["present"])
    field[row : row + 2] = field[row + 1], {"present": False, "miss_reason": "absent"}
    broken.rewrite(entry, set_column(table, "caption", pa.array(field, MEMBER)), True)
    found = {each.row for each in verify(broken.storage, level="rows").findings if each.kind == MEDIA}
    assert row in found
    with pytest.raises(AlignmentError, match=rf"the caption of .* \(shard {entry.shard}, row {row}\) is not the value"):
        Corpus(broken.snapshot(), "planted").value(entry.shard, row, "caption")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda matrix, row: matrix[row].__setitem__(3, np.nan), "row_digest"),
        (lambda matrix, row: matrix[row].fill(0), "row_digest"),
    ],
)
def test_a_vector_changed_by_its_writer_is_found(
    broken: Broken, caught: Check, spoil: Callable[[np.ndarray, int], None], problem: str
) -> None:
    entry = broken.entry(VIEW, "sound", SHARD)
    table = broken.read(entry)
    row = present_rows(table)[-1]
    matrix = vectors.matrix(table["embedding"]).copy()
    spoil(matrix, row)
    broken.rewrite(entry, set_column(table, "embedding", vectors.column(matrix)), True)
    caught(VIEW, entry.shard, row, problem=problem, level="rows")


def test_presence_that_the_vectors_do_not_bear_out_is_found(broken: Broken, caught: Check) -> None:
    entry = broken.entry(VIEW, "sound", SHARD)
    table = broken.read(entry)
    present = np.asarray(table["present"]).copy()
    row = int(np.flatnonzero(present)[0])
    present[row] = False
    reasons = table["miss_reason"].to_pylist()
    reasons[row] = "decode_error"
    changed = set_column(set_column(table, "present", pa.array(present)), "miss_reason", pa.array(reasons))
    broken.rewrite(entry, changed, True)
    caught(VIEW, entry.shard, row, problem="beside a vector that is whole", level="rows")


def test_a_miss_reason_that_presence_does_not_bear_out_is_found(broken: Broken, caught: Check) -> None:
    entry = broken.entry(VIEW, "sound", SHARD)
    table = broken.read(entry)
    reasons = table["miss_reason"].to_pylist()
    row = present_rows(table)[0]
    reasons[row] = "decode_error"
    broken.rewrite(entry, set_column(table, "miss_reason", pa.array(reasons)), True)
    caught(VIEW, entry.shard, row, problem="with miss_reason 'decode_error'", level="rows")


@FORMS
def test_a_flipped_bit_of_a_vector_is_found_with_its_row(broken: Broken, caught: Check, forged: bool) -> None:
    entry = broken.entry(VIEW, "sound", SHARD)
    table, content = broken.read(entry), broken.path(entry).read_bytes()
    row = present_rows(table)[1]
    vector = vectors.matrix(table["embedding"])[row].tobytes()
    broken.change(entry, flip(content, content.index(vector) + 5), forged)
    caught(VIEW, entry.shard, row, level="rows")
    caught(VIEW, entry.shard, problem="pages are damaged", level="rows")


@PARQUET
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_flipped_bit_anywhere_is_found(broken: Broken, caught: Check, kind: str, name: str, share: float) -> None:
    entry = broken.entry(kind, name, SHARD)
    content = broken.path(entry).read_bytes()
    broken.change(entry, flip(content, int(share * len(content))), False)
    caught(kind, entry.shard)


@PARQUET
def test_no_flipped_bit_that_the_catalog_bears_out_is_read_as_another_row(
    broken: Broken, whole: Whole, kind: str, name: str
) -> None:
    """A checksum made after the flip says nothing: the rows' digests must, or what was flipped changes no row."""
    entry = broken.entry(kind, name, SHARD)
    content = broken.path(entry).read_bytes()
    for at in range(11, len(content), len(content) // 4):
        broken.change(broken.entry(kind, name, SHARD), flip(content, at), True)
        verify(broken.storage)
        assert not misreadings(broken.storage, whole.truth)


def row_of(broken: Broken, entry: Entry, member: str) -> int:
    rows = broken.read(broken.entry(ROWS, "planted", SHARD))
    folder, slash, last = member.rpartition("/")
    return rows["id"].to_pylist().index(from_tar_key(folder + slash + last.partition(".")[0]))


@FORMS
@pytest.mark.parametrize("part", ["value", "header"])
def test_a_flipped_bit_of_a_tar_is_found_with_its_row(broken: Broken, caught: Check, forged: bool, part: str) -> None:
    entry = broken.entry(MEDIA, "planted", SHARD)
    content = broken.path(entry).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        info = tar.getmembers()[5]
    broken.change(entry, flip(content, (info.offset_data if part == "value" else info.offset) + 3), forged)
    caught(MEDIA, entry.shard, row_of(broken, entry, info.name), level="rows")


@FORMS
def test_a_tar_a_member_short_or_long_is_found(broken: Broken, caught: Check, forged: bool) -> None:
    entry, other = broken.entry(MEDIA, "planted", SHARD), broken.entry(MEDIA, "planted", OTHER)
    held = members(broken.path(entry).read_bytes())
    broken.change(entry, tar_of(held[:4] + held[5:]), forged)
    strange = tarfile.TarInfo("no/such.sound.wav")
    twice = members(broken.path(other).read_bytes())
    broken.change(other, tar_of([*twice, twice[0], (strange, b"RIFF")]), forged)
    caught(MEDIA, entry.shard, row_of(broken, entry, held[4][0].name), problem="not in the tar", level="rows")
    caught(MEDIA, other.shard, problem="stands twice", level="rows")
    caught(MEDIA, other.shard, problem="belongs to no row", level="rows")


@FORMS
def test_members_swapped_in_a_tar_are_found(broken: Broken, caught: Check, forged: bool) -> None:
    entry = broken.entry(MEDIA, "planted", SHARD)
    held = members(broken.path(entry).read_bytes())
    held[0], held[4] = held[4], held[0]
    broken.change(entry, tar_of(held), forged)
    caught(MEDIA, entry.shard, problem="order of the rows", level="rows")


@FORMS
def test_values_permuted_under_unchanged_keys_are_found(broken: Broken, caught: Check, forged: bool) -> None:
    entry = broken.entry(MEDIA, "planted", SHARD)
    held = members(broken.path(entry).read_bytes())
    captions = [at for at, (info, _) in enumerate(held) if info.name.endswith(".caption.txt")]
    moved = dict(zip(captions, [held[at][1] for at in np.roll(captions, 1)], strict=True))
    broken.change(entry, tar_of([(info, moved.get(at, raw)) for at, (info, raw) in enumerate(held)]), forged)
    rows = [row_of(broken, entry, held[at][0].name) for at in captions if held[at][1] != moved[at]]
    assert len(rows) > 3
    caught(MEDIA, entry.shard, *rows, problem="digest", level="rows")


def test_a_duplicated_shard_of_a_corpus_is_found_by_its_ids(broken: Broken, caught: Check) -> None:
    """A whole copy under another key: rows, tar and footers agree with each other, the ids are there already."""
    for kind in (ROWS, MEDIA):
        entry = broken.entry(kind, "planted", SHARD)
        copy = entry._replace(shard="0copy-00000-00000")
        broken.change(entry, broken.path(entry).read_bytes(), True)
        broken.commit(broken.entry(kind, "planted", 0)._replace(shard="none"), copy)
    caught(ROWS, broken.entry(ROWS, "planted", SHARD + 1).shard, 0, 1, problem="stands in shard", level="rows")


def test_a_view_shard_too_many_is_found(broken: Broken, caught: Check) -> None:
    entry = broken.entry(VIEW, "sound", SHARD)
    broken.commit(entry._replace(shard="none"), entry._replace(shard="f" * 12 + "-00000-00000"))
    caught(VIEW, "f" * 12 + "-00000-00000", problem="no such shard", level="footers")


def test_a_view_made_from_an_earlier_corpus_shard_is_found(broken: Broken) -> None:
    entry = broken.entry(ROWS, "planted", SHARD)
    table = broken.read(entry)
    labels = pa.array(["other"] * len(table))
    broken.rewrite(entry, set_column(table, "label", labels), True)
    findings = verify(broken.storage, level="footers").findings
    assert {(each.kind, each.name, each.shard) for each in findings if "input_sha256" in each.problem} == {
        (VIEW, name, entry.shard) for name in ("sound", "timbre")
    }


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda encoder: encoder | {"fingerprint": "0" * 64}, "is not that of its card"),
        (lambda encoder: encoder | {"options": {"n_mels": 40, "batch_size": 32}}, "is not that of its card"),
        (lambda encoder: refingerprinted(encoder | {"source": "elsewhere"}), "recipe"),
    ],
)
def test_a_shard_of_another_encoder_is_found(
    broken: Broken, caught: Check, change: Callable[[dict[str, object]], dict[str, object]], problem: str
) -> None:
    entry = broken.entry(VIEW, "sound", SHARD)
    info = entry.info()
    lineage = json.dumps(info | {"encoder": change(info["encoder"])}, sort_keys=True)
    broken.commit(entry, entry._replace(lineage=lineage))
    caught(VIEW, entry.shard, problem=problem, level="footers")
    caught(VIEW, entry.shard, problem="another encoder", level="footers")


def refingerprinted(encoder: dict[str, object]) -> dict[str, object]:
    card = {key: value for key, value in encoder.items() if key != "fingerprint"}
    return card | {"fingerprint": fingerprint_of(card)}


def test_a_shard_of_another_recipe_is_found(broken: Broken, caught: Check) -> None:
    entry = broken.entry(VIEW, "sound", SHARD)
    broken.commit(entry, entry._replace(recipe="0" * 16))
    caught(VIEW, entry.shard, problem="recipe", level="footers")


@FORMS
def test_a_quarantine_that_does_not_say_what_the_rows_say_is_found(broken: Broken, caught: Check, forged: bool) -> None:
    kept, gone = (broken.entry(QUARANTINE, name, 0) for name in ("encode/sound", "shard/planted"))
    table = broken.read(kept)
    reasons = pa.array(["because"] * len(table))
    broken.rewrite(kept, set_column(table, "reason", reasons), forged)
    broken.change(gone, None, forged)
    caught(QUARANTINE, kept.shard, problem="here only", level="rows")
    if forged:
        caught(ROWS, gone.shard, problem="no quarantine is there", level="rows")
    else:
        caught(QUARANTINE, gone.shard, problem="gone", level="rows")


def test_a_catalog_that_cannot_be_read_is_a_finding(broken: Broken) -> None:
    for log in sorted((broken.folder / "catalog" / "_delta_log").glob("*.json")):
        log.write_bytes(log.read_bytes()[:-40])
    report = verify(broken.storage)
    assert [each.kind for each in report.findings] == ["catalog"]


def test_a_file_of_the_catalog_that_is_gone_is_a_finding(broken: Broken) -> None:
    for file in (broken.folder / "catalog").glob("*.parquet"):
        file.unlink()
    assert [each.kind for each in verify(broken.storage).findings] == ["catalog"]


@pytest.mark.parametrize("lineage", ["[]", '{"corpus": "planted"}'])
@pytest.mark.parametrize(("kind", "name"), [(VIEW, "sound"), (ROWS, "planted")])
def test_a_lineage_that_says_nothing_is_a_finding(broken: Broken, kind: str, name: str, lineage: str) -> None:
    entry = broken.entry(kind, name, 0)
    broken.commit(entry, entry._replace(lineage=lineage))
    assert any(each.kind == kind for each in verify(broken.storage).findings)


@pytest.mark.parametrize("path", ["../outside", "", "views"])
def test_a_path_that_is_no_file_of_the_store_is_a_finding(broken: Broken, path: str) -> None:
    entry = broken.entry(VIEW, "sound", SHARD)
    broken.commit(entry, entry._replace(path=path))
    assert any(each.shard == entry.shard for each in verify(broken.storage).findings)


def test_a_finding_says_where_what_and_the_mend(broken: Broken) -> None:
    entry = broken.entry(VIEW, "sound", SHARD)
    table = broken.read(entry)
    first, second = present_rows(table)[:2]
    broken.rewrite(entry, swap(table, first, second), True)
    outcome = next(
        inspect(broken.snapshot(), unit, "rows")
        for unit in units(broken.snapshot().all())
        if unit.entries[0][:4] == (VIEW, "sound", entry.recipe, entry.shard)
    )
    line = str(outcome.findings[0])
    assert line.startswith(f"view sound, shard {entry.shard}, row {first}, id ")
    assert "input_digest" in line
    assert "delete views/sound/" in line
    assert "braid run" in line


@pytest.mark.parametrize("kind", [ROWS, MEDIA, QUARANTINE])
def test_nothing_of_a_corpus_is_to_be_deleted(broken: Broken, kind: str) -> None:
    """`braid run` cannot make raw data again; a view beside it is as good as before."""
    entry = broken.entry(kind, "shard/planted" if kind == QUARANTINE else "planted", 0)
    for content in (broken.path(entry).read_bytes()[:-9] + b"damaged!!", None):
        broken.change(entry, content, False)
        found = verify(broken.storage).findings
        assert {each.kind for each in found} == ({ROWS, VIEW, IDS} if kind == ROWS else {kind})
        for each in found:
            assert each.mend.startswith(
                "mend that first" if each.kind in (VIEW, IDS) else "put the file back from a copy"
            )


def test_many_wrong_rows_are_counted_not_listed(whole: Whole) -> None:
    look = Inspection(whole.storage, "rows")
    entry = Entry(VIEW, "v", "r", "s", "views/v/r/s", 100, 1, "0", "", "", None, None, "{}")
    for row in range(100):
        look.say(entry, "wrong", row)
    assert len(look.findings) == MOST_NAMED + 1
    assert look.findings[-1].problem == "… and 80 more of its rows"


def test_another_level_is_refused_and_so_is_an_address_without_a_store(whole: Whole, broken: Broken) -> None:
    with pytest.raises(InputError, match=r"level 'deep' is not allowed; one of: footers, rows, bytes"):
        verify(whole.storage, level="deep")
    with pytest.raises(NotFound, match="has no version 99"):
        verify(whole.storage, 99)
    with pytest.raises(NotFound, match="no Braid store"):
        verify(Storage.of(broken.folder / "nothing"))


def test_an_earlier_version_is_verified_as_it_was(broken: Broken) -> None:
    before = broken.snapshot().version
    broken.change(broken.entry(VIEW, "sound", SHARD), b"", True, rows=0)
    assert verify(broken.storage, before, "footers").ok
    assert not verify(broken.storage, level="footers").ok
