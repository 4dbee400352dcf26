"""What a person at the command line sees: results, one clear message, or a traceback only where there is a bug."""

import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from featurestore.errors import InputError
from featurestore.store import FeatureStore
from jobs import cli
from pipelines.runner import Job
from tests.conftest import Made

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "init", "plan", "run", "shard", "encode", "align", "index", "fuse", "compact", "duplicates", "retry-quarantined",
    "check-encoder",
    "quarantine", "search", "get", "status", "history", "verify", "export",
)  # fmt: skip


class Said(NamedTuple):
    """Exit status, standard output and standard error of one command."""

    status: int
    out: str
    err: str


Braid = Callable[..., Said]


@pytest.fixture
def braid(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Braid]:
    """Runs `braid ARGS` through its entry point, in this process."""
    loggers = [logging.getLogger(), logging.getLogger("apache_beam")]
    levels = [logger.level for logger in loggers]

    def call(*args: str | Path) -> Said:
        monkeypatch.setattr(sys, "argv", ["braid", *map(str, args)])
        capsys.readouterr()
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        return Said(status, *capsys.readouterr())

    yield call
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def refused(said: Said, status: int, *told: str) -> None:
    """One message on standard error that tells all of `told`, and no traceback."""
    assert said.status == status, said
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert "Traceback" not in said.err
    for each in told:
        assert re.search(each, said.err), said.err


