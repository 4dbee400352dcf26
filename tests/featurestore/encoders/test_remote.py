"""remote: what is sent, what an endpoint may do, and where the key never is."""

import base64
import io
import itertools
import logging
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featurestore import encoders
from featurestore.encoders import contract, endpoint
from featurestore.encoders.remote import Encoder
from featurestore.errors import DecodeError, EndpointError, InputError
from tests.embeddings_server import EmbeddingsServer, Reply, serving, values_of, vector_of

KEY = "sk-this-is-the-secret-4711"
PAUSES_S = endpoint.PAUSES_S
TEXTS = ["a red bird", "x", "Ein Vogel, рыба und 🐸.", "a long text " * 60]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddingsServer]:
    monkeypatch.setattr(endpoint, "PAUSES_S", (0.01, 0.02, 0.04))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as each:
        yield each


def found(server: EmbeddingsServer | str, **options: Any) -> Encoder:
    address = server if isinstance(server, str) else server.endpoint
    made = encoders.find("remote", {"endpoint": address, "model": "m", "dim": 16, **options})
    assert isinstance(made, Encoder)
    return made


def expected(values: list[str], normalise: bool = True) -> np.ndarray:
    vectors = np.stack([vector_of(value, 16) for value in values])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalise else vectors


def image(kind: str, orientation: int = 1) -> bytes:
    buffer = io.BytesIO()
    drawn = Image.new("RGB", (40, 20), "white")
    drawn.paste("red", (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    drawn.save(buffer, kind, exif=exif)
    return buffer.getvalue()


# What is sent and what comes back.


def test_one_request_a_batch_and_exact_vectors(server: EmbeddingsServer) -> None:
    encoder = found(server, normalise=False)
    assert encoder.encode(TEXTS).tobytes() == expected(TEXTS, normalise=False).tobytes()
    assert server.asked == [{"model": "m", "input": TEXTS, "encoding_format": "base64"}]
    assert server.paths == ["/v1/embeddings"]
    assert "Authorization" not in server.headers[0]


def test_vectors_are_of_length_one_unless_the_option_says_no(server: EmbeddingsServer) -> None:
    np.testing.assert_allclose(found(server).encode(TEXTS), expected(TEXTS), atol=1e-6)
    assert found(server).normalised
    assert not found(server, normalise=False).normalised


def test_a_server_that_gives_lists_whatever_is_asked_gives_the_same(server: EmbeddingsServer) -> None:
    server.behave = lambda _, body: Reply(body=server.embeddings({**body, "encoding_format": "float"}))
    assert found(server, normalise=False).encode(TEXTS).tobytes() == expected(TEXTS, normalise=False).tobytes()


def test_fewer_dimensions_are_asked_for_where_the_option_says_so(server: EmbeddingsServer) -> None:
    assert found(server, dim=4, send_dimensions=True).encode(["a"]).shape == (1, 4)
    assert server.asked[0]["dimensions"] == 4


@pytest.mark.parametrize("images", ["messages", "objects"])
def test_images_go_as_data_urls(server: EmbeddingsServer, images: str) -> None:
    encoder = found(server, modality="image", images=images)
    raws = [image("JPEG"), image("PNG"), image("JPEG", orientation=6)]
    urls = [encoder.decode(raw) for raw in raws]
    np.testing.assert_allclose(encoder.encode(urls), expected(urls), atol=1e-6)
    assert [values_of(body) for body in server.asked] == ([[url] for url in urls] if images == "messages" else [urls])
    assert encoder.batch_size == (1 if images == "messages" else 32)
    kinds, _, contents = zip(*(url.partition(";base64,") for url in urls), strict=True)
    assert kinds == ("data:image/jpeg", "data:image/png", "data:image/png")
    assert base64.b64decode(contents[0]) == raws[0]
    # The last one lies on its side, which a server may not see.
    assert Image.open(io.BytesIO(base64.b64decode(contents[2]))).size == (20, 40)


def test_every_promise_of_encoders_holds(server: EmbeddingsServer) -> None:
    for options in ({}, {"modality": "image"}, {"modality": "image", "images": "objects"}):
        encoder = found(server, **options)
        broken = contract.check(encoder, contract.samples(encoder))
        assert not any(broken.values()), broken


def test_several_requests_are_in_flight_and_no_more_than_said(server: EmbeddingsServer) -> None:
    server.behave = lambda number, _: time.sleep(0.05)
    encoder = found(server, concurrency=4)
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(encoder.encode, [[str(number)] for number in range(24)]))
    assert server.most_at_once == 4


def test_a_fingerprint_is_of_what_changes_vectors_and_asks_nobody(server: EmbeddingsServer) -> None:
    before = found(server).fingerprint()
    for same in ({"batch_size": 9}, {"key_env": "OTHER_KEY"}, {"concurrency": 2}, {"requests_per_minute": 5}):
        assert found(server, **same).fingerprint() == before
    assert found("https://elsewhere.example/v1").fingerprint() == before
    for other in ({"model": "n"}, {"version": "2"}, {"dim": 8}, {"send_dimensions": True}, {"normalise": False}):
        assert found(server, **other).fingerprint() != before
    assert server.asked == []


# What an endpoint may do.


def faults(*replies: Reply) -> Any:
    """First these, then as it should be."""
    return lambda number, _: replies[number - 1] if number <= len(replies) else None


@pytest.mark.parametrize(
    "fault",
    [
        Reply(429),
        Reply(500),
        Reply(503, headers=(("Retry-After", "0"),)),
        Reply(424),
        Reply(body=None),
        Reply(body=b"<html>"),
        Reply(body=b"[]"),
        Reply(body=b'{"data": [', headers=(("Content-Length", "1000"),)),
    ],
)
def test_what_may_pass_is_tried_again(server: EmbeddingsServer, fault: Reply) -> None:
    server.behave = faults(fault, fault)
    np.testing.assert_allclose(found(server).encode(TEXTS), expected(TEXTS), atol=1e-6)
    assert len(server.asked) == 3


def test_an_endpoint_that_answers_429_for_a_minute_costs_a_minute(
    server: EmbeddingsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(endpoint, "PAUSES_S", PAUSES_S)
    monkeypatch.setattr(endpoint.time, "sleep", slept.append)
    server.behave = lambda *_: Reply(429) if sum(slept) < 60 else None
    np.testing.assert_allclose(found(server).encode(["a"]), expected(["a"]), atol=1e-6)
    assert 60 <= sum(slept) < 130


def test_what_does_not_pass_is_told_after_all_tries(server: EmbeddingsServer) -> None:
    server.behave = lambda *_: Reply(503, {"error": {"message": "loading"}})
    with pytest.raises(EndpointError, match=r"/v1/embeddings answered 503 loading, 4 times; what is done is kept"):
        found(server).encode(TEXTS)
    assert len(server.asked) == 4


def test_nobody_there_is_told(monkeypatch: pytest.MonkeyPatch, server: EmbeddingsServer) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(EndpointError, match=r"did not answer \(ConnectError: .*refused\), 4 times"):
            found(f"http://127.0.0.1:{unused.getsockname()[1]}/v1").encode(["a"])


def test_a_late_answer_is_tried_again(monkeypatch: pytest.MonkeyPatch, server: EmbeddingsServer) -> None:
    monkeypatch.setattr(endpoint, "SILENCE_S", 0.2)
    server.behave = lambda number, _: time.sleep(0.5) if number == 1 else None
    np.testing.assert_allclose(found(server).encode(["a"]), expected(["a"]), atol=1e-6)
    assert len(server.asked) == 2


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_obeyed_by_the_whole_process(server: EmbeddingsServer, as_date: bool) -> None:
    # A date has whole seconds.
    after = formatdate(time.time() + 2, usegmt=True) if as_date else "1"
    server.behave = faults(Reply(429, headers=(("Retry-After", after),)))
    encoder = found(server)
    encoder.load()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(encoder.encode, ["a"])
        time.sleep(0.3)
        second = pool.submit(encoder.encode, ["b"])
        np.testing.assert_allclose(np.concatenate([first.result(), second.result()]), expected(["a", "b"]), atol=1e-6)
    assert len(server.asked) == 3
    assert min(server.times_s[1:]) - server.times_s[0] > 0.8


def test_to_be_left_alone_for_long_ends_the_job(server: EmbeddingsServer) -> None:
    server.behave = lambda *_: Reply(429, {"detail": "quota"}, (("Retry-After", "86400"),))
    with pytest.raises(
        EndpointError, match=r"429 .*quota.*, and asks to wait 86400 s, more than 600; what is done is kept"
    ):
        found(server).encode(["a"])
    assert len(server.asked) == 1


def test_requests_keep_to_so_many_a_minute(server: EmbeddingsServer) -> None:
    encoder = found(server, requests_per_minute=600)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(encoder.encode, [["a"]] * 6))
    assert server.times_s[-1] - server.times_s[0] > 0.45


def test_past_its_budget_no_request_is_made(server: EmbeddingsServer) -> None:
    encoder = found(server, max_tokens_total=4)
    encoder.encode(["a b c"])
    encoder.encode(["d e"])
    told = r"5 tokens are spent, option 'max_tokens_total' allows 4 a process; nothing is lost"
    with pytest.raises(EndpointError, match=told):
        encoder.encode(["f"])
    assert len(server.asked) == 2


def test_a_budget_that_cannot_be_kept_is_told(server: EmbeddingsServer) -> None:
    server.behave = lambda _, body: Reply(body=server.embeddings(body) | {"usage": None})
    assert found(server).encode(["a"]).shape == (1, 16)
    with pytest.raises(InputError, match=r"says no usage\.total_tokens: leave out option 'max_tokens_total'"):
        found(server, max_tokens_total=4).encode(["a"])


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (
            Reply(401, {"error": {"message": "bad key"}}),
            r"answered 401 bad key; the key sent was none, as no option 'key_env'",
        ),
        (Reply(403), r"answered 403; the key sent was none"),
        (
            Reply(404, {"error": {"message": "no model m"}}),
            r"404 no model m; correct what it says, option 'endpoint' .* or 'model'",
        ),
        (
            Reply(307, headers=(("Location", "http://127.0.0.2:9/v1"),)),
            r"307 to http://127\.0\.0\.2:9/v1, and redirects",
        ),
    ],
)
def test_what_another_try_does_not_mend_is_told_at_once(server: EmbeddingsServer, reply: Reply, told: str) -> None:
    server.behave = lambda *_: reply
    with pytest.raises(InputError, match=told):
        found(server).encode(["a"])
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_value_is_told_from_a_wrong_request(server: EmbeddingsServer, status: int) -> None:
    server.behave = lambda _, body: Reply(status, {"error": "no such word"}) if "bad" in body["input"] else None
    encoder = found(server)
    with pytest.raises(DecodeError, match=rf"^refused: .*: {status} no such word$"):
        encoder.encode(["good", "bad"])
    assert [body["input"] for body in server.asked] == [["good", "bad"], ["a"]]
    with pytest.raises(DecodeError, match=r"^refused: "):
        encoder.encode(["bad"])
    assert len(server.asked) == 3, "a plain value is tried once"
    server.behave = lambda *_: Reply(status, {"error": {"message": "m has no dimensions"}})
    with pytest.raises(
        InputError, match=rf"^model 'm' takes no text: .*: {status} m has no dimensions; correct the options"
    ):
        found(server).encode(["good", "bad"])


