"""Passwords in addresses: who sees them, and that nothing of Braid's shows one."""

import json
import logging
import pickle
from pathlib import Path

import pytest
from pydantic import ValidationError

from featurestore import encoders, files
from featurestore.addresses import has_credentials, redacted
from featurestore.encoders import checkpoints
from featurestore.errors import BraidError, DecodeError, InputError, NotFound
from featurestore.storage import Storage
from pipelines import log


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("s3://key:secret@bucket/a", "s3://***@bucket/a"),
        ("s3://AKIA0:se/cr+et@bucket/a", "s3://***@bucket/a"),
        ("s3://AKIA0:80cret@bucket", "s3://***@bucket"),
        ("https://me@host/a", "https://***@host/a"),
        ("https://:secret@host/a", "https://***@host/a"),
        ("https://me:a?b#c@host/a", "https://***@host/a"),
    ],
)
def test_an_address_is_told_of_without_its_credentials(address: str, told: str) -> None:
    assert has_credentials(address)
    assert redacted(address) == told
    assert redacted(f"{address!r}: no such object ({address})") == f"{told!r}: no such object ({told})"
    assert redacted(told) == told


@pytest.mark.parametrize(
    "address",
    [
        "s3://bucket/a@2x.png", "https://host:8080/a@2x.png", "https://host:8080", "https://[::1]:80/a@b", "gs://b/x:y@z",
        "me:secret@host", "file:///home/a:b@c", "https://host/?of=a:b@c", "a@b, https://host and me@host", "s3://b a:b@c",
    ],
)  # fmt: skip
def test_what_has_no_credentials_stays_as_it_is(address: str) -> None:
    assert not has_credentials(address)
    assert redacted(address) == address


def test_no_error_tells_a_password_nor_does_one_that_came_from_a_worker() -> None:
    for error in (InputError("s3://k:secret@b: gone"), NotFound("x", "s3://k:secret@b"), BraidError()):
        assert "secret" not in str(pickle.loads(pickle.dumps(error)))
    value = pickle.loads(pickle.dumps(DecodeError("unreadable", "https://k:secret@h/x: no")))
    assert (value.reason, value.detail) == ("unreadable", "https://***@h/x: no")


def test_no_log_tells_a_password(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "braid"):
        log.event("shard x", "source read", detail=ValueError("https://k:secret@h/x: no"))
    assert caplog.messages == ["shard x: source read: https://***@h/x: no"]


@pytest.mark.parametrize("name", ["uri", "media_root", "endpoint"])
def test_no_store_is_reached_with_a_password_nor_is_it_told(name: str) -> None:
    given = {"uri": "s3://b", name: "https://k:secret@h" if name == "endpoint" else "s3://k:secret@b"}
    with pytest.raises(ValidationError) as raw:
        Storage(**given)
    with pytest.raises(InputError) as raised:
        Storage.from_json(json.dumps(given))
    assert "***@" in str(raised.value)
    assert "secret" not in f"{raw.value}{raised.value}"


def test_no_file_and_no_checkpoint_is_read_with_a_password() -> None:
    with pytest.raises(
        ValueError, match=r"^the address holds a name or a password; leave out all before the @: credentials c"
    ):
        files.filesystem("https://k:secret@127.0.0.1:9/x")
    with pytest.raises(InputError, match=r"^checkpoint s3://\*\*\*@b/m: the address holds a name or a password"):
        checkpoints.file_of("s3://k:secret@b/m")


def test_no_option_of_an_encoder_is_told_with_a_part_of_a_password() -> None:
    """One that is longer than what is told of a value."""
    with pytest.raises(InputError, match=r"option 'url' = 's3://\*\*\*@b' does not exist"):
        encoders.find("log-mel", {"url": f"s3://k:{'secret' * 20}@b"})


def test_a_store_in_a_folder_may_be_called_anything(tmp_path: Path) -> None:
    assert Storage.of(tmp_path / "a:b@c").uri == str(tmp_path / "a:b@c")
