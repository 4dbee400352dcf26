"""What a training set is not made of."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from featurestore.errors import InputError
from jobs.run import Runner
from jobs.spec import load
from tests.conftest import Made


def test_a_label_column_without_a_value_is_named(small: Made, tmp_path: Path) -> None:
    made = small.copy_to(tmp_path)
    manifest = made.corpus / "manifest.jsonl"
    rows = [json.loads(line) | {"label": None} for line in manifest.read_text().splitlines()]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Stored samples may not change.
    made.spec.write_text(made.spec.read_text().replace(str(made.store), str(tmp_path / "another")))
    told = r"corpus 'planted': none of its 48 samples has a value in the label column 'label'"
    with pytest.raises(InputError, match=told):
        Runner(load(made.spec), Console(quiet=True)).run(("shard", "encode", "fuse"))
