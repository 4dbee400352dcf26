"""The `braid` command: one command per job, the same spec, the same errors. Beam's options pass through after `--`."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ModuleNotFoundError:  # with the extra [read] alone
    sys.exit("error: the command line needs the packages of the extra [run]: pip install 'braid[run]'")

from featurestore.errors import BraidError, InputError, NotFound

app = typer.Typer(
    help="Aligned multimodal embeddings: shard a corpus, encode it, index it, fuse it into training sets.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="The spec, a YAML file.")]
BeamArgs = Annotated[
    list[str] | None, typer.Argument(metavar="[-- BEAM OPTIONS]", help="Beam's own options, after --.")
]
WorkerCount = Annotated[
    int, typer.Option("--workers", min=1, help="Worker processes of this machine; each has its share of the cores.")
]
LogJson = Annotated[
    bool,
    typer.Option(
        "--log-json",
        help="Log every event as a line of JSON: here to standard error, elsewhere where the runner keeps its logs.",
    ),
]
Store = Annotated[
    str, typer.Argument(metavar="STORE", help="A folder, s3://… or gs://…; or a spec, for the store it names.")
]
Version = Annotated[int | None, typer.Option(help="Read this version instead of the newest.")]


_INTERRUPTED_STATUS = 130
_INTERRUPTED = (
    "interrupted; run it again to go on from what is done (a job that a service was given goes on there: end it there)"
)


def main() -> None:
    """Runs the command line: a BraidError is one message and exit status 1, a bug a traceback.

    What was typed is wrong, a name that is not there included: status 2, as the parser has for an unknown option.
    """
    _quiet()
    try:
        app()
    except (KeyboardInterrupt, RuntimeError) as error:
        # Beam raises an interrupt in a worker as a RuntimeError of its own.
        if isinstance(error, RuntimeError) and "KeyboardInterrupt" not in str(error):
            raise
        _complain(_INTERRUPTED, "")
        sys.exit(_INTERRUPTED_STATUS)
    except SystemExit as ended:
        # The parser takes an interrupt for itself, and says nothing.
        if ended.code == _INTERRUPTED_STATUS:
            _complain(_INTERRUPTED, "")
        raise
    except BraidError as error:
        _complain(str(error), "error: ")
        sys.exit(2 if isinstance(error, InputError | NotFound) else 1)


def _complain(text: str, prefix: str) -> None:
    from pipelines import log

    if log.started():
        logging.getLogger("braid").error("%s", text)
    else:
        print(f"{prefix}{text}", file=sys.stderr)


def _say(bars: bool = True) -> Any:
    from rich.console import Console

    # Piped, lines are for programs: they are not folded at 80 columns.
    width = None if sys.stdout.isatty() else 240
    return Console(highlight=False, soft_wrap=True, width=width, force_terminal=None if bars else False)


def _spec(path: Path) -> Any:
    from jobs import spec

    return spec.load(path)


def _storage(address: str) -> Any:
    """The store at an address, or the one that a spec names, with its endpoint and region."""
    from featurestore.storage import Storage

    return _spec(Path(address)).store if address.endswith((".yaml", ".yml")) else Storage.of(address)


def _store(address: str, version: int | None = None) -> Any:
    from featurestore.store import FeatureStore

    return FeatureStore(_storage(address), version=version)


def _run(
    path: Path,
    stages: tuple[str, ...],
    only: str | None,
    beam_args: list[str] | None,
    workers: int = 1,
    log_json: bool = False,
    metrics: Path | None = None,
) -> None:
    if log_json:
        from pipelines import log

        log.start()
    if metrics is not None:
        from jobs.metrics import check_path

        check_path(metrics)
    spec = _spec(path)
    if only is not None:
        spec.view(only)
    from jobs.report import counted
    from jobs.run import Runner

    # A bar would be drawn over the lines of JSON.
    if Runner(spec, _say(bars=not log_json), beam_args or (), workers, metrics).run(stages, only):
        from featurestore.catalog import Catalog

        snapshot = Catalog(spec.store).snapshot()
        rejected = sum(entry.rows for entry in snapshot.entries("quarantine"))
        note = f"; {counted(rejected, 'value')} in quarantine, see: braid quarantine {path}" if rejected else ""
        _say().print(f"store {spec.store.uri}, version {snapshot.version}{note}")


def _quiet() -> None:
    """What a worker raises on purpose is printed once, by `main`; Beam would log its traceback before."""
    os.environ.setdefault("RUST_LOG", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Dataflow's client logs a refusal as critical, and raises it too.
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL + 1)
    logging.getLogger("braid").setLevel(logging.CRITICAL + 1)
    logging.getLogger().setLevel(logging.ERROR)


@app.command()
def init(
    path: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER|FILE|SPEC", help="A folder, a manifest, a tar or a Parquet file, here or s3://…; or a spec."
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="The spec to write; CORPUS.yaml, if not given.")] = None,
) -> None:
    """Write a spec for a folder or file of samples, to be edited; or make and try the store of a spec."""
    if path.endswith((".yaml", ".yml")):
        if output is not None:
            raise InputError(
                f"--output {output}: {path} is a spec already, for its store to be made; leave --output out"
            )
        _make_store(Path(path))
        return
    from jobs import init as writing

    written, found = writing.write(path, output)
    console = _say()
    for line in found.seen:
        console.print(line, markup=False)
    for field in found.fields:
        console.print(f"  {field.name}: {field.modality}, {len(field.samples)} of {found.samples}", markup=False)
    console.print(f"{written} is written: read it, edit it, and then: braid plan {written}", markup=False)


def _make_store(spec: Path) -> None:
    """Writes and reads through both of a store's clients, and creates its catalog."""
    from featurestore.catalog import Catalog

    storage = _spec(spec).store
    with storage.scratch() as folder:
        local = folder / "probe.txt"
        local.write_text("braid")
        storage.put(local, "probe/probe.txt")
    if storage.read("probe/probe.txt") != b"braid":
        raise BraidError(f"{storage.uri}: what was written is not what is read back; check the endpoint")
    storage.delete("probe/probe.txt")
    Catalog(storage).create()
    _say().print(f"{storage.uri} is ready, version {Catalog(storage).snapshot().version}")


