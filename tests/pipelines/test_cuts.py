"""How a corpus is cut into ranges and shards: in the order of ids, and in that of the source."""

import itertools
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featurestore.identity import hash64
from featurestore.row_order import AS_STORED, BY_ID, BY_SOURCE, BY_TAR
from pipelines import cuts
from pipelines.cuts import SHARDS_PER_RANGE, Cut, range_of
from pipelines.ingest import Ingest
from pipelines.reference_blocks import packed, unpacked
from pipelines.sources import SampleRef


def references(groups: list[tuple[str, int]], size: int = 100) -> list[SampleRef]:
    """`n` references of each (group, n)."""
    return [SampleRef(f"{name}/{i}", name, "e", size, "u", 0, 1) for name, n in groups for i in range(n)]


def place(reference: SampleRef) -> tuple[int, str, str]:
    return hash64(reference.group), reference.group, reference.id


groups = st.dictionaries(st.text(min_size=1, max_size=5), st.integers(1, 30), max_size=12).map(
    lambda d: list(d.items())
)


@settings(deadline=None)
@given(groups, st.integers(1, 40), st.integers(50, 2000), st.randoms(use_true_random=False))
def test_cut_takes_every_sample_once_in_order_and_fills_each_shard(
    drawn: list[tuple[str, int]], max_rows: int, max_bytes: int, rng: random.Random
) -> None:
    samples = references(drawn)
    shards = list(Cut(BY_ID, max_rows, max_bytes).shards(samples))
    assert sorted(ref for shard in shards for ref in shard) == sorted(samples)
    for shard in shards:
        assert [ref.id for ref in shard] == sorted(ref.id for ref in shard)
        assert len(shard) <= max_rows
        assert len(shard) == 1 or sum(ref.bytes for ref in shard) <= max_bytes
    for shard, after in itertools.pairwise(shards):
        assert max(map(place, shard)) < min(map(place, after))
        assert len(shard) == max_rows or (len(shard) + 1) * 100 > max_bytes, "a shard ended that had room"
    shuffled = samples.copy()
    rng.shuffle(shuffled)
    assert list(Cut(BY_ID, max_rows, max_bytes).shards(shuffled)) == shards


names = st.text(min_size=1, max_size=3)
places = st.text(st.sampled_from("a/\x7fé\ud800\udcff\uffff\U00010000"), min_size=1, max_size=3)


