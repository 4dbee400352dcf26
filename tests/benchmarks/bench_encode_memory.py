"""What encoding holds in memory: beside the model, however many shards there are, and of a model that two processes share."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from typing import Any

from rich.console import Console

from jobs.run import Runner
from jobs.sizes import peak_bytes
from jobs.spec import load
from tests.benchmarks import Bar, at_most, encoding

SHARDS = (2, 200)
ROWS = 8
GIB = 1 << 30


def bars() -> list[Bar]:
    """The bars of memory."""
    with encoding.scratch() as folder:
        print("encode: memory …", flush=True)
        return [*peaks(folder), *shared(folder)]


def peaks(folder: Path) -> list[Bar]:
    """Peak RSS of a process that encodes 2 shards, and of one that encodes 200."""
    found = []
    for shards in SHARDS:
        own = folder / f"{shards}-shards"
        own.mkdir()
        raws = list(encoding.images(shards * ROWS))
        encoding.sharded(own, raws, "image", "efficientnet-lite0", {}, ROWS)
        found.append(int(_child("peak", str(own / "spec.yaml"))))
    weights = _weights_of("efficientnet-lite0")
    above = found[-1] - weights
    detail = {f"peak_mib_of_{shards}_shards": peak >> 20 for shards, peak in zip(SHARDS, found, strict=True)}
    return [
        at_most("encode", "RSS above the model, GiB", above / GIB, 1.0, weights_mib=weights >> 20, **detail),
        at_most("encode", f"RSS of {SHARDS[1]} shards over {SHARDS[0]}", found[-1] / found[0], 1.1, **detail),
    ]


def _weights_of(key: str) -> int:
    from featurestore import encoders

    return sum(path.stat().st_size for path in encoders.find(key).weights().values())


def peak(spec: str) -> int:
    """Bytes, of this process, which encodes a spec's corpus."""
    Runner(load(Path(spec)), Console(quiet=True)).run(("encode",))
    return peak_bytes()


def shared(folder: Path) -> list[Bar]:
    """The sum of the PSS of two worker processes over 1.1 times the weights and each one's base, by dtype."""
    checkpoint = encoding.vit_b32(folder)
    found = []
    for dtype in ("float32", "bfloat16"):
        options = {"checkpoint": str(checkpoint), "dtype": dtype}
        # The copy is made, and the file's pages are clean.
        cache = {"XDG_CACHE_HOME": str(folder / "cache")}
        _child("hold", json.dumps(options), "\n\n", cache)
        workers = [_Holder(options, cache) for _ in range(2)]
        base = sum(worker.ask() for worker in workers)
        weights = max([worker.ask() for worker in workers])
        held = sum(worker.ask() for worker in workers)
        for worker in workers:
            worker.end()
        found.append(
            at_most(
                "encode",
                f"PSS of two processes above their base over the weights, {dtype}",
                (held - base) / weights,
                1.1,
                pss_mib=held >> 20,
                base_mib=base >> 20,
                weights_mib=weights >> 20,
            )
        )
    return found


class _Holder:
    """A worker process that tells its PSS before it loads a model, the model's bytes, and its PSS when all are loaded."""

    def __init__(self, options: dict[str, Any], env: dict[str, str]) -> None:
        command = [sys.executable, "-m", __name__, "hold", json.dumps(options)]
        self._process = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True, env={**os.environ, **env})

    def ask(self) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def end(self) -> None:
        self._process.communicate()


def hold(options: str) -> None:
    """Answers each line of standard input: see `_Holder`."""
    import transformers.models.vit.modeling_vit

    from featurestore import encoders
    from featurestore.encoders.runtime import tune_process

    assert transformers.models.vit.modeling_vit
    tune_process()
    encoder = encoders.find("hf-image", json.loads(options))
    encoder.fingerprint()
    for number, _ in enumerate(sys.stdin):
        if number == 1:
            weights = list(encoder.load().parameters())
            # Every page is read.
            touched = sum(int(each.view(-1)[::512].count_nonzero()) for each in weights)
            assert touched
            print(sum(each.numel() * each.element_size() for each in weights), flush=True)
        else:
            print(_pss(), flush=True)


def _pss() -> int:
    told = Path("/proc/self/smaps_rollup").read_text()
    return int(re.findall(r"^Pss:\s+(\d+) kB$", told, re.MULTILINE)[0]) << 10


def _child(what: str, argument: str, asked: str = "", env: dict[str, str] | None = None) -> str:
    """What a process of its own prints last."""
    command = [sys.executable, "-m", __name__, what, argument]
    done = subprocess.run(command, input=asked, stdout=PIPE, text=True, check=True, env={**os.environ, **(env or {})})
    return done.stdout.split()[-1]


if __name__ == "__main__":
    what, argument = sys.argv[1:]
    print(peak(argument)) if what == "peak" else hold(argument)
