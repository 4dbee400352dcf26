"""What is really sent to Dataflow, by a loopback server that stands for its API. No job was run on the service itself."""

import dataclasses
import hashlib
import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.dataflow import dataflow_runner
from apache_beam.utils import retry
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from rich.console import Console

from featurestore.catalog import Catalog
from featurestore.errors import BudgetExceeded, InputError, JobError, MissingExtra
from featurestore.storage import Storage
from featurestore.store import FeatureStore
from featurestore.views import VIEW
from jobs import flex
from jobs.run import Runner
from jobs.spec import Spec
from pipelines import dataflow
from pipelines.beam_options import given
from pipelines.dataflow import Resources, check_source, hints, job_args, told
from tests.dataflow import DONE, FAILED, REGION, RUNNING, Refusal, Sent, Service, carry_out, object_store, serving
from tests.golden import FOLDER, coder, fused, golden_name, leaves, rehearsal_spec, rehearsal_text, rehearse, summary
from tests.golden import hints as hints_of
from tests.pipelines.test_graph import MAX_ELEMENT_BYTES
from tests.processes import braid, start

STORE = Storage(uri="gs://shelf/store")
ARGS = ["--runner=DataflowRunner", "--project=p-1", f"--region={REGION}", "--temp_location=gs://shelf/tmp"]
GPU = Resources("nvidia-l4", "16GB", 8, "g2-standard-8", "docker.example/braid/gpu:1")
ACCELERATOR = "type:nvidia-l4;count:1;machine_type:g2-standard-8;install-nvidia-driver"
SHIPPED = "--extra_package=braid.whl"


def options(*args: str, resources: Resources = GPU, stage: str = "encode", shards: int = 100) -> dict[str, object]:
    """Beam's view of a job's options, of the user's `args`."""
    return given(job_args([*ARGS, *args], stage, "image", STORE, resources, shards))


# Options.


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
    assert hints(ARGS, Resources("nvidia-l4"))["accelerator"] == "type:nvidia-l4;count:1;install-nvidia-driver"
    assert hints(ARGS, Resources()) == {}


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


# What was sent.


@dataclasses.dataclass
class Rehearsal:
    """Every stage, submitted to a service that carried it out from what was staged."""

    sent: list[Sent]
    store: Storage
    endpoint: str
    folder: Path

    def job(self, start: str) -> Sent:
        (found,) = (each for each in self.sent if each.job["name"].startswith(f"braid-{start}-"))
        return found

    def spec(self, store: str) -> Spec:
        return rehearsal_spec(self.endpoint, store)

    def written(self, folder: Path, store: str) -> Path:
        path = folder / "spec.yaml"
        path.write_text(rehearsal_text(self.endpoint, store))
        return path


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsal]:
    folder = tmp_path_factory.mktemp("dataflow")
    with object_store("shelf") as endpoint, serving(folder / "staging") as service:
        sent = rehearse(folder, endpoint, service)
        yield Rehearsal(sent, rehearsal_spec(endpoint).store, endpoint, folder)


