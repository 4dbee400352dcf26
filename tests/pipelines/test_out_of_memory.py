"""A batch that does not fit into memory is halved, and the shard says so: with an encoder whose memory holds two texts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from featurestore import artefact, encoders
from featurestore.encoders.runtime import lacks_memory
from featurestore.store import FeatureStore
from featurestore.verify import verify
from featurestore.views import VIEW
from jobs.compact import compact
from jobs.run import Runner
from jobs.spec import parse
from pipelines.forward import forward

TOO_LONG = "of all that were ever told"


def spec(folder: Path, shard_rows: int = 8) -> Any:
    options = json.dumps({"class": "tests.own_encoder:Hungry", "batch_size": 4})
    short = json.dumps({"most": 2, "too_long": TOO_LONG})
    return parse(
        f"""
version: 1
store: {{uri: {folder}/store}}
corpus:
  name: tales
  source: {{type: manifest, path: {folder}/tales.jsonl}}
  columns: {{id: id}}
  fields: {{text: {{modality: text, from: text}}}}
  shard_rows: {shard_rows}
  failure_budget: 20%
views:
  roomy: {{field: text, encoder: torch, options: {options[:-1]}, "arguments": {{"most": 99}}}}}}
  tight: {{field: text, encoder: torch, options: {options[:-1]}, "arguments": {short}}}}}
""",
        "test",
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    folder = tmp_path_factory.mktemp("memory")
    texts = [f"tale {number} " * (1 + number % 5) for number in range(24)]
    texts[7] = f"the longest {TOO_LONG}"
    rows = [json.dumps({"id": f"t{number:02}", "text": text}) for number, text in enumerate(texts)]
    (folder / "tales.jsonl").write_text("\n".join(rows))
    Runner(spec(folder), Console(quiet=True)).run(("shard", "encode"))
    return FeatureStore(folder / "store")


def halved(store: FeatureStore, view: str) -> list[int]:
    """Of each shard, as its footer and its row of the catalog say."""
    found = []
    for entry in store.snapshot.entries(VIEW, view):
        footer = artefact.read_footer(store.storage.read(entry.path))
        assert entry.info().get("batches_halved") == footer.get("batches_halved")
        found.append(footer.get("batches_halved"))
    return found


def test_batches_are_halved_and_each_shard_says_how_often(store: FeatureStore) -> None:
    counts = halved(store, "tight")
    # Two batches of four a shard; the one with the long text is halved to the end.
    assert sorted(counts) == [2, 2, 3]
    assert halved(store, "roomy") == [None] * 3
    tight, roomy = (store.view(name).to_arrow() for name in ("tight", "roomy"))
    assert tight["id"] == roomy["id"]
    fitting = [row for row in range(24) if tight["present"][row].as_py()]
    assert len(fitting) == 23
    for row in fitting:
        assert tight["embedding"][row] == roomy["embedding"][row]
    assert verify(store.storage).ok


def test_a_value_that_does_not_fit_alone_is_rejected_alone(store: FeatureStore) -> None:
    (rejected,) = store.quarantine("tales").to_pylist()
    assert (rejected["id"], rejected["stage"], rejected["reason"]) == ("t07", "encode", "out_of_memory")
    assert rejected["detail"] == "torch needs more memory than there is for this value alone"


def test_compaction_keeps_the_count(store: FeatureStore) -> None:
    folder = Path(store.storage.root).parent
    compact(spec(folder, shard_rows=32), Console(quiet=True))
    compacted = FeatureStore(store.storage.root)
    assert halved(compacted, "tight") == [7]
    assert halved(compacted, "roomy") == [None]
    assert verify(compacted.storage).ok


def test_what_does_not_fit_is_let_go_of_before_it_is_halved() -> None:
    encoder: Any = encoders.find("torch", {"class": "tests.own_encoder:Hungry", "arguments": {"most": 2}})
    made = forward(encoder, ["a", "b", "c", "d", "e", "f", "g"])
    assert (np.stack(made.vectors)[:, 0] == 1).all()
    assert made.batches_halved == 3
    assert encoder._own.asked == [7, 3, 1, 2, 4, 2, 2]  # and each asserts that the one before holds nothing


def allocated(size: int) -> Exception:
    with pytest.raises(Exception, match="memory") as caught:
        torch.empty(size)
    return caught.value


def test_the_errors_that_say_so() -> None:
    assert lacks_memory(allocated(10**15))
    assert lacks_memory(MemoryError())
    assert lacks_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not lacks_memory(RuntimeError("out of memory, says something else"))
    assert not lacks_memory(ValueError("not enough memory"))
