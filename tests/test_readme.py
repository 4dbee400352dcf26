"""The README as it stands: its commands and its Python run on planted samples in the place of the demo's, and no name in it
is another here; what it names within a sentence is there.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs import cli
from jobs import spec as specs
from tests.planted import write_planted

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SAMPLES = 96
RECIPE = "jobs/recipes/stamps.yaml"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    return [line.partition("  #")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]


def inline() -> list[str]:
    """Code within sentences and tables, each once."""
    prose = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
    assert prose.count("`") % 2 == 0
    return list(dict.fromkeys(" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)))


def names() -> set[str]:
    """Of all commands."""
    return {each.name or each.callback.__name__ for each in cli.app.registered_commands if each.callback}


def inline_commands() -> list[str]:
    """`braid plan`, and `run --metrics FILE` without the program's name."""
    own = [code.removeprefix("braid ") for code in inline() if code.startswith("braid ")]
    return own + [code for code in inline() if code.split()[0] in names()]


def inline_options() -> list[str]:
    return [code for code in inline() if re.match(r"--\w", code)]


def inline_targets() -> list[str]:
    return [code for code in inline() if code.startswith("make ")]


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "default"}
    return subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the demo's own spec and store, of planted samples: some are animals, and one is the crow."""
    folder = tmp_path_factory.mktemp("readme")
    stamps = folder / "build" / "stamps"
    write_planted(stamps / "stamps", SAMPLES)
    rows = [json.loads(line) for line in (stamps / "stamps" / "manifest.jsonl").read_text("utf-8").splitlines()]
    animals = rows[0]["label"]
    for row in rows:
        for key in ("id", "group", "label"):
            row[key] = re.sub(f"^{animals}", "animals", row[key])
        row["speech_path"] = row["sound_path"]
        for path in ("image_path", "sound_path", "speech_path"):
            row[path] = row[path] and f"stamps/{row[path]}"
        row["caption_fr"] = row["caption_ru"] = row["caption"]
    rows[0]["id"] = "animals/birds/crow"
    (stamps / "stamps.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    (folder / RECIPE).parent.mkdir(parents=True)
    shutil.copy(ROOT / RECIPE, folder / RECIPE)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "braid").symlink_to(Path(sys.executable).parent / "braid")
    done = run([".venv/bin/braid", "run", RECIPE], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_readme_shows_the_commands_that_there_are() -> None:
    assert len(commands()) >= 10
    assert len(blocks("python")) == 2
    assert len(inline_commands()) >= 20
    assert len(inline_options()) >= 8
    assert len(inline_targets()) >= 4


@pytest.mark.parametrize("command", [each for each in commands() if each.startswith(".venv/bin/braid")])
def test_command_runs(command: str, place: Path) -> None:
    done = run(shlex.split(command), place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip(), "a command that says nothing"


def test_no_command_is_left_untried() -> None:
    left = [each for each in commands() if not each.startswith((".venv/bin/braid", "make "))]
    assert left == []


@pytest.mark.parametrize("block", blocks("python"), ids=["search", "train"])
def test_python_block_runs(block: str, place: Path) -> None:
    done = run([sys.executable, "-c", block], place)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == (4 if "hits" in block else 1), done.stdout


def check_command(code: str) -> None:
    """Fails where the command, or an option, is not there. Parsed as typed, but for `--help`, which ends it before it runs."""
    command, *rest = shlex.split(code)
    done = CliRunner().invoke(cli.app, [command, "--help", *rest])
    assert done.exit_code == 0, done.output


def check_target(code: str) -> None:
    """Fails where there is no such target, or nothing is to be made of what is only a file; or there is no such area."""
    target, *variables = shlex.split(code)[1:]
    done = run(["make", "--dry-run", target, *variables], ROOT)
    assert done.returncode == 0, done.stderr
    assert "Nothing to be done" not in done.stdout
    for variable in variables:
        name, _, value = variable.partition("=")
        assert name == "AREA", code
        assert list((ROOT / "tests" / "benchmarks").glob(f"bench_{value}*.py")), code


@pytest.mark.parametrize("code", inline_commands())
def test_command_in_a_sentence_is_there(code: str) -> None:
    check_command(code)


@pytest.mark.parametrize("code", inline_options())
def test_option_in_a_sentence_is_one_of_some_command(code: str) -> None:
    (option, *_) = shlex.split(code)
    tried = [CliRunner().invoke(cli.app, [each, option, "1", "--help"]) for each in sorted(names())]
    assert any(each.exit_code == 0 for each in tried), code


@pytest.mark.parametrize("code", [*(each for each in commands() if each.startswith("make ")), *inline_targets()])
def test_make_target_is_there(code: str) -> None:
    check_target(code)


@pytest.mark.parametrize(
    "code",
    ["serch STORE", "compact --purg SPEC", "quarantine STORE --file x", "make soke", "make tests", "make bench AREA=x"],
)
def test_a_command_that_is_not_there_is_seen(code: str) -> None:
    with pytest.raises(AssertionError):
        check_target(code) if code.startswith("make ") else check_command(code)


def test_the_spec_shown_is_a_good_one() -> None:
    (text,) = blocks("yaml")
    assert specs.parse(text, "README.md").training_sets["kinds"].label == "kind"


def test_every_encoder_shown_as_a_file_exists() -> None:
    for path in re.findall(r"`((?:featurestore|pipelines|jobs|tests)/[\w/]+\.(?:py|yaml))`", README):
        if "my_encoder" not in path:
            assert (ROOT / path).exists(), path
