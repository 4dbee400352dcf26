"""What is really sent to Dataflow, by a loopback server that stands for its API. No job was run on the service itself."""

import dataclasses
import hashlib
import io
import json
import re
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.dataflow import dataflow_runner
from apache_beam.utils import retry
from rich.console import Console

from featurestore.catalog import Catalog
from featurestore.errors import BudgetExceeded, InputError, JobError
from featurestore.storage import Storage
from featurestore.store import FeatureStore
from featurestore.views import VIEW
from jobs import flex
from jobs.run import Runner
from jobs.spec import Spec
from pipelines.dataflow import told
from tests.dataflow import (
    DONE,
    FAILED,
    REGION,
    RUNNING,
    Refusal,
    Sent,
    Service,
    carry_out,
    carrying_out,
    object_store,
    serving,
)
from tests.golden import (
    CPU_IMAGE,
    FOLDER,
    coder,
    fused,
    golden_name,
    leaves,
    rehearsal_spec,
    rehearsal_text,
    rehearse,
    summary,
)
from tests.golden import hints as hints_of
from tests.pipelines.test_graph import MAX_ELEMENT_BYTES
from tests.processes import braid, start

ARGS = ["--runner=DataflowRunner", "--project=p-1", f"--region={REGION}", "--temp_location=gs://shelf/tmp"]


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
        # The spec names no machine: it is the smallest G2, the machines that an L4 comes with.
        gpu = "type:nvidia-l4;count:1;machine_type:g2-standard-4;install-nvidia-driver:latest"
        expected = [f"resources:accelerator={gpu}", "resources:min_ram_bytes=16000000000"]
        assert hinted == ({"Encode/EncodeShards": expected} if "loud" in sent.job["name"] else {})


def test_only_the_workers_of_a_view_with_a_gpu_look_for_it(rehearsal: Rehearsal) -> None:
    encodes = {"encode-loud": {("encode loud", "nvidia-l4")}, "encode-short": {("encode short", None)}}
    for sent in rehearsal.sent:
        assert sent.rented == encodes.get("-".join(sent.job["name"].split("-")[1:3]), set())


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


def test_every_job_runs_in_its_own_image_a_view_in_that_of_its_gpus(rehearsal: Rehearsal) -> None:
    for sent in rehearsal.sent:
        assert sent.images == {"docker.example/gpu:1" if "loud" in sent.job["name"] else CPU_IMAGE}
        assert {each["containerImage"] for each in sent.pool["sdkHarnessContainerImages"]} == sent.images
        urns = {each.urn for each in sent.pipeline.components.environments.values()}
        assert urns == {"beam:env:docker:v1"}


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_worker_that_finds_no_gpu_ends_its_job_and_encodes_nothing(rehearsal: Rehearsal, service: Service) -> None:
    spec = rehearsal.spec("without-gpu")
    Runner(spec, Console(quiet=True)).run(["shard"])
    service.answer = carrying_out(service, on_gpus=False)
    told = (
        r"^encode loud: worker \S+ is rented with nvidia-l4, and torch \S+ cannot compute on it: .* nothing was encoded "
        r"there; use an image with torch's CUDA build \(worker-gpu\) and a driver that is new enough"
    )
    with pytest.raises(JobError, match=told):
        Runner(spec, Console(quiet=True), service.args()).run(["encode"], "loud")
    assert Catalog(spec.store).snapshot().entries(VIEW, "loud") == []
    # Here, of the same spec, nothing is rented: the CPU is what there is.
    Runner(spec, Console(quiet=True)).run(["encode"], "loud")
    assert len(Catalog(spec.store).snapshot().entries(VIEW, "loud")) == 6


def test_a_chosen_machine_is_told_when_its_job_is_submitted(rehearsal: Rehearsal, service: Service) -> None:
    said = io.StringIO()
    Runner(rehearsal.spec("told"), Console(quiet=True)).run(["shard"])
    Runner(rehearsal.spec("told"), Console(file=said, width=200), service.args()).run(["encode"])
    (line,) = [line for line in said.getvalue().splitlines() if "machine" in line]
    assert line == (
        "encode loud: on g2-standard-4, the smallest machine with one nvidia-l4 and 16GB; resources.machine_type of the view "
        "names another"
    )


def test_a_gpu_of_no_known_machine_is_refused_before_the_first_job(
    rehearsal: Rehearsal, service: Service, tmp_path: Path
) -> None:
    spec = rehearsal.written(tmp_path, "unknown")
    spec.write_text(spec.read_text().replace("nvidia-l4", "nvidia-l44"))
    ended = braid("run", spec, "--", *service.args())
    assert (ended.status, service.sent) == (2, [])
    assert "accelerator 'nvidia-l44': Braid knows no machine type" in ended.err


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


def test_a_launch_goes_on_without_an_option_that_this_beam_does_not_know(
    rehearsal: Rehearsal, service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Google's launcher adds options of its own, and may add more one day."""
    spec, template = rehearsal.written(tmp_path, "unexpected"), tmp_path / "job_object"
    flex.main([
        f"--spec={spec}", "--stage=shard", "--of_tomorrow", "yes", *service.args(f"--template_location={template}"),
        "--of_the_day_after=1", "--num_workers=3",
    ])  # fmt: skip
    job = json.loads(template.read_text())
    assert job["environment"]["workerPools"][0]["numWorkers"] == 3
    told = [record.getMessage() for record in caplog.records if record.name == "braid.flex"]
    assert told == [
        "left out what this Beam does not know of the launcher's options: --of_tomorrow, yes, --of_the_day_after=1"
    ]
    assert caplog.records[0].levelname == "WARNING"


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