@pytest.fixture
def service(rehearsal: Rehearsal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A service for one test; nobody waits between tries or questions."""
    monkeypatch.setattr(retry.Clock, "sleep", lambda self, seconds: None)
    quick = types.SimpleNamespace(time=lambda: 0.0, sleep=lambda seconds: None)
    monkeypatch.setattr(dataflow_runner, "time", quick)
    with serving(tmp_path / "staging") as made:
        yield made


def test_each_stage_is_a_job_of_its_own_and_their_store_is_that_of_a_local_run(rehearsal: Rehearsal) -> None:
    assert [each.job["name"].rpartition("-")[0] for each in rehearsal.sent] == [
        "braid-shard-planted",
        "braid-encode-loud",
        "braid-encode-short",
        "braid-align-heard",
        "braid-index-heard",
        "braid-fuse-heard",
    ]
    local = Storage.of(rehearsal.folder / "store")
    Runner(rehearsal.spec("local").model_copy(update={"store": local}), Console(quiet=True)).run()
    assert FeatureStore(rehearsal.store).digest() == FeatureStore(local).digest()


def test_only_the_encode_step_of_a_view_with_a_gpu_has_hints(rehearsal: Rehearsal) -> None:
    for sent in rehearsal.sent:
        parts = sent.pipeline.components
        hinted = {
            step.unique_name: hints_of(parts, step.environment_id)
            for step in leaves(sent.pipeline)
            if hints_of(parts, step.environment_id)
        }
        expected = [f"resources:accelerator={ACCELERATOR}", "resources:min_ram_bytes=16000000000"]
        assert hinted == ({"Encode/EncodeShards": expected} if "loud" in sent.job["name"] else {})


def test_encode_alone_has_a_fixed_pool_of_one_process_workers(rehearsal: Rehearsal) -> None:
    for sent in rehearsal.sent:
        encodes = sent.job["name"].startswith("braid-encode")
        assert ("no_use_multiple_sdk_containers" in sent.experiments) == encodes
        assert sent.pool["autoscalingSettings"].get("algorithm") == (1 if encodes else None)  # 1 is NONE
        assert sent.pool["numThreadsPerWorker"] == 1
        assert "serviceOptions" not in sent.job["environment"]
        assert "machineType" not in sent.pool
        assert sent.pool.get("diskSizeGb") == (50 if "loud" in sent.job["name"] else None)
    assert rehearsal.job("encode-loud").pool["numWorkers"] == 2
    assert rehearsal.job("encode-short").pool["numWorkers"] == 4


def test_every_environment_is_a_container_of_the_image(rehearsal: Rehearsal) -> None:
    for sent in rehearsal.sent:
        for environment in sent.pipeline.components.environments.values():
            payload = beam_runner_api_pb2.DockerPayload.FromString(environment.payload)
            assert (environment.urn, payload.container_image) == ("beam:env:docker:v1", "docker.example/gpu:1")


@pytest.mark.parametrize("view", ["loud", "short"], ids=["on GPUs", "on CPUs"])
def test_the_encode_stage_holds_nothing_but_encode(rehearsal: Rehearsal, view: str) -> None:
    stages = [stage for stage in fused(rehearsal.job(f"encode-{view}").pipeline) if "Encode/EncodeShards" in stage]
    # Around it are the two shuffles' own ends.
    assert stages == [["Encode/Spread/Read", "Encode/EncodeShards", "Commit/Gather/Write"]]


def test_the_commit_is_the_last_stage_of_every_job(rehearsal: Rehearsal) -> None:
    for sent in rehearsal.sent:
        assert [stage[-1] for stage in fused(sent.pipeline)][-1] == "Commit/Publish"


def test_no_coder_falls_back_to_pickling(rehearsal: Rehearsal) -> None:
    for sent in rehearsal.sent:
        parts = sent.pipeline.components
        for step in leaves(sent.pipeline):
            for key in step.outputs.values():
                found = coder(parts, parts.pcollections[key].coder_id)
                assert "pickle" not in found, (sent.job["name"], step.unique_name, found)


def test_no_coder_of_media_or_vectors_exists_at_all(rehearsal: Rehearsal) -> None:
    """Descriptors are rows of texts and numbers; the only bytes are Create's own elements, which are those rows or a text."""
    for sent in rehearsal.sent:
        parts = sent.pipeline.components
        for step in leaves(sent.pipeline):
            for key in step.outputs.values():
                found = coder(parts, parts.pcollections[key].coder_id)
                first = step.unique_name.partition("/")[0] in {"Tasks", "Shard", "Build"}
                assert "bytes" not in found or first, (step.unique_name, found)


def test_what_crosses_a_shuffle_was_measured_and_is_a_descriptor(rehearsal: Rehearsal) -> None:
    for sent in rehearsal.sent:
        shuffles = [step for step in leaves(sent.pipeline) if step.spec.urn == common_urns.primitives.GROUP_BY_KEY.urn]
        assert len(shuffles) == {"shard": 3, "encode": 2}.get(sent.job["name"].split("-")[1], 1)
        sizes = {step.unique_name: sent.largest[key] for step in shuffles for key in step.inputs.values()}
        assert max(sizes.values()) <= MAX_ELEMENT_BYTES, sizes


def test_packages_are_staged_as_they_are(rehearsal: Rehearsal, service: Service, tmp_path: Path) -> None:
    wheel = tmp_path / "braid-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"a wheel")
    submit(rehearsal, service, f"--extra_package={wheel}")
    (sent,) = service.sent
    assert sent.staged[wheel.name] == hashlib.sha256(b"a wheel").hexdigest()
    for environment in sent.pipeline.components.environments.values():
        roles = [
            beam_runner_api_pb2.ArtifactStagingToRolePayload.FromString(each.role_payload).staged_name
            for each in environment.dependencies
        ]
        assert wheel.name in roles


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_the_graph_is_the_golden_one(rehearsal: Rehearsal, path: Path) -> None:
    found = {golden_name(sent): summary(sent) for sent in rehearsal.sent}
    assert found.keys() == {each.name for each in FOLDER.glob("*.txt")}
    assert found[path.name] == path.read_text(), "if this change is meant: python -m tests.golden, and look at git diff"


# What the service answers.


def submit(rehearsal: Rehearsal, service: Service, *more: str, store: str = "new") -> None:
    """Submits the shard job of a store that has none."""
    Runner(rehearsal.spec(store), Console(quiet=True), service.args(*more)).run(["shard"])


@pytest.mark.parametrize(
    ("refusal", "kind", "told"),
    [
        (
            Refusal(409, "ALREADY_EXISTS", "There is already an active job named x."),
            JobError,
            r"^Dataflow job braid-shard-planted-\w{8} \(project rehearsal, region europe-west4\) is active already: .*"
            "gcloud dataflow jobs cancel",
        ),
        (Refusal(403, "PERMISSION_DENIED", "No dataflow.jobs.create."), JobError, "not allowed: .* lists the rights"),
        (Refusal(429, "RESOURCE_EXHAUSTED", "Too many."), JobError, r"is over a quota: Too many; .*resources.workers"),
        (Refusal(403, "PERMISSION_DENIED", "Quota of L4 GPUs exceeded."), JobError, "is over a quota: Quota of L4"),
        (Refusal(400, "INVALID_ARGUMENT", "Machine type g9 is unknown."), InputError, "is refused: Machine type g9"),
        (
            Refusal(500, "INTERNAL", "Oops."),
            JobError,
            r"answers with an error of its own \(500\): Oops; try again later",
        ),
    ],
    ids=lambda value: value.status.lower() if isinstance(value, Refusal) else "",
)
def test_a_refusal_is_told_with_its_mend(
    rehearsal: Rehearsal, service: Service, refusal: Refusal, kind: type[Exception], told: str
) -> None:
    service.answer = lambda sent: refusal
    with pytest.raises(kind, match=told):
        submit(rehearsal, service)
    # Only what may pass by itself is tried again.
    assert len(service.sent) == (4 if refusal.code == 500 else 1)


def test_a_service_that_is_not_there_is_told(rehearsal: Rehearsal, service: Service) -> None:
    service.port = 1
    with pytest.raises(JobError, match=r"cannot be submitted: .* check the network"):
        submit(rehearsal, service)


def test_a_job_that_fails_is_told_with_the_last_error_of_its_log(rehearsal: Rehearsal, service: Service) -> None:
    service.answer = lambda sent: RUNNING
    service.later, service.messages = [RUNNING, FAILED], ["Workflow failed. Causes: no zone has an nvidia-l4."]
    told = (
        r"ended in state FAILED: Workflow failed\. Causes: no zone has an nvidia-l4; .*/dataflow/jobs/.* run it again$"
    )
    with pytest.raises(JobError, match=told):
        submit(rehearsal, service)


def test_a_job_that_was_cancelled_is_no_success(rehearsal: Rehearsal, service: Service) -> None:
    service.answer, service.later = lambda sent: RUNNING, [RUNNING, "JOB_STATE_CANCELLED"]
    with pytest.raises(JobError, match="ended in state CANCELLED; nothing of it was published"):
        submit(rehearsal, service)


def test_an_error_that_a_worker_raised_on_purpose_is_told_as_that(rehearsal: Rehearsal, service: Service) -> None:
    service.answer = lambda sent: RUNNING
    service.later = [RUNNING, FAILED]
    service.messages = [
        'Traceback (most recent call last):\n  File "x.py", line 1, in y\n'
        "featurestore.errors.BudgetExceeded: shard planted: 2 of 20 values were rejected; mend them "
        "[while running 'Commit/Publish-ptransform-7']\n"
    ]
    with pytest.raises(BudgetExceeded, match=r"^shard planted: 2 of 20 values were rejected; mend them$"):
        submit(rehearsal, service)


def test_a_bucket_that_may_not_be_looked_at_is_a_matter_of_rights() -> None:
    """Word for word what Beam raises where a submitter lacks storage.buckets.get."""
    refused = (
        "Could not upload to GCS path gs://shelf/tmp/x: 403 GET https://storage.googleapis.com/storage/v1/b/shelf: "
        "ml@example.org does not have storage.buckets.get access to the Google Cloud Storage bucket. Please verify that "
        "credentials are valid, that the specified path exists, and that you have write access to it."
    )
    found = told(OSError(refused), [*ARGS, "--job_name=a"])
    assert isinstance(found, JobError)
    assert re.search(r"not allowed: .*storage\.buckets\.get.* lists the rights", str(found))
    assert "check the network" in str(told(OSError("no route to host"), [*ARGS, "--job_name=a"]))


def test_a_bug_stays_a_bug() -> None:
    assert told(ZeroDivisionError("x"), [*ARGS, "--job_name=a"]) is None
    assert told(OSError("x"), []) is None


# The front doors.


@pytest.mark.parametrize(
    ("answer", "more", "status", "told"),
    [
        (Refusal(409, "ALREADY_EXISTS", "There is one."), [], 1, "is active already"),
        (DONE, ["--num_worker=3"], 2, "did you mean --num_workers?"),
    ],
)
def test_the_command_ends_with_the_right_status_and_no_traceback(
    rehearsal: Rehearsal,
    service: Service,
    tmp_path: Path,
    answer: str | Refusal,
    more: list[str],
    status: int,
    told: str,
) -> None:
    service.answer = lambda sent: answer
    spec = str(rehearsal.written(tmp_path, "command"))
    ended = braid("shard", spec, "--", *service.args(*more))
    assert ended.status == status
    assert ended.err.startswith("error: "), ended.err
    assert told in ended.err
    assert ended.err.count("\n") == 1, "one line, no traceback"


def test_closing_the_laptop_loses_nothing_of_the_job(rehearsal: Rehearsal, service: Service, tmp_path: Path) -> None:
    """The command is killed once its job is submitted; the job's own last step publishes."""
    service.answer, service.later = lambda sent: RUNNING, [RUNNING]
    spec = str(rehearsal.written(tmp_path, "left"))
    with start("shard", spec, "--", *service.args()) as submitting:
        assert service.arrived.wait(60)
        submitting.kill()
    catalog = Catalog(rehearsal.spec("left").store)
    assert catalog.snapshot().version == 0
    carry_out(service.sent[0])
    assert [each["job"] for each in catalog.history()] == ["shard planted", "create"]


def test_a_flex_template_holds_the_one_job_that_its_parameters_name(
    rehearsal: Rehearsal, service: Service, tmp_path: Path
) -> None:
    import fsspec

    with fsspec.open("s3://shelf/specs/spec.yaml", "w") as file:
        file.write(rehearsal.written(tmp_path, "flex").read_text())
    # The catalog and the shards have to be there before a view is encoded.
    Runner(rehearsal.spec("flex"), Console(quiet=True)).run(["shard"])
    launcher = [arg for arg in service.args("--job_name=by-hand") if not arg.startswith("--runner")]
    template = tmp_path / "job_object"
    arguments = [
        "--spec=s3://shelf/specs/spec.yaml",
        "--stage=encode",
        "--name=loud",
        f"--template_location={template}",
    ]
    flex.main([*arguments, *launcher])
    assert service.sent == []
    job = json.loads(template.read_text())
    assert job["name"] == "by-hand"
    assert job["environment"]["workerPools"][0]["numWorkers"] == 2
    assert Catalog(rehearsal.spec("flex").store).snapshot().entries(VIEW, "loud") == []


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        (["--stage=encode"], "--template_location holds one job, which is encode loud now; encode short is to do too"),
        (["--stage=encode", "--name=lod"], "--name='lod': the spec has no such thing to encode; it has: loud, short"),
        (["--stage=all"], "--stage='all' is not a stage; one of: shard, encode, align, index, fuse"),
        (["--stage=shard"], "everything of it is fresh, there is no job to launch"),
    ],
)
def test_wrong_parameters_of_a_template_are_told(
    rehearsal: Rehearsal,
    service: Service,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    parameters: list[str],
    told: str,
) -> None:
    if not Catalog(rehearsal.spec("few").store).exists():
        Runner(rehearsal.spec("few"), Console(quiet=True)).run(["shard"])
    spec = rehearsal.written(tmp_path, "few")
    with pytest.raises(SystemExit) as ended:
        flex.main([f"--spec={spec}", *parameters, f"--template_location={tmp_path}/job_object", *service.args()])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err
