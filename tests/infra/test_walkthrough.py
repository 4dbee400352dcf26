"""infra/dataflow/README.md: its commands are ones that Braid and Beam take, each says whether it was tried."""

import re
import shlex
from typing import Any

import pytest
import typer.main

from jobs import spec as specs
from jobs.cli import app
from pipelines.beam_options import given
from tests.infra.dockerfile import ROOT

FOLDER = ROOT / "infra" / "dataflow"
README = (FOLDER / "README.md").read_text()
# What the walkthrough's shell variables hold.
SET = {
    "PROJECT": "acme-media-1",
    "REGION": "europe-west4",
    "STORE": "gs://acme-media-1-braid-store",
    "TEMP": "gs://acme-media-1-braid-temp/tmp",
    "IMAGES": "europe-west4-docker.pkg.dev/acme-media-1/braid",
    "WORKER": "braid-worker@acme-media-1.iam.gserviceaccount.com",
    "SUBNETWORK": "regions/europe-west4/subnetworks/braid",
}
TRIED = re.compile(r"# (tried|not tried: needs an account)\b")


def entries() -> list[tuple[str, str]]:
    """(the comment above, the command) of every command, in the order of the page."""
    found, note = [], ""
    for block in re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("#"):
                note = line
            else:
                found.append((note, " ".join(line.split())))
    return found


def braid(command: str) -> tuple[str, list[str], list[str]]:
    """(subcommand, its arguments, Beam's) of a line that runs braid, with its variables filled in."""
    text = re.sub(r"\$(\w+)|\$\{(\w+)%/tmp\}", lambda found: SET[found[1] or found[2]], command)
    _, name, *arguments = shlex.split(text)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    return name, arguments[:cut], arguments[cut + 1 :]


BRAID = [command for _, command in entries() if command.startswith(".venv/bin/braid ")]


def test_the_page_goes_from_an_empty_project_back_to_one() -> None:
    heads = re.findall(r"^## (\d)\. ", README, re.MULTILINE)
    assert heads == [str(number) for number in range(1, 10)]
    assert len(BRAID) >= 6
    for need in ("terraform -chdir=infra/terraform apply", "--watch", "flex-template run", "jobs cancel", "destroy"):
        assert need in README, need


@pytest.mark.parametrize(("note", "command"), entries())
def test_each_command_says_whether_it_was_tried(note: str, command: str) -> None:
    assert TRIED.match(note), command
    needs_account = command.startswith(("gcloud", "terraform", "export"))
    assert needs_account == ("needs an account" in note), command


@pytest.mark.parametrize("command", BRAID)
def test_braid_takes_the_command(command: str) -> None:
    name, arguments, _ = braid(command)
    commands: Any = typer.main.get_command(app)
    assert name in commands.commands
    commands.commands[name].make_context(name, arguments)


@pytest.mark.parametrize("command", [command for command in BRAID if " -- " in command])
def test_beam_knows_every_option_after_the_dashes(command: str) -> None:
    options = given(braid(command)[2])
    assert options["runner"] == "DataflowRunner"
    assert options["service_account_email"] == SET["WORKER"]
    assert options["use_public_ips"] is False


def test_a_launch_is_on_a_machine_that_holds_the_plan_of_the_whole_corpus() -> None:
    (launch,) = [command for _, command in entries() if "flex-template run" in command]
    (gigabytes,) = re.findall(r"`n2-highmem-4` has (\d+) GB, for the minutes", README)
    assert "--launcher-machine-type n2-highmem-4 " in launch
    assert int(gigabytes) == 4 * 8
    assert all(
        float(each) < int(gigabytes)
        for each in re.findall(r"^\| this machine.*\| ([\d.]+) GB \|", README, re.MULTILINE)
    )


def test_every_variable_used_is_set_on_the_page() -> None:
    used = set(re.findall(r"\$\{?([A-Z]+)\b", " ".join(command for _, command in entries())))
    exported = set(re.findall(r"\b([A-Z]+)=", " ".join(c for _, c in entries() if c.startswith("export"))))
    assert used == exported == SET.keys()


def test_the_rehearsal_is_a_good_spec() -> None:
    spec = specs.load(FOLDER / "rehearsal.yaml")
    resources = spec.views["image"].resources
    assert resources.accelerator == "nvidia-l4"
    assert resources.machine_type is not None
    assert resources.machine_type.startswith("g2-"), "an L4 exists on G2 machines alone"
    assert resources.image is not None
    assert "/worker-gpu:" in resources.image
    assert 1000 / spec.corpus.shard_rows >= (resources.workers or 0), "a worker without a shard is paid for nothing"
    assert spec.store.scheme == "gs"


def test_every_file_that_the_page_names_is_there() -> None:
    for path in re.findall(r"`((?:infra|tests)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path


def test_the_files_of_infra_name_nothing_but_examples_as_accounts() -> None:
    for path in (ROOT / "infra").rglob("*"):
        if path.is_file() and path.suffix in (".md", ".yaml", ".json", ".tf", ".Dockerfile"):
            for address in re.findall(r"[\w.-]+@[\w-]+\.[\w.]+", path.read_text()):
                assert address.endswith((".iam.gserviceaccount.com", "example.org")), f"{path}: {address}"
