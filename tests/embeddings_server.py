"""A server of embeddings on this machine, which speaks `POST /v1/embeddings`; its vectors are hashes of the values."""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import numpy as np

__all__ = ["EmbeddingsServer", "Reply", "serving", "vector_of"]

Body = dict[str, Any]


class Reply(NamedTuple):
    """An answer; `body` is JSON, or bytes as they are; None breaks the connection."""

    status: int = 200
    body: Body | bytes | None = b""
    headers: tuple[tuple[str, str], ...] = ()


def vector_of(value: str, dim: int) -> np.ndarray:
    """What the server's model gives for a text, or for an image's data URL: not of length 1."""
    seed = int.from_bytes(hashlib.sha256(value.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(dim).astype(np.float32)


def values_of(body: Body) -> list[str]:
    """The texts or data URLs of a request."""
    if "messages" in body:
        return [body["messages"][0]["content"][0]["image_url"]["url"]]
    return [each if isinstance(each, str) else each["image"] for each in body["input"]]


class _Handler(BaseHTTPRequestHandler):
    server: "EmbeddingsServer"
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.at_work():
            number = self.server.note(self.path, dict(self.headers), body)
            reply = self.server.behave(number, body) or Reply(body=self.server.embeddings(body))
        if reply.body is None:
            self.close_connection = True
            self.connection.close()
            return
        content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for name, value in (*reply.headers, ("Content-Length", str(len(content)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


class EmbeddingsServer(ThreadingHTTPServer):
    """`asked` are the requests' bodies, `behave` may answer a request (its number, from 1) in its own way."""

    daemon_threads = True

    def __init__(self, dim: int = 16) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.dim = dim
        self.behave: Callable[[int, Body], Reply | None] = lambda number, body: None
        self.asked: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.times_s: list[float] = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def note(self, path: str, headers: dict[str, str], body: Body) -> int:
        with self._lock:
            self.asked.append(body)
            self.headers.append(headers)
            self.paths.append(path)
            self.times_s.append(time.monotonic())
            return len(self.asked)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        with self._lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        yield
        with self._lock:
            self.at_once -= 1

    def embeddings(self, body: Body) -> Body:
        """What OpenAI's answer looks like."""
        values = values_of(body)
        vectors = [vector_of(value, body.get("dimensions", self.dim)) for value in values]
        shown = [
            base64.b64encode(each.astype("<f4").tobytes()).decode()
            if body.get("encoding_format") == "base64"
            else each.tolist()
            for each in vectors
        ]
        data = [{"object": "embedding", "index": place, "embedding": each} for place, each in enumerate(shown)]
        tokens = sum(len(value.split()) for value in values)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": body["model"], "usage": usage}

    def handle_error(self, *_: Any) -> None:
        """Clients that go away are what is tested."""


@contextmanager
def serving(dim: int = 16) -> Iterator[EmbeddingsServer]:
    """The server, at work."""
    with EmbeddingsServer(dim) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()
