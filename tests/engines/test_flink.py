"""Flink: its compose file and README hold together; the jobs on Flink itself where Beam's job server jar is at hand."""

import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import apache_beam
import pytest
import yaml
from apache_beam.options.pipeline_options import FlinkRunnerOptions

from featurestore.store import FeatureStore
from jobs.spec import load
from pipelines.beam_options import given
from tests.conftest import Made, check_same
from tests.engines.job_service import flow_spec, worker_pool
from tests.processes import braid
from tests.test_imports import ROOT

FOLDER = ROOT / "infra/flink"
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
ONE_SHOT = {"bucket", "braid"}


def test_images_are_pinned() -> None:
    for name, service in SERVICES.items():
        image, _, tag = service["image"].rpartition(":")
        assert image, name
        assert re.search(r"\d+\.\d+\.\d+|RELEASE\.\d{4}", tag), f"{name}: {tag}"


def test_versions_fit_each_other_and_the_installed_beam() -> None:
    job_server = SERVICES["jobservice"]["image"]
    flink, beam = re.fullmatch(r"apache/beam_flink(\d+\.\d+)_job_server:([\d.]+)", job_server).groups()
    assert beam == apache_beam.__version__
    assert flink in FlinkRunnerOptions.PUBLISHED_FLINK_VERSIONS
    images = {
        service["image"] for name, service in SERVICES.items() if name.endswith("manager") or "taskmanager" in name
    }
    assert len(images) == 1, images
    assert images.pop().startswith(f"flink:{flink}.")
    readme = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"beam_flink[\d.]+_job_server:[\d.]+", readme)) == {job_server.partition("/")[2]}
    jars = set(re.findall(r"beam-runners-flink-([\d.]+)-job-server-([\d.]+)\.jar", readme))
    assert jars == {(flink, beam)}
    published = FlinkRunnerOptions.PUBLISHED_FLINK_VERSIONS
    assert f"{published[0]} to {published[-1]}" in (FOLDER / "compose.yaml").read_text()


def test_what_a_service_names_is_there() -> None:
    for name, service in SERVICES.items():
        wanted = set(service.get("depends_on", {}))
        if "network_mode" in service:
            wanted.add(service["network_mode"].removeprefix("service:"))
        assert wanted <= set(SERVICES), name
        for needed, how in service.get("depends_on", {}).items():
            healthy = "healthcheck" in SERVICES[needed]
            assert how["condition"] == ("service_healthy" if healthy else "service_completed_successfully"), (
                name,
                needed,
            )
        volumes = {volume.partition(":")[0] for volume in service.get("volumes", []) if not volume.startswith("${")}
        assert volumes <= set(COMPOSE["volumes"]), name
        if "build" in service:
            context = (FOLDER / service["build"]["context"]).resolve()
            assert (context / service["build"]["dockerfile"]).is_file(), name


def test_what_runs_on_has_a_health_check_and_ports_are_of_this_machine_alone() -> None:
    for name, service in SERVICES.items():
        assert ("healthcheck" in service) == (name not in ONE_SHOT), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert "privileged" not in service, name
        assert service.get("network_mode", "service:").startswith("service:"), name


def test_up_and_wait_takes_no_service_that_has_ended_well_for_a_failure() -> None:
    """It does where no service that runs on waits for its end (docker/compose#10596)."""
    started = {name: service for name, service in SERVICES.items() if "profiles" not in service}
    ended = {name for name, service in started.items() if "healthcheck" not in service}
    assert ended == {"bucket"}
    awaited = {
        needed
        for name in started.keys() - ended
        for needed, how in started[name].get("depends_on", {}).items()
        if how["condition"] == "service_completed_successfully"
    }
    assert ended <= awaited


def test_each_task_manager_has_workers_in_its_network_and_the_folder_of_the_job_service() -> None:
    managers = sorted(name for name in SERVICES if name.startswith("taskmanager"))
    beside = [service["network_mode"] for service in SERVICES.values() if "network_mode" in service]
    assert sorted(beside) == [f"service:{name}" for name in managers]
    (staged,) = SERVICES["jobservice"]["volumes"]
    assert all(staged in SERVICES[name]["volumes"] for name in managers)
    folder = staged.partition(":")[2]
    assert f"--artifacts-dir={folder}" in SERVICES["jobservice"]["command"]


def test_no_secret_is_written_down() -> None:
    for service in SERVICES.values():
        for key, value in service.get("environment", {}).items():
            if re.search("SECRET|PASSWORD|MC_HOST", key):
                assert "${MINIO_PASSWORD:?" in value


def commands() -> list[list[str]]:
    """The `braid run … -- …` commands of the README, after `--`."""
    text = (FOLDER / "README.md").read_text().replace("\\\n", " ")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return [shlex.split(line.partition(" -- ")[2]) for line in lines if "braid run" in line]


def test_the_commands_of_the_readme_name_options_that_exist_and_services_of_the_compose_file() -> None:
    found = [given(args) for args in commands()]
    assert [options["runner"] for options in found] == ["PortableRunner", "FlinkRunner", "PortableRunner"]
    host, _, port = found[0]["job_endpoint"].partition(":")
    assert f"--job-port={port}" in SERVICES[host]["command"]
    assert f"--job-host={host}" in SERVICES[host]["command"]
    assert found[0]["environment_config"] == "localhost:50000"


def test_the_spec_of_the_readme_is_one(tmp_path: Path) -> None:
    (part,) = re.findall(r"```yaml\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    said, spec = yaml.safe_load(part), yaml.safe_load(flow_spec(tmp_path, tmp_path))
    spec["store"], spec["corpus"]["source"] = said["store"], said["corpus"]["source"]
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    loaded = load(tmp_path / "spec.yaml")
    assert loaded.store.endpoint == "http://minio:9000"
    assert loaded.corpus.source.path == ("/corpus/manifest.jsonl",)
    assert "minio/" + loaded.store.uri.split("/")[2] in SERVICES["bucket"]["entrypoint"]


@pytest.mark.slow
@pytest.mark.parametrize("environment", ["EXTERNAL", "LOOPBACK"])
def test_the_jobs_on_flink_give_the_local_runners_digest(small: Made, tmp_path: Path, environment: str) -> None:
    jar = os.environ.get("BEAM_FLINK_JOB_SERVER_JAR")
    if not jar or not shutil.which("java"):
        pytest.skip("needs java, and BEAM_FLINK_JOB_SERVER_JAR: the path of Beam's Flink job server jar")
    version = re.search(r"flink-(\d+\.\d+)-job-server", Path(jar).name)
    assert version, f"{jar}: its name does not say for which Flink it is"
    spec = tmp_path / "spec.yaml"
    spec.write_text(small.spec.read_text().replace(str(small.store), str(tmp_path / "store")))
    with worker_pool(tmp_path) as pool:
        args = ["--runner=FlinkRunner", f"--flink_job_server_jar={jar}", f"--flink_version={version[1]}"]
        args += ["--flink_master=[local]", f"--environment_type={environment}"]
        args += [f"--environment_config={pool}"] if environment == "EXTERNAL" else []
        said = braid("run", spec, "--", *args, time_limit_s=600)
    assert said.status == 0, said.err
    check_same(FeatureStore(tmp_path / "store"), small.open())
