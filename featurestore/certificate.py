"""The leak certificate of a training set: no group crosses a split, no equal bytes do; and how balanced the splits are.

A set whose certificate fails is not committed: `require` raises.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from featurestore.errors import InputError

__all__ = ["certify", "require"]

EXAMPLES = 20
"""Leaks that a certificate spells out for groups and for each field; all of them are counted."""


def certify(
    ids: Sequence[str],
    groups: Sequence[str],
    splits: Sequence[str],
    digests: Mapping[str, Any],
    labels: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Checks that nothing is on two sides of a split, and counts what is on each.

    Args:
        ids: [n] the samples; only named in the examples.
        groups: [n] what must stay together.
        splits: [n] name of each sample's split.
        digests: for each field [n] digests of the raw values (bytes or uint64): an Arrow column with nulls, a masked
            array, or an object array with None, where the value is missing. Missing values equal nothing.
        labels: [n] classes, if their balance is to be counted.

    Returns:
        `passed`; `samples` per split; `shared_groups` and for each field `shared_bytes`, each `{count, examples}`
        with up to 20 examples `{splits, ids}` (a group or a digest counts once, however many samples share it); `labels`
        per split and class; `patterns` per split and presence pattern of the fields of `digests` (`image+sound`, `none`).

    Raises:
        InputError: columns of different lengths, or a sample without a split or group.
    """
    lengths = {"ids": len(ids), "groups": len(groups), "splits": len(splits)}
    lengths |= {f"digests of {field}": len(column) for field, column in digests.items()}
    lengths |= {} if labels is None else {"labels": len(labels)}
    if len(set(lengths.values())) != 1:
        raise InputError(f"columns of different lengths: {lengths}; give one value per sample, in one order")
    split_of, group_of = _required("split", splits, ids), _required("group", groups, ids)
    names = list(dict.fromkeys(splits))
    value_of = {field: _codes(column) for field, column in digests.items()}
    shared_groups = _shared(group_of, split_of, names, ids)
    shared_bytes = {field: _shared(values, split_of, names, ids) for field, values in value_of.items()}
    return {
        "passed": not shared_groups["count"] and not any(leak["count"] for leak in shared_bytes.values()),
        "samples": dict(sorted(Counter(splits).items())),
        "shared_groups": shared_groups,
        "shared_bytes": shared_bytes,
        "labels": {} if labels is None else _per_split(splits, labels),
        "patterns": _per_split(splits, _patterns(value_of, len(ids))),
    }


def require(certificate: Mapping[str, Any], where: str) -> None:
    """Raises an InputError that names ids, fields and splits, unless the certificate passed.

    Args:
        certificate: from `certify`.
        where: the training set, for the message.
    """
    if certificate["passed"]:
        return
    leaks = [f"group {line}" for line in _lines(certificate["shared_groups"])]
    for field, leak in certificate["shared_bytes"].items():
        leaks += [f"equal bytes of {field} {line}" for line in _lines(leak)]
    total = certificate["shared_groups"]["count"] + sum(x["count"] for x in certificate["shared_bytes"].values())
    raise InputError(
        f"{where}: {total} leaks between its splits, so it was not committed:\n  "
        + "\n  ".join(leaks)
        + "\nname the fields in the training set's group_equal: samples with equal bytes of them then stand on one side"
    )


def _lines(leak: Mapping[str, Any]) -> Iterable[str]:
    for example in leak["examples"]:
        yield f"in {' and '.join(example['splits'])}: {', '.join(example['ids'])}"
    if leak["count"] > len(leak["examples"]):
        yield f"… and {leak['count'] - len(leak['examples'])} more"


def _shared(
    values: NDArray[np.int64], split_of: NDArray[np.int64], names: Sequence[str], ids: Sequence[str]
) -> dict[str, Any]:
    """Values (codes; -1 is missing) that occur in several splits, each with one sample of each split as example."""
    known = np.flatnonzero(values >= 0)
    pairs, first = np.unique(values[known] * len(names) + split_of[known], return_index=True)
    value_of_pair, rows = pairs // max(len(names), 1), known[first]
    codes, occurrences = np.unique(value_of_pair, return_counts=True)
    leaked = codes[occurrences > 1]
    examples = [
        {"splits": [names[split_of[row]] for row in found], "ids": [ids[row] for row in found]}
        for found in (rows[value_of_pair == code].tolist() for code in leaked[:EXAMPLES])
    ]
    return {"count": len(leaked), "examples": examples}


def _codes(column: Any) -> NDArray[np.int64]:
    """Equal values as equal numbers [n], counted up in the order of first occurrence; missing ones as -1."""
    array = column if isinstance(column, pa.Array | pa.ChunkedArray) else pa.array(column)
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)  # A dictionary may hold one value twice.
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    indices = array.dictionary_encode().indices.cast(pa.int64()).fill_null(-1)
    return np.asarray(indices.to_numpy(zero_copy_only=False))


def _required(what: str, column: Sequence[str], ids: Sequence[str]) -> NDArray[np.int64]:
    codes = _codes(column)
    missing = np.flatnonzero(codes < 0)
    if len(missing):
        raise InputError(f"sample {ids[missing[0]]} has no {what} ({len(missing)} such samples); give every sample one")
    return codes


def _patterns(value_of: Mapping[str, NDArray[np.int64]], n: int) -> list[str]:
    """Which fields each sample has, as text: the names joined by +, or `none`."""
    bits = sum(
        ((codes >= 0).astype(np.int64) << at for at, codes in enumerate(value_of.values())), np.zeros(n, np.int64)
    )
    texts = {
        bit: "+".join(field for at, field in enumerate(value_of) if bit >> at & 1) or "none"
        for bit in np.unique(bits).tolist()
    }
    return [texts[bit] for bit in bits.tolist()]


def _per_split(splits: Sequence[str], values: Sequence[str]) -> dict[str, dict[str, int]]:
    """Counts of the values within each split, both in the order of their names."""
    counts = Counter(zip(splits, values, strict=True))
    names = sorted(set(splits))
    return {name: {value: n for (split, value), n in sorted(counts.items()) if split == name} for name in names}