@app.command()
def plan(
    spec: SpecPath,
    sample: Annotated[
        int | None,
        typer.Option(
            min=1, help="Shard and encode so many samples aside, e.g. 200, to tell bytes, hours and price too."
        ),
    ] = None,
    prices: Annotated[
        Path | None,
        typer.Option(help="What an hour costs, YAML or JSON: {nvidia-l4: 0.70, cpu: 0.05}. Else the spec's prices."),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="With --sample: try other batch sizes of each encoder, and name the fastest.")
    ] = False,
) -> None:
    """Say which steps are fresh, which are stale and why, and what these take; run nothing.

    Told are shards, rows, bytes read, bytes of vectors, factory and build memory of indexes, and what cannot fit: memory, disk,
    an index with more lists than its rows train, windows shorter than an encoder takes. With a sample also bytes written by
    each stage, time on a machine like this one, hours of cores or GPUs and, where prices are given, what they cost; the run
    puts what it measured beside that.
    """
    from jobs.show_plan import read_prices, show

    if tune and sample is None:
        raise InputError("--tune tries batch sizes on a sample; give --sample too, e.g. --sample 500")
    loaded = _spec(spec)
    show(loaded, _say(), sample, loaded.prices if prices is None else read_prices(prices), tune)


@app.command()
def run(
    spec: SpecPath,
    metrics: Annotated[
        Path | None,
        typer.Option(
            help="After each step, write what they took to this file: JSON, or Prometheus text if it ends in .prom."
        ),
    ] = None,
    workers: WorkerCount = 1,
    log_json: LogJson = False,
    beam: BeamArgs = None,
) -> None:
    """Run every stage that is stale: shard, encode, align, index, fuse."""
    from jobs.plan import STAGES

    _run(spec, STAGES, None, beam, workers, log_json, metrics)


@app.command()
def shard(spec: SpecPath, workers: WorkerCount = 1, log_json: LogJson = False, beam: BeamArgs = None) -> None:
    """Bring the source's new samples into the store as shards."""
    _run(spec, ("shard",), None, beam, workers, log_json)


@app.command()
def encode(
    spec: SpecPath,
    view: Annotated[str | None, typer.Option(help="Only this view.")] = None,
    workers: WorkerCount = 1,
    log_json: LogJson = False,
    beam: BeamArgs = None,
) -> None:
    """Encode the shards that views lack."""
    _run(spec, ("encode",), view, beam, workers, log_json)


@app.command()
def align(spec: SpecPath, log_json: LogJson = False, beam: BeamArgs = None) -> None:
    """Learn the spaces that are stale."""
    _run(spec, ("align",), None, beam, log_json=log_json)


