"""The Dataflow job of one stage: its options, the resource hints of its encode step, and its errors in words.

Each stage is a job of its own, so that only encode pays for a view's GPUs and image. From Google's documentation:

- A resource hint turns right fitting on by itself, with or without Prime; right fitting is for batch jobs, excludes FlexRS,
  and must not be combined with the service option `worker_accelerator`. So the hint is all that is sent for a GPU, and a
  user who passes that service option takes the hint's place with it.
  https://cloud.google.com/dataflow/docs/guides/right-fitting
- The hint reads `type:…;count:…;machine_type:…;install-nvidia-driver:…`. An L4 exists on G2 machines only, and they have no use
  without it: with a GPU the machine type goes into the hint, so that the job's other steps do not get that machine. Where
  nobody names one, it is the smallest that has the GPU and the memory.
  https://cloud.google.com/dataflow/docs/gpu/use-l4-gpus https://cloud.google.com/compute/docs/gpus
- Without a version the driver is the default of the workers' Container-Optimized OS: 525 or newer is all that is promised for
  an L4, and CUDA 13 (worker-gpu) needs 580. `latest` is the newest which that OS has.
  https://cloud.google.com/dataflow/docs/gpu/use-gpus
- Python gets one SDK process per vCPU, each of which sees the GPU; `no_use_multiple_sdk_containers` makes it one.
  https://cloud.google.com/dataflow/docs/concepts/gpu-support
- A worker's boot disk has 25 GB, and images with CUDA are large: with a GPU it gets the 50 GB that Google advises.
  https://cloud.google.com/dataflow/docs/shuffle-for-batch https://cloud.google.com/dataflow/docs/gpu/gpu-support
- Autoscaling goes by the bytes that wait. Descriptors are tiny and a shard cannot be split, so encode has a fixed number
  of workers.  https://cloud.google.com/dataflow/docs/horizontal-autoscaling

Not documented, so not sent: the hint `max_active_bundles_per_worker`. One process with one harness thread is one bundle, and
the encode step has two shards of it in flight. No job was ever run on the real service.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from apache_beam.transforms.resources import MinRamHint

from featurestore.errors import BraidError, InputError, JobError, MissingExtra
from featurestore.storage import Storage
from pipelines.beam_options import given, runner

ENCODE = "encode"
DEFAULT_WORKERS = 4
GPU_DISK_GB = 50
MAX_NAME = 63
SHIPPED_BY = {"sdk_container_image", "worker_harness_container_image", "setup_file", "extra_packages"}
"""Options that bring Braid's code to the workers."""
MACHINES = {
    "nvidia-l4": {
        "g2-standard-4": 16,
        "g2-standard-8": 32,
        "g2-standard-12": 48,
        "g2-standard-16": 64,
        "g2-standard-32": 128,
    },
    "nvidia-tesla-t4": {"n1-standard-4": 15, "n1-standard-8": 30, "n1-standard-16": 60, "n1-standard-32": 120},
    "nvidia-tesla-a100": {"a2-highgpu-1g": 85},
    "nvidia-a100-80gb": {"a2-ultragpu-1g": 170},
    "nvidia-h100-80gb": {"a3-highgpu-1g": 234},
}
"""GPU -> the machine types that one of it comes with, smallest first, and their GiB of memory. Not here: what CUDA 13 has no
code for (P4, P100, V100), and what is rented by more than one."""


class Resources(NamedTuple):
    """What the workers of one view's encode job shall be; None leaves it to Dataflow.

    `accelerator` is the GPU's type, one a worker; `min_ram` is per worker, as Beam reads it (16GB).
    """

    accelerator: str | None = None
    min_ram: str | None = None
    workers: int | None = None
    machine_type: str | None = None
    image: str | None = None


def chosen(args: Sequence[str]) -> bool:
    """Whether Beam's options name the DataflowRunner."""
    return runner(args).rpartition(".")[2].lower() in {"dataflow", "dataflowrunner"}


