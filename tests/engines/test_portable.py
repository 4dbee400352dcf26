"""The jobs over Beam's job service, with workers in processes of their own: what Flink and Spark clusters speak."""

import ast
import json
import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from apache_beam.portability.api import beam_job_api_pb2, beam_job_api_pb2_grpc
from rich.console import Console

from featurestore.errors import AlignmentError, BraidError, BudgetExceeded, InputError, MissingExtra, WorkerDied
from featurestore.storage import Storage
from featurestore.store import FeatureStore
from featurestore.verify import verify
from jobs.run import Runner
from jobs.spec import load
from pipelines import portable_runner
from pipelines.log import FIELDS
from pipelines.runner import Job
from tests.conftest import Made, check_same
from tests.engines.job_service import START_S, SUBPROCESS, JobService, flow_spec, worker_pool
from tests.loopback_s3 import REGION, loopback_s3
from tests.planted import write_planted
from tests.processes import Said, braid, start, wait_for
from tests.test_imports import ROOT

VALUES = 36
"""Sounds among 48 planted samples."""
STEPS = ["shard", "encode", "encode", "align", "index", "fuse"]


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """What the local runner makes of the flow's spec. Read only."""
    folder = tmp_path_factory.mktemp("flow")
    made = Made(folder / "corpus", folder / "spec.yaml", folder / "store")
    write_planted(made.corpus, 48)
    made.spec.write_text(flow_spec(made.corpus, made.store))
    Runner(load(made.spec), Console(quiet=True)).run()
    return made


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, object]]:
    """The options of a store in a bucket of a loopback S3 server; before the job service, whose workers inherit the keys."""
    with loopback_s3() as endpoint:
        options = {"endpoint": endpoint, "region": REGION, "allow_http": True}
        Storage(uri="s3://engines/x", **options).fs.mkdir("engines")
        yield options


