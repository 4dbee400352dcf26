"""Reading the headers of tars: members a second of tiny members on a disk, and over Python's own `tarfile`.

Tiny members are the worst case: 50,000 samples of a picture and a text of 100 bytes each. `references()` groups them, looks
for columns and makes etags; it is what planning a corpus of tars costs.
"""

import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pipelines.sources import open_source
from pipelines.sources.tar_members import Tar, members
from tests.benchmarks import Bar, at_least

MEMBERS = 100_000
MEMBER_BYTES = 100
ROUNDS = 5
BAR = 50_000
PEER_BAR = 1.0


def bars() -> list[Bar]:
    """The bars of this area."""
    with tempfile.TemporaryDirectory(prefix="braid-bench-") as folder:
        path = Path(folder) / "000.tar"
        _write(path)
        rounds = [[_rate(each, path) for each in (_headers, _references, _tarfile)] for _ in range(ROUNDS)]
    headers, references, peer = (statistics.median(column) for column in zip(*rounds, strict=True))
    detail = {
        "members": MEMBERS,
        "member_bytes": MEMBER_BYTES,
        "cores": len(os.sched_getaffinity(0)),
        "members_per_s": {"headers": round(headers), "references": round(references), "tarfile": round(peer)},
        "rounds": [[round(each) for each in one] for one in rounds],
    }
    return [
        at_least("corpora", "headers of a tar, members/s", headers, BAR, what="tar_members.members", **detail),
        at_least(
            "corpora", "references of a tar over tarfile", references / peer, PEER_BAR,
            what="webdataset source's references / iteration of tarfile.open, members a second", **detail,
        ),
    ]  # fmt: skip


def _write(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(MEMBERS):
            info = tarfile.TarInfo(f"{number // 2:09}.{'txt' if number % 2 else 'jpg'}")
            info.size = MEMBER_BYTES
            tar.addfile(info, io.BytesIO(bytes(MEMBER_BYTES)))


def _rate(read: Callable[[Path], int], path: Path) -> float:
    begun = time.perf_counter()
    count = read(path)
    assert count == MEMBERS
    return count / (time.perf_counter() - begun)


def _headers(path: Path) -> int:
    with Tar(str(path)) as tar:
        return sum(1 for _ in members(tar))


def _references(path: Path) -> int:
    source = open_source(
        {
            "source": {"type": "webdataset", "path": [str(path)]},
            "columns": {"id": "id"},
            "fields": {
                "image": {"modality": "image", "from": "jpg", "read": None},
                "caption": {"modality": "text", "from": "txt", "read": None},
            },
        }
    )
    return 2 * sum(1 for _ in source.references())


def _tarfile(path: Path) -> int:
    count = 0
    with tarfile.open(path) as tar:
        for _ in tar:
            count += 1
            tar.members = []
    return count
