"""Stage 6: assemble a late-fusion training set.

One element is one set. Splits and folds go by group, heads are fitted on the train split alone, and predictions of its rows
are out of fold. The set is published only if its certificate passes; its card holds that and the fusion table.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featurestore import artefact, builds, certificate, fusion, splits, training
from featurestore.catalog import Catalog, Entry
from featurestore.corpora import Corpus
from featurestore.errors import InputError
from featurestore.fusion_table import fusion_table
from featurestore.storage import Storage
from featurestore.views import whole
from pipelines.publish import build_entry, card_bytes
from pipelines.runner import Result, listed_in_file, result

ROWS_PER_FILE = 10_000
TRAIN = "train"


def make(storage: Storage, build: builds.Build, version: int) -> Result:
    """Assembles, certifies and places one training set.

    Raises:
        InputError: no such label column, none with a value in it, or a certificate that fails.
    """
    snapshot, chosen = Catalog(storage).snapshot(version), build.settings
    corpus = Corpus(snapshot, chosen["corpus"])
    views = whole(snapshot, chosen["views"])
    samples = corpus.to_arrow()
    labelled = _labelled(samples, chosen["label"], corpus)
    samples = samples.filter(labelled)
    kept = np.flatnonzero(np.asarray(labelled))
    embeddings = {name: view.matrix()[0][kept] for name, view in views.items()}
    reasons = {
        name: view.to_arrow(["miss_reason"])["miss_reason"].take(pa.array(kept)).to_pylist()
        for name, view in views.items()
    }
    ids, groups = samples["id"].to_pylist(), samples["group"].to_pylist()
    labels = samples[chosen["label"]].cast(pa.string()).to_pylist()
    equal = [pc.struct_field(samples[field], "digest").to_pylist() for field in chosen["group_equal"]]
    kept_together = splits.joined(groups, equal)
    sides = splits.assign(kept_together, chosen["splits"], chosen["seed"]).tolist()
    digests = {name: pc.struct_field(samples[name], "digest") for view in views.values() for name in view.fields}
    found = certificate.certify(ids, kept_together, sides, digests, labels)
    certificate.require(found, f"training set {build.name!r}")

    classes, y = np.unique(np.asarray(labels), return_inverse=True)
    folds = fusion.group_folds(kept_together, np.asarray(sides) == TRAIN, chosen["seed"])
    table = training.training_table(
        {"id": ids, "group": groups, "label": labels, "split": sides, "fold": folds, "weight": _weights(y, folds)},
        embeddings,
        reasons,
        {name: fusion.out_of_fold(x, y, folds, len(classes)).log_probs for name, x in embeddings.items()},
    )
    card = {
        "name": build.name,
        "build": build.key,
        **chosen,
        "classes": classes.tolist(),
        "rows": {side: sides.count(side) for side in chosen["splits"]},
        "without_label": len(labelled) - len(kept),
        "encoders": {name: view.encoder["fingerprint"] for name, view in views.items()},
        "certificate": found,
        "fusion": fusion_table(embeddings, labels, kept_together, chosen["seed"]),
    }
    # A set of a million rows has some 200 files.
    return listed_in_file(storage, result(build.key, _place(storage, build, table, card)), build.stem)


def columns(samples: pa.Table, corpus: Corpus) -> list[str]:
    """Names of a corpus's columns that can be learned; of one that is not stored yet its source's `kept()` tells them."""
    return [name for name in samples.column_names if name not in {"shard", "row", "etag", *corpus.fields}]


def _labelled(samples: pa.Table, label: str, corpus: Corpus) -> pa.ChunkedArray:
    if label not in (there := columns(samples, corpus)):
        raise InputError(f"corpus {corpus.name!r} has no column {label!r} to learn; it has: {', '.join(there)}")
    labelled = pc.is_valid(samples[label])
    if not pc.any(labelled).as_py():
        raise InputError(
            f"corpus {corpus.name!r}: none of its {len(samples)} samples has a value in the label column {label!r}; "
            "fill it in the corpus, or give the training set another label"
        )
    return labelled


def _weights(y: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """float32 [n]: the inverse of a class's share in the train split, mean 1 there; 1 for a class that it lacks."""
    count = np.bincount(y[folds != fusion.NOT_TRAIN], minlength=int(y.max()) + 1)
    weight = np.where(count > 0, count.sum() / np.maximum(count, 1) / np.count_nonzero(count), 1.0)
    return np.asarray(weight[y], np.float32)


def _place(storage: Storage, build: builds.Build, table: pa.Table, card: dict[str, Any]) -> list[Entry]:
    entries = []
    with storage.scratch() as folder:
        for side in build.settings["splits"]:
            rows = table.filter(pc.equal(table["split"], side))
            for number, path in enumerate(training.write_split(rows, folder, side, ROWS_PER_FILE)):
                # A Parquet file and its tar follow each other and hold the same rows.
                count = min(ROWS_PER_FILE, len(rows) - number // 2 * ROWS_PER_FILE)
                placed = artefact.place(storage, path, f"{build.stem}/{Path(path).stem}")
                entries.append(build_entry(build, path.name, placed, count))
    placed = artefact.place_bytes(storage, card_bytes(card), f"{build.stem}/card", ".json")
    return [*entries, build_entry(build, "card", placed)]
