"""An endpoint of a remote model: JSON posted and answered, paced, tried again, bounded, and within a budget.

What may pass is tried again after a while: 408, 424 (a backend that failed, of text-embeddings-inference), 425, 429, 500 to
599, a connection that breaks, an answer that is late or no JSON. Where the answer says Retry-After, the whole process is quiet
for so long. The pauses have no jitter, which would change no result but make a failure hard to repeat.

The key is read from the environment when the endpoint is opened, sent in a header to this one address, and blacked out of
whatever the other side says. Redirects are not followed: the key goes nowhere else. Certificates are checked.
"""

import json
import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from featurestore.errors import DecodeError, EndpointError, InputError, MissingExtra

__all__ = ["MAX_ANSWER_BYTES", "PAUSES_S", "Endpoint"]

PAUSES_S: tuple[float, ...] = (0.5, 1, 2, 4, 8, 16, 32, 60, 60, 60)
"""How long to wait before each further try: four minutes, in which a server starts again."""

MAX_RETRY_AFTER_S = 600
"""An endpoint that asks to be left alone for longer ends the job, which goes on from there when it is run again."""

TIME_LIMIT_S = 300
"""An answer that is not whole by then is given up; so is one of which nothing comes for SILENCE_S."""

SILENCE_S = 120
CONNECT_S = 10

MAX_ANSWER_BYTES = 64 << 20
"""4,096 vectors of 4,096 components in base64 are 90 MB: take a smaller batch for those."""

_MAY_PASS = frozenset({408, 424, 425, 429})
# 413 is what text-embeddings-inference says of too many texts, and of one that is too long; 422 of one it cannot tokenize.
_REFUSED = frozenset({400, 413, 422})
_TOLD_CHARS = 300


class _Fault(Exception):
    """What another try may mend; `after_s` is what the answer asks to wait."""

    def __init__(self, told: str, after_s: float = 0.0) -> None:
        super().__init__(told)
        self.after_s = after_s