def test_help_names_every_command_and_imports_neither_torch_nor_beam() -> None:
    code = (
        "import sys; sys.argv = ['braid', '--help']\n"
        "from jobs.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print('status', end.code)\n"
        "print('heavy:', sorted({'torch', 'apache_beam', 'transformers', 'faiss', 'sklearn'} & set(sys.modules)))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert ended.stderr == ""
    assert "status 0" in ended.stdout
    assert "heavy: []" in ended.stdout
    shown = re.findall(r"^│ (\w[\w-]*) ", ended.stdout, re.MULTILINE)
    assert sorted(shown) == sorted(COMMANDS)


def test_the_installed_command_is_this_one(small: Made) -> None:
    program = Path(sys.executable).with_name("braid")
    ended = subprocess.run([program, "history", small.store], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert "shard planted" in ended.stdout


def test_a_bad_spec_lists_every_mistake_with_its_line_before_anything_runs(
    braid: Braid, small: Made, tmp_path: Path
) -> None:
    text = small.spec.read_text().replace(str(small.store), str(tmp_path / "store"))
    text = text.replace("encoder: log-mel", "encoder: log-mal").replace("shard_rows: 8", "shard_rows: 0")
    spec = tmp_path / "spec.yaml"
    spec.write_text(text.replace("space: other", "space: others") + "extra: 1\n")
    lines = {
        what: next(number for number, line in enumerate(spec.read_text().splitlines(), 1) if what in line)
        for what in ("log-mal", "shard_rows", "space: others", "extra")
    }
    for command in ("run", "plan", "shard"):
        said = braid(command, spec)
        refused(
            said,
            2,
            rf"{re.escape(str(spec))}: 4 mistakes",
            rf"line {lines['shard_rows']}: corpus\.shard_rows: 0 is wrong",
            rf"line {lines['log-mal']}: views\.loud\.encoder: 'log-mal' is not an encoder; .* did you mean 'log-mel'",
            rf"line {lines['space: others']}: indexes\.other\.space: 'others' .* did you mean 'other'",
            rf"line {lines['extra']}: extra: is not a key of this section",
        )
    assert not (tmp_path / "store").exists()


def test_a_spec_or_a_store_that_is_not_there_is_told(braid: Braid, tmp_path: Path) -> None:
    refused(braid("run", tmp_path / "none.yaml"), 2, r"none\.yaml: cannot read the spec: No such file or directory; ")
    refused(braid("status", tmp_path / "none"), 2, r"none holds no Braid store; `braid run SPEC` makes one")


def test_an_unknown_name_is_told_beside_those_there_are(braid: Braid, small: Made) -> None:
    refused(braid("search", small.store, "hard", "--text", "x"), 2, r"no index 'hard' in .*; it has: heard, other")
    refused(braid("get", small.store, "lout", "x"), 2, r"no view 'lout' in .*; it has: loud, short, timbre")
    refused(braid("get", small.store, "loud", "nobody"), 2, r"corpus 'planted' has no sample 'nobody'")
    for version in (99, -2):
        for command, *names in (["status"], ["verify"], ["get", "loud", "x"], ["search", "heard", "--text", "x"]):
            said = braid(command, small.store, *names, "--version", str(version))
            refused(said, 2, rf"has no version {version}; it has 0 to \d+")
    refused(braid("verify", small.store, "--level", "all"), 2, r"level 'all' .* footers, rows, bytes")
    refused(braid("search", small.store, "heard"), 2, r"search by one of: text, image, audio .*; given: none")
    refused(braid("encode", small.spec, "--view", "lout"), 2, r"no view 'lout'; it has: loud, timbre, short")
    refused(braid("export", small.store, "lout", "--out", small.store), 2, r"no view 'lout' in .*; it has: loud")


def test_what_is_typed_at_the_command_line_is_named_as_it_is_typed_there(braid: Braid, small: Made) -> None:
    """Python's `via=` is `--via` here: messages say neither."""
    told = [
        (
            ["--audio", "x.ogg", "--via", "lout"],
            r"^error: via 'lout': index 'heard' has no such view; allowed: loud, timb",
        ),
        (["--text", "x", "--via", "loud"], r"^error: via 'loud': this view reads audio, not text"),
        (["--audio", "x.ogg"], r"name one as via; it has: loud \(audio\)"),
        (["--audio", "x.ogg", "--via", "loud"], r"^error: audio 'x\.ogg' cannot be read: No such file or directory"),
        (["--audio", str(small.spec), "--via", "loud"], rf"^error: audio '{small.spec}' cannot be searched by: \w+: "),
    ]
    sound = str(next((small.corpus / "sounds").iterdir()))
    for more, what in (
        (["--modality", "smell"], r"^error: modality 'smell' is not allowed; index 'heard' has: audio"),
        (["--where", "lable = 1"], r"^error: where 'lable = 1': .*; columns: .*label"),
        (["-k", "0"], r"^error: k is 0"),
    ):
        told.append((["--audio", sound, "--via", "loud", *more], what))
    for args, what in told:
        said = braid("search", small.store, "heard", *args)
        refused(said, 2, what)
        assert not re.search(r"\b(via|where|modality|audio|text)=", said.err)


def test_a_file_that_cannot_be_written_is_told_before_anything_runs(braid: Braid, small: Made, tmp_path: Path) -> None:
    there = tmp_path / "file"
    there.write_text("")
    for path, why in ((there / "x.json", "Not a directory|File exists"), (tmp_path, "Is a directory")):
        refused(braid("run", small.spec, "--metrics", path), 2, rf"--metrics {path}: cannot be written \(({why})\)")
    refused(braid("export", small.store, "loud", "--out", there / "x"), 2, "cannot be made a folder")


def test_a_store_that_is_damaged_is_no_mistake_of_who_asks(braid: Braid, small: Made, tmp_path: Path) -> None:
    copy = small.copy_to(tmp_path)
    next((copy.store / "indexes" / "heard").glob("*/index-*")).unlink()
    sound = next((small.corpus / "sounds").iterdir())
    said = braid("search", copy.store, "heard", "--audio", sound, "--via", "loud")
    refused(said, 1, r"index-.*\.faiss: the catalog names this file, and it is gone")
    next((copy.store / "corpora" / "planted").glob("*.tar")).unlink()
    refused(braid("plan", copy.spec), 1, r"corpus 'planted': 1 file gone or of another size, e\.g\. corpora/planted/")


def test_plan_run_and_status_of_a_whole_store(braid: Braid, small: Made) -> None:
    said = braid("plan", small.spec)
    assert "Everything is fresh: `braid run` computes nothing." in said.out
    assert said.out.count(" fresh ") == 10
    said = braid("run", small.spec)
    assert said.out == "Everything is fresh: nothing was computed.\n"
    store = FeatureStore(small.store)
    said = braid("status", small.store)
    assert f"version {store.version}, digest {store.digest()}" in said.out
    assert "corpus planted: 48 samples in 6 shards" in said.out
    assert "view loud: 48 rows × 128 float32, log-mel of sound: 36 present, 0 rejected" in said.out
    assert "index other: 36 vectors, Flat" in said.out
    assert "training set heard: " in said.out
    assert "all that the spec names" not in said.out, "a store alone does not know"
    told = braid("status", small.spec).out
    assert "encode  loud     6 of 6 shards committed\n" in told
    assert told.count(" committed\n") == 11
    assert "all that the spec names is committed\n" in told
    assert told[told.index("version ", told.index("digest") - 20) :] in said.out
    assert braid("status", small.store, "--version", "1").out.splitlines()[1:] == [
        "corpus planted: 48 samples in 6 shards"
    ]
    refused(braid("status", small.store, "--watch", "--version", "1"), 2, "an earlier version does not change")


@pytest.mark.parametrize("command", ["run", "encode", "compact"])
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["extra"], r"'extra' after -- is no option of Beam"),
        (["--", "--runner", "Foo"], "Beam's options after --: .*Unexpected pipeline runner: Foo"),
        (["--workers", "2", "--", "--runner", "DaskRunner"], "--workers 2: at least 1, and only without --runner"),
        (
            ["--", "--runner", "DataflowRunner"],
            "--runner DataflowRunner needs --project, --region, --temp_location too",
        ),
    ],
)
def test_wrong_options_of_beam_are_told_where_there_is_nothing_to_run(
    braid: Braid, small: Made, command: str, words: list[str], told: str
) -> None:
    refused(braid(command, small.spec, *words), 2, told)


def test_plan_names_what_is_stale_and_run_and_one_stage_do_it(braid: Braid, small: Made, tmp_path: Path) -> None:
    copy = small.copy_to(tmp_path)
    (copy.store / copy.open().view("short").files()[0]).unlink()
    said = braid("plan", copy.spec)
    assert re.search(r"encode +short +stale +1 of 6 +1 shard new, gone or of another size", said.out)
    assert re.search(r"align +other +pending +1 of 1 +only if short comes out with other bytes", said.out)
    assert "4 of 10 steps to run" in said.out
    assert "Everything is fresh" in braid("encode", copy.spec, "--view", "loud").out
    metrics = tmp_path / "figures" / "run.json"
    said = braid("run", copy.spec, "--metrics", metrics)
    assert said.status == 0
    assert "encode short: started, 8 samples" in said.out
    assert f"store {copy.store}, version {small.open().version}" in said.out
    assert [(step["stage"], step["name"]) for step in json.loads(metrics.read_text())] == [("encode", "short")]


def test_plan_names_what_the_spec_does_not_and_keeps_it(braid: Braid, small: Made, tmp_path: Path) -> None:
    copy = small.copy_to(tmp_path)
    assert "not in the spec" not in braid("plan", copy.spec).out
    lines = copy.spec.read_text().splitlines(keepends=True)
    gone = ("  short:", "  other:")
    copy.spec.write_text("".join(line for line in lines if not line.startswith(gone)))
    before = copy.open().digest()
    said = braid("plan", copy.spec)
    told = "Kept in the store, but not in the spec: view short, space other, index other, training set other.\n"
    assert told in said.out
    assert "Everything is fresh" in said.out
    assert "Everything is fresh" in braid("run", copy.spec).out
    assert copy.open().digest() == before
    another = copy.spec.read_text().replace("name: planted", "name: second").replace("views:", "views: {}\nunused:")
    copy.spec.write_text(another[: another.index("unused:")])
    assert "not in the spec" not in braid("plan", copy.spec).out, "another corpus's are another spec's"


