"""A loopback server that stands for the Dataflow API, and what Braid submitted to it.

Beam speaks REST to an endpoint of localhost and stages into local folders. The server keeps the job and the staged pipeline as
they came; it can also carry the pipeline out, from the staged bytes alone, as the service's workers would.
"""

import hashlib
import json
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import s3fs
from apache_beam.metrics import monitoring_infos
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability import python_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from featurestore.encoders import runtime
from tests import loopback_s3

PROJECT, REGION = "rehearsal", "europe-west4"
DONE, FAILED, RUNNING = "JOB_STATE_DONE", "JOB_STATE_FAILED", "JOB_STATE_RUNNING"


class Sent(NamedTuple):
    """One job as it reached the service: its JSON, its pipeline, and sha256 of each staged file.

    `largest`: PCollection -> bytes of its largest element, as Beam measured it where the job was carried out; `rented`: what
    its workers looked for then, each a job and a GPU.
    """

    job: dict[str, Any]
    pipeline: beam_runner_api_pb2.Pipeline
    staged: dict[str, str]
    largest: dict[str, int]
    rented: set[tuple[str, str | None]]

    @property
    def images(self) -> set[str]:
        """Of the containers that its steps run in."""
        payloads = [each.payload for each in self.pipeline.components.environments.values()]
        return {beam_runner_api_pb2.DockerPayload.FromString(payload).container_image for payload in payloads}

    @property
    def pool(self) -> dict[str, Any]:
        (pool,) = self.job["environment"]["workerPools"]
        return dict(pool)

    @property
    def experiments(self) -> list[str]:
        return list(self.job["environment"]["experiments"])


class Refusal(NamedTuple):
    """An answer of the API that is an error."""

    code: int
    status: str
    message: str


class Service:
    """The API of one test; `answer` says what becomes of a job: its state, or a refusal."""

    def __init__(self, staging: Path) -> None:
        self.staging, self.sent, self.asked = staging, list[Sent](), list[str]()
        self.answer: Callable[[Sent], str | Refusal] = lambda sent: DONE
        self.later: list[str] = []
        """States that a job has when it is asked for again, the last one for good."""
        self.messages: list[str] = []
        self.arrived = threading.Event()
        self.port = 0

    def args(self, *more: str) -> list[str]:
        """Beam's options that submit a job here."""
        return [
            "--runner=DataflowRunner",
            f"--project={PROJECT}",
            f"--region={REGION}",
            f"--temp_location={self.staging}",
            f"--dataflow_endpoint=http://localhost:{self.port}",
            "--no_auth",
            *more,
        ]

    def create(self, job: dict[str, Any]) -> dict[str, Any] | Refusal:
        pipeline = beam_runner_api_pb2.Pipeline()
        pipeline.ParseFromString(Path(job["environment"]["sdkPipelineOptions"]["options"]["pipelineUrl"]).read_bytes())
        packages = [package["name"] for package in job["environment"]["workerPools"][0].get("packages", [])]
        staged = {name: hashlib.sha256((self.staging / name).read_bytes()).hexdigest() for name in packages}
        self.sent.append(Sent(job, pipeline, staged, {}, set()))
        state = self.answer(self.sent[-1])
        self.arrived.set()
        return state if isinstance(state, Refusal) else self._job(state)

    def get(self, path: str) -> dict[str, Any]:
        self.asked.append(path)
        if path.endswith("/metrics"):
            return {}
        if path.endswith("/messages"):
            times = [f"2026-01-01T00:00:{second:02}Z" for second in range(len(self.messages))]
            texts = zip(times, self.messages, strict=True)
            return {
                "jobMessages": [
                    {"id": when, "time": when, "messageText": text, "messageImportance": "JOB_MESSAGE_ERROR"}
                    for when, text in texts
                ]
            }
        return self._job(self.later.pop(0) if len(self.later) > 1 else self.later[0])

    def _job(self, state: str) -> dict[str, Any]:
        name = self.sent[-1].job["name"]
        return {
            "id": "2026-01-01_00_00_00-1",
            "name": name,
            "projectId": PROJECT,
            "location": REGION,
            "currentState": state,
        }


@contextmanager
def serving(staging: Path) -> Iterator[Service]:
    """A service that stages into a folder."""
    staging.mkdir(parents=True, exist_ok=True)
    service = Service(staging)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path.partition("?")[0] == f"/v1b3/projects/{PROJECT}/locations/{REGION}/jobs"
            self._reply(service.create(json.loads(self.rfile.read(int(self.headers["content-length"])))))

        def do_GET(self) -> None:
            self._reply(service.get(self.path.partition("?")[0]))

        def _reply(self, answer: dict[str, Any] | Refusal) -> None:
            refused = answer if isinstance(answer, Refusal) else None
            body = json.dumps({"error": refused._asdict()} if refused else answer).encode()
            self.send_response(refused.code if refused else 200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def carry_out(sent: Sent, on_gpus: bool = True) -> None:
    """Runs a job from its staged pipeline, in this process instead of its containers.

    `on_gpus`: as if there were one; else the workers look for it themselves.
    """
    pipeline = beam_runner_api_pb2.Pipeline()
    pipeline.CopyFrom(sent.pipeline)
    for environment in pipeline.components.environments.values():
        environment.urn, environment.payload = python_urns.EMBEDDED_PYTHON, b""
    with pytest.MonkeyPatch.context() as patch:
        if on_gpus:
            patch.setattr(runtime, "check_gpu", lambda job, accelerator: sent.rented.add((job, accelerator)))
        outcome = FnApiRunner().run_via_runner_api(pipeline, PipelineOptions())
        outcome.wait_until_finish()
    for info in outcome.monitoring_infos():
        if info.urn == monitoring_infos.SAMPLED_BYTE_SIZE_URN:
            *_, largest = monitoring_infos.extract_distribution(info)
            sent.largest[info.labels["PCOLLECTION"]] = largest


def carrying_out(service: Service, on_gpus: bool = True) -> Callable[[Sent], str]:
    """An answer that carries each job out, and fails as the service does: with the worker's traceback in the log."""

    def answer(sent: Sent) -> str:
        try:
            carry_out(sent, on_gpus)
        except Exception:
            service.messages, service.later = [traceback.format_exc()], [RUNNING, FAILED]
            return RUNNING
        return DONE

    return answer


@contextmanager
def object_store(bucket: str) -> Iterator[str]:
    """A loopback S3 with one bucket; gives its endpoint, which the environment names too."""
    with loopback_s3.loopback_s3() as endpoint, pytest.MonkeyPatch.context() as patch:
        # What no storage model describes, the files that a manifest names, is found through it.
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_REGION", loopback_s3.REGION)
        _client(endpoint).mkdir(bucket)
        yield endpoint


def _client(endpoint: str) -> s3fs.S3FileSystem:
    return s3fs.S3FileSystem(endpoint_url=endpoint, skip_instance_cache=True)


def upload(folder: Path, endpoint: str, target: str) -> None:
    """Copies a folder to an object store."""
    _client(endpoint).put(f"{folder}/", target, recursive=True)
