"""infra/terraform is whole: it parses, fits the provider's schema, refers to what there is, and grants what the list says.

`terraform init`, `validate` with the provider, `plan` and `apply` were never run: they need a download and an account.
"""

import inspect
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from apache_beam.runners.dataflow.internal import apiclient

from tests.infra.google_schema import SCHEMA
from tests.infra.terraform import FOLDER, Block, blocks, of

README = (FOLDER.parent / "dataflow" / "README.md").read_text()
META = {"for_each", "depends_on"}
REFERENCE = re.compile(r"\b((?:data\.)?google_\w+\.\w+|var\.\w+|local\.\w+)(?:\.(\w+))?")
ACCOUNTS = {"google_service_account.worker": "worker", "google_service_account.builder": "builder"}
PEOPLE = {"var.submitters": "submitter", "var.readers": "reader"}
PLACES = {
    "google_storage_bucket.store": "the store's bucket",
    "google_storage_bucket.temp": "the temporary bucket",
    "google_artifact_registry_repository.images": "the image repository",
    "google_service_account.worker": "the worker's account",
    "var.source_buckets": "each source bucket",
    "var.project": "the project",
}
terraform = pytest.mark.skipif(shutil.which("terraform") is None, reason="needs Terraform, which is not installed")


def strings(value: Any) -> Iterator[str]:
    """Every string below a value."""
    if isinstance(value, dict):
        for each in value.values():
            yield from strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from strings(each)
    elif isinstance(value, str):
        yield value


def references(block: Block) -> Iterator[tuple[str, str | None]]:
    """(address, attribute) of everything that a block's expressions refer to."""
    for text in strings(block.body):
        for expression in re.findall(r"\$\{(.*)\}", text, re.DOTALL):
            for address, attribute in REFERENCE.findall(expression):
                yield address, attribute or None


def mistakes(fields: dict[str, Any], body: dict[str, Any], where: str) -> Iterator[str]:
    """What a body has that its schema does not, and what it lacks."""
    for name in body.keys() - META - fields.keys():
        yield f"{where} has no argument {name}"
    for name, field in fields.items():
        if field["required"] and name not in body:
            yield f"{where} needs {name}"
        for inner in body.get(name, []) if "block" in field else []:
            yield from mistakes(field["block"], inner, f"{where}.{name}")


def schema() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(SCHEMA.read_text())
    return loaded


def test_the_schema_is_of_the_pinned_provider() -> None:
    (pinned,) = of("terraform")["terraform"].body["required_providers"]
    assert {f"= {entry['provider']}" for entry in schema().values()} == {pinned["google"]["version"]}


@pytest.mark.parametrize(
    "block", [each for each in blocks() if each.kind in ("resource", "data")], ids=lambda b: b.address
)
def test_block_fits_the_schema(block: Block) -> None:
    fields = schema()[f"{block.kind} {block.labels[0]}"]["fields"]
    assert list(mistakes(fields, block.body, block.address)) == []


def test_the_schema_refuses_what_it_should() -> None:
    fields = schema()["resource google_storage_bucket"]["fields"]
    body = {"name": "a", "lifecycle_rule": [{"condition": [{"ages": 1}]}]}
    assert set(mistakes(fields, body, "b")) == {
        "b needs location",
        "b.lifecycle_rule needs action",
        "b.lifecycle_rule.condition has no argument ages",
    }


def test_every_reference_is_to_what_there_is() -> None:
    there = {**of("resource"), **of("data"), **of("variable")}
    for block in blocks():
        for address, attribute in references(block):
            assert address in there, f"{block.file}: {block.address} refers to {address}"
            target = there[address]
            if attribute and target.kind != "variable":
                assert attribute in schema()[f"{target.kind} {target.labels[0]}"]["exports"], f"{address}.{attribute}"


def test_every_variable_is_used_typed_described_and_checked() -> None:
    used = {address for block in blocks() if block.kind != "variable" for address, _ in references(block)}
    for address, block in of("variable").items():
        assert address in used, address
        assert {"description", "type", "validation"} <= block.body.keys(), address
    assert all(block.body["description"] for block in of("output").values())


def grants() -> set[tuple[str, str, str]]:
    """(who, role, on what) of every grant."""
    found: set[tuple[str, str, str]] = set()
    for address, block in of("resource").items():
        if not address.split(".")[0].endswith("_iam_member"):
            continue
        each = str(block.body.get("for_each", ""))
        who = [name for key, name in (ACCOUNTS | PEOPLE).items() if key in block.body["member"]]
        who = who or [name for key, name in PEOPLE.items() if key in each]
        target = next(
            str(block.body[key])
            for key in ("bucket", "repository", "service_account_id", "project")
            if key in block.body
        )
        place = [name for key, name in PLACES.items() if key in (each if "each." in target else target)]
        roles = re.findall(r"roles/[\w.]+", each) if block.body["role"] == "${each.value}" else [block.body["role"]]
        assert len(who) == len(place) == 1, address
        assert roles, address
        found |= {(who[0], role, place[0]) for role in roles}
    return found


