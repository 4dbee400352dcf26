"""The demo's report: what was measured, and what was not is said to be so."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jobs import demo
from tests.benchmarks import bench_spine_demo
from tests.conftest import Made

STEP = {"stage": "encode", "name": "loud", "seconds": 3.0, "values": 48, "span_s": 2.0}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "RAW_SECONDS", 0.05)


class Demo:
    """`python -m jobs.demo` in this process, on one spec and report, after the runs whose metrics are in a folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.out, self.runs = folder / "demo.json", folder / "runs"
        self.runs.mkdir()
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def ran(self, steps: str) -> None:
        """A run whose metrics are these."""
        (self.runs / f"{len(list(self.runs.iterdir()))}.json").write_text(steps)

    def __call__(self, spec: Path) -> tuple[dict[str, Any], str]:
        """The report, and what was printed."""
        argv = ["demo", spec, "--metrics", *sorted(self.runs.iterdir()), "--out", self.out]
        self._monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        self._capsys.readouterr()
        demo.main()
        return json.loads(self.out.read_text()), self._capsys.readouterr().out


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Demo:
    return Demo(tmp_path, monkeypatch, capsys)


def test_the_report_of_a_store_has_all_that_it_promises(made: Made, report: Demo) -> None:
    steps = json.loads(made.spec.with_name("run.json").read_text())
    report.ran(json.dumps(steps))
    found, printed = report(made.spec)
    store = made.open()
    assert found["samples"] == 160
    assert found["fields"].keys() == store.corpus("planted").fields.keys()
    for counts in found["fields"].values():
        assert list(counts) == ["present", "missing", "quarantined"]
        assert sum(counts.values()) == 160
    assert found["encode"].keys() == set(store.views())
    assert all(rates["rate"] > 0 and rates["raw_rate"] > 0 for rates in found["encode"].values())
    directions = {f"{a}->{b}" for a, b in (("image", "caption"), ("image", "sound"), ("sound", "timbre"))}
    assert found["retrieval"].keys() == directions | {"->".join(each.split("->")[::-1]) for each in directions}
    for figures in found["retrieval"].values():
        assert figures.keys() >= {"recall@1", "recall@5", "recall@10", "chance@10", "exact@10", "n"}
        assert figures["chance@10"] < figures["recall@10"] == pytest.approx(figures["exact@10"], abs=0.01)
        assert figures["index"] == "Flat"
    assert set(found["fusion"]) == {"image", "caption", "sound", "chance", "early", "late", "hybrid"}
    for row in found["fusion"].values():
        for cell in (row["complete"], row["half"]):
            assert cell["ci95"][0] <= cell["accuracy"] <= cell["ci95"][1]
            assert cell["n"] == pytest.approx(cell["samples"] * cell["splits"])
    assert found["recomputed"] == [f"{step['stage']} {step['name']}" for step in steps]
    assert found["seconds"] == found["seconds_now"] > sum(step["seconds"] for step in steps)

    lines = [line.strip() for line in printed.splitlines()]
    (shown,) = (line for line in lines if line.startswith("image → caption"))
    assert shown.count("exact search (Flat)") == 1, "what is compared with brute force is told"
    (shown,) = (line for line in lines if line.startswith("hybrid"))
    cell = found["fusion"]["hybrid"]["complete"]
    assert shown.split()[-3:] == [str(cell["n"]), f"{cell['samples']:.1f}", "5"]
    titles = [line for line in lines if re.fullmatch(r"(seen|heard|sounds): .* → \w+", line)]
    picture, sound = (
        min(row["id"] for row in store.view(view).to_arrow(["id", "present"]).to_pylist() if row["present"])
        for view in ("image", "sound")
    )
    assert titles == [
        f"seen: image of {picture} → text", 'seen: text "a dog" → image',
        f"heard: image of {picture} → audio", f"heard: sound of {sound} → image",
    ]  # fmt: skip

    bars = {bar.name: bar for bar in bench_spine_demo.bars_of(found)}
    assert len(bars) == 5
    assert bars["recall@10, sound->image"].value == pytest.approx(
        found["retrieval"]["sound->image"]["recall@10"], abs=1e-4
    )
    assert bars["make demo: seconds"].ok == (found["seconds"] <= 360)
    accuracies = {kind: row["complete"]["accuracy"] for kind, row in found["fusion"].items()}
    best = max(accuracies[kind] for kind in ("early", "late", "hybrid"))
    assert bars["accuracy of fusion over best modality"].ok == (
        best > max(accuracies[view] for view in ("image", "caption", "sound"))
    )
    found["seconds"] = None
    found["retrieval"]["image->caption"]["recall@10"] = 0.59
    for kind in ("early", "late", "hybrid"):
        found["fusion"][kind] = found["fusion"]["chance"]
    missed = {bar.name for bar in bench_spine_demo.bars_of(found) if not bar.ok}
    assert missed >= {"recall@10, image->caption", "accuracy of fusion over best modality", "make demo: seconds"}


