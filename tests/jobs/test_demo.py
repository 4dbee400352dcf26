"""The demo's report: what was measured, and what was not is said to be so."""

import io
import json

import pytest
from rich.console import Console

from jobs import demo
from jobs.report import field_counts
from tests.conftest import Made

STEP = {"stage": "encode", "name": "loud", "seconds": 3.0, "values": 48, "span_s": 2.0}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "RAW_SECONDS", 0.05)


def test_rates_are_of_this_run_else_of_the_last_report_else_said_to_be_unknown(small: Made) -> None:
    store = small.open()
    before = {"timbre": {"rate": 7.0, "raw_rate": 8.0}, "loud": {"rate": 1.0, "raw_rate": 1.0}}
    rates = demo.encode_rates(store, [STEP], before)
    assert list(rates) == ["loud", "short", "timbre"]
    assert rates["loud"]["rate"] == 24.0
    assert (rates["loud"]["raw_rate"] or 0) > 1.0
    assert rates["timbre"] == before["timbre"]
    assert rates["short"] == {"rate": None, "raw_rate": None}
    assert demo.encode_rates(store, [], json.loads(json.dumps(rates))) == rates, "nothing is lost by running it again"


def test_the_report_says_which_rate_was_not_measured(small: Made) -> None:
    store = small.open()
    report = {
        "samples": store.corpus("planted").rows,
        "fields": field_counts(store, "planted"),
        "encode": demo.encode_rates(store, [], {"timbre": {"rate": 7.0, "raw_rate": 8.0}}),
        "retrieval": demo.retrieval(store),
        "fusion": demo.fusion(store),
    }
    out = io.StringIO()
    demo.show(Console(file=out, width=demo.WIDTH), report)
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert ["loud", "-", "-"] in lines
    assert ["timbre", "7.0", "8.0"] in lines
    assert "not measured: loud, short (encoded before this run, and no earlier report is there)" in out.getvalue()
