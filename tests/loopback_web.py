"""A web server on this machine that is slow, wrong, hostile or good, as the path says that it is asked for."""

import gzip
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["BODY", "Site", "serving"]

BODY = b"abcdefghij"
PACKED = gzip.compress(bytes(50 << 20))


class _Handler(BaseHTTPRequestHandler):
    """Answers each path in the way that it is called."""

    server: "Site"
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        kind = self.path.strip("/").removesuffix(".jsonl")
        self.server.asked[f"{self.command} {kind}"] += 1
        getattr(self, kind.partition("?")[0].replace("-", "_"))(self.server.asked[f"{self.command} {kind}"])
        self.close_connection = True

    do_HEAD = do_GET

    def answer(self, status: int = 200, body: bytes = BODY, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Connection", "close")
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def good(self, _: int) -> None:
        self.answer()

    def gone(self, _: int) -> None:
        self.answer(404)

    def forbidden(self, _: int) -> None:
        self.answer(403)

    def busy_twice(self, number: int) -> None:
        self.answer(200 if number > 2 else 503)

    def busy(self, _: int) -> None:
        self.answer(503)

    def too_many_once(self, number: int) -> None:
        self.answer(200 if number > 1 else 429)

    def short(self, _: int) -> None:
        self.answer(Content_Length="20")

    def short_once(self, number: int) -> None:
        self.answer(Content_Length="20" if number == 1 else "10")

    def dropped(self, _: int) -> None:
        self.answer(Content_Length="20")
        # With no time to linger, a socket is not closed but reset.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def dropped_once(self, number: int) -> None:
        self.answer() if number > 1 else self.dropped(number)

    def long(self, _: int) -> None:
        self.answer(Content_Length="5")

    def unsized(self, _: int) -> None:
        self.answer(body=BODY * 100_000, Content_Length="")

    def without_head(self, _: int) -> None:
        self.answer(200 if self.command == "GET" else 405)

    def loop(self, _: int) -> None:
        self.answer(302, Location="/loop")

    def to_good(self, _: int) -> None:
        self.answer(302, Location="/good")

    def to_a_file(self, _: int) -> None:
        self.answer(302, Location="file:///etc/passwd")

    def drip(self, _: int) -> None:
        self.answer(body=b"", Content_Length="1000000")
        while self.command == "GET" and not self.server.over.wait(0.02):
            self.wfile.write(b"x")

    def late(self, _: int) -> None:
        with self.server.counting:
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        self.server.over.wait(0.03)
        with self.server.counting:
            self.server.at_once -= 1
        self.answer(ETag=f'"{self.path}"')

    def silent(self, _: int) -> None:
        self.server.over.wait()

    def huge(self, _: int) -> None:
        self.answer(body=b"x", Content_Length=str(8 << 30))

    def bomb(self, _: int) -> None:
        self.answer(body=PACKED, Content_Encoding="gzip")

    def ranged(self, _: int) -> None:
        first, last = (int(each) for each in self.headers["Range"].removeprefix("bytes=").split("-"))
        if first >= len(BODY):
            return self.answer(416)
        part = BODY[first : last + 1]
        return self.answer(206, part, Content_Range=f"bytes {first}-{first + len(part) - 1}/{len(BODY)}")

    def log_message(self, *_: Any) -> None:
        pass


class Site(ThreadingHTTPServer):
    """A web server on this machine; `asked` counts requests, `most_at_once` of those that it was late with at one time."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handler: Callable[..., BaseHTTPRequestHandler] = _Handler) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.asked: Counter[str] = Counter()
        self.over = threading.Event()
        self.counting, self.at_once, self.most_at_once = threading.Lock(), 0, 0

    def uri(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def handle_error(self, *_: Any) -> None:
        """Clients that go away are what is tested."""


def serving(site: Site) -> Iterator[Site]:
    with site:
        threading.Thread(target=site.serve_forever, args=(0.01,), daemon=True).start()
        yield site
        site.over.set()
        site.shutdown()
