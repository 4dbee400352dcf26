"""Tars as nobody should write them: what comes in all the same, what is rejected, what is refused, and that each is told."""

import random
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from featurestore.catalog import Snapshot
from featurestore.errors import DecodeError, InputError
from featurestore.storage import Storage
from pipelines.ingest import Known, scan
from pipelines.sources.files import Part
from tests.pipelines.tars import expected, header, pairs, signed, source_of, tar_of, values_of, written


def test_what_lies_before_a_cut_comes_in_and_the_cut_is_told(tmp_path: Path) -> None:
    """At every place of a tar: nothing is invented, what is not whole is told."""
    whole = tar_of([*pairs(3), ("0003.jpg", b"j" * 600), ("0003.json", b'{"a": 1}'), ("0003.txt", b"end")])
    right = expected(3) | {"0003": {"image": b"j" * 600, "caption": b"end"}}
    end = len(whole) - len(whole) % 512
    while whole[end - 512 : end] == bytes(512):
        end -= 512
    for cut in [*range(0, end, 191), *range(0, end, 512), end]:
        source = source_of(written(tmp_path, whole[:cut]))
        found = values_of(source)
        assert list(found) == list(right)[: len(found)], cut
        (told,) = source.remarks()
        assert told.startswith(f"tars that are cut off: 1, e.g. {tmp_path}/000.tar: it "), cut
        for key, values in list(found.items())[:-1]:
            assert values == right[key], cut
        for key, values in list(found.items())[-1:]:
            assert all(value in (right[key][field], "truncated") for field, value in values.items()), cut
            assert whole.find(f"{key}.jpg".encode()) + 512 <= cut
        inside = [key for key in right if whole.find(f"{key}.jpg".encode()) + 512 <= cut]
        assert list(found) == inside, cut
    assert source_of(written(tmp_path, whole)).remarks() == []


def test_a_cut_sample_whose_group_is_lost_is_left_out(tmp_path: Path) -> None:
    """Else its id would be its group, and a split could leak."""
    rows = [("a.json", b'{"video": "v"}'), ("a.jpg", b"a"), ("b.jpg", b"b"), ("b.json", b'{"video": "v"}')]
    whole = tar_of(rows)
    source = source_of(written(tmp_path, whole[: whole.index(b"b.json")]), columns={"group": "video"})
    assert [(ref.id, ref.group) for ref in source.references()] == [("a", "v")]
    assert any(
        f"samples cut off before their columns, left out: 1, e.g. {tmp_path}" in told for told in source.remarks()
    )


@pytest.mark.parametrize("size", [8 << 30, (1 << 63) - 1, 1 << 80])
def test_a_member_that_claims_more_than_there_is_is_truncated(tmp_path: Path, size: int) -> None:
    large = header("z.jpg", 0)
    large = signed(large[:124] + b"\x80" + size.to_bytes(11) + large[136:])
    content = tar_of(pairs(2)).rstrip(b"\0")
    content += bytes(-len(content) % 512) + large + b"rest"
    source = source_of(written(tmp_path, content))
    references = list(source.references())
    assert references[-1].offset + references[-1].length == len(content)
    assert values_of(source, references) == expected(2) | {"z": {"image": "truncated", "caption": "truncated"}}
    assert f"{size} bytes are named, 4 are there" in source.remarks()[0]


LINKS = [
    (b"2", "a symbolic link"),
    (b"1", "a hard link"),
    (b"3", "a device"),
    (b"4", "a device"),
    (b"6", "a pipe"),
    (b"V", "a member of type 'V'"),
]


@pytest.mark.parametrize(("kind", "called"), LINKS)
def test_what_is_no_file_is_no_value_and_is_not_followed(tmp_path: Path, kind: bytes, called: str) -> None:
    # Some tars give a link the size of what it leads to, or a folder that of its files: no data follows.
    size = 0 if kind == b"V" else 9999
    content = header("a.jpg", size, type=kind, linkname="/etc/passwd") + header("folder", 9999, type=b"5")
    content += tar_of([("a.txt", b"a"), *pairs(1)])
    source = source_of(written(tmp_path, content))
    (first, _) = source.samples(list(source.references()))
    assert values_of(source) == {"a": {"image": "no_file", "caption": b"a"}} | expected(1)
    with pytest.raises(DecodeError, match=rf"^no_file: 000\.tar/a\.jpg is {called}, which is not followed"):
        first.values["image"].fetch()  # type: ignore[union-attr]


def test_names_lead_nowhere(tmp_path: Path) -> None:
    contents = [
        ("../../up.jpg", b"1"),
        ("/etc/abs.jpg", b"2"),
        ("a/../b.jpg", b"3"),
        ("./here.jpg", b"4"),
        ("C:\\d.jpg", b"5"),
    ]
    found = values_of(source_of(written(tmp_path, tar_of(contents))))
    assert {key: each["image"] for key, each in found.items()} == {
        name.removesuffix(".jpg"): raw for name, raw in contents
    }
    assert {path.name for path in tmp_path.iterdir()} == {"000.tar"}


