"""The options and hints of a Dataflow job: the user's, the view's, and what is refused before anything is sent."""

import re
import sys

import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from featurestore.errors import InputError, MissingExtra
from featurestore.storage import Storage
from pipelines import dataflow
from pipelines.beam_options import given
from pipelines.dataflow import Resources, accelerator, check_source, choice, hints, job_args

STORE = Storage(uri="gs://shelf/store")
ARGS = ["--runner=DataflowRunner", "--project=p-1", "--region=europe-west4", "--temp_location=gs://shelf/tmp"]
GPU = Resources("nvidia-l4", "16GB", 8, "g2-standard-8", "docker.example/braid/gpu:1")
ACCELERATOR = "type:nvidia-l4;count:1;machine_type:g2-standard-8;install-nvidia-driver:latest"
SHIPPED = "--extra_package=braid.whl"


def options(*args: str, resources: Resources = GPU, stage: str = "encode", shards: int = 100) -> dict[str, object]:
    """Beam's view of a job's options, of the user's `args`."""
    return given(job_args([*ARGS, *args], stage, "image", STORE, resources, shards))


def test_another_runner_gets_the_users_options_as_they_are_and_no_hints() -> None:
    args = ["--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner", "--direct_num_workers=1"]
    assert job_args(args, "encode", "image", Storage.of("/store"), GPU, 9) == args
    assert job_args([], "encode", "image", Storage.of("/store"), GPU, 9) == []
    # Its options may be known only once its module is imported.
    assert job_args(["--runner=DaskRunner", "--dask_client_address=x"], "encode", "image", STORE, GPU, 9)[1:]
    assert hints(args, GPU) == hints([], GPU) == {}


@pytest.mark.parametrize("runner", ["DataflowRunner", "dataflow", "apache_beam.runners.dataflow.DataflowRunner"])
@pytest.mark.parametrize("written", ["--runner={}", "--runner {}"])
def test_dataflow_is_known_by_each_of_its_names(runner: str, written: str) -> None:
    assert dataflow.chosen(written.format(runner).split())


def test_encode_has_a_fixed_number_of_workers_one_process_and_the_views_image() -> None:
    found = options()
    assert (found["num_workers"], found["autoscaling_algorithm"]) == (8, "NONE")
    assert found["experiments"] == ["no_use_multiple_sdk_containers"]
    assert found["number_of_worker_harness_threads"] == 1
    assert found["sdk_container_image"] == "docker.example/braid/gpu:1"
    # The machine of the GPU comes with the hint: the job's other steps do not get it.
    assert "machine_type" not in found
    assert "dataflow_service_options" not in found


def test_there_are_never_more_workers_than_shards() -> None:
    assert options(shards=3)["num_workers"] == 3
    assert options(resources=Resources(image="a/b"), shards=100)["num_workers"] == dataflow.DEFAULT_WORKERS


def test_a_disk_that_an_image_with_cuda_fits_on_is_asked_for_with_a_gpu() -> None:
    assert options()["disk_size_gb"] == 50
    assert options("--disk_size_gb=200")["disk_size_gb"] == 200
    assert "disk_size_gb" not in options(resources=Resources(image="a/b"))


def test_a_machine_without_a_gpu_is_an_option_of_the_job() -> None:
    found = options(resources=Resources(machine_type="n2-standard-8", image="a/b"))
    assert found["machine_type"] == "n2-standard-8"


def test_other_stages_have_one_thread_a_process_and_leave_the_rest_to_dataflow() -> None:
    found = options(SHIPPED, resources=Resources(), stage="index")
    passed = {"runner", "project", "region", "temp_location", "extra_packages"}
    assert found.keys() == passed | {"job_name", "number_of_worker_harness_threads"}


def test_an_image_is_the_views_own_else_the_users_else_that_of_another_view() -> None:
    def image(*args: str, own: str | None = None, spare: str | None = "spare/it:1") -> object:
        made = job_args([*ARGS, *args], "encode", "image", STORE, Resources(image=own), 9, spare_image=spare)
        return given(made).get("sdk_container_image")

    theirs = "--sdk_container_image=their/it:1"
    assert image(theirs, own="own/it:1") == "own/it:1"
    assert image(theirs) == "their/it:1"
    assert image() == "spare/it:1"
    assert image(SHIPPED) is None


