"""A receipt is there while a shard is worked on, and after an attempt that was cut off; never else."""

from pathlib import Path

import pytest

from featurestore.errors import BraidError
from featurestore.storage import Storage
from pipelines.attempts import attempt

RECEIPT = "attempts/encode/image/0123/shard-0"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.of(tmp_path / "store")


def test_a_first_attempt_is_none_again_and_leaves_nothing(storage: Storage) -> None:
    for _ in range(2):
        with attempt(storage, RECEIPT) as again:
            assert not again
            assert storage.list("attempts") == {RECEIPT: 0}
        assert storage.list() == {}


@pytest.mark.parametrize("error", [BraidError("no such value"), KeyboardInterrupt()])
def test_an_error_that_is_told_is_no_reason_for_care(storage: Storage, error: BaseException) -> None:
    with pytest.raises(type(error)), attempt(storage, RECEIPT):
        raise error
    with attempt(storage, RECEIPT) as again:
        assert not again


def test_one_that_ran_out_of_memory_or_was_killed_is(storage: Storage) -> None:
    with pytest.raises(MemoryError), attempt(storage, RECEIPT):
        raise MemoryError
    with attempt(storage, RECEIPT) as again:
        assert again
    assert storage.list() == {}


def test_each_that_was_cut_off_counts_up_to_two(storage: Storage) -> None:
    found = []

    def end() -> None:
        with attempt(storage, RECEIPT) as cut:
            found.append(cut)
            raise MemoryError

    for _ in range(4):
        with pytest.raises(MemoryError):
            end()
    assert found == [0, 1, 2, 2]
    with attempt(storage, RECEIPT) as cut:
        assert cut == 2
    assert storage.list() == {}


def test_two_attempts_at_once_end_both(storage: Storage) -> None:
    with attempt(storage, RECEIPT), attempt(storage, RECEIPT) as again:
        assert again
    assert storage.list() == {}


def test_the_error_is_told_where_the_receipt_cannot_be_removed(storage: Storage) -> None:
    def spoil() -> None:
        Path(storage.root, RECEIPT).unlink()
        Path(storage.root, RECEIPT).mkdir()
        raise ValueError("the cause")

    with pytest.raises(ValueError, match="the cause"), attempt(storage, RECEIPT):
        spoil()
