"""What each stage submits to Dataflow, as a text that a person can read: `python -m tests.golden` writes it anew.

A difference from the files here is a change of what runs in a cluster: look at it, and commit the new text if it was meant.
`FlatMap(<lambda at core.py:4094>)` is no line of the installed Beam: its Create keeps that name in every version
(apache/beam#36381).
"""

from collections.abc import Iterator
from pathlib import Path

from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner import translations
from rich.console import Console

from jobs.run import Runner
from jobs.spec import Spec, parse
from tests.conftest import small_spec
from tests.dataflow import Sent, Service, carrying_out, object_store, serving, upload
from tests.planted import write_planted

FOLDER = Path(__file__).parent
SAMPLES = 48
BUCKET = "shelf"
GPU = "{accelerator: nvidia-l4, min_ram: 16GB, workers: 2, image: docker.example/gpu:1}"
CPU_IMAGE = "docker.example/cpu:1"
UNUSED = ("  timbre:", "  other:")
"""Lines of the small spec that would only repeat what another of its stage shows."""


def rehearsal_spec(endpoint: str, store: str = "store") -> Spec:
    """The spec of `rehearsal_text`."""
    return parse(rehearsal_text(endpoint, store), "the rehearsal's spec")


def rehearsal_text(endpoint: str, store: str) -> str:
    """One of each stage but two views: `loud` on GPUs, `short` without any resources."""
    text = small_spec(Path("CORPUS"), Path("STORE")).replace("CORPUS", f"s3://{BUCKET}/corpus")
    text = text.replace("{uri: STORE}", f"{{uri: s3://{BUCKET}/{store}, endpoint: '{endpoint}', allow_http: true}}")
    text = text.replace("options: {batch_size: 32}}", f"options: {{batch_size: 32}}, resources: {GPU}}}")
    lines = [line for line in text.splitlines() if not line.startswith(UNUSED)]
    return "\n".join(lines).replace("[loud, timbre]", "[loud, short]")


def rehearse(folder: Path, endpoint: str, service: Service) -> list[Sent]:
    """Submits every stage to a service that carries it out; the jobs in the order in which they came."""
    write_planted(folder / "corpus", SAMPLES)
    upload(folder / "corpus", endpoint, f"{BUCKET}/corpus")
    service.answer = carrying_out(service)
    args = service.args(f"--sdk_container_image={CPU_IMAGE}")
    Runner(rehearsal_spec(endpoint), Console(quiet=True), args).run()
    return list(service.sent)


def summaries(folder: Path) -> dict[str, str]:
    """Name of the golden file -> its text, submitted just now."""
    with object_store(BUCKET) as endpoint, serving(folder / "staging") as service:
        return {golden_name(sent): summary(sent) for sent in rehearse(folder, endpoint, service)}


def golden_name(sent: Sent) -> str:
    """`braid-encode-loud-1b3c3fb9` is told in encode-loud.txt."""
    return "-".join(sent.job["name"].split("-")[1:-1]) + ".txt"


def summary(sent: Sent) -> str:
    """The job's settings, its steps with their coders and hints, and how Beam fuses them."""
    pool, environment = sent.pool, sent.job["environment"]
    settings = {
        "machine": pool.get("machineType", "Dataflow's default"),
        "workers": pool.get("numWorkers", "Dataflow's choice"),
        "autoscaling": {1: "none"}.get(pool["autoscalingSettings"].get("algorithm"), "Dataflow's default"),
        "threads per process": pool["numThreadsPerWorker"],
        "images": ", ".join(sorted({each["containerImage"] for each in pool["sdkHarnessContainerImages"]})),
        "experiments": ", ".join(sent.experiments),
        "service options": ", ".join(environment.get("serviceOptions", [])) or "none",
    }
    lines = [*(f"{name}: {value}" for name, value in settings.items()), "", "steps, and what leaves them:"]
    parts = sent.pipeline.components
    for step in leaves(sent.pipeline):
        out = ", ".join(coder(parts, parts.pcollections[each].coder_id) for each in step.outputs.values())
        lines.append(f"  {step.unique_name}: {urn(step.spec.urn)} -> {out}")
        lines += [f"      {hint}" for hint in hints(parts, step.environment_id)]
    lines += ["", "fused stages:"]
    for number, stage in enumerate(fused(sent.pipeline), 1):
        lines += [f"  {number}.", *(f"      {name}" for name in stage)]
    return "\n".join(lines) + "\n"


def leaves(pipeline: beam_runner_api_pb2.Pipeline) -> list[beam_runner_api_pb2.PTransform]:
    """The steps that do something, in the order of the graph."""
    transforms, found = pipeline.components.transforms, []

    def walk(key: str) -> None:
        for child in transforms[key].subtransforms:
            walk(child)
        if not transforms[key].subtransforms and transforms[key].spec.urn:
            found.append(transforms[key])

    for root in pipeline.root_transform_ids:
        walk(root)
    return found


def urn(text: str) -> str:
    return text.removeprefix("beam:").removeprefix("transform:").rpartition(":")[0]


def coder(parts: beam_runner_api_pb2.Components, key: str) -> str:
    """A coder as the proto names it, e.g. kv(varint,row)."""
    inner = [coder(parts, each) for each in parts.coders[key].component_coder_ids]
    name = parts.coders[key].spec.urn.removeprefix("beam:coder:").partition(":")[0]
    return f"{name}({','.join(inner)})" if inner else name


def hints(parts: beam_runner_api_pb2.Components, environment: str) -> list[str]:
    """The resource hints of an environment, sorted."""
    found = parts.environments[environment].resource_hints if environment else {}
    return sorted(f"{urn(name)}={value.decode()}" for name, value in found.items())


def fused(pipeline: beam_runner_api_pb2.Pipeline) -> Iterator[list[str]]:
    """Names of the steps of each stage that Beam's own fuser makes of the pipeline; Dataflow's runs in the service."""
    copy = beam_runner_api_pb2.Pipeline()
    copy.CopyFrom(pipeline)
    _, stages = translations.create_and_optimize_stages(
        copy,
        phases=[
            translations.annotate_downstream_side_inputs,
            translations.expand_gbk,
            translations.greedily_fuse,
            translations.sort_stages,
        ],
        known_runner_urns=frozenset([common_urns.primitives.IMPULSE.urn, common_urns.primitives.GROUP_BY_KEY.urn]),
    )
    for stage in stages:
        yield [transform.unique_name for transform in stage.transforms]
