"""infra/dataflow/README.md and infra/docker/README.md, which it sends to for the images: their commands are ones that Braid and
Beam take, each says whether it was tried, and what one needs another gave before.
"""

import re
import shlex
from typing import Any

import pytest
import typer.main
import yaml

from featurestore import encoders
from jobs import spec as specs
from jobs.cli import app
from pipelines.beam_options import given
from tests.infra.dockerfile import DOCKERFILES, ROOT

FOLDER = ROOT / "infra" / "dataflow"
README = (FOLDER / "README.md").read_text()
IMAGES = (ROOT / "infra" / "docker" / "README.md").read_text()
# What the walkthrough's shell variables hold.
SET = {
    "PROJECT": "acme-media-1",
    "REGION": "europe-west4",
    "STORE": "gs://acme-media-1-braid-store",
    "TEMP": "gs://acme-media-1-braid-temp/tmp",
    "IMAGES": "europe-west4-docker.pkg.dev/acme-media-1/braid",
    "WORKER": "braid-worker@acme-media-1.iam.gserviceaccount.com",
    "BUILDER": "projects/acme-media-1/serviceAccounts/braid-builder@acme-media-1.iam.gserviceaccount.com",
    "TAG": "1",
    "SUBNETWORK": "regions/europe-west4/subnetworks/braid",
}
TRIED = re.compile(r"# (tried|not tried: needs (an account|Docker|Docker and an account))\b")


def entries(page: str = README) -> list[tuple[str, str]]:
    """(the comment above, the command) of every command, in the order of the page."""
    found, note = [], ""
    for block in re.findall(r"^```bash\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
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


@pytest.mark.parametrize(("note", "command"), entries() + entries(IMAGES))
def test_each_command_says_whether_it_was_tried(note: str, command: str) -> None:
    assert TRIED.match(note), command
    needs_account = command.startswith(("gcloud", "terraform", "export", "docker push"))
    assert needs_account == ("an account" in note), command
    assert command.startswith("docker ") == ("needs Docker" in note), command


def before(page: str, first: str, then: str) -> bool:
    """Whether every command that begins with `then` has one before it that begins with `first`."""
    commands = [command for _, command in entries(page)]
    places = [place for place, command in enumerate(commands) if command.startswith(then)]
    return bool(places) and any(command.startswith(first) for command in commands[: places[0]])


def test_a_person_is_signed_in_and_terraform_has_its_bucket_before_they_are_needed() -> None:
    assert entries()[0][1] == "gcloud auth login"
    assert before(README, "gcloud auth application-default login", "terraform")
    assert before(README, "gcloud storage buckets create gs://acme-terraform ", "terraform -chdir=infra/terraform init")
    assert "-backend-config=bucket=acme-terraform " in README
    assert before(IMAGES, 'gcloud auth configure-docker "$REGION-docker.pkg.dev"', "docker push")
    assert SET["IMAGES"].startswith(f"{SET['REGION']}-docker.pkg.dev/")
    for quota in ("NVIDIA_L4_GPUS", "GPUS_ALL_REGIONS"):
        assert f"`{quota}`" in README


def test_every_image_is_built_and_pushed_under_the_name_that_jobs_are_given() -> None:
    built = {
        (ROOT / path).stem: tag
        for _, command in entries(IMAGES)
        for path, tag in re.findall(r'^docker build -f (\S+) -t "(\S+)" \.$', command)
    }
    assert built == {path.stem: f"$IMAGES/{path.stem}:$TAG" for path in DOCKERFILES}
    pushed = [command.split()[-1].strip('"') for _, command in entries(IMAGES) if command.startswith("docker push")]
    assert sorted(pushed) == sorted(built.values())
    used = set(re.findall(r'"\$IMAGES/[\w-]+:[^"]*"', " ".join(command for _, command in entries())))
    assert {each.strip('"') for each in used} == set(built.values())


def test_cloud_build_is_given_what_it_has_no_default_for() -> None:
    (command,) = [command for _, command in entries(IMAGES) if command.startswith("gcloud builds submit")]
    build = yaml.safe_load((ROOT / "infra" / "docker" / "cloudbuild.yaml").read_text())
    (given_here,) = re.findall(r'--substitutions "([^"]+)"', command)
    assert {each.partition("=")[0] for each in given_here.split(",")} == {
        name for name, default in build["substitutions"].items() if not default
    }


def test_the_page_of_the_images_names_the_encoders_that_are_in_them() -> None:
    (part,) = re.findall(r"^## Weights that are in no package\n(.*?)^## ", IMAGES, re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"`([a-z0-9]+(?:-[a-z0-9]+)*)`", part)) & set(encoders.keys()) == set(encoders.ready())


def test_watching_is_of_a_spec_as_an_address_has_no_end() -> None:
    (command,) = [command for command in BRAID if "--watch" in command]
    assert braid(command)[1][0].endswith(".yaml")


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


def test_every_variable_used_on_either_page_is_set_on_the_first() -> None:
    used = set(re.findall(r"\$\{?([A-Z_]+)\b", " ".join(command for _, command in entries() + entries(IMAGES))))
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
    for path in re.findall(r"`((?:infra|tests)/[\w./-]+)`", README + IMAGES):
        assert (ROOT / path).exists(), path


def test_the_files_of_infra_name_nothing_but_examples_as_accounts() -> None:
    for path in (ROOT / "infra").rglob("*"):
        if path.is_file() and path.suffix in (".md", ".yaml", ".json", ".tf", ".Dockerfile"):
            for address in re.findall(r"[\w.-]+@[\w-]+\.[\w.]+", path.read_text()):
                assert address.endswith((".iam.gserviceaccount.com", "example.org")), f"{path}: {address}"