@settings(deadline=None)
@given(st.lists(st.tuples(names, names, places, st.integers(0, 1 << 40)), max_size=30, unique_by=lambda each: each[2:]))
def test_samples_that_are_sorted_in_runs_stand_as_if_they_were_sorted_at_once(
    drawn: list[tuple[str, str, str, int]],
) -> None:
    """Whatever their texts are: names of files that are not UTF-8 hold surrogates."""
    samples = [SampleRef(name, group, "e", 1, uri, offset, 7) for name, group, uri, offset in drawn]
    by_id, by_place = (Cut(order, 1, 1) for order in (BY_ID, BY_SOURCE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "_RUN", 4)
        assert [each for (each,) in by_place.shards(samples)] == sorted(samples, key=lambda each: each[4:6])
        assert [each for (each,) in by_id.shards(samples)] == sorted(samples, key=place)


def test_a_range_of_one_large_group_is_held_packed() -> None:
    """A recording is a group, and may have ten million windows."""
    count = 300_000
    code = f"""
from pipelines import cuts
from pipelines.cuts import Cut
from pipelines.sources import SampleRef
def hwm():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
def references(count):
    for number in range(count):
        yield SampleRef(f"sample-{{number:08}}", "the-one", f"{{number:016x}}", 80, "/data/m.jsonl", number * 90, 90)
assert sum(len(shard) for shard in Cut("id", 10_000, 1 << 40).shards(references(10_000))) == 10_000
before = hwm()
assert sum(len(shard) for shard in Cut("id", 10_000, 1 << 40).shards(references({count}))) == {count}
print((hwm() - before) / {count})
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) < 100


@given(st.lists(st.text(min_size=1, max_size=6), min_size=1), st.integers(1, 1000))
def test_ranges_are_slices_of_the_hashes(names: list[str], ranges: int) -> None:
    by_hash = [range_of(name, ranges) for name in sorted(names, key=hash64)]
    assert by_hash == sorted(by_hash)
    assert 0 <= by_hash[0] <= by_hash[-1] < ranges


def zipf(total: int) -> Iterator[tuple[str, int]]:
    sizes = [max(1, int(total / 8 / rank)) for rank in range(1, total)]
    while total > 0:
        size = min(sizes.pop(0), total)
        yield f"z{total}", size
        total -= size


@pytest.mark.parametrize(
    "drawn",
    [
        pytest.param([(f"s{i}", 1) for i in range(20_000)], id="single samples"),
        pytest.param(list(zipf(20_000)), id="Zipf groups"),
        pytest.param([(f"f{i}", 50) for i in range(400)], id="groups of 50"),
        pytest.param([("one", 20_000)], id="one group"),
    ],
)
def test_shards_are_full_however_large_the_groups(drawn: list[tuple[str, int]]) -> None:
    samples, max_rows = references(drawn), 64
    assert len(samples) == 20_000
    corpus = {"shard_rows": max_rows, "shard_mb": 512}
    ranges = Ingest("", len(samples), 100 * len(samples), 0, 0, 0).ranges(corpus)
    assert ranges == 10
    cut = Cut(BY_ID, max_rows, 512 << 20)
    shards = [
        shard for part in shuffled(cut.ranges(samples, ranges), random.Random(0)).values() for shard in cut.shards(part)
    ]
    assert len(samples) / (len(shards) * max_rows) >= 0.95


# In the order of the source


def placed(files: list[list[int]]) -> list[SampleRef]:
    """A sample of each size, file by file as `expand` gives them, of ids and groups in another order."""
    return [
        SampleRef(f"{hash64(f'{number}/{offset}'):x}", f"g{size % 3}", "e", size, f"f{number:03}", offset * 512, 512)
        for number, sizes in enumerate(files)
        for offset, size in enumerate(sizes)
    ]


def shuffled(ranges: Iterator[tuple[int, SampleRef]], rng: random.Random) -> dict[int, list[SampleRef]]:
    """What the shuffle gives for each range: its blocks, in any order."""
    blocks = list(packed(ranges))
    rng.shuffle(blocks)
    return {
        number: list(unpacked(block for each, block in blocks if each == number))
        for number in sorted({number for number, _ in blocks})
    }


def stretches(references: list[SampleRef], max_rows: int, max_bytes: int, by_tar: bool) -> list[list[SampleRef]]:
    """The cuts as one loop over the whole source would make them."""
    made: list[list[SampleRef]] = []
    for reference in references:
        full = made and (
            len(made[-1]) >= max_rows or sum(each.bytes for each in made[-1]) + reference.bytes > max_bytes
        )
        if not made or (made[-1][-1].uri != reference.uri if by_tar else full):
            made.append([])
        made[-1].append(reference)
    return made


sizes = st.lists(st.lists(st.integers(0, 400), max_size=90), max_size=40)


@settings(deadline=None)
@given(
    sizes,
    st.sampled_from([BY_SOURCE, BY_TAR, AS_STORED]),
    st.integers(1, 6),
    st.integers(50, 2000),
    st.randoms(use_true_random=False),
)
def test_shards_are_consecutive_stretches_however_the_shuffle_gives_their_references(
    files: list[list[int]], order: str, max_rows: int, max_bytes: int, rng: random.Random
) -> None:
    samples, cut = placed(files), Cut(order, max_rows, max_bytes)
    parts = shuffled(cut.ranges(samples, 1), rng)
    assert list(parts) == list(range(len(parts)))
    shards = [shard for part in parts.values() for shard in cut.shards(part)]
    assert shards == stretches(samples, max_rows, max_bytes, order == BY_TAR)
    for number, part in parts.items():
        made = len(list(cut.shards(part)))
        assert made <= SHARDS_PER_RANGE
        if order != BY_TAR and number + 1 < len(parts):
            assert made == SHARDS_PER_RANGE, "the number of ranges is as small as it can be"


def test_a_range_of_tars_ends_once_it_holds_many_samples() -> None:
    """A tar may have any number of samples; what one range has is in memory at once."""
    samples, cut = placed([[1] * 100] * 10), Cut(BY_TAR, 10, 1 << 20)
    parts = shuffled(cut.ranges(samples, 1), random.Random(0))
    assert [len(part) for part in parts.values()] == [400, 400, 200]
    assert [len(shard) for part in parts.values() for shard in cut.shards(part)] == [100] * 10


@pytest.mark.parametrize(("most", "size"), [(64, 0), (10**9, 100)])
def test_shards_in_the_order_of_the_source_are_full_but_the_last(most: int, size: int) -> None:
    """Also where only files of a few samples are."""
    samples, cut = placed([[size] * 7] * 3000), Cut(BY_SOURCE, most, 6400)
    shards = [
        shard for part in shuffled(cut.ranges(samples, 1), random.Random(1)).values() for shard in cut.shards(part)
    ]
    assert {len(shard) for shard in shards[:-1]} == {64}
    assert len(samples) / (len(shards) * 64) >= 0.95
