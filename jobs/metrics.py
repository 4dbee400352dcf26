"""Figures of a run for programs: JSON, or Prometheus's text format for node_exporter's textfile collector."""

import errno
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from featurestore.errors import InputError

if TYPE_CHECKING:
    from jobs.run import Done

_GAUGES = {
    "braid_job_seconds": ("seconds", "Seconds that the job took, from its planning to its commit."),
    "braid_job_span_seconds": ("span_s", "Seconds from the start of its first shard to the end of its last."),
    "braid_job_shards": ("shards", "Shards that it published."),
    "braid_job_values": ("values", "Values that it computed; those taken up from an earlier run left out."),
    "braid_job_read_bytes": ("read_bytes", "Bytes of the values that it read, or of the views that it was made from."),
    "braid_job_written_bytes": ("written_bytes", "Bytes of the files that it published."),
    "braid_job_rejected": ("rejected", "Values in quarantine of the shards that it published."),
    "braid_job_busy_seconds": ("shard_s", "Seconds that its shards took, summed over workers."),
    "braid_job_longest_shard_seconds": ("longest_s", "Seconds that its longest shard took."),
    "braid_job_worker_seconds": ("worker_s", "Seconds that its workers had shards to do, summed over workers."),
    "braid_job_values_per_worker_second": ("values_per_worker_s", "Values that a worker computed in a second."),
    "braid_job_waiting_seconds": ("waiting_s", "Seconds that threads of its workers waited for data."),
    "braid_job_decoding_seconds": ("decoding_s", "Seconds that threads of its workers decoded."),
    "braid_job_model_seconds": ("model_s", "Seconds that threads of its workers were in the model."),
    "braid_job_writing_seconds": ("writing_s", "Seconds that threads of its workers wrote shards."),
    "braid_job_stall_ratio": ("stall", "Share of its workers' seconds in which the model, or its GPU, had no batch."),
}


def check_path(path: Path) -> None:
    """Raises InputError where figures could not be written; leaves no file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR) if path.is_dir() else "Not a file")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"--metrics {path}: cannot be written ({error.strerror}); name another file") from error


def write(path: Path, done: "Sequence[Done]") -> None:
    """Writes the figures of a run, whole or not at all: as Prometheus text where the name ends in .prom, else as JSON."""
    if path.suffix == ".prom":
        put(path, "".join(f"{line}\n" for line in prometheus(done)))
    else:
        put(path, json.dumps([step._asdict() for step in done], indent=1))


def put(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    # The collector reads what ends in .prom alone.
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def prometheus(done: "Iterable[Done]") -> Iterator[str]:
    """Lines of Prometheus's text exposition format 0.0.4; a figure that the runner does not tell has no line."""
    done = list(done)
    for metric, (field, told) in _GAUGES.items():
        yield f"# HELP {metric} {told}"
        yield f"# TYPE {metric} gauge"
        for step in done:
            value = getattr(step, field)
            if value is not None:
                # Not `job`: that label is the scraper's own.
                labels = {"stage": step.stage, "name": step.name}
                pairs = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
                yield f"{metric}{{{pairs}}} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
