"""Beam's DaskRunner, mended where it loses data, runs everything on one worker or waits for ever.

Translates what Braid's jobs are made of: Create, ParDo, GroupByKey and Flatten in the global window. The
client holds the job: where it ends, Dask drops what is not done, and `braid run` goes on from what lies in the store.
"""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from pathlib import Path
from typing import Any

import apache_beam as beam
import dask
import dask.bag as db
import distributed
from apache_beam.metrics.metric import MetricResults
from apache_beam.pipeline import AppliedPTransform, PipelineVisitor
from apache_beam.runners.common import DoFnContext, DoFnInvoker, DoFnSignature, _OutputHandler
from apache_beam.runners.dask import dask_runner, overrides
from apache_beam.runners.dask import transform_evaluator as evaluator
from apache_beam.runners.direct.direct_metrics import DirectMetrics
from apache_beam.runners.runner import PipelineState
from apache_beam.transforms.window import GlobalWindows
from dask.utils import parse_timedelta
from distributed.scheduler import KilledWorker, NoValidWorkerError, NoWorkerError

from featurestore.errors import InputError, WorkerDied

CONNECT_S = 30
"""How long to wait for the scheduler's answer; `--dask_connection_timeout` sets another."""
NO_WORKER_S = 120
"""How long a job may be without any worker; `distributed.scheduler.no-workers-timeout` of Dask's config sets another."""
TASKS_PER_THREAD = 4
"""Tasks that a GroupByKey ends in for each thread of the cluster: the last ones even out the ends."""
SAME = ("apache-beam", "braid", "cloudpickle", "dask", "distributed", "numpy", "pyarrow")
"""Packages that must have the client's version everywhere, or tasks do not unpickle and Parquet has other bytes."""
_POLL_S = 1.0
_GO_ON = "Nothing was published; run it again: what lies finished in the store is kept"


class _Create(evaluator.Create):
    """One task for each element (Beam: for 128), so that any worker may do it, and again where the first one died.

    Under a name of its own: Dask takes equal names for equal work, and a job that is run again is not to get old results.
    """

    def apply(self, input_bag: Any, side_inputs: Any = None) -> db.Bag:
        name, values = f"create-{uuid.uuid4().hex}", list(self.transform.values)
        return db.Bag({(name, number): [value] for number, value in enumerate(values)}, name, len(values))


class _ParDo(evaluator.ParDo):
    """Keeps what `finish_bundle` yields (Beam: lost), and shares no receiver between tasks (Beam: one for all of a process)."""

    def apply(self, input_bag: db.Bag, side_inputs: Any = None) -> db.Bag:
        if side_inputs:
            raise NotImplementedError(f"{self.transform.label}: side inputs are not translated for Dask")
        args, kwargs = self.transform.raw_side_inputs
        return input_bag.map_partitions(_run_bundle, self.transform.fn, self.transform.label, tuple(args), kwargs)


def _run_bundle(elements: Iterable[Any], fn: beam.DoFn, label: str, args: Sequence[Any], kwargs: Any) -> list[Any]:
    """Runs one partition through a DoFn; an empty one is not set up for. Teardown follows an error too."""
    elements = list(elements)
    if not elements:
        return []
    receivers = evaluator.OneReceiver()
    handler = _OutputHandler(GlobalWindows(), receivers[None], receivers, None, None, False, False)
    invoker = DoFnInvoker.create_invoker(
        DoFnSignature(fn),
        handler,
        context=DoFnContext(label, state=None),
        input_args=list(args),
        input_kwargs=dict(kwargs),
        bundle_finalizer_param=beam.DoFn.BundleFinalizerParam(),
    )
    invoker.invoke_setup()
    try:
        invoker.invoke_start_bundle()
        for element in elements:
            invoker.invoke_process(GlobalWindows.windowed_value(element))
        invoker.invoke_finish_bundle()
    finally:
        invoker.invoke_teardown()
    return [each.value for each in receivers.values]


class _GroupByKey(evaluator.GroupByKey):
    """Groups on one worker by equality (Beam: by `hash()`, which differs between processes, over n² tasks).

    What follows is spread again: into as many tasks as there were before, or as keep every thread busy.
    """

    def apply(self, input_bag: db.Bag, side_inputs: Any = None) -> db.Bag:
        tasks = max(input_bag.npartitions, TASKS_PER_THREAD * self.bag_kwargs["threads"])
        return input_bag.repartition(npartitions=1).map_partitions(_group).repartition(npartitions=tasks)


