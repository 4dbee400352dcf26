"""Files of a folder that no pattern takes: told, and nothing more."""

import io
from pathlib import Path

from rich.console import Console

from jobs import plan
from jobs import spec as specs
from jobs.run import Runner
from jobs.show_plan import show
from tests.pipelines.test_folder import put, source_of

SPEC = """
version: 1
store: {{uri: {folder}/store}}
corpus:
  name: texts
  source: {{type: folder, path: {folder}/in}}
  fields: {{text: {{modality: text, from: "{{id}}.txt"}}}}
"""
ONE = {"text": "{id}.txt"}


def remarks(path: Path) -> list[str]:
    source = source_of(path, ONE)
    for _ in range(2):  # A source may be read again.
        assert list(source.references())
    assert source.whole()
    return source.remarks()


def test_files_that_no_pattern_takes_are_told_by_their_endings(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", "b.TXT", "c.text", "sub/d.text", "README", "x/a.tar.gz", "y.\x07", ".hidden", ".git/e.TXT")
    assert remarks(tmp_path) == [
        "files that no pattern takes, left out: 6 (2 .text, 2 without an ending, 1 .TXT, …), e.g. 'c.text', 'README', 'b.TXT'"
    ]
    (tmp_path / "README").unlink()
    (tmp_path / "y.\x07").unlink()
    assert remarks(tmp_path) == [
        "files that no pattern takes, left out: 4 (2 .text, 1 .TXT, 1 .gz), e.g. 'c.text', 'b.TXT', 'x/a.tar.gz'"
    ]


def test_a_folder_whose_files_are_all_taken_has_nothing_to_tell(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", "b/c.txt", ".b.md")
    assert remarks(tmp_path) == []


def test_however_many_endings_there_are_few_are_held(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", *(f"frame.{number:06}" for number in range(150)))
    (told,) = remarks(tmp_path)
    assert told == (
        "files that no pattern takes, left out: 150 (50 of other endings, 1 .000000, 1 .000001, …), e.g. 'frame.000100', "
        "'frame.000000', 'frame.000001'"
    )


def test_the_plan_and_the_run_tell_them_and_go_on(tmp_path: Path) -> None:
    put(tmp_path / "in", "a.txt", "b.TXT", "[/red]:boom:.md")
    spec = specs.parse(SPEC.format(folder=tmp_path), "spec")
    out, told = (
        io.StringIO(),
        "files that no pattern takes, left out: 2 (1 .TXT, 1 .md), e.g. 'b.TXT', '[/red]:boom:.md'",
    )
    show(spec, Console(file=out, width=300), None, {})
    assert f"samples: 1 new; {told}" in out.getvalue()
    ran = io.StringIO()
    Runner(spec, Console(file=ran, width=300)).run(("shard",))
    assert told in ran.getvalue()
    (step,) = plan.steps(spec, plan.open_catalog(spec.store))
    assert (step.state, step.why) == (plan.FRESH, f"1 sample stored; {told}")
    (tmp_path / "in/a.txt").rename(tmp_path / "in/c.txt")
    assert plan.steps(spec, plan.open_catalog(spec.store))[0].why == f"samples: 1 new, 1 gone; {told}"
