"""A Dockerfile's last stage, carried out without Docker: its COPY and RUN lines in a folder and an environment of their own."""

import io
import os
import posixpath
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[2]
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc")
DOCKERFILES = sorted((ROOT / "infra").rglob("*Dockerfile"))


class Line(NamedTuple):
    """One instruction: `COPY`, `RUN` …, and the rest of it on one line."""

    word: str
    value: str


def lines(path: Path) -> list[Line]:
    """Every instruction but comments."""
    parser = DockerfileParser(fileobj=io.BytesIO(path.read_bytes()))
    return [Line(each["instruction"], each["value"]) for each in parser.structure if each["instruction"] != "COMMENT"]


def last_stage(path: Path) -> list[Line]:
    """What makes the image itself."""
    every = lines(path)
    return every[max(index for index, line in enumerate(every) if line.word == "FROM") :]


def copied(path: Path) -> list[str]:
    """What is copied from the repository, as the Dockerfile names it."""
    found = []
    for line in lines(path):
        if line.word in ("COPY", "ADD") and "--from=" not in line.value:
            found += shlex.split(line.value)[:-1]
    return found


def pairs(value: str) -> dict[str, str]:
    """`A=1 B=2` of ENV and ARG."""
    return dict(each.split("=", 1) for each in shlex.split(value))


def sent() -> set[str]:
    """What .dockerignore lets through, of a file that names what it does not exclude."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*"
    return {rule[1:] for rule in rules if rule.startswith("!")}


def is_sent(source: str) -> bool:
    """Whether .dockerignore lets a path through, itself or a folder that it is in."""
    return bool(sent() & {source, *map(str, Path(source).parents)})


class Image:
    """A bare virtual environment, made as a Dockerfile's last stage makes the image."""

    def __init__(self, dockerfile: Path, folder: Path) -> None:
        self.folder, self.venv = folder, folder / "venv"
        subprocess.run([sys.executable, "-m", "venv", self.venv], check=True, timeout=120)
        keep = {name: os.environ[name] for name in os.environ if re.fullmatch(r"PIP_\w+|\w+_proxy|SSL_CERT_\w+", name)}
        self.environment = keep | {"PATH": f"{self.venv}/bin:/usr/bin:/bin"}
        workdir = "/"
        for line in last_stage(dockerfile):
            if line.word == "ENV":
                self.environment |= pairs(line.value)
            elif line.word == "ARG":  # --build-arg
                self.environment |= {name: os.environ.get(name, default) for name, default in pairs(line.value).items()}
            elif line.word == "WORKDIR":
                workdir = line.value
            elif line.word == "COPY" and "--from=" not in line.value:
                self._copy(workdir, shlex.split(line.value))
            elif line.word == "RUN":
                command = re.sub(r"(?<!\S)/check/", f"{self._here('/check')}/", line.value)
                self.run("sh", "-c", command, folder=self._here(workdir))

    def _here(self, path: str) -> Path:
        there = self.folder / "root" / path.lstrip("/")
        there.mkdir(parents=True, exist_ok=True)
        return there

    def _copy(self, workdir: str, names: list[str]) -> None:
        *sources, target = names
        folder = self._here(posixpath.join(workdir, target))
        for source in sources:
            assert is_sent(source), f"{source}: .dockerignore does not let it through"
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, folder, ignore=IGNORED, dirs_exist_ok=True)
            else:
                assert target.endswith("/"), f"{target}: this follows COPY of files into folders alone"
                shutil.copy(ROOT / source, folder)

    def run(self, *arguments: str | Path, folder: Path | None = None) -> str:
        """Runs a command in the image; gives what it printed. Fails with it."""
        done = subprocess.run(
            [str(each) for each in arguments],
            cwd=folder or self._here("/"),
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=1200,
        )
        assert done.returncode == 0, f"{arguments}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout
