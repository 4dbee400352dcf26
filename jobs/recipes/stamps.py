"""The stamps corpus: fetches Tux Paint's stamps from Debian and writes the manifest that `stamps.yaml` reads.

    python -m jobs.recipes.stamps --out build/stamps [--stamps-dir DIR]

A sample is one PNG; its id is the path without the extension. SVG, `.dat` and localised effects are left
aside. Needs no root: `apt-get download` and `dpkg -x`, with own package lists where the system has none.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from featurestore.errors import BraidError, InputError

__all__ = ["build_rows", "caption_of", "counts_of", "fetch", "main", "stem_key", "write_manifest"]

PACKAGE = "tuxpaint-stamps-default"
VERSION = "2022.06.04-1"
PACKAGE_SHA256 = "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34"
# sha256 over (sha256, path) of the files that the samples are made of, in the order of their paths: says
# whether an unpacked folder, also one named by STAMPS_DIR, holds this version's files.
CONTENT_SHA256 = "4aa4aa76bfac99b400f6e949403b3b530fbf4744aedc23cf8db02b31b8011a41"
EXPECTED = {"image": 796, "caption": 785, "caption_fr": 785, "caption_ru": 785, "sound": 131, "speech": 767}
FIELD_COLUMNS = {
    "image": "image_path",
    "caption": "caption",
    "caption_fr": "caption_fr",
    "caption_ru": "caption_ru",
    "sound": "sound_path",
    "speech": "speech_path",
}
_PATH_COLUMNS = ("image_path", "sound_path", "speech_path")

_MEND = (
    f"fetch and unpack Debian's {PACKAGE} {VERSION} elsewhere (apt-get download, dpkg -x), and name its "
    "folder usr/share/tuxpaint/stamps with STAMPS_DIR=DIR or --stamps-dir DIR"
)
# What ends a stem without making it another thing, taken off until nothing more comes off: a number, perhaps
# with one letter behind it (snail2, frog-1, fireman240a, note_025_b), and the corpus's marks of a variant.
_VARIANT = re.compile(r"(?:[-_ ]?\d+(?:[-_]?[a-z])?|[-_](?:mirror|flip|outlined?|filled|photo))$")
_TRANSLATION = re.compile(r"(?P<language>[\w@-]+)\.utf8=(?P<text>.*)")

Row = dict[str, str | None]


def fetch(out: Path) -> Path:
    """The folder of the package's stamps under `out`, downloaded and unpacked first if it is not there.

    The folder gets its name last, by one rename, when the package's sha256 held and all of it was unpacked.

    Raises:
        InputError: there is no apt, the download failed or it is another package; nothing is left behind.
    """
    stamps = out / "stamps"
    if stamps.is_dir():
        return stamps
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise InputError(f"{tool} is not installed here, and it fetches the corpus; instead, {_MEND}")
    work = out.absolute() / ".work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        deb = _download(work, out.absolute() / ".apt")
        _run(["dpkg", "-x", str(deb), str(work / "unpacked")], work)
        os.rename(work / "unpacked/usr/share/tuxpaint/stamps", stamps)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return stamps


def _download(work: Path, apt: Path) -> Path:
    """The package's file in `work`, its sha256 checked; by the system's lists, else by own ones in `apt`."""
    download = ["download", f"{PACKAGE}={VERSION}"]
    try:
        _run(["apt-get", *download], work)
    except InputError:
        (apt / "lists/partial").mkdir(parents=True, exist_ok=True)
        (apt / "cache/archives/partial").mkdir(parents=True, exist_ok=True)
        # apt running as root would hand the download to a user who may not enter our folder: stay who we are.
        own = [f"Dir::State::lists={apt / 'lists'}", f"Dir::Cache={apt / 'cache'}", "APT::Sandbox::User=root"]
        options = [part for option in own for part in ("-o", option)]
        _run(["apt-get", *options, "update"], work)
        _run(["apt-get", *options, *download], work)
    found = sorted(work.glob(f"{PACKAGE}_*.deb"))
    if not found:
        raise InputError(f"apt-get download left no {PACKAGE}_*.deb; run it again, or {_MEND}")
    digest = _sha256(found[0])
    if digest != PACKAGE_SHA256:
        raise InputError(f"{found[0].name} has sha256 {digest}, not {PACKAGE_SHA256}; run it again, or {_MEND}")
    return found[0]


def _run(command: Sequence[str], cwd: Path) -> None:
    """Runs `command`; its error output is the error's text."""
    done = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip() or done.stdout.strip()
        raise InputError(f"`{' '.join(command)}` exited with {done.returncode}: {said}; run it again, or {_MEND}")


def build_rows(stamps: Path) -> tuple[list[Row], str]:
    """The samples of an unpacked folder.

    Returns:
        rows: one dict per sample, sorted by id: id, group, label, the fields' columns, speech_language;
            paths are relative to `stamps`, and what is missing is None.
        digest: sha256 over the paths and the bytes of the files that the rows were made from.

    Raises:
        InputError: the folder holds no PNG, or a caption file is not UTF-8.
    """
    images = sorted(stamps.rglob("*.png"), key=lambda path: path.relative_to(stamps).as_posix())
    if not images:
        raise InputError(f"{stamps} holds no PNG: it must be the folder usr/share/tuxpaint/stamps of {PACKAGE}")
    rows = sorted((_row(stamps, image) for image in images), key=lambda row: str(row["id"]))
    used = {str(row[column]) for row in rows for column in _PATH_COLUMNS if row[column] is not None}
    texts = {f"{row['id']}.txt" for row in rows if row["caption"] is not None}
    digests = {path: _sha256(stamps / path) for path in sorted(used | texts)}
    groups = _groups([list(_link_keys(row, digests)) for row in rows])
    for row, first in zip(rows, groups, strict=True):
        row["group"] = rows[first]["id"]
    content = "".join(f"{digest}  {path}\n" for path, digest in digests.items())
    return rows, hashlib.sha256(content.encode()).hexdigest()


def _row(stamps: Path, image: Path) -> Row:
    stem = image.relative_to(stamps).as_posix().removesuffix(".png")
    captions = _captions(stamps / f"{stem}.txt")
    speech, language = _first(stamps, f"{stem}_desc"), "en"
    if speech is None:
        speech, language = _first(stamps, f"{stem}_desc_fr"), "fr"
    return {
        "id": stem,
        "group": None,
        "label": stem.split("/")[0],
        "image_path": f"{stem}.png",
        "caption": captions.get("en"),
        "caption_fr": captions.get("fr"),
        "caption_ru": captions.get("ru"),
        "sound_path": _first(stamps, stem, (".ogg",)),
        "speech_path": speech,
        "speech_language": language if speech else None,
    }


def _first(stamps: Path, name: str, endings: Iterable[str] = (".ogg", ".wav", ".ogg.ogg")) -> str | None:
    """The first of name + ending that is there. Some descriptions are `.wav`, and one is `.ogg.ogg`."""
    return next((name + ending for ending in endings if (stamps / (name + ending)).is_file()), None)


def _captions(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        return caption_of(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error}); unpack {PACKAGE} {VERSION} anew") from error


def caption_of(text: str) -> dict[str, str]:
    """Language -> caption of one caption file; the first line is English, whatever is in it. No blanks.

    >>> caption_of("2 + 2 = 4\\nfr.utf8=Deux et deux.\\nde.utf8=")
    {'en': '2 + 2 = 4', 'fr': 'Deux et deux.'}
    """
    first, *rest = text.split("\n")
    found = {"en": first.strip()}
    for line in rest:
        if match := _TRANSLATION.fullmatch(line.strip()):
            found.setdefault(match["language"], match["text"].strip())
    return {language: caption for language, caption in found.items() if caption}


def stem_key(sample_id: str) -> str:
    """Folder and stem without number or variant suffix, in lower case; a stem that is all number stays.

    >>> stem_key("birds/Duck-2_mirror"), stem_key("math/7"), stem_key("asl/asl_b")
    ('birds/duck', 'math/7', 'asl/asl_b')
    """
    folder, slash, stem = sample_id.rpartition("/")
    stem = stem.casefold()
    while shorter := _VARIANT.sub("", stem):
        if shorter == stem:
            break
        stem = shorter
    return folder + slash + stem


def _link_keys(row: Row, digests: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What ties a sample to others: two samples that share a key are in one group."""
    yield "stem", stem_key(str(row["id"]))
    words = " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", row["caption"] or "").casefold()))
    if words:
        yield "caption", words
    for column in _PATH_COLUMNS:
        path = row[column]
        if path is not None:
            yield "bytes", digests[path]


def _groups(keys: Sequence[Iterable[tuple[str, str]]]) -> list[int]:
    """The smallest index of each sample's connected component; samples that share a key are connected."""
    holders: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for index, own in enumerate(keys):
        for key in own:
            holders[key].append(index)
    edges = np.array([(own[0], other) for own in holders.values() for other in own], dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(edges), np.int8), (edges[:, 0], edges[:, 1])), shape=(len(keys), len(keys)))
    _, component = connected_components(graph, directed=False)
    _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
    return [int(index) for index in first[inverse]]


def write_manifest(rows: Sequence[Row], prefix: str, path: Path) -> bool:
    """Writes `rows` as JSON lines, their paths under `prefix`; False when the file held that already."""
    lines = []
    for row in rows:
        placed = {c: f"{prefix}/{v}" if c in _PATH_COLUMNS and v is not None else v for c, v in row.items()}
        lines.append(json.dumps(placed, ensure_ascii=False, separators=(",", ":")) + "\n")
    text = "".join(lines).encode()
    if path.is_file() and path.read_bytes() == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_bytes(text)
    os.replace(aside, path)
    return True


def counts_of(rows: Sequence[Row]) -> dict[str, int]:
    """Field -> number of samples that have it."""
    return {field: sum(row[column] is not None for row in rows) for field, column in FIELD_COLUMNS.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make(out: Path, stamps_dir: Path | None) -> str:
    """Makes the manifest in `out`; returns what to tell the person."""
    rows, digest = _fetched_rows(out) if stamps_dir is None else build_rows(stamps_dir)
    counts = counts_of(rows)
    known = digest == CONTENT_SHA256
    if known and counts != EXPECTED:
        raise AssertionError(f"the package is right, but its fields count {counts}, not {EXPECTED}")
    if stamps_dir is not None and stamps_dir.resolve() != (out / "stamps").resolve():
        # Beside the manifest: a manifest's files outside of its folder are not read.
        shutil.copytree(stamps_dir, out / "stamps", dirs_exist_ok=True)
    written = write_manifest(rows, "stamps", out / "stamps.jsonl")
    groups, labels = (len({row[column] for row in rows}) for column in ("group", "label"))
    fields = ", ".join(f"{field} {count}" for field, count in counts.items())
    report = f"{out / 'stamps.jsonl'}: {len(rows)} samples, {groups} groups, {labels} labels; present: {fields}"
    if not known:
        report += f"\nnot the files of {PACKAGE} {VERSION}: counts not checked"
    return report + ("" if written else "\nalready there: nothing to do")


def _fetched_rows(out: Path) -> tuple[list[Row], str]:
    """The rows of the package's folder under `out`, which is fetched again when its files are damaged."""
    try:
        rows, digest = build_rows(fetch(out))
    except InputError:
        if not (out / "stamps").is_dir():
            raise
        digest = "unreadable"
    if digest != CONTENT_SHA256:
        print(
            f"{out / 'stamps'} does not hold the files of {PACKAGE} {VERSION}: fetching it again",
            file=sys.stderr,
        )
        shutil.rmtree(out / "stamps")
        rows, digest = build_rows(fetch(out))
    return rows, digest


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m jobs.recipes.stamps", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/stamps"), help="folder of the manifest")
    parser.add_argument("--stamps-dir", default=os.environ.get("STAMPS_DIR"), help="an unpacked .../tuxpaint/stamps")
    options = parser.parse_args(arguments)
    try:
        print(_make(options.out, Path(options.stamps_dir) if options.stamps_dir else None))
    except BraidError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
