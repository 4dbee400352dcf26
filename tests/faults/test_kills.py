"""Kill -9 at any point of `braid run` and run it again: the store is that of an uninterrupted run."""

from pathlib import Path

import yaml

from featurestore.storage import Storage
from featurestore.verify import verify
from tests.faults.kills import COMMIT, Kills
from tests.planted import planted_spec, write_planted

WANT = {"shard": 3, "encode": 4, "align": 3, "index": 3, "fuse": 3, COMMIT: 4}


def test_killed_20_times_and_run_again_the_store_is_that_of_an_uninterrupted_run(tmp_path: Path) -> None:
    write_planted(tmp_path / "corpus", bad=True)
    kills = Kills(_spec(tmp_path / "corpus"), tmp_path)
    kills.run(WANT, seed=0)
    print(*kills.tally.lines(), sep="\n")
    assert {bucket: kills.tally.counted[bucket] >= wanted for bucket, wanted in WANT.items()} == dict.fromkeys(
        WANT, True
    )
    assert kills.tally.counted.total() >= 20
    assert verify(Storage.of(tmp_path / "killed-0")).ok


def _spec(corpus: Path) -> str:
    """Two views of the sounds by encoders without weights, and one of all that is built on views; bad values too."""
    spec = yaml.safe_load(planted_spec(corpus, "{store}", failure_budget="30%"))
    spec["views"] = {name: {"field": "sound", "encoder": name} for name in ("log-mel", "mfcc")}
    spec["spaces"] = {"heard": {"views": ["log-mel", "mfcc"], "method": "cca", "dim": 8}}
    spec["indexes"] = {"heard": {"space": "heard", "views": ["log-mel", "mfcc"]}}
    spec["training_sets"]["category"]["views"] = ["log-mel", "mfcc"]
    return yaml.safe_dump(spec, sort_keys=False)