def test_what_is_granted_is_the_list_in_the_walkthrough() -> None:
    rows = re.findall(r"^\| (\w+) \| `(roles/[\w.]+)` \| ([^|]+?) \|", README, re.MULTILINE)
    assert len(rows) == len(set(rows)) == 18
    assert grants() == set(rows)


def test_whoever_stages_may_look_at_the_bucket() -> None:
    """Beam's `stage_file` asks for the bucket before it uploads; of the roles for objects none has storage.buckets.get."""
    assert "_storage_client.get_bucket(" in inspect.getsource(apiclient.DataflowApplicationClient.stage_file)
    for who in ("submitter", "worker"):
        for role in ("roles/storage.objectAdmin", "roles/storage.legacyBucketReader"):
            assert (who, role, "the temporary bucket") in grants()


def test_the_services_that_terraform_asks_by_are_turned_on_before_it() -> None:
    asked = {"cloudresourcemanager.googleapis.com", "serviceusage.googleapis.com"}
    commands = [line for line in README.splitlines() if line.startswith(("gcloud", "terraform"))]
    first = next(place for place, line in enumerate(commands) if line.startswith("terraform"))
    (enabled,) = [line for line in commands[:first] if line.startswith("gcloud services enable ")]
    assert asked <= set(enabled.split())
    assert "--project" in enabled.split()
    assert "var.project" in str(of("data")["data.google_project.this"].body["project_id"])


def test_no_right_is_broad() -> None:
    for who, role, place in grants():
        assert role not in ("roles/owner", "roles/editor", "roles/viewer")
        if place == "the project":
            assert not re.search(r"(?i)admin|storage|iam|user", role), (who, role)
        assert "admin" not in role.lower() or role == "roles/storage.objectAdmin", (who, role)
    everyone = {"allUsers", "allAuthenticatedUsers"}
    assert not everyone & {text for block in of("resource").values() for text in strings(block.body)}
    # A policy or a binding would take away the rights of others in the project; a key would be a secret in the state.
    assert not [address for address in of("resource") if re.search(r"_iam_(policy|binding)\.|_account_key\.", address)]


def test_no_bucket_can_be_public_and_the_store_is_never_deleted_with_its_content() -> None:
    for name in ("store", "temp"):
        body = of("resource")[f"google_storage_bucket.{name}"].body
        assert body["uniform_bucket_level_access"] is True
        assert body["public_access_prevention"] == "enforced"
    store = of("resource")["google_storage_bucket.store"].body
    assert store["force_destroy"] is False
    assert "lifecycle_rule" not in store


def test_workers_reach_each_other_and_google_and_nothing_else() -> None:
    assert of("resource")["google_compute_subnetwork.workers"].body["private_ip_google_access"] is True
    firewalls = [block for block in of("resource").values() if block.labels[0] == "google_compute_firewall"]
    (rule,) = firewalls
    assert rule.body["allow"] == [{"protocol": "tcp", "ports": ["12345-12346"]}]
    assert rule.body["source_tags"] == rule.body["target_tags"] == ["dataflow"]
    assert not [address for address in of("resource") if address.startswith("google_compute_router")], "a way out"


def run_terraform(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CHECKPOINT_DISABLE": "1", "TF_IN_AUTOMATION": "1"}
    return subprocess.run(
        ["terraform", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


@terraform
def test_it_is_formatted() -> None:
    done = run_terraform("fmt", "-check", "-diff", folder=FOLDER)
    assert done.returncode == 0, done.stdout + done.stderr


GOOD = {
    "project": "acme-media-1",
    "region": "europe-west4",
    "source_buckets": ["acme-photos"],
    "submitters": ["group:ml@example.org"],
    "readers": ["serviceAccount:train@acme-media-1.iam.gserviceaccount.com"],
    "billing_account": "012345-6789AB-CDEF01",
    "monthly_budget": 2000,
    "alarm_email": "ml@example.org",
}
BAD = {
    "project": "Acme",
    "region": "europe-west4-a",
    "name": "a-name-that-is-far-too-long-for-an-account",
    "source_buckets": ["gs://acme-photos/2026"],
    "submitters": ["allUsers"],
    "readers": ["ml@example.org"],
    "subnet_range": "10.0.0.0/30",
    "billing_account": "My Billing Account",
    "monthly_budget": 0.5,
    "alarm_email": "nobody",
}


def planned(values: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
    """Terraform's plan of the variables alone, for which it needs no provider."""
    shutil.copy(FOLDER / "variables.tf", folder)
    (folder / "terraform.tfvars.json").write_text(json.dumps(values))
    return run_terraform("plan", "-input=false", "-no-color", folder=folder)


@terraform
def test_good_values_are_accepted(tmp_path: Path) -> None:
    done = planned(GOOD, tmp_path)
    assert done.returncode == 0, done.stderr


@terraform
def test_each_bad_value_is_refused_with_what_is_allowed(tmp_path: Path) -> None:
    assert BAD.keys() == {block.labels[0] for block in of("variable").values()}
    done = planned(BAD, tmp_path)
    assert done.returncode != 0
    said = " ".join(re.sub(r"[│╷╵]", " ", done.stderr).split())
    for name in BAD:
        (rule,) = of("variable")[f"var.{name}"].body["validation"]
        assert rule["error_message"] in said, name
