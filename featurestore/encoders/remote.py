"""Embeddings of a model behind an endpoint that speaks OpenAI's `POST /v1/embeddings`: text-embeddings-inference, vLLM,
Jina, Infinity, and hosted models.

    views:
      caption:
        field: caption
        encoder: remote
        options: {endpoint: "http://tei:8080/v1", model: BAAI/bge-m3, dim: 1024}

Its weights cannot be hashed: the fingerprint is of `model`, `dim`, `version` and of what is sent, so that `version` is to be
changed by hand when the model behind the name changes. Where it is asked, how often and with which key is no part of it.

A key stays in the environment, of every worker: a spec names the variable. A search through such a view sends the query (and
that key) to the address that the store's card names, which may be anybody's: it does so where the environment variable
`BRAID_ENDPOINTS` (addresses between commas) has it.

A value that the endpoint refuses goes to quarantine as `refused`; one that it gives no vector for, as `encoder_error`.
"""

import base64
import io
import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from featurestore import media
from featurestore.encoders import BaseEncoder, TrainedOptions
from featurestore.encoders.endpoint import Endpoint
from featurestore.errors import DecodeError, InputError

__all__ = ["Encoder", "Options"]

# No user, no password and no query: an address is in the store.
_ENDPOINT = re.compile(r"https?://[^\s/?#@]+(/[^\s?#@]*)?")
_ORIENTATION = 0x0112


class Options(TrainedOptions):
    """Batch 32: the most that text-embeddings-inference takes unless told otherwise."""

    batch_size: int = Field(default=32, ge=1, le=4096, description="values per request; no part of the recipe")
    endpoint: str = Field(min_length=1, description="http(s)://…/v1; no part of the recipe")
    model: str = Field(min_length=1, description="as the endpoint calls it")
    dim: int = Field(ge=1, le=65_536, description="components of a vector; an answer with others ends the job")
    modality: Literal["text", "image"] = Field(default="text", description="what is sent")
    images: Literal["messages", "objects"] = Field(
        default="messages", description="how: messages, one a request, as vLLM takes them, or objects, as Jina does"
    )
    version: str = Field(default="1", description="yours: change it when the model behind the name changes")
    normalise: bool = Field(default=True, description="to length 1; without it as the endpoint gives them")
    send_dimensions: bool = Field(default=False, description="ask for 'dim' components, of a model trained for that")
    key_env: str | None = Field(
        default=None, description="the environment variable that holds the key; none sends none"
    )
    concurrency: int = Field(default=8, ge=1, le=256, description="requests in flight, of each worker process")
    requests_per_minute: int | None = Field(default=None, ge=1, description="at most, of each worker process")
    max_tokens_total: int | None = Field(
        default=None,
        ge=1,
        description="end the job past so many tokens (and what is in flight), of each worker process",
    )