@app.command()
def index(spec: SpecPath, log_json: LogJson = False, beam: BeamArgs = None) -> None:
    """Build the indexes that are stale."""
    _run(spec, ("index",), None, beam, log_json=log_json)


@app.command()
def fuse(spec: SpecPath, log_json: LogJson = False, beam: BeamArgs = None) -> None:
    """Assemble the training sets that are stale."""
    _run(spec, ("fuse",), None, beam, log_json=log_json)


@app.command()
def compact(
    spec: SpecPath,
    purge: Annotated[
        bool, typer.Option("--purge", help="Erase for good what is gone: earlier versions of the corpus open no more.")
    ] = False,
    workers: WorkerCount = 1,
    log_json: LogJson = False,
    beam: BeamArgs = None,
) -> None:
    """Merge small shards and leave out samples that are gone; vectors are copied, nothing is encoded again."""
    if log_json:
        from pipelines import log

        log.start()
    from jobs.compact import compact as carry_out

    carry_out(_spec(spec), _say(bars=not log_json), beam or (), workers, purge)


@app.command("retry-quarantined")
def retry_quarantined(
    spec: SpecPath, workers: WorkerCount = 1, log_json: LogJson = False, beam: BeamArgs = None
) -> None:
    """Try quarantined values again; what is mended comes in at its place, nothing is renumbered."""
    if log_json:
        from pipelines import log

        log.start()
    from jobs.retry import Retrier

    Retrier(_spec(spec), _say(bars=not log_json), beam or (), workers).retry(str(spec))


@app.command()
def search(
    store: Store,
    index: Annotated[str, typer.Argument(metavar="INDEX", help="Name of an index of the store.")],
    text: Annotated[str | None, typer.Option(help="Words to search by.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to search by.")] = None,
    audio: Annotated[Path | None, typer.Option(help="A sound to search by.")] = None,
    via: Annotated[str | None, typer.Option(help="The view whose encoder reads the query.")] = None,
    k: Annotated[int, typer.Option("-k", help="How many hits.")] = 10,
    where: Annotated[str | None, typer.Option(help="An SQL condition over the corpus's columns.")] = None,
    modality: Annotated[str | None, typer.Option(help="Only hits through views of this modality.")] = None,
    version: Version = None,
) -> None:
    """Search an index by text, picture or sound; print score, id, view and caption of each hit."""
    opened = _store(store, version)
    hits = opened.search(index, text=text, image=image, audio=audio, via=via, k=k, where=where, modality=modality)
    console = _say()
    if (made_of := opened.index(index).version) != opened.version:
        told = (
            f"index {index!r} has the samples of version {made_of}; `braid run` brings it to version {opened.version}"
        )
        print(told, file=sys.stderr)
    for hit in hits:
        console.print(f"{hit.score:.3f}  {hit.id}  [{hit.view}]  {hit.text or ''}", markup=False)


@app.command()
def get(
    store: Store,
    view: Annotated[str, typer.Argument(metavar="VIEW", help="Name of a view of the store.")],
    ids: Annotated[list[str], typer.Argument(metavar="ID…", help="Ids of samples.")],
    version: Version = None,
) -> None:
    """Print the rows of some ids of a view as JSON lines; a missing vector is null, with its reason."""
    for row in _store(store, version).view(view).take(ids, ["id", "present", "miss_reason", "embedding"]).to_pylist():
        print(json.dumps(row, ensure_ascii=False))


@app.command()
def status(
    store: Store,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it anew until all that the spec names is committed, or Ctrl-C.")
    ] = False,
    every: Annotated[float, typer.Option(help="Seconds between two looks of --watch.", min=0.1)] = 5.0,
    version: Version = None,
) -> None:
    """Say how far each job is, by shards, what was rejected and where it came from, and what the store holds."""
    from jobs.report import status_lines

    console = _say()
    if version is None:
        from jobs import status as progress

        is_spec = store.endswith((".yaml", ".yml"))
        looked = progress.Status(_storage(store), _spec(Path(store)) if is_spec else None)
        spec = store if is_spec else "SPEC"
        if watch:
            progress.watch(looked, console, every, spec)
            return
        seen = looked.look()
        for line in seen.lines(spec):
            console.print(line, markup=False)
        if seen.version < 0:
            return
    elif watch:
        raise InputError(f"--watch --version {version}: an earlier version does not change; leave one of them out")
    for line in status_lines(_store(store, version)):
        console.print(line, markup=False)


