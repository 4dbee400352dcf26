"""Whole runs through an endpoint: what is asked, what is kept, what is rejected, and that the key is left nowhere."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featurestore.errors import InputError
from featurestore.storage import Storage
from featurestore.store import FeatureStore
from featurestore.verify import verify
from jobs.report import rejected
from tests.embeddings_server import EmbeddingsServer, Reply, serving, vector_of
from tests.processes import Said, braid

KEY = "sk-this-is-the-secret-4711"
ROWS = 32
TITLES = {f"s{number:02d}": f"title {number} of a bird" for number in range(ROWS)} | {"s05": "BAD", "s11": "ZERO"}


@pytest.fixture
def server() -> Iterator[EmbeddingsServer]:
    with serving(dim=8) as each:
        each.behave = lambda _, body: answer(each, body)
        yield each


def answer(server: EmbeddingsServer, body: dict[str, Any]) -> Reply:
    """One text is refused, one has no direction, vectors come in any order, and the key is repeated."""
    if server.headers[-1].get("Authorization") != f"Bearer {KEY}":
        return Reply(401, {"error": {"message": f"not {server.headers[-1].get('Authorization')}"}})
    if "BAD" in body["input"]:
        return Reply(400, {"error": {"message": f"a bad word, of the owner of {KEY}"}})
    data = server.embeddings(body)["data"][::-1]
    for each in data:
        if body["input"][each["index"]] == "ZERO":
            each["embedding"] = [0.0] * 8
    return Reply(body={"data": data, "usage": {"total_tokens": len(data)}})


def write_spec(folder: Path, server: EmbeddingsServer, shard_rows: int = 8, **more: Any) -> Path:
    rows = [{"id": name, "title": title, "body": f"{name} says {title}"} for name, title in TITLES.items()]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"endpoint": server.endpoint, "model": "m", "dim": 8, "batch_size": 4, "key_env": "MY_KEY", **more}
    fields = {name: {"modality": "text", "from": name} for name in ("title", "body")}
    spec = {
        "version": 1,
        "store": {"uri": str(folder / "store")},
        "corpus": {
            "name": "texts",
            "source": {"type": "manifest", "path": str(folder / "texts.jsonl")},
            "columns": {"id": "id"},
            "fields": fields,
            "shard_rows": shard_rows,
            "failure_budget": 0.1,
        },
        "views": {name: {"field": name, "encoder": "remote", "options": options} for name in fields},
        "spaces": {"said": {"views": ["title", "body"], "method": "cca", "dim": 8}},
        "indexes": {"texts": {"space": "said", "views": ["title"]}},
    }
    (folder / "spec.yaml").write_text(json.dumps(spec))
    return folder / "spec.yaml"


def call(*args: str | Path, key: str = KEY, **env: str) -> Said:
    return braid(*args, env={"MY_KEY": key, "NO_PROXY": "127.0.0.1", **env})


def test_a_run_a_plan_and_a_search(server: EmbeddingsServer, tmp_path: Path) -> None:
    spec, store = write_spec(tmp_path, server), tmp_path / "store"
    ran = call("run", spec, "--log-json", "--metrics", tmp_path / "metrics.json")
    assert ran.status == 0, ran.err
    table = FeatureStore(store).view("title").to_arrow()
    for row in table.to_pylist():
        if row["id"] in ("s05", "s11"):
            assert (row["embedding"], row["miss_reason"]) == (None, {"s05": "refused", "s11": "zero_output"}[row["id"]])
        else:
            vector = vector_of(TITLES[row["id"]], 8)
            np.testing.assert_allclose(row["embedding"], vector / np.linalg.norm(vector), atol=1e-6)
    told = {each["id"]: each["reason"] for each in rejected(FeatureStore(store), "texts") if each["field"] == "title"}
    assert told == {"s05": "refused", "s11": "zero_output"}
    # Of the refused one's batch: four, two halves, two values.
    sizes = [len(body["input"]) for body in server.asked if "BAD" in body["input"]]
    assert sizes == [4, 2, 1]

    asked = len(server.asked)
    planned = call("plan", spec)
    assert planned.status == 0
    assert "stale" not in planned.out
    assert len(server.asked) == asked

    with pytest.raises(InputError, match=f"was made through '{server.endpoint}': put that into .* BRAID_ENDPOINTS"):
        FeatureStore(store).search("texts", text=TITLES["s20"], via="title")
    assert len(server.asked) == asked
    query = ("search", store, "texts", "--text", TITLES["s20"], "--via", "title", "-k", "1")
    found = call(*query, BRAID_ENDPOINTS=server.endpoint)
    assert found.status == 0, found.err
    assert "s20" in found.out
    assert len(server.asked) == asked + 1

    assert verify(Storage.of(store)).ok
    said = [text for each in (ran, planned, found) for text in (each.out, each.err)]
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not any(KEY in text for text in said)
    assert not any(KEY.encode() in content for content in files)


def test_a_wrong_key_ends_a_run_at_once_and_is_not_repeated(server: EmbeddingsServer, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, server, shard_rows=ROWS, batch_size=1, concurrency=1)
    said = call("run", spec, key="sk-another-secret-key-0815")
    assert said.status == 2
    assert "401 not Bearer …; the key sent was the one in environment variable MY_KEY" in said.err
    assert "sk-another" not in said.out + said.err
    assert len(server.asked) < ROWS / 2, "what waits of a shard that failed is not sent"


def test_past_its_budget_a_run_ends_and_the_next_one_goes_on(server: EmbeddingsServer, tmp_path: Path) -> None:
    first = call("run", write_spec(tmp_path, server, concurrency=1, max_tokens_total=20))
    assert first.status == 1
    assert "tokens are spent, option 'max_tokens_total' allows 20 a process; nothing is lost" in first.err
    before = [text for body in server.asked for text in body["input"]]
    assert len(before) < 2 * ROWS
    second = call("encode", write_spec(tmp_path, server))
    assert second.status == 0, second.err
    again = [text for body in server.asked for text in body["input"]][len(before) :]
    assert len(set(before) - set(again)) >= 8, "what was done is not asked for again"
    assert FeatureStore(tmp_path / "store").view("title").rows == ROWS
