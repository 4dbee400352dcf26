"""Imports point one way, heavy ones wait, and nothing here unpickles, evaluates or starts a shell."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Made

ROOT = Path(__file__).parents[1]
PACKAGES = ("featurestore", "pipelines", "jobs")
HEAVY = {"apache_beam", "duckdb", "faiss", "librosa", "sklearn", "torch", "transformers"}


def modules(*packages: str) -> list[Path]:
    found = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(found) >= len(packages)
    return found


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(module, line) of every import under a node, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name whole modules"
            # `from pipelines import align` imports a module too.
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def at_import(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Imports that run when the module is imported: not those in functions or under TYPE_CHECKING."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(node)
        waiting += ast.iter_child_nodes(node)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


@pytest.mark.parametrize(
    ("package", "never"),
    [("featurestore", {"apache_beam", "pipelines", "jobs"}), ("pipelines", {"jobs"})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_imports_point_from_jobs_to_pipelines_to_featurestore(package: str, never: set[str]) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in modules(package)
        for name, line in imported(parsed(path))
        if name.partition(".")[0] in never | {"tests"}
    ]
    assert wrong == []


def test_heavy_packages_are_imported_by_the_functions_that_need_them() -> None:
    heavy = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in modules("featurestore")
        for name, line in at_import(parsed(path))
        if name.partition(".")[0] in HEAVY
    ]
    assert heavy == []


FORBIDDEN_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "subprocess", "pty"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pandas.read_pickle", "yaml.load", "yaml.load_all",
    "yaml.full_load", "yaml.unsafe_load", "np.fromregex", "tarfile.extractall", "input",
}  # fmt: skip
NEEDED = {
    "np.load": ("allow_pickle", "False"),
    "np.save": ("allow_pickle", "False"),
    "torch.load": ("weights_only", "True"),
}
MAY_START_PROGRAMS = {"jobs/recipes/stamps.py", "pipelines/workers.py"}
"""The first runs apt-get and dpkg, the second Python itself: by lists of arguments."""


def dangers(tree: ast.AST, where: str) -> Iterator[str]:
    """Each place of a module that could run what is data."""
    for name, line in imported(tree):
        root = name.partition(".")[0]
        if root in FORBIDDEN_MODULES and not (root == "subprocess" and where in MAY_START_PROGRAMS):
            yield f"{where}:{line}: imports {name}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func).replace("numpy.", "np.")
        given = {each.arg: ast.unparse(each.value) for each in node.keywords}
        option, value = NEEDED.get(called, ("", ""))
        if called in FORBIDDEN_CALLS or called.endswith((".extractall", ".extract")):
            yield f"{where}:{node.lineno}: calls {called}"
        elif option and given.get(option) != value:
            yield f"{where}:{node.lineno}: {called} without {option}={value}"
        elif given.get("shell", "False") != "False":
            yield f"{where}:{node.lineno}: {called} with shell={given['shell']}"


def test_nothing_unpickles_evaluates_or_starts_a_shell() -> None:
    found = [danger for path in modules(*PACKAGES) for danger in dangers(parsed(path), str(path.relative_to(ROOT)))]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "def f():\n    import shelve",
        "eval('1')",
        "yaml.load(text, Loader=Loader)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "numpy.save(path, array)",
        "torch.load(path, map_location='cpu')",
        "run(words, shell=True)",
        "tar.extractall(folder)",
        "os.system('ls')",
        "import subprocess",
    ],
)
def test_each_danger_is_seen(source: str) -> None:
    assert list(dangers(ast.parse(source), "module.py")) != []


@pytest.mark.parametrize(
    "source", ["np.load(path, allow_pickle=False)", "torch.load(path, weights_only=True)", "yaml.safe_load(text)"]
)
def test_what_is_safe_is_allowed(source: str) -> None:
    assert list(dangers(ast.parse(source), "module.py")) == []


def test_imports_in_functions_and_for_types_alone_may_be_heavy() -> None:
    tree = ast.parse(
        "import json\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import faiss\nclass C:\n    import duckdb\n"
        "try:\n    from sklearn import svm\nexcept ImportError:\n    pass"
    )
    assert sorted(name for name, _ in at_import(tree)) == ["duckdb", "json", "sklearn.svm"]


READER = """
import sys
for absent in sys.argv[2:]:
    sys.modules[absent] = None
import featurestore
assert not {"pyarrow", "deltalake", "numpy"} & set(sys.modules), "the package alone imports nothing heavy"
from featurestore import FeatureStore
store = FeatureStore(sys.argv[1])
assert not {"faiss", "duckdb", "PIL", "soundfile"} & set(sys.modules), sorted(sys.modules)
view = store.view("loud")
rows = view.to_arrow()
row = rows["present"].to_pylist().index(True)
(vector,) = view.take([row])["embedding"].to_numpy(zero_copy_only=False)
hits = store.search("heard", vector=vector, via="loud", k=1, where="label IS NOT NULL")
assert hits[0].id == rows["id"][row].as_py(), hits
samples, rate = hits[0].audio
print("read", len(rows), "found", round(hits[0].score, 3), "played", len(samples) / rate)
from featurestore.media import decode_audio
print("at 8 kHz", len(decode_audio(hits[0].raw("audio"), 8000)))
"""


def packages(extra: str) -> set[str]:
    """The packages that pyproject.toml names for an extra, its own alone, as they are imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    named = {re.split(r"[\[<>=~!]", line)[0] for line in project[extra]} - {"braid"}
    found: dict[str, set[str]] = {name: set() for name in named}
    for module, owners in importlib.metadata.packages_distributions().items():
        for owner in named & {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners}:
            found[owner].add(module)
    assert all(found.values()), found
    return set().union(*found.values())


def test_reading_and_vector_search_need_neither_beam_nor_torch_nor_else_what_only_jobs_need(small: Made) -> None:
    absent = packages("run")
    assert {"apache_beam", "torch", "transformers", "sklearn", "scipy", "typer", "rich", "yaml"} <= absent
    ended = subprocess.run(
        [sys.executable, "-c", READER, small.store, *sorted(absent - packages("read"))],
        capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "read 48 found 1.0 played 0.3\nat 8 kHz 2400\n"


PLANNING = """
import sys
for absent in sys.argv[2:]:
    sys.modules[absent] = None
from jobs.cli import main
sys.argv[1:] = ["plan", sys.argv[1]]
main()
"""


def test_planning_waits_for_no_heavy_package(small: Made) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PLANNING, small.spec, *HEAVY], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("Everything is fresh: `braid run` computes nothing.\n")


WITHOUT_EXTRAS = """
import importlib.metadata
import sys
for absent in ("torch", "duckdb"):
    sys.modules[absent] = None
version = importlib.metadata.version
def installed(name):
    if name == "torch":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = installed
from featurestore import FeatureStore
from featurestore.errors import MissingExtra
store = FeatureStore(sys.argv[1])
matrix, present = store.view("loud").matrix()
vector = matrix[present][0]
value = store.search("heard", vector=vector, via="loud")[0].raw("audio")
for query in ({"vector": vector, "where": "true"}, {"audio": value}):
    try:
        store.search("heard", via="loud", **query)
    except MissingExtra as error:
        print(error)
"""


def test_what_needs_an_extra_that_is_not_installed_names_it(small: Made) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, small.store], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    first, second = ended.stdout.splitlines()
    assert "pip install 'braid[read]'" in first
    assert "pip install 'braid[run]'" in second
