"""What jobs say of themselves, through the standard logging: loggers `braid.<stage>`, a readable message, and its fields.

As JSON they go to standard error, one line each. From a worker on another machine the line is the message itself, which its
runner's own log carries; where that has no handler (Dask's), standard error does.
"""

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any

from featurestore.addresses import redacted

FIELDS = ("job", "stage", "name", "shard", "event", "values", "rejected", "seconds")
"""Stand in every line of JSON, null where they say nothing, beside `time`, `level`, `logger` and `message`."""

_INHERITED = "BRAID_LOG_JSON"


def event(
    job: str,
    what: str,
    *,
    shard: str | None = None,
    values: int | None = None,
    rejected: int | None = None,
    seconds: float | None = None,
    level: int = logging.INFO,
    detail: object = "",
    as_json: bool = False,
) -> None:
    """Tells of a job (`encode image`) that something happened (`shard done`), to whom it did and what it took.

    `as_json` is whether the process that submitted the job logs so; in that process itself it changes nothing.
    """
    stage, _, name = job.partition(" ")
    fields = {
        "job": job,
        "stage": stage,
        "name": name,
        "shard": shard,
        "event": what,
        "values": values,
        "rejected": rejected,
        "seconds": None if seconds is None else round(seconds, 3),
    }
    figures = [
        f"{figure} {unit}"
        for figure, unit in ((values, "values"), (rejected, "rejected"), (fields["seconds"], "s"))
        if figure is not None
    ]
    told = f"{what} {shard}" if shard else what
    text = (
        f"{job}: {told}"
        + (f": {', '.join(figures)}" if figures else "")
        + (f": {redacted(str(detail))}" if detail else "")
    )
    logger, extra = logging.getLogger(f"braid.{stage}"), {"braid": fields}
    if as_json and not started():
        record = logger.makeRecord(logger.name, level, "", 0, text, (), None, extra=extra)
        text = _JsonLine().format(record)
        if not logger.hasHandlers():
            print(text, file=sys.stderr, flush=True)
            return
    logger.log(level, "%s", text, extra=extra)


def start() -> None:
    """From here on all that is logged is JSON on standard error, in this process and the worker processes it starts."""
    os.environ[_INHERITED] = "1"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLine())
    logging.getLogger().addHandler(handler)
    logging.getLogger("braid").setLevel(logging.INFO)
    # A warning of a library is a line among the others too.
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.WARNING)


def started() -> bool:
    """Whether `start` was called here."""
    return any(isinstance(handler.formatter, _JsonLine) for handler in logging.getLogger().handlers)


def inherit() -> None:
    """`start`, in a worker process, where the process that started it did so."""
    if os.environ.get(_INHERITED):
        start()


class _JsonLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            **dict.fromkeys(FIELDS),
            **getattr(record, "braid", {}),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)
