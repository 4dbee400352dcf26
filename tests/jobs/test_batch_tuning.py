"""`braid plan --sample N --tune`: what the rates of a sample at other batch sizes lead to."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jobs import batch_tuning
from jobs.batch_tuning import told, tried
from jobs.show_plan import show
from jobs.spec import load
from tests.conftest import Made

GIB = 1 << 40


def test_the_search_ends_where_it_gets_slower_or_the_sample_fills_no_more() -> None:
    rates = {1: 10.0, 2: 20.0, 4: 30.0, 8: 29.0, 16: 20.0, 32: 99.0}
    assert tried(rates.__getitem__, GIB, 512) == {1: 10.0, 2: 20.0, 4: 30.0, 8: 29.0, 16: 20.0}
    assert tried(rates.__getitem__, GIB, 4) == {1: 10.0, 2: 20.0, 4: 30.0}


def test_the_search_ends_where_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {1: 10.0, 2: 20.0, 4: None}
    assert tried(rates.__getitem__, GIB, 512) == {1: 10.0, 2: 20.0}
    held = iter([100, 200, 301])
    monkeypatch.setattr(batch_tuning, "peak_bytes", lambda: next(held))
    assert tried(lambda size: float(size), 300, 512) == {1: 1.0, 2: 2.0}


def test_a_change_is_told_only_where_it_gains_a_tenth() -> None:
    assert told("v", 32, {16: 100.0, 32: 95.0}).endswith("16: 100, 32: 95; 32 is as good as any")
    assert "put options: {batch_size: 16} into the spec" in told("v", 32, {16: 120.0, 32: 95.0})
    assert "put options: {batch_size: 16} into the spec" in told("v", 64, {8: 80.0, 16: 120.0})
    assert "fits into memory" in told("v", 32, {})


class Narrow:
    """Sounds as two numbers; a batch takes as long as a value, and one above 4 finds no memory."""

    modality, dim, version = "audio", 2, "1"

    def load(self) -> None:
        return None

    def encode(self, model: object, values: list[np.ndarray]) -> np.ndarray:
        import time

        if len(values) > 4:
            raise MemoryError
        time.sleep(0.02)
        return np.array([[1.0, value.mean()] for value in values])


def test_a_plan_names_the_batch_that_is_fastest_and_fits(small: Made, tmp_path: Path) -> None:
    text = small.spec.read_text().replace(str(small.store), str(tmp_path / "store"))
    text = text.replace(
        "encoder: log-mel, options: {batch_size: 32}",
        f'encoder: torch, options: {{class: "{__name__}:Narrow", batch_size: 1}}',
    )
    (tmp_path / "spec.yaml").write_text(text)
    out = io.StringIO()
    show(load(tmp_path / "spec.yaml"), Console(file=out, width=240), 24, {}, tune=True)
    (line,) = [each for each in out.getvalue().splitlines() if each.startswith("views.loud: values a second")]
    rates = line.partition("batch_size: ")[2].partition(";")[0].split(", ")
    assert [each.partition(":")[0] for each in rates] == ["1", "2", "4"]
    assert "put options: {batch_size: 4} into the spec" in line
    assert "views.timbre: values a second by batch_size: 1: " in out.getvalue()