@pytest.mark.parametrize(
    ("passed", "name", "value"),
    [
        ("--num_workers=2", "num_workers", 2),
        ("--machine_type=n1-standard-2", "machine_type", "n1-standard-2"),
        ("--number_of_worker_harness_threads=4", "number_of_worker_harness_threads", 4),
        ("--experiments=use_multiple_sdk_containers", "experiments", ["use_multiple_sdk_containers"]),
        ("--autoscaling_algorithm=THROUGHPUT_BASED", "autoscaling_algorithm", "THROUGHPUT_BASED"),
    ],
)
def test_what_the_user_passes_wins(passed: str, name: str, value: object) -> None:
    assert options(passed)[name] == value


def test_a_user_who_lets_it_scale_gets_no_fixed_number() -> None:
    for passed in ("--max_num_workers=3", "--autoscaling_algorithm=THROUGHPUT_BASED"):
        assert "num_workers" not in options(passed)


def test_experiments_of_the_user_are_kept() -> None:
    assert options("--experiments=a,b")["experiments"] == ["no_use_multiple_sdk_containers", "a", "b"]


def test_hints_say_the_gpu_its_machine_and_the_memory() -> None:
    assert hints(ARGS, GPU) == {"accelerator": ACCELERATOR, "min_ram": "16GB"}
    assert hints(ARGS, Resources()) == {}


@pytest.mark.parametrize(
    ("gpu", "min_ram", "machine"),
    [
        ("nvidia-l4", None, "g2-standard-4"),
        ("nvidia-l4", "16GB", "g2-standard-4"),
        ("nvidia-l4", "17GiB", "g2-standard-8"),
        ("nvidia-l4", "64GB", "g2-standard-16"),
        ("nvidia-tesla-t4", "16GB", "n1-standard-4"),
        ("nvidia-tesla-t4", "16GiB", "n1-standard-8"),
        ("nvidia-tesla-a100", "64GB", "a2-highgpu-1g"),
        ("nvidia-a100-80gb", None, "a2-ultragpu-1g"),
        ("nvidia-h100-80gb", "200GB", "a3-highgpu-1g"),
    ],
)
def test_a_gpu_without_a_machine_gets_the_smallest_that_has_it_and_the_memory(
    gpu: str, min_ram: str | None, machine: str
) -> None:
    resources = Resources(gpu, min_ram)
    assert f"type:{gpu};count:1;machine_type:{machine};" in hints(ARGS, resources)["accelerator"]
    assert re.match(f"on {machine}, the smallest machine with one {gpu}", choice(ARGS, resources) or "")


def test_a_machine_that_the_user_names_is_taken_and_nothing_told_of_it() -> None:
    assert choice(ARGS, GPU) is None
    larger = [*ARGS, "--machine_type=g2-standard-32"]
    assert "machine_type:g2-standard-32;" in hints(larger, Resources("nvidia-l4"))["accelerator"]
    assert choice(larger, Resources("nvidia-l4")) is None
    # One that the other jobs of the run are to have, and that no L4 comes with.
    assert (
        "machine_type:g2-standard-4;"
        in hints([*ARGS, "--machine_type=n2-highmem-8"], Resources("nvidia-l4"))["accelerator"]
    )
    assert choice([*ARGS, f"--resource_hints=accelerator={ACCELERATOR}"], Resources("nvidia-l4")) is None
    assert choice([], Resources("nvidia-l4")) is None
    hinted = [*ARGS, "--resource_hints=min_ram=64GB"]
    assert "machine_type:g2-standard-16;" in hints(hinted, Resources("nvidia-l4", "16GB"))["accelerator"]


@pytest.mark.parametrize(
    ("resources", "told"),
    [
        (
            Resources("nvidia-l44"),
            r"accelerator 'nvidia-l44': Braid knows no machine type .* write machine_type beside it",
        ),
        (Resources("nvidia-tesla-v100"), "or take one of: nvidia-l4, nvidia-tesla-t4,"),
        (
            Resources("nvidia-l4", "200GB"),
            r"min_ram 200GB: no machine with one nvidia-l4 has so much memory \(g2-standard-32 has 128 GiB\); lower",
        ),
    ],
)
def test_a_gpu_that_no_machine_is_known_for_is_refused_with_the_mend(resources: Resources, told: str) -> None:
    with pytest.raises(InputError, match=told):
        hints(ARGS, resources)
    assert hints(ARGS, resources._replace(machine_type="n1-standard-8"))["accelerator"]
    assert hints([], resources) == {}


def test_a_gpu_is_looked_for_where_it_is_rented() -> None:
    assert accelerator(ARGS, GPU) == "nvidia-l4"
    assert accelerator([*ARGS, "--resource_hints=accelerator=type:nvidia-l4;count:1"], GPU) == "nvidia-l4"
    service = "--dataflow_service_options=worker_accelerator=type:nvidia-tesla-t4;count:1;install-nvidia-driver"
    assert accelerator([*ARGS, service], Resources()) == "type:nvidia-tesla-t4;count:1;install-nvidia-driver"
    assert accelerator(ARGS, Resources(workers=4)) is None
    assert accelerator([], GPU) is None


