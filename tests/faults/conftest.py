"""One small whole store for all tests of faults; each breaks a copy of its own."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from featurestore.storage import Storage
from tests.faults.stores import (
    VIEWS,
    Broken,
    Truth,
    build_index,
    build_training_set,
    corpus_settings,
    encode_view,
    shard_corpus,
    truth,
)


class Whole(NamedTuple):
    storage: Storage
    truth: Truth


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    storage = Storage.of(folder / "store")
    shard_corpus(storage, corpus_settings(folder / "corpus"))
    for name, encoder in VIEWS.items():
        encode_view(storage, name, encoder)
    return Whole(storage, truth(storage))


@pytest.fixture(scope="session")
def built(whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The same with a space, an index and a training set."""
    storage = Broken(whole.storage, tmp_path_factory.mktemp("built") / "store").storage
    build_index(storage)
    build_training_set(storage)
    return Whole(storage, whole.truth)


@pytest.fixture
def broken(whole: Whole, tmp_path: Path) -> Broken:
    return Broken(whole.storage, tmp_path / "store")


Check = Callable[..., None]


@pytest.fixture
def caught(broken: Broken, whole: Whole) -> Iterator[Check]:
    """Asserts that verify names the fault; and at the test's end that no reader returns a row that is not its sample's."""
    from featurestore.verify import verify
    from tests.faults.stores import misreadings

    def check(kind: str, shard: str, *rows: int, problem: str = "", level: str = "bytes") -> None:
        findings = verify(broken.storage, level=level).findings
        shown = "\n".join(map(str, findings))
        there = [each for each in findings if (each.kind, each.shard) == (kind, shard) and problem in each.problem]
        assert there, f"nothing said of {kind} {shard}: {problem!r} in\n{shown}"
        assert set(rows) <= {each.row for each in there}, f"rows {rows} are not named in\n{shown}"

    yield check
    assert not misreadings(broken.storage, whole.truth)