class Encoder(BaseEncoder):
    """Values are str: a text, or an image's data URL."""

    key = "remote"
    modalities = ("text", "image")
    licence = "its owner's"
    # None: each of their versions would have all vectors paid for again, and none changes more than a last digit.
    libraries: ClassVar[tuple[str, ...]] = ()
    options: Options

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        # Neither value is told: they are where people put secrets by mistake.
        if not _ENDPOINT.fullmatch(options.endpoint):
            raise InputError(
                "encoder 'remote': option 'endpoint' is no address; allowed: http(s)://HOST[:PORT]/v1, without user, "
                "password and query; the key goes into the environment, see 'key_env'"
            )
        if options.key_env is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]*", options.key_env):
            raise InputError(
                "encoder 'remote': option 'key_env' is no name of an environment variable; allowed: capitals, digits and _, "
                "e.g. OPENAI_API_KEY; the key itself goes into that variable, never into a spec"
            )
        self.dim, self.normalised, self.source = options.dim, options.normalise, options.model
        self.concurrency = options.concurrency
        if self._in_messages:
            self.batch_size = 1
        self._accepted = False

    @property
    def _in_messages(self) -> bool:
        return self.options.modality == "image" and self.options.images == "messages"

    def preprocessing(self) -> dict[str, Any]:
        """Return nothing: the model's is unknown, and all that is sent is in the options."""
        return {}

    def address(self) -> dict[str, Any]:
        """Return where, how often and with which key it is asked. A server forms batches of its own whatever is sent."""
        names = ("batch_size", "endpoint", "key_env", "concurrency", "requests_per_minute", "max_tokens_total")
        return {name: getattr(self.options, name) for name in names}

    def decode(self, raw: bytes) -> str:
        """Decode strict UTF-8; of an image make a data URL."""
        return media.decode_text(raw) if self.options.modality == "text" else _data_url(raw)

    def length(self, value: str) -> int:
        """Return the number of characters, which tokens follow closely."""
        return len(value) if self.options.modality == "text" else 0

    def _load(self) -> Endpoint:
        options = self.options
        url = f"{options.endpoint.rstrip('/')}/embeddings"
        limits = options.concurrency, options.requests_per_minute, options.max_tokens_total
        return Endpoint(url, options.key_env, *limits)

    def encode(self, values: Sequence[str]) -> NDArray[np.float32]:
        """Ask the endpoint, in one request; for each image where they go in messages.

        The same values give the same bytes if the endpoint's model does so.

        Raises:
            DecodeError: `refused`, or `encoder_error` (a vector is missing or twice there): of a value among these.
            MissingExtra: the HTTP client is not installed.
            InputError: the endpoint wants another key, knows no such model, gives another `dim`, or refuses even a plain value.
            EndpointError: it does not answer, or option `max_tokens_total` is spent.
        """
        self.load()
        each = [[value] for value in values] if self._in_messages else [list(values)] if values else []
        vectors = [self._asked(group) for group in each]
        return np.concatenate(vectors) if vectors else np.empty((0, self.dim), np.float32)

    def _asked(self, values: list[str]) -> NDArray[np.float32]:
        try:
            vectors = self._answered(values)
        except DecodeError as error:
            if not self._accepted:
                self._try_plain(error)
            raise
        self._accepted = True
        return vectors

    def _try_plain(self, refusal: DecodeError) -> None:
        """Tells a request that is wrong as such from a value that is: else a whole corpus would be sent to be refused."""
        from PIL import Image

        try:
            self._answered(["a" if self.options.modality == "text" else _png(Image.new("RGB", (64, 64), "white"))])
        except DecodeError:
            raise InputError(
                f"model {self.options.model!r} takes no {self.options.modality}: {refusal.detail}; correct the options"
            ) from None
        self._accepted = True

    def _answered(self, values: list[str]) -> NDArray[np.float32]:
        body = {"model": self.options.model, **self._input(values), "encoding_format": "base64"}
        answer = self.load().post(body | ({"dimensions": self.dim} if self.options.send_dimensions else {}))
        vectors = self._vectors(answer, len(values))
        if not self.normalised:
            return vectors
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
        # What has no direction is left as it is, and is rejected by who asked.
        lengths[~(np.isfinite(lengths) & (lengths > 0))] = 1
        scaled: NDArray[np.float32] = (vectors / lengths).astype(np.float32)
        return scaled

    def _input(self, values: list[str]) -> dict[str, Any]:
        if self._in_messages:
            (url,) = values
            content = [{"type": "image_url", "image_url": {"url": url}}]
            return {"messages": [{"role": "user", "content": content}]}
        return {"input": values if self.options.modality == "text" else [{"image": url} for url in values]}

    def _vectors(self, answer: dict[str, Any], count: int) -> NDArray[np.float32]:
        """The vectors of an answer, float32 [count, dim], in the order that their indexes say."""
        try:
            found = {item["index"]: _vector(item["embedding"]) for item in answer["data"]}
            whole = len(answer["data"]) == count and found.keys() == set(range(count))
        except (KeyError, TypeError, ValueError) as error:
            # Not its text: what the other side wrote may hold anything, the key too.
            raise DecodeError("encoder_error", f"the endpoint gave no embeddings: {type(error).__name__}") from None
        if not whole:
            told = f"{len(answer['data'])} vectors of {len(found)} indexes for {count} values"
            raise DecodeError("encoder_error", f"the endpoint gave {told}")
        if strange := sorted({len(vector) for vector in found.values()} - {self.dim}):
            raise InputError(
                f"model {self.options.model!r} gave vectors of {strange[0]} components, option 'dim' says {self.dim}: correct "
                "it, or set 'send_dimensions' where the model can shorten them"
            )
        return np.stack([found[place] for place in range(count)])


def _vector(embedding: str | list[float]) -> NDArray[np.float32]:
    """Of base64, little-endian float32, or a list of numbers, where null is NaN. Servers may give either, whatever is asked."""
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding, validate=True), "<f4").astype(np.float32)
    with np.errstate(over="ignore"):
        vector = np.asarray(embedding, np.float32)
    if vector.ndim != 1:
        raise ValueError(f"an embedding of shape {vector.shape}")
    return vector


def _data_url(raw: bytes) -> str:
    """An upright JPEG as it is, anything else as PNG of the pixels that Braid sees: servers differ in what they make of it."""
    from PIL import Image

    image = media.decode_image(raw)
    with Image.open(io.BytesIO(raw)) as header:
        plain = header.format == "JPEG" and header.mode in ("L", "RGB") and header.getexif().get(_ORIENTATION, 1) == 1
    return f"data:image/jpeg;base64,{base64.b64encode(raw).decode()}" if plain else _png(image)


def _png(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