def test_a_hint_of_the_user_takes_the_place_of_the_views() -> None:
    assert hints([*ARGS, "--resource_hints=min_ram=4GB"], GPU) == {"accelerator": ACCELERATOR}
    service = "--dataflow_service_options=worker_accelerator=type:nvidia-l4;count:1;install-nvidia-driver"
    assert hints([*ARGS, service], GPU) == {"min_ram": "16GB"}
    assert options(service)["machine_type"] == "g2-standard-8"


names = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,63}", fullmatch=True)


@settings(deadline=None)  # Beam's parser takes what a busy machine lets it
@drawn(st.sampled_from(["shard", "encode", "align"]), names, st.sampled_from([None, "braid", "team-a", "x" * 31]))
def test_job_names_are_dataflows_and_stable(stage: str, name: str, prefix: str | None) -> None:
    passed = [f"--job_name={prefix}"] if prefix else []
    found, again = (given(job_args([*ARGS, SHIPPED, *passed], stage, name, STORE))["job_name"] for _ in range(2))
    assert found == again
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", found)
    assert found.startswith(f"{prefix or 'braid'}-{stage}-")


def test_job_names_differ_by_store_stage_and_name() -> None:
    stores = (STORE, Storage(uri="gs://shelf/other"))
    made = {
        given(job_args([*ARGS, SHIPPED], stage, name, store))["job_name"]
        for store in stores
        for stage in ("align", "index")
        for name in ("a_b", "a-b", "c" * 64, "c" * 63 + "d")
    }
    assert len(made) == 16


def test_a_template_keeps_the_launchers_job_name() -> None:
    found = options("--job_name=launched-by-hand", "--template_location=gs://shelf/t")
    assert found["job_name"] == "launched-by-hand"


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([*ARGS, "--num_worker=3"], r"^'--num_worker=3' after -- is no option of Beam; did you mean --num_workers\?$"),
        ([*ARGS, "machine_type=n1"], "^'machine_type=n1' after -- is no option of Beam; did you mean --machine_type"),
        ([*ARGS, "--num_workers=many"], "argument --num_workers: invalid int value: 'many'"),
        ([*ARGS, "--autoscaling_algorithm=SOME"], "invalid choice: 'SOME'"),
        ([*ARGS, "--no_use_public_ips=true"], "ignored explicit argument 'true'; a flag stands alone: leave out ="),
        (ARGS[:1], "needs --project, --region, --temp_location too"),
        ([*ARGS[:3], "--temp_location=/tmp/x"], "--temp_location=/tmp/x: Dataflow reads gs://bucket/folder"),
        ([*ARGS, "--job_name=My_Job"], "--job_name='My_Job': small letters, digits and '-'"),
        ([*ARGS, "--flexrs_goal=COST_OPTIMIZED"], "--flexrs_goal excludes resource hints"),
    ],
)
def test_a_wrong_option_is_told_with_its_mend(args: list[str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        job_args(args, "encode", "image", STORE, GPU, 9)


def test_options_of_a_job_server_pass_as_they_are() -> None:
    assert given(["--runner=FlinkRunner", "--object_reuse=true"])["runner"] == "FlinkRunner"


def test_workers_without_braid_are_refused() -> None:
    with pytest.raises(
        InputError,
        match=r"workers need Braid itself: name an image of it \(infra/docker\) in views\.<view>\.resources\.image",
    ):
        job_args(ARGS, "shard", "stamps", STORE)
    assert job_args([*ARGS, SHIPPED], "shard", "stamps", STORE)


def test_a_local_store_is_refused() -> None:
    with pytest.raises(InputError, match=r"store\.uri '/data/store' is a folder of this machine, .* s3://… or gs://…"):
        job_args(ARGS, "encode", "image", Storage.of("/data/store"), GPU, 9)


def test_a_local_source_is_refused_where_workers_would_read_it() -> None:
    for path in ("stamps.jsonl", "/data/stamps.jsonl", "file:///data/stamps.jsonl"):
        with pytest.raises(
            InputError, match=r"is on this machine, .* run `braid shard` here into the same store first"
        ):
            check_source(ARGS, path)
        check_source([], path)
    check_source(ARGS, "gs://shelf/stamps.jsonl")


def test_missing_packages_are_named_with_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apitools.base.py", None)
    with pytest.raises(MissingExtra, match=r"pip install 'braid\[dataflow\]'"):
        options()
