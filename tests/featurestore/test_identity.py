import hashlib
import io
import struct
import tarfile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_iterator

from featurestore.errors import InputError
from featurestore.identity import (
    DIGEST_BYTES,
    MAX_ID_BYTES,
    IngestDigest,
    check_id,
    digest_of,
    from_tar_key,
    hash64,
    ids_sha256,
    input_digest,
    row_digest,
    tar_key,
)

# Ids are texts that UTF-8 can hold: no lone surrogates.
IDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=24)
KEYS = st.text("ab_./%\\\x00\x1f\x7f\x85é字 ", min_size=1, max_size=12)


@given(KEYS | IDS)
@example("a/..")
@example("../../etc/passwd")
@example("/")
@example("//")
@example(".")
@example("%2E")
@example("clip_00.37")
@example("a.b/")
def test_an_id_is_restored_from_its_tar_key(sample_id: str) -> None:
    assert from_tar_key(tar_key(sample_id)) == sample_id


@given(KEYS | IDS)
def test_a_tar_key_is_one_that_webdataset_and_tar_read_as_it_stands(sample_id: str) -> None:
    key = tar_key(sample_id)
    parts = key.split("/")
    assert "." not in parts[-1]
    assert all(part not in ("", ".", "..") for part in parts)
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in key)
    assert "\\" not in key


@given(st.lists(KEYS | IDS, unique=True, min_size=1, max_size=4))
@example(["__a__/b", "__a__", "a.b/", "a.c/"])
@example(["clip_00.37", "clip_00.42", "Case", "case"])
@settings(deadline=None)
def test_webdataset_reads_each_sample_by_itself_and_gives_its_key_back(ids: list[str]) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number, sample_id in enumerate(ids):
            for field in ("image", "caption"):
                info = tarfile.TarInfo(f"{tar_key(sample_id)}.{field}.txt")
                info.size = 1
                tar.addfile(info, io.BytesIO(bytes([number])))
    out.seek(0)
    samples = list(group_by_keys({"__url__": "x", **each} for each in tar_file_iterator(out)))
    assert [from_tar_key(each["__key__"]) for each in samples] == ids
    assert [(each["image.txt"], each["caption.txt"]) for each in samples] == [
        (bytes([number]), bytes([number])) for number in range(len(ids))
    ]


@given(st.lists(KEYS | IDS, unique=True, max_size=8))
def test_different_ids_have_different_tar_keys(ids: list[str]) -> None:
    assert len({tar_key(each) for each in ids}) == len(ids)


@pytest.mark.parametrize(
    ("sample_id", "key"),
    [
        ("birds/owl", "birds/owl"),
        ("clip_00.37", "clip_00%2E37"),
        ("v1.5/owl", "v1.5/owl"),
        ("100%/50%25", "100%25/50%2525"),
        ("tab\there", "tab%09here"),
        ("é\x85", "é%C2%85"),
        ("/a//b/", "%2Fa/%2Fb%2F"),
        ("../a", "%2E%2E/a"),
        ("a.b/", "a%2Eb%2F"),
        ("__a__/b", "%5F_a__/b"),
        ("__a/b__", "__a/b__"),
    ],
)
def test_tar_keys_stay_what_they_were(sample_id: str, key: str) -> None:
    """Stores hold them: a change here makes every tar unreadable."""
    assert tar_key(sample_id) == key


@given(st.lists(IDS, max_size=6), st.lists(IDS, max_size=6))
def test_equal_digests_mean_equal_ids_in_equal_order(first: list[str], second: list[str]) -> None:
    assert (ids_sha256(first) == ids_sha256(second)) == (first == second)


def test_the_ids_digest_is_over_lengths_and_utf8_bytes() -> None:
    expected = hashlib.sha256(struct.pack("<I", 2) + "é".encode() + struct.pack("<I", 1) + b"b").hexdigest()
    assert ids_sha256(["é", "b"]) == expected
    assert ids_sha256(["ab", "c"]) != ids_sha256(["a", "bc"])


@pytest.mark.parametrize(
    ("raw", "digest"),
    [(b"", "af1349b9f5f9a1a6"), (bytes(number % 251 for number in range(102400)), "bc3e3d41a1146b06")],
)
def test_an_input_digest_is_the_first_bytes_of_the_blake3(raw: bytes, digest: str) -> None:
    """Stores hold them. The values are those of BLAKE3's own test vectors, for 0 and 102,400 bytes."""
    assert input_digest(raw).hex() == digest


def test_a_row_digest_changes_with_the_id_the_value_and_the_vector() -> None:
    value = input_digest(b"raw")
    digests = {
        row_digest("a", value, b"1234"),
        row_digest("b", value, b"1234"),
        row_digest("a", input_digest(b"other"), b"1234"),
        row_digest("a", value, b"1235"),
        row_digest("a", None, b"1234"),
    }
    assert len(digests) == 5
    assert {len(digest) for digest in digests} == {DIGEST_BYTES}


def test_hashes_are_the_same_on_every_machine() -> None:
    assert hash64("birds/owl") == 0x6D27C942DB4723BA
    assert digest_of("image", {"b": 1, "a": [None, 2.5]}) == digest_of("image", {"a": [None, 2.5], "b": 1})
    assert digest_of("a", "b") != digest_of("ab")
    assert len(digest_of()) == 16


@given(st.lists(st.tuples(IDS, IDS), unique_by=lambda pair: pair[0], max_size=8), st.randoms(use_true_random=False))
def test_an_ingest_is_known_by_its_samples_in_any_order(samples: list[tuple[str, str]], random) -> None:
    shuffled = random.sample(samples, len(samples))
    assert ingest(samples).key() == ingest(shuffled).key()
    assert len(ingest(samples).key()) == 12
    if samples:
        (sample_id, etag), *rest = samples
        assert ingest([(sample_id, etag + "x"), *rest]).key() != ingest(samples).key()
        assert ingest(rest).key() != ingest(samples).key()


def ingest(samples: list[tuple[str, str]]) -> IngestDigest:
    digest = IngestDigest()
    for sample_id, etag in samples:
        digest.add(sample_id, etag)
    assert digest.count == len(samples)
    return digest


def test_the_border_between_id_and_etag_counts() -> None:
    assert ingest([("ab", "c")]).key() != ingest([("a", "bc")]).key()


@pytest.mark.parametrize("bad", [None, 7.0, True, "", b"a", ["a"]])
def test_an_id_that_is_no_text_is_refused_with_its_place(bad: object) -> None:
    with pytest.raises(InputError, match=r"m\.jsonl, line 3: id .* is not a non-empty text"):
        check_id(bad, "m.jsonl, line 3")


def test_a_whole_number_is_an_id_as_its_digits() -> None:
    assert [check_id(each, "here") for each in (7, 0, -3, 10**30)] == ["7", "0", "-3", "1" + "0" * 30]


def test_an_id_that_is_too_long_or_no_utf8_is_refused() -> None:
    assert check_id("é" * (MAX_ID_BYTES // 2), "here") == "é" * (MAX_ID_BYTES // 2)
    with pytest.raises(InputError, match=f"has {MAX_ID_BYTES + 1} bytes; at most {MAX_ID_BYTES}"):
        check_id("a" * (MAX_ID_BYTES + 1), "here")
    with pytest.raises(InputError, match="not valid UTF-8"):
        check_id("a\udce9", "here")