def test_history_says_what_each_version_published(braid: Braid, small: Made) -> None:
    lines = braid("history", small.store).out.splitlines()
    assert len(lines) == small.open().version + 1
    pattern = r" +(\d+)  \d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ  (.+)  \((\d+) files\)"
    told = [re.fullmatch(pattern, line).groups() for line in lines]  # type: ignore[union-attr]
    assert told[-1] == ("0", "create", "0")
    assert told[-2] == ("1", "shard planted", "13")
    assert told[-3] == ("2", "encode loud", "6")
    assert told[0][1] == "fuse other"


def test_get_prints_rows_in_the_order_asked_and_null_with_its_reason(braid: Braid, small: Made) -> None:
    rows = small.open().view("loud").to_arrow().to_pylist()
    there = next(row for row in rows if row["present"])
    missing = next(row for row in rows if not row["present"])
    said = braid("get", small.store, "loud", missing["id"], there["id"])
    first, second = map(json.loads, said.out.splitlines())
    assert first == {"id": missing["id"], "present": False, "miss_reason": "absent", "embedding": None}
    assert second["id"] == there["id"]
    assert second["embedding"] == pytest.approx(there["embedding"])


def test_search_by_sound_prints_scores_ids_and_captions(braid: Braid, small: Made, tmp_path: Path) -> None:
    store = small.open()
    row = next(row for row in store.view("loud").to_arrow().to_pylist() if row["present"])
    corpus = store.corpus("planted")
    sound = tmp_path / "query.wav"
    value = corpus.value(*corpus.locate(row["id"]), "sound")
    assert value is not None
    sound.write_bytes(value)
    said = braid("search", small.store, "heard", "--audio", sound, "--via", "loud", "-k", "3")
    assert said.status == 0
    lines = said.out.splitlines()
    assert len(lines) == 3
    hits = store.search("heard", audio=sound, via="loud", k=3)
    assert [line.split("  ")[:3] for line in lines] == [[f"{hit.score:.3f}", hit.id, f"[{hit.view}]"] for hit in hits]
    assert [line.split("  ")[3] for line in lines] == [hit.text or "" for hit in hits]
    said = braid("search", small.store, "heard", "--audio", sound, "--via", "loud", "--where", "label = 'ring'")
    assert said.out
    assert all("  ring/" in line for line in said.out.splitlines())
    refused(braid("search", small.store, "heard", "--audio", sound), 2, r"2 views of modality 'audio'.* loud .*timbre")
    refused(
        braid("search", small.store, "heard", "--audio", "/none.ogg", "--via", "loud"),
        2,
        r"'/none\.ogg' cannot be read: No such file or directory; correct the path",
    )
    text = sound.with_name("text.ogg")
    text.write_text("not a sound")
    refused(
        braid("search", small.store, "heard", "--audio", text, "--via", "loud"),
        2,
        r"text\.ogg' cannot be searched by: ",
    )