def job_args(
    args: Sequence[str],
    stage: str,
    name: str,
    storage: Storage,
    resources: Resources = Resources(),  # noqa: B008
    shards: int = 1,
    spare_image: str | None = None,
) -> list[str]:
    """The options of one stage's job: the user's, which win, and what they leave open. Other runners' come back as they are.

    The machine type of a view's GPU is part of the hint (an L4 exists on G2 alone), which no option of the job's pool touches
    but `--machine_type` of such a machine; pass `--resource_hints accelerator=…` to take its place. One thing of the spec wins
    over the user's options: a view's own image, for its encode job, because `--sdk_container_image` is for every job of a run.

    Args:
        args: Beam's options, from the user.
        stage: which stage.
        name: of the corpus, view, space, index or training set.
        storage: the store.
        resources: of the view; for encode alone.
        shards: how many there are to do: more workers would have none.
        spare_image: an image that holds Braid, where nobody names one for this job.

    Raises:
        InputError: an option is missing or wrong, or workers cannot reach the store.
    """
    if not chosen(args):
        return list(args)
    options = given(args)
    image = None if options.keys() & SHIPPED_BY else spare_image
    _check(options, storage, resources.image or image)
    ours = ["--number_of_worker_harness_threads=1", *([f"--sdk_container_image={image}"] if image else [])]
    if stage == ENCODE:
        ours += _encode_args(options, resources, shards)
    last = [f"--sdk_container_image={resources.image}"] if resources.image else []
    if "template_location" not in options:
        last.append(f"--job_name={job_name(options, stage, name, storage)}")
    return [*ours, *args, *last]


def _encode_args(options: dict[str, Any], resources: Resources, shards: int) -> list[str]:
    args = []
    if "flexrs_goal" in options and _hints(options, resources):
        raise InputError("--flexrs_goal excludes resource hints: leave it out, or accelerator and min_ram of the view")
    if "max_num_workers" not in options and options.get("autoscaling_algorithm", "NONE") == "NONE":
        workers = max(1, min(resources.workers or DEFAULT_WORKERS, shards))
        args += ["--autoscaling_algorithm=NONE", f"--num_workers={workers}"]
    if "use_multiple_sdk_containers" not in options.get("experiments", []):
        # Not for GPUs alone: a process's threads use every core, and each process would hold a copy of the model.
        args.append("--experiments=no_use_multiple_sdk_containers")
    if resources.machine_type and "accelerator" not in _hints(options, resources):
        args.append(f"--machine_type={resources.machine_type}")
    if resources.accelerator and "disk_size_gb" not in options:
        args.append(f"--disk_size_gb={GPU_DISK_GB}")
    return args


def hints(args: Sequence[str], resources: Resources) -> dict[str, str]:
    """The resource hints of a view's encode step: what the user's own options do not say; none for other runners.

    Raises:
        InputError: nobody names a machine type for the GPU, and Braid knows none that has it and the memory.
    """
    return _hints(given(args), resources) if chosen(args) else {}


def _hints(options: dict[str, Any], resources: Resources) -> dict[str, str]:
    theirs, found = _theirs(options), {}
    if resources.accelerator and "accelerator" not in theirs:
        machine = f"machine_type:{_machine(options, resources)}"
        found["accelerator"] = f"type:{resources.accelerator};count:1;{machine};install-nvidia-driver:latest"
    if resources.min_ram and "min_ram" not in theirs:
        found["min_ram"] = resources.min_ram
    return found


def _theirs(options: dict[str, Any]) -> dict[str, str]:
    """The hints of the user's own options."""
    found = [hint.partition("=")[::2] for hint in options.get("resource_hints", [])]
    services = dict(option.partition("=")[::2] for option in options.get("dataflow_service_options", []))
    return dict(found) | ({"accelerator": services["worker_accelerator"]} if "worker_accelerator" in services else {})


