"""The flex template's metadata: of Dataflow's schema, and of the parameters that its entry module takes."""

import json
import re
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ConfigDict, Field

from jobs import flex
from jobs.plan import STAGES
from jobs.spec import Name
from tests.infra.dockerfile import ROOT, last_stage, pairs

METADATA: dict[str, Any] = json.loads((ROOT / "infra" / "dataflow" / "metadata.json").read_text())


class Parameter(BaseModel):
    """ParameterMetadata of the Dataflow API v1b3, what of it a batch template may use.

    https://cloud.google.com/dataflow/docs/reference/rest/v1b3/projects.locations.flexTemplates (TemplateMetadata).
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(pattern=r"^[a-z][A-Za-z0-9_]*$")
    label: str = Field(min_length=1)
    helpText: str = Field(min_length=1)
    isOptional: bool = False
    regexes: list[str] = Field(min_length=1)
    paramType: str = Field(
        pattern=r"^(DEFAULT|TEXT|GCS_READ_FILE|GCS_READ_FOLDER|GCS_WRITE_FOLDER|ENUM|NUMBER|BOOLEAN)$"
    )
    defaultValue: str | None = None


class Template(BaseModel):
    """TemplateMetadata."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1)
    description: str = Field(min_length=1)
    parameters: list[Parameter] = Field(min_length=1)


TEMPLATE = Template.model_validate(METADATA)
PARAMETERS = {each.name: each for each in TEMPLATE.parameters}
ACCEPTED = {
    "spec": ["gs://acme-media-1-braid-store/specs/photos.yaml", "gs://abc/a.yml", "gs://abc/a-b/c_d/e.v2.yaml"],
    "stage": list(STAGES),
    "name": ["image", "caption_fr", "2d-boxes", "a" * 64],
}
REFUSED = {
    "spec": [
        *("photos.yaml", "s3://acme/photos.yaml", "gs://acme/photos.json", "gs://acme/", "gs://Acme/photos.yaml"),
        *(
            "gs://acme/../photos.yaml",
            "gs://acme/a b.yaml",
            "gs://acme/photos.yaml --runner=x",
            "gs://acme//a.yaml",
            "",
        ),
    ],
    "stage": ["", "Encode", "encode,index", "fit", "encode\n"],
    "name": ["", "Image", "a/b", "-x", "a" * 65, "image,caption"],
}


def matches(name: str, value: str) -> bool:
    """Whether a value is let through: Dataflow wants the whole of it to match each of the patterns."""
    return all(re.fullmatch(pattern, value) for pattern in PARAMETERS[name].regexes)


def test_the_entry_module_takes_these_parameters_and_no_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched: list[Any] = []
    monkeypatch.setattr(flex, "launch", lambda *arguments: launched.append(arguments))
    values = {name: values[0] for name, values in ACCEPTED.items()}
    flex.main([f"--{name}={value}" for name, value in values.items()])
    assert launched == [(*values.values(), [])], "each parameter by itself, and nothing left over for Beam"
    with pytest.raises(SystemExit):
        flex.main(["--help"])
    assert set(re.findall(r"^ +--(\w+)", capsys.readouterr().out, re.MULTILINE)) == PARAMETERS.keys()


def test_the_entry_module_needs_what_is_not_optional(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        flex.main([])
    missing = capsys.readouterr().err.rpartition("required: ")[2]
    assert set(re.findall(r"--(\w+)", missing)) == {name for name, each in PARAMETERS.items() if not each.isOptional}


def test_a_name_is_what_a_spec_may_call_a_thing() -> None:
    (pattern,) = PARAMETERS["name"].regexes
    assert pattern in str(get_args(Name))


def test_every_parameter_has_examples_here() -> None:
    assert ACCEPTED.keys() == REFUSED.keys() == PARAMETERS.keys()


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ACCEPTED.items() for value in values])
def test_a_good_value_is_let_through(name: str, value: str) -> None:
    assert matches(name, value)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_a_bad_value_is_refused(name: str, value: str) -> None:
    assert not matches(name, value)


def test_the_launcher_runs_the_entry_module() -> None:
    stage = last_stage(ROOT / "infra" / "dataflow" / "launcher.Dockerfile")
    environment = {name: value for line in stage if line.word == "ENV" for name, value in pairs(line.value).items()}
    assert ("COPY", f"jobs/flex.py {environment['FLEX_TEMPLATE_PYTHON_PY_FILE']}") in stage
    assert not [line for line in stage if line.word == "ENTRYPOINT"], "the base's own entry point is the launcher"
