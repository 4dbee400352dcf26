import json
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from featurestore.errors import InputError, NotFound
from featurestore.loader import Batches, order, torch_dataset
from tests.featurestore.test_training import CLASSES, training_rows

N = 23


def loader(batch_size=5, seed=1, snapshot="build1", rows=None, make=torch_dataset):
    return make(training_rows(N) if rows is None else rows, ["image", "sound"], CLASSES, batch_size, seed, snapshot)


def ids_of(batches):
    return [sample for batch in batches for sample in batch["ids"]]


def test_an_epoch_is_every_row_once_in_an_order_of_its_own():
    batches = loader()
    epochs = [ids_of(batches) for _ in range(3)]
    assert all(sorted(epoch) == sorted(training_rows(N)["id"].to_pylist()) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] == ids_of(loader())
    assert epochs[0] != ids_of(loader(seed=2))
    assert epochs[0] != ids_of(loader(snapshot="build2"))
    again = loader()
    again.set_epoch(2)
    assert ids_of(again) == epochs[2]


def test_the_order_is_fixed_for_good():
    assert order("build", 0, 0, 8).tolist() == [4, 0, 5, 6, 3, 1, 7, 2]


def test_a_batch_holds_each_samples_own_values():
    rows = training_rows(N)
    place = {sample: row for row, sample in enumerate(rows["id"].to_pylist())}
    for batch in loader():
        for row, sample in enumerate(batch["ids"]):
            at = place[sample]
            assert CLASSES[batch["label"][row]] == rows["label"][at].as_py()
            assert batch["weight"][row].item() == rows["weight"][at].as_py()
            for v, view in enumerate(["image", "sound"]):
                present = rows[f"{view}_present"][at].as_py()
                assert batch["present"][row, v].item() == present
                expected = rows[view][at].as_py() if present else [0.0] * len(rows[view][at])
                assert batch["emb"][view][row].tolist() == expected
                assert batch["pred"][view][row].tolist() == rows[f"{view}_pred"][at].as_py()


def test_shapes_and_types_are_as_stated():
    batch = next(iter(loader()))
    shapes = {name: (tuple(batch[name].shape), batch[name].dtype) for name in ("present", "label", "weight")}
    assert shapes == {"present": ((5, 2), torch.bool), "label": ((5,), torch.int64), "weight": ((5,), torch.float32)}
    assert (batch["emb"]["image"].shape, batch["emb"]["image"].dtype) == ((5, 4), torch.float32)
    assert (batch["emb"]["sound"].shape, batch["emb"]["sound"].dtype) == ((5, 3), torch.float32)  # float16 in the table
    assert batch["pred"]["sound"].shape == (5, len(CLASSES))
    assert all(x.is_contiguous() for x in [*batch["emb"].values(), *batch["pred"].values(), batch["present"]])
    assert len(loader()) == 5
    assert len(list(loader())) == 5


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, N), max_size=4))
def test_chunks_of_any_length_give_the_same_batches(cuts):
    rows, ends = training_rows(N), sorted({0, N, *cuts})
    parts = pa.concat_tables([rows.slice(a, b - a) for a, b in pairwise(ends)])
    for one, other in zip(loader(make=Batches), loader(make=Batches, rows=parts), strict=True):
        assert one["ids"] == other["ids"]
        for view in ("image", "sound"):
            np.testing.assert_array_equal(one["emb"][view], other["emb"][view])
            np.testing.assert_array_equal(one["pred"][view], other["pred"][view])


@pytest.mark.parametrize(
    "through", [lambda rows: rows, lambda rows: DataLoader(rows, batch_size=None)], ids=["bare", "DataLoader"]
)
def test_resuming_after_every_batch_equals_an_uninterrupted_run(through):
    def run(batches, until_epoch):
        while batches.state_dict()["epoch"] < until_epoch:
            for batch in through(batches):
                yield batch["ids"], json.dumps(batches.state_dict())

    whole = list(run(loader(), 2))
    assert len(whole) == 10
    for done in range(len(whole)):
        fresh = loader()
        fresh.load_state_dict(json.loads(whole[done][1]))
        assert fresh.state_dict() == json.loads(whole[done][1])
        assert list(run(fresh, 2)) == whole[done + 1 :]


def test_the_usual_loop_over_epochs_resumes_from_the_end_of_one():
    def loop(batches):
        for epoch in range(batches.state_dict()["epoch"], 3):
            batches.set_epoch(epoch)
            for batch in batches:
                yield batch["ids"], batches.state_dict()

    whole = list(loop(loader()))
    for done in (4, 7, 9):  # The last batch of epoch 0, one amid epoch 1, its last.
        fresh = loader()
        fresh.load_state_dict(whole[done][1])
        assert list(loop(fresh)) == whole[done + 1 :]


def test_a_new_iterator_begins_the_epoch_anew_and_another_epoch_forgets_the_position():
    batches = loader()
    first = next(iter(batches))["ids"]
    assert batches.state_dict()["position"] == 5
    assert ids_of(batches)[:5] == first
    assert batches.state_dict() | {"epoch": 1, "position": 0} == batches.state_dict()
    batches.load_state_dict(batches.state_dict() | {"epoch": 0, "position": 10})
    batches.set_epoch(4)
    assert len(list(batches)) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"snapshot": "build2"}, "state is of snapshot 'build2', this loader has 'build1'"),
        ({"seed": 2}, "state is of seed 2, this loader has 1"),
        ({"batch_size": 4}, "state is of batch_size 4, this loader has 5"),
        ({"version": 2}, "state is of version 2, this loader has 1"),
        ({"rows": 22}, "state is of rows 22, this loader has 23"),
        ({"position": 7}, "position 7: no state of 23 rows in batches of 5"),
        ({"position": 25}, "position 25: no state"),
        ({"epoch": -1}, "epoch -1"),
        ({"rank": 0}, "a loader's state has version, snapshot, .*; this one has .*rank"),
    ],
)
def test_a_state_that_is_not_of_this_loader_is_refused(change, message):
    batches = loader()
    with pytest.raises(InputError, match=message):
        batches.load_state_dict(batches.state_dict() | change)


def test_workers_and_ranks_are_refused(monkeypatch):
    with monkeypatch.context() as worker:  # As inside a worker; a real one takes 5 s to be joined.
        worker.setattr(torch.utils.data, "get_worker_info", lambda: object())
        with pytest.raises(InputError, match="num_workers=0"):
            iter(loader())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(InputError, match="one of 4 ranks"):
        iter(loader())


def test_wrong_arguments_are_refused():
    rows = training_rows(N)
    with pytest.raises(NotFound, match="no view 'video'; it has: image, sound"):
        torch_dataset(rows, ["video"], CLASSES, 5, 0, "b")
    with pytest.raises(InputError, match="batch_size=0"):
        torch_dataset(rows, ["image"], CLASSES, 0, 0, "b")
    with pytest.raises(InputError, match=r"sample a/1\.5: label 'dog' is none of the 1 classes"):
        torch_dataset(rows, ["image"], ["cat"], 5, 0, "b")
