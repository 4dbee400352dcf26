"""Braid as workers get it: whole in its wheel, and at work where nothing else is installed."""

import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import Made, small_spec
from tests.infra.dockerfile import DOCKERFILES, IGNORED, ROOT, Image
from tests.infra.test_images import pins

PACKAGES = ("featurestore", "jobs", "pipelines")
MAIN = "from jobs.cli import main; main()"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy that holds no more than what the images copy."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=IGNORED)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "out", "."]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
    (built,) = (folder / "out").glob("*.whl")
    return built


def test_the_wheel_holds_every_module_and_data_file_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert held == {str(path.relative_to(ROOT)) for path in files}
    assert "jobs/recipes/stamps.yaml" in held


def test_the_wheel_has_the_command_and_names_what_workers_need(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (info,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    assert "braid = jobs.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    extras = email.message_from_bytes(archive.read(f"{info}/METADATA")).get_all("Provides-Extra") or []
    wanted = {extra for path in DOCKERFILES for extra in re.findall(r"'\.\[([\w,]+)\]'", path.read_text())}
    assert wanted
    assert {each for group in wanted for each in group.split(",")} <= set(extras)


def test_the_wheel_alone_plans_its_own_recipe(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "braid")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "braid"), "PYTHONSAFEPATH": "1"}

    def python(code: str, *arguments: str) -> str:
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = python("import featurestore, jobs, pipelines as p; print(featurestore.__file__, jobs.__file__, p.__file__)")
    assert all(Path(each).is_relative_to(tmp_path) for each in where.split())
    assert "Commands" in python(MAIN, "--help")
    assert "stamps" in python(
        "import jobs.spec as s, sys; print(s.load(sys.argv[1]).corpus.name)", "braid/jobs/recipes/stamps.yaml"
    )


@pytest.mark.slow
def test_the_cpu_image_s_own_commands_make_an_environment_that_works(small: Made, tmp_path: Path) -> None:
    """Minutes: everything is installed anew. The corpus gives the same digest there as here."""
    (dockerfile,) = (path for path in DOCKERFILES if path.stem == "worker-cpu")
    image = Image(dockerfile, tmp_path / "image")

    site = image.run("python", "-c", "import featurestore; print(featurestore.__file__)")
    assert Path(site.strip()).is_relative_to(image.venv)
    constraints = pins(ROOT / "constraints.txt")
    frozen = dict(
        line.split("==") for line in image.run("pip", "freeze", "--exclude", "braid").splitlines() if "==" in line
    )
    installed = {re.sub(r"[-_.]+", "-", name).lower(): version.partition("+")[0] for name, version in frozen.items()}
    assert installed.items() <= constraints.items()
    assert not {"pytest", "hypothesis", "moto", "mypy", "ruff"} & installed.keys()

    image.run("python", "-c", "import apache_beam.runners.worker.sdk_worker_main")
    assert "Commands" in image.run("braid", "--help")
    place = tmp_path / "elsewhere"
    place.mkdir()
    (place / "spec.yaml").write_text(small_spec(small.corpus, place / "store"))
    image.run("braid", "run", "spec.yaml", folder=place)
    assert "done" not in image.run("braid", "run", "spec.yaml", folder=place), "a second run computes nothing"
    image.run("braid", "verify", "store", folder=place)
    assert small.open().digest() in image.run("braid", "status", "store", folder=place)


def test_the_environment_of_the_tests_is_that_of_the_constraints() -> None:
    """So that what passes here is what is installed there."""
    constraints = pins(ROOT / "constraints.txt")
    for name in ("apache-beam", "torch", "transformers", "numpy", "pyarrow", "deltalake"):
        assert importlib.metadata.version(name).partition("+")[0] == constraints[name], name
