"""`views.<view>.resources`: what encodes a view, which changes nothing of what is made."""

from pathlib import Path

import pytest
from rich.console import Console

from featurestore.errors import SpecError
from jobs import plan
from jobs.run import Runner
from jobs.spec import Spec, parse
from pipelines.dataflow import Resources
from tests.conftest import Made, small_spec

ALL = (
    "{accelerator: nvidia-l4, min_ram: 16GB, workers: 8, machine_type: g2-standard-8, image: eu.pkg.dev/p/braid/gpu:1}"
)


def with_resources(text: str, resources: str) -> Spec:
    return parse(
        text.replace("{field: sound, encoder: mfcc}", f"{{field: sound, encoder: mfcc, resources: {resources}}}"), "s"
    )


def test_resources_are_read_and_there_are_none_by_default() -> None:
    spec = with_resources(small_spec(Path("/c"), Path("/s")), ALL)
    found = Resources(**spec.views["timbre"].resources.model_dump())
    assert found == Resources("nvidia-l4", "16GB", 8, "g2-standard-8", "eu.pkg.dev/p/braid/gpu:1")
    assert Resources(**spec.views["loud"].resources.model_dump()) == Resources()


def test_resources_make_nothing_stale_and_nothing_else(small: Made) -> None:
    text = small.spec.read_text()
    plain, rich = parse(text, "s"), with_resources(text, ALL)
    assert plain != rich
    assert plan.view_plans(plain) == plan.view_plans(rich)
    steps = plan.steps(rich, small.open().snapshot)
    assert {step.state for step in steps} == {plan.FRESH}


def test_the_local_runner_encodes_the_same_bytes_with_and_without(small: Made, tmp_path: Path) -> None:
    text = small.spec.read_text().replace(str(small.store), str(tmp_path / "store"))
    Runner(with_resources(text, ALL), Console(quiet=True)).run()
    assert Made(small.corpus, small.spec, tmp_path / "store").open().digest() == small.open().digest()


@pytest.mark.parametrize(
    ("resources", "told"),
    [
        ("{gpu: nvidia-l4}", r"\.gpu: is not a key of this section; allowed: accelerator, min_ram, workers"),
        ("{acelerator: nvidia-l4}", "did you mean 'accelerator'"),
        (
            "{accelerator: 'type:nvidia-l4;count:2'}",
            "write the type's name alone, like nvidia-l4 .* a worker has one GPU",
        ),
        ("{min_ram: 16}", r"\.min_ram: 16 is wrong"),
        ("{min_ram: 16 gigs}", "write a whole number and its unit: MB, GB"),
        ("{min_ram: 0GB}", "write a whole number and its unit"),
        ("{workers: 0}", "0 is wrong: write a whole number from 1"),
        ("{workers: '8'}", "write a whole number from 1, up to 4000, without quotes"),
        ("{machine_type: G2 standard}", "write the type's name alone"),
        ("{image: 'a b'}", "write the address of a container image"),
        ("nvidia-l4", "is no section; allowed keys: accelerator"),
    ],
)
def test_wrong_resources_are_told_with_their_line(resources: str, told: str) -> None:
    with pytest.raises(SpecError, match=rf"line \d+: views\.timbre\.resources.*{told}"):
        with_resources(small_spec(Path("/c"), Path("/s")), resources)