class Endpoint:
    """One address that JSON is posted to. Safe to share between threads.

    Args:
        url: the whole address.
        key_env: name of the environment variable with the key; None sends none.
        connections: requests in flight at most.
        requests_per_minute: of this process; None sets no limit.
        max_tokens: that this process may spend by what answers say under `usage`; None sets no limit.

    Raises:
        InputError: the environment has no such key.
        MissingExtra: the HTTP client is not installed.
    """

    def __init__(
        self, url: str, key_env: str | None, connections: int, requests_per_minute: int | None, max_tokens: int | None
    ) -> None:
        try:
            import httpx2
        except ImportError:
            raise MissingExtra("package 'httpx2' is not installed: pip install 'braid[run]'") from None
        self.url, self._key_env, self._max_tokens = url, key_env, max_tokens
        self._key = _key(key_env) if key_env else ""
        # A line a request, else, at INFO.
        logging.getLogger("httpx2").setLevel(logging.WARNING)
        self._client = httpx2.Client(
            headers={"Accept-Encoding": "identity", "Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            timeout=httpx2.Timeout(SILENCE_S, connect=CONNECT_S, pool=None),
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
            follow_redirects=False,
        )
        weakref.finalize(self, self._client.close)
        self._interval_s = 60 / requests_per_minute if requests_per_minute else 0.0
        self._lock = threading.Lock()
        self._next_s = self._quiet_s = 0.0
        self._tokens = 0

    def post(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request, tried again where that may help.

        Raises:
            DecodeError: `refused`: the endpoint does not take these values (400, 413 or 422).
            InputError: the key, the address or the model is wrong; or a redirect.
            EndpointError: it does not answer, or not as it should, after all tries; or the tokens are spent.
        """
        content = json.dumps(body, ensure_ascii=False).encode()
        for pause in PAUSES_S:
            try:
                return self._once(content)
            except _Fault as fault:
                self._be_quiet(fault)
            time.sleep(pause)
        try:
            return self._once(content)
        except _Fault as fault:
            raise self._failed(f"{fault}, {len(PAUSES_S) + 1} times") from None

    def _once(self, content: bytes) -> dict[str, Any]:
        self._take_turn()
        status, headers, body = self._send(content)
        if status == 200:
            return self._counted(body)
        told = f"{status} {self._told(headers, body)}".rstrip()
        if status in _REFUSED:
            raise DecodeError("refused", f"{self.url}: {told}")
        if status in _MAY_PASS or status >= 500:
            raise _Fault(f"answered {told}", _retry_after_s(headers.get("retry-after", "")))
        if status in (401, 403):
            which = (
                f"the one in environment variable {self._key_env}" if self._key_env else "none, as no option 'key_env'"
            )
            raise InputError(f"{self.url} answered {told}; the key sent was {which}: set one that may use this model")
        raise InputError(
            f"{self.url} answered {told}; correct what it says, option 'endpoint' (http(s)://…/v1) or 'model'"
        )

    def _send(self, content: bytes) -> tuple[int, Mapping[str, str], bytes]:
        import httpx2

        body, last_s = bytearray(), time.monotonic() + TIME_LIMIT_S
        try:
            with self._client.stream("POST", self.url, content=content) as answer:
                # Raw: what is packed against our wish could be of any size once unpacked.
                for piece in answer.iter_raw():
                    body += piece
                    if len(body) > MAX_ANSWER_BYTES:
                        raise self._failed(f"sent more than {MAX_ANSWER_BYTES} bytes; take a smaller 'batch_size'")
                    if time.monotonic() > last_s:
                        raise _Fault(f"did not send all of its answer within {TIME_LIMIT_S} s")
                return answer.status_code, answer.headers, bytes(body)
        except httpx2.TransportError as error:
            told = f"{type(error).__name__}: {self._blacked_out(str(error))}".rstrip(": ")
            if "CERTIFICATE_VERIFY_FAILED" in told:
                raise InputError(f"{self.url}: {told}; name its authority's file in SSL_CERT_FILE") from None
            raise _Fault(f"did not answer ({told})") from None

    def _take_turn(self) -> None:
        """Waits for its place among the requests of a minute, and while the endpoint wants quiet."""
        with self._lock:
            if self._max_tokens is not None and self._tokens >= self._max_tokens:
                raise EndpointError(
                    f"{self.url}: {self._tokens} tokens are spent, option 'max_tokens_total' allows {self._max_tokens} a "
                    "process; nothing is lost: run it again, and it goes on behind the shards that are done, or raise it"
                )
            at_s = max(self._next_s, time.monotonic())
            self._next_s = at_s + self._interval_s
        while (wait_s := max(at_s, self._quiet_s) - time.monotonic()) > 0:
            time.sleep(wait_s)

    def _be_quiet(self, fault: _Fault) -> None:
        if fault.after_s > MAX_RETRY_AFTER_S:
            raise self._failed(f"{fault}, and asks to wait {fault.after_s:.0f} s, more than {MAX_RETRY_AFTER_S}")
        with self._lock:
            self._quiet_s = max(self._quiet_s, time.monotonic() + fault.after_s)

    def _counted(self, body: bytes) -> dict[str, Any]:
        """The answer's JSON, its tokens added to what is spent."""
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            raise _Fault("answered with no JSON") from None
        if not isinstance(answer, dict):
            raise _Fault("answered with JSON that is no object")
        usage = answer.get("usage")
        tokens = usage.get("total_tokens", usage.get("prompt_tokens")) if isinstance(usage, dict) else None
        if isinstance(tokens, int):
            with self._lock:
                self._tokens += tokens
        elif self._max_tokens is not None:
            raise InputError(f"{self.url} says no usage.total_tokens: leave out option 'max_tokens_total'")
        return answer

    def _told(self, headers: Mapping[str, str], body: bytes) -> str:
        """What an answer says of an error: OpenAI's `error.message`, or its whole text."""
        if place := headers.get("location"):
            return f"to {self._blacked_out(place)[:_TOLD_CHARS]}, and redirects are not followed"
        text = body[: 1 << 16].decode("utf-8", "replace")
        try:
            said = json.loads(body)
            said = said.get("error", said)
            text = said if isinstance(said, str) else str(said.get("message") or text)
        except (ValueError, RecursionError, AttributeError):
            pass
        return self._blacked_out(" ".join(text.split()))[:_TOLD_CHARS]

    def _blacked_out(self, text: str) -> str:
        return text.replace(self._key, "…") if self._key else text

    def _failed(self, what: str) -> EndpointError:
        return EndpointError(f"{self.url} {what}; what is done is kept: run it again when it answers")


def _key(name: str) -> str:
    key = os.environ.get(name, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        what = "is not set" if not key else "holds no key: one is of printable ASCII"
        raise InputError(
            f"environment variable {name}, which option 'key_env' names, {what}; set it where the job runs"
        )
    return key


def _retry_after_s(said: str) -> float:
    """Of a Retry-After header (RFC 9110, 10.2.3): seconds, or a date."""
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", said):
        return float(said)
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