@app.command("check-encoder")
def check_encoder(
    cls: Annotated[
        str, typer.Argument(metavar="MODULE:CLASS", help="Your own encoder, as a view's options.class names it.")
    ],
    arguments: Annotated[str, typer.Option(help="What it is made with, as a JSON object.")] = "{}",
    value: Annotated[list[Path] | None, typer.Option(help="A file to try it on; several times. Else examples.")] = None,
) -> None:
    """Try what every encoder promises on your own: shape, order, batches, determinism, bad values."""
    from jobs.check_encoder import check_encoder as tried

    try:
        made_with = json.loads(arguments)
    except ValueError as error:
        raise InputError(f"--arguments {arguments!r} is no JSON: {error}") from None
    if not isinstance(made_with, dict):
        raise InputError(f'--arguments {arguments!r} is no JSON object; write it like {{"width": 64}}')
    try:
        values = [path.read_bytes() for path in value or ()]
    except OSError as error:
        raise InputError(f"--value {error.filename}: {error.strerror}; name a file") from None
    if not tried(cls, made_with, values, _say()):
        sys.exit(1)


@app.command()
def quarantine(
    store: Store,
    field: Annotated[str | None, typer.Option(help="Only values of this field.")] = None,
    reason: Annotated[str | None, typer.Option(help="Only values that were rejected for this reason.")] = None,
    version: Version = None,
) -> None:
    """List rejected values as JSON lines; of a spec those too of a job that published nothing, past its failure budget."""
    from jobs.quarantine import listed

    is_spec = store.endswith((".yaml", ".yml")) and version is None
    rows = list(listed(_store(store, version).snapshot, _spec(Path(store)) if is_spec else None))
    for name, given in (("field", field), ("reason", reason)):
        if given is not None and rows and given not in (there := sorted({row[name] for row in rows})):
            raise InputError(f"{name} {given!r}: nothing is in quarantine of it; there is: {', '.join(there)}")
    for row in rows:
        if field in (None, row["field"]) and reason in (None, row["reason"]):
            print(json.dumps(row, ensure_ascii=False))
    if not rows:
        print("nothing is in quarantine", file=sys.stderr)


@app.command()
def duplicates(
    store: Store,
    corpus: Annotated[str, typer.Argument(metavar="CORPUS", help="Name of a corpus of the store.")],
    version: Version = None,
) -> None:
    """List values that stand in several samples of a corpus, byte for byte."""
    from jobs.report import duplicate_lines

    console = _say()
    for line in duplicate_lines(_store(store, version), corpus):
        console.print(line, markup=False)


@app.command()
def history(store: Store) -> None:
    """Print every version of a store, newest first."""
    import datetime

    from jobs.report import counted

    for commit in _store(store).history():
        moment = datetime.datetime.fromtimestamp(commit["timestamp_ms"] / 1000, datetime.UTC)
        print(
            f"{commit['version']:>5}  {moment:%Y-%m-%d %H:%M:%S}Z  {commit['job']}  ({counted(commit['files'], 'file')})"
        )


@app.command()
def verify(
    store: Store,
    level: Annotated[str, typer.Option(help="footers (seconds), rows, or bytes (everything).")] = "bytes",
    version: Version = None,
) -> None:
    """Prove that every artefact of a store is aligned and whole; name shard and row of what is not."""
    from featurestore.verify import verify as prove

    report = prove(_storage(store), version, level)
    console = _say()
    for line in report.lines():
        console.print(line, markup=False)
    if report.findings:
        sys.exit(1)


@app.command()
def export(
    store: Store,
    views: Annotated[list[str], typer.Argument(metavar="VIEW…", help="Views of one corpus.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    format: Annotated[str, typer.Option(help="webdataset")] = "webdataset",
    raw: Annotated[bool, typer.Option("--raw", help="Add the raw fields, a sensor's as KEY.FIELD.raw.npy.")] = False,
    version: Version = None,
) -> None:
    """Write views as WebDataset shards, in the corpus's own shards and order."""
    from featurestore.export import FORMATS, export_webdataset

    if format not in FORMATS:
        raise InputError(f"--format {format!r} is not allowed; one of: {', '.join(FORMATS)}")
    written = export_webdataset(_store(store, version), views, out, raw=raw)
    from jobs.report import counted

    _say().print(f"{counted(len(written), 'shard')} in {out}")