def test_a_run_that_computes_nothing_leaves_what_making_the_store_took(small: Made, report: Demo) -> None:
    report.ran(small.spec.with_name("run.json").read_text())
    first, _ = report(small.spec)
    report.ran("[]")
    again, printed = report(small.spec)
    assert again["recomputed"] == []
    assert again["seconds"] == first["seconds"] > again["seconds_now"]
    assert again["encode"] == first["encode"]
    assert f"making the store and its first report: {first['seconds']} s" in printed


def test_a_store_that_no_known_run_made_whole_is_said_to_be_so(small: Made, report: Demo) -> None:
    steps = json.loads(small.spec.with_name("run.json").read_text())
    report.ran(json.dumps([step for step in steps if step["name"] != "short"]))
    found, printed = report(small.spec)
    assert found["seconds"] is None
    assert found["encode"]["short"]["rate"] is None
    assert found["encode"]["short"]["raw_rate"] > 0
    assert "making the store and its first report: not known" in printed
    assert "not measured: short (encoded by no run whose metrics are there)" in printed
    assert ["short", "-", f"{found['encode']['short']['raw_rate']}"] in [line.split() for line in printed.splitlines()]


def test_rates_are_of_the_run_that_encoded_most_else_of_the_last_report_and_of_the_same_recipe(small: Made) -> None:
    store = small.open()
    step = STEP | {"key": store.view("loud").recipe}
    timbre = {"recipe": store.view("timbre").recipe, "rate": 7.0, "raw_rate": 8.0}
    before = {"timbre": timbre, "short": timbre}
    few, other = step | {"values": 1}, step | {"key": "another", "values": 1000}
    rates = demo.encode_rates(store, [[step], [few, other], []], before)
    assert list(rates) == ["loud", "short", "timbre"]
    assert rates["loud"]["rate"] == 24.0
    assert rates["timbre"] == timbre
    assert rates["short"]["rate"] is None, "another recipe's rate is no rate of this one"
    assert rates["short"]["raw_rate"] not in (None, 8.0)
    assert demo.encode_rates(store, [[]], json.loads(json.dumps(rates))) == rates


def test_what_a_killed_run_measured_is_in_the_report(small: Made, tmp_path: Path, report: Demo) -> None:
    spec, braid = tmp_path / "spec.yaml", Path(sys.executable).with_name("braid")
    spec.write_text(small.spec.read_text().replace(str(small.store), str(tmp_path / "store")))
    figures = report.runs / "0.json"
    killed = subprocess.Popen([braid, "run", spec, "--metrics", figures], stdout=subprocess.DEVNULL)
    ends = time.monotonic() + 300
    while not (figures.exists() and len(json.loads(figures.read_text())) > 1):
        assert killed.poll() is None
        assert time.monotonic() < ends
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    known = json.loads(figures.read_text())
    assert [(step["stage"], step["name"]) for step in known[:2]] == [("shard", "planted"), ("encode", "loud")]
    subprocess.run([braid, "run", spec, "--metrics", report.runs / "1.json"], stdout=subprocess.DEVNULL, check=True)
    rest = json.loads((report.runs / "1.json").read_text())
    assert "loud" not in {step["name"] for step in rest}
    found, _ = report(spec)
    assert all(rates["rate"] and rates["raw_rate"] for rates in found["encode"].values())
    assert found["seconds"] > sum(step["seconds"] for step in known + rest)
    assert found["seconds_now"] < found["seconds"]
