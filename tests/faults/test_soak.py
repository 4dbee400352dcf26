"""100 kills of `braid run` with the real encoders: `make soak`."""

from pathlib import Path

import pytest

from featurestore.storage import Storage
from featurestore.verify import verify
from tests.faults.kills import COMMIT, Kills
from tests.planted import planted_spec, write_planted

WANT = {"shard": 15, "encode": 25, "align": 15, "index": 10, "fuse": 15, COMMIT: 20}
STORES = 4
IMPORTS = (
    "featurestore.encoders.efficientnet_lite0",
    "featurestore.encoders.minilm_l6",
    "transformers.models.bert.modeling_bert",
    "transformers.models.bert.tokenization_bert",
)


@pytest.mark.slow
def test_killed_100_times_with_real_encoders_the_store_is_that_of_an_uninterrupted_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_planted(tmp_path / "corpus", bad=True)
    kills = Kills(planted_spec(tmp_path / "corpus", "{store}", failure_budget="30%"), tmp_path, *IMPORTS)
    kills.run(WANT, seed=1, stores=STORES)
    with capsys.disabled():
        print("", *kills.tally.lines(), sep="\n")
    assert {bucket: kills.tally.counted[bucket] >= wanted for bucket, wanted in WANT.items()} == dict.fromkeys(
        WANT, True
    )
    assert kills.tally.counted.total() >= 100
    for number in range(STORES):
        assert verify(Storage.of(tmp_path / f"killed-{number}")).ok
