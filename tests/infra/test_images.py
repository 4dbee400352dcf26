"""The images' Dockerfiles: linted, pinned, and of one version with constraints.txt. Docker itself never built them here."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pathspec import GitIgnoreSpec

from tests.infra.dockerfile import DOCKERFILES, ROOT, copied, is_sent, last_stage, lines, pairs, sent

every = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
INFRA = ROOT / "infra"
WORKERS = [path for path in DOCKERFILES if path.stem.startswith("worker-")]
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"


def pins(path: Path) -> dict[str, str]:
    rows = [line.split("==") for line in path.read_text().splitlines() if line and line[0] != "#"]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in rows}


def test_there_are_three_images() -> None:
    assert [path.stem for path in DOCKERFILES] == ["launcher", "worker-cpu", "worker-gpu"]


@every
def test_hadolint_finds_nothing(path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "hadolint", path], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout


@every
def test_every_base_is_pinned_to_a_version(path: Path) -> None:
    for line in lines(path):
        if line.word == "FROM":
            name = line.value.split()[0]
            assert re.search(r":[\w.-]*\d[\w.-]*$", name), name
            assert not name.endswith(":latest")


@every
def test_nothing_is_fetched_from_an_address_and_nothing_secret_is_set(path: Path) -> None:
    for line in lines(path):
        assert line.word != "ADD", "ADD fetches and unpacks; use COPY"
        assert line == ("ARG", f'TORCH_WHEELS="{CPU_WHEELS}"') or not re.search(
            r"https?://|curl |wget |git clone", line.value
        ), line
        if line.word in ("ENV", "ARG"):
            assert not [
                name
                for name in pairs(line.value)
                if re.search(r"(?i)secret|password|credential|(^|_)(key|token)$", name)
            ]


@every
def test_what_is_copied_is_there_and_is_sent(path: Path) -> None:
    for source in copied(path):
        assert (ROOT / source).exists(), source
        assert is_sent(source), f"{source}: .dockerignore does not let it through"


def test_nothing_is_sent_that_no_image_copies() -> None:
    needed = {source for path in DOCKERFILES for source in copied(path)}
    assert sent() <= needed


@every
def test_every_install_keeps_to_the_constraints_and_is_checked(path: Path) -> None:
    installs = [line.value for line in last_stage(path) if line.word == "RUN" and "pip install" in line.value]
    assert installs
    for command in installs:
        assert "--no-cache-dir" in command
        assert "-c constraints.txt" in command or "--no-deps" in command, command
    assert any(line.word == "RUN" and "pip check" in line.value for line in last_stage(path))


@pytest.mark.parametrize("path", WORKERS, ids=lambda path: path.stem)
def test_a_worker_is_beam_of_the_pinned_version_and_asks_no_hub(path: Path) -> None:
    beam = pins(ROOT / "constraints.txt")["apache-beam"]
    assert f"FROM apache/beam_python3.11_sdk:{beam} AS beam" in path.read_text()
    stage = last_stage(path)
    assert ("COPY", "--from=beam /opt/apache/beam /opt/apache/beam") in stage
    assert stage[-1] == ("ENTRYPOINT", '["/opt/apache/beam/boot"]')
    environment = {name: value for line in stage if line.word == "ENV" for name, value in pairs(line.value).items()}
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT"] == "1"
    device = path.stem.removeprefix("worker-")
    assert ("RUN", f"pip check && python /check/check_image.py {device}") in stage


def test_an_image_without_a_gpu_is_built_with_pytorchs_own_cpu_wheels_where_nobody_names_others() -> None:
    for path in DOCKERFILES:
        stage = last_stage(path)
        (torch,) = [line.value for line in stage if line.word == "RUN" and line.value.endswith(" torch")]
        on_cpu = path.stem != "worker-gpu"
        assert (("ARG", f'TORCH_WHEELS="{CPU_WHEELS}"') in stage) == on_cpu, path
        assert ('${TORCH_WHEELS:+--extra-index-url "$TORCH_WHEELS"}' in torch) == on_cpu, path
    build = yaml.safe_load((INFRA / "docker" / "cloudbuild.yaml").read_text())
    assert build["substitutions"]["_TORCH_WHEELS"] == CPU_WHEELS
    compose = yaml.safe_load((INFRA / "flink" / "compose.yaml").read_text())
    builds = [service["build"] for service in compose["services"].values() if "build" in service]
    assert builds
    assert all(each["args"] == {"TORCH_WHEELS": f"${{TORCH_WHEELS-{CPU_WHEELS}}}"} for each in builds)


def test_every_image_has_the_same_python() -> None:
    text = {path.stem: path.read_text() for path in DOCKERFILES}
    (python,) = set(re.findall(r"FROM (python:3\.11\.\S+)", text["worker-cpu"] + text["worker-gpu"]))
    assert python.startswith("python:3.11.")
    assert "python311-template-launcher-base" in text["launcher"]


def test_the_gpu_build_of_torch_is_of_the_base_s_cuda() -> None:
    gpu = pins(INFRA / "docker" / "constraints-gpu.txt")
    (base,) = re.findall(r"FROM nvidia/cuda:(\d+\.\d+)\.", (INFRA / "docker" / "worker-gpu.Dockerfile").read_text())
    assert gpu["nvidia-cuda-runtime"].startswith(f"{base}.")
    assert not gpu.keys() & pins(ROOT / "constraints.txt").keys()


def test_cloud_build_makes_every_image() -> None:
    build = yaml.safe_load((INFRA / "docker" / "cloudbuild.yaml").read_text())
    made = [step["args"][step["args"].index("--file") + 1] for step in build["steps"]]
    assert sorted(made) == [str(path.relative_to(ROOT)) for path in DOCKERFILES]
    assert len(build["images"]) == len(made)
    names = [step["args"][step["args"].index("--tag") + 1] for step in build["steps"]]
    assert sorted(names) == sorted(build["images"])
    assert set(re.findall(r"\$\{(_\w+)\}", str(build["steps"]) + str(build["images"]))) == build["substitutions"].keys()


def test_cloud_build_is_sent_what_it_needs_and_no_secrets() -> None:
    ignored = GitIgnoreSpec.from_lines((ROOT / ".gcloudignore").read_text().splitlines())
    needed = {*(str(path.relative_to(ROOT)) for path in DOCKERFILES), ".dockerignore", "featurestore/encoders/mel.py"}
    for name in needed | {source for path in DOCKERFILES for source in copied(path)} - {
        "featurestore",
        "jobs",
        "pipelines",
    }:
        assert not ignored.match_file(name), name
    for name in (
        ".git/config",
        ".venv/bin/python",
        "build/store/catalog",
        "infra/terraform/terraform.tfstate",
        "key.json",
    ):
        assert ignored.match_file(name), name