def spoilt(server: EmbeddingsServer, spoil: Any) -> Any:
    def answer(_: int, body: Any) -> Reply:
        made = server.embeddings(body)
        return Reply(body={**made, "data": spoil(made["data"])})

    return answer


def test_order_is_that_of_the_indexes(server: EmbeddingsServer) -> None:
    server.behave = spoilt(server, lambda data: data[::-1])
    np.testing.assert_allclose(found(server).encode(TEXTS), expected(TEXTS), atol=1e-6)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda data: data[:-1], "gave 3 vectors of 3 indexes for 4 values"),
        (lambda data: [*data, data[0]], "gave 5 vectors of 4 indexes for 4 values"),
        (lambda data: [data[0], data[0], *data[2:]], "gave 4 vectors of 3 indexes for 4 values"),
        (lambda data: [{**each, "index": each["index"] + 1} for each in data], "gave 4 vectors of 4 indexes"),
        (lambda data: [{"embedding": each["embedding"]} for each in data], "gave no embeddings: KeyError"),
        (lambda data: [{**each, "embedding": "???"} for each in data], "gave no embeddings: Error"),
        (lambda data: [{**each, "embedding": [KEY] * 16} for each in data], "gave no embeddings: ValueError$"),
        (lambda data: [{**each, "embedding": [[1.0] * 16]} for each in data], "gave no embeddings: ValueError"),
        (lambda data: None, "gave no embeddings: TypeError"),
    ],
)
def test_vectors_that_belong_to_no_value_are_never_taken(server: EmbeddingsServer, spoil: Any, told: str) -> None:
    encoder = found(server)
    encoder.encode(["a"])
    server.behave = spoilt(server, spoil)
    with pytest.raises(DecodeError, match=rf"^encoder_error: the endpoint .*{told}"):
        encoder.encode(TEXTS)


