"""Stage 4: learn a joint space for two views from the samples that have both.

One element is one space: its pairs are few enough to be read by one worker (a fixed sample of `MAX_PAIRS` where there are
more). The card says what held-out groups gave, by the protocol of `featurestore.recall`; the projections that are stored are
then learned from all pairs. Recall is measured through an index of the kind that so many vectors are served by, untuned; the
card names it. Where that is Flat, the search is exact, and `exact@10` beside it is the same figure but for ties.
"""

from functools import partial
from typing import Any

import numpy as np

from featurestore import builds, indexes, recall, spaces
from featurestore.catalog import Catalog, Snapshot
from featurestore.errors import InputError
from featurestore.heads import one_thread
from featurestore.identity import hash64
from featurestore.storage import Storage
from featurestore.views import whole
from pipelines.publish import card_bytes, place_build
from pipelines.runner import Result

RECALL = 0.95
"""What an index is made for where a spec says nothing."""
MAX_PAIRS = 100_000
FEW_PAIRS = 300
"""Below this many pairs a test part is so small that 10 splits are measured instead of 5."""


def pairs(snapshot: Snapshot, views: list[str], equal: str | None) -> recall.Pairs:
    """The samples that have both views; those with equal bytes of the field `equal` are as good an answer as each other."""
    first, second = whole(snapshot, views).values()
    (x, has_x), (y, has_y) = first.matrix(), second.matrix()
    rows = np.flatnonzero(has_x & has_y)
    table = first.corpus.to_arrow()
    ids = table["id"].to_pylist()
    if len(rows) > MAX_PAIRS:
        order = sorted(rows, key=lambda row: hash64(ids[row]))
        rows = np.sort(np.array(order[:MAX_PAIRS]))
    if len(rows) < 20:
        raise InputError(
            f"views {views[0]!r} and {views[1]!r} share {len(rows)} samples; a space needs at least 20, and some hundreds to "
            "be of use"
        )
    keys = ids if equal is None else _keys(ids, table[equal].to_pylist())
    groups = table["group"].to_pylist()
    return recall.Pairs(x[rows], y[rows], [groups[row] for row in rows], [keys[row] for row in rows])


def _keys(ids: list[str], members: list[dict[str, Any]]) -> list[Any]:
    return [member["digest"] or sample_id for sample_id, member in zip(ids, members, strict=True)]


def make(storage: Storage, build: builds.Build, version: int) -> Result:
    """Evaluates, learns and places one space."""
    views, method, dim = tuple(build.settings["views"]), build.settings["method"], build.settings["dim"]
    equal = build.settings["equal"]
    found = pairs(Catalog(storage).snapshot(version), build.settings["views"], equal)

    def learn(held_in: recall.Pairs) -> tuple[recall.Projects, recall.Projects]:
        learned = spaces.learn(build.name, held_in, views, method, dim)
        return learned.projections[views[0]], learned.projections[views[1]]

    n_splits = 10 if len(found.keys) < FEW_PAIRS else 5
    with one_thread():
        space = spaces.learn(build.name, found, views, method, dim)
        factory = indexes.choose_factory(len(found.keys), space.dim, RECALL)
        measured = recall.evaluate(found, learn, views, n_splits, partial(_through, factory))
    card = {
        **build.settings,
        "build": build.key,
        "a hit is": f"the sample itself, or one with an equal {equal}" if equal else "the sample itself",
        "chosen": dict(space.card),
        "recall_index": factory,
        "recall": measured,
    }
    return place_build(storage, build, {"space.safetensors": space.to_bytes(), "card.json": card_bytes(card)})


def _through(factory: str, gallery: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    return indexes.search(indexes.build(gallery, factory, seed=0), queries, k)[1]
