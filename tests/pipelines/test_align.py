"""What a space's card says of the search that its recall was measured by."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from featurestore import indexes
from jobs.run import Runner
from jobs.spec import load
from tests.conftest import Made


def test_the_card_names_the_index_that_recall_was_measured_through(
    small: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = small.open().card("space", "heard")
    assert card["recall_index"] == "Flat"
    for figures in card["recall"].values():
        assert figures["recall@10"] == pytest.approx(figures["exact@10"], abs=0.01), "exact search, by another name"

    built, build = set(), indexes.build

    def noted(vectors: Any, factory: str, seed: int) -> Any:
        built.add(factory)
        return build(vectors, factory, seed)

    # As where there are more pairs than an exact scan is quick for.
    monkeypatch.setattr(indexes, "FLAT_BYTES", 0)
    monkeypatch.setattr(indexes, "build", noted)
    copy = small.copy_to(tmp_path)
    copy.spec.write_text(copy.spec.read_text().replace("dim: 8", "dim: 7"))
    Runner(load(copy.spec), Console(quiet=True)).run(("align",), "heard")
    assert built == {"HNSW32,Flat"}
    assert copy.open().card("space", "heard")["recall_index"] == "HNSW32,Flat"