def test_two_members_of_one_name_are_rejected_and_the_rest_comes_in(tmp_path: Path) -> None:
    contents = [("a.jpg", b"1"), ("a.txt", b"t"), ("a.JPG", b"2"), ("a.cls", b"1"), ("a.cls", b"2"), *pairs(1)]
    source = source_of(written(tmp_path, tar_of(contents)))
    assert values_of(source) == {"a": {"image": "ambiguous", "caption": b"t"}} | expected(1)


def test_members_that_belong_to_no_sample_are_told(tmp_path: Path) -> None:
    contents = [("README", b"x"), ("__meta__/a.jpg", b"x"), ("a.jpg", b"1"), (".hidden", b"x"), ("a.txt", b"t")]
    content = header("folder.d", type=b"5") + tar_of(contents)
    source = source_of(written(tmp_path, content))
    assert values_of(source) == {"a": {"image": b"1", "caption": b"t"}}
    assert source.remarks() == [f"members without an extension, left out: 2, e.g. {tmp_path}/000.tar: 'README'"]


def test_an_empty_tar_has_no_samples(tmp_path: Path) -> None:
    source = source_of(written(tmp_path, tar_of([])))
    assert list(source.references()) == []
    assert source.remarks() == []


@pytest.mark.parametrize("other", [False, True])
def test_a_key_that_comes_again_is_told_with_both_places(tmp_path: Path, other: bool) -> None:
    first = written(tmp_path, tar_of(pairs(3) + ([] if other else pairs(1))))
    second = written(tmp_path, tar_of(pairs(1)), "001.tar") if other else first
    told = rf"id '0000' stands twice: {first}, byte 0 and {second}, byte {0 if other else 3 * 2560}; ids"
    with pytest.raises(InputError, match=told):
        scan(source_of(f"{tmp_path}/*.tar"), Known(Snapshot(Storage.of("/nowhere"), [], -1), "tars"))