@pytest.fixture(scope="module")
def service(s3: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobService]:
    with JobService(tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture(scope="module")
def pool(s3: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with worker_pool(tmp_path_factory.mktemp("pool")) as address:
        yield address


@pytest.fixture
def stale(flow: Made, tmp_path: Path) -> Made:
    """A copy with one shard of one view gone: one job of one task is to do."""
    copy = flow.copy_to(tmp_path)
    (copy.store / copy.open().view("timbre").files()[0]).unlink()
    return copy


def tar_of(made: Made) -> Path:
    """The tar that the task of `stale` reads."""
    shard = made.open().snapshot.entries("view", "timbre")[0].shard
    (tar,) = (made.store / "corpora/planted").glob(f"{shard}-*.tar")
    return tar


def refused(said: Said, status: int, told: str) -> None:
    """One message that tells `told`, whatever was printed of steps before; no traceback, no log."""
    assert said.status == status, said
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith("error: "), said.err
    assert told in said.err
    assert "while running" not in said.err


def test_a_flow_in_processes_of_the_job_service_gives_the_local_runners_digest(
    flow: Made, service: JobService, tmp_path: Path
) -> None:
    spec, metrics = tmp_path / "spec.yaml", tmp_path / "metrics.json"
    spec.write_text(flow_spec(flow.corpus, tmp_path / "store"))
    said = braid("run", spec, "--metrics", metrics, "--", *service.args())
    assert said.status == 0, said.err
    assert said.err == ""
    check_same(FeatureStore(tmp_path / "store"), flow.open())
    done = json.loads(metrics.read_text())
    assert [step["stage"] for step in done] == STEPS
    assert [step["values"] for step in done if step["stage"] == "encode"] == [VALUES, VALUES]
    assert [step["span_s"] > 0 for step in done if step["stage"] == "encode"] == [True, True]


@pytest.mark.parametrize("log_json", [True, False])
def test_workers_of_the_job_service_log_as_the_submitting_process_does(
    stale: Made, service: JobService, log_json: bool
) -> None:
    before = len(service.log.read_text())
    said = braid("encode", stale.spec, *(["--log-json"] if log_json else []), "--", *service.args())
    assert said.status == 0, said.err
    # The service writes each entry of its workers' log as the text of a proto.
    texts = [
        ast.literal_eval(each) for each in re.findall(r'message: ("(?:[^"\\]|\\.)*")', service.log.read_text()[before:])
    ]
    texts = [text for text in texts if "encode timbre: " in text]
    if log_json:
        events = [json.loads(text) for text in texts]
        assert [(each["job"], each["event"]) for each in events] == [
            ("encode timbre", "shard done"),
            ("encode timbre", "commit"),
        ]
        assert events[0]["shard"]
        assert events[0].keys() == {"time", "level", "logger", "message", *FIELDS}
    else:
        assert [text.split()[2].strip(":") for text in texts] == ["shard", "commit"]


@pytest.mark.slow  # `test_a_flow_needs_no_network` runs it
def test_a_flow_through_loopback_into_a_bucket_gives_the_local_runners_digest(
    flow: Made, service: JobService, s3: dict[str, object], tmp_path: Path
) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(flow_spec(flow.corpus, "s3://engines/flow", **s3))
    said = braid("run", spec, "--", *service.args("LOOPBACK"))
    assert said.status == 0, said.err
    check_same(FeatureStore(load(spec).store), flow.open())


def test_what_a_worker_pool_remakes_has_the_same_bytes(service: JobService, pool: str, stale: Made, flow: Made) -> None:
    said = braid("run", stale.spec, "--", *service.args("EXTERNAL", pool))
    assert said.status == 0, said.err
    assert (stale.store / stale.open().view("timbre").files()[0]).is_file()
    assert verify(Storage.of(stale.store)).findings == ()
    check_same(stale.open(), flow.open())


@pytest.mark.slow
@pytest.mark.parametrize("where", ["folder", "bucket"])
@pytest.mark.parametrize("environment", [SUBPROCESS, "EXTERNAL", "LOOPBACK"])
def test_every_environment_makes_the_small_corpus_with_the_local_runners_digest(
    small: Made, service: JobService, pool: str, s3: dict[str, object], tmp_path: Path, environment: str, where: str
) -> None:
    spec = tmp_path / "spec.yaml"
    store = f"{{uri: {tmp_path / 'store'}}}"
    if where == "bucket":
        name = environment.partition(":")[0].lower()
        store = json.dumps({"uri": f"s3://engines/{name}", **s3})
    spec.write_text(small.spec.read_text().replace(f"{{uri: {small.store}}}", store))
    said = braid("run", spec, "--", *service.args(environment, pool if environment == "EXTERNAL" else None))
    assert said.status == 0, said.err
    check_same(FeatureStore(load(spec).store), small.open())


def test_a_failure_budget_exceeded_on_a_worker_is_one_clear_message(service: JobService, tmp_path: Path) -> None:
    write_planted(tmp_path / "corpus", 48, bad=True)
    spec = tmp_path / "spec.yaml"
    spec.write_text(flow_spec(tmp_path / "corpus", tmp_path / "store"))
    refused(braid("run", spec, "--", *service.args()), 1, "more than the failure budget of 1.00%")


def test_a_worker_that_misses_a_file_says_what_the_local_runner_says(service: JobService, stale: Made) -> None:
    tar_of(stale).unlink()
    here, there = braid("run", stale.spec), braid("run", stale.spec, "--", *service.args())
    refused(there, here.status, ".tar")
    assert there.err == here.err


def test_workers_without_braid_are_told_as_that(service: JobService, stale: Made) -> None:
    packages = sysconfig.get_path("purelib")
    worker = f"cd / && PYTHONPATH={packages} {sys.executable} -S -m apache_beam.runners.worker.sdk_worker_main"
    if "braid" in os.listdir(packages):
        pytest.skip("Braid is installed as a copy, which -S does not hide")
    refused(braid("run", stale.spec, "--", *service.args(config=worker)), 1, "the workers have no Python package")


def test_a_pool_that_is_not_there_is_told_as_that(service: JobService, stale: Made) -> None:
    refused(braid("run", stale.spec, "--", *service.args("EXTERNAL", "localhost:1")), 2, "reaches no worker pool")


def test_an_environment_that_the_job_service_does_not_know_is_told_as_that(service: JobService, stale: Made) -> None:
    refused(braid("run", stale.spec, "--", *service.args("PROCESS", '{"command": "x"}')), 2, "beam:env:process:v1")


@pytest.mark.parametrize(
    ("killed", "told"),
    [("worker", "ended in the middle of its work"), ("service", "the job service went away")],
)
def test_kill_9_in_the_middle_ends_the_run_at_once_and_it_is_gone_on_with(
    stale: Made, tmp_path: Path, flow: Made, killed: str, told: str
) -> None:
    tar = tar_of(stale)
    content = tar.read_bytes()
    tar.unlink()
    # Whoever opens it waits for a writer: the worker is held in the middle of its task. (`run` would miss the tar before.)
    os.mkfifo(tar)
    (tmp_path / "own").mkdir()
    with JobService(tmp_path / "own") as own:
        with start("encode", stale.spec, "--", *own.args()) as running:
            try:
                worker = wait_for(lambda: holder(tar, of=own.process.pid), START_S, own.log.read_text)
                os.kill(worker if killed == "worker" else own.process.pid, signal.SIGKILL)
                out, err = running.communicate(timeout=30)
            finally:
                running.kill()
    refused(Said(running.returncode, out, err), 1, told)
    tar.unlink()
    tar.write_bytes(content)
    check_same(stale.open(), flow.open())
    done = Runner(load(stale.spec), Console(quiet=True)).run()
    assert [(step.stage, step.name) for step in done] == [("encode", "timbre")]
    check_same(stale.open(), flow.open())


def holder(fifo: Path, of: int) -> int | None:
    """The process of a session that waits to read from a FIFO."""
    try:
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return None
    workers = subprocess.run(["pgrep", "-s", str(of), "-f", "sdk_worker_main$"], capture_output=True, text=True)
    return max(int(pid) for pid in workers.stdout.split())


def test_a_flow_needs_no_network(tmp_path: Path) -> None:
    """The flow by both runners in a network namespace with nothing but the loopback, or else behind a dead proxy."""
    code = (
        "import errno, fcntl, os, socket, struct, sys\n"
        "if sys.argv[1] == 'namespace':\n"
        "    with socket.socket() as s:\n"
        "        fcntl.ioctl(s, 0x8914, struct.pack('16sh14x', b'lo', 0x1 | 0x40))\n"  # SIOCSIFFLAGS: up, running
        "    with socket.socket() as s:\n"
        "        assert s.connect_ex(('192.0.2.1', 80)) == errno.ENETUNREACH\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', '-m', '', *sys.argv[2:]])\n"
    )
    inner = f"{Path(__file__)}::{test_a_flow_through_loopback_into_a_bucket_gives_the_local_runners_digest.__name__}"
    allowed = subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0
    command = [
        sys.executable,
        "-c",
        code,
        "namespace" if allowed else "proxy",
        inner,
        f"--basetemp={tmp_path / 'inner'}",
    ]
    dead = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    ended = subprocess.run(
        [*(["unshare", "-rn"] if allowed else []), *command],
        cwd=ROOT,
        env=os.environ | dead | {"NO_PROXY": "127.0.0.1,localhost"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


PORTABLE = "--runner=PortableRunner"


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([PORTABLE, "--environment_type=LOOPBACK"], "name the job service with --job_endpoint HOST:PORT"),
        (["--runner=FlinkRunner", "--environment_type=LOOPBACK"], "its jar with --flink_job_server_jar FILE"),
        (["--runner=SparkRunner", "--environment_type=LOOPBACK"], "its jar with --spark_job_server_jar FILE"),
        ([PORTABLE, "--job_endpoint=embed"], "DOCKER (the default): say with --environment_config"),
        ([PORTABLE, "--job_endpoint=embed", f"--environment_type={SUBPROCESS}"], "say with --environment_config"),
        ([PORTABLE, "--job_endpoint=embed", "--environment_type=EXTERNAL"], "external_service_address is required"),
        (
            [PORTABLE, "--job_endpoint=embed", "--environment_type=LOOP", "--environment_config=x"],
            "Unknown environment type: LOOP",
        ),
        (
            [PORTABLE, "--job_endpoint=embed", "--environment_type=PROCESS", "--environment_config={x"],
            "--environment_type PROCESS",
        ),
    ],
)
def test_options_that_cannot_work_or_would_fetch_something_are_refused(args: list[str], told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)):
        Job(args)


@pytest.mark.parametrize("listens", [False, True])
def test_nothing_or_something_else_at_the_endpoint_is_told_within_its_time_limit(listens: bool) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if listens:
            other.listen()
        endpoint = f"127.0.0.1:{other.getsockname()[1]}"
        args = [PORTABLE, f"--job_endpoint={endpoint}", "--environment_type=LOOPBACK", "--job_server_timeout=1"]
        with pytest.raises(InputError, match=rf"{endpoint}: no job service answered there in 1 s"):
            Job(args)


def test_a_server_that_is_no_job_service_is_told_as_that(pool: str) -> None:
    with grpc.insecure_channel(pool) as channel:
        with pytest.raises(grpc.RpcError) as raised:
            beam_job_api_pb2_grpc.JobServiceStub(channel).GetState(beam_job_api_pb2.GetJobStateRequest(job_id="x"))
    told = portable_runner.told(raised.value)
    assert isinstance(told, InputError)
    assert "what answers there is no job service of Beam" in str(told)


FAILED = "Pipeline job-1 failed in state FAILED: Error running pipeline.\n"
BUG = 'Traceback (most recent call last):\n  File "x.py", line 1, in f\nValueError: too many values'
AGAIN = "\nDuring handling of the above exception, another exception occurred:\n\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{FAILED}featurestore.errors.BudgetExceeded: 2 of 9 [while running 'A/B']\n", BudgetExceeded("2 of 9")),
        (f"{FAILED}{BUG}\n{AGAIN}featurestore.errors.WorkerDied: two\nlines [while running 'A']", WorkerDied("two\nlines")),
        ("java.lang.RuntimeException: Error received from SDK harness for instruction 4: Traceback (most recent call last):\n"
         "  File \"x.py\", line 1, in f\nfeaturestore.errors.AlignmentError: rows [0] differ\n\n"
         "\tat org.apache.beam.runners.X.get(X.java:1)\n", AlignmentError("rows [0] differ")),
        (f"{FAILED}featurestore.errors.InputError: bad\n{AGAIN}{BUG}", None),
        (f"{FAILED}{BUG}", None),
        (f"{FAILED}featurestore.errors.DecodeError: empty: 0 bytes", None),
        (f"{FAILED}featurestore.errors.Absent: x", None),
        (f"{FAILED}ModuleNotFoundError: No module named 'torch'", MissingExtra),
        ("Pipeline job-1 failed in state CANCELLED: unknown error", WorkerDied),
        (f"{FAILED}RuntimeError: Channel closed prematurely.\n", WorkerDied),
    ],
)  # fmt: skip
def test_a_remote_traceback_is_the_braid_error_that_ends_it_and_a_bug_stays_one(
    text: str, expected: BraidError | type[BraidError] | None
) -> None:
    told = portable_runner.told(RuntimeError(text))
    if expected is None or isinstance(expected, type):
        assert isinstance(told, expected or type(None))
    else:
        assert (type(told), str(told)) == (type(expected), str(expected))
