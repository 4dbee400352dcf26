import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from featurestore.catalog import Catalog
from featurestore.corpora import ROWS
from featurestore.errors import BraidError, DecodeError, InputError, WorkerDied
from featurestore.storage import Storage
from jobs.run import Runner
from jobs.spec import load
from pipelines.runner import InFlight, Job
from pipelines.workers import Workers
from tests.conftest import Made
from tests.faults.deadly import HANG, set_deadly, sound_of
from tests.processes import wait_for


class Sleep(NamedTuple):
    """A work of its own: a task is (name, seconds); its result says which process did it, from when to when."""

    folder: str

    def open(self, threads: int) -> dict[str, Any]:
        if self.folder == "refuse":
            raise InputError("cannot be opened")
        return {"threads": threads}

    def do(self, opened: dict[str, Any], task: tuple[str, float]) -> tuple[Any, ...]:
        name, seconds = task
        if name == "bad":
            raise BraidError("bad task")
        if name == "rejected":
            raise DecodeError("empty", "0 bytes")
        if name == "unsendable":
            return (threading.Lock(),)
        (Path(self.folder) / name).write_text(str(os.getpid()))
        begun = time.monotonic()
        time.sleep(seconds)
        return name, os.getpid(), opened["threads"], begun, time.monotonic()


@pytest.fixture
def workers(tmp_path: Path) -> Any:
    made = Workers(Sleep(str(tmp_path)), processes=2, at_once=2, threads=3)
    yield made
    made.close()


def test_tasks_run_in_both_processes_two_at_once(workers: Workers) -> None:
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(workers.do, [(f"t{number}", 0.3) for number in range(4)]))
    pids = [each[1] for each in done]
    assert sorted(pids.count(pid) for pid in set(pids)) == [2, 2]
    assert os.getpid() not in pids
    assert max(each[3] for each in done) < min(each[4] for each in done)
    assert {each[2] for each in done} == {3}


def test_a_long_task_holds_up_nothing_but_itself(workers: Workers) -> None:
    tasks = [("long", 2.0)] + [(f"t{number}", 0.04) for number in range(60)]
    begun = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(workers.do, tasks))
    took = time.monotonic() - begun
    # Dealt out beforehand, a worker would come to a half of the others only after its long one: 2.0 + 60 / 4 * 0.04.
    assert took < 2.3, took
    assert len({each[0] for each in done}) == 61


def test_an_error_comes_back_as_itself_with_where_it_was_raised(workers: Workers) -> None:
    with pytest.raises(BraidError, match="bad task") as caught:
        workers.do(("bad", 0))
    assert str(caught.value) == "bad task"
    assert "in a worker process" in caught.value.__notes__[0]
    assert workers.do(("good", 0))[0] == "good"


def test_a_rejection_comes_back_whole_and_what_cannot_is_told(workers: Workers) -> None:
    with pytest.raises(DecodeError, match="empty: 0 bytes") as caught:
        workers.do(("rejected", 0))
    assert (caught.value.reason, caught.value.detail) == ("empty", "0 bytes")
    with pytest.raises(TypeError, match=r"tuple cannot be sent to another process: cannot pickle '_thread\.lock'"):
        workers.do(("unsendable", 0))
    assert workers.do(("good", 0))[0] == "good"


def test_work_that_cannot_be_opened_says_why() -> None:
    with pytest.raises(InputError, match="cannot be opened"):
        Workers(Sleep("refuse"), processes=1, at_once=1, threads=1)


def test_a_killed_process_is_told_at_once_and_the_others_are_ended(tmp_path: Path, workers: Workers) -> None:
    outcome: list[BaseException] = []

    def run() -> None:
        try:
            workers.do(("victim", 60.0))
        except WorkerDied as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while not (tmp_path / "victim").exists() or not (tmp_path / "victim").read_text():
        time.sleep(0.01)
    os.kill(int((tmp_path / "victim").read_text()), signal.SIGKILL)
    thread.join(5)
    assert not thread.is_alive()
    assert "ended by SIGKILL (the kernel does so where memory runs out)" in str(outcome[0])
    assert all(process.popen.poll() is not None for process in workers._processes)


ASKING = """
import sys, time
from pipelines.workers import Workers
from tests.pipelines.test_workers import Sleep
made = Workers(Sleep(sys.argv[1]), processes=2, at_once=1, threads=1)
print(*(process.popen.pid for process in made._processes), flush=True)
made.do(("forever", 600.0))
"""


def test_processes_end_at_once_with_the_one_that_asked(tmp_path: Path) -> None:
    asked = subprocess.Popen([sys.executable, "-c", ASKING, str(tmp_path)], stdout=subprocess.PIPE)
    assert asked.stdout is not None
    pids = [int(pid) for pid in asked.stdout.readline().split()]
    while not (tmp_path / "forever").exists():
        time.sleep(0.01)
    asked.kill()
    asked.communicate()
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _copy_of(small: Made, folder: Path) -> Path:
    spec = folder / "spec.yaml"
    spec.write_text(small.spec.read_text().replace(str(small.store), str(folder / "store")))
    return spec


def _run(spec: Path, **kwargs: Any) -> str:
    from rich.console import Console

    loaded = load(spec)
    Runner(loaded, Console(quiet=True), **kwargs).run()
    return Catalog(loaded.store).snapshot().digest()


def test_two_workers_write_the_same_bytes_as_one(small: Made, tmp_path: Path) -> None:
    assert _run(_copy_of(small, tmp_path), workers=2) == Catalog(Storage.of(str(small.store))).snapshot().digest()


def test_a_killed_worker_ends_the_run_with_a_clear_error_and_the_next_run_goes_on(small: Made, tmp_path: Path) -> None:
    """Killed in the middle of a shard: one of its values comes to no end."""
    spec = _copy_of(small, tmp_path)
    _, shard, raw = sound_of(small.open())
    with pytest.MonkeyPatch.context() as hanging:
        struck = set_deadly(hanging, tmp_path / "deadly", raw, HANG) / "struck"

        def kill() -> None:
            pid = wait_for(lambda: struck.exists() and struck.read_text().strip(), 60, "no process came to the value")
            os.kill(int(pid), signal.SIGKILL)

        with ThreadPoolExecutor(1) as pool:
            killed = pool.submit(kill)
            with pytest.raises(
                WorkerDied, match=r"^a worker process ended by SIGKILL .* while it was at shard [0-9a-f-]+; nothing"
            ):
                _run(spec, workers=2)
            killed.result()
    storage = Storage.of(str(tmp_path / "store"))
    assert Catalog(storage).snapshot().names(ROWS) == ["planted"]
    assert any(key.endswith(f"/{shard}") for key in storage.list("attempts/encode/loud"))
    assert _run(spec, workers=2) == Catalog(Storage.of(str(small.store))).snapshot().digest()


@pytest.mark.parametrize(("workers", "args"), [(0, []), (2, ["--runner=DaskRunner"])])
def test_workers_are_of_the_local_runner(workers: int, args: list[str]) -> None:
    with pytest.raises(InputError, match=f"--workers {workers}: at least 1, and only without --runner"):
        Job(args, workers)


def test_the_metrics_count_what_was_computed_now(small: Made, tmp_path: Path) -> None:
    from rich.console import Console

    loaded = load(_copy_of(small, tmp_path))
    done = Runner(loaded, Console(quiet=True), workers=2).run(("shard", "encode"))
    encoded = [step for step in done if step.stage == "encode"]
    assert all(step.values > 0 and step.span_s > 0 for step in encoded)
    assert InFlight.SHARDS_IN_FLIGHT == 2
