"""Every command and every block of Python in the README runs, on the planted store in place of the demo's."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import spec as specs
from tests.conftest import Made

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    return [line.partition("  #")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def place(made: Made, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A working folder, and what of the README's names is another here."""
    corpus = made.open().corpus("planted")
    shard = corpus.shards[0].shard
    label = corpus.read(shard)["label"][0].as_py()
    return tmp_path_factory.mktemp("readme"), {
        "build/stamps/stamps": str(made.corpus),
        "build/stamps-store": str(made.store),
        "jobs/recipes/stamps.yaml": str(made.spec),
        '"stamps"': '"seen"',
        " stamps --text": " seen --text",
        "animals/birds/crow": corpus.ids(shard)[0],
        "label = 'animals'": f"label = '{label}'",
        ".venv/bin/braid": str(Path(sys.executable).parent / "braid"),
    }


def here(text: str, names: dict[str, str]) -> str:
    for name, stands_for in names.items():
        text = text.replace(name, stands_for)
    return text


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "default"}
    return subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def test_the_readme_shows_the_commands_that_there_are() -> None:
    assert len(commands()) >= 10
    assert len(blocks("python")) == 2


@pytest.mark.parametrize("command", [each for each in commands() if each.startswith(".venv/bin/braid")])
def test_command_runs(command: str, place: tuple[Path, dict[str, str]]) -> None:
    done = run(shlex.split(here(command, place[1])), place[0])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip(), "a command that says nothing"


@pytest.mark.parametrize("command", [each for each in commands() if each.startswith("make ")])
def test_make_target_is_there(command: str) -> None:
    done = run(["make", "--dry-run", *shlex.split(command)[1:]], ROOT)
    assert done.returncode == 0, done.stderr


def test_no_command_is_left_untried() -> None:
    left = [each for each in commands() if not each.startswith((".venv/bin/braid", "make "))]
    assert left == []


@pytest.mark.parametrize("block", blocks("python"), ids=["search", "train"])
def test_python_block_runs(block: str, place: tuple[Path, dict[str, str]]) -> None:
    done = run([sys.executable, "-c", here(block, place[1])], place[0])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_spec_shown_is_a_good_one() -> None:
    (text,) = blocks("yaml")
    assert specs.parse(text, "README.md").training_sets["kinds"].label == "kind"


def test_every_encoder_shown_as_a_file_exists() -> None:
    for path in re.findall(r"`((?:featurestore|pipelines|jobs|tests)/[\w/]+\.(?:py|yaml))`", README):
        if "my_encoder" not in path:
            assert (ROOT / path).exists(), path