def _machine(options: dict[str, Any], resources: Resources) -> str:
    """The machine type of a view's GPU: the spec's, the user's where it comes with that GPU, or the smallest that will do."""
    gpu, memory = resources.accelerator, _theirs(options).get("min_ram", resources.min_ram)
    if resources.machine_type:
        return resources.machine_type
    if gpu not in MACHINES:
        raise InputError(
            f"views.<view>.resources.accelerator {gpu!r}: Braid knows no machine type that has one; write machine_type beside "
            f"it, or take one of: {', '.join(MACHINES)}"
        )
    known = MACHINES[gpu]
    if options.get("machine_type") in known:
        return str(options["machine_type"])
    least = int(*MinRamHint.parse(memory).values()) if memory else 0
    found = next((machine for machine, gib in known.items() if gib << 30 >= least), None)
    if found is None:
        raise InputError(
            f"min_ram {memory}: no machine with one {gpu} has so much memory ({list(known)[-1]} has {list(known.values())[-1]} "
            "GiB); lower views.<view>.resources.min_ram, or write a machine_type beside it"
        )
    return found


def choice(args: Sequence[str], resources: Resources) -> str | None:
    """Which machine type was chosen for a view's GPU, in words; None where the user named it, or none is sent."""
    if resources.machine_type or "accelerator" not in hints(args, resources):
        return None
    machine, memory = _machine(given(args), resources), resources.min_ram
    if machine == given(args).get("machine_type"):
        return None
    return (
        f"on {machine}, the smallest machine with one {resources.accelerator}{f' and {memory}' if memory else ''}; "
        "resources.machine_type of the view names another"
    )


def accelerator(args: Sequence[str], resources: Resources) -> str | None:
    """The GPU that the workers of a view's encode job are rented with, by the spec or by the user's options; None: no GPU."""
    return (resources.accelerator or _theirs(given(args)).get("accelerator")) if chosen(args) else None


def template(args: Sequence[str]) -> bool:
    """Whether the options ask for a job's template, which holds one job and runs nothing."""
    return chosen(args) and "template_location" in given(args)


def job_name(options: dict[str, Any], stage: str, name: str, storage: Storage) -> str:
    """One name per store, stage and name: Dataflow refuses a second active job of the same, so no step runs twice at once."""
    prefix = options.get("job_name") or "braid"
    if not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", prefix) or len(prefix) > MAX_NAME // 2:
        raise InputError(
            f"--job_name={prefix!r}: small letters, digits and '-', beginning with a letter, at most {MAX_NAME // 2}: the "
            "jobs of a run are named <job_name>-<stage>-<name>-<hash>"
        )
    key = hashlib.sha256("\n".join([storage.uri, stage, name]).encode()).hexdigest()[:8]
    readable = f"{prefix}-{stage}-{name.replace('_', '-')}"[: MAX_NAME - 9].rstrip("-")
    return f"{readable}-{key}"


def _check(options: dict[str, Any], storage: Storage, image: str | None) -> None:
    missing = [f"--{each}" for each in ("project", "region", "temp_location") if not options.get(each)]
    if missing:
        raise InputError(f"--runner DataflowRunner needs {', '.join(missing)} too: write them after --")
    rehearsal = "localhost" in options.get("dataflow_endpoint", "")
    for each in ("temp_location", "staging_location", "template_location"):
        if not rehearsal and not options.get(each, "gs://").startswith("gs://"):
            raise InputError(f"--{each}={options[each]}: Dataflow reads gs://bucket/folder; name one")
    if storage.is_local:
        raise InputError(
            f"store.uri {storage.uri!r} is a folder of this machine, which Dataflow's workers cannot see; name a store on "
            "s3://… or gs://…"
        )
    if storage.media_root is not None and "://" not in storage.media_root:
        raise InputError(
            f"the corpus refers to values below {storage.media_root!r}, a folder of this machine, which Dataflow's workers "
            "cannot see; upload them and name that place as store.media_root, or shard with media: copy into a new store"
        )
    if not image and not options.keys() & SHIPPED_BY:
        raise InputError(
            "Dataflow's workers need Braid itself: name an image of it (infra/docker) in views.<view>.resources.image or "
            "after -- as --sdk_container_image=…, or pass a wheel of it as --extra_package=…"
        )
    _require_packages()


def check_source(args: Sequence[str], path: str) -> None:
    """InputError where Dataflow's workers would have to read a source of this machine."""
    if chosen(args) and ("://" not in path or path.startswith(("file:", "local:"))):
        raise InputError(
            f"corpus.source.path {path!r} is on this machine, which Dataflow's workers cannot see; upload it and the files it "
            "names, or run `braid shard` here into the same store first: the other stages do not read the source"
        )


def _require_packages() -> None:
    try:
        # Beam takes every error for one to try again where apitools is not installed.
        import apitools.base.py  # noqa: F401
        from apache_beam.runners.dataflow.internal import apiclient  # noqa: F401
    except ImportError as error:
        raise MissingExtra(
            f"DataflowRunner needs packages that are not installed ({error}): pip install 'braid[dataflow]'"
        ) from error


def told(error: Exception, args: Sequence[str]) -> BraidError | None:
    """What an error of submitting or running a Dataflow job means to a person; None for what is none of those."""
    if not chosen(args):
        return None
    from apache_beam.runners.dataflow.dataflow_runner import DataflowRuntimeException
    from apache_beam.runners.dataflow.internal.apiclient import DataflowJobAlreadyExistsError
    from google.api_core.exceptions import GoogleAPICallError
    from google.auth.exceptions import GoogleAuthError
    from requests.exceptions import RequestException

    from pipelines import portable_runner

    options = given(args)
    job = f"Dataflow job {options.get('job_name', '')} (project {options['project']}, region {options['region']})"
    if isinstance(error, DataflowRuntimeException):
        return portable_runner.told(error) or _failed(job, error, options)
    if isinstance(error, DataflowJobAlreadyExistsError):
        return _refused(job, 409, str(error))
    if isinstance(error, GoogleAPICallError):
        return _refused(job, int(error.code or 0), str(error.message))
    if isinstance(error, GoogleAuthError):
        return JobError(
            f"{job}: no credentials: {_line(str(error))}; sign in with: gcloud auth application-default login"
        )
    if isinstance(error, OSError) and re.search(r"\b403\b|does not have storage\.", str(error)):
        # Beam makes an OSError of a bucket's refusal.
        return _refused(job, 403, str(error))
    if isinstance(error, RequestException | OSError):
        return JobError(
            f"{job}: cannot be submitted: {_line(str(error))}; check the network and --temp_location, and try again"
        )
    return None


def _refused(job: str, code: int, message: str) -> BraidError:
    # Over REST Google's client puts the request before what the service says.
    said = _line(re.sub(r"^[A-Z]+ https?://\S+: ", "", message))
    if code == 409:
        return JobError(
            f"{job} is active already: {said}; wait for it, or end it with `gcloud dataflow jobs cancel`, and run this again: "
            "what is done is kept"
        )
    if code == 429 or "quota" in message.lower():
        return JobError(
            f"{job} is over a quota: {said}; ask for more, lower views.<view>.resources.workers, or name another --region"
        )
    if code in (401, 403):
        return JobError(
            f"{job}: not allowed: {said}; infra/dataflow/README.md lists the rights that each account needs"
        )
    if 400 <= code < 500:
        return InputError(f"{job} is refused: {said}; correct the options after -- or views.<view>.resources")
    return JobError(f"{job}: Dataflow answers with an error of its own ({code}): {said}; try again later")


def _failed(job: str, error: Any, options: dict[str, Any]) -> BraidError:
    """A job that ended in another state than done, by what its log said last."""
    state = error.result.state
    said = str(error).partition("Error:\n")[2].strip()
    why = f": {_line(said.splitlines()[-1])}" if said and said != "None" else ""
    return JobError(
        f"{job} ended in state {state}{why}; nothing of it was published and what is done is kept: see "
        f"{console(options, error.result.job_id())}, mend it and run it again"
    )


def console(options: dict[str, Any], job_id: str) -> str:
    """Where a job can be looked at."""
    return f"https://console.cloud.google.com/dataflow/jobs/{options['region']}/{job_id}?project={options['project']}"


def _line(text: str) -> str:
    return " ".join(text.split())[:500].rstrip(".")
