"""A receipt is there while a shard is worked on, and after an attempt that was cut off; never else."""

from pathlib import Path

import pytest

from featurestore.errors import BraidError
from featurestore.storage import Storage
from pipelines.attempts import Bundle, attempt, within

RECEIPT = "attempts/encode/image/0123/shard-0"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.of(tmp_path / "store")


def test_a_first_attempt_is_none_again_and_leaves_nothing(storage: Storage) -> None:
    for _ in range(2):
        with attempt(storage, RECEIPT) as made:
            assert made.cut == 0
            assert storage.list("attempts") == {RECEIPT: 0}
        assert storage.list() == {}


@pytest.mark.parametrize("error", [BraidError("no such value"), KeyboardInterrupt()])
def test_an_error_that_is_told_is_no_reason_for_care(storage: Storage, error: BaseException) -> None:
    with pytest.raises(type(error)), attempt(storage, RECEIPT):
        raise error
    with attempt(storage, RECEIPT) as made:
        assert made.cut == 0


def test_one_that_ran_out_of_memory_or_was_killed_is(storage: Storage) -> None:
    with pytest.raises(MemoryError), attempt(storage, RECEIPT):
        raise MemoryError
    with attempt(storage, RECEIPT) as made:
        assert made.cut == 1
    assert storage.list() == {}


def test_each_that_was_cut_off_counts_up_to_two(storage: Storage) -> None:
    found = []

    def end() -> None:
        with attempt(storage, RECEIPT) as made:
            found.append(made.cut)
            raise MemoryError

    for _ in range(4):
        with pytest.raises(MemoryError):
            end()
    assert found == [0, 1, 2, 2]
    with attempt(storage, RECEIPT) as made:
        assert made.cut == 2
    assert storage.list() == {}


def test_two_attempts_at_once_end_both(storage: Storage) -> None:
    with attempt(storage, RECEIPT), attempt(storage, RECEIPT) as made:
        assert made.cut == 1
    assert storage.list() == {}


OTHER, LAST = "attempts/encode/image/0123/shard-1", "attempts/encode/image/0123/shard-2"


@pytest.mark.parametrize("found", [True, False])
def test_care_lasts_to_the_end_of_the_bundle_where_a_value_was_found_and_ends_where_none_was(
    storage: Storage, found: bool
) -> None:
    storage.touch(RECEIPT)
    with within(Bundle()):
        with attempt(storage, RECEIPT) as first:
            with attempt(storage, OTHER) as beside:
                assert beside.cut == first.cut == 1
            first.found = found
        with attempt(storage, OTHER) as behind:
            assert behind.cut == (1 if found else 0)
            assert len(storage.list("attempts")) == (2 if found else 1)
    with within(Bundle()), attempt(storage, OTHER) as of_the_next_bundle:
        assert of_the_next_bundle.cut == 0
    assert storage.list() == {}


def test_a_shard_that_was_attempted_with_care_is_one_step_further_in_the_next_attempt(storage: Storage) -> None:
    """Decoding was apart: it was the model that was killed, so that one more attempt would be lost."""
    storage.touch(RECEIPT)

    def end() -> None:
        with within(Bundle()), attempt(storage, RECEIPT), attempt(storage, OTHER):
            raise MemoryError

    with pytest.raises(MemoryError):
        end()
    with attempt(storage, OTHER) as made:
        assert made.cut == 2


def test_care_lasts_while_another_that_was_cut_off_is_not_done(storage: Storage) -> None:
    for receipt in (RECEIPT, OTHER):
        storage.touch(receipt)
    with within(Bundle()):
        with attempt(storage, RECEIPT):
            with attempt(storage, OTHER):
                pass
            with attempt(storage, LAST) as made:
                assert made.cut == 1
        with attempt(storage, LAST) as made:
            assert made.cut == 0


def test_the_error_is_told_where_the_receipt_cannot_be_removed(storage: Storage) -> None:
    def spoil() -> None:
        Path(storage.root, RECEIPT).unlink()
        Path(storage.root, RECEIPT).mkdir()
        raise ValueError("the cause")

    with pytest.raises(ValueError, match="the cause"), attempt(storage, RECEIPT):
        spoil()
