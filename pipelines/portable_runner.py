"""Jobs on a job service (Beam's own, Flink's, Spark's): what is checked before, and what its errors mean.

The worker that raised is another process, maybe in another language's runner: what arrives here is the text of its traceback.
"""

import functools
import logging
import re
import threading

import grpc  # type: ignore[import-untyped]
from apache_beam.options.pipeline_options import (
    DebugOptions,
    FlinkRunnerOptions,
    PipelineOptions,
    PortableOptions,
    SparkRunnerOptions,
)
from apache_beam.pipeline import Pipeline
from apache_beam.portability.python_urns import SUBPROCESS_SDK as SUBPROCESS
from apache_beam.runners.portability import portable_runner
from apache_beam.transforms.environments import Environment

from featurestore import errors
from featurestore.errors import BraidError, InputError, MissingExtra, WorkerDied

__all__ = ["check", "told"]

CONNECT_S = 30
"""How long to wait for the job service; a smaller `--job_server_timeout` (Beam's default: 300 s) sets another."""
_JARS = {
    "FlinkRunner": (FlinkRunnerOptions, "flink_job_server_jar"),
    "SparkRunner": (SparkRunnerOptions, "spark_job_server_jar"),
}
_GO_ON = "nothing was published and what is done is kept: run it again"


def check(pipeline: Pipeline) -> None:
    """Raises InputError where a job service cannot be reached, or where Beam would fetch what runs the job over the network."""
    runner, options = pipeline.runner, pipeline.options.view_as(PortableOptions)
    if not isinstance(runner, portable_runner.PortableRunner):
        return
    name = type(runner).__name__
    if options.job_endpoint not in (None, "embed"):
        _reach(options.job_endpoint, min(options.job_server_timeout, CONNECT_S))
    elif options.job_endpoint is None:
        _require_server(name, pipeline.options)
    _require_environment(options)
    # Else Beam runs `pip freeze` for each job, to log it: more than a second.
    pipeline.options.view_as(DebugOptions).add_experiment("disable_logging_submission_environment")
    quiet()


def _reach(endpoint: str, timeout_s: float) -> None:
    with grpc.insecure_channel(endpoint) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=timeout_s)
        except grpc.FutureTimeoutError:
            raise InputError(
                f"--job_endpoint {endpoint}: no job service answered there in {timeout_s} s; start it, or correct host and port"
            ) from None


def _require_server(name: str, options: PipelineOptions) -> None:
    view, jar = _JARS.get(name, (PortableOptions, ""))
    if not (jar and getattr(options.view_as(view), jar)):
        raise InputError(
            f"--runner {name}: name the job service with --job_endpoint HOST:PORT"
            + (f", or its jar with --{jar} FILE; Braid has none fetched over the network" if jar else "")
        )


def _require_environment(options: PortableOptions) -> None:
    kind, config = options.environment_type, options.environment_config
    allowed = (
        "allowed: LOOPBACK (this process), EXTERNAL with --environment_config HOST:PORT of a worker pool, PROCESS with JSON "
        f"that names its command, DOCKER with an image that holds Braid, {SUBPROCESS} with a worker's command line"
    )
    if kind != "LOOPBACK" and not (config or options.environment_options):
        raise InputError(
            f"--environment_type {kind or 'DOCKER (the default)'}: say with --environment_config what workers are; {allowed}"
        )
    try:
        Environment.from_options(options)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"--environment_type {kind}, --environment_config {config!r}: {error}; {allowed}") from error


@functools.cache
def quiet() -> None:
    """Keeps from the screen what Beam's client prints of a failed job besides raising it; from now on, because its thread may
    come to it after the job's error was raised.
    """

    def told_anyway(record: logging.LogRecord) -> bool:
        return record.funcName != "read_messages"

    def hook(args: threading.ExceptHookArgs) -> None:
        if args.thread is None or args.thread.name != "wait_until_finish_read":
            before(args)

    before = threading.excepthook
    logging.getLogger().addFilter(told_anyway)
    threading.excepthook = hook


def told(error: Exception) -> BraidError | None:
    """What a runner's error means to the person who ran the job; None where it may be a bug, which shows its traceback."""
    if isinstance(error, grpc.RpcError):
        return _told_by_grpc(error)
    text = str(error)
    if raised := _raised(text):
        return raised
    if state := re.match(r"Pipeline \S+ failed in state (CANCELLED|CANCELLING|DRAINED|STOPPED|UPDATED):", text):
        return WorkerDied(f"the job service reports the job as {state[1]}: somebody ended it there; {_GO_ON}")
    if text.rstrip().endswith("Channel closed prematurely."):
        return WorkerDied(
            "a worker of the job service ended in the middle of its work (killed, or out of memory: see the job service's "
            f"log); {_GO_ON}"
        )
    if lacking := re.search(r"^ModuleNotFoundError: No module named '([\w.]+)'", text, re.MULTILINE):
        return MissingExtra(
            f"the workers have no Python package {lacking[1]!r}; install braid[run], the version that submits, where they run"
        )
    if unknown := re.search(r"KeyError: '(beam:env:[\w:]+)'\s*\Z", text):
        return InputError(f"--environment_type: the job service knows no {unknown[1]}; name another")
    if pool := re.search(r"StartWorker.*?details = \"([^\"]*)\"", text, re.DOTALL):
        return InputError(
            f"the job service reaches no worker pool at --environment_config ({pool[1]}); start it or correct it"
        )
    return None


def _told_by_grpc(error: grpc.RpcError) -> BraidError | None:
    code, details = error.code(), error.details()
    if code == grpc.StatusCode.UNAVAILABLE:
        return WorkerDied(f"the job service went away ({details}); see its log; {_GO_ON}")
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return InputError(
            f"--job_endpoint: what answers there is no job service of Beam ({details}); correct host and port"
        )
    return None


def _raised(text: str) -> BraidError | None:
    """The BraidError that ends the last traceback in a text."""
    last = re.split(r"During handling of the above exception|The above exception was the direct cause", text)[-1]
    named = re.compile(
        r"^(?:\S+: )*featurestore\.errors\.(\w+): (.+?)(?: \[while running '|\n\n|\n\s+at |\nTraceback |\s*\Z)",
        re.DOTALL | re.MULTILINE,
    )
    found = [(match[1], match[2]) for match in named.finditer(last)]
    kind = getattr(errors, found[-1][0], None) if found else None
    # A DecodeError is quarantined where it is raised: one that gets here is a bug.
    return kind(found[-1][1]) if kind and kind is not errors.DecodeError else None