def test_verify_says_that_all_holds_and_names_what_does_not(braid: Braid, small: Made, tmp_path: Path) -> None:
    said = braid("verify", small.store)
    assert (said.status, said.err) == (0, "")
    assert said.out.rstrip().endswith("all holds")
    copy = small.copy_to(tmp_path)
    spoiled = copy.store / copy.open().view("loud").files()[1]
    raw = bytearray(spoiled.read_bytes())
    raw[len(raw) // 2] ^= 1
    spoiled.write_bytes(raw)
    said = braid("verify", copy.store)
    assert said.status == 1
    assert copy.open().corpus("planted").shards[1].shard in said.out
    assert "all holds" not in said.out


def test_export_writes_tars_and_refuses_what_it_cannot(braid: Braid, small: Made, tmp_path: Path) -> None:
    said = braid("export", small.store, "loud", "timbre", "--out", tmp_path / "out")
    assert said.out == f"6 shards in {tmp_path / 'out'}\n"
    assert len(list((tmp_path / "out").glob("*.tar"))) == 6
    refused(braid("export", small.store, "loud", "--out", tmp_path / "out"), 2, "is not empty; name a new folder")
    said = braid("export", small.store, "loud", "--out", tmp_path / "no", "--format", "zip")
    refused(said, 2, r"--format 'zip' is not allowed; one of: .*webdataset")


def test_init_makes_an_empty_store_that_reads_back(braid: Braid, small: Made, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(small.spec.read_text().replace(str(small.store), str(tmp_path / "new")))
    for _ in range(2):
        assert braid("init", spec).out == f"{tmp_path / 'new'} is ready, version 0\n"
    assert FeatureStore(tmp_path / "new").corpora() == []


def test_a_budget_that_is_passed_is_told_once_without_a_traceback(braid: Braid, small: Made, tmp_path: Path) -> None:
    copy = small.copy_to(tmp_path)
    for path in sorted((copy.corpus / "sounds").iterdir())[:10]:
        path.write_bytes(b"")
    spec = copy.spec.read_text().replace(str(copy.store), str(tmp_path / "new"))
    copy.spec.write_text(spec)
    said = braid("run", copy.spec)
    assert said.status == 1
    assert "Traceback" not in said.out + said.err
    assert said.err.count("more than the failure budget of 1.00%") == 1
    assert "raise corpus.failure_budget in the spec above" in said.err
    rows = [json.loads(line) for line in braid("quarantine", copy.spec).out.splitlines()]
    assert len(rows) == 10
    assert {(row["field"], row["reason"], row["committed"]) for row in rows} == {("sound", "empty", False)}
    assert all(row["source"].startswith("sounds/") and row["detail"] for row in rows)
    said = braid("quarantine", copy.spec, "--field", "sound", "--reason", "empty")
    assert [json.loads(line) for line in said.out.splitlines()] == rows
    refused(braid("quarantine", copy.spec, "--reason", "gone"), 2, r"reason 'gone': nothing .* of it; there is: empty$")
    refused(braid("quarantine", copy.spec, "--field", "x"), 2, r"field 'x': nothing .* of it; there is: sound$")
    said = braid("quarantine", tmp_path / "new")
    assert (said.status, said.out, said.err) == (0, "", "nothing is in quarantine\n")


def test_a_bug_shows_its_traceback(braid: Braid, small: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(FeatureStore, "digest", broken)
    with pytest.raises(KeyError, match="a bug"):
        braid("status", small.store)


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--runner=direct"], "fetches a runner's program over the network"),
        (["--runner", "DirectRunner"], "fetches a runner's program over the network"),
        (["--direct_num_workers=2"], "use braid's --workers N instead"),
        (["--setup_file", "nope.py"], "--setup_file 'nope.py': there is no such file"),
        (["--extra_package", "nope.whl"], "--extra_packages 'nope.whl': there is no such file"),
        (["--runner=NoSuchRunner"], "Beam's options after --: Unexpected pipeline runner: NoSuchRunner"),
    ],
)
def test_options_that_end_badly_are_refused_before(args: list[str], told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)):
        Job(args)


def test_an_interrupt_is_told_in_one_line(small: Made, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    text = small.spec.read_text().replace(str(small.store), f"{tmp_path}/store")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/manifest.jsonl"
        spec.write_text(text.replace(f"{small.corpus}/manifest.jsonl", address))
        # Where the tests run in the background of a shell, an interrupt is ignored, and children inherit that.
        attentive = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        command = [sys.executable, "-c", f"{attentive}; from jobs.cli import main; main()", "plan", str(spec)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
            asked, _ = silent.accept()  # and waits for an answer
            time.sleep(0.5)
            run.send_signal(signal.SIGINT)
            limit = threading.Timer(30, run.kill)
            limit.start()
            _, told = run.communicate()
            limit.cancel()
            asked.close()
    assert told.startswith("interrupted; run it again")
    assert told.count("\n") == 1
    assert run.returncode == 130
