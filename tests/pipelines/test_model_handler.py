"""Encoders inside a plain RunInference pipeline: the numbers are the encoder's own, and a bad value is alone in being bad."""

import logging
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.internal import pickler
from apache_beam.ml.inference.base import KeyedModelHandler, RunInference
from apache_beam.testing.util import assert_that

from featurestore import encoders
from featurestore.encoders import contract
from featurestore.errors import AlignmentError, InputError
from pipelines.model_handler import as_model_handler
from pipelines.runner import LOCAL_RUNNER
from tests.checkpoints import checkpoint

SOUNDS = contract.examples("audio")
BAD = b"\xff\xfe\x00 neither text nor media"
OPTIONS = {"n_mels": 32, "batch_size": 3}


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.ERROR):
        yield


def own(key: str, options: dict[str, Any], raws: list[bytes]) -> dict[bytes, np.ndarray]:
    """Value -> the vector that the encoder itself gives it, alone."""
    encoder = encoders.find(key, options)
    return {raw: encoder.encode([encoder.decode(raw)])[0] for raw in raws}


def inferred(handler: Any, elements: list[Any], check: Any) -> Any:
    with beam.Pipeline(LOCAL_RUNNER) as pipeline:
        assert_that(pipeline | beam.Create(elements) | RunInference(handler), check)
    return pipeline.result


def totals(result: Any, namespace: str) -> dict[str, int]:
    """Name -> value of the counters of a namespace, and the number of batches."""
    found = result.metrics().query(beam.metrics.MetricsFilter().with_namespace(namespace))
    counters = {each.key.metric.name: each.committed for each in found["counters"]}
    took = {each.key.metric.name: each.committed for each in found["distributions"]}
    return counters | {"batches": took["inference_batch_latency_micro_secs"].count}


def test_a_plain_pipeline_gives_the_encoders_own_numbers_and_a_bad_value_as_such() -> None:
    expected, raws = own("log-mel", OPTIONS, SOUNDS), [*SOUNDS[:4], BAD, b"", *SOUNDS[4:]]

    def check(outcomes: list[Any]) -> None:
        vectors = [each for each in outcomes if not isinstance(each, str)]
        assert sorted(each for each in outcomes if isinstance(each, str)) == ["empty", "unsupported_format"]
        assert {each.dtype.str for each in vectors} == {"<f4"}
        assert {each.tobytes() for each in vectors} == {each.tobytes() for each in expected.values()}

    told = totals(inferred(as_model_handler("log-mel", OPTIONS), raws, check), "encode log-mel")
    assert told == {"num_inferences": 9, "rejected": 2, "batches": 3}


def test_keys_stay_with_their_values_in_batches_of_a_model() -> None:
    options = {"checkpoint": str(checkpoint("table")), "batch_size": 4}
    texts = contract.examples("text")
    expected = own("static", options, texts)
    keyed = [(number, text) for number, text in enumerate(texts)] + [(99, BAD)]

    def check(outcomes: list[tuple[int, Any]]) -> None:
        made = dict(outcomes)
        assert made.pop(99) == "invalid_utf8"
        assert made.keys() == set(range(len(texts)))
        for number, vector in made.items():
            np.testing.assert_allclose(vector, expected[texts[number]], atol=1e-6)

    inferred(KeyedModelHandler(as_model_handler("static", options)), keyed, check)


def test_a_made_encoder_is_taken_as_it_is_and_pickled_without_its_model() -> None:
    encoder = encoders.find("static", {"checkpoint": str(checkpoint("table")), "batch_size": 5})
    encoder.load()
    handler = as_model_handler(encoder)
    assert handler.batch_elements_kwargs() == {"min_batch_size": 5, "max_batch_size": 5}
    assert handler.fingerprint == encoder.fingerprint()
    pickled = pickler.dumps(handler)
    assert len(pickled) < 1000, "name, options and fingerprint"
    again = pickler.loads(pickled)
    texts = contract.examples("text")
    outcomes = again.run_inference([texts[0], BAD, texts[1]], again.load_model())
    assert outcomes[1] == "invalid_utf8"
    vectors = encoder.encode([encoder.decode(raw) for raw in texts[:2]])
    assert np.array_equal(np.stack([outcomes[0], outcomes[2]]), vectors)
    assert outcomes[0].base is None, "a view would keep its batch's matrix"
    assert len(pickler.dumps(again)) < 1000, "also once it is at work"


def test_one_copy_of_a_large_model_serves_a_machine() -> None:
    expected = own("log-mel", OPTIONS, SOUNDS)
    handler = as_model_handler("log-mel", OPTIONS, large_model=True)
    assert handler.share_model_across_processes()
    assert not as_model_handler("log-mel").share_model_across_processes()

    def check(outcomes: list[Any]) -> None:
        assert [each for each in outcomes if isinstance(each, str)] == ["empty"]
        made = {each.tobytes() for each in outcomes if not isinstance(each, str)}
        assert made == {each.tobytes() for each in expected.values()}

    inferred(handler, [*SOUNDS, b""], check)


def test_what_a_model_fails_on_is_alone_in_that(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = as_model_handler("log-mel", OPTIONS)
    loaded = handler.load_model()
    longest = max(len(loaded._encoder.decode(raw)) for raw in SOUNDS)  # type: ignore[attr-defined]
    encode = loaded._encoder.encode  # type: ignore[attr-defined]

    def failing(values: list[Any]) -> Any:
        if any(len(each) == longest for each in values):
            raise RuntimeError("it is too loud")
        return encode(values)

    monkeypatch.setattr(loaded._encoder, "encode", failing)  # type: ignore[attr-defined]
    outcomes = handler.run_inference(SOUNDS, loaded)
    assert [each for each in outcomes if isinstance(each, str)] == ["encoder_error"]
    assert len(outcomes) == len(SOUNDS)


def test_a_worker_with_another_fingerprint_is_refused() -> None:
    handler = as_model_handler("log-mel")
    handler.fingerprint = "0" * 64
    with pytest.raises(AlignmentError, match="encoder log-mel has another fingerprint on this worker"):
        handler.load_model()


def test_what_an_encoder_does_not_take_is_told_when_the_pipeline_is_made() -> None:
    with pytest.raises(InputError, match="option 'n_mel'"):
        as_model_handler("log-mel", {"n_mel": 32})
    with pytest.raises(InputError, match="beside an encoder that is made"):
        as_model_handler(encoders.find("log-mel"), {"n_mels": 32})
    with pytest.raises(InputError, match="an encoder takes none"):
        (
            beam.Pipeline(LOCAL_RUNNER)
            | beam.Create([b""])
            | RunInference(as_model_handler("log-mel"), inference_args={"a": 1})
        )


def test_an_encoder_of_several_fields_is_given_a_value_of_each_or_none() -> None:
    options = {"checkpoint": str(checkpoint("idefics")), "modality": "image+text"}
    image, text = (contract.examples(each)[0] for each in ("image", "text"))
    encoder = encoders.find("joint", options)
    decoded = [encoder.decode_field(raw, place) for place, raw in enumerate((image, text))]
    expected = encoder.encode([encoder.joined(decoded), encoder.joined([None, decoded[1]])])

    def check(outcomes: list[Any]) -> None:
        assert {each.tobytes() for each in outcomes} == {each.tobytes() for each in expected}

    inferred(as_model_handler("joint", options), [(image, text), (None, text)], check)