def test_another_dim_ends_the_job(server: EmbeddingsServer) -> None:
    with pytest.raises(InputError, match="gave vectors of 16 components, option 'dim' says 8: correct it, or set"):
        found(server, dim=8).encode(["a"])


@pytest.mark.parametrize("normalise", [True, False])
def test_null_and_zeros_stay_visible(server: EmbeddingsServer, normalise: bool) -> None:
    server.behave = spoilt(
        server,
        lambda data: [{"index": 0, "embedding": [None] * 16}, {"index": 1, "embedding": [0] * 16}, *data[2:]],
    )
    made = found(server, normalise=normalise).encode(TEXTS)
    assert np.isnan(made[0]).all()
    assert not made[1].any()
    assert np.isfinite(made[2:]).all()


def test_an_answer_has_a_largest_size(server: EmbeddingsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "MAX_ANSWER_BYTES", 100)
    with pytest.raises(EndpointError, match="sent more than 100 bytes; take a smaller 'batch_size'"):
        found(server).encode(TEXTS)


def test_a_certificate_that_nobody_vouches_for_is_refused(
    server: EmbeddingsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx2

    def refuse(*_: Any, **__: Any) -> Any:
        raise httpx2.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate")

    encoder = found("https://127.0.0.1:1/v1")
    context = encoder.load()._client._transport._pool._ssl_context
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    monkeypatch.setattr(httpx2.Client, "stream", refuse)
    with pytest.raises(InputError, match=r"CERTIFICATE_VERIFY_FAILED.*; name its authority's file in SSL_CERT_FILE"):
        encoder.encode(["a"])


# The key.


def test_the_key_goes_into_the_header_and_nowhere_else(
    server: EmbeddingsServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", KEY)
    encoder = found(server, key_env="MY_KEY")
    encoder.encode(["a"])
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    said = [repr(encoder.card()), repr(encoder.options), repr(vars(encoder))]
    # At the beginning, and where the text is cut.
    for status, before in itertools.product((400, 401, 404, 500), ("", "x" * 285)):
        reply = Reply(status, {"error": {"message": f"{before}{KEY} is wrong"}})
        server.behave = lambda *_, reply=reply: reply
        with pytest.raises((DecodeError, InputError, EndpointError)) as caught:
            encoder.encode(["a"])
        said.append(str(caught.value) + str(caught.getrepr(chain=True)))
        assert "MY_KEY" in str(caught.value) or status != 401
    for start in range(len(KEY) - 8):
        assert not any(KEY[start : start + 8] in each for each in (*said, caplog.text))


def test_no_key_goes_where_a_redirect_leads(server: EmbeddingsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with serving() as other:
        place = (("Location", f"{other.endpoint}/embeddings"),)
        server.behave = lambda *_: Reply(308, headers=place)
        with pytest.raises(InputError, match="redirects are not followed"):
            found(server, key_env="MY_KEY").encode(["a"])
        assert other.asked == []


@pytest.mark.parametrize(("value", "told"), [("", "is not set"), ("a\nb", "holds no key"), ("ключ", "holds no key")])
def test_a_variable_without_a_key_is_told_before_any_request(
    server: EmbeddingsServer, monkeypatch: pytest.MonkeyPatch, value: str, told: str
) -> None:
    monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(InputError, match=f"environment variable MY_KEY, which option 'key_env' names, {told}"):
        found(server, key_env="MY_KEY").encode(["a"])
    assert server.asked == []


@pytest.mark.parametrize(
    "options",
    [
        {"key_env": KEY},
        {"endpoint": f"https://user:{KEY}@host/v1"},
        {"endpoint": f"https://host/v1?key={KEY}"},
        {"endpoint": f"ftp://host/{KEY}"},
    ],
)
def test_a_secret_in_the_wrong_place_is_refused_and_not_repeated(options: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"option '(key_env|endpoint)' is no") as caught:
        encoders.find("remote", {"endpoint": "http://h/v1", "model": "m", "dim": 4, **options})
    assert KEY not in str(caught.value)


def test_a_card_sends_nothing_where_nobody_trusts_its_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    card = found("https://models.example/v1", key_env="MY_KEY").card()
    monkeypatch.setenv("BRAID_ENDPOINTS", "https://models.example,https://models.example/v1/more")
    told = r"made through 'https://models\.example/v1': put that into .* BRAID_ENDPOINTS.*so is the key in .'MY_KEY'"
    with pytest.raises(InputError, match=told):
        encoders.find_as(card)
    monkeypatch.setenv("BRAID_ENDPOINTS", "https://other.example/v1,https://models.example/v1")
    assert encoders.find_as(card).fingerprint() == encoders.fingerprint_of(card)
    inside = {"image_encoder": "remote", "image_options": {**card["options"], "endpoint": "http://thief.example/v1"}}
    for forged in (
        {**card, "options": {**card["options"], "endpoint": "http://thief.example/v1"}, "address": {}},
        {**card, "key": "video-frames", "options": inside},
    ):
        with pytest.raises(InputError, match=r"made through 'http://thief\.example/v1'"):
            encoders.find_as(forged)