def edited(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


GOOD = tar_of(pairs(3))
DAMAGED: dict[str, tuple[bytes, str]] = {
    "garbage": (b"no tar at all " * 100, r"000\.tar is no tar; correct corpus\.source\.path"),
    "gzip": (
        b"\x1f\x8b\x08\0" + bytes(range(1, 250)) * 4,
        r"compressed with gzip: .*unpack it \(gunzip 000\.tar\) and name the",
    ),
    "a wrong checksum": (
        edited(GOOD, 2560, b"X"),
        r"000\.tar, byte 2560: a wrong checksum in a header; the tar is damaged",
    ),
    "a negative size": (
        edited(GOOD, 2560, signed(edited(header("a.jpg"), 124, b"\xff" * 12))),
        r"byte 2560: the size b'\\xff.* in a header",
    ),
    "a size that is none": (
        edited(GOOD, 2560, signed(edited(header("a.jpg"), 124, b"-0000000001\0"))),
        r"byte 2560: the size b'-0000000001.* in a header",
    ),
    "tars joined": (GOOD + GOOD, r"members stand behind its end mark at byte \d+, where tars were joined with `cat`"),
    "a long name of 1 GiB": (
        header("L", 1 << 30, type=b"L") + GOOD,
        r"an extended header of 1073741824 bytes \(at most",
    ),
    "a name of 5000": (
        tar_of([("x" * 5000 + ".jpg", b"x")], tarfile.PAX_FORMAT),
        r"a name of 5004 characters \(at most 4096",
    ),
    "no PAX records": (
        header("x", 9, type=b"x") + b"99 path=a".ljust(512, b"\0") + GOOD,
        r"an extended header that is none",
    ),
    "a path for all": (header("g", 9, type=b"g") + b"9 path=a\n".ljust(512, b"\0") + GOOD, r"one path for all members"),
    "a PAX size below 0": (
        header("x", 10, type=b"x") + b"10 size=-1\n".ljust(512, b"\0") + GOOD,
        r"extended header that is|no num",
    ),
    "holes": (header("a.jpg", 0, type=b"S") + GOOD, r"'a\.jpg' is stored with holes; make it again without --sparse"),
    "PAX holes": (
        header("x", 22, type=b"x") + b"22 GNU.sparse.major=1\n".ljust(512, b"\0") + GOOD,
        r"the next member is stored with holes",
    ),
    "an id that is no UTF-8": (header("\udcff.jpg", 0) + GOOD, r"id '\\udcff' is not valid UTF-8"),
    "an id that is long": (tar_of([("x" * 2000 + ".jpg", b"x")], tarfile.PAX_FORMAT), r"has 2000 bytes; at most 1024"),
    "json that is none": (
        tar_of([("a.json", b"{")]),
        r"byte 0, 'a\.json': no JSON object of columns: .*; correct it, or take",
    ),
    "json that is a list": (
        tar_of([("a.json", b"[1]")]),
        r"'a\.json': no JSON object of columns: '\[1\]' is no object",
    ),
    "json that is deep": (tar_of([("a.json", b"[" * 99999)]), r"'a\.json': no JSON object of columns: "),
    "json twice": (
        tar_of([("a.json", b"{}"), ("a.json", b"{}")]),
        r"'a\.json': no JSON object of columns: it stands twice",
    ),
    "json that is a link": (
        header("a.json", type=b"2", linkname="/etc/x"),
        r"no JSON object of columns: it is a symbolic link",
    ),
}


@pytest.mark.parametrize("which", DAMAGED)
def test_a_damaged_tar_is_told_by_its_place(tmp_path: Path, which: str) -> None:
    content, told = DAMAGED[which]
    path = written(tmp_path, content)
    with pytest.raises(InputError, match=told) as caught:
        list(source_of(path).references())
    assert str(path) in str(caught.value)


def test_a_chain_of_extended_headers_is_followed_without_recursion(tmp_path: Path) -> None:
    record = b"9 path=b\n".ljust(512, b"\0")
    content = (header("x", 9, type=b"x") + record) * 5000 + header("a.jpg", 1) + b"1".ljust(512, b"\0") + bytes(1024)
    source = source_of(written(tmp_path, content))
    assert list(source.references()) == []
    assert source.remarks() == [f"members without an extension, left out: 1, e.g. {tmp_path}/000.tar: 'b'"]


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("{folder}/none.tar", r"tar .*/none\.tar is not there; correct corpus\.source\.path"),
        ("{folder}", r"tar .* cannot be read: no file but a directory"),
        ("{folder}/*.tar", r"names no file"),
        ("ftp://host/x.tar", r"addresses of this kind are not read"),
    ],
)
def test_a_tar_that_is_not_there_is_told(tmp_path: Path, path: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        list(source_of(path.format(folder=tmp_path)).references())


# Fuzz

FUZZED = tar_of(
    [
        *pairs(5, 600),
        *[(f"j{n}.{ext}", raw) for n in range(3) for ext, raw in (("jpg", b"j" * 40), ("json", b'{"a": 1}'))],
    ]
)
FUZZED_IDS = [*expected(5), "j0", "j1", "j2"]
OPENED: list[str] | None = None


def _listen(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and OPENED is not None:
        OPENED.append(str(args[0]))


sys.addaudithook(_listen)


def mutated(chance: random.Random) -> tuple[bytes, bool]:
    """A tar with something changed; and whether its checksums were mended, so that a header may say anything."""
    content, at = bytearray(FUZZED), chance.randrange(len(FUZZED))
    kind = chance.choice(("flip", "cut", "zero", "insert", "delete", "forge", "forge", "overwrite"))
    if kind == "flip":
        content[at] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del content[at:]
    elif kind == "zero":
        content[at : at + 512] = bytes(len(content[at : at + 512]))
    elif kind == "insert":
        content[at:at] = chance.randbytes(chance.randrange(1, 512))
    elif kind == "delete":
        del content[at : at + chance.randrange(1, 512)]
    elif kind == "overwrite":
        content[at : at + 64] = chance.randbytes(len(content[at : at + 64]))
    else:
        for _ in range(chance.randrange(1, 4)):
            start = chance.randrange(len(content) // 512) * 512
            block = bytes(content[start : start + 512])
            first, last = chance.choice(
                ((0, 100), (124, 136), (124, 136), (156, 157), (156, 157), (257, 265), (345, 500))
            )
            new = chance.choice(
                (chance.randbytes(last - first), b"7" * (last - first), bytes([chance.choice(b"0123456LKxgXSVM")]))
            )
            content[start : start + 512] = signed(
                (block[:first] + new[: last - first] + block[first + len(new) :])[:512]
            )
    return bytes(content), kind in ("forge", "overwrite")


def try_mutated(folder: Path, seed: int) -> str:
    """What became of a mutated tar, once all that must hold of any was found to hold."""
    global OPENED
    content, free = mutated(random.Random(seed))
    path, OPENED = written(folder, content), []
    source, refused = source_of(path), ""
    try:
        references = list(source.references())
        found = values_of(source, references)
    except InputError as error:
        refused = str(error)
    finally:
        opened, OPENED = OPENED, None
    assert {each for each in opened if each.startswith(("/etc", "/root", str(folder.parent)))} == {str(path)}, seed
    if refused:
        assert str(path) in refused, (seed, refused)
        return "refused"
    for sample in source.samples(references):
        for value in sample.values.values():
            if isinstance(value, Part):
                assert 0 <= value.offset <= value.offset + value.size <= len(content), seed
    for reference in references:
        assert 0 <= reference.offset < reference.offset + reference.length <= len(content), seed
    if not free:
        # All ids, or the first of them and a word about the rest.
        assert list(found) == FUZZED_IDS[: len(found)], seed
        assert len(found) == len(FUZZED_IDS) or source.remarks(), seed
    return "told" if source.remarks() else "whole"


def test_mutated_tars_crash_nothing_and_lose_nothing_in_silence(tmp_path: Path) -> None:
    assert {try_mutated(tmp_path, seed) for seed in range(300)} == {"refused", "told", "whole"}


@pytest.mark.slow
def test_ten_thousand_mutated_tars(tmp_path: Path) -> None:
    outcomes = [try_mutated(tmp_path, seed) for seed in range(300, 10_300)]
    assert min(outcomes.count(each) for each in ("refused", "told", "whole")) > 300