def _group(pairs: Iterable[tuple[Any, Any]]) -> list[tuple[Any, list[Any]]]:
    groups: dict[Any, list[Any]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(evaluator.defenestrate(value))
    return list(groups.items())


_OPS = evaluator.TRANSLATIONS | {
    overrides._Create: _Create,
    beam.ParDo: _ParDo,
    overrides._GroupByKeyOnly: _GroupByKey,
}


class _Translate(PipelineVisitor):
    """Beam's visitor, with the operations above instead of its own."""

    def __init__(self, threads: int) -> None:
        self.bags: dict[AppliedPTransform, Any] = {}
        self._options = {"threads": threads}

    def visit_transform(self, node: AppliedPTransform) -> None:
        """Adds the bag of one transform; those before it have theirs."""
        op = _OPS.get(type(node.transform), evaluator.NoOp)(node, self._options)
        bags = [self.bags.get(value.producer) for value in node.inputs]
        self.bags[node] = op.apply(bags if isinstance(op, evaluator.Flatten) or len(bags) > 1 else bags[0])


class DaskRunner(dask_runner.DaskRunner):
    """Runs a pipeline on the Dask scheduler at `--dask_client_address` (or in `--dask_scheduler_file`)."""

    def run_pipeline(self, pipeline: beam.Pipeline, options: Any) -> "DaskRunnerResult":
        """Submits the pipeline, whose last transform's bag is what is computed.

        Raises:
            InputError: no address, or packages that differ between the client, the scheduler and a worker.
            WorkerDied: no scheduler answers at the address, or it has no worker within the time limit.
        """
        settings = options.view_as(dask_runner.DaskOptions).get_all_options(drop_default=True, current_only=True)
        client = _connect({"timeout": CONNECT_S} | settings)
        try:
            _check_versions(client)
            pipeline.replace_all(overrides.dask_overrides())
            translated = _Translate(client.scheduler_info(n_workers=0)["total_threads"])
            pipeline.visit(translated)
            return DaskRunnerResult(client, [client.compute(list(translated.bags.values())[-1])])
        except BaseException:
            client.close()
            raise


def _connect(settings: dict[str, Any]) -> distributed.Client:
    """A client of a scheduler that has a worker."""
    address = _address(settings)
    for name in ("distributed", "distributed.client"):
        # What ends a job is raised; Dask would print its tracebacks besides.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        # Dask's own client waits for ever where something accepts its connection and says nothing.
        asyncio.run(asyncio.wait_for(_handshake(address), settings["timeout"]))
        client = distributed.Client(**settings | {"address": address})
    except (OSError, ValueError, MemoryError, TimeoutError) as error:
        said = f"{type(error).__name__} {error}".strip()
        raise WorkerDied(
            f"no Dask scheduler answers at {address} within {settings['timeout']} s ({said}); is it running there?"
        ) from error
    try:
        client.wait_for_workers(1, timeout=_no_worker_s())
    except TimeoutError as error:
        client.close()
        raise WorkerDied(_no_worker(address)) from error
    return client


def _address(settings: dict[str, Any]) -> str:
    file = settings.pop("scheduler_file", None)
    if not file and not settings.get("address"):
        raise InputError("DaskRunner needs a scheduler: give --dask_client_address tcp://HOST:8786 after --")
    try:
        return str(json.loads(Path(file).read_text())["address"] if file else settings["address"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"--dask_scheduler_file {file}: {error}; it is what `dask scheduler --scheduler-file` wrote"
        ) from error


async def _handshake(address: str) -> None:
    arguments = distributed.Security().get_connection_args("client")
    (await distributed.comm.connect(address, **arguments)).abort()


def _no_worker_s() -> float:
    return float(parse_timedelta(dask.config.get("distributed.scheduler.no-workers-timeout") or NO_WORKER_S))


def _no_worker(address: str) -> str:
    return (
        f"the Dask scheduler at {address} has had no worker for {_no_worker_s():.0f} s; start some with `dask worker "
        f"{address}`. {_GO_ON}"
    )


def _check_versions(client: distributed.Client) -> None:
    """InputError where the scheduler or a worker has another Python or other packages than this process."""
    found = client.get_versions(packages=SAME)
    own = _versions(found["client"])
    for host, versions in [("the scheduler", found["scheduler"]), *sorted(found["workers"].items())]:
        other = _versions(versions)
        differ = [f"{name} {other[name] or 'missing'} (here {own[name]})" for name in own if other[name] != own[name]]
        if differ:
            raise InputError(
                f"{host} of Dask has {', '.join(differ)}: install the same Python and packages everywhere, with braid's "
                "constraints.txt"
            )


def _versions(found: Any) -> dict[str, str | None]:
    packages = found["packages"]
    return {"python": ".".join(packages["python"].split(".")[:2])} | {name: packages.get(name) for name in SAME}


class DaskRunnerResult(dask_runner.DaskRunnerResult):
    """Waits with a time limit on a cluster without workers, says what ended the job, and closes the client."""

    def wait_until_finish(self, duration: float | None = None) -> Any:
        """Waits for the end, or `duration` milliseconds; an error that a worker raised is raised as itself.

        Raises:
            WorkerDied: every worker that tried a task died of it, no worker was left, or the scheduler went away.
            TimeoutError: the job goes on after `duration`, and is cancelled.
        """
        self._state = PipelineState.FAILED
        address = self.client.scheduler.address
        try:
            self._wait(address, duration)
            self.futures[0].result()
        except (KilledWorker, NoValidWorkerError, NoWorkerError) as error:
            raise WorkerDied(f"{error} {_GO_ON}") from error
        except CancelledError as error:
            raise WorkerDied(
                f"the Dask scheduler at {address} is gone or gave the job up ({error}). {_GO_ON}"
            ) from error
        finally:
            self.client.close()
        self._state = PipelineState.DONE
        return PipelineState.DONE

    def _wait(self, address: str, duration: float | None) -> None:
        begun = manned = time.monotonic()
        while not self.futures[0].done():
            with suppress(TimeoutError, CancelledError):
                distributed.wait(self.futures, timeout=_POLL_S)
                return
            now = time.monotonic()
            if duration is not None and now - begun > duration / 1000:
                raise TimeoutError(f"the job is not done after {duration / 1000:.0f} s and is cancelled")
            # A connection that breaks cancels the futures, in a while.
            with suppress(OSError):
                manned = now if self.client.scheduler_info(n_workers=0)["n_workers"] else manned
            if now - manned > _no_worker_s():
                raise WorkerDied(_no_worker(address))

    def metrics(self) -> MetricResults:
        """Beam's metrics of the job: none, Dask carries none back."""
        return DirectMetrics()
